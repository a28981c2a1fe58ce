"""The installed package: pinned versions, a complete wheel, types for type checkers."""

import ast
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mnist_lightning

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINNED = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
]


def _direct() -> list[Requirement]:
    """The requirements in pyproject.toml: dependencies, those of all extras, the build system."""
    project = PROJECT["project"]
    texts = [*project["dependencies"], *PROJECT["build-system"]["requires"]]
    for extra in project["optional-dependencies"].values():
        texts += extra
    named = [Requirement(text) for text in texts]
    return [requirement for requirement in named if requirement.name != project["name"]]


@pytest.mark.parametrize("requirement", _direct(), ids=lambda requirement: requirement.name)
def test_what_is_needed_is_pinned_within_its_range(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    pins = [pin for pin in PINNED if canonicalize_name(pin.name) == name]
    assert pins, f"{name} is not in constraints.txt; its first lines say how to write it again"
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert requirement.specifier.contains(exact.version)


def test_every_pin_is_exact() -> None:
    assert all([s.operator for s in pin.specifier] == ["=="] for pin in PINNED)


def test_installed_packages_of_ours_are_all_pinned() -> None:
    """Also indirect ones: our requirements, their requirements, and so on."""
    (torch,) = [pin for pin in PINNED if pin.name == "torch"]
    if not torch.specifier.contains(version("torch")):
        pytest.skip("another torch brings other packages")
    pinned = {canonicalize_name(pin.name) for pin in PINNED}
    todo, seen = [(r.name, r.extras) for r in _direct()], set()
    while todo:
        name, extras = todo.pop()
        key = (canonicalize_name(name), frozenset(extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            texts = requires(name) or []
        except PackageNotFoundError:  # an extra that is not installed
            continue
        for requirement in map(Requirement, texts):
            environments = [{"extra": extra} for extra in ("", *extras)]
            marker = requirement.marker
            if marker is None or any(marker.evaluate(given) for given in environments):
                todo.append((requirement.name, requirement.extras))
    assert {name for name, _ in seen} - pinned == set()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site-packages of an environment with only our wheel."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    (packages,) = (folder / "venv").glob("lib/*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    return packages


def test_the_wheel_has_what_it_needs(site: Path) -> None:
    package = site / "mnist_lightning"
    inside = {str(file.relative_to(package)) for file in package.rglob("*") if file.is_file()}
    sources = {file.name for file in (ROOT / "mnist_lightning").glob("*.py")}
    configs = {str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*.yaml")}
    assert inside >= sources | configs | {"py.typed", "__init__.pyi", "options.tsv"}
    assert len(list(site.glob("*.dist-info/licenses/LICENSE"))) == 1


def test_the_doctor_reads_the_same_ranges_from_the_wheel(site: Path) -> None:
    code = "from mnist_lightning import doctor; print(doctor.__file__); print(doctor._project())"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}"]
    done = subprocess.run(command, cwd=site, capture_output=True, text=True, check=True)
    file, said = done.stdout.splitlines()
    assert Path(file).parent == site / "mnist_lightning"
    ours, theirs = PROJECT["project"], ast.literal_eval(said)

    def same(texts: list[str]) -> set[str]:
        return {str(Requirement(text)).replace('"', "'") for text in texts}

    assert theirs["requires-python"] == ours["requires-python"]
    assert same(theirs["dependencies"]) == same(ours["dependencies"])
    for extra in ("search", "postgres", "export"):
        found = theirs["optional-dependencies"][extra]
        assert same(found) == same(ours["optional-dependencies"][extra])


def test_type_checkers_see_the_installed_package(site: Path, tmp_path: Path) -> None:
    """mypy on a user's program: a correct line, and one with a wrong argument."""
    program = tmp_path / "program.py"
    program.write_text(
        "from mnist_lightning import MNISTDataModule, ShallowNetwork\n"
        "data = MNISTDataModule(batch_size=8)\n"
        "model = ShallowNetwork(hidden_units=50)\n"
        "wrong = ShallowNetwork(hidden_units='fifty')\n"
        "reveal_type(data.batch_size)\n"
    )
    python = site.parent.parent.parent / "bin" / "python"
    words = ["--strict", "--ignore-missing-imports", f"--python-executable={python}", program.name]
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), *words]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(program.name)]
    assert len(lines) == 2
    assert 'program.py:4: error: Argument "hidden_units" to "ShallowNetwork"' in lines[0]
    assert lines[1] == 'program.py:5: note: Revealed type is "int"'


def test_the_stub_has_every_name() -> None:
    stub = (ROOT / "mnist_lightning" / "__init__.pyi").read_text()
    for name in mnist_lightning.__all__:
        assert f" as {name}\n" in stub or f"{name}: str\n" in stub, f"__init__.pyi lacks {name}"
