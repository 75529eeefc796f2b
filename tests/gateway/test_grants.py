"""Taps beyond what the shop knows: grants on the spot, notes that cards carry, and every way they can fail.

Real cards, limits, journal, ledger and keys; only reader and network are left out.
"""

from __future__ import annotations

import queue
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.authorization.reasons import Reason
from pos_gateway.emv.application import previous_digest
from pos_gateway.emv.note import put_note_data
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.enrolment import Merchant
from pos_gateway.errors import NotFound
from pos_gateway.gateway.lane import Lane, PaymentView, State
from pos_gateway.gateway.till import Approved, Declined, Outcome, Payment, TapAgain
from pos_gateway.inquiry import NoteToWrite, OnlineAnswer
from pos_gateway.lab.counter import FieldReader
from pos_gateway.lab.direct_line import Mishap
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.forged_card import with_another_icc_key
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger.accounts import TokenStatus
from pos_gateway.ledger.config import OnlinePolicy, Policy
from pos_gateway.limits.note import open_note, seal_note
from pos_gateway.limits.record import LimitRecord, token_key
from pos_gateway.limits.single import SINGLE_BYTES, SingleLimit, read_single
from pos_gateway.limits.single import Kind as SingleKind
from pos_gateway.records import Kind, Record
from tests.gateway.test_till import Clock

LIMIT_MINOR = 30_000
KNOWN_MINOR = 3_000
"""A tenth of it stands in snapshots; the rest has to be asked for."""
POLICY = Policy(token_share_percent=10, online=OnlinePolicy(note_room_percent=20))

GENERATE_AC, PUT_DATA = 0xAE, 0xDA


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shop(tmp_path: Path, ledger_home: Path, clock: Clock) -> Iterator[Shop]:
    shutil.copytree(ledger_home, tmp_path / "ledger")
    with Shop(tmp_path, policy=POLICY, clock=clock) as shop:
        shop.till._grant_budget_s = 0.05
        shop.line.up = True
        yield shop


@pytest.fixture
def other(shop: Shop, tmp_path: Path, clock: Clock) -> Iterator[Shop]:
    """Another shop of the same issuer, off the line."""
    merchant = Merchant(id="CORNERSHOP", name="Corner shop", category="5411")
    with Shop(tmp_path, clock=clock, gateway="other", merchant=merchant) as other:
        yield other


@pytest.fixture
def token(shop: Shop) -> tuple[str, Personalisation]:
    issued = shop.issue(limit_minor=LIMIT_MINOR)
    shop.publish()
    return issued


@pytest.fixture
def card(token: tuple[str, Personalisation]) -> VirtualCard:
    return VirtualCard(token[1])


def sale(shop: Shop, amount_minor: int = 10_000) -> Payment:
    return shop.till.new_payment(uuid4(), amount_minor, shop.journal.last_sequence + 1)


def tap(shop: Shop, payment: Payment, card: VirtualCard, leaves_after: int | None = None) -> Outcome:
    return shop.till.tap(payment, DirectChannel(card, leaves_after=leaves_after))


def pay(shop: Shop, card: VirtualCard, amount_minor: int = 10_000) -> Outcome:
    """One payment as a lane takes it, to the very end."""
    payment, channel = sale(shop, amount_minor), DirectChannel(card)
    outcome = shop.till.tap(payment, channel)
    shop.till.end(payment)
    if isinstance(outcome, Approved):
        shop.till.finish(outcome, channel)
    return outcome


def reason(outcome: Outcome) -> Reason:
    assert isinstance(outcome, (Declined, TapAgain)), outcome
    return outcome.decline.reason


def source(outcome: Outcome) -> str:
    assert isinstance(outcome, Approved), outcome
    return str(outcome.record.facts()["limit_source"])


def of_kind(shop: Shop, kind: Kind) -> list[Record]:
    return [record for record in shop.journal.records(0, 1000) if record.kind is kind]


def presented(shop: Shop) -> list[str]:
    """Every authorization of the journal, brought to the ledger."""
    return [verdict.verdict.value for verdict in shop.present(of_kind(shop, Kind.AUTHORIZATION))]


# Grants


def test_within_its_ceiling_a_tap_asks_nobody(shop: Shop, card: VirtualCard) -> None:
    assert source(tap(shop, sale(shop, KNOWN_MINOR), card)) == "snapshot"
    assert shop.line.asked == []


def test_beyond_it_the_issuer_grants_and_the_same_tap_pays(shop: Shop, card: VirtualCard) -> None:
    counter, channel = card.state.counter, DirectChannel(card)
    payment = sale(shop)
    outcome = shop.till.tap(payment, channel)
    assert source(outcome) == "grant"
    assert [command[1] for command in channel.commands] == [0xA4, 0xA8, 0xB2, 0xB2, 0xB2, 0xAE, 0xAE]
    assert card.state.counter == counter + 10_000
    assert isinstance(outcome, Approved)
    facts = outcome.record.facts()
    assert facts["ceiling"] == counter + 10_000
    assert presented(shop) == ["posted"]
    assert presented(shop) == ["duplicate"]
    shop.ledger.check_books()
    assert shop.ledger.payments()[0].amount_minor == 10_000


def test_with_the_line_down_it_is_declined_as_ever(shop: Shop, card: VirtualCard) -> None:
    shop.line.up = False
    counter = card.state.counter
    assert reason(pay(shop, card)) is Reason.OVER_CEILING
    assert card.state.counter == counter
    assert of_kind(shop, Kind.RENUNCIATION) == []


def test_the_issuer_never_grants_more_than_the_limit(shop: Shop, card: VirtualCard) -> None:
    assert source(pay(shop, card, 20_000)) == "grant"
    assert reason(pay(shop, card, 10_001)) is Reason.OVER_CEILING
    assert isinstance(pay(shop, card, 10_000), Approved)
    assert reason(pay(shop, card, 1)) is Reason.OVER_CEILING
    assert set(presented(shop)) == {"posted"}
    shop.ledger.check_books()
    account = shop.ledger.accounts()[0]
    assert account.outstanding_minor == LIMIT_MINOR


def test_a_card_that_no_snapshot_knows_yet_pays_when_its_issuer_says_so(
    shop: Shop, card: VirtualCard
) -> None:
    _, late = shop.issue(limit_minor=LIMIT_MINOR)
    fresh = VirtualCard(late)
    assert source(pay(shop, fresh)) == "grant"
    shop.line.up = False
    assert reason(pay(shop, VirtualCard(shop.issue(limit_minor=1)[1]))) is Reason.UNKNOWN_TOKEN
    assert presented(shop) == ["posted"]


def test_a_large_tap_on_stale_limits_is_the_issuer_s_to_allow(
    shop: Shop, card: VirtualCard, clock: Clock
) -> None:
    shop.ledger.set_policy(POLICY.model_copy(update={"stale_per_tap_cap_minor": 1_000, "refresh_after_s": 1}))
    stale = VirtualCard(shop.issue(limit_minor=LIMIT_MINOR)[1])  # it stands in the new limits alone
    shop.publish()
    clock.off = timedelta(seconds=30)
    shop.line.up = False
    assert reason(pay(shop, stale, 1_001)) is Reason.OVER_TAP_CAP
    shop.line.up = True
    assert source(pay(shop, stale, 2_000)) == "grant"


def test_a_token_that_was_blocked_since_is_refused_by_its_issuer(
    shop: Shop, card: VirtualCard, token: tuple[str, Personalisation]
) -> None:
    shop.ledger.set_token_status(token[0], TokenStatus.BLOCKED)
    assert reason(pay(shop, card)) is Reason.BLOCKED


def test_a_lost_question_or_answer_is_asked_again_and_pays_once(shop: Shop, card: VirtualCard) -> None:
    for mishap in (Mishap.LOST_QUESTION, Mishap.LOST_ANSWER):
        shop.line.mishaps.append(mishap)
        payment, counter = sale(shop, 5_000), card.state.counter
        assert reason(tap(shop, payment, card)) is Reason.OVER_CEILING
        assert card.state.counter == counter
        shop.line.mishaps.clear()
        # The cashier tries again: the same sale id in a new dialogue would be another question. This one
        # is the same payment object, as a lane holds it, and sends the same bytes.
        assert source(tap(shop, payment, card)) == "grant"
        assert len({inquiry.to_body() for inquiry in shop.line.asked}) == 1
        shop.line.asked.clear()
        assert card.state.counter == counter + 5_000
    assert presented(shop) == ["posted"] * 2


def test_a_question_that_arrives_twice_is_granted_once(shop: Shop, card: VirtualCard) -> None:
    shop.line.mishaps.append(Mishap.TWICE)
    assert source(pay(shop, card)) == "grant"
    free = shop.ledger.accounts()[0].free_minor
    assert free >= LIMIT_MINOR - KNOWN_MINOR - 10_000 - LIMIT_MINOR // 5


def test_a_late_answer_asks_to_tap_again_and_then_pays_at_once(shop: Shop, card: VirtualCard) -> None:
    shop.line.mishaps.append(Mishap.LATE)
    payment, counter = sale(shop), card.state.counter
    assert reason(tap(shop, payment, card)) is Reason.ISSUER_SLOW
    shop.line.bring()
    channel = DirectChannel(card)
    outcome = shop.till.tap(payment, channel)
    assert source(outcome) == "grant"
    assert [command[1] for command in channel.commands].count(GENERATE_AC) == 1
    assert card.state.counter == counter + 10_000
    assert len(shop.line.asked) == 1
    assert presented(shop) == ["posted"]


def test_an_answer_still_late_at_the_second_tap_is_waited_for_again(shop: Shop, card: VirtualCard) -> None:
    shop.line.mishaps.append(Mishap.LATE)
    payment = sale(shop)
    for _ in range(2):
        assert reason(tap(shop, payment, card)) is Reason.ISSUER_SLOW
    assert len(shop.line.asked) == 1
    shop.line.bring()
    assert source(tap(shop, payment, card)) == "grant"


def test_a_grant_that_came_too_late_serves_the_next_payment_of_its_card(
    shop: Shop, card: VirtualCard
) -> None:
    shop.line.mishaps.append(Mishap.LATE)
    payment = sale(shop)
    torn = tap(shop, payment, card)
    assert isinstance(torn, TapAgain)
    shop.till.give_up(payment, torn.decline)
    shop.till.end(payment)
    shop.line.bring()
    shop.line.up = False
    now_unix_s = shop.ledger.now_unix_ms() // 1000
    assert shop.till.singles.summary(now_unix_s)["grants_unused"] == 1
    assert source(pay(shop, card, 9_000)) == "grant"
    assert shop.till.singles.summary(now_unix_s)["grants_unused"] == 0
    assert of_kind(shop, Kind.RENUNCIATION) == []


def test_a_grant_expires(shop: Shop, card: VirtualCard, clock: Clock) -> None:
    shop.line.mishaps.append(Mishap.LATE)
    payment = sale(shop)
    tap(shop, payment, card)
    shop.line.bring()
    shop.line.up = False
    clock.off = timedelta(seconds=400)
    assert reason(tap(shop, sale(shop), card)) is Reason.OVER_CEILING


def test_a_grant_is_for_one_terminal_and_one_token(shop: Shop, other: Shop, card: VirtualCard) -> None:
    granted: list[OnlineAnswer] = []
    shop.line.alter = lambda answer: granted.append(answer) or answer  # type: ignore[func-returns-value]
    assert source(pay(shop, card)) == "grant"
    key = token_key(shop.enrolment.token_key_secret, card._personalisation.pan, 1)
    other.publish()
    other.till.singles.keep(key, replace(granted[0], note=None))
    assert reason(pay(other, card)) is Reason.OVER_CEILING
    # Another token's grant under this one's name.
    _, stranger = shop.issue(limit_minor=LIMIT_MINOR)
    shop.publish()
    shop.line.up = False
    strange = token_key(shop.enrolment.token_key_secret, stranger.pan, 1)
    shop.till.singles.keep(strange, replace(granted[0], note=None))
    assert reason(pay(shop, VirtualCard(stranger))) is Reason.OVER_CEILING


def test_a_changed_grant_approves_nothing(shop: Shop, card: VirtualCard) -> None:
    places = iter((0, 1, 18, 30, 40, 60, 70, 78, 86, 149))

    def change(answer: OnlineAnswer) -> OnlineAnswer:
        if answer.grant is None:
            return answer
        data = bytearray(answer.grant)
        data[next(places)] ^= 1
        return OnlineAnswer(grant=bytes(data))

    shop.line.alter = change
    counter = card.state.counter
    for _ in range(10):
        assert reason(pay(shop, card)) is Reason.OVER_CEILING
    assert next(places, None) is None
    assert card.state.counter == counter


def test_a_block_beats_a_grant_in_hand(
    shop: Shop, card: VirtualCard, token: tuple[str, Personalisation]
) -> None:
    shop.line.mishaps.append(Mishap.LATE)
    payment = sale(shop)
    tap(shop, payment, card)
    shop.line.bring()
    shop.ledger.set_token_status(token[0], TokenStatus.BLOCKED)
    shop.publish()
    assert reason(tap(shop, payment, card)) is Reason.BLOCKED


def test_what_online_keys_may_do_in_one_shop_is_bounded_by_the_header(shop: Shop, card: VirtualCard) -> None:
    bounded = OnlinePolicy(
        per_tap_cap_minor=8_000, unsynchronised_amount_cap_minor=12_000, note_room_percent=0
    )
    shop.ledger.set_policy(POLICY.model_copy(update={"online": bounded}))
    shop.publish()
    assert reason(pay(shop, card, 8_001)) is Reason.OVER_CEILING
    assert shop.line.asked == []
    assert source(pay(shop, card, 8_000)) == "grant"
    assert shop.journal.exposure.online_amount_minor == 8_000
    shop.line.asked.clear()
    assert reason(pay(shop, card, 4_001)) is Reason.OVER_CEILING
    assert shop.line.asked == []
    assert source(pay(shop, card, 4_000)) == "grant"
    assert shop.journal.exposure.online_amount_minor == 12_000


def test_without_online_keys_in_the_header_nobody_is_asked(shop: Shop, card: VirtualCard) -> None:
    for key in shop.ledger.online_keys.all():
        shop.ledger.online_keys.retire(key.id)
    shop.publish()
    assert reason(pay(shop, card)) is Reason.OVER_CEILING
    assert shop.line.asked == []


# Tears


def test_a_tap_torn_anywhere_around_its_grant_is_repaired_by_tapping_again(
    shop: Shop, card: VirtualCard
) -> None:
    for apdu_number in range(1, 8):
        payment, counter = sale(shop, 4_000), card.state.counter
        assert isinstance(tap(shop, payment, card, apdu_number), TapAgain)
        outcome = tap(shop, payment, card)
        assert source(outcome) == "grant"
        assert card.state.counter == counter + 4_000
        shop.till.end(payment)
    assert of_kind(shop, Kind.RENUNCIATION) == []
    assert presented(shop) == ["posted"] * 7


def test_a_card_that_left_between_arqc_and_second_generate_ac_needs_no_line_to_come_back(
    shop: Shop, card: VirtualCard
) -> None:
    payment, counter = sale(shop), card.state.counter

    class Leaving(DirectChannel):
        def transceive(self, command: bytes) -> bytes:
            if command[1] == GENERATE_AC and [c[1] for c in self.commands].count(GENERATE_AC) == 1:
                self._left = 0  # before the second one reaches it
            return super().transceive(command)

    assert reason(shop.till.tap(payment, Leaving(card))) is Reason.CARD_LEFT
    assert card.state.counter == counter
    shop.line.up = False
    assert source(tap(shop, payment, card)) == "grant"
    assert card.state.counter == counter + 10_000


def test_a_card_torn_in_its_second_generate_ac_that_never_comes_back_is_renounced(
    shop: Shop, card: VirtualCard
) -> None:
    payment = sale(shop)
    torn = tap(shop, payment, card, leaves_after=7)
    assert isinstance(torn, TapAgain)
    shop.till.give_up(payment, torn.decline)
    shop.till.end(payment)
    shop.till.end(payment)
    (renounced,) = of_kind(shop, Kind.RENUNCIATION)
    facts = renounced.facts()
    assert facts["amount_minor"] == 10_000
    assert facts["sale_id"] == str(payment.id)
    assert facts["previous_digest"] == card.state.previous_digest.hex()
    asked = next(iter(payment.asked.values()))
    assert previous_digest(asked.cdol1_values) == card.state.previous_digest
    assert shop.journal.exposure.amount_minor == 0


def test_a_second_card_pays_and_the_first_one_s_torn_tc_is_renounced(shop: Shop, card: VirtualCard) -> None:
    _, second = shop.issue(limit_minor=LIMIT_MINOR)
    shop.publish()
    payment = sale(shop, 1_000)
    assert isinstance(tap(shop, payment, card, leaves_after=6), TapAgain)
    outcome = tap(shop, payment, VirtualCard(second))
    assert isinstance(outcome, Approved)
    shop.till.end(payment)
    (renounced,) = of_kind(shop, Kind.RENUNCIATION)
    key = token_key(shop.enrolment.token_key_secret, card._personalisation.pan, 1)
    assert renounced.facts()["token_key"] == key.hex() != outcome.record.facts()["token_key"]


def test_a_tc_that_was_read_and_declined_is_renounced_with_its_evidence(
    shop: Shop, token: tuple[str, Personalisation]
) -> None:
    shop.line.up = False
    assert isinstance(pay(shop, VirtualCard(token[1]), 1_000), Approved)
    clone = VirtualCard(token[1])
    assert reason(pay(shop, clone, 1_000)) is Reason.INTERVAL_OVERLAP
    (renounced,) = of_kind(shop, Kind.RENUNCIATION)
    facts = renounced.facts()
    assert facts["counter_after"] == clone.state.counter
    assert renounced.proof


def test_a_forged_card_s_answer_leaves_nothing_to_renounce(
    shop: Shop, token: tuple[str, Personalisation]
) -> None:
    forged = VirtualCard(with_another_icc_key(token[1]))
    assert reason(pay(shop, forged, 1_000)) is Reason.AUTHENTICATION_FAILED
    assert of_kind(shop, Kind.RENUNCIATION) == []


def test_what_a_card_claimed_in_a_declined_payment_is_remembered(
    shop: Shop, token: tuple[str, Personalisation]
) -> None:
    shop.line.up = False
    clone = VirtualCard(token[1])
    assert isinstance(pay(shop, VirtualCard(token[1]), 1_000), Approved)
    assert reason(pay(shop, clone, 1_500)) is Reason.INTERVAL_OVERLAP
    # The clone's counter is past the honest claim now, and inside its own declined one.
    honest = VirtualCard(token[1])
    honest.state = replace(honest.state, counter=token[1].counter + 1_000)
    outcome = pay(shop, honest, 400)
    assert reason(outcome) is Reason.INTERVAL_OVERLAP
    declined = of_kind(shop, Kind.DECLINE)
    assert [record.facts()["counter_after"] - token[1].counter for record in declined] == [1_500, 1_400]
    assert all(record.proof for record in declined)


# Notes


def note_on(card: VirtualCard, shop: Shop) -> SingleLimit:
    key = token_key(shop.enrolment.token_key_secret, card._personalisation.pan, 1)
    data = open_note(card.state.note, token_key_secret=shop.enrolment.token_key_secret, token_key=key)
    limits = shop.feed.current()
    assert limits is not None
    return read_single(data, limits.newest)


def test_a_note_is_written_after_approval_and_pays_in_a_shop_without_a_line(
    shop: Shop, other: Shop, card: VirtualCard
) -> None:
    other.publish()
    assert source(pay(shop, card)) == "grant"
    note = note_on(card, shop)
    assert note.kind is SingleKind.NOTE
    assert note.record.sequence == card.state.note_sequence
    # The other shop's snapshot knows a tenth of the limit, which is long spent.
    outcome = pay(other, card, 3_000)
    assert source(outcome) == "note"
    assert other.journal.exposure.online_amount_minor == 3_000
    assert presented(shop) == presented(other) == ["posted"]
    shop.ledger.check_books()


def test_a_tap_within_its_ceiling_fetches_a_note_for_the_next_tap(shop: Shop, card: VirtualCard) -> None:
    payment, channel = sale(shop, 500), DirectChannel(card)
    outcome = shop.till.tap(payment, channel)
    assert isinstance(outcome, Approved)
    shop.till.finish(outcome, channel)
    assert PUT_DATA not in [command[1] for command in channel.commands]
    assert card.state.note == b""
    assert isinstance(pay(shop, card, 500), Approved)
    assert card.state.note != b""
    # A card whose note has most of its life before it is left in peace.
    shop.line.asked.clear()
    assert isinstance(pay(shop, card, 500), Approved)
    assert shop.line.asked == []


def test_a_note_that_could_not_be_written_waits_for_the_next_tap(shop: Shop, card: VirtualCard) -> None:
    payment = sale(shop)
    channel = DirectChannel(card)
    outcome = shop.till.tap(payment, channel)
    assert isinstance(outcome, Approved)
    channel._left = 0
    shop.till.finish(outcome, channel)
    assert card.state.note == b""
    assert shop.till.singles.summary(shop.ledger.now_unix_ms() // 1000)["notes_to_write"] == 1
    assert isinstance(pay(shop, card, 1), Approved)
    assert card.state.note != b""


def test_a_note_torn_while_it_is_written_is_there_or_not(shop: Shop, card: VirtualCard) -> None:
    payment = sale(shop)
    channel = DirectChannel(card)
    outcome = shop.till.tap(payment, channel)
    assert isinstance(outcome, Approved)
    channel._left = 1  # it takes the note, and is gone before it has said so
    shop.till.finish(outcome, channel)
    assert note_on(card, shop).record.sequence == card.state.note_sequence
    assert isinstance(pay(shop, card, 1), Approved)


def hostile(shop: Shop, card: VirtualCard, name: str) -> bytes:
    """A note that must not count, as a hostile card would show it."""
    personalisation, secret = card._personalisation, shop.enrolment.token_key_secret
    key = token_key(secret, personalisation.pan, personalisation.psn)
    signer = shop.ledger.online_keys.all()[0].private
    now_unix_s = shop.ledger.now_unix_ms() // 1000
    record = LimitRecord(key, card.state.counter + 100_000, 100_000, 1_000)
    good = SingleLimit(
        kind=SingleKind.NOTE,
        record=record,
        nonce=b"n" * 16,
        issued_unix_s=now_unix_s,
        valid_until_unix_s=now_unix_s + 3_600,
    )
    sealing_secret, sealed_for = secret, key
    match name:
        case "good":
            pass
        case "wrong online key":
            signer = Ed25519PrivateKey.generate()
        case "wrong encryption key":
            sealing_secret = b"x" * 32
        case "other card's":
            good = replace(good, record=record._replace(token_key=b"o" * 16))
        case "other card's, sealed for it":
            good, sealed_for = replace(good, record=record._replace(token_key=b"o" * 16)), b"o" * 16
        case "expired":
            good = replace(good, issued_unix_s=now_unix_s - 7_200, valid_until_unix_s=now_unix_s)
        case "not yet valid":
            good = replace(good, issued_unix_s=now_unix_s + 900)
        case "valid too long":
            good = replace(good, valid_until_unix_s=now_unix_s + 4 * 86_400)
        case "a grant":
            good = replace(good, kind=SingleKind.GRANT, terminal_id=shop.enrolment.terminal_id)
        case "a grant for another terminal":
            good = replace(good, kind=SingleKind.GRANT, terminal_id="T9999999")
        case "a blocked token's":
            good = replace(good, record=record._replace(status=2))  # type: ignore[arg-type]
    data = good.sign(signer)
    assert len(data) == SINGLE_BYTES
    return seal_note(data, token_key_secret=sealing_secret, token_key=sealed_for, nonce=b"s" * 12)


def show(card: VirtualCard, note: bytes) -> None:
    card.state = replace(card.state, note=note)


def test_hostile_notes_give_no_credit(shop: Shop, card: VirtualCard) -> None:
    shop.line.up = False
    show(card, hostile(shop, card, "good"))
    assert source(pay(shop, card, 5_000)) == "note"
    for name in (
        "wrong online key",
        "wrong encryption key",
        "other card's",
        "other card's, sealed for it",
        "expired",
        "not yet valid",
        "valid too long",
        "a grant",
        "a grant for another terminal",
    ):
        show(card, hostile(shop, card, name))
        assert reason(pay(shop, card, 5_000)) is Reason.OVER_CEILING, name
    show(card, hostile(shop, card, "a blocked token's"))
    assert reason(pay(shop, card, 5_000)) is Reason.BLOCKED


def test_a_note_of_no_use_is_as_good_as_none(shop: Shop, card: VirtualCard) -> None:
    shop.line.up = False
    for note in (b"", b"\0", b"x" * 178, b"x" * 177, b"x" * 200):
        show(card, note)
        assert source(pay(shop, card, 100)) == "snapshot"
        assert reason(pay(shop, card, 5_000)) is Reason.OVER_CEILING


def test_an_oversized_note_is_invalid_card_data(shop: Shop, card: VirtualCard) -> None:
    answers = {0xA8: b"\x77\x82\x01\x1a" + b"\x82\x02\x01\x00" + b"\x94\x08" + bytes(8) + b"\xdf\x01"}

    def swell(command: bytes, answer: bytes) -> bytes:
        if command[1] != 0xA8:
            return answer
        return (answers[0xA8] + b"\x82\x01\x01" + bytes(257))[:256] + b"\x90\x00"

    payment = sale(shop, 1_000)
    assert reason(shop.till.tap(payment, DirectChannel(card, alter=swell))) is Reason.INVALID_CARD_DATA


def test_a_changed_byte_of_a_note_gives_no_credit(shop: Shop, card: VirtualCard) -> None:
    shop.line.up = False
    good = hostile(shop, card, "good")
    for at in range(0, len(good), 5):
        show(card, good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert reason(pay(shop, card, 5_000)) is Reason.OVER_CEILING


def test_a_replayed_older_note_is_worth_what_was_given_out_and_no_more(shop: Shop, card: VirtualCard) -> None:
    assert source(pay(shop, card)) == "grant"
    old = card.state.note
    ceiling = note_on(card, shop).record.ceiling
    assert source(pay(shop, card, 9_000)) == "grant"
    assert card.state.note != old
    show(card, old)
    shop.line.up = False
    shop.till.singles._held.clear()
    assert card.state.counter > ceiling - 3_000
    assert reason(pay(shop, card, 3_000)) is Reason.OVER_CEILING
    assert set(presented(shop)) == {"posted"}


def test_a_block_beats_a_note(
    shop: Shop, other: Shop, card: VirtualCard, token: tuple[str, Personalisation]
) -> None:
    assert source(pay(shop, card)) == "grant"
    assert card.state.note
    shop.ledger.set_token_status(token[0], TokenStatus.BLOCKED)
    other.publish()
    assert reason(pay(other, card, 1_000)) is Reason.BLOCKED


def test_notes_and_grants_die_with_the_limits_that_name_their_key(
    shop: Shop, card: VirtualCard, clock: Clock
) -> None:
    shop.ledger.set_policy(
        Policy(valid_s=3_600, refresh_after_s=1_800, token_share_percent=10, online=OnlinePolicy())
    )
    shop.publish()
    assert source(pay(shop, card)) == "grant"
    assert card.state.note
    shop.line.up = False
    clock.off = timedelta(seconds=3_700)
    # Its record may stand in the older limits, valid still, if the gateway has not merged the newer ones
    # yet; the key that signed the note stands in those that have expired.
    assert reason(pay(shop, card, 100)) in (Reason.OVER_CEILING, Reason.NO_VALID_LIMITS)


def test_the_card_takes_no_note_from_anybody_but_its_issuer(shop: Shop, card: VirtualCard) -> None:
    def forge(answer: OnlineAnswer) -> OnlineAnswer:
        if answer.note is None:
            return answer
        data = put_note_data(b"k" * 16, answer.note.sequence, b"x" * 178)
        return replace(answer, note=NoteToWrite(answer.note.sequence, answer.note.valid_until_unix_s, data))

    shop.line.alter = forge
    assert source(pay(shop, card)) == "grant"
    assert card.state.note == b""


def test_nothing_is_journalled_of_a_sale_that_waits_for_its_grant(shop: Shop, card: VirtualCard) -> None:
    shop.line.mishaps.append(Mishap.LATE)
    payment = sale(shop)
    tap(shop, payment, card)
    with pytest.raises(NotFound):
        shop.journal.get(payment.id)
    assert shop.journal.exposure.count == 0


# Lanes


def lane_of(shop: Shop, name: str, told: queue.Queue[PaymentView]) -> tuple[Lane, FieldReader]:
    reader = FieldReader()
    lane = Lane(name, reader, shop.till, card_timeout_s=20, show=told.put)
    lane.start()
    return lane, reader


def final(told: queue.Queue[PaymentView]) -> PaymentView:
    while True:
        view = told.get(timeout=20)
        if view.state.final or view.state is State.TAP_AGAIN:
            return view


def test_approved_is_told_before_the_note_is_written(shop: Shop, card: VirtualCard) -> None:
    told: queue.Queue[PaymentView] = queue.Queue()
    order: list[str] = []
    lane, reader = lane_of(shop, "one", told)

    def show(view: PaymentView) -> None:
        if view.state.final:
            order.append(view.state.value)
        told.put(view)

    lane._show = show

    def listen(command: bytes, answer: bytes) -> bytes:
        if command[1] == PUT_DATA:
            order.append("note")
        return answer

    lane.take(sale(shop))
    reader.field.put(lambda: DirectChannel(card, alter=listen))
    assert final(told).state is State.APPROVED
    lane.take(sale(shop, 100))  # taken at once, though the note may still be on its way
    reader.present(card)
    assert final(told).state is State.APPROVED
    lane.close()
    assert order == ["approved", "note", "approved"]
    assert card.state.note


def test_a_lane_that_waits_for_the_issuer_keeps_no_other_lane_waiting(shop: Shop, card: VirtualCard) -> None:
    other = VirtualCard(shop.issue(limit_minor=LIMIT_MINOR)[1])
    shop.publish()
    shop.till._grant_budget_s = 10.0
    shop.line.mishaps.append(Mishap.LATE)
    waiting, free = queue.Queue[PaymentView](), queue.Queue[PaymentView]()
    first, first_reader = lane_of(shop, "one", waiting)
    second, second_reader = lane_of(shop, "two", free)
    first.take(sale(shop))
    first_reader.present(card)
    while waiting.get(timeout=20).step != "asking_issuer":
        pass
    second.take(sale(shop, 500))
    second_reader.present(other)
    assert final(free).state is State.APPROVED
    assert waiting.empty()
    while not shop.line._late:
        time.sleep(0.01)
    shop.line.bring()
    assert final(waiting).state is State.APPROVED
    first.close()
    second.close()


def test_a_lane_asks_to_tap_again_and_takes_the_grant_that_came_meanwhile(
    shop: Shop, card: VirtualCard
) -> None:
    told: queue.Queue[PaymentView] = queue.Queue()
    shop.line.mishaps.append(Mishap.LATE)
    lane, reader = lane_of(shop, "one", told)
    lane.take(sale(shop))
    reader.present(card)
    again = final(told)
    assert (again.state, again.reason) == (State.TAP_AGAIN, Reason.ISSUER_SLOW)
    shop.line.bring()
    reader.present(card)
    while (view := final(told)).state is State.TAP_AGAIN:
        pass
    assert view.state is State.APPROVED
    lane.close()


def test_a_renounced_tap_frees_its_credit_at_the_card_s_next_payment(shop: Shop, card: VirtualCard) -> None:
    payment = sale(shop)
    torn = tap(shop, payment, card, leaves_after=7)
    assert isinstance(torn, TapAgain)
    shop.till.give_up(payment, torn.decline)
    shop.till.end(payment)
    assert source(pay(shop, card, 5_000)) == "grant"
    queue_ = shop.journal.records(0, 1000)
    verdicts = shop.present([record for record in queue_ if record.kind.presented])
    assert [verdict.verdict.value for verdict in verdicts] == ["posted", "posted"]
    assert shop.ledger.alarms() == ()
    account = shop.ledger.accounts()[0]
    assert account.outstanding_minor == 5_000
    # The 10,000 of the torn tap are nobody's any more: they reserve nothing.
    assert account.free_minor + account.reserve_minor == LIMIT_MINOR - 5_000
    token = account.tokens[0]
    assert token.ceiling is not None
    assert account.reserve_minor == token.ceiling - card.state.counter
    shop.ledger.check_books()
