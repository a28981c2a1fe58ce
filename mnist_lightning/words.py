"""What is wrong with the words of a command, as far as it shows before PyTorch is imported.

A typo is answered at once, and not after the seconds that the imports take. What is refused here is
certainly wrong; what passes may still be refused by the parser. The options are those that
completion knows.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from mnist_lightning import moved
from mnist_lightning.catalog import shipped_configs
from mnist_lightning.classes import is_own
from mnist_lightning.completion import options as listed
from mnist_lightning.configs import Asked, asked, find_config
from mnist_lightning.console import python, suggest
from mnist_lightning.runs.folder import find_checkpoint, run_name

_WITHIN = {"help", "class_path", "init_args", "dict_kwargs"}


def check(command: str, words: Sequence[str]) -> None:
    """Refuses what is certainly wrong.

    Args:
        command: the first word of the command line.
        words: the others.

    Raises:
        ValueError: an option that there is not, a configuration or checkpoint that is not there, no
            model or no weights where there must be some, PyTorch or Lightning is not installed.
        ModuleNotFoundError: a search without Optuna.
    """
    for package in ("torch", "lightning"):
        if find_spec(package) is None:
            raise ValueError(
                f"{python()} has no {package}: use the Python that this was installed with"
            )
    found = list(options(words))
    given = dict(found)
    if command == "search":
        for name, value in found:
            if name == "config":
                find_config(value, "search")
        if "help" not in given and find_spec("optuna") is None:
            raise ModuleNotFoundError(name="optuna")  # __main__ says how to install it
        return
    wanted = asked(words)
    if not is_own(wanted.model):
        given = dict(options(moved.current_words(words)))
    if "help" not in given:
        _check_options(command, list(given), wanted)
        _check_checkpoint(command, given, wanted)


def _check_options(command: str, names: list[str], wanted: Asked) -> None:
    known = {option.name.removeprefix("--") for option in listed() if command in option.commands}
    # a model, or data, of the user's own has options that are not listed
    open_groups = {"data"} if wanted.ckpt_path is not None or wanted.data is not None else set()
    models = next(option.values for option in listed() if option.name == "--model.help")
    name = (wanted.model or "").rpartition(".")[2]
    if wanted.ckpt_path is not None or wanted.model is None or name not in models:
        open_groups.add("model")
        if wanted.ckpt_path is None and wanted.model is not None and wanted.model.isidentifier():
            raise ValueError(f"no model {wanted.model!r}; {suggest(wanted.model, models)}")
    for name in names:
        option = name.removesuffix("+")
        group, _, rest = option.partition(".")
        first = rest.partition(".")[0]
        if option in known | {"trust"} or (rest and group in open_groups) or first in _WITHIN:
            continue
        if f"{group}.{first}" in known:  # of a setting, a part
            continue
        every = [f"--{option}" for option in sorted(known)]
        raise ValueError(
            f"no option --{name}; {suggest(f'--{name}', every, 'all of them: --help')}"
        )


def _check_checkpoint(command: str, given: dict[str, str], wanted: Asked) -> None:
    if wanted.ckpt_path is not None:
        kind = "last" if command == "fit" else "best"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the command itself warns
            find_checkpoint(
                wanted.ckpt_path, Path(wanted.root) / "lightning_logs", run_name(wanted), kind
            )
    elif command in ("validate", "test", "predict") and "print_config" not in given:
        raise ValueError(
            f"{command} needs trained weights: --ckpt_path FILE, or the folder of a run"
        )
    elif not wanted.configs and wanted.model is None and "print_config" not in given:
        names = ", ".join(path.name for path in shipped_configs())
        raise ValueError(f"which model? --config NAME ({names}), or --model CLASS")


def options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options among the words, as (name without dashes, value); a value may be missing."""
    for word, following in pairwise([*words, ""]):
        if re.match(r"--\w|-[ch]\b", word):
            name, equals, value = word.lstrip("-").partition("=")
            if not equals:
                value = "" if following.startswith("--") else following
            yield {"c": "config", "h": "help"}.get(name, name), value
