"""Everything derived a second time: balances from the transfers, bills from the rules, one account at a time.

The bills were decided in SQL, batch by batch; here `credit.billing` decides them again in Python from what
was booked and allocated, plans are run again from their offers, and repayments are allocated again.
"""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import Any, Final

import sqlalchemy as sa

from pos_gateway.instalments import Instalment, Offer, quote
from pos_gateway.ledger import store
from pos_gateway.ledger.books import CHARGES, LOANS, RECEIVABLE, VAULT
from pos_gateway.ledger.bulk import among
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.credit import plans as pure_plans
from pos_gateway.ledger.credit.billing import Billed, Due, Held, bill
from pos_gateway.ledger.credit.calendar import Cycle, day_of, end_of_day_unix_ms, zone
from pos_gateway.ledger.credit.debts import Item, Origin, allocate
from pos_gateway.ledger.credit.plans import Plan
from pos_gateway.ledger.credit.terms import CreditTerms, Part
from pos_gateway.ledger.postings import trial_balance
from pos_gateway.ledger.purposes import Purpose, State
from pos_gateway.ledger.store import Store

_AT_ONCE: Final = 500
_NEVER_UNIX_MS: Final = 1 << 62
_WAITING: Final = ("e", "g")
"""Letters of items that were made between bills."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not what it follows from."""

    account_id: str
    what: str
    kept: str
    derived: str


@dataclass(frozen=True, slots=True)
class Audit:
    """`derived` counts what was derived again, by kind; the trial balance sums to zero if the books do."""

    accounts: int
    derived: dict[str, int]
    differences: tuple[Difference, ...]
    trial_balance: dict[str, int]

    @property
    def holds(self) -> bool:
        return not self.differences and sum(self.trial_balance.values()) == 0


def audit(
    database: Store,
    progress: Callable[[int], object] = lambda accounts: None,
    *,
    only: Sequence[str] | None = None,
) -> Audit:
    """Derive everything again, in one consistent view; `only` of these accounts if they are said."""
    differences: list[Difference] = []
    derived: dict[str, int] = defaultdict(int)
    count = 0
    with database.read() as connection:
        bodies = {row.version: row.body for row in connection.execute(sa.select(store.policies))}

        @cache
        def terms(version: int) -> CreditTerms:
            return Policy.model_validate_json(bodies[version]).credit

        every = sa.select(store.accounts.c.id).order_by(store.accounts.c.id)
        ids = connection.scalars(every).all() if only is None else list(only)
        for start in range(0, len(ids), _AT_ONCE):
            for books in _read(connection, ids[start : start + _AT_ONCE]):
                differences += _Examination(books, terms, max(bodies), derived).all()
                count += 1
            progress(count)
        return Audit(count, dict(derived), tuple(differences), trial_balance(connection))


@dataclass(slots=True)
class _Books:
    """All rows of one account."""

    account: Any
    entries: list[Any]
    items: list[Any]
    allocations: list[Any]
    plans: list[Any]
    instalments: list[Any]
    bills: list[Any]
    movements: list[Any]


def _read(connection: sa.Connection, ids: Sequence[str]) -> Iterator[_Books]:
    entries, transfers = store.entries.c, store.transfers.c
    booked = (
        sa.select(
            entries.account_id,
            entries.book,
            entries.owner_id,
            entries.amount_minor,
            transfers.id,
            transfers.original_id,
            transfers.posted_unix_ms,
        )
        .join(
            store.transfers,
            sa.and_(transfers.account_id == entries.account_id, transfers.id == entries.transfer_id),
        )
        .order_by(transfers.posted_unix_ms)
    )
    found = [
        _by_account(connection, query, table, ids)
        for query, table in (
            (booked, store.entries),
            *(
                (sa.select(table), table)
                for table in (
                    store.items,
                    store.allocations,
                    store.plans,
                    store.plan_instalments,
                    store.bills,
                    store.movements,
                )
            ),
        )
    ]
    accounts = sa.select(store.accounts).where(among(connection, store.accounts.c.id, ids))
    for account in connection.execute(accounts.order_by(store.accounts.c.id)).all():
        yield _Books(account, *(rows[account.id] for rows in found))


def _by_account(
    connection: sa.Connection, query: sa.Select[Any], table: sa.Table, ids: Sequence[str]
) -> dict[str, list[Any]]:
    rows: dict[str, list[Any]] = defaultdict(list)
    for row in connection.execute(query.where(among(connection, table.c.account_id, ids))):
        rows[row.account_id].append(row)
    return rows


class _Examination:
    def __init__(
        self,
        books: _Books,
        terms: Callable[[int], CreditTerms],
        newest_policy: int,
        derived: dict[str, int],
    ) -> None:
        self._books = books
        self._terms = terms
        self._newest = newest_policy
        self._derived = derived
        self._differences: list[Difference] = []
        self._bills = {row.closing: row for row in books.bills}
        self._charged: dict[int, int] = defaultdict(int)
        self._paid: dict[str, list[Any]] = defaultdict(list)
        for row in sorted(books.allocations, key=lambda row: row.sequence):
            self._paid[row.item_id].append(row)

    def all(self) -> list[Difference]:
        self._balances()
        self._owed()
        self._cycles()
        self._repayments()
        return self._differences

    def _same(self, what: str, kept: object, derived: object) -> None:
        self._derived[what.split(" ")[0]] += 1
        if kept != derived:
            self._differences.append(
                Difference(self._books.account.id, what, str(kept)[:200], str(derived)[:200])
            )

    def _balances(self) -> None:
        account = self._books.account
        totals: dict[str, int] = defaultdict(int)
        for row in self._books.entries:
            if row.owner_id == account.id:
                totals[row.book] += row.amount_minor
        self._same("outstanding", account.outstanding_minor, totals[RECEIVABLE])
        self._same("vault", account.vault_minor, -totals[VAULT])
        uncleared = sum(
            row.amount_minor - row.outside_minor
            for row in self._books.movements
            if row.state == State.UNCLEARED.value and row.purpose != Purpose.VAULT_UNLOCK.value
        )
        self._same("uncleared", account.uncleared_minor, uncleared)
        for name in (CHARGES, LOANS):
            ahead = sum(plan.ahead_minor for plan in self._books.plans if plan.book == name)
            owed = sum(item.owed_minor for item in self._books.items if item.book == name)
            self._same(name, owed + ahead, totals[name])

    def _owed(self) -> None:
        for item in self._books.items:
            paid = sum(row.amount_minor for row in self._paid[item.id])
            self._same("item owed", item.owed_minor, item.amount_minor - paid)

    def _cycles(self) -> None:
        account = self._books.account
        if account.next_closing is None:
            return
        where = zone(account.time_zone)
        opened = day_of(account.opened_unix_ms, where)
        # How many days a bill is due after does not move its closing.
        cycle = Cycle(account.closing_day, 1)
        plans = {plan.id: _Running(plan, self._books.entries) for plan in self._books.plans}
        for item in self._books.items:
            if item.id.split("/")[1] == "e":
                plans[item.plan_id].ends_on = item.since
        previous, closing = opened.toordinal() - 1, cycle.closing_on_or_after(opened)
        seen = set()
        while closing.toordinal() < account.next_closing:
            seen.add(closing.toordinal())
            self._cycle(date.fromordinal(previous), closing, end_of_day_unix_ms(closing, where), plans)
            previous, closing = closing.toordinal(), cycle.closing_after(closing)
        self._same("closing next", account.next_closing, closing.toordinal())
        for plan in plans.values():
            plan.go_to(_NEVER_UNIX_MS, date.max.toordinal())
        self._same("bills all", sorted(set(self._bills) - seen), [])
        for plan in self._books.plans:
            self._same("plan ahead", plan.ahead_minor, plans[plan.id].now().ahead_minor)
            stored = [
                (row.number, row.principal_minor, row.fee_minor)
                for row in sorted(self._books.instalments, key=lambda row: row.number)
                if row.plan_id == plan.id and row.closing is None
            ]
            ahead = [(i.number, i.principal_minor, i.fee_minor) for i in plans[plan.id].now().ahead]
            self._same("plan instalments", stored, ahead)
        for number, row in self._bills.items():
            self._same("bill fees", row.overdue_charged_minor, self._charged[number])

    def _cycle(
        self, previous: date, closing: date, cutoff_unix_ms: int, plans: dict[uuid.UUID, _Running]
    ) -> None:
        row = self._bills.get(closing.toordinal())
        terms = self._terms(row.policy_version if row is not None else self._newest)
        for plan in plans.values():
            plan.go_to(cutoff_unix_ms, closing.toordinal())
        running = [
            plan for plan in plans.values() if plan.row.made_unix_ms < cutoff_unix_ms and plan.now().ahead
        ]
        principal_minor = sum(
            entry.amount_minor
            for entry in self._books.entries
            if entry.book == RECEIVABLE and entry.posted_unix_ms < cutoff_unix_ms
        ) - sum(plan.now().ahead_minor for plan in running if plan.row.book == RECEIVABLE)
        taken = [(plan, plan.take()) for plan in running]
        held = list(self._held(closing, cutoff_unix_ms))
        billed = bill(
            principal_minor=principal_minor,
            held=held,
            instalments=[(instalment.principal_minor, instalment.fee_minor) for _, instalment in taken],
            earlier={
                date.fromordinal(number): Due(earlier.due_minor, self._charged[number])
                for number, earlier in self._bills.items()
                if number < closing.toordinal()
            },
            previous=previous,
            closing=closing,
            terms=terms,
        )
        for of, fee in billed.fees.items():
            self._charged[of.toordinal()] += fee
        if billed.total_minor <= 0 and billed.purchases_minor >= 0:
            self._same(f"bill none {closing}", row, None)
            return
        kept = {name: getattr(row, name) for name in _SUMS} if row is not None else None
        self._same(f"bill {closing}", kept, {name: getattr(billed, name) for name in _SUMS})
        if row is None:
            return
        due = closing.toordinal() + terms.due_after_days
        self._same(f"bill dates {closing}", (row.due_on, row.cutoff_unix_ms), (due, cutoff_unix_ms))
        stored = {
            item.id: item.amount_minor
            for item in self._books.items
            if item.closing == closing.toordinal() and item.id.split("/")[1] not in _WAITING
        }
        self._same(f"items {closing}", stored, dict(_expected(closing, billed, taken)))

    def _held(self, closing: date, cutoff_unix_ms: int) -> Iterator[Held]:
        number = closing.toordinal()
        for row in self._books.items:
            waits = row.id.split("/")[1] in _WAITING
            if waits and (row.closing is None or row.closing >= number):
                if row.since > number:
                    continue
                stands_on = None
            elif row.closing is not None and row.closing < number:
                stands_on = date.fromordinal(row.closing)
            else:
                continue
            paid = [
                (date.fromordinal(a.day), a.amount_minor)
                for a in self._paid[row.id]
                if a.at_unix_ms < cutoff_unix_ms
            ]
            owed_minor = row.amount_minor - sum(amount for _, amount in paid)
            bears = row.bears_from is not None and stands_on is not None
            yield Held(
                item=_item(row, owed_minor, row.due_on if stands_on is not None else None),
                amount_minor=row.amount_minor,
                paid=paid,
                closing=stands_on,
                revolves=bool(row.revolves),
                bears_from=date.fromordinal(row.bears_from) if bears else None,
                counts=row.book == RECEIVABLE,
            )

    def _repayments(self) -> None:
        """What went to items went to them in the order that the terms say."""
        groups: dict[int, list[Any]] = defaultdict(list)
        for row in self._books.allocations:
            if row.cause == "repayment":
                groups[row.sequence].append(row)
        bill_sequences = {row.closing: row.sequence for row in self._books.bills}
        for sequence, rows in groups.items():
            stored = {row.item_id: row.amount_minor for row in rows}
            terms = self._terms(
                max(
                    (b.policy_version for b in self._books.bills if b.sequence < sequence),
                    default=self._newest,
                )
            )
            items = []
            for item in self._books.items:
                if item.sequence >= sequence:
                    continue
                owed = item.amount_minor - sum(
                    a.amount_minor for a in self._paid[item.id] if a.sequence < sequence
                )
                billed = item.closing is not None and bill_sequences.get(item.closing, 0) < sequence
                if owed:
                    items.append(_item(item, owed, item.due_on if billed else None))
            today = date.fromordinal(rows[0].day)
            again = _allocated(sum(stored.values()), items, terms, today)
            if again != stored:
                # An early repayment goes to its own plan first.
                own = [i for i in items if i.id in stored and i.id.split("/")[1] in _WAITING]
                first_minor = min(sum(i.owed_minor for i in own), sum(stored.values()))
                again = _allocated(first_minor, own, terms, today) if own else again
                rest_minor = sum(stored.values()) - first_minor
                if own and rest_minor:
                    mine = {i.id for i in own}
                    again |= _allocated(rest_minor, [i for i in items if i.id not in mine], terms, today)
            self._same("repayment", stored, again)


class _Running:
    """A plan run again from its offer."""

    def __init__(self, row: Any, entries: Iterable[Any]) -> None:
        self.row = row
        self.ends_on: int | None = None
        offer = Offer.from_json(json.loads(row.offer))
        first = quote(offer, row.principal_minor, row.periods).instalments
        self._plan = Plan(offer, row.principal_minor, first)
        self._refunds = [
            (entry.posted_unix_ms, -entry.amount_minor)
            for entry in entries
            if entry.original_id == row.id and entry.book == RECEIVABLE
        ]

    def now(self) -> Plan:
        return self._plan

    def go_to(self, cutoff_unix_ms: int, day: int) -> None:
        while self._refunds and self._refunds[0][0] < cutoff_unix_ms:
            _, amount_minor = self._refunds.pop(0)
            self._plan, _ = pure_plans.refund(self._plan, amount_minor)
        if self.ends_on is not None and self.ends_on <= day:
            self._plan = Plan(self._plan.offer, self._plan.principal_minor, ())

    def take(self) -> Instalment:
        first, *rest = self._plan.ahead
        self._plan = Plan(self._plan.offer, self._plan.principal_minor, tuple(rest))
        return first


_SUMS: Final = (
    "purchases_minor",
    "carried_minor",
    "instalments_minor",
    "instalment_fees_minor",
    "interest_minor",
    "overdue_fee_minor",
    "arrears_minor",
    "total_minor",
    "minimum_minor",
    "due_minor",
)


def _expected(
    closing: date, billed: Billed, taken: Iterable[tuple[_Running, Any]]
) -> Iterator[tuple[str, int]]:
    day = closing.isoformat()
    for name, amount_minor in (
        ("1i", billed.interest_minor),
        ("1o", billed.overdue_fee_minor),
        ("q1", billed.carried_due_minor),
        ("q2", billed.purchases_due_minor),
        ("r1", billed.carried_minor - billed.carried_due_minor),
        ("r2", max(billed.purchases_minor, 0) - billed.purchases_due_minor),
    ):
        if amount_minor:
            yield f"{day}/{name}", amount_minor
    for plan, instalment in taken:
        yield f"{day}/p/{plan.row.id.hex}/{instalment.number}", instalment.principal_minor
        if instalment.fee_minor:
            yield f"{day}/f/{plan.row.id.hex}/{instalment.number}", instalment.fee_minor


def _allocated(amount_minor: int, items: Sequence[Item], terms: CreditTerms, today: date) -> dict[str, int]:
    if not amount_minor:
        return {}
    allocations, _ = allocate(amount_minor, items, terms, today)
    return {allocation.item_id: allocation.amount_minor for allocation in allocations}


def _item(row: Any, owed_minor: int, due_on: int | None) -> Item:
    return Item(
        id=row.id,
        origin=Origin(row.origin),
        part=Part(row.part),
        owed_minor=owed_minor,
        since=date.fromordinal(row.since),
        due_on=None if due_on is None else date.fromordinal(due_on),
    )
