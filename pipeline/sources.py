"""Open a corpus as documents with stable ids.

A document is a file; its id is its path relative to the source, with forward slashes, so that a
moved or copied corpus keeps its ids. The text is the file's bytes, exactly: line ends, byte order
marks and invalid UTF-8 are kept.
"""

import os
import re
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.errors import CorpusError

CORPUS_MARKER = ".tvq-corpus"
"""The file that marks a folder as a prepared corpus: such folders are never read as sources."""

PART_BYTES = 4 * 1024 * 1024
"""The most bytes of a document that one row of a shard holds."""


@dataclass(frozen=True)
class SourceSettings:
    """What is read.

    Hidden files and folders, `__pycache__`, folders that are prepared corpora and what is not a
    regular file (after following a link) are always left out; links to folders are not followed.
    A file that `paths` names is taken as it is.
    """

    paths: tuple[str, ...]
    """Files or folders."""

    include: tuple[str, ...] = ("**/*",)
    """Patterns of ids below a folder, one of which must match. `**/` is any number of folders,
    `*` and `?` do not cross a `/`, `[abc]` is a set."""

    exclude: tuple[str, ...] = ()
    """Patterns of ids below a folder, none of which may match."""


class Document(NamedTuple):
    """One document that was found, not yet read."""

    id: str
    path: str
    """Where it is read from: absolute, never part of an id or a hash."""
    size: int
    """Bytes when it was listed; only progress and the sharing of work go by it."""


def standard_library() -> SourceSettings:
    """The Python sources of this interpreter's standard library, without its tests.

    Real text, hundreds of documents, on every machine that can run this program.
    """
    return SourceSettings(
        paths=(sysconfig.get_path("stdlib"),),
        include=("**/*.py",),
        exclude=(
            "site-packages/**",
            "dist-packages/**",
            "**/test/**",
            "**/tests/**",
            "idlelib/idle_test/**",
        ),
    )


def list_documents(settings: SourceSettings) -> list[Document]:
    """Find the documents of a source, sorted by id.

    Raises `CorpusError` for a path that does not exist or cannot be read, for a source in which no
    file matches, for a name that is not valid UTF-8, and for two files with the same id.
    """
    if not settings.paths:
        raise CorpusError("the source names no path: give a file or a folder")
    include, exclude = _matcher(settings.include), _matcher(settings.exclude)
    found: dict[str, Document] = {}
    for given in settings.paths:
        root = Path(given).absolute()
        status = _status(root)
        if stat.S_ISDIR(status.st_mode):
            documents = _walk(root, include, exclude)
        elif stat.S_ISREG(status.st_mode):
            documents = iter([Document(root.name, str(root), status.st_size)])
        else:
            raise CorpusError(f"{root}: neither a file nor a folder")
        for document in documents:
            _check_name(document)
            other = found.setdefault(document.id, document)
            if other is not document:
                raise CorpusError(
                    f"{document.path} and {other.path} would both be document {document.id!r}: "
                    "give their common parent folder as the one path, or leave one out"
                )
    if not found:
        raise CorpusError(
            f"no file matches in {', '.join(settings.paths)}: include is "
            f"{', '.join(settings.include)}"
            + (f", exclude is {', '.join(settings.exclude)}" if settings.exclude else "")
            + " (**/*.txt matches in every folder; hidden files are left out)"
        )
    return [found[name] for name in sorted(found)]


def read_blocks(path: str, block_bytes: int = 1024 * 1024) -> Iterator[bytes]:
    """Read a file in blocks of at most `block_bytes`."""
    with _open(path) as file:
        try:
            while block := file.read(block_bytes):
                yield block
        except OSError as error:
            raise _unreadable(path, error) from None


def read_parts(path: str, limit: int = PART_BYTES) -> Iterator[bytes]:
    """Read a document in parts of at most `limit` bytes, which joined are the document.

    A part ends behind the last newline that fits; where none fits, at the last border of a UTF-8
    character, or after `limit` bytes of what is not UTF-8. Holds two parts in memory.
    """
    with _open(path) as file:
        pending = b""
        while True:
            try:
                pending += file.read(limit + 1 - len(pending))
            except OSError as error:
                raise _unreadable(path, error) from None
            if len(pending) <= limit:
                if pending:
                    yield pending
                return
            cut = _cut(pending, limit)
            yield pending[:cut]
            pending = pending[cut:]


def _cut(data: bytes, limit: int) -> int:
    """Where to cut data that is longer than `limit`."""
    newline = data.rfind(b"\n", 0, limit)
    if newline >= 0:
        return newline + 1
    # A UTF-8 character is a first byte and at most three bytes 10xxxxxx.
    for cut in range(limit, max(limit - 4, 0), -1):
        if data[cut] & 0xC0 != 0x80:
            return cut
    return limit


def _walk(root: Path, include: re.Pattern[str], exclude: re.Pattern[str]) -> Iterator[Document]:
    def fail(error: OSError) -> None:
        raise _unreadable(str(error.filename), error) from None

    for folder, folders, names in os.walk(root, onerror=fail):
        if CORPUS_MARKER in names:
            folders.clear()
            continue
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        for name in names:
            path = Path(folder, name)
            document_id = path.relative_to(root).as_posix()
            if name.startswith(".") or not include.fullmatch(document_id):
                continue
            if exclude.fullmatch(document_id):
                continue
            status = _status(path)
            if stat.S_ISREG(status.st_mode):
                yield Document(document_id, str(path), status.st_size)


def _matcher(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """One expression that matches what any of the patterns matches (nothing for none)."""
    return re.compile("|".join(_expression(p) for p in patterns) or r"(?!)", re.DOTALL)


def _expression(pattern: str) -> str:
    out, at = "", 0
    while at < len(pattern):
        if pattern.startswith("**/", at) and (at == 0 or pattern[at - 1] == "/"):
            out, at = out + "(?:[^/]+/)*", at + 3
        elif pattern.startswith("**", at):
            out, at = out + ".*", at + 2
        elif pattern[at] == "*":
            out, at = out + "[^/]*", at + 1
        elif pattern[at] == "?":
            out, at = out + "[^/]", at + 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            inside = pattern[at + 1 : end].replace("\\", r"\\").replace("[", r"\[")
            inside = "^" + inside[1:] if inside[0] == "!" else inside.replace("^", r"\^")
            out, at = out + f"[{inside}]", end + 1
        else:
            out, at = out + re.escape(pattern[at]), at + 1
    return f"(?:{out})"


def _check_name(document: Document) -> None:
    try:
        document.path.encode()
    except UnicodeEncodeError:
        raise CorpusError(
            f"{document.path!a}: the name is not valid UTF-8: rename the file or exclude it"
        ) from None


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        raise CorpusError(
            f"{path}: a link to nothing: mend it or exclude it"
            if path.is_symlink()
            else f"{path}: no such file or folder"
        ) from None
    except OSError as error:
        raise _unreadable(str(path), error) from None


def _open(path: str) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: OSError) -> CorpusError:
    return CorpusError(f"{path}: cannot be read ({error.strerror or error}): mend or exclude it")
