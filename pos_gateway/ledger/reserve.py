"""The reserve principle, pure: what may still be claimed on a token's counter line, and what it costs.

A payment moves the token's counter from `counter_before` to `counter_after` and so claims the half-open
interval (counter_before, counter_after]. An account is safe at every moment while

    outstanding + uncleared + Σ over its tokens |U| ≤ limit
    U = ⋃ over standing publications k of (h_k, e_k] − Posted,   e_k = min(ceiling, F_k)

because U holds every point that a cut-off shop may still approve. Points are minor units of money. The
proof, its assumptions and what happens when each fails: docs/the-reserve-principle.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TypeAlias

from pos_gateway.emv.application import MAX_COUNTER
from pos_gateway.errors import PosGatewayError

Interval: TypeAlias = tuple[int, int]
"""(a, b]: the points a+1 … b. Empty when b ≤ a."""

IntervalSet: TypeAlias = tuple[Interval, ...]
"""Sorted, disjoint, not touching, none empty; every function here takes and returns this form."""


class InvariantBroken(PosGatewayError):
    """An account would owe or reserve more than its limit: the transaction must not commit."""


class PublicationKind(Enum):
    """By which route a ceiling leaves the house."""

    SNAPSHOT = "snapshot"
    """In bulk, in a signed file for every shop."""
    GRANT = "grant"
    """On the spot, for one terminal, short-lived."""
    NOTE = "note"
    """Carried by the customer, for any terminal."""


@dataclass(frozen=True, slots=True)
class Guarantee:
    """What an honest shop is allowed: how far its clock may be off (δ), how long after a tap it may
    present it (D)."""

    clock_tolerance_s: int
    presentment_deadline_s: int

    def stands_until_unix_s(self, valid_until_unix_s: int) -> int:
        """A shop whose clock is behind by δ approves until v + δ, and may then take D to tell."""
        return valid_until_unix_s + self.clock_tolerance_s + self.presentment_deadline_s

    def surely_dead(self, publication: Publication, at_unix_s: int) -> bool:
        """Could no shop within the guarantee have approved under it at that moment or later?"""
        return at_unix_s > publication.valid_until_unix_s + self.clock_tolerance_s


@dataclass(frozen=True, slots=True)
class Publication:
    """One ceiling that was handed out for a token.

    `highest`: the highest authenticated counter when it was issued (h). `evidence`: the lowest counter
    before a cryptogram that was surely made after it died (F); None is no evidence. `terminal_id`: the
    only one that may use it. `lapsed` is set once and for all when its credit is given away again, so
    that a clock set back cannot make it stand twice. `digest` tells it from others of its token.
    """

    highest: int
    ceiling: int
    stands_until_unix_s: int
    valid_until_unix_s: int = 0
    issued_unix_s: int = 0
    terminal_id: str | None = None
    evidence: int | None = None
    lapsed: bool = False
    digest: bytes = b""

    @property
    def end(self) -> int:
        """e: no payment made under it can have gone beyond."""
        return self.ceiling if self.evidence is None else min(self.ceiling, self.evidence)

    def stands(self, now_unix_s: int) -> bool:
        """May a payment made under it still be presented?"""
        return not self.lapsed and now_unix_s <= self.stands_until_unix_s


@dataclass(slots=True)
class CounterLine:
    """A token's counter line as its issuer knows it.

    `highest` is H, the highest counter in any authenticated TC or ARQC. `posted` are points that nobody
    can claim any more: presented payments, returns, and renounced ones that were written off.
    """

    highest: int
    publications: list[Publication] = field(default_factory=list)
    posted: list[Interval] = field(default_factory=list)

    def claimable(self, now_unix_s: int) -> IntervalSet:
        """U: the points that may still be presented and will be paid."""
        return claimable(self.publications, self.posted, now_unix_s)

    def cost_minor(self, ceiling: int, now_unix_s: int) -> int:
        """How much more would be reserved if that ceiling were issued now."""
        return measure(subtract(interval_set([(self.highest, ceiling)]), self.claimable(now_unix_s)))

    def observe(
        self, *, counter_before: int, counter_after: int, relied_on_issued_unix_s: int, guarantee: Guarantee
    ) -> list[Publication]:
        """Take an authenticated cryptogram for evidence; returns the publications that now end earlier.

        An ARQC has moved nothing: its counter stands for both. The digest that the card signed was
        unpredictable before its record was issued, so the cryptogram is younger than that, whatever any
        clock in a shop says. Whatever died before that record was issued was used up to here at most.
        """
        self.highest = max(self.highest, counter_after)
        cut: list[Publication] = []
        for place, publication in enumerate(self.publications):
            if guarantee.surely_dead(publication, relied_on_issued_unix_s):
                ended = replace(publication, evidence=max(counter_before, publication.highest))
                if ended.end < publication.end:
                    self.publications[place] = ended
                    cut.append(ended)
        return cut

    def lapse(self, now_unix_s: int) -> None:
        """What stands no longer never stands again. Before its credit is given to anything else."""
        self.publications = [p for p in self.publications if p.stands(now_unix_s)]

    def free(self, terminal_id: str, complete_until_unix_s: int, guarantee: Guarantee) -> None:
        """That terminal has presented all it approved up to then: what it alone could use is used up."""
        self.publications = [
            p
            for p in self.publications
            if p.terminal_id != terminal_id or not guarantee.surely_dead(p, complete_until_unix_s)
        ]


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
    standing = interval_set([(p.highest, p.end) for p in publications if p.stands(now_unix_s)])
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


def check_invariant(
    *, limit_minor: int, outstanding_minor: int, reserves_minor: Iterable[int], uncleared_minor: int = 0
) -> None:
    """
    Raises:
        InvariantBroken: what is owed, may come back and is reserved together passes the limit.
    """
    total_minor = outstanding_minor + uncleared_minor + sum(reserves_minor)
    if total_minor > limit_minor:
        raise InvariantBroken(
            f"owed and reserved together are {total_minor - limit_minor} minor units over the limit"
        )
