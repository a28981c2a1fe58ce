"""Tables of a model's layers and tensors, and a picture of the images that it sees."""

import io
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from mnist_lightning.data.module import MNISTDataModule, seed
from mnist_lightning.data.preparation import prepare
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


def sample_sheet(data: MNISTDataModule, images: int = 8, draws: int = 9) -> bytes:
    """Draws training images as the model sees them, before they are normalised.

    Args:
        data: after ``setup``.
        images: a row for each: the image itself, then its augmentation in each of the first epochs.
            Without augmentation, each row has other images instead.
        draws: number of epochs.

    Returns:
        The content of a PNG file.
    """
    columns = 1 + draws
    count = images if data.augment else images * columns
    # spread over the set: a folder's images are sorted by class
    rows = torch.linspace(0, len(data.train_set) - 1, count).long()
    pixels = prepare(data.train_set.__getitems__(rows.tolist())[0], data.spec.unnormalised())
    if data.augment:
        seen = [data.augment(pixels, rows, seed(), epoch) for epoch in range(draws)]
        pixels = torch.stack([pixels, *seen], 1).flatten(0, 1)
    scale = max(1, 96 // pixels.shape[-1])  # small images are enlarged
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    sheet = make_grid(pixels, nrow=columns, padding=2, pad_value=1.0)
    file = io.BytesIO()
    to_pil_image(sheet.clamp(0, 1)).save(file, "PNG")
    return file.getvalue()


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
