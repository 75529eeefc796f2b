"""Shifts and the day's end, kept in the journal: opened, drawer moved, counted blind, closed.

Blind means: the count is journalled before anybody is told what was expected. One drawer, one shift at a
time. The day's closing (Z) numbers itself and takes in all that was journalled since the last one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol
from uuid import UUID

from pos_gateway.errors import Conflict, InvalidMessage, NotFound, NotPermitted
from pos_gateway.gateway.history import History, Totals
from pos_gateway.money import MAX_AMOUNT_MINOR
from pos_gateway.records import Kind, Record, uuid7

VARIANCE_REASONS: Final = ("wrong_change", "miscounted", "unrecorded_cash", "float_was_wrong", "unexplained")
MAX_NOTE_CHARACTERS: Final = 120
MAX_COUNTS: Final = 3
"""A drawer may be counted again, but not until the sum is found by trying."""


class JournalPort(Protocol):
    """What is needed of the journal."""

    def append(self, kind: Kind, record_id: UUID, facts: Mapping[str, Any], proof: bytes = b"") -> Record: ...

    def about(self, record_id: UUID) -> list[Record]: ...

    def get(self, record_id: UUID) -> Record: ...

    @property
    def last_sequence(self) -> int: ...


@dataclass(slots=True)
class Shift:
    """The shift that is open."""

    id: UUID
    by: str
    opened_at_unix_ms: int
    float_minor: int
    after_sequence: int
    movements_minor: int = 0
    counts: list[int] = field(default_factory=list)

    @property
    def expected_minor(self) -> int:
        return self.float_minor + self.movements_minor

    def as_json(self) -> dict[str, Any]:
        """What the person who counts may know: not what is expected."""
        return {
            "id": str(self.id),
            "by": self.by,
            "opened_at_unix_ms": self.opened_at_unix_ms,
            "float_minor": self.float_minor,
            "counted": len(self.counts),
            "counts_left": MAX_COUNTS - len(self.counts),
        }


class Shifts:
    """Safe to call from any thread; blocks on the disk."""

    def __init__(self, journal: JournalPort, history: History, now_unix_ms: Callable[[], int]) -> None:
        self._journal = journal
        self._history = history
        self._now_unix_ms = now_unix_ms
        self._lock = threading.Lock()
        self._shift: Shift | None = None
        self._day_after = 0
        self._days = 0
        self._shifts = 0
        for record in history.shifts_since_the_day():
            self._take(record)

    @property
    def current(self) -> Shift | None:
        return self._shift

    @property
    def day_after(self) -> int:
        """The open day is what is journalled above this sequence."""
        return self._day_after

    def open(self, shift_id: UUID, who: Mapping[str, Any], float_minor: int) -> Shift:
        """
        Raises:
            Conflict: one is open.
            InvalidMessage: not an amount.
        """
        _check(float_minor, "float_minor")
        with self._lock:
            if self._shift is not None:
                if self._shift.id == shift_id:
                    return self._shift
                raise Conflict(f"{self._shift.by} has a shift open", advice="close it first")
            if self._journal.about(shift_id):
                raise Conflict("this id was used before", advice="use a new id")
            self._append(shift_id, "opened", who, float_minor=float_minor)
            return self._open_shift()

    def cash(self, movement_id: UUID, who: Mapping[str, Any], amount_minor: int, reason: str) -> Record:
        """Cash into the drawer, or out of it (below zero).

        Raises:
            NotFound: no shift is open.
            InvalidMessage: not an amount, or no reason.
        """
        if not 0 < abs(amount_minor) <= MAX_AMOUNT_MINOR:
            raise InvalidMessage("not an amount", where="amount_minor")
        if not 1 <= len(reason) <= MAX_NOTE_CHARACTERS:
            raise InvalidMessage(f"1 to {MAX_NOTE_CHARACTERS} characters", where="reason")
        with self._lock:
            shift = self._open_shift()
            try:
                done = self._journal.get(movement_id)
            except NotFound:
                return self._append(
                    shift.id, "cash", who, movement_id, amount_minor=amount_minor, reason=reason
                )
            facts = done.facts()
            if facts.get("amount_minor") != amount_minor or facts.get("event") != "cash":
                raise Conflict("this id was used for something else", advice="use a new id")
            return done

    def count(self, who: Mapping[str, Any], counted_minor: int) -> dict[str, Any]:
        """Journal what was counted, then tell what was expected.

        Raises:
            NotFound: no shift is open.
            NotPermitted: it is somebody else's shift.
            Conflict: it was counted too often.
            InvalidMessage: not an amount.
        """
        _check(counted_minor, "counted_minor")
        with self._lock:
            shift = self._own_shift(who)
            if len(shift.counts) >= MAX_COUNTS:
                raise Conflict(f"it was counted {MAX_COUNTS} times", advice="close the shift with a reason")
            self._append(
                shift.id,
                "counted",
                who,
                counted_minor=counted_minor,
                expected_minor=shift.expected_minor,
                variance_minor=counted_minor - shift.expected_minor,
            )
            return {
                "counted_minor": counted_minor,
                "expected_minor": shift.expected_minor,
                "variance_minor": counted_minor - shift.expected_minor,
                "counts_left": MAX_COUNTS - len(shift.counts),
            }

    def close(self, who: Mapping[str, Any], reason: str, note: str) -> Record:
        """
        Raises:
            NotFound: no shift is open.
            NotPermitted: it is somebody else's shift.
            Conflict: the drawer was not counted yet.
            InvalidMessage: a variance without a reason.
        """
        if len(note) > MAX_NOTE_CHARACTERS:
            raise InvalidMessage(f"at most {MAX_NOTE_CHARACTERS} characters", where="note")
        with self._lock:
            shift = self._own_shift(who)
            if not shift.counts:
                raise Conflict("the drawer was not counted yet", advice="count it first")
            variance_minor = shift.counts[-1] - shift.expected_minor
            if variance_minor and reason not in VARIANCE_REASONS:
                known = ", ".join(VARIANCE_REASONS)
                raise InvalidMessage("a variance needs a reason", where="reason", advice=f"one of {known}")
            totals = self._history.totals(shift.after_sequence, self._journal.last_sequence)
            return self._append(
                shift.id,
                "closed",
                who,
                opened_by=shift.by,
                opened_at_unix_ms=shift.opened_at_unix_ms,
                float_minor=shift.float_minor,
                movements_minor=shift.movements_minor,
                counted_minor=shift.counts[-1],
                expected_minor=shift.expected_minor,
                variance_minor=variance_minor,
                reason=reason if variance_minor else "",
                note=note,
                totals=totals.as_json(),
            )

    def close_day(self, report_id: UUID, who: Mapping[str, Any]) -> Record:
        """The Z report: journalled, numbered, never taken back. The same id again is the same report.

        Raises:
            Conflict: a shift is open, or the id was used for something else.
        """
        with self._lock:
            for record in self._journal.about(report_id):
                if record.id == report_id and record.facts().get("event") == "day":
                    return record
                raise Conflict("this id was used for something else", advice="use a new id")
            if self._shift is not None:
                raise Conflict(f"{self._shift.by} has a shift open", advice="close it first")
            until = self._journal.last_sequence
            totals = self._history.totals(self._day_after, until)
            return self._append(
                report_id,
                "day",
                who,
                report_id,
                number=self._days + 1,
                shifts=self._shifts,
                after_sequence=self._day_after,
                until_sequence=until,
                totals=totals.as_json(),
            )

    def records_of(self, shift_id: UUID) -> list[Record]:
        """What is journalled of a shift, or of the closing of a day."""
        return [record for record in self._journal.about(shift_id) if record.kind is Kind.SHIFT]

    def day_so_far(self) -> Totals:
        """What an X report shows: all since the last closing of a day."""
        return self._history.totals(self._day_after, self._journal.last_sequence)

    def _own_shift(self, who: Mapping[str, Any]) -> Shift:
        shift = self._open_shift()
        if who["by"] != shift.by and who["role"] == "cashier":
            raise NotPermitted(
                f"this is {shift.by}'s shift", signed_in=True, advice=f"{shift.by} or a manager closes it"
            )
        return shift

    def _open_shift(self) -> Shift:
        if self._shift is None:
            raise NotFound("no shift is open", advice="open one first")
        return self._shift

    def _append(
        self,
        shift_id: UUID,
        event: str,
        who: Mapping[str, Any],
        record_id: UUID | None = None,
        **more: Any,
    ) -> Record:
        now = self._now_unix_ms()
        facts = {"shift": str(shift_id), "event": event, **who, "at_unix_ms": now, **more}
        record = self._journal.append(Kind.SHIFT, record_id or uuid7(now, os.urandom(10)), facts)
        self._take(record)
        return record

    def _take(self, record: Record) -> None:
        facts = record.facts()
        shift = self._shift
        match facts["event"]:
            case "opened":
                self._shift = Shift(
                    UUID(facts["shift"]),
                    facts["by"],
                    facts["at_unix_ms"],
                    facts["float_minor"],
                    record.sequence,
                )
            case "cash" if shift is not None:
                shift.movements_minor += facts["amount_minor"]
            case "counted" if shift is not None:
                shift.counts.append(facts["counted_minor"])
            case "closed":
                self._shift = None
                self._shifts += 1
            case "day":
                self._day_after, self._days, self._shifts = record.sequence, facts["number"], 0


def _check(amount_minor: int, where: str) -> None:
    if not 0 <= amount_minor <= MAX_AMOUNT_MINOR:
        raise InvalidMessage(f"must be between 0 and {MAX_AMOUNT_MINOR}", where=where)
