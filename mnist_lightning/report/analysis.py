"""The numbers of a report: pandas in, pandas out. Nothing here draws, and nothing needs PyTorch.

A *trial* is one training. A *configuration* is one setting of the parameters; its numbers are the
means of its trials over the seeds. Accuracies are validation accuracies, by the search's objective,
unless they are called test.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd

from mnist_lightning.files import read_json
from mnist_lightning.report.published import GRIDS, PUBLISHED, Published
from mnist_lightning.runs import evaluations
from mnist_lightning.search import space
from mnist_lightning.search.results import load_results, search_folders

PATIENCE = 10  # epochs: EarlyStopping's default
PIXELS, CLASSES = 784, 10
MANY = 8  # an axis with more values than this is shown in four groups of equal size


@dataclass(frozen=True)
class SearchResult:
    """A search as its folder holds it, finished or not.

    Args:
        path: the folder.
        about: ``search.json``: what was searched, on which data, and its provenance.
        trials: a row each, see ``results.load_results``.
        tests: ``test.json``: the test evaluations of the winner, see ``evaluations.read``.
    """

    path: Path
    about: Mapping[str, Any]
    trials: pd.DataFrame
    tests: Sequence[Mapping[str, Any]]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def model(self) -> str:
        return str(self.about["model"]).rpartition(".")[2]

    @property
    def objective(self) -> str:
        """The column that trials are ranked by: ``val_acc`` or ``best_val_acc``."""
        return str(self.about["objective"])

    @cached_property
    def complete(self) -> pd.DataFrame:
        """The trials that have a result to rank by."""
        if self.trials.empty:
            return self.trials
        return self.trials[self.trials["state"] == "COMPLETE"]

    @cached_property
    def axes(self) -> list[str]:
        """The parameters that vary in the first round, in the order of the search's space."""
        varies = self.about["space"]
        return [name for name in varies if name in self.complete and _varies(self.complete[name])]

    @property
    def params(self) -> list[str]:
        """All parameters of a trial but its seed."""
        names = [*self.about["fixed"], *self.about["space"]]
        return [name for name in dict.fromkeys(names) if name in self.trials]

    @cached_property
    def planned(self) -> int:
        """Trials that the search consists of, as far as it is known by now."""
        if self.about["strategy"]["name"] == "optuna":
            return int(self.about["strategy"]["n"])
        scores = dict.fromkeys(self.trials.get("id", ()))
        for row in self.complete.itertuples():
            scores[row.id] = space.Score(getattr(row, self.objective), row.val_loss)
        rounds = space.rounds(
            **{name: self.about[name] for name in space.DEFINITION},
            scores=scores,
            grown_from=self.about.get("grown_from", ()),
        )
        ids = {trial.id for trials in rounds for trial in trials}
        # beside them, later rounds of what it grew from
        return len(ids | set(self.trials["id"])) if "grown_from" in self.about else len(ids)

    @property
    def finished(self) -> bool:
        return len(self.trials) >= self.planned

    def counts(self) -> dict[str, int]:
        """Trials by what became of them."""
        states = self.trials["state"].value_counts() if len(self.trials) else {}
        names = {"finished": "COMPLETE", "failed": "FAIL", "pruned": "PRUNED"}
        counted = {name: int(states.get(state, 0)) for name, state in names.items()}
        return {**counted, "to go": max(0, self.planned - len(self.trials))}

    @cached_property
    def configurations(self) -> pd.DataFrame:
        """A row for each setting, the best first.

        Columns: ``round``, the parameters, ``n`` seeds, ``acc`` and its standard deviation ``sd``
        (none for n=1), ``val_loss``, ``train_loss``, ``gap`` between the two, ``seconds``.
        """
        if self.complete.empty:
            return pd.DataFrame()
        grouped = self.complete.groupby(["round", *self.params], dropna=False, sort=False)
        table = grouped.agg(
            n=("seed", "size"),
            acc=(self.objective, "mean"),
            sd=(self.objective, "std"),
            val_loss=("val_loss", "mean"),
            train_loss=("train_loss", "mean"),
            seconds=("seconds", "mean"),
        ).reset_index()
        table.insert(table.columns.get_loc("seconds"), "gap", table.val_loss - table.train_loss)
        return table.sort_values(["acc", "val_loss"], ascending=[False, True], ignore_index=True)

    @property
    def networks(self) -> pd.DataFrame:
        """``epochs`` and ``seconds`` of each training, of complete trials.

        Networks that a longer training passes through (10, 20 and 50 of 100 epochs) are one.
        """
        names = [name for name in self.params if name != "max_epochs"]
        keys = ["round", *names, "seed"]
        return self.complete.groupby(keys, dropna=False)[["epochs", "seconds"]].max()

    @property
    def first_round(self) -> pd.DataFrame:
        """Configurations of the round that covers the space evenly."""
        return (
            self.configurations[self.configurations["round"] == 0]
            if len(self.configurations)
            else self.configurations
        )

    def best_trials(self, of: str, count: int = 3) -> pd.DataFrame:
        """Whole trials from the ``best``, ``median`` or ``worst`` end, of the first seed."""
        trials = self.complete[self.complete["seed"] == self.about["seeds"][0]]
        order = [self.objective, "val_loss", "number"]
        trials = trials.sort_values(order, ascending=[False, True, True])
        start = {"best": 0, "median": (len(trials) - count) // 2, "worst": len(trials) - count}[of]
        return trials.iloc[max(0, start) : max(0, start) + count]


Found = SearchResult  # its name before


def read(path: Path) -> list[SearchResult]:
    """The search in a folder, or all the searches in the folders below it.

    Raises:
        ValueError: there is none, or a file of one is damaged.
    """
    return [
        SearchResult(
            folder,
            read_json(folder / "search.json", "restore it, or move it away"),
            load_results(folder),
            evaluations.read(folder),
        )
        for folder in search_folders(path)
    ]


def _varies(column: pd.Series) -> bool:
    return column.nunique() > 1


# How the accuracy depends on the parameters


def groups(column: pd.Series) -> pd.Series:
    """A category for each value, in order; where there are many, four groups of equal size."""
    if column.nunique() <= MANY:
        values = sorted(column.unique(), key=lambda v: (isinstance(v, str), v))
        labels = [value_text(value) for value in values]
        return pd.Series(
            pd.Categorical(column.map(value_text), categories=labels, ordered=True), column.index
        )
    # the edges themselves: the first category begins a little below the smallest value
    bins, edges = pd.qcut(column, 4, duplicates="drop", retbins=True)
    ends = [value_text(edge) for edge in edges.tolist()]
    return bins.cat.rename_categories([f"{a} to {b}" for a, b in itertools.pairwise(ends)])


def value_text(value: Any) -> str:
    """A parameter's value as a reader would write it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def correlations(search: SearchResult) -> pd.DataFrame:
    """Pearson's correlation of each axis that is a number with the accuracy of the first round.

    Returns:
        Index: the axes. ``mean`` and ``sd`` over the seeds.
    """
    axes = numeric_axes(search)
    first = search.complete[search.complete["round"] == 0]
    by_seed = {
        seed: trials[axes].corrwith(trials[search.objective])
        for seed, trials in first.groupby("seed")
    }
    table = pd.DataFrame(by_seed, index=axes)
    return pd.DataFrame({"mean": table.mean(axis=1), "sd": table.std(axis=1)})


def correlation_matrix(search: SearchResult) -> pd.DataFrame:
    """Pearson's correlations among the axes and the accuracy, over the first round."""
    return search.first_round[[*numeric_axes(search), "acc"]].corr()


def numeric_axes(search: SearchResult) -> list[str]:
    """Those of the axes that hold numbers."""
    return [axis for axis in search.axes if pd.api.types.is_numeric_dtype(search.complete[axis])]


def marginals(search: SearchResult) -> pd.DataFrame:
    """For each value of each axis, over the configurations of the first round: how good they are.

    Returns:
        Columns ``axis``, ``value``, ``configurations`` (how many), ``mean``, ``median`` and
        ``best`` accuracy.
    """
    configurations = search.first_round
    rows = []
    for axis in search.axes:
        for value, acc in configurations["acc"].groupby(
            groups(configurations[axis]), observed=True
        ):
            rows.append(
                {
                    "axis": axis,
                    "value": value,
                    "configurations": len(acc),
                    "mean": acc.mean(),
                    "median": acc.median(),
                    "best": acc.max(),
                }
            )
    return pd.DataFrame(rows)


def interaction(search: SearchResult, row: str, column: str) -> pd.DataFrame:
    """Mean accuracy of the first round's configurations, by the values of two axes."""
    configurations = search.first_round
    keys = [groups(configurations[row]).rename(row), groups(configurations[column]).rename(column)]
    return configurations["acc"].groupby(keys, observed=True).mean().unstack()


def variance_shares(search: SearchResult) -> pd.Series:
    """Shares of the variance of the accuracy over a full grid, by parameter and pair of them.

    The functional analysis of variance, exact since the grid is complete (Hutter et al. 2014,
    "An efficient approach for assessing hyperparameter importance"). What is not listed is due to
    three parameters and more together.

    Returns:
        Index: ``a`` and ``a × b``, the largest share first. Empty where there is no full grid of
        two parameters or more.
    """
    configurations, axes = search.first_round, search.axes
    sizes = [configurations[axis].nunique() for axis in axes] if len(configurations) else []
    if (
        search.about["strategy"]["name"] != "grid"
        or len(axes) < 2
        or math.prod(sizes) != len(configurations)
    ):
        return pd.Series(dtype=float)
    values = configurations.sort_values(axes)["acc"].to_numpy().reshape(sizes)
    values = values - values.mean()
    everything = (values**2).mean()
    shares: dict[str, float] = {}
    main = {}
    for i, axis in enumerate(axes):
        others = tuple(k for k in range(len(axes)) if k != i)
        main[i] = values.mean(axis=others, keepdims=True)
        shares[axis] = (main[i] ** 2).mean() / everything
    for i, j in itertools.combinations(range(len(axes)), 2):
        others = tuple(k for k in range(len(axes)) if k not in (i, j))
        both = values.mean(axis=others, keepdims=True) - main[i] - main[j]
        shares[f"{axes[i]} × {axes[j]}"] = (both**2).mean() / everything
    return pd.Series(shares).sort_values(ascending=False)


def importance(search: SearchResult) -> pd.Series:
    """Optuna's fANOVA over the configurations of the first round: shares that add up to one.

    Returns:
        Index: the axes, the most important first. Empty for fewer than ten configurations.
    """
    configurations = search.first_round
    if len(configurations) < 10 or len(search.axes) < 2:
        return pd.Series(dtype=float)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    distributions: dict[str, Any] = {
        axis: optuna.distributions.CategoricalDistribution(
            sorted(configurations[axis].unique().tolist())
        )
        if configurations[axis].nunique() <= MANY
        else _range(configurations[axis])
        for axis in search.axes
    }
    study.add_trials(
        [
            optuna.create_trial(
                params={axis: getattr(value, "item", lambda v=value: v)() for axis, value in row},
                distributions=distributions,
                value=acc,
            )
            for row, acc in zip(
                (
                    list(zip(search.axes, r, strict=True))
                    for r in configurations[search.axes].to_numpy(object)
                ),
                configurations["acc"],
                strict=True,
            )
        ]
    )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return pd.Series(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _range(column: pd.Series) -> Any:
    low, high, log = column.min().item(), column.max().item(), bool(column.min() > 0)
    if pd.api.types.is_integer_dtype(column):
        return optuna.distributions.IntDistribution(low, high, log=log)
    return optuna.distributions.FloatDistribution(low, high, log=log)


def total_lr(configurations: pd.DataFrame) -> pd.Series:
    """Learning rate times number of updates for each training image: how far a training can go."""
    return configurations["lr"] * configurations["max_epochs"] / configurations["batch_size"]


def rank_correlation(a: pd.Series, b: pd.Series) -> float:
    """Spearman's: 1 where the one never falls while the other rises."""
    return float(a.rank().corr(b.rank()))


def batch_and_rate(search: SearchResult) -> dict[str, float]:
    """What a batch eight times as large costs: alone, and with about as much more learning rate.

    Returns:
        ``alone`` and ``together``: mean change of the accuracy from (b, lr) to (8 b, lr) and to
        (8 b, 10 lr), over all pairs of configurations that the grid has of both kinds; ``pairs``.
        Empty where there are none.
    """
    needed = {"batch_size", "lr"}
    if not needed <= set(search.axes):
        return {}
    names = [axis for axis in search.params]
    acc = {
        tuple(configuration[names]): configuration["acc"]
        for _, configuration in search.first_round.iterrows()
    }
    at_batch, at_lr = names.index("batch_size"), names.index("lr")
    alone, together = [], []
    for key, value in acc.items():
        larger = list(key)
        larger[at_batch] *= 8
        faster = list(larger)
        faster[at_lr] = float(f"{10 * key[at_lr]:.6g}")
        if tuple(larger) in acc and tuple(faster) in acc:
            alone.append(acc[tuple(larger)] - value)
            together.append(acc[tuple(faster)] - value)
    if not alone:
        return {}
    return {
        "alone": float(np.mean(alone)),
        "together": float(np.mean(together)),
        "pairs": len(alone),
    }


# How the trainings went


def stopping(curves: Mapping[str, Sequence[float | None]], patience: int = PATIENCE) -> dict:
    """What early stopping would have done to a training that took all its epochs.

    Args:
        curves: of the trial; a loss that was not a number is ``None``.
        patience: epochs without a lower validation loss before it stops.

    Returns:
        ``lowest``: the epoch of the lowest validation loss, of all; ``stop``: the epoch after which
        it would have stopped, the last one if never; ``saved``: epochs that this saves;
        ``kept``: the epoch of the lowest loss until then; ``cost``: validation accuracy after the
        last epoch minus that of the kept one. Negative is a gain. Epochs count from 1.
    """
    losses = [math.inf if loss is None else loss for loss in curves["val_loss"]]
    kept, stop = 0, len(losses)
    for epoch, loss in enumerate(losses):
        if loss < losses[kept]:
            kept = epoch
        elif epoch - kept >= patience:
            stop = epoch + 1
            break
    accuracies: Any = curves["val_acc"]
    return {
        "lowest": 1 + losses.index(min(losses)),
        "stop": stop,
        "saved": len(losses) - stop,
        "kept": kept + 1,
        "cost": accuracies[-1] - accuracies[kept],
    }


def stopped(search: SearchResult) -> pd.DataFrame:
    """``stopping`` for each complete trial, next to its ``id`` and ``epochs``."""
    rows = [stopping(curves) for curves in search.complete["curves"]]
    table = pd.DataFrame(rows, index=search.complete.index)
    return pd.concat([search.complete[["id", "epochs"]], table], axis=1)


def capacity(search: SearchResult) -> pd.Series | None:
    """Number of weights and biases of each configuration, for multilayer perceptrons only."""
    configurations = search.configurations
    widths = [name for name in search.params if name.partition(".")[0] == "hidden_units"]
    if not widths or search.model not in ("ShallowNetwork", "DeepNetwork"):
        return None
    sizes = [
        pd.Series(PIXELS, configurations.index),
        *(configurations[name] for name in sorted(widths)),
    ]
    sizes.append(pd.Series(CLASSES, configurations.index))
    return sum((a + 1) * b for a, b in itertools.pairwise(sizes))  # type: ignore[return-value]


# One search against another, and against the study


def wilson(correct: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % confidence interval of a share, after Wilson 1927: holds near 1 too."""
    p = correct / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return middle - half, middle + half


def tested(search: SearchResult) -> dict[str, Any] | None:
    """The first evaluation on the whole test set; one on a part of it is no test of the winner.

    Returns:
        ``acc``, ``low`` and ``high``, ``images``, and the ``record`` itself.
    """
    record = next(filter(evaluations.is_whole, search.tests), None)
    if record is None:
        return None
    images = record.get("images") or _sizes(search)["test"]
    acc = record["test/acc"]
    low, high = wilson(round(acc * images), images)
    return {"acc": acc, "low": low, "high": high, "images": images, "record": record}


def _sizes(search: SearchResult) -> dict[str, int]:
    """Images to validate and to test, as the named split has them."""
    data = search.about["data"]
    study = data["split"] == "study"
    if data["source"] == "digits":
        pool, test = 1797, 180 if study else 256
    else:
        pool, test = 70_000, 7_000 if study else 10_000
    return {"val": round((pool - test) * data["val_fraction"]), "test": test}


def spread(search: SearchResult, acc: float) -> float | None:
    """Standard deviation between seeds around an accuracy; none where each setting has one seed.

    Pooled over the configurations whose error rate is within a factor of 1.5: the standard
    deviation of two or three seeds says little, and bad models spread more than good ones.
    """
    configurations = search.configurations
    near = (1 - configurations["acc"]).between((1 - acc) / 1.5, (1 - acc) * 1.5)
    alike = configurations[(configurations["n"] > 1) & near]
    if alike.empty:
        return None
    weights = alike["n"] - 1
    return float(np.sqrt((alike["sd"] ** 2 * weights).sum() / weights.sum()))


def repeats_the_study(search: SearchResult) -> bool:
    """Whether a search covers one of the study's own grids, on its images."""
    values = {name: [value] for name, value in search.about["fixed"].items()}
    values |= {name: axis for name, axis in search.about["space"].items() if isinstance(axis, list)}
    grids = [grid for model, grid in GRIDS if model == search.model]
    return _on_its_images(search) and any(
        all(set(axis) <= set(values.get(name, ())) for name, axis in grid.items())
        and f"hidden_units.{len(grid) + 1}" not in values  # a further layer
        for grid in grids
    )


def _on_its_images(search: SearchResult) -> bool:
    data = search.about["data"]
    return (data["name"], data["source"], data["split"]) == ("MNIST", "mnist", "study")


def comparable(searches: Sequence[SearchResult]) -> list[SearchResult]:
    """Searches to hold against the study: those on its images, where one of them repeats it."""
    if not any(map(repeats_the_study, searches)):
        return []
    return [search for search in searches if _on_its_images(search)]


def against_the_study(searches: Sequence[SearchResult]) -> pd.DataFrame:
    """Each published figure beside ours; of searches of one model, that model's figures.

    ``noise`` is the half width of the 95 % interval of the difference that chance alone makes: the
    seeds (of both; pooled where a setting has only one), and the images, which the study shuffled
    in another way. Of correlations, the seeds and the rounding to two digits.

    Returns:
        Columns ``where``, ``model``, ``metric``, ``setting``, ``published``, ``repeated``, ``sd``,
        ``n``, ``difference``, ``noise``, ``within`` (whether noise explains the difference; none
        where a figure is missing, or ours was measured on another setting), ``search``, ``note``.
    """
    table = pd.DataFrame([_repeat(published, searches) for published in PUBLISHED])
    models = {search.model for search in searches}
    return table[table["model"].isin(models)] if len(models) == 1 else table


def _repeat(published: Published, searches: Sequence[SearchResult]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "where": published.where,
        "model": published.model,
        "metric": published.metric,
        "setting": setting_text(published.params),
        "published": published.value,
        **dict.fromkeys(("repeated", "sd", "n", "difference", "noise", "within", "search")),
        "note": "not measured",
    }
    for search in searches:
        if search.model != published.model or search.complete.empty:
            continue
        if measured := _measured(published, search):
            difference = measured["repeated"] - published.value
            noise, same = measured.pop("noise"), measured.pop("same_setting")
            # of another setting, what chance explains is not the question
            within = bool(abs(difference) <= noise) if same and noise is not None else None
            row |= {**measured, "difference": difference, "noise": noise, "within": within}
            row["search"] = search.name
            break
    return row


def _measured(published: Published, search: SearchResult) -> dict[str, Any] | None:
    """``repeated``, ``sd``, ``n``, ``noise``, ``note`` and whether it is the ``same_setting``."""
    if published.metric == "correlation":
        if search.about["strategy"]["name"] != "grid" or not search.finished:
            return None  # of half a grid it would say something else
        table, axis = correlations(search), published.params["axis"]
        if axis not in table.index:
            return None
        mean, sd = table.loc[axis]
        n = search.complete["seed"].nunique()
        # published with two digits
        noise = None if n == 1 else 0.005 + 1.96 * sd * math.sqrt(1 + 1 / n)
        measured = {"repeated": mean, "sd": sd, "n": n, "noise": noise}
        return {**measured, "same_setting": True, "note": ""}
    configuration = _configuration(published.params, search)
    if configuration is None:
        return None
    sizes, p = _sizes(search), published.value
    seeds = spread(search, configuration["acc"])
    same, note = True, ""
    if published.metric == "test_acc":
        test = tested(search)
        if test is None:
            return None
        n, value, images = 1, test["acc"], test["images"]
        winner = search.configurations.iloc[0]
        same = all(winner.get(name) == configuration[name] for name in search.params)
        if not same:
            note = f"our winner: {setting_text(dict(winner[search.params]))}"
    else:
        n, value, images = int(configuration["n"]), configuration["acc"], sizes["val"]
    if published.model == "ResNet18":  # the study's was larger, and trained otherwise
        same = False
        note = f"ours: {search.about['data']['image_size']} pixels, " + setting_text(
            {k: v for k, v in configuration[search.params].items() if k != "regime"}
        )
    variance = 2 * p * (1 - p) / images + (seeds or 0.0) ** 2 * (1 + 1 / n)
    sd = configuration["sd"] if published.metric == "val_acc" and n > 1 else None
    return {
        "repeated": value,
        "sd": sd,
        "n": n,
        "noise": 1.96 * math.sqrt(variance),
        "same_setting": same,
        "note": note if seeds is not None else f"{note}; n=1".lstrip("; "),
    }


def _configuration(params: Mapping[str, Any], search: SearchResult) -> pd.Series | None:
    """The configuration with these parameters; one that the search leaves unsaid does not count."""
    widths = [name for name in search.params if name.startswith("hidden_units.")]
    if any(name not in search.params for name in params) or len(widths) != len(
        [name for name in params if name.startswith("hidden_units.")]
    ):
        return None
    configurations = search.configurations
    rows = (configurations[list(params)] == pd.Series(params)).all(axis=1)
    return configurations[rows].iloc[0] if rows.any() else None


def by_rank(search: SearchResult, count: int = 5) -> tuple[float, float]:
    """Mean accuracy of the best and of the worst few trials of each seed, mean over the seeds.

    What was picked for being the worst of hundreds tends to do better when it is trained again.
    Ranks can be compared all the same.
    """
    ordered = [
        trials.sort_values() for _, trials in search.complete.groupby("seed")[search.objective]
    ]
    best = float(np.mean([trials.tail(count).mean() for trials in ordered]))
    return best, float(np.mean([trials.head(count).mean() for trials in ordered]))


def setting_text(params: Mapping[str, Any]) -> str:
    """Parameters in a few words: widths as 1024-10-1024."""
    widths = [value for name, value in params.items() if name.startswith("hidden_units.")]
    words = {name: value for name, value in params.items() if "hidden_units." not in name}
    if widths:
        words["hidden_units"] = "-".join(str(int(width)) for width in widths)
    return ", ".join(f"{name} {value_text(value)}" for name, value in words.items())


def best_found(searches: Sequence[SearchResult]) -> pd.DataFrame:
    """For each model the study's best, and the best configuration of all our searches of it.

    Returns:
        Columns ``model``, ``published`` and ``published_test`` accuracy, ``acc``, ``sd``, ``n``,
        ``test``, ``low``, ``high`` (none unless that search's winner was tested), ``search``,
        ``setting``.
    """
    rows = []
    for model in dict.fromkeys(p.model for p in PUBLISHED):
        known = [p for p in PUBLISHED if p.model == model]
        candidates = [
            search for search in searches if search.model == model and len(search.configurations)
        ]
        if not candidates:
            continue
        search = max(candidates, key=lambda f: f.configurations["acc"].iloc[0])
        configuration, test = search.configurations.iloc[0], tested(search) or {}
        rows.append(
            {
                "model": model,
                "published": max(p.value for p in known if p.metric == "val_acc"),
                "published_test": max(p.value for p in known if p.metric == "test_acc"),
                **{
                    "acc": configuration["acc"],
                    "sd": configuration["sd"],
                    "n": int(configuration["n"]),
                },
                "test": test.get("acc"),
                "low": test.get("low"),
                "high": test.get("high"),
                "search": search.name,
                "setting": setting_text(dict(configuration[search.params])),
            }
        )
    return pd.DataFrame(rows)


def efficiency(searches: Sequence[SearchResult]) -> pd.DataFrame:
    """Searches of the same model, as many layers, side by side: what each found, at what cost.

    Costs are for one seed.

    Returns:
        Columns ``model``, ``search``, ``trials``, ``networks``, ``epochs`` (of all networks),
        ``seconds`` (of one core), ``best`` (mean over seeds of the best trial's accuracy), and
        ``share_of_cost``, ``short_of_best`` against the costliest one of the model.
    """
    rows = []
    for search in searches:
        if search.complete.empty:
            continue
        trials, networks = search.complete, search.networks
        seeds = trials["seed"].nunique()
        layers = sum(name.startswith("hidden_units.") for name in search.params)
        rows.append(
            {
                "model": f"{search.model}, {layers} layers" if layers else search.model,
                "search": search.name,
                "trials": len(trials) / seeds,
                "networks": len(networks) / seeds,
                "epochs": networks["epochs"].sum() / seeds,
                "seconds": networks["seconds"].sum() / seeds,
                "best": trials.groupby("seed")[search.objective].max().mean(),
            }
        )
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    costliest = table.loc[table.groupby("model")["epochs"].transform("idxmax")]
    table["share_of_cost"] = table["epochs"] / costliest["epochs"].to_numpy()
    table["short_of_best"] = costliest["best"].to_numpy() - table["best"]
    return table
