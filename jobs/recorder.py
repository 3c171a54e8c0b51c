"""From what the compiled steps return to metric points in the spool."""

import logging
import time
from collections.abc import Callable

import jax
import numpy as np

from jobs.metric_spool import MetricPoint, MetricSpool
from model.training import UpdateMetrics

log = logging.getLogger("tvq.recorder")


class Recorder:
    """Turns update metrics into points, one batch late, so that fetching never waits for a step.

    Policy: `updates` fetches the batch handed in before; `flush` fetches the last one and writes
    the spool, and is called before every checkpoint. Every process counts, rank 0 (which has the
    spool) writes.
    """

    def __init__(
        self,
        spool: MetricSpool | None,
        *,
        tokens: int,
        codebooks: bool = True,
        bits_per_byte: Callable[[float], float],
        clock: Callable[[], float] = time.time,
    ):
        """
        Args:
            spool: where the points go; None on all processes but one.
            tokens: unmasked targets that the state has been trained on already.
            codebooks: whether the model has any, whose health is to be recorded.
            bits_per_byte: of a loss of the training split, nats per token.
        """
        self.tokens = tokens
        self._codebooks = codebooks
        self._spool = spool
        self._bits_per_byte = bits_per_byte
        self._clock = clock
        self._pending: tuple[int, UpdateMetrics] | None = None
        self._fetched_at: float | None = None
        self._warned = False

    def updates(self, last_update: int, metrics: UpdateMetrics) -> None:
        """Takes a batch's metrics, arrays [T/U] still being computed, ending at `last_update`."""
        self._fetch()
        self._pending = (last_update, metrics)

    def evaluation(self, update: int, measure: Callable[[], dict[str, float]]) -> None:
        """Runs an evaluation after `update` and records its figures.

        Its time is neither the last batch's nor the next one's.
        """
        self._fetch()
        self._append(update, measure())
        self._fetched_at = self._clock()

    def flush(self) -> None:
        """Everything handed in so far is on disk afterwards."""
        self._fetch()
        if self._spool:
            self._spool.flush()

    def _fetch(self) -> None:
        if self._pending is None:
            return
        last_update, arrays = self._pending
        self._pending = None
        metrics = jax.device_get(arrays)
        now, before = self._clock(), self._fetched_at
        self._fetched_at = now
        n_updates = len(metrics.loss)
        batch_tokens = int(np.sum(metrics.tokens))
        for i in range(n_updates):
            self.tokens += int(metrics.tokens[i])
            if not (metrics.finite[i] or self._warned):
                self._warned = True
                log.warning(
                    "update %d: loss or gradient is not finite; it and the rest of its batch are"
                    " skipped, and so are later ones (train/skipped_updates counts them)",
                    last_update - n_updates + 1 + i,
                )
            values = {
                "train/loss_nats_per_token": float(metrics.loss[i]),
                "train/bits_per_byte": self._bits_per_byte(float(metrics.loss[i])),
                "train/commitment_loss": float(metrics.commitment[i]),
                "train/gradient_norm": float(metrics.gradient_norm[i]),
                "train/learning_rate": float(metrics.learning_rate[i]),
                "train/loss_spike_sigmas": float(metrics.loss_spike_sigmas[i]),
                "train/skipped_updates": int(metrics.skipped_updates[i]),
            }
            if self._codebooks:
                values |= {
                    "codebook/perplexity_codes": float(metrics.codebook_perplexity[i]),
                    "codebook/usage_fraction": float(metrics.codebook_usage[i]),
                    "codebook/relative_error": float(metrics.relative_error[i]),
                    "codebook/dead_codes": float(metrics.dead_codes[i]),
                }
            if before is not None and i == n_updates - 1:
                values["perf/tokens_per_second"] = batch_tokens / max(now - before, 1e-9)
            self._append(last_update - n_updates + 1 + i, values)

    def _append(self, update: int, values: dict[str, float]) -> None:
        if self._spool:
            self._spool.append(
                MetricPoint(update, self.tokens, round(self._clock() * 1000), values)
            )
