"""The ledger's tables, and transactions on them.

Shaped to be sharded by account: every unique key either holds the account id or is random enough to be
globally unique. Dialect-neutral but for the connection set-up of SQLite, which is the embedded default.
Money is minor units, times say their unit in their name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import BigInteger, Boolean, CheckConstraint, Column, ForeignKey, Integer, LargeBinary, String
from sqlalchemy.exc import DBAPIError, OperationalError

from pos_gateway.errors import InvalidConfiguration, OutcomeUnknown, Unavailable

_BUSY_TIMEOUT_S: Final = 30

metadata: Final = sa.MetaData()

policies = sa.Table(
    "policies",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("body", String, nullable=False),
    Column("since_unix_ms", BigInteger, nullable=False),
)

accounts = sa.Table(
    "accounts",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("holder", String(120), nullable=False),
    Column("currency", String(3), nullable=False),
    Column("limit_minor", BigInteger, CheckConstraint("limit_minor >= 0"), nullable=False),
    # The sum of the account's receivable entries, kept beside them: the one row that is locked to post.
    Column("outstanding_minor", BigInteger, nullable=False),
    Column("opened_unix_ms", BigInteger, nullable=False),
)

tokens = sa.Table(
    "tokens",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False, index=True),
    Column("token_key", LargeBinary(16), nullable=False, unique=True),
    Column("last4", String(4), nullable=False),
    Column("psn", Integer, nullable=False),
    Column("expires", sa.Date, nullable=False),
    Column("status", String(8), nullable=False),
    Column("per_tap_cap_minor", BigInteger, nullable=False),
    Column("assurance", Integer, nullable=False),
    # H: the highest counter in any authenticated TC; the personalised start counter before the first.
    Column("highest_counter", BigInteger, nullable=False),
    # The last limit record issued for it. Its sequence, and the version it changed in, move with its
    # content alone: a delta lists what changed, and nothing else. Version 0: none was issued yet.
    Column("record_version", BigInteger, nullable=False, default=0, index=True),
    Column("record_sequence", BigInteger, nullable=False, default=0),
    Column("record_ceiling", BigInteger, nullable=False, default=0),
    Column("record_per_tap_cap_minor", BigInteger, nullable=False, default=0),
    Column("record_status", String(8), nullable=False, default="closed"),
    Column("record_assurance", Integer, nullable=False, default=0),
    Column("issued_unix_ms", BigInteger, nullable=False),
)

merchants = sa.Table(
    "merchants",
    metadata,
    Column("id", String(15), primary_key=True),
    Column("name", String(120), nullable=False),
    Column("category", String(4), nullable=False),
)

enrolment_codes = sa.Table(
    "enrolment_codes",
    metadata,
    Column("secret_hash", LargeBinary(32), primary_key=True),
    Column("merchant_id", ForeignKey("merchants.id"), nullable=False),
    Column("expires_unix_ms", BigInteger, nullable=False),
    Column("used_unix_ms", BigInteger),
)

gateways = sa.Table(
    "gateways",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("terminal_id", String(8), nullable=False, unique=True),
    Column("merchant_id", ForeignKey("merchants.id"), nullable=False),
    Column("public_key", LargeBinary(32), nullable=False, unique=True),
    Column("enrolled_unix_ms", BigInteger, nullable=False),
    Column("last_presented_unix_ms", BigInteger),
)

snapshots = sa.Table(
    "snapshots",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    # The header's terms, its nonce among them: from them and the tokens' records the same file is made again.
    Column("terms", String, nullable=False),
    # Released as soon as it is signed, without anybody asking for it.
    Column("automatic", Boolean, nullable=False),
    # Both set when it is released; a version that never was is skipped.
    Column("size", BigInteger),
    Column("sha256", LargeBinary(32)),
    Column("record_count", BigInteger, nullable=False),
    Column("valid_from_unix_s", BigInteger, nullable=False),
    Column("refresh_after_unix_s", BigInteger, nullable=False),
    Column("valid_until_unix_s", BigInteger, nullable=False),
)

publications = sa.Table(
    "publications",
    metadata,
    Column("account_id", ForeignKey("accounts.id"), nullable=False, index=True),
    Column("token_id", ForeignKey("tokens.id"), primary_key=True),
    Column("snapshot_version", ForeignKey("snapshots.version"), primary_key=True, autoincrement=False),
    Column("sequence", BigInteger, nullable=False),
    Column("highest", BigInteger, nullable=False),
    Column("ceiling", BigInteger, nullable=False),
    Column("valid_until_unix_s", BigInteger, nullable=False),
    Column("stands_until_unix_s", BigInteger, nullable=False),
    Column("lapsed", Boolean, nullable=False),
    Column("digest", LargeBinary(16), nullable=False),
    CheckConstraint("ceiling >= highest", name="ceiling_not_below_highest"),
    sa.UniqueConstraint("token_id", "digest"),
)

presentments = sa.Table(
    "presentments",
    metadata,
    # By gateway and id, not by id alone: no gateway can spoil another's sale by presenting its id first.
    Column("gateway_id", ForeignKey("gateways.id"), primary_key=True),
    Column("record_id", sa.Uuid, primary_key=True),
    Column("account_id", ForeignKey("accounts.id"), index=True),
    Column("sequence", BigInteger, nullable=False),
    Column("content_digest", LargeBinary(32), nullable=False),
    Column("body", String, nullable=False),
    Column("sealed_proof", LargeBinary, nullable=False),
    Column("previous_hash", LargeBinary(32), nullable=False),
    Column("signature", LargeBinary(64), nullable=False),
    Column("verdict", String(12), nullable=False),
    Column("reason", String, nullable=False),
    Column("received_unix_ms", BigInteger, nullable=False),
    sa.Index("presentments_by_sequence", "gateway_id", "sequence"),
)

claims = sa.Table(
    "claims",
    metadata,
    # Every authenticated TC's interval (counter_before, counter_after]; Posted is the rows with `posted`.
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("token_id", ForeignKey("tokens.id"), primary_key=True),
    Column("counter_after", BigInteger, primary_key=True, autoincrement=False),
    Column("cryptogram", LargeBinary(8), primary_key=True),
    Column("counter_before", BigInteger, nullable=False),
    Column("atc", Integer, nullable=False),
    Column("gateway_id", String(32), nullable=False),
    Column("record_id", sa.Uuid, nullable=False),
    Column("posted", Boolean, nullable=False),
    CheckConstraint("counter_before < counter_after", name="interval_not_empty"),
)

transfers = sa.Table(
    "transfers",
    metadata,
    Column("account_id", ForeignKey("accounts.id"), primary_key=True),
    Column("id", sa.Uuid, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("record_id", sa.Uuid, nullable=False),
    Column("token_id", ForeignKey("tokens.id"), nullable=False),
    Column("gateway_id", ForeignKey("gateways.id"), nullable=False),
    Column("tapped_unix_ms", BigInteger, nullable=False),
    Column("posted_unix_ms", BigInteger, nullable=False),
)

entries = sa.Table(
    "entries",
    metadata,
    Column("account_id", String(32), primary_key=True),
    Column("transfer_id", sa.Uuid, primary_key=True),
    Column("line", Integer, primary_key=True, autoincrement=False),
    Column("book", String(24), nullable=False),
    Column("owner_id", String(32), nullable=False),
    Column("currency", String(3), nullable=False),
    # Debits are positive, credits negative; a transfer's lines sum to zero.
    Column("amount_minor", BigInteger, CheckConstraint("amount_minor <> 0"), nullable=False),
    sa.ForeignKeyConstraint(["account_id", "transfer_id"], ["transfers.account_id", "transfers.id"]),
    sa.Index("entries_by_owner", "book", "owner_id"),
)

alarms = sa.Table(
    "alarms",
    metadata,
    Column("id", sa.Uuid, primary_key=True),
    Column("kind", String(24), nullable=False),
    Column("gateway_id", String(32), nullable=False),
    # As it was sent: an unreadable record may have no proper id.
    Column("record_id", String(36), nullable=False),
    Column("account_id", String(32)),
    Column("detail", String, nullable=False),
    # The record as it was presented, where it is kept nowhere else.
    Column("record", String),
    Column("raised_unix_ms", BigInteger, nullable=False),
    sa.Index("alarms_by_time", "raised_unix_ms"),
)


def _forbid_changes(table: sa.Table, connection: sa.Connection, **_: object) -> None:
    """What is booked stays booked: SQLite itself refuses to change it."""
    if connection.dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            connection.exec_driver_sql(
                f"CREATE TRIGGER {table.name}_no_{verb.lower()} BEFORE {verb} ON {table.name} "
                f"BEGIN SELECT RAISE(ABORT, '{table.name} are immutable'); END"
            )


for _table in (transfers, entries):
    sa.event.listen(_table, "after_create", _forbid_changes)


class Store:
    """The database. One instance per process; safe to share between threads."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @classmethod
    def create(cls, path: Path) -> Store:
        """A new, empty SQLite database."""
        store = cls(_sqlite_engine(path))
        with store.write() as connection:
            metadata.create_all(connection)
        return store

    @classmethod
    def open(cls, path: Path) -> Store:
        """
        Raises:
            InvalidConfiguration: no database there.
        """
        if not path.is_file():
            raise InvalidConfiguration("no ledger database", where=str(path))
        return cls(_sqlite_engine(path))

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One durable transaction: committed at the end of the block, undone by any exception in it.

        Raises:
            Unavailable: the database could not be had in time; nothing was done.
            OutcomeUnknown: the commit failed; whether it reached the disk is open.
        """
        with self._engine.connect() as connection:
            transaction = _begin(connection)
            try:
                yield connection
            except BaseException:
                transaction.rollback()
                raise
            try:
                transaction.commit()
            except DBAPIError as error:
                raise OutcomeUnknown(
                    f"the ledger's commit failed ({type(error.orig).__name__})",
                    advice="check the disk, restart the ledger, and send the same batch again",
                ) from error

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One consistent view; does not wait for a writer."""
        with self._engine.connect().execution_options(begin="BEGIN") as connection:
            transaction = _begin(connection)
            try:
                yield connection
            finally:
                transaction.rollback()

    def close(self) -> None:
        self._engine.dispose()


def _begin(connection: sa.Connection) -> sa.RootTransaction:
    try:
        return connection.begin()
    except OperationalError as error:
        raise Unavailable(
            f"the ledger's database is not to be had ({error.orig})", advice="try again in a moment"
        ) from error


def _sqlite_engine(path: Path) -> sa.Engine:
    url = sa.URL.create("sqlite", database=str(path))
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S})

    @sa.event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: object) -> None:
        # The driver's own implicit BEGIN is deferred and comes late: a transaction that reads before it
        # writes could then fail on the upgrade. We begin ourselves.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN IMMEDIATE"))

    return engine
