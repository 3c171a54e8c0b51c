"""The documents of a split in stored order: their ids, and how long each is."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.manifest import Manifest
from pipeline.shard_cache import ShardCache, default_folder
from pipeline.shards import ShardReader
from pipeline.storage import Location, open_store


class DocumentTable(NamedTuple):
    """One entry a document."""

    ids: list[str]
    tokens: npt.NDArray[np.int64]
    """Stored tokens, eos not counted."""
    n_bytes: npt.NDArray[np.int64]
    n_words: npt.NDArray[np.int64]

    @property
    def begins(self) -> npt.NDArray[np.int64]:
        """Where each document begins in the stream, in which an eos follows each, and the stream's
        end [documents + 1]."""
        return np.concatenate([[0], np.cumsum(self.tokens + 1)])


def document_table(
    corpus: Location, split: str, *, cache_bytes: int | None = None
) -> DocumentTable:
    """Read the ids and lengths of a split's documents, shard after shard.

    The shards of an object store come through a cache of at most `cache_bytes`. Raises
    `CorpusError` if there is no such split, if it is empty, or naming a shard that is damaged.
    """
    manifest = Manifest.load(corpus)
    dtype = np.dtype(manifest.tokenizer.dtype)
    ids: list[str] = []
    sizes: list[npt.NDArray[np.int64]] = []
    with ShardCache(open_store(corpus), default_folder(), cache_bytes) as cache:
        for shard in manifest.split(split).shards:
            try:
                reader = ShardReader(cache.path(shard), shard, dtype)
                first = reader.first_rows
                ids += [reader.document_id(row) for row in first.tolist()]
                rows = np.stack([reader.lengths, *reader.row_sizes()])
                sizes.append(np.add.reduceat(rows, first, axis=1))
            finally:
                cache.release(shard)
    tokens, n_bytes, n_words = np.concatenate(sizes, axis=1)
    return DocumentTable(ids, tokens, n_bytes, n_words)
