"""``fit --tune``: what Lightning's Tuner finds, and a training as if the value had been given."""

import csv
import math
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import trainer
from lightning.pytorch import callbacks, seed_everything
from lightning.pytorch.tuner import Tuner

from mnist_lightning import MNISTDataModule, ShallowNetwork
from mnist_lightning.__main__ import main
from mnist_lightning.models.epoch_metrics import Diverged
from mnist_lightning.training import tuning
from mnist_lightning.training.tuning import Found, middle_of_fall, trainer_settings

FIT = "fit --config shallow --data.source digits --trainer.max_epochs 2 --data.batch_size 16"

OWN = '''
import os
import signal

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mnist_lightning import Classifier


class Plain(pl.LightningModule):
    """No class of this package; without an lr."""

    def __init__(self, hidden: int = 8):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.Linear(hidden, 10))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.get("learning_rate", 0.1))


class Rate(Plain):
    def __init__(self, learning_rate: float = 0.1):
        super().__init__()
        self.save_hyperparameters()


class Manual(Rate):
    def __init__(self, learning_rate: float = 0.1):
        super().__init__(learning_rate)
        self.automatic_optimization = False


class Net(Classifier):
    """One layer; ``what`` happens in its training."""

    def __init__(self, lr: float = 0.1, what: str = ""):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), lr=lr, optimizer="sgd")
        self.what = what

    def training_step(self, batch, batch_idx):
        if batch_idx == 3 and self.what.startswith("SIG"):
            assert set(os.listdir()) <= {"own_tune.py", "__pycache__"}  # no file yet
            os.kill(os.getpid(), getattr(signal, self.what))
        loss = super().training_step(batch, batch_idx)
        return {"nan": loss * float("nan"), "wild": loss.exp().exp()}.get(self.what, loss)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        labels = torch.arange(64) % 10
        images = torch.zeros(64, 1, 28, 28)
        images[torch.arange(64), 0, labels] = 1.0  # the label's row is white
        return DataLoader(TensorDataset(images, labels), batch_size=8)

    val_dataloader = train_dataloader
'''


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with the user's models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("own_tune.py").write_text(OWN)


def _checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def _curve(run: Path) -> dict[str, list[float]]:
    with (run / "lr_find.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in ("lr", "loss")}


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ({}, {}),
        ({"momentum": 0.9, "schedule": "one_cycle"}, {}),
        ({"optimizer": "adam", "schedule": "cosine", "warmup_epochs": 1}, {}),
        ({"dropout": 0.2, "mixup": 0.3}, {"augment": {"shift": 2}}),
    ],
)
def test_lr(model: dict[str, Any], data: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    """The curve is that of Lightning's Tuner; the training equals that of the command it prints."""
    options = [f"--model.{name}={value}" for name, value in model.items()]
    options += [f"--data.augment.{k}={v}" for k, v in data.get("augment", {}).items()]
    assert main([*FIT.split(), *options, "--tune", "lr", "--model.lr", "0.7"]) == 0
    said = capsys.readouterr().out
    found = re.search(r"found --model.lr (\S+); training with it:\n +(.+)\n", said)
    assert found is not None
    assert said.count("ShallowNetwork, 79,510 parameters") == 1
    run = Path("lightning_logs/shallow/version_0")
    checkpoint = _checkpoint(run)

    seed_everything(0, workers=True, verbose=False)
    plain = ShallowNetwork(100, **{**model, "lr": 0.7})
    module = MNISTDataModule(source="digits", batch_size=16, **data)
    # a validation in between would draw a random number
    plainly = trainer(max_epochs=2, check_val_every_n_epoch=2)
    finder = Tuner(plainly).lr_find(plain, datamodule=module)
    assert finder is not None
    assert _curve(run) == {name: list(map(float, v)) for name, v in finder.results.items()}
    middle = middle_of_fall(finder.results["loss"])
    assert middle is not None
    assert f"{finder.results['lr'][middle]:.2g}" == found[1]
    capsys.readouterr()

    words = shlex.split(found[2])
    words = words[words.index("fit") :]
    assert words == [*FIT.split(), *options, "--model.lr", found[1]]
    os.mkdir("by_hand")
    os.chdir("by_hand")
    try:
        assert main(words) == 0
    finally:
        os.chdir("..")
    by_hand = Path("by_hand") / run
    other = _checkpoint(by_hand)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "generators"):
        assert _equal(checkpoint[part], other[part]), part
    steps = 2 * math.ceil(1294 / 16)
    assert checkpoint["global_step"] == other["global_step"] == steps
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        assert checkpoint[key] == other[key]
    assert checkpoint["hyper_parameters"]["lr"] == float(found[1])
    for name in ("config.yaml", "metrics.csv", "hparams.yaml"):
        assert (run / name).read_text() == (by_hand / name).read_text(), name
    files = {file.name for file in run.rglob("*")} - {"lr_find.csv"}
    assert {name for name in files if "tfevents" not in name} == {
        file.name for file in by_hand.rglob("*") if "tfevents" not in file.name
    }
    assert yaml.safe_load((run / "config.yaml").read_text())["tune"] == "none"
    assert sorted(os.listdir()) == ["by_hand", "lightning_logs", "own_tune.py"]


def test_a_configuration_may_tune(capsys: pytest.CaptureFixture) -> None:
    """It tunes once, also if the command names another thing to tune."""
    Path("mine.yaml").write_text("tune: batch_size\ntrainer: {max_epochs: 1}\n")
    words = "fit -c shallow -c mine.yaml --data.source=digits --data.batch_size=64 --tune=lr"
    assert main(words.split()) == 0
    said = capsys.readouterr().out
    assert re.search(r"fit -c shallow .+ --data.batch_size=64 --tune none --model.lr \S+\n", said)
    assert Path("lightning_logs/mine/version_0/lr_find.csv").is_file()
    # the run's own configuration trains without tuning
    capsys.readouterr()
    assert main(["fit", "--config", "lightning_logs/mine/version_0/config.yaml"]) == 0
    assert "found" not in capsys.readouterr().out


@pytest.mark.parametrize("data", ["--data.source digits", "--data own_tune.Data"])
def test_a_model_of_the_users_own(data: str, capsys: pytest.CaptureFixture) -> None:
    words = f"fit --model own_tune.Rate {data} --trainer.max_epochs 1 --tune lr"
    assert main(words.split()) == 0
    found = re.search(r"found --model.learning_rate (\S+);", capsys.readouterr().out)
    assert found is not None
    run = Path("lightning_logs/Rate/version_0")
    assert len(_curve(run)["lr"]) == 100  # an epoch of Data has 8
    assert _checkpoint(run)["hyper_parameters"]["learning_rate"] == float(found[1])


def test_a_loss_that_overflows_is_no_error(capsys: pytest.CaptureFixture) -> None:
    words = "fit --model own_tune.Net --model.what wild --data.source digits --tune lr"
    main([*words.split(), "--trainer.max_epochs", "1"])  # the training itself may diverge
    assert "found --model.lr" in capsys.readouterr().out


class Bursting(ShallowNetwork):
    """Its loss is infinite after 40 steps."""

    def loss(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().loss(scores, labels) * (math.inf if self.global_step > 40 else 1)


def test_lightnings_callback_may_diverge(digits: MNISTDataModule) -> None:
    """A learning rate finder goes on until the loss grows; that is no diverged training."""
    finder = callbacks.LearningRateFinder(num_training_steps=60, early_stop_threshold=None)
    trainer(callbacks=[finder], max_steps=20).fit(Bursting(10), digits)
    assert finder.optimal_lr is not None
    assert not all(map(math.isfinite, finder.optimal_lr.results["loss"]))
    with pytest.raises(Diverged):
        trainer().fit(Bursting(10), digits)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config shallow --tune batch_size", "this training is on the CPU"),
        ("--config shallow --tune lr --trainer.fast_dev_run true", "leave --tune or"),
        (
            "--config shallow --tune lr --trainer.devices 2 --trainer.strategy ddp",
            "this training has 2: tune with --trainer.devices 1",
        ),
        ("--model own_tune.Plain --tune lr", "Plain has no argument lr or learning_rate"),
        ("--model own_tune.Manual --tune lr", "Manual optimizes manually"),
        ("--model own_tune.Net --model.what nan --tune lr", "found no learning rate"),
        (
            "--model own_tune.Rate --data own_tune.Data --tune batch_size",
            "Data has no argument batch_size",
        ),
    ],
)
def test_what_cannot_be_tuned(words: str, message: str, capsys: pytest.CaptureFixture) -> None:
    data = [] if "--data" in words else ["--data.source", "digits"]
    assert main(["fit", *words.split(), *data]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not Path("lightning_logs").exists()


def test_a_resumed_training_is_not_tuned(capsys: pytest.CaptureFixture) -> None:
    assert main([*FIT.split(), "--trainer.max_epochs", "1"]) == 0
    assert main("fit --ckpt_path shallow --tune lr".split()) == 1
    assert "leave --tune or --ckpt_path out" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stop_leaves_no_file(name: str, code: int, capsys: pytest.CaptureFixture) -> None:
    words = f"fit --model own_tune.Net --model.what {name} --data.source digits --tune lr"
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == code
    assert "stopped; nothing was saved" in capsys.readouterr().out
    assert set(os.listdir()) <= {"own_tune.py", "__pycache__"}


class Hungry(ShallowNetwork):
    """Runs out of memory with more than 100 images."""

    limit = 100

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if len(batch[1]) > self.limit:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().training_step(batch, batch_idx)


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "largest"), [(100, 64), (10**6, 1294)])
def test_batch_size(limit: int, largest: int, digits: MNISTDataModule) -> None:
    """The largest that fits, as Lightning finds it; at most all training images."""
    model = Hungry(10, lr=0.1)
    model.limit = limit
    tuned = trainer(**trainer_settings({"max_epochs": 1}, [], []))
    assert tuning._batch_size(tuned, model, digits) == largest
    again = MNISTDataModule(source="digits", batch_size=16)
    plain = Tuner(trainer(max_epochs=100)).scale_batch_size(model, datamodule=again)
    assert plain is not None
    assert min(plain, 1294) == largest


def test_it_trains_with_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "find", lambda *_: Found("--data.batch_size", "50"))
    words = "fit --config shallow --data.source digits --trainer.max_epochs 1 --tune batch_size"
    assert main(words.split()) == 0
    run = Path("lightning_logs/shallow/version_0")
    checkpoint = _checkpoint(run)
    assert checkpoint["datamodule_hyper_parameters"]["batch_size"] == 50
    assert checkpoint["global_step"] == math.ceil(1294 / 50)
    assert not (run / "lr_find.csv").exists()


def test_the_middle_of_the_fall() -> None:
    flat, fall, rise = [3.0] * 40, [3 - n / 20 for n in range(40)], [2.0 + n for n in range(20)]
    assert middle_of_fall([*flat, *fall, *rise]) == 59
    noisy = [*flat, *(x for loss in fall for x in (loss, 5.0)), *rise]
    assert middle_of_fall(noisy) == 98
    assert middle_of_fall([*flat, math.nan, *fall, math.inf, *rise]) == 60
    for nothing in (flat, rise, [], fall[:3], [math.nan] * 20):
        assert middle_of_fall(nothing) is None
