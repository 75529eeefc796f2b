"""Accounts and tokens: their rows, and the counter line of every token as the reserve principle sees it.

All functions run inside a transaction of the caller's.
"""

from __future__ import annotations

import base64
import secrets
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from enum import Enum
from types import MappingProxyType
from typing import Any, Final

import sqlalchemy as sa

from pos_gateway.errors import Conflict, InvalidInput, NotFound
from pos_gateway.ledger import store
from pos_gateway.ledger.bulk import among
from pos_gateway.ledger.reserve import CounterLine, Publication, check_invariant, measure
from pos_gateway.limits.record import Status

AT_ONCE: Final = 500
"""How many accounts one statement may name."""

_ID_BYTES: Final = 10


class TokenStatus(Enum):
    """May a token pay? BLOCKED can be lifted, CLOSED cannot."""

    ACTIVE = "active"
    BLOCKED = "blocked"
    CLOSED = "closed"

    @property
    def on_record(self) -> Status:
        """As a limit record says it."""
        return Status[self.name]


@dataclass(frozen=True, slots=True)
class Token:
    """One token as it is shown. `ceiling` is the last one published, None before the first."""

    id: str
    account_id: str
    last4: str
    psn: int
    expires: date
    status: TokenStatus
    per_tap_cap_minor: int
    highest_counter: int
    ceiling: int | None
    reserve_minor: int


@dataclass(frozen=True, slots=True)
class Account:
    """One account as it is shown. Amounts in minor units of `currency`.

    `limit_minor` is in force; `target_limit_minor` is what it will have come down to once nothing owed or
    reserved needs more. `uncleared_minor` is money received that may still be taken back.
    """

    id: str
    holder: str
    currency: str
    limit_minor: int
    target_limit_minor: int
    outstanding_minor: int
    uncleared_minor: int
    vault_minor: int
    vault_leaving_minor: int
    tokens: tuple[Token, ...]

    @property
    def reserve_minor(self) -> int:
        """What cut-off shops may still approve on all its tokens together."""
        return sum(token.reserve_minor for token in self.tokens)

    @property
    def free_minor(self) -> int:
        """What is neither owed nor reserved, nor paid with money that may be taken back."""
        return self.limit_minor - self.outstanding_minor - self.uncleared_minor - self.reserve_minor


@dataclass(slots=True)
class TokenLine(CounterLine):
    """A token with what has been published and posted on its counter line; updated while posting."""

    row: sa.Row[Any] = field(kw_only=True)

    @property
    def id(self) -> str:
        return str(self.row.id)

    @property
    def account_id(self) -> str:
        return str(self.row.account_id)

    @property
    def status(self) -> TokenStatus:
        return TokenStatus(self.row.status)


@dataclass(slots=True)
class LockedAccount:
    """An account that nobody else changes until the transaction ends, with all its tokens' lines.

    Amounts follow what the transaction does through this module's functions and `issue`.
    """

    row: sa.Row[Any]
    lines: list[TokenLine]
    now_unix_s: int

    @property
    def id(self) -> str:
        return str(self.row.id)

    @property
    def reserve_minor(self) -> int:
        return sum(measure(line.claimable(self.now_unix_s)) for line in self.lines)

    @property
    def committed_minor(self) -> int:
        """The left side of the invariant."""
        return int(self.row.outstanding_minor + self.row.uncleared_minor) + self.reserve_minor

    @property
    def free_minor(self) -> int:
        """What may still be given out; below zero after a restore at most."""
        return int(self.row.limit_minor) - self.committed_minor

    def line(self, token_id: str) -> TokenLine:
        """
        Raises:
            NotFound: no token of this account.
        """
        for line in self.lines:
            if line.id == token_id:
                return line
        raise NotFound(f"there is no token {token_id} of account {self.id}")


def new_id(prefix: str) -> str:
    """A random, globally unique id that is short enough to type: `acc-…`."""
    return f"{prefix}-{base64.b32encode(secrets.token_bytes(_ID_BYTES)).decode().lower()}"


def open_account(
    connection: sa.Connection,
    *,
    account_id: str,
    holder: str,
    currency: str,
    limit_minor: int,
    now_unix_ms: int,
) -> None:
    """
    Raises:
        InvalidInput: a negative limit, or an id or name of the wrong length.
        Conflict: the id is taken.
    """
    if not 1 <= len(account_id) <= 32 or not account_id.isprintable():
        raise InvalidInput("an account id has 1 to 32 printable characters", where="account id")
    if not 1 <= len(holder) <= 120:
        raise InvalidInput("a holder's name has 1 to 120 characters", where="holder")
    if limit_minor < 0:
        raise InvalidInput("a limit cannot be negative", where="limit")
    if connection.execute(sa.select(store.accounts.c.id).filter_by(id=account_id)).first():
        raise Conflict(f"account {account_id} exists already")
    connection.execute(
        store.accounts.insert().values(
            id=account_id,
            holder=holder,
            currency=currency,
            limit_minor=limit_minor,
            target_line_minor=limit_minor,
            outstanding_minor=0,
            opened_unix_ms=now_unix_ms,
        )
    )


def lock_accounts(connection: sa.Connection, account_ids: Iterable[str]) -> dict[str, sa.Row[Any]]:
    """The accounts' rows, held until the transaction ends; always in one order, so that two batches
    cannot wait for each other."""
    query = (
        sa.select(store.accounts)
        .where(among(connection, store.accounts.c.id, set(account_ids)))
        .order_by(store.accounts.c.id)
        .with_for_update(key_share=True)
    )
    return {row.id: row for row in connection.execute(query)}


def lapse(connection: sa.Connection, account_ids: Sequence[str], now_unix_s: int) -> None:
    """Credit of what stands no longer may be about to be given away again: from now on it never stands."""
    columns = store.publications.c
    connection.execute(
        store.publications.update()
        .where(
            among(connection, columns.account_id, account_ids),
            ~columns.lapsed,
            columns.stands_until_unix_s < now_unix_s,
        )
        .values(lapsed=True)
    )


def extend_standing(connection: sa.Connection, until_unix_s: int) -> None:
    """After a restore: payments that the database has forgotten are presented again within D, under
    publications that would lapse meanwhile. All that had not lapsed by the backup stands so long."""
    columns = store.publications.c
    connection.execute(
        store.publications.update()
        .where(~columns.lapsed, columns.stands_until_unix_s < until_unix_s)
        .values(stands_until_unix_s=until_unix_s)
    )


def lock_account(connection: sa.Connection, account_id: str, now_unix_s: int) -> LockedAccount:
    """
    Raises:
        NotFound: no such account.
    """
    row = lock_accounts(connection, [account_id]).get(account_id)
    if row is None:
        raise NotFound(f"there is no account {account_id}")
    lapse(connection, [account_id], now_unix_s)
    return LockedAccount(row, token_lines(connection, [account_id]), now_unix_s)


def read_account(connection: sa.Connection, account_id: str, now_unix_s: int) -> Account:
    """
    Raises:
        NotFound: no such account.
    """
    row = connection.execute(sa.select(store.accounts).filter_by(id=account_id)).first()
    if row is None:
        raise NotFound(f"there is no account {account_id}")
    latest = sa.select(store.publications.c.token_id, store.publications.c.ceiling).filter_by(
        account_id=account_id
    )
    ceilings = {
        p.token_id: p.ceiling
        for p in connection.execute(
            latest.order_by(store.publications.c.issued_unix_s, store.publications.c.sequence)
        )
    }
    return Account(
        id=row.id,
        holder=row.holder,
        currency=row.currency,
        limit_minor=row.limit_minor,
        target_limit_minor=row.target_line_minor + row.vault_minor - row.vault_leaving_minor,
        outstanding_minor=row.outstanding_minor,
        uncleared_minor=row.uncleared_minor,
        vault_minor=row.vault_minor,
        vault_leaving_minor=row.vault_leaving_minor,
        tokens=tuple(
            Token(
                id=line.id,
                account_id=row.id,
                last4=line.row.last4,
                psn=line.row.psn,
                expires=line.row.expires,
                status=line.status,
                per_tap_cap_minor=line.row.per_tap_cap_minor,
                highest_counter=line.highest,
                ceiling=ceilings.get(line.id),
                reserve_minor=measure(line.claimable(now_unix_s)),
            )
            for line in token_lines(connection, [account_id])
        ),
    )


def token_lines(connection: sa.Connection, account_ids: Sequence[str]) -> list[TokenLine]:
    """Every token of the accounts, in a stable order. Of what was posted, only what can matter is
    read: points above the lowest start of a publication that has not lapsed."""
    tokens, publications, claims = store.tokens.c, store.publications.c, store.claims.c
    rows = connection.execute(
        sa.select(store.tokens).where(among(connection, tokens.account_id, account_ids)).order_by(tokens.id)
    )
    lines = {row.id: TokenLine(row.highest_counter, row=row) for row in rows}
    standing = sa.and_(among(connection, publications.account_id, account_ids), ~publications.lapsed)
    for row in connection.execute(sa.select(store.publications).where(standing)):
        lines[row.token_id].publications.append(publication_of(row._asdict()))
    lowest = (
        sa.select(publications.token_id, sa.func.min(publications.highest).label("start"))
        .where(standing)
        .group_by(publications.token_id)
        .subquery()
    )
    posted = sa.select(claims.token_id, claims.counter_before, claims.counter_after).join(
        lowest, sa.and_(claims.token_id == lowest.c.token_id, claims.counter_after > lowest.c.start)
    )
    written_off = store.write_offs.c
    gone = sa.select(written_off.token_id, written_off.counter_before, written_off.counter_after).where(
        among(connection, written_off.account_id, account_ids)
    )
    for query in (posted.where(claims.posted), gone):
        for row in connection.execute(query):
            lines[row.token_id].posted.append((row.counter_before, row.counter_after))
    return list(lines.values())


def publication_of(row: Mapping[str, Any]) -> Publication:
    """A row of the publications' table as the reserve principle sees it."""
    return Publication(
        highest=row["highest"],
        ceiling=row["ceiling"],
        stands_until_unix_s=row["stands_until_unix_s"],
        valid_until_unix_s=row["valid_until_unix_s"],
        issued_unix_s=row["issued_unix_s"],
        terminal_id=row["terminal_id"],
        evidence=row["evidence"],
        lapsed=row["lapsed"],
        digest=row["digest"],
    )


def lines_by_account(lines: Iterable[TokenLine]) -> dict[str, list[TokenLine]]:
    grouped: dict[str, list[TokenLine]] = defaultdict(list)
    for line in lines:
        grouped[line.account_id].append(line)
    return grouped


def set_token_status(connection: sa.Connection, token_id: str, status: TokenStatus) -> None:
    """Takes effect in shops with the next snapshot. Reserves stay: what was approved before is paid.

    Raises:
        NotFound: no such token.
        Conflict: the token is closed, and closed for ever.
    """
    row = connection.execute(sa.select(store.tokens).filter_by(id=token_id).with_for_update()).first()
    if row is None:
        raise NotFound(f"there is no token {token_id}")
    if TokenStatus(row.status) is TokenStatus.CLOSED and status is not TokenStatus.CLOSED:
        raise Conflict(f"token {token_id} is closed", advice="issue a new one")
    connection.execute(store.tokens.update().filter_by(id=token_id).values(status=status.value))


def check_accounts(
    connection: sa.Connection,
    account_ids: Iterable[str],
    now_unix_s: int,
    before_minor: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Hold the reserve invariant to what the transaction has written, read back from the tables.

    `before_minor`: what accounts had committed before it: owed, uncleared and reserved. One that was over
    its limit already (its ledger was restored, and voids are still to be presented again) may not be more
    so.

    Raises:
        InvariantBroken: the transaction must not commit.
    """
    ids = sorted(set(account_ids))
    for start in range(0, len(ids), AT_ONCE):
        chunk = ids[start : start + AT_ONCE]
        by_account = lines_by_account(token_lines(connection, chunk))
        for row in connection.execute(
            sa.select(store.accounts).where(among(connection, store.accounts.c.id, chunk))
        ):
            check_invariant(
                limit_minor=max(row.limit_minor, before_minor.get(row.id, 0)),
                outstanding_minor=row.outstanding_minor,
                uncleared_minor=row.uncleared_minor,
                reserves_minor=(measure(line.claimable(now_unix_s)) for line in by_account[row.id]),
            )
