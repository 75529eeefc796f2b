"""The bucket tree: where a record stands in a snapshot, and by which hashes it hangs on the root.

Records lie in 2^bits buckets by the top bits of their token key. Above the buckets stand nodes of up
to 128 children each, level 1 directly above the buckets, the root on the topmost level. A node is

    the children's hashes (32 bytes each) ‖ how many records lie below each child (u32 each)

and its own hash covers both, so the place of every bucket in the file follows from counts that are
verified on the way down, and "this token is not in the snapshot" is proven like a record is.

A bucket is what one lookup reads: an index, which its node names by hash, over 8 cells by the next 3
bits of the token key. A lookup hashes the index and the one cell that it needs, not the whole bucket.

    salt (16) ‖ record root (32) ‖ the cells' hashes (32 each) ‖ where each cell ends (u32 each) ‖ records

The record root is that of a small tree over the single records, each blinded, through which one record
can be proven without its neighbours. Why it is so: docs/decisions/0002-snapshot-layout.md.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pos_gateway.errors import InvalidSnapshot
from pos_gateway.limits.header import HASH_BYTES, MAX_BUCKET_BITS
from pos_gateway.limits.record import MAX_U32, RECORD_BYTES, TOKEN_KEY_BYTES

FAN_OUT_BITS: Final = 7
FAN_OUT: Final = 1 << FAN_OUT_BITS
CELL_BITS: Final = 3
CELLS: Final = 1 << CELL_BITS
GROUP: Final = 16
"""Children of a node of the record tree."""
MAX_AVERAGE_BUCKET_RECORDS: Final = 96
"""A gateway keeps 36 bytes of nodes for each bucket in memory, the file 336 bytes of index. With 96,
100 million records have 2^20 buckets: 38 MB of nodes, 40 bytes a record on disk, under 4 KiB to read."""

SALT_BYTES: Final = 16
BLIND_BYTES: Final = 16
CELL_ENDS: Final = struct.Struct(f">{CELLS}I")
CELL_HASHES_AT: Final = HASH_BYTES
CELL_ENDS_AT: Final = CELL_HASHES_AT + CELLS * HASH_BYTES
INDEX_BYTES: Final = CELL_ENDS_AT + CELL_ENDS.size
RECORDS_AT: Final = SALT_BYTES + INDEX_BYTES

_COUNT_BYTES: Final = 4
_NODE_DOMAIN: Final = b"pos-gateway snapshot node 1\0"
BUCKET_DOMAIN: Final = b"pos-gateway snapshot bucket 2\0"
CELL_DOMAIN: Final = b"pos-gateway snapshot cell 2\0"
_SALT_DOMAIN: Final = b"pos-gateway snapshot salt 2\0"
_BLIND_DOMAIN: Final = b"pos-gateway snapshot blind 2\0"
_GROUP_DOMAIN: Final = b"pos-gateway snapshot record group 1\0"
# Short, so that a record with its blind fits one block of SHA-256: this is most of a builder's work.
_RECORD_DOMAIN: Final = b"rec"

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
        return self.tree_bytes + bucket * RECORDS_AT + records_before * RECORD_BYTES

    def body_bytes(self, count: int) -> int:
        """Everything after the head of a file with `count` records."""
        return self.bucket_offset(self.buckets, count)

    def child_of(self, level: int, bucket: int) -> int:
        """Which child of its node on `level` leads to `bucket`."""
        return (bucket >> (FAN_OUT_BITS * (level - 1))) % self.children(level)

    def bucket_of(self, token_key: bytes) -> int:
        return int.from_bytes(token_key[:4], "big") >> (32 - self.bucket_bits)

    def cell_of(self, token_key: bytes) -> int:
        return (int.from_bytes(token_key[:4], "big") >> (32 - CELL_BITS - self.bucket_bits)) % CELLS

    def bucket_end(self, bucket: int) -> bytes | None:
        """The lowest beginning of a token key that comes after `bucket`; None after the last one."""
        return self._prefix((bucket + 1) << CELL_BITS) if bucket + 1 < self.buckets else None

    def cell_ends(self, bucket: int) -> list[bytes]:
        """The same for each of its cells but the last."""
        return [self._prefix((bucket << CELL_BITS) + cell) for cell in range(1, CELLS)]

    def _prefix(self, cell: int) -> bytes:
        return (cell << (32 - CELL_BITS - self.bucket_bits)).to_bytes(4, "big")


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket as it stands in the file, and what its node says of it."""

    data: bytes
    hash: bytes
    count: int


def encode_bucket(shape: Shape, bucket: int, records: bytes) -> Bucket:
    """`records` are those of this bucket, whole and in order."""
    keys = [records[at : at + TOKEN_KEY_BYTES] for at in range(0, len(records), RECORD_BYTES)]
    ends = [bisect_left(keys, end) for end in shape.cell_ends(bucket)]
    ends.append(len(keys))
    salt = bucket_salt(records)
    start, index = 0, [record_root(records, salt)]
    for end in ends:
        index.append(cell_hash(salt, records[start * RECORD_BYTES : end * RECORD_BYTES]))
        start = end
    index.append(CELL_ENDS.pack(*ends))
    joined = b"".join(index)
    return Bucket(salt + joined + records, bucket_hash(joined), len(keys))


def bucket_salt(records: bytes) -> bytes:
    """What hides the records from whoever sees hashes of them in a neighbour's proof but does not hold the
    whole bucket: without it, a guess of a record could be confirmed. It follows from the records, so that
    a merge arrives at the same bytes as the issuer."""
    return _sha256(_SALT_DOMAIN + records).digest()[:SALT_BYTES]


def cell_hash(salt: bytes, records: bytes) -> bytes:
    return _sha256(CELL_DOMAIN + salt + records).digest()


def bucket_hash(index: bytes) -> bytes:
    """From the bucket's index: the salt and the records hang on the cells' hashes."""
    return _sha256(BUCKET_DOMAIN + index).digest()


def record_blinds(salt: bytes, count: int) -> bytes:
    """One after the other, 16 bytes for each record."""
    return hashlib.shake_128(_BLIND_DOMAIN + salt).digest(BLIND_BYTES * count)


def record_hash(record: bytes, blind: bytes) -> bytes:
    return _sha256(_RECORD_DOMAIN + blind + record).digest()


def record_hashes(records: bytes, salt: bytes) -> list[bytes]:
    """The hash of each record of a whole bucket."""
    count = len(records) // RECORD_BYTES
    blinds = record_blinds(salt, count)
    return [
        _sha256(
            _RECORD_DOMAIN
            + blinds[place * BLIND_BYTES : (place + 1) * BLIND_BYTES]
            + records[place * RECORD_BYTES : (place + 1) * RECORD_BYTES]
        ).digest()
        for place in range(count)
    ]


def group_hashes(hashes: Sequence[bytes]) -> list[bytes]:
    """One level up in the record tree: up to 16 hashes become one. None at all is one empty group."""
    return [
        _sha256(_GROUP_DOMAIN + b"".join(hashes[at : at + GROUP])).digest()
        for at in range(0, max(1, len(hashes)), GROUP)
    ]


def record_root(records: bytes, salt: bytes) -> bytes:
    """The root over a bucket's records: grouped level by level, at least once, until one hash is left."""
    hashes = group_hashes(record_hashes(records, salt))
    while len(hashes) > 1:
        hashes = group_hashes(hashes)
    return hashes[0]


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
