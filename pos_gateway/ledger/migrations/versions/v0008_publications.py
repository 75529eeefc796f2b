"""Publications without foreign keys: millions are written at once, each from the row that it would name.

Three look-ups and row locks for each cost more than all its indexes together. None of the rows they named is
ever removed, and `ledger show` holds publications to them.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_KEYS = {
    "account_id": ("accounts", "id"),
    "snapshot_version": ("snapshots", "version"),
    "token_id": ("tokens", "id"),
}


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for column in _KEYS:
            op.drop_constraint(f"publications_{column}_fkey", "publications", type_="foreignkey")
    else:
        _make_again()


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for column, (table, key) in _KEYS.items():
            op.create_foreign_key(f"publications_{column}_fkey", "publications", table, [column], [key])
    else:
        _make_again(
            *(
                sa.ForeignKeyConstraint([column], [f"{table}.{key}"], name=f"publications_{column}_fkey")
                for column, (table, key) in _KEYS.items()
            )
        )


def _make_again(*keys: sa.ForeignKeyConstraint) -> None:
    """SQLite cannot change a key."""
    op.execute("CREATE TABLE publications_kept AS SELECT * FROM publications")
    op.drop_table("publications")
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
        sa.PrimaryKeyConstraint("token_id", "digest", name="publications_pkey"),
        *keys,
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
    op.execute("INSERT INTO publications SELECT * FROM publications_kept")
    op.execute("DROP TABLE publications_kept")
