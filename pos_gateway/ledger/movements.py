"""Money in and out of an account, and its limit: repayments, the vault, cuts that complete by themselves.

Money that came in is uncleared until its bank says that it is final; until then it pays debt and frees
nothing. Everything runs in the account's locked transaction and is idempotent by the caller's reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import sqlalchemy as sa

from pos_gateway.errors import Conflict, InvalidInput, NotFound
from pos_gateway.ledger import store
from pos_gateway.ledger.accounts import LockedAccount, check_accounts, write_balance
from pos_gateway.ledger.balance import Balance
from pos_gateway.ledger.books import BANK, RECEIVABLE, VAULT, book
from pos_gateway.money import MAX_AMOUNT_MINOR

MAX_REFERENCE_CHARACTERS: Final = 64


class Purpose(Enum):
    """What money came in for, or was asked back from."""

    REPAYMENT = "repayment"
    VAULT_LOCK = "vault_lock"
    VAULT_UNLOCK = "vault_unlock"


class State(Enum):
    """How far a movement has come."""

    UNCLEARED = "uncleared"
    """It may still be taken back."""
    FINAL = "final"
    BOUNCED = "bounced"
    """It was taken back."""
    ASKED = "asked"
    """Out of the vault: paid out as far as nothing owed or reserved needs it, the rest by itself later."""


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


def receive(
    connection: sa.Connection,
    account: LockedAccount,
    *,
    purpose: Purpose,
    reference: str,
    amount_minor: int,
    now_unix_ms: int,
) -> Movement:
    """Take a repayment or funds for the vault, or ask funds back from it.

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
    balance = _after_receiving(account.balance, purpose, amount_minor)
    connection.execute(
        store.movements.insert().values(
            account_id=account.id,
            reference=reference,
            purpose=purpose.value,
            amount_minor=amount_minor,
            state=state.value,
            received_unix_ms=now_unix_ms,
        )
    )
    if purpose is not Purpose.VAULT_UNLOCK:
        book(
            connection,
            account,
            kind=purpose.value,
            debit=(BANK, account.id),
            credit=(_BOOK_OF[purpose], account.id),
            amount_minor=amount_minor,
            now_unix_ms=now_unix_ms,
            reference=reference,
        )
    _write(connection, account, balance, now_unix_ms)
    return Movement(account.id, reference, purpose, amount_minor, state, now_unix_ms, None)


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
    amount_minor = known.amount_minor
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
    if not final:
        book(
            connection,
            account,
            kind=f"{known.purpose.value}_back",
            debit=(_BOOK_OF[known.purpose], account.id),
            credit=(BANK, account.id),
            amount_minor=amount_minor,
            now_unix_ms=now_unix_ms,
            reference=reference,
        )
    _write(connection, account, balance, now_unix_ms)
    return Movement(
        account.id, reference, known.purpose, amount_minor, state, known.received_unix_ms, now_unix_ms
    )


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


_BOOK_OF: Final = {Purpose.REPAYMENT: RECEIVABLE, Purpose.VAULT_LOCK: VAULT}


def _after_receiving(balance: Balance, purpose: Purpose, amount_minor: int) -> Balance:
    if purpose is Purpose.REPAYMENT:
        return balance.repaid(amount_minor)
    if purpose is Purpose.VAULT_LOCK:
        return balance.locked(amount_minor)
    return balance.unlock(amount_minor)


def _write(connection: sa.Connection, account: LockedAccount, balance: Balance, now_unix_ms: int) -> None:
    before_minor = {account.id: account.committed_minor}
    vault_uncleared = sa.select(sa.func.coalesce(sa.func.sum(store.movements.c.amount_minor), 0)).filter_by(
        account_id=account.id, purpose=Purpose.VAULT_LOCK.value, state=State.UNCLEARED.value
    )
    completed, paid_minor = balance.complete(
        reserve_minor=account.reserve_minor,
        vault_uncleared_minor=int(connection.execute(vault_uncleared).scalar_one()),
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
    )
