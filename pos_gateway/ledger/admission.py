"""Who is let in: every client certificate that was given out has a row, and is asked for at every request.

With the first use of a certificate all that the gateway was given before it are over. All functions run
inside a transaction of the caller's.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Final

import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from pos_gateway.enrolment import CertificateRequest, read_request
from pos_gateway.errors import AuthenticationFailed, CertificateLapsed, Unavailable
from pos_gateway.ledger import gateways, store
from pos_gateway.ledger.authority import Authority, Presented, serial_bytes
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.gateways import Gateway, GatewayStatus

_MOST_A_DAY: Final = 24
_MOST_A_LIFE: Final = 6
_DAY_S: Final = 24 * 3600
_ASKS_AGAIN: Final = "the gateway asks for another by itself when it reaches the ledger"


def certify(
    connection: sa.Connection,
    authority: Authority,
    gateway: Gateway,
    request: bytes,
    policy: Policy,
    now_unix_ms: int,
) -> x509.Certificate:
    """A new certificate for this gateway. Those it has go on until this one is used: whether this one ever
    reaches it nobody knows.

    Raises:
        InvalidMessage: see `read_request`.
        Unavailable: it has asked for too many today.
    """
    key = read_request(request)
    rows = store.certificates
    connection.execute(sa.select(store.gateways.c.id).filter_by(id=gateway.id).with_for_update())
    lately = sa.select(sa.func.count()).where(
        rows.c.gateway_id == gateway.id, rows.c.issued_unix_ms > now_unix_ms - _DAY_S * 1000
    )
    if (connection.scalar(lately) or 0) >= _MOST_A_DAY + _MOST_A_LIFE * _DAY_S // policy.certificate_life_s:
        raise Unavailable("this gateway has asked for too many certificates", advice="try again tomorrow")
    number = sa.select(sa.func.max(rows.c.number)).filter_by(gateway_id=gateway.id)
    now = datetime.fromtimestamp(now_unix_ms // 1000, UTC)
    certificate = authority.certify_gateway(
        gateway.id, key, now, timedelta(seconds=policy.certificate_life_s)
    )
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    connection.execute(
        rows.insert().values(
            serial=serial_bytes(certificate),
            gateway_id=gateway.id,
            number=(connection.scalar(number) or 0) + 1,
            public_key_digest=hashlib.sha256(spki).digest(),
            issued_unix_ms=now_unix_ms,
            not_after_unix_ms=int(certificate.not_valid_after_utc.timestamp() * 1000),
        )
    )
    return certificate


def renew(
    connection: sa.Connection,
    authority: Authority,
    request: CertificateRequest,
    policy: Policy,
    now_unix_ms: int,
) -> x509.Certificate:
    """The next certificate of an enrolled gateway, asked for by its device key. Its certificate may have
    expired, but not longer ago than the policy's grace, unless it was reinstated since.

    Raises:
        AuthenticationFailed: steps `gateway` (unknown, revoked, away for too long), `device signature`.
        InvalidMessage, Unavailable: see `certify`.
    """
    gateway = gateways.find(connection, request.gateway_id)
    request.verify(gateway.key)
    gateway.require(GatewayStatus.ACTIVE, GatewayStatus.SUSPENDED)
    rows = store.certificates.c
    last_ms = connection.scalar(
        sa.select(sa.func.max(rows.not_after_unix_ms)).where(rows.gateway_id == gateway.id)
    )
    since_ms = max(last_ms or gateway.enrolled_unix_ms, gateway.status_since_unix_ms)
    if now_unix_ms > since_ms + policy.certificate_grace_s * 1000:
        raise AuthenticationFailed(
            "its certificate expired too long ago",
            step="gateway",
            advice=f"call the issuer: `pos-gateway ledger gateway reinstate {gateway.id}` lets it in again",
        )
    return certify(connection, authority, gateway, request.request, policy, now_unix_ms)


def admit(connection: sa.Connection, presented: Presented, now_unix_ms: int) -> tuple[Gateway, bool]:
    """The gateway that shows this certificate, and whether it shows it for the first time: then
    `first_use` is due.

    Raises:
        AuthenticationFailed: steps `client certificate` (not one of ours), `gateway` (revoked).
        CertificateLapsed: expired, or replaced by one that was used.
    """
    row = connection.execute(sa.select(store.certificates).filter_by(serial=presented.serial)).first()
    if row is None or row.gateway_id != presented.gateway_id:
        raise AuthenticationFailed("not given out by this ledger", step="client certificate")
    gateway = gateways.find(connection, row.gateway_id)
    gateway.require(GatewayStatus.ACTIVE, GatewayStatus.SUSPENDED)
    if row.revoked_unix_ms is not None:
        raise CertificateLapsed(
            "a newer one was given out and used", step="client certificate", advice=_ASKS_AGAIN
        )
    if now_unix_ms > row.not_after_unix_ms:
        raise CertificateLapsed("it has expired", step="client certificate", advice=_ASKS_AGAIN)
    return gateway, row.first_used_unix_ms is None


def first_use(connection: sa.Connection, presented: Presented, now_unix_ms: int) -> None:
    """From now on none of the certificates counts that the gateway was given before this one."""
    rows = store.certificates
    connection.execute(sa.select(store.gateways.c.id).filter_by(id=presented.gateway_id).with_for_update())
    used = connection.execute(
        rows.update()
        .filter_by(serial=presented.serial, first_used_unix_ms=None, revoked_unix_ms=None)
        .values(first_used_unix_ms=now_unix_ms)
    )
    if used.rowcount:
        own = sa.select(rows.c.number).filter_by(serial=presented.serial).scalar_subquery()
        connection.execute(
            rows.update()
            .filter_by(gateway_id=presented.gateway_id, revoked_unix_ms=None)
            .where(rows.c.number < own)
            .values(revoked_unix_ms=now_unix_ms)
        )
