"""Where corpora lie: a local folder or a prefix of an object store, behind one small interface.

A name is relative to its store, with forward slashes. A file is there whole or not at all,
whenever the writer dies; an error that the user can mend is a `CorpusError` of one line.
"""

import base64
import contextlib
import hashlib
import os
import re
import shutil
import urllib.parse
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, Protocol

from pipeline.errors import CorpusError
from pipeline.files import replace_durably, sync_folder, temporary_name

Location = str | Path
"""A local folder, or the URL of one in an object store."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


class Entry(NamedTuple):
    """A file of a store."""

    name: str
    size: int
    """Bytes."""
    version: str
    """Changes when the file is written again: modification time in ns, an object's generation."""


class Store(Protocol):
    """A folder of files. Picklable; several threads may use one."""

    @property
    def location(self) -> str:
        """For messages: the absolute path or the URL."""
        ...

    def child(self, name: str) -> "Store":
        """The folder of that name in this one; it need not exist."""
        ...

    def read(self, name: str) -> bytes:
        """The whole file; raises `FileNotFoundError` if there is none."""
        ...

    def open(self, name: str) -> BinaryIO:
        """The file for reading and seeking; raises `FileNotFoundError` if there is none."""
        ...

    def size(self, name: str) -> int:
        """Bytes of the file; raises `FileNotFoundError` if there is none."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        ...

    def md5(self, name: str) -> str:
        """MD5 of the file's bytes, base64: read here, or as an object store knows it ("": not).

        Raises `FileNotFoundError` if there is none.
        """
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write or overwrite a file, durably, with any folders that it needs."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file that must not exist yet: of many who try, one gets True.

        Whether a lost answer meant success is seen by what lies there, so `data` must say whose
        it is: writers of equal bytes may each be told that they won.
        """
        ...

    def scratch(self, name: str) -> Path:
        """A fresh local path, its folder there, to build the file that `place` makes `name`."""
        ...

    def place(self, temporary: Path, name: str) -> None:
        """Give a finished, synced local file its name, over any file that has it; it moves."""
        ...

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """The files in the folder `prefix` and below, sorted by name; none if it is missing."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file; harmless if there is none."""
        ...

    def remove_tree(self, prefix: str) -> None:
        """Remove all files in the folder `prefix` and below; harmless if there are none."""
        ...


def is_url(location: str) -> bool:
    """Whether this is a URL and not a path."""
    return _SCHEME.match(location) is not None


def open_store(location: str | Path) -> Store:
    """The store at a local path, file:///path or gs://bucket/prefix; nothing is looked up yet.

    Raises `CorpusError` for any other scheme and for credentials in a URL.
    """
    match = _SCHEME.match(location) if isinstance(location, str) else None
    if match is None:
        return LocalStore(Path(location))
    scheme, rest = match[1].lower(), match[2]
    host, _, path = rest.partition("/")
    if "@" in host or re.search(r"[?&][^=/]*(token|key|secret|signature)[^=/]*=", rest, re.I):
        # Without the URL: this line may end in a log.
        raise CorpusError(
            f"a {scheme}:// location holds credentials; leave them out, they are found where "
            "`gcloud auth application-default login` or GOOGLE_APPLICATION_CREDENTIALS put them"
        )
    if scheme == "file":
        if host not in ("", "localhost"):
            raise CorpusError(f"{location}: names another machine; write file:///path")
        return LocalStore(Path("/" + urllib.parse.unquote(path)))
    if scheme != "gs":
        raise CorpusError(
            f"{location}: {scheme}:// is not supported; give a local path or gs://bucket/prefix"
        )
    if not host:
        raise CorpusError(f"{location}: names no bucket; write gs://bucket/prefix")
    from pipeline.object_store import ObjectStore

    return ObjectStore(host, path.strip("/"))


def checked_name(location: str, name: str) -> str:
    """The name, if it stays inside its store: a manifest may come from anybody."""
    if not {"", ".", ".."}.intersection(name.split("/")) and "\0" not in name:
        return name  # PurePosixPath takes 10 us, a quarter of reading and hashing a small file
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise CorpusError(f"{location}: {name!r} names a file outside of it")
    return "" if str(path) == "." else str(path)


class LocalStore:
    """A folder of this machine."""

    def __init__(self, root: Path) -> None:
        """The folder need not exist."""
        self.root = root.expanduser().absolute()
        self.location = str(self.root)

    def path(self, name: str) -> Path:
        """Where the file of that name lies."""
        return self.root / checked_name(self.location, name)

    def child(self, name: str) -> "LocalStore":
        return LocalStore(self.path(name))

    def read(self, name: str) -> bytes:
        with self._reading(name) as path:
            return path.read_bytes()

    def open(self, name: str) -> BinaryIO:
        path = f"{self.location}/{checked_name(self.location, name)}"
        try:
            return open(path, "rb")  # noqa: PTH123 (a Path takes 10 us, the caller closes)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(path) from None
        except OSError as error:
            raise CorpusError(f"{path}: cannot be read ({error.strerror or error})") from None

    def size(self, name: str) -> int:
        with self._reading(name) as path:
            if path.is_dir():
                raise FileNotFoundError(path)
            return path.stat().st_size

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def md5(self, name: str) -> str:
        with self._reading(name) as path, path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
        return base64.b64encode(digest.digest()).decode()

    def write(self, name: str, data: bytes) -> None:
        with self._writing(name) as path, _temporary(path, data) as temporary:
            replace_durably(temporary, path)

    def create(self, name: str, data: bytes) -> bool:
        with self._writing(name) as path, _temporary(path, data) as temporary:
            try:
                # Unlike opening with "x", a link is there with all of its bytes or not at all.
                os.link(temporary, path)
            except FileExistsError:
                # A network file system may have lost the answer to a link that it made.
                return path.is_file() and path.read_bytes() == data
            with contextlib.suppress(FileNotFoundError):  # another has removed it, folder and all
                sync_folder(path.parent)
            return True

    def scratch(self, name: str) -> Path:
        with self._writing(name) as path:
            return temporary_name(path)

    def place(self, temporary: Path, name: str) -> None:
        with self._writing(name) as path:
            replace_durably(temporary, path)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        with self._reading(prefix) as top:
            names = []
            for folder, _, files in os.walk(top, onerror=_raise_unless_missing):
                names += [Path(folder, file) for file in files]
        names = [(path.relative_to(self.root).as_posix(), path) for path in names]
        for name, path in sorted(names):
            try:
                status = path.stat()
            except OSError:
                continue  # gone meanwhile, or a link to nothing
            yield Entry(name, status.st_size, str(status.st_mtime_ns))

    def remove(self, name: str) -> None:
        with self._writing(name, make_folder=False) as path:
            path.unlink(missing_ok=True)

    def remove_tree(self, prefix: str) -> None:
        with (
            self._writing(prefix, make_folder=False) as path,
            contextlib.suppress(FileNotFoundError),
        ):
            shutil.rmtree(path)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        path = self.path(name)
        try:
            yield path
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(path) from None
        except OSError as error:
            raise CorpusError(f"{path}: cannot be read ({error.strerror or error})") from None

    @contextlib.contextmanager
    def _writing(self, name: str, *, make_folder: bool = True) -> Iterator[Path]:
        path = self.path(name)
        try:
            if make_folder:
                _make_folder(path.parent)
            yield path
        except OSError as error:
            raise CorpusError(f"{path}: cannot be written ({error.strerror or error})") from None


@contextlib.contextmanager
def _temporary(target: Path, data: bytes) -> Iterator[Path]:
    """A synced file of these bytes beside the target, gone afterwards."""
    temporary = temporary_name(target)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Make a folder that is still there after a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
