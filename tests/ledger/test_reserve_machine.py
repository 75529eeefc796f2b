"""The reserve principle under random histories of shops, cards and an issuer: the invariant holds at every
step, what an honest shop approved of an honest card is posted to the customer, and whoever breaks one of the
rules is caught.

    pytest tests/ledger/test_reserve_machine.py           a quick look
    pytest tests/ledger/test_reserve_machine.py --long    10 000 histories
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.ledger.reserve_world import (
    BOUNCE_IGNORED,
    BROKEN_RULES,
    DELTA_EXTENDS,
    FORGETFUL,
    LIMIT,
    SCALAR,
    SHOP_CLOCK,
    Broken,
    Card,
    Shop,
    World,
)

QUICK, MANY = 150, 10_000
STEPS = 50

# What each broken rule needs to show: the same machine, with fewer distractions.
_PAYING = frozenset({"refresh", "tap", "pay", "present", "wait"})
FOCUS = {
    SCALAR: _PAYING,
    SHOP_CLOCK: frozenset({"refresh", "tap", "pay", "lose_a_grant"}),
    DELTA_EXTENDS: frozenset({"refresh", "refresh_delta", "tap", "wait"}),
    FORGETFUL: _PAYING | {"back_up", "restore"},
    BOUNCE_IGNORED: frozenset({"refresh", "pay", "repay", "settle_money"}),
}

which = st.integers(0, 5)
amounts = st.sampled_from([1, 5, 10, 20, 30])
percents = st.sampled_from([10, 40, 100])
lives = st.sampled_from([1, 2, 4, 14])


def _within(name: str) -> Callable[[Any], bool]:
    return lambda machine: machine.focus is None or name in machine.focus


class ReserveMachine(RuleBasedStateMachine):
    """Every step is one that the real world can take."""

    broken: str | None = None
    focus: frozenset[str] | None = None

    @initialize(
        tokens=st.integers(1, 3),
        skews=st.lists(st.sampled_from([-1, 0, 1, 6, -6]), min_size=1, max_size=3),
    )
    def begin(self, tokens: int, skews: list[int]) -> None:
        if self.focus is not None:
            tokens, skews = 1, [6]
        self.world = World(tokens, (0, *skews), self.broken)

    @precondition(_within("publish"))
    @rule(life=lives, percent=percents)
    def publish(self, life: int, percent: int) -> None:
        self.world.publish(life, percent)

    @precondition(_within("publish_delta"))
    @rule(life=lives, listed=st.integers(0, 7))
    def publish_delta(self, life: int, listed: int) -> None:
        self.world.publish(life, listed=listed)

    @precondition(_within("refresh"))
    @rule(life=lives, percent=percents)
    def refresh(self, life: int, percent: int) -> None:
        self.world.publish(life, percent)
        for shop in self.world.shops:
            self.world.fetch(shop, 0)

    @precondition(_within("refresh_delta"))
    @rule(life=lives, listed=st.integers(0, 7))
    def refresh_delta(self, life: int, listed: int) -> None:
        self.world.publish(life, listed=listed)
        for shop in self.world.shops:
            self.world.fetch_delta(shop)

    @precondition(_within("pay"))
    @rule(shop=which, card=which, amount=amounts)
    def pay(self, shop: int, card: int, amount: int) -> None:
        self.world.tap(self._shop(shop), self._card(card), amount, torn=False)
        self.world.present(self._shop(shop), -1)

    @precondition(_within("fetch"))
    @rule(shop=which, back=st.integers(0, 1))
    def fetch(self, shop: int, back: int) -> None:
        self.world.fetch(self._shop(shop), back)

    @precondition(_within("fetch_delta"))
    @rule(shop=which)
    def fetch_delta(self, shop: int) -> None:
        self.world.fetch_delta(self._shop(shop))

    @precondition(_within("tap"))
    @rule(shop=which, card=which, amount=amounts, torn=st.sampled_from([False, False, False, True]))
    def tap(self, shop: int, card: int, amount: int, torn: bool) -> None:
        self.world.tap(self._shop(shop), self._card(card), amount, torn=torn)

    @precondition(_within("tap_online"))
    @rule(shop=which, card=which, amount=amounts, life=lives)
    def tap_online(self, shop: int, card: int, amount: int, life: int) -> None:
        self.world.grant(self._shop(shop), self._card(card), amount, life)
        self.world.tap(self._shop(shop), self._card(card), amount, torn=False)

    @precondition(_within("lose_a_grant"))
    @rule(shop=which, card=which, amount=amounts, life=lives)
    def lose_a_grant(self, shop: int, card: int, amount: int, life: int) -> None:
        self.world.grant(self._shop(shop), self._card(card), amount, life)

    @precondition(_within("present"))
    @rule(shop=which, place=which)
    def present(self, shop: int, place: int) -> None:
        self.world.present(self._shop(shop), place)

    @precondition(_within("synchronise"))
    @rule(shop=which)
    def synchronise(self, shop: int) -> None:
        self.world.synchronise(self._shop(shop))

    @precondition(_within("wait"))
    @rule(span=st.integers(1, 4))
    def wait(self, span: int) -> None:
        self.world.now += span

    @precondition(_within("give_back"))
    @rule(card=which, amount=amounts)
    def give_back(self, card: int, amount: int) -> None:
        self.world.returned(self._card(card), amount)

    @precondition(_within("block"))
    @rule(card=which)
    def block(self, card: int) -> None:
        self.world.books.blocked ^= {self._card(card).token}

    @precondition(_within("clone"))
    @rule(card=which, back=st.integers(0, 20))
    def clone(self, card: int, back: int) -> None:
        if len(self.world.cards) < 5:
            self.world.clone(self._card(card), back)

    @precondition(_within("repay"))
    @rule(amount=amounts)
    def repay(self, amount: int) -> None:
        self.world.repay(amount)

    @precondition(_within("settle_money"))
    @rule(place=which, final=st.booleans())
    def settle_money(self, place: int, final: bool) -> None:
        self.world.settle_money(place, final=final)

    @precondition(_within("change_the_limit"))
    @rule(line=st.sampled_from([0, LIMIT // 2, LIMIT]))
    def change_the_limit(self, line: int) -> None:
        self.world.books.balance = self.world.books.balance.with_line(line)
        self.world.complete()

    @precondition(_within("back_up"))
    @rule()
    def back_up(self) -> None:
        self.world.back_up()

    @precondition(_within("restore"))
    @rule()
    def restore(self) -> None:
        self.world.restore()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def _shop(self, place: int) -> Shop:
        return self.world.shops[place % len(self.world.shops)]

    def _card(self, place: int) -> Card:
        return self.world.cards[place % len(self.world.cards)]


def histories(machine: type[RuleBasedStateMachine], count: int, *, shrink: bool = True) -> None:
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=count,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            database=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_every_promise_is_kept() -> None:
    histories(ReserveMachine, QUICK)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_promise_is_kept_in_many_histories() -> None:
    histories(ReserveMachine, MANY)


@pytest.mark.parametrize("broken", BROKEN_RULES)
def test_whoever_breaks_a_rule_is_caught(broken: str) -> None:
    machine = type("Broken", (ReserveMachine,), {"broken": broken, "focus": FOCUS[broken]})
    with pytest.raises(Broken):
        histories(machine, MANY, shrink=False)


@pytest.mark.parametrize("focus", FOCUS.values(), ids=FOCUS)
def test_nobody_is_caught_who_breaks_none(focus: frozenset[str]) -> None:
    histories(type("Kept", (ReserveMachine,), {"focus": focus}), QUICK // 5)
