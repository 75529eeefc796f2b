"""Dialogues recorded from cards and readers, replayed as cards: what was understood once stays understood.

A file from `--hil-report FOLDER` becomes a regression test by being copied into `dialogues/`, with
`"ca_key"`, `"today"` and `"expect"` beside its exchanges; never one of a real customer's card.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from pos_gateway.emv import apdu, tlv
from pos_gateway.emv.apdu import CryptogramKind, Response
from pos_gateway.emv.application import AID
from pos_gateway.emv.authentication import CaPublicKey, authenticate_card, authenticate_cryptogram
from pos_gateway.emv.dialogue import converse, read_card, request_cryptogram
from pos_gateway.errors import PosGatewayError
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.scripted_card import Dialogue, ReplayedCard

FILES = sorted((Path(__file__).parent / "dialogues").glob("*.json"))
PROVEN = [f for f in FILES if '"expect": "authentic' in f.read_text()]


def recorded_elements(dialogue: Dialogue) -> dict[int, bytes]:
    """What the terminal filled into PDOL and CDOL1 then."""
    elements: dict[int, bytes] = {}
    pdol = cdol1 = b""
    for command, answer in dialogue.exchanges:
        data = Response.from_bytes(answer).data
        if command[1] == apdu.INS_SELECT and data:
            pdol = _find(data, 0x9F38) or pdol
        elif command[1] == apdu.INS_READ_RECORD:
            cdol1 = _find(data, 0x8C) or cdol1
        elif command[1] == apdu.INS_GET_PROCESSING_OPTIONS:
            elements |= tlv.split_dol(tlv.parse_dol(pdol), command[7 : 5 + command[4]])
        elif command[1] == apdu.INS_GENERATE_AC:
            elements |= tlv.split_dol(tlv.parse_dol(cdol1), command[5 : 5 + command[4]])
            break
    return elements


def _find(data: bytes, tag: int) -> bytes:
    todo = list(tlv.parse(data))
    while todo:
        found = todo.pop()
        if found.tag == tag:
            return found.value
        todo += found.children
    return b""


def replay(dialogue: Dialogue) -> str:
    """How the dialogue ends today: the kind of cryptogram, or what failed."""
    told: Mapping[str, Any] = dialogue.told
    key = told["ca_key"]
    capk = CaPublicKey(
        bytes.fromhex(key["rid"]), int(key["index"], 16), int(key["modulus"], 16), key["exponent"]
    )
    channel = DirectChannel(ReplayedCard(dialogue))
    elements = recorded_elements(dialogue)
    try:
        read = converse(read_card(elements, [AID]), channel.transceive)
        card = authenticate_card(read, [capk], date.fromisoformat(told["today"]))
        answer = converse(request_cryptogram(read, elements, CryptogramKind.TC), channel.transceive)
        cryptogram = authenticate_cryptogram(card, answer)
    except PosGatewayError as error:
        return f"{type(error).__name__}: {error.reason}"
    return f"{'authentic' if cryptogram.authentic else 'unsigned'} {cryptogram.kind.name}"


def test_there_are_recordings() -> None:
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recording_ends_as_it_did(file: Path) -> None:
    dialogue = Dialogue.from_json(file.read_text())
    assert replay(dialogue) == dialogue.told["expect"]


@pytest.mark.parametrize("file", PROVEN, ids=lambda file: file.stem)
def test_a_recording_that_was_touched_ends_otherwise(file: Path) -> None:
    dialogue = Dialogue.from_json(file.read_text())
    last_command, last = dialogue.exchanges[-1]
    changed = last[:40] + bytes([last[40] ^ 1]) + last[41:]
    touched = Dialogue((*dialogue.exchanges[:-1], (last_command, changed)), dialogue.told)
    assert replay(touched) != dialogue.told["expect"]
