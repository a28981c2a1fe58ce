"""Classes that files name: which ones may be imported, and how a class is named.

A class in a file is code that runs. A file may name those of ``OURS``; every other one has to be
named by the user: on the command line, or in a configuration that was given there.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from jsonargparse import _common, _optionals, set_parsing_settings

OURS = (
    "mnist_lightning",
    "torch.nn",
    "torch.optim",
    *(f"lightning.pytorch.{part}" for part in ("callbacks", "loggers", "strategies", "profilers")),
)
CLASS = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")


def is_own(path: str | None) -> bool:
    """Whether it is the dotted path of a class in a module of the user's own."""
    ours = tuple(f"{part}." for part in OURS)
    if path is None or not CLASS.fullmatch(path) or path.startswith(ours):
        return False
    return is_users(path.partition(".")[0])


def class_path(kind: type) -> str:
    """The dotted path that a class is named by, in files and in commands."""
    package = sys.modules["mnist_lightning"]
    if kind.__name__ in package.__all__ and getattr(package, kind.__name__) is kind:
        return f"mnist_lightning.{kind.__name__}"  # wherever it lies
    return f"{kind.__module__}.{kind.__qualname__}"


def naming(**classes: str) -> list[str]:
    """What a command has to say so that classes of the user's own are imported.

    Args:
        classes: dotted paths, by the option that names them: ``model="my_module.MyModel"``.

    Returns:
        The words ``--model my_module.MyModel``; none for classes that are not own.
    """
    own = [(f"--{option}", path) for option, path in classes.items() if is_own(path)]
    return [word for pair in own for word in pair]


@contextmanager
def parser_settings() -> Iterator[None]:
    """Within, ``allow_classes`` counts; afterwards parsers import what they did before."""
    # jsonargparse itself can only add to what is allowed and what is not
    before, remote = dict(_common.parsing_settings), "s" in _optionals._get_config_read_mode()
    try:
        yield
    finally:
        _common.parsing_settings.clear()
        _common.parsing_settings.update(before)
        set_parsing_settings(config_read_mode_fsspec_enabled=remote)


def allow_classes(named: Iterable[str]) -> None:
    """From now on, parsers import nothing for a file but from ``OURS`` and with these classes.

    For good, unless it is called within ``parser_settings``.
    A module of the user's own is allowed as a whole, nothing of the standard library is.
    """
    modules = set()
    for path in filter(CLASS.fullmatch, named):
        root, _, _ = path.partition(".")
        if root in ("torch", "lightning"):  # not all of it
            modules.add(path.rpartition(".")[0])
        elif is_users(root):
            modules.add(root)
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*OURS, *sorted(modules)],
        instantiate_subclass_spec_in_any=False,
        config_read_mode_fsspec_enabled=False,  # Lightning has every text tried as an address
    )


def import_class(path: str) -> Any:
    """The class of the user's own at a dotted path that the user named.

    Raises:
        ValueError: there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        if not is_users(module.partition(".")[0]):
            raise ImportError("no module of the user's own")
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no class {path}: {error}") from error


def is_users(root: str) -> bool:
    return root not in sys.stdlib_module_names and root != "jsonargparse"
