"""A Ray Train worker while the loop runs in it: what it is told, and how it ends.

Ray runs the loop in a thread of the worker's process and calls into the process from another.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jobs.errors import UserError
from jobs.runs import run_log
from jobs.training.loop_contract import LoopSettings, Outcome
from jobs.training.stopping import StopReason
from model.config import ConfigError

log = logging.getLogger("tvq.ray_worker")

_resize, _ended = threading.Event(), threading.Event()


def run_loop_in_worker(config: dict[str, LoopSettings]) -> Outcome | UserError:
    """Trains; an error that the user can mend is returned, as all workers find it.

    Raises:
        UserError: this worker alone found it.
    """
    # JAX belongs to the worker: the driver and Ray's controller import this module, not the loop.
    from jobs.training.loop import train

    settings = config["settings"]
    ended: Outcome | UserError
    try:
        with ends_when_stalled(settings.recipe.cluster.stall_seconds) as alive:

            def notice() -> StopReason:
                alive()
                return _notice()

            ended = train(settings, notice)
    except (UserError, ConfigError) as error:
        ended = error if isinstance(error, UserError) else UserError(str(error))
    finally:
        _ended.set()
    if not _left_together() and isinstance(ended, UserError):
        raise ended
    return ended


def save_and_end(seconds: float) -> bool:
    """Asks the loop in this process to save and end; whether it did within so many seconds."""
    _resize.set()
    return _ended.wait(seconds)


def _notice() -> StopReason:
    from ray.train.v2._internal.execution.context import get_train_context

    # What Ray told this worker. ray.train.get_preemption_info() tells all workers what it told the
    # first, by a barrier of 10 ms; ours comes to all of them in the update's own reduction.
    if get_train_context().preemption_context.preemption_info is not None:
        return StopReason.PREEMPTED
    return StopReason.RESIZED if _resize.is_set() else StopReason.NONE


@contextlib.contextmanager
def ends_when_stalled(
    seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    end: Callable[[int, int], Any] = os.kill,
) -> Iterator[Callable[[], None]]:
    """Kills this process where what is yielded is not called for so long.

    For collectives that wait for ever while every process is alive, which no heartbeat notices.
    """
    called, over = [clock()], threading.Event()

    def watch() -> None:
        while not over.wait(min(seconds / 10, 10)):
            if clock() - called[0] > seconds:
                log.error(
                    "no batch was begun for %g s (cluster.stall_seconds): this worker ends itself,"
                    " and the group starts anew", seconds,
                )  # fmt: skip
                run_log.event("stalled", worker_pid=os.getpid())
                end(os.getpid(), signal.SIGKILL)
                return

    def alive() -> None:
        called[0] = clock()

    threading.Thread(target=watch, name="stall", daemon=True).start()
    try:
        yield alive
    finally:
        over.set()


def _left_together() -> bool:
    """Leaves the mesh; whether all others did too, within the limit that they joined with."""
    import jax

    if not jax.distributed.is_initialized():
        return True
    try:
        jax.distributed.shutdown()
    except Exception as error:
        log.warning("the other workers do not end: %r", error)
        return False
    return True
