"""Arrow arrays from what lies in memory, and views of them.

By their buffers: `pa.array` and pyarrow's ways to NumPy import pandas, which takes a process 0.3 s
and 16 MiB.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def numbers(kind: pa.DataType, values: npt.NDArray) -> pa.Array:
    """An array of numbers, without nulls: the values where they are."""
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def texts(values: Sequence[bytes]) -> pa.StringArray:
    """An array of strings, given as UTF-8."""
    return pa.StringArray.from_buffers(
        len(values), pa.py_buffer(offsets(values, np.int32)), pa.py_buffer(b"".join(values))
    )


def hashes(values: Sequence[bytes | None], width: int) -> pa.Array:
    """An array of byte strings of one width; None is null."""
    valid = np.array([value is not None for value in values], np.bool_)
    bits = None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
    data = b"".join(bytes(width) if value is None else value for value in values)
    return pa.Array.from_buffers(pa.binary(width), len(values), [bits, pa.py_buffer(data)])


def offsets(values: Sequence[bytes] | Sequence[npt.NDArray], dtype: npt.DTypeLike) -> npt.NDArray:
    """Where each value begins when they are joined, and the end: [values + 1]."""
    found = np.zeros(len(values) + 1, dtype)
    np.cumsum([len(value) for value in values], out=found[1:])
    return found


def view(array: pa.Array, dtype: npt.DTypeLike) -> npt.NDArray:
    """The values of an array of numbers without nulls, where they are."""
    kind = np.dtype(dtype)
    return np.frombuffer(array.buffers()[1], kind, len(array), array.offset * kind.itemsize)


def first_8_bytes(column: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """Of each value of a column of byte strings of one width, without nulls: a copy [rows]."""
    width = column.type.byte_width
    found = [
        np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width)
        for chunk in column.chunks
    ]
    values = [np.ascontiguousarray(each.reshape(-1, width)[:, :8]) for each in found]
    return joined([each.view(np.uint64)[:, 0] for each in values], np.uint64)


def joined(arrays: Sequence[npt.NDArray], dtype: npt.DTypeLike) -> npt.NDArray:
    """One array of all; empty for none."""
    return np.concatenate([np.empty(0, dtype), *arrays])
