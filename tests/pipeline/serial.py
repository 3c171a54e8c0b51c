"""Corpora made the real way, in this process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc

from pipeline.manifest import Manifest
from pipeline.prepare import PrepareSettings, prepare
from pipeline.sources import SourceSettings
from pipeline.tasks import run_here


def make_corpus(folder: Path, corpus: Path, texts: Mapping[str, bytes], **changed: Any) -> Manifest:
    """Writes the texts into the source folder and prepares it, with these settings."""
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    changed.setdefault("shard_bytes", 2000)
    return prepare(
        PrepareSettings(SourceSettings((str(folder),)), **changed), corpus, run_here
    ).manifest


def stored_rows(corpus: Path, manifest: Manifest, split: str) -> list[dict[str, Any]]:
    """The rows of a split, as plain pyarrow reads them."""
    rows = []
    for shard in manifest.splits[split].shards:
        with pa.memory_map(str(corpus / shard.path)) as file:
            rows += pa.ipc.open_file(file).read_all().to_pylist()
    return rows


def contents(corpus: Path, manifest: Manifest) -> dict[str, tuple[str, bytes]]:
    """Of a corpus of bytes, the split and the text of each document."""
    found: dict[str, tuple[str, bytes]] = {}
    for split in manifest.splits:
        for row in stored_rows(corpus, manifest, split):
            text = found.get(row["doc_id"], ("", b""))[1] + bytes(row["tokens"])
            found[row["doc_id"]] = (split, text)
    return found
