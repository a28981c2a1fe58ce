"""``export``: the files answer as ``Classifier.predict``, and say what they hold.

Each program that is printed is run as it is.
"""

import contextlib
import io
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mnist_lightning
from mnist_lightning import DataSpec, ShallowNetwork, load
from mnist_lightning.__main__ import main
from mnist_lightning.deploy import export as command
from mnist_lightning.deploy.browser import read_back, self_contained
from mnist_lightning.deploy.formats import FORMATS
from mnist_lightning.deploy.network import Network
from mnist_lightning.models.pretrained import pretrained_tensors

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

Printed = pytest.CaptureFixture[str]
Export = Callable[..., tuple[int, str, str]]

OWN = """
import torch
from lightning.pytorch import LightningModule
from torch import nn

from mnist_lightning import Classifier, DataSpec


class Logs(LightningModule):
    def __init__(self, hidden: int = 8):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.Linear(hidden, 10))

    def forward(self, images):
        return self.net(images).log_softmax(1)

    def training_step(self, batch, batch_idx):
        return nn.functional.nll_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Shares(Logs):
    def forward(self, images):
        return self.net(images).softmax(1)


class Branches(Logs):
    def forward(self, images):
        return super().forward(images) if images.mean() > 0.5 else super().forward(-images)


class Mute(Logs):
    forward = LightningModule.forward

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class Other(Logs):
    def predict_step(self, batch, batch_idx):
        return self(batch[0]).roll(1, 1)


class Scaled(Classifier):
    def __init__(self, hidden: int = 8, lr: float = 0.1, spec: dict | None = None, **options):
        spec = DataSpec.of(spec)
        net = nn.Sequential(nn.Flatten(), nn.Linear(spec.pixels, hidden), nn.Dropout(0.5))
        net.append(nn.Linear(hidden, len(spec.classes)))
        super().__init__(net, lr, "sgd", spec, **options)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images):
        return self.scale * self.net(images)
"""

DIGITS = "--data.source digits"
KINDS = {
    "perceptron": f"--model Perceptron {DIGITS}",
    "shallow": f"--config shallow.yaml --model.hidden_units 16 --model.batch_norm true {DIGITS}"
    " --model.dropout 0.5 --data.normalization mnist",
    "conv": "--model ConvNetwork --model.widths [4,8] --data.source folder --data.data_dir photos"
    " --data.image_size 16 --data.normalization imagenet",
    # 28 pixels are enlarged to 32
    "resnet": f"--config resnet18_small.yaml {DIGITS} --trainer.limit_train_batches 2",
}
QUICK = [("shallow", "onnx"), ("conv", "torch"), ("shallow", "safetensors")]
slow = pytest.mark.slow
kinds = pytest.mark.parametrize(
    "kind",
    [
        *("shallow", "conv"),
        *(pytest.param(kind, marks=slow) for kind in ("perceptron", "resnet")),
    ],
)


def train(words: str, *more: str) -> Path:
    """Trains for a few steps in the working directory; returns the folder of the run."""
    quick = "--trainer.max_epochs 1 --trainer.limit_train_batches 40 --trainer.accelerator cpu"
    command = ["fit", *quick.split(), *words.split(), *more]
    assert main([*command, "--trainer.enable_progress_bar", "false"]) == 0
    (run,) = Path().glob("lightning_logs/*/version_0")
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Trains a kind of network once; returns the folder that holds its lightning_logs."""
    made: dict[str, Path] = {}

    def once(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            with contextlib.chdir(made[kind]):
                photos()
                train(KINDS[kind])
        return made[kind]

    return once


def photos() -> None:
    """Colour photographs of three classes, of one size."""
    generator = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        Path("photos", name).mkdir(parents=True)
        for number in range(20):
            pixels = generator.integers(0, 120, (16, 16, 3), np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(f"photos/{name}/{number}.png")


@pytest.fixture
def run(
    trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """Copies the run of a kind of network into the working directory; returns its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MNIST_DATA_DIR", raising=False)

    def copy(kind: str) -> Path:
        shutil.copytree(trained(kind), ".", dirs_exist_ok=True)
        (folder,) = Path().glob("lightning_logs/*/version_0")
        return folder

    return copy


@pytest.fixture
def export(capsys: Printed) -> Export:
    """Runs the command; returns its exit code, output and errors."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["export", *map(str, words)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def own(run: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Trains one of the classes above."""
    Path("my_exports.py").write_text(OWN)
    yield lambda name: train(f"--model my_exports.{name} {DIGITS}")
    sys.modules.pop("my_exports", None)


def program(printed: str) -> str:
    return printed.partition("how to use it, in Python:\n\n")[2]


def ran(text: str) -> str:
    """The output of a printed program."""
    assert len(text.splitlines()) <= 10
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(text, "printed", "exec"), {})
    return output.getvalue()


def some(images: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (images, *shape), generator=generator, dtype=torch.uint8)


def answers(file: Path) -> Callable[[Tensor], Tensor]:
    """What a file answers, without any code of ours."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()  # type: ignore[return-value]
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def about(file: Path) -> dict[str, Any]:
    """What a file says of itself."""
    if file.suffix == ".pt2":
        extra = {"about.json": ""}
        torch.export.load(file, extra_files=extra)
        return json.loads(extra["about.json"])
    if file.suffix == ".onnx":
        import onnxruntime

        texts = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    else:
        from safetensors import safe_open

        texts = safe_open(file, "pt").metadata()
    # onnxruntime adds its own mark
    return {name: json.loads(text) for name, text in texts.items() if not name.startswith("onnx.")}


# ---- the files


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        pytest.param(kind, format, marks=() if (kind, format) in QUICK else slow)
        for kind in KINDS
        for format in FORMATS
        if format != "html"  # it is no file for programs
    ],
)
def test_a_file_answers_as_the_loaded_model(
    kind: str, format: str, run: Callable[[str], Path], export: Export
) -> None:
    folder = run(kind)
    code, out, err = export("--ckpt_path", folder, "--format", format)
    assert (code, err) == (0, "")
    file = folder / f"model.{FORMATS[format].ending}"
    assert out.startswith(f"{file}: ")
    printed = re.search(r"difference from PyTorch on \d+ validation images.*: (\S+)\n", out)
    assert printed is not None
    assert float(printed[1]) <= 1e-5
    model = load(folder)
    said = about(file)
    assert said["classes"] == list(model.spec.classes)  # type: ignore[union-attr]
    assert said["mean"] == list(model.spec.mean)  # type: ignore[union-attr]
    assert said["std"] == list(model.spec.std)  # type: ignore[union-attr]
    recorded = json.loads((folder / "provenance.json").read_text())
    assert said["training"] == recorded
    printed_classes = [name for name in said["classes"] if repr(name) in ran(program(out))]
    assert printed_classes, "the printed program names no class"
    shape = (3, 16, 16) if kind == "conv" else (1, 28, 28)
    assert said["input"] == f"images: uint8 (n, {', '.join(map(str, shape))}), pixels 0 to 255"
    if format == "safetensors":
        return  # the program is what reads it
    answer = answers(file)
    for count in (1, 2, 5, 33):
        images = some(count, shape)
        expected = model.predict(images).probabilities  # type: ignore[operator]
        torch.testing.assert_close(answer(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "kind", ["conv", *(pytest.param(k, marks=slow) for k in ("perceptron", "shallow"))]
)
def test_html_is_the_page_with_the_network(
    kind: str, run: Callable[[str], Path], export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(kind)
    code, out, err = export("--ckpt_path", folder, "--format", "html")
    assert (code, err) == (0, "")
    text = (folder / "model.html").read_text()
    model: Any = load(folder)
    assert text == self_contained(model)
    images = some(5, model.spec.shape)
    expected = model.predict(images).probabilities
    torch.testing.assert_close(read_back(text)(images), expected, atol=1e-5, rtol=1e-4)
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    ran(program(out))
    assert opened == [(folder / "model.html").absolute().as_uri()]


@slow
def test_html_refuses_a_large_network(run: Callable[[str], Path], export: Export) -> None:
    folder = run("resnet")
    code, out, err = export("--ckpt_path", folder, "--format", "html")
    assert (code, out) == (1, "")
    assert "44.7 MB, and html holds up to 10 MB" in err
    assert " demo --ckpt_path RUN" in err
    assert not (folder / "model.html").exists()


@kinds
def test_the_weights_of_safetensors_are_those_of_the_checkpoint(
    kind: str, run: Callable[[str], Path], export: Export
) -> None:
    from safetensors.torch import load_file

    folder = run(kind)
    assert export("--ckpt_path", folder, "--format", "safetensors")[0] == 0
    weights = load_file(folder / "model.safetensors")
    net: Any = load(folder).net
    assert weights.keys() == net.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in net.state_dict().items())
    if kind == "resnet":  # another training may start from it
        shapes = {name: value.shape for name, value in net.state_dict().items()}
        assert pretrained_tensors(str(folder / "model.safetensors"), shapes)


@pytest.mark.parametrize("side", [28, 14, 20, 32, 224])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_resize_is_that_of_the_data(side: int, channels: int) -> None:
    mean, std = (0.4, 0.5, 0.3)[:channels], (0.2, 0.3, 0.4)[:channels]
    model = ShallowNetwork(4, spec=DataSpec(channels, side, side, mean=mean, std=std)).eval()
    images = some(9, (channels, 28, 28))
    network = Network(SimpleNamespace(model=model, spec=model.spec), images)  # type: ignore[arg-type]
    expected = model.predict(images).probabilities
    torch.testing.assert_close(network(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("format", [pytest.param("onnx", marks=slow), "torch"])
def test_a_file_has_no_path_and_no_image_of_the_user(
    format: str, run: Callable[[str], Path], export: Export
) -> None:
    folder = run("shallow")
    assert export("--ckpt_path", folder, "--format", format)[0] == 0
    file = folder / f"model.{FORMATS[format].ending}"
    parts = {"": file.read_bytes()}
    if format == "torch":
        with zipfile.ZipFile(file) as archive:
            parts |= {name: archive.read(name) for name in archive.namelist()}
        sample = next(content for name, content in parts.items() if "sample_inputs" in name)
        (arguments, _) = torch.load(io.BytesIO(sample), weights_only=False)
        assert not any(tensor.any() for tensor in arguments)
    places = (Path(mnist_lightning.__file__).parent, Path(torch.__file__).parent)
    for content in parts.values():
        assert not [place for place in places if str(place).encode() in content]


@pytest.mark.parametrize("kind", [pytest.param("perceptron", marks=slow), "conv"])
def test_int8_is_smaller_and_its_accuracy_is_printed(
    kind: str, run: Callable[[str], Path], export: Export
) -> None:
    folder = run(kind)
    code, out, err = export("--ckpt_path", folder, "--quantize", "--format", "onnx")
    assert (code, err) == (0, "")
    line = r"int8: accuracy (\S+) on (\d+) validation images, before (\S+); "
    found = re.search(line, out)
    assert found is not None
    after, images, before = map(float, found.groups())
    data = mnist_lightning.MNISTDataModule(
        **mnist_lightning.runs.checkpoints.read(folder / "checkpoints/best.ckpt")[
            "datamodule_hyper_parameters"
        ]
    )
    data.setup("validate")
    pixels, labels = data.val_set.__getitems__(list(range(len(data.val_set))))
    pixels = pixels if pixels.ndim == 4 else pixels.unsqueeze(1)
    file = folder / "model.int8.onnx"
    quantized = answers(file)(pixels).argmax(1)
    full = load(folder).predict(pixels).probabilities.argmax(1)  # type: ignore[operator]
    assert images == len(labels)
    assert after == pytest.approx(float((quantized == labels).float().mean()), abs=1e-4)
    assert before == pytest.approx(float((full == labels).float().mean()), abs=1e-4)
    assert (quantized == full).float().mean() > 0.9
    assert about(file)["classes"] == list(data.spec.classes)
    assert "'" in ran(program(out))
    import onnx

    types = {tensor.data_type for tensor in onnx.load(file).graph.initializer if tensor.dims}
    assert onnx.TensorProto.INT8 in types


@slow
def test_a_run_in_16_bits_is_exported_in_32(run: Callable[[str], Path], export: Export) -> None:
    from safetensors.torch import load_file

    run("shallow")
    shutil.rmtree("lightning_logs")
    folder = train(KINDS["shallow"], "--trainer.precision", "bf16-true")
    assert export("--ckpt_path", folder, "--format", "safetensors")[0] == 0
    weights = load_file(folder / "model.safetensors")
    assert {v.dtype for v in weights.values() if v.is_floating_point()} == {torch.float32}


def test_without_its_images_it_is_compared_on_random_ones(
    run: Callable[[str], Path], export: Export
) -> None:
    folder = run("conv")
    shutil.rmtree("photos")
    code, out, err = export("--ckpt_path", folder, "--format", "torch", "--out", "net.pt2")
    assert code == 0
    assert "the images of the run cannot be read, random ones take their place: photos" in err
    assert "on 256 random images" in out
    assert answers(Path("net.pt2"))(some(3, (3, 16, 16))).shape == (3, 3)
    code, _, err = export("--ckpt_path", folder, "--quantize")
    assert code == 1
    assert "--quantize needs the images of the run" in err.splitlines()[-1]


def test_a_file_with_other_answers_is_not_written(
    run: Callable[[str], Path], export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run("shallow")
    file = folder / "model.pt2"
    file.write_text("an earlier file")
    monkeypatch.setattr(Network, "forward", lambda self, images: self._scores(images).relu())
    code, out, err = export("--ckpt_path", folder, "--format", "torch")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert f"{file} was not written: its probabilities differ from PyTorch's by" in err
    assert file.read_text() == "an earlier file"
    assert not list(folder.glob(".model*"))


# ---- models of the user's own


@pytest.mark.parametrize(
    ("name", "format"),
    [
        *(("Logs", "torch"), ("Scaled", "safetensors")),
        *(pytest.param(name, "torch", marks=slow) for name in ("Shares", "Scaled")),
        *(pytest.param(name, "safetensors", marks=slow) for name in ("Logs", "Shares")),
        pytest.param("Scaled", "onnx", marks=slow),
    ],
)
def test_a_model_of_ones_own(
    name: str, format: str, own: Callable[[str], Path], export: Export
) -> None:
    folder = own(name)
    model = ("--model", f"my_exports.{name}")
    code, out, err = export("--ckpt_path", folder, *model, "--format", format)
    assert (code, err) == (0, "")
    assert "[" in ran(program(out))
    if format != "safetensors":
        answer = answers(folder / f"model.{FORMATS[format].ending}")
        shares = answer(some(4, (1, 28, 28))).sum(1)
        torch.testing.assert_close(shares, torch.ones(4))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("Mute", "export needs a forward, which Mute does not have"),
        ("Branches", "Branches cannot be written as torch: Could not guard on data-dependent"),
        ("Other", "was not written: its probabilities differ from PyTorch's"),
    ],
)
def test_a_model_of_ones_own_that_cannot_be_exported(
    name: str, part: str, own: Callable[[str], Path], export: Export
) -> None:
    folder = own(name)
    code, out, err = export("--ckpt_path", folder, "--trust", "--format", "torch")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert part in err


# ---- wrong commands

WRONG: list[tuple[str, list[str]]] = [
    ("", ["export needs trained weights", "--ckpt_path"]),
    ("--ckpt_path nowhere", ["--ckpt_path nowhere", "there is no file or folder"]),
    ("--ckpt_path RUN --format pdf", ["'pdf'", "onnx", "torch", "safetensors"]),
    ("--ckpt_path RUN --colour", ["no option --colour", "--help"]),
    ("--ckpt_path RUN stray", ["--ckpt_path stray", "no file or folder stray"]),
    ("--ckpt_path RUN --format torch --quantize", ["--quantize is for --format onnx", "torch"]),
    ("--ckpt_path RUN --out photos", ["photos cannot be written: it is a folder", "--out FILE"]),
    ("--ckpt_path RUN --out no/a.onnx", ["no/a.onnx cannot be written", "no folder no"]),
    ("--ckpt_path RUN --out a.txt/b", ["a.txt/b cannot be written", "no folder a.txt"]),
    ("--ckpt_path RUN --model my.Net", ["holds a Perceptron, not a Net"]),
]


@pytest.mark.parametrize(("words", "parts"), WRONG, ids=[words for words, _ in WRONG])
def test_a_wrong_command_is_refused(
    words: str, parts: list[str], run: Callable[[str], Path], export: Export
) -> None:
    folder = run("perceptron")
    Path("a.txt").touch()
    before = sorted(Path().rglob("*"))
    code, out, err = export(*(folder if word == "RUN" else word for word in words.split()))
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith("error: ")
    for part in parts:
        assert part in err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("package", FORMATS["onnx"].packages)
def test_a_missing_package_is_named_with_what_installs_it(
    package: str, run: Callable[[str], Path], export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run("perceptron")
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = export("--ckpt_path", folder)
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"error: export needs {package}: \S* -m pip install .*\[export\]'?\n", err)


def test_a_damaged_checkpoint_is_refused(run: Callable[[str], Path], export: Export) -> None:
    folder = run("perceptron")
    for file in (folder / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    code, _, err = export("--ckpt_path", folder)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "is truncated, or not a checkpoint" in err


def test_the_greatest_difference_counts_over_all_batch_sizes() -> None:
    reference = torch.zeros(256, 2)

    def wrong_alone(images: Tensor) -> Tensor:
        return reference[: len(images)] + (0.5 if len(images) == 7 else 0.0)

    images = torch.zeros(256, 1, 2, 2, dtype=torch.uint8)
    assert command._difference(wrong_alone, images, reference) == 0.5

    def undefined(images: Tensor) -> Tensor:
        return reference[: len(images)] * (float("nan") if len(images) == 1 else 1.0)

    assert not command._difference(undefined, images, reference) <= 1.0
