"""A worker of a search: takes units of work, trains them, writes the results.

A trial is written when it is done. In between, every few seconds, the state of a population is
written, from which another worker can continue.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import optuna
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from mnist_lightning.data.sampling import ImageSet
from mnist_lightning.files import printable, read_torch, set_aside, write_torch
from mnist_lightning.metrics import CURVES
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.search import space
from mnist_lightning.search.leases import Lease, LeaseLost, Leases, StorageLost
from mnist_lightning.search.plan import SMALL, Search, WorkUnit, networks, open_units
from mnist_lightning.search.results import (
    Record,
    Results,
    fault,
    new_record,
    params_of,
    sealed,
    unsealed,
)
from mnist_lightning.search.sampling import Sampling
from mnist_lightning.search.space import Trial
from mnist_lightning.search.trainer import EpochDone, Lack, checkpoint, fit
from mnist_lightning.training.execution import kept_memory
from mnist_lightning.training.population import Member, PopulationTraining

SNAPSHOT_SECONDS = 5.0
# A unit fails when it has killed so many workers, one after the other, without progress in between.
ATTEMPTS = 3
# parts of PyTorch's messages about missing memory or a missing device: it has no exception for them
LACKS = (
    "can't allocate memory",
    "out of memory",
    "DataLoader worker",
    "CUDA",
    "NVIDIA",
    "No space left",
)

# is given a unit's name and the part of it that is done
ProgressCallback = Callable[[str, float], None]


class Worker:
    """Trains units, one after the other.

    Args:
        search: what is searched.
        key: its name in the storage, which no other search has.
        results: its folder.
        storage: where workers meet; see ``leases.open_storage``.
        device: for populations.
        threads: for a single training.
        on_progress: is called after each epoch.
    """

    def __init__(
        self,
        search: Search,
        key: str,
        results: Results,
        storage: optuna.storages.BaseStorage,
        device: str,
        threads: int,
        on_progress: ProgressCallback,
    ) -> None:
        self.search, self.key, self.results, self.storage = search, key, results, storage
        self.device, self.threads, self.on_progress = device, threads, on_progress
        self.data = search.load_data()
        self.sampling = Sampling(search, key, results, storage)
        self._prepared: list[tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]] = []

    def work(self) -> None:
        """Takes units until there are none left, here or anywhere."""
        threads = torch.get_num_threads()
        torch.set_flush_denormal(True)
        try:
            self._work()
        finally:
            torch.set_flush_denormal(False)
            torch.set_num_threads(threads)

    def _work(self) -> None:
        leases = Leases(self.storage, self.key)
        images = len(self.data.train_set)
        lacks: dict[str, Lack] = {}
        while left := [
            unit
            for unit in open_units(self.search, self.results.records(), images)
            if unit.name not in lacks
        ]:
            moved = False
            for unit in left:
                if all(self.results.record(id) for id in unit.ids):
                    continue  # another worker has finished it in the meantime
                lease = leases.take(unit.name, unit.ids)
                if lease is None:
                    continue
                moved = True
                try:
                    if isinstance(lease, Lease):
                        self._train_leased(unit, lease, leases)
                    else:  # on another machine
                        adopt(self.search, self.results, leases, unit, lease)
                except LeaseLost:
                    continue  # the results of its new owner are adopted later
                except Lack as lack:
                    lacks[unit.name] = lack  # another worker may be able to
            if not moved:
                time.sleep(0.5)
        if lacks:
            raise next(iter(lacks.values()))

    def _train_leased(self, unit: WorkUnit, lease: Lease, leases: Leases) -> None:
        with lease.alive():
            adopt(self.search, self.results, leases, unit, lease.records)
            if not all(self.results.record(id) for id in unit.ids):
                self.train(unit, lease)
            records = (self.results.record(id) for id in unit.ids)
            lease.finish([sealed(record) for record in records if record])

    def train(self, unit: WorkUnit, lease: Lease) -> None:
        """Trains a unit's trials and writes the results.

        Raises:
            LeaseLost: the unit was given to another worker.
            Lack: there is no memory or no device for it.
            ValueError: a file cannot be written, or the storage does not answer.
        """
        small = unit.together or self.search.model_class in SMALL
        # The last bits of a sum depend on the number of threads, and small networks are no faster
        # with more than one.
        torch.set_num_threads(1 if small else self.threads)
        if len(lease.deaths) >= ATTEMPTS:
            self._give_up(unit, lease)
        elif unit.together:
            try:
                with kept_memory():
                    self._train_together(unit, lease)
            except Exception as error:
                _raise_lack(unit.name, error)
                raise
        elif unit.trials:
            self._train_alone(unit.trials[0], unit.ids[0], lease, lambda epoch, val_acc: False)
        else:
            self._train_drawn(unit, lease)

    def _give_up(self, unit: WorkUnit, lease: Lease) -> None:
        """Records the trials of a unit as failed: every worker that trained them died."""
        reason = f"its worker died {len(lease.deaths)} times; the last one: {lease.deaths[-1]}"
        trials = unit.trials or [self.sampling.draw(unit, lease.had_before).trial]
        curves: dict[str, list[float]] = {name: [] for name in CURVES}
        for trial, id in zip(trials, unit.ids, strict=True):
            if not self.results.record(id):
                self._write(lease, new_record(trial, id, curves, 0.0, "FAIL", reason))

    def _write(self, lease: Lease, record: Record, save: Callable[[], None] | None = None) -> None:
        """Writes a finished trial, its weights first, and shows it to other machines.

        Raises:
            LeaseLost: another worker has the unit; the record was not written.
            StorageLost: other machines cannot be told now; all was written.
        """
        lost = None
        try:
            lease.check()
        except StorageLost as error:
            lost = error
        if save:
            save()
        try:
            if not lost:
                lease.publish(sealed(record))
        except StorageLost as error:
            lost = error
        self.results.add(record)
        if lost:
            raise lost

    def _as_rows(self, trial: Trial) -> dict[str, tuple[Tensor, Tensor]]:
        """Images, as this trial sees them, and labels, both as a population takes them."""
        settings = self.search.data_settings(trial.params)
        if settings not in [prepared for prepared, _ in self._prepared]:
            data = self.search.data_module(trial.params, self.data)

            def rows(part: ImageSet) -> tuple[Tensor, Tensor]:
                pixels = data.preprocess(part.images).flatten(1)
                return pixels.to(self.device), part.labels.to(self.device)

            sets = {"train": rows(data.train_set), "val": rows(data.val_set)}
            self._prepared = [(settings, sets)]  # of one trial only: they are large
        return self._prepared[0][1]

    def _train_together(self, unit: WorkUnit, lease: Lease) -> None:
        """Trains the networks of a unit as one population."""
        training, spent = self._training(unit, lease)
        file = self.results.state / f"{unit.name}.pt"
        # what has killed a worker may kill the next one: save every epoch
        snapshot_seconds = 0.0 if lease.deaths else SNAPSHOT_SECONDS
        epochs = max(m.max_epochs for m in training.members)
        started = saved = time.monotonic()
        while True:
            seconds = spent + time.monotonic() - started
            share = seconds / len(unit.networks)
            for number, trials in enumerate(unit.networks.values()):
                for trial in trials:
                    self._record_if_done(training, number, trial, share, lease)
            if training.done:
                break
            if time.monotonic() - saved > snapshot_seconds:
                lease.check_quickly()  # another worker may write this file by now
                state = {"training": training.state_dict(), "seconds": seconds}
                write_torch(file, state)
                saved = time.monotonic()
            self.on_progress(unit.name, training.epoch / epochs)
            lease.check_quickly()
            training.run_epoch()
        file.unlink(missing_ok=True)

    def _training(self, unit: WorkUnit, lease: Lease) -> tuple[PopulationTraining, float]:
        """A unit's training, where its last worker left it, and the seconds spent on it."""
        file = self.results.state / f"{unit.name}.pt"
        training = self._new_training(unit.networks, unit.trials[0])
        if not file.is_file():
            return training, 0.0
        try:
            state = read_torch(file)
            missing = [t for t in unit.trials if not self.results.record(t.id)]
            if any(t.params["max_epochs"] <= state["training"]["epoch"] for t in missing):
                return training, 0.0  # the file of an earlier trial was deleted
            training.load_state_dict(state["training"])
            lease.continues_from(training.epoch / max(m.max_epochs for m in training.members))
            return training, float(state["seconds"])
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            aside = set_aside(file)
            what = f"{error}: renamed to {aside.name}; its unit is trained from the start"
            print(printable(what), flush=True)
            return self._new_training(unit.networks, unit.trials[0]), 0.0

    def _new_training(self, members: Iterable[Member], trial: Trial) -> PopulationTraining:
        """Networks before their first epoch, on the mini-batches of a trial."""
        return PopulationTraining(
            list(members),
            **self._as_rows(trial),
            batch_size=self.search.batch_size(trial.params),
            seed=trial.params["seed"],
            classes=len(self.search.spec(trial.params).classes),
        )

    def _record_if_done(
        self,
        training: PopulationTraining,
        number: int,
        trial: Trial,
        seconds: float,
        lease: Lease,
    ) -> None:
        """Writes a trial after its last epoch, or after the one in which it failed."""
        epochs, failed = trial.params["max_epochs"], training.failed[number]
        if not (training.epoch == epochs or (failed and training.epoch < epochs)):
            return
        if self.results.record(trial.id):
            return  # it was finished before this training was interrupted
        curves = {name: curve[number] for name, curve in training.curves.items()}
        if failed:
            self._write(lease, new_record(trial, trial.id, curves, seconds, "FAIL", failed))
            return
        record = new_record(trial, trial.id, curves, seconds)
        best = self.search.objective == "best_val_acc"
        weights = training.best_parameters(number) if best else training.parameters(number)
        model = self._model(trial, weights)
        epoch = record["best_epoch"] if best else epochs
        self._write(lease, record, lambda: self._save(trial, trial.id, model, epoch))

    def _train_drawn(self, unit: WorkUnit, lease: Lease) -> None:
        """Trains a trial that a sampler draws and a pruner may end."""
        drawn = self.sampling.draw(unit, lease.had_before)
        drawn.tell(self._train_alone(drawn.trial, unit.ids[0], lease, drawn.prune))

    def _train_alone(
        self, trial: Trial, id: str, lease: Lease, prune: Callable[[int, float], bool]
    ) -> Record:
        """Trains one trial.

        Args:
            trial: what to train.
            id: of the trial.
            lease: of its unit.
            prune: is given the epoch and its validation accuracy; answers whether to stop.
        """
        started = time.monotonic()
        curves: dict[str, list[float]] = {name: [] for name in CURVES}
        best: list[Tensor] = []
        state, error = "COMPLETE", None

        def epoch_done(values: Sequence[float], weights: Callable[[], list[Tensor]]) -> bool:
            """Notes the values of an epoch; answers whether to stop."""
            nonlocal best, state
            accuracies = curves["val_acc"]
            if self.search.objective == "best_val_acc" and values[2] > max(accuracies, default=-1):
                best = [tensor.detach().cpu().clone() for tensor in weights()]
            for name, value in zip(CURVES, values, strict=True):
                curves[name].append(value)
            if not all(math.isfinite(loss) for loss in values[:2]):
                raise FloatingPointError(f"the loss is not finite in epoch {len(accuracies)}")
            lease.check_quickly()
            self.on_progress(id, len(accuracies) / trial.params["max_epochs"])
            if prune(len(accuracies), values[2]):
                state = "PRUNED"
            return state == "PRUNED"

        try:
            small = self.search.hidden_units(trial.params) is not None
            if small:
                model, weights = self._fit_small(trial, epoch_done)
            else:
                model, weights = fit(self.search, self.data, trial, epoch_done)
        except (LeaseLost, StorageLost, Lack):
            raise
        except Exception as reason:  # a trial that fails is a result too
            _raise_lack(id, reason)
            state, error = "FAIL", f"{type(reason).__name__}: {reason}"
        record = new_record(trial, id, curves, time.monotonic() - started, state, error)
        if state == "FAIL":
            self._write(lease, record)
            return record
        if best:
            _copy(best, weights)
        epoch = record["best_epoch" if best else "epochs"]
        self._write(lease, record, lambda: self._save(trial, id, model, epoch))
        return record

    def _fit_small(
        self, trial: Trial, epoch_done: EpochDone
    ) -> tuple[LightningModule, list[Tensor]]:
        """Trains a population of one; returns the model, and the tensors that training changes."""
        training = self._new_training(networks(self.search, [trial]), trial)
        over = False
        while not over and training.epoch < trial.params["max_epochs"]:
            training.run_epoch()
            values = [training.curves[name][0][-1] for name in CURVES]
            over = epoch_done(values, lambda: training.parameters(0))
        model = self._model(trial, training.parameters(0))
        return model, list(model.net.parameters())

    def _model(self, trial: Trial, weights: Iterable[Tensor]) -> Classifier:
        """A small network as a module, with these weights."""
        model = cast(Classifier, self.search.build(trial.params))
        _copy(weights, model.net.parameters())
        return model

    def _save(self, trial: Trial, id: str, model: LightningModule, epochs: int) -> None:
        content = checkpoint(self.search, self.data, trial, id, model, epochs)
        write_torch(self.results.checkpoints / f"{id}.ckpt", content)


def adopt(
    search: Search, results: Results, leases: Leases, unit: WorkUnit, records: Mapping[str, Any]
) -> None:
    """Writes the trials of a unit that other machines have finished.

    Invalid ones are removed from the storage, with a message, and trained again.
    """
    trials = dict(itertools.zip_longest(unit.ids, unit.trials))
    for id, record in records.items():
        if wrong := fault(record, id) or _mismatch(search, unit, trials[id], record):
            what = f"the storage holds an invalid trial {id} ({wrong}): it is trained again"
            print(printable(what), flush=True)
            leases.forget([id])
        else:
            results.adopt(unsealed(record))


def _mismatch(search: Search, unit: WorkUnit, trial: Trial | None, record: Record) -> str | None:
    """Why a record cannot belong to this search; ``None`` if it can."""
    params = params_of(record)
    if trial:
        number, round, expected = trial.number, trial.round, dict(trial.params)
    else:  # drawn by a sampler
        search = search.at(unit.generation)
        fixed = {**search.fixed, "seed": search.seeds[0]}
        number, round, expected = unit.number, 0, {**params, **fixed}
        for name, axis in search.space.items():
            if not space.holds(axis, [params.get(name)]):
                return f"{name} is {params.get(name)!r}"
    if params != json.loads(json.dumps(expected)):
        return f"its parameters are {params}"
    if (record["number"], record["round"]) != (number, round):
        return f"it is number {record['number']} of round {record['round']}"
    if record["state"] == "COMPLETE" and record["epochs"] != params["max_epochs"]:
        return f"it has {record['epochs']} of {params['max_epochs']} epochs"
    return None


def _raise_lack(name: str, error: Exception) -> None:
    """Raises ``Lack`` if the cause of an error is the machine, not the trial."""
    missing = isinstance(error, MemoryError | OSError | torch.OutOfMemoryError | ImportError)
    if missing or (isinstance(error, RuntimeError) and any(w in str(error) for w in LACKS)):
        reason = (str(error).strip().splitlines() or ["no memory"])[0]
        raise Lack(
            f"{name} was not trained: {type(error).__name__}: {reason}. Try fewer --workers, or a"
            " larger machine"
        ) from error


@torch.no_grad()
def _copy(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    for old, new in zip(target, source, strict=True):
        old.copy_(new)
