"""`tools/demo --once`, and what it leaves behind: the whole story is told, and nothing secret is in it."""

from __future__ import annotations

import base64
import json
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.gateway.identity import load_enrolment

MEANT_FOR_SECRETS = {"enrolment.json", "identity.key", "tls.pem"}
"""What a gateway keeps secret; each has mode 0600."""


def summary(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last


def test_the_story_ends_well(told: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    told_of = summary(told[1])
    assert told_of.pop("seconds") > 0
    assert told_of == {
        "approved": 6,
        "declined": {
            "authentication_failed": 1,
            "blocked": 1,
            "card_not_supported": 1,
            "over_ceiling": 2,
        },
        "posted": 6,
        "lost": 0,
        "posted_twice": 0,
    }
    assert told[1].stderr == ""


def test_no_token_number_key_or_secret_is_left_lying_about(
    told: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = told
    secrets = dict(_secrets(folder))
    assert len(secrets) > 40
    places = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name in MEANT_FOR_SECRETS or path.name.endswith(".card.json"):
            continue
        if path.is_relative_to(folder / "ledger" / "keys") or path.name.endswith(".card.state"):
            continue
        places[str(path.relative_to(folder))] = path.read_bytes()
    assert {"gateway/journal.sqlite3", "ledger.log", "gateway.log"} <= places.keys()
    found = [
        f"{what} in {place}"
        for place, content in places.items()
        for what, s in secrets.items()
        if s in content
    ]
    assert found == []


def test_what_is_secret_only_its_owner_can_read(
    told: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = told
    private = [p for p in folder.rglob("*") if p.name in MEANT_FOR_SECRETS or p.name.endswith(".card.json")]
    private += [p for p in (folder / "ledger" / "keys").rglob("*") if p.is_file()]
    private = [p for p in private if not p.name.startswith("forged")]
    assert len(private) > 6
    assert [p.name for p in private if stat.S_IMODE(p.stat().st_mode) & 0o077 and "cert" not in p.name] == []


def _secrets(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Everything that must not be seen, in each form it could be written in."""
    for path in folder.glob("*.card.json"):
        card = Personalisation.from_json(path.read_text())
        for what, secret in (
            ("token number", bytes.fromhex(card.pan)),
            ("AC master key", card.mk_ac),
            ("encipherment master key", card.mk_enc),
            ("ICC prime", card.icc_prime_p.to_bytes(72, "big")),
        ):
            yield from _forms(f"{what} of {path.name}", secret)
        yield f"token number of {path.name}, text", card.pan.encode()
    enrolment = load_enrolment(folder / "gateway" / "enrolment.json").enrolment
    yield from _forms("token key secret", enrolment.token_key_secret)
    for path in (folder / "ledger" / "keys").rglob("*.pem"):
        text = path.read_text()
        if "PRIVATE" in text:
            yield f"key {path.name}", "".join(text.splitlines()[1:-1]).encode()[:48]


def _forms(what: str, secret: bytes) -> Iterator[tuple[str, bytes]]:
    yield f"{what}, raw", secret
    yield f"{what}, hex", secret.hex().encode()
    yield f"{what}, HEX", secret.hex().upper().encode()
    yield f"{what}, base64", base64.b64encode(secret)[:20]
