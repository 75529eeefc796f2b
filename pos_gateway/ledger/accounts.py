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

from pos_gateway.emv.application import MAX_COUNTER
from pos_gateway.errors import Conflict, InvalidInput, NotFound
from pos_gateway.ledger import store
from pos_gateway.ledger.bulk import among, among_both, beside
from pos_gateway.ledger.reserve import Interval, IntervalSet, Publication, check_invariant, claimable, measure
from pos_gateway.limits.record import Status

AT_ONCE: Final = 500
"""How many accounts one statement may name."""

LINE: Final = (
    store.tokens.c.id,
    store.tokens.c.account_id,
    store.tokens.c.token_key,
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
    """One account as it is shown. Amounts in minor units of `currency`."""

    id: str
    holder: str
    currency: str
    limit_minor: int
    outstanding_minor: int
    tokens: tuple[Token, ...]

    @property
    def reserve_minor(self) -> int:
        """What cut-off shops may still approve on all its tokens together."""
        return sum(token.reserve_minor for token in self.tokens)

    @property
    def free_minor(self) -> int:
        """What is neither owed nor reserved."""
        return self.limit_minor - self.outstanding_minor - self.reserve_minor


@dataclass(slots=True)
class TokenLine:
    """A token with what has been published and posted on its counter line; updated while posting.

    `run`: an interval whose points are all posted, as a rule everything up to the newest payment: the
    claims that make it up need not be read one by one.
    """

    row: sa.Row[Any]
    id: str
    account_id: str
    highest: int
    run: Interval
    publications: list[Publication] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    """Of the limit records that were published, in the order of `publications`."""
    posted: list[Interval] = field(default_factory=list)

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

    def claimable(self, now_unix_s: int) -> IntervalSet:
        """U of this token."""
        return claimable(self.publications, self.posted, now_unix_s)


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
        for p in connection.execute(latest.order_by(store.publications.c.snapshot_version))
    }
    return Account(
        id=row.id,
        holder=row.holder,
        currency=row.currency,
        limit_minor=row.limit_minor,
        outstanding_minor=row.outstanding_minor,
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
    lines = {
        row.id: TokenLine(row, row.id, row.account_id, row.highest_counter, (row.run_start, row.run_end))
        for row in rows.all()
    }
    standing = sa.select(
        publications.token_id,
        publications.highest,
        publications.ceiling,
        publications.stands_until_unix_s,
        publications.digest,
    ).where(also_theirs, sa.not_(store.publications.c.lapsed))
    for token_id, highest, ceiling, stands_until_unix_s, digest in connection.execute(standing).all():
        line = lines[token_id]
        line.publications.append(Publication(highest, ceiling, stands_until_unix_s))
        line.digests.append(digest)
    for token_id, before, after in connection.execute(_posted_besides_runs(connection, lines)).all():
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

    `before_minor`: what accounts owed and reserved together before it. One that was over its limit
    already (its ledger was restored, and voids are still to be presented again) may not be more so.

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
                reserves_minor=(measure(line.claimable(now_unix_s)) for line in by_account[row.id]),
            )
