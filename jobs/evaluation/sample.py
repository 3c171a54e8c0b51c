"""`tvq sample`: a run's newest checkpoint writes text."""

import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from jobs.compiler_options import compiler_options
from jobs.console import Console
from jobs.errors import UserError
from jobs.evaluation.pictures import save_pictures
from jobs.evaluation.trained_model import TrainedModel, load_trained_model
from jobs.runs.run_directory import RunDirectory
from pipeline.manifest import Manifest, tokenizer_of
from pipeline.storage import Location
from pipeline.tokenizers import EOS, ImageTokenizer, Tokenizer, model_ids, text_of

if TYPE_CHECKING:
    from model.sampling import Filters


class Sample(NamedTuple):
    """One continuation of one prompt."""

    prompt: str
    text: str
    """What follows the prompt; of a model of pictures, where the picture is."""
    tokens: int
    """Of the text."""
    ended: bool
    """Whether the model ended the document there."""


def sample_command(
    root: Location,
    name: str,
    *,
    prompts: Sequence[str] = (),
    prompts_file: Path | None = None,
    samples: int = 1,
    tokens: int,
    temperature: float,
    top_k: int = 0,
    top_p: float,
    min_p: float = 0.0,
    ignore_eos: bool = False,
    seed: int,
    output: Path | None = None,
    console: Console,
    as_json: bool = False,
) -> list[Sample]:
    """Samples, prints each prompt and what follows it, and returns what it printed.

    The prompts are `prompts`, then the lines of `prompts_file`; without any, the start of a
    document. Each is gone on from `samples` times. A text ends where the model ends the
    document, or after `tokens` tokens. Sample s of prompt p is row p * samples + s, by which it
    draws: whatever else is sampled with it, the same row of the same seed reads the same.

    A model of pictures draws whole ones, from nothing, and writes them into the folder `output`.
    """
    from model.sampling import Filters

    for option, value in (("temperature", temperature), ("top-p", top_p), ("min-p", min_p)):
        if not math.isfinite(value):
            raise UserError(f"--{option}: needs a finite number, got {value}")
    # An argument need not be UTF-8: the model reads it as it was typed.
    typed = [os.fsencode(text) for text in prompts]
    typed += [] if prompts_file is None else _lines(prompts_file)
    typed = [text for text in typed or [b""] for _ in range(samples)]

    run = RunDirectory.existing(root, name)
    trained = load_trained_model(run)
    corpus = trained.mixture().corpora[0].path  # those of a mixture have one tokenizer
    tokenizer = tokenizer_of(corpus, Manifest.load(corpus))
    pictures = isinstance(tokenizer, ImageTokenizer)
    if pictures and any(typed):
        raise UserError(f"--prompt: run {run.name} is a model of pictures, which takes no text")
    if not pictures and output is not None:
        raise UserError(f"--output: run {run.name} writes text, not pictures; leave it out")
    tokens = math.prod(tokenizer.shape) if pictures else tokens
    # Every window that the model was trained on begins with eos.
    begin = np.array([EOS], np.int32)
    read = [np.append(begin, model_ids(tokenizer, text)) if text else begin for text in typed]
    began = time.monotonic()
    written = continuations(
        trained,
        read,
        tokens,
        seed,
        Filters(temperature, top_k, top_p, min_p, ignore_eos or pictures),
    )
    seconds = time.monotonic() - began
    if isinstance(tokenizer, ImageTokenizer):
        paths = save_pictures(tokenizer, list(written), output or Path("samples"), run.name)
        drawn = [Sample("", str(path), tokens, False) for path in paths]
    else:
        drawn = [sample_of(tokenizer, *each) for each in zip(typed, written, strict=True)]

    if as_json:
        console.json(
            {"run": run.name, "update": trained.update, "seed": seed,
             "samples": [sample._asdict() for sample in drawn]}
        )  # fmt: skip
        return drawn
    console.line(
        f"{run.name} at update {trained.update}:"
        + (f" {len(drawn)} samples," if len(drawn) > 1 else "")
        + f" {sum(sample.tokens for sample in drawn)} tokens in {seconds:.1f} s with compilation"
        + (", ended by itself" if len(drawn) == 1 and drawn[0].ended else "")
    )
    for number, sample in enumerate(drawn, start=1):
        if len(drawn) > 1:
            ended = ", ended by itself" if sample.ended else ""
            console.heading(f"sample {number} of {len(drawn)}: {sample.tokens} tokens{ended}")
        console.result(sample.prompt + sample.text)
    return drawn


def sample_of(tokenizer: Tokenizer, prompt: bytes, ids: npt.NDArray[np.int32]) -> Sample:
    """What was written [tokens] behind a prompt, as text."""
    ends = np.flatnonzero(ids == EOS)
    count = int(ends[0]) if len(ends) else len(ids)
    text = _readable(text_of(tokenizer, ids[:count]))
    return Sample(_readable(prompt), text, count, bool(len(ends)))


def continuations(
    trained: TrainedModel,
    prompts: Sequence[npt.NDArray[np.int32]],
    n_tokens: int,
    seed: int,
    filters: "Filters",
) -> npt.NDArray[np.int32]:
    """What follows each of the prompts [rows, n_tokens]; pad after eos.

    The rows of a batch are at one position, so prompts of one length are read and gone on from
    together; one that is there several times is read once. Another length compiles the reading
    anew; another number of rows decoding as well, and so does a length if keys are not quantised:
    their cache has a column for each token.
    """
    import jax

    from model.sampling import decode, prefill, take_prompts

    options = compiler_options()
    read = jax.jit(prefill, static_argnames=("model", "capacity"), compiler_options=options)
    take = jax.jit(take_prompts)
    go_on = jax.jit(decode, static_argnames=("model", "n_tokens"), compiler_options=options)
    model = trained.recipe.model
    written = np.empty((len(prompts), n_tokens), np.int32)
    by_length = defaultdict(list)
    for row, prompt in enumerate(prompts):
        by_length[len(prompt)].append(row)
    for rows in by_length.values():
        batch = np.stack([prompts[row] for row in rows])
        distinct, which = np.unique(batch, axis=0, return_inverse=True)
        capacity = batch.shape[1] + n_tokens
        prefilled = read(model, trained.params, trained.codebooks, distinct, capacity=capacity)
        decoded = go_on(
            model,
            trained.params,
            trained.codebooks,
            take(prefilled, which.astype(np.int32)),
            np.array(rows, np.int32),
            n_tokens=n_tokens,
            key=jax.random.key(seed),
            filters=filters,
        )
        written[rows] = jax.device_get(decoded.tokens)
    return written


def _lines(file: Path) -> list[bytes]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"--prompts {file}: cannot be read: {error.strerror}") from None
    if not lines:
        raise UserError(f"--prompts {file}: needs a prompt on each line, got an empty file")
    return lines


def _readable(text: bytes) -> str:
    return text.decode("utf-8", errors="replace")
