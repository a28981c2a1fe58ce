"""The same folder of images in this project and in skorch, Keras, timm and fastai.

    python benchmarks/folders.py FOLDER --python skorch=PATH --python keras=PATH ...

FOLDER holds ``train/<class>/*.jpg`` and ``test/<class>/*.jpg``; a fifth of ``train`` becomes the
validation set. Each way trains the same small network, as its user would write it: ours by the
command ``fit``, the others by the scripts ``others/with_*.py``, each in its own environment, with
its own default of worker processes and threads. PATH is the Python of that environment.

- start: seconds from the start of a fresh process to the end of the first training step. Ours with
  an empty cache, and again with the cache that this has filled; the others keep nothing between
  starts. The files are in the operating system's memory for all.
- images a second: the training's mini-batches of 128, cropped and flipped, without a network. Of
  ours and of Keras also the second pass: Keras then reads what tf.data's cache has in memory.
- lines: of code that reads, splits, augments, trains an epoch and tests; without empty lines and
  the docstring, and without the network, which is counted apart.

The ways alternate. Writes results/folders.json, and the table into README.md.
"""

import argparse
import ast
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import alternate
from run import FOLDER, README, duration, markdown, ratio

from mnist_lightning.files import write_json, write_text
from mnist_lightning.provenance import provenance

OTHERS = FOLDER / "others"
RESULTS = FOLDER / "results" / "folders.json"
BEGIN, END = "<!-- folders -->\n", "<!-- folders end -->\n"
MARK = "MEASURED "
FIT = (
    "fit --model ConvNetwork --model.widths [16,32] --data.source folder --data.data_dir {folder}"
    " --data.batch_size 128 --data.augment.crop 4 --data.augment.flip true --trainer.max_epochs 1"
)
TEST = "test --ckpt_path ConvNetwork"
PACKAGES = {
    "skorch": ("skorch", "torch", "torchvision"),
    "keras": ("keras", "tensorflow-cpu"),
    "timm": ("timm", "torch", "torchvision"),
    "fastai": ("fastai", "torch", "torchvision"),
}


def probed(mode: str, name: str, python: str, images: str, cache: str) -> tuple[float, Any]:
    """Seconds until a fresh process has measured itself, and what it has measured."""
    words = FIT.format(folder=images).split() if name == "ours" else [images]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        process = subprocess.Popen(
            [python, str(OTHERS / "probe.py"), mode, name, *words],
            cwd=folder,
            env={**os.environ, "XDG_CACHE_HOME": cache},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            for line in process.stdout or ():
                if line.startswith(MARK):
                    return time.perf_counter() - began, json.loads(line.removeprefix(MARK))
            raise RuntimeError(f"{name} ended without a measurement")
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()


def start(name: str, python: str, images: str, cache: str) -> float:
    return probed("start", name, python, images, cache)[0]


def cold(images: str) -> float:
    with tempfile.TemporaryDirectory() as cache:
        return start("ours", sys.executable, images, cache)


def speeds(name: str, python: str, images: str, cache: str) -> list[float]:
    """Images a second of each pass."""
    _, found = probed("batches", name, python, images, cache)
    return [found["images"] / seconds for seconds in found["seconds"]]


def lines(file: Path) -> int:
    """Lines of code: neither empty, nor of the docstring."""
    text = file.read_text()
    docstring = ast.parse(text).body[0]
    assert docstring.end_lineno is not None
    return sum(bool(line.strip()) for line in text.splitlines()[docstring.end_lineno :])


def measure(images: str, pythons: dict[str, str], rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        start("ours", sys.executable, images, cache)  # fills the cache, and reads the files once
        pythons = {"ours": sys.executable, **pythons}
        ways: dict[str, Any] = {"start, ours, empty cache": lambda: cold(images)}
        for name, python in pythons.items():
            ways[f"start, {name}"] = partial(start, name, python, images, cache)
            ways[f"images, {name}"] = partial(speeds, name, python, images, cache)
        found = alternate(ways, rounds)
    rates = {}
    for name in pythons:
        for number, passed in enumerate(zip(*found[f"images, {name}"], strict=True)):
            rates[f"{name}, second pass" if number else name] = list(passed)
    networks = dict.fromkeys(PACKAGES, "small_cnn.py") | {"keras": "small_cnn_keras.py"}
    return {
        "images": sum(len(files) for _, _, files in os.walk(images)),
        "rounds": rounds,
        "seconds": {name: found[name] for name in found if name.startswith("start")},
        "images_per_second": rates,
        "lines": {name: lines(OTHERS / f"with_{name}.py") for name in PACKAGES},
        "lines_of_network": {name: lines(OTHERS / file) for name, file in networks.items()},
        "commands": [FIT.format(folder="FOLDER"), TEST],
    }


def versions(name: str, python: str) -> dict[str, str]:
    """What is installed in the environment of a library."""
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    run = subprocess.run([python, "-c", code, *PACKAGES[name]], check=True, stdout=-1, text=True)
    return dict(zip(PACKAGES[name], run.stdout.split(), strict=True))


def written(library: str, results: dict[str, Any]) -> str:
    """What a user writes."""
    if library == "ours":
        return f"{len(results['commands'])} commands"
    return f"{results['lines'][library]} + {results['lines_of_network'][library]}"


def table(results: dict[str, Any]) -> str:
    """What was measured, as markdown."""
    seconds = {name: statistics.median(runs) for name, runs in results["seconds"].items()}
    rates = {name: statistics.median(runs) for name, runs in results["images_per_second"].items()}
    header = ("", "to the first step", "ours, second start, is", "images/s", "ours is", "lines")
    empty = duration(seconds["start, ours, empty cache"])
    rows = [("ours, first start", empty, "", "", "", "")]
    for name, rate in rates.items():
        library, _, later = name.partition(", ")
        ours = rates[f"ours, {later}" if later else "ours"]
        took = seconds[f"start, {library}"]
        rows.append(
            (
                name,
                "" if later else duration(took),
                "" if later or library == "ours" else ratio(seconds["start, ours"], took),
                f"{rate:,.0f}",
                "" if library == "ours" else ratio(rate, ours),
                "" if later else written(library, results),
            )
        )
    facts = results["provenance"]
    installed = "; ".join(
        f"{name}: " + ", ".join(f"{package} {version}" for package, version in found.items())
        for name, found in results["others"].items()
    )
    load = f"load {facts['load_average'][0]:.1f} before, {results['load_after'][0]:.1f} after"
    machine = facts["machine"]
    ours = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    code = facts["code"].get("commit", "unknown")[:10]
    code += ", modified" if facts["code"].get("modified") else ""
    origin = (
        f"{results['images']:,} images, medians of {results['rounds']}. {machine['cpu']},"
        f" {machine['cores']} cores, {machine['system']}, {load}; ours: {ours}; {installed};"
        f" commit {code}; {facts['time'][:10]}"
    )
    return "\n".join([*markdown(header, rows), "", origin]) + "\n"


def into_readme(text: str, results: str) -> str:
    """The README with other results between its marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + results + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="without it, the table is written again")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    if flags.folder:
        pythons = dict(named.split("=", 1) for named in flags.python)
        facts = provenance(load_average=os.getloadavg())
        facts["command"] = "benchmarks/folders.py FOLDER --python NAME=PATH ..."  # no paths of ours
        others = {name: versions(name, python) for name, python in pythons.items()}
        results = measure(str(Path(flags.folder).absolute()), pythons, flags.rounds)
        load = os.getloadavg()
        write_json(RESULTS, {**results, "others": others, "load_after": load, "provenance": facts})
    text = table(json.loads(RESULTS.read_text()))
    write_text(README, into_readme(README.read_text(), text))
    print(text)


if __name__ == "__main__":
    main()
