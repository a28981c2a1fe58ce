"""Images in class folders: ``DIR/<class>/*.jpg``, or ``DIR/train|val|test/<class>/*.jpg``.

All files are read once, in parallel, into one uint8 array in the user's cache. The next start only
maps that array into memory. It is made anew when a file of the folder changes.
"""

import contextlib
import hashlib
import json
import os
import sys
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from mnist_lightning.files import printable, write_json

ENDINGS = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}
PARTS = ("train", "val", "test")
MOST_CLASSES = 10_000
_MOST_PIXELS = 50_000_000  # of a photo: unpacked, each takes some 20 bytes
_SAMPLE = 200  # files whose headers say whether the images are gray or colour
_NAMED = 3  # of many files with the same fault, so many are named


class Listing(NamedTuple):
    """The image files of a folder, sorted by part, class and name."""

    files: list[Path]
    labels: list[int]
    classes: list[str]
    parts: list[str]
    """Of each file: ``train``, ``val`` or ``test``, or "" where the folder is not split."""


class Pictures(NamedTuple):
    """The images of a folder."""

    images: Tensor
    """uint8, ``(n, channels, size, size)``, mapped from the cache."""
    listing: Listing
    """Of these images: files that are no images are left out."""
    checksum: str
    """SHA-256 over the images, labels and parts."""
    warnings: list[str]
    """Sentences about what was left out."""


def list_images(folder: Path) -> Listing:
    """Finds the images of a folder, without opening them.

    Raises:
        ValueError: there is no such folder, it cannot be read, has fewer than two classes, or more
            than ``MOST_CLASSES``.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give --data.data_dir DIR with DIR/<class>/*.jpg")
    split = [part for part in PARTS if (folder / part).is_dir()]
    parts = split if "train" in split else [""]
    by_part = {part: _classes(folder / part) for part in parts}
    classes = sorted({name for by_class in by_part.values() for name in by_class})
    if len(classes) < 2:
        raise ValueError(
            f"{folder} holds {'one class' if classes else 'no class'}: it needs two or more folders"
            " of images, DIR/<class>/*.jpg. The name of such a folder is the class"
        )
    if len(classes) > MOST_CLASSES:
        raise ValueError(
            f"{folder} holds {len(classes):,} folders; at most {MOST_CLASSES:,} classes can be"
            " trained. Is it the right folder?"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    rows = [
        (file, numbers[name], part)
        for part, by_class in by_part.items()
        for name, files in by_class.items()
        for file in files
    ]
    return Listing(
        [file for file, _, _ in rows],
        [label for _, label, _ in rows],
        classes,
        [part for _, _, part in rows],
    )


def _classes(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class that has some, by its name."""
    try:
        inner = [entry for entry in os.scandir(folder) if entry.is_dir()]
        names = (entry.name for entry in inner if not entry.name.startswith("."))
        listed = {name: _images(folder / name) for name in sorted(names)}
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error
    return {name: files for name, files in listed.items() if files}


def _images(folder: Path) -> list[Path]:
    files = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return sorted(f for f in files if f.suffix.lower() in ENDINGS and not f.name.startswith("."))


def read_folder(folder: Path, size: int, channels: int | None = None) -> Pictures:
    """All images of a folder, of one size.

    The shorter side is scaled to ``size``, and the longer one is cropped to it around the centre.

    Args:
        folder: as ``list_images``.
        size: pixels a side.
        channels: 1 for gray, 3 for colour; by default as the files are.

    Raises:
        ValueError: as ``list_images``; or fewer than two classes have a readable image.
    """
    listing = list_images(folder)
    channels = channels or _channels(listing.files)
    key = _key(folder, listing, size, channels)
    array, readable, digest = _cached(key) or _read(folder, listing, size, channels, key)
    rows = [row for row, whole in enumerate(readable) if whole]
    images = torch.from_numpy(array)
    if len(rows) < len(readable):
        images = images[torch.tensor(rows)]
    files = [listing.files[row] for row in rows]
    labels = [listing.labels[row] for row in rows]
    parts = [listing.parts[row] for row in rows]
    if len(set(labels)) < 2:
        raise ValueError(f"{folder}: fewer than two classes have an image that can be read")
    left_out = [file for file, whole in zip(listing.files, readable, strict=True) if not whole]
    warnings = [_left_out(left_out)] if left_out else []
    if empty := [name for n, name in enumerate(listing.classes) if n not in set(labels)]:
        warnings.append(f"no readable image of {_some(empty)}: no class of that name is learned")
    checksum = hashlib.sha256(f"{digest}{labels}{parts}{listing.classes}".encode()).hexdigest()
    return Pictures(images, Listing(files, labels, listing.classes, parts), checksum, warnings)


def _left_out(files: Sequence[Path]) -> str:
    return (
        f"{len(files):,} files are left out, since they are no images that can be read, or have"
        f" more than {_MOST_PIXELS:,} pixels: {_some([file.name for file in files])}"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return printable(", ".join(names[:_NAMED])) + more


def _channels(files: Sequence[Path]) -> int:
    """3 if any file of a sample is in colour."""
    for file in files[:: max(1, len(files) // _SAMPLE)]:
        with contextlib.suppress(Exception), Image.open(file) as image:
            if image.mode not in ("1", "L", "LA", "I", "F") and not image.mode.startswith("I;16"):
                return 3
    return 1


def decode(path: Path, size: int, channels: int) -> np.ndarray | None:
    """One image, uint8, ``(channels, size, size)``; nothing for a file that is no image.

    Transparent parts count as white paper; the turn that a camera notes is undone.
    """
    try:
        with Image.open(path) as file:
            if file.width * file.height > _MOST_PIXELS:
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
            pixels = np.asarray(image, np.uint8)
    except Exception:  # of many kinds, for the many ways to be damaged
        return None
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def _read(
    folder: Path, listing: Listing, size: int, channels: int, key: str
) -> tuple[np.ndarray, list[bool], str]:
    """Reads all files into the cache; into memory where there is no room for that."""
    shape = (len(listing.files), channels, size, size)
    temporary = _cache() / f".{key}.{uuid.uuid4().hex[:12]}"
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)) + 2**16)  # a full disk says so
        array: np.ndarray = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        array = np.zeros(shape, np.uint8)

    def put(row: int) -> bool:
        image = decode(listing.files[row], size, channels)
        if image is not None:
            array[row] = image
        return image is not None

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        rows = threads.map(put, range(len(listing.files)))
        quiet = not sys.stderr.isatty()
        bar = tqdm(rows, f"reading {folder.name}", len(listing.files), leave=False, disable=quiet)
        readable = list(bar)
    digest = hashlib.sha256(array.data).hexdigest()
    if isinstance(array, np.memmap):
        array.flush()
        os.replace(temporary, _cache() / f"{key}.npy")
        array = np.load(_cache() / f"{key}.npy", mmap_mode="c")  # whose changes stay in memory
        write_json(_cache() / f"{key}.json", {"readable": readable, "sha256": digest})
    return array, readable, digest


def _cached(key: str) -> tuple[np.ndarray, list[bool], str] | None:
    """What an earlier start has read, if it is whole."""
    try:
        about = json.loads((_cache() / f"{key}.json").read_bytes())
        array = np.load(_cache() / f"{key}.npy", mmap_mode="c")
        digest = hashlib.sha256(array.data).hexdigest()
        return (array, about["readable"], digest) if digest == about["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(folder: Path, listing: Listing, size: int, channels: int) -> str:
    """A name for all that the array of a folder follows from."""
    digest = hashlib.sha256(f"1 {size} {channels}".encode())
    for file in listing.files:
        stat = file.stat() if file.exists() else file.lstat()  # a link to nothing
        name = file.relative_to(folder)
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(errors="replace"))
    return digest.hexdigest()[:32]


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "mnist_lightning")


def split_stratified(labels: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Which images to cut off: the same share of each class, drawn at random.

    Args:
        labels: int64, ``(n,)``.
        fraction: of the images, to be cut off.
        generator: of the random numbers.

    Returns:
        bool, ``(n,)``. Of a class with two images or more, at least one is cut off and one stays.
    """
    cut = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
        cut[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return cut


def count_shared(images: Tensor, rows: Tensor, others: Tensor) -> int:
    """How many images of ``rows`` are also among ``others``, pixel by pixel.

    Args:
        images: uint8, ``(n, ...)``.
        rows: int64 indices of some.
        others: int64 indices of others.
    """

    def digests(indices: Tensor) -> list[bytes]:
        return [hashlib.blake2b(images[i].numpy().tobytes()).digest() for i in indices.tolist()]

    known = set(digests(others))
    return sum(digest in known for digest in digests(rows))
