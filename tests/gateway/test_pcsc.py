"""The PC/SC driver against a real pcscd with virtual cards: what customers and machines do to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import pytest

from pos_gateway.emv.apdu import INS_GENERATE_AC, INS_READ_RECORD, CryptogramKind
from pos_gateway.emv.application import AID, Sale
from pos_gateway.emv.authentication import CaPublicKey, authenticate_card, authenticate_cryptogram
from pos_gateway.emv.dialogue import CryptogramAnswer, converse, read_card, request_cryptogram
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.errors import CardLeft, CardNotSupported, ReaderUnavailable
from pos_gateway.gateway.readers.pcsc import PcscChannel, PcscReader, list_readers
from pos_gateway.gateway.readers.port import CardChannel, Indication, Reader
from pos_gateway.lab.card_state import CardState
from pos_gateway.lab.virtual_reader import ForeignCard, VirtualReader
from pos_gateway.lab.vpcd import Fault, FaultKind

TODAY = date(2026, 11, 24)
AMOUNT = 1930
PATIENCE_S = 10.0
"""Longer than anything here takes: no test measures time."""
SELECT = bytes.fromhex("00A4040007") + AID + b"\0"

MakeCard = Callable[..., Personalisation]
MakeSale = Callable[..., Sale]


@pytest.fixture
def reader(virtual_reader: VirtualReader) -> Iterator[PcscReader]:
    """The driver on the first slot."""
    reader = PcscReader(virtual_reader.names[0], response_timeout_s=PATIENCE_S)
    yield reader
    reader.close()


@pytest.fixture
def hasty_reader(virtual_reader: VirtualReader) -> Iterator[PcscReader]:
    """One that waits for nobody."""
    reader = PcscReader(virtual_reader.names[0], response_timeout_s=0.3)
    yield reader
    virtual_reader.remove()
    reader.close()


def arrived(reader: PcscReader) -> PcscChannel:
    channel = reader.wait_for_card(PATIENCE_S)
    assert channel is not None
    return channel


def pay(channel: CardChannel, sale: Sale) -> CryptogramAnswer:
    read = converse(read_card(sale.elements(), [AID]), channel.transceive)
    return converse(request_cryptogram(read, sale.elements(), CryptogramKind.TC), channel.transceive)


def state_of(virtual_reader: VirtualReader, slot: int = 0) -> CardState:
    status = virtual_reader.status(slot=slot)
    assert status is not None
    return CardState.from_json(json.dumps(status["state"]))


def test_it_is_a_reader(reader: PcscReader) -> None:
    port: Reader = reader
    for indication in Indication:
        port.indicate(indication)


def test_listing(virtual_reader: VirtualReader) -> None:
    assert sorted(list_readers()) == list(virtual_reader.names)


def test_a_whole_tap(
    virtual_reader: VirtualReader, reader: PcscReader, card_file: Path, make_sale: MakeSale, capk: CaPublicKey
) -> None:
    own = Personalisation.from_json(card_file.read_text())
    virtual_reader.insert(card_file)
    channel = arrived(reader)
    elements = make_sale().elements()
    read = converse(read_card(elements, [AID]), channel.transceive)
    card = authenticate_card(read, [capk], TODAY)
    answer = converse(request_cryptogram(read, elements, CryptogramKind.TC), channel.transceive)
    cryptogram = authenticate_cryptogram(card, answer)
    assert card.pan == own.pan
    assert cryptogram.iad.counter_after == own.counter + AMOUNT
    channel.close()
    virtual_reader.remove()
    assert reader.wait_for_removal(PATIENCE_S)


def test_an_empty_field_is_waited_for_and_no_longer(reader: PcscReader) -> None:
    assert reader.wait_for_card(0.0) is None
    assert reader.wait_for_card(0.1) is None
    assert reader.wait_for_removal(0.0)


def test_a_card_that_stays_can_be_opened_again(
    virtual_reader: VirtualReader, reader: PcscReader, card_file: Path, make_sale: MakeSale
) -> None:
    virtual_reader.insert(card_file)
    for _ in range(2):
        channel = arrived(reader)
        pay(channel, make_sale())
        channel.close()
        channel.close()
        assert not reader.wait_for_removal(0.0)
    with pytest.raises(CardLeft):
        channel.transceive(SELECT)


def test_a_card_that_leaves_as_it_is_closed_does_not_blind_the_reader(
    virtual_reader: VirtualReader, reader: PcscReader, card_file: Path, make_sale: MakeSale
) -> None:
    for _ in range(2):
        virtual_reader.insert(card_file)
        channel = arrived(reader)
        pay(channel, make_sale())
        virtual_reader.remove()
        channel.close()
        assert reader.wait_for_removal(PATIENCE_S)


def test_a_client_that_dies_with_a_card_in_hand_does_not_blind_the_reader(
    virtual_reader: VirtualReader, reader: PcscReader, card_file: Path, make_sale: MakeSale
) -> None:
    dying = PcscReader(virtual_reader.names[0])
    virtual_reader.insert(card_file)
    arrived(dying)
    virtual_reader.remove()
    dying.close()  # pcscd resets the card in its name, and there is none any more
    virtual_reader.insert(card_file)
    assert reader.wait_for_removal(PATIENCE_S)
    assert pay(arrived(reader), make_sale()).kind is CryptogramKind.TC


def test_an_interrupt_ends_a_wait(reader: PcscReader) -> None:
    timer = threading.Timer(0.2, reader.interrupt)
    timer.start()
    assert reader.wait_for_card(PATIENCE_S) is None
    timer.join()
    threading.Timer(0.2, reader.interrupt).start()
    assert reader.wait_for_card(PATIENCE_S) is None


def test_an_interrupt_before_a_wait_is_not_lost(reader: PcscReader) -> None:
    reader.interrupt()
    assert reader.wait_for_card(PATIENCE_S) is None


def test_an_interrupt_ends_a_wait_for_removal(virtual_reader: VirtualReader, reader: PcscReader) -> None:
    virtual_reader.insert(ForeignCard.BLANK)
    arrived(reader).close()
    threading.Timer(0.2, reader.interrupt).start()
    assert not reader.wait_for_removal(PATIENCE_S)


@pytest.mark.parametrize(
    ("kind", "apdu_number"),
    [(FaultKind.REMOVE_BEFORE, 1), (FaultKind.REMOVE_AFTER, 3), (FaultKind.REMOVE_BEFORE, 6)],
)
def test_a_card_pulled_out_in_mid_dialogue(
    virtual_reader: VirtualReader,
    reader: PcscReader,
    card_file: Path,
    make_sale: MakeSale,
    kind: FaultKind,
    apdu_number: int,
) -> None:
    virtual_reader.insert(card_file, faults=[Fault(kind, apdu_number=apdu_number)])
    channel = arrived(reader)
    with pytest.raises(CardLeft):
        pay(channel, make_sale())
    with pytest.raises(CardLeft):
        channel.transceive(SELECT)
    channel.close()
    assert reader.wait_for_removal(PATIENCE_S)
    virtual_reader.insert(card_file)
    assert pay(arrived(reader), make_sale()).kind is CryptogramKind.TC


def test_a_tear_after_the_counter_moved_is_repaired_by_tapping_again(
    virtual_reader: VirtualReader,
    reader: PcscReader,
    card_file: Path,
    tmp_path: Path,
    make_sale: MakeSale,
    capk: CaPublicKey,
) -> None:
    own, state, sale = Personalisation.from_json(card_file.read_text()), tmp_path / "state", make_sale()
    virtual_reader.insert(
        card_file, state=state, faults=[Fault(FaultKind.REMOVE_AFTER, instruction=INS_GENERATE_AC)]
    )
    torn = arrived(reader)
    with pytest.raises(CardLeft):
        pay(torn, sale)
    torn.close()
    moved = CardState.from_json(state.read_text())
    assert moved.counter == own.counter + AMOUNT
    assert reader.wait_for_removal(PATIENCE_S)

    virtual_reader.insert(card_file, state=state)
    channel = arrived(reader)
    read = converse(read_card(sale.elements(), [AID]), channel.transceive)
    answer = converse(request_cryptogram(read, sale.elements(), CryptogramKind.TC), channel.transceive)
    cryptogram = authenticate_cryptogram(authenticate_card(read, [capk], TODAY), answer)
    assert cryptogram.iad.counter_after == own.counter + AMOUNT
    assert moved.answers[0].answer == answer.answer
    assert state_of(virtual_reader) == moved


def test_a_scheme_card_is_refused_and_not_read(
    virtual_reader: VirtualReader, reader: PcscReader, make_sale: MakeSale
) -> None:
    virtual_reader.insert(ForeignCard.SCHEME)
    with pytest.raises(CardNotSupported):
        pay(arrived(reader), make_sale())
    status = virtual_reader.status()
    assert status is not None
    assert (status["read_attempts"], status["apdu_count"]) == (0, 2)


def test_a_slow_card_is_waited_for(
    virtual_reader: VirtualReader, reader: PcscReader, card_file: Path, make_sale: MakeSale
) -> None:
    fault = Fault(FaultKind.SLOW, instruction=INS_READ_RECORD, delay_s=0.5)
    virtual_reader.insert(card_file, faults=[fault])
    assert pay(arrived(reader), make_sale()).kind is CryptogramKind.TC


def test_a_mute_card_blocks_nobody_and_leaves_no_trace(
    virtual_reader: VirtualReader, hasty_reader: PcscReader, card_file: Path, make_sale: MakeSale
) -> None:
    virtual_reader.insert(card_file, faults=[Fault(FaultKind.MUTE, instruction=INS_GENERATE_AC)])
    channel = arrived(hasty_reader)
    with pytest.raises(ReaderUnavailable, match="no answer within"):
        pay(channel, make_sale())
    channel.close()
    with pytest.raises(ReaderUnavailable, match="mute"):
        hasty_reader.wait_for_card(PATIENCE_S)
    virtual_reader.remove()
    assert hasty_reader.wait_for_removal(PATIENCE_S)
    virtual_reader.insert(card_file)
    assert pay(arrived(hasty_reader), make_sale()).kind is CryptogramKind.TC


def test_a_mute_card_on_one_reader_does_not_disturb_the_other(
    virtual_reader: VirtualReader, hasty_reader: PcscReader, card_file: Path, make_sale: MakeSale
) -> None:
    virtual_reader.insert(card_file, faults=[Fault(FaultKind.MUTE, apdu_number=1)])
    virtual_reader.insert(card_file, slot=1)
    other = PcscReader(virtual_reader.names[1])
    with pytest.raises(ReaderUnavailable):
        arrived(hasty_reader).transceive(SELECT)
    assert pay(arrived(other), make_sale()).kind is CryptogramKind.TC
    other.close()


def test_two_readers_serve_two_cards_at_once(
    virtual_reader: VirtualReader, make_card: MakeCard, make_sale: MakeSale, tmp_path: Path
) -> None:
    taps, failures = 10, []
    cards = [make_card(), make_card()]
    for slot, card in enumerate(cards):
        path = tmp_path / f"card-{slot}.json"
        path.write_text(card.to_json())
        virtual_reader.insert(path, slot=slot)

    def serve(slot: int) -> None:
        reader = PcscReader(virtual_reader.names[slot])
        try:
            for _ in range(taps):
                channel = arrived(reader)
                read = converse(read_card(make_sale().elements(), [AID]), channel.transceive)
                assert read.pan == cards[slot].pan
                converse(
                    request_cryptogram(read, make_sale().elements(), CryptogramKind.TC), channel.transceive
                )
                channel.close()
        except Exception as error:  # noqa: BLE001 - shown by the test
            failures.append(error)
        finally:
            reader.close()

    threads = [threading.Thread(target=serve, args=(slot,)) for slot in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for slot, card in enumerate(cards):
        assert state_of(virtual_reader, slot).counter == card.counter + taps * AMOUNT


def test_a_dead_pcscd_is_named_and_found_again(
    virtual_reader: VirtualReader, reader: PcscReader, card_file: Path, make_sale: MakeSale
) -> None:
    virtual_reader.insert(card_file)
    channel = arrived(reader)
    virtual_reader.kill_pcscd()
    with pytest.raises(ReaderUnavailable, match="pcscd"):
        channel.transceive(SELECT)
    channel.close()
    with pytest.raises(ReaderUnavailable, match="doctor"):
        reader.wait_for_card(0.1)
    with pytest.raises(ReaderUnavailable, match="doctor"):
        reader.wait_for_removal(0.1)
    with pytest.raises(ReaderUnavailable, match="doctor"):
        list_readers()
    virtual_reader.start_pcscd()
    virtual_reader.insert(card_file)
    assert pay(arrived(reader), make_sale()).kind is CryptogramKind.TC


def test_pcscd_dying_ends_a_wait(virtual_reader: VirtualReader, reader: PcscReader) -> None:
    threading.Timer(0.2, virtual_reader.kill_pcscd).start()
    with pytest.raises(ReaderUnavailable, match="pcscd"):
        reader.wait_for_card(PATIENCE_S)
    virtual_reader.start_pcscd()


def test_a_frozen_pcscd_blocks_nobody(
    virtual_reader: VirtualReader, hasty_reader: PcscReader, card_file: Path, make_sale: MakeSale
) -> None:
    assert hasty_reader.wait_for_card(0.0) is None
    virtual_reader.freeze_pcscd()
    try:
        with pytest.raises(ReaderUnavailable, match="no answer within"):
            hasty_reader.wait_for_card(0.0)  # in a call on a context that stands
        with pytest.raises(ReaderUnavailable, match="no answer within"):
            hasty_reader.wait_for_card(0.0)  # in making one
        hasty_reader.interrupt()
        assert hasty_reader.wait_for_card(PATIENCE_S) is None
    finally:
        virtual_reader.thaw_pcscd()
    virtual_reader.insert(card_file)
    assert pay(arrived(hasty_reader), make_sale()).kind is CryptogramKind.TC


def test_an_unknown_reader(virtual_reader: VirtualReader) -> None:
    reader = PcscReader("no such reader")
    with pytest.raises(ReaderUnavailable, match="reader list"):
        reader.wait_for_card(PATIENCE_S)
    reader.close()


def test_a_card_in_other_hands(virtual_reader: VirtualReader, reader: PcscReader) -> None:
    virtual_reader.insert(ForeignCard.BLANK)
    other = PcscReader(virtual_reader.names[0])
    channel = arrived(other)
    with pytest.raises(ReaderUnavailable, match="another program"):
        reader.wait_for_card(PATIENCE_S)
    channel.close()
    other.close()
    arrived(reader).close()


def test_closing_twice_and_using_after(virtual_reader: VirtualReader) -> None:
    reader = PcscReader(virtual_reader.names[0])
    reader.close()
    reader.interrupt()
    assert reader.wait_for_card(0.0) is None
    assert reader.wait_for_card(0.0) is None
    reader.close()
    reader.close()
