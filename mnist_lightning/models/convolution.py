"""A small convolutional network."""

from typing import Any

import torch

from mnist_lightning.models.classifier import Classifier, Spec
from mnist_lightning.models.optimization import OptimizerName
from mnist_lightning.nets import conv_net
from mnist_lightning.spec import DataSpec


class ConvNetwork(Classifier):
    """Stages of convolutions with BatchNorm and ReLU that halve the image, then the classes.

    The stages are ``net.stage1``, ``net.stage2``, ... ``net`` is in the memory format
    channels_last, in which the CPU computes convolutions faster.

    Args:
        widths: channels of each stage, from input to output.
        convolutions: in each stage.
        kernel_size: side of the convolutions' filters in pixels, odd.
        hidden_units: size of a hidden layer between the last stage and the output; 0 averages each
            channel over the image instead.
        dropout: share of the output layer's inputs that are set to zero in training.
        lr: learning rate.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        spec: shape and classes of the images; by default MNIST's.
        **options: more options of ``Classifier``, like momentum and label smoothing.
    """

    def __init__(
        self,
        widths: list[int],
        convolutions: int = 2,
        kernel_size: int = 3,
        hidden_units: int = 0,
        dropout: float = 0.0,
        lr: float = 0.002,
        optimizer: OptimizerName = "adamw",
        spec: Spec = None,
        **options: Any,
    ) -> None:
        spec = DataSpec.of(spec)
        net = conv_net(
            spec.shape,
            widths,
            len(spec.classes),
            convolutions=convolutions,
            kernel_size=kernel_size,
            hidden_units=hidden_units,
            dropout=dropout,
        )
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        super().__init__(net, lr, optimizer, spec, **options)
