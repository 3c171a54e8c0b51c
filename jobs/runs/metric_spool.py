"""Metric points on disk between the training, which writes them, and the tracker, which sends them.

Rank 0 of the training writes numbered segments `<run>/metrics/00000001.jsonl`; the driver reads
them in order, sends them and acknowledges each. What is not acknowledged stays, so that neither a
dead driver nor a dead tracking server loses a point.
"""

import json
import re
from typing import NamedTuple

from pipeline.storage import Location, open_store

_SEGMENT = re.compile(r"(\d{8,})\.jsonl")
_UNFINISHED = re.compile(r"\d{8,}\.jsonl\.\w+\.tmp")
_ACKNOWLEDGED = "acknowledged"


class MetricPoint(NamedTuple):
    """The metrics of one update, or of an evaluation after it."""

    step: int
    """The update, counted over the whole training: MLflow's step."""
    tokens: int
    """Unmasked target tokens trained on up to this update."""
    time_ms: int
    """Unix time of the measurement, milliseconds."""
    values: dict[str, float]
    """By metric name, with its unit (`train/loss_nats_per_token`); may be NaN or infinite."""


class Segment(NamedTuple):
    """What could be read of one segment file."""

    points: list[MetricPoint]
    damage: str | None
    """None, or one line that names the file and its first line that is no metric point."""


class MetricSpool:
    """Writer of a spool. One process writes at a time.

    Policy: `append` only fills memory. A segment appears whole under its number, never over another
    one. Numbers go on after the highest that exists or was acknowledged. A flush returns once its
    segment is stored durably.
    """

    def __init__(self, folder: Location) -> None:
        """Opens the spool in `folder`, which need not exist.

        A predecessor's unfinished files are removed: they never were part of the spool.
        """
        self._store = open_store(folder)
        self._pending: list[MetricPoint] = []
        for entry in self._store.list():
            if _UNFINISHED.fullmatch(entry.name):
                self._store.remove(entry.name)
        self._next = last_number(folder) + 1

    def append(self, point: MetricPoint) -> None:
        """Adds a point. The steps of one metric must not decrease within a training."""
        self._pending.append(point)

    def flush(self) -> None:
        """Writes the pending points as the next segment; does nothing if there are none.

        Raises:
            CorpusError: they cannot be stored; they are still pending.
        """
        if not self._pending:
            return
        data = "".join(map(_encode, self._pending)).encode()
        while not self._store.create(f"{self._next:08d}.jsonl", data):
            self._next += 1
        self._next += 1
        self._pending.clear()


def segments(folder: Location) -> list[str]:
    """The names of the segments in `folder`, oldest first. Files of other names are ignored."""
    names = (entry.name for entry in open_store(folder).list())
    return sorted(filter(_SEGMENT.fullmatch, names), key=segment_number)


def segment_number(name: str) -> int:
    """The number of a segment that `segments` named."""
    return int(name.partition(".")[0])


def last_number(folder: Location) -> int:
    """The highest number given so far in `folder`, acknowledged segments included; 0 if none."""
    try:
        acknowledged = int(open_store(folder).read(_ACKNOWLEDGED))
    except (FileNotFoundError, ValueError):
        acknowledged = 0
    return max([acknowledged, *map(segment_number, segments(folder))])


def read_segment(folder: Location, name: str) -> Segment:
    """Reads a segment. Lines that are no metric point are left out and the first is named."""
    points: list[MetricPoint] = []
    damage = None
    store = open_store(folder)
    lines = store.read(name).decode("utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            points.append(_decode(line))
        except (ValueError, TypeError, KeyError, AttributeError):
            where = f"{store.location}/{name}, line {number}"
            damage = damage or f"{where}: not a metric point: {line[:60]!r}"
    if not lines:
        damage = f"{store.location}/{name}: empty, expected at least one metric point"
    return Segment(points, damage)


def acknowledge(folder: Location, name: str, *, damaged: bool = False) -> None:
    """Takes a segment out of the spool, once the tracker has stored its points.

    Its number is noted first, so that a writer that starts later does not give it again. A damaged
    segment is kept beside the spool as `<number>.jsonl.damaged`.
    """
    store = open_store(folder)
    store.write(_ACKNOWLEDGED, str(segment_number(name)).encode())
    if damaged:
        store.write(f"{name}.damaged", store.read(name))
    store.remove(name)


def _encode(point: MetricPoint) -> str:
    # The json module writes and reads NaN, Infinity and -Infinity, but takes no numpy scalars.
    fields = {
        "step": int(point.step),
        "tokens": int(point.tokens),
        "time_ms": int(point.time_ms),
        "values": {name: float(value) for name, value in point.values.items()},
    }
    return json.dumps(fields) + "\n"


def _decode(line: str) -> MetricPoint:
    fields = json.loads(line)
    values = {str(name): float(value) for name, value in fields["values"].items()}
    return MetricPoint(int(fields["step"]), int(fields["tokens"]), int(fields["time_ms"]), values)
