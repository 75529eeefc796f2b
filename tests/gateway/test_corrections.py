"""Voids and refunds from the till's journal to the ledger's books."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from pos_gateway.errors import Conflict, InvalidMessage, NotFound, PosGatewayError
from pos_gateway.gateway.journal import Draft, Journal
from pos_gateway.gateway.till import Approved
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.records import Kind, Record, Verdict
from tests.gateway.journalling import acknowledgement, new_id, open_journal, sale


@pytest.fixture
def shop(tmp_path: Path, ledger_home: Path) -> Iterator[Shop]:
    shutil.copytree(ledger_home, tmp_path / "ledger")
    with Shop(tmp_path) as shop:
        yield shop


@pytest.fixture
def card(shop: Shop) -> VirtualCard:
    _, personalisation = shop.issue(limit_minor=30_000)
    shop.publish()
    return VirtualCard(personalisation)


def pay(shop: Shop, card: VirtualCard, amount_minor: int = 1930) -> Record:
    payment = shop.till.new_payment(uuid4(), amount_minor, shop.journal.last_sequence + 1)
    outcome = shop.till.tap(payment, DirectChannel(card))
    assert isinstance(outcome, Approved)
    return outcome.record


def acknowledge(shop: Shop, about: UUID, verdict: Verdict) -> None:
    facts = {"about": str(about), "verdict": verdict.value, "reason": "", "at_unix_ms": 1}
    shop.journal.append(Kind.ACKNOWLEDGEMENT, uuid4(), facts)


def outstanding(shop: Shop) -> int:
    shop.ledger.check_books()
    return sum(account.outstanding_minor for account in shop.ledger.accounts())


def test_a_void_before_presentment_travels_with_its_payment(shop: Shop, card: VirtualCard) -> None:
    payment = pay(shop, card)
    shop.till.corrections.void(payment.id, uuid4(), "wrong amount typed")
    assert (shop.journal.exposure.count, shop.journal.exposure.amount_minor) == (2, 0)
    queue = shop.journal.queue()
    assert [record.kind for record in queue] == [Kind.AUTHORIZATION, Kind.REVERSAL]
    assert [v.verdict for v in shop.present(queue)] == [Verdict.POSTED] * 2
    assert outstanding(shop) == 0


def test_refunds_after_presentment_up_to_what_is_left(shop: Shop, card: VirtualCard) -> None:
    payment = pay(shop, card)
    shop.present(shop.journal.queue())
    acknowledge(shop, payment.id, Verdict.POSTED)
    assert shop.journal.exposure.count == 0
    shop.till.corrections.refund(payment.id, 1000, uuid4(), "one of two returned")
    with pytest.raises(Conflict, match="930 minor units are left"):
        shop.till.corrections.refund(payment.id, 931, uuid4(), "")
    shop.till.corrections.refund(payment.id, 930, uuid4(), "the other too")
    # Nothing of it can be lost any more: the ledger has the payment.
    assert (shop.journal.exposure.count, shop.journal.exposure.amount_minor) == (2, 0)
    assert [v.verdict for v in shop.present(shop.journal.queue())] == [Verdict.POSTED] * 2
    assert outstanding(shop) == 0


def test_the_same_id_again_is_the_same_correction(shop: Shop, card: VirtualCard) -> None:
    payment, other, once = pay(shop, card), pay(shop, card), uuid4()
    corrections = shop.till.corrections
    first = corrections.refund(payment.id, 500, once, "")
    assert corrections.refund(payment.id, 500, once, "") == first
    wrongly: list[Callable[[], Record]] = [
        lambda: corrections.refund(payment.id, 501, once, ""),
        lambda: corrections.refund(other.id, 500, once, ""),
        lambda: corrections.void(other.id, once, ""),
        lambda: corrections.refund(other.id, 500, payment.id, ""),
    ]
    for wrong in wrongly:
        with pytest.raises(Conflict, match="something else"):
            wrong()
    voided = uuid4()
    assert corrections.void(other.id, voided, "") == corrections.void(other.id, voided, "")
    assert [r.kind for r in shop.journal.queue()].count(Kind.REFUND) == 1


def test_only_an_approved_payment_can_be_taken_back(shop: Shop, card: VirtualCard) -> None:
    corrections = shop.till.corrections
    with pytest.raises(NotFound, match="no payment was approved"):
        corrections.void(uuid4(), uuid4(), "")
    payment = pay(shop, card)
    refund = corrections.refund(payment.id, 1, uuid4(), "")
    with pytest.raises(NotFound):
        corrections.refund(refund.id, 1, uuid4(), "")
    with pytest.raises(Conflict, match="more than nothing"):
        corrections.refund(payment.id, 0, uuid4(), "")
    with pytest.raises(InvalidMessage, match="120"):
        corrections.refund(payment.id, 1, uuid4(), "x" * 121)
    with pytest.raises(Conflict, match="refund the rest"):
        corrections.void(payment.id, uuid4(), "")


def test_a_correction_that_the_ledger_refused_can_be_made_anew(shop: Shop, card: VirtualCard) -> None:
    payment = pay(shop, card)
    refused = shop.till.corrections.refund(payment.id, 1930, uuid4(), "")
    acknowledge(shop, refused.id, Verdict.INVALID)
    [refusal] = shop.journal.view.refused
    assert (refusal.kind, refusal.amount_minor) == (Kind.REFUND, 1930)
    shop.till.corrections.refund(payment.id, 1930, uuid4(), "")
    waiting = shop.till.corrections.standing(payment.id)
    assert waiting is not None
    assert waiting.refunded_minor == 1930
    # One that the ledger keeps until the payment arrives is not refused.
    other = pay(shop, card)
    early = shop.till.corrections.void(other.id, uuid4(), "")
    acknowledge(shop, early.id, Verdict.UNKNOWN)
    with pytest.raises(Conflict, match="void already"):
        shop.till.corrections.void(other.id, uuid4(), "")


def test_refunds_from_several_threads_never_go_beyond_the_payment(shop: Shop, card: VirtualCard) -> None:
    payment = pay(shop, card, 1000)
    start = threading.Barrier(8, timeout=20)
    refused: list[PosGatewayError] = []

    def refund() -> None:
        start.wait()
        try:
            shop.till.corrections.refund(payment.id, 300, uuid4(), "")
        except Conflict as error:
            refused.append(error)

    threads = [threading.Thread(target=refund) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 5
    assert {v.verdict for v in shop.present(shop.journal.queue())} == {Verdict.POSTED}
    assert outstanding(shop) == 100


def correction(kind: Kind, number: int, about: int, amount_minor: int) -> Draft:
    facts = {"about": str(new_id(about)), "amount_minor": amount_minor, "at_unix_ms": 1_764_000_000_500}
    return Draft(kind, new_id(number), facts)


def test_exposure_is_net_and_the_same_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite3"

    def exposed(journal: Journal) -> tuple[int, int]:
        return journal.exposure.count, journal.exposure.amount_minor

    with open_journal(path) as journal:
        journal.append_all([sale(0), sale(1), sale(2)])
        assert exposed(journal) == (3, 3 * 1930)
        journal.append_all([correction(Kind.REVERSAL, 10, 0, 1930), correction(Kind.REFUND, 11, 1, 30)])
        assert exposed(journal) == (5, 1930 - 30 + 1930)
        journal.append_all([acknowledgement(1)])
        assert exposed(journal) == (4, 1930)
        journal.append_all([correction(Kind.REFUND, 12, 1, 900)])
        assert exposed(journal) == (5, 1930)
        journal.append_all([acknowledgement(0), acknowledgement(2), acknowledgement(10), acknowledgement(11)])
        assert exposed(journal) == (1, 0)
        view = journal.view
    with open_journal(path) as journal:
        assert journal.view == view
        assert [r.id for r in journal.queue()] == [new_id(12)]
        assert journal.verify() == 11
