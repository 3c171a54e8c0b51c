"""Delivery's order and limits, to a destination in memory that fails when told to."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.metric_names import TRAIN_TOKENS
from jobs.runs.metric_spool import MetricPoint, MetricSpool, segments
from jobs.tracking.delivery import Delivery, Measurement, Refusal


class Memory:
    """A destination that keeps what it is sent, in order."""

    name = "memory"

    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []
        self.down = False
        self.marks: dict[str, int] = {}
        self.gate = threading.Event()
        self.gate.set()

    def open(self) -> dict[str, int]:
        self._answer()
        return dict(self.marks)

    def send(self, measurements: list[Measurement]) -> dict[str, str]:
        self._answer()
        assert 0 < len(measurements) <= 1000
        self.events.append(("sent", [(one.name, one.step) for one in measurements]))
        return {}

    def end(self, status: str) -> None:
        self._answer()
        self.events.append(("end", status))

    def operation(self, what: str) -> Callable[[], None]:
        def operate() -> None:
            self._answer()
            self.events.append(("operation", what))

        return operate

    def steps(self, name: str) -> list[int]:
        return [
            step
            for kind, content in self.events
            if kind == "sent" and isinstance(content, list)
            for metric, step in content
            if metric == name
        ]

    def _answer(self) -> None:
        self.gate.wait()
        if self.down:
            raise ConnectionError("refused")


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def delivery(memory: Memory, said: list[str]) -> Delivery:
    delivery = Delivery(memory, said.append)
    delivery.start()
    return delivery


def write(folder: Path, steps: range, names: int = 1) -> None:
    spool = MetricSpool(folder)
    for step in steps:
        values = {f"m{index}": 1.0 for index in range(names)}
        spool.append(MetricPoint(step, step, step, values))
    spool.flush()


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.02)


def ignore(points: list[MetricPoint]) -> None:
    pass


def test_what_comes_while_a_call_is_under_way_is_sent_before_the_end(
    memory: Memory, delivery: Delivery, tmp_path: Path
):
    shown: list[int] = []
    assert delivery.wait_until_open(30.0)
    memory.gate.clear()
    write(tmp_path, range(1, 3))
    delivery.attach(tmp_path, lambda points: shown.extend(point.step for point in points))
    until(lambda: len(shown) == 2)
    time.sleep(0.7)  # More than a round: the sender waits in send(), having listed one segment.
    write(tmp_path, range(3, 5))
    delivery.queue("a", memory.operation("a"))
    ending = threading.Thread(target=delivery.finish, args=("FINISHED", 30.0))
    ending.start()
    until(lambda: len(shown) == 4)
    time.sleep(0.1)
    memory.gate.set()
    ending.join()
    assert memory.steps("m0") == [1, 2, 3, 4]
    assert memory.events[-2:] == [("operation", "a"), ("end", "FINISHED")]


def test_nothing_is_acknowledged_or_referred_to_before_it_was_shown_and_sent(
    memory: Memory, delivery: Delivery, tmp_path: Path
):
    look, shown = threading.Event(), []

    def show(points: list[MetricPoint]) -> None:
        look.wait()
        shown.extend(point.step for point in points)

    delivery.attach(tmp_path, show)
    write(tmp_path, range(1, 3))
    write(tmp_path, range(3, 5))
    delivery.queue("checkpoint", memory.operation("checkpoint 4"))
    time.sleep(1.2)  # More than two rounds of the sender.
    assert memory.events == []
    assert len(segments(tmp_path)) == 2
    look.set()
    assert delivery.finish("FINISHED", 30.0)
    assert shown == [1, 2, 3, 4]
    assert memory.steps("m0") == [1, 2, 3, 4]
    assert memory.events[-2:] == [("operation", "checkpoint 4"), ("end", "FINISHED")]


def test_only_steps_above_the_marks_are_sent_for_each_metric(
    memory: Memory, said: list[str], tmp_path: Path
):
    memory.marks = {"m0": 5, TRAIN_TOKENS: 7}
    delivery = Delivery(memory, said.append)
    delivery.start()
    write(tmp_path, range(1, 11), names=2)
    write(tmp_path, range(8, 13), names=2)
    delivery.attach(tmp_path, ignore)
    assert delivery.finish("FINISHED", 30.0)
    assert memory.steps("m0") == list(range(6, 13))
    assert memory.steps("m1") == list(range(1, 13))
    assert memory.steps(TRAIN_TOKENS) == list(range(8, 13))


def test_marks_are_asked_for_once_the_destination_answers(
    memory: Memory, said: list[str], tmp_path: Path
):
    memory.down = True
    delivery = Delivery(memory, said.append)
    delivery.start()
    write(tmp_path, range(1, 11))
    delivery.attach(tmp_path, ignore)
    until(lambda: bool(said))
    assert not delivery.wait_until_open(0.0)
    memory.marks, memory.down = {"m0": 4}, False
    assert delivery.wait_until_open(30.0)
    assert delivery.finish("FINISHED", 30.0)
    assert memory.steps("m0") == list(range(5, 11))


def test_calls_hold_at_most_a_thousand_measurements(
    memory: Memory, delivery: Delivery, tmp_path: Path
):
    write(tmp_path, range(1, 3), names=1500)  # A single point is more than a call holds.
    for begin in range(3, 500, 2):
        write(tmp_path, range(begin, begin + 2))
    delivery.attach(tmp_path, ignore)
    assert delivery.finish("FINISHED", 30.0)
    assert memory.steps("m1499") == [1, 2]
    assert memory.steps("m0") == list(range(1, 501))
    assert len(memory.events) <= 3 + 2 + 1 + 1  # Small segments share calls.


def test_a_refused_operation_is_said_and_the_next_one_is_sent(
    memory: Memory, delivery: Delivery, said: list[str]
):
    def refuse() -> None:
        raise Refusal("bad name")

    delivery.queue("the figure", refuse)
    delivery.queue("b", memory.operation("b"))
    assert delivery.finish("FINISHED", 30.0)
    assert memory.events == [("operation", "b"), ("end", "FINISHED")]
    assert said == ["the figure is left out: bad name"]


def test_an_outage_at_the_end_is_over_within_the_limit_and_keeps_the_points(
    memory: Memory, delivery: Delivery, said: list[str], tmp_path: Path
):
    assert delivery.wait_until_open(30.0)
    memory.down = True
    write(tmp_path, range(1, 3))
    delivery.attach(tmp_path, ignore)
    assert not delivery.finish("FINISHED", 0.5)
    assert memory.events == []
    assert len(segments(tmp_path)) == 1
    assert said[0].startswith("memory does not take what is sent (refused)")
    assert said[1] == (
        f"not everything reached memory; metrics wait in {tmp_path} for the next start of this run"
    )
    assert len(said) == 2


def test_an_operation_that_keeps_failing_does_not_keep_the_run_from_ending(
    memory: Memory, delivery: Delivery, tmp_path: Path
):
    def fail() -> None:
        raise OSError("no room for artifacts")

    delivery.queue("the figure", fail)
    write(tmp_path, range(1, 3))
    delivery.attach(tmp_path, ignore)
    assert not delivery.finish("FAILED", 0.5)
    assert memory.steps("m0") == [1, 2]
    assert memory.events[-1] == ("end", "FAILED")


@pytest.mark.timeout(60)
def test_a_delivery_that_never_began_waits_for_nothing(memory: Memory, said: list[str]):
    delivery = Delivery(memory, said.append)
    assert not delivery.wait_until_open(600.0)
    assert not delivery.finish("FINISHED", 600.0)
