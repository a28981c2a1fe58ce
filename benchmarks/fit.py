"""Whole trainings of multilayer perceptrons, from the start of ``fit`` to its end, in several ways.

Start-up (imports, reading the images) is not counted; validation after each epoch, logging,
checkpoints and bar are, for the ways that have them. One thread, on the CPU.

- ours: `Trainer.fit` with everything that the command `fit` turns on, see `common.trainer`;
- one by one: ours through autograd, one step at a time;
- loop: a hand-written PyTorch loop, images as floating point in memory, autograd, torch.optim.SGD,
  the same mini-batches and the same validation; no logs, no checkpoints, no bar;
- documented: Lightning as its documentation teaches it (torchvision's MNIST with ToTensor, a
  DataLoader, torchmetrics logged in each step, the progress bar, the default logger).

The shallow network has 100 units and mini-batches of 8: ours and the loop run 5 epochs, documented
and one by one a single one, and are compared by the epoch. The network of two layers (2048
and 128 units, mini-batches of 32) runs one epoch.

Start-up, in fresh processes: `import lightning.pytorch.cli`, and the command `fit` until its first
training step, with everything on, and without TensorBoard.
"""

import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import torchvision
from common import alternate, mnist, quietly, trainer
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torchmetrics.classification import MulticlassAccuracy

from mnist_lightning import DeepNetwork, Execution, MNISTDataModule, ShallowNetwork
from mnist_lightning.data.sampling import epoch_order
from mnist_lightning.models.classifier import Classifier

SHALLOW = partial(ShallowNetwork, 100, lr=0.1)
DEEP = partial(DeepNetwork, [2048, 128], lr=0.01)


class Documented(pl.LightningModule):
    """As in Lightning's and torchmetrics' introductions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
        self.train_acc = MulticlassAccuracy(10)
        self.val_acc = MulticlassAccuracy(10)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        scores = self.net(x)
        loss = F.cross_entropy(scores, y)
        self.train_acc(scores, y)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        scores = self.net(x)
        self.val_acc(scores, y)
        self.log("val_loss", F.cross_entropy(scores, y))
        self.log("val_acc", self.val_acc)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


# Each way returns the seconds that it took and its last accuracy on the validation images.
Outcome = tuple[float, float]


def documented(data: MNISTDataModule, batch_size: int) -> Outcome:
    train, test = (
        torchvision.datasets.MNIST(
            data.data_dir, train=part, transform=torchvision.transforms.ToTensor()
        )
        for part in (True, False)
    )
    n, n_val = len(data.train_set), len(data.val_set)  # as many as the others have
    rest = ConcatDataset([Subset(train, range(n, len(train))), test])
    with quietly() as folder:
        model = Documented()
        loaders = (
            DataLoader(Subset(train, range(n)), batch_size=batch_size, shuffle=True),
            DataLoader(Subset(rest, range(n_val)), batch_size=1000),
        )
        lightning = pl.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=folder)
        began = time.perf_counter()
        lightning.fit(model, *loaders)
        seconds = time.perf_counter() - began
    return seconds, lightning.callback_metrics["val_acc"].item()


def ours(
    data: MNISTDataModule,
    model: Classifier,
    batch_size: int,
    epochs: int,
    *callbacks: pl.Callback,
    steps: int | None = None,
    fused: bool = True,
) -> Outcome:
    data.batch_size = batch_size
    execution = Execution(steps, fused)
    with quietly() as folder:
        lightning = trainer(folder, execution, *callbacks, max_epochs=epochs)
        began = time.perf_counter()
        lightning.fit(model, data)
        seconds = time.perf_counter() - began
    return seconds, lightning.callback_metrics["val/acc"].item()


def loop(data: MNISTDataModule, model: Classifier, batch_size: int, epochs: int) -> Outcome:
    net = model.net
    sgd = torch.optim.SGD(net.parameters(), lr=model.lr)
    (images, labels), (val_images, val_labels) = (
        (part.images.float().div_(255), part.labels) for part in (data.train_set, data.val_set)
    )
    began = time.perf_counter()
    for epoch in range(epochs):
        for rows in epoch_order(len(labels), 0, epoch).split(batch_size):
            sgd.zero_grad()
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            sgd.step()
        loss = correct = 0.0
        with torch.no_grad():
            for x, y in zip(val_images.split(1000), val_labels.split(1000), strict=True):
                scores = net(x)
                loss += F.cross_entropy(scores, y, reduction="sum").item()
                correct += (scores.argmax(1) == y).sum().item()
    return time.perf_counter() - began, correct / len(val_labels)


def start(logged: bool) -> float:
    """Seconds of a fresh process until ``fit`` takes its first step."""
    code = (
        "from mnist_lightning.__main__ import main; import lightning.pytorch as pl, os, sys;"
        "pl.Callback.on_train_batch_start = lambda *_: os._exit(0);"
        "main(sys.argv[1:]); sys.exit('no training step was taken')"
    )
    with tempfile.TemporaryDirectory() as folder:
        words = ["fit", "--config", "shallow", "--data.source", "mnist"]
        words += ["--trainer.default_root_dir", folder]
        words += [] if logged else ["--trainer.logger", "false"]
        return fresh("-c", code, *words)


def fresh(*words: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def measure(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    rounds, epochs = (2, 2) if quick else (5, 5)
    data = mnist(images=6_400 if quick else None)

    def ways(data: MNISTDataModule, epochs: int) -> dict[str, Any]:
        return {
            "documented": lambda: documented(data, 8),
            "ours": lambda: ours(data, SHALLOW(), 8, epochs),
            "one by one": lambda: ours(data, SHALLOW(), 8, 1, steps=1, fused=False),
            "loop": lambda: loop(data, SHALLOW(), 8, epochs),
            "deep, ours": lambda: ours(data, DEEP(), 32, 1),
            "deep, loop": lambda: loop(data, DEEP(), 32, 1),
        }

    pl.seed_everything(0, verbose=False)
    alternate(ways(mnist(images=640), 1), 1)  # imports on first use are start-up too
    outcomes = alternate(ways(data, epochs), rounds)
    starts = {
        "start, import": lambda: fresh("-c", "import lightning.pytorch.cli"),
        "start, fit": lambda: start(logged=True),
        "start, fit without TensorBoard": lambda: start(logged=False),
    }
    seconds = {name: [taken for taken, _ in runs] for name, runs in outcomes.items()}
    ran = {name: epochs if name in ("ours", "loop") else 1 for name in seconds}
    return {
        "threads": torch.get_num_threads(),
        "train_images": len(data.train_set),
        "val_images": len(data.val_set),
        "epochs": ran,
        "seconds": {**seconds, **alternate(starts, rounds)},
        "seconds_per_epoch": {
            name: [taken / ran[name] for taken in runs] for name, runs in seconds.items()
        },
        "val_acc": {name: [accuracy for _, accuracy in runs] for name, runs in outcomes.items()},
    }
