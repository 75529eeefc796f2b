from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pos_gateway.emv import application, dialogue
from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.dialogue import converse, read_card, request_cryptogram
from pos_gateway.errors import CardLeft, CardNotSupported, InvalidCardData, InvalidInput
from tests.emv.making import SALE, ask, read
from tests.emv.second_issuer import AID, CDOL1, SecondCard, SecondIssuer, pack

SMALL = SecondIssuer(ca_size=128, issuer_size=96, icc_size=64)
SELECT, GPO, READ, GENERATE_AC = b"\x00\xa4", b"\x80\xa8", b"\x00\xb2", b"\x80\xae"
OK = b"\x90\x00"
VISA, MASTERCARD = bytes.fromhex("A0000000031010"), bytes.fromhex("A0000000041010")


def ppse(*entries: bytes) -> bytes:
    listed = b"".join(pack("61", entry) for entry in entries)
    return pack("6F", pack("84", b"2PAY.SYS.DDF01") + pack("A5", pack("BF0C", listed))) + OK


def select_command(name: bytes) -> bytes:
    return b"\x00\xa4\x04\x00" + bytes([len(name)]) + name + b"\x00"


def test_a_card_is_read_and_answers() -> None:
    card = SMALL.card()
    known = read(card)
    assert known.aid == AID
    assert (known.pan, known.last4, known.psn) == ("9156000112345672", "5672", 1)
    assert (known.effective, known.expires) == (date(2026, 1, 1), date(2029, 11, 30))
    assert known.currency_numeric == 156
    assert not known.device_can_verify_holder
    assert known.note is None
    assert known.pdol_values == card.pdol_values
    assert known.static_data == SMALL.static_record() + b"\x01\x00"
    answer = ask(card, known)
    assert answer.kind is CryptogramKind.TC
    assert answer.cdol1_values == card.seen[-1][5:-1]
    assert [command[:2] for command in card.seen] == [SELECT, GPO, READ, READ, READ, READ, GENERATE_AC]


def test_nothing_of_the_card_shows_in_reprs() -> None:
    card = SMALL.card()
    known = read(card)
    shown = repr(known) + repr(ask(card, known)) + repr(known.records[0]) + str(known)
    assert "9156000112345672" not in shown
    assert repr(known.elements[0x5A])[2:-1] not in shown


def test_the_note_is_handed_over() -> None:
    card = SMALL.card()
    options = pack("82", card.aip) + pack("94", card.afl)
    card.scripted[GPO] = pack("77", options + pack("DF01", b"sealed")) + OK
    assert read(card).note == b"sealed"
    card.scripted[GPO] = pack("77", options + pack("DF01", bytes(257))) + OK
    with pytest.raises(InvalidCardData):
        read(card)


def test_a_scheme_card_is_refused_by_its_aid_and_nothing_is_read() -> None:
    card = SMALL.card()
    card.aid = b"\xff" * 7
    card.scripted[select_command(application.PPSE)] = ppse(
        pack("4F", MASTERCARD) + pack("87", b"\x02"), pack("4F", VISA) + pack("87", b"\x01")
    )
    with pytest.raises(CardNotSupported, match="Visa") as caught:
        read(card)
    assert caught.value.scheme == "Visa"
    assert [command[:2] for command in card.seen] == [SELECT, SELECT]


def test_a_card_without_ppse_or_without_a_known_scheme_is_not_supported() -> None:
    card = SMALL.card()
    card.aid = b"\xff" * 7
    with pytest.raises(CardNotSupported) as caught:
        read(card)
    assert caught.value.scheme is None
    card.scripted[select_command(application.PPSE)] = ppse(pack("4F", bytes.fromhex("F099999999")))
    with pytest.raises(CardNotSupported) as caught:
        read(card)
    assert caught.value.scheme is None


def test_a_ppse_that_lists_our_aid_leads_to_it() -> None:
    card = SMALL.card()
    card.aid = AID + b"\x02"
    # This card does not find an application by the beginning of its name.
    card.scripted[select_command(AID)] = b"\x6a\x82"
    card.scripted[select_command(application.PPSE)] = ppse(
        pack("4F", VISA), pack("50", b"x") + pack("4F", AID + b"\x02")
    )
    assert read(card).aid == AID + b"\x02"


def test_a_blocked_application_is_not_supported() -> None:
    card = SMALL.card()
    card.scripted[SELECT] = b"\x62\x83"
    with pytest.raises(CardNotSupported, match="blocked"):
        read(card)


def test_another_application_than_selected_is_refused() -> None:
    card = SMALL.card()
    card.scripted[SELECT] = pack("6F", pack("84", VISA) + pack("A5", b"")) + OK
    with pytest.raises(InvalidCardData, match="tag 84"):
        read(card)


def generate(change: Callable[[SecondCard], None]) -> None:
    card = SMALL.card()
    change(card)
    ask(card, read(card))


def scripted(prefix: bytes, answer: bytes) -> Callable[[SecondCard], None]:
    return lambda card: card.scripted.update({prefix: answer})


def options(aip: bytes = b"\x01\x00", afl: str = "0801030010010101", template: str = "77") -> bytes:
    return pack(template, pack("82", aip) + pack("94", bytes.fromhex(afl))) + OK


def replaced(place: tuple[int, int], old: bytes, new: bytes) -> Callable[[SecondCard], None]:
    def change(card: SecondCard) -> None:
        content = card.records[place][2 if card.records[place][1] < 128 else 3 :]
        assert old in content
        card.records[place] = pack("70", content.replace(old, new))

    return change


def answered(*objects: bytes) -> bytes:
    return pack("77", b"".join(objects)) + OK


CID, ATC, SDAD, IAD = (
    pack("9F27", b"\x40"),
    pack("9F36", b"\0\1"),
    pack("9F4B", bytes(64)),
    pack("9F10", bytes(32)),
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (scripted(SELECT, OK), "must be one template 6F at SELECT"),
        (scripted(SELECT, pack("6F", pack("84", AID)) + OK), "tag A5 stands here 0 times"),
        (scripted(SELECT, pack("6F", pack("84", AID) + pack("84", AID)) + OK), "tag 84 stands here 2 times"),
        (
            scripted(SELECT, pack("6F", pack("84", AID) + pack("A5", pack("9F38", b"\x9f"))) + OK),
            "cut off at tag 9F38",
        ),
        (scripted(GPO, b"\x69\x85"), "6985 conditions of use not satisfied at GET PROCESSING OPTIONS"),
        (scripted(GPO, b""), "0 bytes are no response"),
        (scripted(GPO, bytes(300)), "300 bytes are no response"),
        (scripted(GPO, pack("80", bytes.fromhex("010008010300")) + OK), "must be one template 77"),
        (scripted(GPO, options(template="70")), "must be one template 77"),
        (scripted(GPO, options()[:-2] + b"\x5a\x00" + OK), "must be one template 77"),
        (scripted(GPO, pack("77", pack("82", b"\1\0")) + OK), "tag 94 is missing"),
        (scripted(GPO, options(aip=b"\x01")), "1 bytes, expected 2"),
        (scripted(GPO, options(aip=b"\x20\x00")), "does not support CDA"),
        (scripted(GPO, options(afl="")), "no AFL"),
        (scripted(GPO, options(afl="080101")), "no AFL"),
        (scripted(GPO, options(afl="08010100" * 9)), "no AFL"),
        (scripted(GPO, options(afl="0801FF00")), "more than 32 records"),
        (scripted(GPO, options(afl="08010100" * 2)), "listed twice"),
        (scripted(GPO, options(afl="08000100")), "contradict"),
        (scripted(GPO, options(afl="08020100")), "contradict"),
        (scripted(GPO, options(afl="08010102")), "contradict"),
        (scripted(GPO, options(afl="09010100")), "SFI"),
        (scripted(GPO, options(afl="00010100")), "SFI"),
        (scripted(GPO, options(afl="58010100")), "SFI"),
        (scripted(GPO, options(afl="0801040010010101")), "6A83 record not found at record 1.4"),
        (scripted(READ, b"\x6a\x83"), "record 1.1"),
        (scripted(READ, pack("77", b"") + OK), "must be one template 70 at record 1.1"),
        (scripted(READ, pack("70", b"\x5a\x08") + OK), "record 1.1, byte 2"),
        (scripted(READ, pack("70", pack("50", b"")) + OK), "tag 50 stands in two records"),
        (replaced((2, 1), pack("9F4A", b"\x82"), pack("9F4A", b"\x82\x94")), "tag 9F4A"),
        (replaced((2, 1), pack("9F4A", b"\x82"), b""), "tag 9F4A is missing"),
        (replaced((2, 1), pack("5F34", b"\x01"), pack("5F34", b"\x0a")), "2 digits at tag 5F34"),
        (replaced((2, 1), pack("5F34", b"\x01"), pack("5F34", b"\x01") * 2), "stands here twice"),
        (
            replaced((2, 1), bytes.fromhex("5F2403291130"), bytes.fromhex("5F2403291330")),
            "no date|not a date",
        ),
        (
            replaced((2, 1), bytes.fromhex("5A089156000112345672"), bytes.fromhex("5A08915600011234567F")),
            "16",
        ),
        (
            replaced((2, 1), bytes.fromhex("5A089156000112345672"), bytes.fromhex("5A08915600011234ABCD")),
            "12 to 19",
        ),
        (replaced((2, 1), pack("8C", CDOL1), pack("8C", CDOL1[:-3])), "does not ask for tag DF13"),
        (
            replaced((2, 1), pack("8C", CDOL1), pack("8C", CDOL1.replace(b"\xdf\x10\x06", b"\xdf\x10\x04"))),
            "does not ask for tag DF10 in full",
        ),
        (scripted(GENERATE_AC, b"\x69\x85"), "6985 conditions of use not satisfied at GENERATE AC"),
        (scripted(GENERATE_AC, answered(CID, ATC, IAD)), "tag 9F4B is missing"),
        (scripted(GENERATE_AC, answered(ATC, SDAD, IAD)), "tag 9F27 is missing"),
        (scripted(GENERATE_AC, answered(CID, SDAD, IAD)), "tag 9F36 is missing"),
        (scripted(GENERATE_AC, answered(CID, ATC, ATC, SDAD, IAD)), "twice"),
        (scripted(GENERATE_AC, answered(pack("9F27", b"\xc0"), ATC, SDAD, IAD)), "reserved cryptogram type"),
        (scripted(GENERATE_AC, answered(pack("9F27", b"\x00"), ATC, IAD)), "tag 9F26 is missing"),
    ],
)
def test_a_card_that_breaks_the_rules_is_refused_with_the_place(
    change: Callable[[SecondCard], None], reason: str
) -> None:
    with pytest.raises(InvalidCardData, match=reason):
        generate(change)


def test_what_must_be_signed_may_not_stand_outside_the_signed_records() -> None:
    card = SMALL.card()
    card.afl = bytes.fromhex("08010300 10010100")
    with pytest.raises(InvalidCardData, match="outside the authenticated records"):
        read(card)


@pytest.mark.parametrize(
    ("asked", "given_cid", "allowed"),
    [
        (CryptogramKind.TC, 0x80, True),
        (CryptogramKind.TC, 0x00, True),
        (CryptogramKind.ARQC, 0x40, False),
        (CryptogramKind.ARQC, 0x00, True),
        (CryptogramKind.AAC, 0x40, False),
        (CryptogramKind.AAC, 0x80, False),
    ],
)
def test_a_card_may_give_less_than_asked_but_never_more(
    asked: CryptogramKind, given_cid: int, allowed: bool
) -> None:
    card = SMALL.card()
    known = read(card)
    card.kind = given_cid
    if allowed:
        assert ask(card, known, asked).kind.value == given_cid
    else:
        with pytest.raises(InvalidCardData, match="was asked"):
            ask(card, known, asked)


def test_more_data_and_wrong_length_are_followed_once() -> None:
    card = SMALL.card()
    held_back: list[bytes] = []

    def transceive(command: bytes) -> bytes:
        if command[1] == 0xC0:
            return held_back.pop()
        if command[1] == 0xB2 and command[-1] == 0:
            return b"\x6c\xfe"
        answer = card.transceive(command)
        if command[1] == 0xA8:
            held_back.append(answer[10:])
            return answer[:10] + bytes([0x61, len(answer) - 12])
        return answer

    assert converse(read_card(SALE.elements(), [AID]), transceive).last4 == "5672"
    assert held_back == []


@pytest.mark.parametrize("status", [b"\x61\x10", b"\x6c\x10"])
def test_a_card_that_never_comes_to_an_end_is_refused(status: bytes) -> None:
    commands = 0

    def transceive(command: bytes) -> bytes:
        nonlocal commands
        commands += 1
        return status

    with pytest.raises((InvalidCardData, CardNotSupported)):
        converse(read_card(SALE.elements(), [AID]), transceive)
    assert commands <= 6


def test_an_error_of_the_channel_passes_through() -> None:
    def transceive(command: bytes) -> bytes:
        raise CardLeft("gone")

    with pytest.raises(CardLeft):
        converse(read_card(SALE.elements(), [AID]), transceive)


MOST_COMMANDS = 2 * (3 + 1 + dialogue.MAX_RECORDS) + 2 * 2


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=40).map(lambda b: b + OK) | st.binary(max_size=260), max_size=8))
def test_a_card_that_says_anything_is_read_or_refused(answers: list[bytes]) -> None:
    commands = 0

    def transceive(command: bytes) -> bytes:
        nonlocal commands
        commands += 1
        return answers[commands % len(answers)] if answers else b""

    with contextlib.suppress(InvalidInput, CardNotSupported):
        converse(read_card(SALE.elements(), [AID]), transceive)
    assert commands <= MOST_COMMANDS


@pytest.mark.parametrize("seed", range(6))
def test_a_genuine_card_with_garbled_answers_is_read_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    genuine = SMALL.card()
    recorded: dict[bytes, bytes] = {}

    def record(command: bytes) -> bytes:
        recorded[command] = genuine.transceive(command)
        return recorded[command]

    converse(
        request_cryptogram(
            converse(read_card(SALE.elements(), [AID]), record), SALE.elements(), CryptogramKind.TC
        ),
        record,
    )
    for _ in range(400):
        victim = rng.choice(list(recorded))
        garbled = bytearray(recorded[victim])
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(garbled))
            match rng.randrange(4):
                case 0:
                    garbled[at] ^= 1 << rng.randrange(8)
                case 1:
                    del garbled[at : at + rng.randint(1, 4)]
                case 2:
                    garbled[at:at] = rng.randbytes(rng.randint(1, 4))
                case _:
                    garbled[at] = rng.choice((0x00, 0x7F, 0x80, 0x81, 0x82, 0xFF, 0x9F, 0x70))
            if not garbled:
                break
        commands = 0

        def transceive(command: bytes, victim: bytes = victim, garbled: bytes = bytes(garbled)) -> bytes:
            nonlocal commands
            commands += 1
            return garbled if command == victim else recorded.get(command, b"\x6a\x82")

        with contextlib.suppress(InvalidInput, CardNotSupported):
            known = converse(read_card(SALE.elements(), [AID]), transceive)
            converse(request_cryptogram(known, SALE.elements(), CryptogramKind.TC), transceive)
        assert commands <= MOST_COMMANDS
