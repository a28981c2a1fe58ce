"""The perceptron, trained by the delta rule."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mnist_lightning.models.classifier import Batch, Classifier, Spec
from mnist_lightning.models.optimization import OptimizerName
from mnist_lightning.nets import AffineMap
from mnist_lightning.spec import DataSpec
from mnist_lightning.training.execution import hooked


class Perceptron(Classifier):
    """pixels -> classes with the delta rule, computed explicitly, without autograd.

    With one-hot labels t and scores y = x w + b, a mini-batch changes w by ``lr * x^T (t - y)`` and
    b by the sum of ``lr * (t - y)`` over the images. This is gradient descent on half the squared
    error, summed over the mini-batch (Widrow and Hoff 1960, "Adaptive switching circuits").

    Args:
        lr: learning rate, for the sum over the mini-batch (not the mean).
        optimizer: ``sgd`` is the delta rule itself; the others receive the same gradient.
        spec: shape and classes of the images; by default MNIST's.
        **options: more options of ``Classifier``, but none that changes the loss.
    """

    steps_known = True

    def __init__(
        self,
        lr: float = 0.0001,
        optimizer: OptimizerName = "sgd",
        spec: Spec = None,
        **options: Any,
    ) -> None:
        spec = DataSpec.of(spec)
        net = AffineMap(spec.pixels, len(spec.classes))
        super().__init__(net, lr, optimizer, spec, **options)
        self._moves: tuple[Tensor, Tensor, Tensor] | None = None

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Half the squared error with one-hot labels, mean over the mini-batch."""
        return (F.one_hot(labels, scores.shape[1]) - scores).square().sum(1).mean() / 2

    @torch.no_grad()
    def delta_rule(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Computes the delta rule for one mini-batch.

        Returns:
            Every tensor of the step under the study's names; ``dw`` and ``db`` are the changes of w
            and b at a learning rate of 1.
        """
        net = cast(AffineMap, self.net)
        x = images.flatten(1)
        t = F.one_hot(labels, net.b.shape[1]).to(x.dtype)
        y = x @ net.w + net.b
        grad = t - y
        dw, db = x.T @ grad, grad.sum(0, keepdim=True)
        return {"x": x, "t": t, "y": y, "grad": grad, "w": net.w, "b": net.b, "dw": dw, "db": db}

    def on_train_start(self) -> None:
        if isinstance(self.trainer.model, DistributedDataParallel):
            # autograd computes no gradients to exchange; backward exchanges those of the rule
            self.trainer.model.require_backward_grad_sync = False

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Half the squared error, summed over the mini-batch."""
        images, labels = batch
        if not self._follows_rule():
            return super().training_step(batch, batch_idx) * len(labels)
        tensors = self.delta_rule(images, labels)
        loss = self.score("train", tensors["y"], labels) * len(labels)
        self._moves = loss.requires_grad_(), tensors["dw"], tensors["db"]
        return loss

    def _follows_rule(self) -> bool:
        """Returns True if the rule is the gradient of this model's loss; subclasses may differ."""
        methods = (getattr(self, name).__func__ for name in ("forward", "loss"))
        return (
            tuple(methods) == (Classifier.forward, Perceptron.loss)
            and type(self.net) is AffineMap
            and not hooked(self)
        )

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(loss, *args, **kwargs)
        if self._moves is None:
            return
        # The loss of training_step is a leaf of autograd. Its gradient is the factor by which the
        # Trainer scaled the loss.
        loss_leaf, *moves = self._moves
        self._moves = None
        for parameter, move in zip(self.net.parameters(), moves, strict=True):
            if parameter.requires_grad:
                move = move.to(parameter.dtype)  # mixed precision computes it in 16 bits
                # with several processes, the sum over all their mini-batches
                total = self.trainer.strategy.reduce(move, reduce_op="sum")
                gradient = -total * cast(Tensor, loss_leaf.grad)
                old = parameter.grad
                parameter.grad = gradient if old is None else old + gradient
