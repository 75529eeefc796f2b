"""`bench publish`: every account's ceilings decided anew and published, and what each part of that costs.

A ledger with so many accounts, every tenth with a second token. Its first limits are published; a tenth of
the accounts then pay, and one in a hundred leaves a gap on its counter line; a day later the limits that are
measured are published. Meanwhile somebody keeps asking for one account after the other, as posting and
grants do: how long each waits is told.

In the same run, over the rows that this publication has put on record: a plain COPY … TO of their columns,
and a server-side INSERT … SELECT of them, durable, into the same table made anew: the same indexes and
constraints. The first is the limit of reading, the second that of keeping.
"""

from __future__ import annotations

import resource
import secrets
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from random import Random
from typing import Any, Final

import sqlalchemy as sa

from pos_gateway.errors import Unavailable
from pos_gateway.lab.postgresql import own_postgresql, run_alone
from pos_gateway.ledger import accounts, store
from pos_gateway.ledger.accounts import TokenStatus, new_id
from pos_gateway.ledger.allowance import PHONE, PLASTIC
from pos_gateway.ledger.bulk import insert_tuples
from pos_gateway.ledger.config import Policy, policy_by_use
from pos_gateway.ledger.ledger import Ledger
from pos_gateway.ledger.store import Store

_TARGET_RATIO: Final = 0.2
_LIMIT_MINOR: Final = 1_000_000
_AMOUNT_MINOR: Final = 5_000
_GAP_MINOR: Final = 777
_ROWS_AT_ONCE: Final = 50_000
_SAMPLE_ACCOUNTS: Final = 10_000
_DAY_S: Final = 86_400
_ASK_EVERY_S: Final = 0.02
_MIB: Final = 1 << 20

_Progress = Callable[[str], None]


def bench_publish(
    count: int,
    *,
    by_use: bool = False,
    folder: Path | None = None,
    progress: _Progress = lambda text: None,
) -> dict[str, Any]:
    """Measure with so many accounts. `by_use`: by the shipped policy whose allowances go by use.

    `folder`: on which disk books and files lie; the system's temporary folder if not said.

    Raises:
        Unavailable: no PostgreSQL to be had.
        InvariantBroken: a fault of ours.
    """
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix="pos-gateway-bench-") as scratch,
        own_postgresql(Path(scratch)) as server,
    ):
        run_alone(server, "CREATE DATABASE ledger")
        url = server.set(database="ledger")
        clock = _Clock()
        home = Path(scratch) / "ledger"
        Ledger.create(
            home,
            issuer="Harbour Credit",
            database=url.render_as_string(hide_password=False),
            policy=policy_by_use() if by_use else Policy(),
            clock=clock,
        ).close()
        with Ledger.open(home, clock=clock) as ledger:
            progress(f"opening {count} accounts")
            tokens = _fill(ledger.database, count)
            run_alone(url, "VACUUM ANALYZE")
            progress("publishing for the first time")
            first = _publish(ledger, count, tokens)
            progress("a day of payments")
            _a_day(ledger.database)
            run_alone(url, "VACUUM ANALYZE")
            clock.now_s += _DAY_S
            progress("publishing again")
            again = _publish(ledger, count, tokens)
            progress("taking one token back")
            urgent = _urgent(ledger)
            progress("beside it: COPY … TO and INSERT … SELECT")
            bare = _bare(ledger.database, again["version"])
            progress("checking")
            _check(ledger, clock)
    decided_s = again["steps_s"]["decide"]
    return {
        "accounts": count,
        "tokens": tokens,
        "policy": "by use" if by_use else "by share",
        "first": first,
        "again": again,
        "urgent": urgent,
        **bare,
        "accounts_per_s": again["accounts_per_s"],
        "ratio": round(bare["copy_to_s"] / again["seconds"], 3),
        "ratio_of_deciding": round(bare["copy_to_s"] / decided_s, 3),
        "ratio_to_insert_select": round(bare["insert_select_s"] / decided_s, 2),
        "target_ratio": _TARGET_RATIO,
    }


class _Clock:
    def __init__(self) -> None:
        self.now_s = time.time()

    def __call__(self) -> float:
        return self.now_s


def _fill(database: Store, count: int) -> int:
    """Accounts and tokens as issuing leaves them; returns how many tokens."""
    random, tokens = Random(5), 0
    for start in range(0, count, _ROWS_AT_ONCE):
        owners, held = [], []
        for number in range(start, min(start + _ROWS_AT_ONCE, count)):
            account_id = new_id("acc")
            owners.append((account_id, "A. Customer", "CNY", _LIMIT_MINOR, _LIMIT_MINOR, 0, 0))
            for assurance in (PLASTIC, PHONE)[: 1 + (number % 10 == 0)]:
                held.append(_token(account_id, assurance, random.randrange(1 << 40)))
        tokens += len(held)
        with database.write() as connection:
            insert_tuples(connection, store.accounts, _ACCOUNT, owners)
            insert_tuples(connection, store.tokens, _TOKEN, held)
    return tokens


_ACCOUNT: Final = (
    "id",
    "holder",
    "currency",
    "limit_minor",
    "target_line_minor",
    "outstanding_minor",
    "opened_unix_ms",
)
_TOKEN: Final = (
    "id",
    "account_id",
    "token_key",
    "last4",
    "psn",
    "expires",
    "status",
    "per_tap_cap_minor",
    "assurance",
    "highest_counter",
    "record_version",
    "record_sequence",
    "record_ceiling",
    "record_per_tap_cap_minor",
    "record_status",
    "record_assurance",
    "issued_unix_ms",
)


def _token(account_id: str, assurance: int, counter: int) -> tuple[Any, ...]:
    key, until = secrets.token_bytes(16), date(2036, 12, 31)
    plain = (new_id("tok"), account_id, key, "1234", 1, until, "active", 100_000, assurance, counter)
    return (*plain, 0, 0, 0, 0, "closed", 0, 0)


class _Steps:
    """How long each step took, as the publisher tells when it is done with one."""

    def __init__(self) -> None:
        self.taken_s: dict[str, float] = {}
        self._last_s = time.perf_counter()

    def done(self, step: str) -> None:
        now_s = time.perf_counter()
        self.taken_s[step] = round(self.taken_s.get(step, 0.0) + now_s - self._last_s, 3)
        self._last_s = now_s


def _publish(ledger: Ledger, count: int, tokens: int) -> dict[str, Any]:
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with _asking(ledger.database) as waits_s:
        steps, begun = _Steps(), time.perf_counter()
        published = ledger.publish(done=steps.done)
        taken_s = time.perf_counter() - begun
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown_kib
    ordered = sorted(waits_s)
    return {
        "version": published.version,
        "seconds": round(taken_s, 2),
        "accounts_per_s": round(count / taken_s),
        "us_per_token": round(1e6 * taken_s / tokens, 1),
        "steps_s": steps.taken_s,
        "file_mib": round(published.size / _MIB, 1),
        "memory_grew_mib": round(grown_kib / 1024),
        "others_wait_ms": {
            "asked": len(ordered),
            "p50": round(1000 * statistics.median(ordered), 1),
            "p99": round(1000 * ordered[int(len(ordered) * 0.99)], 1),
            "max": round(1000 * ordered[-1], 1),
        },
    }


def _urgent(ledger: Ledger) -> dict[str, Any]:
    with ledger.database.read() as connection:
        token_id = connection.scalars(sa.select(store.tokens.c.id).limit(1)).one()
    ledger.set_token_status(token_id, TokenStatus.BLOCKED)
    steps, begun = _Steps(), time.perf_counter()
    ledger.publish_urgent(done=steps.done)
    return {"seconds": round(time.perf_counter() - begun, 2), "steps_s": steps.taken_s}


@contextmanager
def _asking(database: Store) -> Iterator[list[float]]:
    """Somebody who locks one account after the other, as posting does; how long each took."""
    with database.read() as connection:
        ids = connection.scalars(sa.select(store.accounts.c.id).limit(_SAMPLE_ACCOUNTS)).all()
    ended, waits_s, random = threading.Event(), [], Random(7)

    def ask() -> None:
        while not ended.wait(_ASK_EVERY_S):
            begun = time.perf_counter()
            try:
                with database.write() as connection:
                    accounts.lock_account(connection, random.choice(ids), 0)
            except Unavailable:
                pass  # it waited for as long as it may
            waits_s.append(time.perf_counter() - begun)

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        yield waits_s
    finally:
        ended.set()
        asker.join()
        waits_s.append(0.0)


def _a_day(database: Store) -> None:
    """What posting leaves on counter lines and accounts: a tenth of the cards pay, and one in a hundred of
    all was torn from a reader, which leaves a gap. Of the books themselves nothing."""
    token, account = store.tokens.c, store.accounts.c
    card = token.assurance == PLASTIC
    pays = sa.func.get_byte(token.token_key, 0) < 26
    torn = sa.func.get_byte(token.token_key, 1) < 3
    with database.write() as connection:
        payers = sa.select(token.account_id).where(card, pays)
        connection.execute(
            store.accounts.update()
            .where(account.id.in_(payers))
            .values(outstanding_minor=account.outstanding_minor + _AMOUNT_MINOR)
        )
        before = token.highest_counter + sa.case((torn, _GAP_MINOR), else_=0)
        after = before + sa.case((pays, _AMOUNT_MINOR), else_=0)
        connection.execute(
            store.tokens.update()
            .where(card, sa.or_(pays, torn))
            .values(
                highest_counter=after,
                run_start=sa.case((pays, before), else_=0),
                run_end=sa.case((pays, after), else_=0),
            )
        )


def _bare(database: Store, version: int) -> dict[str, Any]:
    """Over the publications of one version: COPY … TO, and INSERT … SELECT into a table like theirs."""
    columns = ", ".join(column.name for column in store.publications.columns)
    those = f"SELECT {columns} FROM publications WHERE snapshot_version = {int(version)}"
    copied = 0
    with database.read() as connection:
        driver: Any = connection.connection.driver_connection
        begun = time.perf_counter()
        with driver.cursor() as cursor, cursor.copy(f"COPY ({those}) TO STDOUT") as copy:
            for _ in copy:
                copied += 1
        copy_s = time.perf_counter() - begun
    with database.write() as connection:
        connection.exec_driver_sql("CREATE TABLE spare (LIKE publications INCLUDING ALL)")
    begun = time.perf_counter()
    with database.write() as connection:
        connection.exec_driver_sql(f"INSERT INTO spare ({columns}) {those}")
    insert_s = time.perf_counter() - begun
    with database.write() as connection:
        connection.exec_driver_sql("DROP TABLE spare")
    return {"rows": copied, "copy_to_s": round(copy_s, 3), "insert_select_s": round(insert_s, 3)}


def _check(ledger: Ledger, clock: _Clock) -> None:
    """Some accounts, read one by one, hold the invariant by the rules themselves."""
    with ledger.database.read() as connection:
        ids = connection.scalars(sa.select(store.accounts.c.id).limit(_SAMPLE_ACCOUNTS)).all()
        accounts.check_accounts(connection, ids, int(clock.now_s))
