"""Which database a ledger keeps its books in, and how each kind is connected to.

SQLite in the ledger's home unless a PostgreSQL URL says otherwise. A URL never holds the password: it
would stand in `ledger.json` and in the list of processes. libpq finds it by itself in `PGPASSWORD`,
`PGPASSFILE` or `~/.pgpass`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from pos_gateway.errors import InvalidConfiguration

BUSY_TIMEOUT_S: Final = 30

_CONNECT_TIMEOUT_S: Final = 10
_CONNECTIONS: Final = 8
_SQLITE_PRAGMAS: Final = (
    "journal_mode=WAL",
    "synchronous=FULL",
    "foreign_keys=ON",
    # A batch touches pages all over the indexes: the busy ones stay in memory, and one checkpoint writes
    # them once for several batches.
    "cache_size=-65536",
    "wal_autocheckpoint=8000",
    "temp_store=MEMORY",
)
# Whatever the cluster's own defaults are: an acknowledged commit is on its disk, nobody waits for a row
# for ever, and a replica that froze in a transaction does not hold accounts for ever.
_POSTGRES_OPTIONS: Final = (
    "-c synchronous_commit=on "
    "-c default_transaction_isolation=read\\ committed "
    f"-c lock_timeout={BUSY_TIMEOUT_S}s "
    "-c idle_in_transaction_session_timeout=600s"
)


def database_url(text: str | None, home: Path) -> sa.URL:
    """The database of the ledger in `home`: the URL it was given, or the file in its home.

    Raises:
        InvalidConfiguration: no PostgreSQL URL, or one with a password in it.
    """
    if text is None:
        return sqlite_url(home / "ledger.db")
    try:
        url = sa.make_url(text)
    except sa.exc.ArgumentError:
        url = None
    # The URL itself is not repeated: it may hold a password.
    if url is None or url.drivername not in ("postgresql", "postgresql+psycopg") or not url.database:
        raise InvalidConfiguration(
            "not of the form postgresql://user@host/database", where="database", advice="or leave it out"
        )
    if url.password or "password" in url.query:
        raise InvalidConfiguration(
            "a password does not belong into the URL",
            where="database",
            advice="put it into ~/.pgpass or the environment variable PGPASSWORD",
        )
    return url.set(drivername="postgresql+psycopg")


def sqlite_url(path: Path) -> sa.URL:
    return sa.URL.create("sqlite", database=str(path))


def make_engine(url: sa.URL) -> sa.Engine:
    """An engine whose commits are durable when they return."""
    return _sqlite(url) if url.get_backend_name() == "sqlite" else _postgresql(url)


def _sqlite(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})

    @sa.event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: object) -> None:
        # The driver's own implicit BEGIN is deferred and comes late: a transaction that reads before it
        # writes could then fail on the upgrade. We begin ourselves.
        connection.isolation_level = None
        for pragma in _SQLITE_PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        reading = connection.get_execution_options().get("reading", False)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


def _postgresql(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(
        url,
        connect_args={
            "options": _POSTGRES_OPTIONS,
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "application_name": "pos-gateway ledger",
        },
        pool_size=_CONNECTIONS,
        pool_timeout=BUSY_TIMEOUT_S,
        pool_pre_ping=True,
    )

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A writer locks its rows first and then reads what is committed by then; a reader sees one state.
        if connection.get_execution_options().get("reading", False):
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")

    return engine
