"""What searches search, in plain words and in one short table: written from the numbers alone."""

import math
from collections.abc import Sequence
from typing import Any

from mnist_lightning.report import analysis
from mnist_lightning.report.analysis import SearchResult
from mnist_lightning.report.published import PUBLISHED

MEANINGFUL_DIFFERENCE = (
    0.002  # a difference in accuracy below is within two standard deviations over seeds
)


def in_words(searches: Sequence[SearchResult]) -> list[str]:
    """What the numbers say, in plain words.

    Of searches that repeat the study, where it holds and where it does not; of others, first of all
    what they search.
    """
    compared_with_it = analysis.comparable(searches)
    others = [search for search in searches if all(search is not one for one in compared_with_it)]
    said = [text for search in others for text in _own(search)]
    held = analysis.against_the_study(compared_with_it)
    known = held[held["repeated"].notna()]
    best = {row.model: row for row in analysis.best_found(compared_with_it).itertuples()}
    if len(known):
        judged = known[known["within"].notna()]
        agree = int((judged["within"] == True).sum())  # noqa: E712
        text = (
            f"**{agree} of {len(judged)} figures agree within noise.** {len(held)} are published;"
            f" {len(known)} were measured again; {len(judged)} of these can be judged: the study's"
            " own setting, and known noise."
        )
        good = judged[(judged["metric"] == "val_acc") & (judged["published"] > 0.9)]
        for rows, what in (
            (good, "validation accuracies above 0.9"),
            (known[known["metric"] == "correlation"], "correlations"),
        ):
            if len(rows):
                text += f" The {what} differ by {rows['difference'].abs().max():.3f} at the most"
                worst = rows.loc[rows["difference"].abs().idxmax()]
                text += f" ({worst['setting']})."
        said.append(text)
    for search in searches:
        said += _lessons(search)
    said += _depth(searches)
    compared = analysis.efficiency(searches)
    grids = {search.name for search in searches if search.about["strategy"]["name"] == "grid"}
    for row in compared.itertuples() if len(compared) else ():
        if row.share_of_cost < 1 and row.search not in grids:
            gain = "more" if row.short_of_best < 0 else "less"
            said.append(
                f"**{row.search}** reaches {row.best:.4f} on validation with"
                f" {100 * row.share_of_cost:.0f} % of the epochs of the costliest search of"
                f" {row.model}: {abs(row.short_of_best):.4f} {gain} than that."
            )
    for model, row in best.items():
        # two validation sets of this size differ by so much for the same model
        noise = 1.96 * math.sqrt(2 * row.published * (1 - row.published) / 12_600)
        verdict = "beaten" if row.acc > row.published + noise else "matched"
        verdict = verdict if row.acc > row.published - noise else "not reached"
        text = (
            f"**{model}: {verdict}.** Ours at best {row.acc:.4f} on validation (n={row.n};"
            f" {row.setting}), the study's {row.published:.4f}"
        )
        theirs = held[(held["model"] == model) & (held["metric"] == "val_acc")]
        theirs = theirs.loc[theirs["published"].idxmax()]
        if theirs["within"] in (True, False) and theirs["repeated"] < row.acc:
            text += f" ({theirs['repeated']:.4f} when its setting is repeated on our images)"
        if row.test is not None and not math.isnan(row.test):
            text += f"; on test {row.test:.4f}, the study's {row.published_test:.4f}"
        said.append(f"{text}.")
    missing = held[held["repeated"].isna()]
    if compared_with_it and len(missing):
        named = "; ".join(f"{m.model}, {m.where} ({m.setting})" for m in missing.itertuples())
        said.append(f"**Not measured:** {named}.")
    return said


def _own(search: SearchResult) -> list[str]:
    """Of a search that is not the study's: its best setting, and which parameter matters most."""
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
    means = analysis.marginals(search).groupby("axis", sort=False)["mean"]
    spans = (means.max() - means.min()).sort_values(ascending=False)
    return [
        f"**What matters most in {search.name}:** {spans.index[0]}: between its best and its worst"
        f" value the mean accuracy differs by {spans.iloc[0]:.4f}."
    ]


def _lessons(search: SearchResult) -> list[str]:
    """Of a grid over learning rates and batch sizes: why small batches seem to win."""
    said: list[str] = []
    configurations = search.first_round
    five = {
        end: [p.value for p in PUBLISHED if p.where == f"table 2.1, {end} five"]
        for end in ("best", "worst")
    }
    whole = search.model == "ShallowNetwork" and len(configurations) == 384
    if whole and search.finished and analysis.repeats_the_study(search):
        best, worst = analysis.by_rank(search)
        held = analysis.against_the_study([search])
        again = held[held["where"] == "table 2.1, worst five"]
        said.append(
            "**The best and the worst, by rank and by setting.** The five best of a seed have"
            f" {best:.4f} in the mean (the study {_mean(five['best']):.4f}), the five worst"
            f" {worst:.4f} (the study {_mean(five['worst']):.4f}). The very settings that the study"
            f" found worst have {again['repeated'].mean():.4f} here,"
            f" {int((again['difference'] > 0).sum())} of {len(again)} of them more than there: who"
            " is picked for being the worst of 384 owes some of it to luck."
        )
    pairs = analysis.batch_and_rate(search)
    if pairs and "max_epochs" in search.axes:
        alone = analysis.rank_correlation(configurations["lr"], configurations["acc"])
        batch = analysis.rank_correlation(configurations["batch_size"], configurations["acc"])
        far = analysis.rank_correlation(analysis.total_lr(configurations), configurations["acc"])
        because = pairs["alone"] < 0 and abs(pairs["together"]) < abs(pairs["alone"]) / 2
        headline = (
            "Small mini-batches win mostly because the learning rate stays the same"
            if because
            else "Mini-batch and learning rate"
        )
        said.append(
            f"**{headline}.** In {search.name}, eight times the mini-batch changes the accuracy by"
            f" {pairs['alone']:+.4f} in the mean of {pairs['pairs']} pairs; with ten times the"
            f" learning rate beside it, by {pairs['together']:+.4f}. The rank correlation of the"
            f" accuracy is {alone:.2f} with the learning rate, {batch:.2f} with the mini-batch, and"
            f" {far:.2f} with learning rate times epochs over mini-batch, how far a training goes."
        )
        marginals = analysis.marginals(search)
        rows = marginals[marginals["axis"] == "batch_size"]
        if len(rows) > 1:
            mean, best = (rows[name].iloc[0] - rows[name].iloc[-1] for name in ("mean", "best"))
            said.append(
                f"**Best and mean accuracy per value.** From mini-batches of"
                f" {rows['value'].iloc[0]} to {rows['value'].iloc[-1]} the mean accuracy changes by"
                f" {-mean:+.4f}, the best one by {-best:+.4f}."
            )
    grid = search.about["strategy"]["name"] == "grid"
    if grid and search.finished and (edges := _edges(search)):
        said.append(
            f"**The best is at the edge ({search.name}).** {', '.join(edges)}. What lies beyond,"
            " this search cannot say."
        )
    if grid and len(search.complete) > 20:
        stopped = analysis.stopped(search)
        past = (stopped["lowest"] < stopped["epochs"]).mean()
        share = stopped["saved"].sum() / stopped["epochs"].sum()
        cost = stopped["cost"].mean()
        said.append(
            f"**Overfitting and early stopping ({search.name}).** In {100 * past:.0f} % of the"
            " trials the validation loss was lowest before the last epoch. Stopping"
            f" {analysis.PATIENCE} epochs after it would have saved {100 * share:.0f} % of all"
            f" epochs; the weights kept are {abs(cost):.4f}"
            f" {'less' if cost >= 0 else 'more'} accurate in the mean than those of the last epoch."
        )
    return said


def _edges(search: SearchResult) -> list[str]:
    """Axes whose outermost of three values or more is the best, by a difference that counts."""
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


def _depth(searches: Sequence[SearchResult]) -> list[str]:
    """Whether further layers helped."""
    by_layers: dict[int, Any] = {}
    for search in searches:
        if search.model not in ("ShallowNetwork", "DeepNetwork") or search.complete.empty:
            continue
        layers = max(1, sum(name.startswith("hidden_units.") for name in search.params))
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
        f"**{headline}.** The best on validation: {words}. They differ in learning rate, mini-batch"
        " and epochs too, as the study's do."
    ]


def results_table(searches: Sequence[SearchResult]) -> str:
    """The table of the project's README: of each published table its first row, and the rest."""
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
    return "\n".join(lines) + "\n"
