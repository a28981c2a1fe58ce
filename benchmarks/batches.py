"""An epoch of mini-batches of 128, as a training step receives them, without any training.

- ours: the DataModule's training batches, shuffled, with the pixels as floating point;
- torchvision: its MNIST with ToTensor in a DataLoader that shuffles, as tutorials have it, in the
  training's own process and with two worker processes.

Both give the same number of images, float32, ``(128, 1, 28, 28)`` with pixels from 0 to 1. A first,
shorter epoch warms up. One thread in the training's process.
"""

import time
from collections.abc import Iterable
from typing import Any

import torch
import torchvision
from common import alternate, mnist, quietly
from torch.utils.data import DataLoader, Subset

from mnist_lightning import MNISTDataModule

BATCH = 128


def ours(data: MNISTDataModule) -> Iterable[Any]:
    return (data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader())


def torchvisions(data: MNISTDataModule, workers: int) -> Iterable[Any]:
    images = torchvision.datasets.MNIST(data.data_dir, transform=torchvision.transforms.ToTensor())
    subset = Subset(images, range(len(data.train_set)))
    return DataLoader(subset, batch_size=BATCH, shuffle=True, num_workers=workers)


def seconds(batches: Iterable[Any], images: int) -> float:
    began = time.perf_counter()
    count = 0
    for x, _ in batches:
        assert x.dtype is torch.float32
        assert x.shape[1:] == (1, 28, 28)
        count += len(x)
    assert count == images
    return time.perf_counter() - began


def measure(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)

    def ways(data: MNISTDataModule) -> dict[str, Any]:
        n = len(data.train_set)
        return {
            "ours": lambda: seconds(ours(data), n),
            "torchvision": lambda: seconds(torchvisions(data, 0), n),
            "torchvision, 2 workers": lambda: seconds(torchvisions(data, 2), n),
        }

    data = mnist(images=6_400 if quick else None, batch_size=BATCH)
    with quietly():
        alternate(ways(mnist(images=1280, batch_size=BATCH)), 1)
        found = alternate(ways(data), 2 if quick else 5)
    return {
        "threads": torch.get_num_threads(),
        "batch_size": BATCH,
        "images": len(data.train_set),
        "seconds": found,
    }
