"""The folder that `prepare` writes to: whose it is, who writes now, what is left over.

corpus/
  .tvq-corpus                         marks the folder as ours; locked while prepare runs
  lease.json                          in a bucket: who prepares in it now (pipeline/claims.py)
  manifest.json                       written last: without it there is no corpus
  listing.json                        the sources as they were listed, to see what has changed
  shards/PLAN/train-00000.arrow       PLAN: the first digits of the plan id
  shards/PLAN/records-00000.arrow     what became of each record of the range
  shards/PLAN/range-00000.json        the range is finished; removed once there is a manifest
  scan/KEY.arrow                      what pass 1 found in a range; removed likewise
"""

import contextlib
import fcntl
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence

from pipeline.claims import CLAIM, CLAIMS_BEFORE, Claim
from pipeline.errors import CorpusError, NewerFormatError
from pipeline.manifest import MANIFEST_NAME, Manifest
from pipeline.sources import CORPUS_MARKER, Listing
from pipeline.storage import LocalStore, Store

SHARDS = "shards"
SCANS = "scan"
_LISTING = "listing.json"
_RENEW_SECONDS = 10.0


def plan_folder(plan_id: str) -> str:
    """Where the shards of a plan lie."""
    return f"{SHARDS}/{plan_id[:16]}"


def check_output(output: Store) -> None:
    """Refuse, before anything is written, a folder that somebody else's files are in."""
    if isinstance(output, LocalStore) and output.root.exists() and not output.root.is_dir():
        raise CorpusError(f"{output.location}: not a folder; name another output")
    if output.exists(CORPUS_MARKER) or next(output.list(), None) is None:
        old_manifest(output)
        return
    try:
        Manifest.load(output.location)
    except NewerFormatError:
        raise
    except CorpusError:
        raise CorpusError(
            f"{output.location}: not empty and not a corpus made by tvq; name a new or empty folder"
        ) from None


def old_manifest(output: Store) -> Manifest | None:
    """The manifest in our own folder; one that is damaged counts as none, it is made again."""
    try:
        return Manifest.load(output.location)
    except NewerFormatError:
        raise
    except CorpusError:
        return None


@contextlib.contextmanager
def claim(output: Store) -> Iterator[Callable[[], None]]:
    """Mark the folder as ours and keep others from preparing in it: on this machine by a lock, in a
    bucket by a claim that is renewed.

    Yields what raises CorpusError if another has it by now; to be asked before the manifest is
    written. A folder that was made for a prepare which is then refused goes again.
    """
    if isinstance(output, LocalStore):
        with _locked(output):
            yield lambda: None
        return
    if not output.exists(CORPUS_MARKER):  # first: who sees the claim sees whose folder it is
        output.write(CORPUS_MARKER, b"")
    mine = Claim(output)
    if holder := mine.take():
        raise CorpusError(
            f"{output.location}: another prepare is writing to it (process {holder.pid} on"
            f" {holder.host}); wait for it"
        )

    def confirm() -> None:
        if not mine.is_held():
            raise CorpusError(
                f"{output.location}: another prepare took over, as nothing was heard of this one"
                " for a minute; run the same command again when that one is done"
            )

    with mine.kept(_RENEW_SECONDS, f"corpus {output.location}"):
        yield confirm


@contextlib.contextmanager
def _locked(output: LocalStore) -> Iterator[None]:
    new = not output.exists(CORPUS_MARKER)
    there = output.root.exists()
    with writing(output):
        output.root.mkdir(parents=True, exist_ok=True)
        marker = (output.root / CORPUS_MARKER).open("a")
    with marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(
                f"{output.location}: another prepare is writing to it; wait for it"
            ) from None
        except OSError:
            pass  # a file system without locks: equal writers still write equal bytes
        try:
            yield  # closing the file gives the lock back, and so does any death
        except CorpusError:
            if new and not (output.root / SHARDS).exists():
                shutil.rmtree(output.root / SCANS, ignore_errors=True)
                (output.root / CORPUS_MARKER).unlink(missing_ok=True)
                if not there:
                    with contextlib.suppress(OSError):
                        output.root.rmdir()
            raise


@contextlib.contextmanager
def writing(output: Store) -> Iterator[None]:
    """Say in one line that the folder cannot be written: no permission, a full disk."""
    try:
        yield
    except OSError as error:
        raise CorpusError(
            f"{output.location}: cannot be written ({error.strerror or error})"
        ) from None


def save_listing(output: Store, plan_id: str, parts: Sequence[Listing]) -> None:
    """Keep what the sources of each increment looked like; no part of the corpus, it knows time."""
    # File by file: `json.dumps` of all at once would take 400 bytes of memory for each.
    text = io.BytesIO()
    text.write(b'{"increments": [')
    for number, part in enumerate(parts):
        text.write(b", {" if number else b"{")
        for at, file in enumerate(part):
            seen = f"{json.dumps(file.id)}: {json.dumps([file.size, file.version])}"
            text.write(f"{', ' if at else ''}{seen}".encode())
        text.write(b"}")
    text.write(f'], "plan_id": {json.dumps(plan_id)}}}'.encode())
    data = text.getvalue()
    try:
        if output.read(_LISTING) == data:
            return
    except FileNotFoundError:
        pass
    output.write(_LISTING, data)


def read_listing(output: Store, plan_id: str) -> list[dict[str, tuple[int, str]]]:
    """For each increment its files' (size, version) by id when that corpus was made.

    Nothing if they are not known, as in a corpus that comes from elsewhere.
    """
    try:
        value = json.loads(output.read(_LISTING))
        if value["plan_id"] != plan_id:
            return []
        return [
            {name: (size, version) for name, (size, version) in part.items()}
            for part in value["increments"]
        ]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return []


def tidy(output: Store, manifest: Manifest) -> None:
    """Remove what this program wrote and the manifest does not name: older plans, scans, rests."""
    named = {MANIFEST_NAME, _LISTING, CORPUS_MARKER, CLAIM, *manifest.files}
    for entry in list(output.list()):
        if entry.name not in named and not entry.name.startswith(CLAIMS_BEFORE):
            output.remove(entry.name)
    if isinstance(output, LocalStore):
        for folder in [output.root / SCANS, *(output.root / SHARDS).iterdir()]:
            with contextlib.suppress(OSError):
                folder.rmdir()
