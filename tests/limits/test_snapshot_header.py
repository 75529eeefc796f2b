from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from pos_gateway.errors import AuthenticationFailed, InvalidInput, InvalidSnapshot
from pos_gateway.instalments import Charge, Offer
from pos_gateway.limits.header import FORMAT, MAX_HEADER_BYTES, sign_header, verify_header
from pos_gateway.limits.snapshot import (
    Freshness,
    SnapshotHeader,
    SnapshotTerms,
    check_meant_for,
    check_supersedes,
    explain_freshness,
    freshness,
)
from pos_gateway.money import currency
from tests.limits.making import KEYS, SIGNERS, TERMS, signing_key, version

HEADER = SnapshotHeader(
    **{field.name: getattr(TERMS, field.name) for field in fields(SnapshotTerms)},
    count=5,
    bucket_bits=0,
    root=bytes(32),
)


OFFER = Offer(
    id="o1", currency=currency("CNY"), charge=Charge.FLAT_FEE, periods=(3, 12), rate_per_period_bps=50
)


def canonical(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def document() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(HEADER.to_bytes())
    return parsed


def test_round_trip() -> None:
    assert SnapshotHeader.from_bytes(HEADER.to_bytes()) == HEADER
    delta = replace(HEADER, base_version=6, issuer="工商实验室")
    assert SnapshotHeader.from_bytes(delta.to_bytes()) == delta
    offering = replace(HEADER, offers=(OFFER, replace(OFFER, id="o2", charge=Charge.ANNUITY)))
    assert SnapshotHeader.from_bytes(offering.to_bytes()) == offering


@pytest.mark.parametrize(
    "offers",
    [
        (OFFER, OFFER),
        (replace(OFFER, currency=currency("USD")),),
        tuple(replace(OFFER, id=f"o{n}") for n in range(65)),
    ],
)
def test_offers_that_contradict_each_other_or_the_limits(offers: tuple[Offer, ...]) -> None:
    with pytest.raises(InvalidSnapshot, match="offers"):
        replace(HEADER, offers=offers)


@pytest.mark.parametrize("name", [*sorted(document()), "policy.stale_per_tap_cap_minor", "online.keys"])
def test_a_missing_field_is_named(name: str) -> None:
    changed = document()
    outer, _, inner = name.partition(".")
    del (changed[outer] if inner else changed)[inner or outer]
    with pytest.raises(InvalidSnapshot, match=inner or outer):
        SnapshotHeader.from_bytes(canonical(changed))


@pytest.mark.parametrize("place", ["", "policy", "online"])
def test_an_unknown_field_is_named(place: str) -> None:
    changed = document()
    (changed[place] if place else changed)["surprise"] = 1
    with pytest.raises(InvalidSnapshot, match="surprise"):
        SnapshotHeader.from_bytes(canonical(changed))


@pytest.mark.parametrize("name", sorted(document()))
@pytest.mark.parametrize("value", [True, 1.0, -1, "", "\n", {}, [1], [[1, 2]], [["91560001"]], 1 << 64])
def test_a_mistyped_field_is_named(name: str, value: object) -> None:
    with pytest.raises(InvalidSnapshot, match=name):
        SnapshotHeader.from_bytes(canonical({**document(), name: value}))


@pytest.mark.parametrize(
    "changes",
    [
        {"refresh_after_unix_s": TERMS.valid_from_unix_s - 1},
        {"refresh_after_unix_s": TERMS.valid_until_unix_s + 1},
        {"base_version": TERMS.version},
        {"bucket_bits": 26},
        {"count": 1 << 32},
        {"version": 0},
        {"offers": [{}]},
        {"issuer": "a\nb"},
        {"currency": "cny"},
        {"root": "00" * 31},
        {"root": "FF" * 32},
        {"revoked_certificates": [["91560001", "0000"]]},
        {"format": FORMAT + 1},
        {"online": document()["online"] | {"keys": ["00" * 31]}},
        {"online": document()["online"] | {"keys": ["00" * 32] * 2}},
        {"online": document()["online"] | {"keys": [f"{n:064x}" for n in range(9)]}},
        {"online": document()["online"] | {"note_life_s": -1}},
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidSnapshot):
        SnapshotHeader.from_bytes(canonical({**document(), **changes}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b'{"a":' * 50_000,
        b"1" * 5000,
        HEADER.to_bytes() + b" ",
        HEADER.to_bytes()[:-1] + b',"version":9}',
        json.dumps(document(), sort_keys=True).encode(),
        canonical(document()).replace(b'"Laboratory', b'"\\ud800'),
        canonical(document()).replace(b"CNY", b"\\u0043NY"),
    ],
)
def test_anything_but_one_canonical_object_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidSnapshot):
        SnapshotHeader.from_bytes(data)


def test_a_header_too_long_is_never_written() -> None:
    many = tuple((bytes.fromhex("91560001"), number.to_bytes(3, "big")) for number in range(4000))
    with pytest.raises(InvalidSnapshot, match=f"at most {MAX_HEADER_BYTES}"):
        replace(HEADER, revoked_certificates=many).to_bytes()


def test_freshness_at_each_bound() -> None:
    header, tolerance_s = HEADER, HEADER.policy.clock_tolerance_s
    for now_unix_s, expected in [
        (header.valid_from_unix_s - tolerance_s - 1, Freshness.NOT_YET_VALID),
        (header.valid_from_unix_s - tolerance_s, Freshness.FRESH),
        (header.refresh_after_unix_s - 1, Freshness.FRESH),
        (header.refresh_after_unix_s, Freshness.STALE),
        (header.valid_until_unix_s - 1, Freshness.STALE),
        (header.valid_until_unix_s, Freshness.EXPIRED),
    ]:
        assert freshness(header, now_unix_s) is expected
        assert expected.may_approve is (expected in (Freshness.FRESH, Freshness.STALE))


def test_freshness_is_explained() -> None:
    assert explain_freshness(HEADER, HEADER.valid_until_unix_s) == (
        "Limits 7 expired at 2026-09-24 14:13 UTC; nothing can be approved until new ones arrive."
    )
    assert "smaller caps" in explain_freshness(HEADER, HEADER.refresh_after_unix_s)
    assert "fresh" in explain_freshness(HEADER, HEADER.valid_from_unix_s)
    assert "check the clock" in explain_freshness(HEADER, 0)


def test_an_older_version_never_supersedes() -> None:
    check_supersedes(version(7), 7)
    check_supersedes(version(8), 7)
    with pytest.raises(AuthenticationFailed, match="version 6 is older than 7") as caught:
        check_supersedes(version(6), 7)
    assert caught.value.step == "snapshot version"


def test_a_snapshot_for_somebody_else_is_refused() -> None:
    check_meant_for(HEADER, issuer="Laboratory Bank", currency="CNY", token_key_epoch=3)
    with pytest.raises(InvalidSnapshot, match="issuer"):
        check_meant_for(HEADER, issuer="Another", currency="CNY", token_key_epoch=3)
    with pytest.raises(InvalidSnapshot, match="currency"):
        check_meant_for(HEADER, issuer="Laboratory Bank", currency="JPY", token_key_epoch=3)
    with pytest.raises(InvalidSnapshot, match="token_key_epoch"):
        check_meant_for(HEADER, issuer="Laboratory Bank", currency="CNY", token_key_epoch=4)


def signed(*names: str) -> dict[str, bytes]:
    return {name: sign_header(HEADER.to_bytes(), signing_key(name)) for name in names}


def test_signatures_below_the_threshold_are_refused() -> None:
    verify_header(HEADER.to_bytes(), signed("limits-a", "limits-b"), KEYS, 2)
    verify_header(HEADER.to_bytes(), signed("limits-a"), KEYS, 1)
    for signatures in ({}, signed("limits-a"), signed("limits-a", "stranger")):
        with pytest.raises(AuthenticationFailed, match="trusted keys, 2 needed"):
            verify_header(HEADER.to_bytes(), signatures, KEYS, 2)


def test_one_key_under_two_ids_counts_once() -> None:
    key = SIGNERS["limits-a"]
    twice = dict.fromkeys(("limits-a", "limits-b"), sign_header(HEADER.to_bytes(), key))
    keys = dict.fromkeys(twice, key.public_key())
    with pytest.raises(AuthenticationFailed, match="signed by 1 trusted keys, 2 needed"):
        verify_header(HEADER.to_bytes(), twice, keys, 2)


def test_another_keys_signature_under_a_trusted_id_is_refused() -> None:
    forged = {"limits-a": sign_header(HEADER.to_bytes(), signing_key("stranger"))}
    with pytest.raises(AuthenticationFailed, match="limits-a does not verify") as caught:
        verify_header(HEADER.to_bytes(), forged, KEYS, 1)
    assert caught.value.step == "snapshot signature"


def test_a_signature_over_the_bare_header_is_refused() -> None:
    bare = {"limits-a": SIGNERS["limits-a"].sign(HEADER.to_bytes())}
    with pytest.raises(AuthenticationFailed):
        verify_header(HEADER.to_bytes(), bare, KEYS, 1)


def test_a_threshold_of_none_is_refused() -> None:
    with pytest.raises(InvalidInput, match="threshold"):
        verify_header(HEADER.to_bytes(), {}, KEYS, 0)
