"""Layer freezing, proved on what the training leaves behind: weights, statistics, optimizers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import same_weights, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from mnist_lightning import LayerFreezing, MNISTDataModule, ShallowNetwork
from mnist_lightning.__main__ import main


class Plain(pl.LightningModule):
    """Knows nothing of this project: optimizes all its parameters, with decay and two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(144, 10), nn.BatchNorm1d(10))
        self.gradients: set[str] = set()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self(batch[0])

    def on_validation_model_train(self) -> None:
        self.train()  # as modules written for older versions of Lightning do

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gradients |= {name for name, p in self.named_parameters() if p.grad is not None}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [{"params": part.parameters()} for part in (self.head, self.trunk)]
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


@pytest.fixture
def plain() -> Plain:
    torch.manual_seed(0)
    return Plain()


def copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not value.equal(before[name])}


STATISTICS = {"trunk.1.running_mean", "trunk.1.running_var", "trunk.1.num_batches_tracked"}
HEAD = {f"head.1.{n}" for n in ("weight", "bias")} | {
    f"head.2.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
}


@pytest.mark.parametrize("patterns", [{"train": ["head.*"]}, {"freeze": ["trunk.*"]}])
@pytest.mark.parametrize("batch_norm", ["frozen", "adapt"])
def test_what_is_frozen_stays(
    plain: Plain, digits: MNISTDataModule, patterns: dict[str, Any], batch_norm: Any
) -> None:
    """Bit for bit, in real steps with weight decay and a validation that calls train()."""
    before = copy(plain)
    fit = trainer(
        callbacks=[LayerFreezing(**patterns, batch_norm=batch_norm)],
        limit_train_batches=6,
        limit_val_batches=1,
        val_check_interval=2,
    )
    fit.fit(plain, digits)
    moves = HEAD if batch_norm == "frozen" else HEAD | STATISTICS
    assert changed(before, plain) == moves
    assert plain.gradients == {name for name in HEAD if name.endswith(("weight", "bias"))}
    optimized = [p for group in fit.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in plain.head.parameters()}


def test_training_is_that_of_the_head_alone(plain: Plain, digits: MNISTDataModule) -> None:
    """Against a plain loop over the head, on features that a trunk in evaluation mode gives."""
    digits.setup()
    alone = Plain()
    alone.load_state_dict(plain.state_dict())
    alone.trunk.eval()
    optimizer = torch.optim.AdamW(alone.head.parameters(), lr=0.01, weight_decay=0.1)
    batches = [b for b, _ in zip(digits.train_dataloader(), range(5), strict=False)]
    for images, labels in batches:
        with torch.no_grad():
            features = alone.trunk(digits.preprocess(images))
        optimizer.zero_grad()
        F.cross_entropy(alone.head(features), labels).backward()
        optimizer.step()
    trainer(
        callbacks=[LayerFreezing(freeze=["trunk.*"])], limit_train_batches=5, limit_val_batches=0
    ).fit(plain, digits)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[name], msg=name)


def test_statistics_without_parameters_freeze_too(plain: Plain, digits: MNISTDataModule) -> None:
    plain.trunk[1] = nn.BatchNorm2d(4, affine=False)
    before = copy(plain)
    trainer(callbacks=[LayerFreezing(train=["head.*"])], limit_train_batches=2).fit(plain, digits)
    assert changed(before, plain) == HEAD


class AtEachEpoch(pl.Callback):
    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.states.append(copy(pl_module))


def test_unfreezing(
    plain: Plain, digits: MNISTDataModule, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen, seen = LayerFreezing(train=["head.*"], unfreeze_at_epoch=2), AtEachEpoch()
    order = [id(p) for part in (plain.head, plain.trunk) for p in part.parameters()]
    fit = trainer(callbacks=[frozen, seen], max_epochs=3, limit_train_batches=3)
    fit.fit(plain, digits)
    assert changed(seen.states[0], plain) == plain.state_dict().keys()
    trunk = plain.trunk.state_dict().keys()
    for name in (f"trunk.{key}" for key in trunk):
        assert seen.states[2][name].equal(seen.states[0][name])
        assert not plain.state_dict()[name].equal(seen.states[2][name])
    assert [id(p) for g in fit.optimizers[0].param_groups for p in g["params"]] == order
    assert capsys.readouterr().out.splitlines() == [
        "training head.1.*, head.2.*: 1,470 of 1,582 parameters",
        "frozen   trunk.0.*, trunk.1.*, and the statistics of 1 BatchNorm",
        "epoch 3: from here on everything trains",
    ]


@pytest.mark.parametrize("unfreeze_at_epoch", [None, 1, 2, 3])
def test_resuming_changes_nothing(
    digits: MNISTDataModule, tmp_path: Path, unfreeze_at_epoch: int | None
) -> None:
    """Four epochs at once, and two and two: the same weights, wherever the thaw lies."""
    results = []
    for resume in (False, True):
        pl.seed_everything(5, verbose=False)
        saver = ModelCheckpoint(tmp_path / str(resume), "{epoch}", save_top_k=-1)
        settings: dict[str, Any] = {
            "max_epochs": 4,
            "limit_train_batches": 3,
            "limit_val_batches": 0,
            "enable_checkpointing": True,
        }
        freezing = LayerFreezing(train=["head.*"], unfreeze_at_epoch=unfreeze_at_epoch)
        model = Plain()
        checkpoint = tmp_path / "False" / "epoch=1.ckpt" if resume else None
        trainer(callbacks=[freezing, saver], **settings).fit(
            model, digits, ckpt_path=checkpoint, weights_only=True
        )
        results.append(model)
    assert same_weights(*results)


def test_resuming_with_other_patterns_is_refused(
    plain: Plain, digits: MNISTDataModule, tmp_path: Path
) -> None:
    few = {"limit_train_batches": 1, "limit_val_batches": 0}
    first = trainer(callbacks=[LayerFreezing(train=["head.*"])], **few)
    first.fit(plain, digits)
    first.save_checkpoint(tmp_path / "a.ckpt")
    second = trainer(callbacks=[LayerFreezing(freeze=["trunk.0.*"])], max_epochs=2, **few)
    with pytest.raises(ValueError, match=r"4 parameters \(trunk.0.\*, trunk.1.\*\) frozen, now 2"):
        second.fit(plain, digits, ckpt_path=tmp_path / "a.ckpt")


def test_freezing_ends_with_the_training(plain: Plain, digits: MNISTDataModule) -> None:
    few = {"limit_train_batches": 2, "limit_val_batches": 0}
    trainer(callbacks=[LayerFreezing(train=["head.*"])], **few).fit(plain, digits)
    before = copy(plain)
    trainer(**few).fit(plain, digits)
    assert changed(before, plain) == before.keys()


@pytest.mark.parametrize(
    ("settings", "frozen"),
    [
        ({"freeze": ["second.*"]}, {"first.weight", "second.bias"}),
        ({"freeze": ["second.weight"]}, {"first.weight"}),
        ({"train": ["second.*"]}, {"first.bias"}),
        ({"train": ["first.*"]}, {"second.bias"}),
    ],
)
def test_a_shared_parameter_has_two_names(settings: dict[str, Any], frozen: set[str]) -> None:
    module = nn.ModuleDict({"first": nn.Linear(3, 3), "second": nn.Linear(3, 3)})
    module["second"].weight = module["first"].weight
    assert LayerFreezing(**settings).choose(module).keys() == frozen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ["net.layer5.*"]}, r"'net.layer5.\*'; there are: net.hidden1.\*, net.output.\*"),
        ({"freeze": ["net.hidden1.*", "Net.*"]}, r"no parameter matches 'Net.\*'"),
        ({"freeze": ["*"]}, "nothing to train"),
    ],
)
def test_bad_patterns(digits: MNISTDataModule, settings: dict[str, Any], message: str) -> None:
    fit = trainer(callbacks=[LayerFreezing(**settings)])
    with pytest.raises(ValueError, match=message):
        fit.fit(ShallowNetwork(), digits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ["a"], "freeze": ["b"]}, "not both"),
        ({"batch_norm": "off"}, "frozen or adapt, got 'off'"),
        ({"unfreeze_at_epoch": 0}, "at least 1, got 0"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerFreezing(**settings)


def test_unfreezing_in_several_processes_is_refused(plain: Plain) -> None:
    """DistributedDataParallel would leave the gradients of what is thawed unsynchronized."""
    freezing = LayerFreezing(train=["head.*"], unfreeze_at_epoch=1)
    with pytest.raises(ValueError, match="not in 2"):
        freezing.setup(SimpleNamespace(world_size=2), plain, "fit")  # type: ignore[arg-type]


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For every model: here the hidden layer of the shallow network keeps its first weights."""
    monkeypatch.chdir(tmp_path)
    words = "fit --config shallow.yaml --data.source digits --freezing.train+ net.output.*"
    for epochs in (1, 2):
        assert main([*words.split(), "--trainer.max_epochs", str(epochs)]) == 0
    out = capsys.readouterr().out
    assert out.count("training net.output.*: 1,010 of 79,510 parameters") == 2
    runs = [tmp_path / "lightning_logs" / "shallow" / f"version_{n}" for n in (0, 1)]
    one, two = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in runs
    )
    assert one["net.hidden1.weight"].equal(two["net.hidden1.weight"])
    assert not one["net.output.weight"].equal(two["net.output.weight"])
    saved = yaml.safe_load((runs[0] / "config.yaml").read_text())
    assert saved["freezing"]["train"] == ["net.output.*"]
    last = str(runs[0] / "checkpoints" / "last.ckpt")
    assert main(["fit", "--ckpt_path", last, "--trainer.max_epochs", "2"]) == 0
    resumed = torch.load(last, weights_only=True)["state_dict"]
    assert all(torch.equal(resumed[name], two[name]) for name in two)
    monkeypatch.chdir(tmp_path.parent)  # a wrong pattern shows before a run's folder is made
    assert main("fit --config shallow --data.source digits --freezing.train+ net.fc.*".split()) == 1
    assert "no parameter matches 'net.fc.*'; there are: net.hidden1.*" in capsys.readouterr().err
    assert not (tmp_path.parent / "lightning_logs").exists()
