"""Presentments: a gateway's batch in, one verdict per record out, every genuine tap posted exactly once.

    batch signature ─► each record's evidence (no database) ─► one transaction: verdicts, entries, invariant

The evidence is examined here; `settlement` is the transaction.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping

import sqlalchemy as sa

from pos_gateway.errors import AuthenticationFailed, InvalidMessage, PosGatewayError
from pos_gateway.ledger import gateways, store
from pos_gateway.ledger.corrections import read_correction
from pos_gateway.ledger.evidence import Issuer, examine
from pos_gateway.ledger.gateways import Gateway
from pos_gateway.ledger.settlement import RECEIVABLE, Examined, RecordVerdict, settle
from pos_gateway.ledger.store import Store
from pos_gateway.records import MAX_BATCH_RECORDS, Record, parse_object, verify_batch


def present(
    database: Store,
    issuer: Issuer,
    gateway_id: str,
    body: bytes,
    signature: bytes,
    now_unix_ms: Callable[[], int],
) -> list[RecordVerdict]:
    """Take a batch; the verdicts are durable when this returns, in the order of the records.

    Raises:
        AuthenticationFailed: steps `gateway`, `batch signature`: nothing in it was looked at.
        InvalidMessage: the body is no batch.
        Unavailable, OutcomeUnknown: see `Store.write`; the same batch can be sent again.
    """
    with database.read() as connection:
        gateway = gateways.find(connection, gateway_id)
    verify_batch(body, signature, gateway.key)
    known: set[bytes] = set()
    examined = [_examine(raw, gateway, issuer, known) for raw in _records(body, gateway_id)]
    return database.transact(
        lambda connection: settle(connection, gateway, issuer.currency, now_unix_ms(), examined)
    )


def trial_balance(connection: sa.Connection) -> dict[str, int]:
    """Total per book in minor units. They sum to zero."""
    columns = store.entries.c
    query = sa.select(columns.book, sa.func.sum(columns.amount_minor)).group_by(columns.book)
    return {book: int(total) for book, total in connection.execute(query)}


def check_books(connection: sa.Connection) -> None:
    """Hold the whole ledger to double entry: every transfer, and every account's kept total.

    Raises:
        AuthenticationFailed: step `double entry`: names one transfer or account that does not add up.
    """
    entries, accounts_ = store.entries.c, store.accounts.c
    crooked = (
        sa.select(entries.transfer_id)
        .group_by(entries.account_id, entries.transfer_id, entries.currency)
        .having(sa.func.sum(entries.amount_minor) != 0)
    )
    for transfer_id in connection.scalars(crooked):
        raise AuthenticationFailed(f"transfer {transfer_id} does not sum to zero", step="double entry")
    owed = (
        sa.select(entries.owner_id, sa.func.sum(entries.amount_minor).label("total"))
        .where(entries.book == RECEIVABLE)
        .group_by(entries.owner_id)
        .subquery()
    )
    differing = (
        sa.select(accounts_.id)
        .join_from(store.accounts, owed, accounts_.id == owed.c.owner_id, isouter=True)
        .where(accounts_.outstanding_minor != sa.func.coalesce(owed.c.total, 0))
    )
    for account_id in connection.scalars(differing):
        raise AuthenticationFailed(
            f"account {account_id} owes another sum than its entries say", step="double entry"
        )


def _records(body: bytes, gateway_id: str) -> list[object]:
    batch = parse_object(body, where="batch")
    if batch.get("gateway_id") != gateway_id:
        raise InvalidMessage("another gateway's batch", where="gateway_id")
    raw = batch.get("records")
    if not isinstance(raw, list):
        raise InvalidMessage("must be a list", where="records")
    if len(raw) > MAX_BATCH_RECORDS:
        raise InvalidMessage(f"{len(raw)} records, at most {MAX_BATCH_RECORDS} at once", where="records")
    return raw


def _examine(raw: object, gateway: Gateway, issuer: Issuer, known: set[bytes]) -> Examined:
    record_id = _claimed_id(raw)
    try:
        record = Record.from_wire(raw)
        record.verify(gateway.key, known)
    except PosGatewayError as error:
        return Examined(record_id, reason=f"The record was not accepted: {error.reason}.")
    try:
        if record.kind.corrects:
            correction = read_correction(record, gateway, issuer.currency)
            return Examined(record_id, record, correction=correction)
        return Examined(record_id, record, tap=examine(record, gateway, issuer))
    except PosGatewayError as error:
        what = "correction was not accepted" if record.kind.corrects else "payment is not proven"
        return Examined(record_id, record, reason=f"The {what}: {error.reason}.")


def _claimed_id(raw: object) -> str:
    """The id an unreadable record goes by; nothing else that was sent is repeated or kept."""
    try:
        return str(uuid.UUID(raw["id"])) if isinstance(raw, Mapping) else ""
    except (KeyError, ValueError, TypeError, AttributeError):
        return ""
