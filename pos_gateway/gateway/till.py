"""One tap, from the card in the field to a durable answer.

    read the card → verify its certificates → find its limit record → judge → ask for a TC
    → verify it → judge → journal, fsynced → approved

Everything here is synchronous and runs in the reader's thread; a tap never waits for a network.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum
from typing import Any, Final, Protocol
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from pos_gateway.authorization.at_hand import AtHand, Source, at_hand, terms_in_force
from pos_gateway.authorization.decision import (
    Approve,
    Ask,
    Decline,
    Evidence,
    Interval,
    Request,
    claimed_by,
    judge_arqc,
    judge_claim,
    judge_cryptogram,
    judge_grant,
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
    previous_digest,
)
from pos_gateway.emv.authentication import (
    STEP_TRANSACTION_DATA,
    AuthenticatedCard,
    CaPublicKey,
    Cryptogram,
    KnownIssuers,
    authenticate_card,
    authenticate_cryptogram,
)
from pos_gateway.emv.dialogue import (
    CardRead,
    CryptogramAnswer,
    converse,
    read_card,
    request_cryptogram,
    request_second_cryptogram,
    write_note,
)
from pos_gateway.emv.tlv import fill_dol
from pos_gateway.emv.transcript import Transcript
from pos_gateway.errors import (
    AuthenticationFailed,
    CardLeft,
    CardNotSupported,
    InvalidCardData,
    InvalidInput,
    InvalidSnapshot,
    LedgerUnreachable,
    OutcomeUnknown,
    PosGatewayError,
    ReaderUnavailable,
    Unavailable,
)
from pos_gateway.gateway.completeness import OpenPayments
from pos_gateway.gateway.corrections import Corrections
from pos_gateway.gateway.issuer_line import IssuerLine
from pos_gateway.gateway.readers.port import CardChannel
from pos_gateway.gateway.singles import Singles
from pos_gateway.inquiry import Inquiry, OnlineAnswer, Refusal
from pos_gateway.instalments import Offer, Quote
from pos_gateway.limits.header import SnapshotHeader, freshness
from pos_gateway.limits.layers import Layers
from pos_gateway.limits.note import open_note
from pos_gateway.limits.record import LimitRecord, token_key
from pos_gateway.limits.single import Kind as SingleKind
from pos_gateway.limits.single import SingleLimit, read_single
from pos_gateway.money import Currency
from pos_gateway.records import Kind, Record, Seal, uuid7

Clock = Callable[[], datetime]
"""Tells the shop's time, with its zone."""


class Step(Enum):
    """How far a tap has come, for whoever watches it."""

    READING_CARD = "reading_card"
    ASKING_CARD = "asking_card"
    ASKING_ISSUER = "asking_issuer"
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
class Relied:
    """The limit record that a TC was asked to rely on."""

    ceiling: int
    limit_digest: bytes
    snapshot_version: int
    source: Source


@dataclass(slots=True)
class Asked:
    """What one token was asked to sign for a payment: `first` in CDOL1, and after an ARQC `second` in CDOL2.

    `open`: a TC may have been given that this gateway has not approved. As long as it is, the card is asked
    exactly the same again, and so gives the same answer again.
    """

    first: Relied
    elements: Mapping[int, bytes] = field(repr=False)
    cdol1_values: bytes = field(repr=False)
    last4: str
    open: bool = True
    second: Relied | None = None
    claimed: Interval | None = None
    proof: bytes = field(default=b"", repr=False)

    @contextmanager
    def answered(self) -> Iterator[None]:
        """A forger's answer is an answer: no TC of the genuine card is out."""
        try:
            yield
        except (AuthenticationFailed, InvalidCardData):
            self.open = False
            raise


@dataclass(slots=True)
class Asking:
    """One question to the ledger and its answer, under way or there."""

    inquiry: Inquiry
    answer: Future[OnlineAnswer]


@dataclass(slots=True)
class Payment:
    """One sale to be paid by one tap.

    What the card will sign is fixed when the payment starts (`elements`; the limit record joins them
    when the token is known), so that after a tear the same card can be asked exactly the same again and
    gives the same answer again, its counter moved once. `asked` remembers what which token was asked,
    `asking` what the ledger was asked for it.
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
    reference: Mapping[str, str] = field(default_factory=dict)
    """By what the POS will ask for it again: journalled with it, and otherwise looked away from."""
    before_asking: Callable[[], None] = field(default=lambda: None, repr=False)
    """Called before a card is asked for a TC. It may block; what it raises ends the payment."""
    asked: dict[bytes, Asked] = field(default_factory=dict, repr=False)
    asking: dict[bytes, Asking] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Seen:
    """The card that paid, and the note that it carries."""

    token_key: bytes
    note: SingleLimit | None


@dataclass(frozen=True, slots=True)
class Approved:
    """Durable: the merchant will be paid. Once that is told, `Till.finish` may have a word with the card."""

    record: Record
    seen: Seen | None = None


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
        issuer: IssuerLine | None = None,
        grant_budget_s: float = 0.0,
        write_notes: bool = True,
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
        self._issuer = issuer
        self._grant_budget_s = grant_budget_s
        self._write_notes = write_notes
        self.singles = Singles()
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
        self,
        payment_id: UUID,
        amount_minor: int,
        sequence_counter: int,
        plan: Quote | None = None,
        reference: Mapping[str, str] | None = None,
        before_asking: Callable[[], None] = lambda: None,
    ) -> Payment:
        """A sale that waits for its tap; what can be prepared without the card is prepared here.

        Raises:
            InvalidInput: the amount does not fit a card.
        """
        now = self._clock()
        # Open first, trusted or not after that: see `completeness`.
        self.open_payments.begin(payment_id, _unix_ms(now))
        try:
            payment = self._begun(payment_id, amount_minor, now, sequence_counter, plan)
        except BaseException:
            self.open_payments.end(payment_id)
            raise
        payment.reference, payment.before_asking = reference or {}, before_asking
        return payment

    def end(self, payment: Payment) -> None:
        """No card may approve it any more, if none has: called once its outcome is told. A TC that was asked
        for and not approved is renounced."""
        self.open_payments.end(payment.id)
        for key, asked in payment.asked.items():
            if asked.open:
                asked.open = False
                with contextlib.suppress(Unavailable, OutcomeUnknown):  # it only frees credit earlier
                    self._renounce(payment, key, asked)

    def finish(self, approved: Approved, channel: CardChannel) -> None:
        """After "approved" was told, and while the card may still be there: hand it a note that is at hand;
        ask for one for the next time otherwise. Never raises."""
        seen = approved.seen
        if seen is None or not self._write_notes:
            return
        now_unix_s = _unix_ms(self._clock()) // 1000
        note = self.singles.note_for(
            seen.token_key, seen.note.record.sequence if seen.note else 0, now_unix_s
        )
        if note is None:
            self._ask_note(approved.record, seen, now_unix_s)
            return
        with contextlib.suppress(CardLeft, ReaderUnavailable, InvalidCardData):
            converse(write_note(note.data), channel.transceive)
            self.singles.written(seen.token_key, note)

    def _begun(
        self,
        payment_id: UUID,
        amount_minor: int,
        now: datetime,
        sequence_counter: int,
        plan: Quote | None,
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

        known.note = self._note(card, limits, known.token_key)
        self._await_answer(payment, known.token_key)

        request = self._request(payment, now, card, authentic, limits, known)
        if isinstance(request, Decline):
            return self._declined(payment, request, known)
        judgement = judge_request(request)
        if isinstance(judgement, Decline):
            return self._declined(payment, judgement, known)

        payment.before_asking()
        progress(Step.ASKING_CARD)
        asked = payment.asked.get(known.token_key)
        if asked is None or not asked.open:
            asked = payment.asked[known.token_key] = self._ask(payment, card, judgement, known)
        with asked.answered():
            answer = converse(request_cryptogram(card, asked.elements, CryptogramKind.TC), channel.transceive)
            answer, cryptogram, relied = _authenticated(authentic, card, answer, asked)
        if cryptogram.kind is CryptogramKind.ARQC:
            asked.open = False
            second = self._second(payment, card, answer, asked, judgement, request, known, limits, progress)
            if not isinstance(second, Relied):
                return second
            asked.second, asked.open = second, True
            elements = {**asked.elements, **_limit_elements(second)}
            with asked.answered():
                answer = converse(request_second_cryptogram(card, answer, elements), channel.transceive)
                cryptogram, relied = authenticate_cryptogram(authentic, answer), second
        asked.open = cryptogram.kind is CryptogramKind.TC

        proof = payment.seal.seal(Transcript.of(card, answer).to_bytes())
        claim = judge_cryptogram(
            Evidence(
                sale_id=payment.id,
                amount_minor=payment.amount_minor,
                ceiling=relied.ceiling,
                kind=cryptogram.kind,
                iad=cryptogram.iad,
                policy=self.policy,
            )
        )
        if cryptogram.kind is CryptogramKind.TC:
            asked.proof = proof
            asked.claimed = known.claimed = claimed_by(payment.id, payment.amount_minor, cryptogram.iad)
        if isinstance(claim, Decline):
            return self._declined(payment, claim, known, proof)
        progress(Step.RECORDING)
        with self._claims.token(known.token_key):
            interval = claim.interval
            seen = self._journal.overlapping(known.token_key, interval.before, interval.after)
            verdict = judge_claim(claim, seen)
            if isinstance(verdict, Decline):
                return self._declined(payment, verdict, known, proof)
            return self._approved(payment, asked, relied, cryptogram, verdict, known, proof)

    def _second(
        self,
        payment: Payment,
        card: CardRead,
        answer: CryptogramAnswer,
        asked: Asked,
        judgement: Ask,
        request: Request,
        known: _Known,
        limits: Layers | None,
        progress: Callable[[Step], None],
    ) -> Relied | Outcome:
        """After an ARQC: what the card may be asked for once more, or how the tap ends."""
        if judgement.ceiling > asked.first.ceiling:
            # It was granted before a tear: whatever has become of the line.
            return self._relying_on(judgement, known)
        proof = payment.seal.seal(Transcript.of(card, answer).to_bytes())
        given_up = judge_arqc(request, judgement)
        if isinstance(given_up, Decline):
            return self._declined(payment, given_up, known, proof)
        progress(Step.ASKING_ISSUER)
        asking = payment.asking.get(known.token_key)
        if asking is None or _failed(asking):
            inquiry = asking.inquiry if asking else Inquiry(self.station.gateway_id, payment.id, proof)
            asking = payment.asking[known.token_key] = self._ask_issuer(inquiry, known.token_key)
        try:
            found = asking.answer.result(self._grant_budget_s)
        except TimeoutError:
            return TapAgain(Decline(Reason.ISSUER_SLOW, "the issuer has not answered yet"))
        except PosGatewayError as error:
            return self._declined(payment, Decline(Reason.OVER_CEILING, error.reason), known, proof)
        self.singles.keep(known.token_key, found)
        if found.grant is None:
            return self._declined(payment, _refusal(found.refused), known, proof)
        grants = self._grants(limits, known.token_key, request.now_unix_ms, [found.grant])
        if not grants:
            why = Decline(Reason.OVER_CEILING, "the issuer's grant does not hold here")
            return self._declined(payment, why, known, proof)
        again = judge_grant(request, grants[0], asked.first.ceiling)
        if isinstance(again, Decline):
            return self._declined(payment, again, known, proof)
        return self._relying_on(again, known)

    def _ask_issuer(self, inquiry: Inquiry, token_key: bytes) -> Asking:
        if self._issuer is None:
            raise LedgerUnreachable("this till has no line to the issuer")
        future = self._issuer.ask_grant(inquiry)
        future.add_done_callback(lambda done: self._keep(token_key, done))
        return Asking(inquiry, future)

    def _await_answer(self, payment: Payment, token_key: bytes) -> None:
        """A card that was asked to tap again: what its issuer is saying is worth the budget once more."""
        asking = payment.asking.get(token_key)
        if asking is not None and not asking.answer.done():
            with contextlib.suppress(TimeoutError, PosGatewayError):
                self.singles.keep(token_key, asking.answer.result(self._grant_budget_s))

    def _keep(self, token_key: bytes, done: Future[OnlineAnswer]) -> None:
        if not done.cancelled() and done.exception() is None:
            self.singles.keep(token_key, done.result())

    def _ask_note(self, record: Record, seen: Seen, now_unix_s: int) -> None:
        note, issuer = seen.note, self._issuer
        if note is not None and 2 * (note.valid_until_unix_s - now_unix_s) > (
            note.valid_until_unix_s - note.issued_unix_s
        ):
            return  # more than half of its life is left
        limits = self._limits()
        if issuer is None or not issuer.reachable or limits is None:
            return
        terms = terms_in_force(limits.newest, now_unix_s)
        if terms.keys and terms.note_life_s:
            future = issuer.ask_note(Inquiry(self.station.gateway_id, record.id, record.proof))
            future.add_done_callback(lambda done: self._keep(seen.token_key, done))

    def _note(self, card: CardRead, limits: Layers | None, token_key: bytes) -> SingleLimit | None:
        """The note on the card, verified; one that is not ours, or of no use, is as good as none."""
        if card.note is None or limits is None:
            return None
        try:
            data = open_note(card.note, token_key_secret=self._token_key_secret, token_key=token_key)
            single = read_single(data, limits.newest)
        except (AuthenticationFailed, InvalidInput):
            return None
        good = single.kind is SingleKind.NOTE and single.record.token_key == token_key
        return single if good else None

    def _grants(
        self, limits: Layers | None, token_key: bytes, now_unix_ms: int, grants: Iterable[bytes]
    ) -> list[AtHand]:
        """Those that hold for this token, verified against the newest limits."""
        found = []
        for data in grants:
            with contextlib.suppress(AuthenticationFailed, InvalidInput):
                if limits is not None:
                    single = read_single(data, limits.newest)
                    if single.record.token_key == token_key:
                        found.append(self._at_hand(single, limits.newest, now_unix_ms))
        return found

    def _at_hand(self, single: SingleLimit, header: SnapshotHeader, now_unix_ms: int) -> AtHand:
        return at_hand(single, header, terminal_id=self.station.terminal_id, now_unix_s=now_unix_ms // 1000)

    def _request(
        self,
        payment: Payment,
        now: datetime,
        card: CardRead,
        authentic: AuthenticatedCard,
        limits: Layers | None,
        known: _Known,
    ) -> Request | Decline:
        record: LimitRecord | None = None
        header: SnapshotHeader | None = None
        newest: SnapshotHeader | None = None
        singles: list[AtHand] = []
        now_unix_ms = _unix_ms(now)
        if limits is not None:
            newest = limits.newest
            try:
                record, header = limits.lookup(known.token_key)
            except (InvalidSnapshot, AuthenticationFailed) as error:
                return Decline(Reason.NO_VALID_LIMITS, error.reason)
            known.snapshot_version = header.version
            known.newest_version = newest.version
            if record is not None:
                known.limit_digest = record.digest(header.nonce)
            if known.note is not None:
                singles.append(self._at_hand(known.note, newest, now_unix_ms))
            singles += self._grants(
                limits, known.token_key, now_unix_ms, self.singles.grants(known.token_key)
            )
        return Request(
            amount_minor=payment.amount_minor,
            today=now.date(),
            now_unix_ms=now_unix_ms,
            clock_was_trusted=payment.clock_was_trusted,
            clock_high_water_unix_ms=self._journal.latest_at_unix_ms,
            card_effective=authentic.effective,
            card_expires=authentic.expires,
            device_can_verify_holder=card.device_can_verify_holder,
            freshness=freshness(header, now_unix_ms // 1000) if header else None,
            stale_per_tap_cap_minor=header.policy.stale_per_tap_cap_minor if header else 0,
            record=record,
            exposure=self._claims.exposure_besides(payment),
            policy=self.policy,
            singles=tuple(singles),
            online=terms_in_force(newest, now_unix_ms // 1000),
            issuer_reachable=self._issuer is not None and self._issuer.reachable,
            merchant_category=self.station.merchant_category,
            plan=payment.plan,
            offers=limits.newest.offers if limits else (),
        )

    def _ask(self, payment: Payment, card: CardRead, judgement: Ask, known: _Known) -> Asked:
        relied = self._relying_on(judgement, known)
        elements = {**payment.elements, **_limit_elements(relied)}
        return Asked(relied, elements, fill_dol(card.cdol1, elements), known.last4 or "")

    def _relying_on(self, judgement: Ask, known: _Known) -> Relied:
        if judgement.issuer_first:
            return Relied(0, bytes(DIGEST_BYTES), known.newest_version, Source.SNAPSHOT)
        if judgement.single is None:
            return Relied(judgement.ceiling, known.limit_digest, known.snapshot_version, Source.SNAPSHOT)
        single = judgement.single
        return Relied(judgement.ceiling, single.digest, known.newest_version, single.source)

    def _approved(
        self,
        payment: Payment,
        asked: Asked,
        relied: Relied,
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
            "ceiling": relied.ceiling,
            "limit_digest": relied.limit_digest.hex(),
            "limit_source": relied.source.value,
            "snapshot_version": relied.snapshot_version,
            "plan_digest": payment.elements[TAG_PLAN_DIGEST].hex(),
            "sequence_counter": payment.sequence_counter,
            "unpredictable_number": payment.unpredictable_number.hex(),
        }
        # From here on it may be on the disk: what may be approved is never renounced.
        asked.open = False
        record = self._journal.append(Kind.AUTHORIZATION, payment.id, facts, proof)
        if relied.source is Source.GRANT:
            self.singles.use(known.token_key, relied.limit_digest)
        return Approved(record, Seen(known.token_key, known.note))

    def _declined(self, payment: Payment, decline: Decline, known: _Known, proof: bytes = b"") -> Declined:
        facts = self._facts(payment, known) | {"reason": decline.reason.value, "detail": decline.detail}
        if known.claimed is not None:
            facts |= _claim_facts(known.claimed)
        record_id = uuid7(_unix_ms(self._clock()), self._random_bytes(10))
        self._journal.append(Kind.DECLINE, record_id, facts, proof)
        return Declined(decline, known.last4)

    def _renounce(self, payment: Payment, token_key: bytes, asked: Asked) -> None:
        """Tell the ledger that a TC will never be presented, with the TC itself if it was read."""
        facts = {
            "sale_id": str(payment.id),
            "amount_minor": payment.amount_minor,
            "currency": self.station.currency.code,
            "at_unix_ms": _unix_ms(self._clock()),
            "gateway_id": self.station.gateway_id,
            "terminal_id": self.station.terminal_id,
            "merchant_id": self.station.merchant_id,
            "token_key": token_key.hex(),
            "token_last4": asked.last4,
            "cdol1_values": asked.cdol1_values.hex(),
            "previous_digest": previous_digest(asked.cdol1_values).hex(),
        }
        if asked.claimed is not None:
            facts |= _claim_facts(asked.claimed)
        record_id = uuid7(_unix_ms(self._clock()), self._random_bytes(10))
        self._journal.append(Kind.RENUNCIATION, record_id, facts, asked.proof)

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
        if payment.reference:
            facts["pos"] = dict(payment.reference)
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
    newest_version: int = 0
    note: SingleLimit | None = None
    claimed: Interval | None = None


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
        # Any of the others may be relying on a grant or note.
        return Exposure(
            known.count + len(others),
            known.amount_minor + sum(others),
            known.oldest_at_unix_ms,
            known.online_amount_minor + sum(others),
        )

    @contextmanager
    def token(self, token_key: bytes) -> Iterator[None]:
        """No other lane journals a payment of this token until the block ends."""
        with self._stripes[token_key[-1] % self._STRIPES]:
            yield


def _authenticated(
    authentic: AuthenticatedCard, card: CardRead, answer: CryptogramAnswer, asked: Asked
) -> tuple[CryptogramAnswer, Cryptogram, Relied]:
    """The answer to the first GENERATE AC. After a tear in the second one, a card that had answered that
    gives that same answer to the first: it covers what the second one sent, too."""
    try:
        return answer, authenticate_cryptogram(authentic, answer), asked.first
    except AuthenticationFailed as error:
        if asked.second is None or error.step != STEP_TRANSACTION_DATA:
            raise
        elements = {**asked.elements, **_limit_elements(asked.second)}
        second = replace(answer, cdol2_values=fill_dol(card.cdol2, elements))
        return second, authenticate_cryptogram(authentic, second), asked.second


def _limit_elements(relied: Relied) -> dict[int, bytes]:
    return {TAG_CEILING: counter_bytes(relied.ceiling), TAG_LIMIT_DIGEST: relied.limit_digest}


def _claim_facts(claimed: Interval) -> dict[str, Any]:
    return {"counter_before": claimed.before, "counter_after": claimed.after}


def _refusal(refused: Refusal | None) -> Decline:
    """The issuer's no, in our words; what it says that we do not know means that it gives no credit."""
    try:
        return Decline(Reason(refused.reason if refused else ""), refused.detail if refused else "")
    except ValueError:
        return Decline(Reason.OVER_CEILING, refused.detail if refused else "")


def _failed(asking: Asking) -> bool:
    return asking.answer.done() and (asking.answer.cancelled() or asking.answer.exception() is not None)


def _unix_ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)
