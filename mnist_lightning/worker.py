"""A worker of a search: takes units, trains them, writes what came out.

A unit's trials are written when they are done, and in between, every few seconds, the state of its
training: there it is taken up again.
"""

import inspect
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mnist_lightning import space
from mnist_lightning.claims import Claims
from mnist_lightning.data import ImageSet
from mnist_lightning.execution import kept_memory
from mnist_lightning.files import write_torch
from mnist_lightning.models import Classifier
from mnist_lightning.names import hint
from mnist_lightning.plan import SMALL, STRATEGIES, Search, Unit, member, networks, open_units
from mnist_lightning.population import PopulationTraining
from mnist_lightning.results import CURVES, Record, Results, new_record
from mnist_lightning.space import Trial

if TYPE_CHECKING:
    import optuna

SNAPSHOT_SECONDS = 5.0

Report = Callable[[str, float], None]


class Worker:
    """Trains units, one after the other.

    Args:
        search: what is searched.
        key: a name for it that no other search has.
        results: its folder.
        storage: where workers meet; see ``claims.open_storage``.
        device: on which populations are trained.
        threads: for a training of its own.
        report: is told a unit's name and the part of it that is done.
    """

    def __init__(
        self,
        search: Search,
        key: str,
        results: Results,
        storage: "optuna.storages.BaseStorage",
        device: str,
        threads: int,
        report: Report,
    ) -> None:
        self.search, self.key, self.results, self.storage = search, key, results, storage
        self.device, self.threads, self.report = device, threads, report
        self.data = search.load_data()

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
        claims = Claims(self.storage, self.key)
        images = len(self.data.train_set)
        while left := open_units(self.search, self.results.records(), images):
            moved = False
            for unit in left:
                if all(self.results.record(id) for id in unit.ids):
                    continue  # by another worker, since
                claim = claims.take(unit.name, unit.ids)
                if claim is None:
                    continue
                moved = True
                if isinstance(claim, list):  # on another machine
                    for record in claim:
                        self.results.add(record)
                    continue
                with claims.alive(claim):
                    self.train(unit)
                records = [self.results.record(id) for id in unit.ids]
                claims.finish(claim, [record for record in records if record])
            if not moved:
                time.sleep(0.5)

    def train(self, unit: Unit) -> None:
        """Trains a unit's trials and writes what came out."""
        small = unit.together or self.search.model_class in SMALL
        # The bits of a sum depend on how many threads share it. Small networks gain nothing from
        # more than one anyway.
        torch.set_num_threads(1 if small else self.threads)
        if unit.together:
            with kept_memory():
                self._train_together(unit)
        elif unit.trials:
            self._train_alone(unit.trials[0], unit.ids[0], lambda epoch, val_acc: False)
        else:
            self._train_drawn(unit)

    @cached_property
    def _train_set(self) -> tuple[Tensor, Tensor]:
        return self._as_rows(self.data.train_set)

    @cached_property
    def _val_set(self) -> tuple[Tensor, Tensor]:
        return self._as_rows(self.data.val_set)

    def _as_rows(self, part: ImageSet) -> tuple[Tensor, Tensor]:
        """Images and labels as ``population`` wants them."""
        rows = self.data.preprocess(part.images).flatten(1)
        return rows.to(self.device), part.labels.to(self.device)

    def _train_together(self, unit: Unit) -> None:
        together = networks(self.search, unit.trials)
        params = unit.trials[0].params
        training = PopulationTraining(
            [member(key, trials) for key, trials in together.items()],
            train=self._train_set,
            val=self._val_set,
            batch_size=self.search.batch_size(params),
            seed=params["seed"],
        )
        file = self.results.state / f"{unit.name}.pt"
        spent = 0.0
        if file.is_file():
            state = torch.load(file, weights_only=True)
            missing = [t for t in unit.trials if not self.results.record(t.id)]
            # unless a trial that was written before has been deleted since
            if all(t.params["max_epochs"] > state["training"]["epoch"] for t in missing):
                training.load_state_dict(state["training"])
                spent = state["seconds"]
        epochs = max(m.max_epochs for m in training.members)
        started = saved = time.monotonic()
        while True:
            seconds = spent + time.monotonic() - started
            for number, trials in enumerate(together.values()):
                for trial in trials:
                    self._keep(training, number, trial, seconds / len(together))
            if training.done:
                break
            if time.monotonic() - saved > SNAPSHOT_SECONDS:
                state = {"training": training.state_dict(), "seconds": seconds}
                write_torch(file, state)
                saved = time.monotonic()
            self.report(unit.name, training.epoch / epochs)
            training.run_epoch()
        file.unlink(missing_ok=True)

    def _keep(
        self, training: PopulationTraining, number: int, trial: Trial, seconds: float
    ) -> None:
        """Writes a trial at the end of its last epoch, or of the one in which it failed."""
        epochs, failed = trial.params["max_epochs"], training.failed[number]
        if not (training.epoch == epochs or (failed and training.epoch < epochs)):
            return
        if self.results.record(trial.id):
            return  # finished before the state that this training went on from
        curves = {name: curve[number] for name, curve in training.curves.items()}
        if failed:
            record = new_record(trial, trial.id, curves, seconds, "FAIL", failed)
        else:
            record = new_record(trial, trial.id, curves, seconds)
            best = self.search.objective == "best_val_acc"
            model = self.search.build(trial.params)
            weights = training.best_parameters(number) if best else training.parameters(number)
            _copy(weights, model.net.parameters())
            self._save(trial, trial.id, model, record["best_epoch"] if best else epochs)
        self.results.add(record)

    def _train_drawn(self, unit: Unit) -> None:
        import optuna

        study = optuna_study(self.search, self.storage, self.key, unit.number)
        for old in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if old.user_attrs.get("number") == unit.number:  # its worker died
                study.tell(old.number, state=optuna.trial.TrialState.FAIL)
        axes = self.search.space
        drawn = study.ask({name: _distribution(axis) for name, axis in axes.items()})
        drawn.set_user_attr("number", unit.number)
        params = {**self.search.fixed, **drawn.params, "seed": self.search.seeds[0]}
        for name, axis in axes.items():
            if not isinstance(axis, Mapping):
                params[name] = next(v for v in axis if _word(v) == drawn.params[name])

        def prune(epoch: int, val_acc: float) -> bool:
            drawn.report(val_acc, epoch)
            return drawn.should_prune()

        record = self._train_alone(Trial(params, unit.number), unit.ids[0], prune)
        study.tell(drawn, **_outcome(record, self.search.objective))

    def _train_alone(self, trial: Trial, id: str, prune: Callable[[int, float], bool]) -> Record:
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
            self.report(id, len(accuracies) / trial.params["max_epochs"])
            if prune(len(accuracies), values[2]):
                state = "PRUNED"
            return state == "PRUNED"

        try:
            small = self.search.hidden_units(trial.params) is not None
            model, weights = (self._fit_small if small else self._fit)(trial, epoch_done)
        except Exception as reason:  # a trial that fails is a result too
            state, error = "FAIL", f"{type(reason).__name__}: {reason}"
        record = new_record(trial, id, curves, time.monotonic() - started, state, error)
        if state != "FAIL":
            if best:
                _copy(best, weights)
            self._save(trial, id, model, record["best_epoch" if best else "epochs"])
        self.results.add(record)
        return record

    def _fit_small(
        self, trial: Trial, epoch_done: Callable[..., bool]
    ) -> tuple[Classifier, list[Tensor]]:
        """A population of one: the model, and those of its tensors that training changes."""
        training = PopulationTraining(
            [member(*next(iter(networks(self.search, [trial]).items())))],
            train=self._train_set,
            val=self._val_set,
            batch_size=self.search.batch_size(trial.params),
            seed=trial.params["seed"],
        )
        over = False
        while not over and training.epoch < trial.params["max_epochs"]:
            training.run_epoch()
            values = [training.curves[name][0][-1] for name in CURVES]
            over = epoch_done(values, lambda: training.parameters(0))
        model = self.search.build(trial.params)
        _copy(training.parameters(0), model.net.parameters())
        return model, list(model.net.parameters())

    def _fit(
        self, trial: Trial, epoch_done: Callable[..., bool]
    ) -> tuple[Classifier, list[Tensor]]:
        """Through the Trainer: the model, and those of its tensors that training changes."""
        from lightning.pytorch import Trainer, seed_everything
        from lightning.pytorch.callbacks import Checkpoint

        class Epochs(Checkpoint):  # callbacks of this kind are called when all figures are in
            def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
                names = ("train/loss", "val/loss", "val/acc")
                values = [float(trainer.callback_metrics[name]) for name in names]
                if epoch_done(values, lambda: list(module.state_dict().values())):
                    trainer.should_stop = True

        # a search says what is worth saying itself
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
        for advice in (".*does not have many workers.*", ".*LeafSpec.*"):
            warnings.filterwarnings("ignore", advice)
        seed_everything(trial.params["seed"], verbose=False)
        model, data = self.search.build(trial.params), self.search.data_module(trial.params)
        settings = {
            "max_epochs": trial.params["max_epochs"],
            "callbacks": [Epochs()],
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        }
        Trainer(**{**settings, **self.search.trainer}).fit(model, data)
        return model.cpu(), list(model.state_dict().values())

    def _save(self, trial: Trial, id: str, model: Classifier, epochs: int) -> None:
        """What the Trainer would save, as far as it concerns the weights."""
        from lightning import __version__

        data = self.search.data_module(trial.params)
        steps = epochs * math.ceil(len(self.data.train_set) / data.batch_size)
        checkpoint = {
            "epoch": epochs - 1,  # Lightning counts from 0
            "global_step": steps,
            "pytorch-lightning_version": __version__,
            "state_dict": model.state_dict(),
            "hparams_name": "kwargs",
            "hyper_parameters": dict(model.hparams),
            "datamodule_hparams_name": "kwargs",
            # what source "auto" came to
            "datamodule_hyper_parameters": {**data.hparams, "source": self.data.source},
            "search": {"name": self.search.name, "trial": id},
        }
        model.on_save_checkpoint(checkpoint)
        file = self.results.checkpoints / f"{id}.ckpt"
        write_torch(file, checkpoint)


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

    options = {**STRATEGIES["optuna"], **(search.strategy if search.sampled else {})}
    made = []
    for kind, home in (("sampler", optuna.samplers), ("pruner", optuna.pruners)):
        if options[kind] not in home.__all__:
            known = [name for name in home.__all__ if name.lower().endswith(kind)]
            raise ValueError(f"Optuna has no {kind} {options[kind]}; {hint(options[kind], known)}")
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
    search: Search, storage: "optuna.storages.BaseStorage", key: str, number: int = 0
) -> "optuna.Study":
    """The search as an Optuna study: what samplers learn from, and dashboards show.

    Args:
        search: the search.
        storage: of the study.
        key: its name.
        number: of the trial to draw.
    """
    import optuna

    sampler, pruner = sampler_and_pruner(search, number)
    return optuna.create_study(
        storage=storage,
        study_name=key,
        sampler=sampler,
        pruner=pruner,
        direction="maximize",
        load_if_exists=True,
    )


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
                params={name: _word(record["params"][name]) for name in axes},
                distributions={name: _distribution(axis) for name, axis in axes.items()},
                user_attrs={"number": record["number"]},
                **_outcome(record, search.objective),
            )
            study.add_trial(trial)


def _distribution(axis: space.Axis) -> "optuna.distributions.BaseDistribution":
    from optuna import distributions

    if not isinstance(axis, Mapping):
        return distributions.CategoricalDistribution([_word(value) for value in axis])
    low, high, log = axis["low"], axis["high"], axis.get("log", False)
    if isinstance(low, int) and isinstance(high, int):
        return distributions.IntDistribution(low, high, log)
    return distributions.FloatDistribution(low, high, log)


def _word(value: Any) -> Any:
    """Optuna's categories are words and numbers; a list is written out as one."""
    return json.dumps(value) if isinstance(value, list) else value


def _outcome(record: Record, objective: str) -> dict[str, Any]:
    """State and values of a trial, as Optuna takes them."""
    import optuna

    complete = record["state"] == "COMPLETE"
    return {
        "state": optuna.trial.TrialState[record["state"]],
        "values": [record[objective]] if complete else None,
    }
