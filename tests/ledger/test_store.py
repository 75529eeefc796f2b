"""Transactions of the embedded database: durable, exclusive for writers, open for readers."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from pos_gateway.errors import InvalidConfiguration, Unavailable
from pos_gateway.ledger import store
from pos_gateway.ledger.store import Store

MERCHANT = {"id": "M", "name": "Shop", "category": "5411"}


@pytest.fixture
def database(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "ledger.db")


def merchants(database: Store) -> int:
    with database.read() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(store.merchants)) or 0


def test_commits_are_durable_and_foreign_keys_hold(database: Store) -> None:
    with database.read() as connection:
        settings = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert settings == ["wal", 2, 1]  # 2 is FULL: the log is synced at every commit
    with pytest.raises(sa.exc.IntegrityError), database.write() as connection:
        connection.execute(store.tokens.insert().values(id="t", account_id="nobody"))


def test_an_exception_undoes_everything(database: Store) -> None:
    def fail_half_way() -> None:
        with database.write() as connection:
            connection.execute(store.merchants.insert().values(MERCHANT))
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert merchants(database) == 0


def test_a_writer_holds_the_database_from_its_first_read_on(database: Store, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "ledger.db", timeout=0, isolation_level=None)
    with database.write() as connection:
        connection.execute(sa.select(store.merchants)).all()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")
    other.close()


def test_a_reader_does_not_wait_and_sees_one_state(database: Store) -> None:
    with database.read() as reading:
        count = sa.select(sa.func.count()).select_from(store.merchants)
        assert reading.scalar(count) == 0
        with database.write() as connection:
            connection.execute(store.merchants.insert().values(MERCHANT))
        assert reading.scalar(count) == 0
    assert merchants(database) == 1


def test_a_database_that_stays_busy_is_unavailable(
    tmp_path: Path, database: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_BUSY_TIMEOUT_S", 0.05)
    impatient = Store.open(tmp_path / "ledger.db")
    with database.write(), pytest.raises(Unavailable, match="try again"), impatient.write():
        pass
    with impatient.write():
        pass


def test_writers_in_threads_take_turns(database: Store) -> None:
    def add(name: str) -> None:
        with database.write() as connection:
            known = connection.scalar(sa.select(sa.func.count()).select_from(store.merchants))
            connection.execute(store.merchants.insert().values({**MERCHANT, "id": name, "name": str(known)}))

    threads = [threading.Thread(target=add, args=(f"M{i}",)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as connection:
        seen = sorted(int(n) for n in connection.scalars(sa.select(store.merchants.c.name)))
    assert seen == list(range(12))


def test_there_must_be_a_database(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match="no ledger database"):
        Store.open(tmp_path / "ledger.db")
    assert list(tmp_path.iterdir()) == []


def test_every_table_can_be_told_to_postgresql_too() -> None:
    for table in store.metadata.sorted_tables:
        # The dialects of SQLAlchemy are not annotated.
        dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
        assert table.name in str(CreateTable(table).compile(dialect=dialect))
