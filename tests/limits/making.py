"""Small snapshots with fixed keys and fixed inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from random import Random
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pos_gateway.limits.builder import build_snapshot
from pos_gateway.limits.header import OnlineTerms, sign_header
from pos_gateway.limits.record import LimitRecord, Status
from pos_gateway.limits.snapshot import (
    ReadAt,
    RiskPolicy,
    Snapshot,
    SnapshotHeader,
    SnapshotTerms,
    encode_head,
)
from pos_gateway.limits.tree import Bucket, Shape, encode_bucket, encode_node, node_hash


def signing_key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"test key {name}".encode()).digest())


SIGNERS: Final = {name: signing_key(name) for name in ("limits-a", "limits-b")}
KEYS: Final = {name: key.public_key() for name, key in SIGNERS.items()}

ONLINE_SIGNER: Final = Ed25519PrivateKey.from_private_bytes(b"\x04" * 32)

TERMS: Final = SnapshotTerms(
    issuer="Laboratory Bank",
    currency="CNY",
    version=7,
    nonce=bytes(range(16)),
    valid_from_unix_s=1_790_000_000,
    refresh_after_unix_s=1_790_086_400,
    valid_until_unix_s=1_790_259_200,
    token_key_epoch=3,
    policy=RiskPolicy(
        stale_per_tap_cap_minor=10_000, presentment_deadline_s=14 * 86_400, clock_tolerance_s=300
    ),
    online=OnlineTerms(
        keys=(ONLINE_SIGNER.public_key().public_bytes_raw(),),
        per_tap_cap_minor=30_000,
        grant_life_s=300,
        note_life_s=86_400,
        unsynchronised_amount_cap_minor=5_000_000,
    ),
    revoked_certificates=((bytes.fromhex("91560001"), bytes.fromhex("00002a")),),
)


def some_records(count: int, *, seed: int = 1) -> list[LimitRecord]:
    random = Random(seed)
    return [
        LimitRecord(
            token_key=random.randbytes(16),
            ceiling=random.randrange(1 << 48),
            per_tap_cap_minor=random.randrange(1 << 32),
            sequence=random.randrange(1 << 32),
            status=random.choice(list(Status)),
            assurance=random.randrange(256),
            instalment_class=random.randrange(256),
        )
        for _ in range(count)
    ]


def built(
    records: Iterable[LimitRecord],
    *,
    terms: SnapshotTerms = TERMS,
    signers: Mapping[str, Ed25519PrivateKey] = SIGNERS,
    bucket_bits: int | None = None,
) -> bytes:
    parts: list[bytes] = []
    build_snapshot(parts.append, records, terms, signers, bucket_bits=bucket_bits)
    return b"".join(parts)


def reader(data: bytes) -> ReadAt:
    return lambda offset, length: data[offset : offset + length]


def opened(data: bytes, *, keys: Mapping[str, Ed25519PublicKey] = KEYS, threshold: int = 2) -> Snapshot:
    return Snapshot.open(reader(data), len(data), keys, threshold)


def version(number: int) -> SnapshotTerms:
    return replace(TERMS, version=number)


def one_bucket(*records: LimitRecord) -> Bucket:
    return encode_bucket(Shape(0), 0, b"".join(record.to_bytes() for record in records))


def node_over(*buckets: Bucket) -> bytes:
    return encode_node([bucket.hash for bucket in buckets], [bucket.count for bucket in buckets])


def signed_over(root_node: bytes, count: int, bucket_bits: int, rest: bytes) -> bytes:
    """A file as a careless or malicious issuer could sign it."""
    header = SnapshotHeader(
        **{field.name: getattr(TERMS, field.name) for field in fields(SnapshotTerms)},
        count=count,
        bucket_bits=bucket_bits,
        root=node_hash(root_node),
    ).to_bytes()
    signatures = {key_id: sign_header(header, key) for key_id, key in SIGNERS.items()}
    return encode_head(header, signatures) + root_node + rest
