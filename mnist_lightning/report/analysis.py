"""The numbers of a report: pandas in, pandas out. Nothing here draws, and nothing needs PyTorch.

A *trial* is one training. A *configuration* is one setting of the parameters; its numbers are the
means of its trials over the seeds. Accuracies are validation accuracies, by the search's objective,
unless they are called test.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import optuna
import pandas as pd

from mnist_lightning.files import read_json
from mnist_lightning.report.published import GRIDS, PUBLISHED, Published
from mnist_lightning.runs import evaluations
from mnist_lightning.search import space
from mnist_lightning.search.results import load_results, search_folders
from mnist_lightning.spec import DIGITS

PATIENCE = 10  # epochs: EarlyStopping's default
MULTILAYER = ("ShallowNetwork", "DeepNetwork")
MANY = 8  # an axis with more values than this is shown in four groups of equal size


@dataclass(frozen=True)
class SearchResult:
    """What a search's folder holds, finished or not.

    Args:
        path: the folder.
        about: the content of ``search.json``: space, data, provenance.
        trials: a row for each, see ``results.load_results``.
        tests: the test evaluations of the winner, see ``evaluations.read``.
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
        """Number of trials of the search, as far as the finished ones determine it."""
        if self.about["strategy"]["name"] == "optuna":
            return int(self.about["strategy"]["n"])
        scores = dict.fromkeys(self.trials.get("id", ()))
        for row in self.complete.itertuples():
            scores[row.id] = space.Score(getattr(row, self.objective), row.val_loss)
        rounds = space.rounds(
            **{name: self.about[name] for name in space.GROWABLE},
            scores=scores,
            grown_from=self.about.get("grown_from", ()),
        )
        ids = {trial.id for trials in rounds for trial in trials}
        # a search that has grown also keeps the later rounds of its earlier definitions
        return len(ids | set(self.trials["id"])) if "grown_from" in self.about else len(ids)

    @property
    def finished(self) -> bool:
        return len(self.trials) >= self.planned

    def counts(self) -> dict[str, int]:
        """Number of trials by state."""
        states = self.trials["state"].value_counts() if len(self.trials) else {}
        names = {"finished": "COMPLETE", "failed": "FAIL", "pruned": "PRUNED"}
        counted = {name: int(states.get(state, 0)) for name, state in names.items()}
        return {**counted, "to go": max(0, self.planned - len(self.trials))}

    @cached_property
    def configurations(self) -> pd.DataFrame:
        """A row for each setting of the parameters, the best first.

        Columns: ``round``, the parameters, ``n`` (seeds), ``acc`` and its standard deviation ``sd``
        (missing for n=1), ``val_loss``, ``train_loss``, ``gap`` (their difference), ``seconds``.
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
        """``epochs`` and ``seconds`` of each network that was trained.

        Trials that one training passes through (10, 20 and 50 of 100 epochs) are one network.
        """
        names = [name for name in self.params if name != "max_epochs"]
        keys = ["round", *names, "seed"]
        return self.complete.groupby(keys, dropna=False)[["epochs", "seconds"]].max()

    @property
    def first_round(self) -> pd.DataFrame:
        """Configurations of the round that covers the space evenly."""
        table = self.configurations
        return table if table.empty else table[table["round"] == 0]

    def best_trials(self, of: str, count: int = 3) -> pd.DataFrame:
        """The ``best``, ``median`` or ``worst`` trials of the first seed."""
        trials = self.complete[self.complete["seed"] == self.about["seeds"][0]]
        order = [self.objective, "val_loss", "number"]
        trials = trials.sort_values(order, ascending=[False, True, True])
        start = {"best": 0, "median": (len(trials) - count) // 2, "worst": len(trials) - count}[of]
        return trials.iloc[max(0, start) : max(0, start) + count]


Found = SearchResult  # its former name


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


def layer_axes(names: Iterable[str]) -> list[str]:
    """Those of the names that are widths of layers: ``hidden_units.1``, ``hidden_units.2`` ..."""
    layers = [name for name in names if name.startswith("hidden_units.")]
    return sorted(layers, key=lambda name: int(name.rpartition(".")[2]))


# How the accuracy depends on the parameters


def groups(column: pd.Series) -> pd.Series:
    """A category for each value, in order; for many values, four groups of equal size."""
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
    """How good the first round's configurations with each value of each axis are.

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
    "An efficient approach for assessing hyperparameter importance"). The rest of the variance is
    due to three parameters and more together.

    Returns:
        Index: ``a`` and ``a × b``, the largest share first. Empty if the search is not a full grid
        of two parameters or more.
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
    table, axes = search.first_round, search.axes
    if len(table) < 10 or len(axes) < 2:
        return pd.Series(dtype=float)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {axis: _distribution(table[axis]) for axis in axes}
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            optuna.create_trial(params=params, distributions=distributions, value=acc)
            for params, acc in zip(table[axes].to_dict("records"), table["acc"], strict=True)
        ]
    )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return pd.Series(optuna.importance.get_param_importances(study, evaluator=evaluator))


def spans(search: SearchResult) -> pd.Series:
    """How far the mean accuracies of each axis's values are apart, the widest first."""
    means = marginals(search).groupby("axis", sort=False)["mean"]
    return (means.max() - means.min()).sort_values(ascending=False)


def by_importance(search: SearchResult) -> list[str]:
    """The axes, the most important first, by the best measure that the search allows."""
    shares = variance_shares(search)
    shares = importance(search) if shares.empty else shares
    if shares.empty or shares.isna().any():
        shares = spans(search)
    return [name for name in shares.index if name in search.axes]  # no pairs of them


def _distribution(column: pd.Series) -> Any:
    """The values of a parameter as Optuna has them: categories, or a range where they are many."""
    if column.nunique() <= MANY:
        return space.distribution(sorted(column.unique().tolist()))
    low, high = column.min().item(), column.max().item()
    return space.distribution({"low": low, "high": high, "log": low > 0})


def total_lr(configurations: pd.DataFrame) -> pd.Series:
    """Learning rate times number of updates, for each training image."""
    return configurations["lr"] * configurations["max_epochs"] / configurations["batch_size"]


def rank_correlation(a: pd.Series, b: pd.Series) -> float:
    """Spearman's correlation: Pearson's, of the ranks."""
    return float(a.rank().corr(b.rank()))


def batch_and_rate(search: SearchResult) -> dict[str, float]:
    """What a batch eight times as large costs, alone and with ten times the learning rate.

    Returns:
        ``alone`` and ``together``: mean change of the accuracy from (b, lr) to (8 b, lr) and to
        (8 b, 10 lr), over all configurations for which the grid has both; ``pairs``: how many they
        are. Empty if there are none.
    """
    needed = {"batch_size", "lr"}
    if not needed <= set(search.axes):
        return {}
    names = search.params
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
        ``lowest``: the epoch of the lowest validation loss; ``stop``: the epoch after which it
        would have stopped, or the last one; ``saved``: number of epochs that this saves; ``kept``:
        the epoch of the lowest loss until ``stop``; ``cost``: validation accuracy after the last
        epoch minus that after ``kept`` (negative is a gain). Epochs count from 1.
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
    """``stopping`` for each complete trial, with its ``id`` and ``epochs``."""
    rows = [stopping(curves) for curves in search.complete["curves"]]
    table = pd.DataFrame(rows, index=search.complete.index)
    return pd.concat([search.complete[["id", "epochs"]], table], axis=1)


def capacity(search: SearchResult) -> pd.Series | None:
    """Number of weights and biases of each configuration, for multilayer perceptrons only."""
    widths = layer_axes(search.params) or [n for n in search.params if n == "hidden_units"]
    if not widths or search.model not in MULTILAYER:
        return None
    table = search.configurations
    data = search.about["data"]  # only of a folder it has channels and classes
    pixels = data.get("channels", 1) * data["image_size"] ** 2
    sizes = [
        pd.Series(pixels, table.index),
        *(table[name] for name in widths),
        pd.Series(len(data.get("classes", DIGITS)), table.index),
    ]
    return sum((a + 1) * b for a, b in itertools.pairwise(sizes))  # type: ignore[return-value]


# One search against another, and against the study


def wilson(correct: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % confidence interval of a share, by Wilson (1927): valid near 0 and 1 too."""
    p = correct / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return middle - half, middle + half


def tested(search: SearchResult) -> dict[str, Any] | None:
    """The first evaluation on the whole test set; ``None`` if there is none.

    Returns:
        ``acc``, its interval ``low`` to ``high``, ``images``, and the ``record`` itself.
    """
    record = next(filter(evaluations.is_whole, search.tests), None)
    if record is None:
        return None
    images = record.get("images") or image_counts(search)["test"]
    acc = record["test/acc"]
    low, high = wilson(round(acc * images), images)
    return {"acc": acc, "low": low, "high": high, "images": images, "record": record}


def image_counts(search: SearchResult) -> dict[str, int]:
    """Number of images in the validation set (``val``) and in the test set (``test``).

    A search records its split but not the numbers that follow from it, so they are worked out here.
    A test compares them with the data module.
    """
    data = search.about["data"]
    study = data["split"] == "study"
    if data["source"] == "digits":
        pool, test = 1797, 180 if study else 256
    else:
        pool, test = 70_000, 7_000 if study else 10_000
    return {"val": round((pool - test) * data["val_fraction"]), "test": test}


def noise(accuracy: float, images: int, sd: float = 0.0, n: int = 1) -> float:
    """Half the width of the 95 % interval of a difference by chance.

    The difference is between the study's accuracy and ours, of the same setting.

    Args:
        accuracy: of both.
        images: on which each was measured. They are not the same images.
        sd: standard deviation over seeds. The study has one seed.
        n: number of our seeds.
    """
    return 1.96 * math.sqrt(2 * accuracy * (1 - accuracy) / images + sd**2 * (1 + 1 / n))


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
    """Whether a search is one of the study's own grids, on its images; it may have grown."""
    if search.about["strategy"]["name"] != "grid" or not _on_its_images(search):
        return False
    fixed = {name: [value] for name, value in search.about["fixed"].items()}
    values = {**fixed, **search.about["space"]}
    return any(
        model == search.model
        and all(set(axis) <= set(values.get(name, ())) for name, axis in grid.items())
        # nothing else, like a layer or an optimizer; of a ResNet, the report notes the setting
        and set(fixed if model == "ResNet18" else ()) >= values.keys() - grid.keys()
        for model, grid in GRIDS
    )


def _on_its_images(search: SearchResult) -> bool:
    data = search.about["data"]
    return (data["name"], data["source"], data["split"]) == ("MNIST", "mnist", "study")


def comparable(searches: Sequence[SearchResult]) -> list[SearchResult]:
    """Searches to compare with the study: those on its images, if one of them repeats it."""
    if not any(map(repeats_the_study, searches)):
        return []
    return [search for search in searches if _on_its_images(search)]


def against_the_study(searches: Sequence[SearchResult]) -> pd.DataFrame:
    """Each published figure beside ours; for searches of one model, the figures of that model.

    ``noise`` is half the width of the 95 % interval of a difference by chance: from the seeds (of
    both; pooled where a setting has only one) and from the images, which the study shuffled in
    another way. For correlations it is from the seeds and from the rounding to two digits.

    Returns:
        Columns ``where``, ``model``, ``metric``, ``setting``, ``published``, ``repeated``, ``sd``,
        ``n``, ``difference``, ``noise``, ``within`` (whether noise explains the difference; none
        if a figure is missing, or ours is of another setting), ``search``, ``note``.
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
        measure = _repeat_correlation if published.metric == "correlation" else _repeat_accuracy
        if measured := measure(published, search):
            return {**row, **measured, "search": search.name}
    return row


def _repeat_correlation(published: Published, search: SearchResult) -> dict[str, Any] | None:
    if search.about["strategy"]["name"] != "grid" or not search.finished:
        return None  # half a grid has other correlations
    table, axis = correlations(search), published.params["axis"]
    if axis not in table.index:
        return None
    mean, sd = table.loc[axis]
    n = search.complete["seed"].nunique()
    # published with two digits
    chance = None if n == 1 else 0.005 + 1.96 * sd * math.sqrt(1 + 1 / n)
    return {**_judged(mean, published, chance), "sd": sd, "n": n, "note": ""}


def _repeat_accuracy(published: Published, search: SearchResult) -> dict[str, Any] | None:
    ours = _configuration(published.params, search)
    if ours is None:
        return None
    seeds = spread(search, ours["acc"])
    if published.metric == "test_acc":
        test = tested(search)
        if test is None:
            return None
        n, sd, value, images = 1, None, test["acc"], test["images"]
    else:
        n, value, images = int(ours["n"]), ours["acc"], image_counts(search)["val"]
        sd = ours["sd"] if n > 1 else None
    other = _other_setting(published, search, ours)
    chance = noise(published.value, images, seeds or 0.0, n)
    return {
        **_judged(value, published, chance, same_setting=not other),
        "sd": sd,
        "n": n,
        "note": other if seeds is not None else f"{other}; n=1".lstrip("; "),
    }


def _judged(
    value: float, published: Published, chance: float | None, same_setting: bool = True
) -> dict[str, Any]:
    """Our figure against the published one; only figures of the same setting are judged."""
    difference = value - published.value
    within = bool(abs(difference) <= chance) if same_setting and chance is not None else None
    return {"repeated": value, "difference": difference, "noise": chance, "within": within}


def _other_setting(published: Published, search: SearchResult, ours: pd.Series) -> str:
    """What differs from the study's setting; empty if nothing does.

    Args:
        published: the figure.
        search: that repeats it.
        ours: its configuration with the published parameters.
    """
    if published.model == "ResNet18":  # the study's mini-batches are not known
        return f"ours: {_resnet_setting(ours, search, published.params)}"
    winner = search.configurations.iloc[0]
    tested_another = any(winner.get(name) != ours[name] for name in search.params)
    if published.metric == "test_acc" and tested_another:
        return f"our winner: {setting_text(dict(winner[search.params]))}"
    return ""


def _resnet_setting(
    ours: pd.Series, search: SearchResult, known: Mapping[str, Any] = MappingProxyType({})
) -> str:
    """A configuration of ResNet-18 in words, without the parameters that are known."""
    without_effect = {
        "scratch": {"weights", "stem", "freezing.batch_norm"},
        "finetune": {"freezing.batch_norm"},
    }
    hidden = {"regime", *known, *without_effect.get(ours["regime"], ())}
    setting = {k: v for k, v in ours[search.params].items() if k not in hidden}
    return f"{search.about['data']['image_size']} pixels, {setting_text(setting)}"


def best_of_regime(published: Published, searches: Sequence[SearchResult]) -> dict[str, Any] | None:
    """Our best configuration of a published regime of ResNet-18, in any setting, on all images.

    Returns:
        ``acc``, ``sd``, ``n``, ``setting`` in words; None if there is none of this regime.
    """
    found = []
    for search in searches:
        if search.model != published.model or "regime" not in search.params:
            continue
        table = search.configurations
        if table.empty or search.about["data"].get("train_fraction", 1) < 1:
            continue
        rows = table[table["regime"] == published.params["regime"]]
        if "data.train_fraction" in rows:
            rows = rows[rows["data.train_fraction"] == 1]
        if len(rows):
            found.append((rows.iloc[0], search))
    if not found:
        return None
    ours, search = max(found, key=lambda one: one[0]["acc"])
    setting = _resnet_setting(ours, search, {"data.train_fraction": 1})
    n = int(ours["n"])
    sd = ours["sd"] if n > 1 else None
    return {"acc": ours["acc"], "sd": sd, "n": n, "setting": setting}


def by_share(searches: Sequence[SearchResult]) -> pd.DataFrame:
    """ResNet-18's configurations in searches that vary the share of the training images.

    Returns:
        Columns ``share`` (of the training images), ``regime``, ``stem``, ``batch_norm``, ``acc``,
        ``n``, the smallest share first; empty if there are none.
    """
    names = {
        "data.train_fraction": "share",
        "regime": "regime",
        "stem": "stem",
        "freezing.batch_norm": "batch_norm",
    }
    tables = []
    for search in searches:
        complete = search.model == "ResNet18" and names.keys() <= set(search.params)
        if complete and _on_its_images(search):
            table = search.configurations.rename(columns=names)
            tables.append(table[[*names.values(), "acc", "n"]])
    return pd.concat(tables).sort_values("share", ignore_index=True) if tables else pd.DataFrame()


def _configuration(params: Mapping[str, Any], search: SearchResult) -> pd.Series | None:
    """The configuration with these parameters; ``None`` if the search does not name all of them."""
    named = set(params) <= set(search.params)
    if not named or layer_axes(params) != layer_axes(search.params):
        return None
    table = search.configurations
    rows = (table[list(params)] == pd.Series(params)).all(axis=1)
    return table[rows].iloc[0] if rows.any() else None


def by_rank(search: SearchResult, count: int = 5) -> tuple[float, float]:
    """Mean accuracy of the best and of the worst few trials of each seed, mean over the seeds.

    The worst of hundreds of trials tends to do better when it is trained again. Ranks can still be
    compared.
    """
    ordered = [
        trials.sort_values() for _, trials in search.complete.groupby("seed")[search.objective]
    ]
    best = float(np.mean([trials.tail(count).mean() for trials in ordered]))
    return best, float(np.mean([trials.head(count).mean() for trials in ordered]))


def setting_text(params: Mapping[str, Any]) -> str:
    """Parameters in a few words: widths as 1024-10-1024."""
    layers = layer_axes(params)
    shown = {name: value for name, value in params.items() if name not in layers}
    if layers:
        shown["hidden_units"] = "-".join(str(int(params[name])) for name in layers)
    return ", ".join(f"{name} {value_text(value)}" for name, value in shown.items())


def best_found(searches: Sequence[SearchResult]) -> pd.DataFrame:
    """For each model the study's best, and the best configuration of all our searches of it.

    Returns:
        Columns ``model``, ``published`` and ``published_test`` accuracy, ``acc``, ``sd``, ``n``,
        ``test``, ``low``, ``high`` (missing unless that search's winner was tested), ``search``,
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
        search = max(candidates, key=lambda one: one.configurations["acc"].iloc[0])
        winner, test = search.configurations.iloc[0], tested(search) or {}
        rows.append(
            {
                "model": model,
                "published": max(p.value for p in known if p.metric == "val_acc"),
                "published_test": max(p.value for p in known if p.metric == "test_acc"),
                **{"acc": winner["acc"], "sd": winner["sd"], "n": int(winner["n"])},
                "test": test.get("acc"),
                "low": test.get("low"),
                "high": test.get("high"),
                "search": search.name,
                "setting": setting_text(dict(winner[search.params])),
            }
        )
    return pd.DataFrame(rows)


def efficiency(searches: Sequence[SearchResult]) -> pd.DataFrame:
    """Searches of models with equally many layers, side by side: what each found, at what cost.

    Costs are for one seed.

    Returns:
        Columns ``model``, ``search``, ``trials``, ``networks``, ``epochs`` (of all networks),
        ``seconds`` (of one core), ``best`` (mean over seeds of the best trial's accuracy), and
        ``share_of_cost``, ``short_of_best`` compared with the most expensive one of the model.
    """
    rows = []
    for search in searches:
        if search.complete.empty:
            continue
        trials, networks = search.complete, search.networks
        seeds = trials["seed"].nunique()
        layers = len(layer_axes(search.params))
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
