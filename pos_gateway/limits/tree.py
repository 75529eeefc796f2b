"""The bucket tree: where a record stands in a snapshot, and by which hashes it hangs on the root.

Records lie in 2^bits buckets by the top bits of their token key. Above the buckets stand nodes of up
to 128 children each, level 1 directly above the buckets, the root on the topmost level. A node is

    the children's hashes (32 bytes each) ‖ how many records lie below each child (u32 each)

and its own hash covers both, so the place of every bucket in the file follows from counts that are
verified on the way down, and "this token is not in the snapshot" is proven like a record is.

A bucket's hash covers its bytes with one SHA-256 (what a lookup verifies) and its record root: a
small tree over the single records, each blinded, through which one record can be proven without its
neighbours.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pos_gateway.errors import InvalidSnapshot
from pos_gateway.limits.header import HASH_BYTES, MAX_BUCKET_BITS
from pos_gateway.limits.record import MAX_U32, RECORD_BYTES

FAN_OUT_BITS: Final = 7
FAN_OUT: Final = 1 << FAN_OUT_BITS
GROUP: Final = 16
"""Children of a node of the record tree."""
MAX_AVERAGE_BUCKET_RECORDS: Final = 96
"""Most of a lookup's time is the SHA-256 over the bucket; most of a gateway's memory are the nodes above
the buckets. With 96, 100 million records have 2^20 buckets: 3.4 KB to hash, some 40 MB of nodes."""

_COUNT_BYTES: Final = 4
_NODE_DOMAIN: Final = b"pos-gateway snapshot node 1\0"
_BUCKET_DOMAIN: Final = b"pos-gateway snapshot bucket 1\0"
_RECORD_DOMAIN: Final = b"pos-gateway snapshot record 1\0"
_SALT_DOMAIN: Final = b"pos-gateway snapshot salt 1\0"
_BLIND_DOMAIN: Final = b"pos-gateway snapshot blind 1\0"
_GROUP_DOMAIN: Final = b"pos-gateway snapshot record group 1\0"

_sha256 = hashlib.sha256


def bucket_bits_for(count: int) -> int:
    """The fewest bits with which a bucket holds at most 96 records on average."""
    return min(max(0, -(-count // MAX_AVERAGE_BUCKET_RECORDS) - 1).bit_length(), MAX_BUCKET_BITS)


@dataclass(frozen=True, slots=True)
class Shape:
    """What follows from `bucket_bits` alone: levels, nodes, and where each node stands.

    Nodes are written from the root down, each level from left to right. Offsets count from the
    first byte after the head of the file.
    """

    bucket_bits: int

    @property
    def buckets(self) -> int:
        return 1 << self.bucket_bits

    @property
    def levels(self) -> int:
        return max(1, -(-self.bucket_bits // FAN_OUT_BITS))

    def nodes(self, level: int) -> int:
        """How many nodes stand on `level`."""
        return max(1, self.buckets >> (FAN_OUT_BITS * level))

    def children(self, level: int) -> int:
        """How many children each node on `level` has; fewer than 128 only at the root."""
        below = self.buckets if level == 1 else self.nodes(level - 1)
        return below // self.nodes(level)

    def node_bytes(self, level: int) -> int:
        return self.children(level) * (HASH_BYTES + _COUNT_BYTES)

    def node_offset(self, level: int, index: int) -> int:
        above = sum(self.nodes(high) * self.node_bytes(high) for high in range(level + 1, self.levels + 1))
        return above + index * self.node_bytes(level)

    @property
    def tree_bytes(self) -> int:
        return self.node_offset(1, self.nodes(1))

    def bucket_offset(self, bucket: int, records_before: int) -> int:
        return self.tree_bytes + bucket * HASH_BYTES + records_before * RECORD_BYTES

    def body_bytes(self, count: int) -> int:
        """Everything after the head of a file with `count` records."""
        return self.bucket_offset(self.buckets, count)

    def child_of(self, level: int, bucket: int) -> int:
        """Which child of its node on `level` leads to `bucket`."""
        return (bucket >> (FAN_OUT_BITS * (level - 1))) % self.children(level)

    def bucket_of(self, token_key: bytes) -> int:
        return int.from_bytes(token_key[:4], "big") >> (32 - self.bucket_bits)


def record_blind(records: bytes, place: int) -> bytes:
    """What hides the record at `place` from whoever sees its hash in a neighbour's proof but does not
    hold the whole bucket: without it, a guess of the record could be confirmed."""
    return _blind(_sha256(_SALT_DOMAIN + records).digest(), place)


def record_hash(record: bytes, blind: bytes) -> bytes:
    return _sha256(_RECORD_DOMAIN + blind + record).digest()


def record_hashes(records: bytes) -> list[bytes]:
    """The hash of each record of a whole bucket."""
    salt = _sha256(_SALT_DOMAIN + records).digest()
    return [
        record_hash(records[at : at + RECORD_BYTES], _blind(salt, place))
        for place, at in enumerate(range(0, len(records), RECORD_BYTES))
    ]


def _blind(salt: bytes, place: int) -> bytes:
    return _sha256(_BLIND_DOMAIN + salt + place.to_bytes(4, "big")).digest()


def group_hashes(hashes: Sequence[bytes]) -> list[bytes]:
    """One level up in the record tree: up to 16 hashes become one. None at all is one empty group."""
    return [
        _sha256(_GROUP_DOMAIN + b"".join(hashes[at : at + GROUP])).digest()
        for at in range(0, max(1, len(hashes)), GROUP)
    ]


def record_root(records: bytes) -> bytes:
    """The root over a bucket's records: grouped level by level, at least once, until one hash is left."""
    hashes = group_hashes(record_hashes(records))
    while len(hashes) > 1:
        hashes = group_hashes(hashes)
    return hashes[0]


def records_hash(records: bytes) -> bytes:
    """Over a bucket's records as they lie in the file."""
    return _sha256(records).digest()


def bucket_hash(hash_of_records: bytes, root: bytes) -> bytes:
    """From the bucket's `records_hash` and its record root."""
    return _sha256(_BUCKET_DOMAIN + hash_of_records + root).digest()


def node_hash(node: bytes) -> bytes:
    return _sha256(_NODE_DOMAIN + node).digest()


def encode_node(hashes: Sequence[bytes], counts: Sequence[int]) -> bytes:
    return b"".join(hashes) + struct.pack(f">{len(counts)}I", *counts)


def decode_node(node: bytes, children: int) -> tuple[bytes, tuple[int, ...]]:
    """The children's hashes, joined, and their counts.

    Raises:
        InvalidSnapshot: a wrong length, or more records than a snapshot may hold.
    """
    if len(node) != children * (HASH_BYTES + _COUNT_BYTES):
        raise InvalidSnapshot(f"{len(node)} bytes for {children} children", where="tree node")
    hashes = node[: children * HASH_BYTES]
    counts = struct.unpack_from(f">{children}I", node, len(hashes))
    if sum(counts) > MAX_U32:
        raise InvalidSnapshot("its counts overflow", where="tree node")
    return hashes, counts


def build_tree(shape: Shape, hashes: Sequence[bytes], counts: Sequence[int]) -> tuple[bytes, bytes]:
    """All nodes over the buckets' hashes and counts, as they stand in a file, and the root's hash."""
    levels: list[bytes] = []
    for level in range(1, shape.levels + 1):
        width = shape.children(level)
        starts = range(0, len(hashes), width)
        nodes = [encode_node(hashes[at : at + width], counts[at : at + width]) for at in starts]
        counts = [sum(counts[at : at + width]) for at in starts]
        hashes = [node_hash(node) for node in nodes]
        levels.append(b"".join(nodes))
    return b"".join(reversed(levels)), hashes[0]
