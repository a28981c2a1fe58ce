"""What the report says of trainings: one run, or several side by side."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from mnist_lightning.configs import read_config
from mnist_lightning.console import command, short
from mnist_lightning.files import read_json
from mnist_lightning.report import analysis, figures
from mnist_lightning.report.sections import Block, Drawing, Picture, Section, Table, mistakes
from mnist_lightning.runs import evaluations
from mnist_lightning.runs.ensembles import members_of
from mnist_lightning.runs.folder import newest_first

MOST = 24  # runs on a page; the curves of more could not be told apart
# settings in which two runs may differ although they train the same
_NO_DIFFERENCE = (
    *("trainer.default_root_dir", "trainer.enable_progress_bar", "data.data_dir", "ckpt_path"),
    "tune",
)
_PICTURE_BYTES = 2**20


@dataclass
class RunResult:
    """A run as its folder records it, or an ensemble, which has no epochs and no settings.

    Args:
        path: the folder, ``version_N``.
        name: as on the page.
        curves: a row for each epoch, with the columns of ``metrics.csv``; may be empty.
        settings: all settings by their dotted name.
        origins: an entry of ``provenance.json`` for each start of the training.
        tests: the test evaluations.
        robustness: the evaluations on changed test images.
        members: the checkpoints of an ensemble.
    """

    path: Path
    name: str
    curves: pd.DataFrame
    settings: dict[str, Any]
    origins: list[dict[str, Any]] = field(default_factory=list)
    tests: list[dict[str, Any]] = field(default_factory=list)
    robustness: list[dict[str, Any]] = field(default_factory=list)
    members: list[str] = field(default_factory=list)

    @property
    def model(self) -> str:
        if self.members:
            return "Ensemble"
        return str(self.settings.get("model.class_path", "a model")).rpartition(".")[2]

    @property
    def best(self) -> pd.Series | None:
        """The epoch with the highest validation accuracy, else None."""
        accuracies = self.curves.get("val/acc", pd.Series(dtype=float)).dropna()
        return None if accuracies.empty else self.curves.loc[accuracies.idxmax()]

    @property
    def test(self) -> dict[str, Any] | None:
        """The first evaluation on the whole test set."""
        return next(filter(evaluations.is_whole, self.tests), None)


def run_folders(path: Path) -> list[Path]:
    """The folder itself if it is of a run, else the runs ``version_N`` in it, oldest first.

    Ensembles count as runs.
    """
    if _is_run(path) and not (path / "search.json").exists():
        return [path]
    return [run for run in newest_first(path)[::-1] if _is_run(run)]


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or bool(members_of(folder))


def read(folders: Sequence[Path]) -> list[RunResult]:
    """Reads runs.

    Args:
        folders: of the runs.

    Raises:
        ValueError: there are more than ``MOST``, or a file of one is damaged.
    """
    if len(folders) > MOST:
        raise ValueError(f"{len(folders)} runs: at most {MOST} fit on a page. Name those you want")
    return [_read(folder.absolute()) for folder in folders]


def _read(folder: Path) -> RunResult:
    remedy = "restore it, or move it away"
    file = folder / "metrics.csv"
    try:
        curves = pd.read_csv(file) if file.is_file() else pd.DataFrame()
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged: {remedy}") from error
    origin, config = folder / "provenance.json", folder / "config.yaml"
    return RunResult(
        folder,
        f"{folder.parent.name}/{folder.name}",
        curves,
        dict(_flat(read_config(config))) if config.is_file() else {},
        read_json(origin, remedy, kind=list) if origin.is_file() else [],
        evaluations.read(folder),
        evaluations.read(folder, "robustness.json"),
        [member["checkpoint"] for member in members_of(folder)],
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}".replace(".init_args.", "."), value))
    return pairs


def in_words(runs: Sequence[RunResult]) -> list[str]:
    """The main results, a sentence each; **bold** as in Markdown."""
    said = []
    ranked = [run for run in runs if run.best is not None]
    ranked.sort(key=lambda run: -float(run.best["val/acc"]))  # type: ignore[index]
    for run in runs:
        if run.settings.get("data.val_fraction") == 0:
            said.append(
                f"**{run.name}** ({run.model}) was trained on the validation images too, for"
                f" {len(run.curves)} epochs: it has no validation accuracy. {_tested(run)}"
            )
        elif run.members:
            said.append(
                f"**{run.name}** is an ensemble of {len(run.members)} models. {_tested(run)}"
            )
    if not ranked:
        return said or ["No epoch with a validation has finished yet."]
    best = ranked[0]
    epoch = best.best
    assert epoch is not None
    which = f"the best of {len(ranked)}" if len(ranked) > 1 else best.model
    said.append(
        f"**{best.name}** ({which}) reached a validation accuracy of"
        f" **{epoch['val/acc']:.4f}** in epoch {epoch['epoch']:.0f} of {len(best.curves)}."
    )
    return [*said, _tested(best), *_gap(best, epoch)]


def _tested(run: RunResult) -> str:
    if not run.test:
        hint = command("test", "--ckpt_path", short(run.path))
        return f"It has not been tested yet: {hint}"
    low, high = _interval(run.test)
    return (
        f"On {run.test['images']:,} test images it is right in **{run.test['test/acc']:.4f}**"
        f" (95 % interval {low:.4f} to {high:.4f}, Wilson)."
    )


def _gap(run: RunResult, epoch: pd.Series) -> list[str]:
    if not {"train/acc", "val/acc"} <= set(epoch.index):
        return []
    gap = float(epoch["train/acc"]) - float(epoch["val/acc"])
    lasts = len(run.curves) - epoch["epoch"]
    said = f"On the training images it was right in {epoch['train/acc']:.4f} in that epoch"
    if gap > 0.02:
        return [f"{said}: {gap:.4f} more, so it overfits; fewer epochs or augmentation may help."]
    if lasts == 0 and len(run.curves) > 1:
        return [f"{said}. Its last epoch was the best: it may learn more in more epochs."]
    return [f"{said}."]


def _interval(test: Mapping[str, Any]) -> tuple[float, float]:
    return analysis.wilson(round(test["test/acc"] * test["images"]), test["images"])


def overall(runs: Sequence[RunResult]) -> list[Block]:
    """The losses of all runs, their results, and the settings that differ."""
    drawings = [
        Drawing(f"runs_{name}", caption, figures.epochs(series, title))
        for name, column, title, caption in (
            ("val_loss", "val/loss", "validation loss", _VALIDATION),
            ("train_loss", "train/loss", "training loss", _TRAINING),
        )
        if (series := _series(runs, column))
    ]
    tables = [Table("runs", "The best epoch of each run", _results(runs))]
    if (different := _different(runs)) is not None:
        tables.append(Table("settings", "Settings that differ", different))
    if (changed := _robustness(runs)) is not None:
        title = "Accuracy on changed test images, mean over the strengths of each change"
        tables.append(Table("robustness", title, changed))
    curves = [Block("Losses", drawings=drawings)] if drawings else []
    return [Block("Results", tables=tables), *curves]


def lead(runs: Sequence[RunResult]) -> Drawing | None:
    """The figure at the top of the page: the validation errors of all runs, by epoch."""
    if not (series := _series(runs, "val/acc")):
        return None
    wide, narrow = (
        figures.epochs(series, "validation error (%)", True, (width, 0.35 * width + 2.1))
        for width in (figures.WIDE, figures.NARROW)
    )
    return Drawing("runs_accuracy", _ACCURACY, wide, narrow=narrow)


_ACCURACY = "Wrong answers on the validation images, on a logarithmic scale: lower is better."
_VALIDATION = "The mean loss of the validation images."
_TRAINING = "The mean loss of the mini-batches of each epoch, each before its update."


def _series(runs: Sequence[RunResult], column: str) -> dict[str, pd.Series]:
    return {
        run.name: pd.Series(run.curves[column].to_numpy(), run.curves["epoch"]).dropna()
        for run in runs
        if not run.curves.empty and {column, "epoch"} <= set(run.curves)
    }


def _results(runs: Sequence[RunResult]) -> pd.DataFrame:
    rows = []
    for run in runs:
        best: Mapping[str, Any] = {} if run.best is None else dict(run.best)
        rows.append(
            {
                "run": run.name,
                "model": run.model,
                "epochs": None if run.members else len(run.curves),
                "best_epoch": int(best["epoch"]) if best else None,
                "acc": best.get("val/acc"),
                "val_loss": best.get("val/loss"),
                "macro_F1": best.get("val/f1"),
                "test": run.test["test/acc"] if run.test else None,
                "evaluations": run.tests[-1]["evaluation"] if run.tests else 0,
            }
        )
    return pd.DataFrame(rows)


def _different(runs: Sequence[RunResult]) -> pd.DataFrame | None:
    runs = [run for run in runs if run.settings]
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = []
    for name in names:
        values = [analysis.value_text(run.settings.get(name, "–")) for run in runs]
        if len(set(values)) > 1 and name not in _NO_DIFFERENCE:
            named = zip((run.name for run in runs), values, strict=True)
            rows.append({"setting": name, **dict(named)})
    return pd.DataFrame(rows) if rows else None


def _robustness(runs: Sequence[RunResult]) -> pd.DataFrame | None:
    """Each run's accuracies in its newest evaluation on changed images; None without any."""
    rows = []
    for run in runs:
        if not run.robustness:
            continue
        newest = run.robustness[-1]
        try:
            row = {"run": run.name, "unchanged": float(newest["test/acc"])}
            for name, change in newest["changes"].items():
                row[str(name)] = fmean(change["acc"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{run.path / 'robustness.json'} is damaged: restore it, or move it away"
            ) from error
        rows.append(row)
    return pd.DataFrame(rows) if rows else None


def section(run: RunResult) -> Section:
    """What is said of one run."""
    epochs = f"{len(run.curves)} epoch{'s' if len(run.curves) != 1 else ''}"
    size = f"{len(run.members)} members" if run.members else epochs
    return Section(run.name, run.model, size, _facts(run), _blocks(run))


def _facts(run: RunResult) -> list[tuple[str, str]]:
    if run.members:
        return [("members", ", ".join(run.members))]
    chosen = {k: v for k, v in run.settings.items() if k.startswith("model.") and v is not None}
    model = [f"{k.removeprefix('model.')} {analysis.value_text(v)}" for k, v in chosen.items()]
    facts = [("model", ", ".join(m for m in model if not m.startswith("class_path")))]
    if run.origins:
        first, last = run.origins[0], run.origins[-1]
        data = last.get("data") or {}
        named = (f"{k} {analysis.value_text(v)}" for k, v in data.items() if v not in (None, {}))
        facts += [
            ("data", ", ".join(n for n in named if not n.startswith(("checksum", "data_dir")))),
            ("seed", str(last.get("seed"))),
            ("device", f"{last.get('device')}, precision {last.get('precision')}"),
            ("started", str(first.get("time"))),
            ("resumed", ", ".join(str(o.get("time")) for o in run.origins[1:])),
        ]
    return [(name, text) for name, text in facts if text]


def _blocks(run: RunResult) -> list[Block]:
    blocks = []
    if run.test:
        low, high = _interval(run.test)
        total = run.tests[-1]["evaluation"]
        text = (
            f"{run.test['images']:,} test images: {run.test['test/acc']:.4f} right (95 % interval"
            f" {low:.4f} to {high:.4f}, Wilson). "
            + ("Evaluated once." if total == 1 else f"Evaluated {total} times: the first counts.")
        )
        name = run.name.replace("/", "_")
        tables = []
        if per_class := run.test.get("per_class"):
            frame = pd.DataFrame(per_class).rename(columns={"acc": "accuracy"})
            tables.append(Table(f"{name}_classes", "By class", frame))
        blocks.append(Block("Test", text, tables, mistakes(name, run.test)))
    pictures = [
        Picture(file.stem.replace("_", " "), _data_address(file))
        for file in sorted((run.path / "pictures").glob("*.png"))
        if file.stat().st_size <= _PICTURE_BYTES
    ]
    if pictures:
        blocks.append(Block("Pictures", "Of the best epoch.", pictures=pictures))
    return blocks


def _data_address(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
