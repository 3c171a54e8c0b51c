"""`tvq prepare`: files to a corpus, with progress."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cluster.ray_session import ray_session
from jobs.console import Console
from jobs.errors import UserError
from pipeline.manifest import Manifest
from pipeline.sources import SourceSettings, standard_library
from pipeline.storage import open_store

if TYPE_CHECKING:
    from pipeline.plan import PrepareSettings
    from pipeline.prepare import Prepared, Progress


@dataclass(frozen=True)
class PrepareOptions:
    """What the command line says, but for the sources and the output."""

    format: str
    field: str
    separator: str | None
    byte_splits: tuple[int, int] | None
    split_by: str
    validation_fraction: float
    test_fraction: float
    normalize: tuple[str, ...]
    min_bytes: int
    max_bytes: int | None
    keep_binary: bool
    quality: bool
    near_duplicates: float | None
    decontaminate: bool
    tokenizer: str
    vocab_size: int | None
    """Of a tokenizer that is trained."""


def prepare_command(
    sources: tuple[str, ...],
    *,
    output: str,
    stdlib: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    refresh_held_out: bool,
    options: PrepareOptions,
    console: Console,
    as_json: bool,
) -> None:
    """Prepares what the command line asks for and says what came of it."""
    settings = settings_of(source_of(sources, stdlib, include, exclude), options)
    prepared = prepare_corpus(settings, output, console, refresh_held_out=refresh_held_out)
    if as_json:
        manifest = prepared.manifest
        console.json(
            {
                "corpus": open_store(output).location,
                "reused": prepared.reused,
                "resumed_shards": prepared.resumed_shards,
                "rebuilt": prepared.rebuilt,
                "plan_id": manifest.plan_id,
                "increments": len(manifest.increments),
                "splits": {
                    name: {**dataclasses.asdict(split), "shards": len(split.shards)}
                    for name, split in manifest.splits.items()
                },
                "dropped": {reason: drop.count for reason, drop in manifest.drops.items()},
            }
        )


def source_of(
    sources: tuple[str, ...], stdlib: bool, include: tuple[str, ...], exclude: tuple[str, ...]
) -> SourceSettings:
    """The files that the command line means."""
    if stdlib == bool(sources):
        raise UserError("expected either SOURCES (files, folders or patterns) or --stdlib")
    if stdlib and (include or exclude):
        raise UserError("--stdlib chooses its files itself; leave out --include and --exclude")
    return SourceSettings(sources, include or ("**/*",), exclude) if sources else standard_library()


def settings_of(source: SourceSettings, options: PrepareOptions) -> "PrepareSettings":
    """What the command line means."""
    from pipeline.contamination import ContaminationSettings
    from pipeline.filters import FilterSettings
    from pipeline.formats import FormatSettings
    from pipeline.near_duplicates import NearDuplicateSettings
    from pipeline.normalization import Normalization
    from pipeline.plan import PrepareSettings

    wanted = set(options.normalize)
    if {"nfc", "nfkc"} <= wanted:
        raise UserError("--normalize: either nfc or nfkc, not both")
    form = "NFC" if "nfc" in wanted else "NFKC" if "nfkc" in wanted else None
    near = options.near_duplicates
    return PrepareSettings(
        source=source,
        format=FormatSettings(
            kind=options.format,
            field=options.field,
            separator=options.separator,
            byte_splits=options.byte_splits,
        ),
        split_by="name" if options.split_by == "name" else "hash",
        validation_fraction=options.validation_fraction,
        test_fraction=options.test_fraction,
        normalization=Normalization(
            byte_order_mark="bom" in wanted, newlines="newlines" in wanted, unicode_form=form
        ),
        filters=FilterSettings(
            min_bytes=options.min_bytes,
            max_bytes=options.max_bytes,
            keep_binary=options.keep_binary,
            quality=options.quality,
        ),
        near_duplicates=None if near is None else NearDuplicateSettings(similarity=near),
        contamination=ContaminationSettings() if options.decontaminate else None,
        **_tokenizer(options),
    )


def _tokenizer(options: PrepareOptions) -> dict[str, Any]:
    """bytes, images, a SentencePiece tokenizer to train, or one to read."""
    from pipeline.sentencepiece_tokenizer import SentencePieceSettings
    from pipeline.tokenizers import ByteTokenizer, ImageTokenizer

    name, size = options.tokenizer, options.vocab_size
    if name in ("unigram", "bpe"):
        trained = SentencePieceSettings(model_type=name)
        if size is not None:
            trained = dataclasses.replace(trained, vocab_size=size)
        return {"tokenizer": "sentencepiece", "sentencepiece": trained}
    if size is not None:
        raise UserError(f"--vocab-size: is for unigram and bpe, {name} has its own")
    if name in ("bytes", "images"):
        return {"tokenizer": ByteTokenizer.kind if name == "bytes" else ImageTokenizer.kind}
    if not name.endswith(".model"):
        raise UserError(
            f"--tokenizer {name}: expected bytes, images, unigram, bpe, or a SentencePiece file"
            " ending in .model"
        )
    try:
        folder, _, file = name.rpartition("/")
        model = open_store(folder or ".").read(file)
    except FileNotFoundError:
        raise UserError(f"--tokenizer {name}: no such file") from None
    return {"tokenizer": "sentencepiece", "tokenizer_model": model}


def prepare_corpus(
    settings: "PrepareSettings",
    output: str | Path,
    console: Console,
    *,
    refresh_held_out: bool = False,
) -> "Prepared":
    """Prepares a corpus on a Ray cluster of this machine and describes it."""
    from pipeline.prepare import prepare

    began = time.monotonic()
    labels = {"scan": "read", "held-out": "index", "tokenizer": "sample"}
    with contextlib.ExitStack() as session, console.progress("read") as progress:

        def run(function: Callable[..., Any], payloads: Sequence[tuple[Any, ...]]) -> Any:
            # Not before there is something to do: Ray takes seconds to start.
            session.enter_context(ray_session(None, cpus=1))
            from pipeline.ray_tasks import run_tasks

            return run_tasks(function, payloads)

        first: dict[str, tuple[float, int]] = {}

        def report(at: "Progress") -> None:
            now = time.monotonic()
            if at.done == 1:
                first[at.stage] = (now, at.n_bytes)  # Ray has started by then
            note = f"{at.records:,} documents  {at.n_bytes / 1e6:,.1f} MB"
            since, before = first.get(at.stage, (now, at.n_bytes))
            if at.n_bytes > 2 * before:  # else a large first range says nothing of the speed
                note += f"  {(at.n_bytes - before) / 1e6 / max(now - since, 1e-9):,.1f} MB/s"
            label = labels.get(at.stage, at.stage)
            progress.update(at.done, total=at.total, label=label, note=note)

        prepared = prepare(settings, output, run, report, refresh_held_out=refresh_held_out)
    describe(prepared.manifest, open_store(output).location, console)
    increments = len(prepared.manifest.increments)
    if prepared.rebuilt is not None:
        console.warning(
            f"{prepared.rebuilt}: the corpus was made anew, and its held-out splits with it; runs"
            " that were begun on the old one cannot go on"
        )
    if prepared.reused:
        console.line("nothing changed: the corpus that was there is used as it is")
        return prepared
    there = prepared.resumed_shards
    console.line(
        f"prepared in {time.monotonic() - began:.0f} s"
        + (f", {there} shards were there" if there else "")
        + (f"; increment {increments}, held-out splits as before" if increments > 1 else "")
    )
    return prepared


def describe(manifest: Manifest, location: str, console: Console) -> None:
    """The corpus in a few lines: splits, sizes, drops, where it is."""
    if not console.quiet:
        console.table(
            ["split", "documents", "tokens", "MB", "shards", "fingerprint"],
            [
                (
                    name,
                    f"{split.documents:,}",
                    f"{split.tokens:,}",
                    f"{split.n_bytes / 1e6:.2f}",
                    len(split.shards),
                    split.fingerprint[:16],
                )
                for name, split in manifest.splits.items()
            ],
        )
    if manifest.drops:
        console.line(
            "dropped: "
            + ", ".join(f"{drop.count:,} {reason}" for reason, drop in manifest.drops.items())
        )
    console.line(f"corpus    {location}")
