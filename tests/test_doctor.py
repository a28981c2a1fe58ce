"""The doctor: each thing that can be wrong, made wrong, is found with its remedy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mnist_lightning import cores, doctor
from mnist_lightning.__main__ import main
from mnist_lightning.doctor import Finding
from mnist_lightning.training import memory

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MNIST_DATA_DIR", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def findings_of(check: object) -> list[Finding]:
    return list(doctor._caught(check))


def only(check: object) -> Finding:
    (finding,) = findings_of(check)
    return finding


def test_this_installation_is_sound(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    *lines, _, last = capsys.readouterr().out.splitlines()
    assert last.startswith("0 errors, ")
    rows = [line.split(maxsplit=1)[1] for line in lines if not line.startswith(" ")]
    for what in (
        "Python",
        "packages",
        "torch ",
        "torchvision",
        "lightning",
        "GPU",
        "data",
        "memory",
        "runs",
    ):
        assert sum(row.startswith(what) for row in rows) == 1, what
    columns = {line.index(line.split()[1]) for line in lines if not line.startswith(" ")}
    assert columns == {9}
    assert not list(Path().iterdir())  # nothing is left behind


@pytest.mark.parametrize(
    ("package", "version", "level", "said"),
    [
        ("torch", "2.13.1", "warning", "2.13.1 is not within"),
        ("torch", "2.10.0", "error", "2.10.0 is not within"),
        ("torch", None, "error", "not installed"),
        ("optuna", "4.0.0", "error", "4.0.0 is not within"),
        ("lightning", "2.6.2", "error", "2.6.2 is malware"),
        ("lightning", "2.6.3", "error", "2.6.3 is malware"),
        ("pytorch-lightning", "2.6.3", "error", "2.6.3 is malware"),
    ],
)
def test_versions(
    package: str,
    version: str | None,
    level: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: version if name == package else real(name))
    wrong = [finding for finding in doctor.findings() if finding.what == package]
    assert [finding.level for finding in wrong][:1] == [level]
    assert wrong[0].result.startswith(said)
    assert wrong[0].remedy
    whats = {finding.what for finding in doctor.findings()}
    assert ("memory" in whats) == (level == "warning")  # nothing is imported after an error
    assert "threads" in whats


def test_an_extra_that_is_not_there_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "optuna" else real(name))
    (search,) = [finding for finding in findings_of(doctor._packages) if finding.what == "search"]
    assert (search.level, search.result) == ("ok", "not installed: optuna")
    assert search.remedy.endswith(" -m pip install 'optuna<6,>=5'")


def test_python_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.2")
    finding = only(doctor._python)
    assert (finding.level, finding.remedy) == ("error", "make an environment with Python >=3.11")


def test_a_torch_that_cannot_be_imported(tmp_path: Path) -> None:
    """Exit code 1, every other check, and no traceback."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: missing')")
    done = subprocess.run(
        [sys.executable, "-m", "mnist_lightning", "doctor"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "error    torch        ImportError: libcudart.so.13: missing\n" in done.stdout
    assert "pip install --force-reinstall torch torchvision" in done.stdout
    assert done.stdout.endswith("\n1 error, 0 warnings\n")


def test_torch_and_torchvision_of_different_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda name: ["numpy", "torch==2.0.1"])
    *_, finding = findings_of(doctor._torch)
    assert (finding.level, finding.what) == ("error", "torchvision")
    assert f"needs torch==2.0.1, not {torch.__version__}" in finding.result


def test_a_torchvision_without_its_compiled_part(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def nms(*_: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nsecond line")

    monkeypatch.setattr(torchvision.ops, "nms", nms)
    *_, finding = findings_of(doctor._torch)
    assert finding.level == "error"
    assert finding.result == "RuntimeError: operator torchvision::nms does not exist"


@pytest.mark.parametrize(
    ("hidden", "build", "remedy"),
    [
        (None, "13.0", "update the NVIDIA driver to one for CUDA 13.0"),
        ("", "13.0", "CUDA_VISIBLE_DEVICES is '': unset it"),
        (None, None, "this PyTorch was built without CUDA"),
    ],
)
def test_a_gpu_that_pytorch_does_not_see(
    hidden: str | None,
    build: str | None,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    finding = only(doctor._gpu)
    assert finding.level == "warning"
    assert finding.result == "PyTorch does not see GPU 0: NVIDIA H100 80GB HBM3"
    assert finding.remedy.startswith(remedy)


def test_no_data_and_damaged_data(tmp_path: Path) -> None:
    missing = only(doctor._data)
    assert (missing.level, missing.result) == ("warning", "no MNIST in data")
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"nothing")
    damaged = only(doctor._data)
    assert damaged.level == "error"
    assert "train-images-idx3-ubyte" in damaged.remedy


def test_sound_data(mnist_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "MNIST_DATA_DIR", str(mnist_dir if mnist_dir.is_absolute() else ROOT / mnist_dir)
    )
    finding = only(doctor._data)
    assert (finding.level, finding.result.partition(", ")[2]) == ("ok", "checksums match")


@pytest.mark.parametrize(
    ("said", "limit", "level", "remedy"),
    [
        (None, None, "ok", ""),
        ("4", None, "ok", ""),
        ("64", None, "warning", "set OMP_NUM_THREADS to 8"),
        ("many", None, "warning", "set it to 8, or unset it"),
        (None, 1.5, "warning", "would start 8 threads: set OMP_NUM_THREADS to 2"),
        ("2", 1.5, "ok", ""),
        (None, 16.0, "ok", ""),
    ],
)
def test_threads(
    said: str | None,
    limit: float | None,
    level: str,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cores, "assigned_cores", lambda: 8)
    monkeypatch.setattr(cores, "container_cores", lambda: limit)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    finding = only(doctor._threads)
    assert finding.level == level
    assert finding.remedy.endswith(remedy)
    assert bool(finding.remedy) == (level == "warning")


@pytest.mark.parametrize(
    ("said", "processes", "threads"),
    [
        (None, 1, 8),
        (None, 3, 2),
        (None, 20, 1),
        (None, 0, 8),  # in this process
        ("1", 2, 1),
        ("6", 2, 4),
        ("64", 1, 8),
        ("many", 1, 8),
        ("0", 1, 8),
    ],
)
def test_threads_of_each_of_several_processes(
    said: str | None, processes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "assigned_cores", lambda: 8)
    monkeypatch.setattr(cores, "container_cores", lambda: None)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert cores.threads_each(processes) == threads


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_what_a_container_allows(
    files: dict[str, str], expected: float | None, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cores.container_cores(tmp_path) == expected


@pytest.mark.parametrize(("gib", "level"), [(0.01, "error"), (1, "warning"), (50, "ok")])
def test_disk(gib: float, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=gib * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    finding = only(doctor._disk)
    assert finding.level == level
    assert bool(finding.remedy) == (level != "ok")


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 0.3 * 2**30)
    finding = only(doctor._memory)
    assert (finding.level, finding.result) == ("warning", "0.3 GiB available")


def test_runs_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "lightning_logs").touch()  # a file where the folder should be
    finding = only(doctor._logs)
    assert (finding.level, finding.result) == (
        "error",
        f"{tmp_path}/lightning_logs: not a directory",
    )
    assert "--trainer.default_root_dir" in finding.remedy


def test_a_check_that_fails_is_a_finding() -> None:
    def _broken() -> None:
        raise KeyError("anything")

    finding = only(_broken)
    assert (finding.level, finding.what, finding.result) == (
        "error",
        "broken",
        "KeyError: 'anything'",
    )


def test_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--fix"]) == 1
    assert capsys.readouterr().err == "error: doctor: --fix? It takes no options\n"
