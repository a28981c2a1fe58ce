"""The pictures of a trained model: as PNG files in the run's folder, and in its TensorBoard."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from PIL import Image
from torch import Tensor

from mnist_lightning.data.module import MNISTDataModule
from mnist_lightning.files import write_bytes
from mnist_lightning.insight import drawing, projector
from mnist_lightning.insight.answers import (
    Answers,
    answer,
    calibration,
    confusion,
    first_weights,
    surest_mistakes,
)
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.models.inspection import sample_sheet
from mnist_lightning.runs.folder import RunFolder

FOLDER = "pictures"
_MOST_CLASSES = 100  # of a confusion matrix that is drawn
WITHOUT_VALIDATION = "pictures show training images and weights: the others need validation images"
_MOST_WEIGHTS = 100  # units or filters
# An answer costs about a third of a training step for an image. With one answer for 50 images that
# were trained on, the pictures take less than 1 % of a long training; and few take no time at all.
_TRAINED_PER_ANSWER = 50
_FEWEST = 2000


def answers_after(trained: int) -> int:
    """How many images are worth an answer after a training.

    Args:
        trained: on so many images, counted in each epoch again.
    """
    return max(_FEWEST, trained // _TRAINED_PER_ANSWER)


def validation_answers(
    model: LightningModule, data: LightningDataModule, most: int | None = None
) -> Answers | None:
    """The answers for validation images; None without any, or for another kind of data or model.

    Args:
        model: of any class.
        data: of any class, after ``setup``.
        most: number of images; by default all.
    """
    if not isinstance(data, MNISTDataModule) or not len(data.val_set):
        return None
    try:
        return answer(model, data, data.val_set, most)
    except Exception:
        if isinstance(model, Classifier):
            raise
        return None  # the forward method of the user's model takes something else


@contextmanager
def with_weights(
    model: LightningModule, weights: Mapping[str, Tensor], device: torch.device
) -> Iterator[None]:
    """Gives a model other weights, on a device; then its own again, where they were."""
    own = {name: value.clone() for name, value in model.state_dict().items()}
    before = model.device
    try:
        model.load_state_dict(weights)
        model.to(device)
        yield
    finally:
        model.to(before)
        model.load_state_dict(own)


def draw(
    model: LightningModule, data: LightningDataModule, answers: Answers | None
) -> Iterator[tuple[str, bytes]]:
    """Draws what can be drawn of a model and its data.

    Args:
        model: of any class.
        data: of any class, after ``setup``.
        answers: for its validation images, if there are any.

    Yields:
        The name of each picture, and the content of its PNG file.
    """
    if not isinstance(data, MNISTDataModule):
        return
    yield "samples", sample_sheet(data)
    weights = first_weights(model, data.spec)
    if weights is not None:
        yield "weights", png(_weights(weights, data.spec.classes))
    if answers is None:
        return
    classes = data.spec.classes
    counts = confusion(answers)
    if len(classes) <= _MOST_CLASSES:
        yield "confusion", png(drawing.ConfusionMatrix(counts, classes).draw())
    yield "classes", png(drawing.class_accuracy(classes, counts.diagonal(), counts.sum(1)))
    yield "reliability", png(drawing.reliability(*calibration(answers)))
    if len(worst := surest_mistakes(answers)):
        yield "mistakes", png(_mistakes(answers, worst, data))


def write(folder: Path, pictures: Mapping[str, bytes]) -> Path:
    """Writes pictures as PNG files into ``pictures/`` of a folder; returns that folder."""
    folder = folder / FOLDER
    folder.mkdir(exist_ok=True)
    for name, content in pictures.items():
        write_bytes(folder / f"{name}.png", content)
    return folder


def write_run(
    run: RunFolder, model: LightningModule, data: LightningDataModule, epoch: int, most: int
) -> None:
    """Writes the pictures of a run, as PNG files and into its TensorBoard.

    Args:
        run: its folder.
        model: with the weights of its best epoch.
        data: after ``setup``.
        epoch: the best one, from 1: the step in TensorBoard.
        most: answers for so many validation images at most.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

    answers = validation_answers(model, data, most)
    pictures = dict(draw(model, data, answers))
    if pictures:
        write(run.path, pictures)
    if answers is not None and isinstance(data, MNISTDataModule):
        projector.write(run.path, answers, data)
    with SummaryWriter(str(run.path)) as writer:
        for name, content in pictures.items():
            width, height = Image.open(io.BytesIO(content)).size
            image = Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=content
            )
            summary = Summary(value=[Summary.Value(tag=f"pictures/{name}", image=image)])
            writer.file_writer.add_summary(summary, epoch)
        for file in (run.config, run.path / "provenance.json"):
            if file.is_file():
                lines = file.read_text().splitlines()
                # four spaces: Markdown shows it as it is
                writer.add_text(file.stem, "\n".join(f"    {line}" for line in lines), epoch)


def png(image: Image.Image) -> bytes:
    """The content of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=3)  # the default takes twice as long, for 10 % less
    return file.getvalue()


def shown(images: Tensor) -> np.ndarray:
    """uint8 images of a set, as ``drawing.tiles`` takes them."""
    pixels = images.numpy()
    if pixels.ndim == 3:
        return pixels
    return pixels[:, 0] if pixels.shape[1] == 1 else pixels.transpose(0, 2, 3, 1)


def _weights(weights: Tensor, classes: tuple[str, ...]) -> Image.Image:
    captions: tuple[str, ...] = ()
    note = "blue: positive, red: negative"
    if weights.shape[1] == 3:
        note = "red, green and blue around gray"
    kind = "filters" if weights.shape[-1] < 12 else "units"
    if kind == "units" and len(weights) == len(classes):
        captions = classes
        title = "First layer: the weights of each class"
    else:
        title = f"First layer: {len(weights):,} {kind}"
    if len(weights) > _MOST_WEIGHTS:
        strongest = weights.flatten(1).norm(dim=1).argsort(descending=True, stable=True)
        weights = weights[strongest[:_MOST_WEIGHTS].sort().values]
        note += f"; the {_MOST_WEIGHTS} largest"
    columns = 5 if captions and len(captions) <= 10 else 10
    return drawing.tiles(drawing.weight_tiles(weights.numpy()), captions, title, note, columns)


def _mistakes(answers: Answers, worst: Tensor, data: MNISTDataModule) -> Image.Image:
    classes = data.spec.classes
    rows = zip(
        *(column[worst].tolist() for column in (answers.labels, answers.predicted)),
        answers.confidence[worst].tolist(),
        strict=True,
    )
    captions = [
        f"{classes[label]} as {classes[found]}  {share:.3f}" for label, found, share in rows
    ]
    wrong = int((answers.predicted != answers.labels).sum())
    images = data.val_set.__getitems__(answers.rows[worst].tolist())[0]
    return drawing.tiles(
        shown(images),
        captions,
        "Mistakes with the highest confidence",
        f"truth as answer, confidence; {len(worst)} of {wrong:,} mistakes in {len(answers.rows):,}"
        " validation images",
    )
