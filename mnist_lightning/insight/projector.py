"""The files of TensorBoard's projector: the images as points, where the last layer sees them.

``SummaryWriter.add_embedding`` would write the numbers as text, which takes seconds for wide
layers, and would add the same points again after each session of a training.
"""

import io
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from mnist_lightning.data.module import MNISTDataModule
from mnist_lightning.files import printable, write_bytes, write_text
from mnist_lightning.insight.answers import Answers

CONFIG = "projector_config.pbtxt"  # TensorBoard looks for this name beside the events
_FOLDER = "projector"
_SIDE = 32  # pixels of a thumbnail, at most
_MOST_FEATURES = 4096


def write(run: Path, answers: Answers, data: MNISTDataModule) -> None:
    """Writes features, labels and thumbnails of the images into a run's folder.

    It writes nothing for a network without a linear layer, or with a very wide one.

    Args:
        run: the folder.
        answers: for validation images.
        data: with these images.
    """
    features = answers.features
    if features is None or features.shape[1] > _MOST_FEATURES or len(features) < 2:
        return
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    config = ProjectorConfig()
    embedding = config.embeddings.add()
    embedding.tensor_name = "validation images, input of the last layer"
    embedding.tensor_shape.extend(features.shape)
    embedding.tensor_path = f"{_FOLDER}/features.bytes"
    embedding.metadata_path = f"{_FOLDER}/images.tsv"
    embedding.sprite.image_path = f"{_FOLDER}/sprite.png"
    (run / _FOLDER).mkdir(exist_ok=True)
    write_bytes(run / embedding.tensor_path, features.numpy().astype("<f4").tobytes())
    write_text(run / embedding.metadata_path, _table(answers, data.spec.classes, len(features)))
    content, size = _sprite(answers, data, len(features))
    write_bytes(run / embedding.sprite.image_path, content)
    embedding.sprite.single_image_dim.extend(size)
    write_text(run / CONFIG, str(config))


def _table(answers: Answers, classes: tuple[str, ...], count: int) -> str:
    names = [" ".join(printable(name).split()) for name in classes]
    columns = answers.labels[:count].tolist(), answers.predicted[:count].tolist()
    lines = ["truth\tanswer\tright"]
    for label, found in zip(*columns, strict=True):
        lines.append(f"{names[label]}\t{names[found]}\t{'yes' if label == found else 'no'}")
    return "\n".join(lines) + "\n"


def _sprite(answers: Answers, data: MNISTDataModule, count: int) -> tuple[bytes, tuple[int, int]]:
    """The thumbnails in a square of rows and columns; and their width and height."""
    images = data.val_set.__getitems__(answers.rows[:count].tolist())[0]
    pixels = (images if images.ndim == 4 else images.unsqueeze(1)).float()
    if max(pixels.shape[-2:]) > _SIDE:
        pixels = F.interpolate(pixels, size=(_SIDE, _SIDE), mode="bilinear", antialias=True)
    _, channels, height, width = pixels.shape
    columns = math.ceil(math.sqrt(count))
    sheet = torch.zeros(columns * columns, channels, height, width)
    sheet[:count] = pixels
    square = sheet.reshape(columns, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    square = square.reshape(columns * height, columns * width, channels)
    array = square.clamp(0, 255).round().to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(array[..., 0] if channels == 1 else array).save(file, "PNG", compress_level=3)
    return file.getvalue(), (width, height)
