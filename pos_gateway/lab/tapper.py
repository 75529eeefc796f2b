"""`python -m pos_gateway.lab.tapper FOLDER`: a shop whose one customer taps as fast as she can, until it
is killed. Each approval's payment id is printed the moment a till would show it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Final

from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.gateway.till import Approved
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.records import uuid7

CARD_FILE: Final = "card.json"
STATE_FILE: Final = "card.state"
AMOUNT_MINOR: Final = 7


def run(folder: Path) -> None:
    """Tap for ever."""
    personalisation = Personalisation.from_json((folder / CARD_FILE).read_text())
    card = VirtualCard(personalisation, state_path=folder / STATE_FILE)
    with Shop(folder) as shop:
        while True:
            payment_id = uuid7(time.time_ns() // 1_000_000, os.urandom(10))
            payment = shop.till.new_payment(payment_id, AMOUNT_MINOR, shop.journal.last_sequence + 1)
            outcome = shop.till.tap(payment, DirectChannel(card))
            word = "approved" if isinstance(outcome, Approved) else repr(outcome)
            print(word, payment.id, flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
