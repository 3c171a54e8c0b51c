"""The training loop's metric spool: written by a thread, so that no update waits for storage."""

import logging
import threading
import time

from jobs.runs.metric_spool import MetricPoint, MetricSpool
from pipeline.errors import CorpusError, PassingFaultError
from pipeline.storage import Location

log = logging.getLogger("tvq.metrics")


class BackgroundSpool(MetricSpool):
    """A `MetricSpool` whose caller never waits.

    Policy: `append` and `flush` only hand over; a thread writes within `flush_seconds`, or at once
    after a `flush`. So a kill loses at most the last second of points, all of them later than the
    last checkpoint, and the resumed training repeats those updates. What cannot be stored is kept
    in memory and tried again every `flush_seconds`; an outage is said once. `wait` is for who must
    know that the points are stored: the commit of the checkpoint whose state they lead to, and the
    end of the training.
    """

    def __init__(self, folder: Location, flush_seconds: float = 1.0) -> None:
        super().__init__(folder)
        self._flush_seconds = flush_seconds
        self._handed_over: list[MetricPoint] = []
        self._lock = threading.Lock()  # of _handed_over
        self._writing = threading.Lock()
        self._wanted, self._closing = threading.Event(), threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._write_all, name="spool", daemon=True)
        self._thread.start()

    def append(self, point: MetricPoint) -> None:
        with self._lock:
            self._handed_over.append(point)

    def flush(self) -> None:
        self._wanted.set()

    def wait(self) -> None:
        """Returns once everything handed over so far is stored.

        Raises:
            CorpusError: it cannot be stored now; it is still tried.
        """
        with self._writing:
            with self._lock:
                points, self._handed_over = self._handed_over, []
            for point in points:
                super().append(point)
            super().flush()

    def close(self, limit_s: float = 600.0) -> None:
        """Stores what is left and ends the thread; waits for an outage to pass, within the limit.

        Raises:
            CorpusError: it cannot be stored.
        """
        self._closing.set()
        self._wanted.set()
        self._thread.join()
        deadline = time.monotonic() + limit_s
        while True:
            try:
                return self.wait()
            except PassingFaultError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(self._flush_seconds)

    def _write_all(self) -> None:
        while not self._closing.is_set():
            self._wanted.wait(self._flush_seconds)
            self._wanted.clear()
            try:
                self.wait()
                self._failing = False
            except CorpusError as error:
                if not self._failing:
                    log.warning("metrics cannot be stored for now, training goes on: %s", error)
                self._failing = True
                self._closing.wait(self._flush_seconds)
