"""What our own loggers say, where `caplog` misses it: `open_log` ends the propagation."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def logged(name: str, level: int) -> Iterator[list[str]]:
    """The messages of the logger of that name while the body runs, from that level on."""
    messages: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
