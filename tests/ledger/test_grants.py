"""Answers on the spot: what a shop's ARQC and a phone's card get from the ledger, and what they do not."""

from __future__ import annotations

import json
import secrets
import shutil
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.authorization.reasons import Reason
from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.application import AID, Sale
from pos_gateway.emv.dialogue import CardRead, CryptogramAnswer, converse, read_card, request_cryptogram
from pos_gateway.emv.note import take_note_data
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.emv.transcript import Transcript
from pos_gateway.errors import (
    AuthenticationFailed,
    Conflict,
    InvalidConfiguration,
    InvalidInput,
    PosGatewayError,
)
from pos_gateway.inquiry import Inquiry, OnlineAnswer, wallet_body
from pos_gateway.lab.phone import Phone
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger import Ledger, store
from pos_gateway.ledger.accounts import TokenStatus
from pos_gateway.ledger.batch import AlarmKind
from pos_gateway.ledger.config import OnlinePolicy, Policy
from pos_gateway.limits.note import open_note
from pos_gateway.limits.record import LimitRecord
from pos_gateway.limits.single import Kind, SingleLimit, read_single, why_not
from pos_gateway.limits.snapshot import SnapshotHeader, read_head
from pos_gateway.money import currency
from pos_gateway.records import Verdict, sign_batch
from pos_gateway.snapshot_file import SnapshotFile
from tests.ledger.shop import Clock, Shop

LIMIT_MINOR = 50_000
POLICY = Policy(token_share_percent=10)


@pytest.fixture
def token(ledger: Ledger, icc_key: rsa.RSAPrivateKey) -> tuple[str, Personalisation]:
    ledger.set_policy(POLICY)
    account = ledger.open_account(holder="Li Na", limit_minor=LIMIT_MINOR)
    issued = ledger.issue_token(account.id, icc_key=icc_key)
    ledger.publish()
    return issued.token.id, issued.personalisation


@pytest.fixture
def card(token: tuple[str, Personalisation]) -> VirtualCard:
    return VirtualCard(token[1])


@pytest.fixture
def shop(ledger: Ledger) -> Shop:
    return Shop.enrol(ledger)


def sale_at(shop: Shop, amount_minor: int, **changes: Any) -> Sale:
    fields: dict[str, Any] = {
        "amount_minor": amount_minor,
        "currency_numeric": currency(shop.enrolment.currency).numeric,
        "country_numeric": shop.enrolment.country_numeric,
        "at": datetime.fromtimestamp(shop.ledger.now_unix_ms() / 1000, UTC),
        "unpredictable_number": secrets.token_bytes(4),
        "sequence_counter": 1,
        "terminal_id": shop.enrolment.terminal_id,
        "merchant_id": shop.enrolment.merchant.id,
        "merchant_category": shop.enrolment.merchant.category,
        "sale_id": uuid.uuid4().bytes,
        "ceiling": 0,
        "limit_digest": bytes(16),
    }
    return Sale(**{**fields, **changes})


def dialogue(
    card: VirtualCard, sale: Sale, kind: CryptogramKind = CryptogramKind.TC
) -> tuple[CardRead, CryptogramAnswer]:
    card.power_up()
    read = converse(read_card(sale.elements(), [AID]), card.process)
    return read, converse(request_cryptogram(read, sale.elements(), kind), card.process)


def inquiry(shop: Shop, card: VirtualCard, sale: Sale, **changes: Any) -> bytes:
    proof = shop.seal(Transcript.of(*dialogue(card, sale)).to_bytes())
    asked = Inquiry(shop.enrolment.gateway_id, uuid.UUID(bytes=sale.sale_id), proof)
    return replace(asked, **changes).to_body()


def ask(shop: Shop, body: bytes, route: str = "grant") -> OnlineAnswer:
    answer = getattr(shop.ledger, route)(shop.enrolment.gateway_id, body, sign_batch(body, shop.key))
    return OnlineAnswer.from_json(answer)


def refused(answer: OnlineAnswer) -> str:
    assert answer.refused is not None, answer
    assert answer.grant is None
    return answer.refused.reason


def header(ledger: Ledger) -> SnapshotHeader:
    with SnapshotFile(ledger.latest_snapshot().path) as file:
        return SnapshotHeader.from_bytes(read_head(file.read_at).header_bytes)


def granted(ledger: Ledger, answer: OnlineAnswer) -> SingleLimit:
    assert answer.grant is not None, answer
    return read_single(answer.grant, header(ledger))


def test_an_arqc_is_answered_with_a_grant_for_that_terminal(
    ledger: Ledger, shop: Shop, card: VirtualCard, clock: Clock
) -> None:
    answer = ask(shop, inquiry(shop, card, sale_at(shop, 20_000)))
    grant = granted(ledger, answer)
    assert grant.kind is Kind.GRANT
    assert grant.terminal_id == shop.enrolment.terminal_id
    assert grant.record.ceiling == card.state.counter + 20_000
    assert grant.valid_until_unix_s == int(clock.now_s) + POLICY.online.grant_life_s
    why = why_not(
        grant,
        token_key=grant.record.token_key,
        terminal_id=shop.enrolment.terminal_id,
        now_unix_s=int(clock.now_s),
        clock_tolerance_s=0,
    )
    assert why is None
    # The card's own ceiling stands there, too; the points of both cost nothing twice.
    account = ledger.accounts()[0]
    assert account.reserve_minor >= 20_000
    ledger.check_books()


def test_a_payment_under_a_grant_is_posted(ledger: Ledger, shop: Shop, card: VirtualCard) -> None:
    grant = granted(ledger, ask(shop, inquiry(shop, card, sale_at(shop, 20_000))))
    record = shop.tap(card, 20_000, limit=(grant.record, grant.digest))
    assert shop.verdict(record) is Verdict.POSTED
    assert ledger.accounts()[0].outstanding_minor == 20_000


def test_the_same_question_gets_the_same_bytes_and_costs_once(
    ledger: Ledger, shop: Shop, card: VirtualCard
) -> None:
    body = inquiry(shop, card, sale_at(shop, 20_000))
    first = ask(shop, body)
    reserve = ledger.accounts()[0].reserve_minor
    assert ask(shop, body) == first
    assert ledger.accounts()[0].reserve_minor == reserve


def test_the_same_sale_with_other_content_is_an_alarm(ledger: Ledger, shop: Shop, card: VirtualCard) -> None:
    sale = sale_at(shop, 20_000)
    ask(shop, inquiry(shop, card, sale))
    with pytest.raises(Conflict, match="other content"):
        ask(shop, inquiry(shop, card, replace(sale, amount_minor=21_000)))
    assert [alarm.kind for alarm in ledger.alarms()] == [AlarmKind.CHANGED_CONTENT]


def test_two_cards_at_one_sale_are_two_questions(
    ledger: Ledger, shop: Shop, card: VirtualCard, icc_key: rsa.RSAPrivateKey
) -> None:
    account = ledger.open_account(holder="Wang Wei", limit_minor=LIMIT_MINOR)
    second = VirtualCard(ledger.issue_token(account.id, icc_key=icc_key).personalisation)
    sale = sale_at(shop, 20_000)
    one = granted(ledger, ask(shop, inquiry(shop, card, sale)))
    other = granted(ledger, ask(shop, inquiry(shop, second, sale)))
    assert one.record.token_key != other.record.token_key


def test_the_limit_is_never_passed(ledger: Ledger, shop: Shop, card: VirtualCard) -> None:
    assert refused(ask(shop, inquiry(shop, card, sale_at(shop, LIMIT_MINOR + 1)))) == "over_ceiling"
    grant = granted(ledger, ask(shop, inquiry(shop, card, sale_at(shop, LIMIT_MINOR))))
    assert shop.verdict(shop.tap(card, LIMIT_MINOR, limit=(grant.record, grant.digest))) is Verdict.POSTED
    assert refused(ask(shop, inquiry(shop, card, sale_at(shop, 1)))) == "over_ceiling"
    ledger.check_books()


def test_over_the_caps_there_is_no_grant(ledger: Ledger, shop: Shop, card: VirtualCard) -> None:
    ledger.set_policy(POLICY.model_copy(update={"online": OnlinePolicy(per_tap_cap_minor=10_000)}))
    ledger.publish()
    assert refused(ask(shop, inquiry(shop, card, sale_at(shop, 10_001)))) == "over_tap_cap"
    granted(ledger, ask(shop, inquiry(shop, card, sale_at(shop, 10_000))))


def test_blocked_and_closed_tokens_get_nothing(
    ledger: Ledger, shop: Shop, card: VirtualCard, token: tuple[str, Personalisation]
) -> None:
    ledger.set_token_status(token[0], TokenStatus.BLOCKED)
    assert refused(ask(shop, inquiry(shop, card, sale_at(shop, 100)))) == "blocked"
    ledger.set_token_status(token[0], TokenStatus.CLOSED)
    assert refused(ask(shop, inquiry(shop, card, sale_at(shop, 100)))) == "closed"
    assert refused(ask(shop, inquiry(shop, card, sale_at(shop, 100)), "note")) == "closed"


def test_before_limits_name_an_online_key_nothing_is_granted(
    ledger: Ledger, shop: Shop, card: VirtualCard
) -> None:
    (old,) = ledger.online_keys.all()
    new = ledger.online_keys.create()
    # Made, not published: the old one goes on.
    body = inquiry(shop, card, sale_at(shop, 100))
    assert granted(ledger, ask(shop, body))
    ledger.online_keys.retire(old.id)
    assert refused(ask(shop, inquiry(shop, card, sale_at(shop, 100)))) == "over_ceiling"
    ledger.publish()
    assert header(ledger).online.keys == (new.public,)
    granted(ledger, ask(shop, inquiry(shop, card, sale_at(shop, 100))))


def test_what_an_arqc_tells_of_the_counter_is_evidence(
    ledger: Ledger, shop: Shop, card: VirtualCard, clock: Clock
) -> None:
    """A card torn elsewhere has moved on: grants count from where it is, and pay for the gap."""
    counter = card.state.counter
    card.state = replace(card.state, counter=counter + 40_000)
    # The snapshot's tenth, and 40,000 that nobody can rule out, leave no room for 20,000.
    assert granted(ledger, ask(shop, inquiry(shop, card, sale_at(shop, 10_000)))).record.ceiling == (
        counter + 50_000
    )
    token = ledger.accounts()[0].tokens[0]
    assert token.highest_counter == counter + 40_000


def test_an_arqc_over_a_digest_is_evidence_against_what_died_before_it(
    ledger: Ledger, shop: Shop, card: VirtualCard, clock: Clock
) -> None:
    """Everything that had expired when the record it signs was issued was used up to its counter at most."""
    clock.now_s += POLICY.valid_s + POLICY.clock_tolerance_s + 2
    ledger.publish()
    before = ledger.accounts()[0].reserve_minor
    record, digest = shop.limit(card._personalisation.pan, 1)
    sale = sale_at(shop, 4_000, limit_digest=digest, ceiling=card.state.counter)
    ask(shop, inquiry(shop, card, sale), "note")
    with ledger._database.read() as connection:
        rows = connection.execute(
            sa.select(store.publications.c.evidence, store.publications.c.snapshot_version).where(
                store.publications.c.kind == "snapshot"
            )
        ).all()
    evidence = {version: found for found, version in rows}
    assert evidence[1] == card.state.counter
    assert evidence[2] is None
    assert record.ceiling > card.state.counter
    assert ledger.accounts()[0].reserve_minor >= before


def test_a_counter_behind_what_was_shown_before_is_an_alarm(
    ledger: Ledger, shop: Shop, card: VirtualCard
) -> None:
    early = inquiry(shop, card, sale_at(shop, 100))
    record = shop.tap(card, 2_000)
    assert shop.verdict(record) is Verdict.POSTED
    assert refused(ask(shop, early)) == Reason.AUTHENTICATION_FAILED.value
    assert [alarm.kind for alarm in ledger.alarms()] == [AlarmKind.COUNTER_BEHIND]


def test_only_what_this_gateway_asked_a_genuine_card_is_answered(
    ledger: Ledger, shop: Shop, card: VirtualCard
) -> None:
    body = inquiry(shop, card, sale_at(shop, 100))
    with pytest.raises(AuthenticationFailed, match="signed by this gateway"):
        ledger.grant(shop.enrolment.gateway_id, body, sign_batch(body, Ed25519PrivateKey.generate()))
    with pytest.raises(AuthenticationFailed, match="gateway"):
        ledger.grant("gw-stranger", body, sign_batch(body, shop.key))
    other = Shop.enrol(ledger)
    for changed in (
        inquiry(shop, card, sale_at(shop, 100), gateway_id=other.enrolment.gateway_id),
        inquiry(shop, card, sale_at(shop, 100), sale_id=uuid.uuid4()),
        inquiry(shop, card, sale_at(shop, 100, terminal_id=other.enrolment.terminal_id)),
        inquiry(shop, card, sale_at(shop, 100, merchant_id="SOMEBODY")),
        inquiry(shop, card, sale_at(shop, 100, transaction_type=0x21)),
        inquiry(shop, card, sale_at(shop, 100, at=datetime(2026, 1, 1, tzinfo=UTC))),
        inquiry(shop, card, sale_at(shop, 100), proof=shop.seal(b"PGT1")),
        b"{}",
        b"[]",
    ):
        with pytest.raises((AuthenticationFailed, InvalidInput)):
            ask(shop, changed)
    # A TC wants no grant; an ARQC of a card with another key proves nothing.
    record = sale_at(shop, 100, ceiling=card.state.counter + 100)
    with pytest.raises(AuthenticationFailed, match="ARQC"):
        ask(shop, inquiry(shop, card, record))
    forged = VirtualCard(replace(card._personalisation, mk_ac=bytes(range(16))))
    with pytest.raises(AuthenticationFailed, match="application cryptogram"):
        ask(shop, inquiry(shop, forged, sale_at(shop, 100)))
    assert ledger.accounts()[0].free_minor == LIMIT_MINOR - LIMIT_MINOR // 10


def test_an_unknown_card_of_ours_is_told_so(
    ledger: Ledger, shop: Shop, card: VirtualCard, icc_key: rsa.RSAPrivateKey
) -> None:
    issued = ledger.issue_token(ledger.accounts()[0].id, icc_key=icc_key)
    with ledger._database.write() as connection:
        connection.execute(store.tokens.delete().where(store.tokens.c.id == issued.token.id))
    stranger = VirtualCard(issued.personalisation)
    assert refused(ask(shop, inquiry(shop, stranger, sale_at(shop, 100)))) == "unknown_token"


# Notes


def note_of(ledger: Ledger, answer: OnlineAnswer, card: VirtualCard) -> SingleLimit:
    assert answer.note is not None, answer
    sequence, sealed = take_note_data(card._personalisation.mk_ac, answer.note.data)
    key = ledger.keys.token_key
    token_key = ledger._token_key(card._personalisation.pan, card._personalisation.psn)
    single = read_single(open_note(sealed, token_key_secret=key.secret, token_key=token_key), header(ledger))
    assert single.record.sequence == sequence
    return single


def test_a_tc_earns_its_card_a_note_that_goes_on_where_it_stands(
    ledger: Ledger, shop: Shop, card: VirtualCard
) -> None:
    record, digest = shop.limit(card._personalisation.pan, 1)
    sale = sale_at(shop, 2_000, ceiling=record.ceiling, limit_digest=digest)
    answer = ask(shop, inquiry(shop, card, sale), "note")
    note = note_of(ledger, answer, card)
    assert note.kind is Kind.NOTE
    assert note.record.ceiling > record.ceiling
    assert answer.limit is None  # a shop is told nothing of a customer's credit in clear
    assert ledger.accounts()[0].outstanding_minor == 0
    ledger.check_books()


def test_a_note_takes_its_share_of_what_is_free_and_no_more(
    ledger: Ledger, shop: Shop, card: VirtualCard
) -> None:
    free = ledger.accounts()[0].free_minor
    ask(shop, inquiry(shop, card, sale_at(shop, 2_000)), "note")
    share = POLICY.online.note_room_percent
    assert ledger.accounts()[0].free_minor == free - free * share // 100


def test_grants_and_notes_are_in_the_signer_s_log_before_they_are_out(
    ledger: Ledger, shop: Shop, card: VirtualCard, tmp_path: Path, database: str | None
) -> None:
    if database is not None:
        pytest.skip("the backup here is a copy of a file")
    backup = tmp_path / "backup.db"
    ledger._database.close()
    shutil.copy(ledger.home / "ledger.db", backup)
    answer = ask(shop, inquiry(shop, card, sale_at(shop, 20_000)))
    grant = granted(ledger, answer)
    ledger.close()
    for left in ledger.home.glob("ledger.db*"):
        left.unlink()
    shutil.copy(backup, ledger.home / "ledger.db")
    with pytest.raises(InvalidConfiguration, match="restored"):
        Ledger.open(ledger.home, clock=ledger._clock)
    replayed = Ledger.restored(ledger.home, clock=ledger._clock)
    assert replayed.publications == (1 if answer.note is None else 2)
    with Ledger.open(ledger.home, clock=ledger._clock) as again:
        restored = replace(shop, ledger=again)
        record = restored.tap(card, 20_000, limit=(grant.record, grant.digest))
        assert restored.verdict(record) is Verdict.POSTED
        again.check_books()


# Phones


@pytest.fixture
def phone(ledger: Ledger, card: VirtualCard, clock: Clock) -> Phone:
    return Phone(
        card,
        ledger,
        currency_numeric=ledger.currency.numeric,
        country_numeric=ledger.identity.country_numeric,
        clock=lambda: datetime.fromtimestamp(clock.now_s, UTC),
    )


def test_a_phone_fetches_its_own_note(ledger: Ledger, phone: Phone, card: VirtualCard) -> None:
    counter = card.state.counter
    answer = phone.refresh()
    assert answer.limit is not None
    assert phone.allowance_minor > LIMIT_MINOR // 10
    assert card.state.note_sequence == note_of(ledger, answer, card).record.sequence
    assert card.state.counter == counter
    ledger.check_books()


def test_what_a_phone_returns_is_free_again(ledger: Ledger, phone: Phone, card: VirtualCard) -> None:
    phone.refresh()
    # Everything it could still claim goes back.
    free, reserve = ledger.accounts()[0].free_minor, ledger.accounts()[0].reserve_minor
    amount = phone.allowance_minor
    answer = phone.give_back(amount)
    assert answer == OnlineAnswer()
    account = ledger.accounts()[0]
    assert (account.free_minor, account.reserve_minor) == (free + amount, reserve - amount)
    assert account.outstanding_minor == 0
    assert ledger.payments() == ()
    assert phone.allowance_minor == 0
    ledger.check_books()
    # Nobody can pay with these points any more, and no overlap is seen when the card goes on.
    phone.refresh()
    assert phone.allowance_minor > 0


def test_a_return_lost_on_the_way_is_repeated_and_counts_once(
    ledger: Ledger, phone: Phone, card: VirtualCard
) -> None:
    phone.refresh()
    sent: list[bytes] = []

    class Losing:
        def wallet_challenge(self) -> str:
            return ledger.wallet_challenge()

        def wallet_note(self, body: bytes) -> str:
            return ledger.wallet_note(body)

        def wallet_return(self, body: bytes) -> str:
            sent.append(body)
            return ledger.wallet_return(body)

    phone.line = Losing()
    phone.give_back(1_000)
    free = ledger.accounts()[0].free_minor
    assert OnlineAnswer.from_json(ledger.wallet_return(sent[0])) == OnlineAnswer()
    assert ledger.accounts()[0].free_minor == free


def test_a_copy_s_return_of_points_that_were_paid_with_is_an_alarm(
    ledger: Ledger, shop: Shop, phone: Phone, card: VirtualCard
) -> None:
    phone.refresh()
    copy = replace(phone, card=VirtualCard(card._personalisation))
    assert phone.limit is not None
    limit = LimitRecord(
        ledger._token_key(card._personalisation.pan, 1),
        phone.limit.ceiling,
        100_000,
        card.state.note_sequence,
    )
    assert shop.verdict(shop.tap(card, 3_000, limit=(limit, phone.limit.digest))) is Verdict.POSTED
    copy.card.state = replace(copy.card.state, counter=card.state.counter - 3_000)
    assert refused(copy.give_back(2_000)) == Reason.INTERVAL_OVERLAP.value
    assert AlarmKind.OVERLAP in [alarm.kind for alarm in ledger.alarms()]
    assert ledger.accounts()[0].outstanding_minor == 3_000


def test_a_wallet_is_believed_over_a_fresh_challenge_alone(
    ledger: Ledger, shop: Shop, phone: Phone, card: VirtualCard, clock: Clock
) -> None:
    def asked(kind: CryptogramKind = CryptogramKind.ARQC, **changes: Any) -> bytes:
        sale = replace(phone._addressed(0x31, 1), **changes)
        return wallet_body(Transcript.of(*dialogue(card, sale, kind)).to_bytes())

    old = phone._addressed(0x31, 1)
    for body in (
        asked(sale_id=uuid.uuid4().bytes),
        asked(terminal_id=shop.enrolment.terminal_id),
        asked(merchant_id="SOMEBODY"),
        asked(transaction_type=0x21),
        asked(transaction_type=0x00),
        b'{"transcript": "AAAA"}',
        b'{"transcript": 7}',
        b"{}",
    ):
        with pytest.raises((AuthenticationFailed, InvalidInput)):
            ledger.wallet_note(body)
    with pytest.raises(AuthenticationFailed, match="TC"):
        ledger.wallet_return(asked(transaction_type=0x21))
    clock.now_s += 121
    with pytest.raises(AuthenticationFailed, match="challenge"):
        ledger.wallet_note(wallet_body(Transcript.of(*dialogue(card, old, CryptogramKind.ARQC)).to_bytes()))
    # A challenge is good for one content.
    fresh = phone._addressed(0x31, 1)
    first = wallet_body(Transcript.of(*dialogue(card, fresh, CryptogramKind.ARQC)).to_bytes())
    second = wallet_body(Transcript.of(*dialogue(card, fresh, CryptogramKind.ARQC)).to_bytes())
    assert ledger.wallet_note(first) == ledger.wallet_note(first)
    with pytest.raises(Conflict):
        ledger.wallet_note(second)


def test_no_answer_or_refusal_holds_a_token_number(
    ledger: Ledger, shop: Shop, card: VirtualCard, phone: Phone
) -> None:
    pan = card._personalisation.pan
    answer = ask(shop, inquiry(shop, card, sale_at(shop, 20_000)))
    assert pan not in answer.to_json()
    assert pan not in phone.refresh().to_json()
    with pytest.raises(PosGatewayError) as caught:
        ask(shop, inquiry(shop, card, sale_at(shop, 100, merchant_id="SOMEBODY")))
    assert pan not in str(caught.value)
    assert json.loads(answer.to_json())["refused"] is None
