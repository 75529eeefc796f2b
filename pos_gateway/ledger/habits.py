"""What tokens have spent lately, read from the books, and the allowances that follow (`ledger.use`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import sqlalchemy as sa

from pos_gateway.ledger import store
from pos_gateway.ledger.accounts import TokenLine, TokenStatus
from pos_gateway.ledger.allowance import PHONE, SOFTWARE_PHONE
from pos_gateway.ledger.books import RECEIVABLE
from pos_gateway.ledger.bulk import among
from pos_gateway.ledger.use import Allowance, Debits, Use, UsePolicy, allowances, stuck_minor

AT_ONCE_MS: Final = 600_000
"""A payment presented later than so long after its tap was made where there was no line."""

_NONE: Final = (0, 0, 0)


def spent_lately(
    connection: sa.Connection, account_ids: Sequence[str], policy: UsePolicy, now_unix_s: int
) -> dict[str, tuple[int, int, int]]:
    """By token: what it has paid within the window, how much of it without a line, the largest payment."""
    transfers, entries = store.transfers.c, store.entries.c
    cut_off = transfers.posted_unix_ms - transfers.tapped_unix_ms > AT_ONCE_MS
    query = (
        sa.select(
            transfers.token_id,
            sa.func.sum(entries.amount_minor),
            sa.func.sum(sa.case((cut_off, entries.amount_minor), else_=0)),
            sa.func.max(entries.amount_minor),
        )
        .join(
            store.entries,
            sa.and_(entries.account_id == transfers.account_id, entries.transfer_id == transfers.id),
        )
        .where(
            among(connection, transfers.account_id, account_ids),
            transfers.kind == "payment",
            transfers.posted_unix_ms >= (now_unix_s - policy.window_s) * 1000,
            entries.book == RECEIVABLE,
        )
        .group_by(transfers.token_id)
    )
    return {
        token_id: (int(spent), int(cut_off), int(largest))
        for token_id, spent, cut_off, largest in connection.execute(query)
    }


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
    active = [line for line in lines if line.status is TokenStatus.ACTIVE]
    stuck = sum(
        stuck_minor(line.claimable(now_unix_s), line.highest, may_pay=line.status is TokenStatus.ACTIVE)
        for line in lines
    )
    uses = [
        Use(
            *spent.get(line.id, _NONE),
            returns=line.row.assurance in (PHONE, SOFTWARE_PHONE),
            assurance=line.row.assurance,
        )
        for line in active
    ]
    found = allowances(policy, uses, Debits(0, 0), owable_minor=owable_minor - stuck, limit_minor=limit_minor)
    return {line.id: each for line, each in zip(active, found, strict=True)}
