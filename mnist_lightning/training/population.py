"""Trains many networks on the same mini-batches, epoch by epoch, with ``stacked``."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mnist_lightning.data.sampling import epoch_order
from mnist_lightning.metrics import CURVES
from mnist_lightning.nets import mlp
from mnist_lightning.training.stacked import BLOCK_ROWS, SGD, Population


class Member(NamedTuple):
    """In what the networks of a training differ."""

    hidden_units: tuple[int, ...]
    lr: float
    max_epochs: int
    sgd: SGD = SGD()


class PopulationTraining:
    """Trains networks on the same mini-batches, epoch by epoch, and validates after each epoch.

    Every network has the initial weights and the order of images that it would have alone with the
    same seed. Its updates are those it would make alone, up to rounding, which depends on the
    networks that are stacked together. So until the first network stops, results are bit-identical
    for all values of ``max_epochs``. Then the others are stacked again, and their later updates
    differ by rounding from those beside the network that stopped.

    Args:
        members: the networks.
        train: images, floating point ``(n, pixels)``, and labels, int64 ``(n,)``.
        val: the same for validation.
        batch_size: images in a mini-batch.
        seed: of the initial weights and of the order of the images.
        classes: number of classes.

    Attributes:
        epoch: how many epochs are done.
        curves: ``train_loss``, ``val_loss`` and ``val_acc``, each a list for each member with a
            number for each epoch. The train loss is the mean over the epoch's mini-batches, each
            before its update.
        failed: for each member ``None``, or why its numbers have no meaning from then on.
        best_epoch: for each member the first epoch, counted from 1, with its highest ``val_acc``.
    """

    def __init__(
        self,
        members: Sequence[Member],
        train: tuple[Tensor, Tensor],
        val: tuple[Tensor, Tensor],
        batch_size: int,
        seed: int,
        classes: int,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.members, self.batch_size, self.seed = list(members), batch_size, seed
        self.epoch = 0
        self.curves: dict[str, list[list[float]]] = {
            name: [[] for _ in self.members] for name in CURVES
        }
        self.failed: list[str | None] = [None for _ in self.members]
        self.best_epoch = [0 for _ in self.members]
        self._best: list[list[Tensor]] = [[] for _ in self.members]
        self._order = pixel_order(train[0])
        networks = {}
        for m, member in enumerate(self.members):
            sizes = [train[0].shape[1], *member.hidden_units, classes]
            networks[m] = initial_parameters(sizes, seed)
            networks[m] = [p.to(train[0]) for p in networks[m]]
        self._populate(networks, {})
        self._train, self._val = ((self.population.arrange(x), y) for x, y in (train, val))
        columns = torch.arange(1, 1 + self._train[0].shape[1], device=train[0].device)
        # for each image, how many leading columns hold all that is not zero
        self._nonzero_columns = torch.cat(
            [((rows != 0) * columns).amax(1) for rows in self._train[0].split(1024)]
        )

    def _populate(
        self, networks: dict[int, list[Tensor]], velocities: dict[int, list[Tensor]]
    ) -> None:
        self._training = list(networks)
        self.population = Population(
            list(networks.values()),
            [self.members[m].lr for m in networks],
            self._order,
            [self.members[m].sgd for m in networks],
            [velocities.get(m, []) for m in networks],
        )

    @property
    def done(self) -> bool:
        """Whether every network has failed or trained all its epochs."""
        return not any(
            member.max_epochs > self.epoch and failed is None
            for member, failed in zip(self.members, self.failed, strict=True)
        )

    def parameters(self, member: int) -> list[Tensor]:
        """Weights and biases of a network that trained in the last epoch."""
        return self.population.parameters(self._training.index(member))

    def _velocity(self, member: int) -> list[Tensor]:
        return self.population.velocity(self._training.index(member))

    def best_parameters(self, member: int) -> list[Tensor]:
        """Weights and biases after the member's ``best_epoch``."""
        return self._best[member]

    def run_epoch(self) -> None:
        """Trains one epoch and validates."""
        left = [m for m in self._training if self.members[m].max_epochs > self.epoch]
        if left != self._training:  # the others have done their epochs
            self._populate(
                {m: self.parameters(m) for m in left}, {m: self._velocity(m) for m in left}
            )
        rows, labels = self._train
        n = len(labels)
        order = epoch_order(n, self.seed, self.epoch).to(rows.device)
        block = self.batch_size * max(1, BLOCK_ROWS // self.batch_size)
        total = torch.zeros(len(left), dtype=torch.float64, device=rows.device)
        for images in order.split(block):
            nonzero_columns = int(self._nonzero_columns[images].max())
            loss, _ = self.population.train_block(
                rows[images], labels[images], self.batch_size, nonzero_columns
            )
            total += loss.sum(1)
        val_loss, correct = self.population.evaluate(*self._val)
        self.epoch += 1
        n_val = len(self._val[1])
        results = zip(left, total.tolist(), val_loss.tolist(), correct.tolist(), strict=True)
        for m, train_loss, loss, right in results:
            self._note(m, train_loss / n, loss / n_val, right / n_val)

    def _note(self, m: int, train_loss: float, val_loss: float, val_acc: float) -> None:
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)) and not self.failed[m]:
            self.failed[m] = f"diverged: the loss is not finite in epoch {self.epoch}"
        for name, value in zip(CURVES, (train_loss, val_loss, val_acc), strict=True):
            self.curves[name][m].append(value)
        best = self.curves["val_acc"][m][self.best_epoch[m] - 1] if self.best_epoch[m] else -1.0
        if not self.failed[m] and val_acc > best:
            self.best_epoch[m], self._best[m] = self.epoch, self.parameters(m)

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to continue exactly."""
        return {
            "epoch": self.epoch,
            "curves": self.curves,
            "failed": self.failed,
            "best_epoch": self.best_epoch,
            "best": self._best,
            "networks": {m: self.parameters(m) for m in self._training},
            "velocities": {m: self._velocity(m) for m in self._training},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state of a training with the same arguments."""
        self.epoch, self.curves, self.failed = state["epoch"], state["curves"], state["failed"]
        self.best_epoch, self._best = state["best_epoch"], state["best"]
        self._populate(state["networks"], state.get("velocities", {}))  # earlier states have none


def initial_parameters(sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Weights and biases of a network made after seeding; the global random state is unchanged.

    Args:
        sizes: of its layers, from the pixels to the classes.
        seed: of the weights.
    """
    pixels, *hidden_units, classes = sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [p.detach() for p in mlp(pixels, hidden_units, classes).parameters()]


def training_bytes(sizes: Sequence[int], plain: bool = True) -> int:
    """Bytes that a network needs in a training: weights, the best weights, buffers of a block.

    Args:
        sizes: of its layers, from the pixels to the classes.
        plain: if False, it has momentum or weight decay, which need a velocity, a gradient and more
            buffers.
    """
    weights = sum((a + 1) * b for a, b in pairwise(sizes))
    if plain:
        return 4 * (2 * weights + 8 * BLOCK_ROWS * sum(sizes[1:]))
    return 4 * (4 * weights + BLOCK_ROWS * (9 * sum(sizes[1:]) + BLOCK_ROWS))


def pixel_order(x: Tensor) -> Tensor:
    """The columns of ``x`` ``(n, inputs)``, those most often non-zero first."""
    return (x != 0).sum(0).argsort(descending=True, stable=True)
