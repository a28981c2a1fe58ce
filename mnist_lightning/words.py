"""Checks a command line before PyTorch is imported, so that a typo is reported at once.

It refuses only what is certainly wrong; the parser may still refuse the rest. It knows the options
that ``completion`` lists.
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
from mnist_lightning.configs import Request, find_config, read_request
from mnist_lightning.console import python, suggest
from mnist_lightning.runs.folder import find_checkpoint, run_name

_WITHIN = {"help", "class_path", "init_args", "dict_kwargs"}
_OPTION = re.compile(r"--\w|-[ch]\b")
_FLAGS = {"--trust", "--json", "--help", "-h", "--print_config"}  # without a value after them


def check(command: str, argv: Sequence[str]) -> None:
    """Refuses a command that is certainly wrong.

    Args:
        command: the first word of the command line.
        argv: the arguments after it.

    Raises:
        ValueError: an option does not exist; a configuration, checkpoint or model is missing;
            PyTorch or Lightning is not installed.
        ModuleNotFoundError: a search without Optuna.
    """
    for package in ("torch", "lightning"):
        if find_spec(package) is None:
            raise ValueError(
                f"{python()} has no {package}: use the Python that has mnist_lightning"
            )
    given = dict(options(argv))
    if command == "search":
        for name, value in options(argv):
            if name == "config":
                find_config(value, "search")
        if "help" not in given and find_spec("optuna") is None:
            raise ModuleNotFoundError(name="optuna")  # __main__ says how to install it
        return
    if command == "predict":
        argv, _ = split_paths(argv)  # they name images, not settings
    request = read_request(argv)
    if not is_own(request.model):
        given = dict(options(moved.current_argv(argv)))
    if "help" not in given:
        _check_options(command, list(given), request)
        _check_checkpoint(command, given, request)


def _check_options(command: str, names: list[str], request: Request) -> None:
    known = {option.name.removeprefix("--") for option in listed() if command in option.commands}
    # the options of a user's model or data are not listed
    open_groups = {"data"} if request.ckpt_path is not None or request.data is not None else set()
    models = next(option.values for option in listed() if option.name == "--model.help")
    name = (request.model or "").rpartition(".")[2]
    if request.ckpt_path is not None or request.model is None or name not in models:
        open_groups.add("model")
        if request.ckpt_path is None and request.model is not None and request.model.isidentifier():
            raise ValueError(f"no model {request.model!r}; {suggest(request.model, models)}")
    for name in names:
        option = name.removesuffix("+")
        group, _, rest = option.partition(".")
        first = rest.partition(".")[0]
        if option in known | {"trust"} or (rest and group in open_groups) or first in _WITHIN:
            continue
        if f"{group}.{first}" in known:  # part of a setting
            continue
        every = [f"--{option}" for option in sorted(known)]
        raise ValueError(
            f"no option --{name}; {suggest(f'--{name}', every, 'all of them: --help')}"
        )


def _check_checkpoint(command: str, given: dict[str, str], request: Request) -> None:
    if request.ckpt_path is not None:
        kind = "last" if command == "fit" else "best"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the command itself warns
            find_checkpoint(
                request.ckpt_path, Path(request.root) / "lightning_logs", run_name(request), kind
            )
    elif command in ("validate", "test", "predict") and "print_config" not in given:
        raise ValueError(
            f"{command} needs trained weights: --ckpt_path FILE, or the folder of a run"
        )
    elif not request.configs and request.model is None and "print_config" not in given:
        names = ", ".join(path.name for path in shipped_configs())
        raise ValueError(f"which model? --config NAME ({names}), or --model CLASS")


def options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options in ``argv``, as (name without dashes, value); the value may be empty."""
    for argument, following in pairwise([*argv, ""]):
        if _OPTION.match(argument):
            name, equals, value = argument.lstrip("-").partition("=")
            if not equals:
                value = "" if following.startswith("--") else following
            yield {"c": "config", "h": "help"}.get(name, name), value


def split_paths(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divides the arguments of ``predict``: the options with their values, and the paths.

    Before ``--``, the option ``--ckpt_path`` may have several values.
    """
    before, paths, several = argv, [], False
    if "--" in argv:
        end = list(argv).index("--")
        before, paths = argv[:end], list(argv[end + 1 :])
    options: list[str] = []
    named: list[str] = []
    for previous, argument in pairwise(["", *before]):
        takes_value = _OPTION.match(previous) and "=" not in previous and previous not in _FLAGS
        if _OPTION.match(argument):
            several = "--" in argv and argument == "--ckpt_path"
        of_option = _OPTION.match(argument) or takes_value or several
        (options if of_option else named).append(argument)
    return options, named + paths
