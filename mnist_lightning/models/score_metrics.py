"""Metrics of the class scores of an evaluation: macro F1, calibration, top-5, single classes."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassCalibrationError, MulticlassF1Score

# Scores that are kept before they go to the metrics: 64 MiB in float32.
MOST_SCORES = 2**24


class MacroF1(MulticlassF1Score):
    """The mean of the F1 scores of the classes that occur. It takes predicted classes.

    torchmetrics' ``update`` makes a confusion matrix of all pairs of classes. Deterministic
    algorithms make it for each image, which takes gigabytes for a hundred classes.
    """

    tp: Tensor  # type: ignore[assignment]
    fp: Tensor  # type: ignore[assignment]
    fn: Tensor  # type: ignore[assignment]
    tn: Tensor  # type: ignore[assignment]
    counts: Tensor | None = None
    """``(2, classes)``: correct predictions and images of each class, in all processes; None before
    ``compute``."""

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        classes = len(self.tp)
        correct = labels[predicted == labels].bincount(minlength=classes)
        false_positives = predicted.bincount(minlength=classes) - correct
        false_negatives = labels.bincount(minlength=classes) - correct
        self.tp = self.tp + correct
        self.fp = self.fp + false_positives
        self.fn = self.fn + false_negatives
        self.tn = self.tn + (len(labels) - correct - false_positives - false_negatives)

    def compute(self) -> Tensor:
        self.counts = torch.stack([self.tp, self.tp + self.fn])  # of all processes only here
        return super().compute()


class ScoreMetrics(nn.Module):
    """Metrics of the scores of one evaluation, updated once at its end, or in few large parts.

    Args:
        classes: number of classes. With more than ten, there is a top-5 accuracy.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.f1 = MacroF1(classes, validate_args=False)
        self.ece = MulticlassCalibrationError(classes, n_bins=15, validate_args=False)
        self.top5 = MeanMetric(nan_strategy=float("nan")) if classes > 10 else None
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._numbers = 0

    def metrics(self) -> dict[str, Metric]:
        """Returns the metrics with their names."""
        named = {"f1": self.f1, "ece": self.ece, "top5": self.top5}
        return {name: metric for name, metric in named.items() if metric is not None}

    def begin(self) -> None:
        """Discards all scores."""
        self._waiting, self._numbers, self.f1.counts = [], 0, None
        for metric in self.metrics().values():
            metric.reset()

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Adds a mini-batch. Ignores scores of another shape than ``(images, classes)``."""
        if labels.ndim != 1 or scores.shape != (len(labels), self.classes):
            return
        self._waiting.append((scores.detach().float(), labels))
        self._numbers += scores.numel()
        if self._numbers >= MOST_SCORES:
            self._update()

    def end(self) -> Iterator[tuple[str, Metric]]:
        """Yields the metrics with their names; nothing if there were no scores."""
        if self._waiting:
            self._update()
        if self.f1.update_called:
            self.f1.compute()  # for the counts, even if nobody logs it
            yield from self.metrics().items()

    def _update(self) -> None:
        scores, labels = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._numbers = [], 0
        known = (labels >= 0) & (labels < self.classes)  # a loss may ignore labels such as -100
        scores, labels = scores[known], labels[known].long()
        self.f1.update(scores.argmax(1), labels)
        # always the softmax: torchmetrics would take scores from 0 to 1 for probabilities
        self.ece.update(scores.softmax(1), labels)
        if self.top5 is not None:
            best = scores.topk(5).indices
            self.top5.update((best == labels.unsqueeze(1)).any(1).float())

    def counts(self) -> list[tuple[int, int]]:
        """Returns the correct predictions and the images of each class; empty without scores."""
        counts = self.f1.counts
        return [] if counts is None else cast(list[tuple[int, int]], counts.T.tolist())
