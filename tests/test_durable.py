"""Trainings that are stopped or killed leave complete files and can be resumed."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import load
import powerloss
import pytest
import torch
import torture
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torture import contents, same

from mnist_lightning import MNISTDataModule, cli
from mnist_lightning.__main__ import main
from mnist_lightning.files import write_json
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.runs import checkpoints
from mnist_lightning.runs.loggers import Dashboard
from mnist_lightning.training.execution import _EpochLoop

FIT = ("fit", "--config", "shallow.yaml", "--data.source", "digits", "--early_stopping.enabled=no")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fit(*words: object) -> int:
    return main([*FIT, *(str(word) for word in words)])


# ---- files are complete or missing


_written: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _written is not None and event == "open":
        path, _, flags = arguments
        if isinstance(path, str) and (flags & (os.O_WRONLY | os.O_RDWR)):
            _written.append(Path(path).name)


@pytest.mark.pictures
def test_no_file_is_written_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where TMPDIR is on another file system, so that a move from there is a copy.

    A file that is opened for writing in its place is, for a moment, neither the old nor the new.
    """
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system: /dev/shm")
    with tempfile.TemporaryDirectory(dir=other) as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        sys.addaudithook(_note)  # permanent: an audit hook cannot be removed
        monkeypatch.setattr(sys.modules[__name__], "_written", [])
        assert fit("--trainer.max_epochs", 1) == 0
        assert fit("--trainer.max_epochs", 2, "--ckpt_path", "last") == 0
        written = set(_written or [])
    run = next(tmp_path.glob("lightning_logs/shallow/version_0"))
    files = {path.name for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "provenance.json", "metrics.csv", "best.ckpt", "last.ckpt"} <= files
    # TensorBoard appends to its events; nothing reads its hparams.yaml, nor what is in a lock
    kept = {name for name in files if not name.startswith(("events.", "hparams.yaml", ".lock"))}
    assert written & kept == set()


def test_a_file_in_new_folders_survives_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new folder's name is in the folder above, which must be synced too."""
    root = tmp_path / "disk"
    root.mkdir()
    disk = powerloss.Disk(root, tmp_path / "store")
    disk.settle()

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_relative_to(root):
            disk.note(path)

    monkeypatch.setattr(os, "fsync", fsync)
    for folder in ("new/newer", "new/other"):
        (root / folder).mkdir(parents=True)
        write_json(root / folder / "file.json", {"folder": folder})
        (root / folder / "not synced").write_text("x")
    disk.cut(powerloss.KEPT[0])
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert files == {"new/newer/file.json", "new/other/file.json"}
    assert json.loads((root / "new/other/file.json").read_text()) == {"folder": "new/other"}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "search", "test"])
def test_a_power_cut_loses_nothing_that_was_reported(command: str, tmp_path: Path) -> None:
    """The short version of benchmarks/powerloss.py."""
    random.seed(1)
    _, lost, equal, wrong = powerloss.losses(command, 3, tmp_path)
    assert (lost, equal, wrong) == (0, 3, [])


@pytest.mark.parametrize(("damaged", "whole"), [("last", "best"), ("best", "last")])
def test_of_a_damaged_checkpoint_the_other_one_is_named(
    damaged: str, whole: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--trainer.max_epochs", 1) == 0
    folder = Path("lightning_logs/shallow/version_0/checkpoints")
    content = bytearray((folder / f"{damaged}.ckpt").read_bytes())
    content[len(content) // 2] ^= 4
    (folder / f"{damaged}.ckpt").write_bytes(content)
    assert main(["validate", "--ckpt_path", str(folder / f"{damaged}.ckpt")]) == 1
    error = capsys.readouterr().err.strip()
    assert "is damaged" in error
    assert main(["validate", *error.split()[-2:]]) == 0
    (folder / f"{whole}.ckpt").write_bytes(b"")
    assert main(["validate", "--ckpt_path", str(folder / f"{damaged}.ckpt")]) == 1
    assert "Give another" in capsys.readouterr().err


@pytest.mark.parametrize("plugins", [None, "of the user's own"])
def test_checkpoints_are_written_whole_beside_a_users_plugins(
    plugins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--trainer.plugins", "lightning.pytorch.plugins.Precision"] if plugins else []
    used = []
    save = cli.WholeFiles.save_checkpoint

    def note(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        used.append(Path(path).name)
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(cli.WholeFiles, "save_checkpoint", note)
    assert fit("--trainer.max_epochs", 1, *words) == 0
    assert sorted(used) == ["best.ckpt", "last.ckpt"]


def test_a_resumed_training_that_diverges_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    assert fit("--trainer.max_epochs", 1) == 0
    run = tmp_path / "lightning_logs/shallow/version_0"
    before = (run / "config.yaml").read_bytes()
    last = ("fit", "--ckpt_path", str(run / "last"), "--trainer.max_epochs", "2")
    assert main([*last, "--model.lr", "1e20"]) == 1
    assert (run / "config.yaml").read_bytes() == before
    assert main([*last, "--model.lr", "0.05"]) == 0
    assert "lr: 0.05" in (run / "config.yaml").read_text()


# ---- within an epoch


class Dropping(Classifier):
    """A model that is hard to resume: dropout, running statistics, a schedule by step, Adam."""

    def __init__(self, lr: float = 0.003) -> None:
        net = torch.nn.Sequential(
            torch.nn.Flatten(),
            torch.nn.Linear(784, 20),
            torch.nn.BatchNorm1d(20),
            torch.nn.Dropout(0.3),
            torch.nn.ReLU(),
            torch.nn.Linear(20, 10),
        )
        super().__init__(net, lr, "adam")
        self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Killed(BaseException):
    """Like kill -9: nothing is saved at the end."""


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Kills the next training after this many executions."""
    after = _EpochLoop.on_advance_end

    def arrange(executions: int) -> None:
        count = 0

        def die(self: _EpochLoop, data_fetcher: Any) -> None:
            nonlocal count
            after(self, data_fetcher)
            count += 1
            if count == executions:
                monkeypatch.setattr(_EpochLoop, "on_advance_end", after)
                raise Killed

        monkeypatch.setattr(_EpochLoop, "on_advance_end", die)

    return arrange


EMA = "lightning.pytorch.callbacks.EMAWeightAveraging"
MODELS: dict[str, tuple[list[str], int]] = {
    # arguments, and executions before the kill, which is in the second of three epochs
    "perceptron": (["--config", "perceptron.yaml"], 5),
    "fused": (["--config", "shallow.yaml", "--execution.steps", "7"], 40),
    "joined": (["--config", "shallow.yaml", "--execution.fused", "no"], 3),
    "single": (["--config", "shallow.yaml", "--execution.steps", "1"], 200),
    "adam": (["--config", "deep3.yaml", "--model.optimizer", "adam"], 3),
    "dropout": (["--model", "test_durable.Dropping", "--execution.steps", "5"], 12),
    "averaged": (["--model", "test_durable.Dropping", f"--trainer.callbacks+={EMA}"], 60),
    "frozen": (["--config", "shallow.yaml", "--freezing.freeze", "[net.hidden1.*]"], 3),
    "validates": (["--config", "shallow.yaml", "--trainer.val_check_interval", "0.3"], 12),
    "accumulates": (["--config", "shallow.yaml", "--trainer.accumulate_grad_batches", "3"], 220),
}


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(name, marks=[] if name in ("fused", "dropout") else pytest.mark.slow)
        for name in MODELS
    ],
)
def test_a_training_killed_within_an_epoch_goes_on_as_if_it_had_not_been(
    model: str, killed_after: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same bits and metrics as without a kill; every execution is followed by a save."""
    words, executions = MODELS[model]
    common = ["--data.source", "digits", "--early_stopping.enabled=no", "--trainer.max_epochs=3"]
    words = ["fit", *words, *common, "--save_every_minutes", "0"]
    assert (
        main([*words, "--trainer.default_root_dir", "undisturbed", "--save_every_minutes=9"]) == 0
    )
    killed_after(executions)
    with pytest.raises(Killed):
        main([*words, "--trainer.default_root_dir", "killed"])
    undisturbed, killed = (
        next(Path(name).glob("lightning_logs/*/version_0")) for name in ("undisturbed", "killed")
    )
    saved = torch.load(killed / "checkpoints/last.ckpt", weights_only=True)
    epochs, batches = checkpoints.progress(saved)
    assert (epochs, batches > 0) == (1, True)
    capsys.readouterr()
    own = words[1:3] if words[1] == "--model" else []  # the user's class is named again
    resume = ["fit", *own, "--ckpt_path", str(killed / "last"), "--save_every_minutes=9"]
    assert main(resume) == 0
    assert "not resumable" not in capsys.readouterr().err
    assert [row["epoch"] for row in contents(killed)["metrics"]] == ["1", "2", "3"]
    expected, got = contents(undisturbed), contents(killed)
    assert [name for name in expected if not same(expected[name], got[name])] == []


# ---- stopped by a signal


@pytest.fixture
def signal_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sends signals to the next training after this many executions."""
    after = _EpochLoop.on_advance_end

    def arrange(executions: int, *signals: int) -> None:
        count = 0

        def send(self: _EpochLoop, data_fetcher: Any) -> None:
            nonlocal count
            count += 1
            if count == executions:
                monkeypatch.setattr(_EpochLoop, "on_advance_end", after)
                for number in signals:
                    os.kill(os.getpid(), number)
            after(self, data_fetcher)

        monkeypatch.setattr(_EpochLoop, "on_advance_end", send)

    return arrange


@pytest.mark.parametrize(
    ("signals", "code"),
    [((signal.SIGTERM,), 143), ((signal.SIGINT,), 130), ((signal.SIGTERM, signal.SIGTERM), 143)],
)
def test_a_signal_ends_a_training_after_a_step_with_a_sentence_and_its_code(
    signals: tuple[int, ...],
    code: int,
    signal_after: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--trainer.max_epochs", 2, "--execution.steps", 50)
    assert fit(*words, "--trainer.default_root_dir", "undisturbed") == 0
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signal_after(2, *signals)
    with pytest.raises(SystemExit) as stop:
        fit(*words)
    assert stop.value.code == code
    now = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert now == handlers
    out = capsys.readouterr().out
    assert "stopped; saved up to 100 mini-batches of epoch 1. To resume:" in out
    again = shlex.split(out.strip().splitlines()[-1])
    assert again[1:3] == ["-m", "mnist_lightning"]
    assert main(again[3:]) == 0
    runs = [Path(folder, "lightning_logs/shallow/version_0") for folder in ("undisturbed", "")]
    assert same(contents(runs[0]), contents(runs[1]))


def test_a_second_ctrl_c_stops_at_once(
    signal_after: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    signal_after(4, signal.SIGINT, signal.SIGINT)  # 1,294 images: the second of 50 in epoch 2
    with pytest.raises(SystemExit) as stop:
        fit("--trainer.max_epochs", 3, "--execution.steps", 100)
    assert stop.value.code == 130
    assert "saved up to epoch 1. To resume:" in capsys.readouterr().out


def test_a_training_stopped_before_its_first_step_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def setup(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Dashboard, "on_train_start", setup)
    with pytest.raises(SystemExit) as stop:
        fit("--trainer.max_epochs", 1)
    assert stop.value.code == 143
    assert "nothing was saved" in capsys.readouterr().out
    assert not list(Path("lightning_logs/shallow").glob("version_*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("before", [True, False], ids=["in the step before", "within"])
def test_a_stop_asked_for_in_a_validation_waits_for_its_end(
    number: int,
    code: int,
    before: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing can be saved within a validation: the whole epoch before it would be lost."""
    words = ("--trainer.max_epochs", 2, "--data.eval_batch_size", 50)
    assert fit(*words, "--trainer.default_root_dir", "undisturbed") == 0
    step, steps = Classifier.validation_step, []
    after = _EpochLoop.on_advance_end

    def stopped_before(self: _EpochLoop, data_fetcher: Any) -> None:
        if before and self._is_training_done:
            os.kill(os.getpid(), number)
        after(self, data_fetcher)

    def stopped(self: Classifier, batch: Any, index: int) -> Any:
        steps.append(index)
        if len(steps) == 2 and not before:
            os.kill(os.getpid(), number)
        return step(self, batch, index)

    monkeypatch.setattr(Classifier, "validation_step", stopped)
    monkeypatch.setattr(_EpochLoop, "on_advance_end", stopped_before)
    with pytest.raises(SystemExit) as stop:
        fit(*words)
    monkeypatch.setattr(Classifier, "validation_step", step)
    monkeypatch.setattr(_EpochLoop, "on_advance_end", after)
    assert stop.value.code == code
    assert steps == list(range(7))  # 323 images
    assert "stopped; saved up to epoch 1. To resume:" in capsys.readouterr().out
    assert main(["fit", "--ckpt_path", "lightning_logs/shallow/version_0/last"]) == 0
    runs = [Path(folder, "lightning_logs/shallow/version_0") for folder in ("undisturbed", "")]
    assert same(contents(runs[0]), contents(runs[1]))


def test_other_mini_batches_do_not_go_on_within_an_epoch(
    signal_after: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    signal_after(1, signal.SIGTERM)
    with pytest.raises(SystemExit):
        fit("--trainer.max_epochs", 1, "--execution.steps", 50)
    again = ("fit", "--ckpt_path", "lightning_logs/shallow/version_0/last")
    assert main([*again, "--data.batch_size", "16"]) == 1
    assert "resume with --data.batch_size 8" in capsys.readouterr().err


def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 2)\nimport nothing\n")
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", "mnist_lightning", "fit", "--config", "shallow.yaml"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


# ---- one training per run, complete metrics, and messages for what did not train


def test_a_run_has_one_training_at_a_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """During the first training, and during a resumed one."""
    run = Path("lightning_logs/shallow/version_0")
    start, codes = Dashboard.on_train_start, []

    def meanwhile(self: Dashboard, *arguments: Any) -> None:
        start(self, *arguments)
        if list(run.rglob("last.ckpt")):
            codes.append(main(["fit", "--ckpt_path", str(run / "last")]))

    def later(self: Dashboard, *arguments: Any) -> None:
        if not codes:
            codes.append(main(["fit", "--ckpt_path", str(run / "last")]))

    monkeypatch.setattr(Dashboard, "on_train_start", meanwhile)
    monkeypatch.setattr(Dashboard, "on_train_end", later)
    assert fit("--trainer.max_epochs", 1) == 0
    assert main(["fit", "--ckpt_path", str(run / "last"), "--trainer.max_epochs", "2"]) == 0
    assert codes == [1, 1]
    message = f"{run} is being trained by another process"
    assert capsys.readouterr().err.count(message) == 2


@pytest.mark.parametrize("model", ["shallow", "Dropping"])
def test_a_kill_right_after_an_epochs_checkpoint_changes_nothing(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = cli.WholeFiles.save_checkpoint

    def die(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        save(self, checkpoint, path, storage_options)
        if Path(path).name == "last.ckpt":
            raise Killed

    which = ("--model", "test_durable.Dropping") if model == "Dropping" else FIT[1:3]
    words = ["fit", *which, *FIT[3:], "--trainer.max_epochs", "3"]
    assert main([*words, "--trainer.default_root_dir", "undisturbed"]) == 0
    monkeypatch.setattr(cli.WholeFiles, "save_checkpoint", die)
    with pytest.raises(Killed):
        main(words)
    monkeypatch.setattr(cli.WholeFiles, "save_checkpoint", save)
    run = Path(f"lightning_logs/{model}/version_0")
    own = which if model == "Dropping" else ()  # the user's class is named again
    assert main(["fit", *own, "--ckpt_path", str(run / "last")]) == 0
    assert same(contents(Path("undisturbed") / run), contents(run))
    points = [
        [(event.step, event.value) for event in events.Scalars("train/loss")]
        for events in (
            EventAccumulator(str(folder)).Reload() for folder in (Path("undisturbed") / run, run)
        )
    ]
    assert points[0] == points[1]


def test_a_newer_run_without_a_checkpoint_is_not_passed_over_in_silence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fit("--trainer.max_epochs", 1) == 0
    Path("lightning_logs/shallow/version_1").mkdir()
    assert main(["validate", "--ckpt_path", "shallow"]) == 0
    said = "shallow/version_1 has no best.ckpt: taking lightning_logs/shallow/version_0"
    assert capsys.readouterr().err.count(said) == 1


@pytest.mark.parametrize("name", ["max_epochs", "max_steps", "limit_train_batches"])
def test_a_training_of_nothing_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(f"--trainer.{name}", 0) == 1
    assert f"nothing would be trained: --trainer.{name} is 0" in capsys.readouterr().err
    assert not Path("lightning_logs").exists()


def test_a_finished_training_that_is_resumed_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.max_epochs", 1) == 0
    assert main(["fit", "--ckpt_path", "lightning_logs/shallow/version_0/last"]) == 0
    assert "nothing was left to train: 1 epochs are done" in capsys.readouterr().out


@pytest.mark.parametrize(("steps", "where"), [(1, r"mini-batch 21:"), (8, r"mini-batch 17 to 24:")])
def test_a_training_that_diverges_says_where_why_and_how_to_go_on(
    steps: int, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image in the 21st mini-batch of the second epoch is NaN."""
    batches = -(-1294 // 8)
    fetch = MNISTDataModule.on_after_batch_transfer
    seen = 0

    def spoil(self: MNISTDataModule, batch: Any, index: int) -> Any:
        nonlocal seen
        images, labels = fetch(self, batch, index)
        first, seen = seen, seen + len(labels)
        bad = 8 * 20 + 1294
        if self.trainer is not None and self.trainer.training and first <= bad < seen:
            images[bad - first] = float("nan")
        return images, labels

    assert batches == 162
    words = ("--trainer.max_epochs", 2, "--execution.steps", steps)
    monkeypatch.setattr(MNISTDataModule, "on_after_batch_transfer", spoil)
    assert fit(*words, "--trainer.limit_val_batches", 0) == 1
    err = capsys.readouterr().err
    assert re.search(rf"diverged in epoch 2, {where} its loss is no longer finite", err)
    assert "A lower lr may help (now 0.1)" in err
    assert "fit --ckpt_path lightning_logs/shallow/version_0/last --model.lr 0.01" in err
    assert main(["validate", "--ckpt_path", "lightning_logs/shallow/version_0/last"]) == 0


def test_a_diverged_training_is_not_saved_over_the_last_good_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--execution.steps", 1, "--model.lr", 1e30, "--save_every_minutes", 0)
    assert fit("--trainer.max_epochs", 1, *words) == 1
    assert "mini-batch" in capsys.readouterr().err
    last = Path("lightning_logs/shallow/version_0/checkpoints/last.ckpt")
    weights = torch.load(last, weights_only=True)
    assert all(torch.isfinite(loss).all() for loss in weights["seen"][:1])


@pytest.mark.slow
def test_eight_trainings_that_start_at_once_get_a_run_each(tmp_path: Path) -> None:
    assert load.start(8, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("model", ["shallow, fused", "convolutions, dropout, random shifts"])
def test_trainings_that_are_killed_end_as_if_nothing_had_happened(
    model: str, tmp_path: Path
) -> None:
    """The short version of ``make torture``: real signals to real processes."""
    killed, _, wrong = torture.torture(model, 5, tmp_path)
    assert (sum(killed.values()), wrong) == (5, [])
