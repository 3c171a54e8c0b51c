"""From what the compiled steps return to metric points in the spool."""

import logging
import math
import time
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from jobs.metric_names import TOKENS_PER_SECOND, TRAIN_LOSS
from jobs.runs.ledger import Ledger, SkippedBatch, SkippedUpdate
from jobs.runs.metric_spool import MetricPoint, MetricSpool
from jobs.training.codebook_watch import CodebookWatch
from jobs.training.goodput import Goodput
from model.training import UpdateMetrics

log = logging.getLogger("tvq.recorder")


class Recorder:
    """Turns update metrics into points, one batch late, so that fetching never waits for a step.

    Policy: `updates` fetches the batch handed in before; `flush` fetches the last one and writes
    the spool, and is called before every checkpoint. Every process counts, rank 0 (which has the
    spool and the ledger) writes. Updates that were skipped go into the ledger, with a warning for
    each batch.
    """

    def __init__(
        self,
        spool: MetricSpool | None,
        *,
        run: str,
        batch_size: int,
        tokens: int,
        skipped_in_a_row: int = 0,
        ledger: Ledger | None = None,
        documents: Callable[[int], list[str]] = lambda batch: [],
        goodput: Goodput | None = None,
        codebooks: CodebookWatch | None = None,
        bits_per_byte: Callable[[float], float],
        mfu: Callable[[float], float] | None = None,
        clock: Callable[[], float] = time.time,
    ):
        """
        Args:
            spool: where the points go; None on all processes but one.
            run: its name, for messages.
            batch_size: B.
            tokens: unmasked targets that the state has been trained on already.
            skipped_in_a_row: updates skipped since the last that was applied, in the state.
            ledger: where skipped updates go; None as for the spool.
            documents: of the batch of that index, for the ledger.
            goodput: of this group; None: of no interest.
            codebooks: is shown the health of the model's; None: it has none, and none is recorded.
            bits_per_byte: of a loss of the training split, nats per token.
            mfu: of tokens a second, the fraction of what the devices are made for; None: unknown.
        """
        self.tokens = tokens
        self.skipped_in_a_row = skipped_in_a_row
        """As of the last batch that was fetched."""
        self.latest: dict[str, float] = {}
        """Each metric's last value, and `update`."""
        self._run = run
        self._batch_size = batch_size
        self._ledger = ledger
        self._documents = documents
        self._goodput = goodput
        self._mfu = mfu
        self._codebooks = codebooks
        self._spool = spool
        self._bits_per_byte = bits_per_byte
        self._clock = clock
        self._pending: tuple[int, UpdateMetrics] | None = None
        self._fetched_at: float | None = None

    def updates(self, last_update: int, metrics: UpdateMetrics) -> None:
        """Takes a batch's metrics, arrays [T/U] still being computed, ending at `last_update`."""
        self._fetch()
        self._pending = (last_update, metrics)

    def evaluation(self, update: int, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Runs an evaluation after `update`, records its figures and returns them.

        Its time is neither the last batch's nor the next one's.
        """
        self._fetch()
        values = measure()
        self._append(update, values)
        self._fetched_at = self._clock()
        return values

    def figures(self, update: int, values: dict[str, float]) -> None:
        """Records figures that are not the model's, as they stand after `update`."""
        self._append(update, values)

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
        if self._goodput:
            self._goodput.updates_done(n_updates)
        self.skipped_in_a_row = int(metrics.skipped_in_a_row[-1])
        if not np.all(metrics.applied):
            self._note_skipped(last_update, metrics)
        batch_tokens = int(np.sum(metrics.tokens))
        for i in range(n_updates):
            self.tokens += int(metrics.tokens[i])
            values = {
                TRAIN_LOSS: float(metrics.loss[i]),
                "train/bits_per_byte": self._bits_per_byte(float(metrics.loss[i])),
                "train/commitment_loss": float(metrics.commitment[i]),
                "train/gradient_norm": float(metrics.gradient_norm[i]),
                "train/learning_rate": float(metrics.learning_rate[i]),
                "train/loss_spike_sigmas": float(metrics.loss_spike_sigmas[i]),
                "train/skipped_updates": int(metrics.skipped_updates[i]),
            }
            if self._codebooks:
                dead, collapsed = float(metrics.dead_codes[i]), int(metrics.collapsed_layers[i])
                self._codebooks.see(last_update - n_updates + 1 + i, dead, collapsed)
                values |= {
                    "codebook/perplexity_codes": float(metrics.codebook_perplexity[i]),
                    "codebook/usage_fraction": float(metrics.codebook_usage[i]),
                    "codebook/relative_error": float(metrics.relative_error[i]),
                    "codebook/dead_codes": dead,
                    "codebook/collapsed_layers": collapsed,
                }
            if before is not None and i == n_updates - 1:
                rate = batch_tokens / max(now - before, 1e-9)
                values[TOKENS_PER_SECOND] = rate
                if self._mfu:
                    values["perf/mfu"] = self._mfu(rate)
            self._append(last_update - n_updates + 1 + i, values)

    def _note_skipped(self, last_update: int, metrics: UpdateMetrics) -> None:
        n_updates = len(metrics.loss)
        batch = last_update // n_updates - 1
        skipped = [
            SkippedUpdate(
                update=last_update - n_updates + 1 + i,
                loss=float(metrics.loss[i]),
                gradient_norm=float(metrics.gradient_norm[i]),
                sigmas=float(metrics.loss_spike_sigmas[i]),
            )
            for i in range(n_updates)
            if not metrics.applied[i]
        ]
        first = skipped[0]
        if math.isfinite(first.loss) and math.isfinite(first.gradient_norm):
            what = f"its loss {first.loss:.4g} is {first.sigmas:.1f} deviations above the mean"
        else:
            what = f"loss {first.loss:.4g} and gradient norm {first.gradient_norm:.4g}"
        log.warning(
            "batch %d: %d of its %d updates skipped, update %d first: %s;"
            " `tvq inspect --run %s --step %d` shows its documents",
            batch, len(skipped), n_updates, first.update, what, self._run, batch,
        )  # fmt: skip
        if self._ledger:
            rows = batch * self._batch_size, (batch + 1) * self._batch_size - 1
            self._ledger.skipped(
                SkippedBatch(batch, *rows, updates=skipped, documents=[]),
                partial(self._documents, batch),
            )

    def _append(self, update: int, values: dict[str, float]) -> None:
        self.latest.update(values, update=update)
        if self._spool:
            self._spool.append(
                MetricPoint(update, self.tokens, round(self._clock() * 1000), values)
            )
