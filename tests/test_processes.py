"""Several processes share an evaluation: each image counts once, the results equal one process."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from mnist_lightning import MNISTDataModule
from mnist_lightning.__main__ import main

LOADERS = {"val_dataloader": "val_set", "test_dataloader": "test_set"}


def _module(processes: int, rank: int, **settings: object) -> MNISTDataModule:
    """Makes the data module as the process ``rank`` of several has it."""
    data = MNISTDataModule(source="digits", eval_batch_size=50, **settings)
    data.setup()
    data.trainer = SimpleNamespace(world_size=processes, global_rank=rank)
    return data


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("loader", LOADERS)
def test_each_image_goes_to_one_process(processes: int, loader: str) -> None:
    shares = []
    for rank in range(processes):
        data = _module(processes, rank)
        shares.append(torch.cat([images for images, _ in getattr(data, loader)()]))
    whole = getattr(data, LOADERS[loader]).images
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    dealt = sorted(image.numpy().tobytes() for image in torch.cat(shares))
    assert dealt == sorted(image.numpy().tobytes() for image in whole)


def _photos(folder: Path, count: int) -> Path:
    """Writes digits as files, named after their labels but not in the order of the labels."""
    folder.mkdir()
    digits = load_digits()
    for index in range(count):
        paper = (255 - digits.images[index] * 15).astype(np.uint8)
        name = f"{(3 * index) % count}_is_{digits.target[index]}.png"
        Image.fromarray(paper).resize((64, 64)).save(folder / name)
    return folder


def test_fewer_images_than_processes_are_refused(tmp_path: Path) -> None:
    """Every process raises the error, so that none waits for another."""
    photos = _photos(tmp_path / "photos", 5)
    for rank in range(7):
        data = _module(7, rank, predict_dir=str(photos))
        with pytest.raises(ValueError, match=r"7 processes cannot share 5 images: .*devices 5"):
            data.predict_dataloader()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose 308 validation and 256 test images cannot be divided by 3."""
    root = tmp_path_factory.mktemp("run")
    words = "fit --config shallow --data.source digits --data.split canonical --data.batch_size 16"
    words += f" --trainer.max_epochs 2 --trainer.accelerator cpu --trainer.default_root_dir {root}"
    assert main(words.split()) == 0
    return root / "lightning_logs" / "shallow" / "version_0"


def _shared(processes: int, *words: object) -> str:
    """Runs a command in several processes, checks for warnings, and returns its output."""
    command = [*map(str, words), "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"]
    done = subprocess.run(
        [sys.executable, "-m", "mnist_lightning", *command, "--trainer.devices", str(processes)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    return done.stdout


def _answers(run: Path) -> list[tuple[str, ...]]:
    with (run / "predictions.csv").open(newline="") as file:
        return [tuple(row) for row in csv.reader(file)]


@pytest.mark.slow
def test_two_processes_give_each_image_its_own_answer(run: Path, tmp_path: Path) -> None:
    photos = _photos(tmp_path / "photos", 5)
    words = ("predict", "--ckpt_path", run, "--data.predict_dir", photos)
    assert main([str(word) for word in words]) == 0
    alone = _answers(run)
    assert [row[0] for row in alone[1:]] == sorted(file.name for file in photos.iterdir())
    assert len({row[1:] for row in alone[1:]}) == 5, "the test needs answers that can be told apart"
    _shared(2, *words)
    assert _answers(run) == alone


@pytest.mark.slow
def test_three_processes_predict_as_one(run: Path) -> None:
    """First all validation images; then a limited part, which differs from that of one process."""
    words = ("predict", "--ckpt_path", run)
    assert main([str(word) for word in words]) == 0
    alone = _answers(run)
    _shared(3, *words)
    assert _answers(run) == alone
    _shared(3, *words, "--data.eval_batch_size", 7, "--trainer.limit_predict_batches", 2)
    assert _answers(run) == alone[: 1 + 3 * 7 * 2]


@pytest.mark.slow
def test_three_processes_validate_and_test_as_one(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", "--ckpt_path", str(run)]) == 0
    alone = capsys.readouterr().out
    assert _shared(3, "validate", "--ckpt_path", run) == alone
    assert main(["test", "--ckpt_path", str(run)]) == 0
    _shared(3, "test", "--ckpt_path", run)
    part = ("--data.eval_batch_size", 20, "--trainer.limit_test_batches", 2)
    _shared(3, "test", "--ckpt_path", run, *part)
    one, three, limited = json.loads((run / "test.json").read_text())
    assert three["images"] == one["images"] == 256
    assert three["test/acc"] == one["test/acc"]
    assert three["test/loss"] == pytest.approx(one["test/loss"], rel=1e-6)
    assert three["confusion"] == one["confusion"]
    assert three["mistakes"] == one["mistakes"]
    # the first 120 images, shared by three processes
    assert (limited["images"], limited["test_set"]) == (120, 256)
    assert sum(map(sum, limited["confusion"])) == 120
    assert [m for m in one["mistakes"] if m["image"] < 120] == limited["mistakes"]
