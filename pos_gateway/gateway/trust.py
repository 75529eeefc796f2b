"""Whose word counts: the TUF metadata this gateway trusts, kept in a folder of its own.

It begins with the root that came with the enrolment; every later root is signed by the one before it.
The rules of TUF are python-tuf's (`TrustedMetadataSet`, free of I/O); here is what is read from where in
which order, and what is kept. Times are given, never asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from tuf.api.exceptions import (
    BadVersionNumberError,
    EqualVersionNumberError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import TargetFile
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from pos_gateway.distribution import TIMESTAMP, LimitFile, LimitKeys, metadata_path, parse_name
from pos_gateway.errors import (
    AuthenticationFailed,
    InvalidConfiguration,
    InvalidMessage,
    NotFound,
    Unavailable,
)
from pos_gateway.gateway.fetcher import Repository
from pos_gateway.gateway.journal_file import fsync_folder

_MAX_ROOT_BYTES: Final = 512 * 1024
_MAX_TIMESTAMP_BYTES: Final = 16 * 1024
_MAX_SNAPSHOT_BYTES: Final = 256 * 1024
_MAX_TARGETS_BYTES: Final = 4 * 1024 * 1024
_MAX_ROTATIONS: Final = 1024

_KEEPS: Final = "the limits in use stay; tell the issuer"


class Trust:
    """The roots this gateway has followed, and through them the keys that may sign limits."""

    def __init__(self, folder: Path, first_root: bytes) -> None:
        """
        Raises:
            InvalidConfiguration: the enrolment's root is none.
        """
        self._folder = folder
        self._first_root = first_root
        self._set, self._limit_keys = self._begin()
        self._root_version = int(self._set.root.version)

    @property
    def limit_keys(self) -> LimitKeys:
        return self._limit_keys

    @property
    def root_version(self) -> int:
        """Of the last root that was taken whole: verified, understood and kept."""
        return self._root_version

    def load(self) -> None:
        """At start, without a network: follow the roots that are kept. A kept file that does not verify
        ends the chain there; what else is kept is verified when the next refresh needs it."""
        trusted, keys = self._begin()
        version = int(trusted.root.version)
        while (data := self._kept(f"{trusted.root.version + 1}.root.json")) is not None:
            try:
                trusted.update_root(data)
                keys = LimitKeys.of(trusted.root)
                version = int(trusted.root.version)
            except (RepositoryError, InvalidMessage):
                break
        self._set, self._limit_keys, self._root_version = trusted, keys, version

    def refresh(self, repository: Repository, now_unix_s: int) -> dict[LimitFile, TargetFile]:
        """Follow new roots, then the newest list of files; returns the limit files it names.

        `now_unix_s` is what expiry is judged by.

        Raises:
            AuthenticationFailed: step `repository signature`, `version`, `expiry` or `hash`: this is not
                the issuer's newest state. New roots that verified are kept all the same.
            InvalidMessage: metadata that cannot be read, or is too long.
            LedgerUnreachable, Unavailable: see `fetcher`; or our disk refuses.
            NotFound: there is no repository.
        """
        trusted = self._follow_roots(repository)
        trusted.reference_time = datetime.fromtimestamp(now_unix_s, UTC)
        timestamp = repository.read(TIMESTAMP, _MAX_TIMESTAMP_BYTES)
        if trusted.root.is_expired(trusted.reference_time):
            with _Judged("root"):
                raise ExpiredMetadataError
        with _Judged("timestamp"):
            self._load_kept(trusted.update_timestamp, "timestamp.json")
            try:
                trusted.update_timestamp(timestamp)
                self._keep("timestamp.json", timestamp)
            except EqualVersionNumberError:
                if trusted.timestamp.is_expired(trusted.reference_time):
                    raise ExpiredMetadataError from None
        with _Judged("snapshot"):
            # An older one counts too: no version in the new one may lie behind it.
            if not self._load_kept(lambda data: trusted.update_snapshot(data, trusted=True), "snapshot.json"):
                meta = trusted.timestamp.snapshot_meta
                length = min(meta.length or _MAX_SNAPSHOT_BYTES, _MAX_SNAPSHOT_BYTES)
                data = repository.read(metadata_path("snapshot", meta.version), length)
                trusted.update_snapshot(data)
                self._keep("snapshot.json", data)
        with _Judged("targets"):
            if not self._load_kept(trusted.update_targets, "targets.json"):
                meta = trusted.snapshot.meta["targets.json"]
                length = min(meta.length or _MAX_TARGETS_BYTES, _MAX_TARGETS_BYTES)
                data = repository.read(metadata_path("targets", meta.version), length)
                trusted.update_targets(data)
                self._keep("targets.json", data)
        named = ((parse_name(name), file) for name, file in trusted.targets.targets.items())
        return {parsed: file for parsed, file in named if parsed is not None and "sha256" in file.hashes}

    def _begin(self) -> tuple[TrustedMetadataSet, LimitKeys]:
        try:
            trusted = TrustedMetadataSet(self._first_root, EnvelopeType.METADATA)
            return trusted, LimitKeys.of(trusted.root)
        except (RepositoryError, InvalidMessage):
            raise InvalidConfiguration(
                "not the root metadata of an issuer", where="enrolment field trusted_root"
            ) from None

    def _follow_roots(self, repository: Repository) -> TrustedMetadataSet:
        """A set of its own for one refresh: python-tuf's takes no root after a timestamp."""
        self.load()
        trusted = self._set
        for _ in range(_MAX_ROTATIONS):
            version = trusted.root.version + 1
            try:
                data = repository.read(metadata_path("root", version), _MAX_ROOT_BYTES)
            except NotFound:
                break
            with _Judged("root"):
                trusted.update_root(data)
            keys = LimitKeys.of(trusted.root)
            self._keep(f"{version}.root.json", data)
            self._limit_keys, self._root_version = keys, version
        else:
            raise InvalidMessage(f"more than {_MAX_ROTATIONS} new roots at once", where="repository")
        return trusted

    def _load_kept(self, update: Callable[[bytes], object], name: str) -> bool:
        """Did what is kept still count as the newest?"""
        data = self._kept(name)
        if data is None:
            return False
        try:
            update(data)
        except RepositoryError:
            return False
        return True

    def _kept(self, name: str) -> bytes | None:
        try:
            return (self._folder / name).read_bytes()
        except OSError:
            return None

    def _keep(self, name: str, data: bytes) -> None:
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            temporary = self._folder / f".{name}.new"
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self._folder / name)
            fsync_folder(self._folder)
        except OSError as error:
            raise Unavailable(
                f"the issuer's metadata cannot be stored: {error.strerror}", advice="check the disk"
            ) from None


class _Judged:
    """What python-tuf finds wrong with a piece of metadata, in words for the people of the shop."""

    def __init__(self, role: str) -> None:
        self._role = role

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        match error:
            case ExpiredMetadataError():
                raise AuthenticationFailed(
                    f"the {self._role} file has expired: newer limits may be held back",
                    step="repository expiry",
                    advice=f"check this machine's clock; bring a newer stick or try again; {_KEEPS}",
                ) from None
            case BadVersionNumberError():
                raise AuthenticationFailed(
                    f"the {self._role} file is older than one seen before",
                    step="repository version",
                    advice=f"it is an old copy, or somebody is setting limits back; {_KEEPS}",
                ) from None
            case UnsignedMetadataError():
                raise AuthenticationFailed(
                    f"the {self._role} file is not signed by enough of the issuer's keys",
                    step="repository signature",
                    advice=_KEEPS,
                ) from None
            case LengthOrHashMismatchError():
                raise AuthenticationFailed(
                    f"the {self._role} file is not the one that was signed for",
                    step="repository hash",
                    advice=f"try again; {_KEEPS}",
                ) from None
            case RepositoryError():
                raise InvalidMessage(f"the {self._role} file cannot be read", where="repository") from None
