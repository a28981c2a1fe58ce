"""The figures of a report, from numbers that ``analysis`` has computed.

Only ``panel`` computes something itself: the means that its lines join. All figures but the images
of ``mistakes`` have one size, so that a page can arrange them in columns. Text and axes are drawn
in one colour (``INK``), which the page replaces by its own text colour.
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
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mnist_lightning.report.analysis import MANY, groups, value_text

INK = "#1a1b1c"
SIZE = (3.8, 2.9)  # inches
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
    text = re.sub(
        r'<g id="[^"]*">', "<g>", text
    )  # the ids are not unique on a page with several figures
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    quoted = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{quoted}"', 1)


def png(figure: Figure) -> bytes:
    """The figure on white, with 150 dots per inch."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": ""})
    return buffer.getvalue()


def _axes(title: str = "", x: str = "", y: str = "") -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, fontsize=8.5)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
    return figure, axes


def _legend(axes: Axes, title: str | None = None, **where: Any) -> None:
    with matplotlib.rc_context(STYLE):
        axes.legend(title=title, **where)


def panel(configurations: pd.DataFrame, x: str, colour: str | None, y: str = "acc") -> Figure:
    """One column against a parameter, coloured by another parameter; lines join the means."""
    figure, axes = _axes("", label(x), label(y))
    by = groups(configurations[colour]) if colour else groups(pd.Series("", configurations.index))
    many = configurations[x].nunique() > MANY
    places = configurations[x] if many else groups(configurations[x]).cat.codes
    shades = list(by.cat.categories)
    for i, shade in enumerate(shades):
        chosen = by == shade
        at, values = places[chosen], configurations[y][chosen]
        # side by side: the last colour would hide the others
        shift = 0 if many else 0.6 * ((i + 0.5) / len(shades) - 0.5)
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
    if y == "gap":  # a few networks have very large gaps
        axes.set_yscale("symlog", linthresh=0.1)
        axes.margins(y=0.08)
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
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: value_text(float(v))))
        axes.xaxis.set_minor_formatter(NullFormatter())


def heat(table: pd.DataFrame, title: str, digits: int = 3, diverging: bool = False) -> Figure:
    """A table as a heat map, with the number in each cell."""
    figure, axes = _axes(title)
    values = table.to_numpy(float)
    if diverging:
        low, high = -1.0, 1.0
    else:
        low, high = np.nanmin(values), np.nanmax(values)
    shades = matplotlib.colormaps["RdBu_r" if diverging else "viridis"]
    axes.imshow(values, cmap=shades, vmin=low, vmax=high, aspect="auto")
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
    """Mean, median and best accuracy at each value of a parameter."""
    figure, axes = _axes("", label(axis), label("acc"))
    for i, name in enumerate(("best", "median", "mean")):
        axes.plot(range(len(rows)), rows[name], f"{MARKERS[i]}-", color=COLOURS[2 * i], label=name)
    axes.set_xticks(range(len(rows)), rows["value"])
    if len(str(rows["value"].iloc[0])) > 9:
        axes.tick_params(axis="x", rotation=15)
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
        axes.text(share, place, f" {share:.2f}", va="center", fontsize=7.5, color=INK)
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


def epochs(series: Mapping[str, pd.Series], title: str, errors: bool = False) -> Figure:
    """A line for each training, by epoch.

    Args:
        series: for each training its values, by epoch.
        title: of the figure.
        errors: if True, the values are accuracies, and shown is what they miss.
    """
    figure, axes = _axes(title, "epoch")
    for i, (name, values) in enumerate(series.items()):
        shown = (1 - values).clip(lower=1e-5) if errors else values
        marker = MARKERS[i // len(COLOURS) % len(MARKERS)]
        style = marker if len(shown) == 1 else "-" if i < len(COLOURS) else f"{marker}-"
        axes.plot(shown.index, shown, style, color=COLOURS[i % len(COLOURS)], label=name)
    if errors:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(series) > 1:
        _legend(axes)
    return figure


def scatter(x: pd.Series, y: pd.Series, colour: pd.Series | None, titles: Sequence[str]) -> Figure:
    """One number against another, a marker for each configuration.

    Args:
        x: a number for each configuration.
        y: another one.
        colour: a category for each configuration, or ``None``.
        titles: of the figure, of x, of y, of the colours.
    """
    title, x_title, y_title, colour_title = titles
    figure, axes = _axes(title, x_title, y_title)
    shades = list(colour.cat.categories) if colour is not None else [None]
    for i, shade in enumerate(shades):
        chosen = slice(None) if colour is None else colour == shade
        shape: Any = {"color": COLOURS[i % len(COLOURS)], "markeredgewidth": 0}
        axes.plot(
            x[chosen], y[chosen], MARKERS[i % len(MARKERS)], alpha=0.6, rasterized=True, **shape
        )
        if shade is not None:
            axes.plot([], [], MARKERS[i % len(MARKERS)], label=str(shade), **shape)
    _log_if_wide(axes, x)
    if colour is not None:
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
            if image.ndim == 3:
                axes.imshow(image.transpose(1, 2, 0))
            else:
                axes.imshow(image, cmap="gray_r", vmin=0, vmax=255)
            sure = f"{100 * mistake['probability']:.0f} %"
            label, predicted = (
                classes[mistake[kind]] if classes else mistake[kind]
                for kind in ("label", "predicted")
            )
            axes.set_title(f"{label} → {predicted}\n{sure}", fontsize=7.5)
            axes.set_axis_off()
    return figure
