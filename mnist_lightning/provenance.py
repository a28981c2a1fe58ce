"""Where a result comes from: code, versions, machine, command."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "jsonargparse", "numpy")


def provenance(**facts: Any) -> dict[str, Any]:
    """What a reader needs to judge or repeat a result, as plain JSON types.

    Args:
        facts: what only the caller knows (data, seeds ...), put first.
    """
    from mnist_lightning import __version__

    return {
        **facts,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([_program(), *sys.argv[1:]]),
        "code": {"mnist_lightning": __version__, **_git()},
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "machine": {"system": platform.platform(), "cpu": _cpu(), "cores": os.cpu_count()},
    }


def _program() -> str:
    name = Path(sys.argv[0]).name  # "__main__.py" for python -m mnist_lightning
    return "mnist-lightning" if name in ("__main__.py", "mnist-lightning") else name


def write_json(path: Path, content: Any) -> None:
    """Writes JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: under another name first, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = (error.strerror or str(error)).lower()
        raise ValueError(
            f"{path} cannot be written: {reason}. Make room there, or make it writable."
        ) from error


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any]:
    """Commit of the checkout that this code runs from; nothing when it was installed."""
    folder = Path(__file__).resolve().parent

    def ask(*words: str) -> str:
        run = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True)
        return run.stdout.strip()

    try:
        if not ask("ls-files", __file__):  # not ours: a virtual environment inside another checkout
            return {}
        return {
            "commit": ask("rev-parse", "HEAD"),
            "modified": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except OSError:  # no git here
        return {}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
