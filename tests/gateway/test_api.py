"""The local HTTP API, over real HTTP, with a real till behind it and cards in a field of their own."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from aiohttp.test_utils import TestClient, TestServer

from pos_gateway.errors import ReaderUnavailable
from pos_gateway.gateway.payments import Payments
from pos_gateway.gateway.readers.port import Indication
from pos_gateway.instalments import Charge, Offer, quote
from pos_gateway.lab.counter import FieldReader, open_counter
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.virtual_card import SchemeCard, VirtualCard
from pos_gateway.money import currency


class Counter:
    """One till, its API and a client."""

    def __init__(
        self, shop: Shop, reader: FieldReader, payments: Payments, client: TestClient[Any, Any]
    ) -> None:
        self.shop = shop
        self.reader = reader
        self.payments = payments
        self.client = client

    async def start(self, amount_minor: int = 1930, **fields: Any) -> tuple[int, dict[str, Any]]:
        order = {"id": str(uuid4()), "amount_minor": amount_minor, "currency": "CNY"} | fields
        async with self.client.post("/v1/payments", json=order) as response:
            return response.status, await response.json()

    async def finish(self, payment_id: str) -> dict[str, Any]:
        last: dict[str, Any] = {}
        async with self.client.get(f"/v1/payments/{payment_id}/events") as response:
            async for line in response.content:
                if line.startswith(b"data: "):
                    last = json.loads(line[6:])
        assert last["final"]
        return last


@pytest.fixture
async def counter(tmp_path: Path, ledger_home: Path) -> AsyncIterator[Counter]:
    shutil.copytree(ledger_home, tmp_path / "ledger")
    async with (
        open_counter(tmp_path, serve=False) as till,
        TestClient(TestServer(till.app), headers=till.headers) as client,
    ):
        yield Counter(till.shop, till.reader, till.parts.payments, client)
        till.parts.hub.close()


@pytest.fixture
def card(counter: Counter) -> VirtualCard:
    _, personalisation = counter.shop.issue(limit_minor=30_000)
    counter.shop.publish()
    return VirtualCard(personalisation)


async def test_a_payment_is_started_watched_and_approved(counter: Counter, card: VirtualCard) -> None:
    code, view = await counter.start()
    assert (code, view["state"]) == (202, "present_card")
    counter.reader.present(card)
    final = await counter.finish(view["id"])
    assert final["state"] == "approved"
    assert final["sequence"] == counter.shop.journal.last_sequence
    assert counter.reader.indications[-1] is Indication.APPROVED


async def test_the_same_id_again_is_the_same_payment(counter: Counter, card: VirtualCard) -> None:
    _, view = await counter.start()
    counter.reader.present(card)
    final = await counter.finish(view["id"])
    code, again = await counter.start(id=view["id"])
    assert (code, again) == (200, final)
    code, error = await counter.start(1931, id=view["id"])
    assert (code, error["error"]["code"]) == (409, "Conflict")
    assert counter.shop.journal.exposure.count == 1


async def test_a_payment_is_refunded_in_part_and_another_voided(counter: Counter, card: VirtualCard) -> None:
    ids = []
    for _ in range(2):
        _, view = await counter.start()
        counter.reader.present(card)
        ids.append((await counter.finish(view["id"]))["id"])

    async def post(path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        async with counter.client.post(f"/v1/payments/{path}", json=body) as response:
            return response.status, await response.json()

    order = {"id": str(uuid4()), "amount_minor": 430, "reason": "one returned"}
    code, refunded = await post(f"{ids[0]}/refunds", order)
    assert (code, refunded["kind"], refunded["amount"]) == (200, "refund", "4.30 CNY")
    assert refunded["payment"]["refunded_minor"] == 430
    assert await post(f"{ids[0]}/refunds", order) == (200, refunded)
    code, error = await post(f"{ids[0]}/refunds", order | {"id": str(uuid4()), "amount_minor": 1501})
    assert (code, "1500 minor units are left" in error["error"]["reason"]) == (409, True)
    code, voided = await post(f"{ids[1]}/reversal", {"id": str(uuid4())})
    assert (code, voided["kind"], voided["payment"]["voided"]) == (200, "reversal", True)
    assert (await post(f"{uuid4()}/reversal", {"id": str(uuid4())}))[0] == 404
    assert (await post(f"{ids[1]}/refunds", {"id": str(uuid4())}))[0] == 400
    async with counter.client.get(f"/v1/payments/{ids[1]}") as response:
        assert (await response.json())["voided"] is True
    reborn = Payments(counter.shop.till, counter.shop.journal, lambda view: None)
    assert reborn.show(UUID(ids[0])).refunded_minor == 430
    assert counter.shop.journal.exposure.amount_minor == 1500


async def test_what_memory_forgot_the_journal_knows(counter: Counter, card: VirtualCard) -> None:
    """As after a restart: a new `Payments` over the same journal."""
    _, approved = await counter.start()
    counter.reader.present(card)
    await counter.finish(approved["id"])
    _, declined = await counter.start()
    counter.reader.present(SchemeCard())
    await counter.finish(declined["id"])

    reborn = Payments(counter.shop.till, counter.shop.journal, lambda view: None)
    assert reborn.show(UUID(approved["id"])).as_json()["state"] == "approved"
    told = reborn.start(UUID(declined["id"]), 1930, "CNY", None).as_json()
    assert (told["state"], told["reason"]) == ("declined", "card_not_supported")


async def test_a_torn_tap_asks_to_tap_again(counter: Counter, card: VirtualCard) -> None:
    _, view = await counter.start()
    counter.reader.present(card, leaves_after=6)
    counter.reader.present(card)
    assert (await counter.finish(view["id"]))["state"] == "approved"
    assert counter.shop.journal.exposure.count == 1


async def test_a_torn_tap_that_never_returns_is_declined(counter: Counter, card: VirtualCard) -> None:
    _, view = await counter.start()
    counter.reader.present(card, leaves_after=6)
    while counter.payments.show(_uuid(view)).state.value != "tap_again":
        await asyncio.sleep(0.01)
    await counter.client.post(f"/v1/payments/{view['id']}/cancel", json={})
    final = await counter.finish(view["id"])
    assert (final["state"], final["reason"]) == ("declined", "card_left")


async def test_cancelled_before_a_card_came(counter: Counter) -> None:
    _, view = await counter.start()
    async with counter.client.post(f"/v1/payments/{view['id']}/cancel", json={}) as response:
        assert response.status == 200
    assert (await counter.finish(view["id"]))["state"] == "cancelled"


async def test_one_payment_at_a_time_on_a_lane(counter: Counter) -> None:
    _, first = await counter.start()
    code, error = await counter.start()
    assert (code, error["error"]["code"]) == (503, "Unavailable")
    await counter.client.post(f"/v1/payments/{first['id']}/cancel", json={})
    await counter.finish(first["id"])
    assert (await counter.start())[0] == 202


async def test_a_missing_reader_is_said_and_waited_for(counter: Counter, card: VirtualCard) -> None:
    counter.reader.field.put(ReaderUnavailable("no such reader", advice="plug it in"))
    _, view = await counter.start()
    while counter.payments.show(_uuid(view)).state.value != "reader_missing":
        await asyncio.sleep(0.01)
    counter.reader.present(card)
    assert (await counter.finish(view["id"]))["state"] == "approved"


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b'{"id": "x", "amount_minor": 1, "currency": "CNY"}', "id"),
        (b'{"amount_minor": 1, "currency": "CNY"}', "id"),
        (b'{"id": "%s", "amount_minor": 1.5, "currency": "CNY"}', "amount_minor"),
        (b'{"id": "%s", "amount_minor": "1", "currency": "CNY"}', "amount_minor"),
        (b'{"id": "%s", "amount_minor": true, "currency": "CNY"}', "amount_minor"),
        (b'{"id": "%s", "amount_minor": 0, "currency": "CNY"}', "amount_minor"),
        (b'{"id": "%s", "amount_minor": -5, "currency": "CNY"}', "amount_minor"),
        (b'{"id": "%s", "amount_minor": 1000000000000, "currency": "CNY"}', "amount_minor"),
        (b'{"id": "%s", "amount_minor": 1, "currency": "USD"}', "currency"),
        (b'{"id": "%s", "amount_minor": 1, "currency": "CNY", "tip": 1}', "tip"),
        (b'{"id": "%s", "amount_minor": 1, "currency": "CNY", "lane": 7}', "lane"),
        (b"\xff\xfe", "body"),
        (b"[" * 60_000, "body"),
    ],
)
async def test_malformed_bodies_are_refused_by_name(counter: Counter, body: bytes, where: str) -> None:
    if b"%s" in body:
        body = body % str(uuid4()).encode()
    headers = {"Content-Type": "application/json"}
    async with counter.client.post("/v1/payments", data=body, headers=headers) as response:
        assert response.status == 400
        assert where in (await response.json())["error"]["reason"]
    assert counter.shop.journal.exposure.count == 0
    assert not any(lane.busy for lane in counter.payments.lanes)


async def test_an_endless_body_is_cut_off(counter: Counter) -> None:
    headers = {"Content-Type": "application/json"}
    async with counter.client.post("/v1/payments", data=b" " * 200_000, headers=headers) as response:
        assert response.status == 413


async def test_unknown_payments_lanes_and_paths(counter: Counter) -> None:
    async with counter.client.get(f"/v1/payments/{uuid4()}") as response:
        assert response.status == 404
        assert "nothing was charged" in (await response.json())["error"]["advice"]
    assert (await counter.start(lane="lane-9"))[0] == 404
    for path in ("/v1/nothing", "/static/../api.py", "/static/%2e%2e/pages.py"):
        async with counter.client.get(path) as response:
            assert response.status in (403, 404)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "application/json", "Origin": "https://elsewhere.example"}, 403),
        ({"Content-Type": "application/json", "Host": "elsewhere.example"}, 421),
    ],
)
async def test_other_web_pages_are_kept_out(counter: Counter, headers: dict[str, str], code: int) -> None:
    order = json.dumps({"id": str(uuid4()), "amount_minor": 1, "currency": "CNY"})
    async with counter.client.post("/v1/payments", data=order, headers=headers) as response:
        assert response.status == code
    assert not any(lane.busy for lane in counter.payments.lanes)


async def test_the_page_and_its_parts_are_served_with_a_strict_policy(counter: Counter) -> None:
    for path in ("/", "/static/till.js", "/static/dashboard.css"):
        async with counter.client.get(path) as response:
            assert response.status == 200
            assert "default-src 'none'" in response.headers["Content-Security-Policy"]
            assert "unsafe-inline" not in response.headers["Content-Security-Policy"]


async def test_watchers_of_everything_see_payments(counter: Counter, card: VirtualCard) -> None:
    async with counter.client.get("/v1/events") as stream:
        assert (await stream.content.readline()).startswith(b"event: status")
        _, view = await counter.start()
        counter.reader.present(card)
        async with asyncio.timeout(10):
            async for line in stream.content:
                if line.startswith(b"data: ") and b'"state": "approved"' in line:
                    break
    assert view["id"].encode() in line


async def test_watchers_of_everything_are_told_to_present_a_card(counter: Counter) -> None:
    async with counter.client.get("/v1/events") as stream:
        await stream.content.readuntil(b"\n\n")
        _, view = await counter.start()
        async with asyncio.timeout(10):
            told = await stream.content.readuntil(b"\n\n")
    assert view["id"].encode() in told
    assert b"present_card" in told


async def test_no_answer_tells_a_token_number(counter: Counter) -> None:
    _, personalisation = counter.shop.issue(limit_minor=30_000)
    counter.shop.publish()
    answers: list[bytes] = []
    for card in (VirtualCard(personalisation), SchemeCard()):
        _, view = await counter.start()
        counter.reader.present(card)
        final = await counter.finish(view["id"])
        answers.append(json.dumps(final).encode())
    for path in ("/v1/status", f"/v1/payments/{view['id']}", "/"):
        async with counter.client.get(path) as response:
            answers.append(await response.read())
    async with counter.client.get("/v1/events") as stream:
        answers.append(await stream.content.readuntil(b"\n\n"))
    told = b"".join(answers)
    assert personalisation.pan[-4:].encode() in told
    assert personalisation.pan.encode() not in told
    assert str(personalisation.counter).encode() not in told


async def test_limits_come_from_a_folder_too(counter: Counter) -> None:
    counter.shop.issue(limit_minor=30_000)
    counter.shop.ledger.publish()
    stick = {"folder": str(counter.shop.ledger.repository.folder)}
    async with counter.client.post("/v1/limits", json=stick) as response:
        assert (response.status, await response.json()) == (200, {"changed": True})
    async with counter.client.get("/v1/status") as response:
        assert (await response.json())["snapshot"]["version"] == 1
    async with counter.client.post("/v1/limits", json={"folder": "/nowhere"}) as response:
        assert response.status >= 400
        assert (await response.json())["error"]["reason"]


async def test_a_refused_time_is_said_why(counter: Counter) -> None:
    async with counter.client.post("/v1/clock", json={"time_unix_ms": 1}) as response:
        assert response.status == 400
        assert "before the enrolment" in (await response.json())["error"]["reason"]


async def test_a_watcher_that_leaves_disturbs_nobody(counter: Counter, card: VirtualCard) -> None:
    stream = await counter.client.get("/v1/events")
    stream.close()
    _, view = await counter.start()
    counter.reader.present(card)
    assert (await counter.finish(view["id"]))["state"] == "approved"


def _uuid(view: dict[str, Any]) -> UUID:
    return UUID(view["id"])


async def test_on_a_disk_that_is_nearly_full_no_payment_is_begun(counter: Counter, card: VirtualCard) -> None:
    payments, headroom_bytes = counter.payments, 1 << 62
    _, under_way = await counter.start()
    payments._headroom_bytes = headroom_bytes
    async with counter.client.get("/v1/status") as response:
        assert not (await response.json())["disk"]["payments_stopped"]  # by the settings there is room
    code, error = await counter.start()
    assert code == 503
    assert "nearly full" in error["error"]["reason"]
    # What was begun is finished, and its id still answers.
    counter.reader.present(card)
    assert (await counter.finish(under_way["id"]))["state"] == "approved"
    assert (await counter.start(id=under_way["id"]))[0] == 200
    payments._headroom_bytes = 0
    assert (await counter.start())[0] == 202


async def test_instalments_are_offered_taken_and_told(counter: Counter) -> None:
    offer = Offer(
        id="flat", currency=currency("CNY"), charge=Charge.FLAT_FEE, periods=(3, 12), rate_per_period_bps=50
    )
    counter.shop.ledger.set_policy(counter.shop.ledger.policy.model_copy(update={"offers": (offer,)}))
    _, personalisation = counter.shop.issue(limit_minor=50_000)
    counter.shop.publish()
    async with counter.client.get("/v1/offers", params={"amount_minor": "12000"}) as response:
        told = (await response.json())["offers"]
    assert told == [quote(offer, 12_000, periods).to_json() for periods in (3, 12)]

    payment_id = str(uuid4())
    plan = {"offer": "flat", "periods": 12}
    status, view = await counter.start(12_000, id=payment_id, plan=plan)
    assert (status, view["plan"]["periods"]) == (202, 12)
    counter.reader.present(VirtualCard(personalisation))
    assert (await counter.finish(payment_id))["state"] == "approved"
    counter.payments._views.clear()
    _, again = await counter.start(12_000, id=payment_id, plan=plan)
    assert again["plan"] == told[1], "the journal alone knows it too"
    for other in ({"offer": "flat", "periods": 3}, None):
        assert (await counter.start(12_000, id=payment_id, plan=other))[0] == 409


@pytest.mark.parametrize(
    ("plan", "status"), [({"offer": "none", "periods": 3}, 404), ({"offer": "flat"}, 400), ("flat", 400)]
)
async def test_plans_that_are_not_offered(counter: Counter, plan: object, status: int) -> None:
    assert (await counter.start(12_000, plan=plan))[0] == status


@pytest.mark.parametrize("amount", ["", "0", "-1", "1.5", "٣", "9" * 13, "9" * 5000])
async def test_offers_for_what_is_no_amount(counter: Counter, amount: str) -> None:
    async with counter.client.get("/v1/offers", params={"amount_minor": amount}) as response:
        assert response.status == 400


async def test_health_readiness_and_metrics_are_told(counter: Counter) -> None:
    async with counter.client.get("/v1/health") as response:
        assert response.status == 200
        assert await response.json() | {"time_unix_ms": 0} == {
            "status": "impaired",
            "ready": False,
            "problems": ["no_limits"],
            "time_unix_ms": 0,
        }
    async with counter.client.get("/v1/ready") as response:
        assert response.status == 503
    async with counter.client.get("/metrics") as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
