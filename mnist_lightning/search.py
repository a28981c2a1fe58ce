"""Run a search: trials in, results out; resumed, spread over workers and machines.

Workers take units of work: networks that share their mini-batches and are trained together, or one
training by itself. Which networks form a unit follows from the search alone, so that results are
the same bits for any number of workers, interrupted or not. A unit's trials are written when they
are done, and in between, every few seconds, the state of its training: there it is taken up again.
"""

import dataclasses
import hashlib
import inspect
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser
from torch import Tensor

from mnist_lightning import models, space
from mnist_lightning.claims import Claims, open_storage
from mnist_lightning.data import MNISTDataModule
from mnist_lightning.models import CLASSES, PIXELS, Classifier, DeepNetwork, ShallowNetwork
from mnist_lightning.population import Member, PopulationTraining, training_bytes
from mnist_lightning.results import CURVES, Record, Results, new_record, replace, score
from mnist_lightning.space import Trial

if TYPE_CHECKING:
    import optuna

ROOT = Path("lightning_logs") / "search"
# Networks trained together take at most this much memory, beside the images. Small enough that the
# networks of one batch size can be shared out, large enough for the study's 16 of each.
UNIT_BYTES = 64 * 2**20
SNAPSHOT_SECONDS = 5.0
SMALL = (ShallowNetwork, DeepNetwork)  # what population trains, with plain SGD

# name: its options, with their defaults; ... must be given
STRATEGIES: dict[str, dict[str, Any]] = {
    "grid": {},
    "random": {"n": ..., "seed": 0},
    "refine": {"rounds": 3},
    "optuna": {
        "n": ...,
        "seed": 0,
        "sampler": "TPESampler",
        "sampler_args": {},
        "pruner": "NopPruner",
        "pruner_args": {},
    },
}
OBJECTIVES = ("val_acc", "best_val_acc")

Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Search:
    """What is searched. Two searches with equal fields, on the same data, have equal results.

    Args:
        name: of the search, and of its folder.
        model: name of a class in ``mnist_lightning.models``, or dotted path of another Classifier.
        space: axes, by parameter: see ``mnist_lightning.space``. A parameter is ``max_epochs``,
            ``batch_size`` or an argument of the model.
        strategy: ``{name: grid | random | refine | optuna}`` and its options.
        fixed: parameters that all trials share.
        seeds: each combination is trained with each of them.
        second_round: ``{best: k, max_epochs: n}``: the best k are trained again for n epochs.
        objective: ``val_acc`` is the validation accuracy after the last epoch, ``best_val_acc``
            that of the best epoch. A trial's checkpoint holds the weights that reached it.
        data: arguments of ``MNISTDataModule``, all but ``batch_size``.
        trainer: arguments of the Trainer, for models that it trains.
    """

    name: str
    model: str
    space: Mapping[str, Any]
    strategy: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "grid"})
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    second_round: Mapping[str, int] | None = None
    objective: str = "val_acc"
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trainer: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @cached_property
    def model_class(self) -> type[Classifier]:
        module, _, name = self.model.rpartition(".")
        try:
            found = getattr(import_module(module) if module else models, name)
        except (ImportError, AttributeError):
            found = None
        if not (isinstance(found, type) and issubclass(found, Classifier)) or found is Classifier:
            known = [
                name
                for name, kind in vars(models).items()
                if isinstance(kind, type)
                and issubclass(kind, Classifier)
                and kind is not Classifier
            ]
            raise ValueError(f"no model {self.model!r}; {_hint(name, known)}")
        return found

    @property
    def sampled(self) -> bool:
        """Whether Optuna draws the parameters, one trial after the other."""
        return self.strategy["name"] == "optuna"

    def check(self) -> None:
        """Refuses what cannot work before anything is trained.

        Raises:
            ValueError: what is wrong, and what would be right.
        """
        options = dict(self.strategy)
        strategy = options.pop("name", None)
        if strategy not in STRATEGIES:
            raise ValueError(f"no strategy {strategy!r}; {_hint(str(strategy), STRATEGIES)}")
        known = STRATEGIES[strategy]
        for option in space.unknown(options, list(known)):
            raise ValueError(f"strategy {strategy} has no option {option}; {_hint(option, known)}")
        for option, default in known.items():
            if default is ... and option not in options:
                raise ValueError(f"strategy {strategy} needs {option}")
            if option in ("n", "rounds") and option in options:
                _check_count(f"strategy.{option}", options[option])
        space.check(self.space, ranges=strategy in ("random", "optuna"))
        both = sorted(self.space.keys() & self.fixed.keys())
        if both:
            raise ValueError(f"{both[0]} is fixed and an axis: it can be one of the two")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, got {list(self.seeds)}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {OBJECTIVES}, got {self.objective!r}")
        if self.second_round is not None:
            if self.sampled or set(self.second_round) != {"best", "max_epochs"}:
                raise ValueError("second_round is {best: k, max_epochs: n}; not after optuna")
            for option, value in self.second_round.items():
                _check_count(f"second_round.{option}", value)
        self._check_parameters()

    def _check_parameters(self) -> None:
        arguments = list(inspect.signature(self.model_class.__init__).parameters)[1:]
        known = ["max_epochs", "batch_size", *arguments]
        axes = {**self.fixed, **self.space}
        for name in axes:
            if name in ("seed", "seeds"):
                raise ValueError(f"{name} is no axis: say seeds: [0, 1, 2] beside the space")
            base, _, layer = name.partition(".")
            if base not in known or (layer and not layer.isdigit()):
                raise ValueError(f"{self.model} has no parameter {name}; {_hint(base, known)}")
        if "max_epochs" not in axes:
            raise ValueError("max_epochs is missing: an axis of the space, or fixed")
        ends = {  # of a range, its two ends stand for all that lies between
            name: [axis["low"], axis["high"]] if isinstance(axis, Mapping) else axis
            for name, axis in self.space.items()
        }
        for name in ("max_epochs", "batch_size"):
            for value in ends.get(name, [self.fixed[name]] if name in self.fixed else []):
                _check_count(name, value)
        if self.model_class in SMALL and self.data.get("image_size", 28) != 28:
            raise ValueError(f"{self.model} sees 28 x 28 pixels: data.image_size must be 28")
        tried = set()
        for combination in space.grid(ends):
            arguments = self.model_args({**self.fixed, **combination})
            key = json.dumps(arguments)
            if key not in tried:
                tried.add(key)
                with torch.device("meta"):  # shapes without memory
                    self._build(arguments)

    def _build(self, arguments: Mapping[str, Any]) -> Classifier:
        try:
            return self.model_class(**arguments)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{self.model} refuses {dict(arguments)}: {error}") from error

    def model_args(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The model's share of a trial's parameters, ``name.1, name.2 ...`` gathered in lists."""
        found: dict[str, Any] = {}
        lists: dict[str, dict[int, Any]] = {}
        for name, value in params.items():
            base, _, layer = name.partition(".")
            if layer:
                lists.setdefault(base, {})[int(layer)] = value
            elif name not in ("max_epochs", "batch_size", "seed"):
                found[name] = value
        for name, entries in lists.items():
            if sorted(entries) != list(range(1, len(entries) + 1)):
                raise ValueError(f"axes {name}.N must count 1, 2, 3 ..., got {sorted(entries)}")
            found[name] = [entries[layer] for layer in sorted(entries)]
        return found

    def build(self, params: Mapping[str, Any]) -> Classifier:
        """A new model of a trial, with the weights of its seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(params["seed"])
            return self._build(self.model_args(params))

    def data_module(self, params: Mapping[str, Any]) -> MNISTDataModule:
        """The data as a trial sees it."""
        return MNISTDataModule(**{**self.data, "batch_size": self.batch_size(params)})

    def batch_size(self, params: Mapping[str, Any]) -> int:
        """A trial's, or the data module's default."""
        default = inspect.signature(MNISTDataModule.__init__).parameters["batch_size"].default
        return params.get("batch_size", default)

    def load_data(self) -> MNISTDataModule:
        """The data, fetched, verified and split."""
        data = self.data_module(self.fixed)
        data.prepare_data()
        data.setup("fit")
        return data

    def identity(self, data: MNISTDataModule) -> dict[str, Any]:
        """All that the results depend on, as JSON types."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("name", "data")
        }
        facts = ("name", "source", "split", "val_fraction", "split_seed", "image_size")
        about = {fact: getattr(data, fact) for fact in (*facts, "normalization", "checksum")}
        return json.loads(json.dumps({**fields, "data": about}))

    def hidden_units(self, params: Mapping[str, Any]) -> tuple[int, ...] | None:
        """Sizes of the hidden layers where ``population`` can train the model, else ``None``."""
        if self.model_class not in SMALL:
            return None
        signature = inspect.signature(self.model_class.__init__)
        bound = signature.bind_partial(None, **self.model_args(params))
        bound.apply_defaults()
        if bound.arguments["optimizer"] != "sgd":
            return None
        units = bound.arguments["hidden_units"]
        return tuple(units) if isinstance(units, list | tuple) else (units,)

    def lr(self, params: Mapping[str, Any]) -> float:
        """The learning rate, the model's default where the search does not say."""
        default = inspect.signature(self.model_class.__init__).parameters["lr"].default
        return float(params.get("lr", default))


def _hint(given: str, known: Any) -> str:
    close = get_close_matches(given, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")


# Units of work


@dataclass(frozen=True)
class Unit:
    """Trials that one worker trains together.

    Args:
        name: unique in the search.
        trials: empty where a sampler will draw the one trial.
        together: whether they are networks of one population.
        work: estimated seconds on one core, for the order of units and the time left.
        number: of the trial that a sampler will draw.
    """

    name: str
    trials: tuple[Trial, ...]
    together: bool
    work: float
    number: int = -1

    @property
    def ids(self) -> list[str]:
        """Of its trials; known before they are drawn."""
        return [trial.id for trial in self.trials] or [f"draw{self.number:04d}"]


def units(search: Search, trials: Sequence[Trial], images: int) -> list[Unit]:
    """What workers take, the longest first; the same whatever is finished, whoever works.

    Args:
        search: the search.
        trials: of one round.
        images: in the training set.
    """
    groups: dict[tuple[int, int, int], list[Trial]] = {}
    found = []
    for trial in trials:
        if search.hidden_units(trial.params) is None:
            # seconds that nobody knows; among each other they compare
            found.append(Unit(trial.id, (trial,), False, float(trial.params["max_epochs"])))
        else:
            key = (trial.round, search.batch_size(trial.params), trial.params["seed"])
            groups.setdefault(key, []).append(trial)
    for (round, batch_size, seed), group in groups.items():
        parts = _split(search, group)
        for number, part in enumerate(parts):
            name = f"round{round}-batch{batch_size}-seed{seed}" + f"-part{number}" * (
                len(parts) > 1
            )
            found.append(Unit(name, tuple(part), True, _cost(search, part, batch_size, images)))
    return sorted(found, key=lambda unit: -unit.work)


def _networks(search: Search, trials: Sequence[Trial]) -> dict[tuple[Any, ...], list[Trial]]:
    """Trials of the same network, of which the longest training passes through the others."""
    found: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        units = search.hidden_units(trial.params)
        assert units is not None
        found.setdefault((len(units), units, search.lr(trial.params)), []).append(trial)
    return dict(sorted(found.items()))


def _member(network: tuple[Any, ...], trials: Sequence[Trial]) -> Member:
    _, units, lr = network
    return Member(units, lr, max(trial.params["max_epochs"] for trial in trials))


def _split(search: Search, trials: Sequence[Trial]) -> list[list[Trial]]:
    """Networks of one batch size and seed in parts of about equal memory, each within the limit."""
    networks = _networks(search, trials)
    sizes = {key: training_bytes(_member(key, group)) for key, group in networks.items()}
    count = math.ceil(sum(sizes.values()) / UNIT_BYTES)
    parts: list[list[Trial]] = []
    filled, total = 0.0, sum(sizes.values()) / count
    for key, group in networks.items():
        # neighbours in this order have like shapes, which stack
        if not parts or filled + sizes[key] / 2 > total:
            parts.append([])
            filled = 0.0
        parts[-1] += group
        filled += sizes[key]
    return parts


def _cost(search: Search, trials: Sequence[Trial], batch_size: int, images: int) -> float:
    members = [_member(key, group) for key, group in _networks(search, trials).items()]
    epochs = max(member.max_epochs for member in members)
    products = sum(
        member.max_epochs * a * b
        for member in members
        for a, b in pairwise([PIXELS, *member.hidden_units, CLASSES])
    )
    # forward, backward and update at 100 GFLOP/s, and what a step takes before it does anything
    return images * (6 * products / 1e11 + epochs * 6e-5 / batch_size)


def rounds(search: Search, records: Mapping[str, Record]) -> list[list[Trial]]:
    """The rounds of the search, up to the first that is not finished."""
    scores = {id: score(record, search.objective) for id, record in records.items()}
    strategy = {**STRATEGIES[search.strategy["name"]], **search.strategy}
    return list(
        space.rounds(
            search.space, strategy, search.seeds, search.fixed, search.second_round, scores
        )
    )


def open_units(search: Search, records: Mapping[str, Record], images: int) -> list[Unit]:
    """Units of the first round that is not finished, without those that are."""
    if search.sampled:
        found = [Unit(f"draw{i:04d}", (), False, 1.0, i) for i in range(search.strategy["n"])]
    else:
        found = units(search, rounds(search, records)[-1], images)
    return [unit for unit in found if any(id not in records for id in unit.ids)]


# Training


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
        torch.set_flush_denormal(True)
        claims = Claims(self.storage, self.key)
        images = len(self.data.train_set)
        while left := open_units(self.search, self.results.records(), images):
            moved = False
            for unit in left:
                if all(self.results.record(id) for id in unit.ids):
                    continue  # by another worker, since
                claim = claims.take(unit.name)
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
            self._train_together(unit)
        elif unit.trials:
            self._train_alone(unit.trials[0], unit.ids[0], lambda epoch, val_acc: False)
        else:
            self._train_drawn(unit)

    @cached_property
    def _images(self) -> list[tuple[Tensor, Tensor]]:
        """Training and validation set as ``population`` wants them."""
        return [
            (
                self.data.preprocess(part.images).flatten(1).to(self.device),
                part.labels.to(self.device),
            )
            for part in (self.data.train_set, self.data.val_set)
        ]

    def _train_together(self, unit: Unit) -> None:
        networks = _networks(self.search, unit.trials)
        params = unit.trials[0].params
        training = PopulationTraining(
            [_member(key, trials) for key, trials in networks.items()],
            *self._images,
            batch_size=self.search.batch_size(params),
            seed=params["seed"],
        )
        file = self.results.state / f"{unit.name}.pt"
        spent = 0.0
        if file.is_file():
            state = torch.load(file, weights_only=True)
            training.load_state_dict(state["training"])
            spent = state["seconds"]
        epochs = max(member.max_epochs for member in training.members)
        started = saved = time.monotonic()
        while True:
            seconds = spent + time.monotonic() - started
            for member, trials in enumerate(networks.values()):
                for trial in trials:
                    self._keep(training, member, trial, seconds / len(networks))
            if training.done:
                break
            if time.monotonic() - saved > SNAPSHOT_SECONDS:
                state = {"training": training.state_dict(), "seconds": seconds}
                replace(file, lambda path, state=state: torch.save(state, path))
                saved = time.monotonic()
            self.report(unit.name, training.epoch / epochs)
            training.run_epoch()
        file.unlink(missing_ok=True)

    def _keep(
        self, training: PopulationTraining, member: int, trial: Trial, seconds: float
    ) -> None:
        """Writes a trial at the end of its last epoch, or of the one in which it failed."""
        epochs, failed = trial.params["max_epochs"], training.failed[member]
        if not (training.epoch == epochs or (failed and training.epoch < epochs)):
            return
        if self.results.record(trial.id):
            return  # finished before the state that this training went on from
        curves = {name: curve[member] for name, curve in training.curves.items()}
        if failed:
            record = new_record(trial, trial.id, curves, seconds, "FAIL", failed)
        else:
            record = new_record(trial, trial.id, curves, seconds)
            best = self.search.objective == "best_val_acc"
            model = self.search.build(trial.params)
            weights = training.best_parameters(member) if best else training.parameters(member)
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
            [_member(*next(iter(_networks(self.search, [trial]).items())))],
            *self._images,
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
        replace(file, lambda path: torch.save(checkpoint, path))


@torch.no_grad()
def _copy(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    for old, new in zip(target, source, strict=True):
        old.copy_(new)


# Optuna's view


def optuna_study(
    search: Search, storage: "optuna.storages.BaseStorage", key: str, number: int = 0
) -> "optuna.Study":
    """The search as an Optuna study: what samplers learn from, and dashboards show.

    Args:
        search: the search.
        storage: of the study.
        key: its name.
        number: of the trial to draw. A sampler has no state but its randomness: each trial gets
            another, lest two workers draw the same.

    Raises:
        ValueError: there is no such sampler or pruner.
    """
    import optuna

    options = {**STRATEGIES["optuna"], **(search.strategy if search.sampled else {})}
    made = []
    for kind, home in (("sampler", optuna.samplers), ("pruner", optuna.pruners)):
        if options[kind] not in home.__all__:
            known = [name for name in home.__all__ if name.lower().endswith(kind)]
            raise ValueError(f"Optuna has no {kind} {options[kind]}; {_hint(options[kind], known)}")
        arguments = dict(options[f"{kind}_args"])
        kind_class = getattr(home, options[kind])
        if "seed" in inspect.signature(kind_class).parameters:
            arguments.setdefault("seed", options["seed"] * 100_003 + number)
        try:
            made.append(kind_class(**arguments))
        except TypeError as error:
            raise ValueError(f"{options[kind]} refuses {arguments}: {error}") from error
    return optuna.create_study(
        storage=storage,
        study_name=key,
        sampler=made[0],
        pruner=made[1],
        direction="maximize",
        load_if_exists=True,
    )


def _index(
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


# Workers


def _work_here(
    search: Search,
    key: str,
    path: Path,
    storage: str | None,
    device: str,
    threads: int,
    report: Report,
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
        _work_here(*arguments, lambda unit, part: pipe.send((unit, part)))
    except (KeyboardInterrupt, SystemExit):  # the Trainer turns the one into the other
        sys.exit(0)
    except Exception as error:
        # as words: not every exception can be sent
        wrong = isinstance(error, ValueError)
        pipe.send(str(error) if wrong else f"a worker failed: {type(error).__name__}: {error}")


def _work_in_processes(workers: int, arguments: tuple[Any, ...], progress: "Progress") -> None:
    """Runs workers and waits for all of them.

    Raises:
        ValueError: one of them could not go on.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[Any, Any] = {}
    errors = []
    try:
        for _ in range(workers):
            # a pipe for each: a worker that is killed takes no lock with it
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_work_elsewhere, args=(sender, os.getpid(), *arguments), daemon=True
            )
            process.start()
            sender.close()
            pipes[receiver] = process
        while pipes:
            for pipe in wait(list(pipes), timeout=0.5):
                try:
                    message = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    process = pipes.pop(pipe)
                    process.join()
                    if process.exitcode:
                        errors.append(f"a worker died (exit code {process.exitcode})")
                    continue
                if isinstance(message, str):
                    errors.append(message)
                else:
                    progress.note(*message)
            progress.show()
    finally:
        for process in pipes.values():  # those that are left when this is interrupted
            os.kill(process.pid, signal.SIGINT)
        for process in pipes.values():
            process.join(10)
            process.kill()
    if errors:
        raise ValueError(f"{errors[0]}; the same command goes on")


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
            facts.append(f"{int(left // 60)} min {int(left % 60)} s left")
        return facts

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


# The whole


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
        workers: processes; by default one for each core.
        storage: where workers on several machines meet; see ``claims.open_storage``.
        device: on which populations are trained.

    Returns:
        All trials, as in ``results.json``.

    Raises:
        ValueError: the search cannot work, or the folder is of another one.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    search.check()
    results = Results(folder or ROOT / search.name)
    data = search.load_data()
    identity = search.identity(data)
    results.open(identity)
    key = f"{search.name}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]}"
    meeting_point = open_storage(storage, results.path)
    optuna_study(search, meeting_point, key)  # an unknown sampler is found out now
    images = len(data.train_set)
    print(f"{search.name}: {search.model}, {data.describe()}")
    if left := open_units(search, results.records(), images):
        workers = workers or os.cpu_count() or 1
        if search.second_round is None and search.strategy["name"] != "refine":
            workers = min(workers, len(left))  # no further round will need more
        _say_plan(search, left, workers)
        if search.sampled:
            _index(search, meeting_point, key, results.in_order())  # what the sampler learns from
        threads = max(1, (os.cpu_count() or 1) // workers)
        arguments = (search, key, results.path, storage, device, threads)
        progress = Progress(search, results, images)
        threads_before = torch.get_num_threads()
        try:
            if workers > 1:
                _work_in_processes(workers, arguments, progress)
            else:

                def report(unit: str, part: float) -> None:
                    progress.note(unit, part)
                    progress.show()

                _work_here(*arguments, report)
        except (KeyboardInterrupt, SystemExit):
            progress.close()
            done = len(results.write_tables())
            print(f"\n{done} of {progress.total} trials are done; the same command goes on")
            raise KeyboardInterrupt from None
        finally:
            progress.close()
            torch.set_num_threads(threads_before)
    found = results.write_tables()
    _index(search, meeting_point, key, found)
    results.write_tensorboard(search.model)
    _crown(search, results, found)
    return found


def _say_plan(search: Search, left: Sequence[Unit], workers: int) -> None:
    line = f"{sum(len(unit.ids) for unit in left)} trials to go"
    if together := [unit for unit in left if unit.together]:
        networks = sum(len(_networks(search, unit.trials)) for unit in together)
        line += f": {networks} networks in {len(together)} populations"
        if any("-part" in unit.name for unit in together):
            line += f", split lest one takes more than {UNIT_BYTES >> 20} MiB"
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
    replace(best, lambda path: shutil.copyfile(weights, path))
    print(
        f"\nwinner       {winner['id']}"
        f"\nresults      {results.path / 'results.csv'}"
        f"\ntest it      python -m mnist_lightning test --ckpt_path {results.path}"
        f"\nanother one  python -m mnist_lightning test --ckpt_path {best.parent / 'ID.ckpt'}"
        f"\nsee them     tensorboard --logdir {results.path}"
    )


# The command


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="mnist_lightning search",
        description="Train many models and compare them. Flags win over the configuration.",
        exit_on_error=False,
    )
    add = parser.add_argument
    add("-c", "--config", action=_ConfigByName, help="A YAML file, or the name of a shipped one.")
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


class _ConfigByName(ActionConfigFile):
    """``--config``: a file, or the bare name of a shipped search, from any folder."""

    def __call__(self, parser, cfg, values, option_string=None):  # type: ignore[no-untyped-def]
        super().__call__(parser, cfg, str(_find_config(values)), option_string)


def _find_config(name: str) -> Path:
    package = Path(__file__).parent
    shipped = next(
        (f for f in (package / "configs/search", package.parent / "configs/search") if f.is_dir()),
        package,
    )
    if os.sep not in name:
        candidates = [Path(name), Path(f"{name}.yaml"), shipped / name, shipped / f"{name}.yaml"]
    else:
        candidates = [Path(name)]
    for file in candidates:
        if file.is_file():
            return file
    names = sorted(file.name for file in shipped.glob("*.yaml"))
    raise ValueError(f"--config {name}: no such file; {_hint(name, names)}")


def read(argv: Sequence[str]) -> tuple[Search, dict[str, Any]]:
    """The search that the words of a command line ask for, and the other arguments of ``run``.

    Raises:
        ValueError: they, or the configuration that they name, cannot be understood.
    """
    try:
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
        _check_count("workers", place["workers"])
    if isinstance(given["strategy"], str):
        given["strategy"] = {"name": given["strategy"]}
    given["name"] = given["name"] or (Path(str(configs[-1])).stem if configs else "search")
    return Search(**given), place


def main(argv: Sequence[str]) -> int:
    """``python -m mnist_lightning search --config NAME [options]``.

    Raises:
        ValueError: what was asked for cannot be understood, or cannot work.
    """
    search, place = read(argv)
    run(search, **place)
    return 0
