"""The logs of a run: TensorBoard's curves and HParams, metrics.csv, provenance.json."""

import csv
import io
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from mnist_lightning.console import say
from mnist_lightning.files import read_json, write_json, write_text
from mnist_lightning.provenance import provenance

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


# The same columns for every architecture: TensorBoard uses the columns of the first run that it
# finds, and drops further columns of others.
METRICS = ("best/val_acc", "best/val_loss", "test/acc", "test/loss", "run/epochs", "run/seconds")
CURVES = {
    "learning curves": {
        "loss": ["Multiline", ["train/loss", "val/loss"]],
        "accuracy": ["Multiline", ["train/acc", "val/acc"]],
    }
}


class RunLogger(TensorBoardLogger):
    """Logs a run into its folder: TensorBoard events and ``metrics.csv`` with a row per epoch.

    The horizontal axis counts finished epochs, so that runs with different batch sizes can be
    compared. Values logged within an epoch (``self.log(..., on_step=True)``, LearningRateMonitor,
    DeviceStatsMonitor) are plotted over the optimizer's steps: TensorBoard shows them as
    ``by_step/<name>`` in the run ``<folder>/by_step``, and ``metrics.csv`` has the last value of
    each epoch. A resumed run continues in the same files.

    Args:
        folder: the run's folder, created at the first write.
        first_epoch: for a resumed run, the first epoch that will be logged (again).
    """

    def __init__(self, folder: str | os.PathLike[str], first_epoch: int | None = None) -> None:
        folder = Path(folder)
        super().__init__(
            save_dir=folder.parent,
            name="",
            version=folder.name,
            default_hp_metric=False,
            # TensorBoard drops what a killed run logged after its last checkpoint
            purge_step=first_epoch,
        )
        self.table = folder / "metrics.csv"
        self._trainer: Trainer | None = None
        self._by_step: SummaryWriter | None = None
        self._rows: dict[int, dict[str, Any]] = {}
        self._columns: list[str] = []  # after the epoch
        self._lines: dict[int, str] = {}  # the rows as CSV text, formatted once
        if first_epoch is not None and self.table.is_file():
            with self.table.open(newline="") as file:
                for row in csv.DictReader(file):
                    epoch = int(row.pop("epoch"))
                    if epoch < first_epoch:
                        self._note(epoch, row)

    def log_graph(self, model: LightningModule, input_array: Tensor | None = None) -> None:  # type: ignore[override]
        # Lightning calls it before the first metric; no other call gives a logger its trainer.
        self._trainer = model.trainer
        super().log_graph(model, input_array)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        """Logs metrics of an epoch, or of a step within it.

        Args:
            metrics: at the end of an epoch, with the ``epoch`` that Lightning adds, from 0.
            step: the number of optimizer steps before this one.
        """
        metrics, trainer = dict(metrics), self._trainer
        by_step = "epoch" not in metrics
        epoch = int(metrics.pop("epoch", -1)) + 1
        if trainer is not None:
            # after a training, current_epoch is the number of its epochs
            epoch = trainer.current_epoch + (trainer.state.fn == TrainerFn.FITTING)
            if trainer.training:
                # at the end of an epoch, while its metrics are logged, processed > completed
                epochs: Any = trainer.fit_loop.epoch_progress.current
                by_step |= epochs.processed == epochs.completed
            else:  # here Lightning's step counts evaluated mini-batches
                step = max(0, trainer.global_step - 1)
        if by_step:
            writer = self._step_writer(step or 0)
            for name, value in metrics.items():
                writer.add_scalar(f"by_step/{name}", value, step)
        else:
            super().log_metrics(metrics, epoch)
        self._note(epoch, metrics)

    @rank_zero_only
    def complete(self, epoch: int, metrics: dict[str, float]) -> None:
        """Logs those metrics of a finished epoch that were not logged because of a kill."""
        row = self._rows.get(epoch, {})
        missing = {name: value for name, value in metrics.items() if row.get(name, "") == ""}
        if missing:
            super().log_metrics(missing, epoch)
            self._note(epoch, missing)
            self.save()

    def _note(self, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Puts metrics into the epoch's row of the table."""
        self._rows.setdefault(epoch, {}).update(metrics)
        self._lines.pop(epoch, None)
        if new := [name for name in metrics if name not in self._columns]:
            self._columns += new
            self._lines.clear()  # every row gets a new cell

    def _step_writer(self, step: int) -> "SummaryWriter":
        """A separate writer: purging the steps of a killed run must not purge its epochs."""
        if self._by_step is None:
            from torch.utils.tensorboard import SummaryWriter

            self._by_step = SummaryWriter(str(self.table.with_name("by_step")), purge_step=step)
        return self._by_step

    @rank_zero_only
    def save(self) -> None:
        super().save()
        if self._by_step is not None:
            self._by_step.flush()
        if not self._rows:
            return
        for epoch in self._rows.keys() - self._lines.keys():
            row = self._rows[epoch]
            self._lines[epoch] = _csv_line([epoch, *(row.get(name) for name in self._columns)])
        lines = [self._lines[epoch] for epoch in sorted(self._lines)]
        write_text(self.table, "".join([_csv_line(["epoch", *self._columns]), *lines]))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._by_step is not None:
            self._by_step.close()
            self._by_step = None  # reopened, it would purge from the step of its first opening


class Dashboard(Callback):
    """Writes TensorBoard's HParams and Custom Scalars tabs, and ``provenance.json``.

    It needs a ``RunLogger``; without one it does nothing.
    """

    def __init__(self) -> None:
        self._best: dict[str, float] = {}
        self._seconds = 0.0
        self._began: float | None = None
        self._logged: tuple[int, dict[str, float]] | None = None

    def state_dict(self) -> dict[str, Any]:
        if self._began is not None:
            self._seconds = time.monotonic() - self._began
        return {"best": self._best, "seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best, self._seconds = dict(state_dict["best"]), state_dict["seconds"]

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        epochs: Any = trainer.fit_loop.epoch_progress.current
        if epochs.processed > epochs.completed:
            # the end of an epoch: Lightning logs its metrics only after the checkpoint
            logged = trainer.fit_loop.epoch_loop._results.metrics(on_step=False)["log"]
            metrics = {name: float(value) for name, value in logged.items()}
            checkpoint["figures"] = (epochs.processed, metrics)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._logged = checkpoint.get("figures")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not at on_fit_start: a resumed training does not know its epoch yet
        self._began = time.monotonic() - self._seconds
        if (logger := _run_logger(trainer)) is None:
            return
        if self._logged is not None:
            logger.complete(*self._logged)
            self._logged = None
        from torch.utils.tensorboard.summary import hparams

        row = hparams_row(trainer, pl_module)
        writer = logger.experiment
        writer.add_custom_scalars(CURVES)
        for summary in hparams(row, dict.fromkeys(METRICS, 0.0)):
            writer.file_writer.add_summary(summary)
        data = getattr(trainer, "datamodule", None)
        sessions = logger.table.with_name("provenance.json")
        remedy = "restore it, or remove it and lose the record of earlier sessions"
        earlier = read_json(sessions, remedy, list) if sessions.is_file() else []
        facts = provenance(
            data={
                "checksum": getattr(data, "checksum", None),
                **dict(getattr(data, "hparams", {})),
            },
            seed=row["seed"],
            device=str(trainer.strategy.root_device),
            precision=str(trainer.precision),
            processes=trainer.world_size,
            threads=torch.get_num_threads(),
            resumed_at_epoch=trainer.current_epoch,
        )
        if changes := _changes(earlier[-1] if earlier else {}, facts):
            say(f"{changes}: the results differ from those of an uninterrupted training")
        write_json(sessions, [*earlier, facts])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seconds = time.monotonic() - cast(float, self._began)
        metrics = trainer.callback_metrics
        for tag, name, better in (
            ("best/val_acc", "val/acc", max),
            ("best/val_loss", "val/loss", min),
        ):
            if name in metrics:
                value = float(metrics[name])
                self._best[tag] = better(self._best.get(tag, value), value)
        if (logger := _run_logger(trainer)) is not None:
            epochs = trainer.current_epoch + 1
            for tag, value in {
                **self._best,
                "run/epochs": epochs,
                "run/seconds": self._seconds,
            }.items():
                logger.experiment.add_scalar(tag, value, epochs)


def _changes(before: Any, now: dict[str, Any]) -> str:
    """The differences between two sessions of a training that change its results."""
    before = before if isinstance(before, dict) else {}
    return ", ".join(
        f"{name} {now[name]}, {before[name]} before"
        for name in ("processes", "threads", "device", "precision")
        if name in before and before[name] != now[name]
    )


def hparams_row(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """The run's row in HParams: always the same columns, with numbers or texts."""
    model = dict(module.hparams)
    data: dict[str, Any] = dict(getattr(getattr(trainer, "datamodule", None), "hparams", {}))
    hidden = model.get("hidden_units", [])
    stopping = [c for c in trainer.early_stopping_callbacks if getattr(c, "enabled", True)]
    parameters = list(module.parameters())
    return {
        "model": type(module).__name__,
        "hidden_units": "-".join(map(str, hidden if isinstance(hidden, list) else [hidden]))
        or "none",
        "regime": str(model.get("regime", "none")),
        "optimizer": str(model.get("optimizer", "none")),
        "lr": float(model.get("lr", 0)),
        "batch_size": int(data.get("batch_size", 0)),
        "max_epochs": int(trainer.max_epochs or 0),
        "patience": stopping[0].patience if stopping else 0,
        "image_size": int(data.get("image_size", 0)),
        "data": "/".join(
            str(data.get(name)) for name in ("name", "source", "split") if data.get(name)
        ),
        "seed": int(os.environ.get("PL_GLOBAL_SEED", 0)),
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
    }


def _csv_line(cells: Iterable[Any]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerow(cells)
    return text.getvalue()


def _run_logger(trainer: Trainer) -> RunLogger | None:
    if not trainer.is_global_zero:
        return None
    return next((logger for logger in trainer.loggers if isinstance(logger, RunLogger)), None)
