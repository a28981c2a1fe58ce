"""The networks as plain PyTorch modules, usable alone. ResNet-18 comes from torchvision."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

PIXELS = 28 * 28
CLASSES = 10


class AffineMap(nn.Module):
    """Computes the perceptron's scores y = x w + b, with w ``(784, 10)`` and b ``(1, 10)``."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(PIXELS, CLASSES).uniform_(-0.001, 0.001))
        self.b = nn.Parameter(torch.empty(1, CLASSES).uniform_(-0.001, 0.001))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.w + self.b


def mlp(hidden_units: Sequence[int]) -> nn.Sequential:
    """Makes a plain multilayer perceptron: 784 -> hidden layers with ReLU -> 10 scores.

    Raises:
        ValueError: a layer has no units.
    """
    if any(units < 1 for units in hidden_units):
        raise ValueError(f"hidden_units must all be at least 1, got {list(hidden_units)}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for index, (inputs, outputs) in enumerate(pairwise([PIXELS, *hidden_units]), start=1):
        layers[f"hidden{index}"] = nn.Linear(inputs, outputs)
        layers[f"relu{index}"] = nn.ReLU()
    layers["output"] = nn.Linear([PIXELS, *hidden_units][-1], CLASSES)
    return nn.Sequential(layers)
