"""Callbacks for any LightningModule: early stopping, checkpoints within an epoch, test mistakes."""

import base64
import os
import random
import signal
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from mnist_lightning.data.sampling import ImageSet, in_image_order


class EarlyStopping(callbacks.EarlyStopping):
    """Ends the training when the validation loss has stopped falling.

    Lightning's callback, with a default metric and a switch to turn it off.

    Args:
        enabled: if False, the training always takes ``max_epochs``.
        monitor: the logged metric to monitor.
        patience: epochs without improvement before the training ends.
        min_delta: a smaller change does not count as an improvement.
        mode: ``min`` if lower is better, ``max`` if higher is better.

    Raises:
        ValueError: ``patience`` is below 1.
    """

    def __init__(
        self,
        enabled: bool = True,
        monitor: str = "val/loss",
        patience: int = 10,
        min_delta: float = 0.0,
        mode: str = "min",
    ) -> None:
        if patience < 1:
            raise ValueError(
                f"patience must be at least 1 epoch, got {patience}."
                " To train without early stopping: --early_stopping.enabled false"
            )
        super().__init__(monitor, min_delta=min_delta, patience=patience, mode=mode)
        self.enabled = enabled

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(trainer, "val_check_interval"):
            # The interval is a time. Lightning 2.6 would read the missing attribute and fail.
            self._check_on_train_epoch_end = False
        super().setup(trainer, pl_module, stage)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled:
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled:
            super().on_validation_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # keep the patience of this training; Lightning would restore the saved one
        super().load_state_dict({**state_dict, "patience": self.patience})


class SafePoints(Callback):
    """Saves ``last.ckpt`` within epochs, and the random generators in every checkpoint.

    It saves every few minutes and when the training is asked to stop. A training that resumes from
    there takes the same mini-batches with the same random numbers as an uninterrupted one. The
    metrics of that epoch include the mini-batches before the checkpoint.

    It needs a ``ModelCheckpoint(filename="last")``, whose file it writes, the loader of
    ``MNISTDataModule``, and a single process. In other trainings only whole epochs are saved.

    Args:
        minutes: training time between checkpoints; with 0, it saves after each execution.

    Raises:
        ValueError: ``minutes`` is negative.
    """

    def __init__(self, minutes: float = 5.0) -> None:
        if not minutes >= 0:
            raise ValueError(f"save_every_minutes must be 0 or more, got {minutes}")
        self.minutes = minutes
        self.training = False
        """True during the training: a stop can then wait for the end of a step."""
        self._stopping = False
        self._saved = 0.0
        self._generators: dict[str, Any] | None = None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._generators = checkpoint.get("generators")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
        checkpoint["generators"] = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": (name, cast(Any, keys).tolist(), *rest),
            "python": random.getstate(),
        }
        self._saved = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved, self.training, self._stopping = time.monotonic(), True, False
        if (states := self._generators) is not None:
            self._generators = None
            torch.set_rng_state(states["torch"])
            if len(states["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(states["cuda"])
            np.random.set_state(states["numpy"])  # noqa: NPY002
            random.setstate(states["python"])

    def stop(self, trainer: Trainer) -> None:
        """Ends the training after the current step, or after the current validation.

        Lightning would end within a validation, where no checkpoint can be saved.
        """
        self._stopping = True
        # for a SIGTERM, Lightning's handler may have set it already
        trainer._signal_connector.received_sigterm = not trainer.validating

    @contextmanager
    def stop_on_signals(self, trainer: Trainer) -> Iterator[list[int]]:
        """Makes Ctrl-C and SIGTERM end the training after a step; a second Ctrl-C ends it at once.

        Yields:
            A list that receives the numbers of the signals.
        """
        received: list[int] = []
        if trainer.world_size > 1 or threading.current_thread() is not threading.main_thread():
            yield received
            return

        def handle(number: int, _: Any) -> None:
            received.append(number)
            if not self.training or received.count(signal.SIGINT) > 1:
                raise KeyboardInterrupt
            if number == signal.SIGINT and len(received) == 1:
                # not through the buffer of stderr, which the training may be writing to
                current = b"validation" if trainer.validating else b"step"
                os.write(2, b"\nstopping after this %b; Ctrl-C again stops at once\n" % current)
            self.stop(trainer)

        handlers = {
            number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield received
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # if the signal came in the step before, stop only after the validation
        trainer._signal_connector.received_sigterm &= not self._stopping

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer._signal_connector.received_sigterm |= self._stopping

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # for a signal that came after on_validation_end
        trainer._signal_connector.received_sigterm |= self._stopping

    def after_execution(self, trainer: Trainer, stopping: bool) -> None:
        """Saves if the time has come or the training stops; called between two executions."""
        if stopping or time.monotonic() - self._saved >= 60 * self.minutes:
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, callbacks.ModelCheckpoint) and callback.filename == "last":
                    trainer.save_checkpoint(Path(callback.dirpath or "", "last.ckpt"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.training = False

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.training = False


_MOST_CLASSES = 100  # of a confusion matrix that is recorded


class Mistakes(Callback):
    """Collects a test's confusion matrix and the wrong predictions with the highest probability.

    Args:
        most: number of images to keep.
    """

    images: int
    """Number of images that the test scored, in all processes."""

    def __init__(self, most: int = 60) -> None:
        self.most = most

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.images = 0
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._rows: tuple[Tensor, ...] = ()

    def on_test_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        labels = batch[1]
        self.images += len(labels)
        # a user's test_step may return its loss, or nothing
        if isinstance(outputs, Tensor) and outputs.ndim == 2:
            probability, predicted = outputs.float().max(1)
            self._seen.append((probability.cpu(), predicted.cpu(), labels.cpu()))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        images = torch.tensor(self.images, device=pl_module.device)
        self.images = int(trainer.strategy.reduce(images, reduce_op="sum"))
        if self._seen:
            columns = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
            self._rows = in_image_order(trainer, cast(Any, trainer.test_dataloaders), *columns)

    def facts(self, data: ImageSet, classes: Sequence[str]) -> dict[str, Any]:
        """Returns the confusion matrix and the mistakes as plain JSON types.

        Args:
            data: the test images.
            classes: the names of the classes.

        Returns:
            ``confusion[label][predicted]``, numbers of images, and the names of the ``classes``;
            ``mistakes``, the highest probability first, each with its index ``image``, its
            ``pixels`` (bytes, zlib, base64) and their ``shape``. Empty if no class probabilities
            were collected; without ``confusion`` if there are more than 100 classes.
        """
        if not self._rows:
            return {}
        index, probability, predicted, labels = self._rows
        confusion = multiclass_confusion_matrix(predicted, labels, num_classes=len(classes))
        wrong = (predicted != labels).nonzero().flatten()
        surest = wrong[probability[wrong].argsort(descending=True, stable=True)][: self.most]
        mistakes = []
        for row in surest.tolist():
            pixels = data[int(index[row])][0].numpy()
            mistakes.append(
                {
                    "image": int(index[row]),
                    "label": int(labels[row]),
                    "predicted": int(predicted[row]),
                    "probability": round(float(probability[row]), 4),
                    "pixels": base64.b64encode(zlib.compress(pixels.tobytes(), 9)).decode(),
                    "shape": list(pixels.shape),
                }
            )
        facts = {"classes": list(classes), "mistakes": mistakes}
        return facts if len(classes) > _MOST_CLASSES else {"confusion": confusion.tolist(), **facts}
