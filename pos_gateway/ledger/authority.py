"""The ledger's certificate authority: who may say to be the ledger, and which gateway one is.

One self-signed certificate, pinned by every enrolment code, and two kinds under it: the server's, good for
being the ledger and nothing else, and the gateways', good for being one gateway and nothing else. Pure but
for the key, which may be a file or a token (see `signers`).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pos_gateway.errors import AuthenticationFailed

AUTHORITY_LIFE: Final = timedelta(days=20 * 365)
SERVER_LIFE: Final = timedelta(days=397)

_BEGINNING: Final = datetime(1970, 1, 1, tzinfo=UTC)
"""What a shop checks is valid from here on: a clock that lies behind must not keep a shop from the ledger,
which is what could tell it so."""
_SERVER_NAME: Final = "pos-gateway ledger"


@dataclass(frozen=True, slots=True)
class Presented:
    """A client certificate as a gateway showed it; that it is of this authority was checked with TLS."""

    serial: bytes
    gateway_id: str

    @classmethod
    def read(cls, der: bytes) -> Presented:
        """
        Raises:
            AuthenticationFailed: step `client certificate`: it names no gateway.
        """
        try:
            certificate = x509.load_der_x509_certificate(der)
            [name] = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        except ValueError:
            raise AuthenticationFailed("it names no gateway", step="client certificate") from None
        return cls(serial=serial_bytes(certificate), gateway_id=str(name.value))


@dataclass(frozen=True, slots=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def create(cls, key: ec.EllipticCurvePrivateKey, issuer: str, now: datetime) -> Authority:
        """A new authority with this key."""
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{issuer} ledger authority"[:64])])
        certificate = (
            _builder(name, name, key.public_key(), _BEGINNING, now + AUTHORITY_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the authority's certificate (DER): what an enrolment code pins."""
        return self.certificate.fingerprint(hashes.SHA256())

    def certify_server(self, key: ec.EllipticCurvePublicKey, now: datetime) -> x509.Certificate:
        """The names in it are for tools: a gateway asks for no name but for this authority."""
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = self._leaf(
            _SERVER_NAME, key, _BEGINNING, now + SERVER_LIFE, ExtendedKeyUsageOID.SERVER_AUTH
        )
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def certify_gateway(
        self, gateway_id: str, key: ec.EllipticCurvePublicKey, now: datetime, life: timedelta
    ) -> x509.Certificate:
        return self._leaf(gateway_id, key, now, now + life, ExtendedKeyUsageOID.CLIENT_AUTH).sign(
            self.key, hashes.SHA256()
        )

    def _leaf(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        not_before: datetime,
        not_after: datetime,
        usage: x509.ObjectIdentifier,
    ) -> x509.CertificateBuilder:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        own = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return (
            _builder(subject, self.certificate.subject, key, not_before, min(not_after, self._expires))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
            .add_extension(own, critical=False)
        )

    @property
    def _expires(self) -> datetime:
        return self.certificate.not_valid_after_utc


def serial_bytes(certificate: x509.Certificate) -> bytes:
    """A serial number as the books keep it: 20 bytes (RFC 5280 §4.1.2.2)."""
    return certificate.serial_number.to_bytes(20, "big")


def nearly_over(certificate: x509.Certificate, now: datetime) -> bool:
    """Is less than a third of a server certificate's life left?"""
    return now > certificate.not_valid_after_utc - SERVER_LIFE / 3


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    not_before: datetime,
    not_after: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )


def _key_usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )
