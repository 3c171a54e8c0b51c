"""ImageNet64 as it is published: downsampled 64x64 batches in npz files, never unpickled.

    train_data_batch_1.npz .. train_data_batch_10.npz, val_data.npz
    data    uint8 [n, 12288]    a row is a picture: its R plane, its G plane, its B plane
    labels, mean                not read

The first `train_rows` pictures of the train batches, counted through all of them in the order of
their numbers, are train, the rest are validation; val_data is test. So a batch must know how many
pictures lie before it: `count_rows` looks at all files before any is read.
"""

import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from tokenize import TokenError
from typing import BinaryIO

import numpy as np

from pipeline.contents import BLOCK_BYTES, Content, Piece, Rejected, cut
from pipeline.errors import CorpusError
from pipeline.images import ROW_BYTES
from pipeline.zips import Member, open_zip

TRAIN_ROWS = 1_200_000

_BATCH = re.compile(r"train_data_batch_([1-9][0-9]?)\.npz")
_TEST = "val_data.npz"
_READ_ROWS = BLOCK_BYTES // ROW_BYTES


class ImageNet64:
    """A row of a batch is a document: 12,288 raster bytes, R, G, B of each pixel.

    A batch that is stored uncompressed is cut at rows; a compressed one is one piece.
    """

    def __init__(self, train_rows: int, first_rows: Mapping[str, int]) -> None:
        self._train_rows = train_rows
        self._first_rows = first_rows

    def pieces(self, file: BinaryIO, file_id: str, size: int, limit: int) -> list[Piece]:
        archive = open_zip(file, file_id)
        member, n_rows = _data(archive, file_id)
        stored = member.compress_type == zipfile.ZIP_STORED
        return cut(n_rows, math.ceil(n_rows * ROW_BYTES / limit) if stored else 1)

    def documents(self, file: BinaryIO, file_id: str, piece: Piece) -> Iterator[Content | Rejected]:
        batch = batch_number(file_id)
        if batch is not None and file_id not in self._first_rows:
            raise ValueError(f"{file_id}: call formats.survey with all files before reading one")
        for row, pixels in enumerate(_read_rows(file, file_id, piece)):
            if batch is None:
                split = "test"
            else:
                number = self._first_rows[file_id] + piece.begin + row
                split = "train" if number < self._train_rows else "validation"
            yield Content(row, split, iter((pixels,)))


def count_rows(files: Sequence[tuple[str, Callable[[], BinaryIO]]]) -> dict[str, int]:
    """How many pictures lie before each train batch, by file id; reads the headers alone.

    Raises `CorpusError` for a file of another name and for train batches that are not 1, 2, ... N.
    """
    batches: dict[int, tuple[str, Callable[[], BinaryIO]]] = {}
    for file_id, open_file in files:
        batch = batch_number(file_id)
        if batch is None:
            continue
        if batch in batches:
            raise CorpusError(
                f"{file_id} and {batches[batch][0]} are both train batch {batch}: leave one out"
            )
        batches[batch] = file_id, open_file
    first_rows, n_rows = {}, 0
    for expected, (batch, (file_id, open_file)) in enumerate(sorted(batches.items()), 1):
        if batch != expected:
            raise CorpusError(
                f"train_data_batch_{expected}.npz is missing before {file_id}: where train ends "
                "goes by the rows of all batches before"
            )
        first_rows[file_id] = n_rows
        with open_file() as file:
            n_rows += _data(open_zip(file, file_id), file_id)[1]
    return first_rows


def batch_number(file_id: str) -> int | None:
    """The number of a train batch; None for the batch of the test split."""
    name = PurePosixPath(file_id).name
    if name == _TEST:
        return None
    match = _BATCH.fullmatch(name)
    if match is None:
        raise CorpusError(
            f"{file_id}: expected train_data_batch_1.npz to train_data_batch_10.npz and {_TEST}: "
            "leave other files out"
        )
    return int(match[1])


def _data(archive: zipfile.ZipFile, file_id: str) -> tuple[zipfile.ZipInfo, int]:
    """The member that holds the pictures, and their number."""
    members = [member for member in archive.filelist if member.filename == "data.npy"]
    if len(members) != 1:
        names = ", ".join(ascii(member.filename) for member in archive.filelist)
        raise CorpusError(f"{file_id}: expected one array 'data', found {names[:500]}")
    member = members[0]
    stream = Member(archive, member, file_id)
    shape, fortran, dtype = _header(stream, file_id)
    # An array of objects would be pickled code; its type is another, so it is never read.
    if dtype != np.uint8 or len(shape) != 2 or shape[1] != ROW_BYTES or fortran:
        raise CorpusError(
            f"{file_id}: data is {dtype} of shape {shape}{' (Fortran order)' if fortran else ''}: "
            f"expected uint8 of shape [n, {ROW_BYTES}]"
        )
    if stream.position + shape[0] * ROW_BYTES != member.file_size:
        raise CorpusError(
            f"{file_id}: data has {member.file_size:,} bytes, not the {shape[0]:,} rows that it "
            "claims: fetch it again"
        )
    return member, shape[0]


def _header(stream: Member, file_id: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"version {version} of its format")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numbers as Python 2 wrote them, 128116L
            return np.lib.format.read_array_header_1_0(stream)
    except (ValueError, SyntaxError, TokenError, TypeError, RecursionError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise CorpusError(f"{file_id}: data.npy is no array ({reason[:200]})") from None


def _read_rows(file: BinaryIO, file_id: str, piece: Piece) -> Iterator[bytes]:
    archive = open_zip(file, file_id)
    member, n_rows = _data(archive, file_id)
    skip = member.file_size - n_rows * ROW_BYTES + piece.begin * ROW_BYTES
    row = piece.begin
    stream = _member_at(archive, member, file, file_id, skip)
    while row < piece.end:
        count = min(_READ_ROWS, piece.end - row)
        data = stream.read(count * ROW_BYTES)
        if len(data) != count * ROW_BYTES:
            raise CorpusError(f"{file_id}: ends in row {row:,} of {n_rows:,}: fetch it again")
        planes = np.frombuffer(data, np.uint8).reshape(count, 3, ROW_BYTES // 3)
        for pixels in np.ascontiguousarray(planes.transpose(0, 2, 1)):
            yield pixels.tobytes()
        row += count


def _member_at(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: BinaryIO, file_id: str, skip: int
) -> Member | BinaryIO:
    """The bytes of a member from `skip` on, without reading those before where it is stored."""
    stream = Member(archive, member, file_id)
    if member.compress_type != zipfile.ZIP_STORED:
        stream.read(skip)
        return stream
    file.seek(member.header_offset)
    header = file.read(30)
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    file.seek(member.header_offset + 30 + names + skip)
    return file
