"""Kills trainings at random moments and has them go on: do they end as if nothing had happened?

    python benchmarks/torture.py                # a few minutes; writes its table to reliability.md
    python benchmarks/torture.py --kills 30     # of each model

Each model trains once undisturbed. Then it is killed by SIGKILL, SIGTERM or SIGINT while it starts,
trains, writes a checkpoint or ends, and started again with ``--ckpt_path .../last``, until it has
been killed so many times and is through. After each kill the run's files must be whole and the exit
code right; at the end all tensors and figures must have the undisturbed training's bits.
"""

import argparse
import csv
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import damaged, write_section

from mnist_lightning import checkpoints
from mnist_lightning.provenance import provenance

MODELS = {
    "perceptron": ["--config", "perceptron.yaml"],
    "shallow, fused": ["--config", "shallow.yaml", "--data.steps_per_execution", "20"],
    "shallow, autograd": ["--config", "shallow.yaml", "--model.fused", "no"],
    "three layers, Adam": ["--config", "deep3.yaml", "--model.optimizer", "adam"],
}
COMMON = [
    *("--data.source", "digits", "--early_stopping.enabled", "no", "--trainer.max_epochs", "12"),
    *("--save_every_minutes", "0.002"),
]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOMENTS = ("start", "training", "checkpoint", "end")
# of the shell: a process that a signal ends has 128 and the signal's number, or says so itself
CODES = {number: {-number, 128 + number} for number in SIGNALS}
TITLE = "## Trainings that are killed"
SECTION = f"""{TITLE}

`python benchmarks/torture.py --kills {{arguments.kills}} --seed {{arguments.seed}}`, commit
{{commit}}. SIGKILL, SIGTERM or SIGINT at random moments, then `--ckpt_path .../last`; only kills
that came before the training's end are counted. The last column: whether all files were whole and
all exit codes right after each kill, and in the end the weights, the optimizer, the generators and
the figures of all epochs were the undisturbed training's, bit for bit.

| model | {" | ".join(f"killed: {moment}" for moment in MOMENTS)} | survived |
|---|{"--:|" * len(MOMENTS)}---|
{{rows}}
"""


def command(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "mnist_lightning", "fit", *words]


def run_folder(root: Path) -> Path | None:
    """The newest run that has a checkpoint to go on from."""
    runs = [
        run
        for folder in root.glob("lightning_logs/*")
        for run in checkpoints.newest_first(folder)
        if (run / "checkpoints/last.ckpt").is_file()
    ]
    return runs[0] if runs else None


def words_for(root: Path, model: Sequence[str]) -> list[str]:
    run = run_folder(root)
    if run is not None:
        return ["--ckpt_path", str(run / "last")]
    return [*model, *COMMON, "--trainer.default_root_dir", str(root)]


def contents(run: Path) -> dict[str, Any]:
    """What must not change: tensors of both checkpoints, and the figures of all epochs."""
    last, best = (checkpoints.read(run / f"checkpoints/{name}.ckpt") for name in ("last", "best"))
    with (run / "metrics.csv").open(newline="") as file:
        figures = list(csv.DictReader(file))
    names = ("epoch", "global_step", "state_dict", "optimizer_states", "generators")
    return {"figures": figures, "best": best["state_dict"], **{name: last[name] for name in names}}


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def strike(
    words: Sequence[str], root: Path, moment: str, number: int, times: tuple[float, float]
) -> tuple[bool, str | None]:
    """Starts a training and sends it a signal.

    Args:
        words: of ``fit``.
        root: the folder of its runs.
        moment: one of ``MOMENTS``.
        number: of the signal.
        times: seconds from the start to the first step and to the end, undisturbed.

    Returns:
        Whether it was still running by then; and what was wrong after it, if anything.
    """
    first, end = times
    span = {"start": (0, first), "training": (first, end), "end": (0.9 * end, 1.1 * end)}
    process = subprocess.Popen(
        command(words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    began = time.monotonic()
    delay = random.uniform(*span.get(moment, (0, end)))
    while process.poll() is None and time.monotonic() - began < delay:
        # a checkpoint's temporary file is there for a few milliseconds
        if moment == "checkpoint" and any(root.glob("lightning_logs/*/*/checkpoints/.*.ckpt.*")):
            break
        time.sleep(0.001 if moment == "checkpoint" else 0.01)
    ended = process.poll() is not None
    if not ended:
        process.send_signal(number)
    _, errors = process.communicate()
    if process.returncode not in ({0} if ended else {0, *CODES[signal.Signals(number)]}):
        return not ended, f"exit code {process.returncode}: {errors.strip()[-300:]}"
    return not ended, next(iter(damaged(root)), None)


def torture(model: Sequence[str], kills: int, folder: Path) -> tuple[dict[str, int], list[str]]:
    """Kills one model's training so many times.

    Returns:
        How often it was killed, by moment; and all that was wrong.
    """
    calm = folder / "calm"
    began = time.monotonic()
    process = subprocess.Popen(
        command(words_for(calm, model)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    first = None
    for line in process.stdout or ():
        if first is None and line.startswith(("steps per execution", "one step at a time")):
            first = time.monotonic() - began
    if process.wait() or first is None:
        raise RuntimeError(f"the undisturbed training failed: {command(words_for(calm, model))}")
    times = first, time.monotonic() - began
    struck, wrong, trainings = dict.fromkeys(MOMENTS, 0), [], 0
    while sum(struck.values()) < kills:
        trainings += 1
        hurt, hit = folder / f"hurt{trainings}", True
        while hit and sum(struck.values()) < kills:
            moment, number = MOMENTS[sum(struck.values()) % len(MOMENTS)], random.choice(SIGNALS)
            hit, fault = strike(words_for(hurt, model), hurt, moment, number, times)
            struck[moment] += hit
            if fault:
                wrong.append(f"{signal.Signals(number).name}, {moment}: {fault}")
        subprocess.run(command(words_for(hurt, model)), check=True, stdout=subprocess.DEVNULL)
        runs = run_folder(calm), run_folder(hurt)
        expected, got = (contents(run) for run in runs if run is not None)
        wrong += [f"other {name}" for name in expected if not same(expected[name], got[name])]
    return struck, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=12, help="of each model")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    rows, faults = [], []
    commit = str(provenance().get("code", {}).get("commit", ""))[:7]
    for name, model in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            struck, wrong = torture(model, arguments.kills, Path(folder))
        counts = " | ".join(str(struck[moment]) for moment in MOMENTS)
        rows.append(f"| {name} | {counts} | {'no' if wrong else 'yes'} |")
        print(rows[-1], *wrong, sep="\n  ", flush=True)
        faults += wrong
        # after each model: whoever cannot wait for all of them keeps what there is
        text = SECTION.format(arguments=arguments, commit=commit, rows="\n".join(rows))
        write_section(TITLE, text)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
