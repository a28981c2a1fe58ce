"""Classifier: a network, a loss, metrics and an optimizer, as a LightningModule."""

import inspect
import math
from collections.abc import Sequence
from types import FrameType
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mnist_lightning.classes import class_path
from mnist_lightning.files import is_plain
from mnist_lightning.training.execution import Execution
from mnist_lightning.training.resuming import count_manual_steps, scale_rates

Batch = tuple[Tensor, Tensor]
OptimizerName = Literal["sgd", "adam", "adamw"]
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


class Diverged(ValueError):
    """The loss of a training is no longer finite."""


class Classifier(LightningModule):
    """What all classifiers share: one step for train, validation and test, and its metrics.

    Logs ``<stage>/loss`` and ``<stage>/acc`` once an epoch, each the mean over the epoch's images.
    Those of ``train`` are accumulated during training, before each update.

    The arguments of a subclass are its hyper-parameters, without ``save_hyperparameters()``: those
    that are plain values (numbers, texts, lists and mappings of them), and so load as data.

    Args:
        net: maps images ``(b, 1, height, width)`` to class scores ``(b, 10)``.
        lr: learning rate.
        optimizer: ``sgd`` (plain, no momentum), ``adam`` or ``adamw``.

    Raises:
        ValueError: the learning rate is not positive, or the optimizer is unknown.
        Diverged: in training, at the end of an epoch or before a checkpoint is saved: the loss is
            no longer finite.
    """

    steps_known = True  # see execution.altered
    fused = False
    """Whether steps may be fused where ``execution.unfusable`` finds nothing against it."""

    def __init__(self, net: nn.Module, lr: float, optimizer: OptimizerName) -> None:
        super().__init__()
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
        self.net, self.lr, self.optimizer = net, lr, optimizer
        if type(self) is not Classifier:
            frame = cast(FrameType, cast(FrameType, inspect.currentframe()).f_back)
            arguments: dict[str, Any] = {}
            for of_one in collect_init_args(frame, [], classes=(Classifier,)):
                arguments |= of_one
            other = [name for name, value in arguments.items() if not is_plain(value)]
            self.save_hyperparameters(frame=frame, ignore=other)
        # A loss that is not a number must show in the mean. By default it is left out, and with
        # "disable" torchmetrics 1.9 leaves out the weights.
        self.means = nn.ModuleDict(
            {
                f"{stage}_{name}": MeanMetric(nan_strategy=float("nan"))
                for stage in ("train", "val", "test")
                for name in ("loss", "acc")
            }
        )
        # for each mini-batch: its loss summed over the images, correct answers, images
        self._seen: dict[str, list[tuple[Tensor, Tensor, int]]] = {}

    def forward(self, images: Tensor) -> Tensor:
        """``(b, 1, height, width)`` -> class scores ``(b, 10)``."""
        return self.net(images)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean over the mini-batch, a scalar; cross entropy unless a model says otherwise."""
        return F.cross_entropy(scores, labels)

    def _score(self, stage: str, scores: Tensor, labels: Tensor) -> Tensor:
        loss = self.loss(scores, labels)
        correct = (scores.argmax(1) == labels).sum()
        self.note(stage, loss.detach() * len(labels), correct, len(labels))
        return loss

    def note(self, stage: str, loss: Tensor, correct: Tensor, images: int) -> None:
        """Adds to the figures of an epoch.

        Args:
            stage: ``train``, ``val`` or ``test``.
            loss: summed over the images, a scalar.
            correct: how many answers were right, a scalar.
            images: how many there were.
        """
        # Kept as they are until the epoch's end: a torchmetrics update for each mini-batch takes
        # longer than the training step of a small network.
        self._seen.setdefault(stage, []).append((loss, correct, images))

    def _log_epoch(self, stage: str) -> None:
        if stage not in self._seen:
            return  # resumed at the very end of an epoch: not a mini-batch was left
        seen = self._seen.pop(stage)
        losses, correct, sizes = zip(*seen, strict=True)
        images = sum(sizes)
        for name, parts in (("loss", losses), ("acc", correct)):
            # a metric is the mean over the images of all processes, which may have unequal shares
            mean = cast(MeanMetric, self.means[f"{stage}_{name}"])
            mean.reset()
            mean.update(torch.stack(parts).sum() / images, images)
            self.log(f"{stage}/{name}", mean, prog_bar=(stage, name) == ("val", "acc"))
        if stage == "train":
            loss = cast(MeanMetric, self.means["train_loss"]).compute()
            if not loss.isfinite():
                raise self._diverged(seen)

    def _diverged(self, seen: Sequence[tuple[Tensor, Tensor, int]]) -> Diverged:
        """Says where in the epoch the loss was no longer finite, and what the cause may be."""
        means = [float(loss) / images for loss, _, images in seen]
        first = next((i for i, mean in enumerate(means) if not math.isfinite(mean)), None)
        where, course = "", ""
        if first is not None:  # of several processes, it may be another's
            data = getattr(self.trainer, "datamodule", None)
            size = getattr(data, "batch_size", seen[0][2])
            before = sum(images for _, _, images in seen[:first])
            start, end = before // size + 1, -(-(before + seen[first][2]) // size)
            where = f", mini-batch {start:,}" + (f" to {end:,}" if end > start else "")
            if first:
                course = (
                    f" It was {means[0]:.4g} at the epoch's start and {means[first - 1]:.4g} last."
                )
        if str(self.trainer.precision).startswith("16"):
            cause = "float16 ends at 65,504: --trainer.precision bf16-mixed may help"
        else:
            cause = f"A lower lr may help (now {self.lr})"
        return Diverged(
            f"the training diverged in epoch {self.current_epoch + 1}{where}: its loss is no longer"
            f" finite.{course} {cause}"
        )

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks that this model brings along, where the Trainer has none of their kind."""
        present = self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if any(isinstance(c, Execution) for c in present) else [Execution()]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        return self._score("train", self(images), labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._score("val", self(batch[0]), batch[1])

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class probabilities, ``(b, 10)``, for callbacks that look at single images."""
        scores = self(batch[0])
        self._score("test", scores, batch[1])
        return scores.softmax(1)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class probabilities, ``(b, 10)``."""
        return self(batch[0]).softmax(1)

    def on_train_epoch_start(self) -> None:
        self._seen.pop("train", None)  # of an epoch that was cut off

    def on_validation_epoch_start(self) -> None:
        self._seen.pop("val", None)

    def on_test_epoch_start(self) -> None:
        self._seen.pop("test", None)

    def on_train_epoch_end(self) -> None:
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        self._log_epoch("test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters(), lr=self.lr)  # type: ignore[call-arg]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # so that a checkpoint alone is enough to test it, whoever trained it
        checkpoint["model_class"] = class_path(type(self))
        seen = self._seen.get("train")
        if seen and self._trainer is not None and self.trainer.world_size == 1:
            losses, correct, sizes = zip(*seen, strict=True)
            if not torch.stack(losses).isfinite().all():
                raise self._diverged(seen)  # rather than save it over the last good one
            checkpoint["seen"] = [torch.stack(losses), torch.stack(correct), list(sizes)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A resumed training takes the learning rate of this model, not the one it was saved with.

        Lightning restores the optimizer's and the schedulers' state after this hook, and their
        learning rates with it: those that are multiples of the saved one are scaled.
        """
        count_manual_steps(checkpoint)
        if seen := checkpoint.get("seen"):  # of the epoch that it lies in
            losses, correct = (part.to(self.device).unbind() for part in seen[:2])
            self._seen["train"] = list(zip(losses, correct, seen[2], strict=True))
        if self._trainer is not None and self.trainer.precision == "64-true":
            self.double()  # Lightning would first load the weights into float32, which rounds them
        saved = checkpoint.get("hyper_parameters", {}).get("lr", self.lr)
        if saved != self.lr:
            for state in checkpoint.get("optimizer_states", []):
                for group in state["param_groups"]:
                    scale_rates(group, saved, self.lr)
            for state in checkpoint.get("lr_schedulers", []):
                scale_rates(state, saved, self.lr)
