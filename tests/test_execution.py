"""Compares many steps in one execution with one at a time, and fused steps with autograd.

Also tests the lists of hooks that allow this. ``test_parity`` tests what users add.
"""

import inspect
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import same_weights, trainer
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mnist_lightning import DeepNetwork, MNISTDataModule, Perceptron, ResNet18, ShallowNetwork
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.training import execution as ex

# 1,294 training images in mini-batches of 16: 80 whole ones and one of 14
STEPS = 81


class Scheduled(ShallowNetwork):
    """A model whose learning rate changes at each step."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step / 50))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Figures(Callback):
    """Collects the metrics that each epoch logs."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    on_train_end = on_train_epoch_start


class Run:
    """A training on the digits: the model, the Trainer, the logged metrics, the printed lines."""

    def __init__(
        self, make, steps: int | None, *more: Callback, fused=True, ckpt_path=None, **settings
    ):
        pl.seed_everything(0, verbose=False)
        self.model, self.figures, self.said = make(), Figures(), []
        self.data = MNISTDataModule(source="digits", batch_size=16)
        execution = ex.Execution(steps, fused)
        execution.say = self.said.append
        self.trainer = trainer(
            **{"max_epochs": 2, **settings, "callbacks": [self.figures, execution, *more]}
        )
        self.trainer.fit(self.model, self.data, ckpt_path=ckpt_path, weights_only=True)


CASES = {
    "sgd": (lambda: ShallowNetwork(20), {}),
    "adam": (lambda: ShallowNetwork(20, lr=0.01, optimizer="adam"), {}),
    "adamw": (lambda: DeepNetwork([20, 10], lr=0.01, optimizer="adamw"), {}),
    "perceptron": (lambda: Perceptron(), {}),
    "schedule by step": (lambda: Scheduled(20), {}),
    "clipping": (lambda: ShallowNetwork(20), {"gradient_clip_val": 0.1}),
    "bf16": (lambda: ShallowNetwork(20), {"precision": "bf16-mixed"}),
    "max_steps": (lambda: ShallowNetwork(20), {"max_steps": 100}),
    "validation in between": (lambda: ShallowNetwork(20), {"val_check_interval": 30}),
}


@pytest.mark.parametrize("steps", [7, 256], ids=["7 steps", "all steps"])
@pytest.mark.parametrize("case", CASES)
def test_many_steps_in_one_execution_equal_one_at_a_time(case: str, steps: int) -> None:
    """Weights, logged metrics and counters are bit-identical."""
    make, settings = CASES[case]
    one = Run(make, 1, fused=False, **settings)
    many = Run(make, steps, fused=False, **settings)
    assert same_weights(one.model, many.model)
    assert many.figures.logged == one.figures.logged
    assert many.trainer.fit_loop.state_dict() == one.trainer.fit_loop.state_dict()
    assert one.said[0].startswith("one step at a time: as requested")
    assert many.said[0].startswith(f"steps per execution: {steps}, autograd")


def test_nvml_is_not_asked_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyTorch has found no GPU, its optimizers ask the driver's library for none again."""
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    monkeypatch.setenv(name, "1")  # as Lightning sets it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seen = set()

    class Look(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.add(os.environ.get(name))

    Run(lambda: ShallowNetwork(20, optimizer="adam"), None, Look(), max_steps=3)
    assert seen == {None}
    assert os.environ[name] == "1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with ex._quick_gpu_check():
        assert os.environ[name] == "1"


@pytest.mark.parametrize("units", [[20], [30, 20], [30, 5, 20]], ids=["1", "2", "3"])
def test_fused_steps_equal_autograd(units: list[int]) -> None:
    """In float64, the weights agree to 1e-10 after 243 steps."""

    def make() -> Classifier:
        if len(units) == 1:
            return ShallowNetwork(units[0], lr=0.1)
        return DeepNetwork(units, lr=0.1)

    settings = {"max_epochs": 3, "precision": "64-true"}
    fused = Run(make, None, **settings)
    plain = Run(make, 1, fused=False, **settings)
    assert fused.said == ["steps per execution: 256, fused; 1 thread"]
    assert fused.trainer.fit_loop.state_dict() == plain.trainer.fit_loop.state_dict()
    assert fused.trainer.global_step == 3 * STEPS
    for one, other in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(fused.figures.logged, plain.figures.logged, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_fused_steps_in_single_precision_stay_close() -> None:
    """After one epoch of 81 steps, the rounding errors are still small."""
    fused = Run(lambda: ShallowNetwork(20, lr=0.1), None, max_epochs=1)
    plain = Run(lambda: ShallowNetwork(20, lr=0.1), None, fused=False, max_epochs=1)
    for one, other in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_fused_training_learns() -> None:
    logged = Run(lambda: ShallowNetwork(50), None, max_epochs=6).figures.logged
    assert logged[-1]["train/loss"] < logged[1]["train/loss"] / 5
    assert logged[-1]["val/acc"] > 0.9


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches joins the gradients"),
        ({"val_check_interval": "00:00:00:01"}, "val_check_interval is a time"),
        ({"profiler": "simple"}, "SimpleProfiler measures each mini-batch"),
    ],
)
def test_refuses_many_steps_where_they_cannot_work(settings: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"4 steps per execution are not possible: {reason}"):
        Run(lambda: ShallowNetwork(20), 4, **settings)


def test_resumed_at_the_very_end_of_an_epoch(tmp_path: Path) -> None:
    """A training that max_steps stopped there has no mini-batch of that epoch left."""
    half = Run(lambda: ShallowNetwork(20), None, max_epochs=-1, max_steps=2 * STEPS)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Run(
        lambda: ShallowNetwork(20),
        None,
        max_epochs=-1,
        max_steps=3 * STEPS,
        ckpt_path=tmp_path / "half.ckpt",
    )
    assert resumed.trainer.global_step == 3 * STEPS


class Plain(pl.LightningModule):
    """A module that does not use this project."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        self.sizes: set[int] = set()

    def training_step(self, batch, batch_idx):
        self.sizes.add(len(batch[1]))
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_refuses_many_steps_for_a_module_that_knows_nothing_of_them() -> None:
    data = MNISTDataModule(source="digits")
    refused = "4 steps per execution are not possible: Plain is not a class of mnist_lightning"
    with pytest.raises(ValueError, match=refused):
        trainer(callbacks=[ex.Execution(steps=4)]).fit(Plain(), data)


def test_a_used_data_module_is_as_new_for_the_next_module() -> None:
    data = MNISTDataModule(source="digits", batch_size=16)
    trainer().fit(ShallowNetwork(20), data)
    plain, second = Plain(), trainer(limit_val_batches=0)
    second.fit(plain, data)
    assert plain.sizes == {16, 14}
    assert second.global_step == STEPS


def test_resume_in_another_way_of_stepping(tmp_path: Path) -> None:
    """Two epochs with single steps, then two with many, equal four: weights and counters."""
    make = lambda: ShallowNetwork(20)  # noqa: E731
    whole = Run(make, 1, fused=False, max_epochs=4)
    half = Run(make, 1, fused=False, max_epochs=2)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Run(make, 50, fused=False, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert same_weights(resumed.model, whole.model)
    assert resumed.trainer.fit_loop.state_dict() == whole.trainer.fit_loop.state_dict()


@pytest.mark.parametrize("make", [lambda: ShallowNetwork(20), Perceptron], ids=["fused", "joined"])
def test_resume_is_bit_equal(make, tmp_path: Path) -> None:
    """Resumes from a checkpoint that ModelCheckpoint saved at the end of an epoch."""
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = Run(make, None, saver, max_epochs=4, enable_checkpointing=True)
    resumed = Run(make, None, max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert same_weights(resumed.model, whole.model)
    assert resumed.trainer.global_step == whole.trainer.global_step == 4 * STEPS


class Stop(Callback):
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
def test_all_is_undone_after_a_training(error: type[BaseException] | None) -> None:
    """After the end, an error or an interrupt, module, data and Trainer are as before."""
    torch.set_num_threads(2)
    try:
        model, data = ShallowNetwork(20), MNISTDataModule(source="digits", batch_size=16)
        fit = trainer(max_epochs=2, callbacks=[Stop(error)] if error else [])
        dtype = torch.get_default_dtype()
        if error:
            with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
                fit.fit(model, data)
        else:
            fit.fit(model, data)
        assert type(fit.fit_loop.epoch_loop) is _TrainingEpochLoop
        assert not {"execution", "_way", "_fused"} & vars(fit.fit_loop.epoch_loop).keys()
        assert torch.get_num_threads() == 2
        assert torch.get_default_dtype() == dtype
        assert model.automatic_optimization
        second = trainer(gradient_clip_val=0.5)
        second.fit(model, data)
        assert second.global_step == STEPS
    finally:
        torch.set_num_threads(1)


class Threads(Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.number = torch.get_num_threads()


@pytest.mark.parametrize(
    ("make", "flag", "variable", "number"),
    [
        (lambda: ShallowNetwork(20), None, None, 1),
        (lambda: ShallowNetwork(20, optimizer="adam"), None, None, 1),
        (lambda: ShallowNetwork(20), 3, None, 3),
        (lambda: ShallowNetwork(20), None, "2", 2),
        (lambda: ShallowNetwork(20), 3, "2", 3),
        (ResNet18, None, None, 2),
        (ResNet18, 1, None, 1),
        (Plain, None, None, 2),
    ],
)
def test_threads(make, flag, variable, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks use one thread, convolutions all, unless the user sets the number."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    torch.set_num_threads(2)
    try:
        seen = Threads()
        brought = [] if flag is None else [ex.Execution(threads=flag)]
        fit = trainer(callbacks=[seen, *brought], limit_train_batches=1, limit_val_batches=0)
        fit.fit(make(), MNISTDataModule(source="digits", batch_size=4))
        assert seen.number == number
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


class Prepared(MNISTDataModule):
    """It may do any work on the CPU."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


def test_a_training_on_a_gpu_needs_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    gpu = SimpleNamespace(root_device=torch.device("cuda"))

    def few(data: MNISTDataModule) -> int | None:
        return ex._few_threads(SimpleNamespace(strategy=gpu, datamodule=data), ResNet18())

    assert few(MNISTDataModule()) == 1
    assert few(Prepared()) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert few(MNISTDataModule()) is None


# 1e10 operations; a step takes 6 for each image and parameter
@pytest.mark.parametrize(
    ("units", "batch_size", "steps"),
    [
        ([100], 128, 164),  # 79,510 parameters: 163.76 steps
        ([100], 256, 82),
        ([2048, 2048], 8, 36),  # 5,824,522 parameters: 35.77 steps
        ([2048, 2048], 128, 2),
        ([100], 1, 256),  # at most, not 20,962
        ([2048, 2048], 1000, 1),  # 0.29 steps
    ],
)
def test_chosen_steps_fill_about_one_execution(
    units: list[int], batch_size: int, steps: int
) -> None:
    assert ex.OPERATIONS == 1e10
    said: list[str] = []
    data = MNISTDataModule(source="digits", batch_size=batch_size)
    execution = ex.Execution()
    execution.say = said.append
    model = ShallowNetwork(*units) if len(units) == 1 else DeepNetwork(units)
    trainer(callbacks=[execution], max_steps=1, limit_val_batches=0).fit(model, data)
    if steps > 1:
        assert said[0].startswith(f"steps per execution: {steps}, fused")
    else:
        assert said[0].startswith("one step at a time: a step of this network takes long enough")


def test_a_replaced_method_is_noticed() -> None:
    known = ShallowNetwork(20)
    assert ex.altered(known, ex.MODULE_NAMES) is None

    class Mixin:
        def on_after_backward(self) -> None: ...

    class Mixed(Mixin, ShallowNetwork):
        def helper(self) -> None: ...

    class Behind(ShallowNetwork, Mixin):
        def helper(self) -> None: ...

    assert ex.altered(Mixed(20), ex.MODULE_NAMES) == "Mixin overrides on_after_backward"
    assert ex.altered(Behind(20), ex.MODULE_NAMES) is None
    known.loss = lambda scores, labels: 0
    assert ex.altered(known, ex.MODULE_NAMES) == "loss of this ShallowNetwork is replaced"
    assert ex.altered(Plain(), ex.MODULE_NAMES) == "Plain is not a class of mnist_lightning"


# All hooks of Lightning that see or change single steps. A new hook of Lightning belongs either
# here or, if it does neither, on the lists in ``execution``.
CALLBACK_STEP_HOOKS = {
    *("on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward"),
    *("on_after_backward", "on_before_optimizer_step"),
}
MODULE_STEP_HOOKS = CALLBACK_STEP_HOOKS | {
    *("on_before_batch_transfer", "on_after_batch_transfer", "transfer_batch_to_device"),
    *("configure_gradient_clipping", "clip_gradients", "optimizer_step", "optimizer_zero_grad"),
    *("backward", "manual_backward", "forward", "training_step"),
    # shards a model over processes
    "configure_sharded_model",
}
# methods that users call; Lightning does not call them in a training
MODULE_CALLED_BY_USERS = {
    *(
        "all_gather",
        "freeze",
        "unfreeze",
        "lr_schedulers",
        "optimizers",
        "print",
        "log",
        "log_dict",
    ),
    *("load_from_checkpoint", "to_onnx", "to_torchscript", "to_tensorrt", "toggle_optimizer"),
    *("untoggle_optimizer", "toggled_optimizer"),
}


def _public(*classes: type) -> set[str]:
    return {
        name
        for cls in classes
        for name, value in vars(cls).items()
        if not name.startswith("_") and callable(getattr(cls, name)) and not inspect.isclass(value)
    }


def test_every_hook_of_callbacks_is_on_a_list() -> None:
    assert set(ex.STEP_HOOKS) == CALLBACK_STEP_HOOKS


def test_every_hook_of_modules_is_on_a_list() -> None:
    hooks = _public(pl.LightningModule, ModelHooks, DataHooks, CheckpointHooks)
    assert hooks - ex.MODULE_NAMES - MODULE_STEP_HOOKS - MODULE_CALLED_BY_USERS == set()
    assert not ex.MODULE_NAMES & MODULE_STEP_HOOKS


# Lightning's callbacks: those with a hook for mini-batches act on each mini-batch, unless HARMLESS
# has a condition under which they do not.
ACTING = {
    *("DeviceStatsMonitor", "EMAWeightAveraging", "WeightAveraging", "LambdaCallback"),
    *("SpikeDetection", "ThroughputMonitor"),
}
BETWEEN_STEPS = {
    *("BackboneFinetuning", "BaseFinetuning", "BasePredictionWriter", "BatchSizeFinder"),
    *("Callback", "Checkpoint", "EarlyStopping", "GradientAccumulationScheduler"),
    *("LearningRateFinder", "ModelPruning", "ModelSummary", "OnExceptionCheckpoint"),
    *("ProgressBar", "RichModelSummary", "StochasticWeightAveraging"),
}


def test_every_callback_of_lightning_is_on_a_list() -> None:
    listed = {kind.__name__ for kind in ex.HARMLESS}
    assert set(callbacks.__all__) - ACTING - BETWEEN_STEPS - listed == set()
    for name in BETWEEN_STEPS:
        kind = getattr(callbacks, name)
        overridden = [h for h in ex.STEP_HOOKS if getattr(kind, h) is not getattr(Callback, h)]
        assert not overridden, name
