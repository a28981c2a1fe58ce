"""What older versions wrote or named still works: names, options, a run and a search."""

import csv
import pickle
import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from mnist_lightning import load
from mnist_lightning.__main__ import main
from mnist_lightning.moved import GONE, current_argv, current_config
from mnist_lightning.search.results import load_curves

# a run of two epochs and a search of four trials, on the digits, made by commit 6a4caca
OLD = Path(__file__).parent / "old"

# module: its public names at commit 6a4caca, and class paths in files
NAMES = {
    "analysis": "Found groups setting_text",
    "callbacks": "EarlyStopping EpochLines LayerFreezing Mistakes ProgressBar say",
    "checkpoints": "BINDING_DATA ModelCheckpoint check_agrees read",
    "claims": "Claim Claims open_storage",
    "dashboard": "Dashboard RunLogger",
    "data": "EpochSampler ImageSet MNISTDataModule NORMALIZATIONS epoch_order in_image_order"
    " read_image split_indices",
    "evaluations": "is_whole read record",
    "execution": "Execution FusedSGD Way linear_layers",
    "inspection": "Layer format_layers layer_table tensor_table",
    "models": "AffineMap Classifier DeepNetwork Perceptron ResNet18 ShallowNetwork mlp one_cycle",
    "names": "ConfigByName find_checkpoint find_config newest_first read_config",
    "plan": "Search Unit units",
    "population": "Member PopulationTraining initial_parameters",
    "published": "GRIDS PUBLISHED",
    "results": "Results load_results new_record",
    "search": "main read run",
    "space": "Trial best draw grid random refine rounds",
    "stacked": "BLOCK_ROWS Population",
    "worker": "Worker",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_of_before_import(module: str) -> None:
    before = import_module(f"mnist_lightning.{module}")
    for name in NAMES[module].split():
        found = getattr(before, name)
        if isinstance(found, type):
            assert pickle.loads(pickle.dumps(found)) is found
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        before.nonsense  # noqa: B018


def test_what_is_gone_leads_to_modules_that_are_there() -> None:
    for homes in GONE.values():
        for home in homes:
            import_module(f"mnist_lightning.{home}")


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with both."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "lightning_logs"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(words) == 0
    return capsys.readouterr().out


def _metrics(out: str) -> list[str]:
    """The accuracy and the loss that an evaluation printed."""
    return re.findall(r"\b(?:val|test)/(?:acc|loss) \S+", out)


# what commit 6a4caca itself printed and wrote in two more epochs
VALIDATED = ["val/acc 0.1765", "val/loss 1.8772"]
TESTED = ["test/acc 0.1778", "test/loss 1.9160"]
SEARCH_TESTED = ["test/acc 0.6778", "test/loss 0.8791"]
FURTHER = [
    [3, 1.8084648847579956, 0.1764705926179886, 1.8100553750991821, 0.207109734416008],
    [4, 1.774291753768921, 0.1764705926179886, 1.7685620784759521, 0.2302936613559723],
]


def test_a_run_of_before_is_scored_and_goes_on(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _metrics(run(capsys, "validate", "--ckpt_path", "shallow")) == VALIDATED
    assert _metrics(run(capsys, "test", "--ckpt_path", "shallow")) == TESTED
    assert load("shallow")(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    words = ("--ckpt_path", "shallow/last", "--trainer.max_epochs", "4")
    out = run(capsys, "fit", *words)
    assert "after epoch 2" in out
    assert "fused" in out
    with (old / "shallow" / "version_0" / "metrics.csv").open() as file:
        # the columns of before; later ones follow
        rows = [[float(cell) for cell in row[:5]] for row in list(csv.reader(file))[3:]]
    for row, expected in zip(rows, FURTHER, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    assert len(list((old / "shallow").iterdir())) == 1


@pytest.mark.slow
def test_a_search_of_before_is_scored_reported_and_grows(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = old / "search" / "small"
    assert _metrics(run(capsys, "test", "--ckpt_path", str(folder))) == SEARCH_TESTED
    before = {file.name: file.read_bytes() for file in (folder / "trials").iterdir()}
    assert len(before) == len(set(load_curves(folder)["id"])) == 4
    run(capsys, "report", str(folder), "--out", "page")
    assert "0.7183" in Path("page", "index.html").read_text()
    run(capsys, "search", "--config", "small.yaml", "--seeds", "[0, 1]", "--workers", "1")
    after = {file.name: file.read_bytes() for file in (folder / "trials").iterdir()}
    assert len(after) == 8
    assert before.items() <= after.items()


def test_options_of_before_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = "steps per execution: 7, autograd: fused steps are off; 2 threads"
    fit = "fit --config shallow --data.source digits --trainer.max_epochs 1"
    flags = "--model.fused no --data.steps_per_execution=7 --threads 2"
    assert said in run(capsys, *fit.split(), *flags.split())
    Path("mine.yaml").write_text(
        "model: {class_path: ShallowNetwork, init_args: {fused: no}}\nthreads: 2\n"
        "data: {source: digits, steps_per_execution: 7}\ntrainer: {max_epochs: 1}\n"
    )
    assert said in run(capsys, "fit", "--config", "mine.yaml")
    config = yaml.safe_load(Path("lightning_logs/mine/version_0/config.yaml").read_text())
    assert config["execution"] == {"steps": 7, "fused": False, "threads": 2}
    # a resumed training is fused only if it was fused before
    checkpoint = "lightning_logs/mine/version_0/checkpoints/last.ckpt"
    shutil.copy(checkpoint, "alone.ckpt")
    out = run(capsys, "fit", "--ckpt_path", "alone.ckpt", "--trainer.max_epochs", "2")
    assert "autograd: fused steps are off" in out


def test_options_of_others_stay() -> None:
    words = ["--model", "fused", "--model.hidden_units", "5", "--threads_of_mine", "3"]
    assert current_argv(words) == words
    for own in ("mine.Net", "other.models.ShallowNetwork"):
        content = f"model: {{class_path: {own}, init_args: {{fused: no}}}}"
        assert current_config(content) == content
