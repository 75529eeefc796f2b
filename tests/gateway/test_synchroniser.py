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
from pos_gateway.gateway.completeness import OpenPayments
from pos_gateway.gateway.feed import SnapshotFeed
from pos_gateway.gateway.journal import Draft, Journal
from pos_gateway.gateway.ledger_client import LedgerClient
from pos_gateway.gateway.line import Probe, connect_probe
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

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        client: LedgerClient,
        batch_records: int = 10,
        open_payments: OpenPayments | None = None,
        probe: Probe | None = None,
    ) -> None:
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
            open_payments=open_payments,
            probe=probe,
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
    progress = [(s.presented, s.remaining) for s in shop.states if s.running]
    assert [presented for presented, _ in progress][:4] == [0, 10, 20, 25]
    # Two are on their way at a time: what is left may be known before what was presented is told.
    assert all(presented + left <= SALES for presented, left in progress)
    assert (progress[0], progress[3]) == ((0, SALES), (25, 0))
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


def refund(number: int, of: int) -> Draft:
    facts = {"about": str(new_id(of)), "amount_minor": 5, "at_unix_ms": NOW_UNIX_MS + number}
    return Draft(Kind.REFUND, new_id(number), facts)


async def test_two_batches_are_on_their_way_and_a_refund_never_overtakes_its_payment(
    tmp_path: Path, journal: Journal, ledger: LedgerStub
) -> None:
    journal.append_all([refund(100, of=3), refund(101, of=13), sale(102), refund(103, of=102)])
    second = asyncio.Event()
    arrived: list[str] = []

    async def slowly(request: web.Request) -> web.StreamResponse:
        """The first batch is answered only once the second has come."""
        records = await ledger.records(request)
        if len(ledger.bodies) == 2:
            second.set()
        elif len(ledger.bodies) == 1:
            await second.wait()
        arrived.extend(str(record.id) for record in records)
        for record in records:
            if record.kind is Kind.REFUND:
                assert record.facts()["about"] in arrived
        return web.json_response(
            {"verdicts": [{"id": str(r.id), "verdict": "posted", "reason": ""} for r in records]}
        )

    ledger.on_present = slowly
    async with ledger.client() as client:
        await Shop(tmp_path, journal, client, batch_records=25).synchroniser.synchronise()
    assert journal.exposure.count == 0
    # All sales were in the first; of what is left, the refunds of the first had to wait.
    assert [len(json.loads(body)["records"]) for body in ledger.bodies] == [25, 2, 2]
    assert len(arrived) == SALES + 4 == len(set(arrived))


async def test_batches_shrink_after_failures_and_grow_after_success(
    tmp_path: Path, journal: Journal, ledger: LedgerStub
) -> None:
    journal.append_all([sale(number) for number in range(SALES, 1500)])
    sizes: list[int] = []
    failing = True

    async def count(request: web.Request) -> web.StreamResponse:
        records = await ledger.records(request)
        sizes.append(len(records))
        if failing:
            raise web.HTTPServiceUnavailable
        return await ledger.post_all(request)

    ledger.on_present = count
    async with ledger.client() as client:
        shop = Shop(tmp_path, journal, client, batch_records=1000)
        for _ in range(6):
            with pytest.raises(LedgerUnreachable):
                await shop.synchroniser.synchronise()
        assert sizes[0] == 32
        assert sizes[-1] == 8
        failing = False
        sizes.clear()
        await shop.synchroniser.synchronise()
    assert journal.exposure.count == 0
    assert max(sizes) >= 256
    rates = [(state.per_s, state.left_s) for state in shop.states if state.running and state.presented]
    assert all(per_s is not None and left_s is not None for per_s, left_s in rates)


class Restorable:
    """A ledger that remembers what was posted, names its epoch, and can be set back."""

    def __init__(self, stub: LedgerStub) -> None:
        self.stub = stub
        self.epoch = "first"
        self.posted: set[str] = set()
        self.bodies: list[dict[str, Any]] = []
        self.late: set[str] = set()
        stub.on_present, stub.on_other = self.present, self.health

    async def health(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "ok", "time_unix_ms": NOW_UNIX_MS, "epoch": self.epoch})

    async def present(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        answers = []
        for raw in self.bodies[-1]["records"]:
            verdict = "duplicate" if raw["id"] in self.posted else "posted"
            if raw["id"] in self.late:
                verdict = "late"
            else:
                self.posted.add(raw["id"])
            answers.append({"id": raw["id"], "verdict": verdict, "reason": ""})
        return web.json_response({"epoch": self.epoch, "verdicts": answers})


async def test_a_restored_ledger_gets_again_what_it_forgot_beside_what_is_new(
    tmp_path: Path, journal: Journal, ledger: LedgerStub
) -> None:
    books = Restorable(ledger)
    async with ledger.client() as client:
        shop = Shop(tmp_path, journal, client)
        await shop.synchroniser.synchronise()
        assert len(books.posted) == SALES
        known = journal.last_sequence
        await shop.synchroniser.synchronise()
        assert journal.last_sequence == known  # the same epoch: nothing to tell
        books.posted = {str(new_id(0))}
        books.late = {str(new_id(5))}
        books.epoch = "second"
        journal.append_all([sale(SALES)])
        await shop.synchroniser.synchronise()
    assert books.posted == {str(new_id(n)) for n in range(SALES + 1) if n != 5}
    assert journal.view.again is None
    assert journal.view.epoch == "second"
    assert journal.exposure.count == 0
    # The one whose verdict changed is journalled and shown; the others mean the same as before.
    (refusal,) = journal.view.refused
    assert (refusal.record_id, refusal.amount_minor, refusal.kind) == (new_id(5), 1930, Kind.AUTHORIZATION)
    assert [r.kind for r in journal.about(new_id(6))] == [Kind.AUTHORIZATION, Kind.ACKNOWLEDGEMENT]
    assert len(journal.about(new_id(5))) == 3
    journal.verify()


async def test_presenting_again_goes_on_where_a_crash_stopped_it(tmp_path: Path, ledger: LedgerStub) -> None:
    books = Restorable(ledger)
    journal = open_journal(tmp_path / "own.sqlite3")
    journal.append_all([sale(number) for number in range(SALES)])
    async with ledger.client() as client:
        await Shop(tmp_path, journal, client).synchroniser.synchronise()
        books.posted.clear()
        books.epoch = "second"
        batches = 0

        async def dies(request: web.Request) -> web.StreamResponse:
            nonlocal batches
            batches += 1
            if batches > 1:
                raise web.HTTPServiceUnavailable
            return await books.present(request)

        ledger.on_present = dies
        with pytest.raises(LedgerUnreachable):
            await Shop(tmp_path, journal, client).synchroniser.synchronise()
        assert len(books.posted) == 10
        again = journal.view.again
        assert again is not None
    journal.close()
    ledger.on_present = books.present
    books.bodies.clear()
    async with ledger.client() as client:
        with open_journal(tmp_path / "own.sqlite3") as reopened:
            assert reopened.view.again == again
            await Shop(tmp_path, reopened, client).synchroniser.synchronise()
            assert reopened.view.again is None
    assert len(books.posted) == SALES
    assert sum(len(body["records"]) for body in books.bodies) == SALES - 10


async def test_an_answer_from_before_the_restore_that_comes_after_it_counts_for_nothing(
    tmp_path: Path, journal: Journal, ledger: LedgerStub
) -> None:
    books = Restorable(ledger)
    overtaken = asyncio.Event()
    batches = 0

    async def present(request: web.Request) -> web.StreamResponse:
        nonlocal batches
        batches += 1
        if batches == 1:
            answer = await books.present(request)
            await overtaken.wait()
            return answer
        if batches == 2:  # in between the ledger was restored, and has forgotten the first batch
            books.posted.clear()
            books.epoch = "second"
            overtaken.set()
            answer = await books.present(request)
            await asyncio.sleep(0.2)
            return answer
        return await books.present(request)

    async with ledger.client() as client:
        shop = Shop(tmp_path, journal, client)
        journal.append_all([Draft(Kind.EPOCH, new_id(7777), {"epoch": "first", "next_sequence": 1,
            "until_sequence": 0, "at_unix_ms": NOW_UNIX_MS})])  # fmt: skip
        ledger.on_present = present
        await shop.synchroniser.synchronise()
        await shop.synchroniser.synchronise()
    assert books.posted == {str(new_id(n)) for n in range(SALES)}
    assert journal.exposure.count == 0


async def test_what_is_complete_is_told_with_the_batch_and_for_its_epoch_alone(
    tmp_path: Path, journal: Journal, ledger: LedgerStub
) -> None:
    books = Restorable(ledger)
    open_payments = OpenPayments()
    # Recorded much later than the sales, so that these are past what a clock may lie behind.
    facts = {"at_unix_ms": NOW_UNIX_MS + 9_000_000, "ledger_unix_ms": NOW_UNIX_MS}
    journal.append_all([Draft(Kind.SYNCHRONISATION, new_id(7777), facts)])
    async with ledger.client() as client:
        shop = Shop(tmp_path, journal, client, open_payments=open_payments)
        await shop.synchroniser.synchronise()
        told = [(body.get("complete_until_unix_ms"), body.get("epoch")) for body in books.bodies]
        # The first leaves the other sales out, and so on; the last leaves none out.
        assert told[0][1] == "first"
        assert 0 <= (told[0][0] or 0) - (NOW_UNIX_MS - 3_600_000 - 1) < 600_000
        open_payments.begin(new_id(9000), NOW_UNIX_MS - 5_000_000)
        journal.append_all([sale(50), sale(51)])
        books.bodies.clear()
        await shop.synchroniser.synchronise()
        assert books.bodies[-1]["complete_until_unix_ms"] == NOW_UNIX_MS - 5_000_001
        books.epoch, books.posted = "second", set()
        books.bodies.clear()
        journal.append_all([sale(52)])
        await shop.synchroniser.synchronise()
        # While what it forgot is on its way again, nothing is claimed.
        assert all("complete_until_unix_ms" not in body for body in books.bodies if body["records"])


async def test_what_was_unknown_is_presented_again_and_its_new_verdict_journalled(
    tmp_path: Path, journal: Journal, ledger: LedgerStub
) -> None:
    unknown = {str(new_id(4))}

    async def present(request: web.Request) -> web.StreamResponse:
        return web.json_response(
            {
                "verdicts": [
                    {
                        "id": str(r.id),
                        "verdict": "unknown" if str(r.id) in unknown else "posted",
                        "reason": "",
                    }
                    for r in await ledger.records(request)
                ]
            }
        )

    ledger.on_present = present
    async with ledger.client() as client:
        shop = Shop(tmp_path, journal, client)
        await shop.synchroniser.synchronise()
        assert [refusal.record_id for refusal in journal.view.refused] == [new_id(4)]
        before = journal.last_sequence
        journal.append_all([sale(60)])
        await shop.synchroniser.synchronise()
        assert journal.last_sequence == before + 2  # asked once more, and nothing new: nothing is written
        unknown.clear()
        journal.append_all([sale(61)])
        await shop.synchroniser.synchronise()
        assert journal.view.refused == ()


async def test_the_line_s_return_is_noticed_without_waiting_for_the_backoff(
    tmp_path: Path, journal: Journal
) -> None:
    """The backoff would be up to a minute after these failures; the probe sees the server come."""
    ledger = LedgerStub()
    async with ledger.serving(tmp_path) as port:
        pass
    async with ledger.client() as client:
        shop = Shop(tmp_path, journal, client, probe=connect_probe(ledger.url))
        waiting = asyncio.create_task(
            shop.synchroniser._pause(3600, watch=True), name="an hour, or the line's return"
        )
        await asyncio.sleep(0.05)
        assert not waiting.done()
        async with ledger.serving(tmp_path, port):
            await asyncio.wait_for(waiting, 60)


async def test_a_server_that_closes_at_once_does_not_stand(tmp_path: Path) -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(close, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert not await connect_probe(f"https://127.0.0.1:{port}")()
    server.close()
    await server.wait_closed()
    assert not await connect_probe(f"https://127.0.0.1:{port}")()


async def test_it_stops_at_once_while_the_server_is_silent(tmp_path: Path, journal: Journal) -> None:
    """Half open: everything is accepted, nothing answered. Every wait there is may be the one cut short."""
    ledger = LedgerStub()
    silent, release = asyncio.Event(), asyncio.Event()

    async def hang(request: web.Request) -> web.StreamResponse:
        silent.set()
        await release.wait()
        raise web.HTTPServiceUnavailable

    for place in ("on_other", "on_present", "on_file"):
        silent.clear()
        release.clear()
        ledger.on_other, ledger.on_present, ledger.on_file = ledger.health, ledger.post_all, ledger.file
        setattr(ledger, place, hang)
        async with ledger.serving(tmp_path), ledger.client() as client:
            journal.append_all([sale(200 + len(place))])
            shop = Shop(tmp_path, journal, client)
            task = asyncio.create_task(shop.synchroniser.run())
            await silent.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 10)
            await asyncio.wait_for(asyncio.to_thread(shop.feed.close), 10)
            release.set()
