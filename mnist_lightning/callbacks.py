"""Callbacks for any LightningModule: early stopping, and what the console shows."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, callbacks


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

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled:
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled:
            super().on_validation_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning would restore the patience too, over the one just asked for
        super().load_state_dict({**state_dict, "patience": self.patience})


class ProgressBar(callbacks.TQDMProgressBar):
    """Lightning's bar, drawn at most five times a second: small steps take a millisecond."""

    def __init__(self) -> None:
        super().__init__()
        self._drawn = 0.0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:  # type: ignore[override]
        now = time.monotonic()
        if now - self._drawn > 0.2 or trainer.is_last_batch:
            self._drawn = now
            super().on_train_batch_end(trainer, *args)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics  # type: ignore[return-value]


class EpochLines(Callback):
    """One line an epoch, for where no terminal shows a bar: log files, pipes, batch queues."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the training's own figures are complete only once the epoch before has ended
        self._print(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print(trainer)

    def _print(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or "train/loss" not in trainer.callback_metrics:
            return
        figures = "  ".join(
            f"{name} {trainer.callback_metrics[name]:.4f}"
            for name in ("train/loss", "train/acc", "val/loss", "val/acc")
            if name in trainer.callback_metrics
        )
        print(f"epoch {trainer.current_epoch:>3}/{trainer.max_epochs}  {figures}", flush=True)
