"""A clock that lies behind what was recorded is trusted again only when a manager says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pos_gateway.errors import Conflict, InvalidMessage
from pos_gateway.gateway.clock import confirm_clock
from pos_gateway.gateway.fetcher import FolderRepository
from pos_gateway.gateway.journal import Journal
from pos_gateway.records import Kind
from tests.gateway.issuer import NOW_UNIX_S, Issuer
from tests.gateway.journalling import NOW_UNIX_MS, open_journal, sale
from tests.gateway.snapshots import new_feed, snapshot

HOUR_MS = 3_600_000


def confirm(journal: Journal, now_unix_ms: int, **changes: Any) -> None:
    settings: dict[str, Any] = {
        "time_unix_ms": now_unix_ms,
        "enrolled_unix_s": NOW_UNIX_S - 86_400,
        "limits": None,
        "tolerance_s": 300,
    }
    confirm_clock(journal, now_unix_ms=now_unix_ms, **{**settings, **changes})


def test_the_high_water_mark_begins_anew_from_the_confirmed_time(tmp_path: Path) -> None:
    path = tmp_path / "clock.sqlite3"
    with open_journal(path) as journal:
        journal.append_all([sale(1, at_unix_ms=NOW_UNIX_MS + 9 * HOUR_MS)])
        assert journal.latest_at_unix_ms == NOW_UNIX_MS + 9 * HOUR_MS
        confirm(journal, NOW_UNIX_MS)
        assert journal.latest_at_unix_ms == NOW_UNIX_MS
        [confirmation] = [r for r in journal.records() if r.kind is Kind.CLOCK_CONFIRMATION]
        assert confirmation.facts() == {
            "at_unix_ms": NOW_UNIX_MS,
            "high_water_unix_ms": NOW_UNIX_MS + 9 * HOUR_MS,
        }
        assert not confirmation.kind.presented
        journal.append_all([sale(2, at_unix_ms=NOW_UNIX_MS + HOUR_MS)])
        assert journal.latest_at_unix_ms == NOW_UNIX_MS + HOUR_MS
    with open_journal(path) as journal:
        assert journal.latest_at_unix_ms == NOW_UNIX_MS + HOUR_MS, "and so it is after a start"


def test_a_time_that_cannot_be_right_is_refused(
    journal: Journal, folder: Path, issuer: Issuer, repository: FolderRepository
) -> None:
    issuer.publish(3, snapshot(3))
    feed = new_feed(folder, journal)
    feed.refresh(repository)
    current = feed.current()
    assert current is not None
    before = journal.last_sequence
    with pytest.raises(InvalidMessage, match="cannot be right: this gateway was enrolled at"):
        confirm(journal, NOW_UNIX_MS - 25 * HOUR_MS)
    with pytest.raises(InvalidMessage, match="cannot be right: limits 3 were published at"):
        confirm(journal, NOW_UNIX_MS - HOUR_MS, limits=current.newest)
    with pytest.raises(InvalidMessage, match="cannot be right: the ledger was spoken to at"):
        confirm(journal, NOW_UNIX_MS, ledger_unix_ms=NOW_UNIX_MS + HOUR_MS)
    with pytest.raises(Conflict, match="this machine's clock says 2025-11-24"):
        confirm(journal, NOW_UNIX_MS, time_unix_ms=NOW_UNIX_MS + HOUR_MS)
    assert journal.last_sequence == before
    confirm(journal, NOW_UNIX_MS - 200_000, limits=current.newest)
    assert journal.latest_at_unix_ms == NOW_UNIX_MS - 200_000


def test_a_clock_that_ran_ahead_stops_fetching_until_it_is_confirmed(
    journal: Journal, folder: Path, issuer: Issuer, repository: FolderRepository
) -> None:
    journal.append_all([sale(1, at_unix_ms=NOW_UNIX_MS + 30 * 24 * HOUR_MS)])
    issuer.publish(3, snapshot(3))
    feed = new_feed(folder, journal)
    with pytest.raises(Exception, match="timestamp file has expired"):
        feed.refresh(repository)
    confirm(journal, NOW_UNIX_MS)
    assert feed.refresh(repository)
