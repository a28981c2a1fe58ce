"""``tta``: evaluations average over shifted images. Compared with a loop in plain PyTorch."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import same_weights, trainer
from torch import Tensor, nn

from mnist_lightning import (
    Classifier,
    ConvNetwork,
    DataSpec,
    LayerFreezing,
    MNISTDataModule,
    Perceptron,
    ShallowNetwork,
    load,
)
from mnist_lightning.__main__ import main
from mnist_lightning.data.augmentation import Augment
from mnist_lightning.data.preparation import prepare
from mnist_lightning.deploy import browser
from mnist_lightning.deploy.formats import FORMATS, Export
from mnist_lightning.deploy.network import Network, about
from mnist_lightning.deploy.trained import Trained
from mnist_lightning.insight.answers import answer
from mnist_lightning.nets import _shifts
from mnist_lightning.search.plan import Search

Printed = pytest.CaptureFixture[str]

GRAY = DataSpec(mean=(0.1307,), std=(0.3081,)).plain()
COLOUR = DataSpec(3, 12, 10, ("a", "b", "c"), (0.5, 0.4, 0.3), (0.2, 0.3, 0.1), False).plain()


def looped(net: nn.Module, images: Tensor, pixels: int, spec: dict[str, Any]) -> Tensor:
    """The mean of the probabilities, written down plainly.

    Args:
        net: computes class scores.
        images: uint8, ``(n, channels, height, width)``.
        pixels: of the shifts.
        spec: of the images.
    """
    mean, std = (torch.tensor(spec[name])[:, None, None] for name in ("mean", "std"))
    height, width = images.shape[2:]
    total: Any = 0
    for down in (-pixels, 0, pixels):
        for right in (-pixels, 0, pixels):
            shifted = torch.zeros_like(images)
            for y in range(height):
                for x in range(width):
                    if 0 <= y + down < height and 0 <= x + right < width:
                        shifted[:, :, y + down, x + right] = images[:, :, y, x]
            total = total + net((shifted / 255 - mean) / std).softmax(1)
    return total / 9


def drawn(count: int, spec: dict[str, Any]) -> Tensor:
    shape = (count, spec["channels"], spec["height"], spec["width"])
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@pytest.fixture
def digits() -> MNISTDataModule:
    data = MNISTDataModule(source="digits", batch_size=64, normalization="mnist")
    data.setup()
    return data


@torch.no_grad()
@pytest.mark.parametrize("pixels", [1, 3])
def test_predictions_are_those_of_the_loop(pixels: int) -> None:
    for spec, model in (
        (GRAY, ShallowNetwork(8, spec=GRAY, tta=pixels)),
        (COLOUR, ConvNetwork([4, 6], spec=COLOUR, tta=pixels)),
    ):
        model.eval()
        images = drawn(5, spec)
        expected = looped(model.net, images, pixels, spec)
        assert torch.allclose(model.predict(images).probabilities, expected, atol=1e-6)
        once = model.net(prepare(images, model.spec)).softmax(1)
        assert not torch.allclose(expected, once, atol=1e-4)


def test_edges_are_filled_as_in_the_augmentation() -> None:
    """Each of the nine images is one that the training's shift can draw."""
    images, spec = drawn(2, GRAY), DataSpec.of(GRAY)
    black = torch.tensor(spec.black)[:, None, None]
    shifts = list(_shifts(prepare(images, spec), 2, black))
    assert torch.equal(shifts[0], prepare(images, spec))

    def by_training(x: float, y: float) -> Tensor:
        names = "rotate scale shear_x shear_y flip crop_x crop_y".split()
        draws = {name: torch.full((2,), 0.5, dtype=torch.float64) for name in names}
        draws |= {"shift_x": (0.5 + x / 2).expand(2), "shift_y": (0.5 + y / 2).expand(2)}
        maps = Augment(shift=2).maps(draws, 28, 28).float()

        def change(pixels: Tensor) -> Tensor:
            places = F.affine_grid(maps, list(pixels.shape), align_corners=False)
            return F.grid_sample(pixels, places, align_corners=False)

        return prepare(images, spec, change)

    ways = [torch.tensor(float(way)) for way in (-1, 0, 1)]
    by_augmentation = [by_training(x, y) for x in ways for y in ways]
    for shifted in shifts:
        matches = [torch.allclose(shifted, one, atol=1e-3) for one in by_augmentation]
        assert matches.count(True) == 1


@torch.no_grad()
def test_the_trainer_validates_tests_and_predicts_with_it(digits: MNISTDataModule) -> None:
    model = ShallowNetwork(8, spec=digits.spec, tta=2)
    plain = trainer()
    metrics = plain.validate(model, digits, verbose=False)[0]
    metrics |= plain.test(model, digits, verbose=False)[0]
    answers = torch.cat(plain.predict(model, digits))
    for stage, part in (("val", digits.val_set), ("test", digits.test_set)):
        expected = looped(model.net, part.images[:, None], 2, digits.spec.plain())
        loss = F.nll_loss(expected.log(), part.labels)
        right = (expected.argmax(1) == part.labels).float().mean()
        assert metrics[f"{stage}/loss"] == pytest.approx(float(loss), abs=1e-5)
        assert metrics[f"{stage}/acc"] == pytest.approx(float(right), abs=1e-6)
        if stage == "val":
            assert torch.allclose(answers, expected, atol=1e-6)


def test_the_training_stays_the_same_to_the_bit(digits: MNISTDataModule) -> None:
    """Fused steps too: a training step never shifts an image, though the model validates."""
    models = []
    for pixels in (0, 2):
        pl.seed_everything(0, verbose=False)
        models.append(ShallowNetwork(8, spec=digits.spec, tta=pixels))
        training = trainer(max_epochs=2)
        training.fit(models[-1], digits)
        assert training.fit_loop.epoch_loop.batch_progress.total.ready == 2 * 21
    assert same_weights(*models)
    model = ShallowNetwork(8, spec=digits.spec, tta=2)
    model.eval()  # a model that was loaded is in this mode
    batch = digits.preprocess(digits.train_set.images[:4]), digits.train_set.labels[:4]
    expected = F.cross_entropy(model.net(batch[0]), batch[1])
    assert torch.equal(model.training_step(batch, 0), expected)


def test_frozen_layers_are_not_kept(capsys: Printed, digits: MNISTDataModule) -> None:
    model = ConvNetwork([4, 4], convolutions=1, spec=digits.spec, tta=1)
    trainer(max_epochs=2, callbacks=[LayerFreezing(freeze=["net.stage1.*"])]).fit(model, digits)
    assert "computed in each epoch: tta shifts the validation images" in capsys.readouterr().out


def test_a_population_does_not_train_it() -> None:
    search = Search("s", "ShallowNetwork", {"lr": [0.1]}, fixed={"max_epochs": 1})
    assert search.hidden_units({"lr": 0.1, "tta": 0}) == (100,)
    assert search.hidden_units({"lr": 0.1, "tta": 1}) is None


class OwnStep(Classifier):
    def __init__(self, **options: Any) -> None:
        super().__init__(nn.Flatten(), 0.1, "sgd", **options)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShallowNetwork(tta=-1), "tta must be a whole number of pixels, from 0 to 27, got"),
        (lambda: ShallowNetwork(tta=28), "from 0 to 27, got 28"),
        (lambda: ShallowNetwork(tta=0.5), "from 0 to 27, got 0.5"),
        (lambda: Perceptron(tta=1), "Perceptron has a loss of its own, .* leave tta out"),
        (lambda: OwnStep(tta=1), "OwnStep has a validation_step of its own"),
    ],
)
def test_what_it_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_pictures_have_the_features_of_the_images_themselves(digits: MNISTDataModule) -> None:
    model = ShallowNetwork(8, spec=digits.spec)
    digits.eval_batch_size = 100
    usual = answer(model, digits, digits.val_set)
    model.tta = 1
    shifted = answer(model, digits, digits.val_set)
    assert usual is not None
    assert shifted is not None
    assert torch.equal(usual.features, shifted.features)
    images = digits.val_set.images[shifted.rows[:9]][:, None]
    expected = looped(model.net, images, 1, digits.spec.plain())
    assert torch.allclose(shifted.probabilities[:9], expected, atol=1e-6)


# ---- commands


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a run that has tta 2."""
    folder = tmp_path_factory.mktemp("tta")
    flags = "--data.source digits --trainer.max_epochs 1 --model.tta 2 --pictures false"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "shallow", *flags.split()]) == 0
    return folder


def test_it_can_be_changed_for_a_test(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.chdir(run)
    for flags in ([], ["--model.tta", "0"]):
        assert main(["test", "--ckpt_path", "shallow", *flags]) == 0
    entries = json.loads(Path("lightning_logs/shallow/version_0/test.json").read_text())
    assert [entry.get("tta") for entry in entries] == [2, None]
    assert entries[0]["test/loss"] != entries[1]["test/loss"]
    capsys.readouterr()


@pytest.fixture
def export(run: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    monkeypatch.chdir(run)
    trained = Trained("shallow")
    images = drawn(64, trained.spec.plain())
    network = Network(trained, images)
    return Export(trained, network, about(trained, images, list(trained.spec.classes)), images)


def test_the_network_of_an_export_has_it(export: Export) -> None:
    expected = load("shallow").predict(export.images).probabilities
    assert torch.allclose(export.network(export.images), expected, atol=1e-6)
    content = FORMATS["safetensors"].write(export)
    answers = FORMATS["safetensors"].load(content, export)
    assert torch.allclose(answers(export.images), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_exported_files_have_it(export: Export, format: str) -> None:
    expected = load("shallow").predict(export.images).probabilities
    answers = FORMATS[format].load(FORMATS[format].write(export), export)
    for count in (1, 64):
        found = answers(export.images[:count])
        assert torch.allclose(found, expected[:count], atol=1e-5)


def test_a_page_alone_cannot_have_it_and_demo_can(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.chdir(run)
    assert main("export --ckpt_path shallow --format html".split()) == 1
    assert "html does not know tta, the mean over shifted images;" in capsys.readouterr().err
    model = load("shallow")
    image = drawn(1, model.spec.plain())
    probabilities, hidden = browser.answer(model, image)
    expected = looped(model.net, image, 2, model.spec.plain())[0]
    assert torch.allclose(torch.tensor(probabilities), expected, atol=1e-6)
    model.tta = 0
    assert hidden == browser.answer(model, image)[1]
