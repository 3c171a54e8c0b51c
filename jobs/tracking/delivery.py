"""Sends what the tracker stores, in order, to a store that may be slow, down or back in an hour.

Knows nothing of MLflow: `jobs/tracking/mlflow_run.py` gives it the destination.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

from jobs.metric_names import TRAIN_TOKENS
from jobs.runs.metric_spool import (
    MetricPoint,
    acknowledge,
    last_number,
    read_segment,
    segment_number,
    segments,
)
from pipeline.errors import CorpusError
from pipeline.storage import Location, is_url

_POLL_SECONDS = 0.5
_POLL_STORE_SECONDS = 2.0
"""In an object store, where each look is a request that is paid for."""
_LONGEST_PAUSE_SECONDS = 60.0
_MEASUREMENTS_PER_CALL = 1000


class Measurement(NamedTuple):
    """One value of one metric."""

    name: str
    value: float
    time_ms: int
    step: int


class Refusal(Exception):  # noqa: N818 (it is an answer, not a failure to answer)
    """The destination answered that it will never take this; sending it again is no use."""


class Destination(Protocol):
    """A store. Any exception but Refusal means: not now, try again."""

    name: str
    """For messages; holds no credentials."""

    def open(self) -> dict[str, int]:
        """Finds or creates what is sent to; returns the highest step stored, by metric name."""
        ...

    def send(self, measurements: list[Measurement]) -> dict[str, str]:
        """Stores up to 1000 measurements; returns the metric names it refuses, with the reason."""
        ...

    def end(self, status: str) -> None:
        """Marks the training as ended."""
        ...


class Delivery:
    """Sends queued operations and the points of a metric spool.

    Policy. Operations are queued in memory, metric points lie in the spool on disk. One thread
    sends both, another hands new points to the console whether the destination answers or not. A
    destination that fails is tried again after 1, 2, 4 ... 60 s for as long as the training lasts;
    each outage is said in one line when it begins and one when it ends. What is refused for good
    is said and dropped. Points that `finish` could not send stay in the spool.

    No point twice: for each metric only steps above the highest one that the destination holds are
    sent (asked once when it opens, advanced with every acknowledged call). So the updates that a
    resumed training repeats leave no overlap, and since the spool is flushed before each
    checkpoint commit, no gap.

    Order: segments by number; an operation goes after every segment that existed when it was
    queued, so that what refers to metrics finds them stored.
    """

    def __init__(self, destination: Destination, say: Callable[[str], None]) -> None:
        """`say` gets the one-line messages, from any thread."""
        self._destination = destination
        self._say = say
        self._operations: deque[tuple[str, int, Callable[[], None]]] = deque()
        self._marks: dict[str, int] = {}
        self._refused: set[str] = set()
        self._folder: Location | None = None
        self._shown = 0
        self._unread = False
        self._opened = threading.Event()
        self._viewer: threading.Thread | None = None
        self._viewer_ends = threading.Event()
        self._sender = threading.Thread(target=self._send_all, name="tvq-tracking", daemon=True)
        self._closing = threading.Event()
        self._status = ""
        self._deadline = 0.0
        self._outage = ""
        self._complete = False

    def start(self) -> None:
        """Begins to send."""
        self._sender.start()

    def wait_until_open(self, timeout_s: float) -> bool:
        """Whether the destination has been opened; waits for it, unless nothing is being sent."""
        return self._opened.wait(timeout_s if self._sender.is_alive() else 0.0)

    def queue(self, what: str, send: Callable[[], None]) -> None:
        """Queues an operation; `what` names it in messages."""
        after = last_number(self._folder) if self._folder else 0
        self._operations.append((what, after, send))

    def attach(self, folder: Location, on_points: Callable[[list[MetricPoint]], None]) -> None:
        """Takes the points of the spool in `folder`, which need not exist yet, from now on.

        `on_points` is called from a thread, within 0.5 s of a flush, also with points that an
        earlier process left unsent.
        """
        self._folder = folder
        self._viewer = threading.Thread(
            target=self._show_all, args=(folder, on_points), name="tvq-metrics", daemon=True
        )
        self._viewer.start()

    def detach(self) -> None:
        """No more points will come: returns once all of them were given to `on_points`."""
        self._viewer_ends.set()
        if self._viewer is not None:
            self._viewer.join(timeout=10.0)

    def finish(self, status: str, limit_s: float) -> bool:
        """Sends what is left, ends with `status`; returns whether all was sent within `limit_s`.

        If the destination answers but an operation still fails at the limit, it is ended all the
        same.
        """
        self.detach()
        self._status = status
        self._deadline = time.monotonic() + limit_s
        self._closing.set()
        if self._sender.is_alive():
            self._sender.join(timeout=limit_s + 5.0)
        if not self._complete:
            kept = f"; metrics wait in {self._folder} for the next start of this run"
            left = kept if self._points_left() else ""
            self._say(f"not everything reached {self._destination.name}{left}")
        return self._complete

    def _show_all(self, folder: Location, on_points: Callable[[list[MetricPoint]], None]) -> None:
        last_round = False
        while not last_round:
            last_round = self._viewer_ends.wait(_poll_seconds(folder))
            try:
                self._show_new(folder, on_points)
            except CorpusError as error:  # what is missing is shown once the store is well
                if not self._unread:
                    self._unread = True
                    self._say(f"metrics cannot be read for now ({error})")

    def _show_new(self, folder: Location, on_points: Callable[[list[MetricPoint]], None]) -> None:
        for name in segments(folder):
            if segment_number(name) <= self._shown:
                continue
            try:
                points = read_segment(folder, name).points
            except FileNotFoundError:
                continue  # acknowledged since it was listed
            self._unread = False
            try:
                on_points(points)
            except Exception as error:
                self._say(f"metrics in {folder}/{name} could not be shown ({error})")
            self._shown = segment_number(name)

    def _send_all(self) -> None:
        pause = 0.0
        while True:
            last_round = self._closing.is_set()  # Asked before: what came until then is sent now.
            if self._tried(self._send_what_there_is):
                pause = 0.0
            else:
                pause = min(max(1.0, 2 * pause), _LONGEST_PAUSE_SECONDS)
            if not last_round:
                self._closing.wait(pause or _poll_seconds(self._folder))
                continue
            left_s = self._deadline - time.monotonic()
            if not pause and not self._left():
                self._complete = self._tried(lambda: self._destination.end(self._status))
            elif left_s <= 0 and self._opened.is_set():
                self._tried(lambda: self._destination.end(self._status))
            if self._complete or left_s <= 0:
                return
            time.sleep(min(pause or 1.0, 2.0, left_s))

    def _left(self) -> bool:
        return bool(self._operations) or self._points_left()

    def _points_left(self) -> bool:
        """Whether points are, or may be where the spool's store does not say."""
        try:
            return bool(self._folder and segments(self._folder))
        except CorpusError:
            return True

    def _tried(self, action: Callable[[], None]) -> bool:
        """Whether `action` went through; says when an outage begins and when it ends."""
        try:
            action()
        except Exception as error:
            if not self._outage:
                self._outage = str(error)
                self._say(
                    f"{self._destination.name} does not take what is sent ({error}); training goes"
                    " on, what was measured is kept and sent later"
                )
            return False
        if self._outage:
            self._outage = ""
            self._say(f"{self._destination.name} answers again; nothing is missing")
        return True

    def _send_what_there_is(self) -> None:
        if not self._opened.is_set():
            self._marks = self._destination.open()
            self._opened.set()
        self._send_segments()
        self._send_operations()

    def _send_segments(self) -> None:
        """Sends the segments that were shown, as many to a call as fit."""
        if self._folder is None:
            return
        waiting: list[tuple[str, str | None]] = []
        measurements: list[Measurement] = []
        marks = dict(self._marks)
        for name in segments(self._folder):
            if segment_number(name) > self._shown:
                break
            points, damage = read_segment(self._folder, name)
            measurements += self._new(points, marks)
            waiting.append((name, damage))
            if len(measurements) >= _MEASUREMENTS_PER_CALL:
                self._send_and_acknowledge(measurements, waiting)
                measurements, waiting = [], []
        self._send_and_acknowledge(measurements, waiting)

    def _new(self, points: list[MetricPoint], marks: dict[str, int]) -> list[Measurement]:
        """The measurements not stored yet; moves `marks` past them."""
        new = []
        for point in points:
            for name, value in (*point.values.items(), (TRAIN_TOKENS, float(point.tokens))):
                if point.step > marks.get(name, -1) and name not in self._refused:
                    marks[name] = point.step
                    new.append(Measurement(name, value, point.time_ms, point.step))
        return new

    def _send_and_acknowledge(
        self, measurements: list[Measurement], waiting: list[tuple[str, str | None]]
    ) -> None:
        for begin in range(0, len(measurements), _MEASUREMENTS_PER_CALL):
            chunk = measurements[begin : begin + _MEASUREMENTS_PER_CALL]
            for name, reason in self._destination.send(chunk).items():
                self._refused.add(name)
                self._say(f"metric {name!r} is left out: {reason}")
            self._marks.update((one.name, one.step) for one in chunk)
        for name, damage in waiting:
            assert self._folder is not None, "what waits was read there"
            acknowledge(self._folder, name, damaged=damage is not None)
            if damage:
                self._say(f"{damage}; its other lines are stored, the file is kept as *.damaged")

    def _send_operations(self) -> None:
        while self._operations:
            what, after, send = self._operations[0]
            unsent = segments(self._folder)[:1] if self._folder else []
            if unsent and segment_number(unsent[0]) <= after:
                return  # They came since this round began: in the next one.
            try:
                send()
            except Refusal as refusal:
                self._say(f"{what} is left out: {refusal}")
            self._operations.popleft()


def _poll_seconds(folder: Location | None) -> float:
    in_store = isinstance(folder, str) and is_url(folder)
    return _POLL_STORE_SECONDS if in_store else _POLL_SECONDS
