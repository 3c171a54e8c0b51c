"""What an error of a library that reads or writes checkpoints says of the store behind it."""

import logging
import re
import sys
from collections.abc import Callable
from typing import Any

from pipeline import google_storage
from pipeline.errors import CorpusError, PassingFaultError

_PASSING = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|Timeout|timed out"
    r"|ServerDisconnected|ClientConnector|ClientOSError|Connection reset"
)
"""Codes of tensorstore, and what gcsfs and Orbax call a store that does not answer."""
_REFUSED = re.compile(r"PERMISSION_DENIED|UNAUTHENTICATED|Forbidden")


def may_pass(error: BaseException) -> bool:
    """Whether the store was not well, so that the same may succeed later."""
    if isinstance(error, CorpusError):
        return isinstance(error, PassingFaultError)
    if isinstance(error, Exception) and google_storage.passing(error):
        return True
    return bool(_PASSING.search(f"{error!r}"))


def of_the_store(error: BaseException) -> bool:
    """Whether the store is the trouble, and not what it holds."""
    return may_pass(error) or bool(_REFUSED.search(f"{error!r}"))


def quiet_failed_saves() -> None:
    """Leaves it to us to say that a save failed, in one line.

    Else asyncio and absl log the traceback of every array of it, and tensorstore prints one for
    every array of which it cannot tell Orbax any more, whose event loop is closed after the first.
    """
    for library in ("asyncio", "absl"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if not isinstance(sys.unraisablehook, _WithoutClosedLoops):
        sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)


class _WithoutClosedLoops:
    def __init__(self, shown: Callable[[Any], Any]):
        self._shown = shown

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._shown(unraisable)
