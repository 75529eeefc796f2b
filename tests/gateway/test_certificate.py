"""A gateway's certificate through its life, against the real ledger over real TLS: it is renewed by itself,
whatever breaks on the way, and comes back after it has expired."""

from __future__ import annotations

import asyncio
import base64
import os
import random
import shutil
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from pos_gateway.enrolment import CertificateRequest, EnrolmentRequest
from pos_gateway.errors import (
    AuthenticationFailed,
    CertificateLapsed,
    InvalidConfiguration,
    InvalidMessage,
    LedgerUnreachable,
    OutcomeUnknown,
    PosGatewayError,
)
from pos_gateway.gateway.certificate import (
    CertificateKeeper,
    TlsFile,
    check_certificate,
    connect,
    describe,
    due_at,
)
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.enrolling import enroll
from pos_gateway.gateway.fetcher import authority_context
from pos_gateway.gateway.identity import load_enrolment, load_identity
from pos_gateway.gateway.ledger_client import LedgerClient, fetch_authority
from pos_gateway.ledger import Ledger
from pos_gateway.ledger.authority import Authority
from pos_gateway.ledger.gateways import Action
from pos_gateway.records import Verdict
from pos_gateway.signers import ed25519_key, p256_key
from tests.gateway.journalling import open_journal, sale
from tests.gateway.ledger_stub import LedgerStub
from tests.gateway.test_with_ledger import MERCHANT, serving

DAY_S = 86_400


class Clock:
    """The ledger's clock and the shop's, which a test sets apart."""

    def __init__(self) -> None:
        self.ledger_s = time.time()
        self.shop_s = self.ledger_s

    def pass_days(self, days: float) -> None:
        self.ledger_s += days * DAY_S
        self.shop_s += days * DAY_S

    def ledger(self) -> float:
        return self.ledger_s

    def shop_unix_ms(self) -> int:
        return int(self.shop_s * 1000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def issuer(tmp_path: Path, ledger_home: Path, clock: Clock) -> Iterator[Ledger]:
    shutil.copytree(ledger_home, tmp_path / "ledger")
    with Ledger.open(tmp_path / "ledger", clock=clock.ledger) as opened:
        yield opened


@dataclass
class Shop:
    """An enrolled gateway: its files, and its line to the ledger."""

    home: Home
    url: str
    client: LedgerClient
    keeper: CertificateKeeper
    clock: Clock

    @property
    def id(self) -> str:
        return load_enrolment(self.home.enrolment).enrolment.gateway_id

    def restarted(self) -> Shop:
        """With what is on the disk now."""
        return open_shop(self.home, self.url, self.clock)

    async def let_in(self) -> str:
        return await self.client.standing(self.id)


def open_shop(home: Home, url: str, clock: Clock) -> Shop:
    enrolment = load_enrolment(home.enrolment).enrolment
    client = connect(home)
    keeper = CertificateKeeper(
        client,
        TlsFile(home.credentials),
        gateway_id=enrolment.gateway_id,
        device_key=load_identity(home.identity_key),
        authority=enrolment.authority,
        clock=clock.shop_unix_ms,
        rng=random.Random(1),
    )
    return Shop(home, url, client, keeper, clock)


@pytest.fixture
async def shop(issuer: Ledger, tmp_path: Path, clock: Clock) -> AsyncIterator[Shop]:
    async with serving(issuer) as url:
        home = Home(tmp_path / "gateway")
        await enroll(home, url, issuer.invite(MERCHANT))
        shop = open_shop(home, url, clock)
        yield shop
        await shop.client.close()


def serial(home: Home) -> int:
    certificate = TlsFile(home.credentials).certificate
    assert certificate is not None
    return certificate.serial_number


async def test_what_is_secret_only_its_owner_can_read(shop: Shop, issuer: Ledger) -> None:
    for path in (shop.home.credentials, shop.home.identity_key, shop.home.enrolment):
        assert path.stat().st_mode & 0o777 == 0o600, path
    for path in (issuer.home / "keys").rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o077 == 0, path
    issuer.renew_tls(now=True)
    await shop.keeper.renew()
    for path in (shop.home.credentials, issuer.home / "keys" / "tls.pem"):
        assert path.stat().st_mode & 0o777 == 0o600, path
    shop.home.credentials.chmod(0o640)
    with pytest.raises(InvalidConfiguration, match=r"mode 0640.*chmod 600"):
        connect(shop.home)
    assert "chmod 600" in shop.keeper.state().sentence


async def test_a_renewed_certificate_takes_the_old_one_s_place(shop: Shop, tmp_path: Path) -> None:
    assert await shop.let_in() == "active"
    first = serial(shop.home)
    old = Home(tmp_path / "old")
    shutil.copytree(shop.home.path, old.path)
    await shop.keeper.renew()
    assert serial(shop.home) != first
    assert await shop.let_in() == "active"
    async with connect(old) as client:
        with pytest.raises(CertificateLapsed, match="newer one"):
            await client.standing(shop.id)
        assert client.lapsed.is_set()
    assert {path.name for path in shop.home.path.iterdir()} == {
        "identity.key",
        "enrolment.json",
        "tls.pem",
        "snapshots",
    }


async def test_the_old_certificate_works_until_the_new_one_was_used(shop: Shop, issuer: Ledger) -> None:
    assert await shop.let_in() == "active"
    device_key = load_identity(shop.home.identity_key)
    for _ in range(3):
        # Asked for, and the answers lost.
        key = ec.generate_private_key(ec.SECP256R1())
        await shop.client.certify(CertificateRequest.make(shop.id, device_key, key))
    assert await shop.let_in() == "active"
    [gateway] = issuer.gateways()
    assert gateway.certificate_until_unix_ms is not None


class Crash(Exception):
    """The power fails here."""


@pytest.mark.parametrize("step", range(8))
async def test_a_crash_at_each_step_of_a_renewal_leaves_a_certificate_that_works(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Every call that asks the ledger or changes the disk, in the order they come: the process ends before
    it, and a new one goes on from what the disk holds."""
    assert await shop.let_in() == "active"
    steps = iter(range(100))

    def crashing(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if next(steps) == step:
                raise Crash
            return call(*arguments, **options)

        return counted

    with monkeypatch.context() as patches:
        patches.setattr(shop.client, "certify", crashing(shop.client.certify))
        patches.setattr(os, "open", crashing(os.open))
        patches.setattr(os, "fsync", crashing(os.fsync))
        patches.setattr(Path, "rename", crashing(Path.rename))
        patches.setattr(shop.client, "reload", crashing(shop.client.reload))
        patches.setattr(shop.client, "standing", crashing(shop.client.standing))
        with pytest.raises(Crash):
            await shop.keeper.renew()
    again = shop.restarted()
    try:
        assert await again.let_in() == "active"
        await again.keeper.renew()
        assert await again.let_in() == "active"
    finally:
        await again.client.close()


async def test_the_steps_of_a_renewal_are_all_there(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above goes through: one more would be missed."""
    seen: list[str] = []

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            return call(*arguments, **options)

        return noted

    with monkeypatch.context() as patches:
        patches.setattr(shop.client, "certify", noting("certify", shop.client.certify))
        patches.setattr(os, "open", noting("open", os.open))
        patches.setattr(os, "fsync", noting("fsync", os.fsync))
        patches.setattr(Path, "rename", noting("rename", Path.rename))
        patches.setattr(shop.client, "reload", noting("reload", shop.client.reload))
        patches.setattr(shop.client, "standing", noting("standing", shop.client.standing))
        await shop.keeper.renew()
    assert seen == ["certify", "open", "fsync", "rename", "open", "fsync", "reload", "standing"]


async def test_a_full_disk_leaves_the_old_certificate(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    first = serial(shop.home)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patches:
        patches.setattr(os, "fsync", full)
        with pytest.raises(OutcomeUnknown, match="No space left"):
            await shop.keeper.renew()
    assert serial(shop.home) == first
    assert await shop.let_in() == "active"


async def test_an_expired_certificate_comes_back_by_the_device_key(
    shop: Shop, issuer: Ledger, clock: Clock
) -> None:
    clock.pass_days(31)
    with pytest.raises(CertificateLapsed, match="expired"):
        await shop.let_in()
    assert "expired on" in shop.keeper.state().sentence
    await shop.keeper.renew()
    assert await shop.let_in() == "active"
    assert shop.keeper.state().well

    clock.pass_days(30 + 90 + 1)
    with pytest.raises(AuthenticationFailed, match="too long ago"):
        await shop.keeper.renew()
    # The season begins: the issuer lets the kiosk in again.
    issuer.act_on_gateway(shop.id, Action.REINSTATE, by="Lin", reason="summer")
    await shop.keeper.renew()
    assert await shop.let_in() == "active"


async def test_a_revoked_gateway_does_not_come_back(shop: Shop, issuer: Ledger, clock: Clock) -> None:
    assert await shop.let_in() == "active"
    issuer.act_on_gateway(shop.id, Action.REVOKE, by="Lin", reason="stolen")
    for days in (0, 31):
        clock.pass_days(days)
        with pytest.raises(AuthenticationFailed, match="revoked by the issuer"):
            await shop.let_in()
        with pytest.raises(AuthenticationFailed, match="revoked by the issuer"):
            await shop.keeper.renew()


async def test_a_suspended_gateway_renews_and_still_presents(
    shop: Shop, issuer: Ledger, tmp_path: Path
) -> None:
    """What it presents is held for review (tests/ledger/test_settling.py), not left waiting on its disk."""
    key = load_identity(shop.home.identity_key)
    issuer.act_on_gateway(shop.id, Action.SUSPEND, by="Lin", reason="odd sales")
    with open_journal(tmp_path / "journal.sqlite3") as journal:
        journal.append_all([sale(1)])
        records = journal.records(0)
    assert await shop.let_in() == "suspended"
    await shop.keeper.renew()
    [answer] = await shop.client.present(shop.id, records, key)
    assert answer.verdict is Verdict.INVALID  # another test's key signed it


async def test_the_keeper_renews_in_time_and_when_the_ledger_says_so(
    shop: Shop, clock: Clock, tmp_path: Path
) -> None:
    assert await shop.let_in() == "active"
    first = serial(shop.home)
    keeping = asyncio.create_task(shop.keeper.run())

    async def renewed(since: int) -> None:
        while serial(shop.home) == since:
            await asyncio.sleep(0.01)

    try:
        await asyncio.sleep(0.1)
        assert serial(shop.home) == first, "there is no need yet"
        # The shop's clock stands still; the ledger's does not.
        clock.ledger_s += 31 * DAY_S
        with pytest.raises(CertificateLapsed):
            await shop.let_in()
        await asyncio.wait_for(renewed(first), 20)
        assert await shop.let_in() == "active"
    finally:
        keeping.cancel()
    second = serial(shop.home)
    clock.shop_s = clock.ledger_s + 21 * DAY_S
    clock.ledger_s = clock.shop_s
    keeping = asyncio.create_task(shop.keeper.run())
    try:
        await asyncio.wait_for(renewed(second), 20)
        assert await shop.let_in() == "active"
    finally:
        keeping.cancel()


async def test_a_wrong_clock_in_the_shop_keeps_nobody_out(shop: Shop, clock: Clock) -> None:
    assert await shop.let_in() == "active"
    clock.shop_s += 10 * 366 * DAY_S
    first = serial(shop.home)
    keeping = asyncio.create_task(shop.keeper.run())
    try:
        while serial(shop.home) == first:
            await asyncio.sleep(0.01)
        second = serial(shop.home)
        await asyncio.sleep(0.3)
        assert serial(shop.home) == second, "it does not ask again and again"
        clock.shop_s = 0
        assert await shop.let_in() == "active"
    finally:
        keeping.cancel()


async def test_many_renewals_in_a_day_are_too_many(shop: Shop, clock: Clock) -> None:
    for _ in range(23):
        await shop.keeper.renew()
    with pytest.raises(LedgerUnreachable, match="too many certificates"):
        await shop.keeper.renew()
    assert await shop.let_in() == "active"
    clock.pass_days(1.1)
    await shop.keeper.renew()


async def test_a_gateway_from_its_backup_asks_anew(shop: Shop, tmp_path: Path, clock: Clock) -> None:
    backup = Home(tmp_path / "backup")
    shutil.copytree(shop.home.path, backup.path)
    for _ in range(2):
        await shop.keeper.renew()
    restored = open_shop(backup, shop.url, clock)
    with pytest.raises(CertificateLapsed):
        await restored.let_in()
    await restored.keeper.renew()
    assert await restored.let_in() == "active"
    await restored.client.close()
    # Without the file, or with a damaged one, too.
    backup.credentials.unlink()
    restored = restored.restarted()
    with pytest.raises(AuthenticationFailed, match="none was shown"):
        await restored.let_in()
    assert not restored.keeper.state().well
    await restored.keeper.renew()
    assert await restored.let_in() == "active"
    await restored.client.close()
    backup.credentials.write_bytes(b"rubbish")
    with pytest.raises(InvalidConfiguration, match="remove the file"):
        connect(backup)


async def test_the_server_s_certificate_is_renewed_without_anybody_enrolling_again(
    issuer: Ledger, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pos_gateway.ledger.api._RELOAD_S", 0.05)
    home = Home(tmp_path / "gateway")
    async with serving(issuer) as url:
        code = issuer.invite(MERCHANT)
        await enroll(home, url, code)
        enrolled = issuer.keys.tls_certificate

        async def shown() -> bytes:
            authority = load_enrolment(home.enrolment).enrolment.authority
            host, port = url.removeprefix("https://").split(":")
            _, writer = await asyncio.open_connection(host, int(port), ssl=authority_context(authority))
            der: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.close()
            return der

        assert await shown() == enrolled.public_bytes(Encoding.DER)
        assert issuer.renew_tls() is False
        clock.pass_days(300)
        while issuer.keys.tls_certificate == enrolled:
            await asyncio.sleep(0.02)
        renewed = issuer.keys.tls_certificate.public_bytes(Encoding.DER)
        while await shown() != renewed:
            await asyncio.sleep(0.02)
        # Enrolled before, and by a code given out before: both as if nothing had been.
        shop = open_shop(home, url, clock)
        issuer.act_on_gateway(shop.id, Action.REINSTATE, by="Lin", reason="away for 300 days")
        await shop.keeper.renew()
        assert await shop.let_in() == "active"
        await shop.client.close()
        assert [path.name for path in (issuer.home / "keys").iterdir() if path.name.startswith(".")] == []


def test_a_renewal_of_the_server_s_certificate_that_is_killed_leaves_the_old_one(
    issuer: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = issuer.keys.tls_certificate

    def crash(*_: object) -> None:
        raise Crash

    for target, name in ((os, "open"), (os, "fsync"), (Path, "rename")):
        with monkeypatch.context() as patches:
            patches.setattr(target, name, crash)
            with pytest.raises(Crash):
                issuer.renew_tls(now=True)
        assert issuer.keys.tls_certificate == before
    assert issuer.renew_tls(now=True)
    assert issuer.keys.tls_certificate != before


def test_a_ledger_from_before_becomes_an_authority_when_it_is_migrated(
    issuer: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, keys = issuer.home, issuer.home / "keys"
    issuer.close()
    Ledger.migrate(home, "0002")
    for name in ("authority.pem", "authority.crt"):
        (keys / name).unlink()
    with pytest.raises(InvalidConfiguration):
        Ledger.open(home)

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patches:
        patches.setattr(Path, "rename", crash)
        with pytest.raises(Crash):
            Ledger.migrate(home)
    Ledger.migrate(home)
    with Ledger.open(home) as ledger:
        ledger.keys.tls_certificate.verify_directly_issued_by(ledger.keys.authority.certificate)
        fingerprint = ledger.keys.authority.fingerprint
    Ledger.migrate(home)
    with Ledger.open(home) as ledger:
        assert ledger.keys.authority.fingerprint == fingerprint


async def test_an_enrolment_whose_answer_was_lost_is_made_again(
    issuer: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / "gateway")
    code = issuer.invite(MERCHANT)

    def crash(*_: object) -> None:
        raise Crash

    async with serving(issuer) as url:
        with monkeypatch.context() as patches:
            patches.setattr("pos_gateway.gateway.enrolling.keep_enrolment", crash)
            with pytest.raises(Crash):
                await enroll(home, url, code)
        with monkeypatch.context() as patches:
            patches.setattr("pos_gateway.gateway.enrolling.store_enrolment", crash)
            with pytest.raises(Crash):
                await enroll(home, url, code)
        assert not home.enrolment.exists()
        enrolment = await enroll(home, url, code)
        assert [gateway.id for gateway in issuer.gateways()] == [enrolment.gateway_id]
        async with connect(home) as client:
            assert await client.standing(enrolment.gateway_id) == "active"
        # Somebody who has seen the code, and even the gateway's public key, gets nothing by it.
        with pytest.raises(AuthenticationFailed, match="used already"):
            await enroll(Home(tmp_path / "thief"), url, code)
        stolen = EnrolmentRequest.make(code, Ed25519PrivateKey.generate()).model_copy(
            update={"public_key": load_identity(home.identity_key).public_key().public_bytes_raw()}
        )
        async with LedgerClient(url, enrolment.authority) as client:
            with pytest.raises(AuthenticationFailed, match="device signature"):
                await client.enrol(stolen)


async def test_a_code_reaches_no_other_ledger_than_its_own(issuer: Ledger, tmp_path: Path) -> None:
    """The code is a secret: nobody but the ledger that gave it out is told it."""
    home = Home(tmp_path / "gateway")
    code = issuer.invite(MERCHANT)
    stub = LedgerStub()
    (tmp_path / "stub").mkdir()
    asked: list[str] = []

    async def lie(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        assert await request.read() == b""
        return web.Response(body=answers.pop(0))

    stub.on_other = lie
    async with stub.serving(tmp_path / "stub"), serving(issuer) as url:
        genuine = await fetch_authority(url, issuer.keys.authority.fingerprint)
        answers = [stub.authority, b"", b"x" * 2_000_000, genuine]
        for error in (LedgerUnreachable, LedgerUnreachable, InvalidMessage):
            with pytest.raises(error, match=r"not the ledger that gave out this code|over"):
                await enroll(home, stub.url, code)
        # It hands on the genuine certificate, but it has no key for it.
        with pytest.raises(LedgerUnreachable, match="not the ledger"):
            await enroll(home, stub.url, code)
        assert set(asked) == {"/v1/authority"}
        assert not home.enrolment.exists()


async def test_a_gateway_cannot_pass_for_the_ledger(shop: Shop, tmp_path: Path) -> None:
    """Its certificate is of the same authority, but good for clients alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(shop.home.credentials)
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    async with server, connect(shop.home, f"https://127.0.0.1:{port}") as client:
        with pytest.raises(LedgerUnreachable, match="not the ledger this gateway enrolled with"):
            await client.standing(shop.id)


async def test_answers_that_are_no_certificate_of_ours_are_not_kept(
    shop: Shop, issuer: Ledger, ledger_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrolment = load_enrolment(shop.home.enrolment).enrolment
    key = ec.generate_private_key(ec.SECP256R1())
    now, life = datetime.now(UTC), timedelta(days=1)

    def made(authority: Authority, gateway_id: str, public: ec.EllipticCurvePublicKey) -> bytes:
        return authority.certify_gateway(gateway_id, public, now, life).public_bytes(Encoding.DER)

    ours = issuer.keys.authority
    other = Authority.create(ec.generate_private_key(ec.SECP256R1()), "Harbour Credit", now)
    stranger = ec.generate_private_key(ec.SECP256R1()).public_key()

    def check(der: bytes) -> None:
        check_certificate(
            der, key=key.public_key(), gateway_id=enrolment.gateway_id, authority=enrolment.authority
        )

    check(made(ours, enrolment.gateway_id, key.public_key()))
    wrong: list[tuple[bytes, type[PosGatewayError]]] = [
        (b"", InvalidMessage),
        (b"rubbish", InvalidMessage),
        (made(ours, "gw-other", key.public_key()), InvalidMessage),
        (made(ours, enrolment.gateway_id, stranger), InvalidMessage),
        (made(other, enrolment.gateway_id, key.public_key()), AuthenticationFailed),
    ]
    for der, error in wrong:
        with pytest.raises(error):
            check(der)
    first = serial(shop.home)

    async def lie(_: object) -> bytes:
        return made(other, enrolment.gateway_id, stranger)

    monkeypatch.setattr(shop.client, "certify", lie)
    with pytest.raises(PosGatewayError):
        await shop.keeper.renew()
    assert serial(shop.home) == first


def test_what_is_told_about_a_certificate(issuer: Ledger) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    now = datetime(2026, 11, 24, 12, tzinfo=UTC)
    certificate = issuer.keys.authority.certify_gateway("gw-1", key, now, timedelta(days=30))
    due = due_at(certificate)
    assert abs(due - (now + timedelta(days=20))) < timedelta(hours=1)
    fresh = describe(certificate, now)
    assert (fresh.well, fresh.sentence) == (
        True,
        "valid until 2026-12-24; replaced by itself from 2026-12-14 on",
    )
    ageing = describe(certificate, due + timedelta(hours=1))
    assert (ageing.well, "when the ledger is reached" in ageing.sentence) == (True, True)
    over = describe(certificate, now + timedelta(days=31))
    assert (over.well, "expired on 2026-12-24" in over.sentence) == (False, True)
    assert not describe(None, now).well
    told = describe(certificate, now, "this gateway was revoked")
    assert (told.well, "revoked" in told.sentence) == (False, True)


class Token:
    """What a hardware token has to offer."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key()

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data, ec.ECDSA(hashes.SHA256()))


class DeviceToken:
    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key: Ed25519PublicKey = key.public_key()

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data)


async def test_keys_in_tokens_do_all_that_keys_in_files_do(
    shop: Shop, issuer: Ledger, tmp_path: Path
) -> None:
    device = ed25519_key(DeviceToken(load_identity(shop.home.identity_key)))
    tls = p256_key(Token(ec.generate_private_key(ec.SECP256R1())))
    der = await shop.client.certify(CertificateRequest.make(shop.id, device, tls))
    authority = load_enrolment(shop.home.enrolment).enrolment.authority
    check_certificate(der, key=tls.public_key(), gateway_id=shop.id, authority=authority)
    # The authority's own key, too.
    kept = Authority(
        issuer.keys.authority.certificate,
        p256_key(Token(issuer.keys.authority.key)),
    )
    certificate = kept.certify_gateway(shop.id, tls.public_key(), datetime.now(UTC), timedelta(days=1))
    certificate.verify_directly_issued_by(issuer.keys.authority.certificate)
    # A journal signed in the token, presented in a batch signed in the token.
    with open_journal(tmp_path / "journal.sqlite3") as journal:
        journal.append_all([sale(1)])
        [answer] = await shop.client.present(shop.id, journal.records(0), device)
        assert answer.verdict is Verdict.INVALID
    for key in (device, tls):
        with pytest.raises(UnsupportedAlgorithm):
            key.private_bytes()  # type: ignore[call-arg]
    with pytest.raises(UnsupportedAlgorithm):
        tls.sign(b"", ec.ECDSA(hashes.SHA512()))


def test_a_request_is_bound_to_who_asks() -> None:
    device, tls = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
    request = CertificateRequest.make("gw-1", device, tls)
    request.verify(device.public_key())
    for changed in (
        {"gateway_id": "gw-2"},
        {"request": CertificateRequest.make("gw-1", device, tls).request + b"x"},
        {"signature": base64.b64encode(bytes(64))},
    ):
        with pytest.raises(AuthenticationFailed, match="device signature"):
            request.model_copy(update=changed).verify(device.public_key())
