"""Names in commands and files: what was meant, where a configuration lies, what it may name.

A class in a file is code that runs. A file may name those of ``OURS``; every other one has to be
named by the user: on the command line, or in a configuration that was given there.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, _common, _optionals, set_parsing_settings

from mnist_lightning.files import read_bytes

OURS = (
    "mnist_lightning",
    "torch.nn",
    "torch.optim",
    *(f"lightning.pytorch.{part}" for part in ("callbacks", "loggers", "strategies", "profilers")),
)
_CLASS = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
_CONFIG_BYTES, _CONFIG_VALUES = 2**18, 20_000


def hint(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """The known name that a wrong word is closest to; without one, ``otherwise`` or all of them."""
    known = list(known)
    close = get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else otherwise or f"there are: {', '.join(known)}"


def shipped_configs(folder: str = ".") -> list[Path]:
    """The shipped configurations: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    root = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), None)
    return sorted((root / folder).glob("*.yaml")) if root else []


def find_config(name: str, folder: str = ".") -> Path:
    """A configuration by path, or by its bare name: in the working directory, or else shipped.

    Raises:
        ValueError: there is no such file, or no YAML with settings in it.
    """
    files = [Path(name)]
    if os.sep not in name:
        shipped = {file.name: file for file in shipped_configs(folder)}
        files += [
            Path(f"{name}.yaml"),
            *(shipped[n] for n in (name, f"{name}.yaml") if n in shipped),
        ]
    for file in files:
        if file.is_file():
            return _checked(file)
    names = [file.name for file in shipped_configs(folder)]
    raise ValueError(f"--config {name}: no such file; {hint(name, names)}")


def _checked(file: Path) -> Path:
    """The same file; what jsonargparse says about one that holds no YAML does not name it."""
    check_named(read_config(file), file.parent)
    return file


def check_named(content: Any, folder: Path, seen: tuple[Path, ...] = ()) -> None:
    """Refuses settings with the name of a file that a parser could not read within bounds.

    A parser takes any text that names a file for settings that lie there: ``data: mine.yaml``.

    Args:
        content: the settings, or the words of a command.
        folder: that the names are relative to.
        seen: the files that led here.

    Raises:
        ValueError: it is a named pipe, or YAML that is too large to be a configuration.
    """
    for text in _texts(content):
        file = folder / text
        if not os.path.exists(file) or os.path.isdir(file) or file in seen:
            continue
        if not os.path.isfile(file):
            raise ValueError(f"{file} is no file: reading it may never end")
        if file.suffix in (".yaml", ".yml", ".json"):
            check_named(_read_yaml(file), file.parent, (*seen, file))


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield from [content] if "\0" not in content else []
    elif isinstance(content, dict | list):
        for part in content.values() if isinstance(content, dict) else content:
            yield from _texts(part)


def read_config(file: Path) -> dict[str, Any]:
    """What a configuration says.

    Raises:
        ValueError: it is no YAML, holds no settings, or is too large to be a configuration.
    """
    settings = _read_yaml(file)
    if not isinstance(settings, dict):
        raise ValueError(
            f"--config {file}: no settings in it; --print_config after a command shows how"
            " they are written"
        )
    return settings


def _read_yaml(file: Path) -> Any:
    content = read_bytes(file, _CONFIG_BYTES, "that is no configuration")
    try:
        text = content.decode()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        # a few lines of aliases of aliases stand for more values than fit into memory
        bomb = _values(root, {}) > _CONFIG_VALUES
        settings = None if bomb else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "it is no text"
        raise ValueError(f"--config {file}: not a YAML file ({where})") from error
    if bomb:
        raise ValueError(f"--config {file}: it stands for more than {_CONFIG_VALUES:,} values")
    return settings


def _values(node: yaml.Node | None, known: dict[int, int]) -> int:
    """How many values a YAML node stands for, with all aliases written out."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = _CONFIG_VALUES + 1  # if it holds itself
        parts: Iterable[Any] = node.value
        if isinstance(node, yaml.MappingNode):
            parts = (part for pair in node.value for part in pair)
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def classes_in(content: Any) -> Iterator[str]:
    """The texts within settings that can be dotted paths of classes."""
    yield from (text for text in _texts(content) if _CLASS.fullmatch(text))


def classes_in_option(name: str, value: str) -> Iterator[str]:
    """The same for an option of the command line; of one that names a file, those in it."""
    if name == "config" and value:
        yield from classes_in(read_config(find_config(value)))
    elif re.match(r"model|trainer\.(?!default_root_dir)", name):
        if value.endswith((".yaml", ".yml", ".json")) and os.path.isfile(value):
            yield from classes_in(_read_yaml(Path(value)))
        elif not os.path.exists(value):
            yield from _CLASS.findall(value)


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
    for path in named:
        root, _, _ = path.partition(".")
        if root in ("torch", "lightning"):  # not all of it
            modules.add(path.rpartition(".")[0])
        elif _is_users(root):
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
        if not _is_users(module.partition(".")[0]):
            raise ImportError("no module of the user's own")
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no class {path}: {error}") from error


def _is_users(root: str) -> bool:
    return root not in sys.stdlib_module_names and root != "jsonargparse"


class ConfigByName(ActionConfigFile):
    """``--config``: a file, or the bare name of a shipped configuration, from any folder."""

    folder = "."

    def __call__(self, parser, cfg, values, option_string=None):  # type: ignore[no-untyped-def]
        super().__call__(parser, cfg, str(find_config(values, self.folder)), option_string)


class SearchByName(ConfigByName):
    """The same for the shipped searches."""

    folder = "search"
