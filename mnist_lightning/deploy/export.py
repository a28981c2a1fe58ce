"""``python -m mnist_lightning export --ckpt_path RUN --format onnx``: a file for other programs.

The network in the file takes uint8 images and answers with probabilities. The file is written only
if its answers are those of PyTorch.
"""

import argparse
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mnist_lightning.console import say, short
from mnist_lightning.deploy.formats import FORMATS, Answers, Export
from mnist_lightning.deploy.options import make_parser, parse
from mnist_lightning.files import first_line, write_bytes
from mnist_lightning.quiet import quiet
from mnist_lightning.runs.ensembles import as_one

if TYPE_CHECKING:
    from torch import Tensor

    from mnist_lightning.data.module import MNISTDataModule
    from mnist_lightning.data.sampling import ImageSet
    from mnist_lightning.deploy.trained import Trained

BATCH_SIZES = (1, 7, 64, 256)
_COMPARED = max(BATCH_SIZES)  # images
_TOLERATED = 1e-4  # difference of a probability
_CALIBRATING = 256  # training images, for the ranges of int8
_SCORED = 2000  # images, for the accuracy of int8


class Images(NamedTuple):
    """The images on which a file is compared with PyTorch."""

    what: str
    images: "Tensor"
    data: "MNISTDataModule | None"
    """The data of the run, if they are there."""


def main(argv: Sequence[str]) -> int:
    """``python -m mnist_lightning export --ckpt_path RUN [--format FORMAT] [--out FILE]``.

    Raises:
        ValueError: an option is wrong, the checkpoint cannot be used, the file cannot be written,
            or its answers are not PyTorch's.
        ModuleNotFoundError: a package of the extra ``export`` is missing.
    """
    given = _parse(as_one(argv))
    # PyTorch takes seconds: help and errors do not wait for it
    from mnist_lightning.runs.folder import LOGS, RunFolder, find_checkpoint

    format = FORMATS[given.format]
    checkpoint = find_checkpoint(given.ckpt_path, Path(LOGS))
    name = f"model.int8.{format.ending}" if given.quantize else f"model.{format.ending}"
    target = given.out or RunFolder.of(checkpoint).path / name
    _check_writable(target)
    for package in format.packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(name=package)  # __main__ says how to install it
    from mnist_lightning.deploy.trained import Trained

    with quiet(training=False):
        _export(Trained(str(checkpoint), given.model, given.trust), given, target)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(
        "export",
        "Write a trained network, with the preparation of its images, to a file for"
        " other programs: uint8 images in, probabilities out, any number of images at once. Before"
        " that, its answers are compared with PyTorch's.",
    )
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        default="onnx",
        help="onnx (default), torch (torch.export's), safetensors (the weights alone), or html (a"
        " page on which one draws)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: model.onnx etc. in the folder of the run"
    )
    parser.add_argument(
        "--quantize",
        action="store_true",
        help="for onnx: weights and activations in 8 bits; shows the accuracy before and after",
    )
    given = parse(parser, argv)
    if given.quantize and given.format != "onnx":
        raise ValueError(f"--quantize is for --format onnx, got {given.format}: leave it out")
    return given


def _check_writable(target: Path) -> None:
    """Refuses a file that cannot be written, before the work."""
    fault = None
    if target.is_dir():
        fault = "it is a folder"
    elif not target.parent.is_dir():
        fault = f"there is no folder {target.parent}"
    elif not os.access(target.parent, os.W_OK):
        fault = f"{target.parent} is read-only"
    if fault:
        raise ValueError(f"{target} cannot be written: {fault}. Give another file: --out FILE")


def _export(trained: "Trained", given: argparse.Namespace, target: Path) -> None:
    from mnist_lightning.deploy.network import Network, about
    from mnist_lightning.models import own

    own.check_can("export", trained.model)
    format = FORMATS[given.format]
    compared = _images(trained)
    if given.quantize and compared.data is None:
        raise ValueError("--quantize needs the images of the run, for the ranges of activations")
    reference = trained.probabilities(compared.images)
    network = Network(trained, compared.images)
    classes = trained.classes(reference.shape[1])
    export = Export(trained, network, about(trained, compared.images, classes), compared.images)
    with _without_remarks():
        try:
            content = format.write(export)
        except Exception as error:  # of many kinds, for the many things that a network can do
            raise ValueError(
                f"{trained.name} cannot be written as {given.format}:"
                f" {first_line(error).rstrip('.:')}. Another format may do: --format"
                f" {', '.join(other for other in FORMATS if other != given.format)}"
            ) from error
        answers = format.load(content, export)
    difference = _difference(answers, compared.images, reference)
    if not difference <= _TOLERATED:  # NaN too
        raise ValueError(
            f"{target} was not written: its probabilities differ from PyTorch's by"
            f" {difference:.1e} on {compared.what}, and {_TOLERATED:.0e} is tolerated"
        )
    before = ", before int8," if given.quantize else ""
    lines = [
        f"{export.about['input']}",
        f"{export.about['output']}",
        f"greatest difference from PyTorch{before} on {compared.what}, in batches of"
        f" {', '.join(map(str, BATCH_SIZES))}: {difference:.1e}",
    ]
    if given.quantize and compared.data is not None:
        full, content = content, _quantized(content, compared.data)
        line = _accuracies(answers, format.load(content, export), compared.data)
        lines.append(f"{line}; {_size(content)} instead of {_size(full)}")
    write_bytes(target, content)
    say(f"{short(target)}: {trained.name}, {_size(content)}")
    say("\n".join(f"  {line}" for line in lines))
    say(f"\nhow to use it, in Python:\n\n{format.example(target, export)}")


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Silences what the exporters print, warn and log about their own code."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
            warnings.simplefilter("ignore")
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield
    finally:
        logging.disable(before)


def _images(trained: "Trained") -> Images:
    """Validation images of the run, else training images; random ones if its data are not there."""
    import torch

    try:
        data = trained.data()
    except ValueError as error:
        warnings.warn(
            f"the images of the run cannot be read, random ones take their place:"
            f" {str(error).partition('. ')[0]}",
            stacklevel=1,
        )
        shape = (_COMPARED, trained.spec.channels, *trained.stored_size)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return Images(f"{_COMPARED} random images", images, None)
    part, kind = _known(data)
    images, _ = _spread(part, _COMPARED)
    what = f"{min(_COMPARED, len(part))} {kind} images"
    return Images(what, images, data)


def _known(data: "MNISTDataModule") -> "tuple[ImageSet, str]":
    """The validation images, or the training images of a training without validation."""
    if len(data.val_set):
        return data.val_set, "validation"
    return data.train_set, "training"


def _spread(part: "ImageSet", count: int) -> "tuple[Tensor, Tensor]":
    """Images and labels from all over a set; if it has fewer, some are repeated."""
    rows = [row * len(part) // count for row in range(count)]
    images, labels, *_ = part.__getitems__(rows)
    return images if images.ndim == 4 else images.unsqueeze(1), labels


def _difference(answers: Answers, images: "Tensor", reference: "Tensor") -> float:
    """The greatest difference of a probability, over all batch sizes."""
    differences = []
    for size in BATCH_SIZES:
        found = answers(images[:size])
        differences.append((found - reference[:size]).abs().max())
    return max(map(float, differences), key=lambda value: (value != value, value))


def _quantized(content: bytes, data: "MNISTDataModule") -> bytes:
    from mnist_lightning.deploy.quantization import to_int8

    with _without_remarks():
        return to_int8(content, _spread(data.train_set, _CALIBRATING)[0])


def _accuracies(before: Answers, after: Answers, data: "MNISTDataModule") -> str:
    part, kind = _known(data)
    count = min(_SCORED, len(part))
    images, labels = _spread(part, count)

    def accuracy(answers: Answers) -> float:
        right = 0
        for batch, truth in zip(images.split(_COMPARED), labels.split(_COMPARED), strict=True):
            right += int((answers(batch).argmax(1) == truth).sum())
        return right / count

    return (
        f"int8: accuracy {accuracy(after):.4f} on {count:,} {kind} images, before"
        f" {accuracy(before):.4f}"
    )


def _size(content: bytes) -> str:
    kilobytes = len(content) / 1000
    return f"{kilobytes:.0f} kB" if kilobytes < 1000 else f"{kilobytes / 1000:.1f} MB"
