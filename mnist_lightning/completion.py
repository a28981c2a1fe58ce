"""Completion for bash, zsh and fish.

At each TAB the shell asks this program for candidates, so nothing heavy is imported: the options
of the commands are in ``options.tsv``, and a test compares that file with their parsers.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mnist_lightning.catalog import shipped_configs

# What each shell runs once. If there are no candidates, it offers files, as for other programs.
SCRIPTS = {
    "bash": """
_mnist_lightning() {
    local IFS=$'\\n'
    COMPREPLY=($("$1" completion --words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _mnist_lightning mnist-lightning""",
    "zsh": """
_mnist_lightning() {
    local -a candidates
    candidates=(${(f)"$("${(Q)words[1]}" completion --words "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( $#candidates )); then compadd -a candidates; else _files; fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
compdef _mnist_lightning mnist-lightning""",
    "fish": """
function _mnist_lightning
    set -l words (commandline -opc)
    set -l candidates ($words[1] completion --words $words[2..] (commandline -ct) 2>/dev/null)
    if set -q candidates[1]
        printf '%s\\n' $candidates
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c mnist-lightning -f -a '(_mnist_lightning)'""",
}


class Option(NamedTuple):
    """An option, the commands that have it, and its values if they are few."""

    name: str
    commands: list[str]
    values: list[str]


def main(argv: Sequence[str]) -> int:
    """``mnist-lightning completion SHELL``.

    Raises:
        ValueError: the shell is another one.
    """
    if argv[:1] == ["--words"]:  # from the shell: the arguments up to the cursor
        print("\n".join(candidates(argv[1:])))
        return 0
    parser = argparse.ArgumentParser(
        prog="mnist-lightning completion",
        description="Print a script that makes a shell complete commands, options and names.",
        epilog="""In ~/.bashrc:   eval "$(mnist-lightning completion bash)"
In ~/.zshrc:    eval "$(mnist-lightning completion zsh)"
In ~/.config/fish/config.fish:   mnist-lightning completion fish | source""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument("shell", nargs="?", metavar="SHELL", help=", ".join(SCRIPTS))
    given, unknown = parser.parse_known_args(list(argv))
    if unknown or given.shell not in SCRIPTS:
        raise ValueError(f"completion: for which shell? {', '.join(SCRIPTS)}")
    print(SCRIPTS[given.shell].strip())
    return 0


def options() -> list[Option]:
    """The options of all commands."""
    lines = Path(__file__).with_name("options.tsv").read_text().splitlines()
    rows = (line.split("\t") for line in lines)
    return [Option(name, commands.split(), values.split()) for name, commands, values in rows]


def candidates(argv: Sequence[str]) -> list[str]:
    """What can replace the last argument.

    Args:
        argv: after the program's name; the last argument is being typed and may be empty. Bash
            gives ``--option=value`` as three arguments.
    """
    *before, current = [argument for argument in argv if argument != "="] or [""]
    if argv[-1:] == ["="]:
        before, current = [*before, current], ""
    if not before:
        commands = next(option.commands for option in options() if option.name == "--help")
        return _fitting([*commands, "--help", "--version"], current)
    option, equals, value = current.partition("=")
    if equals and option.startswith("--"):
        return [f"{option}={fitting}" for fitting in _fitting(_values(before[0], option), value)]
    if before[-1].startswith("-") and (values := _values(before[0], before[-1])):
        return _fitting(values, current)
    if before[0] == "configs":
        named = [file.stem for by in ("fit", "search") for file in shipped_configs(by)]
        return _fitting(named, current)
    if before[0] == "completion":
        return _fitting(list(SCRIPTS), current)
    if current.startswith("-") or not before[-1].startswith("-"):
        return _fitting([o.name for o in options() if before[0] in o.commands], current)
    return []


def _fitting(names: list[str], start: str) -> list[str]:
    return [name for name in names if name.startswith(start)]


def _values(command: str, option: str) -> list[str]:
    if option in ("-c", "--config"):
        shipped = shipped_configs("search" if command == "search" else "fit")
        files = [*shipped, *Path().glob("*.yaml")]
        return sorted({file.name for file in files})
    if option == "--ckpt_path":
        return _runs(Path("lightning_logs"))
    return next((o.values for o in options() if o.name == option and command in o.commands), [])


def _runs(root: Path) -> list[str]:
    """Names of trainings and searches, for ``--ckpt_path``."""
    trainings = {path.parts[-4] for path in root.glob("*/version_*/checkpoints/best.ckpt")}
    searches = {path.parts[-3] for path in root.glob("search/*/checkpoints/best.ckpt")}
    return [
        *(f"{name}{kind}" for name in sorted(trainings) for kind in ("", "/best", "/last")),
        *(f"search/{name}" for name in sorted(searches)),
    ]
