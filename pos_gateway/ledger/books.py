"""The books of double entry, and transfers that come from no gateway."""

from __future__ import annotations

import uuid
from typing import Final

import sqlalchemy as sa

from pos_gateway.ledger import store
from pos_gateway.ledger.accounts import LockedAccount

RECEIVABLE: Final = "customer_receivable"
PAYABLE: Final = "merchant_payable"
ISSUER_FRAUD: Final = "issuer_fraud"
"""What the issuer pays merchants for taps of a cloned card."""
ISSUER_LATE: Final = "issuer_late"
"""What the issuer pays merchants for payments that it can charge to nobody any more."""
BANK: Final = "bank_clearing"
"""Money that came in or went out."""
VAULT: Final = "customer_vault"
"""Funds that customers have locked: theirs, held by the issuer."""

CHARGES: Final = "customer_charges"
"""Interest and fees that customers owe: outside the limit, so never in the receivable."""
LOANS: Final = "customer_loans"
"""Principal of loans by scene: beside the line."""
INTEREST: Final = "income_interest"
INSTALMENT_FEES: Final = "income_instalment_fee"
OVERDUE_FEES: Final = "income_overdue_fee"
MERCHANT_FEES: Final = "income_merchant_fee"
LOSSES: Final = "credit_losses"
"""What was given up: written off, or waived."""
RECOVERIES: Final = "credit_recoveries"
"""What was paid all the same of what had been written off."""

ISSUER: Final = "issuer"
"""The owner of the issuer's own books."""


def book(
    connection: sa.Connection,
    account: LockedAccount,
    *,
    kind: str,
    debit: tuple[str, str],
    credit: tuple[str, str],
    amount_minor: int,
    now_unix_ms: int,
    reference: str | None = None,
    record: tuple[str, uuid.UUID, str] | None = None,
    original_id: uuid.UUID | None = None,
) -> uuid.UUID:
    """One transfer of an account's money; `debit` and `credit` are book and owner.

    With a reference, or a `record` (gateway, record id, token) that is paid for, the transfer's id is
    known from it: the same again cannot be booked twice.
    """
    transfer_id = uuid.uuid4()
    gateway_id, record_id, token_id = record or (None, None, None)
    if reference is not None:
        transfer_id = uuid.uuid5(_NAMESPACE, "\0".join((account.id, kind, reference)))
    elif record_id is not None:
        transfer_id = uuid.uuid5(record_id, gateway_id or "")
    connection.execute(
        store.transfers.insert().values(
            account_id=account.id,
            id=transfer_id,
            kind=kind,
            record_id=record_id,
            token_id=token_id,
            gateway_id=gateway_id,
            tapped_unix_ms=now_unix_ms,
            # Somebody may have waited for the account while its cycle was closed.
            posted_unix_ms=max(now_unix_ms, account.closed_until_unix_ms),
            reference=reference,
            original_id=original_id,
        )
    )
    connection.execute(
        store.entries.insert(),
        [
            {
                "account_id": account.id,
                "transfer_id": transfer_id,
                "line": line,
                "book": name,
                "owner_id": owner,
                "currency": account.currency,
                "amount_minor": moved_minor,
            }
            for line, ((name, owner), moved_minor) in enumerate(
                ((debit, amount_minor), (credit, -amount_minor))
            )
        ],
    )
    return transfer_id


_NAMESPACE: Final = uuid.UUID("0b5fd2b2-6a2e-4c2f-9a54-6d5d0c6f5a11")
