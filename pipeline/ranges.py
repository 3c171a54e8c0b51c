"""Pass 2 of `prepare` for one range of documents: its shards, and the sidecar that finishes it.

A range is a run of documents in the order of ids, dropped ones counted, so that the borders of
shards follow the sources and never what survived the filters. Needs no Ray.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline import sources
from pipeline.errors import CorpusError
from pipeline.files import write_json
from pipeline.manifest import DocumentDigest, shard_from_json
from pipeline.shards import Row, Shard, ShardWriter, check_length
from pipeline.tokenizers import Tokenizer, make_tokenizer


def cut_ranges(sizes: Sequence[int], limit: int) -> list[range]:
    """Cut 0..len(sizes)-1 into runs; one ends as soon as it holds `limit` bytes."""
    runs, begin, held = [], 0, 0
    for index, size in enumerate(sizes):
        held += size
        if held >= limit:
            runs.append(range(begin, index + 1))
            begin, held = index + 1, 0
    if begin < len(sizes):
        runs.append(range(begin, len(sizes)))
    return runs


class Task(NamedTuple):
    """A document that pass 2 writes."""

    id: str
    path: str
    sha256: str
    split: str


class Finished(NamedTuple):
    """A range that pass 2 has written: what its sidecar says."""

    shards: dict[str, Shard]
    digests: list[DocumentDigest]
    """Of each document written, in the order of ids."""


def write_range(payload: dict[str, Any]) -> dict[str, Any]:
    """Write the shards of one range, then its sidecar; what it returns is what the sidecar says.

    Runs in a Ray task, but needs no Ray. Raises `CorpusError` if a document is not what was
    scanned; then no shard of the range appears under its name without having been whole.
    """
    output, folder, index = Path(payload["output"]), payload["folder"], payload["index"]
    tokenizer = make_tokenizer(payload["tokenizer"])
    writers: dict[str, ShardWriter] = {}
    digests: list[DocumentDigest] = []
    try:
        for task in (Task(*item) for item in payload["tasks"]):
            if task.split not in writers:
                path = f"{folder}/{task.split}-{index:05d}.arrow"
                writers[task.split] = ShardWriter(output, path, tokenizer.dtype)
            digests.append(_write_document(task, tokenizer, writers[task.split]))
        shards = {split: writer.finish() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abort()
    value = {
        "shards": {split: dataclasses.asdict(shard) for split, shard in shards.items()},
        "digests": digests,
    }
    write_json(_sidecar(output, folder, index), value)
    return value


def _write_document(task: Task, tokenizer: Tokenizer, writer: ShardWriter) -> DocumentDigest:
    content, digest, n_tokens = hashlib.sha256(), hashlib.sha256(), 0
    words = WordCounter()
    for part, text in enumerate(sources.read_parts(task.path)):
        tokens = tokenizer.encode(text)
        content.update(text)
        digest.update(np.ascontiguousarray(tokens, tokens.dtype.newbyteorder("<")).data)
        n_tokens += len(tokens)
        writer.append(Row(task.id, part, tokens, len(text), words.count(text)))
    if content.hexdigest() != task.sha256:
        raise CorpusError(f"{task.path}: changed while it was being prepared; run prepare again")
    return DocumentDigest(n_tokens, digest.hexdigest())


class WordCounter:
    """Counts the words of a document that comes in parts.

    A word is a run of bytes other than ASCII white space, which is defined for any bytes and does
    not change with the version of Unicode. One that goes on in the next part counts in the first.
    """

    _IS_WORD = bytes(byte not in b" \t\n\r\v\f" for byte in range(256))

    def __init__(self) -> None:
        self._inside = False

    def count(self, part: bytes) -> int:
        """The words that begin in this part, which follows the parts counted before."""
        inside = np.frombuffer(part.translate(self._IS_WORD), np.bool_)
        if not len(inside):
            return 0
        begins = int(np.count_nonzero(inside[1:] > inside[:-1]))
        begins += int(inside[0] and not self._inside)
        self._inside = bool(inside[-1])
        return begins


def _sidecar(output: Path, folder: str, index: int) -> Path:
    return output / folder / f"range-{index:05d}.json"


def read_sidecar(output: Path, folder: str, index: int) -> Finished | None:
    """What a range's sidecar says, if it is there and its shards are whole."""
    try:
        value = json.loads(_sidecar(output, folder, index).read_bytes())
        finished = finished_from_json(value)
        for shard in finished.shards.values():
            check_length(output, shard)
    except (OSError, ValueError, KeyError, TypeError, CorpusError):
        return None
    return finished


def finished_from_json(value: dict[str, Any]) -> Finished:
    shards = {split: shard_from_json(shard) for split, shard in value["shards"].items()}
    return Finished(shards, [DocumentDigest(*digest) for digest in value["digests"]])
