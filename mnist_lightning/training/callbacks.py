"""Callbacks for any LightningModule: early stopping, checkpoints within an epoch, mistakes."""

import base64
import os
import random
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from torch import Tensor

from mnist_lightning.data.sampling import in_image_order


class EarlyStopping(callbacks.EarlyStopping):
    """Ends the training when the validation loss has stopped falling.

    Lightning's own, with a default to watch and a switch to turn it off.

    Args:
        enabled: without it, the training always takes ``max_epochs``.
        monitor: the logged value to watch.
        patience: epochs without improvement before the training ends.
        min_delta: a smaller change is no improvement.
        mode: ``min`` where less is better, ``max`` where more is.
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
            # a time; Lightning 2.6 then looks for the attribute all the same
            self._check_on_train_epoch_end = False
        super().setup(trainer, pl_module, stage)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled:
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled:
            super().on_validation_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning would restore the patience too, over the one just asked for
        super().load_state_dict({**state_dict, "patience": self.patience})


class SafePoints(Callback):
    """Saves ``last.ckpt`` within an epoch too, and in every checkpoint the random generators.

    Every few minutes, and when the training is told to stop. A training that goes on from there
    takes the same mini-batches with the same random numbers as one that was never stopped, and its
    figures of that epoch count the mini-batches before, too.

    It needs a ``ModelCheckpoint(filename="last")``, whose file it writes, the data module's own
    loader, and a single process: in any other training only whole epochs are saved.

    Args:
        minutes: of training since the last checkpoint; with 0, after each execution.

    Raises:
        ValueError: a negative number of minutes.
    """

    def __init__(self, minutes: float = 5.0) -> None:
        if not minutes >= 0:
            raise ValueError(f"save_every_minutes must be 0 or more, got {minutes}")
        self.minutes = minutes
        self.training = False
        """Whether steps are being taken, so that a stop can wait for the end of one."""
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
        """Has the training end after the step at hand, or after the validation at hand.

        Lightning would end within a validation, where nothing can be saved.
        """
        self._stopping = True
        # of a SIGTERM, Lightning's own handler has noted it already
        trainer._signal_connector.received_sigterm = not trainer.validating

    @contextmanager
    def stop_on_signals(self, trainer: Trainer) -> Iterator[list[int]]:
        """Within, Ctrl-C ends a training as SIGTERM does, after a step; a second one at once.

        Yields:
            The numbers of the signals, as they come.
        """
        received: list[int] = []
        if trainer.world_size > 1 or threading.current_thread() is not threading.main_thread():
            yield received
            return

        def note(number: int, _: Any) -> None:
            received.append(number)
            if not self.training or received.count(signal.SIGINT) > 1:
                raise KeyboardInterrupt
            if number == signal.SIGINT and len(received) == 1:
                # the training may be printing just now, so not through its buffer
                at_hand = b"validation" if trainer.validating else b"step"
                os.write(2, b"\nstopping after this %b; Ctrl-C again stops at once\n" % at_hand)
            self.stop(trainer)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield received
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer._signal_connector.received_sigterm &= not self._stopping  # told in the step before

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer._signal_connector.received_sigterm |= self._stopping

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer._signal_connector.received_sigterm |= self._stopping  # came after that hook

    def after_execution(self, trainer: Trainer, stopping: bool) -> None:
        """Saves if it is time to; called within an epoch, while nothing is half done."""
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


class Mistakes(Callback):
    """Notes what a test got wrong: a confusion matrix, and the images of the surest errors.

    Args:
        most: how many images to keep.
    """

    images: int
    """How many images the test scored, in all processes."""

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
        # a model with a test_step of its own may return its loss, or nothing
        if isinstance(outputs, Tensor) and outputs.ndim == 2:
            probability, predicted = outputs.float().max(1)
            self._seen.append((probability.cpu(), predicted.cpu(), labels.cpu()))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counted = torch.tensor(self.images, device=pl_module.device)
        self.images = int(trainer.strategy.reduce(counted, reduce_op="sum"))
        if self._seen:
            columns = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
            self._rows = in_image_order(trainer, cast(Any, trainer.test_dataloaders), *columns)

    def facts(self, images: Tensor) -> dict[str, Any]:
        """What was noted, as plain JSON types.

        Args:
            images: the test images, uint8, ``(n, 28, 28)``.

        Returns:
            ``confusion[label][predicted]``, numbers of images; ``mistakes``, the surest first, each
            with its ``image``'s row and its ``pixels`` (28 x 28 bytes, zlib, base64).
        """
        if not self._rows:
            return {}
        index, probability, predicted, labels = self._rows
        confusion = torch.zeros(10, 10, dtype=torch.int64)
        confusion.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
        wrong = (predicted != labels).nonzero().flatten()
        surest = wrong[probability[wrong].argsort(descending=True, stable=True)][: self.most]
        return {
            "confusion": confusion.tolist(),
            "mistakes": [
                {
                    "image": int(index[row]),
                    "label": int(labels[row]),
                    "predicted": int(predicted[row]),
                    "probability": round(float(probability[row]), 4),
                    "pixels": base64.b64encode(
                        zlib.compress(images[index[row]].numpy().tobytes(), 9)
                    ).decode(),
                }
                for row in surest.tolist()
            ],
        }
