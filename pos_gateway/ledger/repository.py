"""The TUF repository as static files: what any web server, CDN or stick can carry to the shops.

A release writes the files first, then the list of them, then the snapshot of that list, and
`timestamp.json` last. Whoever reads meanwhile, or after a crash anywhere, sees the old state whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from pos_gateway.distribution import METADATA, TARGETS, LimitKeys, metadata_path, target_path
from pos_gateway.errors import InvalidConfiguration, Unavailable
from pos_gateway.ledger.config import MetadataLives
from pos_gateway.ledger.signing import KeyChest, Role, replace_file, sign_metadata, sync_folder

_CHUNK_BYTES: Final = 1 << 20
_ROOT_NAME: Final = re.compile(r"([1-9]\d*)\.root\.json", re.ASCII)
_LIST_NAME: Final = re.compile(r"([1-9]\d*)\.(targets|snapshot)\.json", re.ASCII)
_TARGET_NAME: Final = re.compile(r"[0-9a-f]{64}\..+", re.ASCII)

_LISTS_KEPT: Final = 10
"""Of each kind: whoever has read `timestamp.json` still finds what it names, though a few releases follow."""

S = TypeVar("S", Targets, Snapshot, Timestamp)


@dataclass(frozen=True, slots=True)
class State:
    """What the newest `timestamp.json` stands for."""

    targets: Metadata[Targets]
    snapshot: Metadata[Snapshot]
    timestamp: Metadata[Timestamp]


class Repository:
    """One repository folder. Whoever writes holds `exclusive`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def exclusive(self, *, wait: bool = True) -> Iterator[bool]:
        """Held by one process and thread at a time; yields False if another has it and we do not wait."""
        descriptor = os.open(
            self.folder.parent / "repository.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    @classmethod
    def create(
        cls, folder: Path, root: Metadata[Root], chest: KeyChest, now: datetime, lives: MetadataLives
    ) -> Repository:
        """A repository with nothing in it yet but its metadata."""
        (folder / METADATA).mkdir(parents=True)
        (folder / TARGETS).mkdir()
        repository = cls(folder)
        repository.write_root(root)
        targets = Metadata(Targets(version=1, expires=now + timedelta(seconds=lives.targets_s)))
        sign_metadata(targets, chest.of(Role.TARGETS))
        repository.release(targets, chest, now, lives)
        return repository

    def roots(self) -> list[Metadata[Root]]:
        """Every root there ever was, oldest first."""
        names = (_ROOT_NAME.fullmatch(path.name) for path in (self.folder / METADATA).iterdir())
        versions = sorted(int(match[1]) for match in names if match)
        if not versions:
            raise InvalidConfiguration("no root metadata", where=str(self.folder))
        return [self._read(Root, metadata_path("root", version)) for version in versions]

    def root(self) -> Metadata[Root]:
        return self.roots()[-1]

    def root_bytes(self) -> bytes:
        """The newest root as it stands: what a gateway is given when it enrols."""
        return (self.folder / metadata_path("root", self.root().signed.version)).read_bytes()

    def limit_keys(self) -> LimitKeys:
        return LimitKeys.of(self.root().signed)

    def every_limit_key(self) -> dict[str, Ed25519PublicKey]:
        """Those of today and of the past: what our own old files are signed by."""
        return {name: key for root in self.roots() for name, key in LimitKeys.of(root.signed).keys.items()}

    def state(self) -> State | None:
        """None before the first release."""
        if not (self.folder / METADATA / "timestamp.json").is_file():
            return None
        timestamp = self._read(Timestamp, f"{METADATA}/timestamp.json")
        snapshot = self._read(Snapshot, metadata_path("snapshot", timestamp.signed.snapshot_meta.version))
        version = snapshot.signed.meta["targets.json"].version
        return State(self._read(Targets, metadata_path("targets", version)), snapshot, timestamp)

    def target(self, file: TargetFile) -> Path:
        return self.folder / target_path(file.path, file.hashes["sha256"])

    def add_file(self, name: str, source: Path, head: bytes, body_at: int) -> TargetFile:
        """Put `head` and what follows `body_at` in `source` into place as target `name`, on disk when
        this returns. Nobody is told of it before a release lists it."""
        temporary = self.folder / TARGETS / f".{name}.new"
        digest, length = hashlib.sha256(head), len(head)
        with temporary.open("wb") as file, source.open("rb") as body:
            file.write(head)
            body.seek(body_at)
            while chunk := body.read(_CHUNK_BYTES):
                digest.update(chunk)
                length += len(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        found = TargetFile(length, {"sha256": digest.hexdigest()}, name)
        os.rename(temporary, self.target(found))
        sync_folder(self.folder / TARGETS)
        return found

    def next_targets(
        self, files: Iterable[TargetFile], now: datetime, lives: MetadataLives
    ) -> Metadata[Targets]:
        """The next list of files, not signed yet."""
        state = self.state()
        version = state.targets.signed.version + 1 if state else 1
        expires = now + timedelta(seconds=lives.targets_s)
        return Metadata(
            Targets(version=version, expires=expires, targets={file.path: file for file in files})
        )

    def release(
        self, targets: Metadata[Targets], chest: KeyChest, now: datetime, lives: MetadataLives
    ) -> None:
        """Make a signed list of files the one in force.

        Raises:
            Unavailable: it, or we, lack signatures; nothing was changed.
        """
        root, state = self.root().signed, self.state()
        require_signatures(root, targets)
        data = targets.to_bytes()
        meta = MetaFile.from_data(targets.signed.version, data, ["sha256"])
        snapshot = Metadata(
            Snapshot(
                version=state.snapshot.signed.version + 1 if state else 1,
                expires=now + timedelta(seconds=lives.snapshot_s),
                meta={"targets.json": meta},
            )
        )
        self._sign(root, snapshot, chest)
        self._write(metadata_path("targets", targets.signed.version), data)
        self._write(metadata_path("snapshot", snapshot.signed.version), snapshot.to_bytes())
        self._write_timestamp(root, state, snapshot, chest, now, lives)

    def renew(self, chest: KeyChest, now: datetime, lives: MetadataLives) -> None:
        """Sign anew that the newest state is still the newest; the list of files too where its keys are
        here and it nears its end or the root has changed its keys.

        Raises:
            Unavailable: keys are not here.
        """
        root, state = self.root().signed, self.state()
        if state is None:
            return
        if _wants_renewal(root, state.targets, now, lives.targets_s):
            targets = self.next_targets(state.targets.signed.targets.values(), now, lives)
            sign_metadata(targets, chest.of(Role.TARGETS))
            if lacking_signatures(root, targets) == 0:
                self.release(targets, chest, now, lives)
                return
        snapshot = state.snapshot
        if _wants_renewal(root, snapshot, now, lives.snapshot_s):
            signed = snapshot.signed
            snapshot = Metadata(
                Snapshot(
                    version=signed.version + 1,
                    expires=now + timedelta(seconds=lives.snapshot_s),
                    meta=signed.meta,
                )
            )
            self._sign(root, snapshot, chest)
            self._write(metadata_path("snapshot", snapshot.signed.version), snapshot.to_bytes())
        self._write_timestamp(root, state, snapshot, chest, now, lives)
        self._prune_lists()

    def write_root(self, root: Metadata[Root]) -> None:
        self._write(metadata_path("root", root.signed.version), root.to_bytes())

    def prune(self) -> None:
        """Remove what nobody can need any more. Target files that neither the list in force nor the one
        before it names: a shop may be in the middle of a download. Lists that `timestamp.json` has long
        passed. Roots stay for ever: every shop goes from its own to the newest one by one."""
        state = self.state()
        if state is None:
            return
        named = {self.target(file).name for file in state.targets.signed.targets.values()}
        before = self.folder / metadata_path("targets", state.targets.signed.version - 1)
        if before.is_file():
            old = Metadata[Targets].from_file(str(before))
            named |= {self.target(file).name for file in old.signed.targets.values()}
        for path in (self.folder / TARGETS).iterdir():
            if path.name not in named and (_TARGET_NAME.fullmatch(path.name) or path.name.endswith(".new")):
                path.unlink(missing_ok=True)
        self._prune_lists()

    def _prune_lists(self) -> None:
        state = self.state()
        if state is None:
            return
        newest = {"targets": state.targets.signed.version, "snapshot": state.snapshot.signed.version}
        for path in (self.folder / METADATA).iterdir():
            match = _LIST_NAME.fullmatch(path.name)
            if match and int(match[1]) <= newest[match[2]] - _LISTS_KEPT:
                path.unlink(missing_ok=True)

    def _write_timestamp(
        self,
        root: Root,
        state: State | None,
        snapshot: Metadata[Snapshot],
        chest: KeyChest,
        now: datetime,
        lives: MetadataLives,
    ) -> None:
        timestamp = Metadata(
            Timestamp(
                version=state.timestamp.signed.version + 1 if state else 1,
                expires=now + timedelta(seconds=lives.timestamp_s),
                snapshot_meta=MetaFile.from_data(snapshot.signed.version, snapshot.to_bytes(), ["sha256"]),
            )
        )
        self._sign(root, timestamp, chest)
        self._write(f"{METADATA}/timestamp.json", timestamp.to_bytes())

    def _sign(self, root: Root, metadata: Metadata[Any], chest: KeyChest) -> None:
        sign_metadata(metadata, chest.keys.values())
        require_signatures(root, metadata)

    def _write(self, path: str, data: bytes) -> None:
        replace_file(self.folder / path, data)

    def _read(self, kind: Any, path: str) -> Any:
        try:
            return Metadata[Any].from_file(str(self.folder / path))
        except (RepositoryError, OSError):
            raise InvalidConfiguration(
                f"no {kind.type} metadata", where=str(self.folder / path), advice="restore it from a backup"
            ) from None


def lacking_signatures(root: Root, metadata: Metadata[Any]) -> int:
    """How many more of the keys that this root names must sign."""
    role = metadata.signed.type
    missing: int = root.get_verification_result(role, metadata.signed_bytes, metadata.signatures).missing
    return missing


def require_signatures(root: Root, metadata: Metadata[Any]) -> None:
    """
    Raises:
        Unavailable: names role and number of the signatures that are missing.
    """
    if missing := lacking_signatures(root, metadata):
        raise Unavailable(
            f"{metadata.signed.type} metadata lacks {missing} signatures",
            advice=f"sign it with a {metadata.signed.type} key: `pos-gateway ledger keys sign`",
        )


def utc(now_unix_s: float) -> datetime:
    """As TUF metadata dates are: whole seconds, UTC."""
    return datetime.fromtimestamp(int(now_unix_s), UTC)


def _wants_renewal(root: Root, metadata: Metadata[Any], now: datetime, life_s: int) -> bool:
    """Past half its life, or signed by keys that this root does not trust."""
    half = timedelta(seconds=life_s / 2)
    return bool(now >= metadata.signed.expires - half) or lacking_signatures(root, metadata) > 0
