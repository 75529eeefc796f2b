"""Prunes the running gateway's journal: now and then, a few records at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from pos_gateway.errors import PosGatewayError
from pos_gateway.gateway.feed import SnapshotFeed
from pos_gateway.gateway.journal import Journal
from pos_gateway.gateway.retention import keep_s

_log = structlog.get_logger(__name__)

_FIRST_LOOK_S: Final = 60.0
_INTERVAL_S: Final = 6 * 3600.0
_BREATH_S: Final = 0.05
"""Between two steps: payments come first."""


class Pruner:
    """What is old is judged by the ledger's clock beside our own: one that ran ahead prunes nothing."""

    def __init__(
        self,
        journal: Journal,
        feed: SnapshotFeed,
        *,
        keep_days: int,
        clock: Callable[[], int],
        ledger_time_unix_ms: Callable[[], int | None],
    ) -> None:
        self._journal = journal
        self._feed = feed
        self._keep_days = keep_days
        self._clock = clock
        self._ledger_time_unix_ms = ledger_time_unix_ms

    async def run(self) -> None:
        """Prune until cancelled; failures are logged and tried again later."""
        await asyncio.sleep(_FIRST_LOOK_S)
        while True:
            try:
                await self.prune()
            except PosGatewayError as error:
                _log.warning("the journal was not pruned", reason=error.reason)
            await asyncio.sleep(_INTERVAL_S)

    async def prune(self) -> None:
        """
        Raises:
            Unavailable, OutcomeUnknown: see `Journal.prune`.
        """
        limits, ledger_unix_ms = self._feed.current(), self._ledger_time_unix_ms()
        wanted_s = keep_s(self._keep_days, limits.newest.policy.presentment_deadline_s if limits else None)
        if wanted_s is None or ledger_unix_ms is None:
            return
        now_unix_ms = self._clock()
        older_than_unix_ms = min(now_unix_ms, ledger_unix_ms) - 1000 * wanted_s
        checkpoint = await asyncio.to_thread(self._journal.prune, older_than_unix_ms, now_unix_ms)
        left = True
        while left:
            left = await asyncio.to_thread(self._journal.prune_some)
            await asyncio.sleep(_BREATH_S)
        _log.info("journal pruned", until_sequence=checkpoint.sequence, kept=len(checkpoint.kept))
