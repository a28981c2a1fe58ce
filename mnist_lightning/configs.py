"""Finds and reads configurations; reads the options that the parser itself depends on."""

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


def find_config(name: str, command: str = "fit") -> Path:
    """Finds a configuration by its path, or by its name: in the working directory, then shipped.

    Args:
        name: with or without ``.yaml``.
        command: only the shipped files for it are known by name.

    Raises:
        ValueError: there is no such file, or it is not YAML with settings.
    """
    files = [Path(name)]
    if os.sep not in name:
        shipped = {file.name: file for file in shipped_configs(command)}
        files += [
            Path(f"{name}.yaml"),
            *(shipped[n] for n in (name, f"{name}.yaml") if n in shipped),
        ]
    for file in files:
        if file.exists() and not file.is_dir():  # _checked refuses a pipe
            return _checked(file)
    names = [file.name for file in shipped_configs(command)]
    raise ValueError(f"--config {name}: no such file; {suggest(name, names)}")


def _checked(file: Path) -> Path:
    """Returns the file if it can be read; jsonargparse's own error would not name it."""
    check_named(read_config(file), file.parent)
    return file


def check_named(content: Any, folder: Path, seen: tuple[Path, ...] = ()) -> None:
    """Refuses settings that name a file which is a pipe or too large.

    A parser reads settings from any file that a value names: ``data: mine.yaml``.

    Args:
        content: the settings, or the arguments of a command.
        folder: the names are relative to it.
        seen: the files that named this content.

    Raises:
        ValueError: a file is a named pipe, or YAML that is too large to be a configuration.
    """
    for text in _texts(content):
        file = folder / text
        if not os.path.exists(file) or os.path.isdir(file) or file in seen:
            continue
        if not os.path.isfile(file):
            raise ValueError(f"{file} is not a regular file: reading it may never end")
        if file.suffix in (".yaml", ".yml", ".json"):
            check_named(_read_yaml(file), file.parent, (*seen, file))


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield from [content] if "\0" not in content else []
    elif isinstance(content, dict | list):
        for part in content.values() if isinstance(content, dict) else content:
            yield from _texts(part)


def read_config(file: Path) -> dict[str, Any]:
    """The settings in a configuration.

    Raises:
        ValueError: it is not YAML, holds no settings, or is too large to be a configuration.
    """
    settings = _read_yaml(file)
    if not isinstance(settings, dict):
        raise ValueError(
            f"--config {file}: it holds no settings; --print_config after a command prints an"
            " example"
        )
    return settings


def _read_yaml(file: Path) -> Any:
    content = read_bytes(file, _CONFIG_BYTES, "it cannot be a configuration")
    try:
        text = content.decode()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        # in a few lines, aliases of aliases can expand to more values than fit into memory
        bomb = _values(root, {}) > _CONFIG_VALUES
        settings = None if bomb else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "it is not text"
        raise ValueError(f"--config {file}: not a YAML file ({where})") from error
    if bomb:
        raise ValueError(
            f"--config {file}: its aliases expand to more than {_CONFIG_VALUES:,} values"
        )
    return settings


def _values(node: yaml.Node | None, known: dict[int, int]) -> int:
    """How many values a YAML node has when all aliases are expanded."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = _CONFIG_VALUES + 1  # stays if the node contains itself
        parts: Iterable[Any] = node.value
        if isinstance(node, yaml.MappingNode):
            parts = (part for pair in node.value for part in pair)
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def classes_in(content: Any) -> Iterator[str]:
    """The texts in settings that may be dotted paths of classes."""
    yield from (text for text in _texts(content) if CLASS.fullmatch(text))


def classes_in_argument(argument: str) -> Iterator[str]:
    """The same for an argument of the command line, or for the settings file that it names."""
    value = _value(argument)
    if value.endswith((".yaml", ".yml", ".json")) and os.path.isfile(value):
        yield from classes_in(_read_yaml(Path(value)))
    elif not os.path.exists(value):
        yield from CLASS.findall(value)


def _value(argument: str) -> str:
    return argument.partition("=")[2] if argument.startswith("-") else argument


@dataclass
class Request:
    """The options of a command that the parser of all other options depends on.

    Flags win over files, and later files over earlier ones, in any order on the command line.
    """

    configs: list[Path]
    """In their order."""
    ckpt_path: str | None
    model: str | None
    """The class, as the user wrote it."""
    data: str | None
    root: str
    """``trainer.default_root_dir``."""
    others: list[str]
    """All arguments except the configurations and the checkpoint."""


class _FewOptions(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        option = re.match(r"argument (?:-\w/)?(--[\w.]+).*: expected one argument", message)
        raise ValueError(f"{option[1]} needs a value after it" if option else message)


def read_request(argv: Sequence[str]) -> Request:
    """Reads the options of ``Request`` from the command line and from the configurations.

    It uses argparse, the base of jsonargparse: both agree on what an option is.

    Raises:
        ValueError: a configuration, or another file that is named, is missing or unreadable.
    """
    first = _FewOptions(add_help=False, allow_abbrev=False)
    first.add_argument("-c", "--config", action="append", default=[])
    first.add_argument("--ckpt_path")
    files, others = first.parse_known_args(argv)
    check_named([_value(argument) for argument in others], Path())
    second = _FewOptions(add_help=False, allow_abbrev=False)
    for name in ("model", "data"):
        second.add_argument(f"--{name}", f"--{name}.class_path", dest=name)
    second.add_argument("--trainer.default_root_dir", dest="root")
    flags = vars(second.parse_known_args(others)[0]) | {"ckpt_path": files.ckpt_path}
    flags |= {key: _class_name(flags[key]) for key in ("model", "data")}
    configs = [find_config(name) for name in files.config]
    request: dict[str, str | None] = {}
    for config in configs:
        settings = read_config(config)
        for key in ("model", "data"):
            request[key] = _class_name(settings.get(key)) or request.get(key)
        trainer = settings.get("trainer")
        if isinstance(trainer, dict) and isinstance(trainer.get("default_root_dir"), str):
            request["root"] = trainer["default_root_dir"]
        checkpoint = settings.get("ckpt_path")
        # the config.yaml of a resumed run names a checkpoint of that run: ignore it, to start again
        if isinstance(checkpoint, str) and not _within(checkpoint, config.parent):
            request["ckpt_path"] = checkpoint
    request |= {key: value for key, value in flags.items() if value is not None}
    return Request(
        configs,
        request.get("ckpt_path"),
        request.get("model"),
        request.get("data"),
        request.get("root") or ".",
        others,
    )


def _class_name(value: Any) -> str | None:
    """The class that a setting names: by its path, in its settings, or in a settings file."""
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
    """``--config``: a file, or the name of a shipped configuration."""

    command = "fit"

    def __call__(self, parser, cfg, values, option_string=None):  # type: ignore[no-untyped-def]
        super().__call__(parser, cfg, str(find_config(values, self.command)), option_string)


class SearchByName(ConfigByName):
    """``--config`` for searches: a file, or the name of a shipped search."""

    command = "search"
