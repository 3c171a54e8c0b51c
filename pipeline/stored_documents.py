"""The documents of a split as they are stored, one after the other."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.manifest import Manifest
from pipeline.shard_cache import ShardCache, default_folder
from pipeline.shards import Shard, ShardReader
from pipeline.storage import Location, open_store


class StoredDocument(NamedTuple):
    """One document."""

    id: str
    parts: list[npt.NDArray]
    """Stored ids [tokens] of its rows, views of where the shard is mapped."""


def stored_documents(corpus: Location, manifest: Manifest, split: str) -> Iterator[StoredDocument]:
    """The documents of a split, in stored order; raises `CorpusError` naming a damaged shard."""
    for shard in manifest.split(split).shards:
        yield from documents_of_shard(corpus, manifest, shard)


def documents_of_shard(
    corpus: Location, manifest: Manifest, shard: Shard
) -> Iterator[StoredDocument]:
    """The documents of one shard."""
    with ShardCache(open_store(corpus), default_folder(), None) as cache:
        reader = ShardReader(cache.path(shard), shard, np.dtype(manifest.tokenizer.dtype))
        for rows in reader.documents():
            yield StoredDocument(reader.document_id(rows[0]), [reader.tokens(row) for row in rows])
