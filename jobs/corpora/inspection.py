"""`tvq inspect`: what a corpus is, and what became of each document."""

import dataclasses
from typing import Any

from jobs.console import Console
from jobs.errors import UserError
from jobs.readable import indented, readable
from pipeline.corpus_difference import flat
from pipeline.corpus_survey import (
    Fate,
    StoredText,
    Survey,
    document,
    document_without_records,
    fates,
    original,
    samples,
    similar_ids,
    survey,
)
from pipeline.manifest import Manifest, tokenizer_of
from pipeline.plan import PrepareSettings, mathematical
from pipeline.sources import SourceSettings
from pipeline.storage import open_store
from pipeline.tokenizers import ImageTokenizer, Tokenizer

_SAMPLES = 3
_SAMPLE_CHARACTERS = 200
_SAID_ELSEWHERE = ("versions", "tokenizer_fingerprint")
_BAR = 40
"""Columns of the longest bar."""


def card_command(
    corpus: str, *, split: str | None = None, console: Console, as_json: bool = False
) -> None:
    """Prints the card of a corpus: from its manifest and records; only the samples are read."""
    manifest = Manifest.load(corpus)
    if split is not None:
        manifest.split(split)
    tokenizer = tokenizer_of(corpus, manifest)
    surveyed = survey(corpus, manifest)
    shown = [name for name in manifest.splits if split in (None, name)]
    chosen = split or "train"
    sampled = list(
        samples(
            corpus,
            manifest,
            tokenizer,
            chosen,
            count=_SAMPLES,
            max_bytes=4 * _SAMPLE_CHARACTERS + 4,  # of UTF-8
        )
    )
    if as_json:
        console.json(_card(corpus, manifest, surveyed, shown, sampled))
        return
    _print_facts(corpus, manifest, surveyed, console)
    console.heading("splits")
    console.table(
        ["split", "documents", "tokens", "MB", "words", "bytes/token", "shards", "fingerprint"],
        [_split_row(manifest, name) for name in shown],
    )
    if surveyed.records:
        console.heading("documents by length")
        console.table(*histogram(surveyed, shown))
    if manifest.drops:
        console.heading("dropped")
        console.table(
            ["reason", "documents", "for example"],
            [
                (reason, f"{drop.count:,}", ", ".join(map(repr, drop.examples[:3])))
                for reason, drop in sorted(manifest.drops.items(), key=lambda item: -item[1].count)
            ],
        )
    console.heading(f"samples of {chosen}")
    for number, sample in enumerate(sampled):
        if number:
            console.result("")
        console.result(f"{sample.id}  {sample.tokens:,} tokens")
        console.result(_shown(sample, tokenizer))


def document_command(corpus: str, doc_id: str, *, console: Console, as_json: bool = False) -> None:
    """Prints one document whole, or why the corpus does not have it."""
    manifest = Manifest.load(corpus)
    tokenizer = tokenizer_of(corpus, manifest)
    if not manifest.increments:
        found = document_without_records(corpus, manifest, tokenizer, doc_id)
        if found is None:
            raise UserError(
                f"{corpus}: no document has the id {doc_id!r}; why, a corpus without records does"
                " not know"
            )
        _print_document(*found, None, tokenizer, console, as_json)
        return
    known = fates(corpus, manifest, doc_id)
    if not known:
        like = ", ".join(map(repr, similar_ids(corpus, manifest, doc_id)))
        hint = f"ids that contain it: {like}" if like else "`tvq inspect CORPUS` shows some"
        raise UserError(f"{corpus}: no source had a document with the id {doc_id!r}; {hint}")
    kept = [fate for fate in known if fate.split]
    if kept:
        stored = document(corpus, manifest, tokenizer, kept[0])
        _print_document(kept[0].split, stored, kept[0], tokenizer, console, as_json)
        return
    same = original(corpus, manifest, known[0])
    if as_json:
        console.json({**_fate(known[0]), "same_as": same and same.id})
        return
    why = f": the same as {same.id!r}, which is in {same.split}" if same else ""
    console.result(
        f"{doc_id}  dropped as {known[0].reason}{why}; {known[0].n_bytes:,} bytes of"
        f" {known[0].file}"
    )


def histogram(surveyed: Survey, splits: list[str]) -> tuple[list[str], list[tuple[object, ...]]]:
    """Columns and rows of a table: documents by powers of two of tokens, with bars of them all."""
    lengths = [surveyed.lengths[name].tolist() for name in splits]
    totals = [sum(counts) for counts in zip(*lengths, strict=True)]
    first = next((k for k, total in enumerate(totals) if total), len(totals))
    rows: list[tuple[object, ...]] = []
    for k in range(first, len(totals)):
        bar = "#" * max(round(_BAR * totals[k] / max(totals)), totals[k] > 0)
        counts = [f"{counts[k]:,}" for counts in lengths]
        rows.append((f"{2**k:,} to {2 ** (k + 1) - 1:,}", *counts, bar))
    return ["tokens", *splits, ""], rows


def _print_facts(corpus: str, manifest: Manifest, surveyed: Survey, console: Console) -> None:
    info = manifest.tokenizer
    facts = [("corpus", open_store(corpus).location), ("plan", manifest.plan_id[:16])]
    for number, increment in enumerate(manifest.increments, 1):
        parent = manifest.increments[number - 2].plan_id[:16] if number > 1 else "none"
        count = sum(file.records for file in increment.records)
        train = increment.train_fingerprint[:16]
        described = f"{increment.plan_id[:16]}, parent {parent}, {count:,} records, train {train}"
        facts.append((f"increment {number}", described))
    facts.append(
        (
            "tokenizer",
            f"{info.kind}, {info.vocab_size:,} ids of a model, stored as {info.dtype},"
            f" {info.fingerprint[:16]}",
        )
    )
    if surveyed.records:
        facts.append(
            (
                "sources",
                f"{surveyed.files:,} files, {surveyed.records:,} documents,"
                f" {surveyed.n_bytes / 1e6:,.2f} MB",
            )
        )
    else:
        facts.append(("sources", f"not known: format {manifest.format_version} has no records"))
    if told := _stated_settings(manifest):
        facts.append(("settings", ", ".join(f"{name}={value}" for name, value in told.items())))
    made = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    facts.append(("made with", made or "not known"))
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        console.result(f"{name:{width}}  {value}")


def _stated_settings(manifest: Manifest) -> dict[str, Any]:
    """The settings that are not as they are by default."""
    usual = flat(mathematical(PrepareSettings(SourceSettings(()))))
    return {
        name: value
        for name, value in flat(manifest.settings).items()
        if usual.get(name) != value and name.partition(".")[0] not in _SAID_ELSEWHERE
    }


def _split_row(manifest: Manifest, name: str) -> tuple[object, ...]:
    split = manifest.splits[name]
    ratio = f"{split.n_bytes / split.tokens:.3f}" if split.tokens else "-"
    return (
        name,
        f"{split.documents:,}",
        f"{split.tokens:,}",
        f"{split.n_bytes / 1e6:,.2f}",
        f"{split.n_words:,}",
        ratio,
        f"{len(split.shards):,}",
        split.fingerprint[:16],
    )


def _print_document(
    split: str,
    stored: StoredText,
    fate: Fate | None,
    tokenizer: Tokenizer,
    console: Console,
    as_json: bool,
) -> None:
    if as_json:
        value = {"id": stored.id, "split": split, "tokens": stored.tokens}
        text = stored.text.decode("utf-8", "replace")
        console.json({**(_fate(fate) if fate else value), "text": text})
        return
    size = f"{len(stored.text):,} bytes"
    console.line(f"{stored.id}  in {split}, {stored.tokens:,} tokens, {size}")
    console.line()
    if isinstance(tokenizer, ImageTokenizer):
        console.result(_shown(stored, tokenizer))
    else:
        console.result(readable(stored.text))


def _shown(sample: StoredText, tokenizer: Tokenizer) -> str:
    if isinstance(tokenizer, ImageTokenizer):
        pixels = [sample.text[at : at + 3].hex() for at in range(0, 30, 3)]
        return f"    a picture, its first pixels #{' #'.join(pixels)}"
    return indented(sample.text, _SAMPLE_CHARACTERS)


def _fate(fate: Fate) -> dict[str, Any]:
    value = fate._asdict()
    return value | {"sha256": fate.sha256.hex(), "records": fate.records.path}


def _card(
    corpus: str,
    manifest: Manifest,
    surveyed: Survey,
    splits: list[str],
    sampled: list[StoredText],
) -> dict[str, Any]:
    known = surveyed.records > 0
    return {
        "corpus": open_store(corpus).location,
        "format_version": manifest.format_version,
        "plan_id": manifest.plan_id,
        "increments": [
            {
                "plan_id": increment.plan_id,
                "train_fingerprint": increment.train_fingerprint,
                "records": sum(file.records for file in increment.records),
            }
            for increment in manifest.increments
        ],
        "settings": manifest.settings,
        "tokenizer": dataclasses.asdict(manifest.tokenizer),
        "versions": manifest.versions,
        "sources": {"files": surveyed.files, "n_bytes": surveyed.n_bytes} if known else None,
        "splits": {
            name: {
                **dataclasses.asdict(manifest.splits[name]),
                "shards": len(manifest.splits[name].shards),
                "documents_by_log2_tokens": surveyed.lengths[name].tolist() if known else None,
            }
            for name in splits
        },
        "drops": {reason: dataclasses.asdict(drop) for reason, drop in manifest.drops.items()},
        "samples": [
            {"id": s.id, "tokens": s.tokens, "text": readable(s.text)[:_SAMPLE_CHARACTERS]}
            for s in sampled
        ],
    }
