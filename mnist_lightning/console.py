"""What the terminal is told: commands that work when they are pasted there, and lines of text."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from mnist_lightning.files import printable

PROGRAM = "mnist-lightning"


def command(*words: str | Path) -> str:
    """This program with other words, as it can be typed where the present command was typed.

    It is named as the user named it: ``mnist-lightning``, or ``python -m mnist_lightning``, with
    the way to the file where typing the name would start another one or none.
    """
    if Path(sys.argv[0]).name == PROGRAM:
        return _quoted(_typed(sys.argv[0]), *words)
    return python("-m", "mnist_lightning", *words)


def python(*words: str | Path) -> str:
    """The Python that runs, with these words."""
    for name in ("python", "python3"):
        found = shutil.which(name)
        if found and _same(found, sys.executable):
            return _quoted(name, *words)
    return _quoted(_typed(sys.executable), *words)


def tensorboard(folder: str | Path) -> str:
    """The command that shows what TensorBoard knows of a folder."""
    found = shutil.which("tensorboard")
    if found and _same_folder(found, sys.executable):
        return _quoted("tensorboard", "--logdir", folder)
    return python("-m", "tensorboard.main", "--logdir", folder)


def install(extra: str) -> str:
    """The command that installs what an optional part of this package needs.

    Args:
        extra: its name in ``pyproject.toml``.
    """
    checkout = Path(__file__).parent.parent
    if (checkout / "pyproject.toml").is_file():
        return python("-m", "pip", "install", "-e", f"{short(checkout)}[{extra}]")
    return python("-m", "pip", "install", f"{PROGRAM}[{extra}]")


def short(path: Path) -> str:
    """Relative to the working directory where that is shorter: to be read, and copied."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path.absolute())) else str(path)


def _typed(program: str) -> str:
    """The name of a program that is found by its name; else the way to it."""
    name = os.path.basename(program)
    found = shutil.which(name)
    if found and _same(found, program):
        return name
    path = short(Path(os.path.abspath(program)))
    return path if os.sep in path else os.path.join(os.curdir, path)


def _same(one: str, other: str) -> bool:
    """Whether two paths start the same program.

    The Pythons of several environments are links to one file, each in a folder of its own.
    """
    return _same_folder(one, other) and os.path.realpath(one) == os.path.realpath(other)


def _same_folder(one: str, other: str) -> bool:
    folders = (os.path.realpath(os.path.dirname(os.path.abspath(path))) for path in (one, other))
    return len(set(folders)) == 1


def _quoted(*words: str | Path) -> str:
    return shlex.join(map(str, words))


def say(text: str) -> None:
    """Prints, above the live line of a progress bar if there is one; in one of several processes.

    What would steer a terminal is escaped.
    """
    if "lightning.pytorch" not in sys.modules:
        print(printable(text), flush=True)
    elif is_first_process():
        from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

        Tqdm.write(printable(text), file=sys.stdout)
        sys.stdout.flush()


def is_first_process() -> bool:
    """Whether this is the process of a training that writes its files and lines."""
    from lightning.pytorch.utilities import rank_zero_only

    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def suggest(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """The known name that a wrong word is closest to; without one, ``otherwise`` or all of them."""
    known = list(known)
    close = get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else otherwise or f"there are: {', '.join(known)}"
