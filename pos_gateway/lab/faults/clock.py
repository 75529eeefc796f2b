"""`clock`: the till's and the ledger's clocks jump, forward and back, between payments; then the clock of
the real gateway program, under load."""

from __future__ import annotations

import random
import time
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final
from uuid import UUID

from pos_gateway.gateway.config import Home
from pos_gateway.gateway.program import local_now
from pos_gateway.gateway.till import Approved, Declined
from pos_gateway.lab.faults.finding import Finding
from pos_gateway.lab.faults.shim import WrongClock, build
from pos_gateway.lab.faults.site import AMOUNT_MINOR, Audit, Customer, Site, audit, copied
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.ledger import Ledger
from pos_gateway.records import Kind, presentment_body, sign_batch, uuid7

SHORT_JUMPS: Final = 24
LONG_JUMPS: Final = 1000
_JUMPS_S: Final = (-200, -20, 1, 30, 200)
"""Within what a till tolerates; together they may come to more."""
_WILD_S: Final = (-20 * 365 * 86_400, -86_400, -3_600, 3_600, 86_400, 30 * 86_400, 20 * 365 * 86_400)
_TAPS_EACH: Final = 2
_SHOPS: Final = 3
_LIMIT_MINOR: Final = 100_000_000


class _Clock:
    def __init__(self) -> None:
        self.ahead_s = 0

    def local(self) -> datetime:
        return local_now() + timedelta(seconds=self.ahead_s)

    def unix_s(self) -> float:
        return time.time() + self.ahead_s


def clock(folder: Path, seed: int, *, jumps: int, ledger: Path | None = None) -> Finding:
    """Several shops, each with so many jumps of its till's clock and a ledger whose clock jumps too.

    A jump may make a till decline; it may never make it approve what the ledger will not post, fail, or
    forget. A journal is never told earlier times than it has seen, but for what is tolerated.
    """
    chance = random.Random(seed)
    acknowledged = lost = twice = off_minor = 0
    wrong: list[str] = []
    outcomes: Counter[str] = Counter()
    for number in range(_SHOPS):
        place = copied(ledger, folder / f"shop-{number}")
        shown = _one_shop(place, chance, jumps // _SHOPS, outcomes, wrong)
        truth = audit(Home(place / "gateway"), place / "ledger", shown)
        acknowledged += len(shown)
        lost += truth.lost
        twice += truth.posted_twice
        off_minor += truth.out_of_balance_minor
        wrong += truth.wrong
    program = _Program(folder / "program", chance, ledger)
    program.run(jumps // _SHOPS)
    acknowledged += program.acknowledged
    lost += program.truth.lost
    twice += program.truth.posted_twice
    off_minor += program.truth.out_of_balance_minor
    wrong += [*program.wrong, *program.truth.wrong]
    if not outcomes["approved"]:
        wrong.append("nothing was approved at all")
    return Finding(
        scenario="clock",
        seed=seed,
        tried="the till's clock jumps by seconds to 20 years, forward and back; the ledger's by a day; then "
        "the same with the real gateway program under load, confirmed by a manager when it is right again",
        times=(_SHOPS + 1) * (jumps // _SHOPS),
        acknowledged=acknowledged,
        lost=lost,
        posted_twice=twice,
        out_of_balance_minor=off_minor,
        wrong=tuple(wrong),
        details={"outcomes": dict(outcomes), "program_outcomes": dict(program.outcomes)},
    )


class _Program:
    """The gateway as a process whose wall clock is wrong, and a customer who pays all the while."""

    def __init__(self, folder: Path, chance: random.Random, ledger: Path | None) -> None:
        copied(ledger, folder)
        self._folder = folder
        self._chance = chance
        self.acknowledged = 0
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.truth = Audit(0, 0, 0, 0, 0, ())

    def run(self, jumps: int) -> None:
        clock = WrongClock(build(self._folder), self._folder / "clock")
        with Site(self._folder, clock=clock) as site:
            site.reach_ledger_at(site.start_ledger())
            site.start_gateway()
            with Customer(site) as customer:
                for number in range(jumps):
                    customer.wait_for(2)
                    # Every third leaves what a till tolerates; the manager sets it right afterwards.
                    wild = number % 3 == 2
                    clock.set(self._chance.choice(_WILD_S if wild else _JUMPS_S))
                    time.sleep(self._chance.uniform(0.1, 0.4))
                    clock.set(0.0)
                    if self._chance.random() < 0.3 and site.gateway is not None:
                        site.gateway.kill()
                        site.start_gateway()
                    self._confirm(site)
                customer.wait_for(2)
                customer.stop()
            site.drain()
            site.stop()
        self.acknowledged = len(customer.approved)
        self.outcomes = Counter({**customer.other, "approved": len(customer.approved)})
        self.truth = audit(site.home, site.ledger_home, customer.approved)

    def _confirm(self, site: Site) -> None:
        answer = site.ask("POST", "/v1/clock", {"time_unix_ms": time.time_ns() // 1_000_000})
        if "error" in answer:
            self.wrong.append(f"the right time was refused: {answer['error']['reason']}")


def _one_shop(
    place: Path, chance: random.Random, jumps: int, outcomes: Counter[str], wrong: list[str]
) -> list[UUID]:
    clock = _Clock()
    shown: list[UUID] = []
    with Shop(place, policy=Policy(card_tc_rate_limit=1_000_000), clock=clock.local) as shop:
        _, personalisation = shop.issue(limit_minor=_LIMIT_MINOR)
        shop.publish()
        card = VirtualCard(personalisation)
        for number in range(jumps):
            before = clock.ahead_s
            # A wild jump forward is remembered for ever: only the last third dares any.
            clock.ahead_s += chance.choice(_JUMPS_S if number < jumps * 2 // 3 else _WILD_S)
            for _ in range(_TAPS_EACH):
                _tap(shop, card, clock, shown, outcomes, wrong)
            if abs(clock.ahead_s - before) > max(_JUMPS_S) and chance.random() < 0.5:
                clock.ahead_s = before
                _tap(shop, card, clock, shown, outcomes, wrong)
        journal, key, gateway_id = shop.journal, shop.key, shop.enrolment.gateway_id
        records = [r for r in journal.records(0, 100_000) if r.kind is Kind.AUTHORIZATION]
    for ahead_s in (-86_400, 0, 86_400):
        ledger_clock = _Clock()
        ledger_clock.ahead_s = ahead_s
        with Ledger.open(place / "ledger", clock=ledger_clock.unix_s) as books:
            for at in range(0, len(records), 100):
                body = presentment_body(gateway_id, records[at : at + 100])
                books.present(gateway_id, body, sign_batch(body, key))
    return shown


def _tap(
    shop: Shop,
    card: VirtualCard,
    clock: _Clock,
    shown: list[UUID],
    outcomes: Counter[str],
    wrong: list[str],
) -> None:
    now_unix_ms = max(0, int(clock.unix_s() * 1000))
    latest_unix_ms = shop.journal.latest_at_unix_ms
    payment = shop.till.new_payment(
        uuid7(now_unix_ms, random.SystemRandom().randbytes(10)), AMOUNT_MINOR, shop.journal.last_sequence + 1
    )
    outcome = shop.till.tap(payment, DirectChannel(card))
    if isinstance(outcome, Approved):
        outcomes["approved"] += 1
        shown.append(payment.id)
        behind_s = (latest_unix_ms - now_unix_ms) // 1000
        if behind_s > shop.settings.clock.tolerance_s:
            wrong.append(f"approved with a clock {behind_s} s behind the journal")
    elif isinstance(outcome, Declined):
        outcomes[outcome.decline.reason.value] += 1
    else:
        wrong.append(f"a card in the field was asked to tap again: {outcome}")
