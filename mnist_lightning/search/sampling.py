"""Optuna's part in a search: samplers draw trials one by one, pruners end those that lag behind.

Every search has an Optuna study with its trials, for dashboards and for samplers. Samplers learn
from it; the truth is the trials' own files.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna

from mnist_lightning.console import suggest
from mnist_lightning.search import space
from mnist_lightning.search.leases import LeaseLost
from mnist_lightning.search.plan import Search, WorkUnit, digest, generation
from mnist_lightning.search.results import Record, Results
from mnist_lightning.search.space import Trial


@dataclass(frozen=True)
class Draw:
    """A trial that a sampler has drawn, and the Optuna study that waits for its result."""

    trial: Trial
    objective: str
    study: optuna.Study
    in_study: optuna.Trial

    def prune(self, epoch: int, val_acc: float) -> bool:
        """Reports an epoch; answers whether the pruner ends the trial.

        Raises:
            LeaseLost: another worker has ended the trial.
        """
        try:
            self.in_study.report(val_acc, epoch)
        except optuna.exceptions.UpdateFinishedTrialError as error:
            raise LeaseLost from error
        return self.in_study.should_prune()

    def tell(self, record: Record) -> None:
        """Tells the study how the trial ended."""
        result = _result(record, self.objective)
        self.study.tell(self.in_study, **result, skip_if_finished=True)


class Sampling:
    """Draws the parameters of a search's trials.

    Args:
        search: what is searched.
        key: its name in the storage, which no other search has.
        results: its folder.
        storage: see ``leases.open_storage``.
    """

    def __init__(
        self, search: Search, key: str, results: Results, storage: optuna.storages.BaseStorage
    ) -> None:
        self.search, self.key, self.results, self.storage = search, key, results, storage
        self._studies: dict[int, optuna.Study] = {}  # by generation

    def draw(self, unit: WorkUnit, had_before: bool) -> Draw:
        """Draws the trial of a unit.

        Args:
            unit: of one trial.
            had_before: whether another worker may have drawn it: then the parameters are the same.
        """
        search, study = self.search.at(unit.generation), self._study(unit.generation)
        if told_elsewhere := [r for name, r in self._earlier(unit) if name != study.study_name]:
            fill_index(search, self.storage, self.key, told_elsewhere)
        sampler, study.pruner = sampler_and_pruner(search, unit.number)
        study.sampler = sampler
        for old in study.get_trials(deepcopy=False) if had_before else []:
            if old.user_attrs.get("number") != unit.number:
                continue
            if old.state == optuna.trial.TrialState.RUNNING:  # its worker died, or is taken for it
                study.tell(old.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
            if old.params.keys() == search.space.keys():
                study.sampler = optuna.samplers.PartialFixedSampler(old.params, sampler)
        in_study = study.ask({name: space.distribution(a) for name, a in search.space.items()})
        in_study.set_user_attr("number", unit.number)
        params = {**search.fixed, **in_study.params, "seed": search.seeds[0]}
        for name, axis in search.space.items():
            if not isinstance(axis, Mapping):
                drawn = in_study.params[name]
                params[name] = next(v for v in axis if space.as_category(v) == drawn)
        return Draw(Trial(params, unit.number), search.objective, study, in_study)

    def _study(self, generation: int) -> optuna.Study:
        if generation not in self._studies:
            search = self.search.at(generation)
            self._studies[generation] = optuna_study(search, self.storage, self.key)
        return self._studies[generation]

    def _earlier(self, unit: WorkUnit) -> list[tuple[str, Record]]:
        """Finished trials of earlier definitions, each with the name of the study it is in."""
        earlier = []
        for record in self.results.in_order() if unit.generation else ():
            of = generation(self.search, record["number"])
            if of < unit.generation:
                earlier.append((study_name(self.search.at(of), self.key), record))
        return earlier


def sampler_and_pruner(
    search: Search, number: int = 0
) -> tuple[optuna.samplers.BaseSampler, optuna.pruners.BasePruner]:
    """What draws a trial's parameters, and what ends it early.

    Args:
        search: the search.
        number: of the trial. A sampler has no state but its random numbers, which differ from
            trial to trial, so that two workers never draw the same.

    Raises:
        ValueError: there is no such sampler or pruner.
    """
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


def optuna_study(search: Search, storage: optuna.storages.BaseStorage, key: str) -> optuna.Study:
    """The search as an Optuna study.

    Args:
        search: the search.
        storage: of the study.
        key: the search's name in the storage.
    """
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
    """The name of the search's study: where axes grow, a new one, since Optuna's cannot grow."""
    axes: Any = search.space
    grown = axes != search.at(0).space
    if not search.sampled:  # the values of the axes follow from the trials
        grown, axes = bool(search.grown_from), search.grown_from
    return f"{key}-{digest(axes)}" if grown else key


def fill_index(
    search: Search, storage: optuna.storages.BaseStorage, key: str, records: Sequence[Record]
) -> None:
    """Adds those finished trials to the search's study that it does not have."""
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
                **_result(record, search.objective),
            )
            study.add_trial(trial)


def _reported(record: Record) -> dict[int, float]:
    """The validation accuracies that a pruner was told, by epoch."""
    accuracies = enumerate(record["curves"]["val_acc"], 1)
    return {epoch: value for epoch, value in accuracies if value is not None}


def _result(record: Record, objective: str) -> dict[str, Any]:
    """State and values of a finished trial, as Optuna takes them."""
    complete = record["state"] == "COMPLETE"
    return {
        "state": optuna.trial.TrialState[record["state"]],
        "values": [record[objective]] if complete else None,
    }
