"""Training steps of ResNet-18, mini-batches of 64, at 28 and at 224 pixels.

- naive: a plain loop on images that lie ready, fp32, contiguous, torch.optim.Adam as it comes;
- bare: the same loop with what the configurations turn on: channels_last, fused Adam, memory that
  the process keeps and, at 224 pixels, bf16;
- bare, bf16 (at 28 pixels): why the configurations turn that on at 224 pixels only;
- ours: `Trainer.fit` with everything that the command `fit` turns on: images taken from the set,
  enlarged from 28 pixels, the training step, metrics, callbacks, log, bar;
- ours, frozen (at 224 pixels): likewise, but only layer4 and fc train, and the others' statistics
  are frozen;
- ours, compiled: on a GPU alone; on a CPU, compiling made it slower where it was tried.

Each run is a process of its own. A figure is the median over all steps but each run's first four,
in which a process that keeps its memory still gathers it.
Uses the GPU where there is one, and all cores.
"""

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from common import alternate, mnist, quietly, trainer
from lightning.pytorch import Callback

from mnist_lightning import LayerFreezing, ResNet18
from mnist_lightning.training.execution import kept_memory

BATCH = 64
PRECISION = {28: "32-true", 224: "bf16-mixed"}
FROZEN = ["net.layer4.*", "net.fc.*"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


def loop(pixels: int, steps: int, optimized: bool, bf16: bool) -> list[float]:
    """The moments at which steps of a hand-written loop end."""
    net = ResNet18().net.to(DEVICE)
    if not optimized:
        net = net.to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.001, fused=True if optimized else None)
    images = torch.randn(BATCH, 1, pixels, pixels, device=DEVICE)
    labels = torch.randint(10, (BATCH,), device=DEVICE)
    ends = []
    with kept_memory() if optimized else nullcontext():
        for _ in range(steps):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ends.append(now())
    return ends


def ours(pixels: int, steps: int, compile: bool = False, train: Any = None) -> list[float]:
    data = mnist(
        images=steps * BATCH,
        batch_size=BATCH,
        eval_batch_size=BATCH,
        image_size=pixels,
        normalization="imagenet",
    )
    clock = Clock()
    with quietly() as folder:
        trainer(
            folder,
            clock,
            freezing=LayerFreezing(train=train),
            accelerator=DEVICE.type,
            devices=1,
            precision=PRECISION[pixels],
            max_epochs=1,
            limit_val_batches=1,
        ).fit(ResNet18(lr=0.001, compile=compile), data)
    return clock.ends


def ways(pixels: int) -> dict[str, Any]:
    bf16 = PRECISION[pixels] == "bf16-mixed"
    found = {
        "naive": partial(loop, optimized=False, bf16=False),
        "bare": partial(loop, optimized=True, bf16=bf16),
        "ours": ours,
    }
    if not bf16:
        found["bare, bf16"] = partial(loop, optimized=True, bf16=True)
    if pixels == 224:
        found["ours, frozen"] = partial(ours, train=FROZEN)
    if DEVICE.type == "cuda":
        found["ours, compiled"] = partial(ours, compile=True)
    return found


def fresh(way: str, pixels: int, steps: int) -> list[float]:
    """Seconds of each step but the first four, in a process of its own."""
    words = [sys.executable, __file__, way, str(pixels), str(steps)]
    run = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure(quick: bool) -> dict[str, Any]:
    on_gpu = DEVICE.type == "cuda"
    steps = {28: 14 if quick else 30, 224: 6 if quick else 8}
    runs = {
        f"{pixels}, {way}": partial(fresh, way, pixels, 200 if on_gpu else steps[pixels])
        for pixels in PRECISION
        for way in ways(pixels)
        if not (quick and way in ("ours, frozen", "bare, bf16"))
    }
    found = alternate(runs, 1 if quick else 5)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "batch_size": BATCH,
        "precision": PRECISION,
        "seconds": {name: [step for run in found[name] for step in run] for name in runs},
    }


if __name__ == "__main__":
    way, pixels, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    ends = ways(pixels)[way](pixels, steps)
    print(json.dumps([after - before for before, after in pairwise(ends[3:])]))
