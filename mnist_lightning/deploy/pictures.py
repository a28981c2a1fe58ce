"""Reads the user's images: files, folders, standard input."""

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from mnist_lightning.data.photos import IMAGES, read_for
from mnist_lightning.files import reason
from mnist_lightning.spec import DataSpec

STDIN = "-"
_MOST_BYTES = 2**28  # of standard input
# how the files begin that are taken for images, and are none; Pillow would start Ghostscript
_OTHERS = {
    b"%PDF": "a PDF",
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"<svg": "an SVG",
    b"<?xml": "an SVG, or other XML",
}


def find(paths: Sequence[str], refuse: Callable[[str], None]) -> Iterator[str]:
    """Names the files at some paths: a folder's images, also those of folders in it, sorted.

    Args:
        paths: files, folders, and ``-`` for standard input.
        refuse: is called with a message for each path where there is nothing.
    """
    for path in paths:
        if path == STDIN or not os.path.isdir(path):  # no error for a name that is too long
            yield path
            continue
        images = [
            str(file)
            for file in sorted(Path(path).rglob("*"))
            if file.suffix.lower() in IMAGES and not file.is_dir()
        ]
        if not images:
            refuse(f"{path} has no images: none of its files ends in {', '.join(sorted(IMAGES))}")
        yield from images


def read(name: str, spec: DataSpec) -> Tensor:
    """Reads one image as a network for ``spec`` needs it.

    Returns:
        uint8, ``(channels, height, width)``.

    Raises:
        ValueError: it is not an image, is too large, or shows nothing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow about large images, which are refused
        pixels = _read_stdin(spec) if name == STDIN else _read_file(Path(name), spec)
    return pixels if pixels.ndim == 3 else pixels.unsqueeze(0)


def _read_file(path: Path, spec: DataSpec) -> Tensor:
    try:
        if not path.exists():
            raise ValueError(f"{path}: there is no such file or folder")
        if not path.is_file():  # reading a pipe might never end
            raise ValueError(f"{path} is not a regular file: give {STDIN}, and pipe the image in")
        with path.open("rb") as file:
            _check_kind(file.read(256), str(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {reason(error)}") from error
    return read_for(spec, path)


def _read_stdin(spec: DataSpec) -> Tensor:
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError(f"{STDIN} is an image from standard input: pipe one into this command")
    content = sys.stdin.buffer.read(_MOST_BYTES + 1)
    if not content:
        raise ValueError("standard input is empty: pipe an image into this command")
    if len(content) > _MOST_BYTES:
        raise ValueError(f"standard input has over {_MOST_BYTES:,} bytes: scale the image down")
    _check_kind(content[:256], "standard input")
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            return read_for(spec, Path(file.name))
        except ValueError as error:
            raise ValueError(str(error).replace(file.name, "standard input")) from error


def _check_kind(start: bytes, name: str) -> None:
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip()  # a byte order mark may come first
    for known, kind in _OTHERS.items():
        if start.startswith(known):
            raise ValueError(f"{name} is {kind}, not an image of pixels: convert it to PNG")
    if not start:
        raise ValueError(f"{name} is empty: put a good copy there, or remove it")
