"""Which format a file has, by its name or by a setting."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from pipeline import imagenet64, images, parquet_format, published_corpora, record_formats
from pipeline import text_formats as texts
from pipeline.contents import Content, Format, Piece, Rejected
from pipeline.errors import CorpusError
from pipeline.streams import CODECS

__all__ = [
    "KINDS",
    "Content",
    "Format",
    "FormatSettings",
    "Piece",
    "Rejected",
    "make_format",
    "survey",
]

KINDS = (
    "auto",
    "text",
    "lines",
    "separator",
    "jsonl",
    "csv",
    "parquet",
    "enwik8",
    "pg19",
    "imagenet64",
    "images",
)


@dataclass(frozen=True)
class FormatSettings:
    """How the files of a source become documents. Survives JSON: lists do for tuples."""

    kind: str = "auto"
    """One of `KINDS`; auto goes by the file's ending: .jsonl, .ndjson, .csv (each also packed, as
    .jsonl.gz or .jsonl.zst), .json.gz, .json.zst, .parquet; anything else is text, one document a
    file. What ends in .gz or .zst is unpacked for every kind of text and records."""

    field: str = "text"
    """The text of a record: a key of JSON, or the name of a column."""

    separator: str | None = None
    """For kind separator: the string, anywhere, that ends a document and belongs to none; for a
    line of dashes \"\\n---\\n\"."""

    byte_splits: tuple[int, int] | None = None
    """For kind enwik8: the offsets at which validation and test begin, for another file than the
    100,000,000 bytes of enwik8 (which has 90,000,000 and 95,000,000)."""

    train_rows: int = imagenet64.TRAIN_ROWS
    """For kind imagenet64: pictures of the train batches that are train; the rest is validation."""

    first_rows: tuple[tuple[str, int], ...] = ()
    """For kind imagenet64: pictures before each train batch, by file id; filled by `survey`."""


def make_format(settings: FormatSettings, file_id: str) -> Format:
    """The format of a file. Raises `CorpusError` for settings that cannot be."""
    _check(settings)
    kind = _kind_of(file_id) if settings.kind == "auto" else settings.kind
    if kind == "text":
        return _TEXT
    match kind:
        case "lines":
            return texts.lines()
        case "separator":
            return texts.Separated((settings.separator or "").encode())
        case "jsonl":
            return record_formats.JsonLines(settings.field)
        case "csv":
            return record_formats.Csv(settings.field)
        case "parquet":
            return parquet_format.Parquet(settings.field)
        case "enwik8":
            return _byte_splits(settings, file_id)
        case "pg19":
            return published_corpora.Pg19()
        case "imagenet64":
            return imagenet64.ImageNet64(settings.train_rows, dict(settings.first_rows))
        case _:
            return images.Images()


def survey(
    settings: FormatSettings, files: Sequence[tuple[str, Callable[[], BinaryIO]]]
) -> FormatSettings:
    """The settings with what can only be known of all files together; most formats need nothing.

    To be called once, before any file is read, with the id of each file and what opens it; reads
    headers alone. Raises `CorpusError` for files that do not go together.
    """
    if settings.kind == "enwik8" and settings.byte_splits is None and len(files) > 1:
        raise CorpusError(
            f"enwik8 is one file, and here are {len(files)}, {files[0][0]} and {files[1][0]}: give "
            "the path of one"
        )
    if settings.kind != "imagenet64":
        return settings
    first_rows = imagenet64.count_rows(files)
    return dataclasses.replace(settings, first_rows=tuple(sorted(first_rows.items())))


def _byte_splits(settings: FormatSettings, file_id: str) -> Format:
    if settings.byte_splits is None:
        return published_corpora.ByteSplits(
            published_corpora.ENWIK8_SPLITS, "enwik8", published_corpora.ENWIK8_BYTES
        )
    validation, test = settings.byte_splits
    return published_corpora.ByteSplits((validation, test), file_id)


def _kind_of(file_id: str) -> str:
    name = file_id.lower()
    if not name.endswith(_TOLD):  # most files: of a corpus of small ones, each microsecond counts
        return "text"
    packed = name.endswith(tuple(CODECS))
    if packed:
        name = name.rpartition(".")[0]
    if name.endswith((".jsonl", ".ndjson")) or (packed and name.endswith(".json")):
        return "jsonl"
    if name.endswith(".csv"):
        return "csv"
    if name.endswith(".parquet") and not packed:
        return "parquet"
    return "text"


_TEXT = texts.Text()
_TOLD = (".jsonl", ".ndjson", ".csv", ".parquet", *CODECS)


def _check(settings: FormatSettings) -> None:
    if settings.kind not in KINDS:
        raise CorpusError(f"kind: must be one of {', '.join(KINDS)}, got {settings.kind!r}")
    if settings.train_rows < 0:
        raise CorpusError(f"train_rows: must be at least 0, got {settings.train_rows}")
    if settings.kind == "separator" and not settings.separator:
        raise CorpusError("separator: kind separator needs one, at least one character long")
    if settings.kind != "separator" and settings.separator is not None:
        raise CorpusError(f"separator: needs kind separator, got {settings.kind}")
    if settings.byte_splits is not None:
        if settings.kind != "enwik8":
            raise CorpusError(f"byte_splits: needs kind enwik8, got {settings.kind}")
        if not 0 <= settings.byte_splits[0] <= settings.byte_splits[1]:
            raise CorpusError(
                f"byte_splits: must be two rising offsets, got {list(settings.byte_splits)}"
            )
