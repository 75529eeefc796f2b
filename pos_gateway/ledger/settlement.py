"""One batch inside its transaction: read what it touches, judge record by record, write it all.

A payment debits the customer's receivable and credits the merchant's payable; a reversal or refund does
the opposite. Whatever happens twice (the batch, the record, the same points on a counter line) is seen
here, under the locks of the gateway and of every account that is touched. Judging asks nobody: `batch`
has read everything before, and writes and checks everything after.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from pos_gateway.ledger import store
from pos_gateway.ledger.accounts import TokenStatus, lock_account
from pos_gateway.ledger.batch import (
    After,
    AlarmKind,
    Before,
    Examined,
    GivenBack,
    Line,
    ReliedOn,
    Seen,
    read_before,
)
from pos_gateway.ledger.books import ISSUER, ISSUER_FRAUD, PAYABLE, RECEIVABLE
from pos_gateway.ledger.bulk import among
from pos_gateway.ledger.corrections import Correction, Judged, Original, judge
from pos_gateway.ledger.credit_books import Desk
from pos_gateway.ledger.evidence import Tap
from pos_gateway.ledger.gateways import Gateway
from pos_gateway.ledger.movements import complete, is_pending
from pos_gateway.ledger.plans import offer_text
from pos_gateway.ledger.renunciations import NOTED, Renunciation
from pos_gateway.ledger.reserve import Guarantee, contains
from pos_gateway.ledger.reviews import Why
from pos_gateway.money import Currency
from pos_gateway.records import Kind, Record, Verdict

__all__ = ["PAYABLE", "RECEIVABLE", "AlarmKind", "Examined", "RecordVerdict", "settle"]

_POSTED: Final = "Paid."
_DUPLICATE: Final = "Paid; it had been presented before."
_CORRECTED_BEFORE: Final = "Done; it had been presented before."
_UNKNOWN: Final = "This issuer does not know the card."
_POSTED_LATE: Final = "Paid, though it was presented late."
_SET_BACK: Final = "Paid by the issuer: the card's counter is behind what it has shown before, it was copied."
_PAID_BY_ISSUER: Final = "Paid by the issuer: the card contradicts a payment presented before, it was copied."
_CONTRADICTS: Final = "The card contradicts a payment presented before: it may be a copy. Both are kept."
_NOBODY: Final = ("", "")
_NO_SUCH_OFFER: Final = "The payment's instalment plan is of an offer that this issuer never signed."
_RENOUNCED: Final = "This gateway has said that it will not present this payment."


@dataclass(frozen=True, slots=True)
class RecordVerdict:
    """The answer to one record. `reason` is a sentence for the shop's staff. `proves_clone`: the issuer must
    tell all shops at once (not told to this one)."""

    record_id: str
    verdict: Verdict
    reason: str
    proves_clone: bool = False

    def to_wire(self) -> dict[str, str]:
        return {"id": self.record_id, "verdict": self.verdict.value, "reason": self.reason}


def settle(
    connection: sa.Connection,
    gateway: Gateway,
    currency: Currency,
    now_unix_ms: int,
    examined: Sequence[Examined],
    guarantee: Guarantee,
    complete_until_unix_ms: int = 0,
    done: Callable[[str], object] = lambda step: None,
) -> list[RecordVerdict]:
    """Settle one batch of one gateway, once, inside the caller's transaction; the verdicts are in the order
    of the records. `complete_until_unix_ms`: the gateway says that with this batch it has presented all
    that it approved up to that time by its clock; 0 if it says nothing. `done` is told when each step is
    over: `read`, `judge`, `write`, `check`.

    Raises:
        InvariantBroken: a fault of ours; the transaction must not commit.
    """
    before = read_before(connection, gateway, examined, now_unix_ms)
    done("read")
    after = After(connection, gateway, currency, now_unix_ms)
    after.closed_until_unix_ms = before.closed_until_unix_ms
    verdicts = _Judgement(before, after, gateway, guarantee, now_unix_ms).all(examined)
    done("judge")
    after.write()
    done("write")
    after.check(before)
    done("check")
    # Never ahead of any honest shop's clock: a gateway whose own is would shut itself out for as long.
    until_unix_ms = min(complete_until_unix_ms, now_unix_ms - 1000 * guarantee.clock_tolerance_s)
    if until_unix_ms > before.complete_until_unix_ms:
        after.tell_complete(until_unix_ms, guarantee)
    _give_back(connection, after.given_back, now_unix_ms)
    for account_id in sorted(id_ for id_, balance in before.balances.items() if is_pending(balance)):
        account = lock_account(connection, account_id, now_unix_ms // 1000)
        complete(connection, account, now_unix_ms)
    return verdicts


def _give_back(connection: sa.Connection, given_back: Sequence[GivenBack], now_unix_ms: int) -> None:
    """What was voided or refunded leaves plans and bills; accounts that have neither are passed over."""
    if not given_back:
        return
    ids = {given.account_id for given in given_back}
    concerned: set[str] = set()
    for table, left in ((store.plans, store.plans.c.left_minor), (store.items, store.items.c.owed_minor)):
        query = sa.select(table.c.account_id).where(among(connection, table.c.account_id, ids), left > 0)
        concerned |= set(connection.scalars(query.distinct()))
    for account_id in sorted(concerned):
        account = lock_account(connection, account_id, now_unix_ms // 1000)
        desk = Desk.open(connection, account, now_unix_ms)
        for given in given_back:
            if given.account_id == account_id:
                desk.give_back(given.payment_id, given.amount_minor, given.record_id)


class _Judgement:
    """Judges record by record; what has been judged counts for the next."""

    def __init__(
        self, before: Before, after: After, gateway: Gateway, guarantee: Guarantee, now_unix_ms: int
    ) -> None:
        self._before = before
        self._after = after
        self._gateway = gateway
        self._guarantee = guarantee
        self._now_unix_ms = now_unix_ms
        self._clones: set[uuid.UUID] = set()

    def all(self, examined: Sequence[Examined]) -> list[RecordVerdict]:
        # A batch that was sent out of order is no reason to let a refund wait for its own payment.
        corrections = [place for place, item in enumerate(examined) if item.correction is not None]
        if not corrections:
            return [self._judge(item) for item in examined]
        payments = [place for place, item in enumerate(examined) if item.correction is None]
        verdicts = {place: self._judge(examined[place]) for place in (*payments, *corrections)}
        return [verdicts[place] for place in range(len(examined))]

    def _judge(self, item: Examined) -> RecordVerdict:
        record = item.record
        if record is None:
            self._after.alarm(AlarmKind.CHANGED_RECORD, item.record_id, None, item.reason)
            return RecordVerdict(item.record_id, Verdict.INVALID, item.reason)
        seen = self._before.seen.get(record.id)
        if seen is not None and seen.content_digest != record.hash:
            reason = "Another payment was presented under the same id before. Both are kept."
            self._after.alarm(AlarmKind.CHANGED_CONTENT, record.id, seen.account_id, reason, record)
            return RecordVerdict(item.record_id, Verdict.CONFLICT, reason)
        if seen is not None and seen.verdict is Verdict.POSTED:
            reason = _CORRECTED_BEFORE if record.kind.corrects else _DUPLICATE
            return RecordVerdict(item.record_id, Verdict.DUPLICATE, reason)
        if seen is not None and seen.verdict is not Verdict.UNKNOWN:
            return RecordVerdict(item.record_id, seen.verdict, seen.reason)

        other = self._before.sequences.setdefault(record.sequence, record.id)
        if other != record.id:
            detail = f"journal place {record.sequence} is record {other}'s"
            self._after.alarm(AlarmKind.SEQUENCE_REUSED, record.id, None, detail)
        if item.renunciation is not None:
            return self._judge_renunciation(record, item.renunciation)
        if item.correction is not None:
            return self._judge_correction(record, item, item.correction)
        return self._judge_payment(record, item)

    def _judge_renunciation(self, record: Record, renunciation: Renunciation) -> RecordVerdict:
        line = self._before.lines.get(renunciation.token_key)
        sale_id = uuid.UUID(bytes=renunciation.sale_id)
        account_id = line.token.account_id if line is not None else None
        verdict, reason = Verdict.POSTED, NOTED
        seen = self._before.seen.get(sale_id)
        if line is None:
            verdict, reason = Verdict.UNKNOWN, _UNKNOWN
        elif seen is not None and seen.kind is Kind.AUTHORIZATION:
            verdict, reason = Verdict.INVALID, "The payment itself was presented."
            self._after.alarm(AlarmKind.AGAINST_RULES, record.id, account_id, reason)
        elif renunciation.previous_digest not in line.renounced:
            self._after.renounce(line, renunciation)
            before = line.pointing.get(renunciation.previous_digest)
            if before is not None:
                self._after.write_off(line, before, renunciation.amount_minor, sale_id)
        self._keep(record, account_id, verdict, reason)
        return RecordVerdict(str(record.id), verdict, reason)

    def _judge_payment(self, record: Record, item: Examined) -> RecordVerdict:
        book = ("", "")
        line = self._before.lines.get(item.tap.token_key) if item.tap is not None else None
        account_id = line.token.account_id if line is not None else None
        if item.tap is None:
            verdict, reason = Verdict.INVALID, item.reason
            self._after.alarm(AlarmKind.FALSE_EVIDENCE, record.id, None, item.reason)
        elif line is None:
            verdict, reason = Verdict.UNKNOWN, _UNKNOWN
        else:
            verdict, reason, book = self._judge_tap(record, item.tap, line)
        self._keep(record, account_id, verdict, reason)
        if record.kind is Kind.AUTHORIZATION:
            original = self._before.originals[record.id] = Original(verdict, account_id)
            if verdict is Verdict.POSTED and item.tap is not None and line is not None:
                original.token_id = line.token.id
                original.amount_minor = original.left_minor = item.tap.amount_minor
                original.book = book
            if verdict is not Verdict.UNKNOWN:
                for record_id, correction in self._before.waiting.pop(record.id, ()):
                    self._judge_again(record_id, correction, original)
        return RecordVerdict(item.record_id, verdict, reason, proves_clone=record.id in self._clones)

    def _judge_correction(self, record: Record, item: Examined, correction: Correction) -> RecordVerdict:
        original = self._before.originals.get(correction.about)
        judged = self._correct(record.id, correction, original)
        account_id = original.account_id if original is not None else None
        self._keep(record, account_id, judged.verdict, judged.reason, correction.about)
        return RecordVerdict(item.record_id, judged.verdict, judged.reason)

    def _judge_again(self, record_id: uuid.UUID, correction: Correction, original: Original) -> None:
        judged = self._correct(record_id, correction, original)
        self._after.rejudge(record_id, original.account_id, judged.verdict, judged.reason)
        if (seen := self._before.seen.get(record_id)) is not None:
            self._before.seen[record_id] = seen._replace(verdict=judged.verdict, reason=judged.reason)

    def _correct(self, record_id: uuid.UUID, correction: Correction, original: Original | None) -> Judged:
        judged = judge(correction, original)
        if original is not None and judged.wrong:
            self._after.alarm(AlarmKind.WRONG_CORRECTION, record_id, original.account_id, judged.reason)
        if original is not None and judged.moves:
            original.left_minor -= correction.amount_minor
            original.voided |= correction.kind is Kind.REVERSAL
            self._after.post(
                record_id,
                correction.kind.value,
                original.account_id or "",
                original.token_id or "",
                -correction.amount_minor,
                correction.at_unix_ms,
                original=correction.about,
                book=original.book,
            )
        return judged

    def _judge_tap(self, record: Record, tap: Tap, line: Line) -> tuple[Verdict, str, tuple[str, str]]:
        """A genuine tap of a token that we know: verdict, reason, and the book that pays."""
        token = line.token
        relied_on = self._before.published.get((token.id, tap.limit_digest))
        if relied_on is None or relied_on.ceiling != tap.ceiling:
            reason = "The payment relies on a limit that this issuer never gave out."
            self._after.alarm(AlarmKind.FALSE_EVIDENCE, record.id, token.account_id, reason)
            return Verdict.INVALID, reason, _NOBODY
        self._after.observe(line, tap, relied_on, self._guarantee)
        line.pointing[tap.previous_digest] = tap.counter_before
        if tap.plan is not None and offer_text(tap.plan.offer) not in self._before.offers:
            self._after.alarm(AlarmKind.FALSE_EVIDENCE, record.id, token.account_id, _NO_SUCH_OFFER)
            return Verdict.INVALID, _NO_SUCH_OFFER, _NOBODY
        if tap.previous_digest in line.renounced:
            self._after.write_off(line, tap.counter_before, *line.renounced[tap.previous_digest])

        interval = (tap.counter_before, tap.counter_after)
        customer, issuer = (RECEIVABLE, token.account_id), (ISSUER_FRAUD, ISSUER)
        others = line.overlapping(*interval)
        for other in others:
            detail = f"overlaps record {other.record_id} of gateway {other.gateway_id}"
            self._after.alarm(AlarmKind.OVERLAP, record.id, token.account_id, detail)
            self._after.conflict(record, line, other)
            self._clones.add(record.id)
        contradicts = any(other.posted for other in others)
        if record.id in line.spoiled:
            self._after.claim(record, tap, line, posted=False)
            self._after.alarm(AlarmKind.AGAINST_RULES, record.id, token.account_id, _RENOUNCED)
            return Verdict.INVALID, _RENOUNCED, _NOBODY
        why = self._not_guaranteed(tap, relied_on)
        if why in (None, Why.LATE) and not contradicts and contains(line.claimable, interval):
            return self._post(record, tap, line, _POSTED, customer)
        if why is None and contradicts:
            # Somebody was served in good faith: the shop kept the rules, and the customer owes it to nobody.
            return self._post(record, tap, line, _PAID_BY_ISSUER, issuer)
        if why is None and tap.counter_before < relied_on.highest:
            # The limit was given out when the card's counter had been seen higher: it was copied or set back.
            self._after.alarm(AlarmKind.COUNTER_BEHIND, record.id, token.account_id, _SET_BACK)
            self._after.block(line)
            self._clones.add(record.id)
            return self._post(record, tap, line, _SET_BACK, issuer)
        if why is Why.AGAINST_RULES:
            self._after.alarm(AlarmKind.AGAINST_RULES, record.id, token.account_id, why.sentence)
        chargeable = why in (None, Why.LATE) and not others and token.status is TokenStatus.ACTIVE
        if chargeable and self._after.post_from_free(self._before, token.account_id, tap.amount_minor):
            return self._post(record, tap, line, _POSTED_LATE, customer)
        self._after.claim(record, tap, line, posted=False)
        self._after.hold(record.id, token.account_id, why or Why.LATE)
        if contradicts:
            return Verdict.CONFLICT, _CONTRADICTS, _NOBODY
        return Verdict.LATE, (why or Why.LATE).sentence, _NOBODY

    def _not_guaranteed(self, tap: Tap, relied_on: ReliedOn) -> Why | None:
        """Why the shop's side of the guarantee does not hold; None if it does."""
        if self._before.suspended:
            return Why.SUSPENDED
        if tap.at_unix_ms <= self._before.complete_until_unix_ms:
            return Why.BACKDATED
        for_another = relied_on.terminal_id not in (None, self._gateway.terminal_id)
        if for_another or tap.at_unix_ms >= relied_on.valid_until_unix_s * 1000:
            return Why.AGAINST_RULES
        covered_s = self._guarantee.presentment_deadline_s + self._guarantee.clock_tolerance_s
        if self._now_unix_ms > tap.at_unix_ms + covered_s * 1000:
            return Why.LATE
        return None

    def _post(
        self, record: Record, tap: Tap, line: Line, reason: str, book: tuple[str, str]
    ) -> tuple[Verdict, str, tuple[str, str]]:
        token = line.token
        self._after.claim(record, tap, line, posted=book[0] == RECEIVABLE)
        self._after.post(
            record.id, "payment", token.account_id, token.id, tap.amount_minor, tap.at_unix_ms, book=book
        )
        if tap.plan is not None and book[0] == RECEIVABLE:
            self._after.plan(record.id, token.account_id, tap.plan)
        return Verdict.POSTED, reason, book

    def _keep(
        self,
        record: Record,
        account_id: str | None,
        verdict: Verdict,
        reason: str,
        about: uuid.UUID | None = None,
    ) -> None:
        known = record.id in self._before.seen
        self._before.seen[record.id] = Seen(record.kind, record.hash, verdict, reason, account_id)
        if known:
            self._after.rejudge(record.id, account_id, verdict, reason)
        else:
            self._after.keep(record, account_id, verdict, reason, about)
