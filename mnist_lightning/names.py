"""Names in commands and files: where a configuration lies, and which classes it may name.

A class in a file is code that runs. A file may name those of ``OURS``; every other one has to be
named by the user: on the command line, or in a configuration that was given there.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, _common, _optionals, set_parsing_settings

from mnist_lightning.catalog import hint, shipped_configs
from mnist_lightning.files import read_bytes

OURS = (
    "mnist_lightning",
    "torch.nn",
    "torch.optim",
    *(f"lightning.pytorch.{part}" for part in ("callbacks", "loggers", "strategies", "profilers")),
)
_CLASS = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
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


def find_checkpoint(
    where: str, root: Path, run_name: str | None = None, kind: str = "best"
) -> Path:
    """The checkpoint file that the user means.

    Args:
        where: a checkpoint file; the folder of a run, or of several runs (then the newest); or the
            name of a run. ``/best`` or ``/last`` after a folder or name says which one.
            ``best`` or ``last`` alone are those of ``run_name``.
        root: the folder that holds the runs, ``lightning_logs``.
        run_name: the name that this command's configuration gives to its runs.
        kind: ``best`` or ``last``, where ``where`` does not say it.

    Raises:
        ValueError: nothing is there; says where it looked.
    """
    path = Path(where)
    if path.is_file():
        return path
    base = path
    if path.name in ("best", "last") and not path.is_dir():
        base, kind = path.parent, path.name
    if base == Path("."):
        if run_name is None:
            raise ValueError(
                f"--ckpt_path {where}: of which run? Say {root.name}/NAME/{where}, or give --config"
            )
        base = Path(run_name)
    folders = [folder for folder in (base, root / base) if folder.is_dir()]
    if not folders:
        raise ValueError(f"--ckpt_path {where}: there is no file or folder {base}{_runs(root)}")
    for folder in folders:
        newest = newest_first(folder)
        for run in [folder, *newest]:
            file = run / "checkpoints" / f"{kind}.ckpt"
            if file.is_file():
                if run not in (folder, *newest[:1]):
                    from lightning.pytorch.utilities import rank_zero_warn

                    rank_zero_warn(f"{newest[0]} has no {kind}.ckpt: taking {file}")
                return file
    raise ValueError(
        f"--ckpt_path {where}: no checkpoints/{kind}.ckpt in {folders[0]}{_runs(root)}"
    )


def newest_first(folder: Path) -> list[Path]:
    """The runs ``version_N`` in a folder, the highest N first."""
    runs = [run for run in folder.glob("version_*") if run.name[8:].isdecimal()]
    return sorted(runs, key=lambda run: int(run.name[8:]), reverse=True)


def _runs(root: Path) -> str:
    names = sorted(
        {run.parent.parent.parent.name for run in root.glob("*/version_*/checkpoints/*.ckpt")}
    )
    return f"; the runs in {root} are: {', '.join(names)}" if names else ""


def classes_in(content: Any) -> Iterator[str]:
    """The texts within settings that can be dotted paths of classes."""
    yield from (text for text in _texts(content) if _CLASS.fullmatch(text))


def classes_in_word(word: str) -> Iterator[str]:
    """The same for a word of the command line; of one that is a file of settings, those in it."""
    value = _value(word)
    if value.endswith((".yaml", ".yml", ".json")) and os.path.isfile(value):
        yield from classes_in(_read_yaml(Path(value)))
    elif not os.path.exists(value):
        yield from _CLASS.findall(value)


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


def run_name(asked: Asked) -> str | None:
    """The name that a command's configuration gives to its runs, if it has one."""
    if not asked.configs:
        return None
    file = asked.configs[-1].absolute()
    # of a run's own, that of the run: lightning_logs/NAME/version_N/config.yaml
    of_run = file.name == "config.yaml" and re.fullmatch(r"version_\d+", file.parent.name)
    return file.parent.parent.name if of_run else file.stem


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


def is_own(path: str | None) -> bool:
    """Whether it is the dotted path of a class in a module of the user's own."""
    ours = tuple(f"{part}." for part in OURS)
    if path is None or not _CLASS.fullmatch(path) or path.startswith(ours):
        return False
    return _is_users(path.partition(".")[0])


def class_path(kind: type) -> str:
    """The dotted path that a class is named by, in files and in commands."""
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
    for path in filter(_CLASS.fullmatch, named):
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
