"""Every page, in both languages and three widths: axe-core finds nothing (WCAG 2.2 A and AA), nothing
runs out of the window."""

from __future__ import annotations

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Page

from pos_gateway.gateway.staff import Role
from pos_gateway.lab.counter import Counter
from pos_gateway.lab.virtual_card import VirtualCard
from tests.browser.conftest import Enter, state

RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}


async def looked_at(page: Page, where: str) -> None:
    found = await Axe().run(page, options=RULES)
    assert found.violations_count == 0, f"{where}\n{found.generate_report()}"
    wide = await page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0, f"{where} is {wide} px wider than its window"


@pytest.mark.parametrize(
    ("width", "height", "language"), [(390, 844, "zh-CN"), (820, 1180, "en-GB"), (1280, 800, "zh-CN")]
)
async def test_every_page_is_for_everybody(
    width: int, height: int, language: str, till: Counter, card: VirtualCard, enter: Enter
) -> None:
    page = await enter(Role.OWNER, width=width, height=height, language=language)
    await looked_at(page, "till")
    await page.fill("#amount", "120")
    await page.wait_for_selector(".plan")
    await looked_at(page, "till with plans")
    await page.click("#start")
    await state(page, "present_card")
    await looked_at(page, "present card")
    till.reader.present(card)
    await state(page, "approved")
    await looked_at(page, "approved")
    receipt = await page.get_attribute("#receipt", "href")
    assert receipt is not None
    story = receipt.partition("/receipt")[0]
    paths = ["/today", "/line", "/transactions", story, receipt, "/closing", "/reports/x", "/settings"]
    for path in [*paths, "/docs", "/customer", "/sign-in"]:
        await page.goto(till.address + path)
        await looked_at(page, path)
    await page.goto(till.address + story)
    await page.click("#ask-refund")
    await looked_at(page, "refund")
