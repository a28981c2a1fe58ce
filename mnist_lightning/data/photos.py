"""Photographed and drawn digits, prepared as MNIST prepared its own."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGES = {".png", ".jpg", ".jpeg", ".gif", ".webp"}  # endings of the files that predict reads
_MOST_PIXELS = 50_000_000  # a photo: unpacked, each takes some 20 bytes


def read_image(path: Path) -> Tensor:
    """One photographed or drawn digit as MNIST would hold it: uint8, shape ``(28, 28)``.

    As in the making of MNIST, the ink is light on dark, scaled to fit 20 x 20 pixels, and put with
    its centre of mass in the middle of 28 x 28.

    Transparent parts count as white paper; the turn that a camera notes is undone.

    Raises:
        ValueError: the file is no image, or there is nothing on it.
    """
    pixels = torch.from_numpy(_decode(path))
    # what the edges show is the paper; what differs most from it is the ink, dark or light
    pixels -= torch.cat([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).median()
    if pixels.max() < -pixels.min():
        pixels = -pixels
    if pixels.max() < 25:
        raise ValueError(f"{path} shows nothing: all its pixels are nearly alike")
    pixels = pixels.clamp(min=0) * (255 / pixels.max())
    ink = pixels > 64
    rows, columns = ink.any(1).nonzero().flatten(), ink.any(0).nonzero().flatten()
    digit = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = 20 / max(digit.shape)
    height, width = (max(1, round(side * scale)) for side in digit.shape)
    digit = F.interpolate(digit[None, None], size=(height, width), mode="area")[0, 0]
    weight = digit / digit.sum()
    centre_y = (weight.sum(1) * torch.arange(height)).sum()
    centre_x = (weight.sum(0) * torch.arange(width)).sum()
    # MNIST's own centres of mass lie within half a pixel of row and column 14, not of 13.5
    top = int((14 - centre_y).round().clamp(0, 28 - height))
    left = int((14 - centre_x).round().clamp(0, 28 - width))
    framed = torch.zeros(28, 28)
    framed[top : top + height, left : left + width] = digit
    return framed.round().clamp(0, 255).to(torch.uint8)


def _decode(path: Path) -> np.ndarray:
    """An image file as float32 gray values from 0 to 255, shape ``(height, width)``."""
    from PIL import Image, ImageOps

    if not path.is_file():  # a pipe, say, which might never end
        raise ValueError(f"{path} cannot be read as an image: it is no file. Remove it")
    pixels = 0
    try:
        with Image.open(path) as file:
            pixels = file.width * file.height
            if pixels > _MOST_PIXELS:
                raise ValueError
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I;16"):
                return np.asarray(picture, np.float32) / 257
            paper = Image.new("RGBA", picture.size, "white")
            paper.alpha_composite(picture.convert("RGBA"))
            return np.array(paper.convert("L"), np.float32)
    except Exception as error:  # of many kinds, for the many ways to be damaged
        if pixels > _MOST_PIXELS or isinstance(error, Image.DecompressionBombError):
            raise ValueError(
                f"{path} has more than {_MOST_PIXELS:,} pixels: scale it down, or remove it"
            ) from error
        raise ValueError(
            f"{path} cannot be read as an image: put a good copy there, or remove it"
        ) from error
