"""Classifier: a network, a loss, metrics and an optimizer, as a LightningModule."""

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.tuner.lr_finder import _LRCallback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import Tensor, nn

from mnist_lightning.checks import check_choice
from mnist_lightning.classes import class_path
from mnist_lightning.data.photos import read_for
from mnist_lightning.data.preparation import prepare
from mnist_lightning.files import is_plain
from mnist_lightning.models.epoch_metrics import EpochMetrics, divergence
from mnist_lightning.models.optimization import (
    ClassWeights,
    OptimizerName,
    Schedule,
    draw_mixup,
    inverse_frequencies,
    make_optimizer,
    make_schedule,
)
from mnist_lightning.nets import mean_over_shifts
from mnist_lightning.spec import DataSpec
from mnist_lightning.training import resuming
from mnist_lightning.training.execution import Execution
from mnist_lightning.training.frozen_cache import FrozenCache

Batch = tuple[Tensor, Tensor]
Spec = DataSpec | dict[str, Any] | None  # a dictionary has the values as ``DataSpec.plain``

FORMER = {"fused"}  # ``Execution`` has it now
_PREDICTED_AT_ONCE = 256  # images, so that large ones fit into memory


class Predictions(NamedTuple):
    """The answers for some images."""

    classes: list[str]
    """The most probable class of each image."""
    probabilities: Tensor
    """Of each class, ``(n, classes)``, in the order of ``DataSpec.classes``."""


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
        lr: learning rate; with a schedule, its maximum.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        spec: shape and classes of the images; by default MNIST's.
        momentum: of ``sgd``, from 0 to below 1.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: of the weights; biases and normalisation layers have none. By default that of
            PyTorch's optimizer: 0, and for ``adamw`` 0.01 on all parameters.
        schedule: how the learning rate changes at each step. ``constant``; ``cosine``, which falls
            to zero; ``step``, a tenth after half of the steps and a hundredth after three quarters;
            ``one_cycle``, which rises over the first quarter of the steps and falls to zero over
            the rest.
        warmup_epochs: epochs over which the learning rate first rises from zero.
        label_smoothing: share of the target that is spread over all classes, from 0 to below 1.
        mixup: if positive, each training image is mixed with another one of its mini-batch, with
            shares drawn from Beta(mixup, mixup), and so is the loss (Zhang et al. 2018, "mixup:
            Beyond empirical risk minimization", arXiv:1710.09412). The training accuracy counts
            against the labels of the images with the first share.
        class_weights: weights of the classes in the training loss. ``auto``: inverse to the number
            of training images, with mean 1.
        tta: test-time augmentation. If positive, validation, test and predictions answer with the
            mean of the probabilities over nine images: the image itself, and shifted by so many
            pixels up, down, to the sides and to the corners. An evaluation takes nine times as
            long; the training stays the same.
        **former: options of earlier versions, which their checkpoints contain. They have no effect.

    ``label_smoothing``, ``mixup`` and ``class_weights`` change the loss of training alone, not that
    of validation and test.

    Raises:
        ValueError: an argument is out of its range, or does not fit the others.
        Diverged: the loss is no longer finite. Raised in training, at the end of an epoch or before
            a checkpoint is saved.
    """

    steps_known = True  # see execution.altered
    fusable = False
    """True if a training step computes only the cross entropy of ``net``. ``Execution`` may then
    fuse steps, if ``execution.unfusable`` finds no obstacle."""

    def __init__(
        self,
        net: nn.Module,
        lr: float,
        optimizer: OptimizerName,
        spec: Spec = None,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float | None = None,
        schedule: Schedule = "constant",
        warmup_epochs: float = 0.0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        class_weights: ClassWeights = "none",
        tta: int = 0,
        **former: Any,
    ) -> None:
        super().__init__()
        if unknown := former.keys() - FORMER:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(unknown))}")
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        check_choice("optimizer", optimizer, OptimizerName)
        check_choice("schedule", schedule, Schedule)
        check_choice("class_weights", class_weights, ClassWeights)
        for name, value in (("momentum", momentum), ("label_smoothing", label_smoothing)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {value}")
        for name, value in (
            ("weight_decay", weight_decay or 0.0),
            ("warmup_epochs", warmup_epochs),
            ("mixup", mixup),
        ):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if momentum and optimizer != "sgd":
            raise ValueError(
                f"momentum {momentum} is for optimizer sgd; {optimizer} has its own. Leave momentum"
                " out, or set optimizer to sgd"
            )
        if nesterov and not momentum:
            raise ValueError("nesterov needs a momentum: set one, like 0.9")
        if warmup_epochs and schedule == "one_cycle":
            raise ValueError(
                f"schedule one_cycle rises by itself: leave warmup_epochs out, got {warmup_epochs}"
            )
        self.net, self.lr, self.optimizer = net, lr, optimizer
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.schedule, self.warmup_epochs = schedule, warmup_epochs
        self.label_smoothing, self.mixup = label_smoothing, mixup
        self.class_weights = class_weights
        changed = [name for name in ("loss", "training_step") if self._has_own(name)]
        if changed and self.loss_options:
            raise ValueError(
                f"{self.loss_options[0]} changes the cross entropy of a training step;"
                f" {type(self).__name__} has a {changed[0]} of its own: leave it out"
            )
        self._weights_for: tuple[Tensor, Tensor] | None = None
        self.spec = DataSpec.of(spec)
        self.tta = tta
        self._check_tta()
        if type(self) is not Classifier:
            frame = cast(FrameType, cast(FrameType, inspect.currentframe()).f_back)
            collected = collect_init_args(frame, [], classes=(Classifier,))
            arguments: dict[str, Any] = {}
            for class_arguments in collected:
                arguments |= class_arguments
            ignored = [name for name, value in arguments.items() if not is_plain(value)]
            constructor = inspect.signature(type(self).__init__)
            if any(p.kind is p.VAR_KEYWORD for p in constructor.parameters.values()):
                # It passes on what it is given. If a checkpoint gave it an argument that it sets
                # itself, its base would get two values.
                ignored += [name for name in arguments if name not in collected[-1]]
            self.save_hyperparameters(frame=frame, ignore=[*ignored, *FORMER])
            if "spec" in constructor.parameters:
                self.hparams["spec"] = self.spec.plain()
        self.epoch_metrics = EpochMetrics(len(self.spec.classes))

    def _check_tta(self) -> None:
        side = min(self.spec.height, self.spec.width)
        if type(self.tta) is not int or not 0 <= self.tta < side:
            raise ValueError(
                f"tta must be a whole number of pixels, from 0 to {side - 1}, got {self.tta}"
            )
        steps = ("loss", "validation_step", "test_step", "predict_step")
        changed = [name for name in steps if self._has_own(name)]
        if self.tta and changed:
            raise ValueError(
                f"tta averages the probabilities of shifted images; {type(self).__name__} has a"
                f" {changed[0]} of its own, which may not be of probabilities: leave tta out"
            )

    def forward(self, images: Tensor) -> Tensor:
        """``(b, channels, height, width)`` -> class scores ``(b, classes)``."""
        return self.net(images)

    def eval_scores(self, images: Tensor) -> Tensor:
        """Class scores of an evaluation: those of ``forward``, or with ``tta`` of shifted images.

        Args:
            images: as for ``forward``.
        """
        if not self.tta:
            return self(images)
        black = images.new_tensor(self.spec.black)[:, None, None]
        return mean_over_shifts(self, images, self.tta, black)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of the mini-batch, a scalar. Cross entropy, unless a subclass overrides it."""
        return F.cross_entropy(scores, labels)

    @property
    def loss_options(self) -> list[str]:
        """The names of the options that change the loss of training."""
        values = {
            "label_smoothing": self.label_smoothing != 0,
            "mixup": self.mixup != 0,
            "class_weights": self.class_weights != "none",
        }
        return [name for name, chosen in values.items() if chosen]

    def score(
        self, stage: str, scores: Tensor, labels: Tensor, loss: Tensor | None = None
    ) -> Tensor:
        """Computes the loss of a mini-batch, and adds the mini-batch to the epoch's metrics.

        Args:
            stage: ``train``, ``val`` or ``test``.
            scores: of the classes, ``(b, classes)``.
            labels: ``(b,)``.
            loss: of the mini-batch, if it is not ``self.loss(scores, labels)``.
        """
        if loss is None:
            loss = self.loss(scores, labels)
        correct = (scores.argmax(1) == labels).sum()
        self.epoch_metrics.note(stage, loss.detach() * len(labels), correct, len(labels))
        if stage != "train":
            self.epoch_metrics.of_scores(stage).add(scores, labels)
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        if not self.loss_options:
            return self.score("train", self(images), labels)
        if not self.mixup:
            scores = self(images)
            return self.score("train", scores, labels, self._training_loss(scores, labels))
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        place = (seed, self.current_epoch, batch_idx, self.global_rank)
        share, partners = draw_mixup(self.mixup, len(labels), *place)
        partners = partners.to(labels.device)
        scores = self(share * images + (1 - share) * images[partners])
        loss = share * self._training_loss(scores, labels)
        loss = loss + (1 - share) * self._training_loss(scores, labels[partners])
        return self.score("train", scores, labels, loss)

    def _training_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy with label smoothing and the weights of the classes."""
        weights = None
        if self.class_weights == "auto":
            weights = self._class_weights(scores.shape[1]).to(scores)
        return F.cross_entropy(scores, labels, weights, label_smoothing=self.label_smoothing)

    def _class_weights(self, classes: int) -> Tensor:
        train_set = getattr(getattr(self.trainer, "datamodule", None), "train_set", None)
        labels = getattr(train_set, "labels", None)
        if not isinstance(labels, Tensor):
            raise ValueError(
                "class_weights auto counts the labels of the training set, datamodule.train_set"
                ".labels, which these data do not have: leave class_weights out"
            )
        if self._weights_for is None or self._weights_for[0] is not labels:
            weights = inverse_frequencies(labels, classes).to(self.device)
            self._weights_for = labels, weights
        return self._weights_for[1]

    def _has_own(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(Classifier, method)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.score("val", self.eval_scores(batch[0]), batch[1])

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class probabilities, ``(b, classes)``, for callbacks that evaluate single images."""
        scores = self.eval_scores(batch[0])
        self.score("test", scores, batch[1])
        return scores.softmax(1)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class probabilities, ``(b, classes)``."""
        return self.eval_scores(batch[0]).softmax(1)

    @torch.inference_mode()
    def predict(self, images: Tensor | Sequence[str | os.PathLike[str]]) -> "Predictions":
        """Classifies images in memory or in files, without a Trainer.

        Args:
            images: uint8, ``(n, channels, height, width)`` or, if gray, ``(n, height, width)``, of
                any size; or paths of image files, which are prepared as the training images were.

        Raises:
            ValueError: a file is not an image, the images are of another type, or have another
                number of channels.
        """
        if not isinstance(images, Tensor):
            if not images:
                raise ValueError("predict needs at least one image")
            images = torch.stack([read_for(self.spec, Path(path)) for path in images])
        channels = images.shape[1] if images.ndim == 4 else 1
        of_kind = images.dtype == torch.uint8 and images.ndim in (3, 4)
        if not of_kind or channels != self.spec.channels:
            raise ValueError(
                f"predict needs images of type uint8 and shape (n, {self.spec.channels}, height,"
                f" width), got {images.dtype} and {tuple(images.shape)}"
            )
        was_training = self.training
        self.eval()
        parts = [
            self.eval_scores(prepare(part.to(self.device), self.spec)).float().softmax(1).cpu()
            for part in images.split(_PREDICTED_AT_ONCE)
        ]
        self.train(was_training)
        probabilities = torch.cat(parts)
        names = [self.spec.classes[label] for label in probabilities.argmax(1).tolist()]
        return Predictions(names, probabilities)

    def on_train_epoch_start(self) -> None:
        self.epoch_metrics.begin("train")

    def on_validation_epoch_start(self) -> None:
        self.epoch_metrics.begin("val")

    def on_test_epoch_start(self) -> None:
        self.epoch_metrics.begin("test")

    def on_train_epoch_end(self) -> None:
        noted = self.epoch_metrics.noted("train")
        self._log_epoch("train")
        if noted and not self.epoch_metrics.is_finite("train") and not self._rates_are_tried():
            raise divergence(self, noted, self.lr)

    def _rates_are_tried(self) -> bool:
        """Whether Lightning's learning rate finder trains, which goes on until the loss grows."""
        present = self.trainer.callbacks  # type: ignore[attr-defined]
        return any(isinstance(callback, _LRCallback) for callback in present)

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

    def configure_optimizers(self) -> Any:
        return self._optimization()

    def _optimization(self, **more: Any) -> Any:
        """The optimizer, and the schedule if there is one; ``more`` is for PyTorch's optimizer."""
        momentum = self.momentum, self.nesterov
        optimizer = make_optimizer(
            self, self.optimizer, self.lr, *momentum, self.weight_decay, **more
        )
        return make_schedule(self, optimizer, self.schedule, self.warmup_epochs)

    def on_fit_start(self) -> None:
        """Warns if the training computes in bf16 on a processor that has no instructions for it."""
        bf16 = "bf16" in str(self.trainer.precision)
        if bf16 and self.device.type == "cpu" and _emulates_bf16():
            rank_zero_warn(
                "this processor computes bf16 slowly; --trainer.precision 32-true is faster here"
            )

    def configure_callbacks(self) -> list[Callback]:
        """Adds ``Execution`` and ``FrozenCache`` if the Trainer does not have them."""
        present = self.trainer.callbacks  # type: ignore[attr-defined]
        kinds = (Execution, FrozenCache)
        return [kind() for kind in kinds if not any(isinstance(c, kind) for c in present)]

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
        """Sets this model's learning rate and options in the saved state, in place of the old ones.

        Lightning restores the optimizer's and the schedulers' state after this hook.
        """
        resuming.count_manual_steps(checkpoint)
        resuming.take_lr(checkpoint, self.lr)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            old = self._old_options(checkpoint.get("hyper_parameters", {}))
            resuming.take_options(checkpoint, old, {name: getattr(self, name) for name in old})
        if saved := checkpoint.get("seen"):  # metrics of an unfinished epoch
            self.epoch_metrics.restore(saved, self.device)
        if self._trainer is not None and self.trainer.precision == "64-true":
            self.double()  # otherwise Lightning loads the weights into float32 first, with rounding

    def _old_options(self, hyper_parameters: dict[str, Any]) -> dict[str, Any]:
        """The options of the optimizer that the training had so far, if the class offers them."""
        defaults = inspect.signature(Classifier.__init__).parameters
        return {
            name: hyper_parameters.get(name, defaults[name].default)
            for name in ("momentum", "nesterov", "weight_decay", "schedule", "warmup_epochs")
            if name in hyper_parameters or name in self.hparams
        }


def _emulates_bf16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # older PyTorch
        return False
    capabilities = torch.cpu.get_capabilities()
    return not any(capabilities.get(name) for name in ("avx512_bf16", "bf16"))  # x86, ARM
