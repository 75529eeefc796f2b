"""Bills as they are shown: as rows, and as statements with all that happened in their cycles."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import UTC, date, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final

import jinja2
import sqlalchemy as sa

from pos_gateway.errors import NotFound
from pos_gateway.ledger import store
from pos_gateway.ledger.books import CHARGES, LOANS, RECEIVABLE
from pos_gateway.ledger.credit.calendar import zone
from pos_gateway.money import Currency, currency

_TEMPLATES: Final = Path(__file__).parent / "templates"

TITLES: Final = {
    "payment": "Purchase",
    "refund": "Refund",
    "reversal": "Purchase voided",
    "repayment": "Repayment",
    "repayment_charge": "Repayment of charges",
    "repayment_loan": "Repayment of a loan",
    "repayment_back": "Repayment taken back",
    "charge_back": "Repayment of charges taken back",
    "loan_back": "Repayment of a loan taken back",
    "interest": "Interest",
    "instalment_fee": "Instalment fee",
    "overdue_fee": "Overdue fee",
    "from_overpaid": "Charges paid by what was overpaid",
    "vault_pays": "Paid from the vault",
    "waived": "Charges given up",
    "written_off": "Written off",
    "loan": "Loan",
}


@dataclass(frozen=True, slots=True)
class Bill:
    """One bill. What it consists of adds up to `total_minor`; `purchases_minor` is below zero, and then adds
    nothing, where more had been paid than was owed. `open_minor`: what is still owed of it now."""

    closing: date
    due_on: date
    purchases_minor: int
    carried_minor: int
    instalments_minor: int
    instalment_fees_minor: int
    interest_minor: int
    overdue_fee_minor: int
    arrears_minor: int
    total_minor: int
    minimum_minor: int
    open_minor: int


@dataclass(frozen=True, slots=True)
class Line:
    """One movement on a statement: positive is owed more."""

    at: datetime
    title: str
    amount_minor: int


@dataclass(frozen=True, slots=True)
class Statement:
    """One bill with its cycle, in the account's own time."""

    account_id: str
    holder: str
    currency: Currency
    time_zone: str
    bill: Bill
    lines: tuple[Line, ...]

    def to_text(self) -> str:
        return self._render("statement.txt")

    def to_html(self) -> str:
        """A page of its own: no script, nothing from elsewhere."""
        return self._render("statement.html")

    def _render(self, name: str) -> str:
        return _environment().get_template(name).render(s=self, bill=self.bill, money=self.currency.format)


def bills_of(connection: sa.Connection, account_id: str) -> tuple[Bill, ...]:
    """Oldest first."""
    items = store.items.c
    owed = (
        sa.select(items.closing, sa.func.sum(items.owed_minor))
        .where(items.account_id == account_id, items.owed_minor > 0)
        .group_by(items.closing)
    )
    open_minor = {closing: int(total) for closing, total in connection.execute(owed)}
    query = sa.select(store.bills).filter_by(account_id=account_id).order_by(store.bills.c.closing)
    return tuple(_bill(row, open_minor.get(row.closing, 0)) for row in connection.execute(query))


def statement(connection: sa.Connection, account_id: str, closing: date | None) -> Statement:
    """
    Raises:
        NotFound: no such account, or no bill that closed then.
    """
    account = connection.execute(sa.select(store.accounts).filter_by(id=account_id)).first()
    if account is None:
        raise NotFound(f"there is no account {account_id}")
    bills = {bill.closing: bill for bill in bills_of(connection, account_id)}
    wanted = closing or max(bills, default=None)
    if wanted is None or wanted not in bills:
        raise NotFound(f"no bill of account {account_id} closed {wanted or 'yet'}")
    row = connection.execute(
        sa.select(store.bills).filter_by(account_id=account_id, closing=wanted.toordinal())
    ).one()
    before = sa.select(sa.func.max(store.bills.c.cutoff_unix_ms)).where(
        store.bills.c.account_id == account_id, store.bills.c.closing < row.closing
    )
    since_unix_ms = connection.scalar(before) or 0
    return Statement(
        account_id=account_id,
        holder=account.holder,
        currency=currency(account.currency),
        time_zone=account.time_zone,
        bill=bills[wanted],
        lines=tuple(_lines(connection, account, row, since_unix_ms)),
    )


def _lines(connection: sa.Connection, account: Any, bill: Any, since_unix_ms: int) -> list[Line]:
    entries, transfers = store.entries.c, store.transfers.c
    # Charges are booked when the bill is made, and say which it is.
    in_cycle = sa.and_(
        transfers.posted_unix_ms >= since_unix_ms, transfers.posted_unix_ms < bill.cutoff_unix_ms
    )
    reference = date.fromordinal(bill.closing).isoformat()
    its_charges = sa.and_(transfers.kind.in_(_CHARGES), transfers.reference == reference)
    others = sa.and_(in_cycle, sa.or_(transfers.kind.not_in(_CHARGES), transfers.reference.is_(None)))
    query = (
        sa.select(transfers.kind, transfers.tapped_unix_ms, sa.func.sum(entries.amount_minor))
        .join(
            store.entries,
            sa.and_(entries.account_id == transfers.account_id, entries.transfer_id == transfers.id),
        )
        .where(
            transfers.account_id == account.id,
            entries.book.in_((RECEIVABLE, CHARGES, LOANS)),
            sa.or_(its_charges, others),
        )
        .group_by(transfers.id, transfers.kind, transfers.tapped_unix_ms)
        .order_by(transfers.tapped_unix_ms, transfers.kind)
    )
    where = zone(account.time_zone)
    return [
        Line(
            datetime.fromtimestamp(at_unix_ms / 1000, UTC).astimezone(where),
            TITLES.get(kind, kind.replace("_", " ")),
            int(total),
        )
        for kind, at_unix_ms, total in connection.execute(query)
        if total
    ]


_CHARGES: Final = ("interest", "instalment_fee", "overdue_fee")


def _bill(row: Any, open_minor: int) -> Bill:
    plain = {f.name: getattr(row, f.name) for f in fields(Bill) if f.name != "open_minor"}
    days = {name: date.fromordinal(plain[name]) for name in ("closing", "due_on")}
    return Bill(**{**plain, **days}, open_minor=open_minor)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
