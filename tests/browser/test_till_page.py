"""A shop's day in a browser: taps off and on the network, a refund, the day closed; and what a page left
open has to bear."""

from __future__ import annotations

import pytest

from pos_gateway.gateway.events import Event
from pos_gateway.gateway.staff import Role
from pos_gateway.gateway.synchroniser import Line
from pos_gateway.lab.counter import Counter
from pos_gateway.lab.virtual_card import VirtualCard
from tests.browser.conftest import NAMES, PINS, Enter, state, until


async def test_a_day_off_and_on_the_network(till: Counter, card: VirtualCard, enter: Enter) -> None:
    page = await enter(Role.CASHIER)
    assert await page.inner_text("#line-chip") == "Off the network – taps still work"

    # Off the network, by keyboard alone.
    await page.keyboard.type("19.30")
    await page.keyboard.press("Enter")
    await state(page, "present_card")
    till.reader.present(card)
    await state(page, "approved")
    assert await page.inner_text("#result-word") == "Approved"
    assert "19.30" in await page.inner_text("#result-amount")
    await page.keyboard.press("Enter")  # the next customer's button has the focus
    await state(page, "idle")

    # On the network, by touch, in instalments.
    till.line = Line.UP
    till.present()
    await until(page, "document.getElementById('line-chip').textContent === 'Connected'")
    for key in "12000":
        await page.click(f"[data-key='{key}']")
    await page.click("[data-key='back']")
    await page.click("[data-key='back']")
    await page.click("[data-key='.']")
    assert await page.input_value("#amount") == "120."
    plan = page.locator(".plan").nth(2)
    await plan.wait_for()
    terms = await plan.inner_text()
    assert "6 × 20.60" in terms
    assert "total 123.60" in terms
    assert "fees 3.60" in terms
    assert "APR" in terms
    await plan.click()
    await page.click("#start")
    await state(page, "present_card")
    till.reader.present(card, leaves_after=4)
    await state(page, "tap_again")
    till.reader.present(card)
    await state(page, "approved")
    assert "6 × 20.60" in await page.inner_text("#result-facts")
    till.present()

    # A refund: the cashier asks, the manager approves with a PIN.
    receipt = await page.get_attribute("#receipt", "href")
    assert receipt is not None
    await page.goto(till.address + receipt.partition("/receipt")[0])
    await page.click("#ask-refund")
    await page.fill("#refund", "20.00")
    await page.fill("#why", "a broken cup")
    await page.select_option("#approver", label=NAMES[Role.MANAGER])
    await page.fill("#approver-pin", "000000")
    await page.click("#correct-go")
    await until(page, "document.getElementById('correct-problem').textContent !== ''")
    await page.fill("#approver-pin", PINS[Role.MANAGER])
    await page.click("#correct-go")
    await page.wait_for_selector("text=partly refunded")
    assert "Yes, it was paid." in await page.inner_text("main")

    # The shift was forgotten; the manager closes the day.
    manager = await enter(Role.MANAGER, width=820, height=1180)
    await manager.click("text=Closing")
    await manager.fill("#float", "100")
    await manager.click("#open-shift button")
    await manager.wait_for_selector("#count")
    await manager.fill("#counted", "99.50")
    await manager.click("#count button")
    await manager.wait_for_selector("#close:not([hidden])")
    assert "-0.50" in await manager.inner_text("#variance")
    await manager.select_option("#reason", "wrong_change")
    await manager.click("#close button")
    await manager.wait_for_selector("#open-shift")
    manager.on("dialog", lambda dialog: dialog.accept())
    await manager.click("#close-day")
    await manager.wait_for_url("**/reports/*")
    report = await manager.inner_text(".paper")
    assert "Z report 1" in report
    assert "119.30 CNY" in report
    assert "PROVISIONAL" in report
    till.present()
    await manager.reload()
    assert "SETTLED" in await manager.inner_text(".paper")


async def test_a_decline_tells_why_and_costs_nothing(till: Counter, enter: Enter) -> None:
    _, poor = till.shop.issue(limit_minor=100)
    till.shop.publish()
    page = await enter(Role.CASHIER, width=390, height=844, language="zh-CN")
    await page.fill("#amount", "50")
    await page.click("#start")
    await state(page, "present_card")
    assert not await page.is_visible(".pad"), "on a phone the result has the whole screen"
    till.reader.present(VirtualCard(poor))
    await state(page, "declined")
    assert await page.inner_text("#result-word") == "已拒绝"
    assert "额度不足" in await page.inner_text("#result-sentence")
    await page.click("#next")
    await state(page, "idle")
    assert await page.is_visible(".pad")


async def test_two_lanes_and_whoever_takes_one_over(till: Counter, card: VirtualCard, enter: Enter) -> None:
    first, second = await enter(Role.CASHIER), await enter(Role.MANAGER)
    await first.click("#lanes button >> nth=1")
    await first.fill("#amount", "7")
    await first.click("#start")
    await state(first, "present_card")
    await second.fill("#amount", "8")
    await second.click("#start")
    await state(second, "present_card")
    till.readers[1].present(card)
    await state(first, "approved")
    assert await second.get_attribute("#till", "data-state") == "present_card"
    await first.click("#lanes button >> nth=0")
    await state(first, "present_card")
    await first.keyboard.press("Escape")
    await state(second, "cancelled")


async def test_the_customers_screen_outlives_the_lock_and_shows_no_card(
    till: Counter, card: VirtualCard, enter: Enter
) -> None:
    screen = await enter(Role.MANAGER)
    await screen.click("text=Settings")
    await screen.click("#make-display")
    await screen.wait_for_url("**/customer")
    page = await enter(Role.CASHIER)
    await page.fill("#amount", "3")
    await page.click("#start")
    await screen.wait_for_selector("#view[data-state=present_card]")
    assert await screen.inner_text("#word") == "Tap here"
    till.reader.present(card)
    await screen.wait_for_selector("#view[data-state=approved]")
    assert "••••" not in await screen.inner_text("body")
    await screen.goto(till.address + "/today")
    assert "/sign-in" in screen.url


async def test_the_lock_button_and_the_idle_lock_ask_for_the_pin(till: Counter, enter: Enter) -> None:
    page = await enter(Role.CASHIER)
    await page.goto(till.address + "/today")
    next(iter(till.parts.door.sessions._sessions.values())).used_s -= 10_000
    till.tell()
    await page.wait_for_url("**/sign-in?next=%2Ftoday")
    await page.fill("#pin", PINS[Role.MANAGER])  # the first name in the list is the manager's
    await page.click("button[type=submit]")
    await page.wait_for_url("**/today")
    await page.click("#lock")
    await page.wait_for_url("**/sign-in?next=%2Ftoday")


@pytest.mark.parametrize("path", ["/", "/today", "/line"])
async def test_a_flood_of_events_leaves_the_page_usable_and_its_size_the_same(
    path: str, till: Counter, card: VirtualCard, enter: Enter
) -> None:
    page = await enter(Role.CASHIER)
    await page.goto(till.address + path)
    await until(page, "live.status !== null")
    count = "document.getElementsByTagName('*').length"
    payment = {
        "lane": "lane-1",
        "state": "processing",
        "final": False,
        "amount": "1.00 CNY",
        "token_last4": "",
        "sequence": None,
        "plan": None,
        "message": "",
    }

    async def flood(events: int) -> None:
        status = till.parts.status()
        for number in range(events):
            till.parts.hub.publish(Event("payment", {**payment, "id": f"p{number}"}))
            till.parts.hub.publish(Event("status", {**status, "now_unix_ms": number}))
            await page.wait_for_timeout(10) if number % 2 else None
        await until(page, f"live.status.now_unix_ms === {events - 1}")

    await flood(100)
    size = await page.evaluate(count)
    await flood(400)
    assert await page.evaluate(count) == size
    await page.click("text=Transactions")
    await page.wait_for_url("**/transactions")
