"""The study's 384 shallow networks: the search, next to training them one by one.

- search: `python -m mnist_lightning search --config shallow_grid.yaml`, as a user runs it, from the
  first import to the last file, with validation after every epoch, in two processes;
- loop: a hand-written PyTorch loop (images in memory, autograd, torch.optim.SGD, the same
  validation), one thread in each of two processes;
- lightning: as its documentation teaches it (torchvision's MNIST with ToTensor, DataLoader, default
  logger, checkpoints and progress bar), one thread in each of two processes.

The last two would take hours. Each batch size and width is sampled for a few seconds, both
processes at work, and multiplied by its exact number of steps and epochs; learning rates cost the
same. What is compared is processor time, which other programs on the machine hardly change; the
search's wall time, which they do, is written too. With --quick the search trains for 5 epochs, and
its time is multiplied by 20.
"""

import contextlib
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import product
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Subset

from mnist_lightning.data.module import MNISTDataModule
from mnist_lightning.data.sampling import epoch_order
from mnist_lightning.nets import mlp
from mnist_lightning.search.results import load_results

BATCH_SIZES, WIDTHS = (4, 8, 16, 32, 64, 128), (10, 25, 50, 100)
RATES, EPOCHS = 4, (10, 20, 50, 100)
TRAIN, VAL = 50_400, 12_600
WORKERS = 2
SECONDS = 2.0  # of a hand-written loop, for each batch size and width
PUBLISHED = {"lr": 0.34, "batch_size": -0.35, "max_epochs": 0.24, "hidden_units": 0.13}


def data() -> MNISTDataModule:
    module = MNISTDataModule(source="mnist")
    module.setup("fit")
    return module


def loop(cell: tuple[int, int]) -> tuple[float, float]:
    """Processor seconds of a step, and of a validation."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    batch_size, width = cell
    module = data()
    train, val = (
        (part.images.float().div_(255).flatten(1), part.labels)
        for part in (module.train_set, module.val_set)
    )
    net = mlp(784, [width], 10)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    steps, began = 0, 0.0
    for rows in epoch_order(TRAIN, 0, 0).split(batch_size):
        if steps == 20:  # warm by now
            began = time.process_time()
        sgd.zero_grad()
        F.cross_entropy(net(train[0][rows]), train[1][rows]).backward()
        sgd.step()
        steps += 1
        if steps > 20 and time.process_time() - began > SECONDS:
            break
    step = (time.process_time() - began) / (steps - 20)
    with torch.no_grad():
        began = time.process_time()
        for x, y in zip(val[0].split(1000), val[1].split(1000), strict=True):
            scores = net(x)
            F.cross_entropy(scores, y, reduction="sum").item()
            (scores.argmax(1) == y).sum().item()
    return step, time.process_time() - began


class Documented(pl.LightningModule):
    """As in Lightning's introduction."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10)
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        scores = self.net(x)
        self.log("val_loss", F.cross_entropy(scores, y))
        self.log("val_acc", (scores.argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Stopwatch(pl.Callback):
    """Processor seconds from the 20th step to the last, and of the validation."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 20:
            self.began = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.trained = time.process_time() - self.began if hasattr(self, "began") else 0.0

    def on_validation_start(self, *_: Any) -> None:
        self.validation = time.process_time()

    def on_validation_end(self, *_: Any) -> None:
        self.validated = time.process_time() - self.validation


def lightning(cell: tuple[int, int]) -> tuple[float, float]:
    """Processor seconds of a step, and of a validation."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    batch_size, width = cell
    folder = os.environ.get("MNIST_DATA_DIR") or "data"
    mnist = torchvision.datasets.MNIST(folder, transform=torchvision.transforms.ToTensor())
    train = DataLoader(Subset(mnist, range(TRAIN)), batch_size=batch_size, shuffle=True)
    val = DataLoader(Subset(mnist, range(TRAIN, 60_000)), batch_size=1000)
    watch, steps, val_batches = Stopwatch(), 20 + 4000 // max(batch_size, 8), 2
    with (
        tempfile.TemporaryDirectory() as logs,
        open(os.devnull, "w") as void,
        contextlib.redirect_stdout(void),
        contextlib.redirect_stderr(void),
    ):
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            limit_train_batches=steps,
            limit_val_batches=val_batches,
            num_sanity_val_steps=0,
            default_root_dir=logs,
            callbacks=[watch],
        )
        trainer.fit(Documented(width), train, val)
    return watch.trained / (steps - 20), watch.validated * VAL / (val_batches * 1000)


def one_by_one(train: Any) -> dict[str, Any]:
    """Samples every batch size and width, and multiplies."""
    cells = list(product(BATCH_SIZES, WIDTHS))
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        pool.map(abs, range(WORKERS))  # imports are over
        samples = pool.map(train, cells, chunksize=1)
    total = 0.0
    for (batch_size, _), (step, validation) in zip(cells, samples, strict=True):
        epochs = RATES * sum(EPOCHS)
        total += epochs * (-(-TRAIN // batch_size) * step + validation)
    return {
        "processor_seconds": round(total),
        "hours": round(total / WORKERS / 3600, 2),
        "us_a_step": {
            f"batch {b}, {w} units": round(1e6 * step, 1)
            for (b, w), (step, _) in zip(cells, samples, strict=True)
        },
    }


def search(quick: bool) -> dict[str, Any]:
    """Runs the search for real; checks it against the study."""
    words = ["--config", "shallow_grid.yaml", "--workers", str(WORKERS)]
    if quick:
        words.append("--space.max_epochs=[5]")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mnist_lightning", "search", *words, "--folder", folder]
        began = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
        processor = os.times().children_user + os.times().children_system
        table = load_results(folder)
    if quick:
        return {
            "wall_seconds": round(20 * seconds),
            "processor_seconds": round(20 * processor),
            "extrapolated_from_epochs": 5,
        }
    correlations = table[list(PUBLISHED)].corrwith(table["val_acc"])
    best = table.sort_values("val_acc", ascending=False).head(5)
    columns = ["batch_size", "max_epochs", "lr", "hidden_units", "val_acc"]
    return {
        "wall_seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "trials": len(table),
        "correlation_with_val_acc": {name: round(correlations[name], 4) for name in PUBLISHED},
        "published": PUBLISHED,
        "best_five": best[columns].to_dict("records"),
    }


def measure(quick: bool) -> dict[str, Any]:
    by_hand, documented = one_by_one(loop), one_by_one(lightning)
    found = search(quick)
    for other in (by_hand, documented):
        ratio = other["processor_seconds"] / found["processor_seconds"]
        other["times_the_search"] = round(ratio, 1)
    return {
        "data": "MNIST, split study (seed 0)",
        "n": 1,
        "processes": WORKERS,
        "threads": 1,  # of each process
        "search": found,
        "loop": by_hand,
        "lightning": documented,
    }
