"""The server: envelopes plain and sealed, over real HTTP; hostile ones never crash it."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from pos_gateway.errors import InvalidConfiguration
from pos_gateway.gateway.nexo import wire
from pos_gateway.gateway.nexo.crypto import NexoKey
from pos_gateway.gateway.nexo.setup import NexoFiles, prepare
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.virtual_card import VirtualCard
from tests.gateway.nexo.counter import POI, SETTINGS, Counter, abort, how, payment, request, status

PASSPHRASE = "correct horse battery staple"
KEY = NexoKey.derive(PASSPHRASE, "pos", 1)
Client = TestClient[Any, Any]


@pytest.fixture
async def counter(tmp_path: Path, shop_folder: Path) -> AsyncIterator[Counter]:
    """With a passphrase."""
    shutil.copytree(shop_folder, tmp_path, dirs_exist_ok=True)
    files = NexoFiles(tmp_path / "nexo")
    files.folder.mkdir()
    files.passphrase.write_text(PASSPHRASE)
    files.passphrase.chmod(0o600)
    with Shop(tmp_path) as shop:
        counter = Counter(files.folder, shop)
        yield counter
        await counter.stop()


@pytest.fixture
async def client(counter: Counter) -> AsyncIterator[Client]:
    async with TestClient(TestServer(counter.pos.app)) as client:
        yield client


def seal(message: dict[str, Any], **nonce: Any) -> dict[str, Any]:
    inner = message["SaleToPOIRequest"]
    return KEY.seal("SaleToPOIRequest", inner["MessageHeader"], wire.dumps(inner), **nonce)


def unseal(answer: dict[str, Any]) -> dict[str, Any]:
    ((envelope, inside),) = answer.items()
    return {envelope: KEY.open(envelope, inside, lambda nonce: True)}


async def post(client: Client, message: Any, path: str = "/nexo", **headers: str) -> tuple[int, bytes]:
    data = message if isinstance(message, bytes) else wire.dumps(message)
    async with client.post(path, data=data, headers=headers) as response:
        return response.status, await response.read()


@pytest.mark.parametrize("path", ["/nexo", "/nexo/", f"/nexo/{POI}", "/sync"])
async def test_every_address_takes_messages(client: Client, path: str) -> None:
    code, body = await post(client, request("Diagnosis", "D1", HostDiagnosisFlag=False), path)
    assert code == 200
    assert how(json.loads(body)) == "Success"


async def test_an_address_of_another_lane_is_rejected(client: Client) -> None:
    code, body = await post(client, request("Diagnosis", "D1"), "/nexo/V400m-000000002")
    assert code == 200
    assert json.loads(body)["SaleToPOIRequest"]["EventNotification"]["EventToNotify"] == "Reject"


async def test_a_payment_plain_and_one_sealed(client: Client, counter: Counter, card: VirtualCard) -> None:
    counter.reader.present(card)
    code, body = await post(client, payment("A1", 5))
    assert (code, how(json.loads(body))) == (200, "Success")
    assert b'"AuthorizedAmount":5.00' in body
    counter.reader.present(card)
    code, body = await post(client, seal(payment("A2", 7)))
    answer = wire.parse(body)
    assert code == 200
    assert "PaymentResponse" not in answer["SaleToPOIResponse"]
    assert how(unseal(answer)) == "Success"


async def test_an_abort_is_answered_with_nothing(client: Client, counter: Counter) -> None:
    paying = asyncio.create_task(post(client, seal(payment("A1"))))
    await counter.waiting_for_card()
    assert await post(client, seal(abort("X1", "A1"))) == (200, b"")
    assert how(unseal(wire.parse((await paying)[1]))) == "Aborted"


async def test_a_client_that_hangs_up_ends_no_payment(
    client: Client, counter: Counter, card: VirtualCard
) -> None:
    paying = asyncio.create_task(post(client, payment("A1")))
    await counter.waiting_for_card()
    paying.cancel()
    await asyncio.gather(paying, return_exceptions=True)
    await asyncio.sleep(0.05)
    counter.reader.present(card)
    while how(json.loads((await post(client, status("S1", "A1")))[1])) == "InProgress":
        await asyncio.sleep(0.01)
    _, body = await post(client, payment("A1"))
    assert how(json.loads(body)) == "Success"


async def test_async_says_ok_and_lets_the_pos_ask(
    client: Client, counter: Counter, card: VirtualCard
) -> None:
    assert await post(client, payment("A1"), "/async") == (200, b"ok")
    await counter.waiting_for_card()
    assert await post(client, abort("X1", "A1"), "/async") == (200, b"ok")
    while True:
        told = json.loads((await post(client, status("S1", "A1"), "/async"))[1])
        if how(told) != "InProgress":
            break
        await asyncio.sleep(0.01)
    body = told["SaleToPOIResponse"]["TransactionStatusResponse"]["RepeatedMessageResponse"]
    response = body["RepeatedResponseMessageBody"]["PaymentResponse"]["Response"]
    assert response["ErrorCondition"] == "Aborted"
    assert b"Reject" in (await post(client, payment("A2", poi_id="V400m-9"), "/async"))[1]


async def test_what_is_not_authentic_is_refused_alike(client: Client) -> None:
    good = seal(request("Diagnosis", "D1"))
    wrong_mac = seal(request("Diagnosis", "D2"))
    wrong_mac["SaleToPOIRequest"]["SecurityTrailer"]["Hmac"] = "A" * 43 + "="
    other_header = seal(request("Diagnosis", "D3"))
    other_header["SaleToPOIRequest"]["MessageHeader"] = request("Diagnosis", "D4")["SaleToPOIRequest"][
        "MessageHeader"
    ]
    bad_padding = seal(request("Diagnosis", "D5"))
    blob = bad_padding["SaleToPOIRequest"]["NexoBlob"]
    bad_padding["SaleToPOIRequest"]["NexoBlob"] = blob[:-8] + "AAAAAAA="
    assert (await post(client, good))[0] == 200
    refusals = [await post(client, message) for message in (good, wrong_mac, other_header, bad_padding)]
    assert refusals == [(401, b"")] * 4


async def test_a_nonce_is_remembered_over_a_restart(counter: Counter) -> None:
    message = seal(request("Diagnosis", "D1"))
    async with TestClient(TestServer(counter.pos.app)) as client:
        assert (await post(client, message))[0] == 200
    await counter.stop()
    counter.start_again()
    async with TestClient(TestServer(counter.pos.app)) as client:
        assert await post(client, message) == (401, b"")


async def test_a_web_page_is_refused(client: Client) -> None:
    code, _ = await post(client, request("Diagnosis", "D1"), Origin="https://evil.example")
    assert code == 403


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b'{"SaleToPOIRequest":7}', b'{"a":' * 9000])
async def test_what_is_no_message_is_a_400(client: Client, data: bytes) -> None:
    assert await post(client, data) == (400, b"")


async def test_too_much_is_a_413(client: Client) -> None:
    assert (await post(client, b" " * (wire.MAX_MESSAGE_BYTES + 1)))[0] == 413


async def test_random_and_hostile_messages_never_crash_it(client: Client) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    good = [
        request("Diagnosis", "D1", HostDiagnosisFlag=True),
        request("Login", "L1", OperatorLanguage="en"),
        request("GetTotals", "G1", TotalDetails=["OperatorID"], TotalFilter={"OperatorID": "x"}),
        request("Reconciliation", "Z1", ReconciliationType="SaleReconciliation"),
        status("S1", "A1"),
        abort("X1", "A1"),
        payment("A1", PaymentType="Refund", original="A0.00000000000000000000000000000000"),
        request("Reversal", "R1", ReversalReason="x", OriginalPOITransaction={"POITransactionID": {}}),
    ]
    for _ in range(400):
        message = _mutated(chance, wire.parse(wire.dumps(chance.choice(good))))
        sealed = chance.random() < 0.3 and isinstance(message.get("SaleToPOIRequest"), dict)
        if sealed and isinstance(message["SaleToPOIRequest"].get("MessageHeader"), dict):
            message = _mutated(chance, seal(message)) if chance.random() < 0.7 else seal(message)
        data = wire.dumps(message)
        if chance.random() < 0.2:
            place = chance.randrange(len(data))
            data = data[:place] + bytes([chance.randrange(256)]) + data[place + chance.randrange(2) :]
        code, body = await post(client, data)
        assert code in (200, 400, 401), (data, code, body)
        assert b"went%20wrong" not in body, data
        if code == 200 and body:
            json.loads(body)
    code, body = await post(client, request("Diagnosis", "D9"))
    assert how(json.loads(body)) == "Success"


ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    10**30,
    "",
    "x" * 300,
    "\ud800",
    "\u0000",
    [],
    {},
    [[]],
    {"a": {}},
    "19.30",
    "ÿ%&=",
)


def _mutated(chance: random.Random, message: dict[str, Any]) -> dict[str, Any]:
    """One to three places changed, dropped or doubled under another name."""
    for _ in range(chance.randrange(1, 4)):
        node: Any = message
        while isinstance(node, dict) and node:
            key = chance.choice(sorted(node))
            if not isinstance(node[key], dict) or not node[key] or chance.random() < 0.2:
                match chance.randrange(3):
                    case 0:
                        node[key] = chance.choice(ODD)
                    case 1:
                        del node[key]
                    case _:
                        node[chance.choice(("ServiceID", "Hmac", "Currency", "POIID", "zz"))] = node[key]
                break
            node = node[key]
    return message


# Settings


def test_beyond_this_machine_plain_messages_need_a_key(tmp_path: Path) -> None:
    files = NexoFiles(tmp_path / "nexo")
    abroad = SETTINGS.model_copy(update={"host": "0.0.0.0"})  # noqa: S104
    with pytest.raises(InvalidConfiguration, match="API key"):
        prepare(files, abroad)
    with pytest.raises(InvalidConfiguration, match="no passphrase"):
        prepare(files, abroad.model_copy(update={"plain": False}))
    files.passphrase.write_text(PASSPHRASE)
    with pytest.raises(InvalidConfiguration, match="others may read"):
        prepare(files, abroad.model_copy(update={"plain": False}))
    files.passphrase.chmod(0o600)
    secrets, _ = prepare(files, abroad.model_copy(update={"plain": False}))
    assert secrets.key is not None
    files.api_key.write_text("short")
    files.api_key.chmod(0o600)
    with pytest.raises(InvalidConfiguration, match="characters"):
        prepare(files, abroad)


async def test_with_an_api_key_plain_messages_must_carry_it(counter: Counter) -> None:
    await counter.stop()
    files = NexoFiles(counter.folder)
    files.api_key.write_text("0123456789abcdef\n")
    files.api_key.chmod(0o600)
    counter.start_again()
    async with TestClient(TestServer(counter.pos.app)) as client:
        message = request("Diagnosis", "D1")
        assert (await post(client, message))[0] == 401
        assert (await post(client, message, **{"X-API-Key": "0123456789abcdeF"}))[0] == 401
        assert (await post(client, message, **{"X-API-Key": "0123456789abcdef"}))[0] == 200


async def test_where_plain_is_off_only_sealed_messages_are_taken(counter: Counter) -> None:
    await counter.stop()
    counter.settings = SETTINGS.model_copy(update={"plain": False})
    counter.start_again()
    async with TestClient(TestServer(counter.pos.app)) as client:
        assert (await post(client, request("Diagnosis", "D1")))[0] == 401
        assert (await post(client, seal(request("Diagnosis", "D1"))))[0] == 200
