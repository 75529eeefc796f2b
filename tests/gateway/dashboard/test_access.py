"""Who may do what: every page and route, as every role; and what strangers try."""

from __future__ import annotations

import asyncio
import re
from uuid import UUID, uuid4

import aiohttp
import pytest
import yarl

from pos_gateway.gateway.access import LEAST_ROLES, SESSION_COOKIE, safe_next
from pos_gateway.gateway.staff import Role
from pos_gateway.lab.counter import Counter
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.records import Kind
from tests.gateway.dashboard.conftest import PINS, SignIn, pay

STREAMS = {"/v1/events", "/v1/customer-events", "/v1/payments/{id}/events"}


def test_the_table_and_the_routes_are_the_same(till: Counter) -> None:
    routes = {
        (route.method, route.resource.canonical)
        for route in till.app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    assert routes == set(LEAST_ROLES)


@pytest.mark.parametrize("role", list(Role))
async def test_every_route_lets_in_its_least_role_and_nobody_below(
    role: Role, till: Counter, sign_in: SignIn
) -> None:
    browser = await sign_in(role)
    wrong = []
    for (method, path), least in LEAST_ROLES.items():
        if path in ("/v1/session", "/v1/session/end", "/static") or (path in STREAMS and role >= least):
            continue
        asked = path.replace("{id}", str(uuid4()))
        if method == "GET":
            status, _ = await browser.get(asked)
        else:
            # A body that no handler takes: whoever is let in is told 400, and nothing happens.
            status, _ = await browser.post(asked, {"no such field": 1})
        refused = status in (401, 403) or (
            status == 303 and path not in ("/sign-in", "/first-run", "/language")
        )
        if refused == (role >= least):
            wrong.append((method, path, least.word, status))
    assert wrong == []


async def test_nobody_is_let_in_without_having_signed_in(till: Counter, sign_in: SignIn) -> None:
    browser = await sign_in(Role.PUBLIC)
    async with browser.session.get(f"{till.address}/today?x=1", allow_redirects=False) as response:
        assert (response.status, response.headers["Location"]) == (303, "/sign-in?next=%2Ftoday%3Fx%3D1")
    assert (await browser.get("/v1/status"))[0] == 401
    for wrong in ("Bearer", "Bearer x", "Basic bGFib3JhdG9yeS10b2tlbg=="):
        status, _ = await browser.get("/v1/status", headers={"Authorization": wrong})
        assert status == 401
    status, _ = await browser.get("/v1/status", headers={"Cookie": f"{SESSION_COOKIE}=guessed"})
    assert status == 401


async def test_what_changes_something_needs_the_pages_own_token_and_origin(
    till: Counter, sign_in: SignIn
) -> None:
    browser = await sign_in(Role.OWNER)
    assert (await browser.post("/v1/synchronise", {}))[0] == 202
    assert (await browser.post("/v1/synchronise", {}, headers={"X-CSRF-Token": ""}))[0] == 403
    other = await sign_in(Role.OWNER)
    assert (await browser.post("/v1/synchronise", {}, headers={"X-CSRF-Token": other.csrf}))[0] == 403
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        assert (await browser.post("/v1/synchronise", {}, headers={"Origin": origin}))[0] == 403
    form = {"X-CSRF-Token": browser.csrf, "Content-Type": "text/plain"}
    async with browser.session.post(f"{till.address}/v1/synchronise", data="{}", headers=form) as response:
        assert response.status == 415


async def test_cookies_cannot_be_read_by_scripts_nor_sent_from_elsewhere(
    till: Counter, sign_in: SignIn
) -> None:
    browser = await sign_in(Role.PUBLIC)
    member = till.parts.door.staff.members[0]
    pin = PINS[member.role]
    body = {"member": member.id, "pin": pin}
    async with browser.session.post(f"{till.address}/v1/session", json=body) as response:
        cookie = response.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert pin not in cookie


async def test_after_five_wrong_pins_the_right_one_does_not_help_until_the_lock_is_over(
    till: Counter, sign_in: SignIn
) -> None:
    browser = await sign_in(Role.PUBLIC)
    cashier = next(m for m in till.parts.door.staff.members if m.role is Role.CASHIER)
    tries = [await browser.post("/v1/session", {"member": cashier.id, "pin": f"90{n}7"}) for n in range(5)]
    assert [status for status, _ in tries] == [401] * 5
    status, answer = await browser.post("/v1/session", {"member": cashier.id, "pin": PINS[Role.CASHIER]})
    assert status == 429
    assert "wait" in answer["error"]["reason"]
    assert any(
        r.kind is Kind.STAFF_ACTION and r.facts()["action"] == "locked_out"
        for r in till.shop.journal.records()
    )
    owner = await sign_in(Role.OWNER)
    assert (await owner.post(f"/v1/staff/{cashier.id}", {"pin": "7351"}))[0] == 200
    assert (await browser.post("/v1/session", {"member": cashier.id, "pin": "7351"}))[0] == 200


async def test_parallel_guesses_count_each(till: Counter, sign_in: SignIn) -> None:
    browser = await sign_in(Role.PUBLIC)
    cashier = next(m for m in till.parts.door.staff.members if m.role is Role.CASHIER)
    guesses = [browser.post("/v1/session", {"member": cashier.id, "pin": f"31{n}8"}) for n in range(10, 20)]
    answers = [status for status, _ in await asyncio.gather(*guesses)]
    assert sorted(answers) == [401] * 5 + [429] * 5


async def test_who_leaves_or_gets_another_pin_is_out_at_once(till: Counter, sign_in: SignIn) -> None:
    owner, cashier = await sign_in(Role.OWNER), await sign_in(Role.CASHIER)
    member = next(m for m in till.parts.door.staff.members if m.role is Role.CASHIER)
    assert (await cashier.get("/today"))[0] == 200
    assert (await owner.post(f"/v1/staff/{member.id}", {"active": False}))[0] == 200
    assert (await cashier.get("/today"))[0] == 303
    me = next(m for m in till.parts.door.staff.members if m.role is Role.OWNER)
    status, answer = await owner.post(f"/v1/staff/{me.id}", {"active": False})
    assert (status, answer["error"]["reason"]) == (409, "somebody must stay the owner")


async def test_an_idle_session_is_locked_however_many_events_came(till: Counter, sign_in: SignIn) -> None:
    browser = await sign_in(Role.CASHIER)
    sessions = till.parts.door.sessions
    session = next(iter(sessions._sessions.values()))
    session.used_s -= 200
    assert (await browser.post("/v1/session/used", {}))[0] == 200
    session.used_s -= 301
    assert (await browser.get("/v1/status"))[0] == 401


async def test_a_cashier_refunds_only_with_a_managers_word_for_exactly_that(
    till: Counter, sign_in: SignIn, card: VirtualCard
) -> None:
    first, second = await pay(till, card), await pay(till, card)
    cashier = await sign_in(Role.CASHIER)
    manager = next(m for m in till.parts.door.staff.members if m.role is Role.MANAGER)
    colleague = next(m for m in till.parts.door.staff.members if m.role is Role.CASHIER)
    order = {"id": str(uuid4()), "amount_minor": 500, "reason": "a broken cup"}
    path = f"/v1/payments/{first['id']}/refunds"
    assert (await cashier.post(path, order))[0] == 403

    ask = {"member": colleague.id, "pin": PINS[Role.CASHIER], "route": "refunds", "payment": first["id"]}
    assert (await cashier.post("/v1/approvals", ask))[0] == 403
    ask |= {"member": manager.id, "pin": "000000"}
    assert (await cashier.post("/v1/approvals", ask))[0] == 401
    ask["pin"] = PINS[Role.MANAGER]

    async def approval() -> dict[str, str]:
        status, told = await cashier.post("/v1/approvals", ask)
        assert status == 200
        return {"X-Approval": told["approval"]}

    word = await approval()
    assert (await cashier.post(f"/v1/payments/{second['id']}/refunds", order, headers=word))[0] == 403
    word = await approval()
    assert (await cashier.post(f"/v1/payments/{first['id']}/reversal", {"id": str(uuid4())}, headers=word))[
        0
    ] == 403
    word = await approval()
    other = await sign_in(Role.CASHIER)
    assert (await other.post(path, order, headers=word))[0] == 403
    word = await approval()
    assert (await cashier.post(path, order, headers=word))[0] == 200
    assert (await cashier.post(path, {**order, "id": str(uuid4())}, headers=word))[0] == 403, "good once"

    story = [r.facts() for r in till.shop.journal.about(UUID(first["id"]))]
    done = next(facts for facts in story if facts.get("action") == "refunded")
    assert (done["by"], done["for"]) == (manager.name, colleague.name)


async def test_programs_have_tokens_of_their_own_with_a_role(till: Counter, sign_in: SignIn) -> None:
    owner = await sign_in(Role.OWNER)
    status, made = await owner.post("/v1/tokens", {"name": "Till software", "role": "cashier"})
    assert status == 201
    headers = {"Authorization": f"Bearer {made['token']}"}
    async with aiohttp.ClientSession(headers=headers) as program:
        async with program.get(f"{till.address}/v1/status") as response:
            assert response.status == 200
        async with program.post(f"{till.address}/v1/payments/{uuid4()}/reversal", json={}) as response:
            assert response.status == 403
    assert made["token"] not in till.shop.home.staff.read_text()
    assert (await owner.post(f"/v1/tokens/{made['id']}/remove", {}))[0] == 200
    async with (
        aiohttp.ClientSession(headers=headers) as program,
        program.get(f"{till.address}/v1/status") as after,
    ):
        assert after.status == 401


async def test_names_that_are_markup_are_shown_as_text(
    till: Counter, sign_in: SignIn, card: VirtualCard
) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x>"[:40]
    owner = await sign_in(Role.OWNER)
    assert (await owner.post("/v1/staff", {"name": evil, "role": "cashier", "pin": "2951"}))[0] == 201
    view = await pay(till, card)
    reason = "</script><script>alert(2)</script>"
    await owner.post(
        f"/v1/payments/{view['id']}/refunds", {"id": str(uuid4()), "amount_minor": 1, "reason": reason}
    )
    pages = ["/settings", "/sign-in", f"/transactions/{view['id']}"]
    pages += ["/transactions?reference=%22%3E%3Cscript%3Ealert(3)%3C/script%3E&amount=%3Cb%3E"]
    pages += ["/customer?lane=%22%3E%3Cscript%3E", "/sign-in?next=%22%3E%3Cscript%3Ealert(4)%3C/script%3E"]
    for path in pages:
        status, text = await owner.get(path)
        assert status == 200, path
        assert "<script>" not in text, path
        assert "<img src=x" not in text, path
        for script in re.findall(r"<script([^>]*)>", text):
            assert "src=" in script or 'type="application/json"' in script


async def test_headers_forbid_inline_scripts_frames_and_sniffing(till: Counter, sign_in: SignIn) -> None:
    browser = await sign_in(Role.OWNER)
    for path in ("/", "/sign-in", "/v1/status", "/static/dashboard.js"):
        async with browser.session.get(till.address + path) as response:
            policy = response.headers["Content-Security-Policy"]
            assert "script-src 'self';" in policy
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            if not path.startswith("/static"):
                assert response.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    [
        "/static/../pages.py",
        "/static/%2e%2e/pages.py",
        "/static/..%2fpages.py",
        "/transactions/..%2f..%2fstaff.json",
        "/reports/..%2fstaff.json",
    ],
)
async def test_no_path_leads_out_of_the_static_folder(path: str, till: Counter, sign_in: SignIn) -> None:
    browser = await sign_in(Role.OWNER)
    url = yarl.URL(till.address + path, encoded=True)
    async with browser.session.get(url, allow_redirects=False) as response:
        assert response.status in (400, 403, 404)
        assert "pin_hash" not in await response.text()


@pytest.mark.parametrize(
    "asked", ["//evil.example", "https://evil.example", "/\\evil.example", "", "a", "/\nx"]
)
def test_signing_in_leads_nowhere_else(asked: str) -> None:
    assert safe_next(asked) == "/"
    assert safe_next("/today?x=1") == "/today?x=1"


async def test_another_name_for_this_server_is_not_answered(till: Counter, sign_in: SignIn) -> None:
    browser = await sign_in(Role.OWNER)
    assert (await browser.get("/v1/status", headers={"Host": "rebound.example"}))[0] == 421
    assert (await browser.get("/v1/status", headers={"Host": "192.168.1.7"}))[0] == 421


async def test_the_first_owner_needs_the_code_that_lies_on_this_machine(
    till: Counter, sign_in: SignIn
) -> None:
    staff = till.parts.door.staff
    staff._members.clear()
    browser = await sign_in(Role.PUBLIC)
    async with browser.session.get(till.address, allow_redirects=False) as response:
        assert response.headers["Location"] == "/first-run"
    code = staff.setup_code()
    assert code is not None
    assert till.shop.home.setup_code.stat().st_mode & 0o077 == 0
    owner = {"name": "Lin", "pin": "730925"}
    wrong = f"{(int(code) + 1) % 10**8:08d}"
    assert (await browser.post("/v1/first-owner", {"code": wrong, **owner}))[0] == 401
    assert (await browser.post("/v1/first-owner", {"code": code, **owner, "pin": "123456"}))[0] == 400
    assert (await browser.post("/v1/first-owner", {"code": f"{code[:4]} {code[4:]}", **owner}))[0] == 200
    assert not till.shop.home.setup_code.exists()
    stranger = await sign_in(Role.PUBLIC)
    assert (await stranger.post("/v1/first-owner", {"code": code, **owner}))[0] == 409
    assert (await browser.get("/"))[0] == 200
