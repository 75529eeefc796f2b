from __future__ import annotations

import io
import itertools
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pos_gateway.errors import InvalidInput
from pos_gateway.limits.builder import by_bucket, write_encoded, write_snapshot
from pos_gateway.limits.record import LimitRecord
from pos_gateway.limits.tree import Shape
from tests.limits.making import SIGNERS, TERMS, built, opened, some_records
from tests.limits.test_layers import populations


@settings(max_examples=100, deadline=None)
@given(limits=populations, bucket_bits=st.none() | st.integers(0, 9), chunk=st.integers(1, 9))
def test_a_stream_gives_the_same_file(
    limits: dict[bytes, LimitRecord], bucket_bits: int | None, chunk: int
) -> None:
    ordered, expected = sorted(limits.values()), built(limits.values(), bucket_bits=bucket_bits)
    file = io.BytesIO()
    header = write_snapshot(file, ordered, len(ordered), TERMS, SIGNERS, bucket_bits=bucket_bits)
    assert file.getvalue() == expected
    assert header == opened(expected).header
    pieces = [ordered[at : at + chunk] for at in range(0, len(ordered), chunk)]
    chunks = [b"".join(record.to_bytes() for record in piece) for piece in pieces]
    file = io.BytesIO()
    write_encoded(file, chunks, len(ordered), TERMS, SIGNERS, bucket_bits=bucket_bits)
    assert file.getvalue() == expected


@settings(max_examples=100, deadline=None)
@given(limits=populations, bits=st.integers(0, 9))
def test_each_bucket_gets_its_records(limits: dict[bytes, LimitRecord], bits: int) -> None:
    shape = Shape(bits)
    encoded = [limits[key].to_bytes() for key in sorted(limits)]
    found = list(by_bucket(encoded, shape))
    assert len(found) == shape.buckets
    for bucket, records in enumerate(found):
        assert records == b"".join(record for record in encoded if shape.bucket_of(record) == bucket)


def test_through_a_file(tmp_path: Path) -> None:
    limits = sorted(some_records(20_000))
    told: list[tuple[int, int]] = []
    with (tmp_path / "limits").open("wb") as file:
        write_snapshot(
            file, limits, len(limits), TERMS, SIGNERS, progress=lambda done, of: told.append((done, of))
        )
    assert (tmp_path / "limits").read_bytes() == built(limits)
    assert told == sorted(told)
    assert told[-1] == (20_000, 20_000)


@pytest.mark.parametrize("announced", [0, 2, 4, 1000])
def test_more_or_fewer_records_than_announced(announced: int) -> None:
    file = io.BytesIO()
    with pytest.raises(InvalidInput, match=f"3 records came, {announced} were announced"):
        write_snapshot(file, sorted(some_records(3)), announced, TERMS, SIGNERS)
    assert not file.getvalue().startswith(b"PGLIMITS")


def test_records_out_of_order() -> None:
    limits = sorted(some_records(300))
    for at in (0, 150, 298):
        swapped = [*limits[:at], limits[at + 1], limits[at], *limits[at + 2 :]]
        with pytest.raises(InvalidInput, match="not sorted"):
            write_snapshot(io.BytesIO(), swapped, 300, TERMS, SIGNERS)
    with pytest.raises(InvalidInput, match="two records of one token"):
        write_snapshot(io.BytesIO(), [*limits, limits[-1]], 301, TERMS, SIGNERS)
    chunks = [limits[1].to_bytes(), limits[0].to_bytes()]
    with pytest.raises(InvalidInput, match="not sorted"):
        write_encoded(io.BytesIO(), chunks, 2, TERMS, SIGNERS)


def test_memory_does_not_grow_with_the_count(tmp_path: Path) -> None:
    """Peaks of 40,000 and of 160,000 records: what grows with the count would show four times."""

    def counted(count: int) -> Iterator[LimitRecord]:
        for number in range(count):
            key = (number * (1 << 64) // count).to_bytes(8, "big") + bytes(8)
            yield LimitRecord(key, number, 1000, 1)

    peaks = []
    for count in (40_000, 160_000):
        with (tmp_path / "limits").open("wb") as file:
            tracemalloc.start()
            write_snapshot(file, counted(count), count, TERMS, SIGNERS)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0], peaks
    assert peaks[1] < 4_000_000


def test_what_lookups_find_after_streaming() -> None:
    limits = sorted(some_records(5000))
    file = io.BytesIO()
    write_snapshot(file, limits, len(limits), TERMS, SIGNERS)
    snapshot = opened(file.getvalue())
    snapshot.load_nodes()
    for record in itertools.islice(limits, 0, None, 7):
        assert snapshot.lookup(record.token_key) == record
