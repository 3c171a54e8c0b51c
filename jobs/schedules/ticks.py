"""When a schedule fires: the instants that a cron expression names in a time zone.

A tick is its nominal UTC instant, whenever it is really run. A local time that the clock skips
fires at the first one after the gap; a local time that comes twice fires the first time only.

Written here, since APScheduler 3.11.3 (tried 2026-11) does none of this: `30 2 * * *` in Berlin
fires twice on 25 October and at 03:30 on 29 March, `from_crontab` takes weekday 1 for Tuesday, and
two of its schedulers on one store run every job twice. What makes a tick run once is its claim
(jobs/schedules/tick_claims.py), whoever counts the ticks.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from jobs.errors import UserError

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
}
_FIELDS = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of the week", 0, 7, _DAYS),
)
_SEARCH_DAYS = 366 * 9
"""The longest way from one 29 February to the next is eight years (1896 to 1904, 2096 to 2104)."""
_ID = "%Y%m%dT%H%M%SZ"
_BY_HAND = "-by-hand"
_TICK = re.compile(rf"\d{{8}}T\d{{6}}Z({_BY_HAND})?")


@dataclass(frozen=True)
class Cron:
    """A cron expression of five fields in a time zone."""

    expression: str
    timezone: str
    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    """0 is Sunday."""
    either_day: bool
    """Both kinds of day are restricted: one that matches suffices, as in every cron."""

    @staticmethod
    def parse(expression: str, timezone: str) -> "Cron":
        """The expression, such as `0 2 * * *` or `@daily`, in a zone, such as `Europe/Berlin`.

        Raises:
            UserError: no such zone, no such expression, or one that never fires.
        """
        try:
            ZoneInfo(timezone)
        except (KeyError, ValueError, OSError):
            raise UserError(
                f"--timezone {timezone}: no such time zone; expected a name such as Europe/Berlin"
                " or UTC"
            ) from None
        parts = _MACROS.get(expression.strip().lower(), expression).split()
        if len(parts) != len(_FIELDS):
            raise UserError(
                f"--cron {expression!r}: expected five fields (minute hour day month weekday), as"
                f" '0 2 * * *', or one of {', '.join(_MACROS)}"
            )
        values = [
            _values(expression, part, *field) for part, field in zip(parts, _FIELDS, strict=True)
        ]
        cron = Cron(
            expression=expression,
            timezone=timezone,
            minutes=tuple(sorted(values[0])),
            hours=tuple(sorted(values[1])),
            days=frozenset(values[2]),
            months=frozenset(values[3]),
            weekdays=frozenset(day % 7 for day in values[4]),
            either_day=not (parts[2].startswith("*") or parts[4].startswith("*")),
        )
        # Of a time without leap seconds and lost days: whether the date exists at all.
        if next(cron._local_times(datetime(2000, 1, 1)), None) is None:
            raise UserError(f"--cron {expression!r}: never fires; there is no such date")
        return cron

    def after(self, instant: datetime) -> Iterator[datetime]:
        """The ticks after an instant, UTC, in order."""
        zone = ZoneInfo(self.timezone)
        last = instant.astimezone(UTC)
        for local in self._local_times(last.astimezone(zone).replace(tzinfo=None)):
            tick = _first_instant(local, zone)
            if tick > last:
                yield tick
                last = tick

    def next(self, instant: datetime) -> datetime:
        """The first tick after an instant, UTC."""
        return next(self.after(instant))

    def latest(self, instant: datetime) -> datetime:
        """The last tick at or before an instant, UTC: which tick a cron of a cluster was for."""
        days = 1
        while True:
            found = None
            for tick in self.after(instant - timedelta(days=days)):
                if tick > instant:
                    break
                found = tick
            if found is not None:
                return found
            days *= 4

    def _local_times(self, begin: datetime) -> Iterator[datetime]:
        """The local times from the minute of `begin` on, as the wall clock reads."""
        day, since = begin.date(), begin.replace(second=0, microsecond=0)
        quiet = 0
        while quiet < _SEARCH_DAYS:
            if self._fires_on(day):
                quiet = 0
                for hour in self.hours:
                    for minute in self.minutes:
                        local = datetime.combine(day, time(hour, minute))
                        if local >= since:
                            yield local
            day += timedelta(days=1)
            quiet += 1

    def _fires_on(self, day: date) -> bool:
        if day.month not in self.months:
            return False
        in_month, in_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return in_month or in_week if self.either_day else in_month and in_week


def tick_id(tick: datetime, *, by_hand: bool = False) -> str:
    """The tick as it stands in names: `20260329T010000Z`; they sort as the instants do.

    One that somebody asked for, which is no instant of a cron expression, ends in `-by-hand`.
    """
    return tick.astimezone(UTC).strftime(_ID) + (_BY_HAND if by_hand else "")


def is_tick_id(text: str) -> bool:
    """Whether `tick_id` may have written it."""
    return _TICK.fullmatch(text) is not None


def is_by_hand(id: str) -> bool:
    """Whether somebody asked for the tick of that id, and not a cron expression."""
    return id.endswith(_BY_HAND)


def parse_tick(text: str) -> datetime:
    """The instant of `20260329T010000Z`.

    Raises:
        UserError: it is not such an instant.
    """
    try:
        return datetime.strptime(text, _ID).replace(tzinfo=UTC)
    except ValueError:
        raise UserError(
            f"tick {text!r}: expected a UTC instant such as 20260329T010000Z; `tvq schedule next`"
            " shows some"
        ) from None


def _values(
    expression: str, part: str, name: str, low: int, high: int, names: tuple[str, ...]
) -> set[int]:
    """What one field of an expression stands for."""

    def number(text: str) -> int:
        if text.lower() in names:
            return names.index(text.lower()) + low
        value = int(text) if re.fullmatch(r"\d{1,2}", text) else -1
        if not low <= value <= high:
            raise UserError(
                f"--cron {expression!r}: {name}: expected {low} to {high}"
                f"{f' or {names[0]} to {names[-1]}' if names else ''}, got {text!r}"
            )
        return value

    found: set[int] = set()
    for item in part.split(","):
        span, slash, step = item.partition("/")
        if slash and not (step.isdecimal() and int(step)):
            raise UserError(
                f"--cron {expression!r}: {name}: expected a step such as */5, got {item!r}"
            )
        first, dash, last = span.partition("-")
        begin = low if span == "*" else number(first)
        # A value with a step, 5/10, goes on to the end, as in every cron.
        end = number(last) if dash else high if span == "*" or slash else begin
        if end < begin:
            raise UserError(f"--cron {expression!r}: {name}: {item!r} ends before it begins")
        found.update(range(begin, end + 1, int(step) if slash else 1))
    return found


def _first_instant(local: datetime, zone: ZoneInfo) -> datetime:
    """When the wall clock first reads a time; of a time that it skips, when it has skipped it."""
    late = local.replace(tzinfo=zone, fold=0).astimezone(UTC)
    if late.astimezone(zone).replace(tzinfo=None) == local:
        return late
    # In a gap fold 0 counts on with the offset before it, fold 1 back with the one after.
    early = local.replace(tzinfo=zone, fold=1).astimezone(UTC)
    before = early.astimezone(zone).utcoffset()
    while late - early > timedelta(seconds=1):
        middle = early + timedelta(seconds=int((late - early).total_seconds()) // 2)
        if middle.astimezone(zone).utcoffset() == before:
            early = middle
        else:
            late = middle
    return late
