"""Statements about many rows at once. PostgreSQL takes arrays and COPY; SQLite takes a temporary table that
is joined and prepared statements that are executed row by row. Naming a thousand parameters one by one,
or passing every row through the general machinery, would cost more than the work itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

_FEW: Final = 8
"""So many values are named in the statement itself."""

_BINARY_TYPES: Final[tuple[tuple[type[Any], str], ...]] = (
    (sa.BigInteger, "int8"),
    (sa.Integer, "int4"),
    (sa.LargeBinary, "bytea"),
    (sa.Boolean, "bool"),
    (sa.Uuid, "uuid"),
    (sa.Date, "date"),
    (sa.String, "text"),
)


def among(
    connection: sa.Connection, column: sa.Column[Any], values: Collection[Any]
) -> sa.ColumnElement[bool]:
    """Is the column's value one of these? To be executed before the same is asked of other values."""
    if _takes_arrays(connection):
        return column == sa.any_(_array(column, list(values)))
    if len(values) <= _FEW:
        return column.in_(values)
    name = f"among_{column.table.name}_{column.name}"
    return column.in_(sa.select(beside(connection, name, (column,), [(value,) for value in values])))


def among_both(
    connection: sa.Connection, columns: tuple[sa.Column[Any], sa.Column[Any]], values: Collection[Any]
) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    """`among` for two columns of one kind."""
    if _takes_arrays(connection) or len(values) <= _FEW:
        return among(connection, columns[0], values), among(connection, columns[1], values)
    name = f"among_{columns[0].table.name}_{columns[1].table.name}"
    rows = sa.select(beside(connection, name, (columns[0],), [(value,) for value in values]))
    return columns[0].in_(rows), columns[1].in_(rows)


def among_pairs(
    connection: sa.Connection,
    columns: tuple[sa.Column[Any], sa.Column[Any]],
    pairs: Collection[tuple[Any, Any]],
) -> sa.ColumnElement[bool]:
    """Are the two columns' values together one of these pairs? See `among`."""
    name = f"among_{columns[0].table.name}_{columns[0].name}_{columns[1].name}"
    rows = beside(connection, name, columns, list(pairs))
    return sa.tuple_(*columns).in_(sa.select(*rows.c))


def beside(
    connection: sa.Connection,
    name: str,
    columns: Sequence[sa.Column[Any]],
    rows: Sequence[tuple[Any, ...]],
) -> sa.FromClause:
    """Rows of ours to be joined with tables: columns `c0`, `c1`, … of the types of `columns`. On SQLite it
    is a temporary table of that name, good until the same name is filled again."""
    names = [f"c{number}" for number in range(len(columns))]
    if _takes_arrays(connection):
        values = zip(*rows, strict=True) if rows else [()] * len(columns)
        arrays = (
            sa.func.unnest(_array(column, list(those))).label(label)
            for label, column, those in zip(names, columns, values, strict=True)
        )
        return sa.select(*arrays).subquery(name)
    connection.exec_driver_sql(f"CREATE TEMPORARY TABLE IF NOT EXISTS {name} ({', '.join(names)})")
    connection.exec_driver_sql(f"DELETE FROM temp.{name}")  # noqa: S608 - a name of ours
    if rows:
        places = ", ".join("?" * len(names))
        has_ids = any(isinstance(column.type, sa.Uuid) for column in columns)
        stored = [_stored_on_sqlite(row) for row in rows] if has_ids else list(rows)
        connection.exec_driver_sql(f"INSERT INTO temp.{name} VALUES ({places})", stored)  # noqa: S608
    typed = (sa.column(label, column.type) for label, column in zip(names, columns, strict=True))
    return sa.table(name, *typed)


def insert_rows(connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows that all have the same columns."""
    if not rows:
        return
    plain = [tuple(row.values()) for row in rows]
    if not _takes_arrays(connection):
        plain = [_stored_on_sqlite(row) for row in plain]
    insert_tuples(connection, table, tuple(rows[0]), plain)


def insert_tuples(
    connection: sa.Connection, table: sa.Table, names: Sequence[str], rows: Sequence[tuple[Any, ...]]
) -> None:
    """Insert rows as the driver takes them, ids as `stored_id` makes them."""
    if not rows:
        return
    listed = ", ".join(names)
    if not _takes_arrays(connection):
        places = ", ".join("?" * len(names))
        connection.exec_driver_sql(
            f"INSERT INTO {table.name} ({listed}) VALUES ({places})",  # noqa: S608 - names of ours
            list(rows),
        )
        return
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor, cursor.copy(f"COPY {table.name} ({listed}) FROM STDIN BINARY") as copy:
        copy.set_types([_binary_type(table.c[name]) for name in names])
        for row in rows:
            copy.write_row(row)


def stored_ids(connection: sa.Connection) -> Callable[[UUID], Any]:
    """Makes of an id what `insert_tuples` and the driver want."""
    return (lambda value: value) if _takes_arrays(connection) else attrgetter("hex")


def update_each(
    connection: sa.Connection, table: sa.Table, name: str, values: Mapping[str, int], *, add: bool = False
) -> None:
    """Set the column `name`, or add to it, in the row of each `id`."""
    if add:
        _update(connection, table, (name,), [(key, value) for key, value in values.items()], add=True)
    else:
        set_each(connection, table, (name,), {key: (value,) for key, value in values.items()})


def set_each(
    connection: sa.Connection, table: sa.Table, names: Sequence[str], values: Mapping[str, tuple[int, ...]]
) -> None:
    """Set the columns `names` in the row of each `id`."""
    _update(connection, table, names, [(key, *those) for key, those in values.items()], add=False)


def _update(
    connection: sa.Connection,
    table: sa.Table,
    names: Sequence[str],
    rows: Sequence[tuple[Any, ...]],
    *,
    add: bool,
) -> None:
    if not rows:
        return
    if _takes_arrays(connection):
        columns = [table.c[name] for name in names]
        new = beside(connection, "new", (table.c.id, *columns), rows)
        changes = {
            column.name: column + value if add else value
            for column, value in zip(columns, list(new.c)[1:], strict=True)
        }
        connection.execute(table.update().where(table.c.id == new.c[0]).values(changes))
        return
    changed = ", ".join(f"{name} = {name} + ?" if add else f"{name} = ?" for name in names)
    connection.exec_driver_sql(
        f"UPDATE {table.name} SET {changed} WHERE id = ?",  # noqa: S608 - names of ours
        [(*those, key) for key, *those in rows],
    )


def _takes_arrays(connection: sa.Connection) -> bool:
    return connection.dialect.name == "postgresql"


def _array(column: sa.Column[Any], values: list[Any]) -> sa.BindParameter[Any]:
    return sa.bindparam(None, values, type_=ARRAY(column.type), unique=True)


def _stored_on_sqlite(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([value.hex if isinstance(value, UUID) else value for value in row])


def _binary_type(column: sa.Column[Any]) -> str:
    return next(name for kind, name in _BINARY_TYPES if isinstance(column.type, kind))
