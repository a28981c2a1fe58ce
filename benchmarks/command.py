"""The command `fit --config shallow.yaml` as users run it, on an idle and on a loaded machine.

Fresh processes, no variable that sets threads, everything on that the configuration turns on; on a
loaded machine another program keeps one core busy. An epoch is what a training of several epochs
takes longer than one of a single epoch, divided by the difference: start-up is not counted,
validation, logging and checkpoints are. Processor time is that of all threads.

- ours: the command, which chooses its threads;
- all cores: the same with `OMP_NUM_THREADS` at the number of cores, PyTorch's own default;
- loop: the hand-written loop of `fit.py`, with PyTorch's default threads.

`python benchmarks/command.py` prints the figures of whatever code is on `PYTHONPATH`.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import alternate

EPOCHS = 2
LOOP = """
import lightning.pytorch as pl
from common import mnist
from fit import SHALLOW, loop
pl.seed_everything(0, verbose=False)
loop(mnist(), SHALLOW(), 8, {epochs})
"""


def measured(code: list[str], folder: str, threads: int | None) -> tuple[float, float]:
    """Wall and processor seconds of a fresh process."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    environment["MNIST_DATA_DIR"] = str(Path(os.environ.get("MNIST_DATA_DIR", "data")).absolute())
    here = str(Path(__file__).parent)
    environment["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, *code],
        check=True,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def epoch(way: str) -> tuple[float, float]:
    """Wall and processor seconds of an epoch."""
    threads = os.cpu_count() if way == "all cores" else None
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        for epochs in (1, 1 + EPOCHS):
            fit = f"-m mnist_lightning fit --config shallow.yaml --trainer.max_epochs {epochs}"
            code = ["-c", LOOP.format(epochs=epochs)] if way == "loop" else fit.split()
            taken.append(measured(code, folder, threads))
    (one, one_processor), (all, all_processor) = taken
    return (all - one) / EPOCHS, (all_processor - one_processor) / EPOCHS


@contextlib.contextmanager
def load(busy: bool) -> Iterator[None]:
    """Another program that keeps one core busy."""
    if not busy:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            yield
        finally:
            other.kill()


def measure(quick: bool) -> dict[str, Any]:
    results: dict[str, Any] = {"epochs": {"each way": EPOCHS}, "seconds": {}}
    results["processor_seconds"] = {}
    for state in ("idle", "loaded"):
        with load(state == "loaded"):
            ways = {way: lambda way=way: epoch(way) for way in ("ours", "all cores", "loop")}
            for way, runs in alternate(ways, 1).items():
                name = f"{state}, {way}"
                results["seconds"][name] = [wall for wall, _ in runs]
                results["processor_seconds"][name] = [processor for _, processor in runs]
    return results


if __name__ == "__main__":
    print(json.dumps(measure("--quick" in sys.argv), indent=2))
