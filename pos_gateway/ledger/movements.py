"""Money in and out of an account, and its limit: repayments, the vault, cuts that complete by themselves.

Money that came in is uncleared until its bank says that it is final; until then it pays debt and frees
nothing. Everything runs in the account's locked transaction and is idempotent by the caller's reference.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

import sqlalchemy as sa

from pos_gateway.errors import Conflict, InvalidInput, NotFound
from pos_gateway.ledger import store
from pos_gateway.ledger.accounts import LockedAccount, check_accounts, write_balance
from pos_gateway.ledger.balance import Balance
from pos_gateway.ledger.books import BANK, VAULT, book
from pos_gateway.ledger.credit_books import Desk
from pos_gateway.ledger.purposes import Purpose, State, vault_uncleared_minor
from pos_gateway.money import MAX_AMOUNT_MINOR

__all__ = ["MAX_REFERENCE_CHARACTERS", "Movement", "Purpose", "State", "complete", "receive", "settle"]

MAX_REFERENCE_CHARACTERS: Final = 64


@dataclass(frozen=True, slots=True)
class Movement:
    """One movement as it is shown."""

    account_id: str
    reference: str
    purpose: Purpose
    amount_minor: int
    state: State
    received_unix_ms: int
    settled_unix_ms: int | None
    outside_minor: int = 0
    """Of a repayment: what went to charges, loans and losses, which are owed outside the limit."""


def receive(
    connection: sa.Connection,
    account: LockedAccount,
    *,
    purpose: Purpose,
    reference: str,
    amount_minor: int,
    now_unix_ms: int,
    first: Iterable[str] = (),
) -> Movement:
    """Take a repayment or funds for the vault, or ask funds back from it.

    `first`: items that a repayment goes to before all others.

    Raises:
        InvalidInput: no amount, or no usable reference.
        Conflict: the reference stands for something else, or the vault does not hold that much.
    """
    if not 0 < amount_minor <= MAX_AMOUNT_MINOR:
        raise InvalidInput(f"must be 1 to {MAX_AMOUNT_MINOR} minor units", where="amount")
    if not (1 <= len(reference) <= MAX_REFERENCE_CHARACTERS and reference.isprintable()):
        raise InvalidInput(f"must be 1 to {MAX_REFERENCE_CHARACTERS} printable characters", where="reference")
    known = _find(connection, account.id, reference)
    if known is not None:
        if (known.purpose, known.amount_minor) != (purpose, amount_minor):
            raise Conflict(f"reference {reference} stands for another movement of this account")
        return known
    state = State.ASKED if purpose is Purpose.VAULT_UNLOCK else State.UNCLEARED
    inside_minor = amount_minor
    if purpose is Purpose.REPAYMENT:
        desk = Desk.open(connection, account, now_unix_ms)
        inside_minor = desk.repay(amount_minor, reference, first=first)
    balance = _after_receiving(account.balance, purpose, inside_minor)
    connection.execute(
        store.movements.insert().values(
            account_id=account.id,
            reference=reference,
            purpose=purpose.value,
            amount_minor=amount_minor,
            state=state.value,
            received_unix_ms=now_unix_ms,
            outside_minor=amount_minor - inside_minor,
        )
    )
    if purpose is Purpose.VAULT_LOCK:
        book(
            connection,
            account,
            kind=purpose.value,
            debit=(BANK, account.id),
            credit=(VAULT, account.id),
            amount_minor=amount_minor,
            now_unix_ms=now_unix_ms,
            reference=reference,
        )
    _write(connection, account, balance, now_unix_ms)
    return Movement(
        account.id, reference, purpose, amount_minor, state, now_unix_ms, None, amount_minor - inside_minor
    )


def settle(
    connection: sa.Connection, account: LockedAccount, reference: str, *, final: bool, now_unix_ms: int
) -> Movement:
    """What became of money that came in: here to stay, or taken back.

    Raises:
        NotFound: nothing came in under that reference.
        Conflict: it was told otherwise before.
    """
    known = _find(connection, account.id, reference)
    if known is None or known.purpose is Purpose.VAULT_UNLOCK:
        raise NotFound(f"nothing came in for account {account.id} under reference {reference}")
    state = State.FINAL if final else State.BOUNCED
    if known.state is state:
        return known
    if known.state is not State.UNCLEARED:
        raise Conflict(f"{known.purpose.value} {reference} is {known.state.value} already")
    amount_minor = known.amount_minor - known.outside_minor
    if not final and known.purpose is Purpose.REPAYMENT:
        Desk.open(connection, account, now_unix_ms).take_back(reference)
    if final:
        balance = account.balance.cleared(amount_minor)
    elif known.purpose is Purpose.REPAYMENT:
        balance = account.balance.bounced(amount_minor)
    else:
        balance = account.balance.lock_bounced(amount_minor)
    connection.execute(
        store.movements.update()
        .filter_by(account_id=account.id, reference=reference)
        .values(state=state.value, settled_unix_ms=now_unix_ms)
    )
    if not final and known.purpose is Purpose.VAULT_LOCK:
        book(
            connection,
            account,
            kind="vault_lock_back",
            debit=(VAULT, account.id),
            credit=(BANK, account.id),
            amount_minor=amount_minor,
            now_unix_ms=now_unix_ms,
            reference=reference,
        )
    _write(connection, account, balance, now_unix_ms)
    return replace(known, state=state, settled_unix_ms=now_unix_ms)


def set_line(connection: sa.Connection, account: LockedAccount, line_minor: int, now_unix_ms: int) -> None:
    """Another limit, funds in the vault apart: more at once, less as far as the invariant allows.

    Raises:
        InvalidInput: below zero.
    """
    _write(connection, account, account.balance.with_line(line_minor), now_unix_ms)


def complete(connection: sa.Connection, account: LockedAccount, now_unix_ms: int) -> None:
    """Take a pending cut or payout as far as it goes now."""
    _write(connection, account, account.balance, now_unix_ms)


def complete_pending(connection: sa.Connection, accounts: list[LockedAccount], now_unix_ms: int) -> None:
    """The same for many, those with nothing pending passed over."""
    for account in accounts:
        if is_pending(account.balance):
            complete(connection, account, now_unix_ms)


def is_pending(balance: Balance) -> bool:
    """Is a cut or payout waiting?"""
    return balance.limit_minor > balance.target_limit_minor or balance.vault_leaving_minor > 0


def movements_of(connection: sa.Connection, account_id: str) -> tuple[Movement, ...]:
    """Oldest first."""
    columns = store.movements.c
    query = (
        sa.select(store.movements)
        .filter_by(account_id=account_id)
        .order_by(columns.received_unix_ms, columns.reference)
    )
    return tuple(_movement(row) for row in connection.execute(query))


def _after_receiving(balance: Balance, purpose: Purpose, amount_minor: int) -> Balance:
    if purpose is Purpose.REPAYMENT:
        return balance.repaid(amount_minor)
    if purpose is Purpose.VAULT_LOCK:
        return balance.locked(amount_minor)
    return balance.unlock(amount_minor)


def _write(connection: sa.Connection, account: LockedAccount, balance: Balance, now_unix_ms: int) -> None:
    before_minor = {account.id: account.committed_minor}
    completed, paid_minor = balance.complete(
        reserve_minor=account.reserve_minor,
        vault_uncleared_minor=vault_uncleared_minor(connection, account.id),
    )
    if paid_minor:
        book(
            connection,
            account,
            kind="vault_payout",
            debit=(VAULT, account.id),
            credit=(BANK, account.id),
            amount_minor=paid_minor,
            now_unix_ms=now_unix_ms,
        )
    if completed != account.balance:
        write_balance(connection, account, completed)
    check_accounts(connection, [account.id], account.now_unix_s, before_minor)


def _find(connection: sa.Connection, account_id: str, reference: str) -> Movement | None:
    query = sa.select(store.movements).filter_by(account_id=account_id, reference=reference)
    row = connection.execute(query).first()
    return None if row is None else _movement(row)


def _movement(row: sa.Row[Any]) -> Movement:
    return Movement(
        account_id=row.account_id,
        reference=row.reference,
        purpose=Purpose(row.purpose),
        amount_minor=row.amount_minor,
        state=State(row.state),
        received_unix_ms=row.received_unix_ms,
        settled_unix_ms=row.settled_unix_ms,
        outside_minor=row.outside_minor,
    )
