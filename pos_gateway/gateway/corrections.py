"""Voids and refunds at the till: of a payment in the journal, never beyond it, the same id never twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol
from uuid import UUID

from pos_gateway.authorization.correction import Standing, why_not_refund, why_not_void
from pos_gateway.errors import Conflict, InvalidMessage, NotFound
from pos_gateway.records import Kind, Record, Verdict

MAX_REASON_CHARACTERS: Final = 120

_REFUSING: Final = (Verdict.INVALID, Verdict.CONFLICT, Verdict.LATE)


class JournalPort(Protocol):
    """What corrections need of the journal."""

    def append(self, kind: Kind, record_id: UUID, facts: Mapping[str, Any], proof: bytes = b"") -> Record: ...

    def about(self, record_id: UUID) -> list[Record]: ...


class Corrections:
    """Safe to call from any thread; one correction is judged and journalled at a time.

    `facts`: what every record of this station says of itself. `now_unix_ms`: the shop's clock.
    """

    def __init__(
        self, journal: JournalPort, facts: Mapping[str, Any], now_unix_ms: Callable[[], int]
    ) -> None:
        self._journal = journal
        self._facts = facts
        self._now_unix_ms = now_unix_ms
        self._lock = threading.Lock()

    def void(self, payment_id: UUID, correction_id: UUID, reason: str) -> Record:
        """Void a whole payment, presented or not. Durable when this returns.

        Raises:
            NotFound: no such payment was approved here.
            Conflict: it is void, or refunded in part, or the id stands for something else.
            InvalidMessage: the reason is too long.
            Unavailable, OutcomeUnknown: see `Journal.append`.
        """
        return self._correct(Kind.REVERSAL, payment_id, None, correction_id, reason)

    def refund(self, payment_id: UUID, amount_minor: int, correction_id: UUID, reason: str) -> Record:
        """Give back a payment's amount or a part of it. Durable when this returns.

        Raises:
            NotFound, Conflict, InvalidMessage, Unavailable, OutcomeUnknown: see `void`.
        """
        return self._correct(Kind.REFUND, payment_id, amount_minor, correction_id, reason)

    def standing(self, payment_id: UUID) -> Standing | None:
        """How a payment stands after all corrections; None if it was not approved here."""
        authorization: Record | None = None
        refunded_minor, voided, refused = 0, False, False
        for record in self._journal.about(payment_id):
            if record.kind is Kind.AUTHORIZATION:
                authorization = record
            elif record.kind is Kind.ACKNOWLEDGEMENT:
                refused = _refuses(record)
            elif record.kind.corrects and not self._was_refused(record.id):
                if record.kind is Kind.REVERSAL:
                    voided = True
                else:
                    refunded_minor += record.facts()["amount_minor"]
        if authorization is None:
            return None
        return Standing(authorization.facts()["amount_minor"], refunded_minor, voided, refused)

    def _was_refused(self, correction_id: UUID) -> bool:
        """A correction that the ledger did not take moved nothing: another may be tried."""
        refused = False
        for record in self._journal.about(correction_id):
            if record.kind is Kind.ACKNOWLEDGEMENT:
                refused = _refuses(record)
        return refused

    def _correct(
        self, kind: Kind, payment_id: UUID, amount_minor: int | None, correction_id: UUID, reason: str
    ) -> Record:
        if len(reason) > MAX_REASON_CHARACTERS:
            raise InvalidMessage(f"must have at most {MAX_REASON_CHARACTERS} characters", where="reason")
        with self._lock:
            standing = self.standing(payment_id)
            if standing is None:
                raise NotFound("no payment was approved here under this id", advice="nothing was charged")
            if amount_minor is None:
                amount_minor = standing.amount_minor
            done = self._done_before(kind, payment_id, amount_minor, correction_id)
            if done is not None:
                return done
            why_not = (
                why_not_void(standing) if kind is Kind.REVERSAL else why_not_refund(standing, amount_minor)
            )
            if why_not is not None:
                raise Conflict(why_not)
            facts = {
                **self._facts,
                "about": str(payment_id),
                "amount_minor": amount_minor,
                "at_unix_ms": self._now_unix_ms(),
                "reason": reason,
            }
            return self._journal.append(kind, correction_id, facts)

    def _done_before(
        self, kind: Kind, payment_id: UUID, amount_minor: int, correction_id: UUID
    ) -> Record | None:
        for record in self._journal.about(correction_id):
            if record.id != correction_id:
                continue
            facts = record.facts()
            same = record.kind is kind and facts["about"] == str(payment_id)
            if not same or facts["amount_minor"] != amount_minor:
                raise Conflict("this id was used for something else", advice="use a new id")
            return record
        return None


def _refuses(acknowledgement: Record) -> bool:
    return Verdict(acknowledgement.facts()["verdict"]) in _REFUSING
