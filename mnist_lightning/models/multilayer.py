"""Multilayer perceptrons: one hidden layer, or several."""

from mnist_lightning.models.classifier import Classifier, OptimizerName
from mnist_lightning.nets import mlp


class ShallowNetwork(Classifier):
    """784 -> hidden -> 10, ReLU, cross entropy.

    Args:
        hidden_units: size of the hidden layer.
        lr: learning rate.
        optimizer: ``sgd`` (plain), ``adam`` or ``adamw``.
    """

    fusable = True

    def __init__(
        self,
        hidden_units: int = 100,
        lr: float = 0.1,
        optimizer: OptimizerName = "sgd",
    ) -> None:
        super().__init__(mlp([hidden_units]), lr, optimizer)


class DeepNetwork(Classifier):
    """784 -> two or more hidden layers -> 10, ReLU, cross entropy.

    Args:
        hidden_units: sizes of the hidden layers, from input to output.
        lr: learning rate.
        optimizer: ``sgd`` (plain), ``adam`` or ``adamw``.
    """

    fusable = True

    def __init__(
        self,
        hidden_units: list[int],
        lr: float = 0.01,
        optimizer: OptimizerName = "sgd",
    ) -> None:
        if len(hidden_units) < 2:
            raise ValueError(
                f"hidden_units of a DeepNetwork must be two sizes or more, got {hidden_units}."
                " For one hidden layer use ShallowNetwork."
            )
        super().__init__(mlp(hidden_units), lr, optimizer)
