"""Tomorrow's program: this one, with another form of the journal. Run as a process by `upgrade`.

python -m pos_gateway.lab.faults.tomorrow WORDS…            its command line
python -m pos_gateway.lab.faults.tomorrow --pay FOLDER N    its till takes N payments; prints their ids
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from sqlite_utils import Database

from pos_gateway.gateway import journal_file
from pos_gateway.gateway.till import Approved
from pos_gateway.lab.faults.site import AMOUNT_MINOR
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger.config import Policy
from pos_gateway.records import uuid7

_LIMIT_MINOR = 100_000


def _form_of_tomorrow(db: Database) -> None:
    db.execute("CREATE TABLE tomorrow (seq INTEGER PRIMARY KEY, at TEXT NOT NULL) STRICT")
    db.execute("INSERT INTO tomorrow SELECT seq, 'before' FROM journal")
    db.execute(
        "CREATE TRIGGER tomorrow_follows AFTER INSERT ON journal BEGIN "
        "INSERT INTO tomorrow VALUES (NEW.seq, 'since'); END"
    )


def pay(shop: Shop, count: int) -> list[str]:
    """A new card pays so often."""
    _, personalisation = shop.issue(limit_minor=_LIMIT_MINOR)
    shop.publish()
    card, paid = VirtualCard(personalisation), []
    for _ in range(count):
        payment_id = uuid7(shop.ledger.now_unix_ms(), os.urandom(10))
        payment = shop.till.new_payment(payment_id, AMOUNT_MINOR, shop.journal.last_sequence + 1)
        outcome = shop.till.tap(payment, DirectChannel(card))
        if isinstance(outcome, Approved):
            paid.append(str(payment_id))
    return paid


def _run(words: list[str]) -> None:
    journal_file._MIGRATIONS(name="m9999_of_tomorrow")(_form_of_tomorrow)
    if words[:1] == ["--pay"]:
        with Shop(Path(words[1]), policy=Policy(card_tc_rate_limit=1_000_000)) as shop:
            print("\n".join(pay(shop, int(words[2]))))
    else:
        runpy.run_module("pos_gateway.cli", run_name="__main__")


if __name__ == "__main__":
    _run(sys.argv[1:])
