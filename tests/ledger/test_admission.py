"""Who is let in, over real TLS: what a gateway must show, and all that does not do."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import shutil
import sqlite3
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from pos_gateway.enrolment import CertificateRequest, Enrolment, EnrolmentRequest, make_request
from pos_gateway.errors import AuthenticationFailed, CertificateLapsed, Conflict, InvalidInput, NotFound
from pos_gateway.ledger import Ledger, api
from pos_gateway.ledger.authority import Authority, nearly_over
from pos_gateway.ledger.gateways import Action, GatewayStatus
from tests.ledger.shop import MERCHANT, Clock, Shop, context

DAY_S = 86_400
Ask = Callable[..., Any]


@asynccontextmanager
async def serving(ledger: Ledger) -> AsyncIterator[str]:
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(api.serve(ledger, port=0, on_ready=ready.set_result))
    yield f"https://127.0.0.1:{await ready}"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.fixture
async def url(ledger: Ledger) -> AsyncIterator[str]:
    async with serving(ledger) as address:
        yield address


async def ask(
    url: str, tls: ssl.SSLContext, path: str, body: bytes | None = None, shop: Shop | None = None
) -> tuple[int, dict[str, Any]]:
    headers = {}
    if shop is not None:
        body, signature = shop.batch([])
        headers = {"Pos-Gateway-Id": shop.enrolment.gateway_id, "Pos-Gateway-Signature": _base64(signature)}
    async with (
        aiohttp.ClientSession() as session,
        session.request("POST" if body else "GET", url + path, data=body, headers=headers, ssl=tls) as answer,
    ):
        document: dict[str, Any] = json.loads(await answer.read())
        return answer.status, document


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def standing(shop: Shop) -> str:
    return f"/v1/gateways/{shop.enrolment.gateway_id}"


def authority_of(ledger: Ledger) -> bytes:
    return ledger.keys.authority.certificate.public_bytes(Encoding.DER)


def test_what_each_certificate_is_good_for() -> None:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime(2026, 11, 24, tzinfo=UTC)
    authority = Authority.create(key, "Harbour Credit", now)
    server = authority.certify_server(key.public_key(), now)
    gateway = authority.certify_gateway("gw-1", key.public_key(), now, timedelta(days=30))
    for certificate, usage in ((server, "serverAuth"), (gateway, "clientAuth")):
        certificate.verify_directly_issued_by(authority.certificate)
        extensions = certificate.extensions
        purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage)
        assert (purposes.critical, [p._name for p in purposes.value]) == (True, [usage])
        assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    limits = authority.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (limits.ca, limits.path_length) == (True, 0)
    # A shop's clock at the beginning of time is no reason not to speak to the ledger.
    assert server.not_valid_before_utc == authority.certificate.not_valid_before_utc
    assert server.not_valid_before_utc.timestamp() == 0
    assert gateway.not_valid_after_utc == now + timedelta(days=30)
    until = server.not_valid_after_utc
    assert not nearly_over(server, until - timedelta(days=133))
    assert nearly_over(server, until - timedelta(days=132))
    # Nothing outlives the authority.
    late = authority.certificate.not_valid_after_utc - timedelta(days=5)
    end = authority.certificate.not_valid_after_utc
    assert authority.certify_server(key.public_key(), late).not_valid_after_utc == end
    assert (
        authority.certify_gateway("g", key.public_key(), late, timedelta(days=30)).not_valid_after_utc == end
    )


async def test_with_its_certificate_a_gateway_is_let_in_and_without_it_is_not(
    ledger: Ledger, url: str
) -> None:
    shop = Shop.enrol(ledger)
    assert (await ask(url, shop.context(), "/v1/presentments", shop=shop))[0] == 200
    status, answer = await ask(url, shop.context(), standing(shop))
    assert (status, answer["status"]) == (200, "active")
    assert answer["certificate_until_unix_ms"] == ledger.now_unix_ms() + 30 * DAY_S * 1000
    bare = context(authority_of(ledger))
    for status, answer in (
        await ask(url, bare, "/v1/presentments", shop=shop),
        await ask(url, bare, standing(shop)),
    ):
        assert (status, answer["error"]["code"]) == (401, "not_authenticated")
        assert "none was shown" in answer["error"]["reason"]


async def test_what_is_open_is_open_without_one(ledger: Ledger, url: str) -> None:
    ledger.publish()
    bare = context(authority_of(ledger))
    assert (await ask(url, bare, "/v1/health"))[0] == 200
    assert (await ask(url, bare, "/v1/tuf/metadata/timestamp.json"))[0] == 200
    async with aiohttp.ClientSession() as session, session.get(url + "/v1/authority", ssl=bare) as answer:
        assert await answer.read() == authority_of(ledger)


@pytest.mark.parametrize("dialect", ["sqlite"])
async def test_every_route_is_either_open_or_asks_for_the_certificate(ledger: Ledger, url: str) -> None:
    """A new route that forgets to ask is found here."""
    opened = {"/v1/health", "/v1/authority", "/v1/enrolments", "/v1/certificates"}
    # A wallet has no certificate: its card's cryptogram over a challenge speaks for it.
    opened |= {f"/v1/wallet/{what}" for what in ("challenges", "notes", "returns")}
    bare = context(authority_of(ledger))
    shop = Shop.enrol(ledger)
    asked = 0
    for route in api.build_app(ledger).router.routes():
        path = route.resource.canonical if route.resource else ""
        if path in opened or path.startswith("/v1/tuf/") or route.method == "HEAD":
            continue
        asked += 1
        where = url + path.replace("{id}", shop.enrolment.gateway_id)
        headers = {"Pos-Gateway-Id": shop.enrolment.gateway_id, "Pos-Gateway-Signature": "AAAA"}
        async with (
            aiohttp.ClientSession() as session,
            session.request(route.method, where, headers=headers, ssl=bare) as answer,
        ):
            assert answer.status == 401, (route.method, path)
            assert "client certificate" in (await answer.json())["error"]["reason"]
    assert asked >= 4


async def test_another_authority_s_certificate_breaks_the_handshake(ledger: Ledger, url: str) -> None:
    shop = Shop.enrol(ledger)
    stranger = Authority.create(ec.generate_private_key(ec.SECP256R1()), "Test Issuer", datetime.now(UTC))
    forged = stranger.certify_gateway(
        shop.enrolment.gateway_id, shop.tls_key.public_key(), datetime.now(UTC), timedelta(days=30)
    )
    tls = shop.context(forged.public_bytes(Encoding.DER))
    with pytest.raises((aiohttp.ClientError, OSError)):
        await ask(url, tls, standing(shop))
    # Self-signed in its own name, no better.
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, shop.enrolment.gateway_id)])
    own = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(shop.tls_key.public_key())
        .serial_number(1)
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2040, 1, 1, tzinfo=UTC))
        .sign(shop.tls_key, hashes.SHA256())
    )
    with pytest.raises((aiohttp.ClientError, OSError)):
        await ask(url, shop.context(own.public_bytes(Encoding.DER)), standing(shop))


async def test_a_certificate_that_the_books_do_not_know_is_none(ledger: Ledger, url: str) -> None:
    """Signed by the authority's key, but not given out: a stolen key, or a database from before."""
    shop = Shop.enrol(ledger)
    now = datetime.now(UTC)
    unknown = ledger.keys.authority.certify_gateway(
        shop.enrolment.gateway_id, shop.tls_key.public_key(), now, timedelta(days=30)
    )
    status, answer = await ask(url, shop.context(unknown.public_bytes(Encoding.DER)), standing(shop))
    assert (status, answer["error"]["code"]) == (401, "certificate_lapsed")
    unknown = ledger.keys.authority.certify_gateway(
        "gw-nobody", shop.tls_key.public_key(), now, timedelta(days=30)
    )
    status, answer = await ask(
        url, shop.context(unknown.public_bytes(Encoding.DER)), "/v1/gateways/gw-nobody"
    )
    assert (status, answer["error"]["code"]) == (401, "not_authenticated")


@pytest.mark.parametrize("dialect", ["sqlite"])
def test_a_restored_database_forgets_no_revocation_and_locks_no_gateway_out(
    ledger: Ledger, clock: Clock, tmp_path: Path
) -> None:
    shop, thief = Shop.enrol(ledger), Shop.enrol(ledger)
    ledger.admit(shop.enrolment.certificate)
    with sqlite3.connect(ledger.home / "ledger.db") as books:
        books.execute("VACUUM INTO ?", (str(tmp_path / "backup"),))
    books.close()
    renewed = ledger.certify(CertificateRequest.make(shop.enrolment.gateway_id, shop.key, shop.tls_key))
    ledger.admit(renewed)
    ledger.act_on_gateway(thief.enrolment.gateway_id, Action.REVOKE, by="Lin", reason="stolen")
    ledger.close()
    for path in ledger.home.glob("ledger.db*"):
        path.unlink()
    shutil.copy(tmp_path / "backup", ledger.home / "ledger.db")
    (ledger.home / "keys" / "revoked" / "gw-other.json").write_text("{")
    Ledger.restored(ledger.home, clock=clock)
    with Ledger.open(ledger.home, clock=clock) as restored:
        with pytest.raises(AuthenticationFailed, match="revoked by the issuer"):
            restored.admit(thief.enrolment.certificate)
        [action] = restored.gateway_actions(thief.enrolment.gateway_id)
        assert (action.by, action.reason) == ("Lin", "stolen")
        with pytest.raises(CertificateLapsed, match="does not know of it"):
            restored.admit(renewed)
        again = CertificateRequest.make(shop.enrolment.gateway_id, shop.key, shop.tls_key)
        assert restored.admit(restored.certify(again)).id == shop.enrolment.gateway_id


def test_a_stolen_authority_s_key_lets_nobody_in(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even under a serial number that the books know."""
    shop, other = Shop.enrol(ledger), Shop.enrol(ledger)
    serial = x509.load_der_x509_certificate(shop.enrolment.certificate).serial_number
    monkeypatch.setattr(x509, "random_serial_number", lambda: serial)
    for gateway_id, key in (
        (shop.enrolment.gateway_id, ec.generate_private_key(ec.SECP256R1())),
        (other.enrolment.gateway_id, shop.tls_key),
    ):
        forged = ledger.keys.authority.certify_gateway(
            gateway_id, key.public_key(), datetime.now(UTC), timedelta(days=30)
        )
        with pytest.raises(AuthenticationFailed, match="does not know of it"):
            ledger.admit(forged.public_bytes(Encoding.DER))
    assert ledger.admit(shop.enrolment.certificate).id == shop.enrolment.gateway_id


async def test_another_gateway_s_certificate_is_refused(ledger: Ledger, url: str) -> None:
    shop, other = Shop.enrol(ledger), Shop.enrol(ledger)
    for status, answer in (
        await ask(url, other.context(), "/v1/presentments", shop=shop),
        await ask(url, other.context(), standing(shop)),
    ):
        assert (status, "another gateway's" in answer["error"]["reason"]) == (401, True)


async def test_the_server_s_certificate_lets_nobody_in(ledger: Ledger, url: str) -> None:
    shop = Shop.enrol(ledger)
    tls = context(authority_of(ledger))
    tls.load_cert_chain(ledger.keys.tls)
    with pytest.raises((aiohttp.ClientError, OSError)):
        await ask(url, tls, standing(shop))


async def test_an_expired_certificate_is_refused_with_what_to_do(
    ledger: Ledger, url: str, clock: Clock
) -> None:
    shop = Shop.enrol(ledger)
    clock.now_s += 30 * DAY_S
    assert (await ask(url, shop.context(), standing(shop)))[0] == 200
    clock.now_s += 1
    status, answer = await ask(url, shop.context(), "/v1/presentments", shop=shop)
    assert (status, answer["error"]["code"]) == (401, "certificate_lapsed")
    assert "by itself" in answer["error"]["advice"]
    # A ledger whose clock was set back lets it in again: it is the ledger's clock that counts.
    clock.now_s -= 10 * 366 * DAY_S
    assert (await ask(url, shop.context(), standing(shop)))[0] == 200


async def test_a_revoked_gateway_is_refused_at_once_at_every_replica(ledger: Ledger, clock: Clock) -> None:
    shop, other = Shop.enrol(ledger), Shop.enrol(ledger)
    with Ledger.open(ledger.home, clock=clock) as replica:
        async with serving(ledger) as one, serving(replica) as two:
            async with aiohttp.ClientSession() as session:
                # On connections that stand, too.
                tls = shop.context()
                for url in (one, two):
                    async with session.get(url + standing(shop), ssl=tls) as answer:
                        assert answer.status == 200
                ledger.act_on_gateway(
                    shop.enrolment.gateway_id, Action.REVOKE, by="Lin", reason="stolen from the counter"
                )
                for url in (one, two):
                    async with session.get(url + standing(shop), ssl=tls) as answer:
                        assert answer.status == 401
                        reason = (await answer.json())["error"]["reason"]
                        assert reason == "gateway: this gateway was revoked by the issuer"
            for url in (one, two):
                assert (await ask(url, shop.context(), "/v1/presentments", shop=shop))[0] == 401
                key = ec.generate_private_key(ec.SECP256R1())
                again = CertificateRequest.make(shop.enrolment.gateway_id, shop.key, key)
                bare = context(authority_of(ledger))
                status, _ = await ask(url, bare, "/v1/certificates", again.model_dump_json().encode())
                assert status == 401
                assert (await ask(url, other.context(), standing(other)))[0] == 200


def test_who_decided_and_why_is_on_record(ledger: Ledger, clock: Clock) -> None:
    shop = Shop.enrol(ledger)
    gateway_id = shop.enrolment.gateway_id
    assert ledger.gateway_actions(gateway_id) == ()
    for action, status in (
        (Action.SUSPEND, GatewayStatus.SUSPENDED),
        (Action.REINSTATE, GatewayStatus.ACTIVE),
        (Action.SUSPEND, GatewayStatus.SUSPENDED),
        (Action.REVOKE, GatewayStatus.REVOKED),
    ):
        clock.now_s += 60
        gateway = ledger.act_on_gateway(gateway_id, action, by="Lin", reason=f"because {action.value}")
        assert (gateway.status, gateway.status_since_unix_ms) == (status, ledger.now_unix_ms())
    history = ledger.gateway_actions(gateway_id)
    assert [(a.action.value, a.by, a.reason) for a in history] == [
        ("suspend", "Lin", "because suspend"),
        ("reinstate", "Lin", "because reinstate"),
        ("suspend", "Lin", "because suspend"),
        ("revoke", "Lin", "because revoke"),
    ]
    assert history[-1].at_unix_ms == ledger.now_unix_ms()
    assert ledger.gateway(gateway_id).certificate_until_unix_ms is None
    for action in Action:
        with pytest.raises(Conflict, match=r"for good.*invite"):
            ledger.act_on_gateway(gateway_id, action, by="Lin", reason="x")
    with pytest.raises(NotFound, match="gw-x"):
        ledger.act_on_gateway("gw-x", Action.REVOKE, by="Lin", reason="x")
    other = Shop.enrol(ledger).enrolment.gateway_id
    for by, reason in (("", "x"), ("Lin", " "), ("Lin", "x" * 201), ("L" * 65, "x"), ("Lin", "a\nb")):
        with pytest.raises(InvalidInput):
            ledger.act_on_gateway(other, Action.SUSPEND, by=by, reason=reason)
    assert ledger.gateway(other).status is GatewayStatus.ACTIVE


def other_keys() -> list[Any]:
    return [
        ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(65537, 2048),
        Ed25519PrivateKey.generate(),
    ]


def request_by(key: Any) -> bytes:
    algorithm = None if isinstance(key, Ed25519PrivateKey) else hashes.SHA256()
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, algorithm).public_bytes(Encoding.DER)


def bad_requests() -> list[tuple[bytes, str]]:
    good = make_request(ec.generate_private_key(ec.SECP256R1()))
    found = [(request_by(key), "P-256") for key in other_keys()]
    found += [(b"", "PKCS"), (b"rubbish", "PKCS"), (good[:-1], "PKCS"), (good + b"\0" * 2000, "bytes")]
    unsigned = good[:-1] + bytes([good[-1] ^ 1])
    return [*found, (unsigned, "own key")]


async def test_a_bad_request_gets_a_clear_no_and_uses_no_code_up(ledger: Ledger, url: str) -> None:
    bare = context(authority_of(ledger))
    code, device = ledger.invite(MERCHANT), Ed25519PrivateKey.generate()
    shop = Shop.enrol(ledger)
    for number, (request, says) in enumerate(bad_requests()):
        for made in (
            _signed(EnrolmentRequest.make(code, device), request, device, code),
            _signed(
                CertificateRequest.make(shop.enrolment.gateway_id, shop.key, shop.tls_key),
                request,
                shop.key,
                shop.enrolment.gateway_id,
            ),
        ):
            path = "/v1/enrolments" if "code" in made else "/v1/certificates"
            status, answer = await ask(url, bare, path, json.dumps(made).encode())
            if status == 429:
                continue  # ten wrong ones from one address are enough for a minute
            assert (status, says in answer["error"]["reason"]) == (400, True), (number, answer)
    for request, says in bad_requests():
        changed = {"request": request, "signature": device.sign(_to_sign(code, request))}
        bad = EnrolmentRequest.make(code, device).model_copy(update=changed)
        with pytest.raises(InvalidInput, match=says):
            ledger.enrol(bad)
    assert ledger.enrol(EnrolmentRequest.make(code, device)).gateway_id


def _to_sign(asking: str, request: bytes) -> bytes:
    return b"pos-gateway certificate request 1\0" + hashlib.sha256(asking.encode()).digest() + request


def _signed(
    shape: EnrolmentRequest | CertificateRequest, request: bytes, key: Ed25519PrivateKey, asking: str
) -> dict[str, Any]:
    """Another certificate request in it, properly signed by the device."""
    document: dict[str, Any] = json.loads(shape.model_dump_json())
    return document | {
        "request": _base64(request),
        "signature": _base64(key.sign(_to_sign(asking, request))),
    }


async def test_a_renewal_is_asked_for_by_the_gateway_s_own_key_alone(ledger: Ledger, url: str) -> None:
    shop, thief = Shop.enrol(ledger), Shop.enrol(ledger)
    tls_key = ec.generate_private_key(ec.SECP256R1())
    for request in (
        CertificateRequest.make(shop.enrolment.gateway_id, thief.key, tls_key),
        CertificateRequest.make("gw-nobody", thief.key, tls_key),
        CertificateRequest.make(shop.enrolment.gateway_id, shop.key, tls_key).model_copy(
            update={"gateway_id": thief.enrolment.gateway_id}
        ),
    ):
        # Not even over the victim's own line.
        status, answer = await ask(
            url, shop.context(), "/v1/certificates", request.model_dump_json().encode()
        )
        assert (status, answer["error"]["code"]) == (401, "not_authenticated")


def test_a_code_used_by_one_gateway_is_no_code_for_another(ledger: Ledger, clock: Clock) -> None:
    code, device = ledger.invite(MERCHANT), Ed25519PrivateKey.generate()
    first: Enrolment = ledger.enrol(EnrolmentRequest.make(code, device))
    with pytest.raises(AuthenticationFailed, match="used already"):
        ledger.enrol(EnrolmentRequest.make(code, Ed25519PrivateKey.generate()))
    again = ledger.enrol(EnrolmentRequest.make(code, device))
    assert (again.gateway_id, again.terminal_id) == (first.gateway_id, first.terminal_id)
    assert again.certificate != first.certificate
    # A day later the code is nothing any more, and for a revoked gateway at once.
    clock.now_s += 86_400
    with pytest.raises(AuthenticationFailed, match="used already"):
        ledger.enrol(EnrolmentRequest.make(code, device))


def test_a_revoked_gateway_does_not_enrol_again_by_its_code(ledger: Ledger) -> None:
    code, device = ledger.invite(MERCHANT), Ed25519PrivateKey.generate()
    gateway_id = ledger.enrol(EnrolmentRequest.make(code, device)).gateway_id
    ledger.act_on_gateway(gateway_id, Action.REVOKE, by="Lin", reason="x")
    with pytest.raises(AuthenticationFailed, match="revoked"):
        ledger.enrol(EnrolmentRequest.make(code, device))


def test_a_certificate_s_first_use_ends_those_before_it(ledger: Ledger) -> None:
    shop = Shop.enrol(ledger)
    made = [shop.enrolment.certificate]
    for _ in range(3):
        request = CertificateRequest.make(shop.enrolment.gateway_id, shop.key, shop.tls_key)
        made.append(ledger.certify(request))
    for certificate in (made[0], made[2], made[2]):
        assert ledger.admit(certificate).id == shop.enrolment.gateway_id
    for certificate in made[:2]:
        with pytest.raises(CertificateLapsed, match="newer one"):
            ledger.admit(certificate)
    ledger.admit(made[2])


@pytest.mark.parametrize("dialect", ["sqlite"])
async def test_tls_before_1_3_and_a_client_that_trusts_another_are_not_spoken_to(
    ledger: Ledger, url: str
) -> None:
    old = context(authority_of(ledger))
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(aiohttp.ClientError):
        await ask(url, old, "/v1/health")
    stranger = Authority.create(ec.generate_private_key(ec.SECP256R1()), "X", datetime.now(UTC))
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await ask(url, context(stranger.certificate.public_bytes(Encoding.DER)), "/v1/health")
