"""What becomes of an image: its size, its turn, its colours, and what is said of one that cannot be read."""

import io
import random
import struct
import tracemalloc
import zlib
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from services.worker.kinds.image_maker import TURNS, Orders, Unreadable, fit, make, unpack
from tests.images import COLOURS, FORMATS, alike, corners, encoded, opened, quarters

SECRET = "taken at home"


def thumbnail(data: bytes, box: tuple[int, int] = (100, 100), format: str = "png") -> Image.Image:
    head, body = make(Orders([box], (30, 30), format, 90, 60, 0), data)
    return opened(body[: head["thumbnails"][0]])


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[ExifTags.Base.Orientation] = orientation
    made[ExifTags.Base.ImageDescription] = SECRET
    return made


sides = st.integers(1, 20_000)


@given(size=st.tuples(sides, sides), box=st.tuples(sides, sides))
def test_a_thumbnail_fits_its_box_keeps_its_ratio_and_never_grows(size: tuple[int, int], box: tuple[int, int]) -> None:
    made = fit(size, box)

    assert all(1 <= side <= most for side, most in zip(made, box, strict=True))
    assert all(side <= most for side, most in zip(made, size, strict=True))
    scale = min(box[0] / size[0], box[1] / size[1], 1)
    assert all(abs(side - most * scale) <= 0.5 or side == 1 for side, most in zip(made, size, strict=True))
    assert made == size or made[0] == box[0] or made[1] == box[1]


@given(width=st.integers(1, 500), height=st.integers(1, 500), box=st.tuples(st.integers(1, 90), st.integers(1, 90)))
@settings(max_examples=50)
def test_what_is_made_has_the_size_that_fits(width: int, height: int, box: tuple[int, int]) -> None:
    data = encoded(quarters(width, height), "JPEG")

    assert thumbnail(data, box).size == fit((width, height), box)


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_is_read_and_its_colours_stay(format: str) -> None:
    made = thumbnail(encoded(quarters(), format))

    assert made.size == (100, 75)
    assert alike(corners(made), COLOURS)


@pytest.mark.parametrize("format", ["jpeg", "png", "webp", "avif"])
def test_each_format_is_made_in_each_size_with_a_cell_of_raw_pixels(format: str) -> None:
    head, body = make(Orders([(200, 50), (40, 40), (800, 800)], (30, 30), format, 90, 60, 0), encoded(quarters()))

    sizes, place = list[tuple[int, int]](), 0
    for length in head["thumbnails"]:
        made = opened(body[place : place + length])
        assert made.format == format.upper()
        assert alike(corners(made), COLOURS)
        sizes.append(made.size)
        place += length
    assert sizes == [(67, 50), (40, 30), (400, 300)]
    cell = Image.frombytes("RGB", head["cell"], body[place:])
    assert cell.size == (30, 22)
    assert alike(corners(cell), COLOURS)


def test_quality_is_what_was_asked_for() -> None:
    data = encoded(Image.effect_noise((400, 400), 90).convert("RGB"))
    for format in ("jpeg", "webp", "avif"):
        low, high = (len(make(Orders([(200, 200)], (30, 30), format, quality, 60, 0), data)[1]) for quality in (10, 95))
        assert low < high / 2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stands_as_its_exif_says(orientation: int, format: str) -> None:
    """The camera has stored it turned; all eight look the same."""
    turned = quarters()
    if orientation in TURNS:
        back = {
            Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
            Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
        }
        turned = turned.transpose(back.get(TURNS[orientation], TURNS[orientation]))

    made = thumbnail(encoded(turned, format, exif=exif(orientation)), (100, 60))

    assert made.size == (80, 60)
    assert alike(corners(made), COLOURS)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation: int) -> None:
    assert alike(corners(thumbnail(encoded(quarters(), "JPEG", exif=exif(orientation)))), COLOURS)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_that_cannot_be_read_turns_nothing() -> None:
    data = encoded(quarters(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")

    assert alike(corners(thumbnail(data)), COLOURS)


@pytest.mark.parametrize("format", ["jpeg", "png", "webp", "avif"])
def test_nothing_but_pixels_is_passed_on(format: str) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", SECRET)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    files = [
        encoded(
            quarters(), "JPEG", exif=exif(6), comment=SECRET, xmp=SECRET.encode(), icc_profile=profile, dpi=(300, 300)
        ),
        encoded(quarters(), "PNG", exif=exif(6), pnginfo=text, icc_profile=profile),
        encoded(quarters(), "WEBP", exif=exif(6), xmp=SECRET.encode(), icc_profile=profile),
    ]
    for data in files:
        assert SECRET.encode() in data
        made = thumbnail(data, format=format)
        _, body = make(Orders([(100, 100)], (30, 30), format, 90, 60, 0), data)
        assert SECRET.encode() not in body
        assert not {"exif", "xmp", "icc_profile", "comment", "Comment", "dpi"} & set(made.info)
        assert not dict(made.getexif())


def test_sixteen_bits_a_pixel_are_scaled_and_not_cut_off() -> None:
    shades = Image.linear_gradient("L").convert("I").point(lambda value: value * 257).convert("I;16")

    made = thumbnail(encoded(shades), (128, 128))

    assert [abs(made.getpixel((64, y)) - 2 * y) <= 3 for y in (1, 30, 64, 100, 126)] == [True] * 5  # type: ignore[operator]


def test_a_cmyk_jpeg_of_a_print_shop_has_its_colours() -> None:
    assert alike(corners(thumbnail(encoded(quarters().convert("CMYK"), "JPEG"))), COLOURS, within=30)


def test_transparency_stays_where_the_format_has_it_and_is_white_else() -> None:
    drawn = quarters().convert("RGBA")
    drawn.paste((0, 0, 0, 0), (0, 0, 200, 150))
    palette = drawn.quantize(16, method=Image.Quantize.FASTOCTREE)
    grey = Image.new("L", (400, 300), 7)
    files = {
        "rgba": encoded(drawn),
        "palette": encoded(palette),
        "gif": encoded(drawn, "GIF"),
        "webp": encoded(drawn, "WEBP"),
        "avif": encoded(drawn, "AVIF"),
        "grey": encoded(grey, transparency=7),
    }
    for name, data in files.items():
        for format in ("png", "webp", "avif"):
            assert thumbnail(data, format=format).convert("RGBA").getpixel((25, 18))[3] < 8, (name, format)  # type: ignore[index]
        assert alike([corners(thumbnail(data, format="jpeg"))[0]], [(255, 255, 255)]), name
    # The edge of what is transparent is not mixed with the black that lies under it.
    edge = thumbnail(files["rgba"], (399, 299))
    assert all(edge.getpixel((x, 100))[0] < 60 for x in range(203, 300))  # type: ignore[index]


def test_colours_are_those_of_the_profile() -> None:
    """One that has red and green the other way round."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"-XYZ", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"-XYZ", b"gXYZ", 1)
    for format in ("JPEG", "PNG", "WEBP"):
        first, second, *_ = corners(thumbnail(encoded(quarters(), format, icc_profile=swapped)))
        assert alike([second, first], COLOURS[:2], within=60), format
    transparent = quarters().convert("RGBA")
    transparent.paste((0, 0, 0, 0), (200, 150, 400, 300))
    made = thumbnail(encoded(transparent, icc_profile=swapped))
    assert made.getpixel((75, 60))[3] == 0  # type: ignore[index]
    assert alike(corners(made)[1::-1], COLOURS[:2], within=60)


def test_a_profile_that_cannot_be_used_says_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

    assert alike(corners(thumbnail(encoded(quarters(), icc_profile=b"no profile"))), COLOURS)
    assert alike(corners(thumbnail(encoded(quarters(), icc_profile=profile[:200]))), COLOURS)
    assert thumbnail(encoded(Image.new("L", (50, 50), 77), icc_profile=profile)).getpixel((5, 5)) == 77


@pytest.mark.parametrize("format", ["GIF", "WEBP", "AVIF", "PNG"])
def test_of_several_frames_the_first_is_taken(format: str) -> None:
    others = [Image.new("RGB", (400, 300), shade) for shade in ("white", "black")]
    data = encoded(quarters(), format, save_all=True, append_images=others, duration=100)

    head, body = make(Orders([(100, 100)], (30, 30), "png", 90, 60, 0), data)

    assert head["animated"]
    assert alike(corners(opened(body[: head["thumbnails"][0]])), COLOURS)


def test_two_pictures_in_a_jpeg_of_a_phone_are_no_animation() -> None:
    data = encoded(quarters(), "MPO", save_all=True, append_images=[quarters(100, 75)])

    head, _ = make(Orders([(100, 100)], (30, 30), "png", 90, 60, 0), data)

    assert not head["animated"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_is_cut_off_is_not_passed_off_as_an_image(format: str) -> None:
    data = encoded(Image.effect_noise((300, 300), 90).convert("RGB"), format)
    for length in (len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(Unreadable):
            thumbnail(data[:length])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "It is not an image in PNG"),
        (b"Dear all,\n", "It is not an image in PNG"),
        (b"PK\x03\x04 and so on", "It is a zip in a zip"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "It is not an image in PNG"),
        (encoded(quarters(), "TIFF"), "It is not an image in PNG"),
        (encoded(quarters(), "BMP"), "It is not an image in PNG"),
    ],
)
def test_what_is_no_image_of_the_five_formats_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        thumbnail(data)


def forged(format: str, width: int, height: int) -> bytes:
    """A small file whose header claims another size."""
    data = bytearray(encoded(quarters(64, 48), format))
    if format == "PNG":
        data[16:24] = struct.pack("!II", width, height)
        data[29:33] = struct.pack("!I", zlib.crc32(data[12:29]))
    elif format == "JPEG":
        place = data.index(b"\xff\xc0")
        data[place + 5 : place + 9] = struct.pack("!HH", height, width)
    elif format == "WEBP":
        place = data.index(b"VP8 ") + 14
        data[place : place + 4] = struct.pack("<HH", width, height)
    elif format == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    else:
        place = data.index(b"ispe") + 8
        data[place : place + 8] = struct.pack("!II", width, height)
    return bytes(data)


@pytest.mark.parametrize("format", FORMATS)
def test_more_pixels_than_are_allowed_are_refused_by_the_header(format: str) -> None:
    with pytest.raises(Unreadable, match="more than 100,000,000 pixels"):
        thumbnail(forged(format, 10_001, 10_001))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_most_pixels_that_are_allowed_are_read() -> None:
    assert thumbnail(encoded(Image.new("1", (20_000, 5000)))).size == (100, 25)


@given(format=st.sampled_from(FORMATS), seed=st.integers(0, 2**32), flips=st.integers(1, 40))
@settings(max_examples=150)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_an_image_or_unreadable_and_nothing_else(format: str, seed: int, flips: int) -> None:
    chance, data = random.Random(seed), bytearray(DAMAGED[format])
    for _ in range(flips):
        data[chance.randrange(len(data))] = chance.randrange(256)
    try:
        assert thumbnail(bytes(data)).width <= 100
    except Unreadable as error:
        assert 10 < len(str(error)) <= 200


DAMAGED = {format: encoded(quarters(64, 48), format) for format in FORMATS}


@given(data=st.binary(max_size=3000), lie=st.integers(-5, 5))
def test_a_member_is_unpacked_exactly_or_not_at_all(data: bytes, lie: int) -> None:
    packing = zlib.compressobj(wbits=-15)
    packed = packing.compress(data) + packing.flush()
    assume(len(data) + lie >= 0)
    says: dict[str, Any] = {"size": len(data) + lie, "crc": zlib.crc32(data)}

    if lie:
        with pytest.raises(Unreadable):
            unpack(packed, deflated=True, **says)
        with pytest.raises(Unreadable):
            unpack(data, deflated=False, **says)
    else:
        assert unpack(packed, deflated=True, **says) == unpack(data, deflated=False, **says) == data
        with pytest.raises(Unreadable):
            unpack(packed, deflated=True, size=len(data), crc=says["crc"] ^ 1)


def test_unpacking_stops_at_the_declared_size() -> None:
    bomb = io.BytesIO()
    packing = zlib.compressobj(wbits=-15)
    for _ in range(50):
        bomb.write(packing.compress(bytes(1 << 20)))
    bomb.write(packing.flush())

    tracemalloc.start()
    try:
        with pytest.raises(Unreadable, match="its size"):
            unpack(bomb.getvalue(), deflated=True, size=1000, crc=0)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
