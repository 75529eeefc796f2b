"""Grants and notes: one signed limit record that stands by itself."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.emv.application import MAX_COUNTER
from pos_gateway.errors import AuthenticationFailed, InvalidSnapshot, PosGatewayError
from pos_gateway.limits.header import OnlineTerms
from pos_gateway.limits.record import LimitRecord, Status
from pos_gateway.limits.single import (
    ANY_TERMINAL,
    SINGLE_BYTES,
    Kind,
    SingleLimit,
    online_key_id,
    read_single,
    why_not,
)
from tests.limits.making import ONLINE_SIGNER, TERMS

ISSUED = TERMS.valid_from_unix_s + 100
RECORD = LimitRecord(bytes(range(16)), 1_000_000, 30_000, 7, Status.ACTIVE, 2, 1)
GRANT = SingleLimit(
    kind=Kind.GRANT,
    record=RECORD,
    nonce=b"\x07" * 16,
    issued_unix_s=ISSUED,
    valid_until_unix_s=ISSUED + 300,
    terminal_id="T0000001",
)
NOTE = replace(GRANT, kind=Kind.NOTE, terminal_id=ANY_TERMINAL, valid_until_unix_s=ISSUED + 86_400)


@pytest.mark.parametrize("single", [GRANT, NOTE, replace(GRANT, terminal_id="T1")])
def test_round_trip(single: SingleLimit) -> None:
    data = single.sign(ONLINE_SIGNER)
    assert len(data) == SINGLE_BYTES
    read = read_single(data, TERMS)
    assert read == single
    assert read.digest == RECORD.digest(single.nonce)


@given(
    key=st.binary(min_size=16, max_size=16),
    ceiling=st.integers(0, MAX_COUNTER),
    sequence=st.integers(0, (1 << 32) - 1),
    status=st.sampled_from(Status),
    nonce=st.binary(min_size=16, max_size=16),
    life_s=st.integers(0, 300),
)
def test_any_record_comes_back(
    key: bytes, ceiling: int, sequence: int, status: Status, nonce: bytes, life_s: int
) -> None:
    single = replace(
        GRANT,
        record=LimitRecord(key, ceiling, 1, sequence, status),
        nonce=nonce,
        valid_until_unix_s=ISSUED + life_s,
    )
    assert read_single(single.sign(ONLINE_SIGNER), TERMS) == single


@pytest.mark.parametrize("single", [GRANT, NOTE], ids=["grant", "note"])
def test_every_changed_byte_is_refused(single: SingleLimit) -> None:
    data = single.sign(ONLINE_SIGNER)
    for at in range(len(data)):
        for change in (0x01, 0x80):
            changed = data[:at] + bytes([data[at] ^ change]) + data[at + 1 :]
            with pytest.raises((AuthenticationFailed, InvalidSnapshot)):
                read_single(changed, TERMS)


def test_a_second_reader_agrees() -> None:
    """Straight down the table at the head of the module."""
    data = GRANT.sign(ONLINE_SIGNER)
    public = ONLINE_SIGNER.public_key().public_bytes_raw()
    assert data[:2] == b"\x01\x01"
    assert data[2:38] == RECORD.to_bytes()
    assert data[38:54] == GRANT.nonce
    assert struct.unpack(">QQ", data[54:70]) == (ISSUED, ISSUED + 300)
    assert data[70:78] == b"T0000001"
    assert data[78:86] == hashlib.sha256(public).digest()[:8]
    Ed25519PublicKey.from_public_bytes(public).verify(data[86:], b"pos-gateway single limit 1\0" + data[:86])


@pytest.mark.parametrize("length", [0, 1, SINGLE_BYTES - 1, SINGLE_BYTES + 1, 256])
def test_another_length_is_refused(length: int) -> None:
    with pytest.raises(InvalidSnapshot):
        read_single(GRANT.sign(ONLINE_SIGNER).ljust(length, b"\0")[:length], TERMS)


@given(st.binary(min_size=SINGLE_BYTES, max_size=SINGLE_BYTES))
def test_any_bytes_raise_ours(data: bytes) -> None:
    with pytest.raises(PosGatewayError):
        read_single(data, TERMS)


def test_only_keys_of_the_header_count() -> None:
    stranger = Ed25519PrivateKey.from_private_bytes(b"\x09" * 32)
    for data, terms in (
        (GRANT.sign(stranger), TERMS),
        (GRANT.sign(ONLINE_SIGNER), replace(TERMS, online=OnlineTerms())),
    ):
        with pytest.raises(AuthenticationFailed) as caught:
            read_single(data, terms)
        assert caught.value.step == "online key"
    # A stranger who names our key.
    forged = bytearray(GRANT.sign(stranger))
    forged[78:86] = online_key_id(ONLINE_SIGNER.public_key().public_bytes_raw())
    with pytest.raises(AuthenticationFailed) as caught:
        read_single(bytes(forged), TERMS)
    assert caught.value.step == "single limit signature"


@pytest.mark.parametrize(("single", "longest_s"), [(GRANT, 300), (NOTE, 86_400)])
def test_a_life_beyond_the_header_s_is_refused(single: SingleLimit, longest_s: int) -> None:
    until = single.issued_unix_s + longest_s
    read_single(replace(single, valid_until_unix_s=until).sign(ONLINE_SIGNER), TERMS)
    with pytest.raises(AuthenticationFailed) as caught:
        read_single(replace(single, valid_until_unix_s=until + 1).sign(ONLINE_SIGNER), TERMS)
    assert caught.value.step == "single limit life"


@pytest.mark.parametrize(
    "changes",
    [
        {"nonce": b"short"},
        {"valid_until_unix_s": ISSUED - 1},
        {"issued_unix_s": -1},
        {"terminal_id": ""},
        {"terminal_id": "T00000001"},
        {"terminal_id": "T1 "},
        {"terminal_id": "T\n"},
        {"terminal_id": "柜台"},
        {"kind": Kind.NOTE},
    ],
)
def test_what_cannot_be_said_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidSnapshot):
        replace(GRANT, **changes)


@pytest.mark.parametrize(
    ("single", "changes", "why"),
    [
        (GRANT, {}, None),
        (NOTE, {"terminal_id": "T0000002"}, None),
        (GRANT, {"terminal_id": "T0000002"}, "another terminal"),
        (GRANT, {"token_key": bytes(16)}, "another token"),
        (GRANT, {"now_unix_s": ISSUED + 299}, None),
        (GRANT, {"now_unix_s": ISSUED + 300}, "expired"),
        (GRANT, {"now_unix_s": ISSUED - 60}, None),
        (GRANT, {"now_unix_s": ISSUED - 61}, "not valid yet"),
    ],
)
def test_where_and_when_it_counts(single: SingleLimit, changes: dict[str, Any], why: str | None) -> None:
    asked = {
        "token_key": RECORD.token_key,
        "terminal_id": "T0000001",
        "now_unix_s": ISSUED,
        "clock_tolerance_s": 60,
    }
    found = why_not(single, **{**asked, **changes})
    assert (found is None) if why is None else (found is not None and why in found)


def test_a_snapshot_digest_is_never_a_single_s() -> None:
    """Nonces part them: the same record, another digest."""
    assert GRANT.digest != RECORD.digest(TERMS.nonce)


def test_terms_hold_their_bounds() -> None:
    key = bytes(32)
    for changes in ({"keys": (key, key)}, {"keys": (b"x",)}, {"grant_life_s": -1}, {"note_life_s": 1 << 32}):
        with pytest.raises(InvalidSnapshot):
            OnlineTerms(**changes)
