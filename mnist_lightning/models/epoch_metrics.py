"""Loss and accuracy of an epoch, and what is said of a loss that is no longer finite."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

STAGES = ("train", "val", "test")


class Diverged(ValueError):
    """The loss of a training is no longer finite."""


class Noted(NamedTuple):
    """What some mini-batches gave."""

    loss: Tensor
    """Summed over the images, a scalar."""
    correct: Tensor
    """How many answers were right, a scalar."""
    images: int


class EpochMetrics(nn.Module):
    """Means over the images of an epoch, in all processes.

    Mini-batches are noted as they come and summed up once, at the epoch's end: a torchmetrics
    update for each takes longer than the training step of a small network.
    """

    def __init__(self) -> None:
        super().__init__()
        # A loss that is not a number must show in the mean. By default it is left out, and with
        # "disable" torchmetrics 1.9 leaves out the weights.
        self.means = nn.ModuleDict(
            {
                f"{stage}_{name}": MeanMetric(nan_strategy=float("nan"))
                for stage in STAGES
                for name in ("loss", "acc")
            }
        )
        self._noted: dict[str, list[Noted]] = {}

    def begin(self, stage: str) -> None:
        """Forgets what was noted in an epoch that was cut off."""
        self._noted.pop(stage, None)

    def note(self, stage: str, loss: Tensor, correct: Tensor, images: int) -> None:
        """Adds mini-batches to an epoch: see ``Noted``."""
        self._noted.setdefault(stage, []).append(Noted(loss, correct, images))

    def noted(self, stage: str) -> list[Noted]:
        """What was noted so far in the epoch at hand."""
        return self._noted.get(stage, [])

    def end(self, stage: str) -> Iterator[tuple[str, MeanMetric]]:
        """The metrics of an epoch that is over, by name.

        None where nothing was noted: a training resumed at the very end of an epoch has not a
        mini-batch left.
        """
        if not (noted := self._noted.pop(stage, [])):
            return
        images = sum(one.images for one in noted)
        for name, parts in (
            ("loss", [one.loss for one in noted]),
            ("acc", [one.correct for one in noted]),
        ):
            # processes may have unequal shares of the images
            mean = cast(MeanMetric, self.means[f"{stage}_{name}"])
            mean.reset()
            mean.update(torch.stack(parts).sum() / images, images)
            yield f"{stage}/{name}", mean

    def is_finite(self, stage: str) -> bool:
        """Whether the loss of the epoch that has ended is a finite number."""
        return bool(cast(MeanMetric, self.means[f"{stage}_loss"]).compute().isfinite())

    def saved(self) -> list[Any]:
        """The training epoch at hand, for a checkpoint within it."""
        losses, correct, images = zip(*self.noted("train"), strict=True)
        return [torch.stack(losses), torch.stack(correct), list(images)]

    def restore(self, saved: list[Any], device: torch.device) -> None:
        """Goes on with the training epoch that ``saved`` gave."""
        losses, correct = (part.to(device).unbind() for part in saved[:2])
        columns = zip(losses, correct, saved[2], strict=True)
        self._noted["train"] = [Noted(*column) for column in columns]


def divergence(module: LightningModule, noted: list[Noted], lr: float) -> Diverged:
    """Says where in the epoch the loss was no longer finite, and what the cause may be.

    Args:
        module: in training.
        noted: of the epoch, in this process.
        lr: its learning rate.
    """
    means = [float(one.loss) / one.images for one in noted]
    first = next((i for i, mean in enumerate(means) if not math.isfinite(mean)), None)
    where, course = "", ""
    if first is not None:  # of several processes, it may be another's
        data = getattr(module.trainer, "datamodule", None)
        size = getattr(data, "batch_size", noted[0].images)
        before = sum(one.images for one in noted[:first])
        start, end = before // size + 1, -(-(before + noted[first].images) // size)
        where = f", mini-batch {start:,}" + (f" to {end:,}" if end > start else "")
        if first:
            course = f" It was {means[0]:.4g} at the epoch's start and {means[first - 1]:.4g} last."
    if str(module.trainer.precision).startswith("16"):
        cause = "float16 ends at 65,504: --trainer.precision bf16-mixed may help"
    else:
        cause = f"A lower lr may help (now {lr})"
    return Diverged(
        f"the training diverged in epoch {module.current_epoch + 1}{where}: its loss is no longer"
        f" finite.{course} {cause}"
    )
