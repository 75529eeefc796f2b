"""What the migrations make is what the program works with, on both databases, and it goes back again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from pos_gateway.ledger import migrations, store
from pos_gateway.ledger.database import database_url, make_engine, sqlite_url

VERSIONS = [
    step.revision for step in ScriptDirectory(str(Path(migrations.__file__).parent)).walk_revisions()
][::-1]


@pytest.fixture
def empty(dialect: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """Engines of two empty databases."""
    if dialect == "sqlite":
        urls = [sqlite_url(tmp_path / name) for name in ("one.db", "other.db")]
    else:
        cluster = request.getfixturevalue("postgresql")
        made = [cluster.create(), cluster.create()]
        urls = [database_url(url, Path()) for url in made]
    engines = [make_engine(url) for url in urls]
    yield engines[0], engines[1]
    for engine in engines:
        engine.dispose()
    if dialect == "postgresql":
        for url in made:
            cluster.drop(url)


def described(connection: sa.Connection) -> dict[str, Any]:
    """Every table in full: columns, keys, indexes, checks."""
    inspector = sa.inspect(connection)

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in ("comment", "dialect_options")}
        if isinstance(value, list):
            return sorted((plain(v) for v in value), key=str)
        return value if isinstance(value, (bool, int, type(None))) else str(value)

    return {
        table: {
            "columns": [plain(dict(column)) for column in inspector.get_columns(table)],
            "primary key": plain(dict(inspector.get_pk_constraint(table))),
            "foreign keys": plain([dict(key) for key in inspector.get_foreign_keys(table)]),
            "unique": plain([dict(key) for key in inspector.get_unique_constraints(table)]),
            "indexes": plain([dict(index) for index in inspector.get_indexes(table)]),
            "checks": plain([dict(check) for check in inspector.get_check_constraints(table)]),
        }
        for table in inspector.get_table_names()
        if table != "alembic_version"
    }


def test_this_program_works_with_the_last_version() -> None:
    assert VERSIONS[-1] == migrations.HEAD


def test_the_migrated_tables_are_the_metadatas(empty: tuple[sa.Engine, sa.Engine]) -> None:
    migrated, created = empty
    with migrated.begin() as connection:
        migrations.migrate(connection)
        assert compare_metadata(MigrationContext.configure(connection), store.metadata) == []
        by_steps = described(connection)
    with created.begin() as connection:
        store.metadata.create_all(connection)
        at_once = described(connection)
    assert set(by_steps) == set(store.metadata.tables)
    assert by_steps == at_once


def test_every_step_goes_down_to_where_it_came_from(empty: tuple[sa.Engine, sa.Engine]) -> None:
    engine, _ = empty
    states = []
    for version in VERSIONS:
        with engine.begin() as connection:
            states.append(described(connection))
            migrations.migrate(connection, version)
            assert migrations.current(connection) == version
    for below, state in zip(["base", *VERSIONS[:-1]][::-1], states[::-1], strict=True):
        with engine.begin() as connection:
            migrations.migrate(connection, below)
            assert described(connection) == state
    with engine.begin() as connection:
        assert migrations.current(connection) is None
        if connection.dialect.name == "postgresql":
            left = "SELECT count(*) FROM pg_proc WHERE proname = 'refuse_change'"
            assert connection.exec_driver_sql(left).scalar() == 0
    with engine.begin() as connection:
        migrations.migrate(connection)
        assert migrations.current(connection) == migrations.HEAD


def test_a_step_that_fails_leaves_nothing(empty: tuple[sa.Engine, sa.Engine]) -> None:
    engine, _ = empty

    def fail_after() -> None:
        with engine.begin() as connection:
            migrations.migrate(connection)
            raise KeyError

    with pytest.raises(KeyError):
        fail_after()
    with engine.begin() as connection:
        assert sa.inspect(connection).get_table_names() == []


# Small, the same everywhere, or made at random with room for the whole world: why a key of a table that
# is not split by account cannot clash between two shards.
EVERYWHERE = {
    "scorecards",
    "policies",
    "epochs",
    "merchants",
    "gateways",
    "gateway_actions",
    "certificates",
    "snapshots",
    "enrolment_codes",
}
GLOBALLY_UNIQUE = {
    "accounts": {"id"},
    "tokens": {"id", "token_key"},  # 80 random bits; an HMAC of a token number that stands once
    "publications": {"token_id"},
    "online_answers": {"token_id"},
    "claims": {"token_id"},
    "presentments": {"gateway_id"},  # with the record id: by gateway, before any account is known
    "reviews": {"gateway_id"},  # with the record id, as presentments
    "renunciations": {"token_id"},
    "write_offs": {"token_id"},
    "conflicts": {"id"},
    "alarms": {"id"},
}


def test_the_tables_can_be_sharded_by_account() -> None:
    for table in store.metadata.sorted_tables:
        if table.name in EVERYWHERE:
            continue
        assert table.name == "accounts" or "account_id" in table.c, table
        keys: list[Any] = [table.primary_key]
        keys += [c for c in table.constraints if isinstance(c, sa.UniqueConstraint)]
        keys += [i for i in table.indexes if i.unique]
        for key in keys:
            columns = {column.name for column in key.columns}
            assert columns & ({"account_id"} | GLOBALLY_UNIQUE.get(table.name, set())), (table.name, columns)
        for reference in table.foreign_key_constraints:
            there = reference.referred_table
            if there.name in EVERYWHERE or there.name == "accounts":
                continue
            # To a row of the same account: both lie on one shard.
            assert "account_id" in table.c, (table.name, there.name)
            assert "account_id" in there.c, (table.name, there.name)
