"""The gateway's side of the line against the real ledger, over real TLS."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.enrolment import Merchant
from pos_gateway.errors import AuthenticationFailed, LedgerUnreachable
from pos_gateway.gateway.certificate import connect
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.enrolling import enroll
from pos_gateway.gateway.feed import SnapshotFeed
from pos_gateway.gateway.identity import load_identity
from pos_gateway.gateway.journal import Journal
from pos_gateway.gateway.ledger_client import LedgerClient
from pos_gateway.gateway.old_journal import adopt, opened_copy
from pos_gateway.gateway.synchroniser import Synchroniser
from pos_gateway.ledger import Ledger
from pos_gateway.ledger.api import serve
from pos_gateway.records import Verdict
from tests.gateway.journalling import sale

MERCHANT = Merchant(id="CORNERSHOP", name="Corner shop", category="5411")


def now_unix_ms() -> int:
    return time.time_ns() // 1_000_000


@asynccontextmanager
async def serving(ledger: Ledger, port: int = 0) -> AsyncIterator[str]:
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(ledger, port=port, on_ready=ready.set_result))
    try:
        first: set[asyncio.Future[Any]] = {task, ready}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        assert not task.done(), task
        yield f"https://127.0.0.1:{ready.result()}"
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_enrol_fetch_limits_and_present(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger", issuer="Test Issuer") as ledger:
        account = ledger.open_account(holder="A. Customer", limit_minor=100_000)
        ledger.issue_token(account.id)
        ledger.publish()
        code = ledger.invite(MERCHANT)
        home = Home(tmp_path / "gateway")
        async with serving(ledger) as url:
            enrolment = await enroll(home, url, code)
            assert enrolment.merchant == MERCHANT
            key = load_identity(home.identity_key)
            with pytest.raises(AuthenticationFailed, match="used already"):
                await enroll(Home(tmp_path / "thief"), url, code)
            async with connect(home) as client:
                assert abs(await client.ledger_time_unix_ms() - now_unix_ms()) < 60_000

                (tmp_path / "snapshots").mkdir()
                with Journal.open(
                    tmp_path / "journal.sqlite3", gateway_key=key, gateway_id=enrolment.gateway_id
                ) as journal:
                    feed = SnapshotFeed(tmp_path / "snapshots", journal, enrolment, clock=now_unix_ms)
                    synchroniser = Synchroniser(
                        journal,
                        client,
                        feed,
                        gateway_id=enrolment.gateway_id,
                        signer=key,
                        interval_s=3600,
                        clock=now_unix_ms,
                        rng=random.Random(1),
                    )
                    # No card ever signed these: the ledger must say so, record by record.
                    journal.append_all([sale(number) for number in range(3)])
                    await synchroniser.synchronise()
                    current = feed.current()
                    assert current is not None
                    assert current.newest.count == 1
                    assert journal.exposure.count == 0
                    assert [refusal.verdict for refusal in journal.view.refused] == [Verdict.INVALID] * 3
                    assert all(refusal.reason for refusal in journal.view.refused)

                    stranger = Ed25519PrivateKey.generate()
                    with pytest.raises(AuthenticationFailed):
                        await client.present(enrolment.gateway_id, journal.records(0, 1), stranger)
            async with LedgerClient(url, enrolment.authority) as client:
                await client.ledger_time_unix_ms()
        async with connect(home) as client:
            with pytest.raises(LedgerUnreachable):
                await client.ledger_time_unix_ms()


async def test_a_dead_tills_journal_is_presented_by_another_of_the_shop(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger", issuer="Test Issuer") as ledger:
        old, new, other = (Home(tmp_path / name) for name in ("old", "new", "other"))
        async with serving(ledger) as url:
            dead = await enroll(old, url, ledger.invite(MERCHANT))
            successor = await enroll(new, url, ledger.invite(MERCHANT))
            stranger = await enroll(
                other, url, ledger.invite(Merchant(id="OTHER", name="Other", category="5411"))
            )
            key = load_identity(old.identity_key)
            with Journal.open(old.journal, gateway_key=key, gateway_id=dead.gateway_id) as journal:
                # No card signed these: what counts here is that the ledger judges each.
                journal.append_all([sale(number) for number in range(3)])
            old.identity_key.unlink()
            with opened_copy(old.path) as found:
                async with connect(new) as client:
                    counts = await adopt(found, client, successor.gateway_id, load_identity(new.identity_key))
                    assert counts == {"invalid": 3}
                async with connect(other) as client:
                    with pytest.raises(AuthenticationFailed, match="another merchant's"):
                        await adopt(found, client, stranger.gateway_id, load_identity(other.identity_key))
