"""Many small networks trained at once, as one stacked tensor program.

The networks are multilayer perceptrons of any depth and width, trained by plain SGD; those of a
population see the same mini-batches, each with its own learning rate. Every one of them gets the
updates it would get alone: the arithmetic below is that of ``loss.backward(); optimizer.step()``
written out by hand and reordered, so results differ by rounding only. Three ideas make it fast.

Stacking. The first layers of all networks lie side by side in one matrix, and one product serves
them all. Deeper layers are batched products over networks of one shape; narrow layers are padded
to a common width, with zeros that stay zero and that no other network ever sees.

Blocks. Nearly all the work is in the first layer, whose input does not depend on the weights. For a
block of k mini-batches X_0 .. X_(k-1), let D_s be the gradient of mini-batch s with respect to the
first layer's output, times lr / B. Then ``W_t = W_0 - sum_(s<t) X_s' D_s``, so that

    X_t W_t = X_t W_0 - sum_(s<t) (X_t X_s') D_s,

and W is read once and written once per block, by two large products that run at the speed of the
processor instead of that of the memory. The k x k blocks ``X_t X_s'`` serve all networks.

Dark pixels. Columns are sorted by how often they are lit. What follows a block's last lit pixel is
zero times something, and is left out.

Unit 0 of every layer but the last is the constant 1: biases are the first column of a weight matrix
(the first row of the first one) and need no code.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mnist_lightning.data import epoch_order
from mnist_lightning.models import CLASSES, PIXELS, mlp

# Rows of a block: enough for the two large products to reach the processor's speed, few enough that
# correcting for earlier mini-batches stays cheap. Of 32, 64, 128 and 256, the fastest at each batch
# size from 4 to 128.
BLOCK_ROWS = 128
# Up to this width, networks of one depth share padded batched products (an operation costs more
# than the arithmetic on zeros); wider ones are stacked only with networks of exactly their shape.
PADDED_WIDTH = 128


class Population:
    """Multilayer perceptrons (ReLU, cross entropy) side by side, and their training step.

    Args:
        parameters: for each network its weights and biases, in the order and the shapes of
            ``nn.Sequential(nn.Linear, nn.ReLU, ..., nn.Linear).parameters()``. They are copied.
        lr: for each network its learning rate.
        pixel_order: a permutation of the input's columns, those most often non-zero first; see
            ``pixel_order``. It decides about speed only.

    Raises:
        ValueError: no network, or networks with different inputs or classes.
    """

    def __init__(
        self,
        parameters: Sequence[Sequence[Tensor]],
        lr: Sequence[float],
        pixel_order: Tensor | None = None,
    ) -> None:
        if not parameters or len(parameters) != len(lr):
            raise ValueError(f"{len(parameters)} networks and {len(lr)} learning rates: need both")
        parameters = [[p.detach() for p in network] for network in parameters]
        ends = {(p[0].shape[1], p[-1].shape[0]) for p in parameters}
        if len(ends) > 1:
            raise ValueError(f"networks of one population differ in (inputs, classes): {ends}")
        (inputs, self.classes) = ends.pop()
        like = parameters[0][0]
        self._order = torch.arange(inputs) if pixel_order is None else pixel_order
        self._order = self._order.to(like.device)
        shapes: dict[tuple[int, ...], list[int]] = {}
        for member, network in enumerate(parameters):
            hidden = tuple(w.shape[0] for w in network[0:-2:2])
            # 0 marks a width that is padded to that of its neighbours
            key = tuple(0 if max(hidden) <= PADDED_WIDTH else width for width in hidden)
            shapes.setdefault(key, []).append(member)
        self._stacks = [
            _Stack(members, [parameters[m] for m in members], [lr[m] for m in members], self._order)
            for members in shapes.values()
        ]
        self._place = {
            member: (stack, position)
            for stack in self._stacks
            for position, member in enumerate(stack.members)
        }
        self._like = like.new_empty(0)
        self._grams: dict[tuple[int, int], _Gram] = {}

    def __len__(self) -> int:
        return len(self._place)

    def parameters(self, member: int) -> list[Tensor]:
        """Copies of one network's weights and biases, as they were given to the constructor."""
        stack, position = self._place[member]
        return stack.parameters(position, self._order)

    def arrange(self, x: Tensor) -> Tensor:
        """Images as ``train_block`` and ``evaluate`` want them.

        Args:
            x: floating point, shape ``(n, inputs)``.

        Returns:
            Shape ``(n, 1 + inputs)``: the constant 1, then the pixels in ``pixel_order``.
        """
        rows = self._like.new_ones(len(x), 1 + x.shape[1])
        rows[:, 1:] = x[:, self._order]
        return rows

    @torch.inference_mode()
    def train_block(
        self, rows: Tensor, labels: Tensor, batch_size: int, lit: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """One SGD update of every network for each of some consecutive mini-batches.

        Args:
            rows: arranged images, shape ``(n, 1 + inputs)``; each ``batch_size`` consecutive rows
                are a mini-batch, and so are those that remain.
            labels: int64, shape ``(n,)``.
            batch_size: images in a mini-batch.
            lit: leading columns of ``rows`` beyond which all is zero; by default, all of them.

        Returns:
            The cross entropy summed over each mini-batch and the number of correct answers in it,
            both shape ``(networks, mini-batches)``, both before that mini-batch's update.
        """
        whole = len(rows) // batch_size
        if len(rows) % batch_size:
            last = len(rows) - whole * batch_size
            parts = [(rows[:-last], labels[:-last], batch_size)] if whole else []
            parts.append((rows[-last:], labels[-last:], last))
            results = [self.train_block(*part, lit) for part in parts]
            return tuple(torch.cat(column, 1) for column in zip(*results, strict=True))
        x = rows[:, :lit]
        gram = None
        if whole > 1:
            gram = self._grams.get((whole, batch_size)) or self._grams.setdefault(
                (whole, batch_size), _Gram(self._like, whole, batch_size)
            )
            torch.mm(x, x.T, out=gram.values)
        loss = self._like.new_empty(len(self), whole)
        correct = torch.empty(len(self), whole, dtype=torch.int64, device=self._like.device)
        for stack in self._stacks:
            logits = stack.train_block(x, labels, batch_size, gram)
            loss[stack.index], correct[stack.index] = _score(logits, labels.view(whole, -1))
        return loss, correct

    @torch.inference_mode()
    def evaluate(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the cross entropy and number of correct answers, each of shape ``(networks,)``.

        Args:
            rows: arranged images, shape ``(n, 1 + inputs)``.
            labels: int64, shape ``(n,)``.
        """
        loss = torch.zeros(len(self), dtype=torch.float64, device=self._like.device)
        correct = torch.zeros(len(self), dtype=torch.int64, device=self._like.device)
        for stack in self._stacks:
            for x, y in zip(rows.split(stack.rows), labels.split(stack.rows), strict=True):
                lost, right = _score(stack.logits(x), y[None])
                loss[stack.index] += lost[:, 0]
                correct[stack.index] += right[:, 0]
        return loss, correct


class _Gram:
    """Inner products of the rows of a block, and those a mini-batch needs: with all before it."""

    def __init__(self, like: Tensor, batches: int, size: int) -> None:
        self.values = like.new_empty(batches * size, batches * size)
        self.before = [self.values[t * size : (t + 1) * size, : t * size] for t in range(batches)]


class _Stack:
    """Networks of one depth whose deeper layers are batched products.

    Shapes below: M networks, B images of a mini-batch, k mini-batches of a block, H + 1 units of a
    layer, of which unit 0 is the constant 1.
    """

    def __init__(
        self,
        members: list[int],
        parameters: Sequence[Sequence[Tensor]],
        lr: Sequence[float],
        order: Tensor,
    ) -> None:
        # neighbours of equal first width move in one copy between the compact and padded layouts
        ranks = sorted(range(len(members)), key=lambda i: [w.shape[0] for w in parameters[i][::2]])
        self.members = [members[i] for i in ranks]
        parameters = [parameters[i] for i in ranks]
        like = parameters[0][0]
        self.index = torch.tensor(self.members, device=like.device)
        self.lr = like.new_tensor([lr[i] for i in ranks]).view(-1, 1, 1)
        self.sizes = [[w.shape[0] for w in network[::2]] for network in parameters]
        self.depth = len(self.sizes[0]) - 1
        constant = 1 if self.depth else 0
        blocks = [sizes[0] + constant for sizes in self.sizes]
        starts = [sum(blocks[:m]) for m in range(len(blocks))]
        self.columns = [slice(a, a + b) for a, b in zip(starts, blocks, strict=True)]
        self.width = max(blocks)
        # (first network, one past the last, their width) of each run of equal first widths
        self.runs = [
            (blocks.index(b), len(blocks) - blocks[::-1].index(b), b) for b in sorted(set(blocks))
        ]
        self.padded = len(self.runs) > 1
        self.rows = max(
            64, 2**18 // sum(blocks)
        )  # evaluated at once: what a processor's cache holds

        self.first = like.new_zeros(1 + len(order), sum(blocks))  # (1 + inputs, all first layers)
        widths = [max(column) for column in zip(*self.sizes, strict=True)]
        self.layers = [  # (M, units, 1 + units before)
            like.new_zeros(len(members), widths[i] + (i < self.depth), 1 + widths[i - 1])
            for i in range(1, self.depth + 1)
        ]
        for m, network in enumerate(parameters):
            block = self.first[:, self.columns[m]]
            if constant:
                block[0, 0] = 1
            block[0, constant:] = network[1]
            block[1:, constant:] = network[0].T[order]
            for i, layer in enumerate(self.layers):
                if i < self.depth - 1:
                    layer[m, 0, 0] = 1
                weight, bias = self._views(i, m)
                weight.copy_(network[2 * i + 2])
                bias.copy_(network[2 * i + 3])
        self._plans: dict[tuple[int, int], _Plan] = {}

    def _views(self, i: int, m: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of network ``m`` inside the ``i``-th layer after the first."""
        before, units = self.sizes[m][i], self.sizes[m][i + 1]
        layer = self.layers[i][m, int(i < self.depth - 1) :]
        return layer[:units, 1 : 1 + before], layer[:units, 0]

    def parameters(self, m: int, order: Tensor) -> list[Tensor]:
        block = self.first[:, self.columns[m]][:, -self.sizes[m][0] :]
        weight = torch.empty_like(block[1:].T, memory_format=torch.contiguous_format)
        weight[:, order] = block[1:].T
        found = [weight, block[0].clone()]
        for i in range(self.depth):
            found += [view.clone() for view in self._views(i, m)]
        return found

    def pad(self, compact: Tensor, padded: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the same values in ``(n, columns)`` and ``(n, M, width)``, run by run."""
        for start, stop, width in self.runs:
            columns = compact[:, self.columns[start].start : self.columns[stop - 1].stop]
            yield columns.view(-1, stop - start, width), padded[:, start:stop, :width]

    def logits(self, x: Tensor) -> Tensor:
        """``(n, 1 + inputs) -> (1, M, n, classes)``; a view of any strides."""
        compact = x @ self.first
        z = compact
        if self.padded:
            z = x.new_zeros(len(x), len(self.members) * self.width)
            for source, target in self.pad(compact, z.view(len(x), -1, self.width)):
                target.copy_(source)
        a = z.view(len(x), -1, self.width).transpose(0, 1)
        for layer in self.layers:
            a = torch.bmm(a.relu_(), layer.mT)
        return a[None]

    def train_block(self, x: Tensor, labels: Tensor, batch_size: int, gram: _Gram | None) -> Tensor:
        """Trains on a block; returns the logits before each update, ``(k, M, B, classes)``."""
        batches = len(x) // batch_size
        plan = self._plans.get((batches, batch_size))
        if plan is None:
            plan = self._plans[batches, batch_size] = _Plan(self, batches, batch_size)
        first = self.first[: x.shape[1]]
        torch.mm(x, first, out=plan.compact_z)
        for compact, padded in plan.runs_of_z:
            padded.copy_(compact)
        # the gradient (softmax - one-hot) is scaled by lr / B here, so all that follow from it are
        step = self.lr / batch_size
        one_hot = step.new_zeros(batches, 1, batch_size, plan.logits.shape[3])
        one_hot.scatter_(3, labels.view(batches, 1, -1, 1), 1)
        torch.mul(one_hot, -step, out=plan.targets)
        for t in range(batches):
            if t:
                plan.z[t].addmm_(gram.before[t], plan.d_before[t], alpha=-1)
            for a, weight, out in plan.forward[t]:
                torch.bmm(a.relu_(), weight, out=out)
            torch.softmax(plan.class_major[t], 0, out=plan.softmax)
            torch.addcmul(plan.targets[t], plan.probability, step, out=plan.delta[t])
            for delta, delta_t, layer, a, da, da_units, a_units, below in plan.backward[t]:
                torch.bmm(delta, layer, out=da)
                layer.baddbmm_(delta_t, a, alpha=-1)
                torch.ops.aten.threshold_backward.grad_input(da_units, a_units, 0, grad_input=below)
        for compact, padded in plan.runs_of_d:
            compact.copy_(padded)
        first.addmm_(x.T, plan.compact_d, alpha=-1)
        return plan.logits


class _Plan:
    """Buffers of a stack for blocks of k mini-batches of B rows, and the views a step needs.

    A step on narrow networks takes 30 microseconds: making views anew would take as long again.
    """

    def __init__(self, stack: _Stack, batches: int, size: int) -> None:
        m, width, rows = len(stack.members), stack.width, batches * size
        new = stack.first.new_zeros
        each = range(batches)
        self.compact_z, self.compact_d = new(2, rows, stack.first.shape[1])
        z, d = new(2, rows, m * width) if stack.padded else (self.compact_z, self.compact_d)
        pad = stack.pad if stack.padded else lambda compact, padded: ()
        self.runs_of_z = list(pad(self.compact_z, z.view(rows, m, width)))
        self.runs_of_d = list(pad(self.compact_d, d.view(rows, m, width)))
        self.z = z.view(batches, size, -1).unbind()
        self.d_before = [d[: t * size] for t in each]

        # unit 0 is constant: its column of every delta below stays 0, and so it stays 1
        first_a = z.view(batches, size, m, width).transpose(1, 2)  # (k, M, B, H + 1)
        first_d = d.view(batches, size, m, width).transpose(1, 2)
        outputs = [new(m, size, layer.shape[1]) for layer in stack.layers[:-1]]
        deltas = [new(m, size, layer.shape[1]) for layer in stack.layers]
        gradients = [new(m, size, layer.shape[2]) for layer in stack.layers]
        if stack.depth:
            self.logits = new(batches, m, size, stack.layers[-1].shape[1])
            self.delta = [deltas[-1]] * batches
        else:
            self.logits, self.delta = first_a, first_d.unbind()
        self.forward, self.backward = [], []
        for t in each:
            a = [first_a[t], *outputs]
            below = [first_d[t], *deltas]
            self.forward.append(
                [
                    (a[i], layer.mT, out)
                    for i, (layer, out) in enumerate(
                        zip(stack.layers, [*outputs, self.logits[t]], strict=False)
                    )
                ]
            )
            self.backward.append(
                [
                    (
                        deltas[i],
                        deltas[i].mT,
                        stack.layers[i],
                        a[i],
                        gradients[i],
                        gradients[i][..., 1:],
                        a[i][..., 1:],
                        below[i][..., 1:],
                    )
                    for i in reversed(range(stack.depth))
                ]
            )
        # PyTorch's softmax over ten adjacent numbers is ten times slower than across rows
        self.class_major = [self.logits[t].permute(2, 0, 1) for t in each]
        self.softmax = new(self.logits.shape[3], m, size)
        self.probability = self.softmax.permute(1, 2, 0)
        self.targets = new(self.logits.shape)


def _score(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``(k, M, B, classes), (k, B)`` -> summed cross entropy and correct answers, both (M, k).

    An answer whose score ties with the highest counts as correct.
    """
    scores = logits.permute(3, 0, 1, 2).contiguous()  # class by class: see _Plan.class_major
    scores -= scores.amax(0)
    answer = scores.gather(0, labels[None, :, None].expand(1, *scores.shape[1:]))[0]
    loss = scores.exp_().sum(0).log_() - answer
    return loss.sum(2).T, (answer == 0).sum(2).T


class Member(NamedTuple):
    """What tells the networks of a training apart."""

    hidden_units: tuple[int, ...]
    lr: float
    max_epochs: int


class PopulationTraining:
    """Trains networks on the same mini-batches, epoch by epoch, and validates after each epoch.

    Every network starts from the weights, and visits the images in the order, that it would have
    alone with the same seed. Nothing depends on a network's ``max_epochs`` but when it stops: the
    state after 10 epochs is the same bits whether 10 were asked for or 100.

    Args:
        members: the networks.
        train: images, floating point ``(n, 784)``, and labels, int64 ``(n,)``.
        val: the same for validation.
        batch_size: images in a mini-batch.
        seed: of the initial weights and of the order of the images.

    Attributes:
        epoch: how many epochs are done.
        curves: ``train_loss``, ``val_loss`` and ``val_acc``, each a list for each member with a
            number for each epoch. The train loss is the mean over the epoch's mini-batches as they
            came, before each update.
        failed: for each member ``None``, or why its numbers mean nothing any more.
        best_epoch: for each member the first epoch, counted from 1, of its highest ``val_acc``.
    """

    CURVES = ("train_loss", "val_loss", "val_acc")

    def __init__(
        self,
        members: Sequence[Member],
        train: tuple[Tensor, Tensor],
        val: tuple[Tensor, Tensor],
        batch_size: int,
        seed: int,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.members, self.batch_size, self.seed = list(members), batch_size, seed
        self.epoch = 0
        self.curves: dict[str, list[list[float]]] = {
            name: [[] for _ in self.members] for name in self.CURVES
        }
        self.failed: list[str | None] = [None for _ in self.members]
        self.best_epoch = [0 for _ in self.members]
        self._best: list[list[Tensor]] = [[] for _ in self.members]
        self._order = pixel_order(train[0])
        networks = {}
        for m, member in enumerate(self.members):
            networks[m] = initial_parameters(member.hidden_units, seed)
            networks[m] = [p.to(train[0]) for p in networks[m]]
        self._populate(networks)
        self._train, self._val = ((self.population.arrange(x), y) for x, y in (train, val))
        columns = torch.arange(1, 1 + self._train[0].shape[1], device=train[0].device)
        # for each image, how many leading columns hold all of it
        self._lit = torch.cat(
            [((rows != 0) * columns).amax(1) for rows in self._train[0].split(1024)]
        )

    def _populate(self, networks: dict[int, list[Tensor]]) -> None:
        self._training = list(networks)
        lr = [self.members[m].lr for m in networks]
        self.population = Population(list(networks.values()), lr, self._order)

    @property
    def done(self) -> bool:
        """Whether no network is left that has epochs to go and finite weights."""
        return not any(
            member.max_epochs > self.epoch and failed is None
            for member, failed in zip(self.members, self.failed, strict=True)
        )

    def parameters(self, member: int) -> list[Tensor]:
        """Weights and biases after the last epoch done, for networks that trained in it."""
        return self.population.parameters(self._training.index(member))

    def best_parameters(self, member: int) -> list[Tensor]:
        """Weights and biases after the member's ``best_epoch``."""
        return self._best[member]

    def run_epoch(self) -> None:
        """One more epoch of training, and one validation."""
        left = [m for m in self._training if self.members[m].max_epochs > self.epoch]
        if left != self._training:  # the others have done their epochs
            self._populate({m: self.parameters(m) for m in left})
        rows, labels = self._train
        n = len(labels)
        order = epoch_order(n, self.seed, self.epoch).to(rows.device)
        block = self.batch_size * max(1, BLOCK_ROWS // self.batch_size)
        total = torch.zeros(len(left), dtype=torch.float64, device=rows.device)
        for images in order.split(block):
            lit = int(self._lit[images].max())
            loss, _ = self.population.train_block(
                rows[images], labels[images], self.batch_size, lit
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
        for name, value in zip(self.CURVES, (train_loss, val_loss, val_acc), strict=True):
            self.curves[name][m].append(value)
        best = self.curves["val_acc"][m][self.best_epoch[m] - 1] if self.best_epoch[m] else -1.0
        if not self.failed[m] and val_acc > best:
            self.best_epoch[m], self._best[m] = self.epoch, self.parameters(m)

    def state_dict(self) -> dict[str, Any]:
        """All that ``load_state_dict`` needs to go on, to the bit."""
        return {
            "epoch": self.epoch,
            "curves": self.curves,
            "failed": self.failed,
            "best_epoch": self.best_epoch,
            "best": self._best,
            "networks": {m: self.parameters(m) for m in self._training},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back, or on, to a state of a training with the same arguments."""
        self.epoch, self.curves, self.failed = state["epoch"], state["curves"], state["failed"]
        self.best_epoch, self._best = state["best_epoch"], state["best"]
        self._populate(state["networks"])


def initial_parameters(hidden_units: Sequence[int], seed: int) -> list[Tensor]:
    """Weights and biases of a network built right after seeding; keeps the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [p.detach() for p in mlp(hidden_units).parameters()]


def training_bytes(member: Member) -> int:
    """Memory that a member needs in a training: weights, their best state, what a block keeps."""
    sizes = [PIXELS, *member.hidden_units, CLASSES]
    weights = sum((a + 1) * b for a, b in pairwise(sizes))
    return 4 * (2 * weights + 8 * BLOCK_ROWS * sum(sizes[1:]))


def pixel_order(x: Tensor) -> Tensor:
    """The columns of ``x`` ``(n, inputs)``, those most often non-zero first."""
    return (x != 0).sum(0).argsort(descending=True, stable=True)
