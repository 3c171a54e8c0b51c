"""The errors that a user reads, and the exit codes that a script reads."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What `tvq` exits with; documented in `tvq --help`."""

    OK = 0
    INTERNAL = 1
    """A defect of tvq: a traceback is shown."""
    USER = 2
    """Bad input: one line says what was expected and what fixes it; nothing was changed."""
    BUSY = 3
    """Another process holds the run."""
    FAILED = 4
    """The training failed, after its restarts; the same command goes on from its checkpoint."""
    UNSTABLE = 5
    """The training went back to its checkpoint again and again and could apply no update."""
    PREEMPTED = 6
    """SIGTERM, a stop request or Ray's preemption notice: saved, unless the message says otherwise;
    the same command goes on."""
    INTERRUPTED = 130
    """Ctrl-C: what was done is kept and the same command goes on."""


class UserError(Exception):
    """A mistake that the user can mend; its text is the whole message.

    States what was wrong, where, what was expected, and the command or field that fixes it.
    """

    def __init__(self, message: str, code: ExitCode = ExitCode.USER):
        super().__init__(message, code)  # both, so that it survives the way from a worker
        self.code = code

    def __str__(self) -> str:
        return self.args[0]
