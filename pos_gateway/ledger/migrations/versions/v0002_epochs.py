"""Epochs: which life of the ledger this is. A new one begins when it was restored from a backup."""

from __future__ import annotations

import time
import uuid

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    epochs = op.create_table(
        "epochs",
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("since_unix_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("number", name="epochs_pkey"),
    )
    op.bulk_insert(epochs, [{"number": 1, "id": uuid.uuid4(), "since_unix_ms": int(time.time() * 1000)}])


def downgrade() -> None:
    op.drop_table("epochs")
