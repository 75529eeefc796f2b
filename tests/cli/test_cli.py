"""The command line as people and programs meet it: its words, its JSON, its exit codes."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pos_gateway.cli import main as cli
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.lab.virtual_reader import ForeignCard, VirtualReader
from pos_gateway.ledger.migrations import HEAD

Told = tuple[Path, subprocess.CompletedProcess[str]]
Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one command with --json, in this process; its exit code and its answer."""

    def run(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        argv = [str(argument) for argument in arguments]
        monkeypatch.setattr("sys.argv", ["pos-gateway", *argv, "--json"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, _ = capsys.readouterr()
        return int(exit.value.code or 0), json.loads(out)

    return run


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run one command as a person does; everything it says."""

    def say(*arguments: str | Path) -> str:
        monkeypatch.setattr("sys.argv", ["pos-gateway", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit):
            cli.main()
        return "".join(capsys.readouterr())

    return say


def test_the_journal_is_listed_shown_and_verified(told: Told, run: Run) -> None:
    home = told[0] / "gateway"
    code, listed = run("journal", "list", "--home", home, "--limit", "1000")
    assert code == 0
    kinds = [record["kind"] for record in listed["records"]]
    assert kinds.count("authorization") == 6
    assert kinds.count("decline") == 5
    first = next(record for record in listed["records"] if record["kind"] == "authorization")
    code, shown = run("journal", "show", first["id"], "--home", home)
    assert (code, shown["hash"]) == (0, first["hash"])
    assert [other["facts"]["verdict"] for other in shown["about"]] == ["posted"]
    assert run("journal", "verify", "--home", home) == (0, {"verified": len(kinds)})


def test_the_journal_is_backed_up_and_exported(
    told: Told, run: Run, say: Callable[..., str], tmp_path: Path
) -> None:
    home = told[0] / "gateway"
    code, backup = run("journal", "backup", tmp_path / "backup", "--home", home)
    assert code == 0
    say("journal", "export", tmp_path / "export", "--home", home)
    lines = [json.loads(line) for line in (tmp_path / "export").read_text().splitlines()]
    assert [line["sequence"] for line in lines] == list(range(1, backup["records"] + 1))
    assert json.loads(say("journal", "export", "--after", "1", "--home", home).splitlines()[0]) == lines[1]
    assert "is there already" in say("journal", "export", tmp_path / "export", "--home", home)
    assert run("journal", "backup", tmp_path / "backup", "--home", home)[0] == 6


def test_a_changed_journal_is_noticed(told: Told, run: Run, tmp_path: Path) -> None:
    for name in ("journal.sqlite3", "identity.key"):
        (tmp_path / name).write_bytes((told[0] / "gateway" / name).read_bytes())
    (tmp_path / "identity.key").chmod(0o600)
    with sqlite3.connect(tmp_path / "journal.sqlite3") as db:
        db.execute("DROP TRIGGER journal_refuses_update")
        db.execute("UPDATE journal SET body = replace(body, '2560', '2561') WHERE kind = 'authorization'")
    db.close()
    code, answer = run("journal", "verify", "--home", tmp_path)
    assert code == 4
    assert "was changed" in answer["error"]["reason"]


def test_the_snapshot_is_shown_verified_and_looked_up(told: Told, run: Run) -> None:
    home = told[0] / "gateway"
    code, shown = run("snapshot", "show", "--home", home)
    assert (code, shown["version"], shown["freshness"]) == (0, 2, "fresh")
    code, verified = run("snapshot", "verify", "--home", home)
    assert (code, verified["verified"]) == (0, 3)
    _, listed = run("journal", "list", "--home", home)
    token = next(r["facts"]["token_key"] for r in listed["records"] if r["kind"] == "authorization")
    code, record = run("snapshot", "lookup", token, "--home", home)
    assert (code, record["status"], record["token_key"]) == (0, "active", token)
    assert run("snapshot", "lookup", "00" * 16, "--home", home)[0] == 7
    assert run("snapshot", "lookup", "xyz", "--home", home)[0] == 3


def test_every_changed_byte_of_a_snapshot_is_refused(told: Told, run: Run, tmp_path: Path) -> None:
    home = told[0] / "gateway"
    original = next((home / "snapshots").glob("*.snapshot")).read_bytes()
    for at in range(0, len(original), 97):
        changed = tmp_path / "changed.snapshot"
        changed.write_bytes(original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :])
        code, answer = run("snapshot", "verify", "--file", changed, "--home", home)
        assert code in (3, 4), (at, answer)
        assert answer["error"]["reason"]


def test_the_ledger_tells_what_it_holds(told: Told, run: Run) -> None:
    home = told[0] / "ledger"
    code, shown = run("ledger", "show", "--home", home)
    assert (code, shown["verdicts"], shown["out_of_balance_minor"]) == (0, {"posted": 6}, 0)
    code, listed = run("ledger", "account", "list", "--home", home)
    assert [account["holder"] for account in listed["accounts"]] == ["Mei", "Tom", "Eve"]
    mei = listed["accounts"][0]
    assert mei["outstanding_minor"] == 24_310
    assert mei["limit_minor"] == mei["outstanding_minor"] + mei["reserve_minor"] + mei["free_minor"]


def test_what_is_not_running_is_said_with_what_to_do(told: Told, run: Run) -> None:
    home = told[0] / "gateway"
    for command in (["gateway", "status"], ["payment", "start", "1.00"], ["gateway", "synchronise"]):
        code, answer = run(*command, "--home", home)
        assert (code, answer["error"]["advice"]) == (5, "start it: pos-gateway gateway serve")


def test_the_doctor_names_each_thing(told: Told, run: Run, virtual_reader: VirtualReader) -> None:
    code, answer = run("doctor", "--home", told[0] / "gateway")
    findings = {finding["name"]: finding for finding in answer["findings"]}
    assert code == 0
    assert [n for n, f in findings.items() if f["health"] == "warn"] == ["ledger", "gateway"]
    assert virtual_reader.names[0] in findings["reader"]["text"]
    code, answer = run("doctor", "--home", told[0] / "nowhere")
    assert code == 1
    failing = {f["name"] for f in answer["findings"] if f["health"] == "fail"}
    assert {"enrolment", "snapshot"} <= failing
    assert all(f["advice"] for f in answer["findings"] if f["health"] == "fail")


def test_a_card_is_read_saved_and_verified_again(
    told: Told, run: Run, virtual_reader: VirtualReader, tmp_path: Path
) -> None:
    home, saved = told[0] / "gateway", tmp_path / "dialogue.json"
    card = next(path for path in told[0].glob("acc*.card.json"))
    personalisation = Personalisation.from_json(card.read_text())
    virtual_reader.insert(card, state=tmp_path / "state")
    code, read = run(
        "card", "read", "--home", home, "--reader", virtual_reader.names[0], "--save", saved, "--wait", "20"
    )
    assert (code, read["authentic"], read["token_last4"]) == (0, True, personalisation.pan[-4:])
    assert json.loads((tmp_path / "state").read_text())["counter"] == personalisation.counter
    assert saved.stat().st_mode & 0o077 == 0

    code, verified = run("card", "verify", saved)
    assert (code, verified["authentic"]) == (0, True)
    code, verified = run("card", "verify", saved, "--pinned", "--home", home)
    assert (code, verified["authentic"]) == (0, True)

    document = json.loads(saved.read_text())
    for holder, name in [
        (document, "pdol_values"),
        (document, "cdol1_values"),
        (document, "answer"),
        (document["records"][2], "data"),
        (document["ca_key"], "modulus"),
    ]:
        original = holder[name]
        for at in range(0, len(original), 34):
            holder[name] = original[:at] + f"{int(original[at], 16) ^ 1:X}" + original[at + 1 :]
            changed = tmp_path / "changed.json"
            changed.write_text(json.dumps(document))
            code, verified = run("card", "verify", changed)
            assert (code, verified["authentic"]) == (1, False), (name, at)
            assert verified["failed_step"], (name, at)
        holder[name] = original


def test_a_card_that_is_not_ours_is_refused_politely(
    told: Told, run: Run, virtual_reader: VirtualReader
) -> None:
    virtual_reader.insert(ForeignCard.SCHEME)
    code, answer = run(
        "card", "read", "--home", told[0] / "gateway", "--reader", virtual_reader.names[0], "--wait", "20"
    )
    assert (code, answer["error"]["code"]) == (1, "CardNotSupported")


def test_a_used_enrolment_code_and_a_wrong_one(run: Run, tmp_path: Path) -> None:
    code, answer = run(
        "gateway", "enroll", "--ledger", "https://127.0.0.1:1", "--code", "NOPE", "--home", tmp_path / "g"
    )
    assert (code, answer["error"]["code"]) == (3, "InvalidMessage")
    assert "NOPE" not in json.dumps(answer)


def test_amounts_are_exact_or_refused(told: Told, run: Run) -> None:
    for amount in ("1.999", "abc", "1e3"):
        assert run("payment", "start", amount, "--home", told[0] / "gateway")[0] == 3


def test_a_wrong_setting_is_named_with_its_line(say: Callable[..., str], told: Told, tmp_path: Path) -> None:
    """As docs/operating.md shows it."""
    home = tmp_path / "gateway"
    home.mkdir()
    (home / "gateway.toml").write_text("[http]\nprot = 8155\n")
    said = say("gateway", "serve", "--home", home)
    assert "unknown key 'http.prot' at" in said
    assert "gateway.toml line 2" in said
    assert "did you mean 'port'?" in said


def test_every_command_explains_itself(say: Callable[..., str]) -> None:
    assert all(noun in say("--help") for noun in cli.NOUNS)
    for noun in cli.NOUNS:
        assert "--help" in say(noun, "--help")


def test_the_version(say: Callable[..., str]) -> None:
    assert say("--version").startswith("pos-gateway 0.")


def test_a_ledgers_tables_are_migrated_and_a_restore_is_told(told: Told, run: Run, tmp_path: Path) -> None:
    home = tmp_path / "ledger"
    shutil.copytree(told[0] / "ledger", home)
    assert run("ledger", "migrate", "--home", home) == (0, {"before": HEAD, "after": HEAD})
    assert run("ledger", "migrate", "--to", "0001", "--home", home)[0] == 0
    code, answer = run("ledger", "show", "--home", home)
    assert (code, "ledger migrate" in answer["error"]["advice"]) == (3, True)
    assert run("ledger", "migrate", "--home", home)[0] == 0
    code, replayed = run("ledger", "restored", "--home", home)
    # Version 1 had no place for the grant and the note.
    assert (code, replayed) == (0, {"snapshots": 0, "publications": 2, "unknown_tokens": 0})


def test_a_database_password_is_not_taken_from_the_command_line(run: Run, tmp_path: Path) -> None:
    url = "postgresql://me:hunter2@localhost/ledger"
    code, answer = run("ledger", "init", "--issuer", "X", "--database", url, "--home", tmp_path / "l")
    assert (code, "pgpass" in answer["error"]["advice"]) == (3, True)
    assert "hunter2" not in str(answer)
    assert not (tmp_path / "l").exists()


def test_money_limits_and_suspension_on_the_command_line(run: Run, tmp_path: Path) -> None:
    home = tmp_path / "ledger"
    assert run("ledger", "init", "--issuer", "X", "--home", home)[0] == 0
    _, account = run("ledger", "account", "open", "--holder", "Li", "--limit", "100", "--home", home)
    who = account["id"]
    for _ in range(2):
        code, got = run("ledger", "vault", "lock", who, "50", "--reference", "in", "--home", home)
        assert (code, got["limit_minor"], got["free_minor"]) == (0, 15_000, 10_000)
    assert run("ledger", "vault", "final", who, "in", "--home", home)[1]["free_minor"] == 15_000
    _, got = run("ledger", "vault", "unlock", who, "20", "--reference", "out", "--home", home)
    assert (got["vault_minor"], got["vault_leaving_minor"], got["limit_minor"]) == (3_000, 0, 13_000)
    _, got = run("ledger", "account", "limit", who, "40", "--home", home)
    assert (got["limit_minor"], got["target_limit_minor"]) == (7_000, 7_000)
    run("ledger", "repayment", "receive", who, "5", "--reference", "r", "--home", home)
    assert run("ledger", "repayment", "bounced", who, "r", "--home", home)[1]["state"] == "bounced"
    assert run("ledger", "repayment", "final", who, "r", "--home", home)[0] == 6
    _, listed = run("ledger", "repayment", "list", who, "--home", home)
    assert {row["reference"] for row in listed["movements"]} == {"in", "out", "r"}
    assert run("ledger", "review", "list", "--home", home) == (0, {"reviews": []})
    assert run("ledger", "conflict", "list", "--home", home) == (0, {"conflicts": []})
    assert run("ledger", "conflict", "export", "x", "--home", home)[0] == 3
    assert run("ledger", "snapshot", "urgent", "--home", home) == (0, {"version": None})
    suspended = run("ledger", "gateway", "suspend", "gw-none", "--reason", "lost", "--home", home)
    assert suspended[0] == 7
    (tmp_path / "none.conflict").write_text("{}")
    assert run("conflict", "verify", tmp_path / "none.conflict")[0] == 3
    assert run("conflict", "verify", tmp_path / "missing")[0] == 7
