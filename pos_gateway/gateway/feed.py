"""The limit snapshots of this gateway: fetched, verified, activated so that no crash leaves it without.

    temporary name → verify → fsync → rename → fsync the folder → journal → in use → old file removed

What the journal has seen activated is never gone behind again, whatever lies in the folder.
"""

from __future__ import annotations

import asyncio
import os
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pos_gateway.enrolment import Enrolment
from pos_gateway.errors import (
    AuthenticationFailed,
    InvalidConfiguration,
    InvalidSnapshot,
    LedgerUnreachable,
    PosGatewayError,
    Unavailable,
)
from pos_gateway.gateway.journal import Journal
from pos_gateway.gateway.journal_file import fsync_folder
from pos_gateway.gateway.ledger_client import LedgerClient, SnapshotOffer
from pos_gateway.limits.layers import Layers
from pos_gateway.limits.snapshot import (
    Freshness,
    Snapshot,
    check_meant_for,
    check_supersedes,
    explain_freshness,
    freshness,
)
from pos_gateway.records import Kind, uuid7
from pos_gateway.snapshot_file import SnapshotFile

_NAME: Final = re.compile(r"limits-(\d{16})\.snapshot", re.ASCII)
_DOWNLOAD: Final = ".download"


class SnapshotFeed:
    """Keeps one verified snapshot in use. `current` may be called from any thread; the rest from one
    task at a time.

    `clock` gives unix milliseconds; `random_bytes` makes record ids.
    """

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        enrolment: Enrolment,
        *,
        clock: Callable[[], int],
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """
        Raises:
            InvalidConfiguration: the enrolment holds no usable snapshot keys.
        """
        self._folder = folder
        self._journal = journal
        self._enrolment = enrolment
        self._clock = clock
        self._random_bytes = random_bytes
        try:
            self._keys = {
                key.id: Ed25519PublicKey.from_public_bytes(key.public_key) for key in enrolment.snapshot_keys
            }
        except ValueError:
            raise InvalidConfiguration("not an Ed25519 key", where="enrolment field snapshot_keys") from None
        self._current: Layers | None = None
        self.last_error: PosGatewayError | None = None
        """Why the newest attempt to get or open a snapshot failed; None after one that did not."""

    def current(self) -> Layers | None:
        """The limits in use. Its validity in time is the decision's matter."""
        return self._current

    def load(self) -> None:
        """At start: take the newest snapshot in the folder that verifies and is not older than what the
        journal has seen. Never raises for a bad file: it is named in `last_error`, and approves nothing.
        """
        for version, path in stored_snapshots(self._folder):
            try:
                snapshot = self._open(path)
                if snapshot.header.version != version:
                    raise InvalidSnapshot(f"holds version {snapshot.header.version}", where=path.name)
                check_supersedes(snapshot.header, self._journal.view.snapshot_version)
            except PosGatewayError as error:
                self.last_error = error
                continue
            self._use(snapshot)
            self.last_error = None
            return

    async def refresh(self, client: LedgerClient) -> bool:
        """Fetch and activate the ledger's newest snapshot; False if ours is as new.

        Raises:
            LedgerUnreachable: the line is down; the snapshot in use stays.
            PosGatewayError: what came is not a snapshot for this gateway; the one in use stays. The
                reason stands in `last_error` too.
        """
        try:
            offer = await client.latest_snapshot()
            newest = self._current.version if self._current else 0
            seen = max(newest, self._journal.view.snapshot_version)
            if offer.version < seen:
                raise AuthenticationFailed(
                    f"the ledger offers version {offer.version}, older than {seen} seen before",
                    step="snapshot version",
                )
            if offer.version == newest:
                self.last_error = None
                return False
            path = self._folder / _DOWNLOAD
            try:
                await self._download(client, offer, path)
                await asyncio.to_thread(self.activate, path)
            finally:
                path.unlink(missing_ok=True)
        except LedgerUnreachable:
            raise
        except PosGatewayError as error:
            self.last_error = error
            raise
        return True

    def activate(self, path: Path) -> Snapshot:
        """Verify a snapshot file in our folder, move it into place and use it from now on.

        Raises:
            InvalidSnapshot: broken, for another issuer or currency, or not valid yet.
            AuthenticationFailed: not signed by enough pinned keys, or not newer than the one in use.
            Unavailable: the disk or the journal refused.
        """
        snapshot = self._open(path)
        self._check_newer(snapshot)
        header = snapshot.header
        if freshness(header, self._clock() // 1000) is Freshness.NOT_YET_VALID and self._current is not None:
            raise InvalidSnapshot(explain_freshness(header, self._clock() // 1000), where="snapshot validity")
        try:
            _fsync_file(path)
            path.rename(self._folder / f"limits-{header.version:016d}.snapshot")
            fsync_folder(self._folder)
        except OSError as error:
            raise Unavailable(
                f"the snapshot cannot be stored: {error.strerror}", advice="check the disk"
            ) from None
        self._use(snapshot)
        self.last_error = None
        return snapshot

    async def _download(self, client: LedgerClient, offer: SnapshotOffer, path: Path) -> None:
        try:
            file = path.open("wb")
        except OSError as error:
            raise Unavailable(
                f"the snapshot cannot be stored: {error.strerror}", advice="check the disk"
            ) from None
        with file:
            await client.download(offer, file.write)

    def _open(self, path: Path) -> Snapshot:
        """Open and verify all but time and version; the file closes when nobody holds the snapshot."""
        file = SnapshotFile(path)
        try:
            snapshot = Snapshot.open(file.read_at, file.size, self._keys, self._enrolment.snapshot_threshold)
            check_meant_for(
                snapshot.header,
                issuer=self._enrolment.issuer,
                currency=self._enrolment.currency,
                token_key_epoch=self._enrolment.token_key_epoch,
            )
            if snapshot.header.base_version is not None:
                raise InvalidSnapshot(
                    "a delta, where a whole snapshot is needed", where="header field base_version"
                )
        except BaseException:
            file.close()
            raise
        # A tap in another thread may still look things up in a snapshot that was replaced meanwhile.
        weakref.finalize(snapshot, file.close)
        return snapshot

    def _check_newer(self, snapshot: Snapshot) -> None:
        """Strictly above what is in use. The version the journal saw last may come again if its file was
        lost or broken."""
        check_supersedes(snapshot.header, self._journal.view.snapshot_version)
        if self._current is not None and snapshot.header.version <= self._current.version:
            raise AuthenticationFailed(
                f"version {snapshot.header.version} is in use already", step="snapshot version"
            )

    def _use(self, snapshot: Snapshot) -> None:
        header = snapshot.header
        if header.version > self._journal.view.snapshot_version:
            now_unix_ms = self._clock()
            self._journal.append(
                Kind.SNAPSHOT_ACTIVATION,
                uuid7(now_unix_ms, self._random_bytes(10)),
                {
                    "version": header.version,
                    "root": header.root.hex(),
                    "count": header.count,
                    "valid_until_unix_s": header.valid_until_unix_s,
                    "at_unix_ms": now_unix_ms,
                },
            )
        self._current = Layers(snapshot)
        for version, path in stored_snapshots(self._folder):
            if version < header.version:
                path.unlink(missing_ok=True)


def stored_snapshots(folder: Path) -> list[tuple[int, Path]]:
    """Versions and paths of the snapshot files in a folder, newest first. Nothing is verified."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
