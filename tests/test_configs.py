"""Every shipped configuration runs, and says of itself what is true."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torture import contents, same

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


def fit_words(config: Path, weights: Path) -> list[str]:
    """A training of the configuration for a few steps on the digits."""
    few = "--trainer.max_epochs 2 --trainer.limit_train_batches 4 --trainer.limit_val_batches 2"
    words = f"fit --config {config.name} --data.source digits {few}"
    if "resnet" in config.stem:
        words += " --data.image_size 28 --data.batch_size 8 --data.eval_batch_size 32"
        words += f" --model.weights {weights}"
    return words.split()


def test_runs(
    config: Path, resnet18_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For real, from a folder that knows nothing of the project."""
    monkeypatch.chdir(tmp_path)
    assert main(fit_words(config, resnet18_file)) == 0
    run = tmp_path / "lightning_logs" / config.stem / "version_0"
    saved = yaml.safe_load((run / "config.yaml").read_text())
    asked = yaml.safe_load(config.read_text())
    assert saved["model"]["class_path"].endswith(asked["model"]["class_path"])
    assert saved["model"]["init_args"].items() >= asked["model"]["init_args"].items()
    assert main(["test", "--ckpt_path", f"lightning_logs/{config.stem}"]) == 0
    assert re.fullmatch(r"0\.\d+", str(json.loads((run / "test.json").read_text())[0]["test/acc"]))


@pytest.mark.slow
def test_same_seed_and_threads_give_the_same_bits(
    config: Path, resnet18_file: Path, tmp_path: Path
) -> None:
    """In two processes; another seed gives other weights."""
    runs = []
    for seed in (1, 1, 2):
        root = tmp_path / str(len(runs))
        words = [*fit_words(config, resnet18_file), "--trainer.default_root_dir", str(root)]
        command = [sys.executable, "-m", "mnist_lightning", *words]
        subprocess.run(
            [*command, f"--seed_everything={seed}", "--threads=2", "--early_stopping.enabled=no"],
            check=True,
            stdout=subprocess.DEVNULL,
            # two processes have other orders of what is hashed
            env={**os.environ, "PYTHONHASHSEED": str(len(runs) + 1)},
        )
        runs.append(contents(root / "lightning_logs" / config.stem / "version_0"))
    assert same(runs[0], runs[1])
    assert not same(runs[0]["state_dict"], runs[2]["state_dict"])
