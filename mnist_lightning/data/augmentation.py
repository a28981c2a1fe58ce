"""Augmentation: each training image is shifted, rotated, ... by a draw of its own, in each epoch.

A draw follows from the seed, the epoch and the number of the image alone: not from the mini-batch
that the image is in, nor from earlier draws, nor from the number of processes. A resumed training
therefore sees the same images as one that was never interrupted.

All changes of position make one map for each image, affine or bent, and the pixels are interpolated
once, on the device that trains.
"""

import math
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of the table of random numbers: each setting draws from its own, so that switching one on
# does not change the others' draws.
_DRAWS = (
    "shift_x shift_y rotate scale shear_x shear_y flip crop_x crop_y"
    " erase erase_x erase_y brightness contrast saturation"
).split()
_PER_IMAGE = len(_DRAWS)
_BEND = 5  # points a side, whose draws bend an image
_MOVES = ("shift", "rotate", "scale", "shear", "elastic", "flip", "crop")
_GRAY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601, as in torchvision and Pillow


@dataclass(frozen=True)
class Augment:
    """What is drawn for each training image. By default nothing: the images stay as they are.

    Args:
        shift: by up to so many pixels in each direction, also by parts of a pixel.
        rotate: by up to so many degrees either way.
        scale: by a factor from ``1 / (1 + scale)`` to ``1 + scale``.
        shear: by up to so many degrees, horizontally and vertically.
        flip: left and right are exchanged for half of the images.
        crop: pads by so many pixels and crops back to the old size: a shift by whole pixels.
        erase: a square of so many pixels a side is blacked out in half of the images.
        brightness: pixels are multiplied by ``1 - brightness`` to ``1 + brightness``.
        contrast: the differences from the image's mean are multiplied, likewise.
        saturation: of colour images, the differences from gray are multiplied, likewise.
        elastic: bends the image: 5 x 5 points are moved by up to so many pixels in each direction,
            and the pixels between them smoothly with them. (Simard et al. 2003, "Best practices
            for convolutional neural networks", smooth a draw for each pixel instead.)

    Raises:
        ValueError: a negative number, or one that leaves nothing of an image.
    """

    shift: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    flip: bool = False
    crop: int = 0
    erase: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    elastic: float = 0.0

    def __post_init__(self) -> None:
        most = {"rotate": 180, "shear": 60, "brightness": 1, "contrast": 1, "saturation": 1}
        for field in fields(self):
            value = getattr(self, field.name)
            limit = most.get(field.name, math.inf)
            if not 0 <= value <= limit:
                within = "must be 0 or more" if limit == math.inf else f"must be from 0 to {limit}"
                raise ValueError(f"augment.{field.name} {within}, got {value}")

    @property
    def moves(self) -> bool:
        """Whether positions change, and pixels are interpolated."""
        return any(getattr(self, name) for name in _MOVES)

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))

    def chosen(self) -> dict[str, Any]:
        """The settings that change something, as plain values."""
        return {name: value for name, value in asdict(self).items() if value}

    def __call__(self, images: Tensor, numbers: Tensor, seed: int, epoch: int) -> Tensor:
        """The images with their draws.

        Args:
            images: floating point from 0 (black) to 1, ``(b, channels, height, width)``.
            numbers: of the images in the training set, int64, ``(b,)``.
            seed: of the training.
            epoch: counted from 0.
        """
        if not self:
            return images
        draws = uniform(numbers, seed, epoch)
        if self.moves:
            height, width = images.shape[-2:]
            places = _places(self.maps(draws, height, width).to(images.dtype), height, width)
            if self.elastic:
                bends = self.bends(points(numbers, seed, epoch), height, width)
                places = places + bends.to(images.dtype)
            images = F.grid_sample(images, places, align_corners=False)
        return self._colours(self._erased(images, draws), draws)

    def maps(self, draws: dict[str, Tensor], height: int, width: int) -> Tensor:
        """From places in the new images to places in the old ones, as ``affine_grid`` takes them.

        Args:
            draws: as ``uniform``.
            height: of an image, in pixels.
            width: likewise.

        Returns:
            float64, ``(b, 2, 3)``.
        """

        def within(name: str, most: float) -> Tensor:
            return (2 * draws[name] - 1) * most

        angle = torch.deg2rad(within("rotate", self.rotate))
        shear_x = torch.tan(torch.deg2rad(within("shear_x", self.shear)))
        shear_y = torch.tan(torch.deg2rad(within("shear_y", self.shear)))
        factor = torch.exp(within("scale", math.log1p(self.scale)))
        mirror = torch.where(draws["flip"] < (0.5 if self.flip else 0), -1.0, 1.0)
        whole = 2 * self.crop + 1
        moves = [
            within(f"shift_{axis}", self.shift)
            + (draws[f"crop_{axis}"] * whole).floor()
            - self.crop
            for axis in ("x", "y")
        ]
        cos, sin = torch.cos(angle) / factor, torch.sin(angle) / factor
        # in pixels around the centre: rotation and scale, sheared, mirrored
        xx, xy = cos + sin * shear_x, sin + cos * shear_x
        yx, yy = -sin + cos * shear_y, cos - sin * shear_y
        xx, xy = xx * mirror, xy * mirror
        # affine_grid measures an image from -1 to 1 along both sides
        rows = [
            torch.stack([xx, xy * (height / width), moves[0] * (2 / width)], 1),
            torch.stack([yx * (width / height), yy, moves[1] * (2 / height)], 1),
        ]
        return torch.stack(rows, 1)

    def bends(self, draws: Tensor, height: int, width: int) -> Tensor:
        """How far each pixel is moved, on the scale of ``affine_grid``.

        Args:
            draws: as ``points``.
            height: of an image, in pixels.
            width: likewise.

        Returns:
            float64, ``(b, height, width, 2)``.
        """
        pixels = draws.new_tensor([2 / width, 2 / height])[:, None, None]
        moves = (2 * draws - 1) * self.elastic * pixels
        rows, columns = (_between(size).to(moves) for size in (height, width))
        return (rows @ moves @ columns.T).permute(0, 2, 3, 1)

    def _erased(self, images: Tensor, draws: dict[str, Tensor]) -> Tensor:
        if not self.erase:
            return images
        height, width = images.shape[-2:]
        inside = []
        for axis, length in (("y", height), ("x", width)):
            start = (draws[f"erase_{axis}"] * max(1, length - self.erase + 1)).floor()
            places = torch.arange(length, device=images.device)
            inside.append((places >= start[:, None]) & (places < start[:, None] + self.erase))
        rows, columns = inside
        chosen = draws["erase"] < 0.5
        square = rows[:, :, None] & columns[:, None, :] & chosen[:, None, None]
        return images.masked_fill(square[:, None], 0)

    def _colours(self, images: Tensor, draws: dict[str, Tensor]) -> Tensor:
        def factor(name: str) -> Tensor:
            most = getattr(self, name)
            return (1 + (2 * draws[name] - 1) * most).to(images.dtype)[:, None, None, None]

        if self.brightness:
            images = (images * factor("brightness")).clamp(0, 1)
        if self.contrast:
            mean = _gray(images).mean((1, 2, 3), keepdim=True)
            images = (mean + (images - mean) * factor("contrast")).clamp(0, 1)
        if self.saturation and images.shape[1] == 3:
            gray = _gray(images)
            images = (gray + (images - gray) * factor("saturation")).clamp(0, 1)
        return images


def _places(maps: Tensor, height: int, width: int) -> Tensor:
    """``affine_grid``, faster: the sum of a part for each row and one for each column.

    Args:
        maps: ``(b, 2, 3)``, see ``Augment.maps``.
        height: of an image, in pixels.
        width: likewise.

    Returns:
        ``(b, height, width, 2)``.
    """

    def middles(pixels: int) -> Tensor:
        """Where the pixels' middles are, if the side goes from -1 to 1."""
        places = torch.arange(pixels, dtype=maps.dtype, device=maps.device)
        return (2 * places + 1) / pixels - 1

    along_x, along_y, move = maps[..., None].unbind(2)
    columns = along_x * middles(width)
    rows = along_y * middles(height) + move
    return (rows[..., None] + columns[:, :, None]).permute(0, 2, 3, 1)


@cache
def _between(pixels: int) -> Tensor:
    """Bicubic interpolation from the points of a bend to the pixels of a side.

    Returns:
        float64, ``(pixels, _BEND)``; the first point and the last are those of the image.
    """
    units = torch.eye(_BEND, dtype=torch.float64)[None, :, None]
    size = 1, pixels
    return F.interpolate(units, size, mode="bicubic", align_corners=True)[0, :, 0].T


def _gray(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    weights = images.new_tensor(_GRAY)[None, :, None, None]
    return (images * weights).sum(1, keepdim=True)


def uniform(numbers: Tensor, seed: int, epoch: int) -> dict[str, Tensor]:
    """Random numbers in [0, 1) for each image, by what is drawn with them; float64, ``(b,)`` each.

    They are hashes of the seed, the epoch and the image's number (SplitMix64: Steele, Lea and Flood
    2014, "Fast splittable pseudorandom number generators"), in whole numbers: the same bits on
    every device.
    """
    values = _uniform(_images(numbers, seed, epoch), _PER_IMAGE)
    return dict(zip(_DRAWS, values.unbind(1), strict=True))


def points(numbers: Tensor, seed: int, epoch: int) -> Tensor:
    """The random numbers of ``Augment.elastic``, in [0, 1); float64, ``(b, 2, 5, 5)``.

    They are hashed once more than those of ``uniform``, and so do not change them.
    """
    values = _uniform(_mix(_images(numbers, seed, epoch)), 2 * _BEND**2)
    return values.view(-1, 2, _BEND, _BEND)


def _images(numbers: Tensor, seed: int, epoch: int) -> Tensor:
    start = _mix(torch.tensor([seed], device=numbers.device)) + epoch
    return _mix(_mix(start) + numbers)


def _uniform(images: Tensor, columns: int) -> Tensor:
    places = images[:, None] * columns + torch.arange(columns, device=images.device)
    bits = _mix(places) >> 11  # keeps the sign
    return (bits & (2**53 - 1)).double() / 2**53


def _mix(values: Tensor) -> Tensor:
    """SplitMix64's step and output function on int64, whose products wrap around."""
    values = values + _signed(0x9E3779B97F4A7C15)
    values = (values ^ _shifted(values, 30)) * _signed(0xBF58476D1CE4E5B9)
    values = (values ^ _shifted(values, 27)) * _signed(0x94D049BB133111EB)
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, by: int) -> Tensor:
    """A logical shift to the right, where ``>>`` would fill in the sign."""
    return (values >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
