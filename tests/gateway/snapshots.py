"""Signed snapshots, and the enrolment whose pinned keys they are signed by."""

from __future__ import annotations

import io
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.enrolment import Enrolment, Merchant, SnapshotKey
from pos_gateway.limits.builder import build_snapshot
from pos_gateway.limits.header import RiskPolicy, SnapshotTerms
from pos_gateway.limits.record import LimitRecord, Status
from tests.gateway.journalling import GATEWAY_ID, NOW_UNIX_MS

NOW_UNIX_S = NOW_UNIX_MS // 1000
SIGNER = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
TOKEN_KEY = bytes(range(16))


def enrolment() -> Enrolment:
    return Enrolment(
        gateway_id=GATEWAY_ID,
        terminal_id="T0000001",
        merchant=Merchant(id="CORNERSHOP", name="Corner shop", category="5411"),
        issuer="Test Issuer",
        currency="CNY",
        country_numeric=156,
        snapshot_keys=(SnapshotKey(id="k1", public_key=SIGNER.public_key().public_bytes_raw()),),
        snapshot_threshold=1,
        token_key_epoch=1,
        token_key_secret=b"\x02" * 32,
        ca_keys=(),
        sealing_key=b"\x03" * 32,
    )


def snapshot(version: int, *, signer: Ed25519PrivateKey = SIGNER, **changes: Any) -> bytes:
    """A whole snapshot with one record, whose ceiling tells its version."""
    fields: dict[str, Any] = {
        "issuer": "Test Issuer",
        "currency": "CNY",
        "version": version,
        "nonce": bytes(16),
        "valid_from_unix_s": NOW_UNIX_S - 60,
        "refresh_after_unix_s": NOW_UNIX_S + 3600,
        "valid_until_unix_s": NOW_UNIX_S + 86_400,
        "token_key_epoch": 1,
        "policy": RiskPolicy(
            stale_per_tap_cap_minor=20_000, presentment_deadline_s=86_400, clock_tolerance_s=300
        ),
    }
    record = LimitRecord(
        token_key=TOKEN_KEY,
        ceiling=version * 1000,
        per_tap_cap_minor=50_000,
        sequence=version,
        status=Status.ACTIVE,
        assurance=1,
        instalment_class=0,
    )
    out = io.BytesIO()
    build_snapshot(out.write, [record], SnapshotTerms(**{**fields, **changes}), {"k1": signer})
    return out.getvalue()
