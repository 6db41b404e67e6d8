"""`python -m services.worker.kinds.image_maker FD`: make thumbnails of the images that come on the socket.

One process makes one image at a time; `image_pool` runs as many of them as there are cores. The first frame that comes
holds the orders. Each one after it holds an image, and is answered by one with its thumbnails, or with why there are
none.
"""

import asyncio
import io
import math
import os
import resource
import socket
import sys
import time
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import AvifImagePlugin, ExifTags, Image, ImageCms, UnidentifiedImageError

from services.worker import frames
from services.worker.child import prepare

# Of an image, from its header: no memory is taken for one that claims more.
MAX_PIXELS = 100_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF")
# What EXIF says must be done to an image before it is seen.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)

# Decoders raise beyond twice this, before they take memory; up to there they only warn.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2

Size = tuple[int, int]


class Unreadable(Exception):
    """There are no thumbnails of this image; the message says why."""


@dataclass(frozen=True, slots=True)
class Orders:
    """What to make of every image: a thumbnail to fit each of the boxes, and a cell of the contact sheet.

    `seconds` of a core are what one image may take, `memory` is bytes of address space.
    """

    boxes: Sequence[Size]
    cell: Size
    format: str
    quality: int
    seconds: float
    memory: int


def fit(size: Size, box: Size) -> Size:
    """The largest size of the same ratio that fits the box and is no larger than the image; each side at least 1."""
    scale = min(box[0] / size[0], box[1] / size[1], 1.0)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def make(orders: Orders, data: bytes) -> tuple[dict[str, Any], bytes]:
    """The thumbnails and the raw RGB cell, one after the other, and what they are. Raises Unreadable."""
    read = _read(data, orders)
    thumbnails = [_encode(_thumbnail(read, box), orders) for box in orders.boxes]
    cell = _on_white(_thumbnail(read, orders.cell))
    head = {"thumbnails": [len(each) for each in thumbnails], "cell": cell.size, "animated": read.animated}
    return head, b"".join([*thumbnails, cell.tobytes()])


def unpack(data: bytes, *, deflated: bool, size: int, crc: int | None) -> bytes:
    """An image as it was before it was packed. `crc` is None if it is not from a zip.

    Takes no more memory than `size`. Raises Unreadable if it is not as declared.
    """
    if deflated:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        except zlib.error as error:
            raise Unreadable(f"It cannot be unpacked: {error}.") from None
    if len(data) != size or (crc is not None and zlib.crc32(data) != crc):
        raise Unreadable("It is not what its size and its checksum say; it was damaged, or made to harm.")
    return data


@dataclass(frozen=True, slots=True)
class _Read:
    """The first frame of an image, hardly larger than what is to be made of it, and what its file says of it."""

    pixels: Image.Image
    size: Size
    orientation: int
    animated: bool

    def fit(self, box: Size) -> Size:
        """The size of a thumbnail before it is turned."""
        return fit(self.size, _turned(box, self.orientation))


def _read(data: bytes, orders: Orders) -> _Read:
    """Raises Unreadable for whatever a decoder raises: images come from anyone, broken in every way there is."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # Two pictures in a JPEG of a phone are no animation.
            animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
            size, orientation = image.size, _orientation(image)
            made = [fit(size, _turned(box, orientation)) for box in (*orders.boxes, orders.cell)]
            # Twice as large leaves the last step of a resize what it needs to look as if it were the only one.
            width, height = (2 * max(sides) for sides in zip(*made, strict=True))
            image.draft(None, (width, height))
            image.load()
            plain, factor = _plain(image), min(image.width // width, image.height // height)
            return _Read(plain.reduce(factor) if factor > 1 else plain, size, orientation, animated)
    except UnidentifiedImageError:
        if data.startswith(b"PK\x03\x04"):
            raise Unreadable("It is a zip in a zip; unpack it first.") from None
        raise Unreadable("It is not an image in PNG, JPEG, WebP, GIF or AVIF, or its header is damaged.") from None
    except Image.DecompressionBombError:
        raise Unreadable(f"It has more than {MAX_PIXELS:,} pixels.") from None
    except MemoryError:
        raise Unreadable("It needs more memory than an image may take.") from None
    except Exception as error:
        said = "".join(filter(str.isprintable, str(error)))
        raise Unreadable(f"It cannot be decoded: {type(error).__name__}: {said}"[:200]) from None


def _turned(box: Size, orientation: int) -> Size:
    return (box[1], box[0]) if orientation in SIDEWAYS else box


def _orientation(image: Image.Image) -> int:
    """1 to 8. An image whose EXIF cannot be read is an image still, and stands as it is."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return found if isinstance(found, int) and found in TURNS else 1


def _plain(image: Image.Image) -> Image.Image:
    """The image in a mode that can be resized: L, RGB, RGBA or CMYK."""
    if image.mode.startswith("I"):
        # 16 bits a pixel: to convert would cut off all above 255.
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _thumbnail(read: _Read, box: Size) -> Image.Image:
    """As it is to be seen, in sRGB, and without anything but its pixels."""
    small = read.pixels.resize(read.fit(box), Image.Resampling.LANCZOS, reducing_gap=2.0)
    small = _in_srgb(small, read.pixels.info.get("icc_profile"))
    if read.orientation in TURNS:
        small = small.transpose(TURNS[read.orientation])
    small.info = {}
    return small


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours by the profile; one that is damaged or for another kind of image says nothing, as in a browser."""
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    if profile:
        with suppress(ImageCms.PyCMSError, OSError, ValueError):
            return ImageCms.applyTransform(image, _transform(profile, image.mode, mode)) or image
    return image.convert("RGB") if image.mode == "CMYK" else image


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str, to: str) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(io.BytesIO(profile), ImageCms.createProfile("sRGB"), mode, to)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def _encode(image: Image.Image, orders: Orders) -> bytes:
    out = io.BytesIO()
    match orders.format:
        case "jpeg":
            opaque = image if image.mode == "L" else _on_white(image)
            opaque.save(out, "JPEG", quality=orders.quality)
        case "png":
            image.save(out, "PNG")
        case "webp":
            image.save(out, "WEBP", quality=orders.quality)
        case "avif":
            image.save(out, "AVIF", quality=orders.quality)
    return out.getvalue()


async def work(connection: socket.socket) -> None:
    """Answer until the other side is gone."""
    reader, writer = await asyncio.open_connection(sock=connection, limit=frames.PIECE)
    with suppress(EOFError, ConnectionError):
        orders = Orders(**(await frames.receive(reader))[0])
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (orders.memory, orders.memory))
        frames.send(writer, {})
        while True:
            head, data = await frames.receive(reader)
            _allow(orders.seconds)
            try:
                answer = make(orders, unpack(data, **head))
            except Unreadable as error:
                answer = {"reason": str(error)}, b""
            frames.send(writer, *answer)
            await writer.drain()


def _allow(seconds: float) -> None:
    """Have SIGXCPU end the process when the next image takes more; decoders cannot be interrupted otherwise."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds), hard))


def _settle() -> None:
    """Let warnings and damaged images disturb nobody, and the worker's own processes go first."""
    warnings.simplefilter("ignore")
    # The other cores have images of their own.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    os.nice(5)
    # What SIGXCPU would leave of the pixels.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    prepare()
    _settle()
    connection = socket.socket(fileno=int(sys.argv[1]))
    asyncio.run(work(connection))


if __name__ == "__main__":
    main()
