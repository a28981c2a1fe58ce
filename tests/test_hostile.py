"""Files from elsewhere: nothing that one holds is run, removed, or allowed to stop the machine."""

import shutil
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mnist_lightning.__main__ import main

QUICK = ("--data.source", "digits", "--trainer.accelerator", "cpu")
QUICK += ("--trainer.enable_progress_bar", "false")
FIT = ("fit", "--config", "shallow.yaml", *QUICK, "--model.hidden_units", "4")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a working directory of its own, no MNIST and no network."""
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
    """A copy of that run, to be spoiled."""
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
    """Has the run's config.yaml say so."""
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
