"""The contact sheet: what the network saw, with its answers."""

import io

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

MOST = 200  # images on a sheet
_SIDE, _LINE, _GAP, _COLUMNS = 112, 14, 8, 10  # pixels, and images in a row


class ContactSheet:
    """Small pictures in rows, each with lines of text under it."""

    def __init__(self) -> None:
        self._cells: list[Image.Image] = []

    @property
    def is_full(self) -> bool:
        return len(self._cells) == MOST

    def add(self, image: Tensor, *lines: str) -> None:
        """Adds an image with pixels from 0 to 1, ``(channels, height, width)``."""
        picture = to_pil_image(image.clamp(0, 1)).convert("RGB")
        factor = _SIDE // max(picture.size)
        if factor > 1:  # small images are enlarged, so that their pixels can be seen
            size = picture.width * factor, picture.height * factor
            picture = picture.resize(size, Image.Resampling.NEAREST)
        picture.thumbnail((_SIDE, _SIDE))
        cell = Image.new("RGB", (_SIDE, _SIDE + _LINE * len(lines)), "white")
        cell.paste(picture, ((_SIDE - picture.width) // 2, 0))
        draw, font = ImageDraw.Draw(cell), ImageFont.load_default()
        for number, line in enumerate(lines):
            text = line.encode("latin-1", "replace").decode("latin-1")  # what the font has
            while font.getlength(text) > _SIDE:
                text = text[:-1]
            draw.text((0, _SIDE + _LINE * number), text, "black", font)
        self._cells.append(cell)

    def png(self) -> bytes:
        """The sheet of one image or more, as the content of a PNG file."""
        columns = min(_COLUMNS, len(self._cells))
        rows = -(-len(self._cells) // columns)
        width, height = (side + _GAP for side in self._cells[0].size)
        sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
        for number, cell in enumerate(self._cells):
            row, column = divmod(number, columns)
            sheet.paste(cell, (_GAP + column * width, _GAP + row * height))
        file = io.BytesIO()
        sheet.save(file, "PNG")
        return file.getvalue()
