"""`ledger history`: months of many customers' lives in a ledger's books, made from a seed.

Purchases are booked set by set and come from no card, so that ten thousand accounts take minutes; all that
follows (bills, repayments that clear or bounce, plans repaid early, refunds, hardship, losses) goes through
the same doors as in earnest.
"""

from __future__ import annotations

import random
import uuid
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa

from pos_gateway.errors import InvalidInput
from pos_gateway.instalments import Charge, Offer, Quote, quote
from pos_gateway.ledger import movements, store
from pos_gateway.ledger.accounts import lock_account
from pos_gateway.ledger.billing_run import close_everything
from pos_gateway.ledger.books import PAYABLE, RECEIVABLE, book
from pos_gateway.ledger.bulk import among, insert_rows, update_each
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.credit.calendar import Cycle, day_of, zone
from pos_gateway.ledger.credit_books import Desk
from pos_gateway.ledger.plans import PlanKind, plan_rows
from pos_gateway.ledger.purposes import Purpose
from pos_gateway.ledger.store import Store
from pos_gateway.money import currency

_MERCHANT: Final = "HISTORY"
_ZONES: Final = ("Asia/Shanghai", "Europe/Berlin", "America/Santiago", "Asia/Kathmandu")


def offers() -> tuple[Offer, ...]:
    """One of each kind."""
    made = []
    for name, charge, bps in (
        ("flat", Charge.FLAT_FEE, 50),
        ("annuity", Charge.ANNUITY, 100),
        ("funded", Charge.MERCHANT_FUNDED, 300),
    ):
        periods = (1, 3, 6, 12, 24)
        made.append(
            Offer(id=name, currency=currency("CNY"), charge=charge, periods=periods, rate_per_period_bps=bps)
        )
    return tuple(made)


@dataclass(slots=True)
class _Customer:
    id: str
    pays: float
    """How likely a bill is paid in full."""
    open: list[str] = field(default_factory=list)
    purchases: list[tuple[uuid.UUID, int]] = field(default_factory=list)


class History:
    """Lives of `accounts` customers from `start` on. `run` may be called again: it goes on."""

    def __init__(self, database: Store, accounts: int, seed: int, start: date, policy: Policy) -> None:
        self._database = database
        self._random = random.Random(seed)
        self._today = start
        self._offers = offers()
        self._policy = policy.model_copy(update={"offers": self._offers})
        self._number = 0
        self._customers = self._open(accounts)

    def run(self, days: int, progress: Callable[[date], object] = lambda day: None) -> None:
        for _ in range(days):
            self._day()
            progress(self._today)
            self._today += timedelta(days=1)

    @property
    def now_unix_ms(self) -> int:
        return self._at(23)

    def _at(self, hour: int) -> int:
        return int(
            datetime(self._today.year, self._today.month, self._today.day, hour, tzinfo=UTC).timestamp()
            * 1000
        )

    def _open(self, accounts: int) -> list[_Customer]:
        rows = []
        at_unix_ms = self._at(0)
        for number in range(accounts):
            time_zone = self._random.choice(_ZONES)
            closing_day = self._random.choice((1, 5, 15, 28, 29, 30, 31))
            opened = day_of(at_unix_ms, zone(time_zone))
            rows.append(
                {
                    "id": f"life-{number:07d}",
                    "holder": f"Customer {number}",
                    "currency": "CNY",
                    "limit_minor": 1_000_000,
                    "target_line_minor": 1_000_000,
                    "outstanding_minor": 0,
                    "opened_unix_ms": at_unix_ms,
                    "time_zone": time_zone,
                    "closing_day": closing_day,
                    "last_closing": opened.toordinal() - 1,
                    "next_closing": Cycle(closing_day, 1).closing_on_or_after(opened).toordinal(),
                }
            )
        with self._database.write() as connection:
            version = connection.scalar(sa.select(sa.func.max(store.policies.c.version))) or 0
            connection.execute(
                store.policies.insert().values(
                    version=version + 1, body=self._policy.model_dump_json(), since_unix_ms=at_unix_ms
                )
            )
            connection.execute(store.merchants.insert().values(id=_MERCHANT, name="History", category="5411"))
            insert_rows(connection, store.accounts, rows)
        return [_Customer(str(row["id"]), self._random.choice((0.2, 0.7, 0.95))) for row in rows]

    def _day(self) -> None:
        close_everything(self._database, self._at(1))
        chance = self._random.random
        with self._database.write() as connection:
            self._buy(connection, [c for c in self._customers if chance() < 0.06])
            for customer in self._customers:
                if chance() < 0.04:
                    self._act(connection, customer)

    def _buy(self, connection: sa.Connection, customers: list[_Customer]) -> None:
        columns = store.accounts.c
        free = {
            row.id: row.limit_minor - row.outstanding_minor - row.uncleared_minor
            for row in connection.execute(
                sa.select(store.accounts).where(among(connection, columns.id, [c.id for c in customers]))
            )
        }
        rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        owed: dict[str, int] = {}
        for customer in customers:
            amount_minor = self._random.randint(1_000, 200_000)
            if amount_minor > free[customer.id]:
                continue
            at_unix_ms, payment = self._at(2) + self._random.randrange(18 * 3600 * 1000), self._uuid()
            owed[customer.id] = amount_minor
            customer.purchases.append((payment, amount_minor))
            rows["transfers"].append(
                {
                    "account_id": customer.id,
                    "id": payment,
                    "kind": "payment",
                    "tapped_unix_ms": at_unix_ms,
                    "posted_unix_ms": at_unix_ms,
                }
            )
            for line, name, owner, sign in ((0, RECEIVABLE, customer.id, 1), (1, PAYABLE, _MERCHANT, -1)):
                rows["entries"].append(
                    {
                        "account_id": customer.id,
                        "transfer_id": payment,
                        "line": line,
                        "book": name,
                        "owner_id": owner,
                        "currency": "CNY",
                        "amount_minor": sign * amount_minor,
                    }
                )
            if self._random.random() < 0.3:
                plan, instalments = plan_rows(
                    customer.id, payment, PlanKind.PURCHASE, self._quote(amount_minor), at_unix_ms
                )
                rows["plans"].append({**plan, "merchant_fee_minor": 0})
                rows["instalments"] += instalments
        for table, found in (
            (store.transfers, rows["transfers"]),
            (store.entries, rows["entries"]),
            (store.plans, rows["plans"]),
            (store.plan_instalments, rows["instalments"]),
        ):
            insert_rows(connection, table, found)
        update_each(connection, store.accounts, "outstanding_minor", owed, add=True)

    def _quote(self, amount_minor: int) -> Quote:
        return quote(self._random.choice(self._offers), amount_minor, self._random.choice((1, 3, 6, 12, 24)))

    def _uuid(self) -> uuid.UUID:
        return uuid.UUID(int=self._random.getrandbits(128), version=4)

    def _act(self, connection: sa.Connection, customer: _Customer) -> None:
        now_unix_ms = self._at(21)
        account = lock_account(connection, customer.id, now_unix_ms // 1000)
        desk = Desk.open(connection, account, now_unix_ms)
        what = self._random.random()
        self._number += 1
        reference = f"{self._today.isoformat()}-{self._number}"
        owed_minor = sum(item.owed_minor for item in desk.items())
        if customer.open and what < 0.4:
            known = customer.open.pop()
            final = self._random.random() < 0.9
            movements.settle(connection, account, known, final=final, now_unix_ms=now_unix_ms)
        elif what < 0.8 and owed_minor:
            share = 1.0 if self._random.random() < customer.pays else self._random.random()
            amount_minor = max(1, int(owed_minor * share)) + (self._random.random() < 0.05) * 5_000
            movements.receive(
                connection,
                account,
                purpose=Purpose.REPAYMENT,
                reference=reference,
                amount_minor=amount_minor,
                now_unix_ms=now_unix_ms,
            )
            customer.open.append(reference)
        elif what < 0.86 and customer.purchases:
            self._refund(desk, customer)
        elif what < 0.92:
            self._settle_early(desk, customer, reference)
        elif what < 0.95:
            movements.receive(
                connection,
                account,
                purpose=Purpose.VAULT_LOCK,
                reference=reference,
                amount_minor=50_000,
                now_unix_ms=now_unix_ms,
            )
            customer.open.append(reference)
        elif what < 0.985:
            self._spread(desk)
        elif what < 0.995:
            desk.waive()
        elif desk.days_overdue() > 60:
            desk.write_off()

    def _refund(self, desk: Desk, customer: _Customer) -> None:
        payment, left_minor = customer.purchases.pop(self._random.randrange(len(customer.purchases)))
        amount_minor = self._random.choice((left_minor, self._random.randint(1, left_minor)))
        book(
            desk.connection,
            desk.account,
            kind="refund",
            debit=(PAYABLE, _MERCHANT),
            credit=(RECEIVABLE, customer.id),
            amount_minor=amount_minor,
            now_unix_ms=desk.now_unix_ms,
            original_id=payment,
        )
        desk.owe(-amount_minor)
        desk.give_back(payment, amount_minor, uuid.uuid4())

    def _settle_early(self, desk: Desk, customer: _Customer, reference: str) -> None:
        plans = store.plans.c
        query = sa.select(plans.id).where(plans.account_id == customer.id, plans.ahead_minor > 0)
        ids = sorted(desk.connection.scalars(query))
        if not ids:
            return
        settlement, items = desk.settle_plan(ids[0])
        movements.receive(
            desk.connection,
            desk.account,
            purpose=Purpose.REPAYMENT,
            reference=reference,
            amount_minor=settlement.total_minor,
            now_unix_ms=desk.now_unix_ms,
            first=items,
        )
        customer.open.append(reference)

    def _spread(self, desk: Desk) -> None:
        overdue = self._random.random() < 0.5
        items, amount_minor = desk.spreadable(overdue=overdue)
        if amount_minor:
            try:
                quoted = self._quote(amount_minor)
            except InvalidInput:
                return
            desk.spread(PlanKind.HARDSHIP if overdue else PlanKind.BILL, quoted, items)
