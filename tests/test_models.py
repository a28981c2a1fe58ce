"""Compares each architecture with an oracle: autograd, a plain PyTorch loop, its checkpoint."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import same_weights, trainer
from torch.optim import lr_scheduler as lrs

from mnist_lightning import (
    DeepNetwork,
    Execution,
    MNISTDataModule,
    Perceptron,
    ShallowNetwork,
)
from mnist_lightning.data.sampling import epoch_order
from mnist_lightning.models.classifier import Classifier

MODELS = {
    "perceptron": lambda: Perceptron(lr=0.0001),
    "shallow": lambda: ShallowNetwork(hidden_units=20, lr=0.1),
    "deep2": lambda: DeepNetwork(hidden_units=[30, 20], lr=0.1),
    "deep3": lambda: DeepNetwork(hidden_units=[30, 15, 20], lr=0.1),
    "deep4": lambda: DeepNetwork(hidden_units=[20, 20, 20, 20], lr=0.1),
    "adam": lambda: ShallowNetwork(hidden_units=20, lr=0.001, optimizer="adam"),
    "adamw": lambda: ShallowNetwork(hidden_units=20, lr=0.001, optimizer="adamw"),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Classifier:
    torch.manual_seed(0)
    return MODELS[request.param]()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(12, 1, 28, 28, generator=generator), torch.arange(12) % 10


def test_contract(model: Classifier, digits: MNISTDataModule) -> None:
    """Every architecture scores ten classes, and every weight changes in training."""
    before = [parameter.clone() for parameter in model.parameters()]
    pl.seed_everything(3, verbose=False)
    fit = trainer(max_epochs=4)
    fit.fit(model, digits)
    assert model(torch.rand(4, 1, 28, 28)).shape == (4, 10)
    # ten balanced classes: an untrained network has an accuracy of 0.1
    assert fit.callback_metrics["val/acc"] > 0.4
    assert torch.isfinite(fit.callback_metrics["train/loss"])
    for old, new in zip(before, model.parameters(), strict=True):
        assert not torch.equal(old, new)


@pytest.mark.parametrize("name", MODELS)
def test_same_seed_is_bit_equal(name: str) -> None:
    """Two trainings with one seed give bit-identical weights; another seed gives others."""
    trained = []
    for seed in (1, 1, 2):
        pl.seed_everything(seed, verbose=False)
        model = MODELS[name]()
        trainer().fit(model, MNISTDataModule(source="digits"))
        trained.append(model)
    assert same_weights(trained[0], trained[1])
    assert not same_weights(trained[0], trained[2])


def test_fit_equals_a_hand_written_loop(digits: MNISTDataModule) -> None:
    """The weights are bit-identical to those of a plain PyTorch loop."""
    pl.seed_everything(5, verbose=False)
    model = DeepNetwork(hidden_units=[30, 20], lr=0.1)
    pl.seed_everything(5, verbose=False)
    net = DeepNetwork(hidden_units=[30, 20], lr=0.1).net
    trainer(max_epochs=2, callbacks=[Execution(fused=False)]).fit(model, digits)

    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    images, labels = digits.train_set.images, digits.train_set.labels
    for epoch in range(2):
        for rows in epoch_order(len(labels), 5, epoch).split(16):
            sgd.zero_grad()
            x = images[rows].unsqueeze(1).float() / 255
            F.cross_entropy(net(x), labels[rows]).backward()
            sgd.step()
    assert same_weights(model.net, net)


def test_metrics_are_means_over_the_images(digits: MNISTDataModule) -> None:
    """val/loss and val/acc equal one pass over the whole set; the last batch is smaller."""
    digits.eval_batch_size = 100  # 323 images: 100 + 100 + 100 + 23
    model = ShallowNetwork(20)
    run = trainer()
    (logged,) = run.validate(model, digits, verbose=False)
    with torch.no_grad():
        scores = model(digits.preprocess(digits.val_set.images))
    loss = F.cross_entropy(scores, digits.val_set.labels)
    accuracy = (scores.argmax(1) == digits.val_set.labels).float().mean()
    assert logged["val/loss"] == pytest.approx(float(loss), rel=1e-6)
    assert logged["val/acc"] == pytest.approx(float(accuracy), rel=1e-6)


def test_perceptron_rule_is_the_gradient_of_half_the_squared_error(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """The delta rule's changes of w and b equal autograd's, in float64."""
    images, labels = batch[0].double(), batch[1]
    model = Perceptron().double()
    rule = model.delta_rule(images, labels)
    error = F.one_hot(labels, 10).double() - model(images)
    (error.square().sum() / 2).backward()
    for move, parameter in zip(("dw", "db"), model.net.parameters(), strict=True):
        torch.testing.assert_close(rule[move], -parameter.grad, rtol=1e-12, atol=1e-12)


def test_perceptron_step_moves_by_lr_times_x_t_minus_y() -> None:
    """One training step of the Trainer equals the study's formula."""
    pl.seed_everything(0, verbose=False)
    model = Perceptron(lr=0.001)
    data = MNISTDataModule(source="digits", batch_size=5)
    w, b = model.net.w.detach().clone(), model.net.b.detach().clone()
    trainer(max_steps=1).fit(model, data)
    rows = epoch_order(len(data.train_set), 0, 0)[:5]
    x = data.train_set.images[rows].flatten(1) / 255
    t = torch.eye(10)[data.train_set.labels[rows]]
    grad = t - (x @ w + b)
    torch.testing.assert_close(model.net.w.detach(), w + 0.001 * x.T @ grad)
    torch.testing.assert_close(model.net.b.detach(), b + 0.001 * grad.sum(0))
    assert model.net.w.shape == (784, 10)
    assert model.net.b.shape == (1, 10)


def test_perceptron_loss_is_half_the_squared_error() -> None:
    scores, labels = torch.zeros(3, 10), torch.tensor([1, 2, 3])
    assert Perceptron().loss(scores, labels) == 0.5  # one score of each image is wrong by 1


def test_checkpoint_round_trip(model: Classifier, digits: MNISTDataModule, tmp_path) -> None:
    """A loaded checkpoint gives bit-identical scores and the same hyper-parameters."""
    run = trainer()
    run.fit(model, digits)
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = type(model).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    images = torch.rand(9, 1, 28, 28)
    assert torch.equal(loaded.eval()(images), model.eval()(images))
    assert loaded.hparams == model.hparams


@pytest.mark.parametrize("name", ["perceptron", "deep2"])
def test_resume_is_bit_equal(name: str, tmp_path) -> None:
    """Four epochs equal two, a checkpoint, and two more with another Trainer."""
    data = lambda: MNISTDataModule(source="digits")  # noqa: E731
    pl.seed_everything(0, verbose=False)
    whole = MODELS[name]()
    trainer(max_epochs=4).fit(whole, data())

    pl.seed_everything(0, verbose=False)
    first = trainer(max_epochs=2)
    first.fit(MODELS[name](), data())
    first.save_checkpoint(tmp_path / "half.ckpt")
    torch.rand(100)  # other random numbers in between must not matter
    resumed = MODELS[name]()
    trainer(max_epochs=4).fit(resumed, data(), ckpt_path=tmp_path / "half.ckpt")
    assert same_weights(whole, resumed)


def test_a_new_lr_wins_over_the_checkpoint(digits: MNISTDataModule, tmp_path) -> None:
    """Lightning restores the optimizer's old learning rate; the new one must replace it."""
    first = trainer()
    first.fit(ShallowNetwork(20, lr=0.1), digits)
    first.save_checkpoint(tmp_path / "a.ckpt")
    second = trainer(max_epochs=2)
    second.fit(ShallowNetwork(20, lr=0.25), digits, ckpt_path=tmp_path / "a.ckpt")
    assert second.optimizers[0].param_groups[0]["lr"] == 0.25


class Grouped(ShallowNetwork):
    """A model with two groups, nested schedules, and rates that are multiples of lr."""

    def __init__(self, lr: float = 0.1, schedule: str = "step") -> None:
        super().__init__(20, lr)
        self.save_hyperparameters()
        self.schedule = schedule

    def configure_optimizers(self):
        hidden, output = self.net.hidden1.parameters(), self.net.output.parameters()
        groups = [{"params": hidden, "lr": self.lr / 10}, {"params": output}]
        optimizer = torch.optim.SGD(groups, lr=self.lr)
        scheduler = {
            "step": lambda: lrs.StepLR(optimizer, 1, 0.5),
            "plateau": lambda: lrs.ReduceLROnPlateau(optimizer),
            "one cycle": lambda: lrs.OneCycleLR(optimizer, [self.lr, 2 * self.lr], 500),
            "sequence": lambda: lrs.SequentialLR(
                optimizer, [lrs.ConstantLR(optimizer), lrs.ExponentialLR(optimizer, 0.5)], [1]
            ),
        }[self.schedule]()
        config = {"scheduler": scheduler, "monitor": "val/loss"}
        if self.schedule == "one cycle":
            config["interval"] = "step"
        return [optimizer], [config]


@pytest.mark.parametrize("schedule", ["step", "plateau", "one cycle", "sequence"])
def test_a_new_lr_scales_all_groups_and_schedules(
    schedule: str, digits: MNISTDataModule, tmp_path
) -> None:
    """After a resume with twice the lr, each learning rate is doubled."""
    first = trainer()
    first.fit(Grouped(0.1, schedule), digits)
    first.save_checkpoint(tmp_path / "a.ckpt")
    rates = []
    for lr in (0.1, 0.2):
        second = trainer(max_epochs=3)
        model = Grouped(lr, schedule)
        second.fit(model, digits, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
        rates.append([group["lr"] for group in second.optimizers[0].param_groups])
    # OneCycleLR does not start from the learning rates of the groups
    assert rates[0][0] != rates[0][1]
    assert rates[1] == pytest.approx([2 * rate for rate in rates[0]], rel=1e-9)


class OwnLoss(Perceptron):
    def loss(self, scores, labels):
        return F.cross_entropy(scores, labels)


@pytest.mark.parametrize("change", ["loss", "hook", "net"])
def test_the_perceptrons_rule_gives_way_to_autograd(change: str, digits: MNISTDataModule) -> None:
    """If the rule is not the gradient of the loss, the training equals a plain autograd loop."""

    def make() -> Perceptron:
        torch.manual_seed(0)
        model = OwnLoss() if change == "loss" else Perceptron()
        if change == "hook":
            model.net.register_forward_hook(lambda module, inputs, scores: 2 * scores)
        if change == "net":
            model.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
        return model

    pl.seed_everything(0, verbose=False)
    model, plain = make(), make()
    digits.setup()
    trainer(max_steps=5).fit(model, digits)
    sgd = torch.optim.SGD(plain.parameters(), lr=plain.lr)
    for rows in epoch_order(len(digits.train_set), 0, 0).split(16)[:5]:
        images, labels = digits.train_set.images[rows], digits.train_set.labels[rows]
        sgd.zero_grad()
        (plain.loss(plain(digits.preprocess(images)), labels) * 16).backward()
        sgd.step()
    assert same_weights(model.net, plain.net)


def test_diverged_training_raises_an_error(digits: MNISTDataModule) -> None:
    with pytest.raises(ValueError, match=r"diverged in epoch 1.*lower.*lr"):
        trainer().fit(DeepNetwork([30, 20], lr=1e9), digits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShallowNetwork(0), "hidden_units must all be at least 1"),
        (lambda: ShallowNetwork(10, lr=0), "lr must be positive"),
        (lambda: ShallowNetwork(10, optimizer="sdg"), "optimizer must be one of sgd, adam, adamw"),
        (lambda: DeepNetwork([10]), "two sizes or more"),
    ],
)
def test_refuses(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}])
def test_the_perceptrons_rule_in_mixed_precision_is_autograds_gradient(
    settings: dict, digits: MNISTDataModule
) -> None:
    trained = []
    for hooks in (0, 1):
        pl.seed_everything(0, verbose=False)
        model = Perceptron()
        for _ in range(hooks):  # changes nothing, but is unknown: autograd computes the gradients
            model.net.register_forward_hook(lambda *_: None)
        trainer(max_steps=5, precision="bf16-mixed", **settings).fit(model, digits)
        trained.append(model.net)
    rule, autograd = (net.state_dict() for net in trained)
    for name, weights in rule.items():
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, autograd[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("precision", "instructions", "warns"),
    [("bf16-mixed", False, True), ("bf16-mixed", True, False), ("32-true", False, False)],
)
def test_warns_of_slow_bf16_on_a_processor_without_its_instructions(
    precision: str,
    instructions: bool,
    warns: bool,
    model: Classifier,
    digits: MNISTDataModule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": instructions})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(limit_train_batches=1, precision=precision).fit(model, digits)
    assert any("bf16 slowly" in str(warning.message) for warning in said) == warns
