"""The journal's SQLite file: its schema, its opening, its rows. Who may write when is `journal`'s matter."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple
from uuid import UUID

from sqlite_utils import Database, Migrations

from pos_gateway.errors import Conflict, InvalidMessage, NotFound, Unavailable
from pos_gateway.records import Kind, Record

_MIGRATIONS = Migrations("journal")

_RECORDS: Final = "SELECT seq, id, kind, body, proof, previous_hash, hash, signature FROM journal"
_ROWS: Final = "SELECT seq, id, kind, about, body, hash FROM journal"
_PRESENTED: Final = ", ".join(f"'{kind.value}'" for kind in Kind if kind.presented)
_WAITING: Final = " ".join(
    (
        _RECORDS,
        f"AS waiting WHERE seq > ? AND kind IN ({_PRESENTED})",
        "AND NOT EXISTS (SELECT 1 FROM journal WHERE about = waiting.id AND kind = 'acknowledgement')",
        "ORDER BY seq LIMIT ?",
    )
)
_TOLD: Final = " ".join(
    (
        "SELECT seq, id, kind, body, (SELECT body FROM journal WHERE about = subject.id",
        "AND kind = 'acknowledgement' ORDER BY seq DESC LIMIT 1) FROM journal AS subject WHERE seq > ?",
    )
)
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


@_MIGRATIONS()
def m0002_pruned_up_to_a_checkpoint(db: Database) -> None:
    """What a checkpoint covers may be deleted, and nothing else."""
    db.execute("CREATE INDEX journal_checkpoint ON journal (seq) WHERE kind = 'checkpoint'")
    db.execute(
        """
        CREATE TABLE claimed (
            seq            INTEGER PRIMARY KEY,
            id             BLOB NOT NULL UNIQUE,
            token_key      BLOB NOT NULL,
            counter_before INTEGER NOT NULL,
            counter_after  INTEGER NOT NULL
        ) STRICT
        """
    )
    for change in ("UPDATE", "DELETE"):
        db.execute(
            f"""
            CREATE TRIGGER claimed_refuses_{change.lower()} BEFORE {change} ON claimed
            BEGIN SELECT RAISE(ABORT, 'the claims are append-only'); END
            """
        )
    db.execute("DROP TRIGGER journal_refuses_delete")
    db.execute(
        """
        CREATE TRIGGER journal_refuses_delete BEFORE DELETE ON journal
        WHEN OLD.seq > coalesce(
            (SELECT json_extract(body, '$.sequence') FROM journal
             WHERE kind = 'checkpoint' ORDER BY seq DESC LIMIT 1), 0)
        BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END
        """
    )


class Row(NamedTuple):
    """A record as pruning looks at it."""

    sequence: int
    id: bytes
    kind: str
    about: bytes | None
    body: str
    hash: bytes


class Claim(NamedTuple):
    """Points (before, after] of a token's counter line, claimed by the authorization `id`."""

    sequence: int
    id: bytes
    token_key: bytes
    before: int
    after: int


class Told(NamedTuple):
    """A record, and the body of the ledger's last acknowledgement of it."""

    sequence: int
    id: UUID
    kind: Kind
    body: str
    acknowledgement: str | None


class JournalFile:
    """An open journal file. One thread at a time."""

    def __init__(self, db: Database) -> None:
        self._db = db

    @classmethod
    def open_for_writing(cls, path: Path, *, gateway_id: str, public_key: bytes) -> JournalFile:
        """Open or create; every commit through it is on the disk when it returns.

        Raises:
            Conflict: the journal belongs to another gateway, or is of a newer program's form.
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
            file = cls(db)
            if not set(file.form) <= set(cls.known_form()):
                raise Conflict(
                    "the journal is of a newer program's form",
                    advice="use that program, or `pos-gateway gateway revert` with this one",
                )
            _MIGRATIONS.apply(db)
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

    @staticmethod
    def known_form() -> tuple[str, ...]:
        """The steps that make this program's form of a journal."""
        return tuple(step.name for step in _MIGRATIONS._migrations)

    @property
    def form(self) -> tuple[str, ...]:
        """The steps that made this journal's."""
        return tuple(step.name for step in _MIGRATIONS.applied(self._db))

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

    def checkpoint(self) -> Record | None:
        """The newest checkpoint."""
        row = self._db.conn.execute(
            _RECORDS + " WHERE kind = 'checkpoint' ORDER BY seq DESC LIMIT 1"
        ).fetchone()
        return _record(row) if row else None

    def row(self, sequence: int) -> Row | None:
        row = self._db.conn.execute(_ROWS + " WHERE seq = ?", (sequence,)).fetchone()
        return Row(*row) if row else None

    def rows(self, after: int, limit: int) -> list[Row]:
        """At most `limit` rows with a sequence above `after`, in order."""
        found = self._db.conn.execute(_ROWS + " WHERE seq > ? ORDER BY seq LIMIT ?", (after, max(0, limit)))
        return [Row(*row) for row in found]

    def authorizations(self, after: int, until: int) -> Iterator[Row]:
        """Authorizations with `after` < sequence <= `until`, in order."""
        found = self._db.conn.execute(
            _ROWS + " WHERE seq > ? AND seq <= ? AND kind = 'authorization' ORDER BY seq", (after, until)
        )
        for row in found:
            yield Row(*row)

    def presented(self, first: int, last: int, limit: int) -> list[Record]:
        """At most `limit` records of presented kinds with `first` <= sequence <= `last`, in order."""
        rows = self._db.conn.execute(
            _RECORDS + f" WHERE seq >= ? AND seq <= ? AND kind IN ({_PRESENTED}) ORDER BY seq LIMIT ?",
            (first, last, limit),
        )
        return [_record(row) for row in rows]

    def waiting(self, after: int, limit: int) -> list[Record]:
        """At most `limit` records above a sequence that no acknowledgement speaks of, in order."""
        rows = self._db.conn.execute(_WAITING, (after, limit))
        return [_record(row) for row in rows]

    def first_presented_since(self, unix_ms: int) -> int | None:
        """The lowest sequence of a presented record that was tapped, or acknowledged, at or after a time."""
        (own,) = self._db.conn.execute(
            f"SELECT min(seq) FROM journal WHERE kind IN ({_PRESENTED}) "  # noqa: S608 - our own words
            "AND json_extract(body, '$.at_unix_ms') >= ?",
            (unix_ms,),
        ).fetchone()
        (acknowledged,) = self._db.conn.execute(
            "SELECT min(subject.seq) FROM journal JOIN journal AS subject ON subject.id = journal.about "
            "WHERE journal.kind = 'acknowledgement' AND json_extract(journal.body, '$.at_unix_ms') >= ?",
            (unix_ms,),
        ).fetchone()
        return min((found for found in (own, acknowledged) if found is not None), default=None)

    def last_acknowledgement(self, record_id: bytes) -> str | None:
        """The body of the newest acknowledgement of a record."""
        row = self._db.conn.execute(
            "SELECT body FROM journal WHERE about = ? AND kind = 'acknowledgement' ORDER BY seq DESC LIMIT 1",
            (record_id,),
        ).fetchone()
        return row[0] if row else None

    def told(self, after: int, until: int, kinds: Collection[Kind]) -> Iterator[Told]:
        """Records of these kinds with `after` < sequence <= `until`, in order, with the ledger's last word
        on each."""
        found = self._db.conn.execute(
            _TOLD + f" AND subject.seq <= ? AND subject.kind IN ({_words(kinds)}) ORDER BY subject.seq",
            (after, until),
        )
        for sequence, record_id, kind, body, verdict in found:
            yield Told(sequence, UUID(bytes=record_id), Kind(kind), body, verdict)

    def payments(
        self,
        before: int,
        limit: int,
        *,
        since_unix_ms: int,
        until_unix_ms: int,
        kinds: Collection[Kind],
        amount_minor: int | None,
        last4: str | None,
        sale_id_prefix: str,
    ) -> list[Told]:
        """At most `limit` authorizations or declines below a sequence that fit, the newest first."""
        found = self._db.conn.execute(
            _TOLD.replace("seq > ?", "seq < ?")
            + f" AND subject.kind IN ({_words(kinds)})"
            + " AND json_extract(subject.body, '$.at_unix_ms') BETWEEN ?2 AND ?3"
            + " AND (?4 IS NULL OR json_extract(subject.body, '$.amount_minor') = ?4)"
            + " AND (?5 IS NULL OR json_extract(subject.body, '$.token_last4') = ?5)"
            + " AND substr(json_extract(subject.body, '$.sale_id'), 1, length(?6)) = ?6"
            + " ORDER BY subject.seq DESC LIMIT ?7",
            (before, since_unix_ms, until_unix_ms, amount_minor, last4, sale_id_prefix, limit),
        )
        return [Told(row[0], UUID(bytes=row[1]), Kind(row[2]), row[3], row[4]) for row in found]

    def first_at_or_after(self, unix_ms: int) -> int:
        """A sequence that nothing of that time or later lies below, found by halving: times rise with
        sequences but for taps that overlap, which a day's margin covers."""
        (low, high) = self._db.conn.execute(
            "SELECT coalesce(min(seq), 1), coalesce(max(seq), 0) FROM journal"
        ).fetchone()
        while low < high:
            middle = (low + high) // 2
            sequence, body = self._db.conn.execute(
                "SELECT seq, body FROM journal WHERE seq >= ? ORDER BY seq LIMIT 1", (middle,)
            ).fetchone()
            if json.loads(body)["at_unix_ms"] < unix_ms - 86_400_000:
                low = sequence + 1
            else:
                high = middle
        return int(low)

    def shifts_since_the_day(self) -> list[Record]:
        """The last closing of a day and every shift record after it, in order."""
        (day,) = self._db.conn.execute(
            "SELECT coalesce(max(seq), 0) FROM journal"
            " WHERE kind = 'shift' AND json_extract(body, '$.event') = 'day'"
        ).fetchone()
        rows = self._db.conn.execute(_RECORDS + " WHERE seq >= ? AND kind = 'shift' ORDER BY seq", (day,))
        return [_record(row) for row in rows]

    def days(self, limit: int) -> list[Record]:
        """The last closings of days, the newest first."""
        rows = self._db.conn.execute(
            _RECORDS
            + " WHERE kind = 'shift' AND json_extract(body, '$.event') = 'day' ORDER BY seq DESC LIMIT ?",
            (limit,),
        )
        return [_record(row) for row in rows]

    def claims(self) -> Iterator[Claim]:
        """Of pruned authorizations, in the order of their sequences."""
        found = self._db.conn.execute(
            "SELECT seq, id, token_key, counter_before, counter_after FROM claimed ORDER BY seq"
        )
        for row in found:
            yield Claim(*row)

    def has_claim(self, record_id: UUID) -> bool:
        """Was an authorization of this id pruned?"""
        found = self._db.conn.execute("SELECT 1 FROM claimed WHERE id = ?", (record_id.bytes,))
        return found.fetchone() is not None

    def set_aside(self, claims: Sequence[Claim], sequences: Collection[int]) -> None:
        """In one transaction: keep these claims, delete these records.

        Raises:
            sqlite3.IntegrityError: no checkpoint covers them; nothing was changed.
            sqlite3.Error: anything else; what the disk holds now is unknown.
        """
        with self._db.atomic():
            self._db.conn.executemany("INSERT INTO claimed VALUES (?, ?, ?, ?, ?)", claims)
            self._db.conn.executemany("DELETE FROM journal WHERE seq = ?", [(s,) for s in sequences])

    def last_claim_sequence(self) -> int:
        (sequence,) = self._db.conn.execute("SELECT coalesce(max(seq), 0) FROM claimed").fetchone()
        return int(sequence)

    def sizes(self) -> tuple[int, int]:
        """Bytes of the file, and how many of them are free for new records."""
        pages, free, size = (
            self._db.conn.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return pages * size, free * size

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


def _words(kinds: Collection[Kind]) -> str:
    return ", ".join(f"'{kind.value}'" for kind in kinds)


def _record(row: tuple[int, bytes, str, str, bytes, bytes, bytes, bytes]) -> Record:
    sequence, record_id, kind, body, proof, previous_hash, digest, signature = row
    try:
        return Record(
            sequence, UUID(bytes=record_id), Kind(kind), body, proof, previous_hash, digest, signature
        )
    except ValueError:
        raise InvalidMessage("kind or id cannot be read", where=f"journal record {sequence}") from None
