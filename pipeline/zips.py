"""Read one member of a zip archive as a stream; nothing is ever unpacked to a path."""

import re
import zipfile
import zlib
from pathlib import PurePosixPath
from typing import BinaryIO

from pipeline.errors import CorpusError
from pipeline.streams import check_expansion

# Of the others, Python's bz2 and lzma unpack without a bound.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

# RuntimeError: a password is needed.
_DAMAGE = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, zlib.error)

_DRIVE = re.compile("[A-Za-z]:")


def open_zip(file: BinaryIO, file_id: str) -> zipfile.ZipFile:
    """The table of contents of an archive, whose `filelist` holds its members.

    Raises `CorpusError` for what is no whole archive, and for one that names paths outside itself:
    none would be written, but who made it meant harm or made a mistake.
    """
    try:
        archive = zipfile.ZipFile(file)
    except _DAMAGE as error:
        raise _damaged(file_id, error) from None
    for member in archive.filelist:
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or _DRIVE.match(member.filename):
            raise CorpusError(
                f"{file_id}: names a path outside itself, {member.filename!a}: do not trust it; "
                "fetch the archive from where it is published"
            )
    return archive


class Member:
    """A member of an archive, open for reading from its beginning.

    It claims to be `member.file_size` bytes and never gives more. Raises `CorpusError` before
    reading where it would expand absurdly, and while it is read where it is damaged; its checksum
    is verified at its end.
    """

    def __init__(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo, file_id: str) -> None:
        if member.compress_type not in _METHODS:
            raise CorpusError(
                f"{file_id}: {member.filename!a} is packed by method {member.compress_type}, which "
                "is not read: pack it again with deflate, or not at all"
            )
        check_expansion(file_id, member.file_size, member.compress_size)
        self._file_id = file_id
        self.position = 0
        """Bytes read so far."""
        try:
            self._stream = archive.open(member)
        except _DAMAGE as error:
            raise _damaged(file_id, error) from None

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes: `size` of them, fewer only at the end; all of them without a size."""
        try:
            data = self._stream.read(size)
        except _DAMAGE as error:
            raise _damaged(self._file_id, error) from None
        self.position += len(data)
        return data


def _damaged(file_id: str, error: Exception) -> CorpusError:
    return CorpusError(
        f"{file_id}: not a whole, plain zip archive ({error}): fetch it again or leave it out"
    )
