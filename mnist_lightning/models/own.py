"""Support for the user's models and data: LightningModules that are not Classifiers."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from mnist_lightning.data.module import MNISTDataModule
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.training.callbacks import EarlyStopping


class Watched(NamedTuple):
    """The monitored validation metrics, each with its mode, ``min`` or ``max``."""

    best: tuple[str, str] | None
    """Selects the best checkpoint; without it, the last epoch is the best."""
    stopping: tuple[str, str] | None
    """Controls early stopping; without it, all epochs are trained."""


class ValidationFails(ValueError):
    """The trial validation before a training failed; a validation within it may still succeed."""


def figures(model: LightningModule, data: LightningDataModule) -> list[str]:
    """Lists the metrics that a model's validation logs: runs it on a copy, with one mini-batch.

    Raises:
        ValidationFails: its ``validation_step`` fails on the data, or needs something that exists
            only in a training: an optimizer, a GPU, attributes that ``training_step`` sets.
    """
    if not is_overridden("validation_step", model):
        return []
    with isolate_rng():
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            limit_val_batches=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.loggers = [DummyLogger()]  # accepts images like TensorBoard, and discards them
        try:
            trainer.validate(copy.deepcopy(model), datamodule=data, verbose=False)
        except ValueError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValidationFails(
                f"{type(model).__name__} fails in a validation of {type(data).__name__}:"
                f" {type(error).__name__}: {reason}"
            ) from error
    return list(trainer.callback_metrics)


def watched(names: Sequence[str]) -> Watched:
    """Chooses the monitored metrics from the names that a validation logs."""
    loss, accuracy = find("loss", names), find("acc", names)
    lowest = (loss, "min") if loss else None
    highest = (accuracy, "max") if accuracy else None
    return Watched(best=highest or lowest, stopping=lowest or highest)


def compared(model: LightningModule, data: LightningDataModule) -> list[str]:
    """Finds the names of the loss and the accuracy by which a search compares its trials.

    Raises:
        ValueError: the model does not log both in a validation.
    """
    names = figures(model, data)
    loss, accuracy = find("loss", names), find("acc", names)
    if loss is None or accuracy is None:
        raise ValueError(
            "a search compares val_loss and val_acc, which the model must log in its validation;"
            f" {type(model).__name__} logs {', '.join(names) or 'nothing'} there"
        )
    return [loss, accuracy]


def stopping(wanted: EarlyStopping, names: Sequence[str]) -> tuple[EarlyStopping, str]:
    """Adapts early stopping to the metrics that a model logs in a validation.

    Returns:
        The callback, which may monitor another metric than ``wanted``; and one line that says
        which metrics select the best checkpoint and end the training.

    Raises:
        ValueError: the monitored validation metric is not logged.
    """
    best, stop = watched(names)
    checkpoint_text = f"best.ckpt is by {best[0]}" if best else "best.ckpt is of the last epoch"
    if not wanted.enabled:
        return wanted, checkpoint_text
    monitor = wanted.monitor
    if monitor not in names and monitor != "val/loss":
        if monitor.startswith("val"):
            raise ValueError(
                f"early stopping monitors {monitor}, which the validation does not log; it logs:"
                f" {', '.join(names) or 'nothing'}"
            )
        # a training metric: Lightning checks it in the training
        return wanted, f"{checkpoint_text}, early stopping by {monitor}"
    if monitor not in names:
        monitor, mode = stop or (monitor, "min")
        wanted = EarlyStopping(
            stop is not None, monitor, wanted.patience, abs(wanted.min_delta), mode
        )
    stopping_text = f"early stopping by {wanted.monitor}" if wanted.enabled else "no early stopping"
    return wanted, f"{checkpoint_text}, {stopping_text}"


def find(kind: str, names: Sequence[str]) -> str | None:
    """Finds the name of the ``loss`` or ``acc`` among metrics: ``val/loss``, ``val_loss``, ..."""
    known = [name for name in (f"val/{kind}", f"val_{kind}") if name in names]
    return next((name for name in [*known, *names] if kind in name), None)


class TrainLoss(Callback):
    """Averages the loss that ``training_step`` returns, for a model that does not log it."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses = []

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())

    def mean(self) -> float:
        """Mean over the mini-batches of the epoch; 0 if ``training_step`` returned no loss."""
        return float(torch.stack(self._losses).mean()) if self._losses else 0.0


def logs_as_ours(model: LightningModule) -> bool:
    """Returns True if the validation is ``Classifier``'s, which logs ``val/loss``, ``val/acc``."""
    steps = ("validation_step", "on_validation_epoch_end")
    return all(getattr(type(model), name) is getattr(Classifier, name, None) for name in steps)


def scores(model: LightningModule, images: Tensor) -> Any:
    """What a model answers to images in an evaluation, as far as it is a ``Classifier``.

    Args:
        model: of any class.
        images: as its ``forward`` takes them.
    """
    return model.eval_scores(images) if isinstance(model, Classifier) else model(images)


def describe(data: LightningDataModule) -> str:
    """Describes the data in one line; call it after ``setup``."""
    return data.describe() if isinstance(data, MNISTDataModule) else f"data: {type(data).__name__}"


def test_images(data: LightningDataModule, trainer: Trainer, scored: int) -> int:
    """Counts the images of the test set; ``scored`` if the data does not tell."""
    if isinstance(data, MNISTDataModule):
        return len(data.test_set)
    try:
        return len(cast(Any, trainer.test_dataloaders).dataset)
    except (AttributeError, TypeError):
        return scored


def check_can(command: str, model: LightningModule) -> None:
    """Checks that a model has the step that a command needs.

    Raises:
        ValueError: the step is missing; the message names it.
    """
    name = type(model).__name__
    step = {"validate": "validation_step", "test": "test_step"}.get(command)
    if step and not is_overridden(step, model):
        raise ValueError(f"{command} needs a {step}, which {name} does not have: add it there")
    has_forward = type(model).forward is not LightningModule.forward
    if command == "export" and not has_forward:
        raise ValueError(f"export needs a forward, which {name} does not have: add it there")
    if command == "predict" and not is_overridden("predict_step", model):
        if not has_forward:
            raise ValueError(
                f"predict needs a forward or a predict_step, and {name} has neither: add one"
            )
        # Lightning's predict_step would pass the labels to forward as well
        model.predict_step = partial(_predict, model)  # type: ignore[method-assign]


def _predict(model: LightningModule, batch: Any, *_: Any) -> Any:
    return model(batch[0] if isinstance(batch, list | tuple) else batch)


def probabilities(answers: Sequence[Any], classes: int | None, model: str) -> Tensor:
    """Converts predictions to class probabilities.

    Args:
        answers: predictions of each mini-batch, ``(b, classes)``: probabilities, logits or log
            probabilities.
        classes: number of classes of the data, if known.
        model: name of the model, for the message.

    Raises:
        ValueError: the predictions are not class scores.
    """
    wrong = next((a for a in answers if not isinstance(a, Tensor) or a.ndim != 2), None)
    if wrong is None:
        scores = torch.cat(list(answers)).float()
        if scores.shape[1] == (classes or scores.shape[1]):
            return scores if are_probabilities(scores) else scores.softmax(1)
        wrong = scores
    shape = f"shape {tuple(wrong.shape)}" if isinstance(wrong, Tensor) else type(wrong).__name__
    wanted = f"(images, {classes or 'classes'})"
    raise ValueError(f"predict needs class scores of shape {wanted}; {model} returns {shape}")


def are_probabilities(scores: Tensor) -> bool:
    """Whether the scores of each image, ``(n, classes)``, are not negative and sum to 1."""
    sums = scores.sum(1)
    return bool((scores >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), 1e-3)
