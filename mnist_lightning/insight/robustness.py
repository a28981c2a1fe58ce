"""The accuracy on images that are shifted, turned, noisy, ...: seven kinds, five strengths each.

It uses the test images: validation images have chosen the epoch, so that their accuracy is a little
too good, and results in the literature are of test images. For the same reason these evaluations
are counted, in a file of their own, ``robustness.json``: they also show the plain accuracy.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor

from mnist_lightning.data.augmentation import Augment, uniform
from mnist_lightning.data.module import MNISTDataModule
from mnist_lightning.data.preparation import prepare
from mnist_lightning.insight import drawing
from mnist_lightning.models import own
from mnist_lightning.spec import DataSpec

# takes images from 0 to 1, the numbers of the images, a seed and the strength
Change = Callable[..., Tensor]


@dataclass(frozen=True)
class Kind:
    """A kind of change."""

    name: str
    what: str
    """Of which its strengths are numbers."""
    strengths: tuple[float, ...]
    change: Change


@dataclass(frozen=True)
class Row:
    """The accuracies of one kind."""

    kind: Kind
    accuracies: tuple[float, ...]
    """Of each strength."""
    examples: np.ndarray
    """One image at each strength, uint8, ``(strengths, height, width[, 3])``."""


def _moved(images: Tensor, numbers: Tensor, seed: int, by: Augment) -> Tensor:
    """Moves each image by exactly the settings' largest values, in a direction that is drawn."""
    draws = {  # 0 and 1 are the ends of a setting's range; a crop is a shift by whole pixels
        name: value if name.startswith("crop") else value.round()
        for name, value in uniform(numbers, seed, 0).items()
    }
    maps = by.maps(draws, *images.shape[-2:]).to(images.dtype)
    places = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, places, align_corners=False)


def shifted(images: Tensor, numbers: Tensor, seed: int, strength: float) -> Tensor:
    """Shifted by a share of their side, horizontally and vertically."""
    return _moved(images, numbers, seed, Augment(shift=strength * min(images.shape[-2:])))


def rotated(images: Tensor, numbers: Tensor, seed: int, strength: float) -> Tensor:
    """Turned by so many degrees, left or right."""
    return _moved(images, numbers, seed, Augment(rotate=strength))


def scaled(images: Tensor, numbers: Tensor, seed: int, strength: float) -> Tensor:
    """Larger by a factor, or smaller by it."""
    return _moved(images, numbers, seed, Augment(scale=strength - 1))


def noisy(images: Tensor, numbers: Tensor, seed: int, strength: float) -> Tensor:
    """With normal noise on each pixel. An image has the same noise at all strengths."""
    noise = torch.empty(images.shape)
    # a generator takes the lower 32 bits of a seed: the image's draw mixes both numbers
    seeds = (uniform(numbers, seed, 0)["erase"] * 2**32).long().tolist()
    for place, drawn in zip(noise, seeds, strict=True):
        torch.randn(place.shape, generator=torch.Generator().manual_seed(drawn), out=place)
    return (images + strength * noise.to(images.device)).clamp(0, 1)


def blurred(images: Tensor, numbers: Tensor, seed: int, strength: float) -> Tensor:
    """Through a Gaussian filter; its standard deviation is a share of the side."""
    if not strength:
        return images
    deviation = strength * min(images.shape[-2:])
    reach = min(math.ceil(3 * deviation), min(images.shape[-2:]) - 1)
    places = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    weights = torch.exp(-0.5 * (places / deviation) ** 2)
    weights = (weights / weights.sum()).expand(images.shape[1], 1, 1, -1)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, weights, groups=images.shape[1])
    return F.conv2d(across, weights.transpose(2, 3), groups=images.shape[1])


def faded(images: Tensor, numbers: Tensor, seed: int, strength: float) -> Tensor:
    """With less contrast: a share of each difference from the image's mean is taken away."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (1 - strength)


def thickened(images: Tensor, numbers: Tensor, seed: int, strength: float) -> Tensor:
    """With thicker strokes, or thinner ones: by so many pixels on each side."""
    for _ in range(math.ceil(abs(strength))):
        part = min(1.0, abs(strength))
        sign = math.copysign(1, strength)
        full = sign * F.max_pool2d(sign * images, 3, 1, 1)
        images = images + part * (full - images)
        strength -= sign
    return images


def kinds(spec: DataSpec) -> list[Kind]:
    """The kinds that make sense for these images: a photograph has no strokes.

    Args:
        spec: of the images.
    """
    every = [
        Kind("shift", "share of the side", (0.04, 0.08, 0.12, 0.16, 0.2), shifted),
        Kind("rotation", "degrees", (10, 20, 30, 40, 50), rotated),
        Kind("scale", "factor", (1.1, 1.2, 1.3, 1.4, 1.5), scaled),
        Kind("noise", "standard deviation", (0.1, 0.2, 0.3, 0.4, 0.5), noisy),
        Kind("blur", "share of the side", (0.02, 0.04, 0.06, 0.08, 0.1), blurred),
        Kind("contrast", "share taken away", (0.3, 0.5, 0.7, 0.8, 0.9), faded),
    ]
    if spec.drawn:
        every.append(Kind("thickness", "pixels", (-1.0, -0.5, 0.5, 1.0, 2.0), thickened))
    return every


@torch.inference_mode()
def accuracy(
    model: LightningModule,
    data: MNISTDataModule,
    change: Callable[..., Tensor] | None = None,
) -> float:
    """The accuracy on the test images.

    Args:
        model: in evaluation mode.
        data: after ``setup``.
        change: takes images from 0 to 1 and their ``numbers`` in the set.

    Raises:
        ValueError: the model does not answer with a score for each class.
    """
    correct, place = 0, next(model.parameters(), torch.zeros(0))
    for rows in torch.arange(len(data.test_set)).split(data.eval_batch_size):
        images, labels = data.test_set.__getitems__(rows.tolist())[:2]
        images, numbers = images.to(place.device), rows.to(place.device)
        by_number = None if change is None else partial(change, numbers=numbers)
        pixels = prepare(images, data.spec, by_number)
        scores = own.scores(model, pixels.to(place.dtype))
        if not isinstance(scores, Tensor) or scores.shape != (len(rows), len(data.spec.classes)):
            raise ValueError(
                f"robustness needs a score for each of {len(data.spec.classes)} classes, and"
                f" {type(model).__name__} returns something else"
            )
        correct += int((scores.argmax(1).cpu() == labels).sum())
    return correct / len(data.test_set)


def measure(model: LightningModule, data: MNISTDataModule, seed: int) -> Iterator[Row]:
    """Measures the accuracy of a model under each kind of change.

    Args:
        model: its training mode is unchanged afterwards.
        data: after ``setup``.
        seed: of the directions and the noise.

    Yields:
        A row for each kind, as soon as it is measured.
    """
    was_training = model.training
    model.eval()
    first = torch.zeros(1, dtype=torch.int64)
    image = prepare(data.test_set.__getitems__([0])[0], data.spec.unnormalised())
    try:
        for kind in kinds(data.spec):
            accuracies, examples = [], []
            for strength in kind.strengths:
                change = partial(kind.change, seed=seed, strength=strength)
                accuracies.append(accuracy(model, data, change))
                changed = (change(image, numbers=first)[0].clamp(0, 1) * 255).round()
                examples.append(changed.to(torch.uint8).permute(1, 2, 0).numpy())
            shown = np.stack(examples)
            gray = data.spec.channels == 1
            yield Row(kind, tuple(accuracies), shown[..., 0] if gray else shown)
    finally:
        model.train(was_training)


def line(row: Row) -> str:
    """A row of the table on the screen."""
    cells = (f"{s:>5g}: {a:.4f}" for s, a in zip(row.kind.strengths, row.accuracies, strict=True))
    return f"{row.kind.name:<10}{'  '.join(cells)}   {row.kind.what}"


def draw(plain: float, rows: Sequence[Row]) -> Image.Image:
    """Draws an image at each kind and strength, with the accuracy on all images below it.

    Args:
        plain: the accuracy on the images as they are.
        rows: as ``measure`` gives them.
    """
    captions, colors = [], []
    for row in rows:
        for strength, value in zip(row.kind.strengths, row.accuracies, strict=True):
            captions.append(f"{row.kind.name} {strength:g}: {value:.3f}")
            # red once a tenth of the correct answers is lost
            colors.append(drawing.RED if value < 0.9 * plain else drawing.INK)
    return drawing.tiles(
        np.concatenate([row.examples for row in rows]),
        captions,
        "Robustness",
        f"accuracy, {plain:.4f} without a change; red: a tenth of it is lost",
        columns=max(len(row.kind.strengths) for row in rows),
        colors=colors,
    )
