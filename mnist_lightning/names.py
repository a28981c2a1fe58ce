"""Names that users type: what was probably meant, and where a configuration lies."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

import yaml
from jsonargparse import ActionConfigFile


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
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "it is no text"
        raise ValueError(f"--config {file}: not a YAML file ({where})") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"--config {file}: no settings in it; --print_config after a command shows how"
            " they are written"
        )
    return file


class ConfigByName(ActionConfigFile):
    """``--config``: a file, or the bare name of a shipped configuration, from any folder."""

    folder = "."

    def __call__(self, parser, cfg, values, option_string=None):  # type: ignore[no-untyped-def]
        super().__call__(parser, cfg, str(find_config(values, self.folder)), option_string)


class SearchByName(ConfigByName):
    """The same for the shipped searches."""

    folder = "search"
