"""`journal prune` and `journal carry`, and `ledger receive` at the other end of the carrier's way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from pos_gateway.cli import main as cli
from pos_gateway.gateway.till import Approved
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.records import Kind
from tests.gateway.journalling import acknowledgement, new_id, sale

Run = Callable[..., tuple[int, dict[str, Any]]]
PAYMENTS = 3
OLD = 40


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr("sys.argv", ["pos-gateway", *map(str, arguments), "--json"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return int(exit.value.code or 0), json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def shop(tmp_path: Path, ledger_home: Path) -> Path:
    """A shop with payments that wait, and its ledger beside it."""
    shutil.copytree(ledger_home, tmp_path / "ledger")
    with Shop(tmp_path) as shop:
        _, personalisation = shop.issue(limit_minor=100_000)
        # A year ago: long acknowledged, but for one that was refused.
        shop.journal.append_all([sale(number) for number in range(OLD)])
        shop.journal.append_all([acknowledgement(n, "late" if n == 7 else "posted") for n in range(OLD)])
        shop.publish()
        card = VirtualCard(personalisation)
        for number in range(PAYMENTS):
            outcome = shop.till.tap(shop.till.new_payment(uuid4(), 1000, number + 1), DirectChannel(card))
            assert isinstance(outcome, Approved)
    return tmp_path


def test_a_queue_is_carried_to_the_issuer_and_taken_once(shop: Path, run: Run) -> None:
    code, carried = run("journal", "carry", shop / "queue", "--home", shop / "gateway")
    assert (code, carried["records"], carried["batches"]) == (0, PAYMENTS, 1)
    for verdict in ("posted", "duplicate"):
        code, received = run("ledger", "receive", shop / "queue", "--home", shop / "ledger")
        assert (code, received["verdicts"]) == (0, {verdict: PAYMENTS})
    told = json.loads((shop / "queue").read_text())
    told["body"] = told["body"].replace('"sequence":', '"sequence": ')
    (shop / "changed").write_text(json.dumps(told))
    assert run("ledger", "receive", shop / "changed", "--home", shop / "ledger")[0] == 4
    (shop / "nonsense").write_text("{}\n")
    assert run("ledger", "receive", shop / "nonsense", "--home", shop / "ledger")[0] == 3
    assert run("ledger", "receive", shop / "missing", "--home", shop / "ledger")[0] == 5


def test_a_dead_tills_journal_is_taken_by_the_issuer(shop: Path, run: Run) -> None:
    found = shop / "found"
    assert run("journal", "backup", found, "--home", shop / "gateway")[0] == 0
    for source, verdict in ((found, "posted"), (shop / "gateway", "duplicate")):
        code, received = run("ledger", "receive", source, "--home", shop / "ledger")
        assert (code, received["verdicts"]) == (0, {verdict: PAYMENTS})
    found.write_bytes(found.read_bytes()[:100])
    assert run("ledger", "receive", found, "--home", shop / "ledger")[0] == 5


def test_a_journal_is_pruned_after_a_dry_run_has_said_so(shop: Path, run: Run) -> None:
    home = shop / "gateway"
    code, would = run("journal", "prune", "--dry-run", "--home", home)
    assert (code, would["pruned"], would["checkpoint"]["kept"]) == (0, 2 * OLD, [8, OLD + 8])
    before = run("journal", "verify", "--home", home)[1]
    assert "checkpoint" not in before
    code, done = run("journal", "prune", "--home", home)
    assert (code, done["pruned"], done["checkpoint"]) == (0, would["pruned"], would["checkpoint"])
    code, after = run("journal", "verify", "--home", home)
    assert (code, after["verified"]) == (0, before["verified"] + 1 - 2 * OLD + 2)
    assert after["checkpoint"]["counts"] == {"authorization": OLD, "acknowledgement": OLD}
    code, listed = run("journal", "list", "--home", home)
    refused = next(r for r in listed["records"] if r["id"] == str(new_id(7)))
    assert (refused["kind"], refused["verdict"]) == (Kind.AUTHORIZATION.value, "late")
    assert refused["meaning"]["money"] == "under_review"
    assert run("journal", "prune", "--home", home)[1]["pruned"] == 0
