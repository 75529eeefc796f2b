"""How much of an account's free credit becomes ceiling, and on which of its tokens. Pure.

The invariant says what may be given out; this says what should be. What a token holds as reserve can be
spent where there is no line, and nowhere else: too little declines taps in cut-off shops, too much
declines what its owner buys elsewhere. So the plan goes by use: by what each token has spent lately, by
its largest taps, and by how soon its reserve could be got back if it is wanted elsewhere. A phone returns
what it does not need whenever it has a network; plastic keeps what it has until it lapses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field


class AllowancePolicy(BaseModel):
    """The issuer's decisions about allowances. Percentages are of what an account may owe more than it
    does (its limit less what is owed and uncleared), spans in seconds.

    `window_s`: how far back use is looked at. `cover_days_*`: how many days of a token's use its allowance
    should last, for one that `returns` what it does not need, and for plastic. `cover_taps`: and at least so
    many of its largest taps. `first_percent`: what a token without a history gets. `online_days`: how many
    days of an account's online debits are kept back from plastic. `float_percent`: kept back where several
    tokens share an account, for the one that runs short. `assurance_percent`: the most a token may hold by
    its assurance, in the order of assurance 0, 1, 2…; higher ones get the last.
    `note_life_s`, `grant_life_s`: how long those are valid. `note_renew_s`: a note that says nothing new
    is written again when it has no longer than this.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    window_s: int = Field(default=14 * 86_400, gt=0)
    cover_days_returning: float = Field(default=7.0, ge=0)
    cover_days_plastic: float = Field(default=4.0, ge=0)
    cover_taps: float = Field(default=1.5, ge=0)
    first_percent: int = Field(default=15, ge=0, le=100)
    online_days: float = Field(default=6.0, ge=0)
    float_percent: int = Field(default=5, ge=0, le=100)
    assurance_percent: tuple[int, ...] = (100, 100)
    note_life_s: int = Field(default=4 * 86_400, gt=0)
    note_renew_s: int = Field(default=2 * 86_400, ge=0)
    grant_life_s: int = Field(default=900, gt=0)


@dataclass(frozen=True, slots=True)
class Use:
    """How a token was used within the window. Amounts in minor units. `returns`: it talks to the issuer by
    itself, and gives back what it is asked for."""

    spent_minor: int
    largest_minor: int
    returns: bool
    assurance: int = 1


def allowances(
    policy: AllowancePolicy, uses: Sequence[Use], *, owable_minor: int, limit_minor: int, debited_minor: int
) -> tuple[int, ...]:
    """How much reserve each of an account's active tokens should hold.

    `owable_minor`: the limit less what is owed and uncleared. `debited_minor`: what the account has
    bought within the window by debits that no token's ceiling covers.
    """
    if owable_minor <= 0:
        return tuple(0 for _ in uses)
    caps = [owable_minor * _assured(policy, use) // 100 for use in uses]
    if len(uses) == 1 and uses[0].returns:
        return (caps[0],)
    days = policy.window_s / 86_400
    wanted = [
        min(cap, _wanted_minor(policy, use, days, limit_minor))
        for use, cap in zip(uses, caps, strict=True)
    ]
    kept_minor = debited_minor / days * policy.online_days
    if len(uses) > 1:
        kept_minor += owable_minor * policy.float_percent / 100
    everything_minor = sum(wanted) + kept_minor
    if everything_minor > owable_minor:
        return tuple(int(each * owable_minor / everything_minor) for each in wanted)
    return tuple(
        min(cap, int(owable_minor - everything_minor + each)) if use.returns else int(each)
        for use, cap, each in zip(uses, caps, wanted, strict=True)
    )


def _assured(policy: AllowancePolicy, use: Use) -> int:
    percents = policy.assurance_percent
    return percents[min(use.assurance, len(percents) - 1)]


def _wanted_minor(policy: AllowancePolicy, use: Use, days: float, limit_minor: int) -> float:
    if not use.spent_minor:
        return limit_minor * policy.first_percent / 100
    cover_days = policy.cover_days_returning if use.returns else policy.cover_days_plastic
    return max(use.spent_minor / days * cover_days, use.largest_minor * policy.cover_taps)
