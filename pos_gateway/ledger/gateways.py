"""Merchants and the gateways in their shops: one-time codes out, enrolments in.

All functions run inside a transaction of the caller's.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from typing import Final

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pos_gateway.enrolment import ENROLMENT_SECRET_BYTES, Merchant
from pos_gateway.errors import AuthenticationFailed, Conflict, InvalidMessage
from pos_gateway.ledger import store
from pos_gateway.ledger.accounts import new_id

CODE_LIFE_S: Final = 24 * 3600

_CODE_DOMAIN: Final = b"pos-gateway enrolment code 1\0"
_TERMINAL_DIGITS: Final = 7


@dataclass(frozen=True, slots=True)
class Gateway:
    """One enrolled gateway."""

    id: str
    terminal_id: str
    merchant: Merchant
    enrolled_unix_ms: int
    last_presented_unix_ms: int | None
    public_key: bytes = field(repr=False)

    @property
    def key(self) -> Ed25519PublicKey:
        return Ed25519PublicKey.from_public_bytes(self.public_key)


def invite(
    connection: sa.Connection, merchant: Merchant, *, now_unix_ms: int, life_s: int = CODE_LIFE_S
) -> bytes:
    """A new one-time secret for one gateway of this merchant. Only its hash is kept.

    Raises:
        Conflict: the merchant id stands for another name or category.
    """
    known = connection.execute(sa.select(store.merchants).filter_by(id=merchant.id)).first()
    if known is None:
        connection.execute(store.merchants.insert().values(**merchant.model_dump()))
    elif (known.name, known.category) != (merchant.name, merchant.category):
        raise Conflict(
            f"merchant {merchant.id} is {known.name!r}, category {known.category}",
            advice="invite with these, or choose another merchant id",
        )
    secret = secrets.token_bytes(ENROLMENT_SECRET_BYTES)
    connection.execute(
        store.enrolment_codes.insert().values(
            secret_hash=_hash(secret),
            merchant_id=merchant.id,
            expires_unix_ms=now_unix_ms + life_s * 1000,
        )
    )
    return secret


def enrol(connection: sa.Connection, secret: bytes, public_key: bytes, *, now_unix_ms: int) -> Gateway:
    """Use up a one-time secret and enter the gateway.

    Raises:
        AuthenticationFailed: step `enrolment code`: never given out, expired, or used.
        Conflict: this gateway key is enrolled already.
        InvalidMessage: the public key is not one.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public_key)
    except ValueError:
        raise InvalidMessage("not an Ed25519 public key of 32 bytes", where="public_key") from None
    digest = _hash(secret)
    code = connection.execute(
        sa.select(store.enrolment_codes).filter_by(secret_hash=digest).with_for_update()
    ).first()
    if code is None or not hmac.compare_digest(code.secret_hash, digest):
        raise _refused("it was not given out by this ledger")
    if code.used_unix_ms is not None:
        raise _refused("it has been used already")
    if now_unix_ms >= code.expires_unix_ms:
        raise _refused("it has expired")
    if connection.execute(sa.select(store.gateways.c.id).filter_by(public_key=public_key)).first():
        raise Conflict("this gateway key is enrolled already", advice="make a new key for a new enrolment")
    connection.execute(
        store.enrolment_codes.update().filter_by(secret_hash=digest).values(used_unix_ms=now_unix_ms)
    )
    gateway_id = new_id("gw")
    connection.execute(
        store.gateways.insert().values(
            id=gateway_id,
            terminal_id=_new_terminal_id(connection),
            merchant_id=code.merchant_id,
            public_key=public_key,
            enrolled_unix_ms=now_unix_ms,
        )
    )
    return find(connection, gateway_id)


def find(connection: sa.Connection, gateway_id: str) -> Gateway:
    """
    Raises:
        AuthenticationFailed: step `gateway`: not enrolled here.
    """
    for gateway in _select(connection, store.gateways.c.id == gateway_id):
        return gateway
    raise AuthenticationFailed(
        "this gateway is not enrolled with this ledger", step="gateway", advice="enrol it with a new code"
    )


def every(connection: sa.Connection) -> tuple[Gateway, ...]:
    """All gateways, oldest first."""
    return _select(connection, sa.true())


def _select(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> tuple[Gateway, ...]:
    merchants, gateways = store.merchants, store.gateways
    query = (
        sa.select(gateways, merchants.c.name, merchants.c.category)
        .join(merchants, gateways.c.merchant_id == merchants.c.id)
        .where(condition)
        .order_by(gateways.c.enrolled_unix_ms, gateways.c.id)
    )
    return tuple(
        Gateway(
            id=row.id,
            terminal_id=row.terminal_id,
            merchant=Merchant(id=row.merchant_id, name=row.name, category=row.category),
            enrolled_unix_ms=row.enrolled_unix_ms,
            last_presented_unix_ms=row.last_presented_unix_ms,
            public_key=row.public_key,
        )
        for row in connection.execute(query)
    )


def _new_terminal_id(connection: sa.Connection) -> str:
    while True:
        terminal_id = "T" + str(secrets.randbelow(10**_TERMINAL_DIGITS)).zfill(_TERMINAL_DIGITS)
        if (
            connection.execute(sa.select(store.gateways.c.id).filter_by(terminal_id=terminal_id)).first()
            is None
        ):
            return terminal_id


def _hash(secret: bytes) -> bytes:
    return hashlib.sha256(_CODE_DOMAIN + secret).digest()


def _refused(reason: str) -> AuthenticationFailed:
    return AuthenticationFailed(
        reason, step="enrolment code", advice="ask for a new code: `pos-gateway ledger gateway invite`"
    )
