"""One tap, from the card in the field to a durable answer.

    read the card → verify its certificates → find its limit record → judge → ask for a TC
    → verify it → judge → journal, fsynced → approved

Everything here is synchronous and runs in the reader's thread; a tap never waits for a network.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any, Final, Protocol
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from pos_gateway.authorization.decision import (
    Approve,
    Ask,
    Decline,
    Evidence,
    Interval,
    Request,
    judge_claim,
    judge_cryptogram,
    judge_request,
)
from pos_gateway.authorization.policy import Exposure, Policy, clock_is_trusted
from pos_gateway.authorization.reasons import Reason
from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.application import (
    DIGEST_BYTES,
    NO_PLAN,
    TAG_CEILING,
    TAG_LIMIT_DIGEST,
    TAG_PLAN_DIGEST,
    Sale,
    counter_bytes,
)
from pos_gateway.emv.authentication import (
    AuthenticatedCard,
    CaPublicKey,
    Cryptogram,
    KnownIssuers,
    authenticate_card,
    authenticate_cryptogram,
)
from pos_gateway.emv.dialogue import CardRead, converse, read_card, request_cryptogram
from pos_gateway.emv.transcript import Transcript
from pos_gateway.errors import (
    AuthenticationFailed,
    CardLeft,
    CardNotSupported,
    InvalidCardData,
    InvalidSnapshot,
)
from pos_gateway.gateway.completeness import OpenPayments
from pos_gateway.gateway.corrections import Corrections
from pos_gateway.gateway.readers.port import CardChannel
from pos_gateway.instalments import Offer, Quote
from pos_gateway.limits.header import SnapshotHeader, freshness
from pos_gateway.limits.layers import Layers
from pos_gateway.limits.record import LimitRecord, token_key
from pos_gateway.money import Currency
from pos_gateway.records import Kind, Record, Seal, uuid7

Clock = Callable[[], datetime]
"""Tells the shop's time, with its zone."""


class Step(Enum):
    """How far a tap has come, for whoever watches it."""

    READING_CARD = "reading_card"
    ASKING_CARD = "asking_card"
    RECORDING = "recording"


@dataclass(frozen=True, slots=True)
class Station:
    """Who is paid, and where."""

    gateway_id: str
    terminal_id: str
    merchant_id: str
    merchant_category: str
    currency: Currency
    country_numeric: int


@dataclass(frozen=True, slots=True)
class Asked:
    """The limit record that a card's TC was asked to rely on, and all it was asked to sign."""

    ceiling: int
    limit_digest: bytes
    snapshot_version: int
    elements: Mapping[int, bytes] = field(repr=False)


@dataclass(slots=True)
class Payment:
    """One sale to be paid by one tap.

    What the card will sign is fixed when the payment starts (`elements`; the limit record joins them
    when the token is known), so that after a tear the same card can be asked exactly the same again and
    gives the same answer again, its counter moved once. `asked` remembers what which token was asked.
    """

    id: UUID
    amount_minor: int
    started_at: datetime
    unpredictable_number: bytes = field(repr=False)
    sequence_counter: int
    elements: Mapping[int, bytes] = field(repr=False)
    plan: Quote | None
    seal: Seal = field(repr=False)
    clock_was_trusted: bool = True
    """When it started, which is the time it carries."""
    asked: dict[bytes, Asked] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Approved:
    """Durable: the merchant will be paid."""

    record: Record


@dataclass(frozen=True, slots=True)
class Declined:
    decline: Decline
    token_last4: str | None


@dataclass(frozen=True, slots=True)
class TapAgain:
    """The card left too early. Nothing was shown, nothing is lost: the same card may tap again."""

    decline: Decline


Outcome = Approved | Declined | TapAgain


class JournalPort(Protocol):
    """What the till needs of the journal."""

    def append(self, kind: Kind, record_id: UUID, facts: Mapping[str, Any], proof: bytes = b"") -> Record: ...

    def get(self, record_id: UUID) -> Record: ...

    def about(self, record_id: UUID) -> list[Record]: ...

    @property
    def exposure(self) -> Exposure: ...

    @property
    def latest_at_unix_ms(self) -> int: ...

    def overlapping(self, token_key: bytes, before: int, after: int) -> Sequence[Interval]: ...


class Till:
    """Takes taps for one shop. Several lanes may call `tap` at once, each from its own thread."""

    def __init__(
        self,
        *,
        station: Station,
        policy: Policy,
        aids: Sequence[bytes],
        journal: JournalPort,
        limits: Callable[[], Layers | None],
        ca_keys: Sequence[CaPublicKey],
        token_key_secret: bytes,
        sealing_key: X25519PublicKey,
        clock: Clock,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self.station = station
        self.policy = policy
        self._aids = aids
        self._journal = journal
        self._limits = limits
        self._ca_keys = ca_keys
        self._token_key_secret = token_key_secret
        self._sealing_key = sealing_key
        self._clock = clock
        self._random_bytes = random_bytes
        self._claims = _Claims(journal)
        self.open_payments = OpenPayments()
        self.corrections = Corrections(
            journal,
            {
                "currency": station.currency.code,
                "gateway_id": station.gateway_id,
                "terminal_id": station.terminal_id,
                "merchant_id": station.merchant_id,
            },
            lambda: _unix_ms(clock()),
        )
        self._known_issuers: KnownIssuers = {}

    def offers(self) -> tuple[Offer, ...]:
        """The instalments that the limits in use let this till offer, whatever the card."""
        limits, category = self._limits(), self.station.merchant_category
        offers = limits.newest.offers if limits is not None else ()
        return tuple(offer for offer in offers if not offer.categories or category in offer.categories)

    def new_payment(
        self, payment_id: UUID, amount_minor: int, sequence_counter: int, plan: Quote | None = None
    ) -> Payment:
        """A sale that waits for its tap; what can be prepared without the card is prepared here.

        Raises:
            InvalidInput: the amount does not fit a card.
        """
        now = self._clock()
        # Open first, trusted or not after that: see `completeness`.
        self.open_payments.begin(payment_id, _unix_ms(now))
        try:
            return self._begun(payment_id, amount_minor, now, sequence_counter, plan)
        except BaseException:
            self.open_payments.end(payment_id)
            raise

    def end(self, payment: Payment) -> None:
        """No card may approve it any more, if none has: called once its outcome is told."""
        self.open_payments.end(payment.id)

    def _begun(
        self, payment_id: UUID, amount_minor: int, now: datetime, sequence_counter: int, plan: Quote | None
    ) -> Payment:
        station, unpredictable_number = self.station, self._random_bytes(4)
        trusted = clock_is_trusted(_unix_ms(now), self._journal.latest_at_unix_ms, self.policy)
        sale = Sale(
            amount_minor=amount_minor,
            currency_numeric=station.currency.numeric,
            country_numeric=station.country_numeric,
            at=now,
            unpredictable_number=unpredictable_number,
            sequence_counter=sequence_counter,
            terminal_id=station.terminal_id,
            merchant_id=station.merchant_id,
            merchant_category=station.merchant_category,
            sale_id=payment_id.bytes,
            ceiling=0,
            limit_digest=bytes(DIGEST_BYTES),
            plan_digest=plan.digest if plan is not None else NO_PLAN,
        )
        return Payment(
            id=payment_id,
            amount_minor=amount_minor,
            started_at=now,
            unpredictable_number=unpredictable_number,
            sequence_counter=sequence_counter,
            elements=sale.elements(),
            plan=plan,
            seal=Seal(self._sealing_key, self._random_bytes),
            clock_was_trusted=trusted,
        )

    def tap(
        self, payment: Payment, channel: CardChannel, progress: Callable[[Step], None] = lambda step: None
    ) -> Outcome:
        """Let one card pay.

        Raises:
            ReaderUnavailable: the reader or pcscd went away; the payment may go on with the next tap.
            OutcomeUnknown, Unavailable: the journal could not say that the approval is durable.
        """
        known = _Known()
        try:
            with self._claims.hold(payment):
                return self._tap(payment, channel, progress, known)
        except CardLeft as error:
            return TapAgain(Decline(Reason.CARD_LEFT, error.reason))
        except CardNotSupported as error:
            return self._declined(payment, Decline(Reason.CARD_NOT_SUPPORTED, error.reason), known)
        except InvalidCardData as error:
            return self._declined(payment, Decline(Reason.INVALID_CARD_DATA, error.reason), known)
        except AuthenticationFailed as error:
            reason = Reason.CARD_EXPIRED if error.step == "expiry" else Reason.AUTHENTICATION_FAILED
            return self._declined(payment, Decline(reason, error.reason), known)

    def give_up(self, payment: Payment, decline: Decline) -> Declined:
        """Journal that a payment ended without a tap that could be judged."""
        return self._declined(payment, decline, _Known())

    def _tap(
        self, payment: Payment, channel: CardChannel, progress: Callable[[Step], None], known: _Known
    ) -> Outcome:
        progress(Step.READING_CARD)
        now = self._clock()
        card = converse(read_card(payment.elements, self._aids), channel.transceive)
        limits = self._limits()
        revoked = limits.newest.revoked_certificates if limits else ()
        authentic = authenticate_card(
            card, self._ca_keys, now.date(), revoked, known_issuers=self._known_issuers
        )
        known.last4, known.aid = authentic.last4, card.aid
        known.token_key = token_key(self._token_key_secret, authentic.pan, authentic.psn)

        judgement = self._judge_request(payment, now, card, authentic, limits, known)
        if isinstance(judgement, Decline):
            return self._declined(payment, judgement, known)

        progress(Step.ASKING_CARD)
        asked = payment.asked.get(known.token_key)
        if asked is None:
            asked = payment.asked[known.token_key] = self._relying_on(payment, judgement.ceiling, known)
        answer = converse(request_cryptogram(card, asked.elements, CryptogramKind.TC), channel.transceive)
        cryptogram = authenticate_cryptogram(authentic, answer)

        proof = payment.seal.seal(Transcript.of(card, answer).to_bytes())
        claim = judge_cryptogram(
            Evidence(
                sale_id=payment.id,
                amount_minor=payment.amount_minor,
                ceiling=asked.ceiling,
                kind=cryptogram.kind,
                iad=cryptogram.iad,
                policy=self.policy,
            )
        )
        if isinstance(claim, Decline):
            return self._declined(payment, claim, known, proof)
        progress(Step.RECORDING)
        with self._claims.token(known.token_key):
            interval = claim.interval
            seen = self._journal.overlapping(known.token_key, interval.before, interval.after)
            verdict = judge_claim(claim, seen)
            if isinstance(verdict, Decline):
                return self._declined(payment, verdict, known, proof)
            return self._approved(payment, asked, cryptogram, verdict, known, proof)

    def _judge_request(
        self,
        payment: Payment,
        now: datetime,
        card: CardRead,
        authentic: AuthenticatedCard,
        limits: Layers | None,
        known: _Known,
    ) -> Ask | Decline:
        record: LimitRecord | None = None
        header: SnapshotHeader | None = None
        if limits is not None:
            try:
                record, header = limits.lookup(known.token_key)
            except (InvalidSnapshot, AuthenticationFailed) as error:
                return Decline(Reason.NO_VALID_LIMITS, error.reason)
            if record is not None:
                known.limit_digest = record.digest(header.nonce)
                known.snapshot_version = header.version
        return judge_request(
            Request(
                amount_minor=payment.amount_minor,
                today=now.date(),
                now_unix_ms=_unix_ms(now),
                clock_was_trusted=payment.clock_was_trusted,
                clock_high_water_unix_ms=self._journal.latest_at_unix_ms,
                card_effective=authentic.effective,
                card_expires=authentic.expires,
                device_can_verify_holder=card.device_can_verify_holder,
                freshness=freshness(header, _unix_ms(now) // 1000) if header else None,
                stale_per_tap_cap_minor=header.policy.stale_per_tap_cap_minor if header else 0,
                record=record,
                exposure=self._claims.exposure_besides(payment),
                policy=self.policy,
                merchant_category=self.station.merchant_category,
                plan=payment.plan,
                offers=limits.newest.offers if limits else (),
            )
        )

    def _relying_on(self, payment: Payment, ceiling: int, known: _Known) -> Asked:
        record = {TAG_CEILING: counter_bytes(ceiling), TAG_LIMIT_DIGEST: known.limit_digest}
        return Asked(ceiling, known.limit_digest, known.snapshot_version, {**payment.elements, **record})

    def _approved(
        self,
        payment: Payment,
        asked: Asked,
        cryptogram: Cryptogram,
        approval: Approve,
        known: _Known,
        proof: bytes,
    ) -> Approved:
        facts = self._facts(payment, known) | {
            "merchant_id": self.station.merchant_id,
            "merchant_category": self.station.merchant_category,
            "aid": known.aid.hex(),
            "atc": cryptogram.atc,
            "ac": cryptogram.ac.hex(),
            "counter_before": approval.interval.before,
            "counter_after": approval.interval.after,
            "ceiling": asked.ceiling,
            "limit_digest": asked.limit_digest.hex(),
            "snapshot_version": asked.snapshot_version,
            "plan_digest": payment.elements[TAG_PLAN_DIGEST].hex(),
            "sequence_counter": payment.sequence_counter,
            "unpredictable_number": payment.unpredictable_number.hex(),
        }
        return Approved(self._journal.append(Kind.AUTHORIZATION, payment.id, facts, proof))

    def _declined(self, payment: Payment, decline: Decline, known: _Known, proof: bytes = b"") -> Declined:
        facts = self._facts(payment, known) | {"reason": decline.reason.value, "detail": decline.detail}
        record_id = uuid7(_unix_ms(self._clock()), self._random_bytes(10))
        self._journal.append(Kind.DECLINE, record_id, facts, proof)
        return Declined(decline, known.last4)

    def _facts(self, payment: Payment, known: _Known) -> dict[str, Any]:
        facts = {
            "sale_id": str(payment.id),
            "amount_minor": payment.amount_minor,
            "currency": self.station.currency.code,
            "at_unix_ms": _unix_ms(payment.started_at),
            "gateway_id": self.station.gateway_id,
            "terminal_id": self.station.terminal_id,
            "token_key": known.token_key.hex(),
            "token_last4": known.last4 or "",
        }
        if payment.plan is not None:
            facts["plan"] = {"offer": payment.plan.offer.to_json(), "periods": payment.plan.periods}
        return facts


@dataclass(slots=True)
class _Known:
    """What has been learnt about the token so far."""

    last4: str | None = None
    aid: bytes = b""
    token_key: bytes = b""
    limit_digest: bytes = b""
    snapshot_version: int = 0


class _Claims:
    """What several lanes are about to journal, so that caps and overlaps hold across them."""

    _STRIPES: Final = 64

    def __init__(self, journal: JournalPort) -> None:
        self._journal = journal
        self._lock = threading.Lock()
        self._in_flight: dict[UUID, int] = {}
        self._stripes = [threading.Lock() for _ in range(self._STRIPES)]

    @contextmanager
    def hold(self, payment: Payment) -> Iterator[None]:
        """Count the payment as exposure while its tap lasts."""
        with self._lock:
            self._in_flight[payment.id] = payment.amount_minor
        try:
            yield
        finally:
            with self._lock:
                del self._in_flight[payment.id]

    def exposure_besides(self, payment: Payment) -> Exposure:
        with self._lock:
            others = [amount for held, amount in self._in_flight.items() if held != payment.id]
            known = self._journal.exposure
        return Exposure(known.count + len(others), known.amount_minor + sum(others), known.oldest_at_unix_ms)

    @contextmanager
    def token(self, token_key: bytes) -> Iterator[None]:
        """No other lane journals a payment of this token until the block ends."""
        with self._stripes[token_key[-1] % self._STRIPES]:
            yield


def _unix_ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)
