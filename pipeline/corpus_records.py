"""The records of a whole corpus, one file of them at a time."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.manifest import Manifest, RecordsFile, read_records
from pipeline.storage import Location


class RangeRecords(NamedTuple):
    """What became of the records of one range."""

    increment: int
    """From 0."""
    file: RecordsFile
    table: pa.Table
    """As `records.with_fates` makes it."""


def corpus_records(corpus: Location, manifest: Manifest) -> Iterator[RangeRecords]:
    """All records files in order, checked; none of a corpus of format 1.

    Raises `CorpusError` naming one that is missing or damaged.
    """
    for number, increment in enumerate(manifest.increments):
        for file in increment.records:
            yield RangeRecords(number, file, read_records(corpus, file))


def shard_path(file: RecordsFile, split: str) -> str:
    """Where the shard lies that has the documents of a split of the range of a records file."""
    folder, _, name = file.path.rpartition("/")
    return f"{folder}/{name.replace('records', split, 1)}"


def rows(table: pa.Table, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """These columns, row by row."""
    # By Python's lists: pyarrow's ways to a filter or to NumPy import pandas (see `arrow_arrays`).
    return zip(*(table.column(name).to_pylist() for name in names), strict=True)


def rows_with(
    table: pa.Table, column: str, value: str | bytes, names: Sequence[str]
) -> Iterator[tuple[Any, ...]]:
    """These columns of the rows whose column has this value."""
    chosen = [found == value for found in table.column(column).to_pylist()]
    return itertools.compress(rows(table, names), chosen)
