"""The hardware suite as a tester meets it: it asks, she does, it reports. Her hands are this test's, her
reader is a virtual one that the suite takes for a real one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from pos_gateway.lab.scripted_card import Dialogue
from pos_gateway.lab.virtual_reader import VirtualReader
from pos_gateway.lab.vpcd import Fault, FaultKind
from pos_gateway.ledger.keys import ICC_KEY_BITS, generate_rsa_key
from pos_gateway.ledger.ledger import Ledger

CHECKOUT = Path(__file__).parents[2]


class Hands:
    """The tester's: they do what is asked."""

    def __init__(self, virtual: VirtualReader, card: Path, state: Path) -> None:
        self._virtual, self._card, self._state = virtual, card, state
        self.asked: list[str] = []

    def hear(self, sentence: str) -> str | None:
        """Her answer, if one is wanted."""
        self.asked.append(sentence)
        if sentence.startswith("Hold the card"):
            self._virtual.insert(self._card, state=self._state)
        elif sentence.startswith("Touch the reader"):
            fault = Fault(FaultKind.REMOVE_AFTER, apdu_number=3)
            self._virtual.insert(self._card, state=self._state, faults=[fault])
        elif sentence.startswith("Take the card away"):
            self._virtual.remove()
        elif sentence.startswith("Unplug"):
            self._virtual.kill_pcscd()
        elif sentence.startswith("Plug"):
            self._virtual.start_pcscd()
        else:
            assert sentence.endswith("[y/n]"), sentence
            return "y\n"
        return None


def run(virtual: VirtualReader, tester: Hands, *arguments: str) -> tuple[int, str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "tests/hil", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=CHECKOUT,
        env={**os.environ, **virtual.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    said = []
    with process:
        for line in process.stdout:
            said.append(line)
            if line.startswith(">>> "):
                answer = tester.hear(line.removeprefix(">>> ").strip())
                if answer is not None:
                    process.stdin.write(answer)
                    process.stdin.flush()
    return process.returncode, "".join(said)


@pytest.fixture
def issued(ledger_home: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A test ledger's home and the card it issued."""
    home, card = tmp_path / "ledger", tmp_path / "card.json"
    shutil.copytree(ledger_home, home)
    ledger = Ledger.open(home)
    account = ledger.open_account(holder="A. Hands", limit_minor=1_000_000)
    token = ledger.issue_token(account.id, icc_key=generate_rsa_key(ICC_KEY_BITS))
    card.write_text(token.personalisation.to_json())
    ledger.close()
    return home, card


def test_a_tester_with_a_card_of_ours(issued: tuple[Path, Path], tmp_path: Path) -> None:
    home, card = issued
    with VirtualReader(slots=1) as virtual:
        tester = Hands(virtual, card, tmp_path / "state")
        code, said = run(
            virtual, tester, "--reader", "lab reader 0 00 00", "--card-home", str(home),
            "--hil-report", str(tmp_path / "report"),
        )  # fmt: skip
    assert code == 0, said
    for sentence in ("Hold", "Touch", "Take", "Unplug", "Plug"):
        assert any(asked.startswith(sentence) for asked in tester.asked), sentence
    report = tmp_path / "report"
    page = (report / "report.html").read_text()
    for words in ("POS Gateway lab reader 0 00 00", "firmware", "not told", "whole tap", "passed", "9000"):
        assert words in page, words
    pan = json.loads(card.read_text())["pan"]
    assert pan not in page
    suite = ElementTree.parse(report / "junit.xml").getroot()[0]  # noqa: S314 - our own pytest wrote it
    assert int(suite.get("tests", "0")) > 40
    assert suite.get("failures") == suite.get("errors") == "0"
    properties = {p.get("name"): p.get("value") for p in suite.iter("property")}
    assert properties["reader"] == "POS Gateway lab reader 0 00 00"
    assert "firmware" in properties
    dialogues = sorted((report / "dialogues").glob("*.json"))
    assert len(dialogues) > 40
    assert all(path.stat().st_mode & 0o077 == 0 for path in dialogues)
    assert Dialogue.from_json(dialogues[0].read_text()).told["reader"] == "POS Gateway lab reader 0 00 00"


def test_a_tester_with_any_card(issued: tuple[Path, Path], tmp_path: Path) -> None:
    with VirtualReader(slots=1) as virtual:
        tester = Hands(virtual, issued[1], tmp_path / "state")
        code, said = run(virtual, tester, "--reader", "lab reader 0 00 00", "-rs")
    assert code == 0, said
    assert "no issuer for the tester's card: --card-home" in said


def test_the_virtual_card_on_the_other_driver(issued: tuple[Path, Path], tmp_path: Path) -> None:
    with VirtualReader(slots=1) as virtual:
        hands = Hands(virtual, issued[1], tmp_path / "state")
        code, said = run(virtual, hands, "--reader", "udp", "--hil-report", str(tmp_path / "report"))
    assert code == 0, said
    assert not hands.asked
    assert "firmware</th><td>UDP" in (tmp_path / "report" / "report.html").read_text()


def test_a_reader_that_is_not_there(issued: tuple[Path, Path], tmp_path: Path) -> None:
    with VirtualReader(slots=1) as virtual:
        tester = Hands(virtual, issued[1], tmp_path / "state")
        code, said = run(virtual, tester, "--reader", "ACS ACR122U", "-k", "says_what")
    assert code == 1
    assert "no PC/SC reader whose name holds 'ACS ACR122U'" in said
