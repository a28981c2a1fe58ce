"""What the tests share: small real data, a quick trainer, MNIST where it is at hand."""

import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from mnist_lightning import MNISTDataModule

torch.set_num_threads(1)  # small tensors, and two workers on two cores
# a shell that starts the tests in the background has Ctrl-C ignored, in what they start too
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def digits() -> MNISTDataModule:
    """Scikit-learn's 1,797 digits: real data, no files, no network."""
    return MNISTDataModule(source="digits", batch_size=16)


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The folder that holds the real MNIST; the test is skipped where there is none."""
    folder = Path(os.environ.get("MNIST_DATA_DIR") or "data")
    if not (folder / "MNIST" / "raw").is_dir():
        pytest.skip("needs the real MNIST: set MNIST_DATA_DIR")
    return folder


@pytest.fixture(scope="session")
def resnet18_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like torchvision's pretrained one: the same names and shapes, other numbers."""
    from torchvision.models import resnet18

    generator = torch.Generator().manual_seed(0)
    net = resnet18()
    for name, value in net.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(net.state_dict(), file)
    return file


def trainer(**settings: object) -> pl.Trainer:
    """A Trainer that only trains: no files, no bar, on the CPU."""
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **settings,
        }
    )


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Bit for bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
