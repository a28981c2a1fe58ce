"""What is drawn of a trained model: against other implementations, and read back from its files."""

import importlib
import io
import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import same_weights
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch.nn import functional as F

from mnist_lightning import ConvNetwork, DataSpec, MNISTDataModule, Perceptron, ShallowNetwork
from mnist_lightning.__main__ import main
from mnist_lightning.insight import drawing, gradcam, pictures
from mnist_lightning.insight.answers import (
    Answers,
    answer,
    calibration,
    confusion,
    first_weights,
    surest_mistakes,
)
from mnist_lightning.runs.checkpoints import load, read
from mnist_lightning.training.progress import EpochLines

pytestmark = pytest.mark.pictures

FIT = "fit --config shallow.yaml --data.source digits --data.batch_size 32".split()
NAMES = {"samples", "weights", "confusion", "classes", "reliability", "mistakes"}
RUN = Path("lightning_logs/shallow/version_0")

# answers by the pixels' mean, which needs no layer
OWN = """
import torch
from lightning.pytorch import LightningModule


class Mean(LightningModule):
    def __init__(self):
        super().__init__()
        self.places = torch.nn.Parameter(torch.linspace(0, 1, 10))

    def forward(self, images):
        return {shown}

    def training_step(self, batch, index):
        scores = -(batch[0].mean((1, 2, 3))[:, None] - self.places) ** 2
        return torch.nn.functional.cross_entropy(scores, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with one trained run of three epochs."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*FIT, "--trainer.max_epochs", "3"]) == 0
    return folder


@pytest.fixture
def there(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(work)
    return work


def answers(classes: int = 4, count: int = 300) -> Answers:
    """Random answers, a third of them wrong."""
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(count, classes, generator=generator)
    labels = torch.where(
        torch.rand(count, generator=generator) < 0.66,
        scores.argmax(1),
        torch.randint(classes, (count,), generator=generator),
    )
    return Answers(torch.arange(count), labels, scores.softmax(1), None)


def pixel(image: Image.Image, x: float, y: float) -> tuple[int, ...]:
    return image.getpixel((round(x), round(y)))  # type: ignore[return-value]


def test_the_confusion_matrix_is_scikit_learns() -> None:
    some = answers()
    assert np.array_equal(confusion(some), confusion_matrix(some.labels, some.predicted))


@pytest.mark.parametrize("classes", [3, 10, 26, 100])
def test_the_confusion_matrix_shows_each_count_in_its_cell(classes: int) -> None:
    counts = np.eye(classes, dtype=int) * 50
    counts[0, 2], counts[1, 0], counts[2, 1] = 30, 10, 1
    matrix = drawing.ConfusionMatrix(counts, [f"class {i}" for i in range(classes)])
    image = matrix.draw()
    corners = {
        (i, j): pixel(image, *matrix.cell(i, j)[:2]) for i in range(classes) for j in range(classes)
    }
    assert corners == {cell: matrix.color(*cell) for cell in corners}
    assert corners[1, 2] == drawing.PAPER
    # the more mistakes, the redder: less green
    assert corners[0, 2][1] < corners[1, 0][1] < corners[2, 1][1] < 255
    assert corners[2, 2][2] > corners[2, 2][0]  # blue


def test_names_of_any_kind_are_drawn() -> None:
    names = ["=1+1", "a\nb", "x" * 500, "\x1b[31m", "猫", ""]
    drawing.ConfusionMatrix(np.eye(6, dtype=int), names).draw()
    counts = np.arange(6)
    image = drawing.class_accuracy(names, counts, counts + 1)
    assert image.width < 1000


@pytest.mark.parametrize(("side", "tile"), [(8, 96), (28, 84), (32, 96), (224, 96), (100, 96)])
def test_tiles_show_each_image(side: int, tile: int) -> None:
    images = np.stack([np.full((side, side), value, np.uint8) for value in (10, 100, 200)])
    captions = ["one", "a long name as another", "x" * 500]
    image = drawing.tiles(images, captions, "title", columns=2)
    wide = image.width / 2
    colors = [
        pixel(image, x, y)
        for y in (70 + tile / 2, 70 + tile * 1.5 + 30)
        for x in (wide / 2, wide * 1.5)
    ]
    assert colors == [(10,) * 3, (100,) * 3, (200,) * 3, drawing.PAPER]
    assert image.width < 500


def test_the_surest_mistakes_come_first() -> None:
    some = answers()
    probabilities, labels = some.probabilities.numpy(), some.labels.numpy()
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    order = sorted(wrong, key=lambda row: -probabilities[row].max())
    assert surest_mistakes(some, 20).tolist() == order[:20]
    assert surest_mistakes(some, 10**6).tolist() == order


def test_calibration_counts_each_image_in_its_bin() -> None:
    some = answers()
    confidence, accuracy, counts = calibration(some, 10)
    highest = some.probabilities.numpy().max(1).astype(np.float64)
    right = (some.predicted == some.labels).numpy()
    for index in range(10):
        inside = (highest > index / 10) & (highest <= (index + 1) / 10)
        assert counts[index] == inside.sum()
        if inside.any():
            assert confidence[index] == pytest.approx(highest[inside].mean())
            assert accuracy[index] == pytest.approx(right[inside].mean())
    assert counts.sum() == 300


def test_the_reliability_diagram_shows_accuracy_and_gap() -> None:
    image = drawing.reliability(np.array([0.3, 0.9]), np.array([0.2, 0.5]), np.array([10, 30]))
    left, top, side = 64, 70, 400
    assert pixel(image, left + 350, top + side * 0.7) == drawing.BLUE  # 0.3 is below 0.5
    assert pixel(image, left + 350, top + side * 0.3) == drawing.shade(drawing.RED, 0.35)
    assert pixel(image, left + 350, top + side * 0.05) == drawing.PAPER  # above the confidence


def test_of_many_classes_the_worst_are_drawn() -> None:
    images = np.full(50, 100)
    few = drawing.class_accuracy([str(i) for i in range(50)], np.arange(50) + 50, images)
    every = drawing.class_accuracy([str(i) for i in range(30)], np.arange(30) + 50, images[:30])
    assert few.height == every.height


def test_weights_are_blue_and_red() -> None:
    weights = np.zeros((2, 1, 3, 3), np.float32)
    weights[0, 0, 1, 1], weights[1, 0, 0, 0] = 2, -1
    pixels = drawing.weight_tiles(weights)
    assert tuple(pixels[0, 1, 1]) == drawing.BLUE
    assert pixels[1, 0, 0, 0] > pixels[1, 0, 0, 2]  # red
    assert (pixels[0, 0] == 255).all()
    colour = drawing.weight_tiles(np.stack([weights[:, 0]] * 3, 1))
    assert tuple(colour[0, 1, 1]) == (255, 255, 255)
    assert tuple(colour[0, 0, 0]) == (128, 128, 128)


def test_the_first_layer_as_images() -> None:
    spec = DataSpec()
    perceptron, shallow, conv = Perceptron(), ShallowNetwork(20), ConvNetwork([4, 8])
    found = first_weights(perceptron, spec)
    assert found is not None
    assert torch.equal(found[3].flatten(), perceptron.net.w[:, 3])
    found = first_weights(shallow, spec)
    assert found is not None
    assert torch.equal(found.flatten(1), shallow.net.hidden1.weight)
    found = first_weights(conv, spec)
    assert found is not None
    assert torch.equal(found, conv.net.stage1.conv1.weight)
    assert first_weights(torch.nn.Sequential(torch.nn.Flatten()), spec) is None
    assert first_weights(torch.nn.Linear(5, 2), spec) is None


def test_answers_are_the_models_and_leave_it_alone(digits: MNISTDataModule) -> None:
    digits.setup()
    model = ShallowNetwork(20, dropout=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = answer(model, digits, digits.val_set, 100)
    assert found is not None
    assert model.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(found.rows) == len(found.rows.unique()) == 100
    images, labels = digits.val_set.__getitems__(found.rows.tolist())
    model.eval()
    pixels = digits.preprocess(images)
    assert torch.equal(found.labels, labels)
    assert torch.allclose(found.probabilities, model(pixels).softmax(1), atol=1e-6)
    assert found.features is not None
    hidden = F.relu(model.net.hidden1(pixels.flatten(1)))
    assert torch.allclose(found.features, hidden, atol=1e-5)


def test_a_training_leaves_pictures(there: Path) -> None:
    assert {file.stem for file in (RUN / "pictures").iterdir()} == NAMES
    for file in (RUN / "pictures").iterdir():
        Image.open(file).load()


def test_tensorboard_has_them_at_the_best_epoch(there: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(RUN), size_guidance={"images": 0, "tensors": 0}).Reload()
    best = read(RUN / "checkpoints" / "best.ckpt")["epoch"] + 1
    assert set(log.Tags()["images"]) == {f"pictures/{name}" for name in NAMES}
    for name in NAMES:
        (event,) = log.Images(f"pictures/{name}")
        assert event.step == best
        content = (RUN / "pictures" / f"{name}.png").read_bytes()
        assert event.encoded_image_string == content
        assert (event.width, event.height) == Image.open(io.BytesIO(content)).size
    (text,) = log.Tensors("config/text_summary")
    assert b"hidden_units" in text.tensor_proto.string_val[0]
    (text,) = log.Tensors("provenance/text_summary")
    assert b"checksum" in text.tensor_proto.string_val[0]


def test_the_projector_reads_its_files(there: Path, digits: MNISTDataModule) -> None:
    from google.protobuf import text_format
    from tensorboard.plugins.projector import projector_plugin
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    config = text_format.Parse((RUN / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (embedding,) = config.embeddings
    file = str(RUN / embedding.tensor_path)
    with pytest.raises(UnicodeDecodeError):  # so that it takes the file for binary
        projector_plugin._read_tensor_tsv_file(file)
    tensor = projector_plugin._read_tensor_binary_file(file, embedding.tensor_shape)
    digits.setup()
    found = answer(load(RUN), digits, digits.val_set)  # type: ignore[arg-type]
    assert found is not None
    assert found.features is not None
    assert np.allclose(tensor, found.features, atol=1e-5)
    lines = (RUN / embedding.metadata_path).read_text().splitlines()
    assert len(lines) == len(tensor) + 1
    assert lines[1].split("\t")[0] == str(int(found.labels[0]))
    sprite = np.asarray(Image.open(RUN / embedding.sprite.image_path))
    width, height = embedding.sprite.single_image_dim
    columns = sprite.shape[1] // width
    place = 1 + columns  # the second of the second row
    cell = sprite[height : 2 * height, width : 2 * width]
    assert np.array_equal(cell, digits.val_set[int(found.rows[place])][0])


def test_inspect_draws_a_checkpoint(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All validation images are fewer than those after a training: the pictures are the same."""
    old = {file.name: file.read_bytes() for file in (RUN / "pictures").iterdir()}
    for name in old:
        (RUN / "pictures" / name).unlink()
    assert main(["inspect", "--ckpt_path", "shallow"]) == 0
    assert {file.name: file.read_bytes() for file in (RUN / "pictures").iterdir()} == old
    assert f"in {RUN}/pictures" in capsys.readouterr().out
    assert not Path("samples.png").exists()


def test_pictures_change_no_bit_of_a_training(there: Path) -> None:
    assert main([*FIT, *"--trainer.max_epochs 3 --pictures false".split()]) == 0
    plain = RUN.with_name("version_1")
    assert not (plain / "pictures").exists()
    assert not (plain / "projector").exists()
    for name in ("best", "last"):
        one, other = (read(run / "checkpoints" / f"{name}.ckpt") for run in (RUN, plain))
        for key in ("state_dict", "optimizer_states", "generators"):
            assert str(one[key]) == str(other[key])
        assert all(torch.equal(v, other["state_dict"][k]) for k, v in one["state_dict"].items())
    assert (RUN / "metrics.csv").read_bytes() == (plain / "metrics.csv").read_bytes()


@pytest.mark.parametrize(
    "flags", ["--trainer.logger false", "--trainer.fast_dev_run 2", "--pictures false"]
)
def test_none_are_drawn(flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, "--trainer.max_epochs", "1", *flags.split()]) == 0
    found = {path.name for path in tmp_path.rglob("*")}
    assert not found & {"pictures", "projector", "projector_config.pbtxt"}


def test_ctrl_c_draws_the_best_epoch_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: EpochLines, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(EpochLines, "on_train_epoch_start", start)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="130"):
        main([*FIT, "--trainer.max_epochs", "3"])
    assert {file.stem for file in (RUN / "pictures").iterdir()} == NAMES


@pytest.mark.parametrize(
    ("shown", "drawn"),
    [
        ("-(images.mean((1, 2, 3))[:, None] - self.places) ** 2", NAMES - {"weights"}),
        ("images.mean()", {"samples"}),  # no score for each class
        ("images['pixels']", {"samples"}),  # fails
    ],
)
def test_a_users_model_is_drawn_as_far_as_possible(
    shown: str,
    drawn: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("my_module.py").write_text(OWN.format(shown=shown))
    importlib.invalidate_caches()
    flags = "--model my_module.Mean --data.source digits --trainer.max_epochs 1"
    try:
        assert main(["fit", *flags.split()]) == 0
    finally:
        sys.modules.pop("my_module", None)
    folder = Path("lightning_logs/Mean/version_0/pictures")
    assert {file.stem for file in folder.iterdir()} == drawn
    assert "pictures" not in capsys.readouterr().err


def test_a_failure_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no room")

    monkeypatch.setattr(pictures, "write", fail)
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, "--trainer.max_epochs", "1"]) == 0
    shown = capsys.readouterr()
    assert f"the pictures of {RUN} are not complete: no room" in shown.err
    assert "best epoch   1 of 1" in shown.out


def test_the_number_of_answers_bounds_the_cost() -> None:
    assert pictures.answers_after(0) == 2000
    assert pictures.answers_after(6 * 50_400) == 6048


def test_a_model_gets_its_own_weights_back() -> None:
    model, best = ShallowNetwork(20), ShallowNetwork(20)
    own = ShallowNetwork(20)
    own.load_state_dict(model.state_dict())
    with pictures.with_weights(model, best.state_dict(), torch.device("cpu")):
        assert same_weights(model, best)
    assert same_weights(model, own)


def test_grad_cam_is_the_weighted_sum_of_the_activations() -> None:
    pytest.importorskip("captum")
    model = ConvNetwork([4, 8, 8]).eval()
    images, classes = torch.rand(3, 1, 28, 28), torch.tensor([1, 5, 7])
    stage = gradcam.stage_to_explain(model.net, images[:1])
    assert stage is model.net.stage2  # the third one has 3 x 3 positions
    heat = gradcam.heat_maps(model.net, stage, images, classes)
    seen = model.net.stage2(model.net.stage1(images)).detach().requires_grad_()
    rest = model.net[2:]
    score = rest(seen)[torch.arange(3), classes].sum()
    (gradient,) = torch.autograd.grad(score, seen)
    expected = F.relu((gradient.mean((2, 3), keepdim=True) * seen).sum(1, keepdim=True)).detach()
    expected = F.interpolate(expected, (28, 28), mode="bilinear")[:, 0]
    expected = expected / expected.amax((1, 2), keepdim=True).clamp(min=1e-12)
    assert torch.allclose(heat, expected, atol=1e-5)


def test_where_a_network_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("captum")
    monkeypatch.chdir(tmp_path)
    flags = "--config conv.yaml --data.source digits --trainer.max_epochs 1 --model.widths [4,8]"
    assert main(["fit", *flags.split(), "--pictures", "false"]) == 0
    assert main(["inspect", "--ckpt_path", "conv"]) == 0
    folder = Path("lightning_logs/conv/version_0/pictures")
    assert {file.stem for file in folder.iterdir()} == NAMES | {"gradcam"}
    (folder / "gradcam.png").unlink()
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    capsys.readouterr()
    assert main(["inspect", "--ckpt_path", "conv"]) == 0
    assert "[explain]" in capsys.readouterr().out
    assert not (folder / "gradcam.png").exists()


def test_a_network_without_convolutions_has_no_places() -> None:
    assert gradcam.stage_to_explain(ShallowNetwork(5).net, torch.rand(1, 1, 28, 28)) is None
