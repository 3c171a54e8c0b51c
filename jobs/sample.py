"""`tvq sample`: a run's newest checkpoint writes text."""

import functools
import os
import time
from pathlib import Path

import numpy as np

from jobs.console import Console
from jobs.run_directory import RunDirectory
from jobs.trained_model import load_trained_model
from pipeline.manifest import Manifest
from pipeline.tokenizers import EOS, make_tokenizer, model_ids, text_of


def sample_command(
    root: Path,
    name: str,
    *,
    prompt: str,
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    console: Console,
    as_json: bool = False,
) -> str:
    """Samples, prints the prompt and what follows it, and returns what follows.

    The text ends where the model ends the document, or after `tokens` tokens.
    """
    import jax

    from model.sampling import sample

    run = RunDirectory.existing(root, name)
    trained = load_trained_model(run)
    manifest = Manifest.load(Path(trained.recipe.data.corpus or ""))
    tokenizer = make_tokenizer(manifest.tokenizer.kind, manifest.tokenizer.fingerprint)
    # An argument need not be UTF-8: the model reads it as it was typed.
    typed = os.fsencode(prompt)
    prompt = typed.decode("utf-8", errors="replace")
    # Every window that the model was trained on begins with eos.
    ids = np.concatenate([[EOS], model_ids(tokenizer, typed)]).astype(np.int32)
    write = jax.jit(functools.partial(sample, trained.recipe.model), static_argnames="n_tokens")
    began = time.monotonic()
    written = jax.device_get(
        write(
            trained.params,
            trained.codebooks,
            ids[None],
            n_tokens=tokens,
            key=jax.random.key(seed),
            temperature=temperature,
            top_p=top_p,
        )
    )[0]
    ends = np.flatnonzero(written == EOS)
    count = int(ends[0]) if len(ends) else tokens
    text = text_of(tokenizer, written[:count]).decode("utf-8", errors="replace")
    if as_json:
        console.json(
            {"run": run.name, "update": trained.update, "prompt": prompt, "text": text,
             "tokens": count, "ended": bool(len(ends)), "seed": seed}
        )  # fmt: skip
        return text
    console.line(
        f"{run.name} at update {trained.update}: {count} tokens in"
        f" {time.monotonic() - began:.1f} s with compilation"
        + (", ended by itself" if len(ends) else "")
    )
    console.result(prompt + text)
    return text
