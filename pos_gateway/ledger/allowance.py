"""How much of an account's free credit becomes ceilings, and how its tokens share it. Pure, policy as data.

A token's share is what its reserve may come to: credit that cut-off shops can use and nobody else can until
it lapses. Plastic meets the ledger only through shops and needs it; a phone fetches more whenever it has a
network, and gives back. Tokens that are used more get more, none less than the smallest slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pos_gateway.ledger.reserve import IntervalSet, interval_set, measure, next_ceiling, subtract

PLASTIC: Final = 1
PHONE: Final = 2
"""With a secure element of its own."""
SOFTWARE_PHONE: Final = 3
"""Host card emulation: its keys lie in the phone's memory."""

_WHOLE: Final = 100


class FormPolicy(BaseModel):
    """What tokens of one assurance are allowed. `share_percent`: how much of what the account may still owe
    its reserve may come to; `weight_percent`: how much it counts when several share; `per_tap_cap_minor`:
    no tap above it, whatever the token's own cap."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    share_percent: int = Field(default=100, ge=0, le=100)
    weight_percent: int = Field(default=100, ge=1, le=10_000)
    per_tap_cap_minor: int | None = Field(default=None, gt=0, lt=1 << 32)


class AllowancePolicy(BaseModel):
    """Assurances that `forms` does not name are allowed what a FormPolicy's defaults allow.

    A token counts `use_percent` more for each tap of the last `recent_days`, `most_taps` at most; no use
    is looked at when `recent_days` is 0. `least_minor`: the smallest slice of a token that may pay.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    forms: Mapping[int, FormPolicy] = Field(default_factory=dict)
    recent_days: int = Field(default=0, ge=0, le=366)
    use_percent: int = Field(default=50, ge=0, le=1_000)
    most_taps: int = Field(default=60, ge=0, le=10_000)
    least_minor: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _assurances(self) -> AllowancePolicy:
        if any(not 0 <= assurance <= 0xFF for assurance in self.forms):
            raise ValueError("an assurance is 0 to 255")
        return self

    def form(self, assurance: int) -> FormPolicy:
        return self.forms.get(assurance, _DEFAULT)

    def per_tap_cap_minor(self, assurance: int, own_minor: int) -> int:
        """A token's cap as its limit record says it."""
        cap_minor = self.form(assurance).per_tap_cap_minor
        return own_minor if cap_minor is None else min(own_minor, cap_minor)


_DEFAULT: Final = FormPolicy()


@dataclass(frozen=True, slots=True)
class Candidate:
    """One token that may pay: U and H of its line, what kind of thing it is, how much it was used lately."""

    claim: IntervalSet
    highest: int
    assurance: int = PLASTIC
    recent_taps: int = 0


def shares_minor(
    candidates: Sequence[Candidate], *, owable_minor: int, share_percent: int, policy: AllowancePolicy
) -> tuple[int, ...]:
    """What each token's reserve may come to; together at most `share_percent` of what the account may
    still owe (`owable_minor`), unless the smallest slices come to more, and never more than all of it."""
    owable_minor = max(owable_minor, 0)
    pot_minor = owable_minor * share_percent // _WHOLE
    weights = [
        policy.form(c.assurance).weight_percent
        * (_WHOLE + policy.use_percent * min(c.recent_taps, policy.most_taps))
        for c in candidates
    ]
    total = sum(weights)
    shares = []
    left_minor = owable_minor
    for candidate, weight in zip(candidates, weights, strict=True):
        most_minor = owable_minor * policy.form(candidate.assurance).share_percent // _WHOLE
        share_minor = min(max(min(pot_minor * weight // total, most_minor), policy.least_minor), left_minor)
        left_minor -= share_minor
        shares.append(share_minor)
    return tuple(shares)


def allot(candidates: Sequence[Candidate], shares: Sequence[int], *, free_minor: int) -> tuple[int, ...]:
    """The next ceiling of each of an account's active tokens; `shares` as `shares_minor` gives them.

    Nobody gets a ceiling further above H than its share, though it would cost nothing: a share that has
    become smaller (a limit cut, another token) could never take effect.
    """
    ceilings = []
    for candidate, share_minor in zip(candidates, shares, strict=True):
        ceiling = allowance(candidate, share_minor=share_minor, free_minor=free_minor)
        new = subtract(interval_set([(candidate.highest, ceiling)]), candidate.claim)
        free_minor -= measure(new)
        ceilings.append(ceiling)
    return tuple(ceilings)


def allowance(candidate: Candidate, *, share_minor: int, free_minor: int) -> int:
    """The highest ceiling for one token, by whichever route: no more new points than are free and than
    its share leaves beside what is reserved for it, and none further above H than its share."""
    budget_minor = min(free_minor, share_minor - measure(candidate.claim))
    ceiling = next_ceiling(candidate.claim, candidate.highest, budget_minor)
    return min(ceiling, candidate.highest + max(share_minor, 0))
