"""Runs: the points of a counter line that are posted without a gap, kept beside the token."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("run_start", "run_end"):
        op.add_column("tokens", sa.Column(name, sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    for name in ("run_end", "run_start"):
        op.drop_column("tokens", name)
