"""Which models a search trains: pure enumeration, without PyTorch.

A space maps names of parameters to axes. An axis is a list of values, or a range
``{low: 0.0001, high: 0.1, log: true}`` for the strategies that draw from it. The axis
``hidden_units.2`` is the second entry of the list ``hidden_units``.
"""

import hashlib
import itertools
import json
import math
import random as random_numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Axis = Sequence[Any] | Mapping[str, Any]
Space = Mapping[str, Axis]


@dataclass(frozen=True)
class Trial:
    """One model to train.

    Args:
        params: what tells it from the others, its ``seed`` among them.
        number: its place in the search, from 0.
        round: of the search, from 0.
    """

    params: Mapping[str, Any]
    number: int
    round: int = 0

    @property
    def id(self) -> str:
        """Eight hexadecimal digits that follow from the parameters, whatever their order."""
        key = json.dumps(dict(self.params), sort_keys=True)
        return hashlib.sha256(key.encode()).hexdigest()[:8]


class Score(NamedTuple):
    """How good a trial is: the accuracy decides, of equal ones the loss."""

    val_acc: float
    val_loss: float


def check(space: Space, ranges: bool = False) -> None:
    """Refuses a space that is empty or contradicts itself.

    Args:
        space: as written by the user.
        ranges: whether the strategy can draw from a range.

    Raises:
        ValueError: no axis, an axis without values or with one twice, a range that is none.
    """
    if not space:
        raise ValueError("the space is empty: name at least one axis, like lr: [0.1, 0.01]")
    for name, axis in space.items():
        if isinstance(axis, Mapping):
            _check_range(name, axis, ranges)
        elif isinstance(axis, str) or not isinstance(axis, Sequence):
            raise ValueError(f"axis {name} is {axis!r}: an axis is a list, a fixed value is not")
        elif not axis:
            raise ValueError(f"axis {name} has no values")
        elif twice := [value for i, value in enumerate(axis) if value in axis[:i]]:
            raise ValueError(f"axis {name} has {twice[0]!r} twice")


def _check_range(name: str, axis: Mapping[str, Any], allowed: bool) -> None:
    if not allowed:
        raise ValueError(f"axis {name} is a range: this strategy needs a list of values")
    low: Any = axis.get("low")
    high: Any = axis.get("high")
    numbers = all(
        isinstance(end, int | float) and not isinstance(end, bool) and math.isfinite(end)
        for end in (low, high)
    )
    if not numbers or unknown(axis, ("low", "high", "log")) or not low < high:
        raise ValueError(f"axis {name} is {dict(axis)}: a range is {{low: a, high: b}} with a < b")
    if axis.get("log") and low <= 0:
        raise ValueError(f"axis {name} is a range with log: its low must be positive, got {low}")


def unknown(given: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    """The given names that are not known ones."""
    return [name for name in given if name not in known]


def grid(space: Space) -> list[dict[str, Any]]:
    """All combinations, the last axis changing fastest."""
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def random(space: Space, n: int, seed: int) -> list[dict[str, Any]]:
    """``n`` different random combinations, or all where there are no more than ``n``.

    The first k of them are the same whatever ``n``.
    """
    generator = random_numbers.Random(seed)
    size = math.prod(_values(axis) for axis in space.values())
    found: dict[str, dict[str, Any]] = {}
    repeated = 0
    # a range of floating point numbers may be so narrow that its draws soon repeat themselves
    while len(found) < min(n, size) and (size < math.inf or repeated < 10_000):
        params = {name: draw(axis, generator) for name, axis in space.items()}
        key = json.dumps(params)
        repeated = repeated + 1 if key in found else 0
        found[key] = params
    return list(found.values())


def _values(axis: Axis) -> float:
    """How many different values an axis has."""
    if not isinstance(axis, Mapping):
        return len(axis)
    low, high = axis["low"], axis["high"]
    return high - low + 1 if isinstance(low, int) and isinstance(high, int) else math.inf


def draw(axis: Axis, generator: random_numbers.Random) -> Any:
    """One value of a list or range, all equally likely (equally in its logarithm with ``log``)."""
    if not isinstance(axis, Mapping):
        return generator.choice(axis)
    low, high = axis["low"], axis["high"]
    if axis.get("log"):
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        value = generator.uniform(low, high)
    return _like([low, high], min(max(value, low), high))


def refine(space: Space, best: Mapping[str, Any]) -> dict[str, list[Any]]:
    """A finer space around the best point of a grid.

    A numeric axis becomes the best value and the points halfway to its neighbours: halfway in the
    logarithm where the axis grows by about the same factor from value to value. Any other axis
    keeps its best value alone.
    """
    return {name: _around(list(axis), best[name]) for name, axis in space.items()}


def _around(axis: list[Any], best: Any) -> list[Any]:
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in axis):
        return [best]
    values = sorted(axis)
    at = values.index(best)
    neighbours = values[max(0, at - 1) : at] + values[at + 1 : at + 2]
    halfway = (lambda a, b: math.sqrt(a * b)) if _geometric(values) else (lambda a, b: (a + b) / 2)
    return sorted({best, *(_like(axis, halfway(best, other)) for other in neighbours)})


def _geometric(values: Sequence[float]) -> bool:
    """Whether sorted values look more evenly spaced in their logarithm than as they are."""
    if values[0] <= 0 or len(values) < 3:
        return values[0] > 0 and values[-1] >= 10 * values[0]

    def unevenness(numbers: Sequence[float]) -> float:
        steps = [b - a for a, b in itertools.pairwise(numbers)]
        return max(steps) / min(steps)

    return unevenness([math.log(v) for v in values]) < unevenness(values)


def _like(axis: Sequence[Any], value: float) -> int | float:
    """The value as a whole number on an axis of whole numbers, else with six digits."""
    whole = all(isinstance(v, int) for v in axis)
    return round(value) if whole else float(f"{value:.6g}")


def best(scored: Sequence[tuple[Mapping[str, Any], Score]], k: int = 1) -> list[dict[str, Any]]:
    """The ``k`` parameter sets with the highest accuracy, mean over their seeds.

    Args:
        scored: parameters (with their ``seed``) and score, in the order of enumeration. Of equal
            accuracies the lower loss wins, of equal losses the earlier parameters.
        k: how many.

    Returns:
        Parameters without ``seed``, the best first.
    """
    cells: dict[str, tuple[dict[str, Any], list[Score]]] = {}
    for params, score in scored:
        cell = {name: value for name, value in params.items() if name != "seed"}
        cells.setdefault(json.dumps(cell), (cell, []))[1].append(score)

    def rank(cell: tuple[dict[str, Any], list[Score]]) -> tuple[float, float]:
        accuracies, losses = zip(*cell[1], strict=True)
        return -math.fsum(accuracies) / len(accuracies), math.fsum(losses) / len(losses)

    return [cell for cell, _ in sorted(cells.values(), key=rank)[:k]]


def rounds(
    space: Space,
    strategy: Mapping[str, Any],
    seeds: Sequence[int] = (0,),
    fixed: Mapping[str, Any] | None = None,
    second_round: Mapping[str, int] | None = None,
    scores: Mapping[str, Score | None] | None = None,
) -> Iterator[list[Trial]]:
    """The rounds of a search, each the trials that the rounds before did not have.

    Args:
        space: as ``check`` accepts it.
        strategy: ``{name: grid}``, ``{name: random, n: ..., seed: ...}`` or
            ``{name: refine, rounds: ...}``.
        seeds: every combination is trained with each.
        fixed: parameters that all trials share.
        second_round: ``{best: k, max_epochs: n}`` trains the best k again, for n epochs.
        scores: of finished trials by id; ``None`` is a trial that failed.

    Yields:
        As far as the scores reach: the first round that is not finished is the last one.
    """
    scores = scores or {}
    known: dict[str, Trial] = {}

    def new(combinations: Sequence[Mapping[str, Any]], round: int) -> list[Trial]:
        fresh = []
        for params in combinations:
            for seed in seeds:
                trial = Trial({**(fixed or {}), **params, "seed": seed}, len(known), round)
                if known.setdefault(trial.id, trial) is trial:
                    fresh.append(trial)
        return fresh

    def ranked(k: int) -> list[dict[str, Any]]:
        scored = ((trial.params, scores[id]) for id, trial in known.items())
        return best([(params, score) for params, score in scored if score is not None], k)

    number = 0
    for number in range(strategy["rounds"] if strategy["name"] == "refine" else 1):
        if strategy["name"] == "random":
            combinations = random(space, strategy["n"], strategy.get("seed", 0))
        else:
            combinations = grid(space)
        yield new(combinations, number)
        if not known.keys() <= scores.keys() or not (winner := ranked(1)):
            return
        if strategy["name"] == "refine":
            space = refine(space, winner[0])
    if second_round:
        again = [
            {**cell, "max_epochs": second_round["max_epochs"]}
            for cell in ranked(second_round["best"])
        ]
        yield new(again, number + 1)
