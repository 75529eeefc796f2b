"""One record's proof: that it stands in a signed snapshot, checked with public keys alone.

    "PGLPROOF" ‖ head of the snapshot ‖ record (36) ‖ nodes from the root to the one above the bucket
    ‖ index of the bucket (320) ‖ place of the record in its bucket (u32) ‖ its blind (16)
    ‖ for each level of the record tree, the other hashes of its group (32 each)

Every length follows from what was verified before it. Beside the record it shows the header, how many
records lie in some buckets, and hashes: none that a guess of a neighbour's record could be tried on.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pos_gateway.errors import AuthenticationFailed, InvalidSnapshot, NotFound
from pos_gateway.limits.header import HASH_BYTES, SnapshotHeader
from pos_gateway.limits.record import RECORD_BYTES, TOKEN_KEY_BYTES, LimitRecord
from pos_gateway.limits.snapshot import ReadAt, Snapshot, read_exactly, read_head
from pos_gateway.limits.tree import (
    BLIND_BYTES,
    GROUP,
    INDEX_BYTES,
    RECORDS_AT,
    SALT_BYTES,
    Shape,
    bucket_hash,
    decode_node,
    group_hashes,
    node_hash,
    record_blinds,
    record_hash,
    record_hashes,
)

MAGIC: Final = b"PGLPROOF"
MAX_PROOF_BYTES: Final = 256 * 1024
"""More than any proof has: the head is at most 68 KiB, four levels of nodes 18 KiB."""
_PLACE: Final = struct.Struct(">I")


def prove(snapshot: Snapshot, token_key: bytes) -> bytes:
    """
    Raises:
        NotFound, AuthenticationFailed, InvalidSnapshot: see `proof_parts`.
    """
    return b"".join(proof_parts(snapshot, token_key))


def proof_parts(snapshot: Snapshot, token_key: bytes) -> list[bytes]:
    """The same in parts, for whoever keeps many proofs: most of what they consist of they share.

    Raises:
        NotFound: the snapshot has no record of this token.
        AuthenticationFailed, InvalidSnapshot: as `Snapshot.lookup`.
    """
    record = snapshot.lookup(token_key)
    if record is None:
        raise NotFound("this token has no record in the snapshot")
    bucket = Shape(snapshot.header.bucket_bits).bucket_of(token_key)
    data = snapshot.bucket(bucket).data
    salt, index, records = data[:SALT_BYTES], data[SALT_BYTES:RECORDS_AT], data[RECORDS_AT:]
    hashes = record_hashes(records, salt)
    place = [records[at : at + TOKEN_KEY_BYTES] for at in range(0, len(records), RECORD_BYTES)].index(
        token_key
    )
    parts = [MAGIC, snapshot.head, record.to_bytes(), *snapshot.path(bucket)]
    blinds = record_blinds(salt, len(hashes))
    parts += [index, _PLACE.pack(place), blinds[place * BLIND_BYTES : (place + 1) * BLIND_BYTES]]
    while True:
        first = place - place % GROUP
        parts += hashes[first:place] + hashes[place + 1 : first + GROUP]
        hashes, place = group_hashes(hashes), place // GROUP
        if len(hashes) == 1:
            return parts


def verify_proof(
    data: bytes, keys: Mapping[str, Ed25519PublicKey], threshold: int
) -> tuple[SnapshotHeader, LimitRecord]:
    """The proven record and the header it stands under.

    Raises:
        InvalidSnapshot: not a proof, truncated, or with something appended.
        AuthenticationFailed: step `snapshot signature`, `snapshot root`, `snapshot node`,
            `snapshot bucket` or `snapshot record`.
    """
    if len(data) > MAX_PROOF_BYTES:
        raise InvalidSnapshot(f"more than {MAX_PROOF_BYTES} bytes", where="proof")
    if not data.startswith(MAGIC):
        raise InvalidSnapshot("not a proof of a limit record", where="byte 0")
    head = read_head(_from(data, len(MAGIC)))
    header = head.verified(keys, threshold)
    shape = Shape(header.bucket_bits)
    rest = _Rest(data, len(MAGIC) + len(head.data))

    record = LimitRecord.from_bytes(rest.take(RECORD_BYTES, "record"))
    bucket = shape.bucket_of(record.token_key)
    expected, count = header.root, header.count
    for level in range(shape.levels, 0, -1):
        node = rest.take(shape.node_bytes(level), "tree node")
        if node_hash(node) != expected:
            step = "snapshot root" if level == shape.levels else "snapshot node"
            raise AuthenticationFailed(f"the node of level {level} is not the signed one", step=step)
        hashes, counts = decode_node(node, shape.children(level))
        if sum(counts) != count:
            raise InvalidSnapshot("its counts do not add up to what stands above", where="tree node")
        child = shape.child_of(level, bucket)
        expected, count = hashes[child * HASH_BYTES : (child + 1) * HASH_BYTES], counts[child]

    index = rest.take(INDEX_BYTES, "index of the bucket")
    if bucket_hash(index) != expected:
        raise AuthenticationFailed("the index of its bucket is not the signed one", step="snapshot bucket")
    (place,) = _PLACE.unpack(rest.take(_PLACE.size, "place"))
    if place >= count:
        raise InvalidSnapshot(f"place {place} in a bucket of {count}", where="place")
    proven = record_hash(record.to_bytes(), rest.take(BLIND_BYTES, "blind"))
    while True:
        first = place - place % GROUP
        group = [rest.take(HASH_BYTES, "group hash") for _ in range(min(GROUP, count - first) - 1)]
        group.insert(place - first, proven)
        (proven,) = group_hashes(group)
        count, place = -(-count // GROUP), place // GROUP
        if count == 1:
            break
    if proven != index[:HASH_BYTES]:
        raise AuthenticationFailed("the record is not the signed one", step="snapshot record")
    rest.end()
    return header, record


def _from(data: bytes, start: int) -> ReadAt:
    return lambda offset, length: data[start + offset : start + offset + length]


class _Rest:
    def __init__(self, data: bytes, at: int) -> None:
        self._read_at = _from(data, 0)
        self._length = len(data)
        self._at = at

    def take(self, length: int, what: str) -> bytes:
        data = read_exactly(self._read_at, self._at, length, what)
        self._at += length
        return data

    def end(self) -> None:
        if self._at != self._length:
            raise InvalidSnapshot(f"{self._length - self._at} bytes too many", where=f"byte {self._at}")
