"""`bench billing`: how fast a month closes on PostgreSQL, beside the barest statement that touches its rows.

The accounts have lived a month: they bought, were billed, most paid (a part, or all), and bought again; some
in instalments. Then their second month closes, batch by batch, as `ledger bill run` does it. After each batch
a bare UPDATE … FROM, a transaction of its own just as durable, writes once to every row that the batch has
written in accounts, bills, items and plans. Both take the same batches, so that a slow minute of the machine
is both's. A sample of the accounts is audited at the end.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import closing as closed_after
from datetime import date
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from pos_gateway.errors import Conflict
from pos_gateway.lab.credit_history import offers
from pos_gateway.lab.postgresql import own_postgresql, run_alone
from pos_gateway.ledger.audit import audit
from pos_gateway.ledger.billing import Closing, close_batch, due_closings, newest_policy
from pos_gateway.ledger.billing_run import close_everything
from pos_gateway.ledger.books import BANK, PAYABLE, RECEIVABLE
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.credit.calendar import end_of_day_unix_ms, zone
from pos_gateway.ledger.plans import PlanKind, offer_text
from pos_gateway.ledger.store import Store

_ZONE: Final = "Asia/Shanghai"
_FIRST: Final = date(2027, 2, 5)
_SECOND: Final = date(2027, 3, 5)
_TARGET_RATIO: Final = 0.2
_SAMPLE: Final = 1_000

_Progress = Callable[[str], None]


def bench_billing(
    accounts: int, batch: int, folder: Path | None = None, progress: _Progress = lambda text: None
) -> dict[str, Any]:
    """Bill so many accounts.

    Raises:
        Unavailable: no PostgreSQL to be had.
        Conflict: the audit of the sample found a difference.
    """
    with own_postgresql(folder) as url, closed_after(Store.create(url)) as books:
        progress("making accounts that have lived a month")
        first_s = _live(books, url, accounts, batch)
        progress("closing the second month, in turn with a bare UPDATE … FROM")
        ours_s, bare_s, rows = _in_turn(books, batch, progress)
        with books.read() as connection:
            billed = connection.scalar(
                sa.text("SELECT count(*) FROM bills WHERE closing = :day"), {"day": _SECOND.toordinal()}
            )
            sample = connection.scalars(
                sa.text("SELECT id FROM accounts ORDER BY md5(id) LIMIT :some"), {"some": _SAMPLE}
            ).all()
        progress("auditing a sample")
        found = audit(books, only=sample)
        if not found.holds:
            raise Conflict(f"the audit found {len(found.differences)} differences: {found.differences[:1]}")
    ratio = round(statistics.median(b / o for o, b in zip(ours_s, bare_s, strict=True)), 3)
    return {
        "accounts": accounts,
        "batch_accounts": batch,
        "ledger": "postgres",
        "billed": int(billed or 0),
        "seconds": round(sum(ours_s), 2),
        "accounts_per_second": round(accounts / sum(ours_s)),
        "first_month_accounts_per_second": round(accounts / first_s),
        "rows_touched": rows,
        "bare_update_seconds": round(sum(bare_s), 2),
        "ratio_to_bare_update": ratio,
        "target_ratio": _TARGET_RATIO,
        "target_met": ratio >= _TARGET_RATIO,
        "audited": {"accounts": found.accounts, "differences": len(found.differences)},
    }


def _live(books: Store, url: sa.URL, accounts: int, batch: int) -> float:
    """Until the eve of the second closing; returns the seconds that closing the first month took."""
    policy = Policy(offers=offers())
    first_unix_ms = end_of_day_unix_ms(_FIRST, zone(_ZONE))
    second_unix_ms = end_of_day_unix_ms(_SECOND, zone(_ZONE))
    day_ms = 24 * 3600 * 1000
    with books.write() as connection:
        connection.execute(
            sa.text("INSERT INTO policies VALUES (1, :body, 0)"), {"body": policy.model_dump_json()}
        )
        _run(
            connection,
            """INSERT INTO accounts (id, holder, currency, limit_minor, target_line_minor, outstanding_minor,
                 opened_unix_ms, last_closing, next_closing)
               SELECT 'bench-' || lpad(n::text, 9, '0'), 'Customer', 'CNY', 1000000, 1000000, 0,
                 :opened, :first - 20, :first
               FROM generate_series(1, :accounts) n""",
            accounts=accounts,
            opened=first_unix_ms - 20 * day_ms,
            first=_FIRST.toordinal(),
        )
        _buy(connection, first_unix_ms - 5 * day_ms)
    run_alone(url, "ANALYZE")
    begun = time.perf_counter()
    close_everything(books, first_unix_ms, batch_accounts=batch)
    first_s = time.perf_counter() - begun
    with books.write() as connection:
        _repay(connection, first_unix_ms + 10 * day_ms)
        _buy(connection, second_unix_ms - 3 * day_ms)
        _plans(connection, second_unix_ms - 3 * day_ms)
    run_alone(url, "VACUUM ANALYZE")
    return first_s


def _buy(connection: sa.Connection, at_unix_ms: int) -> None:
    _run(
        connection,
        "CREATE TEMPORARY TABLE bought ON COMMIT DROP AS SELECT id AS account_id, gen_random_uuid() AS id, "
        "10000 + abs(hashtext(id || :at)) % 190000 AS amount FROM accounts",
        at=str(at_unix_ms),
    )
    _run(
        connection,
        "INSERT INTO transfers (account_id, id, kind, tapped_unix_ms, posted_unix_ms) "
        "SELECT account_id, id, 'payment', :at, :at FROM bought",
        at=at_unix_ms,
    )
    _entries(connection, "bought", RECEIVABLE, PAYABLE)
    connection.exec_driver_sql(
        "UPDATE accounts SET outstanding_minor = outstanding_minor + b.amount FROM bought b "
        "WHERE b.account_id = accounts.id"
    )


def _entries(connection: sa.Connection, table: str, debit: str, credit: str) -> None:
    for line, name, sign in ((0, debit, ""), (1, credit, "-")):
        owner = "'BENCH'" if name == PAYABLE else "account_id"
        connection.exec_driver_sql(
            "INSERT INTO entries (account_id, transfer_id, line, book, owner_id, currency, amount_minor) "  # noqa: S608 - names of ours
            f"SELECT account_id, id, {line}, '{name}', {owner}, 'CNY', {sign}amount FROM {table}"
        )


def _repay(connection: sa.Connection, at_unix_ms: int) -> None:
    """One in ten pays nothing, three the minimum, the others all; each final at once."""
    _run(
        connection,
        "CREATE TEMPORARY TABLE paid ON COMMIT DROP AS SELECT i.account_id, gen_random_uuid() AS id, "
        "SUM(i.owed_minor)::bigint AS amount FROM items i "
        "WHERE abs(hashtext(i.account_id)) % 10 > 3 "
        "OR (abs(hashtext(i.account_id)) % 10 > 0 AND NOT i.revolves) GROUP BY i.account_id",
    )
    _run(
        connection,
        "INSERT INTO allocations (account_id, item_id, sequence, cause, reference, day, at_unix_ms, "
        "amount_minor) SELECT p.account_id, i.id, 2, 'repayment', 'bench', :day, :at, i.owed_minor "
        "FROM paid p JOIN items i ON i.account_id = p.account_id "
        "WHERE abs(hashtext(i.account_id)) % 10 > 3 OR NOT i.revolves",
        day=_FIRST.toordinal() + 10,
        at=at_unix_ms,
    )
    connection.exec_driver_sql(
        "UPDATE items SET owed_minor = 0 FROM allocations a WHERE a.account_id = items.account_id "
        "AND a.item_id = items.id"
    )
    _run(
        connection,
        "INSERT INTO transfers (account_id, id, kind, tapped_unix_ms, posted_unix_ms, reference) "
        "SELECT account_id, id, 'repayment', :at, :at, 'bench' FROM paid",
        at=at_unix_ms,
    )
    _entries(connection, "paid", BANK, RECEIVABLE)
    connection.exec_driver_sql(
        "UPDATE accounts SET outstanding_minor = outstanding_minor - p.amount, credit_sequence = 2 "
        "FROM paid p WHERE p.account_id = accounts.id"
    )


def _plans(connection: sa.Connection, at_unix_ms: int) -> None:
    """One purchase in five is repaid in twelve instalments at the flat fee."""
    _run(
        connection,
        "INSERT INTO plans (account_id, id, kind, book, offer, quote, periods, principal_minor, left_minor, "
        "ahead_minor, next_number, merchant_fee_minor, made_unix_ms) "
        "SELECT t.account_id, t.id, :kind, :book, :offer, '{}', 12, e.amount_minor, e.amount_minor, "
        "e.amount_minor, 1, 0, :at FROM transfers t JOIN entries e ON e.account_id = t.account_id "
        "AND e.transfer_id = t.id AND e.line = 0 "
        "WHERE t.posted_unix_ms = :at AND abs(hashtext(t.account_id)) % 5 = 0",
        kind=PlanKind.PURCHASE.value,
        book=RECEIVABLE,
        offer=offer_text(offers()[0]),
        at=at_unix_ms,
    )
    # As `instalments.quote` spreads them: half-up each, the last takes the rest; 50 basis points a month.
    connection.exec_driver_sql(
        "INSERT INTO plan_instalments (account_id, plan_id, number, principal_minor, fee_minor) "
        "SELECT account_id, id, n, "
        "CASE WHEN n < 12 THEN each ELSE principal_minor - 11 * each END, "
        "CASE WHEN n < 12 THEN fee ELSE (2 * principal_minor * 600 + 10000) / 20000 - 11 * fee END FROM ("
        "SELECT account_id, id, principal_minor, (2 * principal_minor + 12) / 24 AS each, "
        "(2 * principal_minor * 50 + 10000) / 20000 AS fee FROM plans) p, generate_series(1, 12) n"
    )


def _in_turn(
    books: Store, batch: int, progress: _Progress
) -> tuple[list[float], list[float], dict[str, int]]:
    now_unix_ms = end_of_day_unix_ms(_SECOND, zone(_ZONE))
    ours_s: list[float] = []
    bare_s: list[float] = []
    rows = dict.fromkeys(_BARE, 0)
    done = 0
    while True:
        with books.write() as connection:
            policy = newest_policy(connection)
            closing: Closing | None = next(due_closings(connection, now_unix_ms), None)
            if closing is None:
                return ours_s, bare_s, rows
            connection.exec_driver_sql("DROP TABLE IF EXISTS bench_batch")
            _run(
                connection,
                "CREATE UNLOGGED TABLE bench_batch AS SELECT id FROM accounts WHERE next_closing = :day "
                "ORDER BY id LIMIT :batch",
                day=closing.closing.toordinal(),
                batch=batch,
            )
            connection.exec_driver_sql("ANALYZE bench_batch")
        begun = time.perf_counter()
        with books.write() as connection:
            count, _ = close_batch(connection, closing, policy, now_unix_ms, limit=batch)
        ours_s.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        with books.write() as connection:
            for table, statement in _BARE.items():
                rows[table] += connection.execute(
                    sa.text(statement), {"day": _SECOND.toordinal()} if ":day" in statement else {}
                ).rowcount
        bare_s.append(time.perf_counter() - begun)
        done += count
        progress(f"{done} closed")


_BARE: Final = {
    "accounts": "UPDATE accounts SET credit_sequence = credit_sequence FROM bench_batch b "
    "WHERE b.id = accounts.id",
    "bills": "UPDATE bills SET due_minor = due_minor FROM bench_batch b "
    "WHERE b.id = bills.account_id AND bills.closing = :day",
    "items": "UPDATE items SET owed_minor = owed_minor FROM bench_batch b "
    "WHERE b.id = items.account_id AND (items.closing = :day OR items.revolves)",
    "plans": "UPDATE plans SET ahead_minor = ahead_minor FROM bench_batch b WHERE b.id = plans.account_id",
}


def _run(connection: sa.Connection, statement: str, **parameters: object) -> None:
    # `::` is PostgreSQL's own.
    connection.execute(sa.text(statement.replace("::", "\\:\\:")), parameters)
