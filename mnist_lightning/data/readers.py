"""Readers of whole data sets as verified uint8 tensors: MNIST's files, scikit-learn's digits."""

import gzip
import hashlib
import math
from importlib.metadata import distribution
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_lightning.data.photos import IMAGES

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
# MD5 of the uncompressed files. torchvision has the MD5 of the .gz files of every set.
_MNIST_MD5 = dict(
    zip(
        FILES,
        (
            "6bbc9ace898e44ae57da46a324031adb",
            "a25bea736e30d166cdddb491f175f624",
            "2646ac647ad5339dbf082846283269ea",
            "27ae3e4e09519cfbb04c329615203637",
        ),
        strict=True,
    )
)


class Pool(NamedTuple):
    """All images of a data set; the last ``official_test`` of them are its official test set."""

    images: Tensor
    labels: Tensor
    official_test: int
    checksum: str


def _pool(images: Tensor, labels: Tensor, official_test: int) -> Pool:
    digest = hashlib.sha256(images.numpy().tobytes())
    digest.update(labels.numpy().tobytes())
    return Pool(images, labels, official_test, digest.hexdigest())


def read_digits() -> Pool:
    """Reads scikit-learn's 8x8 digits, enlarged as in MNIST: 20 x 20 pixels of ink in 28 x 28."""
    # reads the data file directly: importing scikit-learn takes as long as importing PyTorch
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = torch.from_numpy(np.loadtxt(str(file), delimiter=",", dtype=np.float32))
    small = table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)
    large = F.interpolate(small, size=(20, 20), mode="bilinear", antialias=True)
    images = F.pad(large, (4, 4, 4, 4)).round().to(torch.uint8).squeeze(1)
    labels = table[:, -1].long()
    # The digits have no official test set. The last seventh is used, the same share as in MNIST.
    return _pool(images, labels, official_test=len(labels) // 7)


def read_files(name: str, data_dir: Path) -> Pool:
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for file in FILES:
        array = _read_idx(name, file, data_dir)
        (images if "images" in file else labels).append(torch.from_numpy(array))
    for part, kind in zip(images, ("train", "test"), strict=True):
        count = len(labels[0 if kind == "train" else 1])
        if len(part) != count:
            raise ValueError(
                f"{name} in {data_dir} has {len(part)} {kind} images, {count} labels:"
                " put good copies of the files there"
            )
    return _pool(torch.cat(images), torch.cat(labels).long(), official_test=len(labels[1]))


def _read_idx(name: str, stem: str, data_dir: Path) -> np.ndarray:
    """Reads an IDX file as a uint8 array, after checks of magic number, length and checksum."""
    paths = _paths(name, stem, data_dir)
    path = next((file for file in paths if file.is_file()), None)
    if path is None:
        reason = f"no {' and no '.join(file.name for file in paths)}"
        raise ValueError(not_there(name, data_dir, reason))
    remedy = "Delete it to download it again, or put a good copy there."
    content = path.read_bytes()
    packed = path.suffix == ".gz"
    if packed:
        if hashlib.md5(content).hexdigest() != _packed_md5(name)[path.name]:
            raise ValueError(f"{path} is damaged: wrong checksum (MD5). {remedy}")
        content = gzip.decompress(content)
    dimensions = 3 if "images" in stem else 1
    magic = int.from_bytes(content[:4], "big")
    if magic != 0x0800 + dimensions:
        raise ValueError(f"{path} is not an IDX file of {name}: magic number {magic}. {remedy}")
    header = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:header].ljust(header - 4, b"\0"), ">u4").astype(int)
    expected = header + math.prod(shape.tolist())
    if len(content) != expected:
        raise ValueError(f"{path} has {len(content):,} bytes instead of {expected:,}. {remedy}")
    if not packed and hashlib.md5(content).hexdigest() != _MNIST_MD5[stem]:
        raise ValueError(f"{path} is damaged: wrong checksum (MD5). {remedy}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _packed_md5(name: str) -> dict[str, str]:
    import torchvision.datasets

    return dict(getattr(torchvision.datasets, name).resources)


def _paths(name: str, file: str, data_dir: Path) -> list[Path]:
    """Lists the paths where a file may be, in order of preference."""
    packed = data_dir / name / "raw" / f"{file}.gz"
    # only MNIST's uncompressed files have a published checksum
    return [packed.with_suffix(""), packed] if name == "MNIST" else [packed]


def missing_files(name: str, data_dir: Path) -> list[str]:
    """Lists the files of the set that do not exist in any form that can be verified."""
    return [
        file if name == "MNIST" else f"{file}.gz"
        for file in FILES
        if not any(path.is_file() for path in _paths(name, file, data_dir))
    ]


def where_to_put(name: str, data_dir: Path) -> str:
    suffix = "[.gz]" if name == "MNIST" else ".gz"
    return (
        f"Put the four files ({FILES[0]}{suffix} ...) into {data_dir / name / 'raw'}, or point"
        " MNIST_DATA_DIR or --data.data_dir at the folder that holds them."
    )


def first_picture(folder: Path) -> Path | None:
    """Finds the first image file in a folder or its direct subfolders."""
    files = chain(folder.glob("*"), folder.glob("*/*"))
    return next((file for file in files if file.suffix.lower() in IMAGES), None)


def not_there(name: str, data_dir: Path, reason: str) -> str:
    return (
        f"{name} is not in {data_dir}: {reason}. {where_to_put(name, data_dir)}"
        " Or train on scikit-learn's small digits: --data.source digits."
    )
