"""Classes that files name: which of them may be imported, and how a class is named.

Importing a class runs code. A file may name classes in ``OURS``; the user must name every other
class, on the command line or in a configuration given there.
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
    """Whether it is the dotted path of a class in a user's module."""
    ours = tuple(f"{part}." for part in OURS)
    if path is None or not CLASS.fullmatch(path) or path.startswith(ours):
        return False
    return is_users(path.partition(".")[0])


def class_path(kind: type) -> str:
    """The dotted path that names a class in files and commands."""
    package = sys.modules["mnist_lightning"]
    if kind.__name__ in package.__all__ and getattr(package, kind.__name__) is kind:
        return f"mnist_lightning.{kind.__name__}"  # in any module
    return f"{kind.__module__}.{kind.__qualname__}"


def naming(**classes: str) -> list[str]:
    """The options with which a command imports the user's classes.

    Args:
        classes: dotted paths by option: ``model="my_module.MyModel"``.

    Returns:
        ``["--model", "my_module.MyModel"]``; nothing for classes that are not the user's.
    """
    own = [(f"--{option}", path) for option, path in classes.items() if is_own(path)]
    return [argument for pair in own for argument in pair]


@contextmanager
def parser_settings() -> Iterator[None]:
    """Limits the effect of ``allow_classes`` to this context."""
    # jsonargparse's public interface can only add to its lists
    before, remote = dict(_common.parsing_settings), "s" in _optionals._get_config_read_mode()
    try:
        yield
    finally:
        _common.parsing_settings.clear()
        _common.parsing_settings.update(before)
        set_parsing_settings(config_read_mode_fsspec_enabled=remote)


def allow_classes(named: Iterable[str]) -> None:
    """Lets parsers import for a file only from ``OURS`` and from the modules of these classes.

    It lasts until the process ends, or until the end of ``parser_settings``. A user's module is
    allowed as a whole; nothing of the standard library is.
    """
    modules = set()
    for path in filter(CLASS.fullmatch, named):
        root, _, _ = path.partition(".")
        if root in ("torch", "lightning"):  # only this module, not the whole package
            modules.add(path.rpartition(".")[0])
        elif is_users(root):
            modules.add(root)
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*OURS, *sorted(modules)],
        instantiate_subclass_spec_in_any=False,
        config_read_mode_fsspec_enabled=False,  # Lightning would try every text as a URL
    )


def import_class(path: str) -> Any:
    """Imports a user's class by the dotted path that the user gave.

    Raises:
        ValueError: there is no such class.
    """
    module, _, name = path.rpartition(".")
    try:
        if not is_users(module.partition(".")[0]):
            raise ImportError("not a user's module")
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no class {path}: {error}") from error


def imported(path: str) -> Any:
    """What has this dotted path, if its module is imported already; else None."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def is_users(root: str) -> bool:
    return root not in sys.stdlib_module_names and root != "jsonargparse"
