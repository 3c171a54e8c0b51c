"""The training's figures for Prometheus, through Ray's own exporter."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Mapping

from jobs.checkpoints.manifest import complete_checkpoints
from jobs.metric_names import TOKENS_PER_SECOND, TRAIN_LOSS
from jobs.runs.metric_spool import segments
from jobs.runs.run_directory import RunDirectory
from pipeline.errors import CorpusError

log = logging.getLogger("tvq.ray_metrics")

GAUGES = {
    "tvq_progress_update": "Optimizer updates made.",
    "tvq_tokens_per_second": "Unmasked target tokens trained on, on all devices.",
    "tvq_loss_nats_per_token": "Of the last update.",
    "tvq_skipped_updates": "Updates that moved nothing, in the whole training.",
    "tvq_dead_codes": "Codes of a codebook that no key is near any more, mean.",
    "tvq_collapsed_layers": "Layers whose keys share a few codes.",
    "tvq_goodput_fraction": "Share of the time that went into steps.",
    "tvq_upload_lag_seconds": "From the state that was last stored being taken to its commit.",
    "tvq_checkpoint_age_seconds": "Since the state in the newest checkpoint was taken; without one,"
    " since these workers began.",
    "tvq_spool_depth": "Files of metric points that the tracker has not acknowledged.",
}
"""The gauges, as Prometheus has them behind the prefix `ray_` of Ray's exporter; with the tag
`run`."""

_RECORDED = {
    "tvq_progress_update": "update",
    "tvq_tokens_per_second": TOKENS_PER_SECOND,
    "tvq_loss_nats_per_token": TRAIN_LOSS,
    "tvq_skipped_updates": "train/skipped_updates",
    "tvq_dead_codes": "codebook/dead_codes",
    "tvq_collapsed_layers": "codebook/collapsed_layers",
    "tvq_goodput_fraction": "goodput/fraction",
    "tvq_upload_lag_seconds": "checkpoint/upload_lag_seconds",
}


class RayMetrics:
    """Sets the gauges of a run, on rank 0; does nothing outside a Ray session.

    Ray exports them on nodes that have ray[default] installed.

    Policy: a thread looks every `seconds`, at what the recorder noted last and into the run
    directory; the loop never waits for it, and ages grow while the loop hangs.
    """

    def __init__(self, run: RunDirectory, latest: Mapping[str, float], seconds: float = 10.0):
        """`latest`: each metric's last value, which another thread goes on to change."""
        self._run = run
        self._latest = latest
        self._seconds = seconds
        self._began = time.time()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if "ray" in sys.modules:  # whoever is in a session has imported it
            import ray

            if ray.is_initialized():
                self._thread = threading.Thread(target=self._work, name="ray metrics", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Sets the gauges a last time."""
        self._closing.set()
        if self._thread:
            self._thread.join()

    def _work(self) -> None:
        from ray.util.metrics import Gauge

        gauges = {name: Gauge(name, text, ("run",)) for name, text in GAUGES.items()}
        last_round = False
        while not last_round:
            last_round = self._closing.wait(self._seconds)
            for name, value in self._values().items():
                gauges[name].set(value, {"run": self._run.name})

    def _values(self) -> dict[str, float]:
        latest = dict(self._latest)
        values = {name: latest[key] for name, key in _RECORDED.items() if key in latest}
        with contextlib.suppress(CorpusError):  # the store is not well: it may be later
            taken = [manifest.created for manifest in complete_checkpoints(self._run)]
            newest = taken[-1] if taken else self._began
            values["tvq_checkpoint_age_seconds"] = time.time() - newest
            values["tvq_spool_depth"] = len(segments(self._run.metrics))
        return values
