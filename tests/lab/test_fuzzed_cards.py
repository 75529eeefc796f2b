"""Cards that make themselves up: whatever they do, the gateway neither crashes nor waits longer than it is
told to, and approves nothing that the issuer's own card did not give."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from uuid import uuid4

import pytest

from pos_gateway.authorization.reasons import Reason
from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.application import AID, Sale
from pos_gateway.emv.authentication import (
    CaPublicKey,
    KnownIssuers,
    authenticate_card,
    authenticate_cryptogram,
)
from pos_gateway.emv.dialogue import converse, read_card, request_cryptogram
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.errors import (
    AuthenticationFailed,
    CardLeft,
    CardNotSupported,
    InvalidCardData,
    ReaderUnavailable,
)
from pos_gateway.gateway.readers.frontend import FrontendReader
from pos_gateway.gateway.readers.pcsc import PcscReader
from pos_gateway.gateway.till import Approved, Declined, Outcome, TapAgain
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.forged_card import with_another_icc_key
from pos_gateway.lab.scripted_card import Dialogue, FuzzedCard, Line, ReplayedCard, ScriptedCard, Trick
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.udp_card import UdpField
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.lab.virtual_reader import Fuzz, VirtualReader
from pos_gateway.ledger.config import Policy

TODAY = date(2026, 11, 24)
QUICK, LONG = 2_000, 100_000
THROUGH_PCSCD, THROUGH_PCSCD_LONG = 60, 500

MakeCard = Callable[..., Personalisation]
MakeSale = Callable[..., Sale]

_EXPECTED = (CardLeft, CardNotSupported, InvalidCardData, AuthenticationFailed)


def fuzz_dialogues(count: int, seed: int, make_card: MakeCard, make_sale: MakeSale, capk: CaPublicKey) -> int:
    """Run so many dialogues; how many came to an authentic TC."""
    unlimited = {"tc_rate_limit": 10**9, "cumulative_cap_minor": 10**12}
    genuine = VirtualCard(make_card(**unlimited))
    copied = VirtualCard(with_another_icc_key(make_card(**unlimited)))
    known: KnownIssuers = {}
    authentic = 0
    for card, share in ((genuine, count // 2), (copied, count - count // 2)):
        fuzzed = FuzzedCard(card, seed)
        for number in range(share):
            elements = make_sale().elements()
            channel, before = DirectChannel(fuzzed), card.state
            try:
                read = converse(read_card(elements, [AID]), channel.transceive)
                authenticated = authenticate_card(read, [capk], TODAY, known_issuers=known)
                answer = converse(request_cryptogram(read, elements, CryptogramKind.TC), channel.transceive)
                cryptogram = authenticate_cryptogram(authenticated, answer)
            except _EXPECTED:
                continue
            if cryptogram.kind is CryptogramKind.TC:
                # Then the issuer's card gave it, for this sale, and its counter moved once.
                assert card is genuine, (seed, number)
                assert card.state.answers[-1].answer == answer.answer, (seed, number)
                assert card.state.counter == before.counter + 1930, (seed, number)
                authentic += 1
    return authentic


def test_no_fuzzed_dialogue_proves_what_the_card_did_not_say(
    seed: int, make_card: MakeCard, make_sale: MakeSale, capk: CaPublicKey
) -> None:
    authentic = fuzz_dialogues(QUICK, seed, make_card, make_sale, capk)
    assert 0 < authentic < QUICK / 2  # some of the genuine card's dialogues are left alone


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_no_fuzzed_dialogue_of_very_many(
    seed: int, make_card: MakeCard, make_sale: MakeSale, capk: CaPublicKey
) -> None:
    assert 0 < fuzz_dialogues(LONG, seed, make_card, make_sale, capk) < LONG / 2


@pytest.mark.parametrize("trick", Trick)
@pytest.mark.parametrize("apdu_number", range(1, 7))
def test_any_trick_at_any_point(
    make_card: MakeCard, make_sale: MakeSale, capk: CaPublicKey, trick: Trick, apdu_number: int
) -> None:
    card = VirtualCard(make_card())
    channel = DirectChannel(ScriptedCard(card, [Line(apdu_number, trick, seed=apdu_number)]))
    elements = make_sale().elements()

    def dialogue() -> None:
        read = converse(read_card(elements, [AID]), channel.transceive)
        authenticated = authenticate_card(read, [capk], TODAY)
        answer = converse(request_cryptogram(read, elements, CryptogramKind.TC), channel.transceive)
        assert authenticate_cryptogram(authenticated, answer).kind is CryptogramKind.TC
        assert answer.answer == card.state.answers[0].answer

    if trick is Trick.STALL:
        dialogue()
        return
    harmless = apdu_number == 1 and trick is Trick.LIE  # the FCI is not signed: a bit of its label may flip
    if not harmless:
        with pytest.raises(_EXPECTED):
            dialogue()


@pytest.fixture
def shop(tmp_path: Path, ledger_home: Path) -> Iterator[Shop]:
    shutil.copytree(ledger_home, tmp_path / "ledger")
    policy = Policy(card_tc_rate_limit=1_000_000, card_cumulative_cap_minor=10**12)
    with Shop(tmp_path, policy=policy) as shop:
        yield shop


def check(shop: Shop, outcome: Outcome, counted: int, label: object) -> int:
    """What the journal says after an outcome is what the outcome said."""
    approved = isinstance(outcome, Approved)
    if isinstance(outcome, Declined):
        assert outcome.decline.reason in (
            Reason.CARD_NOT_SUPPORTED,
            Reason.INVALID_CARD_DATA,
            Reason.AUTHENTICATION_FAILED,
            Reason.CARD_EXPIRED,
            Reason.CARD_DECLINED,
        ), label
    assert isinstance(outcome, Approved | Declined | TapAgain), label
    counted += approved
    assert shop.journal.exposure.count == counted, label
    return counted


@pytest.mark.parametrize(
    "count",
    [
        THROUGH_PCSCD,
        pytest.param(THROUGH_PCSCD_LONG, marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
    ],
)
def test_fuzzed_cards_through_pcscd(
    seed: int, count: int, shop: Shop, virtual_reader: VirtualReader, tmp_path: Path
) -> None:
    """A copy of a genuine card, its key unknown to the copier, in as many guises: never approved, never
    longer in the field than the time-out for each of the few commands there are."""
    _, own = shop.issue(limit_minor=10**9)
    shop.publish()
    file = tmp_path / "card.json"
    file.write_text(with_another_icc_key(own).to_json())
    timeout_s, most_commands = 0.5, 60
    reader = PcscReader(virtual_reader.names[0], response_timeout_s=timeout_s)
    numbers = itertools.count()
    done = 0
    while done < count:
        # One that leaves has to be presented anew, which takes pcscd half a second: most stay.
        leaves = done % 10 == 0
        fuzz = Fuzz(seed + next(numbers), leaves=leaves, stall_s=0.6 if leaves else 0.0)
        virtual_reader.insert(file, fuzz=fuzz)
        for _ in range(1 if leaves else 9):
            begun = time.monotonic()
            payment = shop.till.new_payment(uuid4(), 100, shop.journal.last_sequence + 1)
            try:
                channel = reader.wait_for_card(10.0)
                if channel is None:
                    break
                outcome = shop.till.tap(payment, channel)
                channel.close()
                assert check(shop, outcome, 0, fuzz) == 0
            except ReaderUnavailable:
                # It stalled beyond the time-out: the lane tries again, the reader is free once the card left.
                virtual_reader.remove()
            done += 1
            assert time.monotonic() - begun < 10 + most_commands * (timeout_s + 1)  # a bound on hanging
            status = virtual_reader.status()
            if status is None or not status["present"]:
                break
        virtual_reader.remove()
        waited = reader_empty(reader)
        assert waited
    assert shop.journal.exposure.count == 0
    reader.close()


def reader_empty(reader: PcscReader) -> bool:
    for _ in range(50):
        try:
            if reader.wait_for_removal(1.0):
                return True
        except ReaderUnavailable:
            time.sleep(0.1)
    return False


def test_fuzzed_cards_on_a_frontend(seed: int, shop: Shop) -> None:
    _, own = shop.issue(limit_minor=10**9)
    shop.publish()
    card = VirtualCard(own)
    field = UdpField()
    reader = FrontendReader("udp", lambda: field.path, response_timeout_s=0.5)
    counted = 0
    try:
        for number in range(100):
            before = card.state
            field.insert(FuzzedCard(card, seed + number))
            payment = shop.till.new_payment(uuid4(), 100, shop.journal.last_sequence + 1)
            channel = reader.wait_for_card(10.0)
            assert channel is not None
            outcome = shop.till.tap(payment, channel)
            channel.close()
            field.remove()
            approved = check(shop, outcome, counted, seed + number) - counted
            counted += approved
            # The genuine card under the fuzz: an approval is one step of its counter, journalled.
            if approved:
                assert card.state.counter == before.counter + 100
    finally:
        reader.close()
        field.close()


def test_a_recorded_dialogue_gives_the_same_evidence_again(
    make_card: MakeCard, make_sale: MakeSale, capk: CaPublicKey
) -> None:
    elements = make_sale().elements()
    exchanges: list[tuple[bytes, bytes]] = []
    channel = DirectChannel(VirtualCard(make_card()))

    def recorded(command: bytes) -> bytes:
        answer = channel.transceive(command)
        exchanges.append((command, answer))
        return answer

    read = converse(read_card(elements, [AID]), recorded)
    answer = converse(request_cryptogram(read, elements, CryptogramKind.TC), recorded)
    saved = Dialogue(tuple(exchanges), {"told": "by a test"}).to_json()

    again = DirectChannel(ReplayedCard(Dialogue.from_json(saved)))
    read_again = converse(read_card(elements, [AID]), again.transceive)
    assert converse(request_cryptogram(read_again, elements, CryptogramKind.TC), again.transceive) == answer
    assert authenticate_cryptogram(authenticate_card(read_again, [capk], TODAY), answer).authentic
    with pytest.raises(CardLeft):
        again.transceive(b"\x00\xa4\x04\x00")
    other = DirectChannel(ReplayedCard(Dialogue.from_json(saved)))
    with pytest.raises(InvalidCardData):
        converse(read_card(make_sale().elements(), [AID]), other.transceive)


def test_seeds_repeat_themselves(make_card: MakeCard) -> None:
    own, select = make_card(), bytes.fromhex("00A4040007") + AID + b"\0"

    def run(seed: int) -> list[bytes]:
        card = FuzzedCard(VirtualCard(own), seed, leaves=False)
        return [card.process(select) for _ in range(50)]

    seed = random.Random(os.urandom(8)).randrange(1 << 30)
    assert run(seed) == run(seed)
    assert run(seed) != run(seed + 1)
