"""Build what a corpus consists of, increment by increment: what is there, what has to be made.

An increment's plan follows from the one before, so a corpus that has grown is rebuilt, mended and
checked in the same way as it was made. Needs no Ray: what runs the tasks is given.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa

from pipeline import records
from pipeline.corpus_folder import plan_folder, read_listing
from pipeline.errors import CorpusError
from pipeline.manifest import Increment, Manifest, read_records
from pipeline.plan import PrepareSettings, mathematical, plan_id
from pipeline.ranges import Range, cut_ranges, shard_bytes_for
from pipeline.scanning import read_scan, scan_name, scan_range
from pipeline.selection import Earlier, Scans, first_rows, select
from pipeline.shards import Shard
from pipeline.shared_files import SharedFiles, make_shared_files, shared_files
from pipeline.sources import SourceFile
from pipeline.storage import open_store
from pipeline.tasks import Tasks
from pipeline.writing import (
    Finished,
    RangeTask,
    is_whole,
    read_sidecar,
    write_range,
)


class BuiltIncrement(NamedTuple):
    """One increment, all of its ranges there."""

    plan_id: str
    ranges: list[Finished]


class Built(NamedTuple):
    """What a corpus consists of."""

    increments: list[BuiltIncrement]
    shared: SharedFiles
    resumed_shards: int
    """Shards that were there."""
    manifest: Manifest | None
    """The one that says all this already, if nothing had to be made."""


class ChangedError(Exception):
    """A file that the corpus was made of is not what it was; says which in one line."""


def increments(
    corpus: str, old: Manifest, files: Sequence[SourceFile]
) -> tuple[list[list[SourceFile]], str | None]:
    """Share the files among the increments of a corpus that is there, and a new one for the rest.

    Where a file of the corpus has gone, all are one increment; then it is also said why. Raises
    `CorpusError` if what the corpus was made of cannot be known any more.
    """
    by_id = {file.id: file for file in files}
    shared, known = [], set()
    listing = read_listing(open_store(corpus), old.plan_id)
    for number, increment in enumerate(old.increments):
        try:
            tables = (read_records(corpus, file) for file in increment.records)
            ids = {name for table in tables for name in table.column("file").unique().to_pylist()}
        except CorpusError as error:
            if number >= len(listing):
                raise CorpusError(
                    f"{corpus}: what it was made of is not known any more ({error}); restore that "
                    "file, or make the corpus anew with --refresh-held-out"
                ) from None
            ids = set(listing[number])  # the records will be made again
        if gone := sorted(ids - by_id.keys()):
            return [list(files)], f"{gone[0]} is no longer there"
        shared.append([by_id[name] for name in sorted(ids)])
        known |= ids
    rest = [file for file in files if file.id not in known]
    return [*shared, rest] if rest or not shared else shared, None


class Builder:
    """Makes what is not there yet of a corpus, in its folder.

    Files that look as they did when the old corpus was made are taken for unchanged, like make and
    git do; all others are read. Nothing that is there is read again but the small files of records.
    """

    def __init__(
        self,
        settings: PrepareSettings,
        corpus: str,
        old: Manifest | None,
        files: Sequence[SourceFile],
        tasks: Tasks,
    ) -> None:
        self._settings, self._corpus, self._store = settings, corpus, open_store(corpus)
        self._tasks = tasks
        self._scan_settings = settings.scan()
        self._identity = mathematical(settings)
        self._old = old if old is not None and old.settings == self._identity else None
        self._unchanged = set()
        if self._old is not None:
            listing = read_listing(self._store, self._old.plan_id)
            known = {name: seen for part in listing for name, seen in part.items()}
            self._unchanged = {f.id for f in files if known.get(f.id) == (f.size, f.version)}
        self._made = self._resumed = 0

    def build(self, parts: Sequence[Sequence[SourceFile]]) -> Built:
        """Build the increments, one of each part of the files, in order.

        Raises `ChangedError` where a part is an increment of the old corpus but no longer what it
        was, and `CorpusError` as `prepare` does.
        """
        built: list[BuiltIncrement] = []
        for number, files in enumerate(parts):
            increment = self._increment(number, files, built)
            if increment is not None:
                built.append(increment)
        is_old = self._old is not None and len(built) == len(self._old.increments)
        return Built(
            built,
            self._shared(plan_folder(built[0].plan_id)),
            self._resumed,
            self._old if is_old and not self._made else None,
        )

    def _increment(
        self, number: int, files: Sequence[SourceFile], before: Sequence[BuiltIncrement]
    ) -> BuiltIncrement | None:
        """One increment; none for new files that hold no record."""
        shard_bytes = self._settings.shard_bytes or shard_bytes_for(sum(f.size for f in files))
        ranges = cut_ranges(files, self._settings.format, shard_bytes)
        old = None
        if self._old is not None and number < len(self._old.increments):
            old = self._old.increments[number]
        contents = self._contents(ranges, old)
        plan = plan_id(self._identity, before[-1].plan_id if before else None, contents)
        if old is not None and plan != old.plan_id:
            raise ChangedError(self._what_changed(ranges, contents, old))
        folder = plan_folder(plan)
        finished = self._finished(folder, len(ranges), old)
        missing = [index for index, range_ in enumerate(finished) if range_ is None]
        self._resumed += sum(len(range_.shards) for range_ in finished if range_ is not None)
        shared = self._shared(plan_folder(before[0].plan_id) if before else folder)
        if missing or not shared.are_there(self._store):
            self._scan(ranges)
            if before and not sum(len(self._scanned(range_)) for range_ in ranges):
                return None
            decided = self._decide(ranges, before)
            make_shared_files(shared, self._settings, decided, self._store, self._tasks)
            self._made += 1
            for index, range_ in self._write([decided[i] for i in missing], folder, shared):
                finished[missing[index]] = range_
        return BuiltIncrement(plan, [range_ for range_ in finished if range_ is not None])

    def _shared(self, folder: str) -> SharedFiles:
        fingerprint = None if self._old is None else self._old.tokenizer.fingerprint
        return shared_files(self._settings, folder, fingerprint)

    # ------------------------------------------------------------ pass 1

    def _contents(self, ranges: Sequence[Range], old: Increment | None) -> list[str]:
        """The digest of what each range holds; reads only what may have changed."""
        known: list[str | None] = [None] * len(ranges)
        if old is not None and len(old.records) == len(ranges):
            for index, (range_, file) in enumerate(zip(ranges, old.records, strict=True)):
                if all(piece.file.id in self._unchanged for piece in range_.pieces):
                    known[index] = file.content
        self._scan([r for r, content in zip(ranges, known, strict=True) if content is None])
        return [
            content or records.content_digest(self._scanned(range_))
            for range_, content in zip(ranges, known, strict=True)
        ]

    def _scan(self, ranges: Sequence[Range]) -> None:
        """Scan the ranges whose result is not there."""
        names = [scan_name(range_, self._scan_settings) for range_ in ranges]
        missing = [i for i, name in enumerate(names) if not self._store.exists(name)]
        payloads = [(self._corpus, names[i], ranges[i], self._scan_settings) for i in missing]
        sizes = [ranges[i].size for i in missing]
        for _ in self._tasks.stage("scan", scan_range, payloads, sizes, count=int):
            pass

    def _scanned(self, range_: Range) -> pa.Table:
        table = read_scan(self._corpus, scan_name(range_, self._scan_settings))
        assert table is not None
        return table

    def _what_changed(
        self, ranges: Sequence[Range], contents: Sequence[str], old: Increment
    ) -> str:
        for range_, content, file in zip(ranges, contents, old.records, strict=False):
            if content == file.content:
                continue
            names = ("file", "row", "sha256")
            try:
                tables = (read_records(self._corpus, file), self._scanned(range_))
            except CorpusError:  # the manifest is an older one, or damage came to the change
                break
            was, is_ = (
                list(zip(*(t.column(n).to_pylist() for n in names), strict=True)) for t in tables
            )
            for one, other in zip(was, is_, strict=False):
                if one != other:
                    return f"{one[0]} has changed"
        return "a file has changed"

    # ------------------------------------------------------------ decisions

    def _decide(self, ranges: Sequence[Range], before: Sequence[BuiltIncrement]) -> list[RangeTask]:
        def scan(index: int) -> pa.Table:
            return self._scanned(ranges[index])

        files = [range_.records for increment in before for range_ in increment.ranges]
        firsts = first_rows(scan, ([p.file.id for p in range_.pieces] for range_ in ranges))
        letters = select(
            Scans(len(ranges), scan, firsts),
            Earlier(
                sum(file.records for file in files),
                lambda: (read_records(self._corpus, file) for file in files),
            ),
            self._settings.near_duplicates,
            self._settings.validation_fraction,
            self._settings.test_fraction,
            frozen=bool(before),
        )
        return [
            RangeTask(
                self._corpus,
                index,
                range_,
                self._scan_settings,
                scan_name(range_, self._scan_settings),
                firsts[index],
                letters[index],
            )
            for index, range_ in enumerate(ranges)
        ]

    # ------------------------------------------------------------ pass 2

    def _finished(self, folder: str, count: int, old: Increment | None) -> list[Finished | None]:
        """The ranges that are there, whole: by the old manifest, else by their sidecars."""
        if self._old is None or old is None:
            return [read_sidecar(self._corpus, folder, index) for index in range(count)]
        shards: dict[str, dict[str, Shard]] = {}
        for split, described in self._old.splits.items():
            for shard in described.shards:
                at = shard.path.rpartition("-")
                shards.setdefault(f"{at[0].rpartition('/')[0]}/{at[2]}", {})[split] = shard
        found: list[Finished | None] = []
        for index, file in enumerate(old.records):
            range_ = Finished(shards.get(f"{folder}/{index:05d}.arrow", {}), file)
            found.append(range_ if is_whole(self._corpus, range_) else None)
        return found

    def _write(
        self, ranges: Sequence[RangeTask], folder: str, shared: SharedFiles
    ) -> Iterator[tuple[int, Finished]]:
        contamination = self._settings.contamination
        payloads = [
            (range_, folder, shared.tokenizer, shared.held_out_index, contamination)
            for range_ in ranges
        ]
        sizes = [range_.range_.size for range_ in ranges]
        return self._tasks.stage("write", write_range, payloads, sizes, _records_of)


def _records_of(range_: Finished) -> int:
    return range_.records.records
