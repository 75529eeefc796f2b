"""What was answered on the spot: grants, notes, returns."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "online_answers",
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("token_id", sa.String(length=32), nullable=False),
        sa.Column("asker", sa.String(length=32), nullable=False),
        sa.Column("sale_id", sa.Uuid(), nullable=False),
        sa.Column("purpose", sa.String(length=8), nullable=False),
        sa.Column("content_digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("answer", sa.String(), nullable=False),
        sa.Column("answered_unix_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="online_answers_account_id_fkey"),
        sa.ForeignKeyConstraint(["token_id"], ["tokens.id"], name="online_answers_token_id_fkey"),
        sa.PrimaryKeyConstraint("token_id", "asker", "sale_id", "purpose", name="online_answers_pkey"),
    )


def downgrade() -> None:
    op.drop_table("online_answers")
