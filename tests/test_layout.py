"""The house: who may import whom, and what is imported when."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mnist_lightning

PROJECT = Path(__file__).parent.parent
PACKAGE = PROJECT / "mnist_lightning"
# the package itself is above and below all: its names are imported when they are first used
ROOT = "__init__"


def read_map(readme: str) -> list[str]:
    """The files of README's map from top to bottom, as paths within the package."""
    block = readme.split("mnist_lightning/\n", 1)[1].split("configs/ ", 1)[0]
    files, wing = [], ""
    for line in filter(str.strip, block.splitlines()):
        name = line.split()[0]
        indent = len(line) - len(line.lstrip())
        if name.endswith("/"):
            wing = name
            files.append(f"{wing}{ROOT}.py")  # it may import its wing's files, from outside none
        else:
            files.append(f"{wing if indent > 2 else ''}{name}")
    return files


def modules(package: Path) -> dict[str, Path]:
    """Every file of a package by the name of its module, without the package's own."""
    return {
        ".".join(file.relative_to(package).with_suffix("").parts): file
        for file in sorted(package.rglob("*.py"))
    }


def imported(file: Path, known: set[str], package: str, homes: dict[str, str]) -> Iterator[str]:
    """The modules that a file imports, wherever in the file, and those it names to import later."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative imports hide where they lead"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix(f"{package}.")
                inner = homes.get(inner, inner)
                if not {inner, f"{inner}.{ROOT}"} & known:  # a name in a module
                    inner = (node.module or "").removeprefix(f"{package}.")
                names.append(inner)
        elif isinstance(node, ast.Import):
            names += [alias.name.removeprefix(f"{package}.") for alias in node.names]
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
            texts = (one.value for one in node.args if isinstance(one, ast.Constant))
            names += [str(text).removeprefix(f"{package}.") for text in texts]
        for name in names:
            yield from (one for one in (name, f"{name}.{ROOT}") if one in known)


def faults(package: Path, order: list[str], homes: dict[str, str]) -> list[str]:
    """What is wrong with the imports of a package.

    Args:
        package: its folder.
        order: its files, the highest first.
        homes: where names lie that the package itself hands on.
    """
    known = modules(package)
    floors = {name.removesuffix(".py").replace("/", "."): n for n, name in enumerate(order)}
    found = [f"{name} is in the package, not in the map" for name in known.keys() - floors.keys()]
    found += [f"{name} is in the map, not in the package" for name in floors.keys() - known.keys()]
    wings: dict[str, set[str]] = {}
    for name, file in known.items():
        if name == ROOT:
            continue
        for other in imported(file, set(known) - {ROOT}, package.name, homes):
            if floors.get(other, -1) <= floors.get(name, -1) and other != name:
                found.append(f"{name} imports {other}, which is above it")
            ends = [one.rpartition(".")[0] for one in (name, other)]
            if all(ends) and ends[0] != ends[1]:
                wings.setdefault(ends[0], set()).add(ends[1])
    found += [
        f"{one} and {other} import each other"
        for one, others in wings.items()
        for other in others
        if one < other and one in wings.get(other, ())
    ]
    return sorted(set(found))


def test_imports_go_down() -> None:
    order = [f"{ROOT}.py", *read_map((PROJECT / "README.md").read_text())]
    homes = {name: home for name, home in mnist_lightning._HOMES.items()}
    assert faults(PACKAGE, order, homes) == []


def test_upward_and_circular_imports_are_found(tmp_path: Path) -> None:
    """The test of the test: a made-up package, with each fault once."""
    files = {
        "__init__.py": "",
        "top.py": "from house.upper import room\nfrom house import ground",
        "upper/__init__.py": "",
        "upper/room.py": "from house.lower.cellar import x",
        "lower/__init__.py": "",
        "lower/hall.py": "def later():\n    from house.upper.room import y",  # upward, and lazily
        "lower/cellar.py": "import house.lower.hall",  # upward within the wing
        "ground.py": "from importlib import import_module\nimport_module('house.top')",
        "below.py": "from house import Name",  # a name that the package hands on
        "new.py": "",
    }
    package = tmp_path / "house"
    for name, text in files.items():
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    listed = [name for name in files if name != "new.py"]
    assert faults(package, [*listed, "gone.py"], {"Name": "ground"}) == [
        "below imports ground, which is above it",
        "gone is in the map, not in the package",
        "ground imports top, which is above it",
        "lower and upper import each other",
        "lower.cellar imports lower.hall, which is above it",
        "lower.hall imports upper.room, which is above it",
        "new is in the package, not in the map",
    ]


def test_every_lazy_name_is_there() -> None:
    for name in mnist_lightning.__all__:
        assert getattr(mnist_lightning, name) is not None


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
        *(["report"], ["report", "--colour"]),
        *(["export"], ["export", "--colour"], ["export", "--format", "pdf"]),
    ],
)
def test_help_and_typos_do_not_wait_for_torch(words: list[str]) -> None:
    loaded = _loaded(f"from mnist_lightning.__main__ import main; main({words!r})")
    assert loaded.isdisjoint({"torch", "lightning", "numpy", "jsonargparse", "yaml", "matplotlib"})


def test_fit_imports_no_more_than_lightnings_command_line() -> None:
    """Start-up: what `import lightning.pytorch.cli` costs is the floor, and we stay on it."""
    heavy = {"pandas", "matplotlib", "sklearn", "optuna", "scipy", "tensorboard"}
    code = (
        "import sys, lightning.pytorch.cli; floor = set(sys.modules); import mnist_lightning.cli;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - floor})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.splitlines()[-1].split()) & heavy == set()


def test_the_project_names_no_machine() -> None:
    """No registry's host, no absolute path: it must stand alone wherever it is cloned."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True
    ).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    forbidden = ["py" + "pi.org", "python" + "hosted", "/" + "work/", "/root" + "/"]
    for name in listed:
        content = (PROJECT / name).read_bytes()
        assert not [word for word in forbidden if word.encode() in content], name
