"""The folder of a search: its trials, written so that no crash can damage them.

search.json                 the definition: what is searched, on which data
trials/<id>.json            one finished trial, written once; every other result follows from these
*.damaged                   damaged files under a new name; what they held is trained again
checkpoints/<id>.ckpt       its weights, an ordinary checkpoint; best.ckpt is the winner's
state/<unit>.pt             the state of an unfinished population, which continues from it exactly
results.json, results.csv   all trials, without their curves
curves.json.gz              the curves by trial; with search.json and results.json, enough to read
                            the results where all other files are gone
tensorboard/                a few numbers of each trial, and its parameters
journal.log                 which worker trains what, unless --storage names a place; see ``leases``
test.json                   each evaluation of the winner on the test images
"""

import contextlib
import csv
import gzip
import io
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mnist_lightning.files import (
    JSON_BYTES,
    create_json,
    csv_cell,
    printable,
    read_json,
    read_torch,
    set_aside,
    write_bytes,
    write_json,
    write_text,
)
from mnist_lightning.metrics import CURVES
from mnist_lightning.provenance import provenance
from mnist_lightning.search.space import GROWABLE, Score, Trial, check_growth

if TYPE_CHECKING:
    import pandas

Record = dict[str, Any]

# the columns of a table of trials that hold numbers, also where trials failed
NUMBERS = (*CURVES, "best_val_acc", "best_epoch", "seconds")
# of a trial's record, beside its seal, a checksum of these
FIELDS = {"id", "number", "round", "state", "seed", "params", "best_val_acc", "best_epoch"}
FIELDS |= {"epochs", "seconds", "error", "curves", *CURVES}
SEAL = "crc32"


class Results:
    """The folder of a search.

    Args:
        path: the folder, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trials, self.checkpoints = path / "trials", path / "checkpoints"
        self.state = path / "state"
        self._records: dict[str, Record] = {}  # a finished trial never changes

    def open(
        self, definition: Mapping[str, Any], grown_from: Sequence[Mapping[str, Any]] = ()
    ) -> list[dict[str, Any]]:
        """Makes the folder, or checks that it holds this search or one that can grow to it.

        Args:
            definition: all that the results depend on, as JSON types.
            grown_from: earlier definitions on other machines; written if the folder is new.

        Returns:
            Earlier definitions, the oldest first; see ``space.rounds``.

        Raises:
            ValueError: it holds another search, or a damaged ``search.json``.
        """
        for folder in (self.trials, self.checkpoints, self.state):
            folder.mkdir(parents=True, exist_ok=True)
        file = self.path / "search.json"
        if not file.is_file():
            history = {"grown_from": list(grown_from)} if grown_from else {}
            create_json(file, {**definition, **history, "provenance": provenance()})
        remedy = (
            "delete it if the folder's trials are of this search: it is then written again;"
            " otherwise choose another folder with --folder"
        )
        held = read_json(file, remedy)
        earlier = held.get("grown_from", [])
        if not isinstance(earlier, list) or not all(
            isinstance(past, dict) and past.keys() >= set(GROWABLE) for past in earlier
        ):
            raise ValueError(f"{file} is damaged (grown_from): {remedy}")
        # also the order of the axes, on which random points depend
        if json.dumps({key: held.get(key) for key in definition}) == json.dumps(definition):
            return earlier
        try:
            grows = check_growth(held, definition)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged: {remedy}") from error
        except ValueError as error:
            raise ValueError(
                f"{self.path} holds another search: {error}. A search can grow (more values, seeds,"
                " trials, epochs), not change or shrink: choose another folder with --folder"
            ) from error
        past = {name: held[name] for name in GROWABLE}
        past |= {"numbers": self._numbers(), "provenance": held.get("provenance")}
        held = {**held, **definition, "grown_from": [*earlier, past]}
        write_json(file, {**held, "provenance": provenance()})
        if grows:
            print(f"{self.path} grows: {', '.join(grows)}", flush=True)
        return held["grown_from"]

    def _numbers(self) -> int:
        """The lowest number that no trial has, nor any after it."""
        taken = [-1]
        for file in self.trials.glob("[!.]*.json"):
            with contextlib.suppress(ValueError):  # damaged: it is trained again
                taken += [cast(Record, self.record(file.stem))["number"]]
        return 1 + max(taken)

    def heal(self) -> list[str]:
        """Renames damaged trials, and damaged checkpoints, whose trials it deletes.

        Returns:
            The trials that it deleted, which must be trained again.
        """
        for file in sorted(self.trials.glob("[!.]*.json")):
            try:
                self.record(file.stem)
            except ValueError as error:
                set_aside(file)
                reason = str(error).rpartition(": ")[0]
                print(printable(f"{reason}: renamed to {file.name}.damaged"), flush=True)
        without_weights = []
        for id in list(self._records):
            weights = self.checkpoints / f"{id}.ckpt"
            if not weights.is_file():
                continue  # on the machine that trained it
            try:
                read_torch(weights)
            except ValueError as error:
                set_aside(weights)
                (self.trials / f"{id}.json").unlink()
                del self._records[id]
                without_weights.append(id)
                aside = f"{weights.name}.damaged"
                what = f"{error}: renamed to {aside}; trial {id} is trained again"
                print(printable(what), flush=True)
        return without_weights

    def record(self, id: str) -> Record | None:
        """A finished trial, or ``None``.

        Raises:
            ValueError: its file is damaged.
        """
        file = self.trials / f"{id}.json"
        if id not in self._records and file.is_file():
            remedy = "run the search again, which renames it and trains the trial again"
            record = read_json(file, remedy)
            if wrong := fault(record, id):
                raise ValueError(f"{file} is damaged ({wrong}): {remedy}")
            self._records[id] = unsealed(record)
        return self._records.get(id)

    def records(self) -> dict[str, Record]:
        """All trials finished so far, by id."""
        # This is called often: of trials that are known already, only the names are read.
        known = {f"{id}.json" for id in self._records}
        for name in set(os.listdir(self.trials)) - known:
            if name.endswith(".json") and not name.startswith("."):
                self.record(name.removesuffix(".json"))
        return self._records

    def in_order(self) -> list[Record]:
        """All trials finished so far, in the order of their numbers."""
        return sorted(self.records().values(), key=lambda record: record["number"])

    def add(self, record: Record) -> None:
        """Writes a finished trial, unless another worker has written it before."""
        create_json(self.trials / f"{record['id']}.json", sealed(record))

    def adopt(self, record: Record) -> None:
        """Writes a finished trial of the storage; it replaces one that differs from it."""
        if self.record(record["id"]) != record:
            write_json(self.trials / f"{record['id']}.json", sealed(record))
            self._records[record["id"]] = record

    def write_tables(self) -> list[Record]:
        """Writes ``results.json``, ``results.csv`` and ``curves.json.gz``; returns the trials."""
        records = self.in_order()
        curves = {record["id"]: record["curves"] for record in records}
        # without the time: equal results make equal files
        packed = gzip.compress(json.dumps(curves).encode(), mtime=0)
        write_bytes(self.path / "curves.json.gz", packed)
        write_json(
            self.path / "results.json",
            [{k: v for k, v in record.items() if k != "curves"} for record in records],
        )
        rows = [_flat(record) for record in records]
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        table.writeheader()
        table.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
        write_text(self.path / "results.csv", text.getvalue())
        return records

    def write_tensorboard(self, model: str) -> None:
        """Adds a few numbers of each trial to TensorBoard: whole curves would make it slow."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        metrics = ("val/acc", "val/loss", "best/val_acc", "run/epochs", "run/seconds")
        root = self.path / "tensorboard"
        for record in self.in_order():
            folder = root / f"{record['number']:04d}-{record['id']}"
            if folder.is_dir() or record["state"] == "FAIL":
                continue
            settings = {"model": model, **params_of(record)}
            for name, value in settings.items():
                settings[name] = value if isinstance(value, int | float) else str(value)
            columns, start, end = hparams(settings, dict.fromkeys(metrics, 0.0))
            if not root.is_dir():
                with SummaryWriter(str(root)) as writer:
                    writer.file_writer.add_summary(columns)
            values = [
                record[n] for n in ("val_acc", "val_loss", "best_val_acc", "epochs", "seconds")
            ]
            try:
                with SummaryWriter(str(folder)) as writer:
                    writer.file_writer.add_summary(start)
                    for metric, value in zip(metrics, values, strict=True):
                        writer.add_scalar(metric, value, record["epochs"])
                    writer.file_writer.add_summary(end)
            except OSError as error:
                shutil.rmtree(folder, ignore_errors=True)  # or it would count as written
                reason = (error.strerror or str(error)).lower()
                raise ValueError(
                    f"{folder} cannot be written: {reason}. Make room there."
                ) from error


def new_record(
    trial: Trial,
    id: str,
    curves: Mapping[str, Sequence[float]],
    seconds: float,
    state: str = "COMPLETE",
    error: str | None = None,
) -> Record:
    """A trial's result, as its file holds it.

    Args:
        trial: what was trained.
        id: its name.
        curves: by name as in ``CURVES``, a number for each epoch.
        seconds: that it took; of networks trained together, its share.
        state: ``COMPLETE``, ``PRUNED`` or ``FAIL``.
        error: why it failed. The figures of a failed trial mean nothing: they are left empty.
    """
    params = dict(trial.params)
    figures = dict.fromkeys((*CURVES, "best_val_acc", "best_epoch"))
    if state != "FAIL":
        figures |= {name: curves[name][-1] for name in CURVES}
        best = max(curves["val_acc"])
        figures |= {"best_val_acc": best, "best_epoch": 1 + list(curves["val_acc"]).index(best)}
    return {
        "id": id,
        "number": trial.number,
        "round": trial.round,
        "state": state,
        "seed": params.pop("seed"),
        "params": params,
        **figures,
        "epochs": len(curves["val_acc"]),
        "seconds": round(seconds, 3),
        "error": error,
        # JSON knows neither infinity nor NaN
        "curves": {
            name: [value if math.isfinite(value) else None for value in curves[name]]
            for name in CURVES
        },
    }


def params_of(record: Record) -> dict[str, Any]:
    """What a trial was trained with, its seed among them, like ``Trial.params``."""
    return {**record["params"], "seed": record["seed"]}


def sealed(record: Record) -> Record:
    """The record with a checksum, as files and storages hold it."""
    return {**record, SEAL: _checksum(record)}


def unsealed(record: Record) -> Record:
    """The record without its checksum, which older ones do not have."""
    return {name: value for name, value in record.items() if name != SEAL}


def _checksum(record: Record) -> int:
    return zlib.crc32(json.dumps(unsealed(record), sort_keys=True).encode())


def fault(record: Any, id: str) -> str | None:
    """What is wrong with a record of a trial; ``None`` if nothing is.

    Files can be damaged, and other machines can send anything.
    """
    if not isinstance(record, dict) or record.get("id") != id:
        return f"not trial {id}"
    if record.get(SEAL, _checksum(record)) != _checksum(record):
        return "its checksum is wrong"
    if unknown := record.keys() - FIELDS - {SEAL}:
        return f"unknown field {min(unknown)!r}"
    curves, epochs = record.get("curves"), record.get("epochs")
    numbers = [record.get(name) for name in ("number", "round", "seed", "epochs")]
    if not all(type(number) is int for number in numbers) or not _is_number(record.get("seconds")):
        return "number, round, seed, epochs and seconds must be numbers"
    if not isinstance(record.get("params"), dict) or not isinstance(curves, dict):
        return "params and curves must be dictionaries"
    if set(curves) != set(CURVES):
        return f"the curves are {sorted(curves)}, not {sorted(CURVES)}"
    for curve in curves.values():
        if not isinstance(curve, list) or len(curve) != epochs:
            return "a curve has not as many values as the trial has epochs"
        if not all(value is None or _is_number(value) for value in curve):
            return "a curve holds something else than numbers"
    if record.get("state") == "FAIL":
        return None if isinstance(record.get("error"), str) else "it failed without a reason"
    if record.get("state") not in ("COMPLETE", "PRUNED"):
        return f"unknown state {record.get('state')!r}"
    accuracies = curves["val_acc"]
    if not accuracies or not all(_is_number(v) and 0 <= v <= 1 for v in accuracies):
        return "val_acc must be between 0 and 1 in each epoch"
    best = max(accuracies)
    expected = {
        **{name: curve[-1] for name, curve in curves.items()},
        "best_val_acc": best,
        "best_epoch": 1 + accuracies.index(best),
    }
    for name, value in expected.items():
        if record.get(name) != value:
            return f"{name} is {record.get(name)!r}, but {value!r} by its curves"
    return None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def score(record: Record, objective: str) -> Score | None:
    """What a trial is ranked by; ``None`` if it was not completed.

    Args:
        record: of the trial.
        objective: ``val_acc``, after the last epoch, or ``best_val_acc``.
    """
    if record["state"] != "COMPLETE":
        return None
    if objective == "val_acc":
        return Score(record["val_acc"], record["val_loss"])
    return Score(record["best_val_acc"], record["curves"]["val_loss"][record["best_epoch"] - 1])


def search_folders(path: Path) -> list[Path]:
    """The folder itself if it holds a search, else the folders of searches directly in it.

    Raises:
        ValueError: there is none.
    """
    folders = [path] if (path / "search.json").is_file() else []
    folders = folders or sorted(file.parent for file in path.glob("*/search.json"))
    if not folders:
        raise ValueError(
            f"{path} is not the folder of a search: neither it nor a folder in it has a"
            " search.json. Searches are in lightning_logs/search"
        )
    return folders


def load_results(*paths: str | os.PathLike[str]) -> "pandas.DataFrame":
    """The trials of searches as a table, a row each.

    Args:
        paths: as ``report`` takes them: folders of searches, finished or not, or folders that hold
            several; also a ``results.json``.

    Returns:
        Columns of numbers, except those in brackets; what a trial does not have is missing (NaN):
        (``search``), the name of its folder; (``id``), ``number``, ``round``, ``seed``;
        (``state``), which is COMPLETE, PRUNED or FAIL; one for each parameter, like ``lr``;
        ``train_loss``, ``val_loss`` and ``val_acc`` after the last epoch; ``best_val_acc`` and its
        ``best_epoch``, counted from 1; the ``epochs`` and ``seconds`` that it took; (``error``),
        why it failed; (``curves``), which ``load_curves`` has as numbers.

    Raises:
        ValueError: there is no search, or a file is damaged.
        ImportError: pandas is not installed; it comes with the extra ``search``.
    """
    import pandas  # an extra: needed here alone

    rows = [
        {"search": name, **_flat(record), "curves": record["curves"]}
        for name, record in _records(paths)
    ]
    table = pandas.DataFrame(rows)
    for name in set(NUMBERS) & set(table.columns):  # of failed trials alone, no type is known
        table[name] = pandas.to_numeric(table[name])
    return table


def load_curves(*paths: str | os.PathLike[str]) -> "pandas.DataFrame":
    """What happened in each epoch of the trials of searches, a row each.

    Args:
        paths: see ``load_results``.

    Returns:
        Columns ``search`` and ``id``, as in ``load_results``; ``epoch``, counted from 1;
        ``train_loss``, ``val_loss`` and ``val_acc``, NaN where a loss was not finite.

    Raises:
        ValueError: as ``load_results``.
    """
    import pandas  # an extra: needed here alone

    columns: dict[str, list[Any]] = {name: [] for name in ("search", "id", "epoch", *CURVES)}
    for search, record in _records(paths):
        curves = record["curves"]
        epochs = len(curves["val_acc"])
        columns["search"] += [search] * epochs
        columns["id"] += [record["id"]] * epochs
        columns["epoch"] += range(1, epochs + 1)
        for name in CURVES:
            columns[name] += curves[name]
    return pandas.DataFrame(columns).astype(dict.fromkeys(CURVES, float) | {"epoch": int})


def _records(paths: Sequence[str | os.PathLike[str]]) -> Iterator[tuple[str, Record]]:
    """The trials of all searches, each with the name of its search."""
    for path in map(Path, paths):
        alone = path.is_file()
        for folder in search_folders(path.parent if alone else path):
            whole = (folder / "trials").is_dir() and not alone
            records = Results(folder).in_order() if whole else _read_tables(folder)
            for record in records:
                yield folder.resolve().name, record


def _read_tables(folder: Path) -> list[Record]:
    """The trials as ``write_tables`` wrote them, in a folder that may hold nothing else."""
    remedy = "run the search again, which writes it again"
    records = read_json(folder / "results.json", remedy, list)
    for record in records:
        if not isinstance(record, dict) or not _is_accuracy(record.get("val_acc")):
            what = f"val_acc {record['val_acc']!r}" if isinstance(record, dict) else "no trials"
            raise ValueError(f"{folder / 'results.json'} is damaged ({what}): {remedy}")
    file = folder / "curves.json.gz"
    try:
        with gzip.open(file) as packed:
            text = packed.read(JSON_BYTES + 1)
        if len(text) > JSON_BYTES:
            raise ValueError(f"it unpacks to more than {JSON_BYTES:,} bytes")
        curves = json.loads(text)
        return [{**record, "curves": curves[record["id"]]} for record in records]
    except (
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        RecursionError,
        zlib.error,
    ) as error:
        raise ValueError(f"{file} is damaged, or of another search ({error}): {remedy}") from error


def _is_accuracy(value: Any) -> bool:
    """Whether it can be a trial's accuracy; a failed trial has none."""
    return value is None or (isinstance(value, int | float) and 0 <= value <= 1)


def _flat(record: Record) -> Record:
    """A row of a table: a column for each parameter, no curves."""
    row: Record = {}
    for name, value in record.items():
        if name == "params":
            row |= value
        elif name != "curves":
            row[name] = value
    return row
