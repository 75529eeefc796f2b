"""A ledger restored from an older backup forgets nothing that shops rely on, and nothing is posted twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import rsa

from pos_gateway.errors import InvalidConfiguration, NotFound
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger import Ledger, publisher
from pos_gateway.ledger.ceilings import decide_stretch
from pos_gateway.ledger.reserve import InvariantBroken
from pos_gateway.ledger.signer_log import SignerLog
from pos_gateway.records import Kind, Verdict, canonical_json
from tests.ledger.shop import Clock, Shop


@pytest.fixture
def dialect() -> str:
    # The backup is a copy of the file here; what is done after it is the same on both.
    return "sqlite"


def restore(ledger: Ledger, backup: Path) -> None:
    ledger.close()
    for path in ledger.home.glob("ledger.db*"):
        path.unlink()
    shutil.copy(backup, ledger.home / "ledger.db")


def back_up(ledger: Ledger, to: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{ledger.home / 'ledger.db'}", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"VACUUM INTO '{to}'")
    engine.dispose()


def test_what_was_published_and_presented_since_the_backup_is_there_again(
    ledger: Ledger, clock: Clock, tmp_path: Path, icc_key: rsa.RSAPrivateKey
) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=50_000)
    card = VirtualCard(ledger.issue_token(account.id, icc_key=icc_key).personalisation)
    ledger.publish()
    shop = Shop.enrol(ledger)
    kept = [shop.tap(card, 1000)]
    shop.present(*kept)
    epoch = ledger.epoch
    back_up(ledger, tmp_path / "backup.db")

    kept.append(shop.tap(card, 2000))
    shop.present(*kept)
    clock.now_s += 24 * 3600
    published = ledger.publish()
    # Under a limit that the backup knows nothing of.
    kept.append(shop.tap(card, 3000))
    kept.append(shop.correct(Kind.REFUND, kept[1], 500))
    shop.present(*kept)
    assert ledger.account(account.id).outstanding_minor == 5500

    restore(ledger, tmp_path / "backup.db")
    with pytest.raises(InvalidConfiguration, match=r"knows of 1 snapshots, and 2 were published.*restored"):
        Ledger.open(ledger.home, clock=clock)
    replayed = Ledger.restored(ledger.home, clock=clock)
    assert (replayed.snapshots, replayed.publications, replayed.unknown_tokens) == (1, 1, 0)

    with Ledger.open(ledger.home, clock=clock) as again:
        assert again.epoch != epoch
        assert again.latest_snapshot() == published
        assert again.account(account.id).outstanding_minor == 1000
        again.check_books()
        # Nothing is given out anew before the gateways have presented again.
        assert again.account(account.id).free_minor == 0
        shop.ledger = again
        assert [v.verdict for v in shop.present(*kept)] == [Verdict.DUPLICATE, *[Verdict.POSTED] * 3]
        assert [v.verdict for v in shop.present(*kept)] == [Verdict.DUPLICATE] * 4
        assert again.account(account.id).outstanding_minor == 5500
        again.check_books()
        assert again.publish().version == 3


def test_a_payment_voided_since_the_backup_does_not_block_what_is_presented_again(
    ledger: Ledger, clock: Clock, tmp_path: Path, icc_key: rsa.RSAPrivateKey
) -> None:
    """Its credit was given out anew, so that until the void is back the account is over its limit."""
    account = ledger.open_account(holder="Li Na", limit_minor=5000)
    card = VirtualCard(ledger.issue_token(account.id, icc_key=icc_key).personalisation)
    ledger.publish()
    shop = Shop.enrol(ledger)
    back_up(ledger, tmp_path / "backup.db")
    payment = shop.tap(card, 1000)
    void = shop.correct(Kind.REVERSAL, payment, 1000)
    shop.present(payment, void)
    ledger.publish()
    later = shop.tap(card, 4500)
    shop.present(later)

    restore(ledger, tmp_path / "backup.db")
    Ledger.restored(ledger.home, clock=clock)
    with Ledger.open(ledger.home, clock=clock) as again:
        shop.ledger = again
        with pytest.raises(InvariantBroken):
            again.check_books()
        for record in (payment, void, later):
            assert shop.verdict(record) is Verdict.POSTED
        assert again.account(account.id).outstanding_minor == 4500
        again.check_books()


def test_a_second_replay_finds_nothing_and_begins_another_epoch(
    ledger: Ledger, clock: Clock, icc_key: rsa.RSAPrivateKey
) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=50_000)
    ledger.issue_token(account.id, icc_key=icc_key)
    ledger.publish()
    first = ledger.epoch
    ledger.close()
    assert Ledger.restored(ledger.home, clock=clock).publications == 0
    with Ledger.open(ledger.home, clock=clock) as again:
        assert again.epoch != first


def test_no_snapshot_is_released_before_it_is_in_the_signers_log(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(SignerLog, "record", full)
        with pytest.raises(OSError, match="No space"):
            ledger.publish()
    with pytest.raises(NotFound):
        ledger.latest_snapshot()
    ledger.close()
    with Ledger.open(ledger.home, clock=clock) as again:
        assert again.latest_snapshot().version == 1
        assert SignerLog(again.home / "keys" / "publications").versions() == [1]
        [entry] = (again.home / "keys" / "publications").iterdir()
        assert entry.stat().st_mode & 0o077 == 0


def test_a_backup_made_in_the_middle_of_publishing_is_told_the_rest(
    ledger: Ledger,
    clock: Clock,
    tmp_path: Path,
    icc_key: rsa.RSAPrivateKey,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = []
    for _ in range(3):
        ids.append(ledger.open_account(holder="Li Na", limit_minor=50_000).id)
        ledger.issue_token(ids[-1], icc_key=icc_key)

    def stretch(connection: sa.Connection, after: str, *rest: Any) -> str | None:
        if after == sorted(ids)[0]:
            back_up(ledger, tmp_path / "backup.db")
        return decide_stretch(connection, after, *rest, size=1)

    with monkeypatch.context() as patched:
        patched.setattr(publisher, "decide_stretch", stretch)
        published = ledger.publish()
    restore(ledger, tmp_path / "backup.db")
    with pytest.raises(InvalidConfiguration, match="knows of 0 snapshots, and 1 were published"):
        Ledger.open(ledger.home, clock=clock)
    replayed = Ledger.restored(ledger.home, clock=clock)
    assert (replayed.snapshots, replayed.publications, replayed.unknown_tokens) == (1, 2, 0)
    with Ledger.open(ledger.home, clock=clock) as again:
        assert again.latest_snapshot() == published
        assert [again.account(account_id).reserve_minor for account_id in ids] == [50_000] * 3
        again.check_books()
        assert again.publish().version == 2


def test_the_log_is_canonical(ledger: Ledger, icc_key: rsa.RSAPrivateKey) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=50_000, account_id='"Ü\\ 1')
    ledger.issue_token(account.id, icc_key=icc_key)
    ledger.publish()
    [path] = (ledger.home / "keys" / "publications").glob("*1.publications")
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert [canonical_json(json.loads(line)) for line in lines] == lines
