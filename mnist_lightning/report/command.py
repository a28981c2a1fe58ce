"""``python -m mnist_lightning report FOLDER...``: what searches or runs found, as one page."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mnist_lightning.console import PROGRAM


def main(argv: Sequence[str]) -> int:
    """``python -m mnist_lightning report FOLDER... [--out FOLDER]``.

    Raises:
        ValueError: nothing to report on, or the report cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} report",
        description="What searches or runs found, as one page with tables and figures.",
        exit_on_error=False,
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="of a search or a run, finished or not, or one that holds several",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="where to write (default: report)"
    )
    try:
        given, unknown = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if unknown:
        raise ValueError(f"report: no option {unknown[0]}; it has --out FOLDER")
    if not given.folders:
        raise ValueError(
            "report: of which search or run? Give its folder, like lightning_logs/search/NAME or"
            " lightning_logs/shallow"
        )
    # pandas, Optuna and matplotlib take about a second: help and errors do not wait for them
    from mnist_lightning.report.page import write

    write(given.folders, given.out, partial(print, flush=True))
    return 0
