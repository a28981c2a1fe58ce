"""Untrusted files: they cannot run code, remove files, or exhaust the machine."""

import csv
import gzip
import json
import math
import os
import shutil
import signal
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from test_bad_input import BAD_CHECKPOINTS, RunsCode, changed, saved

from mnist_lightning.__main__ import main
from mnist_lightning.files import csv_cell

SEARCH = Path(__file__).parent.parent / "lightning_logs" / "study" / "shallow_random"
# a file for the rows of the table in benchmarks/reliability.md: the answer to each input
KEEP = os.environ.get("HOSTILE_ROWS")

QUICK = ("--data.source", "digits", "--trainer.accelerator", "cpu")
QUICK += ("--trainer.enable_progress_bar", "false")
FIT = ("fit", "--config", "shallow.yaml", *QUICK, "--model.hidden_units", "4")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own working directory, no MNIST and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MNIST_DATA_DIR", raising=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    words = [*FIT, "--trainer.max_epochs", "1", "--trainer.default_root_dir", str(folder)]
    assert main(words) == 0
    return folder / "lightning_logs" / "shallow" / "version_0"


@pytest.fixture
def run(trained: Path) -> Path:
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(trained, Path("lightning_logs/shallow/version_0")))


# ---- a checkpoint names the files that a resumed training removes


def edit_states(file: Path, monitor: str | None, **entries: Any) -> None:
    """Changes the state of the ModelCheckpoint with this monitor within a checkpoint."""
    content = torch.load(file, weights_only=True)
    for state in content["callbacks"].values():
        if "best_k_models" in state and state["monitor"] == monitor:
            state.update(entries)
    torch.save(content, file)


def home() -> Path:
    folder = Path("home").absolute()
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    return folder


@pytest.mark.parametrize("best", ["gone.ckpt", "", "best.ckpt"])
@pytest.mark.parametrize(
    "place", ["local://{home}", "{home}", "../../../../home", "..", "file://{home}"]
)
@pytest.mark.parametrize("monitor", ["val/acc", None])
def test_a_checkpoint_removes_nothing_that_it_names(
    run: Path, best: str, place: str, monitor: str | None
) -> None:
    folder, last = home(), run / "checkpoints" / "last.ckpt"
    place = place.format(home=folder)
    edit_states(
        last,
        monitor,
        dirpath=str((run / "checkpoints").absolute()),
        best_model_path=place if monitor is None else best,
        kth_best_model_path=place,
        last_model_path=place,
        best_model_score=torch.tensor(-1.0),
        best_k_models={place: torch.tensor(-1.0)},
    )
    before = set(run.rglob("*"))
    assert main(["fit", "--ckpt_path", str(last), *QUICK, "--trainer.max_epochs", "2"]) == 0
    assert (folder / "thesis.txt").read_text() == "years of work"
    assert before <= set(run.rglob("*"))


@pytest.fixture
def further(tmp_path: Path) -> Path:
    """The last.ckpt of two epochs with a ModelCheckpoint of the user's own, which keeps two."""
    own = ("lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.monitor=val/loss")
    own += ("--trainer.callbacks.save_top_k=2", "--trainer.callbacks.filename=own/{epoch}")
    words = [*FIT, "--trainer.max_epochs", "2", "--trainer.callbacks", *own]
    assert main(words) == 0
    return Path("lightning_logs/shallow/version_0/checkpoints/last.ckpt")


def test_a_further_checkpoint_callback_goes_on_with_its_own_files(further: Path) -> None:
    assert main(["fit", "--ckpt_path", str(further), "--trainer.max_epochs", "3"]) == 0
    kept = sorted(file.name for file in (further.parent / "own").iterdir())
    assert kept == ["epoch=1.ckpt", "epoch=2.ckpt"]  # the loss falls with every epoch


@pytest.mark.parametrize("place", ["local://{home}", "{home}", "..", "own/../../../../../../home"])
def test_a_further_checkpoint_callback_removes_nothing_of_others(further: Path, place: str) -> None:
    folder = home()
    place = place.format(home=folder)
    score = torch.tensor(99.0)
    paths = dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), place)
    scores = {place: score, str(further.parent.absolute() / "own" / "epoch=1.ckpt"): score}
    edit_states(further, "val/loss", **paths, best_k_models=scores, kth_value=score)
    assert main(["fit", "--ckpt_path", str(further), "--trainer.max_epochs", "3"]) == 0
    assert (folder / "thesis.txt").read_text() == "years of work"
    assert further.is_file()


# ---- files that name classes


STRANGER = """
import pathlib

import mnist_lightning
from lightning.pytorch import Callback

pathlib.Path(__file__).with_name("code-was-run").touch()


class Net(mnist_lightning.ShallowNetwork):
    pass


class Watcher(Callback):
    pass
"""


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module in the working folder that leaves a trace when it is imported."""
    name = f"stranger{next(COUNT)}"
    Path(f"{name}.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    yield name
    sys.modules.pop(name, None)


COUNT = count()


def name_in_run(run: Path, key: str, value: Any) -> None:
    """Replaces settings in the run's config.yaml."""
    config = part = yaml.safe_load((run / "config.yaml").read_text())
    *path, last = key.split(".")
    for name in path:
        part = part[name]
    part[last] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


PLACES: dict[str, Any] = {
    "model": ("model", lambda m: {"class_path": f"{m}.Net", "init_args": {}}),
    "callback": ("trainer.callbacks", lambda m: [{"class_path": f"{m}.Watcher"}]),
    "callback as text": ("trainer.callbacks", lambda m: f"{m}.Watcher"),
    "logger": ("trainer.logger", lambda m: {"class_path": f"{m}.Watcher"}),
    "strategy": ("trainer.strategy", lambda m: {"class_path": f"{m}.Watcher"}),
    "profiler": ("trainer.profiler", lambda m: {"class_path": f"{m}.Watcher"}),
    "plugins": ("trainer.plugins", lambda m: [{"class_path": f"{m}.Watcher"}]),
    "accelerator": ("trainer.accelerator", lambda m: {"class_path": f"{m}.Watcher"}),
    "within a callback": (
        "trainer.callbacks",
        lambda m: [
            {
                "class_path": "lightning.pytorch.callbacks.LambdaCallback",
                "init_args": {"on_fit_start": f"{m}.Watcher"},
            }
        ],
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_configuration_of_a_run_names_no_class_of_a_stranger(
    run: Path, stranger: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key, value = PLACES[place]
    name_in_run(run, key, value(stranger))
    words = ["fit", "--ckpt_path", f"{run}/last", "--trainer.max_epochs", "2"]
    assert main(words) == 1
    text = capsys.readouterr().err
    assert not Path("code-was-run").exists()
    assert f"{stranger}." in text
    assert text.endswith(f"python -m mnist_lightning {' '.join(words)} --trust\n")


@pytest.mark.parametrize("words", [["--trust"], ["--trainer.callbacks+={stranger}.Watcher"]])
def test_what_the_user_trusts_or_names_is_imported(
    run: Path, stranger: str, words: list[str]
) -> None:
    name_in_run(run, "trainer.callbacks", [{"class_path": f"{stranger}.Watcher"}])
    words = [word.format(stranger=stranger) for word in words]
    assert main(["fit", "--ckpt_path", f"{run}/last", "--trainer.max_epochs", "2", *words]) == 0
    assert Path("code-was-run").exists()


@pytest.mark.parametrize("words", [[], ["--trust"], ["--model", "{stranger}.Net"]])
def test_a_checkpoint_names_no_class_of_a_stranger(
    run: Path, stranger: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "checkpoints" / "best.ckpt"
    torch.save({**torch.load(file, weights_only=True), "model_class": f"{stranger}.Net"}, file)
    words = [word.format(stranger=stranger) for word in words]
    assert main(["test", "--ckpt_path", str(file), *words]) == (0 if words else 1)
    assert Path("code-was-run").exists() == bool(words)
    text = capsys.readouterr().err
    assert words or f"test --ckpt_path {file} --trust" in text


@pytest.mark.parametrize("path", ["os.Net", "antigravity.Net", "sys.exit", "jsonargparse.CLI"])
def test_nobody_imports_the_standard_library_as_a_model(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text(f"model: {path}\nspace: {{lr: [0.1]}}\nfixed: {{max_epochs: 1}}\n")
    for command in ("fit", "search"):
        assert main([command, "--config", "mine.yaml"]) == 1
        assert path in capsys.readouterr().err
    assert "antigravity" not in sys.modules


def test_a_configuration_of_the_user_names_the_users_classes(stranger: str) -> None:
    config = {
        "model": {"class_path": f"{stranger}.Net", "init_args": {"hidden_units": 4}},
        "trainer": {"callbacks": [{"class_path": f"{stranger}.Watcher"}]},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "mine.yaml", *QUICK, "--trainer.max_epochs", "1"]) == 0


# ---- hostile and damaged files, all refused in a line or two


def pipe(file: Path) -> None:
    """A named pipe that nobody writes to: opening it waits forever."""
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def zipped(bomb: int = 0) -> Callable[[Path], None]:
    """The same archive, compressed, with this many additional zeros."""

    def change(file: Path) -> None:
        with zipfile.ZipFile(file) as archive:
            content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        name = next(iter(content)).partition("/")[0]
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry, data in content.items():
                archive.writestr(entry, data)
            if bomb:
                archive.writestr(f"{name}/data/99", bytes(bomb))

    return change


def weight(value: Callable[[torch.Tensor], Any]) -> Callable[[Path], None]:
    """Replaces one tensor of the state dict."""

    def change(file: Path) -> None:
        content = torch.load(file, weights_only=True)
        tensors = content.get("state_dict", content)
        name = next(name for name in tensors if name.endswith(".weight"))
        tensors[name] = value(tensors[name])
        torch.save(content, file)

    return change


def entry(section: str, **values: Any) -> Callable[[Path], None]:
    """Replaces entries in a section of the checkpoint; ``None`` removes one."""

    def change(file: Path) -> None:
        content = torch.load(file, weights_only=True)
        content[section] = {**content[section], **values}
        content[section] = {k: v for k, v in content[section].items() if v is not None}
        torch.save(content, file)

    return change


def flipped(file: Path) -> None:
    """Flips one bit in the middle of the weights."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)


def text(content: str | bytes) -> Callable[[Path], Any]:
    data = content.encode() if isinstance(content, str) else content
    return lambda file: file.write_bytes(data)


def every_state(value: Any) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        content = torch.load(file, weights_only=True)
        content["callbacks"] = dict.fromkeys(content["callbacks"], value)
        torch.save(content, file)

    return change


def named(value: Callable[[], dict[str, Any]]) -> Callable[[Path], None]:
    return lambda file: torch.save({**torch.load(file, weights_only=True), **value()}, file)


def nested(depth: int) -> Any:
    value: Any = [1]
    for _ in range(depth):
        value = [value, value]
    return value


def picture(size: tuple[int, int]) -> Callable[[Path], None]:
    return lambda file: Image.new("1", size).save(file)


def declared(width: int, height: int) -> Callable[[Path], None]:
    """A PNG whose header declares this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    return text(data + struct.pack(">I", zlib.crc32(header)))


def trial(**values: Any) -> Callable[[Path], None]:
    """The trials of a search; the first has other values."""

    def change(file: Path) -> None:
        trials = json.loads(file.read_text())
        trials[0].update(values)
        file.write_text(json.dumps(trials))

    return change


ALIASES = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in pairwise("abcdefghij")
)
CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    **BAD_CHECKPOINTS,
    "compressed": (zipped(), "compressed"),
    "a zip bomb": (zipped(50_000_000), "compressed"),
    "a pipe": (pipe, "no file or folder"),
    "a folder": (folder, "no checkpoints/best.ckpt"),
    "a weight that is not a number": (weight(lambda t: t * math.nan), "not a number"),
    "weights of 8 bits": (weight(lambda t: t.to(torch.int8)), "torch.int8"),
    "complex weights": (weight(lambda t: t.to(torch.complex64)), "torch.complex64"),
    "sparse weights": (weight(lambda t: t.to_sparse()), "not a dense tensor"),
    "whole numbers for weights": (weight(lambda t: t.long()), "contradicts itself"),
    "4 TB from 4 bytes": (
        weight(lambda t: torch.zeros(1).expand(10**6, 10**6)),
        "larger than its data",
    ),
    "a text for a weight": (weight(lambda t: "weights"), "not a mapping of names to tensors"),
    "weights of another shape": (weight(lambda t: t[:1].clone()), "contradicts itself"),
    "10^9 hidden units": (entry("hyper_parameters", hidden_units=10**9), "contradicts itself"),
    "10^18 hidden units": (entry("hyper_parameters", hidden_units=10**18), "refuses its hyper"),
    "-1 hidden units": (entry("hyper_parameters", hidden_units=-1), "refuses its hyper"),
    "a text for hidden units": (entry("hyper_parameters", hidden_units="4"), "refuses its hyper"),
    "a list of 2^40 hidden units": (
        entry("hyper_parameters", hidden_units=nested(40)),
        "are not settings",
    ),
    "a learning rate of text": (entry("hyper_parameters", lr="0.1"), "refuses its hyper"),
    "a class for a learning rate": (
        entry("hyper_parameters", lr={"class_path": "os.system", "init_args": {"command": "ls"}}),
        "refuses its hyper",
    ),
    "an unknown hyper-parameter": (entry("hyper_parameters", zz=1), "refuses its hyper"),
    "a tensor for a hyper-parameter": (
        entry("hyper_parameters", lr=torch.tensor(0.1)),
        "are not settings",
    ),
    "no facts of the data": (changed(datamodule_hyper_parameters=None), "--data.split"),
    "no split": (entry("datamodule_hyper_parameters", split=None), "--data.split"),
    "no normalization": (entry("datamodule_hyper_parameters", normalization=None), "normalization"),
    "an unknown fact": (entry("datamodule_hyper_parameters", zz=1), "setting of the data: zz"),
    "an unknown split": (entry("datamodule_hyper_parameters", split="all"), "split"),
    "a set of elsewhere": (entry("datamodule_hyper_parameters", name="../x"), "name"),
    "mini-batches of no image": (entry("datamodule_hyper_parameters", batch_size=0), "batch_size"),
    "images of 10^9 pixels a side": (
        entry("datamodule_hyper_parameters", image_size=10**9),
        "image_size",
    ),
    "a tensor for a folder": (
        entry("datamodule_hyper_parameters", data_dir=torch.ones(1)),
        "are not settings",
    ),
    "the facts as a list": (changed(datamodule_hyper_parameters=[1]), "are not settings"),
    "a class of the system": (changed(model_class="os.system"), "not known here"),
    "a class of PyTorch": (changed(model_class="torch.nn.Linear"), "not known here"),
    "a class without a name": (changed(model_class=""), "not known here"),
    "a class that steers the terminal": (changed(model_class="\x1b[2J\x07.x"), "\\x1b[2J"),
}
RESUMED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no optimizer": (changed(optimizer_states=None), "holds weights only"),
    "an empty list of optimizers": (changed(optimizer_states=[]), "holds weights only"),
    "an empty optimizer": (changed(optimizer_states=[{}]), "empty optimizer state"),
    "an optimizer of text": (changed(optimizer_states=["sgd"]), "empty optimizer state"),
    "an optimizer of other weights": (
        changed(optimizer_states=[{"state": {}, "param_groups": [{"params": [0], "lr": 0.1}]}]),
        "cannot be resumed",
    ),
    "no callbacks": (changed(callbacks=None), "no usable callbacks"),
    "empty callbacks": (changed(callbacks={}), "no usable callbacks"),
    "callbacks as a list": (changed(callbacks=[1]), "no usable callbacks"),
    "callbacks of no state": (every_state({"zz": 1}), "cannot be resumed"),
    "callbacks of text": (every_state("zz"), "cannot be resumed"),
    "no loops": (changed(loops=None), "no usable loops"),
    "empty loops": (changed(loops={}), "no usable loops"),
    "a loop without a state": (changed(loops={"fit_loop": {}}), "no usable loops"),
    "an epoch of text": (changed(epoch="1"), "no usable epoch"),
    "no step": (changed(global_step=None), "no usable global_step"),
    "schedulers of text": (changed(lr_schedulers="x"), "no usable lr_schedulers"),
    "an unknown Lightning": (
        changed(**{"pytorch-lightning_version": "x"}),
        "no version of Lightning",
    ),
}
WEIGHTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (flipped, "wrong checksum"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-1000]), "damaged"),
    "compressed": (zipped(), "compressed"),
    "a zip bomb": (zipped(50_000_000), "compressed"),
    "not a number": (weight(lambda t: t * math.nan), "not a number"),
    "of 8 bits": (weight(lambda t: t.to(torch.int8)), "torch.int8"),
    "complex": (weight(lambda t: t.to(torch.complex64)), "torch.complex64"),
    "4 TB from 4 bytes": (
        weight(lambda t: torch.zeros(1).expand(10**6, 10**6)),
        "larger than its data",
    ),
    "a pipe": (pipe, "not a regular file"),
    "a folder": (folder, "no file"),
    "no state dict": (saved([1, 2]), "not a state dict"),
    "code": (saved({"more": RunsCode()}), "holds code"),
    "random bytes": (text(bytes(range(256)) * 9), "weights.pth"),
}
CONFIGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "aliases that stand for 10^10 values": (text(ALIASES), "expand to more than"),
    "an alias of itself": (text("a: &a [*a]\n"), "expand to more than"),
    "a megabyte": (text("# " + "x" * 10**6), "has more than"),
    "100,000 brackets": (text("a: " + "[" * 10**5), "not a YAML file"),
    "an object of Python": (text("!!python/object/apply:os.mkdir [code-was-run]\n"), "not a YAML"),
    "no text": (text(b"model: \xff\xfe"), "not a YAML file"),
    "control characters": (text("model: \x00\x1b[2J"), "not a YAML file"),
    "a day that is none": (text("model: 2024-99-99"), "not a YAML file"),
    "a pipe": (pipe, "is not a regular file"),
    "a folder": (folder, "no such file"),
    "a class of the system": (text("model: {class_path: os.Net}"), "os.Net"),
    "a callback of the system": (
        text("model: Perceptron\ntrainer: {callbacks: [{class_path: subprocess.Popen}]}"),
        "subprocess.Popen",
    ),
    "a model for a callback": (
        text("model: Perceptron\ntrainer: {callbacks: [{class_path: torch.nn.Linear}]}"),
        "torch.nn.Linear",
    ),
    "a number for a model": (text("model: 7"), "model"),
    "an unknown section": (text("model: Perceptron\nzz: 1"), "zz"),
}
SEARCHES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "aliases that stand for 10^10 values": (text(ALIASES), "expand to more than"),
    "a model of the system": (
        text("model: antigravity.Net\nspace: {lr: [0.1]}\nfixed: {max_epochs: 1}"),
        "no model 'antigravity.Net'",
    ),
    "a name that leads elsewhere": (
        text("name: ../../x\nmodel: Perceptron\nspace: {lr: [0.1]}\nfixed: {max_epochs: 1}"),
        "not a path, got '../../x'",
    ),
}
IMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "169 megapixels": (picture((13000, 13000)), "more than 50,000,000 pixels"),
    "10^18 pixels by its header": (declared(2**31 - 1, 2**31 - 1), "image"),
    "a pipe": (pipe, "it is not a file"),
    "a folder": (folder, "it is not a file"),
    "truncated": (
        lambda file: (picture((99, 99))(file), file.write_bytes(file.read_bytes()[:50])),
        "cannot be read as an image",
    ),
    "text": (text("no picture"), "cannot be read as an image"),
    "empty": (text(""), "cannot be read as an image"),
}
FOUND: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "curves that unpack to a gigabyte": (
        "curves.json.gz",
        lambda file: file.write_bytes(gzip.compress(bytes(2**20)) * 1024),
        "unpacks to more than",
    ),
    "truncated curves": (
        "curves.json.gz",
        lambda file: file.write_bytes(file.read_bytes()[:-99]),
        "damaged",
    ),
    "curves that are not packed": ("curves.json.gz", text("{}"), "damaged"),
    "curves of 100,000 brackets": (
        "curves.json.gz",
        lambda file: file.write_bytes(gzip.compress(b"[" * 10**5)),
        "damaged",
    ),
    "curves of no trial": (
        "curves.json.gz",
        lambda file: file.write_bytes(gzip.compress(b"{}")),
        "damaged",
    ),
    "an accuracy of 7.5": ("results.json", trial(val_acc=7.5), "val_acc 7.5"),
    "an accuracy that is not a number": ("results.json", trial(val_acc=math.nan), "val_acc nan"),
    "an accuracy of text": ("results.json", trial(val_acc="0.9"), "val_acc '0.9'"),
    "results of 100,000 brackets": ("results.json", text("[" * 10**5), "damaged"),
    "results as a number": ("results.json", text("7"), "damaged"),
    "results as a pipe": ("results.json", pipe, "not a regular file"),
    "no results": ("results.json", Path.unlink, "not a regular file"),
    "a search that is no JSON": ("search.json", text("{"), "damaged"),
    "a search that is a list": ("search.json", text("[]"), "damaged"),
    "a search of bytes": ("search.json", text(b"\xff\xfe{}"), "damaged"),
}
# for these, the message names the setting, not the file
NAMELESS = {"a model for a callback", "a number for a model", "an unknown section"}
NAMELESS |= {"a model of the system", "a name that leads elsewhere", "a class of the system"}
NAMELESS |= {"a callback of the system", "truncated curves"}
CASES = [
    *(("checkpoint", "best.ckpt", name, *how) for name, how in CHECKPOINTS.items()),
    *(("resumed checkpoint", "last.ckpt", name, *how) for name, how in RESUMED.items()),
    *(("pretrained weights", "weights.pth", name, *how) for name, how in WEIGHTS.items()),
    *(("configuration", "mine.yaml", name, *how) for name, how in CONFIGS.items()),
    *(("search", "mine.yaml", name, *how) for name, how in SEARCHES.items()),
    *(("image", "a.png", name, *how) for name, how in IMAGES.items()),
    *(
        ("image with a name", "\x1b[2J\udcff.png", name, *IMAGES[name])
        for name in ("text", "a pipe")
    ),
    *(("found", file, name, *how) for name, (file, *how) in FOUND.items()),
]


def command(kind: str, name: str) -> tuple[Path, list[str]]:
    """The file of a case, and the command that reads it."""
    run = Path("lightning_logs/shallow/version_0")
    if kind == "checkpoint":
        return run / "checkpoints" / name, ["test", "--ckpt_path", str(run / "checkpoints" / name)]
    if kind == "resumed checkpoint":
        more = ["--trainer.max_epochs", "2", *QUICK]
        return run / "checkpoints" / name, ["fit", "--ckpt_path", f"{run}/last", *more]
    if kind == "pretrained weights":
        more = ["--model.regime", "finetune", "--model.weights", name, "--data.source", "digits"]
        return Path(name), ["fit", "--config", "resnet18_small.yaml", *more]
    if kind == "configuration":
        return Path(name), ["fit", "--config", name, "--data.source", "digits"]
    if kind == "search":
        return Path(name), ["search", "--config", name, "--data.source", "digits"]
    if kind == "found":
        return Path("study") / name, ["report", "study", "--out", "out"]
    Path("pictures").mkdir(exist_ok=True)
    words = ["predict", "--ckpt_path", str(run), "--data.predict_dir", "pictures"]
    return Path("pictures") / name, words


@pytest.fixture
def in_time() -> Iterator[None]:
    """Fails what waits forever."""

    def stop(*_: object) -> None:
        raise TimeoutError("it hangs")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize(
    ("kind", "name", "what", "spoil", "part"), CASES, ids=[f"{c[0]}: {c[2]}" for c in CASES]
)
def test_a_hostile_or_damaged_file_is_refused(
    run: Path,
    resnet18_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    name: str,
    what: str,
    spoil: Callable[[Path], Any],
    part: str,
) -> None:
    file, words = command(kind, name)
    if kind == "found":
        shutil.copytree(SEARCH, "study")
    if kind == "pretrained weights":
        shutil.copy(resnet18_file, file)
    spoil(file)
    before = files(tmp_path)
    capsys.readouterr()
    assert main(words) == 1
    text = capsys.readouterr().err
    if KEEP:
        row = f"| {kind} | {what} | {' '.join(text.split())} |\n"
        with Path(KEEP).open("a") as rows:
            rows.write(row.replace(f"{tmp_path}/", ""))
    errors = text[text.index("error: ") :]  # warnings may come before
    assert len(errors.splitlines()) <= 2
    assert "Traceback" not in text
    assert part in errors
    assert file.stem in errors or what in NAMELESS or "\x1b" in name
    assert all(c.isprintable() for c in errors.replace("\n", ""))
    if kind == "resumed checkpoint":  # Lightning reads its state only after the start of the run
        before = {name: content for name, content in before.items() if ".ckpt" in name}
    after = files(tmp_path)
    assert {name: after.get(name) for name in before} == before
    assert before.keys() == after.keys() or kind == "resumed checkpoint"
    assert not Path("code-was-run").exists()
    assert not [run for run in tmp_path.rglob("version_*") if not any(run.iterdir())]


def test_names_of_images_are_no_formulas_and_steer_no_terminal(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("pictures").mkdir()
    image = Image.new("L", (28, 28))
    image.putpixel((14, 14), 255)
    for name in ("=1+1.png", "@x.png", "\x1b[2J.png", "\udcff.png"):
        image.save(Path("pictures") / "a.png")
        (Path("pictures") / "a.png").rename(Path("pictures") / name)
    assert main(["predict", "--ckpt_path", str(run), "--data.predict_dir", "pictures"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    with (run / "predictions.csv").open(newline="") as file:
        names = {row["image"] for row in csv.DictReader(file)}
    assert names == {"'=1+1.png", "'@x.png", "\\x1b[2J.png", "\\udcff.png"}


def test_cells_of_tables_are_no_formulas() -> None:
    cells = ["=1+1", "+1", "-0.5", "-cmd", "@x", "\t=1", 3, None, "lr"]
    kept = [csv_cell(cell) for cell in cells]
    assert kept == ["'=1+1", "+1", "-0.5", "'-cmd", "'@x", "'\t=1", 3, None, "lr"]


def test_a_folder_that_only_looks_like_a_run_is_passed_over(run: Path) -> None:
    (run.parent / "version_²").mkdir()
    assert main([*FIT, "--trainer.max_epochs", "1"]) == 0
    assert (run.parent / "version_1").is_dir()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in pairwise("abcdefghij")
)


@pytest.mark.parametrize("command", ["fit", "search"])
@pytest.mark.parametrize("what", ["pipe", "bomb"])
@pytest.mark.parametrize("where", ["--data", "--trainer", "a file"])
def test_a_file_within_settings_is_read_within_bounds(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    what: str,
    where: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nested").mkdir()
    if what == "pipe":
        os.mkfifo(tmp_path / "nested/x.yaml")
    else:
        (tmp_path / "nested/x.yaml").write_text(BOMB)
    words = [where, "nested/x.yaml"]
    if where == "a file":
        (tmp_path / "nested/mine.yaml").write_text("data: x.yaml\n")  # relative to its own folder
        words = ["--config", "nested/mine.yaml"]
    assert main([command, *words]) == 1
    said = {"pipe": "nested/x.yaml is not a regular file", "bomb": "more than 20,000 values"}
    assert said[what] in capsys.readouterr().err


def test_what_parsers_may_import_is_as_before_after_a_command(tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--kind", type=type)
    for words in (["fit", "--config", "nowhere"], ["search", "--config", "nowhere"]):
        assert main(words) == 1
        assert parser.parse_args(["--kind", "collections.Counter"]).kind.__name__ == "Counter"


def test_more_processes_than_fit_into_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "fit --config shallow --data.source digits --trainer.accelerator cpu"
    assert main([*words.split(), "--trainer.devices", "100000"]) == 1
    assert "100,000 processes (--trainer.devices) would take" in capsys.readouterr().err
    assert not list(tmp_path.glob("lightning_logs/*/version_*"))
