"""`tvq inspect --diff`: what differs between two corpora, in words."""

from typing import Any

from jobs.console import Console
from pipeline.corpus_difference import Change, Difference, difference
from pipeline.storage import open_store


def difference_command(
    here: str, there: str, *, console: Console, as_json: bool = False
) -> Difference:
    """Prints what differs, and why the fingerprints of the splits do."""
    found = difference(here, there)
    if as_json:
        console.json(_as_json(here, there, found))
        return found
    console.line(f"here   {open_store(here).location}")
    console.line(f"there  {open_store(there).location}")
    if found.same:
        console.result(
            "the same: a training on one is a training on the other; tokenizer and fingerprints of"
            " all splits agree"
        )
    if found.splits:
        console.heading("fingerprints that differ")
        console.table(
            ["split", "here", "there"],
            [(split.name, split.here[:16], split.there[:16]) for split in found.splits],
        )
    _print_increments(found, console)
    for title, unequal in (
        ("tokenizers differ", found.tokenizer),
        ("settings that differ", found.settings),
        ("versions that differ", found.versions),
    ):
        if unequal:
            console.heading(title)
            console.table(
                ["", "here", "there"],
                [(one.name, _value(one.here), _value(one.there)) for one in unequal],
            )
    _print_records(found, console)
    return found


def _print_increments(found: Difference, console: Console) -> None:
    if found.ancestor is not None:
        older, number = found.ancestor
        newer = "here" if older == "there" else "there"
        console.result(
            f"the corpus {older} is what the one {newer} was after increment {number} of"
            f" {max(found.increments)}"
        )
    elif found.increments[0] != found.increments[1] and not found.not_compared:
        console.result(
            f"made in {found.increments[0]} increments here, {found.increments[1]} there"
        )


def _print_records(found: Difference, console: Console) -> None:
    if found.not_compared:
        which = " and the one ".join(found.not_compared)
        console.result(
            f"documents were not compared: the corpus {which} has no records (format 1); prepare it"
            " again"
        )
        return
    assert found.sources is not None
    sources = found.sources
    if sources["here"] or sources["there"]:
        console.result(
            f"sources: {sources['both']:,} in both, {sources['here']:,} only here,"
            f" {sources['there']:,} only there"
        )
    if found.tokenizer:
        console.result("all documents have other tokens: the tokenizers are not the same")
    for name in found.reordered:
        console.result(f"{name}: the same documents, in another order")
    if found.records:
        console.heading("documents that differ")
        console.table(
            ["documents", "how", "for example"],
            [
                (
                    f"{changed.count:,}",
                    _described(change),
                    ", ".join(map(repr, changed.examples[:3])),
                )
                for change, changed in found.records.items()
            ],
        )


def _described(change: Change) -> str:
    if change.what == "only here":
        return f"only here: {change.here}"
    if change.what == "only there":
        return f"only there: {change.there}"
    if change.what == "fate":
        return f"{change.here} here, {change.there} there"
    where = change.here if change.here == change.there else f"{change.here}, {change.there} there"
    return f"other {change.what}: {where}"


def _value(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:  # a fingerprint
        return value[:16]
    return "-" if value is None else str(value)


def _as_json(here: str, there: str, found: Difference) -> dict[str, Any]:
    return {
        "here": open_store(here).location,
        "there": open_store(there).location,
        "same": found.same,
        "splits": [one._asdict() for one in found.splits],
        "tokenizer": [one._asdict() for one in found.tokenizer],
        "settings": [one._asdict() for one in found.settings],
        "versions": [one._asdict() for one in found.versions],
        "sources": found.sources,
        "documents": [
            {**change._asdict(), "count": changed.count, "examples": changed.examples}
            for change, changed in found.records.items()
        ],
        "reordered": found.reordered,
        "increments": {"here": found.increments[0], "there": found.increments[1]},
        "ancestor": found.ancestor
        and {"which": found.ancestor[0], "after_increment": found.ancestor[1]},
        "not_compared": found.not_compared,
    }
