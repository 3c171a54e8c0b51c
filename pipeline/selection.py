"""Between the passes: which records become documents of which split, and why the others do not.

One letter a record, so that the decisions of a corpus of a hundred million documents fit in
memory; the records themselves are read range by range.
"""

import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import arrow_arrays, records
from pipeline.errors import CorpusError
from pipeline.filters import DUPLICATE, ExactDuplicates
from pipeline.near_duplicates import NearDuplicates, NearDuplicateSettings
from pipeline.splits import SPLITS, assign_splits, place

NEAR_DUPLICATE = "near duplicate"
"""The document is much like one that was kept."""
FROZEN = "held-out splits are frozen"
"""The file names a held-out split of a corpus whose held-out splits were drawn before."""

_REJECTED, _DUPLICATE, _NEAR, _FROZEN = b".dnf"
LETTERS = b"tve"
"""The letter of each of `SPLITS`."""
TRAIN = LETTERS[0]
REASONS = {_DUPLICATE: DUPLICATE, _NEAR: NEAR_DUPLICATE, _FROZEN: FROZEN}
"""Why a record of such a letter is dropped; that of other letters pass 1 has found."""


# Records whose keys are held at a time, 8 bytes each.
_RECORDS_AT_ONCE = 4_000_000


class Scans(NamedTuple):
    """The results of pass 1 for a run of ranges."""

    n_ranges: int
    read: Callable[[int], pa.Table]
    """The records of a range."""
    first_rows: list[list[int]]
    """For each range and piece the number of records of its file that come before."""


class Earlier(NamedTuple):
    """The records of the increments before."""

    n_records: int
    tables: Callable[[], Iterable[pa.Table]]
    """Read anew at each call."""


class Seen:
    """The contents that are in the corpus already: what would be a duplicate.

    Only those are held that may come again, which of most corpora are few; near copies have no hash
    in common, so where they are looked for it is all.
    """

    def __init__(self, near: NearDuplicateSettings | None) -> None:
        self._exact = ExactDuplicates()
        self._near = NearDuplicates(near) if near else None
        self._count = 0

    def judge(self, sha256: bytes, signature: bytes | None) -> int | None:
        """The letter of a duplicate; none for a new content, which counts as seen from now on."""
        if self._exact.is_duplicate(sha256):
            return _DUPLICATE
        if self._near is not None and signature is not None:
            values = np.frombuffer(signature, np.uint32)
            if self._near.first_similar(values) is not None:
                return _NEAR
            self._near.add(self._count, values)
            self._count += 1
        return None

    def add(self, table: pa.Table, again: npt.NDArray[np.bool_]) -> None:
        """Take in those documents of a corpus that is there that may come again."""
        columns = (table.column("split").to_pylist(), table.column("sha256").to_pylist())
        rows = zip(*columns, signatures(table), strict=True)
        for split, sha256, signature in itertools.compress(rows, again):
            if split:
                self.judge(sha256, signature)


class Part(NamedTuple):
    """A share of the contents, by the first 8 bytes of their hashes, their *keys*: so a corpus is
    gone through share by share, in memory that does not grow with it."""

    number: int
    of: int
    repeated: npt.NDArray[np.uint64] | None
    """The keys that more than one record has, sorted; None: to be treated as if all had."""

    def mine(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which [records] are of this part."""
        return keys % self.of == self.number

    def again(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which [records] of this part may have the content of another."""
        if self.repeated is None:
            return self.mine(keys)
        return self.mine(keys) & np.isin(keys, self.repeated)


def _parts(near: bool, scans: Scans, earlier: Earlier, n_records: int) -> Iterator[Part]:
    if near:
        yield Part(0, 1, None)
        return
    count = 1 + n_records // _RECORDS_AT_ONCE
    for number in range(count):
        part = Part(number, count, None)
        tables = itertools.chain(earlier.tables(), map(scans.read, range(scans.n_ranges)))
        found = [keys[part.mine(keys)] for keys in map(_keys, tables)]
        held = arrow_arrays.joined(found, np.uint64)
        del found
        held.sort()
        yield part._replace(repeated=np.unique(held[1:][held[1:] == held[:-1]]))


def _keys(table: pa.Table) -> npt.NDArray[np.uint64]:
    return arrow_arrays.first_8_bytes(table.column("sha256"))


def signatures(table: pa.Table) -> Sequence[bytes | None]:
    """The near-duplicate signature of each record, where there are any."""
    if "signature" not in table.column_names:
        return [None] * len(table)
    return table.column("signature").to_pylist()


def first_rows(
    scans: Callable[[int], pa.Table], pieces: Iterable[Sequence[str]]
) -> list[list[int]]:
    """For each range and piece, how many records of its file come before it.

    `pieces` has for each range the file ids of its pieces, in the order in which they were cut.
    """
    last, records_of_it = "", 0  # the pieces of a file follow one another
    firsts = []
    for index, files in enumerate(pieces):
        counts = np.bincount(scans(index).column("piece").to_pylist(), minlength=len(files))
        firsts.append([])
        for file, count in zip(files, counts.tolist(), strict=True):
            if file != last:
                last, records_of_it = file, 0
            firsts[-1].append(records_of_it)
            records_of_it += count
    return firsts


def select(
    scans: Scans,
    earlier: Earlier,
    near: NearDuplicateSettings | None,
    validation: float,
    test: float,
    *,
    frozen: bool,
) -> list[bytes]:
    """Decide on each record; returns its letters [records] for each range.

    Of documents with one content the first stays, those that the corpus itself names for a
    held-out split before others: so none that is held out is trained on. Then splits are drawn;
    with `frozen` they were drawn before, and every document trains. Raises `CorpusError` if too
    few documents are left.
    """
    letters = [
        bytearray(
            _REJECTED if reason else 0 for reason in scans.read(i).column("reason").to_pylist()
        )
        for i in range(scans.n_ranges)
    ]
    n_records = earlier.n_records + sum(map(len, letters))
    for part in _parts(near is not None, scans, earlier, n_records):
        seen = Seen(near)
        for table in earlier.tables():
            seen.add(table, part.again(_keys(table)))
        for turn in ({"test"}, {"validation"}, {"train", ""}):
            for index in range(scans.n_ranges):
                _judge(scans.read(index), letters[index], seen, part, turn, frozen)
    if frozen:
        return [bytes(range_).replace(b"\0", b"t") for range_ in letters]
    try:
        _draw(scans, letters, validation, test)
        if not any(TRAIN in range_ for range_ in letters):
            raise CorpusError("no document is left to train on after filtering: add documents")
    except CorpusError as error:
        raise CorpusError(f"{error}{_dropped(scans, letters)}") from None
    return [bytes(range_) for range_ in letters]


def _dropped(scans: Scans, letters: list[bytearray]) -> str:
    """How many records were dropped for which reason, to be added to an error."""
    counts = Counter(
        reason or REASONS[letter]
        for index in range(scans.n_ranges)
        for reason, letter in zip(
            scans.read(index).column("reason").to_pylist(), letters[index], strict=True
        )
        if reason or letter in REASONS
    )
    if not counts:
        return ""
    return " (dropped: " + ", ".join(f"{n:,} {reason}" for reason, n in counts.items()) + ")"


def _judge(
    table: pa.Table, letters: bytearray, seen: Seen, part: Part, named: set[str], frozen: bool
) -> None:
    """Find the duplicates among the records of a part whose file names one of these splits."""
    splits = table.column("named_split").to_pylist()
    if named.isdisjoint(splits):
        return
    keys = _keys(table)
    contents = (table.column("sha256").to_pylist(), signatures(table))
    rows = enumerate(zip(splits, *contents, part.again(keys), strict=True))
    for at, (split, sha256, signature, again) in itertools.compress(rows, part.mine(keys)):
        if letters[at] or split not in named:
            continue
        if frozen and split in ("test", "validation"):
            letters[at] = _FROZEN
        elif again and (letter := seen.judge(sha256, signature)):
            letters[at] = letter
        elif split:
            letters[at] = LETTERS[SPLITS.index(split)]


def _draw(scans: Scans, letters: list[bytearray], validation: float, test: float) -> None:
    """Draw the split of each document that nothing names one for."""
    places = array("d")
    for index in range(scans.n_ranges):
        if 0 in letters[index]:
            ids = records.document_ids(scans.read(index), scans.first_rows[index])
            places.extend(place(ids[at]) for at, letter in enumerate(letters[index]) if not letter)
    named = {letter for range_ in letters for letter in range_} & {*LETTERS}
    if named and not places:
        return
    splits = iter(assign_splits(np.frombuffer(places), validation, test))
    for range_ in letters:
        for at, letter in enumerate(range_):
            if not letter:
                range_[at] = LETTERS[int(next(splits))]
