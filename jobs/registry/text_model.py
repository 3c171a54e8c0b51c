"""A registered model in this process: scores texts and goes on from prompts.

Needs its folder alone: weights, recipe and tokenizer; neither the run nor the corpus.
"""

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jobs.errors import UserError
from jobs.evaluation.trained_model import TrainedModel
from jobs.units import NATS_PER_BIT
from pipeline.tokenizers import EOS, ImageTokenizer, Tokenizer, make_tokenizer, model_ids, text_of

if TYPE_CHECKING:
    from model.sampling import Filters

WEIGHTS = "weights.safetensors"
RECIPE = "recipe.yaml"
TOKENIZER = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"


class Score(NamedTuple):
    """How likely a text is as the beginning of a document."""

    nats: float
    """Of all its tokens; that it ends there is not counted."""
    tokens: int
    n_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """NaN for an empty text."""
        return self.nats / NATS_PER_BIT / self.n_bytes if self.n_bytes else math.nan


class TextModel:
    """Weights, recipe and tokenizer, verified and ready."""

    def __init__(self, trained: TrainedModel, tokenizer: Tokenizer):
        """Use `TextModel.load`."""
        if isinstance(tokenizer, ImageTokenizer):
            raise UserError("this is a model of pictures, which reads and writes no text")
        self.trained = trained
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> "TextModel":
        """Reads the folder that `write_model` wrote.

        Raises:
            UserError: a file is not what it was, or the model is one of pictures.
        """
        about = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
        file = folder / TOKENIZER_MODEL
        model = file.read_bytes() if file.exists() else None
        tokenizer = make_tokenizer(about["kind"], about["fingerprint"], model)
        return cls(load_weights(folder), tokenizer)

    def score(self, text: bytes) -> Score:
        """Reads a text of any length, every token with its whole past.

        The cache is carried from piece to piece of training.update_length tokens, as in training.
        """
        import jax

        ids = model_ids(self.tokenizer, text)
        recipe = self.trained.recipe
        length = recipe.training.update_length
        n_pieces = -(-len(ids) // length)
        targets = np.zeros(n_pieces * length, np.int32)
        targets[: len(ids)] = ids
        inputs = np.roll(targets, 1)
        inputs[:1] = EOS
        mask = np.arange(len(targets)) < len(ids)
        begin, score = _scorer(recipe.model, len(targets))
        cache, nats = begin(), 0.0
        for piece in np.split(np.arange(len(targets)), n_pieces) if n_pieces else ():
            scores = score(
                self.trained.params,
                self.trained.codebooks,
                cache,
                inputs[None, piece],
                targets[None, piece],
                mask[None, piece],
            )
            cache = scores.cache
            nats += float(np.sum(jax.device_get(scores.nats), dtype=np.float64))
        return Score(nats, len(ids), len(text))

    def generate(
        self, prompts: Sequence[bytes], n_tokens: int, seed: int, filters: "Filters"
    ) -> list[bytes]:
        """What follows each prompt, up to the end of the document or `n_tokens` tokens.

        The same as `tvq sample` writes with the same seed.
        """
        from jobs.evaluation.sample import continuations

        begin = np.array([EOS], np.int32)
        read = [np.append(begin, model_ids(self.tokenizer, p)) if p else begin for p in prompts]
        written = continuations(self.trained, read, n_tokens, seed, filters)
        texts = []
        for ids in written:
            ends = np.flatnonzero(ids == EOS)
            texts.append(text_of(self.tokenizer, ids[: ends[0]] if len(ends) else ids))
        return texts


def write_model(folder: Path, weights: bytes, recipe: str, tokenizer: Tokenizer) -> None:
    """Writes what `TextModel.load` reads into a folder that is there and empty.

    Args:
        weights: the file of `jobs.checkpoints.export`.
    """
    about = {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint}
    (folder / WEIGHTS).write_bytes(weights)
    (folder / RECIPE).write_text(recipe, encoding="utf-8")
    (folder / TOKENIZER).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if tokenizer.model is not None:
        (folder / TOKENIZER_MODEL).write_bytes(tokenizer.model)


def load_weights(folder: Path) -> TrainedModel:
    """The model of a folder, each array's bits held against its sum.

    Raises:
        UserError: an array is not what it was.
    """
    import jax

    from jobs.checkpoints.export import read_network

    network, exported = read_network(folder / WEIGHTS)
    params, codebooks = jax.device_put(tuple(network))
    return TrainedModel(exported.recipe, exported.update, exported.fingerprints, params, codebooks)


@functools.lru_cache(8)
def _scorer(model: Any, capacity: int) -> tuple[Any, Any]:
    """What makes an empty cache, and what scores a piece of one text with it, compiled once."""
    import jax

    from model.scoring import token_scores
    from model.transformer import initial_cache

    return (
        functools.partial(initial_cache, model, 1, capacity),
        jax.jit(functools.partial(token_scores, model)),
    )
