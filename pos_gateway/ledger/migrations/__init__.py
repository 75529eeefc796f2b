"""The ledger's tables through time: each file in `versions` goes one step up and the same step down.

A step is one transaction, on SQLite and on PostgreSQL. Migrations are frozen history: they say in their
own words what the tables were, and a test holds what they come to against `store.metadata`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import sqlalchemy as sa

from pos_gateway.errors import InvalidConfiguration

HEAD: Final = "0007"
"""The version this program works with."""

NAMES: Final = {
    "ix": "%(table_name)s_by_%(column_0_N_name)s",
    "uq": "%(table_name)s_%(column_0_N_name)s_key",
    "ck": "%(table_name)s_%(constraint_name)s_check",
    "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
    "pk": "%(table_name)s_pkey",
}
"""Every constraint has the same name on both databases, so that a later step can find it."""

_IMMUTABLE: Final = """
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION '% are immutable', TG_TABLE_NAME USING ERRCODE = 'integrity_constraint_violation';
END $$
"""


def current(connection: sa.Connection) -> str | None:
    """The version of the tables that are there; None if there are none."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    version: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return version


def migrate(connection: sa.Connection, to: str = "head") -> None:
    """Bring the tables up or down to a version, inside the caller's transaction. `base` removes them all;
    what a lower version has no place for is lost.

    Raises:
        InvalidConfiguration: no such version.
    """
    # Here and not above: loading it takes a fifth of a second that only a migration should cost.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    versions = [step.revision for step in ScriptDirectory.from_config(config).walk_revisions()][::-1]
    wanted = {"head": len(versions), "base": 0} | {name: place for place, name in enumerate(versions, 1)}
    if to not in wanted:
        raise InvalidConfiguration(
            "no such version", where="ledger migrate", advice=f"there are base, {', '.join(versions)}"
        )
    here = wanted.get(current(connection) or "base", 0)
    (command.upgrade if wanted[to] >= here else command.downgrade)(config, to)


def make_immutable(connection: sa.Connection, *tables: str) -> None:
    """The database itself refuses to change or remove rows of these tables."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(_IMMUTABLE.replace("%", "%%"))
        for table in tables:
            connection.exec_driver_sql(
                f"CREATE TRIGGER {table}_immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
                "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
            )
        return
    for table in tables:
        for verb in ("UPDATE", "DELETE"):
            connection.exec_driver_sql(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} are immutable'); END"
            )


def forget_immutable(connection: sa.Connection) -> None:
    """Remove what `make_immutable` leaves when the tables themselves are gone."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("DROP FUNCTION refuse_change()")
