"""Classifier: a network, a loss, metrics and an optimizer, as a LightningModule."""

import inspect
from types import FrameType
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import Tensor, nn

from mnist_lightning.checks import check_choice
from mnist_lightning.classes import class_path
from mnist_lightning.files import is_plain
from mnist_lightning.models.epoch_metrics import EpochMetrics, divergence
from mnist_lightning.spec import DataSpec
from mnist_lightning.training import resuming
from mnist_lightning.training.execution import Execution

Batch = tuple[Tensor, Tensor]
Spec = DataSpec | dict[str, Any] | None  # a dictionary has the values as ``DataSpec.plain``
OptimizerName = Literal["sgd", "adam", "adamw"]
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


class Classifier(LightningModule):
    """Base class of the classifiers: training, validation and test steps, and their metrics.

    Logs ``<stage>/loss`` and ``<stage>/acc`` once an epoch, each the mean over the epoch's images.
    Those of ``train`` are accumulated during training, before each update. In ``val`` and ``test``
    it also logs ``f1`` (macro F1), ``ece`` (expected calibration error) and, for more than ten
    classes, ``top5`` (accuracy). A subclass may log a value of its own under these three names.

    The constructor arguments of a subclass are saved as its hyper-parameters, without a call of
    ``save_hyperparameters()``. Only plain values (numbers, strings, lists and mappings of them) are
    saved, so that checkpoints load without running code.

    It works with any Trainer and loader of images and labels. It adds the callback ``Execution`` to
    the Trainer, which decides how many mini-batches the training takes at once.

    Args:
        net: maps images ``(b, channels, height, width)`` to class scores ``(b, classes)``.
        lr: learning rate.
        optimizer: ``sgd`` (plain, no momentum), ``adam`` or ``adamw``.
        spec: shape and classes of the images; by default MNIST's.

    Raises:
        ValueError: the learning rate is not positive, or the optimizer is unknown.
        Diverged: the loss is no longer finite. Raised in training, at the end of an epoch or before
            a checkpoint is saved.
    """

    steps_known = True  # see execution.altered
    fusable = False
    """True if a training step computes only the cross entropy of ``net``. ``Execution`` may then
    fuse steps, if ``execution.unfusable`` finds no obstacle."""

    def __init__(
        self, net: nn.Module, lr: float, optimizer: OptimizerName, spec: Spec = None
    ) -> None:
        super().__init__()
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        check_choice("optimizer", optimizer, OptimizerName)
        self.net, self.lr, self.optimizer = net, lr, optimizer
        self.spec = DataSpec.of(spec)
        if type(self) is not Classifier:
            frame = cast(FrameType, cast(FrameType, inspect.currentframe()).f_back)
            arguments: dict[str, Any] = {}
            for class_arguments in collect_init_args(frame, [], classes=(Classifier,)):
                arguments |= class_arguments
            not_plain = [name for name, value in arguments.items() if not is_plain(value)]
            self.save_hyperparameters(frame=frame, ignore=not_plain)
            if "spec" in arguments:
                self.hparams["spec"] = self.spec.plain()
        self.epoch_metrics = EpochMetrics(len(self.spec.classes))

    def forward(self, images: Tensor) -> Tensor:
        """``(b, channels, height, width)`` -> class scores ``(b, classes)``."""
        return self.net(images)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of the mini-batch, a scalar. Cross entropy, unless a subclass overrides it."""
        return F.cross_entropy(scores, labels)

    def score(self, stage: str, scores: Tensor, labels: Tensor) -> Tensor:
        """Computes the loss of a mini-batch, and adds the mini-batch to the epoch's metrics."""
        loss = self.loss(scores, labels)
        correct = (scores.argmax(1) == labels).sum()
        self.epoch_metrics.note(stage, loss.detach() * len(labels), correct, len(labels))
        if stage != "train":
            self.epoch_metrics.of_scores(stage).add(scores, labels)
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        return self.score("train", self(images), labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.score("val", self(batch[0]), batch[1])

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class probabilities, ``(b, classes)``, for callbacks that evaluate single images."""
        scores = self(batch[0])
        self.score("test", scores, batch[1])
        return scores.softmax(1)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class probabilities, ``(b, classes)``."""
        return self(batch[0]).softmax(1)

    def on_train_epoch_start(self) -> None:
        self.epoch_metrics.begin("train")

    def on_validation_epoch_start(self) -> None:
        self.epoch_metrics.begin("val")

    def on_test_epoch_start(self) -> None:
        self.epoch_metrics.begin("test")

    def on_train_epoch_end(self) -> None:
        noted = self.epoch_metrics.noted("train")
        self._log_epoch("train")
        if noted and not self.epoch_metrics.is_finite("train"):
            raise divergence(self, noted, self.lr)

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        self._log_epoch("test")

    def _log_epoch(self, stage: str) -> None:
        for name, metric in self.epoch_metrics.end(stage):
            self.log(name, metric, prog_bar=name == "val/acc")

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Logs as Lightning does. A ``val/f1`` of a subclass replaces that of this class."""
        if self._trainer is not None and self.epoch_metrics.replace(name, value):
            # logged twice in one hook with other arguments, it would be an error
            cast(dict[str, Any], self.trainer._results).pop(f"{self._current_fx_name}.{name}", None)
        super().log(name, value, *args, **kwargs)

    def per_class(self, stage: str) -> list[dict[str, Any]]:
        """Returns the accuracy of each class in the last ``val`` or ``test``.

        Returns:
            For each class its name ``class``, its number of ``images``, how many were ``correct``,
            and the accuracy ``acc``, which is None without images. Empty if no scores were seen.
        """
        counts = self.epoch_metrics.of_scores(stage).counts()
        return [
            {"class": name, "images": n, "correct": correct, "acc": correct / n if n else None}
            for name, (correct, n) in zip(self.spec.classes, counts, strict=False)
        ]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters(), lr=self.lr)  # type: ignore[call-arg]

    def configure_callbacks(self) -> list[Callback]:
        """Adds ``Execution`` if the Trainer does not have one."""
        present = self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if any(isinstance(c, Execution) for c in present) else [Execution()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # so that the checkpoint can be tested without any other file
        checkpoint["model_class"] = class_path(type(self))
        noted = self.epoch_metrics.noted("train")
        if noted and self._trainer is not None and self.trainer.world_size == 1:
            if not torch.stack([sums.loss for sums in noted]).isfinite().all():
                # do not overwrite the last good checkpoint
                raise divergence(self, noted, self.lr)
            checkpoint["seen"] = self.epoch_metrics.saved()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Sets this model's learning rate in the saved state, in place of the saved one.

        Lightning restores the optimizer's and the schedulers' state after this hook.
        """
        resuming.count_manual_steps(checkpoint)
        resuming.take_lr(checkpoint, self.lr)
        if saved := checkpoint.get("seen"):  # metrics of an unfinished epoch
            self.epoch_metrics.restore(saved, self.device)
        if self._trainer is not None and self.trainer.precision == "64-true":
            self.double()  # otherwise Lightning loads the weights into float32 first, with rounding
