"""The command line. The command decides what is imported: help and version need no PyTorch."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType

from mnist_lightning import __version__, console

# command: (module, function of the remaining arguments, what it does)
COMMANDS = {
    "fit": ("cli", "fit", "train a model"),
    "validate": ("cli", "validate", "evaluate a checkpoint on the validation images"),
    "test": (
        "cli",
        "test",
        "evaluate a checkpoint on the test images (evaluations are counted)",
    ),
    "predict": ("cli", "predict", "label images with a checkpoint"),
    "search": ("search.command", "main", "train many models and compare them"),
    "report": (
        "report.command",
        "main",
        "show the results of searches: tables, figures and one page",
    ),
    "demo": ("deploy.demo", "main", "show a page on which one draws and the network answers"),
    "export": ("deploy.export", "main", "write a trained network to a file for other programs"),
    "inspect": (
        "cli",
        "inspect",
        "print the layers of a model, and draw what a checkpoint learned",
    ),
    "configs": ("catalog", "main", "list the shipped configurations, records and searches"),
    "doctor": ("doctor", "main", "check the installation: versions, data, GPU, disk, memory"),
    "completion": ("completion", "main", "print the completion script for bash, zsh or fish"),
}

# packages of the extras in pyproject.toml, by the name that is imported
EXTRAS = {
    **dict.fromkeys(("optuna", "pandas", "tqdm", "matplotlib", "jinja2"), "search"),
    "psycopg2": "postgres",
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export"),
    "captum": "explain",
}

HELP = """usage: mnist-lightning COMMAND [options]        (or: python -m mnist_lightning ...)

Train small and medium image classifiers with PyTorch Lightning, and study them properly.

commands:
{commands}

options:
  -h, --help   show this page; after a COMMAND, show its options
  --version    show the version: {version}
  --debug      with any command: show where an error comes from
  --trust      with --ckpt_path: import the classes that the run's files name; runs their code

A first training, its dashboard, its test:
  {fit}
  {board}
  {test}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0 for success, 1 for an error, 2 for an unknown command, 130 after Ctrl-C,
        143 after SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_first_page())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        close = [] if argv[0].startswith("-") else get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(COMMANDS)}"
        print(f"error: no command {argv[0]!r}; {hint}", file=sys.stderr)
        return 2
    return _guarded(argv, debug)


def _first_page() -> str:
    return HELP.format(
        commands="\n".join(f"  {word:<11} {what}" for word, (_, _, what) in COMMANDS.items()),
        version=__version__,
        fit=console.command("fit", "--config", "shallow.yaml"),
        board=console.tensorboard("lightning_logs"),
        test=console.command("test", "--ckpt_path", "lightning_logs/shallow"),
    )


def _guarded(argv: list[str], debug: bool) -> int:
    module, function, _ = COMMANDS[argv[0]]
    hook = threading.excepthook
    if not debug:
        threading.excepthook = _without_write_errors
    try:
        trains = module in ("cli", "search.command")
        with _stops_at_once():
            if trains:
                import_module("mnist_lightning.words").check(argv[0], argv[1:])
                _import_torchmetrics()
            imported = import_module(f"mnist_lightning.{module}")
        users = trains or argv[0] in ("demo", "export")
        if users and "" not in sys.path:  # the user's own models, as with python -m
            sys.path.insert(0, "")
        run: Callable[[list[str]], int | None] = getattr(imported, function)
        return run(argv[1:]) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has ended, as in `| head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (Python flushes it at the end)
        return 1
    except Exception as error:
        if debug:
            raise
        from mnist_lightning.files import printable

        if package := _missing_package(error):
            hint = f"{argv[0]} needs {package}: {console.install(EXTRAS[package])}"
        else:
            hint = _explain(error)
        print(f"error: {printable(hint)}", file=sys.stderr)
        return 1
    finally:
        threading.excepthook = hook


@contextmanager
def _stops_at_once() -> Iterator[None]:
    """Lets Ctrl-C end the process at once: half-imported libraries would print long tracebacks."""
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def stop(*_: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(130)  # there is nothing to clean up yet

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _import_torchmetrics() -> None:
    """Imports torchmetrics without ``scipy.signal``, which takes a second or more.

    If SciPy is installed, torchmetrics imports it only to restore an old name, ``hamming``. Here it
    finds an empty module with that name, which is removed before other code can import it.
    """
    name = "scipy.signal"
    if name in sys.modules or "torchmetrics" in sys.modules:
        return
    stand_in = ModuleType(name)
    stand_in.hamming = None  # type: ignore[attr-defined]
    sys.modules[name] = stand_in
    try:
        import_module("torchmetrics")
    finally:
        del sys.modules[name]


def _without_write_errors(failure: threading.ExceptHookArgs) -> None:
    """Drops the traceback of TensorBoard's thread on a full disk: its next call raises the same."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def _missing_package(error: BaseException | None) -> str | None:
    """The package of an extra that is not installed, where that is what an error comes from."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            package = (error.name or "").partition(".")[0]
            if package in EXTRAS:
                return package
        error = error.__cause__  # Optuna and SQLAlchemy raise errors of their own from it
    return None


def _explain(error: Exception) -> str:
    if isinstance(error, ValueError):  # the user's mistake: the message is complete
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror.lower()}"
    message = " ".join(str(error).split())
    if type(error).__name__ == "MisconfigurationException":  # Lightning's error for a wrong option
        return message
    return f"{type(error).__name__}: {message} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
