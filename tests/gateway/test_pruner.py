from __future__ import annotations

from pathlib import Path

import pytest

from pos_gateway.gateway.feed import SnapshotFeed
from pos_gateway.gateway.fetcher import FolderRepository
from pos_gateway.gateway.journal import Journal
from pos_gateway.gateway.pruner import Pruner
from tests.gateway.issuer import Issuer
from tests.gateway.journalling import NOW_UNIX_MS, acknowledgement, sale
from tests.gateway.snapshots import new_feed, snapshot

DAY_MS = 86_400_000
LATER = NOW_UNIX_MS + 400 * DAY_MS
SALES = 250


@pytest.fixture
def feed(folder: Path, journal: Journal, issuer: Issuer, repository: FolderRepository) -> SnapshotFeed:
    issuer.publish(1, snapshot(1))
    feed = new_feed(folder, journal)
    feed.refresh(repository)
    journal.append_all([sale(n) for n in range(SALES)])
    journal.append_all([acknowledgement(n) for n in range(SALES)])
    return feed


def pruner(journal: Journal, feed: SnapshotFeed, clock_unix_ms: int, ledger_unix_ms: int | None) -> Pruner:
    return Pruner(
        journal,
        feed,
        keep_days=180,
        clock=lambda: clock_unix_ms,
        ledger_time_unix_ms=lambda: ledger_unix_ms,
    )


async def test_what_is_old_by_both_clocks_goes(journal: Journal, feed: SnapshotFeed) -> None:
    count = journal.verify()
    await pruner(journal, feed, LATER, LATER).prune()
    assert journal.pruned_until == count - 1
    assert journal.verify() == 2
    assert journal.was_pruned(sale(0).id)


@pytest.mark.parametrize(
    ("clock_unix_ms", "ledger_unix_ms"),
    [(LATER, None), (LATER, NOW_UNIX_MS), (NOW_UNIX_MS, LATER), (NOW_UNIX_MS + 179 * DAY_MS, LATER)],
)
async def test_nothing_goes_by_a_clock_that_the_other_contradicts_or_before_its_time(
    journal: Journal, feed: SnapshotFeed, clock_unix_ms: int, ledger_unix_ms: int | None
) -> None:
    count = journal.verify()
    await pruner(journal, feed, clock_unix_ms, ledger_unix_ms).prune()
    assert journal.pruned_until == 0
    assert journal.verify() == count


async def test_nothing_goes_while_the_issuers_deadline_is_not_known(journal: Journal, folder: Path) -> None:
    journal.append_all([sale(0), sale(1), acknowledgement(0)])
    await pruner(journal, new_feed(folder, journal), LATER, LATER).prune()
    assert journal.pruned_until == 0
