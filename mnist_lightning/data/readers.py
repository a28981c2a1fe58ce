"""Readers of whole data sets as verified uint8 tensors: the named sets, scikit-learn's digits."""

import gzip
import hashlib
import io
import math
import pickle
import zipfile
from collections.abc import Callable
from importlib.metadata import distribution
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_lightning.data.named import FILES, NAMED
from mnist_lightning.data.photos import IMAGES

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
    """Reads a named set. All of its files are verified by torchvision's checksums (MD5).

    Raises:
        ValueError: a file is missing or damaged.
    """
    train, test = _READERS[NAMED[name].format](name, data_dir)
    for kind, (images, labels) in (("train", train), ("test", test)):
        if len(images) != len(labels):
            raise ValueError(
                f"{name} in {data_dir} has {len(images)} {kind} images, {len(labels)} labels:"
                " put good copies of the files there"
            )
    pixels, targets = (
        torch.from_numpy(np.concatenate(parts)) for parts in zip(train, test, strict=True)
    )
    # contiguous: some files have the axes in another order
    return _pool(pixels.contiguous(), targets.long(), official_test=len(test[1]))


_Part = tuple[np.ndarray, np.ndarray]  # images and labels, of training or test


def _read_mnist(name: str, data_dir: Path) -> tuple[_Part, _Part]:
    train_images, train_labels, images, labels = (_read_idx(name, f, data_dir) for f in FILES)
    return (train_images, train_labels), (images, labels)


def _read_qmnist(name: str, data_dir: Path) -> tuple[_Part, _Part]:
    arrays = []
    for file in NAMED[name].files:
        content = gzip.decompress(_verified(name, file, data_dir))
        arrays.append(_idx(content, 0x0803 if "images" in file else 0x0C02, name, file))
    train_images, train_labels, images, labels = arrays
    # the other columns say who wrote the digit, and where it is in NIST's files
    return (train_images, train_labels[:, 0]), (images, labels[:, 0])


def _read_emnist(name: str, data_dir: Path) -> tuple[_Part, _Part]:
    split = name.removeprefix("EMNIST-")
    (file,) = NAMED[name].files

    def array(part: str, what: str, magic: int) -> np.ndarray:
        member = f"gzip/emnist-{split}-{part}-{what}-ubyte.gz"
        return _idx(gzip.decompress(archive.read(member)), magic, name, member)

    with zipfile.ZipFile(io.BytesIO(_verified(name, file, data_dir))) as archive:
        train, test = (
            # the files have each image with rows and columns exchanged
            (
                array(part, "images-idx3", 0x0803).transpose(0, 2, 1),
                # the labels of the letters count from 1
                array(part, "labels-idx1", 0x0801) - (split == "letters"),
            )
            for part in ("train", "test")
        )
    return train, test


def _read_cifar(name: str, data_dir: Path) -> tuple[_Part, _Part]:
    parts = []
    for file in NAMED[name].files:
        # to unpickle is to run what the file says: only these bytes, whose checksum is right
        batch = pickle.loads(_verified(name, file, data_dir), encoding="latin1")
        labels = batch["labels" if "labels" in batch else "fine_labels"]
        parts.append((batch["data"].reshape(-1, 3, 32, 32), np.array(labels)))
    *train, test = parts
    images, labels = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
    return (images, labels), test


def _read_svhn(name: str, data_dir: Path) -> tuple[_Part, _Part]:
    from scipy.io import loadmat

    def part(file: str) -> _Part:
        content = loadmat(io.BytesIO(_verified(name, file, data_dir)))
        # the file's label of the digit 0 is 10
        return content["X"].transpose(3, 2, 0, 1), content["y"].reshape(-1).astype(int) % 10

    train, test = map(part, NAMED[name].files)
    return train, test


_READERS: dict[str, Callable[[str, Path], tuple[_Part, _Part]]] = {
    "mnist": _read_mnist,
    "qmnist": _read_qmnist,
    "emnist": _read_emnist,
    "cifar": _read_cifar,
    "svhn": _read_svhn,
}
_REMEDY = "Delete it to download it again, or put a good copy there."


def _verified(name: str, file: str, data_dir: Path) -> bytes:
    """Reads a file of the set, after a check of its checksum."""
    path = data_dir / NAMED[name].folder / file
    if not path.is_file():
        raise ValueError(not_there(name, data_dir, f"no {file}"))
    content = path.read_bytes()
    if hashlib.md5(content).hexdigest() != _md5(name)[file]:
        raise ValueError(f"{path} is damaged: wrong checksum (MD5). {_REMEDY}")
    return content


def _read_idx(name: str, stem: str, data_dir: Path) -> np.ndarray:
    """Reads an IDX file as a uint8 array, after checks of magic number, length and checksum."""
    paths = _paths(name, stem, data_dir)
    path = next((file for file in paths if file.is_file()), None)
    if path is None:
        reason = f"no {' and no '.join(file.name for file in paths)}"
        raise ValueError(not_there(name, data_dir, reason))
    packed = path.suffix == ".gz"
    content = gzip.decompress(_verified(name, path.name, data_dir)) if packed else path.read_bytes()
    array = _idx(content, 0x0803 if "images" in stem else 0x0801, name, path)
    if not packed and hashlib.md5(content).hexdigest() != _MNIST_MD5[stem]:
        raise ValueError(f"{path} is damaged: wrong checksum (MD5). {_REMEDY}")
    return array


def _idx(content: bytes, magic: int, name: str, path: Path | str) -> np.ndarray:
    """The array in an IDX file, whose magic number gives the type and the number of dimensions."""
    found = int.from_bytes(content[:4], "big")
    if found != magic:
        raise ValueError(f"{path} is not an IDX file of {name}: magic number {found}. {_REMEDY}")
    kind = np.dtype({0x08: "u1", 0x0C: ">i4"}[magic >> 8])
    header = 4 + 4 * (magic & 0xFF)
    shape = np.frombuffer(content[4:header].ljust(header - 4, b"\0"), ">u4").astype(int)
    expected = header + math.prod(shape.tolist()) * kind.itemsize
    if len(content) != expected:
        raise ValueError(f"{path} has {len(content):,} bytes instead of {expected:,}. {_REMEDY}")
    array = np.frombuffer(content, kind, offset=header).reshape(shape)
    return array.astype(kind.newbyteorder("="))


def _md5(name: str) -> dict[str, str]:
    """torchvision's MD5 of each file of the set."""
    import torchvision.datasets

    named = NAMED[name]
    dataset = getattr(torchvision.datasets, named.dataset)
    if named.format == "qmnist":
        resources = dataset.resources["train"] + dataset.resources["test"]
        return {url.rsplit("/", 1)[-1]: md5 for url, md5 in resources}
    if named.format == "emnist":
        return {named.files[0]: dataset.md5}
    if named.format == "cifar":
        return dict(dataset.train_list + dataset.test_list)
    if named.format == "svhn":
        return {file: md5 for _, file, md5 in dataset.split_list.values()}
    return dict(dataset.resources)


def _paths(name: str, file: str, data_dir: Path) -> list[Path]:
    """Lists the paths where a file may be, in order of preference."""
    named = NAMED[name]
    path = data_dir / named.folder / file
    if named.format != "mnist":
        return [path]
    packed = path.with_name(f"{file}.gz")
    # only MNIST's uncompressed files have a published checksum
    return [path, packed] if name == "MNIST" else [packed]


def missing_files(name: str, data_dir: Path) -> list[str]:
    """Lists the files of the set that do not exist in any form that can be verified."""
    paths = [_paths(name, file, data_dir) for file in NAMED[name].files]
    return [first.name for first, *rest in paths if not any(p.is_file() for p in (first, *rest))]


def where_to_put(name: str, data_dir: Path) -> str:
    named = NAMED[name]
    if named.format == "mnist":
        files = f"the four files ({FILES[0]}{'[.gz]' if name == 'MNIST' else '.gz'} ...)"
    else:
        files = ", ".join(named.files)
    return (
        f"Put {files} into {data_dir / named.folder}, or point"
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
