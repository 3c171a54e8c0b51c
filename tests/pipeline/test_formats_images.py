"""Pictures become 64x64 RGB rasters; what does not decode, or is too large, is counted."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline import images
from tests.pipeline.format_reading import texts


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def raster(data: bytes) -> np.ndarray:
    """The one document of a picture, [row, column, channel]."""
    [found] = texts(data, "a.bin", kind="images")
    assert isinstance(found, bytes)
    assert len(found) == 12288
    return np.frombuffer(found, np.uint8).reshape(64, 64, 3)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def test_64_pixels_are_kept_exactly():
    pixels = noise(64, 64)
    for kind, options in (("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(raster(encoded(Image.fromarray(pixels), kind, **options)), pixels)


@pytest.mark.parametrize(("height", "width"), [(128, 256), (256, 128), (192, 192), (64, 320)])
def test_the_centre_square_is_averaged(height, width):
    """By hand: crop the middle, then the mean of each block of pixels."""
    pixels = noise(height, width)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side].astype(float)
    n = side // 64
    mean = square.reshape(64, n, 64, n, 3).mean(axis=(1, 3))
    assert np.abs(raster(encoded(Image.fromarray(pixels))) - mean).max() <= 1


def test_small_and_narrow_pictures():
    pixels = noise(2, 2)
    assert np.array_equal(
        raster(encoded(Image.fromarray(pixels))), pixels.repeat(32, 0).repeat(32, 1)
    )
    strip = Image.new("RGB", (60_000, 1), (1, 2, 3))
    assert np.array_equal(raster(encoded(strip)), np.full((64, 64, 3), (1, 2, 3)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_are_made(kind, orientation):
    """Quadrants of four greys, stored turned, come out upright."""
    upright = np.zeros((128, 128, 3), np.uint8)
    upright[:64, 64:], upright[64:, :64], upright[64:, 64:] = 80, 160, 240
    undo = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo(upright)))
    found = raster(encoded(stored, kind, exif=exif, quality=95))[[8, 8, 56, 56], [8, 56, 8, 56], 0]
    assert np.abs(found.astype(int) - [0, 80, 160, 240]).max() <= 4


def test_transparent_pixels_lie_on_white():
    pixels = noise(64, 64, 4)
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        found = raster(encoded(Image.fromarray(pixels), kind, **options))
        assert np.abs(found - expected).max() <= 1
    # What hides under full transparency does not shine through when pixels are averaged.
    hidden = np.zeros((128, 128, 4), np.uint8)
    hidden[::2] = (200, 0, 0, 255)
    assert np.abs(raster(encoded(Image.fromarray(hidden))) - (227.5, 127.5, 127.5)).max() <= 1


def test_other_modes_become_rgb():
    grey = noise(64, 64, 1)[..., 0]
    as_rgb = grey[..., None].repeat(3, -1)
    assert np.array_equal(raster(encoded(Image.fromarray(grey))), as_rgb)
    deep = (grey.astype(np.uint16) << 8) + 7
    assert np.array_equal(raster(encoded(Image.fromarray(deep))), as_rgb)
    keyed = encoded(Image.fromarray(grey), transparency=7)
    assert np.array_equal(raster(keyed), np.where(as_rgb == 7, 255, as_rgb))
    bits = Image.fromarray(grey > 127)
    assert np.array_equal(raster(encoded(bits)), np.where(as_rgb > 127, 255, 0))
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    assert np.array_equal(raster(encoded(palette)), np.full((64, 64, 3), (10, 20, 30)))
    assert np.array_equal(
        raster(encoded(palette, transparency=b"\xff\x00")), np.full((64, 64, 3), 255)
    )
    cmyk = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    assert np.abs(raster(encoded(cmyk, "JPEG")).astype(int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_first_frame_counts(kind):
    frames = [Image.new("RGB", (64, 64), color) for color in ((250, 0, 0), (0, 250, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(raster(data), np.full((64, 64, 3), (250, 0, 0)))


PICTURE = encoded(Image.fromarray(noise(40, 50)), "JPEG")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"\x89PNG\r\n\x1a\n",
        PICTURE[:300],
        PICTURE[: len(PICTURE) // 2],
        encoded(Image.fromarray(noise(64, 64)))[:-2000],
        encoded(Image.new("RGB", (64, 64)), "GIF"),
        encoded(Image.new("RGB", (64, 64)), "TIFF"),
    ],
)
def test_what_does_not_decode_is_counted(data):
    assert texts(data, "a.png", kind="images") == [images.UNDECODABLE]


@given(st.data())
def test_garbage_never_raises(data):
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]))
    picture = bytearray(encoded(Image.fromarray(noise(20, 30)), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, min(len(picture) - 1, 200)))
        picture[at] = data.draw(st.integers(0, 255))
    [found] = texts(bytes(picture), "a", kind="images")
    assert found in (images.UNDECODABLE, images.TOO_MANY_PIXELS) or len(found) == 12288


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and whose pixels are few."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def webp(width: int, height: int) -> bytes:
    """A WebP whose extended header claims a canvas."""
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4)
    body += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    ("width", "height"), [(40_000, 30_000), (10_000, 7_000), (10_000, 10_000), (2**31 - 1, 1)]
)
def test_too_many_pixels_are_counted_and_not_decoded(width, height, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", pytest.fail)
    assert texts(png(width, height), "a.png", kind="images") == [images.TOO_MANY_PIXELS]


def test_the_bound_is_of_pixels_not_of_bytes():
    assert texts(png(2**13, 2**13), "a.png", kind="images") == [images.UNDECODABLE]
    assert texts(png(2**13, 2**13 + 1), "a.png", kind="images") == [images.TOO_MANY_PIXELS]
    assert texts(webp(16_000, 16_000), "a.webp", kind="images")[0] in (
        images.TOO_MANY_PIXELS,
        images.UNDECODABLE,
    )


def test_a_file_that_is_too_long_is_not_opened(monkeypatch):
    monkeypatch.setattr(images, "FILE_BYTES", 100)
    assert texts(PICTURE, "a.jpg", kind="images") == [images.TOO_LONG]
