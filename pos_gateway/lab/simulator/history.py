"""What happens in the town, day by day: the same history for every system that is compared.

Everything that chance decides is decided here. What depends on what a customer owes (repayments, whether
a tap is approved) each system works out for itself, from the draws that an event carries.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

from pos_gateway.lab.simulator.chance import poisson, stream
from pos_gateway.lab.simulator.load import Load
from pos_gateway.lab.simulator.town import DAY_S, FIRST_DAY_UNIX_S, HOUR_S, Customer, Size, Town

MONTH_DAYS = 30


class Purchase(NamedTuple):
    """Somebody wants to pay in a shop. `network`: a draw, below it lies the chance that the phone has one.
    `torn`: the card leaves too early; `tapped_again`: and comes back."""

    customer: int
    shop: int
    amount_minor: int
    by_phone: bool
    torn: bool
    tapped_again: bool
    opened: bool
    network: float
    asks_again: bool
    lost: bool


class OnlinePurchase(NamedTuple):
    customer: int
    amount_minor: int


class Refresh(NamedTuple):
    """The wallet talks to the issuer by itself."""

    customer: int


class Repay(NamedTuple):
    """`part` of what is owed, if more than `above` of the limit is owed; final after `final_after_s`
    (at once if 0), or then it bounces."""

    customer: int
    reference: int
    part: float
    above: float
    final_after_s: int
    bounces: bool


class RepaymentFinal(NamedTuple):
    customer: int
    reference: int
    bounces: bool


class SetLimit(NamedTuple):
    """The unsecured limit that the issuer decides on."""

    customer: int
    limit_minor: int


class Vault(NamedTuple):
    """Funds locked (more than 0) or asked back (less)."""

    customer: int
    amount_minor: int


class Block(NamedTuple):
    customer: int
    phone: bool


class Replace(NamedTuple):
    customer: int
    phone: bool


class LineDown(NamedTuple):
    shop: int


class LineUp(NamedTuple):
    shop: int


class Synchronise(NamedTuple):
    """The shop presents its queue; `carried`: on a stick, with its line still down."""

    shop: int
    carried: bool


class Clock(NamedTuple):
    """A shop's clock is off by so much from now on; a manager has confirmed it."""

    shop: int
    skew_s: int


class Stolen(NamedTuple):
    """A gateway is taken away; its clock is turned back to now, and its line cut."""

    shop: int


class StolenTap(NamedTuple):
    """One of the thief's friends pays at the stolen gateway."""

    shop: int
    customer: int
    amount_minor: int


class StolenReported(NamedTuple):
    shop: int


class StolenPresents(NamedTuple):
    shop: int


class Publish(NamedTuple):
    whole: bool


class Backup(NamedTuple):
    pass


class Restore(NamedTuple):
    pass


class CloneMade(NamedTuple):
    """A copy of a customer's card as it stands now. `rolled_back`: the customer's own card forgets
    instead what it paid after now, and pays on from there: there is no honest card any more."""

    clone: int
    customer: int
    rolled_back: bool


class CloneTap(NamedTuple):
    clone: int
    shop: int
    amount_minor: int


class Dispute(NamedTuple):
    """The customer reads the bill, or the wallet's list."""

    customer: int


class EndOfDay(NamedTuple):
    day: int


Happening = (
    Purchase
    | OnlinePurchase
    | Refresh
    | Repay
    | RepaymentFinal
    | SetLimit
    | Vault
    | Block
    | Replace
    | LineDown
    | LineUp
    | Synchronise
    | Clock
    | Stolen
    | StolenTap
    | StolenReported
    | StolenPresents
    | Publish
    | Backup
    | Restore
    | CloneMade
    | CloneTap
    | Dispute
    | EndOfDay
)


class History:
    """Iterate over `(at_unix_ms, happening)` in the order of time."""

    def __init__(self, size: Size, town: Town, load: Load, publish_every_s: int) -> None:
        self._size = size
        self._town = town
        self._load = load
        self._publish_every_s = publish_every_s
        self._hours = list(accumulate(load.taps.hours))
        self._planned: dict[int, list[tuple[int, Happening]]] = defaultdict(list)
        self._reference = 0
        self._plan_shops()
        self._plan_decisions()
        self._plan_ledger()
        self._plan_clones()

    def days(self) -> Iterator[list[tuple[int, Happening]]]:
        """One day after the other; of what happens in one millisecond, in a fixed order."""
        for day in range(self._size.days):
            happenings = self._day(day) + self._planned.pop(day, [])
            happenings.sort(key=lambda pair: pair[0])
            yield happenings

    def _plan(self, at_ms: float, happening: Happening) -> None:
        """Into its day; what lies beyond the end does not happen."""
        at_unix_ms = int(at_ms)
        day = (at_unix_ms // 1000 - FIRST_DAY_UNIX_S) // DAY_S
        if 0 <= day < self._size.days:
            self._planned[day].append((at_unix_ms, happening))

    def _moment(self, chance: random.Random, day: int) -> int:
        """Some moment of the day when people are about."""
        hour = bisect(self._hours, chance.random() * self._hours[-1])
        return _ms(day) + int((min(hour, 23) + chance.random()) * HOUR_S * 1000)

    def _day(self, day: int) -> list[tuple[int, Happening]]:
        load = self._load
        found: list[tuple[int, Happening]] = []
        chance = stream(self._size.seed, "day", day)
        for customer in self._town.customers:
            for _ in range(poisson(chance, load.taps.per_customer_day * customer.intensity)):
                found.append((self._moment(chance, day), self._purchase(chance, customer)))
            for _ in range(poisson(chance, load.online.per_customer_day * customer.intensity)):
                median, sigma = load.online.amount_of_limit_median, load.online.amount_of_limit_sigma
                amount_minor = self._amount(chance, customer, median, sigma)
                found.append((self._moment(chance, day), OnlinePurchase(customer.index, amount_minor)))
            if customer.has_phone:
                for _ in range(poisson(chance, load.phones.refreshes_per_day)):
                    found.append((self._moment(chance, day), Refresh(customer.index)))
            self._repay(chance, day, customer)
        found.append((_ms(day + 1) - 1, EndOfDay(day)))
        return found

    def _purchase(self, chance: random.Random, customer: Customer) -> Purchase:
        taps, phones = self._load.taps, self._load.phones
        if chance.random() < taps.own_shop_share:
            shop = chance.choice(customer.own_shops)
        else:
            shop = self._any_shop(chance)
        by_phone = customer.has_phone and (
            chance.random() < self._load.customers.phone_tap_share or not customer.has_plastic
        )
        amount_minor = self._amount(chance, customer, taps.amount_of_limit_median, taps.amount_of_limit_sigma)
        return Purchase(
            customer=customer.index,
            shop=shop,
            amount_minor=amount_minor if by_phone else min(amount_minor, taps.plastic_amount_max_minor),
            by_phone=by_phone,
            torn=chance.random() < taps.torn_share,
            tapped_again=chance.random() < taps.torn_tapped_again_share,
            opened=chance.random() < phones.wallet_opened_share,
            network=chance.random(),
            asks_again=chance.random() < phones.taps_again_share,
            lost=chance.random() < self._load.shops.grant_lost_share,
        )

    def _amount(self, chance: random.Random, customer: Customer, median: float, sigma: float) -> int:
        part = min(median * chance.lognormvariate(0, sigma), self._load.taps.amount_of_limit_max)
        return max(round(customer.limit_minor * part / 10) * 10, self._load.taps.amount_min_minor)

    def _any_shop(self, chance: random.Random) -> int:
        weights = self._town.shop_weights
        return min(bisect(weights, chance.random() * weights[-1]), len(weights) - 1)

    def _repay(self, chance: random.Random, day: int, customer: Customer) -> None:
        like = self._load.repayments
        if day % MONTH_DAYS == customer.due_day:
            draw = chance.random()
            part = 1.0 if draw < like.full_share else 0.5
            if draw >= like.full_share + like.half_share:
                part = like.minimum_of_owed
            self._plan_repayment(chance, day, customer, part, 0.0)
        elif chance.random() < like.early_per_day:
            self._plan_repayment(chance, day, customer, like.early_of_owed, like.early_above_utilisation)

    def _plan_repayment(
        self, chance: random.Random, day: int, customer: Customer, part: float, above: float
    ) -> None:
        like, at_ms = self._load.repayments, self._moment(chance, day)
        final_after_s = bounces = 0
        if chance.random() < like.not_final_share:
            final_after_s = int(chance.uniform(0.2, like.not_final_days_max) * DAY_S)
            bounces = chance.random() < like.bounced_share
        self._reference += 1
        self._plan(
            at_ms,
            Repay(customer.index, self._reference, part, above, final_after_s, bool(bounces)),
        )
        if final_after_s:
            final = RepaymentFinal(customer.index, self._reference, bool(bounces))
            self._plan(at_ms + 1000 * final_after_s, final)

    def _plan_shops(self) -> None:
        load, size = self._load.shops, self._size
        end_ms = 1000 * size.end_unix_s
        for shop in range(size.shops):
            chance = stream(size.seed, "shop", shop)
            for down_ms, up_ms in _outages(chance, load.outages, size.outage, end_ms):
                self._plan(down_ms, LineDown(shop))
                if (up_ms - down_ms) > load.carrier_after_days * DAY_S * 1000:
                    carried_ms = down_ms + load.carrier_after_days * DAY_S * 1000
                    carries = chance.random() < load.carrier_share
                    while carries and carried_ms < up_ms:
                        self._plan(carried_ms, Synchronise(shop, carried=True))
                        carried_ms += load.carrier_after_days * DAY_S * 1000
                self._plan(up_ms, LineUp(shop))
                late = chance.random() < load.late_share
                late_ms: float = chance.expovariate(1 / (load.late_hours_mean * HOUR_S * 1000)) if late else 0
                self._plan(up_ms + late_ms, Synchronise(shop, carried=False))
            if chance.random() < load.clock_wrong_share:
                skew_s = int(chance.uniform(-1, 1) * load.clock_wrong_days_max * DAY_S)
                wrong_ms = _ms(0) + chance.random() * (end_ms - _ms(0))
                self._plan(wrong_ms, Clock(shop, skew_s))
                corrected_ms = wrong_ms + load.clock_corrected_after_days * DAY_S * 1000
                self._plan(corrected_ms, Clock(shop, _within(chance, load.clock_sigma_s)))
            else:
                self._plan(_ms(0), Clock(shop, _within(chance, load.clock_sigma_s)))
            if chance.random() < load.stolen_per_month * size.days / MONTH_DAYS:
                self._plan_theft(chance, shop)

    def _plan_theft(self, chance: random.Random, shop: int) -> None:
        load = self._load.shops
        at_ms = _ms(0) + chance.random() * self._size.days * DAY_S * 1000
        self._plan(at_ms, Stolen(shop))
        self._plan(at_ms + load.stolen_reported_after_days * DAY_S * 1000, StolenReported(shop))
        friends = [chance.randrange(len(self._town.customers)) for _ in range(3)]
        for _ in range(load.stolen_taps):
            friend = self._town.customers[chance.choice(friends)]
            amount_minor = max(int(friend.limit_minor * 0.1), 1)
            tap = StolenTap(shop, friend.index, amount_minor)
            self._plan(at_ms + chance.uniform(0, 25 * DAY_S * 1000), tap)
        self._plan(at_ms + 26 * DAY_S * 1000, StolenPresents(shop))

    def _plan_decisions(self) -> None:
        load, days = self._load.decisions, self._size.days
        for customer in self._town.customers:
            chance = stream(self._size.seed, "decisions", customer.index)
            limit_minor, locked_minor = customer.limit_minor, 0
            for day in range(days):
                at_ms = _ms(day) + chance.random() * DAY_S * 1000
                draws = [chance.random() * MONTH_DAYS for _ in range(5)]
                if draws[0] < load.limit_cuts:
                    limit_minor = int(limit_minor * load.limit_cut_to)
                    self._plan(at_ms, SetLimit(customer.index, limit_minor))
                elif draws[1] < load.limit_raises:
                    limit_minor = int(limit_minor * load.limit_raise_to)
                    self._plan(at_ms, SetLimit(customer.index, limit_minor))
                if draws[2] < load.vault_locks and not locked_minor:
                    locked_minor = int(customer.limit_minor * load.vault_of_limit)
                    self._plan(at_ms, Vault(customer.index, locked_minor))
                elif draws[3] < load.vault_unlocks and locked_minor:
                    self._plan(at_ms, Vault(customer.index, -locked_minor))
                    locked_minor = 0
                if draws[4] < load.tokens_blocked:
                    phone = customer.has_phone and (not customer.has_plastic or chance.random() < 0.5)
                    self._plan(at_ms, Block(customer.index, phone))
                    replaced_ms = at_ms + load.replaced_after_days * DAY_S * 1000
                    self._plan(replaced_ms, Replace(customer.index, phone))

    def _plan_ledger(self) -> None:
        load, size = self._load.ledger, self._size
        every_ms = 1000 * self._publish_every_s
        for number in range(size.days * DAY_S * 1000 // every_ms):
            at_ms = _ms(0) + number * every_ms
            self._plan(at_ms, Publish(whole=number * self._publish_every_s % DAY_S == 0))
        chance = stream(size.seed, "ledger")
        for _ in range(round(load.restores_per_60_days * size.days / 60)):
            restored_ms = _ms(0) + chance.uniform(0.2, 0.9) * size.days * DAY_S * 1000
            self._plan(restored_ms - load.backup_age_hours * HOUR_S * 1000, Backup())
            self._plan(restored_ms, Restore())

    def _plan_clones(self) -> None:
        load, size = self._load.clones, self._size
        chance = stream(size.seed, "clones")
        victims = chance.sample(self._town.customers, min(size.clones, len(self._town.customers)))
        for clone, customer in enumerate(victims):
            rolled_back = chance.random() < load.rolled_back_share
            at_day = chance.uniform(0.05, 0.75) * size.days
            self._plan(_ms(0) + at_day * DAY_S * 1000, CloneMade(clone, customer.index, rolled_back))
            for day in range(int(at_day) + 1, size.days):
                for _ in range(poisson(chance, load.taps_per_day)):
                    amount_minor = self._amount(chance, customer, load.amount_of_limit_median, 1.0)
                    tap = CloneTap(clone, self._any_shop(chance), amount_minor)
                    self._plan(self._moment(chance, day), tap)
            every_days = (
                load.dispute_after_days_phone if customer.has_phone else load.dispute_after_days_plastic
            )
            if not rolled_back:
                reads_day = at_day + every_days
                while reads_day < size.days:
                    self._plan(_ms(0) + reads_day * DAY_S * 1000, Dispute(customer.index))
                    reads_day += every_days


def _ms(day: float) -> int:
    return 1000 * int(FIRST_DAY_UNIX_S + day * DAY_S)


def _within(chance: random.Random, sigma_s: float) -> int:
    return int(max(-3.0, min(3.0, chance.gauss(0, 1))) * sigma_s)


def _outages(
    chance: random.Random, kinds: list[tuple[float, float, float]], share: float, end_ms: int
) -> Iterator[tuple[int, int]]:
    """Spells without a line, `share` of all time on average; it begins somewhere in the middle."""
    if share <= 0:
        return
    weights = list(accumulate(kind[0] for kind in kinds))
    spells = [(kind[0] / weights[-1]) * _mean_hours(kind) for kind in kinds]
    up_hours = sum(spells) * (1 - share) / share
    at_ms: float = _ms(0) - chance.random() * 20 * DAY_S * 1000
    while at_ms < end_ms:
        at_ms += chance.expovariate(1 / max(up_hours, 0.1)) * HOUR_S * 1000
        _, median, sigma = kinds[min(bisect(weights, chance.random() * weights[-1]), len(kinds) - 1)]
        length_ms = median * chance.lognormvariate(0, sigma) * HOUR_S * 1000
        if at_ms + length_ms > _ms(0):
            yield int(max(at_ms, _ms(0))), int(at_ms + length_ms)
        at_ms += length_ms


def _mean_hours(kind: tuple[float, float, float]) -> float:
    return kind[1] * math.exp(kind[2] ** 2 / 2)
