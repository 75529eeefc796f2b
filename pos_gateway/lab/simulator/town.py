"""Who lives in the simulated town: customers with their accounts and cards, and shops."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from pos_gateway.lab.simulator.chance import around_one, stream
from pos_gateway.lab.simulator.load import Load

FIRST_DAY_UNIX_S: Final = 1_767_571_200
"""2026-01-05 00:00 UTC, a Monday: nobody's clock is asked."""
DAY_S: Final = 86_400
HOUR_S: Final = 3_600


@dataclass(frozen=True, slots=True)
class Customer:
    """One account and how its holder lives. Amounts in minor units."""

    index: int
    limit_minor: int
    first_owed_minor: int
    has_phone: bool
    has_plastic: bool
    intensity: float
    own_shops: tuple[int, ...]
    due_day: int

    @property
    def account_id(self) -> str:
        return f"acc-{self.index:06d}"


@dataclass(frozen=True, slots=True)
class Town:
    customers: tuple[Customer, ...]
    shop_weights: tuple[float, ...]
    """Cumulative popularity of the shops."""

    @property
    def shops(self) -> int:
        return len(self.shop_weights)


@dataclass(frozen=True, slots=True)
class Size:
    """What is simulated: from the command line."""

    shops: int
    tokens: int
    days: int
    outage: float
    clones: int
    seed: int

    @property
    def end_unix_s(self) -> int:
        return FIRST_DAY_UNIX_S + self.days * DAY_S


def build_town(size: Size, load: Load) -> Town:
    """As many customers as `size.tokens` cards and phones make."""
    chance = stream(size.seed, "town")
    weights, total = [], 0.0
    for _ in range(size.shops):
        total += around_one(chance, load.shops.popularity_sigma)
        weights.append(total)
    customers: list[Customer] = []
    left = size.tokens
    while left > 0:
        customer = _customer(chance, len(customers), size, load, room_for_two=left > 1)
        customers.append(customer)
        left -= customer.has_phone + customer.has_plastic
    return Town(tuple(customers), tuple(weights))


def _customer(chance: random.Random, index: int, size: Size, load: Load, *, room_for_two: bool) -> Customer:
    like = load.customers
    limit = like.limit_median_minor * chance.lognormvariate(0, like.limit_sigma)
    limit_minor = round(min(max(limit, like.limit_min_minor), like.limit_max_minor) / 100) * 100
    used = chance.betavariate(like.first_utilisation_alpha, like.first_utilisation_beta)
    has_phone = chance.random() < like.phone_share
    both = chance.random() < like.plastic_beside_phone_share and room_for_two
    return Customer(
        index=index,
        limit_minor=limit_minor,
        first_owed_minor=int(limit_minor * used),
        has_phone=has_phone,
        has_plastic=both or not has_phone,
        intensity=around_one(chance, like.intensity_sigma),
        own_shops=tuple(chance.randrange(size.shops) for _ in range(load.taps.own_shops)),
        due_day=chance.randrange(30),
    )
