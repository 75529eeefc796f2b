"""Who this gateway is: its signing key, and what the ledger told it when it enrolled.

The signer is `Ed25519PrivateKey`, an abstract class of `cryptography`: a hardware token signs for a
gateway as one of these (`signers.ed25519_key`). Here the key lies in a file that its owner alone can read.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import BaseModel, ConfigDict, ValidationError

from pos_gateway.enrolment import Enrolment
from pos_gateway.errors import Conflict, InvalidConfiguration, NotFound
from pos_gateway.gateway.journal_file import fsync_folder

_OWNER_ONLY: Final = 0o600
_MAX_FILE_BYTES: Final = 1024 * 1024


class Enrolled(BaseModel):
    """An enrolment with where it was made. Whoever answers there is asked for a certificate of the
    enrolment's authority."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ledger_url: str
    enrolment: Enrolment


def load_or_create_identity(path: Path) -> Ed25519PrivateKey:
    """The gateway's key; made and synced to the disk the first time.

    Raises:
        InvalidConfiguration: others can read the file, or it holds no Ed25519 key.
    """
    if not path.exists():
        key = Ed25519PrivateKey.generate()
        write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return key
    return load_identity(path)


def load_identity(path: Path) -> Ed25519PrivateKey:
    """
    Raises:
        NotFound: there is no key yet.
        InvalidConfiguration: others can read the file, or it holds no Ed25519 key.
    """
    data = read_private(path, missing="this gateway has no identity yet")
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidConfiguration(
            "not an Ed25519 private key", where=str(path), advice="restore the file from a backup"
        )
    return key


def store_enrolment(path: Path, enrolled: Enrolled) -> None:
    """Keep an enrolment, durably.

    Raises:
        Conflict: the gateway is enrolled already, otherwise.
    """
    if path.exists():
        known = load_enrolment(path)
        if known.enrolment.gateway_id != enrolled.enrolment.gateway_id:
            raise Conflict(
                f"this gateway is enrolled already, as {known.enrolment.gateway_id}",
                advice="a new enrolment needs a new home directory",
            )
    write_private(path, enrolled.model_dump_json(indent=2).encode())


def load_enrolment(path: Path) -> Enrolled:
    """
    Raises:
        NotFound: not enrolled yet.
        InvalidConfiguration: others can read the file, or its content is broken.
    """
    data = read_private(path, missing="this gateway is not enrolled yet")
    try:
        return Enrolled.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidConfiguration(first["msg"], where=f"{path} field {place or 'root'}") from None


def read_private(path: Path, *, missing: str) -> bytes:
    """
    Raises:
        NotFound: there is no such file.
        InvalidConfiguration: it cannot be read, or others may read or change it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(_MAX_FILE_BYTES)
    except FileNotFoundError:
        raise NotFound(f"{missing}: {path} is missing", advice="run `pos-gateway gateway enroll`") from None
    except OSError as error:
        raise InvalidConfiguration(f"cannot be read: {error.strerror}", where=str(path)) from None
    if mode & 0o077:
        raise InvalidConfiguration(
            f"others may read or change it (mode {mode:04o})", where=str(path), advice=f"chmod 600 {path}"
        )
    return data


def write_private(path: Path, data: bytes) -> None:
    """Put a file of mode 0600 in the place of what is there, if anything: durably, whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _OWNER_ONLY)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    fsync_folder(path.parent)
