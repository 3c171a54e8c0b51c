"""Decide which documents are dropped; every drop has a reason, and the manifest counts it."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

EMPTY = "empty"
"""The document has no bytes."""
BINARY = "binary"
"""The document has a NUL byte, which no text has."""
DUPLICATE = "duplicate"
"""The document has the content of one that comes before it in the order of ids."""


class Scanned(NamedTuple):
    """What reading a document once tells."""

    size: int
    """Bytes."""
    sha256: str
    """Of the content, as hexadecimal digits."""
    reason: str | None
    """Why it is dropped; `None` if it is kept."""


def scan(blocks: Iterable[bytes]) -> Scanned:
    """Judge one document by itself from its content, given in blocks of any length."""
    digest, size, binary = hashlib.sha256(), 0, False
    for block in blocks:
        digest.update(block)
        size += len(block)
        binary = binary or b"\0" in block
    reason = EMPTY if size == 0 else BINARY if binary else None
    return Scanned(size, digest.hexdigest(), reason)


def drop_duplicates(scanned: Sequence[Scanned]) -> list[Scanned]:
    """Judge the documents together; they come in the order of their ids, and the first stays."""
    seen: set[str] = set()
    judged = []
    for document in scanned:
        if document.reason is None and document.sha256 in seen:
            document = document._replace(reason=DUPLICATE)
        seen.add(document.sha256)
        judged.append(document)
    return judged
