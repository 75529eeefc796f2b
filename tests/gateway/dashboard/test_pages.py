"""What the pages say: each whole in both languages, and the stories they tell from the journal."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from uuid import uuid4

import aiohttp
import pytest

from pos_gateway.gateway.dashboard.advice import advice
from pos_gateway.gateway.history import Search
from pos_gateway.gateway.language import language
from pos_gateway.gateway.staff import Role
from pos_gateway.gateway.synchroniser import Line
from pos_gateway.lab.counter import Counter
from pos_gateway.lab.virtual_card import VirtualCard
from tests.gateway.dashboard.conftest import SignIn, pay

PAGES = ["/", "/today", "/line", "/transactions", "/closing", "/reports/x", "/settings", "/docs", "/customer"]


@pytest.mark.parametrize("accepted", ["en", "zh"])
async def test_every_page_is_whole_in_both_languages(
    accepted: str, till: Counter, sign_in: SignIn, card: VirtualCard
) -> None:
    view = await pay(till, card)
    owner = await sign_in(Role.OWNER)
    await owner.post(f"/v1/payments/{view['id']}/refunds", {"id": str(uuid4()), "amount_minor": 30})
    till.present()
    story = f"/transactions/{view['id']}"
    for path in [*PAGES, "/sign-in", story, f"{story}/receipt", f"{story}/receipt?copy=merchant"]:
        status, text = await owner.get(path, headers={"Accept-Language": accepted})
        assert status == 200, path
        assert ('<html lang="zh-Hans">' in text) is (accepted == "zh"), path
        assert "Undefined" not in text


async def test_search_finds_by_amount_card_day_reference_and_result(
    till: Counter, sign_in: SignIn, card: VirtualCard
) -> None:
    first, second = await pay(till, card, 1930), await pay(till, card, 500)
    _, poor = till.shop.issue(limit_minor=1)
    till.shop.publish()
    third = await pay(till, VirtualCard(poor), 700)
    assert third["state"] == "declined"
    browser = await sign_in(Role.CASHIER)
    today = datetime.now().astimezone().date()
    tomorrow = today + timedelta(days=1)
    for query, found in (
        ("", [first, second, third]),
        ("amount=19.30", [first]),
        (f"card={first['token_last4']}", [first, second]),
        (f"reference={second['id'].upper()}", [second]),
        ("result=declined", [third]),
        (f"from={today}&to={today}", [first, second, third]),
        (f"from={tomorrow}", []),
        ("amount=nothing", []),
        ("from=yesterday", []),
        ("before=1%27%20OR%201=1", []),
    ):
        status, text = await browser.get(f"/transactions?{query}")
        assert status == 200
        for view in (first, second, third):
            assert (f"/transactions/{view['id']}" in text) is (view in found), (query, view["amount"])


async def test_pages_of_the_list_neither_skip_nor_repeat(till: Counter, card: VirtualCard) -> None:
    ids = [(await pay(till, card, 100 + n))["id"] for n in range(5)]
    history, seen, before = till.parts.history, [], 1 << 40
    while page := history.search(Search(before=before), 2):
        seen += [one.facts["sale_id"] for one in page]
        before = page[-1].sequence
    assert seen == ids[::-1]


async def test_the_csv_is_for_managers_and_holds_each_payment_once(
    till: Counter, sign_in: SignIn, card: VirtualCard
) -> None:
    view = await pay(till, card)
    cashier, manager = await sign_in(Role.CASHIER), await sign_in(Role.MANAGER)
    assert (await cashier.get("/transactions.csv"))[0] == 403
    status, text = await manager.get("/transactions.csv")
    assert status == 200
    lines = text.lstrip("\ufeff").splitlines()
    assert len(lines) == 2
    assert view["id"] in lines[1]
    assert "19.30,CNY" in lines[1]


async def test_i_paid_is_answered_from_the_evidence(
    till: Counter, sign_in: SignIn, card: VirtualCard
) -> None:
    browser = await sign_in(Role.CASHIER)
    paid = await pay(till, card)
    _, text = await browser.get(f"/transactions/{paid['id']}")
    assert "Yes, it was paid." in text

    order_id = uuid4()
    order = {"id": str(order_id), "amount_minor": 800, "currency": "CNY"}
    assert (await browser.post("/v1/payments", order))[0] == 202
    till.reader.present(card, leaves_after=4)
    async with asyncio.timeout(10):
        while (await asyncio.to_thread(till.parts.payments.show, order_id)).state.value != "tap_again":
            await asyncio.sleep(0.02)
    await browser.post(f"/v1/payments/{order['id']}/cancel", {})
    async with asyncio.timeout(10):
        while not (await asyncio.to_thread(till.parts.payments.show, order_id)).state.final:
            await asyncio.sleep(0.02)
    _, text = await browser.get(f"/transactions/{order['id']}")
    assert "No, it was not." in text
    assert "The card was taken away before its answer was complete" in text
    status, _ = await browser.get(f"/transactions/{uuid4()}")
    assert status == 404


async def test_a_payment_off_the_network_over_the_callers_cap_is_not_begun(
    till: Counter, card: VirtualCard
) -> None:
    order = {"id": str(uuid4()), "amount_minor": 1000, "currency": "CNY", "offline_cap_minor": 999}
    async with aiohttp.ClientSession(headers=till.headers) as session:
        async with session.post(f"{till.address}/v1/payments", json=order) as response:
            assert response.status == 503
        till.line = Line.UP
        till.reader.present(card)
        async with session.post(f"{till.address}/v1/payments", json={**order, "wait_s": 20}) as response:
            view = await response.json()
            assert (response.status, view["state"]) == (200, "approved")
        async with session.get(f"{till.address}/v1/payments/{order['id']}") as response:
            offline = (await response.json())["offline"]
        assert (offline["pending"], offline["money"]) == (True, "waiting")
        till.present()
        async with session.get(f"{till.address}/v1/payments/{order['id']}") as response:
            offline = (await response.json())["offline"]
        assert (offline["pending"], offline["verdict"]) == (False, "posted")


def test_the_most_urgent_advice_comes_first(till: Counter) -> None:
    status = till.parts.status()
    said = advice(status, language("en"))
    assert said[0].urgency == "act"
    assert "no credit limits" in said[0].what
    quiet = {
        **status,
        "snapshot": {"freshness": "fresh"},
        "line": {**status["line"], "up": True},
    }
    assert [one.what for one in advice(quiet, language("zh"))] == ["一切正常。"]
    for freshness, urgency in (("stale", "watch"), ("expired", "act"), ("not_yet_valid", "act")):
        changed = {**quiet, "snapshot": {"freshness": freshness}}
        assert advice(changed, language("en"))[0].urgency == urgency
    assert advice({**quiet, "lanes": []}, language("en"))[0].urgency == "act"
