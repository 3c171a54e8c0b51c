"""`tvq prepare`: text files to a corpus, with progress."""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.console import Console
from jobs.errors import UserError
from jobs.ray_session import ray_session
from pipeline.corpus_folder import check_output
from pipeline.manifest import Manifest
from pipeline.sources import SourceSettings, list_documents, standard_library

if TYPE_CHECKING:
    from pipeline.prepare import Prepared, PrepareSettings


def prepare_command(
    sources: tuple[str, ...],
    *,
    output: Path,
    stdlib: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    validation_fraction: float,
    test_fraction: float,
    console: Console,
    as_json: bool,
) -> None:
    """Prepares what the command line asks for and says what came of it."""
    if stdlib == bool(sources):
        raise UserError("expected either SOURCES (files or folders) or --stdlib")
    if stdlib and (include or exclude):
        raise UserError("--stdlib chooses its files itself; leave out --include and --exclude")
    source = standard_library()
    if sources:
        source = SourceSettings(sources, include or ("**/*",), exclude)
    # What a user may have got wrong is said before Ray is loaded, which takes seconds.
    list_documents(source)
    check_output(output)
    from pipeline.prepare import PrepareSettings

    settings = PrepareSettings(
        source=source,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
    )
    prepared = prepare_corpus(settings, output, console)
    if as_json:
        console.json(
            {
                "corpus": str(output.absolute()),
                "reused": prepared.reused,
                "resumed_shards": prepared.resumed_shards,
                "plan_id": prepared.manifest.plan_id,
                "splits": {
                    name: {**dataclasses.asdict(split), "shards": len(split.shards)}
                    for name, split in prepared.manifest.splits.items()
                },
                "dropped": {k: len(ids) for k, ids in prepared.manifest.drops.items()},
            }
        )


def prepare_corpus(settings: "PrepareSettings", output: Path, console: Console) -> "Prepared":
    """Prepares a corpus on a Ray cluster of this machine and describes it."""
    from pipeline.prepare import prepare

    began = time.monotonic()
    with ray_session(None, cpus=1), console.progress("read") as progress:
        labels = {"scan": "read", "write": "write"}
        prepared = prepare(
            settings,
            output,
            lambda at: progress.update(
                at.done,
                total=at.total,
                label=labels[at.stage],
                note=f"{at.documents:,} documents  {at.n_bytes / 1e6:.1f} MB",
            ),
        )
    describe(prepared.manifest, output, console)
    if prepared.reused:
        console.line("nothing changed: the corpus that was there is used as it is")
    else:
        resumed = prepared.resumed_shards
        again = f", {resumed} shards were there from an interrupted prepare" if resumed else ""
        console.line(f"prepared in {time.monotonic() - began:.0f} s{again}")
    return prepared


def describe(manifest: Manifest, output: Path, console: Console) -> None:
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
    if dropped := {reason: len(ids) for reason, ids in manifest.drops.items() if ids}:
        console.line(
            "dropped: " + ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        )
    console.line(f"corpus    {output.absolute()}")
