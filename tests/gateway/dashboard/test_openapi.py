"""The OpenAPI document: whole, and the API is as it says, whatever schemathesis sends."""

from __future__ import annotations

import asyncio
import queue
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from pos_gateway.gateway.access import LEAST_ROLES
from pos_gateway.gateway.openapi import openapi
from pos_gateway.lab.counter import TOKEN, open_counter

PEOPLES = ("/v1/session", "/v1/first-owner", "/v1/staff", "/v1/tokens", "/v1/approvals", "/v1/displays")
OWN = ("/v1/openapi.json", "/v1/customer-events")


def test_every_route_for_programs_is_described() -> None:
    described = {(method.upper(), path) for path, ways in openapi()["paths"].items() for method in ways}
    served = {key for key in LEAST_ROLES if key[1].startswith("/v1/")}
    assert described == {key for key in served if not key[1].startswith((*PEOPLES, *OWN))}


def test_every_operation_has_a_name_of_its_own() -> None:
    names = [way["operationId"] for ways in openapi()["paths"].values() for way in ways.values()]
    assert len(names) == len(set(names))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, ledger_home: Path) -> Iterator[str]:
    """A till in a thread of its own: schemathesis is not asynchronous."""
    folder = tmp_path_factory.mktemp("openapi")
    shutil.copytree(ledger_home, folder / "ledger")
    told: queue.Queue[str] = queue.Queue()
    stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def run() -> None:
        async with open_counter(folder, card_timeout_s=0.01) as counter:
            counter.shop.publish()
            done = asyncio.Event()
            stop.append((asyncio.get_running_loop(), done))
            told.put(counter.address)
            await done.wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    yield told.get(timeout=60)
    loop, done = stop[0]
    loop.call_soon_threadsafe(done.set)
    thread.join()


def no_fault_of_ours(context: Any, response: Any, case: Any) -> None:
    """503 says that a part is not there now, the line for one: an answer like others."""
    assert response.status_code < 500 or response.status_code == 503


SCHEMA = schemathesis.openapi.from_dict(openapi()).exclude(path_regex="/events$").exclude(path="/v1/limits")


@SCHEMA.parametrize()
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.function_scoped_fixture,
    ],
)
def test_the_api_answers_as_it_says(case: schemathesis.Case[Any], address: str) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("wait_s"), (int, float)):
        case.body["wait_s"] = 0
    case.call_and_validate(
        base_url=address,
        headers={"Authorization": f"Bearer {TOKEN}"},
        checks=[no_fault_of_ours, status_code_conformance, response_schema_conformance],
    )
