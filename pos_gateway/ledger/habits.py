"""What tokens have spent lately, read from the books, and the allowances that follow (`ledger.use`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from pos_gateway.ledger import store
from pos_gateway.ledger.accounts import TokenLine, TokenStatus
from pos_gateway.ledger.allowance import PHONE, SOFTWARE_PHONE
from pos_gateway.ledger.books import RECEIVABLE
from pos_gateway.ledger.bulk import among
from pos_gateway.ledger.reserve import IntervalSet
from pos_gateway.ledger.use import Allowance, Debits, Use, UsePolicy, allowances, stuck_minor

AT_ONCE_MS: Final = 600_000
"""A payment presented later than so long after its tap was made where there was no line."""

_NONE: Final = (0, 0, 0)


class Shown(NamedTuple):
    """One token of an account: U and H of its line, what kind of thing it is."""

    id: str
    claim: IntervalSet
    highest: int
    assurance: int
    may_pay: bool


def spent_lately(
    connection: sa.Connection, account_ids: Sequence[str], policy: UsePolicy, now_unix_s: int
) -> dict[str, tuple[int, int, int]]:
    """By token: what it has paid within the window, how much of it without a line, the largest payment."""
    query = spent_query(among(connection, store.transfers.c.account_id, account_ids), policy, now_unix_s)
    return {
        token_id: (int(spent), int(cut_off), int(largest))
        for token_id, spent, cut_off, largest in connection.execute(query)
    }


def spent_query(theirs: sa.ColumnElement[bool], policy: UsePolicy, now_unix_s: int) -> sa.Select[Any]:
    """By token: `token_id`, `spent`, `cut_off`, `largest`, of the accounts whose transfers are `theirs`."""
    transfers, entries = store.transfers.c, store.entries.c
    cut_off = transfers.posted_unix_ms - transfers.tapped_unix_ms > AT_ONCE_MS
    cut_off_minor = sa.case((cut_off, entries.amount_minor), else_=0)
    return (
        sa.select(
            transfers.token_id,
            sa.cast(sa.func.sum(entries.amount_minor), sa.BigInteger).label("spent"),
            sa.cast(sa.func.sum(cut_off_minor), sa.BigInteger).label("cut_off"),
            sa.func.max(entries.amount_minor).label("largest"),
        )
        .join(
            store.entries,
            sa.and_(entries.account_id == transfers.account_id, entries.transfer_id == transfers.id),
        )
        .where(
            theirs,
            transfers.kind == "payment",
            transfers.posted_unix_ms >= (now_unix_s - policy.window_s) * 1000,
            entries.book == RECEIVABLE,
        )
        .group_by(transfers.token_id)
    )


def plan(
    policy: UsePolicy,
    lines: Sequence[TokenLine],
    spent: Mapping[str, tuple[int, int, int]],
    *,
    owable_minor: int,
    limit_minor: int,
    now_unix_s: int,
) -> dict[str, Allowance]:
    """The allowances of one account's active tokens, by token. `lines` are all of its lines."""
    shown = [
        Shown(
            line.id,
            line.claimable(now_unix_s),
            line.highest,
            line.row.assurance,
            line.status is TokenStatus.ACTIVE,
        )
        for line in lines
    ]
    return plan_shown(policy, shown, spent, owable_minor=owable_minor, limit_minor=limit_minor)


def plan_shown(
    policy: UsePolicy,
    lines: Sequence[Shown],
    spent: Mapping[str, tuple[int, int, int]],
    *,
    owable_minor: int,
    limit_minor: int,
) -> dict[str, Allowance]:
    """`plan` for lines whose U is known."""
    active = [line for line in lines if line.may_pay]
    stuck = sum(stuck_minor(line.claim, line.highest, may_pay=line.may_pay) for line in lines)
    uses = [
        Use(
            *spent.get(line.id, _NONE),
            returns=line.assurance in (PHONE, SOFTWARE_PHONE),
            assurance=line.assurance,
        )
        for line in active
    ]
    found = allowances(policy, uses, Debits(0, 0), owable_minor=owable_minor - stuck, limit_minor=limit_minor)
    return {line.id: each for line, each in zip(active, found, strict=True)}
