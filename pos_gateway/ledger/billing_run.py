"""Closing everything that is due to close, batch by batch: `ledger bill run`.

It may be killed anywhere and started again, here or at another replica: a batch is one transaction, and an
account whose cycle is closed has another next closing day.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa

from pos_gateway.ledger.accounts import lock_account
from pos_gateway.ledger.billing import (
    BATCH_ACCOUNTS,
    Closing,
    close_batch,
    due_closings,
    newest_policy,
    start_cycles,
)
from pos_gateway.ledger.credit_books import Desk
from pos_gateway.ledger.store import Store


@dataclass(frozen=True, slots=True)
class Progress:
    """One batch that is done."""

    closing: Closing
    accounts: int


def close_everything(
    database: Store,
    now_unix_ms: int,
    *,
    batch_accounts: int = BATCH_ACCOUNTS,
    progress: Callable[[Progress], object] = lambda batch: None,
) -> int:
    """Close every cycle that is over; how many. Each batch is durable when `progress` hears of it.

    Raises:
        Unavailable, OutcomeUnknown: see `Store.write`; what is done is done, the same call goes on.
    """
    while database.transact(lambda connection: start_cycles(connection, limit=batch_accounts)):
        pass
    total = 0
    while True:
        with database.read() as connection:
            closing = next(due_closings(connection, now_unix_ms), None)
        if closing is None:
            return total
        count = database.transact(_one_batch(closing, now_unix_ms, batch_accounts))
        total += count
        if count:
            progress(Progress(closing, count))


def _one_batch(closing: Closing, now_unix_ms: int, limit: int) -> Callable[[sa.Connection], int]:
    def work(connection: sa.Connection) -> int:
        policy = newest_policy(connection)
        count, concerned = close_batch(connection, closing, policy, now_unix_ms, limit=limit)
        for account_id in concerned:
            account = lock_account(connection, account_id, now_unix_ms // 1000)
            Desk.after(connection, account, policy[1].credit, closing).follow_up()
        return count

    return work
