"""Debian's Chromium looking at a real till: a virtual card in the field, the real ledger behind it."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, async_playwright

from pos_gateway.gateway.staff import Role
from pos_gateway.instalments import Charge, Offer
from pos_gateway.lab.counter import Counter, open_counter
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.money import currency

PINS = {Role.OWNER: "730925", Role.MANAGER: "481516", Role.CASHIER: "2846"}
NAMES = {Role.OWNER: "Lin Yue", Role.MANAGER: "Chen Bo", Role.CASHIER: "Mei"}
OFFER = Offer(
    id="calm",
    currency=currency("CNY"),
    charge=Charge.FLAT_FEE,
    periods=(3, 6),
    rate_per_period_bps=50,
    min_amount_minor=10_000,
)
_CHROMIUM = next(filter(None, (os.environ.get("CHROMIUM"), shutil.which("chromium"))), None)

Enter = Callable[..., Awaitable[Page]]


@pytest.fixture
async def chromium() -> AsyncIterator[Browser]:
    assert _CHROMIUM is not None, "install Debian's chromium: tools/test does"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        yield browser
        await browser.close()


@pytest.fixture
async def till(tmp_path: Path, ledger_home: Path) -> AsyncIterator[Counter]:
    shutil.copytree(ledger_home, tmp_path / "ledger")
    async with open_counter(tmp_path, lanes=2, card_timeout_s=60) as counter:
        for role, name in NAMES.items():
            await asyncio.to_thread(counter.parts.door.staff.add, name, role, PINS[role])
        ledger = counter.shop.ledger
        ledger.set_policy(ledger.policy.model_copy(update={"offers": (OFFER,)}))
        yield counter


@pytest.fixture
def card(till: Counter) -> VirtualCard:
    _, personalisation = till.shop.issue(limit_minor=300_000)
    till.shop.publish()
    return VirtualCard(personalisation)


@pytest.fixture
async def enter(till: Counter, chromium: Browser) -> AsyncIterator[Enter]:
    """A page, signed in, that fails its test if a script of it does."""
    problems: list[str] = []

    async def open_page(role: Role, *, width: int = 1280, height: int = 800, language: str = "en-GB") -> Page:
        context = await chromium.new_context(viewport={"width": width, "height": height}, locale=language)
        page = await context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda message: (
                problems.append(message.text)
                if message.type == "error" and "Content Security" in message.text
                else None
            ),
        )
        await page.goto(till.address + "/")
        member = next(m for m in till.parts.door.staff.members if m.role is role)
        await page.check(f"input[value='{member.id}']", force=True)
        await page.fill("#pin", PINS[role])
        await page.click("button[type=submit]")
        await page.wait_for_url(till.address + "/")
        return page

    yield open_page
    assert problems == []


async def state(page: Page, wanted: str) -> None:
    await page.wait_for_selector(f"#till[data-state={wanted}]")


async def until(page: Page, expression: str) -> None:
    """Wait until it holds. Playwright's own waiting evaluates text in the page, which its policy forbids."""
    async with asyncio.timeout(30):
        while not await page.evaluate(expression):
            await asyncio.sleep(0.05)
