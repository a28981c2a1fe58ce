"""Configurations: find them, read them within bounds, and what of a command they decide."""

import argparse
import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile

from mnist_lightning.catalog import shipped_configs
from mnist_lightning.classes import CLASS
from mnist_lightning.console import suggest
from mnist_lightning.files import read_bytes

_CONFIG_BYTES, _CONFIG_VALUES = 2**18, 20_000


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
        if file.exists() and not file.is_dir():  # a pipe is refused by its name
            return _checked(file)
    names = [file.name for file in shipped_configs(folder)]
    raise ValueError(f"--config {name}: no such file; {suggest(name, names)}")


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
    yield from (text for text in _texts(content) if CLASS.fullmatch(text))


def classes_in_word(word: str) -> Iterator[str]:
    """The same for a word of the command line; of one that is a file of settings, those in it."""
    value = _value(word)
    if value.endswith((".yaml", ".yml", ".json")) and os.path.isfile(value):
        yield from classes_in(_read_yaml(Path(value)))
    elif not os.path.exists(value):
        yield from CLASS.findall(value)


def _value(word: str) -> str:
    return word.partition("=")[2] if word.startswith("-") else word


@dataclass
class Asked:
    """What of a command decides how the rest of it is understood.

    Flags win over files, and later files over earlier ones, wherever they stand.
    """

    configs: list[Path]
    """In their order."""
    ckpt_path: str | None
    model: str | None
    """The class, as it was named."""
    data: str | None
    root: str
    """``trainer.default_root_dir``."""
    words: list[str]
    """All the words but the configurations and the checkpoint."""


class _Words(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        option = re.match(r"argument (?:-\w/)?(--[\w.]+).*: expected one argument", message)
        raise ValueError(f"{option[1]} needs a value after it" if option else message)


def asked(words: Sequence[str]) -> Asked:
    """Reads the few options that the parser of all options depends on, on the line and in files.

    By argparse, which jsonargparse is made of: both agree on what an option is.

    Raises:
        ValueError: a configuration, or another file that is named, is not there or cannot be read.
    """
    first = _Words(add_help=False, allow_abbrev=False)
    first.add_argument("-c", "--config", action="append", default=[])
    first.add_argument("--ckpt_path")
    found, others = first.parse_known_args(words)
    check_named([_value(word) for word in others], Path())
    second = _Words(add_help=False, allow_abbrev=False)
    for name in ("model", "data"):
        second.add_argument(f"--{name}", f"--{name}.class_path", dest=name)
    second.add_argument("--trainer.default_root_dir", dest="root")
    flags = vars(second.parse_known_args(others)[0]) | {"ckpt_path": found.ckpt_path}
    flags |= {key: _class_name(flags[key]) for key in ("model", "data")}
    configs = [find_config(name) for name in found.config]
    said: dict[str, str | None] = {}
    for config in configs:
        settings = read_config(config)
        for key in ("model", "data"):
            said[key] = _class_name(settings.get(key)) or said.get(key)
        trainer = settings.get("trainer")
        if isinstance(trainer, dict) and isinstance(trainer.get("default_root_dir"), str):
            said["root"] = trainer["default_root_dir"]
        checkpoint = settings.get("ckpt_path")
        # the config.yaml of a resumed run names its own checkpoint: it is there to start again
        if isinstance(checkpoint, str) and not _within(checkpoint, config.parent):
            said["ckpt_path"] = checkpoint
    said |= {key: value for key, value in flags.items() if value is not None}
    return Asked(
        configs,
        said.get("ckpt_path"),
        said.get("model"),
        said.get("data"),
        said.get("root") or ".",
        others,
    )


def _class_name(value: Any) -> str | None:
    """The class that a setting names: by its path, within its settings, or in a file of them."""
    if isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")):
        value = _read_yaml(Path(value)) if os.path.isfile(value) else None
    elif isinstance(value, str) and value.startswith("{"):
        with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
            value = yaml.safe_load(value)
    name = value.get("class_path") if isinstance(value, dict) else value
    return name if isinstance(name, str) and not name.startswith("{") else None


def _within(path: str, folder: Path) -> bool:
    return Path(path).absolute().is_relative_to(folder.absolute())


class ConfigByName(ActionConfigFile):
    """``--config``: a file, or the bare name of a shipped configuration, from any folder."""

    folder = "."

    def __call__(self, parser, cfg, values, option_string=None):  # type: ignore[no-untyped-def]
        super().__call__(parser, cfg, str(find_config(values, self.folder)), option_string)


class SearchByName(ConfigByName):
    """The same for the shipped searches."""

    folder = "search"
