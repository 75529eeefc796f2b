"""Brings the journal to the ledger and new limits to the till; the till never waits for it.

The queue is the journal itself: what has no acknowledgement is presented, in order, until it has one.
Whatever is lost on the way, the same bytes are presented again and the ledger says `duplicate`.

    greet (the ledger's clock and epoch) ─► batches, two on their way ─► what is unknown, once more
    ─► what a restored ledger may have forgotten ─► new limits

A batch on its way keeps back what corrects one of its payments, so that a refund never arrives before
its payment. After a failure batches get smaller, after a success larger: a line that lives for a moment
at a time still brings something through each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final
from uuid import UUID

import structlog
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
from pos_gateway.gateway.completeness import OpenPayments, complete_until
from pos_gateway.gateway.daemon_thread import in_daemon_thread
from pos_gateway.gateway.feed import SnapshotFeed
from pos_gateway.gateway.journal import Draft, Journal
from pos_gateway.gateway.ledger_client import Answer, Answers, LedgerClient
from pos_gateway.gateway.line import Probe, line_returns
from pos_gateway.records import MAX_BATCH_RECORDS, Complete, Kind, Record, Verdict, uuid7

_log = structlog.get_logger(__name__)

_FIRST_BACKOFF_S: Final = 1.0
_LONGEST_BACKOFF_S: Final = 60.0
_IN_FLIGHT: Final = 2
_FIRST_BATCH_RECORDS: Final = 32
_SMALLEST_BATCH_RECORDS: Final = 8
_GRACE_S: Final = 5.0
"""After a batch failed, the other one on its way may still come through for so long."""
_TELL_COMPLETE_EVERY_MS: Final = 300_000
_RETRY_UNKNOWN_S: Final = 600.0
_EPOCH_MARGIN_MS: Final = 86_400_000
_WITHOUT_LIMITS_TOLERANCE_S: Final = 3600


class Line(Enum):
    UNKNOWN = "unknown"
    UP = "up"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class SynchroniserState:
    """How synchronisation stands, for the page. Times are unix milliseconds.

    `presented` and `remaining` count records of the run that is under way or was the last;
    `per_s` and `left_s` tell how fast it goes and how long it will take, None before that is known.
    """

    line: Line = Line.UNKNOWN
    since_unix_ms: int | None = None
    running: bool = False
    presented: int = 0
    remaining: int = 0
    per_s: float | None = None
    left_s: int | None = None
    last_success_at_unix_ms: int | None = None
    last_error: str | None = None
    last_advice: str | None = None


class Synchroniser:
    """One asyncio task (`run`). `listener` is called on its event loop at every change of `state`.

    `probe` says whether a bare connection to the ledger stands; without it a failed line is tried again
    by the backoff alone. `monotonic` measures spans: the backoff, rates, how old the ledger's time is.
    """

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
        open_payments: OpenPayments | None = None,
        clock_tolerance_s: int = 0,
        probe: Probe | None = None,
        monotonic: Callable[[], float] = time.monotonic,
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
        self._most_records = batch_records
        self._batch_records = min(batch_records, _FIRST_BATCH_RECORDS)
        self._open_payments = open_payments
        self._clock_tolerance_s = clock_tolerance_s
        self._probe = probe
        self._monotonic = monotonic
        self._listener = listener
        self._state = SynchroniserState()
        self._wanted = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_their_way: set[UUID] = set()
        self._ledger_time: tuple[int, float] | None = None
        self._told_until_unix_ms = 0
        self._seeing_epoch = asyncio.Lock()
        self._unknown_tried_s: float | None = None
        self._began_s = 0.0

    @property
    def state(self) -> SynchroniserState:
        return self._state

    def synchronise_now(self) -> None:
        """Do not wait for the interval or the backoff. May be called from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wanted.set)

    def ledger_time_unix_ms(self) -> int | None:
        """A time that the ledger's clock has surely reached; None before it was spoken to."""
        if self._ledger_time is None:
            return None
        told_unix_ms, heard_s = self._ledger_time
        return told_unix_ms + int(1000 * (self._monotonic() - heard_s))

    async def run(self) -> None:
        """Synchronise until cancelled. Failures are shown in `state` and tried again: after a backoff, or
        as soon as the line is back."""
        self._loop = asyncio.get_running_loop()
        failures = 0
        while True:
            self._wanted.clear()
            try:
                await self.synchronise()
            except PosGatewayError as error:
                failures += 1
                await self._pause(backoff_s(failures, self._rng), watch=isinstance(error, LedgerUnreachable))
            else:
                failures = 0
                await self._pause(self._interval_s, watch=False)

    async def _pause(self, pause_s: float, *, watch: bool) -> None:
        awaited: list[asyncio.Task[object]] = [asyncio.create_task(self._wanted.wait())]
        if watch and self._probe is not None:
            awaited.append(asyncio.create_task(line_returns(self._probe, self._rng)))
        try:
            await asyncio.wait(awaited, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in awaited:
                task.cancel()
            await asyncio.gather(*awaited, return_exceptions=True)

    async def synchronise(self) -> None:
        """Present the whole queue, then look for new limits.

        Raises:
            PosGatewayError: why it could not be finished; what was acknowledged stays so. Limits that
                this gateway may not use are no such reason.
        """
        self._began_s = self._monotonic()
        self._change(
            running=True, presented=0, remaining=self._journal.exposure.count, per_s=None, left_s=None
        )
        try:
            await self._greet()
            await self._present_queue()
            await self._present_unknown()
            await self._refresh_limits()
        except PosGatewayError as error:
            if isinstance(error, LedgerUnreachable):
                self._batch_records = max(
                    min(_SMALLEST_BATCH_RECORDS, self._most_records), self._batch_records // 2
                )
            self._change(
                running=False, line=self._line_after(error), last_error=error.reason, last_advice=error.advice
            )
            raise
        finally:
            if self._state.running:
                self._change(running=False)
        self._change(
            remaining=self._journal.exposure.count,
            last_success_at_unix_ms=self._clock(),
            last_error=None,
            last_advice=None,
        )

    async def _greet(self) -> None:
        greeting = await self._client.greet()
        self._ledger_time = greeting.time_unix_ms, self._monotonic()
        await self._see_epoch(greeting.epoch, self._journal.view.epoch)
        now_unix_ms = self._clock()
        idle = now_unix_ms - self._journal.latest_at_unix_ms >= _TELL_COMPLETE_EVERY_MS
        # A clock that is wrong is not written down: whatever is later than it would be held against it.
        if idle and abs(now_unix_ms - greeting.time_unix_ms) <= 1000 * self._issuer_tolerance_s():
            facts = {"at_unix_ms": now_unix_ms, "ledger_unix_ms": greeting.time_unix_ms}
            draft = Draft(Kind.SYNCHRONISATION, self._new_id(now_unix_ms), facts)
            await asyncio.to_thread(self._journal.append_all, [draft])

    async def _present_queue(self) -> None:
        """Until nothing waits that is not on its way; half of the way is for a restored ledger's part."""
        on_their_way: set[asyncio.Task[None]] = set()
        again: asyncio.Task[None] | None = None
        try:
            while True:
                if again is None and self._journal.view.again is not None:
                    again = asyncio.create_task(self._present_again())
                    on_their_way.add(again)
                while len(on_their_way) < _IN_FLIGHT and (batch := await self._next_batch()) is not None:
                    on_their_way.add(asyncio.create_task(self._present(*batch)))
                if not on_their_way:
                    return
                done, on_their_way = await asyncio.wait(on_their_way, return_when=asyncio.FIRST_COMPLETED)
                if again in done:
                    again = None
                for task in done:
                    task.result()
        except PosGatewayError:
            # The other one may still come through: an answer that is lost means presenting it again.
            if on_their_way:
                await asyncio.wait(on_their_way, timeout=_GRACE_S)
            raise
        finally:
            for task in on_their_way:
                task.cancel()
            await asyncio.gather(*on_their_way, return_exceptions=True)

    async def _next_batch(self) -> tuple[Sequence[Record], Complete | None] | None:
        """The next records that wait, and what can be claimed beside them; None if there is nothing."""
        # In this order: see `completeness`.
        before = self._journal.view
        open_unix_ms = self._open_payments.earliest_unix_ms() if self._open_payments is not None else None
        batch = await asyncio.to_thread(
            self._journal.batch, self._batch_records, frozenset(self._on_their_way)
        )
        ledger_unix_ms = self.ledger_time_unix_ms()
        view = self._journal.view
        complete: Complete | None = None
        if (
            batch.certain
            and view.clock_confirmations == before.clock_confirmations
            and self._open_payments is not None
            and ledger_unix_ms is not None
            and view.again is None
            and view.epoch
        ):
            until_unix_ms = complete_until(
                latest_recorded_unix_ms=before.latest_at_unix_ms,
                ledger_unix_ms=ledger_unix_ms,
                earliest_open_unix_ms=open_unix_ms,
                earliest_left_out_unix_ms=batch.left_out_unix_ms,
                clock_tolerance_s=self._clock_tolerance_s,
                issuer_tolerance_s=self._issuer_tolerance_s(),
            )
            complete = Complete(until_unix_ms, view.epoch) if until_unix_ms > 0 else None
        if not batch.records:
            # Nothing waits: now and then that is told, so that unused allowances of this shop are freed.
            news = complete is not None and (
                complete.until_unix_ms - self._told_until_unix_ms >= _TELL_COMPLETE_EVERY_MS
            )
            if not news or self._on_their_way:
                return None
        self._on_their_way |= {record.id for record in batch.records}
        if complete is not None:
            self._told_until_unix_ms = max(self._told_until_unix_ms, complete.until_unix_ms)
        return batch.records, complete

    async def _present(self, records: Sequence[Record], complete: Complete | None) -> None:
        epoch = self._journal.view.epoch
        try:
            answers = await self._client.present(self._gateway_id, records, self._signer, complete)
            if not await self._see_epoch(answers.epoch, epoch):
                return  # the ledger has forgotten that it said so: they are presented again
            if records:
                drafts = self._acknowledgements(records, answers)
                await asyncio.to_thread(self._journal.append_all, drafts)
        finally:
            self._on_their_way -= {record.id for record in records}
        self._came_through(len(records))

    def _came_through(self, records: int) -> None:
        self._batch_records = min(self._most_records, 2 * self._batch_records)
        presented, remaining = self._state.presented + records, self._journal.exposure.count
        took_s = self._monotonic() - self._began_s
        per_s = presented / took_s if took_s > 0 and presented else None
        self._change(
            line=Line.UP,
            presented=presented,
            remaining=remaining,
            per_s=per_s,
            left_s=int(remaining / per_s) if per_s else None,
        )

    async def _present_unknown(self) -> None:
        """What the ledger did not know (a payment's token, a refund's payment) may be known to it by now."""
        view = self._journal.view
        unknown = [refusal.record_id for refusal in view.refused if refusal.verdict is Verdict.UNKNOWN]
        now_s = self._monotonic()
        due = self._unknown_tried_s is None or now_s - self._unknown_tried_s >= _RETRY_UNKNOWN_S
        if not unknown or not (due or self._state.presented):
            return
        self._unknown_tried_s = now_s
        ids = unknown[: self._batch_records]
        records = await asyncio.to_thread(lambda: [self._journal.get(record_id) for record_id in ids])
        records.sort(key=lambda record: record.sequence)
        answers = await self._client.present(self._gateway_id, records, self._signer)
        if await self._see_epoch(answers.epoch, view.epoch):
            await self._journal_changes(records, answers)

    async def _see_epoch(self, epoch: str, asked_under: str) -> bool:
        """Take note of the epoch in an answer; a new one means that the ledger was restored from a backup,
        and that what it acknowledged lately is presented again. False: the answer is from before that,
        while it was known here already when it came."""
        async with self._seeing_epoch:
            view = self._journal.view
            if not epoch or epoch == view.epoch:
                return True
            if epoch == asked_under:
                return False
            last = view.last_sequence
            first = await asyncio.to_thread(self._first_to_present_again) if view.epoch else last + 1
            await asyncio.to_thread(self._journal.append_all, [self._epoch_draft(epoch, first, last)])
            if view.epoch:
                _log.warning("the ledger was restored", first_sequence=first, last_sequence=last)
            self._told_until_unix_ms = 0
            return True

    def _first_to_present_again(self) -> int:
        """All that was tapped or acknowledged within the presentment deadline and a day."""
        limits = self._feed.current()
        ledger_unix_ms = self.ledger_time_unix_ms()
        if limits is None or ledger_unix_ms is None:
            return 1
        deadline_ms = 1000 * limits.newest.policy.presentment_deadline_s
        since_unix_ms = min(self._clock(), ledger_unix_ms) - deadline_ms - _EPOCH_MARGIN_MS
        first = self._journal.first_presented_since(since_unix_ms)
        return first if first is not None else self._journal.last_sequence + 1

    async def _present_again(self) -> None:
        """One batch of what a restored ledger may have forgotten. How far it has come is journalled with
        the verdicts that changed, so that a crash only repeats a batch."""
        view = self._journal.view
        if view.again is None:
            return
        last = view.again.until_sequence
        records, following = await asyncio.to_thread(
            self._journal.presented_before, view.again.next_sequence, last, self._batch_records
        )
        if records:
            answers = await self._client.present(self._gateway_id, records, self._signer)
            if not await self._see_epoch(answers.epoch, view.epoch) or self._journal.view.again != view.again:
                return
            await self._journal_changes(records, answers, self._epoch_draft(view.epoch, following, last))
        else:
            draft = self._epoch_draft(view.epoch, following, last)
            await asyncio.to_thread(self._journal.append_all, [draft])
        self._came_through(0)

    async def _journal_changes(self, records: Sequence[Record], answers: Answers, *more: Draft) -> None:
        """Journal the verdicts that are other ones than before."""

        def changed() -> list[Draft]:
            drafts = self._acknowledgements(records, answers)
            out: list[Draft] = list(more)
            for record, answer, draft in zip(records, answers, drafts, strict=True):
                before = self._journal.last_verdict(record.id)
                if before is not None and _mean_the_same(Verdict(before), answer.verdict):
                    continue
                facts = record.facts()
                told = {
                    "of_kind": record.kind.value,
                    "amount_minor": facts.get("amount_minor", 0),
                    "tapped_at_unix_ms": facts["at_unix_ms"],
                }
                out.append(Draft(draft.kind, draft.id, {**draft.facts, **told}))
            return out

        drafts = await asyncio.to_thread(changed)
        if drafts:
            await asyncio.to_thread(self._journal.append_all, drafts)

    async def _refresh_limits(self) -> None:
        # Nothing published yet, or nothing we may use: the till goes on with the limits it has, the money
        # is presented all the same, and `feed.last_error` tells what was wrong.
        repository = self._client.repository
        try:
            with contextlib.suppress(NotFound, InvalidInput, AuthenticationFailed):
                await in_daemon_thread(lambda: self._feed.refresh(repository), "limits")
        except asyncio.CancelledError:
            self._feed.stop()
            repository.cut()
            raise
        self._change(line=Line.UP)

    def _acknowledgements(self, batch: Sequence[Record], answers: Sequence[Answer]) -> list[Draft]:
        now_unix_ms = self._clock()
        return [
            Draft(
                Kind.ACKNOWLEDGEMENT,
                self._new_id(now_unix_ms),
                {
                    "about": str(record.id),
                    "verdict": answer.verdict.value,
                    "reason": answer.reason,
                    "at_unix_ms": now_unix_ms,
                },
            )
            for record, answer in zip(batch, answers, strict=True)
        ]

    def _epoch_draft(self, epoch: str, next_sequence: int, until_sequence: int) -> Draft:
        now_unix_ms = self._clock()
        facts = {
            "epoch": epoch,
            "next_sequence": next_sequence,
            "until_sequence": until_sequence,
            "at_unix_ms": now_unix_ms,
        }
        return Draft(Kind.EPOCH, self._new_id(now_unix_ms), facts)

    def _new_id(self, now_unix_ms: int) -> UUID:
        return uuid7(now_unix_ms, self._random_bytes(10))

    def _issuer_tolerance_s(self) -> int:
        limits = self._feed.current()
        return limits.newest.policy.clock_tolerance_s if limits else _WITHOUT_LIMITS_TOLERANCE_S

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


def _mean_the_same(one: Verdict, other: Verdict) -> bool:
    return one is other or (one.paid and other.paid)


def backoff_s(failures: int, rng: random.Random) -> float:
    """How long to wait after so many failures in a row: doubling, bounded, spread so that many
    gateways do not come back at the same moment."""
    longest_s: float = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** min(failures - 1, 16))
    return longest_s * rng.uniform(0.5, 1.0)
