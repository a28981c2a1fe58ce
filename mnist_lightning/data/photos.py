"""Reads image files: photographs as they are, and digits prepared as the makers of MNIST did."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mnist_lightning.data.drawings import find_ink, frame
from mnist_lightning.spec import DataSpec

IMAGES = {".png", ".jpg", ".jpeg", ".gif", ".webp"}  # suffixes of the files that predict reads
# Pillow reads more: EPS, for example, starts another program
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "PPM", "TIFF")
MOST_PIXELS = 50_000_000  # each pixel takes about 20 bytes of memory while it is processed


def read_for(spec: DataSpec, path: Path) -> Tensor:
    """Reads an image file as a network for ``spec`` needs it.

    Returns:
        uint8, ``(28, 28)`` for drawings, else ``(channels, height, width)``.

    Raises:
        ValueError: the file is not an image, or shows nothing.
    """
    if spec.drawn:
        return read_image(path)
    pixels = decode(path, spec.height, spec.channels)
    if pixels is None:
        raise ValueError(
            f"{path} cannot be read as an image of at most {MOST_PIXELS:,} pixels: put a good copy"
            " there, or remove it"
        )
    return torch.from_numpy(pixels)


def decode(path: str | Path, size: int, channels: int) -> np.ndarray | None:
    """Reads one image, uint8, ``(channels, size, size)``; None for a file that is no image.

    Transparent parts count as white paper. The rotation in the EXIF data is applied.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            if file.width * file.height > MOST_PIXELS:
                return None
            mode = "RGB" if channels == 3 else "L"
            # the JPEG decoder may scale down by powers of two, to no less than twice the size
            file.draft(mode, (2 * size, 2 * size))
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            elif image.mode in ("P", "PA", "LA", "RGBA"):
                paper = Image.new("RGBA", image.size, "white")
                paper.alpha_composite(image.convert("RGBA"))
                image = paper
            image = image.convert(mode)
            if image.size != (size, size):
                image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
            pixels = np.array(image, np.uint8)
    except Exception:  # of many kinds, for the many ways to be damaged
        return None
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def read_image(path: Path) -> Tensor:
    """Reads one photographed or drawn digit in MNIST's format: uint8, shape ``(28, 28)``.

    As in MNIST, the ink is light on dark, scaled to fit 20 x 20 pixels, and its centre of mass lies
    in the middle of 28 x 28 pixels. The paper may be shaded, ruled or noisy, dark or light.
    Transparent parts count as white paper. The rotation in the EXIF data is applied.

    Raises:
        ValueError: the file is not an image, or the image is blank.
    """
    found = find_ink(_decode(path))
    if found is None:
        raise ValueError(f"{path} shows nothing: all its pixels are almost equal. Remove it")
    return frame(*found)


def _decode(path: Path) -> np.ndarray:
    """Reads an image file as float32 gray values from 0 to 255, shape ``(height, width)``."""
    if not path.is_file():  # reading a pipe might never end
        raise ValueError(f"{path} cannot be read as an image: it is not a file. Remove it")
    pixels = 0
    try:
        with Image.open(path, formats=FORMATS) as file:
            pixels = file.width * file.height
            if pixels > MOST_PIXELS:
                raise ValueError
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I;16"):
                return np.asarray(picture, np.float32) / 257
            paper = Image.new("RGBA", picture.size, "white")
            paper.alpha_composite(picture.convert("RGBA"))
            return np.array(paper.convert("L"), np.float32)
    except Exception as error:  # PIL raises many types for damaged files
        if pixels > MOST_PIXELS or isinstance(error, Image.DecompressionBombError):
            raise ValueError(
                f"{path} has more than {MOST_PIXELS:,} pixels: scale it down, or remove it"
            ) from error
        raise ValueError(
            f"{path} cannot be read as an image: put a good copy there, or remove it"
        ) from error
