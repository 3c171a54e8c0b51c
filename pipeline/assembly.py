"""The manifest of a corpus whose ranges are all there, put together from their records."""

import platform
import unicodedata
from importlib.metadata import version

import numpy as np
import pyarrow as pa

from pipeline.building import Built
from pipeline.errors import CorpusError
from pipeline.manifest import (
    FORMAT_VERSION,
    Drops,
    FingerprintBuilder,
    Increment,
    Manifest,
    Split,
    TokenizerInfo,
    read_records,
)
from pipeline.plan import PrepareSettings, mathematical
from pipeline.shards import Shard
from pipeline.splits import SPLITS
from pipeline.storage import Location
from pipeline.tokenizers import TOKEN_OFFSET

_EXAMPLES = 10
"""Ids that the manifest names of each reason to drop a record; the rest is in the records."""


def assemble(settings: PrepareSettings, corpus: Location, built: Built) -> Manifest:
    """Count, sum and hash what there is, range by range.

    Raises `CorpusError` if nothing is left to train on.
    """
    tokenizer = built.shared.tokenizer.make(str(corpus))
    fingerprints = {name: FingerprintBuilder(tokenizer.dtype.name) for name in SPLITS}
    shards: dict[str, list[Shard]] = {name: [] for name in SPLITS}
    dropped: dict[str, int] = {}
    examples: dict[str, list[str]] = {}
    increments = []
    for increment in built.increments:
        for range_ in increment.ranges:
            for name, shard in range_.shards.items():
                shards[name].append(shard)
            table = read_records(corpus, range_.records)
            columns = ("doc_id", "split", "reason", "tokens", "tokens_sha256")
            rows = zip(*(table.column(name).to_pylist() for name in columns), strict=True)
            for doc_id, split, reason, tokens, sha256 in rows:
                if split:
                    fingerprints[split].add(doc_id, tokens, sha256.hex())
                    continue
                dropped[reason] = dropped.get(reason, 0) + 1
                if dropped[reason] <= _EXAMPLES:
                    examples.setdefault(reason, []).append(doc_id)
        files = tuple(range_.records for range_ in increment.ranges)
        train = fingerprints["train"].fingerprint()
        increments.append(Increment(increment.plan_id, train, files))
    if not shards["train"]:
        raise CorpusError("no document is left to train on after filtering: add documents")
    return Manifest(
        format_version=FORMAT_VERSION,
        plan_id=built.increments[-1].plan_id,
        settings=mathematical(settings),
        tokenizer=TokenizerInfo(
            kind=tokenizer.kind,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            token_offset=TOKEN_OFFSET,
            dtype=tokenizer.dtype.name,
            file=built.shared.tokenizer.model,
        ),
        splits={
            name: Split(
                fingerprint=fingerprints[name].fingerprint(),
                documents=sum(shard.documents for shard in shards[name]),
                tokens=sum(shard.tokens for shard in shards[name]),
                n_bytes=sum(shard.n_bytes for shard in shards[name]),
                n_words=sum(shard.n_words for shard in shards[name]),
                shards=tuple(shards[name]),
            )
            for name in SPLITS
        },
        increments=tuple(increments),
        drops={
            reason: Drops(dropped[reason], tuple(examples[reason])) for reason in sorted(dropped)
        },
        held_out_index=built.shared.held_out_index,
        versions={
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
            "python": platform.python_version(),
            "ray": version("ray"),
            "unicode": unicodedata.unidata_version,
        },
    )
