"""Pure enumeration: sets that can be counted by hand, in milliseconds."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from mnist_lightning.search import space
from mnist_lightning.search.space import Score, Trial

SHALLOW = {
    "batch_size": [4, 8, 16, 32, 64, 128],
    "max_epochs": [10, 20, 50, 100],
    "lr": [0.1, 0.01, 0.001, 0.0001],
    "hidden_units": [10, 25, 50, 100],
}


def test_grid_is_the_product_of_the_axes() -> None:
    combinations = space.grid(SHALLOW)
    assert len(combinations) == 384
    assert [tuple(params.values()) for params in combinations] == list(
        itertools.product(*SHALLOW.values())
    )


def test_random_draws_different_points_of_the_space_and_repeats_itself() -> None:
    combinations = space.random(SHALLOW, 50, seed=1)
    assert len({tuple(params.items()) for params in combinations}) == 50
    assert all(params[name] in SHALLOW[name] for params in combinations for name in SHALLOW)
    assert space.random(SHALLOW, 50, seed=1) == combinations != space.random(SHALLOW, 50, seed=2)
    assert space.random(SHALLOW, 20, seed=1) == combinations[:20]


def test_random_ends_when_the_space_is_used_up() -> None:
    assert len(space.random({"lr": [1, 2], "hidden_units": [1, 2]}, 100, seed=0)) == 4


def test_random_ends_when_a_range_is_used_up() -> None:
    """Found by fuzzing: a range of few whole numbers, or a narrow one, was drawn from for ever."""
    assert len(space.random({"hidden_units": {"low": 5, "high": 6}}, 50, seed=0)) == 2
    narrow = {"lr": {"low": 0.1, "high": 0.1000005}}
    assert 1 <= len(space.random(narrow, 50, seed=0)) < 10


def test_a_range_has_finite_ends() -> None:
    with pytest.raises(ValueError, match="a range is"):
        space.check({"lr": {"low": 0.1, "high": float("inf")}}, ranges=True)


def test_ranges_are_drawn_within_their_ends_and_whole_where_these_are() -> None:
    axes = {"lr": {"low": 1e-4, "high": 1e-1, "log": True}, "hidden_units": {"low": 5, "high": 9}}
    space.check(axes, ranges=True)
    drawn = space.random(axes, 500, seed=0)
    rates = sorted(params["lr"] for params in drawn)
    assert 1e-4 <= rates[0] < 2e-4
    assert 5e-2 < rates[-1] <= 1e-1
    assert 1e-3 < rates[250] < 1e-2  # half of the draws below the middle of the logarithm
    assert {params["hidden_units"] for params in drawn} == {5, 6, 7, 8, 9}


def test_refine_goes_halfway_to_the_neighbours() -> None:
    best = {"batch_size": 8, "max_epochs": 100, "lr": 0.01, "hidden_units": 100}
    assert space.refine(SHALLOW, best) == {
        "batch_size": [6, 8, 11],  # 5.7 and 11.3: the axis doubles from value to value
        "max_epochs": [71, 100],
        "lr": [0.00316228, 0.01, 0.0316228],
        "hidden_units": [71, 100],
    }


def test_refine_halves_even_steps_and_leaves_words_alone() -> None:
    axes = {"width": [10, 20, 30], "optimizer": ["sgd", "adam"], "flag": [True, False]}
    best = {"width": 20, "optimizer": "adam", "flag": False}
    assert space.refine(axes, best) == {
        "width": [15, 20, 25],
        "optimizer": ["adam"],
        "flag": [False],
    }


def test_refining_again_ends_at_a_point() -> None:
    axes, best = {"width": [10, 20]}, {"width": 20}
    for _ in range(10):
        axes = space.refine(axes, best)
    assert axes["width"] in ([19, 20], [20])


def test_best_averages_over_seeds_and_breaks_ties_by_loss_then_order() -> None:
    scored = [
        ({"lr": 0.1, "seed": 0}, Score(0.9, 0.3)),
        ({"lr": 0.1, "seed": 1}, Score(0.7, 0.3)),
        ({"lr": 0.2, "seed": 0}, Score(0.8, 0.2)),
        ({"lr": 0.2, "seed": 1}, Score(0.8, 0.2)),
        ({"lr": 0.3, "seed": 0}, Score(0.95, 0.1)),
        ({"lr": 0.4, "seed": 0}, Score(0.8, 0.2)),
    ]
    assert space.best(scored, 4) == [{"lr": 0.3}, {"lr": 0.2}, {"lr": 0.4}, {"lr": 0.1}]


def test_an_id_follows_from_the_parameters_whatever_their_order() -> None:
    a, b = Trial({"lr": 0.1, "seed": 0}, 0), Trial({"seed": 0, "lr": 0.1}, 7, round=2)
    assert a.id == b.id
    assert Trial({"lr": 0.1, "seed": 1}, 0).id != a.id
    (trials,) = space.rounds(SHALLOW, {"name": "grid"}, seeds=[0, 1, 2])
    assert len({trial.id for trial in trials}) == 3 * 384
    assert [trial.number for trial in trials] == list(range(3 * 384))


def scores(trials: list[Trial], accuracy: Callable[[Mapping[str, Any]], float]) -> dict[str, Score]:
    return {trial.id: Score(accuracy(trial.params), 0.0) for trial in trials}


def test_refining_rounds_train_no_model_twice_and_close_in() -> None:
    axes = {"lr": [0.001, 0.01, 0.1], "hidden_units": [10, 50, 100]}
    done = {}

    def accuracy(params: Mapping[str, Any]) -> float:
        return -abs(params["lr"] - 0.02) - abs(params["hidden_units"] - 80) / 1000

    for number in range(3):
        planned = list(space.rounds(axes, {"name": "refine", "rounds": 3}, scores=done))
        assert len(planned) == number + 1
        done |= scores(planned[-1], accuracy)
    planned = list(space.rounds(axes, {"name": "refine", "rounds": 3}, scores=done))
    trials = [trial for trials in planned for trial in trials]
    assert len({trial.id for trial in trials}) == len(trials) == 9 + 5 + 5
    winner = max(trials, key=lambda trial: accuracy(trial.params))
    assert winner.params == {"lr": 0.0177828, "hidden_units": 75, "seed": 0}


def test_the_second_round_trains_the_best_again_for_longer() -> None:
    axes = {"hidden_units": [10, 20, 30]}
    plan = {"fixed": {"max_epochs": 10}, "second_round": {"best": 2, "max_epochs": 50}}
    (first,) = space.rounds(axes, {"name": "grid"}, **plan)
    done = scores(first, lambda params: params["hidden_units"])
    done[first[2].id] = None  # the widest failed
    _, second = space.rounds(axes, {"name": "grid"}, **plan, scores=done)
    assert [t.params["hidden_units"] for t in second] == [20, 10]
    assert {t.params["max_epochs"] for t in second} == {50}
    assert [t.number for t in second] == [3, 4]


def test_a_round_without_any_success_is_the_last() -> None:
    axes = {"hidden_units": [10, 20]}
    plan = {"second_round": {"best": 2, "max_epochs": 50}}
    (first,) = space.rounds(axes, {"name": "grid"}, **plan)
    done = dict.fromkeys(trial.id for trial in first)
    assert len(list(space.rounds(axes, {"name": "grid"}, **plan, scores=done))) == 1


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, "empty"),
        ({"lr": []}, "lr has no values"),
        ({"lr": [0.1, 0.1]}, "0.1 twice"),
        ({"lr": 0.1}, "an axis is a list"),
        ({"lr": "0.1"}, "an axis is a list"),
        ({"lr": {"low": 1, "high": 0}}, "a range is"),
        ({"lr": {"low": 0, "high": 1, "base": 2}}, "a range is"),
        ({"lr": {"low": 0, "high": 1, "log": True}}, "must be positive"),
    ],
)
def test_a_contradictory_space_is_refused(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space.check(axes, ranges=True)


def test_a_grid_refuses_ranges() -> None:
    with pytest.raises(ValueError, match="needs a list"):
        space.check({"lr": {"low": 0.1, "high": 1}})


def test_enumeration_imports_no_framework() -> None:
    code = "import sys, mnist_lightning.space; print({'torch', 'lightning'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.strip() == "set()"
