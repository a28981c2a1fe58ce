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
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mnist_lightning.cores import usable_cores
from mnist_lightning.data.photos import FORMATS, MOST_PIXELS, decode
from mnist_lightning.files import MOST_CLASSES, printable, write_json

ENDINGS = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}
PARTS = ("train", "val", "test")
_SAMPLE = 200  # files whose headers say whether the images are gray or colour
_AT_ONCE = 16  # files that a thread reads in one go: handing over each small one takes half as long
_NAMED = 3  # of many files with the same fault, so many are named


class Listing(NamedTuple):
    """The image files of a folder, sorted by part, class and name."""

    files: list[str]
    """Their paths, as strings: of many files, Path objects take longer than listing them."""
    labels: list[int]
    classes: list[str]
    parts: list[str]
    """Of each file: ``train``, ``val`` or ``test``, or "" if the folder is not split."""
    empty: list[str]
    """Folders without an image."""


class Pictures(NamedTuple):
    """The images of a folder."""

    images: Tensor
    """uint8, ``(n, channels, size, size)``, mapped from the cache."""
    digests: list[bytes]
    """One for each image: images with equal pixels have equal digests."""
    listing: Listing
    """Lists these images: files that are no images are left out."""
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
    by_part = {part: _classes(folder / part) for part in _parts(folder)}
    empty = [
        str(Path(p, name)) for p, found in by_part.items() for name in found if not found[name]
    ]
    by_part = {p: {name: f for name, f in found.items() if f} for p, found in by_part.items()}
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
        empty,
    )


def _parts(folder: Path) -> list[str]:
    """The parts into which the user has split a folder; [""] if it holds the classes."""
    try:
        inner = {entry.name for entry in os.scandir(folder) if entry.is_dir()}
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from error
    split = [part for part in PARTS if part in inner]
    # a class may be called "test", but not all of them are called like parts
    return split if "train" in inner or (inner and inner <= set(PARTS)) else [""]


def _classes(folder: Path) -> dict[str, list[str]]:
    """The image files of each folder, by its name."""
    try:
        inner = [entry for entry in os.scandir(folder) if entry.is_dir()]
        names = (entry.name for entry in inner if not entry.name.startswith("."))
        return {name: _images(folder / name) for name in sorted(names)}
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error


def _images(folder: Path) -> list[str]:
    files = [
        os.path.join(root, name)
        for root, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in ENDINGS and not name.startswith(".")
    ]
    return sorted(files, key=lambda file: file.replace(os.sep, "\0"))  # as paths are sorted


def read_folder(
    folder: Path, size: int, channels: int | None = None, listing: Listing | None = None
) -> Pictures:
    """All images of a folder, of one size.

    The shorter side is scaled to ``size``, and the longer one is cropped to it around the centre.

    Args:
        folder: as ``list_images``.
        size: pixels a side.
        channels: 1 for gray, 3 for colour; by default as the files are.
        listing: of the folder, if it is known.

    Raises:
        ValueError: as ``list_images``; or fewer than two classes have a readable image.
    """
    listing = listing or list_images(folder)
    channels = channels or common_format(listing.files)[0]
    key = _key(folder, listing, size, channels)
    array, readable, digests = _cached(key) or _read(folder, listing, size, channels, key)
    rows = [row for row, whole in enumerate(readable) if whole]
    images = torch.from_numpy(array)
    if len(rows) < len(readable):
        images = images[torch.tensor(rows)]
    files = [listing.files[row] for row in rows]
    labels = [listing.labels[row] for row in rows]
    parts = [listing.parts[row] for row in rows]
    present = set(labels)
    if len(present) < 2:
        raise ValueError(f"{folder}: fewer than two classes have an image that can be read")
    left_out = [file for file, whole in zip(listing.files, readable, strict=True) if not whole]
    warnings = [_left_out(left_out)] if left_out else []
    if listing.empty:
        warnings.append(f"these folders hold no image, and are no class: {_some(listing.empty)}")
    if empty := [name for n, name in enumerate(listing.classes) if n not in present]:
        warnings.append(f"no readable image of {_some(empty)}: no class of that name is learned")
    digests = [digests[row] for row in rows]
    total = hashlib.sha256(b"".join(digests))
    total.update(f"{labels}{parts}{listing.classes}".encode())
    kept = listing._replace(files=files, labels=labels, parts=parts)
    return Pictures(images, digests, kept, total.hexdigest(), warnings)


def _left_out(files: Sequence[str]) -> str:
    return (
        f"{len(files):,} files are left out, since they are no images that can be read, or have"
        f" more than {MOST_PIXELS:,} pixels: {_some([os.path.basename(file) for file in files])}"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return printable(", ".join(names[:_NAMED])) + more


def common_format(files: Sequence[str]) -> tuple[int, int | None]:
    """Reads the headers of a sample of the files.

    Returns:
        3 channels if any file is in colour, else 1; and the side in pixels if all images are
        squares of one size, else None.
    """
    channels, sizes = 1, set()
    for file in files[:: max(1, len(files) // _SAMPLE)]:
        with contextlib.suppress(Exception), Image.open(file, formats=FORMATS) as image:
            sizes.add(image.size)
            if image.mode not in ("1", "L", "LA", "I", "F") and not image.mode.startswith("I;16"):
                channels = 3
    width, height = sizes.pop() if len(sizes) == 1 else (0, 1)
    return channels, width if width == height else None


def _read(
    folder: Path, listing: Listing, size: int, channels: int, key: str
) -> tuple[np.ndarray, list[bool], list[bytes]]:
    """Reads all files into the cache, or into memory if the disk has no room."""
    shape = (len(listing.files), channels, size, size)
    temporary = cache_folder() / f".{key}.{uuid.uuid4().hex[:12]}"
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

    def put_some(start: int) -> list[bool]:
        return [put(row) for row in range(start, min(start + _AT_ONCE, len(listing.files)))]

    readable: list[bool] = []
    quiet, total = not sys.stderr.isatty(), len(listing.files)
    with (
        tqdm(desc=f"reading {folder.name}", total=total, leave=False, disable=quiet) as bar,
        ThreadPoolExecutor(usable_cores()) as threads,
    ):
        for some in threads.map(put_some, range(0, total, _AT_ONCE)):
            readable += some
            bar.update(len(some))
    digests = _digests(array)
    if isinstance(array, np.memmap):
        array.flush()
        os.replace(temporary, cache_folder() / f"{key}.npy")
        array = np.load(
            cache_folder() / f"{key}.npy", mmap_mode="c"
        )  # whose changes stay in memory
        checksum = hashlib.sha256(b"".join(digests)).hexdigest()
        write_json(cache_folder() / f"{key}.json", {"readable": readable, "sha256": checksum})
    return array, readable, digests


def _digests(array: np.ndarray) -> list[bytes]:
    """A digest of each image. Of large ones in parallel, as hashing releases Python's lock.

    With small ones, the threads would mostly wait for that lock.
    """

    def of_rows(start: int) -> list[bytes]:
        rows = array[start : start + 1000]
        return [hashlib.blake2b(row.data, digest_size=16).digest() for row in rows]

    large = array[0].nbytes >= 2**16
    with ThreadPoolExecutor(usable_cores() if large else 1) as threads:
        return [d for part in threads.map(of_rows, range(0, len(array), 1000)) for d in part]


def _cached(key: str) -> tuple[np.ndarray, list[bool], list[bytes]] | None:
    """Reads what an earlier start has cached; None if it is missing or damaged."""
    try:
        about = json.loads((cache_folder() / f"{key}.json").read_bytes())
        array = np.load(cache_folder() / f"{key}.npy", mmap_mode="c")
        digests = _digests(array)
        whole = hashlib.sha256(b"".join(digests)).hexdigest() == about["sha256"]
        return (array, about["readable"], digests) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(folder: Path, listing: Listing, size: int, channels: int) -> str:
    """A name for the array, computed from all that it depends on."""
    digest = hashlib.sha256(f"2 {size} {channels}".encode())
    start = len(str(folder / "x")) - 1  # where the name relative to the folder starts
    for file in listing.files:
        try:
            stat = os.stat(file)
        except OSError:  # a link to nothing
            stat = os.lstat(file)
        about = f"{file[start:]}\0{stat.st_size}\0{stat.st_mtime_ns}\0"
        digest.update(about.encode(errors="replace"))
    return digest.hexdigest()[:32]


def cache_folder() -> Path:
    """The folder of files that can be made again at any time."""
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


def count_shared(digests: Sequence[bytes], rows: Tensor, others: Tensor) -> int:
    """Counts the images of ``rows`` that are also among ``others``, pixel by pixel.

    Args:
        digests: of all images, see ``Pictures``.
        rows: int64 indices of some images.
        others: int64 indices of others.
    """
    known = {digests[row] for row in others.tolist()}
    return sum(digests[row] in known for row in rows.tolist())
