"""What is searched, and the units of work that it makes.

A unit is what one worker takes: networks that share their mini-batches and are trained together, or
a single training. The units follow from the search and its earlier definitions alone; what a
definition adds forms units of its own. So results are bit-identical for any number of workers,
with and without interruptions, whenever the search grew.
"""

import dataclasses
import hashlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule

from mnist_lightning.checks import check_count
from mnist_lightning.classes import import_class
from mnist_lightning.console import suggest
from mnist_lightning.data.module import MNISTDataModule
from mnist_lightning.models.architectures import ARCHITECTURES
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.models.multilayer import DeepNetwork, ShallowNetwork
from mnist_lightning.search import space
from mnist_lightning.search.results import Record, score
from mnist_lightning.search.space import GROWABLE, STRATEGIES, Trial
from mnist_lightning.spec import DataSpec
from mnist_lightning.training.freezing import LayerFreezing
from mnist_lightning.training.population import Member, training_bytes
from mnist_lightning.training.stacked import SGD

# Networks trained together take at most this much memory, beside the images. Small enough to spread
# the networks of one batch size over workers, large enough for the study's 16 of each.
UNIT_BYTES = 64 * 2**20
SMALL = (ShallowNetwork, DeepNetwork)  # populations can train them, with SGD
# the values that their arguments must have then; a ``Member`` holds the other arguments
PLAIN = {
    "optimizer": "sgd",
    "schedule": "constant",
    "warmup_epochs": 0.0,
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "class_weights": "none",
    "tta": 0,
    "dropout": 0.0,
    "batch_norm": False,
    "activation": "relu",
}

OBJECTIVES = {
    "val_acc": "validation accuracy",
    "best_val_acc": "validation accuracy, best epoch",
}
# Settings of the data that decide which images train and which validate.
DATA_OF_ALL = [
    f"data.{name}"
    for name in (
        *("name", "source", "data_dir", "split", "val_fraction", "split_seed"),
        *("test_fraction", "channels", "classes"),
    )
]
NO_RESULT = [f"data.{name}" for name in ("eval_batch_size", "predict_dir")]
MOST_TRIALS = 100_000  # each is a file, and files are counted often


@dataclass(frozen=True)
class Search:
    """What is searched.

    Two searches with equal fields, on the same data, have equal results.

    Args:
        name: the name of the search and of its folder.
        model: a class of this package, like ShallowNetwork, or my_module.MyModel of your own, which
            logs a loss and an accuracy in its validation.
        space: axes by parameter, each a list of values, or {low: a, high: b, log: true} for the
            strategies random and optuna. A parameter is max_epochs, batch_size, an argument of the
            model, a setting of the data like data.normalization that leaves the validation
            images as they are, or an option of LayerFreezing like freezing.batch_norm.
        strategy: {name: grid}, random, refine or optuna, and its options.
        fixed: parameters that all trials share.
        seeds: each combination is trained with each seed.
        second_round: {best: k, max_epochs: n} trains the best k again, for n epochs.
        objective: val_acc is the validation accuracy after the last epoch, best_val_acc that of the
            best epoch. A trial's checkpoint holds the weights that reached it.
        data: arguments of MNISTDataModule, all but batch_size.
        trainer: arguments of the Trainer, for models that it trains. If there are any, these
            include networks with momentum or weight decay.
        grown_from: earlier definitions that the folder holds; see ``space.check_growth``.
    """

    name: str
    model: str
    space: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    strategy: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "grid"})
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    second_round: Mapping[str, int] | None = None
    objective: str = "val_acc"
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trainer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grown_from: Sequence[Mapping[str, Any]] = ()

    @cached_property
    def model_class(self) -> type[LightningModule]:
        module, _, name = self.model.rpartition(".")
        try:
            model = import_class(self.model) if module else ARCHITECTURES.get(name)
        except ValueError:
            model = None
        of_kind = isinstance(model, type) and issubclass(model, LightningModule)
        if not of_kind or model is Classifier:
            raise ValueError(f"no model {self.model!r}; {suggest(name, ARCHITECTURES)}")
        return cast(type[LightningModule], model)

    @property
    def sampled(self) -> bool:
        """Whether Optuna draws the parameters, one trial after the other."""
        return self.strategy["name"] == "optuna"

    def at(self, generation: int) -> "Search":
        """The search as an earlier definition had it; the last generation is the newest one."""
        if generation == len(self.grown_from):
            return self
        past = {name: self.grown_from[generation][name] for name in GROWABLE}
        return dataclasses.replace(self, **past, grown_from=self.grown_from[:generation])

    def check(self) -> None:
        """Refuses what cannot work, before anything is trained.

        Raises:
            ValueError: a setting is wrong.
        """
        if self.name in ("", ".", "..") or set("/\\\0") & set(self.name):
            raise ValueError(f"--name must be the name of a folder, not a path, got {self.name!r}")
        self._check_strategy()
        draws = self.strategy["name"] in ("random", "optuna")
        space.check(self.space, ranges=draws)
        count = self.strategy["n"] if draws else math.prod(map(len, self.space.values()))
        if (count := count * len(self.seeds)) > MOST_TRIALS:
            raise ValueError(
                f"a search of {count:,} trials: at most {MOST_TRIALS:,}. Shorter axes, or"
                " --strategy '{name: random, n: 1000}', which draws from them"
            )
        both = sorted(self.space.keys() & self.fixed.keys())
        if both:
            raise ValueError(f"{both[0]} is fixed and an axis: it can only be one of them")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, got {list(self.seeds)}")
        if self.sampled and len(self.seeds) > 1:
            raise ValueError(f"optuna draws trials of one seed, got seeds {list(self.seeds)}")
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}"
            )
        if self.second_round is not None:
            if self.sampled or set(self.second_round) != {"best", "max_epochs"}:
                raise ValueError("second_round is {best: k, max_epochs: n}; not after optuna")
            for option, value in self.second_round.items():
                check_count(f"second_round.{option}", value)
        if self.data.get("val_fraction") == 0:
            raise ValueError(
                "a search compares its trials on validation images, and --data.val_fraction 0"
                " leaves none: give a share above 0"
            )
        self._check_parameters()

    def _check_strategy(self) -> None:
        """Refuses an unknown strategy, and options that it does not have or lacks."""
        options = dict(self.strategy)
        strategy = options.pop("name", None)
        if strategy not in STRATEGIES:
            raise ValueError(f"no strategy {strategy!r}; {suggest(str(strategy), STRATEGIES)}")
        known = STRATEGIES[strategy]
        for option in space.unknown(options, list(known)):
            raise ValueError(
                f"strategy {strategy} has no option {option}; {suggest(option, known)}"
            )
        for option, default in known.items():
            if default is ... and option not in options:
                raise ValueError(f"strategy {strategy} needs {option}")
            if option in ("n", "rounds") and option in options:
                check_count(f"strategy.{option}", options[option])

    def _check_parameters(self) -> None:
        of_data = [f"data.{name}" for name in _arguments(MNISTDataModule)]
        of_freezing = _arguments(LayerFreezing)
        known = ["max_epochs", "batch_size", *_arguments(self.model_class)]
        axes = {**self.fixed, **self.space}
        for name in axes:
            if name in ("seed", "seeds"):
                raise ValueError(f"{name} is no axis: say seeds: [0, 1, 2] beside the space")
            base, _, layer = name.partition(".")
            if base == "data":
                _check_data_axis(name, of_data)
            elif base == "freezing":
                if layer not in of_freezing:
                    hint = suggest(layer, of_freezing)
                    raise ValueError(f"freezing has no option {layer}; {hint}")
            elif base not in known or (layer and not layer.isdigit()):
                raise ValueError(f"{self.model} has no parameter {name}; {suggest(base, known)}")
        if "max_epochs" not in axes:
            raise ValueError("max_epochs is missing: an axis of the space, or fixed")
        ends = {  # of a range, check its two ends
            name: [axis["low"], axis["high"]] if isinstance(axis, Mapping) else axis
            for name, axis in self.space.items()
        }
        for name in ("max_epochs", "batch_size"):
            for value in ends.get(name, [self.fixed[name]] if name in self.fixed else []):
                check_count(name, value)
        tried = set()
        combinations = space.grid(ends)
        if len(combinations) > 1000:  # then each value, with the first ones of the other axes
            first = combinations[0]
            combinations = [{**first, name: v} for name, axis in ends.items() for v in axis]
        for combination in combinations:
            params = {**self.fixed, **combination}
            spec, arguments = self.spec(params), self.model_args(params)
            key = json.dumps([spec.plain(), arguments, _with_prefix("freezing", params)])
            if key not in tried:
                tried.add(key)
                with torch.device("meta"):  # shapes without memory
                    model = self._build(arguments, spec)
                for freezing in self.freezing(params):
                    freezing.choose(model)

    def _build(self, arguments: Mapping[str, Any], spec: DataSpec) -> LightningModule:
        takes_spec = "spec" in _arguments(self.model_class)
        try:
            return self.model_class(**arguments, **({"spec": spec.plain()} if takes_spec else {}))
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{self.model} refuses {dict(arguments)}: {error}") from error

    def model_args(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The model's arguments among a trial's parameters; ``name.1, name.2`` become a list."""
        arguments: dict[str, Any] = {}
        lists: dict[str, dict[int, Any]] = {}
        for name, value in params.items():
            base, _, layer = name.partition(".")
            if base in ("data", "freezing"):
                continue
            if layer:
                lists.setdefault(base, {})[int(layer)] = value
            elif name not in ("max_epochs", "batch_size", "seed"):
                arguments[name] = value
        for name, entries in lists.items():
            if sorted(entries) != list(range(1, len(entries) + 1)):
                raise ValueError(f"axes {name}.N must count 1, 2, 3 ..., got {sorted(entries)}")
            arguments[name] = [entries[layer] for layer in sorted(entries)]
        return arguments

    def build(self, params: Mapping[str, Any]) -> LightningModule:
        """A new model for a trial, with the initial weights of its seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(params["seed"])
            return self._build(self.model_args(params), self.spec(params))

    def spec(self, params: Mapping[str, Any]) -> DataSpec:
        """Shape and classes of a trial's images."""
        settings = self.data_settings(params)
        key = json.dumps(settings, sort_keys=True)
        if key not in self._specs:
            self._specs[key] = MNISTDataModule(**settings).spec
        return self._specs[key]

    @cached_property
    def _specs(self) -> dict[str, DataSpec]:
        """By the settings of the data: a folder is listed once."""
        return {}

    def sizes(self, params: Mapping[str, Any]) -> list[int]:
        """Sizes of the layers of a trial's network, from the pixels to the classes."""
        spec = self.spec(params)
        return [spec.pixels, *(self.hidden_units(params) or ()), len(spec.classes)]

    def data_module(self, params: Mapping[str, Any], loaded: MNISTDataModule) -> MNISTDataModule:
        """The data as a trial sees it.

        Args:
            params: of the trial.
            loaded: see ``load_data``; the trials share its images.
        """
        # what source "auto" has become
        settings = {**self.data_settings(params), "source": loaded.source}
        data = MNISTDataModule(**{**settings, "batch_size": self.batch_size(params)})
        data.share(loaded)
        return data

    def data_settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """A trial's arguments of the data module, all but ``batch_size``."""
        return {**self.data, **_with_prefix("data", params)}

    def freezing(self, params: Mapping[str, Any]) -> list[LayerFreezing]:
        """The callback that a trial's parameters ``freezing.*`` ask for, if there are any."""
        settings = _with_prefix("freezing", params)
        return [LayerFreezing(**settings)] if settings else []

    def batch_size(self, params: Mapping[str, Any]) -> int:
        """The trial's batch size, else the data module's default."""
        default = inspect.signature(MNISTDataModule.__init__).parameters["batch_size"].default
        return params.get("batch_size", default)

    def load_data(self) -> MNISTDataModule:
        """The data, fetched, verified and split; the trials share its images."""
        data = MNISTDataModule(**self.data)
        data.prepare_data()
        data.setup("fit")
        return data

    def definition(self, data: MNISTDataModule) -> dict[str, Any]:
        """All that the results depend on, as JSON types."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("name", "data", "grown_from")
        }
        facts = ("name", "source", "split", "val_fraction", "split_seed", "image_size")
        facts_of_data = {
            fact: getattr(data, fact) for fact in (*facts, "normalization", "checksum")
        }
        # only if they are chosen: earlier searches do not have them
        if data.augment:
            facts_of_data["augment"] = data.augment.chosen()
        if data.balance:
            facts_of_data["balance"] = True
        if data.train_fraction < 1:
            facts_of_data["train_fraction"] = data.train_fraction
        if data.source == "folder":
            facts_of_data |= {"test_fraction": data.test_fraction, **data.spec.plain()}
        return json.loads(json.dumps({**fields, "data": facts_of_data}))

    def hidden_units(self, params: Mapping[str, Any]) -> tuple[int, ...] | None:
        """Sizes of the hidden layers if a population can train the model, else ``None``."""
        data = self.data_settings(params)
        each_image_once = not (any((data.get("augment") or {}).values()) or data.get("balance"))
        if self.model_class not in SMALL or not each_image_once:
            return None
        if _with_prefix("freezing", params):
            return None
        arguments = self.model_args(params)
        units = arguments.pop("hidden_units", None)
        if units is None:
            parameters = inspect.signature(self.model_class.__init__).parameters
            units = parameters["hidden_units"].default
        for name in ("lr", *SGD._fields):
            arguments.pop(name, None)
        if any(name not in PLAIN or PLAIN[name] != arguments[name] for name in arguments):
            return None
        sgd = self.sgd(params)
        # the model refuses the first; the second may clip gradients, and for plain SGD it never did
        if (sgd.nesterov and not sgd.momentum) or (self.trainer and not sgd.plain):
            return None
        return tuple(units) if isinstance(units, list | tuple) else (units,)

    def lr(self, params: Mapping[str, Any]) -> float:
        """The trial's learning rate, else the model's default."""
        default = inspect.signature(self.model_class.__init__).parameters["lr"].default
        return float(params.get("lr", default))

    def sgd(self, params: Mapping[str, Any]) -> SGD:
        """The trial's other options of SGD."""
        return SGD(
            float(params.get("momentum", 0.0)),
            bool(params.get("nesterov", False)),
            float(params.get("weight_decay") or 0.0),
        )


def _arguments(kind: type) -> list[str]:
    """Names of a class's arguments, and of those that it passes to its bases as ``**kwargs``."""
    names: list[str] = []
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        names += [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(dict.fromkeys(names))


def _with_prefix(prefix: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters ``prefix.name``, by name."""
    prefix += "."
    return {n.removeprefix(prefix): value for n, value in params.items() if n.startswith(prefix)}


def _check_data_axis(name: str, known: Sequence[str]) -> None:
    """Refuses a name that is no setting of the data, or a setting that trials must share."""
    if name not in known:
        raise ValueError(f"the data has no setting {name}; {suggest(name, known)}")
    if name in DATA_OF_ALL:
        raise ValueError(
            f"{name} cannot be an axis: trials are compared on the same validation images. Run a"
            f" search for each value, with --{name} and --folder"
        )
    if name == "data.batch_size":
        raise ValueError("data.batch_size is called batch_size here")
    if name in NO_RESULT:
        raise ValueError(f"{name} changes no result: set it for all trials, with --{name}")


@dataclass(frozen=True)
class WorkUnit:
    """Trials that one worker trains.

    Args:
        name: unique in the search.
        trials: empty where a sampler will draw the one trial.
        networks: those of one population, each with its trials; empty for a single training.
        work: estimated seconds on one core, for the order of units and the time left.
        number: of the trial that a sampler will draw.
        generation: of the definition that the sampler draws from.
    """

    name: str
    trials: tuple[Trial, ...]
    networks: Mapping[Member, Sequence[Trial]]
    work: float
    number: int = -1
    generation: int = 0

    @property
    def together(self) -> bool:
        """Whether its trials are networks of one population."""
        return bool(self.networks)

    @property
    def ids(self) -> list[str]:
        """The ids of its trials, which are known before a sampler draws them."""
        return [trial.id for trial in self.trials] or [f"draw{self.number:04d}"]


Unit = WorkUnit  # its name of before


def units(search: Search, trials: Sequence[Trial], images: int) -> list[WorkUnit]:
    """The units of a round, the longest first: independent of progress and number of workers.

    Args:
        search: the search.
        trials: of one round.
        images: in the training set.
    """
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    made = []
    for trial in trials:
        if search.hidden_units(trial.params) is None:
            # not seconds, which are unknown, but comparable among such units
            made.append(WorkUnit(trial.id, (trial,), {}, float(trial.params["max_epochs"])))
        else:
            batch_size, seed = search.batch_size(trial.params), trial.params["seed"]
            data = json.dumps(search.data_settings(trial.params))
            # plain SGD apart: its units were there when the others were trained alone
            plain_sgd = search.sgd(trial.params).plain
            key = (trial.round, trial.generation, batch_size, seed, data, plain_sgd)
            groups.setdefault(key, []).append(trial)
    plain = json.dumps(dict(search.data))
    for (round, generation, batch_size, seed, data, plain_sgd), group in groups.items():
        parts = _split(search, networks(search, group))
        for number, part in enumerate(parts):
            in_part = tuple(trial for alike in part.values() for trial in alike)
            name = f"round{round}-batch{batch_size}-seed{seed}" + f"-part{number}" * (
                len(parts) > 1
            )
            if generation or data != plain or not plain_sgd:  # another unit may have this name
                name += f"-{digest([trial.id for trial in in_part])}"
            work = _cost(search, part, batch_size, images)
            made.append(WorkUnit(name, in_part, part, work))
    return sorted(made, key=lambda unit: -unit.work)


def networks(search: Search, trials: Sequence[Trial]) -> dict[Member, list[Trial]]:
    """Trials by their network; the longest training of a network passes through the others."""
    by_network: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        units = search.hidden_units(trial.params)
        assert units is not None
        network = (len(units), units, search.lr(trial.params), search.sgd(trial.params))
        by_network.setdefault(network, []).append(trial)
    return {
        Member(units, lr, max(trial.params["max_epochs"] for trial in group), sgd): group
        for (_, units, lr, sgd), group in sorted(by_network.items())
    }


def _split(
    search: Search, together: Mapping[Member, list[Trial]]
) -> list[dict[Member, list[Trial]]]:
    """Networks of one batch size and seed in parts of about equal memory, each within the limit."""
    sizes = {
        member: training_bytes(search.sizes(trials[0].params), member.sgd.plain)
        for member, trials in together.items()
    }
    count = math.ceil(sum(sizes.values()) / UNIT_BYTES)
    parts: list[dict[Member, list[Trial]]] = []
    filled, total = 0.0, sum(sizes.values()) / count
    for member, trials in together.items():
        # neighbours in this order have similar shapes, which are stacked
        if not parts or filled + sizes[member] / 2 > total:
            parts.append({})
            filled = 0.0
        parts[-1][member] = trials
        filled += sizes[member]
    return parts


def _cost(
    search: Search, together: Mapping[Member, list[Trial]], batch_size: int, images: int
) -> float:
    epochs = max(m.max_epochs for m in together)
    products = sum(
        m.max_epochs * a * b * (1 if m.sgd.plain else 2)
        for m, trials in together.items()
        for a, b in pairwise(search.sizes(trials[0].params))
    )
    # forward, backward and update at 100 GFLOP/s, and the fixed cost of a step
    return images * (6 * products / 1e11 + epochs * 6e-5 / batch_size)


def rounds(search: Search, records: Mapping[str, Record]) -> list[list[Trial]]:
    """The rounds of the search, up to the first that is not finished."""
    scores = {id: score(record, search.objective) for id, record in records.items()}
    return list(
        space.rounds(
            search.space,
            search.strategy,
            search.seeds,
            search.fixed,
            search.second_round,
            scores,
            search.grown_from,
        )
    )


def planned(search: Search, records: Mapping[str, Record]) -> list[str]:
    """Ids of the trials of all rounds, up to the first that is not finished."""
    if search.sampled:
        return [unit.ids[0] for unit in all_units(search, records, 1)]
    return [trial.id for trials in rounds(search, records) for trial in trials]


def generation(search: Search, number: int) -> int:
    """Which definition a sampler draws the trial of this number from."""
    return sum(past["strategy"]["n"] <= number for past in search.grown_from)


def digest(content: Any) -> str:
    """Eight hexadecimal digits that identify a content of JSON types."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]


def all_units(search: Search, records: Mapping[str, Record], images: int) -> list[WorkUnit]:
    """Units of all rounds, up to the first that is not finished."""
    if search.sampled:
        return [
            WorkUnit(f"draw{i:04d}", (), {}, 1.0, i, generation(search, i))
            for i in range(search.strategy["n"])
        ]
    return [unit for trials in rounds(search, records) for unit in units(search, trials, images)]


def open_units(search: Search, records: Mapping[str, Record], images: int) -> list[WorkUnit]:
    """Units that are not finished, of all rounds up to the first that is not."""
    whole = all_units(search, records, images)
    return [unit for unit in whole if any(id not in records for id in unit.ids)]
