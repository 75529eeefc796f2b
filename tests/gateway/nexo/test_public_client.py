"""A client this project did not write works unchanged, plain and encrypted: end to end, against the real
gateway process, a real pcscd, a virtual card."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from pos_gateway.lab.virtual_reader import ForeignCard, VirtualReader
from tests.gateway.nexo.counter import (
    SECOND_POI,
    abort,
    how,
    payment,
    request,
    reversal,
    said,
    status,
    transaction,
)
from tests.gateway.nexo.node_client import NodeClient, install
from tests.gateway.nexo.site import API_KEY, KEY_IDENTIFIER, KEY_VERSION, PASSPHRASE, PORT, Site

_numbers = itertools.count(1)


def new_id(prefix: str) -> str:
    return f"{prefix}{next(_numbers)}"


@pytest.fixture(scope="module")
def node_folder() -> Path:
    return install()


@pytest.fixture(scope="module")
def site(node_folder: Path, tmp_path_factory: pytest.TempPathFactory, shop_folder: Path) -> Iterator[Site]:
    with VirtualReader(slots=2) as reader:
        site = Site(tmp_path_factory.mktemp("site"), shop_folder, reader)
        yield site
        site.close()


@pytest.fixture
async def node(site: Site, node_folder: Path) -> AsyncIterator[NodeClient]:
    place = {
        "endpoint": f"https://{site.host}",
        "ca": str(site.ca),
        "apiKey": API_KEY,
        "passphrase": PASSPHRASE,
        "identifier": KEY_IDENTIFIER,
        "version": KEY_VERSION,
    }
    client = await NodeClient.start(node_folder, place)
    yield client
    await client.close()
    for slot in (0, 1):
        site.reader.remove(slot=slot)


both = pytest.mark.parametrize("sealed", [False, True], ids=["plain", "encrypted"])


async def pay(site: Site, node: NodeClient, sealed: bool, amount: Any, service_id: str) -> dict[str, Any]:
    paying = asyncio.create_task(node.ask(payment(service_id, amount), sealed=sealed))
    await until_in_progress(node, service_id)
    site.insert()
    answer = await paying
    site.reader.remove()
    return answer


async def until_in_progress(node: NodeClient, service_id: str) -> None:
    for _ in range(200):
        told = await node.ask(status(new_id("S"), service_id), sealed=False)
        if how(told) == "InProgress":
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"never in progress: {told}")


@both
async def test_payment_status_refund_and_reversal(site: Site, node: NodeClient, sealed: bool) -> None:
    service_id = new_id("A")
    answer = await pay(site, node, sealed, 19.3, service_id)
    assert how(answer) == "Success", answer
    body = answer["SaleToPOIResponse"]["PaymentResponse"]
    assert body["PaymentResult"]["AmountsResp"]["AuthorizedAmount"] == 19.3
    assert body["PaymentResult"]["OnlineFlag"] is False
    lines = body["PaymentReceipt"][0]["OutputContent"]["OutputText"]
    assert any(parse_qs(line["Text"]).get("value") == ["CNY 19.30"] for line in lines)

    told = await node.ask(status(new_id("S"), service_id), sealed=sealed)
    repeated = told["SaleToPOIResponse"]["TransactionStatusResponse"]["RepeatedMessageResponse"]
    assert repeated["RepeatedResponseMessageBody"]["PaymentResponse"] == body

    refund = payment(new_id("F"), 9.3, PaymentType="Refund", original=transaction(answer))
    assert how(await node.ask(refund, sealed=sealed)) == "Success"
    back = reversal(new_id("R"), transaction(answer))
    reversed_ = await node.ask(back, sealed=sealed)
    assert how(reversed_) == "Success"
    assert reversed_["SaleToPOIResponse"]["ReversalResponse"]["ReversedAmount"] == 10
    assert await node.ask(back, sealed=sealed) == reversed_
    assert how(await node.ask(reversal(new_id("R"), transaction(answer)), sealed=sealed)) == "NotAllowed"


@both
async def test_a_decline(site: Site, node: NodeClient, sealed: bool) -> None:
    service_id = new_id("A")
    paying = asyncio.create_task(node.ask(payment(service_id), sealed=sealed))
    await until_in_progress(node, service_id)
    site.reader.insert(ForeignCard.SCHEME)
    answer = await paying
    assert how(answer) == "InvalidCard"
    assert parse_qs(said(answer)["AdditionalResponse"])["message"] == ["This card is not accepted here."]


@both
async def test_an_abort(site: Site, node: NodeClient, sealed: bool) -> None:
    service_id = new_id("A")
    paying = asyncio.create_task(node.ask(payment(service_id), sealed=sealed))
    await until_in_progress(node, service_id)
    assert await node.ask(abort(new_id("X"), service_id), sealed=sealed) == {}
    assert how(await paying) == "Aborted"


@both
async def test_two_lanes_and_a_busy_one(site: Site, node: NodeClient, sealed: bool) -> None:
    first, second = new_id("A"), new_id("A")
    paying = asyncio.create_task(node.ask(payment(first), sealed=sealed))
    await until_in_progress(node, first)
    assert how(await node.ask(payment(new_id("A")), sealed=sealed)) == "Busy"
    other = asyncio.create_task(node.ask(payment(second, 2, poi_id=SECOND_POI), sealed=sealed))
    while (
        how(await node.ask(request("Diagnosis", new_id("D"), poi_id=SECOND_POI), sealed=sealed)) != "Success"
    ):
        await asyncio.sleep(0.05)
    site.insert(slot=1)
    assert how(await other) == "Success"
    await node.ask(abort(new_id("X"), first), sealed=sealed)
    assert how(await paying) == "Aborted"


@both
async def test_login_diagnosis_totals_reconciliation(site: Site, node: NodeClient, sealed: bool) -> None:
    login = request(
        "Login",
        new_id("L"),
        DateTime="2026-11-24T10:00:00+00:00",
        SaleSoftware={
            "ManufacturerID": "Example",
            "ApplicationName": "Till",
            "SoftwareVersion": "1",
            "CertificationCode": "-",
        },
        OperatorLanguage="en",
    )
    assert how(await node.ask(login, sealed=sealed)) == "Success"
    diagnosis = await node.ask(request("Diagnosis", new_id("D"), HostDiagnosisFlag=True), sealed=sealed)
    status_ = diagnosis["SaleToPOIResponse"]["DiagnosisResponse"]["POIStatus"]
    assert status_["CardReaderOKFlag"] is True
    assert status_["CommunicationOKFlag"] is False  # this shop is cut off
    assert how(await node.ask(request("GetTotals", new_id("G")), sealed=sealed)) == "Success"
    closing = request("Reconciliation", new_id("Z"), ReconciliationType="SaleReconciliation")
    closed = await node.ask(closing, sealed=sealed)
    assert how(closed) == "Success"
    assert await node.ask(closing, sealed=sealed) == closed


@both
async def test_a_killed_gateway_answers_the_same(site: Site, node: NodeClient, sealed: bool) -> None:
    service_id = new_id("K")
    answer = await pay(site, node, sealed, 3, service_id)
    assert how(answer) == "Success"
    cut_short = new_id("K")
    lost = asyncio.create_task(node.ask(payment(cut_short), sealed=sealed))
    await until_in_progress(node, cut_short)
    site.kill_and_start_again()  # from this thread: a program dies with the thread that started it
    assert "error" in await lost
    assert await node.ask(payment(service_id, 3), sealed=sealed) == answer
    assert how(await node.ask(payment(cut_short), sealed=sealed)) == "Aborted"


async def test_another_passphrase_or_key_is_refused(node: NodeClient) -> None:
    message = request("Diagnosis", new_id("D"))
    for change in ({"Passphrase": "not the one we share"}, {"KeyIdentifier": "x"}, {"KeyVersion": 9}):
        assert "401" in (await node.ask(message, sealed=True, key=change))["error"]


async def test_curl_needs_the_api_key(site: Site) -> None:
    def ask(*arguments: str) -> str:
        return subprocess.run(
            ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", str(site.ca), *arguments,
             "--data", '{"SaleToPOIRequest": {}}', f"https://{site.host}:{PORT}/nexo"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout  # fmt: skip

    assert await asyncio.to_thread(ask) == "401"
    assert await asyncio.to_thread(ask, "-H", f"X-API-Key: {API_KEY}") == "200"
