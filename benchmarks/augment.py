"""What augmentation costs: a training step with it and without it, mini-batches of 128.

- ResNet-18 on colour images of 32 pixels, in bf16 where the processor has instructions for it;
- the small network of `conv.yaml` on gray images of 28 pixels, in fp32, as that file has it.

A step takes the images out of the set, scales and normalises them, and trains the network on them
by SGD. Each step without augmentation is followed by one with shifts and rotations and by one with
padded crops and flips, so that other programs disturb all three alike.

Measured is the processor time of a single thread: other programs on the machine hardly change it.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import alternate
from torch import nn

from mnist_lightning import ResNet18
from mnist_lightning.configs import find_config, read_config
from mnist_lightning.data.augmentation import Augment
from mnist_lightning.data.preparation import prepare
from mnist_lightning.models.convolution import ConvNetwork, _emulates_bf16
from mnist_lightning.spec import DIGITS, DataSpec
from mnist_lightning.training.execution import kept_memory

BATCH, SET = 128, 10_000
AUGMENTS = {
    "no augmentation": Augment(),
    "shift 2, rotate 10": Augment(shift=2, rotate=10),
    "crop 4, flip": Augment(crop=4, flip=True),
}


def steps(
    net: nn.Module, spec: DataSpec, bf16: bool, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each step, but the first three of each way."""
    images = torch.randint(256, (SET, *spec.shape), dtype=torch.uint8)
    labels = torch.randint(len(spec.classes), (SET,))
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, nesterov=True)

    def step(augment: Augment) -> float:
        began = clock()
        rows = torch.randint(SET, (BATCH,))
        change = partial(augment, numbers=rows, seed=0, epoch=0) if augment else None
        pixels = prepare(images.index_select(0, rows), spec, change)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(net(pixels), labels.index_select(0, rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return clock() - began

    ways = {name: partial(step, augment) for name, augment in AUGMENTS.items()}
    with kept_memory():
        alternate(ways, 3)
        return alternate(ways, rounds)


def measure(quick: bool) -> dict[str, Any]:
    bf16 = not _emulates_bf16()
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    colour = DataSpec(3, 32, 32, DIGITS, *imagenet, False)
    settings = read_config(find_config("conv.yaml"))["model"]["init_args"]
    resnet, small = ResNet18(spec=colour).net, ConvNetwork(**settings).net

    def all_steps(clock: Callable[[], float]) -> dict[str, list[float]]:
        found = {
            "ResNet-18": steps(resnet, colour, bf16, 5 if quick else 10, clock),
            "small CNN": steps(small, DataSpec(), False, 20 if quick else 50, clock),
        }
        return {f"{net}, {way}": s for net, by in found.items() for way, s in by.items()}

    torch.set_num_threads(1)
    return {
        "threads": torch.get_num_threads(),
        "batch_size": BATCH,
        "precision": "bf16" if bf16 else "fp32",
        "processor_seconds": all_steps(time.process_time),
    }
