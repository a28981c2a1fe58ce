"""``python -m mnist_lightning predict --ckpt_path RUN PATH...``: answers for the user's images."""

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from mnist_lightning.console import command, say, short
from mnist_lightning.data.preparation import prepare
from mnist_lightning.deploy import pictures, sheet
from mnist_lightning.deploy.options import make_parser, parse
from mnist_lightning.deploy.trained import Trained
from mnist_lightning.files import csv_cell, printable, reason, write_bytes, write_text
from mnist_lightning.models.inspection import format_table
from mnist_lightning.runs.folder import RunFolder

_AT_ONCE = 64  # images, so that large ones fit into memory
_SHOWN = 20  # lines of the table on the screen
_LIKELIEST = 3


class Answer(NamedTuple):
    """The answer for one image."""

    image: str
    probabilities: dict[str, float]
    """Of all classes, in their order."""

    @property
    def likeliest(self) -> list[tuple[str, float]]:
        """The classes with the highest probabilities."""
        ranked = sorted(self.probabilities.items(), key=lambda pair: -pair[1])
        return ranked[:_LIKELIEST]


def main(argv: Sequence[str]) -> int:
    """Labels images.

    Args:
        argv: the options, ``--``, and the paths.

    Returns:
        0, or 1 if a path led to no image, or an image could not be read; the others are labelled.

    Raises:
        ValueError: an option is wrong, the checkpoint cannot be used, or a file cannot be written.
    """
    given = _parse(argv)
    trained = Trained(given.ckpt_path, given.model, given.trust)
    target = given.out or (None if given.json else RunFolder.of(trained.path).path)
    if target is not None:
        _make_writable(target)
    refused = []

    def refuse(message: str) -> None:
        refused.append(message)
        print(f"error: {printable(message)}", file=sys.stderr)

    answers, contact = [], sheet.ContactSheet()
    for answer in _answers(trained, given.paths, contact, refuse):
        answers.append(answer)
        if given.json:
            print(_as_json(answer), flush=True)
    if answers and not given.json:
        say(_as_table(answers))
    if answers and target is not None:
        _write(target, answers, contact, quiet=given.json)
    return 1 if refused else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(
        "predict",
        """Label images. The screen shows the three likeliest classes of each;
predictions.csv has the probabilities of all, and predictions.png shows what the network saw.""",
        epilog=f"""Exit code: 0, or 1 if an image could not be read; the others are labelled.

Without PATH, Lightning's Trainer labels the validation images, or those of --data.predict_dir.
The options of that:  {command("predict", "--help", "--config", "shallow")}""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help=f"an image, a folder of images, or {pictures.STDIN} for one from standard input",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write (default: the folder of the run)"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print a line of JSON for each image, and nothing else; files only with --out",
    )
    given = parse(
        parser,
        argv,
        "with a PATH it has --out, --json, --model, --trust. Options of the data and the Trainer"
        " are for predict without PATH",
    )
    if not given.paths:
        raise ValueError("predict: which images? Give files, folders, or - for standard input")
    return given


def _make_writable(folder: Path) -> None:
    """Makes the folder if it is missing; refuses one that cannot be written, before the work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it is read-only")
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written: {reason(error)}. Give another folder: --out DIR"
        ) from error


def _answers(
    trained: Trained,
    paths: Sequence[str],
    contact: sheet.ContactSheet,
    refuse: Callable[[str], None],
) -> Iterator[Answer]:
    """Reads and labels the images, and puts the first ones on the contact sheet."""
    spec = trained.spec

    def readable() -> Iterator[tuple[str, torch.Tensor]]:
        for name in pictures.find(paths, refuse):
            try:
                yield name, pictures.read(name, spec)
            except ValueError as error:
                refuse(str(error))

    images = readable()
    while batch := list(islice(images, _AT_ONCE)):
        pixels = torch.stack([image for _, image in batch])
        probabilities = trained.probabilities(pixels)
        classes = trained.classes(probabilities.shape[1])
        seen = prepare(pixels, spec.unnormalised())
        rows = zip(batch, probabilities.tolist(), seen, strict=True)
        for (name, _), row, image in rows:
            answer = Answer(name, dict(zip(classes, row, strict=True)))
            if not contact.is_full:
                best, probability = answer.likeliest[0]
                contact.add(image, f"{printable(best)}: {probability:.2f}", Path(name).name)
            yield answer


def _as_json(answer: Answer) -> str:
    (predicted, probability), *_ = answer.likeliest
    return json.dumps(
        {
            "image": answer.image,
            "predicted": predicted,
            "probability": _rounded(probability),
            "probabilities": {k: _rounded(p) for k, p in answer.probabilities.items()},
        }
    )


def _as_table(answers: list[Answer]) -> str:
    ranks = min(_LIKELIEST, len(answers[0].probabilities))
    header = ("image", "likeliest", "second", "third")[: 1 + ranks]
    rows = [
        (printable(a.image), *(f"{printable(name)} {p:.4f}" for name, p in a.likeliest))
        for a in answers[:_SHOWN]
    ]
    text = format_table(header, rows)
    more = len(answers) - _SHOWN
    return f"{text}\n... and {more:,} more" if more > 0 else text


def _write(folder: Path, answers: list[Answer], contact: sheet.ContactSheet, quiet: bool) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    classes = [f"p({printable(name)})" for name in answers[0].probabilities]
    writer.writerow(["image", "predicted", "probability", *classes])
    for answer in answers:
        (predicted, probability), *_ = answer.likeliest
        names = [csv_cell(printable(cell)) for cell in (answer.image, predicted)]
        numbers = [probability, *answer.probabilities.values()]
        writer.writerow([*names, *map(_rounded, numbers)])
    table, drawing = folder / "predictions.csv", folder / "predictions.png"
    write_text(table, text.getvalue())
    write_bytes(drawing, contact.png())
    if not quiet:
        part = f", the first {sheet.MOST} of {len(answers):,}" if len(answers) > sheet.MOST else ""
        say(f"\nall probabilities     {short(table)}")
        say(f"what the network saw  {short(drawing)}{part}")


def _rounded(probability: float) -> float:
    return float(f"{probability:.6g}")
