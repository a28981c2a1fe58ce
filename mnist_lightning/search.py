"""Run a search: trials in, results out; resumed, spread over workers and machines."""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from jsonargparse import ArgumentError, ArgumentParser

from mnist_lightning import claims, space
from mnist_lightning.claims import Claim, ClaimLost, Claims, open_storage, start_of
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.files import write_bytes
from mnist_lightning.names import SearchByName, allow_classes, check_named, parser_settings
from mnist_lightning.plan import (
    OBJECTIVES,
    SMALL,
    STRATEGIES,
    UNIT_BYTES,
    Search,
    Unit,
    all_units,
    check_count,
    networks,
    open_units,
    rounds,
)
from mnist_lightning.results import Record, Results, score, sealed
from mnist_lightning.worker import (
    ATTEMPTS,
    Report,
    Worker,
    adopt,
    fill_index,
    make_trainer,
    sampler_and_pruner,
)

ROOT = Path("lightning_logs") / "search"
STOPS = {signal.SIGINT, signal.SIGTERM}


def _work_here(
    report: Report,
    search: Search,
    key: str,
    path: Path,
    storage: str | None,
    device: str,
    threads: int,
) -> None:
    meeting_point = open_storage(storage, path)
    Worker(search, key, Results(path), meeting_point, device, threads, report).work()


def _work_elsewhere(pipe: Connection, parent: int, *arguments: Any) -> None:
    """``_work_here`` in a process of its own."""

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    try:
        signal.signal(signal.SIGTERM, _stop)
        # held back while the modules were imported, where it would print a long traceback
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        _work_here(lambda unit, part: pipe.send((unit, part)), *arguments)
    except (KeyboardInterrupt, SystemExit):  # the Trainer turns the one into the other
        os._exit(128 + signal.SIGTERM)  # not even a traceback of a thread
    except Exception as error:
        # as words: not every exception can be sent
        wrong = isinstance(error, ValueError)
        pipe.send(str(error) if wrong else f"a worker failed: {type(error).__name__}: {error}")


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


class _Crew:
    """The workers of this machine, each in a process of its own.

    Args:
        claims: of the search; a worker that dies leaves its unit to the others there.
        arguments: of ``_work_here``, all but the first.
    """

    def __init__(self, claims: Claims, arguments: tuple[Any, ...]) -> None:
        self.claims, self.arguments = claims, arguments
        self._pipes: dict[Any, tuple[SpawnProcess, str | None]] = {}
        self._idle_deaths = self._deaths_borne = 0  # since one last worked

    def work(self, workers: int, progress: "Progress") -> list[str]:
        """Runs workers until there is no more to do; a worker that its unit killed is replaced.

        Returns:
            Why some of them could not go on.
        """
        errors = []
        self._deaths_borne = ATTEMPTS * workers
        over = math.inf  # since when a worker has found nothing left to do
        try:
            for _ in range(workers):
                self._hire()
            # whoever is frozen by then has lost its unit, and is not waited for
            while self._pipes and time.monotonic() - over < claims.STALE_SECONDS:
                for pipe in cast(list[Connection], wait(list(self._pipes), timeout=0.5)):
                    try:
                        message = pipe.recv()
                    except EOFError:
                        process, started = self._pipes.pop(pipe)
                        process.join()
                        if process.exitcode:
                            errors += self._bury(process, started)
                        elif not errors:
                            over = min(over, time.monotonic())
                        continue
                    if isinstance(message, str):
                        errors.append(message)
                    else:
                        progress.note(*message)
                        self._idle_deaths = 0
                progress.show()
        finally:
            for process, _ in self._pipes.values():  # those left when this is interrupted
                with contextlib.suppress(ProcessLookupError):
                    os.kill(cast(int, process.pid), signal.SIGINT)
            for process, _ in self._pipes.values():
                process.join(10)
                process.kill()
        return errors

    def _hire(self) -> None:
        context = multiprocessing.get_context("spawn")
        # a pipe for each: a worker that is killed takes no lock with it
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_work_elsewhere, args=(sender, os.getpid(), *self.arguments), daemon=True
        )
        resource_tracker.ensure_running()  # its start, inside the next one, would unblock them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # which a new process inherits
        try:
            process.start()
            self._pipes[receiver] = process, start_of(cast(int, process.pid))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        sender.close()

    def _bury(self, process: SpawnProcess, started: str | None) -> list[str]:
        code = cast(int, process.exitcode)
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if code == -signal.SIGKILL:
            reason += ", as where memory runs out"
        held_unit = self.claims.note_death(cast(int, process.pid), started, reason)
        self._idle_deaths += not held_unit
        # killed while it had no unit: not by one
        if held_unit or (code < 0 and self._idle_deaths <= self._deaths_borne):
            self._hire()
            return []
        return [f"a worker ended: {reason}"]


class Progress:
    """One line: trials done, the best so far, the time left."""

    def __init__(self, search: Search, results: Results, images: int) -> None:
        from tqdm import tqdm

        self.search, self.results, self.images = search, results, images
        self._plan()
        self._said = time.monotonic()
        self._bar = tqdm(
            total=self.total,
            initial=self._done,
            disable=not sys.stderr.isatty(),
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} trials, {elapsed}{postfix}",
        )

    def _plan(self) -> None:
        """Looks what there is to do; again whenever a round ends."""
        records = self.results.records()
        self._done = len(records)
        if self.search.sampled:
            self.total = self.search.strategy["n"]
        else:
            self.total = sum(len(trials) for trials in rounds(self.search, records))
        left = open_units(self.search, records, self.images)
        self._work = {unit.name: unit.work for unit in left}
        self._first: dict[str, float] = {}  # how much of a unit was done when we came
        self._part: dict[str, float] = {}
        self._started = time.monotonic()

    def note(self, unit: str, part: float) -> None:
        """A worker has done this part of its unit."""
        self._first.setdefault(unit, part)
        self._part[unit] = part

    def show(self) -> None:
        """Shows how things stand, if it is time."""
        done = len(self.results.records())
        if done == self.total and done > self._done:
            self._plan()
        text = ", ".join(self._facts())
        self._bar.total, self._bar.n = self.total, done
        self._bar.set_postfix_str(text)
        if self._bar.disable and time.monotonic() - self._said > 30:
            self._said = time.monotonic()
            print(f"{done}/{self.total} trials, {text}", flush=True)

    def _facts(self) -> list[str]:
        facts = []
        scores = [score(r, self.search.objective) for r in self.results.records().values()]
        if good := [found.val_acc for found in scores if found]:
            facts.append(f"best {self.search.objective} {max(good):.4f}")
        parts = [(self._work.get(unit, 0), self._first[unit], p) for unit, p in self._part.items()]
        if done := sum(work * (part - first) for work, first, part in parts):
            whole = sum(self._work.values()) - sum(work * first for work, first, _ in parts)
            left = (time.monotonic() - self._started) * (whole / done - 1)
            facts.append(f"{left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left")
        return facts

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


def run(
    search: Search,
    folder: Path | None = None,
    workers: int | None = None,
    storage: str | None = None,
    device: str = "cpu",
) -> list[Record]:
    """Runs a search, or what is left of it.

    Args:
        search: what to search.
        folder: for its results; by default ``lightning_logs/search/<name>``.
        workers: processes; by default one for each core, or one where all want the same GPU. 0
            trains in this process, which then must not be killed by a trial.
        storage: where workers on several machines meet; see ``claims.open_storage``.
        device: on which populations are trained.

    Returns:
        All trials, as in ``results.json``.

    Raises:
        ValueError: the search cannot work, or the folder is of another one.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
        SystemExit: a signal handler's; the same.
    """
    search.check()
    # what is unknown, or not on this machine, is found out now
    if search.sampled:
        sampler_and_pruner(search)
    if search.trainer or search.model_class not in SMALL:
        make_trainer(search, max_epochs=1)
    _check_device(device)
    results = Results(folder or ROOT / search.name)
    data = search.load_data()
    identity = search.identity(data)
    results.open(identity)
    key = f"{search.name}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]}"
    meeting_point = open_storage(storage, results.path)
    claims = Claims(meeting_point, key)
    images = len(data.train_set)
    if without_weights := results.heal():
        claims.forget(without_weights)
    if storage is not None:
        _agree(search, results, claims, images)
    print(f"{search.name}: {search.model}, {data.describe()}")
    if left := open_units(search, results.records(), images):
        if workers is None:
            alone = not (left[0].together or search.model_class in SMALL)
            # trainings that each want the whole GPU take turns
            workers = 1 if alone and torch.cuda.is_available() else os.cpu_count() or 1
        if search.second_round is None and search.strategy["name"] != "refine":
            workers = min(workers, len(left))  # no further round will need more
        _say_plan(search, left, max(workers, 1))
        if search.sampled:
            # what the sampler learns from
            fill_index(search, meeting_point, key, results.in_order())
        threads = max(1, (os.cpu_count() or 1) // max(workers, 1))
        arguments = (search, key, results.path, storage, device, threads)
        progress = Progress(search, results, images)
        threads_before = torch.get_num_threads()
        errors: list[str] = []
        try:
            if workers:
                errors = _Crew(claims, arguments).work(workers, progress)
            else:

                def report(unit: str, part: float) -> None:
                    progress.note(unit, part)
                    progress.show()

                _work_here(report, *arguments)
        except (KeyboardInterrupt, SystemExit) as stop:
            progress.close()
            done = len(results.write_tables())
            print(f"\n{done} of {progress.total} trials are done; the same command goes on")
            if isinstance(stop, SystemExit) and stop.code != 1:
                raise
            raise KeyboardInterrupt from None  # the Trainer makes of it an exit with 1
        finally:
            progress.close()
            torch.set_num_threads(threads_before)
        if errors and open_units(search, results.records(), images):
            results.write_tables()
            raise ValueError(f"{errors[0]} (what is finished stays; the same command goes on)")
    found = results.write_tables()
    fill_index(search, meeting_point, key, found)
    results.write_tensorboard(search.model)
    _crown(search, results, found)
    return found


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"there is no device {device!r}: name cpu, cuda or cuda:1") from error
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind != "cpu" and (there is None or there.type != kind):
        raise ValueError(f"device {device!r} is not on this machine; there is {there or 'cpu'}")


def _agree(search: Search, results: Results, claims: Claims, images: int) -> None:
    """Shows the units that are finished here to other machines, or adopts theirs.

    A unit whose worker lost the storage is finished here, but nobody knows.
    """
    records = results.records()
    for unit in all_units(search, records, images):
        if not all(id in records for id in unit.ids):
            continue
        claim = claims.take(unit.name, unit.ids)
        if isinstance(claim, Claim):
            with contextlib.suppress(ClaimLost):
                claim.finish([sealed(records[id]) for id in unit.ids])
        elif claim:
            adopt(search, results, claims, unit, claim)


def _say_plan(search: Search, left: Sequence[Unit], workers: int) -> None:
    line = f"{sum(len(unit.ids) for unit in left)} trials to go"
    if together := [unit for unit in left if unit.together]:
        count = sum(len(networks(search, unit.trials)) for unit in together)
        line += f": {count} networks in {len(together)} population{'s' * (len(together) > 1)}"
        if any("-part" in unit.name for unit in together):
            line += f", split to stay below {UNIT_BYTES >> 20} MiB each"
    print(f"{line}; {workers} worker{'s' * (workers > 1)}", flush=True)


def _crown(search: Search, results: Results, records: Sequence[Record]) -> None:
    """Names the best, and keeps the winner's checkpoint as ``best.ckpt``."""
    if failed := [record for record in records if record["state"] == "FAIL"]:
        print(f"{len(failed)} failed, the first: {failed[0]['id']}: {failed[0]['error']}")
    scored = [(found, r) for r in records if (found := score(r, search.objective))]
    if not scored:
        print("no trial succeeded")
        return
    ranked = sorted(scored, key=lambda pair: (-pair[0].val_acc, pair[0].val_loss))
    # of several seeds, the best mean wins, and of its trials the best one
    cells = space.best([({**r["params"], "seed": r["seed"]}, found) for found, r in scored])
    winner = next(record for _, record in ranked if record["params"] == cells[0])
    print(f"\n{'id':<10}{search.objective:<14}parameters")
    for found, record in ranked[:5]:
        params = {**record["params"], "seed": record["seed"]}
        words = "  ".join(f"{name} {value}" for name, value in params.items())
        print(f"{record['id']:<10}{found.val_acc:<14.4f}{words}")
    weights = results.checkpoints / f"{winner['id']}.ckpt"
    if not weights.is_file():
        print(f"\nwinner       {winner['id']}; its weights are on the machine that trained it")
        return
    best = results.checkpoints / "best.ckpt"
    write_bytes(best, weights.read_bytes())
    print(
        f"\nwinner       {winner['id']}"
        f"\nresults      {results.path / 'results.csv'}"
        f"\ntest it      python -m mnist_lightning test --ckpt_path {results.path}"
        f"\nanother one  python -m mnist_lightning test --ckpt_path {best.parent / 'ID.ckpt'}"
        f"\nsee them     tensorboard --logdir {results.path}"
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="mnist_lightning search",
        description="Train many models and compare them. Flags win over the configuration.",
        exit_on_error=False,
    )
    add = parser.add_argument
    add("-c", "--config", action=SearchByName, help="A YAML file, or the name of a shipped one.")
    add("--name", type=str | None, help="Of the search and its folder (default: the file's name).")
    add("--model", type=str, required=True, help="Name of a class, like ShallowNetwork.")
    add("--strategy", type=str | dict[str, Any], default="grid", help=f"{', '.join(STRATEGIES)}.")
    add("--space", type=dict[str, Any], default={}, help="Axes by parameter; lists of values.")
    add("--fixed", type=dict[str, Any], default={}, help="Parameters that all trials share.")
    add("--seeds", type=list[int], default=[0], help="Each combination is trained with each.")
    add("--second_round", type=dict[str, int] | None, help="{best: k, max_epochs: n}")
    add("--objective", type=str, default="val_acc", help=f"{' or '.join(OBJECTIVES)}.")
    skipped = {"batch_size", "eval_batch_size", "predict_dir"}
    parser.add_class_arguments(MNISTDataModule, "data", skip=skipped, instantiate=False)
    add("--trainer", type=dict[str, Any], default={}, help="For models that the Trainer trains.")
    add("--folder", type=str | None, help="Default: lightning_logs/search/NAME.")
    add("--workers", type=int | None, help="Processes (default: one for each core).")
    add(
        "--storage",
        type=str | None,
        help="Where workers on several machines meet: a journal file"
        " on a shared disk, postgresql://..., or grpc://host:port of Optuna's proxy.",
    )
    add("--device", type=str, default="cpu", help="Where populations are trained.")
    return parser


def read(argv: Sequence[str]) -> tuple[Search, dict[str, Any]]:
    """The search that the words of a command line ask for, and the other arguments of ``run``.

    Raises:
        ValueError: they, or the configuration that they name, cannot be understood.
    """
    check_named([word.rpartition("=")[2] for word in argv], Path())
    try:
        with parser_settings():
            allow_classes([])  # only the model's is imported, and not by the parser
            settings = _parser().parse_args(list(argv))
    except (ArgumentError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError("; ".join(lines[:2])) from error
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
    return Search(**given), place


def main(argv: Sequence[str]) -> int:
    """``python -m mnist_lightning search --config NAME [options]``.

    Raises:
        ValueError: what was asked for cannot be understood, or cannot work, or no trial succeeded.
    """
    search, place = read(argv)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        records = run(search, **place)
    finally:
        signal.signal(signal.SIGTERM, before)
    if not any(record["state"] == "COMPLETE" for record in records):
        error = records[0]["error"]
        raise ValueError(f"no trial of {len(records)} succeeded, the first: {error}")
    return 0
