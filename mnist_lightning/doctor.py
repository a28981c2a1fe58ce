"""Checks the installation: versions, PyTorch, data, GPU, threads, disk, memory.

Each problem is one line with a remedy. A package is imported only after its own check.
"""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mnist_lightning import __version__, cores

if TYPE_CHECKING:  # this package may be missing too
    from packaging.requirements import Requirement

NAME = "mnist-lightning"
LOGS = Path("lightning_logs")
MALWARE = ("2.6.2", "2.6.3")  # of lightning and pytorch-lightning
GIB = 2**30


class Finding(NamedTuple):
    """One line of the output."""

    level: str
    """``ok``, ``warning`` or ``error``."""
    what: str
    result: str
    remedy: str = ""
    """What to do about it; a command is on a line of its own."""


def main(argv: Sequence[str]) -> int:
    """``mnist-lightning doctor``.

    Returns:
        0, or 1 if there is an error.

    Raises:
        ValueError: there is an argument; it takes none.
    """
    parser = argparse.ArgumentParser(
        prog="mnist-lightning doctor",
        description="Check versions, PyTorch, data, GPU, threads, disk and memory.",
        exit_on_error=False,
    )
    _, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise ValueError(f"doctor: {unknown[0]}? It takes no options")
    levels = []
    for finding in findings():
        levels.append(finding.level)
        print(f"{finding.level:<9}{finding.what:<13}{finding.result}", flush=True)
        for line in finding.remedy.splitlines():
            command = line.startswith(shlex.quote(sys.executable))  # on one line, to be pasted
            for part in [line] if command else textwrap.wrap(line, 76, break_long_words=False):
                print(f"{'':<22}{part}", flush=True)
    errors, cautions = levels.count("error"), levels.count("warning")
    print(f"\n{_count(errors, 'error')}, {_count(cautions, 'warning')}")
    return 1 if errors else 0


def findings() -> Iterator[Finding]:
    """The findings of all checks, one after the other."""
    stages = (_python, _packages), (_torch,), (_lightning,), (_gpu, _data, _memory)
    for checks in stages:
        sound = True
        for check in checks:
            for finding in _caught(check):
                sound &= finding.level != "error"
                yield finding
        if not sound:  # a package that is missing, too old or malicious must not be imported
            break
    for check in (_threads, _disk, _logs):
        yield from _caught(check)


def _caught(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check's findings; an exception in it becomes one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from check()
    except Exception as error:
        remedy = f"find packages that do not fit together:\n{_pip('check')}"
        yield Finding("error", check.__name__.strip("_"), _first_line(error), remedy)


def _python() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    running, needed = platform.python_version(), _project()["requires-python"]
    good = SpecifierSet(needed).contains(running, prereleases=True)
    remedy = "" if good else f"make an environment with Python {needed}"
    yield Finding("ok" if good else "error", "Python", f"{running}, {sys.executable}", remedy)


def _packages() -> Iterator[Finding]:
    """Versions against the ranges of pyproject.toml, from metadata alone."""
    from packaging.requirements import Requirement

    needed = [Requirement(text) for text in _project()["dependencies"]]
    extras = {
        extra: [Requirement(text) for text in texts]
        for extra, texts in _project()["optional-dependencies"].items()
        if extra != "dev"
    }
    within = 0
    for requirement in [*needed, *(r for texts in extras.values() for r in texts)]:
        installed = _version(requirement.name)
        if installed is None:
            if requirement in needed:
                yield Finding("error", requirement.name, "not installed", _install(requirement))
        elif requirement.name == "lightning" and installed in MALWARE:
            pass  # it has a line below
        elif finding := _out_of_range(requirement, installed):
            yield finding
        else:
            within += 1
    for name in ("lightning", "pytorch-lightning"):
        if (installed := _version(name)) in MALWARE:
            yield Finding(
                "error",
                name,
                f"{installed} is malware: it steals credentials when it is imported",
                "delete this environment without starting Python in it again, make another, and"
                " replace all passwords, tokens and keys that this machine holds",
            )
    yield Finding("ok", "packages", f"{within} within their ranges, {NAME} {__version__}")
    for extra, requirements in extras.items():
        missing = [r for r in requirements if _version(r.name) is None]
        said = f"not installed: {', '.join(r.name for r in missing)}" if missing else "installed"
        yield Finding("ok", extra, said, _install(*missing) if missing else "")


def _out_of_range(requirement: "Requirement", installed: str) -> Finding | None:
    from packaging.specifiers import SpecifierSet

    if requirement.specifier.contains(installed, prereleases=True):
        return None
    bounds = SpecifierSet(",".join(str(s) for s in requirement.specifier if s.operator != "!="))
    level = "warning" if bounds.contains(installed, prereleases=True) else "error"
    said = f"{installed} is not within {requirement.specifier}"
    return Finding(level, requirement.name, said, _install(requirement))


def _install(*requirements: "Requirement") -> str:
    return _pip("install", *(f"{r.name}{r.specifier}" for r in requirements))


def _pip(*arguments: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", *arguments])


def _torch() -> Iterator[Finding]:
    """Whether PyTorch and torchvision can be imported and fit together."""
    from packaging.requirements import Requirement

    again = _pip("install", "--force-reinstall", "torch", "torchvision")
    try:
        import torch

        torch.ones(2, 2) @ torch.ones(2, 2)
    except Exception as error:  # a missing library, a processor that is too old ...
        yield Finding("error", "torch", _first_line(error), again)
        return
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield Finding("ok", "torch", f"{torch.__version__}, built {build}")
    for text in requires("torchvision") or ():
        requirement = Requirement(text)
        if requirement.name == "torch" and not requirement.specifier.contains(
            torch.__version__, prereleases=True
        ):
            said = f"{_version('torchvision')} needs torch{requirement.specifier}"
            yield Finding("error", "torchvision", f"{said}, not {torch.__version__}", again)
            return
    try:
        import torchvision

        # fails with a torchvision that was built for another PyTorch
        torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1), 0.5)
    except Exception as error:
        yield Finding("error", "torchvision", _first_line(error), again)
        return
    yield Finding("ok", "torchvision", f"{torchvision.__version__}, belongs to this torch")


def _lightning() -> Iterator[Finding]:
    import lightning.pytorch.cli

    yield Finding("ok", "lightning", lightning.__version__)


def _gpu() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            name = torch.cuda.get_device_name(index)
            try:
                free, total = torch.cuda.mem_get_info(index)
                torch.ones(2, device=f"cuda:{index}").sum().item()
            except Exception as error:
                remedy = "train without it: --trainer.accelerator cpu"
                yield Finding("error", "GPU", f"{name}: {_first_line(error)}", remedy)
            else:
                said = f"{name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
                yield Finding("ok", "GPU", said)
    elif torch.backends.mps.is_available():
        yield Finding("ok", "GPU", "Apple's, by MPS")
    elif listed := _nvidia_smi():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if torch.version.cuda is None:
            remedy = "this PyTorch was built without CUDA: install torch and torchvision again"
        elif hidden is not None:
            remedy = f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it"
        else:
            remedy = f"update the NVIDIA driver to one for CUDA {torch.version.cuda}"
        yield Finding("warning", "GPU", f"PyTorch does not see {listed[0]}", remedy)
    else:
        yield Finding("ok", "GPU", "none: trainings run on the processor")


def _nvidia_smi() -> list[str]:
    """The GPUs that ``nvidia-smi`` lists."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [line.partition(" (UUID")[0] for line in lines if line.startswith("GPU")]


def _data() -> Iterator[Finding]:
    """Reads MNIST as a training does, with its checksums, but downloads nothing."""
    from mnist_lightning.data.module import MNISTDataModule

    data = MNISTDataModule()
    try:
        data.setup()
    except ValueError as error:
        yield Finding(
            "error", "data", f"MNIST in {data.data_dir} is damaged or incomplete", str(error)
        )
        return
    if data.source == "mnist":
        yield Finding("ok", "data", f"MNIST in {data.data_dir}, checksums match")
    else:
        yield Finding(
            "warning",
            "data",
            f"no MNIST in {data.data_dir}",
            "a training downloads it to there, or uses scikit-learn's digits if it cannot; if you"
            " have it elsewhere, set MNIST_DATA_DIR to the folder that contains MNIST/raw",
        )


def _memory() -> Iterator[Finding]:
    from mnist_lightning.training.memory import available_bytes

    free = available_bytes() / GIB
    low = free < 1
    remedy = "end other programs: PyTorch and a small training take about 1 GiB" if low else ""
    yield Finding("warning" if low else "ok", "memory", f"{free:.1f} GiB available", remedy)


def _threads() -> Iterator[Finding]:
    said, limit = os.environ.get("OMP_NUM_THREADS"), cores.container_cores()
    assigned, usable = cores.assigned_cores(), cores.usable_cores()
    result = f"{assigned} cores" + ("" if limit is None else f", {limit:g} for this container")
    result += f", OMP_NUM_THREADS={said}" if said is not None else ""
    remedy = ""
    if said is not None and not said.isdecimal():
        remedy = f"OMP_NUM_THREADS must be a number: set it to {usable}, or unset it"
    elif said is not None and int(said) > usable:
        remedy = f"more threads than cores wait for each other: set OMP_NUM_THREADS to {usable}"
    elif said is None and usable < assigned:
        remedy = f"convolutions would start {assigned} threads: set OMP_NUM_THREADS to {usable}"
    yield Finding("warning" if remedy else "ok", "threads", result, remedy)


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free / GIB
    level = "error" if free < 0.1 else "warning" if free < 2 else "ok"
    remedy = "" if level == "ok" else "make room, or work in a folder on another disk"
    yield Finding(level, "disk", f"{free:,.1f} GiB free here", remedy)


def _logs() -> Iterator[Finding]:
    """Whether runs can be written, tried with a temporary file."""
    folder = LOGS if LOGS.exists() else Path()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        remedy = "make it writable, work in another folder, or give --trainer.default_root_dir DIR"
        said = f"{folder.absolute()}: {(error.strerror or str(error)).lower()}"
        yield Finding("error", "runs", said, remedy)
    else:
        yield Finding("ok", "runs", f"{LOGS} can be written")


def _project() -> dict[str, Any]:
    """The ``[project]`` table of the checkout, or the same from the installed metadata."""
    file = Path(__file__).parent.parent / "pyproject.toml"
    if file.is_file():
        return dict(tomllib.loads(file.read_text())["project"])
    about, texts = metadata(NAME), requires(NAME) or []
    extras: dict[str, list[str]] = {}
    for text in texts:
        needed, _, extra = text.partition("; extra == ")
        if extra:
            extras.setdefault(extra.strip("'\""), []).append(needed.strip())
    return {
        "requires-python": about["Requires-Python"],
        "dependencies": [text for text in texts if "extra ==" not in text],
        "optional-dependencies": extras,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}"[:200]


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
