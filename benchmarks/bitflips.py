"""Flips single bits in the files of a run and of a search: which flips are noticed?

    python benchmarks/bitflips.py               # a minute; writes its table to reliability.md
    python benchmarks/bitflips.py --flips 500   # of each kind of file

Each flip turns one random bit of one file. Then the file is read as the commands read it. A flip is
noticed if that raises an error which names the file; harmless if what was read is the same (a bit
of padding, or of a time stamp in the archive); and else it has passed unnoticed.
"""

import argparse
import contextlib
import csv
import io
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torture
from common import RELIABILITY, write_section

from mnist_lightning.__main__ import main as command
from mnist_lightning.configs import read_config
from mnist_lightning.files import read_json, read_torch
from mnist_lightning.provenance import provenance
from mnist_lightning.runs import checkpoints, evaluations
from mnist_lightning.search import worker
from mnist_lightning.search.leases import open_storage
from mnist_lightning.search.results import Results, _read_tables
from mnist_lightning.training.population import PopulationTraining

OUTCOMES = ("noticed", "harmless", "unnoticed")
TITLE = "## Bits that flip"
SECTION = f"""{TITLE}

`python benchmarks/bitflips.py --flips {{flips}} --seed {{seed}}`, commit {{commit}}. One random bit
of a file is flipped, then the file is read as the commands read it. Noticed: an error names the
file. Harmless: what was read is the same, as with a bit of padding. Of a damaged `last.ckpt` or
`best.ckpt` the error names the other one if that is whole; a search sets damaged trials, weights
and states aside, says so, and trains them again. The other files are read by people and by other
programs, and have no checksum: there a flip is noticed only where it breaks the format, and a
flipped digit passes. Nothing is trained or scored from them, but for `config.yaml`, which a resumed
training starts from, and `search.json`, whose settings are compared with those asked for.

| file | flips | noticed | harmless | unnoticed | what follows |
|---|--:|--:|--:|--:|---|
{{rows}}
"""


class Interrupted(BaseException):
    """Ends a search, so that it leaves a state and a journal."""


def make(folder: Path) -> tuple[Path, Path]:
    """A run with a test evaluation, and a search that was interrupted."""
    os.chdir(folder)
    words = "fit --config shallow.yaml --data.source digits --trainer.max_epochs 2"
    words += " --execution.threads 1"
    run_epoch, worker.SNAPSHOT_SECONDS = PopulationTraining.run_epoch, 0.0

    def interrupted(self: PopulationTraining) -> None:
        if self.epoch == 2:
            raise KeyboardInterrupt
        run_epoch(self)

    from mnist_lightning.search.command import read, run

    space = ["--space", "{lr: [0.1, 0.01], max_epochs: [1, 3], hidden_units: [8]}"]
    search, place = read(["--model", "ShallowNetwork", "--data.source", "digits", *space])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert command(words.split()) == 0
        assert command(["test", "--ckpt_path", "shallow"]) == 0
        PopulationTraining.run_epoch = interrupted  # type: ignore[method-assign]
        with contextlib.suppress(KeyboardInterrupt):
            run(search, **{**place, "workers": 0})
        PopulationTraining.run_epoch = run_epoch  # type: ignore[method-assign]
    return Path("lightning_logs/shallow/version_0"), Path("lightning_logs/search/search")


def _csv(file: Path) -> Any:
    with file.open(newline="") as text:
        return list(csv.reader(text))


def _journal(file: Path) -> Any:
    known = {study.study_name: study.user_attrs for study in _storage(file).get_all_studies()}
    if file.with_name("journal.damaged").exists():
        os.replace(file.with_name("journal.damaged"), file)
        raise ValueError(f"{file} is damaged")
    return known


def _storage(file: Path) -> Any:
    return open_storage(None, file.parent)


def kinds(run: Path, search: Path) -> dict[str, tuple[Path, Callable[[Path], Any], str]]:
    """By kind of file: one of them, how it is read, and what follows where damage is noticed."""
    trial = next((search / "trials").glob("*.json"))
    weights = search / "checkpoints" / f"{trial.stem}.ckpt"
    state = next((search / "state").glob("*.pt"))
    remedy = "restore it"
    definition = read_json(search / "search.json", remedy)
    del definition["provenance"]
    other = "the other checkpoint is named"
    again = "set aside, trained again, said"
    return {
        "`last.ckpt`": (run / "checkpoints/last.ckpt", checkpoints.read, other),
        "`best.ckpt`": (run / "checkpoints/best.ckpt", checkpoints.read, other),
        "`trials/<id>.json`": (trial, lambda f: Results(search).record(f.stem), again),
        "`checkpoints/<id>.ckpt`": (weights, read_torch, again),
        "`state/<unit>.pt`": (state, read_torch, "set aside, trained from the start, said"),
        "`curves.json.gz`": (
            search / "curves.json.gz",
            lambda f: _read_tables(f.parent),
            "refused; the search writes it again",
        ),
        "`journal.log`": (
            search / "journal.log",
            _journal,
            "set aside, made again from the trials",
        ),
        "`search.json`": (
            search / "search.json",
            lambda f: Results(search).open(definition) or read_json(f, remedy),
            "refused, as damaged or as of another search",
        ),
        "`test.json`": (run / "test.json", lambda f: evaluations.read(f.parent), "refused"),
        "`provenance.json`": (
            run / "provenance.json",
            lambda f: read_json(f, remedy, list),
            "refused",
        ),
        "`config.yaml`": (run / "config.yaml", read_config, "refused"),
        "`metrics.csv`": (run / "metrics.csv", _csv, "refused"),
    }


def flip(file: Path, read: Callable[[Path], Any], expected: Any) -> tuple[str, str]:
    """Flips one bit, reads, and restores the file.

    Returns:
        One of ``OUTCOMES``, and the error.
    """
    whole = file.read_bytes()
    damaged, bit = bytearray(whole), random.randrange(8 * len(whole))
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        file.write_bytes(damaged)
        return ("harmless" if torture.same(expected, read(file)) else "unnoticed"), ""
    except (ValueError, UnicodeDecodeError, csv.Error) as error:
        return "noticed", str(error)
    finally:
        file.write_bytes(whole)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flips", type=int, default=100, help="of each kind of file")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    parser.add_argument("--table", type=Path, default=RELIABILITY, help="the file to write to")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    table, faults = arguments.table.absolute(), 0
    commit = str(provenance().get("code", {}).get("commit", ""))[:7]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (file, read, then) in kinds(*make(Path(folder))).items():
            expected, counts = read(file), dict.fromkeys(OUTCOMES, 0)
            for _ in range(arguments.flips):
                outcome, error = flip(file, read, expected)
                counts[outcome] += 1
                if "ckpt" in name and "<" not in name and outcome == "noticed":
                    faults += "other checkpoint is intact" not in error
            cells = " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
            rows.append(f"| {name} | {arguments.flips} | {cells} | {then} |")
            print(rows[-1], flush=True)
            faults += counts["unnoticed"] * name.endswith(("ckpt`", "pt`", "<id>.json`"))
        os.chdir(table.parent)
    section = SECTION.format(
        flips=arguments.flips, seed=arguments.seed, commit=commit, rows="\n".join(rows)
    )
    write_section(TITLE, section, table)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
