"""Every shipped configuration runs, and says of itself what is true."""

import json
import re
from pathlib import Path

import pytest
import yaml

from mnist_lightning.__main__ import main

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_comment_on_top_has_the_command(config: Path) -> None:
    first = config.read_text().splitlines()[0]
    assert first == f"# python -m mnist_lightning fit --config {config.name}"


def test_early_stopping_can_fire(config: Path) -> None:
    settings = yaml.safe_load(config.read_text())
    patience = settings.get("early_stopping", {}).get("patience", 10)
    assert patience < settings["trainer"]["max_epochs"]


def test_runs(
    config: Path, resnet18_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For real, for a few steps on the digits, from a folder that knows nothing of the project."""
    monkeypatch.chdir(tmp_path)
    few = "--trainer.max_epochs 2 --trainer.limit_train_batches 4 --trainer.limit_val_batches 2"
    words = f"--config {config.name} --data.source digits {few}"
    if "resnet" in config.stem:
        words += " --data.image_size 28 --data.batch_size 8 --data.eval_batch_size 32"
        words += f" --model.weights {resnet18_file}"
    assert main(["fit", *words.split()]) == 0
    run = tmp_path / "lightning_logs" / config.stem / "version_0"
    saved = yaml.safe_load((run / "config.yaml").read_text())
    asked = yaml.safe_load(config.read_text())
    assert saved["model"]["class_path"].endswith(asked["model"]["class_path"])
    assert saved["model"]["init_args"].items() >= asked["model"]["init_args"].items()
    assert main(["test", "--ckpt_path", f"lightning_logs/{config.stem}"]) == 0
    assert re.fullmatch(r"0\.\d+", str(json.loads((run / "test.json").read_text())[0]["test/acc"]))
