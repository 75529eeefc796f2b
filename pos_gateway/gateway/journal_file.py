"""The journal's SQLite file: its schema, its opening, its rows. Who may write when is `journal`'s matter."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final
from uuid import UUID

from sqlite_utils import Database, Migrations

from pos_gateway.errors import Conflict, InvalidMessage, NotFound, Unavailable
from pos_gateway.records import Kind, Record

_MIGRATIONS = Migrations("journal")

_RECORDS: Final = "SELECT seq, id, kind, body, proof, previous_hash, hash, signature FROM journal"
_BUSY_TIMEOUT_S: Final = 5.0
_PAGE_BYTES: Final = 8192


@_MIGRATIONS()
def m0001_append_only_journal(db: Database) -> None:
    db.execute(
        """
        CREATE TABLE journal (
            seq           INTEGER PRIMARY KEY,
            id            BLOB NOT NULL UNIQUE,
            kind          TEXT NOT NULL,
            body          TEXT NOT NULL,
            proof         BLOB NOT NULL,
            previous_hash BLOB NOT NULL,
            hash          BLOB NOT NULL,
            signature     BLOB NOT NULL,
            about         BLOB
        ) STRICT
        """
    )
    db.execute("CREATE INDEX journal_about ON journal (about) WHERE about IS NOT NULL")
    db.execute("CREATE TABLE owner (gateway_id TEXT NOT NULL, public_key BLOB NOT NULL) STRICT")
    for table in ("journal", "owner"):
        for change in ("UPDATE", "DELETE"):
            db.execute(
                f"""
                CREATE TRIGGER {table}_refuses_{change.lower()} BEFORE {change} ON {table}
                BEGIN SELECT RAISE(ABORT, 'the {table} is append-only'); END
                """
            )


class JournalFile:
    """An open journal file. One thread at a time."""

    def __init__(self, db: Database) -> None:
        self._db = db

    @classmethod
    def open_for_writing(cls, path: Path, *, gateway_id: str, public_key: bytes) -> JournalFile:
        """Open or create; every commit through it is on the disk when it returns.

        Raises:
            Conflict: the journal belongs to another gateway.
            sqlite3.Error, OSError: the disk or the file is broken.
        """
        path.touch(mode=0o600, exist_ok=True)
        db = Database(sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False))
        try:
            # Of a new journal: a record with its proof takes a fifth of a page, not more than half of one.
            db.conn.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            if db.conn.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                # SQLite does not raise when the disk refuses: it stays in rollback mode, where a power cut
                # after a commit may bring the rollback journal back.
                raise sqlite3.OperationalError("the write-ahead log cannot be turned on")
            db.conn.execute("PRAGMA synchronous = FULL")
            _MIGRATIONS.apply(db)
            file = cls(db)
            file._claim(gateway_id, public_key)
        except BaseException:
            db.close()
            raise
        fsync_folder(path.parent)
        return file

    @classmethod
    def open_for_reading(cls, path: Path) -> JournalFile:
        """Open beside a running gateway without being able to change anything.

        Raises:
            NotFound: there is no journal.
            Unavailable: the file is no journal, or cannot be read.
        """
        if not path.exists():
            raise NotFound(f"there is no journal at {path}", advice="has this gateway taken a payment yet?")
        uri = f"{path.absolute().as_uri()}?mode=ro"
        connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)
        try:
            connection.execute("SELECT count(*) FROM owner").fetchone()
        except sqlite3.Error as error:
            connection.close()
            raise Unavailable(f"the journal {path} cannot be read: {error}") from None
        return cls(Database(connection, recursive_triggers=False, execute_plugins=False))

    def owner(self) -> tuple[str, bytes]:
        """The id and raw Ed25519 public key of the gateway that writes this journal."""
        gateway_id, public_key = self._db.conn.execute("SELECT gateway_id, public_key FROM owner").fetchone()
        return gateway_id, public_key

    def write(self, records: Sequence[Record], abouts: Sequence[bytes | None]) -> None:
        """Commit the records in one transaction. `abouts`: the raw id of the record each speaks of.

        Raises:
            sqlite3.IntegrityError: an id is there already; nothing was written.
            sqlite3.Error: anything else; what the disk holds now is unknown.
        """
        rows = [
            (
                record.sequence,
                record.id.bytes,
                record.kind.value,
                record.body,
                record.proof,
                record.previous_hash,
                record.hash,
                record.signature,
                about,
            )
            for record, about in zip(records, abouts, strict=True)
        ]
        with self._db.atomic():
            self._db.conn.executemany("INSERT INTO journal VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def make_durable(self) -> None:
        """Rewrite what the write-ahead log holds into the main file and sync that.

        After a failed fsync the kernel may have dropped the log's pages from its list of work while
        still showing them to readers; only new writes followed by a good fsync make them true.

        Raises:
            sqlite3.Error: the disk still refuses, or a reader holds the log.
        """
        busy, _, _ = self._db.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise sqlite3.OperationalError("another program holds the journal's write-ahead log")

    def find(self, record_id: UUID) -> Record | None:
        row = self._db.conn.execute(_RECORDS + " WHERE id = ?", (record_id.bytes,)).fetchone()
        return _record(row) if row else None

    def at(self, sequence: int) -> Record:
        row = self._db.conn.execute(_RECORDS + " WHERE seq = ?", (sequence,)).fetchone()
        if row is None:
            raise NotFound(f"the journal has no record {sequence}")
        return _record(row)

    def last(self) -> Record | None:
        row = self._db.conn.execute(_RECORDS + " ORDER BY seq DESC LIMIT 1").fetchone()
        return _record(row) if row else None

    def after(self, sequence: int, limit: int) -> list[Record]:
        rows = self._db.conn.execute(_RECORDS + " WHERE seq > ? ORDER BY seq LIMIT ?", (sequence, limit))
        return [_record(row) for row in rows]

    def about(self, record_id: UUID) -> list[Record]:
        """The record of this id, if any, and every record that speaks of it, oldest first."""
        rows = self._db.conn.execute(
            _RECORDS + " WHERE id = ?1 OR about = ?1 ORDER BY seq", (record_id.bytes,)
        )
        return [_record(row) for row in rows]

    def bodies(self) -> Iterator[tuple[int, bytes, str, bytes | None, str]]:
        """Sequence, id, kind, about and body of every record, in order."""
        yield from self._db.conn.execute("SELECT seq, id, kind, about, body FROM journal ORDER BY seq")

    def copy_to(self, path: Path) -> None:
        """Write all that is committed at this moment into a new file, as one database without a log.

        Raises:
            sqlite3.Error, OSError: it cannot be read or written.
        """
        copy = sqlite3.connect(path)
        try:
            self._db.conn.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
        finally:
            copy.close()

    def close(self) -> None:
        """Never raises: what could not be written was never promised."""
        with contextlib.suppress(sqlite3.Error):
            self._db.close()

    def _claim(self, gateway_id: str, public_key: bytes) -> None:
        row = self._db.conn.execute("SELECT gateway_id, public_key FROM owner").fetchone()
        if row is None:
            with self._db.atomic():
                self._db.conn.execute("INSERT INTO owner VALUES (?, ?)", (gateway_id, public_key))
        elif row != (gateway_id, public_key):
            raise Conflict(
                f"this journal belongs to gateway {row[0]} or to another key of it",
                advice="every gateway keeps its own home directory",
            )


def fsync_file(path: Path) -> None:
    """Make a file's content durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _record(row: tuple[int, bytes, str, str, bytes, bytes, bytes, bytes]) -> Record:
    sequence, record_id, kind, body, proof, previous_hash, digest, signature = row
    try:
        return Record(
            sequence, UUID(bytes=record_id), Kind(kind), body, proof, previous_hash, digest, signature
        )
    except ValueError:
        raise InvalidMessage("kind or id cannot be read", where=f"journal record {sequence}") from None
