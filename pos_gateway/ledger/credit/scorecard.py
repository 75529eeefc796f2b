"""How large a line is and whether a vault may be upgraded to it: an explicit scorecard, as data, pure.

Every characteristic gives points for the bin that its feature's value falls into; the sum falls into a
band; the band gives the line. Nothing else enters, so each decision can be made again from the card's
version and the features, and explained by the characteristics that cost the customer the most points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pos_gateway.errors import InvalidInput

REASONS_TOLD: Final = 4


class Bin(BaseModel):
    """Values below `below` that are in no earlier bin; the last one has no bound."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    below: int | None = None
    points: int


def _rising(bins: tuple[Bin, ...]) -> tuple[Bin, ...]:
    bounds = [bin_.below for bin_ in bins if bin_.below is not None]
    if not bins or bins[-1].below is not None or len(bounds) < len(bins) - 1:
        raise ValueError("every bin but the last needs a bound, and the last none")
    if any(low >= high for low, high in pairwise(bounds)):
        raise ValueError("bounds must rise")
    return bins


class Characteristic(BaseModel):
    """One feature and what its values are worth. The sentences tell a customer who lost points by it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    feature: str = Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")
    bins: Annotated[tuple[Bin, ...], AfterValidator(_rising)]
    missing_points: int
    """Where nothing is known."""
    english: str = Field(min_length=1, max_length=200)
    chinese: str = Field(min_length=1, max_length=200)

    @property
    def most(self) -> int:
        return max(bin_.points for bin_ in self.bins)

    def points(self, value: int | None) -> int:
        if value is None:
            return self.missing_points
        return next(b.points for b in self.bins if b.below is None or value < b.below)


class Band(BaseModel):
    """From `from_points` up to the next band: the line, and whether a vault may be upgraded to it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    from_points: int
    limit_minor: int = Field(ge=0)
    upgrades: bool = False


class Scorecard(BaseModel):
    """Below the first band there is no line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = Field(ge=1)
    base_points: int = 0
    characteristics: tuple[Characteristic, ...] = Field(min_length=1, max_length=50)
    bands: tuple[Band, ...] = Field(min_length=1, max_length=50)

    @model_validator(mode="after")
    def _consistent(self) -> Scorecard:
        names = [c.feature for c in self.characteristics]
        if len(set(names)) < len(names):
            raise ValueError("a feature has one characteristic")
        for lower, higher in pairwise(self.bands):
            if lower.from_points >= higher.from_points or lower.limit_minor > higher.limit_minor:
                raise ValueError("bands must rise: more points, no smaller line")
        return self


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a scorecard decided, and the characteristics (at most four) that cost the most points."""

    version: int
    points: int
    limit_minor: int
    upgrades: bool
    reasons: tuple[Characteristic, ...]


def evaluate(card: Scorecard, features: Mapping[str, int | None]) -> Evaluation:
    """
    Raises:
        InvalidInput: a feature that the scorecard does not name: it would be ignored in silence.
    """
    known = {characteristic.feature for characteristic in card.characteristics}
    if unknown := sorted(features.keys() - known):
        raise InvalidInput("this scorecard has no such feature", where=", ".join(unknown)[:80])
    given = {c.feature: c.points(features.get(c.feature)) for c in card.characteristics}
    points = card.base_points + sum(given.values())
    band = next((b for b in reversed(card.bands) if points >= b.from_points), None)
    lost = sorted(card.characteristics, key=lambda c: given[c.feature] - c.most)
    return Evaluation(
        version=card.version,
        points=points,
        limit_minor=band.limit_minor if band is not None else 0,
        upgrades=band is not None and band.upgrades,
        reasons=tuple(c for c in lost if given[c.feature] < c.most)[:REASONS_TOLD],
    )
