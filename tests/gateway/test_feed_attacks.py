"""Whoever holds some of the keys, the line, the stick or the disk: what he tries, and why it is refused.

In each of these the limits in use stay in use, and the reason stands in `last_error` for the staff.
"""

from __future__ import annotations

import asyncio
import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.metadata import Metadata, MetaFile, Root, TargetFile, Targets

from pos_gateway.distribution import METADATA, whole_file
from pos_gateway.errors import AuthenticationFailed, InvalidMessage, LedgerUnreachable, NotFound, Unavailable
from pos_gateway.gateway.feed import SnapshotFeed
from pos_gateway.gateway.fetcher import FolderRepository, HttpsRepository
from pos_gateway.gateway.journal import Journal
from pos_gateway.ledger.ceremony import add_key, remove_key, set_threshold
from pos_gateway.ledger.repository import utc
from pos_gateway.ledger.signing import KeyChest, Role, SigningKey, sign_metadata
from pos_gateway.records import Kind
from tests.gateway.issuer import KEYS, LIVES, NOW_UNIX_S, Issuer, fixed_key, make_root
from tests.gateway.journalling import NOW_UNIX_MS
from tests.gateway.ledger_stub import LedgerStub, strange_authority
from tests.gateway.snapshots import ceiling, enrolment, names, new_feed, record, snapshot

DAY_S = 86_400
THIEF = SigningKey(Role.TARGETS, Ed25519PrivateKey.from_private_bytes(b"\x66" * 32))


@pytest.fixture
def copies(tmp_path: Path, issuer: Issuer) -> Callable[[str], Path]:
    """Keeps the repository as it is now, for somebody to bring it back later."""

    def copy(name: str) -> Path:
        shutil.copytree(issuer.folder, tmp_path / name)
        return tmp_path / name

    return copy


def then(*changes: Callable[[Root], object]) -> Callable[[Root], None]:
    """Several changes to a root at once."""

    def change(root: Root) -> None:
        for one in changes:
            one(root)

    return change


def in_use(feed: SnapshotFeed, issuer: Issuer, repository: FolderRepository) -> None:
    issuer.publish(3, snapshot(3))
    assert feed.refresh(repository)


def refused(
    feed: SnapshotFeed, source: FolderRepository | HttpsRepository, step: str, says: str
) -> AuthenticationFailed:
    with pytest.raises(AuthenticationFailed, match=says) as caught:
        feed.refresh(source)
    assert caught.value.step == step
    assert caught.value.advice or not step.startswith("repository")
    assert feed.last_error is caught.value
    assert ceiling(feed.current()) == 3000
    return caught.value


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("days", "role"), [(3, "timestamp"), (15, "timestamp"), (1001, "root")])
def test_a_frozen_repository_is_noticed_when_its_timestamp_expires(
    days: int, role: str, folder: Path, journal: Journal, issuer: Issuer, repository: FolderRepository
) -> None:
    now_unix_ms = NOW_UNIX_MS
    feed = new_feed(folder, journal, clock=lambda: now_unix_ms)
    in_use(feed, issuer, repository)
    assert not feed.refresh(repository)
    now_unix_ms += days * DAY_S * 1000
    refused(feed, repository, "repository expiry", f"the {role} file has expired: newer limits may be held")
    issuer.now_unix_s += days * DAY_S
    if role == "timestamp":
        issuer.repository.renew(issuer.chest, utc(issuer.now_unix_s), LIVES)
        assert not feed.refresh(repository)
        assert feed.last_error is None


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_a_fresh_timestamp_does_not_make_an_expired_list_young(
    role: str, folder: Path, journal: Journal, issuer: Issuer, repository: FolderRepository
) -> None:
    """A thief of the timestamp key alone could freeze a shop for ever otherwise."""
    now_unix_ms = NOW_UNIX_MS
    feed = new_feed(folder, journal, clock=lambda: now_unix_ms)
    in_use(feed, issuer, repository)
    days = {"snapshot": 15, "targets": 91}[role]
    now_unix_ms += days * DAY_S * 1000
    state = issuer.repository.state()
    assert state is not None
    keep = [Role.TIMESTAMP] if role == "snapshot" else [Role.TIMESTAMP, Role.SNAPSHOT]
    thief = Thief(issuer, keep, now_unix_s=NOW_UNIX_S + days * DAY_S)
    thief.sign(state.targets.to_bytes(), state.targets.signed.version, keep_snapshot=role == "snapshot")
    refused(feed, repository, "repository expiry", f"the {role} file has expired")


def test_setting_the_clock_back_does_not_make_old_metadata_young(
    folder: Path, journal: Journal, issuer: Issuer, repository: FolderRepository
) -> None:
    """What the journal has seen of time counts too."""
    now_unix_ms = NOW_UNIX_MS
    feed = new_feed(folder, journal, clock=lambda: now_unix_ms)
    in_use(feed, issuer, repository)
    now_unix_ms += 3 * DAY_S * 1000
    issuer.now_unix_s += 3 * DAY_S
    old = FolderRepository(shutil.copytree(issuer.folder, folder.parent / "old"))
    issuer.publish(4, snapshot(4, valid_until_unix_s=NOW_UNIX_S + 9 * DAY_S))
    feed.refresh(repository)
    shutil.rmtree(folder)
    folder.mkdir()
    now_unix_ms = NOW_UNIX_MS
    again = new_feed(folder, journal, clock=lambda: now_unix_ms)
    again.load()
    with pytest.raises(AuthenticationFailed, match="timestamp file has expired"):
        again.refresh(old)


# --- setting back ---------------------------------------------------------------------------------


def test_an_old_copy_of_the_repository_is_refused(
    feed: SnapshotFeed, issuer: Issuer, repository: FolderRepository, copies: Callable[[str], Path]
) -> None:
    issuer.publish(2, snapshot(2))
    old = FolderRepository(copies("old"))
    in_use(feed, issuer, repository)
    refused(feed, old, "repository version", "timestamp file is older than one seen before")


def test_an_old_copy_is_refused_though_the_metadata_kept_here_was_lost(
    folder: Path,
    feed: SnapshotFeed,
    issuer: Issuer,
    repository: FolderRepository,
    copies: Callable[[str], Path],
) -> None:
    """The journal remembers the version too."""
    issuer.publish(2, snapshot(2))
    old = FolderRepository(copies("old"))
    in_use(feed, issuer, repository)
    shutil.rmtree(folder / METADATA)
    refused(feed, old, "snapshot version", "version 2, older than 3 seen before")


def test_genuine_metadata_that_lists_an_older_version_is_refused(
    feed: SnapshotFeed, issuer: Issuer, repository: FolderRepository
) -> None:
    in_use(feed, issuer, repository)
    issuer.files.clear()
    issuer.publish(2, snapshot(2))
    refused(feed, repository, "snapshot version", "version 2, older than 3 seen before")


# --- stolen keys ----------------------------------------------------------------------------------


class Thief:
    """Has some keys and the server."""

    def __init__(self, issuer: Issuer, roles: list[Role], now_unix_s: int = NOW_UNIX_S) -> None:
        self.issuer = issuer
        keys = [key for role in roles for key in KEYS[role]] + [THIEF]
        self.chest = KeyChest({key.id: key for key in keys})
        self.now_unix_s = now_unix_s

    def sign(self, targets: bytes, version: int, *, keep_snapshot: bool = False) -> None:
        """Everything above a list of files that the keys can sign, in its place."""
        state = self.issuer.repository.state()
        assert state is not None
        snapshot, timestamp = state.snapshot, state.timestamp
        if not keep_snapshot:
            snapshot.signed.meta["targets.json"] = MetaFile.from_data(version, targets, ["sha256"])
            self._resign(snapshot, LIVES.snapshot_s)
        timestamp.signed.snapshot_meta = MetaFile.from_data(
            snapshot.signed.version, snapshot.to_bytes(), ["sha256"]
        )
        self._resign(timestamp, LIVES.timestamp_s)
        metadata = self.issuer.folder / METADATA
        (metadata / f"{version}.targets.json").write_bytes(targets)
        (metadata / f"{snapshot.signed.version}.snapshot.json").write_bytes(snapshot.to_bytes())
        (metadata / "timestamp.json").write_bytes(timestamp.to_bytes())

    def list(self, *files: TargetFile) -> None:
        state = self.issuer.repository.state()
        assert state is not None
        version = state.targets.signed.version + 1
        expires = utc(self.now_unix_s + DAY_S)
        targets = Metadata(
            Targets(version=version, expires=expires, targets={file.path: file for file in files})
        )
        sign_metadata(targets, self.chest.of(Role.TARGETS))
        self.sign(targets.to_bytes(), version)

    def _resign(self, metadata: Metadata[Any], life_s: int) -> None:
        metadata.signed.version += 1
        metadata.signed.expires = utc(self.now_unix_s + life_s)
        metadata.signatures.clear()
        sign_metadata(metadata, self.chest.keys.values())


def test_stolen_online_keys_cannot_slip_in_a_limit(
    feed: SnapshotFeed, issuer: Issuer, repository: FolderRepository
) -> None:
    in_use(feed, issuer, repository)
    thief = Thief(issuer, [Role.SNAPSHOT, Role.TIMESTAMP])
    forged = snapshot(4, signers=[THIEF.private])
    thief.list(issuer.repository.add_file(whole_file(4).name, _written(issuer, forged), b"", 0))
    refused(
        feed, repository, "repository signature", "targets file is not signed by enough of the issuer's keys"
    )


def test_stolen_online_keys_cannot_bring_back_an_old_list(
    feed: SnapshotFeed, issuer: Issuer, repository: FolderRepository
) -> None:
    issuer.publish(2, snapshot(2))
    state = issuer.repository.state()
    assert state is not None
    old = state.targets
    in_use(feed, issuer, repository)
    Thief(issuer, [Role.SNAPSHOT, Role.TIMESTAMP]).sign(old.to_bytes(), old.signed.version)
    refused(feed, repository, "repository version", "snapshot file is older than one seen before")


def test_all_of_tufs_keys_but_the_root_cannot_make_a_limit(
    feed: SnapshotFeed, issuer: Issuer, repository: FolderRepository
) -> None:
    in_use(feed, issuer, repository)
    thief = Thief(issuer, [Role.SNAPSHOT, Role.TIMESTAMP, Role.TARGETS])
    forged = snapshot(4, signers=[THIEF.private])
    thief.list(issuer.repository.add_file(whole_file(4).name, _written(issuer, forged), b"", 0))
    refused(feed, repository, "snapshot signature", "signed by 0 trusted keys, 1 needed")


def test_a_header_below_its_threshold_is_refused_though_tuf_is_fine(
    tmp_path: Path, folder: Path, journal: Journal
) -> None:
    first, second = fixed_key(Role.LIMITS, 1), fixed_key(Role.LIMITS, 2)
    root = make_root({**KEYS, Role.LIMITS: [first, second]}, {Role.LIMITS: 2})
    issuer = Issuer(tmp_path / "two", root)
    repository = FolderRepository(issuer.folder)
    feed = new_feed(folder, journal, enrolment=enrolment(root))
    issuer.publish(3, snapshot(3, signers=[first.private, second.private]))
    assert feed.refresh(repository)
    for signers in ([first.private], [first.private, THIEF.private]):
        issuer.publish(4, snapshot(4, signers=signers))
        refused(feed, repository, "snapshot signature", "signed by 1 trusted keys, 2 needed")


# --- rotation and revocation ----------------------------------------------------------------------


def test_rotated_roots_are_followed_one_by_one_and_remembered(
    feed: SnapshotFeed, folder: Path, journal: Journal, issuer: Issuer, repository: FolderRepository
) -> None:
    in_use(feed, issuer, repository)
    new = [fixed_key(Role.ROOT, number) for number in (2, 3)]
    issuer.rotate(lambda root: add_key(root, new[0].public), new[0])
    issuer.rotate(
        then(lambda root: set_threshold(root, Role.ROOT, 2), lambda root: add_key(root, new[1].public)), *new
    )
    issuer.rotate(lambda root: remove_key(root, KEYS[Role.ROOT][0].id), *new)
    assert not feed.refresh(repository)
    assert ceiling(feed.current()) == 3000
    assert journal.view.root_version == 4
    rotations = [r.facts()["root_version"] for r in journal.records() if r.kind is Kind.TRUST_ROTATION]
    assert rotations == [4]
    # Off the network the kept chain is followed again, and not a step less than before.
    again = new_feed(folder, journal)
    again.load()
    assert ceiling(again.current()) == 3000
    (folder / METADATA / "4.root.json").unlink()
    again.load()
    assert again.current() is None
    assert "the root kept here is version 3, 4 was followed before" in str(again.last_error)
    assert again.refresh(repository)
    assert ceiling(again.current()) == 3000


@pytest.mark.parametrize("signers", [[], [THIEF], [fixed_key(Role.ROOT, 2)]])
def test_a_root_that_the_old_root_did_not_sign_is_refused(
    signers: list[SigningKey], feed: SnapshotFeed, issuer: Issuer, repository: FolderRepository
) -> None:
    in_use(feed, issuer, repository)
    new = Metadata(copy.deepcopy(issuer.repository.root().signed))
    add_key(new.signed, fixed_key(Role.ROOT, 2).public)
    new.signed.version += 1
    sign_metadata(new, signers)
    issuer.repository.write_root(new)
    refused(feed, repository, "repository signature", "root file is not signed by enough")


def test_a_root_number_cannot_be_skipped(
    feed: SnapshotFeed, issuer: Issuer, repository: FolderRepository
) -> None:
    in_use(feed, issuer, repository)
    issuer.rotate(lambda root: add_key(root, fixed_key(Role.ROOT, 2).public))
    metadata = issuer.folder / METADATA
    skipped = json.loads((metadata / "2.root.json").read_bytes())
    skipped["signed"]["version"] = 3
    root = Metadata[Root].from_bytes(json.dumps(skipped).encode())
    root.signatures.clear()
    sign_metadata(root, KEYS[Role.ROOT])
    (metadata / "2.root.json").write_bytes(root.to_bytes())
    refused(feed, repository, "repository version", "root file")


def test_a_genuine_root_that_names_no_limit_keys_changes_nothing(
    feed: SnapshotFeed, journal: Journal, issuer: Issuer, repository: FolderRepository
) -> None:
    """A mistake of the issuer's must not cost the shop the limits it has."""
    in_use(feed, issuer, repository)
    issuer.rotate(lambda root: root.unrecognized_fields.clear())
    for _ in range(2):
        with pytest.raises(InvalidMessage, match="does not say who may sign limits"):
            feed.refresh(repository)
        assert ceiling(feed.current()) == 3000
    assert journal.view.root_version == 0


def test_what_a_revoked_limit_key_signed_approves_nothing_any_more(
    feed: SnapshotFeed, folder: Path, journal: Journal, issuer: Issuer, repository: FolderRepository
) -> None:
    in_use(feed, issuer, repository)
    new, old = fixed_key(Role.LIMITS, 2), KEYS[Role.LIMITS][0]
    issuer.rotate(then(lambda root: add_key(root, new.public), lambda root: remove_key(root, old.id)))
    with pytest.raises(AuthenticationFailed, match="signed by 0 trusted keys"):
        feed.refresh(repository)
    assert feed.current() is None
    again = new_feed(folder, journal)
    again.load()
    assert again.current() is None, "nor after a start without a network"
    issuer.publish(4, snapshot(4, signers=[new.private]))
    assert feed.refresh(repository)
    assert ceiling(feed.current()) == 4000


def test_planned_rotation_of_a_limit_key_never_leaves_a_shop_without_limits(
    feed: SnapshotFeed, issuer: Issuer, repository: FolderRepository
) -> None:
    in_use(feed, issuer, repository)
    new, old = fixed_key(Role.LIMITS, 2), KEYS[Role.LIMITS][0]
    issuer.rotate(lambda root: add_key(root, new.public))
    issuer.publish(4, snapshot(4, signers=[old.private, new.private]))
    assert feed.refresh(repository)
    issuer.rotate(lambda root: remove_key(root, old.id))
    assert not feed.refresh(repository)
    assert ceiling(feed.current()) == 4000


@pytest.mark.parametrize("role", [Role.TARGETS, Role.SNAPSHOT, Role.TIMESTAMP])
def test_a_revoked_key_of_the_repository_signs_nothing_any_more(
    role: Role, feed: SnapshotFeed, issuer: Issuer, repository: FolderRepository
) -> None:
    in_use(feed, issuer, repository)
    old, new = KEYS[role][0], fixed_key(role, 2)
    with_new = KeyChest({**issuer.chest.keys, new.id: new})
    without_new, issuer.chest = issuer.chest, with_new
    issuer.rotate(then(lambda root: add_key(root, new.public), lambda root: remove_key(root, old.id)))
    assert not feed.refresh(repository)
    thief = Thief(issuer, [Role.SNAPSHOT, Role.TIMESTAMP, Role.TARGETS])
    assert old.id in without_new.keys
    thief.list(*issuer.files.values())
    refused(feed, repository, "repository signature", f"the {role.value} file is not signed by enough")


# --- the line and the disk ------------------------------------------------------------------------


async def test_other_bytes_than_signed_for_are_thrown_away_and_fetched_anew(
    feed: SnapshotFeed, folder: Path, issuer: Issuer, ledger: LedgerStub
) -> None:
    async with ledger.client() as client:
        issuer.publish(3, snapshot(3))
        await asyncio.to_thread(feed.refresh, client.repository)
        issuer.publish(4, snapshot(4))
        content = issuer.whole_path(4).read_bytes()

        def answering(data: bytes) -> Callable[[web.Request], Any]:
            async def answer(request: web.Request) -> web.StreamResponse:
                if "targets/" in request.path:
                    return web.Response(body=data)
                return await ledger.file(request)

            return answer

        for data, says in (
            (bytes(len(content)), "other bytes came for limits-4.snapshot"),
            (content[:-1] + b"\1", "other bytes came"),
            (content + b"\0", f"more than {len(content)} bytes came"),
        ):
            ledger.on_file = answering(data)
            await asyncio.to_thread(refused, feed, client.repository, "repository hash", says)
            assert names(folder) == {"limits-3.snapshot"}
        ledger.on_file = answering(content[:-10])
        with pytest.raises(LedgerUnreachable, match=rf"broke off after {len(content) - 10} of"):
            await asyncio.to_thread(feed.refresh, client.repository)
        ledger.on_file = ledger.file
        assert await asyncio.to_thread(feed.refresh, client.repository)
    assert ceiling(feed.current()) == 4000


async def test_data_without_end_is_cut_off(
    feed: SnapshotFeed, folder: Path, issuer: Issuer, ledger: LedgerStub
) -> None:
    endless = "nothing"
    sent = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        if endless not in request.path:
            return await ledger.file(request)
        response = web.StreamResponse()
        await response.prepare(request)
        while request.transport is not None and not request.transport.is_closing():
            await response.write(b" " * 65_536)
            sent += 65_536
            await asyncio.sleep(0)
        return response

    async with ledger.client() as client:
        issuer.publish(3, snapshot(3))
        await asyncio.to_thread(feed.refresh, client.repository)
        issuer.publish(4, snapshot(4))
        ledger.on_file = answer
        for path, error, says in (
            ("2.root.json", InvalidMessage, r"over 524288 bytes, refused at metadata/2.root.json"),
            ("timestamp.json", InvalidMessage, "over 16384 bytes"),
            ("snapshot.json", InvalidMessage, r"over \d{3} bytes"),
            ("targets.json", InvalidMessage, r"over \d{3,4} bytes"),
            ("targets/", AuthenticationFailed, "more than [0-9]+ bytes"),
        ):
            endless = path
            with pytest.raises(error, match=says):
                await asyncio.to_thread(feed.refresh, client.repository)
            assert isinstance(feed.last_error, error)
            assert ceiling(feed.current()) == 3000
            assert names(folder) == {"limits-3.snapshot"}
    assert sent < 32 * 1024 * 1024


async def test_a_server_that_dribbles_is_given_up(
    feed: SnapshotFeed, folder: Path, issuer: Issuer, ledger: LedgerStub
) -> None:
    """It never falls silent long enough to be taken for dead, and what came stays. Its time is counted
    by a clock of the test's."""
    issuer.publish(3, snapshot(3))
    at_s = 0.0

    def monotonic() -> float:
        nonlocal at_s
        at_s += 20.0
        return at_s

    dribbled = "timestamp.json"

    async def answer(request: web.Request) -> web.StreamResponse:
        path = ledger.path(request)
        if dribbled not in request.path or path is None or not path.is_file():
            return await ledger.file(request)
        response = web.StreamResponse()
        await response.prepare(request)
        for byte in path.read_bytes():
            await response.write(bytes([byte]))
            await asyncio.sleep(0.001)
        return response

    ledger.on_file = answer
    slow = HttpsRepository(ledger.url, ledger.authority, monotonic=monotonic)
    with pytest.raises(LedgerUnreachable, match="answers too slowly"):
        await asyncio.to_thread(feed.refresh, slow)
    dribbled = "targets/"
    with pytest.raises(LedgerUnreachable, match="sends too slowly"):
        await asyncio.to_thread(feed.refresh, slow)
    [partial] = names(folder)
    assert (folder / partial).stat().st_size > 0


async def test_silence_and_another_server_are_a_line_that_is_down(
    feed: SnapshotFeed, issuer: Issuer, ledger: LedgerStub, tmp_path: Path
) -> None:
    issuer.publish(3, snapshot(3))

    async def silent(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    ledger.on_file = silent
    dead = HttpsRepository(ledger.url, ledger.authority, silence_s=0.2)
    with pytest.raises(LedgerUnreachable, match="did not answer in time"):
        await asyncio.to_thread(feed.refresh, dead)
    slow_to_begin = HttpsRepository(ledger.url, ledger.authority, patience_s=0.2)
    with pytest.raises(LedgerUnreachable):
        await asyncio.to_thread(feed.refresh, slow_to_begin)
    ledger.requests.clear()
    other = HttpsRepository(ledger.url, strange_authority(tmp_path))
    with pytest.raises(LedgerUnreachable, match="not the ledger this gateway enrolled with"):
        await asyncio.to_thread(feed.refresh, other)
    assert ledger.requests == [], "nothing is asked of a stranger"
    assert feed.last_error is None


def test_rubbish_in_a_partial_is_found_out_by_its_hash(
    feed: SnapshotFeed, folder: Path, issuer: Issuer, repository: FolderRepository
) -> None:
    """Half-written pages after a power cut: the length is right, the content is not."""
    issuer.publish(3, snapshot(3))
    sha256 = issuer.whole_path(3).name.partition(".")[0]
    length = issuer.files["limits-3.snapshot"].length
    partial = folder / f".{sha256}.partial"
    for size in (10, length - 1, length):
        partial.write_bytes(b"\xff" * size)
        with pytest.raises(AuthenticationFailed, match="other bytes"):
            feed.refresh(repository)
        assert names(folder) == set()
    partial.write_bytes(b"\xff" * (length + 1))
    assert feed.refresh(repository), "too long: begun anew"
    assert ceiling(feed.current()) == 3000


def test_what_was_kept_of_the_metadata_may_be_rubbish(
    feed: SnapshotFeed, folder: Path, journal: Journal, issuer: Issuer, repository: FolderRepository
) -> None:
    in_use(feed, issuer, repository)
    issuer.rotate(lambda root: add_key(root, fixed_key(Role.ROOT, 2).public))
    feed.refresh(repository)
    for path in sorted((folder / METADATA).iterdir()):
        good = path.read_bytes()
        for bad in (b"", good[: len(good) // 2], b"{}", b"\xff" * len(good), b"[" * 100_000):
            path.write_bytes(bad)
            again = new_feed(folder, journal)
            again.load()
            again.refresh(repository)
            assert ceiling(again.current()) == 3000
        assert path.read_bytes() == good, "it was fetched anew"


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "root"])
def test_rubbish_in_place_of_metadata_is_refused_in_words(
    role: str, feed: SnapshotFeed, issuer: Issuer, repository: FolderRepository
) -> None:
    in_use(feed, issuer, repository)
    issuer.publish(4, snapshot(4))
    issuer.rotate(lambda root: add_key(root, fixed_key(Role.ROOT, 2).public))
    state = issuer.repository.state()
    assert state is not None
    version = {"snapshot": state.snapshot.signed.version, "targets": state.targets.signed.version, "root": 2}
    file = f"{version[role]}.{role}.json" if role in version else f"{role}.json"
    path = issuer.folder / METADATA / file
    for bad in (b"", b"{}", b"[" * 100_000, b"\xff\xfe", path.read_bytes()[:-5]):
        path.write_bytes(bad)
        with pytest.raises((InvalidMessage, AuthenticationFailed), match=role):
            feed.refresh(repository)
        assert feed.last_error is not None
        assert ceiling(feed.current()) == 3000


def test_a_folder_that_is_no_repository_and_one_that_goes_away(
    feed: SnapshotFeed, issuer: Issuer, repository: FolderRepository, tmp_path: Path
) -> None:
    in_use(feed, issuer, repository)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match=r"has no metadata/timestamp\.json"):
        feed.refresh(FolderRepository(tmp_path / "empty"))
    issuer.publish(4, snapshot(4))
    issuer.whole_path(4).unlink()
    with pytest.raises(NotFound, match="targets/"):
        feed.refresh(repository)
    (issuer.folder / METADATA / "timestamp.json").unlink()
    (issuer.folder / METADATA / "timestamp.json").mkdir()
    with pytest.raises(Unavailable, match="cannot be read"):
        feed.refresh(repository)
    assert ceiling(feed.current()) == 3000


def test_the_journals_room_on_the_disk_is_left_alone(
    folder: Path, journal: Journal, issuer: Issuer, repository: FolderRepository
) -> None:
    free_bytes = shutil.disk_usage(folder).free
    issuer.publish(3, snapshot(3, [record(3, number.to_bytes(16, "big")) for number in range(2000)]))
    feed = new_feed(folder, journal, keep_free_bytes=2 * free_bytes)
    with pytest.raises(Unavailable, match=r"the disk has \d+ KiB left, new limits need \d+ KiB"):
        feed.refresh(repository)
    assert names(folder) == set()


def _written(issuer: Issuer, data: bytes) -> Path:
    path = issuer.folder.parent / "forged"
    path.write_bytes(data)
    return path
