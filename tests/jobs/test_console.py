"""What the commands print, on a terminal (a real one: a pty) and in a pipe."""

import contextlib
import io
import json
import math
import os
import pty
import re
import threading
from collections.abc import Callable

import pytest

from jobs.console import Console, clock_time

ESCAPE = "\x1b"


class Pipe:
    """A console whose streams are no terminals, and a clock that is set by hand."""

    def __init__(self, **options: bool) -> None:
        self.out, self.err, self.now = io.StringIO(), io.StringIO(), 1000.0
        self.console = Console(self.out, self.err, clock=lambda: self.now, **options)

    def lines(self) -> list[str]:
        return self.out.getvalue().splitlines()


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Pipe:
    monkeypatch.setenv("COLUMNS", "40")
    # What CI services set, and rich would obey: still no escape codes in a pipe.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    return Pipe()


def on_a_terminal(act: Callable[[Console], None], columns: int = 80) -> str:
    """What `act` writes to a terminal of that width."""
    ours, theirs = pty.openpty()
    os.environ["COLUMNS"], before = str(columns), os.environ.get("COLUMNS")
    received: list[bytes] = []

    def receive() -> None:
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:
                return
            if not chunk:
                return
            received.append(chunk)

    reader = threading.Thread(target=receive)
    reader.start()
    try:
        with os.fdopen(theirs, "w", encoding="utf-8") as stream:
            act(Console(stream, stream))
    finally:
        reader.join()
        os.close(ours)
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before
    return b"".join(received).decode()


def test_plain_lines_are_what_was_said_however_long_and_odd(pipe: Pipe):
    path = "/a path/with spaces/" + "x" * 300 + "/[bold]run[/bold]/:smile:"
    pipe.console.heading("prepare")
    pipe.console.line(f"corpus {path}")
    pipe.console.result("done")
    assert pipe.lines() == ["", "== prepare", f"corpus {path}", "done"]
    pipe.console.warning("slow")
    assert pipe.err.getvalue() == "warning: slow\n"


def test_quiet_leaves_results_and_warnings():
    pipe = Pipe(quiet=True)
    pipe.console.heading("prepare")
    pipe.console.line("narration")
    with pipe.console.training(10) as progress:
        progress.update(10)
    pipe.console.result("2.05 bits/byte")
    pipe.console.table(["a"], [[1]])
    pipe.console.json({"a": 1})
    pipe.console.warning("w")
    assert pipe.lines()[:3] == ["2.05 bits/byte", "a", "1"]
    assert json.loads("\n".join(pipe.lines()[3:])) == {"a": 1}
    assert pipe.err.getvalue() == "warning: w\n"


def test_a_plain_table_is_aligned_with_numbers_to_the_right(pipe: Pipe):
    pipe.console.table(
        ["run", "updates", "loss"],
        [["demo", "1,200", "2.31 nats"], ["/a/" + "long" * 20, "-", "10.02 nats"]],
        title="Runs",
    )
    long = "/a/" + "long" * 20
    assert pipe.lines() == [
        "Runs",
        "run".ljust(len(long)) + "  updates        loss",
        "demo".ljust(len(long)) + "    1,200   2.31 nats",
        long + "        -  10.02 nats",
    ]


def test_an_empty_table_is_its_header(pipe: Pipe):
    pipe.console.table(["run", "loss"], [])
    assert pipe.lines() == ["run  loss"]


def test_json_has_no_nan(pipe: Pipe):
    pipe.console.json({"a": [math.nan, 1.5, (math.inf,)], "b": {"c": "ä"}})
    assert json.loads(pipe.out.getvalue(), parse_constant=pytest.fail) == {
        "a": [None, 1.5, [None]],
        "b": {"c": "ä"},
    }


def test_plain_progress_is_a_line_each_ten_seconds_and_one_at_the_end(pipe: Pipe):
    with pipe.console.training(1200) as progress:
        for update in range(1, 1201):
            pipe.now += 0.0625
            progress.update(
                update, nats_per_token=0.0, bits_per_byte=3.25, tokens_per_second=14_213.4
            )
    facts = "loss 0.0000 nats/token  14,213 tokens/s  3.250 bits/byte"
    assert pipe.lines() == [
        f"update 1/1,200  {facts}",
        *(
            f"update {update:,}/1,200  ETA {eta}  {facts}"
            for update, eta in (
                (161, "1:05"),
                (321, "0:55"),
                (481, "0:45"),
                (641, "0:35"),
                (801, "0:25"),
                (961, "0:15"),
                (1121, "0:05"),
            )
        ),
        f"update 1,200/1,200  {facts}",
    ]


def test_the_remaining_time_forgets_a_pause_and_a_step_back(pipe: Pipe):
    progress = pipe.console.training(1000)
    for update in range(100):
        pipe.now += 1.0
        progress.update(update)
    assert progress.remaining_seconds() == pytest.approx(901)
    pipe.now += 500.0
    progress.update(51)  # A worker was killed; the training repeats what came after update 50.
    assert progress.remaining_seconds() is None
    for update in range(52, 60):
        pipe.now += 2.0
        progress.update(update)
    assert progress.remaining_seconds() == pytest.approx(2 * (1000 - 59))


def test_a_burst_of_points_does_not_hide_the_rate(pipe: Pipe):
    progress = pipe.console.training(10_000)
    for burst in range(8):  # 100 points at once, each second
        pipe.now += 1.0
        for update in range(100 * burst, 100 * burst + 100):
            progress.update(update)
    assert progress.remaining_seconds() == pytest.approx((10_000 - 799) / 100)


def test_progress_of_a_stage_whose_size_comes_later(pipe: Pipe):
    with pipe.console.progress("scan") as progress:
        progress.update(3)
        pipe.now += 10
        progress.update(12, total=40, label="write", note="799 documents")
    assert pipe.lines() == ["scan 3", "write 12/40  ETA 0:31  799 documents"]


def test_progress_that_never_began_prints_nothing(pipe: Pipe):
    with pipe.console.training(10):
        pass
    assert pipe.lines() == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0:00"), (59.6, "1:00"), (187, "3:07"), (3765, "1:02:45"), (-1, "0:00")],
)
def test_clock_time(seconds: float, text: str):
    assert clock_time(seconds) == text


def test_a_stream_that_cannot_write_a_character_gets_an_escape():
    raw = io.BytesIO()
    console = Console(io.TextIOWrapper(raw, encoding="ascii"))
    console.line("naïve")
    assert raw.getvalue() == b"na\\xefve\n"


def test_a_terminal_gets_a_line_that_is_redrawn_and_its_last_state_stays():
    def act(console: Console) -> None:
        assert console.live
        with console.training(40) as progress:
            for update in range(1, 41):
                progress.update(update, nats_per_token=2.5, tokens_per_second=14000)
                if update == 20:
                    console.line("killed a worker " + "x" * 100)
            progress._live.refresh()  # type: ignore[union-attr]

    seen = on_a_terminal(act)
    assert f"{ESCAPE}[2K" in seen  # erased and drawn again
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert "killed a worker " + "x" * 100 in text.replace("\r\n", "\n")
    assert text.rstrip().endswith("update 40/40  loss 2.5000 nats/token  14,000 tokens/s")


def test_a_live_line_fits_a_narrow_terminal():
    def act(console: Console) -> None:
        with console.training(4000) as progress:
            progress.update(1, nats_per_token=2.5, bits_per_byte=3.6, tokens_per_second=14000)
            progress._live.refresh()  # type: ignore[union-attr]
            progress._samples.clear()  # nothing printed at the end

    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", on_a_terminal(act, columns=50))
    assert max(len(line.rstrip("\r")) for line in re.split(r"[\r\n]+", seen)) <= 50


def test_a_dumb_terminal_gets_plain_progress(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "1")

    def act(console: Console) -> None:
        assert not console.live
        with console.training(4) as progress:
            progress.update(4)

    assert on_a_terminal(act).splitlines() == ["update 4/4"]


def test_interrupting_a_stage_leaves_the_terminal_usable():
    def act(console: Console) -> None:
        with contextlib.suppress(KeyboardInterrupt), console.training(10) as progress:
            progress.update(3)
            raise KeyboardInterrupt

    seen = on_a_terminal(act)
    assert seen.rfind(f"{ESCAPE}[?25h") > seen.rfind(f"{ESCAPE}[?25l")  # the cursor is shown again


@pytest.mark.parametrize(
    ("cell", "is_number"),
    [("0 to 63", True), ("1.773 to 2.011", True), ("9.18 GiB", True), ("45.2%", True), ("-", True),
     ("vq-cache", False)],
)  # fmt: skip
def test_figures_stand_to_the_right_unless_they_are_said_to_be_texts(
    cell: str, is_number: bool, capsys: pytest.CaptureFixture[str]
):
    heading = "a heading that is wide"
    Console().table([heading], [[cell]])
    assert capsys.readouterr().out.splitlines()[-1].startswith(" ") == is_number
    Console().table([heading], [[cell]], texts=[heading])
    assert capsys.readouterr().out.splitlines()[-1].startswith(cell)
