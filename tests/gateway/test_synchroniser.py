from __future__ import annotations

import asyncio
import base64
import json
import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from pos_gateway.errors import (
    AuthenticationFailed,
    Conflict,
    InvalidConfiguration,
    InvalidMessage,
    LedgerUnreachable,
)
from pos_gateway.gateway.feed import SnapshotFeed
from pos_gateway.gateway.journal import Journal
from pos_gateway.gateway.ledger_client import LedgerClient
from pos_gateway.gateway.synchroniser import Line, Synchroniser, SynchroniserState, backoff_s
from pos_gateway.records import Kind, Verdict, verify_batch
from tests.gateway.issuer import Issuer
from tests.gateway.journalling import GATEWAY_ID, KEY, NOW_UNIX_MS, new_id, open_journal, sale
from tests.gateway.ledger_stub import LedgerStub, strange_authority
from tests.gateway.snapshots import enrolment, snapshot

SALES = 25


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with open_journal(tmp_path / "journal.sqlite3") as journal:
        journal.append_all([sale(number) for number in range(SALES)])
        yield journal


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[LedgerStub]:
    stub = LedgerStub()
    async with stub.serving(tmp_path):
        yield stub


class Shop:
    """A synchroniser with what hangs on it, and every state it went through."""

    def __init__(self, folder: Path, journal: Journal, client: LedgerClient, batch_records: int = 10) -> None:
        (folder / "snapshots").mkdir(exist_ok=True)
        self.feed = SnapshotFeed(folder / "snapshots", journal, enrolment(), clock=lambda: NOW_UNIX_MS)
        self.states: list[SynchroniserState] = []
        self.changed = asyncio.Event()
        self.synchroniser = Synchroniser(
            journal,
            client,
            self.feed,
            gateway_id=GATEWAY_ID,
            signer=KEY,
            interval_s=3600,
            clock=lambda: NOW_UNIX_MS,
            rng=random.Random(1),
            batch_records=batch_records,
            listener=self.take,
        )

    def take(self, state: SynchroniserState) -> None:
        self.states.append(state)
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


async def test_the_queue_is_presented_in_order_and_limits_are_refreshed(
    tmp_path: Path, journal: Journal, ledger: LedgerStub
) -> None:
    issuer = Issuer(tmp_path / "repository")
    issuer.publish(1, snapshot(1))
    ledger.repository = issuer.folder
    async with ledger.client() as client:
        shop = Shop(tmp_path, journal, client)
        await shop.synchroniser.synchronise()
    presented = [json.loads(body) for body in ledger.bodies]
    assert [len(batch["records"]) for batch in presented] == [10, 10, 5]
    assert [raw["id"] for batch in presented for raw in batch["records"]] == [
        str(new_id(number)) for number in range(SALES)
    ]
    assert journal.exposure.count == 0
    assert [record.kind for record in journal.about(new_id(7))] == [Kind.AUTHORIZATION, Kind.ACKNOWLEDGEMENT]
    assert shop.feed.current() is not None
    state = shop.synchroniser.state
    assert (state.line, state.presented, state.remaining) == (Line.UP, SALES, 0)
    assert state.last_success_at_unix_ms == NOW_UNIX_MS
    assert not state.running
    assert [(s.presented, s.remaining) for s in shop.states if s.running][:4] == [
        (0, SALES),
        (10, 15),
        (20, 5),
        (25, 0),
    ]
    assert journal.verify() == 2 * SALES + 1


async def test_batches_are_signed_by_the_gateway(
    tmp_path: Path, journal: Journal, ledger: LedgerStub
) -> None:
    async def check(request: web.Request) -> web.StreamResponse:
        signature = base64.b64decode(request.headers["Pos-Gateway-Signature"])
        verify_batch(await request.read(), signature, KEY.public_key())
        assert request.headers["Pos-Gateway-Id"] == GATEWAY_ID
        return await ledger.post_all(request)

    ledger.on_present = check
    async with ledger.client() as client:
        await Shop(tmp_path, journal, client).synchroniser.synchronise()
    assert journal.exposure.count == 0


async def test_what_is_refused_leaves_the_queue_and_is_shown_with_its_reason(
    tmp_path: Path, journal: Journal, ledger: LedgerStub
) -> None:
    async def judge(request: web.Request) -> web.StreamResponse:
        verdicts = {3: ("late", "after the deadline"), 4: ("duplicate", "")}
        answers = []
        for record in await ledger.records(request):
            number = record.sequence - 1
            verdict, reason = verdicts.get(number, ("posted", ""))
            answers.append({"id": str(record.id), "verdict": verdict, "reason": reason})
        return web.json_response({"verdicts": answers})

    ledger.on_present = judge
    async with ledger.client() as client:
        await Shop(tmp_path, journal, client).synchroniser.synchronise()
    assert journal.exposure.count == 0
    (refusal,) = journal.view.refused
    assert (refusal.record_id, refusal.verdict, refusal.reason) == (
        new_id(3),
        Verdict.LATE,
        "after the deadline",
    )


async def test_a_ledger_that_stops_in_mid_answer_gets_the_same_bytes_again(
    tmp_path: Path, journal: Journal, ledger: LedgerStub
) -> None:
    async def die(request: web.Request) -> web.StreamResponse:
        """Posted, for all the gateway can know; then gone in the middle of saying so."""
        await ledger.records(request)
        response = web.StreamResponse(headers={"Content-Length": "100000"})
        await response.prepare(request)
        await response.write(b'{"verdicts": [')
        assert request.transport is not None
        request.transport.abort()
        return response

    ledger.on_present = die
    async with ledger.client() as client:
        shop = Shop(tmp_path, journal, client)
        with pytest.raises(LedgerUnreachable):
            await shop.synchroniser.synchronise()
        assert shop.synchroniser.state.line is Line.DOWN
        assert shop.synchroniser.state.last_error
        assert journal.exposure.count == SALES
        ledger.on_present = ledger.post_all
        await shop.synchroniser.synchronise()
    first, second, *again = [json.loads(body)["records"] for body in ledger.bodies]
    assert first + second == [raw for batch in again for raw in batch][: len(first) + len(second)]
    assert journal.exposure.count == 0
    assert shop.synchroniser.state.last_error is None


async def test_the_line_going_and_coming_is_seen_and_nothing_is_lost(
    tmp_path: Path, journal: Journal
) -> None:
    ledger = LedgerStub()
    async with ledger.serving(tmp_path) as port, ledger.client() as client:
        shop = Shop(tmp_path, journal, client, batch_records=5)
        presented = 0

        async def only_two(request: web.Request) -> web.StreamResponse:
            nonlocal presented
            presented += 1
            if presented > 2:
                raise web.HTTPServiceUnavailable
            return await ledger.post_all(request)

        ledger.on_present = only_two
        with pytest.raises(LedgerUnreachable):
            await shop.synchroniser.synchronise()
        assert journal.exposure.count == SALES - 10
    with pytest.raises(LedgerUnreachable, match="no line"):
        await shop.synchroniser.synchronise()
    ledger.on_present = ledger.post_all
    async with ledger.serving(tmp_path, port):
        await shop.synchroniser.synchronise()
    await client.close()
    assert journal.exposure.count == 0
    lines = [shop.states[0].line] + [
        after.line
        for before, after in zip(shop.states, shop.states[1:], strict=False)
        if after.line is not before.line
    ]
    assert lines == [Line.UNKNOWN, Line.UP, Line.DOWN, Line.UP]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda verdicts: verdicts[:-1],
        lambda verdicts: [*verdicts, verdicts[0]],
        lambda verdicts: verdicts[::-1],
        lambda verdicts: [{**verdicts[0], "id": str(new_id(99))}, *verdicts[1:]],
        lambda verdicts: [{**verdicts[0], "verdict": "fine"}, *verdicts[1:]],
        lambda verdicts: [{"id": verdicts[0]["id"]}, *verdicts[1:]],
        lambda verdicts: [None, *verdicts[1:]],
        lambda verdicts: {"posted": len(verdicts)},
    ],
)
async def test_an_answer_that_does_not_match_the_batch_acknowledges_nothing(
    tmp_path: Path, journal: Journal, ledger: LedgerStub, spoil: Callable[[list[Any]], Any]
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        verdicts = [
            {"id": str(record.id), "verdict": "posted", "reason": ""}
            for record in await ledger.records(request)
        ]
        return web.json_response({"verdicts": spoil(verdicts)})

    ledger.on_present = answer
    async with ledger.client() as client:
        shop = Shop(tmp_path, journal, client)
        with pytest.raises(InvalidMessage, match="ledger's answer"):
            await shop.synchroniser.synchronise()
    assert journal.exposure.count == SALES
    assert journal.last_sequence == SALES
    assert shop.synchroniser.state.line is Line.UP


async def test_a_refused_snapshot_does_not_keep_money_from_being_presented(
    tmp_path: Path, journal: Journal, ledger: LedgerStub
) -> None:
    issuer = Issuer(tmp_path / "repository")
    issuer.publish(1, b"no snapshot")
    ledger.repository = issuer.folder
    async with ledger.client() as client:
        shop = Shop(tmp_path, journal, client)
        await shop.synchroniser.synchronise()
    assert journal.exposure.count == 0
    assert shop.synchroniser.state.line is Line.UP
    assert shop.feed.last_error is not None


async def test_the_task_survives_failures_and_does_what_it_is_asked_at_once(
    tmp_path: Path, journal: Journal
) -> None:
    """No wall clock: every attempt is asked for, and the backoff of the failed ones is cut short."""
    ledger = LedgerStub()
    async with ledger.serving(tmp_path) as port:
        pass
    client = ledger.client()
    shop = Shop(tmp_path, journal, client)
    task = asyncio.create_task(shop.synchroniser.run())
    try:
        await shop.until(lambda: shop.synchroniser.state.line is Line.DOWN)
        async with ledger.serving(tmp_path, port):
            await asyncio.to_thread(shop.synchroniser.synchronise_now)
            await shop.until(lambda: journal.exposure.count == 0 and not shop.synchroniser.state.running)
            journal.append_all([sale(SALES)])
            shop.synchroniser.synchronise_now()
            await shop.until(lambda: journal.exposure.count == 0)
        assert shop.synchroniser.state.line is Line.UP
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.close()


def test_backoff_grows_is_bounded_and_spread() -> None:
    rng = random.Random(7)
    for failures in range(1, 2000):
        longest = min(60.0, 2.0 ** min(failures - 1, 10))
        assert longest / 2 <= backoff_s(failures, rng) <= longest
    assert len({backoff_s(3, rng) for _ in range(10)}) == 10


async def test_another_ledger_s_certificate_is_not_spoken_to(
    tmp_path: Path, journal: Journal, ledger: LedgerStub
) -> None:
    async with LedgerClient(ledger.url, strange_authority(tmp_path)) as client:
        with pytest.raises(LedgerUnreachable, match="not the ledger this gateway enrolled with"):
            await Shop(tmp_path, journal, client).synchroniser.synchronise()
    assert ledger.bodies == []
    with pytest.raises(InvalidConfiguration, match="https"):
        LedgerClient("http://127.0.0.1:1", ledger.authority)
    with pytest.raises(InvalidConfiguration, match="not a certificate"):
        LedgerClient("https://127.0.0.1:1", bytes(20))


@pytest.mark.parametrize(
    ("status", "body", "error", "says"),
    [
        (401, {"error": {"reason": "not enrolled", "advice": "enrol"}}, AuthenticationFailed, "not enrolled"),
        (409, {"error": {"reason": "used"}}, Conflict, "used"),
        (400, {"error": {"reason": "field x"}}, InvalidMessage, "field x"),
        (503, {"error": "?"}, LedgerUnreachable, "503"),
        (302, {}, LedgerUnreachable, "302"),
        (200, [], InvalidMessage, "JSON object"),
        (200, {"time_unix_ms": "1"}, InvalidMessage, "time_unix_ms"),
        (200, {"pad": "x" * 1_100_000}, InvalidMessage, "over"),
    ],
)
async def test_every_answer_that_is_none_becomes_one_clear_exception(
    ledger: LedgerStub, status: int, body: object, error: type[Exception], says: str
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status, headers={"Location": "https://127.0.0.1:1/"})

    ledger.on_other = answer
    async with ledger.client() as client:
        with pytest.raises(error, match=says):
            await client.ledger_time_unix_ms()
