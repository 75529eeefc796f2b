from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pos_gateway.errors import InvalidInput, InvalidSnapshot, NotFound
from pos_gateway.limits.header import MAX_SIGNATURES
from pos_gateway.limits.record import LimitRecord
from pos_gateway.limits.snapshot import Snapshot
from pos_gateway.snapshot_file import SnapshotFile
from tests.limits.making import KEYS, SIGNERS, TERMS, built, opened, reader, signing_key, some_records
from tests.limits.test_limit_record import records

ABSENT = bytes(16)

# Keys that are near each other, so that buckets, prefixes and misaligned matches get exercised.
crowded_keys = st.one_of(
    st.binary(min_size=16, max_size=16),
    st.integers(0, 40).map(lambda number: number.to_bytes(16, "big")),
    st.integers(0, 40).map(lambda number: bytes([number]) * 16),
)


@settings(max_examples=200, deadline=None)
@given(
    limits=st.dictionaries(crowded_keys, records, max_size=60),
    absent=st.lists(crowded_keys, max_size=20),
    bucket_bits=st.none() | st.integers(0, 9),
)
def test_lookups_agree_with_a_dictionary(
    limits: dict[bytes, LimitRecord], absent: list[bytes], bucket_bits: int | None
) -> None:
    model = {key: record._replace(token_key=key) for key, record in limits.items()}
    snapshot = opened(built(model.values(), bucket_bits=bucket_bits))
    assert snapshot.header.count == len(model)
    for key in [*model, *absent]:
        assert snapshot.lookup(key) == model.get(key)
    assert list(snapshot.records()) == sorted(model.values())


def test_all_records_in_one_bucket_of_many() -> None:
    crowd = [record._replace(token_key=b"\xab\xcd" + record.token_key[2:]) for record in some_records(300)]
    snapshot = opened(built(crowd, bucket_bits=14))
    for record in crowd:
        assert snapshot.lookup(record.token_key) == record
    assert snapshot.lookup(b"\xab\xcd" + bytes(14)) is None
    assert snapshot.lookup(ABSENT) is None


@pytest.mark.parametrize(
    ("count", "bucket_bits"), [(0, 0), (96, 0), (97, 1), (192, 1), (193, 2), (12_288, 7), (12_289, 8)]
)
def test_buckets_follow_from_the_count(count: int, bucket_bits: int) -> None:
    limits = some_records(count)
    snapshot = opened(built(limits))
    assert snapshot.header.bucket_bits == bucket_bits
    assert list(snapshot.records()) == sorted(limits)
    assert snapshot.lookup(ABSENT) is None


def test_the_same_inputs_give_the_same_bytes_in_any_order() -> None:
    limits = some_records(500)
    assert built(limits) == built(reversed(limits))
    assert built(limits) == built(limits, signers=dict(reversed(SIGNERS.items())))


def test_a_match_across_two_records_is_no_match() -> None:
    limits = [
        record._replace(token_key=bytes([n]) * 16, sequence=0x01010101)
        for n, record in enumerate(some_records(8), start=2)
    ]
    data = b"".join(record.to_bytes() for record in limits)
    snapshot = opened(built(limits))
    for at in range(1, len(data) - 16):
        if at % 36:
            assert snapshot.lookup(data[at : at + 16]) is None


def test_opening_reads_the_same_few_bytes_whatever_the_size() -> None:
    costs = []
    for count in (13_000, 26_000):
        data, reads = built(some_records(count), bucket_bits=14), list[int]()

        def read_at(offset: int, length: int, data: bytes = data, reads: list[int] = reads) -> bytes:
            reads.append(length)
            return data[offset : offset + length]

        Snapshot.open(read_at, len(data), KEYS, 2)
        costs.append(reads)
    assert costs[0] == costs[1]
    assert sum(costs[0]) < 8192


def test_a_warm_lookup_reads_once_and_no_more_than_its_bucket() -> None:
    limits = some_records(3000)
    data, reads = built(limits, bucket_bits=5), list[int]()

    def read_at(offset: int, length: int) -> bytes:
        reads.append(length)
        return data[offset : offset + length]

    snapshot = Snapshot.open(read_at, len(data), KEYS, 2)
    snapshot.load_nodes()
    reads.clear()
    for record in limits:
        assert snapshot.lookup(record.token_key) == record
    assert len(reads) < 1.1 * len(limits)
    assert sum(reads) < 0.8 * len(limits) * len(data) / 32


def test_a_cell_that_ends_far_beyond_its_share() -> None:
    """All of a bucket's records in its first cells: the second read gets what the first did not."""
    crowd = [record._replace(token_key=b"\x05" + record.token_key[1:]) for record in some_records(90)]
    snapshot = opened(built(crowd, bucket_bits=0))
    for record in crowd:
        assert snapshot.lookup(record.token_key) == record
    assert snapshot.lookup(b"\x05" + bytes(15)) is None
    assert snapshot.lookup(b"\x25" + bytes(15)) is None


def test_two_records_of_one_token_are_refused() -> None:
    record = some_records(1)[0]
    with pytest.raises(InvalidInput, match="two records of one token"):
        built([record, record._replace(sequence=record.sequence ^ 1)])


@pytest.mark.parametrize("bucket_bits", [-1, 26])
def test_bucket_bits_out_of_range_are_refused(bucket_bits: int) -> None:
    with pytest.raises(InvalidInput, match="bucket_bits"):
        built([], bucket_bits=bucket_bits)


@pytest.mark.parametrize("key_id", ["", "a b", "x" * 65, "ключ", "a\0"])
def test_a_bad_key_id_is_refused(key_id: str) -> None:
    with pytest.raises(InvalidInput, match="key id"):
        built([], signers={key_id: signing_key("a")})


@pytest.mark.parametrize("count", [0, MAX_SIGNATURES + 1])
def test_no_or_too_many_signers_are_refused(count: int) -> None:
    with pytest.raises(InvalidInput, match="signatures"):
        built([], signers={f"key-{n}": signing_key(str(n)) for n in range(count)})


def test_a_delta_stands_in_the_same_format() -> None:
    limits = some_records(3)
    assert opened(built(limits, terms=replace(TERMS, base_version=6))).header.base_version == 6


@pytest.mark.parametrize("length", [0, 15, 17])
def test_a_token_key_has_16_bytes(length: int) -> None:
    with pytest.raises(InvalidInput, match="token key"):
        opened(built([])).lookup(bytes(length))


def test_from_a_file(tmp_path: Path) -> None:
    path, limits = tmp_path / "limits.pgs", some_records(200)
    path.write_bytes(built(limits))
    with SnapshotFile(path) as file:
        snapshot = Snapshot.open(file.read_at, file.size, KEYS, 2)
        assert snapshot.lookup(limits[0].token_key) == limits[0]
        # What the page cache no longer agrees with is caught at the next lookup, not at the next start.
        os.truncate(path, file.size - 40 * 36)
        with pytest.raises(InvalidSnapshot, match="ends after"):
            list(snapshot.records())


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no snapshot"):
        SnapshotFile(tmp_path / "none")


def test_a_folder_is_no_snapshot(tmp_path: Path) -> None:
    with SnapshotFile(tmp_path) as file, pytest.raises(InvalidSnapshot, match="cannot be read"):
        Snapshot.open(file.read_at, 4096, KEYS, 2)


def test_an_empty_file_is_no_snapshot() -> None:
    with pytest.raises(InvalidSnapshot, match="prefix ends after 0 of 16 bytes"):
        Snapshot.open(reader(b""), 0, KEYS, 2)
