"""Searches, on the digits: quick, and small enough to be known in every detail."""

import errno
import gzip
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pytest
import searches
import torch
import yaml
from conftest import trainer
from lightning.pytorch import seed_everything

from mnist_lightning import MNISTDataModule
from mnist_lightning.__main__ import main
from mnist_lightning.data import module
from mnist_lightning.models.convolution import ConvNetwork
from mnist_lightning.models.multilayer import ShallowNetwork
from mnist_lightning.models.perceptron import Perceptron
from mnist_lightning.search import leases, plan, space, worker
from mnist_lightning.search.command import _print_best, read, run
from mnist_lightning.search.leases import Lease, LeaseLost, Leases, StorageLost, open_storage
from mnist_lightning.search.plan import Search, rounds, units
from mnist_lightning.search.progress import Progress
from mnist_lightning.search.results import (
    CURVES,
    Results,
    load_curves,
    load_results,
    sealed,
    unsealed,
)
from mnist_lightning.training.freezing import LayerFreezing
from mnist_lightning.training.population import PopulationTraining

CONFIGS = sorted((Path(__file__).parent.parent / "configs" / "search").glob("*.yaml"))
AXES = {
    "batch_size": [16, 64],
    "max_epochs": [1, 3],
    "lr": [0.1, 0.01],
    "hidden_units": [5, 8],
}


def small(**changes: Any) -> Search:
    settings = {
        "name": "small",
        "model": "ShallowNetwork",
        "space": AXES,
        "data": {"source": "digits"},
    }
    return Search(**{**settings, **changes})


FIXED = {"max_epochs": 1}
DEEP = {"hidden_units.1": 5, "hidden_units.2": 5}


def one_trial(**changes: Any) -> Search:
    return small(space={"lr": [0.1]}, fixed={"max_epochs": 1, "batch_size": 64}, **changes)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "found"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed search with one worker; to be read only."""
    folder = tmp_path_factory.mktemp("finished") / "small"
    run(small(), folder, workers=0)
    return folder


def without_time(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def of(folder: Path) -> list[dict]:
    curves = json.loads(gzip.decompress((folder / "curves.json.gz").read_bytes()))
    records = json.loads((folder / "results.json").read_text())
    return [{**record, "curves": curves[record["id"]]} for record in records]


# What comes out


def test_every_combination_is_a_row(finished: Path) -> None:
    records = of(finished)
    assert [record["params"] for record in records] == space.grid(AXES)
    assert {record["state"] for record in records} == {"COMPLETE"}
    for record in records:
        epochs = record["params"]["max_epochs"]
        assert record["epochs"] == epochs
        for curve in record["curves"].values():
            assert len(curve) == epochs
        accuracies = record["curves"]["val_acc"]
        assert record["val_acc"] == accuracies[-1]
        assert record["best_val_acc"] == max(accuracies) == accuracies[record["best_epoch"] - 1]


def test_short_trainings_are_read_off_the_long_ones(finished: Path) -> None:
    curves = {json.dumps(record["params"]): record["curves"] for record in of(finished)}
    for params in space.grid({**AXES, "max_epochs": [1]}):
        longer = curves[json.dumps({**params, "max_epochs": 3})]
        assert curves[json.dumps(params)] == {name: curve[:1] for name, curve in longer.items()}


def test_a_search_of_short_trainings_alone_finds_the_same_bits(
    finished: Path, folder: Path
) -> None:
    alone = run(small(space={**AXES, "max_epochs": [1]}), folder, workers=0)
    nested = {record["id"]: record["curves"] for record in of(finished)}
    assert len(alone) == 8
    for record in alone:
        assert record["curves"] == nested[record["id"]]


def test_results_load_as_a_table(finished: Path) -> None:
    table = load_results(finished)
    assert len(table) == 16
    assert {*AXES, "val_acc", "seconds", "state", "seed", "curves"} <= set(table.columns)
    assert table["lr"].dtype == float
    assert table.equals(load_results(finished / "results.json"))
    header, *rows = (finished / "results.csv").read_text().splitlines()
    assert header.split(",")[:6] == ["id", "number", "round", "state", "seed", "batch_size"]
    assert len(rows) == 16


def test_results_are_loaded_as_a_report_is_and_hold_numbers(finished: Path, folder: Path) -> None:
    """Several searches, or the folder that holds them; also where every trial failed."""
    several = folder / "several"
    shutil.copytree(finished, several / "small")
    failed = small(model="DeepNetwork", space={"lr": [1e30]}, fixed={**FIXED, **DEEP}, name="bad")
    run(failed, several / "bad", workers=0)
    table = load_results(several)
    assert table["search"].tolist() == ["bad"] + ["small"] * 16
    assert table.equals(load_results(several / "bad", str(several / "small")))
    texts = {"search", "id", "state", "error", "curves"}
    for part in (table, load_results(several / "bad")):
        numeric = set(part.select_dtypes("number").columns)
        assert set(part.columns) - numeric == texts
    curves = load_curves(several)
    assert set(curves.select_dtypes("number").columns) == {"epoch", *CURVES}
    last = curves[curves["search"] == "small"].groupby("id", sort=False).last()
    trials = table[table["search"] == "small"].set_index("id")
    for name in CURVES:
        assert last[name].tolist() == trials[name].tolist()
    assert last["epoch"].tolist() == trials["max_epochs"].tolist()
    assert curves[curves["search"] == "bad"]["train_loss"].isna().any()


def val_acc(checkpoint: Path) -> float:
    """The validation accuracy of a checkpoint's weights, computed without the search's code."""
    model = ShallowNetwork.load_from_checkpoint(checkpoint).eval()
    data = MNISTDataModule(source="digits")
    data.setup()
    with torch.no_grad():
        scores = model(data.preprocess(data.val_set.images))
    return float((scores.argmax(1) == data.val_set.labels).double().mean())


def test_every_trial_has_a_checkpoint_that_is_worth_what_it_says(finished: Path) -> None:
    for record in of(finished):
        assert val_acc(finished / "checkpoints" / f"{record['id']}.ckpt") == record["val_acc"]


def test_the_winner_is_the_best_and_can_be_tested(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(finished, tmp_path / "lightning_logs" / "search" / "small")
    best = max(of(copy), key=lambda r: (r["val_acc"], -r["val_loss"]))
    assert val_acc(copy / "checkpoints" / "best.ckpt") == best["val_acc"]
    assert main(["test", "--ckpt_path", "lightning_logs/search/small"]) == 0
    assert "test/acc" in capsys.readouterr().out
    checkpoint = torch.load(copy / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["search"] == {"name": "small", "trial": best["id"]}
    assert checkpoint["epoch"] == best["params"]["max_epochs"] - 1
    batches = -(-1294 // best["params"]["batch_size"])
    assert checkpoint["global_step"] == batches * best["params"]["max_epochs"]


def test_with_best_val_acc_the_weights_are_those_of_the_best_epoch(folder: Path) -> None:
    axes = {"lr": [0.5, 0.9], "batch_size": [4]}  # unsteady: the last epoch is rarely the best
    wanted = small(space=axes, fixed={"max_epochs": 6}, objective="best_val_acc")
    records = run(wanted, folder, workers=0)
    assert any(record["best_epoch"] < 6 for record in records)
    for record in records:
        checkpoint = folder / "checkpoints" / f"{record['id']}.ckpt"
        assert val_acc(checkpoint) == record["best_val_acc"]
        assert torch.load(checkpoint, weights_only=True)["epoch"] == record["best_epoch"] - 1


def test_tensorboard_gets_a_few_numbers_and_the_hyper_parameters(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = of(finished)[3]
    events = EventAccumulator(str(finished / "tensorboard" / f"0003-{record['id']}")).Reload()
    assert events.Tags()["scalars"] == [
        "val/acc",
        "val/loss",
        "best/val_acc",
        "run/epochs",
        "run/seconds",
    ]
    assert events.Scalars("val/acc")[0].value == pytest.approx(record["val_acc"])
    assert len(list((finished / "tensorboard").iterdir())) == 16 + 1  # and the table's columns


def test_seeds_are_trials_of_their_own_and_the_best_mean_wins(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = run(small(seeds=(0, 1, 2), space={**AXES, "max_epochs": [1]}), folder, workers=0)
    assert len(records) == 24
    assert Counter(record["seed"] for record in records) == {0: 8, 1: 8, 2: 8}
    means = load_results(folder).groupby(["batch_size", "lr", "hidden_units"])["val_acc"].mean()
    winner = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["search"]["trial"]
    row = next(record for record in records if record["id"] == winner)
    winning = tuple(row["params"][name] for name in ("batch_size", "lr", "hidden_units"))
    assert means.idxmax() == winning


def test_the_table_has_a_row_for_each_configuration_the_winner_first(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = {"lr": [0.006097378631749905, 0.1], "hidden_units": [5, 8]}
    wanted = small(
        space=axes,
        fixed={"max_epochs": 2, "batch_size": 64},
        seeds=(0, 1, 2),
        objective="best_val_acc",
    )
    records = run(wanted, folder, workers=0)
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("validation accuracy"))
    head, *rows = lines[start : start + 5]
    assert re.split(" {2,}", head) == [
        "validation accuracy, best epoch",
        "n",
        "best trial",
        "configuration",
    ]
    expected = []
    for params in space.grid(axes):
        alike = [r for r in records if params.items() <= r["params"].items()]
        accuracies = [r["best_val_acc"] for r in alike]
        best = max(alike, key=lambda r: r["best_val_acc"])
        text = f"lr {params['lr']:.2g}, hidden_units {params['hidden_units']}"
        spread = f"{statistics.mean(accuracies):.4f} ± {statistics.stdev(accuracies):.4f}"
        expected.append([spread, "3", best["id"], text])
    expected.sort(key=lambda row: row[0], reverse=True)
    assert [re.split(" {2,}", row) for row in rows] == expected
    assert "lr 0.0061" in " ".join(rows)
    winner = next(line.split()[1] for line in lines if line.startswith("winner"))
    assert winner == expected[0][2]


def test_one_is_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And before the first trial is done, no time left is shown."""
    wanted = one_trial()
    results = Results(folder)
    results.open({})
    progress = Progress(wanted, results, 1000)
    progress._said = progress._shown = -1e9
    progress.show()
    assert capsys.readouterr().out.splitlines() == ["0/1 trials"]
    run(wanted, folder.parent / "other", workers=0)
    said = capsys.readouterr().out
    assert "trains 1 trial: 1 network in 1 population; 1 worker\n" in said


def test_the_time_left_follows_from_the_work_that_is_done(
    folder: Path, clock: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    results = Results(folder)
    results.open({})
    progress = Progress(small(), results, 1000)
    longer, shorter = units(small(), rounds(small(), {})[0], 1000)
    progress.note(longer.name, 0.0)
    clock["now"] += 40
    progress.note(longer.name, 1.0)
    progress.show()
    assert capsys.readouterr().out == f"0/16 trials, {40 * shorter.work / longer.work:.0f} s left\n"


def test_what_files_hold_cannot_steer_the_terminal(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    for number, file in enumerate(sorted((copy / "trials").iterdir())):
        record = json.loads(file.read_text())
        if number:
            record["params"] = {**record["params"], "lr": "\x1b[2J\x1b]0;title\x07"}
        else:
            record |= {"state": "FAIL", "error": "\x1b[31m\x9b5n"}
        file.write_text(json.dumps(sealed(record)))
    _print_best(small(), Results(copy).in_order())
    said = capsys.readouterr().out
    assert "\\x1b[2J" in said
    assert "\\x1b[31m\\x9b5n" in said
    assert all(c.isprintable() or c == "\n" for c in said)


# Interrupted, resumed, shared


def test_a_finished_search_does_no_work(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    before = {file: file.read_bytes() for file in (copy / "trials").iterdir()}
    monkeypatch.setattr(PopulationTraining, "run_epoch", lambda self: pytest.fail("trained"))
    assert run(small(), copy) == of(finished)
    assert before == {file: file.read_bytes() for file in (copy / "trials").iterdir()}


def test_an_interrupted_search_goes_on_where_it_stopped(
    finished: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(worker, "SNAPSHOT_SECONDS", 0.0)
    epochs = []
    run_epoch = PopulationTraining.run_epoch

    def interrupted(self: PopulationTraining) -> None:
        epochs.append(self.epoch)
        if len(epochs) in (3, 5):
            raise KeyboardInterrupt
        run_epoch(self)

    monkeypatch.setattr(PopulationTraining, "run_epoch", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(small(), folder, workers=0)
        assert "the same command continues" in capsys.readouterr().out
    run(small(), folder, workers=0)
    assert without_time(of(folder)) == without_time(of(finished))
    assert epochs == [0, 1, 2, 2, 0, 0, 1, 2]  # two units of three epochs, and two that were cut
    assert not list((folder / "state").iterdir())


def test_a_deleted_trial_is_trained_again(
    finished: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "SNAPSHOT_SECONDS", 0.0)
    run_epoch = PopulationTraining.run_epoch

    def interrupted(self: PopulationTraining) -> None:
        if self.epoch == 2:
            raise KeyboardInterrupt
        run_epoch(self)

    monkeypatch.setattr(PopulationTraining, "run_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(small(), folder, workers=0)
    monkeypatch.undo()
    monkeypatch.chdir(folder.parent)
    for _ in range(2):  # in the middle of its unit, and after the end
        next((folder / "trials").iterdir()).unlink()
        (folder / "journal.log").unlink()
        run(small(), folder, workers=0)
        assert without_time(of(folder)) == without_time(of(finished))


@pytest.mark.slow
def test_two_workers_give_the_same_bits_as_one(finished: Path, folder: Path) -> None:
    run(small(), folder, workers=2)
    assert without_time(of(folder)) == without_time(of(finished))
    for file in (finished / "checkpoints").glob("*.ckpt"):
        ours = torch.load(folder / "checkpoints" / file.name, weights_only=True)["state_dict"]
        theirs = torch.load(file, weights_only=True)["state_dict"]
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_units_are_cut_at_a_size_and_lose_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = rounds(small(), {})[0]
    whole = units(small(), trials, 1000)
    assert [len(unit.trials) for unit in whole] == [8, 8]
    monkeypatch.setattr(plan, "UNIT_BYTES", 10_000)
    parts = units(small(), trials, 1000)
    assert len(parts) == 8
    ids = [trial.id for unit in parts for trial in unit.trials]
    assert sorted(ids) == sorted(trial.id for trial in trials)
    assert len({unit.name for unit in parts}) == 8


@pytest.mark.slow
def test_machines_without_a_common_folder_share_the_trials(
    finished: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage = str(folder.parent / "journal.log")
    run(small(), folder / "one", workers=1, storage=storage)
    monkeypatch.setattr(PopulationTraining, "run_epoch", lambda self: pytest.fail("trained"))
    run(small(), folder / "two", workers=1, storage=storage)
    assert without_time(of(folder / "two")) == without_time(of(finished))
    assert "on the machine that trained it" in capsys.readouterr().out


def test_a_lost_or_damaged_journal_is_made_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.setattr(PopulationTraining, "run_epoch", lambda self: pytest.fail("trained"))
    (copy / "journal.log").write_text("not a journal\nat all\n")
    run(small(), copy, workers=0)
    (copy / "journal.log").unlink()
    run(small(), copy, workers=0)
    study = optuna.load_study(
        study_name=None, storage=open_storage(None, copy)
    )  # the only one: no unit was leased
    assert sorted(t.value for t in study.trials) == sorted(r["val_acc"] for r in of(finished))


@pytest.fixture
def storage(tmp_path: Path) -> optuna.storages.BaseStorage:
    return open_storage(None, tmp_path)


def test_a_unit_that_was_cut_off_is_free_at_once(storage: optuna.storages.BaseStorage) -> None:
    lease = Leases(storage, "s").take("unit", ["a"])
    with pytest.raises(KeyboardInterrupt), lease.alive():
        raise KeyboardInterrupt
    assert isinstance(Leases(storage, "s").take("unit", ["a"]), Lease)


def test_a_unit_is_taken_once(storage: optuna.storages.BaseStorage) -> None:
    one, other = Leases(storage, "s"), Leases(storage, "s")
    lease = one.take("unit", ["a"])
    assert isinstance(lease, Lease)
    assert other.take("unit", ["a"]) is None
    record = {"id": "a", "val_acc": 0.5}
    lease.finish([record])
    assert other.take("unit", ["a"]) == {"a": record}


@pytest.mark.parametrize("here", [True, False], ids=["on this machine", "elsewhere"])
def test_the_unit_of_a_frozen_worker_is_free_after_a_while(
    storage: optuna.storages.BaseStorage, clock: dict[str, float], here: bool
) -> None:
    """Its process exists without a sign of life; when it wakes up, its lease is lost."""
    late = Leases(storage, "s").take("unit", ["a"])
    if not here:
        owned(storage, machine="elsewhere")
    watcher = Leases(storage, "s")
    for _ in range(4):
        assert watcher.take("unit", ["a"]) is None
        clock["now"] += leases.STALE_SECONDS / 3
    assert isinstance(watcher.take("unit", ["a"]), Lease)
    with pytest.raises(LeaseLost):
        late.check()


def test_a_lock_that_a_killed_process_left_is_taken_away(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a relative folder, which is the default."""
    Path("found").mkdir()
    now = 1000.0

    def waited(seconds: float = 0.001) -> float:
        nonlocal now
        now += seconds
        if now > 1060:
            pytest.fail("it waits for ever")
        return now

    monkeypatch.setattr(leases.time, "monotonic", waited)
    monkeypatch.setattr(leases.time, "sleep", waited)
    killed = open_storage(None, Path("found"))
    killed._storage._backend._lock.acquire()
    assert isinstance(Leases(open_storage(None, Path("found")), "s").take("unit", ["a"]), Lease)


def owned(storage: optuna.storages.BaseStorage, **changes: Any) -> None:
    """Another owner for the one unit that is taken."""
    (study,) = storage.get_all_studies()
    owner = {**study.user_attrs["owner"], **changes}
    storage.set_study_user_attr(study._study_id, "owner", owner)


def test_the_unit_of_a_dead_process_is_free_again(storage: optuna.storages.BaseStorage) -> None:
    Leases(storage, "s").take("unit", ["a"])
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    owned(storage, pid=child.pid, started="1")
    assert isinstance(Leases(storage, "s").take("unit", ["a"]), Lease)
    assert Leases(storage, "s").take("unit", ["a"]) is None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A clock that a test moves on."""
    clock = {"now": 1000.0}
    monkeypatch.setattr(leases.time, "monotonic", lambda: clock["now"])
    return clock


def test_the_unit_of_a_silent_machine_is_free_after_a_while(
    storage: optuna.storages.BaseStorage, clock: dict[str, float]
) -> None:
    Leases(storage, "s").take("unit", ["a"])
    owned(storage, machine="elsewhere")
    watcher = Leases(storage, "s")
    third = leases.STALE_SECONDS / 3
    for beat in (1, 1, 1, 2, 2, 2):  # a sign of life in between
        owned(storage, beat=beat)
        assert watcher.take("unit", ["a"]) is None
        clock["now"] += third
    assert watcher.take("unit", ["a"]) is None
    clock["now"] += 1
    assert isinstance(watcher.take("unit", ["a"]), Lease)


def test_an_observer_that_was_away_watches_anew(
    storage: optuna.storages.BaseStorage, clock: dict[str, float]
) -> None:
    """After a failure of the storage no worker has shown a sign of life, though all are alive."""
    Leases(storage, "s").take("unit", ["a"])
    owned(storage, machine="elsewhere")
    watcher = Leases(storage, "s")
    assert watcher.take("unit", ["a"]) is None
    clock["now"] += 2 * leases.STALE_SECONDS
    assert watcher.take("unit", ["a"]) is None


def test_a_container_with_the_same_hostname_is_another_machine(
    storage: optuna.storages.BaseStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes cannot be seen from here; that does not mean that they are dead."""
    readlink = os.readlink
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(
            leases.os, "readlink", lambda p: "pid:[1]" if "ns/pid" in str(p) else readlink(p)
        )
        Leases(storage, "s").take("unit", ["a"])
    owned(storage, pid=2**22 + 1)  # a number that no process here has
    assert Leases(storage, "s").take("unit", ["a"]) is None


def test_a_worker_that_returns_from_the_dead_writes_nothing(
    storage: optuna.storages.BaseStorage,
) -> None:
    """The other worker has read the records published until then, and publishes the rest itself."""
    one, other = {"id": "a", "by": "one"}, {"id": "b", "by": "other"}
    late = Leases(storage, "s").take("unit", ["a", "b"])
    late.publish(one)
    owned(storage, pid=2**22 + 1)
    taken = Leases(storage, "s").take("unit", ["a", "b"])
    assert taken.records == {"a": one}
    with pytest.raises(LeaseLost):
        late.check()
    with pytest.raises(LeaseLost):
        late.publish({"id": "b", "by": "one"})
    with pytest.raises(LeaseLost):
        late.finish([one, {"id": "b", "by": "one"}])
    taken.publish(other)
    taken.finish([one, other])
    assert Leases(storage, "s").take("unit", ["a", "b"]) == {"a": one, "b": other}


def test_a_late_worker_notices_that_its_unit_is_lost(
    finished: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two epochs, and adopts the other's results instead of its own."""
    first = of(finished)[0]
    unit = next(u for u in units(small(), rounds(small(), {})[0], 1) if first["id"] in u.ids)
    records = {r["id"]: r for r in of(finished) if r["id"] in unit.ids}
    run_epoch, others = PopulationTraining.run_epoch, []

    def taken_meanwhile(self: PopulationTraining) -> None:
        run_epoch(self)
        if not others and self.batch_size == first["params"]["batch_size"]:
            storage = open_storage(None, folder)
            name = next(
                n.study_name for n in storage.get_all_studies() if unit.name in n.study_name
            )
            with monkeypatch.context() as dead:
                dead.setattr(Leases, "_dead", lambda *_: True)
                others.append(Leases(storage, name.split("/")[0]).take(unit.name, unit.ids))
            others[0].finish(list(records.values()))

    monkeypatch.setattr(PopulationTraining, "run_epoch", taken_meanwhile)
    adopted = run(small(), folder, workers=0)
    assert others
    assert without_time(adopted) == without_time(of(finished))
    assert {r["id"]: r for r in adopted if r["id"] in records} == records  # the seconds too


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn one by one", "trained together"])
def test_a_late_trial_costs_the_search_no_more_than_an_early_one(
    drawn: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Functions that read all trials or all names are not called for each trial."""
    asked = Counter()

    def counted(owner: Any, name: str) -> None:
        ask = getattr(owner, name)

        def note(*args: Any, **kwargs: Any) -> Any:
            asked[name] += 1
            return ask(*args, **kwargs)

        monkeypatch.setattr(owner, name, note)

    monkeypatch.setattr("mnist_lightning.search.progress.SHOW_SECONDS", float("inf"))
    counted(Results, "records")
    counted(optuna.Study, "get_trials")
    counted(optuna, "create_study")
    strategy = {"name": "optuna", "n": 30, "sampler": "RandomSampler"}
    trained = run(
        small(
            space={"lr": [0.1 / (1 + i) for i in range(30)]},
            strategy=strategy if drawn else {"name": "grid"},
            fixed={"max_epochs": 1, "batch_size": 64, "hidden_units": 2},
        ),
        folder,
        workers=0,
    )
    assert len(trained) == 30
    assert max(asked.values()) < 15, asked


def death_of(lease: Lease, part: float = 0.0) -> None:
    if part:
        lease.continues_from(part)
    me = leases._process()
    assert Leases(lease._storage, "s").note_death(me["pid"], me["started"], "killed by SIGKILL")


def test_deaths_count_from_the_last_that_left_something_to_go_on_from(
    storage: optuna.storages.BaseStorage,
) -> None:
    seen = []
    for part in (0.0, 0.0, 0.25, 0.25, 0.25):
        lease = Leases(storage, "s").take("unit", ["a"])
        seen.append(len(lease.deaths))
        death_of(lease, part)
    assert seen == [0, 1, 2, 1, 2]
    assert len(Leases(storage, "s").take("unit", ["a"]).deaths) == 3


class Flaky:
    """A storage that fails a number of times."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times = error, times

    def get_all_studies(self) -> list:
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return []


def test_a_worker_that_starts_waits_for_a_storage_that_has_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []
    connect = leases._connect

    def refuse_twice(place: str) -> Any:
        tries.append(place)
        if len(tries) < 3:
            raise OSError(errno.ECONNREFUSED, "Connection refused")
        return connect(place)

    monkeypatch.setattr(leases, "_connect", refuse_twice)
    monkeypatch.setattr(leases.time, "sleep", lambda _: None)
    place = str(tmp_path / "journal.log")
    with pytest.raises(ValueError, match="cannot be reached: connection refused"):
        open_storage(place, tmp_path)
    tries.clear()
    assert open_storage(place, tmp_path, answered=True).get_all_studies() == []
    assert len(tries) == 3


def test_a_storage_that_comes_back_within_a_minute_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, clock: dict[str, float]
) -> None:
    monkeypatch.setattr(leases.time, "sleep", lambda s: clock.update(now=clock["now"] + s))
    error = optuna.exceptions.StorageInternalError("This is about something else.")
    error.__cause__ = OSError(errno.ECONNREFUSED, "Connection refused")
    assert leases._Patient(Flaky(error, 10), "storage x").get_all_studies() == []
    started = clock["now"]
    with pytest.raises(StorageLost, match="storage x does not answer: connection refused"):
        leases._Patient(Flaky(error, 1000), "storage x").get_all_studies()
    assert 50 < clock["now"] - started <= leases.PATIENCE_SECONDS
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StorageLost, match="storage x cannot be written: no space left on device"):
        leases._Patient(Flaky(full, 1), "storage x").get_all_studies()
    with pytest.raises(KeyError):  # an answer
        leases._Patient(Flaky(KeyError(1), 1), "storage x").get_all_studies()


def test_what_a_worker_finished_while_the_storage_was_away_is_shown_later(
    finished: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = str(folder.parent / "journal.log")

    def away(self: Lease, record: dict[str, Any]) -> None:
        raise StorageLost("storage x does not answer")

    with monkeypatch.context() as lost:
        lost.setattr(Lease, "publish", away)
        with pytest.raises(StorageLost):
            run(small(space={**AXES, "batch_size": [16]}), folder / "one", workers=0)
        assert len(list((folder / "one" / "trials").iterdir())) == 1  # it was written even so
    run(small(), folder / "two", workers=0)  # all done, in a storage of its own
    run(small(), folder / "two", workers=0, storage=storage)
    monkeypatch.setattr(PopulationTraining, "run_epoch", lambda self: pytest.fail("trained"))
    run(small(), folder / "three", workers=0, storage=storage)
    assert of(folder / "three") == of(folder / "two")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "../../x"}, "not trial"),
        ({"val_acc": 1.0, "best_val_acc": 1.0}, "val_acc is 1.0, but"),
        ({"curves": {}}, "the curves are"),
        ({"epochs": 7}, "a curve has not as many values"),
        ({"state": "DONE"}, "unknown state"),
        ({"params": {}}, "its parameters are"),
        ({"number": 100}, "it is number 100"),
        (None, "not trial"),
        ({"seconds": 1e6, "crc32": 1}, "its checksum is wrong"),
        ({"unheard of": 1}, "unknown field 'unheard of'"),
    ],
)
def test_a_false_trial_from_another_machine_is_trained_again(
    finished: Path,
    folder: Path,
    changes: dict[str, Any] | None,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage = str(folder.parent / "journal.log")
    run(small(), folder / "one", workers=0, storage=storage)
    id = of(finished)[0]["id"]
    shared = open_storage(storage, folder)
    for study in shared.get_all_studies():
        if record := study.user_attrs.get(f"trial {id}"):
            false = (
                "a word"
                if changes is None
                else {**sealed({**unsealed(record), **changes}), **changes}
            )
            shared.set_study_user_attr(study._study_id, f"trial {id}", false)
    run(small(), folder / "two", workers=0, storage=storage)
    assert f"an invalid trial {id} ({message}" in capsys.readouterr().out
    assert without_time(of(folder / "two")) == without_time(of(finished))
    assert not list(folder.rglob("x.json"))


# Other strategies, other models


def test_the_second_round_starts_from_the_best_of_the_first(folder: Path) -> None:
    again = small(space={**AXES, "max_epochs": [1]}, second_round={"best": 2, "max_epochs": 3})
    records = run(again, folder, workers=0)
    first = sorted((r for r in records if r["round"] == 0), key=lambda r: -r["val_acc"])
    second = [r for r in records if r["round"] == 1]
    assert len(first) == 8
    assert [r["params"] for r in second] == [{**r["params"], "max_epochs": 3} for r in first[:2]]


def test_refining_closes_in(folder: Path) -> None:
    axes = {"lr": [0.001, 0.01, 0.1], "hidden_units": [5, 20]}
    fixed = {"max_epochs": 1, "batch_size": 64}
    strategy = {"name": "refine", "rounds": 2}
    records = run(small(space=axes, fixed=fixed, strategy=strategy), folder, workers=0)
    assert [r["round"] for r in records].count(0) == 6
    best = max((r for r in records if r["round"] == 0), key=lambda r: r["val_acc"])
    finer = space.refine(axes, best["params"])
    second = [r["params"] for r in records if r["round"] == 1]
    assert second
    assert all(params[name] in finer[name] for params in second for name in axes)


def test_random_points_of_three_layers(folder: Path) -> None:
    axes = {
        "hidden_units.1": [5, 6],
        "hidden_units.2": {"low": 4, "high": 9},
        "lr": {"low": 0.01, "high": 0.1, "log": True},
    }
    strategy = {"name": "random", "n": 5, "seed": 1}
    wanted = small(
        model="DeepNetwork",
        space=axes,
        strategy=strategy,
        fixed={"max_epochs": 1, "batch_size": 64},
    )
    records = run(wanted, folder, workers=0)
    assert [{k: r["params"][k] for k in axes} for r in records] == space.random(axes, 5, 1)
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert len(checkpoint["hyper_parameters"]["hidden_units"]) == 2


def test_optunas_samplers_draw_and_its_pruners_give_up(folder: Path) -> None:
    axes = {"lr": {"low": 1e-6, "high": 0.1, "log": True}, "hidden_units": [5, 8]}
    strategy = {
        "name": "optuna",
        "n": 8,
        "sampler": "RandomSampler",
        "pruner": "MedianPruner",
        "pruner_args": {"n_startup_trials": 2},
    }
    wanted = small(space=axes, strategy=strategy, fixed={"max_epochs": 3, "batch_size": 64})
    records = run(wanted, folder, workers=0)
    assert [r["number"] for r in records] == list(range(8))
    assert len({r["params"]["lr"] for r in records}) == 8
    pruned = [r for r in records if r["state"] == "PRUNED"]
    assert pruned
    assert all(r["epochs"] < 3 for r in pruned)
    names = [s.study_name for s in optuna.get_all_study_summaries(open_storage(None, folder))]
    study = optuna.load_study(
        study_name=next(n for n in names if "/" not in n), storage=open_storage(None, folder)
    )
    assert Counter(t.state.name for t in study.trials) == Counter(r["state"] for r in records)
    # a lost index is rebuilt, and the search is still finished
    (folder / "journal.log").unlink()
    assert run(wanted, folder, workers=0) == records


@pytest.mark.parametrize(
    ("model", "args"),
    [
        ("Perceptron", {"lr": 0.001}),
        ("ShallowNetwork", {"lr": 0.01, "optimizer": "adam"}),
        ("ShallowNetwork", {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01}),
    ],
)
def test_other_models_are_what_the_trainer_makes_of_them(
    folder: Path, model: str, args: dict[str, float]
) -> None:
    axes = {name: [value] for name, value in args.items()}
    fixed = {"max_epochs": 2, "batch_size": 16}
    (record,) = run(small(model=model, space=axes, fixed=fixed), folder, workers=0)
    import lightning.pytorch as pl

    pl.seed_everything(0, verbose=False)
    lone = {"Perceptron": Perceptron, "ShallowNetwork": ShallowNetwork}[model](**args)
    alone = trainer(max_epochs=2)
    alone.fit(lone, MNISTDataModule(source="digits", batch_size=16))
    assert record["val_acc"] == pytest.approx(float(alone.callback_metrics["val/acc"]))
    assert record["train_loss"] == pytest.approx(
        float(alone.callback_metrics["train/loss"]), rel=1e-4
    )
    checkpoint = torch.load(folder / "checkpoints" / f"{record['id']}.ckpt", weights_only=True)
    for name, value in lone.state_dict().items():
        torch.testing.assert_close(checkpoint["state_dict"][name], value, rtol=1e-4, atol=1e-5)


def test_options_of_the_layer_freezing_are_axes(folder: Path) -> None:
    axes = {"freezing.batch_norm": ["frozen", "adapt"]}
    model = {"widths": [2, 3], "lr": 0.01, "optimizer": "sgd"}
    fixed = {"max_epochs": 1, "batch_size": 64, "freezing.freeze": FROZEN, **model}
    records = run(small(model="ConvNetwork", space=axes, fixed=fixed), folder, workers=0)
    for record in records:
        seed_everything(0, verbose=False)
        lone, norms = ConvNetwork(**model), record["params"]["freezing.batch_norm"]
        alone = trainer(callbacks=[LayerFreezing(freeze=FROZEN, batch_norm=norms)])
        alone.fit(lone, MNISTDataModule(source="digits", batch_size=64))
        assert record["val_loss"] == pytest.approx(float(alone.callback_metrics["val/loss"]))
        checkpoint = torch.load(folder / "checkpoints" / f"{record['id']}.ckpt", weights_only=True)
        for name, value in lone.state_dict().items():
            torch.testing.assert_close(checkpoint["state_dict"][name], value, rtol=1e-3, atol=1e-5)
    assert records[0]["val_loss"] != records[1]["val_loss"]


FROZEN = ["net.stage1.*"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freezing.batchnorm": ["adapt"]}, "freezing has no option batchnorm; did you mean batch"),
        ({"freezing.freeze": [["net.nothing"]]}, "no parameter matches 'net.nothing'"),
        ({"freezing.batch_norm": ["half"]}, "batch_norm must be frozen or adapt, got 'half'"),
    ],
)
def test_a_freezing_that_cannot_be_is_refused(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small(space=options, fixed={"max_epochs": 1}).check()


MOMENTUM = {
    "momentum": [0.0, 0.9],
    "weight_decay": [None, 0.001],
    "hidden_units": [5, 8],
    "max_epochs": [2, 3],
}


def with_momentum(**changes: Any) -> Search:
    return small(space=MOMENTUM, fixed={"lr": 0.02, "batch_size": 16}, **changes)


@pytest.fixture(scope="session")
def finished_with_momentum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``finished``."""
    folder = tmp_path_factory.mktemp("momentum") / "small"
    run(with_momentum(), folder, workers=0)
    return folder


def test_momentum_is_an_axis_of_networks_that_are_trained_together(
    finished_with_momentum: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trial is what the Trainer makes of it."""
    search, trials = with_momentum(), rounds(with_momentum(), {})[0]
    assert all(unit.together for unit in units(search, trials, 1000))
    monkeypatch.setattr(Search, "hidden_units", lambda self, params: None)
    run(search, folder, workers=0)
    together, alone = of(finished_with_momentum), of(folder)
    assert len(together) == len(alone) == 16
    for ours, theirs in zip(
        *(sorted(records, key=lambda r: r["id"]) for records in (together, alone)), strict=True
    ):
        assert (ours["id"], ours["state"]) == (theirs["id"], "COMPLETE")
        assert ours["val_acc"] == pytest.approx(theirs["val_acc"])
        for name in CURVES:
            assert ours["curves"][name] == pytest.approx(theirs["curves"][name], rel=1e-4)
        weights = [
            torch.load(at / "checkpoints" / f"{ours['id']}.ckpt", weights_only=True)["state_dict"]
            for at in (finished_with_momentum, folder)
        ]
        for name, value in weights[1].items():
            torch.testing.assert_close(weights[0][name], value, rtol=1e-4, atol=1e-5)


def test_an_interrupted_search_with_momentum_goes_on_to_the_bit(
    finished_with_momentum: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "SNAPSHOT_SECONDS", 0.0)
    epochs = []
    run_epoch = PopulationTraining.run_epoch

    def interrupted(self: PopulationTraining) -> None:
        epochs.append(self.epoch)
        if len(epochs) in (2, 4, 6, 9):
            raise KeyboardInterrupt
        run_epoch(self)

    monkeypatch.setattr(PopulationTraining, "run_epoch", interrupted)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            run(with_momentum(), folder, workers=0)
    run(with_momentum(), folder, workers=0)
    assert epochs == [0, 1, 1, 2, 2, 0, 0, 1, 2, 2]
    assert without_time(of(folder)) == without_time(of(finished_with_momentum))
    for file in (finished_with_momentum / "checkpoints").glob("*.ckpt"):
        ours = torch.load(folder / "checkpoints" / file.name, weights_only=True)["state_dict"]
        theirs = torch.load(file, weights_only=True)["state_dict"]
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_plain_networks_are_units_of_their_own_as_before_momentum_was_trained_together() -> None:
    """A search that an earlier version began goes on from that version's states."""
    trials = rounds(with_momentum(), {})[0]
    plain = [t for t in trials if not t.params["momentum"] and not t.params["weight_decay"]]
    (before,) = units(with_momentum(), plain, 1000)
    assert before.name == "round0-batch16-seed0"
    same, others = sorted(units(with_momentum(), trials, 1000), key=lambda unit: len(unit.name))
    assert same == before
    assert {*others.ids, *same.ids} == {trial.id for trial in trials}
    assert [len(unit.networks) for unit in (same, others)] == [2, 6]


def test_a_trial_that_was_trained_alone_before_is_kept(
    finished_with_momentum: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier version's search ends with all of its trials."""
    with monkeypatch.context() as earlier:
        earlier.setattr(Search, "hidden_units", lambda self, params: None)
        trained = []
        write = worker.Worker._write

        def interrupted(self: worker.Worker, *args: Any) -> None:
            write(self, *args)
            trained.append(args)
            if len(trained) == 5:
                raise KeyboardInterrupt

        earlier.setattr(worker.Worker, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(with_momentum(), folder, workers=0)
    files = {file.name: file.read_bytes() for file in (folder / "trials").iterdir()}
    assert len(files) == 5
    run(with_momentum(), folder, workers=0)
    assert [(folder / "trials" / name).read_bytes() for name in files] == [*files.values()]
    assert {r["id"] for r in of(folder)} == {r["id"] for r in of(finished_with_momentum)}


@pytest.mark.parametrize("model", ["ShallowNetwork", "Perceptron"])
def test_a_diverging_trial_is_a_row_with_its_reason(
    folder: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = small(model=model, space={"lr": [0.001, 1e30]}, fixed={"max_epochs": 3})
    good, bad = run(wanted, folder, workers=0)
    assert good["state"] == "COMPLETE"
    assert bad["state"] == "FAIL"
    assert "loss" in bad["error"]
    assert bad["val_acc"] is None is bad["best_val_acc"]
    assert "1 failed" in capsys.readouterr().out
    assert load_results(folder)["val_acc"].count() == 1


def test_settings_of_the_data_are_axes_like_any_other(folder: Path) -> None:
    """With each setting, the results are those of a search with that setting alone."""
    axes = {"data.normalization": ["unit", "mnist"], "hidden_units": [5, 8]}
    fixed = {"max_epochs": 1, "batch_size": 64}
    both = run(small(space=axes, fixed=fixed), folder / "both", workers=0)
    assert [r["params"]["data.normalization"] for r in both] == ["unit", "unit", "mnist", "mnist"]
    for normalization, pair in (("unit", both[:2]), ("mnist", both[2:])):
        data = {"source": "digits", "normalization": normalization}
        search = small(space={"hidden_units": [5, 8]}, fixed=fixed, data=data)
        alone = run(search, folder / normalization, workers=0)
        assert [r["curves"] for r in alone] == [r["curves"] for r in pair]
        checkpoint = folder / "both" / "checkpoints" / f"{pair[0]['id']}.ckpt"
        settings = torch.load(checkpoint, weights_only=True)["datamodule_hyper_parameters"]
        assert settings["normalization"] == normalization
    axes = {"data.train_fraction": [0.1, 1.0], "hidden_units": [5]}
    few, all_images = run(small(space=axes, fixed=fixed), folder / "few", workers=0)
    search = small(space={"hidden_units": [5]}, fixed=fixed)
    assert run(search, folder / "all", workers=0)[0]["curves"] == all_images["curves"]
    search = small(
        space={"hidden_units": [5]}, fixed=fixed, data={"source": "digits", "train_fraction": 0.1}
    )
    assert run(search, folder / "tenth", workers=0)[0]["curves"] == few["curves"]
    axes = {"data.normalization": ["unit", "mnist"]}
    perceptrons = run(small(model="Perceptron", space=axes, fixed=fixed), folder / "p", workers=0)
    assert perceptrons[0]["curves"] != perceptrons[1]["curves"]


def test_a_worker_reads_the_images_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not again for each trial of the Trainer."""
    reads = []
    read_digits = module.read_digits
    monkeypatch.setattr(module, "read_digits", lambda: reads.append(1) or read_digits())
    wanted = small(model="Perceptron", space={"lr": [0.001, 0.0005, 0.0001]}, fixed=FIXED)
    records = run(wanted, folder, workers=0)
    assert {record["state"] for record in records} == {"COMPLETE"}
    assert len(reads) == 2  # the command, and its worker


WIDE = """
from mnist_lightning.models import Perceptron

class Wide(Perceptron):
    def __init__(self, momentum=0.0, **options):
        super().__init__(**options)
        self.momentum = momentum
"""


def test_options_of_ones_own_class_are_axes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that it passes on to its base."""
    (folder.parent / "wide.py").write_text(WIDE)
    monkeypatch.syspath_prepend(folder.parent)
    axes = {"momentum": [0.0, 0.5], "lr": [0.001]}
    records = run(small(model="wide.Wide", space=axes, fixed=FIXED), folder, workers=0)
    assert [r["state"] for r in records] == ["COMPLETE"] * 2
    with pytest.raises(ValueError, match="did you mean momentum"):
        run(small(model="wide.Wide", space={"momentm": [0.5]}, fixed=FIXED), folder)


def test_a_search_where_all_fails_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(small(space={"lr": [1e30]}, fixed={"max_epochs": 2}), folder, workers=0)
    assert "no trial succeeded" in capsys.readouterr().out
    assert not (folder / "checkpoints" / "best.ckpt").exists()


@pytest.mark.slow
def test_a_command_where_all_fails_exits_with_1(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = "search --model ShallowNetwork --space.lr [1e30] --fixed.max_epochs 2 --workers 1"
    assert main([*argv.split(), "--data.source", "digits"]) == 1
    assert "no trial of 1 succeeded, the first: diverged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("Found no NVIDIA driver on your system"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("model", ["ShallowNetwork", "Perceptron"])
def test_a_lack_of_memory_or_of_a_device_is_no_result(
    folder: Path, model: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other trials are trained, and the same command trains the rest once there is memory."""
    axes = {"lr": [0.002, 0.001], "batch_size": [16, 64]}
    wanted = small(model=model, space=axes, fixed={"max_epochs": 1})

    class Lacking:
        def __init__(self, function: Callable[..., Any]) -> None:
            self.function = function

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if 16 in args or kwargs.get("batch_size") == 16:
                raise error
            return self.function(*args, **kwargs)

    def fit(search: Search, data: MNISTDataModule, trial: space.Trial, epoch_done: Any) -> Any:
        if trial.params["batch_size"] == 16:
            raise error
        return whole_fit(search, data, trial, epoch_done)

    whole_fit = worker.fit
    with monkeypatch.context() as lacking:
        lacking.setattr(worker, "fit", fit)
        lacking.setattr(worker, "PopulationTraining", Lacking(PopulationTraining))
        with pytest.raises(ValueError, match="was not trained") as caught:
            run(wanted, folder, workers=0)
    assert len(str(caught.value).splitlines()) == 1
    records = load_results(folder)
    assert records["batch_size"].tolist() == [64, 64]
    assert set(records["state"]) == {"COMPLETE"}
    assert {r["state"] for r in run(wanted, folder, workers=0)} == {"COMPLETE"}


@pytest.mark.parametrize(
    ("trainer_options", "device", "message"),
    [
        ({"acelerator": "cpu"}, "cpu", "no option acelerator; did you mean accelerator"),
        ({"accelerator": "tpu"}, "cpu", "the Trainer refuses .*'tpu'"),
        ({"precision": 7}, "cpu", "the Trainer refuses .*7"),
        ({}, "cuda:99x", "no device 'cuda:99x'"),
        ({}, "xpu", "device 'xpu' is not on this machine"),
    ],
)
def test_a_trainer_or_device_that_is_not_there_is_refused_at_once(
    folder: Path, trainer_options: dict[str, Any], device: str, message: str
) -> None:
    wanted = one_trial(model="Perceptron", trainer=trainer_options)
    with pytest.raises(ValueError, match=message) as caught:
        run(wanted, folder, workers=0, device=device)
    assert len(str(caught.value).splitlines()) <= 2
    assert not folder.exists()


POISON = """
import os
import signal
from mnist_lightning.models import Perceptron

class Poison(Perceptron):
    def training_step(self, batch, batch_idx):
        if self.lr == 0.5:
            with open("deaths", "a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)
"""


@pytest.mark.slow
def test_a_trial_that_kills_its_workers_fails_after_three(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others are finished by the same command."""
    (folder.parent / "poison.py").write_text(POISON)
    monkeypatch.syspath_prepend(folder.parent)
    wanted = small(model="poison.Poison", space={"lr": [0.5, 0.001]}, fixed={"max_epochs": 1})
    bad, good = run(wanted, folder, workers=2)
    assert good["state"] == "COMPLETE"
    assert bad["state"] == "FAIL"
    assert bad["error"].startswith("its worker died 3 times; the last one: killed by SIGKILL")
    assert (folder.parent / "deaths").read_text() == "xxx"


def test_the_test_images_are_never_touched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = MNISTDataModule.setup

    class Untouchable:
        def __init__(self, n: int) -> None:
            self.n = n

        def __len__(self) -> int:
            return self.n

    def without_test_images(self: MNISTDataModule, stage: str | None = None) -> None:
        setup(self, stage)
        self.test_set = Untouchable(len(self.test_set))

    monkeypatch.setattr(MNISTDataModule, "setup", without_test_images)
    trained = run(small(), folder / "population", workers=0)
    perceptron = small(model="Perceptron", space={"lr": [0.001]}, fixed={"max_epochs": 1})
    trained += run(perceptron, folder / "fit", workers=0)
    # an error within a training would not come out of run: it makes the trial a FAIL
    assert {record["state"] for record in trained} == {"COMPLETE"}


# The command


@pytest.mark.parametrize("config", CONFIGS, ids=lambda file: file.stem)
def test_shipped_searches_are_what_they_say(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # found by their bare names
    first = config.read_text().splitlines()[0]
    assert first == f"# python -m mnist_lightning search --config {config.name}"
    wanted, _ = read(["--config", config.name])
    wanted.check()
    assert wanted.name == config.stem
    assert wanted.data["source"] == "mnist"
    counts = {
        "shallow_grid": 384,
        "shallow_random": 60,
        "shallow_refine": 27,
        "shallow_wide": 12,
        "deep2_grid": 49,
        "deep2_rates": 12,
        "deep3_grid": 125,
        "resnet18_regimes": 9,
        "resnet18_transfer": 18,
    }
    if not wanted.sampled:
        assert len(rounds(wanted, {})[0]) == counts[config.stem]


def test_a_search_of_too_many_trials_is_refused_at_once(folder: Path) -> None:
    axes = {"lr": [i / 1e4 for i in range(1, 1001)], "hidden_units": list(range(1, 801))}
    with pytest.raises(ValueError, match="a search of 800,000 trials: at most 100,000"):
        small(space=axes, fixed={"max_epochs": 1}).check()
    drawn = {"lr": {"low": 0.1, "high": 0.2}}
    for name in ("random", "optuna"):
        with pytest.raises(ValueError, match="a search of 1,000,000 trials"):
            small(space=drawn, fixed={"max_epochs": 1}, strategy={"name": name, "n": 10**6}).check()


def test_the_values_of_a_large_grid_are_all_checked(folder: Path) -> None:
    axes = {"lr": [i / 1e4 for i in range(1, 101)], "hidden_units": [*range(1, 101), -7]}
    with pytest.raises(ValueError, match=r"refuses .*-7"):
        small(space=axes, fixed={"max_epochs": 1}).check()


def test_a_flag_names_a_parameter_with_dots() -> None:
    """jsonargparse makes a mapping of ``--fixed.freezing.batch_norm``."""
    argv = "--config resnet18_regimes.yaml --fixed.freezing.batch_norm frozen --fixed.lr 0.1"
    argv += " --space.data.train_fraction [0.2,1] --space.hidden_units.2 [3,4]"
    argv += " --data.eval_batch_size 7"
    wanted, _ = read(argv.split())
    assert "freezing" not in wanted.fixed
    assert (wanted.fixed["freezing.batch_norm"], wanted.fixed["lr"]) == ("frozen", 0.1)
    assert wanted.space == {
        "regime": ["scratch", "finetune", "freeze"],
        "lr": [0.01],
        "data.train_fraction": [0.2, 1],
        "hidden_units.2": [3, 4],
    }
    assert wanted.data["eval_batch_size"] == 7


@pytest.mark.slow
def test_flags_win_over_the_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = "search --config shallow_grid --data.source digits --workers 1 --name mine"
    argv += " --space.batch_size [64] --space.max_epochs [1] --space.lr [1e-1] --seeds [3]"
    assert main(argv.split()) == 0
    records = of(folder.parent / "lightning_logs" / "search" / "mine")
    assert [r["params"]["hidden_units"] for r in records] == [10, 25, 50, 100]
    assert {(r["params"]["lr"], r["seed"]) for r in records} == {(0.1, 3)}
    assert "digits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "the space is empty"),
        ({"space": {"lr": []}}, "lr has no values"),
        ({"space": {"lr": [0.1]}, "fixed": {"lr": 0.1}}, "fixed and an axis"),
        ({"space": {"learning_rate": [0.1]}}, "no parameter learning_rate; there are: max_epochs"),
        ({"space": {"hiden_units": [1]}}, "did you mean hidden_units"),
        ({"space": {"seed": [1]}}, "say seeds"),
        ({"space": {"lr": [0.1]}, "fixed": {}}, "max_epochs is missing"),
        ({"space": {"lr": [0.1, -1]}}, "refuses .*lr must be positive, got -1"),
        ({"space": {"hidden_units": [0]}}, "refuses .*hidden_units"),
        ({"space": {"batch_size": [0]}}, "batch_size must be a whole number"),
        ({"space": {"batch_size": ["many"]}}, "batch_size must be a whole number"),
        ({"space": {"lr": {"low": 0.1, "high": 1}}}, "is a range: this strategy"),
        ({"model": "ShalowNetwork"}, "did you mean ShallowNetwork"),
        ({"model": "Classifier"}, "no model 'Classifier'"),
        ({"model": "DeepNetwork", "space": {"hidden_units.2": [5]}}, "must count 1, 2, 3"),
        ({"strategy": {"name": "gird"}}, "did you mean grid"),
        ({"strategy": {"name": "random"}}, "random needs n"),
        ({"strategy": {"name": "grid", "n": 3}}, "grid has no option n"),
        ({"strategy": {"name": "random", "n": 0}}, "at least 1, got 0"),
        ({"strategy": {"name": "optuna", "n": 2, "sampler": "TPE_Sampler"}}, "mean TPESampler"),
        ({"seeds": (0, 0)}, "seeds must be different"),
        ({"seeds": (0, 1), "strategy": {"name": "optuna", "n": 2}}, "of one seed"),
        ({"objective": "test_acc"}, "objective must be one of"),
        ({"second_round": {"best": 5}}, "second_round is"),
        ({"space": {"data.val_fraction": [0.1]}}, "the same validation images. Run a search for"),
        ({"space": {"data.split_seed": [0, 1]}}, "the same validation images"),
        ({"space": {"data.normalisation": ["unit"]}}, "did you mean data.normalization"),
        ({"space": {"data.normalization": ["none"]}}, "normalization must be one of unit"),
        ({"space": {"data.batch_size": [8]}}, "is called batch_size here"),
        ({"space": {"data.eval_batch_size": [8]}}, "changes no result"),
        ({"data": {"source": "digits", "split": "mine"}}, "split must be one of"),
        ({"trainer": {"check_val_every_n_epoch": 2}}, "after each epoch: .* got 2 and 1.0"),
        ({"trainer": {"limit_val_batches": 0}}, "after each epoch: .* got 1 and 0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        run(small(**{"space": {"lr": [0.1]}, "fixed": FIXED, **changes}), folder)
    assert len(str(caught.value).splitlines()) <= 2
    assert not folder.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--config shallow_gird", "did you mean shallow_grid"),
        ("--config ./nowhere.yaml", "no such file"),
        ("--config shallow_grid --wrkers 2", "wrkers"),
        ("--config shallow_grid --workers 0", "workers must be"),
        ("--config shallow_grid --workers many", "workers"),
        ("--config shallow_grid --data.split other", "split"),
        ("--space.lr [0.1]", "model"),
    ],
)
def test_a_command_that_cannot_be_understood_ends_in_a_line_or_two(
    folder: Path, argv: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", *argv.split()]) != 0
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) <= 2


def test_another_search_or_other_data_may_not_use_the_folder(
    finished: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    before = of(copy)
    with pytest.raises(ValueError, match=r"another search: its space.lr is \[0.1, 0.01\], not"):
        run(small(space={**AXES, "lr": [0.2]}), copy)
    with pytest.raises(ValueError, match=r"data.split_seed is 0, not 1"):
        run(small(data={"source": "digits", "split_seed": 1}), copy)
    definition = json.loads((copy / "search.json").read_text())
    definition["data"]["checksum"] = "0" * 64
    (copy / "search.json").write_text(json.dumps(definition))
    with pytest.raises(ValueError, match=r"data\.checksum"):
        run(small(), copy)
    assert of(copy) == before


@pytest.mark.parametrize("content", ["", '{"id": "', "[]", '{"id": "other"}'])
@pytest.mark.parametrize("shown", [True, False], ids=["others have it", "nobody has it"])
def test_a_damaged_trial_is_set_aside_and_the_others_stay(
    finished: Path, tmp_path: Path, content: str, shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    victim = sorted((copy / "trials").iterdir())[0]
    kept = {file: file.read_bytes() for file in (copy / "trials").iterdir() if file != victim}
    victim.write_text(content)
    with pytest.raises(ValueError, match=f"{victim.name} is damaged.*run the search again"):
        load_results(copy)  # a reader changes nothing
    assert victim.read_text() == content
    if not shown:
        (copy / "journal.log").unlink()
    run(small(), copy, workers=0)
    assert f"{victim.name} is damaged" in capsys.readouterr().out
    assert victim.with_name(f"{victim.name}.damaged").read_text() == content
    assert kept == {file: file.read_bytes() for file in kept}
    assert without_time(of(copy)) == without_time(of(finished))


def test_any_flipped_bit_of_a_trial_is_noticed(finished: Path, tmp_path: Path) -> None:
    """Also in a digit that no other figure of the trial contradicts."""
    copy = shutil.copytree(finished, tmp_path / "copy")
    file = sorted((copy / "trials").iterdir())[0]
    whole = file.read_bytes()
    record = Results(copy).record(file.stem)
    for bit in random.Random(0).sample(range(8 * len(whole)), 200):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            Results(copy).record(file.stem)
    file.write_text(json.dumps(record))  # as older versions wrote it, without a checksum
    assert Results(copy).record(file.stem) == record


def flip(file: Path) -> None:
    """Turns one bit of a tensor."""
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        tensor = archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))
    content[content.index(tensor) + len(tensor) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, cut, empty])
def test_a_winner_with_damaged_weights_is_trained_again(
    finished: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    best = copy / "checkpoints" / "best.ckpt"
    winner = torch.load(best, weights_only=True)
    weights = copy / "checkpoints" / f"{winner['search']['trial']}.ckpt"
    damage(weights)
    run(small(), copy, workers=0)
    said = capsys.readouterr().out
    assert f"{weights} is damaged" in said
    assert len(said.partition(f"{weights} is damaged")[2].splitlines()[0]) < 200
    for file in (weights, best):
        again = torch.load(file, weights_only=True)["state_dict"]
        assert all(torch.equal(again[name], old) for name, old in winner["state_dict"].items())
    assert without_time(of(copy)) == without_time(of(finished))


@pytest.mark.parametrize("damage", [flip, cut, empty])
def test_a_damaged_state_is_set_aside_and_trained_from_the_start(
    finished: Path,
    folder: Path,
    damage: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(worker, "SNAPSHOT_SECONDS", 0.0)
    run_epoch = PopulationTraining.run_epoch

    def interrupted(self: PopulationTraining) -> None:
        if self.epoch == 2:
            raise KeyboardInterrupt
        run_epoch(self)

    with monkeypatch.context() as once:
        once.setattr(PopulationTraining, "run_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(small(), folder, workers=0)
    (state,) = (folder / "state").iterdir()
    damage(state)
    run(small(), folder, workers=0)
    assert f"{state} is damaged" in capsys.readouterr().out
    assert without_time(of(folder)) == without_time(of(finished))
    assert [file.name for file in (folder / "state").iterdir()] == [f"{state.name}.damaged"]


def test_a_damaged_search_json_is_named(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "search.json").write_text("{")
    with pytest.raises(ValueError, match=r"search\.json is damaged"):
        run(small(), copy)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_unreachable_storage_is_named_without_its_password(folder: Path, tmp_path: Path) -> None:
    url = f"postgresql://me:secret@127.0.0.1:{closed_port()}/x"
    with pytest.raises(ValueError, match="postgresql://me@127") as caught:
        run(one_trial(), folder, storage=url)
    assert "secret" not in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2
    with pytest.raises(ValueError, match="cannot be reached"):
        run(one_trial(), folder, storage=str(tmp_path / "no" / "such" / "folder" / "journal.log"))
    with pytest.raises(ValueError, match="cannot be reached"):
        run(one_trial(), folder, storage="nosuchdatabase://host/x")
    (tmp_path / "text.log").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="cannot be reached"):
        run(one_trial(), folder, storage=str(tmp_path / "text.log"))


def test_load_results_of_no_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the folder of a search"):
        load_results(tmp_path)


# Nothing lost


def start(folder: Path, *argv: str, within: Sequence[str] = ()) -> subprocess.Popen:
    command = [
        *within,
        sys.executable,
        "-m",
        "mnist_lightning",
        "search",
        "--config",
        "wanted.yaml",
    ]
    return subprocess.Popen(
        [*command, "--folder", str(folder), *argv],
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill(process: subprocess.Popen) -> None:
    """Kills the command and its workers with SIGKILL."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


WANTED = {
    "model": "ShallowNetwork",
    "data": {"source": "digits"},
    "space": {**AXES, "batch_size": [2, 3, 4, 5], "max_epochs": [1, 10, 25, 40]},
}


@pytest.mark.slow
def test_killed_at_twenty_moments_and_resumed_nothing_is_lost_nor_done_twice(
    tmp_path: Path,
) -> None:
    (tmp_path / "wanted.yaml").write_text(yaml.safe_dump(WANTED, sort_keys=False))
    generator = random.Random(0)
    folder = tmp_path / "killed"
    written: dict[str, int] = {}
    for _ in range(20):
        process = start(folder, "--workers", "2")
        deadline = time.monotonic() + 60
        while not list(folder.glob("journal.log")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(generator.uniform(0, 8))
        kill(process)
        for file in folder.glob("trials/[!.]*.json"):
            record = json.loads(file.read_text())  # whole at any moment
            stamp = file.stat().st_mtime_ns
            assert written.setdefault(record["id"], stamp) == stamp, "written twice"
    last = start(folder, "--workers", "2")
    output, _ = last.communicate(timeout=600)
    assert last.returncode == 0, output
    for file in folder.glob("trials/[!.]*.json"):
        assert written.setdefault(file.stem, file.stat().st_mtime_ns) == file.stat().st_mtime_ns
    undisturbed = run(Search(name="u", **WANTED), tmp_path / "undisturbed", workers=0)
    records = of(folder)
    assert len(records) == len({record["id"] for record in records}) == 64
    assert without_time(records) == without_time(undisturbed)


@pytest.mark.slow
def test_when_the_command_is_killed_its_workers_leave(tmp_path: Path) -> None:
    wanted = {**WANTED, "space": {**WANTED["space"], "max_epochs": [5000]}}
    (tmp_path / "wanted.yaml").write_text(yaml.safe_dump(wanted, sort_keys=False))
    process = start(tmp_path / "found", "--workers", "2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not list((tmp_path / "found" / "state").glob("*.pt")):
        assert process.poll() is None
        time.sleep(0.2)
    workers = children.read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers outlive the command"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("to_all", [True, False], ids=["to all", "to the command"])
def test_a_signal_leaves_a_clean_state(
    tmp_path: Path, number: int, code: int, to_all: bool
) -> None:
    wanted = {**WANTED, "space": {**WANTED["space"], "max_epochs": [5000]}}
    (tmp_path / "wanted.yaml").write_text(yaml.safe_dump(wanted, sort_keys=False))
    process = start(tmp_path / "found", "--workers", "2")
    while not list((tmp_path / "found" / "state").glob("*.pt")):
        assert process.poll() is None
        time.sleep(0.2)
    # a terminal tells all of them, as systemd does; `kill` and `docker stop` tell one
    (os.killpg if to_all else os.kill)(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert "the same command continues" in output
    assert "Traceback" not in output
    assert (tmp_path / "found" / "results.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.1, 0.8, 1.6])
def test_ctrl_c_while_workers_import_prints_no_traceback(tmp_path: Path, wait: float) -> None:
    (tmp_path / "wanted.yaml").write_text(yaml.safe_dump(WANTED, sort_keys=False))
    process = start(tmp_path / "found", "--workers", "2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 2:  # the first is multiprocessing's own
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output
    assert "the same command continues" in output


@pytest.mark.slow
def test_workers_killed_at_random_are_replaced(tmp_path: Path) -> None:
    """One command, no rerun: each trial once, with the bits of an undisturbed search."""
    (tmp_path / "wanted.yaml").write_text(yaml.safe_dump(WANTED, sort_keys=False))
    process = start(tmp_path / "found", "--workers", "3")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    generator = random.Random(1)
    killed = 0
    written: dict[str, int] = {}
    while process.poll() is None:
        time.sleep(generator.uniform(0.5, 4))
        for file in (tmp_path / "found").glob("trials/[!.]*.json"):
            stamp = file.stat().st_mtime_ns
            assert written.setdefault(file.stem, stamp) == stamp, "written twice"
        workers = children.read_text().split()[1:] if process.poll() is None else []
        if workers and killed < 6 and list((tmp_path / "found").glob("*/*.*")):
            os.kill(int(generator.choice(workers)), signal.SIGKILL)
            killed += 1
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert killed
    undisturbed = run(Search(name="u", **WANTED), tmp_path / "undisturbed", workers=0)
    assert without_time(of(tmp_path / "found")) == without_time(undisturbed)


# What each of two machines runs below, in its own folder; one freezes for longer than its lease.
MACHINE = """
import os, signal, sys, time
from pathlib import Path
from mnist_lightning.search import leases
from mnist_lightning.training.population import PopulationTraining

leases.HEARTBEAT_SECONDS, leases.STALE_SECONDS = 0.2, 2.0
name, frozen, *argv = sys.argv[1:]
process = leases._process
leases._process = lambda: {**process(), "machine": name}
run_epoch = PopulationTraining.run_epoch

def freeze_once(self):
    run_epoch(self)
    if self.epoch >= 2 and not Path(frozen).exists():
        Path(frozen).write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)  # until the test wakes it

if frozen != "never":
    PopulationTraining.run_epoch = freeze_once
from mnist_lightning.search.command import read, run
search, place = read(argv)
run(search, **{**place, "workers": 0})
"""

DRAWN = {
    "model": "ShallowNetwork",
    "data": {"source": "digits"},
    "space": {"lr": {"low": 0.001, "high": 0.1, "log": True}},
    "fixed": {"max_epochs": 20, "batch_size": 8},
    "strategy": {"name": "optuna", "n": 6, "sampler": "RandomSampler"},
}


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [WANTED, DRAWN], ids=["grid", "optuna"])
def test_a_machine_that_was_frozen_beyond_its_lease_agrees_with_the_other(
    tmp_path: Path, wanted: dict[str, Any]
) -> None:
    (tmp_path / "wanted.yaml").write_text(yaml.safe_dump(wanted, sort_keys=False))

    def machine(name: str, frozen: str) -> subprocess.Popen:
        argv = f"--config wanted.yaml --folder {name} --storage journal.log".split()
        return subprocess.Popen(
            [sys.executable, "-c", MACHINE, name, frozen, *argv],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    one = machine("one", "frozen")
    os.waitpid(one.pid, os.WUNTRACED)  # until it is stopped
    assert (tmp_path / "frozen").is_file()
    two = machine("two", "never")
    written = tmp_path / "two" / "trials"
    count = 6 if wanted is DRAWN else 64
    while len(list(written.glob("[!.]*.json"))) < count - 1:
        assert two.poll() is None
        time.sleep(0.1)
    os.kill(one.pid, signal.SIGCONT)
    for process in (one, two):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert "Cannot tell" not in output
    assert of(tmp_path / "one") == of(tmp_path / "two")  # the seconds too
    assert {record["state"] for record in of(tmp_path / "two")} == {"COMPLETE"}
    undisturbed = run(Search(name="u", **wanted), tmp_path / "undisturbed", workers=0)
    assert without_time(of(tmp_path / "two")) == without_time(undisturbed)


def two_machines(
    tmp_path: Path,
    storage: str,
    within: Sequence[str] = (),
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Two commands, each with a folder of its own, that know of each other through a storage.

    Args:
        tmp_path: for the folders.
        storage: where they meet.
        within: the command that each is started by.
        meanwhile: is called when both have begun.
    """
    (tmp_path / "wanted.yaml").write_text(yaml.safe_dump(WANTED, sort_keys=False))
    both = [
        start(tmp_path / name, "--workers", "1", "--storage", storage, within=within)
        for name in ("one", "two")
    ]
    while not all(list(tmp_path.glob(f"{name}/trials/[!.]*.json")) for name in ("one", "two")):
        assert not any(process.poll() for process in both)
        time.sleep(0.1)
    meanwhile()
    for process in both:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    one, two = of(tmp_path / "one"), of(tmp_path / "two")
    assert one == two  # the seconds too: no trial was trained by both
    undisturbed = run(Search(name="u", **WANTED), tmp_path / "undisturbed", workers=0)
    assert without_time(one) == without_time(undisturbed)
    weights = [
        {f.name for f in (tmp_path / n / "checkpoints").glob("*.ckpt")} for n in ("one", "two")
    ]
    ids = {f"{record['id']}.ckpt" for record in one}
    assert (weights[0] | weights[1]) >= ids
    assert not weights[0] & weights[1] & ids


@pytest.mark.slow
def test_two_machines_meet_in_a_journal_file(tmp_path: Path) -> None:
    two_machines(tmp_path, str(tmp_path / "journal.log"))


@pytest.mark.slow
def test_two_containers_with_one_hostname_share_the_trials(tmp_path: Path) -> None:
    """Process namespaces of their own, as in two containers: neither sees the other's workers."""
    own = ["unshare", "--fork", "--pid", "--mount-proc"]
    if subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("may make no process namespaces here")
    two_machines(tmp_path, str(tmp_path / "journal.log"), own)


@pytest.mark.slow
def test_two_machines_meet_at_optunas_grpc_proxy(tmp_path: Path) -> None:
    port = closed_port()
    code = (
        "import optuna\n"
        "from optuna.storages.journal import JournalFileBackend\n"
        "storage = optuna.storages.JournalStorage(JournalFileBackend('shared.log'))\n"
        f"optuna.storages.run_grpc_proxy_server(storage, host='127.0.0.1', port={port})\n"
    )
    server = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        two_machines(tmp_path, f"grpc://127.0.0.1:{port}")
    finally:
        server.kill()
        server.wait()


class Server(NamedTuple):
    address: str
    stop: Callable[[], object]
    start: Callable[[], object]


@pytest.fixture
def postgres() -> Iterator[Server]:
    """A PostgreSQL server of our own, from the programs on this machine."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = str(installed[-1]) if installed else shutil.which("initdb")
    if not initdb:
        pytest.skip("needs the programs of a PostgreSQL server, as in Debian's package postgresql")
    # not below pytest's folder: it is closed to others, and the server refuses to run as root
    data, port = Path(tempfile.mkdtemp()), closed_port()
    shell = ["sh", "-c"]
    if os.geteuid() == 0:
        shutil.chown(data, "postgres")
        shell = ["su", "postgres", "-s", "/bin/sh", "-c"]
    control = f"{Path(initdb).parent}/pg_ctl -D {data} -l {data}/log -w"
    options = f"-h 127.0.0.1 -p {port} -k {data}"
    try:
        subprocess.run([*shell, f"{initdb} -D {data} -A trust -U postgres"], check=True, cwd="/")
        subprocess.run([*shell, f'{control} -o "{options}" start'], check=True, cwd="/")
        yield Server(
            f"postgresql://postgres@127.0.0.1:{port}/postgres",
            lambda: subprocess.run([*shell, f"{control} -m immediate stop"], check=True, cwd="/"),
            lambda: subprocess.run(
                [*shell, f'{control} -o "{options}" start'], check=True, cwd="/"
            ),
        )
        subprocess.run([*shell, f"{control} -m immediate stop"], check=True, cwd="/")
    finally:
        shutil.rmtree(data)


@pytest.mark.postgres
def test_two_machines_meet_in_postgresql(tmp_path: Path, postgres: Server) -> None:
    two_machines(tmp_path, postgres.address)


@pytest.mark.postgres
def test_machines_wait_for_a_postgresql_that_is_restarted(tmp_path: Path, postgres: Server) -> None:
    def restart() -> None:
        postgres.stop()
        time.sleep(10)
        postgres.start()

    two_machines(tmp_path, postgres.address, meanwhile=restart)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frozen", "never_woken", "full"])
def test_a_disturbed_search_finishes_each_trial_once(tmp_path: Path, name: str) -> None:
    """The short version of benchmarks/searches.py."""
    (tmp_path / name).mkdir()
    calm = searches.undisturbed(tmp_path / "undisturbed")
    outcome = searches.DISTURBANCES[name](tmp_path / name, calm)
    if outcome is None:
        pytest.skip("not possible on this machine")
    assert (outcome.once, outcome.same) == (True, True)
    assert outcome.codes == searches.CODES.get(name, [0])
