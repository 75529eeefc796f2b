"""Statements about many rows at once. PostgreSQL takes arrays and COPY: naming a thousand parameters one
by one would cost it, and its driver, more than the work itself. SQLite takes them as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY


def among(
    connection: sa.Connection, column: sa.Column[Any], values: Collection[Any]
) -> sa.ColumnElement[bool]:
    """Is the column's value one of these?"""
    if _takes_arrays(connection):
        return column == sa.any_(_array(column, list(values)))
    return column.in_(values)


def among_pairs(
    connection: sa.Connection,
    columns: tuple[sa.Column[Any], sa.Column[Any]],
    pairs: Collection[tuple[Any, Any]],
) -> sa.ColumnElement[bool]:
    """Are the two columns' values together one of these pairs?"""
    both = sa.tuple_(*columns)
    if not _takes_arrays(connection):
        return both.in_(pairs)
    ordered = list(pairs)
    arrays = (_array(column, [pair[i] for pair in ordered]) for i, column in enumerate(columns))
    return both.in_(sa.select(*(sa.func.unnest(array) for array in arrays)))


def insert_rows(connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows that all have the same columns."""
    if not rows:
        return
    if not _takes_arrays(connection):
        connection.execute(table.insert(), rows)
        return
    names = list(rows[0])
    driver: Any = connection.connection.driver_connection
    statement = f"COPY {table.name} ({', '.join(names)}) FROM STDIN"
    with driver.cursor() as cursor, cursor.copy(statement) as copy:
        for row in rows:
            copy.write_row([row[name] for name in names])


def update_each(
    connection: sa.Connection, table: sa.Table, name: str, values: Mapping[str, int], *, add: bool = False
) -> None:
    """Set the column `name`, or add to it, in the row of each `id`."""
    if not values:
        return
    row_id, column = table.c.id, table.c[name]
    if _takes_arrays(connection):
        ids = sa.func.unnest(_array(row_id, list(values))).label("id")
        changes = sa.func.unnest(_array(column, list(values.values()))).label("value")
        new = sa.select(ids, changes).subquery("new")
        value: sa.ColumnElement[Any] = new.c.value
        update = table.update().where(row_id == new.c.id).values({name: column + value if add else value})
        connection.execute(update)
        return
    value = sa.bindparam("change", type_=column.type)
    connection.execute(
        table.update()
        .where(row_id == sa.bindparam("row_id"))
        .values({name: column + value if add else value}),
        [{"row_id": key, "change": change} for key, change in values.items()],
    )


def _takes_arrays(connection: sa.Connection) -> bool:
    return connection.dialect.name == "postgresql"


def _array(column: sa.Column[Any], values: list[Any]) -> sa.BindParameter[Any]:
    return sa.bindparam(None, values, type_=ARRAY(column.type), unique=True)
