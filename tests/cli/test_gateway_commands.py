"""Commands against programs that run: a real gateway with a card in its field, a real ledger, real TLS."""

from __future__ import annotations

import getpass
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pos_gateway.cli import main as cli
from pos_gateway.gateway.identity import load_enrolment
from pos_gateway.lab.faults.site import Site, copied
from pos_gateway.records import Kind

Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, ledger_home: Path) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("running") / "site"
    with Site(copied(ledger_home, folder)) as site:
        site.reach_ledger_at(site.start_ledger())
        site.start_gateway()
        yield site


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


@pytest.fixture
def paid(site: Site, run: Run) -> dict[str, Any]:
    """An approved payment of 12.30."""
    code, view = run("payment", "start", "12.30", "--home", site.home.path)
    assert (code, view["state"]) == (0, "approved"), view
    return view


def journalled(run: Run, site: Site, kind: Kind) -> list[dict[str, Any]]:
    _, listed = run("journal", "list", "--home", site.home.path, "--limit", "1000")
    return [record for record in listed["records"] if record["kind"] == kind.value]


def test_a_payment_is_voided_once(site: Site, run: Run, paid: dict[str, Any]) -> None:
    void_id = str(uuid.uuid4())
    void = (
        "payment",
        "void",
        paid["id"],
        "--id",
        void_id,
        "--reason",
        "wrong item",
        "--home",
        site.home.path,
    )
    before = len(journalled(run, site, Kind.REVERSAL))
    code, voided = run(*void)
    assert (code, voided["id"], voided["amount_minor"]) == (0, void_id, 1230)
    assert voided["sequence"] > paid["sequence"]
    assert run(*void) == (0, voided), "the same again is the same void"
    code, answer = run("payment", "void", paid["id"], "--home", site.home.path)
    assert (code, bool(answer["error"]["reason"])) == (6, True)
    code, _ = run("payment", "refund", paid["id"], "1.00", "--home", site.home.path)
    assert code == 6
    [record] = journalled(run, site, Kind.REVERSAL)[before:]
    assert (record["facts"]["about"], record["facts"]["reason"]) == (paid["id"], "wrong item")


def test_a_payment_is_refunded_in_parts_and_never_beyond(site: Site, run: Run, paid: dict[str, Any]) -> None:
    home = site.home.path
    refund_id = str(uuid.uuid4())
    part = ("payment", "refund", paid["id"], "10.00", "--id", refund_id, "--reason", "broken", "--home", home)
    code, given = run(*part)
    assert (code, given["id"], given["amount_minor"]) == (0, refund_id, 1000)
    assert run(*part) == (0, given)
    for amount, expected in (("2.31", 6), ("0", 6), ("1.999", 3), ("abc", 3)):
        code, answer = run("payment", "refund", paid["id"], amount, "--home", home)
        assert (code, bool(answer["error"]["reason"])) == (expected, True), (amount, answer)
    # The same id for another amount is neither the old refund nor a new one.
    changed = ("payment", "refund", paid["id"], "2.00", "--id", refund_id, "--home", home)
    assert run(*changed)[0] == 6
    code, rest = run("payment", "refund", paid["id"], "2.30", "--home", home)
    assert (code, rest["amount_minor"]) == (0, 230)
    code, _ = run("payment", "refund", paid["id"], "0.01", "--home", home)
    assert code == 6
    assert run("payment", "void", paid["id"], "--home", home)[0] == 6


def test_voids_and_refunds_reach_the_ledger(site: Site, run: Run, paid: dict[str, Any]) -> None:
    home = site.home.path
    assert run("payment", "refund", paid["id"], "0.30", "--home", home)[0] == 0
    _, other = run("payment", "start", "5.00", "--home", home)
    assert run("payment", "void", other["id"], "--home", home)[0] == 0
    deadline = time.monotonic() + 60
    while run("gateway", "status", "--home", home)[1]["queue"]["count"]:
        assert time.monotonic() < deadline
        run("gateway", "synchronise", "--home", home)
        time.sleep(0.1)
    code, shown = run("ledger", "show", "--home", site.ledger_home)
    assert (code, shown["out_of_balance_minor"], set(shown["verdicts"])) == (0, 0, {"posted"})


def test_what_there_is_nothing_to_take_back_from(site: Site, run: Run) -> None:
    home = site.home.path
    for command in (["void"], ["refund"]):
        amount = ["1.00"] if command == ["refund"] else []
        assert run("payment", *command, str(uuid.uuid4()), *amount, "--home", home)[0] == 7
        code, answer = run("payment", *command, "not-a-uuid", *amount, "--home", home)
        assert (code, "UUID" in answer["error"]["reason"]) == (3, True)
        nowhere = home.parent / "nowhere"
        code, answer = run("payment", *command, str(uuid.uuid4()), *amount, "--home", nowhere)
        assert (code, "gateway serve" in answer["error"]["advice"]) == (5, True)


def test_a_void_and_a_refund_are_told_to_people(
    run: Run, site: Site, say: Callable[..., str], paid: dict[str, Any]
) -> None:
    home = site.home.path
    assert "Void: 12.30 CNY. Journal record" in say("payment", "void", paid["id"], "--home", home)
    _, other = run("payment", "start", "5.00", "--home", home)
    assert "Refunded: 2.30 CNY." in say("payment", "refund", other["id"], "2.30", "--home", home)
    said = say("payment", "refund", other["id"], "2.71", "--home", home)
    assert said.startswith("pos-gateway: ")


def test_status_and_doctor_tell_of_the_certificate(
    site: Site, run: Run, say: Callable[..., str], tmp_path: Path
) -> None:
    home = site.home.path
    code, status = run("gateway", "status", "--home", home)
    certificate = status["certificate"]
    assert (code, certificate["due_unix_s"] < certificate["until_unix_s"]) == (0, True)
    assert "certificate: " in say("gateway", "status", "--home", home)
    _, answer = run("doctor", "--home", home)
    finding = {f["name"]: f for f in answer["findings"]}
    assert "until" in finding["certificate"]["text"]
    alone = tmp_path / "alone"
    shutil.copytree(home, alone)
    (alone / "tls.pem").unlink()
    _, answer = run("doctor", "--home", alone)
    finding = {f["name"]: f for f in answer["findings"]}
    assert (finding["certificate"]["health"], bool(finding["certificate"]["advice"])) == ("warn", True)
    assert (finding["ledger"]["health"], "none was shown" in finding["ledger"]["text"]) == ("warn", True)


def test_a_gateway_is_suspended_reinstated_and_revoked(site: Site, run: Run, say: Callable[..., str]) -> None:
    gateway_id = load_enrolment(site.home.enrolment).enrolment.gateway_id
    ledger = ("--home", site.ledger_home)
    code, listed = run("ledger", "gateway", "list", *ledger)
    [row] = listed["gateways"]
    assert (code, row["id"], row["status"]) == (0, gateway_id, "active")
    assert row["certificate_until"]
    assert "active" in say("ledger", "gateway", "list", *ledger)

    why = ("--reason", "odd sales", "--by", "Lin")
    code, shown = run("ledger", "gateway", "suspend", gateway_id, *why, *ledger)
    assert (code, shown["status"]) == (0, "suspended")
    _, view = run("payment", "start", "1.00", "--home", site.home.path)
    assert view["state"] == "approved", "a till that cannot know goes on within its limits"
    site.drain()
    _, answer = run("ledger", "review", "list", *ledger)
    assert [review["gateway_id"] for review in answer["reviews"]] == [gateway_id], "held, not posted"
    _, answer = run("doctor", "--home", site.home.path)
    finding = {f["name"]: f for f in answer["findings"]}
    assert (finding["ledger"]["health"], "suspended" in finding["ledger"]["text"]) == ("warn", True)
    code, shown = run("ledger", "gateway", "reinstate", gateway_id, "--reason", "looked into", *ledger)
    assert (code, shown["status"]) == (0, "active")
    site.drain()

    code, shown = run("ledger", "gateway", "revoke", gateway_id, "--reason", "stolen", "--by", "Lin", *ledger)
    assert (code, shown["status"], shown["certificate_until"]) == (0, "revoked", None)
    history = [(h["action"], h["by"], h["reason"]) for h in shown["history"]]
    assert history == [
        ("suspend", "Lin", "odd sales"),
        ("reinstate", getpass.getuser(), "looked into"),
        ("revoke", "Lin", "stolen"),
    ]
    assert run("ledger", "gateway", "show", gateway_id, *ledger) == (0, shown)
    assert "revoke by Lin: stolen" in say("ledger", "gateway", "show", gateway_id, *ledger)
    run("payment", "start", "1.00", "--home", site.home.path)
    told(site, run, "revoked by the issuer")
    _, answer = run("doctor", "--home", site.home.path)
    finding = {f["name"]: f for f in answer["findings"]}
    assert (finding["ledger"]["health"], "revoked" in finding["ledger"]["text"]) == ("warn", True)

    assert run("ledger", "gateway", "reinstate", gateway_id, "--reason", "x", *ledger)[0] == 6
    assert run("ledger", "gateway", "suspend", "gw-x", "--reason", "x", *ledger)[0] == 7
    assert run("ledger", "gateway", "show", "gw-x", *ledger)[0] == 4
    assert run("ledger", "gateway", "revoke", gateway_id, "--reason", "", *ledger)[0] == 3


def told(site: Site, run: Run, problem: str) -> None:
    """The staff see it on the till."""
    deadline = time.monotonic() + 30
    while problem not in run("gateway", "status", "--home", site.home.path)[1]["line"]["problem"]:
        assert time.monotonic() < deadline
        run("gateway", "synchronise", "--home", site.home.path)
        time.sleep(0.1)


def test_the_server_s_certificate_is_shown_and_renewed(run: Run, ledger_home: Path, tmp_path: Path) -> None:
    home = tmp_path / "ledger"
    shutil.copytree(ledger_home, home)
    before = (home / "keys" / "tls.pem").read_bytes()
    code, shown = run("ledger", "certificate", "show", "--home", home)
    assert (code, len(shown["authority_fingerprint"])) == (0, 64)
    code, renewed = run("ledger", "certificate", "renew", "--home", home)
    assert (code, renewed["authority_fingerprint"]) == (0, shown["authority_fingerprint"])
    assert renewed["server_until"] >= shown["server_until"]
    assert (home / "keys" / "tls.pem").read_bytes() != before
