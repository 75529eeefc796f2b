from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pos_gateway.errors import AuthenticationFailed, InvalidSnapshot, NotFound
from pos_gateway.limits.proof import MAGIC, prove, verify_proof
from pos_gateway.limits.tree import (
    BLIND_BYTES,
    INDEX_BYTES,
    RECORDS_AT,
    SALT_BYTES,
    encode_node,
    record_blinds,
    record_hash,
    record_hashes,
)
from tests.limits.making import KEYS, built, one_bucket, opened, signed_over, signing_key, some_records


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 400), bucket_bits=st.sampled_from([0, 1, 3, 8]), pick=st.randoms())
def test_what_stands_in_a_snapshot_can_be_proven(count: int, bucket_bits: int, pick: Random) -> None:
    limits = some_records(count)
    snapshot, record = opened(built(limits, bucket_bits=bucket_bits)), pick.choice(limits)
    assert verify_proof(prove(snapshot, record.token_key), KEYS, 2) == (snapshot.header, record)


def test_a_proof_shows_no_neighbour() -> None:
    limits = some_records(300)
    proof = prove(opened(built(limits, bucket_bits=0)), limits[0].token_key)
    for neighbour in limits[1:]:
        assert neighbour.token_key not in proof
        assert neighbour.to_bytes()[16:28] not in proof


def test_a_proof_is_small() -> None:
    limits = some_records(2000)
    assert len(prove(opened(built(limits, bucket_bits=14)), limits[0].token_key)) < 12_000


@pytest.mark.parametrize("bucket_bits", [0, 3, 8])
def test_every_byte_of_a_proof_counts(bucket_bits: int) -> None:
    limits, random = some_records(40), Random(5)
    proof = prove(opened(built(limits, bucket_bits=bucket_bits)), limits[7].token_key)
    places = range(len(proof)) if len(proof) < 3000 else random.sample(range(len(proof)), 1500)
    for at in places:
        changed = proof[:at] + bytes([proof[at] ^ random.randrange(1, 256)]) + proof[at + 1 :]
        with pytest.raises((InvalidSnapshot, AuthenticationFailed)):
            verify_proof(changed, KEYS, 2)


def test_a_proof_cut_short_or_made_longer() -> None:
    limits = some_records(40)
    proof = prove(opened(built(limits)), limits[7].token_key)
    for length in range(len(proof)):
        with pytest.raises(InvalidSnapshot):
            verify_proof(proof[:length], KEYS, 2)
    with pytest.raises(InvalidSnapshot, match="1 bytes too many"):
        verify_proof(proof + b"\0", KEYS, 2)


def test_another_record_in_place_of_the_proven_one() -> None:
    limits = some_records(40)
    snapshot = opened(built(limits))
    proof = prove(snapshot, limits[7].token_key)
    raised = limits[7]._replace(ceiling=limits[7].ceiling + 1)
    with pytest.raises(AuthenticationFailed, match="snapshot record"):
        verify_proof(proof.replace(limits[7].to_bytes(), raised.to_bytes()), KEYS, 2)


def test_counts_that_do_not_add_up() -> None:
    record = some_records(1)[0]
    bucket = one_bucket(record)
    salt, index = bucket.data[:SALT_BYTES], bucket.data[SALT_BYTES:RECORDS_AT]
    node = encode_node([bucket.hash], [1])
    head = signed_over(node, 2, 0, b"")[: -len(node)]
    proof = MAGIC + head + record.to_bytes() + node + index + bytes(4) + record_blinds(salt, 1)
    with pytest.raises(InvalidSnapshot, match="do not add up"):
        verify_proof(proof, KEYS, 2)


def test_a_hash_in_a_proof_confirms_no_guess() -> None:
    """Whoever has the proof knows everything but the neighbour's record, and guesses that rightly."""
    limits = sorted(some_records(2))
    snapshot = opened(built(limits))
    proof = prove(snapshot, limits[0].token_key)
    own, neighbour = limits[0].to_bytes(), limits[1].to_bytes()
    own_blind, sibling = proof[-BLIND_BYTES - 32 : -32], proof[-32:]
    salt = snapshot.bucket(0).data[:SALT_BYTES]
    assert record_hash(own, own_blind) == record_hashes(own + neighbour, salt)[0]
    assert sibling == record_hashes(own + neighbour, salt)[1]
    for blind in (b"", bytes(BLIND_BYTES), own_blind):
        assert record_hash(neighbour, blind) != sibling
    assert salt not in proof
    assert record_blinds(salt, 2)[BLIND_BYTES:] not in proof


@pytest.mark.parametrize("bucket_bits", [0, 3])
def test_a_proof_holds_what_the_document_says_and_nothing_more(bucket_bits: int) -> None:
    limits = some_records(300)
    snapshot = opened(built(limits, bucket_bits=bucket_bits))
    for record in limits[:20]:
        proof = prove(snapshot, record.token_key)
        hashes = len(proof) - len(MAGIC + snapshot.head) - 36 - 36 * 2**bucket_bits - INDEX_BYTES - 4 - 16
        assert hashes % 32 == 0
        assert 0 < hashes // 32 <= 15 + 15 + 1


def test_a_stranger_proves_nothing() -> None:
    limits = some_records(3)
    keys = {name: signing_key(f"stranger {name}").public_key() for name in KEYS}
    with pytest.raises(AuthenticationFailed, match="snapshot signature"):
        verify_proof(prove(opened(built(limits)), limits[0].token_key), keys, 2)


def test_absence_has_no_proof() -> None:
    with pytest.raises(NotFound):
        prove(opened(built(some_records(3))), bytes(16))
