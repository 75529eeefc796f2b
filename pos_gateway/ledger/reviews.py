"""Genuine payments that are not guaranteed: held until somebody at the issuer decides.

Released, the merchant is paid: by the customer if the points may still be claimed or free credit covers it,
else by the issuer. Rejected, nobody pays. Either way the decision and its note stay.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import sqlalchemy as sa

from pos_gateway.errors import Conflict, NotFound
from pos_gateway.ledger import accounts, store
from pos_gateway.ledger.accounts import LockedAccount
from pos_gateway.ledger.books import ISSUER, ISSUER_LATE, MERCHANT_FEES, PAYABLE, RECEIVABLE, book
from pos_gateway.ledger.plans import PlanKind, from_facts, plan_rows
from pos_gateway.ledger.reserve import Interval, contains
from pos_gateway.records import Kind, Verdict

MAX_NOTE_CHARACTERS: Final = 400


class Why(Enum):
    """Why a payment is held."""

    LATE = "late"
    SUSPENDED = "suspended"
    BACKDATED = "backdated"
    AGAINST_RULES = "against_rules"

    @property
    def sentence(self) -> str:
        """For the shop's staff."""
        return _SENTENCES[self]


_SENTENCES: Final = {
    Why.LATE: "Presented too late to be guaranteed; the issuer will review it.",
    Why.SUSPENDED: "This gateway is suspended; the issuer will review the payment.",
    Why.BACKDATED: "This gateway had told everything up to that time; the issuer will review the payment.",
    Why.AGAINST_RULES: "Its limit did not allow it there and then; the issuer will review the payment.",
}


class Decision(Enum):
    RELEASED = "released"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class Review:
    """One payment that was held. `decision` is None while it waits."""

    gateway_id: str
    record_id: uuid.UUID
    account_id: str
    amount_minor: int
    why: Why
    held_unix_ms: int
    decision: Decision | None
    note: str | None
    decided_unix_ms: int | None


def waiting(connection: sa.Connection) -> tuple[Review, ...]:
    """Those that wait for a decision, the longest first."""
    return _select(connection, store.reviews.c.decision.is_(None))


def find(connection: sa.Connection, gateway_id: str, record_id: uuid.UUID) -> Review:
    """
    Raises:
        NotFound: nothing of that gateway was held under that id.
    """
    columns = store.reviews.c
    for review in _select(
        connection, sa.and_(columns.gateway_id == gateway_id, columns.record_id == record_id)
    ):
        return review
    raise NotFound(f"no record {record_id} of gateway {gateway_id} was held for review")


def decide(
    connection: sa.Connection,
    account: LockedAccount,
    review: Review,
    *,
    release: bool,
    note: str,
    now_unix_ms: int,
) -> Verdict:
    """Settle a held payment; returns its verdict. The same decision again changes nothing.

    Raises:
        Conflict: it was decided otherwise, or what is to be released was voided by its gateway.
    """
    decision = Decision.RELEASED if release else Decision.REJECTED
    if review.decision is decision:
        return Verdict.POSTED if release else Verdict.LATE
    if review.decision is not None:
        raise Conflict(f"it was {review.decision.value} before")
    verdict, reason = Verdict.LATE, "The issuer has reviewed the payment and does not pay it."
    if release:
        _pay(connection, account, review, now_unix_ms)
        verdict, reason = Verdict.POSTED, "The issuer has reviewed the payment and pays it."
    mine = {"gateway_id": review.gateway_id, "record_id": review.record_id}
    connection.execute(
        store.presentments.update().filter_by(**mine).values(verdict=verdict.value, reason=reason)
    )
    connection.execute(
        store.reviews.update()
        .filter_by(**mine)
        .values(decision=decision.value, note=note[:MAX_NOTE_CHARACTERS], decided_unix_ms=now_unix_ms)
    )
    return verdict


def _pay(connection: sa.Connection, account: LockedAccount, review: Review, now_unix_ms: int) -> None:
    voided = sa.select(store.presentments.c.record_id).filter_by(
        gateway_id=review.gateway_id, about=review.record_id, kind=Kind.REVERSAL.value
    )
    if connection.execute(voided).first() is not None:
        raise Conflict("its gateway has voided the payment: there is nothing to pay")
    claims = store.claims.c
    mine = sa.and_(claims.gateway_id == review.gateway_id, claims.record_id == review.record_id)
    claim = connection.execute(sa.select(store.claims).where(mine)).one()
    merchant_id = connection.execute(
        sa.select(store.gateways.c.merchant_id).filter_by(id=review.gateway_id)
    ).scalar_one()
    by_customer = _may_charge(connection, account, claim)
    before_minor = {account.id: account.committed_minor}
    body = connection.execute(
        sa.select(store.presentments.c.body).filter_by(
            gateway_id=review.gateway_id, record_id=review.record_id
        )
    ).scalar_one()
    transfer_id = book(
        connection,
        account,
        kind="payment",
        debit=(RECEIVABLE, account.id) if by_customer else (ISSUER_LATE, ISSUER),
        credit=(PAYABLE, merchant_id),
        amount_minor=review.amount_minor,
        now_unix_ms=now_unix_ms,
        record=(review.gateway_id, review.record_id, claim.token_id),
    )
    if by_customer and (quoted := from_facts(json.loads(body))) is not None:
        plan, instalments = plan_rows(
            account.id, transfer_id, PlanKind.PURCHASE, quoted, now_unix_ms, merchant_id=merchant_id
        )
        connection.execute(store.plans.insert().values(plan))
        connection.execute(store.plan_instalments.insert(), instalments)
        if quoted.merchant_fee_minor:
            book(
                connection,
                account,
                kind="merchant_fee",
                debit=(PAYABLE, merchant_id),
                credit=(MERCHANT_FEES, ISSUER),
                amount_minor=quoted.merchant_fee_minor,
                now_unix_ms=now_unix_ms,
            )
    if by_customer:
        connection.execute(store.claims.update().where(mine).values(posted=True))
        accounts.write_balance(connection, account, account.balance.owe(review.amount_minor))
    accounts.check_accounts(connection, [account.id], account.now_unix_s, before_minor)


def _may_charge(connection: sa.Connection, account: LockedAccount, claim: sa.Row[Any]) -> bool:
    """Points that may still be claimed are the customer's; others only if nobody else was paid for them,
    and free credit covers them."""
    interval: Interval = (claim.counter_before, claim.counter_after)
    if contains(account.line(claim.token_id).claimable(account.now_unix_s), interval):
        return True
    columns = store.claims.c
    over = sa.select(columns.token_id).where(
        columns.token_id == claim.token_id,
        columns.counter_after > claim.counter_before,
        columns.counter_before < claim.counter_after,
        columns.posted,
    )
    overlaps = connection.execute(over).first() is not None
    return not overlaps and claim.counter_after - claim.counter_before <= account.free_minor


def _select(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> tuple[Review, ...]:
    reviews, presentments = store.reviews, store.presentments
    query = (
        sa.select(reviews, presentments.c.body)
        .join(
            presentments,
            sa.and_(
                presentments.c.gateway_id == reviews.c.gateway_id,
                presentments.c.record_id == reviews.c.record_id,
            ),
        )
        .where(condition)
        .order_by(reviews.c.held_unix_ms, reviews.c.record_id)
    )
    return tuple(
        Review(
            gateway_id=row.gateway_id,
            record_id=row.record_id,
            account_id=row.account_id,
            amount_minor=json.loads(row.body)["amount_minor"],
            why=Why(row.why),
            held_unix_ms=row.held_unix_ms,
            decision=Decision(row.decision) if row.decision else None,
            note=row.note,
            decided_unix_ms=row.decided_unix_ms,
        )
        for row in connection.execute(query)
    )
