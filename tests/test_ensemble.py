"""Several checkpoints as one: the mean of the members' probabilities."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import trainer
from PIL import Image
from torch import Tensor

from mnist_lightning import (
    Classifier,
    ConvNetwork,
    DataSpec,
    Ensemble,
    MNISTDataModule,
    ShallowNetwork,
    load,
)
from mnist_lightning.__main__ import main
from mnist_lightning.classes import class_path
from mnist_lightning.deploy import browser
from mnist_lightning.deploy.formats import FORMATS, Export
from mnist_lightning.deploy.network import Network, about
from mnist_lightning.deploy.trained import Trained
from mnist_lightning.runs import checkpoints
from mnist_lightning.words import split_paths

Printed = pytest.CaptureFixture[str]

ALL = "a.ckpt b.ckpt c.ckpt"
FOLDER = Path("lightning_logs/ensemble/version_0")
SPEC = DataSpec(mean=(0.1307,), std=(0.3081,))


def save(file: Path, model: Classifier, **settings: Any) -> None:
    """Writes a checkpoint as a search does."""
    data = MNISTDataModule(source="digits", **{"normalization": "mnist", **settings})
    content = {
        "epoch": 2,
        "global_step": 3,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": model.state_dict(),
        "hparams_name": "kwargs",
        "model_class": class_path(type(model)),
        "hyper_parameters": dict(model.hparams),
        "datamodule_hparams_name": "kwargs",
        "datamodule_hyper_parameters": dict(data.hparams),
    }
    torch.save(content, file)


def members() -> list[Classifier]:
    torch.manual_seed(0)
    return [
        ShallowNetwork(8, spec=SPEC).eval(),
        ConvNetwork([4, 6], convolutions=1, spec=SPEC).eval(),
        ShallowNetwork(5, spec=SPEC, tta=1, activation="tanh").eval(),
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("members")
    for name, model in zip("abc", members(), strict=True):
        save(folder / f"{name}.ckpt", model)
    return folder


@pytest.fixture
def there(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MNIST_DATA_DIR", raising=False)
    return folder


@torch.no_grad()
def looped(images: Tensor) -> Tensor:
    """The mean of the probabilities, each member asked alone."""
    return torch.stack([m.predict(images).probabilities for m in members()]).mean(0)


def refused(argv: str, capsys: Printed) -> str:
    assert main(argv.split()) == 1
    text = capsys.readouterr().err.strip()
    assert text.startswith("error: ")
    assert len(text.splitlines()) <= 2
    return text


def test_it_answers_with_the_mean_of_the_probabilities(there: Path) -> None:
    images = torch.randint(0, 256, (7, 28, 28), dtype=torch.uint8)
    expected = looped(images)
    for model in (Ensemble(members()), load(ALL.split())):
        assert type(model) is Ensemble
        found = model.predict(images)
        assert torch.allclose(found.probabilities, expected, atol=1e-6)
        assert found.classes == [str(label) for label in expected.argmax(1).tolist()]
    assert not (there / "lightning_logs").exists()  # Python writes nothing


def test_the_trainer_tests_it_as_any_classifier() -> None:
    data = MNISTDataModule(source="digits", normalization="mnist")
    metrics = trainer().test(Ensemble(members()), data, verbose=False)[0]
    expected = looped(data.test_set.images)
    loss = F.nll_loss(expected.log(), data.test_set.labels)
    right = (expected.argmax(1) == data.test_set.labels).float().mean()
    assert metrics["test/loss"] == pytest.approx(float(loss), abs=1e-5)
    assert metrics["test/acc"] == pytest.approx(float(right), abs=1e-6)


def test_a_test_is_recorded_in_a_folder_of_its_own(there: Path, capsys: Printed) -> None:
    data = MNISTDataModule(source="digits", normalization="mnist")
    data.setup()
    right = (looped(data.test_set.images).argmax(1) == data.test_set.labels).float().mean()
    for number, named in ((1, ALL), (2, "c.ckpt a.ckpt b.ckpt")):  # the same members
        assert main(["test", "--ckpt_path", *named.split()]) == 0
        out = capsys.readouterr().out
        assert f"test evaluation {number} of this run, recorded in {FOLDER}/test.json" in out
        assert out.count("test/acc") == 1, "no accuracy of a member"
    entries = json.loads((FOLDER / "test.json").read_text())
    assert [entry["evaluation"] for entry in entries] == [1, 2]
    assert entries[0]["test/acc"] == pytest.approx(float(right), abs=1e-6)
    assert [member["checkpoint"] for member in entries[0]["members"]] == ALL.split()
    assert main(["report", str(FOLDER.parent)]) == 0
    page = Path("report/README.md").read_text()
    assert f"**{FOLDER.parent.name}/{FOLDER.name}** is an ensemble of 3 models. " in page
    assert f"right in **{entries[0]['test/acc']:.4f}**" in page
    assert "- members: a.ckpt, b.ckpt, c.ckpt\n" in page
    assert json.loads((FOLDER / "provenance.json").read_text())[0]["members"]
    assert main(["test", "--ckpt_path", "ensemble"]) == 0  # by its name, as a run
    assert "test evaluation 3" in capsys.readouterr().out
    assert main("validate --ckpt_path a.ckpt b.ckpt".split()) == 0
    assert "val/acc" in capsys.readouterr().out
    assert sorted(path.name for path in FOLDER.parent.iterdir()) == ["version_0", "version_1"]


def test_predict_takes_the_images_after_two_dashes(there: Path, capsys: Printed) -> None:
    image = torch.randint(0, 256, (28, 28), dtype=torch.uint8)
    Image.fromarray(image.numpy()).save("one.png")
    assert main(f"predict --json --ckpt_path {ALL} -- one.png".split()) == 0
    answer = json.loads(capsys.readouterr().out)
    expected = load(ALL.split()).predict(["one.png"]).probabilities[0]
    found = torch.tensor(list(answer["probabilities"].values()))
    assert torch.allclose(found, expected, atol=1e-5)
    assert main(f"predict --ckpt_path {ALL} --".split()) == 0  # the validation images
    assert "predictions in lightning_logs/ensemble/version_0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "options", "paths"),
    [
        ("--ckpt_path A b.png", "--ckpt_path A", "b.png"),
        ("--ckpt_path A B C -- d e", "--ckpt_path A B C", "d e"),
        ("--ckpt_path A B --json -- d", "--ckpt_path A B --json", "d"),
        ("x --ckpt_path A B --out D y -- d", "--ckpt_path A B --out D", "x y d"),
        ("--ckpt_path A B --", "--ckpt_path A B", ""),
    ],
)
def test_members_and_paths_are_told_apart(argv: str, options: str, paths: str) -> None:
    assert split_paths(argv.split()) == (options.split(), paths.split())


@pytest.fixture
def exported(there: Path) -> Export:
    assert main(f"predict --ckpt_path {ALL} --".split()) == 0
    trained = Trained("ensemble")
    images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8)
    network = Network(trained, images)
    return Export(trained, network, about(trained, images, list(trained.spec.classes)), images)


def test_the_network_of_an_export_is_the_ensemble(exported: Export) -> None:
    expected = looped(exported.images)
    assert torch.allclose(exported.network(exported.images), expected, atol=1e-6)
    content = FORMATS["safetensors"].write(exported)
    answers = FORMATS["safetensors"].load(content, exported)
    assert torch.allclose(answers(exported.images), expected, atol=1e-6)
    assert exported.about["training"][0]["members"][0]["checkpoint"] == "a.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_it_is_exported(there: Path, format: str, capsys: Printed) -> None:
    assert main(f"export --format {format} --ckpt_path {ALL}".split()) == 0
    out = capsys.readouterr().out
    assert f"{FOLDER}/model." in out
    assert "greatest difference from PyTorch on 256 validation images" in out


def test_demo_shows_its_answer(there: Path, capsys: Printed) -> None:
    model = load(ALL.split())
    image = torch.randint(0, 256, (1, 28, 28), dtype=torch.uint8)
    probabilities, hidden = browser.answer(model, image)
    assert torch.allclose(torch.tensor(probabilities), looped(image)[0], atol=1e-6)
    assert not hidden
    assert "Ensemble" in browser.page(model)
    text = refused(f"export --format html --ckpt_path {ALL}", capsys)
    assert "html does not know an ensemble; the same page with a server" in text


def test_it_is_not_trained(there: Path, capsys: Printed) -> None:
    assert main("validate --ckpt_path a.ckpt b.ckpt".split()) == 0
    text = refused("fit --ckpt_path ensemble/best", capsys)
    assert "holds weights only, no optimizer state: training cannot resume" in text
    with pytest.raises(ValueError, match="not trained: train its members"):
        trainer().fit(Ensemble(members()), MNISTDataModule(source="digits"))


# ---- members that do not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "unit"}, "they were trained with normalization mnist and unit"),
        ({"split": "canonical"}, "they were trained with split study and canonical"),
        ({"split_seed": 4}, "they were trained with split_seed 0 and 4"),
        ({"val_fraction": 0.0}, "they were trained with val_fraction 0.2 and 0.0"),
    ],
)
def test_other_data_are_refused(
    changes: dict[str, Any], message: str, there: Path, capsys: Printed
) -> None:
    save(Path("d.ckpt"), ShallowNetwork(4, spec=SPEC), **changes)
    text = refused("test --ckpt_path a.ckpt d.ckpt", capsys)
    assert f"a.ckpt and d.ckpt cannot be one ensemble: {message}" in text
    with pytest.raises(ValueError, match=message):
        load(["a.ckpt", "d.ckpt"])
    assert not Path("lightning_logs").exists()


def test_other_images_are_refused(there: Path, capsys: Printed) -> None:
    large = DataSpec(height=32, width=32, mean=SPEC.mean, std=SPEC.std)
    save(Path("d.ckpt"), ConvNetwork([4], spec=large), image_size=32)
    text = refused("test --ckpt_path a.ckpt d.ckpt", capsys)
    assert "a ShallowNetwork and a ConvNetwork cannot be one ensemble: they take" in text
    assert "images with height 28 and 32" in text


def test_other_mistakes_get_a_line(there: Path, capsys: Printed) -> None:
    text = refused("test --ckpt_path a.ckpt a.ckpt", capsys)
    assert "--ckpt_path a.ckpt: it is named twice" in text
    assert "no file or folder nowhere" in refused("export --ckpt_path a.ckpt nowhere", capsys)
    assert main("validate --ckpt_path a.ckpt b.ckpt".split()) == 0
    text = refused("test --ckpt_path ensemble c.ckpt", capsys)
    assert "an ensemble cannot be a member of another" in text
    with pytest.raises(ValueError, match="two members or more, got 1"):
        load(["a.ckpt"])


OWN = """
from torch import nn
from mnist_lightning import Classifier, DataSpec

class Mine(Classifier):
    def __init__(self, units=3, spec=None):
        spec = DataSpec.of(spec)
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, units), nn.ReLU(), nn.Linear(units, 10))
        super().__init__(net, 0.1, "sgd", spec)
"""


def test_a_class_of_ones_own_needs_trust(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.syspath_prepend(str(there))
    Path("my_members.py").write_text(OWN)
    from my_members import Mine

    save(Path("d.ckpt"), Mine(6, spec=SPEC))
    text = refused("test --ckpt_path a.ckpt d.ckpt", capsys)
    assert "importing it runs its code. If you trust it: --trust" in text
    assert main("test --ckpt_path a.ckpt d.ckpt --trust".split()) == 0
    held = checkpoints.read(FOLDER / "checkpoints/best.ckpt")["hyper_parameters"]["members"][1]
    assert (held["model_class"], held["units"]) == ("my_members.Mine", 6)
