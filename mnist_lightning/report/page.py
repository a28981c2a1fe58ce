"""The files of a report: what searches found, as one page, in words, as tables and as figures.

index.html     everything, in one file that needs no other
README.md      the findings and the main tables
tables/        each table as CSV (all digits) and Markdown (rounded, as on the page)
figures/       each figure as PNG and SVG
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from mnist_lightning.files import csv_cell, write_bytes
from mnist_lightning.provenance import provenance
from mnist_lightning.report import analysis, figures, findings, sections
from mnist_lightning.report.analysis import SearchResult
from mnist_lightning.report.published import COUNTERPARTS
from mnist_lightning.report.sections import Block, Section, counts_text


def write(folders: Sequence[Path], out: Path, say: Callable[[str], None] = print) -> None:
    """Writes the report on the searches in some folders.

    Args:
        folders: each the folder of a search, or one that holds several.
        out: the folder to write to; it is made if it is not there.
        say: is called with a line of text for each step.

    Raises:
        ValueError: there is no search, two have the same name, a file is damaged, or ``out`` cannot
            be written.
    """
    searches = [search for folder in folders for search in analysis.read(folder)]
    names = [search.name for search in searches]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two searches are called {twice[0]}: rename the folder of one of them")
    for search in searches:
        say(f"{search.name}: {counts_text(search)}")
    overall = sections.overall(searches)
    by_search = []
    for search in searches:
        by_search.append(sections.section(search))
        say(f"{search.name}: {sum(len(b.drawings) for b in by_search[-1].blocks)} figures")
    said = findings.in_words(searches)
    blocks = [*overall, *(block for section in by_search for block in section.blocks)]
    files: list[tuple[str, str | bytes]] = [
        *_table_files(blocks),
        *_figure_files(blocks),
        ("index.html", _page(searches, overall, by_search, said)),
        ("README.md", _readme(searches, overall, by_search, said)),
    ]
    if studied := analysis.comparable(searches):
        files.append(("tables/results.md", findings.results_table(studied)))
    try:
        for folder in ("tables", "figures"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {(error.strerror or '').lower()}") from error
    for name, content in files:
        write_bytes(out / name, content if isinstance(content, bytes) else content.encode())
    say(f"\nreport       {out / 'index.html'}\nin words     {out / 'README.md'}")


def _table_files(blocks: Sequence[Block]) -> Iterator[tuple[str, str]]:
    for table in (table for block in blocks for table in block.tables):
        cells = table.frame.astype(object).map(csv_cell)
        yield f"tables/{table.name}.csv", cells.to_csv(index=False)
        yield f"tables/{table.name}.md", table.markdown() + "\n"


def _figure_files(blocks: Sequence[Block]) -> Iterator[tuple[str, str | bytes]]:
    for drawing in (drawing for block in blocks for drawing in block.drawings):
        yield f"figures/{drawing.name}.svg", drawing.svg
        yield f"figures/{drawing.name}.png", figures.png(drawing.figure)


def _page(
    searches: Sequence[SearchResult],
    overall: Sequence[Block],
    by_search: Sequence[Section],
    said: Sequence[str],
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mnist_lightning", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bold"] = _bold
    return environment.get_template("page.html").render(
        overall=overall,
        sections=by_search,
        findings=said,
        unfinished=[search.name for search in searches if not search.finished],
        counts=counts_text,
        provenance=provenance(),
        origins=[(search.name, search.about["provenance"]) for search in searches],
    )


def _bold(text: str) -> Any:
    """Markdown's **bold** as HTML, the rest escaped."""
    parts = text.split("**")
    return Markup("").join(
        Markup("<strong>{}</strong>").format(part) if i % 2 else escape(part)
        for i, part in enumerate(parts)
    )


def _readme(
    searches: Sequence[SearchResult],
    overall: Sequence[Block],
    by_search: Sequence[Section],
    said: Sequence[str],
) -> str:
    lines = [
        "# What the searches found",
        "",
        "Written by `python -m mnist_lightning report`; all tables and figures are in"
        " [index.html](index.html).",
        "",
    ]
    for search in searches:
        lines.append(f"- `{search.name}`: {search.model}, {counts_text(search)}")
    lines += ["", "## In words", ""]
    lines += [f"- {text}" for text in said]
    for block in overall:
        lines += ["", f"## {block.title}", "", block.text]
        for table in block.tables:
            lines += ["", table.markdown()]
    for section in by_search:
        lines += ["", f"## {section.name}", ""]
        lines += [f"- {name}: {text}" for name, text in section.facts]
        for block in section.blocks:
            small = [table for table in block.tables if "_best" in table.name]
            if block.title == "Test":
                lines += ["", block.text]
            for table in small:
                lines += ["", f"{table.title}:", "", table.markdown()]
    if analysis.comparable(searches):
        lines += ["", "## The study's tables and figures, and their counterparts", ""]
        lines += ["| the study | here |", "|---|---|"]
        lines += [f"| {theirs} | {ours} |" for theirs, ours in COUNTERPARTS]
    return "\n".join(lines) + "\n"
