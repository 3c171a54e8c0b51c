"""The one error that this package raises for a mistake that its user can mend."""


class CorpusError(Exception):
    """A corpus cannot be prepared or read. One line: what is wrong, where, and what mends it."""


class NewerFormatError(CorpusError):
    """A corpus was written by a later version of this program and must not be touched by this."""
