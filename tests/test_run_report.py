"""The report on trainings: one run, or several side by side."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mnist_lightning.__main__ import main
from mnist_lightning.report import runs


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one configuration with different learning rates; the first is tested."""
    root = tmp_path_factory.mktemp("logs")
    words = "fit --config shallow --data.source digits --trainer.max_epochs 3"
    words += f" --trainer.accelerator cpu --trainer.default_root_dir {root}"
    for lr in ("0.3", "0.1"):
        assert main([*words.split(), "--model.lr", lr]) == 0
    logs = root / "lightning_logs" / "shallow"
    assert main(["test", "--ckpt_path", str(logs / "version_0")]) == 0
    Image.new("RGB", (8, 8), "red").save(_pictures(logs / "version_1") / "first_layer.png")
    return logs


def _pictures(run: Path) -> Path:
    folder = run / "pictures"
    folder.mkdir(exist_ok=True)
    return folder


def _best(run: Path) -> float:
    with (run / "metrics.csv").open(newline="") as file:
        return max(float(row["val/acc"]) for row in csv.DictReader(file))


def test_runs_are_shown_side_by_side(logs: Path, tmp_path: Path) -> None:
    assert main(["report", str(logs), "--out", str(tmp_path)]) == 0
    readme, page = ((tmp_path / name).read_text() for name in ("README.md", "index.html"))
    first, second = (_best(logs / f"version_{n}") for n in (0, 1))
    (tested,) = json.loads((logs / "version_0" / "test.json").read_text())
    for text in (readme, page):
        assert f"{first:.4f}" in text
        assert f"{second:.4f}" in text
        assert f"{tested['test/acc']:.4f}" in text
    with (tmp_path / "tables" / "settings.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    different = [row for row in rows if row["setting"] == "model.lr"]
    assert different == [
        {"setting": "model.lr", "shallow/version_0": "0.3", "shallow/version_1": "0.1"}
    ]
    assert len(rows) == 1
    assert "data:image/png;base64," in page
    assert "first layer" in page
    for name in ("accuracy", "val_loss", "train_loss"):
        assert (tmp_path / "figures" / f"runs_{name}.svg").is_file()
    assert (tmp_path / "figures" / "shallow_version_0_confusion.png").is_file()


def test_one_run_says_how_to_test_it(logs: Path, tmp_path: Path) -> None:
    assert main(["report", str(logs / "version_1"), "--out", str(tmp_path)]) == 0
    readme = (tmp_path / "README.md").read_text()
    assert f"**{_best(logs / 'version_1'):.4f}**" in readme
    assert "not been tested yet" in readme
    assert not (tmp_path / "tables" / "settings.csv").exists()


def test_the_curves_are_those_of_the_file(logs: Path) -> None:
    (run,) = runs.read([logs / "version_0"])
    with (logs / "version_0" / "metrics.csv").open(newline="") as file:
        expected = [float(row["val/loss"]) for row in csv.DictReader(file)]
    assert run.curves["val/loss"].tolist() == pytest.approx(expected)
    best = run.best
    assert best is not None
    assert best["val/acc"] == pytest.approx(_best(logs / "version_0"))


def test_the_accuracy_on_changed_images_is_beside_that_of_others(
    logs: Path, tmp_path: Path
) -> None:
    assert main(["report", str(logs), "--out", str(tmp_path / "without")]) == 0
    assert not (tmp_path / "without" / "tables" / "robustness.csv").exists()
    copy = tmp_path / "shallow"
    shutil.copytree(logs, copy)
    assert main(["test", "--ckpt_path", str(copy / "version_0"), "--robustness"]) == 0
    (noted,) = json.loads((copy / "version_0" / "robustness.json").read_text())
    noted["changes"]["blur"]["acc"] = [0.5, 0.4, 0.3, 0.2, 0.1]
    (copy / "version_1" / "robustness.json").write_text(json.dumps([noted]))
    assert main(["report", str(copy), "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "tables" / "robustness.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, name in zip(rows, ("version_0", "version_1"), strict=True):
        (noted,) = json.loads((copy / name / "robustness.json").read_text())
        means = {kind: sum(of["acc"]) / len(of["acc"]) for kind, of in noted["changes"].items()}
        assert row.pop("run") == f"shallow/{name}"
        expected = {"unchanged": noted["test/acc"], **means}
        assert {kind: float(value) for kind, value in row.items()} == pytest.approx(expected)


def test_a_run_without_an_epoch_has_a_page(logs: Path, tmp_path: Path) -> None:
    run = tmp_path / "young" / "version_0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text((logs / "version_0" / "config.yaml").read_text())
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "No epoch with a validation" in (tmp_path / "out" / "index.html").read_text()


def test_what_a_file_holds_cannot_become_part_of_the_page(logs: Path, tmp_path: Path) -> None:
    run = tmp_path / "<b>evil" / "version_0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("model: {class_path: '<script>alert(1)</script>', a: =1+1}")
    (run / "metrics.csv").write_text("epoch,val/acc,val/loss\n1,0.5,0.1\n")
    assert main(["report", str(run), str(logs), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script>alert" not in page
    assert "<b>evil" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "'=1+1" in (tmp_path / "out" / "tables" / "settings.csv").read_text()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"metrics.csv": 'a\n"'}, "metrics.csv is damaged"),
        ({"provenance.json": "{"}, "provenance.json is damaged"),
        ({"config.yaml": "a: ["}, "config.yaml: not a YAML file"),
        ({"robustness.json": '[{"evaluation": 1, "changes": 3}]'}, "robustness.json is damaged"),
    ],
)
def test_damaged_files_get_a_line(
    files: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "version_0"
    run.mkdir()
    for name, text in {"config.yaml": "seed: 1", **files}.items():
        (run / name).write_text(text)
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_searches_and_runs_do_not_share_a_page(
    logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Path(__file__).parent.parent / "lightning_logs" / "study" / "shallow_grid"
    assert main(["report", str(logs), str(study)]) == 1
    assert "reports of their own" in capsys.readouterr().err


def test_a_report_on_runs_needs_no_torch(logs: Path, tmp_path: Path) -> None:
    code = (
        "from mnist_lightning.__main__ import main; import sys;"
        f"assert main(['report', {str(logs)!r}, '--out', {str(tmp_path)!r}]) == 0;"
        "print(sorted({'torch', 'lightning', 'torchvision'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
