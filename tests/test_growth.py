"""Searches that grow: what is done is kept to the byte, and only what is new is trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_search import of, without_time

from mnist_lightning.__main__ import main
from mnist_lightning.search import space
from mnist_lightning.search.command import run
from mnist_lightning.search.leases import open_storage
from mnist_lightning.search.plan import Search
from mnist_lightning.search.results import Results, load_results
from mnist_lightning.search.worker import Worker
from mnist_lightning.training.population import PopulationTraining


def search(**changes: Any) -> Search:
    settings = {
        "name": "grown",
        "model": "ShallowNetwork",
        "space": {"lr": [0.1, 0.01], "hidden_units": [5, 8]},
        "fixed": {"max_epochs": 1, "batch_size": 64},
        "data": {"source": "digits"},
    }
    return Search(**{**settings, **changes})


LARGER = {
    "space": {"lr": [0.1, 0.03, 0.01], "hidden_units": [5, 8], "max_epochs": [1, 2]},
    "fixed": {"batch_size": 64},
    "seeds": (0, 1),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search; to be read only."""
    folder = tmp_path_factory.mktemp("growth") / "small"
    run(search(), folder, workers=0)
    return folder


@pytest.fixture(scope="module")
def larger(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it grew to; to be read only."""
    folder = shutil.copytree(small, tmp_path_factory.mktemp("growth") / "larger")
    run(search(**LARGER), folder, workers=0)
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of networks of each population that begins to train."""
    seen = []
    run_epoch = PopulationTraining.run_epoch

    def noted(self: PopulationTraining) -> None:
        if self.epoch == 0:
            seen.append(len(self.members))
        run_epoch(self)

    monkeypatch.setattr(PopulationTraining, "run_epoch", noted)
    return seen


def files(folder: Path) -> dict[Path, bytes]:
    kept = [*(folder / "trials").iterdir(), *(folder / "checkpoints").glob("[!b]*.ckpt")]
    return {file.relative_to(folder): file.read_bytes() for file in kept}


def test_what_is_there_is_kept_to_the_byte_and_the_rest_is_trained(
    small: Path, larger: Path
) -> None:
    before, after = files(small), files(larger)
    assert {name: after[name] for name in before} == before
    records = of(larger)
    kept = {record["id"] for record in of(small)}
    assert [record["id"] in kept for record in records] == [True] * 4 + [False] * 20
    assert [record["number"] for record in records] == list(range(24))
    expected = space.grid({**LARGER["space"], "seed": [0, 1]})
    trained = [
        {**{name: r["params"][name] for name in LARGER["space"]}, "seed": r["seed"]}
        for r in records
    ]
    assert sorted(map(str, trained)) == sorted(map(str, expected))


def test_no_network_is_trained_again(
    small: Path, tmp_path: Path, trained: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(small, tmp_path / "copy")
    run(search(seeds=(0, 1)), folder, workers=0)
    assert trained == [4]
    said = capsys.readouterr().out
    assert f"{folder} grows: seeds\n" in said
    assert "holds 4 trials of 8; trains 4: 4 networks in 1 population; 1 worker\n" in said
    run(search(seeds=(0, 1)), folder, workers=0)
    assert "holds all its 8 trials: nothing to train" in capsys.readouterr().out
    run(search(**LARGER), folder, workers=0)
    assert sorted(trained) == [4, 6, 6]  # 3 rates by 2 sizes, the longest training each
    run(search(**{**LARGER, "seeds": (1, 0, 2)}), folder, workers=0)
    assert sorted(trained) == [4, 6, 6, 6]


def test_an_interrupted_search_grows_without_another_bit(
    small: Path, larger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was interrupted within a unit, which continues from its state."""
    monkeypatch.setattr("mnist_lightning.search.worker.SNAPSHOT_SECONDS", 0.0)
    begun = search(space={**LARGER["space"], "lr": [0.1, 0.01]}, fixed={"batch_size": 64})
    whole = of_run(begun, tmp_path / "whole")
    run_epoch, epochs = PopulationTraining.run_epoch, []

    def cut(self: PopulationTraining) -> None:
        epochs.append(self.epoch)
        if self.epoch == 1 and len(epochs) == 2:
            raise KeyboardInterrupt
        run_epoch(self)

    monkeypatch.setattr(PopulationTraining, "run_epoch", cut)
    with pytest.raises(KeyboardInterrupt):
        run(begun, tmp_path / "cut", workers=0)
    grown = of_run(search(**LARGER), tmp_path / "cut")
    assert sorted(epochs) == [0] * 3 + [1] * 4  # no first epoch again
    ids = {record["id"] for record in whole}
    assert [r for r in grown if r["id"] in ids] == whole
    assert len(grown) == 24


def of_run(wanted: Search, folder: Path) -> list[dict]:
    return without_time(run(wanted, folder, workers=0))


@pytest.mark.slow
def test_a_grown_search_is_the_same_with_two_workers(
    small: Path, larger: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(small, tmp_path / "copy")
    run(search(**LARGER), folder, workers=2)
    assert without_time(of(folder)) == without_time(of(larger))


RANDOM = {"space": {"lr": {"low": 0.01, "high": 0.1, "log": True}, "hidden_units": [5, 8, 11]}}


def drawn(n: int, **axes: dict[str, Any]) -> Search:
    return search(space={**RANDOM["space"], **axes}, strategy={"name": "random", "n": n, "seed": 3})


def test_random_points_go_on_with_the_sequence(tmp_path: Path) -> None:
    run(drawn(3), tmp_path / "grown", workers=0)
    run(drawn(5), tmp_path / "grown", workers=0)
    points = [{name: r["params"][name] for name in RANDOM["space"]} for r in of(tmp_path / "grown")]
    assert points == space.random(RANDOM["space"], 5, 3)
    wider = {"lr": {"low": 0.001, "high": 0.1, "log": True}}
    records = run(drawn(7, **wider), tmp_path / "grown", workers=0)
    assert len(records) == 7
    assert [r["params"] for r in records[:5]] == [r["params"] for r in of(tmp_path / "grown")][:5]


def test_the_order_of_the_axes_draws_no_other_points(tmp_path: Path, trained: list[int]) -> None:
    records = run(drawn(3), tmp_path, workers=0)
    turned = {name: RANDOM["space"][name] for name in reversed(RANDOM["space"])}
    assert space.random(turned, 3, 3) != space.random(RANDOM["space"], 3, 3)
    again = run(search(space=turned, strategy=drawn(3).strategy), tmp_path, workers=0)
    assert again == records
    assert trained == [3]


def sampled(n: int, **changes: Any) -> Search:
    axes = {"lr": {"low": 1e-6, "high": 0.1, "log": True}, "hidden_units": [5, 8]}
    settings = {"sampler_args": {"n_startup_trials": 2}, "pruner_args": {"n_startup_trials": 2}}
    strategy = {"name": "optuna", "n": n, "pruner": "MedianPruner", **settings}
    fixed = {"max_epochs": 3, "batch_size": 64}
    return search(**{"space": axes, "strategy": strategy, "fixed": fixed, **changes})


def test_optuna_draws_on_as_if_it_had_known_all_along(tmp_path: Path) -> None:
    at_once = of_run(sampled(8), tmp_path / "at once")
    assert {record["state"] for record in at_once} == {"COMPLETE", "PRUNED"}
    run(sampled(5), tmp_path / "grown", workers=0)
    assert of_run(sampled(8), tmp_path / "grown") == at_once
    # and where the index is lost, from the records
    run(sampled(5), tmp_path / "lost", workers=0)
    (tmp_path / "lost" / "journal.log").unlink()
    assert of_run(sampled(8), tmp_path / "lost") == at_once


def test_optunas_axes_grow_also_those_of_categories(tmp_path: Path) -> None:
    """Optuna's studies refuse that: each space has its own study, and learns from the others."""
    folder = tmp_path / "grown"
    before = of_run(sampled(4), folder)
    axes = {"lr": {"low": 1e-6, "high": 0.5, "log": True}, "hidden_units": [5, 8, 11]}
    after = of_run(sampled(9, space=axes), folder)
    assert after[:4] == before
    assert len(after) == 9
    studies = {s.study_name: s for s in open_storage(None, folder).get_all_studies()}
    counts = [
        len(open_storage(None, folder).get_all_trials(study._study_id))
        for name, study in studies.items()
        if "/" not in name
    ]
    assert sorted(counts) == [4, 9]
    more = {**axes, "batch_size": [64, 32]}
    assert len(run(sampled(10, space=more, fixed={"max_epochs": 3}), folder, workers=0)) == 10


def test_an_interrupted_sampling_draws_its_own_from_its_own_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "grown"
    run(sampled(2), folder, workers=0)
    asked = sampled(3)
    with monkeypatch.context() as cut:
        cut.setattr(Worker, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(asked, folder, workers=0)
    axes = {"lr": {"low": 1e-6, "high": 0.5, "log": True}, "hidden_units": [5, 8, 11]}
    records = of_run(sampled(5, space=axes), folder)
    assert of_run(asked, tmp_path / "alone")[2] == records[2]


@pytest.mark.parametrize("strategy", ["grid", pytest.param("refine", marks=pytest.mark.slow)])
def test_later_rounds_follow_from_the_grown_first(strategy: str, tmp_path: Path) -> None:
    plan = {"strategy": {"name": strategy}, "second_round": {"best": 1, "max_epochs": 3}}
    if strategy == "refine":
        plan = {"strategy": {"name": "refine", "rounds": 2}}
    before = run(search(**plan), tmp_path / "grown", workers=0)
    axes = {"lr": [0.1, 0.01, 0.3, 0.6], "hidden_units": [5, 8, 20]}
    after = run(search(**plan, space=axes, seeds=(0, 1)), tmp_path / "grown", workers=0)
    assert [r for r in after if r["id"] in {b["id"] for b in before}] == before
    assert len({record["number"] for record in after}) == len(after)
    fresh = run(search(**plan, space=axes, seeds=(0, 1)), tmp_path / "fresh", workers=0)
    assert {r["id"] for r in fresh} <= {r["id"] for r in after}
    assert run(search(**plan, space=axes, seeds=(0, 1)), tmp_path / "grown", workers=0) == after


OWN = {"lr": [0.1, 0.01], "hidden_units": [5, 8]}
DEEP = {"lr": [0.1, 0.01], "hidden_units.1": [5], "hidden_units.2": [5]}


@pytest.mark.parametrize(
    ("space", "fixed", "changes", "message"),
    [
        ({**OWN, "lr": [0.1]}, {}, {}, r"space.lr is \[0.1, 0.01\], not \[0.1\]"),
        ({"lr": [0.1, 0.01]}, {"hidden_units": 5}, {}, r"space.hidden_units is \[5, 8\], not 5"),
        (OWN, {"max_epochs": 2}, {}, r"as an axis, space.max_epochs: \[1, 2\], it would grow"),
        ({**OWN, "batch_size": [32]}, {}, {}, r"fixed.batch_size is 64, not \[32\]"),
        ({**OWN, "optimizer": ["sgd", "adam"]}, {}, {}, "leaves optimizer to its default"),
        (OWN, {}, {"data": {"source": "digits", "split_seed": 1}}, "data.split_seed is 0, not 1"),
        (OWN, {}, {"seeds": (1,)}, r"seeds is \[0\], not \[1\]"),
        (OWN, {}, {"objective": "best_val_acc"}, "objective is"),
        (DEEP, {}, {"model": "DeepNetwork"}, 'model is "ShallowNetwork"'),
        (OWN, {}, {"strategy": {"name": "refine"}}, 'strategy.name is "grid", not "refine"'),
    ],
)
def test_what_contradicts_the_trials_is_refused(
    small: Path,
    tmp_path: Path,
    space: dict[str, Any],
    fixed: dict[str, Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    folder = shutil.copytree(small, tmp_path / "copy")
    fixed = {"max_epochs": 1, "batch_size": 64, **fixed}
    fixed = {name: value for name, value in fixed.items() if name not in space}
    with pytest.raises(ValueError, match=f"holds another search: .*{message}.*--folder") as caught:
        run(search(space=space, fixed=fixed, **changes), folder, workers=0)
    assert len(str(caught.value).splitlines()) <= 2
    assert files(folder) == files(small)
    assert (folder / "search.json").read_text() == (small / "search.json").read_text()


def test_it_does_not_shrink_back(larger: Path) -> None:
    with pytest.raises(ValueError, match="holds another search"):
        run(search(), larger, workers=0)


def test_a_wider_space_needs_more_draws(tmp_path: Path) -> None:
    run(drawn(2), tmp_path, workers=0)
    with pytest.raises(ValueError, match="only with more than 2 trials"):
        run(drawn(2, hidden_units=[5, 8, 11, 14]), tmp_path, workers=0)


# Several workers and machines


def test_a_worker_of_the_old_definition_finds_its_trials_done(
    larger: Path, tmp_path: Path, trained: list[int]
) -> None:
    """It began before the search grew, and continues beside the workers of the new one."""
    folder = shutil.copytree(larger, tmp_path / "copy")
    before = files(folder)
    storage = open_storage(None, folder)
    names = [study.study_name for study in storage.get_all_studies() if "/" in study.study_name]
    key = names[0].split("/")[0]
    Worker(search(), key, Results(folder), storage, "cpu", 1, lambda *_: None).work()
    assert trained == []
    assert files(folder) == before


def test_a_search_that_is_running_ends_as_it_began_when_its_folder_grows(
    small: Path, larger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wanted = tmp_path / "running", search(**LARGER)
    run_epoch = PopulationTraining.run_epoch

    def grows_meanwhile(self: PopulationTraining) -> None:
        run_epoch(self)
        Results(folder).open(wanted.definition(wanted.load_data()))

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(PopulationTraining, "run_epoch", grows_meanwhile)
        assert of_run(search(), folder) == without_time(of(small))
    assert of_run(wanted, folder) == without_time(of(larger))


@pytest.mark.parametrize("earlier", ["a word", [1], [{}], [{"space": {}}]])
def test_a_damaged_history_is_named(larger: Path, tmp_path: Path, earlier: Any) -> None:
    folder = shutil.copytree(larger, tmp_path / "copy")
    definition = json.loads((folder / "search.json").read_text())
    (folder / "search.json").write_text(json.dumps({**definition, "grown_from": earlier}))
    with pytest.raises(ValueError, match=r"search\.json is damaged \(grown_from\)"):
        run(search(**LARGER), folder, workers=0)


@pytest.mark.slow
def test_a_report_tells_that_it_grew(larger: Path, tmp_path: Path) -> None:
    assert main(["report", str(larger), "--out", str(tmp_path / "report")]) == 0
    report = (tmp_path / "report" / "README.md").read_text()
    assert "- `larger`: ShallowNetwork, 24 finished\n" in report
    assert "- trials: 24 finished\n" in report
    assert "- grew: 20" in report


def test_both_definitions_lease_the_same_units(small: Path, larger: Path) -> None:
    keys = {
        study.study_name.split("/")[0]
        for folder in (small, larger)
        for study in open_storage(None, folder).get_all_studies()
        if "/" in study.study_name
    }
    assert len(keys) == 1


def test_machines_with_folders_of_their_own_grow_together(
    tmp_path: Path, trained: list[int]
) -> None:
    """Each trial is trained once: one machine grows, one joins it, one has grown by itself."""
    storage = str(tmp_path / "shared.log")
    run(search(), tmp_path / "one", workers=0, storage=storage)
    run(search(), tmp_path / "two", workers=0, storage=storage)
    run(search(seeds=(0, 1)), tmp_path / "one", workers=0, storage=storage)
    assert trained == [4, 4]
    run(search(seeds=(0, 1)), tmp_path / "two", workers=0, storage=storage)
    run(search(seeds=(0, 1)), tmp_path / "three", workers=0, storage=storage)
    assert trained == [4, 4]
    assert of(tmp_path / "one") == of(tmp_path / "two") == of(tmp_path / "three")


def test_the_table_of_a_grown_search_is_whole(larger: Path) -> None:
    table = load_results(larger)
    assert len(table) == 24
    assert table[["lr", "hidden_units", "max_epochs", "batch_size"]].notna().all().all()
