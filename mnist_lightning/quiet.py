"""Warnings and log messages of Lightning that do not help the user, silenced in one place."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = tuple(logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric"))

# regular expressions of warnings about things that are as they should be here
_ADVICE = (
    ".*does not have many workers.*",  # the images are in memory
    ".*smaller than the logging interval.*",  # metrics are logged once per epoch
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*Total length of `list` across ranks is zero.*",  # no validation, with val_fraction 0
    ".*LeafSpec.*",
    ".*isinstance.treespec.*",
)
# these matter only if a training resumes
_RESUMING = (".*The dirpath has changed.*", ".*callbacks used to create.*")


def silence(training: bool = True) -> None:
    """Silences Lightning's log below warnings, and advice that does not apply, until the exit.

    Args:
        training: keeps the warnings that matter when a checkpoint is resumed.
    """
    for logger in _LOGGERS:
        logger.setLevel(logging.WARNING)
    for advice in (*_ADVICE, *(() if training else _RESUMING)):
        warnings.filterwarnings("ignore", advice)


@contextmanager
def quiet(training: bool) -> Iterator[None]:
    """Like ``silence``, but restores everything; other warnings are shown as one line."""
    levels = [logger.level for logger in _LOGGERS]
    with warnings.catch_warnings():
        silence(training)
        warnings.showwarning = _show
        try:
            yield
        finally:
            for logger, level in zip(_LOGGERS, levels, strict=True):
                logger.setLevel(level)


def _show(message: Warning | str, *_: object, **__: object) -> None:
    """Prints a warning without its place in the code, above the progress bar."""
    from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

    Tqdm.write(f"warning: {message}", file=sys.stderr)
