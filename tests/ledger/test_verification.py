"""Verifying in other processes says the same as verifying here, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from pos_gateway.errors import Unavailable
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger import Ledger
from pos_gateway.ledger.gateways import Gateway
from pos_gateway.ledger.verification import Verifier, _Keys
from pos_gateway.records import Kind
from tests.ledger.shop import Shop


@pytest.fixture
def dialect() -> str:
    return "sqlite"  # no database has a part in it


@pytest.fixture
def verifier(ledger: Ledger) -> Iterator[Verifier]:
    verifier = Verifier(ledger.issuer, 2)
    yield verifier
    verifier.close()


@pytest.fixture
def batch(ledger: Ledger, icc_key: rsa.RSAPrivateKey) -> list[object]:
    account = ledger.open_account(holder="A", limit_minor=100_000)
    card = VirtualCard(ledger.issue_token(account.id, icc_key=icc_key).personalisation)
    ledger.publish()
    shop = Shop.enrol(ledger)
    first = shop.tap(card, 500)
    lying = shop.tap(card, 300, lies={"amount_minor": 400})
    changed = replace(shop.tap(card, 200), body="{}")
    refund = shop.correct(Kind.REFUND, first, 100)
    return [first.to_wire(), lying.to_wire(), changed.to_wire(), refund.to_wire(), "nonsense", {"id": 3}]


def test_other_processes_say_the_same(ledger: Ledger, verifier: Verifier, batch: list[object]) -> None:
    (gateway,) = ledger.gateways()
    here = Verifier(ledger.issuer).examine(gateway, batch)
    assert verifier.examine(gateway, batch) == here
    assert [item.tap is not None for item in here] == [True, False, False, False, False, False]
    assert here[3].correction is not None
    assert [bool(item.reason) for item in here] == [False, True, True, False, True, True]


def test_a_process_that_dies_costs_one_answer(
    ledger: Ledger, verifier: Verifier, batch: list[object]
) -> None:
    (gateway,) = ledger.gateways()
    good = verifier.examine(gateway, batch)
    assert verifier._pool is not None
    for pid in list(verifier._pool._processes):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(Unavailable, match="send the same batch again"):
        _examine_for_ever(verifier, gateway, batch)
    assert verifier.examine(gateway, batch) == good


def _examine_for_ever(verifier: Verifier, gateway: Gateway, batch: list[object]) -> None:
    while True:  # the pool takes a moment to notice
        verifier.examine(gateway, batch)


LEDGER = """
import sys, time
from pathlib import Path
from pos_gateway.ledger import Ledger
if __name__ == "__main__":
    ledger = Ledger.open(Path(sys.argv[1]), verifiers=2)
    (gateway,) = ledger.gateways()
    ledger._verifier.examine(gateway, ["nonsense"] * 8)
    print(*ledger._verifier._pool._processes, flush=True)
    time.sleep(600)
"""


def test_they_end_with_a_ledger_that_is_killed(ledger: Ledger, batch: list[object], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(LEDGER)
    with subprocess.Popen(
        [sys.executable, str(program), str(ledger.home)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert pids
        process.kill()
    while any(_runs(pid) for pid in pids):  # the test's own timeout is the bound
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_keys_are_not_shown(ledger: Ledger) -> None:
    assert repr(_Keys.of(ledger.issuer)) == "_Keys()"
