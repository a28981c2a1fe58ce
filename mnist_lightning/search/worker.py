"""A worker of a search: takes units, trains them, writes what came out.

A unit's trials are written when they are done, and in between, every few seconds, the state of its
training: there it is taken up again.
"""

import inspect
import itertools
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import optuna
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from mnist_lightning.classes import class_path
from mnist_lightning.console import suggest
from mnist_lightning.data.sampling import ImageSet
from mnist_lightning.files import printable, read_torch, set_aside, write_torch
from mnist_lightning.models import own
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.search import space
from mnist_lightning.search.leases import Lease, LeaseLost, Leases, StorageLost
from mnist_lightning.search.plan import (
    SMALL,
    Search,
    WorkUnit,
    digest,
    generation,
    networks,
    open_units,
)
from mnist_lightning.search.results import (
    CURVES,
    Record,
    Results,
    fault,
    new_record,
    params_of,
    sealed,
    unsealed,
)
from mnist_lightning.search.space import Trial
from mnist_lightning.training import memory
from mnist_lightning.training.execution import kept_memory
from mnist_lightning.training.population import PopulationTraining

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer


SNAPSHOT_SECONDS = 5.0
# A unit that has killed so many workers, one after the other, without getting any further, fails.
ATTEMPTS = 3
# in what PyTorch says where memory or a device is missing, for which it has no exception
LACKS = (
    "can't allocate memory",
    "out of memory",
    "DataLoader worker",
    "CUDA",
    "NVIDIA",
    "No space left",
)


class Lack(ValueError):
    """A training cannot be done here and now: what is missing says nothing about the trial."""


ProgressCallback = Callable[[str, float], None]


class Worker:
    """Trains units, one after the other.

    Args:
        search: what is searched.
        key: a name for it that no other search has.
        results: its folder.
        storage: where workers meet; see ``leases.open_storage``.
        device: on which populations are trained.
        threads: for a training of its own.
        on_progress: is told a unit's name and the part of it that is done.
    """

    def __init__(
        self,
        search: Search,
        key: str,
        results: Results,
        storage: "optuna.storages.BaseStorage",
        device: str,
        threads: int,
        on_progress: ProgressCallback,
    ) -> None:
        self.search, self.key, self.results, self.storage = search, key, results, storage
        self.device, self.threads, self.on_progress = device, threads, on_progress
        self.data = search.load_data()
        self._studies: dict[int, optuna.Study] = {}  # by generation
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
                    continue  # by another worker, since
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
                    continue  # what its new owner finds is adopted when it is there
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
        """Trains a unit's trials and writes what came out.

        Raises:
            LeaseLost: the unit was given to another worker.
            Lack: there is no memory or no device for it.
            ValueError: a file cannot be written, or the storage does not answer.
        """
        small = unit.together or self.search.model_class in SMALL
        # The bits of a sum depend on how many threads share it. Small networks gain nothing from
        # more than one anyway.
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
        """Notes that the trials of a unit failed: they ended every worker that trained them."""
        reason = f"its worker died {len(lease.deaths)} times; the last one: {lease.deaths[-1]}"
        trials = unit.trials or [self._draw(unit, lease)[0]]
        curves: dict[str, list[float]] = {name: [] for name in CURVES}
        for trial, id in zip(trials, unit.ids, strict=True):
            if not self.results.record(id):
                self._write(lease, new_record(trial, id, curves, 0.0, "FAIL", reason))

    def _write(self, lease: Lease, record: Record, save: Callable[[], None] | None = None) -> None:
        """Writes a finished trial, its weights first, and shows it to the others.

        Raises:
            LeaseLost: they have another one's; nothing was written.
            StorageLost: they cannot be told now; all was written.
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
        """Images and labels as ``population`` wants them, as this trial sees them."""
        settings = self.search.data_settings(trial.params)
        if settings not in [prepared for prepared, _ in self._prepared]:
            data = self.search.data_module(trial.params, self.data)

            def rows(part: ImageSet) -> tuple[Tensor, Tensor]:
                pixels = data.preprocess(part.images).flatten(1)
                return pixels.to(self.device), part.labels.to(self.device)

            sets = {"train": rows(self.data.train_set), "val": rows(self.data.val_set)}
            self._prepared = [(settings, sets)]  # the last one alone: they are large
        return self._prepared[0][1]

    def _train_together(self, unit: WorkUnit, lease: Lease) -> None:
        training, spent = self._training(unit, lease)
        file = self.results.state / f"{unit.name}.pt"
        # once it has killed a worker, each epoch counts
        snapshot_seconds = 0.0 if lease.deaths else SNAPSHOT_SECONDS
        epochs = max(m.max_epochs for m in training.members)
        started = saved = time.monotonic()
        while True:
            seconds = spent + time.monotonic() - started
            for number, trials in enumerate(unit.networks.values()):
                for trial in trials:
                    self._record_if_done(
                        training, number, trial, seconds / len(unit.networks), lease
                    )
            if training.done:
                break
            if time.monotonic() - saved > snapshot_seconds:
                lease.check_quickly()  # the state may be another's by now
                state = {"training": training.state_dict(), "seconds": seconds}
                write_torch(file, state)
                saved = time.monotonic()
            self.on_progress(unit.name, training.epoch / epochs)
            lease.check_quickly()
            training.run_epoch()
        file.unlink(missing_ok=True)

    def _training(self, unit: WorkUnit, lease: Lease) -> tuple[PopulationTraining, float]:
        """A unit's training, as its last worker left it, and the seconds spent on it."""
        file = self.results.state / f"{unit.name}.pt"
        training = self._new_training(unit)
        if not file.is_file():
            return training, 0.0
        try:
            state = read_torch(file)
            missing = [t for t in unit.trials if not self.results.record(t.id)]
            if any(t.params["max_epochs"] <= state["training"]["epoch"] for t in missing):
                return training, 0.0  # a trial that was written before has been deleted since
            training.load_state_dict(state["training"])
            lease.goes_on(training.epoch / max(m.max_epochs for m in training.members))
            return training, float(state["seconds"])
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            aside = set_aside(file)
            what = f"{error}: set aside as {aside.name}, trained from the start"
            print(printable(what), flush=True)
            return self._new_training(unit), 0.0

    def _new_training(self, unit: WorkUnit) -> PopulationTraining:
        params = unit.trials[0].params
        return PopulationTraining(
            list(unit.networks),
            **self._as_rows(unit.trials[0]),
            batch_size=self.search.batch_size(params),
            seed=params["seed"],
        )

    def _record_if_done(
        self,
        training: PopulationTraining,
        number: int,
        trial: Trial,
        seconds: float,
        lease: Lease,
    ) -> None:
        """Writes a trial at the end of its last epoch, or of the one in which it failed."""
        epochs, failed = trial.params["max_epochs"], training.failed[number]
        if not (training.epoch == epochs or (failed and training.epoch < epochs)):
            return
        if self.results.record(trial.id):
            return  # finished before the state that this training went on from
        curves = {name: curve[number] for name, curve in training.curves.items()}
        if failed:
            self._write(lease, new_record(trial, trial.id, curves, seconds, "FAIL", failed))
            return
        record = new_record(trial, trial.id, curves, seconds)
        best = self.search.objective == "best_val_acc"
        model = cast(Classifier, self.search.build(trial.params))
        weights = training.best_parameters(number) if best else training.parameters(number)
        _copy(weights, model.net.parameters())
        epoch = record["best_epoch"] if best else epochs
        self._write(lease, record, lambda: self._save(trial, trial.id, model, epoch))

    def _study(self, generation: int) -> "optuna.Study":
        if generation not in self._studies:
            search = self.search.at(generation)
            self._studies[generation] = optuna_study(search, self.storage, self.key)
        return self._studies[generation]

    def _draw(self, unit: WorkUnit, lease: Lease) -> "tuple[Trial, optuna.Study, optuna.Trial]":
        """What a sampler draws for a unit; for a unit that was drawn before, the same again."""
        import optuna

        search, study = self.search.at(unit.generation), self._study(unit.generation)
        if told_elsewhere := [r for r in self._of_earlier(unit) if r[0] != study.study_name]:
            records = [record for _, record in told_elsewhere]
            fill_index(search, self.storage, self.key, records)
        axes = search.space
        sampler, study.pruner = sampler_and_pruner(search, unit.number)
        study.sampler = sampler
        for old in study.get_trials(deepcopy=False) if lease.had_before else []:
            if old.user_attrs.get("number") != unit.number:
                continue
            if old.state == optuna.trial.TrialState.RUNNING:  # its worker died, or we thought so
                study.tell(old.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
            if old.params.keys() == axes.keys():
                study.sampler = optuna.samplers.PartialFixedSampler(old.params, sampler)
        drawn = study.ask({name: space.distribution(axis) for name, axis in axes.items()})
        drawn.set_user_attr("number", unit.number)
        params = {**search.fixed, **drawn.params, "seed": search.seeds[0]}
        for name, axis in axes.items():
            if not isinstance(axis, Mapping):
                params[name] = next(v for v in axis if space.as_category(v) == drawn.params[name])

        return Trial(params, unit.number), study, drawn

    def _of_earlier(self, unit: WorkUnit) -> "list[tuple[str, Record]]":
        """Finished trials of earlier definitions, and the study that each was told to."""
        told = []
        for record in self.results.in_order() if unit.generation else ():
            at = generation(self.search, record["number"])
            if at < unit.generation:
                told.append((study_name(self.search.at(at), self.key), record))
        return told

    def _train_drawn(self, unit: WorkUnit, lease: Lease) -> None:
        import optuna

        trial, study, drawn = self._draw(unit, lease)

        def prune(epoch: int, val_acc: float) -> bool:
            try:
                drawn.report(val_acc, epoch)
            except optuna.exceptions.UpdateFinishedTrialError as error:
                raise LeaseLost from error  # another worker has ended the trial
            return drawn.should_prune()

        record = self._train_alone(trial, unit.ids[0], lease, prune)
        study.tell(drawn, **_outcome(record, self.search.objective), skip_if_finished=True)

    def _train_alone(
        self, trial: Trial, id: str, lease: Lease, prune: Callable[[int, float], bool]
    ) -> Record:
        started = time.monotonic()
        curves: dict[str, list[float]] = {name: [] for name in CURVES}
        best: list[Tensor] = []
        state, error = "COMPLETE", None

        def epoch_done(values: Sequence[float], weights: Callable[[], list[Tensor]]) -> bool:
            """Notes an epoch; answers whether it was the last."""
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
            model, weights = (self._fit_small if small else self._fit)(trial, epoch_done)
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
        self, trial: Trial, epoch_done: Callable[..., bool]
    ) -> tuple[LightningModule, list[Tensor]]:
        """A population of one: the model, and those of its tensors that training changes."""
        training = PopulationTraining(
            list(networks(self.search, [trial])),
            **self._as_rows(trial),
            batch_size=self.search.batch_size(trial.params),
            seed=trial.params["seed"],
        )
        over = False
        while not over and training.epoch < trial.params["max_epochs"]:
            training.run_epoch()
            values = [training.curves[name][0][-1] for name in CURVES]
            over = epoch_done(values, lambda: training.parameters(0))
        model = cast(Classifier, self.search.build(trial.params))
        _copy(training.parameters(0), model.net.parameters())
        return model, list(model.net.parameters())

    def _fit(
        self, trial: Trial, epoch_done: Callable[..., bool]
    ) -> tuple[LightningModule, list[Tensor]]:
        """Through the Trainer: the model, and those of its tensors that training changes."""
        from lightning.pytorch import Trainer, seed_everything
        from lightning.pytorch.callbacks import Checkpoint

        seed_everything(trial.params["seed"], verbose=False)
        model = self.search.build(trial.params)
        data = self.search.data_module(trial.params, self.data)
        names, train_loss = ["val/loss", "val/acc"], None
        if not own.logs_as_ours(model):
            names, train_loss = own.compared(model, data), own.TrainLoss()

        class Epochs(Checkpoint):  # callbacks of this kind are called when all figures are in
            def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
                logged = trainer.callback_metrics
                loss = train_loss.mean() if train_loss else float(logged["train/loss"])
                values = [loss, *(float(logged[name]) for name in names)]
                if epoch_done(values, lambda: list(module.state_dict().values())):
                    trainer.should_stop = True

        watching = [Epochs(), *([train_loss] if train_loss else [])]
        trainer = make_trainer(self.search, trial.params["max_epochs"], *watching)
        trainer.fit(model, data)
        return model.cpu(), list(model.state_dict().values())

    def _save(self, trial: Trial, id: str, model: LightningModule, epochs: int) -> None:
        """What the Trainer would save, as far as it concerns the weights."""
        from lightning import __version__

        data = self.search.data_module(trial.params, self.data)
        steps = epochs * math.ceil(len(self.data.train_set) / data.batch_size)
        checkpoint = {
            "epoch": epochs - 1,  # Lightning counts from 0
            "global_step": steps,
            "pytorch-lightning_version": __version__,
            "state_dict": model.state_dict(),
            "hparams_name": "kwargs",
            "model_class": class_path(type(model)),
            "hyper_parameters": {**model.hparams, **self.search.model_args(trial.params)},
            "datamodule_hparams_name": "kwargs",
            "datamodule_hyper_parameters": dict(data.hparams),
            "search": {"name": self.search.name, "trial": id},
        }
        model.on_save_checkpoint(checkpoint)
        file = self.results.checkpoints / f"{id}.ckpt"
        write_torch(file, checkpoint)


def adopt(
    search: Search, results: Results, leases: Leases, unit: WorkUnit, records: Mapping[str, Any]
) -> None:
    """Writes the trials of a unit that other machines finished, but for those that cannot be true.

    These are taken out of the storage, and said, so that they are trained again.
    """
    trials = dict(itertools.zip_longest(unit.ids, unit.trials))
    for id, record in records.items():
        if wrong := fault(record, id) or _foreign(search, unit, trials[id], record):
            print(printable(f"the storage has a false trial {id} ({wrong}): set aside"), flush=True)
            leases.forget([id])
        else:
            results.adopt(unsealed(record))


def _foreign(search: Search, unit: WorkUnit, trial: Trial | None, record: Record) -> str | None:
    """Why a record cannot be of this search; ``None`` if it can."""
    params = params_of(record)
    if trial:
        number, round, expected = trial.number, trial.round, dict(trial.params)
    else:  # a sampler drew it
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


def make_trainer(search: Search, max_epochs: int, *callbacks: "Callback") -> "Trainer":
    """The Trainer of one trial.

    Raises:
        Lack: it does not take the search's options, or not on this machine.
    """
    from lightning.pytorch import Trainer

    # a search says what is worth saying itself
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for advice in (".*does not have many workers.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", advice)
    known = list(inspect.signature(Trainer.__init__).parameters)[1:]
    if wrong := space.unknown(search.trainer, known):
        raise Lack(f"the Trainer has no option {wrong[0]}; {suggest(wrong[0], known)}")
    settings = {
        "max_epochs": max_epochs,
        "callbacks": list(callbacks),
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    try:
        trainer = Trainer(**{**settings, **search.trainer})
        memory.check_processes(trainer.num_devices)
        return trainer
    except Exception as error:
        reason = " ".join(str(error).split())
        raise Lack(f"the Trainer refuses {dict(search.trainer)}: {reason}") from error


def _raise_lack(name: str, error: Exception) -> None:
    """Raises ``Lack`` if an error tells of the machine, and not of the trial."""
    missing = isinstance(error, MemoryError | OSError | torch.OutOfMemoryError | ImportError)
    if missing or (isinstance(error, RuntimeError) and any(w in str(error) for w in LACKS)):
        reason = (str(error).strip().splitlines() or ["no memory"])[0]
        raise Lack(
            f"{name} was not trained: {type(error).__name__}: {reason}. Make room for it (fewer"
            " --workers, a larger machine)"
        ) from error


@torch.no_grad()
def _copy(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    for old, new in zip(target, source, strict=True):
        old.copy_(new)


def sampler_and_pruner(
    search: Search, number: int = 0
) -> "tuple[optuna.samplers.BaseSampler, optuna.pruners.BasePruner]":
    """What draws a trial's parameters, and what gives it up.

    Args:
        search: the search.
        number: of the trial. A sampler has no state but its randomness: each trial gets another,
            lest two workers draw the same.

    Raises:
        ValueError: there is no such sampler or pruner.
    """
    import optuna

    options = space.options(search.strategy if search.sampled else {"name": "optuna"})
    made = []
    for kind, home in (("sampler", optuna.samplers), ("pruner", optuna.pruners)):
        if options[kind] not in home.__all__:
            known = [name for name in home.__all__ if name.lower().endswith(kind)]
            raise ValueError(
                f"Optuna has no {kind} {options[kind]}; {suggest(options[kind], known)}"
            )
        arguments = dict(options[f"{kind}_args"])
        component = getattr(home, options[kind])
        if "seed" in inspect.signature(component).parameters:
            arguments.setdefault("seed", options["seed"] * 100_003 + number)
        try:
            made.append(component(**arguments))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{options[kind]} refuses {arguments}: {error}") from error
    return made[0], made[1]


def optuna_study(
    search: Search, storage: "optuna.storages.BaseStorage", key: str
) -> "optuna.Study":
    """The search as an Optuna study: what samplers learn from, and dashboards show.

    Args:
        search: the search.
        storage: of the study.
        key: its name.
    """
    import optuna

    sampler, pruner = sampler_and_pruner(search)
    return optuna.create_study(
        storage=storage,
        study_name=study_name(search, key),
        sampler=sampler,
        pruner=pruner,
        direction="maximize",
        load_if_exists=True,
    )


def study_name(search: Search, key: str) -> str:
    """Of the search's study: another one where its axes have grown, for Optuna's cannot."""
    axes: Any = search.space
    grown = axes != search.at(0).space
    if not search.sampled:  # the values of the axes follow from the trials
        grown, axes = bool(search.grown_from), search.grown_from
    return f"{key}-{digest(axes)}" if grown else key


def fill_index(
    search: Search, storage: "optuna.storages.BaseStorage", key: str, records: Sequence[Record]
) -> None:
    """Adds finished trials to the Optuna study, as far as they are missing there."""
    import optuna

    study = optuna_study(search, storage, key)
    known = study.get_trials(deepcopy=False)
    there = {trial.user_attrs.get("number") for trial in known if trial.state.is_finished()}
    axes: dict[str, Any] = dict(search.space)
    if not search.sampled:  # refined axes have grown
        for name in axes:
            values = {json.dumps(r["params"][name]): r["params"][name] for r in records}
            axes[name] = list(values.values())
    for record in records:
        if record["number"] not in there:
            trial = optuna.create_trial(
                params={name: space.as_category(record["params"][name]) for name in axes},
                distributions={name: space.distribution(axis) for name, axis in axes.items()},
                user_attrs={"number": record["number"]},
                intermediate_values=_reported(record) if search.sampled else None,
                **_outcome(record, search.objective),
            )
            study.add_trial(trial)


def _reported(record: Record) -> dict[int, float]:
    """What a pruner has been told of a trial, epoch by epoch."""
    accuracies = enumerate(record["curves"]["val_acc"], 1)
    return {epoch: value for epoch, value in accuracies if value is not None}


def _outcome(record: Record, objective: str) -> dict[str, Any]:
    """State and values of a trial, as Optuna takes them."""
    import optuna

    complete = record["state"] == "COMPLETE"
    return {
        "state": optuna.trial.TrialState[record["state"]],
        "values": [record[objective]] if complete else None,
    }
