"""Journals and facts for the tests of this folder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.gateway.journal import Draft, Journal
from pos_gateway.records import Kind, uuid7

GATEWAY_ID = "gw-test"
NOW_UNIX_MS = 1_764_000_000_000
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def open_journal(path: Path, key: Ed25519PrivateKey = KEY, gateway_id: str = GATEWAY_ID) -> Journal:
    return Journal.open(path, gateway_key=key, gateway_id=gateway_id)


def new_id(number: int) -> UUID:
    return uuid7(NOW_UNIX_MS + number, random.Random(number).randbytes(10))


def sale(number: int, **changes: Any) -> Draft:
    """The authorization `number`: each of 19.30, one after the other on one token's counter line."""
    facts = {
        "sale_id": str(new_id(number)),
        "amount_minor": 1930,
        "at_unix_ms": NOW_UNIX_MS + number,
        "token_key": "ab" * 16,
        "token_last4": "1234",
        "counter_before": 1930 * number,
        "counter_after": 1930 * (number + 1),
    }
    return Draft(Kind.AUTHORIZATION, new_id(number), {**facts, **changes}, b"sealed proof")


def acknowledgement(number: int, verdict: str = "posted", reason: str = "") -> Draft:
    """What the ledger says of sale `number`."""
    facts = {
        "about": str(new_id(number)),
        "verdict": verdict,
        "reason": reason,
        "at_unix_ms": NOW_UNIX_MS + 500_000 + number,
    }
    return Draft(Kind.ACKNOWLEDGEMENT, new_id(500_000 + number), facts)
