from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.emv import apdu
from pos_gateway.errors import InvalidCardData, InvalidInput

BYTE = st.integers(0, 255)


@given(BYTE, BYTE, BYTE, BYTE, st.binary(max_size=255), st.none() | st.integers(1, 256))
def test_commands_round_trip(cla: int, ins: int, p1: int, p2: int, data: bytes, le: int | None) -> None:
    command = apdu.Command(cla, ins, p1, p2, data, le)
    assert apdu.Command.from_bytes(command.to_bytes()) == command


@given(st.binary(max_size=300))
def test_random_bytes_are_a_command_or_refused(data: bytes) -> None:
    try:
        command = apdu.Command.from_bytes(data)
    except InvalidInput:
        return
    assert command.to_bytes() == data


@given(st.binary(max_size=256), st.integers(0, 0xFFFF))
def test_responses_round_trip(data: bytes, sw: int) -> None:
    response = apdu.Response(data, sw)
    assert apdu.Response.from_bytes(response.to_bytes()) == response


@pytest.mark.parametrize("data", [b"", b"\x90", bytes(259)])
def test_what_is_no_response_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidCardData, match="no response"):
        apdu.Response.from_bytes(data)


def test_commands_by_the_book() -> None:
    assert apdu.select(b"2PAY.SYS.DDF01").to_bytes().hex() == "00a404000e325041592e5359532e444446303100"
    assert apdu.get_processing_options(b"").to_bytes().hex() == "80a8000002830000"
    assert apdu.read_record(2, 1).to_bytes().hex() == "00b2011400"
    assert apdu.generate_ac(apdu.CryptogramKind.TC, b"\x01", cda=True).to_bytes().hex() == "80ae5000010100"
    assert apdu.generate_ac(apdu.CryptogramKind.ARQC, b"\x01", cda=True).to_bytes()[2] == 0x90
    assert apdu.generate_ac(apdu.CryptogramKind.AAC, b"\x01", cda=False).to_bytes()[2] == 0x00


def test_too_much_for_a_short_apdu_is_refused() -> None:
    with pytest.raises(InvalidInput):
        apdu.Command(0, 0, 0, 0, bytes(256)).to_bytes()
    with pytest.raises(InvalidInput):
        apdu.Command(0, 0, 0, 0, b"", 257).to_bytes()


def test_status_words_have_names() -> None:
    assert apdu.status_name(0x6985) == "6985 conditions of use not satisfied"
    assert apdu.status_name(0x6C10) == "6C10 wrong expected length"
    assert apdu.status_name(0x63C2) == "63C2 counter at 2"
    assert apdu.status_name(0x1234) == "1234 unknown status"
