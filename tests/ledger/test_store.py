"""Transactions: durable, undone whole, tried again when another came first; on both databases."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from pos_gateway.errors import Conflict, InvalidConfiguration, OutcomeUnknown, Unavailable
from pos_gateway.ledger import bulk, migrations, store
from pos_gateway.ledger import database as databases
from pos_gateway.ledger.database import database_url, sqlite_url
from pos_gateway.ledger.store import Contended, Store
from tests.ledger.books import Cluster

MERCHANT = {"id": "M", "name": "Shop", "category": "5411"}


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Store]:
    opened = Store.create(sqlite_url(tmp_path / "ledger.db"))
    yield opened
    opened.close()


@pytest.fixture
def server(postgresql: Cluster, tables: str) -> Iterator[sa.URL]:
    """A PostgreSQL database with the ledger's tables."""
    url = postgresql.create(tables)
    yield database_url(url, Path())
    postgresql.drop(url)


@pytest.fixture(params=["sqlite", "postgresql"])
def books(request: pytest.FixtureRequest) -> Iterator[Store]:
    if request.param == "sqlite":
        yield request.getfixturevalue("sqlite")
        return
    opened = Store.open(request.getfixturevalue("server"))
    yield opened
    opened.close()


def merchants(books: Store) -> int:
    with books.read() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(store.merchants)) or 0


def test_commits_are_durable_and_foreign_keys_hold(sqlite: Store) -> None:
    with sqlite.read() as connection:
        settings = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert settings == ["wal", 2, 1]  # 2 is FULL: the log is synced at every commit
    with pytest.raises(sa.exc.IntegrityError), sqlite.write() as connection:
        connection.execute(store.tokens.insert().values(id="t", account_id="nobody"))


def test_an_exception_undoes_everything(books: Store) -> None:
    def fail_half_way() -> None:
        with books.write() as connection:
            connection.execute(store.merchants.insert().values(MERCHANT))
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert merchants(books) == 0


def test_a_writer_holds_the_database_from_its_first_read_on(sqlite: Store, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "ledger.db", timeout=0, isolation_level=None)
    with sqlite.write() as connection:
        connection.execute(sa.select(store.merchants)).all()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")
    other.close()


def test_a_reader_does_not_wait_and_sees_one_state(books: Store) -> None:
    with books.read() as reading:
        count = sa.select(sa.func.count()).select_from(store.merchants)
        assert reading.scalar(count) == 0
        with books.write() as connection:
            connection.execute(store.merchants.insert().values(MERCHANT))
        assert reading.scalar(count) == 0
    assert merchants(books) == 1


def test_a_database_that_stays_busy_is_unavailable(
    tmp_path: Path, sqlite: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(databases, "BUSY_TIMEOUT_S", 0.05)
    impatient = Store.open(sqlite_url(tmp_path / "ledger.db"))
    with sqlite.write(), pytest.raises(Unavailable, match="try again"), impatient.write():
        pass
    with impatient.write():
        pass


def test_writers_in_threads_take_turns(sqlite: Store) -> None:
    def add(name: str) -> None:
        with sqlite.write() as connection:
            known = connection.scalar(sa.select(sa.func.count()).select_from(store.merchants))
            connection.execute(store.merchants.insert().values({**MERCHANT, "id": name, "name": str(known)}))

    threads = [threading.Thread(target=add, args=(f"M{i}",)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with sqlite.read() as connection:
        seen = sorted(int(n) for n in connection.scalars(sa.select(store.merchants.c.name)))
    assert seen == list(range(12))


def test_there_must_be_a_database(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match="no ledger database"):
        Store.open(sqlite_url(tmp_path / "ledger.db"))
    assert list(tmp_path.iterdir()) == []


def test_a_database_is_only_taken_empty(sqlite: Store, tmp_path: Path, server: sa.URL) -> None:
    for url in (sqlite_url(tmp_path / "ledger.db"), server):
        with pytest.raises(Conflict, match="not empty"):
            Store.create(url)


def test_tables_of_another_version_are_not_worked_with(books: Store) -> None:
    before, after = books.migrate("base")
    assert (before, after) == (migrations.HEAD, None)
    with pytest.raises(InvalidConfiguration, match=r"version none.*ledger migrate"):
        Store.open(books._engine.url)
    with pytest.raises(InvalidConfiguration, match="no such version"):
        books.migrate("9999")


@pytest.mark.parametrize(
    "text",
    [
        "mysql://localhost/ledger",
        "postgresql://localhost",
        "nonsense",
        "",
        "postgresql://me:secret@localhost/ledger",
        "postgresql://localhost/ledger?password=secret",
        "sqlite:///ledger.db",
    ],
)
def test_a_wrong_database_url_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        database_url(text, Path())
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="try again"):
        Store.open(database_url(f"postgresql:///ledger?host={tmp_path}", Path()))


def test_a_deadlock_is_tried_again_until_both_have_done_their_work(server: sa.URL) -> None:
    """Two transactions that take two rows in opposite order: PostgreSQL ends one of them."""
    books = Store.open(server)
    with books.write() as connection:
        connection.execute(store.merchants.insert(), [{**MERCHANT, "id": i} for i in ("A", "B")])
    both_hold_one = threading.Barrier(2)
    attempts: list[str] = []

    def cross(first: str, second: str) -> None:
        def work(connection: sa.Connection) -> None:
            tried_before = attempts.count(first)
            attempts.append(first)
            for name in (first, second):
                row = store.merchants.c.id == name
                longer = store.merchants.c.name + first
                connection.execute(store.merchants.update().where(row).values(name=longer))
                if name == first and not tried_before:
                    both_hold_one.wait(timeout=20)

        books.transact(work)

    threads = [threading.Thread(target=cross, args=order) for order in ("AB", "BA")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(attempts) == 3
    with books.read() as connection:
        names = connection.scalars(sa.select(store.merchants.c.name)).all()
    assert [sorted(name.removeprefix("Shop")) for name in names] == [["A", "B"]] * 2
    books.close()


def test_contention_without_end_is_unavailable(books: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    tried = []

    def work(_connection: sa.Connection) -> None:
        tried.append(1)
        raise psycopg.errors.DeadlockDetected

    with pytest.raises(Contended):
        books.transact(work)
    assert len(tried) == 8


def test_a_connection_lost_in_a_transaction_is_unavailable_and_one_lost_at_commit_is_open(
    server: sa.URL, postgresql: Cluster
) -> None:
    books = Store.open(server)

    def cut(connection: sa.Connection) -> None:
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
        postgresql.execute(f"SELECT pg_terminate_backend({pid}, 5000)")

    def lose_it_before_a_statement() -> None:
        with books.write() as connection:
            cut(connection)
            connection.execute(store.merchants.insert().values(MERCHANT))

    def lose_it_before_the_commit() -> None:
        with books.write() as connection:
            connection.execute(store.merchants.insert().values(MERCHANT))
            cut(connection)

    with pytest.raises(Unavailable):
        lose_it_before_a_statement()
    with pytest.raises(OutcomeUnknown, match="send the same batch again"):
        lose_it_before_the_commit()
    assert merchants(books) == 0
    with books.write() as connection:
        connection.execute(store.merchants.insert().values(MERCHANT))
    assert merchants(books) == 1
    books.close()


def test_rows_go_in_whole_or_not_at_all(books: Store) -> None:
    rows = [{**MERCHANT, "id": f"M{i}", "name": "店\t\\N\n"} for i in range(3)]
    with books.write() as connection:
        bulk.insert_rows(connection, store.merchants, rows)
        bulk.insert_rows(connection, store.merchants, [])
    with pytest.raises((sa.exc.IntegrityError, psycopg.IntegrityError)), books.write() as connection:
        bulk.insert_rows(connection, store.merchants, [{**MERCHANT, "id": "M9"}, rows[0]])
    with books.read() as connection:
        assert connection.scalars(sa.select(store.merchants.c.name)).all() == ["店\t\\N\n"] * 3
