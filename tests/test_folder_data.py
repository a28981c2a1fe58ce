"""The user's own images: from folders of photographs to a tested model, and its predictions."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import trainer
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

import mnist_lightning
from mnist_lightning import MNISTDataModule, ShallowNetwork
from mnist_lightning.__main__ import main
from mnist_lightning.data.augmentation import Augment
from mnist_lightning.data.sampling import balanced_order

COLOURS = {"apple": (200, 30, 30), "berry": (40, 40, 190), "leaf": (30, 180, 40)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MNIST_DATA_DIR", raising=False)


def photo(path: Path, colour: tuple[int, int, int], seed: int, size: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-25, 26, (size, size, 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def fruit(tmp_path: Path) -> Path:
    """Three classes that differ in colour: 20, 20 and 5 photos."""
    folder = tmp_path / "fruit"
    for number, (name, colour) in enumerate(COLOURS.items()):
        for n in range(5 if name == "leaf" else 20):
            photo(folder / name / f"{n:02}.png", colour, 100 * number + n)
    return folder


def data(folder: Path, **settings: object) -> MNISTDataModule:
    made = MNISTDataModule(source="folder", data_dir=str(folder), **settings)
    made.setup("fit")
    return made


def test_it_is_what_torchvision_reads(fruit: Path) -> None:
    """The three sets together hold each image once, with its label."""
    ours = data(fruit)
    theirs = ImageFolder(str(fruit))
    expected = Counter((pil_to_tensor(image).numpy().tobytes(), label) for image, label in theirs)
    got: Counter = Counter()
    for part in (ours.train_set, ours.val_set, ours.test_set):
        got.update((part[i][0].numpy().tobytes(), int(part[i][1])) for i in range(len(part)))
    assert got == expected
    assert list(ours.spec.classes) == theirs.classes
    assert ours.spec.shape == (3, 12, 12)
    assert not ours.spec.drawn


def test_each_part_has_the_same_shares_of_the_classes(fruit: Path) -> None:
    made = data(fruit, val_fraction=0.25, test_fraction=0.2)
    counts = [
        torch.bincount(part.labels, minlength=3).tolist()
        for part in (made.train_set, made.val_set, made.test_set)
    ]
    assert counts == [[12, 12, 3], [4, 4, 1], [4, 4, 1]]
    other = data(fruit, val_fraction=0.25, test_fraction=0.2, split_seed=1)
    assert not torch.equal(made.test_set.images, other.test_set.images)


def test_the_users_own_split_is_kept(fruit: Path, tmp_path: Path) -> None:
    """What is missing is cut off the training images."""
    split = tmp_path / "split"
    for part, first, last in (("train", 0, 3), ("test", 3, 5)):
        for name in COLOURS:
            for n in range(first, last):
                (split / part / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(fruit / name / f"{n:02}.png", split / part / name)
    made = data(split)
    assert [len(p) for p in (made.train_set, made.val_set, made.test_set)] == [6, 3, 6]
    in_test = {image.numpy().tobytes() for image in made.test_set.images}
    assert in_test == {
        pil_to_tensor(Image.open(f)).numpy().tobytes() for f in split.glob("test/*/*")
    }


@pytest.mark.parametrize("copies", [0, 3])
def test_copies_in_training_and_test_are_reported(
    fruit: Path, tmp_path: Path, copies: int, recwarn: pytest.WarningsRecorder
) -> None:
    split = tmp_path / "split"
    shutil.copytree(fruit, split / "train")
    for n in range(6):
        photo(split / "test" / "apple" / f"{n}.png", (0, 0, 0), 1000 + n)
    for n in range(copies):
        shutil.copy(fruit / "apple" / f"{n:02}.png", split / "test" / "apple" / f"copy{n}.png")
    data(split)
    said = [str(w.message) for w in recwarn if "equal in all pixels" in str(w.message)]
    assert len(said) == bool(copies)
    assert all(text.startswith("3 of the 9 test images") for text in said)


def test_normalisation_is_for_each_channel(fruit: Path) -> None:
    made = data(fruit, normalization="imagenet")
    images = made.train_set.images[:4]
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    expected = (images / 255 - mean) / std
    torch.testing.assert_close(made.preprocess(images), expected)
    assert made.spec.mean == (0.485, 0.456, 0.406)


def test_gray_on_demand(fruit: Path) -> None:
    made = data(fruit, channels=1, image_size=8)
    assert made.spec.shape == (1, 8, 8)
    assert made.preprocess(made.val_set.images).shape == (len(made.val_set), 1, 8, 8)


@pytest.mark.parametrize(("sizes", "expected"), [((12, 12), 12), ((12, 20), 64), ((300, 300), 224)])
def test_the_default_size_is_that_of_the_files(
    tmp_path: Path, sizes: tuple[int, int], expected: int
) -> None:
    for name, size in zip("ab", sizes, strict=True):
        photo(tmp_path / "x" / name / "0.png", (9, 9, 9), 0, size)
    assert MNISTDataModule(source="folder", data_dir=str(tmp_path / "x")).image_size == expected


class Halved(MNISTDataModule):
    def __init__(self) -> None:
        super().__init__(source="digits")
        self.image_size = 14


def test_a_subclass_may_set_the_size() -> None:
    made = Halved()
    made.setup("fit")
    assert made.spec.shape == (1, 14, 14)
    assert made.preprocess(made.val_set.images[:2]).shape == (2, 1, 14, 14)


def test_augmentation_and_a_batch(fruit: Path) -> None:
    made = data(fruit, augment=Augment(flip=True, crop=2), batch_size=8)
    images, labels, numbers = next(iter(made.train_dataloader()))
    assert images.shape == (8, 3, 12, 12)
    assert torch.equal(made.train_set.images[numbers], images)
    assert torch.equal(made.train_set.labels[numbers], labels)


def test_a_balanced_epoch_draws_each_class_equally_often() -> None:
    labels = torch.tensor([0] * 9000 + [1] * 900 + [3] * 100)
    order = balanced_order(labels, seed=1, epoch=2)
    counts = torch.bincount(labels[order], minlength=4)
    assert order.shape == labels.shape
    assert counts[2] == 0
    assert ((counts[[0, 1, 3]] - 10_000 / 3).abs() < 5 * (10_000 * 2 / 9) ** 0.5).all()
    assert len(order[labels[order] == 3].unique()) == 100  # all images of a class are drawn
    assert torch.equal(order, balanced_order(labels, 1, 2))
    assert not torch.equal(order, balanced_order(labels, 1, 3))


def test_the_training_uses_the_balanced_order(fruit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    made = data(fruit, balance=True, batch_size=7)
    seen = torch.cat([labels for _, labels in made.train_dataloader()])
    assert torch.equal(seen, made.train_set.labels[balanced_order(made.train_set.labels, 0, 0)])


def test_a_network_learns_the_colours(fruit: Path) -> None:
    made = data(fruit, batch_size=4)
    model = ShallowNetwork(10, 0.1, spec=made.spec)
    fit = trainer(max_epochs=10)
    fit.fit(model, made)
    assert fit.validate(model, made, verbose=False)[0]["val/acc"] == 1.0


def words(line: str) -> int:
    return main(line.split())


def test_from_a_folder_to_predictions(
    fruit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the training images are not there any more."""
    monkeypatch.chdir(tmp_path)
    assert (
        words(
            "fit --model ConvNetwork --model.widths [8] --data.source folder --data.data_dir fruit"
            " --trainer.max_epochs 12 --model.lr 0.02 --data.batch_size 8"
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "fruit, 3 classes, colour 12 x 12 (split seed 0): 31 / 9 / 5 train / val / test" in text
    assert "training images by class: apple 14, berry 14, leaf 3" in text
    assert words("test --ckpt_path ConvNetwork") == 0
    tested = json.loads(Path("lightning_logs/ConvNetwork/version_0/test.json").read_text())
    assert tested[0]["classes"] == ["apple", "berry", "leaf"]
    assert tested[0]["test/acc"] == 1.0
    assert words("validate --ckpt_path ConvNetwork") == 0
    shutil.move(fruit / "leaf" / "00.png", tmp_path / "one.png")
    shutil.rmtree(fruit)
    (tmp_path / "new").mkdir()
    shutil.move(tmp_path / "one.png", tmp_path / "new")
    photo(tmp_path / "new" / "two.jpg", COLOURS["berry"], 7, size=30)
    assert words("predict --ckpt_path ConvNetwork --data.predict_dir new") == 0
    with open("lightning_logs/ConvNetwork/version_0/predictions.csv") as file:
        rows = list(csv.reader(file))
    assert [row[:2] for row in rows] == [
        ["image", "predicted"],
        ["one.png", "leaf"],
        ["two.jpg", "berry"],
    ]


def test_more_than_a_hundred_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names are in the checkpoint, which every command reads back."""
    monkeypatch.chdir(tmp_path)
    for n in range(120):
        for m in range(5):
            photo(tmp_path / "many" / f"{n:03}" / f"{m}.png", (n, n, n), 5 * n + m, 8)
    options = "--config shallow --data.source folder --data.data_dir many --trainer.max_epochs 1"
    assert main(["fit", *options.split()]) == 0
    assert main(["test", "--ckpt_path", "shallow"]) == 0
    answers = mnist_lightning.load("shallow").predict([tmp_path / "many" / "117" / "0.png"])
    assert answers.probabilities.shape == (1, 120)


def test_another_folder_is_tested_by_the_names_of_its_classes(
    fruit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A class that is missing there does not shift the labels of the others."""
    monkeypatch.chdir(tmp_path)
    line = "fit --model ShallowNetwork --data.source folder --data.data_dir fruit"
    assert words(f"{line} --trainer.max_epochs 10 --data.batch_size 4") == 0
    for n in range(4):
        photo(tmp_path / "more" / "test" / "berry" / f"{n}.png", COLOURS["berry"], 50 + n)
        photo(tmp_path / "more" / "test" / "leaf" / f"{n}.png", COLOURS["leaf"], 90 + n)
    assert words("test --ckpt_path ShallowNetwork --data.data_dir more") == 0
    tested = json.loads(Path("lightning_logs/ShallowNetwork/version_0/test.json").read_text())
    assert tested[0]["test/acc"] == 1.0
    shutil.move(tmp_path / "more" / "test" / "leaf", tmp_path / "more" / "test" / "stone")
    capsys.readouterr()
    assert words("test --ckpt_path ShallowNetwork --data.data_dir more") == 1
    assert "has a class 'stone', which is not among the known 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data.source folder", "needs a folder of images: --data.data_dir DIR"),
        ("--data.source folder --data.data_dir nowhere", "nowhere is no folder"),
        ("--data.source folder --data.data_dir one", "two or more folders"),
        ("--data.source folder --data.data_dir fruit --data.name KMNIST", "contradict each other"),
        ("--data.channels 3", "channels is only for images from a folder"),
        ("--data.source folder --data.data_dir fruit --data.test_fraction 1", "between 0 and 1"),
        ("--data.source folder --data.data_dir few", "leaves no images for val"),
    ],
)
def test_what_cannot_work_gets_a_line(
    fruit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(fruit / "leaf", tmp_path / "one" / "leaf")
    for name in "ab":
        photo(tmp_path / "few" / name / "0.png", (1, 2, 3), 0)
    assert words(f"fit --model ShallowNetwork {options}") == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "lightning_logs").exists()


def test_what_is_no_image_is_left_out(fruit: Path, recwarn: pytest.WarningsRecorder) -> None:
    (fruit / "apple" / "notes.png").write_text("not an image")
    (fruit / "empty").mkdir()
    made = data(fruit)
    said = "\n".join(str(w.message) for w in recwarn)
    assert "1 files are left out" in said
    assert "these folders hold no image, and are no class" in said
    assert sum(len(p) for p in (made.train_set, made.val_set, made.test_set)) == 45
    assert made.spec.classes == ("apple", "berry", "leaf")


def test_a_folder_that_changed_is_reported(
    fruit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = "fit --model ShallowNetwork --data.source folder --data.data_dir fruit"
    assert words(f"{line} --trainer.max_epochs 1") == 0
    assert words("validate --ckpt_path ShallowNetwork") == 0
    assert "changed since" not in capsys.readouterr().err
    photo(fruit / "apple" / "more.png", COLOURS["apple"], 999)
    assert words("validate --ckpt_path ShallowNetwork") == 0
    assert "have changed since the training" in capsys.readouterr().err


@pytest.mark.parametrize("augment", [False, True])
def test_a_picture_of_the_samples(
    fruit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augment: bool
) -> None:
    """The first column holds the images themselves; the others are as in the first epochs."""
    monkeypatch.chdir(tmp_path)
    line = "inspect --model ShallowNetwork --data.source folder --data.data_dir fruit"
    assert words(line + " --data.augment.flip true --data.augment.crop 2" * augment) == 0
    sheet = torch.from_numpy(np.array(Image.open("samples.png").convert("RGB")))
    assert sheet.shape == (8 * (96 + 2) + 2, 10 * (96 + 2) + 2, 3)
    made = data(fruit, augment=Augment(flip=True, crop=2) if augment else Augment())
    rows = torch.linspace(0, len(made.train_set) - 1, 8 if augment else 80).long()
    images = made.train_set.images[rows]
    expected = [images / 255]
    if augment:
        expected += [made.augment(images / 255, rows, 0, epoch) for epoch in range(9)]
    for place, image in ((0, expected[0][0]), (9, expected[9][0] if augment else expected[0][9])):
        left = 2 + place * 98
        shown = sheet[2:98:8, left : left + 96 : 8].permute(2, 0, 1)
        assert ((image * 255).clamp(0, 255) - shown).abs().max() <= 1


def test_a_loaded_model_predicts(
    fruit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the command does, from files and from images in memory."""
    monkeypatch.chdir(tmp_path)
    line = "fit --model ConvNetwork --model.widths [8] --data.source folder --data.data_dir fruit"
    assert words(f"{line} --trainer.max_epochs 10 --model.lr 0.02 --data.batch_size 8") == 0
    model = mnist_lightning.load("lightning_logs/ConvNetwork")
    files = sorted(fruit.glob("*/0[0-3].png"))
    answers = model.predict(files)
    assert answers.classes == [file.parent.name for file in files]
    torch.testing.assert_close(answers.probabilities.sum(1), torch.ones(len(files)))
    pixels = torch.stack([pil_to_tensor(Image.open(file)) for file in files])
    assert torch.equal(model.predict(pixels).probabilities, answers.probabilities)
    for wrong in (pixels.float(), pixels[:, :1], pixels[0], []):
        with pytest.raises(ValueError, match="predict needs"):
            model.predict(wrong)
    with pytest.raises(ValueError, match=r"none\.png cannot be read as an image"):
        model.predict(["none.png"])


@pytest.mark.slow
def test_a_search_over_a_folder(
    fruit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained together, in colour: the same accuracies as one by one."""
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(
        "model: ShallowNetwork\nspace: {lr: [0.1, 0.2]}\nfixed: {hidden_units: 5, max_epochs: 3,"
        " batch_size: 4}\ndata: {source: folder, data_dir: fruit}\n"
    )
    assert words("search --config s.yaml --workers 1") == 0
    found = mnist_lightning.load_results("lightning_logs/search/s")
    made = data(fruit, batch_size=4)
    for lr, acc in zip(found["lr"], found["val_acc"], strict=True):
        torch.manual_seed(0)
        model = ShallowNetwork(5, lr, spec=made.spec)
        fit = trainer(max_epochs=3)
        fit.fit(model, made)
        assert fit.callback_metrics["val/acc"].item() == pytest.approx(acc)
