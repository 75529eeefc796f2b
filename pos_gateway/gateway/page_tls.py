"""TLS for the page and the local API, where they are reached over the shop's network: the shop's own
certificate, or one made here and signed by itself."""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pos_gateway.errors import InvalidConfiguration

_LIFE: Final = timedelta(days=825)
_RENEW_BEFORE: Final = timedelta(days=30)


def server_context(certificate: Path) -> ssl.SSLContext:
    """
    Raises:
        InvalidConfiguration: there is no key with a certificate in that file.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate)
    except (OSError, ssl.SSLError):
        raise InvalidConfiguration(
            "no readable key with its certificate (PEM)",
            where=str(certificate),
            advice="leave [http] certificate empty to have one made",
        ) from None
    return context


def client_context(certificate: Path) -> ssl.SSLContext:
    """For this machine's own programs: they trust exactly what the server shows, whatever its name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cafile=certificate)
    return context


def self_signed(path: Path, names: Sequence[str], now: datetime | None = None) -> str:
    """Make the certificate if there is none that is good for another month and for these names; returns
    its SHA-256 fingerprint, for whoever opens the page from another machine to compare."""
    now = now or datetime.now(UTC)
    wanted = {_alternative(name) for name in names}
    try:
        known = x509.load_pem_x509_certificate(path.read_bytes())
        held = set(known.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        if wanted <= held and known.not_valid_after_utc - now > _RENEW_BEFORE:
            return known.fingerprint(hashes.SHA256()).hex()
    except (OSError, ValueError, x509.ExtensionNotFound):
        pass  # none yet, or not one of ours: made anew
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "POS Gateway")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + _LIFE)
        .add_extension(x509.SubjectAlternativeName(sorted(wanted, key=str)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(Encoding.PEM) + key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    temporary = path.with_name(path.name + ".new")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(pem)
    temporary.replace(path)
    return made.fingerprint(hashes.SHA256()).hex()


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return x509.DNSName(name)
