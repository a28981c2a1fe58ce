"""Many steps in one execution against one at a time, and fused steps against autograd."""

import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import same_weights, trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch.optim.lr_scheduler import LambdaLR

from mnist_lightning import DeepNetwork, MNISTDataModule, Perceptron, ShallowNetwork
from mnist_lightning.models import Classifier

# 1,294 training images in mini-batches of 16: 80 whole ones and one of 14
STEPS = 81


class Scheduled(ShallowNetwork):
    """With a learning rate that changes at each step."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step / 50))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Figures(Callback):
    """All that an epoch logs."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.batches = 0

    def on_train_batch_end(self, *_: object) -> None:
        self.batches += 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def _fit(make, steps: int | None, **settings: object) -> tuple[Classifier, pl.Trainer, Figures]:
    pl.seed_everything(0, verbose=False)
    model, figures = make(), Figures()
    data = MNISTDataModule(source="digits", batch_size=16, steps_per_execution=steps)
    run = trainer(**{"max_epochs": 2, "callbacks": [figures], **settings})
    run.fit(model, data)
    return model, run, figures


CASES = {
    "sgd": (lambda: ShallowNetwork(20, fused=False), {}),
    "adam": (lambda: ShallowNetwork(20, lr=0.01, optimizer="adam"), {}),
    "adamw": (lambda: DeepNetwork([20, 10], lr=0.01, optimizer="adamw"), {}),
    "perceptron": (lambda: Perceptron(), {}),
    "schedule by step": (lambda: Scheduled(20, fused=False), {}),
    "clipping": (lambda: ShallowNetwork(20, fused=False), {"gradient_clip_val": 0.1}),
    "bf16": (lambda: ShallowNetwork(20, fused=False), {"precision": "bf16-mixed"}),
}


@pytest.mark.parametrize("steps", [7, 256], ids=["7 steps", "all steps"])
@pytest.mark.parametrize("case", CASES)
def test_many_steps_in_one_execution_equal_one_at_a_time(case: str, steps: int) -> None:
    """The same weights and the same logged figures, bit for bit, and the same step count."""
    make, settings = CASES[case]
    one, one_run, one_figures = _fit(make, 1, **settings)
    many, many_run, many_figures = _fit(make, steps, **settings)
    assert same_weights(one, many)
    assert many_figures.logged == one_figures.logged
    assert many_run.global_step == one_run.global_step
    # and it was not one at a time
    assert many_figures.batches < one_figures.batches / 5


@pytest.mark.parametrize("units", [[20], [30, 20], [30, 5, 20]], ids=["1", "2", "3"])
def test_fused_steps_equal_autograd(units: list[int]) -> None:
    """In float64, after 243 steps: the weights to 1e-10."""

    def make(fused: bool) -> Classifier:
        if len(units) == 1:
            return ShallowNetwork(units[0], lr=0.1, fused=fused)
        return DeepNetwork(units, lr=0.1, fused=fused)

    settings = {"max_epochs": 3, "precision": "64-true"}
    fused, run, figures = _fit(lambda: make(True), None, **settings)
    plain, plain_run, plain_figures = _fit(lambda: make(False), 1, **settings)
    assert figures.batches < plain_figures.batches
    assert run.global_step == plain_run.global_step == 3 * STEPS
    for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    for name, value in plain_figures.logged[0].items():
        assert figures.logged[0][name] == pytest.approx(value, rel=1e-6), name


def test_fused_steps_in_single_precision_stay_close() -> None:
    """After one epoch, 81 steps: rounding has not grown yet."""
    fused, _, _ = _fit(lambda: ShallowNetwork(20, lr=0.1), None, max_epochs=1)
    plain, _, _ = _fit(lambda: ShallowNetwork(20, lr=0.1, fused=False), None, max_epochs=1)
    for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_fused_takes_the_learning_rate_of_the_optimizer() -> None:
    """A callback that changes it must be heard."""

    class Halve(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.optimizers[0].param_groups[0]["lr"] = 0.1 / (1 + trainer.current_epoch)

    settings = {"precision": "64-true", "callbacks": [Halve()]}
    fused, _, _ = _fit(lambda: ShallowNetwork(20, lr=0.1), None, **settings)
    plain, _, _ = _fit(lambda: ShallowNetwork(20, lr=0.1, fused=False), 1, **settings)
    for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


class SeesGradients(Callback):
    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.norms.append(float(next(pl_module.parameters()).grad.norm()))


def test_whoever_wants_gradients_gets_them() -> None:
    """Fused steps have none to show: then autograd makes the steps."""
    seer = SeesGradients()
    _fit(lambda: ShallowNetwork(20), None, callbacks=[seer], max_epochs=1)
    assert len(seer.norms) == STEPS
    assert min(seer.norms) > 0


def test_weights_are_averaged_after_each_step() -> None:
    """An average over executions would be another one."""
    averaged, _, _ = _fit(
        lambda: ShallowNetwork(20), None, callbacks=[EMAWeightAveraging(decay=0.9)]
    )
    plain, _, _ = _fit(
        lambda: ShallowNetwork(20, fused=False), 1, callbacks=[EMAWeightAveraging(decay=0.9)]
    )
    assert same_weights(averaged, plain)


def test_one_at_a_time_where_mini_batches_are_counted() -> None:
    _, run, figures = _fit(lambda: ShallowNetwork(20), None, limit_train_batches=5, max_epochs=1)
    assert (run.global_step, figures.batches) == (5, 5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"limit_train_batches": 5}, "limit_train_batches"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches"),
        ({"val_check_interval": 0.5}, "val_check_interval"),
        ({"max_steps": 100}, "max_steps"),
    ],
)
def test_refuses_many_steps_where_they_cannot_work(settings: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"steps_per_execution 4 does not go with .*{reason}"):
        _fit(lambda: ShallowNetwork(20), 4, **settings)


def test_an_own_training_step_gets_single_mini_batches() -> None:
    sizes = set()

    class Own(ShallowNetwork):
        def training_step(self, batch, batch_idx):
            sizes.add(len(batch[1]))
            return self.loss(self(batch[0]), batch[1])

        def on_train_epoch_end(self) -> None:
            pass

    _fit(lambda: Own(20), None, max_epochs=1)
    assert sizes == {16, 14}


def test_resume_in_another_way_of_stepping(tmp_path: Path) -> None:
    """Two epochs one at a time, then two with many, against four: weights and step count."""
    whole, whole_run, _ = _fit(lambda: ShallowNetwork(20, fused=False), 1, max_epochs=4)
    _, half, _ = _fit(lambda: ShallowNetwork(20, fused=False), 1, max_epochs=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    model = ShallowNetwork(20, fused=False)
    data = MNISTDataModule(source="digits", batch_size=16, steps_per_execution=50)
    run = trainer(max_epochs=4)
    run.fit(model, data, ckpt_path=tmp_path / "half.ckpt")
    assert same_weights(model, whole)
    assert run.global_step == whole_run.global_step == 4 * STEPS


def test_resume_of_a_fused_training_is_bit_equal(tmp_path: Path) -> None:
    whole, _, _ = _fit(lambda: ShallowNetwork(20), None, max_epochs=4)
    _, half, _ = _fit(lambda: ShallowNetwork(20), None, max_epochs=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["global_step"] == 2 * STEPS
    model = ShallowNetwork(20)
    data = MNISTDataModule(source="digits", batch_size=16)
    trainer(max_epochs=4).fit(model, data, ckpt_path=tmp_path / "half.ckpt")
    assert same_weights(model, whole)


def test_one_model_fits_again_and_again() -> None:
    """Fused, then clipped: what the first training chose must not bind the second."""
    model, data = ShallowNetwork(20), MNISTDataModule(source="digits", batch_size=16)
    trainer().fit(model, data)
    second = trainer(gradient_clip_val=0.5)
    second.fit(model, data)
    assert second.global_step == STEPS


@pytest.mark.parametrize("batch_size", [1, 8, 128, 5000])
def test_chosen_steps_fill_about_one_execution(batch_size: int) -> None:
    data = MNISTDataModule(source="digits", batch_size=batch_size)
    steps, fused = ShallowNetwork(100).execution(trainer(), data)
    assert fused
    assert 1 <= steps <= 256
    large, _ = DeepNetwork([2048, 2048]).execution(trainer(), data)
    assert large <= steps


def test_the_curve_is_that_of_a_real_training() -> None:
    """A fused training learns: the loss falls, and ends far below that of guessing."""
    _, _, figures = _fit(lambda: ShallowNetwork(50), None, max_epochs=6)
    assert figures.logged[0]["train/loss"] < math.log(10) / 5
    assert figures.logged[0]["val/acc"] > 0.9
