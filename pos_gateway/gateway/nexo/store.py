"""What was asked and what was answered, for 48 hours: the same request again gets the same answer.

A small SQLite file beside the journal. A request is written down, and synced to the disk, before anything
is done for it; its end is written with the answer. In between, and wherever this file is behind, the
journal alone says what became of the money: an approval's answer is made from nothing but this file's row
and the journal's record, so it is the same whenever it is made.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self
from uuid import UUID

from sqlite_utils import Database, Migrations

from pos_gateway.errors import Unavailable
from pos_gateway.gateway.nexo.messages import Key
from pos_gateway.gateway.nexo.transitions import State

KEEP_MS: Final = 48 * 3600 * 1000
FIRST_PERIOD: Final = 1000

_MAX_ROWS: Final = 500_000
_PURGE_EVERY: Final = 256
_BUSY_TIMEOUT_S: Final = 5.0
_MIGRATIONS = Migrations("nexo")
_COLUMNS: Final = (
    "sale_id, poi_id, service_id, category, digest, payment_id, second_id, period, at_unix_ms,"
    " asked, state, answer"
)


@_MIGRATIONS()
def m0001_requests(db: Database) -> None:
    db.execute(
        """
        CREATE TABLE request (
            number     INTEGER PRIMARY KEY,
            sale_id    TEXT NOT NULL,
            poi_id     TEXT NOT NULL,
            service_id TEXT NOT NULL,
            category   TEXT NOT NULL,
            digest     BLOB NOT NULL,
            payment_id BLOB NOT NULL,
            second_id  BLOB NOT NULL,
            period     INTEGER NOT NULL,
            at_unix_ms INTEGER NOT NULL,
            asked      TEXT NOT NULL,
            state      TEXT NOT NULL,
            answer     BLOB,
            UNIQUE (sale_id, poi_id, service_id)
        ) STRICT
        """
    )
    db.execute("CREATE INDEX request_last ON request (poi_id, sale_id, number)")
    db.execute("CREATE INDEX request_open ON request (poi_id, number) WHERE answer IS NULL")
    db.execute("CREATE INDEX request_age ON request (at_unix_ms)")
    db.execute("CREATE TABLE nonce (nonce BLOB PRIMARY KEY, key TEXT NOT NULL) STRICT, WITHOUT ROWID")
    db.execute(
        """
        CREATE TABLE period (
            poi_id         TEXT NOT NULL,
            number         INTEGER NOT NULL,
            closed_unix_ms INTEGER,
            PRIMARY KEY (poi_id, number)
        ) STRICT
        """
    )
    db.execute(
        """
        CREATE TABLE total (
            poi_id       TEXT NOT NULL,
            period       INTEGER NOT NULL,
            sale_id      TEXT NOT NULL,
            operator_id  TEXT NOT NULL,
            shift        TEXT NOT NULL,
            type         TEXT NOT NULL,
            count        INTEGER NOT NULL,
            amount_minor INTEGER NOT NULL,
            PRIMARY KEY (poi_id, period, sale_id, operator_id, shift, type)
        ) STRICT
        """
    )


@dataclass(frozen=True, slots=True)
class Row:
    """One request. `payment_id` is the payment's or the correction's id; `second_id` that of the payment
    of a part, if it comes to that. `period`: the reconciliation it is counted in, given by the store.
    `asked`: the order as JSON."""

    key: Key
    category: str
    digest: bytes
    payment_id: UUID
    second_id: UUID
    at_unix_ms: int
    asked: dict[str, Any] = field(repr=False)
    period: int = 0
    state: State = State.OPEN
    answer: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Counted:
    """What an ended request adds to the totals of its lane. `kind`: TransactionType of the protocol."""

    kind: str
    amount_minor: int
    operator_id: str = ""
    shift: str = ""


@dataclass(frozen=True, slots=True)
class Total:
    sale_id: str
    operator_id: str
    shift: str
    kind: str
    count: int
    amount_minor: int


class Store:
    """One writer, any thread; every commit is on the disk when it returns."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._lock = threading.Lock()
        self._begun = 0
        self._periods: dict[str, int] = {}
        """The open period of each lane, once it was looked up."""

    @classmethod
    def open(cls, path: Path) -> Store:
        """
        Raises:
            Unavailable: the disk or the file is broken.
        """
        try:
            path.touch(mode=0o600, exist_ok=True)
            db = Database(sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False))
            if db.conn.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                raise sqlite3.OperationalError("the write-ahead log cannot be turned on")
            db.conn.execute("PRAGMA synchronous = FULL")
            _MIGRATIONS.apply(db)
        except (sqlite3.Error, OSError) as error:
            raise Unavailable(f"the POS interface's memory {path} cannot be opened: {error}") from None
        return cls(db)

    def begin(self, row: Row) -> tuple[Row, bool]:
        """Write a new request down, durable when this returns, or find the one its key stands for already;
        True if it is new.

        Raises:
            Unavailable: the disk refused, or there are too many.
        """
        with self._changing() as connection:
            if self._begun % _PURGE_EVERY == 0:
                self._purge(connection, row.at_unix_ms)
            self._begun += 1
            row = replace(row, period=self._period(connection, row.key.poi_id))
            try:
                self._insert(connection, row)
            except sqlite3.IntegrityError:
                known = self._find(row.key, row.at_unix_ms)
                if known is not None:
                    return known, False
                connection.execute(  # older than 48 hours: its ServiceID is free again
                    "DELETE FROM request WHERE sale_id = ? AND poi_id = ? AND service_id = ?",
                    (row.key.sale_id, row.key.poi_id, row.key.service_id),
                )
                self._insert(connection, row)
        return row, True

    def end(self, key: Key, state: State, answer: bytes, counted: Counted | None = None) -> bytes:
        """Keep a request's end and add it to the totals, once; returns the answer that is kept.

        Raises:
            Unavailable: the disk refused.
        """
        with self._changing() as connection:
            if not self._end(connection, key, state, answer):
                known = self._find(key, 0)
                return known.answer if known is not None and known.answer is not None else answer
            if counted is not None:
                self._count(connection, key, counted)
        return answer

    def find(self, key: Key, now_unix_ms: int) -> Row | None:
        """The request of this key, if it is not older than 48 hours."""
        with self._reading():
            return self._find(key, now_unix_ms)

    def last(self, sale_id: str, poi_id: str, now_unix_ms: int) -> Row | None:
        """The newest payment or reversal of this POS on this lane."""
        with self._reading() as connection:
            found = connection.execute(
                f"SELECT {_COLUMNS} FROM request WHERE poi_id = ? AND sale_id = ?"  # noqa: S608
                " AND category IN ('Payment', 'Reversal') AND at_unix_ms >= ? ORDER BY number DESC LIMIT 1",
                (poi_id, sale_id, now_unix_ms - KEEP_MS),
            ).fetchone()
        return None if found is None else _row(found)

    def unanswered(self) -> list[Row]:
        """Requests without an end, oldest first: of a gateway that was stopped in their midst."""
        with self._reading() as connection:
            found = connection.execute(
                f"SELECT {_COLUMNS} FROM request WHERE answer IS NULL ORDER BY number"  # noqa: S608
            ).fetchall()
        return [_row(raw) for raw in found]

    def is_new_nonce(self, nonce: bytes, key_name: str) -> bool:
        """Remember a nonce for as long as its key is in use; False if it was there.

        Raises:
            Unavailable: the disk refused.
        """
        with self._changing() as connection:
            done = connection.execute(
                "INSERT OR IGNORE INTO nonce (nonce, key) VALUES (?, ?)", (nonce, key_name)
            )
            return done.rowcount == 1

    def forget_nonces_but_of(self, key_name: str) -> None:
        """A message under another key is refused anyway."""
        with self._changing() as connection:
            connection.execute("DELETE FROM nonce WHERE key <> ?", (key_name,))

    def period(self, poi_id: str) -> int:
        """The number of the open reconciliation period of a lane."""
        with self._reading() as connection:
            return self._period(connection, poi_id)

    def close_period(self, row: Row, make_answer: Callable[[int, list[Total]], bytes]) -> bytes | None:
        """End the open period and keep the answer that tells its number and totals, both or neither. None
        while another request of the lane has no end: it is counted where it was begun.

        Raises:
            Unavailable: the disk refused.
        """
        key = row.key
        with self._changing() as connection:
            others = connection.execute(
                "SELECT count(*) FROM request WHERE answer IS NULL AND poi_id = ?"
                " AND NOT (sale_id = ? AND service_id = ?)",
                (key.poi_id, key.sale_id, key.service_id),
            ).fetchone()[0]
            if others:
                return None
            number = self._period(connection, key.poi_id)
            connection.execute("INSERT INTO period VALUES (?, ?, ?)", (key.poi_id, number, row.at_unix_ms))
            answer = make_answer(number, self._totals(connection, key.poi_id, number))
            self._end(connection, key, State.APPROVED, answer)
            self._periods.pop(key.poi_id, None)
            return answer

    def totals(self, poi_id: str, number: int) -> list[Total] | None:
        """Of one period; None if there was none of this number."""
        with self._reading() as connection:
            if not FIRST_PERIOD <= number <= self._period(connection, poi_id):
                return None
            return self._totals(connection, poi_id, number)

    def is_empty(self) -> bool:
        with self._reading() as connection:
            return connection.execute("SELECT 1 FROM request LIMIT 1").fetchone() is None

    def close(self) -> None:
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _insert(self, connection: sqlite3.Connection, row: Row) -> None:
        connection.execute(
            f"INSERT INTO request ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
            (
                row.key.sale_id,
                row.key.poi_id,
                row.key.service_id,
                row.category,
                row.digest,
                row.payment_id.bytes,
                row.second_id.bytes,
                row.period,
                row.at_unix_ms,
                json.dumps(row.asked, separators=(",", ":")),
                row.state.value,
                row.answer,
            ),
        )

    def _find(self, key: Key, now_unix_ms: int) -> Row | None:
        found = self._db.conn.execute(
            f"SELECT {_COLUMNS} FROM request"  # noqa: S608
            " WHERE sale_id = ? AND poi_id = ? AND service_id = ? AND at_unix_ms >= ?",
            (key.sale_id, key.poi_id, key.service_id, now_unix_ms - KEEP_MS),
        ).fetchone()
        return None if found is None else _row(found)

    def _end(self, connection: sqlite3.Connection, key: Key, state: State, answer: bytes) -> bool:
        changed = connection.execute(
            "UPDATE request SET state = ?, answer = ?"
            " WHERE sale_id = ? AND poi_id = ? AND service_id = ? AND answer IS NULL",
            (state.value, answer, key.sale_id, key.poi_id, key.service_id),
        )
        return changed.rowcount == 1

    def _purge(self, connection: sqlite3.Connection, now_unix_ms: int) -> None:
        connection.execute(
            "DELETE FROM request WHERE at_unix_ms < ? AND answer IS NOT NULL", (now_unix_ms - KEEP_MS,)
        )
        count = connection.execute("SELECT count(*) FROM request").fetchone()[0]
        if count >= _MAX_ROWS:
            raise Unavailable("too many requests within 48 hours")

    def _count(self, connection: sqlite3.Connection, key: Key, counted: Counted) -> None:
        connection.execute(
            "INSERT INTO total VALUES (?, ?, ?, ?, ?, ?, 1, ?) ON CONFLICT DO UPDATE"
            " SET count = count + 1, amount_minor = amount_minor + excluded.amount_minor",
            (
                key.poi_id,
                self._period(connection, key.poi_id),
                key.sale_id,
                counted.operator_id,
                counted.shift,
                counted.kind,
                counted.amount_minor,
            ),
        )

    def _period(self, connection: sqlite3.Connection, poi_id: str) -> int:
        number = self._periods.get(poi_id)
        if number is None:
            last = connection.execute("SELECT max(number) FROM period WHERE poi_id = ?", (poi_id,))
            number = self._periods[poi_id] = (last.fetchone()[0] or FIRST_PERIOD - 1) + 1
        return number

    def _totals(self, connection: sqlite3.Connection, poi_id: str, number: int) -> list[Total]:
        found: Sequence[tuple[str, str, str, str, int, int]] = connection.execute(
            "SELECT sale_id, operator_id, shift, type, count, amount_minor FROM total"
            " WHERE poi_id = ? AND period = ? ORDER BY sale_id, operator_id, shift, type",
            (poi_id, number),
        ).fetchall()
        return [Total(*raw) for raw in found]

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                with self._db.atomic():
                    yield self._db.conn
            except sqlite3.Error as error:
                raise Unavailable(f"the POS interface's memory cannot be written: {error}") from None

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._db.conn
            except sqlite3.Error as error:
                raise Unavailable(f"the POS interface's memory cannot be read: {error}") from None


def _row(raw: tuple[Any, ...]) -> Row:
    return Row(
        key=Key(*raw[:3]),
        category=raw[3],
        digest=raw[4],
        payment_id=UUID(bytes=raw[5]),
        second_id=UUID(bytes=raw[6]),
        period=raw[7],
        at_unix_ms=raw[8],
        asked=json.loads(raw[9]),
        state=State(raw[10]),
        answer=raw[11],
    )
