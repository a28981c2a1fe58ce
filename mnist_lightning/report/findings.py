"""What searches found, in sentences and in one short table: written from the numbers alone."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from mnist_lightning.report import analysis
from mnist_lightning.report.analysis import SearchResult
from mnist_lightning.report.published import PUBLISHED

MEANINGFUL_DIFFERENCE = 0.002  # in accuracy: about two standard deviations over seeds


def in_words(searches: Sequence[SearchResult]) -> list[str]:
    """What the numbers say, in sentences.

    For searches that repeat the study: where its results hold and where they do not. For other
    searches: first what they found.
    """
    compared = analysis.comparable(searches)
    others = [search for search in searches if all(search is not one for one in compared)]
    against = analysis.against_the_study(compared)
    said = [text for search in others for text in _own(search)]
    said += _agreement(against)
    for search in searches:
        said += _lessons(search)
    said += [*_depth(searches, compared), *_transfer(searches), *_stem(searches)]
    said += [*_costs(searches), *_verdicts(compared, against)]
    if compared:
        said += _not_measured(against)
    return said


def in_short(searches: Sequence[SearchResult]) -> list[str]:
    """The three sentences at the top of the page; none where no trial has finished.

    Where one of the study's own grids was run: how many of its figures agree, the best of each
    model, and what matters most. For other searches: the best, what matters most, and the test.
    """
    finished = [search for search in searches if not search.complete.empty]
    if not finished:
        return []
    compared = analysis.comparable(finished)
    largest = max(compared or finished, key=lambda search: len(search.configurations))
    matters = _what_matters(largest) or [
        f"**What matters most** cannot be said: {largest.name} varies nothing."
    ]
    if compared:
        return [_agree(analysis.against_the_study(compared)), _best_of_each(finished), *matters]
    best = _best_of_each(finished, True) if len(finished) > 1 else _best(finished[0])
    return [best, *matters, _tested(max(finished, key=_accuracy))]


def _accuracy(search: SearchResult) -> float:
    """Of its best configuration."""
    return float(search.configurations["acc"].iloc[0])


def _agree(against: pd.DataFrame) -> str:
    judged = against[against["within"].notna()]
    if judged.empty:
        return (
            f"**{against['repeated'].notna().sum()} of {len(against)} published figures** were"
            " measured again; the noise of none is known yet."
        )
    disagree = judged[judged["within"] == False]  # noqa: E712
    seeds = sorted({int(n) for n in judged["n"]})
    where = " and ".join(
        f"{len(rows)} in {where}" for where, rows in disagree.groupby("where", sort=False)
    )
    return (
        f"**{len(judged) - len(disagree)} of {len(judged)} published figures are reproduced within"
        f" noise** (n={' to '.join(map(str, sorted({seeds[0], seeds[-1]})))})"
        + (f"; those that are not: {where}." if where else ".")
    )


def _best_of_each(searches: Sequence[SearchResult], named: bool = False) -> str:
    """The best of each model on each data set, with the name of its search or without."""
    best: dict[tuple[str, str], SearchResult] = {}
    for search in searches:
        data = search.about["data"]
        key = search.model, data["name"] if data["source"] == "mnist" else data["source"]
        best[key] = max(best.get(key, search), search, key=_accuracy)
    best = dict(sorted(best.items(), key=lambda item: -_accuracy(item[1])))
    models = [model for model, _ in best]
    texts = [
        f"{model}{f' on {data}' if models.count(model) > 1 else ''}"
        f" {_with_spread(search.configurations.iloc[0])}{f' in {search.name}' if named else ''}"
        for (model, data), search in best.items()
    ]
    return f"**The best on validation:** {', '.join(texts)}."


def _with_spread(configuration: pd.Series) -> str:
    """An accuracy with its standard deviation and its number of seeds."""
    n = int(configuration["n"])
    spread = f" ± {configuration['sd']:.4f}" if n > 1 else ""
    return f"{configuration['acc']:.4f}{spread} (n={n})"


def _best(search: SearchResult) -> str:
    best = search.configurations.iloc[0]
    setting = analysis.setting_text(dict(best[search.axes or search.params]))
    return f"**The best on validation** is {setting}, with {_with_spread(best)}."


def _tested(search: SearchResult) -> str:
    test = analysis.tested(search)
    if test is None:
        return f"**Not tested yet:** the winner of {search.name} has not seen the test images."
    return (
        f"**On the {test['images']:,} test images**, it is right in {test['acc']:.4f} (95 %"
        f" interval {test['low']:.4f} to {test['high']:.4f}, Wilson)."
    )


def _agreement(against: pd.DataFrame) -> list[str]:
    """How many published figures were reproduced, and the largest differences."""
    measured = against[against["repeated"].notna()]
    if measured.empty:
        return []
    judged = measured[measured["within"].notna()]
    agree = int((judged["within"] == True).sum())  # noqa: E712
    text = (
        f"**{agree} of {len(judged)} figures agree within noise.** {len(against)} are published;"
        f" {len(measured)} were measured again; {len(judged)} of these can be judged: they have the"
        " study's own setting and a known noise."
    )
    good = judged[(judged["metric"] == "val_acc") & (judged["published"] > 0.9)]
    for rows, what in (
        (good, "validation accuracies above 0.9"),
        (measured[measured["metric"] == "correlation"], "correlations"),
    ):
        if len(rows):
            worst = rows.loc[rows["difference"].abs().idxmax()]
            text += f" The {what} differ by {abs(worst['difference']):.3f} at most"
            text += f" ({worst['setting']})."
    return [text]


def _costs(searches: Sequence[SearchResult]) -> list[str]:
    """What each search other than a grid reaches, and its share of the highest cost."""
    compared = analysis.efficiency(searches)
    grids = {search.name for search in searches if search.about["strategy"]["name"] == "grid"}
    return [
        f"**{row.search}** reaches {row.best:.4f} on validation with"
        f" {100 * row.share_of_cost:.0f} % of the epochs of the most expensive search of"
        f" {row.model}: {abs(row.short_of_best):.4f}"
        f" {'more' if row.short_of_best < 0 else 'less'} than that one."
        for row in compared.itertuples()
        if row.share_of_cost < 1 and row.search not in grids
    ]


def _verdicts(compared: Sequence[SearchResult], against: pd.DataFrame) -> list[str]:
    """For each model whether our best beats, matches or misses the study's best."""
    by_name = {search.name: search for search in compared}
    said = []
    for row in analysis.best_found(compared).itertuples():
        # two validation sets of this size differ by so much for the same model
        noise = analysis.noise(row.published, analysis.image_counts(by_name[row.search])["val"])
        verdict = "beaten" if row.acc > row.published + noise else "matched"
        verdict = verdict if row.acc > row.published - noise else "not reached"
        text = (
            f"**{row.model}: {verdict}.** Ours at best {row.acc:.4f} on validation (n={row.n};"
            f" {row.setting}), the study's {row.published:.4f}"
        )
        theirs = against[(against["model"] == row.model) & (against["metric"] == "val_acc")]
        theirs = theirs.loc[theirs["published"].idxmax()]
        if theirs["within"] in (True, False) and theirs["repeated"] < row.acc:
            text += f" ({theirs['repeated']:.4f} when its setting is repeated on our images)"
        if row.test is not None and not math.isnan(row.test):
            text += f"; on test {row.test:.4f}, the study's {row.published_test:.4f}"
        said.append(f"{text}.")
    return said


def _not_measured(against: pd.DataFrame) -> list[str]:
    missing = against[against["repeated"].isna()]
    if missing.empty:
        return []
    named = "; ".join(f"{row.model}, {row.where} ({row.setting})" for row in missing.itertuples())
    return [f"**Not measured:** {named}."]


def _own(search: SearchResult) -> list[str]:
    """Of a search that does not repeat the study: its best setting, and what matters most."""
    if search.complete.empty:
        return []
    best, test = search.configurations.iloc[0], analysis.tested(search)
    names = search.axes or search.params
    spread = f" ± {best['sd']:.4f}" if best["n"] > 1 else ""
    text = (
        f"**The best of {search.name}:** {analysis.setting_text(dict(best[names]))}, with"
        f" {best['acc']:.4f}{spread} on validation (n={int(best['n'])})"
    )
    text += f", {test['acc']:.4f} on test." if test else "."
    return [text, *_what_matters(search)]


def _what_matters(search: SearchResult) -> list[str]:
    shares, which = analysis.variance_shares(search), "of the variance of the accuracy on this grid"
    if shares.empty:
        shares, which = analysis.importance(search), "of the variance of the accuracy (fANOVA)"
    if len(shares) and shares.notna().all():
        (name, share), *others = shares.head(3).items()
        rest = ", ".join(f"{other} {100 * part:.0f} %" for other, part in others if part >= 0.005)
        text = f"{name} explains {100 * share:.0f} % {which}" + (f"; then {rest}" if rest else "")
        return [f"**What matters most in {search.name}:** {text}."]
    if not search.axes:
        return []
    spans = analysis.spans(search)
    return [
        f"**What matters most in {search.name}:** {spans.index[0]}: between its best and its worst"
        f" value the mean accuracy differs by {spans.iloc[0]:.4f}."
    ]


def _lessons(search: SearchResult) -> list[str]:
    """What the grids teach: the study's conclusions, and where they hold."""
    return [
        *_best_and_worst(search),
        *_batch_and_rate(search),
        *_edge(search),
        *_early_stopping(search),
    ]


def _best_and_worst(search: SearchResult) -> list[str]:
    """Of the study's whole grid: the best and worst five by rank, and by the study's settings."""
    grid = search.model == "ShallowNetwork" and len(search.first_round) == 384
    if not (grid and search.finished and analysis.repeats_the_study(search)):
        return []
    five = {
        end: [p.value for p in PUBLISHED if p.where == f"table 2.1, {end} five"]
        for end in ("best", "worst")
    }
    best, worst = analysis.by_rank(search)
    against = analysis.against_the_study([search])
    again = against[against["where"] == "table 2.1, worst five"]
    return [
        "**The best and the worst, by rank and by setting.** The five best of a seed have"
        f" {best:.4f} on average (the study {_mean(five['best']):.4f}), the five worst"
        f" {worst:.4f} (the study {_mean(five['worst']):.4f}). The settings that the study found"
        f" worst have {again['repeated'].mean():.4f} here;"
        f" {int((again['difference'] > 0).sum())} of {len(again)} of them reach more than in the"
        " study: the worst of 384 are partly bad luck."
    ]


def _batch_and_rate(search: SearchResult) -> list[str]:
    """Of a grid over learning rates, batch sizes and epochs: why small batches seem to win."""
    pairs = analysis.batch_and_rate(search)
    if not pairs or "max_epochs" not in search.axes:
        return []
    first = search.first_round
    rate, batch, total = (
        analysis.rank_correlation(values, first["acc"])
        for values in (first["lr"], first["batch_size"], analysis.total_lr(first))
    )
    because = pairs["alone"] < 0 and abs(pairs["together"]) < abs(pairs["alone"]) / 2
    headline = (
        "Small mini-batches win mostly because the learning rate stays the same"
        if because
        else "Mini-batch and learning rate"
    )
    said = [
        f"**{headline}.** In {search.name}, a mini-batch eight times as large changes the accuracy"
        f" by {pairs['alone']:+.4f}, the mean of {pairs['pairs']} pairs; with ten times the"
        f" learning rate as well, by {pairs['together']:+.4f}. The rank correlation of the accuracy"
        f" is {rate:.2f} with the learning rate, {batch:.2f} with the mini-batch, and {total:.2f}"
        " with learning rate times epochs over mini-batch, the total learning rate of a training."
    ]
    marginals = analysis.marginals(search)
    rows = marginals[marginals["axis"] == "batch_size"]
    if len(rows) > 1:
        mean, best = (rows[name].iloc[-1] - rows[name].iloc[0] for name in ("mean", "best"))
        said.append(
            f"**Best and mean accuracy per value.** From mini-batches of {rows['value'].iloc[0]} to"
            f" {rows['value'].iloc[-1]} the mean accuracy changes by {mean:+.4f}, the best one by"
            f" {best:+.4f}."
        )
    return said


def _edge(search: SearchResult) -> list[str]:
    """Of a grid whose best configuration has an outermost value."""
    if search.about["strategy"]["name"] != "grid" or not search.finished:
        return []
    edges = _edges(search)
    if not edges:
        return []
    return [
        f"**The best is at the edge ({search.name}).** {', '.join(edges)}. This search cannot say"
        " whether values beyond the edge are better."
    ]


def _early_stopping(search: SearchResult) -> list[str]:
    """Of a grid: what early stopping would have saved, and cost."""
    if search.about["strategy"]["name"] != "grid" or len(search.complete) <= 20:
        return []
    stopped = analysis.stopped(search)
    past = (stopped["lowest"] < stopped["epochs"]).mean()
    share = stopped["saved"].sum() / stopped["epochs"].sum()
    cost = stopped["cost"].mean()
    return [
        f"**Overfitting and early stopping ({search.name}).** In {100 * past:.0f} % of the trials"
        " the validation loss was lowest before the last epoch. Stopping"
        f" {analysis.PATIENCE} epochs after it would have saved {100 * share:.0f} % of all epochs;"
        f" the weights kept are on average {abs(cost):.4f} {'less' if cost >= 0 else 'more'}"
        " accurate than those of the last epoch."
    ]


def _edges(search: SearchResult) -> list[str]:
    """Axes of three values or more where an outermost value is the best by a meaningful amount."""
    said, configurations = [], search.first_round
    for axis in analysis.numeric_axes(search):
        best = configurations.groupby(axis)["acc"].max()  # in the order of the values
        gain = best.max() - best.drop(best.idxmax()).max()
        if (
            len(best) > 2
            and best.idxmax() in (best.index[0], best.index[-1])
            and gain > MEANINGFUL_DIFFERENCE
        ):
            said.append(f"{axis} {best.idxmax():g} is better than any other by {gain:.4f}")
    return said


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _depth(searches: Sequence[SearchResult], compared: Sequence[SearchResult]) -> list[str]:
    """Whether further layers helped."""
    by_layers: dict[int, Any] = {}
    for search in searches:
        if search.model not in analysis.MULTILAYER or search.complete.empty:
            continue
        layers = max(1, len(analysis.layer_axes(search.params)))
        configuration = search.configurations.iloc[0]
        if layers not in by_layers or configuration["acc"] > by_layers[layers][0]["acc"]:
            by_layers[layers] = (configuration, search)
    if len(by_layers) < 2:
        return []
    words = "; ".join(
        f"{layers} hidden layer{'s' * (layers > 1)}: {configuration['acc']:.4f}"
        f" ({analysis.setting_text(dict(configuration[search.params]))})"
        for layers, (configuration, search) in sorted(by_layers.items())
    )
    headline = "Depth"
    if 1 in by_layers:
        deeper = max(
            configuration["acc"] for layers, (configuration, _) in by_layers.items() if layers > 1
        )
        if deeper - by_layers[1][0]["acc"] < MEANINGFUL_DIFFERENCE:
            headline = "Depth brings no improvement here"
    return [
        f"**{headline}.** The best on validation: {words}. They also differ in learning"
        f" rate, mini-batch and epochs{', as in the study' if compared else ''}."
    ]


def _best_of_regime(where: str, searches: Sequence[SearchResult]) -> list[str]:
    """A line of the table for a figure of the study that is a regime's; else none."""
    published = next(one for one in PUBLISHED if one.where == where)
    regime = published.params.get("regime")
    ours = analysis.best_of_regime(published, searches) if regime else None
    if ours is None:
        return []
    spread = "" if ours["sd"] is None else f" ± {ours['sd']:.4f}"
    return [
        f"| {where} | {published.model} (regime {regime}), validation; our best: {ours['setting']}"
        f" | {published.value:.4f} | {ours['acc']:.4f}{spread} | {ours['n']} |"
        f" {ours['acc'] - published.value:+.4f} |"
    ]


def _transfer(searches: Sequence[SearchResult]) -> list[str]:
    """What pretrained weights give ResNet-18, with few images and with many."""
    table = analysis.by_share(searches)
    if table.empty:
        return []
    usual = table[(table["stem"] == "sum") & (table["batch_norm"] == "frozen")]
    accuracies = usual.pivot_table("acc", "share", "regime", aggfunc="max")
    if not {"scratch", "finetune", "freeze"} <= set(accuracies):
        return []
    accuracies = accuracies.dropna()
    if len(accuracies) < 2:
        return []
    gain = accuracies[["finetune", "freeze"]].max(axis=1) - accuracies["scratch"]
    if gain.iloc[-1] < gain.iloc[0] / 2:
        headline = "ImageNet's weights help on digits where images are few"
    else:
        headline = "What ImageNet's weights give on digits"
    words = "; ".join(
        f"with {100 * share:g} % of the images {row['scratch']:.4f}, {row['finetune']:.4f} and"
        f" {row['freeze']:.4f}"
        for share, row in accuracies.iterrows()
    )
    return [
        f"**{headline}.** ResNet-18 from scratch, fine-tuned and partly frozen, on validation:"
        f" {words}. The better of the two pretrained ones gains {gain.iloc[0]:+.4f} with the fewest"
        f" images and {gain.iloc[-1]:+.4f} with the most (n={_span(usual['n'])})."
    ]


def _stem(searches: Sequence[SearchResult]) -> list[str]:
    """What it costs to draw the first convolution anew, and to freeze it at random."""
    # only those that vary it: others have other numbers of seeds
    table = analysis.by_share([search for search in searches if "stem" in search.axes])
    if table.empty:
        return []
    frozen = table[table["regime"] == "freeze"]
    accuracies = frozen.pivot_table("acc", "share", ["batch_norm", "stem"], aggfunc="max")
    ways = [(norm, stem) for norm in ("frozen", "adapt") for stem in ("sum", "reset")]
    if not set(ways) <= set(accuracies) or (accuracies := accuracies[ways].dropna()).empty:
        return []
    words = "; ".join(
        f"with {100 * share:g} % of the images {row['frozen', 'sum']:.4f} and"
        f" {row['frozen', 'reset']:.4f} if BatchNorm is frozen, {row['adapt', 'sum']:.4f} and"
        f" {row['adapt', 'reset']:.4f} if it adapts"
        for share, row in accuracies.iterrows()
    )
    return [
        "**What a random frozen stem costs.** ResNet-18 partly frozen, with the pretrained first"
        " convolution and with one drawn anew and frozen like that, on validation:"
        f" {words} (n={_span(frozen['n'])})."
    ]


def _span(counts: pd.Series) -> str:
    """``3``, or ``1 to 3``."""
    return " to ".join(map(str, sorted({int(counts.min()), int(counts.max())})))


def results_table(searches: Sequence[SearchResult]) -> str:
    """The table of the project's README: of each published table its first row, and the rest.

    Below a regime of ResNet-18 stands our best of this regime, in whatever setting.
    """
    held = analysis.against_the_study(searches)
    first = held[(held["metric"] != "val_acc") | ~held.duplicated(["where", "metric"])]
    lines = [
        "| the study | what | published | ours | n | difference |",
        "|---|---|---|---|---|---|",
    ]
    kinds = {"val_acc": "validation", "test_acc": "test", "correlation": "correlation with"}
    for row in first.itertuples():
        setting = row.setting.removeprefix("axis ")
        ours, n, difference = "not measured", "", ""
        digits = 2 if row.metric == "correlation" else 4
        if row.repeated is not None and not math.isnan(row.repeated):
            spread = row.sd is not None and not math.isnan(row.sd)
            ours = f"{row.repeated:.{digits}f}" + (f" ± {row.sd:.{digits}f}" if spread else "")
            n, difference = f"{row.n:.0f}", f"{row.difference:+.{digits}f}"
        what = f"{kinds[row.metric]} {setting}"
        if row.metric != "correlation":
            what = f"{row.model} ({setting}), {kinds[row.metric]}"
        if row.note.startswith(("ours: ", "our winner: ")):
            what += f"; {row.note.partition(';')[0]}"  # measured on another setting
        lines.append(
            f"| {row.where} | {what} | {row.published:.{digits}f} | {ours} | {n} | {difference} |"
        )
        lines += _best_of_regime(row.where, searches) if row.metric == "val_acc" else []
    return "\n".join(lines) + "\n"
