"""Pictures as documents of raster bytes, as ImageNet64 has them: 64x64 pixels of R, G, B."""

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from pipeline.contents import Content, Piece, Rejected

if TYPE_CHECKING:
    from PIL import Image

SIDE = 64
ROW_BYTES = SIDE * SIDE * 3
"""Bytes of one picture: rows from the top, pixels from the left, R, G, B of each."""

PIXELS = 64 * 1024 * 1024
"""The most pixels of a picture that is decoded; at 4 bytes each, 256 MiB."""

FILE_BYTES = 512 * 1024 * 1024
"""The longest file that is decoded; twice what PIXELS take uncompressed."""

TOO_LONG = "image file too long"
TOO_MANY_PIXELS = "too many pixels"
UNDECODABLE = "undecodable image"

_KINDS = ("PNG", "JPEG", "WEBP", "BMP")


class Images:
    """A file is a picture: PNG, JPEG, WebP or BMP, by what is in it, whatever its name.

    The centre square is averaged to 64x64 (a box filter, as ImageNet64 was made; a smaller picture
    is enlarged), which is the short side resized and the long one cropped. The first frame counts,
    EXIF turns are made, transparent pixels lie on white, grey and 16-bit values become 8-bit RGB.
    """

    def pieces(self, file: BinaryIO, file_id: str, size: int, limit: int) -> list[Piece]:
        return [Piece(0, size)]

    def documents(self, file: BinaryIO, file_id: str, piece: Piece) -> Iterator[Content | Rejected]:
        raster = TOO_LONG if piece.end > FILE_BYTES else _decode(file)
        if isinstance(raster, bytes):
            yield Content(None, None, iter((raster,)))
        else:
            yield Rejected(None, raster)


def _decode(file: BinaryIO) -> bytes | str:
    """The raster of a picture, or why there is none."""
    from PIL import Image, ImageOps

    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(file, formats=_KINDS) as image:
                if image.width * image.height > PIXELS:
                    return TOO_MANY_PIXELS
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return _raster(image)
        except Image.DecompressionBombError:
            return TOO_MANY_PIXELS
        except OSError as error:
            if error.errno is not None:  # of the file, not of the picture
                raise
            return UNDECODABLE
        except Exception:  # what damaged files make Pillow raise is open-ended
            return UNDECODABLE


def _raster(image: "Image.Image") -> bytes:
    from PIL import Image

    image = _eight_bits(image)
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    # Cropped while it is resized: resizing a strip of 1 x 1,000,000 pixels first would fill memory.
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX, (left, top, left + side, top + side))
    if small.mode == "RGBA":
        white = Image.new("RGBA", small.size, "white")
        small = Image.alpha_composite(white, small)
    return small.convert("RGB").tobytes()


def _eight_bits(image: "Image.Image") -> "Image.Image":
    """The picture as RGB or RGBA."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would clip, not scale
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")
