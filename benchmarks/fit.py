"""One epoch of the shallow network (100 units, batch 8), in several ways, side by side.

    python benchmarks/fit.py            (needs the real MNIST: MNIST_DATA_DIR or data/)

- documented: Lightning as its documentation teaches it (torchvision's MNIST with ToTensor, a
  DataLoader, torchmetrics logged in each step, the progress bar, the default logger);
- ours: the same network through this project, with everything that `fit` turns on;
- one by one: ours with autograd, one mini-batch for each training_step;
- loop: a hand-written PyTorch loop, images in memory, autograd, torch.optim.SGD;
- start: seconds until `fit` takes its first step, next to `import lightning.pytorch.cli`.

Runs alternate; the table has medians. Writes benchmarks/results/fit.json.
"""

import contextlib
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassAccuracy

from mnist_lightning import Dashboard, EarlyStopping, MNISTDataModule, RunLogger, ShallowNetwork
from mnist_lightning.callbacks import ProgressBar
from mnist_lightning.data import epoch_order
from mnist_lightning.provenance import provenance, write_json

REPEATS = 5
BATCH = 8
IMAGES = 50_400


class Stopwatch(Callback):
    """Seconds of the training epoch, without the validation that follows."""

    seconds = _began = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.perf_counter() - self._began


class Documented(pl.LightningModule):
    """As in Lightning's and torchmetrics' introductions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
        self.train_acc = MulticlassAccuracy(10)
        self.val_acc = MulticlassAccuracy(10)

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self.net(x)
        loss = F.cross_entropy(scores, y)
        self.train_acc(scores, y)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        scores = self.net(x)
        self.val_acc(scores, y)
        self.log("val_loss", F.cross_entropy(scores, y))
        self.log("val_acc", self.val_acc)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def documented(data: MNISTDataModule, folder: str) -> float:
    mnist = torchvision.datasets.MNIST(data.data_dir, transform=torchvision.transforms.ToTensor())
    train = DataLoader(Subset(mnist, range(IMAGES)), batch_size=BATCH, shuffle=True)
    val = DataLoader(Subset(mnist, range(IMAGES, 60_000)), batch_size=1000)
    watch = Stopwatch()
    pl.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=folder, callbacks=[watch]).fit(
        Documented(), train, val
    )
    return watch.seconds


def ours(data: MNISTDataModule, folder: str, fused: bool = True) -> float:
    data.steps_per_execution = None if fused else 1
    watch = Stopwatch()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=RunLogger(Path(folder) / "run"),
        num_sanity_val_steps=0,
        callbacks=[
            watch,
            ProgressBar(),
            Dashboard(),
            EarlyStopping(),
            ModelCheckpoint(filename="best", monitor="val/acc", mode="max"),
            ModelCheckpoint(filename="last"),
        ],
    )
    trainer.fit(ShallowNetwork(100, lr=0.1, fused=fused), data)
    return watch.seconds


def one_by_one(data: MNISTDataModule, folder: str) -> float:
    return ours(data, folder, fused=False)


def loop(data: MNISTDataModule, folder: str) -> float:
    net = ShallowNetwork(100).net
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    images = data.train_set.images.float() / 255
    labels = data.train_set.labels
    began = time.perf_counter()
    for rows in epoch_order(len(labels), 0, 0).split(BATCH):
        sgd.zero_grad()
        F.cross_entropy(net(images[rows]), labels[rows]).backward()
        sgd.step()
    return time.perf_counter() - began


def start() -> dict[str, float]:
    """Median seconds of a fresh process: Lightning's import, and `fit` up to its first step."""
    one_step = (
        "from mnist_lightning.__main__ import main; import lightning.pytorch as pl, os;"
        "pl.Callback.on_train_batch_start = lambda *_: os._exit(0);"
        "main('fit --config shallow --data.source mnist --trainer.logger false'.split())"
    )
    codes = {"import lightning.pytorch.cli": "import lightning.pytorch.cli", "fit": one_step}
    seconds: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(REPEATS):
        for name, code in codes.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = MNISTDataModule(source="mnist", batch_size=BATCH)
    data.prepare_data()
    data.setup()
    ways = {"documented": documented, "ours": ours, "one by one": one_by_one, "loop": loop}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, run in ways.items():
            pl.seed_everything(0, verbose=False)
            with (
                tempfile.TemporaryDirectory() as folder,
                open(os.devnull, "w") as nowhere,
                contextlib.redirect_stdout(nowhere),
                contextlib.redirect_stderr(nowhere),
            ):
                seconds[name].append(run(data, folder))
    steps = -(-IMAGES // BATCH)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "what": "seconds of one training epoch, shallow network, 100 units, batch 8, SGD, CPU",
        "repeats": REPEATS,
        "seconds": seconds,
        "median_seconds": median,
        "median_ms_per_step": {name: 1000 * value / steps for name, value in median.items()},
        "times_as_fast_as_documented": {
            name: median["documented"] / value for name, value in median.items()
        },
        "times_as_fast_as_loop": {name: median["loop"] / value for name, value in median.items()},
        "start_seconds": start(),
        "provenance": provenance(threads=torch.get_num_threads()),
    }
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    write_json(folder / "fit.json", result)
    print(json.dumps({k: v for k, v in result.items() if k != "provenance"}, indent=1))


if __name__ == "__main__":
    main()
