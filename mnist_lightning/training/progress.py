"""Progress of a training on the console: a live progress bar, and one lasting line per epoch."""

import time
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

from mnist_lightning.console import say


class ProgressBar(callbacks.TQDMProgressBar):
    """One live line: the mini-batches of the epoch, and the remaining time.

    Lightning's progress bar, drawn at most five times a second (small steps take a millisecond) and
    removed at the end. The lasting lines on the screen come from ``EpochLines``.
    """

    BAR_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left"

    def __init__(self) -> None:
        super().__init__()
        self._drawn = 0.0

    def init_train_tqdm(self) -> Any:
        return _line(super().init_train_tqdm())

    def init_validation_tqdm(self) -> Any:
        if self.trainer.state.fn == "fit":
            self.train_progress_bar.set_description(f"{self._epoch()}, validation")
            return Tqdm(disable=True)  # keep to a single live line
        return _line(super().init_validation_tqdm())

    def init_test_tqdm(self) -> Any:
        return _line(super().init_test_tqdm())

    def init_predict_tqdm(self) -> Any:
        return _line(super().init_predict_tqdm())

    def _epoch(self) -> str:
        return f"epoch {self.trainer.current_epoch + 1}{_of(self.trainer)}"

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(self._epoch())

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:  # type: ignore[override]
        now = time.monotonic()
        if now - self._drawn > 0.2 or trainer.is_last_batch:
            self._drawn = now
            super().on_train_batch_end(trainer, *args)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.train_progress_bar.set_description(self._epoch())

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        for bar in (self._train_progress_bar, self._val_progress_bar, self._test_progress_bar):
            if bar is not None:
                bar.close()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return {}  # EpochLines prints them


def _line(bar: Any) -> Any:
    bar.leave = False
    return bar


def _of(trainer: Trainer) -> str:
    return "" if trainer.max_epochs in (None, -1) else f" of {trainer.max_epochs}"


class EpochLines(Callback):
    """Prints one line per epoch: its metrics, its seconds, and a mark if it is the best so far.

    On a terminal the lines form a table; in log files and pipes each line contains the names. The
    metrics are the losses and accuracies of a ``Classifier`` and those that the model logs with
    ``prog_bar=True``; if there are none, all that it logs.

    Args:
        width: width of the terminal in characters; metrics that do not fit are left out. Without
            it, no table.
    """

    FIGURES = ("train/loss", "train/acc", "val/loss", "val/acc")

    def __init__(self, width: int | None = None) -> None:
        self.width = width
        self._columns: list[str] = []
        self._best: Tensor | None = None
        self._began = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._columns, self._best = [], _best_score(trainer)  # a resumed training has a best score
        self._began = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Prints the previous epoch: its training metrics are complete only now.
        self._print(trainer)
        self._began = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print(trainer)

    def _print(self, trainer: Trainer) -> None:
        logged: dict[str, Any] = {**trainer.progress_bar_metrics, **trainer.callback_metrics}
        shown = [name for name in self.FIGURES if name in logged]
        shown += [name for name in trainer.progress_bar_metrics if name not in (*shown, "v_num")]
        shown = shown or list(logged)
        if not trainer.is_global_zero or not shown:
            return
        best, self._best = self._best, _best_score(trainer)
        mark = "  best" if self._best is not None and self._best != best else ""
        seconds = f"{time.monotonic() - self._began:.1f}"
        epoch = trainer.current_epoch
        if self.width is None:
            figures = "  ".join(f"{name} {float(logged[name]):.4f}" for name in shown)
            of = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
            say(f"epoch {epoch:>3}{of}  {figures}  {seconds} s{mark}")
            return
        if not self._columns:
            self._columns = self._fitting(shown)
            say("".join(["\nepoch", *(f"  {name:>7}" for name in self._columns), "   secs"]))
        values = {name: f"{float(logged[name]):.4f}" for name in self._columns if name in logged}
        cells = (f"  {values.get(name, ''):>{max(7, len(name))}}" for name in self._columns)
        say(f"{epoch:>5}{''.join(cells)}  {seconds:>5}{mark}")

    def _fitting(self, names: list[str]) -> list[str]:
        """Returns the first columns, as many as fit into the width."""
        left = cast(int, self.width) - len("epoch") - len("   secs  best")
        fitting = []
        for name in names:
            left -= 2 + max(7, len(name))
            if left < 0:
                break
            fitting.append(name)
        return fitting


def _best_score(trainer: Trainer) -> Tensor | None:
    """Returns the score of the best checkpoint so far."""
    savers = (c for c in trainer.checkpoint_callbacks if getattr(c, "filename", None) == "best")
    return next((getattr(c, "best_model_score", None) for c in savers), None)
