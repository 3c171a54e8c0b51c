"""`tvq verify`: every byte of a corpus, held against what its manifest says."""

import time

from jobs.console import Console
from pipeline.storage import open_store
from pipeline.verification import Reading, verify


def verify_command(corpus: str, *, console: Console, as_json: bool) -> None:
    """Reads it all; a corpus that is not as it was written is a `CorpusError`."""
    began = time.monotonic()
    with console.progress("shard") as progress:

        def report(at: Reading) -> None:
            rate = at.n_bytes / 1e6 / max(time.monotonic() - began, 1e-9)
            note = f"{at.n_bytes / 1e6:,.1f} MB  {rate:,.1f} MB/s"
            progress.update(at.shards, total=at.n_shards, note=note)

        verified = verify(corpus, report)
    if as_json:
        console.json({"corpus": open_store(corpus).location, **verified._asdict()})
        return
    records = f", {verified.records:,} records" if verified.records else ""
    console.result(
        f"{verified.shards:,} shards, {verified.documents:,} documents,"
        f" {verified.n_bytes / 1e6:,.1f} MB{records}: all as written"
    )
