"""The one table of what may become of a request."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.gateway.nexo.transitions import TABLE, TOLD, Condition, Event, State, after, told
from tests.gateway.nexo.counter import UNHURRIED

ENDS = [state for state in State if state.ended]
GOING_ON = [state for state in State if not state.ended]
FROM_LANE = (Event.APPROVED, Event.DECLINED, Event.CANCELLED, Event.READER_GONE, Event.FAILED)

events = st.lists(st.sampled_from(Event), max_size=12)


def run(happened: Sequence[Event], state: State = State.NEW) -> list[State]:
    states = [state]
    for event in happened:
        states.append(after(states[-1], event))
    return states


@UNHURRIED
@given(events)
def test_an_end_is_never_left(happened: list[Event]) -> None:
    states = run(happened)
    for before, now in pairwise(states):
        assert not before.ended or now is before


@UNHURRIED
@given(events)
def test_approved_is_told_if_and_only_if_it_was_the_first_word(happened: list[Event]) -> None:
    """Whatever comes before or after, an approval that ended it is success, and nothing else is."""
    states = run([Event.REQUESTED, *happened])
    ended_by = next((event for event, now in zip(happened, states[2:], strict=True) if now.ended), None)
    assert (states[-1] is State.APPROVED) == (ended_by is Event.APPROVED)


@UNHURRIED
@given(events)
def test_an_abort_never_undoes_and_never_approves(happened: list[Event]) -> None:
    """With an abort at any place an approval stays one; an abort by itself ends nothing that has begun."""
    for place in range(len(happened) + 1):
        with_abort = [Event.REQUESTED, *happened[:place], Event.ABORT_ASKED, *happened[place:]]
        without = run([Event.REQUESTED, *happened])[-1]
        with_it = run(with_abort)[-1]
        assert (with_it is State.APPROVED) == (without is State.APPROVED)
        assert with_it.ended == without.ended


@pytest.mark.parametrize("state", [State.OPEN, State.ABORTING])
@pytest.mark.parametrize("event", FROM_LANE)
def test_every_end_of_a_lane_is_an_end(state: State, event: Event) -> None:
    assert after(state, event).ended


@pytest.mark.parametrize("state", [State.OPEN, State.ABORTING, State.DOUBTFUL])
def test_a_journal_that_can_be_read_ends_everything(state: State) -> None:
    for event in (Event.APPROVED, Event.DECLINED, Event.NOT_IN_JOURNAL):
        assert after(state, event).ended


def test_what_was_aborted_before_it_came_never_begins() -> None:
    assert run([Event.ABORT_ASKED, Event.REQUESTED, Event.APPROVED])[-1] is State.ABORTED


def test_a_doubt_is_told_as_going_on_and_never_as_a_no() -> None:
    doubt = run([Event.REQUESTED, Event.OUTCOME_UNKNOWN])[-1]
    assert told(doubt).condition is Condition.IN_PROGRESS
    assert after(doubt, Event.CANCELLED) is doubt


def test_the_table_leads_from_nowhere_into_an_end_it_does_not_tell() -> None:
    assert {state for state, _ in TABLE} == set(GOING_ON)
    assert set(TABLE.values()) >= set(ENDS)
    for state in ENDS:
        assert (TOLD[state].condition is None) == (state is State.APPROVED)
        assert TOLD[state].sentence.english
        assert TOLD[state].sentence.chinese


def test_a_bystander_can_tell_the_ends_apart() -> None:
    busy = {State.BUSY: Condition.BUSY, State.NO_READER: Condition.UNAVAILABLE_DEVICE}
    assert {state: told(state).condition for state in busy} == busy
    assert told(State.ABORTED).condition is Condition.ABORTED
    assert told(State.CANCELLED).condition is Condition.CANCEL
