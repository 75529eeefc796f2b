"""The test vectors of docs/card-application.md (`tests/vectors/card-application.json`): one card with keys
that anybody may know, what it is asked, and every byte it answers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pos_gateway.emv import tlv
from pos_gateway.emv.apdu import CDA_REQUESTED, Command, CryptogramKind, Response
from pos_gateway.emv.application import CDOL1, Iad, previous_digest
from pos_gateway.emv.cryptogram import _session_key, application_cryptogram, encipher_counter
from pos_gateway.emv.note import put_note_data
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.lab.virtual_card import VirtualCard

FILE = Path(__file__).parents[1] / "vectors" / "card-application.json"
VECTORS: dict[str, Any] = json.loads(FILE.read_text())


def b(name: str) -> bytes:
    return bytes.fromhex(VECTORS["values"][name])


@pytest.fixture
def own() -> Personalisation:
    return Personalisation.from_json(json.dumps(VECTORS["personalisation"]))


def test_the_card_answers_every_byte(own: Personalisation) -> None:
    """ICC dynamic numbers are the only thing a card chooses: here they are 01…01, 02…02 and so on."""
    numbers = iter(range(1, 256))
    card = VirtualCard(own, entropy=lambda count: bytes([next(numbers)]) * count)
    for session in VECTORS["sessions"]:
        card.power_up()
        for step in session["exchanges"]:
            answer = card.process(bytes.fromhex(step["command"]))
            assert answer.hex().upper() == step["answer"], (session["name"], step["command"][:8])


def test_the_steps_between(own: Personalisation) -> None:
    """The values that an applet's author compares with when a whole answer does not come out."""
    atc = int.from_bytes(b("ATC"), "big")
    values = b("CDOL1 values")
    assert len(values) == sum(entry.length for entry in tlv.parse_dol(CDOL1))
    assert _session_key(own.mk_ac, atc) == b("AC session key")
    covered = values + b("AIP") + b("ATC") + b("IAD")
    assert application_cryptogram(own.mk_ac, atc, covered) == b("AC")
    iad = Iad.from_bytes(b("IAD"))
    assert iad.counter_after == own.counter + int(b("amount").hex())
    assert previous_digest(values) == b("previous digest of the next TC")
    answer = b("answer without SDAD")
    hashed = hashlib.sha1(b("PDOL values") + values + answer, usedforsecurity=False).digest()
    assert hashed == b("transaction data hash")
    dynamic = b"\x08" + b("ICC dynamic number") + b"\x40" + b("AC") + hashed
    assert dynamic == b("ICC dynamic data")
    assert encipher_counter(own.mk_enc, atc + 1, iad.counter_after) == b("counter field of the ARQC")
    assert put_note_data(own.mk_ac, 1, b("note")) == b("PUT DATA of the note")


def test_every_kind_of_answer_is_there() -> None:
    kinds: set[str] = set()
    for session in VECTORS["sessions"]:
        for step in session["exchanges"]:
            command = Command.from_bytes(bytes.fromhex(step["command"]))
            if command.ins == 0xAE:
                elements = {o.tag: o.value for o in _inside(bytes.fromhex(step["answer"]))}
                kind = CryptogramKind(elements[0x9F27][0] & 0xC0)
                kinds.add(f"{CryptogramKind(command.p1 & ~CDA_REQUESTED).name}→{kind.name}")
    assert kinds == {"TC→TC", "TC→ARQC", "TC→AAC", "ARQC→ARQC"}


def _inside(answer: bytes) -> tuple[tlv.Tlv, ...]:
    return tlv.parse(Response.from_bytes(answer).data)[0].children
