"""Single publications: what may be given out, what must be remembered of it."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import rsa

from pos_gateway.errors import Conflict, InvalidConfiguration, InvalidInput
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger import Ledger, accounts, store
from pos_gateway.ledger.accounts import TokenStatus
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.issue import Issued, issue
from pos_gateway.ledger.reserve import InvariantBroken, PublicationKind
from pos_gateway.ledger.signer_log import SignerLog
from pos_gateway.records import Verdict
from tests.ledger.shop import Clock, Shop

DAY_S = 24 * 3600


def give(
    ledger: Ledger,
    token_id: str,
    more_minor: int,
    *,
    kind: PublicationKind = PublicationKind.GRANT,
    terminal_id: str | None = "T0000001",
    life_s: int = 600,
) -> Issued:
    """A grant beyond H as whoever answers a shop does it."""
    account_id = ledger.token(token_id).account_id
    with ledger._database.write() as connection:
        account = accounts.lock_account(connection, account_id, int(ledger.now_unix_ms() / 1000))
        line = account.line(token_id)
        issued = issue(
            connection,
            account,
            line,
            kind=kind,
            ceiling=line.highest + more_minor,
            valid_until_unix_s=account.now_unix_s + life_s,
            nonce=secrets.token_bytes(16),
            guarantee=ledger.policy.guarantee,
            terminal_id=terminal_id,
        )
        accounts.check_accounts(connection, [account_id], account.now_unix_s)
    SignerLog(ledger.home / "keys" / "publications").record_single(issued.row, issued.issued_unix_s)
    return issued


def test_a_grant_reserves_its_credit_and_no_more_than_there_is(
    ledger: Ledger, icc_key: rsa.RSAPrivateKey
) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=50_000)
    token = ledger.issue_token(account.id, icc_key=icc_key).token
    first = give(ledger, token.id, 30_000)
    assert first.record.ceiling == token.highest_counter + 30_000
    assert ledger.account(account.id).free_minor == 20_000
    # The same points cost nothing twice.
    second = give(ledger, token.id, 50_000)
    assert (first.record.sequence, second.record.sequence) == (1, 2)
    assert ledger.account(account.id).free_minor == 0
    with pytest.raises(InvariantBroken, match="1 more minor units would be reserved, and 0 are free"):
        give(ledger, token.id, 50_001)
    assert ledger.account(account.id).free_minor == 0
    ledger.check_books()


def test_a_payment_under_a_grant_is_posted_and_the_next_snapshot_goes_on_from_its_sequence(
    ledger: Ledger, clock: Clock, icc_key: rsa.RSAPrivateKey
) -> None:
    ledger.set_policy(Policy(token_share_percent=20))
    account = ledger.open_account(holder="Li Na", limit_minor=50_000)
    issued = ledger.issue_token(account.id, icc_key=icc_key)
    card = VirtualCard(issued.personalisation)
    ledger.publish()
    shop = Shop.enrol(ledger)
    grant = give(ledger, issued.token.id, 30_000, terminal_id=shop.enrolment.terminal_id)
    assert shop.verdict(shop.tap(card, 25_000, limit=(grant.record, grant.digest))) is Verdict.POSTED
    ledger.publish()
    limit, _ = shop.limit(issued.personalisation.pan, 1)
    assert (grant.record.sequence, limit.sequence) == (2, 3)
    ledger.check_books()


def test_what_cannot_be_given_out(ledger: Ledger, icc_key: rsa.RSAPrivateKey) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=50_000)
    token = ledger.issue_token(account.id, icc_key=icc_key).token
    with pytest.raises(InvalidInput, match="ceiling"):
        give(ledger, token.id, -1)
    with pytest.raises(InvalidInput, match="future"):
        give(ledger, token.id, 1, life_s=0)
    with pytest.raises(InvalidInput, match="one terminal"):
        give(ledger, token.id, 1, terminal_id=None)
    with pytest.raises(InvalidInput, match="one terminal"):
        give(ledger, token.id, 1, kind=PublicationKind.NOTE)
    ledger.set_token_status(token.id, TokenStatus.BLOCKED)
    with pytest.raises(Conflict, match="blocked"):
        give(ledger, token.id, 1)
    assert ledger.account(account.id).reserve_minor == 0


def test_grants_outlive_the_database(
    template: Path, tmp_path: Path, clock: Clock, icc_key: rsa.RSAPrivateKey
) -> None:
    home = tmp_path / "ledger"
    shutil.copytree(template, home)
    with Ledger.open(home, clock=clock) as ledger:
        account = ledger.open_account(holder="Li Na", limit_minor=50_000)
        token = ledger.issue_token(account.id, icc_key=icc_key).token
    shutil.copy(home / "ledger.db", tmp_path / "backup.db")
    with Ledger.open(home, clock=clock) as ledger:
        give(ledger, token.id, 30_000)
        give(ledger, token.id, 10_000, kind=PublicationKind.NOTE, terminal_id=None)
    # What a crash cut short was never given to anybody.
    [log] = (home / "keys" / "publications").glob("singles-*")
    with log.open("a") as file:
        file.write('\n{"publication": {"acc')
    for path in home.glob("ledger.db*"):
        path.unlink()
    shutil.copy(tmp_path / "backup.db", home / "ledger.db")
    with pytest.raises(InvalidConfiguration, match=r"the last grant that was given out.*restored"):
        Ledger.open(home, clock=clock)
    assert Ledger.restored(home, clock=clock).publications == 2
    with Ledger.open(home, clock=clock) as again:
        assert again.account(account.id).reserve_minor == 30_000
        assert give(again, token.id, 30_000).record.sequence == 3
        with again._database.read() as connection:
            ends = connection.scalars(sa.select(store.publications.c.stands_until_unix_s)).all()
        # What the database has forgotten is presented again within D, under whatever stood then.
        assert min(ends) >= clock.now_s + 14 * DAY_S
    assert Ledger.restored(home, clock=clock).publications == 0
