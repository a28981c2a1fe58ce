"""Compares the estimated memory of trainings with the memory that they take."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from mnist_lightning import ConvNetwork, DeepNetwork, ResNet18, ShallowNetwork  # noqa: F401 (eval)
from mnist_lightning.__main__ import main
from mnist_lightning.spec import DataSpec
from mnist_lightning.training import memory

# Prints the peak memory of a process that trains two steps.
PEAK = """
import re, sys
from pathlib import Path
import lightning.pytorch as pl
from mnist_lightning import *
images, batch, make = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
data = MNISTDataModule(source="digits", batch_size=batch, image_size=images)
pl.Trainer(accelerator="cpu", max_steps=2, limit_val_batches=0, logger=False,
           enable_checkpointing=False, enable_progress_bar=False).fit(eval(make), data)
# not getrusage: its peak includes the process before exec, which is the test process
print("peak", 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
"""


def _peak(make: str, batch_size: int, image_size: int) -> int:
    code = [sys.executable, "-c", PEAK, str(image_size), str(batch_size), make]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    return int(done.stdout.split("peak ")[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "batch_size", "image_size"),
    [
        ("ShallowNetwork(100_000, optimizer='adam')", 8, 28),
        ("DeepNetwork([4096, 8192], optimizer='adam')", 8, 28),
        ("ConvNetwork([32, 64], hidden_units=128)", 128, 28),
        ("ResNet18()", 64, 112),
    ],
)
def test_the_estimate_is_near_the_peak(make: str, batch_size: int, image_size: int) -> None:
    """Within a factor of two: enough to tell 5 GB from 500."""
    estimate = memory.training_bytes(
        lambda: eval(make), batch_size, DataSpec(1, image_size, image_size)
    )
    taken = _peak(make, batch_size, image_size) - _peak("ShallowNetwork(1)", 8, 28)
    assert estimate / 2 < taken < estimate * 2


def test_nothing_is_allocated() -> None:
    """Estimates trainings with about a petabyte of weights or images."""
    huge = memory.training_bytes(partial(ShallowNetwork, 10**11), 8, DataSpec())
    assert huge > 784 * 10**11 * 4
    assert memory.training_bytes(ResNet18, 10**9, DataSpec(1, 224, 224)) > 10**9 * 224**2 * 4


def test_adam_takes_more() -> None:
    sgd, adam = (
        memory.training_bytes(
            partial(DeepNetwork, [500, 500], optimizer=name), 1, DataSpec(), False
        )
        for name in ("sgd", "adam")
    )
    assert adam == pytest.approx(2 * sgd, rel=0.01)


class Odd(ShallowNetwork):
    def __init__(self) -> None:
        super().__init__(20)
        assert float(torch.ones(1)) == 1  # fails on the meta device, which has no values


def test_a_module_that_cannot_be_made_without_memory_is_not_judged() -> None:
    assert memory.training_bytes(Odd, 8, DataSpec()) is None
    memory.check(Odd, 8, DataSpec())


def test_memory_asked_for_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command fails with a message before the training, and creates no files."""
    monkeypatch.chdir(tmp_path)
    flags = "--config shallow.yaml --data.source digits --model.hidden_units 100000000"
    assert main(["fit", *flags.split()]) == 1
    assert "would take about 1,191 GiB of memory, and " in capsys.readouterr().err
    flags = "--config resnet18_scratch.yaml --data.source digits --data.batch_size 10000"
    assert main(["fit", *flags.split()]) == 1
    assert "a smaller --data.batch_size (now 10,000)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = memory.Path

    def path(*parts: str) -> Path:
        joined = real(*parts)
        return tmp_path / joined.name if str(joined).startswith("/sys/") else joined

    monkeypatch.setattr(memory, "Path", path)
    free = memory.available_bytes()
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert memory.available_bytes() == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes() == pytest.approx(free, rel=0.5)
