"""Trainings that are stopped or killed, and what they leave: whole files, and the way to go on."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from mnist_lightning import cli
from mnist_lightning.__main__ import main

FIT = ("fit", "--config", "shallow.yaml", "--data.source", "digits", "--early_stopping.enabled=no")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fit(*words: object) -> int:
    return main([*FIT, *(str(word) for word in words)])


# ---- files are whole or not there


_written: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _written is not None and event == "open":
        path, _, flags = arguments
        if isinstance(path, str) and (flags & (os.O_WRONLY | os.O_RDWR)):
            _written.append(Path(path).name)


def test_no_file_is_written_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where TMPDIR is on another file system, so that a move from there is a copy.

    A file that is opened for writing in its place is, for a moment, neither the old nor the new.
    """
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system: /dev/shm")
    with tempfile.TemporaryDirectory(dir=other) as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        sys.addaudithook(_note)  # for good: there is no taking it back
        monkeypatch.setattr(sys.modules[__name__], "_written", [])
        assert fit("--trainer.max_epochs", 1) == 0
        assert fit("--trainer.max_epochs", 2, "--ckpt_path", "last") == 0
        written = set(_written or [])
    run = next(tmp_path.glob("lightning_logs/shallow/version_0"))
    files = {path.name for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "provenance.json", "metrics.csv", "best.ckpt", "last.ckpt"} <= files
    # TensorBoard appends to its events; nothing here reads its hparams.yaml
    kept = {name for name in files if not name.startswith(("events.", "hparams.yaml"))}
    assert written & kept == set()


@pytest.mark.parametrize("plugins", [None, "of the user's own"])
def test_checkpoints_are_written_whole_beside_a_users_plugins(
    plugins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--trainer.plugins", "lightning.pytorch.plugins.Precision"] if plugins else []
    used = []
    save = cli.WholeFiles.save_checkpoint

    def note(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        used.append(Path(path).name)
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(cli.WholeFiles, "save_checkpoint", note)
    assert fit("--trainer.max_epochs", 1, *words) == 0
    assert sorted(used) == ["best.ckpt", "last.ckpt"]


def test_a_resumed_training_that_diverges_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    assert fit("--trainer.max_epochs", 1) == 0
    run = tmp_path / "lightning_logs/shallow/version_0"
    before = (run / "config.yaml").read_bytes()
    last = ("fit", "--ckpt_path", str(run / "last"), "--trainer.max_epochs", "2")
    assert main([*last, "--model.lr", "1e20"]) == 1
    assert (run / "config.yaml").read_bytes() == before
    assert main([*last, "--model.lr", "0.05"]) == 0
    assert "lr: 0.05" in (run / "config.yaml").read_text()
