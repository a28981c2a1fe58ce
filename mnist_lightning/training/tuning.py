"""Finds the learning rate or the batch size of a training with Lightning's Tuner, before it starts.

The Tuner works on a model and a Trainer of their own, which are then thrown away: the training that
follows starts as if the user had given the value.

Of Lightning's curve of the loss over learning rates, this takes another point than Lightning, which
takes the steepest slope over the rate itself: where rates are tiny, noise is steepest. For
``shallow`` and seed 0 it takes 0.0002, and 0.1 trains well.
"""

import csv
import io
import math
import sys
from collections.abc import Container, Mapping, Sequence, Sized
from functools import partial
from typing import Any, Literal, NamedTuple, cast

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, callbacks
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.tuner import Tuner, lr_finder
from tqdm import tqdm

from mnist_lightning.quiet import quiet

Tune = Literal["none", "lr", "batch_size"]

STEPS = 100
"""Mini-batches on which learning rates are tried, one each: Lightning's default."""
# what is found: the arguments that may take it, of the model or of the data
_ARGUMENTS = {"lr": ("model", ("lr", "learning_rate")), "batch_size": ("data", ("batch_size",))}


class Found(NamedTuple):
    """What was found."""

    option: str
    """Of the command line, like ``--model.lr``."""
    value: str
    curve: str = ""
    """CSV with a row for each learning rate that was tried, and the smoothed loss there."""


class Tuned(NamedTuple):
    """The training with the value that was found."""

    argv: list[str]
    """Its command."""
    curve: str
    """As in ``Found``."""


class _Memory(CheckpointIO):
    """Keeps the checkpoint that the Tuner saves and restores in memory: no file can be left."""

    def __init__(self) -> None:
        self._saved: dict[str, dict[str, Any]] = {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        self._saved[str(path)] = checkpoint

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        return self._saved[str(path)]

    def remove_checkpoint(self, path: Any) -> None:
        self._saved.pop(str(path), None)


def trainer_settings(
    settings: Mapping[str, Any], users: Sequence[Callback], plugins: Sequence[Any]
) -> dict[str, Any]:
    """The settings that a Trainer for the Tuner needs: it writes nothing, and trains long enough.

    Args:
        settings: of the Trainer that trains.
        users: its callbacks; those that write or show something are left out.
        plugins: its plugins.

    Raises:
        ValueError: a setting leaves out what the Tuner needs.
    """
    for name in ("fast_dev_run", "barebones"):
        if settings.get(name):
            raise ValueError(
                f"Lightning's Tuner does not work with {name}: leave --tune or --trainer.{name} out"
            )
    unwanted = (callbacks.Checkpoint, callbacks.ProgressBar)
    return {
        "logger": DummyLogger(),  # some callbacks refuse to work without a logger
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "callbacks": [c for c in users if not isinstance(c, unwanted)],
        "plugins": [*(p for p in plugins if not isinstance(p, CheckpointIO)), _Memory()],
        # a short training would end before all learning rates are tried
        "max_epochs": max(STEPS, settings.get("max_epochs") or 0),
        **dict.fromkeys(("min_epochs", "min_steps", "max_time", "val_check_interval"), None),
        "max_steps": -1,
        "check_val_every_n_epoch": sys.maxsize,  # nothing depends on a validation
    }


def find(
    what: Tune,
    trainer: Trainer,
    model: LightningModule,
    data: LightningDataModule,
    arguments: Mapping[str, Container[str]],
) -> Found:
    """Finds a value; the model and the Trainer cannot be used afterwards.

    Args:
        what: to find.
        trainer: made with ``trainer_settings``.
        model: untrained.
        data: of the training.
        arguments: the names of the constructor's arguments of the ``model`` and of the ``data``.

    Raises:
        ValueError: the value cannot be found here, or nothing was found.
    """
    group, names = _ARGUMENTS[what]
    name = next((name for name in names if name in arguments[group]), None)
    if name is None:
        kind = type(model if group == "model" else data).__name__
        raise ValueError(
            f"--tune {what}: {kind} has no argument {' or '.join(names)} that could take the value:"
            " add one to its __init__"
        )
    if trainer.world_size > 1:
        raise ValueError(
            f"--tune works in one process, and this training has {trainer.world_size}: tune with"
            " --trainer.devices 1, then train with the value"
        )
    if what == "batch_size" and trainer.strategy.root_device.type == "cpu":
        raise ValueError(
            "--tune batch_size finds the largest mini-batch that fits into a GPU, and this training"
            " is on the CPU, where larger ones are not faster: give --data.batch_size"
        )
    with quiet(training=False):  # the Tuner resumes from its own checkpoint
        if what == "lr":
            value, curve = _learning_rate(trainer, model, data)
            return Found(f"--{group}.{name}", value, curve)
        return Found(f"--{group}.{name}", str(_batch_size(trainer, model, data)))


def _learning_rate(
    trainer: Trainer, model: LightningModule, data: LightningDataModule
) -> tuple[str, str]:
    """The learning rate in the middle of the loss's fall, with two digits; the curve as CSV."""
    if not model.automatic_optimization:
        raise ValueError(
            f"--tune lr: {type(model).__name__} optimizes manually, so its learning rate cannot be"
            " changed at each step: choose one yourself"
        )
    # a live bar only on a terminal, as in a training
    lr_finder.tqdm = partial(tqdm, disable=not sys.stdout.isatty(), leave=False)
    try:
        finder = Tuner(trainer).lr_find(
            model, datamodule=data, num_training=STEPS, update_attr=False
        )
    finally:
        lr_finder.tqdm = tqdm
    assert finder is not None  # it is only with fast_dev_run
    rates, losses = finder.results["lr"], finder.results["loss"]
    chosen = middle_of_fall(losses)
    if chosen is None:
        raise ValueError(
            "--tune lr found no learning rate: the loss does not fall at any, or is not finite"
            f" ({', '.join(f'{loss:.4g}' for loss in losses[:3])}, ...). Check the images and the"
            " model"
        )
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("lr", "loss"), *zip(rates, losses, strict=True)])
    return f"{rates[chosen]:.2g}", text.getvalue()


def middle_of_fall(losses: Sequence[float]) -> int | None:
    """Returns where a loss is in the middle of its longest fall, on a noisy curve.

    The fall is the longest sequence of losses, each lower than the one before; others may be
    between them. Its middle is half its length before its end. (``fastai`` chooses a learning rate
    in this way and calls it the valley.)

    Args:
        losses: those that are not finite are left out.

    Returns:
        An index; None if the fall has fewer than four losses.
    """
    finite = [index for index, loss in enumerate(losses) if math.isfinite(loss)]
    lengths: list[int] = []  # of the longest fall that ends at each
    for n, index in enumerate(finite):
        higher = (m for m in range(n) if losses[finite[m]] > losses[index])
        lengths.append(1 + max((lengths[m] for m in higher), default=0))
    length = max(lengths, default=0)
    return finite[lengths.index(length) - length // 2] if length >= 4 else None


def _batch_size(trainer: Trainer, model: LightningModule, data: LightningDataModule) -> int:
    """The largest power of two that fits into memory, up to 8,192; at most all images."""
    # Lightning stops at 8,192 in any case. It would not try the limit itself, so this one is above.
    size = Tuner(trainer).scale_batch_size(model, datamodule=data, max_val=2**14)
    images = getattr(trainer.train_dataloader, "dataset", None)
    return min(cast(int, size), len(images) if isinstance(images, Sized) else sys.maxsize)


def command(argv: Sequence[str], found: Found, in_file: bool) -> list[str]:
    """The same command with the value that was found, instead of ``--tune``.

    Args:
        argv: the arguments of the command.
        found: in it.
        in_file: whether a configuration has ``tune``, too.
    """
    kept: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name not in ("--tune", found.option):
            kept.append(argument)
        elif not equals:
            next(arguments)  # its value
    return [*kept, *(["--tune", "none"] if in_file else []), found.option, found.value]
