"""Signed snapshots, and the enrolment whose pinned keys they are signed by."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.metadata import Metadata, Root

from pos_gateway.distribution import key_id
from pos_gateway.enrolment import Enrolment, Merchant
from pos_gateway.gateway.feed import SnapshotFeed
from pos_gateway.gateway.journal import Journal
from pos_gateway.limits.builder import build_snapshot
from pos_gateway.limits.header import RiskPolicy, SnapshotTerms
from pos_gateway.limits.layers import Layers
from pos_gateway.limits.record import LimitRecord, Status
from tests.gateway.issuer import LIMIT_KEY, NOW_UNIX_S, make_root
from tests.gateway.journalling import GATEWAY_ID, NOW_UNIX_MS

SIGNER = LIMIT_KEY.private
TOKEN_KEY = bytes(range(16))


def enrolment(root: Metadata[Root] | None = None) -> Enrolment:
    return Enrolment(
        gateway_id=GATEWAY_ID,
        terminal_id="T0000001",
        merchant=Merchant(id="CORNERSHOP", name="Corner shop", category="5411"),
        issuer="Test Issuer",
        currency="CNY",
        country_numeric=156,
        enrolled_unix_s=NOW_UNIX_S - 86_400,
        trusted_root=(root or make_root()).to_bytes(),
        token_key_epoch=1,
        token_key_secret=b"\x02" * 32,
        ca_keys=(),
        sealing_key=b"\x03" * 32,
        authority=b"\x04",
        certificate=b"\x05",
    )


def record(version: int, token_key: bytes = TOKEN_KEY) -> LimitRecord:
    """Its ceiling tells its version."""
    return LimitRecord(
        token_key=token_key,
        ceiling=version * 1000,
        per_tap_cap_minor=50_000,
        sequence=version,
        status=Status.ACTIVE,
        assurance=1,
        instalment_class=0,
    )


def snapshot(
    version: int,
    records: Sequence[LimitRecord] | None = None,
    *,
    signers: Sequence[Ed25519PrivateKey] = (SIGNER,),
    **changes: Any,
) -> bytes:
    """A snapshot, whole unless `base_version` is given, of one record if none is given."""
    fields: dict[str, Any] = {
        "issuer": "Test Issuer",
        "currency": "CNY",
        "version": version,
        "nonce": version.to_bytes(16, "big"),
        "valid_from_unix_s": NOW_UNIX_S - 60,
        "refresh_after_unix_s": NOW_UNIX_S + 3600,
        "valid_until_unix_s": NOW_UNIX_S + 86_400,
        "token_key_epoch": 1,
        "policy": RiskPolicy(
            stale_per_tap_cap_minor=20_000, presentment_deadline_s=86_400, clock_tolerance_s=300
        ),
    }
    out = io.BytesIO()
    build_snapshot(
        out.write,
        [record(version)] if records is None else records,
        SnapshotTerms(**{**fields, **changes}),
        {key_id(signer.public_key()): signer for signer in signers},
    )
    return out.getvalue()


def new_feed(folder: Path, journal: Journal, **changes: Any) -> SnapshotFeed:
    """A feed at the time of `NOW_UNIX_MS`, which may fill the disk to the last byte."""
    settings: dict[str, Any] = {
        "enrolment": enrolment(),
        "clock": lambda: NOW_UNIX_MS,
        "keep_free_bytes": 0,
    }
    return SnapshotFeed(folder, journal, **{**settings, **changes})


def ceiling(current: Layers | None, token_key: bytes = TOKEN_KEY) -> int:
    assert current is not None
    found, _ = current.lookup(token_key)
    assert found is not None
    return found.ceiling


def names(folder: Path) -> set[str]:
    """What a feed keeps beside its metadata."""
    return {path.name for path in folder.iterdir() if path.name != "metadata"}
