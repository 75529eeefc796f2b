"""Publishing: what a snapshot says, and that no ceiling leaves the house before it is on record."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import rsa
from tuf.api.metadata import Metadata, Root

from pos_gateway.distribution import LimitKeys
from pos_gateway.errors import (
    AuthenticationFailed,
    InvalidConfiguration,
    InvalidInput,
    NotFound,
    Unavailable,
)
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger import Ledger, accounts, store
from pos_gateway.ledger.accounts import TokenStatus
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.signing import SigningKey, sign_file
from pos_gateway.limits.delta import changed_records
from pos_gateway.limits.header import check_supersedes
from pos_gateway.limits.record import LimitRecord, Status
from pos_gateway.limits.snapshot import Snapshot
from pos_gateway.records import Verdict
from pos_gateway.snapshot_file import SnapshotFile
from tests.ledger.shop import Clock, Shop

DAY_S = 24 * 3600


def published(ledger: Ledger) -> list[sa.Row[tuple[object, ...]]]:
    with ledger._database.read() as connection:
        return list(
            connection.execute(sa.select(store.publications).order_by(store.publications.c.snapshot_version))
        )


def records(ledger: Ledger, name: str) -> list[LimitRecord]:
    """What a file in the repository holds."""
    state = ledger.repository.state()
    assert state is not None
    path = ledger.repository.target(state.targets.signed.targets[name])
    trusted = ledger.repository.limit_keys()
    with SnapshotFile(path) as file:
        return list(Snapshot.open(file.read_at, file.size, trusted.keys, trusted.threshold).records())


def test_a_snapshot_says_what_policy_and_accounts_say(
    ledger: Ledger, clock: Clock, icc_key: rsa.RSAPrivateKey
) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=50_000)
    issued = ledger.issue_token(account.id, per_tap_cap_minor=9000, icc_key=icc_key)
    snapshot = ledger.publish()
    shop = Shop.enrol(ledger)
    limit, digest = shop.limit(issued.personalisation.pan, 1)
    assert limit.ceiling == issued.personalisation.counter + 50_000
    assert (limit.per_tap_cap_minor, limit.status, limit.sequence) == (9000, Status.ACTIVE, 1)
    now_s = int(clock.now_s)
    assert (snapshot.version, snapshot.record_count) == (1, 1)
    assert snapshot.valid_from_unix_s == now_s
    assert snapshot.refresh_after_unix_s == now_s + DAY_S
    assert snapshot.valid_until_unix_s == now_s + 7 * DAY_S
    [row] = published(ledger)
    assert (row.ceiling, row.digest, row.snapshot_version) == (limit.ceiling, digest, 1)
    # A shop whose clock is behind by the tolerance approves so much longer.
    assert row.stands_until_unix_s == now_s + 21 * DAY_S + 300
    assert ledger.latest_snapshot() == snapshot == ledger.snapshot(1)
    assert snapshot.path.stat().st_size == snapshot.size
    assert ledger.account(account.id).free_minor == 0


def test_versions_only_rise_and_an_older_one_is_told_from_a_newer(ledger: Ledger) -> None:
    versions = [ledger.publish().version for _ in range(3)]
    assert versions == [1, 2, 3]
    assert ledger.latest_snapshot().version == 3
    with SnapshotFile(ledger.snapshot(2).path) as file:
        header = Snapshot.open(file.read_at, file.size, ledger.repository.limit_keys().keys, 1).header
    check_supersedes(header, 2)
    with pytest.raises(AuthenticationFailed, match="snapshot version"):
        check_supersedes(header, 3)


def test_an_unused_ceiling_is_published_again_without_costing_anything(
    ledger: Ledger, icc_key: rsa.RSAPrivateKey
) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=50_000)
    issued = ledger.issue_token(account.id, icc_key=icc_key)
    for _ in range(3):
        ledger.publish()
    assert {row.ceiling for row in published(ledger)} == {issued.personalisation.counter + 50_000}
    assert len({row.digest for row in published(ledger)}) == 3
    ledger.check_books()


def test_new_ceilings_follow_what_was_spent_and_repaid_nothing(
    ledger: Ledger, icc_key: rsa.RSAPrivateKey
) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=50_000)
    card = VirtualCard(ledger.issue_token(account.id, icc_key=icc_key).personalisation)
    start = card.state.counter
    ledger.publish()
    shop = Shop.enrol(ledger)
    assert shop.verdict(shop.tap(card, 20_000)) is Verdict.POSTED
    ledger.publish()
    assert published(ledger)[-1].ceiling == start + 50_000
    assert published(ledger)[-1].highest == start + 20_000
    assert ledger.account(account.id).reserve_minor == 30_000


def test_a_torn_tap_costs_credit_until_its_publication_lapses(
    ledger: Ledger, clock: Clock, icc_key: rsa.RSAPrivateKey
) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=50_000)
    card = VirtualCard(ledger.issue_token(account.id, icc_key=icc_key).personalisation)
    start = card.state.counter
    ledger.publish()
    shop = Shop.enrol(ledger)
    shop.tap(card, 10_000)  # torn: never presented
    assert shop.verdict(shop.tap(card, 5_000)) is Verdict.POSTED
    ledger.publish()
    assert published(ledger)[-1].ceiling == start + 50_000
    clock.now_s += 30 * DAY_S
    ledger.publish()
    # From H = start + 15 000 on, all that is not owed: the gap costs nothing any more.
    assert published(ledger)[-1].ceiling == start + 15_000 + 45_000
    ledger.check_books()


def test_tokens_share_an_accounts_limit(ledger: Ledger, icc_key: rsa.RSAPrivateKey) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=50_001)
    for _ in range(2):
        ledger.issue_token(account.id, icc_key=icc_key)
    ledger.publish()
    assert [t.reserve_minor for t in ledger.account(account.id).tokens] == [25_000, 25_000]
    # A third one finds nothing free: what is in the shops cannot be called back.
    late = ledger.issue_token(account.id, icc_key=icc_key).token
    ledger.publish()
    assert ledger.token(late.id).reserve_minor <= 1
    ledger.check_books()


def test_policy_can_hold_credit_back(ledger: Ledger, icc_key: rsa.RSAPrivateKey) -> None:
    ledger.set_policy(Policy(token_share_percent=40, valid_s=3600, refresh_after_s=7200))
    account = ledger.open_account(holder="Li Na", limit_minor=50_000)
    ledger.issue_token(account.id, icc_key=icc_key)
    snapshot = ledger.publish()
    assert ledger.account(account.id).reserve_minor == 20_000
    assert snapshot.refresh_after_unix_s == snapshot.valid_until_unix_s == snapshot.valid_from_unix_s + 3600


def test_a_blocked_token_stands_in_the_snapshot_without_a_ceiling(
    ledger: Ledger, icc_key: rsa.RSAPrivateKey
) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=50_000)
    issued = ledger.issue_token(account.id, icc_key=icc_key)
    ledger.publish()
    assert ledger.set_token_status(issued.token.id, TokenStatus.BLOCKED).status is TokenStatus.BLOCKED
    ledger.publish()
    shop = Shop.enrol(ledger)
    limit, _ = shop.limit(issued.personalisation.pan, 1)
    assert (limit.status, limit.ceiling, limit.sequence) == (Status.BLOCKED, 0, 2)
    assert len(published(ledger)) == 1
    # What is out there may still come in: the reserve stays.
    assert ledger.account(account.id).reserve_minor == 50_000
    ledger.set_token_status(issued.token.id, TokenStatus.ACTIVE)
    ledger.publish()
    limit, _ = shop.limit(issued.personalisation.pan, 1)
    assert (limit.status, limit.sequence) == (Status.ACTIVE, 3)


def test_nothing_is_released_before_it_is_on_record(
    ledger: Ledger, icc_key: rsa.RSAPrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=50_000)
    ledger.issue_token(account.id, icc_key=icc_key)
    seen: list[tuple[int | None, str]] = []
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        with ledger._database.read() as connection:
            count = connection.scalar(sa.select(sa.func.count()).select_from(store.publications))
        seen.append((count, Path(target).name.partition(".")[2]))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    ledger.publish()
    # The signer's log takes its name first, then what shops fetch.
    assert seen == [(1, "publications"), (1, "limits-1.snapshot"), (1, "limits-1.head")]


@pytest.mark.parametrize("crash_at", range(1, 12))
def test_a_crash_between_record_and_release_is_made_good_at_the_next_start(
    crash_at: int, ledger: Ledger, clock: Clock, icc_key: rsa.RSAPrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file that publishing puts into place, one after the other, is the last before the crash."""
    account = ledger.open_account(holder="Li Na", limit_minor=50_000)
    ledger.issue_token(account.id, icc_key=icc_key)
    ledger.publish()
    before, steps = ledger.latest_snapshot(), 0

    def dying(real: Callable[..., None]) -> Callable[..., None]:
        def step(*arguments: object) -> None:
            nonlocal steps
            steps += 1
            if steps == crash_at:
                raise KeyboardInterrupt
            real(*arguments)

        return step

    with monkeypatch.context() as crash:
        for name in ("rename", "replace"):
            crash.setattr(os, name, dying(getattr(os, name)))
        try:
            ledger.publish()
        except KeyboardInterrupt:
            assert ledger.latest_snapshot() == before
            assert len(published(ledger)) == 2
        else:
            assert steps < crash_at, "the last case: all steps were done"
    with Ledger.open(ledger.home, clock=clock) as again:
        released = again.latest_snapshot()
        assert released.version == 2
        state = again.repository.state()
        assert state is not None
        assert "limits-2.snapshot" in state.targets.signed.targets
        assert hashlib.sha256(released.path.read_bytes()).digest() == released.sha256
        assert list((again.home / "staging").iterdir()) == []
        assert again.publish().version == 3


def test_a_crash_before_the_record_leaves_nothing(
    ledger: Ledger, clock: Clock, icc_key: rsa.RSAPrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=50_000)
    ledger.issue_token(account.id, icc_key=icc_key)
    with monkeypatch.context() as crash:
        crash.setattr(accounts, "check_accounts", _die)
        with pytest.raises(KeyboardInterrupt):
            ledger.publish()
    assert published(ledger) == []
    with Ledger.open(ledger.home, clock=clock) as again:
        with pytest.raises(NotFound, match="no snapshot has been published"):
            again.latest_snapshot()
        assert again.publish().version == 1
        assert again.latest_snapshot().record_count == 1


def test_a_record_moves_on_only_when_its_content_changes(ledger: Ledger, icc_key: rsa.RSAPrivateKey) -> None:
    """Its bytes stay the same from version to version, so that a delta lists what changed and no more."""
    tokens = []
    for _ in range(3):
        account = ledger.open_account(holder="Li Na", limit_minor=50_000)
        tokens.append(ledger.issue_token(account.id, icc_key=icc_key).token)
    ledger.publish()
    first = records(ledger, "limits-1.snapshot")
    ledger.publish()
    assert records(ledger, "limits-2.snapshot") == first
    assert records(ledger, "limits-1-2.delta") == []
    ledger.set_token_status(tokens[1].id, TokenStatus.BLOCKED)
    ledger.publish()
    [blocked] = records(ledger, "limits-1-3.delta")
    assert (blocked.status, blocked.sequence) == (Status.BLOCKED, 2)
    assert records(ledger, "limits-2-3.delta") == [blocked]
    assert len({row.digest for row in published(ledger)}) == len(published(ledger)) == 8


@pytest.mark.parametrize("seed", range(3))
def test_deltas_are_exactly_what_lies_between_their_versions(
    seed: int, ledger: Ledger, icc_key: rsa.RSAPrivateKey
) -> None:
    random = Random(seed)
    ledger.set_policy(Policy(delta_bases=3))
    account = ledger.open_account(holder="Li Na", limit_minor=50_000)
    wholes: dict[int, list[LimitRecord]] = {}
    tokens = []
    for version in range(1, 7):
        for _ in range(random.randrange(3)):
            tokens.append(ledger.issue_token(account.id, icc_key=icc_key).token.id)
        for token in random.sample(tokens, random.randrange(len(tokens) + 1)):
            ledger.set_token_status(token, random.choice([TokenStatus.ACTIVE, TokenStatus.BLOCKED]))
        assert ledger.publish().version == version
        wholes[version] = records(ledger, f"limits-{version}.snapshot")
        state = ledger.repository.state()
        assert state is not None
        deltas = {name for name in state.targets.signed.targets if name.endswith(".delta")}
        bases = range(max(1, version - 3), version)
        assert deltas == {f"limits-{base}-{version}.delta" for base in bases}
        for base in bases:
            delta = records(ledger, f"limits-{base}-{version}.delta")
            assert delta == list(changed_records(wholes[base], wholes[version]))


def test_limits_can_be_signed_elsewhere(ledger: Ledger, tmp_path: Path, icc_key: rsa.RSAPrivateKey) -> None:
    """Limit and targets keys are taken off the machine: publishing waits for what they sign."""
    account = ledger.open_account(holder="Li Na", limit_minor=50_000)
    ledger.issue_token(account.id, icc_key=icc_key)
    away = tmp_path / "away"
    away.mkdir()
    signing = ledger.home / "keys" / "signing"
    for path in [*signing.glob("limits-*.pem"), *signing.glob("targets-*.pem")]:
        path.rename(away / path.name)
    limits, targets = ([SigningKey.read(p) for p in away.glob(f"{r}-*.pem")] for r in ("limits", "targets"))

    prepared = ledger.prepare_snapshot()
    assert prepared.record_count == 1
    with pytest.raises(Unavailable, match="lack the signatures of 1 limit keys"):
        ledger.release_snapshot()
    with pytest.raises(AuthenticationFailed, match="none of these keys"):
        sign_file(prepared.request, targets)
    assert "limits 1 of Test Issuer" in sign_file(prepared.request, limits).what
    with pytest.raises(Unavailable, match="lacks the signatures of 1 targets keys") as caught:
        ledger.release_snapshot()
    draft = prepared.request.with_name("targets.json")
    assert str(draft) in caught.value.advice
    with Ledger.open(ledger.home) as again, pytest.raises(NotFound, match="published yet"):
        again.latest_snapshot()
    assert "limits-1.snapshot" in sign_file(draft, targets).what
    assert ledger.release_snapshot().version == 1
    with pytest.raises(NotFound, match="waits"):
        ledger.release_snapshot()


def _die(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_snapshot_can_need_several_signatures(tmp_path: Path, clock: Clock) -> None:
    with Ledger.create(
        tmp_path / "ledger", issuer="Two Keys", limit_keys=3, limit_threshold=2, clock=clock
    ) as ledger:
        path = ledger.publish().path
        trusted = LimitKeys.of(Metadata[Root].from_bytes(Shop.enrol(ledger).enrolment.trusted_root).signed)
        assert (len(trusted.keys), trusted.threshold) == (3, 2)
        with SnapshotFile(path) as file:
            Snapshot.open(file.read_at, file.size, trusted.keys, 3)
            one_known = dict([next(iter(trusted.keys.items()))])
            with pytest.raises(AuthenticationFailed, match="snapshot signature"):
                Snapshot.open(file.read_at, file.size, one_known, 2)


def test_a_ledger_is_made_whole_or_not_at_all(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidConfiguration, match="something is there already"):
        Ledger.create(ledger.home, issuer="Again")
    with pytest.raises(InvalidInput, match="threshold"):
        Ledger.create(tmp_path / "new", issuer="X", limit_threshold=2)
    with pytest.raises(InvalidInput, match="currency"):
        Ledger.create(tmp_path / "new", issuer="X", currency="XXX")
    monkeypatch.setattr(os, "rename", _die)
    with pytest.raises(KeyboardInterrupt):
        Ledger.create(tmp_path / "new", issuer="X")
    assert [p.name for p in tmp_path.iterdir()] == ["ledger"]


def test_what_is_no_ledger_is_said_to_be_none(tmp_path: Path, ledger: Ledger) -> None:
    with pytest.raises(InvalidConfiguration, match=r"no ledger here.*ledger init"):
        Ledger.open(tmp_path)
    path = ledger.home / "ledger.json"
    path.write_text(path.read_text().replace('"CNY"', "7"))
    with pytest.raises(InvalidConfiguration, match="field currency"):
        Ledger.open(ledger.home)
