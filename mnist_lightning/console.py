"""Text for the terminal, and commands that work when the user pastes them there."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from mnist_lightning.files import printable

PROGRAM = "mnist-lightning"


def command(*arguments: str | Path) -> str:
    """The command that starts this program with other arguments, from the same shell.

    It starts as the user's command did: ``mnist-lightning`` or ``python -m mnist_lightning``, with
    the path of the program if its name alone would start another program or none.
    """
    if Path(sys.argv[0]).name == PROGRAM:
        return _quoted(_typed(sys.argv[0]), *arguments)
    return python("-m", "mnist_lightning", *arguments)


def python(*arguments: str | Path) -> str:
    """The command that starts the current Python with these arguments."""
    for name in ("python", "python3"):
        path = shutil.which(name)
        if path and _same(path, sys.executable):
            return _quoted(name, *arguments)
    return _quoted(_typed(sys.executable), *arguments)


def tensorboard(folder: str | Path) -> str:
    """The command that shows a folder in TensorBoard."""
    path = shutil.which("tensorboard")
    if path and _same_folder(path, sys.executable):
        return _quoted("tensorboard", "--logdir", folder)
    return python("-m", "tensorboard.main", "--logdir", folder)


def install(extra: str) -> str:
    """The command that installs an extra of this package.

    Args:
        extra: its name in ``pyproject.toml``.
    """
    checkout = Path(__file__).parent.parent
    if (checkout / "pyproject.toml").is_file():
        return python("-m", "pip", "install", "-e", f"{short(checkout)}[{extra}]")
    return python("-m", "pip", "install", f"{PROGRAM}[{extra}]")


def short(path: Path) -> str:
    """The path, relative to the working directory if that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path.absolute())) else str(path)


def _typed(program: str) -> str:
    """The name of a program if the shell finds it by its name; else its path."""
    name = os.path.basename(program)
    path = shutil.which(name)
    if path and _same(path, program):
        return name
    path = short(Path(os.path.abspath(program)))
    return path if os.sep in path else os.path.join(os.curdir, path)


def _same(one: str, other: str) -> bool:
    """Whether two paths start the same program.

    The folder matters too: the Pythons of several environments are links to one file.
    """
    return _same_folder(one, other) and os.path.realpath(one) == os.path.realpath(other)


def _same_folder(one: str, other: str) -> bool:
    folders = (os.path.realpath(os.path.dirname(os.path.abspath(path))) for path in (one, other))
    return len(set(folders)) == 1


def _quoted(*arguments: str | Path) -> str:
    return shlex.join(map(str, arguments))


def say(text: str) -> None:
    """Prints above a progress bar; of several processes, only the first one prints.

    Control characters are escaped.
    """
    if "lightning.pytorch" not in sys.modules:
        print(printable(text), flush=True)
    elif is_first_process():
        from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

        Tqdm.write(printable(text), file=sys.stdout)
        sys.stdout.flush()


def is_first_process() -> bool:
    """Whether this process writes the files and the output of a training."""
    from lightning.pytorch.utilities import rank_zero_only

    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def suggest(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """The known name closest to a wrong word; if none is close, ``otherwise`` or all names."""
    known = list(known)
    close = get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else otherwise or f"there are: {', '.join(known)}"
