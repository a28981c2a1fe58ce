"""The networks as plain PyTorch modules, usable alone. ResNet-18 comes from torchvision."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


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


def mlp(pixels: int, hidden_units: Sequence[int], classes: int) -> nn.Sequential:
    """Makes a plain multilayer perceptron: pixels -> hidden layers with ReLU -> scores.

    Args:
        pixels: number of values in an image.
        hidden_units: sizes of the hidden layers, from input to output.
        classes: number of classes.

    Raises:
        ValueError: a layer has no units.
    """
    if any(units < 1 for units in hidden_units):
        raise ValueError(f"hidden_units must all be at least 1, got {list(hidden_units)}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for index, (inputs, outputs) in enumerate(pairwise([pixels, *hidden_units]), start=1):
        layers[f"hidden{index}"] = nn.Linear(inputs, outputs)
        layers[f"relu{index}"] = nn.ReLU()
    layers["output"] = nn.Linear([pixels, *hidden_units][-1], classes)
    return nn.Sequential(layers)
