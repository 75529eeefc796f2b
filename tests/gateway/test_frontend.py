"""The nfcpy driver against virtual cards behind nfcpy's own udp device: the same card gives the same
evidence as over PC/SC, and nothing a card or a device does blocks anybody."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import pytest

from pos_gateway.emv.apdu import INS_GENERATE_AC, INS_READ_RECORD, CryptogramKind
from pos_gateway.emv.application import AID, Sale
from pos_gateway.emv.authentication import CaPublicKey, authenticate_card, authenticate_cryptogram
from pos_gateway.emv.dialogue import CardRead, CryptogramAnswer, converse, read_card, request_cryptogram
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.errors import CardLeft, CardNotSupported, ReaderUnavailable
from pos_gateway.gateway.readers.frontend import FrontendReader
from pos_gateway.gateway.readers.pcsc import PcscReader
from pos_gateway.gateway.readers.port import CardChannel, Indication, Reader
from pos_gateway.lab.card_state import CardState
from pos_gateway.lab.udp_card import Radio, UdpField
from pos_gateway.lab.virtual_card import BlankCard, SchemeCard, VirtualCard
from pos_gateway.lab.virtual_reader import VirtualReader
from pos_gateway.lab.vpcd import Fault, FaultKind
from tests.gateway.cables import Cable

TODAY = date(2026, 11, 24)
AMOUNT = 1930
PATIENCE_S = 10.0
SELECT = bytes.fromhex("00A4040007") + AID + b"\0"

MakeCard = Callable[..., Personalisation]
MakeSale = Callable[..., Sale]


@pytest.fixture
def field() -> Iterator[UdpField]:
    field = UdpField()
    yield field
    field.close()


@pytest.fixture
def reader(field: UdpField) -> Iterator[FrontendReader]:
    reader = FrontendReader("udp", lambda: field.path, response_timeout_s=PATIENCE_S)
    yield reader
    reader.close()


@pytest.fixture
def hasty_reader(field: UdpField) -> Iterator[FrontendReader]:
    reader = FrontendReader("udp", lambda: field.path, response_timeout_s=0.3)
    yield reader
    reader.close()


@pytest.fixture
def card(make_card: MakeCard) -> VirtualCard:
    return VirtualCard(make_card())


def arrived(reader: Reader) -> CardChannel:
    channel = reader.wait_for_card(PATIENCE_S)
    assert channel is not None
    return channel


def pay(channel: CardChannel, sale: Sale) -> tuple[CardRead, CryptogramAnswer]:
    read = converse(read_card(sale.elements(), [AID]), channel.transceive)
    return read, converse(request_cryptogram(read, sale.elements(), CryptogramKind.TC), channel.transceive)


def test_it_is_a_reader(reader: FrontendReader) -> None:
    port: Reader = reader
    for indication in Indication:
        port.indicate(indication)
    assert reader.chip() == "UDP"


def test_the_field_listens_on_loopback_alone(field: UdpField) -> None:
    assert field._socket.getsockname()[0] == "127.0.0.1"


def test_both_drivers_give_the_same_evidence_for_the_same_card(
    field: UdpField,
    reader: FrontendReader,
    virtual_reader: VirtualReader,
    make_card: MakeCard,
    make_sale: MakeSale,
    capk: CaPublicKey,
    tmp_path: Path,
) -> None:
    own, sale = make_card(), make_sale()
    file, state = tmp_path / "card.json", tmp_path / "state"
    file.write_text(own.to_json())
    field.insert(VirtualCard(own, state_path=state))
    read, answer = pay(arrived(reader), sale)
    field.remove()

    pcsc = PcscReader(virtual_reader.names[0])
    virtual_reader.insert(file, state=state)
    channel = arrived(pcsc)
    # The same sale once more: the card gives the answer it had, so every byte must be the same.
    read_again, answer_again = pay(channel, sale)
    channel.close()
    pcsc.close()
    assert read_again == read
    assert answer_again == answer
    assert answer_again.answer == answer.answer
    cryptogram = authenticate_cryptogram(authenticate_card(read, [capk], TODAY), answer)
    assert cryptogram.iad.counter_after == own.counter + AMOUNT


def test_an_empty_field_is_waited_for_and_no_longer(reader: FrontendReader) -> None:
    assert reader.wait_for_card(0.0) is None
    assert reader.wait_for_card(0.1) is None
    assert reader.wait_for_removal(0.0)


def test_a_card_that_stays_can_be_opened_again(
    field: UdpField, reader: FrontendReader, card: VirtualCard, make_sale: MakeSale
) -> None:
    field.insert(card)
    for _ in range(2):
        channel = arrived(reader)
        pay(channel, make_sale())
        channel.close()
        channel.close()
        assert not reader.wait_for_removal(0.0)
    with pytest.raises(CardLeft):
        channel.transceive(SELECT)
    field.remove()
    assert reader.wait_for_removal(PATIENCE_S)


@pytest.mark.parametrize(
    "ats", ["0A7880700050 4F534757", "01", "0200", "0208", "031880", "032870", "034800", "065870004142"]
)
def test_any_ats_of_the_standard_will_do(
    field: UdpField, reader: FrontendReader, card: VirtualCard, make_sale: MakeSale, ats: str
) -> None:
    field.insert(card, radio=Radio(ats=bytes.fromhex(ats)))
    _, answer = pay(arrived(reader), make_sale())
    assert answer.kind is CryptogramKind.TC


@pytest.mark.parametrize("ats", ["", "05", "0208AA", "0270", "0230"])
def test_an_ats_of_no_standard_is_no_card_of_ours(
    field: UdpField, reader: FrontendReader, card: VirtualCard, make_sale: MakeSale, ats: str
) -> None:
    field.insert(card, radio=Radio(ats=bytes.fromhex(ats) or b"\x00"))
    with pytest.raises(CardNotSupported):
        pay(arrived(reader), make_sale())


@pytest.mark.parametrize("lost", [range(5, 80, 3), range(6, 80, 4), range(7, 80, 5)])
def test_frames_lost_on_the_air_are_asked_for_again(
    field: UdpField, reader: FrontendReader, make_card: MakeCard, make_sale: MakeSale, lost: range
) -> None:
    ats, numbers = bytes.fromhex("05 72 80 80 00"), frozenset(lost)  # frames of 32 bytes: many blocks
    for radio in (Radio(ats=ats, lost_frames=numbers), Radio(ats=ats, lost_commands=numbers)):
        own = make_card()
        card = VirtualCard(own)
        field.insert(card, radio=radio)
        _, answer = pay(arrived(reader), make_sale())
        assert answer.kind is CryptogramKind.TC
        assert card.state.counter == own.counter + AMOUNT
        assert card.state.atc == 1  # the command that was repeated ran once
        field.remove()
        assert reader.wait_for_removal(PATIENCE_S)


@pytest.mark.parametrize(
    ("kind", "apdu_number"),
    [(FaultKind.REMOVE_BEFORE, 1), (FaultKind.REMOVE_AFTER, 3), (FaultKind.REMOVE_BEFORE, 6)],
)
def test_a_card_pulled_out_in_mid_dialogue(
    field: UdpField,
    reader: FrontendReader,
    card: VirtualCard,
    make_sale: MakeSale,
    kind: FaultKind,
    apdu_number: int,
) -> None:
    held = field.insert(card, faults=[Fault(kind, apdu_number=apdu_number)])
    channel = arrived(reader)
    with pytest.raises(CardLeft):
        pay(channel, make_sale())
    with pytest.raises(CardLeft):
        channel.transceive(SELECT)
    channel.close()
    assert not held.present
    assert reader.wait_for_removal(PATIENCE_S)
    field.insert(card)
    assert pay(arrived(reader), make_sale())[1].kind is CryptogramKind.TC


def test_a_tear_after_the_counter_moved_is_repaired_by_tapping_again(
    field: UdpField, reader: FrontendReader, make_card: MakeCard, make_sale: MakeSale
) -> None:
    own, sale = make_card(), make_sale()
    card = VirtualCard(own)
    field.insert(card, faults=[Fault(FaultKind.REMOVE_AFTER, instruction=INS_GENERATE_AC)])
    with pytest.raises(CardLeft):
        pay(arrived(reader), sale)
    moved = card.state
    assert moved.counter == own.counter + AMOUNT
    field.insert(card)
    _, answer = pay(arrived(reader), sale)
    assert answer.answer == moved.answers[0].answer
    assert card.state == moved


def test_a_slow_card_is_waited_for(
    field: UdpField, reader: FrontendReader, card: VirtualCard, make_sale: MakeSale
) -> None:
    field.insert(card, faults=[Fault(FaultKind.SLOW, instruction=INS_READ_RECORD, delay_s=0.5)])
    assert pay(arrived(reader), make_sale())[1].kind is CryptogramKind.TC


def test_a_card_that_asks_for_time_for_ever_is_let_go(
    field: UdpField, hasty_reader: FrontendReader, card: VirtualCard, make_sale: MakeSale
) -> None:
    field.insert(card, faults=[Fault(FaultKind.MUTE, instruction=INS_GENERATE_AC)])
    channel = arrived(hasty_reader)
    with pytest.raises(CardLeft, match="time a card may take"):
        pay(channel, make_sale())
    channel.close()
    field.remove()
    assert hasty_reader.wait_for_removal(PATIENCE_S)
    field.insert(card)
    assert pay(arrived(hasty_reader), make_sale())[1].kind is CryptogramKind.TC


def test_a_phone_that_wakes_slowly(
    field: UdpField, reader: FrontendReader, card: VirtualCard, make_sale: MakeSale
) -> None:
    field.insert(card, radio=Radio(deaf_to=5, random_uid=True))
    assert pay(arrived(reader), make_sale())[1].kind is CryptogramKind.TC


def test_two_cards_at_once_pay_once(
    field: UdpField, reader: FrontendReader, make_card: MakeCard, make_sale: MakeSale
) -> None:
    cards = [VirtualCard(make_card()) for _ in range(2)]
    for card in cards:
        field.insert(card)
    channel = arrived(reader)
    pay(channel, make_sale())
    channel.close()
    assert sorted(card.state.atc for card in cards) == [0, 1]
    assert not reader.wait_for_removal(0.0)


def test_a_phone_with_another_uid_at_every_look_is_one_card(
    field: UdpField, reader: FrontendReader, card: VirtualCard, make_sale: MakeSale
) -> None:
    field.insert(card, radio=Radio(random_uid=True))
    channel = arrived(reader)
    pay(channel, make_sale())
    channel.close()
    assert not reader.wait_for_removal(0.3)


def test_a_scheme_card_is_refused_and_not_read(
    field: UdpField, reader: FrontendReader, make_sale: MakeSale
) -> None:
    card = SchemeCard()
    held = field.insert(card)
    with pytest.raises(CardNotSupported):
        pay(arrived(reader), make_sale())
    assert (card.read_attempts, held.apdu_count) == (0, 2)


def test_an_interrupt_ends_a_wait(field: UdpField, reader: FrontendReader) -> None:
    threading.Timer(0.2, reader.interrupt).start()
    assert reader.wait_for_card(PATIENCE_S) is None
    reader.interrupt()
    assert reader.wait_for_card(PATIENCE_S) is None
    field.insert(BlankCard())
    threading.Timer(0.2, reader.interrupt).start()
    assert not reader.wait_for_removal(PATIENCE_S)


def test_a_reader_that_is_not_plugged_in() -> None:
    reader = FrontendReader("Sony RC-S380 at 1-1", lambda: None)
    with pytest.raises(ReaderUnavailable, match="not plugged in"):
        reader.wait_for_card(PATIENCE_S)
    reader.close()


def test_a_path_that_leads_nowhere() -> None:
    reader = FrontendReader("PN532", lambda: "tty:USB77:pn532")
    with pytest.raises(ReaderUnavailable):
        reader.wait_for_removal(PATIENCE_S)
    with pytest.raises(ReaderUnavailable):
        reader.chip()


@pytest.mark.parametrize("failure", [OSError(19, "No such device"), IndexError("inside"), AssertionError()])
def test_after_a_usb_reset_the_device_is_opened_anew(
    field: UdpField, card: VirtualCard, make_sale: MakeSale, failure: Exception
) -> None:
    cable = Cable()
    reader = FrontendReader("udp", lambda: field.path, open_device=cable.open)
    field.insert(card)
    channel = arrived(reader)
    cable.fail = failure
    with pytest.raises(ReaderUnavailable):
        pay(channel, make_sale())
    channel.close()
    for _ in range(2):
        with pytest.raises(ReaderUnavailable):
            reader.wait_for_card(PATIENCE_S)
    cable.fail = None
    assert pay(arrived(reader), make_sale())[1].kind is CryptogramKind.TC
    assert cable.opened == 2
    reader.close()


def test_a_device_that_hangs_is_left_behind(
    field: UdpField, card: VirtualCard, make_sale: MakeSale, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pos_gateway.gateway.readers.frontend._SLACK_S", 0.0)
    cable = Cable()
    reader = FrontendReader("udp", lambda: field.path, response_timeout_s=0.2, open_device=cable.open)
    field.insert(card)
    channel = arrived(reader)
    cable.jam.clear()
    with pytest.raises(ReaderUnavailable, match="hangs"):
        channel.transceive(SELECT)
    with pytest.raises(CardLeft):
        channel.transceive(SELECT)
    channel.close()
    cable.jam.set()
    assert pay(arrived(reader), make_sale())[1].kind is CryptogramKind.TC
    reader.close()


def test_one_that_hangs_does_not_hold_up_another(
    field: UdpField, reader: FrontendReader, card: VirtualCard, make_sale: MakeSale
) -> None:
    cable = Cable()
    hanging = FrontendReader("udp 2", lambda: field.path, open_device=cable.open)
    assert hanging.wait_for_card(0.0) is None
    cable.jam.clear()
    waiting = threading.Thread(target=hanging.wait_for_card, args=(0.0,))
    waiting.start()
    field.insert(card)
    assert pay(arrived(reader), make_sale())[1].kind is CryptogramKind.TC
    assert waiting.is_alive()
    cable.jam.set()
    waiting.join()
    hanging.close()


def test_card_data_never_reach_the_log(
    field: UdpField,
    reader: FrontendReader,
    make_card: MakeCard,
    make_sale: MakeSale,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = make_card()
    with caplog.at_level(logging.DEBUG):
        field.insert(VirtualCard(own))
        pay(arrived(reader), make_sale())
    assert own.pan not in caplog.text
    assert "106A" not in caplog.text


def test_a_dead_field_costs_a_second_a_look_and_ends(field: UdpField, reader: FrontendReader) -> None:
    assert reader.wait_for_card(0.0) is None
    field.unplug()
    assert reader.wait_for_card(0.0) is None  # nfcpy waits a second for an answer; it is bounded
    field.plug_in()
    field.insert(BlankCard())
    arrived(reader).close()


def test_the_state_of_a_card_survives_its_removal(
    field: UdpField, reader: FrontendReader, make_card: MakeCard, make_sale: MakeSale, tmp_path: Path
) -> None:
    own, state = make_card(), tmp_path / "state"
    for number in (1, 2):
        field.insert(VirtualCard(own, state_path=state))
        pay(arrived(reader), make_sale())
        field.remove()
        assert CardState.from_json(state.read_text()).counter == own.counter + number * AMOUNT
        assert reader.wait_for_removal(PATIENCE_S)
