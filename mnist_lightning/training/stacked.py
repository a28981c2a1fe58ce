"""Many small networks trained at once, as one stacked tensor program.

The networks are multilayer perceptrons of any depth and width, trained by plain SGD. Those of a
population train on the same mini-batches, each with its own learning rate. Each gets the updates
it would get alone: the arithmetic is that of ``loss.backward(); optimizer.step()``, written out and
reordered, so results differ only by rounding. Three ideas make it fast.

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
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Rows of a block: enough for the two large products to reach the processor's speed, few enough to
# keep the corrections for earlier mini-batches cheap. The fastest of 32, 64, 128 and 256 at each
# batch size from 4 to 128.
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
            ``population.pixel_order``. It changes speed, not results.

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
        like = parameters[0][0]
        self._order: Tensor | slice = (
            slice(None) if pixel_order is None else pixel_order.to(like.device)
        )
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

    @torch.inference_mode()
    def load(self, member: int, parameters: Sequence[Tensor], lr: float) -> None:
        """Replaces the weights, biases and learning rate of a network.

        Args:
            member: which network.
            parameters: of the same shapes as those it was made with.
            lr: its learning rate from now on.
        """
        stack, position = self._place[member]
        stack.load(position, parameters, self._order)
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
    ) -> None:
        # networks of equal first width side by side: one copy moves them between the layouts
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
        # rows evaluated at once: as many as a processor's cache holds
        self.rows = max(64, 2**18 // sum(blocks))
        # (1 + inputs, all first layers)
        self.first = like.new_zeros(1 + like.shape[1], sum(blocks))
        widths = [max(column) for column in zip(*self.sizes, strict=True)]
        self.layers = [  # (M, units, 1 + units before)
            like.new_zeros(len(members), widths[i] + (i < self.depth), 1 + widths[i - 1])
            for i in range(1, self.depth + 1)
        ]
        for m, network in enumerate(parameters):
            self.load(m, network, order)
        self._workspaces: dict[tuple[int, int], _Workspace] = {}

    def load(self, m: int, network: Sequence[Tensor], order: Tensor | slice) -> None:
        """Copies the parameters of network ``m`` into the stack."""
        block = self.first[:, self.columns[m]]
        constant = block.shape[1] - self.sizes[m][0]
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

    def _views(self, i: int, m: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of network ``m`` inside the ``i``-th layer after the first."""
        before, units = self.sizes[m][i], self.sizes[m][i + 1]
        layer = self.layers[i][m, int(i < self.depth - 1) :]
        return layer[:units, 1 : 1 + before], layer[:units, 0]

    def parameters(self, m: int, order: Tensor | slice) -> list[Tensor]:
        block = self.first[:, self.columns[m]][:, -self.sizes[m][0] :]
        weight = torch.empty_like(block[1:].T, memory_format=torch.contiguous_format)
        weight[:, order] = block[1:].T
        tensors = [weight, block[0].clone()]
        for i in range(self.depth):
            tensors += [view.clone() for view in self._views(i, m)]
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

    def train_block(self, x: Tensor, labels: Tensor, batch_size: int, gram: _Gram | None) -> Tensor:
        """Trains on a block; returns the logits before each update, ``(k, M, B, classes)``."""
        batches = len(x) // batch_size
        workspace = self._workspaces.get((batches, batch_size))
        if workspace is None:
            workspace = _Workspace(self, batches, batch_size)
            self._workspaces[batches, batch_size] = workspace
        first = self.first[: x.shape[1]]
        torch.mm(x, first, out=workspace.compact_z)
        for compact, padded in workspace.runs_of_z:
            padded.copy_(compact)
        # the gradient (softmax - one-hot) is scaled by lr / B here, and with it all later ones
        step = self.lr / batch_size
        one_hot = step.new_zeros(batches, 1, batch_size, workspace.logits.shape[3])
        one_hot.scatter_(3, labels.view(batches, 1, -1, 1), 1)
        torch.mul(one_hot, -step, out=workspace.targets)
        for t in range(batches):
            if t and gram:
                workspace.z[t].addmm_(gram.before[t], workspace.d_before[t], alpha=-1)
            for a, weight, out in workspace.forward[t]:
                torch.bmm(a.relu_(), weight, out=out)
            torch.softmax(workspace.class_major[t], 0, out=workspace.softmax)
            torch.addcmul(workspace.targets[t], workspace.probability, step, out=workspace.delta[t])
            for views in workspace.backward[t]:
                delta, delta_t, layer, a, update, da, da_units, a_units, below = views
                torch.bmm(delta, layer, out=da)
                # not baddbmm_: for small layers it adds image by image to the weights and rounds
                # each time, while autograd rounds once an update
                torch.bmm(delta_t, a, out=update)
                layer.sub_(update)
                torch.ops.aten.threshold_backward.grad_input(da_units, a_units, 0, grad_input=below)
        for compact, padded in workspace.runs_of_d:
            compact.copy_(padded)
        first.addmm_(x.T, workspace.compact_d, alpha=-1)
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


def _score(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``(k, M, B, classes), (k, B)`` -> summed cross entropy and correct answers, both (M, k).

    An answer whose score equals the highest counts as correct.
    """
    scores = logits.permute(3, 0, 1, 2).contiguous()  # see _Workspace.class_major
    scores -= scores.amax(0)
    answer = scores.gather(0, labels[None, :, None].expand(1, *scores.shape[1:]))[0]
    loss = scores.exp_().sum(0).log_() - answer
    return loss.sum(2).T, (answer == 0).sum(2).T
