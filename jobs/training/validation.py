"""The evaluation during a training: over the same first windows of each validation split."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jobs.metric_names import EVAL_BITS, EVAL_LOSS
from jobs.recipe import Recipe
from jobs.runs import run_log
from jobs.training.global_batch import GlobalBatch
from jobs.units import bits_per_byte, targets_of
from pipeline.loader import evaluation_batches
from pipeline.mixture import Mixture


class Validation:
    """The loss over the first `training.evaluate_windows` windows, each of their targets once.

    Of a mixture, also each corpus's; in the figures over all of them, a corpus counts by the size
    of its split, as if the whole of it had been covered.
    """

    def __init__(
        self,
        recipe: Recipe,
        mixture: Mixture,
        layout: GlobalBatch,
        evaluate: Callable[[Any, Any], tuple[jax.Array, jax.Array]],
    ):
        """`evaluate` is (state, batch) -> (nats, targets), sums over the global batch."""
        self._recipe = recipe
        self._mixture = mixture
        self._layout = layout
        self._evaluate = evaluate

    def measure(self, state: Any, update: int) -> dict[str, float]:
        """The metrics of the state after `update`; called by every process of the mesh."""
        run_log.event("evaluation start", update=update)
        window, splits = self._recipe.data.window, self._mixture.splits("validation")
        losses = [self._loss(state, corpus.path) for corpus in self._mixture.corpora]
        targets = [targets_of(split, window) for split in splits]
        bits = [
            bits_per_byte(loss, split, window) for loss, split in zip(losses, splits, strict=True)
        ]
        n_bytes = [split.n_bytes for split in splits]
        values = {
            EVAL_LOSS: float(np.average(losses, weights=targets)),
            EVAL_BITS: float(np.average(bits, weights=n_bytes)),
        }
        if len(splits) > 1:
            for corpus, each in zip(self._mixture.corpora, bits, strict=True):
                values[f"eval/{corpus.name}/bits_per_byte"] = each
        run_log.event("evaluation end", update=update)
        return values

    def _loss(self, state: Any, corpus: Any) -> float:
        """Nats per target of one corpus."""
        data, training = self._recipe.data, self._recipe.training
        nats, targets = 0.0, 0
        with contextlib.closing(
            evaluation_batches(
                corpus,
                "validation",
                sequence_length=data.sequence_length,
                window=data.window,
                batch_size=training.batch_size,
                limit_windows=training.evaluate_windows,
                rows=self._layout.rows,
                cache_bytes=data.cache_bytes,
            )
        ) as batches:
            for batch in batches:
                sums = jax.device_get(self._evaluate(state, self._layout.place(batch)))
                nats, targets = nats + float(sums[0]), targets + int(sums[1])
        return nats / targets
