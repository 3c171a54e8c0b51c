"""What an error of a library that reads or writes checkpoints says of the store behind it."""

import re

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
