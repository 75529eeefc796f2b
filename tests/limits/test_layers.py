from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pos_gateway.errors import AuthenticationFailed, InvalidInput, InvalidSnapshot
from pos_gateway.limits.delta import changed_records
from pos_gateway.limits.header import Freshness, SnapshotHeader, freshness
from pos_gateway.limits.layers import Layers
from pos_gateway.limits.record import LimitRecord, Status
from tests.limits.making import TERMS, built, opened, some_records
from tests.limits.test_limit_record import records
from tests.limits.test_snapshot import crowded_keys

WHOLE = replace(TERMS, version=8, nonce=b"\x08" * 16)
DELTA = replace(WHOLE, base_version=7)
REFUSALS = (InvalidSnapshot, AuthenticationFailed)

populations = st.dictionaries(crowded_keys, records, max_size=30).map(
    lambda found: {key: record._replace(token_key=key) for key, record in found.items()}
)


@settings(max_examples=150, deadline=None)
@given(base=populations, changes=populations, absent=st.lists(crowded_keys, max_size=10))
def test_layers_agree_with_two_dictionaries(
    base: dict[bytes, LimitRecord], changes: dict[bytes, LimitRecord], absent: list[bytes]
) -> None:
    layers = Layers(opened(built(base.values())), opened(built(changes.values(), terms=DELTA)))
    for key in {*base, *changes, *absent}:
        record, header = layers.lookup(key)
        assert record == changes.get(key, base.get(key))
        assert header.version == (8 if key in changes else 7)


@settings(max_examples=100, deadline=None)
@given(
    base_until=st.integers(TERMS.refresh_after_unix_s, TERMS.refresh_after_unix_s + 10),
    delta_until=st.integers(TERMS.refresh_after_unix_s, TERMS.refresh_after_unix_s + 10),
    now=st.integers(TERMS.refresh_after_unix_s - 3, TERMS.refresh_after_unix_s + 13),
    listed=st.booleans(),
)
def test_a_record_lives_exactly_as_long_as_the_file_it_stands_in(
    base_until: int, delta_until: int, now: int, listed: bool
) -> None:
    (record,) = some_records(1)
    base = opened(built([record], terms=replace(TERMS, valid_until_unix_s=base_until)))
    terms = replace(DELTA, valid_until_unix_s=delta_until)
    layers = Layers(base, opened(built([record] if listed else [], terms=terms)))
    found, header = layers.lookup(record.token_key)
    assert found == record
    until = delta_until if listed else base_until
    assert (freshness(header, now) is Freshness.EXPIRED) == (now >= until)
    assert layers.freshness(now) is freshness(base.header, now)


@settings(max_examples=200, deadline=None)
@given(base=populations, changes=populations, gone=st.sets(crowded_keys, max_size=10))
def test_changes_are_what_leads_from_one_population_to_the_next(
    base: dict[bytes, LimitRecord], changes: dict[bytes, LimitRecord], gone: set[bytes]
) -> None:
    current = {key: record for key, record in (base | changes).items() if key not in gone}
    found = list(changed_records(sorted(base.values()), sorted(current.values())))
    assert found == sorted(found)
    after = base | {record.token_key: record for record in found}
    for key, record in after.items():
        if key in current:
            assert record == current[key]
        else:
            assert record == base[key]._replace(ceiling=0, status=Status.CLOSED)
    assert all(base.get(record.token_key) != record for record in found)


def test_changes_need_sorted_records() -> None:
    two = sorted(some_records(2))
    for base, current in ((two[::-1], []), ([], two[::-1]), ([], [two[0]] * 2)):
        with pytest.raises(InvalidInput, match="not sorted"):
            list(changed_records(base, current))


def test_a_base_alone() -> None:
    limits = some_records(5)
    layers = Layers(opened(built(limits)))
    assert layers.lookup(limits[0].token_key) == (limits[0], layers.base.header)
    assert layers.lookup(bytes(16)) == (None, layers.base.header)
    assert (layers.version, layers.headers) == (7, (layers.base.header,))
    assert layers.explain(TERMS.valid_from_unix_s).count("Limits") == 1


def test_the_newest_publication_is_the_delta() -> None:
    layers = Layers(opened(built([])), opened(built([], terms=DELTA)))
    assert layers.newest.version == layers.version == 8
    assert [header.version for header in layers.headers] == [8, 7]
    assert layers.explain(TERMS.valid_from_unix_s).count("Limits") == 2


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"base_version": 6}, "base_version"),
        ({"base_version": None}, "base_version"),
        ({"issuer": "Another Bank"}, "issuer"),
        ({"currency": "USD"}, "currency"),
        ({"token_key_epoch": 4}, "token_key_epoch"),
    ],
)
def test_what_does_not_belong_together_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidSnapshot, match=field):
        Layers(opened(built([])), opened(built([], terms=replace(DELTA, **changes))))


def test_a_delta_is_no_base() -> None:
    with pytest.raises(InvalidSnapshot, match="base_version"):
        Layers(opened(built([], terms=DELTA)))


@pytest.mark.parametrize("seed", [20_261_124])
def test_every_byte_of_both_files_changed(seed: int) -> None:
    """Refused, or the answer and its header are what they were: never the base's in place of the delta's."""
    random, limits = Random(seed), some_records(24)
    changes = [record._replace(status=Status.BLOCKED, ceiling=0) for record in limits[:8]]
    files = {"base": built(limits, bucket_bits=1), "delta": built(changes, terms=DELTA, bucket_bits=1)}

    def answers(base: bytes, delta: bytes) -> list[tuple[LimitRecord | None, SnapshotHeader] | None]:
        try:
            layers = Layers(opened(base), opened(delta))
        except REFUSALS:
            return [None] * len(limits)
        found: list[tuple[LimitRecord | None, SnapshotHeader] | None] = []
        for record in limits:
            found.append(None)
            with suppress(*REFUSALS):
                found[-1] = layers.lookup(record.token_key)
        return found

    before = answers(**files)
    assert None not in before
    for name, data in files.items():
        for at in range(len(data)):
            changed = data[:at] + bytes([data[at] ^ random.randrange(1, 256)]) + data[at + 1 :]
            after = answers(**{**files, name: changed})
            assert None in after or name == "base", f"byte {at} of {name}"
            assert all(found is None or found == was for found, was in zip(after, before, strict=True))
