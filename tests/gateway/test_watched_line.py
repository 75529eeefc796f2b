"""A line with both sides watched: their logs and metrics tell what happened, and nothing of the card."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiohttp
import pytest
import structlog

from pos_gateway.gateway.certificate import connect
from pos_gateway.gateway.till import Approved
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger.api import serve
from pos_gateway.redaction import REDACTED, redact_event


async def test_logs_and_metrics_of_a_presentment_hold_no_card_data(tmp_path: Path, ledger_home: Path) -> None:
    shutil.copytree(ledger_home, tmp_path / "ledger")
    lines: list[str] = []

    class Kept:
        def msg(self, text: str) -> None:
            lines.append(text)

        debug = info = warning = error = critical = exception = msg

    before = structlog.get_config()
    structlog.configure(
        processors=[structlog.processors.add_log_level, redact_event, structlog.processors.JSONRenderer()],
        logger_factory=lambda *_: Kept(),
        cache_logger_on_first_use=False,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        with Shop(tmp_path) as shop:
            _, personalisation = shop.issue(limit_minor=10_000)
            shop.publish()
            outcome = shop.till.tap(
                shop.till.new_payment(uuid4(), 700, 1), DirectChannel(VirtualCard(personalisation))
            )
            assert isinstance(outcome, Approved)
            ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            serving = asyncio.create_task(
                serve(shop.ledger, port=0, on_ready=ready.set_result, metrics_at=("127.0.0.1", port))
            )
            url = f"https://127.0.0.1:{await ready}"
            async with connect(shop.home, url) as client, aiohttp.ClientSession() as session:
                await client.present(shop.enrolment.gateway_id, [outcome.record], shop.key)
                structlog.get_logger().info(
                    "odd", pan=personalisation.pan, reason=f"of {personalisation.pan}"
                )
                async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
                    assert response.status == 200
                    text = await response.text()
                async with session.get(f"http://127.0.0.1:{port}/v1/presentments") as response:
                    assert response.status == 404
            serving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await serving
            facts = outcome.record.facts()
    finally:
        structlog.configure(**before)
    told = [json.loads(line) for line in lines]

    def event(name: str) -> dict[str, Any]:
        return next(line for line in told if line["event"] == name)

    assert (event("presented")["posted"], event("presented")["path"]) == (1, "/v1/presentments")
    assert event("odd")["pan"] == REDACTED
    assert 'pos_ledger_verdicts_total{verdict="posted"} 1.0' in text
    assert 'pos_ledger_request_seconds_count{route="/v1/presentments",status="200"} 1.0' in text
    assert "pos_ledger_database_up 1.0" in text
    assert 'pos_ledger_gateways{status="active"} 1.0' in text
    for secret in (personalisation.pan, facts["token_key"], facts["ac"], facts["sale_id"]):
        assert secret not in "".join(lines) + text
    assert shop.enrolment.gateway_id not in text
