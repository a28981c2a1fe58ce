"""Oracle of every test here: the same network trained alone, with autograd and torch.optim.SGD."""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_lightning.data.module import MNISTDataModule
from mnist_lightning.data.sampling import epoch_order
from mnist_lightning.nets import mlp
from mnist_lightning.training import stacked
from mnist_lightning.training.population import (
    Member,
    PopulationTraining,
    initial_parameters,
    pixel_order,
    training_bytes,
)
from mnist_lightning.training.stacked import SGD, Population

# every depth from 0 to 4, widths that are padded and widths that are not, equal and mixed
NETWORKS = [(), (10,), (25,), (200,), (25,), (12, 7), (9, 30), (200, 20), (20, 200)]
NETWORKS += [(5, 6, 7), (8, 8, 8), (150, 4, 9), (4, 5, 6, 7)]
# the study's range: beyond it training is unstable, and multiplies rounding
RATES = [0.1, 0.1, 0.03, 0.05, 0.001, 0.1, 0.01, 0.05, 0.02, 0.1, 0.1, 0.02, 0.0001]
# each way to update: plain, with momentum, Nesterov's, weight decay, and of some two values
WAYS = [SGD(), SGD(0.9), SGD(0.5), SGD(0.9, True), SGD(0.6, True), SGD(weight_decay=1e-3)]
WAYS += [SGD(weight_decay=0.03), SGD(0.9, False, 1e-3), SGD(0.8, False, 0.05), SGD(0.9, True, 1e-3)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sparse images like MNIST's, some pixels zero in all, and labels that can be learned."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.rand(10, 784, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, 10, (n,), generator=generator)
    nonzero = torch.rand(n, 784, generator=generator) < torch.linspace(-0.1, 0.5, 784)
    x = (prototypes[labels] + torch.rand(n, 784, generator=generator)) / 2 * nonzero
    return x.to(dtype), labels


def optimizer_of(net: nn.Module, lr: float, sgd: SGD) -> torch.optim.SGD:
    """PyTorch's own; biases have no weight decay."""
    groups = [
        {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": sgd.weight_decay},
        {"params": [p for p in net.parameters() if p.ndim == 1]},
    ]
    return torch.optim.SGD(groups, lr, momentum=sgd.momentum, nesterov=sgd.nesterov)


def train_alone(
    net: nn.Module,
    lr: float,
    x: Tensor,
    labels: Tensor,
    batch_size: int,
    optimizer: torch.optim.SGD | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed loss and correct answers of each mini-batch."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=lr)
    losses, correct = [], []
    for xb, yb in zip(x.split(batch_size), labels.split(batch_size), strict=True):
        optimizer.zero_grad()
        scores = net(xb)
        loss = F.cross_entropy(scores, yb)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach() * len(yb))
        correct.append((scores.argmax(1) == yb).sum())
    return torch.stack(losses), torch.stack(correct)


def networks(dtype: torch.dtype) -> list[nn.Module]:
    torch.manual_seed(0)
    return [mlp(784, hidden, 10).to(dtype) for hidden in NETWORKS]


def train_together(
    nets: list[nn.Module], x: Tensor, labels: Tensor, batch_size: int, block: int
) -> tuple[Population, Tensor, Tensor]:
    population = Population([list(n.parameters()) for n in nets], RATES, pixel_order(x))
    rows = population.arrange(x)
    results = [
        population.train_block(rows[i : i + block], labels[i : i + block], batch_size)
        for i in range(0, len(rows), block)
    ]
    losses, correct = zip(*results, strict=True)
    return population, torch.cat(losses, 1), torch.cat(correct, 1)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "batch_size"),
    [
        (torch.float64, 1e-10, 1),
        (torch.float64, 1e-10, 16),
        # The more images, the more likely one whose input to some ReLU is zero within rounding: it
        # then passes in one training, not in the other, and that is more than rounding.
        (torch.float32, 1e-5, 1),
        (torch.float32, 1e-5, 8),
    ],
)
def test_200_steps_equal_autograd_and_sgd(
    dtype: torch.dtype, tolerance: float, batch_size: int
) -> None:
    x, labels = images(200 * batch_size, dtype)
    nets = networks(dtype)
    population, losses, correct = train_together(nets, x, labels, batch_size, 4 * batch_size)
    for member, net in enumerate(nets):
        alone, alone_correct = train_alone(net, RATES[member], x, labels, batch_size)
        assert losses.shape[1] == 200
        scale = alone.abs().max()
        torch.testing.assert_close(losses[member], alone, rtol=0, atol=float(tolerance * scale))
        for ours, theirs in zip(population.parameters(member), net.parameters(), strict=True):
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
        if dtype == torch.float64:
            assert torch.equal(correct[member], alone_correct)


def test_the_last_partial_minibatch_is_trained_on() -> None:
    x, labels = images(61, torch.float64)
    nets = networks(torch.float64)
    population, losses, _ = train_together(nets, x, labels, batch_size=8, block=32)
    assert losses.shape == (len(nets), 8)  # 4 + 3 whole ones, and one of 5 images
    for member, net in enumerate(nets):
        alone, _ = train_alone(net, RATES[member], x, labels, 8)
        torch.testing.assert_close(losses[member], alone, rtol=1e-10, atol=0)
        for ours, theirs in zip(population.parameters(member), net.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-10, atol=1e-14)


def test_leaving_out_zero_columns_changes_nothing() -> None:
    x, labels = images(64, torch.float64)
    x[:, 600:] = 0
    nets = networks(torch.float64)
    whole, some = (Population([list(n.parameters()) for n in nets], RATES) for _ in range(2))
    rows = whole.arrange(x)
    whole.train_block(rows, labels, 8)
    some.train_block(rows, labels, 8, nonzero_columns=601)
    for member in range(len(nets)):
        for a, b in zip(whole.parameters(member), some.parameters(member), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def assert_momentum_and_decay_equal_autograd(
    x: Tensor, labels: Tensor, batch_size: int, block: int, nonzero_columns: int | None = None
) -> None:
    """Of every network, with three of the ways to update; weights and momentum buffers, too."""
    torch.manual_seed(0)
    nets, rates, options = [], [], []
    for number, hidden in enumerate(NETWORKS):
        for i in range(3):
            nets.append(mlp(784, hidden, 10).to(x.dtype))
            rates.append(RATES[number] / 4)
            options.append(WAYS[(3 * number + i) % len(WAYS)])
    order = None if nonzero_columns else pixel_order(x)
    population = Population([list(n.parameters()) for n in nets], rates, order, options)
    rows = population.arrange(x)
    losses = torch.cat(
        [
            population.train_block(x, y, batch_size, nonzero_columns)[0]
            for x, y in zip(rows.split(block), labels.split(block), strict=True)
        ],
        1,
    )
    for member, (net, lr, sgd) in enumerate(zip(nets, rates, options, strict=True)):
        optimizer = optimizer_of(net, lr, sgd)
        alone, _ = train_alone(net, lr, x, labels, batch_size, optimizer)
        torch.testing.assert_close(losses[member], alone, rtol=1e-11, atol=1e-11)
        for ours, theirs in zip(population.parameters(member), net.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-11, atol=1e-12)
        velocity = population.velocity(member)
        assert len(velocity) == (len(list(net.parameters())) if sgd.momentum else 0)
        for ours, parameter in zip(velocity, net.parameters(), strict=False):
            buffer = optimizer.state[parameter]["momentum_buffer"]
            torch.testing.assert_close(ours, lr * buffer, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("by_step", [True, False], ids=["step by step", "by block"])
@pytest.mark.parametrize(
    ("images_in_all", "batch_size", "block"), [(61, 1, 16), (203, 8, 64), (300, 64, 256)]
)
def test_momentum_and_weight_decay_equal_autograd_and_sgd(
    images_in_all: int,
    batch_size: int,
    block: int,
    by_step: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a smaller last mini-batch, for every batch size in both ways to update."""
    monkeypatch.setattr(stacked, "STEP_ROWS", 1 if by_step else 1000)
    x, labels = images(images_in_all, torch.float64)
    assert_momentum_and_decay_equal_autograd(x, labels, batch_size, block)


@pytest.mark.parametrize("batch_size", [8, 32])
def test_weights_of_zero_columns_move_by_momentum_and_decay(batch_size: int) -> None:
    x, labels = images(128, torch.float64)
    x[:64, 300:] = 0  # the first block gives the others a velocity only in its columns
    x[:, 600:] = 0
    assert_momentum_and_decay_equal_autograd(x, labels, batch_size, 64, nonzero_columns=601)


def test_columns_that_were_seen_before_move_on_without_being_seen() -> None:
    x, labels = images(64, torch.float64)
    x[32:, 300:] = 0
    torch.manual_seed(0)
    nets = [mlp(784, [5], 10).double() for _ in WAYS]
    rates = [0.02] * len(WAYS)
    population = Population([list(n.parameters()) for n in nets], rates, None, WAYS)
    rows = population.arrange(x)
    population.train_block(rows[:32], labels[:32], 8)
    population.train_block(rows[32:], labels[32:], 8, nonzero_columns=301)
    for member, (net, sgd) in enumerate(zip(nets, WAYS, strict=True)):
        train_alone(net, 0.02, x, labels, 8, optimizer_of(net, 0.02, sgd))
        for ours, theirs in zip(population.parameters(member), net.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-11, atol=1e-12)


def test_momentum_in_single_precision_stays_within_rounding() -> None:
    x, labels = images(800)
    nets = [mlp(784, hidden, 10) for hidden in NETWORKS]
    doubles = [copy.deepcopy(net).double() for net in nets]
    options = [WAYS[i % len(WAYS)] for i in range(len(nets))]
    rates = [lr / 4 for lr in RATES]
    population = Population([list(n.parameters()) for n in nets], rates, None, options)
    rows = population.arrange(x)
    for block, y in zip(rows.split(64), labels.split(64), strict=True):
        population.train_block(block, y, 4)
    for member, net in enumerate(doubles):
        optimizer = optimizer_of(net, rates[member], options[member])
        train_alone(net, rates[member], x.double(), labels, 4, optimizer)
        for ours, theirs in zip(population.parameters(member), net.parameters(), strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_plain_network_has_the_same_bits_beside_others_with_momentum() -> None:
    x, labels = images(64)
    nets = networks(torch.float32)
    tensors = [list(net.parameters()) for net in nets]
    plain = Population(tensors, RATES)
    options = [*[SGD()] * len(nets), *[SGD(0.9)] * len(nets)]
    mixed = Population(tensors * 2, RATES[: len(nets)] * 2, None, options)
    for population in (plain, mixed):
        population.train_block(population.arrange(x), labels, 8)
    for member in range(len(nets)):
        for a, b in zip(plain.parameters(member), mixed.parameters(member), strict=True):
            assert torch.equal(a, b)


def test_a_network_with_momentum_is_not_replaced() -> None:
    tensors = list(mlp(784, [5], 10).parameters())
    population = Population([tensors], [0.1], None, [SGD(0.9)])
    with pytest.raises(ValueError, match="network 0 has momentum or weight decay"):
        population.load(0, tensors, 0.2)


def test_evaluate_equals_the_networks_own_answers() -> None:
    x, labels = images(3000, torch.float64)
    nets = networks(torch.float64)
    population = Population([list(n.parameters()) for n in nets], RATES, pixel_order(x))
    loss, correct = population.evaluate(population.arrange(x), labels)
    for member, net in enumerate(nets):
        scores = net(x)
        assert correct[member] == (scores.argmax(1) == labels).sum()
        expected = F.cross_entropy(scores, labels, reduction="sum").detach()
        torch.testing.assert_close(loss[member], expected)


def test_parameters_come_back_as_they_went_in() -> None:
    nets = networks(torch.float32)
    x, _ = images(10)
    population = Population([list(n.parameters()) for n in nets], RATES, pixel_order(x))
    for member, net in enumerate(nets):
        for ours, theirs in zip(population.parameters(member), net.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_networks_of_different_inputs_are_refused() -> None:
    a, b = nn.Linear(784, 10), nn.Linear(100, 10)
    with pytest.raises(ValueError, match="differ in"):
        Population([list(a.parameters()), list(b.parameters())], [0.1, 0.1])
    with pytest.raises(ValueError, match="need both"):
        Population([], [])


MEMBERS = [Member((h,), lr, 4) for h in (5, 9) for lr in (0.1, 0.01)] + [Member((6, 7), 0.1, 4)]


MOVING = [Member((5 + i % 2 * 4,), 0.02, 4, sgd) for i, sgd in enumerate(WAYS)]
MOVING.append(Member((6, 7), 0.01, 4, SGD(0.9, True)))


def training(
    members: list[Member] = MEMBERS, epochs: int = 4, **changes: Any
) -> PopulationTraining:
    settings = {
        "train": images(203),
        "val": images(50, seed=1),
        "batch_size": 8,
        "seed": 3,
        "classes": 10,
    }
    members = [member._replace(max_epochs=epochs) for member in members]
    result = PopulationTraining(members, **{**settings, **changes})
    while not result.done:
        result.run_epoch()
    return result


def assert_same_bits(a: PopulationTraining, b: PopulationTraining, members: list[int]) -> None:
    for member in members:
        for name in a.curves:
            assert a.curves[name][member] == b.curves[name][member]
        for ours, theirs in zip(a.parameters(member), b.parameters(member), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("members", [MEMBERS, MOVING], ids=["plain", "momentum"])
def test_a_training_is_what_each_member_gets_alone(members: list[Member]) -> None:
    x, labels = images(203)
    val_x, val_labels = images(50, seed=1)
    together = training(members)
    for number, member in enumerate(members):
        torch.manual_seed(3)
        net = mlp(784, member.hidden_units, 10)
        optimizer = optimizer_of(net, member.lr, member.sgd)
        for epoch in range(4):
            order = epoch_order(203, 3, epoch)
            losses, _ = train_alone(net, member.lr, x[order], labels[order], 8, optimizer)
            expected = float(losses.double().sum() / 203)
            assert together.curves["train_loss"][number][epoch] == pytest.approx(expected, rel=1e-5)
            scores = net(val_x).detach()
            accuracy = float((scores.argmax(1) == val_labels).double().mean())
            assert together.curves["val_acc"][number][epoch] == pytest.approx(accuracy)
            loss = float(F.cross_entropy(scores, val_labels))
            assert together.curves["val_loss"][number][epoch] == pytest.approx(loss, rel=1e-5)


def test_ten_epochs_are_the_same_bits_on_the_way_to_more() -> None:
    shorter = training(epochs=2)
    nested = PopulationTraining(
        MEMBERS, train=images(203), val=images(50, seed=1), batch_size=8, seed=3, classes=10
    )
    nested.run_epoch()
    nested.run_epoch()
    assert_same_bits(nested, shorter, list(range(len(MEMBERS))))


@pytest.mark.parametrize("everyone", [MEMBERS, MOVING], ids=["plain", "momentum"])
def test_a_network_that_stops_changes_the_others_by_rounding_only(everyone: list[Member]) -> None:
    """The same bits until it stops, the same numbers afterwards."""
    settings = {"train": images(203, torch.float64), "val": images(50, torch.float64, seed=1)}
    members = [member._replace(max_epochs=4) for member in everyone]
    members[1] = members[1]._replace(max_epochs=2)
    together = training(everyone, **settings)
    without = PopulationTraining(members, **settings, batch_size=8, seed=3, classes=10)
    while not without.done:
        without.run_epoch()
    for member in range(len(members)):
        if member == 1:
            continue
        for name in together.curves:
            ours, theirs = without.curves[name][member], together.curves[name][member]
            assert ours[:2] == theirs[:2]
            assert ours == pytest.approx(theirs, rel=1e-12)
        for ours, theirs in zip(
            without.parameters(member), together.parameters(member), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("lr", [1e6, 1e30])
def test_a_diverging_member_keeps_its_neighbours_bits(lr: float) -> None:
    wild = [*MEMBERS]
    wild[1] = wild[1]._replace(lr=lr)
    calm, harmed = training(), training(wild)
    if lr == 1e30:  # at 1e6 every hidden unit dies, and the loss stays finite
        assert "the loss is not finite in epoch" in harmed.failed[1]
    others = [0, 2, 3, 4]
    assert all(harmed.failed[member] is None for member in others)
    assert_same_bits(calm, harmed, others)


def test_a_population_of_failures_stops() -> None:
    result = training([MEMBERS[0]._replace(lr=1e30)])
    assert result.epoch < 4


def test_members_of_other_lengths_stop_when_they_are_done() -> None:
    members = [member._replace(max_epochs=2) for member in MEMBERS]
    members[2] = members[2]._replace(max_epochs=4)
    result = PopulationTraining(
        members, train=images(203), val=images(50, seed=1), batch_size=8, seed=3, classes=10
    )
    while not result.done:
        result.run_epoch()
    assert [len(curve) for curve in result.curves["val_acc"]] == [2, 2, 4, 2, 2]
    alone = training()
    assert result.curves["val_loss"][2] == pytest.approx(alone.curves["val_loss"][2], rel=1e-5)


def test_the_best_state_is_the_one_of_the_first_highest_accuracy() -> None:
    result = training([MEMBERS[0]._replace(lr=2.0), MEMBERS[2]], epochs=6)
    for member in range(2):
        accuracy = result.curves["val_acc"][member]
        assert result.best_epoch[member] == 1 + accuracy.index(max(accuracy))
        shorter = training(
            [MEMBERS[0]._replace(lr=2.0), MEMBERS[2]], epochs=result.best_epoch[member]
        )
        for ours, theirs in zip(
            result.best_parameters(member), shorter.parameters(member), strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("members", [MEMBERS, MOVING], ids=["plain", "momentum"])
def test_a_restored_training_goes_on_to_the_bit(members: list[Member]) -> None:
    undisturbed = training(members)
    settings = {
        "train": images(203),
        "val": images(50, seed=1),
        "batch_size": 8,
        "seed": 3,
        "classes": 10,
    }
    first = PopulationTraining(members, **settings)
    first.run_epoch()
    state = copy.deepcopy(first.state_dict())
    if members is MEMBERS:
        del state["velocities"]  # states of earlier versions have none
    second = PopulationTraining(members, **settings)
    second.load_state_dict(state)
    while not second.done:
        second.run_epoch()
    assert_same_bits(undisturbed, second, list(range(len(members))))
    assert undisturbed.best_epoch == second.best_epoch


def test_initial_weights_are_those_of_the_seed_and_leave_randomness_alone() -> None:
    torch.manual_seed(7)
    expected = list(mlp(784, [5], 10).parameters())
    torch.manual_seed(123)
    before = torch.get_rng_state()
    for ours, theirs in zip(initial_parameters([784, 5, 10], 7), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(before, torch.get_rng_state())


def test_the_memory_estimate_covers_the_weights_and_their_best_state() -> None:
    member = Member((2048, 2048), 0.1, 1)
    weights = sum(p.nbytes for p in mlp(784, member.hidden_units, 10).parameters())
    assert 2 * weights <= training_bytes([784, *member.hidden_units, 10]) <= 4 * weights
    assert (
        4 * weights <= training_bytes([784, *member.hidden_units, 10], plain=False) <= 6 * weights
    )


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("MNIST_DATA_DIR"), reason="needs MNIST_DATA_DIR")
@pytest.mark.parametrize(
    ("batch_size", "lr", "tolerance"),
    # Training multiplies rounding, most at batch 4 and lr 0.1: 63,000 steps later two trainings
    # that differ by the order of their additions are two samples of the same noise.
    [(4, 0.1, 0.01), (8, 0.1, 0.003), (32, 0.1, 0.003), (128, 0.01, 0.0005)],
)
def test_five_epochs_of_mnist_end_close_to_the_lone_model(
    batch_size: int, lr: float, tolerance: float, capsys: pytest.CaptureFixture[str]
) -> None:
    data = MNISTDataModule(source="mnist", data_dir=str(Path(os.environ["MNIST_DATA_DIR"])))
    data.setup("fit")
    train, val = (
        (data.preprocess(s.images).flatten(1), s.labels) for s in (data.train_set, data.val_set)
    )
    members = [Member((100,), lr, 5), Member((10,), lr, 5), Member((50,), lr / 10, 5)]
    together = PopulationTraining(members, train, val, batch_size, seed=0, classes=10)
    while not together.done:
        together.run_epoch()
    torch.manual_seed(0)
    net = mlp(784, [100], 10)
    difference = []
    for epoch in range(5):
        order = epoch_order(len(train[1]), 0, epoch)
        train_alone(net, lr, train[0][order], train[1][order], batch_size)
        alone = float((net(val[0]).argmax(1) == val[1]).double().mean())
        difference.append(together.curves["val_acc"][0][epoch] - alone)
    weights = [
        float((a - b).abs().max() / b.abs().max())
        for a, b in zip(together.parameters(0), net.state_dict().values(), strict=True)
    ]
    with capsys.disabled():
        print(
            f"\nbatch {batch_size}, lr {lr}: val/acc minus the lone model's, epochs 1 to 5:"
            f" {', '.join(f'{d:+.5f}' for d in difference)}; weights differ by {max(weights):.1e}"
        )
    assert abs(difference[-1]) <= tolerance
