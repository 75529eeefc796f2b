"""Disks that fail at the worst moment: no approval is invented, and none is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from pos_gateway.errors import OutcomeUnknown, Unavailable
from pos_gateway.gateway.nexo.messages import Key
from pos_gateway.gateway.nexo.store import KEEP_MS, Row, Store
from pos_gateway.gateway.nexo.transitions import State
from pos_gateway.lab.virtual_card import SchemeCard, VirtualCard
from pos_gateway.records import Kind
from tests.gateway.nexo.counter import (
    POI,
    SALE_ID,
    Counter,
    how,
    payment,
    request,
    reversal,
    status,
    transaction,
)


def approvals(counter: Counter) -> int:
    return [record.kind for record in counter.shop.journal.records()].count(Kind.AUTHORIZATION)


async def test_a_card_is_asked_for_nothing_before_its_request_is_written_down(
    counter: Counter, card: VirtualCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Any:
        raise Unavailable("disk full")

    moved = card.state.counter
    with monkeypatch.context() as patch:
        patch.setattr(counter.pos.store, "begin", refuse)
        counter.reader.present(card)
        assert how(await counter.ask(payment("A1"))) == "UnavailableService"
    while counter.payments.lanes[0].busy:
        await asyncio.sleep(0.005)
    assert (card.state.counter, approvals(counter)) == (moved, 0)
    assert how(await counter.ask(status("S1", "A1"))) == "NotFound"


async def test_a_slow_store_holds_the_card_back(
    counter: Counter, card: VirtualCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card is read meanwhile; it is asked once the request is on the disk."""
    begin, moved, seen = counter.pos.store.begin, card.state.counter, list[int]()

    def slow(row: Any) -> Any:
        while len(counter.reader.indications) < 2:  # until the card is being read
            pass
        seen.append(card.state.counter)
        return begin(row)

    monkeypatch.setattr(counter.pos.store, "begin", slow)
    counter.reader.present(card)
    assert how(await counter.ask(payment("A1"))) == "Success"
    assert seen == [moved]


@pytest.mark.parametrize("written", [True, False])
async def test_while_the_journal_cannot_say_it_is_in_progress(
    counter: Counter, card: VirtualCard, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    journal = counter.shop.journal
    append = journal.append

    def fails(kind: Kind, *record: Any) -> Any:
        if written:
            append(kind, *record)
        raise OutcomeUnknown("the disk failed and cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "append", fails)
        counter.reader.present(card)
        assert how(await counter.ask(payment("A1"))) == "InProgress"
    # Nothing was appended since: what can be read now proves nothing yet.
    assert how(await counter.ask(status("S1", "A1"))) == "InProgress"
    assert how(await counter.ask(payment("A1"))) == "InProgress"
    counter.reader.present(SchemeCard())
    assert how(await counter.ask(payment("A2"))) == "InvalidCard"  # the journal writes again
    again = await counter.ask(payment("A1"))
    assert how(again) == ("Success" if written else "Aborted")
    assert approvals(counter) == written
    assert await counter.ask(payment("A1")) == again


async def test_a_journal_that_certainly_did_not_write_is_a_failure(
    counter: Counter, card: VirtualCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise Unavailable("the disk is full; nothing was recorded")

    with monkeypatch.context() as patch:
        patch.setattr(counter.shop.journal, "append", full)
        counter.reader.present(card)
        answer = await counter.ask(payment("A1"))
    assert how(answer) == "UnavailableService"
    assert await counter.ask(payment("A1")) == answer


async def test_an_answer_that_cannot_be_kept_is_still_told_and_stays(
    counter: Counter, card: VirtualCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise Unavailable("disk full")

    monkeypatch.setattr(counter.pos.store, "end", full)
    counter.reader.present(card)
    first = await counter.ask(payment("A1"))
    counter.reader.present(SchemeCard())
    second = await counter.ask(payment("A2"))
    assert (how(first), how(second)) == ("Success", "InvalidCard")
    assert await counter.ask(payment("A1")) == first
    assert await counter.ask(payment("A2")) == second


@pytest.mark.parametrize("written", [True, False])
async def test_a_reversal_whose_journal_cannot_say_is_in_progress(
    counter: Counter, card: VirtualCard, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    counter.reader.present(card)
    original = transaction(await counter.ask(payment("A1")))
    journal = counter.shop.journal
    append = journal.append

    def fails(kind: Kind, *record: Any) -> Any:
        if written:
            append(kind, *record)
        raise OutcomeUnknown("the disk failed and cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "append", fails)
        assert how(await counter.ask(reversal("R1", original))) == "InProgress"
    counter.reader.present(SchemeCard())
    await counter.ask(payment("A2"))  # the journal writes again
    assert how(await counter.ask(reversal("R1", original))) == ("Success" if written else "Aborted")
    assert [record.kind for record in journal.records()].count(Kind.REVERSAL) == written


async def test_a_cancellation_is_for_one_payment_alone(counter: Counter, card: VirtualCard) -> None:
    asking = asyncio.create_task(counter.ask(payment("A1")))
    await counter.waiting_for_card()
    counter.payments.lanes[0].cancel(uuid4())
    counter.reader.present(card)
    assert how(await asking) == "Success"


async def test_totals_count_every_end_once(counter: Counter, card: VirtualCard) -> None:
    counter.reader.present(card)
    await counter.ask(payment("A1"))
    await counter.pos.desk.close()
    row = counter.pos.store.find(Key(SALE_ID, POI, "A1"), 0)
    assert row is not None
    counter.pos.desk.fates.resolve(row)
    counter.pos.desk.fates.resolve(row)
    told = await counter.ask(request("GetTotals", "T1"))
    (group,) = told["SaleToPOIResponse"]["GetTotalsResponse"]["TransactionTotals"]
    assert group["PaymentTotals"][0]["TransactionCount"] == 1


def _row(number: int, at_unix_ms: int, answer: bytes | None) -> Row:
    return Row(
        key=Key(SALE_ID, POI, f"N{number}"),
        category="Payment",
        digest=b"d",
        payment_id=uuid4(),
        second_id=uuid4(),
        at_unix_ms=at_unix_ms,
        asked={},
        state=State.OPEN if answer is None else State.APPROVED,
        answer=answer,
    )


def test_the_store_forgets_what_is_old_and_answered_and_nothing_else(tmp_path: Path) -> None:
    with Store.open(tmp_path / "requests.sqlite3") as store:
        store.begin(_row(1, 0, b"answered"))
        store.begin(_row(2, 0, None))
        for number in range(3, 600):
            store.begin(_row(number, KEEP_MS + 1, b"answered"))
        assert store.find(Key(SALE_ID, POI, "N1"), 0) is None
        assert [row.key.service_id for row in store.unanswered()] == ["N2"]
        assert store.find(Key(SALE_ID, POI, "N3"), KEEP_MS + 1) is not None


def test_a_store_that_is_full_takes_no_more_until_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pos_gateway.gateway.nexo.store._MAX_ROWS", 3)
    monkeypatch.setattr("pos_gateway.gateway.nexo.store._PURGE_EVERY", 1)
    with Store.open(tmp_path / "requests.sqlite3") as store:
        for number in range(3):
            store.begin(_row(number, 0, b"answered"))
        for number in (7, 8):
            with pytest.raises(Unavailable, match="too many"):
                store.begin(_row(number, 1, None))
        store.begin(_row(9, KEEP_MS + 1, None))
