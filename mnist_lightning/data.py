"""MNIST and the sets of the same format: found or fetched, verified, split, batched, resized.

The whole set lives in memory as uint8 tensors. A mini-batch is one indexing operation; scaling,
normalisation and the resize to 224 pixels happen per batch, on the device that trains.
"""

import contextlib
import gzip
import hashlib
import http.client
import math
import os
import queue
import socket
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.metadata import distribution
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

SetName = Literal["MNIST", "FashionMNIST", "KMNIST"]
Source = Literal["auto", "mnist", "digits"]
Split = Literal["study", "canonical"]
Normalization = Literal["unit", "mnist", "imagenet"]

# (mean, standard deviation) of pixels in [0, 1]. "imagenet" is the mean over ImageNet's three
# channels: a gray image repeated three times needs one scalar, the same for each channel.
NORMALIZATIONS: dict[str, tuple[float, float]] = {
    "unit": (0.0, 1.0),
    "mnist": (0.1307, 0.3081),
    "imagenet": (0.449, 0.226),
}

_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
# MD5 of the uncompressed files. Those of the .gz files come from torchvision, for every set.
_MNIST_MD5 = dict(
    zip(
        _FILES,
        (
            "6bbc9ace898e44ae57da46a324031adb",
            "a25bea736e30d166cdddb491f175f624",
            "2646ac647ad5339dbf082846283269ea",
            "27ae3e4e09519cfbb04c329615203637",
        ),
        strict=True,
    )
)
IMAGES = {".png", ".jpg", ".jpeg", ".gif", ".webp"}  # endings of the files that predict reads
_MOST_PIXELS = 50_000_000  # a photo: unpacked, each takes some 20 bytes
_REACH_SECONDS = 8  # for a mirror to answer at all
_STALL_SECONDS = 10  # without a single byte, once it has


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order in which epoch ``epoch`` of a training with ``seed`` visits ``n`` images.

    It depends on these three numbers alone: not on what else drew random numbers, nor on how often
    the training was interrupted, nor on the number of processes. Whoever trains on this order (the
    Trainer, or many models at once) sees the same mini-batches.

    Returns:
        A permutation of ``range(n)``, int64, shape ``(n,)``.
    """
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.randperm(n, generator=torch.Generator().manual_seed(int(state >> 1)))


class ImageSet(Dataset):
    """Images and labels in memory; a whole mini-batch is one indexing operation.

    Args:
        images: uint8, shape ``(n, 28, 28)``.
        labels: int64, shape ``(n,)``.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        # DataLoader's fetcher calls this with the indices of the whole mini-batch
        rows = torch.tensor(indices)
        # several times as fast as plain indexing, with the same result
        return self.images.index_select(0, rows), self.labels.index_select(0, rows)


class EpochSampler(DistributedSampler):
    """Visits the training set in ``epoch_order``, dealt out to the processes one by one.

    Being a ``DistributedSampler``, Lightning tells it the epoch and leaves it in place under DDP:
    n processes with mini-batches of b images then see, together, the very mini-batches that one
    process sees with n * b.
    """

    start = 0
    """How many of this process's images the next pass leaves out, having been trained on before."""

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(len(cast(ImageSet, self.dataset)), self.seed, self.epoch).tolist()
        order += order[: self.total_size - len(order)]  # all processes take as many steps
        start, self.start = self.start, 0
        return iter(order[self.rank :: self.num_replicas][start:])


def in_image_order(trainer: Trainer, loader: DataLoader, *columns: Tensor) -> tuple[Tensor, ...]:
    """Puts together the rows that all processes made of their shares of an evaluation.

    Every process must call it, and each gets the whole.

    Args:
        trainer: of the evaluation, which is over.
        loader: of this process.
        columns: a row for each image, in the loader's order; as many rows as images were scored.

    Returns:
        The indices of the images, ascending, int64; then the columns, in that order, on the CPU.
    """
    # for predictions Lightning wraps the batch sampler, and the loader's own sampler is another
    dealt = chain.from_iterable(cast(Any, loader.batch_sampler))
    indices = torch.tensor(list(islice(dealt, len(columns[0]))))
    shares: list[Any] = [(indices, *(column.cpu() for column in columns))]
    if trainer.world_size > 1:
        (share,), shares = shares, [None] * trainer.world_size
        torch.distributed.all_gather_object(shares, share)
    gathered = [torch.cat(parts) for parts in zip(*shares, strict=True)]
    order = gathered[0].argsort()
    return tuple(column[order] for column in gathered)


def as_is(batch: Any) -> Any:
    """Collates nothing: the data set gives whole mini-batches."""
    return batch


class MNISTDataModule(LightningDataModule):
    """The 70,000 digits, split into train, validation and test, in mini-batches.

    Args:
        name: which set of the MNIST format: MNIST, unless you say another.
        source: ``mnist`` takes the set named above, from ``data_dir`` or else from its mirrors;
            ``digits`` takes the 1,797 real 8x8 digits that scikit-learn carries, enlarged to 28x28;
            ``auto`` prefers the first and, where nothing was asked for (no name, no ``data_dir``,
            no ``MNIST_DATA_DIR``), falls back to the second, with a warning.
        data_dir: holds ``MNIST/raw/...`` in torchvision's layout, raw or .gz. Without it, the
            environment variable ``MNIST_DATA_DIR``, else ``data``.
        split: ``study`` pools all 70,000 images, shuffles them and gives 63,000 for training and
            validation and 7,000 for the test; ``canonical`` keeps MNIST's own 10,000 test images.
        val_fraction: share of the training pool that validates.
        split_seed: draws the split, and nothing else does.
        batch_size: images in a training mini-batch, in each process.
        eval_batch_size: images in a validation or test mini-batch; changes memory, not results.
        image_size: pixels a side that the model sees. Other than 28, each batch is resized
            (bilinear, antialiased where it shrinks) on the device.
        normalization: ``unit`` divides pixels by 255; ``mnist`` and ``imagenet`` then subtract
            that set's mean and divide by its standard deviation, one scalar for the gray channel.
        predict_dir: a folder of image files for ``predict``; without it, the validation images.
        steps_per_execution: mini-batches that a training takes at once and makes as many updates
            with. They are the same mini-batches and updates as one by one, without what the Trainer
            does between them. Unset, as many as are worth it; see ``execution``.

    A batch is ``(images, labels)``: from the loaders uint8 ``(b, 28, 28)`` and int64 ``(b,)``;
    after ``on_after_batch_transfer``, which the Trainer calls, the images are float32
    ``(b, 1, image_size, image_size)``.
    """

    name: SetName
    train_set: ImageSet
    val_set: ImageSet
    test_set: ImageSet
    checksum: str
    """SHA-256 over images and labels as read, whatever files they came from."""

    steps_known = True  # see execution.altered

    def __init__(
        self,
        name: SetName | None = None,
        source: Source = "auto",
        data_dir: str | None = None,
        split: Split = "study",
        val_fraction: float = 0.2,
        split_seed: int = 0,
        batch_size: int = 32,
        eval_batch_size: int = 1000,
        image_size: int = 28,
        normalization: Normalization = "unit",
        predict_dir: str | None = None,
        steps_per_execution: int | None = None,
    ) -> None:
        super().__init__()
        _check("val_fraction", val_fraction, 0 < val_fraction < 1, "must lie between 0 and 1")
        for key, count in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("image_size", image_size),
            ("steps_per_execution", 1 if steps_per_execution is None else steps_per_execution),
        ):
            _check(key, count, count >= 1, "must be at least 1")
        _check("image_size", image_size, image_size <= 1024, "must be at most 1024")
        for key, value, allowed in (
            ("name", name or "MNIST", SetName),
            ("source", source, Source),
            ("split", split, Split),
            ("normalization", normalization, Normalization),
        ):
            choices = allowed.__args__  # type: ignore[attr-defined]
            _check(key, value, value in choices, f"must be one of {', '.join(choices)}")
        folder = data_dir or os.environ.get("MNIST_DATA_DIR")
        if source == "auto" and (name or folder):
            source = "mnist"  # asked for: nothing else will do
        name = name or "MNIST"
        self.save_hyperparameters(ignore=["predict_dir", "steps_per_execution"])
        self.hparams.update(name=name, source=source)  # a subclass was perhaps given others
        self.name, self.source, self.split = name, source, split
        self.data_dir = Path(folder or "data")
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.image_size, self.normalization = image_size, normalization
        self.predict_dir = predict_dir
        self.steps_per_execution = steps_per_execution
        self._loaded = False
        self._no_download = "not tried"

    def prepare_data(self) -> None:
        """Fetches the files if they are not there yet; in one process only."""
        missing = _missing(self.name, self.data_dir)
        if self.source == "digits" or not missing:
            return
        if len(missing) == len(_FILES) and (pictures := _pictures(self.data_dir)):
            raise ValueError(
                _absent(self.name, self.data_dir, f"it holds other pictures ({pictures.name})")
            )
        try:
            _download(self.name, self.data_dir)
        except OSError as error:
            # a set that is there in part was meant to be used: no falling back to the digits
            if self.source == "mnist" or len(missing) < len(_FILES):
                reason = f"no {', no '.join(missing)}; {error}"
                raise ValueError(_absent(self.name, self.data_dir, reason)) from error
            self._no_download = str(error)

    def setup(self, stage: str | None = None) -> None:
        """Reads, verifies and splits the set; every process gets the same split."""
        if stage == "fit" and self.trainer is not None and (self.steps_per_execution or 1) > 1:
            callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
            if not any(hasattr(callback, "takes_executions") for callback in callbacks):
                module = type(self.trainer.lightning_module).__name__
                raise ValueError(
                    f"steps_per_execution {self.steps_per_execution} is not possible: {module} does"
                    " not bring the callback Execution. Leave it out, or set it to 1"
                )
        if self._loaded:
            return
        if self.source == "auto":
            gone = len(_missing(self.name, self.data_dir)) == len(_FILES)
            self.source = "digits" if gone else "mnist"
            if self.source == "digits":
                rank_zero_warn(
                    f"{self.name} is not in {self.data_dir}, nor was it fetched"
                    f" ({self._no_download}): training on scikit-learn's 1,797 small digits"
                    " instead. The results say"
                    f" nothing about {self.name}. {_where_to_put(self.name, self.data_dir)}"
                )
            # from here on the run is about this source: checkpoints must not say "auto"
            self.hparams["source"] = self.source
        pool = _read_digits() if self.source == "digits" else _read_files(self.name, self.data_dir)
        self.checksum = pool.checksum
        train, val, test = split_indices(
            len(pool.labels), pool.official_test, self.split, self.val_fraction, self.split_seed
        )
        for part, indices in (("train", train), ("validate", val), ("test", test)):
            if not len(indices):
                raise ValueError(
                    f"val_fraction {self.val_fraction} of {len(train) + len(val):,} images leaves"
                    f" none to {part} on; the study takes 0.2"
                )
        self.train_set = ImageSet(pool.images[train], pool.labels[train])
        self.val_set = ImageSet(pool.images[val], pool.labels[val])
        self.test_set = ImageSet(pool.images[test], pool.labels[test])
        self._loaded = True

    def describe(self) -> str:
        """One line: which data this is, after ``setup``."""
        name = self.name if self.source == "mnist" else "scikit-learn's digits"
        sizes = f"{len(self.train_set):,} / {len(self.val_set):,} / {len(self.test_set):,}"
        return f"{name}, split {self.split} (seed {self.split_seed}): {sizes} train / val / test"

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        sampler = EpochSampler(
            self.train_set,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            # set by seed_everything, for this process and those that it starts
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
        )
        return self._loader(self.train_set, self.batch_size, sampler)

    def val_dataloader(self) -> DataLoader:
        return self._eval_loader(self.val_set)

    def test_dataloader(self) -> DataLoader:
        return self._eval_loader(self.test_set)

    def predict_dataloader(self) -> DataLoader:
        if self.predict_dir is None:
            return self.val_dataloader()
        images = torch.stack([read_image(path) for path in self.predict_files()])
        unknown = torch.full((len(images),), -1)
        return self._eval_loader(ImageSet(images, unknown))

    def predict_files(self) -> list[Path]:
        """The image files of ``predict_dir``, sorted by name.

        Raises:
            ValueError: the folder is missing or holds no image.
        """
        folder = Path(self.predict_dir or "")
        files = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGES)
        if not files:
            raise ValueError(f"no image (.png, .jpg, .gif, .webp) in predict_dir: {folder}")
        return files

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        images, labels = batch
        pixels = self.preprocess(images)
        if self.trainer is not None:
            # "64-true" and "bf16-true" convert what they are given, but before this hook
            pixels = self.trainer.precision_plugin.convert_input(pixels)
        return pixels, labels

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 ``(b, 28, 28)`` -> normalised float32 ``(b, 1, image_size, image_size)``."""
        mean, std = NORMALIZATIONS[self.normalization]
        pixels = images.unsqueeze(1).float().div_(255)
        if (mean, std) != (0.0, 1.0):
            pixels.sub_(mean).div_(std)
        if self.image_size != images.shape[-1]:
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        return pixels

    def _eval_loader(self, data: ImageSet) -> DataLoader:
        """Each image once, in order. Of several processes, each gets its own share of them.

        Raises:
            ValueError: fewer images than processes.
        """
        trainer = self.trainer
        if trainer is None or trainer.world_size == 1:
            return self._loader(data, self.eval_batch_size)
        processes = trainer.world_size
        if len(data) < processes:
            # Lightning stops a process without a batch, and the others would wait for it
            raise ValueError(
                f"{processes} processes cannot share {len(data)} images:"
                f" --trainer.devices {len(data)} or fewer"
            )
        # Lightning leaves it in place, where its own for several processes would repeat images
        # until all processes had as many
        share = UnrepeatedDistributedSampler(
            data, num_replicas=processes, rank=trainer.global_rank, shuffle=False
        )
        return self._loader(data, self.eval_batch_size, share)

    @staticmethod
    def _loader(
        data: ImageSet, batch_size: int, sampler: DistributedSampler | None = None
    ) -> DataLoader:
        # no worker processes: indexing takes less time than handing the batch over would
        return DataLoader(data, batch_size=batch_size, sampler=sampler, collate_fn=as_is)


def split_indices(
    n: int, official_test: int, split: str, val_fraction: float, split_seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the train, validation and test images.

    Args:
        n: images in all; the last ``official_test`` of them are the set's own test images.
        split: ``study`` tests on a random tenth of all, ``canonical`` on the set's own.
        val_fraction: share of the others that validates.
        split_seed: seeds a private generator, so that no other randomness moves the split.

    Returns:
        Three int64 tensors, disjoint, which together hold ``range(n)``.
    """
    generator = torch.Generator().manual_seed(split_seed)
    if split == "study":
        shuffled = torch.randperm(n, generator=generator)
        test, pool = shuffled.tensor_split([round(n / 10)])
    else:
        test = torch.arange(n - official_test, n)
        pool = torch.randperm(n - official_test, generator=generator)
    val, train = pool.tensor_split([round(len(pool) * val_fraction)])
    return train, val, test


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


class _Pool(NamedTuple):
    """All images of a set, its own test images last."""

    images: Tensor
    labels: Tensor
    official_test: int
    checksum: str


def _pool(images: Tensor, labels: Tensor, official_test: int) -> _Pool:
    digest = hashlib.sha256(images.numpy().tobytes())
    digest.update(labels.numpy().tobytes())
    return _Pool(images, labels, official_test, digest.hexdigest())


def _read_digits() -> _Pool:
    """Scikit-learn's 8x8 digits, in MNIST's frame: 20 x 20 pixels of ink within 28 x 28."""
    # its file alone: importing scikit-learn takes as long as importing PyTorch
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = torch.from_numpy(np.loadtxt(str(file), delimiter=",", dtype=np.float32))
    small = table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)
    large = F.interpolate(small, size=(20, 20), mode="bilinear", antialias=True)
    images = F.pad(large, (4, 4, 4, 4)).round().to(torch.uint8).squeeze(1)
    labels = table[:, -1].long()
    # no official test set: the last seventh stands in for it, MNIST's own proportion
    return _pool(images, labels, official_test=len(labels) // 7)


def _read_files(name: str, data_dir: Path) -> _Pool:
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for file in _FILES:
        array = _read_idx(name, file, data_dir)
        (images if "images" in file else labels).append(torch.from_numpy(array))
    for part, kind in zip(images, ("train", "test"), strict=True):
        count = len(labels[0 if kind == "train" else 1])
        if len(part) != count:
            raise ValueError(f"{name} in {data_dir}: {len(part)} {kind} images, {count} labels")
    return _pool(torch.cat(images), torch.cat(labels).long(), official_test=len(labels[1]))


def _read_idx(name: str, stem: str, data_dir: Path) -> np.ndarray:
    """One file of the IDX format as a uint8 array, after checking magic, length and checksum."""
    paths = _paths(name, stem, data_dir)
    path = next((file for file in paths if file.is_file()), None)
    if path is None:
        reason = f"no {' and no '.join(file.name for file in paths)}"
        raise ValueError(_absent(name, data_dir, reason))
    remedy = "Delete it to have it fetched again, or put a good copy there."
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
    """Where a file may lie, the preferred place first."""
    packed = data_dir / name / "raw" / f"{file}.gz"
    # only MNIST's uncompressed files have a published checksum
    return [packed.with_suffix(""), packed] if name == "MNIST" else [packed]


def _missing(name: str, data_dir: Path) -> list[str]:
    """The files of the set that are there in no form that can be verified."""
    return [
        file if name == "MNIST" else f"{file}.gz"
        for file in _FILES
        if not any(path.is_file() for path in _paths(name, file, data_dir))
    ]


def _where_to_put(name: str, data_dir: Path) -> str:
    ending = "[.gz]" if name == "MNIST" else ".gz"
    return (
        f"Put the four files ({_FILES[0]}{ending} ...) into {data_dir / name / 'raw'}, or point"
        " MNIST_DATA_DIR or --data.data_dir at the folder that holds them."
    )


def _pictures(folder: Path) -> Path | None:
    """The first image file in a folder or in one of its own folders, if any: not for a download."""
    files = chain(folder.glob("*"), folder.glob("*/*"))
    return next((file for file in files if file.suffix.lower() in IMAGES), None)


def _absent(name: str, data_dir: Path, reason: str) -> str:
    return (
        f"{name} is not in {data_dir}: {reason}. {_where_to_put(name, data_dir)}"
        " Or train on scikit-learn's small digits: --data.source digits."
    )


def _download(name: str, data_dir: Path) -> None:
    """Fetches a set through torchvision, from the first of its mirrors that answers.

    Raises:
        OSError: no mirror answers, or one stalls; nothing is left behind.
    """
    import torchvision.datasets

    known = getattr(torchvision.datasets, name)
    made = not data_dir.exists()
    with answering(known.mirrors, known.resources[0][0]) as mirror:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as folder:
                # a class of the same name, because torchvision names its folder after it
                type(name, (known,), {"mirrors": [mirror]})(folder, download=True)
                target = data_dir / name / "raw"
                target.mkdir(parents=True, exist_ok=True)
                for file in (Path(folder) / name / "raw").iterdir():
                    os.replace(file, target / file.name)
        except (RuntimeError, http.client.HTTPException, OSError) as error:
            # RuntimeError is torchvision's word for a failed or damaged download
            if made:
                with contextlib.suppress(OSError):
                    data_dir.rmdir()
            reason = " ".join(str(error).split())
            raise OSError(f"the download from {mirror} failed: {reason}") from error


@contextlib.contextmanager
def answering(mirrors: Sequence[str], file: str) -> Iterator[str]:
    """The first mirror that answers for the file; within, a download that stalls is given up.

    Raises:
        OSError: none answers within ``_REACH_SECONDS``.
    """
    mirror = _first_to_answer(mirrors, file)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALL_SECONDS)
    try:
        yield mirror
    finally:
        socket.setdefaulttimeout(timeout)


def _first_to_answer(mirrors: Sequence[str], file: str) -> str:
    """Asks all mirrors at once; waits at most ``_REACH_SECONDS``, even for a silent name server."""
    answers: queue.Queue[str | Exception] = queue.Queue()

    def ask(mirror: str) -> None:
        try:
            urllib.request.urlopen(mirror + file, timeout=_REACH_SECONDS).close()
            answers.put(mirror)
        except Exception as error:
            answers.put(error)

    for mirror in mirrors:
        # a daemon: a thread stuck in name resolution must not keep the program from ending
        threading.Thread(target=ask, args=(mirror,), daemon=True).start()
    reason = f"no mirror answered within {_REACH_SECONDS} s"
    deadline = time.monotonic() + _REACH_SECONDS
    for _ in mirrors:
        try:
            answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if isinstance(answer, str):
            return answer
        reason = f"no mirror could be reached ({answer})"
    raise OSError(reason)


def _check(name: str, value: object, holds: bool, law: str) -> None:
    if not holds:
        raise ValueError(f"{name} {law}, got {value!r}")
