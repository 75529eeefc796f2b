"""The card: does it do what docs/card-application.md asks of a card application? The numbers are its
sections'. Amounts are small; the card's counter moves by what is approved here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import date, datetime

import pytest

from pos_gateway.emv import apdu, tlv
from pos_gateway.emv.apdu import Command, CryptogramKind
from pos_gateway.emv.application import (
    AID,
    CDOL1,
    CDOL2,
    PDOL,
    PPSE,
    TAG_CEILING,
    TAG_NOTE,
    Sale,
    counter_bytes,
    previous_digest,
)
from pos_gateway.emv.authentication import (
    AuthenticatedCard,
    Cryptogram,
    authenticate_card,
    authenticate_cryptogram,
)
from pos_gateway.emv.dialogue import (
    CardRead,
    CryptogramAnswer,
    converse,
    read_card,
    read_log,
    request_cryptogram,
    request_second_cryptogram,
)
from pos_gateway.emv.note import MAX_NOTE_BYTES
from pos_gateway.errors import InvalidCardData
from pos_gateway.gateway.program import ca_public_key
from pos_gateway.lab.shop import Shop
from tests.hil.rig import RecordingChannel, Rig

AMOUNT = 100
NO_CEILING = (1 << 48) - 1
OUR_TERMINAL = "HIL00001"


class Session:
    """One dialogue after another with the card in the field."""

    def __init__(self, shop: Shop, channel: RecordingChannel) -> None:
        self._ca_keys = [ca_public_key(key) for key in shop.enrolment.ca_keys]
        self.currency = shop.till.station.currency.numeric
        self.channel = channel

    def sale(self, **changes: object) -> Sale:
        sale = Sale(
            amount_minor=AMOUNT,
            currency_numeric=self.currency,
            country_numeric=156,
            at=datetime.now().astimezone(),
            unpredictable_number=os.urandom(4),
            sequence_counter=1,
            terminal_id=OUR_TERMINAL,
            merchant_id="HIL",
            merchant_category="5411",
            sale_id=os.urandom(16),
            ceiling=NO_CEILING,
            limit_digest=os.urandom(16),
        )
        return replace(sale, **changes)  # type: ignore[arg-type]

    def read(self, sale: Sale) -> AuthenticatedCard:
        card = converse(read_card(sale.elements(), [AID]), self.channel.transceive)
        return authenticate_card(card, self._ca_keys, date.today())  # noqa: DTZ011 - as on the wall

    def ask(
        self, sale: Sale, kind: CryptogramKind = CryptogramKind.TC
    ) -> tuple[AuthenticatedCard, CryptogramAnswer, Cryptogram]:
        card = self.read(sale)
        answer = converse(request_cryptogram(card.card, sale.elements(), kind), self.channel.transceive)
        return card, answer, authenticate_cryptogram(card, answer)

    def status(self, command: Command | bytes) -> int:
        raw = command if isinstance(command, bytes) else command.to_bytes()
        return int.from_bytes(self.channel.transceive(raw)[-2:], "big")

    def initiated(self, sale: Sale) -> CardRead:
        return converse(read_card(sale.elements(), [AID]), self.channel.transceive)


@pytest.fixture
def session(standing_rig: Rig, shop: Shop) -> Iterator[Session]:
    channel = standing_rig.take_standing()
    yield Session(shop, channel)
    channel.close()


def cdol1_values(sale: Sale) -> bytes:
    return tlv.fill_dol(tlv.parse_dol(CDOL1), sale.elements())


def pdol_values(sale: Sale) -> bytes:
    return tlv.fill_dol(tlv.parse_dol(PDOL), sale.elements())


# 2. Selection


def test_2_selected_by_its_aid(session: Session) -> None:
    response = apdu.Response.from_bytes(session.channel.transceive(apdu.select(AID).to_bytes()))
    assert response.sw == 0x9000
    (fci,) = tlv.parse(response.data)
    assert fci.tag == 0x6F
    inside = {child.tag: child for child in fci.children}
    assert inside[0x84].value == AID
    assert {child.tag: child.value for child in inside[0xA5].children}[0x9F38] == PDOL


def test_2_listed_in_the_ppse(session: Session) -> None:
    response = apdu.Response.from_bytes(session.channel.transceive(apdu.select(PPSE).to_bytes()))
    assert response.sw == 0x9000
    assert AID in response.data


def test_2_another_name_is_not_found(session: Session) -> None:
    assert session.status(apdu.select(bytes.fromhex("F000000000"))) == 0x6A82


# 3. Starting, and reading records


def test_3_nothing_is_told_before_it_is_selected(session: Session) -> None:
    session.status(apdu.select(bytes.fromhex("F000000000")))
    sale = session.sale()
    assert session.status(apdu.get_processing_options(pdol_values(sale))) != 0x9000
    assert session.status(apdu.read_record(2, 1)) != 0x9000
    assert session.status(apdu.generate_ac(CryptogramKind.TC, cdol1_values(sale), cda=True)) != 0x9000


def test_3_records_come_after_processing_options_alone(session: Session) -> None:
    assert session.status(apdu.select(AID)) == 0x9000
    assert session.status(apdu.read_record(2, 1)) == 0x6985


def test_3_wrong_lengths_are_refused(session: Session) -> None:
    sale = session.sale()
    session.status(apdu.select(AID))
    assert session.status(apdu.get_processing_options(pdol_values(sale)[:-1])) == 0x6700
    session.initiated(sale)
    short = apdu.generate_ac(CryptogramKind.TC, cdol1_values(sale)[:-1], cda=True)
    assert session.status(short) == 0x6700


def test_3_records_that_are_not_there(session: Session) -> None:
    session.initiated(session.sale())
    assert session.status(apdu.read_record(1, 9)) == 0x6A83
    assert session.status(apdu.read_record(9, 1)) == 0x6A82


def test_3_chain_and_static_data_verify(session: Session) -> None:
    card = session.read(session.sale())
    assert card.card.elements[0x8C] == CDOL1
    assert card.card.elements[0x8D] == CDOL2
    assert card.currency_numeric == session.currency


def test_3_no_counter_is_readable_in_clear(session: Session) -> None:
    _, _, before = session.ask(session.sale())
    counter = counter_bytes(before.iad.counter_after)
    card = session.initiated(session.sale())
    for record in card.records:
        assert counter not in record.data
    for tag in (0x9F36, 0x9F13, 0x9F17, 0xDF14, 0x9F79):
        assert session.status(Command(0x80, 0xCA, tag >> 8, tag & 0xFF, le=256)) != 0x9000


# 4. GENERATE AC


def test_4_a_tc_moves_the_counter_by_the_amount(session: Session) -> None:
    _, _, first = session.ask(session.sale())
    sale = session.sale(amount_minor=7)
    _, _, second = session.ask(sale)
    assert first.kind is second.kind is CryptogramKind.TC
    assert second.iad.counter_after == first.iad.counter_after + 7
    assert second.atc > first.atc


def test_4_each_tc_points_back_to_the_one_before(session: Session) -> None:
    _, answer, _ = session.ask(session.sale())
    _, _, second = session.ask(session.sale())
    assert second.iad.previous_digest == previous_digest(answer.cdol1_values)


def test_4_over_the_ceiling_is_an_arqc_and_moves_nothing(session: Session) -> None:
    _, _, before = session.ask(session.sale())
    reached = before.iad.counter_after
    _, _, refused = session.ask(session.sale(ceiling=reached + AMOUNT - 1))
    assert refused.kind is CryptogramKind.ARQC
    assert refused.authentic
    _, _, allowed = session.ask(session.sale(ceiling=reached + AMOUNT))
    assert allowed.kind is CryptogramKind.TC
    assert allowed.iad.counter_after == reached + AMOUNT


def test_4_an_arqc_hides_the_counter(session: Session) -> None:
    _, _, before = session.ask(session.sale())
    _, _, one = session.ask(session.sale(), CryptogramKind.ARQC)
    _, _, two = session.ask(session.sale(), CryptogramKind.ARQC)
    clear = counter_bytes(before.iad.counter_after) + b"\0\0"
    assert clear not in (one.iad.counter_field, two.iad.counter_field)
    assert one.iad.counter_field != two.iad.counter_field


def test_4_the_same_question_gets_the_same_answer(session: Session) -> None:
    sale = session.sale()
    _, first, _ = session.ask(sale)
    _, again, _ = session.ask(sale)
    assert again.answer == first.answer
    _, _, after = session.ask(session.sale())
    _, _, reference = session.ask(session.sale())
    assert reference.iad.counter_after == after.iad.counter_after + AMOUNT


def test_4_another_number_or_another_terminal_is_another_question(session: Session) -> None:
    sale = session.sale()
    _, first, one = session.ask(sale)
    _, second, two = session.ask(replace(sale, terminal_id="HIL00002"))
    _, third, three = session.ask(replace(sale, unpredictable_number=os.urandom(4)))
    assert len({first.answer, second.answer, third.answer}) == 3
    start = one.iad.counter_after
    assert (two.iad.counter_after, three.iad.counter_after) == (start + AMOUNT, start + 2 * AMOUNT)


@pytest.mark.parametrize("what", ["no amount", "an amount for others", "a foreign currency"])
def test_4_what_a_card_refuses_by_itself(session: Session, what: str) -> None:
    _, _, before = session.ask(session.sale())
    sale = session.sale(amount_minor=0) if what == "no amount" else session.sale()
    if what == "a foreign currency":
        sale = replace(sale, currency_numeric=978)
    elements = sale.elements()
    if what == "an amount for others":
        elements = {**elements, 0x9F03: bytes.fromhex("000000000001")}
    card = converse(read_card(elements, [AID]), session.channel.transceive)
    answer = converse(request_cryptogram(card, elements, CryptogramKind.TC), session.channel.transceive)
    assert answer.kind is CryptogramKind.AAC
    _, _, after = session.ask(session.sale())
    assert after.iad.counter_after == before.iad.counter_after + AMOUNT


def test_4_one_cryptogram_a_session(session: Session) -> None:
    sale = session.sale()
    session.ask(sale)
    again = apdu.generate_ac(CryptogramKind.TC, cdol1_values(session.sale()), cda=True)
    assert session.status(again) == 0x6985


def test_4_a_tc_without_a_signature_is_not_given(session: Session) -> None:
    sale = session.sale()
    session.initiated(sale)
    assert session.status(apdu.generate_ac(CryptogramKind.TC, cdol1_values(sale), cda=False)) == 0x6A86


# 5. The second GENERATE AC


def test_5_a_grant_in_the_same_session_gives_the_tc(session: Session) -> None:
    _, _, before = session.ask(session.sale())
    reached = before.iad.counter_after
    sale = session.sale(ceiling=reached)
    card, first, arqc = session.ask(sale)
    assert arqc.kind is CryptogramKind.ARQC
    granted = {**sale.elements(), TAG_CEILING: counter_bytes(reached + AMOUNT)}
    answer = converse(request_second_cryptogram(card.card, first, granted), session.channel.transceive)
    cryptogram = authenticate_cryptogram(card, answer)
    assert cryptogram.kind is CryptogramKind.TC
    assert cryptogram.atc == arqc.atc
    assert cryptogram.iad.counter_after == reached + AMOUNT


def test_5_a_grant_that_is_too_low_is_an_aac(session: Session) -> None:
    _, _, before = session.ask(session.sale())
    reached = before.iad.counter_after
    sale = session.sale(ceiling=reached)
    card, first, _ = session.ask(sale)
    low = {**sale.elements(), TAG_CEILING: counter_bytes(reached + AMOUNT - 1)}
    answer = converse(request_second_cryptogram(card.card, first, low), session.channel.transceive)
    assert answer.kind is CryptogramKind.AAC
    _, _, after = session.ask(session.sale())
    assert after.iad.counter_after == reached + AMOUNT


# 6. Notes and the log


def test_6_a_note_that_the_issuer_did_not_make_is_refused(session: Session) -> None:
    session.ask(session.sale())
    forged = apdu.put_note(bytes(4) + bytes(150) + bytes(8))
    assert session.status(forged) == 0x6982
    too_long = apdu.put_note(bytes(4 + MAX_NOTE_BYTES + 1 + 8))
    assert session.status(too_long) == 0x6700
    other = Command(0x84, 0xDA, 0xDF, 0x02, bytes(20))
    assert session.status(other) == 0x6A88


def test_6_a_note_is_not_taken_before_a_cryptogram(session: Session) -> None:
    session.initiated(session.sale())
    assert session.status(apdu.put_note(bytes(4) + bytes(150) + bytes(8))) == 0x6985


def test_6_the_log_is_told_after_a_tc_alone(session: Session) -> None:
    session.ask(session.sale(), CryptogramKind.ARQC)
    with pytest.raises(InvalidCardData):
        converse(read_log(), session.channel.transceive)
    _, _, tc = session.ask(session.sale())
    log = converse(read_log(), session.channel.transceive)
    newest = log[-1]
    assert (newest.terminal, newest.amount_minor) == (OUR_TERMINAL, AMOUNT)
    assert newest.counter == tc.iad.counter_after


def test_6_a_note_stands_in_processing_options_or_nowhere(session: Session) -> None:
    card = session.initiated(session.sale())
    assert card.note is None or len(card.note) <= MAX_NOTE_BYTES
    assert all(TAG_NOTE not in {o.tag for o in tlv.parse(r.data)} for r in card.records)


# 7. Refusals


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("00 B2 00 0C 00", 0x6A86),
        ("80 A4 04 00 07 F0504F53475701 00", 0x6E00),
        ("00 88 00 00 00", 0x6D00),
        ("00 A4 04 0C 07 F0504F53475701 00", 0x6A86),
        ("80 AE C0 00 01 00 00", 0x6A86),
    ],
)
def test_7_commands_it_does_not_know(session: Session, command: str, expected: int) -> None:
    session.initiated(session.sale())
    assert session.status(bytes.fromhex(command)) == expected
