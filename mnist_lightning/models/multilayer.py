"""Multilayer perceptrons: one hidden layer, or several."""

from mnist_lightning.models.classifier import Classifier, OptimizerName, Spec
from mnist_lightning.nets import mlp
from mnist_lightning.spec import DataSpec


class ShallowNetwork(Classifier):
    """pixels -> hidden -> classes, ReLU, cross entropy.

    Args:
        hidden_units: size of the hidden layer.
        lr: learning rate.
        optimizer: ``sgd`` (plain), ``adam`` or ``adamw``.
        spec: shape and classes of the images; by default MNIST's.
    """

    fusable = True

    def __init__(
        self,
        hidden_units: int = 100,
        lr: float = 0.1,
        optimizer: OptimizerName = "sgd",
        spec: Spec = None,
    ) -> None:
        spec = DataSpec.of(spec)
        net = mlp(spec.pixels, [hidden_units], len(spec.classes))
        super().__init__(net, lr, optimizer, spec)


class DeepNetwork(Classifier):
    """pixels -> two or more hidden layers -> classes, ReLU, cross entropy.

    Args:
        hidden_units: sizes of the hidden layers, from input to output.
        lr: learning rate.
        optimizer: ``sgd`` (plain), ``adam`` or ``adamw``.
        spec: shape and classes of the images; by default MNIST's.
    """

    fusable = True

    def __init__(
        self,
        hidden_units: list[int],
        lr: float = 0.01,
        optimizer: OptimizerName = "sgd",
        spec: Spec = None,
    ) -> None:
        if len(hidden_units) < 2:
            raise ValueError(
                f"hidden_units of a DeepNetwork must be two sizes or more, got {hidden_units}."
                " For one hidden layer use ShallowNetwork."
            )
        spec = DataSpec.of(spec)
        net = mlp(spec.pixels, hidden_units, len(spec.classes))
        super().__init__(net, lr, optimizer, spec)
