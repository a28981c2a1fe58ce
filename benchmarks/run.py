"""Runs the benchmarks, one part after the other, and writes one JSON and one table.

    python benchmarks/run.py [--quick] [--only PART ...] [--skip PART ...]

Needs the real MNIST (MNIST_DATA_DIR or data/) and the machine to itself. Writes results/bench.json,
a section for each part with where it comes from, and results/bench.md, the table, which also goes
into README.md. With --quick, fewer runs of smaller trainings, into bench-quick.json and
bench-quick.md. --only replaces the sections of these parts and keeps the others; without a name it
writes the table again, out of the JSON.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from os import getloadavg
from pathlib import Path
from typing import Any, NamedTuple

from mnist_lightning.files import write_json, write_text
from mnist_lightning.provenance import provenance

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
BEGIN, END = "<!-- results -->\n", "<!-- end -->\n"
PARTS = (
    *("fit", "batches", "resnet", "growth"),
    *("command", "augment", "small_cnn", "frozen", "grid"),
)
QUICK = PARTS[:4]  # the others take minutes with --quick too: --quick --only grid

Results = dict[str, dict[str, Any]]


class Comparison(NamedTuple):
    """A row of the table: two durations out of the results, and what is asked of them."""

    what: str
    ours: str
    against: str
    theirs: str
    asked: str = ""
    met: Callable[[float, float], bool] | None = None


def times(least: float) -> Callable[[float, float], bool]:
    """Whether ours is at least so many times as fast."""
    return lambda ours, theirs: theirs >= least * ours


SHALLOW = "shallow (100 units), batch 8"
LOOP, DOCUMENTED = "hand-written loop", "Lightning as documented"
COMPARISONS = [
    Comparison(
        f"{SHALLOW}: whole `fit`",
        "fit/seconds/ours",
        LOOP,
        "fit/seconds/loop",
        "1.5 x, aim 2.5 x",
        times(1.5),
    ),
    Comparison(
        f"{SHALLOW}: whole `fit`, per epoch",
        "fit/seconds_per_epoch/ours",
        f"{DOCUMENTED}, one epoch",
        "fit/seconds_per_epoch/documented",
        "15 x",
        times(15),
    ),
    Comparison(
        f"{SHALLOW}: one by one through autograd, per epoch",
        "fit/seconds_per_epoch/one by one",
        LOOP,
        "fit/seconds_per_epoch/loop",
    ),
    Comparison(
        "deep2 (2048-128), batch 32: `fit` of one epoch",
        "fit/seconds/deep, ours",
        LOOP,
        "fit/seconds/deep, loop",
        "1.0 x",
        times(1),
    ),
    *(
        Comparison(
            f"the command `fit`, {SHALLOW}: an epoch, {state} machine{unit}",
            f"command/{key}/{state}, ours",
            against,
            f"command/{key}/{state}, {theirs}",
        )
        for state in ("idle", "loaded")
        for key, unit in (("seconds", ""), ("processor_seconds", ", processor time"))
        for against, theirs in (("a thread for each core", "all cores"), (LOOP, "loop"))
    ),
    *(
        Comparison(
            f"ResNet-18, {pixels} pixels: a step of `fit`",
            f"resnet/seconds/{pixels}, ours",
            "bare model step",
            f"resnet/seconds/{pixels}, bare",
            "within 5 %",
            times(0.95),
        )
        for pixels in (28, 224)
    ),
    *(
        Comparison(
            f"ResNet-18, {pixels} pixels: {what}",
            f"resnet/seconds/{pixels}, {ours}",
            against,
            f"resnet/seconds/{pixels}, {theirs}",
            *asked,
        )
        for pixels, what, ours, against, theirs, *asked in (
            (28, "a step of `fit`", "ours", "naive step", "naive"),
            (28, "bare model step in bf16", "bare, bf16", "bare model step in fp32", "bare"),
            (224, "a step of `fit`", "ours", "naive step", "naive", "4 x", times(4)),
            (224, "a step of `fit`, all but layer4 frozen", "ours, frozen", "naive step", "naive"),
        )
    ),
    *(
        Comparison(
            "batches of 128 out of the DataModule, an epoch",
            "batches/seconds/ours",
            f"torchvision's MNIST, ToTensor, DataLoader{workers}",
            f"batches/seconds/torchvision{workers}",
            "50 x",
            times(50),
        )
        for workers in ("", ", 2 workers")
    ),
    *(
        Comparison(
            f"{net}: a step with {augment}, processor time",
            f"augment/processor_seconds/{net}, {augment}",
            "no augmentation",
            f"augment/processor_seconds/{net}, no augmentation",
            f"at most {percent} % longer",
            times(1 / (1 + percent / 100)),
        )
        for net, percent in (("ResNet-18", 10), ("small CNN", 15))
        for augment in ("shift 2, rotate 10", "crop 4, flip")
    ),
    *(
        Comparison(
            f"the network of `{net}`, {precision}: a step of `fit`",
            f"small_cnn/seconds/{net}, {precision}, ours",
            "its convolutions and linear layers alone",
            f"small_cnn/seconds/{net}, {precision}, floor",
            "1.3 times that",
            times(1 / 1.3),
        )
        for net in ("conv", "cnn_15s")
        for precision in ("fp32", "bf16")
    ),
    *(
        Comparison(
            f"the network of `cnn_15s`, {precision}: {what}",
            f"small_cnn/seconds/cnn_15s, {precision}, {ours}",
            against,
            f"small_cnn/seconds/cnn_15s, {precision}, {theirs}",
        )
        for precision in ("fp32", "bf16")
        for what, ours, against, theirs in (
            ("bare step, channels_last", "bare", "contiguous", "contiguous"),
            ("bare step", "bare", "compiled", "compiled"),
            *(
                (f"an image in batches of {size}", f"batch {size}", "of 128", "batch 128")
                for size in (32, 64, 256, 512)
            ),
            ("four networks, grouped", "four, grouped", "one by one", "four, one by one"),
            *(
                [("four networks, vmap", "four, vmap", "one by one", "four, one by one")]
                if precision == "fp32"  # its BatchNorm takes no bf16
                else []
            ),
            ("a step, two processes with a thread each", "pair", "one with two", "bare"),
        )
    ),
    *(
        Comparison(
            f"ResNet-18, 224 pixels, {trained}: an epoch, frozen layers computed once",
            f"frozen/seconds/{name}, once",
            "computed in each epoch",
            f"frozen/seconds/{name}, each epoch",
            f"{least} x",
            times(least),
        )
        for trained, name, least in (
            ("layer4 and fc train", "freeze", 1.8),
            ("fc trains", "probe", 20),
        )
    ),
    Comparison(
        "`fit` to its first step",
        "fit/seconds/start, fit",
        "`import lightning.pytorch.cli`",
        "fit/seconds/start, import",
        "its 1.1 x plus 0.5 s",
        lambda ours, theirs: ours <= 1.1 * theirs + 0.5,
    ),
    Comparison(
        "`fit` to its first step, without TensorBoard",
        "fit/seconds/start, fit without TensorBoard",
        "`import lightning.pytorch.cli`",
        "fit/seconds/start, import",
    ),
    *(
        Comparison(
            "the grid of 384 networks, processor time",
            "grid/search/processor_seconds",
            f"{against}, sampled",
            f"grid/{key}/processor_seconds",
        )
        for against, key in ((LOOP, "loop"), (DOCUMENTED, "lightning"))
    ),
]


def look_up(results: Results, path: str) -> float | None:
    """The median of what lies at ``part/key/name``, or nothing where that was not measured."""
    found: Any = results
    for key in path.split("/"):
        found = found.get(key) if isinstance(found, dict) else None
    return statistics.median(found) if isinstance(found, list) else found


def row(comparison: Comparison, results: Results) -> tuple[str, ...]:
    ours, theirs = (look_up(results, path) for path in (comparison.ours, comparison.theirs))
    what, against, asked = comparison.what, comparison.against, comparison.asked
    if ours is None or theirs is None:
        return what, "", against, "", asked, "not measured"
    met = "" if comparison.met is None else "yes" if comparison.met(ours, theirs) else "**no**"
    return what, duration(ours), f"{against}: {duration(theirs)}", ratio(ours, theirs), asked, met


def ratio(ours: float, theirs: float) -> str:
    """How many times as fast ours is."""
    value = theirs / ours
    return f"{value:.0f} x" if value >= 20 else f"{value:.3g} x"


def duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [header, tuple("---" for _ in header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def table(results: Results) -> str:
    """All that was measured, as markdown."""
    lines = []
    if any(section["quick"] for section in results.values()):
        lines += ["A rough look (`--quick`): few runs of small trainings. Not to be quoted.", ""]
    header = ("what", "ours", "against", "ours is … as fast", "asked", "met")
    lines += markdown(header, [row(comparison, results) for comparison in COMPARISONS])
    for name, points in results.get("growth", {}).get("curves", {}).items():
        cells = []
        for point in points:
            seconds, floor = statistics.median(point["seconds"]), point["floor_seconds"]
            cells.append(
                (f"{point['x']:,}", duration(seconds), duration(floor), f"{seconds / floor:.1f} x")
            )
        lines += ["", *markdown((name, "ours", "floor", "ours is … the floor"), cells)]
    lines.append("")
    lines += [origin(name, results[name]) for name in PARTS if name in results]
    return "\n".join(lines) + "\n"


def origin(name: str, section: dict[str, Any]) -> str:
    """One line: how large, where and when a part was measured."""
    facts, sizes = section["provenance"], []
    for key in ("train_images", "images", "threads", "processes", "device"):
        if key in section:
            value = section[key]
            sizes.append(f"{key.replace('_', ' ')} {value:,}" if isinstance(value, int) else value)
    for way, epochs in section.get("epochs", {}).items():
        sizes.append(f"{way}: {epochs} epoch{'s' if epochs > 1 else ''}")
    runs = [len(values) for values in section.get("seconds", {}).values()]
    if runs:
        sizes.append(f"medians of {min(runs)}" + (f" to {max(runs)}" * (max(runs) > min(runs))))
    machine, code = facts["machine"], facts["code"]
    versions = ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
    commit = code.get("commit", "unknown")[:10] + (", modified" if code.get("modified") else "")
    return (
        f"- `{name}`: {'; '.join(sizes)}. {machine['cpu']}, {machine['cores']} cores,"
        f" {machine['system']}, load {facts['load_average'][0]:.1f} before; {versions};"
        f" commit {commit}; {facts['time'][:10]}"
    )


def into_readme(text: str, results: str) -> str:
    """The README with other results between its marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + results + END + rest.split(END)[1]


def measure(part: str, quick: bool) -> dict[str, Any]:
    return import_module(part).measure(quick)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a rough look in under five minutes")
    parser.add_argument("--only", nargs="*", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--skip", nargs="*", choices=PARTS, metavar="PART", default=())
    flags = parser.parse_args()
    parts = (QUICK if flags.quick else PARTS) if flags.only is None else flags.only
    file = FOLDER / "results" / ("bench-quick.json" if flags.quick else "bench.json")
    file.parent.mkdir(exist_ok=True)
    results: Results = json.loads(file.read_text()) if file.is_file() else {}
    # once, before results are written, which git would call a modification
    facts = provenance(load_average=getloadavg())
    failed = []
    for part in (part for part in parts if part not in flags.skip):
        print(f"{part} ...", flush=True)
        began = time.perf_counter()
        try:  # each part in a process of its own: threads and caches are nobody else's
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                measured = pool.submit(measure, part, flags.quick).result()
        except Exception:  # the others are worth measuring all the same
            traceback.print_exc()
            failed.append(part)
            continue
        took = round(time.perf_counter() - began)
        section = {"quick": flags.quick, **measured, "took_seconds": took, "provenance": facts}
        results[part] = section
        print(f"{part}: {took} s", flush=True)
        write_json(file, results)
    if results:
        text = table(results)
        write_text(file.with_suffix(".md"), text)
        if not flags.quick:
            write_text(README, into_readme(README.read_text(), text))
        print(f"\n{text}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
