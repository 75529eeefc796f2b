from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.errors import (
    AuthenticationFailed,
    InvalidMessage,
    InvalidSnapshot,
    LedgerUnreachable,
    NotFound,
    PosGatewayError,
)
from pos_gateway.gateway.feed import SnapshotFeed, stored_snapshots
from pos_gateway.gateway.journal import Journal
from pos_gateway.limits.layers import Layers
from pos_gateway.records import Kind
from tests.gateway.journalling import NOW_UNIX_MS, open_journal
from tests.gateway.ledger_stub import LedgerStub
from tests.gateway.snapshots import NOW_UNIX_S, TOKEN_KEY, enrolment, snapshot

FOREIGN_KEY = Ed25519PrivateKey.from_private_bytes(b"\x09" * 32)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with open_journal(tmp_path / "journal.sqlite3") as journal:
        yield journal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "snapshots"
    folder.mkdir()
    return folder


@pytest.fixture
def feed(folder: Path, journal: Journal) -> SnapshotFeed:
    return SnapshotFeed(folder, journal, enrolment(), clock=lambda: NOW_UNIX_MS)


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[LedgerStub]:
    stub = LedgerStub()
    async with stub.serving(tmp_path):
        yield stub


def ceiling(current: Layers | None) -> int:
    assert current is not None
    record, _ = current.lookup(TOKEN_KEY)
    assert record is not None
    return record.ceiling


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def test_the_newest_snapshot_is_fetched_activated_and_journalled_once(
    feed: SnapshotFeed, folder: Path, journal: Journal, ledger: LedgerStub
) -> None:
    async with ledger.client() as client:
        with pytest.raises(NotFound):
            await feed.refresh(client)
        assert feed.current() is None
        ledger.published[3] = snapshot(3)
        assert await feed.refresh(client)
        assert not await feed.refresh(client)
        assert ceiling(feed.current()) == 3000
        old = feed.current()
        ledger.published[5] = snapshot(5)
        assert await feed.refresh(client)
    assert ceiling(feed.current()) == 5000
    assert ceiling(old) == 3000, "a tap under way still looks up in the one it began with"
    assert [version for version, _ in stored_snapshots(folder)] == [5]
    assert names(folder) == ["limits-0000000000000005.snapshot"]
    activations = [record.facts()["version"] for record in journal.records()]
    assert activations == [3, 5]
    assert {record.kind for record in journal.records()} == {Kind.SNAPSHOT_ACTIVATION}
    assert feed.last_error is None


@pytest.mark.parametrize(
    ("made", "error", "says"),
    [
        (lambda: snapshot(4)[:-1], InvalidSnapshot, "file size"),
        (lambda: snapshot(4) + b"\0", InvalidSnapshot, "file size"),
        (lambda: b"<html>", InvalidSnapshot, "prefix"),
        (lambda: snapshot(4, signer=FOREIGN_KEY), AuthenticationFailed, "snapshot signature"),
        (lambda: snapshot(4, issuer="Somebody"), InvalidSnapshot, "issuer"),
        (lambda: snapshot(4, currency="EUR"), InvalidSnapshot, "currency"),
        (lambda: snapshot(4, token_key_epoch=2), InvalidSnapshot, "token_key_epoch"),
        (lambda: snapshot(4, base_version=3), InvalidSnapshot, "delta"),
        (lambda: snapshot(2), AuthenticationFailed, "older than 3"),
        (lambda: snapshot(3), AuthenticationFailed, "in use already"),
        (
            lambda: snapshot(4, valid_from_unix_s=NOW_UNIX_S + 3600),
            InvalidSnapshot,
            "valid only from",
        ),
    ],
)
async def test_what_is_not_a_snapshot_for_us_leaves_the_last_good_one_in_use(
    made: Callable[[], bytes],
    error: type[PosGatewayError],
    says: str,
    feed: SnapshotFeed,
    folder: Path,
    journal: Journal,
    ledger: LedgerStub,
) -> None:
    async with ledger.client() as client:
        ledger.published[3] = snapshot(3)
        await feed.refresh(client)
        ledger.published[4] = made()
        with pytest.raises(error, match=says):
            await feed.refresh(client)
        assert isinstance(feed.last_error, error)
        assert ceiling(feed.current()) == 3000
        assert [version for version, _ in stored_snapshots(folder)] == [3]
        assert len(names(folder)) == 1
        assert journal.last_sequence == 1
        ledger.published[4] = snapshot(4)
        assert await feed.refresh(client)
    assert feed.last_error is None
    assert ceiling(feed.current()) == 4000


async def test_a_ledger_that_offers_less_or_other_than_it_sends_is_refused(
    feed: SnapshotFeed, folder: Path, ledger: LedgerStub
) -> None:
    ledger.published[3] = snapshot(3)
    async with ledger.client() as client:
        await feed.refresh(client)
        ledger.published[4] = snapshot(4)

        async def short(request: web.Request) -> web.StreamResponse:
            return web.Response(body=ledger.published[4][:-10])

        async def long(request: web.Request) -> web.StreamResponse:
            return web.Response(body=ledger.published[4] * 2)

        async def other(request: web.Request) -> web.StreamResponse:
            return web.Response(body=bytes(len(ledger.published[4])))

        for answer in (short, long, other):
            ledger.on_download = answer
            with pytest.raises(InvalidMessage, match="bytes offered"):
                await feed.refresh(client)

        async def cut(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Length": str(len(ledger.published[4]))})
            await response.prepare(request)
            await response.write(ledger.published[4][:50])
            assert request.transport is not None
            request.transport.abort()
            return response

        ledger.on_download = cut
        with pytest.raises(LedgerUnreachable):
            await feed.refresh(client)
        del ledger.published[4], ledger.published[3]
        ledger.published[2] = snapshot(2)
        with pytest.raises(AuthenticationFailed, match="offers version 2, older than 3"):
            await feed.refresh(client)
    assert ceiling(feed.current()) == 3000
    assert [version for version, _ in stored_snapshots(folder)] == [3]


def test_at_start_the_newest_that_verifies_is_used_and_none_older_than_seen(
    folder: Path, journal: Journal
) -> None:
    def loaded() -> SnapshotFeed:
        feed = SnapshotFeed(folder, journal, enrolment(), clock=lambda: NOW_UNIX_MS)
        feed.load()
        return feed

    def store(name_version: int, data: bytes) -> Path:
        path = folder / f"limits-{name_version:016d}.snapshot"
        path.write_bytes(data)
        return path

    assert loaded().current() is None
    # Renamed, but killed before the journal knew: it is as good as activated.
    store(3, snapshot(3))
    broken = store(4, snapshot(4)[:-1])
    feed = loaded()
    assert ceiling(feed.current()) == 3000
    assert journal.view.snapshot_version == 3
    assert broken.exists()
    # Put back from a backup: older than the journal has seen, so it approves nothing.
    for path in folder.iterdir():
        path.unlink()
    store(2, snapshot(2))
    feed = loaded()
    assert feed.current() is None
    assert "older than 3" in str(feed.last_error)
    # Another version's name does not help.
    store(9, snapshot(3))
    feed = loaded()
    assert feed.current() is None
    assert [version for version, _ in stored_snapshots(folder)] == [9, 2]
    store(3, snapshot(3))
    assert ceiling(loaded().current()) == 3000
    assert journal.last_sequence == 1


def test_an_activation_that_the_journal_refuses_is_not_in_use(
    folder: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = SnapshotFeed(folder, journal, enrolment(), clock=lambda: NOW_UNIX_MS)
    path = folder / ".download"
    path.write_bytes(snapshot(3))

    def refuse(*_: object) -> None:
        raise LedgerUnreachable("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", refuse)
        with pytest.raises(LedgerUnreachable):
            feed.activate(path)
    assert feed.current() is None
    feed.load()
    assert ceiling(feed.current()) == 3000
