"""`tvq schedule`: what people ask of schedules."""

import dataclasses
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from jobs.console import Console, clock_time
from jobs.errors import UserError
from jobs.flows.flow_file import load_flow
from jobs.schedules.alerts import Hook
from jobs.schedules.schedule import Result, Schedule, ScheduleFolder, Tick, list_schedules
from jobs.schedules.ticks import tick_id
from pipeline.storage import Location


def add_command(
    root: Location,
    flow: Path,
    *,
    alert_command: str | None,
    alert_webhook: str | None,
    replace: bool,
    console: Console,
    **fields: Any,
) -> None:
    """Stores a schedule and its flow.

    Raises:
        UserError: the flow or a field is wrong, or there is such a schedule with other fields.
    """
    loaded = load_flow(flow)
    hook = None
    if alert_command is not None or alert_webhook is not None:
        hook = Hook(_split(alert_command or ""), alert_webhook)
    schedule = Schedule(name=loaded.name, since=tick_id(datetime.now(UTC)), alert=hook, **fields)
    first = schedule.ticks().next(datetime.now(UTC))  # refuses what is no expression
    folder = ScheduleFolder(root, schedule.name)
    before, text = folder.load(), loaded.absolute().to_yaml().encode()
    if before is not None and not replace:
        same = dataclasses.replace(before, since=schedule.since, paused=False) == schedule
        if not same or folder.store.read("flow.yaml") != text:
            raise UserError(
                f"schedule {schedule.name}: there is one with other settings or another flow;"
                " change it with --replace, or see it with `tvq schedule list`"
            )
        schedule = before
    elif before is not None and (before.cron, before.timezone) == (
        schedule.cron,
        schedule.timezone,
    ):
        # A tick that is due and not yet claimed stays due.
        schedule = dataclasses.replace(schedule, since=before.since)
    # The flow first: a daemon that finds a schedule finds what it is to run.
    folder.store.write("flow.yaml", text)
    if before is None:
        folder.create(schedule)
    else:
        folder.save(schedule)
    console.line(f"schedule  {schedule.name}: {schedule.cron} in {schedule.timezone}")
    console.line(f"next      {_local(first, schedule)}  ({tick_id(first)})")
    console.line("run by `tvq schedule serve`, on this machine or any that shares the root")


def list_command(root: Location, *, console: Console, as_json: bool) -> None:
    """All schedules in a table."""
    rows = []
    for folder in list_schedules(root):
        schedule = folder.load()
        if schedule is None:
            continue
        ticks = folder.ticks()
        last = next(((t, folder.result(t.id)) for t in reversed(ticks)), None)
        first = None if schedule.paused else schedule.ticks().next(datetime.now(UTC))
        rows.append((schedule, last, first))
    if as_json:
        console.json(
            [
                dataclasses.asdict(schedule)
                | {
                    "next": tick_id(first) if first else None,
                    "last": last and {"tick": last[0].id, "outcome": _outcome(*last)},
                }
                for schedule, last, first in rows
            ]
        )
        return
    if not rows:
        console.line("no schedules yet: `tvq schedule add FLOW.yaml --cron EXPRESSION`")
        return
    console.table(
        ["schedule", "cron", "next", "last tick", "outcome"],
        [
            (
                schedule.name,
                f"{schedule.cron} {schedule.timezone}",
                _local(first, schedule) if first else "paused",
                last[0].id if last else "-",
                _outcome(*last) if last else "-",
            )
            for schedule, last, first in rows
        ],
        texts=["cron", "last tick", "outcome"],
    )


def next_command(root: Location, name: str, count: int, *, console: Console, as_json: bool) -> None:
    """The next ticks."""
    schedule = _existing(root, name)[1]
    ticks = list(islice(schedule.ticks().after(datetime.now(UTC)), count))
    if as_json:
        console.json([tick_id(tick) for tick in ticks])
        return
    console.table(["tick", "local time"], [(tick_id(t), _local(t, schedule)) for t in ticks])


def history_command(root: Location, name: str, *, console: Console, as_json: bool) -> None:
    """The ticks that are kept, the newest first."""
    folder, _ = _existing(root, name)
    rows = list(_history(folder))
    if as_json:
        console.json(
            [
                {"tick": tick.id, "attempts": tick.attempts, "outcome": _outcome(tick, result)}
                | ({"detail": result.detail, "ended": result.ended} if result else {})
                | ({"since": result.since} if result and result.since else {})
                for tick, result in rows
            ]
        )
        return
    if not rows:
        console.line(f"schedule {name}: no tick yet; `tvq schedule next {name}` shows when")
        return
    console.table(
        ["tick", "outcome", "attempts", "ended", "detail"],
        [
            (
                tick.id,
                _outcome(tick, result),
                tick.attempts,
                _ago(result.ended) if result else "-",
                result.detail if result else "",
            )
            for tick, result in rows
        ],
    )


def run_now_command(root: Location, name: str, *, console: Console) -> None:
    """Leaves a request for the daemon."""
    folder, _ = _existing(root, name)
    id = folder.request(datetime.now(UTC))
    console.line(f"asked for {id}; a daemon (`tvq schedule serve`) runs it")


def pause_command(root: Location, name: str, wanted: bool, *, console: Console) -> None:
    """Pauses a schedule, or lets it go on from now."""
    folder, schedule = _existing(root, name)
    if schedule.paused == wanted:
        console.line(f"schedule {name}: {'is paused already' if wanted else 'is not paused'}")
        return
    now = datetime.now(UTC)
    since = schedule.since if wanted else tick_id(now)
    folder.save(dataclasses.replace(schedule, paused=wanted, since=since))
    if wanted:
        console.line(f"schedule {name}: paused; `tvq schedule pause {name} --off` goes on")
    else:
        console.line(f"schedule {name}: next {_local(schedule.ticks().next(now), schedule)}")


def remove_command(root: Location, name: str, *, console: Console) -> None:
    """Removes a schedule with its history."""
    folder, _ = _existing(root, name)
    folder.remove()
    console.line(f"schedule {name}: removed")


def _existing(root: Location, name: str) -> tuple[ScheduleFolder, Schedule]:
    folder = ScheduleFolder.existing(root, name)
    schedule = folder.load()
    assert schedule is not None, "it was there a moment ago"
    return folder, schedule


def _history(folder: ScheduleFolder) -> Iterator[tuple[Tick, Result | None]]:
    for tick in reversed(folder.ticks()):
        yield tick, folder.result(tick.id)


def _outcome(tick: Tick, result: Result | None) -> str:
    if result:
        return result.outcome
    if not tick.claimed:
        return "asked for"
    return "running" if tick.attempts else "waiting"


def _split(command: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(command))
    except ValueError as error:
        raise UserError(f"--alert-command {command!r}: {error}") from None


def _local(tick: datetime, schedule: Schedule) -> str:
    return tick.astimezone(ZoneInfo(schedule.timezone)).strftime("%a %Y-%m-%d %H:%M %Z")


def _ago(instant: float) -> str:
    return f"{clock_time(datetime.now(UTC).timestamp() - instant)} ago"
