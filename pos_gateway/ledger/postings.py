"""Presentments: a gateway's batch in, one verdict per record out, every genuine tap posted exactly once.

    batch signature ─► each record's evidence (no database) ─► one transaction: verdicts, entries, invariant

A payment debits the customer's receivable and credits the merchant's payable. Whatever happens twice
(the batch, the record, the same points on a counter line) is seen inside that one transaction.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from pos_gateway.errors import AuthenticationFailed, InvalidMessage, PosGatewayError
from pos_gateway.ledger import accounts, gateways, store
from pos_gateway.ledger.accounts import TokenLine
from pos_gateway.ledger.evidence import Issuer, Tap, examine
from pos_gateway.ledger.gateways import Gateway
from pos_gateway.ledger.reserve import contains
from pos_gateway.ledger.store import Store
from pos_gateway.records import (
    MAX_BATCH_RECORDS,
    Record,
    Verdict,
    canonical_json,
    parse_object,
    verify_batch,
)

RECEIVABLE: Final = "customer_receivable"
PAYABLE: Final = "merchant_payable"

_POSTED: Final = "Paid."
_DUPLICATE: Final = "Paid; it had been presented before."
_UNKNOWN: Final = "This issuer does not know the card."


class AlarmKind(Enum):
    """What somebody at the issuer must look at."""

    CHANGED_RECORD = "changed_record"
    """A record whose hash or signature does not hold."""
    CHANGED_CONTENT = "changed_content"
    """One id, two contents, both signed by the gateway."""
    SEQUENCE_REUSED = "sequence_reused"
    """One journal place, two records: the journal was copied or rolled back."""
    OVERLAP = "overlap"
    """Two genuine cryptograms claim the same points: the card was cloned."""
    FALSE_EVIDENCE = "false_evidence"
    """A gateway presented what no card of ours signed."""


@dataclass(frozen=True, slots=True)
class RecordVerdict:
    """The answer to one record. `reason` is a sentence for the shop's staff."""

    record_id: str
    verdict: Verdict
    reason: str

    def to_wire(self) -> dict[str, str]:
        return {"id": self.record_id, "verdict": self.verdict.value, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class _Examined:
    """One record of a batch before the database was asked. Without `record` it could not be read, or is
    not what its gateway signed; without `tap` its evidence does not hold, and `reason` says why."""

    record_id: str
    record: Record | None
    tap: Tap | None
    reason: str = ""


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
    examined = [_examine(raw, gateway, issuer) for raw in _records(body, gateway_id)]
    with database.write() as connection:
        return _Settlement(connection, gateway, issuer, now_unix_ms()).settle(examined)


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


def _examine(raw: object, gateway: Gateway, issuer: Issuer) -> _Examined:
    record_id = _claimed_id(raw)
    try:
        record = Record.from_wire(raw)
        record.verify(gateway.key)
    except PosGatewayError as error:
        return _Examined(record_id, None, None, f"The record was not accepted: {error.reason}.")
    try:
        return _Examined(record_id, record, examine(record, gateway, issuer))
    except PosGatewayError as error:
        return _Examined(record_id, record, None, f"The payment is not proven: {error.reason}.")


def _claimed_id(raw: object) -> str:
    """The id an unreadable record goes by; nothing else that was sent is repeated or kept."""
    try:
        return str(uuid.UUID(raw["id"])) if isinstance(raw, Mapping) else ""
    except (KeyError, ValueError, TypeError, AttributeError):
        return ""


class _Seen(NamedTuple):
    """What became of a record presented before."""

    content_digest: bytes
    verdict: Verdict
    reason: str
    account_id: str | None


class _Settlement:
    """One batch inside its transaction: read what it touches, judge record by record, write it all."""

    def __init__(self, connection: sa.Connection, gateway: Gateway, issuer: Issuer, now_unix_ms: int) -> None:
        self._connection = connection
        self._gateway = gateway
        self._issuer = issuer
        self._now_unix_ms = now_unix_ms
        self._now_unix_s = now_unix_ms // 1000
        self._lines: dict[bytes, TokenLine] = {}
        self._published: dict[tuple[str, bytes], Any] = {}
        self._seen: dict[uuid.UUID, _Seen] = {}
        self._sequences: dict[int, uuid.UUID] = {}
        self._owed_minor: dict[str, int] = {}
        self._raised: dict[str, int] = {}
        self._rows: dict[sa.Table, list[dict[str, object]]] = {
            table: [] for table in (store.presentments, store.transfers, store.entries, store.alarms)
        }

    def settle(self, examined: list[_Examined]) -> list[RecordVerdict]:
        self._read(
            [item.record for item in examined if item.record is not None],
            [item.tap for item in examined if item.tap is not None],
        )
        verdicts = [self._settle(item) for item in examined]
        self._write()
        accounts.check_accounts(self._connection, self._owed_minor, self._now_unix_s)
        return verdicts

    def _read(self, records: list[Record], taps: list[Tap]) -> None:
        # First of all, so that one gateway's batches come one after the other.
        self._connection.execute(
            store.gateways.update()
            .filter_by(id=self._gateway.id)
            .values(last_presented_unix_ms=self._now_unix_ms)
        )
        tokens, presentments, publications = store.tokens.c, store.presentments.c, store.publications.c
        owners = self._connection.scalars(
            sa.select(tokens.account_id)
            .where(tokens.token_key.in_({tap.token_key for tap in taps}))
            .distinct()
        ).all()
        # From here on nobody else posts to these accounts or publishes for them.
        accounts.lock_accounts(self._connection, owners)
        for line in accounts.token_lines(self._connection, owners):
            self._lines[line.row.token_key] = line
        relied_on = sa.select(store.publications).where(
            publications.account_id.in_(owners), publications.digest.in_({tap.limit_digest for tap in taps})
        )
        for row in self._connection.execute(relied_on):
            self._published[row.token_id, row.digest] = row
        mine = presentments.gateway_id == self._gateway.id
        seen = sa.select(
            presentments.record_id,
            presentments.content_digest,
            presentments.verdict,
            presentments.reason,
            presentments.account_id,
        ).where(mine, presentments.record_id.in_({record.id for record in records}))
        for row in self._connection.execute(seen):
            self._seen[row.record_id] = _Seen(
                row.content_digest, Verdict(row.verdict), row.reason, row.account_id
            )
        sequences = sa.select(presentments.sequence, presentments.record_id).where(
            mine, presentments.sequence.in_({record.sequence for record in records})
        )
        for row in self._connection.execute(sequences):
            self._sequences[row.sequence] = row.record_id

    def _settle(self, item: _Examined) -> RecordVerdict:
        record = item.record
        if record is None:
            self._alarm(AlarmKind.CHANGED_RECORD, item.record_id, None, item.reason)
            return RecordVerdict(item.record_id, Verdict.INVALID, item.reason)
        seen = self._seen.get(record.id)
        if seen is not None and seen.content_digest != record.hash:
            reason = "Another payment was presented under the same id before. Both are kept."
            self._alarm(AlarmKind.CHANGED_CONTENT, record.id, seen.account_id, reason, record)
            return RecordVerdict(str(record.id), Verdict.CONFLICT, reason)
        if seen is not None and seen.verdict is Verdict.POSTED:
            return RecordVerdict(str(record.id), Verdict.DUPLICATE, _DUPLICATE)
        if seen is not None and seen.verdict is not Verdict.UNKNOWN:
            return RecordVerdict(str(record.id), seen.verdict, seen.reason)

        other = self._sequences.setdefault(record.sequence, record.id)
        if other != record.id:
            detail = f"journal place {record.sequence} is record {other}'s"
            self._alarm(AlarmKind.SEQUENCE_REUSED, record.id, None, detail)
        line = self._lines.get(item.tap.token_key) if item.tap is not None else None
        if item.tap is None:
            verdict, reason = Verdict.INVALID, item.reason
            self._alarm(AlarmKind.FALSE_EVIDENCE, record.id, None, item.reason)
        elif line is None:
            verdict, reason = Verdict.UNKNOWN, _UNKNOWN
        else:
            verdict, reason = self._judge(record, item.tap, line)
        self._keep(record, line, verdict, reason)
        return RecordVerdict(str(record.id), verdict, reason)

    def _judge(self, record: Record, tap: Tap, line: TokenLine) -> tuple[Verdict, str]:
        """A genuine tap of a token that we know."""
        relied_on = self._published.get((line.id, tap.limit_digest))
        if relied_on is None or relied_on.ceiling != tap.ceiling:
            reason = "The payment relies on a limit that this issuer never gave out."
            self._alarm(AlarmKind.FALSE_EVIDENCE, record.id, line.account_id, reason)
            return Verdict.INVALID, reason
        if tap.counter_after > line.highest:
            line.highest = self._raised[line.id] = tap.counter_after
        others = self._connection.execute(
            _OVERLAPPING, {"token": line.id, "before": tap.counter_before, "after": tap.counter_after}
        ).all()
        for other in others:
            detail = f"overlaps record {other.record_id} of gateway {other.gateway_id}"
            self._alarm(AlarmKind.OVERLAP, record.id, line.account_id, detail)
        if any(other.posted for other in others):
            self._claim(record, tap, line, posted=False)
            return Verdict.CONFLICT, (
                "The card contradicts a payment presented before: it may be a copy. Both are kept."
            )
        if not contains(line.claimable(self._now_unix_s), (tap.counter_before, tap.counter_after)):
            self._claim(record, tap, line, posted=False)
            if self._now_unix_s > relied_on.stands_until_unix_s:
                return Verdict.LATE, "Presented after the deadline; the issuer will review it."
            return Verdict.LATE, "Outside what the issuer still guarantees; it will be reviewed."
        self._claim(record, tap, line, posted=True)
        self._post(record, tap, line)
        return Verdict.POSTED, _POSTED

    def _claim(self, record: Record, tap: Tap, line: TokenLine, *, posted: bool) -> None:
        # Written at once: the next record of this batch may overlap it.
        self._connection.execute(
            store.claims.insert(),
            {
                "account_id": line.account_id,
                "token_id": line.id,
                "counter_after": tap.counter_after,
                "cryptogram": tap.cryptogram,
                "counter_before": tap.counter_before,
                "atc": tap.atc,
                "gateway_id": self._gateway.id,
                "record_id": record.id,
                "posted": posted,
            },
        )

    def _post(self, record: Record, tap: Tap, line: TokenLine) -> None:
        line.posted.append((tap.counter_before, tap.counter_after))
        self._owed_minor[line.account_id] = self._owed_minor.get(line.account_id, 0) + tap.amount_minor
        # Known from the record, yet no gateway can take another's: the same payment, the same transfer.
        transfer_id = uuid.uuid5(record.id, self._gateway.id)
        self._rows[store.transfers].append(
            {
                "account_id": line.account_id,
                "id": transfer_id,
                "kind": "payment",
                "record_id": record.id,
                "token_id": line.id,
                "gateway_id": self._gateway.id,
                "tapped_unix_ms": tap.at_unix_ms,
                "posted_unix_ms": self._now_unix_ms,
            }
        )
        lines = (
            (RECEIVABLE, line.account_id, tap.amount_minor),
            (PAYABLE, self._gateway.merchant.id, -tap.amount_minor),
        )
        self._rows[store.entries] += [
            {
                "account_id": line.account_id,
                "transfer_id": transfer_id,
                "line": number,
                "book": book,
                "owner_id": owner_id,
                "currency": self._issuer.currency.code,
                "amount_minor": amount_minor,
            }
            for number, (book, owner_id, amount_minor) in enumerate(lines)
        ]

    def _keep(self, record: Record, line: TokenLine | None, verdict: Verdict, reason: str) -> None:
        account_id = line.account_id if line is not None else None
        judged = {"account_id": account_id, "verdict": verdict.value, "reason": reason}
        known = record.id in self._seen
        self._seen[record.id] = _Seen(record.hash, verdict, reason, account_id)
        if known:
            self._connection.execute(
                store.presentments.update()
                .filter_by(gateway_id=self._gateway.id, record_id=record.id)
                .values(judged)
            )
            return
        self._rows[store.presentments].append(
            {
                "gateway_id": self._gateway.id,
                "record_id": record.id,
                "sequence": record.sequence,
                "content_digest": record.hash,
                "body": record.body,
                "sealed_proof": record.proof,
                "previous_hash": record.previous_hash,
                "signature": record.signature,
                "received_unix_ms": self._now_unix_ms,
                **judged,
            }
        )

    def _alarm(
        self,
        kind: AlarmKind,
        record_id: uuid.UUID | str,
        account_id: str | None,
        detail: str,
        record: Record | None = None,
    ) -> None:
        self._rows[store.alarms].append(
            {
                "id": uuid.uuid4(),
                "kind": kind.value,
                "gateway_id": self._gateway.id,
                "record_id": str(record_id),
                "account_id": account_id,
                "detail": detail,
                "record": None if record is None else canonical_json(record.to_wire()),
                "raised_unix_ms": self._now_unix_ms,
            }
        )

    def _write(self) -> None:
        for table, rows in self._rows.items():
            if rows:
                self._connection.execute(table.insert(), rows)
        if self._owed_minor:
            self._connection.execute(
                _OWE, [{"account": account, "more": more} for account, more in self._owed_minor.items()]
            )
        if self._raised:
            self._connection.execute(
                _RAISE, [{"token": token, "counter": counter} for token, counter in self._raised.items()]
            )


_OVERLAPPING: Final = sa.select(
    store.claims.c.gateway_id, store.claims.c.record_id, store.claims.c.posted
).where(
    store.claims.c.token_id == sa.bindparam("token"),
    store.claims.c.counter_after > sa.bindparam("before"),
    store.claims.c.counter_before < sa.bindparam("after"),
)
_OWE: Final = (
    store.accounts.update()
    .where(store.accounts.c.id == sa.bindparam("account"))
    .values(outstanding_minor=store.accounts.c.outstanding_minor + sa.bindparam("more"))
)
_RAISE: Final = (
    store.tokens.update()
    .where(store.tokens.c.id == sa.bindparam("token"))
    .values(highest_counter=sa.bindparam("counter"))
)
