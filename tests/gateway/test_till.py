"""One tap, against real cards, limits, journal and keys; only reader and network are left out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from pos_gateway.authorization.reasons import Reason
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.emv.transcript import Transcript
from pos_gateway.errors import NotFound
from pos_gateway.gateway.program import local_now
from pos_gateway.gateway.till import Approved, Declined, Outcome, Payment, Step, TapAgain
from pos_gateway.instalments import Charge, Offer, Quote, quote
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.forged_card import with_another_chain, with_another_icc_key
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.virtual_card import BlankCard, SchemeCard, VirtualCard
from pos_gateway.ledger.accounts import TokenStatus
from pos_gateway.ledger.config import Policy
from pos_gateway.money import currency
from pos_gateway.records import Kind, Verdict, open_proof

LIMIT_MINOR = 30_000


class Clock:
    """The shop's clock, moved by hand."""

    def __init__(self) -> None:
        self.off = timedelta()

    def __call__(self) -> datetime:
        return local_now() + self.off


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shop(tmp_path: Path, ledger_home: Path, clock: Clock) -> Iterator[Shop]:
    shutil.copytree(ledger_home, tmp_path / "ledger")
    with Shop(tmp_path, policy=Policy(per_tap_cap_minor=25_000), clock=clock) as shop:
        yield shop


@pytest.fixture
def token(shop: Shop) -> tuple[str, Personalisation]:
    issued = shop.issue(limit_minor=LIMIT_MINOR)
    shop.publish()
    return issued


@pytest.fixture
def card(token: tuple[str, Personalisation]) -> VirtualCard:
    return VirtualCard(token[1])


def sale(shop: Shop, amount_minor: int = 1930) -> Payment:
    return shop.till.new_payment(uuid4(), amount_minor, shop.journal.last_sequence + 1)


def reason(outcome: Outcome) -> Reason:
    assert isinstance(outcome, Declined), outcome
    return outcome.decline.reason


def test_a_tap_within_its_ceiling_is_approved_and_journalled(shop: Shop, card: VirtualCard) -> None:
    payment, steps = sale(shop), list[Step]()
    outcome = shop.till.tap(payment, DirectChannel(card), steps.append)
    assert isinstance(outcome, Approved)
    assert steps == [Step.READING_CARD, Step.ASKING_CARD, Step.RECORDING]
    assert shop.journal.get(payment.id) == outcome.record
    facts = outcome.record.facts()
    assert facts["counter_after"] - facts["counter_before"] == 1930
    assert facts["counter_after"] == card.state.counter


def test_the_sealed_proof_holds_the_whole_dialogue(shop: Shop, card: VirtualCard) -> None:
    outcome = shop.till.tap(sale(shop), DirectChannel(card))
    assert isinstance(outcome, Approved)
    proof = open_proof(outcome.record.proof, shop.ledger.keys.sealing)
    assert Transcript.from_bytes(proof).card().last4 == outcome.record.facts()["token_last4"]


def test_a_tap_takes_six_apdus(shop: Shop, card: VirtualCard) -> None:
    channel = DirectChannel(card)
    shop.till.tap(sale(shop), channel)
    assert [command[1] for command in channel.commands] == [0xA4, 0xA8, 0xB2, 0xB2, 0xB2, 0xAE]


def test_together_shops_cannot_take_a_card_past_its_ceiling(shop: Shop, card: VirtualCard) -> None:
    assert isinstance(shop.till.tap(sale(shop, 20_000), DirectChannel(card)), Approved)
    moved = card.state.counter
    assert reason(shop.till.tap(sale(shop, 10_001), DirectChannel(card))) is Reason.OVER_CEILING
    assert card.state.counter == moved
    assert isinstance(shop.till.tap(sale(shop, 10_000), DirectChannel(card)), Approved)


OFFER = Offer(
    id="flat", currency=currency("CNY"), charge=Charge.FLAT_FEE, periods=(3, 12), rate_per_period_bps=50
)


def test_a_plan_is_signed_for_and_reaches_the_ledger(shop: Shop, token: tuple[str, Personalisation]) -> None:
    policy = shop.ledger.policy
    shop.ledger.set_policy(policy.model_copy(update={"offers": (OFFER,)}))
    shop.publish()
    assert shop.till.offers() == (OFFER,)
    plan = quote(OFFER, 12_000, 12)
    payment = shop.till.new_payment(uuid4(), 12_000, shop.journal.last_sequence + 1, plan)
    outcome = shop.till.tap(payment, DirectChannel(VirtualCard(token[1])))
    assert isinstance(outcome, Approved)
    facts = outcome.record.facts()
    assert (facts["plan_digest"], facts["plan"]["periods"]) == (plan.digest.hex(), 12)
    assert shop.present([outcome.record])[0].verdict is Verdict.POSTED
    forged = replace(OFFER, id="other")
    payment = shop.till.new_payment(uuid4(), 9_000, shop.journal.last_sequence + 1, quote(forged, 9_000, 3))
    assert reason(shop.till.tap(payment, DirectChannel(VirtualCard(token[1])))) is Reason.PLAN_NOT_ALLOWED


@pytest.mark.parametrize(
    "told",
    [quote(OFFER, 12_000, 3), quote(replace(OFFER, rate_per_period_bps=1), 12_000, 12), None],
    ids=["other periods", "other terms", "none"],
)
def test_another_plan_than_the_card_signed_is_not_posted(
    shop: Shop, token: tuple[str, Personalisation], told: Quote | None
) -> None:
    shop.ledger.set_policy(shop.ledger.policy.model_copy(update={"offers": (OFFER,)}))
    shop.publish()
    payment = shop.till.new_payment(uuid4(), 12_000, 1, quote(OFFER, 12_000, 12))
    payment.plan = told
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pos_gateway.authorization.decision._refused", lambda *_: None)
        outcome = shop.till.tap(payment, DirectChannel(VirtualCard(token[1])))
    assert isinstance(outcome, Approved)
    assert shop.present([outcome.record])[0].verdict is Verdict.INVALID


def test_a_card_over_a_cap_is_asked_for_nothing(shop: Shop, card: VirtualCard) -> None:
    channel = DirectChannel(card)
    assert reason(shop.till.tap(sale(shop, 25_001), channel)) is Reason.OVER_TAP_CAP
    assert 0xAE not in [command[1] for command in channel.commands]


def test_a_scheme_card_is_refused_unread(shop: Shop) -> None:
    card = SchemeCard()
    assert reason(shop.till.tap(sale(shop), DirectChannel(card))) is Reason.CARD_NOT_SUPPORTED
    assert card.read_attempts == 0


def test_a_card_without_any_application_is_refused(shop: Shop) -> None:
    assert reason(shop.till.tap(sale(shop), DirectChannel(BlankCard()))) is Reason.CARD_NOT_SUPPORTED


@pytest.mark.parametrize("forge", [with_another_icc_key, with_another_chain])
def test_forged_cards_are_not_authentic(shop: Shop, token: tuple[str, Personalisation], forge) -> None:  # type: ignore[no-untyped-def]
    outcome = shop.till.tap(sale(shop), DirectChannel(VirtualCard(forge(token[1]))))
    assert reason(outcome) is Reason.AUTHENTICATION_FAILED
    assert shop.journal.exposure.count == 0


def test_a_token_without_limit_record_is_unknown(shop: Shop, token: tuple[str, Personalisation]) -> None:
    _, late = shop.issue(limit_minor=1000)
    assert reason(shop.till.tap(sale(shop), DirectChannel(VirtualCard(late)))) is Reason.UNKNOWN_TOKEN


def test_a_blocked_token_is_declined(shop: Shop, token: tuple[str, Personalisation]) -> None:
    shop.ledger.set_token_status(token[0], TokenStatus.BLOCKED)
    shop.publish()
    assert reason(shop.till.tap(sale(shop), DirectChannel(VirtualCard(token[1])))) is Reason.BLOCKED


def test_without_limits_nothing_is_approved(shop: Shop) -> None:
    _, personalisation = shop.issue(limit_minor=LIMIT_MINOR)
    channel = DirectChannel(VirtualCard(personalisation))
    assert reason(shop.till.tap(sale(shop), channel)) is Reason.NO_VALID_LIMITS


def test_expired_limits_approve_nothing(shop: Shop, card: VirtualCard, clock: Clock) -> None:
    clock.off = timedelta(days=8)
    assert reason(shop.till.tap(sale(shop), DirectChannel(card))) is Reason.NO_VALID_LIMITS


def test_a_clock_set_back_is_not_trusted(shop: Shop, card: VirtualCard, clock: Clock) -> None:
    assert isinstance(shop.till.tap(sale(shop), DirectChannel(card)), Approved)
    clock.off = -timedelta(minutes=6)
    assert reason(shop.till.tap(sale(shop), DirectChannel(card))) is Reason.UNTRUSTED_CLOCK


def test_an_expired_card_is_declined(shop: Shop, token: tuple[str, Personalisation], clock: Clock) -> None:
    clock.off = timedelta(days=365 * 5)
    assert reason(shop.till.tap(sale(shop), DirectChannel(VirtualCard(token[1])))) is Reason.CARD_EXPIRED


@pytest.mark.parametrize("apdu_number", range(1, 7))
def test_a_torn_tap_is_repaired_by_tapping_again(shop: Shop, card: VirtualCard, apdu_number: int) -> None:
    payment, counter = sale(shop), card.state.counter
    assert isinstance(shop.till.tap(payment, DirectChannel(card, leaves_after=apdu_number)), TapAgain)
    assert shop.journal.exposure.count == 0
    outcome = shop.till.tap(payment, DirectChannel(card))
    assert isinstance(outcome, Approved)
    assert card.state.counter == counter + payment.amount_minor
    assert shop.journal.exposure.amount_minor == payment.amount_minor


def test_a_torn_tap_repaired_under_newer_limits_still_verifies(shop: Shop, card: VirtualCard) -> None:
    payment = sale(shop)
    shop.till.tap(payment, DirectChannel(card, leaves_after=6))
    shop.publish()
    outcome = shop.till.tap(payment, DirectChannel(card))
    assert isinstance(outcome, Approved)
    assert outcome.record.facts()["snapshot_version"] == 1


def test_a_torn_tap_given_up_leaves_a_gap_and_no_charge(shop: Shop, card: VirtualCard) -> None:
    payment = sale(shop)
    torn = shop.till.tap(payment, DirectChannel(card, leaves_after=6))
    assert isinstance(torn, TapAgain)
    shop.till.give_up(payment, torn.decline)
    with pytest.raises(NotFound):
        shop.journal.get(payment.id)
    assert isinstance(shop.till.tap(sale(shop), DirectChannel(card)), Approved)


def test_a_rolled_back_card_contradicts_its_own_past(shop: Shop, token: tuple[str, Personalisation]) -> None:
    assert isinstance(shop.till.tap(sale(shop), DirectChannel(VirtualCard(token[1]))), Approved)
    clone = VirtualCard(token[1])  # the same keys with the counter of its first day
    outcome = shop.till.tap(sale(shop), DirectChannel(clone))
    assert reason(outcome) is Reason.INTERVAL_OVERLAP
    decline = shop.journal.records(shop.journal.last_sequence - 1)[0]
    assert decline.kind is Kind.DECLINE
    assert Transcript.from_bytes(open_proof(decline.proof, shop.ledger.keys.sealing)).answer


def test_gateway_caps_stop_approvals(shop: Shop, card: VirtualCard) -> None:
    shop.till.policy = replace(shop.till.policy, unsynchronised_count_cap=1)
    assert isinstance(shop.till.tap(sale(shop), DirectChannel(card)), Approved)
    assert reason(shop.till.tap(sale(shop), DirectChannel(card))) is Reason.GATEWAY_CAP


@pytest.mark.parametrize("instruction", [0xA4, 0xA8, 0xB2, 0xAE])
def test_no_changed_byte_of_any_answer_is_ever_approved(
    shop: Shop, token: tuple[str, Personalisation], instruction: int
) -> None:
    """Every byte of every answer of one kind, changed on its way: never an approval of other facts."""
    lengths = _answer_lengths(shop, token[1], instruction)
    for number, length in enumerate(lengths):
        for at in range(0, length, 1 if length < 40 else 7):
            card = VirtualCard(token[1])
            payment = sale(shop, 100)
            outcome = shop.till.tap(payment, _Forger(card, instruction, number, at))
            if isinstance(outcome, Approved):
                # What the terminal does not rely on may change: the FCI is not signed.
                assert instruction == 0xA4
                break
    assert shop.journal.exposure.count <= (1 if instruction == 0xA4 else 0)


def _answer_lengths(shop: Shop, personalisation: Personalisation, instruction: int) -> list[int]:
    lengths: list[int] = []

    def note(command: bytes, answer: bytes) -> bytes:
        if command[1] == instruction:
            lengths.append(len(answer))
        # Without GENERATE AC's answer nothing is approved: the counter line stays free for the test.
        return b"\x69\x85" if command[1] == 0xAE else answer

    shop.till.tap(sale(shop, 100), DirectChannel(VirtualCard(personalisation), alter=note))
    return lengths


class _Forger(DirectChannel):
    """Changes one byte of the `number`-th answer to an instruction."""

    def __init__(self, card: VirtualCard, instruction: int, number: int, at: int) -> None:
        self._seen = 0

        def change(command: bytes, answer: bytes) -> bytes:
            if command[1] != instruction:
                return answer
            self._seen += 1
            if self._seen - 1 != number:
                return answer
            return answer[:at] + bytes([answer[at] ^ 0x01]) + answer[at + 1 :]

        super().__init__(card, alter=change)
