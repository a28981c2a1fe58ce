"""Which models a search trains: pure enumeration, without PyTorch.

A space maps names of parameters to axes. An axis is a list of values, or, for strategies that draw
values, a range ``{low: 0.0001, high: 0.1, log: true}``. The axis ``hidden_units.2`` is the second
entry of the list ``hidden_units``.
"""

import hashlib
import itertools
import json
import math
import random as random_numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import optuna

Axis = Sequence[Any] | Mapping[str, Any]
Space = Mapping[str, Axis]

# the options of each strategy, with their defaults; ... means that there is none
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
# The part of a search's definition that may grow. The rest of it never changes.
GROWABLE = ("space", "strategy", "fixed", "seeds", "second_round")


def options(strategy: Mapping[str, Any]) -> dict[str, Any]:
    """A strategy's name and options, with the defaults of those that it leaves out."""
    return {**STRATEGIES[strategy["name"]], **strategy}


@dataclass(frozen=True)
class Trial:
    """One model to train.

    Args:
        params: its parameters, with its ``seed``.
        number: its place in the search, from 0.
        round: of the search, from 0.
        generation: which definition added it: how often the search had grown before.
    """

    params: Mapping[str, Any]
    number: int
    round: int = 0
    generation: int = 0

    @property
    def id(self) -> str:
        """Eight hexadecimal digits that identify the parameters, in any order."""
        key = json.dumps(dict(self.params), sort_keys=True)
        return hashlib.sha256(key.encode()).hexdigest()[:8]


class Score(NamedTuple):
    """How good a trial is: the accuracy decides, then the loss."""

    val_acc: float
    val_loss: float


def check(space: Space, ranges: bool = False) -> None:
    """Refuses a space that is empty or contradicts itself.

    Args:
        space: as written by the user.
        ranges: whether the strategy can draw from ranges.

    Raises:
        ValueError: there is no axis, an axis has no values or one twice, or a range is wrong.
    """
    if not space:
        raise ValueError("the space is empty: name at least one axis, like lr: [0.1, 0.01]")
    for name, axis in space.items():
        if isinstance(axis, Mapping):
            _check_range(name, axis, ranges)
        elif isinstance(axis, str) or not isinstance(axis, Sequence):
            raise ValueError(f"axis {name} is {axis!r}: an axis is a list; a single value is fixed")
        elif not axis:
            raise ValueError(f"axis {name} has no values")
        elif twice := [value for i, value in enumerate(axis) if value in axis[:i]]:
            raise ValueError(f"axis {name} has {twice[0]!r} twice")


def _check_range(name: str, axis: Mapping[str, Any], allowed: bool) -> None:
    if not allowed:
        raise ValueError(f"axis {name} is a range: this strategy needs a list of values")
    low: Any = axis.get("low")
    high: Any = axis.get("high")
    numbers = all(_is_number(end) and math.isfinite(end) for end in (low, high))
    if not numbers or unknown(axis, ("low", "high", "log")) or not low < high:
        raise ValueError(f"axis {name} is {dict(axis)}: a range is {{low: a, high: b}} with a < b")
    if axis.get("log") and low <= 0:
        raise ValueError(f"axis {name} is a range with log: its low must be positive, got {low}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def unknown(given: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    """The given names that are not known."""
    return [name for name in given if name not in known]


def grid(space: Space) -> list[dict[str, Any]]:
    """All combinations, the last axis changing fastest."""
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def random(space: Space, n: int, seed: int) -> list[dict[str, Any]]:
    """``n`` different random combinations, or all if there are no more than ``n``.

    The first ones are the same for every ``n``.
    """
    generator = random_numbers.Random(seed)
    size = math.prod(_values(axis) for axis in space.values())
    combinations: dict[str, dict[str, Any]] = {}
    repeated = 0
    # a range of floating point numbers may be so narrow that its draws repeat
    while len(combinations) < min(n, size) and (size < math.inf or repeated < 10_000):
        params = {name: draw(axis, generator) for name, axis in space.items()}
        key = json.dumps(params)
        repeated = repeated + 1 if key in combinations else 0
        combinations[key] = params
    return list(combinations.values())


def _values(axis: Axis) -> float:
    """The number of different values of an axis."""
    if not isinstance(axis, Mapping):
        return len(axis)
    low, high = axis["low"], axis["high"]
    return high - low + 1 if isinstance(low, int) and isinstance(high, int) else math.inf


def draw(axis: Axis, generator: random_numbers.Random) -> Any:
    """A random value of an axis, uniform, or uniform in the logarithm with ``log``."""
    if not isinstance(axis, Mapping):
        return generator.choice(axis)
    low, high = axis["low"], axis["high"]
    if axis.get("log"):
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        value = generator.uniform(low, high)
    return _like([low, high], min(max(value, low), high))


def distribution(axis: Axis) -> "optuna.distributions.BaseDistribution":
    """The axis as Optuna has it."""
    from optuna import distributions

    if not isinstance(axis, Mapping):
        return distributions.CategoricalDistribution([as_category(value) for value in axis])
    low, high, log = axis["low"], axis["high"], axis.get("log", False)
    if isinstance(low, int) and isinstance(high, int):
        return distributions.IntDistribution(low, high, log)
    return distributions.FloatDistribution(low, high, log)


def as_category(value: Any) -> Any:
    """A value as Optuna's categories have it, which are strings and numbers: a list as JSON."""
    return json.dumps(value) if isinstance(value, list) else value


def refine(space: Space, best: Mapping[str, Any]) -> dict[str, list[Any]]:
    """A finer space around the best point of a grid.

    A numeric axis becomes the best value and the points halfway to its neighbours, halfway in the
    logarithm if the values grow by about a constant factor. Another axis keeps only its best value.
    """
    return {name: _around(list(axis), best[name]) for name, axis in space.items()}


def _around(axis: list[Any], best: Any) -> list[Any]:
    if not all(map(_is_number, axis)):
        return [best]
    values = sorted(axis)
    at = values.index(best)
    neighbours = values[max(0, at - 1) : at] + values[at + 1 : at + 2]
    halfway = (lambda a, b: math.sqrt(a * b)) if _geometric(values) else (lambda a, b: (a + b) / 2)
    return sorted({best, *(_like(axis, halfway(best, other)) for other in neighbours)})


def _geometric(values: Sequence[float]) -> bool:
    """Whether sorted values are more evenly spaced in their logarithm."""
    if values[0] <= 0 or len(values) < 3:
        return values[0] > 0 and values[-1] >= 10 * values[0]

    def unevenness(numbers: Sequence[float]) -> float:
        steps = [b - a for a, b in itertools.pairwise(numbers)]
        return max(steps) / min(steps)

    return unevenness([math.log(v) for v in values]) < unevenness(values)


def _like(axis: Sequence[Any], value: float) -> int | float:
    """The value as a whole number if all of the axis are, else with six digits."""
    whole = all(isinstance(v, int) for v in axis)
    return round(value) if whole else float(f"{value:.6g}")


def best(scored: Sequence[tuple[Mapping[str, Any], Score]], k: int = 1) -> list[dict[str, Any]]:
    """The ``k`` configurations with the highest accuracy, mean over their seeds.

    Args:
        scored: parameters, with their ``seed``, and scores, in the order of enumeration. With equal
            accuracies the lower loss wins, with equal losses the earlier configuration.
        k: how many.

    Returns:
        Parameters without ``seed``, the best first.
    """
    return [params for params, _ in ranking(scored)[:k]]


def ranking(
    scored: Sequence[tuple[Mapping[str, Any], Score]],
) -> list[tuple[dict[str, Any], list[Score]]]:
    """All configurations with the scores of their seeds, in the order of ``best``."""
    configurations: dict[str, tuple[dict[str, Any], list[Score]]] = {}
    for params, score in scored:
        without_seed = {name: value for name, value in params.items() if name != "seed"}
        key = json.dumps(without_seed, sort_keys=True)
        configurations.setdefault(key, (without_seed, []))[1].append(score)

    def rank(configuration: tuple[dict[str, Any], list[Score]]) -> tuple[float, float]:
        accuracies, losses = zip(*configuration[1], strict=True)
        return -math.fsum(accuracies) / len(accuracies), math.fsum(losses) / len(losses)

    return sorted(configurations.values(), key=rank)


class _Trials:
    """The trials of a search so far: each once, numbered in the order in which they came."""

    def __init__(self) -> None:
        self.by_id: dict[str, Trial] = {}
        self.next_number = 0

    def add(
        self,
        combinations: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        round: int,
        generation: int,
    ) -> list[Trial]:
        """Adds each combination with each seed; returns the trials that are new."""
        new = []
        for params in combinations:
            for seed in seeds:
                trial = Trial({**params, "seed": seed}, self.next_number, round, generation)
                if self.by_id.setdefault(trial.id, trial) is trial:
                    new.append(trial)
                    self.next_number += 1
        return new

    def best(self, scores: Mapping[str, Score | None], k: int = 1) -> list[dict[str, Any]]:
        """The ``k`` best configurations, given the scores of all trials by id."""
        scored = ((trial.params, scores[id]) for id, trial in self.by_id.items())
        return best([(params, score) for params, score in scored if score is not None], k)


def rounds(
    space: Space,
    strategy: Mapping[str, Any],
    seeds: Sequence[int] = (0,),
    fixed: Mapping[str, Any] | None = None,
    second_round: Mapping[str, int] | None = None,
    scores: Mapping[str, Score | None] | None = None,
    grown_from: Sequence[Mapping[str, Any]] = (),
) -> Iterator[list[Trial]]:
    """The rounds of a search: in each, the trials that no earlier round had.

    If a search has grown, its first round holds the first rounds of all earlier definitions, the
    oldest first, so that trials keep their numbers. Later rounds follow from the newest definition
    alone.

    Args:
        space: as ``check`` accepts it.
        strategy: ``{name: grid}``, ``{name: random, n: ..., seed: ...}`` or
            ``{name: refine, rounds: ...}``.
        seeds: every combination is trained with each of them.
        fixed: parameters that all trials share.
        second_round: ``{best: k, max_epochs: n}`` trains the best k again, for n epochs.
        scores: of finished trials by id; ``None`` is a trial that failed.
        grown_from: earlier definitions, the oldest first: see ``check_growth``. ``numbers`` of each
            is the lowest number that was free when the next definition came.

    Yields:
        The rounds up to the first that is not finished.
    """
    scores = scores or {}
    strategy = options(strategy)
    newest = {"space": space, "strategy": strategy, "fixed": fixed or {}, "seeds": seeds}
    trials = _Trials()
    first: list[Trial] = []
    combinations: list[dict[str, Any]] = []
    for generation, definition in enumerate([*grown_from, newest]):
        combinations = _first(definition, combinations)
        first += trials.add(combinations, definition["seeds"], 0, generation)
        trials.next_number = max(trials.next_number, definition.get("numbers", 0))
    yield first
    number, generation = 0, len(grown_from)
    for number in range(strategy.get("rounds", 1)):
        if number:
            combinations = [{**(fixed or {}), **params} for params in grid(space)]
            yield trials.add(combinations, seeds, number, generation)
        if not trials.by_id.keys() <= scores.keys() or not (winner := trials.best(scores)):
            return
        if strategy["name"] == "refine":
            space = refine(space, winner[0])
    if second_round:
        again = [
            {**params, "max_epochs": second_round["max_epochs"]}
            for params in trials.best(scores, second_round["best"])
        ]
        yield trials.add(again, seeds, number + 1, generation)


def _first(definition: Mapping[str, Any], before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Combinations of the first round, the fixed parameters among them.

    Args:
        definition: of the search.
        before: the combinations of the definition that it grew from. A random search keeps them
            and draws only the missing ones from its space.
    """
    strategy, fixed = options(definition["strategy"]), definition["fixed"]
    if strategy["name"] != "random":
        return [{**fixed, **params} for params in grid(definition["space"])]
    n = strategy["n"]
    drawn = random(definition["space"], n, strategy["seed"])
    all_of_them = [*before, *({**fixed, **params} for params in drawn)]
    return list({json.dumps(p, sort_keys=True): p for p in all_of_them}.values())[:n]


def check_growth(held: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Refuses a search that another one cannot grow to.

    These can grow: an axis (more values, a wider range), a fixed parameter (to an axis that has its
    value), the seeds, the number of trials or rounds, and the second round. Every trial of the old
    search is then a trial of the new one. A parameter that was neither fixed nor an axis cannot
    become an axis: the old trials do not say which value they had.

    Args:
        held: the definition in the folder, see ``Search.definition``.
        asked: the new definition.

    Returns:
        Names of what grows.

    Raises:
        ValueError: the first difference that is not growth.
    """
    for key, value in asked.items():
        if key not in GROWABLE and _differ(held.get(key), value):
            raise ValueError(difference(key, held.get(key), value))
    grows = [
        *_check_parameters_grow(held, asked),
        *_check_strategy_grows(held["strategy"], asked["strategy"]),
    ]
    if "strategy.n" not in grows and "n" in asked["strategy"] and grows:
        n = asked["strategy"]["n"]
        raise ValueError(
            f"its {grows[0]} would grow, but new values are drawn only with more than {n} trials:"
            " raise strategy.n"
        )
    if not set(held["seeds"]) <= set(asked["seeds"]):
        raise ValueError(difference("seeds", held["seeds"], asked["seeds"]))
    old, new = held["second_round"], asked["second_round"]
    if old and not (new and all(new[name] >= old[name] for name in old)):
        raise ValueError(difference("second_round", old, new))
    grows += [name for name in ("seeds", "second_round") if _differ(held[name], asked[name])]
    return grows


def _check_parameters_grow(held: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Names of the parameters that get more values."""
    old, new = (
        {**{name: [value] for name, value in search["fixed"].items()}, **search["space"]}
        for search in (held, asked)
    )
    for name, axis in old.items():
        if name not in new or not holds(new[name], axis):
            homes = ["space" if name in search["space"] else "fixed" for search in (held, asked)]
            values = [
                search[home].get(name) for search, home in zip((held, asked), homes, strict=True)
            ]
            reason = difference(f"{homes[0]}.{name}", *values)
            if homes == ["fixed", "fixed"] and name in new:
                both = ", ".join(map(_text, values))
                reason += f" (as an axis, space.{name}: [{both}], it would grow)"
            raise ValueError(reason)
    for name in new:
        if name not in old:
            raise ValueError(f"it leaves {name} to its default, which its trials do not state")
    return [f"space.{name}" for name, axis in new.items() if _differ(axis, old[name])]


def holds(axis: Axis, other: Axis) -> bool:
    """Whether an axis has all the values of another."""
    if not isinstance(axis, Mapping):
        texts = [_text(value) for value in axis]
        return not isinstance(other, Mapping) and all(_text(value) in texts for value in other)
    if isinstance(other, Mapping):
        same = bool(axis.get("log")) == bool(other.get("log"))
        return same and axis["low"] <= other["low"] and other["high"] <= axis["high"]
    return all(_is_number(value) and axis["low"] <= value <= axis["high"] for value in other)


def _check_strategy_grows(held: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    if held["name"] != asked["name"]:
        raise ValueError(difference("strategy.name", held["name"], asked["name"]))
    old, new = options(held), options(asked)
    counts = [name for name in ("n", "rounds") if name in old and name in new]
    for name in new:
        if old.get(name) != new[name] and not (name in counts and new[name] > old[name]):
            raise ValueError(difference(f"strategy.{name}", old.get(name), new[name]))
    return [f"strategy.{name}" for name in counts if new[name] > old[name]]


def difference(key: str, held: Any, asked: Any) -> str:
    """How two values differ, in a line; of dictionaries, the first entry that differs."""
    if isinstance(held, dict) and isinstance(asked, dict):
        for name in [*asked, *held]:
            if _differ(held.get(name), asked.get(name)):
                return difference(f"{key}.{name}", held.get(name), asked.get(name))
    return f"its {key} is {_text(held)}, not {_text(asked)}"


def _differ(one: Any, other: Any) -> bool:
    """Whether two values of JSON types make different trials."""
    return _text(one) != _text(other)


def _text(value: Any) -> str:
    """The value as JSON, in which 1 and 1.0 differ."""
    return json.dumps(value, sort_keys=True)
