"""The ledger's tables, and transactions on them.

Shaped to be sharded by account: every unique key either holds the account id or is random enough to be
globally unique. The same on SQLite and PostgreSQL; `migrations` makes and changes the tables, and what
is booked (transfers, entries) the database itself refuses to change. Money is minor units, times say
their unit in their name.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar
from uuid import UUID

import psycopg
import sqlalchemy as sa
from sqlalchemy import BigInteger, Boolean, CheckConstraint, Column, ForeignKey, Integer, LargeBinary, String
from sqlalchemy.exc import DBAPIError, OperationalError

from pos_gateway.errors import Conflict, InvalidConfiguration, OutcomeUnknown, Unavailable
from pos_gateway.ledger import migrations
from pos_gateway.ledger.database import make_engine

_T = TypeVar("_T")

INCOMPLETE: Final = -1
"""The record count of a snapshot whose ceilings are still being decided."""

_PUBLISHING: Final = 0x706F7367  # the advisory lock of whoever publishes
_ATTEMPTS: Final = 8
_FIRST_PAUSE_S: Final = 0.01
_CONTENTION: Final = ("40001", "40P01")  # serialization_failure, deadlock_detected
_NOT_NOW: Final = ("08", "53", "57", "55P03")  # connection, resources, operator, lock_not_available

metadata: Final = sa.MetaData(naming_convention=migrations.NAMES)

policies = sa.Table(
    "policies",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("body", String, nullable=False),
    Column("since_unix_ms", BigInteger, nullable=False),
)

epochs = sa.Table(
    "epochs",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("id", sa.Uuid, nullable=False),
    Column("since_unix_ms", BigInteger, nullable=False),
)

accounts = sa.Table(
    "accounts",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("holder", String(120), nullable=False),
    Column("currency", String(3), nullable=False),
    Column("limit_minor", BigInteger, nullable=False),
    # The sum of the account's receivable entries, kept beside them: the one row that is locked to post.
    Column("outstanding_minor", BigInteger, nullable=False),
    Column("opened_unix_ms", BigInteger, nullable=False),
    # Money that may still come back: repayments and vault deposits that are not final.
    Column("uncleared_minor", BigInteger, nullable=False, server_default=sa.text("0")),
    # The limit in force is line and vault together. A line above its target comes down, and funds that are
    # to leave the vault leave, as far as nothing owed or reserved needs them.
    Column("target_line_minor", BigInteger, nullable=False, server_default=sa.text("0")),
    Column("vault_minor", BigInteger, nullable=False, server_default=sa.text("0")),
    Column("vault_leaving_minor", BigInteger, nullable=False, server_default=sa.text("0")),
    # Days are the account's own, as ordinals (1 = 1 January of year 1): both databases can count them.
    Column("time_zone", String(64), nullable=False, server_default="Asia/Shanghai"),
    Column("closing_day", Integer, nullable=False, server_default="5"),
    # The day at whose end the last bill closed, and the next will; null before its cycle begins.
    Column("last_closing", Integer),
    Column("next_closing", Integer, index=True),
    # Grows with everything that changes what stands on its bills: their order.
    Column("credit_sequence", BigInteger, nullable=False, server_default="0"),
    # What loans by scene may come to, beside the line; and what was given up of what it owed.
    Column("loan_limit_minor", BigInteger, nullable=False, server_default="0"),
    Column("written_off_minor", BigInteger, nullable=False, server_default="0"),
    CheckConstraint("limit_minor >= 0", name="limit_not_negative"),
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
    # H: the highest counter in any authenticated TC or ARQC; the personalised start counter before the first.
    Column("highest_counter", BigInteger, nullable=False),
    # Its limit record in the last snapshot. Its sequence, and the version it changed in, move with its
    # content alone: a delta lists what changed, and nothing else. Version 0: none was issued yet.
    Column("record_version", BigInteger, nullable=False, default=0, index=True),
    Column("record_sequence", BigInteger, nullable=False, default=0),
    Column("record_ceiling", BigInteger, nullable=False, default=0),
    Column("record_per_tap_cap_minor", BigInteger, nullable=False, default=0),
    Column("record_status", String(8), nullable=False, default="closed"),
    Column("record_assurance", Integer, nullable=False, default=0),
    Column("issued_unix_ms", BigInteger, nullable=False),
    # The highest sequence of any record issued for it: by snapshot, grant or note.
    Column("last_sequence", BigInteger, nullable=False, server_default=sa.text("0")),
    # (run_start, run_end]: points of its counter line that are posted without a gap, as a rule up to the
    # newest payment, so that the claims they come from need not be read again and again. Empty: 0, 0.
    Column("run_start", BigInteger, nullable=False, default=0, server_default="0"),
    Column("run_end", BigInteger, nullable=False, default=0, server_default="0"),
    # Which instalment offers it may take, now and in its last limit record.
    Column("instalment_class", Integer, nullable=False, server_default="0"),
    Column("record_instalment_class", Integer, nullable=False, default=0, server_default="0"),
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
    # By whom: the same gateway may ask again, should the answer have been lost.
    Column("gateway_id", String(32)),
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
    Column("status", String(12), nullable=False, server_default="active"),
    # Since the last action on it; 0 before any.
    Column("status_since_unix_ms", BigInteger, nullable=False, server_default="0"),
    # Every approval it stamped up to here has been presented, says the gateway: later ones that claim an
    # earlier time are not believed, and what was granted to its terminal before is free again.
    Column("complete_until_unix_ms", BigInteger),
)

gateway_actions = sa.Table(
    "gateway_actions",
    metadata,
    # Who suspended, revoked or reinstated which gateway, when and why.
    Column("id", sa.Uuid, primary_key=True),
    Column("gateway_id", ForeignKey("gateways.id"), nullable=False, index=True),
    Column("action", String(12), nullable=False),
    Column("by", String(64), nullable=False),
    Column("reason", String(200), nullable=False),
    Column("at_unix_ms", BigInteger, nullable=False),
)

certificates = sa.Table(
    "certificates",
    metadata,
    # Every client certificate given out. Without its row none is let in.
    Column("serial", LargeBinary(20), primary_key=True),
    Column("gateway_id", ForeignKey("gateways.id"), nullable=False),
    # 1, 2, … of its gateway: clocks of replicas differ, this does not.
    Column("number", Integer, nullable=False),
    Column("public_key_digest", LargeBinary(32), nullable=False),
    Column("issued_unix_ms", BigInteger, nullable=False),
    Column("not_after_unix_ms", BigInteger, nullable=False),
    Column("first_used_unix_ms", BigInteger),
    Column("revoked_unix_ms", BigInteger),
    sa.UniqueConstraint("gateway_id", "number"),
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
    # INCOMPLETE until all its ceilings are on record; one that stays so was interrupted, and is passed over.
    Column("record_count", BigInteger, nullable=False),
    Column("valid_from_unix_s", BigInteger, nullable=False),
    Column("refresh_after_unix_s", BigInteger, nullable=False),
    Column("valid_until_unix_s", BigInteger, nullable=False),
)

publications = sa.Table(
    "publications",
    metadata,
    # One ceiling handed out for one token. By digest: an unchanged record in a new snapshot keeps its
    # sequence, and yet is another publication with another validity. No foreign keys: a snapshot writes
    # millions at once, each from the row it would name, and none of those is ever removed.
    Column("account_id", String(32), nullable=False, index=True),
    Column("token_id", String(32), primary_key=True),
    Column("digest", LargeBinary(16), primary_key=True),
    Column("kind", String(8), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    # Of a snapshot's records; grants and notes stand by themselves.
    Column("snapshot_version", BigInteger, index=True),
    # The only terminal that may use it; null for any.
    Column("terminal_id", String(8)),
    Column("issued_unix_s", BigInteger, nullable=False),
    Column("highest", BigInteger, nullable=False),
    Column("ceiling", BigInteger, nullable=False),
    # F: the lowest counter of which the card has proven that this was dead by then; null before.
    Column("evidence", BigInteger),
    Column("valid_until_unix_s", BigInteger, nullable=False),
    Column("stands_until_unix_s", BigInteger, nullable=False),
    Column("lapsed", Boolean, nullable=False),
    CheckConstraint("ceiling >= highest", name="ceiling_not_below_highest"),
    sa.Index(
        "publications_of_terminals",
        "terminal_id",
        sqlite_where=sa.text("terminal_id IS NOT NULL AND NOT lapsed"),
        postgresql_where=sa.text("terminal_id IS NOT NULL AND NOT lapsed"),
    ),
)

online_answers = sa.Table(
    "online_answers",
    metadata,
    # What was answered on the spot, so that the same question gets the same answer. `asker` is a gateway, or
    # `wallet`; `sale_id` what the card was bound to: a sale, or a challenge of ours.
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("token_id", ForeignKey("tokens.id"), primary_key=True),
    Column("asker", String(32), primary_key=True),
    Column("sale_id", sa.Uuid, primary_key=True),
    Column("purpose", String(8), primary_key=True),
    Column("content_digest", LargeBinary(32), nullable=False),
    Column("answer", String, nullable=False),
    Column("answered_unix_ms", BigInteger, nullable=False),
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
    Column("kind", String(24), nullable=False),
    # Of a reversal or refund: the authorization's record id, whether that has arrived or not.
    Column("about", sa.Uuid),
    sa.Index(None, "gateway_id", "sequence"),
    sa.Index(None, "gateway_id", "about"),
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
    # How the card names the TC it gave before this one.
    Column("previous_digest", LargeBinary(8)),
    CheckConstraint("counter_before < counter_after", name="interval_not_empty"),
    # Few, and each batch asks whether its tokens have any.
    sa.Index(
        "claims_not_posted",
        "token_id",
        sqlite_where=sa.text("NOT posted"),
        postgresql_where=sa.text("NOT posted"),
    ),
)

transfers = sa.Table(
    "transfers",
    metadata,
    Column("account_id", ForeignKey("accounts.id"), primary_key=True),
    Column("id", sa.Uuid, primary_key=True),
    Column("kind", String(16), nullable=False),
    # What a gateway presented; null where money comes from elsewhere.
    Column("record_id", sa.Uuid),
    Column("token_id", ForeignKey("tokens.id")),
    Column("gateway_id", ForeignKey("gateways.id")),
    Column("tapped_unix_ms", BigInteger, nullable=False),
    Column("posted_unix_ms", BigInteger, nullable=False),
    # Of a reversal or refund: the payment's transfer.
    Column("original_id", sa.Uuid),
    # Of a repayment or vault movement: what the bank calls it.
    Column("reference", String(64)),
    sa.ForeignKeyConstraint(["account_id", "original_id"], ["transfers.account_id", "transfers.id"]),
    sa.Index(None, "account_id", "original_id"),
    # What was posted since a bill closed: few rows at the end of a long table.
    sa.Index(None, "posted_unix_ms", postgresql_using="brin"),
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
    Column("amount_minor", BigInteger, nullable=False),
    CheckConstraint("amount_minor <> 0", name="amount_not_zero"),
    sa.ForeignKeyConstraint(["account_id", "transfer_id"], ["transfers.account_id", "transfers.id"]),
    sa.Index(None, "book", "owner_id"),
)

movements = sa.Table(
    "movements",
    metadata,
    # Money that came in for an account or was asked back from it, once per reference: repayments, funds
    # into the vault, funds out of it.
    Column("account_id", ForeignKey("accounts.id"), primary_key=True),
    Column("reference", String(64), primary_key=True),
    Column("purpose", String(12), nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    Column("state", String(12), nullable=False),
    Column("received_unix_ms", BigInteger, nullable=False),
    Column("settled_unix_ms", BigInteger),
    # Of a repayment: what went to charges, loans and losses, which are owed outside the limit.
    Column("outside_minor", BigInteger, nullable=False, server_default="0"),
    CheckConstraint("amount_minor > 0", name="amount_positive"),
)

plans = sa.Table(
    "plans",
    metadata,
    # A schedule that principal is repaid by. A purchase's has the id of its payment's transfer.
    Column("account_id", ForeignKey("accounts.id"), primary_key=True),
    Column("id", sa.Uuid, primary_key=True),
    Column("kind", String(12), nullable=False),
    # Whose principal it is: the line's, or a loan's.
    Column("book", String(24), nullable=False),
    Column("offer", String, nullable=False),
    Column("quote", String, nullable=False),
    Column("periods", Integer, nullable=False),
    Column("principal_minor", BigInteger, nullable=False),
    # Less what was refunded; and of that, what no bill has taken yet.
    Column("left_minor", BigInteger, nullable=False),
    Column("ahead_minor", BigInteger, nullable=False),
    Column("next_number", Integer, nullable=False),
    Column("merchant_id", String(15)),
    Column("merchant_fee_minor", BigInteger, nullable=False),
    Column("made_unix_ms", BigInteger, nullable=False),
    CheckConstraint("ahead_minor >= 0", name="ahead_not_negative"),
)

plan_instalments = sa.Table(
    "plan_instalments",
    metadata,
    # What is ahead is spread anew by a refund; what a bill has taken stays.
    Column("account_id", String(32), primary_key=True),
    Column("plan_id", sa.Uuid, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("principal_minor", BigInteger, nullable=False),
    Column("fee_minor", BigInteger, nullable=False),
    # The bill that took it; -1 where it was repaid early, null while it is ahead.
    Column("closing", Integer),
    sa.ForeignKeyConstraint(["account_id", "plan_id"], ["plans.account_id", "plans.id"]),
)

loans = sa.Table(
    "loans",
    metadata,
    # Bound to a purpose and paid out to the merchant; its schedule is the plan of the same id.
    Column("account_id", String(32), primary_key=True),
    Column("id", sa.Uuid, primary_key=True),
    Column("scene", String(16), nullable=False),
    Column("purpose", String(120), nullable=False),
    Column("merchant_id", ForeignKey("merchants.id"), nullable=False),
    Column("reference", String(64), nullable=False),
    sa.ForeignKeyConstraint(["account_id", "id"], ["plans.account_id", "plans.id"]),
    sa.UniqueConstraint("account_id", "reference"),
)

bills = sa.Table(
    "bills",
    metadata,
    Column("account_id", ForeignKey("accounts.id"), primary_key=True),
    Column("closing", Integer, primary_key=True, autoincrement=False),
    Column("previous_closing", Integer, nullable=False),
    Column("due_on", Integer, nullable=False),
    Column("cutoff_unix_ms", BigInteger, nullable=False),
    Column("closed_unix_ms", BigInteger, nullable=False),
    Column("policy_version", Integer, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    # Purchases of this cycle, below zero what was overpaid; older ones that revolve; the rest of it.
    Column("purchases_minor", BigInteger, nullable=False),
    Column("carried_minor", BigInteger, nullable=False),
    Column("instalments_minor", BigInteger, nullable=False),
    Column("instalment_fees_minor", BigInteger, nullable=False),
    Column("interest_minor", BigInteger, nullable=False),
    Column("overdue_fee_minor", BigInteger, nullable=False),
    Column("arrears_minor", BigInteger, nullable=False),
    Column("total_minor", BigInteger, nullable=False),
    Column("minimum_minor", BigInteger, nullable=False),
    # What must be paid of this very bill, older arrears apart; and the overdue fees charged for it so far.
    Column("due_minor", BigInteger, nullable=False),
    Column("overdue_charged_minor", BigInteger, nullable=False),
)

items = sa.Table(
    "items",
    metadata,
    # What is owed, thing by thing. Without a closing it waits for the next bill.
    Column("account_id", ForeignKey("accounts.id"), primary_key=True),
    Column("id", String(64), primary_key=True),
    Column("closing", Integer),
    Column("due_on", Integer),
    Column("origin", String(12), nullable=False),
    Column("part", String(16), nullable=False),
    Column("book", String(24), nullable=False),
    Column("plan_id", sa.Uuid),
    # Need not be paid on this bill: the next one takes it.
    Column("revolves", Boolean, nullable=False),
    Column("since", Integer, nullable=False),
    # Principal bears interest from the day after this one.
    Column("bears_from", Integer),
    Column("amount_minor", BigInteger, nullable=False),
    Column("owed_minor", BigInteger, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    CheckConstraint("owed_minor >= 0", name="owed_not_negative"),
    CheckConstraint("amount_minor >= owed_minor", name="owed_not_above"),
    sa.Index(
        "items_owed",
        "account_id",
        sqlite_where=sa.text("owed_minor > 0"),
        postgresql_where=sa.text("owed_minor > 0"),
    ),
)

allocations = sa.Table(
    "allocations",
    metadata,
    # What lowered an item, or raised it again as money was taken back: it is owed its amount less these.
    Column("account_id", String(32), primary_key=True),
    Column("item_id", String(64), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("cause", String(12), nullable=False),
    Column("reference", String(64)),
    Column("day", Integer, nullable=False),
    Column("at_unix_ms", BigInteger, nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    sa.ForeignKeyConstraint(["account_id", "item_id"], ["items.account_id", "items.id"]),
    sa.Index(None, "account_id", "day"),
    CheckConstraint("amount_minor <> 0", name="amount_not_zero"),
)

scorecards = sa.Table(
    "scorecards",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("body", String, nullable=False),
    Column("since_unix_ms", BigInteger, nullable=False),
)

evaluations = sa.Table(
    "evaluations",
    metadata,
    Column("account_id", ForeignKey("accounts.id"), primary_key=True),
    Column("id", sa.Uuid, primary_key=True),
    Column("scorecard_version", Integer, nullable=False),
    Column("features", String, nullable=False),
    Column("points", Integer, nullable=False),
    Column("limit_minor", BigInteger, nullable=False),
    Column("upgrades", Boolean, nullable=False),
    Column("reasons", String, nullable=False),
    Column("evaluated_unix_ms", BigInteger, nullable=False),
)

renunciations = sa.Table(
    "renunciations",
    metadata,
    # A TC that a gateway asked for and never got; it will not present it. Until the card's next
    # cryptogram points back to it, nobody knows where on the line it stands, or whether it is there.
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("token_id", ForeignKey("tokens.id"), primary_key=True),
    Column("previous_digest", LargeBinary(8), primary_key=True),
    Column("gateway_id", String(32), nullable=False),
    Column("record_id", sa.Uuid, nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    CheckConstraint("amount_minor > 0", name="amount_positive"),
)

write_offs = sa.Table(
    "write_offs",
    metadata,
    # Points that were claimed by a renounced TC: nobody will present them.
    Column("account_id", ForeignKey("accounts.id"), nullable=False, index=True),
    Column("token_id", ForeignKey("tokens.id"), primary_key=True),
    Column("counter_after", BigInteger, primary_key=True, autoincrement=False),
    Column("counter_before", BigInteger, nullable=False),
    Column("gateway_id", String(32), nullable=False),
    Column("record_id", sa.Uuid, nullable=False),
    CheckConstraint("counter_before < counter_after", name="interval_not_empty"),
)

reviews = sa.Table(
    "reviews",
    metadata,
    # Genuine payments that wait for somebody's decision.
    Column("gateway_id", ForeignKey("gateways.id"), primary_key=True),
    Column("record_id", sa.Uuid, primary_key=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("why", String(16), nullable=False),
    Column("held_unix_ms", BigInteger, nullable=False),
    Column("decision", String(12)),
    Column("note", String(400)),
    Column("decided_unix_ms", BigInteger),
    sa.Index(
        "reviews_open",
        "held_unix_ms",
        sqlite_where=sa.text("decision IS NULL"),
        postgresql_where=sa.text("decision IS NULL"),
    ),
)

conflicts = sa.Table(
    "conflicts",
    metadata,
    # Two genuine cryptograms of one token that claim the same points. The evidence is the two
    # presentments; no token number stands here.
    Column("id", sa.Uuid, primary_key=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("token_id", ForeignKey("tokens.id"), nullable=False),
    Column("gateway_id", String(32), nullable=False),
    Column("record_id", sa.Uuid, nullable=False),
    Column("other_gateway_id", String(32), nullable=False),
    Column("other_record_id", sa.Uuid, nullable=False),
    Column("proven_unix_ms", BigInteger, nullable=False),
    sa.Index(None, "proven_unix_ms"),
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
    sa.Index(None, "raised_unix_ms"),
)


class Contended(Unavailable):
    """Another transaction came first; the same again can succeed."""


class Store:
    """The database. One instance per process; safe to share between threads."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @classmethod
    def create(cls, url: sa.URL) -> Store:
        """Make the tables in an empty database.

        Raises:
            Conflict: it is not empty.
            Unavailable: it is not there.
        """
        store = cls(make_engine(url))
        try:
            with store.write() as connection:
                if sa.inspect(connection).get_table_names():
                    raise Conflict("the database is not empty", advice="give the ledger one of its own")
                migrations.migrate(connection)
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def open(cls, url: sa.URL) -> Store:
        """
        Raises:
            InvalidConfiguration: no database there, or one whose tables are of another version.
            Unavailable: it is not there now.
        """
        store = cls.connect(url)
        try:
            with store.read() as connection:
                version = migrations.current(connection)
        except BaseException:
            store.close()
            raise
        if version != migrations.HEAD:
            store.close()
            raise InvalidConfiguration(
                f"the ledger's tables are of version {version or 'none'}, this program's {migrations.HEAD}",
                where="database",
                advice="stop every replica and run `pos-gateway ledger migrate`",
            )
        return store

    @classmethod
    def connect(cls, url: sa.URL) -> Store:
        """Open whatever version its tables have, to migrate it.

        Raises:
            InvalidConfiguration: no database file there.
        """
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
            raise InvalidConfiguration("no ledger database", where=str(url.database))
        return cls(make_engine(url))

    def migrate(self, to: str) -> tuple[str | None, str | None]:
        """Up or down to a version, in one transaction; returns the version before and after.

        Raises:
            InvalidConfiguration: no such version.
        """
        with self.write() as connection:
            before = migrations.current(connection)
            migrations.migrate(connection, to)
            return before, migrations.current(connection)

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One durable transaction: committed at the end of the block, undone by any exception in it.

        Raises:
            Unavailable: the database could not be had (in time); nothing was done.
            OutcomeUnknown: the commit failed; whether it reached the disk is open.
        """
        with self._connection() as connection:
            transaction = _begin(connection)
            try:
                yield connection
            except BaseException as error:
                transaction.rollback()
                if (known := _known(error)) is not None:
                    raise known from error
                raise
            try:
                transaction.commit()
            except DBAPIError as error:
                if isinstance(known := _known(error), Contended):
                    raise known from error
                raise OutcomeUnknown(
                    f"the ledger's commit failed ({type(error.orig).__name__})",
                    advice="check the disk, restart the ledger, and send the same batch again",
                ) from error

    def transact(self, work: Callable[[sa.Connection], _T]) -> _T:
        """`work` in one durable transaction; when another one came first, the same work again.

        Raises:
            Unavailable, OutcomeUnknown: see `write`.
        """
        for attempt in range(_ATTEMPTS - 1):
            try:
                with self.write() as connection:
                    return work(connection)
            except Contended:
                time.sleep(random.uniform(0, _FIRST_PAUSE_S * 2**attempt))  # noqa: S311 - spreads retries
        with self.write() as connection:
            return work(connection)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One consistent view; does not wait for a writer.

        Raises:
            Unavailable: the database could not be had.
        """
        with self._connection() as connection:
            transaction = _begin(connection.execution_options(reading=True))
            try:
                yield connection
            except DBAPIError as error:
                if (known := _known(error)) is not None:
                    raise known from error
                raise
            finally:
                transaction.rollback()

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """One publisher at a time, among all replicas, over as many transactions as it takes. On SQLite
        they all share one machine and the lock on its repository.

        Raises:
            Unavailable: another one publishes, and for long.
        """
        if self._engine.dialect.name != "postgresql":
            yield
            return
        with self._connection() as connection:
            holding = connection.execution_options(isolation_level="AUTOCOMMIT")
            try:
                holding.exec_driver_sql(f"SELECT pg_advisory_lock({_PUBLISHING})")
            except DBAPIError as error:
                raise _known(error) or error from error
            try:
                yield
            finally:
                # Should the connection be lost, so is the lock.
                with suppress(DBAPIError):
                    holding.exec_driver_sql(f"SELECT pg_advisory_unlock({_PUBLISHING})")

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _connection(self) -> Iterator[sa.Connection]:
        try:
            connection = self._engine.connect()
        except (OperationalError, sa.exc.TimeoutError) as error:
            raise _unavailable(error) from error
        with connection:
            yield connection


def current_epoch(connection: sa.Connection) -> UUID:
    """Which life of the ledger it is: another one after a restore from a backup."""
    newest = sa.select(epochs.c.id).order_by(epochs.c.number.desc()).limit(1)
    epoch: UUID = connection.scalars(newest).one()
    return epoch


def _begin(connection: sa.Connection) -> sa.RootTransaction:
    try:
        return connection.begin()
    except OperationalError as error:
        raise _unavailable(error) from error


def _known(error: BaseException) -> Unavailable | None:
    """What PostgreSQL tells us to try again, now or later; its driver's own errors come from COPY."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    state = getattr(cause, "sqlstate", None) or ""
    if state in _CONTENTION:
        return Contended("another transaction of the ledger came first", advice="try again in a moment")
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    if lost or state.startswith(_NOT_NOW) or (isinstance(cause, psycopg.OperationalError) and not state):
        return _unavailable(cause or error)
    return None


def _unavailable(error: BaseException) -> Unavailable:
    why = str(error.orig if isinstance(error, DBAPIError) else error).strip().splitlines()
    return Unavailable(
        f"the ledger's database is not to be had ({why[0] if why else type(error).__name__})",
        advice="try again in a moment",
    )
