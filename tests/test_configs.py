"""Every shipped configuration runs, and its comments are true."""

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import yaml
from PIL import Image
from torture import contents, same

from mnist_lightning.__main__ import main
from mnist_lightning.configs import find_config
from mnist_lightning.report import analysis

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RECORDS = sorted((ROOT / "configs" / "records").glob("*.yaml"))
SEARCHES = sorted((ROOT / "configs" / "search").glob("*.yaml"))


@pytest.fixture(params=[*CONFIGS, *RECORDS], ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_comment_on_top_has_the_command(config: Path) -> None:
    first = config.read_text().splitlines()[0]
    assert first == f"# python -m mnist_lightning fit --config {config.name}"


def test_early_stopping_can_fire(config: Path) -> None:
    settings = yaml.safe_load(config.read_text())
    if settings["data"].get("val_fraction") == 0:
        return  # nothing to stop by: the number of epochs is fixed
    patience = settings.get("early_stopping", {}).get("patience", 10)
    assert patience < settings["trainer"]["max_epochs"]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small colour images in three classes, of noise: no network tells them apart."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 4)):
        for name in ("cat", "dog", "eel"):
            (folder / part / name).mkdir(parents=True)
            for n in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{n}.png")
    return folder


def fit_words(config: Path, weights: Path, pictures: Path) -> list[str]:
    """A training of the configuration for a few steps, on the digits or a folder of images."""
    few = "--trainer.max_epochs 2 --trainer.limit_train_batches 4 --trainer.limit_val_batches 2"
    of_folder = yaml.safe_load(config.read_text())["data"].get("source") == "folder"
    data = f"--data.data_dir {pictures}" if of_folder else "--data.source digits"
    words = f"fit --config {config.name} {data} {few}"
    if "resnet" in config.stem:
        words += " --data.image_size 28 --data.batch_size 8 --data.eval_batch_size 32"
        words += f" --model.weights {weights}"
    return words.split()


# ResNets take a while, and records are like the others
@pytest.mark.pictures
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            path,
            id=path.stem,
            marks=[pytest.mark.slow] * ("resnet" in path.stem or path in RECORDS),
        )
        for path in [*CONFIGS, *RECORDS]
    ],
)
def test_runs(
    config: Path,
    resnet18_file: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real run, from a folder outside the project."""
    monkeypatch.chdir(tmp_path)
    assert main(fit_words(config, resnet18_file, pictures)) == 0
    run = tmp_path / "lightning_logs" / config.stem / "version_0"
    saved = yaml.safe_load((run / "config.yaml").read_text())
    asked = yaml.safe_load(config.read_text())
    assert saved["model"]["class_path"].endswith(asked["model"]["class_path"])
    assert saved["model"]["init_args"].items() >= asked["model"]["init_args"].items()
    assert main(["test", "--ckpt_path", f"lightning_logs/{config.stem}"]) == 0
    assert re.fullmatch(r"0\.\d+", str(json.loads((run / "test.json").read_text())[0]["test/acc"]))


@pytest.mark.slow
def test_same_seed_and_threads_give_the_same_bits(
    config: Path, resnet18_file: Path, pictures: Path, tmp_path: Path
) -> None:
    """In two processes; another seed gives other weights."""
    runs = []
    for seed in (1, 1, 2):
        root = tmp_path / str(len(runs))
        words = [
            *fit_words(config, resnet18_file, pictures),
            "--trainer.default_root_dir",
            str(root),
        ]
        command = [sys.executable, "-m", "mnist_lightning", *words]
        subprocess.run(
            [
                *command,
                f"--seed_everything={seed}",
                "--execution.threads=2",
                "--early_stopping.enabled=no",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            # hash orders differ between processes
            env={**os.environ, "PYTHONHASHSEED": str(len(runs) + 1)},
        )
        runs.append(contents(root / "lightning_logs" / config.stem / "version_0"))
    assert same(runs[0], runs[1])
    assert not same(runs[0]["state_dict"], runs[2]["state_dict"])


def test_every_file_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the second line of its file: a description and the results."""
    monkeypatch.chdir(tmp_path)
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert list(listed) == [file.stem for file in [*CONFIGS, *RECORDS, *SEARCHES]]
    for file in [*CONFIGS, *RECORDS, *SEARCHES]:
        assert listed[file.stem] == file.read_text().splitlines()[1].removeprefix("# ")
        what = "test" if file in RECORDS else "validation"
        assert re.search(rf"{what} 0\.\d{{4}}|not measured here", listed[file.stem])


@pytest.mark.parametrize("name", ["resnet18_scratch", "resnet18_finetune", "resnet18_freeze"])
def test_resnets_say_what_was_measured(name: str) -> None:
    """The committed results of a search with the same setting."""
    trials = json.loads((ROOT / "lightning_logs/study" / name / "results.json").read_text())
    best = [trial["best_val_acc"] for trial in trials]
    measured = f"{statistics.mean(best):.4f} ± {statistics.stdev(best):.4f} (n={len(best)}, "
    config = next(path for path in CONFIGS if path.stem == name)
    assert f": validation {measured}" in config.read_text()
    trial = trials[0]
    settings = yaml.safe_load(config.read_text())
    given = {**settings["model"]["init_args"], **settings["trainer"], **settings["data"]}
    same = [key for key in trial["params"] if key in given]
    assert len(same) >= 5
    assert all(trial["params"][key] == given[key] for key in same)


def test_records_say_what_was_measured() -> None:
    """The committed results of ``benchmarks/records.py``, and the limits that a record has."""
    results = json.loads((ROOT / "benchmarks" / "results" / "records.json").read_text())
    measured = {name: found["seeds"] for name, found in results["records"].items()}
    for file in RECORDS:
        if file.stem not in measured:
            assert "not measured here" in file.read_text()
            continue
        rows = measured[file.stem]
        tests = [row["test"] for row in rows]
        said = f"test {mean(tests):.4f} ± {stdev(tests):.4f} (n={len(tests)})"
        assert said in file.read_text().splitlines()[1]
        assert [row["seed"] for row in rows] == list(range(len(rows)))  # none was left out
        settings = yaml.safe_load(file.read_text())
        assert {row["epochs"] for row in rows} == {settings["trainer"]["max_epochs"]}
        seconds = [row["seconds"] for row in rows]
        limit = {"cnn_15s": 15, "cnn_minute": 60, "cnn_best": 1500}.get(file.stem)
        assert limit is None or max(seconds) <= limit
        promised = re.search("at most .* of training", file.read_text(), re.IGNORECASE)
        assert (limit is not None) == bool(promised)


def test_what_searches_reached_is_what_is_committed() -> None:
    found = {search.name: search for search in analysis.read(ROOT / "lightning_logs" / "study")}
    for file in SEARCHES:
        command, summary = file.read_text().splitlines()[:2]
        assert command == f"# python -m mnist_lightning search --config {file.name}"
        if file.stem not in found:
            assert summary.endswith(": not measured here")
            continue
        best, tested = found[file.stem].configurations.iloc[0], analysis.tested(found[file.stem])
        accuracy = f"{best['acc']:.4f}" + (f" ± {best['sd']:.4f}" if best["n"] > 1 else "")
        test = f"test {tested['acc']:.4f}" if tested else "not tested"
        said = f": best validation {accuracy} (n={best['n']:.0f}), {test}"
        assert summary.endswith(said)


def test_a_file_here_overrides_one_that_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("shallow.yaml", "deep2_grid"):
        Path(name).write_text("trainer: {max_epochs: 1}\n")
    assert main(["configs"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"\n  (\w+) .*\n +overridden by (\S+) in this folder", text) == [
        ("shallow", "shallow.yaml"),
        ("deep2_grid", "deep2_grid"),
    ]
    for name, command in (("shallow.yaml", "fit"), ("deep2_grid", "search")):
        assert find_config(name.removesuffix(".yaml"), command) == Path(name)  # as the list says


@pytest.mark.parametrize("name", ["shallow", "shallow.yaml", "shallow_grid"])
def test_one_is_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", name]) == 0
    (file,) = [f for f in [*CONFIGS, *SEARCHES] if f.stem == name.removesuffix(".yaml")]
    assert capsys.readouterr() == (file.read_text(), "")


def test_a_wrong_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "shalow"]) == 1
    assert main(["configs", "shallow", "deep2"]) == 1
    assert capsys.readouterr().err == (
        "error: no shipped configuration 'shalow'; did you mean shallow?\n"
        "error: configs: deep2? It takes one NAME\n"
    )
