"""Compares the data sets by name with torchvision's own classes, which read the same files."""

import gzip
import hashlib
import http.server
import io
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torchvision.datasets as theirs
from scipy.io import savemat
from torch import Tensor

from mnist_lightning import MNISTDataModule
from mnist_lightning.data.named import NAMED, SetName
from mnist_lightning.data.readers import missing_files, read_files

GENERATOR = np.random.default_rng(0)
TRAIN, TEST = 30, 10
EMNIST = [name for name in NAMED if name.startswith("EMNIST")]
NEW = [name for name in NAMED if NAMED[name].format != "mnist"]
Files = dict[str, bytes]


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def pixels(*shape: int) -> np.ndarray:
    return GENERATOR.integers(0, 256, shape, np.uint8)


def idx(array: np.ndarray) -> bytes:
    kind = 0x08 if array.dtype == np.uint8 else 0x0C
    head = struct.pack(f">{1 + array.ndim}I", kind * 256 + array.ndim, *array.shape)
    return gzip.compress(head + array.astype(array.dtype.newbyteorder(">")).tobytes())


def make_emnist(name: str, monkeypatch: pytest.MonkeyPatch) -> Files:
    split = name.removeprefix("EMNIST-")
    first = int(split == "letters")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for part, n in (("train", TRAIN), ("test", TEST)):
            labels = GENERATOR.integers(first, first + len(NAMED[name].classes), n, np.uint8)
            stem = f"gzip/emnist-{split}-{part}"
            archive.writestr(f"{stem}-images-idx3-ubyte.gz", idx(pixels(n, 28, 28)))
            archive.writestr(f"{stem}-labels-idx1-ubyte.gz", idx(labels))
    monkeypatch.setattr(theirs.EMNIST, "md5", md5(buffer.getvalue()))
    return {"EMNIST/raw/gzip.zip": buffer.getvalue()}


def make_qmnist(monkeypatch: pytest.MonkeyPatch) -> Files:
    files: Files = {}
    resources = {}
    for part, n in (("train", TRAIN), ("test", TEST)):
        labels = GENERATOR.integers(0, 100_000, (n, 8), np.int32)
        labels[:, 0] %= 10
        resources[part] = []
        for (url, _), array in zip(
            theirs.QMNIST.resources[part], (pixels(n, 28, 28), labels), strict=True
        ):
            content = idx(array)
            files[f"QMNIST/raw/{url.rsplit('/')[-1]}"] = content
            resources[part].append((url, md5(content)))
    monkeypatch.setattr(theirs.QMNIST, "resources", resources)
    return files


def make_cifar(name: str, monkeypatch: pytest.MonkeyPatch) -> Files:
    dataset = getattr(theirs, name)
    key = "labels" if name == "CIFAR10" else "fine_labels"
    files: Files = {}
    for attribute, n in (("train_list", TRAIN), ("test_list", TEST)):
        listed = []
        for file, _ in getattr(dataset, attribute):
            labels = GENERATOR.integers(0, len(NAMED[name].classes), n).tolist()
            content = pickle.dumps({"data": pixels(n, 3072), key: labels})
            listed.append([file, md5(content)])
            files[f"{dataset.base_folder}/{file}"] = content
        monkeypatch.setattr(dataset, attribute, listed)
    meta = pickle.dumps({dataset.meta["key"]: list(NAMED[name].classes)})
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": md5(meta)})
    files[f"{dataset.base_folder}/{dataset.meta['filename']}"] = meta
    return files


def make_svhn(monkeypatch: pytest.MonkeyPatch) -> Files:
    files: Files = {}
    listed = dict(theirs.SVHN.split_list)
    for part, n in (("train", TRAIN), ("test", TEST)):
        buffer = io.BytesIO()
        labels = GENERATOR.integers(1, 11, (n, 1)).astype(np.uint8)
        savemat(buffer, {"X": pixels(32, 32, 3, n), "y": labels})
        url, file, _ = listed[part]
        listed[part] = [url, file, md5(buffer.getvalue())]
        files[file] = buffer.getvalue()
    monkeypatch.setattr(theirs.SVHN, "split_list", listed)
    return files


def make(name: str, monkeypatch: pytest.MonkeyPatch) -> Files:
    """The files of a small set, by path, whose checksums are patched into torchvision."""
    if name in EMNIST:
        return make_emnist(name, monkeypatch)
    if name == "QMNIST":
        return make_qmnist(monkeypatch)
    return make_svhn(monkeypatch) if name == "SVHN" else make_cifar(name, monkeypatch)


def write(files: Files, folder: Path) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def by_torchvision(name: str, folder: Path) -> tuple[Tensor, Tensor, list[str] | None]:
    """Images and labels, training first, and the names of the classes."""
    if name in EMNIST:
        split = name.removeprefix("EMNIST-")
        raw = folder / "EMNIST" / "raw"
        with zipfile.ZipFile(raw / "gzip.zip") as archive:  # as its download unpacks it
            for member in archive.namelist():
                unpacked = gzip.decompress(archive.read(member))
                (raw / Path(member).stem).write_bytes(unpacked)
        parts = [theirs.EMNIST(folder, split, train=train) for train in (True, False)]
        images = torch.cat([part.data for part in parts]).transpose(1, 2)
        return images, torch.cat([part.targets for part in parts]), parts[0].classes
    if name == "QMNIST":
        for file in (folder / "QMNIST" / "raw").glob("*.gz"):
            file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        parts = [theirs.QMNIST(folder, train=train) for train in (True, False)]
        targets = [target for part in parts for _, target in part]
        return torch.cat([part.data for part in parts]), torch.tensor(targets), None
    if name == "SVHN":
        parts = [theirs.SVHN(folder, part) for part in ("train", "test")]
        images = torch.cat([torch.from_numpy(part.data) for part in parts])
        return images, torch.cat([torch.from_numpy(part.labels) for part in parts]), None
    parts = [getattr(theirs, name)(folder, train) for train in (True, False)]
    images = torch.cat([torch.from_numpy(part.data) for part in parts]).permute(0, 3, 1, 2)
    labels = torch.cat([torch.tensor(part.targets) for part in parts])
    return images, labels, parts[0].classes


@pytest.mark.parametrize("name", NEW)
def test_a_set_by_name_is_torchvisions(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(make(name, monkeypatch), tmp_path)
    pool = read_files(name, tmp_path)
    images, labels, classes = by_torchvision(name, tmp_path)
    letters = int(name == "EMNIST-letters")  # theirs has a class without images at 0
    assert torch.equal(pool.images, images)
    assert torch.equal(pool.labels, labels - letters)
    assert pool.images.dtype == torch.uint8
    assert pool.images.is_contiguous()
    assert pool.official_test == TEST
    if classes:
        assert list(NAMED[name].classes) == classes[letters:]
    assert int(pool.labels.max()) < len(NAMED[name].classes)


@pytest.mark.parametrize("name", ["EMNIST-balanced", "CIFAR10"])
def test_the_module_gives_the_network_the_sets_shape(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(make(name, monkeypatch), tmp_path)
    module = MNISTDataModule(name, data_dir=str(tmp_path), split="canonical")
    spec = module.spec  # before a file is read
    assert spec.shape == ((3, 32, 32) if name == "CIFAR10" else (1, 28, 28))
    assert spec.classes == NAMED[name].classes
    assert spec.drawn == (name != "CIFAR10")
    module.prepare_data()
    module.setup()
    assert len(module.test_set) == TEST
    images, _ = next(iter(module.test_dataloader()))
    assert module.preprocess(images).shape[1:] == spec.shape


def test_the_table_and_the_names_agree() -> None:
    assert get_args(SetName) == tuple(NAMED)
    assert list(NAMED["FashionMNIST"].classes) == theirs.FashionMNIST.classes
    assert list(NAMED["KMNIST"].classes) == theirs.KMNIST.classes
    assert NAMED["MNIST"].classes == tuple("0123456789")
    assert len(NAMED["CIFAR100"].classes) == 100 == len(set(NAMED["CIFAR100"].classes))
    assert NAMED["CIFAR100"].classes == tuple(sorted(NAMED["CIFAR100"].classes))


def test_the_classes_need_neither_torch_nor_torchvision() -> None:
    program = (
        "import sys; from mnist_lightning.data.named import NAMED; NAMED['CIFAR10'].classes;"
        " assert not {'torch', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_a_pickle_with_another_checksum_is_not_unpickled(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = pickle.dumps(Hostile(tmp_path / "hostile"))
    for file in NAMED[name].files:
        write(make(name, monkeypatch), tmp_path)
        damaged = tmp_path / NAMED[name].folder / file
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match="wrong checksum") as error:
            read_files(name, tmp_path)
        assert str(damaged) in str(error.value)
        assert not (tmp_path / "hostile").exists()
    pickle.loads(content)
    assert (tmp_path / "hostile").exists(), "the pickle is hostile indeed"


@pytest.mark.parametrize("name", ["EMNIST-letters", "QMNIST", "CIFAR100", "SVHN"])
def test_a_damaged_or_missing_file_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = make(name, monkeypatch)
    for file in NAMED[name].files:
        write(files, tmp_path)
        path = tmp_path / NAMED[name].folder / file
        path.write_bytes(path.read_bytes()[:-1] + b"\7")
        with pytest.raises(ValueError, match="wrong checksum"):
            read_files(name, tmp_path)
        path.unlink()
        assert missing_files(name, tmp_path) == [file]
        with pytest.raises(ValueError, match=f"no {file}. Put ") as error:
            read_files(name, tmp_path)
        assert f"{', '.join(NAMED[name].files)} into {path.parent}, or" in str(error.value)


# ---- the download, from a mirror on this machine


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Files]]:
    """The address of a mirror, and the files that it has."""
    files: Files = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path.lstrip("/"))
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", files
        server.shutdown()


@pytest.mark.parametrize("name", ["EMNIST-letters", "QMNIST", "CIFAR10", "SVHN"])
def test_a_download_puts_the_files_in_place(
    name: str, served: tuple[str, Files], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address, on_mirror = served
    files = make(name, monkeypatch)
    flat = {Path(path).name: content for path, content in files.items()}
    if name == "CIFAR10":
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for path, content in files.items():
                entry = tarfile.TarInfo(path)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        flat = {"cifar.tar.gz": buffer.getvalue()}
        monkeypatch.setattr(theirs.CIFAR10, "url", f"{address}cifar.tar.gz")
        monkeypatch.setattr(theirs.CIFAR10, "tgz_md5", md5(buffer.getvalue()))
    elif name == "SVHN":
        listed = {k: [address + v[1], *v[1:]] for k, v in theirs.SVHN.split_list.items()}
        monkeypatch.setattr(theirs.SVHN, "split_list", listed)
    elif name == "QMNIST":
        listed = {
            part: [(address + url.rsplit("/")[-1], check) for url, check in parts]
            for part, parts in theirs.QMNIST.resources.items()
        }
        monkeypatch.setattr(theirs.QMNIST, "resources", listed)
    else:
        monkeypatch.setattr(theirs.EMNIST, "url", f"{address}gzip.zip")
    data_dir = tmp_path / "new"
    module = MNISTDataModule(name, data_dir=str(data_dir), split="canonical")
    with pytest.raises(ValueError, match=r"Put .* into .*new"):  # the mirror has no file yet
        module.prepare_data()
    assert not data_dir.exists()
    on_mirror.update({file: content[:-1] for file, content in flat.items()})
    with pytest.raises(ValueError, match=r"the download from .* failed"):
        module.prepare_data()
    assert not data_dir.exists()
    on_mirror.update(flat)
    module.prepare_data()
    module.setup()
    assert len(module.test_set) == TEST
    assert {str(p.relative_to(data_dir)) for p in data_dir.rglob("*") if p.is_file()} == set(files)
