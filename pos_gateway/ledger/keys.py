"""The ledger's keys on disk: files of mode 0600 in one folder of mode 0700, loaded once.

Whoever signs asks `KeyRing` for a signer; that seam is where a hardware security module goes.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pos_gateway.errors import InvalidConfiguration
from pos_gateway.ledger.authority import Authority
from pos_gateway.ledger.certificates import RawRsaSigner

RSA_EXPONENT: Final = 3
CA_KEY_BITS: Final = 1984
ISSUER_KEY_BITS: Final = 1408
ICC_KEY_BITS: Final = 1152

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
    authority: Authority
    tls: Path
    """The server's key and certificate in one file, so that they can only be replaced together."""

    @property
    def tls_certificate(self) -> x509.Certificate:
        """The server's certificate of now: it is renewed while the ledger serves.

        Raises:
            InvalidConfiguration: the file is missing, damaged, or open to other users.
        """
        return _read_certificate(self.tls)

    def renew_tls(self, now: datetime) -> None:
        """A new key and certificate for the server, from the next connection on. Durable when this
        returns; killed on the way, the old ones stay."""
        _write_tls(self.tls, self.authority, now)

    @classmethod
    def generate(cls, folder: Path, *, now: datetime, issuer: str = "") -> KeyRing:
        """Make every key and write it. The folder must not exist."""
        folder.mkdir(mode=0o700)
        for name, bits in (("ca", CA_KEY_BITS), ("issuer", ISSUER_KEY_BITS)):
            write_private_key(folder / f"{name}.pem", generate_rsa_key(bits))
        write_private_key(folder / "sealing.pem", X25519PrivateKey.generate())
        master = {name: _triple_des_key().hex() for name in ("ac", "enc")}
        write_secret(folder / "master.json", json.dumps({"index": 1, **master}).encode())
        token_key = {"epoch": 1, "secret": secrets.token_bytes(_TOKEN_SECRET_BYTES).hex()}
        write_secret(folder / "token.json", json.dumps(token_key).encode())
        make_authority(folder, now=now, issuer=issuer)
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> KeyRing:
        """
        Raises:
            InvalidConfiguration: a key file is missing, unreadable, damaged, or open to other users.
        """
        master = _read_json(folder / "master.json")
        token_key = _read_json(folder / "token.json")
        _read_certificate(folder / "tls.pem")
        try:
            return cls(
                ca=FileRsaSigner(read_private_key(folder / "ca.pem", rsa.RSAPrivateKey)),
                issuer=FileRsaSigner(read_private_key(folder / "issuer.pem", rsa.RSAPrivateKey)),
                master=MasterKeys(
                    int(master["index"]), bytes.fromhex(master["ac"]), bytes.fromhex(master["enc"])
                ),
                token_key=TokenKey(int(token_key["epoch"]), bytes.fromhex(token_key["secret"])),
                sealing=read_private_key(folder / "sealing.pem", X25519PrivateKey),
                authority=Authority(
                    _read_certificate(folder / "authority.crt"),
                    read_private_key(folder / "authority.pem", ec.EllipticCurvePrivateKey),
                ),
                tls=folder / "tls.pem",
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
    write_secret(path, _pem(key))


def _pem(key: _Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def make_authority(folder: Path, *, now: datetime, issuer: str) -> None:
    """The certificate authority and the server's first certificate under it, unless they are there; for a
    ledger from before there was one, too. Killed anywhere, it is whole when it is tried again."""
    certificate = folder / "authority.crt"
    if certificate.exists():
        return
    (folder / "authority.pem").unlink(missing_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    authority = Authority.create(key, issuer, now)
    write_private_key(folder / "authority.pem", key)
    _write_tls(folder / "tls.pem", authority, now)
    write_secret(certificate, authority.certificate.public_bytes(serialization.Encoding.PEM))


def _write_tls(path: Path, authority: Authority, now: datetime) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = authority.certify_server(key.public_key(), now)
    # Replicas share this folder, and two may do this at once: each has a file of its own, the last wins.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        write_secret(temporary, _pem(key) + certificate.public_bytes(serialization.Encoding.PEM))
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync_folder(path.parent)


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


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read_secret(path))
    except ValueError:
        raise InvalidConfiguration("holds no certificate", where=str(path)) from None


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
