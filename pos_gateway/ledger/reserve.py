"""The reserve principle, pure: what may still be claimed on a token's counter line, and what it costs.

A payment moves the token's counter from `counter_before` to `counter_after` and so claims the half-open
interval (counter_before, counter_after]. An account is safe at every moment while

    outstanding + Σ over its tokens |U| ≤ limit,   U = ⋃ over standing publications (h, ceiling] − Posted

because U holds every point that a cut-off shop may still approve. Points are minor units of money.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pos_gateway.emv.application import MAX_COUNTER
from pos_gateway.errors import PosGatewayError

Interval: TypeAlias = tuple[int, int]
"""(a, b]: the points a+1 … b. Empty when b ≤ a."""

IntervalSet: TypeAlias = tuple[Interval, ...]
"""Sorted, disjoint, not touching, none empty; every function here takes and returns this form."""


class InvariantBroken(PosGatewayError):
    """An account would owe or reserve more than its limit: the transaction must not commit."""


@dataclass(frozen=True, slots=True)
class Publication:
    """One ceiling that was handed out for a token.

    `highest`: the highest authenticated counter when it was issued. `lapsed` is set once and for all
    when its credit is given away again, so that a clock set back cannot make it stand twice.
    """

    highest: int
    ceiling: int
    stands_until_unix_s: int
    lapsed: bool = False

    def stands(self, now_unix_s: int) -> bool:
        """May a payment made under it still be presented?"""
        return not self.lapsed and now_unix_s <= self.stands_until_unix_s


def interval_set(intervals: Iterable[Interval]) -> IntervalSet:
    """Any intervals, in any order, as a set of points."""
    ordered = sorted([i for i in intervals if i[0] < i[1]])
    if len(ordered) < 2:
        return tuple(ordered)
    merged: list[Interval] = []
    for start, end in ordered:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return tuple(merged)


def union(left: IntervalSet, right: IntervalSet) -> IntervalSet:
    return interval_set((*left, *right))


def subtract(left: IntervalSet, right: IntervalSet) -> IntervalSet:
    """The points of `left` that are not in `right`."""
    rest: list[Interval] = []
    place = 0
    for start, end in left:
        while place < len(right) and right[place][1] <= start:
            place += 1
        cut = place
        while cut < len(right) and right[cut][0] < end:
            if right[cut][0] > start:
                rest.append((start, right[cut][0]))
            start = right[cut][1]
            cut += 1
        if start < end:
            rest.append((start, end))
    return tuple(rest)


def measure(points: IntervalSet) -> int:
    """How many points: minor units."""
    return sum([end - start for start, end in points])


def contains(points: IntervalSet, interval: Interval) -> bool:
    """Does the set hold every point of the interval? An empty interval is held by none."""
    first, last = interval
    for start, end in points:
        if start <= first and last <= end:
            return first < last
    return False


def claimable(
    publications: Iterable[Publication], posted: Iterable[Interval], now_unix_s: int
) -> IntervalSet:
    """U: the points that may still be presented and will be paid."""
    standing = interval_set([(p.highest, p.ceiling) for p in publications if p.stands(now_unix_s)])
    return subtract(standing, interval_set(posted))


def next_ceiling(claim: IntervalSet, highest: int, budget_minor: int) -> int:
    """The highest ceiling whose new points, (highest, ceiling] less what is claimable already, cost at
    most `budget_minor`. Never below `highest`, never beyond what a card's counter can hold."""
    ceiling, left = highest, max(budget_minor, 0)
    for start, end in claim:
        if end <= ceiling:
            continue
        if start > ceiling:
            if start - ceiling > left:
                break
            left -= start - ceiling
        ceiling = end
    return min(ceiling + left, MAX_COUNTER)


def allot(claims: Sequence[tuple[IntervalSet, int]], *, free_minor: int, share_minor: int) -> tuple[int, ...]:
    """The next ceiling of each of an account's active tokens.

    `claims` holds (U, highest) per token, `free_minor` what the account's limit leaves after everything
    owed and reserved, `share_minor` how much reserve policy lets one token hold.
    """
    ceilings = []
    for claim, highest in claims:
        budget_minor = min(free_minor, share_minor - measure(claim))
        ceiling = next_ceiling(claim, highest, budget_minor)
        free_minor -= measure(subtract(interval_set([(highest, ceiling)]), claim))
        ceilings.append(ceiling)
    return tuple(ceilings)


def check_invariant(*, limit_minor: int, outstanding_minor: int, reserves_minor: Iterable[int]) -> None:
    """
    Raises:
        InvariantBroken: outstanding and reserves together pass the limit.
    """
    total_minor = outstanding_minor + sum(reserves_minor)
    if total_minor > limit_minor:
        raise InvariantBroken(
            f"owed and reserved together are {total_minor - limit_minor} minor units over the limit"
        )
