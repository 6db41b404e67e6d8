"""Images and zips as the tests need them."""

import io
import zipfile
from collections.abc import Mapping
from typing import Any

from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF")
# Of the four quarters of `quarters`, from left to right and from top to bottom.
COLOURS = ((220, 20, 20), (20, 180, 20), (20, 20, 220), (230, 220, 20))


def quarters(width: int = 400, height: int = 300) -> Image.Image:
    """Red and green above, blue and yellow below."""
    image = Image.new("RGB", (2, 2))
    image.putdata(COLOURS)
    return image.resize((width, height), Image.Resampling.NEAREST)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """The colours in the middle of the quarters."""
    plain = image.convert("RGB")
    return [
        plain.getpixel((image.width * x // 4, image.height * y // 4))  # type: ignore[misc]
        for y in (1, 3)
        for x in (1, 3)
    ]


def alike(found: Any, wanted: Any, within: int = 24) -> bool:
    """Whether colours differ by no more than lossy formats make them differ."""
    return all(
        abs(a - b) <= within for one, other in zip(found, wanted, strict=True) for a, b in zip(one, other, strict=True)
    )


def zipped(members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return out.getvalue()


PHOTO = encoded(quarters(), "JPEG")
