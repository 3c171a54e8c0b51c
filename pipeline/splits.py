"""Share documents among train, validation and test, by a name or by a hash of their ids."""

import hashlib
import re

import numpy as np
import numpy.typing as npt

from pipeline.errors import CorpusError

SPLITS = ("train", "validation", "test")

_NAMES = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)


def named_split(file_id: str) -> str:
    """The split that a file's path names, as `valid/7.txt` and `wiki.test-00001.parquet` do.

    The first word of the path that is the name of a split decides. Raises `CorpusError` if none
    is.
    """
    for word in re.split(r"[/._-]", file_id.lower()):
        if word in _NAMES:
            return _NAMES[word]
    raise CorpusError(
        f"{file_id}: its path names no split; expected train, validation (valid, val, dev) or test "
        "in the name of a folder or file, or leave out --split-by name"
    )


def place(doc_id: str) -> float:
    """Where the hash of a document's id puts it on the unit interval."""
    digest = hashlib.sha256(b"tvq split\0" + doc_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assign_splits(
    places: npt.NDArray[np.float64], validation: float, test: float
) -> npt.NDArray[np.uint8]:
    """The split of each document (its index in `SPLITS`), by its place on the unit interval.

    Below `test` it is a test document, in the next `validation` a validation document, else it
    trains. So a document's split does not depend on the others, except where a split would come
    out empty: then the documents nearest its end of the interval fill it. Raises `CorpusError` if
    there are too few for that.
    """
    count = len(places)
    needed = 1 + (validation > 0) + (test > 0)
    if count < needed:
        raise CorpusError(
            f"{count} document{'s are' if count != 1 else ' is'} left to split after "
            f"filtering, at least {needed} are needed: add documents, or cut one long text into "
            "several files"
        )
    n_test = max(int(np.sum(places < test)), int(test > 0))
    held_out = (places >= test) & (places < test + validation)
    n_validation = max(int(np.sum(held_out)), int(validation > 0))
    while n_test + n_validation >= count:  # leave one to train on
        if n_test >= n_validation:
            n_test -= 1
        else:
            n_validation -= 1
    order = np.argsort(places, kind="stable")
    splits = np.zeros(count, np.uint8)
    splits[order[:n_test]] = SPLITS.index("test")
    splits[order[n_test : n_test + n_validation]] = SPLITS.index("validation")
    return splits
