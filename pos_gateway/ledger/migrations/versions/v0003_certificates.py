"""Client certificates of gateways; gateways can be suspended, revoked and reinstated."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("enrolment_codes", sa.Column("gateway_id", sa.String(length=32)))
    op.add_column(
        "gateways", sa.Column("status", sa.String(length=12), nullable=False, server_default="active")
    )
    op.add_column(
        "gateways",
        sa.Column("status_since_unix_ms", sa.BigInteger(), nullable=False, server_default="0"),
    )
    op.create_table(
        "gateway_actions",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("gateway_id", sa.String(length=32), nullable=False),
        sa.Column("action", sa.String(length=12), nullable=False),
        sa.Column("by", sa.String(length=64), nullable=False),
        sa.Column("reason", sa.String(length=200), nullable=False),
        sa.Column("at_unix_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["gateway_id"], ["gateways.id"], name="gateway_actions_gateway_id_fkey"),
        sa.PrimaryKeyConstraint("id", name="gateway_actions_pkey"),
    )
    op.create_index("gateway_actions_by_gateway_id", "gateway_actions", ["gateway_id"])
    op.create_table(
        "certificates",
        sa.Column("serial", sa.LargeBinary(length=20), nullable=False),
        sa.Column("gateway_id", sa.String(length=32), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("public_key_digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("issued_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("not_after_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("first_used_unix_ms", sa.BigInteger(), nullable=True),
        sa.Column("revoked_unix_ms", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["gateway_id"], ["gateways.id"], name="certificates_gateway_id_fkey"),
        sa.PrimaryKeyConstraint("serial", name="certificates_pkey"),
        sa.UniqueConstraint("gateway_id", "number", name="certificates_gateway_id_number_key"),
    )


def downgrade() -> None:
    op.drop_table("certificates")
    op.drop_table("gateway_actions")
    for column in ("status_since_unix_ms", "status"):
        op.drop_column("gateways", column)
    op.drop_column("enrolment_codes", "gateway_id")
