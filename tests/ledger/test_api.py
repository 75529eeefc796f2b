"""The HTTP API over real TLS on loopback, its certificate pinned as a gateway pins it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from pos_gateway.enrolment import Enrolment, EnrolmentRequest
from pos_gateway.errors import Unavailable
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger import Ledger, api
from tests.ledger.shop import MERCHANT, Clock, Shop, context


@dataclass
class Line:
    """A client's line to the ledger."""

    session: aiohttp.ClientSession
    url: str

    async def get(self, path: str, **options: Any) -> tuple[int, bytes]:
        async with self.session.get(self.url + path, **options) as response:
            return response.status, await response.read()

    async def post(self, path: str, data: bytes, **options: Any) -> tuple[int, dict[str, Any]]:
        async with self.session.post(self.url + path, data=data, **options) as response:
            answer: dict[str, Any] = await response.json()
            return response.status, answer

    async def present(self, shop: Shop, body: bytes, signature: bytes) -> tuple[int, dict[str, Any]]:
        return await self.post(
            "/v1/presentments",
            body,
            headers={
                "Pos-Gateway-Id": shop.enrolment.gateway_id,
                "Pos-Gateway-Signature": base64.b64encode(signature).decode(),
            },
            ssl=shop.context(),
        )


@pytest_asyncio.fixture
async def port(ledger: Ledger) -> AsyncIterator[int]:
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(api.serve(ledger, "127.0.0.1", 0, on_ready=ready.set_result))
    yield await ready
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving


@pytest_asyncio.fixture
async def line(ledger: Ledger, port: int) -> AsyncIterator[Line]:
    authority = context(ledger.keys.authority.certificate.public_bytes(Encoding.DER))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=authority)) as session:
        yield Line(session, f"https://127.0.0.1:{port}")


def enrolment_request(code: str, **changes: object) -> bytes:
    request = EnrolmentRequest.make("X" if len(code) > 128 else code, Ed25519PrivateKey.generate())
    return json.dumps({**json.loads(request.model_dump_json()), "code": code, **changes}).encode()


async def test_health_tells_the_ledgers_time(ledger: Ledger, line: Line, clock: Clock) -> None:
    status, body = await line.get("/v1/health")
    assert (status, json.loads(body)) == (
        200,
        {"status": "ok", "time_unix_ms": int(clock.now_s * 1000), "epoch": str(ledger.epoch)},
    )


async def test_enrol_fetch_tap_present(ledger: Ledger, line: Line, icc_key: rsa.RSAPrivateKey) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=50_000)
    card = VirtualCard(ledger.issue_token(account.id, icc_key=icc_key).personalisation)
    published = ledger.publish()

    key, tls_key = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
    code = ledger.invite(MERCHANT)
    asked = EnrolmentRequest.make(code, key, tls_key).model_dump_json()
    async with line.session.post(line.url + "/v1/enrolments", data=asked) as response:
        assert response.status == 200
        enrolment = Enrolment.parse(await response.read())
    status, answer = await line.post("/v1/enrolments", enrolment_request(code))
    assert (status, answer["error"]["code"]) == (401, "not_authenticated")
    assert "used already" in answer["error"]["reason"]
    assert answer["error"]["advice"]

    content = published.path.read_bytes()
    assert await line.get(f"/v1/tuf/targets/{published.path.name}") == (200, content)
    status, root = await line.get("/v1/tuf/metadata/1.root.json")
    assert (status, root) == (200, enrolment.trusted_root)

    shop = Shop(ledger, enrolment, key, tls_key)
    record = shop.tap(card, 1930)
    batch = shop.batch([record])
    status, answer = await line.present(shop, *batch)
    assert status == 200
    assert answer == {
        "epoch": str(ledger.epoch),
        "verdicts": [{"id": str(record.id), "verdict": "posted", "reason": "Paid."}],
    }
    _, answer = await line.present(shop, *batch)
    assert answer["verdicts"][0]["verdict"] == "duplicate"
    assert ledger.account(account.id).outstanding_minor == 1930
    ledger.check_books()


async def test_a_download_can_be_resumed(ledger: Ledger, line: Line) -> None:
    path = ledger.publish().path
    content, url = path.read_bytes(), f"/v1/tuf/targets/{path.name}"
    assert await line.get(url, headers={"Range": "bytes=100-"}) == (206, content[100:])
    assert await line.get(url, headers={"Range": "bytes=0-9"}) == (206, content[:10])
    status, _ = await line.get(url, headers={"Range": f"bytes={len(content)}-"})
    assert status == 416


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/tuf/metadata/2.root.json", 404),
        ("/v1/tuf/metadata/..%2F..%2Fledger.db", 404),
        ("/v1/tuf/targets/.limits-1.snapshot.new", 404),
        ("/v1/tuf/targets/", 404),
        ("/v1/tuf/keys/tls.pem", 404),
        ("/v1/presentments", 405),
        ("/", 404),
    ],
)
async def test_what_is_not_there_is_said_in_json(line: Line, path: str, status: int) -> None:
    found, body = await line.get(path)
    assert found == status
    assert set(json.loads(body)["error"]) == {"code", "reason", "advice"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"code":"X"}',
        b'{"code":5,"public_key":"AA=="}',
        b'{"code":"X","public_key":"!"}',
        enrolment_request("SECRETLOOKINGCODE"),
        enrolment_request("X", extra=1),
        enrolment_request("X" * 129),
    ],
)
async def test_a_malformed_enrolment_gets_a_clear_error(line: Line, body: bytes) -> None:
    status, answer = await line.post("/v1/enrolments", body)
    assert (status, answer["error"]["code"]) == (400, "invalid_message")
    assert "SECRETLOOKING" not in json.dumps(answer)


async def test_bodies_are_bounded(ledger: Ledger, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    status, answer = await line.post("/v1/enrolments", b"x" * 5000)
    assert (status, answer["error"]["code"]) == (413, "request_entity_too_large")

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1 << 20)

    shop = Shop.enrol(ledger)
    headers = {"Pos-Gateway-Id": shop.enrolment.gateway_id, "Pos-Gateway-Signature": "AAAA"}
    async with line.session.post(
        line.url + "/v1/presentments", data=endless(), headers=headers, ssl=shop.context()
    ) as response:
        assert response.status == 413
    async with line.session.post(line.url + "/v1/enrolments", data=endless()) as response:
        assert response.status == 411


async def test_guessing_codes_is_slowed_down(ledger: Ledger, line: Line) -> None:
    wrong = ledger.invite(MERCHANT)[:-4] + "AAAA"
    statuses = [(await line.post("/v1/enrolments", enrolment_request(wrong)))[0] for _ in range(12)]
    assert statuses == [401] * 10 + [429] * 2
    # Who presents is not held up by it.
    assert (await line.get("/v1/health"))[0] == 200


def test_failed_attempts_are_forgotten_after_a_minute_and_bounded_in_number() -> None:
    attempts = api.FailedAttempts()
    for _ in range(10):
        attempts.add("a", 0.0)
    assert attempts.too_many("a", 59.0)
    assert not attempts.too_many("b", 59.0)
    assert not attempts.too_many("a", 61.0)
    for i in range(5000):
        attempts.add(str(i), 0.0)
    assert len(attempts._times) == 1024


async def test_a_batch_that_is_not_signed_is_not_read(ledger: Ledger, line: Line) -> None:
    shop, other = Shop.enrol(ledger), Shop.enrol(ledger)
    body, signature = shop.batch([])
    assert (await line.present(shop, body, signature))[0] == 200
    assert (await line.present(other, body, signature))[0] == 401
    assert (await line.present(shop, body, bytes(64)))[0] == 401
    assert (await line.present(shop, body, b""))[0] == 400
    status, answer = await line.post(
        "/v1/presentments", body, headers={"Pos-Gateway-Id": "gw-x", "Pos-Gateway-Signature": "AAAA"}
    )
    assert (status, "client certificate" in answer["error"]["reason"]) == (401, True)
    status, _ = await line.post(
        "/v1/presentments", body, headers={"Pos-Gateway-Id": "gw-x", "Pos-Gateway-Signature": "?"}
    )
    assert status == 400


async def test_an_unforeseen_failure_tells_the_client_nothing(
    ledger: Ledger, line: Line, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("secret inside")

    monkeypatch.setattr(ledger, "now_unix_ms", fail)
    status, body = await line.get("/v1/health")
    assert (status, json.loads(body)["error"]["code"]) == (500, "internal")
    assert b"secret" not in body
    printed = capsys.readouterr()
    assert "secret" not in printed.out + printed.err
    assert "test_api.py" in printed.out + printed.err


async def test_no_code_and_no_token_number_is_logged(
    ledger: Ledger, line: Line, icc_key: rsa.RSAPrivateKey, capsys: pytest.CaptureFixture[str]
) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=50_000)
    personalisation = ledger.issue_token(account.id, icc_key=icc_key).personalisation
    ledger.publish()
    code = ledger.invite(MERCHANT)
    for _ in range(2):
        await line.post("/v1/enrolments", enrolment_request(code))
    shop = Shop.enrol(ledger)
    card = VirtualCard(personalisation)
    lie = shop.tap(card, 100, lies={"token_last4": "0000"})
    await line.present(shop, *shop.batch([shop.tap(card, 100), lie, {"id": personalisation.pan}]))
    printed = capsys.readouterr()
    log = printed.out + printed.err
    assert "presented" in log
    assert "enrolled" in log
    for secret in (code, code.replace("-", ""), personalisation.pan, shop.enrolment.token_key_secret.hex()):
        assert secret not in log


async def test_a_busy_ledger_says_so(ledger: Ledger, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise Unavailable("the ledger's database is not to be had", advice="try again in a moment")

    monkeypatch.setattr(ledger, "present", busy)
    shop = Shop.enrol(ledger)
    status, answer = await line.present(shop, *shop.batch([]))
    assert (status, answer["error"]["code"]) == (503, "unavailable")


async def test_a_taken_port_is_a_clear_error(ledger: Ledger, port: int) -> None:
    with pytest.raises(Unavailable, match=f"127.0.0.1:{port}"):
        await api.serve(ledger, "127.0.0.1", port)
