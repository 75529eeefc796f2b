"""`snapshot …` and `proof …` on files that the test signs, in the home of an enrolled gateway."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from typer.testing import CliRunner

from pos_gateway.cli import proof as proof_commands
from pos_gateway.cli import snapshot as snapshot_commands
from pos_gateway.cli.main import build
from pos_gateway.errors import AuthenticationFailed, InvalidInput, InvalidSnapshot, NotFound
from pos_gateway.gateway.identity import Enrolled, store_enrolment
from pos_gateway.lab.shop import Shop
from pos_gateway.limits.record import Status
from tests.limits.making import KEYS, TERMS, built, opened, signing_key, some_records

Run = Callable[..., dict[str, Any]]

LIMITS = some_records(200)
CHANGED = [
    LIMITS[0]._replace(ceiling=LIMITS[0].ceiling + 1),
    LIMITS[1]._replace(ceiling=0, status=Status.BLOCKED),
    LIMITS[150],
]


@pytest.fixture
def home(tmp_path: Path, ledger_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A gateway's home; the issuer's signing keys are the test's."""
    shutil.copytree(ledger_home, tmp_path / "ledger")
    with Shop(tmp_path) as shop:
        enrolled = Enrolled(ledger_url="https://127.0.0.1:1", enrolment=shop.enrolment)
        store_enrolment(shop.home.enrolment, enrolled)

        def trusted(home: Path) -> tuple[dict[str, Ed25519PublicKey], int]:
            return dict(KEYS), 2

        for module in (snapshot_commands, proof_commands):
            monkeypatch.setattr(module, "trusted_keys", trusted)
        files(shop)
        yield shop.home.path


def files(shop: Shop) -> None:
    """Base 7, whole 8, the delta between them and its head, all for this gateway."""
    enrolment, folder = shop.enrolment, shop.home.path
    seven = replace(
        TERMS,
        issuer=enrolment.issuer,
        currency=enrolment.currency,
        token_key_epoch=enrolment.token_key_epoch,
    )
    eight = replace(seven, version=8, nonce=b"\x08" * 16)
    base = LIMITS[:150]
    whole = built([*CHANGED, *base[2:]], terms=eight)
    for name, data in {
        "7.snapshot": built(base, terms=seven),
        "8.snapshot": whole,
        "7-8.delta": built(CHANGED, terms=replace(eight, base_version=7)),
        "8.head": opened(whole).head,
    }.items():
        (folder / name).write_bytes(data)


@pytest.fixture
def run(home: Path) -> Run:
    def run(*arguments: str) -> dict[str, Any]:
        """What the command prints as JSON; files are named as they stand in the home."""
        found = [str(home / word) if (home / word).is_file() else word for word in arguments]
        result = CliRunner().invoke(build(found), [*found, "--home", str(home), "--json"])
        if result.exception is not None:
            raise result.exception
        document = json.loads(result.stdout)
        assert isinstance(document, dict)
        return document

    return run


def use(home: Path, *, delta: bool = True) -> None:
    folder = home / "snapshots"
    shutil.copy(home / "7.snapshot", folder / "limits-7.snapshot")
    if delta:
        shutil.copy(home / "7-8.delta", folder / "limits-7-8.delta")


def test_show_and_verify_tell_of_base_and_delta(home: Path, run: Run) -> None:
    use(home, delta=False)
    assert run("snapshot", "show")["base"] is None
    assert run("snapshot", "verify")["verified"] == 150
    use(home)
    shown = run("snapshot", "show")
    assert (shown["version"], shown["count"]) == (8, 3)
    assert (shown["base"]["version"], shown["base"]["count"]) == (7, 150)
    assert run("snapshot", "verify")["verified"] == 153


def test_lookup_names_the_layer_that_answers(home: Path, run: Run) -> None:
    use(home)
    listed = run("snapshot", "lookup", LIMITS[1].token_key.hex())
    assert (listed["version"], listed["status"], listed["ceiling"]) == (8, "blocked", 0)
    assert listed["digest"] == CHANGED[1].digest(b"\x08" * 16).hex()
    unlisted = run("snapshot", "lookup", LIMITS[2].token_key.hex())
    assert unlisted["version"] == 7
    assert unlisted["digest"] == LIMITS[2].digest(TERMS.nonce).hex()
    with pytest.raises(NotFound, match="limits 8 prove"):
        run("snapshot", "lookup", "00" * 16)
    for bad in ("xy", "00" * 15):
        with pytest.raises(InvalidInput, match="token key"):
            run("snapshot", "lookup", bad)


def test_diff(run: Run) -> None:
    told = run("snapshot", "diff", "7.snapshot", "8.snapshot", "--records", "2")
    assert (told["from"], told["to"]) == (7, 8)
    assert (told["changed"], told["new"], told["raised"], told["lowered"]) == (3, 1, 1, 1)
    assert len(told["records"]) == 2
    with pytest.raises(InvalidInput, match="a delta"):
        run("snapshot", "diff", "7.snapshot", "7-8.delta")


def test_merge_gives_the_issuer_s_file(home: Path, run: Run) -> None:
    out = home / "merged"
    told = run("snapshot", "merge", "7.snapshot", "7-8.delta", "8.head", "--out", str(out))
    assert out.read_bytes() == (home / "8.snapshot").read_bytes()
    assert told["version"] == 8
    assert not list(home.glob(".merged*"))


def test_a_merge_that_fails_leaves_nothing(home: Path, run: Run) -> None:
    out = home / "merged"
    foreign = built(LIMITS, terms=opened((home / "8.snapshot").read_bytes()).header)
    (home / "foreign.head").write_bytes(opened(foreign).head)
    with pytest.raises(AuthenticationFailed, match="snapshot root"):
        run("snapshot", "merge", "7.snapshot", "7-8.delta", "foreign.head", "--out", str(out))
    with pytest.raises(InvalidSnapshot):
        run("snapshot", "merge", "8.snapshot", "7-8.delta", "8.head", "--out", str(out))
    with pytest.raises(NotFound, match="no file"):
        run("snapshot", "merge", "7.snapshot", "7-8.delta", "none.head", "--out", str(out))
    assert not out.exists()
    assert not list(home.glob(".merged*"))


@pytest.mark.parametrize(("place", "version"), [(0, 8), (2, 7)])
def test_a_proof_made_here_is_checked_anywhere(home: Path, run: Run, place: int, version: int) -> None:
    use(home)
    out = home / "handed-over"
    key = LIMITS[place].token_key.hex()
    assert run("proof", "make", key, "--out", str(out))["version"] == version
    pinned = run("proof", "verify", str(out))
    options = [f"--key={key_id}={public.public_bytes_raw().hex()}" for key_id, public in KEYS.items()]
    assert run("proof", "verify", str(out), *options) == pinned
    assert (pinned["token_key"], pinned["version"]) == (key, version)
    assert pinned["base_version"] == (7 if version == 8 else None)


def test_a_proof_under_other_keys_or_changed_is_refused(home: Path, run: Run) -> None:
    use(home)
    out = home / "handed-over"
    run("proof", "make", LIMITS[0].token_key.hex(), "--out", str(out))
    strangers = [
        f"--key={name}={signing_key(name + 'x').public_key().public_bytes_raw().hex()}" for name in KEYS
    ]
    with pytest.raises(AuthenticationFailed, match="snapshot signature"):
        run("proof", "verify", str(out), *strangers)
    (one, *_) = (f"--key={key_id}={public.public_bytes_raw().hex()}" for key_id, public in KEYS.items())
    with pytest.raises(AuthenticationFailed, match="signed by 1 trusted keys, 2 needed"):
        run("proof", "verify", str(out), one, "--threshold", "2")
    data = out.read_bytes()
    out.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(AuthenticationFailed, match="snapshot record"):
        run("proof", "verify", str(out))
    out.write_bytes(bytes(300_000))
    with pytest.raises(InvalidSnapshot, match="more than"):
        run("proof", "verify", str(out))
    with pytest.raises(InvalidInput, match="ID=HEX"):
        run("proof", "verify", str(out), "--key", "limits-a")


def test_absence_has_no_proof(home: Path, run: Run) -> None:
    use(home)
    with pytest.raises(NotFound, match="no such token"):
        run("proof", "make", "00" * 16, "--out", str(home / "none"))
    assert not (home / "none").exists()
