# ruff: noqa: S608 - every name that is put into a statement stands in this file
"""Closing cycles: the bills of many accounts at once, each account once, in batches that may die anywhere.

What a bill says is decided by the rules of `credit.billing`, here in SQL for a whole batch; `ledger audit`
makes every bill again from those rules, in Python, account by account. A batch is one transaction: its
accounts have their bills, charges and next closing days all together, or nothing has happened.

Interest and fees become receivables of a book of their own: they are owed outside the limit, and closing
never changes what counts against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any, Final
from zoneinfo import ZoneInfo

import sqlalchemy as sa

from pos_gateway.ledger import store
from pos_gateway.ledger.books import CHARGES, INSTALMENT_FEES, INTEREST, ISSUER, OVERDUE_FEES, RECEIVABLE
from pos_gateway.ledger.bulk import update_each
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.credit.calendar import Cycle, day_of, end_of_day_unix_ms, zone
from pos_gateway.ledger.credit.terms import CreditTerms

BATCH_ACCOUNTS: Final = 20_000


@dataclass(frozen=True, slots=True)
class Closing:
    """Accounts whose cycles close together: at the end of one day, somewhere, with the same next one."""

    time_zone: str
    closing_day: int
    closing: date

    @property
    def where(self) -> ZoneInfo:
        return zone(self.time_zone)

    @property
    def cutoff_unix_ms(self) -> int:
        """The first moment that the bill does not take."""
        return end_of_day_unix_ms(self.closing, self.where)

    def cycle(self, terms: CreditTerms) -> Cycle:
        return Cycle(self.closing_day, terms.due_after_days)


def newest_policy(connection: sa.Connection) -> tuple[int, Policy]:
    """With its version, which a bill names."""
    columns = store.policies.c
    newest = sa.select(columns.version, columns.body).order_by(columns.version.desc()).limit(1)
    version, body = connection.execute(newest).one()
    return int(version), _policy(body)


@lru_cache(maxsize=8)
def _policy(body: str) -> Policy:
    return Policy.model_validate_json(body)


def start_cycles(
    connection: sa.Connection, account_id: str | None = None, limit: int = BATCH_ACCOUNTS
) -> int:
    """Give accounts that have no cycle yet the one that the day of their opening belongs to; how many."""
    columns = store.accounts.c
    query = (
        sa.select(columns.id, columns.opened_unix_ms, columns.time_zone, columns.closing_day)
        .where(columns.next_closing.is_(None))
        .order_by(columns.id)
        .limit(limit)
        .with_for_update(key_share=True)
    )
    if account_id is not None:
        query = query.where(columns.id == account_id)
    rows = connection.execute(query).all()
    days = {row.id: day_of(row.opened_unix_ms, zone(row.time_zone)) for row in rows}
    update_each(
        connection, store.accounts, "last_closing", {id_: day.toordinal() - 1 for id_, day in days.items()}
    )
    update_each(
        connection,
        store.accounts,
        "next_closing",
        {row.id: Cycle(row.closing_day, 1).closing_on_or_after(days[row.id]).toordinal() for row in rows},
    )
    return len(rows)


def due_closings(
    connection: sa.Connection, now_unix_ms: int, account_id: str | None = None
) -> Iterator[Closing]:
    """Which closings are over and not done, the earliest first."""
    columns = store.accounts.c
    tomorrow = date.fromordinal(day_of(now_unix_ms, ZoneInfo("UTC")).toordinal() + 1)
    query = (
        sa.select(columns.time_zone, columns.closing_day, columns.next_closing)
        .where(columns.next_closing <= tomorrow.toordinal())
        .distinct()
        .order_by(columns.next_closing, columns.time_zone, columns.closing_day)
    )
    if account_id is not None:
        query = query.where(columns.id == account_id)
    for row in connection.execute(query).all():
        closing = Closing(row.time_zone, row.closing_day, date.fromordinal(row.next_closing))
        if closing.cutoff_unix_ms <= now_unix_ms:
            yield closing


def close_batch(
    connection: sa.Connection,
    closing: Closing,
    policy: tuple[int, Policy],
    now_unix_ms: int,
    *,
    limit: int = BATCH_ACCOUNTS,
    account_id: str | None = None,
    done: Callable[[str], object] = lambda step: None,
) -> tuple[int, list[str]]:
    """Close the cycle of at most so many accounts of one closing; how many, and which of them have paid more
    than they owed, or have funds in the vault: `credit_books.Desk.follow_up` is for them."""
    version, terms = policy[0], policy[1].credit
    postgresql = connection.dialect.name == "postgresql"
    cycle = closing.cycle(terms)
    parameters: dict[str, Any] = {
        "zone": closing.time_zone,
        "closing_day": closing.closing_day,
        "closing": closing.closing.toordinal(),
        "due": cycle.due_on(closing.closing).toordinal(),
        "next": cycle.closing_after(closing.closing).toordinal(),
        "cutoff": closing.cutoff_unix_ms,
        "now": now_unix_ms,
        "policy": version,
        "reference": closing.closing.isoformat(),
        "interest_ppm": terms.interest_per_day_ppm,
        "fee_ppm": terms.overdue_fee_per_day_ppm,
        "fee_cap_ppm": terms.overdue_fee_cap_ppm,
        "share_ppm": terms.minimum_share_ppm,
        "floor": terms.minimum_floor_minor,
        "limit": limit,
        "account": account_id,
    }

    def run(statement: str) -> None:
        text, names = _prepared(statement)
        connection.execute(text, {name: parameters[name] for name in names})

    for table, columns in _SCRATCH.items():
        if not postgresql:
            columns = columns.replace("UUID", "CHAR(32)")
        run(
            f"CREATE TEMPORARY TABLE IF NOT EXISTS {table} ({columns})"
            + (" ON COMMIT DELETE ROWS" if postgresql else "")
        )
        run(f"DELETE FROM {table}")
    lock = "FOR NO KEY UPDATE" if postgresql else ""
    run(
        "INSERT INTO closing_now SELECT id, last_closing, credit_sequence + 1, outstanding_minor, currency "
        "FROM accounts WHERE next_closing = :closing AND time_zone = :zone AND closing_day = :closing_day "
        + ("AND id = :account " if account_id is not None else "")
        + f"ORDER BY id LIMIT :limit {lock}"
    )
    if postgresql and account_id is None:
        run("ANALYZE closing_now")
    done("lock")
    run(_FEES)
    run(_WORK.replace("NEW_ID", "gen_random_uuid()" if postgresql else "lower(hex(randomblob(16)))"))
    if postgresql and account_id is None:
        run("ANALYZE closing_work")
    run(
        "UPDATE closing_work "
        "SET minimum = CASE WHEN whole + share > :floor THEN whole + share ELSE :floor END"
    )
    run(
        "UPDATE closing_work SET minimum = whole + carried + fresh_owed "
        "WHERE minimum > whole + carried + fresh_owed"
    )
    done("decide")
    for statement in _WRITE:
        run(statement)
    for column, book, kind in (
        ("interest", INTEREST, "interest"),
        ("instalment_fees", INSTALMENT_FEES, "instalment_fee"),
        ("overdue_fee", OVERDUE_FEES, "overdue_fee"),
    ):
        run(
            "INSERT INTO transfers (account_id, id, kind, tapped_unix_ms, posted_unix_ms, reference) "
            f"SELECT account_id, {column}_id, '{kind}', :now, :now, :reference FROM closing_work "
            f"WHERE {column} > 0"
        )
        for line, owner, sign, name in ((0, "account_id", "", CHARGES), (1, f"'{ISSUER}'", "-", book)):
            run(
                "INSERT INTO entries "
                "(account_id, transfer_id, line, book, owner_id, currency, amount_minor) "
                f"SELECT account_id, {column}_id, {line}, '{name}', {owner}, currency, {sign}{column} "
                f"FROM closing_work WHERE {column} > 0"
            )
    run(
        "UPDATE accounts SET last_closing = :closing, next_closing = :next, "
        "credit_sequence = accounts.credit_sequence + 1 FROM closing_now c WHERE c.account_id = accounts.id"
    )
    done("write")
    count = connection.execute(sa.text("SELECT count(*) FROM closing_now")).scalar_one()
    over = connection.execute(
        sa.text(
            "SELECT w.account_id FROM closing_work w JOIN accounts a ON a.id = w.account_id "
            "WHERE w.fresh < 0 AND w.whole + w.carried > 0 OR a.vault_minor > 0 ORDER BY w.account_id"
        )
    )
    return int(count), list(over.scalars())


@lru_cache(maxsize=128)
def _prepared(statement: str) -> tuple[sa.TextClause, tuple[str, ...]]:
    """With the names of its parameters."""
    text = sa.text(statement)
    return text, tuple(text.compile().params)


_SCRATCH: Final = {
    "closing_now": "account_id VARCHAR(32) PRIMARY KEY, previous INTEGER, sequence BIGINT, "
    "outstanding BIGINT, currency VARCHAR(3)",
    "closing_fees": "account_id VARCHAR(32), closing INTEGER, fee BIGINT",
    "closing_work": "account_id VARCHAR(32) PRIMARY KEY, previous INTEGER, sequence BIGINT, "
    "currency VARCHAR(3), fresh BIGINT, fresh_owed BIGINT, carried BIGINT, arrears BIGINT, waiting BIGINT, "
    "instalments BIGINT, instalment_fees BIGINT, interest BIGINT, overdue_fee BIGINT, whole BIGINT, "
    "share BIGINT, minimum BIGINT, interest_id UUID, instalment_fees_id UUID, overdue_fee_id UUID",
}


def _from(start: str) -> str:
    """The later of a day of the item and the last closing: what came before was charged before."""
    return f"(CASE WHEN {start} > c.previous THEN {start} ELSE c.previous END)"


_DUE: Final = _from("i.due_on")
_BEARS: Final = _from("i.bears_from")
_IS_DUE: Final = "NOT i.revolves AND i.part <> 'overdue_fee' AND i.due_on < :closing"

_FEES: Final = f"""
INSERT INTO closing_fees
SELECT account_id, closing,
  CASE WHEN fee < room THEN fee ELSE room END
FROM (
  SELECT o.account_id, o.closing, (2 * o.days_minor * :fee_ppm + 1000000) / 2000000 AS fee,
    b.due_minor * :fee_cap_ppm / 1000000 - b.overdue_charged_minor AS room
  FROM (
    SELECT account_id, closing, CAST(SUM(days_minor) AS BIGINT) AS days_minor FROM (
      SELECT i.account_id, i.closing, i.owed_minor * (:closing - {_DUE}) AS days_minor
      FROM closing_now c JOIN items i ON i.account_id = c.account_id
      WHERE i.owed_minor > 0 AND {_IS_DUE}
      UNION ALL
      SELECT i.account_id, i.closing, a.amount_minor * (a.day - 1 - {_DUE})
      FROM closing_now c
      JOIN allocations a ON a.account_id = c.account_id AND a.day > c.previous
      JOIN items i ON i.account_id = a.account_id AND i.id = a.item_id
      WHERE {_IS_DUE} AND a.day > {_DUE}
    ) parts GROUP BY account_id, closing
  ) o JOIN bills b ON b.account_id = o.account_id AND b.closing = o.closing
) charged WHERE room > 0 AND fee > 0
"""

_WORK: Final = f"""
INSERT INTO closing_work
SELECT account_id, previous, sequence, currency, fresh, fresh_owed, carried, arrears, waiting,
  instalments, instalment_fees, interest, overdue_fee,
  arrears + waiting + instalments + instalment_fees + interest + overdue_fee,
  (2 * (carried + fresh_owed) * :share_ppm + 1000000) / 2000000, 0, NEW_ID, NEW_ID, NEW_ID
FROM (
  SELECT f.*, CASE WHEN fresh > 0 THEN fresh ELSE 0 END AS fresh_owed
  FROM (
    SELECT c.account_id, c.previous, c.sequence, c.currency,
      c.outstanding - COALESCE(l.late, 0) - COALESCE(i.principal, 0) - COALESCE(p.ahead, 0) AS fresh,
      COALESCE(i.carried, 0) AS carried, COALESCE(i.arrears, 0) AS arrears,
      COALESCE(i.waiting, 0) AS waiting, COALESCE(p.principal, 0) AS instalments,
      COALESCE(p.fee, 0) AS instalment_fees,
      (2 * (COALESCE(i.days_minor, 0) + COALESCE(a.days_minor, 0)) * :interest_ppm + 1000000) / 2000000
        AS interest,
      COALESCE(o.fee, 0) AS overdue_fee
    FROM closing_now c
    LEFT JOIN (
      SELECT e.account_id, CAST(SUM(e.amount_minor) AS BIGINT) AS late
      FROM closing_now c
      JOIN transfers t ON t.account_id = c.account_id AND t.posted_unix_ms >= :cutoff
      JOIN entries e ON e.account_id = t.account_id AND e.transfer_id = t.id
      WHERE e.book = '{RECEIVABLE}'
      GROUP BY e.account_id
    ) l ON l.account_id = c.account_id
    LEFT JOIN (
      SELECT i.account_id,
        CAST(SUM(CASE WHEN i.book = '{RECEIVABLE}' THEN i.owed_minor ELSE 0 END) AS BIGINT) AS principal,
        CAST(SUM(CASE WHEN i.revolves AND i.closing IS NOT NULL THEN i.owed_minor ELSE 0 END) AS BIGINT)
          AS carried,
        CAST(SUM(CASE WHEN NOT i.revolves AND i.closing IS NOT NULL THEN i.owed_minor ELSE 0 END) AS BIGINT)
          AS arrears,
        CAST(SUM(CASE WHEN i.closing IS NULL THEN i.owed_minor ELSE 0 END) AS BIGINT) AS waiting,
        CAST(SUM(CASE WHEN i.bears_from < :closing THEN i.owed_minor * (:closing - {_BEARS}) ELSE 0 END)
          AS BIGINT) AS days_minor
      FROM closing_now c JOIN items i ON i.account_id = c.account_id
      WHERE i.owed_minor > 0
      GROUP BY i.account_id
    ) i ON i.account_id = c.account_id
    LEFT JOIN (
      SELECT a.account_id, CAST(SUM(a.amount_minor * (a.day - 1 - {_BEARS})) AS BIGINT) AS days_minor
      FROM closing_now c
      JOIN allocations a ON a.account_id = c.account_id AND a.day > c.previous
      JOIN items i ON i.account_id = a.account_id AND i.id = a.item_id
      WHERE i.bears_from < :closing AND a.day > {_BEARS}
      GROUP BY a.account_id
    ) a ON a.account_id = c.account_id
    LEFT JOIN (
      SELECT p.account_id,
        CAST(SUM(CASE WHEN p.book = '{RECEIVABLE}' THEN p.ahead_minor ELSE 0 END) AS BIGINT) AS ahead,
        CAST(SUM(n.principal_minor) AS BIGINT) AS principal, CAST(SUM(n.fee_minor) AS BIGINT) AS fee
      FROM closing_now c
      JOIN plans p ON p.account_id = c.account_id AND p.made_unix_ms < :cutoff AND p.ahead_minor > 0
      JOIN plan_instalments n
        ON n.account_id = p.account_id AND n.plan_id = p.id AND n.number = p.next_number
      GROUP BY p.account_id
    ) p ON p.account_id = c.account_id
    LEFT JOIN (
      SELECT account_id, CAST(SUM(fee) AS BIGINT) AS fee FROM closing_fees GROUP BY account_id
    ) o ON o.account_id = c.account_id
  ) f
) g
"""

_ITEM: Final = (
    "INSERT INTO items (account_id, id, closing, due_on, origin, part, book, plan_id, revolves, since, "
    "bears_from, amount_minor, owed_minor, sequence) "
)
_PLANS_NOW: Final = (
    "closing_now c JOIN plans p ON p.account_id = c.account_id AND p.made_unix_ms < :cutoff "
    "AND p.ahead_minor > 0 JOIN plan_instalments n ON n.account_id = p.account_id AND n.plan_id = p.id "
    "AND n.number = p.next_number"
)


# In the order of these letters repayments go to what is else alike: what is due before what may revolve.
_NAMED: Final = (
    ":reference || '/{}/' || REPLACE(CAST(p.id AS VARCHAR(36)), '-', '') "
    "|| '/' || CAST(n.number AS VARCHAR(4))"
)


def _charge(letter: str, column: str, part: str) -> str:
    return (
        f"SELECT account_id, :reference || '/{letter}', :closing, :due, 'charge', '{part}', '{CHARGES}', "
        f"CAST(NULL AS UUID), FALSE, :closing, CAST(NULL AS INTEGER), {column}, {column}, sequence "
        f"FROM closing_work WHERE {column} > 0"
    )


def _purchases(letter: str, amount: str, revolves: str, bears_from: str) -> str:
    return (
        f"SELECT account_id, :reference || '/{letter}', :closing, :due, 'purchase', 'principal', "
        f"'{RECEIVABLE}', CAST(NULL AS UUID), {revolves}, :closing, {bears_from}, {amount}, {amount}, "
        f"sequence FROM closing_work WHERE {amount} > 0"
    )


# Of what need not be paid at once, the older is due first.
_SPARE: Final = "(minimum - whole)"
_CARRIED_DUE: Final = f"(CASE WHEN {_SPARE} < carried THEN {_SPARE} ELSE carried END)"
_FRESH_DUE: Final = f"(CASE WHEN {_SPARE} > carried THEN {_SPARE} - carried ELSE 0 END)"

_WRITE: Final = (
    # What revolved is taken over by this bill.
    "INSERT INTO allocations (account_id, item_id, sequence, cause, day, at_unix_ms, amount_minor) "
    "SELECT i.account_id, i.id, c.sequence, 'rolled', :closing, :cutoff, i.owed_minor "
    "FROM closing_now c JOIN items i ON i.account_id = c.account_id "
    "WHERE i.owed_minor > 0 AND i.revolves AND i.closing IS NOT NULL",
    "UPDATE items SET owed_minor = 0 FROM closing_now c WHERE c.account_id = items.account_id "
    "AND items.owed_minor > 0 AND items.revolves AND items.closing IS NOT NULL",
    # What waited for a bill stands on this one.
    "UPDATE items SET closing = :closing, due_on = :due, "
    "bears_from = CASE WHEN items.part = 'principal' THEN :due END "
    "FROM closing_now c WHERE c.account_id = items.account_id AND items.owed_minor > 0 "
    "AND items.closing IS NULL",
    _ITEM + f"SELECT p.account_id, {_NAMED.format('p')}, "
    "CAST(:closing AS INTEGER), CAST(:due AS INTEGER), 'instalment', 'principal', p.book, p.id, FALSE, "
    "CAST(:closing AS INTEGER), CAST(:due AS INTEGER), n.principal_minor, n.principal_minor, c.sequence "
    f"FROM {_PLANS_NOW}",
    _ITEM + f"SELECT p.account_id, {_NAMED.format('f')}, "
    f"CAST(:closing AS INTEGER), CAST(:due AS INTEGER), 'instalment', 'instalment_fee', '{CHARGES}', p.id, "
    "FALSE, CAST(:closing AS INTEGER), CAST(NULL AS INTEGER), n.fee_minor, n.fee_minor, c.sequence "
    f"FROM {_PLANS_NOW} WHERE n.fee_minor > 0",
    _ITEM + _charge("1i", "interest", "interest"),
    _ITEM + _charge("1o", "overdue_fee", "overdue_fee"),
    _ITEM + _purchases("q1", _CARRIED_DUE, "FALSE", ":closing"),
    _ITEM + _purchases("q2", _FRESH_DUE, "FALSE", ":due"),
    _ITEM + _purchases("r1", f"(carried - {_CARRIED_DUE})", "TRUE", ":closing"),
    _ITEM + _purchases("r2", f"(fresh_owed - {_FRESH_DUE})", "TRUE", ":due"),
    "INSERT INTO bills (account_id, closing, previous_closing, due_on, cutoff_unix_ms, closed_unix_ms, "
    "policy_version, sequence, purchases_minor, carried_minor, instalments_minor, instalment_fees_minor, "
    "interest_minor, overdue_fee_minor, arrears_minor, total_minor, minimum_minor, due_minor, "
    "overdue_charged_minor) "
    "SELECT account_id, :closing, previous, :due, :cutoff, :now, :policy, sequence, fresh, carried, "
    "instalments, instalment_fees, interest, overdue_fee, arrears, whole + carried + fresh_owed, minimum, "
    "minimum - arrears - overdue_fee, 0 "
    "FROM closing_work WHERE whole + carried + fresh_owed > 0 OR fresh < 0",
    "UPDATE bills SET overdue_charged_minor = bills.overdue_charged_minor + f.fee FROM closing_fees f "
    "WHERE f.account_id = bills.account_id AND f.closing = bills.closing",
    "UPDATE plan_instalments SET closing = :closing FROM (SELECT p.account_id, p.id, n.number "
    f"FROM {_PLANS_NOW}) taken WHERE taken.account_id = plan_instalments.account_id "
    "AND taken.id = plan_instalments.plan_id AND taken.number = plan_instalments.number",
    "UPDATE plans SET next_number = plans.next_number + 1, "
    "ahead_minor = plans.ahead_minor - n.principal_minor "
    "FROM closing_now c, plan_instalments n WHERE plans.account_id = c.account_id "
    "AND plans.made_unix_ms < :cutoff AND plans.ahead_minor > 0 AND n.account_id = plans.account_id "
    "AND n.plan_id = plans.id AND n.number = plans.next_number",
)
