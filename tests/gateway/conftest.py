from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from pos_gateway.gateway.feed import SnapshotFeed
from pos_gateway.gateway.fetcher import FolderRepository
from pos_gateway.gateway.journal import Journal
from tests.gateway.issuer import Issuer
from tests.gateway.journalling import open_journal
from tests.gateway.ledger_stub import LedgerStub
from tests.gateway.snapshots import new_feed


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
def feed(folder: Path, journal: Journal) -> Iterator[SnapshotFeed]:
    feed = new_feed(folder, journal)
    yield feed
    feed.close()


@pytest.fixture
def issuer(tmp_path: Path) -> Issuer:
    return Issuer(tmp_path / "repository")


@pytest.fixture
def repository(issuer: Issuer) -> FolderRepository:
    return FolderRepository(issuer.folder)


@pytest.fixture
async def ledger(tmp_path: Path, issuer: Issuer) -> AsyncIterator[LedgerStub]:
    stub = LedgerStub()
    stub.repository = issuer.folder
    async with stub.serving(tmp_path):
        yield stub
