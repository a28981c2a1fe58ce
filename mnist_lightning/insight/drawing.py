"""The drawings: arrays in, a Pillow image out. They need neither PyTorch nor matplotlib."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mnist_lightning.files import printable

INK, MUTED, PAPER, RULE = (28, 30, 36), (112, 116, 128), (255, 255, 255), (222, 224, 230)
BLUE, RED = (23, 92, 170), (196, 48, 43)
MARGIN = 16
TILE, CAPTION = 96, 190  # pixels of an image and of its caption, at most
MOST_BARS = 30  # classes with a bar each


def shade(color: tuple[int, int, int], strength: float) -> tuple[int, int, int]:
    """A colour between white (0) and the full colour (1)."""
    part = min(1.0, max(0.0, strength))
    return tuple(round(255 + (c - 255) * part) for c in color)  # type: ignore[return-value]


class ConfusionMatrix:
    """The confusion matrix: a row for each true class, a column for each answer.

    Correct answers are blue, by their share of the row. Mistakes are red, relative to the largest
    share of a mistake.

    Args:
        counts: ``counts[label][predicted]``, numbers of images.
        classes: the names of the classes.
    """

    def __init__(self, counts: np.ndarray, classes: Sequence[str]) -> None:
        self.counts, self.classes = np.asarray(counts), list(classes)
        self.side = max(8, min(46, 720 // len(self.classes)))
        longest = max(_width(_short(name, 120), 12) for name in self.classes)
        self.left = MARGIN + 22 + (math.ceil(longest) + 8 if self.side >= 12 else 0)
        self.top = 78

    def cell(self, label: int, predicted: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of a cell in the picture."""
        x, y = self.left + predicted * self.side, self.top + label * self.side
        return x, y, x + self.side - 2, y + self.side - 2

    def color(self, label: int, predicted: int) -> tuple[int, int, int]:
        """The colour of a cell."""
        shares = self.counts / np.maximum(1, self.counts.sum(1, keepdims=True))
        if label == predicted:
            return shade(BLUE, 0.85 * shares[label, label])
        wrong = shares - np.diag(shares.diagonal())
        return shade(RED, 0.85 * shares[label, predicted] / max(wrong.max(), 1e-9))

    def draw(self) -> Image.Image:
        n = len(self.classes)
        bottom = self.top + n * self.side
        names_below = min(120, max(_width(_short(name, 120), 12) for name in self.classes))
        upright = names_below > self.side - 4
        below = 0 if self.side < 12 else (names_below if upright else 16)
        width = max(self.left + n * self.side + MARGIN, 420)
        total, correct = int(self.counts.sum()), int(self.counts.trace())
        image, draw = _canvas(
            (width, bottom + below + 40),
            "Confusion matrix",
            f"{correct:,} of {total:,} images are right, {correct / max(1, total):.2%}",
        )
        for label in range(n):
            for predicted in range(n):
                box, color = self.cell(label, predicted), self.color(label, predicted)
                draw.rectangle(box, fill=color)
                count = int(self.counts[label, predicted])
                if count and self.side >= 26:
                    center = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                    ink = PAPER if sum(color) < 440 else INK
                    draw.text(center, str(count), ink, _font(12), anchor="mm")
        if self.side >= 12:
            for index, name in enumerate(self.classes):
                text, (x, y, *_) = _short(name, 120), self.cell(index, index)
                middle = self.side / 2 - 1
                draw.text((self.left - 8, y + middle), text, INK, _font(12), anchor="rm")
                if upright:
                    _paste_upright(image, text, (x + middle, bottom + 4))
                else:
                    draw.text((x + middle, bottom + 4), text, INK, _font(12), anchor="mt")
        draw.text(
            (self.left + n * self.side / 2, bottom + below + 24),
            "answer",
            MUTED,
            _font(13),
            anchor="mm",
        )
        _paste_upright(image, "truth", (MARGIN + 6, self.top + n * self.side / 2 - 18), MUTED)
        return image


def tiles(
    images: np.ndarray,
    captions: Sequence[str],
    title: str,
    note: str = "",
    columns: int = 8,
    colors: Sequence[tuple[int, int, int]] = (),
) -> Image.Image:
    """Images side by side, row by row, each with a caption below.

    Args:
        images: uint8, ``(n, height, width)`` or ``(n, height, width, 3)``. Small ones are enlarged,
            large ones reduced.
        captions: one for each image; none, or as many as there are images.
        title: above them.
        note: a second line, smaller.
        columns: images in a row.
        colors: a colour for each caption; by default all are dark.
    """
    largest = max(images.shape[1:3])
    # by a whole number, so that all pixels stay equally large
    factor = max(1, TILE // largest) if largest <= TILE else TILE / largest
    height, width = (max(1, round(side * factor)) for side in images.shape[1:3])
    way = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BILINEAR
    below, gap = (20 if captions else 0), 10
    longest = max((_width(_short(text, CAPTION), 12) for text in captions), default=0)
    wide = max(width, math.ceil(longest))
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    size = (
        max(2 * MARGIN + columns * (wide + gap) - gap, 420),
        68 + rows * (height + below + gap) + MARGIN - gap,
    )
    image, draw = _canvas(size, title, note)
    for index, pixels in enumerate(images):
        x = MARGIN + index % columns * (wide + gap)
        y = 68 + index // columns * (height + below + gap)
        tile = Image.fromarray(pixels).resize((width, height), way)
        image.paste(tile, (x + (wide - width) // 2, y))
        if captions:
            color = colors[index] if colors else INK
            text = _short(captions[index], CAPTION)
            draw.text((x + wide / 2, y + height + 4), text, color, _font(12), anchor="mt")
    return image


def class_accuracy(classes: Sequence[str], correct: np.ndarray, images: np.ndarray) -> Image.Image:
    """A bar for each class; of more than 30 classes, the 30 with the lowest accuracy.

    Args:
        classes: their names.
        correct: correct answers of each class.
        images: images of each class.
    """
    accuracy = correct / np.maximum(1, images)
    order = [index for index in range(len(classes)) if images[index]]
    note = ""
    if len(order) > MOST_BARS:
        order = sorted(order, key=lambda index: accuracy[index])[:MOST_BARS]
        note = f"the {MOST_BARS} lowest of {len(classes)} classes"
    names = [_short(classes[index], 180) for index in order]
    left = MARGIN + max([_width(name, 12) for name in names], default=0) + 10
    # most of a good model's bars would look alike if they began at 0
    lowest = min([accuracy[index] for index in order], default=0)
    start = max(0.0, math.floor(lowest * 10 - 0.5) / 10)
    note = " · ".join([note] * bool(note) + [f"the axis starts at {start:.0%}"] * bool(start))
    length = 360
    image, draw = _canvas((left + length + 150, 72 + 24 * len(order)), "Accuracy by class", note)
    for row, index in enumerate(order):
        y = 64 + 24 * row
        part = (accuracy[index] - start) / max(1e-9, 1 - start)
        draw.text((left - 8, y + 9), names[row], INK, _font(12), anchor="rm")
        draw.rectangle((left, y, left + length, y + 17), fill=shade(MUTED, 0.12))
        draw.rectangle((left, y, left + round(length * part), y + 17), fill=BLUE)
        text = f"{accuracy[index]:.2%}   {correct[index]:,} of {images[index]:,}"
        draw.text((left + length + 8, y + 9), text, INK, _font(12), anchor="lm")
    return image


def reliability(confidence: np.ndarray, accuracy: np.ndarray, counts: np.ndarray) -> Image.Image:
    """The reliability diagram: how often answers of a confidence are right.

    Args:
        confidence: mean confidence of each of the bins of equal width.
        accuracy: share of correct answers in each.
        counts: number of images in each.
    """
    total = max(1, int(counts.sum()))
    error = float((counts * np.abs(confidence - accuracy)).sum() / total)
    side, share, left, top = 400, 80, 64, 70
    image, draw = _canvas(
        (left + side + MARGIN + 8, top + side + share + 76),
        "Reliability",
        f"{total:,} images, expected calibration error {error:.4f} ({len(counts)} bins)",
    )
    for tick in range(0, 101, 20):
        x, y = left + side * tick // 100, top + side - side * tick // 100
        draw.line((left, y, left + side, y), fill=RULE)
        draw.text((left - 6, y), f"{tick}%", MUTED, _font(11), anchor="rm")
        draw.text((x, top + side + share + 18), f"{tick}%", MUTED, _font(11), anchor="mt")
    width = side / len(counts)
    for index, count in enumerate(counts):
        if not count:
            continue
        x0, x1 = round(left + index * width) + 1, round(left + (index + 1) * width) - 1
        height, goal = side * accuracy[index], side * confidence[index]
        draw.rectangle((x0, top + side - height, x1, top + side), fill=BLUE)
        low, high = sorted((height, goal))
        gap = (x0, top + side - high, x1, top + side - low)
        if high - low >= 1:
            draw.rectangle(gap, fill=shade(RED, 0.35), outline=RED)
        bar = max(1, round((share - 10) * count / counts.max()))
        base = top + side + share + 10
        draw.rectangle((x0, base - bar, x1, base), fill=shade(MUTED, 0.6))
    draw.line((left, top + side, left + side, top), fill=INK)
    foot = top + side + share + 44
    text = "confidence (gray: how many images); red: the gap to the accuracy"
    draw.text((left + side / 2, foot), text, MUTED, _font(12), anchor="mm")
    _paste_upright(image, "accuracy", (MARGIN, top + side / 2 - 28), MUTED)
    return image


def weight_tiles(weights: np.ndarray) -> np.ndarray:
    """Weights as colours: blue is positive, red negative, white zero, by one scale for all.

    Args:
        weights: ``(n, channels, height, width)``. Three channels are shown as red, green and blue
            around gray, each tile by its own scale.

    Returns:
        uint8, ``(n, height, width, 3)``.
    """
    weights = weights.astype(np.float32)
    if weights.shape[1] == 3:
        largest = np.abs(weights).max((1, 2, 3), keepdims=True)
        pixels = 0.5 + 0.5 * weights / np.maximum(largest, 1e-12)
        return (pixels.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
    values = weights.mean(1)
    # a few large weights would leave all others white
    largest = max(float(np.quantile(np.abs(values), 0.995)), 1e-12)
    part = np.clip(values / largest, -1, 1)[..., None]
    colors = np.where(part > 0, np.array(BLUE), np.array(RED))
    return (255 + (colors - 255) * np.abs(part)).round().astype(np.uint8)


def overlay(images: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Images with a heat map over them, red where it is 1.

    Args:
        images: uint8, ``(n, height, width, 3)``.
        heat: from 0 to 1, ``(n, height, width)``.

    Returns:
        uint8, ``(n, height, width, 3)``.
    """
    part = 0.7 * heat[..., None]
    return (images * (1 - part) + np.array((255, 60, 20)) * part).round().astype(np.uint8)


def _canvas(
    size: tuple[float, float], title: str, note: str = ""
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    least = 2 * MARGIN + max(_width(title, 18), _width(note, 12))
    width, height = math.ceil(max(size[0], least)), math.ceil(size[1])
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), title, INK, _font(18), anchor="lt")
    draw.text((MARGIN, MARGIN + 26), note, MUTED, _font(12), anchor="lt")
    return image, draw


def _paste_upright(
    image: Image.Image,
    text: str,
    place: tuple[float, float],
    color: tuple[int, int, int] = INK,
) -> None:
    """Text that reads from below to above; ``place`` is the middle of its upper end."""
    size = math.ceil(_width(text, 12)) + 2, 18
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).text((1, 9), text, 255, _font(12), anchor="lm")
    mask = mask.transpose(Image.Transpose.ROTATE_90)
    image.paste(color, (round(place[0] - mask.width / 2), round(place[1])), mask)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _width(text: str, size: int) -> float:
    return _font(size).getlength(text)


def _short(text: str, width: float) -> str:
    """The text on one line, cut to a width in pixels."""
    text = printable(text).replace("\n", " ")
    if _width(text, 12) <= width:
        return text
    while text and _width(f"{text}...", 12) > width:
        text = text[:-1]
    return f"{text}..."
