"""The networks as plain PyTorch modules, usable alone. ResNet-18 comes from torchvision."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from typing import Literal

import torch
import torch.nn.functional as F
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


def mean_of_answers(answers: Sequence[Tensor]) -> Tensor:
    """Class scores whose softmax is the mean of the probabilities of several answers.

    Args:
        answers: class scores, each ``(b, classes)``.
    """
    logs = [scores.log_softmax(1, _at_least_float32(scores)) for scores in answers]
    return torch.stack(logs).logsumexp(0) - math.log(len(logs))


def _at_least_float32(scores: Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, torch.float32)


def mean_over_shifts(
    net: Callable[[Tensor], Tensor], images: Tensor, pixels: int, black: Tensor
) -> Tensor:
    """Class scores whose softmax is the mean of the probabilities over shifted images.

    Args:
        net: computes class scores.
        images: as the network receives them, ``(b, channels, height, width)``.
        pixels: each image is taken as it is, and shifted by so many pixels up, down, to the sides
            and to the corners.
        black: fills the edges, as in the augmentation of training images; ``(channels, 1, 1)``.
    """
    return mean_of_answers([net(shifted) for shifted in _shifts(images, pixels, black)])


def _shifts(images: Tensor, pixels: int, black: Tensor) -> Iterator[Tensor]:
    """Nine times the images: as they are, then shifted."""
    height, width = images.shape[-2:]
    inside = F.pad(torch.ones_like(images[:1, :1]), (pixels,) * 4)
    padded = torch.where(inside > 0, F.pad(images, (pixels,) * 4), black)
    yield images
    for top, left in product((0, pixels, 2 * pixels), repeat=2):
        if (top, left) != (pixels, pixels):
            yield padded[..., top : top + height, left : left + width]


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


def conv_net(
    shape: tuple[int, int, int],
    widths: Sequence[int],
    classes: int,
    *,
    convolutions: int = 2,
    kernel_size: int = 3,
    hidden_units: int = 0,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Makes a plain convolutional network: stages that each halve the image, then the scores.

    A stage is one or more convolutions, each with BatchNorm and ReLU. The first one is followed by
    the pooling, so that the rest of the stage computes a quarter of the positions.

    Args:
        shape: channels, height and width of the images.
        widths: channels of each stage, from input to output.
        classes: number of classes.
        convolutions: in each stage.
        kernel_size: side of the convolutions' filters in pixels, odd.
        hidden_units: size of a hidden layer between the last stage and the output; 0 averages each
            channel over the image instead.
        dropout: share of the output layer's inputs that are set to zero in training.

    Raises:
        ValueError: an argument is out of its range, or the images are too small for the stages.
    """
    channels, height, width = shape
    if not widths or any(size < 1 for size in widths):
        raise ValueError(f"widths must be one or more numbers above 0, got {list(widths)}")
    if min(height, width) < 2 ** len(widths):
        raise ValueError(
            f"{len(widths)} widths are {len(widths)} stages, and each halves the image: they need"
            f" {2 ** len(widths)} pixels a side, the images have {height} x {width}."
            " Use fewer widths or larger images"
        )
    if convolutions < 1:
        raise ValueError(f"convolutions must be at least 1, got {convolutions}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    if hidden_units < 0:
        raise ValueError(f"hidden_units must be 0 or more, got {hidden_units}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")

    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inputs, outputs) in enumerate(pairwise([channels, *widths]), start=1):
        layers[f"stage{number}"] = _stage(inputs, outputs, convolutions, kernel_size)
        height, width = height // 2, width // 2
    features = widths[-1]
    if hidden_units:
        layers["flatten"] = nn.Flatten()
        layers["hidden"] = nn.Linear(features * height * width, hidden_units)
        layers["relu"] = nn.ReLU()
        features = hidden_units
    else:
        layers["average"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
    if dropout:
        layers["dropout"] = nn.Dropout(dropout)
    layers["output"] = nn.Linear(features, classes)
    return nn.Sequential(layers)


def _stage(inputs: int, outputs: int, convolutions: int, kernel_size: int) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number in range(1, convolutions + 1):
        layers[f"conv{number}"] = nn.Conv2d(
            inputs if number == 1 else outputs,
            outputs,
            kernel_size,
            padding=kernel_size // 2,
            bias=False,  # BatchNorm would subtract it again
        )
        if number == 1:
            layers["pool"] = nn.MaxPool2d(2)
        layers[f"norm{number}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{number}"] = nn.ReLU()
    return nn.Sequential(layers)
