"""Models and data of the user's own: what any LightningModule can do without being a Classifier."""

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
    """The figures of a validation that decide, each with ``min`` or ``max``."""

    best: tuple[str, str] | None
    """Of the checkpoint that is kept as the best one; without it, the last epoch is."""
    stopping: tuple[str, str] | None
    """Of early stopping; without it, all epochs are trained."""


class ValidationFails(ValueError):
    """A validation that is tried before a training fails; within the training it may not."""


def figures(model: LightningModule, data: LightningDataModule) -> list[str]:
    """The names that a model logs in a validation; tried on a copy, with one mini-batch.

    Raises:
        ValidationFails: its ``validation_step`` fails on the data, or needs what only a training
            has: an optimizer, a GPU, what ``training_step`` left behind.
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
        trainer.loggers = [DummyLogger()]  # takes pictures, as TensorBoard would, and drops them
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
    """What decides in a training whose validation logs figures of these names."""
    loss, accuracy = find("loss", names), find("acc", names)
    lowest = (loss, "min") if loss else None
    highest = (accuracy, "max") if accuracy else None
    return Watched(best=highest or lowest, stopping=lowest or highest)


def compared(model: LightningModule, data: LightningDataModule) -> list[str]:
    """The names of the loss and the accuracy that the trials of a search are compared by.

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
    """Early stopping for a model that logs figures of these names in a validation.

    Returns:
        What was wanted, or the same that watches what there is; and what watches what, in words.

    Raises:
        ValueError: it is to watch another figure of a validation than there are.
    """
    best, last = watched(names)
    kept = f"best.ckpt is by {best[0]}" if best else "best.ckpt is of the last epoch"
    if not wanted.enabled:
        return wanted, kept
    asked = wanted.monitor
    if asked not in names and asked != "val/loss":
        if asked.startswith("val"):
            raise ValueError(
                f"early stopping watches {asked}, which is not logged in a validation; there is:"
                f" {', '.join(names) or 'nothing'}"
            )
        return wanted, f"{kept}, early stopping by {asked}"  # of the training, which will show
    if asked not in names:
        monitor, mode = last or (asked, "min")
        wanted = EarlyStopping(
            last is not None, monitor, wanted.patience, abs(wanted.min_delta), mode
        )
    ended = f"early stopping by {wanted.monitor}" if wanted.enabled else "no early stopping"
    return wanted, f"{kept}, {ended}"


def find(kind: str, names: Sequence[str]) -> str | None:
    """The name of a ``loss`` or ``acc`` among those of figures: ``val/loss``, ``val_loss``, ..."""
    known = [name for name in (f"val/{kind}", f"val_{kind}") if name in names]
    return next((name for name in [*known, *names] if kind in name), None)


class TrainLoss(Callback):
    """The mean of what ``training_step`` returns in an epoch, of a model that does not log it."""

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
        """Over the mini-batches of the epoch; 0 for a model that steps by itself."""
        return float(torch.stack(self._losses).mean()) if self._losses else 0.0


def logs_as_ours(model: LightningModule) -> bool:
    """Whether a validation is that of ``Classifier``, which logs ``val/loss`` and ``val/acc``."""
    steps = ("validation_step", "on_validation_epoch_end")
    return all(getattr(type(model), name) is getattr(Classifier, name, None) for name in steps)


def describe(data: LightningDataModule) -> str:
    """One line: which data this is, after ``setup``."""
    return data.describe() if isinstance(data, MNISTDataModule) else f"data: {type(data).__name__}"


def test_images(data: LightningDataModule, trainer: Trainer, scored: int) -> int:
    """How many images the test set has, as far as that can be known."""
    if isinstance(data, MNISTDataModule):
        return len(data.test_set)
    try:
        return len(cast(Any, trainer.test_dataloaders).dataset)
    except (AttributeError, TypeError):
        return scored


def check_can(command: str, model: LightningModule) -> None:
    """Refuses a command that a model has no step for.

    Raises:
        ValueError: it cannot be scored, or does not predict.
    """
    name = type(model).__name__
    step = {"validate": "validation_step", "test": "test_step"}.get(command)
    if step and not is_overridden(step, model):
        raise ValueError(f"{command} needs a {step}, which {name} does not have: add it there")
    if command == "predict" and not is_overridden("predict_step", model):
        if type(model).forward is LightningModule.forward:
            raise ValueError(f"predict needs a forward or a predict_step, and {name} has neither")
        # Lightning's own would hand the labels to forward as well
        model.predict_step = partial(_predict, model)  # type: ignore[method-assign]


def _predict(model: LightningModule, batch: Any, *_: Any) -> Any:
    return model(batch[0] if isinstance(batch, list | tuple) else batch)


def probabilities(answers: Sequence[Any], classes: int | None, model: str) -> Tensor:
    """Class probabilities from what a model predicts: these, logits or log probabilities.

    Args:
        answers: of each mini-batch, ``(b, classes)``.
        classes: how many the data has, where that is known.
        model: its name, for the message.

    Raises:
        ValueError: they are no scores of classes.
    """
    wrong = next((a for a in answers if not isinstance(a, Tensor) or a.ndim != 2), None)
    if wrong is None:
        scores = torch.cat(list(answers)).float()
        if scores.shape[1] == (classes or scores.shape[1]):
            sums = scores.sum(1)
            ready = bool((scores >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), 1e-3)
            return scores if ready else scores.softmax(1)
        wrong = scores
    shape = f"shape {tuple(wrong.shape)}" if isinstance(wrong, Tensor) else type(wrong).__name__
    wanted = f"(images, {classes or 'classes'})"
    raise ValueError(f"predict labels images by class scores {wanted}; {model} gives {shape}")
