"""Everything the commands print.

On a terminal: headings, tables and one live progress line. Anywhere else (a pipe, a file, CI):
plain lines without escape codes, never wrapped, with a progress line every ten seconds at most.
"""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_RATE_SAMPLES = 30
_RATE_SECONDS = 0.25
_BAR_COLUMNS = 16


class Console:
    """Prints for one command.

    Policy: `line`, `heading`, and progress narrate and are silent with `quiet`; `result`, `table`
    and `json` are what the command was asked for and always go to `stdout`; `warning` always goes
    to `stderr`. Text is printed as it is: no markup is read in it. Methods may be called from
    several threads; on a terminal they print above the progress line.
    """

    def __init__(
        self,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        *,
        quiet: bool = False,
        progress_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stdout = stdout if stdout is not None else sys.stdout
        self._stderr = stderr if stderr is not None else sys.stderr
        self._rich = _rich_console(self._stdout)
        self._rich_errors = _rich_console(self._stderr)
        self._progress_seconds = progress_seconds
        self._clock = clock
        self.quiet = quiet

    @property
    def live(self) -> bool:
        """Whether stdout is a terminal that can redraw a line."""
        return self._rich.is_terminal and not self._rich.is_dumb_terminal

    def heading(self, title: str) -> None:
        """Begins a stage: `== prepare`, with an empty line before it."""
        if not self.quiet:
            self._write("")
            self._write(f"== {title}", style="bold cyan")

    def line(self, text: str = "") -> None:
        """One line of narration."""
        if not self.quiet:
            self._write(text)

    def result(self, text: str) -> None:
        """Text that was asked for."""
        self._write(text)

    def write(self, text: str) -> None:
        """Another process's output, as it comes: no line break is added."""
        self._stdout.write(text)
        self._stdout.flush()

    def json(self, value: Any) -> None:
        """`value` as one JSON document. NaN and infinities, which JSON lacks, become null."""
        self._stdout.write(json.dumps(_finite(value), indent=2, ensure_ascii=True) + "\n")
        self._stdout.flush()

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        *,
        title: str | None = None,
        texts: Collection[str] = (),
    ) -> None:
        """A table; columns whose cells are all numbers, a unit allowed, are set to the right, but
        for those in `texts`."""
        cells = [[str(cell) for cell in row] for row in rows]
        right = [
            bool(cells) and name not in texts and all(_is_number(row[index]) for row in cells)
            for index, name in enumerate(columns)
        ]
        if title:
            self._write(title, style="bold")
        if self.live:
            table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
            for name, to_right in zip(columns, right, strict=True):
                table.add_column(
                    Text(name), justify="right" if to_right else "left", overflow="fold"
                )
            for row in cells:
                table.add_row(*map(Text, row))
            self._rich.print(table)
            return
        for text in _aligned([list(columns), *cells], right):
            self._write(text)

    def warning(self, text: str) -> None:
        """Something the reader should know that stops nothing: `warning: TEXT` on stderr."""
        self._write(f"warning: {text}", style="yellow", to=self._rich_errors)

    def training(self, total: int) -> "Progress":
        """The progress line of a training of `total` updates; use it in a `with`."""
        return Progress(self, "update", total)

    def progress(self, label: str, total: int = 0) -> "Progress":
        """A progress line, e.g. `read 12/40`; `total` 0: not known yet. Use it in a `with`."""
        return Progress(self, label, total)

    def _write(self, text: str, style: str = "", to: RichConsole | None = None) -> None:
        to = to or self._rich
        if to.is_terminal:
            to.print(Text(text, style=style), soft_wrap=True, highlight=False)
            return
        try:
            to.file.write(text + "\n")
        except UnicodeEncodeError:
            encoding = getattr(to.file, "encoding", None) or "ascii"
            to.file.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        to.file.flush()


class Progress:
    """One line that says how far a stage is; made by `Console.training` and `Console.progress`.

    Policy: the remaining time comes from the last 30 observations at least 0.25 s apart (metric
    points arrive in bursts), so that it forgets a pause (a compilation). A step back, which is a
    resumed training repeating what came after its checkpoint, begins the measurement anew.
    """

    def __init__(self, console: Console, label: str, total: int) -> None:
        self._console = console
        self._label = label
        self._total = total
        self._done = 0
        self._facts: list[str] = []
        self._samples: deque[tuple[float, int]] = deque(maxlen=_RATE_SAMPLES)
        self._printed_at: float | None = None
        self._printed = ""
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.live and not self._console.quiet:
            self._live = Live(
                get_renderable=self._render,
                console=self._console._rich,
                refresh_per_second=5,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if self._samples:
            self._print_plain()

    def update(
        self,
        done: int,
        *,
        total: int | None = None,
        label: str | None = None,
        nats_per_token: float | None = None,
        bits_per_byte: float | None = None,
        tokens_per_second: float | None = None,
        note: str = "",
    ) -> None:
        """States how much is done, with what there is to say about it.

        `tokens_per_second` counts unmasked target tokens of the whole training, on all devices.
        """
        now = self._console._clock()
        if self._samples and done < self._done:
            self._samples.clear()
        self._done = done
        self._total = self._total if total is None else total
        self._label = label or self._label
        if not self._samples or now - self._samples[-1][0] >= _RATE_SECONDS:
            self._samples.append((now, done))
        self._facts = []
        if nats_per_token is not None:
            self._facts.append(f"loss {nats_per_token:.4f} nats/token")
        if tokens_per_second is not None:
            self._facts.append(f"{tokens_per_second:,.0f} tokens/s")
        if bits_per_byte is not None:
            self._facts.append(f"{bits_per_byte:.3f} bits/byte")
        if note:
            self._facts.append(note)
        if self._live is None and self._due(now):
            self._printed_at = now
            self._print_plain()

    def remaining_seconds(self) -> float | None:
        """Seconds to the end at the present rate; None while no rate is known."""
        if len(self._samples) < 2 or not self._total:
            return None
        (time_0, done_0), (time_1, done_1) = self._samples[0], self._samples[-1]
        if done_1 <= done_0 or time_1 <= time_0:
            return None
        return (self._total - self._done) * (time_1 - time_0) / (done_1 - done_0)

    def text(self) -> str:
        """The line, e.g. `update 40/200  ETA 0:31  loss 2.3104 nats/token  14,200 tokens/s`.

        The least important comes last: a narrow terminal cuts it off.
        """
        parts = [self._position()]
        remaining = self.remaining_seconds()
        if remaining is not None and self._done < self._total:
            parts.append(f"ETA {clock_time(remaining)}")
        return "  ".join([*parts, *self._facts])

    def _position(self) -> str:
        total = f"/{self._total:,}" if self._total else ""
        return f"{self._label} {self._done:,}{total}"

    def _due(self, now: float) -> bool:
        return self._printed_at is None or now - self._printed_at >= self._console._progress_seconds

    def _print_plain(self) -> None:
        text = self.text()
        if text != self._printed:
            self._printed = text
            self._console.line(text)

    def _render(self) -> Table:
        text = self.text()
        line = Table.grid(padding=(0, 1))
        line.add_column(no_wrap=True)
        if _BAR_COLUMNS + 1 + len(text) > self._console._rich.width:
            line.add_row(Text(text, overflow="ellipsis"))
            return line
        line.add_column(no_wrap=True)
        bar = ProgressBar(total=self._total or None, completed=self._done, width=_BAR_COLUMNS)
        line.add_row(bar, Text(text))
        return line


def clock_time(seconds: float) -> str:
    """A duration as a reader wants it: `0:42`, `3:07`, `1:02:45`."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _rich_console(stream: TextIO) -> RichConsole:
    # isatty decides, not rich: FORCE_COLOR and CI variables would put escape codes into pipes.
    terminal = stream.isatty()
    return RichConsole(file=stream, force_terminal=terminal, markup=False, highlight=False)


def _is_number(cell: str) -> bool:
    head = cell.partition(" ")[0].replace(",", "").rstrip("%")
    if cell in ("", "-"):
        return True
    try:
        float(head)
    except ValueError:
        return False
    return True


def _aligned(rows: list[list[str]], right: list[bool]) -> list[str]:
    widths = [max(len(row[index]) for row in rows) for index in range(len(right))]
    lines = []
    for row in rows:
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    return lines


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
