"""What the journal tells of the past: payments found again, and what a stretch of it adds up to.

Reads with a connection of its own: a long look back holds up no tap.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from pos_gateway.errors import NotFound
from pos_gateway.gateway.journal_file import JournalFile, Told
from pos_gateway.gateway.meanings import Meaning, Paid, meaning_of
from pos_gateway.records import Kind, Record, Verdict

PAYMENT_KINDS: Final = (Kind.AUTHORIZATION, Kind.DECLINE)
COUNTED_KINDS: Final = (Kind.AUTHORIZATION, Kind.DECLINE, Kind.REVERSAL, Kind.REFUND)
_FAR: Final = (1 << 62) - 1
MAX_FOUND: Final = 5000


@dataclass(frozen=True, slots=True)
class Search:
    """Which payments are looked for. `before`: below this sequence, for the next page."""

    before: int = _FAR
    since_unix_ms: int = 0
    until_unix_ms: int = _FAR
    result: str = ""
    amount_minor: int | None = None
    last4: str | None = None
    sale_id_prefix: str = ""

    @property
    def kinds(self) -> Sequence[Kind]:
        return {"approved": PAYMENT_KINDS[:1], "declined": PAYMENT_KINDS[1:]}.get(self.result, PAYMENT_KINDS)


@dataclass(frozen=True, slots=True)
class Found:
    """A record, its facts, and what the ledger has said of it."""

    sequence: int
    id: UUID
    kind: Kind
    facts: Mapping[str, Any]
    verdict: Verdict | None
    reason: str = ""

    @property
    def meaning(self) -> Meaning:
        return meaning_of(self.kind, self.verdict)

    @classmethod
    def of(cls, told: Told) -> Found:
        answer = json.loads(told.acknowledgement) if told.acknowledgement else {}
        verdict = Verdict(answer["verdict"]) if answer else None
        return cls(
            told.sequence, told.id, told.kind, json.loads(told.body), verdict, str(answer.get("reason", ""))
        )


@dataclass(slots=True)
class Totals:
    """What records add up to, in minor units. `waiting`: the ledger has not agreed yet; `not_paid` and
    `review`: it has, and not simply."""

    first_sequence: int = 0
    last_sequence: int = 0
    first_at_unix_ms: int | None = None
    last_at_unix_ms: int | None = None
    sales: list[int] = field(default_factory=lambda: [0, 0])
    voids: list[int] = field(default_factory=lambda: [0, 0])
    refunds: list[int] = field(default_factory=lambda: [0, 0])
    instalments: list[int] = field(default_factory=lambda: [0, 0])
    waiting: list[int] = field(default_factory=lambda: [0, 0])
    review: list[int] = field(default_factory=lambda: [0, 0])
    not_paid: list[int] = field(default_factory=lambda: [0, 0])
    declined: Counter[str] = field(default_factory=Counter)
    by_hour: Counter[int] = field(default_factory=Counter)

    @property
    def net_minor(self) -> int:
        return self.sales[1] - self.voids[1] - self.refunds[1]

    @property
    def state(self) -> str:
        """`provisional` while the ledger has not said all it will; then `settled`, or `differs`."""
        if self.waiting[0] or self.review[0]:
            return "provisional"
        return "differs" if self.not_paid[0] else "settled"

    def add(self, found: Found, zone: tzinfo | None) -> None:
        facts, at = found.facts, found.facts["at_unix_ms"]
        if found.kind is Kind.DECLINE:
            self.declined[facts["reason"]] += 1
            return
        amount_minor: int = facts["amount_minor"]
        hour = datetime.fromtimestamp(at / 1000, zone).hour
        if found.kind is Kind.AUTHORIZATION:
            _count(self.sales, amount_minor)
            self.by_hour[hour] += amount_minor
            if facts.get("plan"):
                _count(self.instalments, amount_minor)
        else:
            _count(self.voids if found.kind is Kind.REVERSAL else self.refunds, amount_minor)
            self.by_hour[hour] -= amount_minor
        match found.meaning.money:
            case Paid.WAITING:
                _count(self.waiting, amount_minor)
            case Paid.UNDER_REVIEW:
                _count(self.review, amount_minor)
            case Paid.NOT_PAID:
                _count(self.not_paid, amount_minor)
        if self.first_at_unix_ms is None:
            self.first_at_unix_ms = at
        self.last_at_unix_ms = at

    def as_json(self) -> dict[str, Any]:
        pairs = ("sales", "voids", "refunds", "instalments", "waiting", "review", "not_paid")
        return {
            "state": self.state,
            "first_sequence": self.first_sequence,
            "last_sequence": self.last_sequence,
            "first_at_unix_ms": self.first_at_unix_ms,
            "last_at_unix_ms": self.last_at_unix_ms,
            **{
                name: {"count": pair[0], "amount_minor": pair[1]}
                for name in pairs
                for pair in [getattr(self, name)]
            },
            "net_minor": self.net_minor,
            "declined": dict(sorted(self.declined.items())),
            "by_hour": {str(hour): amount for hour, amount in sorted(self.by_hour.items())},
        }


def _count(pair: list[int], amount_minor: int) -> None:
    pair[0] += 1
    pair[1] += amount_minor


class History:
    """`zone`: the shop's, None for this machine's."""

    def __init__(self, path: Path, zone: tzinfo | None = None) -> None:
        self._path = path
        self._zone = zone

    def search(self, search: Search, limit: int) -> list[Found]:
        """The newest first."""
        with self._read() as file:
            told = file.payments(
                search.before,
                min(limit, MAX_FOUND),
                since_unix_ms=search.since_unix_ms,
                until_unix_ms=search.until_unix_ms,
                kinds=search.kinds,
                amount_minor=search.amount_minor,
                last4=search.last4,
                sale_id_prefix=search.sale_id_prefix,
            )
        return [Found.of(one) for one in told]

    def story(self, payment_id: UUID) -> list[Record]:
        """Every record that speaks of a payment, and of its corrections, in order.

        Raises:
            NotFound: none does.
        """
        with self._read() as file:
            records = file.about(payment_id)
            for record in tuple(records):
                if record.kind.corrects:
                    records += [r for r in file.about(record.id) if r.id != record.id]
        if not records:
            raise NotFound("no payment is known under this id", advice="nothing was charged under it")
        return sorted({record.id: record for record in records}.values(), key=lambda r: r.sequence)

    def totals(self, after: int, until: int) -> Totals:
        """Of the records with `after` < sequence <= `until`."""
        totals = Totals(first_sequence=after + 1, last_sequence=until)
        with self._read() as file:
            for told in file.told(after, until, COUNTED_KINDS):
                totals.add(Found.of(told), self._zone)
        return totals

    def since(self, unix_ms: int, until_unix_ms: int = _FAR) -> Totals:
        """Of what was tapped, or corrected, within a time."""
        totals = Totals()
        with self._read() as file:
            first = file.first_at_or_after(unix_ms)
            for told in file.told(first - 1, _FAR, COUNTED_KINDS):
                found = Found.of(told)
                if unix_ms <= found.facts["at_unix_ms"] < until_unix_ms:
                    totals.add(found, self._zone)
                    totals.first_sequence = totals.first_sequence or found.sequence
                    totals.last_sequence = found.sequence
        return totals

    def shifts_since_the_day(self) -> list[Record]:
        with self._read() as file:
            return file.shifts_since_the_day()

    def days(self, limit: int = 31) -> list[Record]:
        with self._read() as file:
            return file.days(limit)

    @contextmanager
    def _read(self) -> Iterator[JournalFile]:
        file = JournalFile.open_for_reading(self._path)
        try:
            yield file
        finally:
            file.close()
