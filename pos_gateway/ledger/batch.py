"""What one batch of a gateway touches in the books: read before it is judged, written and checked after.

Everything is read and written set by set, a few statements for a thousand records; in between, no record
asks the database anything.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from bisect import bisect_right, insort
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from pos_gateway.instalments import Quote
from pos_gateway.ledger import accounts, store
from pos_gateway.ledger.accounts import TokenLine
from pos_gateway.ledger.balance import Balance
from pos_gateway.ledger.books import ISSUER, MERCHANT_FEES, PAYABLE, RECEIVABLE
from pos_gateway.ledger.bulk import (
    among,
    among_pairs,
    beside,
    insert_rows,
    insert_tuples,
    set_each,
    stored_ids,
    update_each,
)
from pos_gateway.ledger.corrections import Correction, Original
from pos_gateway.ledger.evidence import Tap
from pos_gateway.ledger.gateways import Gateway, GatewayStatus
from pos_gateway.ledger.plans import PlanKind, plan_rows, signed_offers
from pos_gateway.ledger.renunciations import Renunciation
from pos_gateway.ledger.reserve import (
    Guarantee,
    Interval,
    IntervalSet,
    Publication,
    check_invariant,
    contains,
    interval_set,
    measure,
    subtract,
)
from pos_gateway.ledger.reviews import Why
from pos_gateway.money import Currency
from pos_gateway.records import Kind, Record, Verdict, canonical_json

_KINDS: Final = {kind.value: kind for kind in Kind}
_VERDICTS: Final = {verdict.value: verdict for verdict in Verdict}


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
    AGAINST_RULES = "against_rules"
    """A gateway approved what the limit it relied on did not allow, or presents what it has renounced."""


@dataclass(frozen=True, slots=True)
class Examined:
    """One record of a batch before the database was asked. Without `record` it could not be read, or is
    not what its gateway signed; without `tap`, `correction` and `renunciation` it does not hold, and
    `reason` says why."""

    record_id: str
    record: Record | None = None
    tap: Tap | None = None
    correction: Correction | None = None
    renunciation: Renunciation | None = None
    reason: str = ""


class Seen(NamedTuple):
    """What became of a record presented before."""

    kind: Kind
    content_digest: bytes
    verdict: Verdict
    reason: str
    account_id: str | None


class ReliedOn(NamedTuple):
    """A publication that a tap of this batch names by its digest."""

    highest: int
    ceiling: int
    issued_unix_s: int
    valid_until_unix_s: int
    stands_until_unix_s: int
    terminal_id: str | None

    @classmethod
    def of(cls, publication: Publication) -> ReliedOn:
        return cls(
            publication.highest,
            publication.ceiling,
            publication.issued_unix_s,
            publication.valid_until_unix_s,
            publication.stands_until_unix_s,
            publication.terminal_id,
        )


class Claim(NamedTuple):
    """Somebody's points on a token's counter line, in the order of their ends."""

    after: int
    before: int
    gateway_id: str
    record_id: uuid.UUID
    posted: bool


class GivenBack(NamedTuple):
    """What a reversal or refund gave back to a customer."""

    account_id: str
    payment_id: uuid.UUID
    record_id: uuid.UUID
    amount_minor: int


@dataclass(slots=True)
class Line:
    """A token of this batch: its line, and what could still be claimed on it before the batch.

    `claims`: those of this batch, earlier ones that were not posted, and earlier posted ones that overlap
    what a tap of this batch claims beyond the claimable. Others cannot overlap anything in it.
    """

    token: TokenLine
    claimable: IntervalSet
    claims: list[Claim] = field(default_factory=list)
    renounced: dict[bytes, tuple[int, uuid.UUID]] = field(default_factory=dict)
    """Amounts and sales of renounced TCs, by the digest that points back to them."""
    pointing: dict[bytes, int] = field(default_factory=dict)
    """Counters before TCs, by the digest by which each points back to the one before it; those that a
    renunciation of this batch asks for."""
    spoiled: set[uuid.UUID] = field(default_factory=set)
    """Sales that this gateway has renounced."""

    first_death_unix_s: int | None = None
    """When the first of its publications dies that no evidence has cut yet."""

    def __post_init__(self) -> None:
        self.first_death_unix_s = min(
            (p.valid_until_unix_s for p in self.token.publications if p.evidence is None), default=None
        )

    def overlapping(self, before: int, after: int) -> list[Claim]:
        claims = self.claims
        if not claims or claims[-1].after <= before:
            return []
        first = bisect_right(claims, before, key=lambda claim: claim.after)
        return [claim for claim in claims[first:] if claim.before < after]


@dataclass(slots=True)
class Before:
    """How everything that a batch touches stands, under the locks of its gateway and of every account.

    `lines` by token key; `published` by token id and digest; `balances`, `reserved_minor` and
    `closed_until_unix_ms`, before which nothing is booked any more, by account.
    `offers`: every one that any policy of this issuer has held, if a payment of the batch has a plan.
    `complete_until_unix_ms`: up to which tap time this gateway had said before that all was presented.
    """

    seen: dict[uuid.UUID, Seen] = field(default_factory=dict)
    sequences: dict[int, uuid.UUID] = field(default_factory=dict)
    lines: dict[bytes, Line] = field(default_factory=dict)
    published: dict[tuple[str, bytes], ReliedOn] = field(default_factory=dict)
    originals: dict[uuid.UUID, Original] = field(default_factory=dict)
    waiting: dict[uuid.UUID, list[tuple[uuid.UUID, Correction]]] = field(default_factory=dict)
    balances: dict[str, Balance] = field(default_factory=dict)
    reserved_minor: dict[str, int] = field(default_factory=dict)
    complete_until_unix_ms: int = 0
    suspended: bool = False
    offers: frozenset[str] = frozenset()
    closed_until_unix_ms: dict[str, int] = field(default_factory=dict)

    def free_minor(self, account_id: str) -> int:
        """What was free before the batch."""
        return self.balances[account_id].free_minor(self.reserved_minor[account_id])


def transfer_id(gateway: Gateway, record_id: uuid.UUID) -> uuid.UUID:
    """Known from the record, yet no gateway can take another's: the same record, the same transfer.

    `uuid.uuid5(record_id, gateway.id)`, in half the time.
    """
    digest = hashlib.sha1(record_id.bytes + gateway.id.encode(), usedforsecurity=False).digest()
    number = int.from_bytes(digest[:16], "big")
    return uuid.UUID(int=number & _UUID_REST | _UUID5)


_UUID_REST: Final = ~(0xF << 76 | 0b11 << 62) & (1 << 128) - 1
_UUID5: Final = 5 << 76 | 0b10 << 62


def read_before(
    connection: sa.Connection, gateway: Gateway, examined: Collection[Examined], now_unix_ms: int
) -> Before:
    """Lock the gateway and the accounts of a batch, and read what it touches."""
    return _Reading(connection, gateway, now_unix_ms).read(
        [item.record for item in examined if item.record is not None],
        [item.tap for item in examined if item.tap is not None],
        {item.correction.about for item in examined if item.correction is not None},
        [item.renunciation for item in examined if item.renunciation is not None],
    )


class _Reading:
    def __init__(self, connection: sa.Connection, gateway: Gateway, now_unix_ms: int) -> None:
        self._connection = connection
        self._gateway = gateway
        self._now_unix_ms = now_unix_ms
        self._now_unix_s = now_unix_ms // 1000
        self._before = Before()

    def read(
        self,
        records: list[Record],
        taps: list[Tap],
        abouts: set[uuid.UUID],
        renunciations: list[Renunciation],
    ) -> Before:
        # First of all, so that one gateway's batches come one after the other, at whichever replica.
        self._connection.execute(
            store.gateways.update()
            .filter_by(id=self._gateway.id)
            .values(last_presented_unix_ms=self._now_unix_ms)
        )
        gateways = store.gateways.c
        told = self._connection.execute(
            sa.select(gateways.complete_until_unix_ms, gateways.status).where(gateways.id == self._gateway.id)
        ).one()
        self._before.complete_until_unix_ms = told.complete_until_unix_ms or 0
        self._before.suspended = GatewayStatus(told.status) is not GatewayStatus.ACTIVE
        self._read_presentments(records, abouts)
        if any(tap.plan is not None for tap in taps):
            self._before.offers = signed_offers(self._connection)
        tokens, seen = store.tokens.c, self._before.seen
        keys = {tap.token_key for tap in taps} | {renounced.token_key for renounced in renunciations}
        owners = set(
            self._connection.scalars(
                sa.select(tokens.account_id).where(among(self._connection, tokens.token_key, keys)).distinct()
            )
        )
        corrected = {seen[about].account_id for about in abouts if about in seen}
        touched = sorted(owners | {account_id for account_id in corrected if account_id is not None})
        # From here on nobody else posts to these accounts or publishes for them.
        rows = accounts.lock_accounts(self._connection, touched)
        self._before.balances = {row.id: accounts.balance_of(row) for row in rows.values()}
        self._before.closed_until_unix_ms = {
            row.id: accounts.closed_until_unix_ms(row) for row in rows.values()
        }
        self._before.reserved_minor = dict.fromkeys(touched, 0)
        self._read_lines(touched, taps, keys)
        self._read_renounced(renunciations)
        self._read_originals(abouts, touched)
        self._read_waiting({record.id for record in records if record.kind is Kind.AUTHORIZATION})
        return self._before

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
        for row in self._connection.execute(seen).all():
            self._before.seen[row.record_id] = Seen(
                _KINDS[row.kind], row.content_digest, _VERDICTS[row.verdict], row.reason, row.account_id
            )
        sequences = sa.select(columns.sequence, columns.record_id).where(
            mine, among(self._connection, columns.sequence, {record.sequence for record in records})
        )
        for sequence, record_id in self._connection.execute(sequences).all():
            self._before.sequences[sequence] = record_id

    def _read_lines(self, account_ids: list[str], taps: list[Tap], keys: set[bytes]) -> None:
        lines, reserved_minor = self._before.lines, self._before.reserved_minor
        by_id: dict[str, Line] = {}
        for token in accounts.token_lines(self._connection, account_ids, accounts.LINE):
            claimable = token.claimable(self._now_unix_s)
            reserved_minor[token.account_id] += measure(claimable)
            key: bytes = token.row.token_key
            if key in keys:
                lines[key] = by_id[token.id] = Line(token, claimable)
        if not by_id:
            return
        ours = [(lines[tap.token_key], tap) for tap in taps if tap.token_key in lines]
        self._read_relied_on(ours)
        # In so many words: SQLite does not see that `posted = 0` is what its index of these is about.
        unposted = sa.not_(sa.literal_column("claims.posted", sa.Boolean))
        self._add_claims(
            by_id, _CLAIM.where(among(self._connection, store.claims.c.token_id, by_id), unposted)
        )
        self._read_contested(by_id, ours)

    def _read_relied_on(self, ours: Iterable[tuple[Line, Tap]]) -> None:
        """The publications that the taps name: known already, unless they have lapsed."""
        published = self._before.published
        for line in self._before.lines.values():
            for publication in line.token.publications:
                published[line.token.id, publication.digest] = ReliedOn.of(publication)
        others = {(line.token.id, tap.limit_digest) for line, tap in ours} - published.keys()
        if not others:
            return
        columns = store.publications.c
        lapsed = sa.select(
            columns.token_id, columns.digest, *(columns[name] for name in ReliedOn._fields)
        ).where(among_pairs(self._connection, (columns.token_id, columns.digest), others))
        for token_id, digest, *relied_on in self._connection.execute(lapsed).all():
            published[token_id, digest] = ReliedOn(*relied_on)

    def _read_renounced(self, renunciations: list[Renunciation]) -> None:
        by_id = {line.token.id: line for line in self._before.lines.values()}
        if not by_id:
            return
        renounced = store.renunciations.c
        query = sa.select(
            renounced.token_id,
            renounced.previous_digest,
            renounced.amount_minor,
            renounced.gateway_id,
            renounced.record_id,
        ).where(among(self._connection, renounced.token_id, by_id))
        for token_id, digest, amount_minor, gateway_id, record_id in self._connection.execute(query).all():
            by_id[token_id].renounced[digest] = amount_minor, record_id
            if gateway_id == self._gateway.id:
                by_id[token_id].spoiled.add(record_id)
        claims = store.claims.c
        for renunciation in renunciations:
            line = self._before.lines.get(renunciation.token_key)
            if line is None:
                continue
            pointing = sa.select(claims.counter_before).where(
                claims.token_id == line.token.id, claims.previous_digest == renunciation.previous_digest
            )
            for counter_before in self._connection.scalars(pointing):
                line.pointing[renunciation.previous_digest] = counter_before

    def _read_contested(self, by_id: Mapping[str, Line], ours: Iterable[tuple[Line, Tap]]) -> None:
        """Whoever claims points that are not claimable must be held against all that were posted."""
        wanted = {
            (line.token.id, tap.counter_before, tap.counter_after)
            for line, tap in ours
            if not contains(line.claimable, (tap.counter_before, tap.counter_after))
        }
        if not wanted:
            return
        claims = store.claims.c
        asked = beside(
            self._connection,
            "contested",
            (claims.token_id, claims.counter_before, claims.counter_after),
            list(wanted),
        )
        overlapping = _CLAIM.join_from(asked, store.claims, asked.c.c0 == claims.token_id).where(
            claims.counter_after > asked.c.c1, claims.counter_before < asked.c.c2, claims.posted
        )
        self._add_claims(by_id, overlapping.distinct())

    def _add_claims(self, by_id: Mapping[str, Line], query: sa.Select[Any]) -> None:
        for token_id, *claim in self._connection.execute(query).all():
            insort(by_id[token_id].claims, Claim(*claim))

    def _read_originals(self, abouts: set[uuid.UUID], account_ids: list[str]) -> None:
        originals = self._before.originals
        for about in abouts:
            seen = self._before.seen.get(about)
            if seen is not None and seen.kind is Kind.AUTHORIZATION:
                originals[about] = Original(seen.verdict, seen.account_id)
        by_transfer = {transfer_id(self._gateway, about): original for about, original in originals.items()}
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
                entries.book,
                entries.owner_id,
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
                entries.book != PAYABLE,
            )
        )
        for row in self._connection.execute(moved).all():
            original = by_transfer[row.original_id or row.id]
            original.left_minor += row.amount_minor
            original.book = row.book, row.owner_id
            if row.original_id is None:
                original.amount_minor, original.token_id = row.amount_minor, row.token_id
            original.voided |= row.kind == Kind.REVERSAL.value

    def _read_waiting(self, authorizations: set[uuid.UUID]) -> None:
        """Corrections that came before their payment, in the order in which the gateway made them."""
        columns = store.presentments.c
        waiting = sa.select(
            columns.record_id, columns.kind, columns.about, columns.body, columns.sequence
        ).where(
            columns.gateway_id == self._gateway.id,
            among(self._connection, columns.about, authorizations),
            columns.verdict == Verdict.UNKNOWN.value,
        )
        # Sorted here: SQLite would go through all that the gateway ever presented to have them in order.
        for row in sorted(self._connection.execute(waiting).all(), key=lambda row: row.sequence):
            facts = json.loads(row.body)
            correction = Correction(Kind(row.kind), row.about, facts["amount_minor"], facts["at_unix_ms"])
            self._before.waiting.setdefault(row.about, []).append((row.record_id, correction))


class After:
    """What a batch changes, gathered while it is judged and written at its end."""

    def __init__(
        self, connection: sa.Connection, gateway: Gateway, currency: Currency, now_unix_ms: int
    ) -> None:
        self._connection = connection
        self._gateway = gateway
        self._currency = currency
        self._now_unix_ms = now_unix_ms
        self._id = stored_ids(connection)
        self._presentments: list[tuple[Any, ...]] = []
        self._kept: dict[uuid.UUID, int] = {}
        self._rejudged: list[tuple[uuid.UUID, str | None, Verdict, str]] = []
        self._claims: list[tuple[Any, ...]] = []
        self._transfers: list[tuple[Any, ...]] = []
        self._entries: list[tuple[Any, ...]] = []
        self._alarms: list[dict[str, object]] = []
        self._owed_minor: dict[str, int] = {}
        self._given_minor: dict[str, int] = {}
        self._evidence: dict[tuple[str, bytes], int] = {}
        self._write_offs: dict[tuple[str, int], dict[str, object]] = {}
        self._renunciations: list[dict[str, object]] = []
        self._reviews: list[dict[str, object]] = []
        self._conflicts: list[dict[str, object]] = []
        self._blocked: set[str] = set()
        self._plans: list[dict[str, object]] = []
        self._instalments: list[dict[str, object]] = []
        self.given_back: list[GivenBack] = []
        self.closed_until_unix_ms: Mapping[str, int] = {}
        self._moved: dict[str, Line] = {}

    def keep(
        self,
        record: Record,
        account_id: str | None,
        verdict: Verdict,
        reason: str,
        about: uuid.UUID | None = None,
    ) -> None:
        """A record that was never presented before."""
        self._kept[record.id] = len(self._presentments)
        self._presentments.append(
            (
                account_id,
                verdict.value,
                reason,
                self._gateway.id,
                self._id(record.id),
                record.sequence,
                record.hash,
                record.body,
                record.proof,
                record.previous_hash,
                record.signature,
                self._now_unix_ms,
                record.kind.value,
                about and self._id(about),
            )
        )

    def rejudge(self, record_id: uuid.UUID, account_id: str | None, verdict: Verdict, reason: str) -> None:
        """A record that was kept as unknown, before or in this very batch."""
        place = self._kept.get(record_id)
        if place is None:
            self._rejudged.append((record_id, account_id, verdict, reason))
        else:
            self._presentments[place] = (account_id, verdict.value, reason, *self._presentments[place][3:])

    def claim(self, record: Record, tap: Tap, line: Line, *, posted: bool) -> None:
        """The tap's points are its, posted or for review."""
        insort(line.claims, Claim(tap.counter_after, tap.counter_before, self._gateway.id, record.id, posted))
        self._moved[line.token.id] = line
        if posted:
            line.token.post((tap.counter_before, tap.counter_after))
        self._claims.append(
            (
                line.token.account_id,
                line.token.id,
                tap.counter_after,
                tap.cryptogram,
                tap.counter_before,
                tap.atc,
                self._gateway.id,
                self._id(record.id),
                posted,
                tap.previous_digest,
            )
        )

    def raise_highest(self, line: Line, counter: int) -> None:
        """An authentic cryptogram tells how far the card has come."""
        if counter > line.token.highest:
            line.token.highest = counter
            self._moved[line.token.id] = line

    def post(
        self,
        record_id: uuid.UUID,
        kind: str,
        account_id: str,
        token_id: str,
        amount_minor: int,
        at_unix_ms: int,
        original: uuid.UUID | None = None,
        book: tuple[str, str] | None = None,
    ) -> None:
        """Double entry. `original`: the record id of the payment that is corrected; `book`: who pays, if
        it is not the customer."""
        debit = book or (RECEIVABLE, account_id)
        if debit[0] == RECEIVABLE:
            self._owed_minor[account_id] = self._owed_minor.get(account_id, 0) + amount_minor
        transfer = self._id(transfer_id(self._gateway, record_id))
        if original is not None and debit[0] == RECEIVABLE:
            self.given_back.append(
                GivenBack(account_id, transfer_id(self._gateway, original), record_id, -amount_minor)
            )
        self._transfers.append(
            (
                account_id,
                transfer,
                kind,
                self._id(record_id),
                token_id,
                self._gateway.id,
                at_unix_ms,
                self._posted_unix_ms(account_id),
                original and self._id(transfer_id(self._gateway, original)),
            )
        )
        code = self._currency.code
        self._entries += (
            (account_id, transfer, 0, *debit, code, amount_minor),
            (account_id, transfer, 1, PAYABLE, self._gateway.merchant.id, code, -amount_minor),
        )

    def _posted_unix_ms(self, account_id: str) -> int:
        """Now; or, if the batch has waited for the account while its cycle was closed, just after it."""
        return max(self._now_unix_ms, self.closed_until_unix_ms.get(account_id, 0))

    def plan(self, record_id: uuid.UUID, account_id: str, quote: Quote) -> None:
        """What was just posted is repaid by this plan; what its merchant gives up for it is taken at once."""
        payment = transfer_id(self._gateway, record_id)
        merchant = self._gateway.merchant.id
        plan, instalments = plan_rows(
            account_id,
            payment,
            PlanKind.PURCHASE,
            quote,
            self._posted_unix_ms(account_id),
            merchant_id=merchant,
        )
        self._plans.append(plan)
        self._instalments += instalments
        if quote.merchant_fee_minor:
            fee = self._id(uuid.uuid5(payment, "merchant fee"))
            self._transfers.append(
                (account_id, fee, "merchant_fee", None, None, None, *[self._now_unix_ms] * 2, None)
            )
            code = self._currency.code
            self._entries += (
                (account_id, fee, 0, PAYABLE, merchant, code, quote.merchant_fee_minor),
                (account_id, fee, 1, MERCHANT_FEES, ISSUER, code, -quote.merchant_fee_minor),
            )

    def post_from_free(self, before: Before, account_id: str, amount_minor: int) -> bool:
        """May a payment outside U be charged to the customer? Only if free credit covers it; that credit
        is taken."""
        given_minor = self._given_minor.get(account_id, 0) + amount_minor
        if given_minor > before.free_minor(account_id):
            return False
        self._given_minor[account_id] = given_minor
        return True

    def observe(self, line: Line, tap: Tap, relied_on: ReliedOn, guarantee: Guarantee) -> None:
        """What a genuine cryptogram proves: how far the card has come, and what had died before it."""
        self.raise_highest(line, tap.counter_after)
        first = line.first_death_unix_s
        if first is not None and relied_on.issued_unix_s > first + guarantee.clock_tolerance_s:
            for cut in line.token.observe(
                counter_before=tap.counter_before,
                counter_after=tap.counter_after,
                relied_on_issued_unix_s=relied_on.issued_unix_s,
                guarantee=guarantee,
            ):
                self._evidence[line.token.id, cut.digest] = cut.end
            line.__post_init__()

    def write_off(self, line: Line, before: int, amount_minor: int, record_id: uuid.UUID) -> None:
        """A renounced TC took the points below `before`: nobody will present them."""
        interval = (max(before - amount_minor, 0), before)
        line.token.posted.append(interval)
        self._write_offs[line.token.id, before] = {
            "account_id": line.token.account_id,
            "token_id": line.token.id,
            "counter_after": before,
            "counter_before": interval[0],
            "gateway_id": self._gateway.id,
            "record_id": record_id,
        }

    def renounce(self, line: Line, renunciation: Renunciation) -> None:
        sale_id = uuid.UUID(bytes=renunciation.sale_id)
        line.renounced[renunciation.previous_digest] = renunciation.amount_minor, sale_id
        line.spoiled.add(sale_id)
        self._renunciations.append(
            {
                "account_id": line.token.account_id,
                "token_id": line.token.id,
                "previous_digest": renunciation.previous_digest,
                "gateway_id": self._gateway.id,
                "record_id": sale_id,
                "amount_minor": renunciation.amount_minor,
            }
        )

    def hold(self, record_id: uuid.UUID, account_id: str, why: Why) -> None:
        """Somebody must decide about it."""
        self._reviews.append(
            {
                "gateway_id": self._gateway.id,
                "record_id": record_id,
                "account_id": account_id,
                "why": why.value,
                "held_unix_ms": self._now_unix_ms,
            }
        )

    def conflict(self, record: Record, line: Line, other: Claim) -> None:
        """Two genuine cryptograms on the same points: proven, and its token pays no more."""
        self.block(line)
        self._conflicts.append(
            {
                "id": uuid.uuid4(),
                "account_id": line.token.account_id,
                "token_id": line.token.id,
                "gateway_id": self._gateway.id,
                "record_id": record.id,
                "other_gateway_id": other.gateway_id,
                "other_record_id": other.record_id,
                "proven_unix_ms": self._now_unix_ms,
            }
        )

    def block(self, line: Line) -> None:
        """This token pays no more."""
        self._blocked.add(line.token.id)

    def alarm(
        self,
        kind: AlarmKind,
        record_id: uuid.UUID | str,
        account_id: str | None,
        detail: str,
        record: Record | None = None,
    ) -> None:
        self._alarms.append(
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

    def write(self) -> None:
        for table, names, rows in (
            (store.presentments, _PRESENTMENT, self._presentments),
            (store.claims, _CLAIMED, self._claims),
            (store.transfers, _TRANSFER, self._transfers),
            (store.entries, _ENTRY, self._entries),
        ):
            insert_tuples(self._connection, table, names, rows)
        for table, found in (
            (store.alarms, self._alarms),
            (store.renunciations, self._renunciations),
            (store.reviews, self._reviews),
            (store.conflicts, self._conflicts),
            (store.plans, self._plans),
            (store.plan_instalments, self._instalments),
        ):
            insert_rows(self._connection, table, found)
        self._write_reserve()
        for record_id, account_id, verdict, reason in self._rejudged:
            self._connection.execute(
                store.presentments.update()
                .filter_by(gateway_id=self._gateway.id, record_id=record_id)
                .values(account_id=account_id, verdict=verdict.value, reason=reason)
            )
        owed = {account: more for account, more in self._owed_minor.items() if more}
        update_each(self._connection, store.accounts, "outstanding_minor", owed, add=True)
        set_each(
            self._connection,
            store.tokens,
            ("highest_counter", "run_start", "run_end"),
            {token_id: (line.token.highest, *line.token.run) for token_id, line in self._moved.items()},
        )

    def _write_reserve(self) -> None:
        if self._given_minor:
            accounts.lapse(self._connection, sorted(self._given_minor), self._now_unix_ms // 1000)
        accounts.write_evidence(self._connection, self._evidence)
        accounts.write_off(self._connection, list(self._write_offs.values()))
        if self._blocked:
            accounts.block(self._connection, self._blocked)

    def tell_complete(self, until_unix_ms: int, guarantee: Guarantee) -> None:
        """Every approval this gateway stamped up to then has been presented: what only its terminal could
        use, and what died before, is used up.

        The accounts are not locked for this: it only gives up points, and whoever reads them a moment
        earlier reserves too much, never too little.
        """
        columns = store.publications.c
        self._connection.execute(
            store.gateways.update()
            .where(store.gateways.c.id == self._gateway.id)
            .values(complete_until_unix_ms=until_unix_ms)
        )
        self._connection.execute(
            store.publications.update()
            .where(
                columns.terminal_id == self._gateway.terminal_id,
                sa.not_(columns.lapsed),
                columns.valid_until_unix_s + guarantee.clock_tolerance_s < until_unix_ms // 1000,
            )
            .values(lapsed=True)
        )

    def check(self, before: Before) -> None:
        """Hold the reserve invariant to what was written, read back from the tables: what every account
        owes now, and which points are posted.

        An account that was over its limit already (its ledger was restored, and voids are still to be
        presented again) may not be more so.

        Raises:
            InvariantBroken: the transaction must not commit.
        """
        touched = self._owed_minor.keys() | {line.token.account_id for line in self._moved.values()}
        if not touched:
            return
        reserved_minor = {account_id: before.reserved_minor[account_id] for account_id in touched}
        for token_id, posted in self._read_back().items():
            line = self._moved[token_id]
            reserved_minor[line.token.account_id] -= _released_minor(line.claimable, posted)
        columns = store.accounts.c
        owed = sa.select(
            columns.id, columns.limit_minor, columns.outstanding_minor, columns.uncleared_minor
        ).where(among(self._connection, columns.id, touched))
        rows = self._connection.execute(owed).all()
        for account_id, limit_minor, outstanding_minor, uncleared_minor in rows:
            committed_minor = before.balances[account_id].committed_minor(before.reserved_minor[account_id])
            check_invariant(
                limit_minor=max(limit_minor, committed_minor),
                outstanding_minor=outstanding_minor,
                uncleared_minor=uncleared_minor,
                reserves_minor=(reserved_minor[account_id],),
            )

    def _read_back(self) -> dict[str, list[Interval]]:
        """The points that this batch posted, by token, as they stand in the tables."""
        written = [(token_id, after) for _, token_id, after, *_, posted, _ in self._claims if posted]
        claims = store.claims.c
        ours = beside(self._connection, "written", (claims.token_id, claims.counter_after), written)
        there = (
            sa.select(claims.token_id, claims.counter_before, claims.counter_after)
            .join_from(
                ours,
                store.claims,
                sa.and_(ours.c.c0 == claims.token_id, ours.c.c1 == claims.counter_after),
            )
            .where(claims.posted)
        )
        found: dict[str, list[Interval]] = {}
        for token_id, before, after in self._connection.execute(there).all():
            found.setdefault(token_id, []).append((before, after))
        return found


def _released_minor(claimable: IntervalSet, posted: list[Interval]) -> int:
    """How many points are claimable no longer because these are posted."""
    if len(posted) == 1 and contains(claimable, posted[0]):
        return posted[0][1] - posted[0][0]
    return measure(claimable) - measure(subtract(claimable, interval_set(posted)))


_CLAIM: Final = sa.select(
    store.claims.c.token_id,
    store.claims.c.counter_after,
    store.claims.c.counter_before,
    store.claims.c.gateway_id,
    store.claims.c.record_id,
    store.claims.c.posted,
)

_PRESENTMENT: Final = (
    "account_id",
    "verdict",
    "reason",
    "gateway_id",
    "record_id",
    "sequence",
    "content_digest",
    "body",
    "sealed_proof",
    "previous_hash",
    "signature",
    "received_unix_ms",
    "kind",
    "about",
)
_CLAIMED: Final = (
    "account_id",
    "token_id",
    "counter_after",
    "cryptogram",
    "counter_before",
    "atc",
    "gateway_id",
    "record_id",
    "posted",
    "previous_digest",
)
_TRANSFER: Final = (
    "account_id",
    "id",
    "kind",
    "record_id",
    "token_id",
    "gateway_id",
    "tapped_unix_ms",
    "posted_unix_ms",
    "original_id",
)
_ENTRY: Final = ("account_id", "transfer_id", "line", "book", "owner_id", "currency", "amount_minor")
