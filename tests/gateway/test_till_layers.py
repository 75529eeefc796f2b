"""Taps against a delta over a base: what counts is the header that a record stands in."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from pos_gateway.authorization.reasons import Reason
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.gateway.status import _snapshot
from pos_gateway.gateway.till import Approved, Declined, Outcome
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger.config import Policy
from pos_gateway.limits.header import Freshness, SnapshotTerms
from pos_gateway.limits.layers import Layers
from pos_gateway.limits.record import LimitRecord, Status
from tests.limits.making import TERMS, built, opened

DAY_S = 86_400
NOW_UNIX_S = int(time.time())
OTHER = b"\x77" * 16

Lay = Callable[..., Layers]


@pytest.fixture
def shop(tmp_path: Path, ledger_home: Path) -> Iterator[Shop]:
    shutil.copytree(ledger_home, tmp_path / "ledger")
    with Shop(tmp_path, policy=Policy(per_tap_cap_minor=25_000)) as shop:
        yield shop


@pytest.fixture
def issued(shop: Shop) -> tuple[LimitRecord, Personalisation]:
    """One token with the record that the ledger would publish for it."""
    _, personalisation = shop.issue(limit_minor=30_000)
    shop.publish()
    current = shop.feed.current()
    assert current is not None
    (record,) = current.base.records()
    return record, personalisation


@pytest.fixture
def lay(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Lay:
    """Puts records in a base of version 7, others in a delta over it, and both into use."""

    def lay(
        base: list[LimitRecord],
        delta: list[LimitRecord] | None,
        *,
        base_terms: dict[str, Any] | None = None,
        delta_terms: dict[str, Any] | None = None,
    ) -> Layers:
        below = opened(built(base, terms=valid(TERMS, base_terms)))
        over = None
        if delta is not None:
            terms = replace(TERMS, version=8, base_version=7, nonce=b"\x08" * 16)
            over = opened(built(delta, terms=valid(terms, delta_terms)))
        layers = Layers(below, over)
        monkeypatch.setattr(shop.till, "_limits", lambda: layers)
        return layers

    return lay


def valid(terms: SnapshotTerms, changes: dict[str, Any] | None) -> SnapshotTerms:
    times = {
        "valid_from_unix_s": NOW_UNIX_S - 5 * DAY_S,
        "refresh_after_unix_s": NOW_UNIX_S + DAY_S,
        "valid_until_unix_s": NOW_UNIX_S + 2 * DAY_S,
        "revoked_certificates": (),
    }
    return replace(terms, **{**times, **(changes or {})})


STALE = {"refresh_after_unix_s": NOW_UNIX_S - DAY_S}
EXPIRED = STALE | {"valid_until_unix_s": NOW_UNIX_S - DAY_S}


def tap(shop: Shop, personalisation: Personalisation, amount_minor: int = 1930) -> Outcome:
    payment = shop.till.new_payment(uuid4(), amount_minor, shop.journal.last_sequence + 1)
    return shop.till.tap(payment, DirectChannel(VirtualCard(personalisation)))


def reason(outcome: Outcome) -> Reason:
    assert isinstance(outcome, Declined), outcome
    return outcome.decline.reason


def test_a_record_of_the_delta_counts_and_is_named_by_its_own_publication(
    shop: Shop, issued: tuple[LimitRecord, Personalisation], lay: Lay
) -> None:
    record, personalisation = issued
    layers = lay([record._replace(ceiling=0)], [record], base_terms=EXPIRED)
    outcome = tap(shop, personalisation)
    assert isinstance(outcome, Approved)
    facts = outcome.record.facts()
    assert facts["snapshot_version"] == 8
    assert facts["limit_digest"] == record.digest(layers.newest.nonce).hex()


def test_what_a_delta_does_not_list_is_named_by_the_base(
    shop: Shop, issued: tuple[LimitRecord, Personalisation], lay: Lay
) -> None:
    record, personalisation = issued
    layers = lay([record], [record._replace(token_key=OTHER)])
    outcome = tap(shop, personalisation)
    assert isinstance(outcome, Approved)
    facts = outcome.record.facts()
    assert facts["snapshot_version"] == 7
    assert facts["limit_digest"] == record.digest(layers.base.header.nonce).hex()


def test_a_delta_never_extends_what_it_does_not_list(
    shop: Shop, issued: tuple[LimitRecord, Personalisation], lay: Lay
) -> None:
    record, personalisation = issued
    other = record._replace(token_key=OTHER)
    lay([record], [other], base_terms=EXPIRED)
    assert reason(tap(shop, personalisation)) is Reason.NO_VALID_LIMITS
    # Stale: the base's smaller cap, not the delta's.
    lay([record], [other], base_terms=STALE)
    assert reason(tap(shop, personalisation, 10_001)) is Reason.OVER_TAP_CAP
    assert isinstance(tap(shop, personalisation, 10_000), Approved)


def test_an_expired_delta_does_not_give_way_to_the_base(
    shop: Shop, issued: tuple[LimitRecord, Personalisation], lay: Lay
) -> None:
    record, personalisation = issued
    lay([record], [record], delta_terms=EXPIRED)
    assert reason(tap(shop, personalisation)) is Reason.NO_VALID_LIMITS


def test_a_token_that_the_delta_blocks(
    shop: Shop, issued: tuple[LimitRecord, Personalisation], lay: Lay
) -> None:
    record, personalisation = issued
    lay([record], [record._replace(status=Status.BLOCKED)])
    assert reason(tap(shop, personalisation)) is Reason.BLOCKED


def test_revoked_certificates_are_those_of_the_newest_publication(
    shop: Shop, issued: tuple[LimitRecord, Personalisation], lay: Lay
) -> None:
    record, personalisation = issued
    revoked = {"revoked_certificates": ((bytes.fromhex("91560001"), serial(shop, personalisation)),)}
    lay([record], None, base_terms=revoked)
    assert reason(tap(shop, personalisation)) is Reason.AUTHENTICATION_FAILED
    lay([record], [], delta_terms=revoked)
    assert reason(tap(shop, personalisation)) is Reason.AUTHENTICATION_FAILED
    lay([record], [], base_terms=revoked)
    assert isinstance(tap(shop, personalisation), Approved)


def serial(shop: Shop, personalisation: Personalisation) -> bytes:
    """The issuer certificate's, behind header, format, identifier and expiry (EMV 4.3 Book 2, Table 6)."""
    ca_key, certificate = shop.ledger.ca_keys[0], personalisation.issuer_certificate
    number = pow(int.from_bytes(certificate, "big"), ca_key.exponent, ca_key.modulus)
    return number.to_bytes(len(certificate), "big")[8:11]


def test_the_status_tells_of_both_layers(issued: tuple[LimitRecord, Personalisation], lay: Lay) -> None:
    record, _ = issued
    shown = _snapshot(lay([record], [record], base_terms=STALE), NOW_UNIX_S * 1000)
    assert shown is not None
    assert shown["version"] == 8
    assert shown["freshness"] == Freshness.STALE.value
    assert shown["delta"]["freshness"] == Freshness.FRESH.value
    assert "Limits 8 are fresh" in shown["sentence"]
    assert "Limits 7 should have been refreshed" in shown["sentence"]
    alone = _snapshot(lay([record], None), NOW_UNIX_S * 1000)
    assert alone is not None
    assert alone["delta"] is None
    assert (alone["version"], alone["freshness"]) == (7, "fresh")
