"""The shipped configurations and searches. This module imports nothing heavy."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mnist_lightning.console import suggest


class Kind(NamedTuple):
    """A folder of shipped files."""

    title: str
    folder: str
    command: str
    """It takes the files after ``--config``."""


KINDS = (
    Kind("configurations", ".", "fit"),
    Kind("records", "records", "fit"),
    Kind("searches", "search", "search"),
)


def shipped_configs(command: str = "fit") -> list[Path]:
    """The shipped files for a command."""
    return [file for kind in KINDS if kind.command == command for file in _files(kind)]


def _files(kind: Kind) -> list[Path]:
    """Inside the installed package, or next to it in a checkout."""
    package = Path(__file__).parent
    root = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), None)
    return sorted((root / kind.folder).glob("*.yaml")) if root else []


def main(argv: Sequence[str]) -> int:
    """``mnist-lightning configs [NAME]``.

    Raises:
        ValueError: no shipped file has that name, or there is an unknown option.
    """
    parser = argparse.ArgumentParser(
        prog="mnist-lightning configs",
        description="List the shipped configurations, records and searches, or print one of them.",
        exit_on_error=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one")
    given, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise ValueError(f"configs: {unknown[0]}? It takes one NAME")
    if given.name is None:
        print("\n\n".join(map(_listed, KINDS)))
        return 0
    files = {file.stem: file for kind in KINDS for file in _files(kind)}
    name = given.name.removesuffix(".yaml")
    if name not in files:
        raise ValueError(f"no shipped configuration {given.name!r}; {suggest(name, files)}")
    print(files[name].read_text(), end="")
    if preferred := _preferred(files[name]):
        print(f"note: {preferred} in this folder is preferred to this one", file=sys.stderr)
    return 0


def _listed(kind: Kind) -> str:
    """A line for each file: its name, and the second line of the comment at its top."""
    files = _files(kind)
    width = max((len(file.stem) for file in files), default=0)
    lines = [f"{kind.title}, for mnist-lightning {kind.command} --config NAME:"]
    for file in files:
        with file.open() as opened:
            summary = opened.readlines()[1].removeprefix("# ").rstrip()
        lines.append(f"  {file.stem:<{width}}  {summary}")
        if preferred := _preferred(file):
            lines.append(f"  {'':<{width}}  overridden by {preferred} in this folder")
    return "\n".join(lines)


def _preferred(file: Path) -> str | None:
    """The file in the working directory that ``--config`` prefers to a shipped one, if any."""
    return next((name for name in (file.name, file.stem) if Path(name).is_file()), None)
