"""Which record counts when several are at hand, and when the issuer is worth asking."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.authorization.at_hand import AtHand, Source, newest_record, terms_in_force
from pos_gateway.authorization.decision import (
    Ask,
    Decline,
    judge_arqc,
    judge_grant,
    judge_request,
    why_not_ask_issuer,
)
from pos_gateway.authorization.policy import Exposure
from pos_gateway.authorization.reasons import Reason
from pos_gateway.limits.header import Freshness, OnlineTerms
from pos_gateway.limits.record import LimitRecord, Status
from tests.authorization.test_decision import GOOD, RECORD

ONLINE = OnlineTerms(
    keys=(bytes(32),),
    per_tap_cap_minor=40_000,
    grant_life_s=300,
    note_life_s=86_400,
    unsynchronised_amount_cap_minor=200_000,
)
REQUEST = replace(GOOD, online=ONLINE, issuer_reachable=True)


def single(
    ceiling: int, sequence: int, *, source: Source = Source.NOTE, valid: bool = True, **changes: Any
) -> AtHand:
    record = RECORD._replace(ceiling=ceiling, sequence=sequence)._replace(**changes)
    return AtHand(source, record, bytes([sequence % 256]) * 16, valid)


def reason(judgement: Ask | Decline | None) -> Reason:
    assert isinstance(judgement, Decline), judgement
    return judgement.reason


def test_the_highest_valid_ceiling_is_relied_on() -> None:
    note, grant = single(6_000_000, 2), single(7_000_000, 3, source=Source.GRANT)
    expired = single(9_000_000, 4, valid=False)
    ask = judge_request(replace(REQUEST, singles=(note, grant, expired)))
    assert ask == Ask(7_000_000, grant)
    assert isinstance(ask, Ask)
    assert ask.source is Source.GRANT
    lower = single(1_000, 5)
    assert judge_request(replace(REQUEST, singles=(lower,))) == Ask(RECORD.ceiling)


def test_of_equal_ceilings_the_snapshot_s_is_taken() -> None:
    """It costs the online keys' caps nothing."""
    equal = single(RECORD.ceiling, 9)
    assert judge_request(replace(REQUEST, singles=(equal,))) == Ask(RECORD.ceiling)


@pytest.mark.parametrize(("status", "expected"), [(2, Reason.BLOCKED), (3, Reason.CLOSED)])
def test_the_status_of_the_highest_sequence_counts(status: int, expected: Reason) -> None:
    stopped = RECORD._replace(sequence=5, status=Status(status))
    older, newer = single(9_000_000, 4), single(9_000_000, 6)
    assert reason(judge_request(replace(REQUEST, record=stopped, singles=(older,)))) is expected
    assert isinstance(judge_request(replace(REQUEST, record=stopped, singles=(newer,))), Ask)
    told = single(1, 7, status=Status(status), valid=False)
    assert reason(judge_request(replace(REQUEST, singles=(told, newer)))) is expected


def test_the_per_tap_cap_of_the_highest_sequence_counts() -> None:
    tighter = single(1, 5, per_tap_cap_minor=5_000)
    assert reason(judge_request(replace(REQUEST, singles=(tighter,)))) is Reason.OVER_TAP_CAP
    older = single(1, 0, per_tap_cap_minor=5_000)
    assert isinstance(judge_request(replace(REQUEST, singles=(older,))), Ask)


@given(
    st.lists(
        st.builds(
            LimitRecord,
            token_key=st.just(bytes(16)),
            ceiling=st.integers(0, 100),
            per_tap_cap_minor=st.integers(0, 100),
            sequence=st.integers(0, 3),
            status=st.sampled_from(Status),
        ),
        max_size=6,
    )
)
def test_no_order_of_records_changes_the_last_word(records: list[LimitRecord]) -> None:
    singles = [AtHand(Source.NOTE, record, bytes(16), True) for record in records]
    newest, again = newest_record(None, singles), newest_record(None, singles[::-1])
    assert (newest is None) == (not records)
    if newest is not None and again is not None:
        assert (newest.sequence, newest.status is Status.ACTIVE) == (
            again.sequence,
            again.status is Status.ACTIVE,
        )
        of_newest = [r for r in records if r.sequence == newest.sequence]
        assert newest.sequence == max(r.sequence for r in records)
        assert (newest.status is Status.ACTIVE) == all(r.status is Status.ACTIVE for r in of_newest)


def test_the_header_bounds_what_grants_and_notes_may_do() -> None:
    note = single(9_000_000, 2)
    over_tap = replace(REQUEST, amount_minor=40_001, singles=(note,))
    assert judge_request(over_tap) == Ask(RECORD.ceiling)
    nothing_else = replace(over_tap, record=None, issuer_reachable=False)
    assert reason(judge_request(nothing_else)) is Reason.OVER_TAP_CAP
    full = replace(
        REQUEST, record=None, singles=(note,), exposure=Exposure(1, 190_001, GOOD.now_unix_ms, 190_001)
    )
    assert reason(judge_request(full)) is Reason.GATEWAY_CAP
    room = replace(full, exposure=Exposure(1, 190_000, GOOD.now_unix_ms, 190_000))
    assert judge_request(room) == Ask(9_000_000, note)


def test_a_note_is_enough_where_the_snapshot_has_expired_or_does_not_know_the_card() -> None:
    note = single(6_000_000, 2)
    for changes in ({"record": None}, {"freshness": Freshness.EXPIRED}):
        request = replace(REQUEST, singles=(note,), **changes)
        assert judge_request(request) == Ask(6_000_000, note)
        dead = replace(request, singles=(replace(note, valid=False),), issuer_reachable=False)
        assert isinstance(judge_request(dead), Decline)


def test_the_issuer_is_asked_first_where_nothing_here_suffices() -> None:
    unknown = replace(REQUEST, record=None)
    assert judge_request(unknown) == Ask(0, issuer_first=True)
    stale = replace(REQUEST, freshness=Freshness.STALE)
    assert judge_request(stale) == Ask(0, issuer_first=True)
    assert reason(judge_request(replace(unknown, issuer_reachable=False))) is Reason.UNKNOWN_TOKEN
    assert reason(judge_request(replace(stale, issuer_reachable=False))) is Reason.OVER_TAP_CAP
    assert reason(judge_request(replace(unknown, online=OnlineTerms()))) is Reason.UNKNOWN_TOKEN
    blocked = replace(REQUEST, record=RECORD._replace(status=Status.BLOCKED))
    assert reason(judge_request(blocked)) is Reason.BLOCKED


def test_when_the_issuer_is_not_worth_asking() -> None:
    assert why_not_ask_issuer(REQUEST) is None
    assert judge_arqc(REQUEST, Ask(RECORD.ceiling)) is None
    for changes, why in (
        ({"issuer_reachable": False}, "no line"),
        ({"online": OnlineTerms()}, "no grants"),
        ({"amount_minor": 40_001}, "online_per_tap"),
        ({"exposure": Exposure(1, 0, None, 195_000)}, "online_unsynchronised_amount"),
    ):
        request = replace(REQUEST, **changes)
        assert why in (why_not_ask_issuer(request) or "")
        assert reason(judge_arqc(request, Ask(RECORD.ceiling))) is Reason.OVER_CEILING
    down = replace(REQUEST, issuer_reachable=False)
    assert reason(judge_arqc(replace(down, record=None), Ask(0, issuer_first=True))) is Reason.UNKNOWN_TOKEN
    assert reason(judge_arqc(down, Ask(0, issuer_first=True))) is Reason.OVER_TAP_CAP


def test_a_grant_is_judged_like_everything_else() -> None:
    grant = single(9_000_000, 2, source=Source.GRANT)
    assert judge_grant(REQUEST, grant, RECORD.ceiling) == Ask(9_000_000, grant)
    assert reason(judge_grant(REQUEST, single(RECORD.ceiling, 2), RECORD.ceiling)) is Reason.OVER_CEILING
    assert reason(judge_grant(REQUEST, replace(grant, valid=False), RECORD.ceiling)) is Reason.OVER_CEILING
    taken_back = single(9_000_000, 2, status=Status.BLOCKED)
    assert reason(judge_grant(REQUEST, taken_back, RECORD.ceiling)) is Reason.BLOCKED
    big = replace(REQUEST, amount_minor=40_001)
    assert reason(judge_grant(big, grant, RECORD.ceiling)) is Reason.OVER_CEILING


def test_without_limits_no_key_is_in_force() -> None:
    assert terms_in_force(None, 0) == OnlineTerms()
