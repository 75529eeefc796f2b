from __future__ import annotations

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.errors import InvalidInput, InvalidSnapshot
from pos_gateway.limits.record import MAX_U32, RECORD_BYTES, LimitRecord, Status, token_key

RECORD = LimitRecord(
    token_key=bytes(range(16)),
    ceiling=0x0102030405,
    per_tap_cap_minor=50_000,
    sequence=9,
    status=Status.BLOCKED,
    assurance=2,
    instalment_class=3,
)
ENCODED = bytes.fromhex("000102030405060708090a0b0c0d0e0f 0000000102030405 0000c350 00000009 02 02 03 00")

records = st.builds(
    LimitRecord,
    token_key=st.binary(min_size=16, max_size=16),
    ceiling=st.integers(0, (1 << 48) - 1),
    per_tap_cap_minor=st.integers(0, MAX_U32),
    sequence=st.integers(0, MAX_U32),
    status=st.sampled_from(Status),
    assurance=st.integers(0, 255),
    instalment_class=st.integers(0, 255),
)


def test_stands_on_disk_as_documented() -> None:
    assert RECORD.to_bytes() == ENCODED
    assert LimitRecord.from_bytes(ENCODED) == RECORD


@given(records)
def test_round_trip(record: LimitRecord) -> None:
    data = record.to_bytes()
    assert len(data) == RECORD_BYTES
    assert LimitRecord.from_bytes(data) == record


@given(st.binary(min_size=36, max_size=36))
def test_what_reads_writes_the_same_bytes(data: bytes) -> None:
    try:
        record = LimitRecord.from_bytes(data)
    except InvalidSnapshot:
        return
    assert record.to_bytes() == data


@pytest.mark.parametrize(
    ("at", "value", "where"),
    [(32, 0, "byte 32"), (32, 4, "byte 32"), (35, 1, "byte 35"), (17, 1, "byte 16")],
)
def test_bytes_without_meaning_are_refused(at: int, value: int, where: str) -> None:
    data = bytearray(ENCODED)
    data[at] = value
    with pytest.raises(InvalidSnapshot, match=where):
        LimitRecord.from_bytes(bytes(data))


@pytest.mark.parametrize("length", [0, 35, 37])
def test_wrong_length_is_refused(length: int) -> None:
    with pytest.raises(InvalidSnapshot, match="expected 36"):
        LimitRecord.from_bytes(bytes(length))


@pytest.mark.parametrize(
    "record",
    [
        RECORD._replace(token_key=bytes(15)),
        RECORD._replace(ceiling=1 << 48),
        RECORD._replace(ceiling=-1),
        RECORD._replace(per_tap_cap_minor=1 << 32),
        RECORD._replace(sequence=-1),
        RECORD._replace(assurance=256),
        RECORD._replace(status=0),  # type: ignore[arg-type]
    ],
)
def test_a_field_out_of_range_is_never_written(record: LimitRecord) -> None:
    with pytest.raises(InvalidInput):
        record.to_bytes()


def test_digest_is_bound_to_the_publication_and_to_every_byte() -> None:
    nonce = bytes(16)
    expected = hashlib.sha256(b"pos-gateway limit record 1\x00" + nonce + ENCODED).digest()[:16]
    assert RECORD.digest(nonce) == expected
    assert RECORD.digest(b"\1" * 16) != expected
    assert RECORD._replace(ceiling=RECORD.ceiling + 1).digest(nonce) != expected
    with pytest.raises(InvalidInput, match="nonce"):
        RECORD.digest(b"")


def test_token_key() -> None:
    secret = b"s" * 32
    expected = hmac.new(secret, b"pos-gateway token key 1\x009156000112345678/01", "sha256").digest()[:16]
    assert token_key(secret, "9156000112345678", 1) == expected


@pytest.mark.parametrize(
    ("secret", "pan", "psn", "where"),
    [
        (b"s" * 32, "915600011234567X", 1, "pan"),
        (b"s" * 32, "９１５６０００１１２３４５６７８", 1, "pan"),
        (b"s" * 32, "9156", 1, "pan"),
        (b"s" * 32, "9156000112345678", 100, "psn"),
        (b"s" * 15, "9156000112345678", 1, "secret"),
    ],
)
def test_token_key_refuses_nonsense_without_quoting_it(secret: bytes, pan: str, psn: int, where: str) -> None:
    with pytest.raises(InvalidInput, match=where) as caught:
        token_key(secret, pan, psn)
    assert pan not in str(caught.value)
