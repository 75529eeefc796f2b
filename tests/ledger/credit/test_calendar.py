from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.errors import InvalidInput
from pos_gateway.ledger.credit.calendar import Cycle, day_of, end_of_day_unix_ms, zone

DAYS = st.dates(date(2020, 1, 1), date(2060, 12, 31))
CYCLES = st.builds(Cycle, st.integers(1, 31), st.integers(1, 27))
# Clocks change at midnight in some of them; Apia had no 30 December 2011.
ZONES = st.sampled_from(
    ["Asia/Shanghai", "Europe/Berlin", "America/Santiago", "Africa/Cairo", "America/Havana", "UTC"]
)


@given(CYCLES, DAYS)
def test_every_day_is_on_exactly_one_bill(cycle: Cycle, day: date) -> None:
    closing = cycle.closing_on_or_after(day)
    assert closing >= day
    assert cycle.closing_on_or_after(closing) == closing
    assert cycle.closing_on_or_after(closing + timedelta(days=1)) == cycle.closing_after(closing)
    assert 28 <= (cycle.closing_after(closing) - closing).days <= 31


@given(CYCLES, DAYS)
def test_a_bill_is_due_before_the_next_one_closes(cycle: Cycle, day: date) -> None:
    closing = cycle.closing_on_or_after(day)
    assert closing < cycle.due_on(closing) < cycle.closing_after(closing)


@pytest.mark.parametrize(
    ("closing_day", "day", "closing"),
    [
        (31, date(2027, 1, 31), date(2027, 1, 31)),
        (31, date(2027, 2, 1), date(2027, 2, 28)),
        (31, date(2028, 2, 1), date(2028, 2, 29)),
        (29, date(2027, 2, 28), date(2027, 2, 28)),
        (30, date(2028, 2, 29), date(2028, 2, 29)),
        (31, date(2027, 4, 30), date(2027, 4, 30)),
        (5, date(2027, 12, 6), date(2028, 1, 5)),
    ],
)
def test_short_months_close_at_their_end(closing_day: int, day: date, closing: date) -> None:
    assert Cycle(closing_day, 20).closing_on_or_after(day) == closing


def test_a_month_end_cycle_stays_at_the_months_end() -> None:
    cycle, closing, seen = Cycle(31, 20), date(2027, 10, 31), []
    for _ in range(5):
        closing = cycle.closing_after(closing)
        seen.append((closing.month, closing.day))
    assert seen == [(11, 30), (12, 31), (1, 31), (2, 29), (3, 31)]


@given(ZONES, DAYS)
def test_a_day_ends_where_the_next_begins(name: str, day: date) -> None:
    where = zone(name)
    end = end_of_day_unix_ms(day, where)
    assert day_of(end - 1, where) == day
    assert day_of(end, where) == day + timedelta(days=1)


def test_the_day_is_the_accounts_own() -> None:
    at = int(datetime(2027, 3, 31, 17, tzinfo=UTC).timestamp() * 1000)
    assert day_of(at, zone("Asia/Shanghai")) == date(2027, 4, 1)
    assert day_of(at, zone("Europe/Berlin")) == date(2027, 3, 31)


@pytest.mark.parametrize("name", ["Mars/Olympus", "", "../etc/passwd", "\0", "x" * 500])
def test_unknown_zones(name: str) -> None:
    with pytest.raises(InvalidInput, match="time zone"):
        zone(name)


@pytest.mark.parametrize(("closing_day", "due"), [(0, 20), (32, 20), (5, 0), (5, 28)])
def test_cycles_that_cannot_be(closing_day: int, due: int) -> None:
    with pytest.raises(InvalidInput):
        Cycle(closing_day, due)
