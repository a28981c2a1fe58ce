"""The options that all commands on a trained network have."""

import argparse
from collections.abc import Sequence
from typing import Any

from mnist_lightning.console import PROGRAM


def make_parser(command: str, description: str, **settings: Any) -> argparse.ArgumentParser:
    """Makes the parser of a command, with ``--ckpt_path``, ``--model`` and ``--trust``.

    Args:
        command: its word.
        description: for the help.
        settings: more arguments of ``ArgumentParser``.
    """
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {command}",
        description=description,
        allow_abbrev=False,
        exit_on_error=False,
        **settings,
    )
    parser.add_argument(
        "--ckpt_path",
        metavar="RUN",
        help="a checkpoint: a file, the folder of a run, or the name of a run; several answer"
        " together, as an ensemble",
    )
    parser.add_argument("--model", metavar="CLASS", help="the class of a model of your own")
    parser.add_argument(
        "--trust", action="store_true", help="import the class that the checkpoint names"
    )
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], known: str = "all of them: --help"
) -> argparse.Namespace:
    """Parses what the user typed after the command's word.

    Args:
        parser: of ``make_parser``.
        argv: what the user typed.
        known: says which options there are.

    Raises:
        ValueError: an option is unknown or has a wrong value, or no run is named.
    """
    command = parser.prog.rpartition(" ")[2]
    try:
        given, unknown = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ValueError(f"{command}: {error}") from error
    if unknown:
        raise ValueError(f"{command}: no option {unknown[0]}; {known}")
    if given.ckpt_path is None:
        raise ValueError(
            f"{command} needs trained weights: --ckpt_path FILE, or the folder of a run"
        )
    return given
