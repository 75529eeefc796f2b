"""The days of a credit account, pure: when its bills close and when they fall due.

A day is the account's own: the calendar date in its time zone. A bill closes at the end of a day and
falls due at the end of another, so that no clock change can take an hour from anybody.
"""

from __future__ import annotations

import calendar
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pos_gateway.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Cycle:
    """A monthly cycle: it closes at the end of `closing_day` (in a shorter month, at the month's end) and
    is due `due_after_days` days later.

    Raises:
        InvalidInput: no such day, or a due date that the next bill would overtake.
    """

    closing_day: int
    due_after_days: int

    def __post_init__(self) -> None:
        if not 1 <= self.closing_day <= 31:
            raise InvalidInput("a day from 1 to 31", where="closing day")
        if not 1 <= self.due_after_days <= 27:
            raise InvalidInput(
                "1 to 27 days, so that one bill is due before the next closes", where="due date"
            )

    def closes_in(self, year: int, month: int) -> date:
        return date(year, month, min(self.closing_day, calendar.monthrange(year, month)[1]))

    def closing_on_or_after(self, day: date) -> date:
        """The day at whose end the bill closes that takes what happens on `day`."""
        closing = self.closes_in(day.year, day.month)
        return closing if day <= closing else self.closing_after(closing)

    def closing_after(self, closing: date) -> date:
        """The next month's."""
        year, month = divmod(closing.year * 12 + closing.month, 12)
        return self.closes_in(year, month + 1)

    def due_on(self, closing: date) -> date:
        return closing + timedelta(days=self.due_after_days)


def zone(name: str) -> ZoneInfo:
    """
    Raises:
        InvalidInput: no such time zone.
    """
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise InvalidInput("unknown time zone", where=repr(name[:40]), advice="like Asia/Shanghai") from None


def day_of(at_unix_ms: int, where: ZoneInfo) -> date:
    """The account's day at a moment."""
    return datetime.fromtimestamp(at_unix_ms / 1000, UTC).astimezone(where).date()


def end_of_day_unix_ms(day: date, where: ZoneInfo) -> int:
    """The first moment that is no longer `day`. Where a clock change skips midnight, the moment after it."""
    midnight = datetime.combine(day + timedelta(days=1), time(), tzinfo=where)
    return int(midnight.astimezone(UTC).timestamp()) * 1000
