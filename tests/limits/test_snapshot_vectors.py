"""The format as docs/snapshot-format.md tells it, read a second time without our code.

`vectors.json` holds a whole snapshot of three records. A change to any byte that the builder writes
is a change of the format and needs a new format number.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pos_gateway.limits.delta import changed_records
from pos_gateway.limits.merge import Merge
from pos_gateway.limits.proof import prove, verify_proof
from pos_gateway.limits.record import LimitRecord, Status, token_key
from pos_gateway.limits.single import Kind, read_single
from pos_gateway.limits.snapshot import Snapshot, SnapshotHeader
from tests.limits.making import TERMS, built, opened, reader

VECTORS: Final[dict[str, Any]] = json.loads((Path(__file__).parent / "vectors.json").read_text())
SIGNERS: Final = {
    key_id: Ed25519PrivateKey.from_private_bytes(bytes.fromhex(seed))
    for key_id, seed in VECTORS["signing_seeds"].items()
}


def numbered(count: int) -> list[LimitRecord]:
    """Record i: token key = SHA-256("token i")[:16], ceiling 100,000 i, cap 1,000 i, sequence i,
    statuses in turn, assurance i mod 4, instalment class i mod 3."""
    return [
        LimitRecord(
            token_key=hashlib.sha256(f"token {i}".encode()).digest()[:16],
            ceiling=100_000 * i,
            per_tap_cap_minor=1_000 * i,
            sequence=i,
            status=list(Status)[i % 3],
            assurance=i % 4,
            instalment_class=i % 3,
        )
        for i in range(count)
    ]


def snapshot_of(name: str) -> bytes:
    vector = VECTORS[name]
    return built(numbered(vector["count"]), bucket_bits=vector["bucket_bits"], signers=SIGNERS)


@pytest.mark.parametrize("name", ["small", "deep"])
def test_the_builder_writes_the_vector(name: str) -> None:
    data, vector = snapshot_of(name), VECTORS[name]
    assert hashlib.sha256(data).hexdigest() == vector["sha256"]
    keys = {key_id: key.public_key() for key_id, key in SIGNERS.items()}
    assert opened(data, keys=keys).header.root.hex() == vector["root"]
    if "file" in vector:
        assert data.hex() == vector["file"]


def test_the_reader_reads_the_vector() -> None:
    data = bytes.fromhex(VECTORS["small"]["file"])
    keys = {
        key_id: Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        for key_id, key in VECTORS["public_keys"].items()
    }
    snapshot = Snapshot.open(reader(data), len(data), keys, 2)
    assert list(snapshot.records()) == sorted(numbered(3))
    for record in numbered(3):
        assert (
            record.digest(snapshot.header.nonce).hex() == VECTORS["small"]["digests"][record.token_key.hex()]
        )
    proven = bytes.fromhex(VECTORS["small"]["proof_of_token_1"])
    assert prove(snapshot, numbered(3)[1].token_key) == proven
    assert verify_proof(proven, keys, 2) == (snapshot.header, numbered(3)[1])


def test_the_token_key_vector() -> None:
    vector = VECTORS["token_key"]
    secret = bytes.fromhex(vector["secret"])
    assert token_key(secret, vector["pan"], vector["psn"]).hex() == vector["token_key"]


def test_the_single_vectors() -> None:
    vector = VECTORS["single"]
    signer = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(vector["online_seed"]))
    for name in ("grant", "note"):
        single = read_single(bytes.fromhex(vector[name]), TERMS)
        assert single.kind is Kind[name.upper()]
        assert single.record == numbered(3)[1]
        assert single.sign(signer).hex() == vector[name]
    assert read_single(bytes.fromhex(vector["grant"]), TERMS).digest.hex() == vector["grant_digest"]


def updated() -> tuple[list[LimitRecord], bytes, bytes]:
    """The records of version 8, the delta that leads to them from `small`, and version 8 whole."""
    _, one, two, new = numbered(4)
    records = [numbered(1)[0], one._replace(ceiling=150_000, sequence=4), new]
    records.append(two._replace(ceiling=0, status=Status.CLOSED))
    terms = replace(TERMS, version=8, nonce=b"\x08" * 16)
    changes = changed_records(sorted(numbered(3)), sorted([*records[:3]]))
    delta = built(changes, terms=replace(terms, base_version=7), signers=SIGNERS)
    return records, delta, built(records, terms=terms, signers=SIGNERS)


def test_the_update_vector() -> None:
    vector, keys = VECTORS["update"], {key_id: key.public_key() for key_id, key in SIGNERS.items()}
    records, delta, whole = updated()
    assert delta.hex() == vector["delta"]
    assert opened(whole, keys=keys).head.hex() == vector["head"]
    base, file = bytes.fromhex(VECTORS["small"]["file"]), io.BytesIO()
    over = opened(bytes.fromhex(vector["delta"]), keys=keys)
    Merge(opened(base, keys=keys), over, bytes.fromhex(vector["head"]), keys, 2, file).run()
    assert file.getvalue() == whole
    assert hashlib.sha256(whole).hexdigest() == vector["merged"]
    assert read_again(whole)[1] == [record.to_bytes() for record in sorted(records)]
    listed = [LimitRecord.from_bytes(record) for record in read_again(delta)[1]]
    assert listed == sorted(records[1:])


@pytest.mark.parametrize("name", ["small", "deep"])
def test_a_second_reader_agrees(name: str) -> None:
    data = snapshot_of(name)
    header, records = read_again(data)
    assert header == json.loads(SnapshotHeader.from_bytes(header_bytes(data)).to_bytes())
    assert header["nonce"] == TERMS.nonce.hex()
    assert records == [record.to_bytes() for record in sorted(numbered(VECTORS[name]["count"]))]


def header_bytes(data: bytes) -> bytes:
    return data[16 : 16 + int.from_bytes(data[12:16], "big")]


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def read_again(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Straight down the document: the tree recursively from the root, everything recomputed."""
    magic, form, signatures, header_length = struct.unpack(">8sHHI", data[:16])
    assert (magic, form) == (b"PGLIMITS", 3)
    signed, at = data[16 : 16 + header_length], 16 + header_length
    for _ in range(signatures):
        key_id = data[at : at + 64].rstrip(b"\0").decode()
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(VECTORS["public_keys"][key_id]))
        key.verify(data[at + 64 : at + 128], b"pos-gateway snapshot header 1\0" + signed)
        at += 128
    header = json.loads(signed)
    bits = header["bucket_bits"]

    # How many bits of the key each level of nodes decides, from the root down.
    widths = [bits % 7 or (7 if bits else 0)] + [7] * max(0, -(-bits // 7) - 1)
    hashes = [bytes.fromhex(header["root"])]
    counts = [header["count"]]
    for width in widths:
        below_hashes: list[bytes] = []
        below_counts: list[int] = []
        for expected, count in zip(hashes, counts, strict=True):
            children = 1 << width
            node, at = data[at : at + 36 * children], at + 36 * children
            assert sha256(b"pos-gateway snapshot node 1\0", node) == expected
            own = struct.unpack(f">{children}I", node[32 * children :])
            assert sum(own) == count
            below_hashes += [node[32 * n : 32 * n + 32] for n in range(children)]
            below_counts += own
        hashes, counts = below_hashes, below_counts

    records: list[bytes] = []
    for bucket, (expected, count) in enumerate(zip(hashes, counts, strict=True)):
        salt, index, at = data[at : at + 16], data[at + 16 : at + 336], at + 336
        body, at = data[at : at + 36 * count], at + 36 * count
        assert sha256(b"pos-gateway snapshot bucket 2\0", index) == expected
        ends = struct.unpack(">8I", index[288:])
        assert ends[-1] == count
        own_records = [body[n : n + 36] for n in range(0, len(body), 36)]
        for cell, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
            in_cell = own_records[start:end]
            expected = sha256(b"pos-gateway snapshot cell 2\0", salt, *in_cell)
            assert index[32 + 32 * cell : 64 + 32 * cell] == expected
            assert all(int.from_bytes(r[:16], "big") >> (125 - bits) == 8 * bucket + cell for r in in_cell)
        assert salt == sha256(b"pos-gateway snapshot salt 2\0", body)[:16]
        blinds = hashlib.shake_128(b"pos-gateway snapshot blind 2\0" + salt).digest(16 * count)
        leaves = zip([blinds[n : n + 16] for n in range(0, len(blinds), 16)], own_records, strict=True)
        assert root_again([sha256(b"rec", *leaf) for leaf in leaves]) == index[:32]
        records += own_records
    assert at == len(data)
    return header, records


def root_again(hashes: list[bytes]) -> bytes:
    groups = [hashes[n : n + 16] for n in range(0, len(hashes), 16)] or [[]]
    above = [sha256(b"pos-gateway snapshot record group 1\0", *group) for group in groups]
    return above[0] if len(above) == 1 else root_again(above)
