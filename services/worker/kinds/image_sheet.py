"""The contact sheet: all images of a job on one, in their order, from left to right and from top to bottom."""

import io
import math

from PIL import Image, ImageDraw

# The most pixels on a side of the sheet, and of an image's place on it with its gap: of many images these are smaller.
SIDE = 4000
CELL = 240
GAP = 0.06


class Sheet:
    """Places for so many images. Those that are never shown stay crossed out."""

    def __init__(self, count: int) -> None:
        self._columns = math.ceil(math.sqrt(count))
        self._pitch = min(CELL, SIDE // self._columns)
        gap = max(1, round(self._pitch * GAP))
        self.cell = (self._pitch - gap, self._pitch - gap)
        rows = math.ceil(count / self._columns)
        self._image = Image.new("RGB", (self._columns * self._pitch, rows * self._pitch), "white")
        draw = ImageDraw.Draw(self._image)
        for index in range(count):
            left, top = self._place(index, self.cell)
            right, bottom = left + self.cell[0] - 1, top + self.cell[1] - 1
            draw.rectangle((left, top, right, bottom), outline="silver")
            draw.line((left, top, right, bottom), fill="silver")
            draw.line((left, bottom, right, top), fill="silver")

    def show(self, index: int, size: tuple[int, int], pixels: bytes) -> None:
        """Put an image into its place: raw RGB, no larger than `cell`."""
        left, top = self._place(index, self.cell)
        self._image.paste("white", (left, top, left + self.cell[0], top + self.cell[1]))
        self._image.paste(Image.frombytes("RGB", size, pixels), self._place(index, size))

    def as_jpeg(self) -> bytes:
        out = io.BytesIO()
        self._image.save(out, "JPEG", quality=85)
        return out.getvalue()

    def _place(self, index: int, size: tuple[int, int]) -> tuple[int, int]:
        """Left and top of an image of this size, in the middle of its place."""
        row, column = divmod(index, self._columns)
        return (
            column * self._pitch + (self._pitch - size[0]) // 2,
            row * self._pitch + (self._pitch - size[1]) // 2,
        )
