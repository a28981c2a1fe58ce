"""Multilayer perceptrons: one hidden layer, or several."""

from typing import Any

from mnist_lightning.models.classifier import Classifier, Spec
from mnist_lightning.models.optimization import OptimizerName
from mnist_lightning.nets import Activation, mlp
from mnist_lightning.spec import DataSpec


class ShallowNetwork(Classifier):
    """pixels -> hidden -> classes, cross entropy.

    Args:
        hidden_units: size of the hidden layer.
        lr: learning rate.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        spec: shape and classes of the images; by default MNIST's.
        dropout: share of the hidden units that training sets to zero in each mini-batch.
        batch_norm: whether the hidden units are normalised over the mini-batch, before the
            activation.
        activation: ``relu``, ``leaky_relu``, ``gelu``, ``silu``, ``tanh`` or ``sigmoid``.
        **options: more options of ``Classifier``, like momentum and weight decay.
    """

    fusable = True

    def __init__(
        self,
        hidden_units: int = 100,
        lr: float = 0.1,
        optimizer: OptimizerName = "sgd",
        spec: Spec = None,
        dropout: float = 0.0,
        batch_norm: bool = False,
        activation: Activation = "relu",
        **options: Any,
    ) -> None:
        spec = DataSpec.of(spec)
        layers = dropout, batch_norm, activation
        net = mlp(spec.pixels, [hidden_units], len(spec.classes), *layers)
        super().__init__(net, lr, optimizer, spec, **options)


class DeepNetwork(Classifier):
    """pixels -> two or more hidden layers -> classes, cross entropy.

    Args:
        hidden_units: sizes of the hidden layers, from input to output.
        lr: learning rate.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        spec: shape and classes of the images; by default MNIST's.
        dropout: share of the hidden units that training sets to zero in each mini-batch.
        batch_norm: whether the hidden units are normalised over the mini-batch, before the
            activation.
        activation: ``relu``, ``leaky_relu``, ``gelu``, ``silu``, ``tanh`` or ``sigmoid``.
        **options: more options of ``Classifier``, like momentum and weight decay.
    """

    fusable = True

    def __init__(
        self,
        hidden_units: list[int],
        lr: float = 0.01,
        optimizer: OptimizerName = "sgd",
        spec: Spec = None,
        dropout: float = 0.0,
        batch_norm: bool = False,
        activation: Activation = "relu",
        **options: Any,
    ) -> None:
        if len(hidden_units) < 2:
            raise ValueError(
                f"hidden_units of a DeepNetwork must be two sizes or more, got {hidden_units}."
                " For one hidden layer use ShallowNetwork."
            )
        spec = DataSpec.of(spec)
        layers = dropout, batch_norm, activation
        net = mlp(spec.pixels, hidden_units, len(spec.classes), *layers)
        super().__init__(net, lr, optimizer, spec, **options)
