"""Tests layer freezing by the results of trainings: weights, statistics, optimizers."""

import signal
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import same_weights, trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

from mnist_lightning import LayerFreezing, MNISTDataModule, ShallowNetwork
from mnist_lightning.__main__ import main

Select = Callable[[nn.Module], Iterable[nn.Parameter]]
Configure = Callable[["Plain", Select], Any]


def everything(part: nn.Module) -> Iterable[nn.Parameter]:
    return part.parameters()


def trainable(part: nn.Module) -> Iterable[nn.Parameter]:
    return [p for p in part.parameters() if p.requires_grad]


def filtered(part: nn.Module) -> Iterable[nn.Parameter]:
    return filter(lambda p: p.requires_grad, part.parameters())


def one_group(module: "Plain", select: Select) -> Any:
    return AdamW(select(module), lr=0.01, weight_decay=0.1)


def groups(module: "Plain", select: Select) -> Any:
    slow = {"params": select(module.trunk), "lr": 0.002, "weight_decay": 0.3}
    return AdamW([{"params": select(module.head)}, slow], lr=0.01, weight_decay=0.1)


def scheduled(module: "Plain", select: Select) -> Any:
    optimizer = groups(module, select)
    return {"optimizer": optimizer, "lr_scheduler": ExponentialLR(optimizer, 0.7)}


def on_plateau(module: "Plain", select: Select) -> Any:
    optimizer = groups(module, select)
    # The loss never falls by the threshold, so each group has its min_lr after one epoch. Later,
    # resuming would change the weights even without freezing: Lightning saves before this step.
    scheduler = ReduceLROnPlateau(optimizer, patience=0, threshold=10.0, min_lr=[0.004, 0.0002])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}


def state_from_the_start(module: "Plain", select: Select) -> Any:
    return Adagrad(select(module), lr=0.01, initial_accumulator_value=0.1)


CONFIGURATIONS = [one_group, groups, scheduled, on_plateau, state_from_the_start]


class Plain(pl.LightningModule):
    """A module without this project's classes, with weight decay and two parameter groups."""

    def __init__(self, configure: Configure = groups, select: Select = everything) -> None:
        super().__init__()
        self.configure, self.select = configure, select
        self.trunk = nn.Sequential(nn.Conv2d(1, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(144, 10), nn.BatchNorm1d(10))
        self.gradients: set[str] = set()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self(batch[0])

    def on_validation_model_train(self) -> None:
        self.train()  # as modules written for older versions of Lightning do

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gradients |= {name for name, p in self.named_parameters() if p.grad is not None}

    def configure_optimizers(self) -> Any:
        return self.configure(self, self.select)


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
    """Bit-identical, in real steps with weight decay and a validation that calls train()."""
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
    """Equals a plain loop over the head, on the features of a trunk in evaluation mode."""
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


@pytest.mark.parametrize("batch_norm", ["frozen", "adapt"])
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4, affine=False),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm([4, 6, 6]),
    ],
    ids=str,
)
def test_every_norm_layer(
    plain: Plain, digits: MNISTDataModule, norm: nn.Module, batch_norm: Any
) -> None:
    plain.trunk[1] = deepcopy(norm)
    before, few = copy(plain), {"limit_train_batches": 2, "limit_val_batches": 0}
    freezing = LayerFreezing(train=["head.*"], batch_norm=batch_norm)
    trainer(callbacks=[freezing], **few).fit(plain, digits)
    moves = STATISTICS & before.keys() if batch_norm == "adapt" else set()
    if isinstance(norm, nn.InstanceNorm2d):
        moves -= {"trunk.1.num_batches_tracked"}  # InstanceNorm never updates it
    assert changed(before, plain) == HEAD | moves
    assert all(layer.training for layer in plain.modules())


def test_layers_replaced_after_setup(digits: MNISTDataModule) -> None:
    """As ``Trainer(sync_batchnorm=True)`` does in several processes, at about this point."""

    class Synchronized(Plain):
        def configure_model(self) -> None:
            nn.SyncBatchNorm.convert_sync_batchnorm(self)

    module = Synchronized()
    before, few = copy(module), {"limit_train_batches": 2, "limit_val_batches": 0}
    trainer(callbacks=[LayerFreezing(train=["head.*"])], **few).fit(module, digits)
    assert isinstance(module.trunk[1], nn.SyncBatchNorm)
    assert changed(before, module) == HEAD


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
        "frozen   trunk.0.*, trunk.1.*, and the statistics of its norm layers (1)",
        "epoch 3: from here on everything trains",
    ]


@pytest.mark.parametrize("select", [everything, trainable, filtered])
def test_what_thaws_trains_like_a_plain_loop(plain: Plain, select: Select) -> None:
    """From the third epoch on, with the learning rate and weight decay of its group."""
    batches = [(torch.randn(16, 1, 28, 28), torch.randint(10, (16,))) for _ in range(3)]
    alone = deepcopy(plain)
    head = AdamW(alone.head.parameters(), lr=0.01, weight_decay=0.1)
    trunk = AdamW(alone.trunk.parameters(), lr=0.002, weight_decay=0.3)
    for epoch in range(4):
        alone.trunk.train(epoch >= 2)
        for images, labels in batches:
            alone.zero_grad()
            F.cross_entropy(alone(images), labels).backward()
            for optimizer in (head, trunk) if epoch >= 2 else (head,):
                optimizer.step()
    plain.select = select
    freezing = LayerFreezing(train=["head.*"], unfreeze_at_epoch=2)
    trainer(callbacks=[freezing], max_epochs=4).fit(plain, DataLoader(batches, batch_size=None))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[name], msg=name)


@pytest.mark.parametrize("configure", CONFIGURATIONS)
def test_optimizers_of_what_trains_end_as_those_of_everything(
    digits: MNISTDataModule, configure: Configure
) -> None:
    """Weights, groups and learning rates do not depend on how the module selects parameters."""
    results, rates = [], []
    for select in (everything, trainable):
        pl.seed_everything(5, verbose=False)
        module = Plain(configure, select)
        few = {"max_epochs": 3, "limit_train_batches": 3, "limit_val_batches": 0}
        fit = trainer(callbacks=[LayerFreezing(train=["head.*"], unfreeze_at_epoch=1)], **few)
        fit.fit(module, digits)
        results.append(module)
        rates.append([(len(g["params"]), g["lr"]) for g in fit.optimizers[0].param_groups])
    assert same_weights(*results)
    assert rates[0] == rates[1]


def test_what_could_never_train_is_refused(plain: Plain, digits: MNISTDataModule) -> None:
    plain.configure = lambda module, _: SGD(module.head.parameters(), lr=0.01)
    few = {"limit_train_batches": 1, "limit_val_batches": 0}
    freezing = LayerFreezing(train=["head.*"], unfreeze_at_epoch=1)
    with pytest.raises(ValueError, match=r"no optimizer holds trunk.0.\*, trunk.1.\*, so"):
        trainer(callbacks=[freezing], **few).fit(plain, digits)
    plain.trunk.requires_grad_(False)  # the remedy in the message
    trainer(callbacks=[freezing], **few).fit(plain, digits)


def test_unfreezing_a_network_that_could_be_fused(digits: MNISTDataModule) -> None:
    module, seen = ShallowNetwork(hidden_units=8), AtEachEpoch()
    freezing = LayerFreezing(train=["net.output.*"], unfreeze_at_epoch=1)
    trainer(callbacks=[freezing, seen], max_epochs=2).fit(module, digits)
    hidden = {"net.hidden1.weight", "net.hidden1.bias"}
    first, second = seen.states
    assert all(first[name].equal(second[name]) for name in hidden)
    assert hidden <= changed(second, module)


@pytest.mark.parametrize("select", [everything, trainable])
@pytest.mark.parametrize("configure", CONFIGURATIONS)
@pytest.mark.parametrize("unfreeze_at_epoch", [None, 1, 2, 3])
def test_resuming_changes_nothing(
    digits: MNISTDataModule,
    tmp_path: Path,
    unfreeze_at_epoch: int | None,
    configure: Configure,
    select: Select,
) -> None:
    """Four epochs equal two and two, in every position of the unfreezing."""
    results = []
    for resume in (False, True):
        pl.seed_everything(5, verbose=False)
        saver = ModelCheckpoint(tmp_path / str(resume), "{epoch}", save_top_k=-1)
        settings: dict[str, Any] = {
            "max_epochs": 4,
            "limit_train_batches": 2,
            "limit_val_batches": 0,
            "enable_checkpointing": True,
        }
        freezing = LayerFreezing(train=["head.*"], unfreeze_at_epoch=unfreeze_at_epoch)
        model = Plain(configure, select)
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


@pytest.mark.parametrize("unfreeze_at_epoch", [None, 1])
@pytest.mark.parametrize("select", [everything, trainable])
def test_what_the_user_froze_stays_frozen(
    plain: Plain,
    digits: MNISTDataModule,
    capsys: pytest.CaptureFixture[str],
    unfreeze_at_epoch: int | None,
    select: Select,
) -> None:
    """One layer by requires_grad, one by evaluation mode; during the training and after it."""
    plain.select = select
    plain.trunk[0].requires_grad_(False)
    plain.trunk[1].eval()
    before, few = copy(plain), {"limit_train_batches": 2, "limit_val_batches": 0}
    freezing = LayerFreezing(train=["head.*"], unfreeze_at_epoch=unfreeze_at_epoch)
    trainer(callbacks=[freezing], max_epochs=2, **few).fit(plain, digits)
    thawed = {"trunk.1.weight", "trunk.1.bias"} if unfreeze_at_epoch else set()
    assert changed(before, plain) == HEAD | thawed
    assert {n for n, p in plain.named_parameters() if not p.requires_grad} == {
        "trunk.0.weight",
        "trunk.0.bias",
    }
    assert {n for n, layer in plain.named_modules() if not layer.training} == {"trunk.1"}
    said = "epoch 2: from here on everything trains, except trunk.0.*"
    assert (said in capsys.readouterr().out) == bool(unfreeze_at_epoch)


@pytest.mark.parametrize("val_check_interval", [1, 2])  # before the last mini-batch, after it
def test_who_calls_train_means_the_frozen_layers_too(
    plain: Plain, digits: MNISTDataModule, val_check_interval: int
) -> None:
    """``Plain`` calls it after a validation: the layers are then in training mode in the end."""
    plain.eval()
    trainer(
        callbacks=[LayerFreezing(train=["head.*"])],
        limit_train_batches=2,
        limit_val_batches=1,
        val_check_interval=val_check_interval,
    ).fit(plain, digits)
    assert all(layer.training for layer in plain.modules())


class Fails(pl.Callback):
    """Raises an error in one of the hooks."""

    def __init__(self, hook: str, error: BaseException) -> None:
        self.error = error
        setattr(self, hook, self.fail)

    def fail(self, *_: object, **__: object) -> None:
        raise self.error


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Restores the handler: after an interrupt, Lightning ignores all further ones."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_batch_end"])
@pytest.mark.parametrize(
    ("error", "raised"), [(RuntimeError("no"), RuntimeError), (KeyboardInterrupt(), SystemExit)]
)
def test_an_exception_ends_the_freezing(
    plain: Plain, digits: MNISTDataModule, hook: str, error: BaseException, raised: Any
) -> None:
    few = {"limit_train_batches": 2, "limit_val_batches": 0}
    fit = trainer(callbacks=[LayerFreezing(train=["head.*"]), Fails(hook, error)], **few)
    with pytest.raises(raised):
        fit.fit(plain, digits)
    assert all(p.requires_grad for p in plain.parameters())
    before = copy(plain)
    trainer(**few).fit(plain, digits)
    assert changed(before, plain) == before.keys()


def test_a_checkpoint_of_an_exception_says_what_was_frozen(
    plain: Plain, digits: MNISTDataModule, tmp_path: Path
) -> None:
    few = {"limit_train_batches": 2, "limit_val_batches": 0}
    freezing, saver = LayerFreezing(train=["head.*"]), OnExceptionCheckpoint(tmp_path, "a")
    fails = Fails("on_train_batch_end", RuntimeError("no"))
    fit = trainer(callbacks=[freezing, fails, saver], enable_checkpointing=True, **few)
    with pytest.raises(RuntimeError):
        fit.fit(plain, digits)
    before = copy(plain)
    resumed = trainer(callbacks=[LayerFreezing(train=["head.*"])], **few)
    resumed.fit(plain, digits, ckpt_path=saver.ckpt_path, weights_only=True)
    assert changed(before, plain) == HEAD


def test_a_training_that_never_began_changes_nothing(plain: Plain, digits: MNISTDataModule) -> None:
    """The callback does not apply what it stored in the training before."""
    few = {"limit_train_batches": 1, "limit_val_batches": 0}
    freezing = LayerFreezing(train=["head.*"])
    trainer(callbacks=[freezing], **few).fit(plain, digits)
    plain.trunk.requires_grad_(False).eval()
    with pytest.raises(RuntimeError, match="no"):
        trainer(callbacks=[Fails("setup", RuntimeError("no")), freezing]).fit(plain, digits)
    freezing.train = ["tail.*"]
    with pytest.raises(ValueError, match="no parameter matches"):
        trainer(callbacks=[freezing]).fit(plain, digits)
    assert not any(p.requires_grad for p in plain.trunk.parameters())
    assert not any(layer.training for layer in plain.trunk.modules())
    assert all(p.requires_grad for p in plain.head.parameters())


def test_one_callback_in_several_trainings(plain: Plain, digits: MNISTDataModule) -> None:
    """The same Trainer twice, with a validation between, then another Trainer and module."""
    few = {"limit_train_batches": 2, "limit_val_batches": 1}
    freezing = LayerFreezing(train=["head.*"])
    fit = trainer(callbacks=[freezing], **few)
    for epochs in (1, 2):
        before = copy(plain)
        fit.fit_loop.max_epochs = epochs
        fit.fit(plain, digits)
        assert changed(before, plain) == HEAD
        before = copy(plain)
        fit.validate(plain, digits, verbose=False)
        assert not changed(before, plain)
        assert all(p.requires_grad for p in plain.parameters())
        assert all(layer.training for layer in plain.modules())
    other = Plain()
    first = copy(other)
    trainer(callbacks=[freezing], **few).fit(other, digits)
    assert changed(first, other) == HEAD
    assert not changed(before, plain)


def test_a_second_training_with_the_same_trainer_thaws_in_its_turn(
    plain: Plain, digits: MNISTDataModule
) -> None:
    few = {"limit_train_batches": 2, "limit_val_batches": 0}
    plain.select = trainable
    fit = trainer(callbacks=[LayerFreezing(train=["head.*"], unfreeze_at_epoch=1)], **few)
    for epochs, moves in ((1, HEAD), (2, plain.state_dict().keys())):
        before = copy(plain)
        fit.fit_loop.max_epochs = epochs
        fit.fit(plain, digits)
        assert changed(before, plain) == moves


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
    """DistributedDataParallel would not synchronize the gradients of unfrozen parameters."""
    freezing = LayerFreezing(train=["head.*"], unfreeze_at_epoch=1)
    with pytest.raises(ValueError, match="not in 2"):
        freezing.setup(SimpleNamespace(world_size=2), plain, "fit")  # type: ignore[arg-type]


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It works for every model: the hidden layer of a shallow network keeps its first weights."""
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
