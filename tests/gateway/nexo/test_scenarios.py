"""Two tills, two lanes, one afternoon of everything at once: what was told is true, and stays so."""

from __future__ import annotations

import asyncio
import random
from collections import Counter as Count
from typing import Any

import pytest

from pos_gateway.lab.virtual_card import SchemeCard, VirtualCard
from pos_gateway.records import Kind
from tests.gateway.nexo.counter import POI, SECOND_POI, Counter, abort, how, payment, status

STEPS = 40
TILLS = ("Till 1 (ID: 7)", "Till 2")


@pytest.mark.parametrize("run", range(3))
async def test_what_was_told_is_true_and_stays_so(counter: Counter, card: VirtualCard, run: int) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    await counter.stop()
    counter.present_s = 0.3
    counter.start_again()
    orders: dict[tuple[str, str], dict[str, Any]] = {}
    told: dict[tuple[str, str], list[dict[str, Any]]] = {}
    asking: set[asyncio.Task[None]] = set()

    async def ask(key: tuple[str, str]) -> None:
        answer = await counter.ask(orders[key])
        if how(answer) != "InProgress":
            told.setdefault(key, []).append(answer)

    def begin(key: tuple[str, str]) -> None:
        task = asyncio.create_task(ask(key))
        asking.add(task)
        task.add_done_callback(asking.discard)

    for number in range(STEPS):
        await asyncio.sleep(chance.choice((0, 0, 0.001, 0.02)))
        known = sorted(orders)
        match chance.randrange(10):
            case 0 | 1 | 2:
                till, poi_id = chance.choice(TILLS), chance.choice((POI, SECOND_POI))
                key = (till, f"P{number}")
                least = {"MinimumSplitAmount": 1} if chance.random() < 0.3 else {}
                amount = chance.choice((1, 20, 120))
                orders[key] = payment(key[1], amount, sale_id=till, poi_id=poi_id, **least)
                begin(key)
            case 3 | 4:
                chance.choice(counter.readers).present(chance.choice((card, card, card, SchemeCard())))
            case 5 if known:
                key = chance.choice(known)
                header = orders[key]["SaleToPOIRequest"]["MessageHeader"]
                order = abort(f"X{number}", key[1], sale_id=key[0], poi_id=header["POIID"])
                reference = order["SaleToPOIRequest"]["AbortRequest"]["MessageReference"]
                reference["SaleID"] = key[0]
                assert await counter.ask(order) == {}
            case 6 | 7 if known:
                begin(chance.choice(known))
            case 8 if asking:  # a POS hangs up
                chance.choice(sorted(asking, key=id)).cancel()
            case 9 if chance.random() < 0.4:
                if chance.random() < 0.5:
                    await counter.stop()
                else:  # killed: whoever waits hears nothing
                    counter.pos.desk._loop = None
                    await counter.die()
                for task in asking:
                    task.cancel()
                await asyncio.gather(*asking, return_exceptions=True)
                counter.start_again()
    while asking:
        await asyncio.wait(set(asking), timeout=5)
    await counter.stop()
    counter.start_again()

    approved = Count(
        (record.facts()["pos"]["sale_id"], record.facts()["pos"]["service_id"])
        for record in counter.shop.journal.records()
        if record.kind is Kind.AUTHORIZATION
    )
    assert set(approved.values()) <= {1}, "one TC at most for one request"
    for key, answers in told.items():
        assert all(answer == answers[0] for answer in answers), key
        assert (how(answers[0]) in ("Success", "Partial")) == (key in approved), key
        assert await counter.ask(orders[key]) == answers[0]
    for key in orders:
        header = orders[key]["SaleToPOIRequest"]["MessageHeader"]
        order = status("S", key[1], sale_id=key[0], poi_id=header["POIID"])
        order["SaleToPOIRequest"]["TransactionStatusRequest"]["MessageReference"]["SaleID"] = key[0]
        answer = await counter.ask(order)
        if how(answer) == "NotFound":
            assert key not in approved
            continue
        body = answer["SaleToPOIResponse"]["TransactionStatusResponse"]["RepeatedMessageResponse"]
        response = body["RepeatedResponseMessageBody"]["PaymentResponse"]["Response"]
        assert (response["Result"] in ("Success", "Partial")) == (key in approved)
    for key in approved.keys() - told.keys():
        assert how(await counter.ask(orders[key])) in ("Success", "Partial")
