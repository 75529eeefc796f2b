"""An issuer with fixed keys whose repository a test can fill with anything, signed by whom it likes."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.metadata import Metadata, Root, TargetFile

from pos_gateway.distribution import delta_file, head_file, whole_file
from pos_gateway.ledger.ceremony import first_root
from pos_gateway.ledger.config import MetadataLives
from pos_gateway.ledger.repository import Repository, utc
from pos_gateway.ledger.signing import KeyChest, Role, SigningKey, sign_metadata
from pos_gateway.limits.snapshot import read_head
from tests.gateway.journalling import NOW_UNIX_MS

NOW_UNIX_S = NOW_UNIX_MS // 1000
LIVES = MetadataLives()


def fixed_key(role: Role, number: int = 1) -> SigningKey:
    seed = bytes([list(Role).index(role) + 1, number]) * 16
    return SigningKey(role, Ed25519PrivateKey.from_private_bytes(seed))


KEYS = {role: [fixed_key(role)] for role in Role}
LIMIT_KEY = KEYS[Role.LIMITS][0]


def make_root(
    keys: Mapping[Role, list[SigningKey]] = KEYS, thresholds: Mapping[Role, int] | None = None
) -> Metadata[Root]:
    return first_root(keys, thresholds or {}, utc(NOW_UNIX_S) + timedelta(days=1000))


def head_of(data: bytes) -> bytes:
    return read_head(lambda offset, length: data[offset : offset + length]).data


class Issuer:
    def __init__(self, folder: Path, root: Metadata[Root] | None = None) -> None:
        self.now_unix_s = NOW_UNIX_S
        self.chest = KeyChest({key.id: key for keys in KEYS.values() for key in keys})
        self.repository = Repository.create(
            folder, root or make_root(), self.chest, utc(self.now_unix_s), LIVES
        )
        self.files: dict[str, TargetFile] = {}

    @property
    def folder(self) -> Path:
        return self.repository.folder

    def publish(
        self, version: int, whole: bytes, deltas: Mapping[int, bytes] | None = None, head: bytes | None = None
    ) -> None:
        """List these files, and the whole files that were listed before."""
        files = [self._add(whole_file(version).name, whole)]
        files += [self._add(delta_file(base, version).name, data) for base, data in (deltas or {}).items()]
        if head is not None or whole[:8] == b"PGLIMITS":
            files.append(self._add(head_file(version).name, head or head_of(whole)))
        self.files = {n: f for n, f in self.files.items() if n.endswith(".snapshot")}
        self.files |= {file.path: file for file in files}
        self.release(self.files.values())

    def release(self, files: Iterable[TargetFile]) -> None:
        now = utc(self.now_unix_s)
        targets = self.repository.next_targets(files, now, LIVES)
        sign_metadata(targets, self.chest.of(Role.TARGETS))
        self.repository.release(targets, self.chest, now, LIVES)

    def whole_path(self, version: int) -> Path:
        return self.repository.target(self.files[whole_file(version).name])

    def rotate(self, change: Any, *signers: SigningKey) -> None:
        """A new root, signed by the root key and `signers`; the rest is signed anew with what is here."""
        root = self.repository.root()
        new = Metadata(copy.deepcopy(root.signed))
        change(new.signed)
        new.signed.version += 1
        sign_metadata(new, [*KEYS[Role.ROOT], *signers])
        self.repository.write_root(new)
        self.repository.renew(self.chest, utc(self.now_unix_s), LIVES)

    def _add(self, name: str, data: bytes) -> TargetFile:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            return self.repository.add_file(name, Path(file.name), b"", 0)
