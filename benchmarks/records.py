"""Trains and tests the records, what each ingredient adds, and accuracy against training seconds.

    python benchmarks/records.py records [--only NAME ...]   # trains each seed, tests it once
    python benchmarks/records.py adds [--only NAME ...]      # on validation, without an ingredient
    python benchmarks/records.py curve [--only NAME ...]     # on validation, with other projects
    python benchmarks/records.py longer [--only NAME ...]    # as records, more epochs and seeds
    python benchmarks/records.py table                       # writes the tables again

Needs the real MNIST (MNIST_DATA_DIR or data/). Writes results/records.json after each training,
goes on where it was interrupted, and writes records.md and records.png. Seconds are right only if
the machine has nothing else to do; where they do not matter (adds, longer), --at_once trains
several.

- records: the commands ``fit`` and ``test``, as users run them, with the seeds 0, 1, 2, ... The
  ensembles are those of all seeds of a configuration.
- longer: likewise, two configurations with more epochs and ten seeds; meant for a GPU.
- adds: the configuration with a fifth of its training images for validation, as it is and with one
  thing changed. The test images are not looked at.
- curve: likewise, and two other projects' examples on the same images.

Training seconds go from the first step of each epoch to its last: images are in memory by then, and
validation, checkpoints and start-up are not counted. Start-up is given beside it: from the start of
the process to the first step.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib
import torch
from matplotlib.figure import Figure
from run import FOLDER, duration, markdown

from mnist_lightning.catalog import shipped_configs
from mnist_lightning.configs import read_config
from mnist_lightning.files import write_json, write_text
from mnist_lightning.provenance import provenance
from mnist_lightning.runs import evaluations

RESULTS = FOLDER / "results" / "records.json"
README = FOLDER.parent / "README.md"
PAGE, PICTURE = FOLDER / "records.md", FOLDER / "records.png"
MARK = "MEASURED "
SEEDS = {"cnn_15s": 10, "cnn_minute": 10, "cnn_best": 3}
USUAL_SEEDS = 5
LONGER = {"mlp_best": "--trainer.max_epochs 300", "cnn_best": "--trainer.max_epochs 60"}
LONGER_SEEDS = 10
# what each ingredient adds: with all the usual seeds where a training takes less than a minute
QUICK = ("cnn_15s", "cnn_minute")
# what must be reached, and the aim: mean test accuracies
ASKED = {
    "shallow_best": (0.985, 0.988),
    "mlp_best": (0.992, 0.995),
    "cnn_15s": (0.990, 0.992),
    "cnn_minute": (0.994, 0.995),
    "cnn_best": (0.9965, 0.9975),
    "cnn_tiny": (0.993, 0.9945),
}
# without an ingredient: the flags that take it away
WITHOUT = {
    "shift and rotation": "--data.augment.shift 0 --data.augment.rotate 0",
    "bending (elastic)": "--data.augment.elastic 0",
    "other sizes (scale)": "--data.augment.scale 0",
    "label smoothing": "--model.label_smoothing 0",
    "one_cycle (a constant rate)": "--model.schedule constant",
    "weight decay": "--model.weight_decay 0",
    "test-time shifts": "--model.tta 0",
    "bf16": "--trainer.precision 32-true",
}
# with an ingredient that no record has
WITH = {
    "averaged weights (EMA, decay 0.98)": (
        "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging"
        " --trainer.callbacks.decay 0.98"
    ),
}
IN_CURVE = ("perceptron", "shallow", "deep2", "deep3", "conv")
OTHERS = {
    "mnist_pytorch": "pytorch/examples",
    "mnist_template": "lightning-hydra-template",
}
VALIDATION = "--data.split canonical --data.val_fraction 0.2 --early_stopping.enabled no"


class Clock(pl.Callback):
    """Writes the training seconds and the validation accuracy after each epoch to CLOCK_FILE."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.seconds, self.first_step, self.began = 0.0, 0.0, 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.first_step = self.first_step or time.time()
        self.began = time.perf_counter()

    def _stop(self) -> None:
        if self.began:
            self.seconds, self.began = self.seconds + time.perf_counter() - self.began, 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()
        accuracy = trainer.callback_metrics.get("val/acc")
        epoch = {"seconds": self.seconds, "accuracy": None if accuracy is None else float(accuracy)}
        self.epochs.append(epoch)
        parameters = sum(parameter.numel() for parameter in pl_module.parameters())
        facts = {"first_step": self.first_step, "epochs": self.epochs, "parameters": parameters}
        Path(os.environ["CLOCK_FILE"]).write_text(json.dumps(facts))


def run(folder: str, *words: str) -> str:
    """The output of a process of this Python that works in a folder."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    environment["MNIST_DATA_DIR"] = str(Path(os.environ.get("MNIST_DATA_DIR", "data")).absolute())
    environment["CLOCK_FILE"] = str(Path(folder) / "clock.json")
    paths = [FOLDER, FOLDER / "others", FOLDER.parent]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def fit(folder: str, name: str, seed: int, flags: str = "") -> dict[str, Any]:
    """Trains a configuration in a folder; what the clock has measured."""
    began = time.time()
    words = f"-m mnist_lightning fit --config {name}.yaml --seed_everything {seed} {flags}"
    clock = "--trainer.callbacks+=records.Clock"
    run(folder, *words.split(), clock)
    facts = json.loads((Path(folder) / "clock.json").read_text())
    return {
        "seed": seed,
        "start": facts["first_step"] - began,
        "seconds": facts["epochs"][-1]["seconds"],
        "epochs": facts["epochs"],
        "parameters": facts["parameters"],
    }


def tested(folder: str, *runs: Path) -> float:
    """The test accuracy of a run's last checkpoint, or of the ensemble of several."""
    last = [str(path / "checkpoints" / "last.ckpt") for path in runs]
    trust = ["--trust"] if len(runs) > 1 else []
    run(folder, *"-m mnist_lightning test --ckpt_path".split(), *last, *trust)
    logs = Path(folder) / "lightning_logs"
    where = runs[0] if len(runs) == 1 else next((logs / "ensemble").glob("version_*"))
    (evaluation,) = evaluations.read(where)
    return float(evaluation["test/acc"])


def records(name: str, results: dict[str, Any], at_once: int, part: str = "records") -> None:
    """Each seed of a record, and the ensemble of all, whose runs are kept until then."""
    longer = part == "longer"
    seeds = LONGER_SEEDS if longer else SEEDS.get(name, USUAL_SEEDS)
    rows = results.setdefault(part, {}).setdefault(name, {"seeds": []})
    folder = Path(tempfile.gettempdir()) / part / name

    def one(seed: int) -> dict[str, Any]:
        root = folder / str(seed)
        shutil.rmtree(root, ignore_errors=True)  # of an interrupted training
        root.mkdir(parents=True)
        found = fit(str(root), name, seed, LONGER[name] if longer else "")
        found["test"] = tested(str(root), root / "lightning_logs" / name / "version_0")
        return found | {"epochs": len(found["epochs"])}

    missing = range(len(rows["seeds"]), seeds)
    with ThreadPoolExecutor(at_once) as pool:
        for found in pool.map(one, missing):
            rows["seeds"].append(found)
            rows.pop("ensemble", None)  # of fewer seeds
            save(results, part, name)
    runs = sorted(folder.glob(f"*/lightning_logs/{name}/version_0"))
    if "ensemble" not in rows and len(runs) == len(rows["seeds"]):
        shutil.rmtree(folder / "lightning_logs", ignore_errors=True)  # an ensemble of fewer seeds
        rows["ensemble"] = tested(str(folder), *runs)
        save(results, part, name)


def adds(name: str, results: dict[str, Any], at_once: int) -> None:
    """A record on validation: as it is, without each ingredient that it has, and with others."""
    rows = results.setdefault("adds", {}).setdefault(name, {})
    settings = json.dumps(read_config(config(name)))
    epochs = read_config(config(name))["trainer"]["max_epochs"]
    at_the_end = f"{VALIDATION} --trainer.check_val_every_n_epoch {epochs}"
    ways = {"as it is": ""} | {
        what: flags
        for what, flags in WITHOUT.items()
        if f'"{flags.split()[0].rpartition(".")[2]}"' in settings
    }
    ways |= WITH
    missing = [
        (what, seed)
        for what in ways
        for seed in range(len(rows.get(what, [])), USUAL_SEEDS if name in QUICK else 3)
    ]

    def one(what: str, seed: int) -> tuple[str, dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            measured = fit(folder, name, seed, f"{at_the_end} {ways[what]}")
        return what, {"seed": seed, "val": measured["epochs"][-1]["accuracy"]}

    with ThreadPoolExecutor(at_once) as pool:
        for what, found in pool.map(one, *zip(*missing, strict=True)) if missing else ():
            rows.setdefault(what, []).append(found)
            save(results, "adds", name)


def curve(name: str, results: dict[str, Any]) -> None:
    """Accuracy against seconds, after each epoch, of one seed."""
    rows = results.setdefault("curve", {})
    if name in rows:
        return
    with tempfile.TemporaryDirectory() as folder:
        if name in OTHERS:
            lines = run(folder, str(FOLDER / "others" / f"{name}.py")).splitlines()
            epochs = [json.loads(line[len(MARK) :]) for line in lines if line.startswith(MARK)]
        else:
            epochs = fit(folder, name, 0, VALIDATION)["epochs"]
    rows[name] = epochs
    save(results, "curve", name)


def config(name: str) -> Path:
    """The file of a shipped configuration."""
    return next(file for file in shipped_configs() if file.stem == name)


@cache
def started() -> dict[str, Any]:
    """Where the results come from; called before any is written, which git calls a modification."""
    return provenance(threads=torch.get_num_threads())


def save(results: dict[str, Any], part: str, name: str) -> None:
    """Writes all results, with where those of this part and name come from."""
    where = started() | {"load": os.getloadavg()[0]}
    results.setdefault("provenance", {})[f"{part}/{name}"] = where
    write_json(RESULTS, results)


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation} (n={len(values)})"


def summary(results: dict[str, Any]) -> list[str]:
    """The table of the project's README."""
    rows = []
    for name, found in results["records"].items():
        what = config(name).read_text().splitlines()[1].removeprefix("# ").partition(":")[0]
        seeds = found["seeds"]
        seconds = statistics.mean(row["seconds"] for row in seeds)
        test = spread([row["test"] for row in seeds])
        rows.append((f"`{name}`", what, f"{seeds[0]['parameters']:,}", duration(seconds), test))
    rows.sort(key=lambda row: row[-1])
    return markdown(("config", "what", "parameters", "training, two cores", "test accuracy"), rows)


def each_longer(results: dict[str, Any]) -> list[str]:
    rows = []
    for name, found in results.get("longer", {}).items():
        for seeds in (results["records"][name]["seeds"], found["seeds"]):
            test = spread([row["test"] for row in seeds])
            rows.append((f"`{name}`", str(seeds[0]["epochs"]), test))
    return [*markdown(("config", "epochs", "test accuracy"), rows), "", *origins(results, "longer")]


def each_record(results: dict[str, Any]) -> list[str]:
    rows = []
    for name, (must, aim) in ASKED.items():
        if name not in results["records"]:
            rows.append((f"`{name}`", *[""] * 5, "not measured", str(must), str(aim)))
            continue
        seeds = results["records"][name]["seeds"]
        test = [row["test"] for row in seeds]
        seconds, start = (
            statistics.mean(row[key] for row in seeds) for key in ("seconds", "start")
        )
        met = ("yes" if statistics.mean(test) >= least else "**no**" for least in (must, aim))
        facts = f"{seeds[0]['parameters']:,}", str(seeds[0]["epochs"])
        longest = max(row["seconds"] for row in seeds)
        goals = (f"{goal}: {mark}" for goal, mark in zip((must, aim), met, strict=True))
        times = map(duration, (seconds, longest, start))
        rows.append((f"`{name}`", *facts, *times, spread(test), *goals))
    header = ("config", "parameters", "epochs", "training", "longest", "start-up", "test accuracy")
    return [*markdown((*header, "must", "aim"), rows), "", *origins(results, "records")]


def origins(results: dict[str, Any], part: str) -> list[str]:
    """A line for each name: where and when it was measured, and how busy the machine was."""
    lines = []
    for name in results.get(part, {}):
        facts = results["provenance"][f"{part}/{name}"]
        code, machine, versions = facts["code"], facts["machine"], facts["versions"]
        commit = code.get("commit", "unknown")[:10] + ", modified" * code.get("modified", False)
        if "gpu" in machine:
            where = machine["gpu"]
        else:
            load = f"load {facts['load']:.1f} at the end"
            where = f"{machine['cpu']}, {machine['cores']} cores, {load}"
        lines.append(
            f"- `{name}`: {where}; torch {versions['torch']}, lightning {versions['lightning']};"
            f" commit {commit}; {facts['time'][:10]}"
        )
    return lines


def ensembles(results: dict[str, Any]) -> list[str]:
    rows = []
    for name, found in results["records"].items():
        if "ensemble" in found:
            test = [row["test"] for row in found["seeds"]]
            figures = statistics.mean(test), max(test), found["ensemble"]
            rows.append((f"the {len(test)} seeds of `{name}`", *(f"{x:.4f}" for x in figures)))
    return markdown(("ensemble of", "its members' mean", "its best member", "ensemble"), rows)


def each_ingredient(results: dict[str, Any]) -> list[str]:
    rows = []
    for name, ways in results.get("adds", {}).items():
        values = {what: [row["val"] for row in found] for what, found in ways.items()}
        usual = statistics.mean(values["as it is"])
        rows.append((f"`{name}`", "as it is", spread(values.pop("as it is")), ""))
        for what, found in values.items():
            change = f"{statistics.mean(found) - usual:+.4f}"
            word = "with" if what in WITH else "without"
            rows.append((f"`{name}`", f"{word} {what}", spread(found), change))
    header = ("config", "changed", "validation accuracy", "difference")
    return [*markdown(header, rows), "", *origins(results, "adds")]


def each_curve(results: dict[str, Any]) -> list[str]:
    curves = {name: epochs[-1] for name, epochs in results.get("curve", {}).items()}
    rows = [
        (OTHERS.get(name, f"`{name}`"), duration(last["seconds"]), f"{last['accuracy']:.4f}")
        for name, last in sorted(curves.items(), key=lambda item: item[1]["seconds"])
    ]
    header = ("training", "seconds", "validation accuracy after the last epoch")
    return [*markdown(header, rows), "", *origins(results, "curve")]


def picture(curves: dict[str, Any]) -> Figure:
    """Validation error against training seconds, both on logarithmic scales.

    The records have colors; the other configurations are gray, and other projects dotted.
    """
    matplotlib.use("Agg")
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    colors = dict(zip(ASKED, matplotlib.colormaps["Dark2"].colors, strict=False))
    ends = {
        name: (math.log10(epochs[-1]["seconds"]), math.log10(1 - epochs[-1]["accuracy"]))
        for name, epochs in curves.items()
    }
    for name, epochs in curves.items():
        seconds = [epoch["seconds"] for epoch in epochs]
        errors = [100 * (1 - epoch["accuracy"]) for epoch in epochs]
        other = name in OTHERS
        color = colors.get(name, "black" if other else "gray")
        axes.plot(seconds, errors, ":" if other else "-", linewidth=1, alpha=0.5, color=color)
        axes.plot(seconds[-1], errors[-1], "o", color=color)
        # not over another name
        x, y = ends[name]
        apart = [(x2 - x, y2 - y) for key, (x2, y2) in ends.items() if key != name]
        left = any(0 < dx < 0.5 and abs(dy) < 0.05 for dx, dy in apart)
        below = any(-0.1 < dx < 0 and 0 < dy < 0.1 for dx, dy in apart)
        axes.annotate(
            OTHERS.get(name, name),
            (seconds[-1], errors[-1]),
            xytext=(-5 if left else 5, -10 if below else 3),
            textcoords="offset points",
            horizontalalignment="right" if left else "left",
            color=color,
            fontsize=8,
        )
    axes.set(xscale="log", yscale="log", xlabel="training seconds, two cores")
    axes.set_ylabel("validation error in %")
    axes.set_xlim(right=3 * max(epochs[-1]["seconds"] for epochs in curves.values()))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.25, which="both")
    return figure


def into(text: str, mark: str, table: list[str]) -> str:
    """The text with another table between its marks."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- {mark} end -->\n"
    before, _, rest = text.partition(begin)
    lines = "".join(f"{line}\n" for line in table)
    return f"{before}{begin}{lines}{end}{rest.partition(end)[2]}"


def written(results: dict[str, Any]) -> dict[Path, str]:
    """The files that contain results, with these."""
    text = PAGE.read_text()
    for table in (each_record, ensembles, each_longer, each_ingredient, each_curve):
        text = into(text, table.__name__, table(results))
    return {PAGE: text, README: into(README.read_text(), "records", summary(results))}


def write(results: dict[str, Any]) -> None:
    for file, text in written(results).items():
        write_text(file, text)
    if results.get("curve"):
        picture(results["curve"]).savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="The records; see the docstring.")
    parser.add_argument("part", choices=("records", "longer", "adds", "curve", "table"))
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--at_once", type=int, default=1, metavar="N", help="trainings at a time")
    given = parser.parse_args()
    started()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    shipped = [file.stem for file in shipped_configs()]
    names = [name for name in ASKED if name in shipped]
    if given.part == "curve":
        names = [*OTHERS, *IN_CURVE, *names]
    if given.part == "longer":
        names = list(LONGER)
    parts: dict[str, Callable[[str, dict[str, Any]], None]] = {
        "records": partial(records, at_once=given.at_once),
        "longer": partial(records, at_once=given.at_once, part="longer"),
        "adds": partial(adds, at_once=given.at_once),
        "curve": curve,
    }
    for name in given.only or names:
        if given.part in parts:
            parts[given.part](name, results)
            print(f"{given.part} {name}", flush=True)
    write(results)


if __name__ == "__main__":
    main()
