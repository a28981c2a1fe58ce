"""What a user sees: output on a terminal and in a pipe, help, hints to paste, errors for typos."""

import csv
import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import trainer
from packaging.requirements import Requirement

from mnist_lightning import MNISTDataModule, ShallowNetwork, console, words
from mnist_lightning.__main__ import EXTRAS, main
from mnist_lightning.cli import CLI
from mnist_lightning.configs import read_request
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.runs.messages import progress_text
from mnist_lightning.training.progress import EpochLines

FIT = "fit --config shallow --data.source digits --model.lr 0.3 --trainer.max_epochs 4".split()
RUN = Path("lightning_logs/shallow/version_0")
MINI_BATCHES = 162  # of 8 images in the 1,294
Printed = pytest.CaptureFixture[str]


def in_a_terminal(words: list[str], folder: Path, columns: int) -> str:
    """Runs a command in its own terminal; returns everything that it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, "-m", "mnist_lightning", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return written.decode()


def shown(written: str) -> list[str]:
    """The final content of the screen: after a carriage return, a line is overwritten."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        row: list[str] = []
        for part in line.split("\r"):
            row[: len(part)] = part
        lines.append("".join(row).rstrip())
    return lines


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a run that was trained in a terminal, and the final screen."""
    folder = tmp_path_factory.mktemp("with a space")
    return folder, in_a_terminal(FIT, folder, 80)


@pytest.fixture
def there(terminal: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of that folder, to work in."""
    folder = tmp_path / "a copy"
    shutil.copytree(terminal[0], folder)
    monkeypatch.chdir(folder)
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / RUN / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def best_epochs(folder: Path) -> list[int]:
    """The epochs that were better than all earlier ones."""
    values = [float(row["val/acc"]) for row in rows_of(folder)]
    return [i + 1 for i, value in enumerate(values) if value > max(values[:i], default=-1)]


def table(lines: list[str]) -> list[list[str]]:
    return [line.split() for line in lines if re.match(r" +\d+ ", line)]


def hints(text: str) -> list[str]:
    """The commands in a text: alone on a line, or after a label and spaces."""
    known = r"-m (mnist_lightning|tensorboard\.main) |^(mnist-lightning|tensorboard) "
    commands = (re.split(r" {2,}", line)[-1] for line in text.splitlines())
    return [command for command in commands if re.search(known, command)]


def pasted(hint: str) -> "subprocess.CompletedProcess[str]":
    """Runs a hint in a shell without an activated environment."""
    env = {**os.environ, "PATH": "/usr/bin:/bin"}
    return subprocess.run(hint, shell=True, env=env, capture_output=True, text=True)


def pasted_here(hint: str) -> int:
    """The same for one of our commands, in this process, to save the start-up time."""
    python, dash_m, package, *rest = shlex.split(hint)
    assert os.path.samefile(shutil.which(python) or python, sys.executable)
    assert (dash_m, package) == ("-m", "mnist_lightning")
    return main(rest)


# ---- the terminal


def test_a_terminal_keeps_a_table_of_the_epochs(terminal: tuple[Path, str]) -> None:
    folder, written = terminal
    lines = shown(written)
    header = next(line for line in lines if line.startswith("epoch "))
    names = header.split()
    assert names == ["epoch", "train/loss", "train/acc", "val/loss", "val/acc", "secs"]
    rows = table(lines)
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    for row, logged in zip(rows, rows_of(folder), strict=True):
        assert row[1:5] == [f"{float(logged[name]):.4f}" for name in names[1:5]]
        assert 0 <= float(row[5]) < 600
    assert [int(row[0]) for row in rows if row[-1] == "best"] == best_epochs(folder)


def test_the_live_line_counts_mini_batches_and_leaves_nothing(terminal: tuple[Path, str]) -> None:
    folder, written = terminal
    assert re.search(rf"\repoch 1 of 4: +\d+%\|[^\r]*\| {MINI_BATCHES}/{MINI_BATCHES}, ", written)
    assert "epoch 4 of 4, validation: " in written
    lines = shown(written)
    assert not [line for line in lines if "%|" in line or " left" in line]
    assert "steps per execution: 256, fused; 1 thread" in lines
    best = next(line for line in lines if line.startswith("best epoch"))
    assert best == f"best epoch   {best_epochs(folder)[-1]} of 4"


@pytest.mark.slow
def test_the_hints_of_a_training_work_where_nothing_is_activated(
    terminal: tuple[Path, str], there: Path
) -> None:
    test, board = hints(terminal[1].replace("\r\n", "\n"))
    assert pasted(test).returncode == 0
    assert json.loads((there / RUN / "test.json").read_text())[0]["images"] == 180
    assert "val/acc" in pasted(f"{board} --inspect").stdout


def as_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


def test_without_the_bar_the_table_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: Printed, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    as_terminal(monkeypatch)
    assert main([*FIT, "--trainer.enable_progress_bar", "false"]) == 0
    out = capsys.readouterr().out
    assert [row[0] for row in table(out.splitlines())] == ["1", "2", "3", "4"]
    assert "\r" not in out


def test_a_pipe_gets_named_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: Printed, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(FIT) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("epoch ")]
    for number, (line, logged) in enumerate(zip(lines, rows_of(tmp_path), strict=True), 1):
        figures = "  ".join(f"{name} {float(logged[name]):.4f}" for name in EpochLines.FIGURES)
        mark = "  best" if number in best_epochs(tmp_path) else ""
        assert re.fullmatch(rf"epoch   {number}/4  {figures}  \d+\.\d s{mark}", line)
    assert "\r" not in out


class WithMetrics(ShallowNetwork):
    """Logs one metric of its own for the screen, and one that is not shown."""

    steps_known = True

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("val/f1", 0.25, prog_bar=True)
        self.log("val/hidden", 0.125)


class OtherNames(ShallowNetwork):
    """Logs its metrics under the names of Lightning's tutorials."""

    def on_train_epoch_end(self) -> None:
        self.log("train_loss", 0.5)

    def on_validation_epoch_end(self) -> None:
        self.log("val_accuracy", 0.75)


@pytest.mark.parametrize(
    ("model", "width", "header"),
    [
        (ShallowNetwork, 60, "epoch  train/loss  train/acc  val/loss  val/acc   secs"),
        (WithMetrics, 60, "epoch  train/loss  train/acc  val/loss  val/acc   secs"),
        (WithMetrics, 80, "epoch  train/loss  train/acc  val/loss  val/acc   val/f1   secs"),
        (OtherNames, 80, "epoch  val_accuracy  train_loss   secs"),
    ],
)
def test_the_table_fits_the_terminal_and_the_model(
    model: type[Classifier],
    width: int,
    header: str,
    digits: MNISTDataModule,
    capsys: Printed,
) -> None:
    trainer(callbacks=[EpochLines(width)], max_epochs=2).fit(model(4), digits)
    _, said, *rows = capsys.readouterr().out.splitlines()[-4:]
    assert said == header
    assert [row.split()[0] for row in rows] == ["1", "2"]
    assert max(len(line) for line in (said, *rows)) + len("  best") <= width
    if "f1" in header:
        assert [row.split()[5] for row in rows] == ["0.2500", "0.2500"]


# ---- what is resumed


def test_a_resumed_training_says_what_it_resumes(there: Path, capsys: Printed) -> None:
    best, score = best_epochs(there)[-1], max(float(row["val/acc"]) for row in rows_of(there))
    assert best < 4, "the test needs a best epoch before the last one"
    sessions = there / RUN / "provenance.json"
    sessions.write_text(sessions.read_text().replace('"threads": 1', '"threads": 2'))
    assert main("fit --ckpt_path shallow/last --trainer.max_epochs 5".split()) == 0
    out = capsys.readouterr().out
    assert f"resuming {RUN}/checkpoints/last.ckpt after epoch 4, with {RUN}/config.yaml\n" in out
    assert f"best so far: val/acc {score:.4f} in epoch {best}\n" in out
    assert "threads 1, 2 before: the results differ from those of" in out
    (line,) = re.findall(r"^epoch .*", out, re.MULTILINE)
    assert line.startswith("epoch   5/5")
    assert line.endswith("best") == (float(rows_of(there)[-1]["val/acc"]) > score)


def test_going_on_from_the_best_epoch_says_so(there: Path, capsys: Printed) -> None:
    assert best_epochs(there)[-1] == 3
    assert main("fit --ckpt_path shallow/best --trainer.max_epochs 4".split()) == 0
    out = capsys.readouterr().out
    assert "this is the best epoch: epoch 4 is trained again. To resume after the last one:" in out
    assert "before: the results" not in out  # the same threads, processes ...
    assert pasted_here(hints(out)[0]) == 0
    assert "last.ckpt after epoch 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("epochs", "batches", "text"),
    [
        (4, 0, "epoch 4"),
        (0, 1200, "1,200 mini-batches of epoch 1"),
        (4, 12, "epoch 4 and 12 mini-batches of epoch 5"),
    ],
)
def test_how_far_a_training_is(epochs: int, batches: int, text: str) -> None:
    assert progress_text(epochs, batches) == text


def test_an_early_stop_is_of_the_session_that_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: Printed, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    stop = ["--early_stopping.min_delta", "9", "--early_stopping.patience", "1"]
    assert main([*FIT, *stop]) == 0
    assert "of 2 (stopped early)\n" in capsys.readouterr().out
    more = "fit --ckpt_path shallow/last --early_stopping.patience 9 --trainer.max_epochs 3"
    assert main(more.split()) == 0
    assert re.search(r"^best epoch   \d of 3$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
def test_of_two_processes_one_speaks(tmp_path: Path) -> None:
    two = "--trainer.devices 2 --trainer.strategy ddp --trainer.accelerator cpu".split()
    words = [sys.executable, "-m", "mnist_lightning", *FIT[:-1], "2", *two]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert len(re.findall(r"^epoch ", done.stdout, re.MULTILINE)) == 2
    assert done.stdout.count("one step at a time: 2 processes exchange gradients") == 1
    assert done.stdout.count("one step at a time") == 1


# ---- hints


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """The programs of an environment in a folder whose name has a space."""
    bin = tmp_path / "my env" / "bin"
    bin.mkdir(parents=True)
    (bin / "mnist-lightning").write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m mnist_lightning "$@"\n'
    )
    (bin / "mnist-lightning").chmod(0o755)
    return bin


@pytest.mark.parametrize("on_path", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_the_console_script_is_named_as_it_can_be_typed(
    environment: Path, on_path: bool, relative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(environment.parent.parent if relative else "/")
    path = f"{environment if on_path else ''}:/usr/bin:/bin"
    monkeypatch.setenv("PATH", path)
    monkeypatch.setattr(sys, "argv", [str(environment / "mnist-lightning"), "fit"])
    hint = console.command("test", "--ckpt_path", "a run")
    if on_path:
        assert hint == "mnist-lightning test --ckpt_path 'a run'"
    elif relative:
        assert hint == "'my env/bin/mnist-lightning' test --ckpt_path 'a run'"
    done = subprocess.run(console.command("--version"), shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{_version()}\n"), done.stderr


def _version() -> str:
    from mnist_lightning import __version__

    return __version__


def _other_python(folder: Path) -> str:
    """A ``python`` that is another program."""
    folder.mkdir()
    (folder / "python").write_text("#!/bin/sh\nexit 3\n")
    (folder / "python").chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    "path",
    [
        lambda tmp: os.path.dirname(sys.executable),
        lambda tmp: f"{_other_python(tmp / 'other')}:{os.path.dirname(sys.executable)}",
        lambda tmp: f"{_other_python(tmp / 'other')}:/usr/bin:/bin",
        lambda tmp: "/nowhere",
    ],
    ids=["activated", "another first", "another", "none"],
)
def test_python_is_named_as_it_can_be_typed(
    path: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", path(tmp_path))
    hint = console.command("--version")
    done = subprocess.run(hint, shell=True, executable="/bin/sh", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{_version()}\n"), done.stderr
    board = shlex.split(console.tensorboard("a folder"))
    assert shutil.which(board[0])
    assert board[-2:] == ["--logdir", "a folder"]


def test_the_first_page_says_commands_that_work(capsys: Printed) -> None:
    assert main([]) == 0
    fit, board, test = hints(capsys.readouterr().out.partition("A first training")[2])
    assert shlex.split(fit)[-3:] == ["fit", "--config", "shallow.yaml"]
    assert shlex.split(test)[-3:] == ["test", "--ckpt_path", "lightning_logs/shallow"]
    for hint in (fit, board, test):
        assert shutil.which(shlex.split(hint)[0])


def test_a_missing_package_comes_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["search", "--config", "shallow_grid"]) == 1
    command = capsys.readouterr().err.partition("search needs optuna: ")[2]
    python, *pip, what = shlex.split(command)
    assert os.path.samefile(shutil.which(python) or python, sys.executable)
    assert pip[:3] == ["-m", "pip", "install"]
    assert what.endswith("[search]")


def test_a_missing_driver_behind_another_error_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    for package in ("psycopg", "psycopg2"):
        monkeypatch.setitem(sys.modules, package, None)
    flags = ["--storage", "postgresql://me@127.0.0.1/x", "--data.source", "digits"]
    assert main(["search", "--config", "shallow_wide", *flags]) == 1
    assert re.fullmatch(
        r"error: search needs psycopg2: \S* -m pip install .*\[postgres\]'?\n",
        capsys.readouterr().err,
    )


def test_the_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    for extra in ("search", "postgres", "export"):
        needed = {Requirement(r).name for r in project["project"]["optional-dependencies"][extra]}
        known = {package for package, of in EXTRAS.items() if of == extra}
        assert {name.removesuffix("-binary") for name in needed} == known


# ---- help


def _help(words: str, capsys: Printed) -> str:
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 0
    return capsys.readouterr().out


ASKED = [
    ("fit --help --config shallow", ["--model.hidden_units", "--model.lr", "size of the hidden"]),
    ("fit --config shallow -h", ["--model.hidden_units", "(type: int, default: 100)"]),
    ("validate -h --model Perceptron", ["--model.lr", "the sum over the mini-batch"]),
    ("inspect --model ResNet18 --help", ["--model.regime", "--model.stem"]),
]


@pytest.mark.parametrize(("asked", "parts"), ASKED)
def test_help_shows_the_options_of_the_model_first(
    asked: str, parts: list[str], capsys: Printed
) -> None:
    text = _help(asked, capsys)
    assert text.startswith(f"usage: mnist-lightning {asked.split()[0]} ")
    order = "model.lr data.batch_size early_stopping.patience freezing.train trainer.accelerator"
    places = [text.index(f"\n  --{name} ") for name in order.split()]
    assert places == sorted(places)
    for part in parts:
        assert part in " ".join(text.split())


def test_help_of_a_run_shows_what_it_was_trained_with(there: Path, capsys: Printed) -> None:
    text = " ".join(_help("test --ckpt_path shallow --help", capsys).split())
    assert "--model.lr LR learning rate. (type: float, default: 0.3)" in text


def test_help_without_a_model_says_how_to_see_its_options(capsys: Printed) -> None:
    text = _help("fit --help", capsys)
    assert "--model.lr" not in text
    top = text.partition("general:")[0]
    for name in ("ShallowNetwork", "ResNet18", "shallow.yaml", "my_module.MyModel"):
        assert name in top
    for hint in hints(top):
        _, _, _, *rest = shlex.split(hint)
        assert "--model.lr" in _help(shlex.join(rest), capsys)


# ---- typos

TYPOS = [
    "fit",
    "fit --cofnig shallow",
    "fit --config",
    "fit --config shalow",
    "fit --config shallow --trainer.max_epoch 3",
    "fit --config shallow --model.hiden_units=3",
    "fit --model Shalow",
    "test",
    "test --ckpt_path nowhere",
    "inspect --config shallow --data.batchsize 3",
    "search --config shalow_grid",
]


def test_typos_are_answered_before_anything_heavy_is_imported() -> None:
    code = (
        "import json, sys\nfrom mnist_lightning.__main__ import main\n"
        f"codes = [main(words.split()) for words in {TYPOS!r}]\n"
        "print(json.dumps([codes, sorted({name.split('.')[0] for name in sys.modules})]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    codes, loaded = json.loads(done.stdout)
    assert codes == [1] * len(TYPOS)
    assert len(done.stderr.splitlines()) == len(TYPOS)
    assert not {"torch", "lightning", "numpy", "scipy", "optuna"} & set(loaded)


class _Seen(Exception):
    pass


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "inspect"])
def test_what_the_parser_knows_is_no_typo(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick check reads the options from the sources; they must be the parser's."""
    known: set[str] = set()

    def look(self: CLI, parser: Any, args: Any) -> None:
        nested = parser._subcommands_action
        parser = nested.choices[command] if nested else parser
        known.update(option for action in parser._actions for option in action.option_strings)
        raise _Seen

    monkeypatch.setattr(CLI, "parse_arguments", look)
    with pytest.raises(_Seen):
        CLI([command] if command != "inspect" else [], run=command != "inspect")
    for option in known:
        words._check_options(
            command, [name for name, _ in words.options([option, "1"])], read_request([])
        )
    for group in ("trainer", "data", "early_stopping", "freezing"):
        with pytest.raises(ValueError, match=f"no option --{group}.nonsense"):
            words._check_options(command, [f"{group}.nonsense"], read_request([]))


@pytest.mark.slow
def test_a_start_imports_no_scipy_signal_and_leaves_it_usable(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom mnist_lightning.__main__ import main\n"
        "assert main('inspect --config shallow --data.source digits'.split()) == 0\n"
        "print('scipy.signal' in sys.modules, 'sklearn' in sys.modules)\n"
        "import scipy.signal\nprint(scipy.signal.convolve([1, 2], [1, 1]).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-2:] == ["False False", "[1, 3, 2]"]
