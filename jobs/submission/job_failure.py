"""Why a job failed, of its log: what its reader needs first comes first."""

import re
import signal
from collections.abc import Sequence

from jobs.errors import ExitCode

_PACKAGES = ("pipeline", "model", "jobs")
_FRAME = re.compile(r'  File "(?P<path>[^"]+)", line (?P<line>\d+), in (?P<name>.+)')
_LAST_LINES = 10
_BY_SIGNAL = 128


def failure(log: str, code: int) -> list[str]:
    """The reason in as few lines as it takes, the error itself first.

    Of what was killed only the signal is known, by the `code` of its shell. `tvq` prints a user's
    mistake as one line. Of a traceback: the exception, then the frames in tvq's own code, the
    innermost first; those of frameworks are counted. Else the last lines.
    """
    if (killer := _killer(code)) is not None:
        memory = ", perhaps since memory was short" if killer == signal.SIGKILL else ""
        return [f"killed by {killer.name}{memory}; submit it again to go on"]
    lines = log.rstrip().splitlines()
    traceback = _last(lines, "Traceback (most recent call last):")
    error = _last(lines, "error: ")
    if error is not None and (traceback is None or error > traceback):
        return [lines[error].strip()]
    if traceback is None:
        return lines[-_LAST_LINES:]
    body = lines[traceback + 1 :]
    ends = [n for n, line in enumerate(body) if line and not line.startswith(" ")]
    if not ends:
        return lines[-_LAST_LINES:]
    frames = [match for line in body[: ends[0]] if (match := _FRAME.match(line))]
    ours = [match for match in frames if _is_ours(match["path"])]
    shown = [f"  in {m['name']} ({_short(m['path'])}:{m['line']})" for m in reversed(ours)]
    others = len(frames) - len(ours)
    return [
        body[ends[0]],
        *shown,
        *([f"  and {others} frame{'s' * (others > 1)} of libraries"] if others else []),
    ]


def _killer(code: int) -> signal.Signals | None:
    """The signal that a shell's exit code tells of."""
    number = code - _BY_SIGNAL
    known = number in set(signal.Signals) and code != ExitCode.INTERRUPTED
    return signal.Signals(number) if known else None


def _last(lines: Sequence[str], start: str) -> int | None:
    found = [n for n, line in enumerate(lines) if line.lstrip().startswith(start)]
    return found[-1] if found else None


def _is_ours(path: str) -> bool:
    return "site-packages/ray" not in path and any(f"/{each}/" in path for each in _PACKAGES)


def _short(path: str) -> str:
    parts = path.split("/")
    begins = [n for n, part in enumerate(parts) if part in _PACKAGES]
    return "/".join(parts[begins[-1] :])
