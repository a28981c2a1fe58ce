"""Epochs of ResNet-18 at 224 pixels with frozen layers: computed once, or in each epoch.

- freeze: `resnet18_freeze.yaml`, layer4 and fc train, the statistics of BatchNorm are frozen;
- probe: likewise, but fc alone trains: a linear probe.

Each is trained by `Trainer.fit` with everything that the command `fit` turns on, in bf16, with
`--freezing.cache true` and false. The weights are random: they do not change how long it takes.

A run has 1,280 images for training, which is 20 mini-batches, and a quarter as many for validation.
On the whole set the last mini-batch of an epoch, which has 32 images, passes all layers either way.
Each run is a process of its own, and the runs alternate. An epoch is the training and the
validation, with the checkpoints of its end. The first epoch of each run, in which the process
gathers its memory, does not count. The first pass is from the start of `fit` to the start of the
first epoch.
"""

import json
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from common import alternate, mnist, quietly, trainer
from lightning.pytorch import Callback, seed_everything

from mnist_lightning import LayerFreezing, ResNet18
from mnist_lightning.data.sampling import ImageSet

TRAINED = {"freeze": ["net.layer4.*", "net.fc.*"], "probe": ["net.fc.*"]}
EPOCHS = 3


class Clock(Callback):
    """The moments at which epochs start, and the end of the last one."""

    def __init__(self) -> None:
        self.moments = [time.perf_counter()]

    def on_train_epoch_start(self, *_: Any) -> None:
        self.moments.append(time.perf_counter())

    def on_train_end(self, *_: Any) -> None:
        self.moments.append(time.perf_counter())


def fit(what: str, cache: bool, images: int) -> list[float]:
    """Seconds of the first pass, and of each epoch."""
    seed_everything(0, verbose=False)
    data = mnist(
        images=images,
        batch_size=64,
        eval_batch_size=200,
        image_size=224,
        normalization="imagenet",
    )
    val = data.val_set
    data.val_set = ImageSet(val.images[: images // 4], val.labels[: images // 4])
    model = ResNet18(lr=0.01)
    freezing = LayerFreezing(train=TRAINED[what], cache=cache)
    with quietly() as folder:
        clock = Clock()
        fitting = trainer(
            folder, clock, freezing=freezing, precision="bf16-mixed", max_epochs=EPOCHS
        )
        fitting.fit(model, data)
    return [after - before for before, after in pairwise(clock.moments)]


def fresh(what: str, cache: bool, images: int) -> list[float]:
    """As ``fit``, in a process of its own."""
    words = [sys.executable, __file__, what, str(int(cache)), str(images)]
    run = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure(quick: bool) -> dict[str, Any]:
    images, rounds = (256, 1) if quick else (1280, 3)
    ways = {
        f"{what}, {'once' if cache else 'each epoch'}": partial(fresh, what, cache, images)
        for what in TRAINED
        for cache in (True, False)
    }
    found = alternate(ways, rounds)
    return {
        "train_images": images,
        "val_images": images // 4,
        "threads": torch.get_num_threads(),
        "seconds": {way: [s for run in runs for s in run[2:]] for way, runs in found.items()},
        "first_pass": {way: [run[0] for run in runs] for way, runs in found.items()},
    }


if __name__ == "__main__":
    what, cache, images = sys.argv[1:]
    print(json.dumps(fit(what, cache == "1", int(images))))
