"""How much of an account's free credit becomes ceiling, and on which of its tokens. Pure.

The invariant says what may be given out; this says what should be. Reserve can be spent where there is no
line, and nowhere else: too little declines taps in cut-off shops, too much declines what its owner buys
elsewhere. What decides is how soon it can be got back. A phone returns what it does not need whenever it
has a network, so it may hold all that nobody else wants. Plastic keeps what it has until it lapses: a
record in a snapshot lives for weeks, a note for days, after which the card's next cryptogram proves how
little of it was used. So plastic gets little by snapshot and more by note, according to what it has spent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from pos_gateway.emv.application import MAX_COUNTER
from pos_gateway.ledger.reserve import IntervalSet, measure, next_ceiling, subtract

_DAY_S: Final = 86_400


class UsePolicy(BaseModel):
    """The issuer's decisions about allowances. `…_days` is in days of the use so far, `…_taps` in largest
    amounts so far; the greater of the two counts.

    `window_s`: how far back use is looked at, in seconds. `snapshot_…`: what plastic gets in bulk.
    `note_…`: what it gets by note. `cut_off_percent`: of what it spends, at least so much is thought to be
    spent where there is no line. `returning_…`: what a token gets that returns what it does not need.
    `beside_percent`: plastic beside such a token gets only so much of what it would get, and nothing of the
    rest. `debit_…`: what is kept back for online debits.
    `float_percent`: of what may still be owed, kept back where several tokens share it, for grants.
    `rest_percent`: of what is left when all have that, how much becomes allowance too. `first_percent`: of
    the limit, what a token without a history gets. `assurance_percent`: the most a token may hold, by its
    assurance 0, 1, 2…; higher ones get the last. `note_renew_s`: a note that says nothing new is written
    again when it has no longer than this.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    window_s: int = Field(default=14 * _DAY_S, gt=0)
    snapshot_days: float = Field(default=3.0, ge=0)
    snapshot_taps: float = Field(default=0.5, ge=0)
    note_days: float = Field(default=6.0, ge=0)
    note_taps: float = Field(default=1.0, ge=0)
    cut_off_percent: int = Field(default=10, ge=0, le=100)
    returning_days: float = Field(default=7.0, ge=0)
    returning_taps: float = Field(default=1.0, ge=0)
    beside_percent: int = Field(default=25, ge=0, le=100)
    debit_days: float = Field(default=6.0, ge=0)
    debit_taps: float = Field(default=1.0, ge=0)
    float_percent: int = Field(default=15, ge=0, le=100)
    rest_percent: int = Field(default=60, ge=0, le=100)
    first_percent: int = Field(default=5, ge=0, le=100)
    assurance_percent: tuple[int, ...] = (100, 100)
    note_renew_s: int = Field(default=_DAY_S, ge=0)


@dataclass(frozen=True, slots=True)
class Use:
    """How a token was used within the window. Amounts in minor units. `cut_off_minor`: of what it spent, how
    much was presented later than at once. `returns`: it talks to the issuer by itself, and gives back what
    it is asked for."""

    spent_minor: int
    cut_off_minor: int
    largest_minor: int
    returns: bool
    assurance: int = 1


@dataclass(frozen=True, slots=True)
class Debits:
    """What was asked of an account within the window by debits that no token's ceiling covers, whether or
    not it could be given."""

    asked_minor: int
    largest_minor: int


class Allowance(NamedTuple):
    """How much reserve a token should have ahead of its counter, by snapshot and by note."""

    snapshot_minor: int
    note_minor: int


def allowances(
    policy: UsePolicy, uses: Sequence[Use], debits: Debits, *, owable_minor: int, limit_minor: int
) -> tuple[Allowance, ...]:
    """Of each of an account's active tokens.

    `owable_minor`: the limit less what is owed, uncleared, and reserved where no token can use it.
    """
    if owable_minor <= 0:
        return tuple(Allowance(0, 0) for _ in uses)
    window_days = policy.window_s / _DAY_S
    first = limit_minor * policy.first_percent / 100
    some_return = any(use.returns for use in uses)
    beside = [policy.beside_percent / 100 if some_return and not use.returns else 1.0 for use in uses]
    bulk = [part * _bulk(policy, use, window_days, first) for use, part in zip(uses, beside, strict=True)]
    wanted = [
        max(part * _by_note(policy, use, window_days, first), each)
        for use, part, each in zip(uses, beside, bulk, strict=True)
    ]
    kept = 0.0
    if not some_return:
        days = debits.asked_minor / window_days * policy.debit_days
        kept += max(days, debits.largest_minor * policy.debit_taps)
    if len(uses) > 1:
        kept += owable_minor * policy.float_percent / 100
    asked = kept + sum(wanted)
    if asked > owable_minor:
        wanted = [each * owable_minor / asked for each in wanted]
    else:
        rest = (owable_minor - asked) * policy.rest_percent / 100
        takers = [use.returns or not some_return for use in uses]
        wanted = [
            each + rest / sum(takers) if takes else each for each, takes in zip(wanted, takers, strict=True)
        ]
    found = []
    for use, each, in_bulk in zip(uses, wanted, bulk, strict=True):
        note_minor = min(int(each), owable_minor * _assured(policy, use) // 100)
        found.append(Allowance(min(int(in_bulk), note_minor), note_minor))
    return tuple(found)


def ceiling_for(claim: IntervalSet, highest: int, *, ahead_minor: int, free_minor: int) -> int:
    """The next ceiling of a token that should have `ahead_minor` ahead of its counter: as far as the free
    credit lets. Below an earlier one if less is meant for it now; that one then lapses."""
    return min(highest + max(ahead_minor, 0), next_ceiling(claim, highest, max(free_minor, 0)))


def stuck_minor(claim: IntervalSet, highest: int, *, may_pay: bool) -> int:
    """Reserve that no token can use: below its counter, or of one that may not pay."""
    return measure(subtract(claim, ((highest, MAX_COUNTER),)) if may_pay else claim)


def _assured(policy: UsePolicy, use: Use) -> int:
    percents = policy.assurance_percent
    return percents[min(use.assurance, len(percents) - 1)]


def _cut_off_a_day(policy: UsePolicy, use: Use, window_days: float) -> float:
    return max(use.cut_off_minor, use.spent_minor * policy.cut_off_percent / 100) / window_days


def _bulk(policy: UsePolicy, use: Use, window_days: float, first: float) -> float:
    if not use.spent_minor:
        return first
    days = _cut_off_a_day(policy, use, window_days) * policy.snapshot_days
    return max(days, use.largest_minor * policy.snapshot_taps)


def _by_note(policy: UsePolicy, use: Use, window_days: float, first: float) -> float:
    if not use.spent_minor:
        return first
    if use.returns:
        days = use.spent_minor / window_days * policy.returning_days
        return max(days, use.largest_minor * policy.returning_taps)
    days = _cut_off_a_day(policy, use, window_days) * policy.note_days
    return max(days, use.largest_minor * policy.note_taps)
