"""Training steps of ResNet-18 at 224 pixels, mini-batches of 64: the naive way, bare, and ours.

    python benchmarks/resnet.py

- naive: a plain loop on images that lie ready, fp32, contiguous, torch.optim.Adam as it comes;
- bare: the same loop with what resnet18_scratch.yaml turns on: bf16, channels_last, fused Adam;
- ours: Trainer.fit as that configuration has it: images taken from the set, enlarged from 28
  pixels, the training step, metrics, callbacks;
- ours, frozen: likewise, but only layer4 and fc train, the others' statistics frozen;
- ours, compiled: on a GPU alone; on a CPU, compiling made it slower where it was tried.

Runs alternate; a figure is the median over all steps but each run's first two. Uses the GPU where
there is one, and MNIST or the digits: the pixels do not change the time. Writes
benchmarks/results/resnet.json, or resnet_cuda.json.
"""

import contextlib
import io
import logging
import statistics
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback

from mnist_lightning import EarlyStopping, LayerFreezing, MNISTDataModule, ResNet18
from mnist_lightning.inspection import format_table
from mnist_lightning.provenance import provenance, write_json

ROUNDS = 5
BATCH = 64
PIXELS = 224
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = 200 if DEVICE.type == "cuda" else 5


def now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(Callback):
    """The moments at which training steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(now())


def loop(optimized: bool) -> list[float]:
    """Seconds of each step but the first two."""
    net = ResNet18().net.to(DEVICE)
    if not optimized:
        net = net.to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.001, fused=True if optimized else None)
    images = torch.randn(BATCH, 1, PIXELS, PIXELS, device=DEVICE)
    labels = torch.randint(10, (BATCH,), device=DEVICE)
    ends = []
    for _ in range(STEPS):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=optimized):
            loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ends.append(now())
    return [after - before for before, after in pairwise(ends[1:])]


def ours(data: MNISTDataModule, compile: bool = False, **freezing: Any) -> list[float]:
    clock = Clock()
    trainer = pl.Trainer(
        accelerator=DEVICE.type,
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        limit_train_batches=STEPS,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, EarlyStopping(), LayerFreezing(**freezing)],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(ResNet18(lr=0.001, compile=compile), data)
    return [after - before for before, after in pairwise(clock.ends[1:])]


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = MNISTDataModule(
        batch_size=BATCH, eval_batch_size=BATCH, image_size=PIXELS, normalization="imagenet"
    )
    data.prepare_data()
    data.setup()
    ways = {
        "naive": lambda: loop(optimized=False),
        "bare": lambda: loop(optimized=True),
        "ours": lambda: ours(data),
        "ours, frozen": lambda: ours(data, train=["net.layer4.*", "net.fc.*"]),
    }
    if DEVICE.type == "cuda":
        ways["ours, compiled"] = lambda: ours(data, compile=True)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            seconds[name] += run()
    rate = {name: BATCH / statistics.median(times) for name, times in seconds.items()}
    result = {
        "what": f"training images per second, ResNet-18, {PIXELS} pixels, mini-batches of {BATCH}",
        "images_per_second": rate,
        "bare_over_naive": rate["bare"] / rate["naive"],
        "ours_over_naive": rate["ours"] / rate["naive"],
        "ours_over_bare": rate["ours"] / rate["bare"],
        "seconds": seconds,
        "provenance": provenance(
            data=data.describe(),
            device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
        ),
    }
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    name = "resnet.json" if DEVICE.type == "cpu" else f"resnet_{DEVICE.type}.json"
    write_json(folder / name, result)
    rows = [
        (name, f"{rate[name]:,.1f}", f"{1000 * statistics.median(times):,.0f}", f"{len(times)}")
        for name, times in seconds.items()
    ]
    header = ("way", "images/s", "ms a step", "steps")
    print(format_table(header, rows, right=(1, 2, 3)))
    print(f"ours: {result['ours_over_naive']:.2f} x naive, {result['ours_over_bare']:.2f} x bare")


if __name__ == "__main__":
    main()
