"""Compares the options of the training with plain PyTorch: optimizers, schedules, losses."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import same_weights, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.utils.data import DataLoader, TensorDataset

from mnist_lightning import (
    Classifier,
    ConvNetwork,
    DeepNetwork,
    Execution,
    MNISTDataModule,
    Perceptron,
    ResNet18,
    ShallowNetwork,
)
from mnist_lightning.data.sampling import epoch_order
from mnist_lightning.models.optimization import draw_mixup, inverse_frequencies, schedule_factor
from mnist_lightning.nets import ACTIVATIONS, mlp
from mnist_lightning.search.plan import PLAIN, Search
from mnist_lightning.training.callbacks import SafePoints
from mnist_lightning.training.stacked import SGD

STEPS = 81  # of an epoch: 1,294 training images in mini-batches of 16


def _data() -> MNISTDataModule:
    return MNISTDataModule(source="digits", batch_size=16)


def _fit(model: Classifier, *callbacks: Callback, **settings: Any) -> pl.Trainer:
    pl.seed_everything(5, verbose=False)
    fit = trainer(
        **{"max_epochs": 2, "callbacks": [Execution(fused=False), *callbacks], **settings}
    )
    fit.fit(model, _data(), ckpt_path=settings.pop("ckpt_path", None))
    return fit


def _loop(net: nn.Module, optimizer: Any, loss: Any, schedule: Any = None, mix: Any = None) -> None:
    """Two epochs of plain PyTorch on the same mini-batches."""
    data = _data()
    data.setup()
    images, labels = data.train_set.images, data.train_set.labels
    for epoch in range(2):
        for step, rows in enumerate(epoch_order(len(labels), 5, epoch).split(16)):
            x, y = images[rows].unsqueeze(1).float() / 255, labels[rows]
            optimizer.zero_grad()
            (mix(net, x, y, epoch, step) if mix else loss(net(x), y)).backward()
            optimizer.step()
            if schedule:
                schedule.step()


def _groups(net: nn.Module, decay: float) -> list[dict[str, Any]]:
    weights = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim < 2]
    return [{"params": weights, "weight_decay": decay}, {"params": others, "weight_decay": 0}]


OPTIMIZERS = {
    "momentum": ({"momentum": 0.9}, lambda net: torch.optim.SGD(net.parameters(), 0.01, 0.9)),
    "nesterov": (
        {"momentum": 0.8, "nesterov": True},
        lambda net: torch.optim.SGD(net.parameters(), 0.01, 0.8, nesterov=True),
    ),
    "weight decay": ({"weight_decay": 0.1}, lambda net: torch.optim.SGD(_groups(net, 0.1), 0.01)),
    "momentum and weight decay": (
        {"momentum": 0.9, "weight_decay": 0.1},
        lambda net: torch.optim.SGD(_groups(net, 0.1), 0.01, 0.9),
    ),
    "adam": (
        {"optimizer": "adam", "weight_decay": 0.1},
        lambda net: torch.optim.Adam(_groups(net, 0.1), 0.01, fused=True),
    ),
    "adamw": (
        {"optimizer": "adamw", "weight_decay": 0.1},
        lambda net: torch.optim.AdamW(_groups(net, 0.1), 0.01, fused=True),
    ),
    "adamw's own decay": (
        {"optimizer": "adamw"},
        lambda net: torch.optim.AdamW(net.parameters(), 0.01, fused=True),
    ),
    "adamw without decay": (
        {"optimizer": "adamw", "weight_decay": 0.0},
        lambda net: torch.optim.AdamW(net.parameters(), 0.01, fused=True, weight_decay=0.0),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_equal_a_plain_loop(name: str) -> None:
    """Also with batch normalisation, whose weights do not decay."""
    options, make = OPTIMIZERS[name]
    model = ShallowNetwork(20, lr=0.01, batch_norm=True, **options)
    net = copy.deepcopy(model.net)
    _fit(model)
    _loop(net, make(net), F.cross_entropy)
    assert same_weights(model.net, net)


class Default:
    """A model with PyTorch's default Adam or AdamW, which is not fused."""

    def configure_optimizers(self: Any) -> Any:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimizer]
        return kind(self.parameters(), self.lr)


class DefaultDeep(Default, DeepNetwork):
    pass


class DefaultConv(Default, ConvNetwork):
    pass


class DefaultResNet(Default, ResNet18):
    pass


ADAMS = {
    "deep, adam": (DeepNetwork, DefaultDeep, {"hidden_units": [20, 10], "optimizer": "adam"}),
    "deep, adamw": (DeepNetwork, DefaultDeep, {"hidden_units": [20, 10], "optimizer": "adamw"}),
    "conv, adamw": (ConvNetwork, DefaultConv, {"widths": [4, 8]}),
    "resnet, adam": (ResNet18, DefaultResNet, {}),
}


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ADAMS)
def test_fused_adam_equals_the_default_one(name: str, precision: str, clip: float | None) -> None:
    """Also with clipped gradients in mixed precision, which Lightning refuses to a fused one."""
    ours, plain, options = ADAMS[name]
    # rounding grows from step to step in a deep network
    trained, steps, lr = [], 1 if ours is ResNet18 else 3, 0.001
    for kind in (ours, plain):
        pl.seed_everything(0, verbose=False)
        model = kind(**options, lr=lr)
        settings = {"precision": precision, "gradient_clip_val": clip, "max_steps": steps}
        fit = _fit(model, **settings, limit_val_batches=0)
        trained.append((model, bool(fit.optimizers[0].param_groups[0]["fused"])))
    (model, fused), (other, other_fused) = trained
    assert fused
    assert not other_fused
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        # the mean, since where a gradient is nearly 0, rounding decides on the direction of a step
        assert (ours - theirs).abs().mean() < 0.01 * lr


def test_the_perceptrons_biases_do_not_decay() -> None:
    model = Perceptron(weight_decay=0.5)
    fit = _fit(model, max_steps=1)
    groups = fit.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert groups[1]["params"][0] is model.net.b


class Rates(Callback):
    """Records the learning rate of each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def _oracle(make: Any, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


SCHEDULES = {
    "cosine": ({"schedule": "cosine"}, lambda o: lrs.CosineAnnealingLR(o, 2 * STEPS)),
    "step": (
        {"schedule": "step"},
        lambda o: lrs.MultiStepLR(o, [STEPS, math.ceil(1.5 * STEPS)], 0.1),
    ),
    "warm-up": (
        {"warmup_epochs": 0.5},
        lambda o: lrs.LinearLR(o, 1 / 40, 1, total_iters=39),
    ),
    "cosine after a warm-up": (
        {"schedule": "cosine", "warmup_epochs": 1},
        lambda o: lrs.SequentialLR(
            o,
            [lrs.LinearLR(o, 1 / STEPS, 1, STEPS - 1), lrs.CosineAnnealingLR(o, STEPS)],
            [STEPS],
        ),
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in")
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_pytorchs(name: str) -> None:
    options, make = SCHEDULES[name]
    rates = Rates()
    _fit(ShallowNetwork(5, lr=0.1, **options), rates)
    assert rates.rates == pytest.approx(_oracle(make, 2 * STEPS), rel=1e-9)


def test_schedules_end_with_the_training() -> None:
    """Also if steps end it, or if several mini-batches make a step."""
    rates = Rates()
    _fit(ShallowNetwork(5, schedule="cosine"), rates, max_epochs=-1, max_steps=30)
    assert rates.rates == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * t / 30)) for t in range(30)]
    )
    rates = Rates()
    model = ShallowNetwork(5, lr=1.0, warmup_epochs=1)
    _fit(model, rates, accumulate_grad_batches=4, max_epochs=-1, max_steps=30)
    assert rates.rates[::4][:21] == pytest.approx([(t + 1) / 21 for t in range(21)])
    with pytest.raises(ValueError, match="schedule step needs a last step: set max_epochs"):
        _fit(ShallowNetwork(5, schedule="step"), max_epochs=-1)


@pytest.mark.parametrize("steps", [1, 2, 3, 100])
def test_factors_are_from_0_to_1(steps: int) -> None:
    for name in ("constant", "cosine", "one_cycle", "step"):
        for warmup in (0, 1, steps, 2 * steps):
            factors = [schedule_factor(name, steps, warmup)(t) for t in range(steps + 1)]
            assert all(0 <= factor <= 1 for factor in factors)


def _soft(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Label smoothing, written out."""
    target = F.one_hot(labels, 10) * 0.8 + 0.2 / 10
    return -(target * scores.log_softmax(1)).sum(1).mean()


def test_label_smoothing_is_of_the_training_loss_alone() -> None:
    model = ShallowNetwork(20, lr=0.1, label_smoothing=0.2)
    net = copy.deepcopy(model.net)
    fit = _fit(model)
    _loop(
        net,
        torch.optim.SGD(net.parameters(), 0.1),
        lambda scores, labels: F.cross_entropy(scores, labels, label_smoothing=0.2),
    )
    assert same_weights(model.net, net)
    data = _data()
    data.setup()
    with torch.no_grad():
        scores = net(data.preprocess(data.val_set.images))
        plain = F.cross_entropy(scores, data.val_set.labels)
        assert fit.callback_metrics["val/loss"] == pytest.approx(float(plain), rel=1e-5)
        smoothed = model._training_loss(scores, data.val_set.labels)
        torch.testing.assert_close(smoothed, _soft(scores, data.val_set.labels))


def test_class_weights_are_inverse_to_the_numbers_of_training_images() -> None:
    data = _data()
    data.setup()
    counts = np.bincount(data.train_set.labels, minlength=10)
    weights = torch.tensor(1 / counts / (1 / counts).mean(), dtype=torch.float32)
    assert weights.mean() == pytest.approx(1)
    model = ShallowNetwork(20, lr=0.1, class_weights="auto")
    net = copy.deepcopy(model.net)
    _fit(model)
    _loop(
        net,
        torch.optim.SGD(net.parameters(), 0.1),
        lambda scores, labels: F.cross_entropy(scores, labels, weights),
    )
    for one, other in zip(model.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(
        inverse_frequencies(torch.tensor([0, 0, 0, 2]), 4), torch.tensor([0.5, 0, 1.5, 0])
    )


class NoLabels(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        images = TensorDataset(torch.rand(4, 1, 28, 28), torch.arange(4))
        return DataLoader(images, batch_size=4)


def test_class_weights_need_labels() -> None:
    model = ShallowNetwork(5, class_weights="auto")
    with pytest.raises(ValueError, match=r"class_weights auto counts the labels .* leave"):
        trainer(max_epochs=1, limit_val_batches=0).fit(model, NoLabels())


def test_mixup_equals_a_plain_loop_over_mixed_targets() -> None:
    """The loss of the two labels is the cross entropy with the mixed one-hot target."""
    model = ShallowNetwork(20, lr=0.1, mixup=0.4)
    net = copy.deepcopy(model.net)
    _fit(model)

    def mixed(net: nn.Module, x: torch.Tensor, y: torch.Tensor, *place: int) -> torch.Tensor:
        share, partners = draw_mixup(0.4, len(y), 5, *place, 0)
        target = share * F.one_hot(y, 10).float() + (1 - share) * F.one_hot(y[partners], 10)
        return F.cross_entropy(net(share * x + (1 - share) * x[partners]), target)

    _loop(net, torch.optim.SGD(net.parameters(), 0.1), None, mix=mixed)
    for one, other in zip(model.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_mixup_draws_from_beta_and_differs_from_step_to_step() -> None:
    draws = [draw_mixup(0.2, 8, 0, 0, step, 0) for step in range(2000)]
    shares = np.array([share for share, _ in draws])
    # Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2 a + 1))
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * 1.4), rel=0.05)
    assert len({tuple(partners.tolist()) for _, partners in draws}) > 1900
    assert draw_mixup(0.2, 8, 1, 2, 3, 0)[0] == draw_mixup(0.2, 8, 1, 2, 3, 0)[0]


CASES: dict[str, Any] = {
    "mixup": lambda: ShallowNetwork(20, mixup=0.4),
    "momentum": lambda: ShallowNetwork(20, lr=0.01, momentum=0.9, nesterov=True),
    "weight decay": lambda: DeepNetwork([20, 10], momentum=0.9, weight_decay=0.01),
    "one_cycle": lambda: ShallowNetwork(20, schedule="one_cycle"),
    "cosine": lambda: ShallowNetwork(20, schedule="cosine", warmup_epochs=0.3),
    "dropout": lambda: ShallowNetwork(20, dropout=0.3, batch_norm=True, activation="gelu"),
    "all": lambda: DeepNetwork(
        [20, 10], optimizer="adamw", lr=0.002, weight_decay=0.05, schedule="one_cycle",
        label_smoothing=0.1, mixup=0.2, class_weights="auto", dropout=0.1, batch_norm=True,
    ),
}  # fmt: skip


class Cut(Exception):
    pass


class CutsIn(Callback):
    """Ends a training in the middle of its second epoch, at the next save."""

    def on_save_checkpoint(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step > 1.7 * STEPS:
            raise Cut


@pytest.mark.parametrize("case", CASES)
def test_a_restart_within_an_epoch_is_bit_equal(case: str, tmp_path: Path) -> None:
    """Weights, metrics and the optimizer's state."""

    def train(steps: int, *more: Callback, ckpt_path: Path | None = None) -> Any:
        pl.seed_everything(0, verbose=False)
        model = CASES[case]()
        saver = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
        callbacks = [Execution(steps), SafePoints(0), saver, *more]
        fit = trainer(max_epochs=3, enable_checkpointing=True, callbacks=callbacks)
        fit.fit(model, _data(), ckpt_path=ckpt_path, weights_only=True)
        return model, fit

    whole, straight = train(20)
    with pytest.raises(Cut):
        train(20, CutsIn())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert STEPS < saved["global_step"] < 2 * STEPS
    torch.rand(7)
    resumed, fit = train(20, ckpt_path=tmp_path / "last.ckpt")
    assert same_weights(whole, resumed)
    assert fit.callback_metrics == straight.callback_metrics
    one, other = (t.optimizers[0].state_dict() for t in (straight, fit))
    assert one["param_groups"] == other["param_groups"]
    for index, state in one["state"].items():
        for name, value in state.items():
            assert (value is None) or torch.equal(value, other["state"][index][name])


@pytest.mark.parametrize("case", ["mixup", "dropout", "all", "one_cycle"])
def test_the_number_of_steps_in_an_execution_changes_nothing(case: str) -> None:
    trained = []
    for steps in (1, 7, 256):
        pl.seed_everything(0, verbose=False)
        model = CASES[case]()
        trainer(max_epochs=2, callbacks=[Execution(steps)]).fit(model, _data())
        trained.append(model)
    assert same_weights(trained[0], trained[1])
    assert same_weights(trained[0], trained[2])


OPTIONS = {
    "momentum": 0.5, "nesterov": True, "weight_decay": 0.1, "schedule": "cosine",
    "warmup_epochs": 0.5, "label_smoothing": 0.1, "mixup": 0.2, "class_weights": "auto",
}  # fmt: skip


def test_options_are_hyper_parameters_of_the_checkpoint(tmp_path: Path) -> None:
    model = DeepNetwork([8, 6], dropout=0.2, batch_norm=True, activation="silu", **OPTIONS)
    fit = trainer(max_steps=2, limit_val_batches=0)
    fit.fit(model, _data())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    loaded = DeepNetwork.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.hparams == model.hparams
    assert {name: loaded.hparams[name] for name in OPTIONS} == OPTIONS
    assert {name: getattr(loaded, name) for name in OPTIONS} == OPTIONS
    assert str(loaded.net) == str(model.net)
    assert same_weights(loaded, model)


class My(Classifier):
    """A user's model, without options."""

    def __init__(self, width: int = 5) -> None:
        super().__init__(mlp(784, [width], 10), 0.1, "sgd")


class Fixed(Classifier):
    """A user's model that sets an option itself."""

    def __init__(self, width: int = 5) -> None:
        super().__init__(mlp(784, [width], 10), 0.1, "sgd", momentum=0.9, schedule="cosine")


@pytest.mark.parametrize("kind", [My, Fixed])
def test_a_users_model_needs_no_options(kind: type, tmp_path: Path) -> None:
    model = kind(6)
    fit = trainer(max_epochs=1)
    fit.fit(model, _data())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    assert dict(model.hparams) == {"width": 6}
    assert same_weights(kind.load_from_checkpoint(tmp_path / "a.ckpt"), model)
    resumed = trainer(max_epochs=2)
    resumed.fit(kind(6), _data(), ckpt_path=tmp_path / "a.ckpt")
    assert resumed.global_step == 2 * STEPS


def _resumed(tmp_path: Path, before: dict[str, Any], after: dict[str, Any]) -> Any:
    first = trainer(max_epochs=1)
    first.fit(ShallowNetwork(5, **before), _data())
    first.save_checkpoint(tmp_path / "a.ckpt")
    second = trainer(max_epochs=2)
    second.fit(ShallowNetwork(5, **after), _data(), ckpt_path=tmp_path / "a.ckpt")
    return second.optimizers[0].param_groups


def test_new_options_win_over_the_checkpoints(tmp_path: Path) -> None:
    (group,) = _resumed(tmp_path, {}, {"momentum": 0.5, "nesterov": True})
    assert (group["momentum"], group["nesterov"]) == (0.5, True)
    (group,) = _resumed(tmp_path, {"momentum": 0.9}, {"momentum": 0.0})
    assert group["momentum"] == 0
    groups = _resumed(tmp_path, {"weight_decay": 0.1}, {"weight_decay": 0.2})
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"weight_decay": 0.1}, "weight_decay None cannot resume with 0.1"),
        ({"weight_decay": 0.1}, {}, "weight_decay 0.1 cannot resume with None"),
        ({}, {"schedule": "cosine"}, "schedule constant cannot resume with cosine"),
        ({}, {"warmup_epochs": 1.0}, "warmup_epochs 0.0 cannot resume with 1.0"),
    ],
)
def test_refuses_to_resume(before: Any, after: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _resumed(tmp_path, before, after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "momentum must be from 0 to below 1, got 1.0"),
        ({"momentum": -0.1}, "momentum must be from 0 to below 1"),
        ({"momentum": math.nan}, "momentum must be from 0 to below 1, got nan"),
        ({"momentum": 0.9, "optimizer": "adam"}, "momentum 0.9 is for optimizer sgd; adam has"),
        ({"nesterov": True}, "nesterov needs a momentum"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more, got -1.0"),
        ({"schedule": "linear"}, "schedule must be one of constant, cosine, one_cycle, step"),
        ({"warmup_epochs": -1.0}, "warmup_epochs must be 0 or more"),
        ({"warmup_epochs": 1.0, "schedule": "one_cycle"}, "one_cycle rises by itself"),
        ({"label_smoothing": 1.0}, "label_smoothing must be from 0 to below 1"),
        ({"mixup": -0.2}, "mixup must be 0 or more, got -0.2"),
        ({"mixup": math.inf}, "mixup must be 0 or more, got inf"),
        ({"class_weights": "some"}, "class_weights must be one of none, auto"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1, got 1.0"),
        ({"activation": "reLU"}, "activation must be one of relu, leaky_relu, gelu"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShallowNetwork(5, **options)


@pytest.mark.parametrize("name", ["label_smoothing", "mixup", "class_weights"])
def test_a_loss_of_its_own_has_no_options(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} changes .* Perceptron has a loss of its own"):
        Perceptron(**{name: OPTIONS[name]})


def test_resnet_keeps_its_defaults() -> None:
    model = ResNet18(momentum=0.9, optimizer="sgd")
    assert (model.lr, model.momentum, model.schedule) == (0.01, 0.9, "constant")
    assert ResNet18().optimizer == "adam"


def test_the_layers_of_a_network() -> None:
    assert [name for name, _ in mlp(4, [3, 2], 2).named_children()] == [
        *("flatten", "hidden1", "relu1", "hidden2", "relu2", "output")
    ]
    net = mlp(4, [3], 2, dropout=0.5, batch_norm=True, activation="tanh")
    assert [name for name, _ in net.named_children()] == [
        *("flatten", "hidden1", "norm1", "tanh1", "dropout1", "output")
    ]
    for name, kind in ACTIVATIONS.items():
        assert type(mlp(4, [3], 2, activation=name)[2]) is kind


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name, value in OPTIONS.items() if name not in SGD._fields],
        ("dropout", 0.1),
        ("batch_norm", True),
        ("activation", "tanh"),
    ],
)
def test_a_search_has_options_as_axes_and_trains_these_alone(name: str, value: Any) -> None:
    search = Search("s", "ShallowNetwork", {name: [PLAIN[name], value]}, fixed={"max_epochs": 1})
    search.check()
    assert search.hidden_units({"max_epochs": 1}) == (100,)
    assert search.hidden_units({"hidden_units": 7, "lr": 0.3, name: PLAIN[name]}) == (7,)
    assert search.hidden_units({name: value}) is None


@pytest.mark.parametrize(
    ("options", "sgd"),
    [
        ({}, SGD()),
        ({"momentum": 0, "nesterov": False, "weight_decay": None}, SGD()),
        ({"weight_decay": 0.0}, SGD()),
        ({"momentum": 0.5}, SGD(momentum=0.5)),
        ({"momentum": 0.5, "nesterov": True}, SGD(momentum=0.5, nesterov=True)),
        ({"weight_decay": 0.1}, SGD(weight_decay=0.1)),
    ],
)
def test_a_search_trains_networks_under_sgd_together(options: dict[str, Any], sgd: SGD) -> None:
    axes = {"lr": [0.1], **{name: [value] for name, value in options.items()}}
    search = Search("s", "ShallowNetwork", axes, fixed={"max_epochs": 1})
    search.check()
    assert search.hidden_units(options) == (100,)
    assert search.sgd(options) == sgd
    assert sgd.plain == (sgd == SGD())


def test_what_a_population_would_train_otherwise_than_the_trainer_is_trained_alone() -> None:
    search = Search("s", "ShallowNetwork", fixed={"max_epochs": 1})
    assert search.hidden_units({"momentum": 0.0, "nesterov": True}) is None  # refused by the model
    assert search.hidden_units({"momentum": 0.9, "optimizer": "adam"}) is None
    assert search.hidden_units({"weight_decay": 0.1, "optimizer": "adamw"}) is None
    clipped = dataclasses.replace(search, trainer={"gradient_clip_val": 0.1})
    assert clipped.hidden_units({"momentum": 0.9}) is None
    assert clipped.hidden_units({}) == (100,)


FUSED = {
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "weight decay": {"weight_decay": 0.1},
    "all": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.05},
}


def _trained(options: dict[str, Any], fused: bool, epochs: int, **more: Any) -> tuple[Any, Any]:
    pl.seed_everything(0, verbose=False)
    model, said = DeepNetwork([20, 10], lr=0.01, **options), []
    execution = Execution(fused=fused)
    execution.say = said.append
    fit = trainer(max_epochs=epochs, precision="64-true", callbacks=[execution])
    fit.fit(model, _data(), weights_only=True, **more)
    assert said[0].startswith("steps per execution: 256, " + ("fused" if fused else "autograd"))
    return model, fit


def _agree(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    """Weights, momentum buffers, metrics and counters."""
    for ours, theirs in zip(one[0].parameters(), other[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    ours, theirs = (fit.optimizers[0].state_dict() for _, fit in (one, other))
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        assert ours["state"][index].keys() == state.keys()
        for name, value in state.items():
            mine = ours["state"][index][name]
            if value is None:
                assert mine is None
            else:
                torch.testing.assert_close(mine, value, rtol=1e-8, atol=1e-10)
    metrics = [{k: float(v) for k, v in fit.callback_metrics.items()} for _, fit in (one, other)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)
    assert one[1].fit_loop.state_dict() == other[1].fit_loop.state_dict()


@pytest.mark.parametrize("name", FUSED)
def test_fused_steps_equal_autograd(name: str) -> None:
    options = FUSED[name]
    _agree(_trained(options, True, 3), _trained(options, False, 3))


@pytest.mark.parametrize("first", [True, False], ids=["fused first", "autograd first"])
def test_a_fused_training_goes_on_with_autograd_and_back(first: bool, tmp_path: Path) -> None:
    options = FUSED["all"]
    _, half = _trained(options, first, 1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = _trained(options, not first, 3, ckpt_path=tmp_path / "half.ckpt")
    _agree(resumed, _trained(options, False, 3))
