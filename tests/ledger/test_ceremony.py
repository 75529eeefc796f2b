"""The key ceremony: who may sign changes only by a root that enough old and new root keys have signed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Root

from pos_gateway.distribution import LimitKeys
from pos_gateway.errors import Conflict, InvalidConfiguration, InvalidInput, NotFound, Unavailable
from pos_gateway.ledger import Ledger
from pos_gateway.ledger.ceremony import CeremonyState, remove_key, set_threshold
from pos_gateway.ledger.repository import lacking_signatures
from pos_gateway.ledger.signing import (
    KeyChest,
    PublicKey,
    Role,
    SigningKey,
    SigningRequest,
    new_signing_key,
    read_metadata,
    sign_file,
)
from tests.ledger.shop import Clock, Shop


def ids(state: CeremonyState, role: Role) -> set[str]:
    return {key.id for found in state.roles if found.role is role for key in found.keys}


def whole(ledger: Ledger) -> bool:
    """Everything in force verifies under the newest root."""
    root, state = ledger.repository.root().signed, ledger.repository.state()
    assert state is not None
    return all(lacking_signatures(root, m) == 0 for m in (state.targets, state.snapshot, state.timestamp))


def test_keys_go_to_files_of_their_owners_and_come_back(tmp_path: Path) -> None:
    key = new_signing_key(Role.LIMITS)
    path = key.write(tmp_path / "stick")
    assert path.name == f"limits-{key.id}.pem"
    assert path.stat().st_mode & 0o777 == 0o600
    assert SigningKey.read(path).id == PublicKey.read(path.with_suffix(".pub")).id == key.id
    assert set(KeyChest.open(tmp_path / "stick").keys) == {key.id}
    assert "private" not in repr(key)
    path.chmod(0o640)
    with pytest.raises(InvalidConfiguration, match="chmod 600"):
        SigningKey.read(path)
    public = path.with_suffix(".pub")
    public.chmod(0o600)
    public.write_text(public.read_text().replace(key.id, "0" * 32))
    with pytest.raises(InvalidConfiguration, match="key id is not that of its key"):
        PublicKey.read(public)
    (tmp_path / "stick" / "else-1.pem").write_text("")
    with pytest.raises(InvalidConfiguration, match="does not begin with a role"):
        KeyChest.open(tmp_path / "stick")


@pytest.mark.parametrize("role", list(Role))
def test_with_all_keys_here_a_key_is_replaced_in_one_step(ledger: Ledger, role: Role) -> None:
    ledger.publish()
    [old] = ids(ledger.ceremony.state(), role)
    new, _ = ledger.ceremony.create(role)
    state = ledger.ceremony.rotate(new.public, old)
    assert (state.version, state.draft) == (2, None)
    assert ids(state, role) == {new.id}
    assert whole(ledger)
    assert ledger.publish().version == 2
    assert LimitKeys.of(Metadata[Root].from_bytes(Shop.enrol(ledger).enrolment.trusted_root).signed) == (
        ledger.repository.limit_keys()
    )


def test_thresholds_and_revocation_keep_to_what_the_keys_can_reach(ledger: Ledger) -> None:
    ceremony = ledger.ceremony
    [only] = ids(ceremony.state(), Role.TARGETS)
    with pytest.raises(InvalidInput, match="needs 1 keys and would have 0"):
        ceremony.change(lambda root: remove_key(root, only))
    with pytest.raises(InvalidInput, match="must be 1 to 1"):
        ceremony.change(lambda root: set_threshold(root, Role.LIMITS, 2))
    with pytest.raises(NotFound, match="no role has a key"):
        ceremony.change(lambda root: remove_key(root, "ff"))
    for role in (Role.LIMITS, Role.TARGETS, Role.ROOT):
        new, _ = ceremony.create(role)
        ceremony.rotate(new.public, None)
        with pytest.raises(Conflict, match="in the root already"):
            ceremony.rotate(new.public, None)
        state = ceremony.change(lambda root, role=role: set_threshold(root, role, 2))  # type: ignore[misc]
        assert next(found.threshold for found in state.roles if found.role is role) == 2
    assert ceremony.state().version == 7
    assert ledger.publish().version == 1
    assert whole(ledger)
    other, _ = ceremony.create(Role.LIMITS)
    ceremony.rotate(ceremony.create(Role.TARGETS)[0].public, None)
    with pytest.raises(Conflict, match="is not a limits key"):
        ceremony.rotate(other.public, only)
    assert ceremony.state().draft is None


def test_a_root_key_off_the_machine_signs_a_draft_there(ledger: Ledger, tmp_path: Path, clock: Clock) -> None:
    ceremony, signing = ledger.ceremony, ledger.home / "keys" / "signing"
    away = tmp_path / "safe"
    away.mkdir()
    [root_file] = signing.glob("root-*.pem")
    shutil.move(root_file, away)
    root_key = SigningKey.read(away / root_file.name)
    offline = new_signing_key(Role.LIMITS)
    [old] = ids(ceremony.state(), Role.LIMITS)

    state = ceremony.rotate(offline.public, old)
    assert (state.version, state.draft_lacks) == (1, (1, 1))
    assert state.draft is not None
    with pytest.raises(Unavailable, match="lacks 1 signatures by today's root keys and 1 by its own"):
        ceremony.release()
    assert not next(key for r in state.roles if r.role is Role.ROOT for key in r.keys).here
    signed = sign_file(state.draft, [root_key])
    assert "root metadata 2" in signed.what
    assert "limits 1 of 1" in signed.what
    # A second change gathers in the same draft, and voids its signatures.
    targets, _ = ceremony.create(Role.TARGETS)
    state = ceremony.rotate(targets.public, None)
    assert state.draft_lacks == (1, 1)
    assert state.draft is not None
    sign_file(state.draft, [root_key])
    state = ceremony.release()
    assert (state.version, state.draft) == (2, None)
    assert ids(state, Role.LIMITS) == {offline.id}
    assert whole(ledger)

    # From now on limits wait for the other machine.
    with pytest.raises(Unavailable, match="lack the signatures of 1 limit keys"):
        ledger.publish()
    request = ledger.home / "staging" / "1" / "limits.json"
    assert request.is_file()
    with Ledger.open(ledger.home, clock=clock) as again, pytest.raises(NotFound):
        again.latest_snapshot()
    sign_file(request, [offline])
    assert SigningRequest.read(request).missing(ledger.repository.limit_keys()) == 0
    assert ledger.release_snapshot().version == 1


def test_a_draft_can_be_forgotten(ledger: Ledger) -> None:
    for path in (ledger.home / "keys" / "signing").glob("root-*.pem"):
        path.unlink()
    new, _ = ledger.ceremony.create(Role.TARGETS)
    assert ledger.ceremony.rotate(new.public, None).draft is not None
    ledger.ceremony.discard()
    assert ledger.ceremony.state().draft is None
    with pytest.raises(NotFound, match="no draft"):
        ledger.ceremony.release()


def test_a_root_whose_online_keys_are_not_here_is_not_released(ledger: Ledger) -> None:
    [old] = ids(ledger.ceremony.state(), Role.TIMESTAMP)
    elsewhere = new_signing_key(Role.TIMESTAMP)
    with pytest.raises(Unavailable, match="wants 1 timestamp keys, 0 of them are on this server"):
        ledger.ceremony.rotate(elsewhere.public, old)
    assert ledger.repository.root().signed.version == 1
    assert whole(ledger)
    elsewhere.write(ledger.home / "keys" / "signing")
    assert ledger.ceremony.release().version == 2
    assert whole(ledger)


def test_two_limit_keys_on_two_machines(ledger: Ledger) -> None:
    [here] = ids(ledger.ceremony.state(), Role.LIMITS)
    away = new_signing_key(Role.LIMITS)
    ledger.ceremony.rotate(away.public, None)
    ledger.ceremony.change(lambda root: set_threshold(root, Role.LIMITS, 2))
    prepared = ledger.prepare_snapshot()
    with pytest.raises(Unavailable, match="1 limit keys"):
        ledger.release_snapshot()
    stranger = new_signing_key(Role.LIMITS)
    sign_file(prepared.request, [stranger])
    with pytest.raises(Unavailable, match="1 limit keys"):
        ledger.release_snapshot()
    sign_file(prepared.request, [away])
    ledger.release_snapshot()
    signed = SigningRequest.read(prepared.request) if prepared.request.exists() else None
    assert signed is None, "what is released needs no staging"
    assert here != away.id


def test_the_server_signs_every_hour_that_the_newest_is_the_newest(ledger: Ledger, clock: Clock) -> None:
    ledger.publish()
    before = ledger.repository.state()
    assert before is not None
    clock.now_s += 40 * 86_400
    ledger.ceremony.renew()
    after = ledger.repository.state()
    assert after is not None
    assert after.timestamp.signed.version == before.timestamp.signed.version + 1
    assert after.timestamp.signed.expires.timestamp() == clock.now_s + 2 * 86_400
    assert after.snapshot.signed.expires.timestamp() == clock.now_s + 14 * 86_400
    assert after.targets.signed.targets == before.targets.signed.targets
    ledger.ceremony.renew()
    again = ledger.repository.state()
    assert again is not None
    assert again.snapshot.signed.version == after.snapshot.signed.version
    root = read_metadata(ledger.repository.folder / "metadata" / "1.root.json")
    assert root.signed.version == 1
