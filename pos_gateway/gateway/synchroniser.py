"""Brings the journal to the ledger and new limits to the till; the till never waits for it.

The queue is the journal itself: what has no acknowledgement is presented, in order, until it has one.
Whatever is lost on the way, the same bytes are presented again and the ledger says `duplicate`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.errors import (
    AuthenticationFailed,
    InvalidInput,
    LedgerUnreachable,
    NotFound,
    OutcomeUnknown,
    PosGatewayError,
    Unavailable,
)
from pos_gateway.gateway.feed import SnapshotFeed
from pos_gateway.gateway.journal import Draft, Journal
from pos_gateway.gateway.ledger_client import Answer, LedgerClient
from pos_gateway.records import MAX_BATCH_RECORDS, Kind, Record, uuid7

_FIRST_BACKOFF_S: Final = 1.0
_LONGEST_BACKOFF_S: Final = 60.0


class Line(Enum):
    UNKNOWN = "unknown"
    UP = "up"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class SynchroniserState:
    """How synchronisation stands, for the page. Times are unix milliseconds.

    `presented` and `remaining` count records of the run that is under way or was the last.
    """

    line: Line = Line.UNKNOWN
    since_unix_ms: int | None = None
    running: bool = False
    presented: int = 0
    remaining: int = 0
    last_success_at_unix_ms: int | None = None
    last_error: str | None = None
    last_advice: str | None = None


class Synchroniser:
    """One asyncio task (`run`). `listener` is called on its event loop at every change of `state`."""

    def __init__(
        self,
        journal: Journal,
        client: LedgerClient,
        feed: SnapshotFeed,
        *,
        gateway_id: str,
        signer: Ed25519PrivateKey,
        interval_s: float,
        clock: Callable[[], int],
        rng: random.Random,
        random_bytes: Callable[[int], bytes] = os.urandom,
        batch_records: int = MAX_BATCH_RECORDS,
        listener: Callable[[SynchroniserState], None] = lambda state: None,
    ) -> None:
        self._journal = journal
        self._client = client
        self._feed = feed
        self._gateway_id = gateway_id
        self._signer = signer
        self._interval_s = interval_s
        self._clock = clock
        self._rng = rng
        self._random_bytes = random_bytes
        self._batch_records = batch_records
        self._listener = listener
        self._state = SynchroniserState()
        self._wanted = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def state(self) -> SynchroniserState:
        return self._state

    def synchronise_now(self) -> None:
        """Do not wait for the interval or the backoff. May be called from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wanted.set)

    async def run(self) -> None:
        """Synchronise until cancelled. Failures are shown in `state` and tried again."""
        self._loop = asyncio.get_running_loop()
        failures = 0
        while True:
            self._wanted.clear()
            try:
                await self.synchronise()
            except PosGatewayError:
                failures += 1
                pause_s = backoff_s(failures, self._rng)
            else:
                failures = 0
                pause_s = self._interval_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wanted.wait()

    async def synchronise(self) -> None:
        """Present the whole queue, then look for new limits.

        Raises:
            PosGatewayError: why it could not be finished; what was acknowledged stays so. Limits that
                this gateway may not use are no such reason.
        """
        self._change(running=True, presented=0, remaining=self._journal.exposure.count)
        try:
            await self._present_queue()
            await self._refresh_limits()
        except PosGatewayError as error:
            self._change(
                running=False, line=self._line_after(error), last_error=error.reason, last_advice=error.advice
            )
            raise
        self._change(
            running=False,
            remaining=self._journal.exposure.count,
            last_success_at_unix_ms=self._clock(),
            last_error=None,
            last_advice=None,
        )

    async def _present_queue(self) -> None:
        while batch := await asyncio.to_thread(self._journal.queue, self._batch_records):
            answers = await self._client.present(self._gateway_id, batch, self._signer)
            await asyncio.to_thread(self._journal.append_all, self._acknowledgements(batch, answers))
            self._change(
                line=Line.UP,
                presented=self._state.presented + len(batch),
                remaining=self._journal.exposure.count,
            )

    async def _refresh_limits(self) -> None:
        # Nothing published yet, or nothing we may use: the till goes on with the limits it has, the money
        # is presented all the same, and `feed.last_error` tells what was wrong.
        with contextlib.suppress(NotFound, InvalidInput, AuthenticationFailed):
            await asyncio.to_thread(self._feed.refresh, self._client.repository)
        self._change(line=Line.UP)

    def _acknowledgements(self, batch: Sequence[Record], answers: Sequence[Answer]) -> list[Draft]:
        now_unix_ms = self._clock()
        return [
            Draft(
                Kind.ACKNOWLEDGEMENT,
                uuid7(now_unix_ms, self._random_bytes(10)),
                {
                    "about": str(record.id),
                    "verdict": answer.verdict.value,
                    "reason": answer.reason,
                    "at_unix_ms": now_unix_ms,
                },
            )
            for record, answer in zip(batch, answers, strict=True)
        ]

    def _line_after(self, error: PosGatewayError) -> Line:
        if isinstance(error, LedgerUnreachable):
            return Line.DOWN
        if isinstance(error, (Unavailable, OutcomeUnknown)):
            return self._state.line  # our own disk, not the line
        return Line.UP

    def _change(self, **changes: object) -> None:
        before = self._state
        state = replace(before, **changes)  # type: ignore[arg-type]
        if state.line is not before.line:
            state = replace(state, since_unix_ms=self._clock())
        if state != before:
            self._state = state
            self._listener(state)


def backoff_s(failures: int, rng: random.Random) -> float:
    """How long to wait after so many failures in a row: doubling, bounded, spread so that many
    gateways do not come back at the same moment."""
    longest_s: float = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** min(failures - 1, 16))
    return longest_s * rng.uniform(0.5, 1.0)
