"""What freezing a freshly drawn stem costs: `sum` against `reset`, on a trunk pretrained here.

The study's third regime froze ImageNet's layers behind a first convolution that it had drawn anew.
Here the trunk is pretrained on the digits 0 to 4, each image in two colours of its own, so that the
stem's filters have three channels to learn; then the regime `freeze` learns the digits 5 to 9 from
it, in gray: with the stem summed or drawn anew, with frozen BatchNorm statistics or adapting ones.

Accuracies are of validation images, at 32 pixels. With --quick the trunk is the same, and fewer
images and one seed follow.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from common import mnist
from torch import Tensor
from torchvision.models import resnet18

from mnist_lightning import LayerFreezing, MNISTDataModule, ResNet18
from mnist_lightning.data.sampling import ImageSet
from mnist_lightning.models.optimization import one_cycle

SEEDS = (0, 1, 2)
PRETRAINING = {"images": 12_800, "epochs": 3, "batch_size": 128, "lr": 0.002}
FREEZING = {"images": 6_400, "epochs": 3, "batch_size": 128, "lr": 0.001, "val_images": 3_000}


def only(images: ImageSet, digits: range, most: int) -> ImageSet:
    rows = torch.isin(images.labels, torch.tensor(list(digits))).nonzero().flatten()[:most]
    return ImageSet(images.images[rows], images.labels[rows])


def tint(gray: Tensor) -> Tensor:
    """``(b, 1, h, w)`` in [0, 1] -> ``(b, 3, h, w)``: light ink on darker ground, both coloured."""
    ground, ink = torch.rand(2, len(gray), 3, 1, 1) * 0.5
    return ground + gray * (0.5 + ink - ground)


def pretrain(data: MNISTDataModule, file: Path) -> float:
    """Writes a state dict with three channels; returns the accuracy on its last epoch's images."""
    torch.manual_seed(0)
    digits = only(data.train_set, range(5), PRETRAINING["images"])
    net = resnet18(num_classes=5).to(memory_format=torch.channels_last).train()
    adam = torch.optim.AdamW(net.parameters(), lr=PRETRAINING["lr"], fused=True)
    steps = PRETRAINING["epochs"] * (len(digits) // PRETRAINING["batch_size"])
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: one_cycle(step, steps))
    for _ in range(PRETRAINING["epochs"]):
        right = 0
        for rows in torch.randperm(len(digits)).split(PRETRAINING["batch_size"]):
            gray = F.interpolate(digits.images[rows, None] / 255, size=32, mode="bilinear")
            scores, labels = net((tint(gray) - 0.449) / 0.226), digits.labels[rows]
            adam.zero_grad()
            F.cross_entropy(scores, labels).backward()
            adam.step()
            schedule.step()
            right += int((scores.argmax(1) == labels).sum())
    torch.save(net.state_dict(), file)
    return right / len(digits)


def freeze(data: MNISTDataModule, file: Path, stem: str, batch_norm: str, seed: int) -> float:
    """Validation accuracy of the regime ``freeze``."""
    pl.seed_everything(seed, verbose=False)
    model = ResNet18("freeze", str(file), stem, lr=FREEZING["lr"])
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=FREEZING["epochs"],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LayerFreezing(batch_norm=batch_norm)],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(model, data)
    return trainer.callback_metrics["val/acc"].item()


def measure(quick: bool) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = mnist(
        batch_size=FREEZING["batch_size"],
        eval_batch_size=500,
        image_size=32,
        normalization="imagenet",
    )
    seeds = SEEDS[:1] if quick else SEEDS
    images = FREEZING["images"] // (4 if quick else 1)
    cells: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trunk.pth"
        pretrained = pretrain(data, file)
        data.train_set = only(data.train_set, range(5, 10), images)
        data.val_set = only(data.val_set, range(5, 10), FREEZING["val_images"])
        for seed in seeds:
            for stem in ("sum", "reset"):
                for batch_norm in ("frozen", "adapt"):
                    accuracy = freeze(data, file, stem, batch_norm, seed)
                    cells.setdefault((stem, batch_norm), []).append(accuracy)
    return {
        "what": "validation accuracy on the digits 5 to 9, regime freeze, trunk of 0 to 4",
        "threads": torch.get_num_threads(),
        "seeds": seeds,
        "pretraining": {**PRETRAINING, "train_accuracy": pretrained},
        "freezing": {**FREEZING, "images": images},
        "cells": [
            {"stem": stem, "batch_norm": batch_norm, "val_acc": values}
            for (stem, batch_norm), values in cells.items()
        ],
    }
