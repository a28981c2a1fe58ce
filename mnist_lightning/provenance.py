"""Records how a result was made: code, versions, machine, command."""

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
    """The facts needed to judge or repeat a result, as plain JSON types.

    Args:
        facts: those that only the caller knows (data, seeds ...); they come first.
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
        "machine": {
            "system": platform.platform(),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            **_gpu(),
        },
    }


def _program() -> str:
    name = Path(sys.argv[0]).name  # "__main__.py" for python -m mnist_lightning
    return "mnist-lightning" if name in ("__main__.py", "mnist-lightning") else name


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any]:
    """The commit of the checkout that this code runs from; empty if it is installed."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True)
        return run.stdout.strip()

    try:
        if not git("ls-files", __file__):  # installed in an environment inside another checkout
            return {}
        return {
            "commit": git("rev-parse", "HEAD"),
            "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except OSError:  # git is not installed
        return {}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _gpu() -> dict[str, Any]:
    """The name of the GPU that PyTorch uses first, if it can use one."""
    torch = sys.modules.get("torch")  # where nothing imported it, nothing was computed
    if torch is None or not torch.cuda.is_available():
        return {}
    return {"gpu": torch.cuda.get_device_name()}
