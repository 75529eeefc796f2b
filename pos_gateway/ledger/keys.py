"""The ledger's keys on disk: files of mode 0600 in one folder of mode 0700, loaded once.

Whoever signs asks `KeyRing` for a signer; that seam is where a hardware security module goes.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.x509.oid import NameOID

from pos_gateway.errors import InvalidConfiguration
from pos_gateway.ledger.certificates import RawRsaSigner

RSA_EXPONENT: Final = 3
CA_KEY_BITS: Final = 1984
ISSUER_KEY_BITS: Final = 1408
ICC_KEY_BITS: Final = 1152

_TLS_LIFE: Final = timedelta(days=3650)
_TOKEN_SECRET_BYTES: Final = 32
_MASTER_KEY_BYTES: Final = 16

_Key: TypeAlias = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | Ed25519PrivateKey | X25519PrivateKey


class FileRsaSigner:
    """A raw RSA signer over a key in memory."""

    def __init__(self, key: rsa.RSAPrivateKey) -> None:
        self._numbers = key.private_numbers()

    @property
    def modulus(self) -> int:
        return self._numbers.public_numbers.n

    @property
    def exponent(self) -> int:
        return self._numbers.public_numbers.e

    def sign(self, block: bytes) -> bytes:
        n = self._numbers
        message = int.from_bytes(block, "big")
        mod_p, mod_q = pow(message, n.dmp1, n.p), pow(message, n.dmq1, n.q)
        signature = mod_q + (mod_p - mod_q) * n.iqmp % n.p * n.q
        return signature.to_bytes(len(block), "big")


@dataclass(frozen=True, slots=True)
class TokenKey:
    """The secret by which token numbers become token keys, and the epoch it belongs to."""

    epoch: int
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class MasterKeys:
    """The issuer's 16-byte master keys, from which every card's own keys are derived."""

    index: int
    ac: bytes = field(repr=False)
    enc: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The ledger's keys but for those that sign what is published: see `signing`."""

    ca: RawRsaSigner = field(repr=False)
    issuer: RawRsaSigner = field(repr=False)
    master: MasterKeys
    token_key: TokenKey
    sealing: X25519PrivateKey = field(repr=False)
    tls_certificate: Path
    tls_key: Path

    @property
    def tls_fingerprint(self) -> bytes:
        """SHA-256 of the TLS certificate's DER: what an enrolment code pins."""
        certificate = x509.load_pem_x509_certificate(self.tls_certificate.read_bytes())
        return certificate.fingerprint(hashes.SHA256())

    @classmethod
    def generate(cls, folder: Path, *, now: datetime) -> KeyRing:
        """Make every key and write it. The folder must not exist."""
        folder.mkdir(mode=0o700)
        for name, bits in (("ca", CA_KEY_BITS), ("issuer", ISSUER_KEY_BITS)):
            write_private_key(folder / f"{name}.pem", generate_rsa_key(bits))
        write_private_key(folder / "sealing.pem", X25519PrivateKey.generate())
        master = {name: _triple_des_key().hex() for name in ("ac", "enc")}
        write_secret(folder / "master.json", json.dumps({"index": 1, **master}).encode())
        token_key = {"epoch": 1, "secret": secrets.token_bytes(_TOKEN_SECRET_BYTES).hex()}
        write_secret(folder / "token.json", json.dumps(token_key).encode())
        _write_tls(folder, now)
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> KeyRing:
        """
        Raises:
            InvalidConfiguration: a key file is missing, unreadable, damaged, or open to other users.
        """
        master = _read_json(folder / "master.json")
        token_key = _read_json(folder / "token.json")
        _read_secret(folder / "tls.pem")
        try:
            return cls(
                ca=FileRsaSigner(read_private_key(folder / "ca.pem", rsa.RSAPrivateKey)),
                issuer=FileRsaSigner(read_private_key(folder / "issuer.pem", rsa.RSAPrivateKey)),
                master=MasterKeys(
                    int(master["index"]), bytes.fromhex(master["ac"]), bytes.fromhex(master["enc"])
                ),
                token_key=TokenKey(int(token_key["epoch"]), bytes.fromhex(token_key["secret"])),
                sealing=read_private_key(folder / "sealing.pem", X25519PrivateKey),
                tls_certificate=folder / "tls.crt",
                tls_key=folder / "tls.pem",
            )
        except (KeyError, TypeError, ValueError):
            raise InvalidConfiguration("a key file is damaged", where=str(folder)) from None


def generate_rsa_key(bits: int) -> rsa.RSAPrivateKey:
    """An RSA key with exponent 3, as EMV prefers (EMV 4.3 Book 2, Annex B2.1)."""
    return rsa.generate_private_key(public_exponent=RSA_EXPONENT, key_size=bits)


def write_secret(path: Path, content: bytes) -> None:
    """A new file that only its owner can read, on disk when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_private_key(path: Path, key: _Key) -> None:
    """As PKCS #8 into a new file of mode 0600."""
    write_secret(
        path,
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )


def _write_tls(folder: Path, now: datetime) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pos-gateway ledger")])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now.astimezone(UTC) - timedelta(days=1))
        .not_valid_after(now.astimezone(UTC) + _TLS_LIFE)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_private_key(folder / "tls.pem", key)
    write_secret(folder / "tls.crt", certificate.public_bytes(serialization.Encoding.PEM))


def _triple_des_key() -> bytes:
    """16 random bytes with odd parity; two equal halves would make it single DES."""
    while True:
        key = bytes(b ^ (b.bit_count() + 1 & 1) for b in secrets.token_bytes(_MASTER_KEY_BYTES))
        if key[:8] != key[8:]:
            return key


def _read_secret(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        mode = path.stat().st_mode
    except OSError as error:
        raise InvalidConfiguration(f"key file cannot be read ({error.strerror})", where=str(path)) from None
    if mode & 0o077:
        raise InvalidConfiguration(
            "key file is open to other users", where=str(path), advice=f"chmod 600 {path}"
        )
    return content


def read_private_key(path: Path, kind: Any) -> Any:
    """
    Raises:
        InvalidConfiguration: missing, open to other users, or not a key of this kind.
    """
    try:
        key = serialization.load_pem_private_key(_read_secret(path), password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, kind):
        raise InvalidConfiguration("not the kind of key that belongs here", where=str(path))
    return key


def _read_json(path: Path) -> dict[str, str]:
    try:
        value = json.loads(_read_secret(path))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InvalidConfiguration("key file is damaged", where=str(path))
    return value
