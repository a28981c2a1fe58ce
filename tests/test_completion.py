"""Completion: what fits at the cursor, in the shells themselves; the options are the parsers'."""

import argparse
import inspect
import os
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mnist_lightning import MNISTDataModule
from mnist_lightning.__main__ import COMMANDS, main
from mnist_lightning.cli import CLI
from mnist_lightning.completion import SCRIPTS, candidates, options
from mnist_lightning.models.architectures import ARCHITECTURES
from mnist_lightning.search import command as search

FILE = Path(__file__).parent.parent / "mnist_lightning" / "options.tsv"


class _Parser(Exception):
    """Carries a parser out of the command that made it."""


def _of_cli(command: str) -> Any:
    """The parser of a command of Lightning's command line, or of ``inspect``."""
    run = command != "inspect"

    def catch(self: CLI, parser: Any, args: Any) -> None:
        raise _Parser(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLI, "parse_arguments", catch)
        try:
            CLI([command] if run else [], run=run)
        except _Parser as caught:
            parser = caught.args[0]
            return parser._subcommands_action.choices[command] if run else parser


def _of_main(main: Any) -> Any:
    """The plain argparse parser that a small command makes."""

    def catch(self: argparse.ArgumentParser, *_: Any) -> None:
        raise _Parser(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", catch)
        try:
            main([])
        except _Parser as caught:
            return caught.args[0]


def _values(hint: Any) -> Iterator[str]:
    """The texts that a type consists of, where it consists of a few."""
    if hint is bool:
        yield from ("true", "false")
    elif typing.get_origin(hint) is typing.Literal:
        yield from (str(value) for value in typing.get_args(hint))
    elif typing.get_origin(hint) not in (list, dict):
        for part in typing.get_args(hint):
            yield from _values(part)


def _of_class(group: str, cls: type) -> Iterator[tuple[str, Any]]:
    for kind in cls.__mro__:
        hints = typing.get_type_hints(kind.__init__)
        parameters = inspect.signature(kind).parameters
        for name, parameter in parameters.items():
            named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if named and name != "net":
                yield f"--{group}.{name}", hints[name]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return  # it passes nothing on to its bases


def _parsed() -> dict[str, tuple[list[str], list[str]]]:
    """Each option of the real parsers, with its commands and values."""
    from mnist_lightning import catalog, completion, doctor
    from mnist_lightning.deploy import demo, export, predict
    from mnist_lightning.report import command as report

    parsers = {
        **{name: _of_cli(name) for name in ("fit", "validate", "test", "predict")},
        "search": search._parser(),
        "report": _of_main(report.main),
        "demo": _of_main(demo.main),
        "export": _of_main(export.main),
        "inspect": _of_cli("inspect"),
        "configs": _of_main(catalog.main),
        "doctor": _of_main(doctor.main),
        "completion": _of_main(completion.main),
    }
    assert parsers.keys() == COMMANDS.keys()
    parsed: dict[str, tuple[dict[str, None], dict[str, None]]] = {}

    def note(command: str, option: str, hint: Any) -> None:
        commands, values = parsed.setdefault(option, ({}, {}))
        commands[command] = None
        values.update(dict.fromkeys(_values(hint)))

    for command, parser in parsers.items():
        # predict has another parser if it is given paths
        others = _of_main(predict.main)._actions if command == "predict" else []
        for action in (*parser._actions, *others):
            for option in action.option_strings:
                help_within = option.endswith(".help") and option.count(".") > 1
                if option.startswith("--") and not option.endswith("+") and not help_within:
                    note(command, option, getattr(action, "_typehint", None))
                    if command == "export":
                        parsed[option][1].update(dict.fromkeys(action.choices or ()))
        note(command, "--debug", None)
        if "--trainer" in parser._option_string_actions and command != "search":
            for cls in ARCHITECTURES.values():
                for option, hint in _of_class("model", cls):
                    note(command, option, hint)
            for option, hint in _of_class("data", MNISTDataModule):
                note(command, option, hint)
            if command != "inspect":
                note(command, "--trust", None)
    for option in ("--model", "--model.help"):
        parsed[option][1].update(dict.fromkeys(ARCHITECTURES))
    return {option: (list(parsed[option][0]), list(parsed[option][1])) for option in sorted(parsed)}


def test_options_are_those_of_the_parsers() -> None:
    """After a change of options: OPTIONS=write pytest tests/test_completion.py"""
    parsed = _parsed()
    if os.environ.get("OPTIONS") == "write":
        rows = ("\t".join((o, " ".join(c), " ".join(v))) for o, (c, v) in parsed.items())
        FILE.write_text("\n".join(rows) + "\n")
    assert {o.name: (o.commands, o.values) for o in options()} == parsed


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a training, a search and a configuration of one's own."""
    logs = tmp_path / "lightning_logs"
    for run in ("shallow/version_0", "shallow/version_1", "search/mine"):
        (logs / run / "checkpoints").mkdir(parents=True)
        (logs / run / "checkpoints" / "best.ckpt").touch()
    (logs / "broken" / "version_0").mkdir(parents=True)
    (tmp_path / "mine.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


FIT = ["--trainer.max_epochs", "--trainer.max_steps", "--trainer.max_time"]
CASES = [
    ("d", ["demo", "doctor"]),
    ("--v", ["--version"]),
    ("fit --trainer.max_", FIT),
    ("fit --model.hid", ["--model.hidden_units"]),
    ("fit --execution.threads 2 --sav", ["--save_every_minutes"]),
    ("fit --config sh", ["shallow.yaml", "shallow_best.yaml"]),
    ("fit -c mi", ["mine.yaml"]),
    ("search --config shallow_w", ["shallow_wide.yaml"]),
    ("search --config m", ["mine.yaml"]),
    ("fit --config=shallow.", ["--config=shallow.yaml"]),
    ("fit --config = shallow.", ["shallow.yaml"]),  # what bash makes of the line before
    ("fit --data.split =", ["study", "canonical"]),
    ("fit --data.split=st", ["--data.split=study"]),
    ("fit --model Sh", ["ShallowNetwork"]),
    ("fit --execution.fused ", ["true", "false"]),
    ("fit --execution.threads ", []),  # any number
    ("fit --nothing ", []),
    ("test --ckpt_path ", ["shallow", "shallow/best", "shallow/last", "search/mine"]),
    ("test --ckpt_path shallow/l", ["shallow/last"]),
    ("inspect --robust", []),  # an option of others
    ("configs deep2", ["deep2", "deep2_grid", "deep2_rates"]),
    ("completion ", ["bash", "zsh", "fish"]),
    ("report lightning_logs/", []),  # the shell offers files
    ("nonsense --c", []),
]


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_what_fits(line: str, expected: list[str], folder: Path) -> None:
    assert candidates(line.split(" ")) == expected


def test_every_command_is_offered() -> None:
    assert candidates([""])[: len(COMMANDS)] == list(COMMANDS)


# How each shell is asked what it would offer for: mnist-lightning fit --config per<TAB>
ASK = {
    "bash": """eval "$(mnist-lightning completion bash)"
complete -p mnist-lightning >/dev/null || exit 1
COMP_WORDS=(mnist-lightning fit --config per) COMP_CWORD=3
_mnist_lightning mnist-lightning; printf '%s\n' "${COMPREPLY[@]}" """,
    "zsh": """compdef() { [[ $1 = _mnist_lightning ]] || exit 1; }
compadd() { print -l ${(P)2}; }
eval "$(mnist-lightning completion zsh)"
words=(mnist-lightning fit --config per) CURRENT=4
_mnist_lightning""",
    "fish": """mnist-lightning completion fish | source
complete -C 'mnist-lightning fit --config per'""",
}


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_shells_offer_it(shell: str, folder: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    program = folder / "bin" / "mnist-lightning"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m mnist_lightning "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        [shell, "-c", ASK[shell]],
        env={
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "HOME": str(folder),
            "PYTHONPATH": str(FILE.parent.parent),
        },
        capture_output=True,
        text=True,
    )
    assert (done.stdout.split(), done.stderr) == (["perceptron.yaml"], "")


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 1
    assert main(["completion"]) == 1
    expected = "error: completion: for which shell? bash, zsh, fish\n"
    assert capsys.readouterr().err == 2 * expected
