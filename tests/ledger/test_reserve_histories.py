"""Short random histories through the whole ledger: genuine cryptograms, real books, published files."""

from __future__ import annotations

import contextlib
import random

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger import Ledger
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.movements import Purpose, State
from pos_gateway.records import Kind, Record, Verdict
from tests.ledger.shop import Clock, Shop

DAY_S = 24 * 3600
STEPS = 40


@pytest.fixture
def dialect() -> str:
    # What the two databases do differently has its own tests.
    return "sqlite"


@pytest.mark.parametrize("seed", range(3))
def test_honest_taps_in_time_are_posted_and_nobody_is_over_the_limit(
    seed: int, ledger: Ledger, clock: Clock, icc_key: rsa.RSAPrivateKey
) -> None:
    draw = random.Random(seed)
    ledger.set_policy(Policy(valid_s=2 * DAY_S, presentment_deadline_s=3 * DAY_S, token_share_percent=80))
    account = ledger.open_account(holder="Li Na", limit_minor=20_000)
    cards = [VirtualCard(ledger.issue_token(account.id, icc_key=icc_key).personalisation) for _ in range(2)]
    ledger.publish()
    shops = [Shop.enrol(ledger) for _ in range(2)]
    queues: list[list[tuple[Record, float]]] = [[], []]
    paid: list[tuple[Shop, Record, int]] = []
    repaid = 0
    for _ in range(STEPS):
        which = draw.randrange(2)
        shop, queue = shops[which], queues[which]
        match draw.choice(
            ["tap", "tap", "tap", "present", "present", "publish", "wait", "repay", "bank", "line"]
        ):
            case "tap":
                amount = draw.randrange(100, 4_000)
                # Over its ceiling the card answers ARQC.
                with contextlib.suppress(AssertionError):
                    queue.append((shop.tap(draw.choice(cards), amount), clock.now_s))
            case "present" if queue:
                draw.shuffle(queue)
                record, at_s = queue.pop()
                verdict = shop.verdict(record)
                if clock.now_s <= at_s + 3 * DAY_S:
                    assert verdict is Verdict.POSTED, seed
                if verdict is Verdict.POSTED:
                    paid.append((shop, record, record.facts()["amount_minor"]))
            case "publish":
                ledger.publish()
            case "wait":
                clock.now_s += draw.randrange(2 * DAY_S)
                ledger.publish()  # no shop approves under limits that have expired
            case "repay":
                repaid += 1
                ledger.receive(
                    account.id,
                    Purpose.REPAYMENT,
                    reference=f"r{repaid}",
                    amount_minor=draw.randrange(1, 3_000),
                )
            case "bank":
                for movement in ledger.movements(account.id):
                    if movement.state is State.UNCLEARED:
                        ledger.settle_movement(account.id, movement.reference, final=draw.random() < 0.5)
            case "line":
                ledger.set_line(account.id, draw.choice([0, 10_000, 20_000]))
        if paid and draw.random() < 0.1:
            at, record, amount = paid.pop()
            assert at.verdict(at.correct(Kind.REVERSAL, record, amount)) is Verdict.POSTED
        ledger.check_books()
        now = ledger.account(account.id)
        assert now.outstanding_minor + now.uncleared_minor + now.reserve_minor <= now.limit_minor <= 20_000
