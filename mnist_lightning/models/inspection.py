"""Tables of a model's layers and tensors, from a real forward pass or training step."""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_lightning.data.module import MNISTDataModule
from mnist_lightning.models.perceptron import Perceptron


class Layer(NamedTuple):
    """One call of a layer: its name, output shape (batch first, as -1) and parameter count."""

    name: str
    output_shape: tuple[int, ...]
    parameters: int


def layer_table(net: nn.Module, image: Tensor) -> list[Layer]:
    """Lists every layer, in the order in which a forward pass finishes them.

    A layer that is used twice is listed twice; its parameters are counted once.

    Args:
        net: the network; its weights and its training mode are not changed.
        image: one image, ``(1, channels, height, width)``.
    """
    table: list[Layer] = []
    counted: set[nn.Parameter] = set()

    def append_row(module: nn.Module, _: object, output: Tensor) -> None:
        parameters = set(module.parameters(recurse=False)) - counted
        counted.update(parameters)
        name = f"{type(module).__name__}-{len(table) + 1}"
        table.append(Layer(name, (-1, *output.shape[1:]), sum(p.numel() for p in parameters)))

    layers = [m for m in net.modules() if m is not net and not isinstance(m, nn.Sequential)]
    # without inner layers, the net is itself a layer, such as the perceptron's AffineMap
    hooks = [module.register_forward_hook(append_row) for module in layers or [net]]
    was_training = net.training
    try:
        net.eval()
        with torch.inference_mode():
            net(image)
    finally:
        net.train(was_training)
        for hook in hooks:
            hook.remove()
    return table


def format_layers(table: list[Layer], net: nn.Module) -> str:
    """Formats the table as text. The totals are counted from the network, not from the table."""
    total = sum(p.numel() for p in net.parameters())
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert sum(layer.parameters for layer in table) == total, "a parameter belongs to no layer"
    rows = [(name, str(list(shape)), f"{count:,}") for name, shape, count in table]
    text = format_table(("Layer (type)", "Output shape", "Param #"), rows, right=(2,))
    return f"{text}\n\nTotal params: {total:,}\nTrainable params: {trainable:,}"


def tensor_table(
    model: Perceptron, data: MNISTDataModule, images: Tensor, labels: Tensor
) -> list[tuple[str, str, str]]:
    """Lists the tensors of one real step of the perceptron: name, shape, meaning.

    Args:
        model: computes the update of one step; its weights are not changed.
        data: the data of the mini-batch, after ``setup``.
        images: ``(b, channels, height, width)``.
        labels: ``(b,)``.
    """
    step = model.delta_rule(images, labels)
    one_hot = partial(F.one_hot, num_classes=len(model.spec.classes))
    y, t, grad = step["y"], step["t"], step["grad"]
    tensors = {
        "data_train": (data.train_set.images.flatten(1), "training images, each a row of pixels"),
        "label_train": (one_hot(data.train_set.labels), "their labels, one-hot"),
        "data_val": (data.val_set.images.flatten(1), "validation images"),
        "label_val": (one_hot(data.val_set.labels), "their labels, one-hot"),
        "data_test": (data.test_set.images.flatten(1), "test images"),
        "label_test": (one_hot(data.test_set.labels), "their labels, one-hot"),
        "x": (step["x"], "the mini-batch, pixels from 0 to 1"),
        "w": (step["w"], "weights, from each pixel to each class"),
        "b": (step["b"], "biases, one a class"),
        "y": (y, "scores of the mini-batch: x @ w + b"),
        "t": (t, "its labels, one-hot"),
        "grad": (grad, "the gradient of the rule with respect to the scores: t - y"),
        "x.T @ grad": (step["x"].T @ grad, "moves w, times the learning rate"),
        "grad.sum(0)": (grad.sum(0), "moves b, times the learning rate"),
        "y.argmax(1)": (y.argmax(1), "predicted classes"),
        "t.argmax(1)": (t.argmax(1), "true classes"),
    }
    return [(name, str(list(value.shape)), meaning) for name, (value, meaning) in tensors.items()]


def format_table(
    header: tuple[str, ...], rows: Iterable[tuple[str, ...]], right: tuple[int, ...] = ()
) -> str:
    """Formats columns as wide as their widest cell; those in ``right`` are aligned right."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * len(max(lines, key=len)), *lines[1:]])
