"""Grants, notes and wallets against the real ledger, over real TLS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.authorization.reasons import Reason
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.enrolment import Merchant
from pos_gateway.errors import AuthenticationFailed, InvalidMessage, LedgerUnreachable
from pos_gateway.gateway.certificate import connect
from pos_gateway.gateway.config import Home, load_settings
from pos_gateway.gateway.enrolling import enroll
from pos_gateway.gateway.feed import SnapshotFeed
from pos_gateway.gateway.fetcher import FolderRepository
from pos_gateway.gateway.identity import load_identity
from pos_gateway.gateway.issuer_line import IssuerLine, LedgerLine
from pos_gateway.gateway.journal import Journal
from pos_gateway.gateway.ledger_client import LedgerClient
from pos_gateway.gateway.program import local_now, make_till
from pos_gateway.gateway.till import Approved, Declined, Outcome, Till
from pos_gateway.inquiry import Inquiry, OnlineAnswer
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.phone import Phone, WalletClient
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger import Ledger
from pos_gateway.ledger.config import Policy
from tests.gateway.test_with_ledger import now_unix_ms, serving

ONLINE_SHOP = Merchant(id="SONGS-ONLINE", name="Songs Online", category="5815")


@dataclass
class Online:
    """A merchant in the network: its gateway has no reader, its customers' phones come to it."""

    ledger: Ledger
    url: str
    till: Till
    client: LedgerClient
    key: Ed25519PrivateKey
    authority: bytes
    personalisation: Personalisation

    async def pay(self, phone: Phone, amount_minor: int) -> Outcome:
        return await asyncio.to_thread(phone.pay_in_app, self.till, amount_minor)

    def phone(self) -> Phone:
        return Phone(
            VirtualCard(self.personalisation),
            WalletClient(self.url, self.authority),
            currency_numeric=self.ledger.currency.numeric,
            country_numeric=self.ledger.identity.country_numeric,
            clock=local_now,
        )


@pytest.fixture
async def online(tmp_path: Path) -> AsyncIterator[Online]:
    with Ledger.create(tmp_path / "ledger", issuer="Test Issuer") as ledger:
        ledger.set_policy(Policy(token_share_percent=10))
        account = ledger.open_account(holder="A. Customer", limit_minor=100_000)
        token = ledger.issue_token(account.id, holder_verified_on_device=True)
        ledger.publish()
        home = Home(tmp_path / "gateway")
        async with AsyncExitStack() as stack:
            url = await stack.enter_async_context(serving(ledger))
            enrolment = await enroll(home, url, ledger.invite(ONLINE_SHOP))
            key = load_identity(home.identity_key)
            client = await stack.enter_async_context(connect(home))
            journal = stack.enter_context(
                Journal.open(home.journal, gateway_key=key, gateway_id=enrolment.gateway_id)
            )
            feed = SnapshotFeed(home.snapshots, journal, enrolment, clock=now_unix_ms)
            stack.callback(feed.close)
            await asyncio.to_thread(feed.refresh, FolderRepository(ledger.repository.folder))
            line = LedgerLine(client, key, asyncio.get_running_loop(), lambda: True)
            till = make_till(enrolment, load_settings(home), journal, feed, issuer=line)
            yield Online(ledger, url, till, client, key, enrolment.authority, token.personalisation)


async def test_a_phone_refreshes_pays_in_an_app_and_gives_back(online: Online) -> None:
    phone = online.phone()
    answer = await asyncio.to_thread(phone.refresh)
    assert answer.refused is None
    assert phone.allowance_minor > 10_000

    # Within its note nobody has to be asked; beyond it the same API as at a counter.
    first = await online.pay(phone, 20_000)
    assert isinstance(first, Approved)
    assert first.record.facts()["limit_source"] == "note"
    second = await online.pay(phone, 60_000)
    assert isinstance(second, Approved)
    assert second.record.facts()["limit_source"] == "grant"
    third = await online.pay(phone, 60_000)
    assert isinstance(third, Declined)
    assert third.decline.reason is Reason.OVER_CEILING

    answers = await online.client.present(
        online.till.station.gateway_id, [first.record, second.record], online.key
    )
    assert [answer.verdict.value for answer in answers] == ["posted", "posted"]
    account = online.ledger.accounts()[0]
    assert account.outstanding_minor == 80_000

    await asyncio.to_thread(phone.refresh)
    free, left = online.ledger.accounts()[0].free_minor, phone.allowance_minor
    assert left > 0
    returned = await asyncio.to_thread(phone.give_back, left)
    assert returned.refused is None
    account = online.ledger.accounts()[0]
    assert account.free_minor == free + left
    assert account.outstanding_minor == 80_000
    online.ledger.check_books()


async def test_what_the_wallet_routes_refuse(online: Online) -> None:
    phone = online.phone()
    stranger = replace(phone, card=VirtualCard(replace(online.personalisation, mk_ac=bytes(range(16)))))
    with pytest.raises(AuthenticationFailed, match="application cryptogram"):
        await asyncio.to_thread(stranger.refresh)
    with pytest.raises(InvalidMessage):
        await asyncio.to_thread(phone.line.wallet_note, b"no")
    with pytest.raises(InvalidMessage):
        await asyncio.to_thread(phone.line.wallet_note, b"x" * 100_000)
    phone.line = WalletClient("https://127.0.0.1:1", online.authority)
    with pytest.raises(LedgerUnreachable):
        await asyncio.to_thread(phone.refresh)


class Listening:
    """The till's line, with somebody who notes what is asked."""

    def __init__(self, line: IssuerLine) -> None:
        self._line = line
        self.asked: list[Inquiry] = []

    @property
    def reachable(self) -> bool:
        return self._line.reachable

    def ask_grant(self, inquiry: Inquiry) -> Future[OnlineAnswer]:
        self.asked.append(inquiry)
        return self._line.ask_grant(inquiry)

    def ask_note(self, inquiry: Inquiry) -> Future[OnlineAnswer]:
        return self._line.ask_note(inquiry)


async def test_a_gateway_s_questions_need_its_certificate_and_are_answered_the_same_twice(
    online: Online,
) -> None:
    phone = online.phone()
    assert online.till._issuer is not None
    line = online.till._issuer = Listening(online.till._issuer)
    paid = await online.pay(phone, 30_000)
    assert isinstance(paid, Approved)
    (inquiry,) = line.asked
    again = [await online.client.ask_grant(inquiry, online.key) for _ in range(2)]
    assert again[0] == again[1]
    assert again[0].grant is not None

    # The same sale with another ARQC.
    online.till.singles._held.clear()
    payment = online.till.new_payment(paid.record.id, 30_000, 1)
    tapped = await asyncio.to_thread(
        online.till.tap, payment, DirectChannel(VirtualCard(online.personalisation))
    )
    assert isinstance(tapped, Declined)
    assert "other content" in tapped.decline.detail

    async with LedgerClient(online.url, online.authority) as anonymous:
        with pytest.raises(AuthenticationFailed):
            await anonymous.ask_grant(inquiry, online.key)
