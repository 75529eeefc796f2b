"""SIGKILL at any moment: no approval that was shown is lost, none is posted twice.

The shop is a process of its own with a real journal on the disk; the card's counter lives in a file.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from uuid import UUID

import pytest

from pos_gateway.lab.shop import Shop
from pos_gateway.lab.tapper import AMOUNT_MINOR, CARD_FILE
from pos_gateway.ledger.config import Policy
from pos_gateway.records import Kind, Verdict

ROUNDS = 8
LONG_ROUNDS = 200
MOST_TAPS_A_ROUND = 60
STALLED_S = 60


def shown_before_the_kill(folder: Path, taps: int, chance: random.Random) -> list[UUID]:
    """Start the shop, kill it somewhere in the tap after so many, and read what it had shown."""
    shop = subprocess.Popen(
        [sys.executable, "-m", "pos_gateway.lab.tapper", str(folder)], stdout=subprocess.PIPE, text=True
    )
    stalled = threading.Timer(STALLED_S, shop.kill)
    stalled.start()
    shown: list[UUID] = []
    assert shop.stdout is not None
    for line in shop.stdout:
        word, payment_id = line.split()
        assert word == "approved", line
        shown.append(UUID(payment_id))
        if len(shown) == taps:
            threading.Event().wait(chance.uniform(0, 0.004))  # a tap lasts about as long
            shop.kill()
    stalled.cancel()
    shop.wait()
    shop.stdout.close()
    assert len(shown) >= taps, "the shop stalled before it was killed"
    return shown


@pytest.mark.parametrize("rounds", [ROUNDS, pytest.param(LONG_ROUNDS, marks=pytest.mark.long)])
def test_nothing_shown_is_lost_and_nothing_is_posted_twice(
    rounds: int, tmp_path: Path, ledger_home: Path
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    shutil.copytree(ledger_home, tmp_path / "ledger")
    with Shop(tmp_path, policy=Policy(card_tc_rate_limit=1_000_000)) as shop:
        _, personalisation = shop.issue(limit_minor=10_000_000)
        shop.publish()
    (tmp_path / CARD_FILE).write_text(personalisation.to_json())

    shown: list[UUID] = []
    for _ in range(rounds):
        shown += shown_before_the_kill(tmp_path, chance.randrange(1, MOST_TAPS_A_ROUND), chance)

    with Shop(tmp_path) as shop:
        shop.journal.verify()
        recorded: list[UUID] = []
        for _ in range(2):  # the same queue twice, as after an answer that was lost
            after = 0
            while records := shop.journal.records(after, 1000):
                after = records[-1].sequence
                batch = [record for record in records if record.kind is Kind.AUTHORIZATION]
                recorded += [record.id for record in batch]
                assert all(verdict.verdict.paid for verdict in shop.present(batch))
        assert set(shown) <= set(recorded)
        posted = Counter(payment.record_id for payment in shop.ledger.payments())
        assert posted.keys() == set(recorded)
        assert set(posted.values()) == {1}
        assert shop.ledger.verdicts() == {Verdict.POSTED: len(posted)}
        shop.ledger.check_books()
        outstanding_minor = shop.ledger.accounts()[0].outstanding_minor
        assert outstanding_minor == AMOUNT_MINOR * len(posted)
