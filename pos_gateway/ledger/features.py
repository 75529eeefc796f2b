"""What the ledger's own history says about an account: the features that a scorecard may weigh."""

from __future__ import annotations

from datetime import date
from typing import Final

import sqlalchemy as sa

from pos_gateway.ledger import store
from pos_gateway.ledger.accounts import LockedAccount
from pos_gateway.ledger.credit.calendar import day_of, zone
from pos_gateway.ledger.purposes import State

NAMES: Final = (
    "tenure_days",
    "bills_due",
    "paid_on_time_percent",
    "worst_days_overdue",
    "utilisation_percent",
    "bounced_payments",
    "clone_disputes",
)


def features_of(connection: sa.Connection, account: LockedAccount, today: date) -> dict[str, int | None]:
    """By name; None where there is no history yet. Percents are whole, rounded down."""
    row = connection.execute(sa.select(store.accounts).filter_by(id=account.id)).one()
    bills = connection.execute(sa.select(store.bills).filter_by(account_id=account.id)).all()
    late = _days_late(connection, account.id, today)
    due = [bill.closing for bill in bills if bill.due_on < today.toordinal() and bill.minimum_minor > 0]
    on_time = sum(1 for closing in due if late.get(closing, 0) == 0)
    bounced = sa.select(sa.func.count()).where(
        store.movements.c.account_id == account.id, store.movements.c.state == State.BOUNCED.value
    )
    disputes = sa.select(sa.func.count()).where(store.conflicts.c.account_id == account.id)
    billed_minor = sum(max(bill.total_minor, 0) for bill in bills)
    room_minor = account.balance.limit_minor * len(bills)
    return {
        "tenure_days": (today - day_of(row.opened_unix_ms, zone(row.time_zone))).days,
        "bills_due": len(due),
        "paid_on_time_percent": 100 * on_time // len(due) if due else None,
        "worst_days_overdue": max(late.values(), default=0) if due else None,
        "utilisation_percent": 100 * billed_minor // room_minor if room_minor else None,
        "bounced_payments": int(connection.execute(bounced).scalar_one()),
        "clone_disputes": int(connection.execute(disputes).scalar_one()),
    }


def _days_late(connection: sa.Connection, account_id: str, today: date) -> dict[int, int]:
    """The most days after its due date that something due on each bill was paid, or is still owed."""
    items, allocations = store.items.c, store.allocations.c
    due = sa.and_(items.account_id == account_id, sa.not_(items.revolves), items.closing.is_not(None))
    late: dict[int, int] = {}
    owed = sa.select(items.closing, items.due_on).where(due, items.owed_minor > 0)
    for closing, due_on in connection.execute(owed):
        late[closing] = max(late.get(closing, 0), today.toordinal() - due_on)
    paid = (
        sa.select(items.closing, sa.func.max(allocations.day - items.due_on))
        .join(
            store.allocations,
            sa.and_(allocations.account_id == items.account_id, allocations.item_id == items.id),
        )
        .where(due, allocations.amount_minor > 0)
        .group_by(items.closing)
    )
    for closing, days in connection.execute(paid):
        late[closing] = max(late.get(closing, 0), days)
    return {closing: max(days, 0) for closing, days in late.items()}
