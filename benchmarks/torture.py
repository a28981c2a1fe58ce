"""Kills trainings at random moments and resumes them: do they end as if nothing had happened?

    python benchmarks/torture.py                # half an hour; writes its table to reliability.md
    python benchmarks/torture.py --kills 6      # of each model: some minutes
    python benchmarks/torture.py --only perceptron

Each model trains once without a kill. Then the same training is killed again and again by SIGKILL,
SIGTERM or SIGINT: while it starts, trains, validates, writes a checkpoint or ends. After each kill
it is resumed with ``--ckpt_path .../last``. After each kill the run's files must be whole and the
exit code right. At the end all tensors and metrics must be bit-equal to those of the training that
was never killed.
"""

import argparse
import csv
import os
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
from common import RELIABILITY, damaged, write_section
from torch import Tensor, nn

from mnist_lightning import Classifier
from mnist_lightning.provenance import provenance
from mnist_lightning.runs import checkpoints
from mnist_lightning.runs.folder import newest_first

MODELS = {
    "perceptron": ["--config", "perceptron.yaml"],
    "shallow, fused": ["--config", "shallow.yaml", "--execution.steps", "20"],
    "shallow, autograd": ["--config", "shallow.yaml", "--execution.fused", "no"],
    "three layers, Adam": ["--config", "deep3.yaml", "--model.optimizer", "adam"],
    "shallow, EMA of the weights": [
        *("--config", "shallow.yaml"),
        *("--trainer.callbacks", "lightning.pytorch.callbacks.EMAWeightAveraging"),
    ],
    "convolutions, dropout, random shifts": ["--model", "torture.ShiftedConvolutions"],
    "ResNet-18, frozen layers, one cycle": [
        *("--config", "resnet18_small.yaml", "--data.batch_size", "32"),
        *("--freezing.freeze", "['net.conv1.*', 'net.bn1.*', 'net.layer1.*']"),
        *("--trainer.limit_train_batches", "10", "--trainer.limit_val_batches", "1"),
    ],
    "ResNet-18, frozen layers computed once": [
        *("--config", "resnet18_small.yaml", "--data.batch_size", "32"),
        *("--freezing.train", "['net.layer4.*', 'net.fc.*']", "--freezing.batch_norm", "frozen"),
        *("--freezing.cache", "true"),
    ],
}
EPOCHS = {
    "convolutions, dropout, random shifts": 12,
    "ResNet-18, frozen layers, one cycle": 6,
    "ResNet-18, frozen layers computed once": 6,
}
COMMON = [
    *("--data.source", "digits", "--early_stopping.enabled", "no", "--execution.threads", "1"),
    *("--save_every_minutes", "0.002"),
]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOMENTS = ("start", "training", "validation", "checkpoint", "end")
# of the shell: a process that a signal ends has 128 and the signal's number, or says so itself
CODES = {number: {-number, 128 + number} for number in SIGNALS}
TITLE = "## Trainings that are killed"
SECTION = f"""{TITLE}

`python benchmarks/torture.py --kills {{kills}} --seed {{seed}}`. SIGKILL, SIGTERM or
SIGINT at random moments, then `--ckpt_path .../last`. Only kills that came before the training's
end count: by moment, and those after which the training was resumed within an epoch. The column
before the commit says whether all files were whole and all exit codes right after each kill, and
whether in the end the weights, the optimizer, the schedule, the generators and the metrics of all
epochs were bit-equal to those of the training that was never killed.

| model | {" | ".join(MOMENTS)} | within an epoch | bit-equal | commit |
|---|{"--:|" * (len(MOMENTS) + 1)}---|---|
{{rows}}
"""


class ShiftedConvolutions(Classifier):
    """A user's own model: everything in it that is random must go on where it stopped."""

    def __init__(self, lr: float = 0.001) -> None:
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(8 * 13 * 13, 10),
        )
        super().__init__(net, lr, "adamw")
        self.save_hyperparameters()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        rows, columns = torch.randint(-2, 3, (2,)).tolist()
        return super().training_step((images.roll((rows, columns), (2, 3)), labels), batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9995)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def train(marker: Path, words: list[str]) -> int:
    """In a process of its own: ``fit``, with a file that is there while it validates."""
    from lightning.pytorch.loops import _EvaluationLoop

    from mnist_lightning.__main__ import main

    run = _EvaluationLoop.run

    def marked(self: Any) -> Any:
        marker.touch()
        try:
            return run(self)
        finally:
            marker.unlink(missing_ok=True)

    _EvaluationLoop.run = marked  # type: ignore[method-assign]
    return main(["fit", *words])


def command(root: Path, words: Sequence[str]) -> list[str]:
    return [sys.executable, __file__, "--train", str(root), *words]


def run_folder(root: Path) -> Path | None:
    """The newest run that has a checkpoint to resume from."""
    runs = [
        run
        for folder in root.glob("lightning_logs/*")
        for run in newest_first(folder)
        if (run / "checkpoints/last.ckpt").is_file()
    ]
    return runs[0] if runs else None


def words_for(root: Path, name: str) -> list[str]:
    run, own = (
        run_folder(root),
        [word for word in MODELS[name][:2] if "--model" in MODELS[name][:2]],
    )
    if run is not None:
        return [*own, "--ckpt_path", str(run / "last")]
    epochs = ["--trainer.max_epochs", str(EPOCHS.get(name, 30))]
    return [*MODELS[name], *COMMON, *epochs, "--trainer.default_root_dir", str(root)]


def contents(run: Path) -> dict[str, Any]:
    """What a kill must not change: the state in the checkpoints, and the metrics of all epochs."""
    last, best = (checkpoints.read(run / f"checkpoints/{name}.ckpt") for name in ("last", "best"))
    with (run / "metrics.csv").open(newline="") as file:
        metrics = list(csv.DictReader(file))
    names = ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers")
    # with an average of the weights, the state_dict is the average and this the weights themselves
    names = (*names, "generators", "current_model_state")
    return {
        "metrics": metrics,
        "best": best["state_dict"],
        **{name: last.get(name) for name in names},
    }


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def kill(
    words: Sequence[str], root: Path, moment: str, number: int, times: tuple[float, float]
) -> tuple[bool, str | None]:
    """Starts a training and sends it a signal.

    Args:
        words: of ``fit``.
        root: the folder of its runs.
        moment: one of ``MOMENTS``.
        number: of the signal.
        times: seconds from the start to the first step and to the end, without a kill.

    Returns:
        Whether it was still running by then; and what was wrong after it, if anything.
    """
    first, end = times
    span = {"start": (0, first), "training": (first, end), "end": (0.9 * end, 1.1 * end)}
    marker = root / "validating"
    marker.unlink(missing_ok=True)
    process = subprocess.Popen(
        command(root, words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    began = time.monotonic()
    delay = random.uniform(*span.get(moment, (first / 2, end)))
    fine = moment in ("validation", "checkpoint")  # what is over in a few milliseconds
    while process.poll() is None:
        late = time.monotonic() - began >= delay
        if late and (not fine or time.monotonic() - began > 2 * end):
            break
        if late and moment == "validation" and marker.exists():
            break
        if (
            late
            and moment == "checkpoint"
            and any(root.glob("lightning_logs/*/*/checkpoints/.*.ckpt.*"))
        ):
            break
        time.sleep(0.0005 if fine and late else 0.01)
    ended = process.poll() is not None
    if not ended:
        process.send_signal(number)
    _, errors = process.communicate()
    if process.returncode not in ({0} if ended else {0, *CODES[signal.Signals(number)]}):
        return not ended, f"exit code {process.returncode}: {errors.strip()[-300:]}"
    return not ended, next(iter(damaged(root)), None)


def torture(name: str, kills: int, folder: Path) -> tuple[dict[str, int], int, list[str]]:
    """Kills one model's training so many times.

    Args:
        name: one of ``MODELS``.
        kills: how many that come before the training's end.
        folder: where the runs go.

    Returns:
        How often it was killed, by moment; how many trainings were resumed within an epoch; and all
        that was wrong.
    """
    undisturbed = folder / "undisturbed"
    undisturbed.mkdir()
    began = time.monotonic()
    words = words_for(undisturbed, name)
    process = subprocess.Popen(
        command(undisturbed, words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    first, lines = None, []
    for line in process.stdout or ():
        lines.append(line)
        if first is None and line.startswith(("steps per execution", "one step at a time")):
            first = time.monotonic() - began
    if process.wait() or first is None:
        raise RuntimeError(f"the training without a kill failed: {words}\n{''.join(lines)}")
    times = first, time.monotonic() - began
    killed, within, wrong, trainings = dict.fromkeys(MOMENTS, 0), 0, [], 0
    while sum(killed.values()) < kills:
        trainings += 1
        root, running = folder / f"killed{trainings}", True
        root.mkdir()
        while running and sum(killed.values()) < kills:
            moment, number = MOMENTS[sum(killed.values()) % len(MOMENTS)], random.choice(SIGNALS)
            whole, began = run_folder(root) is None, time.monotonic()
            running, fault = kill(words_for(root, name), root, moment, number, times)
            if whole and not running:
                # the machine may have become faster, and every kill would come too late
                took = time.monotonic() - began
                times = times[0] * took / times[1], took
            killed[moment] += running
            if fault:
                wrong.append(f"{signal.Signals(number).name}, {moment}: {fault}")
            if running and (run := run_folder(root)) is not None:
                last = torch.load(run / "checkpoints/last.ckpt", weights_only=True, mmap=True)
                within += checkpoints.progress(last)[1] > 0
        subprocess.run(command(root, words_for(root, name)), check=True, stdout=subprocess.DEVNULL)
        runs = run_folder(undisturbed), run_folder(root)
        expected, got = (contents(run) for run in runs if run is not None)
        wrong += [f"other {part}" for part in expected if not same(expected[part], got[part])]
    return killed, within, wrong


def earlier(file: Path) -> dict[str, str]:
    """The rows of models that were tried before, by name."""
    lines = file.read_text().splitlines() if file.is_file() else []
    found = {name: line for line in lines for name in MODELS if line.startswith(f"| {name} |")}
    return {name: line for name, line in found.items() if line.count("|") == len(MOMENTS) + 5}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="of each model")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--only", nargs="+", default=MODELS, help="models, by name")
    parser.add_argument("--table", type=Path, default=RELIABILITY, help="the file to write to")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    # a shell that starts this in the background has SIGINT ignored, in the trainings too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faults = []
    commit = str(provenance().get("code", {}).get("commit", ""))[:7]
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            killed, within, wrong = torture(name, arguments.kills, Path(folder))
        counts = " | ".join(str(killed[moment]) for moment in MOMENTS)
        rows = earlier(arguments.table)  # several of these programs may write to one table
        rows[name] = f"| {name} | {counts} | {within} | {'no' if wrong else 'yes'} | {commit} |"
        print(rows[name], *wrong, sep="\n  ", flush=True)
        faults += wrong
        # after each model: an interrupted program keeps what it found
        section = SECTION.format(
            kills=arguments.kills,
            seed=arguments.seed,
            rows="\n".join(rows[name] for name in MODELS if name in rows),
        )
        write_section(TITLE, section, arguments.table)
    return 1 if faults else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        sys.exit(train(Path(sys.argv[2], "validating"), sys.argv[3:]))
    sys.exit(main())
