"""The report: its numbers against other people's code, its page in a real browser."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from conftest import trainer

from mnist_lightning import EarlyStopping, MNISTDataModule
from mnist_lightning.__main__ import main
from mnist_lightning.configs import read_config
from mnist_lightning.models.multilayer import DeepNetwork, ShallowNetwork
from mnist_lightning.report import analysis, figures
from mnist_lightning.report.analysis import SearchResult, read
from mnist_lightning.report.findings import in_short, in_words, results_table
from mnist_lightning.report.page import Content, _page, _table_files
from mnist_lightning.report.published import PUBLISHED
from mnist_lightning.report.sections import (
    Block,
    Table,
    _panels,
    _published_rows,
    _test,
    _training,
    lead,
)
from mnist_lightning.search import plan
from mnist_lightning.search.command import run
from mnist_lightning.search.plan import Search
from mnist_lightning.search.results import sealed
from mnist_lightning.training.callbacks import Mistakes

SPACE = {"batch_size": [16, 32], "max_epochs": [1, 2], "lr": [0.1, 0.01, 0.001]}
STUDY = Path(__file__).parent.parent / "lightning_logs" / "study"


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished and tested search on the digits; to be read only."""
    folder = tmp_path_factory.mktemp("report") / "small"
    search = Search(
        name="small",
        model="ShallowNetwork",
        space=SPACE,
        fixed={"hidden_units": 10},
        seeds=[0, 1],
        data={"source": "digits"},
    )
    run(search, folder, workers=0)
    assert main(["test", "--ckpt_path", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def report(searched, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its report."""
    out = tmp_path_factory.mktemp("page") / "report"
    assert main(["report", str(searched), "--out", str(out)]) == 0
    return out


def made_up(space: dict, accuracy, seeds=(0,), model="ShallowNetwork", **about) -> SearchResult:
    """A search whose accuracies are a formula."""
    from mnist_lightning.search.space import grid

    rows = []
    for number, params in enumerate(grid(space)):
        for seed in seeds:
            acc = accuracy(seed=seed, **{k.replace(".", "_"): v for k, v in params.items()})
            curves = {"train_loss": [0.5], "val_loss": [1 - acc], "val_acc": [acc]}
            rows.append(
                {
                    **{"id": f"{number}-{seed}", "number": number, "round": 0, "seed": seed},
                    **{"state": "COMPLETE", "epochs": params.get("max_epochs", 1), "seconds": 1.0},
                    **{"val_acc": acc, "val_loss": 1 - acc, "train_loss": 0.5, "curves": curves},
                    **params,
                }
            )
    identity = {
        "model": model,
        "space": space,
        "fixed": {},
        "seeds": list(seeds),
        "strategy": {"name": "grid"},
        "second_round": None,
        "objective": "val_acc",
        "data": {
            **{"source": "mnist", "split": "study", "val_fraction": 0.2, "image_size": 28},
            **{"name": "MNIST", "split_seed": 0, "normalization": "unit"},
        },
    }
    return SearchResult(Path("made_up"), {**identity, **about}, pd.DataFrame(rows), [])


# The numbers


def test_correlations_are_numpys(searched):
    (search,) = read(searched)
    table = analysis.correlations(search)
    assert list(table.index) == list(SPACE)
    for axis in SPACE:
        each = [
            np.corrcoef(trials[axis], trials["val_acc"])[0, 1]
            for _, trials in search.trials.groupby("seed")
        ]
        assert table.loc[axis, "mean"] == pytest.approx(np.mean(each))
        assert table.loc[axis, "sd"] == pytest.approx(np.std(each, ddof=1))
    matrix = analysis.correlation_matrix(search)
    means = search.trials.groupby(list(SPACE))["val_acc"].mean().reset_index()
    assert matrix.loc["lr", "acc"] == pytest.approx(
        np.corrcoef(means["lr"], means["val_acc"])[0, 1]
    )
    # a full grid: the axes know nothing of each other
    assert abs(matrix.loc["lr", "batch_size"]) < 1e-12


def test_a_configuration_is_the_mean_of_its_seeds(searched):
    (search,) = read(searched)
    assert len(search.configurations) == 12
    for cell in search.configurations.itertuples():
        alike = search.trials
        for axis in SPACE:
            alike = alike[alike[axis] == getattr(cell, axis)]
        assert cell.n == len(alike) == 2
        assert cell.acc == pytest.approx(alike["val_acc"].mean())
        assert cell.sd == pytest.approx(alike["val_acc"].std())
    assert search.configurations["acc"].is_monotonic_decreasing


def test_shares_of_the_variance_of_a_known_function():
    # centred, the grid is -1, 1 by -1, 0, 1: x explains 4, y explains 9 * 2/3, both 1 * 2/3
    space = {"lr": [1.0, 3.0], "batch_size": [1, 2, 3]}

    def accuracy(lr, batch_size, seed):
        x, y = lr - 2, batch_size - 2
        return 0.5 + (2 * x + 3 * y + x * y) / 100

    shares = analysis.variance_shares(made_up(space, accuracy))
    whole = 4 + 6 + 2 / 3
    assert shares["lr"] == pytest.approx(4 / whole)
    assert shares["batch_size"] == pytest.approx(6 / whole)
    assert shares["lr × batch_size"] == pytest.approx(2 / 3 / whole)
    assert shares.sum() == pytest.approx(1)
    # what is not a full grid has no such shares
    assert analysis.variance_shares(made_up(space, accuracy, strategy={"name": "random"})).empty


def test_importance_finds_the_one_that_matters():
    space = {"lr": [0.1, 0.01, 0.001, 0.0001], "batch_size": [4, 8, 16, 32]}
    search = made_up(space, lambda lr, batch_size, seed: 0.9 + lr / 10 + batch_size / 1e5)
    importance = analysis.importance(search)
    assert importance.index[0] == "lr"
    assert importance["lr"] > 0.9
    assert importance.sum() == pytest.approx(1)


def test_marginals_and_interactions(searched):
    (search,) = read(searched)
    rows = analysis.marginals(search).set_index(["axis", "value"])
    cells = search.configurations
    assert rows.loc[("lr", "0.01"), "mean"] == pytest.approx(cells[cells.lr == 0.01]["acc"].mean())
    assert rows.loc[("lr", "0.01"), "best"] == cells[cells.lr == 0.01]["acc"].max()
    table = analysis.interaction(search, "lr", "batch_size")
    assert list(table.index) == ["0.001", "0.01", "0.1"]
    chosen = cells[(cells.lr == 0.1) & (cells.batch_size == 32)]
    assert table.loc["0.1", "32"] == pytest.approx(chosen["acc"].mean())


@pytest.mark.parametrize("seed", range(20))
def test_hindsight_stops_where_lightning_stops(seed):
    """The callback itself, fed with the same losses."""
    patience = 3
    generator = np.random.default_rng(seed)
    losses = (1 / np.arange(1, 31) + generator.normal(0, 0.05, 30)).tolist()
    callback = EarlyStopping(patience=patience)
    stop = len(losses)
    for epoch, loss in enumerate(losses, 1):
        if callback._evaluate_stopping_criteria(torch.tensor(loss, dtype=torch.float64))[0]:
            stop = epoch
            break
    hindsight = analysis.stopping({"val_loss": losses, "val_acc": losses}, patience)
    assert hindsight["stop"] == stop
    assert hindsight["saved"] == 30 - stop
    assert hindsight["kept"] == 1 + int(np.argmin(losses[:stop]))
    assert hindsight["lowest"] == 1 + int(np.argmin(losses))
    assert hindsight["cost"] == losses[-1] - losses[hindsight["kept"] - 1]
    assert EarlyStopping().patience == analysis.PATIENCE


def test_intervals_and_ranks_are_scipys():
    for correct, n in ((6865, 7000), (7000, 7000), (0, 10), (5, 10)):
        theirs = scipy.stats.binomtest(correct, n).proportion_ci(method="wilson")
        assert analysis.wilson(correct, n) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    a, b = pd.Series([1.0, 5, 5, 2, 9, 4]), pd.Series([2.0, 1, 8, 8, 7, 3])
    assert analysis.rank_correlation(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)


def test_capacity_counts_the_parameters_of_the_networks():
    space = {"hidden_units": [10, 25]}
    search = made_up(space, lambda hidden_units, seed: hidden_units / 100)
    sizes = analysis.capacity(search)
    for size, units in zip(sizes, search.configurations["hidden_units"], strict=True):
        assert size == sum(p.numel() for p in ShallowNetwork(units).parameters())
    space = {"hidden_units.1": [10, 20], "hidden_units.2": [5, 7]}
    search = made_up(space, lambda seed, **_: 0.5, model="DeepNetwork")
    for size, (_, cell) in zip(
        analysis.capacity(search), search.configurations.iterrows(), strict=True
    ):
        net = DeepNetwork([int(cell["hidden_units.1"]), int(cell["hidden_units.2"])])
        assert size == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("split", ["study", "canonical"])
def test_sizes_are_those_of_the_data(split):
    about = {"source": "digits", "split": split, "val_fraction": 0.2}
    data = MNISTDataModule(**about)
    data.prepare_data()
    data.setup()
    sizes = analysis.image_counts(made_up({"lr": [1.0, 2.0]}, lambda lr, seed: lr / 3, data=about))
    assert sizes == {"val": len(data.val_set), "test": len(data.test_set)}


def test_sizes_of_mnist():
    assert analysis.image_counts(made_up({"lr": [1.0, 2.0]}, lambda lr, seed: lr / 3)) == {
        "val": 12_600,
        "test": 7_000,
    }


def test_what_is_planned_is_what_the_search_plans(searched, tmp_path):
    (search,) = read(searched)
    assert search.finished
    assert search.planned == len(search.trials) == 24
    half = tmp_path / "half"
    shutil.copytree(searched, half)
    for file in sorted((half / "trials").iterdir())[:7]:
        file.unlink()
    (search,) = read(half)
    assert not search.finished
    assert search.counts() == {"finished": 17, "failed": 0, "pruned": 0, "to go": 7}
    again = Search(
        name="x",
        model="ShallowNetwork",
        space=SPACE,
        strategy={"name": "refine", "rounds": 2},
        fixed={"hidden_units": 10},
        second_round={"best": 2, "max_epochs": 3},
        seeds=[0, 1],
    )
    records = {row["id"]: row for row in read(searched)[0].trials.to_dict("records")}
    about = {
        **search.about,
        "strategy": {"name": "refine", "rounds": 2},
        "second_round": {"best": 2, "max_epochs": 3},
    }
    refining = SearchResult(searched, about, read(searched)[0].trials, [])
    assert refining.planned == sum(len(r) for r in plan.rounds(again, records)) > 24


# Against the study


def like_the_study(lr, batch_size, max_epochs, hidden_units, seed):
    """0.001 above each published value, and plausible elsewhere."""
    cell = dict(lr=lr, batch_size=batch_size, max_epochs=max_epochs, hidden_units=hidden_units)
    for row in PUBLISHED:
        if row.model == "ShallowNetwork" and row.metric == "val_acc" and row.params == cell:
            return row.value + 0.001 + (seed - 1) * 0.0005
    return 0.9 + lr / 5 - batch_size / 2000 + (seed - 1) * 0.0005


@pytest.fixture(scope="module")
def repeated() -> SearchResult:
    space = {
        "batch_size": [4, 8, 16, 32, 64, 128],
        "max_epochs": [10, 20, 50, 100],
        "lr": [0.1, 0.01, 0.001, 0.0001],
        "hidden_units": [10, 25, 50, 100],
    }
    return made_up(space, like_the_study, seeds=(0, 1, 2))


def test_each_published_figure_has_its_row(repeated):
    deep = made_up({"lr": [1.0, 2.0]}, lambda lr, seed: 0.5, model="DeepNetwork")
    table = analysis.against_the_study([repeated, deep])
    assert len(table) == len(PUBLISHED) == 35
    rows = table[(table["model"] == "ShallowNetwork") & (table["metric"] == "val_acc")]
    assert len(rows) == 10
    assert np.allclose(rows["difference"], 0.001)
    assert (rows["n"] == 3).all()
    assert np.allclose(rows["sd"].astype(float), 0.0005)
    assert rows["within"].all()
    others = table[table["model"] != "ShallowNetwork"]
    assert len(others) == 20
    assert (others["note"] == "not measured").all()
    assert others["repeated"].isna().all()
    assert set(analysis.against_the_study([repeated])["model"]) == {"ShallowNetwork"}
    lr = table[(table["metric"] == "correlation") & (table["setting"] == "axis lr")].iloc[0]
    assert lr["repeated"] == pytest.approx(analysis.correlations(repeated).loc["lr", "mean"])


def test_the_noise_of_a_difference(repeated):
    """Images drawn twice and seeds, against the formula worked out by simulation."""
    table = analysis.against_the_study([repeated])
    row = table.iloc[0]
    generator = np.random.default_rng(0)
    p, n, sd = row["published"], 12_600, analysis.spread(repeated, row["repeated"])
    theirs = generator.binomial(n, p, 100_000) / n + generator.normal(0, sd, 100_000)
    ours = generator.binomial(n, p, 100_000) / n + generator.normal(0, sd, (3, 100_000)).mean(0)
    assert row["noise"] == pytest.approx(1.96 * (ours - theirs).std(), rel=0.02)


def test_a_large_difference_is_not_called_noise(repeated):
    trials = repeated.trials.copy()
    trials["val_acc"] -= 0.02
    worse = SearchResult(repeated.path, repeated.about, trials, [])
    rows = analysis.against_the_study([worse]).iloc[:5]
    assert not rows["within"].any()


def test_half_a_grid_has_no_correlation_to_compare(repeated):
    half = SearchResult(repeated.path, repeated.about, repeated.trials.iloc[:500], [])
    rows = analysis.against_the_study([half])
    assert rows[rows["metric"] == "correlation"]["repeated"].isna().all()


def test_two_layers_are_not_compared_with_three():
    space = {"batch_size": [32], "max_epochs": [10], "lr": [0.01]}
    three = {"hidden_units.1": [1024], "hidden_units.2": [10, 20], "hidden_units.3": [1024]}
    search = made_up({**space, **three}, lambda seed, **_: 0.97, model="DeepNetwork")
    table = analysis.against_the_study([search])
    measured = table[table["repeated"].notna()]
    assert list(measured["setting"].str.extract(r"hidden_units (.*)")[0]) == [
        "1024-10-1024",
        "1024-20-1024",
    ]


def test_costs_do_not_count_what_a_longer_training_passes_through(repeated):
    row = analysis.efficiency([repeated]).iloc[0]
    assert row["trials"] == 384
    assert row["networks"] == 96
    assert row["epochs"] == 96 * 100
    assert row["share_of_cost"] == 1
    half = repeated.trials[repeated.trials["max_epochs"] <= 50]
    cheaper = SearchResult(Path("cheaper"), repeated.about, half, [])
    row = analysis.efficiency([repeated, cheaper]).iloc[1]
    assert row["share_of_cost"] == 0.5
    assert row["short_of_best"] == pytest.approx(
        repeated.trials.groupby("seed")["val_acc"].max().mean()
        - half.groupby("seed")["val_acc"].max().mean()
    )


def test_eight_times_the_batch_alone_and_with_its_learning_rate():
    space = {"batch_size": [4, 32], "lr": [0.1, 0.01], "max_epochs": [10, 20]}

    def accuracy(batch_size, lr, max_epochs, seed):
        return 0.9 + math.log(lr * max_epochs / batch_size) / 100

    made_good = made_up(space, accuracy)
    pairs = analysis.batch_and_rate(made_good)
    assert pairs["pairs"] == 2
    assert pairs["alone"] == pytest.approx(-math.log(8) / 100)
    assert pairs["together"] == pytest.approx(math.log(10 / 8) / 100)
    assert "Small mini-batches win mostly because" in " ".join(in_words([made_good]))
    not_made_good = made_up(space, lambda batch_size, **_: 0.9 - batch_size / 1000)
    assert "**Mini-batch and learning rate.**" in " ".join(in_words([not_made_good]))


@pytest.mark.parametrize(("settings", "drawn"), [(4, 3), (9, 9)])
def test_no_training_is_drawn_twice(settings, drawn):
    space = {"lr": [10.0**-n for n in range(settings)], "max_epochs": [1]}
    search = made_up(space, lambda lr, **_: 0.9 - lr / 10, seeds=(0, 1, 2))
    drawings = _training(search)[0].drawings
    assert len({drawing.caption for drawing in drawings}) == len(drawings) == drawn


def test_a_best_setting_at_the_edge_of_its_grid_is_said():
    def accuracy(lr, hidden_units, batch_size, **_):
        return 0.9 - (lr - 0.1) ** 2 + hidden_units / 10_000 - batch_size / 100_000

    space = {"lr": [0.01, 0.1, 1], "hidden_units": [10, 50, 100], "batch_size": [8, 16, 32]}
    words = " ".join(in_words([made_up(space, accuracy)]))
    # the best learning rate is an inner one, and mini-batches hardly matter
    assert ".** hidden_units 100 is better than any other by 0.0050. This" in words


def test_the_words_follow_the_numbers(repeated):
    words = " ".join(in_words([repeated]))
    assert "10 pairs" not in words
    assert "differ by 0.001 at most" in words
    worst = repeated.trials.sort_values("val_acc").groupby("seed").head(5)["val_acc"].mean()
    assert analysis.by_rank(repeated)[1] == pytest.approx(worst)
    assert f"the five worst {worst:.4f} (the study 0.2341)" in words
    assert "5 of 5 of them reach more than in the study" in words
    assert "**14 of 14 figures agree within noise.**" not in words  # the formula's correlations
    assert "**ShallowNetwork: matched.** Ours at best 0.9821 on validation (n=3;" in words
    for shift, verdict in ((0.005, "beaten"), (-0.02, "not reached")):
        trials = repeated.trials.assign(val_acc=repeated.trials["val_acc"] + shift)
        other = SearchResult(repeated.path, repeated.about, trials, [])
        assert f"**ShallowNetwork: {verdict}.**" in " ".join(in_words([other]))
    assert "| 0.9811 | 0.9821 ± 0.0005 | 3 | +0.0010 |" in results_table([repeated])


def test_the_verdict_allows_for_the_number_of_validation_images(repeated):
    """Of a tenth of the images, the same lead is no more than chance."""
    trials = repeated.trials.assign(val_acc=repeated.trials["val_acc"] + 0.005)
    for fraction, verdict in ((0.2, "beaten"), (0.02, "matched")):
        data = {**repeated.about["data"], "val_fraction": fraction}
        other = SearchResult(repeated.path, {**repeated.about, "data": data}, trials, [])
        assert f"**ShallowNetwork: {verdict}.**" in " ".join(in_words([other]))


def test_layers_are_in_their_order_whatever_order_names_them():
    layers = {f"hidden_units.{n}": [n] for n in (2, 1, 10, 9, 8, 7, 6, 5, 4, 3)}
    search = made_up(layers, lambda seed, **_: 0.5, model="DeepNetwork")
    assert analysis.setting_text(dict(search.configurations.iloc[0][search.params])) == (
        "hidden_units 1-2-3-4-5-6-7-8-9-10"
    )
    size = sum(p.numel() for p in DeepNetwork(range(1, 11)).parameters())
    assert analysis.capacity(search).tolist() == [size]


def test_a_tested_model_is_named_where_it_is_another(repeated):
    best = repeated.configurations.iloc[0]
    assert analysis.setting_text(PUBLISHED[0].params) == analysis.setting_text(
        {name: best[name] for name in PUBLISHED[0].params}
    )
    trials = repeated.trials.copy()
    other = (trials["lr"] == 0.01) & (trials["batch_size"] == 4) & (trials["max_epochs"] == 100)
    trials.loc[other & (trials["hidden_units"] == 25), "val_acc"] = 0.99
    tested = SearchResult(
        repeated.path, repeated.about, trials, [{"evaluation": 1, "test/acc": 0.98}]
    )
    (row,) = (line for line in results_table([tested]).splitlines() if "| section 2.6" in line)
    assert "our winner: batch_size 4, max_epochs 100, lr 0.01, hidden_units 25" in row
    assert "(0.9821 when its setting is repeated on our images)" in " ".join(in_words([tested]))


def test_a_part_of_the_test_images_is_no_test_of_the_winner(repeated):
    part = {"evaluation": 1, "images": 40, "test_set": 7000, "test/acc": 1.0}
    whole = {"evaluation": 2, "images": 7000, "test_set": 7000, "test/acc": 0.98}
    tested = SearchResult(repeated.path, repeated.about, repeated.trials, [part])
    assert analysis.tested(tested) is None
    assert "Evaluation 1 scored 40 of the 7,000 test images only." in _test(tested)[0].text
    tested = SearchResult(repeated.path, repeated.about, repeated.trials, [part, whole])
    assert analysis.tested(tested)["record"] == whole
    text = _test(tested)[0].text
    assert "On the 7,000 test images: 0.9800" in text
    assert "Evaluation 2 of 2. Evaluation 1 scored 40 of the 7,000 test images only." in text


def test_the_interval_of_a_test_has_the_images_that_were_scored(repeated):
    about = {**repeated.about, "data": {**repeated.about["data"], "source": "digits"}}
    scored = {"evaluation": 1, "images": 256, "test_set": 256, "test/acc": 240 / 256}
    test = analysis.tested(SearchResult(repeated.path, about, repeated.trials, [scored]))
    interval = scipy.stats.binomtest(240, 256).proportion_ci(method="wilson")
    assert (test["low"], test["high"]) == pytest.approx(tuple(interval))


def test_a_test_of_another_setting_is_not_judged(repeated):
    """Also where its accuracy happens to lie close: noise is not the question then."""

    def row(search: SearchResult) -> pd.Series:
        table = analysis.against_the_study([search])
        return table[table["where"] == "section 2.6"].iloc[0]

    tests = [{"evaluation": 1, "test/acc": 0.9806}]  # exactly as published
    trials, theirs = repeated.trials, PUBLISHED[0].params
    best = (trials[list(theirs)] == pd.Series(theirs)).all(axis=1)
    same = trials.assign(val_acc=trials["val_acc"].where(~best, 0.99))
    other = trials.assign(val_acc=trials["val_acc"].where(best, 0.985))
    judged = row(SearchResult(repeated.path, repeated.about, same, tests))
    assert (judged["within"], judged["note"]) == (True, "")
    not_judged = row(SearchResult(repeated.path, repeated.about, other, tests))
    assert not_judged["within"] is None
    assert not_judged["note"].startswith("our winner: ")
    words = [
        in_words([SearchResult(repeated.path, repeated.about, trials, tests)])[0]
        for trials in (same, other)
    ]
    assert ["of 15 figures" in text for text in words] == [True, False]
    assert "15 were measured again; 14 of these can be judged" in words[1]


@pytest.mark.parametrize(
    ("changes", "repeats"),
    [
        ({}, True),
        ({"data": {"source": "digits"}}, False),
        ({"data": {"split": "canonical"}}, False),
        ({"data": {"name": "FashionMNIST"}}, False),
        ({"space": {"lr": [0.1, 0.01], "hidden_units": [50, 100]}}, False),
        ({"space": {"lr": [0.3, 0.1, 0.01, 0.001, 0.0001]}}, True),  # it has grown
        ({"model": "DeepNetwork"}, False),
        ({"strategy": {"name": "random", "n": 384, "seed": 0}}, False),
        ({"space": {"momentum": [0.0, 0.9]}}, False),  # another axis
        ({"fixed": {"optimizer": "adam"}}, False),  # another training
    ],
)
def test_the_study_is_compared_where_its_own_grid_was_run(repeated, changes, repeats):
    space = repeated.about["space"]
    wanted = {
        **repeated.about,
        **changes,
        "data": {**repeated.about["data"], **changes.get("data", {})},
        "space": {**space, **changes["space"]} if "space" in changes else space,
    }
    other = SearchResult(Path("other"), wanted, repeated.trials, [])
    assert analysis.repeats_the_study(other) == repeats
    assert len(analysis.comparable([other])) == repeats
    words = " ".join(in_words([other]))
    assert ("the study" in words) == repeats
    assert ("published" in " ".join(in_short([other]))) == repeats
    assert ("95 % of repetitions" in lead([other]).caption) == repeats
    assert ("**The best of other:**" in words) == (not repeats)


@pytest.mark.parametrize(
    ("fixed", "repeats"),
    [
        ({"batch_size": 32, "lr": 0.01, "max_epochs": 25}, True),
        ({"batch_size": 32, "lr": 0.1, "max_epochs": 25}, False),
        ({"batch_size": 32, "lr": 0.01}, False),
        ({"batch_size": 32, "lr": 0.01, "max_epochs": 25, "hidden_units.3": 10}, False),
    ],
)
def test_the_study_of_two_layers_has_its_own_training(fixed, repeats):
    widths = [10, 20, 128, 256, 512, 1024, 2048]
    space = {"hidden_units.1": widths, "hidden_units.2": widths}
    search = made_up(space, lambda seed, **_: 0.97, model="DeepNetwork", fixed=fixed)
    assert analysis.repeats_the_study(search) == repeats


def test_of_the_shipped_searches_the_study_s_four_grids_repeat_it():
    repeating = set()
    for file in (STUDY.parents[1] / "configs" / "search").glob("*.yaml"):
        about = {"fixed": {}, **read_config(file)}
        if isinstance(about["strategy"], str):
            about["strategy"] = {"name": about["strategy"]}
        about["data"] = {"name": "MNIST", **about["data"]}
        if analysis.repeats_the_study(SearchResult(file, about, pd.DataFrame(), [])):
            repeating.add(file.stem)
    assert repeating == {"shallow_grid", "deep2_grid", "deep3_grid", "resnet18_regimes"}


def test_beside_the_study_a_search_of_ones_own_comes_first_and_is_not_compared(repeated):
    """Its digits have other accuracies for the very settings that were published."""
    data = {**repeated.about["data"], "source": "digits"}
    trials = repeated.trials.assign(val_acc=repeated.trials["val_acc"] * 0.8)
    own = SearchResult(Path("own"), {**repeated.about, "data": data}, trials, [])
    words = in_words([own, repeated])
    assert words[0].startswith("**The best of own:** batch_size 8, max_epochs 50, lr 0.1, hidden")
    assert ", with 0.7857 ± 0.0004 on validation (n=3)." in words[0]
    assert words[1].startswith("**What matters most in own:** ")
    (compared,) = analysis.comparable([own, repeated])
    assert compared is repeated
    assert "agree within noise" in words[2]


def _transfer() -> SearchResult:
    """ResNet-18 in three regimes, with both stems and BatchNorm modes, on few images and all."""

    def accuracy(seed, regime, stem, data_train_fraction, freezing_batch_norm):
        gain = {"scratch": 0.0, "finetune": 0.2, "freeze": 0.1}[regime] * (1 - data_train_fraction)
        spoilt = (regime, stem, freezing_batch_norm) == ("freeze", "reset", "frozen")
        return 0.7 + 0.2 * data_train_fraction + gain - 0.05 * spoilt + seed / 1000

    axes = {
        "regime": ["scratch", "finetune", "freeze"],
        "data.train_fraction": [0.01, 1.0],
        "stem": ["sum", "reset"],
        "freezing.batch_norm": ["frozen", "adapt"],
    }
    return made_up(axes, accuracy, seeds=(0, 1, 2), model="ResNet18")


def test_what_pretrained_weights_give_and_what_a_random_stem_costs():
    text = next(text for text in in_words([_transfer()]) if "ImageNet" in text)
    assert text.startswith("**ImageNet's weights help on digits where images are few.**")
    assert "with 1 % of the images 0.7030, 0.9010 and 0.8020; with 100 % of the images" in text
    assert "+0.1980 with the fewest images and +0.0000 with the most (n=3)." in text
    text = next(text for text in in_words([_transfer()]) if "random frozen stem" in text)
    assert (
        "with 1 % of the images 0.8020 and 0.7520 if BatchNorm is frozen, 0.8020 and 0.8020 if it"
    ) in text


def test_the_best_of_a_regime_stands_below_the_studys():
    lines = results_table([_transfer()]).splitlines()
    published, ours = (line for line in lines if line.startswith("| table 4.3"))
    assert "| 0.9874 | not measured |" in published
    assert "batch_norm" not in ours  # where nothing is frozen, it has no effect
    assert "; our best: 28 pixels, stem " in ours
    assert "| 0.9874 | 0.9010 ± 0.0010 | 3 | -0.0864 |" in ours


def test_what_matters_most_is_said_whatever_was_searched():
    def accuracy(lr, hidden_units, **_):
        return 0.5 + lr + hidden_units / 1000

    grid = made_up({"lr": [0.1, 0.2], "hidden_units": [1, 2]}, accuracy)
    assert in_words([grid])[1].startswith(
        "**What matters most in made_up:** lr explains 100 % of the var"
    )
    data = {**grid.about["data"], "source": "digits"}
    few = made_up(
        {"lr": [0.1, 0.2], "hidden_units": [1, 2]}, accuracy, strategy={"name": "random", "n": 4}
    )
    assert in_words([few])[1].endswith(
        "lr: between its best and its worst value the mean accuracy differs by 0.1000."
    )
    alone = made_up({"lr": [0.1], "hidden_units": [1]}, accuracy, data=data)
    assert in_words([alone]) == [
        "**The best of made_up:** lr 0.1, hidden_units 1, with 0.6010 on validation (n=1)."
    ]


# The three sentences and the figure at the top


def _figures_in(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\b0\.\d{4}\b", text)]


def test_the_sentences_of_the_study_have_its_numbers(repeated):
    against = analysis.against_the_study([repeated])
    agree = int((against["within"] == True).sum())  # noqa: E712
    judged = int(against["within"].notna().sum())
    assert agree < judged  # the formula has other correlations
    agreement, best, matters = in_short([repeated])
    assert agreement.startswith(f"**{agree} of {judged} published figures are reproduced within")
    assert f"noise** (n=3); those that are not: {judged - agree} in figure 2.4." in agreement
    winner = repeated.configurations.iloc[0]
    assert _figures_in(best) == [round(winner["acc"], 4), round(winner["sd"], 4)]
    assert "ShallowNetwork" in best
    assert "(n=3)" in best
    share = analysis.variance_shares(repeated)
    assert f"{share.index[0]} explains {100 * share.iloc[0]:.0f} %" in matters


def test_the_figure_of_the_study_has_each_published_model_beside_ours(repeated):
    rows = _published_rows([repeated])
    theirs = [p for p in PUBLISHED if p.where == "table 2.1, best five"]
    assert rows["published"].tolist() == [p.value for p in theirs]
    assert np.allclose(rows["acc"], [p.value + 0.001 for p in theirs])
    assert rows["label"].iloc[0] == "batch_size 8, max_epochs 50"  # in which the five differ
    figure = figures.compared(rows, figures.WIDE)
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    drawn = [line for line in axes.lines if len(line.get_xdata())]  # the legend's have no data
    dots = [line.get_xdata()[0] for line in drawn if line.get_marker() == "o"]
    assert dots == pytest.approx((100 * (1 - rows["acc"])).tolist())
    bands = [line.get_xdata() for line in drawn if line.get_linewidth() == 6]
    for band, row in zip(bands, rows.itertuples(), strict=True):
        ends = 100 * (1 - row.published - row.noise), 100 * (1 - row.published + row.noise)
        assert sorted(band) == pytest.approx(sorted(ends))


def test_the_top_of_a_report_on_ones_own_searches(searched):
    (search,) = read(searched)
    best, matters, test = in_short([search])
    winner = search.configurations.iloc[0]
    assert _figures_in(best) == [round(winner["acc"], 4), round(winner["sd"], 4)]
    assert analysis.setting_text(dict(winner[list(SPACE)])) in best
    top = analysis.by_importance(search)[0]
    assert matters.split(":** ")[1].startswith(f"{top} explains ")
    (record,) = search.tests
    assert f"**On the 180 test images**, it is right in {record['test/acc']:.4f}" in test
    drawn = lead([search])
    assert f"by {figures.label(top)}: the parameter that matters most" in drawn.caption
    axes = drawn.figure.axes[0]
    best_of_each = search.first_round.groupby(top)["acc"].max()
    assert axes.lines[-1].get_ydata() == pytest.approx(100 * (1 - best_of_each).to_numpy())
    # of several: the best configurations of each, by its name
    other = SearchResult(Path("other"), search.about, search.trials, [])
    sentences = in_short([search, other])
    assert len(sentences) == 3
    assert sentences[0].startswith("**The best on validation:** ShallowNetwork 0.")
    texts = [text.get_text() for text in lead([search, other]).figure.axes[0].texts]
    assert texts == ["small", "other"]


def test_the_top_of_a_report_without_anything_to_compare():
    alone = made_up({"lr": [0.1]}, lambda lr, seed: 0.9)
    best, matters, test = in_short([alone])
    assert best == "**The best on validation** is lr 0.1, with 0.9000 (n=1)."
    assert matters == "**What matters most** cannot be said: made_up varies nothing."
    assert test.startswith("**Not tested yet:** ")
    assert lead([alone]) is not None
    none = SearchResult(Path("none"), alone.about, alone.trials.assign(state="FAIL"), [])
    assert in_short([none]) == []
    assert lead([none]) is None


def test_a_perfect_accuracy_has_its_place_on_a_scale_without_zero():
    assert figures.errors(pd.Series([1.0, 0.98])).tolist() == pytest.approx([0.01, 2.0])


def test_four_groups_have_the_ends_of_the_values():
    """The first began a thousandth below the smallest, at less than a learning rate can be."""
    rates = [0.00101 * 1.5**n for n in range(12)]
    labels = analysis.groups(pd.Series(rates)).cat.categories
    assert labels[0].startswith("0.00101 to ")
    assert labels[-1].endswith(f" to {analysis.value_text(rates[-1])}")
    edges = np.quantile(rates, [0, 0.25, 0.5, 0.75, 1])
    assert [label.split(" to ")[1] for label in labels] == [f"{edge:.3g}" for edge in edges[1:]]


@pytest.mark.parametrize(("axes", "drawn"), [(2, 2), (4, 12), (5, 5)])
def test_many_parameters_are_not_drawn_by_all_the_others(axes, drawn):
    names = ["lr", "batch_size", "hidden_units", "momentum", "dropout"][:axes]
    search = made_up(
        {name: [1, 2] for name in names},
        lambda seed, **values: 0.5 + values["lr"] / 10 + sum(values.values()) / 1000,
    )
    (block,) = _panels(search)
    assert len(block.drawings) == drawn
    by_lr = [drawing for drawing in block.drawings if drawing.name.endswith("_by_lr")]
    assert len(by_lr) == axes - 1


def test_the_page_has_the_first_thousand_rows_and_the_file_all():
    table = Table("t", "T", pd.DataFrame({"n": range(1001)}), "Note.")
    assert table.page_note == "Note. The first 1,000 of 1,001; all are in tables/t.csv."
    content = Content("", "", None, [], [], [Block("", "", [table])], [], [])
    page = _page(content)
    assert '<td class="n">999</td>' in page
    assert '<td class="n">1000</td>' not in page
    ((_, csv), _) = _table_files(content.blocks)
    assert csv.splitlines()[-1] == "1000"


# The mistakes of a test


def test_the_confusion_matrix_counts_each_test_image(searched):
    (evaluation,) = json.loads((searched / "test.json").read_text())
    confusion = np.array(evaluation["confusion"])
    assert confusion.sum() == 180
    assert confusion.trace() / 180 == pytest.approx(evaluation["test/acc"], abs=1e-6)
    assert len(evaluation["mistakes"]) == min(60, 180 - confusion.trace())
    sure = [mistake["probability"] for mistake in evaluation["mistakes"]]
    assert sure == sorted(sure, reverse=True)


def test_a_mistake_is_of_the_image_that_it_shows(searched):
    import base64
    import zlib

    from mnist_lightning.runs import checkpoints

    (evaluation,) = json.loads((searched / "test.json").read_text())
    checkpoint = checkpoints.read(searched / "checkpoints" / "best.ckpt")
    model = ShallowNetwork(**checkpoint["hyper_parameters"])
    model.load_state_dict(checkpoint["state_dict"])
    for mistake in evaluation["mistakes"]:
        pixels = np.frombuffer(zlib.decompress(base64.b64decode(mistake["pixels"])), np.uint8)
        image = torch.tensor(pixels.reshape(1, 1, 28, 28) / 255, dtype=torch.float32)
        probabilities = model(image).softmax(1)[0]
        assert probabilities.argmax() == mistake["predicted"] != mistake["label"]
        assert probabilities.max().item() == pytest.approx(mistake["probability"], abs=1e-4)


@pytest.mark.parametrize("returns", [None, torch.tensor(0.5)])
def test_a_test_step_of_ones_own_may_return_anything(returns, digits):
    class Own(ShallowNetwork):
        def test_step(self, batch, batch_idx):
            super().test_step(batch, batch_idx)
            return returns

    mistakes = Mistakes()
    trainer(callbacks=[mistakes]).test(Own(10), digits, verbose=False)
    assert mistakes.facts(digits.test_set, digits.spec.classes) == {}


# The page and the files


def test_the_page_needs_no_other_file(report):
    page = (report / "index.html").read_text()
    outside = re.findall(r'(?:src|href)="(?!#|data:)([^"]*)"', page)
    assert not outside
    assert "@import" not in page
    assert len(page) <= 1_000_000
    drawn = len(list((report / "figures").glob("*.svg")))
    assert page.count("<svg") == drawn + 1  # the first also for a phone
    assert page.count('role="img" aria-label="') == page.count("<svg")
    ids = re.findall(r'<(?:h2|h3|section|table|input)[^>]* id="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_a_report_on_ones_own_search_is_about_that_search(report, searched):
    (search,) = read(searched)
    words = (report / "README.md").read_text()
    first = next(line for line in words.partition("## In words")[2].splitlines() if line)
    setting = analysis.setting_text(dict(search.configurations.iloc[0][list(SPACE)]))
    assert first.startswith(
        f"- **The best of small:** {setting}, with {search.configurations['acc'][0]:.4f}"
    )
    assert "- **What matters most in small:** " in words
    for text in (words, (report / "index.html").read_text()):
        assert "published" not in text.lower()
        assert "the study" not in text
        assert "Not measured" not in text
    assert not (report / "tables" / "results.md").exists()


def test_each_figure_and_table_is_a_file(report, searched):
    (search,) = read(searched)
    names = {file.stem for file in (report / "figures").glob("*.png")}
    assert names == {file.stem for file in (report / "figures").glob("*.svg")}
    panels = {f"small_{x}_by_{c}" for x in ("batch_size", "lr") for c in SPACE if c != x}
    assert panels <= names
    for wanted in ("correlations", "importance", "variance", "confusion", "mistakes"):
        assert f"small_{wanted}" in names
    table = pd.read_csv(report / "tables" / "small_all.csv")
    assert np.allclose(table["acc"], search.configurations["acc"])
    lines = (report / "tables" / "small_all.md").read_text().splitlines()
    assert len(lines) == 2 + 12
    assert lines[2].split(" | ")[4] == f"{search.configurations['acc'][0]:.4f}"


@pytest.mark.slow
def test_the_tables_alone_make_the_same_report(report, searched, tmp_path):
    """What is kept of a search in a repository: without trials, checkpoints, state."""
    kept = tmp_path / "small"
    kept.mkdir()
    for name in ("search.json", "results.json", "curves.json.gz", "test.json"):
        shutil.copy(searched / name, kept)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    for file in (report / "tables").iterdir():
        assert (tmp_path / "out" / "tables" / file.name).read_bytes() == file.read_bytes()
    for file in (report / "figures").glob("*.svg"):
        assert (tmp_path / "out" / "figures" / file.name).read_bytes() == file.read_bytes()


def test_a_half_finished_search_says_so(searched, tmp_path, capsys):
    half = tmp_path / "half"
    shutil.copytree(searched, half)
    (half / "test.json").unlink()
    for file in sorted((half / "trials").iterdir())[:20]:
        file.unlink()
    assert main(["report", str(half), "--out", str(tmp_path / "out")]) == 0
    assert "4 finished, 20 to go – not finished yet" in capsys.readouterr().out
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Not finished yet: half" in page
    assert "has not been tested yet" in page
    for file in (half / "trials").iterdir():
        file.unlink()
    assert main(["report", str(half), "--out", str(tmp_path / "out")]) == 0
    assert "No trial has finished yet" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.slow
def test_a_report_needs_no_torch(searched, tmp_path):
    code = (
        "from mnist_lightning.__main__ import main; import sys;"
        f"assert main(['report', {str(searched)!r}, '--out', {str(tmp_path)!r}]) == 0;"
        "print(sorted({'torch', 'lightning', 'torchvision'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("package", ["pandas", "matplotlib", "jinja2", "optuna"])
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(package):
    code = (
        f"import sys; sys.modules[{package!r}] = None;"
        f"from mnist_lightning.__main__ import main; main(['report', {str(STUDY)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(
        rf"error: report needs {package}: \S* -m pip install .*\[search\]'?\n", done.stderr
    )


def test_a_word_in_a_result_cannot_become_part_of_the_page(searched, tmp_path):
    evil = tmp_path / "evil"
    shutil.copytree(searched, evil)
    for file in (evil / "trials").iterdir():
        record = json.loads(file.read_text())
        record |= {"state": "FAIL", "error": "<script>alert(1)</script>"}
        file.write_text(json.dumps(sealed(record)))
        break
    assert main(["report", str(evil), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere"], "nowhere is not the folder of a search"),
        ([], "of which search or run?"),
        (["{searched}", "--colour"], "no option --colour"),
        (["{searched}", "--out", "{searched}/search.json/x"], "search.json is not a folder"),
    ],
)
def test_mistakes_get_one_line(searched, argv, said, capsys):
    assert main(["report", *(argument.format(searched=searched) for argument in argv)]) == 1
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""  # it says so before it works


def test_two_searches_of_one_name_are_refused(searched, tmp_path, capsys):
    shutil.copytree(searched, tmp_path / "small")
    argv = ["report", str(searched), str(tmp_path / "small"), "--out", str(tmp_path / "out")]
    assert main(argv) == 1
    assert "two searches are called small" in capsys.readouterr().err


def test_damaged_curves_are_named(searched, tmp_path, capsys):
    kept = tmp_path / "small"
    kept.mkdir()
    for name in ("search.json", "results.json"):
        shutil.copy(searched / name, kept)
    content = (searched / "curves.json.gz").read_bytes()
    (kept / "curves.json.gz").write_bytes(content[: len(content) // 2])
    assert main(["report", str(kept), "--out", str(tmp_path / "out")]) == 1
    assert "curves.json.gz is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_table_shows_numbers_as_a_reader_wants_them():
    frame = pd.DataFrame(
        {"acc": [0.98111, None], "difference": [0.001, -0.2], "within": [True, None], "n": [3, 3]}
    )
    table = Table("t", "T", frame)
    assert table.markdown().splitlines()[2:] == [
        "| 0.9811 | +0.0010 | yes | 3 |",
        "| – | -0.2000 | – | 3 |",
    ]
    assert table.numeric == [True, True, False, True]


# What is committed


@pytest.mark.skipif(not STUDY.is_dir(), reason="no results are committed")
def test_the_readme_has_the_table_that_the_program_writes():
    searches = read(STUDY)
    table = results_table(searches)
    assert table == (STUDY / "tables" / "results.md").read_text()
    assert table in (STUDY.parent.parent / "README.md").read_text()
    words = (STUDY / "README.md").read_text()
    assert all(f"\n- {text}\n" in words for text in in_words(searches))


@pytest.mark.skipif(not STUDY.is_dir(), reason="no results are committed")
def test_the_committed_page_is_at_most_a_megabyte_for_each_search():
    page = (STUDY / "index.html").read_text()
    parts = re.split(r'<summary><h2 id="', page)
    assert len(parts) > 8
    assert max(len(part.encode()) for part in parts) <= 1_000_000
    for name, text in ((part.partition('"')[0], part) for part in parts):
        if (STUDY / name / "search.json").is_file():
            trials = json.loads((STUDY / name / "results.json").read_text())
            settings = {json.dumps(trial["params"]) for trial in trials}
            assert text.count("<svg") > (2 if len(settings) > 2 else 0), name
    top = parts[0].partition('<p class="tools">')[0].partition("<main>")[2]
    sentences = re.findall("<p>(.*?)</p>", top)
    assert [re.sub("</?strong>", "**", text) for text in sentences] == in_short(read(STUDY))
    assert len(sentences) == 3


# In a browser


@pytest.fixture
def opened(report):
    """Opens a page in Chromium: its tab, after each test checked for errors and requests."""
    sync_api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("needs Chromium")
    said: list[str] = []
    asked: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])

        def open_page(file: Path, width: int, height: int, scheme: str = "light", **settings):
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme, **settings
            )
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(file.as_uri())
            return page

        yield open_page
        browser.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


SCREENS = [(1280, 800), (390, 844)]


@pytest.mark.browser
@pytest.mark.parametrize("size", SCREENS)
@pytest.mark.parametrize("of", ["own", "study"])
def test_the_first_screen_is_a_picture_and_three_sentences(report, opened, size, of):
    page = opened((report if of == "own" else STUDY) / "index.html", *size)
    picture = page.locator(".lead svg:visible")
    assert picture.count() == 1
    sentences = page.locator(".lead .said p")
    assert sentences.count() == 3
    boxes = [picture.bounding_box(), *(sentences.nth(i).bounding_box() for i in range(3))]
    for box in boxes:
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= size[1]
    assert boxes[0]["width"] >= min(700, size[0] - 40)
    # its text can be read
    assert page.evaluate(_SMALLEST_TEXT) >= 9.5
    # what is below is folded, but for the only search, of which all figures are
    assert page.locator("figure svg:visible").count() == 1
    assert ("published" in picture.text_content()) == (of == "study")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SCREENS)
@pytest.mark.parametrize("of", ["own", "study"])
def test_everything_can_be_opened_and_read(report, opened, size, scheme, of):
    folder = report if of == "own" else STUDY
    page = opened(folder / "index.html", *size, scheme)
    page.get_by_role("button", name="Open all").click()
    assert page.locator("details:not([open])").count() == 0
    # nothing is wider than the window: no sideways scrolling
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    figures = page.locator(".figures svg")
    widths = figures.evaluate_all("all => all.map(one => one.getBoundingClientRect().width)")
    assert len(widths) == page.content().count("<svg") - 2
    assert min(widths) >= min(300, size[0] - 60)
    # text and its ground differ enough (WCAG: 4.5), and the picture has the ground's colours
    assert page.evaluate(_CONTRAST) >= 4.5
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")


@pytest.mark.browser
@pytest.mark.parametrize("size", SCREENS)
def test_a_table_sorts_and_filters_by_column(report, opened, size):
    page = opened(report / "index.html", *size)
    page.get_by_role("button", name="Open all").click()
    heads = page.locator("#small_all thead tr:first-child th")
    names = heads.all_inner_texts()
    rows = page.locator("#small_all tbody tr:visible")

    def values(name: str) -> list[float]:
        at = names.index(name)
        return [float(row.locator("td").nth(at).inner_text()) for row in rows.all()]

    head = heads.nth(names.index("validation accuracy"))
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert values("validation accuracy") == sorted(values("validation accuracy"), reverse=True)
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    everything = values("validation accuracy")
    assert everything == sorted(everything)
    assert len(everything) == 12

    def ask(name: str, text: str) -> None:
        page.locator("#small_all").get_by_label(f"Filter by {name}", exact=True).fill(text)

    ask("lr", "0.01")  # not 0.1, nor 0.001
    assert values("lr") == [0.01] * 4
    ask("batch size", "32")
    assert set(zip(values("lr"), values("batch size"), strict=True)) == {(0.01, 32)}
    assert page.locator("#small_all output").inner_text() == "2 of 12 rows"
    ask("batch size", "")
    ask("lr", "")
    middle = sorted(everything)[6]
    for sign, count in ((">=", 6), ("<", 6)):
        ask("validation accuracy", f"{sign} {middle}")
        wanted = [v for v in everything if (v >= middle if sign == ">=" else v < middle)]
        assert values("validation accuracy") == wanted
        assert abs(len(wanted) - count) <= 3
    ask("validation accuracy", "")
    assert values("validation accuracy") == everything
    assert page.locator("#small_all output").inner_text() == ""


@pytest.mark.browser
def test_the_head_of_a_long_table_stays_in_sight(opened):
    page = opened(STUDY / "index.html", 1280, 800)
    page.get_by_role("button", name="Open all").click()
    scroll = page.locator(".scroll", has=page.locator("#shallow_grid_all"))
    scroll.evaluate("box => { box.scrollIntoView(); box.scrollTop = 4000; }")
    assert scroll.evaluate("box => box.scrollTop") == 4000
    top = scroll.bounding_box()["y"]
    head = page.locator("#shallow_grid_all thead").bounding_box()
    assert abs(head["y"] - top) <= 1
    assert page.locator("#shallow_grid_all tbody tr").first.bounding_box()["y"] < top


@pytest.mark.browser
def test_a_search_that_is_named_in_the_address_is_opened(opened):
    page = opened(STUDY / "index.html", 1280, 800)
    page.goto((STUDY / "index.html").as_uri() + "#shallow_wide")
    assert page.locator("details[open] > summary").count() > 1
    assert "shallow_wide" in page.locator("main > details[open] > summary").inner_text()


@pytest.mark.browser
def test_without_javascript_the_page_is_whole(report, opened):
    page = opened(report / "index.html", 390, 844, java_script_enabled=False)
    assert page.locator(".lead .said p").count() == 3
    closed = page.locator("details:not([open]) > summary:visible")
    while closed.count():
        closed.first.click()
    assert page.locator("#small_all tbody tr:visible").count() == 12
    assert page.locator("button, input").count() == 0
    drawn = len(list((report / "figures").glob("*.svg")))
    assert page.locator("figure svg:visible").count() == drawn


_SMALLEST_TEXT = """() => {
  const svg = [...document.querySelectorAll(".lead svg")].find(one => one.checkVisibility());
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  const texts = [...svg.querySelectorAll("text")].filter(text => text.textContent.trim());
  return scale * Math.min(...texts.map(text => parseFloat(getComputedStyle(text).fontSize)));
}"""
_CONTRAST = """() => {
  const light = css => {
    const [r, g, b] = css.match(/[\\d.]+/g).map(Number).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = light(getComputedStyle(document.body).backgroundColor);
  const ratios = [...document.querySelectorAll("p, td, figcaption, a, summary, figure svg")]
    .map(element => light(getComputedStyle(element).color))
    .map(ink => (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05));
  return Math.min(...ratios);
}"""
