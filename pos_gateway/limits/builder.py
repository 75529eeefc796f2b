"""Building a snapshot: the same records, terms and keys always give the same bytes.

Records go through once, in the order of their token keys; the builder holds one bucket and one node of
each level, so memory does not grow with the count. The head comes last: only then is the root known.
"""

from __future__ import annotations

import io
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import islice, pairwise
from operator import lt
from typing import BinaryIO, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.errors import InvalidInput
from pos_gateway.limits.header import HASH_BYTES, MAX_BUCKET_BITS, SnapshotHeader, SnapshotTerms, sign_header
from pos_gateway.limits.record import RECORD_BYTES, TOKEN_KEY_BYTES, LimitRecord
from pos_gateway.limits.snapshot import encode_head, head_bytes
from pos_gateway.limits.tree import (
    Bucket,
    Shape,
    bucket_bits_for,
    encode_bucket,
    encode_node,
    node_hash,
)

Progress = Callable[[int, int], None]
"""(records done, records in all)"""

_RECORDS_AT_ONCE: Final = 4096


def build_snapshot(
    write: Callable[[bytes], object],
    records: Iterable[LimitRecord],
    terms: SnapshotTerms,
    signers: Mapping[str, Ed25519PrivateKey],
    *,
    bucket_bits: int | None = None,
) -> SnapshotHeader:
    """Write a whole snapshot, front to back, through `write`.

    Records may come in any order; they and the file are held in memory. `signers` are private keys by
    key id. `bucket_bits` follows from the count unless given.

    Raises:
        InvalidInput: two records of one token, a record its format cannot hold, a bad key id, or
            no or too many signers.
    """
    encoded = sorted(record.to_bytes() for record in records)
    file = io.BytesIO()
    header = write_encoded(file, [b"".join(encoded)], len(encoded), terms, signers, bucket_bits=bucket_bits)
    write(file.getvalue())
    return header


def write_snapshot(
    file: BinaryIO,
    records: Iterable[LimitRecord],
    count: int,
    terms: SnapshotTerms,
    signers: Mapping[str, Ed25519PrivateKey],
    *,
    bucket_bits: int | None = None,
    progress: Progress | None = None,
) -> SnapshotHeader:
    """Write a snapshot of `count` records, sorted by token key, into an empty, seekable file.

    Memory stays bounded whatever the count. Nothing is flushed or synced.

    Raises:
        InvalidInput: records out of order, more or fewer than `count`, and as `build_snapshot`.
    """
    iterator = iter(records)
    chunks = iter(lambda: b"".join(r.to_bytes() for r in islice(iterator, _RECORDS_AT_ONCE)), b"")
    return write_encoded(file, chunks, count, terms, signers, bucket_bits=bucket_bits, progress=progress)


def write_encoded(
    file: BinaryIO,
    chunks: Iterable[bytes],
    count: int,
    terms: SnapshotTerms,
    signers: Mapping[str, Ed25519PrivateKey],
    *,
    bucket_bits: int | None = None,
    progress: Progress | None = None,
) -> SnapshotHeader:
    """As `write_snapshot`, for records that are encoded already and known to be valid: `chunks` of whole
    records, joined."""
    shape = Shape(bucket_bits_for(count) if bucket_bits is None else bucket_bits)
    if not 0 <= shape.bucket_bits <= MAX_BUCKET_BITS:
        raise InvalidInput(f"must be 0 to {MAX_BUCKET_BITS}", where="bucket_bits")

    def header(root: bytes) -> SnapshotHeader:
        values = {field.name: getattr(terms, field.name) for field in fields(SnapshotTerms)}
        return SnapshotHeader(**values, count=count, bucket_bits=shape.bucket_bits, root=root)

    # Every root has the same length, and with it the head.
    writer = BodyWriter(file, head_bytes(len(header(bytes(HASH_BYTES)).to_bytes()), len(signers)), shape)
    for bucket, records in enumerate(by_bucket(chunks, shape)):
        writer.add(encode_bucket(shape, bucket, records))
        if progress is not None and writer.at_a_node:
            progress(writer.count, count)
    if writer.count != count:
        raise InvalidInput(f"{writer.count} records came, {count} were announced", where="count")
    made = header(writer.finish())
    made_bytes = made.to_bytes()
    head = encode_head(made_bytes, {key_id: sign_header(made_bytes, key) for key_id, key in signers.items()})
    file.seek(0)
    file.write(head)
    return made


class BodyWriter:
    """Writes tree and buckets of one file, each where it belongs; buckets come in order."""

    def __init__(self, file: BinaryIO, head_length: int, shape: Shape) -> None:
        self.count = 0
        self._file = file
        self._shape = shape
        self._tree_at = head_length
        self._buckets_at = head_length + shape.tree_bytes
        self._waiting: list[bytes] = []
        self._levels: list[list[tuple[bytes, int]]] = [[] for _ in range(shape.levels + 1)]
        self._next_node = [0] * (shape.levels + 1)

    @property
    def at_a_node(self) -> bool:
        """Everything so far has been handed to the file: now and then, a good moment to tell of progress."""
        return not self._waiting

    def add(self, bucket: Bucket) -> None:
        self._waiting.append(bucket.data)
        self.count += bucket.count
        self._child(1, bucket.hash, bucket.count)

    def finish(self) -> bytes:
        """The root hash, once all buckets are there."""
        (root, _), *_ = self._levels[0]
        return root

    def _child(self, level: int, hash_: bytes, count: int) -> None:
        children = self._levels[level]
        children.append((hash_, count))
        if len(children) < self._shape.children(level):
            return
        hashes, counts = zip(*children, strict=True)
        node = encode_node(hashes, counts)
        children.clear()
        self._write_buckets()
        self._file.seek(self._tree_at + self._shape.node_offset(level, self._next_node[level]))
        self._file.write(node)
        self._next_node[level] += 1
        if level == self._shape.levels:
            self._levels[0].append((node_hash(node), sum(counts)))
        else:
            self._child(level + 1, node_hash(node), sum(counts))

    def _write_buckets(self) -> None:
        data = b"".join(self._waiting)
        self._waiting.clear()
        self._file.seek(self._buckets_at)
        self._file.write(data)
        self._buckets_at += len(data)


def by_bucket(chunks: Iterable[bytes], shape: Shape) -> Iterator[bytes]:
    """The records of each bucket in turn, joined; of empty ones too.

    Raises:
        InvalidInput: records out of order, or two of one token.
    """
    bucket, end, last, held = 0, shape.bucket_end(0), b"", b""
    for chunk in chunks:
        keys = [chunk[at : at + TOKEN_KEY_BYTES] for at in range(0, len(chunk), RECORD_BYTES)]
        if not keys:
            continue
        if not (last < keys[0] and all(map(lt, keys, islice(keys, 1, None)))):
            _complain([last, *keys])
        last, start = keys[-1], 0
        while end is not None and end <= last:
            stop = bisect_left(keys, end, start)
            yield held + chunk[start * RECORD_BYTES : stop * RECORD_BYTES]
            held, start, bucket = b"", stop, bucket + 1
            end = shape.bucket_end(bucket)
        held += chunk[start * RECORD_BYTES :]
    yield held
    for _ in range(bucket + 1, shape.buckets):
        yield b""


def _complain(keys: list[bytes]) -> None:
    for one, other in pairwise(keys):
        if one == other:
            raise InvalidInput("two records of one token", where=f"token key {one.hex()}")
        if one > other:
            raise InvalidInput("records are not sorted by token key", where=f"token key {other.hex()}")
