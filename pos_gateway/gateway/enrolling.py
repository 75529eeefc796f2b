"""Enrolling a gateway: a one-time code traded for a place at the ledger."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from pos_gateway.enrolment import Enrolment, EnrolmentRequest, parse_code
from pos_gateway.errors import AuthenticationFailed
from pos_gateway.gateway.certificate import TlsFile, check_certificate
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.identity import Enrolled, load_or_create_identity, store_enrolment
from pos_gateway.gateway.ledger_client import LedgerClient, fetch_authority


async def enroll(home: Home, url: str, code: str) -> Enrolment:
    """Trade a code and keep what it gives. Killed anywhere, the same code enrols the same gateway when it is
    tried again.

    Raises:
        InvalidMessage: not an enrolment code.
        AuthenticationFailed: the ledger does not know the code, or another gateway has used it.
        LedgerUnreachable: what answers is not the ledger of this code, or nothing does.
    """
    _, fingerprint = parse_code(code)
    home.create()
    device_key = load_or_create_identity(home.identity_key)
    tls_key = TlsFile(home.credentials).new_key()
    authority = await fetch_authority(url, fingerprint)
    async with LedgerClient(url, authority) as client:
        enrolment = await client.enrol(EnrolmentRequest.make(code, device_key, tls_key))
    if enrolment.authority != authority:
        raise AuthenticationFailed("not the one that the code pins", step="authority")
    keep_enrolment(home, url, enrolment, tls_key)
    return enrolment


def keep_enrolment(
    home: Home, url: str, enrolment: Enrolment, tls_key: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    """The certificate first: a gateway counts as enrolled once `enrolment.json` is there.

    Raises:
        Conflict: the gateway is enrolled already, otherwise.
        InvalidMessage, AuthenticationFailed: see `check_certificate`.
    """
    certificate = check_certificate(
        enrolment.certificate,
        key=tls_key.public_key(),
        gateway_id=enrolment.gateway_id,
        authority=enrolment.authority,
    )
    TlsFile(home.credentials).keep(tls_key, certificate)
    store_enrolment(home.enrolment, Enrolled(ledger_url=url, enrolment=enrolment))
    return certificate
