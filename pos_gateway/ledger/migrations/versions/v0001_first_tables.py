"""The first tables: accounts, tokens, gateways, publications, presentments, double entry."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from pos_gateway.ledger.migrations import forget_immutable, make_immutable

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "accounts",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("holder", sa.String(length=120), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("limit_minor", sa.BigInteger(), nullable=False),
        sa.Column("outstanding_minor", sa.BigInteger(), nullable=False),
        sa.Column("opened_unix_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("limit_minor >= 0", name="accounts_limit_not_negative_check"),
        sa.PrimaryKeyConstraint("id", name="accounts_pkey"),
    )
    op.create_table(
        "alarms",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.String(length=24), nullable=False),
        sa.Column("gateway_id", sa.String(length=32), nullable=False),
        sa.Column("record_id", sa.String(length=36), nullable=False),
        sa.Column("account_id", sa.String(length=32), nullable=True),
        sa.Column("detail", sa.String(), nullable=False),
        sa.Column("record", sa.String(), nullable=True),
        sa.Column("raised_unix_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="alarms_pkey"),
    )
    op.create_index("alarms_by_raised_unix_ms", "alarms", ["raised_unix_ms"], unique=False)
    op.create_table(
        "merchants",
        sa.Column("id", sa.String(length=15), nullable=False),
        sa.Column("name", sa.String(length=120), nullable=False),
        sa.Column("category", sa.String(length=4), nullable=False),
        sa.PrimaryKeyConstraint("id", name="merchants_pkey"),
    )
    op.create_table(
        "policies",
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("body", sa.String(), nullable=False),
        sa.Column("since_unix_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("version", name="policies_pkey"),
    )
    op.create_table(
        "snapshots",
        sa.Column("version", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("terms", sa.String(), nullable=False),
        sa.Column("automatic", sa.Boolean(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=True),
        sa.Column("sha256", sa.LargeBinary(length=32), nullable=True),
        sa.Column("record_count", sa.BigInteger(), nullable=False),
        sa.Column("valid_from_unix_s", sa.BigInteger(), nullable=False),
        sa.Column("refresh_after_unix_s", sa.BigInteger(), nullable=False),
        sa.Column("valid_until_unix_s", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("version", name="snapshots_pkey"),
    )
    op.create_table(
        "enrolment_codes",
        sa.Column("secret_hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("merchant_id", sa.String(length=15), nullable=False),
        sa.Column("expires_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("used_unix_ms", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["merchant_id"], ["merchants.id"], name="enrolment_codes_merchant_id_fkey"),
        sa.PrimaryKeyConstraint("secret_hash", name="enrolment_codes_pkey"),
    )
    op.create_table(
        "gateways",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("terminal_id", sa.String(length=8), nullable=False),
        sa.Column("merchant_id", sa.String(length=15), nullable=False),
        sa.Column("public_key", sa.LargeBinary(length=32), nullable=False),
        sa.Column("enrolled_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("last_presented_unix_ms", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["merchant_id"], ["merchants.id"], name="gateways_merchant_id_fkey"),
        sa.PrimaryKeyConstraint("id", name="gateways_pkey"),
        sa.UniqueConstraint("public_key", name="gateways_public_key_key"),
        sa.UniqueConstraint("terminal_id", name="gateways_terminal_id_key"),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("token_key", sa.LargeBinary(length=16), nullable=False),
        sa.Column("last4", sa.String(length=4), nullable=False),
        sa.Column("psn", sa.Integer(), nullable=False),
        sa.Column("expires", sa.Date(), nullable=False),
        sa.Column("status", sa.String(length=8), nullable=False),
        sa.Column("per_tap_cap_minor", sa.BigInteger(), nullable=False),
        sa.Column("assurance", sa.Integer(), nullable=False),
        sa.Column("highest_counter", sa.BigInteger(), nullable=False),
        sa.Column("record_version", sa.BigInteger(), nullable=False),
        sa.Column("record_sequence", sa.BigInteger(), nullable=False),
        sa.Column("record_ceiling", sa.BigInteger(), nullable=False),
        sa.Column("record_per_tap_cap_minor", sa.BigInteger(), nullable=False),
        sa.Column("record_status", sa.String(length=8), nullable=False),
        sa.Column("record_assurance", sa.Integer(), nullable=False),
        sa.Column("issued_unix_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="tokens_account_id_fkey"),
        sa.PrimaryKeyConstraint("id", name="tokens_pkey"),
        sa.UniqueConstraint("token_key", name="tokens_token_key_key"),
    )
    op.create_index("tokens_by_account_id", "tokens", ["account_id"], unique=False)
    op.create_index("tokens_by_record_version", "tokens", ["record_version"], unique=False)
    op.create_table(
        "claims",
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("token_id", sa.String(length=32), nullable=False),
        sa.Column("counter_after", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("cryptogram", sa.LargeBinary(length=8), nullable=False),
        sa.Column("counter_before", sa.BigInteger(), nullable=False),
        sa.Column("atc", sa.Integer(), nullable=False),
        sa.Column("gateway_id", sa.String(length=32), nullable=False),
        sa.Column("record_id", sa.Uuid(), nullable=False),
        sa.Column("posted", sa.Boolean(), nullable=False),
        sa.CheckConstraint("counter_before < counter_after", name="claims_interval_not_empty_check"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="claims_account_id_fkey"),
        sa.ForeignKeyConstraint(["token_id"], ["tokens.id"], name="claims_token_id_fkey"),
        sa.PrimaryKeyConstraint("token_id", "counter_after", "cryptogram", name="claims_pkey"),
    )
    op.create_index(
        "claims_not_posted",
        "claims",
        ["token_id"],
        unique=False,
        sqlite_where=sa.text("NOT posted"),
        postgresql_where=sa.text("NOT posted"),
    )
    op.create_table(
        "presentments",
        sa.Column("gateway_id", sa.String(length=32), nullable=False),
        sa.Column("record_id", sa.Uuid(), nullable=False),
        sa.Column("account_id", sa.String(length=32), nullable=True),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("content_digest", sa.LargeBinary(length=32), nullable=False),
        sa.Column("body", sa.String(), nullable=False),
        sa.Column("sealed_proof", sa.LargeBinary(), nullable=False),
        sa.Column("previous_hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("signature", sa.LargeBinary(length=64), nullable=False),
        sa.Column("verdict", sa.String(length=12), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("received_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(length=24), nullable=False),
        sa.Column("about", sa.Uuid(), nullable=True),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="presentments_account_id_fkey"),
        sa.ForeignKeyConstraint(["gateway_id"], ["gateways.id"], name="presentments_gateway_id_fkey"),
        sa.PrimaryKeyConstraint("gateway_id", "record_id", name="presentments_pkey"),
    )
    op.create_index("presentments_by_account_id", "presentments", ["account_id"], unique=False)
    op.create_index(
        "presentments_by_gateway_id_sequence", "presentments", ["gateway_id", "sequence"], unique=False
    )
    op.create_index("presentments_by_gateway_id_about", "presentments", ["gateway_id", "about"], unique=False)
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
    op.create_table(
        "transfers",
        sa.Column("account_id", sa.String(length=32), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("record_id", sa.Uuid(), nullable=False),
        sa.Column("token_id", sa.String(length=32), nullable=False),
        sa.Column("gateway_id", sa.String(length=32), nullable=False),
        sa.Column("tapped_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("posted_unix_ms", sa.BigInteger(), nullable=False),
        sa.Column("original_id", sa.Uuid(), nullable=True),
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
    make_immutable(op.get_bind(), "transfers", "entries")


def downgrade() -> None:

    op.drop_table("entries")
    op.drop_table("transfers")
    op.drop_table("publications")
    op.drop_table("presentments")
    op.drop_table("claims")
    op.drop_table("tokens")
    op.drop_table("gateways")
    op.drop_table("enrolment_codes")
    op.drop_table("snapshots")
    op.drop_table("policies")
    op.drop_table("merchants")
    op.drop_table("alarms")
    op.drop_table("accounts")
    forget_immutable(op.get_bind())
