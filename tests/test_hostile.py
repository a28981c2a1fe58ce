"""Files from elsewhere: nothing that one holds is run, removed, or allowed to stop the machine."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

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
