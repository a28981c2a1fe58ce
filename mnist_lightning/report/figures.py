"""The figures of a report, from numbers that ``analysis`` has computed.

Accuracies are drawn as errors in percent on a logarithmic scale: near 1, where they crowd, a
linear scale would show nothing. Only ``panel`` and ``by_value`` compute something themselves: the
means, or the best, that their lines join. All figures have one size, so that a page can arrange
them in columns, but the images of ``mistakes`` and those at the top of a page. Text and axes are
drawn in one colour (``INK``), which the page replaces by its own text colour.
"""

import base64
import io
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from PIL import Image

from mnist_lightning.report.analysis import MANY, groups, value_text

INK = "#1a1b1c"
SIZE = (3.8, 2.9)  # inches
WIDE, NARROW = 7.8, 3.6  # inches: of the figure at the top of a page, for a screen and a phone
# about equally light, legible on white and on black; the markers help without colour
COLOURS = (
    "#4477dd",
    "#1fa3b8",
    "#3f9f4f",
    "#c08a1e",
    "#e0662f",
    "#d0417c",
    "#9457c8",
    "#808890",
)
MARKERS = "osD^vPX*"
STYLE: Any = {
    "font.size": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "mnist_lightning",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.title_fontsize": 7.5,
    "lines.markersize": 3,
    "lines.linewidth": 1.2,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}
LABELS = {
    "lr": "learning rate",
    "batch_size": "mini-batch size",
    "max_epochs": "epochs",
    "hidden_units": "hidden units",
    "hidden_units.1": "units, layer 1",
    "hidden_units.2": "units, layer 2",
    "hidden_units.3": "units, layer 3",
    "acc": "validation accuracy",
    "gap": "validation loss − training loss",
    "error": "validation error (%)",
    "size": "weights and biases",
}


def label(name: str) -> str:
    """A column's name as shown to the reader."""
    return LABELS.get(name, name.replace("_", " "))


def svg(figure: Figure, alt: str) -> str:
    """The figure as an SVG element of a page, in the page's text colour.

    Args:
        figure: to draw.
        alt: a description of what it shows, for screen readers.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # the ids are not unique on a page with several figures
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub("<[^>]*>", _compact, text)
    text = re.sub(r">\s+<", "><", text)
    quoted = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    start = f'<svg role="img" aria-label="{quoted}" font-family="sans-serif"'
    return text.replace("<svg", start, 1)


def _compact(tag: re.Match[str]) -> str:
    """An SVG tag without what nobody sees: most of Matplotlib's bytes are such."""
    text = re.sub(r"\s+", " ", tag[0])
    text = text.replace("base64, ", "base64,")
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r' transform="rotate\(-?0 [^"]*"', "", text)
    return re.sub(r"\d+\.\d{2,}", lambda number: f"{float(number[0]):.4g}", text)


def png(figure: Figure) -> bytes:
    """The figure on white, with 150 dots per inch."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": ""})
    return buffer.getvalue()


def _axes(
    title: str = "", x: str = "", y: str = "", size: tuple[float, float] = SIZE
) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, fontsize=8.5)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
    return figure, axes


def _legend(axes: Axes, title: str | None = None, **where: Any) -> None:
    with matplotlib.rc_context(STYLE):
        axes.legend(title=title, **where)


def errors(accuracies: Any) -> Any:
    """In percent; at least 0.01, since a logarithmic scale has no zero."""
    return (100 * (1 - accuracies)).clip(lower=0.01)


def _errors_on(axes: Axes, which: str, lowest: float = 0.0) -> None:
    """A logarithmic scale for errors in percent on x or y, with ticks that a reader can name.

    Args:
        axes: to change.
        which: ``x`` or ``y``.
        lowest: error on the scale; what reaches beyond it, like an interval that includes no error
            at all, is cut off.
    """
    axes.set(**{f"{which}scale": "log"})
    axis: Axis = getattr(axes, f"{which}axis")
    low, high = sorted(axis.get_view_interval())
    low = max(low, lowest)
    axes.set(**{f"{which}lim": (low, high)})
    if high > 10 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    elif high > 2 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
    else:
        axis.set_major_locator(MaxNLocator(4))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def panel(configurations: pd.DataFrame, x: str, colour: str | None, y: str = "error") -> Figure:
    """One column against a parameter, coloured by another parameter; lines join the means."""
    configurations = configurations.assign(error=errors(configurations["acc"]))
    figure, axes = _axes("", label(x), label(y))
    by = groups(configurations[colour]) if colour else groups(pd.Series("", configurations.index))
    many = configurations[x].nunique() > MANY
    places = configurations[x] if many else groups(configurations[x]).cat.codes
    shades = list(by.cat.categories)
    for i, shade in enumerate(shades):
        chosen = by == shade
        at, values = places[chosen], configurations[y][chosen]
        # side by side: the last colour would hide the others
        shift = 0 if many else 0.4 * ((i + 0.5) / len(shades) - 0.5)
        axes.plot(
            at + shift,
            values,
            MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            alpha=0.55,
            markeredgewidth=0,
            rasterized=True,
        )
        if not many:
            means = values.groupby(at).mean()
            axes.plot(means.index + shift, means, color=COLOURS[i % len(COLOURS)], linewidth=1)
        axes.plot(
            [], [], MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)], label=str(shade)
        )
    if many:
        _log_if_wide(axes, configurations[x])
    else:
        names = groups(configurations[x]).cat.categories
        axes.set_xticks(range(len(names)), names)
    if y == "error":
        _errors_on(axes, "y")
    else:  # a few networks have very large gaps
        axes.set_yscale("symlog", linthresh=0.1)
        axes.margins(y=0.08)
        if axes.get_ylim()[1] < 1:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: value_text(float(v))))
    if colour:
        _legend_above(axes, label(colour), shades)
    return figure


def _legend_above(axes: Axes, title: str, names: Sequence[Any]) -> None:
    """A legend above the axes, in as many columns as fit."""
    longest = max(len(str(name)) for name in names)
    _legend(
        axes,
        title,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=max(1, min(len(names), 44 // (longest + 4))),
        columnspacing=1.0,
        handletextpad=0.2,
    )


def _log_if_wide(axes: Axes, values: pd.Series) -> None:
    if values.min() > 0 and values.max() >= 8 * values.min():
        axes.set_xscale("log")
        if values.max() < 100 * values.min():  # powers of ten would be one or two
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: value_text(float(v))))
        axes.xaxis.set_minor_formatter(NullFormatter())


def heat(table: pd.DataFrame, title: str, digits: int = 3, diverging: bool = False) -> Figure:
    """A table as a heat map, with the number in each cell."""
    figure, axes = _axes(title)
    values = table.to_numpy(float, copy=True)
    if diverging:
        low, high = -1.0, 1.0
        np.fill_diagonal(values, np.nan)  # of correlations: each one's with itself
    else:
        low, high = np.nanmin(values), np.nanmax(values)
    shades = matplotlib.colormaps["RdBu_r" if diverging else "viridis"]
    axes.imshow(values, cmap=shades, vmin=low, vmax=high, aspect="auto", interpolation="none")
    axes.grid(False)
    axes.set_xticks(range(table.shape[1]), [label(str(name)) for name in table.columns])
    axes.set_yticks(range(table.shape[0]), [label(str(name)) for name in table.index])
    if max(len(label(str(name))) for name in table.columns) * table.shape[1] > 40:
        axes.tick_params(axis="x", rotation=30)
        for tick in axes.get_xticklabels():
            tick.set_horizontalalignment("right")
    if table.columns.name:
        axes.set_xlabel(label(str(table.columns.name)))
    if table.index.name:
        axes.set_ylabel(label(str(table.index.name)))
    small = 6.5 if table.size > 40 else 7.5
    for (row, column), value in np.ndenumerate(values):
        if not np.isfinite(value):
            continue
        red, green, blue, _ = shades((value - low) / ((high - low) or 1.0))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        text = f"{round(value, digits) + 0:.{digits}f}"  # + 0 turns -0.0 into 0.0
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=small,
            color="#ffffff" if dark else "#000000",
        )
    return figure


def marginal(rows: pd.DataFrame, axis: str) -> Figure:
    """Error of the mean, median and best configuration at each value of a parameter."""
    figure, axes = _axes("", label(axis), label("error"))
    alone = (rows["configurations"] == 1).all()  # all three are the same
    for i, name in enumerate(("best",) if alone else ("best", "median", "mean")):
        shown = errors(rows[name])
        axes.plot(range(len(rows)), shown, f"{MARKERS[i]}-", color=COLOURS[2 * i], label=name)
    _errors_on(axes, "y")
    axes.set_xticks(range(len(rows)), rows["value"])
    if len(str(rows["value"].iloc[0])) > 9:
        axes.tick_params(axis="x", rotation=15)
    if not alone:
        _legend(axes)
    return figure


def bars(shares: pd.Series, title: str, x: str) -> Figure:
    """Shares as horizontal bars with their numbers, the largest on top."""
    figure, axes = _axes(title, x)
    names = [" × ".join(label(part) for part in str(name).split(" × ")) for name in shares.index]
    axes.barh(range(len(shares))[::-1], shares, color=COLOURS[0], height=0.65)
    axes.set_yticks(range(len(shares))[::-1], names)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, max(shares) * 1.18)
    for place, share in zip(range(len(shares))[::-1], shares, strict=True):
        axes.annotate(
            f"{share:.2f}",
            (share, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=INK,
        )
    return figure


def curves(trial: Mapping[str, Any], stop: Mapping[str, Any], title: str) -> Figure:
    """Losses of a trial, with the lowest validation loss and where it would have stopped."""
    figure, axes = _axes(title, "epoch", "loss")
    epochs = range(1, len(trial["curves"]["val_loss"]) + 1)
    for i, (name, text) in enumerate((("train_loss", "training"), ("val_loss", "validation"))):
        losses = [np.nan if loss is None else loss for loss in trial["curves"][name]]
        style = "-" if len(losses) > 1 else "o"
        axes.plot(epochs, losses, style, color=COLOURS[4 * i], label=text)
    lowest = stop["lowest"]
    axes.plot(
        lowest,
        trial["curves"]["val_loss"][lowest - 1],
        "*",
        color=COLOURS[4],
        markersize=9,
        label=f"lowest: {lowest}",
    )
    if stop["saved"]:
        axes.axvline(stop["stop"], color=INK, linestyle=":", label=f"would stop: {stop['stop']}")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)
    return figure


def epochs(
    series: Mapping[str, pd.Series],
    title: str,
    accuracies: bool = False,
    size: tuple[float, float] = SIZE,
) -> Figure:
    """A line for each training, by epoch.

    Args:
        series: for each training its values, by epoch.
        title: of the figure.
        accuracies: if True, the values are accuracies, and shown are the errors.
        size: of the figure, in inches.
    """
    figure, axes = _axes(title, "epoch", size=size)
    for i, (name, values) in enumerate(series.items()):
        shown = errors(values) if accuracies else values
        marker = MARKERS[i // len(COLOURS) % len(MARKERS)]
        style = marker if len(shown) == 1 else "-" if i < len(COLOURS) else f"{marker}-"
        axes.plot(shown.index, shown, style, color=COLOURS[i % len(COLOURS)], label=name)
    if accuracies:
        _errors_on(axes, "y")
    else:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(series) > 1:
        _legend(axes)
    return figure


def scatter(
    x: pd.Series, accuracies: pd.Series, colour: pd.Series, x_title: str, colour_title: str
) -> Figure:
    """The error against a number, a marker for each configuration, coloured by a category."""
    figure, axes = _axes("", x_title, label("error"))
    shades = list(colour.cat.categories)
    for i, shade in enumerate(shades):
        chosen = colour == shade
        shape: Any = {"color": COLOURS[i % len(COLOURS)], "markeredgewidth": 0}
        axes.plot(
            x[chosen],
            errors(accuracies[chosen]),
            MARKERS[i % len(MARKERS)],
            alpha=0.6,
            rasterized=True,
            **shape,
        )
        axes.plot([], [], MARKERS[i % len(MARKERS)], label=str(shade), **shape)
    _log_if_wide(axes, x)
    _errors_on(axes, "y")
    _legend_above(axes, colour_title, shades)
    return figure


def confusion(
    counts: Sequence[Sequence[int]], title: str, classes: Sequence[str] | None = None
) -> Figure:
    """How often each label was predicted as another one; correct predictions are left out."""
    table = pd.DataFrame(counts, classes, classes).astype(float)
    table.index.name, table.columns.name = "label", "predicted"
    values = table.to_numpy(copy=True)
    np.fill_diagonal(values, np.nan)
    wrong = pd.DataFrame(values, table.index, table.columns)
    return heat(wrong, title, digits=0)


def mistakes(
    records: Sequence[Mapping[str, Any]],
    classes: Sequence[str] | None = None,
    columns: int = 10,
    rows: int = 4,
) -> Figure:
    """Wrongly classified images, those with the highest probability first: label → prediction."""
    shown = records[: columns * rows]
    lines = -(-len(shown) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2 * SIZE[0], 0.9 * lines), layout="constrained")
        for i, mistake in enumerate(shown):
            axes = figure.add_subplot(lines, columns, i + 1)
            pixels = np.frombuffer(zlib.decompress(base64.b64decode(mistake["pixels"])), np.uint8)
            image = pixels.reshape(mistake.get("shape", (28, 28))).squeeze()
            image = image.transpose(1, 2, 0) if image.ndim == 3 else image
            # as many pixels as are seen at this size
            small = Image.fromarray(image).reduce(max(1, max(image.shape) // 28))
            axes.imshow(small, cmap="gray_r", vmin=0, vmax=255, interpolation="none")
            sure = f"{100 * mistake['probability']:.0f} %"
            label, predicted = (
                classes[mistake[kind]] if classes else mistake[kind]
                for kind in ("label", "predicted")
            )
            axes.set_title(f"{label} → {predicted}\n{sure}", fontsize=7.5)
            axes.set_axis_off()
    return figure


def compared(rows: pd.DataFrame, width: float) -> Figure:
    """Errors as dots with intervals, one row for each model, in groups.

    Args:
        rows: ``group``, ``label``, ``acc``, ``sd`` (of the accuracy over seeds, or missing), and
            where there is one the ``published`` accuracy with its ``noise``: so far from it an
            accuracy may be by chance.
        width: of the figure, in inches. Without the labels where it is narrow.
    """
    narrow = width < SIZE[0]
    step = 0.105 if narrow else 0.185
    groups = list(dict.fromkeys(rows["group"]))
    lines = len(rows) + 1.5 * len(groups)
    figure, axes = _axes("", label("error"), size=(width, step * lines + 0.85))
    at, names, place = [], [], 0.0
    for group in groups:
        axes.text(
            0.0,
            place,
            group,
            transform=axes.get_yaxis_transform(),
            va="center",
            weight="bold",
            size=7.5 if narrow else 8.5,
            color=INK,
            in_layout=False,  # it may be wider than the axes' own share
        )
        place += 1
        for row in rows[rows["group"] == group].itertuples():
            at.append(place)
            names.append(row.label)
            _dot(axes, row, place, 6 if narrow else 8)
            place += 1
        place += 0.5
    axes.set_ylim(place - 0.3, -0.9)
    _errors_on(axes, "x", errors(rows["acc"]).min() / 2)
    axes.set_yticks(at, [""] * len(at) if narrow else names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if rows["published"].notna().any():
        axes.plot([], [], "-", color=COLOURS[-1], alpha=0.35, linewidth=6, label="chance, 95 %")
        axes.plot([], [], "|", color=INK, markersize=8, markeredgewidth=1.5, label="published")
        axes.plot([], [], "o", color=COLOURS[0], markersize=6, label="repeated, ± sd")
        with matplotlib.rc_context(STYLE):
            figure.legend(loc="outside upper center", ncols=3, columnspacing=1.2)
    return figure


def _dot(axes: Axes, row: Any, place: float, size: float) -> None:
    if row.published is not None and np.isfinite(row.published):
        ends = errors(pd.Series([row.published + row.noise, row.published - row.noise]))
        axes.plot(ends, [place] * 2, "-", color=COLOURS[-1], alpha=0.35, linewidth=0.75 * size)
        x = errors(pd.Series([row.published]))
        axes.plot(x, [place], "|", color=INK, markersize=size, markeredgewidth=1.5)
    if row.sd is not None and np.isfinite(row.sd):
        ends = errors(pd.Series([row.acc + row.sd, row.acc - row.sd]))
        axes.plot(ends, [place] * 2, "-", color=COLOURS[0], linewidth=1.5)
    axes.plot(errors(pd.Series([row.acc])), [place], "o", color=COLOURS[0], markersize=size - 2)


def by_value(configurations: pd.DataFrame, axis: str, width: float) -> Figure:
    """The error of each configuration at each value of a parameter; a line joins the best.

    Args:
        configurations: with ``acc``, and ``sd`` over the seeds or missing.
        axis: the parameter.
        width: of the figure, in inches.
    """
    figure, axes = _axes("", label(axis), label("error"), size=(width, 0.35 * width + 2.1))
    many = configurations[axis].nunique() > MANY and configurations[axis].dtype != object
    values = groups(configurations[axis])
    places = configurations[axis] if many else values.cat.codes
    axes.plot(
        places,
        errors(configurations["acc"]),
        "o",
        color=COLOURS[-1],
        alpha=0.5,
        markersize=4,
        markeredgewidth=0,
        label="each configuration",
    )
    best = configurations.loc[configurations["acc"].groupby(values, observed=True).idxmax()]
    ends = [errors(best["acc"] + best["sd"]), errors(best["acc"] - best["sd"])]
    at = places[best.index]
    axes.vlines(at, *ends, color=COLOURS[0], linewidth=1.5)
    name = "best of each quarter of the values" if many else "best of each value"
    name += ", ± sd" if best["sd"].notna().any() else ""
    axes.plot(at, errors(best["acc"]), "o-", color=COLOURS[0], markersize=6, label=name)
    if many:
        _log_if_wide(axes, configurations[axis])
    else:
        axes.set_xticks(range(len(values.cat.categories)), values.cat.categories)
    _errors_on(axes, "y", errors(configurations["acc"]).min() / 2)
    with matplotlib.rc_context(STYLE):
        figure.legend(loc="outside upper center", ncols=2)
    return figure
