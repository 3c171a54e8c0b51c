"""Find the files of a corpus, with stable ids.

A file's id is its path relative to the source, with forward slashes, so that a moved or copied
corpus keeps its ids. What documents a file holds is `formats`' to say.
"""

import functools
import hashlib
import os
import re
import stat
import sysconfig
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, overload

from pipeline.errors import CorpusError
from pipeline.patterns import matcher, split_glob
from pipeline.storage import is_url, open_store

CORPUS_MARKER = ".tvq-corpus"
"""The file that marks a folder as a prepared corpus: such folders are never read as sources."""


@dataclass(frozen=True)
class SourceSettings:
    """What is read.

    Hidden files and folders, `__pycache__`, folders that are prepared corpora and what is not a
    regular file (after following a link) are always left out; links to folders are not followed.
    A file that `paths` names is taken as it is.
    """

    paths: tuple[str, ...]
    """Files, folders or patterns (`books/*.txt`), on this machine or as `gs://bucket/folder`."""

    include: tuple[str, ...] = ("**/*",)
    """Patterns of ids below a folder, one of which must match. `**/` is any number of folders,
    `*` and `?` do not cross a `/`, `[abc]` is a set."""

    exclude: tuple[str, ...] = ()
    """Patterns of ids below a folder, none of which may match."""


class SourceFile(NamedTuple):
    """One file that was found, not yet read."""

    id: str
    """Its path below `folder`."""
    folder: str
    """Where it is read from: an absolute path or a URL, never part of an id or a hash."""
    size: int
    """Bytes when it was listed; the sharing of work goes by it."""
    version: str
    """Changes when the file does, as far as its store can tell without reading it."""

    @property
    def path(self) -> str:
        """For messages."""
        return f"{self.folder}/{self.id}"

    def open(self) -> BinaryIO:
        """Open it for reading at any place; raises `CorpusError` if that cannot be done."""
        try:
            return _store(self.folder).open(self.id)
        except OSError as error:
            raise unreadable(self.path, error) from None


class Listing(Sequence[SourceFile]):
    """Files, each held in some 25 bytes beside its id, a tenth of what it takes as an object."""

    def __init__(self, rows: Iterable[bytes], folders: tuple[str, ...]) -> None:
        # One after the other: as bytes of its own, each would take 33 more.
        self._joined, self._ends, self._folders = bytearray(), array("q", [0]), folders
        for row in rows:
            self._joined += row
            self._ends.append(len(self._joined))
        self._numbers = range(len(self._ends) - 1)

    @classmethod
    def of(cls, files: Iterable[SourceFile]) -> "Listing":
        """These files, in their order."""
        folders: dict[str, int] = {}

        def row(file: SourceFile) -> bytes:
            folder = folders.setdefault(file.folder, len(folders))
            # The id comes last: no other may have a \0 in it.
            return f"{folder}\0{file.size}\0{file.version}\0{file.id}".encode()

        listing = cls(map(row, files), ())
        listing._folders = tuple(folders)
        return listing

    def __reduce__(self) -> tuple[Any, ...]:
        return Listing, (list(self._rows()), self._folders)  # a part travels without the whole

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[SourceFile]:
        return map(self._file, self._rows())

    @overload
    def __getitem__(self, index: int) -> SourceFile: ...

    @overload
    def __getitem__(self, index: slice) -> "Listing": ...

    def __getitem__(self, index: int | slice) -> "SourceFile | Listing":
        if isinstance(index, slice):
            part = object.__new__(Listing)  # of the same bytes
            vars(part).update(vars(self), _numbers=self._numbers[index])
            return part
        return self._file(self._row(self._numbers[index]))

    def take(self, numbers: Iterable[int]) -> "Listing":
        """The files of these numbers, in this order."""
        return Listing((self._row(self._numbers[number]) for number in numbers), self._folders)

    def by_id(self) -> "Listing":
        """In the order of their ids; of equal ones, the earlier first."""
        rows = sorted(self._rows(), key=lambda row: row.split(b"\0", 3)[3])
        return Listing(rows, self._folders)

    def _rows(self) -> Iterator[bytes]:
        return map(self._row, self._numbers)

    def _row(self, number: int) -> bytes:
        return bytes(self._joined[self._ends[number] : self._ends[number + 1]])

    def _file(self, row: bytes) -> SourceFile:
        folder, size, version, name = row.decode().split("\0", 3)
        return SourceFile(name, self._folders[int(folder)], int(size), version)


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


def list_files(settings: SourceSettings) -> Listing:
    """Find the files of a source, sorted by id.

    Raises `CorpusError` for a path that does not exist or cannot be read, for a source in which no
    file matches, for a name that is not valid UTF-8, and for two files with the same id or one that
    a record of the other may have.
    """
    if not settings.paths:
        raise CorpusError("the source names no path: give a file or a folder")
    include, exclude = matcher(settings.include), matcher(settings.exclude)
    found = (file for given in settings.paths for file in _find(given, include, exclude))
    files = Listing.of(map(_checked, found)).by_id()
    files = files.take(_without_copies(files))
    numbered = {
        first: file.path
        for file in files
        for first, mark, row in [file.id.rpartition("#")]
        if mark and row.isdecimal()
    }
    for file in files if numbered else ():
        if file.id in numbered:
            raise CorpusError(
                f"{numbered[file.id]}: its id could be that of a record of {file.id}, which are "
                "numbered: rename one of them or leave it out"
            )
    if not files:
        raise CorpusError(
            f"no file matches in {', '.join(settings.paths)}: include is "
            f"{', '.join(settings.include)}"
            + (f", exclude is {', '.join(settings.exclude)}" if settings.exclude else "")
            + " (**/*.txt matches in every folder; hidden files are left out)"
        )
    return files


def _without_copies(files: Listing) -> Iterator[int]:
    """The numbers of files in the order of their ids, without those that were found before."""
    last = None
    for number, file in enumerate(files):
        if last is None or file.id != last.id:
            yield number
            last = file
        elif file.path != last.path:
            raise CorpusError(
                f"{file.path} and {last.path} would both be document {file.id!r}: "
                "give their common parent folder as the one path, or leave one out"
            )


# Most files of a corpus lie in one folder, and to parse its name takes as long as to read a page.
_store = functools.lru_cache(maxsize=16)(open_store)


def unreadable(path: str, error: OSError) -> CorpusError:
    """The error of a source that cannot be read."""
    why = "No such file" if isinstance(error, FileNotFoundError) else error.strerror or error
    return CorpusError(f"{path}: cannot be read ({why}): mend or exclude it")


def _find(given: str, include: re.Pattern[str], exclude: re.Pattern[str]) -> Iterator[SourceFile]:
    folder, pattern = split_glob(given)
    if pattern and not is_url(given) and Path(given).exists():  # a name with brackets in it
        folder, pattern = given, ""
    if pattern:
        wanted = matcher((pattern,))
        found = _below(folder, wanted, exclude)
        return (file for file in found if include.fullmatch(file.id))
    if is_url(given):
        return _in_store(given, include, exclude)
    root = Path(given).absolute()
    status = _status(root)
    if stat.S_ISDIR(status.st_mode):
        return _walk(root, include, exclude)
    if stat.S_ISREG(status.st_mode):
        return iter([_local(root.name, root.parent, status)])
    raise CorpusError(f"{root}: neither a file nor a folder")


def _below(folder: str, include: re.Pattern[str], exclude: re.Pattern[str]) -> Iterator[SourceFile]:
    if is_url(folder):
        return _in_store(folder, include, exclude)
    root = Path(folder).absolute()
    if not stat.S_ISDIR(_status(root).st_mode):
        raise CorpusError(f"{root}: not a folder, so no pattern can match in it")
    return _walk(root, include, exclude)


def _in_store(url: str, include: re.Pattern[str], exclude: re.Pattern[str]) -> Iterator[SourceFile]:
    """The objects below a URL, or the one that it names."""
    url = url.rstrip("/")
    entries = list(open_store(url).list())
    if not entries:
        folder, _, name = url.rpartition("/")
        for entry in open_store(folder).list(name):
            if entry.name == name:
                yield SourceFile(name, folder, entry.size, entry.version)
                return
        raise CorpusError(f"{url}: no such object, and none below it")
    corpora = {str(PurePosixPath(e.name).parent) for e in entries if _last(e.name) == CORPUS_MARKER}
    for entry in entries:
        folders = [str(parent) for parent in PurePosixPath(entry.name).parents]
        if corpora.intersection(folders) or not _is_wanted(entry.name, include, exclude):
            continue
        yield SourceFile(entry.name, url, entry.size, entry.version)


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _is_wanted(name: str, include: re.Pattern[str], exclude: re.Pattern[str]) -> bool:
    parts = name.split("/")
    if any(part.startswith(".") for part in parts) or "__pycache__" in parts[:-1]:
        return False
    return bool(include.fullmatch(name)) and not exclude.fullmatch(name)


def _walk(root: Path, include: re.Pattern[str], exclude: re.Pattern[str]) -> Iterator[SourceFile]:
    def fail(error: OSError) -> None:
        raise unreadable(str(error.filename), error) from None

    for folder, folders, names in os.walk(root, onerror=fail):
        if CORPUS_MARKER in names:
            folders.clear()
            continue
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        for name in names:
            path = Path(folder, name)
            file_id = path.relative_to(root).as_posix()
            if _is_wanted(file_id, include, exclude):
                status = _status(path)
                if stat.S_ISREG(status.st_mode):
                    yield _local(file_id, root, status)


def _local(name: str, folder: Path, status: os.stat_result) -> SourceFile:
    # Like git: a file with the same size, time of change and inode is taken for the same. As a hash
    # of 64 bits, since it is held of every file.
    seen = f"{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_ino}"
    version = hashlib.blake2b(seen.encode(), digest_size=8).hexdigest()
    return SourceFile(name, str(folder), status.st_size, version)


def _checked(file: SourceFile) -> SourceFile:
    try:
        file.path.encode()
    except UnicodeEncodeError:
        raise CorpusError(
            f"{file.path!a}: the name is not valid UTF-8: rename the file or exclude it"
        ) from None
    return file


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
        raise unreadable(str(path), error) from None
