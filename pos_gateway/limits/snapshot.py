"""A limit snapshot, opened: every answer is verified up to the issuer's signature before it is given.

    head      "PGLIMITS" ‖ format (u16) ‖ signatures (u16) ‖ header length (u32)
              ‖ header ‖ signatures, each key id (64 bytes, zero-padded) ‖ Ed25519 signature (64)
    tree      the nodes, root first (see `tree`)
    buckets   each: index over its cells ‖ records (36 each; see `tree`)

Integers are big-endian. The whole format with test vectors: docs/snapshot-format.md.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pos_gateway.errors import AuthenticationFailed, InvalidInput, InvalidSnapshot
from pos_gateway.limits.header import (
    FORMAT,
    HASH_BYTES,
    MAX_HEADER_BYTES,
    MAX_KEY_ID_CHARACTERS,
    MAX_SIGNATURES,
    SIGNATURE_BYTES,
    Freshness,
    RiskPolicy,
    SnapshotHeader,
    SnapshotTerms,
    check_key_id,
    check_meant_for,
    check_supersedes,
    explain_freshness,
    freshness,
    verify_header,
)
from pos_gateway.limits.record import RECORD_BYTES, TOKEN_KEY_BYTES, LimitRecord
from pos_gateway.limits.tree import (
    BUCKET_DOMAIN,
    CELL_BITS,
    CELL_DOMAIN,
    CELL_ENDS,
    CELL_ENDS_AT,
    CELL_HASHES_AT,
    CELLS,
    FAN_OUT,
    FAN_OUT_BITS,
    RECORDS_AT,
    SALT_BYTES,
    Bucket,
    Shape,
    bucket_hash,
    cell_hash,
    decode_node,
    encode_bucket,
    encode_node,
    node_hash,
)

__all__ = [
    "Freshness",
    "RiskPolicy",
    "Snapshot",
    "SnapshotHeader",
    "SnapshotTerms",
    "check_meant_for",
    "check_supersedes",
    "encode_head",
    "explain_freshness",
    "freshness",
]

ReadAt = Callable[[int, int], bytes]
"""(offset, length) → that many bytes, fewer only at the end of the file."""

MAGIC: Final = b"PGLIMITS"
PREFIX: Final = struct.Struct(">8sHHI")
SIGNATURE_ENTRY_BYTES: Final = MAX_KEY_ID_CHARACTERS + SIGNATURE_BYTES

_CELL_SLACK_RECORDS: Final = 8
"""How far a cell may end beyond its share of the bucket; one lookup in twenty has to read on."""
_HASHES_AT: Final = SALT_BYTES + CELL_HASHES_AT
_ENDS_AT: Final = SALT_BYTES + CELL_ENDS_AT

_sha256 = hashlib.sha256


@dataclass(frozen=True, slots=True)
class _Node:
    """A verified node. `starts` has one entry more than there are children: how many records of the
    snapshot lie before each child, and before whatever follows the last."""

    hashes: bytes
    starts: array[int]


class Snapshot:
    """Verified lookups in one snapshot. Nodes are kept once verified; buckets never are."""

    def __init__(self, read_at: ReadAt, header: SnapshotHeader, head: bytes, root: _Node) -> None:
        """Use `open`."""
        self.header = header
        self.head = head
        self._read_at = read_at
        self._shape = Shape(header.bucket_bits)
        self._buckets_at = len(head) + self._shape.tree_bytes
        self._shift = 32 - header.bucket_bits
        self._cell_shift = self._shift - CELL_BITS
        self._nodes: list[dict[int, _Node]] = [{} for _ in range(self._shape.levels)]
        self._nodes[-1][0] = root
        self._lowest = self._nodes[0]

    @classmethod
    def open(
        cls, read_at: ReadAt, size: int, keys: Mapping[str, Ed25519PublicKey], threshold: int
    ) -> Snapshot:
        """Check head, signatures, root and size: the same few reads whatever the size of the file.

        `keys` are the pinned signing keys by id. Validity in time, version and addressee are not
        judged here: see `freshness`, `check_supersedes`, `check_meant_for`.

        Raises:
            InvalidSnapshot: not a snapshot of this format, truncated, or with something appended.
            AuthenticationFailed: step `snapshot signature` or `snapshot root`.
        """
        head = read_head(read_at)
        header = head.verified(keys, threshold)
        shape, at = Shape(header.bucket_bits), len(head.data)
        expected = at + shape.body_bytes(header.count)
        if size != expected:
            raise InvalidSnapshot(f"the file has {size} bytes, its header says {expected}", where="file size")
        root = read_exactly(read_at, at, shape.node_bytes(shape.levels), "root node")
        if node_hash(root) != header.root:
            raise AuthenticationFailed("the root node was changed", step="snapshot root")
        children = shape.children(shape.levels)
        return cls(read_at, header, head.data, _verified_node(root, children, 0, header.count))

    def lookup(self, token_key: bytes) -> LimitRecord | None:
        """The token's record; None only when the verified bucket proves that there is none.

        Raises:
            AuthenticationFailed: step `snapshot node` or `snapshot bucket`: the file was changed.
            InvalidSnapshot: it was truncated, cannot be read, or holds a record of no meaning.
        """
        if len(token_key) != TOKEN_KEY_BYTES:
            raise InvalidInput(f"{len(token_key)} bytes, expected {TOKEN_KEY_BYTES}", where="token key")
        # One long function on purpose: four more calls would cost a fifth of a lookup.
        prefix = int.from_bytes(token_key[:4], "big")
        number = prefix >> self._shift
        node = self._lowest.get(number >> FAN_OUT_BITS) or self._load(1, number >> FAN_OUT_BITS)
        child = number % FAN_OUT
        before = node.starts[child]
        count = node.starts[child + 1] - before
        cell = (prefix >> self._cell_shift) % CELLS
        # Only as far as the cell most likely reaches: often that spares the disk a second page.
        at = self._buckets_at + number * RECORDS_AT + before * RECORD_BYTES
        near = min(count, count * (cell + 1) // CELLS + _CELL_SLACK_RECORDS)
        data = self._read_at(at, RECORDS_AT + near * RECORD_BYTES)
        if len(data) != RECORDS_AT + near * RECORD_BYTES:
            raise _too_short(number, data)
        found = _sha256(BUCKET_DOMAIN + data[SALT_BYTES:RECORDS_AT]).digest()
        if found != node.hashes[child * HASH_BYTES : (child + 1) * HASH_BYTES]:
            raise _changed(number)
        ends = CELL_ENDS.unpack_from(data, _ENDS_AT)
        start, end = ends[cell - 1] if cell else 0, ends[cell]
        if near < end <= count:
            data += self._read_at(at + len(data), (end - near) * RECORD_BYTES)
        records = data[RECORDS_AT + start * RECORD_BYTES : RECORDS_AT + end * RECORD_BYTES]
        at = _HASHES_AT + cell * HASH_BYTES
        if _sha256(CELL_DOMAIN + data[:SALT_BYTES] + records).digest() != data[at : at + HASH_BYTES]:
            raise _changed(number)
        at = records.find(token_key)
        while at >= 0:
            if at % RECORD_BYTES == 0:
                return LimitRecord.from_bytes(records[at : at + RECORD_BYTES])
            at = records.find(token_key, at + 1)
        return None

    def load_nodes(self, pause: Callable[[], object] = lambda: None) -> None:
        """Verify all nodes now, and keep them: from then on a lookup is one read. 36 bytes for each bucket,
        38 MB for 100 million records. `pause` is called after each node.

        Raises:
            AuthenticationFailed, InvalidSnapshot: as `lookup`; what could be loaded stays loaded.
        """
        for index in range(self._shape.nodes(1)):
            self._load(1, index)
            pause()

    def records(self) -> Iterator[LimitRecord]:
        """Every record in the order of token keys, each bucket verified whole: that its records are
        in order, belong into it, and carry the salt, cells and record root they should.

        Raises:
            AuthenticationFailed, InvalidSnapshot: as `lookup`.
        """
        last = b""
        for number in range(self._shape.buckets):
            bucket = self.bucket(number)
            data = bucket.data[RECORDS_AT:]
            if encode_bucket(self._shape, number, data) != bucket:
                raise InvalidSnapshot("the index does not follow from the records", where=f"bucket {number}")
            for at in range(0, len(data), RECORD_BYTES):
                record = LimitRecord.from_bytes(data[at : at + RECORD_BYTES])
                if record.token_key <= last or self._shape.bucket_of(record.token_key) != number:
                    raise InvalidSnapshot("a record is out of place", where=f"bucket {number}")
                last = record.token_key
                yield record

    def bucket(self, number: int) -> Bucket:
        """A bucket with its index and all its cells verified; raises as `lookup`."""
        node, child = self._load(1, number >> FAN_OUT_BITS), number % FAN_OUT
        before, count = node.starts[child], node.starts[child + 1] - node.starts[child]
        length = RECORDS_AT + count * RECORD_BYTES
        data = self._read_at(self._buckets_at + number * RECORDS_AT + before * RECORD_BYTES, length)
        if len(data) != length:
            raise _too_short(number, data)
        bucket = Bucket(data, node.hashes[child * HASH_BYTES : (child + 1) * HASH_BYTES], count)
        if bucket_hash(data[SALT_BYTES:RECORDS_AT]) != bucket.hash:
            raise _changed(number)
        start = 0
        for cell, end in enumerate(CELL_ENDS.unpack_from(data, _ENDS_AT)):
            records = data[RECORDS_AT + start * RECORD_BYTES : RECORDS_AT + end * RECORD_BYTES]
            at, start = _HASHES_AT + cell * HASH_BYTES, end
            if cell_hash(data[:SALT_BYTES], records) != data[at : at + HASH_BYTES]:
                raise _changed(number)
        if start != count:
            raise InvalidSnapshot("its cells do not add up", where=f"bucket {number}")
        return bucket

    def path(self, bucket: int) -> list[bytes]:
        """The verified nodes from the root down to the one above `bucket`, as they stand in the file."""
        path = []
        for level in range(self._shape.levels, 0, -1):
            node = self._load(level, bucket >> (FAN_OUT_BITS * level))
            hashes = [node.hashes[at : at + HASH_BYTES] for at in range(0, len(node.hashes), HASH_BYTES)]
            path.append(encode_node(hashes, [end - start for start, end in pairwise(node.starts)]))
        return path

    def _load(self, level: int, index: int) -> _Node:
        """The node, from memory or verified against its parent."""
        known = self._nodes[level - 1].get(index)
        if known is not None:
            return known
        shape = self._shape
        parent = self._load(level + 1, index >> FAN_OUT_BITS)
        child = index % FAN_OUT
        data = read_exactly(
            self._read_at,
            len(self.head) + shape.node_offset(level, index),
            shape.node_bytes(level),
            "tree node",
        )
        if node_hash(data) != parent.hashes[child * HASH_BYTES : (child + 1) * HASH_BYTES]:
            raise AuthenticationFailed(f"node {index} of level {level} was changed", step="snapshot node")
        node = _verified_node(data, shape.children(level), parent.starts[child], parent.starts[child + 1])
        self._nodes[level - 1][index] = node
        return node


def _too_short(bucket: int, data: bytes) -> InvalidSnapshot:
    return InvalidSnapshot(f"the file ends after {len(data)} bytes of it", where=f"bucket {bucket}")


def _changed(bucket: int) -> AuthenticationFailed:
    return AuthenticationFailed(f"bucket {bucket} was changed", step="snapshot bucket")


def head_bytes(header_length: int, signatures: int) -> int:
    """How long a head is."""
    return PREFIX.size + header_length + signatures * SIGNATURE_ENTRY_BYTES


def encode_head(header_bytes: bytes, signatures: Mapping[str, bytes]) -> bytes:
    """The head of a file, signatures in the order of their key ids."""
    if not 1 <= len(signatures) <= MAX_SIGNATURES:
        raise InvalidInput(f"1 to {MAX_SIGNATURES} signatures, not {len(signatures)}", where="snapshot head")
    entries = (
        check_key_id(key_id).encode("ascii").ljust(MAX_KEY_ID_CHARACTERS, b"\0") + signatures[key_id]
        for key_id in sorted(signatures)
    )
    return PREFIX.pack(MAGIC, FORMAT, len(signatures), len(header_bytes)) + header_bytes + b"".join(entries)


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a file, taken apart but not trusted yet."""

    data: bytes
    header_bytes: bytes
    signatures: Mapping[str, bytes]

    def verified(self, keys: Mapping[str, Ed25519PublicKey], threshold: int) -> SnapshotHeader:
        """The header, read only after its signatures are checked.

        Raises:
            AuthenticationFailed: step `snapshot signature`.
            InvalidSnapshot: signed, and yet no header of this format.
        """
        verify_header(self.header_bytes, self.signatures, keys, threshold)
        return SnapshotHeader.from_bytes(self.header_bytes)


def read_head(read_at: ReadAt) -> Head:
    """
    Raises:
        InvalidSnapshot: not a snapshot of this format, truncated, or out of a bound.
    """
    prefix = read_exactly(read_at, 0, PREFIX.size, "prefix")
    magic, version, count, header_length = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise InvalidSnapshot("not a limit snapshot", where="byte 0")
    if version != FORMAT:
        raise InvalidSnapshot(f"format {version}; this program reads {FORMAT}", where="byte 8")
    if not 1 <= count <= MAX_SIGNATURES:
        raise InvalidSnapshot(f"{count} signatures, must be 1 to {MAX_SIGNATURES}", where="byte 10")
    if not 1 <= header_length <= MAX_HEADER_BYTES:
        raise InvalidSnapshot(
            f"a header of {header_length} bytes, at most {MAX_HEADER_BYTES}", where="byte 12"
        )
    rest = read_exactly(read_at, PREFIX.size, header_length + count * SIGNATURE_ENTRY_BYTES, "head")
    signatures: dict[str, bytes] = {}
    for at in range(header_length, len(rest), SIGNATURE_ENTRY_BYTES):
        key_id = _decode_key_id(rest[at : at + MAX_KEY_ID_CHARACTERS], PREFIX.size + at)
        if key_id in signatures:
            raise InvalidSnapshot("the same key id twice", where=f"byte {PREFIX.size + at}")
        signatures[key_id] = rest[at + MAX_KEY_ID_CHARACTERS : at + SIGNATURE_ENTRY_BYTES]
    return Head(prefix + rest, rest[:header_length], signatures)


def _decode_key_id(field: bytes, at: int) -> str:
    try:
        return check_key_id(field.rstrip(b"\0").decode("ascii"))
    except (UnicodeDecodeError, InvalidInput):
        raise InvalidSnapshot("not a key id", where=f"byte {at}") from None


def _verified_node(node: bytes, children: int, start: int, end: int) -> _Node:
    """`node` is verified; `start` and `end` are the records before and up to its end, from above."""
    hashes, counts = decode_node(node, children)
    if start + sum(counts) != end:
        raise InvalidSnapshot("its counts do not add up to what stands above", where="tree node")
    return _Node(hashes, array("I", accumulate(counts, initial=start)))


def read_exactly(read_at: ReadAt, offset: int, length: int, what: str) -> bytes:
    """
    Raises:
        InvalidSnapshot: fewer bytes are there; names `what` ends too early.
    """
    data = read_at(offset, length)
    if len(data) != length:
        raise InvalidSnapshot(f"{what} ends after {len(data)} of {length} bytes", where=f"byte {offset}")
    return data
