"""``val_fraction 0``: training and validation images together, and no validation."""

import csv
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import same_weights, trainer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from mnist_lightning import ConvNetwork, Execution, LayerFreezing, MNISTDataModule, ShallowNetwork
from mnist_lightning.__main__ import main
from mnist_lightning.data import readers
from mnist_lightning.data.sampling import ImageSet, epoch_order, split_indices
from mnist_lightning.deploy import export
from mnist_lightning.deploy.trained import Trained
from mnist_lightning.runs import checkpoints

Printed = pytest.CaptureFixture[str]

FIT = "fit --config shallow --data.source digits --data.val_fraction 0 --model.hidden_units 8"
SEEDED = [*FIT.split(), "--data.batch_size", "64", "--seed_everything", "3"]
RUN = Path("lightning_logs/shallow/version_0")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MNIST_DATA_DIR", raising=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with one run of two epochs."""
    folder = tmp_path_factory.mktemp("all")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*SEEDED, "--trainer.max_epochs", "2"]) == 0
    return folder


def _pictures(folder: Path) -> None:
    for value, name in enumerate(("dark", "light")):
        for n in range(8):
            file = folder / name / f"{n}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((9, 9), 100 * value + n, np.uint8)).save(file)


def _content(part: ImageSet) -> list[tuple[bytes, int]]:
    images = (image.numpy().tobytes() for image in part.images)
    return sorted(zip(images, part.labels.tolist(), strict=True))


@pytest.mark.parametrize("kind", ["digits", "folder", "parts", "parts without test"])
def test_it_trains_on_both_and_tests_on_the_same(kind: str, tmp_path: Path) -> None:
    settings = {"source": "digits"}
    if kind != "digits":
        settings = {"source": "folder", "data_dir": str(tmp_path / "photos")}
        parts = {"parts": ("train", "val", "test"), "parts without test": ("train", "val")}
        for part in parts.get(kind, ("",)):
            _pictures(tmp_path / "photos" / part)
    usual, whole = (MNISTDataModule(**settings, val_fraction=share) for share in (0.25, 0))
    for data in (usual, whole):
        data.setup("fit")
    assert _content(whole.train_set) == sorted(_content(usual.train_set) + _content(usual.val_set))
    assert _content(whole.test_set) == _content(usual.test_set)
    assert (len(whole.val_set), whole.val_dataloader()) == (0, [])


@pytest.mark.parametrize("split", ["study", "canonical"])
def test_the_indices_of_a_named_set(split: str) -> None:
    train, val, test = split_indices(700, 100, split, 0.2, 1)
    whole, none, same = split_indices(700, 100, split, 0.0, 1)
    assert not len(none)
    assert torch.equal(test, same)
    assert set(whole.tolist()) == set(torch.cat([train, val]).tolist())


def test_a_named_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = readers.read_digits()
    monkeypatch.setattr("mnist_lightning.data.module.read_files", lambda name, folder: pool)
    data = MNISTDataModule("FashionMNIST", data_dir=str(tmp_path), val_fraction=0)
    data.setup("fit")
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [1617, 0, 180]


# ---- the training


class Order(Sampler):
    """The documented order of the images, written down again."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, 0

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.count, 0, self.epoch).tolist())


class Plain(pl.LightningModule):
    """A classifier as in Lightning's documentation, without a validation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_weights_are_plain_lightnings_to_the_bit() -> None:
    numbers, _, _ = split_indices(1797, 256, "study", 0.0, 0)
    pool = readers.read_digits()
    images, labels = pool.images[numbers][:, None].float() / 255, pool.labels[numbers]
    plain, ours = Plain(), ShallowNetwork(8)
    ours.net.load_state_dict(
        dict(zip(ours.net.state_dict(), plain.net.state_dict().values(), strict=True))
    )
    loader = DataLoader(TensorDataset(images, labels), 64, sampler=Order(len(labels)))
    trainer(max_epochs=2).fit(plain, loader)
    data = MNISTDataModule(source="digits", val_fraction=0, batch_size=64)
    trainer(max_epochs=2, callbacks=[Execution(fused=False)]).fit(ours, data)
    assert all(map(torch.equal, plain.parameters(), ours.parameters()))
    trainer().fit(ShallowNetwork(8), data)  # fused steps need no validation either


def test_frozen_layers_are_computed_once(capsys: pytest.CaptureFixture) -> None:
    models = []
    for cache in (True, False):
        pl.seed_everything(0, verbose=False)
        model = ConvNetwork([4, 4], convolutions=1)
        freezing = LayerFreezing(freeze=["net.stage1.*"], cache=cache)
        data = MNISTDataModule(source="digits", val_fraction=0, batch_size=256)
        trainer(max_epochs=2, callbacks=[freezing]).fit(model, data)
        models.append(model)
    assert "computed once for 1,617 images" in capsys.readouterr().out
    assert same_weights(*models)


# ---- the commands


@pytest.mark.pictures
def test_the_run_has_the_trainings_columns_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*SEEDED, "--trainer.max_epochs", "2"]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert "1,617 / 0 / 180 train / val / test" in out
    assert "early stopping off\nno validation: early stopping does not apply, and best" in out
    assert "pictures show training images and weights: the others need" in out
    assert "best epoch   2 of 2\ncheckpoint" in out
    assert "val/" not in out
    with (RUN / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [["epoch", "train/loss", "train/acc"]] * 2
    best, last = (checkpoints.read(RUN / "checkpoints" / f"{n}.ckpt") for n in ("best", "last"))
    assert best["epoch"] == last["epoch"] == 1
    assert all(torch.equal(best["state_dict"][k], v) for k, v in last["state_dict"].items())
    assert sorted(f.stem for f in (RUN / "pictures").iterdir()) == ["samples", "weights"]
    settings = yaml.safe_load((RUN / "config.yaml").read_text())
    assert settings["early_stopping"]["enabled"] is False
    # a training that is resumed is the uninterrupted one
    assert main(["fit", "--ckpt_path", f"{RUN}/last", "--trainer.max_epochs", "3"]) == 0
    assert main([*SEEDED, "--trainer.max_epochs", "3"]) == 0
    capsys.readouterr()
    one, other = (
        checkpoints.read(RUN.with_name(f"version_{n}") / "checkpoints/last.ckpt")["state_dict"]
        for n in (0, 1)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_it_is_tested_exported_and_shown(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.chdir(trained)
    assert main("test --ckpt_path shallow".split()) == 0
    assert "test evaluation 1 of this run" in capsys.readouterr().out
    assert main("export --ckpt_path shallow --format torch".split()) == 0
    assert "on 256 training images, in batches" in capsys.readouterr().out
    assert main("inspect --ckpt_path shallow".split()) == 0
    out = capsys.readouterr().out
    assert "the others need validation images" in out
    assert "samples, weights" in out
    assert main([*SEEDED, "--tune", "lr", "--trainer.max_epochs", "1"]) == 0
    assert "training with it" in capsys.readouterr().out


def test_an_export_is_compared_on_training_images(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    compared = export._images(Trained("shallow"))
    assert compared.what == "256 training images"
    assert len(compared.images) == 256


def test_its_report_says_that_it_has_no_validation(trained: Path) -> None:
    pytest.importorskip("pandas")
    from mnist_lightning.report import runs

    (said,) = runs.in_words(runs.read([trained / RUN]))
    assert "(ShallowNetwork) was trained on the validation images too, for 2 epochs" in said
    assert "It has not been tested yet" in said or "On 180 test images" in said


@pytest.mark.slow
def test_its_report_is_a_page(trained: Path, tmp_path: Path) -> None:
    assert main(["report", str(trained / RUN), "--out", str(tmp_path)]) == 0
    assert "was trained on the validation images too" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("validate --ckpt_path shallow", "there are no validation images: with val_fraction 0"),
        ("predict --ckpt_path shallow", "there are no validation images: with val_fraction 0"),
        (
            f"{FIT} --early_stopping.patience 5",
            "with --data.val_fraction 0 there is no validation that early stopping could monitor:"
            " leave --early_stopping.patience 5 out",
        ),
        (f"{FIT} --early_stopping.enabled true", "with --data.val_fraction 0 there is no"),
        (
            "search --config shallow_grid --data.source digits --data.val_fraction 0",
            "a search compares its trials on validation images, and --data.val_fraction 0 leaves",
        ),
        (f"{FIT} --data.val_fraction=-0.1", "val_fraction must lie between 0 and 1, got -0.1"),
    ],
)
def test_what_needs_a_validation_is_refused_in_a_line(
    argv: str, message: str, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.chdir(trained)
    assert main(argv.split()) == 1
    err = capsys.readouterr().err.strip()
    assert err.startswith(f"error: {message}")
    assert len(err.splitlines()) <= 2


def test_early_stopping_may_monitor_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.chdir(tmp_path)
    stopping = "--early_stopping.monitor train/loss --early_stopping.patience 1"
    more = "--early_stopping.min_delta 100 --trainer.max_epochs 5"
    assert main([*SEEDED, *stopping.split(), *more.split()]) == 0
    assert "best epoch   2 of 2 (stopped early)" in capsys.readouterr().out
