"""Accounts and tokens: their rows, and the counter line of every token as the reserve principle sees it.

All functions run inside a transaction of the caller's.
"""

from __future__ import annotations

import base64
import secrets
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from enum import Enum
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

import sqlalchemy as sa

from pos_gateway.emv.application import MAX_COUNTER
from pos_gateway.errors import Conflict, InvalidInput, NotFound
from pos_gateway.ledger import store
from pos_gateway.ledger.balance import Balance
from pos_gateway.ledger.bulk import among, among_both, beside
from pos_gateway.ledger.credit.calendar import Cycle, day_of, end_of_day_unix_ms, zone
from pos_gateway.ledger.reserve import (
    CounterLine,
    Interval,
    InvariantBroken,
    Publication,
    check_invariant,
    measure,
)
from pos_gateway.limits.record import Status

AT_ONCE: Final = 500
"""How many accounts one statement may name."""

LINE: Final = (
    store.tokens.c.id,
    store.tokens.c.account_id,
    store.tokens.c.token_key,
    store.tokens.c.status,
    store.tokens.c.highest_counter,
    store.tokens.c.run_start,
    store.tokens.c.run_end,
)
"""What a counter line needs of its token's row."""

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
        """What may be given out: neither owed nor reserved, nor paid with money that may be taken back."""
        limit_minor = min(self.limit_minor, self.target_limit_minor)
        return limit_minor - self.outstanding_minor - self.uncleared_minor - self.reserve_minor


@dataclass(slots=True)
class TokenLine(CounterLine):
    """A token with what has been published and posted on its counter line; updated while posting.

    `run`: an interval whose points are all posted, as a rule everything up to the newest payment: the
    claims that make it up need not be read one by one.
    """

    row: sa.Row[Any] = field(kw_only=True)
    id: str = field(kw_only=True)
    account_id: str = field(kw_only=True)
    run: Interval = (0, 0)

    @property
    def status(self) -> TokenStatus:
        return TokenStatus(self.row.status)

    def post(self, interval: Interval) -> None:
        """Go on with the run, or begin a new one above it."""
        (before, after), (start, end) = interval, self.run
        if before == end:
            self.run = start, after
        elif after == start:
            self.run = before, end
        elif before > end:
            self.run = interval


@dataclass(slots=True)
class LockedAccount:
    """An account that nobody else changes until the transaction ends: its money, all its tokens' lines.
    Whoever changes one writes it (`write_balance`, `issue`)."""

    id: str
    currency: str
    balance: Balance
    lines: list[TokenLine]
    now_unix_s: int
    closed_until_unix_ms: int = 0
    """Up to here its bills are made: nothing is booked before it any more, whatever a clock says."""

    @property
    def reserve_minor(self) -> int:
        return sum(measure(line.claimable(self.now_unix_s)) for line in self.lines)

    @property
    def committed_minor(self) -> int:
        """The left side of the invariant."""
        return self.balance.committed_minor(self.reserve_minor)

    @property
    def free_minor(self) -> int:
        """What may still be given out; below zero while a cut is not complete, or after a restore."""
        return self.balance.free_minor(self.reserve_minor)

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
    time_zone: str,
    closing_day: int,
) -> None:
    """`closing_day` of each month its bills close, at the day's end in `time_zone`.

    Raises:
        InvalidInput: a negative limit, no such day or zone, or an id or name of the wrong length.
        Conflict: the id is taken.
    """
    if not 1 <= len(account_id) <= 32 or not account_id.isprintable():
        raise InvalidInput("an account id has 1 to 32 printable characters", where="account id")
    if not 1 <= len(holder) <= 120:
        raise InvalidInput("a holder's name has 1 to 120 characters", where="holder")
    if limit_minor < 0:
        raise InvalidInput("a limit cannot be negative", where="limit")
    opened = day_of(now_unix_ms, zone(time_zone))
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
            time_zone=time_zone,
            closing_day=closing_day,
            last_closing=opened.toordinal() - 1,
            next_closing=Cycle(closing_day, 1).closing_on_or_after(opened).toordinal(),
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
    lines = token_lines(connection, [account_id])
    return LockedAccount(row.id, row.currency, balance_of(row), lines, now_unix_s, closed_until_unix_ms(row))


def write_evidence(connection: sa.Connection, ends: Mapping[tuple[str, bytes], int]) -> None:
    """Publications, by token id and digest, of which the card has shown that they died by that counter."""
    if not ends:
        return
    columns = store.publications.c
    connection.execute(
        store.publications.update()
        .where(columns.token_id == sa.bindparam("token"), columns.digest == sa.bindparam("name"))
        .values(evidence=sa.bindparam("end")),
        [{"token": token_id, "name": digest, "end": end} for (token_id, digest), end in ends.items()],
    )


def write_off(connection: sa.Connection, rows: Sequence[Mapping[str, object]]) -> None:
    """Points of renounced TCs; those that are written off already are passed over."""
    for row in rows:
        place = {"token_id": row["token_id"], "counter_after": row["counter_after"]}
        if connection.execute(sa.select(store.write_offs.c.token_id).filter_by(**place)).first() is None:
            connection.execute(store.write_offs.insert().values(row))


def block(connection: sa.Connection, token_ids: Collection[str]) -> None:
    """Block those that are active. Shops learn of it with the next snapshot."""
    columns = store.tokens.c
    connection.execute(
        store.tokens.update()
        .where(among(connection, columns.id, token_ids), columns.status == TokenStatus.ACTIVE.value)
        .values(status=TokenStatus.BLOCKED.value)
    )


def closed_until_unix_ms(row: sa.Row[Any]) -> int:
    """The end of the last cycle that an account's row says is closed; 0 before the first."""
    return 0 if row.last_closing is None else _end_of_day_unix_ms(row.last_closing, row.time_zone)


@lru_cache(maxsize=4096)
def _end_of_day_unix_ms(day: int, time_zone: str) -> int:
    return end_of_day_unix_ms(date.fromordinal(day), zone(time_zone))


def balance_of(row: sa.Row[Any]) -> Balance:
    """The money of an account's row."""
    return Balance(**{field.name: getattr(row, field.name) for field in fields(Balance)})


def write_balance(connection: sa.Connection, account: LockedAccount, balance: Balance) -> None:
    """From now on this is its money."""
    connection.execute(store.accounts.update().filter_by(id=account.id).values(**asdict(balance)))
    account.balance = balance


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


def token_lines(
    connection: sa.Connection,
    account_ids: Sequence[str],
    columns: Sequence[sa.Column[Any]] = tuple(store.tokens.columns),
) -> list[TokenLine]:
    """Every token of the accounts, in a stable order, its row with these columns, `LINE` among them.

    Of what was posted, only what can matter is read: points above the lowest start of a publication that
    has not lapsed, and of those the ones that make up the token's run as that one interval.
    """
    tokens, publications = store.tokens.c, store.publications.c
    theirs, also_theirs = among_both(connection, (tokens.account_id, publications.account_id), account_ids)
    rows = connection.execute(sa.select(*columns).where(theirs).order_by(tokens.id))
    lines = {row.id: line_of(row) for row in rows.all()}
    standing = sa.select(publications.token_id, *(publications[name] for name in _PUBLICATION)).where(
        also_theirs, sa.not_(publications.lapsed)
    )
    for token_id, *publication in connection.execute(standing).all():
        lines[token_id].publications.append(Publication(*publication))
    for token_id, before, after in connection.execute(_posted_besides_runs(connection, lines)).all():
        lines[token_id].posted.append((before, after))
    gone = store.write_offs.c
    written_off = sa.select(gone.token_id, gone.counter_before, gone.counter_after).where(
        among(connection, gone.account_id, account_ids)
    )
    for token_id, before, after in connection.execute(written_off):
        lines[token_id].posted.append((before, after))
    for line in lines.values():
        if line.run[0] < line.run[1]:
            line.posted.append(line.run)
    return list(lines.values())


def _posted_besides_runs(connection: sa.Connection, lines: Mapping[str, TokenLine]) -> sa.Select[Any]:
    ranges = []
    for line in lines.values():
        if line.publications:
            lowest = min(publication.highest for publication in line.publications)
            start, end = line.run
            ranges.append((line.id, max(lowest, end), MAX_COUNTER))
            if lowest < start:
                ranges.append((line.id, lowest, start))
    claims = store.claims.c
    asked = beside(
        connection, "claim_ranges", (claims.token_id, claims.counter_after, claims.counter_after), ranges
    )
    return (
        sa.select(claims.token_id, claims.counter_before, claims.counter_after)
        .join_from(asked, store.claims, asked.c.c0 == claims.token_id)
        .where(claims.counter_after > asked.c.c1, claims.counter_after <= asked.c.c2, claims.posted)
    )


def line_of(row: sa.Row[Any]) -> TokenLine:
    """A token's line before anything published or posted is read."""
    return TokenLine(
        row.highest_counter,
        row=row,
        id=row.id,
        account_id=row.account_id,
        run=(row.run_start, row.run_end),
    )


_PUBLICATION: Final = tuple(field.name for field in fields(Publication))


def publication_of(row: Mapping[str, Any]) -> Publication:
    """A row of the publications' table as the reserve principle sees it."""
    return Publication(*(row[name] for name in _PUBLICATION))


def lines_by_account(lines: Iterable[TokenLine]) -> dict[str, list[TokenLine]]:
    grouped: dict[str, list[TokenLine]] = defaultdict(list)
    for line in lines:
        grouped[line.account_id].append(line)
    return grouped


def set_token_status(connection: sa.Connection, token_id: str, status: TokenStatus) -> None:
    """Takes effect in shops with the next snapshot. Reserves stay: what was approved before is paid. Its
    account is held meanwhile.

    Raises:
        NotFound: no such token.
        Conflict: the token is closed, and closed for ever.
    """
    account_id = connection.scalar(sa.select(store.tokens.c.account_id).filter_by(id=token_id))
    if account_id is None:
        raise NotFound(f"there is no token {token_id}")
    lock_accounts(connection, [account_id])
    row = connection.execute(sa.select(store.tokens).filter_by(id=token_id).with_for_update()).one()
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


def check_publications(connection: sa.Connection) -> None:
    """Hold publications to the tokens and snapshots they are of.

    Raises:
        InvariantBroken: one is of a token that its account does not have, or of no snapshot.
    """
    publication, token, snapshot = store.publications.c, store.tokens.c, store.snapshots.c
    query = (
        sa.select(publication.token_id)
        .outerjoin(
            store.tokens,
            sa.and_(token.id == publication.token_id, token.account_id == publication.account_id),
        )
        .outerjoin(store.snapshots, snapshot.version == publication.snapshot_version)
        .where(
            sa.or_(
                token.id.is_(None),
                sa.and_(publication.snapshot_version.is_not(None), snapshot.version.is_(None)),
            )
        )
        .limit(1)
    )
    if (token_id := connection.scalar(query)) is not None:
        raise InvariantBroken(f"a publication of token {token_id} is of nothing that is on record")
