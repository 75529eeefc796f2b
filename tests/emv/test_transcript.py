from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.authentication import authenticate_card, authenticate_cryptogram
from pos_gateway.emv.transcript import (
    StepStatus,
    Transcript,
    VerificationStep,
    authentic,
    verify_transcript,
)
from pos_gateway.errors import AuthenticationFailed, InvalidCardData, InvalidInput, InvalidMessage
from tests.emv.making import TODAY, ask, ca_key, read
from tests.emv.second_issuer import SecondIssuer

SECOND = SecondIssuer(ca_size=128, issuer_size=96, icc_size=64)
KEY = ca_key(SECOND)
STEPS = [
    "card data",
    "CA key",
    "issuer certificate",
    "ICC certificate",
    "static data",
    "expiry",
    "SDAD",
    "CID",
    "transaction data hash",
    "dynamic data",
    "application",
]


@cache
def whole(kind: CryptogramKind = CryptogramKind.TC) -> Transcript:
    card = SECOND.card()
    known = read(card)
    return Transcript.of(known, ask(card, known, kind), ca_key=replace(KEY, expires=None))


def statuses(steps: list[VerificationStep]) -> dict[str, str]:
    return {step.name: step.status.value for step in steps}


def first_failure(transcript: Transcript) -> str | None:
    return next((s.name for s in verify_transcript(transcript) if s.status is StepStatus.FAILED), None)


def test_a_whole_dialogue_of_ours_is_authentic() -> None:
    steps = verify_transcript(whole())
    assert [step.name for step in steps] == STEPS
    assert statuses(steps) == dict.fromkeys(STEPS, "ok") | {"dynamic data": "not_covered"}
    assert authentic(steps)
    assert "taken from the transcript itself" in steps[1].detail
    assert authentic(verify_transcript(whole(), [KEY], today=TODAY))


def test_keys_given_by_the_caller_are_the_only_ones_trusted() -> None:
    steps = statuses(verify_transcript(whole(), [replace(KEY, modulus=KEY.modulus + 2)]))
    assert steps["issuer certificate"] == "failed"
    steps = statuses(verify_transcript(whole(), [replace(KEY, index=9)]))
    assert steps["CA key"] == "failed"
    assert steps["issuer certificate"] == "not_covered"


def test_expiry_is_judged_for_the_day_given() -> None:
    steps = verify_transcript(whole(), today=date(2031, 1, 1))
    assert statuses(steps)["expiry"] == "failed"
    assert not authentic(steps)


def test_an_aac_proves_nothing() -> None:
    steps = verify_transcript(whole(CryptogramKind.AAC))
    assert statuses(steps)["SDAD"] == "not_covered"
    assert statuses(steps)["static data"] == "ok"
    assert not authentic(steps)


def test_both_forms_round_trip() -> None:
    transcript = whole()
    assert Transcript.from_json(transcript.to_json()) == transcript
    assert Transcript.from_bytes(transcript.to_bytes()) == replace(transcript, ca_key=None)


def test_the_binary_form_of_a_card_with_long_keys_is_small() -> None:
    second = SecondIssuer()
    card = second.card()
    known = read(card)
    assert len(Transcript.of(known, ask(card, known)).to_bytes()) < 1536


def test_a_proof_can_be_verified_from_its_bytes_alone() -> None:
    proof = Transcript.from_bytes(whole().to_bytes())
    card = authenticate_card(proof.card(), [KEY], TODAY)
    assert authenticate_cryptogram(card, proof.cryptogram_answer()).authentic


def hex_fields(raw: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    fields = [(raw, name) for name, value in raw.items() if name != "format" and isinstance(value, str)]
    fields += [(record, "data") for record in raw["records"]]
    fields += [(raw["ca_key"], name) for name in ("rid", "index", "modulus")]
    return fields


def test_a_change_to_any_byte_in_json_names_the_failing_step() -> None:
    raw = json.loads(whole().to_json())
    seen = set()
    for holder, name in hex_fields(raw):
        original = holder[name]
        for at in range(0, len(original), 2):
            holder[name] = original[:at] + f"{int(original[at : at + 2], 16) ^ 0x01:02X}" + original[at + 2 :]
            try:
                step = first_failure(Transcript.from_json(json.dumps(raw)))
            except InvalidMessage:
                step = "format"
            assert step is not None, f"{name}, byte {at // 2}"
            seen.add(step)
        holder[name] = original
    assert seen >= {
        "card data",
        "CA key",
        "issuer certificate",
        "ICC certificate",
        "static data",
        "SDAD",
        "transaction data hash",
        "application",
    }


def test_other_changes_in_json_are_noticed_too() -> None:
    changes: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
        ("issuer certificate", lambda raw: raw["ca_key"].update(exponent=65537)),
        ("card data", lambda raw: raw["records"].reverse()),
        ("card data", lambda raw: raw["records"].pop()),
        ("card data", lambda raw: raw["records"][0].update(authenticated=True)),
        ("card data", lambda raw: raw["records"][3].update(sfi=3)),
        ("SDAD", lambda raw: raw.update(unpredictable_number="00000000")),
        ("card data", lambda raw: raw.update(elements={"5A": "9156000112345680"})),
    ]
    for step, change in changes:
        raw = json.loads(whole().to_json())
        change(raw)
        assert first_failure(Transcript.from_json(json.dumps(raw))) == step


def test_a_signed_cryptogram_without_the_static_data_is_not_yet_authentic() -> None:
    raw = json.loads(whole().to_json())
    del raw["aip"], raw["aid"], raw["afl"]
    steps = verify_transcript(Transcript.from_json(json.dumps(raw)))
    assert statuses(steps)["transaction data hash"] == "ok"
    assert statuses(steps)["static data"] == "not_covered"
    assert "failed" not in statuses(steps).values()
    assert not authentic(steps)


def test_a_change_to_any_byte_of_a_proof_is_refused() -> None:
    proof = whole().to_bytes()
    for at in range(len(proof)):
        changed = proof[:at] + bytes([proof[at] ^ 0x01]) + proof[at + 1 :]
        with pytest.raises((InvalidInput, AuthenticationFailed)):
            read_proof(changed)


def read_proof(data: bytes) -> None:
    proof = Transcript.from_bytes(data)
    card = authenticate_card(proof.card(), [KEY], TODAY)
    authenticate_cryptogram(card, proof.cryptogram_answer())


@given(st.binary(max_size=120) | st.binary(max_size=120).map(lambda b: b"PGT1" + b))
def test_random_bytes_are_no_proof(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        Transcript.from_bytes(data).card()


def test_only_a_whole_dialogue_has_a_binary_form() -> None:
    for part in ("aid", "aip", "afl", "pdol_values", "cdol1_values", "answer"):
        missing: dict[str, Any] = {part: None}
        with pytest.raises(InvalidInput, match="complete"):
            replace(whole(), **missing).to_bytes()


@pytest.mark.parametrize(
    ("missing", "not_covered"),
    [
        ({"ca_key": None}, STEPS[1:]),
        ({"records": ()}, STEPS[2:]),
        ({"answer": None}, ["SDAD", "CID", "transaction data hash", "dynamic data"]),
        ({"pdol_values": None}, ["transaction data hash", "dynamic data"]),
        ({"cdol1_values": None}, ["expiry", "SDAD", "CID", "transaction data hash", "dynamic data"]),
        ({"aip": None}, ["static data", "dynamic data"]),
        ({"aid": None}, ["dynamic data", "application"]),
    ],
)
def test_a_partial_capture_is_checked_as_far_as_it_goes(
    missing: dict[str, Any], not_covered: list[str]
) -> None:
    transcript = replace(whole(), **missing)
    transcript = Transcript.from_json(transcript.to_json())
    steps = verify_transcript(transcript)
    # Our own data sheet wants the whole dialogue: a partial one of ours fails there, and says so.
    open_steps = [s.name for s in steps if s.status is StepStatus.NOT_COVERED and s.name != "application"]
    assert open_steps == [name for name in not_covered if name != "application"]
    assert [s.name for s in steps if s.status is StepStatus.FAILED] in ([], ["application"])
    assert all(s.detail for s in steps if s.status is StepStatus.NOT_COVERED)
    if missing.keys() & {"answer", "records", "pdol_values", "ca_key"}:
        assert not authentic(steps)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "transcript"),
        ("[" * 100_000, "transcript"),
        ("[]", "transcript"),
        ("{}", "format"),
        ('{"format": "other"}', "format"),
        ('{"format": "pos-gateway transcript 1", "aid": 5}', "aid"),
        ('{"format": "pos-gateway transcript 1", "aid": null}', "aid"),
        ('{"format": "pos-gateway transcript 1", "aid": "F0F"}', "aid"),
        ('{"format": "pos-gateway transcript 1", "aids": "F0"}', "aids"),
        ('{"format": "pos-gateway transcript 1", "records": {}}', "records"),
        ('{"format": "pos-gateway transcript 1", "records": [{}]}', r"records\[0\]"),
        (
            '{"format": "pos-gateway transcript 1", "records": '
            '[{"sfi": true, "record": 1, "authenticated": true, "data": ""}]}',
            r"records\[0\]",
        ),
        (
            '{"format": "pos-gateway transcript 1", "records": '
            '[{"sfi": 31, "record": 1, "authenticated": true, "data": ""}]}',
            r"records\[0\]",
        ),
        ('{"format": "pos-gateway transcript 1", "elements": []}', "elements"),
        ('{"format": "pos-gateway transcript 1", "elements": {"xx": "00"}}', "elements"),
        ('{"format": "pos-gateway transcript 1", "ca_key": {}}', "ca_key.rid"),
        (
            '{"format": "pos-gateway transcript 1", "ca_key": '
            '{"rid": "F0", "index": "01", "modulus": "C0", "exponent": 3}}',
            "ca_key",
        ),
        (
            '{"format": "pos-gateway transcript 1", "ca_key": '
            '{"rid": "F000000000", "index": "01", "modulus": "C0", "exponent": "3"}}',
            "ca_key",
        ),
    ],
)
def test_what_is_no_transcript_is_refused_with_the_field(text: str, where: str) -> None:
    with pytest.raises(InvalidMessage, match=where):
        Transcript.from_json(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("70025A00"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("aid", "aip", "afl", "records", "elements", "answer", "ca_key", "cdol1_values", "static_data")


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON | st.binary(max_size=12).map(bytes.hex), max_size=5))
def test_any_json_is_verified_or_refused(raw: dict[str, Any]) -> None:
    text = json.dumps({"format": "pos-gateway transcript 1"} | raw)
    try:
        transcript = Transcript.from_json(text)
    except InvalidMessage:
        return
    assert not authentic(verify_transcript(transcript))


def test_an_unreadable_record_covers_nothing_else() -> None:
    transcript = whole()
    records = (replace(transcript.records[0], data=b""), *transcript.records[1:])
    steps = statuses(verify_transcript(replace(transcript, records=records)))
    assert steps == dict.fromkeys(STEPS, "not_covered") | {"card data": "failed"}


def test_our_data_sheet_is_held_against_our_own_cards_only() -> None:
    """The same dialogue under another issuer's AID is checked without our CDOL1 and IAD."""
    with pytest.raises(InvalidCardData, match="application of ours"):
        replace(whole(), aid=bytes.fromhex("A0000000041010")).card()
    foreign = replace(
        whole(),
        aid=bytes.fromhex("A0000000041010"),
        ca_key=replace(KEY, rid=bytes.fromhex("A000000004"), expires=None),
    )
    steps = verify_transcript(foreign)
    assert statuses(steps)["application"] == "not_covered"
    assert authentic(steps)


def test_nothing_of_the_card_shows_in_a_repr() -> None:
    assert "9156000112345672" not in repr(whole())
