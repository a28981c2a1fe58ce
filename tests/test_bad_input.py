"""Wrong commands: an error in one or two helpful lines, and no partial files."""

import contextlib
import csv
import errno
import os
import pickle
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets  # noqa: F401  its import writes files, which would hit the limits below
import torch
import torchvision.datasets

from mnist_lightning import provenance
from mnist_lightning.__main__ import main
from mnist_lightning.models.classifier import Classifier

DIGITS = ("--data.source", "digits")
QUICK = (*DIGITS, "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu")
QUICK += ("--trainer.enable_progress_bar", "false", "--model.hidden_units", "4")
FIT = ("fit", "--config", "shallow.yaml", *QUICK)

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own working directory, no MNIST and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MNIST_DATA_DIR", raising=False)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:1/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    assert main([*FIT, "--trainer.default_root_dir", str(folder)]) == 0
    return folder / "lightning_logs" / "shallow" / "version_0"


@pytest.fixture
def run(trained: Path) -> Path:
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(trained, Path("lightning_logs/shallow/version_0")))


@pytest.fixture
def best(run: Path) -> Path:
    return run / "checkpoints" / "best.ckpt"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Runs a command that must fail with a proper error; returns the message."""

    def run_refused(*words: object, code: int = 1, changes: bool = False) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        text = capsys.readouterr().err
        assert text.startswith("error: ")
        assert text.endswith("\n")
        assert len(text.splitlines()) <= 2
        assert "Traceback" not in text
        if not changes:
            assert contents(tmp_path) == before
            runs = [path for path in tmp_path.rglob("version_*") if not any(path.iterdir())]
            assert not runs, "the folder of a run that did not begin"
        return text

    return run_refused


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ---- arguments: commands, configurations, options, types, classes

WRONG_WORDS: list[tuple[str, list[str]]] = [
    # command line, parts of the message: the value, and the remedy
    ("fti", ["'fti'", "did you mean fit?"]),
    ("zzz", ["'zzz'", "there are: fit, validate, test, predict"]),
    ("--config shallow.yaml", ["'--config'", "there are: fit"]),
    ("fit", ["which model?", "--config NAME", "shallow.yaml", "--model CLASS"]),
    ("inspect", ["which model?", "--config NAME", "shallow.yaml", "--model CLASS"]),
    ("fit --config", ["--config", "needs a value"]),
    ("fit --config shalow.yaml", ["--config shalow.yaml", "did you mean shallow.yaml?"]),
    ("fit --config no/such.yaml", ["no/such.yaml", "there are:", "shallow.yaml"]),
    (
        "fit --config shallow.yaml --trainer.max_epoch 1",
        ["--trainer.max_epoch;", "did you mean --trainer.max_epochs?"],
    ),
    ("fit --config shallow.yaml --max_epochs 1", ["--max_epochs", "did you mean"]),
    ("fit --config shallow.yaml --data.batchsize=8", ["--data.batchsize;", "--data.batch_size?"]),
    ("fit --config shallow.yaml stray", ["stray", "--help"]),
    (
        "fit --config shallow.yaml --trainer.max_epochs many",
        ["--trainer.max_epochs", "expected int", "got many"],
    ),
    ("fit --config shallow.yaml --data.batch_size 8.5", ["--data.batch_size", "int", "got 8.5"]),
    (
        "fit --config shallow.yaml --model.hidden_units three",
        ["--model.hidden_units", "expected int", "got three"],
    ),
    ("fit --config shallow.yaml --model.lr fast", ["--model.lr", "expected float", "got fast"]),
    (
        "fit --config shallow.yaml --seed_everything abc",
        ["--seed_everything", "expected bool or int", "got abc"],
    ),
    (
        "fit --config shallow.yaml --early_stopping.enabled maybe",
        ["--early_stopping.enabled", "expected bool", "got maybe"],
    ),
    ("fit --config shallow.yaml --trainer.precision 12", ["--trainer.precision", "16", "got 12"]),
    ("fit --config shallow.yaml --data.source web", ["--data.source", "'digits'", "got web"]),
    ("fit --config shallow.yaml --data.name CIFAR", ["--data.name", "'KMNIST'", "got CIFAR"]),
    ("fit --config shallow.yaml --data.split half", ["--data.split", "'canonical'", "got half"]),
    ("fit --config shallow.yaml --model.optimizer sdg", ["'sgd'", "got sdg"]),
    ("fit --model ShalowNetwork", ["'ShalowNetwork'", "did you mean ShallowNetwork?"]),
    ("fit --model torch.nn.Linear", ["torch.nn.Linear", "not a LightningModule", "ShallowN"]),
    (
        "fit --config shallow.yaml --model.hiden_units 3",
        ["--model.hiden_units;", "mean --model.hidden_units?"],
    ),
    ("validate", ["--ckpt_path FILE, or the folder of a run"]),
    ("validate --config shallow.yaml", ["--ckpt_path FILE, or the folder of a run"]),
    ("test --config shallow.yaml", ["--ckpt_path FILE, or the folder of a run"]),
    ("predict", ["--ckpt_path FILE, or the folder of a run"]),
]


@pytest.mark.parametrize(("words", "parts"), WRONG_WORDS, ids=[words for words, _ in WRONG_WORDS])
def test_a_wrong_word_is_named_with_what_was_meant(
    refused: Refused, words: str, parts: list[str]
) -> None:
    command = words.split()
    known = command[0] in ("fit", "validate", "test", "predict", "inspect")
    text = refused(*command, code=1 if known else 2)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--data.batch_size 0", ["batch_size must be a whole number, at least 1, got 0"]),
        ("--data.val_fraction 1.5", ["val_fraction must lie between 0 and 1, got 1.5"]),
        ("--data.val_fraction 0.0001", ["val_fraction 0.0001", "none to validate on", "0.2"]),
        ("--model.hidden_units 0", ["hidden_units must all be at least 1, got [0]"]),
        ("--model.lr -1", ["lr must be positive, got -1"]),
        ("--early_stopping.patience 0", ["got 0", "--early_stopping.enabled false"]),
        ("--early_stopping.mode up", ["min, max", "got up"]),
        ("--trainer.max_epochs -5", ["max_epochs", "-5"]),
        ("--trainer.accelerator abacus", ["abacus", "Available names are", "cpu"]),
        ("--trainer.devices 0", ["devices", "0", "cpu"]),
    ],
)
def test_a_value_that_cannot_be(refused: Refused, words: str, parts: list[str]) -> None:
    text = refused(*FIT, *words.split())
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"model: [ShallowNetwork\ndata: :", ["not a YAML file", "line 2"]),
        (b"\xff\xfe\x00\x01", ["not a YAML file"]),
        (b"", ["no settings", "--print_config"]),
        (b"- a\n- b\n", ["no settings", "--print_config"]),
    ],
    ids=["broken", "no text", "empty", "a list"],
)
def test_a_configuration_that_is_none(refused: Refused, content: bytes, parts: list[str]) -> None:
    Path("mine.yaml").write_bytes(content)
    text = refused("fit", "--config", "mine.yaml")
    for part in ["--config mine.yaml", *parts]:
        assert part in text


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (
            "model: {class_path: ShallowNetwork}\nbatch_size: 8\n",
            ["batch_size;", "data.batch_size?"],
        ),
        ("model: {class_path: ShalowNetwork}\n", ["'ShalowNetwork'", "ShallowNetwork?"]),
        (
            "model: {class_path: ShallowNetwork}\ntrainer: {max_epochs: x}\n",
            ["max_epochs", "got x"],
        ),
        (
            "model:\n  class_path: ShallowNetwork\n  init_args: {hidden: 8}\n",
            ["'hidden'", "did you mean hidden_units?"],
        ),
    ],
    ids=["wrong place", "wrong class", "wrong type", "wrong argument"],
)
def test_a_wrong_word_in_a_configuration(refused: Refused, content: str, parts: list[str]) -> None:
    Path("mine.yaml").write_text(content)
    text = refused("fit", "--config", "mine.yaml")
    for part in parts:
        assert part in text


# ---- data


@pytest.mark.parametrize("source", ["mnist", "auto"])
def test_a_damaged_data_file(refused: Refused, source: str) -> None:
    """A damaged data set is an error: ``auto`` does not replace it by the digits."""
    folder = Path("data/MNIST/raw")
    folder.mkdir(parents=True)
    for part, count in (("train", 60), ("t10k", 10)):
        images = struct.pack(">4I", 0x803, count, 28, 28) + bytes(count * 784)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">2I", 0x801, count) + bytes(count)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    text = refused(*FIT, "--data.source", source)  # well-formed, but not MNIST
    for part in (str(folder / "train-images-idx3-ubyte"), "wrong checksum", "Delete it"):
        assert part in text
    (folder / "train-images-idx3-ubyte").unlink()
    text = refused(*FIT, "--data.source", source)
    for part in ("no train-images-idx3-ubyte", f"into {folder}", "--data.source digits"):
        assert part in text


def test_no_data_and_no_mirror(refused: Refused) -> None:
    text = refused(*FIT, "--data.source", "mnist", "--data.data_dir", "nowhere")
    for part in ("nowhere/MNIST/raw", "MNIST_DATA_DIR", "--data.data_dir", "--data.source digits"):
        assert part in text
    assert not Path("nowhere").exists()


def test_pictures_that_are_missing_or_none(refused: Refused, best: Path) -> None:
    text = refused("predict", "--ckpt_path", best, "--data.predict_dir", "pictures")
    assert "predict_dir: pictures" in text
    Path("pictures").mkdir()
    Path("pictures/a.png").write_text("no picture")
    text = refused("predict", "--ckpt_path", best, "--data.predict_dir", "pictures")
    assert "pictures/a.png cannot be read as an image" in text
    assert "remove it" in text


# ---- checkpoints


class RunsCode:
    """Creates a folder when it is unpickled by ``pickle.load``."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("code-was-run",)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def altered(file: Path) -> None:
    """Flips one bit of a weight: PyTorch would load it without an error."""
    content = bytearray(file.read_bytes())
    weights = torch.load(file, weights_only=True)["state_dict"]["net.hidden1.weight"]
    start = content.find(weights.numpy().tobytes())
    assert start > 0
    content[start + 3] ^= 0x40
    file.write_bytes(content)


def saved(content: Any, zipped: bool = True) -> Callable[[Path], None]:
    return lambda file: torch.save(content, file, _use_new_zipfile_serialization=zipped)


def changed(**entries: Any) -> Callable[[Path], None]:
    """Replaces entries of the checkpoint; ``None`` removes one."""

    def change(file: Path) -> None:
        content = {**torch.load(file, weights_only=True), **entries}
        torch.save({key: value for key, value in content.items() if value is not None}, file)

    return change


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncated, "truncated"),
    "altered": (altered, "damaged: wrong checksum"),
    "empty": (lambda file: file.write_bytes(b""), "truncated, or not a checkpoint"),
    "random": (lambda file: file.write_bytes(bytes(range(256)) * 9), "not a checkpoint"),
    "text": (lambda file: file.write_text("weights\n"), "not a checkpoint"),
    "plain pickle of code": (
        lambda file: file.write_bytes(pickle.dumps(RunsCode())),
        "not a checkpoint",
    ),
    "torch file of code": (saved({"state_dict": {}, "more": RunsCode()}), "holds code"),
    "old torch file of code": (saved(RunsCode(), zipped=False), "not a checkpoint"),
    "a tensor": (saved(torch.zeros(3)), "no state_dict"),
    "no state_dict": (changed(state_dict=None), "no state_dict"),
    "state_dict of another kind": (changed(state_dict=[1, 2]), "no state_dict"),
    "of another framework": (changed(model_class=None), "no model_class"),
    "no hyper-parameters": (changed(hyper_parameters=None), "no hyper_parameters"),
}


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        *(("test", kind) for kind in BAD_CHECKPOINTS),
        *((command, "truncated") for command in ("fit", "validate", "predict")),
    ],
)
def test_a_bad_checkpoint(refused: Refused, best: Path, command: str, kind: str) -> None:
    spoil, what = BAD_CHECKPOINTS[kind]
    spoil(best)
    text = refused(command, "--ckpt_path", best)
    assert str(best) in text
    assert what in text
    assert "Give another: --ckpt_path FILE, or the folder of a run" in text or (
        f"The run's other checkpoint is intact: --ckpt_path {best.with_name('last.ckpt')}" in text
    )
    assert not Path("code-was-run").exists()


def test_the_code_would_have_run() -> None:
    """The files above are dangerous for a program that does not check them."""
    saved({"more": RunsCode()})(Path("code.ckpt"))
    torch.load("code.ckpt", weights_only=False)
    assert Path("code-was-run").is_dir()


@pytest.mark.parametrize(
    ("where", "parts"),
    [
        (
            "missing.ckpt",
            ["missing.ckpt", "no file or folder", "the runs in lightning_logs are: sh"],
        ),
        ("shalow", ["shalow", "no file or folder", "the runs in lightning_logs are: shallow"]),
        ("lightning_logs", ["no checkpoints/best.ckpt", "are: shallow"]),
        ("best", ["of which run?", "lightning_logs/NAME/best", "--config"]),
    ],
)
def test_a_missing_checkpoint(refused: Refused, run: Path, where: str, parts: list[str]) -> None:
    text = refused("test", "--ckpt_path", where)
    for part in [f"--ckpt_path {where}", *parts]:
        assert part in text


@pytest.mark.parametrize(
    ("class_path", "what"),
    [
        *((path, "not known here") for path in ("os.system", "torch.nn.Linear", "Nothing")),
        ("mine.Net", "would run its code"),
    ],
)
def test_a_checkpoint_of_an_unknown_class(
    refused: Refused, best: Path, class_path: str, what: str
) -> None:
    changed(model_class=class_path)(best)
    text = refused("test", "--ckpt_path", best)
    for part in (class_path, what):
        assert part in text


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--model Perceptron", ["a ShallowNetwork, not a Perceptron"]),
        ("--config deep2.yaml", ["a ShallowNetwork, not a DeepNetwork"]),
        ("--model.hidden_units 5", ["--model.hidden_units 5, but it has 4"]),
        ("--data.split canonical", ["--data.split canonical, but it has study"]),
        ("--data.split_seed 3", ["--data.split_seed 3, but it has 0"]),
        ("--data.val_fraction 0.5", ["--data.val_fraction 0.5, but it has 0.2"]),
        ("--data.name KMNIST", ["--data.name KMNIST, but it has MNIST"]),
        ("--data.source mnist", ["--data.source mnist, but it has digits"]),
        ("--data.normalization mnist", ["--data.normalization mnist, but it has unit"]),
    ],
)
def test_a_request_that_contradicts_the_checkpoint(
    refused: Refused, best: Path, words: str, parts: list[str]
) -> None:
    text = refused("test", "--ckpt_path", best, *words.split())
    for part in [str(best), *parts]:
        assert part in text


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_no_command_may_contradict_the_checkpoint(
    refused: Refused, best: Path, command: str
) -> None:
    text = refused(command, "--ckpt_path", best, "--data.split_seed", 3)
    assert "--data.split_seed 3, but it has 0" in text


def test_weights_alone_are_tested_but_not_resumed(refused: Refused, best: Path) -> None:
    changed(optimizer_states=None)(best)
    text = refused("fit", "--ckpt_path", best)
    assert f"{best} holds weights only" in text
    assert main(["test", "--ckpt_path", str(best)]) == 0


# ---- folders that cannot be written, and files that cannot be finished


@contextlib.contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Makes writes fail as on a full disk, as soon as a file has ``size`` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_file_where_the_runs_should_go(refused: Refused, folder: str) -> None:
    Path("file").write_text("in the way")
    text = refused(*FIT, "--trainer.default_root_dir", folder)
    for part in (f"{folder}/lightning_logs/shallow", "--trainer.default_root_dir DIR"):
        assert part in text


@pytest.mark.parametrize(
    ("code", "words"), [(errno.EROFS, "read-only"), (errno.ENOSPC, "no space left")]
)
def test_a_disk_without_room_for_a_folder(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    def mkdir(self: Path, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    text = refused(*FIT)
    for part in ("lightning_logs/shallow", words, "--trainer.default_root_dir DIR"):
        assert part in text


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("size", [10, 500])
def test_a_disk_that_is_full_from_the_start(refused: Refused, size: int) -> None:
    """10 bytes are not enough for TensorBoard's file, 500 not for config.yaml."""
    with files_end_at(size):
        text = refused(*FIT)
    for part in ("lightning_logs/shallow/version_0", " cannot be written", "Make room"):
        assert part in text
    assert list(Path("lightning_logs/shallow").iterdir()) == []


def test_a_disk_that_is_full_at_the_first_checkpoint(refused: Refused) -> None:
    with files_end_at(5000):
        text = refused(*FIT, changes=True)
    assert "lightning_logs/shallow/version_0/checkpoints/best.ckpt cannot be written" in text
    assert "Make room" in text
    assert not list(Path().rglob("*.ckpt*"))


def test_a_full_disk_leaves_the_files_of_a_resumed_run(refused: Refused, run: Path) -> None:
    before = contents(run)
    with files_end_at(10):
        refused("fit", "--ckpt_path", run / "last", "--trainer.max_epochs", 2, changes=True)
    after = contents(run)
    assert {name: after.get(name) for name in before} == before
    with files_end_at(5000):  # enough for all but a checkpoint
        refused("fit", "--ckpt_path", run / "last", "--trainer.max_epochs", 2, changes=True)
    for name in ("checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (run / name).read_bytes() == before[name]
    assert {Path(name).name for name in contents(run) if "/." in f"/{name}"} <= {".lock"}


@pytest.mark.parametrize(
    ("command", "file"), [("test", "test.json"), ("predict", "predictions.csv")]
)
def test_a_failed_write_leaves_the_earlier_file(
    refused: Refused, run: Path, command: str, file: str
) -> None:
    assert main([command, "--ckpt_path", str(run)]) == 0
    assert (run / file).is_file()
    with files_end_at(10):
        text = refused(command, "--ckpt_path", run)
    assert f"{run}/{file} cannot be written" in text
    assert "Make room" in text


def test_a_failed_write_leaves_the_earlier_metrics(
    refused: Refused, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rename completes a file; here it fails, for the table only."""
    before = (run / "metrics.csv").read_bytes()
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(target).name == "metrics.csv":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(provenance.os, "replace", fail)
    text = refused("fit", "--ckpt_path", run / "last", "--trainer.max_epochs", 2, changes=True)
    assert "metrics.csv cannot be written: no space left on device" in text
    assert (run / "metrics.csv").read_bytes() == before
    assert {path.name for path in run.glob(".*")} <= {".lock"}


def test_a_read_only_run_is_not_tested(
    refused: Refused, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test evaluation takes place if it cannot be recorded."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(Classifier, "test_step", lambda *_: pytest.fail("scored"))
    text = refused("test", "--ckpt_path", run)
    assert "read-only" in text
    assert str(run) in text


@pytest.mark.parametrize("content", ["{broken", "7", "", "[1]"])
def test_nothing_is_tested_where_the_record_of_tests_is_damaged(
    refused: Refused, run: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classifier, "test_step", lambda *_: pytest.fail("scored"))
    (run / "test.json").write_text(content)
    text = refused("test", "--ckpt_path", run)
    assert f"{run}/test.json" in text
    assert "restart the count" in text


def test_a_resumed_run_keeps_its_best_checkpoint(
    run: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """The run was moved, and the new epoch is not better: its learning rate is almost zero."""
    best, last = run / "checkpoints" / "best.ckpt", run / "checkpoints" / "last.ckpt"
    before = best.read_bytes()
    words = ["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "2", "--model.lr", "1e-30"]
    assert main(words) == 0
    assert best.read_bytes() == before
    assert torch.load(last, weights_only=True)["epoch"] == 1
    assert not [w for w in recwarn if "dirpath" in str(w.message)]
    with (run / "metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


# ---- --debug


@pytest.mark.parametrize("words", [("fit", "--config", "no.yaml"), ("test", "--ckpt_path", "no")])
def test_debug_shows_where_an_error_comes_from(words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"no(\.yaml)?: "):
        main([*words, "--debug"])
