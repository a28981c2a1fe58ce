"""Messages about a training: where it resumes, how it ended, which command comes next."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from mnist_lightning import console
from mnist_lightning.console import say, short
from mnist_lightning.files import printable
from mnist_lightning.runs import checkpoints
from mnist_lightning.runs.checkpoints import ModelCheckpoint
from mnist_lightning.runs.folder import RunFolder


def say_resumed(
    path: Path,
    checkpoint: dict[str, Any],
    configs: Sequence[Path],
    run: RunFolder | None,
    class_options: Sequence[str],
) -> None:
    """Says which training is resumed, from where, and which epoch was best so far.

    Args:
        path: the file of the checkpoint.
        checkpoint: its content.
        configs: the configurations in use.
        run: the run whose folder is used again; None if a new run starts.
        class_options: the options that name the user's classes in a command.
    """
    epochs, batches = checkpoints.progress(checkpoint)
    files = ", ".join(short(config) for config in configs)
    say(
        f"resuming {short(path)} after {progress_text(epochs, batches)}"
        + (f", with {files}" if files else "")
        + ("" if run else "; the training continues as a new run")
    )
    if (best := _best_so_far(path)) is not None:
        epoch, monitor, score = best
        say(f"best so far: {monitor} {score:.4f} in epoch {epoch}")
    last = path.with_name("last.ckpt")
    if path.name == "best.ckpt" and (done := _epochs(last)) is not None and done > epochs:
        again = f"epoch {done} is" if done == epochs + 1 else f"epochs {epochs + 1} to {done} are"
        say(
            f"this is the best epoch: {again} trained again. To resume after the last one:"
            f"\n  {console.command('fit', '--ckpt_path', short(last), *class_options)}"
        )


def say_stopped(run: RunFolder | None, class_options: Sequence[str]) -> None:
    """Says what a stopped training has saved, and the command that resumes it."""
    if run is None or not run.last.is_file():
        say("\nstopped; nothing was saved")
        return
    epochs, batches = checkpoints.progress(torch.load(run.last, weights_only=True, mmap=True))
    again = console.command("fit", "--ckpt_path", f"{run}/last", *class_options)
    say(f"\nstopped; saved up to {progress_text(epochs, batches)}. To resume:\n  {again}")


def retry_hint(run: RunFolder | None, lr: float, class_options: Sequence[str]) -> str:
    """The command that resumes a diverged training with a tenth of its ``lr``."""
    if run is None or not run.last.is_file():
        return "No checkpoint had been saved before"
    again = console.command(
        *("fit", "--ckpt_path", f"{run}/last"), *("--model.lr", f"{lr / 10:g}"), *class_options
    )
    return f"The last good checkpoint is last.ckpt. To resume from it:\n  {again}"


def say_finished(trainer: Trainer, run: RunFolder, class_options: Sequence[str]) -> None:
    """Says the best epoch, and the commands that test it and show its curves."""
    ours = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    best = next((c for c in ours if c.filename == "best"), None)
    if best is None or not best.best_model_path:
        return
    file = Path(best.best_model_path)
    epoch = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["epoch"] + 1
    stops = [c.stopped_epoch for c in trainer.early_stopping_callbacks]  # type: ignore[attr-defined]
    # the callback also remembers a stop of an earlier session
    stopped = any(stop and stop + 1 == trainer.current_epoch for stop in stops)
    say(
        f"\nbest epoch   {epoch} of {trainer.current_epoch}"
        + (" (stopped early)" if stopped else "")
        + (f"\n{best.monitor:<12} {best.best_model_score:.4f}" if best.monitor else "")
        + f"\ncheckpoint   {short(file)}"
        f"\ntest it      {console.command('test', '--ckpt_path', str(run), *class_options)}"
        f"\nsee it       {console.tensorboard(short(run.path.parent.parent))}"
    )


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Metrics on one line, sorted by name."""
    return "  ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))


def per_class_text(classes: Sequence[Mapping[str, Any]]) -> str:
    """A table of the accuracy of each class; of more than 20 classes, only the ten worst.

    Args:
        classes: as ``Classifier.per_class`` returns them, with at least one.
    """
    shown, title = list(classes), "class"
    if len(classes) > 20:
        seen = [row for row in classes if row["images"]]
        shown = sorted(seen, key=lambda row: row["acc"])[:10]
        title = f"the {len(shown)} worst of {len(classes):,} classes"
    names = [_class_name(row["class"]) for row in shown]
    width = max(map(len, [title, *names]))
    lines = [f"{title:<{width}}     acc  correct   images"]
    for name, row in zip(names, shown, strict=True):
        acc = f"{row['acc']:.4f}" if row["images"] else ""
        lines.append(f"{name:<{width}}  {acc:>6}  {row['correct']:>7,}  {row['images']:>7,}")
    return "\n".join(lines)


def progress_text(epochs: int, batches: int) -> str:
    """The progress of a training: whole epochs, and mini-batches of the next one."""
    within = f"{batches:,} mini-batches of epoch {epochs + 1}"
    if not batches:
        return f"epoch {epochs}"
    return f"epoch {epochs} and {within}" if epochs else within


def _class_name(name: str) -> str:
    """The name of a class on one line, which comes from a file and may be anything."""
    return printable(name).replace("\n", "\\n")[:40]


def _epochs(file: Path) -> int | None:
    """The finished epochs in a checkpoint; None if it cannot be read."""
    with suppress(ValueError, KeyError, TypeError):
        return checkpoints.progress(checkpoints.read(file))[0]
    return None


def _best_so_far(checkpoint: Path) -> tuple[int, str, float] | None:
    """Epoch, metric and value of a run's best checkpoint; None if it cannot be read."""
    with suppress(ValueError, KeyError, TypeError, StopIteration):
        best = checkpoints.read(checkpoint.with_name("best.ckpt"))
        saved = [s for s in best["callbacks"].values() if s.get("best_model_score") is not None]
        state = next(s for s in saved if s.get("monitor"))
        epochs, _ = checkpoints.progress(best)
        return epochs, str(state["monitor"]), float(state["best_model_score"])
    return None
