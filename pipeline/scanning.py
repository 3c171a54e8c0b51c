"""Pass 1 of `prepare`, for one range: read each record once and say what it is.

The result is named by all that it depends on, so an interrupted scan goes on where it was.
"""

import hashlib
import json
from dataclasses import asdict, dataclass

import pyarrow as pa

from pipeline import records
from pipeline.corpus_folder import SCANS
from pipeline.filters import FilterSettings, scan
from pipeline.formats import FormatSettings, Rejected
from pipeline.near_duplicates import NearDuplicateSettings
from pipeline.normalization import Normalization, normalize
from pipeline.ranges import Range, read_range
from pipeline.splits import named_split
from pipeline.storage import open_store

# Raise it when a scan would find something else in the same files.
_VERSION = 1


@dataclass(frozen=True)
class ScanSettings:
    """Everything but the files that decides what a scan finds."""

    format: FormatSettings
    normalization: Normalization
    filters: FilterSettings
    near_duplicates: NearDuplicateSettings | None
    split_by_name: bool
    """The path of a file names the split of its documents."""
    needs_utf8: bool
    """The tokenizer takes text only."""

    @property
    def signature_bytes(self) -> int:
        """Length of the column `signature`; 0 for none."""
        return 4 * self.near_duplicates.permutations if self.near_duplicates else 0


def scan_name(range_: Range, settings: ScanSettings) -> str:
    """Where the scan of a range lies: a hash of its files as they were listed and the settings."""
    files = [[p.file.id, p.file.size, p.file.version, *p.piece] for p in range_.pieces]
    identity = json.dumps([_VERSION, pa.__version__, files, asdict(settings)], sort_keys=True)
    return f"{SCANS}/{hashlib.sha256(identity.encode()).hexdigest()[:32]}.arrow"


def scan_range(corpus: str, name: str, range_: Range, settings: ScanSettings) -> int:
    """Scan a range and keep the result under its name, in the corpus; returns its records.

    Runs in a Ray task, but needs no Ray. Raises `CorpusError` for a file that cannot be read or
    is not of the format.
    """
    rows = []
    for piece, file, row, item in read_range(range_, settings.format):
        found = {
            "file": file.id,
            "piece": piece,
            "row": row,
            "name": "",
            "named_split": "",
            "n_bytes": 0,
            "sha256": records.NOTHING,
            "signature": None,
        }
        if isinstance(item, Rejected):
            rows.append(found | {"reason": item.reason})
            continue
        scanned = scan(
            normalize(item.blocks, settings.normalization),
            settings.filters,
            needs_utf8=settings.needs_utf8,
            near=settings.near_duplicates,
        )
        split = item.split or (named_split(file.id) if settings.split_by_name else None)
        rows.append(
            found
            | {
                "name": item.name or "",
                "named_split": split or "",
                "n_bytes": scanned.size,
                "sha256": bytes.fromhex(scanned.sha256),
                "reason": scanned.reason or "",
                "signature": None if scanned.signature is None else scanned.signature.tobytes(),
            }
        )
    columns = records.scan_schema(settings.signature_bytes)
    open_store(corpus).write(name, records.to_bytes(records.table(rows, columns)))
    return len(rows)


def read_scan(corpus: str, name: str) -> pa.Table | None:
    """The result of a finished scan; none if there is none, or a damaged one."""
    try:
        return records.from_bytes(open_store(corpus).read(name))
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
