"""The reserve principle against plain sets of points, and its invariant over random histories."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pos_gateway.emv.application import MAX_COUNTER
from pos_gateway.ledger.allowance import AllowancePolicy, Candidate, allot, shares_minor
from pos_gateway.ledger.reserve import (
    Interval,
    IntervalSet,
    InvariantBroken,
    Publication,
    check_invariant,
    claimable,
    contains,
    interval_set,
    measure,
    next_ceiling,
    subtract,
    union,
)

intervals = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8)


def points(of: IntervalSet | list[Interval]) -> set[int]:
    return {p for start, end in of for p in range(start + 1, end + 1)}


def is_canonical(of: IntervalSet) -> bool:
    ends = [-1, *(e for _, e in of)]
    return all(previous < start < end for previous, (start, end) in zip(ends, of, strict=False))


@given(intervals, intervals)
def test_set_operations_are_those_of_points(one: list[Interval], other: list[Interval]) -> None:
    left, right = interval_set(one), interval_set(other)
    assert points(left) == points(one)
    assert points(union(left, right)) == points(one) | points(other)
    assert points(subtract(left, right)) == points(one) - points(other)
    assert measure(left) == len(points(one))
    assert all(is_canonical(s) for s in (left, union(left, right), subtract(left, right)))


@given(intervals, st.tuples(st.integers(0, 60), st.integers(0, 60)))
def test_contains_is_subset_and_never_holds_for_nothing(one: list[Interval], inner: Interval) -> None:
    expected = bool(points([inner])) and points([inner]) <= points(one)
    assert contains(interval_set(one), inner) is expected


@given(intervals, st.integers(0, 60), st.integers(-5, 80))
def test_next_ceiling_is_the_highest_that_the_budget_allows(
    claim: list[Interval], highest: int, budget: int
) -> None:
    held = interval_set(claim)

    def cost(ceiling: int) -> int:
        return len(points([(highest, ceiling)]) - points(held))

    ceiling = next_ceiling(held, highest, budget)
    assert ceiling >= highest
    assert cost(ceiling) <= max(budget, 0) < cost(ceiling + 1)


def test_next_ceiling_stays_within_a_cards_counter() -> None:
    assert next_ceiling((), MAX_COUNTER - 5, 100) == MAX_COUNTER


def test_what_one_token_is_allotted_is_gone_for_the_next() -> None:
    assert allot([Candidate((), 0), Candidate((), 100)], [8, 8], free_minor=10) == (8, 102)
    # The first one's points below 6 are reserved already: only four of its ten are new.
    first = Candidate(((0, 6),), 0)
    assert allot([first, Candidate((), 100)], [10, 10], free_minor=4) == (10, 100)
    # A share that has become smaller takes effect, though more would cost nothing now.
    assert allot([first], [5], free_minor=4) == (5,)


def test_a_publication_that_lapsed_never_stands_again() -> None:
    publication = Publication(0, 100, stands_until_unix_s=50)
    assert publication.stands(50)
    assert not publication.stands(51)
    assert not replace(publication, lapsed=True).stands(0)


def test_torn_gaps_stay_reserved_until_their_publication_lapses() -> None:
    # A TC of 30 was torn: the card stands at 130, only (130, 150] was presented.
    first = Publication(100, 200, stands_until_unix_s=10)
    assert claimable([first], [(130, 150)], 10) == ((100, 130), (150, 200))
    assert claimable([first], [(130, 150)], 11) == ()


def test_the_invariant_is_checked() -> None:
    check_invariant(limit_minor=10, outstanding_minor=4, reserves_minor=[3, 3])
    with pytest.raises(InvariantBroken):
        check_invariant(limit_minor=10, outstanding_minor=4, reserves_minor=[3, 4])


@dataclass
class Card:
    """An honest card and what the ledger knows of it."""

    counter: int
    highest: int
    publications: list[Publication] = field(default_factory=list)
    ceilings: list[tuple[int, int]] = field(default_factory=list)  # what shops hold, and until when
    posted: list[Interval] = field(default_factory=list)
    unpresented: list[tuple[Interval, int]] = field(default_factory=list)


VALID, DEADLINE = 7, 14

steps = st.lists(
    st.tuples(
        st.sampled_from(["publish", "tap", "tap", "tear", "present", "present", "wait", "back"]),
        st.integers(0, 3),
        st.integers(1, 60),
    ),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 200), st.integers(1, 3), st.integers(0, 100), steps)
def test_no_history_takes_an_account_over_its_limit(
    limit: int, cards_count: int, share_percent: int, history: list[tuple[str, int, int]]
) -> None:
    """Shops are cut off as they like, cards are torn, records come late; and every tap that was within
    its ceiling and is presented in time is paid."""
    cards = [Card(1000 * (i + 1), 1000 * (i + 1)) for i in range(cards_count)]
    outstanding, now = 0, 0
    for action, which, size in history:
        card = cards[which % cards_count]
        if action == "publish":
            for c in cards:
                c.publications = [
                    replace(p, lapsed=True) if p.stands_until_unix_s < now else p for p in c.publications
                ]
            claims = [claimable(c.publications, c.posted, now) for c in cards]
            candidates = [Candidate(claim, c.highest) for claim, c in zip(claims, cards, strict=True)]
            shares = shares_minor(
                candidates,
                owable_minor=limit - outstanding,
                share_percent=share_percent,
                policy=AllowancePolicy(),
            )
            ceilings = allot(candidates, shares, free_minor=limit - outstanding - sum(map(measure, claims)))
            for c, ceiling in zip(cards, ceilings, strict=True):
                c.publications.append(Publication(c.highest, ceiling, now + VALID + DEADLINE))
                c.ceilings.append((ceiling, now + VALID))
        elif action in ("tap", "tear"):
            # The shop that is visited holds any ceiling still valid, the most generous one at worst.
            valid = [ceiling for ceiling, until in card.ceilings if now <= until]
            if valid and card.counter + size <= max(valid):
                if action == "tap":
                    card.unpresented.append(((card.counter, card.counter + size), now))
                card.counter += size
        elif action == "present" and card.unpresented:
            interval, tapped = card.unpresented.pop(size % len(card.unpresented))
            card.highest = max(card.highest, interval[1])
            payable = contains(claimable(card.publications, card.posted, now), interval)
            if now <= tapped + DEADLINE:
                assert payable, "an honest tap presented in time was not paid"
            if payable:
                card.posted.append(interval)
                outstanding += interval[1] - interval[0]
        elif action == "wait":
            now += size % 9
        elif action == "back":
            now = max(now - 1, 0)
        check_invariant(
            limit_minor=limit,
            outstanding_minor=outstanding,
            reserves_minor=[
                measure(
                    claimable([replace(p, stands_until_unix_s=10**9) for p in c.publications], c.posted, now)
                )
                for c in cards
            ],
        )
