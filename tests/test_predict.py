"""``predict`` with files, folders and standard input: as ``Classifier.predict``, and nothing fails.

Also for models of the user's own, for what is no image, and for programs that read JSON.
"""

import csv
import io
import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mnist_lightning import load
from mnist_lightning.__main__ import main
from mnist_lightning.deploy import pictures, sheet
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.words import split_paths

Printed = pytest.CaptureFixture[str]
Predict = Callable[..., tuple[int, str, str]]

OWN = """
import torch
from lightning.pytorch import LightningModule
from torch import nn


class Plain(LightningModule):
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


class Mute(Plain):
    forward = LightningModule.forward

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


class Picky(Plain):
    def predict_step(self, batch, batch_idx):
        raise RuntimeError("only on Sundays")
"""


def train(folder: Path, *words: str) -> Path:
    """Trains for a few steps; returns the folder of the run."""
    quick = "--trainer.max_epochs 1 --trainer.limit_train_batches 20 --trainer.accelerator cpu"
    command = ["fit", *words, *quick.split(), "--trainer.enable_progress_bar", "false"]
    assert main([*command, "--trainer.default_root_dir", str(folder)]) == 0
    (run,) = folder.glob("lightning_logs/*/version_0")
    return run


def digit(seed: int = 0) -> Image.Image:
    """A photographed stroke on bright paper."""
    pixels = np.full((60, 50), 240, np.uint8)
    pixels[10:50, 20 + seed : 27 + seed] = 30
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    digits = ["--data.source", "digits", "--model.hidden_units", "8"]
    return train(tmp_path_factory.mktemp("shallow"), "--config", "shallow.yaml", *digits)


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ConvNetwork of colour photographs, whose names of classes are hostile."""
    folder = tmp_path_factory.mktemp("colour")
    generator = np.random.default_rng(0)
    for channel, name in enumerate(("=red", "green\x1b[2J", "blue")):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(10):
            pixels = generator.integers(0, 120, (24, 20, 3), np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.png")
    data = ["--data.source", "folder", "--data.data_dir", str(folder / "photos")]
    net = ["--model", "ConvNetwork", "--model.widths", "[4, 8]", "--data.image_size", "16"]
    return train(folder, *net, *data)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MNIST_DATA_DIR", raising=False)
    yield
    sys.modules.pop("my_nets", None)


@pytest.fixture
def predict(capsys: Printed) -> Predict:
    """Runs the command; returns its exit code, output and errors."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["predict", *map(str, words)])
        return code, *capsys.readouterr()

    return run


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


# ---- answers


def test_files_and_folders_are_labelled_as_by_the_loaded_model(
    shallow: Path, predict: Predict
) -> None:
    Path("photos/more").mkdir(parents=True)
    files = ["one.png", "photos/a.JPG", "photos/b.png", "photos/more/c.webp"]
    for seed, file in enumerate(files):
        digit(seed).save(file)
    Path("photos/notes.txt").write_text("no image")
    code, out, err = predict("--ckpt_path", shallow, "one.png", "photos", "--out", "answers")
    assert (code, err) == (0, "")
    model = load(shallow)
    assert isinstance(model, Classifier)
    expected = model.predict(files)
    table = rows(Path("answers/predictions.csv"))
    assert [row["image"] for row in table] == files
    assert [row["predicted"] for row in table] == expected.classes
    found = torch.tensor([[float(row[f"p({name})"]) for name in "0123456789"] for row in table])
    torch.testing.assert_close(found, expected.probabilities, atol=1e-6, rtol=1e-4)
    for line, file, answer in zip(
        out.splitlines()[2:], files, expected.probabilities, strict=False
    ):
        likeliest = answer.topk(3)
        pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        assert line.split() == [file, *(cell for k, p in pairs for cell in (str(k), f"{p:.4f}"))]
    assert "answers/predictions.csv" in out
    with Image.open("answers/predictions.png") as drawing:
        assert drawing.width > 4 * 112  # four images side by side


def test_without_out_it_writes_into_the_run(shallow: Path, predict: Predict) -> None:
    digit().save("one.png")
    run = Path(shutil.copytree(shallow, "lightning_logs/mine/version_0"))
    assert predict("one.png", "--ckpt_path", "mine")[0] == 0
    assert len(rows(run / "predictions.csv")) == 1
    assert (run / "predictions.png").is_file()


def test_colour_images_and_hostile_names(colour: Path, predict: Predict) -> None:
    generator = np.random.default_rng(1)
    Path("new").mkdir()
    for name in ("=1+1.png", "@x.png", "\x1b[2J.png"):
        Image.fromarray(generator.integers(0, 255, (30, 40, 3), np.uint8)).save("new/a.png")
        Path("new/a.png").rename(Path("new") / name)
    code, out, err = predict("--ckpt_path", colour, "new", "--out", ".")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    table = rows(Path("predictions.csv"))
    assert set(table[0]) == {
        *("image", "predicted", "probability"),
        *("p(=red)", "p(green\\x1b[2J)", "p(blue)"),
    }
    assert {row["image"] for row in table} == {"new/=1+1.png", "new/@x.png", "new/\\x1b[2J.png"}
    assert {row["predicted"] for row in table} <= {"'=red", "green\\x1b[2J", "blue"}
    files = sorted(map(str, Path("new").iterdir()))
    expected = load(colour).predict(files).probabilities  # type: ignore[operator]
    found = [[float(row[key]) for key in list(row)[3:]] for row in table]
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-6, rtol=1e-4)


def test_json_is_all_that_standard_output_has(shallow: Path, predict: Predict) -> None:
    digit(1).save("one.png")
    digit(2).save("two.png")
    Path("bad.png").write_text("no image")
    before = sorted(shallow.iterdir())
    words = ("--json", "one.png", "bad.png", "two.png")
    code, out, err = predict("--ckpt_path", shallow, *words)
    answers = [json.loads(line) for line in out.splitlines()]
    expected = load(shallow).predict(["one.png", "two.png"])  # type: ignore[operator]
    assert code == 1
    assert err == (
        "error: bad.png cannot be read as an image: put a good copy there, or remove it\n"
    )
    assert [answer["image"] for answer in answers] == ["one.png", "two.png"]
    assert [answer["predicted"] for answer in answers] == expected.classes
    for answer, probabilities in zip(answers, expected.probabilities.tolist(), strict=True):
        assert list(answer["probabilities"]) == list("0123456789")
        assert list(answer["probabilities"].values()) == pytest.approx(probabilities, rel=1e-5)
        assert answer["probability"] == max(answer["probabilities"].values())
    assert sorted(shallow.iterdir()) == before  # files only with --out


class _Stdin(io.StringIO):
    def __init__(self, content: bytes, terminal: bool = False) -> None:
        super().__init__()
        self._bytes, self._terminal = io.BytesIO(content), terminal

    @property
    def buffer(self) -> io.BytesIO:
        return self._bytes

    def isatty(self) -> bool:
        return self._terminal


def test_standard_input_is_one_image(
    shallow: Path, predict: Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    digit().save("one.png")
    monkeypatch.setattr(sys, "stdin", _Stdin(Path("one.png").read_bytes()))
    code, out, _ = predict("--ckpt_path", shallow, "-", "one.png", "--json")
    piped, read = (json.loads(line) for line in out.splitlines())
    assert code == 0
    assert piped.pop("image") == "-"
    assert read.pop("image") == "one.png"
    assert piped == read


@pytest.mark.parametrize(
    ("stdin", "part"),
    [
        (_Stdin(b""), "standard input is empty: pipe an image"),
        (_Stdin(b"", terminal=True), "pipe one into this command"),
        (_Stdin(b"no image"), "standard input cannot be read as an image"),
        (_Stdin(b"%PDF-1.7"), "standard input is a PDF"),
    ],
    ids=["empty", "terminal", "no image", "PDF"],
)
def test_standard_input_that_is_no_image(
    shallow: Path, predict: Predict, monkeypatch: pytest.MonkeyPatch, stdin: _Stdin, part: str
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    code, out, err = predict("--ckpt_path", shallow, "-")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert part in err


def test_many_images_are_shortened_on_screen_and_sheet_not_in_the_table(
    shallow: Path, predict: Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheet, "MOST", 5)
    Path("many").mkdir()
    for number in range(70):  # more than are read at once
        digit(number % 20).save(f"many/{number:02}.png")
    code, out, _ = predict("--ckpt_path", shallow, "many", "--out", "out")
    assert code == 0
    assert "... and 50 more" in out
    assert "predictions.png, the first 5 of 70" in out
    assert [row["image"] for row in rows(Path("out/predictions.csv"))] == [
        f"many/{number:02}.png" for number in range(70)
    ]


def test_the_sheet_shows_what_the_network_sees() -> None:
    drawn = sheet.ContactSheet()
    image = torch.zeros(3, 4, 4)
    image[0, :2] = 1.0  # red above, black below
    drawn.add(image, "a name that is far too long for the width of one image", "日本")
    with Image.open(io.BytesIO(drawn.png())) as opened:
        pixels = np.asarray(opened)
    red, black = (pixels == colour for colour in ([255, 0, 0], [0, 0, 0]))
    assert (red.all(2).sum(), black.all(2)[: 8 + 112].sum()) == (112 * 56, 112 * 56)


# ---- what is no image


def _huge_png(side: int) -> bytes:
    """The start of a PNG with a square of so many pixels a side, and almost no data."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 10)), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


NO_IMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("vector.svg", lambda f: f.write_text('<svg xmlns="x"/>'), "is an SVG"),
    ("xml.png", lambda f: f.write_text('\ufeff <?xml version="1.0"?><svg/>'), "is an SVG"),
    ("paper.pdf", lambda f: f.write_bytes(b"%PDF-1.7\n"), "is a PDF"),
    ("script.png", lambda f: f.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "is PostScript"),
    ("empty.png", lambda f: f.touch(), "is empty"),
    ("text.jpg", lambda f: f.write_text("no image"), "cannot be read as an image"),
    ("settings.json", lambda f: f.write_text("{"), "cannot be read as an image"),
    ("cut.png", lambda f: f.write_bytes(_huge_png(20)[:-20]), "cannot be read as an image"),
    ("huge.png", lambda f: f.write_bytes(_huge_png(31_623)), "50,000,000 pixels"),  # 1e9
    ("large.png", lambda f: f.write_bytes(_huge_png(10_000)), "50,000,000 pixels"),
    ("none.png", lambda f: None, "there is no such file or folder"),
    ("x" * 300, lambda f: None, "file name too long"),
    ("pipe.png", os.mkfifo, "is not a regular file"),
    ("folder", lambda f: f.mkdir(), "has no images"),
    ("gone.png", lambda f: f.symlink_to("nowhere"), "there is no such file or folder"),
]


@pytest.mark.parametrize("run", ["shallow", "colour"])
def test_what_is_no_image_gets_its_line_and_the_others_go_on(
    run: str, predict: Predict, request: pytest.FixtureRequest
) -> None:
    for name, make, _ in NO_IMAGES:
        make(Path(name))
    digit().save("good.png")
    names = [name for name, *_ in NO_IMAGES]
    words = (*names[:7], "good.png", *names[7:], "--json")
    code, out, err = predict("--ckpt_path", request.getfixturevalue(run), *words)
    assert code == 1
    assert [json.loads(line)["image"] for line in out.splitlines()] == ["good.png"]
    assert len(err.splitlines()) == len(NO_IMAGES)
    for line, (name, _, part) in zip(err.splitlines(), NO_IMAGES, strict=True):
        assert line.startswith("error: ")
        assert name in line
        assert part in line


def test_a_blank_drawing_has_its_line(shallow: Path, predict: Predict) -> None:
    Image.new("L", (50, 50), 255).save("blank.png")
    code, out, err = predict("--ckpt_path", shallow, "blank.png", "--out", "out")
    assert (code, out) == (1, "")
    assert "blank.png shows nothing" in err
    assert not list(Path("out").iterdir())


# ---- wrong commands

WRONG: list[tuple[str, list[str]]] = [
    ("one.png", ["needs trained weights: --ckpt_path"]),
    ("one.png --ckpt_path nowhere", ["--ckpt_path nowhere", "there is no file or folder"]),
    ("--ckpt_path RUN --json", ["which images?", "standard input"]),
    ("--ckpt_path RUN one.png --jsn", ["no option --jsn", "did you mean --json?"]),
    ("--ckpt_path RUN one.png --data.split study", ["no option --data.split", "without PATH"]),
    ("--ckpt_path RUN one.png --config shallow", ["no option --config", "--out, --json"]),
    ("--ckpt_path RUN one.png --out one.png", ["one.png cannot be written", "--out DIR"]),
    ("--ckpt_path RUN one.png --out one.png/in", ["one.png/in cannot be written", "--out DIR"]),
    ("--ckpt_path RUN one.png --model torch.nn.Linear", ["holds a ShallowNetwork, not a Linear"]),
    ("--ckpt_path RUN one.png --model my_nets.Other", ["holds a ShallowNetwork, not a Other"]),
    ("--ckpt_path RUN one.png --model ShallowNetwork", ["--model ShallowNetwork", "Leave it out"]),
]


@pytest.mark.parametrize(("words", "parts"), WRONG, ids=[words for words, _ in WRONG])
def test_a_wrong_command_is_refused(
    words: str, parts: list[str], shallow: Path, predict: Predict
) -> None:
    digit().save("one.png")
    code, out, err = predict(*(str(shallow) if w == "RUN" else w for w in words.split()))
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith("error: ")
    for part in parts:
        assert part in err
    assert sorted(map(str, Path().iterdir())) == ["one.png"]


def test_help_is_of_the_new_way_and_names_the_other(predict: Predict, capsys: Printed) -> None:
    with pytest.raises(SystemExit) as end:
        predict("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "[PATH ...]" in text
    assert text.endswith("predict --help --config shallow\n")  # on one line, to be pasted


@pytest.mark.parametrize(
    ("words", "options", "paths"),
    [
        ("a --ckpt_path run b", "--ckpt_path run", "a b"),
        ("--ckpt_path=run a", "--ckpt_path=run", "a"),
        ("--json a --trust b", "--json --trust", "a b"),
        ("--data.predict_dir photos --model.lr -1", "--data.predict_dir photos --model.lr -1", ""),
        ("- --out x -- --json.png", "--out x", "- --json.png"),
        ("--ckpt_path run", "--ckpt_path run", ""),
    ],
)
def test_paths_are_told_from_options(words: str, options: str, paths: str) -> None:
    assert split_paths(words.split()) == (options.split(), paths.split())


# ---- models of the user's own


@pytest.fixture
def own(tmp_path: Path) -> Callable[[str], Path]:
    """Trains one of the classes above."""
    Path("my_nets.py").write_text(OWN)

    def run(name: str) -> Path:
        return train(tmp_path, "--model", f"my_nets.{name}", "--data.source", "digits")

    return run


def test_a_plain_lightning_module_answers(
    own: Callable[[str], Path], predict: Predict, tmp_path: Path
) -> None:
    run = own("Plain")
    digit().save("one.png")
    for flag in (("--model", "my_nets.Plain"), ("--trust",)):
        code, out, err = predict("--ckpt_path", run, "one.png", "--json", *flag)
        assert (code, err) == (0, "")
        answer = json.loads(out)
        import my_nets  # type: ignore[import-not-found]

        model = load(run, my_nets.Plain)
        pixels = pictures.read("one.png", pictures.DataSpec())[None].float() / 255
        expected = model(pixels).exp()[0].tolist()
        assert list(answer["probabilities"].values()) == pytest.approx(expected, rel=1e-4)
    sys.modules.pop("my_nets")
    code, _, err = predict("--ckpt_path", run, "one.png")
    assert code == 1
    assert "If you trust it: --model my_nets.Plain" in err
    assert "my_nets" not in sys.modules


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("Mute", "predict needs a forward or a predict_step, and Mute has neither"),
        ("Picky", "Picky fails on images of 1 x 28 x 28: RuntimeError: only on Sundays"),
    ],
)
def test_a_module_that_cannot_answer_says_so(
    name: str, part: str, own: Callable[[str], Path], predict: Predict
) -> None:
    run = own(name)
    digit().save("one.png")
    code, out, err = predict("--ckpt_path", run, "one.png", "--model", f"my_nets.{name}")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert part in err
