"""Presentments: a gateway's batch in, one verdict per record out, every genuine tap posted exactly once.

    batch signature ─► each record's evidence (no database) ─► one transaction: verdicts, entries, invariant

`verification` examines the evidence; `settlement` is the transaction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import sqlalchemy as sa

from pos_gateway.errors import AuthenticationFailed, InvalidMessage
from pos_gateway.ledger import gateways, store
from pos_gateway.ledger.books import CHARGES, LOANS, RECEIVABLE, VAULT
from pos_gateway.ledger.config import policy_in_force
from pos_gateway.ledger.gateways import Gateway, GatewayStatus
from pos_gateway.ledger.purposes import State
from pos_gateway.ledger.settlement import Examined, RecordVerdict, settle
from pos_gateway.ledger.store import Store, current_epoch
from pos_gateway.ledger.verification import Verifier
from pos_gateway.money import Currency
from pos_gateway.records import MAX_BATCH_RECORDS, parse_object, verify_batch


def present(
    database: Store,
    verifier: Verifier,
    currency: Currency,
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
        guarantee, epoch = policy_in_force(connection).guarantee, current_epoch(connection)
    verify_batch(body, signature, gateway.key)
    batch = parse_object(body, where="batch")
    examined = verifier.examine(gateway, _records(batch, gateway_id))
    # Said of another epoch, it is not true of this ledger: it may have forgotten what it acknowledged.
    complete_until_unix_ms = _complete_until(batch) if batch.get("epoch") == str(epoch) else 0
    return database.transact(
        lambda connection: settle(
            connection, gateway, currency, now_unix_ms(), examined, guarantee, complete_until_unix_ms
        )
    )


def adopt(
    database: Store,
    verifier: Verifier,
    currency: Currency,
    presenter_id: str,
    body: bytes,
    signature: bytes,
    now_unix_ms: Callable[[], int],
) -> list[RecordVerdict]:
    """Take a batch of a dead gateway's records from another gateway of the same merchant. The batch is signed
    by who presents it; each record stands by the dead one's signature, and is settled as that one's.

    Raises:
        AuthenticationFailed: steps `gateway` (not active, or another merchant's), `batch signature`.
        InvalidMessage, Unavailable, OutcomeUnknown: see `present`.
        NotFound: no such gateway.
    """
    batch = parse_object(body, where="batch")
    dead_id = batch.get("gateway_id")
    if not isinstance(dead_id, str):
        raise InvalidMessage("must name a gateway", where="gateway_id")
    with database.read() as connection:
        presenter, dead = gateways.find(connection, presenter_id), gateways.find(connection, dead_id)
    verify_batch(body, signature, presenter.key)
    presenter.require(GatewayStatus.ACTIVE)
    if presenter.merchant.id != dead.merchant.id:
        raise AuthenticationFailed(
            "it presents another merchant's records",
            step="gateway",
            advice="bring that journal to the issuer",
        )
    return present_records(database, verifier, currency, dead_id, _records(batch, dead_id), now_unix_ms)


def present_records(
    database: Store,
    verifier: Verifier,
    currency: Currency,
    gateway_id: str,
    records: list[object],
    now_unix_ms: Callable[[], int],
) -> list[RecordVerdict]:
    """Take records that a gateway signed one by one, whoever brings them; see `present`."""
    if len(records) > MAX_BATCH_RECORDS:
        raise InvalidMessage(f"{len(records)} records, at most {MAX_BATCH_RECORDS} at once", where="records")
    with database.read() as connection:
        gateway = gateways.find(connection, gateway_id)
        guarantee = policy_in_force(connection).guarantee
    examined = verifier.examine(gateway, records)
    return database.transact(
        lambda connection: settle(connection, gateway, currency, now_unix_ms(), examined, guarantee, 0)
    )


def examine(verifier: Verifier, gateway: Gateway, body: bytes) -> list[Examined]:
    """What a batch whose signature holds says, before the database is asked.

    Raises:
        InvalidMessage: the body is no batch.
        Unavailable: see `Verifier.examine`.
    """
    return verifier.examine(gateway, _records(parse_object(body, where="batch"), gateway.id))


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
    for book, sign, kept, what in (
        (RECEIVABLE, 1, accounts_.outstanding_minor, "owes another sum"),
        (VAULT, -1, accounts_.vault_minor, "has other funds in the vault"),
    ):
        booked = (
            sa.select(entries.owner_id, sa.func.sum(entries.amount_minor).label("total"))
            .where(entries.book == book)
            .group_by(entries.owner_id)
            .subquery()
        )
        differing = (
            sa.select(accounts_.id)
            .join_from(store.accounts, booked, accounts_.id == booked.c.owner_id, isouter=True)
            .where(kept != sign * sa.func.coalesce(booked.c.total, 0))
        )
        for account_id in connection.scalars(differing):
            raise AuthenticationFailed(
                f"account {account_id} {what} than its entries say", step="double entry"
            )
    movements = store.movements.c
    uncleared = (
        sa.select(
            movements.account_id, sa.func.sum(movements.amount_minor - movements.outside_minor).label("total")
        )
        .where(movements.state == State.UNCLEARED.value)
        .group_by(movements.account_id)
        .subquery()
    )
    unclear = (
        sa.select(accounts_.id)
        .join_from(store.accounts, uncleared, accounts_.id == uncleared.c.account_id, isouter=True)
        .where(accounts_.uncleared_minor != sa.func.coalesce(uncleared.c.total, 0))
    )
    for account_id in connection.scalars(unclear):
        raise AuthenticationFailed(
            f"account {account_id} has other uncleared money than its movements say", step="double entry"
        )
    _check_debts(connection)
    claims, tokens = store.claims.c, store.tokens.c
    runs = (
        sa.select(claims.token_id, sa.func.sum(claims.counter_after - claims.counter_before).label("total"))
        .join_from(store.claims, store.tokens, claims.token_id == tokens.id)
        .where(
            claims.posted, claims.counter_before >= tokens.run_start, claims.counter_after <= tokens.run_end
        )
        .group_by(claims.token_id)
        .subquery()
    )
    broken = (
        sa.select(tokens.id)
        .join_from(store.tokens, runs, tokens.id == runs.c.token_id, isouter=True)
        .where(tokens.run_end - tokens.run_start != sa.func.coalesce(runs.c.total, 0))
    )
    for token_id in connection.scalars(broken):
        raise AuthenticationFailed(f"token {token_id}'s run is not what was posted", step="double entry")


def _check_debts(connection: sa.Connection) -> None:
    """Charges and loans are owed item by item what their books say."""
    entries, items, plans = store.entries.c, store.items.c, store.plans.c
    told: dict[tuple[str, str], int] = defaultdict(int)
    for query in (
        sa.select(items.book, items.account_id, sa.func.sum(items.owed_minor))
        .where(items.owed_minor > 0, items.book.in_((CHARGES, LOANS)))
        .group_by(items.book, items.account_id),
        sa.select(plans.book, plans.account_id, sa.func.sum(plans.ahead_minor))
        .where(plans.book == LOANS)
        .group_by(plans.book, plans.account_id),
    ):
        for book, account_id, total in connection.execute(query):
            told[book, account_id] += int(total)
    booked = (
        sa.select(entries.book, entries.owner_id, sa.func.sum(entries.amount_minor))
        .where(entries.book.in_((CHARGES, LOANS)))
        .group_by(entries.book, entries.owner_id)
    )
    for book, account_id, total in connection.execute(booked):
        told[book, account_id] -= int(total)
    for (book, account_id), difference in told.items():
        if difference:
            raise AuthenticationFailed(
                f"account {account_id} owes {difference} more than {book} says", step="double entry"
            )


def _complete_until(batch: Mapping[str, object]) -> int:
    until_unix_ms = batch.get("complete_until_unix_ms", 0)
    if not isinstance(until_unix_ms, int) or isinstance(until_unix_ms, bool) or until_unix_ms < 0:
        raise InvalidMessage("must be a time in milliseconds", where="complete_until_unix_ms")
    return until_unix_ms


def _records(batch: Mapping[str, object], gateway_id: str) -> list[object]:
    if batch.get("gateway_id") != gateway_id:
        raise InvalidMessage("another gateway's batch", where="gateway_id")
    raw = batch.get("records")
    if not isinstance(raw, list):
        raise InvalidMessage("must be a list", where="records")
    if len(raw) > MAX_BATCH_RECORDS:
        raise InvalidMessage(f"{len(raw)} records, at most {MAX_BATCH_RECORDS} at once", where="records")
    return raw
