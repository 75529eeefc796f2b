"""What stands on one account's bills, inside the transaction that holds the account: what a repayment
goes to, what is taken back, what a refund or an early repayment leaves of a plan, what is given up.

Whatever is due to close is closed first, so that nothing can happen to an account before the bill of the
days before stands. An item is owed its amount less its allocations; each change has the account's next
sequence number, and with it its place among the bills.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, Final

import sqlalchemy as sa

from pos_gateway.errors import Conflict, NotFound
from pos_gateway.instalments import Quote
from pos_gateway.ledger import store
from pos_gateway.ledger.accounts import LockedAccount, block, check_accounts, write_balance
from pos_gateway.ledger.billing import Closing, close_batch, due_closings, newest_policy, start_cycles
from pos_gateway.ledger.books import (
    BANK,
    CHARGES,
    INSTALMENT_FEES,
    ISSUER,
    LOANS,
    LOSSES,
    MERCHANT_FEES,
    PAYABLE,
    RECEIVABLE,
    RECOVERIES,
    VAULT,
    book,
)
from pos_gateway.ledger.credit import plans as pure_plans
from pos_gateway.ledger.credit.calendar import day_of, zone
from pos_gateway.ledger.credit.debts import Allocation, Item, Origin, allocate
from pos_gateway.ledger.credit.terms import CreditTerms, Part
from pos_gateway.ledger.plans import EARLY, PlanKind, ahead_of, instalment_rows, plan_rows
from pos_gateway.ledger.purposes import vault_uncleared_minor

UNBILLED: Final = "unbilled"
"""Stands among the items for purchases that no bill has taken: no row of its own."""


@dataclass(frozen=True, slots=True)
class Desk:
    """An account that is held, with what is decided about its credit now. `day` is the account's own."""

    connection: sa.Connection
    account: LockedAccount
    terms: CreditTerms
    now_unix_ms: int
    day: date

    @classmethod
    def open(cls, connection: sa.Connection, account: LockedAccount, now_unix_ms: int) -> Desk:
        """Close what is due to close, and be ready for what happens now."""
        policy = newest_policy(connection)
        start_cycles(connection, account.id)
        now_unix_ms = max(now_unix_ms, account.closed_until_unix_ms)
        while (closing := next(due_closings(connection, now_unix_ms, account.id), None)) is not None:
            close_batch(connection, closing, policy, now_unix_ms, account_id=account.id)
            cls.after(connection, account, policy[1].credit, closing).follow_up()
        name = connection.execute(sa.select(store.accounts.c.time_zone).filter_by(id=account.id)).scalar_one()
        return cls(connection, account, policy[1].credit, now_unix_ms, day_of(now_unix_ms, zone(name)))

    @classmethod
    def after(
        cls, connection: sa.Connection, account: LockedAccount, terms: CreditTerms, closing: Closing
    ) -> Desk:
        """At the first moment after a closing, whenever that is done."""
        day = closing.closing + timedelta(days=1)
        return cls(connection, account, terms, closing.cutoff_unix_ms, day)

    def follow_up(self) -> None:
        """What a closing sets off: what was overpaid pays the bill, the vault pays what is long overdue."""
        self.spend_over()
        if self.account.balance.vault_minor:
            self.pay_from_vault()

    def items(self) -> tuple[Item, ...]:
        """What is owed, item by item, unbilled purchases last."""
        found = [_item(row) for row in self._rows()]
        unbilled_minor = self.unbilled_minor()
        if unbilled_minor > 0:
            found.append(Item(UNBILLED, Origin.PURCHASE, Part.PRINCIPAL, unbilled_minor, self.day))
        return tuple(found)

    def _rows(self) -> Sequence[sa.Row[Any]]:
        query = sa.select(store.items).filter_by(account_id=self.account.id)
        return self.connection.execute(query.where(store.items.c.owed_minor > 0)).all()

    def unbilled_minor(self) -> int:
        """Principal that is owed, stands on no bill and in no plan; below zero what was paid beyond."""
        items, plans = store.items.c, store.plans.c
        owed = sa.select(sa.func.coalesce(sa.func.sum(items.owed_minor), 0)).where(
            items.account_id == self.account.id, items.owed_minor > 0, items.book == RECEIVABLE
        )
        ahead = sa.select(sa.func.coalesce(sa.func.sum(plans.ahead_minor), 0)).where(
            plans.account_id == self.account.id, plans.book == RECEIVABLE
        )
        taken_minor = sum(int(self.connection.execute(query).scalar_one()) for query in (owed, ahead))
        return self.account.balance.outstanding_minor - taken_minor

    def repay(self, amount_minor: int, reference: str, *, first: Iterable[str] = ()) -> int:
        """Book what came in, on what it goes to; `first` names items that come before all others.

        Returns how much of it lowers what counts against the limit.
        """
        chosen = set(first)
        items = self.items()
        ours = [item for item in items if item.id in chosen]
        allocations, left_minor = (
            allocate(amount_minor, ours, self.terms, self.day) if ours else ((), amount_minor)
        )
        if left_minor:
            others = [item for item in items if item.id not in chosen]
            more, left_minor = allocate(left_minor, others, self.terms, self.day)
            allocations += more
        by_book = self._allocate(allocations, "repayment", reference)
        if left_minor:
            written_off_minor = self._written_off_minor()
            recovered_minor = min(left_minor, written_off_minor)
            if recovered_minor:
                by_book[RECOVERIES] = recovered_minor
                self._set_written_off(written_off_minor - recovered_minor)
            by_book[RECEIVABLE] = by_book.get(RECEIVABLE, 0) + left_minor - recovered_minor
        for name, paid_minor in by_book.items():
            if paid_minor:
                book(
                    self.connection,
                    self.account,
                    kind=_REPAYMENT_KINDS[name],
                    debit=(BANK, self.account.id),
                    credit=self._owner(name),
                    amount_minor=paid_minor,
                    now_unix_ms=self.now_unix_ms,
                    reference=reference,
                )
        return by_book.get(RECEIVABLE, 0)

    def take_back(self, reference: str) -> None:
        """A repayment bounced: what it had paid is owed again."""
        columns, entries, transfers = store.allocations.c, store.entries.c, store.transfers.c
        paid = self.connection.execute(
            sa.select(columns.item_id, columns.amount_minor).where(
                columns.account_id == self.account.id,
                columns.reference == reference,
                columns.cause == "repayment",
            )
        ).all()
        self._write({item_id: -amount_minor for item_id, amount_minor in paid}, "bounce", reference)
        booked = self.connection.execute(
            sa.select(entries.book, entries.amount_minor)
            .join(
                store.transfers,
                sa.and_(transfers.account_id == entries.account_id, transfers.id == entries.transfer_id),
            )
            .where(
                transfers.account_id == self.account.id,
                transfers.reference == reference,
                transfers.kind.in_(_REPAYMENT_KINDS.values()),
                entries.book != BANK,
            )
        ).all()
        by_book = {name: -int(amount_minor) for name, amount_minor in booked}
        if recovered_minor := by_book.get(RECOVERIES, 0):
            self._set_written_off(self._written_off_minor() + recovered_minor)
        for name, amount_minor in by_book.items():
            book(
                self.connection,
                self.account,
                kind=_BACK_KINDS[name],
                debit=self._owner(name),
                credit=(BANK, self.account.id),
                amount_minor=amount_minor,
                now_unix_ms=self.now_unix_ms,
                reference=reference,
            )

    def spend_over(self) -> None:
        """What was paid beyond all that was owed pays what stands on bills now; charges only as far as the
        credit that this takes back is free."""
        over_minor = -self.unbilled_minor()
        items = [_item(row) for row in self._rows()]
        if over_minor <= 0 or not items:
            return
        allocations, _ = allocate(over_minor, items, self.terms, self.day)
        books = {row.id: row.book for row in self._rows()}
        room_minor, kept = max(self.account.free_minor, 0), []
        for allocation in allocations:
            amount_minor = allocation.amount_minor
            if books[allocation.item_id] != RECEIVABLE:
                amount_minor = min(amount_minor, room_minor)
                room_minor -= amount_minor
            if amount_minor:
                kept.append(Allocation(allocation.item_id, allocation.part, amount_minor))
        by_book = self._allocate(kept, "over", None)
        by_book.pop(RECEIVABLE, None)
        for name, amount_minor in by_book.items():
            book(
                self.connection,
                self.account,
                kind="from_overpaid",
                debit=(RECEIVABLE, self.account.id),
                credit=self._owner(name),
                amount_minor=amount_minor,
                now_unix_ms=self.now_unix_ms,
            )
        if by_book:
            self.owe(sum(by_book.values()))

    def give_back(self, payment_id: uuid.UUID, amount_minor: int, record_id: uuid.UUID) -> None:
        """A payment was voided or refunded, and that is booked: its plan gets smaller, then its instalments
        that are billed; what is left over pays what else is billed."""
        plan = self._plan_row(payment_id)
        if plan is not None:
            smaller, rest_minor = pure_plans.refund(ahead_of(self.connection, plan), amount_minor)
            self._respread(plan, smaller)
            self._give_merchant_fee_back(plan, amount_minor, record_id)
            own = [_item(row) for row in self._rows() if row.plan_id == payment_id and row.book == RECEIVABLE]
            if rest_minor and own:
                allocations, _ = allocate(rest_minor, own, self.terms, self.day)
                self._allocate(allocations, "refund", None)
        self.spend_over()

    def settle_plan(self, plan_id: uuid.UUID) -> tuple[pure_plans.Settlement, tuple[str, ...]]:
        """All that is ahead of a plan is owed now, and stands on the next bill if it is not paid before.

        Returns what it comes to, and the items to be repaid.

        Raises:
            NotFound: no such plan of this account.
            InvalidInput: nothing of it is ahead.
        """
        row = self._plan_row(plan_id)
        if row is None:
            raise NotFound(f"there is no plan {plan_id} of account {self.account.id}")
        settlement = pure_plans.settle_early(
            ahead_of(self.connection, row),
            charge_current_period=self.terms.early_repayment_charges_current_period,
        )
        columns = store.plan_instalments.c
        mine = sa.and_(columns.account_id == self.account.id, columns.plan_id == plan_id)
        self.connection.execute(
            store.plan_instalments.update().where(mine, columns.closing.is_(None)).values(closing=EARLY)
        )
        self._set_plan(plan_id, ahead_minor=0)
        made = []
        for letter, part, name, amount_minor in (
            ("e", Part.PRINCIPAL, row.book, settlement.principal_minor),
            ("g", Part.INSTALMENT_FEE, CHARGES, settlement.fee_minor),
        ):
            if amount_minor:
                made.append(f"{self.day.isoformat()}/{letter}/{plan_id.hex}")
                self._add_item(made[-1], Origin.INSTALMENT, part, name, amount_minor, plan_id)
        if settlement.fee_minor:
            book(
                self.connection,
                self.account,
                kind="instalment_fee",
                debit=(CHARGES, self.account.id),
                credit=(INSTALMENT_FEES, ISSUER),
                amount_minor=settlement.fee_minor,
                now_unix_ms=self.now_unix_ms,
            )
        return settlement, tuple(made)

    def spread(self, kind: PlanKind, quoted: Quote, item_ids: Iterable[str]) -> uuid.UUID:
        """Principal of these items is repaid by a plan from now on.

        Raises:
            Conflict: they hold less than the plan is for.
        """
        wanted = set(item_ids)
        left_minor, taken = quoted.principal_minor, {}
        for row in sorted(self._rows(), key=lambda row: (row.due_on or 0, row.id)):
            if row.id in wanted and left_minor:
                taken[row.id] = min(row.owed_minor, left_minor)
                left_minor -= taken[row.id]
        if left_minor:
            raise Conflict("more than is left of it", advice="a smaller amount")
        plan_id = uuid.uuid4()
        self._write(taken, "spread", plan_id.hex)
        plan, instalments = plan_rows(self.account.id, plan_id, kind, quoted, self.now_unix_ms)
        self.connection.execute(store.plans.insert().values(plan))
        self.connection.execute(store.plan_instalments.insert(), instalments)
        return plan_id

    def spreadable(self, *, overdue: bool) -> tuple[dict[str, int], int]:
        """Principal of the line that stands on bills, by item, and how much it is: what is not due yet, or
        `overdue`, all of it."""
        found = {
            row.id: row.owed_minor
            for row in self._rows()
            if row.book == RECEIVABLE
            and row.closing is not None
            and (overdue or (row.origin == Origin.PURCHASE.value and row.due_on >= self.day.toordinal()))
        }
        return found, sum(found.values())

    def days_overdue(self) -> int:
        """Of what has been due the longest; what may revolve is not overdue."""
        due = [row.due_on for row in self._rows() if not row.revolves and row.due_on is not None]
        longest: int = self.day.toordinal() - min(due) if due else 0
        return max(0, longest)

    def waive(self, *, cause: str = "waived") -> int:
        """Give up all charges that are owed; how much."""
        taken = {row.id: row.owed_minor for row in self._rows() if row.book == CHARGES}
        return self._lose(taken, cause)

    def write_off(self) -> int:
        """Give up everything that is owed: principal, plans, loans, charges. The account lends no more.

        Returns how much. Recoveries later are told as such.
        """
        for row in self.connection.execute(
            sa.select(store.plans).filter_by(account_id=self.account.id).where(store.plans.c.ahead_minor > 0)
        ).all():
            self.settle_plan(row.id)
        taken = {row.id: row.owed_minor for row in self._rows()}
        lost_minor = self._lose(taken, "written_off")
        unbilled_minor = self.unbilled_minor()
        if unbilled_minor > 0:
            self._book_loss(RECEIVABLE, unbilled_minor, "written_off")
            self.owe(-unbilled_minor)
            lost_minor += unbilled_minor
        self._set_written_off(self._written_off_minor() + lost_minor)
        block(self.connection, [line.id for line in self.account.lines])
        write_balance(self.connection, self.account, self.account.balance.with_line(0))
        return lost_minor

    def pay_from_vault(self) -> int:
        """Funds in the vault pay principal of the line that is overdue for so long as the terms say; how
        much. Limit and debt fall together."""
        if self.days_overdue() < self.terms.vault_pays_after_days:
            return 0
        uncleared_minor = vault_uncleared_minor(self.connection, self.account.id)
        available_minor = self.account.balance.vault_minor - uncleared_minor
        left_minor = max(available_minor, 0)
        taken: dict[str, int] = {}
        for row in sorted(self._rows(), key=lambda row: (row.due_on or 0, row.id)):
            overdue = row.due_on is not None and row.due_on < self.day.toordinal() and not row.revolves
            if overdue and row.book == RECEIVABLE and left_minor:
                taken[row.id] = min(left_minor, row.owed_minor)
                left_minor -= taken[row.id]
        paid_minor = sum(taken.values())
        if not paid_minor:
            return 0
        self._write(taken, "vault", None)
        book(
            self.connection,
            self.account,
            kind="vault_pays",
            debit=(VAULT, self.account.id),
            credit=(RECEIVABLE, self.account.id),
            amount_minor=paid_minor,
            now_unix_ms=self.now_unix_ms,
        )
        before_minor = {self.account.id: self.account.committed_minor}
        write_balance(self.connection, self.account, self.account.balance.vault_pays(paid_minor))
        check_accounts(self.connection, [self.account.id], self.account.now_unix_s, before_minor)
        return paid_minor

    def _lose(self, taken: dict[str, int], cause: str) -> int:
        books = {row.id: row.book for row in self._rows()}
        self._write(taken, cause, None)
        by_book: dict[str, int] = {}
        for item_id, amount_minor in taken.items():
            by_book[books[item_id]] = by_book.get(books[item_id], 0) + amount_minor
        for name, amount_minor in by_book.items():
            self._book_loss(name, amount_minor, cause)
        if by_book.get(RECEIVABLE):
            self.owe(-by_book[RECEIVABLE])
        return sum(by_book.values())

    def _book_loss(self, name: str, amount_minor: int, kind: str) -> None:
        book(
            self.connection,
            self.account,
            kind=kind,
            debit=(LOSSES, ISSUER),
            credit=(name, self.account.id),
            amount_minor=amount_minor,
            now_unix_ms=self.now_unix_ms,
        )

    def owe(self, amount_minor: int) -> None:
        """So much more counts against the limit; it is booked already."""
        before_minor = {self.account.id: self.account.committed_minor}
        write_balance(self.connection, self.account, self.account.balance.owe(amount_minor))
        check_accounts(self.connection, [self.account.id], self.account.now_unix_s, before_minor)

    def _allocate(
        self, allocations: Iterable[Allocation], cause: str, reference: str | None
    ) -> dict[str, int]:
        """Lower the items; what was allocated, by book."""
        books = {row.id: row.book for row in self._rows()} | {UNBILLED: RECEIVABLE}
        by_book: dict[str, int] = {}
        by_item: dict[str, int] = {}
        for allocation in allocations:
            name = books[allocation.item_id]
            by_book[name] = by_book.get(name, 0) + allocation.amount_minor
            by_item[allocation.item_id] = allocation.amount_minor
        by_item.pop(UNBILLED, None)
        self._write(by_item, cause, reference)
        return by_book

    def _write(self, by_item: dict[str, int], cause: str, reference: str | None) -> None:
        if not by_item:
            return
        sequence = self._next_sequence()
        items = store.items.c
        self.connection.execute(
            store.items.update()
            .where(items.account_id == self.account.id, items.id == sa.bindparam("item"))
            .values(owed_minor=items.owed_minor - sa.bindparam("paid")),
            [{"item": item_id, "paid": amount_minor} for item_id, amount_minor in by_item.items()],
        )
        self.connection.execute(
            store.allocations.insert(),
            [
                {
                    "account_id": self.account.id,
                    "item_id": item_id,
                    "sequence": sequence,
                    "cause": cause,
                    "reference": reference,
                    "day": self.day.toordinal(),
                    "at_unix_ms": self.now_unix_ms,
                    "amount_minor": amount_minor,
                }
                for item_id, amount_minor in by_item.items()
            ],
        )

    def _add_item(
        self, item_id: str, origin: Origin, part: Part, name: str, amount_minor: int, plan_id: uuid.UUID
    ) -> None:
        self.connection.execute(
            store.items.insert().values(
                account_id=self.account.id,
                id=item_id,
                origin=origin.value,
                part=part.value,
                book=name,
                plan_id=plan_id,
                revolves=False,
                since=self.day.toordinal(),
                amount_minor=amount_minor,
                owed_minor=amount_minor,
                sequence=self._next_sequence(),
            )
        )

    def _next_sequence(self) -> int:
        column = store.accounts.c.credit_sequence
        mine = store.accounts.c.id == self.account.id
        self.connection.execute(store.accounts.update().where(mine).values(credit_sequence=column + 1))
        return int(self.connection.execute(sa.select(column).where(mine)).scalar_one())

    def _owner(self, name: str) -> tuple[str, str]:
        return (name, ISSUER if name == RECOVERIES else self.account.id)

    def _written_off_minor(self) -> int:
        query = sa.select(store.accounts.c.written_off_minor).filter_by(id=self.account.id)
        return int(self.connection.execute(query).scalar_one())

    def _set_written_off(self, amount_minor: int) -> None:
        self.connection.execute(
            store.accounts.update().filter_by(id=self.account.id).values(written_off_minor=amount_minor)
        )

    def _plan_row(self, plan_id: uuid.UUID) -> Any:
        query = sa.select(store.plans).filter_by(account_id=self.account.id, id=plan_id)
        return self.connection.execute(query).first()

    def _set_plan(self, plan_id: uuid.UUID, **values: int) -> None:
        self.connection.execute(
            store.plans.update().filter_by(account_id=self.account.id, id=plan_id).values(**values)
        )

    def _respread(self, row: sa.Row[Any], smaller: pure_plans.Plan) -> None:
        columns = store.plan_instalments.c
        plan_id: uuid.UUID = row.id
        self.connection.execute(
            store.plan_instalments.delete().where(
                columns.account_id == self.account.id, columns.plan_id == plan_id, columns.closing.is_(None)
            )
        )
        if smaller.ahead:
            self.connection.execute(
                store.plan_instalments.insert(), instalment_rows(self.account.id, plan_id, smaller.ahead)
            )
        self._set_plan(plan_id, left_minor=smaller.principal_minor, ahead_minor=smaller.ahead_minor)

    def _give_merchant_fee_back(self, row: sa.Row[Any], amount_minor: int, record_id: uuid.UUID) -> None:
        """In proportion to what was given back of the payment, so that all of it gives back all."""
        if not row.merchant_fee_minor:
            return
        kept_minor = row.left_minor - amount_minor
        before_minor = _half_up(row.merchant_fee_minor * row.left_minor, row.principal_minor)
        after_minor = _half_up(row.merchant_fee_minor * kept_minor, row.principal_minor)
        if before_minor > after_minor:
            book(
                self.connection,
                self.account,
                kind="merchant_fee",
                debit=(MERCHANT_FEES, ISSUER),
                credit=(PAYABLE, str(row.merchant_id)),
                amount_minor=before_minor - after_minor,
                now_unix_ms=self.now_unix_ms,
                reference=str(record_id),
            )


_REPAYMENT_KINDS: Final = {
    RECEIVABLE: "repayment",
    CHARGES: "repayment_charge",
    LOANS: "repayment_loan",
    RECOVERIES: "recovery",
}
_BACK_KINDS: Final = {
    RECEIVABLE: "repayment_back",
    CHARGES: "charge_back",
    LOANS: "loan_back",
    RECOVERIES: "recovery_back",
}


def _item(row: sa.Row[Any]) -> Item:
    return Item(
        id=row.id,
        origin=Origin(row.origin),
        part=Part(row.part),
        owed_minor=row.owed_minor,
        since=date.fromordinal(row.since),
        due_on=None if row.due_on is None else date.fromordinal(row.due_on),
    )


def _half_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
