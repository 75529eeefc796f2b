"""Instalment plans as they stand in the books: made with the payment they repay, or out of what was billed.

A plan's principal is owed like any other; a bill takes one instalment of it at a time, and its fee with it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from enum import Enum
from typing import Any

import sqlalchemy as sa

from pos_gateway.instalments import Instalment, Offer, Quote, quote
from pos_gateway.ledger import store
from pos_gateway.ledger.books import LOANS, RECEIVABLE
from pos_gateway.ledger.credit.plans import Plan
from pos_gateway.records import canonical_json

EARLY = -1
"""Instead of the closing of a bill: taken by early repayment."""


class PlanKind(Enum):
    """What a plan repays."""

    PURCHASE = "purchase"
    BILL = "bill"
    HARDSHIP = "hardship"
    LOAN = "loan"


def offer_text(offer: Offer) -> str:
    """One text for one offer."""
    return canonical_json(offer.to_json())


def signed_offers(connection: sa.Connection) -> frozenset[str]:
    """Every offer that any policy of this issuer has held."""
    bodies = connection.scalars(sa.select(store.policies.c.body)).all()
    return frozenset(canonical_json(offer) for body in bodies for offer in json.loads(body)["offers"])


def plan_rows(
    account_id: str,
    plan_id: uuid.UUID,
    kind: PlanKind,
    quoted: Quote,
    now_unix_ms: int,
    *,
    merchant_id: str | None = None,
) -> tuple[dict[str, object], list[dict[str, object]]]:
    """The rows of a new plan and of its instalments: what was quoted is what will be charged."""
    plan: dict[str, object] = {
        "account_id": account_id,
        "id": plan_id,
        "kind": kind.value,
        "book": LOANS if kind is PlanKind.LOAN else RECEIVABLE,
        "offer": offer_text(quoted.offer),
        "quote": canonical_json(quoted.to_json()),
        "periods": quoted.periods,
        "principal_minor": quoted.principal_minor,
        "left_minor": quoted.principal_minor,
        "ahead_minor": quoted.principal_minor,
        "next_number": 1,
        "merchant_id": merchant_id,
        "merchant_fee_minor": quoted.merchant_fee_minor,
        "made_unix_ms": now_unix_ms,
    }
    return plan, instalment_rows(account_id, plan_id, quoted.instalments)


def instalment_rows(
    account_id: str, plan_id: uuid.UUID, instalments: Sequence[Instalment]
) -> list[dict[str, object]]:
    return [
        {
            "account_id": account_id,
            "plan_id": plan_id,
            "number": instalment.number,
            "principal_minor": instalment.principal_minor,
            "fee_minor": instalment.fee_minor,
        }
        for instalment in instalments
    ]


def from_facts(facts: dict[str, Any]) -> Quote | None:
    """The plan that a payment's facts tell, which were verified when it was presented."""
    plan = facts.get("plan")
    if plan is None:
        return None
    return quote(Offer.from_json(plan["offer"]), facts["amount_minor"], plan["periods"])


def ahead_of(connection: sa.Connection, row: sa.Row[Any]) -> Plan:
    """A plan with the instalments that no bill has taken."""
    columns = store.plan_instalments.c
    rows = connection.execute(
        sa.select(columns.number, columns.principal_minor, columns.fee_minor)
        .where(columns.account_id == row.account_id, columns.plan_id == row.id, columns.closing.is_(None))
        .order_by(columns.number)
    ).all()
    ahead, left_minor = [], row.ahead_minor
    for number, principal_minor, fee_minor in rows:
        left_minor -= principal_minor
        ahead.append(Instalment(number, principal_minor, fee_minor, left_minor))
    return Plan(Offer.from_json(json.loads(row.offer)), row.left_minor, tuple(ahead))
