"""Share documents among train, validation and test by a hash of their ids."""

import hashlib
from collections.abc import Sequence

from pipeline.errors import CorpusError


def assign_splits(ids: Sequence[str], validation: float, test: float) -> dict[str, str]:
    """The split of each document, by a hash of its id.

    The hash puts a document on the unit interval: below `test` it is a test document, in the next
    `validation` a validation document, else it trains. So a document's split does not depend on
    the others, except where a split would come out empty: then the documents nearest its end of
    the interval fill it. Raises `CorpusError` if there are too few for that.
    """
    places = {doc_id: _place(doc_id) for doc_id in ids}
    order = sorted(ids, key=lambda doc_id: (places[doc_id], doc_id))
    needed = 1 + (validation > 0) + (test > 0)
    if len(ids) < needed:
        raise CorpusError(
            f"{len(ids)} document{'s are' if len(ids) != 1 else ' is'} left to split after "
            f"filtering, at least {needed} are needed: add documents, or cut one long text into "
            "several files"
        )
    n_test = max(sum(p < test for p in places.values()), test > 0)
    n_validation = max(sum(test <= p < test + validation for p in places.values()), validation > 0)
    while n_test + n_validation >= len(ids):  # leave one to train on
        if n_test >= n_validation:
            n_test -= 1
        else:
            n_validation -= 1
    ends = (n_test, n_test + n_validation)
    names = {}
    for rank, doc_id in enumerate(order):
        names[doc_id] = "test" if rank < ends[0] else "validation" if rank < ends[1] else "train"
    return names


def _place(doc_id: str) -> float:
    digest = hashlib.sha256(b"tvq split\0" + doc_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
