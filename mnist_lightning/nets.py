"""The networks as plain PyTorch modules, usable alone. ResNet-18 comes from torchvision."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from mnist_lightning.checks import check_choice

Activation = Literal["relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid"]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class AffineMap(nn.Module):
    """Computes scores y = x w + b, with w ``(pixels, classes)`` and b ``(1, classes)``.

    Args:
        pixels: number of values in an image.
        classes: number of classes.
    """

    def __init__(self, pixels: int, classes: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(pixels, classes).uniform_(-0.001, 0.001))
        self.b = nn.Parameter(torch.empty(1, classes).uniform_(-0.001, 0.001))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.w + self.b


def mlp(
    pixels: int,
    hidden_units: Sequence[int],
    classes: int,
    dropout: float = 0.0,
    batch_norm: bool = False,
    activation: Activation = "relu",
) -> nn.Sequential:
    """Makes a multilayer perceptron: pixels -> hidden layers with an activation -> scores.

    Args:
        pixels: number of values in an image.
        hidden_units: sizes of the hidden layers, from input to output.
        classes: number of classes.
        dropout: share of the hidden units that training sets to zero in each mini-batch.
        batch_norm: whether the hidden units are normalised over the mini-batch, before the
            activation.
        activation: ``relu``, ``leaky_relu``, ``gelu``, ``silu``, ``tanh`` or ``sigmoid``.

    Raises:
        ValueError: a layer has no units, or an argument is out of its range.
    """
    if any(units < 1 for units in hidden_units):
        raise ValueError(f"hidden_units must all be at least 1, got {list(hidden_units)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be from 0 to below 1, got {dropout}")
    check_choice("activation", activation, Activation)
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for index, (inputs, outputs) in enumerate(pairwise([pixels, *hidden_units]), start=1):
        layers[f"hidden{index}"] = nn.Linear(inputs, outputs)
        if batch_norm:
            layers[f"norm{index}"] = nn.BatchNorm1d(outputs)
        layers[f"{activation}{index}"] = ACTIVATIONS[activation]()
        if dropout:
            layers[f"dropout{index}"] = nn.Dropout(dropout)
    layers["output"] = nn.Linear([pixels, *hidden_units][-1], classes)
    return nn.Sequential(layers)
