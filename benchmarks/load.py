"""Load: do long trainings and searches, full folders and many trainings at once keep the pace?

    python benchmarks/load.py                 # twenty minutes; writes its section of reliability.md
    python benchmarks/load.py --only runs     # one part, with the results of the others kept

- epochs: `fit` of the shallow network on the digits, 1,000 epochs. Processor time of an epoch, with
  its validation, logs and checkpoints, and resident memory: the last tenth beside the first.
- grid: a search of 5,000 trials on the digits, one epoch each, in one process: networks that are
  trained together, a hundred at a time. Processor time of a trial: the last tenth beside the first.
- drawn: the same of trials that a sampler draws one by one: the last 250 beside the first 250.
  Those between are drawn, leased and written like these, but not trained: that would take long.
- runs: the whole command in a folder of 1,000 runs (copies of one) beside a folder of one run.
- together: eight `fit` started at once in one folder.

Processor time is that of all threads; unlike seconds, it hardly counts other programs.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from command import measured
from common import alternate, damaged, quietly, write_section
from lightning.pytorch import Callback

from mnist_lightning.files import write_json
from mnist_lightning.provenance import provenance
from mnist_lightning.runs.folder import newest_first
from mnist_lightning.search.command import run
from mnist_lightning.search.leases import Lease
from mnist_lightning.search.plan import Search
from mnist_lightning.search.results import Record, Results, new_record
from mnist_lightning.search.space import Trial
from mnist_lightning.search.worker import Worker

FIT = [
    *("-m", "mnist_lightning", "fit", "--config", "shallow.yaml", "--data.source", "digits"),
    *("--early_stopping.enabled", "no"),
]
RESULTS = Path(__file__).parent / "results" / "load.json"
TITLE = "## Load"
INTRODUCTION = """`python benchmarks/load.py`; how each row is measured is said there, and every
measurement is in [load.json](results/load.json). The machine was not idle: the rows compare
processor time, within one process or of commands that alternate. Trials that are drawn one by one
slow down. A profile shows Optuna's journal reading the names of all leases to find one, and `ask`
reading all earlier trials; leases that read no names took away a sixth of the growth, so the
rest is not fully explained."""


class Meter(Callback):
    """Writes down processor seconds and resident bytes whenever an epoch begins, and at the end."""

    def on_train_start(self, *_: Any) -> None:
        self._moments: list[tuple[float, int]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self._moments.append((time.process_time(), psutil.Process().memory_info().rss))

    def on_train_end(self, *_: Any) -> None:
        self.on_train_epoch_start()
        write_json(Path("meter.json"), self._moments)


def tenths(values: list[float]) -> dict[str, float]:
    """Medians of the first and of the last tenth."""
    count = len(values) // 10
    return {
        "first": statistics.median(values[:count]),
        "last": statistics.median(values[-count:]),
    }


def epochs(count: int = 1000, trainings: int = 3) -> dict[str, Any]:
    seconds, memory = [], []
    for _ in range(trainings):
        with quietly() as folder:
            meter = ["--trainer.max_epochs", str(count), "--trainer.callbacks+=load.Meter"]
            measured([*FIT, *meter], folder, 1)
            moments = json.loads(Path(folder, "meter.json").read_text())
        processor, resident = zip(*moments, strict=True)
        seconds.append(tenths([end - start for start, end in pairwise(processor)]))
        memory.append(tenths(list(resident[1:])))
    return {"count": count, "processor_seconds": seconds, "resident_bytes": memory}


def moments(search: Search, folder: Path) -> list[float]:
    """Processor seconds at which each trial of a search was written."""
    written = []
    add = Results.add

    def note(self: Results, record: Record) -> None:
        add(self, record)
        written.append(time.process_time())

    with (
        mock.patch.object(Results, "add", note),
        mock.patch.object(Results, "write_tensorboard"),  # once, after the last trial
    ):
        run(search, folder, workers=0)
    return written


TRIAL: dict[str, Any] = {
    "model": "ShallowNetwork",
    "fixed": {"max_epochs": 1, "batch_size": 64},
    "data": {"source": "digits"},
}


def grid(count: int = 5000) -> dict[str, Any]:
    rates = [round(0.01 * 1.2**i, 4) for i in range(10)]
    axes = {"lr": rates, "hidden_units": list(range(2, 12))}
    with quietly() as folder:
        search = Search("grid", space=axes, seeds=list(range(count // 100)), **TRIAL)
        written = moments(search, Path(folder))
    # means over a tenth: of networks trained together, the first to be written has all the training
    tenth = count // 10
    first, last = written[tenth] - written[0], written[-1] - written[-1 - tenth]
    return {"count": count, "processor_seconds": {"first": first / tenth, "last": last / tenth}}


def drawn(count: int = 5000, trained: int = 250) -> dict[str, Any]:
    axes = {"lr": {"low": 0.01, "high": 0.1}, "hidden_units": {"low": 2, "high": 11}}
    # a sampler that looks at no earlier trial: what it costs to look at all is Optuna's
    strategy = {"name": "optuna", "n": count, "sampler": "RandomSampler"}
    search = Search("drawn", space=axes, strategy=strategy, **TRIAL)
    train = Worker._train_alone
    curves = {"train_loss": [2.0], "val_loss": [2.0], "val_acc": [0.1]}

    def train_some(self: Worker, trial: Trial, id: str, lease: Lease, *prune: Any) -> Record:
        if trained <= trial.number < count - trained:
            record = new_record(trial, id, curves, 0.0)
            self._write(lease, record)
            return record
        return train(self, trial, id, lease, *prune)

    with quietly() as folder, mock.patch.object(Worker, "_train_alone", train_some):
        written = moments(search, Path(folder))
    seconds = [end - start for start, end in pairwise(written)]
    processor = {
        "first": statistics.median(seconds[: trained - 1]),
        "last": statistics.median(seconds[-(trained - 1) :]),
    }
    return {"count": count, "trained": 2 * trained, "processor_seconds": processor}


def runs(count: int = 1000, rounds: int = 3) -> dict[str, Any]:
    commands = {
        "fit": [*FIT, "--trainer.max_epochs", "1"],
        "test": ["-m", "mnist_lightning", "test", "--ckpt_path", "shallow"],
        "inspect": ["-m", "mnist_lightning", "inspect", "--config", "shallow.yaml"],
    }
    with quietly() as folder:
        few, many = Path(folder, "few"), Path(folder, "many")
        few.mkdir()
        measured(commands["fit"], str(few), 1)
        first = Path("lightning_logs", "shallow", "version_0")
        for number in range(count):  # each file is there once, under all of its names
            copy = (many / first).with_name(f"version_{number}")
            shutil.copytree(few / first, copy, copy_function=os.link)
        ways = {
            f"{command}, {place.name}": lambda words=words, place=place: measured(
                words, str(place), 1
            )
            for command, words in commands.items()
            for place in (few, many)
        }
        found = alternate(ways, rounds)
    wall = {way: [seconds for seconds, _ in taken] for way, taken in found.items()}
    processor = {way: [seconds for _, seconds in taken] for way, taken in found.items()}
    return {"count": count, "seconds": wall, "processor_seconds": processor}


def start(count: int, folder: Path) -> list[str]:
    """Starts so many trainings of one epoch at once in a folder.

    Returns:
        What was wrong with any of them, or with what they left.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, *FIT, "--trainer.max_epochs", "1"],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    errors = [process.communicate()[1] for process in processes]
    wrong = [
        f"exit code {process.returncode}: {error[-300:]}"
        for process, error in zip(processes, errors, strict=True)
        if process.returncode
    ]
    made = list(reversed(newest_first(folder / "lightning_logs" / "shallow")))
    if [one.name for one in made] != [f"version_{number}" for number in range(count)]:
        wrong.append(f"the runs are {[one.name for one in made]}")
    files = ("config.yaml", "metrics.csv", "provenance.json", "checkpoints/last.ckpt")
    wrong += [f"no {one / file}" for one in made for file in files if not (one / file).is_file()]
    return wrong + damaged(folder)


def together(count: int = 8) -> dict[str, Any]:
    with quietly() as folder:
        return {"count": count, "wrong": start(count, Path(folder))}


PARTS = {"epochs": epochs, "grid": grid, "drawn": drawn, "runs": runs, "together": together}


def share(tenths: dict[str, float]) -> float:
    return tenths["last"] / tenths["first"]


def within(ratio: float) -> str:
    """Whether the last tenth took 5 % more than the first at most."""
    return "yes" if ratio <= 1.05 else "**no**"


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """What was found, what was asked, and whether it is met."""
    table = []
    for key, what in (
        ("processor_seconds", "processor time of an epoch"),
        ("resident_bytes", "resident memory"),
    ):
        if part := results.get("epochs"):
            ratios = [share(training) for training in part[key]]
            middle = statistics.median(ratios)
            ends = f", {min(ratios):.3f} to {max(ratios):.3f}" if len(ratios) > 1 else ""
            spread = f"{middle:.3f} (n={len(ratios)}{ends})"
            name = f"{part['count']:,} epochs, {what}: last tenth / first tenth"
            table.append((name, spread, "1.05 at most", within(middle)))
    for name, how in (
        ("grid", "trained together, processor time of a trial: last tenth / first tenth"),
        (
            "drawn",
            "drawn one by one, processor time of a trial: last 250 / first 250 (those"
            " between not trained)",
        ),
    ):
        if part := results.get(name):
            name, ratio = f"{part['count']:,} trials {how}", share(part["processor_seconds"])
            table.append((name, f"{ratio:.3f} (n=1)", "1.05 at most", within(ratio)))
    if part := results.get("runs"):
        for command in ("fit", "test", "inspect"):
            taken = part["processor_seconds"]
            few, many = (taken[f"{command}, {place}"] for place in ("few", "many"))
            more = statistics.median(many) - statistics.median(few)
            name = (
                f"`{command}` beside {part['count']:,} runs: processor time, more than beside one"
            )
            figure = f"{more:+.2f} s of {statistics.median(few):.1f} s (n={len(few)})"
            table.append((name, figure, "1 s at most", "yes" if more <= 1 else "**no**"))
    if part := results.get("together"):
        name = f"{part['count']} `fit` at once: runs of their own, whole, exit code 0"
        met = "**no**" if part["wrong"] else "yes"
        table.append((name, "; ".join(part["wrong"]) or "all", "all", met))
    return table


def section(results: dict[str, Any]) -> str:
    lines = [TITLE, "", INTRODUCTION, "", "| what | found | asked | met |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(results)]
    lines.append("")
    for name in PARTS:
        if name in results:
            facts = results[name]["provenance"]
            machine, code = facts["machine"], facts["code"]
            modified = ", modified" * bool(code.get("modified"))
            lines.append(
                f"- `{name}`: {machine['cpu']}, {machine['cores']} cores, load"
                f" {facts['load_average']:.1f} before; torch {facts['versions']['torch']},"
                f" lightning {facts['versions']['lightning']}; commit"
                f" {code.get('commit', 'unknown')[:7]}{modified}; {facts['time'][:10]}"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", default=list(PARTS))
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    code = provenance()["code"]  # before results are written, which git would call a modification
    for part in arguments.only:
        load_average = os.getloadavg()[0]
        found = PARTS[part]()
        facts = {**provenance(load_average=load_average), "code": code}
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        results[part] = {**found, "provenance": facts}
        write_json(RESULTS, results)
        write_section(TITLE, section(results))
    print("\n".join(" | ".join(row) for row in rows(results)))


if __name__ == "__main__":
    main()
