"""The block protocol, free of I/O: any card that follows the standard is understood, any other ends."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from pos_gateway.errors import CardLeft, InvalidCardData
from pos_gateway.gateway.readers.isodep import (
    FRAME_SIZES,
    Ats,
    BlockProtocol,
    Exchange,
    activate_a,
    activate_b,
    frame_wait_s,
)
from pos_gateway.lab.udp_card import Radio, UdpField, _Picc

TICK_S = 0.001

Result = TypeVar("Result")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Echo:
    """A card that answers each command with itself turned round."""

    def power_up(self) -> None:
        """Nothing to forget."""

    def process(self, command: bytes) -> bytes:
        return command[::-1] + b"\x90\x00"


def test_waits_are_those_of_the_standard() -> None:
    assert frame_wait_s(0) == pytest.approx(302e-6, rel=0.01)
    assert frame_wait_s(14) == pytest.approx(4.949, rel=0.01)
    assert frame_wait_s(15) == frame_wait_s(4)


def test_an_ats_without_interface_bytes_has_the_defaults() -> None:
    assert Ats.from_bytes(b"\x01") == Ats(32, frame_wait_s(4), b"")
    full = Ats.from_bytes(bytes.fromhex("0A7880700050 4F534757"))
    assert full == Ats(256, frame_wait_s(7), b"POSGW")
    assert Ats.from_bytes(bytes.fromhex("022F")[:1] + b"\x0f").frame_bytes == FRAME_SIZES[-1]


def test_type_b_is_activated_by_its_identifier() -> None:
    atqb = bytes.fromhex("50 01020304 00000000 80 81 70")
    dialogue = activate_b(atqb)
    frame, _ = next(dialogue)
    assert frame == bytes.fromhex("1D 01020304 00 08 01 00")
    with pytest.raises(StopIteration) as done:
        dialogue.send(b"\x00")
    assert done.value.value == Ats(256, frame_wait_s(7), b"")
    with pytest.raises(InvalidCardData):
        next(activate_b(atqb[:10]))
    with pytest.raises(InvalidCardData):
        next(activate_b(bytes.fromhex("50 01020304 00000000 80 80 70")))


@pytest.mark.parametrize(
    ("most", "rats"), [(1000, "E080"), (256, "E080"), (255, "E070"), (100, "E060"), (16, "E000"), (1, "E000")]
)
def test_a_reader_promises_no_longer_frames_than_it_can_receive(most: int, rats: str) -> None:
    assert next(activate_a(most))[0].hex().upper() == rats


@pytest.mark.parametrize("reader_bytes", [16, 64, 128])
def test_a_card_keeps_to_the_frames_a_reader_can_receive(reader_bytes: int) -> None:
    picc = _Picc(Echo(), [], Radio())
    protocol = BlockProtocol(run(activate_a(reader_bytes), picc), answer_wait_s=5)
    longest = 0

    def answer(frame: bytes, wait_s: float) -> bytes | None:
        nonlocal longest
        said = next(picc.answers(frame), None)
        longest = max(longest, len(said or b""))
        return said

    assert drive(protocol.exchange(bytes(200)), answer) == bytes(200) + b"\x90\x00"
    assert longest + 2 <= reader_bytes  # with its CRC


@pytest.mark.parametrize("fsci", range(9))
@pytest.mark.parametrize("length", [5, 13, 14, 61, 140, 250])
def test_long_commands_and_answers_are_chained(fsci: int, length: int) -> None:
    picc = _Picc(Echo(), [], Radio(ats=bytes([2, fsci])))
    assert run(activate_a(), picc) is not None
    protocol = BlockProtocol(Ats.from_bytes(bytes([2, fsci])), answer_wait_s=5)
    for number in range(3):
        command = bytes((number + n) % 256 for n in range(length))
        assert run(protocol.exchange(command), picc) == command[::-1] + b"\x90\x00"


def run(dialogue: Exchange[Result], picc: _Picc) -> Result:
    def answer(frame: bytes, wait_s: float) -> bytes | None:
        return next(picc.answers(frame), None)

    return drive(dialogue, answer)


def drive(dialogue: Exchange[Result], answer: Callable[[bytes, float], bytes | None]) -> Result:
    try:
        frame, wait_s = next(dialogue)
        while True:
            frame, wait_s = dialogue.send(answer(frame, wait_s))
    except StopIteration as finished:
        result: Result = finished.value
        return result


def replies(seed: int) -> Iterator[bytes | None]:
    """What a card that never read the standard says."""
    rng = random.Random(seed)
    blocks = [0x02, 0x03, 0x12, 0x13, 0xA2, 0xA3, 0xB2, 0xB3, 0xC2, 0xF2]
    while True:
        match rng.randrange(6):
            case 0:
                yield None
            case 1:
                yield b""
            case 2:
                yield rng.randbytes(rng.randrange(1, 256))
            case 3:
                yield bytes([0xF2, rng.randrange(256)])
            case _:
                yield bytes([rng.choice(blocks)]) + rng.randbytes(rng.choice([0, 1, 2, 5, 253]))


def test_a_card_that_talks_nonsense_comes_to_an_end(seed: int) -> None:
    """However it talks, an exchange ends: with an answer, or with one of two errors, within bounds."""
    for number in range(3000):
        clock, source = Clock(), replies(seed + number)
        frames: list[bytes] = []

        def answer(
            frame: bytes,
            wait_s: float,
            clock: Clock = clock,
            source: Iterator[bytes | None] = source,
            frames: list[bytes] = frames,
        ) -> bytes | None:
            frames.append(frame)
            assert 0 < wait_s <= 5.0
            said = next(source)
            clock.now += wait_s if said is None else TICK_S
            return said

        protocol = BlockProtocol(Ats(32, frame_wait_s(4), b""), answer_wait_s=5.0, now=clock)
        response = b""
        with contextlib.suppress(CardLeft, InvalidCardData):
            response = drive(protocol.exchange(bytes(40)), answer)
        assert len(response) <= 258
        assert len(frames) < 600
        assert clock.now <= 5.0 + TICK_S


@pytest.mark.parametrize("reply", [b"\xf2\x01", b"\xf2\x3b", None, b"\xa3", b"\xa2", b"\x13", b"\x12\x00"])
def test_a_card_that_repeats_itself_for_ever_comes_to_an_end(reply: bytes | None) -> None:
    clock = Clock()

    def answer(frame: bytes, wait_s: float) -> bytes | None:
        clock.now += wait_s if reply is None else TICK_S
        return reply

    protocol = BlockProtocol(Ats(256, frame_wait_s(14), b""), answer_wait_s=5.0, now=clock)
    with pytest.raises((CardLeft, InvalidCardData)):
        drive(protocol.exchange(bytes(5)), answer)
    assert clock.now <= 5.0 + TICK_S


@pytest.mark.parametrize("multiplier", [1, 10, 59])
def test_a_card_that_uses_all_the_time_it_asks_for_has_no_more_than_there_is(multiplier: int) -> None:
    clock = Clock()

    def answer(frame: bytes, wait_s: float) -> bytes | None:
        assert wait_s > 0
        clock.now += 0.99 * wait_s
        return bytes([0xF2, multiplier])

    protocol = BlockProtocol(Ats(256, frame_wait_s(10), b""), answer_wait_s=5.0, now=clock)
    with pytest.raises((CardLeft, InvalidCardData)):
        drive(protocol.exchange(bytes(5)), answer)
    assert clock.now <= 5.0


def test_a_field_can_be_closed_while_cards_are_in_it() -> None:
    field = UdpField()
    held = field.insert(Echo())
    field.close()
    assert not held.present
