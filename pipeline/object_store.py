"""A prefix of a bucket of Google Cloud Storage as a `Store`, through gcsfs.

A file is there whole or not at all, and what an upload left is compared with what was sent.
"""

import base64
import contextlib
import hashlib
import io
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import gettempdir
from typing import Any, BinaryIO

from pipeline import google_storage
from pipeline.errors import CorpusError, PassingFaultError
from pipeline.storage import Entry, checked_name

_PIECE_BYTES = 8 * 1024 * 1024
"""The most bytes of one request; a multiple of 256 KiB, as a resumable upload needs."""
_BUFFER_BYTES = 4 * 1024 * 1024
"""Read ahead of small reads: at 30 ms a request, 130 MB/s."""
_UPLOADS = 3
"""How often a file is sent until the store holds what was sent."""
_REMOVERS = 8
"""Threads that remove a folder's objects: one request each, 30 ms of waiting."""


class ObjectStore:
    """gs://bucket/prefix. Not for zonal buckets, which are reached by gRPC alone."""

    def __init__(self, bucket: str, prefix: str) -> None:
        """The prefix has no slash at its ends; nothing is looked up yet."""
        self._bucket, self._prefix = bucket, prefix
        self.location = f"gs://{bucket}/{prefix}".rstrip("/")

    def child(self, name: str) -> "ObjectStore":
        return ObjectStore(self._bucket, self._key(name))

    def read(self, name: str) -> bytes:
        stored = self._readable(name)
        size = int(stored["size"])
        # Pieces of one generation: never the front of one version and the end of the next.
        return b"".join(
            self.read_range(name, stored["generation"], begin, min(begin + _PIECE_BYTES, size))
            for begin in range(0, size, _PIECE_BYTES)
        )

    def open(self, name: str) -> BinaryIO:
        stored = self._readable(name)
        file = _ObjectFile(self, name, stored["generation"], int(stored["size"]))
        return io.BufferedReader(file, _BUFFER_BYTES)

    def size(self, name: str) -> int:
        return int(self._describe(name)["size"])

    def exists(self, name: str) -> bool:
        try:
            self._describe(name)
        except FileNotFoundError:
            return False
        return True

    def md5(self, name: str) -> str:
        return self._describe(name).get("md5Hash", "")

    def write(self, name: str, data: bytes) -> None:
        def send() -> None:
            google_storage.file_system().pipe_file(self._path(name), data, chunksize=_PIECE_BYTES)

        self._upload(name, send, len(data), hashlib.md5(data, usedforsecurity=False).digest())

    def create(self, name: str, data: bytes) -> bool:
        with self._asking(name, "written"):
            try:
                google_storage.file_system().pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                # Ours, if only the answer to the first attempt was lost.
                with contextlib.suppress(FileNotFoundError):
                    return self.read(name) == data
                return False
        return True

    def scratch(self, name: str) -> Path:
        return Path(gettempdir()) / f"tvq.{uuid.uuid4().hex}.{Path(self._key(name)).name}.tmp"

    def place(self, temporary: Path, name: str) -> None:
        try:
            with temporary.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest = hashlib.file_digest(file, _md5).digest()
        except OSError as error:
            raise CorpusError(f"{temporary}: cannot be read ({error.strerror})") from None

        def send() -> None:
            google_storage.file_system().put_file(
                str(temporary),
                self._path(name),
                chunksize=_PIECE_BYTES,
                content_type="application/octet-stream",
            )

        self._upload(name, send, size, digest)
        temporary.unlink(missing_ok=True)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        folder = self._key(prefix)
        folder = f"{folder}/" if folder else ""
        for page in self._pages(folder):
            for item in page.get("items", ()):
                if not item["name"].endswith("/"):  # else a folder that a console drew
                    name = item["name"][len(self._prefix) + 1 if self._prefix else 0 :]
                    yield Entry(name, int(item["size"]), item["generation"])

    def remove(self, name: str) -> None:
        with self._asking(name, "removed"), contextlib.suppress(FileNotFoundError):
            self._call("DELETE", "b/{}/o/{}", self._bucket, self._key(name))

    def remove_tree(self, prefix: str) -> None:
        with ThreadPoolExecutor(_REMOVERS) as pool:
            for _ in pool.map(self.remove, [entry.name for entry in self.list(prefix)]):
                pass

    def read_range(self, name: str, generation: str, begin: int, end: int) -> bytes:
        """Bytes begin..end-1 of one version of an object; there are so many."""
        with self._asking(name, "read"):
            try:
                _, data = self._call(
                    "GET",
                    "b/{}/o/{}",
                    self._bucket,
                    self._key(name),
                    headers={"Range": f"bytes={begin}-{end - 1}"},
                    alt="media",
                    generation=generation,
                )
            except FileNotFoundError:
                raise CorpusError(
                    f"{self.location}/{name}: replaced or removed while it was read; start again"
                ) from None
        if len(data) != end - begin:
            raise CorpusError(
                f"{self.location}/{name}: the store sent {len(data)} bytes for {end - begin}"
            )
        return data

    def _pages(self, prefix: str, **options: Any) -> Iterator[dict[str, Any]]:
        """What the store lists of the keys with a prefix; `CorpusError` if it has no bucket."""
        page_token = None
        while True:
            with self._asking("", "listed"):
                page = self._call(
                    "GET",
                    "b/{}/o",
                    self._bucket,
                    json_out=True,
                    prefix=prefix or None,
                    pageToken=page_token,
                    fields="items(name,size,generation),nextPageToken",
                    **options,
                )
            yield page
            page_token = page.get("nextPageToken")
            if page_token is None:
                return

    def _key(self, name: str) -> str:
        return "/".join(filter(None, (self._prefix, checked_name(self.location, name))))

    def _path(self, name: str) -> str:
        return f"{self._bucket}/{self._key(name)}"

    def _call(self, method: str, path: str, *arguments: str, **options: Any) -> Any:
        return google_storage.file_system().call(method, path, *arguments, **options)

    def _describe(self, name: str) -> dict[str, Any]:
        """What the store knows of an object; raises `FileNotFoundError` if there is none."""
        with self._asking(name, "read"), contextlib.suppress(FileNotFoundError):
            return self._call("GET", "b/{}/o/{}", self._bucket, self._key(name), json_out=True)
        # The store says 404 for a bucket that is missing too; only a listing tells.
        for _ in self._pages("", maxResults=1):
            break
        raise FileNotFoundError(f"{self.location}/{name}")

    def _readable(self, name: str) -> dict[str, Any]:
        stored = self._describe(name)
        if stored.get("contentEncoding"):
            # Its size is not that of the bytes that come.
            raise CorpusError(
                f"{self.location}/{name}: stored with Content-Encoding "
                f"{stored['contentEncoding']}; store it again without"
            )
        return stored

    def _upload(self, name: str, send: Callable[[], object], size: int, md5: bytes) -> None:
        """Send until the store holds these bytes: a cut connection may leave others."""
        expected = (size, base64.b64encode(md5).decode())
        stored: dict[str, Any] = {}
        for left in reversed(range(_UPLOADS)):
            failure = None
            with self._asking(name, "written"):
                try:
                    send()
                except Exception as error:
                    if google_storage.status(error) in (401, 403):
                        raise
                    failure = error
            # Also after a failure: the answer that was lost may have been the last.
            with contextlib.suppress(FileNotFoundError):
                stored = self._describe(name)
                if (int(stored["size"]), stored.get("md5Hash")) == expected:
                    return
            if failure is not None and not (left and google_storage.may_start_again(failure)):
                with self._asking(name, "written"):
                    raise failure
        with self._asking(name, "removed"), contextlib.suppress(FileNotFoundError):
            # Of this generation: what another writer put there meanwhile stays.
            path = ("b/{}/o/{}", self._bucket, self._key(name))
            self._call("DELETE", *path, ifGenerationMatch=stored["generation"])
        raise CorpusError(
            f"{self.location}/{name}: sent {_UPLOADS} times, and the store then held other bytes "
            "(by length or MD5); look for what changes them on the way"
        )

    @contextlib.contextmanager
    def _asking(self, name: str, deed: str) -> Iterator[None]:
        """Say in one line what keeps the store from answering."""
        try:
            yield
        except FileExistsError:
            raise
        except FileNotFoundError:
            if deed in ("written", "listed"):
                raise CorpusError(
                    f"{self.location}: there is no bucket {self._bucket}; create it first"
                ) from None
            raise
        except google_storage.failures() as error:
            where = f"{self.location}/{name}".rstrip("/")
            kind = PassingFaultError if google_storage.passing(error) else CorpusError
            raise kind(f"{where}: cannot be {deed}: {google_storage.reason(error)}") from None


class _ObjectFile(io.RawIOBase):
    """One version of an object, read in pieces."""

    def __init__(self, store: ObjectStore, name: str, generation: str, size: int) -> None:
        self._store, self._name, self._generation = store, name, generation
        self._size, self._at = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if begin + offset < 0:
            raise ValueError(f"seek to {begin + offset}")
        self._at = begin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._at + min(len(view), _PIECE_BYTES), self._size)
        if end <= self._at:
            return 0
        data = self._store.read_range(self._name, self._generation, self._at, end)
        view[: len(data)] = data
        self._at = end
        return len(data)

    def readall(self) -> bytes:
        out = bytearray(max(0, self._size - self._at))
        at = 0
        while at < len(out):
            at += self.readinto(memoryview(out)[at:])
        return bytes(out)


def _md5() -> Any:
    return hashlib.md5(usedforsecurity=False)
