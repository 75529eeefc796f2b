"""The virtual card at APDU level, without any reader: what it gives, what it refuses, what it remembers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pos_gateway.emv import apdu, tlv
from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.application import (
    AID,
    CDOL1,
    CDOL2,
    MAX_COUNTER,
    PPSE,
    TAG_CEILING,
    TAG_LIMIT_DIGEST,
    TAG_SALE_ID,
    Iad,
    Sale,
    counter_bytes,
    previous_digest,
)
from pos_gateway.emv.authentication import (
    CaPublicKey,
    Cryptogram,
    authenticate_card,
    authenticate_cryptogram,
)
from pos_gateway.emv.cryptogram import application_cryptogram, decipher_counter
from pos_gateway.emv.dialogue import (
    CardRead,
    CryptogramAnswer,
    converse,
    read_card,
    read_log,
    request_cryptogram,
    request_second_cryptogram,
    write_note,
)
from pos_gateway.emv.note import LogEntry, encode_log, parse_log, put_note_data
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.emv.transcript import Transcript, authentic, verify_transcript
from pos_gateway.errors import (
    AuthenticationFailed,
    CardNotSupported,
    InvalidCardData,
    InvalidInput,
    InvalidMessage,
)
from pos_gateway.lab.forged_card import with_another_chain, with_another_icc_key
from pos_gateway.lab.virtual_card import BlankCard, IccKey, SchemeCard, VirtualCard
from pos_gateway.ledger.keys import generate_rsa_key

TODAY = date(2026, 11, 24)
AMOUNT = 1930

MakeCard = Callable[..., Personalisation]
MakeSale = Callable[..., Sale]


def tap(
    card: VirtualCard, sale: Sale, kind: CryptogramKind = CryptogramKind.TC
) -> tuple[CardRead, CryptogramAnswer]:
    card.power_up()
    read = converse(read_card(sale.elements(), [AID]), card.process)
    return read, converse(request_cryptogram(read, sale.elements(), kind), card.process)


def authenticated(capk: CaPublicKey, read: CardRead, answer: CryptogramAnswer) -> Cryptogram:
    return authenticate_cryptogram(authenticate_card(read, [capk], TODAY), answer)


def test_a_tap_gives_an_authentic_tc_and_moves_the_counter(
    make_card: MakeCard, make_sale: MakeSale, capk: CaPublicKey
) -> None:
    own = make_card()
    card = VirtualCard(own)
    read, answer = tap(card, make_sale())
    assert read.pan == own.pan
    cryptogram = authenticated(capk, read, answer)
    assert cryptogram.kind is CryptogramKind.TC
    assert cryptogram.iad.counter_after == own.counter + AMOUNT == card.state.counter
    assert [(e.terminal, e.amount_minor, e.counter) for e in card.state.log] == [
        ("TILL0001", AMOUNT, own.counter + AMOUNT)
    ]


def test_the_tc_is_made_with_the_card_s_own_key(
    make_card: MakeCard, make_sale: MakeSale, capk: CaPublicKey
) -> None:
    own = make_card()
    read, answer = tap(VirtualCard(own), make_sale())
    cryptogram = authenticated(capk, read, answer)
    atc = answer.elements[0x9F36]
    data = answer.cdol1_values + read.aip + atc + answer.elements[0x9F10]
    assert application_cryptogram(own.mk_ac, int.from_bytes(atc, "big"), data) == cryptogram.ac


def test_on_device_verification_is_told_in_aip_and_signed_cvr(
    make_card: MakeCard, make_sale: MakeSale, capk: CaPublicKey
) -> None:
    for verified in (False, True):
        read, answer = tap(VirtualCard(make_card(holder_verified_on_device=verified)), make_sale())
        assert read.device_can_verify_holder is verified
        assert authenticated(capk, read, answer).iad.holder_verified_on_device is verified


def test_each_tc_points_to_the_one_before(
    make_card: MakeCard, make_sale: MakeSale, capk: CaPublicKey
) -> None:
    card = VirtualCard(make_card())
    _, first = tap(card, make_sale())
    tap(card, make_sale(), CryptogramKind.ARQC)
    read, second = tap(card, make_sale())
    assert authenticated(capk, read, second).iad.previous_digest == previous_digest(first.cdol1_values)
    assert int.from_bytes(second.elements[0x9F36], "big") == 3


@pytest.mark.parametrize(
    ("profile", "sale"),
    [
        pytest.param({}, {"amount_minor": 0}, id="no amount"),
        pytest.param({}, {"currency_numeric": 978}, id="foreign currency"),
        pytest.param({"per_tap_cap_minor": AMOUNT - 1}, {}, id="over the per-tap cap"),
        pytest.param({"cumulative_cap_minor": AMOUNT - 1}, {}, id="over the cumulative cap"),
        pytest.param({"tc_rate_limit": 0}, {}, id="over the rate limit"),
        pytest.param({"start_counter": MAX_COUNTER - AMOUNT + 1}, {}, id="counter would run over"),
    ],
)
def test_refusals(
    make_card: MakeCard, make_sale: MakeSale, profile: dict[str, Any], sale: dict[str, Any]
) -> None:
    own = make_card(**profile)
    card = VirtualCard(own)
    _, answer = tap(card, make_sale(**sale))
    assert answer.kind is CryptogramKind.AAC
    assert 0x9F4B not in answer.elements
    assert card.state.counter == own.counter
    assert card.state.log == ()


@pytest.mark.parametrize(
    "profile",
    [
        {"per_tap_cap_minor": AMOUNT},
        {"cumulative_cap_minor": AMOUNT},
        {"tc_rate_limit": 1},
        {"start_counter": MAX_COUNTER - AMOUNT},
    ],
)
def test_each_bound_itself_is_still_allowed(
    make_card: MakeCard, make_sale: MakeSale, profile: dict[str, Any]
) -> None:
    assert tap(VirtualCard(make_card(**profile)), make_sale())[1].kind is CryptogramKind.TC


def test_an_amount_for_others_is_refused(make_card: MakeCard, make_sale: MakeSale) -> None:
    card = VirtualCard(make_card())
    elements = make_sale().elements()
    elements[0x9F03] = bytes.fromhex("000000000001")
    read = converse(read_card(elements, [AID]), card.process)
    answer = converse(request_cryptogram(read, elements, CryptogramKind.TC), card.process)
    assert answer.kind is CryptogramKind.AAC


def test_the_cumulative_cap_counts_all_taps(make_card: MakeCard, make_sale: MakeSale) -> None:
    card = VirtualCard(make_card(cumulative_cap_minor=2 * AMOUNT))
    kinds = [tap(card, make_sale())[1].kind for _ in range(3)]
    assert kinds == [CryptogramKind.TC, CryptogramKind.TC, CryptogramKind.AAC]


def test_the_rate_limit_is_per_day_and_days_never_go_back(make_card: MakeCard, make_sale: MakeSale) -> None:
    card = VirtualCard(make_card(tc_rate_limit=1))

    def on(day: int) -> CryptogramKind:
        return tap(card, make_sale(at=datetime(2026, 11, day, 9, tzinfo=UTC)))[1].kind

    assert [on(24), on(24), on(23), on(25), on(24)] == [
        CryptogramKind.TC,
        CryptogramKind.AAC,
        CryptogramKind.AAC,
        CryptogramKind.TC,
        CryptogramKind.AAC,
    ]


def test_the_card_itself_compares_with_the_ceiling(
    make_card: MakeCard, make_sale: MakeSale, capk: CaPublicKey
) -> None:
    own = make_card()
    card = VirtualCard(own)
    read, answer = tap(card, make_sale(ceiling=own.counter + AMOUNT - 1))
    cryptogram = authenticated(capk, read, answer)
    assert cryptogram.kind is CryptogramKind.ARQC
    assert card.state.counter == own.counter
    atc = int.from_bytes(answer.elements[0x9F36], "big")
    assert decipher_counter(own.mk_enc, atc, cryptogram.iad.counter_field) == own.counter
    _, granted = tap(card, make_sale(ceiling=own.counter + AMOUNT))
    assert granted.kind is CryptogramKind.TC


def test_asking_for_less_never_gives_more(make_card: MakeCard, make_sale: MakeSale) -> None:
    own = make_card()
    card = VirtualCard(own)
    assert tap(card, make_sale(), CryptogramKind.ARQC)[1].kind is CryptogramKind.ARQC
    assert tap(card, make_sale(), CryptogramKind.AAC)[1].kind is CryptogramKind.AAC
    assert card.state.counter == own.counter


def test_no_counter_is_readable_in_clear_but_in_a_tc(make_card: MakeCard, make_sale: MakeSale) -> None:
    own = make_card()
    card = VirtualCard(own)
    said = b""

    def listen(command: bytes) -> bytes:
        nonlocal said
        answer = card.process(command)
        said += answer
        return answer

    for kind in (CryptogramKind.ARQC, CryptogramKind.AAC):
        sale = make_sale()
        read = converse(read_card(sale.elements(), [AID]), listen)
        converse(request_cryptogram(read, sale.elements(), kind), listen)
    assert counter_bytes(own.counter) not in said


def test_the_same_question_gets_the_same_answer_and_moves_the_counter_once(
    make_card: MakeCard, make_sale: MakeSale, tmp_path: Path
) -> None:
    own, path = make_card(), tmp_path / "state"
    sale = make_sale()
    _, first = tap(VirtualCard(own, state_path=path), sale)
    _, between = tap(VirtualCard(own, state_path=path), make_sale())
    card = VirtualCard(own, state_path=path)
    _, again = tap(card, sale)
    assert again.answer == first.answer != between.answer
    assert card.state.counter == own.counter + 2 * AMOUNT
    assert card.state.atc == 2


@pytest.mark.parametrize("change", [{"terminal_id": "TILL0002"}, {"unpredictable_number": b"other"[:4]}])
def test_another_terminal_or_number_is_another_question(
    make_card: MakeCard, make_sale: MakeSale, change: dict[str, Any]
) -> None:
    own = make_card()
    card = VirtualCard(own)
    sale = make_sale()
    _, first = tap(card, sale)
    _, second = tap(card, replace(sale, **change))
    assert first.answer != second.answer
    assert card.state.counter == own.counter + 2 * AMOUNT


def test_a_raised_ceiling_turns_an_arqc_into_a_tc_for_the_same_question(
    make_card: MakeCard, make_sale: MakeSale
) -> None:
    own = make_card()
    card = VirtualCard(own)
    sale = make_sale(ceiling=own.counter)
    assert tap(card, sale)[1].kind is CryptogramKind.ARQC
    assert tap(card, replace(sale, ceiling=own.counter + AMOUNT))[1].kind is CryptogramKind.TC


def second_tap(
    card: VirtualCard, sale: Sale, granted: Sale
) -> tuple[CardRead, CryptogramAnswer, CryptogramAnswer]:
    """A tap whose ARQC is followed by a second GENERATE AC."""
    read, first = tap(card, sale)
    assert first.kind is CryptogramKind.ARQC
    again = converse(request_second_cryptogram(read, first, granted.elements()), card.process)
    return read, first, again


def test_a_second_generate_ac_pays_the_same_sale_with_the_new_ceiling(
    make_card: MakeCard, make_sale: MakeSale, capk: CaPublicKey
) -> None:
    own = make_card()
    card = VirtualCard(own)
    sale = make_sale(ceiling=own.counter)
    granted = replace(sale, ceiling=own.counter + AMOUNT, limit_digest=b"\x0f" * 16)
    read, first, second = second_tap(card, sale, granted)
    assert first.elements[0x9F36] == second.elements[0x9F36]
    cryptogram = authenticated(capk, read, second)
    assert cryptogram.kind is CryptogramKind.TC
    assert cryptogram.iad.counter_after == own.counter + AMOUNT == card.state.counter
    assert cryptogram.bound[TAG_CEILING] == counter_bytes(own.counter + AMOUNT)
    assert cryptogram.bound[TAG_LIMIT_DIGEST] == b"\x0f" * 16
    assert cryptogram.bound[TAG_SALE_ID] == sale.sale_id
    atc = second.elements[0x9F36]
    data = second.cdol1_values + second.cdol2_values + read.aip + atc + second.elements[0x9F10]
    assert application_cryptogram(own.mk_ac, cryptogram.atc, data) == cryptogram.ac
    # Without the values of CDOL2, or with others, it proves nothing.
    for values in (b"", second.cdol2_values[:-5] + b"\0" + second.cdol2_values[-4:]):
        with pytest.raises(AuthenticationFailed, match="transaction data hash"):
            authenticated(capk, read, replace(second, cdol2_values=values))
    transcript = Transcript.of(read, second, ca_key=capk)
    for copy in (Transcript.from_bytes(transcript.to_bytes()), Transcript.from_json(transcript.to_json())):
        assert copy.cdol2_values == second.cdol2_values
        assert authentic(verify_transcript(replace(copy, ca_key=capk)))
    assert len(transcript.to_bytes()) < 1536


def test_a_second_generate_ac_whose_ceiling_is_too_low_again_is_refused(
    make_card: MakeCard, make_sale: MakeSale
) -> None:
    own = make_card()
    card = VirtualCard(own)
    sale = make_sale(ceiling=own.counter)
    _, _, second = second_tap(card, sale, replace(sale, ceiling=own.counter + AMOUNT - 1))
    assert second.kind is CryptogramKind.AAC
    assert card.state.counter == own.counter


def test_a_tap_torn_after_the_second_generate_ac_gets_the_same_answer_again(
    make_card: MakeCard, make_sale: MakeSale, tmp_path: Path
) -> None:
    own, path = make_card(), tmp_path / "state"
    sale = make_sale(ceiling=own.counter)
    granted = replace(sale, ceiling=own.counter + AMOUNT)
    _, _, second = second_tap(VirtualCard(own, state_path=path), sale, granted)
    card = VirtualCard(own, state_path=path)
    _, again = tap(card, sale)
    assert again.answer == second.answer
    assert card.state.counter == own.counter + AMOUNT


@pytest.mark.parametrize(
    ("p1", "values", "sw"),
    [
        (0x50, "other number", 0x6A80),
        (0x50, "cdol1", 0x6700),
        (0x90, "cdol2", 0x6A86),
        (0x40, "cdol2", 0x6A86),
    ],
)
def test_a_second_generate_ac_must_be_one(
    make_card: MakeCard, make_sale: MakeSale, p1: int, values: str, sw: int
) -> None:
    own = make_card()
    card = VirtualCard(own)
    sale = make_sale(ceiling=own.counter)
    _, first = tap(card, sale)
    elements = replace(sale, ceiling=MAX_COUNTER).elements()
    if values == "other number":
        elements[0x9F37] = b"none"
    data = first.cdol1_values if values == "cdol1" else tlv.fill_dol(tlv.parse_dol(CDOL2), elements)
    command = apdu.Command(0x80, apdu.INS_GENERATE_AC, p1, 0, data, 256).to_bytes()
    assert card.process(command).hex() == f"{sw:04x}"
    assert card.state.counter == own.counter


def test_a_second_generate_ac_follows_an_arqc_in_the_same_session_only(
    make_card: MakeCard, make_sale: MakeSale
) -> None:
    own = make_card()
    card = VirtualCard(own)
    second = apdu.generate_ac(
        CryptogramKind.TC,
        tlv.fill_dol(tlv.parse_dol(CDOL2), make_sale().elements()),
        cda=True,
    ).to_bytes()
    tap(card, make_sale(ceiling=own.counter))
    card.power_up()
    assert card.process(second).hex() == "6985"
    tap(card, make_sale())
    assert card.process(second).hex() == "6985"
    # An ARQC that was asked for is an inquiry: nothing follows it.
    tap(card, make_sale(), CryptogramKind.ARQC)
    assert card.process(second).hex() == "6985"


def note_of(card: VirtualCard, make_sale: MakeSale) -> bytes | None:
    card.power_up()
    return converse(read_card(make_sale().elements(), [AID]), card.process).note


def test_a_note_is_taken_with_the_issuer_s_mac_and_a_higher_sequence_only(
    make_card: MakeCard, make_sale: MakeSale, tmp_path: Path
) -> None:
    own, path = make_card(), tmp_path / "state"
    card = VirtualCard(own, state_path=path)
    assert note_of(card, make_sale) is None
    tap(card, make_sale())
    converse(write_note(put_note_data(own.mk_ac, 5, b"n" * 178)), card.process)
    assert note_of(VirtualCard(own, state_path=path), make_sale) == b"n" * 178
    card = VirtualCard(own, state_path=path)
    tap(card, make_sale())
    good = put_note_data(own.mk_ac, 6, b"new")
    for data, word in (
        (put_note_data(own.mk_ac, 5, b"same"), "6985"),
        (put_note_data(own.mk_ac, 4, b"older"), "6985"),
        (put_note_data(own.mk_enc, 6, b"new"), "6982"),
        (good[:3] + bytes([good[3] ^ 1]) + good[4:], "6982"),
        (good[:8], "6700"),
    ):
        with pytest.raises(InvalidCardData, match=word):
            converse(write_note(data), card.process)
        assert card.state.note == b"n" * 178
    converse(write_note(good), card.process)
    assert note_of(card, make_sale) == b"new"
    assert card.state.note_sequence == 6


def test_a_note_that_cannot_be_kept_is_not_taken(
    make_card: MakeCard, make_sale: MakeSale, tmp_path: Path
) -> None:
    own, folder = make_card(), tmp_path / "card"
    folder.mkdir()
    card = VirtualCard(own, state_path=folder / "state")
    tap(card, make_sale())
    shutil.rmtree(folder)
    with pytest.raises(OSError, match="state"):
        converse(write_note(put_note_data(own.mk_ac, 1, b"new")), card.process)
    assert card.state.note == b""


def test_the_log_is_told_after_a_tc_alone(make_card: MakeCard, make_sale: MakeSale) -> None:
    own = make_card()
    card = VirtualCard(own)
    tap(card, make_sale())
    tap(card, make_sale(terminal_id="T2"))
    entries = converse(read_log(), card.process)
    assert entries == (
        LogEntry("TILL0001", AMOUNT, own.counter + AMOUNT),
        LogEntry("T2", AMOUNT, own.counter + 2 * AMOUNT),
    )
    tap(card, make_sale(), CryptogramKind.ARQC)
    with pytest.raises(InvalidCardData, match="6985"):
        converse(read_log(), card.process)


@given(
    st.lists(
        st.builds(
            LogEntry,
            terminal=st.text("ABT0123456789", max_size=8),
            amount_minor=st.integers(0, 10**12 - 1),
            counter=st.integers(0, MAX_COUNTER),
        ),
        max_size=20,
    )
)
def test_a_log_comes_back_as_far_as_it_fits(entries: list[LogEntry]) -> None:
    assert parse_log(encode_log(entries)) == tuple(entries[-12:])


def test_the_state_is_on_disk_before_the_answer_leaves(
    make_card: MakeCard, make_sale: MakeSale, tmp_path: Path
) -> None:
    own, path = make_card(), tmp_path / "state"
    card = VirtualCard(own, state_path=path)
    tap(card, make_sale())
    assert VirtualCard(own, state_path=path).state == card.state
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_card_that_cannot_remember_gives_no_answer(
    make_card: MakeCard, make_sale: MakeSale, tmp_path: Path
) -> None:
    own = make_card()
    card = VirtualCard(own, state_path=tmp_path / "missing" / "state")
    with pytest.raises(OSError, match="missing"):
        tap(card, make_sale())
    assert card.state.counter == own.counter


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"counter": 1}', '{"counter": "x", "answers": 3}'])
def test_a_damaged_state_file_is_named(make_card: MakeCard, tmp_path: Path, text: str) -> None:
    path = tmp_path / "state"
    path.write_text(text)
    with pytest.raises(InvalidMessage, match="card state file"):
        VirtualCard(make_card(), state_path=path)


SELECT = apdu.select(AID).to_bytes()
GPO = apdu.get_processing_options(bytes(29)).to_bytes()
RECORD = apdu.read_record(1, 1).to_bytes()


@pytest.mark.parametrize(
    ("before", "command", "sw"),
    [
        ([], "00A404000E 315041592E5359532E4444463031 00", 0x6A82),
        ([], "00A4040007 F0504F53475702 00", 0x6A82),
        ([], "00A4000007 F0504F53475701 00", 0x6A86),
        ([], "00A4040207 F0504F53475701 00", 0x6A86),
        ([], "00A40400", 0x6700),
        ([], "00A404", 0x6700),
        ([], "00A4040007 F0504F534757", 0x6700),
        ([], "", 0x6700),
        ([], "00B0000000", 0x6D00),
        ([], "80CB9F3600", 0x6D00),
        ([], "80CA9F3600", 0x6A88),
        ([], "80CADF1400", 0x6985),
        ([SELECT, GPO], "80CADF1400", 0x6985),
        ([], "84DA9F3600", 0x6A88),
        ([], "80DADF0110" + "00" * 16, 0x6E00),
        ([SELECT, GPO], "84DADF0110" + "00" * 16, 0x6985),
        ([], "90A4040007 F0504F53475701 00", 0x6E00),
        ([], "80A4040007 F0504F53475701 00", 0x6E00),
        ([], "00A8000002830000", 0x6E00),
        ([], GPO.hex(), 0x6985),
        ([], RECORD.hex(), 0x6985),
        ([], "80AE500000", 0x6985),
        ([SELECT], RECORD.hex(), 0x6985),
        ([SELECT], "80AE500000", 0x6985),
        ([SELECT], "80A800000283 0000", 0x6700),
        ([SELECT], GPO.hex().replace("831d", "841d"), 0x6A80),
        ([SELECT], GPO.hex().replace("80a80000", "80a80100"), 0x6A86),
        ([SELECT, GPO], GPO.hex(), 0x6985),
        ([SELECT, GPO], "00B2020C00", 0x9000),
        ([SELECT, GPO], "00B2030C00", 0x6A83),
        ([SELECT, GPO], "00B2021400", 0x6A83),
        ([SELECT, GPO], "00B2011C00", 0x6A82),
        ([SELECT, GPO], "00B2000C00", 0x6A86),
        ([SELECT, GPO], "00B2010800", 0x6A86),
        ([SELECT, GPO], "00B2010C01FF", 0x6700),
        ([SELECT, GPO], "80AE500000", 0x6700),
        ([SELECT, GPO], "80AEC00000", 0x6A86),
        ([SELECT, GPO], "80AE510000", 0x6A86),
        ([SELECT, GPO], "80AE500100", 0x6A86),
    ],
)
def test_status_words(make_card: MakeCard, before: list[bytes], command: str, sw: int) -> None:
    card = VirtualCard(make_card())
    card.power_up()
    for earlier in before:
        assert card.process(earlier)[-2:] == b"\x90\x00"
    assert card.process(bytes.fromhex(command))[-2:].hex() == f"{sw:04x}"


def test_generate_ac_works_once_a_session(make_card: MakeCard, make_sale: MakeSale) -> None:
    card = VirtualCard(make_card())
    _, answer = tap(card, make_sale())
    again = apdu.generate_ac(CryptogramKind.TC, answer.cdol1_values, cda=True).to_bytes()
    assert card.process(again).hex() == "6985"
    assert card.process(RECORD).hex() == "6985"


def test_power_ends_a_session(make_card: MakeCard) -> None:
    card = VirtualCard(make_card())
    card.process(SELECT)
    card.power_up()
    assert card.process(GPO).hex() == "6985"


def test_nothing_an_issuer_acts_on_goes_out_unsigned(make_card: MakeCard, make_sale: MakeSale) -> None:
    own = make_card()
    card = VirtualCard(own)
    values = tlv.fill_dol(tlv.parse_dol(CDOL1), make_sale().elements())
    for kind in (CryptogramKind.TC, CryptogramKind.ARQC):
        for earlier in (SELECT, GPO):
            card.process(earlier)
        assert card.process(apdu.generate_ac(kind, values, cda=False).to_bytes()).hex() == "6a86"
    assert card.state.counter == own.counter
    assert card.state.atc == 0


def test_no_decimal_digits_in_a_numeric_value(make_card: MakeCard, make_sale: MakeSale) -> None:
    card = VirtualCard(make_card())
    elements = make_sale().elements()
    elements[0x9F02] = b"\xff" * 6
    values = tlv.fill_dol(tlv.parse_dol(CDOL1), elements)
    card.process(SELECT)
    card.process(GPO)
    assert card.process(apdu.generate_ac(CryptogramKind.TC, values, cda=True).to_bytes()).hex() == "6a80"


def test_a_used_up_atc_ends_the_card(make_card: MakeCard) -> None:
    card = VirtualCard(make_card())
    card.state = replace(card.state, atc=0xFFFF)
    card.process(SELECT)
    assert card.process(GPO).hex() == "6985"


@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([SELECT, GPO, RECORD])), max_size=8))
@settings(max_examples=200, deadline=None)
def test_any_bytes_get_a_status_word(shared_card: VirtualCard, commands: list[bytes]) -> None:
    for command in commands:
        assert len(shared_card.process(command)) >= 2


@pytest.fixture(scope="module")
def shared_card(make_card: MakeCard) -> VirtualCard:
    return VirtualCard(make_card())


def test_a_long_icc_modulus_is_refused(make_card: MakeCard) -> None:
    numbers = generate_rsa_key(1648).private_numbers()
    own = replace(make_card(), icc_prime_p=numbers.p, icc_prime_q=numbers.q)
    with pytest.raises(InvalidInput, match="ICC modulus"):
        VirtualCard(own)


def test_the_longest_icc_modulus_fits_one_answer(make_card: MakeCard, make_sale: MakeSale) -> None:
    numbers = generate_rsa_key(1640).private_numbers()
    own = replace(make_card(), icc_prime_p=numbers.p, icc_prime_q=numbers.q)
    assert IccKey.of(own).size == 205
    _, answer = tap(VirtualCard(own), make_sale())
    assert len(answer.answer) <= 256


def test_a_forged_key_fails_at_the_signature(
    make_card: MakeCard, make_sale: MakeSale, capk: CaPublicKey
) -> None:
    read, answer = tap(VirtualCard(with_another_icc_key(make_card())), make_sale())
    card = authenticate_card(read, [capk], TODAY)
    with pytest.raises(AuthenticationFailed) as failure:
        authenticate_cryptogram(card, answer)
    assert failure.value.step == "SDAD"


def test_a_forged_chain_fails_at_the_issuer_certificate(
    make_card: MakeCard, make_sale: MakeSale, capk: CaPublicKey
) -> None:
    read, _ = tap(VirtualCard(with_another_chain(make_card())), make_sale())
    with pytest.raises(AuthenticationFailed) as failure:
        authenticate_card(read, [capk], TODAY)
    assert failure.value.step == "issuer certificate"


def test_a_scheme_card_is_known_by_its_aid_and_not_read(make_sale: MakeSale) -> None:
    card = SchemeCard()
    with pytest.raises(CardNotSupported) as refusal:
        converse(read_card(make_sale().elements(), [AID]), card.process)
    assert refusal.value.scheme == "Visa"
    assert card.read_attempts == 0
    card.process(RECORD)
    card.process(apdu.select(bytes.fromhex("A0000000031010")).to_bytes())
    assert card.read_attempts == 2


def test_a_blank_card_is_not_supported(make_sale: MakeSale) -> None:
    with pytest.raises(CardNotSupported):
        converse(read_card(make_sale().elements(), [AID]), BlankCard().process)


def test_our_card_lists_itself_in_the_directory(make_card: MakeCard) -> None:
    answer = VirtualCard(make_card()).process(apdu.select(PPSE).to_bytes())
    assert answer.endswith(b"\x90\x00")
    assert tlv.encode(0x4F, AID) in answer


def test_an_aac_tells_nothing_of_the_counter_but_to_its_issuer(
    make_card: MakeCard, make_sale: MakeSale
) -> None:
    own = make_card()
    _, answer = tap(VirtualCard(own), make_sale(amount_minor=0))
    iad = Iad.from_bytes(answer.elements[0x9F10])
    assert decipher_counter(own.mk_enc, 1, iad.counter_field) == own.counter
