"""Plain Lightning twins of our models, and what users add to a training.

A twin is a LightningModule as in a textbook; it shares no code with ``mnist_lightning.models``.
``test_parity`` applies each of the ``ADDITIONS`` to one of our models and to its twin, and compares
the results. Each addition also states how the training takes its steps: fused, many steps with
autograd, or one step at a time.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks as lc
from torch import Tensor, nn
from torch.optim import lr_scheduler as ls
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassCalibrationError, MulticlassF1Score

from mnist_lightning import DeepNetwork, MNISTDataModule, Perceptron, ResNet18, ShallowNetwork
from mnist_lightning import EarlyStopping as OurEarlyStopping
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.runs.checkpoints import ModelCheckpoint as OurCheckpoint
from mnist_lightning.training import execution
from mnist_lightning.training.freezing import LayerFreezing
from mnist_lightning.training.progress import ProgressBar as OurBar

FUSED, MANY, ONE = "fused", "many steps", "one at a time"


class Twin(pl.LightningModule):
    """A classifier as in Lightning's documentation, with the attribute names of ours."""

    sums = False
    """True if training minimises the sum over the mini-batch, not the mean."""

    def __init__(self, net: nn.Module, lr: float, optimizer: str = "sgd") -> None:
        super().__init__()
        self.net, self.lr, self.optimizer = net, lr, optimizer
        self.save_hyperparameters("lr")
        self.figures = nn.ModuleDict(
            {name: MeanMetric() for name in ("train_loss", "train_acc", "val_loss", "val_acc")}
        )
        self.figures["val_f1"] = MulticlassF1Score(10)
        self.figures["val_ece"] = MulticlassCalibrationError(10)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores, labels)

    def _step(self, stage: str, batch: Any) -> Tensor:
        images, labels = batch
        scores = self(images)
        loss = self.loss(scores, labels)
        self.figures[f"{stage}_loss"].update(loss.detach(), len(labels))
        self.figures[f"{stage}_acc"].update((scores.argmax(1) == labels).double())
        if stage == "val":
            self.figures["val_f1"].update(scores, labels)
            self.figures["val_ece"].update(scores.float().softmax(1), labels)
        return loss * len(labels) if self.sums else loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step("train", batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step("val", batch)

    def _log_epoch(self, stage: str) -> None:
        for name in ("loss", "acc", *(("f1", "ece") if stage == "val" else ())):
            metric = self.figures[f"{stage}_{name}"]
            self.log(f"{stage}/{name}", metric.compute(), prog_bar=(stage, name) == ("val", "acc"))
            metric.reset()

    def on_train_epoch_end(self) -> None:
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val")

    def configure_optimizers(self) -> Any:
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
        fused = {"fused": True} if self.optimizer == "adam" else {}
        return kinds[self.optimizer](self.parameters(), lr=self.lr, **fused)


def _mlp(*units: int) -> nn.Sequential:
    sizes = [784, *units]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip(sizes, units, strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))


class _Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(784, 10).uniform_(-0.001, 0.001))
        self.b = nn.Parameter(torch.empty(1, 10).uniform_(-0.001, 0.001))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.w + self.b


class TwinShallow(Twin):
    def __init__(self) -> None:
        super().__init__(_mlp(20), 0.1)


class TwinDeep(Twin):
    def __init__(self) -> None:
        super().__init__(_mlp(20, 10), 0.1)


class TwinPerceptron(Twin):
    """Half the squared error, with autograd."""

    sums = True

    def __init__(self) -> None:
        super().__init__(_Affine(), 0.0001)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        return (F.one_hot(labels, 10) - scores).square().sum(1).mean() / 2


class TwinResNet(Twin):
    def __init__(self) -> None:
        from torchvision.models import resnet18

        net = resnet18(num_classes=10)
        net.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(net.to(memory_format=torch.channels_last), 0.01, "adam")


def _own_net() -> nn.Sequential:
    """Has batch normalisation and dropout, to compare statistics and random numbers too."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(12, 10),
    )  # fmt: skip


class Own(Classifier):
    """A user's model, as in README."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(_own_net(), lr, "sgd")
        self.save_hyperparameters()


class TwinOwn(Twin):
    def __init__(self) -> None:
        super().__init__(_own_net(), 0.1)


class Model(NamedTuple):
    ours: type[pl.LightningModule]
    twin: type[pl.LightningModule]
    way: str
    """How it takes its steps without an addition."""
    arguments: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    """Arguments of our model; the twin has them built in."""


MODELS = {
    "shallow": Model(ShallowNetwork, TwinShallow, FUSED, {"hidden_units": 20}),
    "deep": Model(DeepNetwork, TwinDeep, FUSED, {"hidden_units": [20, 10], "lr": 0.1}),
    "perceptron": Model(Perceptron, TwinPerceptron, MANY),
    "own": Model(Own, TwinOwn, MANY),
    "resnet": Model(ResNet18, TwinResNet, ONE),
    "plain": Model(TwinOwn, TwinOwn, ONE),
}


@dataclass
class Addition:
    """A user's addition: methods of the model, callbacks, settings of the Trainer or the data."""

    way: str = FUSED
    """How ``ShallowNetwork`` takes its steps with it."""
    methods: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of our model; then the twin alone has the methods."""
    callbacks: Callable[[str], list[pl.Callback]] = lambda folder: []
    settings: dict[str, Any] = field(default_factory=dict)
    data: type[MNISTDataModule] = MNISTDataModule
    then: Callable[[Any], None] = lambda model: None
    """Called with the model after it is made."""
    everywhere: bool = False
    """True to test it with every model, not only with ``ShallowNetwork``."""
    but: tuple[str, ...] = ()
    """Models that it cannot be used with."""
    varies: tuple[str, ...] = ()
    """Logged names whose values differ in every training, such as seconds."""


def _optimizer(way: str, make: Callable[[Any], Any], everywhere: bool = False) -> Addition:
    return Addition(way, {"configure_optimizers": make}, everywhere=everywhere)


def _sgd(**options: Any) -> Callable[[Any], Any]:
    return lambda self: torch.optim.SGD(self.parameters(), lr=self.lr, **options)


def _groups(self: Any) -> Any:
    *first, bias = self.parameters()
    groups = [{"params": first, "lr": self.lr / 10}, {"params": [bias]}]
    return torch.optim.SGD(groups, lr=self.lr)


def _last_layer(self: Any) -> Any:
    return torch.optim.SGD(list(self.parameters())[-2:], lr=self.lr)


def _scheduled(way: str, make: Callable[..., Any], everywhere: bool = False, **config: Any):
    def configure(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": make(self, optimizer), **config},
        }

    return _optimizer(way, configure, everywhere)


def _step_lr(self: Any, optimizer: Any) -> Any:
    return ls.StepLR(optimizer, 1, 0.5)


def _decay(self: Any, optimizer: Any) -> Any:
    return ls.LambdaLR(optimizer, lambda step: 1 / (1 + step / 20))


def _plateau(self: Any, optimizer: Any) -> Any:
    return ls.ReduceLROnPlateau(optimizer, mode="max", patience=0, threshold=0.5)


def _one_cycle(self: Any, optimizer: Any) -> Any:
    steps = self.trainer.estimated_stepping_batches
    return ls.OneCycleLR(optimizer, 2 * self.lr, total_steps=steps)


def _sequence(self: Any, optimizer: Any) -> Any:
    warm = ls.LinearLR(optimizer, 0.1, total_iters=30)
    return ls.SequentialLR(optimizer, [warm, ls.CosineAnnealingLR(optimizer, 60)], [30])


OPTIMIZERS = {
    "nothing": Addition(everywhere=True),
    "SGD with momentum": _optimizer(FUSED, _sgd(momentum=0.9), True),
    "SGD with Nesterov's momentum": _optimizer(FUSED, _sgd(momentum=0.9, nesterov=True)),
    "SGD with weight decay": _optimizer(FUSED, _sgd(weight_decay=0.1)),
    "SGD that maximizes": _optimizer(
        MANY, lambda self: torch.optim.SGD(self.parameters(), lr=1e-4, maximize=True)
    ),
    "Adam": _optimizer(MANY, lambda self: torch.optim.Adam(self.parameters(), lr=0.001), True),
    "AdamW": _optimizer(MANY, lambda self: torch.optim.AdamW(self.parameters(), lr=0.001)),
    "RMSprop": _optimizer(MANY, lambda self: torch.optim.RMSprop(self.parameters(), lr=0.001)),
    "LBFGS": _optimizer(
        MANY, lambda self: torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=2)
    ),
    "two parameter groups": _optimizer(FUSED, _groups, True),
    "the last layer alone": _optimizer(MANY, _last_layer),
}
SCHEDULERS = {
    "StepLR by epoch": _scheduled(FUSED, _step_lr, True),
    "StepLR every 2 epochs": _scheduled(FUSED, _step_lr, frequency=2),
    "CosineAnnealingLR by epoch": _scheduled(FUSED, lambda self, o: ls.CosineAnnealingLR(o, 3)),
    "ReduceLROnPlateau": _scheduled(FUSED, _plateau, True, monitor="val/acc"),
    "ReduceLROnPlateau every 2 epochs": _scheduled(FUSED, _plateau, monitor="val/acc", frequency=2),
    "LambdaLR by step": _scheduled(MANY, _decay, True, interval="step"),
    "LambdaLR every 20 steps": _scheduled(MANY, _decay, interval="step", frequency=20),
    "ReduceLROnPlateau by step": _scheduled(
        MANY, _plateau, monitor="train/acc", interval="step", strict=False, frequency=10
    ),
    "OneCycleLR over all steps": _scheduled(MANY, _one_cycle, True, interval="step"),
    "SequentialLR by step": _scheduled(MANY, _sequence, interval="step"),
    "lr_scheduler_step of its own": Addition(
        FUSED,
        {
            **_scheduled(FUSED, _step_lr).methods,
            "lr_scheduler_step": lambda self, scheduler, metric: (
                scheduler.step() if self.current_epoch else None
            ),
        },
    ),
}


def _with(way: str, *makers: Callable[..., Any], everywhere: bool = False, **more: Any) -> Addition:
    def make(folder: str) -> list[pl.Callback]:
        return [
            maker(folder) if "folder" in inspect.signature(maker).parameters else maker()
            for maker in makers
        ]

    return Addition(way, callbacks=make, everywhere=everywhere, **more)


class Backbone(lc.BaseFinetuning):
    """Freezes the first layer; unfreezes it in the second epoch, with another learning rate."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(next(m for m in pl_module.net.modules() if list(m.parameters(recurse=False))))

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            layers = (m for m in pl_module.net.modules() if list(m.parameters(recurse=False)))
            self.unfreeze_and_add_param_group(next(layers), optimizer, lr=0.01)


def _trainable(self: Any) -> Any:
    return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class FreezesLate(pl.Callback):
    """Sets ``requires_grad`` after the training was set up."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        next(pl_module.net.parameters()).requires_grad_(False)


class Replaces(pl.Callback):
    """Replaces an activation after the training has begun."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        names = [n for n, m in pl_module.net.named_children() if isinstance(m, nn.ReLU)]
        setattr(pl_module.net, names[0], nn.Tanh())


class LooksAtGradients(pl.Callback):
    """Reads a gradient at the end of an epoch, without a hook for steps."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(float(next(pl_module.parameters()).grad.norm()))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}


class SetsRate(pl.Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].param_groups[0]["lr"] = pl_module.lr / (1 + trainer.current_epoch)


class StopsAtStep(pl.Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= 20


class WarmsUp(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        rate = pl_module.lr * min(1, trainer.global_step / 30)
        trainer.optimizers[0].param_groups[0]["lr"] = rate


class LogsNorm(pl.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        pl_module.log("norm", next(pl_module.parameters()).grad.norm())


class BringsAnother(pl.Callback):
    """Adds a callback that acts on mini-batches during the training."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.callbacks.append(WarmsUp())


class ChangesInValidation(pl.Callback):
    """Changes the optimizer and ``requires_grad`` in a validation within an epoch."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step > 40:
            next(pl_module.parameters()).requires_grad_(False)
            trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.1


def _saves(**options: Any) -> Callable[[str], Any]:
    return lambda folder: lc.ModelCheckpoint(
        folder, **{"save_on_train_epoch_end": True, "filename": "{epoch}-{step}", **options}
    )


SAVING = {"enable_checkpointing": True}
LOGGING = {"logger": True, "log_every_n_steps": 5}
CALLBACKS = {
    "EarlyStopping": _with(
        FUSED, lambda: lc.EarlyStopping("val/acc", mode="max", min_delta=0.2, patience=1)
    ),
    "our EarlyStopping": _with(FUSED, lambda: OurEarlyStopping(patience=1, min_delta=0.5)),
    "StochasticWeightAveraging": _with(
        FUSED, lambda: lc.StochasticWeightAveraging(0.02, swa_epoch_start=1), everywhere=True
    ),
    "EMAWeightAveraging": _with(ONE, lambda: lc.EMAWeightAveraging(decay=0.9), everywhere=True),
    "WeightAveraging": _with(ONE, lambda: lc.WeightAveraging()),
    "LearningRateFinder": _with(
        FUSED, lambda: lc.LearningRateFinder(num_training_steps=8), everywhere=True
    ),
    "BatchSizeFinder": _with(
        FUSED,
        lambda: lc.BatchSizeFinder(max_trials=2, steps_per_trial=2),
        everywhere=True,
        but=("own", "plain"),  # the last mini-batch has one image, and BatchNorm refuses that
    ),
    "GradientAccumulationScheduler": _with(
        FUSED, lambda: lc.GradientAccumulationScheduler({0: 1, 1: 4}), everywhere=True
    ),
    "BaseFinetuning": _with(
        MANY,
        Backbone,
        methods={"configure_optimizers": _trainable},
        everywhere=True,
        but=("perceptron",),  # it has a single layer
    ),
    "BackboneFinetuning": _with(
        MANY,
        lambda: lc.BackboneFinetuning(unfreeze_backbone_at_epoch=1),
        methods={
            "configure_optimizers": _trainable,
            "backbone": property(lambda self: self.net[1]),
        },
    ),
    "ModelPruning": _with(
        FUSED,
        lambda: lc.ModelPruning("l1_unstructured", amount=0.3, parameter_names=["weight"]),
        settings={"precision": "32-true"},  # its masks are float32; steps are fused until it prunes
    ),
    "Timer by step": _with(ONE, lambda: lc.Timer(timedelta(hours=1))),
    "Timer by epoch": _with(FUSED, lambda: lc.Timer(timedelta(hours=1), interval="epoch")),
    "LearningRateMonitor": _with(ONE, lambda: lc.LearningRateMonitor(), settings=LOGGING),
    "LearningRateMonitor by step": _with(
        ONE, lambda: lc.LearningRateMonitor("step"), settings=LOGGING
    ),
    "LearningRateMonitor by epoch": _with(
        FUSED, lambda: lc.LearningRateMonitor("epoch"), settings=LOGGING
    ),
    "DeviceStatsMonitor": _with(
        ONE,
        lambda: lc.DeviceStatsMonitor(cpu_stats=True),
        settings=LOGGING,
        varies=("DeviceStatsMonitor",),
    ),
    "ThroughputMonitor": _with(
        ONE,
        lambda: lc.ThroughputMonitor(lambda batch: len(batch[1]), window_size=5),
        settings=LOGGING,
        varies=tuple(
            f"{stage}/{figure}"
            for stage in ("train", "validate")
            for figure in ("time", "device", "batches_per_sec", "samples_per_sec")
        ),
    ),
    "OnExceptionCheckpoint": _with(
        FUSED, lambda folder: lc.OnExceptionCheckpoint(folder), settings=SAVING
    ),
    "ModelCheckpoint": _with(FUSED, _saves(), settings=SAVING, everywhere=True),
    "ModelCheckpoint of the best": _with(
        FUSED, _saves(monitor="val/acc", mode="max", save_last=True), settings=SAVING
    ),
    "ModelCheckpoint every 2 epochs": _with(
        FUSED, _saves(every_n_epochs=2, save_top_k=-1), settings=SAVING
    ),
    "ModelCheckpoint after validation": _with(
        FUSED, _saves(save_on_train_epoch_end=False, save_top_k=-1), settings=SAVING
    ),
    "ModelCheckpoint every 20 steps": _with(
        ONE, _saves(every_n_train_steps=20, save_top_k=-1), settings=SAVING, everywhere=True
    ),
    "ModelCheckpoint by time": _with(
        ONE, _saves(train_time_interval=timedelta(0)), settings=SAVING
    ),
    "our ModelCheckpoint": _with(
        FUSED,
        lambda folder: OurCheckpoint(folder, filename="last", save_on_train_epoch_end=True),
        settings=SAVING,
    ),
    "LambdaCallback for batches": _with(
        ONE, lambda: lc.LambdaCallback(on_train_batch_end=lambda *_: None)
    ),
    "LambdaCallback for epochs": _with(
        FUSED, lambda: lc.LambdaCallback(on_train_epoch_end=lambda *_: None)
    ),
    "SpikeDetection": _with(
        ONE, lambda folder: lc.SpikeDetection(warmup=10_000, exclude_batches_path=folder)
    ),
    "ModelSummary": _with(FUSED, lambda: lc.ModelSummary()),
    "TQDMProgressBar": _with(
        FUSED, lambda: lc.TQDMProgressBar(), settings={"enable_progress_bar": True}
    ),
    "our ProgressBar": _with(FUSED, OurBar, settings={"enable_progress_bar": True}),
    "LayerFreezing": _with(MANY, lambda: LayerFreezing(freeze=["net.*1.*"])),
    "a callback that freezes late": _with(MANY, FreezesLate, everywhere=True),
    "a callback that replaces a layer": _with(MANY, Replaces),
    "a callback that looks at gradients": _with(
        FUSED, LooksAtGradients, settings={"limit_val_batches": 0}, everywhere=True
    ),
    "a callback that sets the learning rate": _with(FUSED, SetsRate, everywhere=True),
    "a callback that stops at a step": _with(ONE, StopsAtStep, everywhere=True),
    "a callback that warms up": _with(ONE, WarmsUp, everywhere=True),
    "a callback that brings another": _with(FUSED, BringsAnother),
    "a callback that changes things in a validation": _with(
        FUSED, ChangesInValidation, settings={"val_check_interval": 10}
    ),
    "a callback that logs gradients": _with(ONE, LogsNorm, settings=LOGGING),
    "two optimizers' worth of everything": _with(
        ONE, lambda: lc.EMAWeightAveraging(decay=0.9), _saves(), SetsRate, settings=SAVING
    ),
}


def _settings(way: str, everywhere: bool = False, **settings: Any) -> Addition:
    return Addition(way, settings=settings, everywhere=everywhere)


TRAINER = {
    "limit_train_batches 7": _settings(FUSED, limit_train_batches=7),
    "limit_train_batches 1": _settings(FUSED, True, limit_train_batches=1),
    "limit_train_batches 1.0": _settings(FUSED, limit_train_batches=1.0),
    "limit_train_batches 0.3": _settings(FUSED, limit_train_batches=0.3),
    "limit_val_batches 1": _settings(FUSED, limit_val_batches=1),
    "limit_val_batches 0": _settings(FUSED, limit_val_batches=0),
    "limit_val_batches 0.5": _settings(FUSED, limit_val_batches=0.5),
    "max_steps": _settings(FUSED, True, max_steps=37),
    "max_steps in the second epoch": _settings(FUSED, max_steps=70, max_epochs=-1),
    "max_time": _settings(ONE, max_time="00:01:00:00"),
    "val_check_interval 10": _settings(FUSED, True, val_check_interval=10),
    "val_check_interval 1": _settings(FUSED, val_check_interval=1, limit_train_batches=12),
    "val_check_interval 1.0": _settings(FUSED, val_check_interval=1.0),
    "val_check_interval 0.25": _settings(FUSED, val_check_interval=0.25),
    "val_check_interval over epochs": _settings(
        FUSED, val_check_interval=70, check_val_every_n_epoch=None
    ),
    "val_check_interval as a time": _settings(
        ONE, val_check_interval=timedelta(0), limit_train_batches=12
    ),
    "check_val_every_n_epoch": _settings(FUSED, check_val_every_n_epoch=2),
    "fast_dev_run": _settings(FUSED, fast_dev_run=True),
    "fast_dev_run 7": _settings(FUSED, fast_dev_run=7),
    "overfit_batches 3": _settings(ONE, overfit_batches=3),
    "overfit_batches 0.5": _settings(ONE, overfit_batches=0.5),
    "clipping by norm": _settings(MANY, True, gradient_clip_val=0.1),
    "clipping by value": _settings(MANY, gradient_clip_val=0.01, gradient_clip_algorithm="value"),
    "accumulate_grad_batches": _settings(ONE, True, accumulate_grad_batches=3),
    "detect_anomaly": _settings(MANY, detect_anomaly=True),
    "deterministic": _settings(FUSED, deterministic=True),
    "precision bf16-mixed": _settings(MANY, precision="bf16-mixed"),
    "profiler": _settings(ONE, profiler="simple"),
    "barebones": _settings(FUSED, barebones=True),
    "sanity check": _settings(FUSED, num_sanity_val_steps=2),
    "reload_dataloaders_every_n_epochs": _settings(FUSED, reload_dataloaders_every_n_epochs=1),
    "a logger": _settings(FUSED, True, **LOGGING),
    "min_epochs": Addition(
        FUSED,
        callbacks=lambda folder: [lc.EarlyStopping("val/acc", min_delta=9.0, patience=1)],
        settings={"min_epochs": 3},
    ),
    "min_steps": Addition(
        FUSED,
        callbacks=lambda folder: [lc.EarlyStopping("val/acc", min_delta=9.0, patience=1)],
        settings={"min_steps": 120},
    ),
}


def _noisy(self: Any, batch: Any, dataloader_idx: int) -> Any:
    images, labels = MNISTDataModule.on_after_batch_transfer(self, batch, dataloader_idx)
    return images + 0.1 * torch.randn_like(images), labels


class Noisy(MNISTDataModule):
    on_after_batch_transfer = _noisy


class Sorted(MNISTDataModule):
    """Overrides the train loader."""

    def train_dataloader(self) -> Any:
        return self._loader(self.train_set, self.batch_size)


class Described(MNISTDataModule):
    def describe(self) -> str:
        return "mine"


def _backward(self: Any, loss: Tensor, *args: Any, **kwargs: Any) -> None:
    (2 * loss).backward()


def _optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
    optimizer.param_groups[0]["lr"] = self.lr * min(1, (self.trainer.global_step + 1) / 30)
    optimizer.step(closure=closure)


def _clipping(self: Any, optimizer: Any, **_: Any) -> None:
    self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")


def _norm(self: Any, optimizer: Any) -> None:
    self.log("norm", next(self.parameters()).grad.norm())


def _skip(self: Any, batch: Any, batch_idx: int) -> Any:
    return -1 if batch_idx == 7 else None


def _logging_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
    images, labels = batch
    loss = self.loss(self(images), labels)
    self.log("mine", loss, on_step=True, on_epoch=True)
    return loss


def _replace_loss(model: Any) -> None:
    model.loss = lambda scores, labels: F.cross_entropy(scores, labels, label_smoothing=0.3)


def _half_images(self: Any, images: Tensor) -> Tensor:
    return self.net(images / 2)


def _on_train_epoch_start(self: Any) -> None:
    self.log("epoch", float(self.current_epoch))


MODULE = {
    "a loss of its own": Addition(
        ONE,
        {"loss": lambda self, scores, labels: F.cross_entropy(scores, labels, label_smoothing=0.3)},
        everywhere=True,
    ),
    "a loss put in its place": Addition(ONE, then=_replace_loss),
    "a forward of its own": Addition(ONE, {"forward": _half_images}),
    "a training_step of its own": Addition(
        ONE,
        {"training_step": _logging_step, "on_train_epoch_end": lambda self: None},
        settings=LOGGING,
        everywhere=True,
    ),
    "a backward of its own": Addition(ONE, {"backward": _backward}),
    "an optimizer_step of its own": Addition(ONE, {"optimizer_step": _optimizer_step}),
    "clipping of its own": Addition(ONE, {"configure_gradient_clipping": _clipping}),
    "gradients logged": Addition(ONE, {"on_before_optimizer_step": _norm}, settings=LOGGING),
    "the rest of an epoch skipped": Addition(ONE, {"on_train_batch_start": _skip}),
    "optimizer_zero_grad of its own": Addition(
        ONE, {"optimizer_zero_grad": lambda self, epoch, index, optimizer: None}
    ),
    "log in on_train_epoch_start": Addition(
        FUSED, {"on_train_epoch_start": _on_train_epoch_start}, settings=LOGGING
    ),
    "another activation": Addition(MANY, then=lambda model: model.net.__setitem__(2, nn.Tanh())),
    "a forward hook": Addition(
        MANY,
        then=lambda model: model.net[1].register_forward_hook(lambda m, i, out: out * 0.5) and None,
    ),
    "a hook on a gradient": Addition(
        MANY,
        then=lambda model: next(model.parameters()).register_hook(lambda g: g * 2) and None,
    ),
    "a frozen parameter": Addition(
        MANY, then=lambda model: setattr(next(model.parameters()), "requires_grad", False)
    ),
    "a parameter beside the network's": Addition(
        MANY, then=lambda model: model.register_parameter("more", nn.Parameter(torch.ones(1)))
    ),
    "weights that are normalised": Addition(
        MANY, then=lambda model: nn.utils.parametrizations.weight_norm(model.net[1]) and None
    ),
    "noise on the images": Addition(ONE, data=Noisy, everywhere=True),
    "a train loader of its own": Addition(ONE, data=Sorted, everywhere=True),
    "a data module that adds nothing": Addition(FUSED, data=Described),
}


def _option(way: str, methods: dict[str, Any], **options: Any) -> Addition:
    return Addition(way, methods, options=options)


def _two_groups(**options: Any) -> dict[str, Any]:
    def configure(self: Any) -> Any:
        weights = [p for p in self.parameters() if p.ndim > 1]
        biases = [p for p in self.parameters() if p.ndim == 1]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases}]
        return torch.optim.SGD(groups, lr=self.lr, **options)

    return {"configure_optimizers": configure}


def _by_step(make: Callable[..., Any]) -> dict[str, Any]:
    return _scheduled(MANY, make, interval="step").methods


def _cosine(self: Any, optimizer: Any) -> Any:
    steps = self.trainer.estimated_stepping_batches
    return ls.LambdaLR(optimizer, lambda t: (1 + math.cos(math.pi * min(1.0, t / steps))) / 2)


def _rising(self: Any, optimizer: Any) -> Any:
    return ls.LambdaLR(optimizer, lambda t: (t + 1) / 36 if t < 36 else 1.0)


def _thirds(self: Any, optimizer: Any) -> Any:
    steps = self.trainer.estimated_stepping_batches
    return ls.LambdaLR(
        optimizer, lambda t: 1.0 if t < steps / 2 else 0.1 if t < steps * 0.75 else 0.01
    )


def _trains_on(loss: Callable[..., Tensor]) -> dict[str, Any]:
    """A training step with another loss than the validation's."""

    def step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        scores, mean = loss(self, images, labels, batch_idx)
        self.figures["train_loss"].update(mean.detach(), len(labels))
        self.figures["train_acc"].update((scores.argmax(1) == labels).double())
        return mean

    return {"training_step": step}


def _smoothed(self: Any, images: Tensor, labels: Tensor, step: int) -> Any:
    scores = self(images)
    return scores, F.cross_entropy(scores, labels, label_smoothing=0.2)


def _weighted(self: Any, images: Tensor, labels: Tensor, step: int) -> Any:
    counts = torch.bincount(self.trainer.datamodule.train_set.labels)
    weights = torch.where(counts > 0, 1.0 / counts, 0.0)
    weights = weights * ((counts > 0).sum() / weights.sum())
    scores = self(images)
    return scores, F.cross_entropy(scores, labels, weights.to(scores))


def _mixed(self: Any, images: Tensor, labels: Tensor, step: int) -> Any:
    generator = np.random.default_rng((0, self.current_epoch, step, 0))
    share, partners = float(generator.beta(0.4, 0.4)), generator.permutation(len(labels))
    scores = self(share * images + (1 - share) * images[partners])
    one, other = F.cross_entropy(scores, labels), F.cross_entropy(scores, labels[partners])
    return scores, share * one + (1 - share) * other


OPTIONS = {
    "momentum": _option(FUSED, {"configure_optimizers": _sgd(momentum=0.9)}, momentum=0.9),
    "weight_decay": _option(FUSED, _two_groups(), weight_decay=0.1),
    "weight_decay with nesterov": _option(
        FUSED,
        _two_groups(momentum=0.9, nesterov=True),
        **{"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "schedule cosine": _option(MANY, _by_step(_cosine), schedule="cosine"),
    "schedule step": _option(MANY, _by_step(_thirds), schedule="step"),
    "warmup_epochs": _option(MANY, _by_step(_rising), warmup_epochs=1),
    "label_smoothing": _option(MANY, _trains_on(_smoothed), label_smoothing=0.2),
    "mixup": _option(MANY, _trains_on(_mixed), mixup=0.4),
    "class_weights": _option(MANY, _trains_on(_weighted), class_weights="auto"),
}


def _counting_callback(hook: str) -> Callable[[str], list[pl.Callback]]:
    def count(self: Any, *args: Any, **kwargs: Any) -> None:
        self.calls += 1

    kind = type(f"Counts_{hook}", (pl.Callback,), {hook: count, "calls": 0})
    return lambda folder: [kind()]


def _counting_method(hook: str) -> dict[str, Any]:
    """Makes a method that counts its calls and calls the base class's method."""

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls[hook] = self.calls.get(hook, 0) + 1
        return getattr(super(self.added, self), hook)(*args, **kwargs)

    return {hook: count}


def _counting_data(hook: str) -> type[MNISTDataModule]:
    kind: Any = type("Counting", (MNISTDataModule,), {**_counting_method(hook), "calls": {}})
    kind.added = kind
    return kind


# every hook that Lightning calls in a training with validation
HOOKS = (
    {
        f"callback's {hook}": Addition(
            ONE if hook in execution.STEP_HOOKS else FUSED, callbacks=_counting_callback(hook)
        )
        for hook in sorted({n for n in dir(pl.Callback) if n.startswith("on_")})
    }
    | {
        f"model's {hook}": Addition(
            FUSED if hook in execution.MODULE_NAMES else ONE, _counting_method(hook)
        )
        for hook in sorted(
            {
                *(n for n in dir(pl.LightningModule) if n.startswith(("on_", "optimizer_"))),
                *("setup", "teardown", "configure_model", "configure_optimizers", "backward"),
                *("configure_callbacks", "configure_gradient_clipping", "lr_scheduler_step"),
                *("transfer_batch_to_device", "forward", "training_step", "validation_step"),
            }
            - {"on_gpu"}
        )
    }
    | {
        f"data module's {hook}": Addition(
            FUSED if hook in execution.DATA_NAMES else ONE,
            data=_counting_data(hook),
        )
        for hook in (
            *("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"),
            *("prepare_data", "setup", "teardown", "val_dataloader", "train_dataloader"),
        )
    }
)

GROUPS = {
    "Options of the model": OPTIONS,
    "Optimizers": OPTIMIZERS,
    "Schedulers": SCHEDULERS,
    "Callbacks": CALLBACKS,
    "Settings of the Trainer": TRAINER,
    "Changes to the model or the data": MODULE,
    "Hooks": HOOKS,
}
ADDITIONS = {name: addition for group in GROUPS.values() for name, addition in group.items()}


def ways_table() -> str:
    """Makes README's table of how ``ShallowNetwork`` takes its steps with each addition."""
    titles = {FUSED: "many steps, fused", MANY: "many steps, autograd", ONE: "one at a time"}
    lines = [f"| | {' | '.join(titles.values())} |", "|---|" + "---|" * len(titles)]
    for title, group in GROUPS.items():
        short = (lambda n: f"`{n.split()[-1]}`") if title == "Hooks" else str
        names = {way: [short(n) for n in group if group[n].way == way] for way in titles}
        cells = (", ".join(dict.fromkeys(names[way])) for way in titles)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
