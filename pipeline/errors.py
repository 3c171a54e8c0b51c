"""The one error that this package raises for a mistake that its user can mend."""

# A file may have any of them in its name, and an error is one line.
_CONTROLS = {code: ascii(chr(code))[1:-1] for code in (*range(32), 127)}


class CorpusError(Exception):
    """A corpus cannot be prepared or read. One line: what is wrong, where, and what mends it."""

    def __init__(self, message: str) -> None:
        super().__init__(message.translate(_CONTROLS))


class PassingFaultError(CorpusError):
    """A store did not answer as it should; the same request may succeed later."""


class NewerFormatError(CorpusError):
    """A corpus was written by a later version of this program and must not be touched by this."""
