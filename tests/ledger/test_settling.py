"""What becomes of taps that are not plainly in order: clones, late ones, torn ones, liars."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.conflict import ConflictBundle
from pos_gateway.distribution import delta_file
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.emv.transcript import Transcript
from pos_gateway.errors import AuthenticationFailed, Conflict, InvalidMessage, NotFound
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger import Ledger, store
from pos_gateway.ledger.accounts import Account, TokenStatus
from pos_gateway.ledger.batch import AlarmKind
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.gateways import Action
from pos_gateway.ledger.reviews import Why
from pos_gateway.limits.record import Status
from pos_gateway.records import Kind, Record, Verdict, open_proof, sign_batch
from tests.ledger.shop import Clock, Shop
from tests.ledger.test_issue import give

LIMIT_MINOR = 50_000
DAY_S = 24 * 3600


@pytest.fixture
def account(ledger: Ledger) -> Account:
    return ledger.open_account(holder="Li Na", limit_minor=LIMIT_MINOR)


@pytest.fixture
def personalisation(ledger: Ledger, account: Account, icc_key: rsa.RSAPrivateKey) -> Personalisation:
    personalisation = ledger.issue_token(account.id, icc_key=icc_key).personalisation
    ledger.publish()
    return personalisation


@pytest.fixture
def card(personalisation: Personalisation) -> VirtualCard:
    return VirtualCard(personalisation)


@pytest.fixture
def shop(ledger: Ledger) -> Shop:
    return Shop.enrol(ledger)


def state(ledger: Ledger, account: Account) -> Account:
    """The account, after holding the whole ledger to its books and to the invariant."""
    ledger.check_books()
    assert sum(ledger.trial_balance().values()) == 0
    return ledger.account(account.id)


def renounce(shop: Shop, ledger: Ledger, torn: Record, **lies: Any) -> Record:
    """What a gateway journals of a TC whose answer never came."""
    proof = Transcript.from_bytes(open_proof(torn.proof, ledger.keys.sealing))
    assert proof.cdol1_values is not None
    facts = torn.facts()
    shop.sequence += 1
    body = {
        "sale_id": facts["sale_id"],
        "token_key": facts["token_key"],
        "amount_minor": facts["amount_minor"],
        "cdol1_values": proof.cdol1_values.hex(),
        "gateway_id": facts["gateway_id"],
        "terminal_id": facts["terminal_id"],
        **lies,
    }
    return shop.record(uuid.uuid4(), body, b"", kind=Kind.RENUNCIATION)


def complete_until(shop: Shop, ledger: Ledger, until_unix_ms: int, *records: Record) -> list[Verdict]:
    body = json.dumps(
        {
            "gateway_id": shop.enrolment.gateway_id,
            "records": [record.to_wire() for record in records],
            "complete_until_unix_ms": until_unix_ms,
            "epoch": str(ledger.epoch),
        }
    ).encode()
    return [v.verdict for v in ledger.present(shop.enrolment.gateway_id, body, sign_batch(body, shop.key))]


def test_a_proven_clone_is_blocked_and_every_shop_told_without_new_ceilings(
    ledger: Ledger, account: Account, shop: Shop, personalisation: Personalisation, icc_key: rsa.RSAPrivateKey
) -> None:
    other = ledger.open_account(holder="Wang Wei", limit_minor=LIMIT_MINOR)
    bystander = ledger.issue_token(other.id, icc_key=icc_key)
    ledger.publish()
    with ledger._database.read() as connection:
        before = connection.scalar(sa.select(sa.func.count()).select_from(store.publications))
    genuine, clone = VirtualCard(personalisation), VirtualCard(personalisation)
    elsewhere = Shop.enrol(ledger)
    limit = shop.limit(bystander.personalisation.pan, 1)
    shop.present(shop.tap(genuine, 500))
    assert ledger.publish_urgent() is None
    [verdict] = elsewhere.present(elsewhere.tap(clone, 400))
    assert verdict.proves_clone
    assert ledger.account(account.id).tokens[0].status is TokenStatus.BLOCKED
    published = ledger.publish_urgent()
    assert published is not None
    assert ledger.publish_urgent() is None
    # The blocked one is told; the other's record, digest and validity are what they were.
    assert shop.limit(personalisation.pan, 1)[0].status is Status.BLOCKED
    assert shop.limit(bystander.personalisation.pan, 1) == limit
    assert published.valid_until_unix_s == ledger.snapshot(published.version - 1).valid_until_unix_s
    repository = ledger.repository.state()
    assert repository is not None
    delta = repository.targets.signed.targets[delta_file(published.version - 1, published.version).name]
    assert delta.length < published.size
    with ledger._database.read() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(store.publications)) == before
    assert shop.verdict(shop.tap(VirtualCard(bystander.personalisation), 100)) is Verdict.POSTED
    assert state(ledger, account).outstanding_minor == 500
    # Given back, it is given back to whoever paid.
    assert (
        elsewhere.verdict(elsewhere.correct(Kind.REVERSAL, uuid.UUID(verdict.record_id), 400))
        is Verdict.POSTED
    )
    assert ledger.trial_balance()["issuer_fraud"] == 0
    assert state(ledger, account).outstanding_minor == 500


def test_the_evidence_of_a_clone_stands_by_itself(
    ledger: Ledger, shop: Shop, personalisation: Personalisation
) -> None:
    elsewhere = Shop.enrol(ledger)
    first = shop.tap(VirtualCard(personalisation), 500)
    second = elsewhere.tap(VirtualCard(personalisation), 400)
    shop.present(first)
    elsewhere.present(second)
    [conflict] = ledger.conflicts()
    bundle = ConflictBundle.from_json(ledger.conflict_bundle(conflict.id).to_json())
    keys = [s.key.public_key().public_bytes_raw() for s in (shop, elsewhere)]
    start = personalisation.counter
    proven = bundle.verify(ca_keys=ledger.ca_keys, gateway_keys=keys)
    assert proven.overlap == (start, start + 400)
    assert {claim.amount_minor for claim in proven.claims} == {400, 500}
    assert proven.last4 == personalisation.pan[-4:]
    assert bundle.verify() == proven
    assert personalisation.pan not in repr(bundle)

    one, other = bundle.authorizations
    stranger = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    for changed, step in (
        (replace(bundle, authorizations=(one, one)), "two cryptograms"),
        (replace(bundle, authorizations=(one, replace(other, proof=one.proof))), "facts"),
        (replace(bundle, authorizations=(one, replace(other, gateway_key=stranger))), "record signature"),
    ):
        with pytest.raises(AuthenticationFailed) as caught:
            changed.verify()
        assert caught.value.step == step
    with pytest.raises(AuthenticationFailed, match="not trusted"):
        bundle.verify(gateway_keys=[stranger])
    with pytest.raises(NotFound):
        ledger.conflict_bundle(uuid.uuid4())
    text = bundle.to_json()
    for broken in (
        text.replace("conflict 1", "conflict 2"),
        text[:-10],
        "[]",
        text.replace('"proof"', '"x"'),
    ):
        with pytest.raises(InvalidMessage):
            ConflictBundle.from_json(broken)


def test_a_card_set_back_is_found_out_by_the_limit_it_relies_on(
    ledger: Ledger,
    account: Account,
    shop: Shop,
    personalisation: Personalisation,
    clock: Clock,
) -> None:
    card, copy = VirtualCard(personalisation), VirtualCard(personalisation)
    shop.tap(card, 1_000)  # torn: never presented
    assert shop.verdict(shop.tap(card, 2_000)) is Verdict.POSTED
    clock.now_s += 30 * DAY_S
    ledger.publish()
    [verdict] = shop.present(shop.tap(copy, 700))
    assert (verdict.verdict, verdict.proves_clone) == (Verdict.POSTED, True)
    assert state(ledger, account).outstanding_minor == 2_000
    assert ledger.trial_balance()["issuer_fraud"] == 700
    assert AlarmKind.COUNTER_BEHIND in [alarm.kind for alarm in ledger.alarms()]
    assert ledger.account(account.id).tokens[0].status is TokenStatus.BLOCKED


def test_a_payment_twice_is_no_clone_and_one_after_the_other_neither(
    ledger: Ledger, shop: Shop, card: VirtualCard
) -> None:
    one, other = shop.tap(card, 500), shop.tap(card, 400)
    shop.present(one, other, one)
    assert ledger.conflicts() == ()


def test_what_comes_late_is_charged_only_to_free_credit(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard, clock: Clock
) -> None:
    first, second = shop.tap(card, 30_000), shop.tap(card, 20_000)
    ledger.set_policy(Policy(token_share_percent=50))
    clock.now_s += 30 * DAY_S
    ledger.publish()
    assert state(ledger, account).free_minor == 25_000
    verdicts = shop.present(first, second)
    assert [v.verdict for v in verdicts] == [Verdict.LATE, Verdict.POSTED]
    assert state(ledger, account).outstanding_minor == 20_000
    # Somebody decides about the other: the customer has not that much credit left, so the issuer pays.
    [review] = ledger.reviews()
    assert (review.amount_minor, review.why) == (30_000, Why.LATE)
    assert ledger.review(review.gateway_id, first.id, release=True, note="shop was flooded") is Verdict.POSTED
    assert ledger.review(review.gateway_id, first.id, release=True, note="") is Verdict.POSTED
    with pytest.raises(Conflict, match="released"):
        ledger.review(review.gateway_id, first.id, release=False, note="")
    assert ledger.trial_balance()["issuer_late"] == 30_000
    assert state(ledger, account).outstanding_minor == 20_000
    assert ledger.reviews() == ()
    assert shop.verdict(first) is Verdict.DUPLICATE


def test_a_clock_set_back_gives_no_credit_twice_after_a_late_payment(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard, clock: Clock
) -> None:
    early, late = shop.tap(card, 30_000), shop.tap(card, 20_000)
    clock.now_s += 30 * DAY_S
    assert shop.verdict(late) is Verdict.POSTED
    clock.now_s -= 30 * DAY_S
    state(ledger, account)
    assert shop.verdict(early) is Verdict.POSTED  # from what is free: nothing stands any more
    assert state(ledger, account).outstanding_minor == 50_000


def test_a_suspended_gateways_records_wait_for_a_decision(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    paid, kept, voided = (shop.tap(card, amount) for amount in (100, 200, 300))
    gateway_id = shop.enrolment.gateway_id
    ledger.act_on_gateway(gateway_id, Action.SUSPEND, by="Lin", reason="odd sales")
    verdicts = shop.present(paid, kept, voided)
    assert [(v.verdict, "suspended" in v.reason) for v in verdicts] == [(Verdict.LATE, True)] * 3
    assert state(ledger, account).outstanding_minor == 0
    assert shop.verdict(shop.correct(Kind.REVERSAL, voided, 300)) is Verdict.POSTED
    with pytest.raises(Conflict, match="voided"):
        ledger.review(gateway_id, voided.id, release=True, note="")
    # Its points may still be claimed: the customer pays what the customer bought.
    assert ledger.review(gateway_id, paid.id, release=True, note="seen") is Verdict.POSTED
    assert ledger.review(gateway_id, kept.id, release=False, note="forged") is Verdict.LATE
    assert state(ledger, account).outstanding_minor == 100
    ledger.act_on_gateway(gateway_id, Action.REINSTATE, by="Lin", reason="looked into")
    assert shop.verdict(kept) is Verdict.LATE
    assert shop.verdict(shop.tap(card, 400)) is Verdict.POSTED
    assert state(ledger, account).outstanding_minor == 500


def test_stamps_before_what_was_complete_are_not_believed(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard, clock: Clock
) -> None:
    told, hidden, new = (shop.tap(card, amount) for amount in (100, 200, 300))
    at_unix_ms = ledger.now_unix_ms()
    clock.now_s += 3600
    assert complete_until(shop, ledger, at_unix_ms, told) == [Verdict.POSTED]
    assert complete_until(shop, ledger, at_unix_ms, told) == [Verdict.DUPLICATE]
    [verdict] = shop.present(hidden)
    assert (verdict.verdict, "told everything" in verdict.reason) == (Verdict.LATE, True)
    # Nobody can shut itself out for longer than until now.
    assert complete_until(shop, ledger, at_unix_ms * 2) == []
    clock.now_s += 3600
    assert shop.verdict(shop.tap(card, 400)) is Verdict.POSTED
    assert shop.verdict(new) is Verdict.LATE
    assert state(ledger, account).outstanding_minor == 500
    assert [review.why for review in ledger.reviews()] == [Why.BACKDATED] * 2


def test_a_grant_is_freed_when_its_terminal_has_told_everything(
    ledger: Ledger, account: Account, shop: Shop, clock: Clock, icc_key: rsa.RSAPrivateKey
) -> None:
    token = ledger.issue_token(account.id, icc_key=icc_key).token
    mine, others = shop.enrolment.terminal_id, Shop.enrol(ledger).enrolment.terminal_id
    give(ledger, token.id, 10_000, terminal_id=mine, life_s=600)
    give(ledger, token.id, 4_000, terminal_id=others, life_s=600)
    # Nobody is believed beyond what every honest clock has passed: 300 s behind the ledger's.
    clock.now_s += 1200
    complete_until(shop, ledger, ledger.now_unix_ms())  # not yet past what a clock may be off
    assert state(ledger, account).reserve_minor == 10_000
    clock.now_s += 1
    body = json.dumps(
        {
            "gateway_id": shop.enrolment.gateway_id,
            "records": [],
            "epoch": str(uuid.uuid4()),
            "complete_until_unix_ms": ledger.now_unix_ms(),
        }
    ).encode()
    ledger.present(shop.enrolment.gateway_id, body, sign_batch(body, shop.key))
    assert state(ledger, account).reserve_minor == 10_000  # said of another epoch
    complete_until(shop, ledger, ledger.now_unix_ms())
    assert state(ledger, account).reserve_minor == 4_000


def test_a_grant_used_elsewhere_or_after_its_time_is_held(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard, clock: Clock
) -> None:
    token_id = ledger.account(account.id).tokens[0].id
    for terminal_id, wait_s in ((None, 0), (shop.enrolment.terminal_id, 600)):
        grant = give(ledger, token_id, 5_000, terminal_id=terminal_id or "T0000001", life_s=600)
        clock.now_s += wait_s
        assert shop.verdict(shop.tap(card, 100, limit=(grant.record, grant.digest))) is Verdict.LATE
    assert [review.why for review in ledger.reviews()] == [Why.AGAINST_RULES] * 2
    assert {alarm.kind for alarm in ledger.alarms()} == {AlarmKind.AGAINST_RULES}
    assert state(ledger, account).outstanding_minor == 0


@pytest.mark.parametrize("renounced_first", [True, False])
def test_a_torn_gap_is_written_off_once_it_is_renounced_and_the_card_points_back(
    renounced_first: bool, ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    elsewhere = Shop.enrol(ledger)
    torn = shop.tap(card, 10_000)
    renunciation = renounce(shop, ledger, torn)
    following = elsewhere.tap(card, 5_000)
    if renounced_first:
        assert shop.verdict(renunciation) is Verdict.POSTED
        assert state(ledger, account).reserve_minor == LIMIT_MINOR
        assert elsewhere.verdict(following) is Verdict.POSTED
    else:
        assert elsewhere.verdict(following) is Verdict.POSTED
        assert state(ledger, account).reserve_minor == LIMIT_MINOR - 5_000
        assert shop.verdict(renunciation) is Verdict.POSTED
    assert shop.verdict(renunciation) is Verdict.DUPLICATE
    after = state(ledger, account)
    assert (after.outstanding_minor, after.reserve_minor, after.free_minor) == (5_000, 35_000, 10_000)
    # Who renounced it cannot have it paid.
    assert shop.verdict(torn) is Verdict.INVALID
    assert [alarm.kind for alarm in ledger.alarms()] == [AlarmKind.AGAINST_RULES]
    assert state(ledger, account).outstanding_minor == 5_000


def test_nobody_renounces_what_another_asked_for(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard
) -> None:
    elsewhere = Shop.enrol(ledger)
    payment, following = shop.tap(card, 10_000), elsewhere.tap(card, 5_000)
    forged = renounce(
        elsewhere,
        ledger,
        payment,
        gateway_id=elsewhere.enrolment.gateway_id,
        terminal_id=elsewhere.enrolment.terminal_id,
    )
    assert [v.verdict for v in elsewhere.present(forged, following)] == [Verdict.INVALID, Verdict.POSTED]
    other_amount = renounce(shop, ledger, payment, amount_minor=9_000)
    presented = renounce(shop, ledger, payment)
    assert [v.verdict for v in shop.present(other_amount, payment, presented)] == [
        Verdict.INVALID,
        Verdict.POSTED,
        Verdict.INVALID,
    ]
    assert state(ledger, account).outstanding_minor == 15_000


def test_the_cards_own_evidence_ends_a_dead_publication(
    ledger: Ledger, account: Account, shop: Shop, card: VirtualCard, clock: Clock
) -> None:
    """A week and the clock's tolerance later a new limit is issued; a TC that signs it tells that the old
    one was used up to there at most. No clock of a shop has a say in it."""
    shop.present(shop.tap(card, 10_000))
    clock.now_s += 7 * DAY_S + 301
    ledger.set_policy(Policy(token_share_percent=40))
    ledger.publish()
    assert state(ledger, account).reserve_minor == 40_000
    torn = shop.tap(card, 1_000)
    assert shop.verdict(shop.tap(card, 2_000)) is Verdict.POSTED
    # Of the old one only the gap is left; the new one reaches 16 000 beyond 10 000.
    after = state(ledger, account)
    assert (after.outstanding_minor, after.reserve_minor) == (12_000, 14_000)
    assert shop.verdict(torn) is Verdict.POSTED
