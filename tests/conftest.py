"""Shared fixtures and functions: small real data, a quick Trainer, MNIST if it is available."""

import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from mnist_lightning import MNISTDataModule

torch.set_num_threads(1)  # the tensors are small, and two test workers share two cores
# a shell starts background jobs with Ctrl-C ignored, for their child processes too; undo this
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _few_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take half the time of a short training: only tests marked ``pictures`` draw them."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr("mnist_lightning.insight.pictures.write_run", lambda *_: None)


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
    """A file like torchvision's pretrained one, with the same names and shapes, other values."""
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
    """Makes a Trainer that only trains: on the CPU, without files or progress bar."""
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
    """Returns True if all weights are bit-identical."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
