"""Training: the real decisions, no real money, and it says so everywhere."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from uuid import uuid4

import aiohttp
import pytest

from pos_gateway.gateway.staff import Role, Staff
from pos_gateway.lab.counter import Counter
from pos_gateway.lab.practice import practise


@pytest.mark.parametrize(
    ("amount_minor", "state"), [(1000, "approved"), (1051, "declined"), (1019, "approved")]
)
async def test_a_card_comes_by_itself_and_nothing_leaves_the_training_folder(
    amount_minor: int, state: str, tmp_path: Path
) -> None:
    staff = Staff(tmp_path / "staff.json", tmp_path / "code", lambda: 0)
    staff.add("Lin", Role.OWNER, "730925")
    ready: asyncio.Future[Counter] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(practise(tmp_path / "training", tmp_path / "staff.json", 0, ready.set_result))
    counter = await asyncio.wait_for(ready, 60)
    try:
        assert [m.name for m in counter.parts.door.staff.members] == ["Lin"]
        order = {"id": str(uuid4()), "amount_minor": amount_minor, "currency": "CNY", "wait_s": 30}
        async with aiohttp.ClientSession(headers=counter.headers) as session:
            async with session.post(f"{counter.address}/v1/payments", json=order) as response:
                assert (await response.json())["state"] == state
            async with session.get(
                f"{counter.address}/transactions/{order['id']}/receipt?form=text"
            ) as paper:
                assert "TRAINING – NO MONEY" in await paper.text()
            async with session.get(counter.address) as page:
                assert "TRAINING – NO MONEY" in await page.text()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert sorted(os.listdir(tmp_path)) == ["staff.json", "training"]
