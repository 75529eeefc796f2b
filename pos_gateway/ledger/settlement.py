"""One batch inside its transaction: read what it touches, judge record by record, write it all.

A payment debits the customer's receivable and credits the merchant's payable; a reversal or refund does
the opposite. Whatever happens twice (the batch, the record, the same points on a counter line) is seen
here, under the locks of the gateway and of every account that is touched.
"""

from __future__ import annotations

import json
import uuid
from bisect import bisect_right, insort
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from pos_gateway.ledger import accounts, store
from pos_gateway.ledger.accounts import TokenLine
from pos_gateway.ledger.bulk import among, among_pairs, insert_rows, update_each
from pos_gateway.ledger.corrections import Correction, Judged, Original, judge
from pos_gateway.ledger.evidence import Tap
from pos_gateway.ledger.gateways import Gateway
from pos_gateway.ledger.reserve import Interval, IntervalSet, contains, measure
from pos_gateway.money import Currency
from pos_gateway.records import Kind, Record, Verdict, canonical_json

RECEIVABLE: Final = "customer_receivable"
PAYABLE: Final = "merchant_payable"

_POSTED: Final = "Paid."
_DUPLICATE: Final = "Paid; it had been presented before."
_CORRECTED_BEFORE: Final = "Done; it had been presented before."
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
    COUNTER_BEHIND = "counter_behind"
    """A card showed a counter below one it has shown before: an old cryptogram, or a copy of the card."""
    WRONG_CORRECTION = "wrong_correction"
    """A gateway wants to take back more than the payment holds."""


@dataclass(frozen=True, slots=True)
class RecordVerdict:
    """The answer to one record. `reason` is a sentence for the shop's staff."""

    record_id: str
    verdict: Verdict
    reason: str

    def to_wire(self) -> dict[str, str]:
        return {"id": self.record_id, "verdict": self.verdict.value, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Examined:
    """One record of a batch before the database was asked. Without `record` it could not be read, or is
    not what its gateway signed; without `tap` and `correction` it does not hold, and `reason` says why."""

    record_id: str
    record: Record | None = None
    tap: Tap | None = None
    correction: Correction | None = None
    reason: str = ""


class _Seen(NamedTuple):
    """What became of a record presented before."""

    kind: Kind
    content_digest: bytes
    verdict: Verdict
    reason: str
    account_id: str | None


class _Claim(NamedTuple):
    """Somebody's points on a token's counter line, in the order of their ends."""

    after: int
    before: int
    gateway_id: str
    record_id: uuid.UUID
    posted: bool


@dataclass(slots=True)
class _Line:
    """A token of this batch: its line, and what could still be claimed on it before the batch.

    `claims`: those of this batch, and earlier ones that were not posted. No earlier posted one overlaps
    what was claimable; whoever wants more than that must be held against the table.
    """

    token: TokenLine
    claimable: IntervalSet
    claims: list[_Claim] = field(default_factory=list)

    def overlapping(self, before: int, after: int) -> list[_Claim]:
        first = bisect_right(self.claims, before, key=lambda claim: claim.after)
        return [claim for claim in self.claims[first:] if claim.before < after]


class Settlement:
    """Settles one batch of one gateway, once, inside the caller's transaction."""

    def __init__(
        self, connection: sa.Connection, gateway: Gateway, currency: Currency, now_unix_ms: int
    ) -> None:
        self._connection = connection
        self._gateway = gateway
        self._currency = currency
        self._now_unix_ms = now_unix_ms
        self._now_unix_s = now_unix_ms // 1000
        self._lines: dict[bytes, _Line] = {}
        self._published: dict[tuple[str, bytes], Any] = {}
        self._seen: dict[uuid.UUID, _Seen] = {}
        self._sequences: dict[int, uuid.UUID] = {}
        self._originals: dict[uuid.UUID, Original] = {}
        self._waiting: dict[uuid.UUID, list[tuple[uuid.UUID, Correction]]] = {}
        self._before_minor: dict[str, int] = {}
        self._owed_minor: dict[str, int] = {}
        self._raised: dict[str, int] = {}
        self._rows: dict[sa.Table, list[dict[str, object]]] = {
            table: []
            for table in (store.presentments, store.claims, store.transfers, store.entries, store.alarms)
        }

    def settle(self, examined: list[Examined]) -> list[RecordVerdict]:
        """The verdicts, in the order of the records."""
        self._read(
            [item.record for item in examined if item.record is not None],
            [item.tap for item in examined if item.tap is not None],
            {item.correction.about for item in examined if item.correction is not None},
        )
        # A batch that was sent out of order is no reason to let a refund wait for its own payment.
        payments_first = sorted(range(len(examined)), key=lambda i: examined[i].correction is not None)
        verdicts = {place: self._settle(examined[place]) for place in payments_first}
        self._write()
        accounts.check_accounts(self._connection, self._owed_minor, self._now_unix_s, self._before_minor)
        return [verdicts[place] for place in range(len(examined))]

    def _read(self, records: list[Record], taps: list[Tap], abouts: set[uuid.UUID]) -> None:
        # First of all, so that one gateway's batches come one after the other, at whichever replica.
        self._connection.execute(
            store.gateways.update()
            .filter_by(id=self._gateway.id)
            .values(last_presented_unix_ms=self._now_unix_ms)
        )
        self._read_presentments(records, abouts)
        tokens = store.tokens.c
        owners = set(
            self._connection.scalars(
                sa.select(tokens.account_id)
                .where(among(self._connection, tokens.token_key, {tap.token_key for tap in taps}))
                .distinct()
            )
        )
        corrected = {self._seen[about].account_id for about in abouts if about in self._seen}
        touched = sorted(owners | {account_id for account_id in corrected if account_id is not None})
        # From here on nobody else posts to these accounts or publishes for them.
        rows = accounts.lock_accounts(self._connection, touched)
        self._before_minor = {row.id: row.outstanding_minor for row in rows.values()}
        self._read_lines(touched, taps)
        self._read_originals(abouts, touched)
        self._read_waiting({record.id for record in records if record.kind is Kind.AUTHORIZATION})

    def _read_presentments(self, records: list[Record], abouts: set[uuid.UUID]) -> None:
        columns = store.presentments.c
        mine = columns.gateway_id == self._gateway.id
        seen = sa.select(
            columns.record_id,
            columns.kind,
            columns.content_digest,
            columns.verdict,
            columns.reason,
            columns.account_id,
        ).where(mine, among(self._connection, columns.record_id, {record.id for record in records} | abouts))
        for row in self._connection.execute(seen):
            self._seen[row.record_id] = _Seen(
                Kind(row.kind), row.content_digest, Verdict(row.verdict), row.reason, row.account_id
            )
        sequences = sa.select(columns.sequence, columns.record_id).where(
            mine, among(self._connection, columns.sequence, {record.sequence for record in records})
        )
        for sequence, record_id in self._connection.execute(sequences):
            self._sequences[sequence] = record_id

    def _read_lines(self, account_ids: list[str], taps: list[Tap]) -> None:
        keys = {tap.token_key for tap in taps}
        by_id: dict[str, _Line] = {}
        for token in accounts.token_lines(self._connection, account_ids):
            claimable = token.claimable(self._now_unix_s)
            self._before_minor[token.account_id] += measure(claimable)
            if token.row.token_key in keys:
                self._lines[token.row.token_key] = by_id[token.id] = _Line(token, claimable)
        if not by_id:
            return
        publications = store.publications.c
        pairs = {
            (self._lines[t.token_key].token.id, t.limit_digest) for t in taps if t.token_key in self._lines
        }
        relied_on = sa.select(
            publications.token_id, publications.digest, publications.ceiling, publications.stands_until_unix_s
        ).where(among_pairs(self._connection, (publications.token_id, publications.digest), pairs))
        for row in self._connection.execute(relied_on):
            self._published[row.token_id, row.digest] = row
        unposted = _CLAIM.where(
            among(self._connection, store.claims.c.token_id, by_id), ~store.claims.c.posted
        )
        for token_id, *claim in self._connection.execute(unposted):
            by_id[token_id].claims.append(_Claim(*claim))
        for line in by_id.values():
            line.claims.sort()

    def _read_originals(self, abouts: set[uuid.UUID], account_ids: list[str]) -> None:
        for about in abouts:
            seen = self._seen.get(about)
            if seen is not None and seen.kind is Kind.AUTHORIZATION:
                self._originals[about] = Original(seen.verdict, seen.account_id)
        by_transfer = {self._transfer_id(about): original for about, original in self._originals.items()}
        if not by_transfer:
            return
        transfers, entries = store.transfers.c, store.entries.c
        moved = (
            sa.select(
                transfers.id,
                transfers.original_id,
                transfers.kind,
                transfers.token_id,
                entries.amount_minor,
            )
            .join(
                store.entries,
                sa.and_(entries.account_id == transfers.account_id, entries.transfer_id == transfers.id),
            )
            .where(
                among(self._connection, transfers.account_id, account_ids),
                sa.or_(
                    among(self._connection, transfers.id, by_transfer),
                    among(self._connection, transfers.original_id, by_transfer),
                ),
                entries.book == RECEIVABLE,
            )
        )
        for row in self._connection.execute(moved):
            original = by_transfer[row.original_id or row.id]
            original.left_minor += row.amount_minor
            if row.original_id is None:
                original.amount_minor, original.token_id = row.amount_minor, row.token_id
            original.voided |= row.kind == Kind.REVERSAL.value

    def _read_waiting(self, authorizations: set[uuid.UUID]) -> None:
        """Corrections that came before their payment, in the order in which the gateway made them."""
        columns = store.presentments.c
        waiting = (
            sa.select(columns.record_id, columns.kind, columns.about, columns.body)
            .where(
                columns.gateway_id == self._gateway.id,
                among(self._connection, columns.about, authorizations),
                columns.verdict == Verdict.UNKNOWN.value,
            )
            .order_by(columns.sequence)
        )
        for row in self._connection.execute(waiting):
            facts = json.loads(row.body)
            correction = Correction(Kind(row.kind), row.about, facts["amount_minor"], facts["at_unix_ms"])
            self._waiting.setdefault(row.about, []).append((row.record_id, correction))

    def _settle(self, item: Examined) -> RecordVerdict:
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
            reason = _CORRECTED_BEFORE if record.kind.corrects else _DUPLICATE
            return RecordVerdict(str(record.id), Verdict.DUPLICATE, reason)
        if seen is not None and seen.verdict is not Verdict.UNKNOWN:
            return RecordVerdict(str(record.id), seen.verdict, seen.reason)

        other = self._sequences.setdefault(record.sequence, record.id)
        if other != record.id:
            detail = f"journal place {record.sequence} is record {other}'s"
            self._alarm(AlarmKind.SEQUENCE_REUSED, record.id, None, detail)
        if item.correction is not None:
            return self._settle_correction(record, item.correction)
        return self._settle_payment(record, item)

    def _settle_payment(self, record: Record, item: Examined) -> RecordVerdict:
        line = self._lines.get(item.tap.token_key) if item.tap is not None else None
        account_id = line.token.account_id if line is not None else None
        if item.tap is None:
            verdict, reason = Verdict.INVALID, item.reason
            self._alarm(AlarmKind.FALSE_EVIDENCE, record.id, None, item.reason)
        elif line is None:
            verdict, reason = Verdict.UNKNOWN, _UNKNOWN
        else:
            verdict, reason = self._judge(record, item.tap, line)
        self._keep(record, account_id, verdict, reason)
        if record.kind is Kind.AUTHORIZATION:
            original = self._originals[record.id] = Original(verdict, account_id)
            if verdict is Verdict.POSTED and item.tap is not None and line is not None:
                original.token_id = line.token.id
                original.amount_minor = original.left_minor = item.tap.amount_minor
            if verdict is not Verdict.UNKNOWN:
                for record_id, correction in self._waiting.pop(record.id, ()):
                    self._judge_again(record_id, correction, original)
        return RecordVerdict(str(record.id), verdict, reason)

    def _settle_correction(self, record: Record, correction: Correction) -> RecordVerdict:
        original = self._originals.get(correction.about)
        judged = self._correct(record.id, correction, original)
        account_id = original.account_id if original is not None else None
        self._keep(record, account_id, judged.verdict, judged.reason, correction.about)
        return RecordVerdict(str(record.id), judged.verdict, judged.reason)

    def _judge_again(self, record_id: uuid.UUID, correction: Correction, original: Original) -> None:
        judged = self._correct(record_id, correction, original)
        self._rejudge(record_id, original.account_id, judged.verdict, judged.reason)
        if (seen := self._seen.get(record_id)) is not None:
            self._seen[record_id] = seen._replace(verdict=judged.verdict, reason=judged.reason)

    def _correct(self, record_id: uuid.UUID, correction: Correction, original: Original | None) -> Judged:
        judged = judge(correction, original)
        if original is not None and judged.wrong:
            self._alarm(AlarmKind.WRONG_CORRECTION, record_id, original.account_id, judged.reason)
        if original is not None and judged.moves:
            original.left_minor -= correction.amount_minor
            original.voided |= correction.kind is Kind.REVERSAL
            self._post(
                record_id,
                correction.kind.value,
                original.account_id or "",
                original.token_id or "",
                -correction.amount_minor,
                correction.at_unix_ms,
                original_id=self._transfer_id(correction.about),
            )
        return judged

    def _judge(self, record: Record, tap: Tap, line: _Line) -> tuple[Verdict, str]:
        """A genuine tap of a token that we know."""
        token = line.token
        relied_on = self._published.get((token.id, tap.limit_digest))
        if relied_on is None or relied_on.ceiling != tap.ceiling:
            reason = "The payment relies on a limit that this issuer never gave out."
            self._alarm(AlarmKind.FALSE_EVIDENCE, record.id, token.account_id, reason)
            return Verdict.INVALID, reason
        if tap.counter_after > token.highest:
            token.highest = self._raised[token.id] = tap.counter_after
        interval = (tap.counter_before, tap.counter_after)
        guaranteed = contains(line.claimable, interval)
        others = line.overlapping(*interval)
        if not guaranteed:
            others += self._posted_over(token.id, interval)
        for other in others:
            detail = f"overlaps record {other.record_id} of gateway {other.gateway_id}"
            self._alarm(AlarmKind.OVERLAP, record.id, token.account_id, detail)
        if any(other.posted for other in others):
            self._claim(record, tap, line, posted=False)
            return Verdict.CONFLICT, (
                "The card contradicts a payment presented before: it may be a copy. Both are kept."
            )
        if not guaranteed:
            self._claim(record, tap, line, posted=False)
            if self._now_unix_s > relied_on.stands_until_unix_s:
                return Verdict.LATE, "Presented after the deadline; the issuer will review it."
            return Verdict.LATE, "Outside what the issuer still guarantees; it will be reviewed."
        self._claim(record, tap, line, posted=True)
        self._post(record.id, "payment", token.account_id, token.id, tap.amount_minor, tap.at_unix_ms)
        return Verdict.POSTED, _POSTED

    def _posted_over(self, token_id: str, interval: Interval) -> list[_Claim]:
        found = self._connection.execute(
            _POSTED_OVER, {"token": token_id, "before": interval[0], "after": interval[1]}
        )
        return [_Claim(*claim) for _, *claim in found]

    def _claim(self, record: Record, tap: Tap, line: _Line, *, posted: bool) -> None:
        claim = _Claim(tap.counter_after, tap.counter_before, self._gateway.id, record.id, posted)
        insort(line.claims, claim)
        self._rows[store.claims].append(
            {
                "account_id": line.token.account_id,
                "token_id": line.token.id,
                "counter_after": tap.counter_after,
                "cryptogram": tap.cryptogram,
                "counter_before": tap.counter_before,
                "atc": tap.atc,
                "gateway_id": self._gateway.id,
                "record_id": record.id,
                "posted": posted,
            }
        )

    def _transfer_id(self, record_id: uuid.UUID) -> uuid.UUID:
        """Known from the record, yet no gateway can take another's: the same record, the same transfer."""
        return uuid.uuid5(record_id, self._gateway.id)

    def _post(
        self,
        record_id: uuid.UUID,
        kind: str,
        account_id: str,
        token_id: str,
        amount_minor: int,
        at_unix_ms: int,
        original_id: uuid.UUID | None = None,
    ) -> None:
        self._owed_minor[account_id] = self._owed_minor.get(account_id, 0) + amount_minor
        transfer_id = self._transfer_id(record_id)
        self._rows[store.transfers].append(
            {
                "account_id": account_id,
                "id": transfer_id,
                "kind": kind,
                "record_id": record_id,
                "token_id": token_id,
                "gateway_id": self._gateway.id,
                "tapped_unix_ms": at_unix_ms,
                "posted_unix_ms": self._now_unix_ms,
                "original_id": original_id,
            }
        )
        lines = (
            (RECEIVABLE, account_id, amount_minor),
            (PAYABLE, self._gateway.merchant.id, -amount_minor),
        )
        self._rows[store.entries] += [
            {
                "account_id": account_id,
                "transfer_id": transfer_id,
                "line": number,
                "book": book,
                "owner_id": owner_id,
                "currency": self._currency.code,
                "amount_minor": moved_minor,
            }
            for number, (book, owner_id, moved_minor) in enumerate(lines)
        ]

    def _keep(
        self,
        record: Record,
        account_id: str | None,
        verdict: Verdict,
        reason: str,
        about: uuid.UUID | None = None,
    ) -> None:
        known = record.id in self._seen
        self._seen[record.id] = _Seen(record.kind, record.hash, verdict, reason, account_id)
        if known:
            self._rejudge(record.id, account_id, verdict, reason)
            return
        self._rows[store.presentments].append(
            {
                "gateway_id": self._gateway.id,
                "record_id": record.id,
                "account_id": account_id,
                "sequence": record.sequence,
                "content_digest": record.hash,
                "body": record.body,
                "sealed_proof": record.proof,
                "previous_hash": record.previous_hash,
                "signature": record.signature,
                "verdict": verdict.value,
                "reason": reason,
                "received_unix_ms": self._now_unix_ms,
                "kind": record.kind.value,
                "about": about,
            }
        )

    def _rejudge(self, record_id: uuid.UUID, account_id: str | None, verdict: Verdict, reason: str) -> None:
        """A record kept before as unknown. One that came in this very batch is not in its table yet."""
        judged = {"account_id": account_id, "verdict": verdict.value, "reason": reason}
        for row in self._rows[store.presentments]:
            if row["record_id"] == record_id:
                row.update(judged)
                return
        self._connection.execute(
            store.presentments.update()
            .filter_by(gateway_id=self._gateway.id, record_id=record_id)
            .values(judged)
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
            insert_rows(self._connection, table, rows)
        owed = {account: more for account, more in self._owed_minor.items() if more}
        update_each(self._connection, store.accounts, "outstanding_minor", owed, add=True)
        update_each(self._connection, store.tokens, "highest_counter", self._raised)


_CLAIM: Final = sa.select(
    store.claims.c.token_id,
    store.claims.c.counter_after,
    store.claims.c.counter_before,
    store.claims.c.gateway_id,
    store.claims.c.record_id,
    store.claims.c.posted,
)
_POSTED_OVER: Final = _CLAIM.where(
    store.claims.c.token_id == sa.bindparam("token"),
    store.claims.c.counter_after > sa.bindparam("before"),
    store.claims.c.counter_before < sa.bindparam("after"),
    store.claims.c.posted,
)
