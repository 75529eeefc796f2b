"""Merging a delta into its base: exactly the whole snapshot that the issuer signed, made in the shop.

The issuer's head for that whole snapshot comes beside the delta. The merged records must hash to the
root in it; only then is the head written, so a file that was not finished never opens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import BinaryIO, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pos_gateway.errors import AuthenticationFailed, InvalidSnapshot
from pos_gateway.limits.builder import BodyWriter, Progress, by_bucket
from pos_gateway.limits.header import SnapshotHeader, SnapshotTerms
from pos_gateway.limits.layers import check_lies_over
from pos_gateway.limits.record import RECORD_BYTES, TOKEN_KEY_BYTES
from pos_gateway.limits.snapshot import Snapshot, read_head
from pos_gateway.limits.tree import RECORDS_AT, Shape, encode_bucket

_BUCKETS_A_STEP: Final = 16


class Merge:
    """One merge into an empty, seekable file, step by step, so that the caller can rest or stop between.

        merge = Merge(base, delta, head, keys, threshold, file)
        while not merge.step():
            rest()
        # the file is whole; flush, fsync and rename it

    Stopped at any byte, the file is thrown away and a new merge begins: nothing else was touched.
    """

    def __init__(
        self,
        base: Snapshot,
        delta: Snapshot,
        head: bytes,
        keys: Mapping[str, Ed25519PublicKey],
        threshold: int,
        file: BinaryIO,
    ) -> None:
        """`head` is what the issuer signed for the whole snapshot; `keys` and `threshold` as in `open`.

        Raises:
            AuthenticationFailed: step `snapshot signature`.
            InvalidSnapshot: the head is none, or base, delta and head do not belong together.
        """
        self.header = read_whole_head(head, delta.header, keys, threshold)
        check_lies_over(delta.header, base.header)
        self._head = head
        self._file = file
        self._writer = BodyWriter(file, len(head), Shape(self.header.bucket_bits))
        self._buckets = self._merge(base, delta)
        self.done = False

    @property
    def progress(self) -> tuple[int, int]:
        """Records written, and records in all."""
        return self._writer.count, self.header.count

    def step(self) -> bool:
        """Merge some buckets, a millisecond or so; True once the file is whole.

        Raises:
            AuthenticationFailed: step `snapshot root`: the records do not give what the issuer signed; or
                as `Snapshot.lookup`, when base or delta were changed on disk.
            InvalidSnapshot: as `Snapshot.lookup`.
            OSError: the file cannot be written.
        """
        for _ in range(_BUCKETS_A_STEP):
            if self.done:
                break
            if not next(self._buckets, False):
                self._finish()
        return self.done

    def run(self, progress: Progress | None = None) -> SnapshotHeader:
        """All steps at once; raises as they do."""
        while not self.step():
            if progress is not None:
                progress(*self.progress)
        return self.header

    def _merge(self, base: Snapshot, delta: Snapshot) -> Iterator[bool]:
        shape = Shape(self.header.bucket_bits)
        changes = by_bucket(_records(delta), shape)
        if base.header.bucket_bits == shape.bucket_bits:
            for number, changed in enumerate(changes):
                bucket = base.bucket(number)
                if changed:
                    bucket = encode_bucket(shape, number, _overlaid(bucket.data[RECORDS_AT:], changed))
                self._writer.add(bucket)
                yield True
            return
        for number, (old, changed) in enumerate(zip(by_bucket(_records(base), shape), changes, strict=True)):
            self._writer.add(encode_bucket(shape, number, _overlaid(old, changed)))
            yield True

    def _finish(self) -> None:
        root = self._writer.finish()
        if self._writer.count != self.header.count or root != self.header.root:
            raise AuthenticationFailed(
                "base and delta together are not what the issuer signed",
                step="snapshot root",
                advice="fetch the whole snapshot",
            )
        self._file.seek(0)
        self._file.write(self._head)
        self.done = True


def read_whole_head(
    head: bytes, delta: SnapshotHeader, keys: Mapping[str, Ed25519PublicKey], threshold: int
) -> SnapshotHeader:
    """The verified header of the whole snapshot that `delta` leads to.

    Raises:
        AuthenticationFailed: step `snapshot signature`.
        InvalidSnapshot: not a head and nothing else, or at odds with the delta; names the field.
    """
    parsed = read_head(lambda offset, length: head[offset : offset + length])
    if len(parsed.data) != len(head):
        raise InvalidSnapshot(f"{len(head) - len(parsed.data)} bytes too many", where="snapshot head")
    header = parsed.verified(keys, threshold)
    for field in fields(SnapshotTerms):
        expected = None if field.name == "base_version" else getattr(delta, field.name)
        if getattr(header, field.name) != expected:
            raise InvalidSnapshot(
                "the head is not that of the delta's version", where=f"head field {field.name}"
            )
    return header


def overlaid(base: Snapshot, changes: bytes) -> Iterator[bytes]:
    """The records of a file bucket by bucket, joined, with others laid over them; each bucket verified.

    `changes`: records in the order of their token keys, joined.

    Raises:
        AuthenticationFailed, InvalidSnapshot: as `Snapshot.lookup`.
        InvalidInput: the changes are out of order.
    """
    shape = Shape(base.header.bucket_bits)
    for number, changed in enumerate(by_bucket([changes] if changes else [], shape)):
        old = base.bucket(number).data[RECORDS_AT:]
        yield _overlaid(old, changed) if changed else old


def _records(snapshot: Snapshot) -> Iterator[bytes]:
    for number in range(Shape(snapshot.header.bucket_bits).buckets):
        yield snapshot.bucket(number).data[RECORDS_AT:]


def _overlaid(old: bytes, changed: bytes) -> bytes:
    """Records of one bucket, those of `changed` in place of the old ones of the same tokens."""
    records = [old[at : at + RECORD_BYTES] for at in range(0, len(old), RECORD_BYTES)]
    for at in range(0, len(changed), RECORD_BYTES):
        record = changed[at : at + RECORD_BYTES]
        key = record[:TOKEN_KEY_BYTES]
        place = bisect_left(records, key)
        if place < len(records) and records[place].startswith(key):
            records[place] = record
        else:
            records.insert(place, record)
    return b"".join(records)
