"""On the shop's network: TLS only, with a certificate of the shop's or one made here."""

from __future__ import annotations

import asyncio
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from pos_gateway.errors import InvalidConfiguration
from pos_gateway.gateway.access import is_loopback
from pos_gateway.gateway.config import Home, load_settings
from pos_gateway.gateway.page_tls import client_context, self_signed, server_context
from pos_gateway.gateway.program import page_certificate
from pos_gateway.gateway.staff import Attempts, Role, Staff, machine_token
from pos_gateway.lab.counter import open_counter


def test_only_a_loopback_address_goes_without_tls(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.create()
    for host, tls in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True), ("192.168.1.7", True)):  # noqa: S104
        home.overrides.write_text(f'[http]\nhost = "{host}"\n')
        certificate = page_certificate(home, load_settings(home))
        assert certificate == (home.http_certificate if tls else None)
        assert is_loopback(host) is not tls
    own = tmp_path / "shop.pem"
    home.overrides.write_text(f'[http]\ncertificate = "{own}"\n')
    assert page_certificate(home, load_settings(home)) == own


def test_the_made_certificate_is_kept_until_it_runs_out_or_the_name_changes(tmp_path: Path) -> None:
    path = tmp_path / "page.pem"
    first = self_signed(path, ("127.0.0.1", "till.local"))
    assert path.stat().st_mode & 0o077 == 0
    assert self_signed(path, ("127.0.0.1",)) == first
    assert self_signed(path, ("127.0.0.1", "other.local")) != first
    second = x509.load_pem_x509_certificate(path.read_bytes())
    later = datetime.now(UTC) + timedelta(days=800)
    assert self_signed(path, ("127.0.0.1",), later) != second.fingerprint(hashes.SHA256()).hex()


def test_a_file_that_is_no_certificate_is_told(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("nothing")
    with pytest.raises(InvalidConfiguration, match="certificate"):
        server_context(wrong)


async def test_the_page_over_tls_has_secure_cookies_and_no_other_certificate_is_trusted(
    tmp_path: Path, ledger_home: Path
) -> None:
    shutil.copytree(ledger_home, tmp_path / "ledger")
    path = tmp_path / "page.pem"
    self_signed(path, ("127.0.0.1",))
    async with open_counter(tmp_path, tls=server_context(path)) as till:
        staff = till.parts.door.staff
        member = await asyncio.to_thread(staff.add, "Lin", Role.OWNER, "730925")
        body = {"member": member.id, "pin": "730925"}
        trusting = aiohttp.TCPConnector(ssl=client_context(path))
        async with aiohttp.ClientSession(connector=trusting) as session:
            async with session.post(f"{till.address}/v1/session", json=body) as response:
                assert "Secure" in response.headers["Set-Cookie"]
                assert "max-age" in response.headers["Strict-Transport-Security"]
            # Reached by address over the network: an address cannot be rebound, a name can.
            async with session.get(
                till.address + "/sign-in", headers={"Host": "192.168.1.7:8155"}
            ) as response:
                assert response.status == 200
            async with session.get(till.address + "/sign-in", headers={"Host": "evil.example"}) as response:
                assert response.status == 421
        other = tmp_path / "other.pem"
        self_signed(other, ("127.0.0.1",))
        strict = aiohttp.TCPConnector(ssl=client_context(other))
        async with aiohttp.ClientSession(connector=strict) as session:
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await session.get(till.address + "/sign-in")


def test_the_machines_token_is_made_once_and_for_the_gateways_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "api-token"
    token = machine_token(path)
    assert len(token) > 40
    assert path.stat().st_mode & 0o077 == 0
    assert machine_token(path) == token


def test_locks_get_longer_and_survive_a_restart_and_a_clock_set_back(tmp_path: Path) -> None:
    now = 1_764_000_000_000
    attempts, locks = Attempts(), []
    for _ in range(16):
        attempts = attempts.after_one_more(now)
        locks.append(max(0, attempts.locked_until_unix_ms - now) // 1000)
    assert locks[:4] == [0, 0, 0, 0]
    assert locks[4:7] == [30, 60, 120]
    assert locks[-1] == 3600
    staff = Staff(tmp_path / "staff.json", tmp_path / "code", lambda: now)
    member = staff.add("Mei", Role.CASHIER, "2846")
    for _ in range(5):
        with pytest.raises(Exception, match="go together"):
            staff.check_pin(member.id, "9999")
    again = Staff(tmp_path / "staff.json", tmp_path / "code", lambda: now - 10**12)
    with pytest.raises(Exception, match="wait 3600 s"):
        again.check_pin(member.id, "2846")
    later = Staff(tmp_path / "staff.json", tmp_path / "code", lambda: now + 31_000)
    assert later.check_pin(member.id, "2846").name == "Mei"
    assert "2846" not in (tmp_path / "staff.json").read_text()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"members": 1}', '{"members": [{"id": 1}], "tokens": [], "setup": {}}']
)
def test_a_broken_register_stops_the_gateway_and_is_never_taken_for_an_empty_one(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "staff.json").write_text(text)
    with pytest.raises(InvalidConfiguration):
        Staff(tmp_path / "staff.json", tmp_path / "code", lambda: 0)
