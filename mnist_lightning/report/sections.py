"""The sections of a report: what it says of each search, and of all searches together.

A section is a list of blocks: text, tables and figures under one heading.
"""

import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from mnist_lightning.report import analysis, figures
from mnist_lightning.report.analysis import SearchResult, setting_text, value_text
from mnist_lightning.report.published import PUBLISHED
from mnist_lightning.runs import evaluations

# Digits after the point, by column; other columns are shown as they are.
DIGITS = {
    **dict.fromkeys(("acc", "accuracy", "published", "repeated", "mean", "median", "best"), 4),
    **dict.fromkeys(("sd", "test"), 4),
    **dict.fromkeys(("difference", "noise", "val_loss", "train_loss", "gap", "cost"), 4),
    **dict.fromkeys(("published_test", "low", "high", "short_of_best"), 4),
    **dict.fromkeys(("macro_F1", "unchanged", "shift", "rotation", "scale"), 4),
    **dict.fromkeys(("blur", "contrast", "thickness"), 4),
    **dict.fromkeys(("seconds", "epochs", "trials", "networks"), 0),
    "share_of_cost": 3,
}
HEADINGS = {
    "acc": "validation accuracy",
    "sd": "± sd",
    "val_loss": "validation loss",
    "train_loss": "training loss",
    "published_test": "published, test",
    "low": "95 % from",
    "high": "to",
    "within": "within noise",
    "short_of_best": "short of the best by",
    "share_of_cost": "share of the cost",
}


MOST_ROWS = 1000  # of a table on the page, which stays below a megabyte for each search


@dataclass
class Table:
    """A table, on the page and in files of its own.

    Args:
        name: of its files.
        title: shown above it.
        frame: its rows.
        note: shown below it.
    """

    name: str
    title: str
    frame: pd.DataFrame
    note: str = ""

    @property
    def large(self) -> bool:
        """Whether the page can sort and filter it."""
        return len(self.frame) > 10

    @property
    def headings(self) -> list[str]:
        return [
            name if "/" in name else HEADINGS.get(name, name.replace("_", " "))  # of a run
            for name in self.frame.columns
        ]

    @property
    def rows(self) -> list[list[tuple[str, Any]]]:
        """For each cell its text, and the value that it is sorted by."""
        columns = list(self.frame.columns)
        return [
            [(_text(name, value), value) for name, value in zip(columns, row, strict=True)]
            for row in self.frame.astype(object).itertuples(index=False, name=None)
        ]

    @property
    def page_note(self) -> str:
        """The note, and which rows the page leaves out."""
        if len(self.frame) <= MOST_ROWS:
            return self.note
        more = f"The first {MOST_ROWS:,} of {len(self.frame):,}; all are in tables/{self.name}.csv."
        return f"{self.note} {more}".strip()

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        columns = (self.frame[name].dropna() for name in self.frame.columns)
        return [
            all(isinstance(v, int | float) and not isinstance(v, bool) for v in column.tolist())
            for column in columns
        ]

    def markdown(self) -> str:
        lines = [self.headings, ["---"] * len(self.headings)]
        lines += [[text for text, _ in row] for row in self.rows]
        lines = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return text.replace("<", "&lt;")  # Markdown would pass it on as HTML


def _text(column: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if column in DIGITS and isinstance(value, int | float):
        sign = "+" if column in ("difference", "cost") else ""
        return f"{value:{sign},.{DIGITS[column]}f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass
class Drawing:
    """A figure, on the page and in files of its own.

    Args:
        name: of its files.
        caption: shown below it.
        figure: itself.
        wide: whether it needs the width of the page.
        narrow: the same for a phone, on the page alone.
    """

    name: str
    caption: str
    figure: Figure
    wide: bool = False
    narrow: Figure | None = None

    @cached_property
    def svg(self) -> str:
        return figures.svg(self.figure, self.caption)

    @cached_property
    def narrow_svg(self) -> str:
        return figures.svg(self.narrow, self.caption) if self.narrow else ""


@dataclass
class Picture:
    """An image on the page, as a ``data:`` address."""

    caption: str
    address: str


@dataclass
class Block:
    """A heading with text, tables, figures and images below it."""

    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


Part = tuple[list[Table], list[Drawing]]  # a part of a block


@dataclass
class Section:
    """A search or a run on the page."""

    name: str
    model: str
    summary: str
    facts: list[tuple[str, str]]
    blocks: list[Block]


def counts_text(search: SearchResult) -> str:
    """The number of trials by state, as text."""
    counts = search.counts()
    words = [f"{count:,} {what}" for what, count in counts.items() if count or what == "finished"]
    return f"{', '.join(words)}" + ("" if search.finished else " – not finished yet")


def _facts(search: SearchResult) -> list[tuple[str, str]]:
    about, code = search.about, search.about["provenance"]["code"]
    gpu = about["provenance"]["machine"].get("gpu")
    started, *grew = [each["provenance"]["time"] for each in [*about.get("grown_from", ()), about]]
    name, *options = [f"{k} {v}" for k, v in about["strategy"].items()]
    name = name.removeprefix("name ")
    ranked_by = {
        "val_acc": "val_acc after the last epoch",
        "best_val_acc": "val_acc of the best epoch",
    }
    seconds = float(search.networks["seconds"].sum()) if len(search.complete) else 0.0
    facts = [
        ("trials", counts_text(search)),
        ("model", search.model),
        ("searched", "; ".join(f"{k}: {_axis_text(axis)}" for k, axis in about["space"].items())),
        ("fixed", setting_text(about["fixed"])),
        ("strategy", f"{name} ({', '.join(options)})" if options else name),
        ("second round", setting_text(about["second_round"] or {})),
        ("seeds", ", ".join(map(str, about["seeds"]))),
        ("data", _data_text(search)),
        ("ranked by", ranked_by[search.objective]),
        ("training time", f"{_duration(seconds)} on {gpu or 'one core'}"),
        ("started", started),
        ("grew", ", ".join(grew)),
        ("code", f"mnist_lightning {code['mnist_lightning']}, {code.get('commit', '')[:12]}"),
    ]
    return [(name, text) for name, text in facts if text]


def _axis_text(axis: Any) -> str:
    if isinstance(axis, dict):
        return f"{axis['low']} to {axis['high']}"
    return ", ".join(map(value_text, axis))


def _data_text(search: SearchResult) -> str:
    data = search.about["data"]
    parts = {
        "name": f"{data['name']} ({data['source']})",
        "split": f"split {data['split']} (seed {data['split_seed']})",
        "image_size": f"{data['image_size']} pixels",
        "normalization": f"normalization {data['normalization']}",
    }
    # a setting that the search varies is among its axes
    return ", ".join(text for name, text in parts.items() if f"data.{name}" not in search.params)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def lead(searches: Sequence[SearchResult]) -> Drawing | None:
    """The figure at the top of the page, if a trial has finished.

    The published figures beside the repeated ones where one of the study's own grids was run. Of
    another search: what each value of the parameter that matters most reaches. Of several, or of
    one that varies nothing: the best configurations of each.
    """
    finished = [search for search in searches if not search.complete.empty]
    rows = _published_rows(analysis.comparable(finished))
    if len(rows):
        text = (
            "Logarithmic scale, lower is better. Band: where 95 % of repetitions fall by chance."
            " Line: ± standard deviation over seeds."
        )
        if rows["label"].str.endswith("*").any():
            text += " * Other setting here."
    elif len(finished) == 1 and finished[0].axes:
        (search,) = finished
        axis = analysis.by_importance(search)[0]
        text = (
            f"Logarithmic scale, lower is better, by {figures.label(axis)}: the parameter that"
            f" matters most in {search.name}."
        )
        return Drawing(
            "lead",
            text,
            figures.by_value(search.first_round, axis, figures.WIDE),
            narrow=figures.by_value(search.first_round, axis, figures.NARROW),
        )
    elif finished:
        rows = _best_rows(finished)
        text = (
            "The best configurations of each search; logarithmic scale, lower is better. Line: ±"
            " standard deviation over seeds."
        )
    else:
        return None
    return Drawing(
        "lead",
        text,
        figures.compared(rows, figures.WIDE),
        narrow=figures.compared(rows, figures.NARROW),
    )


def _published_rows(compared: Sequence[SearchResult]) -> pd.DataFrame:
    """The published validation accuracies above 0.9 that were measured again."""
    if not compared:
        return pd.DataFrame()
    against = analysis.against_the_study(compared)
    chosen = (against["metric"] == "val_acc") & (against["published"] > 0.9)
    rows = against[chosen & against["repeated"].notna()]
    labels, groups = pd.Series("", rows.index), rows["model"] + ", " + rows["where"]
    for _, index in rows.groupby("where", sort=False).groups.items():
        settings = [PUBLISHED[i].params for i in index]
        if len(settings) == 1:  # the first parameter is the one that the table is about
            settings = [dict(list(settings[0].items())[:1])]
        labels[index] = _differences(settings)
    alone = rows[~rows["where"].duplicated(keep=False)]
    for model, wheres in alone.groupby("model")["where"]:
        first, last = wheres.iloc[0], wheres.iloc[-1]
        if first != last:  # tables of one figure each share a heading
            groups[wheres.index] = f"{model}, {first} to {last.removeprefix('table ')}"
    another = rows["note"].str.startswith("ours: ")
    return rows.assign(
        group=groups,
        label=labels.where(~another, labels + " *"),
        acc=rows["repeated"],
    )


def _best_rows(searches: Sequence[SearchResult]) -> pd.DataFrame:
    """The best configurations of each search, about twenty in all."""
    rows = []
    for search in searches:
        best = search.configurations.head(max(1, min(5, 20 // len(searches))))
        frame = best[["acc", "sd"]].assign(group=search.name, published=None, noise=None)
        rows.append(frame.assign(label=_differences(best[search.params].to_dict("records"))))
    return pd.concat(rows, ignore_index=True)


def _differences(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each of some settings, what the others do not have in common with it."""
    varied = {k for k in settings[0] if len({setting[k] for setting in settings}) > 1}
    layers = analysis.layer_axes(settings[0])
    if varied & set(layers):
        varied |= set(layers)  # 1024-10-1024 is read as one
    if not varied:
        return [setting_text(setting) for setting in settings]
    texts = [setting_text({k: v for k, v in each.items() if k in varied}) for each in settings]
    return [text.removeprefix("hidden_units ") for text in texts]


def overall(searches: Sequence[SearchResult]) -> list[Block]:
    """What is said of all searches together."""
    compared = analysis.comparable(searches)
    return [*_published(compared), *_best(compared), *_costs(searches)]


def _published(compared: Sequence[SearchResult]) -> list[Block]:
    against = analysis.against_the_study(compared)
    measured, judged = against["repeated"].notna().sum(), against["within"].notna().sum()
    if not measured:
        return []
    text = (
        f"{measured} of {len(against)} published figures of these models were measured again."
        f" {(against['within'] == True).sum()} of the {judged} that can be judged"  # noqa: E712
        " agree within noise: half the width of the 95 % interval of the difference, from other"
        " seeds and another shuffle of the images. Where our setting differs from the study's, the"
        " note says how, and the figure is not judged. Figures that were not measured are listed"
        " too."
    )
    table = Table("published", "Row by row", against.drop(columns=["model"]))
    return [Block("Published against repeated", text, [table])]


def _best(compared: Sequence[SearchResult]) -> list[Block]:
    best = analysis.best_found(compared)
    if best.empty:
        return []
    text = (
        "The study's best on validation and on test, and the best of all searches on this page."
        " Chosen on validation; the test images were scored afterwards, by the winner of each"
        " search."
    )
    return [Block("The best found", text, [Table("best_found", "By model", best)])]


def _costs(searches: Sequence[SearchResult]) -> list[Block]:
    costs = analysis.efficiency(searches)
    if len(costs) < 2:
        return []
    text = (
        "Costs for one seed. A search that trains fewer networks is cheaper; the last column says"
        " how much accuracy that costs. The best of many trials is partly luck."
    )
    return [Block("The searches", text, [Table("searches", "Searches of the same model", costs)])]


def section(search: SearchResult) -> Section:
    """What is said of one search."""
    return Section(search.name, search.model, counts_text(search), _facts(search), _blocks(search))


def _blocks(search: SearchResult) -> list[Block]:
    if search.complete.empty:
        failed = search.trials[search.trials["state"] == "FAIL"] if len(search.trials) else []
        return [Block("No trial has finished yet")] + (
            [Block("Failed", tables=[_failed(search)])] if len(failed) else []
        )
    return [
        *_ranking(search),
        *_panels(search),
        *_dependence(search),
        *_training(search),
        *_test(search),
    ]


def _shown(configurations: pd.DataFrame, search: SearchResult) -> pd.DataFrame:
    """The configurations without columns that have one value or none."""
    dropped = ["round"] if configurations["round"].nunique() == 1 else []
    if search.trials["seed"].nunique() == 1:
        dropped += ["sd", "n"]
    dropped += [
        name for name in search.about["fixed"] if search.configurations[name].nunique() == 1
    ]
    return configurations.drop(columns=dropped)


def _failed(search: SearchResult) -> Table:
    failed = search.trials[search.trials["state"] == "FAIL"]
    return Table(f"{search.name}_failed", "Failed trials", failed[["id", "error"]])


def _ranking(search: SearchResult) -> list[Block]:
    name, configurations = search.name, search.configurations
    tables = []
    several = len(search.about["seeds"]) > 1
    text = "A row is the mean over the seeds." if several else "One seed."
    rounds = sorted(configurations["round"].unique())
    for number in rounds:
        of = configurations[configurations["round"] == number]
        which = f", round {number + 1}" if len(rounds) > 1 else ""
        end = f"_round{number + 1}" if len(rounds) > 1 else ""
        tables.append(Table(f"{name}_best{end}", f"Best five{which}", _shown(of.head(5), search)))
        if len(of) > 10:
            worst = _shown(of.tail(5), search)
            tables.append(Table(f"{name}_worst{end}", f"Worst five{which}", worst))
    if len(configurations) > 5:
        everything = _shown(configurations, search)
        tables.append(Table(f"{name}_all", f"All {len(configurations)}", everything))
    if (search.trials["state"] == "FAIL").any():
        tables.append(_failed(search))
    return [Block("The best and the worst", text, tables)]


def _panels(search: SearchResult) -> list[Block]:
    across = [axis for axis in search.axes if axis != "max_epochs"]
    # of five axes and more, the colours are those of the most important one
    colours = search.axes if len(search.axes) < 5 else analysis.by_importance(search)
    drawings = []
    for x in across:
        others = [axis for axis in colours if axis != x]
        for colour in others if len(search.axes) < 5 else others[:1]:
            drawings.append(
                Drawing(
                    f"{search.name}_{x}_by_{colour}",
                    f"Validation error against {figures.label(x)}, coloured by"
                    f" {figures.label(colour)}; lines join the means.",
                    figures.panel(search.first_round, x, colour),
                )
            )
    text = "Errors in percent, on a logarithmic scale: lower is better."
    return [Block("Error against each parameter", text, [], drawings)] if drawings else []


def _dependence(search: SearchResult) -> list[Block]:
    if not search.axes or len(search.first_round) < 4:
        return []
    parts = [
        _correlations(search),
        _importance(search),
        _variance(search),
        _marginals(search),
        _interactions(search),
        _accuracy_by_total_lr(search),
    ]
    text = (
        "A correlation measures straight-line relations, of one parameter at a time. The rest shows"
        " the accuracy at each value, which pairs of parameters act together, and which parameters"
        " matter most."
    )
    tables = [table for tables, _ in parts for table in tables]
    drawings = [drawing for _, drawings in parts for drawing in drawings]
    return [Block("What the accuracy depends on", text, tables, drawings)]


def _correlations(search: SearchResult) -> Part:
    if not analysis.numeric_axes(search):
        return [], []
    frame = analysis.correlations(search)
    frame.insert(0, "parameter", frame.index)
    table = Table(
        f"{search.name}_correlations",
        "Correlation with the validation accuracy",
        frame.reset_index(drop=True),
    )
    if len(frame) == 1:
        return [table], []  # one number needs no figure
    drawing = Drawing(
        f"{search.name}_correlations",
        "Pearson's correlations among the parameters and with the validation accuracy.",
        figures.heat(analysis.correlation_matrix(search), "correlation", 2, diverging=True),
    )
    return [table], [drawing]


def _importance(search: SearchResult) -> Part:
    importance = analysis.importance(search)
    if importance.empty:
        return [], []
    drawing = Drawing(
        f"{search.name}_importance",
        "Importance of each parameter (fANOVA, by Optuna): its share of the variance.",
        figures.bars(importance, "importance (fANOVA)", "share"),
    )
    return [], [drawing]


def _variance(search: SearchResult) -> Part:
    shares = analysis.variance_shares(search)
    if shares.empty:
        return [], []
    note = "Exact, since the grid is complete."
    if len(search.axes) > 2:
        rest = max(0.0, 1 - shares.sum())
        note = f"The rest, {rest:.3f}, is due to three parameters and more together. {note}"
    table = Table(
        f"{search.name}_variance",
        "Shares of the variance of the accuracy",
        shares.rename("share").rename_axis("parameter").reset_index(),
        note,
    )
    drawing = Drawing(
        f"{search.name}_variance",
        "Shares of the variance of the accuracy: each parameter alone, and each pair beyond the"
        " effects of its two parameters.",
        figures.bars(shares.head(8), "variance of the accuracy", "share"),
    )
    return [table], [drawing]


def _marginals(search: SearchResult) -> Part:
    marginals = analysis.marginals(search)
    table = Table(
        f"{search.name}_marginals",
        "Each value of each parameter",
        marginals,
        "Mean, median and best accuracy of the configurations that have this value.",
    )
    drawings = [
        Drawing(
            f"{search.name}_marginal_{axis}",
            f"Validation error for each value of {figures.label(axis)}, lower is better.",
            figures.marginal(marginals[marginals["axis"] == axis], axis),
        )
        for axis in search.axes
    ]
    return [table], drawings


def _interactions(search: SearchResult) -> Part:
    drawings = [
        Drawing(
            f"{search.name}_{row}_and_{column}",
            f"Mean accuracy by {figures.label(row)} and {figures.label(column)} together.",
            figures.heat(analysis.interaction(search, row, column), "mean accuracy"),
        )
        for row, column in itertools.combinations(search.axes, 2)
    ]
    return [], drawings


def _accuracy_by_total_lr(search: SearchResult) -> Part:
    if not {"lr", "batch_size", "max_epochs"} <= set(search.params) or "lr" not in search.axes:
        return [], []
    first = search.first_round
    drawing = Drawing(
        f"{search.name}_total_lr",
        "Validation error against learning rate times epochs over mini-batch size: the total"
        " learning rate of a training, for each training image.",
        figures.scatter(
            analysis.total_lr(first),
            first["acc"],
            analysis.groups(first["lr"]),
            "lr · epochs / mini-batch size",
            "learning rate",
        ),
    )
    return [], [drawing]


def _training(search: SearchResult) -> list[Block]:
    stopped = analysis.stopped(search)
    rows, drawings = [], []
    for end in ("best", "median", "worst"):
        if end != "best" and len(search.best_trials("best", 9)) < 9:
            continue  # there are so few trials that they would be the same ones
        for rank, (index, trial) in enumerate(search.best_trials(end).iterrows(), 1):
            stop = stopped.loc[index]
            setting = setting_text(dict(trial[search.params]))
            rows.append({"which": f"{end} {rank}", "setting": setting, **stop.drop("id")})
            drawings.append(
                Drawing(
                    f"{search.name}_curves_{end}{rank}",
                    f"Losses of {setting}; validation accuracy {trial[search.objective]:.4f}.",
                    figures.curves(trial, stop, f"{end} {rank}"),
                )
            )
    note = (
        "lowest: epoch of the lowest validation loss; stop: epoch after which it would have"
        " stopped; saved: number of epochs saved; kept: epoch of the lowest loss until then; cost:"
        " accuracy after the last epoch minus that after the kept one."
    )
    table = Table(
        f"{search.name}_stopping", "Early stopping, in hindsight", pd.DataFrame(rows), note
    )
    curves = Block("Learning curves", _stopping_text(stopped), [table], drawings)
    return [curves, *_overfitting(search)]


def _stopping_text(stopped: pd.DataFrame) -> str:
    early = (stopped["saved"] > 0).mean()
    saved = stopped["saved"].sum() / stopped["epochs"].sum()
    cost = stopped["cost"].mean()
    return (
        f"Early stopping with a patience of {analysis.PATIENCE} epochs would have ended"
        f" {100 * early:.0f} % of the trials, saved {100 * saved:.0f} % of all epochs, and kept"
        f" weights whose accuracy is on average {abs(cost):.4f}"
        f" {'below' if cost >= 0 else 'above'} that of the last epoch, and differs from it by"
        f" {abs(stopped['cost']).max():.4f} at most."
    )


def _overfitting(search: SearchResult) -> list[Block]:
    configurations, drawings = search.configurations, []
    colour = "lr" if "lr" in search.axes else None
    size = analysis.capacity(search)
    if size is not None and size.nunique() > 1:
        figure = figures.panel(configurations.assign(size=size), "size", colour, "gap")
        caption = "The gap between validation and training loss against the size of the network."
        drawings.append(Drawing(f"{search.name}_gap_by_size", caption, figure))
    if configurations["max_epochs"].nunique() > 1:
        figure = figures.panel(configurations, "max_epochs", colour, "gap")
        caption = "The gap between validation and training loss against the number of epochs."
        drawings.append(Drawing(f"{search.name}_gap_by_epochs", caption, figure))
    if not drawings:
        return []
    widest = configurations.loc[configurations["gap"].idxmax()]
    text = (
        f"The gap is largest, {widest['gap']:.3f}, for"
        f" {setting_text(dict(widest[search.params]))}."
        " The training loss is the mean over the mini-batches, each measured before its update."
    )
    return [Block("Overfitting", text, [], drawings)]


def _test(search: SearchResult) -> list[Block]:
    test = analysis.tested(search)
    partial = "".join(
        f" Evaluation {each['evaluation']} scored {each['images']:,} of the {each['test_set']:,}"
        " test images only."
        for each in search.tests
        if not evaluations.is_whole(each)
    )
    if test is None:
        text = (
            f"The winner has not been tested yet.{partial} To test it:"
            f" python -m mnist_lightning test --ckpt_path {shlex.quote(str(search.path))}"
        )
        return [Block("Test", text)]
    winner = setting_text(dict(search.configurations.iloc[0][search.params]))
    record, total = test["record"], search.tests[-1]["evaluation"]
    text = (
        f"Chosen on validation: {winner}. On the {test['images']:,} test images: {test['acc']:.4f}"
        f" (95 % interval {test['low']:.4f} to {test['high']:.4f}, Wilson). "
        + ("Evaluated once." if total == 1 else f"Evaluation {record['evaluation']} of {total}.")
        + (f" {record['note']}" if "note" in record else "")
        + partial
    )
    return [Block("Test", text, [], mistakes(search.name, record))]


def mistakes(name: str, record: Mapping[str, Any]) -> list[Drawing]:
    """The confusion matrix and the mistakes of a test evaluation, where it has recorded them."""
    if "confusion" not in record:
        return []
    drawings = [
        Drawing(
            f"{name}_confusion",
            "Number of wrongly classified test images, by label and prediction.",
            figures.confusion(record["confusion"], "mistakes", record.get("classes")),
        )
    ]
    if record["mistakes"]:
        drawings.append(
            Drawing(
                f"{name}_mistakes",
                "The mistakes with the highest probability: label → prediction, and its"
                " probability.",
                figures.mistakes(record["mistakes"], record.get("classes")),
                wide=True,
            )
        )
    return drawings
