"""The folder that `prepare` writes to: whose it is, who writes now, what is left over.

corpus/
  .tvq-corpus                         marks the folder as ours; locked while prepare runs
  manifest.json                       written last: without it there is no corpus
  shards/PLAN/train-00000.arrow       PLAN: the first digits of the plan id
  shards/PLAN/range-00000.json        the range is finished; removed once there is a manifest
"""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import CorpusError, NewerFormatError
from pipeline.manifest import MANIFEST_NAME, Manifest
from pipeline.shards import check_length
from pipeline.sources import CORPUS_MARKER

SHARDS = "shards"


def check_output(output: Path) -> None:
    """Refuse, before anything is written, a folder that somebody else's files are in."""
    try:
        if not output.exists():
            return
        if not output.is_dir():
            raise CorpusError(f"{output}: not a folder; name another output")
        if not any(output.iterdir()) or (output / CORPUS_MARKER).exists():
            old_manifest(output)
            return
    except OSError as error:
        raise CorpusError(f"{output}: cannot be used ({error.strerror})") from None
    try:
        Manifest.load(output)
    except NewerFormatError:
        raise
    except CorpusError:
        raise CorpusError(
            f"{output}: not empty and not a corpus made by tvq; name a new or empty folder"
        ) from None


def old_manifest(output: Path) -> Manifest | None:
    """The manifest in our own folder; one that is damaged counts as none, it is made again."""
    try:
        return Manifest.load(output)
    except NewerFormatError:
        raise
    except CorpusError:
        return None


@contextlib.contextmanager
def claim(output: Path) -> Iterator[None]:
    """Mark the folder as ours and keep other processes of this machine from preparing in it."""
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        marker = (output / CORPUS_MARKER).open("a")
    with marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(f"{output}: another prepare is writing to it; wait for it") from None
        except OSError:
            pass  # a file system without locks: equal writers still write equal bytes
        yield  # closing the file gives the lock back, and so does any death


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Say in one line that the folder cannot be written: no permission, a full disk."""
    try:
        yield
    except OSError as error:
        raise CorpusError(f"{output}: cannot be written ({error.strerror or error})") from None


def is_whole(output: Path, manifest: Manifest) -> bool:
    try:
        for split in manifest.splits.values():
            for shard in split.shards:
                check_length(output, shard)
    except CorpusError:
        return False
    return True


def tidy(output: Path, manifest: Manifest) -> None:
    """Remove what this program wrote and the manifest does not name: older plans, sidecars."""
    named = {output / s.path for split in manifest.splits.values() for s in split.shards}
    folders = {path.parent for path in named}
    for folder in (output / SHARDS).iterdir():
        if folder not in folders:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        for path in folder.iterdir():
            if path not in named:
                path.unlink(missing_ok=True)
    for path in output.glob(f"{MANIFEST_NAME}.*.tmp"):
        path.unlink(missing_ok=True)
