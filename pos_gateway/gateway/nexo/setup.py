"""The POS interface's files, in `nexo/` of the gateway's home: who it is to a POS, and what they share.

certificate.pem, key.pem   TLS; made at the first start if missing, for this machine's own address
passphrase                 of the protocol's own encryption; without it only plain messages are taken
api-key                    plain messages must carry it as X-API-Key, if it is there
requests.sqlite3           what was asked and answered
address                    where the running gateway listens for POS software
"""

from __future__ import annotations

import ipaddress
import os
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pos_gateway.errors import InvalidConfiguration, InvalidInput
from pos_gateway.gateway.config import Nexo
from pos_gateway.gateway.nexo.crypto import NexoKey

_VALID: Final = timedelta(days=820)
_OTHERS: Final = 0o077
_MIN_API_KEY_CHARACTERS: Final = 16


@dataclass(frozen=True, slots=True)
class NexoFiles:
    folder: Path

    @property
    def certificate(self) -> Path:
        return self.folder / "certificate.pem"

    @property
    def key(self) -> Path:
        return self.folder / "key.pem"

    @property
    def passphrase(self) -> Path:
        return self.folder / "passphrase"

    @property
    def api_key(self) -> Path:
        return self.folder / "api-key"

    @property
    def requests(self) -> Path:
        return self.folder / "requests.sqlite3"

    @property
    def address(self) -> Path:
        return self.folder / "address"


@dataclass(frozen=True, slots=True)
class Secrets:
    key: NexoKey | None
    api_key: str | None = field(repr=False)


def prepare(files: NexoFiles, settings: Nexo) -> tuple[Secrets, ssl.SSLContext]:
    """What the server needs of the files.

    Raises:
        InvalidConfiguration: a secret others may read, a certificate that does not fit its key, or an
            address beyond this machine where anybody could start payments and refunds.
    """
    files.folder.mkdir(mode=0o700, exist_ok=True)
    if not files.certificate.exists() and not files.key.exists():
        make_certificate(files, settings.host)
    if files.key.exists():
        _check_private(files.key)
    passphrase, api_key = _secret(files.passphrase), _secret(files.api_key)
    if api_key is not None and len(api_key) < _MIN_API_KEY_CHARACTERS:
        raise InvalidConfiguration(f"under {_MIN_API_KEY_CHARACTERS} characters", where=str(files.api_key))
    if passphrase is None and not settings.plain:
        raise InvalidConfiguration(
            "plain messages are not taken and there is no passphrase",
            where="nexo.plain",
            advice=f"write one into {files.passphrase}",
        )
    if settings.plain and api_key is None and not _is_loopback(settings.host):
        raise InvalidConfiguration(
            "beyond this machine, plain messages need an API key: else anybody there could ask for refunds",
            where="nexo.host",
            advice=f"write one into {files.api_key}, or set plain = false and write {files.passphrase}",
        )
    key: NexoKey | None = None
    if passphrase is not None:
        try:
            key = NexoKey.derive(passphrase, settings.key_identifier, settings.key_version)
        except InvalidInput as error:
            raise InvalidConfiguration(error.reason, where=str(files.passphrase)) from None
    return Secrets(key, api_key), _tls(files)


def make_certificate(files: NexoFiles, host: str) -> None:
    """A self-signed certificate for `host` and this machine: POS software is given it to trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "POS Gateway")])
    names: list[x509.GeneralName] = [x509.DNSName("localhost")]
    for address in {"127.0.0.1", "::1", host}:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(address)))
        except ValueError:
            names.append(x509.DNSName(address))
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + _VALID)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with os.fdopen(os.open(files.key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(secret)
    files.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _tls(files: NexoFiles) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(files.certificate, files.key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidConfiguration(
            f"certificate and key cannot be used: {error}",
            where=str(files.certificate),
            advice="remove both to have new ones made",
        ) from None
    return context


def _secret(path: Path) -> str | None:
    if not path.exists():
        return None
    _check_private(path)
    try:
        return path.read_text("utf-8").strip()
    except UnicodeDecodeError:
        raise InvalidConfiguration("not text", where=str(path)) from None


def _check_private(path: Path) -> None:
    if path.stat().st_mode & _OTHERS:
        raise InvalidConfiguration("others may read it", where=str(path), advice=f"chmod 600 {path}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
