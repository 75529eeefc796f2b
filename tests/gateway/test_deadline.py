from __future__ import annotations

import pytest

from pos_gateway.authorization.policy import Exposure
from pos_gateway.gateway.deadline import Deadline, Urgency, deadline
from pos_gateway.gateway.journal_view import RunningView
from pos_gateway.gateway.meanings import Paid, meaning_of
from pos_gateway.money import currency
from pos_gateway.records import Kind, Verdict
from tests.gateway.journalling import NOW_UNIX_MS, sale

DAY_S = 86_400


def look(now_unix_ms: int, deadline_s: int | None = 14 * DAY_S, share_percent: int = 25) -> Deadline:
    """Two approvals two days apart."""
    view = RunningView()
    for place, number in enumerate((0, 2 * DAY_S * 1000), start=1):
        draft = sale(number)
        view.add(place, draft.id.bytes, draft.kind, None, draft.facts)
    exposure = view.value().exposure
    return deadline(
        exposure,
        view.waiting_since,
        presentment_deadline_s=deadline_s,
        warn_share_percent=share_percent,
        now_unix_ms=now_unix_ms,
    )


@pytest.mark.parametrize(
    ("age_s", "urgency", "count"),
    [
        (0, Urgency.FINE, 0),
        (10 * DAY_S, Urgency.FINE, 0),
        (10.5 * DAY_S, Urgency.NEAR, 1),
        (12.5 * DAY_S, Urgency.NEAR, 2),
        (14 * DAY_S, Urgency.NEAR, 2),
        (14.1 * DAY_S, Urgency.PASSED, 2),
    ],
)
def test_the_last_quarter_before_the_deadline_warns(age_s: float, urgency: Urgency, count: int) -> None:
    found = look(NOW_UNIX_MS + int(1000 * age_s))
    assert (found.urgency, found.count, found.amount_minor) == (urgency, count, 1930 * count)
    assert found.due_unix_ms == NOW_UNIX_MS + 14 * DAY_S * 1000
    told = found.as_json(currency("CNY"), NOW_UNIX_MS + int(1000 * age_s))
    if urgency is Urgency.FINE:
        assert told["english"] == told["chinese"] == ""
    else:
        assert told["amount"] in told["english"]
        assert told["amount"] in told["chinese"]
        assert "journal carry" in told["english"]


def test_a_short_deadline_warns_for_a_day_at_least_and_without_one_nothing_is_said() -> None:
    assert look(NOW_UNIX_MS + 2 * DAY_S * 1000 + 1, 3 * DAY_S).urgency is Urgency.NEAR
    assert look(NOW_UNIX_MS + DAY_S * 1000, 3 * DAY_S).urgency is Urgency.FINE
    assert look(NOW_UNIX_MS + 100 * DAY_S * 1000, None) == Deadline(Urgency.FINE)
    nothing = deadline(
        Exposure(0, 0, None),
        lambda _: (0, 0),
        presentment_deadline_s=1,
        warn_share_percent=25,
        now_unix_ms=NOW_UNIX_MS,
    )
    assert nothing == Deadline(Urgency.FINE)


def test_every_verdict_on_every_kind_says_what_becomes_of_the_money_in_both_languages() -> None:
    for kind in (kind for kind in Kind if kind.presented):
        for verdict in (None, *Verdict):
            meaning = meaning_of(kind, verdict)
            assert meaning.english.endswith(".")
            assert meaning.chinese.endswith("。")
            if verdict is not None and verdict.paid:
                assert meaning.money is Paid.PAID
            else:
                assert meaning.money is not Paid.PAID
    assert meaning_of(Kind.AUTHORIZATION, Verdict.LATE).money is Paid.UNDER_REVIEW
    assert meaning_of(Kind.AUTHORIZATION, Verdict.INVALID).money is Paid.NOT_PAID
