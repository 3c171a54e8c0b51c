"""An evaluation as a reader of the terminal sees it."""

from pathlib import Path

from jobs.console import Console
from jobs.evaluation.bootstrap import LEAST
from jobs.evaluation.record import Evaluation
from jobs.evaluation.yardsticks import Yardsticks


def print_evaluation(
    figures: Evaluation, yardstick: Yardsticks, dump: Path | None, console: Console
) -> None:
    """Says how much was scored, how well, and what compressors make of the same text."""
    how = (
        f"the cache carried through each document, {figures.length:,} at a time"
        if figures.carry
        else f"in {figures.windows:,} windows of {figures.length:,}"
    )
    console.line(
        f"{figures.run} at update {figures.update} on the {figures.split} split:"
        f" {len(figures.documents):,} documents, {figures.n_bytes:,} bytes,"
        f" {figures.targets:,} targets, each once, {how}, at"
        f" {figures.tokens_per_second:,.0f} tokens/s"
    )
    drawn = f"{len(figures.blocks):,} {figures.blocks.kind}"
    interval = figures.bits_per_byte_interval
    sure = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "-"
    rows = [
        (figures.run, f"{figures.bits_per_byte:.3f}", sure),
        *(
            (f"  on {name}", f"{bits:.3f}", "")
            for name, bits in figures.corpora.items()
            if len(figures.corpora) > 1
        ),
        ("xz -9e", f"{yardstick.xz:.3f}", ""),
        ("gzip -9", f"{yardstick.gzip:.3f}", ""),
    ]
    console.table(["", "bits per byte", "95% interval"], rows)
    console.line(
        f"the interval is a bootstrap's over {drawn}"
        if interval
        else f"no interval: {drawn} are fewer than {LEAST}"
    )
    words = figures.word_perplexity
    console.result(
        f"{figures.nats_per_token:.4f} nats/token; accuracy {figures.accuracy:.1%}"
        + (f"; word perplexity {words:,.1f} ({figures.n_words:,} words)" if words else "")
    )
    console.line()
    console.table(
        ["tokens before", "targets", "nats/token"],
        [
            (
                f"{bucket.begin:,} to {bucket.end - 1:,}",
                f"{bucket.targets:,}",
                f"{bucket.nats / bucket.targets:.4f}",
            )
            for bucket in figures.positions
        ],
    )
    if dump:
        console.line(f"log-probabilities of all {figures.targets:,} targets are in {dump}")
