"""The batches that a run's ledger lists as skipped."""

from jobs.runs.ledger import SkippedBatch, skipped_batch
from pipeline.storage import Store


def skipped_batches(store: Store) -> list[SkippedBatch]:
    """All of them, in order; `store` is the run directory's."""
    names = [entry.name for entry in store.list("ledger") if "/skipped-" in entry.name]
    found = [skipped_batch(store, int(name.rpartition("-")[2].split(".")[0])) for name in names]
    return [batch for batch in found if batch]
