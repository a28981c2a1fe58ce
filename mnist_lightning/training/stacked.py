"""Many small networks trained at once, as one stacked tensor program.

The networks are multilayer perceptrons of any depth and width, trained by SGD. Those of a
population train on the same mini-batches, each with its own learning rate, momentum and weight
decay. Each gets the updates it would get alone: the arithmetic is that of ``loss.backward();
optimizer.step()``, written out and reordered, so results differ only by rounding. Three ideas make
it fast.

Stacking. The first layers of all networks lie side by side in one matrix, and one product serves
them all. Deeper layers are batched products over networks of one shape; narrow layers are padded
to a common width, with zeros that stay zero and have no effect.

Blocks. Nearly all the work is in the first layer, whose input does not depend on the weights. For a
block of k mini-batches X_0 .. X_(k-1), let D_s be the gradient of mini-batch s with respect to the
first layer's output, times lr / B. Then ``W_t = W_0 - sum_(s<t) X_s' D_s``, so that

    X_t W_t = X_t W_0 - sum_(s<t) (X_t X_s') D_s,

and W is read once and written once per block, by two large products, whose speed is limited by the
processor and not by memory. The k x k blocks ``X_t X_s'`` serve all networks.

Zero columns. Columns are sorted by how often they are non-zero. Those after the last one that is
non-zero anywhere in a block contribute nothing to the products, and are left out.

Unit 0 of every layer but the last is the constant 1: biases are the first column of a weight matrix
(the first row of the first one) and need no code.

Momentum m and weight decay w keep these ideas. Let V be PyTorch's momentum buffer times lr, and
l = lr w. Update t is ``V' = m V + X_t' D_t + l W``, and then ``W' = W - V'``, or with Nesterov's
momentum ``W' = W - (m V' + X_t' D_t + l W)``. It is linear: with a 2 x 2 matrix A and a vector b of
numbers

    (W_t, V_t) = A^t (W_0, V_0) + sum_(s<t) A^(t-1-s) b X_s' D_s.

So X_t W_t is the sum above with a number before each term, and a term with X_t V_0. A block ends
with two large products, for W and for V. Biases have other numbers, as w is 0 for them.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

# Rows of a block: enough for the two large products to reach the processor's speed, few enough to
# keep the corrections for earlier mini-batches cheap. The fastest of 32, 64, 128 and 256 at each
# batch size from 4 to 128.
BLOCK_ROWS = 128
# Up to this width, networks of one depth share padded batched products (an operation costs more
# than the arithmetic on zeros); wider ones are stacked only with networks of exactly their shape.
PADDED_WIDTH = 128
# With momentum or weight decay, mini-batches of this many rows are blocks of their own: W and V are
# read and written more often, but the products for V are saved. The fastest at each batch size from
# 4 to 128.
STEP_ROWS = 32


class SGD(NamedTuple):
    """Options of a network's SGD, as in ``torch.optim.SGD``; biases have no weight decay."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether it has none of them."""
        return not any(self)


class Population:
    """Multilayer perceptrons (ReLU, cross entropy) side by side, and their training step.

    Args:
        parameters: for each network its weights and biases, in the order and the shapes of
            ``nn.Sequential(nn.Linear, nn.ReLU, ..., nn.Linear).parameters()``. They are copied.
        lr: for each network its learning rate.
        pixel_order: a permutation of the input's columns, those most often non-zero first; see
            ``population.pixel_order``. It changes speed, not results.
        options: for each network the other options of its SGD; by default those of plain SGD.
        velocities: for each network what ``velocity`` returned, to continue its training; by
            default, trainings begin.

    Raises:
        ValueError: no network, or networks with different inputs or classes.
    """

    def __init__(
        self,
        parameters: Sequence[Sequence[Tensor]],
        lr: Sequence[float],
        pixel_order: Tensor | None = None,
        options: Sequence[SGD] | None = None,
        velocities: Sequence[Sequence[Tensor]] | None = None,
    ) -> None:
        if not parameters or len(parameters) != len(lr):
            raise ValueError(f"{len(parameters)} networks and {len(lr)} learning rates: need both")
        parameters = [[p.detach() for p in network] for network in parameters]
        ends = {(p[0].shape[1], p[-1].shape[0]) for p in parameters}
        if len(ends) > 1:
            raise ValueError(f"networks of one population differ in (inputs, classes): {ends}")
        like = parameters[0][0]
        self._order: Tensor | slice = (
            slice(None) if pixel_order is None else pixel_order.to(like.device)
        )
        options = options or [SGD() for _ in parameters]
        kinds: dict[tuple[int, ...], list[int]] = {}
        for member, network in enumerate(parameters):
            hidden = tuple(w.shape[0] for w in network[0:-2:2])
            # 0 marks a width that is padded to that of its neighbours
            shape = (0 if max(hidden) <= PADDED_WIDTH else width for width in hidden)
            kinds.setdefault((*map(bool, options[member]), *shape), []).append(member)
        self._stacks = [
            _Stack(
                members,
                [parameters[m] for m in members],
                [lr[m] for m in members],
                self._order,
                [options[m] for m in members],
            )
            for members in kinds.values()
        ]
        self._place = {
            member: (stack, position)
            for stack in self._stacks
            for position, member in enumerate(stack.members)
        }
        for member, velocity in enumerate(velocities or ()):
            stack, position = self._place[member]
            if velocity:
                stack.load(position, velocity, self._order, stack.velocity)
        self._like = like.new_empty(0)
        self._grams: dict[tuple[int, int], _Gram] = {}

    def __len__(self) -> int:
        return len(self._place)

    def parameters(self, member: int) -> list[Tensor]:
        """Copies of one network's weights and biases, as they were given to the constructor."""
        stack, position = self._place[member]
        return stack.read(position, self._order, stack.weights)

    def velocity(self, member: int) -> list[Tensor]:
        """One network's momentum buffers times its learning rate, in the order of its parameters.

        Empty if it has no momentum.
        """
        stack, position = self._place[member]
        return stack.read(position, self._order, stack.velocity) if stack.velocity else []

    @torch.inference_mode()
    def load(self, member: int, parameters: Sequence[Tensor], lr: float) -> None:
        """Replaces the weights, biases and learning rate of a network under plain SGD.

        Args:
            member: which network.
            parameters: of the same shapes as those it was made with.
            lr: its learning rate from now on.

        Raises:
            ValueError: it has momentum or weight decay.
        """
        stack, position = self._place[member]
        if not stack.plain:
            raise ValueError(
                f"network {member} has momentum or weight decay: make a new population"
            )
        stack.load(position, parameters, self._order, stack.weights)
        stack.lr[position] = lr

    def arrange(self, x: Tensor) -> Tensor:
        """Images as ``train_block`` and ``evaluate`` take them.

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
        self, rows: Tensor, labels: Tensor, batch_size: int, nonzero_columns: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """One SGD update of every network for each of some consecutive mini-batches.

        Args:
            rows: arranged images, shape ``(n, 1 + inputs)``; each ``batch_size`` consecutive rows
                are a mini-batch, and so are the remaining ones.
            labels: int64, shape ``(n,)``.
            batch_size: images in a mini-batch.
            nonzero_columns: how many leading columns of ``rows`` hold all that is not zero; by
                default, all of them.

        Returns:
            The cross entropy summed over each mini-batch and the number of correct answers in it,
            both shape ``(networks, mini-batches)``, both before that mini-batch's update.
        """
        whole = len(rows) // batch_size
        if len(rows) % batch_size:
            last = len(rows) - whole * batch_size
            parts = [(rows[:-last], labels[:-last], batch_size)] if whole else []
            parts.append((rows[-last:], labels[-last:], last))
            results = [self.train_block(*part, nonzero_columns) for part in parts]
            losses, hits = zip(*results, strict=True)
            return torch.cat(losses, 1), torch.cat(hits, 1)
        x = rows[:, :nonzero_columns]
        gram = None
        if any(stack.joined(whole, batch_size) > 1 for stack in self._stacks):
            gram = self._grams.get((whole, batch_size)) or self._grams.setdefault(
                (whole, batch_size), _Gram(self._like, whole, batch_size)
            )
            torch.mm(x, x.T, out=gram.values)
        loss = self._like.new_empty(len(self), whole)
        correct = torch.empty(len(self), whole, dtype=torch.int64, device=self._like.device)
        for stack in self._stacks:
            joined = stack.joined(whole, batch_size)
            for t in range(0, whole, joined):
                part = slice(t * batch_size, (t + joined) * batch_size)
                logits = stack.train_block(x[part], labels[part], batch_size, gram)
                scores = _score(logits, labels[part].view(joined, -1))
                for result, score in zip((loss, correct), scores, strict=True):
                    result[stack.index, t : t + joined] = score
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
    """Inner products of the rows of a block; of each mini-batch, those with all rows before it."""

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
        order: Tensor | slice,
        options: Sequence[SGD],
    ) -> None:
        # the options are of one kind; from here on, the weight decay is that of an update: times lr
        updates = [
            o._replace(weight_decay=o.weight_decay * r) for o, r in zip(options, lr, strict=True)
        ]
        # networks of equal numbers side by side: one product corrects them; then those of equal
        # first width: one copy moves them between the layouts
        ranks = sorted(
            range(len(members)),
            key=lambda i: (updates[i], [w.shape[0] for w in parameters[i][::2]]),
        )
        self.members = [members[i] for i in ranks]
        parameters = [parameters[i] for i in ranks]
        self.updates = [updates[i] for i in ranks]
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
        self.runs = [(run[0], run[-1] + 1, blocks[run[0]]) for run in _runs(blocks)]
        self.padded = len(self.runs) > 1
        # rows evaluated at once: as many as a processor's cache holds
        self.rows = max(64, 2**18 // sum(blocks))
        # (1 + inputs, all first layers)
        self.first = like.new_zeros(1 + like.shape[1], sum(blocks))
        widths = [max(column) for column in zip(*self.sizes, strict=True)]
        self.layers = [  # (M, units, 1 + units before)
            like.new_zeros(len(members), widths[i] + (i < self.depth), 1 + widths[i - 1])
            for i in range(1, self.depth + 1)
        ]
        if constant:
            self.first[0, starts] = 1
        for layer in self.layers[:-1]:
            layer[:, 0, 0] = 1
        self.weights = [self.first, *self.layers]
        for m, network in enumerate(parameters):
            self.load(m, network, order, self.weights)
        self.plain = options[0].plain
        self.nesterov, self.decays = options[0].nesterov, options[0].weight_decay > 0
        self.velocity = [torch.zeros_like(w) for w in self.weights] if options[0].momentum else []
        self.gradient = torch.empty(0) if self.plain else torch.empty_like(self.first)
        self.momentum = self._by_layer([u.momentum for u in self.updates])
        self.decay = self._by_layer([u.weight_decay for u in self.updates])
        self._workspaces: dict[tuple[int, int], _Workspace] = {}

    def by_column(self, numbers: Tensor) -> Tensor:
        """Numbers of the networks, ``(..., M)``, as those of the columns of ``first``."""
        blocks = [columns.stop - columns.start for columns in self.columns]
        repeats = torch.tensor(blocks, device=numbers.device)
        return numbers.repeat_interleave(repeats, -1).to(self.first)

    def _by_layer(self, numbers: Sequence[float]) -> list[Tensor]:
        """Numbers of the networks in shapes that multiply each layer."""
        each = self.first.new_tensor(numbers)
        return [self.by_column(each), *[each.view(-1, 1, 1)] * self.depth]

    def load(
        self, m: int, network: Sequence[Tensor], order: Tensor | slice, layers: Sequence[Tensor]
    ) -> None:
        """Copies tensors like the parameters of network ``m`` into ``weights`` or ``velocity``."""
        block = layers[0][:, self.columns[m]][:, -self.sizes[m][0] :]
        block[0] = network[1]
        block[1:] = network[0].T[order]
        for i in range(1, self.depth + 1):
            weight, bias = self._views(i, m, layers)
            weight.copy_(network[2 * i])
            bias.copy_(network[2 * i + 1])

    def _views(self, i: int, m: int, layers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Weight and bias of network ``m`` inside a layer after the first."""
        before, units = self.sizes[m][i - 1 : i + 1]
        layer = layers[i][m, int(i < self.depth) :]
        return layer[:units, 1 : 1 + before], layer[:units, 0]

    def read(self, m: int, order: Tensor | slice, layers: Sequence[Tensor]) -> list[Tensor]:
        """What ``load`` has copied, and training has changed."""
        block = layers[0][:, self.columns[m]][:, -self.sizes[m][0] :]
        weight = torch.empty_like(block[1:].T, memory_format=torch.contiguous_format)
        weight[:, order] = block[1:].T
        tensors = [weight, block[0].clone()]
        for i in range(1, self.depth + 1):
            tensors += [view.clone() for view in self._views(i, m, layers)]
        return tensors

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

    def joined(self, batches: int, batch_size: int) -> int:
        """How many of a block's mini-batches this stack trains on as a block of its own."""
        return batches if self.plain or batch_size < STEP_ROWS else 1

    def descend(self, i: int, gradient: Tensor) -> None:
        """One update of layer ``i`` by its gradient times lr, which is overwritten."""
        weights = self.weights[i]
        if self.decays:
            no_bias = (..., slice(1, None)) if i else (slice(1, None),)
            gradient[no_bias].addcmul_(weights[no_bias], self.decay[i])
        if self.velocity:
            velocity = self.velocity[i].mul_(self.momentum[i]).add_(gradient)
            gradient = gradient.addcmul_(velocity, self.momentum[i]) if self.nesterov else velocity
        weights.sub_(gradient)

    def train_block(self, x: Tensor, labels: Tensor, batch_size: int, gram: _Gram | None) -> Tensor:
        """Trains on a block; returns the logits before each update, ``(k, M, B, classes)``."""
        batches = len(x) // batch_size
        workspace = self._workspaces.get((batches, batch_size))
        if workspace is None:
            kind = _Workspace if self.plain or batches == 1 else _Recurrence
            workspace = kind(self, batches, batch_size)
            self._workspaces[batches, batch_size] = workspace
        workspace.begin(self, x, gram)
        for compact, padded in workspace.runs_of_z:
            padded.copy_(compact)
        # the gradient (softmax - one-hot) is scaled by lr / B here, and with it all later ones
        step = self.lr / batch_size
        one_hot = step.new_zeros(batches, 1, batch_size, workspace.logits.shape[3])
        one_hot.scatter_(3, labels.view(batches, 1, -1, 1), 1)
        torch.mul(one_hot, -step, out=workspace.targets)
        for t in range(batches):
            if t:
                workspace.correct(t, gram)
            for a, weight, out in workspace.forward[t]:
                torch.bmm(a.relu_(), weight, out=out)
            torch.softmax(workspace.class_major[t], 0, out=workspace.softmax)
            torch.addcmul(workspace.targets[t], workspace.probability, step, out=workspace.delta[t])
            for views in workspace.backward[t]:
                i, delta, delta_t, layer, a, update, da, da_units, a_units, below = views
                torch.bmm(delta, layer, out=da)
                # not baddbmm_: for small layers it adds image by image to the weights and rounds
                # each time, while autograd rounds once an update
                torch.bmm(delta_t, a, out=update)
                self.descend(i, update)
                torch.ops.aten.threshold_backward.grad_input(da_units, a_units, 0, grad_input=below)
        for compact, padded in workspace.runs_of_d:
            compact.copy_(padded)
        workspace.end(self, x)
        return workspace.logits


class _Workspace:
    """Buffers of a stack for blocks of k mini-batches of B rows, and the views that a step needs.

    A step on narrow networks takes 30 microseconds; making the views in each would double that.
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

        # unit 0 is constant: its column of every delta below stays 0, so the unit stays 1
        first_a = z.view(batches, size, m, width).transpose(1, 2)  # (k, M, B, H + 1)
        first_d = d.view(batches, size, m, width).transpose(1, 2)
        outputs = [new(m, size, layer.shape[1]) for layer in stack.layers[:-1]]
        deltas = [new(m, size, layer.shape[1]) for layer in stack.layers]
        gradients = [new(m, size, layer.shape[2]) for layer in stack.layers]
        updates = [new(layer.shape) for layer in stack.layers]
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
                        i + 1,
                        deltas[i],
                        deltas[i].mT,
                        stack.layers[i],
                        a[i],
                        updates[i],
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

    def begin(self, stack: _Stack, x: Tensor, gram: _Gram | None) -> None:
        """The first layers' outputs, as if no mini-batch of the block changed their weights."""
        torch.mm(x, stack.first[: x.shape[1]], out=self.compact_z)

    def correct(self, t: int, gram: _Gram | None) -> None:
        """Corrects them for mini-batch ``t``."""
        assert gram
        self.z[t].addmm_(gram.before[t], self.d_before[t], alpha=-1)

    def end(self, stack: _Stack, x: Tensor) -> None:
        """Updates the first layers."""
        columns = x.shape[1]
        if stack.plain:
            stack.first[:columns].addmm_(x.T, self.compact_d, alpha=-1)
        else:  # of the block's only mini-batch
            torch.mm(x.T, self.compact_d, out=stack.gradient[:columns])
            stack.gradient[columns:] = 0
            stack.descend(0, stack.gradient)


class _Part(NamedTuple):
    """Rows of the first layers, and the numbers of their update by a block.

    States are W and V, or W alone if no network has momentum.
    """

    rows: slice
    outputs: Tensor  # of each state in X_t W_t, (states, k, 1, columns)
    last: Tensor  # of each state in each one after the block, (states, states, columns)
    steps: Tensor  # of each X_t' D_t in each state after the block, (states, k, 1, columns)


class _Recurrence(_Workspace):
    """A workspace for several updates with momentum or weight decay."""

    def __init__(self, stack: _Stack, batches: int, size: int) -> None:
        super().__init__(stack, batches, size)
        self.states = [stack.first, *stack.velocity[:1]]
        self.shape = batches, size, stack.first.shape[1]
        self.product = torch.empty_like(self.compact_z)
        self.parts, corrections, n = [], [], len(self.states)
        no_decay = [update._replace(weight_decay=0.0) for update in stack.updates]
        biases_apart = [(slice(0, 1), no_decay), (slice(1, None), stack.updates)]
        for rows, updates in biases_apart if stack.decays else [(slice(None), stack.updates)]:
            powers, impulses = _unrolled(updates, batches)
            outputs, last = powers[:-1, 0, :n].transpose(0, 1), powers[-1, :n, :n]
            steps = impulses.flip(0)[:, :n].transpose(0, 1)
            self.parts.append(
                _Part(
                    rows,
                    stack.by_column(outputs)[:, :, None],
                    stack.by_column(last),
                    stack.by_column(steps)[:, :, None],
                )
            )
            corrections.append(-impulses[:, 0])
        # each run of networks of equal updates has its Gram matrix: the number of D_s in X_t W_t
        # times X_t X_s'; biases add 1 to each X_t X_s', with their own number
        runs = _runs(stack.updates)
        before = torch.arange(batches)[:, None] - torch.arange(batches) - 1
        biases, weights = (
            torch.where(before[..., None] < 0, 0.0, numbers[before.clamp(min=0)])
            .permute(2, 0, 1)[[run[0] for run in runs], :, None, :, None]
            .to(stack.first)
            for numbers in (corrections[0], corrections[-1])
        )
        self.scale, self.offset = weights, biases - weights
        self.grams = stack.first.new_empty(len(runs), batches, size, batches, size)
        self.corrections = []
        for t, (z, d) in enumerate(zip(self.z, self.d_before, strict=True)):
            grams = self.grams[:, t].view(len(runs), size, -1)[..., : t * size]
            columns = [slice(run[0] * stack.width, (run[-1] + 1) * stack.width) for run in runs]
            self.corrections.append(
                [(z[:, c], gram, d[:, c]) for gram, c in zip(grams, columns, strict=True)]
            )

    def begin(self, stack: _Stack, x: Tensor, gram: _Gram | None) -> None:
        assert gram
        torch.addcmul(
            self.offset, gram.values.view(self.grams.shape[1:]), self.scale, out=self.grams
        )
        z = self.compact_z.view(self.shape).zero_()
        for part in self.parts:
            for state, numbers in zip(self.states, part.outputs, strict=True):
                used = state[: x.shape[1]][part.rows]
                torch.mm(x[:, part.rows], used, out=self.product)
                z.addcmul_(self.product.view(self.shape), numbers)

    def correct(self, t: int, gram: _Gram | None) -> None:
        for z, own_gram, d in self.corrections[t]:
            z.addmm_(own_gram, d, alpha=-1)

    def end(self, stack: _Stack, x: Tensor) -> None:
        d = self.compact_d.view(self.shape)
        for part in self.parts:
            weights, *velocities = [state[part.rows] for state in self.states]
            old_weights = stack.gradient[part.rows].copy_(weights)
            weights.mul_(part.last[0, 0])
            for velocity in velocities:
                weights.addcmul_(velocity, part.last[0, 1])
                velocity.mul_(part.last[1, 1]).addcmul_(old_weights, part.last[1, 0])
            for state, numbers in zip(self.states, part.steps, strict=True):
                used = state[: x.shape[1]][part.rows]
                torch.mul(d, numbers, out=self.product.view(self.shape))
                used.addmm_(x[:, part.rows].T, self.product)


def _runs(values: Sequence[object]) -> list[list[int]]:
    """Positions of equal neighbours."""
    return [list(run) for _, run in groupby(range(len(values)), key=lambda i: values[i])]


def _score(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``(k, M, B, classes), (k, B)`` -> summed cross entropy and correct answers, both (M, k).

    An answer whose score equals the highest counts as correct.
    """
    scores = logits.permute(3, 0, 1, 2).contiguous()  # see _Workspace.class_major
    scores -= scores.amax(0)
    answer = scores.gather(0, labels[None, :, None].expand(1, *scores.shape[1:]))[0]
    loss = scores.exp_().sum(0).log_() - answer
    return loss.sum(2).T, (answer == 0).sum(2).T


def _unrolled(updates: Sequence[SGD], steps: int) -> tuple[Tensor, Tensor]:
    """The numbers of consecutive updates, see "Momentum" above, in float64.

    Args:
        updates: of each network; their weight decay is already multiplied by lr.
        steps: how many.

    Returns:
        ``A^t``, ``(steps + 1, 2, 2, M)``, and ``A^t b``, ``(steps, 2, M)``.
    """
    m, nesterov, decay = torch.tensor(updates, dtype=torch.float64).T
    # V' = m V + D + l W;  W' = W - through V' - beside (D + l W)
    through, beside = torch.where(nesterov > 0, m, 1.0), nesterov
    matrix = torch.stack([1 - (through + beside) * decay, -through * m, decay, m])
    matrix = matrix.view(2, 2, -1).permute(2, 0, 1)
    vector = torch.stack([-through - beside, torch.ones_like(m)]).T[..., None]
    powers = [torch.eye(2, dtype=torch.float64).expand_as(matrix)]
    for _ in range(steps):
        powers.append(matrix @ powers[-1])
    impulses = [power @ vector for power in powers[:-1]]
    return torch.stack(powers).permute(0, 2, 3, 1), torch.stack(impulses)[..., 0].transpose(1, 2)
