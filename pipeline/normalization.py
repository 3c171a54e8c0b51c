"""Change a document's text before anything else sees it; by default every byte is kept."""

import codecs
import functools
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import CorpusError

# Characters that may wait for one that the text can be cut before. No text has so many that only
# combine; such a run is cut here, so that memory stays bounded.
_MOST_WAITING = 1 << 20


@dataclass(frozen=True)
class Normalization:
    """What is changed in each document, in this order."""

    byte_order_mark: bool = False
    """Remove a UTF-8 byte order mark at the beginning."""

    newlines: bool = False
    """CR LF, and CR alone, become LF."""

    unicode_form: Literal["NFC", "NFKC"] | None = None
    """Bring UTF-8 text to this form. Bytes that are not UTF-8 stay as they are, and the text around
    them is brought to the form; the form depends on the version of Unicode."""

    def __post_init__(self) -> None:
        if self.unicode_form not in (None, "NFC", "NFKC"):
            raise CorpusError(f"unicode_form: must be NFC, NFKC or none, got {self.unicode_form}")


def normalize(blocks: Iterable[bytes], settings: Normalization) -> Iterator[bytes]:
    """The document with these changes, in blocks whose borders mean nothing.

    The bytes are those of the whole document changed at once, however it comes in blocks.
    """
    if settings.byte_order_mark:
        blocks = _without_mark(blocks)
    if settings.newlines:
        blocks = _with_newlines(blocks)
    if settings.unicode_form is not None:
        blocks = _in_form(blocks, settings.unicode_form)
    return iter(blocks)


def _without_mark(blocks: Iterable[bytes]) -> Iterator[bytes]:
    head: bytes | None = b""
    for block in blocks:
        if head is None:
            yield block
            continue
        head += block
        if len(head) >= len(codecs.BOM_UTF8):
            yield head.removeprefix(codecs.BOM_UTF8)
            head = None
    if head:
        yield head


def _with_newlines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        block = rest + block
        # An LF may follow in the next block.
        rest = b"\r" if block.endswith(b"\r") else b""
        if rest:
            block = block[:-1]
        yield block.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in block else block
    if rest:
        yield b"\n"


def _in_form(blocks: Iterable[bytes], form: Literal["NFC", "NFKC"]) -> Iterator[bytes]:
    # A byte that is not UTF-8 becomes a lone surrogate, which no form changes, and comes back.
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    begins = _beginnings(form)
    waiting = ""
    for block in blocks:
        waiting += decode(block)
        cut = len(waiting) - 1
        while cut > 0 and not begins(waiting[cut]):
            cut -= 1
        if cut <= 0:
            if len(waiting) <= _MOST_WAITING:
                continue
            cut = len(waiting)
        yield _form(waiting[:cut], form)
        waiting = waiting[cut:]
    yield _form(waiting + decode(b"", final=True), form)


def _form(text: str, form: Literal["NFC", "NFKC"]) -> bytes:
    return unicodedata.normalize(form, text).encode("utf-8", "surrogateescape")


def _beginnings(form: Literal["NFC", "NFKC"]) -> Callable[[str], bool]:
    """Tells if the text before a character can be brought to `form` without it.

    It can if what the character is decomposed to begins with one that does not combine: its class
    is 0 and no pair composes with it as the second.
    """
    decomposed: Literal["NFD", "NFKD"] = "NFD" if form == "NFC" else "NFKD"

    def begins(character: str) -> bool:
        if character.isascii():
            return True
        first = unicodedata.normalize(decomposed, character)[0]
        return unicodedata.combining(first) == 0 and first not in _seconds()

    return begins


@functools.cache
def _seconds() -> frozenset[str]:
    """The characters that some pair composes with as the second (0.2 s, and only if needed)."""
    # The vowels and final consonants of Korean compose by rule, not by table.
    found = {chr(point) for span in ((0x1161, 0x1176), (0x11A8, 0x11C3)) for point in range(*span)}
    for point in range(0x80, 0x110000):
        parts = unicodedata.decomposition(chr(point)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            found.add(chr(int(parts[1], 16)))
    return frozenset(found)
