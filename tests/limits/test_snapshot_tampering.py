"""Any byte changed on disk: refused, or every answer stays what it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from random import Random

import pytest

from pos_gateway.errors import AuthenticationFailed, InvalidSnapshot
from pos_gateway.limits.record import LimitRecord
from pos_gateway.limits.snapshot import PREFIX
from pos_gateway.limits.tree import (
    CELL_ENDS_AT,
    CELL_HASHES_AT,
    RECORDS_AT,
    SALT_BYTES,
    Bucket,
    Shape,
    bucket_hash,
    cell_hash,
    encode_bucket,
    encode_node,
    node_hash,
    record_root,
)
from tests.limits.making import (
    SIGNERS,
    built,
    node_over,
    one_bucket,
    opened,
    signed_over,
    signing_key,
    some_records,
    version,
)

REFUSALS = (InvalidSnapshot, AuthenticationFailed)


def flipped(data: bytes, at: int, mask: int) -> bytes:
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


@pytest.mark.parametrize("bucket_bits", [0, 2])
def test_every_byte_changed(bucket_bits: int) -> None:
    """Head and root: refused at opening. A bucket's index: its tokens are refused. A record: those of its
    cell are. All others keep their answers. Whole verification always finds it."""
    limits, shape, random = some_records(50), Shape(bucket_bits), Random(4)
    data = built(limits, bucket_bits=bucket_bits)
    buckets_at = len(data) - shape.body_bytes(50) + shape.tree_bytes
    answers: dict[bytes, LimitRecord | None] = {record.token_key: record for record in limits}
    for cell in range(8 << bucket_bits):
        answers[(cell << (29 - bucket_bits)).to_bytes(4, "big") + bytes(12)] = None
    for at in range(len(data)):
        changed = flipped(data, at, random.randrange(1, 256))
        if at < buckets_at:
            with pytest.raises(REFUSALS):
                opened(changed)
            continue
        snapshot, refused = opened(changed), set()
        for key, answer in answers.items():
            try:
                assert snapshot.lookup(key) == answer
            except REFUSALS:
                refused.add((shape.bucket_of(key), shape.cell_of(key)))
        assert len({bucket for bucket, _ in refused}) == 1, f"byte {at}"
        assert len(refused) in (1, 8), f"byte {at}"
        with pytest.raises(REFUSALS):
            list(snapshot.records())


@pytest.mark.parametrize("seed", [20_261_124])
def test_bytes_changed_in_a_tree_of_several_levels(seed: int) -> None:
    random, limits = Random(seed), some_records(50)
    data = built(limits, bucket_bits=8)
    for at in random.sample(range(len(data)), 400):
        changed = flipped(data, at, random.randrange(1, 256))
        with pytest.raises(REFUSALS):
            list(opened(changed).records())
        try:
            snapshot = opened(changed)
        except REFUSALS:
            continue
        for record in limits:
            with suppress(*REFUSALS):
                assert snapshot.lookup(record.token_key) == record


def test_steps_are_named() -> None:
    limits = some_records(50)
    data = built(limits, bucket_bits=8)
    root_at = len(data) - Shape(8).body_bytes(50)

    def step(at: int, use: Callable[[bytes], object]) -> str:
        with pytest.raises(AuthenticationFailed) as caught:
            use(flipped(data, at, 1))
        return caught.value.step

    assert step(root_at - 1, opened) == "snapshot signature"
    assert step(PREFIX.size + 40, opened) == "snapshot signature"
    assert step(root_at, opened) == "snapshot root"
    assert step(root_at + 2 * 36, lambda changed: list(opened(changed).records())) == "snapshot node"
    assert step(len(data) - 1, lambda changed: list(opened(changed).records())) == "snapshot bucket"


@pytest.mark.parametrize("keep", [0, 1, 15, 16, 100, 500, -1, -36])
def test_a_truncated_file(keep: int) -> None:
    with pytest.raises(InvalidSnapshot, match=r"ends after|file size"):
        opened(built(some_records(50))[:keep])


def test_appended_bytes() -> None:
    with pytest.raises(InvalidSnapshot, match="file size"):
        opened(built(some_records(50)) + b"\0")


def test_two_records_changed_for_each_other() -> None:
    limits = sorted(some_records(2))
    data = built(limits)
    swapped = data[:-72] + limits[1].to_bytes() + limits[0].to_bytes()
    with pytest.raises(AuthenticationFailed, match="snapshot bucket"):
        opened(swapped).lookup(limits[0].token_key)


def test_an_older_body_under_a_newer_head() -> None:
    old, new = built(some_records(5), terms=version(7)), built(some_records(5, seed=2), terms=version(8))
    mixed = new[: len(new) - Shape(0).body_bytes(5)] + old[len(old) - Shape(0).body_bytes(5) :]
    with pytest.raises(AuthenticationFailed, match="snapshot root"):
        opened(mixed)


def test_another_issuers_snapshot() -> None:
    strangers = {"limits-a": signing_key("stranger 1"), "limits-b": signing_key("stranger 2")}
    with pytest.raises(AuthenticationFailed, match="snapshot signature"):
        opened(built(some_records(5), signers=strangers))
    with pytest.raises(AuthenticationFailed, match="signed by 0 trusted keys"):
        opened(built(some_records(5), signers={"other": signing_key("stranger 1")}))


def test_the_same_signature_twice() -> None:
    data = built(some_records(5), signers={"limits-a": SIGNERS["limits-a"]})
    header_length = PREFIX.unpack_from(data)[3]
    entry = data[PREFIX.size + header_length :][:128]
    magic, form, _, _ = PREFIX.unpack_from(data)
    twice = (
        PREFIX.pack(magic, form, 2, header_length)
        + data[PREFIX.size : PREFIX.size + header_length]
        + entry
        + data[PREFIX.size + header_length :]
    )
    with pytest.raises(InvalidSnapshot, match="same key id twice"):
        opened(twice)


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, b"PGLIMITZ", "not a limit snapshot"),
        (8, b"\0\1", "format 1"),
        (10, b"\0\0", "0 signatures"),
        (10, b"\xff\xff", "65535 signatures"),
        (12, b"\0\0\0\0", "header of 0 bytes"),
        (12, b"\xff\xff\xff\xff", "header of 4294967295 bytes"),
    ],
)
def test_a_prefix_out_of_bounds(at: int, value: bytes, reason: str) -> None:
    data = built(some_records(5))
    with pytest.raises(InvalidSnapshot, match=reason):
        opened(data[:at] + value + data[at + len(value) :])


def test_counts_that_do_not_add_up() -> None:
    bucket = one_bucket(some_records(1)[0])
    with pytest.raises(InvalidSnapshot, match="do not add up"):
        opened(signed_over(encode_node([bucket.hash], [2]), 1, 0, bucket.data))


def test_counts_that_overflow() -> None:
    root_node = encode_node([bytes(32)] * 2, [(1 << 32) - 1] * 2)
    with pytest.raises(InvalidSnapshot, match="overflow"):
        opened(signed_over(root_node, 0, 1, bytes(2 * RECORDS_AT)))


@pytest.mark.parametrize("fault", ["order", "bucket", "status", "twice", "salt", "record root", "ends"])
def test_whole_verification_finds_what_an_issuer_signed_wrongly(fault: str) -> None:
    first, second = (record.to_bytes() for record in sorted(some_records(40))[::39])
    bodies = {
        "order": [b"", bytes([0xFF]) * 16 + second[16:] + second],
        "twice": [first + first, b""],
        "bucket": [second, b""],
        "status": [first[:32] + b"\x09" + first[33:], second],
    }.get(fault, [first, second])
    shape = Shape(1)
    buckets = [encode_bucket(shape, number, body) for number, body in enumerate(bodies)]
    data = bytearray(buckets[0].data)
    if fault == "salt":
        data[:SALT_BYTES] = bytes(SALT_BYTES)
        records = [first if cell == shape.cell_of(first) else b"" for cell in range(8)]
        for cell, body in enumerate(records):
            at = SALT_BYTES + CELL_HASHES_AT + 32 * cell
            data[at : at + 32] = cell_hash(bytes(SALT_BYTES), body)
    if fault == "record root":
        data[SALT_BYTES : SALT_BYTES + 32] = bytes(32)
    if fault == "ends":
        data[SALT_BYTES + CELL_ENDS_AT : RECORDS_AT] = bytes(32)
        for cell in range(8):
            at = SALT_BYTES + CELL_HASHES_AT + 32 * cell
            data[at : at + 32] = cell_hash(bytes(data[:SALT_BYTES]), b"")
    buckets[0] = Bucket(bytes(data), bucket_hash(bytes(data[SALT_BYTES:RECORDS_AT])), buckets[0].count)
    rest = b"".join(bucket.data for bucket in buckets)
    snapshot = opened(signed_over(node_over(*buckets), sum(b.count for b in buckets), 1, rest))
    with pytest.raises(InvalidSnapshot):
        list(snapshot.records())
    if fault == "ends":
        with pytest.raises(InvalidSnapshot, match="do not add up"):
            snapshot.bucket(0)


def test_hashes_of_different_kinds_never_meet() -> None:
    data = bytes(64)
    kinds = {
        bucket_hash(data),
        cell_hash(data, b""),
        node_hash(data),
        record_root(data[:36], data[:16]),
        hashlib.sha256(data).digest(),
    }
    assert len(kinds) == 5
