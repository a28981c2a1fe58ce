"""The study's architectures: a perceptron, a shallow network, deep networks.

Each is a LightningModule around a plain ``torch.nn.Module`` (its ``net``), which can be used alone.
Hyper-parameters are plain types, so every checkpoint records them and loads as data, not as code.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

PIXELS = 28 * 28
CLASSES = 10

Batch = tuple[Tensor, Tensor]
OptimizerName = Literal["sgd", "adam", "adamw"]
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


class Classifier(LightningModule):
    """What all classifiers share: one step for train, validation and test, and its metrics.

    Logs ``<stage>/loss`` and ``<stage>/acc`` once an epoch, each the mean over the epoch's images.
    Those of ``train`` are gathered while the weights move, in the epoch's own mini-batches.

    Args:
        net: maps images ``(b, 1, height, width)`` to class scores ``(b, 10)``.
        lr: learning rate.
        optimizer: ``sgd`` (plain, no momentum), ``adam`` or ``adamw``.

    Raises:
        ValueError: the learning rate is not positive, or the optimizer is unknown; or, in
            training, the loss is no longer finite.
    """

    def __init__(self, net: nn.Module, lr: float, optimizer: OptimizerName) -> None:
        super().__init__()
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
        self.net, self.lr, self.optimizer = net, lr, optimizer
        # A loss that is not a number must show in the mean. By default it is left out, and with
        # "disable" torchmetrics 1.9 leaves out the weights.
        self.mean_loss = MeanMetric(nan_strategy=float("nan"))
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro", validate_args=False)
        self._seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def forward(self, images: Tensor) -> Tensor:
        """``(b, 1, height, width)`` -> class scores ``(b, 10)``."""
        return self.net(images)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean over the mini-batch, a scalar; cross entropy unless a model says otherwise."""
        return F.cross_entropy(scores, labels)

    def _step(self, stage: str, batch: Batch) -> Tensor:
        images, labels = batch
        scores = self(images)
        loss = self.loss(scores, labels)
        self._note(stage, loss, scores, labels)
        return loss

    def _note(self, stage: str, loss: Tensor, scores: Tensor, labels: Tensor) -> None:
        # Kept as they are until the epoch's end: a torchmetrics update for each mini-batch takes
        # longer than the training step of a small network.
        self._seen.setdefault(stage, []).append((loss.detach(), scores.argmax(1), labels))

    def _log_epoch(self, stage: str) -> None:
        losses, predictions, labels = zip(*self._seen.pop(stage), strict=True)
        sizes = torch.tensor([len(part) for part in labels], device=self.device)
        self.mean_loss.update(torch.stack(losses), sizes)
        self.accuracy.update(torch.cat(predictions), torch.cat(labels))
        loss = self.mean_loss.compute()
        if stage == "train" and not loss.isfinite():
            raise ValueError(
                f"the training diverged in epoch {self.current_epoch + 1}: its loss is {loss}."
                f" A lower lr may help (now {self.lr})"
            )
        self.log(f"{stage}/loss", loss)
        self.log(f"{stage}/acc", self.accuracy.compute(), prog_bar=stage == "val")
        self.mean_loss.reset()
        self.accuracy.reset()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return self._step("train", batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._step("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._step("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class probabilities, ``(b, 10)``."""
        return self(batch[0]).softmax(1)

    def on_train_epoch_start(self) -> None:
        self._seen.pop("train", None)  # of an epoch that was cut off

    def on_validation_epoch_start(self) -> None:
        self._seen.pop("val", None)

    def on_test_epoch_start(self) -> None:
        self._seen.pop("test", None)

    def on_train_epoch_end(self) -> None:
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        self._log_epoch("test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters(), lr=self.lr)  # type: ignore[call-arg]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # so that a checkpoint alone is enough to test it, whoever trained it
        checkpoint["model_class"] = f"{type(self).__module__}.{type(self).__qualname__}"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A resumed training takes the learning rate of this model, not the one it was saved with.

        Lightning restores the optimizer's state after this hook, and the learning rate with it.
        """
        saved = checkpoint.get("hyper_parameters", {}).get("lr", self.lr)
        for state in checkpoint.get("optimizer_states", []) if saved != self.lr else []:
            for group in state["param_groups"]:
                group["lr"] = self.lr


class AffineMap(nn.Module):
    """The perceptron's scores y = x w + b, with w ``(784, 10)`` and b ``(1, 10)``."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(PIXELS, CLASSES).uniform_(-0.001, 0.001))
        self.b = nn.Parameter(torch.empty(1, CLASSES).uniform_(-0.001, 0.001))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.w + self.b


class Perceptron(Classifier):
    """784 -> 10 with the delta rule, written out: no autograd.

    With one-hot labels t and scores y = x w + b, a mini-batch moves w by ``lr * x^T (t - y)`` and b
    by the sum of ``lr * (t - y)`` over the images: the descent of half the squared error, summed
    over the mini-batch (Widrow and Hoff 1960, "Adaptive switching circuits").

    Args:
        lr: learning rate, for the sum over the mini-batch (not the mean).
        optimizer: ``sgd`` is the delta rule itself; the others receive the same gradient.
    """

    def __init__(self, lr: float = 0.0001, optimizer: OptimizerName = "sgd") -> None:
        super().__init__(AffineMap(), lr, optimizer)
        self.save_hyperparameters()
        self.automatic_optimization = False

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Half the squared error against one-hot labels, mean over the mini-batch."""
        return (F.one_hot(labels, CLASSES) - scores).square().sum(1).mean() / 2

    @torch.no_grad()
    def delta_rule(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One mini-batch through the rule; leaves the gradients in w and b.

        Returns:
            Every tensor of the step under the study's names.
        """
        net = cast(AffineMap, self.net)
        x = images.flatten(1)
        t = F.one_hot(labels, CLASSES).to(x.dtype)
        y = x @ net.w + net.b
        grad = t - y
        net.w.grad, net.b.grad = -x.T @ grad, -grad.sum(0, keepdim=True)
        return {"x": x, "t": t, "y": y, "grad": grad, "w": net.w, "b": net.b}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        tensors = self.delta_rule(images, labels)
        for parameter in self.net.parameters():
            # over several processes, the sum over all their mini-batches
            parameter.grad = self.trainer.strategy.reduce(parameter.grad, reduce_op="sum")
        cast(Any, self.optimizers()).step()
        self._note("train", self.loss(tensors["y"], labels), tensors["y"], labels)


def mlp(hidden_units: Sequence[int]) -> nn.Sequential:
    """A plain multilayer perceptron: 784 -> hidden units, each layer with ReLU -> 10 scores.

    Raises:
        ValueError: a layer without units.
    """
    if any(units < 1 for units in hidden_units):
        raise ValueError(f"hidden_units must all be at least 1, got {list(hidden_units)}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for index, (inputs, outputs) in enumerate(pairwise([PIXELS, *hidden_units]), start=1):
        layers[f"hidden{index}"] = nn.Linear(inputs, outputs)
        layers[f"relu{index}"] = nn.ReLU()
    layers["output"] = nn.Linear([PIXELS, *hidden_units][-1], CLASSES)
    return nn.Sequential(layers)


class ShallowNetwork(Classifier):
    """784 -> hidden -> 10, ReLU, cross entropy.

    Args:
        hidden_units: size of the hidden layer.
        lr: learning rate.
        optimizer: ``sgd`` (plain), ``adam`` or ``adamw``.
    """

    def __init__(
        self, hidden_units: int = 100, lr: float = 0.1, optimizer: OptimizerName = "sgd"
    ) -> None:
        super().__init__(mlp([hidden_units]), lr, optimizer)
        self.save_hyperparameters()


class DeepNetwork(Classifier):
    """784 -> two or more hidden layers -> 10, ReLU, cross entropy.

    Args:
        hidden_units: sizes of the hidden layers, from the input's side to the output's.
        lr: learning rate.
        optimizer: ``sgd`` (plain), ``adam`` or ``adamw``.
    """

    def __init__(
        self, hidden_units: list[int], lr: float = 0.01, optimizer: OptimizerName = "sgd"
    ) -> None:
        if len(hidden_units) < 2:
            raise ValueError(
                f"hidden_units of a DeepNetwork must be two sizes or more, got {hidden_units}."
                " For one hidden layer there is ShallowNetwork."
            )
        super().__init__(mlp(hidden_units), lr, optimizer)
        self.save_hyperparameters()
