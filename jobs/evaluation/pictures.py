"""Sampled pictures as files."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jobs.errors import UserError
from pipeline.tokenizers import TOKEN_OFFSET, ImageTokenizer

_ENLARGED = 3
"""A row's pixels are so many wide and high: MLflow shows pictures no larger than they are."""


def save_pictures(
    tokenizer: ImageTokenizer, written: Sequence[npt.NDArray], folder: Path, name: str
) -> list[Path]:
    """Writes each sample, a model's ids [12288], as a PNG of 64x64; returns where they are.

    They are numbered behind those that are there. Raises `UserError` if the folder cannot be used.
    """
    from PIL import Image

    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob(f"{name}-*.png")))
        for ids in written:
            paths.append(folder / f"{name}-{number:04d}.png")
            Image.fromarray(tokenizer.picture(ids - TOKEN_OFFSET)).save(paths[-1])
            number += 1
    except OSError as error:
        raise UserError(
            f"--output {folder}: cannot be written ({error.strerror or error})"
        ) from None
    return paths


def pictures_in_a_row(tokenizer: ImageTokenizer, written: Sequence[npt.NDArray]) -> bytes:
    """A PNG of all samples, a model's ids [12288] each, side by side and enlarged."""
    from PIL import Image

    row = np.concatenate([tokenizer.picture(ids - TOKEN_OFFSET) for ids in written], axis=1)
    file = io.BytesIO()
    Image.fromarray(row.repeat(_ENLARGED, axis=0).repeat(_ENLARGED, axis=1)).save(
        file, format="png"
    )
    return file.getvalue()
