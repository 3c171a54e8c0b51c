"""A corpus and a recipe so small that a training of them takes seconds."""

import random
from pathlib import Path

from tests.pipeline.corpora import write_corpus

RECIPE = """\
# Two layers of sixteen channels: for tests.
model:
  n_layers: 2
  d_model: 16
  d_key: 8
  d_value: 16
  n_codes: 8
  block_length: 16
  window: 16
data:
  sequence_length: 64
training:
  steps: 40
  batch_size: 4
  update_length: 32
  evaluate_every: 20
  evaluate_windows: 8
  samples: 0
checkpoint:
  every: 4
optimizer:
  learning_rate: 1e-2
  warmup_steps: 2
cluster:
  workers: 0
"""


def write_micro(folder: Path) -> tuple[Path, Path]:
    """Writes the corpus and the recipe into `folder`; returns the paths of both."""
    letters = random.Random(0)
    words = ["".join(letters.choices("etaoinshr", k=4)).encode() for _ in range(30)]

    def document(length: int) -> list[bytes]:
        return [b" ".join(letters.choices(words, k=length)) + b"\n"]

    corpus = folder / "corpus"
    write_corpus(
        corpus,
        train=[[document(80) for _ in range(10)] for _ in range(3)],
        validation=[[document(60) for _ in range(4)]],
        test=[[document(60) for _ in range(4)]],
    )
    recipe = folder / "micro.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    return corpus, recipe
