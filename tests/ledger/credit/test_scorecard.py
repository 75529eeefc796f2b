from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pos_gateway.errors import InvalidInput
from pos_gateway.ledger.credit.scorecard import Scorecard, evaluate


def characteristic(feature: str, *bins: tuple[int | None, int], missing: int = 0) -> dict[str, Any]:
    return {
        "feature": feature,
        "bins": [{"below": below, "points": points} for below, points in bins],
        "missing_points": missing,
        "english": f"Because of {feature}.",
        "chinese": f"因 {feature}。",
    }


CARD = {
    "version": 3,
    "base_points": 100,
    "characteristics": [
        characteristic("months_open", (6, 0), (24, 20), (None, 40), missing=0),
        characteristic("days_overdue", (1, 50), (30, 10), (None, -80), missing=20),
        characteristic("used_percent", (30, 30), (80, 15), (None, 0), missing=10),
    ],
    "bands": [
        {"from_points": 130, "limit_minor": 50_000},
        {"from_points": 160, "limit_minor": 200_000, "upgrades": True},
        {"from_points": 200, "limit_minor": 1_000_000, "upgrades": True},
    ],
}
SCORECARD = Scorecard.model_validate(CARD)
FEATURES = st.dictionaries(
    st.sampled_from(["months_open", "days_overdue", "used_percent"]), st.none() | st.integers(-5, 500)
)


@pytest.mark.parametrize(
    ("features", "points", "limit_minor", "upgrades", "reasons"),
    [
        ({"months_open": 24, "days_overdue": 0, "used_percent": 29}, 220, 1_000_000, True, []),
        ({"months_open": 6, "days_overdue": 0, "used_percent": 95}, 170, 200_000, True, ["used", "months"]),
        ({"months_open": 23, "days_overdue": 30, "used_percent": 10}, 70, 0, False, ["days", "months"]),
        ({}, 130, 50_000, False, ["months", "days", "used"]),
        (
            {"months_open": None, "days_overdue": 1, "used_percent": 30},
            125,
            0,
            False,
            ["months", "days", "used"],
        ),
    ],
)
def test_by_hand(
    features: dict[str, int | None], points: int, limit_minor: int, upgrades: bool, reasons: list[str]
) -> None:
    found = evaluate(SCORECARD, features)
    assert (found.version, found.points, found.limit_minor, found.upgrades) == (
        3,
        points,
        limit_minor,
        upgrades,
    )
    assert [reason.feature.split("_")[0] for reason in found.reasons] == reasons


@given(FEATURES)
def test_more_points_never_give_a_smaller_line(features: dict[str, int | None]) -> None:
    found = evaluate(SCORECARD, features)
    better = evaluate(SCORECARD, features | {"days_overdue": 0})
    assert better.points >= found.points
    assert better.limit_minor >= found.limit_minor
    assert better.upgrades >= found.upgrades


@given(FEATURES)
def test_every_point_lost_below_the_best_is_explained(features: dict[str, int | None]) -> None:
    found = evaluate(SCORECARD, features)
    best = SCORECARD.base_points + sum(c.most for c in SCORECARD.characteristics)
    lost = sum(c.most - c.points(features.get(c.feature)) for c in found.reasons)
    assert best - found.points == lost


def test_a_feature_the_card_does_not_know_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="zodiac"):
        evaluate(SCORECARD, {"zodiac": 3})


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0},
        {"characteristics": []},
        {"characteristics": [characteristic("a", (None, 1)), characteristic("a", (None, 1))]},
        {"characteristics": [characteristic("a", (5, 1))]},
        {"characteristics": [characteristic("a", (None, 1), (None, 1))]},
        {"characteristics": [characteristic("a", (5, 1), (5, 1), (None, 1))]},
        {"characteristics": [characteristic("A b", (None, 1))]},
        {"bands": [{"from_points": 2, "limit_minor": 1}, {"from_points": 2, "limit_minor": 2}]},
        {"bands": [{"from_points": 1, "limit_minor": 2}, {"from_points": 2, "limit_minor": 1}]},
        {"bands": [{"from_points": 1, "limit_minor": -1}]},
        {"surprise": 1},
    ],
)
def test_scorecards_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Scorecard.model_validate(CARD | change)
