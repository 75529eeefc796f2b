"""Limits fetched, verified and activated; what is refused, and with which words."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.errors import (
    AuthenticationFailed,
    InvalidSnapshot,
    LedgerUnreachable,
    NotFound,
    PosGatewayError,
    Unavailable,
)
from pos_gateway.gateway.feed import Progress, SnapshotFeed, stored_files
from pos_gateway.gateway.fetcher import FolderRepository
from pos_gateway.gateway.journal import Journal
from pos_gateway.records import Kind
from tests.gateway.issuer import NOW_UNIX_S, Issuer, head_of
from tests.gateway.ledger_stub import LedgerStub
from tests.gateway.snapshots import ceiling, names, new_feed, record, snapshot

FOREIGN_KEY = Ed25519PrivateKey.from_private_bytes(b"\x09" * 32)
OTHER_TOKEN = bytes(range(1, 17))


def loaded(folder: Path, journal: Journal) -> SnapshotFeed:
    feed = new_feed(folder, journal)
    feed.load()
    return feed


MANY = [record(1, number.to_bytes(16, "big")) for number in range(2000)]
CHANGED = MANY[7]._replace(ceiling=7)


def publish_with_delta(issuer: Issuer) -> None:
    """Version 2: of the many tokens of version 1, one has another ceiling."""
    issuer.publish(
        2, snapshot(2, [*MANY[:7], CHANGED, *MANY[8:]]), {1: snapshot(2, [CHANGED], base_version=1)}
    )


def test_the_newest_limits_are_fetched_activated_and_journalled_once(
    feed: SnapshotFeed, folder: Path, journal: Journal, issuer: Issuer, repository: FolderRepository
) -> None:
    with pytest.raises(NotFound, match="not published any limits yet"):
        feed.refresh(repository)
    assert feed.current() is None
    issuer.publish(3, snapshot(3))
    assert feed.refresh(repository)
    assert not feed.refresh(repository)
    assert ceiling(feed.current()) == 3000
    old = feed.current()
    issuer.publish(5, snapshot(5))
    assert feed.refresh(repository)
    assert ceiling(feed.current()) == 5000
    assert ceiling(old) == 3000, "a tap under way still looks up in the one it began with"
    assert names(folder) == {"limits-5.snapshot"}
    assert [r.facts()["version"] for r in journal.records()] == [3, 5]
    assert {r.kind for r in journal.records()} == {Kind.SNAPSHOT_ACTIVATION}
    assert feed.last_error is None


async def test_over_the_line_only_what_is_missing_is_fetched(
    feed: SnapshotFeed, folder: Path, issuer: Issuer, ledger: LedgerStub
) -> None:
    seen: list[Progress | None] = []
    feed._listener = seen.append
    issuer.publish(1, snapshot(1, MANY))
    async with ledger.client() as client:
        assert await asyncio.to_thread(feed.refresh, client.repository)
        done = [progress.done for progress in seen if progress]
        assert done == sorted(done)
        assert done[-1] == issuer.files["limits-1.snapshot"].length
        assert seen[-1] is None
        publish_with_delta(issuer)
        ledger.requests.clear()
        assert await asyncio.to_thread(feed.refresh, client.repository)
    assert ceiling(feed.current(), CHANGED.token_key) == 7
    assert ceiling(feed.current(), MANY[8].token_key) == 1000
    fetched = {path.partition(".")[2] for path, _ in ledger.requests if path.startswith("targets/")}
    assert fetched == {"limits-1-2.delta", "limits-2.head"}


def test_a_delta_is_merged_into_exactly_what_the_issuer_signed(
    feed: SnapshotFeed, folder: Path, issuer: Issuer, repository: FolderRepository, journal: Journal
) -> None:
    feed.start_merging = lambda: None  # type: ignore[method-assign]
    issuer.publish(1, snapshot(1, MANY))
    feed.refresh(repository)
    publish_with_delta(issuer)
    assert feed.refresh(repository)
    assert names(folder) == {"limits-1.snapshot", "limits-1-2.delta", "limits-2.head"}
    assert ceiling(loaded(folder, journal).current(), CHANGED.token_key) == 7, "it survives a start as it is"
    assert feed.merge()
    assert not feed.merge()
    assert names(folder) == {"limits-2.snapshot"}
    assert (folder / "limits-2.snapshot").read_bytes() == issuer.whole_path(2).read_bytes()
    assert ceiling(feed.current(), CHANGED.token_key) == 7
    assert ceiling(feed.current(), MANY[8].token_key) == 1000
    assert len(journal.records()) == 2


def test_a_merge_that_does_not_give_what_was_signed_is_thrown_away_and_the_whole_is_fetched(
    feed: SnapshotFeed, folder: Path, issuer: Issuer, repository: FolderRepository
) -> None:
    feed.start_merging = lambda: None  # type: ignore[method-assign]
    issuer.publish(1, snapshot(1, MANY))
    feed.refresh(repository)
    unlisted = MANY[9]._replace(ceiling=9)
    issuer.publish(
        2,
        snapshot(2, [*MANY[:7], CHANGED, MANY[8], unlisted, *MANY[10:]]),
        {1: snapshot(2, [CHANGED], base_version=1)},
    )
    feed.refresh(repository)
    with pytest.raises(AuthenticationFailed, match="snapshot root"):
        feed.merge()
    assert ceiling(feed.current(), CHANGED.token_key) == 7
    assert ceiling(feed.current(), unlisted.token_key) == 1000
    assert not any(name.endswith(".merging") for name in names(folder))
    assert feed.refresh(repository)
    assert ceiling(feed.current(), unlisted.token_key) == 9
    assert names(folder) == {"limits-2.snapshot"}


@pytest.mark.parametrize(
    ("made", "error", "says"),
    [
        (lambda: snapshot(4)[:-1], InvalidSnapshot, "file size"),
        (lambda: snapshot(4) + b"\0", InvalidSnapshot, "file size"),
        (lambda: b"<html>", InvalidSnapshot, "prefix"),
        (lambda: snapshot(4, signers=[FOREIGN_KEY]), AuthenticationFailed, "snapshot signature"),
        (lambda: snapshot(4, issuer="Somebody"), InvalidSnapshot, "issuer"),
        (lambda: snapshot(4, currency="EUR"), InvalidSnapshot, "currency"),
        (lambda: snapshot(4, token_key_epoch=2), InvalidSnapshot, "token_key_epoch"),
        (lambda: snapshot(4, base_version=3), InvalidSnapshot, "limits-4.snapshot"),
        (lambda: snapshot(2), InvalidSnapshot, "holds version 2"),
        (lambda: snapshot(5), InvalidSnapshot, "holds version 5"),
        (
            lambda: snapshot(4, valid_from_unix_s=NOW_UNIX_S + 3600, refresh_after_unix_s=NOW_UNIX_S + 7200),
            InvalidSnapshot,
            "valid only from",
        ),
    ],
)
def test_what_is_not_a_snapshot_for_us_leaves_the_last_good_one_in_use_though_tuf_is_fine(
    made: Callable[[], bytes],
    error: type[PosGatewayError],
    says: str,
    feed: SnapshotFeed,
    folder: Path,
    journal: Journal,
    issuer: Issuer,
    repository: FolderRepository,
) -> None:
    issuer.publish(3, snapshot(3))
    feed.refresh(repository)
    issuer.publish(4, made(), head=head_of(snapshot(4)))
    for _ in range(2):
        with pytest.raises(error, match=says):
            feed.refresh(repository)
        assert isinstance(feed.last_error, error)
    assert ceiling(feed.current()) == 3000
    assert [file.name for file in stored_files(folder)] == ["limits-3.snapshot"]
    assert journal.last_sequence == 1
    issuer.publish(4, snapshot(4))
    assert feed.refresh(repository)
    assert feed.last_error is None
    assert ceiling(feed.current()) == 4000
    assert names(folder) == {"limits-4.snapshot"}


def test_at_start_the_newest_that_verifies_is_used_and_none_older_than_seen(
    folder: Path, journal: Journal
) -> None:
    def store(name_version: int, data: bytes) -> Path:
        path = folder / f"limits-{name_version}.snapshot"
        path.write_bytes(data)
        return path

    assert loaded(folder, journal).current() is None
    # Renamed, but killed before the journal knew: it is as good as activated.
    store(3, snapshot(3))
    broken = store(4, snapshot(4)[:-1])
    assert ceiling(loaded(folder, journal).current()) == 3000
    assert journal.view.snapshot_version == 3
    assert broken.exists()
    # Put back from a backup: older than the journal has seen, so it approves nothing.
    for path in folder.iterdir():
        path.unlink()
    store(2, snapshot(2))
    feed = loaded(folder, journal)
    assert feed.current() is None
    assert "older than 3" in str(feed.last_error)
    # Another version's name does not help.
    store(9, snapshot(3))
    feed = loaded(folder, journal)
    assert feed.current() is None
    assert [file.version for file in stored_files(folder)] == [9, 2]
    store(3, snapshot(3))
    assert ceiling(loaded(folder, journal).current()) == 3000
    assert journal.last_sequence == 1


def test_a_delta_counts_only_over_its_base(folder: Path, journal: Journal) -> None:
    both = sorted([record(1), record(1, OTHER_TOKEN)])
    (folder / "limits-1.snapshot").write_bytes(snapshot(1, both))
    (folder / "limits-1-3.delta").write_bytes(snapshot(3, [record(3)], base_version=1))
    (folder / "limits-2-4.delta").write_bytes(snapshot(4, [record(4)], base_version=2))
    feed = loaded(folder, journal)
    assert ceiling(feed.current()) == 3000
    assert ceiling(feed.current(), OTHER_TOKEN) == 1000
    # The delta that was in use is gone: what lies below it is older than what was seen.
    (folder / "limits-1-3.delta").unlink()
    assert loaded(folder, journal).current() is None


def test_an_activation_that_the_journal_refuses_is_not_in_use(
    feed: SnapshotFeed,
    folder: Path,
    journal: Journal,
    issuer: Issuer,
    repository: FolderRepository,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    issuer.publish(3, snapshot(3))

    def refuse(*_: object) -> None:
        raise Unavailable("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", refuse)
        with pytest.raises(Unavailable):
            feed.refresh(repository)
    assert feed.current() is None
    feed.load()
    assert ceiling(feed.current()) == 3000


async def test_a_download_that_breaks_off_goes_on_where_it_was(
    feed: SnapshotFeed, folder: Path, issuer: Issuer, ledger: LedgerStub
) -> None:
    issuer.publish(3, snapshot(3, [record(3, number.to_bytes(16, "big")) for number in range(3000)]))
    length = issuer.files["limits-3.snapshot"].length

    async def cut(request: web.Request) -> web.StreamResponse:
        path = ledger.path(request)
        if path is None or "targets" not in str(path):
            return await ledger.file(request)
        response = web.StreamResponse(headers={"Content-Length": str(length)})
        await response.prepare(request)
        await response.write(path.read_bytes()[:50_000])
        assert request.transport is not None
        request.transport.abort()
        return response

    async with ledger.client() as client:
        ledger.on_file = cut
        with pytest.raises(LedgerUnreachable):
            await asyncio.to_thread(feed.refresh, client.repository)
        [partial] = names(folder)
        got = (folder / partial).stat().st_size
        assert 0 < got <= 50_000
        ledger.on_file = ledger.file
        ledger.requests.clear()
        assert await asyncio.to_thread(feed.refresh, client.repository)
    assert [asked for path, asked in ledger.requests if path.startswith("targets/")] == [f"bytes={got}-"]
    assert names(folder) == {"limits-3.snapshot"}
    assert feed.last_error is None


async def test_a_partial_of_a_replaced_file_is_finished_if_a_delta_leads_on_from_it(
    feed: SnapshotFeed, folder: Path, issuer: Issuer, ledger: LedgerStub, repository: FolderRepository
) -> None:
    """On a slow line a whole file may take longer than a day: it is not begun anew every day."""
    issuer.publish(1, snapshot(1, MANY))
    whole = issuer.whole_path(1)
    partial = folder / f".{whole.name.partition('.')[0]}.partial"
    partial.write_bytes(whole.read_bytes()[:60_000])
    publish_with_delta(issuer)
    async with ledger.client() as client:
        assert await asyncio.to_thread(feed.refresh, client.repository)
    fetched = {path.partition(".")[2]: asked for path, asked in ledger.requests if "targets/" in path}
    assert fetched == {"limits-1.snapshot": "bytes=60000-", "limits-1-2.delta": "", "limits-2.head": ""}
    assert ceiling(feed.current(), CHANGED.token_key) == 7
    assert not partial.exists()
