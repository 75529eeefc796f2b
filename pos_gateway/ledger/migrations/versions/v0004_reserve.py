"""The reserve principle: publications of three kinds with their evidence, money that may come back, limits
on their way down, renounced taps, what waits for a decision, proven clones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from alembic import op

from pos_gateway.ledger.migrations import make_immutable

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _widen_accounts()
    op.add_column(
        "tokens",
        sa.Column("last_sequence", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
    )
    op.execute("UPDATE tokens SET last_sequence = record_sequence")
    op.add_column("gateways", sa.Column("complete_until_unix_ms", sa.BigInteger(), nullable=True))
    op.add_column("claims", sa.Column("previous_digest", sa.LargeBinary(length=8), nullable=True))
    with _made_again("publications"):
        _create_publications()
        op.execute(
            "INSERT INTO publications (account_id, token_id, digest, kind, sequence, snapshot_version, "
            "terminal_id, issued_unix_s, highest, ceiling, evidence, valid_until_unix_s, "
            "stands_until_unix_s, lapsed) "
            "SELECT p.account_id, p.token_id, p.digest, 'snapshot', p.sequence, p.snapshot_version, NULL, "
            "s.valid_from_unix_s, p.highest, p.ceiling, NULL, p.valid_until_unix_s, "
            "p.stands_until_unix_s, p.lapsed "
            "FROM publications_kept p JOIN snapshots s ON s.version = p.snapshot_version"
        )
    _let_transfers_have_no_gateway()
    _create_movements()
    _create_renunciations()
    _create_reviews()
    _create_conflicts()


def downgrade() -> None:
    for table in ("conflicts", "reviews", "write_offs", "renunciations", "movements"):
        op.drop_table(table)
    _make_transfers_have_a_gateway()
    with _made_again("publications"):
        _create_publications_before()
        op.execute(
            "INSERT INTO publications (account_id, token_id, snapshot_version, sequence, highest, ceiling, "
            "valid_until_unix_s, stands_until_unix_s, lapsed, digest) "
            "SELECT account_id, token_id, snapshot_version, sequence, highest, ceiling, "
            "valid_until_unix_s, stands_until_unix_s, lapsed, digest "
            "FROM publications_kept WHERE kind = 'snapshot'"
        )
    op.drop_column("claims", "previous_digest")
    op.drop_column("gateways", "complete_until_unix_ms")
    op.drop_column("tokens", "last_sequence")
    for name in _ACCOUNT_COLUMNS:
        op.drop_column("accounts", name)


_ACCOUNT_COLUMNS = ("uncleared_minor", "target_line_minor", "vault_minor", "vault_leaving_minor")


def _widen_accounts() -> None:
    for name in _ACCOUNT_COLUMNS:
        op.add_column(
            "accounts", sa.Column(name, sa.BigInteger(), nullable=False, server_default=sa.text("0"))
        )
    op.execute("UPDATE accounts SET target_line_minor = limit_minor")


@contextmanager
def _made_again(table: str) -> Iterator[None]:
    """Its rows stand in `…_kept` while the block makes the table anew: SQLite cannot change a key."""
    op.execute(f"CREATE TABLE {table}_kept AS SELECT * FROM {table}")  # noqa: S608 - names of our own
    op.drop_table(table)
    yield
    op.execute(f"DROP TABLE {table}_kept")


def _create_publications() -> None:
    op.create_table(
        "publications",
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("token_id", sa.String(length=32), nullable=False),
        sa.Column("digest", sa.LargeBinary(length=16), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("snapshot_version", sa.BigInteger(), nullable=True),
        sa.Column("terminal_id", sa.String(length=8), nullable=True),
        sa.Column("issued_unix_s", sa.BigInteger(), nullable=False),
        sa.Column("highest", sa.BigInteger(), nullable=False),
        sa.Column("ceiling", sa.BigInteger(), nullable=False),
        sa.Column("evidence", sa.BigInteger(), nullable=True),
        sa.Column("valid_until_unix_s", sa.BigInteger(), nullable=False),
        sa.Column("stands_until_unix_s", sa.BigInteger(), nullable=False),
        sa.Column("lapsed", sa.Boolean(), nullable=False),
        sa.CheckConstraint("ceiling >= highest", name="publications_ceiling_not_below_highest_check"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="publications_account_id_fkey"),
        sa.ForeignKeyConstraint(
            ["snapshot_version"], ["snapshots.version"], name="publications_snapshot_version_fkey"
        ),
        sa.ForeignKeyConstraint(["token_id"], ["tokens.id"], name="publications_token_id_fkey"),
        sa.PrimaryKeyConstraint("token_id", "digest", name="publications_pkey"),
    )
    op.create_index("publications_by_account_id", "publications", ["account_id"], unique=False)
    op.create_index("publications_by_snapshot_version", "publications", ["snapshot_version"], unique=False)
    op.create_index(
        "publications_of_terminals",
        "publications",
        ["terminal_id"],
        unique=False,
        sqlite_where=sa.text("terminal_id IS NOT NULL AND NOT lapsed"),
        postgresql_where=sa.text("terminal_id IS NOT NULL AND NOT lapsed"),
    )


def _create_publications_before() -> None:
    op.create_table(
        "publications",
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("token_id", sa.String(length=32), nullable=False),
        sa.Column("snapshot_version", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("highest", sa.BigInteger(), nullable=False),
        sa.Column("ceiling", sa.BigInteger(), nullable=False),
        sa.Column("valid_until_unix_s", sa.BigInteger(), nullable=False),
        sa.Column("stands_until_unix_s", sa.BigInteger(), nullable=False),
        sa.Column("lapsed", sa.Boolean(), nullable=False),
        sa.Column("digest", sa.LargeBinary(length=16), nullable=False),
        sa.CheckConstraint("ceiling >= highest", name="publications_ceiling_not_below_highest_check"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="publications_account_id_fkey"),
        sa.ForeignKeyConstraint(
            ["snapshot_version"], ["snapshots.version"], name="publications_snapshot_version_fkey"
        ),
        sa.ForeignKeyConstraint(["token_id"], ["tokens.id"], name="publications_token_id_fkey"),
        sa.PrimaryKeyConstraint("token_id", "snapshot_version", name="publications_pkey"),
        sa.UniqueConstraint("token_id", "digest", name="publications_token_id_digest_key"),
    )
    op.create_index("publications_by_account_id", "publications", ["account_id"], unique=False)


def _let_transfers_have_no_gateway() -> None:
    """Repayments and vault movements come from no gateway; they have a reference of their own."""
    if op.get_bind().dialect.name == "postgresql":
        for name in ("record_id", "token_id", "gateway_id"):
            op.alter_column("transfers", name, nullable=True)
        op.add_column("transfers", sa.Column("reference", sa.String(length=64), nullable=True))
        return
    _rebuild_books(_create_transfers, ", NULL")


def _make_transfers_have_a_gateway() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE transfers DISABLE TRIGGER USER")
        op.execute("ALTER TABLE entries DISABLE TRIGGER USER")
        op.execute(
            "DELETE FROM entries e USING transfers t WHERE t.account_id = e.account_id "
            "AND t.id = e.transfer_id AND t.gateway_id IS NULL"
        )
        op.execute("DELETE FROM transfers WHERE gateway_id IS NULL")
        op.execute("ALTER TABLE transfers ENABLE TRIGGER USER")
        op.execute("ALTER TABLE entries ENABLE TRIGGER USER")
        op.drop_column("transfers", "reference")
        for name in ("record_id", "token_id", "gateway_id"):
            op.alter_column("transfers", name, nullable=False)
        return
    _rebuild_books(_create_transfers_before, "")


def _rebuild_books(create_transfers: Callable[[], None], reference: str) -> None:
    """SQLite cannot change a column: what comes from a gateway is copied, the rest has no place below."""
    with _made_again("entries"), _made_again("transfers"):
        create_transfers()
        op.execute(
            "INSERT INTO transfers SELECT account_id, id, kind, record_id, token_id, gateway_id, "  # noqa: S608
            f"tapped_unix_ms, posted_unix_ms, original_id{reference} FROM transfers_kept "
            "WHERE gateway_id IS NOT NULL"
        )
        _create_entries()
        op.execute(
            "INSERT INTO entries SELECT * FROM entries_kept "
            "WHERE (account_id, transfer_id) IN (SELECT account_id, id FROM transfers)"
        )
    make_immutable(op.get_bind(), "transfers", "entries")


def _create_transfers() -> None:
    _transfers_table(
        sa.Column("record_id", sa.Uuid(), nullable=True),
        sa.Column("token_id", sa.String(length=32), nullable=True),
        sa.Column("gateway_id", sa.String(length=32), nullable=True),
        [sa.Column("reference", sa.String(length=64), nullable=True)],
    )


def _create_transfers_before() -> None:
    _transfers_table(
        sa.Column("record_id", sa.Uuid(), nullable=False),
        sa.Column("token_id", sa.String(length=32), nullable=False),
        sa.Column("gateway_id", sa.String(length=32), nullable=False),
        [],
    )


def _transfers_table(
    record_id: sa.Column[Any], token_id: sa.Column[Any], gateway_id: sa.Column[Any], last: Sequence[Any]
) -> None:
    op.create_table(
        "transfers",
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        record_id,
        token_id,
        gateway_id,
        sa.Column("tapped_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("posted_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("original_id", sa.Uuid(), nullable=True),
        *last,
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="transfers_account_id_fkey"),
        sa.ForeignKeyConstraint(["gateway_id"], ["gateways.id"], name="transfers_gateway_id_fkey"),
        sa.ForeignKeyConstraint(["token_id"], ["tokens.id"], name="transfers_token_id_fkey"),
        sa.ForeignKeyConstraint(
            ["account_id", "original_id"],
            ["transfers.account_id", "transfers.id"],
            name="transfers_account_id_original_id_fkey",
        ),
        sa.PrimaryKeyConstraint("account_id", "id", name="transfers_pkey"),
    )
    op.create_index(
        "transfers_by_account_id_original_id", "transfers", ["account_id", "original_id"], unique=False
    )


def _create_entries() -> None:
    op.create_table(
        "entries",
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("transfer_id", sa.Uuid(), nullable=False),
        sa.Column("line", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("book", sa.String(length=24), nullable=False),
        sa.Column("owner_id", sa.String(length=32), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("amount_minor <> 0", name="entries_amount_not_zero_check"),
        sa.ForeignKeyConstraint(
            ["account_id", "transfer_id"],
            ["transfers.account_id", "transfers.id"],
            name="entries_account_id_transfer_id_fkey",
        ),
        sa.PrimaryKeyConstraint("account_id", "transfer_id", "line", name="entries_pkey"),
    )
    op.create_index("entries_by_book_owner_id", "entries", ["book", "owner_id"], unique=False)


def _create_movements() -> None:
    op.create_table(
        "movements",
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("reference", sa.String(length=64), nullable=False),
        sa.Column("purpose", sa.String(length=12), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=12), nullable=False),
        sa.Column("received_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("settled_unix_ms", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("amount_minor > 0", name="movements_amount_positive_check"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="movements_account_id_fkey"),
        sa.PrimaryKeyConstraint("account_id", "reference", name="movements_pkey"),
    )


def _create_renunciations() -> None:
    op.create_table(
        "renunciations",
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("token_id", sa.String(length=32), nullable=False),
        sa.Column("previous_digest", sa.LargeBinary(length=8), nullable=False),
        sa.Column("gateway_id", sa.String(length=32), nullable=False),
        sa.Column("record_id", sa.Uuid(), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("amount_minor > 0", name="renunciations_amount_positive_check"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="renunciations_account_id_fkey"),
        sa.ForeignKeyConstraint(["token_id"], ["tokens.id"], name="renunciations_token_id_fkey"),
        sa.PrimaryKeyConstraint("token_id", "previous_digest", name="renunciations_pkey"),
    )
    op.create_table(
        "write_offs",
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("token_id", sa.String(length=32), nullable=False),
        sa.Column("counter_after", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("counter_before", sa.BigInteger(), nullable=False),
        sa.Column("gateway_id", sa.String(length=32), nullable=False),
        sa.Column("record_id", sa.Uuid(), nullable=False),
        sa.CheckConstraint("counter_before < counter_after", name="write_offs_interval_not_empty_check"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="write_offs_account_id_fkey"),
        sa.ForeignKeyConstraint(["token_id"], ["tokens.id"], name="write_offs_token_id_fkey"),
        sa.PrimaryKeyConstraint("token_id", "counter_after", name="write_offs_pkey"),
    )
    op.create_index("write_offs_by_account_id", "write_offs", ["account_id"], unique=False)


def _create_reviews() -> None:
    op.create_table(
        "reviews",
        sa.Column("gateway_id", sa.String(length=32), nullable=False),
        sa.Column("record_id", sa.Uuid(), nullable=False),
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("why", sa.String(length=16), nullable=False),
        sa.Column("held_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("decision", sa.String(length=12), nullable=True),
        sa.Column("note", sa.String(length=400), nullable=True),
        sa.Column("decided_unix_ms", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="reviews_account_id_fkey"),
        sa.ForeignKeyConstraint(["gateway_id"], ["gateways.id"], name="reviews_gateway_id_fkey"),
        sa.PrimaryKeyConstraint("gateway_id", "record_id", name="reviews_pkey"),
    )
    op.create_index(
        "reviews_open",
        "reviews",
        ["held_unix_ms"],
        unique=False,
        sqlite_where=sa.text("decision IS NULL"),
        postgresql_where=sa.text("decision IS NULL"),
    )


def _create_conflicts() -> None:
    op.create_table(
        "conflicts",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("token_id", sa.String(length=32), nullable=False),
        sa.Column("gateway_id", sa.String(length=32), nullable=False),
        sa.Column("record_id", sa.Uuid(), nullable=False),
        sa.Column("other_gateway_id", sa.String(length=32), nullable=False),
        sa.Column("other_record_id", sa.Uuid(), nullable=False),
        sa.Column("proven_unix_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="conflicts_account_id_fkey"),
        sa.ForeignKeyConstraint(["token_id"], ["tokens.id"], name="conflicts_token_id_fkey"),
        sa.PrimaryKeyConstraint("id", name="conflicts_pkey"),
    )
    op.create_index("conflicts_by_proven_unix_ms", "conflicts", ["proven_unix_ms"], unique=False)
