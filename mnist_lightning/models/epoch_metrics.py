"""The metrics of an epoch, and the error for a loss that is no longer finite."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from mnist_lightning.models.score_metrics import ScoreMetrics

EVALUATIONS = ("val", "test")
STAGES = ("train", *EVALUATIONS)


class Diverged(ValueError):
    """The loss of a training is no longer finite."""


class Noted(NamedTuple):
    """Sums over the images of one or more mini-batches."""

    loss: Tensor
    """Sum of the losses, a scalar."""
    correct: Tensor
    """Number of correct predictions, a scalar."""
    images: int


class EpochMetrics(nn.Module):
    """Mean loss and accuracy over the images of an epoch, in all processes.

    In validation and test also the metrics of ``ScoreMetrics``.

    The sums of the mini-batches are collected and added up once, at the end of the epoch: a
    torchmetrics update for each takes longer than the training step of a small network.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        # A NaN loss must make the mean NaN. By default torchmetrics ignores NaN values, and with
        # "disable" torchmetrics 1.9 ignores the weights.
        self.means = nn.ModuleDict(
            {
                f"{stage}_{name}": MeanMetric(nan_strategy=float("nan"))
                for stage in STAGES
                for name in ("loss", "acc")
            }
        )
        self._noted: dict[str, list[Noted]] = {}
        self.scored = nn.ModuleDict({stage: ScoreMetrics(classes) for stage in EVALUATIONS})
        self._replaced: set[str] = set()

    def begin(self, stage: str) -> None:
        """Discards the sums and scores of an epoch that was interrupted."""
        self._noted.pop(stage, None)
        if stage in self.scored:
            self.of_scores(stage).begin()

    def of_scores(self, stage: str) -> ScoreMetrics:
        """Returns the metrics of the scores of a validation or test."""
        return cast(ScoreMetrics, self.scored[stage])

    def note(self, stage: str, loss: Tensor, correct: Tensor, images: int) -> None:
        """Adds mini-batches to the epoch; the arguments are those of ``Noted``."""
        self._noted.setdefault(stage, []).append(Noted(loss, correct, images))

    def noted(self, stage: str) -> list[Noted]:
        """Returns the sums of the current epoch so far."""
        return self._noted.get(stage, [])

    def end(self, stage: str) -> Iterator[tuple[str, Metric]]:
        """Ends the epoch and yields its metrics with their names.

        Yields nothing if there was no mini-batch: a training may be resumed exactly at the end of
        an epoch.
        """
        if not (noted := self._noted.pop(stage, [])):
            return
        images = sum(sums.images for sums in noted)
        for name, parts in (
            ("loss", [sums.loss for sums in noted]),
            ("acc", [sums.correct for sums in noted]),
        ):
            # weighted, because processes may have unequal numbers of images
            mean = cast(MeanMetric, self.means[f"{stage}_{name}"])
            mean.reset()
            mean.update(torch.stack(parts).sum() / images, images)
            yield f"{stage}/{name}", mean
        if stage in self.scored:
            for name, metric in self.of_scores(stage).end():
                if f"{stage}/{name}" not in self._replaced:
                    yield f"{stage}/{name}", metric

    def replace(self, name: str, value: Any) -> bool:
        """Leaves a metric of the scores to a model that logs a value of its own under that name.

        Returns:
            True if ``value`` is the first one.
        """
        stage, _, metric = name.partition("/")
        ours = self.of_scores(stage).metrics().get(metric) if stage in self.scored else None
        if ours is None or value is ours or name in self._replaced:
            return False
        self._replaced.add(name)
        return True

    def is_finite(self, stage: str) -> bool:
        """Returns True if the loss of the epoch that has ended is finite."""
        return bool(cast(MeanMetric, self.means[f"{stage}_loss"]).compute().isfinite())

    def saved(self) -> list[Any]:
        """Returns the state of the current training epoch, for a checkpoint within it."""
        losses, correct, images = zip(*self.noted("train"), strict=True)
        return [torch.stack(losses), torch.stack(correct), list(images)]

    def restore(self, saved: list[Any], device: torch.device) -> None:
        """Restores the state of a training epoch that ``saved`` returned."""
        losses, correct = (part.to(device).unbind() for part in saved[:2])
        columns = zip(losses, correct, saved[2], strict=True)
        self._noted["train"] = [Noted(*column) for column in columns]


def divergence(module: LightningModule, noted: list[Noted], lr: float) -> Diverged:
    """Makes an error that says where in the epoch the loss became non-finite, and what may help.

    Args:
        module: the model in training.
        noted: the sums of the epoch, in this process.
        lr: the model's learning rate.
    """
    means = [float(sums.loss) / sums.images for sums in noted]
    first = next((i for i, mean in enumerate(means) if not math.isfinite(mean)), None)
    where, course = "", ""
    if first is not None:  # with several processes, it may have happened in another one
        data = getattr(module.trainer, "datamodule", None)
        size = getattr(data, "batch_size", noted[0].images)
        before = sum(sums.images for sums in noted[:first])
        start, end = before // size + 1, -(-(before + noted[first].images) // size)
        where = f", mini-batch {start:,}" + (f" to {end:,}" if end > start else "")
        if first:
            last = means[first - 1]
            course = f" It was {means[0]:.4g} at the start of the epoch and {last:.4g} before that."
    if str(module.trainer.precision).startswith("16"):
        cause = "The largest float16 is 65,504: --trainer.precision bf16-mixed may help"
    else:
        cause = f"A lower lr may help (now {lr})"
    return Diverged(
        f"the training diverged in epoch {module.current_epoch + 1}{where}: its loss is no longer"
        f" finite.{course} {cause}"
    )
