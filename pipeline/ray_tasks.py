"""Tasks on Ray Data; the only file of this package that imports Ray.

A shard plan, not Ray Data's own readers and writers: no task sees another's data, so what is
written does not depend on blocks, CPUs or order, and a range that is finished stays finished when
everything is killed.
"""

import contextlib
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.data

from pipeline.errors import CorpusError


def run_tasks(
    function: Callable[..., Any], payloads: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[int, Any]]:
    """Call `function` on each payload in a Ray task of its own; yields (index, result) as they end.

    Ray must be initialised. Payloads and results travel pickled, so that Ray Data sees plain
    columns. An error that a user can mend travels as text: Ray would wrap it in pages of traceback.
    """
    rows = [{"index": i, "payload": pickle.dumps(payload)} for i, payload in enumerate(payloads)]

    def call(row: dict[str, Any]) -> dict[str, Any]:
        result, error = None, ""
        try:
            result = function(*pickle.loads(row["payload"]))
        except CorpusError as mistake:
            error = str(mistake)
        except OSError as failure:
            error = f"{failure.filename or 'the output'}: {failure.strerror or failure}"
        return {"index": row["index"], "result": pickle.dumps(result), "error": error}

    # One block a row: a task that fails or is killed takes no other range with it.
    with _quiet_ray_data():
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(call, num_cpus=1)
        for row in dataset.iter_rows():
            if row["error"]:
                raise CorpusError(row["error"])
            yield int(row["index"]), pickle.loads(row["result"])


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Keep Ray Data from writing to the caller's terminal; give its settings back afterwards."""
    context = ray.data.DataContext.get_current()
    logger = logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        logger.setLevel(level)
