"""`ledger bill|plan|loan|scorecard|debt|audit|history`, as a person or a program runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from pos_gateway.cli.main import main

Run = Callable[..., tuple[int, Any]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one `ledger` command with --json; its exit code and its answer."""

    def run(*words: object) -> tuple[int, Any]:
        argv = ["pos-gateway", "ledger", *(str(word) for word in words), "--json"]
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0), json.loads(capsys.readouterr().out)

    return run


def test_lives_are_billed_audited_and_shown(run: Run, tmp_path: Path) -> None:
    home = tmp_path / "ledger"
    assert run("init", "--issuer", "X", "--home", home)[0] == 0
    start = datetime.now(UTC).date() - timedelta(days=60)
    told = ("--accounts", 5, "--days", 45, "--seed", 3, "--start", start, "--home", home)
    assert run("history", *told)[0] == 0
    assert run("history", *told)[0] == 3, "only into an empty ledger"
    code, audit = run("audit", "--home", home)
    assert (code, audit["differences"], audit["trial_balance_sum"]) == (0, [], 0)
    assert run("bill", "run", "--home", home)[0] == 0
    bills = {n: run("bill", "list", f"life-{n:07d}", "--home", home)[1]["bills"] for n in range(5)}
    who = next(f"life-{n:07d}" for n, found in bills.items() if found)
    page = tmp_path / "statement.html"
    code, shown = run("bill", "show", who, "--html", page, "--home", home)
    assert code == 0
    assert shown["due_on"] in page.read_text()
    assert run("bill", "show", who, "--closing", "yesterday", "--home", home)[0] == 3
    assert run("bill", "show", "nobody", "--home", home)[0] == 7
    assert run("plan", "list", who, "--home", home)[0] == 0
    assert run("plan", "settle", who, "x", "--reference", "r", "--home", home)[0] == 3
    assert run("debt", "show", who, "--home", home)[1]["bucket"] is not None
    card = files("pos_gateway.ledger").joinpath("policies", "scorecard-example.json").read_text("utf-8")
    (tmp_path / "card.json").write_text(card)
    assert run("scorecard", "evaluate", who, "--home", home)[0] == 7
    assert run("scorecard", "add", tmp_path / "card.json", "--home", home)[0] == 0
    code, found = run("scorecard", "evaluate", who, "--home", home)
    assert (code, found["scorecard"]) == (0, 1)
    assert all(reason["chinese"] for reason in found["reasons"])
    assert run("loan", "approve", who, "--home", home)[0] == 0
    assert run("debt", "waive", who, "--home", home)[0] == 0
    assert run("debt", "write-off", who, "--home", home)[0] == 0
    assert run("audit", "--home", home)[0] == 0
