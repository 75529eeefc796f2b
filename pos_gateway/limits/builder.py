"""Building a snapshot: the same records, terms and keys always give the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from itertools import pairwise

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.errors import InvalidInput
from pos_gateway.limits.header import MAX_BUCKET_BITS, SnapshotHeader, SnapshotTerms, sign_header
from pos_gateway.limits.record import TOKEN_KEY_BYTES, LimitRecord
from pos_gateway.limits.snapshot import encode_head
from pos_gateway.limits.tree import Shape, bucket_bits_for, bucket_hash, build_tree, record_root, records_hash


def build_snapshot(
    write: Callable[[bytes], object],
    records: Iterable[LimitRecord],
    terms: SnapshotTerms,
    signers: Mapping[str, Ed25519PrivateKey],
    *,
    bucket_bits: int | None = None,
) -> SnapshotHeader:
    """Write a whole snapshot, front to back, through `write`.

    Records may come in any order; all of them are held in memory. `signers` are private keys by key
    id. `bucket_bits` follows from the count unless given.

    Raises:
        InvalidInput: two records of one token, a record its format cannot hold, a bad key id, or
            no or too many signers.
    """
    encoded = sorted(record.to_bytes() for record in records)
    for one, other in pairwise(encoded):
        if one[:TOKEN_KEY_BYTES] == other[:TOKEN_KEY_BYTES]:
            raise InvalidInput("two records of one token", where=f"token key {one[:TOKEN_KEY_BYTES].hex()}")
    shape = Shape(bucket_bits_for(len(encoded)) if bucket_bits is None else bucket_bits)
    if not 0 <= shape.bucket_bits <= MAX_BUCKET_BITS:
        raise InvalidInput(f"must be 0 to {MAX_BUCKET_BITS}", where="bucket_bits")

    buckets: list[list[bytes]] = [[] for _ in range(shape.buckets)]
    for record in encoded:
        buckets[shape.bucket_of(record)].append(record)
    bodies = [b"".join(bucket) for bucket in buckets]
    roots = [record_root(body) for body in bodies]
    nodes, root = build_tree(
        shape,
        [bucket_hash(records_hash(body), root) for body, root in zip(bodies, roots, strict=True)],
        [len(bucket) for bucket in buckets],
    )

    header = SnapshotHeader(
        **{field.name: getattr(terms, field.name) for field in fields(SnapshotTerms)},
        count=len(encoded),
        bucket_bits=shape.bucket_bits,
        root=root,
    )
    header_bytes = header.to_bytes()
    write(
        encode_head(header_bytes, {key_id: sign_header(header_bytes, key) for key_id, key in signers.items()})
    )
    write(nodes)
    for record_root_, body in zip(roots, bodies, strict=True):
        write(record_root_)
        write(body)
    return header
