"""Ticks against a walk over every minute of the time in question."""

from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import takewhile
from zoneinfo import ZoneInfo

import pytest

from jobs.errors import UserError
from jobs.schedules.ticks import Cron, parse_tick, tick_id

MINUTE = timedelta(minutes=1)


def utc(*fields: int) -> datetime:
    return datetime(*fields, tzinfo=UTC)


Reading = tuple[datetime, datetime, list[datetime]]


@cache
def readings(zone: str, begin: datetime, end: datetime) -> list[Reading]:
    """Every minute at which the wall clock reads what it has not read before.

    The instant, what it reads, and the minutes that it has jumped over to get there.
    """
    seen = begin.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
    found = []
    for at in (begin + MINUTE * k for k in range(1, int((end - begin) / MINUTE) + 1)):
        local = at.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
        if local > seen:
            jumped = [seen + MINUTE * k for k in range(1, int((local - seen) / MINUTE))]
            found.append((at, local, jumped))
            seen = local
    return found


@pytest.mark.parametrize(
    ("expression", "fires"),
    [
        ("30 2 * * *", lambda t: (t.hour, t.minute) == (2, 30)),
        ("0 * * * *", lambda t: t.minute == 0),
        ("*/20 1-3 * * *", lambda t: t.hour in (1, 2, 3) and t.minute in (0, 20, 40)),
        ("0 2 1,15 * sun", lambda t: (t.hour, t.minute) == (2, 0)
         and (t.day in (1, 15) or t.weekday() == 6)),
        ("5/25 12 * mar-dec 1-5", lambda t: t.hour == 12 and t.minute in (5, 30, 55)
         and t.month >= 3 and t.weekday() < 5),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("zone", "begin", "days"),
    [
        ("Europe/Berlin", utc(2026, 1, 1), 365),
        ("America/New_York", utc(2026, 3, 1), 20),
        ("America/New_York", utc(2026, 10, 25), 20),
        ("Australia/Lord_Howe", utc(2026, 3, 25), 30),  # half an hour of daylight saving
        ("Australia/Lord_Howe", utc(2026, 9, 25), 30),
        ("Pacific/Apia", utc(2011, 12, 25), 12),  # left out a whole day
        ("Asia/Kolkata", utc(2026, 2, 20), 20),
    ],
)
def test_a_year_of_ticks_is_what_somebody_at_the_wall_clock_would_ring(
    expression, fires, zone, begin, days
):
    end = begin + timedelta(days=days)
    expected = [
        at
        for at, local, jumped in readings(zone, begin, end)
        if fires(local) or any(map(fires, jumped))
    ]
    assert expected
    cron = Cron.parse(expression, zone)
    assert list(takewhile(lambda tick: tick <= end, cron.after(begin))) == expected
    # From the middle, and backwards, it is the same.
    middle = expected[len(expected) // 2]
    assert cron.next(middle - timedelta(seconds=1)) == middle
    assert cron.latest(middle) == middle
    assert cron.latest(middle + timedelta(seconds=59)) == middle


def test_daylight_saving_by_hand():
    cron = Cron.parse("30 2 * * *", "Europe/Berlin")
    skipped = list(takewhile(lambda t: t < utc(2026, 3, 31), cron.after(utc(2026, 3, 28))))
    assert skipped == [utc(2026, 3, 28, 1, 30), utc(2026, 3, 29, 1, 0), utc(2026, 3, 30, 0, 30)]
    repeated = list(takewhile(lambda t: t < utc(2026, 10, 27), cron.after(utc(2026, 10, 24, 12))))
    assert repeated == [utc(2026, 10, 25, 0, 30), utc(2026, 10, 26, 1, 30)]


def test_one_instant_is_one_tick():
    # All six are skipped, and fire together with the one at three.
    cron = Cron.parse("*/10 2,3 29 3 *", "Europe/Berlin")
    ticks = list(takewhile(lambda t: t < utc(2026, 12, 1), cron.after(utc(2026, 1, 1))))
    assert ticks == [utc(2026, 3, 29, 1, minute) for minute in range(0, 60, 10)]


def test_leap_days_and_macros():
    leap = Cron.parse("0 0 29 2 *", "UTC").after(utc(2096, 3, 1))
    assert next(leap) == utc(2104, 2, 29)
    assert Cron.parse("@weekly", "UTC").next(utc(2026, 11, 24)) == utc(2026, 11, 29)


def test_the_id_is_the_instant():
    tick = Cron.parse("30 2 * * *", "Europe/Berlin").next(utc(2026, 3, 28, 12))
    assert tick_id(tick) == "20260329T010000Z"
    assert parse_tick("20260329T010000Z") == tick


@pytest.mark.parametrize(
    ("expression", "zone", "expected"),
    [
        ("0 2 * *", "UTC", "expected five fields"),
        ("60 2 * * *", "UTC", "minute: expected 0 to 59, got '60'"),
        ("0 2 * foo *", "UTC", "month: expected 1 to 12 or jan to dec, got 'foo'"),
        ("*/0 2 * * *", "UTC", "expected a step"),
        ("0 5-2 * * *", "UTC", "ends before it begins"),
        ("0 0 30 2 *", "UTC", "never fires"),
        ("0 2 * * *", "Europe/Atlantis", "no such time zone"),
        ("0 2 * * *", "../etc/passwd", "no such time zone"),
    ],
)
def test_mistakes_are_named(expression, zone, expected):
    with pytest.raises(UserError, match=expected) as error:
        Cron.parse(expression, zone)
    assert "\n" not in str(error.value)


def test_what_is_no_tick_is_refused():
    with pytest.raises(UserError, match="expected a UTC instant"):
        parse_tick("2026-03-29")
