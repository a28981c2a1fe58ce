"""The notebooks in examples: as they are committed, and executed anew."""

import ast
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

import mnist_lightning

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "examples").glob("*.ipynb"))
COMMANDS = ("fit", "test", "predict", "inspect", "search", "report")
# a path from the root, but no HTML tag, no URL, no fraction
ABSOLUTE = re.compile(r"(?<![\w.:/<~*)}\]])/\w[\w.-]*/")

each = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def read(file: Path) -> Any:
    return nbformat.read(file, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell: Any) -> list[str]:
    """What a cell printed and showed, without its pictures."""
    found = [output.text for output in cell.outputs if output.output_type == "stream"]
    for output in cell.outputs:
        data = output.get("data", {})
        found += [text for kind, text in data.items() if kind.startswith("text/")]
    return found


def test_there_are_three() -> None:
    assert [file.stem for file in FILES] == ["1_first_network", "2_search", "3_own_images"]


@each
def test_the_outputs_are_those_of_one_execution(file: Path) -> None:
    notebook = read(file)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert all(output.output_type != "error" for output in cell.outputs)
        for text in texts(cell):
            assert not re.search(r"^(error|warning|usage):|Traceback", text, re.MULTILINE)
    pictures = [o for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 3
    assert file.stat().st_size < 600_000


@each
def test_the_outputs_name_no_machine(file: Path) -> None:
    notebook = read(file)
    for cell in code_cells(notebook):
        for text in (cell.source, *texts(cell)):
            assert not ABSOLUTE.findall(text)
    # nothing that another execution changes without need
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert not any(cell.metadata for cell in notebook.cells)


def test_absolute_paths_are_found() -> None:
    """The test of the test."""
    assert ABSOLUTE.search("see it: tensorboard --logdir /home/anna/lightning_logs")
    assert ABSOLUTE.search('"/srv/a.png"')
    assert not ABSOLUTE.search("lightning_logs/shallow/version_0 <td></td></tr> p (1 - p) / n")


@each
def test_it_uses_what_is_public(file: Path) -> None:
    """Names of the package, and its commands."""
    for cell in code_cells(read(file)):
        if cell.source.startswith("%%"):
            continue
        source = cell.source.replace("\\\n", " ")
        shell = re.findall(r"^!(.*)$", source, re.MULTILINE)
        for line in shell:
            program, option, module, command, *_ = shlex.split(line)
            assert (program, option, module) == ("python", "-m", "mnist_lightning")
            assert command in COMMANDS
        for node in ast.walk(ast.parse(re.sub(r"^!.*$", "", source, flags=re.MULTILINE))):
            if isinstance(node, ast.Import):
                assert not any(a.name.startswith("mnist_lightning") for a in node.names)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mnist_light"):
                assert node.module == "mnist_lightning"
                assert {alias.name for alias in node.names} <= set(mnist_lightning.__all__)


@each
def test_it_ends_with_three_exercises(file: Path) -> None:
    last = read(file).cells[-1]
    assert last.cell_type == "markdown"
    exercises = last.source.partition("## Exercises")[2]
    assert re.findall(r"^(\d)\. \*\*", exercises, re.MULTILINE) == ["1", "2", "3"]


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Executes a notebook in an empty folder; returns what all its cells printed and showed."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("HOME", "XDG_CACHE_HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "MPLCONFIGDIR"):
        (tmp_path / "home").mkdir(exist_ok=True)
        monkeypatch.setenv(name, str(tmp_path / "home"))
    # no network: where MNIST is not at hand, the notebooks use the digits
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    if "MNIST_DATA_DIR" in os.environ:
        monkeypatch.setenv("MNIST_DATA_DIR", str(Path(os.environ["MNIST_DATA_DIR"]).resolve()))
    elif (ROOT / "data" / "MNIST" / "raw").is_dir():
        monkeypatch.setenv("MNIST_DATA_DIR", str(ROOT / "data"))

    def in_folder(name: str) -> str:
        notebook = read(ROOT / "examples" / f"{name}.ipynb")
        resources = {"metadata": {"path": str(tmp_path)}}
        # an error in a cell ends the execution, and this test
        NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
        shown = "\n".join(text for cell in code_cells(notebook) for text in texts(cell))
        assert not re.search(r"^error:", shown, re.MULTILINE)
        return shown

    return in_folder


def is_mnist() -> bool:
    return "MNIST_DATA_DIR" in os.environ


@pytest.mark.slow
def test_the_first_network_learns_overfits_and_fails(execute: Any, tmp_path: Path) -> None:
    shown = execute("1_first_network")
    run, small = (tmp_path / "lightning_logs" / "shallow" / f"version_{n}" for n in (0, 1))
    (test,) = json.loads((run / "test.json").read_text())
    assert test["test/acc"] > (0.95 if is_mnist() else 0.88)
    assert f"test accuracy {test['test/acc']:.4f}, 95 % interval" in shown
    assert "Total params: 25,450" in shown
    # the curves of overfitting: the training images by heart, the validation loss rising again
    metrics = pd.read_csv(small / "metrics.csv")
    last = metrics.iloc[-1]
    assert last["train/acc"] > 0.99
    assert last["val/acc"] < last["train/acc"] - 0.08
    assert metrics["val/loss"].idxmin() < len(metrics) - 5
    assert last["val/loss"] > 1.02 * metrics["val/loss"].min()
    # "if they move by three pixels, most answers are wrong"; a small rotation is harmless
    lines = re.findall(r"^(shift|rotation) .*$", shown, re.MULTILINE)
    assert lines == ["shift", "rotation"]
    accuracies = {
        row[0]: [float(value) for value in re.findall(r": +(0\.\d{4})", row[1])]
        for row in re.findall(r"^(\w+) (.*:.*)$", shown, re.MULTILINE)
    }
    assert accuracies["shift"][2] < 0.5
    assert accuracies["rotation"][0] > test["test/acc"] - 0.1
    for picture in ("confusion", "mistakes", "weights", "robustness"):
        assert (run / "pictures" / f"{picture}.png").is_file()


@pytest.mark.slow
def test_the_search_finds_what_matters(execute: Any, tmp_path: Path) -> None:
    shown = execute("2_search")
    folder = tmp_path / "lightning_logs" / "search" / "first_search"
    results = mnist_lightning.load_results(folder)
    assert (results["state"] == "COMPLETE").sum() == len(results) == 135
    changes = dict(re.findall(r"^(\w+) +changes the mean accuracy by (\S+)$", shown, re.MULTILINE))
    effects = {name: float(value) for name, value in changes.items()}
    # "The learning rate matters most, and the batch size is second."
    assert effects["lr"] > effects["batch_size"] > effects["hidden_units"] > 0
    # "the three curves are almost one": the way explains the accuracy, far better than the rate
    wide = results[results["hidden_units"] == 100]
    way = (wide["lr"] / wide["batch_size"]).corr(wide["val_acc"], method="spearman")
    assert way > wide["lr"].corr(wide["val_acc"], method="spearman") + 0.1
    assert way > 0.85
    (test,) = json.loads((folder / "test.json").read_text())
    assert test["test/acc"] > (0.96 if is_mnist() else 0.88)
    assert f"the winner on the test images        {test['test/acc']:.4f} ±" in shown
    assert (tmp_path / "report" / "index.html").is_file()


@pytest.mark.slow
def test_own_images_are_learned_and_wrong_labels_found(execute: Any, tmp_path: Path) -> None:
    shown = execute("3_own_images")
    run = tmp_path / "lightning_logs" / "conv" / "version_0"
    (test,) = json.loads((run / "test.json").read_text())
    assert test["test/acc"] > 0.8
    suspicious, found, wrong = map(
        int,
        re.search(
            r"(\d+) images are suspicious\n(\d+) of them really have a wrong label, of (\d+) in",
            shown,
        ).groups(),
    )
    assert found > wrong / 2
    assert found > suspicious / 3
    predictions = pd.read_csv(run / "predictions.csv")
    assert len(predictions) == 3
    (star,) = predictions["predicted"][predictions["image"].str.endswith("star.png")]
    assert star == "star"
    assert (run / "pictures" / "mistakes.png").is_file()
    assert (tmp_path / "new" / "house.png").is_file()
