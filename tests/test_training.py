"""Tests early stopping, checkpoints, run folders and dashboards, also against other runs."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import same_weights, trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnist_lightning import (
    Dashboard,
    DeepNetwork,
    EarlyStopping,
    MNISTDataModule,
    Perceptron,
    RunLogger,
    ShallowNetwork,
)
from mnist_lightning.__main__ import main
from mnist_lightning.models.classifier import Batch


class Losses(Callback):
    """Records the validation loss of each epoch, and the weights after it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.losses.append(float(trainer.callback_metrics["val/loss"]))
        self.weights.append({k: v.clone() for k, v in pl_module.state_dict().items()})


def _train(epochs: int, *callbacks: Callback, model=None) -> tuple[ShallowNetwork, Losses]:
    pl.seed_everything(0, verbose=False)
    model, losses = model or ShallowNetwork(20, lr=0.5), Losses()
    run = trainer(max_epochs=epochs, callbacks=[losses, *callbacks])
    run.fit(model, MNISTDataModule(source="digits", batch_size=16))
    return model, losses


@pytest.mark.parametrize("patience", [1, 3])
def test_early_stopping_against_a_run_without_it(patience: int) -> None:
    """It stops when the other run's loss had no new minimum for `patience` epochs."""
    _, whole = _train(20)
    best, since, stop = math.inf, 0, 0
    while since < patience:
        improved = whole.losses[stop] < best
        best, since, stop = min(best, whole.losses[stop]), 0 if improved else since + 1, stop + 1
    assert stop < 20, "the test needs a run in which early stopping fires"
    stopped_model, stopped = _train(20, EarlyStopping(patience=patience))
    assert stopped.losses == whole.losses[:stop]
    assert all(
        torch.equal(v, stopped_model.state_dict()[k]) for k, v in whole.weights[stop - 1].items()
    )


def test_early_stopping_turned_off_changes_nothing() -> None:
    _, without = _train(8)
    _, off = _train(8, EarlyStopping(enabled=False, patience=1))
    assert off.losses == without.losses


def test_early_stopping_keeps_the_patience_asked_for_on_resume(tmp_path: Path) -> None:
    """Lightning's callback would take the patience from the checkpoint."""
    first = EarlyStopping(patience=3)
    first.wait_count = 2
    second = EarlyStopping(patience=7)
    second.load_state_dict(first.state_dict())
    assert (second.patience, second.wait_count) == (7, 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `fit`, with the flags that users give."""
    root = tmp_path_factory.mktemp("work")
    words = "--config shallow.yaml --data.source digits --trainer.max_epochs 6".split()
    assert main(["fit", *words, "--trainer.default_root_dir", str(root)]) == 0
    return root / "lightning_logs" / "shallow" / "version_0"


def _rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_run_folder_is_complete(run: Path) -> None:
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    events = {name for name in names if "tfevents" in name}
    assert len(events) == 2  # the curves; the pictures, after the training
    pictures = "samples weights confusion classes reliability mistakes".split()
    assert names - events == {
        *(f"pictures/{name}.png" for name in pictures),
        *(f"projector/{name}" for name in ("features.bytes", "images.tsv", "sprite.png")),
        "projector_config.pbtxt",
        ".lock",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "config.yaml",
        "hparams.yaml",
        "metrics.csv",
        "provenance.json",
    }


def test_best_checkpoint_is_of_the_epoch_with_the_highest_val_acc(run: Path) -> None:
    accuracies = [float(row["val/acc"]) for row in _rows(run)]
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == accuracies.index(max(accuracies))
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 5
    # its accuracy is the highest one
    model = ShallowNetwork.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    (metrics,) = trainer().validate(model, MNISTDataModule(source="digits"), verbose=False)
    assert metrics["val/acc"] == pytest.approx(max(accuracies))


def test_provenance_says_where_it_comes_from(run: Path) -> None:
    (session,) = json.loads((run / "provenance.json").read_text())
    assert session["data"]["source"] == "digits"
    assert session["data"]["split_seed"] == 0
    assert len(session["data"]["checksum"]) == 64
    assert session["seed"] == 0
    assert session["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_resume_goes_on_in_the_same_folder(run: Path, tmp_path: Path) -> None:
    """Three epochs, then three more, give the same table and weights as six."""
    words = "--config shallow.yaml --data.source digits --trainer.max_epochs 3".split()
    assert main(["fit", *words, "--trainer.default_root_dir", str(tmp_path)]) == 0
    part = tmp_path / "lightning_logs" / "shallow" / "version_0"
    resume = f"--ckpt_path {part}/last --trainer.max_epochs 6".split()
    assert main(["fit", *resume]) == 0
    assert [path.name for path in part.parent.iterdir()] == ["version_0"]
    assert _rows(part) == _rows(run)
    for name in ("best", "last"):
        one, other = (
            torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
            for folder in (part, run)
        )
        assert one["epoch"] == other["epoch"]
        assert all(torch.equal(one["state_dict"][k], v) for k, v in other["state_dict"].items())
    assert [s["resumed_at_epoch"] for s in json.loads((part / "provenance.json").read_text())] == [
        0,
        3,
    ]


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resume_keeps_every_bit_in_each_precision(
    precision: str, optimizer: str, tmp_path: Path
) -> None:
    """Without our hook, Lightning loads 64-bit weights into a model that still has 32 bits."""

    def train(epochs: int, *callbacks: Callback, ckpt_path: Path | None = None) -> ShallowNetwork:
        pl.seed_everything(0, verbose=False)
        model, data = ShallowNetwork(20, 0.01, optimizer), MNISTDataModule(source="digits")
        run = trainer(
            max_epochs=epochs,
            precision=precision,
            callbacks=[*callbacks],
            enable_checkpointing=bool(callbacks),
        )
        run.fit(model, data, ckpt_path=ckpt_path)
        return model

    train(1, ModelCheckpoint(tmp_path, "half", save_on_train_epoch_end=True))
    resumed = train(2, ckpt_path=tmp_path / "half.ckpt")
    whole = train(2)
    dtype = {"32": torch.float32, "64": torch.float64, "bf16": torch.bfloat16}
    assert {p.dtype for p in resumed.parameters()} == {dtype[precision.partition("-")[0]]}
    assert same_weights(resumed, whole)


def test_two_trainings_never_share_a_folder(tmp_path: Path) -> None:
    from mnist_lightning.runs.folder import RunFolder

    assert [RunFolder.make(tmp_path / "a").path.name for _ in range(3)] == [
        "version_0",
        "version_1",
        "version_2",
    ]


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_has_the_curves_over_epochs(run: Path) -> None:
    scalars = _scalars(run)
    for tag in ("train/loss", "train/acc", "val/loss", "val/acc"):
        steps, values = zip(*scalars[tag], strict=True)
        assert steps == (1, 2, 3, 4, 5, 6)
        assert values == pytest.approx([float(row[tag]) for row in _rows(run)])
    assert scalars["best/val_acc"][-1][1] == max(value for _, value in scalars["val/acc"])
    assert "hp_metric" not in scalars


class OwnModel(ShallowNetwork):
    """A user's model: logs by step and by epoch, with a schedule by step."""

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("own/steps", float(self.global_step))  # Lightning's default: on_step
        self.log("own/loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _fit_own_model(
    folder: Path, epochs: int, interval: str | None, resume_after: int | None = None
) -> pl.Trainer:
    """Trains 81 steps an epoch, logs every 20th, and saves a checkpoint after each epoch."""
    pl.seed_everything(0, verbose=False)
    saved = folder / "checkpoints"
    saver = ModelCheckpoint(saved, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    run = trainer(
        logger=RunLogger(folder, None if resume_after is None else resume_after + 1),
        callbacks=[Dashboard(), saver, LearningRateMonitor(interval)],
        max_epochs=epochs,
        log_every_n_steps=20,
        enable_checkpointing=True,
    )
    run.fit(
        OwnModel(20),
        MNISTDataModule(source="digits", batch_size=16),
        ckpt_path=None if resume_after is None else saved / f"epoch={resume_after - 1}.ckpt",
    )
    return run


@pytest.mark.parametrize(
    ("interval", "lr_at"),
    [("step", [*range(19, 324, 20)]), (None, [*range(19, 324, 20)]), ("epoch", [0, 81, 162, 243])],
)
def test_figures_by_step_have_an_axis_of_their_own(
    interval: str | None, lr_at: list[int], tmp_path: Path
) -> None:
    run = _fit_own_model(tmp_path / "run", 4, interval)
    # metrics.csv: one row per epoch, with the last value
    rows = _rows(tmp_path / "run")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert [float(row["own/steps"]) for row in rows] == [79, 159, 239, 319]
    last = [max(step for step in lr_at if step < 81 * epoch) for epoch in (1, 2, 3, 4)]
    assert [float(row["lr-SGD"]) for row in rows] == pytest.approx([0.1 / (1 + s) for s in last])
    # TensorBoard: epochs in the run folder, steps in a subfolder
    curves, by_step = _scalars(tmp_path / "run"), _scalars(tmp_path / "run" / "by_step")
    assert {tuple(step for step, _ in points) for points in curves.values()} == {(1, 2, 3, 4)}
    assert {"val/loss", "train/loss", "own/loss_epoch"} <= curves.keys()
    assert not {"own/steps", "own/loss_step", "lr-SGD"} & curves.keys()
    assert by_step.keys() == {"by_step/own/steps", "by_step/own/loss_step", "by_step/lr-SGD"}
    assert by_step["by_step/own/steps"] == [(step, step) for step in range(19, 324, 20)]
    assert by_step["by_step/lr-SGD"] == [(s, pytest.approx(0.1 / (1 + s))) for s in lr_at]
    # a test after the training is logged in the row of the last epoch
    (metrics,) = run.test(run.model, MNISTDataModule(source="digits"), verbose=False)
    tested = [row["test/acc"] for row in _rows(tmp_path / "run")]
    assert tested == ["", "", "", str(metrics["test/acc"])]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_resumed_run_keeps_its_figures_by_step(interval: str, tmp_path: Path) -> None:
    """A run that is resumed after its second epoch, with a third already logged, equals one run."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    _fit_own_model(whole, 4, interval)
    _fit_own_model(part, 3, interval)
    _fit_own_model(part, 4, interval, resume_after=2)
    assert _rows(part) == _rows(whole)
    assert _scalars(part / "by_step") == _scalars(whole / "by_step")
    ours, theirs = _scalars(part), _scalars(whole)
    assert len(ours.pop("run/seconds")) == len(theirs.pop("run/seconds"))
    assert ours == theirs


def test_an_epoch_late_in_a_run_costs_the_table_no_more_than_an_early_one(tmp_path: Path) -> None:
    """Each value is formatted at most three times, for any number of later epochs."""

    class Figure(float):
        formatted = 0

        def __str__(self) -> str:
            Figure.formatted += 1
            return super().__str__()

    logger = RunLogger(tmp_path / "run")
    for epoch in range(100):  # as Lightning logs one: the validation, then the training
        for name in ("val/loss", "train/loss"):
            logger.log_metrics({"epoch": epoch, name: Figure(epoch)})
            logger.save()
    assert Figure.formatted <= 100 * 3
    # late values are in the table too: a new column, and a value of an earlier epoch
    logger.log_metrics({"epoch": 99, "a, b": 0.5})
    logger.log_metrics({"epoch": 2, "val/loss": 7.5})
    logger.save()
    rows = _rows(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, 101)]
    assert [row["a, b"] for row in rows] == [""] * 99 + ["0.5"]
    assert [float(row["val/loss"]) for row in rows] == [0, 1, 7.5, *range(3, 100)]
    logger.finalize("success")


def test_hparams_tab_has_the_same_columns_for_different_models(tmp_path: Path) -> None:
    """Asks TensorBoard's backend what its HParams page shows for three models."""
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    models = {
        "perceptron": Perceptron(),
        "shallow": ShallowNetwork(20),
        "deep": DeepNetwork([30, 20], optimizer="adam", lr=0.001),
    }
    for name, model in models.items():
        logger = RunLogger(tmp_path / name / "version_0")
        run = trainer(logger=logger, callbacks=[Dashboard()])
        run.fit(model, MNISTDataModule(source="digits"))
        logger.experiment.close()
    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(tmp_path))
    context = backend_context.Context(TBContext(data_provider=provider))
    request = RequestContext()
    experiment = context.experiment_from_metadata(
        request, "", True, context.hparams_metadata(request, ""), []
    )
    columns = {info.name for info in experiment.hparam_infos}
    assert {
        "model",
        "hidden_units",
        "optimizer",
        "lr",
        "batch_size",
        "seed",
        "parameters",
    } <= columns
    assert {info.name.tag for info in experiment.metric_infos} >= {"best/val_acc", "test/acc"}
    groups = list_session_groups.Handler(
        request,
        context,
        "",
        api_pb2.ListSessionGroupsRequest(
            allowed_statuses=[
                api_pb2.STATUS_UNKNOWN,
                api_pb2.STATUS_SUCCESS,
                api_pb2.STATUS_RUNNING,
            ],
            start_index=0,
            slice_size=10,
            col_params=[api_pb2.ColParams(hparam="model", order=api_pb2.ORDER_ASC)],
        ),
    ).run()
    shown = {g.hparams["model"].string_value: g for g in groups.session_groups}
    assert shown.keys() == {"Perceptron", "ShallowNetwork", "DeepNetwork"}
    assert {name: g.hparams["hidden_units"].string_value for name, g in shown.items()} == {
        "Perceptron": "none",
        "ShallowNetwork": "20",
        "DeepNetwork": "30-20",
    }
    assert shown["DeepNetwork"].hparams["lr"].number_value == pytest.approx(0.001)
    for group in shown.values():
        assert columns <= set(group.hparams)  # nothing is missing for any of them


def test_test_is_logged_into_the_run_and_counted(run: Path, capsys: pytest.CaptureFixture) -> None:
    for number in (1, 2):
        assert main(["test", "--ckpt_path", str(run)]) == 0
        assert f"test evaluation {number} " in capsys.readouterr().out
    recorded = json.loads((run / "test.json").read_text())
    assert [entry["evaluation"] for entry in recorded] == [1, 2]
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert _scalars(run)["test/acc"] == [
        (best["epoch"] + 1, pytest.approx(entry["test/acc"])) for entry in recorded
    ]


@pytest.mark.slow
def test_ddp_on_two_processes_equals_one(tmp_path: Path) -> None:
    """Two processes with mini-batches of 8 give the same weights as one process with 16."""
    for model in ("shallow", "perceptron"):
        states = []
        for name, flags in (
            ("one", "--data.batch_size 16"),
            ("two", "--data.batch_size 8 --trainer.devices 2 --trainer.strategy ddp"),
        ):
            root = tmp_path / model / name
            command = (
                f"fit --config {model} --data.source digits --trainer.max_epochs 2"
                f" --trainer.accelerator cpu --trainer.default_root_dir {root} {flags}"
            )
            done = subprocess.run(
                [sys.executable, "-m", "mnist_lightning", *command.split()],
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            assert done.returncode == 0, done.stderr
            assert "warning" not in done.stderr
            assert [p.name for p in (root / "lightning_logs" / model).iterdir()] == ["version_0"]
            folder = root / "lightning_logs" / model / "version_0"
            last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
            states.append((last, _rows(folder)))
        (one, rows), (two, shared_rows) = states
        # of 323 validation images, one process has 162 and the other 161
        for row, shared in zip(rows, shared_rows, strict=True):
            for name in ("train/loss", "train/acc", "val/loss", "val/acc"):
                assert float(shared[name]) == pytest.approx(float(row[name]), rel=1e-5)
        assert one["global_step"] == two["global_step"]
        for key, value in one["state_dict"].items():
            torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-4, atol=1e-5)


def test_plain_python_needs_no_command_line(digits: MNISTDataModule, tmp_path: Path) -> None:
    """Works as in any Lightning project; the command line can use the checkpoint."""
    saver = ModelCheckpoint(tmp_path, filename="best", monitor="val/acc", mode="max")
    run = trainer(callbacks=[saver, EarlyStopping()], enable_checkpointing=True)
    run.fit(ShallowNetwork(20), digits)
    assert main(["test", "--ckpt_path", str(tmp_path / "best.ckpt")]) == 0
    assert json.loads((tmp_path / "test.json").read_text())[0]["evaluation"] == 1


def test_same_weights_notices_a_difference() -> None:
    """Tests the function that other tests rely on."""
    torch.manual_seed(0)
    one, other = ShallowNetwork(5), ShallowNetwork(5)
    assert same_weights(one, one)
    assert not same_weights(one, other)
