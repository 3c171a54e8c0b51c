"""Prepare a corpus, in two passes.

The files are cut in *ranges*. Pass 1 (`scanning`) reads each record once: its size, its hash, a
reason to drop it. The driver then decides duplicates and splits (`selection`). Pass 2 (`writing`)
is a shard plan: one task a range, which reads its documents again, refuses them if they changed,
and writes at most one shard a split.

The tasks run on Ray Data (`ray_tasks`), or wherever the caller says. New files become an
increment: ranges of their own, behind those that are there, for training.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from pipeline.assembly import assemble
from pipeline.building import Builder, ChangedError, increments
from pipeline.corpus_folder import check_output, claim, old_manifest, save_listing, tidy
from pipeline.formats import survey
from pipeline.manifest import Manifest
from pipeline.plan import PrepareSettings
from pipeline.sources import list_files
from pipeline.storage import Location, open_store
from pipeline.tasks import Progress, Run, Tasks

__all__ = ["PrepareSettings", "Prepared", "Progress", "prepare"]


class Prepared(NamedTuple):
    """What `prepare` did."""

    manifest: Manifest
    reused: bool
    """The corpus was already there, whole, from the same inputs and settings."""
    resumed_shards: int
    """Shards of this plan that were there, from an interrupted run or an earlier increment."""
    rebuilt: str | None
    """Why held-out splits that were there have been drawn anew, if they have."""


def prepare(
    settings: PrepareSettings,
    output: Location,
    run: Run,
    progress: Callable[[Progress], None] | None = None,
    *,
    refresh_held_out: bool = False,
) -> Prepared:
    """Make the corpus in the folder `output`, or find it there; `run` is called for work to do.

    The same inputs and settings give the same bytes on any number of CPUs and after any
    interruption; an interrupted run is taken up where it stopped. Where there is a corpus, files
    that are new are added to train, and its held-out splits stay, unless `refresh_held_out`, or a
    file that it was made of has changed or gone. The older corpus stays readable until the new one
    is complete.

    Raises `CorpusError`, and then leaves an older corpus as it is, for settings or sources that
    cannot be used, for a file that changes meanwhile, and for a folder that is not a corpus.
    """
    settings.check()
    store = open_store(output)
    check_output(store)
    files = list_files(settings.source)
    form = survey(settings.format, ((file.id, file.open) for file in files))
    settings = dataclasses.replace(settings, format=form)
    with claim(store) as confirm:
        old = old_manifest(store)
        parts, rebuilt = [files], None
        if old is not None and not refresh_held_out:
            parts, rebuilt = increments(store.location, old, files)
        tasks = Tasks(run, progress or (lambda _: None))
        known = old if rebuilt is None else None
        try:
            built = Builder(settings, store.location, known, files, tasks).build(parts)
        except ChangedError as changed:
            parts, rebuilt = [files], str(changed)
            built = Builder(settings, store.location, None, files, tasks).build(parts)
        if built.manifest is not None:
            manifest = built.manifest
        else:
            manifest = assemble(settings, store.location, built)
            confirm()
            manifest.save(store.location)
        save_listing(store, manifest.plan_id, parts)
        tidy(store, manifest)
        return Prepared(manifest, manifest is old, built.resumed_shards, rebuilt)
