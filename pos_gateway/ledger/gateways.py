"""Merchants and the gateways in their shops: one-time codes out, enrolments in; and which of them are
suspended or revoked, by whom and why.

All functions run inside a transaction of the caller's.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import uuid
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pos_gateway.enrolment import ENROLMENT_SECRET_BYTES, Merchant
from pos_gateway.errors import AuthenticationFailed, Conflict, InvalidInput, InvalidMessage, NotFound
from pos_gateway.ledger import store
from pos_gateway.ledger.accounts import new_id
from pos_gateway.ledger.keys import fsync_folder, write_secret

CODE_LIFE_S: Final = 24 * 3600

_CODE_DOMAIN: Final = b"pos-gateway enrolment code 1\0"
_TERMINAL_DIGITS: Final = 7
_MAX_NAME_CHARACTERS: Final = 64
_MAX_REASON_CHARACTERS: Final = 200


class GatewayStatus(Enum):
    ACTIVE = "active"
    SUSPENDED = "suspended"
    """Under suspicion: it keeps its certificate, but what it brings is not taken until it is reinstated."""
    REVOKED = "revoked"
    """For good: none of its certificates counts, and it gets no other."""


class Action(Enum):
    SUSPEND = "suspend"
    REVOKE = "revoke"
    REINSTATE = "reinstate"
    """Ends a suspension. For a gateway that was away for long, its grace begins anew."""

    @property
    def leads_to(self) -> GatewayStatus:
        return {
            Action.SUSPEND: GatewayStatus.SUSPENDED,
            Action.REVOKE: GatewayStatus.REVOKED,
            Action.REINSTATE: GatewayStatus.ACTIVE,
        }[self]


@dataclass(frozen=True, slots=True)
class GatewayAction:
    """What somebody decided about a gateway."""

    action: Action
    by: str
    reason: str
    at_unix_ms: int


@dataclass(frozen=True, slots=True)
class Gateway:
    """One enrolled gateway. `certificate_until_unix_ms`: the end of its newest certificate that counts."""

    id: str
    terminal_id: str
    merchant: Merchant
    enrolled_unix_ms: int
    last_presented_unix_ms: int | None
    public_key: bytes = field(repr=False)
    status: GatewayStatus = GatewayStatus.ACTIVE
    status_since_unix_ms: int = 0
    certificate_until_unix_ms: int | None = None

    @property
    def key(self) -> Ed25519PublicKey:
        return Ed25519PublicKey.from_public_bytes(self.public_key)

    def require(self, *allowed: GatewayStatus) -> None:
        """
        Raises:
            AuthenticationFailed: step `gateway`: it is revoked or suspended, and that is not allowed here.
        """
        if self.status in allowed:
            return
        if self.status is GatewayStatus.REVOKED:
            raise AuthenticationFailed(
                "this gateway was revoked by the issuer",
                step="gateway",
                advice="call the issuer; keep this machine and its disk, payments may wait on it",
            )
        raise AuthenticationFailed(
            "this gateway is suspended by the issuer",
            step="gateway",
            advice="call the issuer; payments that it presents are held for review",
        )


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
    """Use up a one-time secret and enter the gateway. The same gateway may ask again with the same secret:
    the answer may have been lost. That it holds the key was checked before.

    Raises:
        AuthenticationFailed: step `enrolment code`: never given out, expired, or used by another gateway.
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
    if code.used_unix_ms is not None and code.gateway_id is not None and now_unix_ms < code.expires_unix_ms:
        known = find(connection, code.gateway_id)
        if hmac.compare_digest(known.public_key, public_key):
            known.require(GatewayStatus.ACTIVE)
            return known
    if code.used_unix_ms is not None:
        raise _refused("it has been used already")
    if now_unix_ms >= code.expires_unix_ms:
        raise _refused("it has expired")
    if connection.execute(sa.select(store.gateways.c.id).filter_by(public_key=public_key)).first():
        raise Conflict("this gateway key is enrolled already", advice="make a new key for a new enrolment")
    gateway_id = new_id("gw")
    connection.execute(
        store.enrolment_codes.update()
        .filter_by(secret_hash=digest)
        .values(used_unix_ms=now_unix_ms, gateway_id=gateway_id)
    )
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


def act(
    connection: sa.Connection, gateway_id: str, action: Action, *, by: str, reason: str, now_unix_ms: int
) -> None:
    """Suspend, revoke or reinstate a gateway: in force at every replica from the next request on.

    Raises:
        NotFound: no such gateway.
        Conflict: it was revoked, which is for good.
        InvalidInput: nobody is named, no reason, or too long a text.
    """
    for where, text, most in (("by", by, _MAX_NAME_CHARACTERS), ("reason", reason, _MAX_REASON_CHARACTERS)):
        if not 0 < len(text.strip()) <= most or not text.isprintable():
            raise InvalidInput(f"must be 1 to {most} printable characters", where=where)
    rows = store.gateways
    status = connection.scalar(sa.select(rows.c.status).filter_by(id=gateway_id).with_for_update())
    if status is None:
        raise NotFound(f"there is no gateway {gateway_id}", advice="`pos-gateway ledger gateway list`")
    if status == GatewayStatus.REVOKED.value:
        raise Conflict(
            f"gateway {gateway_id} was revoked, and that is for good",
            advice="to trust this shop again, invite it anew: `pos-gateway ledger gateway invite`",
        )
    connection.execute(
        rows.update()
        .filter_by(id=gateway_id)
        .values(status=action.leads_to.value, status_since_unix_ms=now_unix_ms)
    )
    if action is Action.REVOKE:
        connection.execute(
            store.certificates.update()
            .filter_by(gateway_id=gateway_id, revoked_unix_ms=None)
            .values(revoked_unix_ms=now_unix_ms)
        )
    connection.execute(
        store.gateway_actions.insert().values(
            id=uuid.uuid4(),
            gateway_id=gateway_id,
            action=action.value,
            by=by.strip(),
            reason=reason.strip(),
            at_unix_ms=now_unix_ms,
        )
    )


def remember_revoked(folder: Path, gateway_id: str, *, by: str, reason: str) -> None:
    """Outside the database, which may be restored from before: durable when this returns."""
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{gateway_id}.json"
    if not path.exists():
        write_secret(path, json.dumps({"by": by.strip(), "reason": reason.strip()}).encode())
    fsync_folder(folder)
    fsync_folder(folder.parent)


def replay_revoked(connection: sa.Connection, folder: Path, now_unix_ms: int) -> int:
    """Revoke again what a restored database has forgotten; returns how many those were."""
    forgotten = 0
    for path in sorted(folder.glob("*.json")):
        status = connection.scalar(sa.select(store.gateways.c.status).filter_by(id=path.stem))
        if status is None or status == GatewayStatus.REVOKED.value:
            continue
        try:
            known = json.loads(path.read_bytes())
            by, reason = str(known["by"]), str(known["reason"])
        except (ValueError, KeyError, TypeError):  # cut short by a crash: that it is there is what counts
            by, reason = "unknown", "revoked before the database was restored"
        act(connection, path.stem, Action.REVOKE, by=by, reason=reason, now_unix_ms=now_unix_ms)
        forgotten += 1
    return forgotten


def actions(connection: sa.Connection, gateway_id: str) -> tuple[GatewayAction, ...]:
    """What was decided about a gateway, oldest first."""
    query = sa.select(store.gateway_actions).filter_by(gateway_id=gateway_id)
    return tuple(
        GatewayAction(Action(row.action), row.by, row.reason, row.at_unix_ms)
        for row in connection.execute(query.order_by(store.gateway_actions.c.at_unix_ms))
    )


def every(connection: sa.Connection) -> tuple[Gateway, ...]:
    """All gateways, oldest first."""
    return _select(connection, sa.true())


def _select(connection: sa.Connection, condition: sa.ColumnElement[bool]) -> tuple[Gateway, ...]:
    merchants, gateways = store.merchants, store.gateways
    certificates = store.certificates.c
    until = (
        sa.select(sa.func.max(certificates.not_after_unix_ms))
        .where(certificates.gateway_id == gateways.c.id, certificates.revoked_unix_ms.is_(None))
        .scalar_subquery()
    )
    query = (
        sa.select(gateways, merchants.c.name, merchants.c.category, until.label("certificate_until_unix_ms"))
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
            status=GatewayStatus(row.status),
            status_since_unix_ms=row.status_since_unix_ms,
            certificate_until_unix_ms=row.certificate_until_unix_ms,
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
