"""Several replicas of the API over one PostgreSQL: the same batch at all of them is posted once."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger import Ledger
from pos_gateway.records import Kind, Record
from tests.ledger.shop import Clock, Shop

REPLICAS = 3

REPLICA = """
import asyncio, sys
from pathlib import Path
from pos_gateway.ledger import Ledger, api
from tests.ledger.shop import Clock
with Ledger.open(Path(sys.argv[1]), clock=Clock()) as ledger:
    asyncio.run(api.serve(ledger, "127.0.0.1", 0, on_ready=lambda port: print(port, flush=True)))
"""


@pytest.fixture
def dialect() -> str:
    return "postgresql"


@pytest.fixture
def ports(ledger: Ledger) -> Iterator[list[int]]:
    """Processes of their own."""
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", REPLICA, str(ledger.home)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    cwd=Path(__file__).parents[2],
                )
            )
            for _ in range(REPLICAS)
        ]
        try:
            yield [_port(replica) for replica in replicas]
        finally:
            for replica in replicas:
                replica.kill()


def _port(replica: subprocess.Popen[str]) -> int:
    assert replica.stdout is not None
    for line in replica.stdout:
        if line.strip().isdigit():
            return int(line)
    raise AssertionError("the replica did not start")


async def test_concurrent_duplicates_at_several_replicas_are_posted_once(
    ledger: Ledger, ports: list[int], icc_key: rsa.RSAPrivateKey
) -> None:
    rng = random.Random(4)
    print("seed 4")
    accounts = [ledger.open_account(holder=f"H{i}", limit_minor=1_000_000) for i in range(4)]
    cards = [
        VirtualCard(ledger.issue_token(account.id, icc_key=icc_key).personalisation) for account in accounts
    ]
    ledger.publish()
    shops = [Shop.enrol(ledger) for _ in range(3)]
    batches: list[tuple[Shop, list[Record]]] = []
    expected = 0
    for shop in shops:
        for _ in range(4):
            records = []
            for card in rng.sample(cards, 4):
                amount = rng.randint(10, 500)
                records.append(shop.tap(card, amount))
                expected += amount
            part = rng.randint(1, 9)
            records.append(shop.correct(Kind.REFUND, rng.choice(records), part))
            expected -= part
            rng.shuffle(records)
            batches.append((shop, records))
    # Each batch to every replica, and cut differently a second time, all at the same time.
    sendings = [(port, *batch) for port in ports for batch in batches]
    sendings += [(rng.choice(ports), shop, records[1:]) for shop, records in batches]
    rng.shuffle(sendings)
    contexts = {shop.enrolment.gateway_id: shop.context() for shop in shops}
    answers: dict[uuid.UUID, list[str]] = {}

    async with aiohttp.ClientSession() as session:

        async def present(port: int, shop: Shop, records: list[Record]) -> None:
            body, signature = shop.batch(records)
            headers = {
                "Pos-Gateway-Id": shop.enrolment.gateway_id,
                "Pos-Gateway-Signature": base64.b64encode(signature).decode(),
            }
            url = f"https://127.0.0.1:{port}/v1/presentments"
            tls = contexts[shop.enrolment.gateway_id]
            async with session.post(url, data=body, headers=headers, ssl=tls) as response:
                answer: dict[str, Any] = json.loads(await response.read())
                assert response.status == 200, answer
            for record, verdict in zip(records, answer["verdicts"], strict=True):
                answers.setdefault(record.id, []).append(verdict["verdict"])

        async def publish() -> None:
            for _ in range(3):
                await asyncio.to_thread(ledger.publish)

        async with asyncio.TaskGroup() as tasks:
            for sending in sendings:
                tasks.create_task(present(*sending))
            tasks.create_task(publish())

    payments = {record.id for _, records in batches for record in records}
    assert set(answers) == payments
    for record_id, verdicts in answers.items():
        assert set(verdicts) <= {"posted", "duplicate", "unknown"}, (record_id, verdicts)
        assert verdicts.count("posted") <= 1
    assert sorted(p.record_id for p in ledger.payments()) == sorted(payments)
    assert sum(ledger.account(account.id).outstanding_minor for account in accounts) == expected
    ledger.check_books()
    assert ledger.alarms() == ()


def test_a_clone_presented_at_two_replicas_at_once_is_paid_once(
    ledger: Ledger, clock: Clock, icc_key: rsa.RSAPrivateKey
) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=1_000_000)
    personalisation = ledger.issue_token(account.id, icc_key=icc_key).personalisation
    ledger.publish()
    genuine, clone = VirtualCard(personalisation), VirtualCard(personalisation)
    with Ledger.open(ledger.home, clock=clock) as other_replica, ThreadPoolExecutor(2) as pool:
        shops = [Shop.enrol(ledger), replace(Shop.enrol(ledger), ledger=other_replica)]
        for _ in range(15):
            records = [shop.tap(card, 100) for shop, card in zip(shops, (genuine, clone), strict=True)]
            start = threading.Barrier(2, timeout=20)

            def present(shop: Shop, record: Record, start: threading.Barrier = start) -> str:
                start.wait()
                return shop.verdict(record).value

            assert sorted(pool.map(present, shops, records)) == ["posted", "posted"]
    assert ledger.account(account.id).outstanding_minor == 1500
    ledger.check_books()


def test_publishing_at_two_replicas_at_once_gives_each_its_own_version(ledger: Ledger, clock: Clock) -> None:
    ledger.open_account(holder="Li Na", limit_minor=1000)
    start = threading.Barrier(2, timeout=20)

    def publish(replica: Ledger) -> list[int]:
        versions = []
        for _ in range(8):
            start.wait()
            versions.append(replica.publish().version)
        return versions

    with Ledger.open(ledger.home, clock=clock) as other_replica, ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(publish, (ledger, other_replica)))
    assert sorted(answers[0] + answers[1]) == list(range(1, 17))
