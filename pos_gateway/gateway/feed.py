"""The limits of this gateway: fetched, verified, activated so that no crash leaves it without.

    metadata (`trust`) → what is missing and least to fetch → .partial, resumed where it broke off
    → hash → signatures, root, addressee → fsync → rename → fsync the folder → journal → in use

What the journal has seen activated is never gone behind again, whatever lies in the folder. The same
files come from the ledger or from a folder; neither is trusted. While something is refused, the limits
in use stay in use as long as they are valid.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tuf.api.metadata import TargetFile

from pos_gateway.distribution import (
    LimitFile,
    LimitKeys,
    delta_file,
    head_file,
    parse_name,
    target_path,
    whole_file,
)
from pos_gateway.enrolment import Enrolment
from pos_gateway.errors import (
    AuthenticationFailed,
    InvalidSnapshot,
    LedgerUnreachable,
    NotFound,
    PosGatewayError,
    Unavailable,
)
from pos_gateway.gateway.fetcher import Repository
from pos_gateway.gateway.journal import Journal
from pos_gateway.gateway.journal_file import fsync_folder
from pos_gateway.gateway.trust import Trust
from pos_gateway.limits.header import SnapshotHeader
from pos_gateway.limits.layers import Layers
from pos_gateway.limits.merge import Merge
from pos_gateway.limits.snapshot import (
    Freshness,
    Head,
    Snapshot,
    check_meant_for,
    check_supersedes,
    explain_freshness,
    freshness,
    read_head,
)
from pos_gateway.records import Kind, uuid7
from pos_gateway.snapshot_file import SnapshotFile

METADATA: Final = "metadata"
_PARTIAL: Final = re.compile(r"\.[0-9a-f]{64}\.partial", re.ASCII)
_MERGING: Final = ".merging"
_KEEP_FREE_BYTES: Final = 64 * 1024 * 1024
_STOP_TIMEOUT_S: Final = 2.0
_LOWEST_PRIORITY: Final = 19


@dataclass(frozen=True, slots=True)
class Progress:
    """Long work under way: `what` for people, `done` of `total` bytes or records."""

    what: str
    done: int
    total: int


class Stopped(Unavailable):
    """The gateway is being shut down."""


class SnapshotFeed:
    """Keeps verified limits in use. `current` may be called from any thread; the rest blocks, and holds
    off other callers meanwhile.

    `clock` gives unix milliseconds; `random_bytes` makes record ids. `keep_free_bytes` of the disk are
    left to the journal: without them payments stop.
    """

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        enrolment: Enrolment,
        *,
        clock: Callable[[], int],
        random_bytes: Callable[[int], bytes] = os.urandom,
        keep_free_bytes: int = _KEEP_FREE_BYTES,
        listener: Callable[[Progress | None], None] = lambda progress: None,
    ) -> None:
        """
        Raises:
            InvalidConfiguration: the enrolment holds no usable root.
        """
        self._folder = folder
        self._journal = journal
        self._enrolment = enrolment
        self._clock = clock
        self._random_bytes = random_bytes
        self._keep_free_bytes = keep_free_bytes
        self._listener = listener
        self._trust = Trust(folder / METADATA, enrolment.trusted_root)
        self._mutex = threading.RLock()
        self._one_merge = threading.Lock()
        self._stop = threading.Event()
        self._merging: threading.Thread | None = None
        self._whole_wanted = False
        self._current: Layers | None = None
        self._loaded: Layers | None = None
        self.progress: Progress | None = None
        self.last_error: PosGatewayError | None = None
        """Why the newest attempt to get, open or merge limits failed; None after one that did not."""

    def current(self) -> Layers | None:
        """The limits in use. Their validity in time is the decision's matter."""
        return self._current

    def load(self) -> None:
        """At start: take the newest limits in the folder that verify and are not older than what the
        journal has seen. Never raises for a bad file: it is named in `last_error`, and approves nothing.
        """
        with self._mutex:
            for left_over in self._folder.glob(f".*{_MERGING}"):
                left_over.unlink()
            self._trust.load()
            try:
                self._check_root()
            except AuthenticationFailed as error:
                self.last_error = error
                return
            best: Layers | None = None
            for layers in self._stored():
                if best is None or layers.version > best.version:
                    best = layers
            if best is not None:
                self._use(best)
                self.last_error = None

    def refresh(self, repository: Repository) -> bool:
        """Fetch and activate the newest limits; False if ours are as new.

        Raises:
            LedgerUnreachable: the line is down; what came so far is kept, and the download goes on there.
            PosGatewayError: what came is refused; the limits in use stay. The reason stands in
                `last_error` too.
        """
        with self._mutex:
            try:
                changed = self._refresh(repository)
            except (LedgerUnreachable, Stopped):
                raise
            except PosGatewayError as error:
                self.last_error = error
                raise
            finally:
                self._show(None)
            self.last_error = None
            return changed

    def start_merging(self) -> None:
        """In a thread of the lowest priority, load the tree of the limits in use, so that a tap reads one
        bucket and no more, and merge a delta into its base."""
        layers = self._current
        if layers is None or (self._merging and self._merging.is_alive()):
            return
        if layers.delta is None and layers is self._loaded:
            return
        self._merging = threading.Thread(target=self._merge_quietly, name="merge", daemon=True)
        self._merging.start()

    def merge(self) -> bool:
        """Merge the delta in use into its base and use the result; False if there is nothing to merge.

        Raises:
            AuthenticationFailed, InvalidSnapshot: the result is not what the issuer signed, or a file was
                changed on disk. The limits in use stay, and the whole file is fetched next time.
            Unavailable: the disk refuses.
            Stopped: by `close`; the next merge begins anew.
        """
        with self._one_merge:
            layers = self._current
            if layers is None or layers.delta is None:
                return False
            path = self._folder / f".{whole_file(layers.version).name}{_MERGING}"
            try:
                self._write_merged(layers.base, layers.delta, path)
                with self._mutex:
                    if self._current is layers:
                        merged = Layers(self._open(path))
                        self._store(path, whole_file(layers.version))
                        self._use(merged)
            except (AuthenticationFailed, InvalidSnapshot):
                self._whole_wanted = True
                raise
            except OSError as error:
                raise _disk_trouble(error) from None
            finally:
                path.unlink(missing_ok=True)
                self._show(None)
            return True

    def close(self) -> None:
        """Stop what is under way and wait for its end, though not for a network that is silent. What was
        fetched so far stays."""
        self.stop()
        if self._merging is not None:
            self._merging.join()
        if self._mutex.acquire(timeout=_STOP_TIMEOUT_S):
            self._mutex.release()

    def stop(self) -> None:
        """Let what is under way end soon."""
        self._stop.set()

    def _refresh(self, repository: Repository) -> bool:
        try:
            files = self._trust.refresh(repository, self._now_unix_s())
        finally:
            self._take_root()
        newest = max((file.version for file in files if file.kind == "snapshot"), default=None)
        if newest is None:
            raise NotFound("the issuer has not published any limits yet")
        in_use = self._current.version if self._current else 0
        seen = max(in_use, self._journal.view.snapshot_version)
        if newest < seen:
            raise AuthenticationFailed(
                f"the newest limits offered are version {newest}, older than {seen} seen before",
                step="snapshot version",
                advice="tell the issuer; the limits in use stay",
            )
        if newest == in_use and not self._whole_wanted:
            self.start_merging()
            return False
        self._fetch(repository, newest, files)
        self._whole_wanted = False
        self._tidy()
        self.start_merging()
        return True

    def _fetch(self, repository: Repository, newest: int, files: dict[LimitFile, TargetFile]) -> None:
        """The least that leads to the newest version, activated."""
        whole, head = whole_file(newest), head_file(newest)
        base = self._current.base if self._current else None
        ways: list[tuple[int, list[LimitFile]]] = [(self._to_fetch(files[whole]), [whole])]
        for older in files:
            delta = delta_file(older.version, newest) if older.version < newest else None
            if older.kind != "snapshot" or delta not in files or head not in files or self._whole_wanted:
                continue
            rest = [delta, head]
            if self._to_fetch(files[older]) < files[older].length and not self._is_base(older.version):
                # A download of an older whole file was under way: it is finished rather than begun anew.
                ways.append((sum(self._to_fetch(files[file]) for file in [older, *rest]), [older, *rest]))
        if base is not None and not self._whole_wanted:
            delta = delta_file(base.header.version, newest)
            if delta in files and head in files:
                ways.append((self._to_fetch(files[delta]), [delta, head]))
        _, way = min(ways, key=lambda pair: pair[0])
        self._tidy_partials([files[file] for file in way])
        got = {file.kind: (file, self._download(repository, files[file])) for file in way}
        if "snapshot" in got:
            file, path = got["snapshot"]
            layers = Layers(self._opened_for(path, file))
            if "delta" not in got:
                self._check_newer(layers)
            self._store(path, file)
            base = layers.base
        if "delta" in got and base is not None:
            file, path = got["delta"]
            layers = Layers(base, self._opened_for(path, file))
            self._check_newer(layers)
            self._store(got["head"][1], head)
            self._store(path, file)
        self._use(layers)

    def _is_base(self, version: int) -> bool:
        return self._current is not None and self._current.base.header.version == version

    def _to_fetch(self, file: TargetFile) -> int:
        """Bytes of it that are not here yet."""
        with contextlib.suppress(OSError):
            return max(0, file.length - self._partial(file).stat().st_size)
        return file.length

    def _partial(self, file: TargetFile) -> Path:
        return self._folder / f".{file.hashes['sha256'].lower()[:64]}.partial"

    def _download(self, repository: Repository, file: TargetFile) -> Path:
        """The whole file with the hash that was signed for, as a partial under its hash's name."""
        path = self._partial(file)
        if not _PARTIAL.fullmatch(path.name):
            raise InvalidSnapshot("not a SHA-256", where=f"list of files, {file.path}")
        try:
            size = path.stat().st_size if path.exists() else 0
            if size > file.length:
                size = 0
            self._check_space(file.length - size)
            with path.open("r+b" if size else "wb") as out:
                out.seek(size)
                source = target_path(file.path, file.hashes["sha256"])
                if size < file.length:
                    with contextlib.closing(repository.stream(source, size)) as pieces:
                        for piece in pieces:
                            self._check_stop()
                            size += len(piece)
                            if size > file.length:
                                break
                            out.write(piece)
                            self._show(Progress(file.path, size, file.length))
            if size < file.length:
                raise LedgerUnreachable(
                    f"{file.path} broke off after {size} of {file.length} bytes",
                    advice="it goes on from there the next time",
                )
            with path.open("rb") as done:
                digest = hashlib.file_digest(done, "sha256").hexdigest()
        except OSError as error:
            # What is here of it would keep the disk full, and the journal needs the room more.
            path.unlink(missing_ok=True)
            raise _disk_trouble(error) from None
        if size > file.length or digest != file.hashes["sha256"]:
            path.unlink(missing_ok=True)
            what = f"more than {file.length} bytes" if size > file.length else "other bytes"
            raise AuthenticationFailed(
                f"{what} came for {file.path} than the issuer signed for",
                step="repository hash",
                advice="it is fetched anew the next time; the limits in use stay",
            )
        return path

    def _check_space(self, wanted_bytes: int) -> None:
        free_bytes = shutil.disk_usage(self._folder).free
        if free_bytes < wanted_bytes + self._keep_free_bytes:
            raise Unavailable(
                f"the disk has {free_bytes // 1024} KiB left, new limits need {wanted_bytes // 1024} KiB "
                f"beside {self._keep_free_bytes // 1024} KiB for payments",
                advice="make room on the disk",
            )

    def _store(self, path: Path, file: LimitFile) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            path.rename(self._folder / file.name)
            fsync_folder(self._folder)
        except OSError as error:
            raise _disk_trouble(error) from None

    def _stored(self) -> Iterator[Layers]:
        """Everything in the folder that verifies and is not too old; what does not is `last_error`."""
        files = stored_files(self._folder)
        for whole in (file for file in files if file.kind == "snapshot"):
            try:
                base = self._opened_for(self._folder / whole.name, whole)
            except PosGatewayError as error:
                self.last_error = error
                continue
            deltas = (file for file in files if file.kind == "delta" and file.base == whole.version)
            for delta in (*deltas, None):
                try:
                    path = self._folder / delta.name if delta else None
                    layers = Layers(base, self._opened_for(path, delta) if path and delta else None)
                    check_supersedes(layers.newest, self._journal.view.snapshot_version)
                except PosGatewayError as error:
                    self.last_error = error
                    continue
                yield layers
                break

    def _opened_for(self, path: Path, file: LimitFile) -> Snapshot:
        snapshot = self._open(path)
        header = snapshot.header
        if (header.version, header.base_version) != (file.version, file.base):
            raise InvalidSnapshot(f"holds version {header.version}", where=file.name)
        return snapshot

    def _open(self, path: Path) -> Snapshot:
        """Open and verify all but time and version; the file closes when nobody holds the snapshot."""
        file = SnapshotFile(path)
        try:
            trusted = self._trust.limit_keys
            snapshot = Snapshot.open(file.read_at, file.size, trusted.keys, trusted.threshold)
            check_meant_for(
                snapshot.header,
                issuer=self._enrolment.issuer,
                currency=self._enrolment.currency,
                token_key_epoch=self._enrolment.token_key_epoch,
            )
        except BaseException:
            file.close()
            raise
        # A tap in another thread may still look things up in a snapshot that was replaced meanwhile.
        weakref.finalize(snapshot, file.close)
        return snapshot

    def _check_newer(self, layers: Layers) -> None:
        """Above what is in use; the version the journal saw last may come again if its file was lost or
        broken. Not before its time, unless there is nothing else."""
        check_supersedes(layers.newest, self._journal.view.snapshot_version)
        now_unix_s = self._clock() // 1000
        if self._current is not None:
            if layers.version < self._current.version:
                raise AuthenticationFailed(
                    f"version {layers.version} is older than the one in use", step="snapshot version"
                )
            if freshness(layers.newest, now_unix_s) is Freshness.NOT_YET_VALID:
                raise InvalidSnapshot(explain_freshness(layers.newest, now_unix_s), where="snapshot validity")

    def _use(self, layers: Layers) -> None:
        header = layers.newest
        if header.version > self._journal.view.snapshot_version:
            self._record(
                Kind.SNAPSHOT_ACTIVATION,
                {
                    "version": header.version,
                    "base_version": layers.base.header.version,
                    "root": header.root.hex(),
                    "count": header.count,
                    "valid_until_unix_s": header.valid_until_unix_s,
                },
            )
        self._current = layers
        self._tidy()

    def _take_root(self) -> None:
        """Remember for ever that a root was followed, and hold the limits in use to its keys."""
        if self._trust.root_version > max(1, self._journal.view.root_version):
            self._record(Kind.TRUST_ROTATION, {"root_version": self._trust.root_version})
        self._check_root()
        layers = self._current
        if layers is None:
            return
        trusted = self._trust.limit_keys
        try:
            for snapshot in (layers.base, layers.delta):
                if snapshot is not None:
                    _head(snapshot.head).verified(trusted.keys, trusted.threshold)
        except AuthenticationFailed as error:
            self._current = None
            self.last_error = error

    def _check_root(self) -> None:
        seen = self._journal.view.root_version
        if self._trust.root_version < seen:
            self._current = None
            raise AuthenticationFailed(
                f"the root kept here is version {self._trust.root_version}, {seen} was followed before",
                step="repository version",
                advice="fetch limits from the ledger or a stick: that brings the newer root",
            )

    def _record(self, kind: Kind, facts: dict[str, object]) -> None:
        now_unix_ms = self._clock()
        record_id = uuid7(now_unix_ms, self._random_bytes(10))
        self._journal.append(kind, record_id, facts | {"at_unix_ms": now_unix_ms})

    def _now_unix_s(self) -> int:
        """What expiry is judged by: a clock set back does not make old metadata young."""
        return max(self._clock(), self._journal.latest_at_unix_ms) // 1000

    def _write_merged(self, base: Snapshot, delta: Snapshot, path: Path) -> None:
        head_path = self._folder / head_file(delta.header.version).name
        try:
            head = head_path.read_bytes()
        except FileNotFoundError:
            raise InvalidSnapshot("the head of the merged limits is missing", where=head_path.name) from None
        trusted = self._trust.limit_keys
        with path.open("w+b") as file:
            merge = Merge(base, delta, head, trusted.keys, trusted.threshold, file)
            self._check_space(base.header.count * 45)
            while not merge.step():
                self._check_stop()
                done, total = merge.progress
                self._show(Progress("merging", done, total))
            file.flush()
            os.fsync(file.fileno())

    def _merge_quietly(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        try:
            layers = self._current
            if layers is not None and layers is not self._loaded:
                for snapshot in (layers.base, layers.delta):
                    if snapshot is not None:
                        snapshot.load_nodes(self._check_stop)
                self._loaded = layers
            self.merge()
        except Stopped:
            pass
        except PosGatewayError as error:
            self.last_error = error

    def _tidy(self) -> None:
        """Remove what the limits in use have outlived. What is newer and broken stays, to be looked at."""
        layers = self._current
        if layers is None:
            return
        base = layers.base.header.version
        used = {whole_file(base)}
        if layers.delta is not None:
            used |= {delta_file(base, layers.version), head_file(layers.version)}
        for file in stored_files(self._folder):
            if (
                file not in used
                and (file.version < layers.version or layers.delta is None)
                and (file.version <= layers.version)
            ):
                (self._folder / file.name).unlink(missing_ok=True)

    def _tidy_partials(self, wanted: Sequence[TargetFile]) -> None:
        names = {self._partial(file).name for file in wanted}
        for path in self._folder.iterdir():
            if _PARTIAL.fullmatch(path.name) and path.name not in names:
                path.unlink(missing_ok=True)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped("the gateway stops")

    def _show(self, progress: Progress | None) -> None:
        self.progress = progress
        self._listener(progress)


def trusted_limit_keys(folder: Path, enrolment: Enrolment) -> LimitKeys:
    """Who may sign limits, by the newest root that is kept in a feed's folder.

    Raises:
        InvalidConfiguration: the enrolment holds no usable root.
    """
    trust = Trust(folder / METADATA, enrolment.trusted_root)
    trust.load()
    return trust.limit_keys


def _head(data: bytes) -> Head:
    return read_head(lambda offset, length: data[offset : offset + length])


def stored_files(folder: Path) -> list[LimitFile]:
    """The limit files in a folder, newest first. Nothing is verified."""
    if not folder.is_dir():
        return []
    found = (parse_name(path.name) for path in folder.iterdir())
    return sorted((file for file in found if file), key=lambda file: file.version, reverse=True)


def stored_snapshots(folder: Path) -> list[tuple[int, Path]]:
    """Versions and paths of the whole snapshots in a folder, newest first. Nothing is verified."""
    return [(file.version, folder / file.name) for file in stored_files(folder) if file.kind == "snapshot"]


def snapshot_header(path: Path) -> SnapshotHeader | None:
    """What the header of a stored snapshot says, unverified; None if it cannot be read."""
    try:
        with contextlib.closing(SnapshotFile(path)) as file:
            return SnapshotHeader.from_bytes(read_head(file.read_at).header_bytes)
    except (PosGatewayError, OSError):
        return None


def _disk_trouble(error: OSError) -> Unavailable:
    return Unavailable(
        f"limits cannot be stored: {error.strerror}", advice="check the disk and its free space"
    )
