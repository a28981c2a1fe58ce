"""Compares the data module with torchvision, which reads the same files, and scikit-learn."""

import contextlib
import gzip
import hashlib
import http.server
import os
import platform
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from lightning.pytorch import seed_everything
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.transforms import ToTensor
from torchvision.transforms import v2 as transforms

from mnist_lightning import MNISTDataModule
from mnist_lightning.data import download, readers
from mnist_lightning.data import module as data
from mnist_lightning.data.module import NORMALIZATIONS
from mnist_lightning.data.photos import read_image
from mnist_lightning.data.sampling import EpochSampler, ImageSet, epoch_order, split_indices

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
COUNTS = (60, 10)  # training and test images of the small sets that are made here


class Made:
    """A small data set in MNIST's format, whose checksums are patched into the code under test.

    Attributes:
        raw: the contents of the four files.
        packed: the same, as .gz.
        images: all images, the test images last.
        labels: the labels of the images.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str = "MNIST") -> None:
        generator = np.random.default_rng(len(name))
        self.name = name
        self.raw: dict[str, bytes] = {}
        images, labels = [], []
        for part, count in zip(("train", "t10k"), COUNTS, strict=True):
            images.append(generator.integers(0, 256, (count, 28, 28), np.uint8))
            labels.append(generator.integers(0, 10, count, np.uint8))
            self.raw[f"{part}-images-idx3-ubyte"] = (
                struct.pack(">4I", 0x803, count, 28, 28) + images[-1].tobytes()
            )
            self.raw[f"{part}-labels-idx1-ubyte"] = (
                struct.pack(">2I", 0x801, count) + labels[-1].tobytes()
            )
        self.packed = {file: gzip.compress(content) for file, content in self.raw.items()}
        self.images = torch.from_numpy(np.concatenate(images))
        self.labels = torch.from_numpy(np.concatenate(labels)).long()
        resources = [(f"{file}.gz", md5(self.packed[file])) for file in FILES]
        monkeypatch.setattr(getattr(torchvision.datasets, name), "resources", resources)
        if name == "MNIST":
            monkeypatch.setattr(readers, "_MNIST_MD5", {f: md5(c) for f, c in self.raw.items()})

    def write(self, data_dir: Path, packed: tuple[str, ...] = ()) -> Path:
        """Writes the files in torchvision's layout, those in ``packed`` as .gz."""
        folder = data_dir / self.name / "raw"
        folder.mkdir(parents=True)
        for file in FILES:
            if file in packed:
                (folder / f"{file}.gz").write_bytes(self.packed[file])
            else:
                (folder / file).write_bytes(self.raw[file])
        return folder

    def module(self, data_dir: Path, source: str = "mnist", **settings: object) -> MNISTDataModule:
        return MNISTDataModule(self.name, source, str(data_dir), **settings)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def ready(module: MNISTDataModule) -> MNISTDataModule:
    module.prepare_data()
    module.setup()
    return module


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    return Made(monkeypatch)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mirror can be reached, and requests to this machine use no proxy."""
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:1/"])
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:1/"])
    monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", ["http://127.0.0.1:1/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("MNIST_DATA_DIR", raising=False)


@pytest.fixture(scope="module")
def digits_module() -> MNISTDataModule:
    return ready(MNISTDataModule(source="digits", batch_size=16))


# ---- the images and their labels


def test_every_mnist_image_and_label_is_torchvisions(mnist_dir: Path) -> None:
    parts = [torchvision.datasets.MNIST(mnist_dir, train) for train in (True, False)]
    images = torch.cat([part.data for part in parts])
    labels = torch.cat([part.targets for part in parts])
    for split in ("study", "canonical"):
        module = MNISTDataModule(data_dir=str(mnist_dir), source="mnist", split=split)
        module.setup()
        sets = (module.train_set, module.val_set, module.test_set)
        for ours, indices in zip(sets, split_indices(70_000, 10_000, split, 0.2, 0), strict=True):
            assert torch.equal(ours.images, images[indices])
            assert torch.equal(ours.labels, labels[indices])
    assert torch.equal(module.test_set.images, parts[1].data)  # canonical: MNIST's own, in order
    sample = range(0, 10_000, 97)
    theirs = torch.stack([ToTensor()(parts[1][index][0]) for index in sample])
    assert torch.equal(module.preprocess(module.test_set.images[list(sample)]), theirs)


@pytest.mark.parametrize(
    "packed", [(), FILES, (TRAIN_IMAGES, TEST_LABELS)], ids=["raw", "gz", "mixed"]
)
def test_the_same_set_raw_and_packed(made: Made, tmp_path: Path, packed: tuple[str, ...]) -> None:
    made.write(tmp_path, packed)
    module = ready(made.module(tmp_path, split="canonical"))
    assert torch.equal(module.test_set.images, made.images[60:])
    assert torch.equal(module.test_set.labels, made.labels[60:])
    train, val, _ = split_indices(70, 10, "canonical", 0.2, 0)
    assert torch.equal(module.train_set.images, made.images[train])
    assert torch.equal(module.val_set.labels, made.labels[val])
    content = made.images.numpy().tobytes() + made.labels.numpy().tobytes()
    assert module.checksum == hashlib.sha256(content).hexdigest()


def test_the_raw_file_is_read_as_torchvision_reads_it(made: Made, tmp_path: Path) -> None:
    made.write(tmp_path)
    theirs = torchvision.datasets.MNIST(tmp_path, train=False)
    ours = ready(made.module(tmp_path, split="canonical")).test_set
    assert torch.equal(ours.images, theirs.data)
    assert torch.equal(ours.labels, theirs.targets)


@pytest.mark.parametrize("name", ["FashionMNIST", "KMNIST"])
def test_other_sets_of_the_format_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    made = Made(monkeypatch, name)
    made.write(tmp_path, packed=FILES)
    module = ready(made.module(tmp_path, split="canonical"))
    assert torch.equal(module.test_set.images, made.images[60:])
    assert name in module.describe()


def test_other_sets_count_only_what_can_be_verified(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only MNIST's uncompressed files have a published checksum."""
    made = Made(monkeypatch, "KMNIST")
    made.write(tmp_path)  # none as .gz
    with pytest.raises(ValueError, match=r"no train-images-idx3-ubyte\.gz"):
        made.module(tmp_path).prepare_data()
    with pytest.raises(ValueError, match=r"no train-images-idx3-ubyte\.gz"):
        made.module(tmp_path).setup()


def test_digits_are_scikit_learns(digits_module: MNISTDataModule) -> None:
    """The labels are equal; the images equal torchvision's resize of the originals."""
    bunch = load_digits()
    train, val, test = split_indices(1797, 1797 // 7, "study", 0.2, 0)
    sets = zip(
        (digits_module.train_set, digits_module.val_set, digits_module.test_set),
        (train, val, test),
        (1294, 323, 180),
        strict=True,
    )
    for part, indices, size in sets:
        assert len(part) == size
        assert part.images.dtype == torch.uint8
        assert part.images.shape == (size, 28, 28)
        assert part.labels.tolist() == bunch.target[indices].tolist()
        frame = part.images.clone()
        frame[:, 4:24, 4:24] = 0
        assert not frame.any(), "ink outside the central 20 x 20 pixels"
        originals = torch.tensor(bunch.images[indices]).float() * (255 / 16)
        theirs = transforms.functional.resize(originals, [20, 20])
        assert (part.images[:, 4:24, 4:24] - theirs).abs().max() <= 0.51
    assert digits_module.train_set.images.max() == 255


# ---- splits


@pytest.mark.parametrize(
    ("split", "sizes"),
    [("study", (50_400, 12_600, 7_000)), ("canonical", (48_000, 12_000, 10_000))],
)
def test_splits_are_disjoint_complete_and_of_the_right_sizes(
    split: str, sizes: tuple[int, int, int]
) -> None:
    parts = split_indices(70_000, 10_000, split, 0.2, split_seed=5)
    assert tuple(map(len, parts)) == sizes
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(70_000))


def test_the_canonical_test_images_are_the_sets_own() -> None:
    for seed in (0, 1):
        _, _, test = split_indices(70_000, 10_000, "canonical", 0.3, seed)
        assert torch.equal(test, torch.arange(60_000, 70_000))


@pytest.mark.parametrize("split", ["study", "canonical"])
def test_only_split_seed_moves_the_split(split: str) -> None:
    def parts(training_seed: int, split_seed: int = 0, **settings: object) -> list[Tensor]:
        seed_everything(training_seed, verbose=False)
        module = MNISTDataModule(source="digits", split=split, split_seed=split_seed, **settings)
        ready(module)
        return [module.train_set.images, module.val_set.images, module.test_set.images]

    reference = parts(1)
    for other in (parts(2), parts(1, batch_size=7, normalization="mnist", image_size=56)):
        assert all(map(torch.equal, reference, other))
    moved = parts(1, split_seed=1)
    assert not torch.equal(reference[0], moved[0])
    assert torch.equal(reference[2], moved[2]) == (split == "canonical")


@pytest.mark.slow
def test_the_split_and_the_order_are_the_same_in_another_process() -> None:
    def digest() -> str:
        parts = [*split_indices(70_000, 10_000, "study", 0.2, 3), epoch_order(50_400, 1, 2)]
        return hashlib.sha256(torch.cat(parts).numpy().tobytes()).hexdigest()

    program = (
        "import hashlib, torch; torch.manual_seed(9); torch.rand(5)\n"
        "from mnist_lightning.data import epoch_order, split_indices\n"
        "parts = [*split_indices(70_000, 10_000, 'study', 0.2, 3), epoch_order(50_400, 1, 2)]\n"
        "print(hashlib.sha256(torch.cat(parts).numpy().tobytes()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PL_GLOBAL_SEED": "4"}
    other = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert other.stdout.strip() == digest()


def test_a_share_of_the_training_images_changes_nothing_else(tmp_path: Path) -> None:
    """The same share of each class, and the smaller one is part of the larger one."""
    for label in range(2):
        (tmp_path / str(label)).mkdir()
        for number in range(20):
            shade = np.full((4, 4), 20 * label + number, np.uint8)
            Image.fromarray(shade).save(tmp_path / str(label) / f"{number}.png")
    for source in ({"source": "digits"}, {"source": "folder", "data_dir": str(tmp_path)}):
        whole, half, tenth = (
            MNISTDataModule(**source, **share)
            for share in ({}, {"train_fraction": 0.5}, {"train_fraction": 0.1})
        )
        for part in (whole, half, tenth):
            part.setup("fit")
            assert torch.equal(part.val_set.images, whole.val_set.images)
            assert torch.equal(part.test_set.images, whole.test_set.images)
            assert part.hparams.get("train_fraction", 1.0) == part.train_fraction
        counts = whole.train_set.labels.bincount()
        for part in (half, tenth):
            kept = part.train_set.labels.bincount()
            assert (kept - counts * part.train_fraction).abs().max() <= 0.5
        images = [{bytes(i.numpy()) for i in d.train_set.images} for d in (tenth, half, whole)]
        assert images[0] < images[1] < images[2]
        assert len(images[0]) == len(tenth.train_set)
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"train_fraction must lie between .* {fraction}"):
            MNISTDataModule(train_fraction=fraction)


@pytest.mark.parametrize(("fraction", "part"), [(0.0001, "validate"), (0.9999, "train")])
def test_a_split_that_leaves_a_part_empty_is_refused(fraction: float, part: str) -> None:
    with pytest.raises(ValueError, match=rf"val_fraction {fraction} .* none to {part} on"):
        MNISTDataModule(source="digits", val_fraction=fraction).setup()


# ---- the order of the images, and mini-batches


def test_epoch_order_is_a_permutation_of_its_own_for_each_seed_and_epoch() -> None:
    orders = [epoch_order(1000, seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    for order in orders:
        assert order.dtype == torch.int64
        assert torch.equal(order.sort().values, torch.arange(1000))
    assert len({tuple(order.tolist()) for order in orders}) == 9


def test_epoch_order_neither_reads_nor_moves_other_random_numbers() -> None:
    torch.manual_seed(1)
    random.seed(1)
    before, python_before = torch.get_rng_state(), random.getstate()
    order = epoch_order(500, 4, 7)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before
    torch.manual_seed(2)
    torch.rand(10)
    random.seed(2)
    assert torch.equal(epoch_order(500, 4, 7), order)


def test_mini_batches_are_consecutive_slices_of_the_epochs_order(
    digits_module: MNISTDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    train = digits_module.train_set
    loader = digits_module.train_dataloader()
    for epoch in (0, 1, 5):
        loader.sampler.set_epoch(epoch)
        slices = epoch_order(len(train), 11, epoch).split(16)
        assert len(slices[-1]) == 1294 % 16 != 0
        batches = list(loader)
        assert len(batches) == len(loader) == len(slices)
        for (images, labels), indices in zip(batches, slices, strict=True):
            assert images.dtype == torch.uint8
            assert labels.dtype == torch.int64
            assert torch.equal(images, train.images[indices])
            assert torch.equal(labels, train.labels[indices])


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_together_see_what_one_sees(processes: int) -> None:
    n, batch = 100, 4
    images = ImageSet(torch.zeros(n, 28, 28, dtype=torch.uint8), torch.arange(n))
    shares = []
    for rank in range(processes):
        sampler = EpochSampler(images, num_replicas=processes, rank=rank, seed=5)
        sampler.set_epoch(3)
        shares.append(torch.tensor(list(sampler)))
    assert len({len(share) for share in shares}) == 1, "they must all take as many steps"
    alone = epoch_order(n, 5, 3).split(batch * processes)
    for step, expected in enumerate(alone[:-1]):
        together = torch.cat([share[step * batch : (step + 1) * batch] for share in shares])
        assert torch.equal(together.sort().values, expected.sort().values)
    assert set(torch.cat(shares).tolist()) == set(range(n))


def test_validation_and_test_are_read_in_order_and_whole(digits_module: MNISTDataModule) -> None:
    for loader, part in (
        (digits_module.val_dataloader(), digits_module.val_set),
        (digits_module.test_dataloader(), digits_module.test_set),
    ):
        assert torch.equal(torch.cat([images for images, _ in loader]), part.images)
        assert torch.equal(torch.cat([labels for _, labels in loader]), part.labels)


def test_a_mini_batch_is_one_indexing_operation(
    digits_module: MNISTDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    whole = ImageSet.__getitems__

    def counted(self: ImageSet, indices: list[int]) -> tuple[Tensor, Tensor]:
        calls.append(len(indices))
        return whole(self, indices)

    monkeypatch.setattr(ImageSet, "__getitems__", counted)
    monkeypatch.setattr(ImageSet, "__getitem__", lambda *_: pytest.fail("image by image"))
    assert sum(len(labels) for _, labels in digits_module.train_dataloader()) == 1294
    assert calls == [16] * 80 + [14]


@pytest.mark.parametrize("size", [14, 56, 224])
def test_resize_is_torchvisions(digits_module: MNISTDataModule, size: int) -> None:
    module = MNISTDataModule(source="digits", image_size=size)
    images = digits_module.train_set.images[:8]
    ours = module.preprocess(images)
    theirs = transforms.functional.resize(images[:, None].float() / 255, [size, size])
    assert ours.shape == (8, 1, size, size)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("normalization", ["unit", "mnist", "imagenet"])
def test_normalisations_are_torchvisions_and_leave_the_images_alone(
    digits_module: MNISTDataModule, normalization: str
) -> None:
    module = MNISTDataModule(source="digits", normalization=normalization)
    images = digits_module.train_set.images[:8]
    before = images.clone()
    mean, std = NORMALIZATIONS[normalization]
    theirs = transforms.functional.normalize(images[:, None].float() / 255, [mean], [std])
    torch.testing.assert_close(module.preprocess(images), theirs, rtol=0, atol=1e-6)
    assert torch.equal(images, before)
    batch, labels = module.on_after_batch_transfer((images, torch.arange(8)), 0)
    assert torch.equal(batch, module.preprocess(images))
    assert labels.tolist() == list(range(8))
    assert module.hparams["normalization"] == normalization


def test_the_published_mean_and_deviation_are_those_of_the_training_images(mnist_dir: Path) -> None:
    module = MNISTDataModule(data_dir=str(mnist_dir), source="mnist", split="canonical")
    module.setup()
    pixels = torch.cat([module.train_set.images, module.val_set.images]).float() / 255
    assert NORMALIZATIONS["mnist"] == (
        round(float(pixels.mean()), 4),
        round(float(pixels.std()), 4),
    )


# ---- which source


def test_auto_takes_the_files_where_they_are(made: Made, tmp_path: Path) -> None:
    made.write(tmp_path)
    module = ready(made.module(tmp_path, source="auto"))
    assert module.hparams["source"] == module.source == "mnist"
    assert len(module.train_set) + len(module.val_set) + len(module.test_set) == sum(COUNTS)


def test_auto_falls_back_to_the_digits_with_a_warning_and_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = MNISTDataModule()
    module.prepare_data()
    with pytest.warns(UserWarning, match=r"MNIST is not in data.*1,797 small digits instead"):
        module.setup()
    assert module.hparams["source"] == module.source == "digits"
    assert "scikit-learn's digits" in module.describe()
    assert len(module.train_set) == 1294
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asked", ["name", "other name", "folder", "variable", "pictures"])
def test_what_was_asked_for_is_never_swapped(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No fallback to the digits, and no download into a folder of other images."""
    monkeypatch.chdir(tmp_path)
    arguments: dict[str, str] = {}
    if asked == "variable":
        monkeypatch.setenv("MNIST_DATA_DIR", "nowhere")
    elif asked == "pictures":
        (tmp_path / "photos" / "cats").mkdir(parents=True)
        (tmp_path / "photos" / "cats" / "tom.JPG").touch()
        monkeypatch.setattr(data, "download", lambda *_: pytest.fail("downloads"))
        arguments = {"data_dir": "photos"}
    else:
        known = {"name": {"name": "MNIST"}, "other name": {"name": "FashionMNIST"}}
        arguments = known.get(asked, {"data_dir": "nowhere"})
    module = MNISTDataModule(**arguments)
    assert module.hparams["source"] == "mnist"
    with pytest.raises(ValueError, match=r"MNIST is not in .*--data.data_dir at .* digits"):
        module.prepare_data()


def test_data_dir_is_the_flag_else_the_environment_else_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert MNISTDataModule().data_dir == Path("data")
    monkeypatch.setenv("MNIST_DATA_DIR", "elsewhere")
    assert MNISTDataModule().data_dir == Path("elsewhere")
    assert MNISTDataModule(data_dir="here").data_dir == Path("here")


@pytest.mark.parametrize("source", ["auto", "mnist"])
@pytest.mark.parametrize("missing", FILES)
def test_a_partly_present_set_is_an_error_and_no_fallback(
    made: Made, tmp_path: Path, source: str, missing: str
) -> None:
    folder = made.write(tmp_path)
    (folder / missing).unlink()
    module = made.module(tmp_path, source)
    with pytest.raises(ValueError, match=rf"no {missing}; .*--data\.source digits"):
        module.prepare_data()
    with pytest.raises(ValueError, match=rf"no {missing} .*--data\.source digits"):
        module.setup()
    assert files_below(folder) == set(FILES) - {missing}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "CIFAR"}, "name must be one of MNIST, .*, SVHN, got 'CIFAR'"),
        ({"source": "web"}, "source must be one of auto, mnist, digits, folder, got 'web'"),
        ({"split": "half"}, "split must be one of study, canonical, got 'half'"),
        ({"normalization": "zca"}, "normalization must be one of .*, got 'zca'"),
        ({"val_fraction": -0.1}, "val_fraction must lie between 0 and 1, got -0.1"),
        ({"val_fraction": 1.0}, "val_fraction must lie between 0 and 1, got 1.0"),
        ({"batch_size": 0}, "batch_size must be a whole number, at least 1, got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size must be a whole number, at least 1, got -1"),
        ({"image_size": 0}, "image_size must be a whole number, at least 1, got 0"),
    ],
)
def test_a_wrong_setting_is_named_with_the_rule_and_the_value(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MNISTDataModule(**settings)


# ---- damaged files

PACKED = tuple(f"{file}.gz" for file in FILES)
Damage = Callable[[bytes], bytes]


@pytest.mark.parametrize(
    ("file", "damage", "what"),
    [
        (TRAIN_IMAGES, lambda content: b"\0\0\x08\x01" + content[4:], "magic number 2049"),
        (TEST_LABELS, lambda content: b"PK\x03\x04" + content[4:], "magic number"),
        (TEST_IMAGES, lambda content: content[:-1], "7,855 bytes instead of 7,856"),
        (TRAIN_LABELS, lambda content: content + b"\0", "69 bytes instead of 68"),
        (TRAIN_IMAGES, lambda content: content[:9], "9 bytes instead of"),
        (TRAIN_IMAGES, lambda content: b"", "magic number 0"),
        (TRAIN_IMAGES, lambda content: content[:-1] + b"\x07", "wrong checksum"),
        (TEST_LABELS, lambda content: content[:-1] + b"\x0a", "wrong checksum"),
        (PACKED[0], lambda content: content[: len(content) // 2], "wrong checksum"),
        (PACKED[3], lambda content: content[:-1] + b"\x99", "wrong checksum"),
        (PACKED[1], lambda content: b"<html>not here</html>", "wrong checksum"),
    ],
    ids=[
        "magic of labels",
        "magic of a zip",
        "a byte short",
        "a byte long",
        "cut in the header",
        "empty",
        "another pixel",
        "another label",
        "gz truncated",
        "gz altered",
        "gz is a web page",
    ],
)
def test_a_damaged_file_is_named_with_the_remedy(
    made: Made, tmp_path: Path, file: str, damage: Damage, what: str
) -> None:
    folder = made.write(tmp_path, packed=FILES if file.endswith(".gz") else ())
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    for source in ("mnist", "auto"):
        with pytest.raises(ValueError, match=what) as error:
            ready(made.module(tmp_path, source))
        text = str(error.value)
        assert str(folder / file) in text
        assert "Delete it to download it again, or put a good copy there" in text
        assert "\n" not in text


def test_images_without_labels_are_refused(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = struct.pack(">2I", 0x801, 59) + made.raw[TRAIN_LABELS][8:-1]
    monkeypatch.setitem(readers._MNIST_MD5, TRAIN_LABELS, md5(content))
    (made.write(tmp_path) / TRAIN_LABELS).write_bytes(content)
    with pytest.raises(ValueError, match="60 train images, 59 labels"):
        made.module(tmp_path).setup()


# ---- the download, from a mirror on this machine

Answer = Callable[[http.server.BaseHTTPRequestHandler, int], None]


def send(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], str]]:
    """A function that starts a mirror, which answers request n by ``answer(handler, n)``."""
    servers = []

    def start(answer: Answer) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.server.requests += 1  # type: ignore[attr-defined]
                answer(self, self.server.requests)  # type: ignore[attr-defined]

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.requests = 0  # type: ignore[attr-defined]
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
        return url

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def serve(files: dict[str, bytes]) -> Answer:
    """Makes an answer that sends the requested file."""

    def answer(handler: http.server.BaseHTTPRequestHandler, number: int) -> None:
        content = files.get(handler.path.lstrip("/").removesuffix(".gz"))
        if content is None:
            handler.send_error(404)
        else:
            send(handler, content)

    return answer


def test_a_download_lands_complete_and_leaves_no_temporary_folder(
    made: Made, mirror: Callable[[Answer], str], tmp_path: Path
) -> None:
    mirror(serve(made.packed))
    data_dir = tmp_path / "new" / "data"
    module = ready(made.module(data_dir, "auto", split="canonical"))
    assert module.source == "mnist"
    assert torch.equal(module.test_set.images, made.images[60:])
    assert files_below(data_dir) == {f"MNIST/raw/{file}" for file in FILES + PACKED}
    assert [path.name for path in data_dir.iterdir()] == ["MNIST"]


def test_the_mirror_that_answers_is_taken(
    made: Made,
    mirror: Callable[[Answer], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = mirror(serve(made.packed))
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [closed_port(), good])
    assert len(ready(made.module(tmp_path)).train_set) == 50  # of 70: 7 test, 13 validate


def test_a_download_completes_a_partly_present_set(
    made: Made, mirror: Callable[[Answer], str], tmp_path: Path
) -> None:
    mirror(serve(made.packed))
    folder = made.write(tmp_path)
    (folder / TEST_LABELS).unlink()
    assert len(ready(made.module(tmp_path)).test_set) == 7
    assert set(FILES) <= files_below(folder)


def test_nothing_is_asked_of_a_mirror_where_the_files_are(
    made: Made, mirror: Callable[[Answer], str], tmp_path: Path
) -> None:
    mirror(lambda handler, number: pytest.fail("asked"))
    made.write(tmp_path)
    assert len(ready(made.module(tmp_path, "auto")).train_set) == 50


def closed_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{server.getsockname()[1]}/"


def assert_refused(made: Made, data_dir: Path, what: str, seconds: float = 5) -> None:
    """``mnist`` raises an error, ``auto`` falls back; both in time, and both leave no files."""
    began = time.monotonic()
    with pytest.raises(ValueError, match=what) as error:
        made.module(data_dir).prepare_data()
    text = str(error.value)
    assert f"into {data_dir}/MNIST/raw, or point MNIST_DATA_DIR or --data.data_dir at" in text
    assert "--data.source digits" in text
    assert "\n" not in text
    with contextlib.chdir(data_dir.parent), pytest.warns(match="small digits instead"):
        assert ready(MNISTDataModule()).source == "digits"
    assert time.monotonic() - began < seconds
    assert not data_dir.exists()
    assert socket.getdefaulttimeout() is None


def test_a_closed_port(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [closed_port()])
    assert_refused(made, tmp_path / "data", "no mirror could be reached .*refused")


def test_the_time_limits_keep_to_twenty_seconds_in_all() -> None:
    assert download._REACH_SECONDS + download._STALL_SECONDS <= 20


def test_a_mirror_that_never_answers(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_REACH_SECONDS", 0.2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
        assert_refused(made, tmp_path / "data", r"no mirror (answered within 0\.2 s|could be)")


def test_a_mirror_that_stalls_in_a_file(
    made: Made,
    mirror: Callable[[Answer], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(download, "_STALL_SECONDS", 0.2)
    done = threading.Event()

    def answer(handler: http.server.BaseHTTPRequestHandler, number: int) -> None:
        content = made.packed[handler.path.lstrip("/").removesuffix(".gz")]
        if "labels" in handler.path:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content[:10])
            handler.wfile.flush()
            done.wait(10)
        else:
            send(handler, content)

    url = mirror(answer)
    assert_refused(made, tmp_path / "data", f"the download from {url} failed: .*timed out")
    done.set()


@pytest.mark.parametrize(
    ("later", "what"),
    [
        (lambda handler: send(handler, b"<html>log in first</html>"), "failed: .*corrupted"),
        (lambda handler: send(handler, b""), "failed: .*corrupted"),
        (lambda handler: handler.send_error(404), "failed: .*404"),
        (lambda handler: handler.wfile.write(b"no HTTP at all\r\n\r\n"), "failed: no HTTP"),
        (lambda handler: None, "failed: .*closed connection"),
    ],
    ids=["a web page", "an empty file", "not found", "not HTTP", "hangs up"],
)
def test_a_mirror_that_serves_something_else(
    made: Made,
    mirror: Callable[[Answer], str],
    tmp_path: Path,
    later: Callable[[http.server.BaseHTTPRequestHandler], None],
    what: str,
) -> None:
    """The first file is good, so that it might be left behind; another one is bad."""

    def answer(handler: http.server.BaseHTTPRequestHandler, number: int) -> None:
        if TRAIN_IMAGES in handler.path:
            send(handler, made.packed[TRAIN_IMAGES])
        else:
            later(handler)

    mirror(answer)
    assert_refused(made, tmp_path / "data", what)


def test_a_failed_download_leaves_what_was_there(
    made: Made, mirror: Callable[[Answer], str], tmp_path: Path
) -> None:
    mirror(serve({TRAIN_IMAGES: made.packed[TRAIN_IMAGES]}))
    folder = made.write(tmp_path)
    (folder / TRAIN_IMAGES).unlink()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="404"):
        made.module(tmp_path).prepare_data()
    assert files_below(tmp_path) == {"notes.txt", *(f"MNIST/raw/{file}" for file in FILES[1:])}


def test_a_folder_that_cannot_be_made(
    made: Made, mirror: Callable[[Answer], str], tmp_path: Path
) -> None:
    mirror(serve(made.packed))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"Not a directory|File exists"):
        made.module(tmp_path / "file" / "data").prepare_data()


# ---- pictures of digits


def draw(image: Tensor, path: Path, dark: bool = True, contrast: float = 1, at: int = 30) -> Path:
    """Draws a 28 x 28 image, ten times enlarged, at a position on a sheet of paper."""
    sheet = torch.zeros(400, 500)
    sheet[at : at + 280, 2 * at : 2 * at + 280] = image.repeat_interleave(10, 0).repeat_interleave(
        10, 1
    )
    sheet = 128 + (sheet - 128) * contrast
    Image.fromarray((255 - sheet if dark else sheet).round().to(torch.uint8).numpy()).save(path)
    return path


@pytest.fixture(scope="module")
def three(digits_module: MNISTDataModule, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """A digit as ``read_image`` returns it: centred as in MNIST."""
    index = int((digits_module.train_set.labels == 3).nonzero()[0])
    path = tmp_path_factory.mktemp("three") / "three.png"
    return read_image(draw(digits_module.train_set.images[index], path)).float()


@pytest.mark.parametrize("at", [0, 30, 100])
def test_a_digit_enlarged_and_moved_comes_back(three: Tensor, tmp_path: Path, at: int) -> None:
    image = read_image(draw(three, tmp_path / "a.png", at=at))
    assert image.dtype == torch.uint8
    assert image.shape == (28, 28)
    assert (image.float() - three).abs().mean() < 3


@pytest.mark.parametrize("ending", ["png", "gif", "webp", "jpg"])
@pytest.mark.parametrize("contrast", [1, 0.4])
def test_ink_is_ink_whatever_the_paper_the_contrast_and_the_format(
    three: Tensor, tmp_path: Path, contrast: float, ending: str
) -> None:
    dark, light = (
        read_image(draw(three, tmp_path / f"{shade}.{ending}", shade, contrast)).float()
        for shade in (True, False)
    )
    assert (dark - light).abs().mean() < 1
    assert (dark - three).abs().mean() < 3
    assert dark.max() > 240
    assert (dark == 0).float().mean() > 0.4, "the paper must be black, not gray"


def test_a_digit_is_centred_and_twenty_pixels_large(three: Tensor, tmp_path: Path) -> None:
    """MNIST's centres of mass are within half a pixel of (14, 14); its boxes have 20 pixels."""
    image = read_image(draw(three, tmp_path / "a.png", at=90)).float()
    weight = image / image.sum()
    for axis in (0, 1):
        assert abs(float((weight.sum(axis) * torch.arange(28)).sum()) - 14) <= 0.51
    extent = max(int(image.any(axis).nonzero().flatten().diff().sum()) + 1 for axis in (0, 1))
    assert extent == 20


def test_mnists_own_digits_enlarged_come_back(mnist_dir: Path, tmp_path: Path) -> None:
    """The mean error is below 5 of 255 for most digits; a shift of one pixel would give 20."""
    module = MNISTDataModule(data_dir=str(mnist_dir), source="mnist", split="canonical")
    module.setup()
    errors = []
    for image in module.test_set.images[:40].float():
        back = read_image(draw(image, tmp_path / "a.png")).float()
        errors.append(float((back - image).abs().mean()))
    assert sum(error < 5 for error in errors) >= 36


def test_transparent_parts_are_paper(three: Tensor, tmp_path: Path) -> None:
    ink = Image.open(draw(three, tmp_path / "a.png", dark=False))
    drawing = Image.new("RGBA", ink.size, (0, 0, 0, 0))
    drawing.putalpha(ink)
    drawing.save(tmp_path / "b.png")
    assert (read_image(tmp_path / "b.png").float() - three).abs().mean() < 3


def test_sixteen_bits_and_colours_and_the_cameras_turn(three: Tensor, tmp_path: Path) -> None:
    plain = Image.open(draw(three, tmp_path / "a.png"))
    wide = Image.fromarray(np.asarray(plain).astype(np.uint16) * 257)
    wide.save(tmp_path / "wide.png")
    plain.convert("RGB").save(tmp_path / "rgb.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by 90 degrees
    plain.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    for name in ("wide", "rgb", "turned"):
        assert (read_image(tmp_path / f"{name}.png").float() - three).abs().mean() < 3, name


@pytest.mark.parametrize("shade", [0, 255, 90])
def test_a_blank_sheet_shows_nothing(tmp_path: Path, shade: int) -> None:
    noise = np.random.default_rng(0).integers(-3, 4, (60, 60))
    for sheet in (np.full((60, 60), shade), (shade + noise).clip(0, 255)):
        Image.fromarray(sheet.astype(np.uint8)).save(tmp_path / "blank.png")
        with pytest.raises(ValueError, match=r"blank\.png shows nothing"):
            read_image(tmp_path / "blank.png")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image: .*remove it"):
        read_image(tmp_path / "a.png")


def test_a_truncated_picture_is_refused(three: Tensor, tmp_path: Path) -> None:
    path = draw(three, tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read_image(path)


def test_a_folder_of_pictures_is_read_in_the_order_of_names(three: Tensor, tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "c.PNG"):
        draw(three, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    module = MNISTDataModule(source="digits", predict_dir=str(tmp_path))
    assert [path.name for path in module.predict_files()] == ["a.jpg", "b.png", "c.PNG"]
    ((images, labels),) = module.predict_dataloader()
    assert images.shape == (3, 28, 28)
    assert labels.tolist() == [-1, -1, -1]
    assert torch.equal(images[1], read_image(tmp_path / "b.png"))
    for empty in (tmp_path / "none", tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match=f"no image .* in predict_dir: {empty}"):
            MNISTDataModule(predict_dir=str(empty)).predict_files()


@pytest.mark.slow
def test_freed_memory_is_kept():
    """Counts the page faults of a buffer that is allocated repeatedly, in a separate process."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("needs glibc")
    code = """
import resource, torch
from mnist_lightning.execution import kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(64 * 2**18)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
with kept_memory():
    faults()  # the first one grows the heap
    kept = faults()
print(given_back, kept, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    given_back, kept, afterwards = map(int, done.stdout.split())
    assert min(given_back, afterwards) > 10 * kept
