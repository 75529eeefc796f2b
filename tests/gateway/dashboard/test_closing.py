"""A day at the till: shifts, the blind count, X and Z, provisional and settled."""

from __future__ import annotations

from uuid import uuid4

import pytest

from pos_gateway.gateway.history import History
from pos_gateway.gateway.program import now_unix_ms
from pos_gateway.gateway.shifts import MAX_COUNTS, Shifts
from pos_gateway.gateway.staff import Role
from pos_gateway.lab.counter import Counter
from pos_gateway.lab.virtual_card import VirtualCard
from tests.gateway.dashboard.conftest import SignIn, pay


async def test_a_day_from_the_first_shift_to_the_settled_report(
    till: Counter, sign_in: SignIn, card: VirtualCard
) -> None:
    cashier, manager = await sign_in(Role.CASHIER), await sign_in(Role.MANAGER)
    shift = {"id": str(uuid4()), "float_minor": 20_000}
    assert (await cashier.post("/v1/shifts", shift))[0] == 201
    assert (await cashier.post("/v1/shifts", shift))[0] == 201, "the same again is the same"
    assert (await manager.post("/v1/shifts", {**shift, "id": str(uuid4())}))[0] == 409
    sale, other = await pay(till, card, 1930), await pay(till, card, 5000)
    await manager.post(f"/v1/payments/{sale['id']}/refunds", {"id": str(uuid4()), "amount_minor": 430})
    await manager.post(f"/v1/payments/{other['id']}/reversal", {"id": str(uuid4())})
    move = {"id": str(uuid4()), "amount_minor": -5000, "reason": "stamps"}
    assert (await cashier.post("/v1/shifts/current/cash", move))[0] == 201
    assert (await cashier.post("/v1/shifts/current/cash", move))[0] == 201
    assert (await manager.post("/v1/reports/z", {"id": str(uuid4())}))[0] == 409, "a shift is open"

    assert (await cashier.post("/v1/shifts/current/close", {}))[0] == 409, "not counted yet"
    status, page = await cashier.get("/closing")
    assert status == 200
    assert "150.00" not in page, "blind: what is expected is not on the page"
    assert (await cashier.post("/v1/shifts/current/count", {"counted_minor": 14_900}))[1][
        "variance_minor"
    ] == -100
    assert (await cashier.post("/v1/shifts/current/close", {}))[0] == 400, "a variance needs a reason"
    status, closed = await cashier.post(
        "/v1/shifts/current/close", {"reason": "wrong_change", "note": "a coin"}
    )
    assert (status, closed["variance_minor"], closed["expected_minor"]) == (200, -100, 15_000)
    assert closed["totals"]["net_minor"] == 1500

    status, _ = await manager.get("/v1/reports/x")
    assert status == 200
    z_id = str(uuid4())
    status, day = await manager.post("/v1/reports/z", {"id": z_id})
    assert (status, day["number"], day["shifts"], day["totals"]["net_minor"]) == (201, 1, 1, 1500)
    assert (await manager.post("/v1/reports/z", {"id": z_id}))[1]["number"] == 1, "the same again is the same"
    assert (await manager.post("/v1/reports/z", {"id": str(uuid4())}))[1]["number"] == 2

    assert day["totals"]["state"] == "provisional"
    _, page = await manager.get(f"/reports/{z_id}")
    assert "PROVISIONAL" in page
    till.present()
    _, page = await manager.get(f"/reports/{z_id}", headers={"Accept-Language": "zh-CN"})
    assert "已结清" in page
    for form, begin in (("pdf", "%PDF"), ("text", "")):
        async with manager.session.get(f"{till.address}/reports/{z_id}?form={form}") as response:
            assert response.status == 200
            assert (await response.read()).startswith(begin.encode())


async def test_a_drawer_is_not_counted_until_the_sum_is_found(till: Counter, sign_in: SignIn) -> None:
    cashier = await sign_in(Role.CASHIER)
    await cashier.post("/v1/shifts", {"id": str(uuid4()), "float_minor": 0})
    for counted in range(MAX_COUNTS):
        assert (await cashier.post("/v1/shifts/current/count", {"counted_minor": counted}))[0] == 200
    assert (await cashier.post("/v1/shifts/current/count", {"counted_minor": 7}))[0] == 409


async def test_only_who_opened_a_shift_or_a_manager_closes_it(till: Counter, sign_in: SignIn) -> None:
    manager, cashier = await sign_in(Role.MANAGER), await sign_in(Role.CASHIER)
    await manager.post("/v1/shifts", {"id": str(uuid4()), "float_minor": 100})
    assert (await cashier.post("/v1/shifts/current/count", {"counted_minor": 100}))[0] == 403
    assert (await manager.post("/v1/shifts/current/count", {"counted_minor": 100}))[0] == 200
    assert (await manager.post("/v1/shifts/current/close", {}))[0] == 200


@pytest.mark.parametrize("closed", [False, True])
async def test_a_restart_finds_the_shift_and_the_day_again(closed: bool, till: Counter) -> None:
    who = {"by": "Mei", "role": "cashier"}
    shifts = till.parts.shifts
    shifts.close_day(uuid4(), who)
    shifts.open(uuid4(), who, 500)
    shifts.cash(uuid4(), who, 300, "change")
    shifts.count(who, 800)
    if closed:
        shifts.close(who, "", "")
    again = Shifts(till.shop.journal, History(till.shop.home.journal), now_unix_ms)
    assert again.current == shifts.current
    assert again.day_after == shifts.day_after
    if closed:
        assert again.close_day(uuid4(), who).facts()["number"] == 2
