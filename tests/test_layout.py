"""The house: who may import whom, and what is imported when."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mnist_lightning"

# A file imports only from lower floors.
FLOORS = {
    "__init__": 0,
    "catalog": 0,
    "completion": 1,
    "doctor": 1,
    "files": 0,
    "console": 0,
    "provenance": 0,
    "names": 1,
    "words": 2,
    "parser": 4,
    "memory": 0,
    "data": 0,
    "space": 0,
    "callbacks": 1,
    "stacked": 0,
    "claims": 1,
    "execution": 2,
    "models": 3,
    "dashboard": 3,
    "results": 1,
    "evaluations": 1,
    "checkpoints": 4,
    "own": 4,
    "inspection": 4,
    "population": 4,
    "plan": 5,
    "published": 0,
    "analysis": 2,
    "figures": 3,
    "findings": 3,
    "report": 4,
    "worker": 6,
    "search": 7,
    "cli": 8,
    "__main__": 9,
}


def _imports(file: Path) -> set[str]:
    """Modules of the package that a file names in an import, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mnist_lightning"):
            inner = (node.module or "").split(".")[1:]
            found |= {inner[0]} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1] for alias in node.names if "mnist_lightning." in alias.name
            }
    return found & FLOORS.keys()


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("*.py")), ids=lambda file: file.stem)
def test_imports_go_down(file: Path) -> None:
    assert file.stem in FLOORS, f"{file.name} has no floor yet: give it one"
    above = {name for name in _imports(file) if FLOORS[name] >= FLOORS[file.stem]}
    assert not above


def _loaded(code: str) -> set[str]:
    code += "; import sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "words",
    [
        *([], ["--help"], ["--version"], ["fti"]),
        *(["configs"], ["configs", "shallow"], ["completion", "bash"]),
        ["completion", "--words", "fit", "--config", ""],
    ],
)
def test_help_and_typos_do_not_wait_for_torch(words: list[str]) -> None:
    loaded = _loaded(f"from mnist_lightning.__main__ import main; main({words!r})")
    assert loaded.isdisjoint({"torch", "lightning", "numpy", "jsonargparse", "yaml"})


def test_fit_imports_no_more_than_lightnings_command_line() -> None:
    """Start-up: what `import lightning.pytorch.cli` costs is the floor, and we stay on it."""
    heavy = {"pandas", "matplotlib", "sklearn", "optuna", "scipy", "tensorboard"}
    floor = _loaded("import lightning.pytorch.cli")
    assert (_loaded("import mnist_lightning.cli") - floor) & heavy == set()


def test_the_readme_has_the_map() -> None:
    """A line for each file of the package, and none for a file that is gone."""
    readme = (PACKAGE.parent / "README.md").read_text()
    block = readme.split("mnist_lightning/\n", 1)[1].split("configs/ ", 1)[0]
    named = {line.split()[0] for line in block.splitlines() if line.strip()}
    assert named == {file.name for file in PACKAGE.glob("*.py")} - {"__init__.py"}


def test_the_project_names_no_machine() -> None:
    """No registry's host, no absolute path: it must stand alone wherever it is cloned."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=PACKAGE.parent, capture_output=True, text=True
    ).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    forbidden = ["py" + "pi.org", "python" + "hosted", "/" + "work/", "/root" + "/"]
    for name in listed:
        content = (PACKAGE.parent / name).read_bytes()
        assert not [word for word in forbidden if word.encode() in content], name
