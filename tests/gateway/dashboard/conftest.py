"""A till with an owner, a manager and a cashier, and browsers to sign in with."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import pytest

from pos_gateway.gateway.staff import Role
from pos_gateway.lab.counter import Counter, open_counter
from pos_gateway.lab.virtual_card import VirtualCard

PINS = {Role.OWNER: "730925", Role.MANAGER: "481516", Role.CASHIER: "2846"}


class Browser:
    """What a browser sends: its cookies, its page's CSRF token, JSON."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.session = aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True))
        self.csrf = ""

    async def get(self, path: str, **options: Any) -> tuple[int, str]:
        options.setdefault("allow_redirects", False)
        async with self.session.get(self.address + path, **options) as response:
            return response.status, await response.text()

    async def post(
        self, path: str, body: object, *, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        sent = {"X-CSRF-Token": self.csrf, **(headers or {})}
        async with self.session.post(self.address + path, json=body, headers=sent) as response:
            return response.status, await response.json()

    async def learn_csrf(self) -> None:
        _, text = await self.get("/today")
        found = re.search(r'<meta name="csrf" content="([^"]+)">', text)
        assert found is not None
        self.csrf = found[1]


SignIn = Callable[[Role], Awaitable[Browser]]


@pytest.fixture
async def till(tmp_path: Path, ledger_home: Path) -> AsyncIterator[Counter]:
    shutil.copytree(ledger_home, tmp_path / "ledger")
    async with open_counter(tmp_path) as counter:
        for role, pin in PINS.items():
            await asyncio.to_thread(counter.parts.door.staff.add, f"The {role.word}", role, pin)
        yield counter


@pytest.fixture
async def sign_in(till: Counter) -> AsyncIterator[SignIn]:
    opened: list[Browser] = []

    async def enter(role: Role) -> Browser:
        browser = Browser(till.address)
        opened.append(browser)
        if role >= Role.CASHIER:
            member = next(m for m in till.parts.door.staff.members if m.role is role)
            status, answer = await browser.post("/v1/session", {"member": member.id, "pin": PINS[role]})
            assert status == 200, answer
            await browser.learn_csrf()
        elif role is Role.DISPLAY:
            cashier = await enter(Role.CASHIER)
            await cashier.post("/v1/displays", {})
            await cashier.post("/v1/session/end", {})
            return cashier
        return browser

    yield enter
    for browser in opened:
        await browser.session.close()


async def pay(till: Counter, card: VirtualCard, amount_minor: int = 1930) -> dict[str, Any]:
    """One payment over HTTP, by a program."""
    order = {"id": str(uuid4()), "amount_minor": amount_minor, "currency": "CNY"}
    async with aiohttp.ClientSession(headers=till.headers) as session:
        async with session.post(f"{till.address}/v1/payments", json=order) as response:
            assert response.status == 202, await response.text()
        till.reader.present(card)
        path = f"{till.address}/v1/payments/{order['id']}"
        async with session.get(f"{path}/events") as stream:
            await stream.read()
        async with session.get(path) as response:
            view: dict[str, Any] = await response.json()
    return view


@pytest.fixture
def card(till: Counter) -> VirtualCard:
    _, personalisation = till.shop.issue(limit_minor=300_000)
    till.shop.publish()
    return VirtualCard(personalisation)
