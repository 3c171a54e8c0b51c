"""What a model writes while it is trained: `<run>/samples/<update>.txt`, or `.png` of pictures."""

import itertools
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from jobs.evaluation.pictures import pictures_in_a_row
from jobs.evaluation.sample import sample_of
from jobs.recipe import Recipe
from jobs.runs.run_directory import RunDirectory
from jobs.runs.sample_files import SAMPLES
from model.sampling import Filters
from model.sharding import replicated
from pipeline.loader import training_batches
from pipeline.manifest import tokenizer_of
from pipeline.mixture import Mixture
from pipeline.patient_store import patiently
from pipeline.tokenizers import EOS, ImageTokenizer, Tokenizer, text_of

log = logging.getLogger("tvq.samples")

PROMPT_TOKENS = 64
"""Of a prompt, or a window's where that is shorter."""
TOKENS = 256
"""Behind it, at most; a picture has its own number."""
_SEED = 0
"""Of the passages. Not the training's: runs that differ in their seed alone read the same ones."""


class Samples:
    """Goes on from the same prompts with the parameters of the moment.

    Policy: every process of the mesh computes, rank 0 keeps. A thread writes the file, so that no
    step waits for a store; a checkpoint is committed after it (`wait`), so that a kill leaves no
    gap. A state writes the same text however it came about; where an update is made again, its
    first text stays, as its metrics do. What cannot be written is said, and ends no training.
    """

    def __init__(
        self,
        run: RunDirectory,
        recipe: Recipe,
        mixture: Mixture,
        mesh: Mesh,
        compute: Callable[..., jax.Array],
    ):
        """Of a recipe with `training.samples`.

        `compute` is (state, prompts, filters, n_tokens) -> tokens, as `Programs.write`.
        """
        training = recipe.training
        corpus = mixture.corpora[0]  # those of a mixture have one tokenizer
        self._tokenizer = patiently(lambda: tokenizer_of(corpus.path, corpus.manifest), corpus.path)
        self._pictures = isinstance(self._tokenizer, ImageTokenizer)
        self._prompts = np.full((training.samples, 1), EOS, np.int32)  # a picture needs no more
        if not self._pictures:
            self._prompts = patiently(lambda: _passages(recipe, mixture), "the corpus")
        whole = replicated(mesh)
        self._placed = jax.make_array_from_callback(
            self._prompts.shape, whole, self._prompts.__getitem__
        )
        self._compute = compute
        self._name = run.name
        self._store = run.store.child(SAMPLES)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="samples")
        self._written: Future[None] | None = None
        self._every = training.sample_every or training.evaluate_every
        self._steps = training.steps

    def due(self, update: int) -> bool:
        """Whether `write` is to be called after that update."""
        return update == self._steps or update % self._every == 0

    def write(self, state: Any, update: int) -> dict[str, float]:
        """Samples the state after `update`; called by every process of the mesh. What it took."""
        began = time.monotonic()
        tokens = math.prod(ImageTokenizer.shape) if self._pictures else TOKENS
        # As `tvq sample` draws.
        filters = Filters(temperature=0.8, top_p=0.95, ignore_eos=self._pictures)
        ids = jax.device_get(self._compute(state, self._placed, filters=filters, n_tokens=tokens))
        if jax.process_index() == 0:
            self._written = self._pool.submit(self._keep, update, ids)
        return {"perf/sampling_seconds": time.monotonic() - began}

    def wait(self) -> None:
        """Returns once what was written last is stored, or could not be."""
        if self._written:
            self._written.result()

    def close(self) -> None:
        """As `wait`, and ends the thread."""
        self._pool.shutdown()

    def _keep(self, update: int, ids: npt.NDArray[np.int32]) -> None:
        try:
            if isinstance(self._tokenizer, ImageTokenizer):
                name, data = f"{update:08d}.png", pictures_in_a_row(self._tokenizer, list(ids))
            else:
                title = f"{self._name}, update {update:,}"
                text = _page(title, self._tokenizer, self._prompts, ids)
                name, data = f"{update:08d}.txt", text.encode()
            self._store.create(name, data)
        except Exception as error:  # whatever it is, the training and its checkpoints go on
            log.warning("the samples of update %d are not kept: %s", update, error)


def _page(
    title: str,
    tokenizer: Tokenizer,
    prompts: npt.NDArray[np.int32],
    written: npt.NDArray[np.int32],
) -> str:
    """Texts for people: each prompt [P], and below it what was written [N]."""
    parts = [
        f"{title}: {len(written)} texts, each written behind a passage of the validation split"
    ]
    for number, (prompt, ids) in enumerate(zip(prompts, written, strict=True), start=1):
        sample = sample_of(tokenizer, text_of(tokenizer, prompt), ids)
        ended = ", where it ended the document" if sample.ended else ""
        parts += [
            f"===== passage {number} =====\n{sample.prompt}",
            f"===== the model's {sample.tokens} tokens{ended} =====\n{sample.text}",
        ]
    return "\n\n".join(parts) + "\n"


def _passages(recipe: Recipe, mixture: Mixture) -> npt.NDArray[np.int32]:
    """Pieces of the validation split [samples, P], spread over it, with eos before each."""
    least = min(split.tokens for split in mixture.splits("validation"))
    with training_batches(
        mixture,
        "validation",
        sequence_length=min(PROMPT_TOKENS, recipe.data.sequence_length, least),
        batch_size=recipe.training.samples,
        seed=_SEED,
        shuffle_span=1,  # of one shard: of a corpus in a bucket no more is fetched
        prefetch=1,
        cache_bytes=recipe.data.cache_bytes,
    ) as batches:
        rows = (
            row
            for batch in batches
            for row, there in zip(batch.inputs, batch.loss_mask, strict=True)
            if there.all()  # the last window of a split may be shorter
        )
        return np.stack([*itertools.islice(rows, recipe.training.samples)])
