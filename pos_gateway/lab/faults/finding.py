"""What a fault scenario found, as one JSON line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one scenario.

    `times`: how often the fault was tried. `acknowledged`: approvals or commits somebody was told of.
    `lost`: of these, how many are gone. `posted_twice`: postings too many. `out_of_balance_minor`: what
    the ledger's books are off by. `wrong`: anything else that must not be, in sentences.
    """

    scenario: str
    seed: int
    tried: str
    times: int
    acknowledged: int
    lost: int = 0
    posted_twice: int = 0
    out_of_balance_minor: int = 0
    wrong: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def well(self) -> bool:
        return not (self.lost or self.posted_twice or self.out_of_balance_minor or self.wrong)

    def as_json(self) -> dict[str, Any]:
        return {
            "scenario": self.scenario,
            "well": self.well,
            "seed": self.seed,
            "tried": self.tried,
            "times": self.times,
            "acknowledged": self.acknowledged,
            "lost": self.lost,
            "posted_twice": self.posted_twice,
            "out_of_balance_minor": self.out_of_balance_minor,
            "wrong": list(self.wrong),
            **self.details,
        }
