"""The credit product: bills and what stands on them, plans, loans, evaluations; the class of a token's
instalments in its limit record."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "scorecards",
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("body", sa.String(), nullable=False),
        sa.Column("since_unix_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("version", name=op.f("scorecards_pkey")),
    )
    op.create_table(
        "bills",
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("closing", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("previous_closing", sa.Integer(), nullable=False),
        sa.Column("due_on", sa.Integer(), nullable=False),
        sa.Column("cutoff_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("closed_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("policy_version", sa.Integer(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("purchases_minor", sa.BigInteger(), nullable=False),
        sa.Column("carried_minor", sa.BigInteger(), nullable=False),
        sa.Column("instalments_minor", sa.BigInteger(), nullable=False),
        sa.Column("instalment_fees_minor", sa.BigInteger(), nullable=False),
        sa.Column("interest_minor", sa.BigInteger(), nullable=False),
        sa.Column("overdue_fee_minor", sa.BigInteger(), nullable=False),
        sa.Column("arrears_minor", sa.BigInteger(), nullable=False),
        sa.Column("total_minor", sa.BigInteger(), nullable=False),
        sa.Column("minimum_minor", sa.BigInteger(), nullable=False),
        sa.Column("due_minor", sa.BigInteger(), nullable=False),
        sa.Column("overdue_charged_minor", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name=op.f("bills_account_id_fkey")),
        sa.PrimaryKeyConstraint("account_id", "closing", name=op.f("bills_pkey")),
    )
    op.create_table(
        "evaluations",
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("scorecard_version", sa.Integer(), nullable=False),
        sa.Column("features", sa.String(), nullable=False),
        sa.Column("points", sa.Integer(), nullable=False),
        sa.Column("limit_minor", sa.BigInteger(), nullable=False),
        sa.Column("upgrades", sa.Boolean(), nullable=False),
        sa.Column("reasons", sa.String(), nullable=False),
        sa.Column("evaluated_unix_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name=op.f("evaluations_account_id_fkey")),
        sa.PrimaryKeyConstraint("account_id", "id", name=op.f("evaluations_pkey")),
    )
    op.create_table(
        "items",
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("closing", sa.Integer(), nullable=True),
        sa.Column("due_on", sa.Integer(), nullable=True),
        sa.Column("origin", sa.String(length=12), nullable=False),
        sa.Column("part", sa.String(length=16), nullable=False),
        sa.Column("book", sa.String(length=24), nullable=False),
        sa.Column("plan_id", sa.Uuid(), nullable=True),
        sa.Column("revolves", sa.Boolean(), nullable=False),
        sa.Column("since", sa.Integer(), nullable=False),
        sa.Column("bears_from", sa.Integer(), nullable=True),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("owed_minor", sa.BigInteger(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("amount_minor >= owed_minor", name=op.f("items_owed_not_above_check")),
        sa.CheckConstraint("owed_minor >= 0", name=op.f("items_owed_not_negative_check")),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name=op.f("items_account_id_fkey")),
        sa.PrimaryKeyConstraint("account_id", "id", name=op.f("items_pkey")),
    )
    op.create_index(
        "items_owed",
        "items",
        ["account_id"],
        unique=False,
        sqlite_where=sa.text("owed_minor > 0"),
        postgresql_where=sa.text("owed_minor > 0"),
    )
    op.create_table(
        "plans",
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.String(length=12), nullable=False),
        sa.Column("book", sa.String(length=24), nullable=False),
        sa.Column("offer", sa.String(), nullable=False),
        sa.Column("quote", sa.String(), nullable=False),
        sa.Column("periods", sa.Integer(), nullable=False),
        sa.Column("principal_minor", sa.BigInteger(), nullable=False),
        sa.Column("left_minor", sa.BigInteger(), nullable=False),
        sa.Column("ahead_minor", sa.BigInteger(), nullable=False),
        sa.Column("next_number", sa.Integer(), nullable=False),
        sa.Column("merchant_id", sa.String(length=15), nullable=True),
        sa.Column("merchant_fee_minor", sa.BigInteger(), nullable=False),
        sa.Column("made_unix_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("ahead_minor >= 0", name=op.f("plans_ahead_not_negative_check")),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name=op.f("plans_account_id_fkey")),
        sa.PrimaryKeyConstraint("account_id", "id", name=op.f("plans_pkey")),
    )
    op.create_table(
        "allocations",
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("item_id", sa.String(length=64), nullable=False),
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("cause", sa.String(length=12), nullable=False),
        sa.Column("reference", sa.String(length=64), nullable=True),
        sa.Column("day", sa.Integer(), nullable=False),
        sa.Column("at_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("amount_minor <> 0", name=op.f("allocations_amount_not_zero_check")),
        sa.ForeignKeyConstraint(
            ["account_id", "item_id"],
            ["items.account_id", "items.id"],
            name=op.f("allocations_account_id_item_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("account_id", "item_id", "sequence", name=op.f("allocations_pkey")),
    )
    op.create_index(op.f("allocations_by_account_id_day"), "allocations", ["account_id", "day"], unique=False)
    op.create_table(
        "loans",
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("scene", sa.String(length=16), nullable=False),
        sa.Column("purpose", sa.String(length=120), nullable=False),
        sa.Column("merchant_id", sa.String(length=15), nullable=False),
        sa.Column("reference", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["account_id", "id"], ["plans.account_id", "plans.id"], name=op.f("loans_account_id_id_fkey")
        ),
        sa.ForeignKeyConstraint(["merchant_id"], ["merchants.id"], name=op.f("loans_merchant_id_fkey")),
        sa.PrimaryKeyConstraint("account_id", "id", name=op.f("loans_pkey")),
        sa.UniqueConstraint("account_id", "reference", name=op.f("loans_account_id_reference_key")),
    )
    op.create_table(
        "plan_instalments",
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("plan_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("principal_minor", sa.BigInteger(), nullable=False),
        sa.Column("fee_minor", sa.BigInteger(), nullable=False),
        sa.Column("closing", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(
            ["account_id", "plan_id"],
            ["plans.account_id", "plans.id"],
            name=op.f("plan_instalments_account_id_plan_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("account_id", "plan_id", "number", name=op.f("plan_instalments_pkey")),
    )
    op.add_column(
        "accounts",
        sa.Column("time_zone", sa.String(length=64), server_default="Asia/Shanghai", nullable=False),
    )
    op.add_column("accounts", sa.Column("closing_day", sa.Integer(), server_default="5", nullable=False))
    op.add_column("accounts", sa.Column("last_closing", sa.Integer(), nullable=True))
    op.add_column("accounts", sa.Column("next_closing", sa.Integer(), nullable=True))
    op.add_column(
        "accounts", sa.Column("credit_sequence", sa.BigInteger(), server_default="0", nullable=False)
    )
    op.add_column(
        "accounts", sa.Column("loan_limit_minor", sa.BigInteger(), server_default="0", nullable=False)
    )
    op.add_column(
        "accounts", sa.Column("written_off_minor", sa.BigInteger(), server_default="0", nullable=False)
    )
    op.create_index(op.f("accounts_by_next_closing"), "accounts", ["next_closing"], unique=False)
    op.add_column(
        "movements", sa.Column("outside_minor", sa.BigInteger(), server_default="0", nullable=False)
    )
    op.add_column("tokens", sa.Column("instalment_class", sa.Integer(), server_default="0", nullable=False))
    op.add_column(
        "tokens", sa.Column("record_instalment_class", sa.Integer(), server_default="0", nullable=False)
    )
    op.create_index(
        op.f("transfers_by_posted_unix_ms"),
        "transfers",
        ["posted_unix_ms"],
        unique=False,
        postgresql_using="brin",
    )


def downgrade() -> None:
    op.drop_index(op.f("transfers_by_posted_unix_ms"), table_name="transfers", postgresql_using="brin")
    op.drop_column("tokens", "record_instalment_class")
    op.drop_column("tokens", "instalment_class")
    op.drop_column("movements", "outside_minor")
    op.drop_index(op.f("accounts_by_next_closing"), table_name="accounts")
    op.drop_column("accounts", "written_off_minor")
    op.drop_column("accounts", "loan_limit_minor")
    op.drop_column("accounts", "credit_sequence")
    op.drop_column("accounts", "next_closing")
    op.drop_column("accounts", "last_closing")
    op.drop_column("accounts", "closing_day")
    op.drop_column("accounts", "time_zone")
    op.drop_table("plan_instalments")
    op.drop_table("loans")
    op.drop_index(op.f("allocations_by_account_id_day"), table_name="allocations")
    op.drop_table("allocations")
    op.drop_table("plans")
    op.drop_index(
        "items_owed",
        table_name="items",
        sqlite_where=sa.text("owed_minor > 0"),
        postgresql_where=sa.text("owed_minor > 0"),
    )
    op.drop_table("items")
    op.drop_table("evaluations")
    op.drop_table("bills")
    op.drop_table("scorecards")
