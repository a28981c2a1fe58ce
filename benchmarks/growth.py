"""How the cost grows: with epochs, mini-batch size, width and number of networks.

Each of four quantities is varied around the shallow network with 100 units and mini-batches of 8:

- epochs: seconds of a whole `Trainer.fit`, everything on, from its start to its end;
- batch size, width: seconds of an epoch of that fit with its validation, logs and checkpoints, but
  without what a fit does once;
- members: seconds of an epoch of a population, as a search trains it, with its validation.

Next to each is a floor: the operations that the training and the validation cannot do without,
divided by the speed of a large matrix product on this machine (fp32, 1024 x 1024), measured between
the runs with as many threads (one) and taken at its fastest. For W weights, of which F are in the
first layer, an image costs 2 W operations forward, 2 W for the gradient of the weights, 2 (W - F)
for that of the layers' inputs, and in the validation 2 W. That counts every pixel; a population
leaves out those that are zero in all images of a block. Bytes bind less than operations: the
weights of such networks lie in the processor's cache.
"""

import math
import time
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from common import alternate, mnist
from fit import ours
from lightning.pytorch import Callback

from mnist_lightning import MNISTDataModule, ShallowNetwork
from mnist_lightning.training.population import Member, PopulationTraining

BATCH, WIDTH = 8, 100
CURVES = {
    "epochs": (1, 2, 5, 10, 20),
    "batch size": (2, 4, 8, 16, 32, 64, 128, 256),
    "width": (25, 50, 100, 200, 400, 800, 1600),
    "members": (1, 2, 4, 8, 16, 32),
}
QUICK = {
    "epochs": (1, 2, 4),
    "batch size": (4, 8, 32, 128),
    "width": (50, 100, 400),
    "members": (1, 4, 16),
}


class Stopwatch(Callback):
    """When epochs begin, and when the last one is over."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.moments.append(time.perf_counter())

    on_train_end = on_train_epoch_start


def fit(data: MNISTDataModule, epochs: int) -> float:
    return ours(data, ShallowNetwork(WIDTH), BATCH, epochs)[0]


def epoch(data: MNISTDataModule, batch_size: int, width: int) -> float:
    watch = Stopwatch()
    ours(data, ShallowNetwork(width), batch_size, 1, watch)
    ((start, end),) = pairwise(watch.moments)
    return end - start


def members(data: MNISTDataModule, count: int) -> float:
    train, val = (
        (part.images.flatten(1).float().div_(255), part.labels)
        for part in (data.train_set, data.val_set)
    )
    networks = [Member((WIDTH,), 0.1 / (1 + m), 1) for m in range(count)]
    training = PopulationTraining(networks, train, val, BATCH, seed=0, classes=10)
    began = time.perf_counter()
    training.run_epoch()
    return time.perf_counter() - began


def matmul_speed(size: int = 1024) -> float:
    """Operations a second of a matrix product, fp32."""
    a, b = torch.randn(2, size, size)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def operations(width: int, train_images: int, val_images: int) -> int:
    """Of one epoch of the shallow network, with its validation."""
    first, last = 784 * width, width * 10
    return train_images * (4 * (first + last) + 2 * last) + val_images * 2 * (first + last)


def measure(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as a search does
    data = mnist(images=6_400 if quick else None)
    points = QUICK if quick else CURVES
    run = {
        "epochs": lambda x: fit(data, x),
        "batch size": lambda x: epoch(data, x, WIDTH),
        "width": lambda x: epoch(data, BATCH, x),
        "members": lambda x: members(data, x),
    }
    fit(mnist(images=640), 1)  # imports on first use are no growth
    curves = {(name, x): partial(run[name], x) for name in run for x in points[name]}
    found = alternate({"speed": matmul_speed, **curves}, 1 if quick else 5)
    speed = max(found["speed"])
    sizes = len(data.train_set), len(data.val_set)

    def floor(name: str, x: int) -> float:
        width, times = (x, 1) if name == "width" else (WIDTH, 1 if name == "batch size" else x)
        return times * operations(width, *sizes) / speed

    return {
        "threads": torch.get_num_threads(),
        "train_images": sizes[0],
        "val_images": sizes[1],
        "matmul_operations_per_second": speed,
        "curves": {
            name: [
                {"x": x, "seconds": found[name, x], "floor_seconds": floor(name, x)}
                for x in points[name]
            ]
            for name in run
        },
    }
