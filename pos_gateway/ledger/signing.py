"""Signing keys and what they sign, with nothing of the ledger beside: this runs on the signing machine too.

Five roles, each with keys and a threshold of its own:

    root        says who holds the others; off the network
    limits      sign the limits' headers; may be off the network
    targets     sign the list of files; may be off the network
    snapshot, timestamp    sign which list is the newest, every hour; on the server

A key is a file `ROLE-ID.pem` of mode 0600, its public half `ROLE-ID.pub` beside it.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Targets

from pos_gateway.distribution import LimitKeys, key_id
from pos_gateway.errors import AuthenticationFailed, InvalidConfiguration, InvalidMessage, NotFound
from pos_gateway.ledger.keys import read_private_key, write_private_key, write_secret
from pos_gateway.limits.header import SnapshotHeader, sign_header, verify_header

_MAX_FILE_BYTES: Final = 16 * 1024 * 1024


class Role(Enum):
    ROOT = "root"
    TARGETS = "targets"
    SNAPSHOT = "snapshot"
    TIMESTAMP = "timestamp"
    LIMITS = "limits"

    @property
    def in_tuf(self) -> bool:
        return self is not Role.LIMITS


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key with the role it was made for: what travels to the ledger."""

    role: Role
    key: Ed25519PublicKey

    @property
    def id(self) -> str:
        return key_id(self.key)

    def to_json(self) -> str:
        public = base64.b64encode(self.key.public_bytes_raw()).decode()
        return json.dumps({"role": self.role.value, "key_id": self.id, "public_key": public}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> PublicKey:
        """
        Raises:
            NotFound: no such file.
            InvalidConfiguration: no public key in it.
        """
        document = _read_json(path)
        try:
            raw = base64.b64decode(document["public_key"], validate=True)
            found = cls(Role(document["role"]), Ed25519PublicKey.from_public_bytes(raw))
        except (KeyError, TypeError, ValueError, binascii.Error):
            raise InvalidConfiguration("not a public signing key", where=str(path)) from None
        if document.get("key_id") != found.id:
            raise InvalidConfiguration("its key id is not that of its key", where=str(path))
        return found


@dataclass(frozen=True, slots=True)
class SigningKey:
    role: Role
    private: Ed25519PrivateKey = field(repr=False)

    @property
    def public(self) -> PublicKey:
        return PublicKey(self.role, self.private.public_key())

    @property
    def id(self) -> str:
        return self.public.id

    def write(self, folder: Path) -> Path:
        """Both halves into a folder, which is made if it is missing; returns the private half's path."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"{self.role.value}-{self.id}.pem"
        write_private_key(path, self.private)
        write_secret(path.with_suffix(".pub"), self.public.to_json().encode())
        return path

    @classmethod
    def read(cls, path: Path) -> SigningKey:
        """
        Raises:
            InvalidConfiguration: no such file, open to others, no Ed25519 key, or not named ROLE-….pem.
        """
        try:
            role = Role(path.name.partition("-")[0])
        except ValueError:
            raise InvalidConfiguration("its name does not begin with a role", where=str(path)) from None
        return cls(role, read_private_key(path, Ed25519PrivateKey))


@dataclass(frozen=True, slots=True)
class KeyChest:
    """The private signing keys that are here. Which of them count, the root metadata says."""

    keys: Mapping[str, SigningKey] = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> KeyChest:
        found = [SigningKey.read(path) for path in sorted(folder.glob("*.pem"))]
        return cls({key.id: key for key in found})

    def of(self, role: Role) -> list[SigningKey]:
        return [key for key in self.keys.values() if key.role is role]


def new_signing_key(role: Role) -> SigningKey:
    return SigningKey(role, Ed25519PrivateKey.generate())


def tuf_key(key: Ed25519PublicKey) -> SSlibKey:
    return SSlibKey.from_crypto(key, keyid=key_id(key))


def sign_metadata(metadata: Metadata[Any], keys: Iterable[SigningKey]) -> list[str]:
    """Add the signatures of those keys that are for this kind of metadata; returns their ids."""
    signed = []
    for key in keys:
        if key.role.value == metadata.signed.type:
            metadata.sign(CryptoSigner(key.private, tuf_key(key.public.key)), append=True)
            signed.append(key.id)
    return signed


@dataclass(slots=True)
class HeaderToSign:
    name: str
    header: bytes
    signatures: dict[str, bytes]


@dataclass(slots=True)
class SigningRequest:
    """The headers of one version, whole and deltas, on their way to the limit-signing keys and back."""

    version: int
    headers: list[HeaderToSign]

    def sign(self, keys: Iterable[SigningKey]) -> list[str]:
        signed = []
        for key in keys:
            if key.role is Role.LIMITS:
                for header in self.headers:
                    header.signatures[key.id] = sign_header(header.header, key.private)
                signed.append(key.id)
        return signed

    def missing(self, trusted: LimitKeys) -> int:
        """How many more limit keys must sign. Signatures of keys that are none of them count for nothing.

        Raises:
            AuthenticationFailed: a signature of a trusted key is wrong.
        """
        missing = 0
        for header in self.headers:
            known = {name: s for name, s in header.signatures.items() if name in trusted.keys}
            if known:
                verify_header(header.header, known, trusted.keys, 1)
            missing = max(missing, trusted.threshold - len(known))
        return missing

    def to_json(self) -> str:
        headers = [
            {
                "name": header.name,
                "header": base64.b64encode(header.header).decode(),
                "signatures": {
                    name: base64.b64encode(signature).decode()
                    for name, signature in sorted(header.signatures.items())
                },
            }
            for header in self.headers
        ]
        return json.dumps({"limits": self.version, "headers": headers}, indent=1) + "\n"

    @classmethod
    def of(cls, document: Mapping[str, Any], where: str) -> SigningRequest:
        """
        Raises:
            InvalidMessage: not such a request, or a header in it is none, or of another version.
        """
        try:
            headers = [
                HeaderToSign(
                    str(entry["name"]),
                    base64.b64decode(entry["header"], validate=True),
                    {
                        str(name): base64.b64decode(signature, validate=True)
                        for name, signature in entry["signatures"].items()
                    },
                )
                for entry in document["headers"]
            ]
            version = int(document["limits"])
        except (KeyError, TypeError, ValueError, AttributeError, binascii.Error):
            raise InvalidMessage("not a request to sign limits", where=where) from None
        if any(SnapshotHeader.from_bytes(header.header).version != version for header in headers):
            raise InvalidMessage("headers of different versions", where=where)
        return cls(version, headers)

    @classmethod
    def read(cls, path: Path) -> SigningRequest:
        """
        Raises:
            NotFound, InvalidMessage: no file, or not such a request.
        """
        return cls.of(_read_json(path), str(path))


@dataclass(frozen=True, slots=True)
class Signed:
    """What a signing machine has just put its name under, for the person who stands before it."""

    what: str
    key_ids: tuple[str, ...]


def sign_file(path: Path, keys: Iterable[SigningKey]) -> Signed:
    """Sign a request or a metadata draft in its place.

    Raises:
        NotFound: no such file.
        InvalidMessage: neither a request to sign limits nor root or targets metadata.
        AuthenticationFailed: none of the keys is for what this file is.
    """
    document = _read_json(path)
    if "headers" in document:
        request = SigningRequest.of(document, str(path))
        what, signed, text = _tell_limits(request), request.sign(keys), ""
        text = request.to_json()
    else:
        metadata = read_metadata(path)
        what, signed = _tell_metadata(metadata), sign_metadata(metadata, keys)
        text = metadata.to_bytes().decode()
    if not signed:
        raise AuthenticationFailed(f"none of these keys is for {what}", step="signing")
    replace_file(path, text.encode())
    return Signed(what, tuple(signed))


def read_metadata(path: Path) -> Metadata[Any]:
    """
    Raises:
        NotFound, InvalidMessage: no file, or no TUF metadata.
    """
    try:
        return Metadata.from_bytes(_read_bytes(path))
    except RepositoryError:
        raise InvalidMessage("neither a request to sign limits nor TUF metadata", where=str(path)) from None


def replace_file(path: Path, content: bytes) -> None:
    """The whole new content or the whole old one, whatever happens; on disk when this returns."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tell_limits(request: SigningRequest) -> str:
    headers = [(entry.name, SnapshotHeader.from_bytes(entry.header)) for entry in request.headers]
    files = "; ".join(f"{name}: {h.count} records, root {h.root.hex()}" for name, h in headers)
    return f"limits {request.version} of {headers[0][1].issuer} ({files})" if headers else "no limits"


def _tell_metadata(metadata: Metadata[Any]) -> str:
    signed = metadata.signed
    text = f"{signed.type} metadata {signed.version}, valid until {signed.expires:%Y-%m-%d}"
    match signed:
        case Root():
            roles = {name: (role.threshold, len(role.keyids)) for name, role in signed.roles.items()}
            limits = LimitKeys.of(signed)
            roles[Role.LIMITS.value] = (limits.threshold, len(limits.keys))
            text += ": " + ", ".join(f"{name} {need} of {have}" for name, (need, have) in roles.items())
        case Targets():
            text += ": " + ", ".join(sorted(signed.targets))
    return text


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise NotFound(f"{path} cannot be read ({error.strerror})") from None
    if len(content) > _MAX_FILE_BYTES:
        raise InvalidMessage(f"over {_MAX_FILE_BYTES} bytes", where=str(path))
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_read_bytes(path))
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise InvalidMessage("not a JSON object", where=str(path))
    return document
