"""The files of a report on searches or runs: one page, in words, as tables and as figures.

index.html     everything, in one file that needs no other
README.md      the findings and the main tables
tables/        each table as CSV (all digits) and Markdown (rounded, as on the page)
figures/       each figure as PNG and SVG
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from mnist_lightning.console import short
from mnist_lightning.files import csv_cell, write_bytes
from mnist_lightning.provenance import provenance
from mnist_lightning.report import analysis, figures, findings, runs, sections
from mnist_lightning.report.analysis import SearchResult
from mnist_lightning.report.published import COUNTERPARTS
from mnist_lightning.report.sections import Block, Drawing, Section, counts_text


@dataclass(frozen=True)
class Content:
    """What a report says.

    Args:
        title: of the page.
        subject: what it is about, in one line.
        lead: the figure at its top, if there is something to draw.
        sentences: beside that figure; **bold** as in Markdown.
        sections: one for each search or run.
        overall: what is said of all of them together.
        findings: further sentences.
        origins: for each search or run, where its results come from.
        unfinished: names of searches whose trials have not all finished.
        studied: searches that can be compared with the study.
    """

    title: str
    subject: str
    lead: Drawing | None
    sentences: Sequence[str]
    sections: Sequence[Section]
    overall: Sequence[Block]
    findings: Sequence[str]
    origins: Sequence[tuple[str, dict[str, Any]]]
    unfinished: Sequence[str] = ()
    studied: Sequence[SearchResult] = ()

    @property
    def blocks(self) -> list[Block]:
        return [*self.overall, *(block for section in self.sections for block in section.blocks)]

    @property
    def drawings(self) -> list[Drawing]:
        lead = [self.lead] if self.lead else []
        return [*lead, *(drawing for block in self.blocks for drawing in block.drawings)]


def write(folders: Sequence[Path], out: Path, say: Callable[[str], None] = print) -> None:
    """Writes the report on the searches, or on the runs, in some folders.

    Args:
        folders: each the folder of a search or a run, or one that holds several.
        out: the folder to write to; it is made if it is not there.
        say: is called with a line of text for each step.

    Raises:
        ValueError: there is nothing to report on, or there are searches and runs; two searches have
            the same name; a file is damaged; or ``out`` cannot be written.
    """
    _check_writable(out)  # before minutes of work
    found = [runs.run_folders(folder) for folder in folders]
    if any(found) and not all(found):
        raise ValueError("runs and searches have reports of their own: name either of them")
    of_runs = [run for some in found for run in some]
    content = _of_runs(of_runs, say) if of_runs else _of_searches(folders, say)
    files: list[tuple[str, str | bytes]] = [
        *_table_files(content.blocks),
        *_figure_files(content.drawings),
        ("index.html", _page(content)),
        ("README.md", _readme(content)),
    ]
    if content.studied:
        files.append(("tables/results.md", findings.results_table(content.studied)))
    try:
        for folder in ("tables", "figures"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {(error.strerror or '').lower()}") from error
    for name, text in files:
        write_bytes(out / name, text if isinstance(text, bytes) else text.encode())
    say(f"\nreport       {out / 'index.html'}\nin words     {out / 'README.md'}")


def _check_writable(out: Path) -> None:
    """Refuses a folder that cannot be written to, or made."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{out} cannot be written: {short(there)} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{out} cannot be written: permission denied")


def _of_searches(folders: Sequence[Path], say: Callable[[str], None]) -> Content:
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
    return Content(
        "What the search found" if len(searches) == 1 else "What the searches found",
        _subject(searches),
        sections.lead(searches),
        findings.in_short(searches),
        by_search,
        overall,
        findings.in_words(searches),
        [(search.name, search.about["provenance"]) for search in searches],
        [search.name for search in searches if not search.finished],
        analysis.comparable(searches),
    )


def _subject(searches: Sequence[SearchResult]) -> str:
    if len(searches) == 1:
        return f"{searches[0].name}: {searches[0].model}, {counts_text(searches[0])}"
    trials = sum(len(search.complete) for search in searches)
    return f"{len(searches)} searches, {trials:,} finished trials"


def _of_runs(folders: Sequence[Path], say: Callable[[str], None]) -> Content:
    trained = runs.read(folders)
    by_run = [runs.section(run) for run in trained]
    for part in by_run:
        say(f"{part.name}: {part.model}, {part.summary}")
    return Content(
        "What was trained",
        f"{by_run[0].name}: {by_run[0].model}, {by_run[0].summary}"
        if len(by_run) == 1
        else f"{len(by_run)} runs",
        runs.lead(trained),
        runs.in_words(trained),
        by_run,
        runs.overall(trained),
        (),
        [(run.name, run.origins[-1]) for run in trained if run.origins],
    )


def _table_files(blocks: Sequence[Block]) -> Iterator[tuple[str, str]]:
    for table in (table for block in blocks for table in block.tables):
        cells = table.frame.astype(object).map(csv_cell)
        yield f"tables/{table.name}.csv", cells.to_csv(index=False)
        yield f"tables/{table.name}.md", table.markdown() + "\n"


def _figure_files(drawings: Sequence[Drawing]) -> Iterator[tuple[str, str | bytes]]:
    for drawing in drawings:
        yield f"figures/{drawing.name}.svg", drawing.svg
        yield f"figures/{drawing.name}.png", figures.png(drawing.figure)


def _page(content: Content) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mnist_lightning", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bold"] = _bold
    template = environment.get_template("page.html")
    return template.render(content=content, provenance=provenance(), most_rows=sections.MOST_ROWS)


def _bold(text: str) -> Any:
    """Markdown's **bold** as HTML, the rest escaped."""
    parts = text.split("**")
    return Markup("").join(
        Markup("<strong>{}</strong>").format(part) if i % 2 else escape(part)
        for i, part in enumerate(parts)
    )


def _readme(content: Content) -> str:
    lines = [
        f"# {content.title}",
        "",
        "Written by `python -m mnist_lightning report`; all tables and figures are in"
        " [index.html](index.html).",
        "",
    ]
    for section in content.sections:
        lines.append(f"- `{section.name}`: {section.model}, {section.summary}")
    lines += ["", "## In words", ""]
    lines += [f"- {text}" for text in content.findings or content.sentences]
    for block in content.overall:
        lines += ["", f"## {block.title}", "", block.text]
        for table in block.tables:
            lines += ["", table.markdown()]
    for section in content.sections:
        lines += ["", f"## {section.name}", ""]
        lines += [f"- {name}: {text}" for name, text in section.facts]
        for block in section.blocks:
            small = [table for table in block.tables if "_best" in table.name]
            if block.title == "Test":
                lines += ["", block.text]
            for table in small:
                lines += ["", f"{table.title}:", "", table.markdown()]
    if content.studied:
        lines += ["", "## The study's tables and figures, and their counterparts", ""]
        lines += ["| the study | here |", "|---|---|"]
        lines += [f"| {theirs} | {ours} |" for theirs, ours in COUNTERPARTS]
    return "\n".join(lines) + "\n"
