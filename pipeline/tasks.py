"""Run the tasks of a stage of `prepare`, wherever the caller says, and report how far it is."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

Run = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[tuple[int, Any]]]
"""Calls a function on each of the payloads, in any order; yields (index, result) as they end."""


def run_here(
    function: Callable[..., Any], payloads: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[int, Any]]:
    """One after the other, in this process."""
    for index, payload in enumerate(payloads):
        yield index, function(*payload)


class Progress(NamedTuple):
    """How far `prepare` is; reported after each finished range."""

    stage: str
    """`scan`, `write`, and where they are wanted `held-out` and `tokenizer`."""
    done: int
    """Ranges finished."""
    total: int
    records: int
    """Of the ranges finished, where they are counted."""
    n_bytes: int
    """Source bytes of the ranges finished."""
    total_bytes: int
    """Of all ranges."""


class Tasks(NamedTuple):
    """Where tasks run, and who is told."""

    run: Run
    report: Callable[[Progress], None]

    def stage(
        self,
        name: str,
        function: Callable[..., Any],
        payloads: Sequence[tuple[Any, ...]],
        sizes: Sequence[int],
        count: Callable[[Any], int] = lambda _: 0,
    ) -> Iterator[tuple[int, Any]]:
        """Yield (index, result) as they end, one for each payload; none need no stage.

        `sizes` are the source bytes of each, and `count` tells the records from a result.
        """
        if not payloads:
            return
        done = n_records = n_bytes = 0
        self.report(Progress(name, 0, len(sizes), 0, 0, sum(sizes)))
        for index, result in self.run(function, payloads):
            done, n_bytes = done + 1, n_bytes + sizes[index]
            n_records += count(result)
            self.report(Progress(name, done, len(sizes), n_records, n_bytes, sum(sizes)))
            yield index, result
