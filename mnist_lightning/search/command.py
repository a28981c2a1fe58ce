"""Run a search, or what is left of it, with workers on one machine or several."""

import contextlib
import dataclasses
import re
import signal
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser

from mnist_lightning import console
from mnist_lightning.checks import check_count
from mnist_lightning.classes import allow_classes, class_path, naming, parser_settings
from mnist_lightning.configs import SearchByName, check_named
from mnist_lightning.cores import threads_each, usable_cores
from mnist_lightning.data.module import MNISTDataModule
from mnist_lightning.files import printable, write_bytes
from mnist_lightning.search import space
from mnist_lightning.search.crew import Crew, stop, work_here
from mnist_lightning.search.leases import Lease, LeaseLost, Leases, open_storage
from mnist_lightning.search.plan import (
    OBJECTIVES,
    SMALL,
    UNIT_BYTES,
    Search,
    WorkUnit,
    all_units,
    digest,
    open_units,
    planned,
)
from mnist_lightning.search.progress import Progress
from mnist_lightning.search.results import Record, Results, params_of, score, sealed
from mnist_lightning.search.sampling import fill_index, optuna_study, sampler_and_pruner
from mnist_lightning.search.space import STRATEGIES, Score
from mnist_lightning.search.trainer import make_trainer
from mnist_lightning.search.worker import adopt

ROOT = Path("lightning_logs") / "search"


def run(
    search: Search,
    folder: Path | None = None,
    workers: int | None = None,
    storage: str | None = None,
    device: str = "cpu",
) -> list[Record]:
    """Runs a search: all of it, what is left, or what it has grown by (``space.check_growth``).

    Args:
        search: what to search.
        folder: for its results; by default ``lightning_logs/search/<name>``.
        workers: processes; by default one for each core, or one where all want the same GPU. 0
            trains in this process; a trial that crashes then ends the search.
        storage: where workers on several machines meet; see ``leases.open_storage``.
        device: for populations.

    Returns:
        All trials, as in ``results.json``.

    Raises:
        ValueError: the search cannot work, or the folder holds another one.
        KeyboardInterrupt: Ctrl-C; the same call continues.
        SystemExit: of a signal handler; the same call continues.
    """
    search.check()
    _check_machine(search, device)
    results = Results(folder or ROOT / search.name)
    data = search.load_data()
    images = len(data.train_set)
    definition = search.definition(data)
    known: Sequence[Mapping[str, Any]] = ()
    if storage:
        known = _history(open_storage(storage, results.path), search.name, definition)
    search = dataclasses.replace(search, grown_from=tuple(results.open(definition, known)))
    # named after the first definition, which workers of every later one know too
    key = f"{search.name}-{digest(search.at(0).definition(data))}"
    meeting_point = open_storage(storage, results.path, answered=bool(storage))
    leases = Leases(meeting_point, key)
    if without_weights := results.heal():
        leases.forget(without_weights)
    if storage is not None:
        _share_finished(search, results, leases, images)
        study = optuna_study(search, meeting_point, key)
        study.set_user_attr("definitions", [*search.grown_from, definition])
    print(f"{search.name}: {search.model}, {data.describe()}")
    if left := open_units(search, results.records(), images):
        workers = _useful_workers(search, left, workers)
        _say_plan(search, results.records(), left, max(workers, 1))
        if search.sampled:
            _fill_indices(search, results, meeting_point, key)
        arguments = (search, key, results.path, storage, device, threads_each(workers))
        _train(Progress(search, results, images), leases, workers, arguments)
    else:
        print(f"holds all its {counted(len(results.records()), 'trial')}: nothing to train")
    records = results.write_tables()
    fill_index(search, meeting_point, key, records)
    results.write_tensorboard(search.model)
    if winner := _print_best(search, records):
        _save_winner(search, results, winner)
    return records


def _check_machine(search: Search, device: str) -> None:
    """Refuses a sampler, a Trainer or a device that is unknown, or not on this machine."""
    if search.sampled:
        sampler_and_pruner(search)
    if search.trainer or search.model_class not in SMALL:
        make_trainer(search, max_epochs=1)
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"there is no device {device!r}: name cpu, cuda or cuda:1") from error
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind != "cpu" and (there is None or there.type != kind):
        raise ValueError(f"device {device!r} is not on this machine; there is {there or 'cpu'}")


def _useful_workers(search: Search, left: Sequence[WorkUnit], workers: int | None) -> int:
    """How many workers to start, where so many were asked for."""
    if workers is None:
        alone = not (left[0].together or search.model_class in SMALL)
        # trainings that each want the whole GPU take turns
        workers = 1 if alone and torch.cuda.is_available() else usable_cores()
    if search.second_round is None and search.strategy["name"] != "refine":
        workers = min(workers, len(left))  # no later round will need more
    return workers


def _fill_indices(search: Search, results: Results, storage: Any, key: str) -> None:
    """Gives Optuna the finished trials of every definition: samplers learn from them."""
    for generation in range(len(search.grown_from) + 1):
        past = search.at(generation)
        drawn = [r for r in results.in_order() if r["number"] < past.strategy["n"]]
        fill_index(past, storage, key, drawn)


def _train(progress: Progress, leases: Leases, workers: int, arguments: tuple[Any, ...]) -> None:
    """Trains what is left of a search.

    Args:
        progress: of the search.
        leases: of the search.
        workers: processes; 0 trains in this one.
        arguments: of ``work_here``, all but the first.

    Raises:
        ValueError: workers could not continue.
        KeyboardInterrupt: Ctrl-C.
        SystemExit: a signal.
    """
    search, results = progress.search, progress.results
    threads_before = torch.get_num_threads()
    errors: list[str] = []
    try:
        if workers:
            errors = Crew(leases, arguments).work(workers, progress)
        else:

            def on_progress(unit: str, part: float) -> None:
                progress.note(unit, part)
                progress.show()

            work_here(on_progress, *arguments)
    except (KeyboardInterrupt, SystemExit) as interruption:
        progress.close()
        done = len(results.write_tables())
        print(f"\n{done} of {progress.total} trials are done; the same command continues")
        if isinstance(interruption, SystemExit) and interruption.code != 1:
            raise
        raise KeyboardInterrupt from None  # the Trainer has made an exit with 1 of it
    finally:
        progress.close()
        torch.set_num_threads(threads_before)
    if errors and open_units(search, results.records(), progress.images):
        results.write_tables()
        raise ValueError(f"{errors[0]} (finished trials are kept; the same command continues)")


def _history(storage: Any, name: str, definition: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The earlier definitions of this search on other machines; none if no machine has it."""
    for study in storage.get_all_studies():
        definitions = study.user_attrs.get("definitions")
        known = isinstance(definitions, list) and definitions[-1:] == [definition]
        if known and study.study_name.startswith(f"{name}-"):
            return definitions[:-1]
    return ()


def counted(count: int, what: str) -> str:
    """``1 trial``, ``2 trials``."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def _share_finished(search: Search, results: Results, leases: Leases, images: int) -> None:
    """Shows the units that are finished here to other machines, or adopts theirs.

    Other machines do not know of a unit whose worker lost the storage before it could tell them.
    """
    records = results.records()
    for unit in all_units(search, records, images):
        if not all(id in records for id in unit.ids):
            continue
        lease = leases.take(unit.name, unit.ids)
        if isinstance(lease, Lease):
            with contextlib.suppress(LeaseLost):
                lease.finish([sealed(records[id]) for id in unit.ids])
        elif lease:
            adopt(search, results, leases, unit, lease)


def _say_plan(
    search: Search, records: Mapping[str, Record], left: Sequence[WorkUnit], workers: int
) -> None:
    ids = planned(search, records)
    missing = sum(id not in records for id in ids)
    line = f"trains {counted(missing, 'trial')}"
    if records:
        whole = len({*records, *ids})
        line = f"holds {counted(len(records), 'trial')} of {whole:,}; trains {missing:,}"
    if together := [unit for unit in left if unit.together]:
        count = sum(len(unit.networks) for unit in together)
        line += f": {counted(count, 'network')} in {counted(len(together), 'population')}"
        if any("-part" in unit.name for unit in together):
            line += f", split to stay below {UNIT_BYTES >> 20} MiB each"
    print(f"{line}; {counted(workers, 'worker')}", flush=True)


def _print_best(search: Search, records: Sequence[Record]) -> Record | None:
    """Prints the best configurations; returns the winner, if a trial succeeded."""
    if failed := [record for record in records if record["state"] == "FAIL"]:
        first = " ".join(f"{failed[0]['id']}: {failed[0]['error']}".split())
        print(f"{len(failed)} failed, the first: {printable(first)}")
    scored = [(one, r) for r in records if (one := score(r, search.objective))]
    if not scored:
        print("no trial succeeded")
        return None
    ranked = sorted(scored, key=lambda pair: (-pair[0].val_acc, pair[0].val_loss))
    # the best mean over the seeds wins, and within it the best trial
    configurations = space.ranking([(params_of(r), one) for one, r in scored])[:5]
    best_of = [next(r for _, r in ranked if r["params"] == params) for params, _ in configurations]
    print(printable(_table(search, configurations, best_of)))
    return best_of[0]


def _save_winner(search: Search, results: Results, winner: Record) -> None:
    """Saves the winner's checkpoint as ``best.ckpt``, and prints what can be done with it."""
    weights = results.checkpoints / f"{winner['id']}.ckpt"
    if not weights.is_file():
        print(f"\nwinner       {winner['id']}; its weights are on the machine that trained it")
        return
    best = results.checkpoints / "best.ckpt"
    own = naming(model=class_path(search.model_class))
    write_bytes(best, weights.read_bytes())
    print(
        f"\nwinner       {winner['id']}"
        f"\nresults      {results.path / 'results.csv'}"
        f"\ntest it      {console.command('test', '--ckpt_path', results.path, *own)}"
        f"\nanother one  {console.command('test', '--ckpt_path', best.parent / 'ID.ckpt', *own)}"
        f"\nsee them     {console.tensorboard(results.path)}"
    )


def _table(
    search: Search,
    configurations: Sequence[tuple[Mapping[str, Any], Sequence[Score]]],
    best_of: list[Record],
) -> str:
    """Configurations by their mean over the seeds, the best first.

    Args:
        search: the search.
        configurations: parameters and the scores of their seeds.
        best_of: the best trial of each configuration.
    """
    rows = [(OBJECTIVES[search.objective], "n", "best trial", "configuration")]
    names = list(configurations[0][0])
    shown = [name for name in names if name not in search.fixed] or names
    for (params, scores), record in zip(configurations, best_of, strict=True):
        accuracies = [score.val_acc for score in scores]
        mean = f"{statistics.fmean(accuracies):.4f}"
        if len(accuracies) > 1:
            mean += f" ± {statistics.stdev(accuracies):.4f}"
        text = ", ".join(f"{name} {_rounded(params[name])}" for name in shown if name in params)
        rows.append((mean, str(len(accuracies)), record["id"], text))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = (
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )
    return "\n" + "\n".join(lines)


def _rounded(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else " ".join(str(value).split())


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"{console.PROGRAM} search",
        description="Train many models and compare them. Flags win over the configuration.",
        exit_on_error=False,
    )
    add = parser.add_argument
    add("-c", "--config", action=SearchByName, help="A YAML file, or the name of a shipped one.")
    add(
        "--name",
        type=str | None,
        help="The name of the search and its folder (default: the file's name).",
    )
    # the name alone is enough
    add(
        "--strategy",
        type=str | dict[str, Any],
        default="grid",
        help=f"{', '.join(STRATEGIES)}; with options: {{name: random, n: 50}}.",
    )
    others = {"name", "strategy", "data", "grown_from"}
    parser.add_class_arguments(Search, skip=others, instantiate=False)
    others = {"batch_size", "predict_dir"}
    parser.add_class_arguments(MNISTDataModule, "data", skip=others, instantiate=False)
    add("--folder", type=str | None, help="For the results (default: lightning_logs/search/NAME).")
    add("--workers", type=int | None, help="Processes (default: one for each core).")
    add(
        "--storage",
        type=str | None,
        help="Where workers on several machines meet: a journal file"
        " on a shared disk, postgresql://..., or grpc://host:port of Optuna's proxy.",
    )
    add(
        "--device",
        type=str,
        default="cpu",
        help="For small networks that are trained together: cpu, cuda, ...",
    )
    return parser


def read(argv: Sequence[str]) -> tuple[Search, dict[str, Any]]:
    """The search that a command line asks for, and the other arguments of ``run``.

    Raises:
        ValueError: it, or the configuration that it names, cannot be understood.
    """
    check_named([argument.rpartition("=")[2] for argument in argv], Path())
    try:
        with parser_settings():
            allow_classes([])  # only the model's class is imported, and not by the parser
            settings = _parser().parse_args(list(argv))
    except (ArgumentError, TypeError) as error:
        if data := re.search(r'"data":\s+Unable to load config \'(.+?)\'', str(error)):
            raise ValueError(
                f"--data {data[1]}: a search takes the settings of MNISTDataModule, like"
                " --data.split, and no other data module"
            ) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = re.sub(r"<class '(?:[a-z]+\.)*(\w+)'>", r"\1", "; ".join(lines[:2]))
        raise ValueError(reason.replace(":; ", ": ")) from error
    given = settings.as_dict()
    configs = given.pop("config") or []
    place = {key: given.pop(key) for key in ("folder", "workers", "storage", "device")}
    if place["folder"] is not None:
        place["folder"] = Path(place["folder"])
    if place["workers"] is not None:
        check_count("workers", place["workers"])
    if isinstance(given["strategy"], str):
        given["strategy"] = {"name": given["strategy"]}
    given["name"] = given["name"] or (Path(str(configs[-1])).stem if configs else "search")
    for part in ("space", "fixed"):
        given[part] = _dotted(given[part])
    return Search(**given), place


def _dotted(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by name; a flag ``--fixed.freezing.cache`` has come as ``{freezing: {cache: }}``.

    Args:
        parameters: of the file and of the flags; the flags come later and win.
    """
    flat: dict[str, Any] = {}
    for name, value in parameters.items():
        is_group = name in ("data", "freezing", "hidden_units") and isinstance(value, Mapping)
        if is_group and not value.keys() & {"low", "high"}:  # which make a range
            flat |= {f"{name}.{key}": one for key, one in value.items()}
        else:
            flat[name] = value
    return flat


def main(argv: Sequence[str]) -> int:
    """``python -m mnist_lightning search --config NAME [options]``.

    Raises:
        ValueError: the arguments are wrong, the search cannot work, or no trial succeeded.
    """
    search, place = read(argv)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        records = run(search, **place)
    finally:
        signal.signal(signal.SIGTERM, before)
    if not any(record["state"] == "COMPLETE" for record in records):
        error = records[0]["error"]
        raise ValueError(f"no trial of {len(records)} succeeded, the first: {error}")
    return 0
