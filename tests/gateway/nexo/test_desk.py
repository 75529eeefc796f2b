"""What POS software asks and is told: real till, journal, store and cards."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import Any
from urllib.parse import parse_qs
from uuid import UUID, uuid4

import pytest

from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.errors import ReaderUnavailable
from pos_gateway.gateway.nexo.store import KEEP_MS
from pos_gateway.gateway.program import now_unix_ms
from pos_gateway.instalments import quote
from pos_gateway.lab.virtual_card import SchemeCard, VirtualCard
from pos_gateway.ledger.accounts import TokenStatus
from pos_gateway.records import Kind, Verdict
from tests.gateway.nexo.conftest import OFFERS
from tests.gateway.nexo.counter import (
    POI,
    SALE_ID,
    SECOND_POI,
    UNPLUGGED_POI,
    Counter,
    abort,
    how,
    payment,
    request,
    reversal,
    said,
    status,
    transaction,
)


def approvals(counter: Counter) -> list[Any]:
    return [r for r in counter.shop.journal.records() if r.kind is Kind.AUTHORIZATION]


async def paid(counter: Counter, card: VirtualCard, service_id: str, amount: Any = 19.30) -> dict[str, Any]:
    counter.reader.present(card)
    answer = await counter.ask(payment(service_id, amount))
    assert how(answer) == "Success", answer
    return answer


async def test_a_payment_is_approved_and_told_as_a_terminal_would(
    counter: Counter, card: VirtualCard
) -> None:
    answer = await paid(counter, card, "A1")
    message = answer["SaleToPOIResponse"]
    assert message["MessageHeader"] == {
        "ProtocolVersion": "3.0",
        "MessageClass": "Service",
        "MessageCategory": "Payment",
        "MessageType": "Response",
        "SaleID": SALE_ID,
        "ServiceID": "A1",
        "POIID": POI,
    }
    body = message["PaymentResponse"]
    assert body["SaleData"]["SaleTransactionID"]["TransactionID"] == "order-A1"
    assert body["PaymentResult"]["OnlineFlag"] is False
    assert body["PaymentResult"]["AmountsResp"] == {"Currency": "CNY", "AuthorizedAmount": Decimal("19.30")}
    assert body["POIData"]["POIReconciliationID"] == "1000"
    (record,) = approvals(counter)
    assert transaction(answer) == f"A1.{record.id.hex}"
    assert record.facts()["pos"]["service_id"] == "A1"
    assert [r["DocumentQualifier"] for r in body["PaymentReceipt"]] == ["CustomerReceipt", "CashierReceipt"]
    lines = [parse_qs(t["Text"]) for t in body["PaymentReceipt"][0]["OutputContent"]["OutputText"]]
    assert {"key": ["totalAmount"], "name": ["TOTAL"], "value": ["CNY 19.30"]} in lines
    told = parse_qs(said(answer)["AdditionalResponse"])
    assert told["message"] == ["Approved"]
    assert told["cardType"] == ["pos-gateway-credit"]


async def test_no_full_token_number_is_told(counter: Counter, personalisation: Personalisation) -> None:
    answer = await paid(counter, VirtualCard(personalisation), "A1")
    assert personalisation.pan not in str(answer)
    assert personalisation.pan[-4:] in str(answer)


async def test_the_same_request_again_gets_the_same_answer(counter: Counter, card: VirtualCard) -> None:
    first = await paid(counter, card, "A1")
    assert await counter.ask(payment("A1")) == first
    assert len(approvals(counter)) == 1


async def test_two_who_ask_the_same_at_once_get_one_payment(counter: Counter, card: VirtualCard) -> None:
    counter.reader.present(card)
    first, second = await asyncio.gather(counter.ask(payment("A1")), counter.ask(payment("A1")))
    assert first == second
    assert how(first) == "Success"
    assert len(approvals(counter)) == 1


@pytest.mark.parametrize("kept", [True, False])
async def test_a_service_id_never_stands_for_another_request(
    counter: Counter, card: VirtualCard, kept: bool
) -> None:
    await paid(counter, card, "A1")
    if kept:
        await counter.pos.desk.close()
    assert how(await counter.ask(payment("A1", 5))) == "NotAllowed"
    assert how(await counter.ask(reversal("A1", uuid4().hex))) == "NotAllowed"
    assert how(
        await counter.ask(request("Reconciliation", "A1", ReconciliationType="SaleReconciliation"))
    ) == ("NotAllowed")
    assert len(approvals(counter)) == 1


async def test_after_48_hours_a_service_id_is_free_again(counter: Counter, card: VirtualCard) -> None:
    first = await paid(counter, card, "A1")
    await counter.pos.desk.close()
    counter.now_unix_ms = lambda: now_unix_ms() + KEEP_MS - 60_000
    assert await counter.ask(payment("A1")) == first
    counter.now_unix_ms = lambda: now_unix_ms() + KEEP_MS + 60_000
    assert how(await counter.ask(status("S1", "A1"))) == "NotFound"
    second = await paid(counter, card, "A1")
    assert transaction(second) != transaction(first)
    assert len(approvals(counter)) == 2


@pytest.mark.parametrize("kept", [True, False])
async def test_a_restart_changes_no_answer(counter: Counter, card: VirtualCard, kept: bool) -> None:
    """Also if it stops between telling an approval and writing down that it did."""
    if not kept:
        counter.pos.store.end = _does_nothing  # type: ignore[method-assign]
    first = await paid(counter, card, "A1")
    await (counter.stop() if kept else counter.die())
    counter.start_again()
    assert await counter.ask(payment("A1")) == first
    told = (await counter.ask(status("S1", "A1")))["SaleToPOIResponse"]["TransactionStatusResponse"]
    assert told["Response"]["Result"] == "Success"
    repeated = told["RepeatedMessageResponse"]
    assert repeated["MessageHeader"] == first["SaleToPOIResponse"]["MessageHeader"]
    assert repeated["RepeatedResponseMessageBody"] == {
        "PaymentResponse": first["SaleToPOIResponse"]["PaymentResponse"]
    }
    totals = await counter.ask(request("GetTotals", "T1"))
    assert _totals(totals["SaleToPOIResponse"]["GetTotalsResponse"]) == {"Debit": (1, Decimal("19.30"))}


def _does_nothing(key: object, state: object, answer: bytes, counted: object = None) -> bytes:
    return answer


async def test_even_without_its_own_memory_nobody_pays_twice(counter: Counter, card: VirtualCard) -> None:
    first = await paid(counter, card, "A1")
    await counter.stop()
    for file in counter.folder.glob("requests.sqlite3*"):
        file.unlink()
    counter.start_again()
    again = await counter.ask(payment("A1"))
    assert how(again) == "Success"
    assert transaction(again) == transaction(first)
    assert len(approvals(counter)) == 1


async def test_a_payment_under_way_when_the_gateway_stopped_is_lost_for_good(
    counter: Counter, card: VirtualCard
) -> None:
    asking = asyncio.create_task(counter.ask(payment("A1")))
    await counter.waiting_for_card()
    # The process is gone: whoever waits there never hears of it, and nothing is written down.
    counter.pos.desk._loop = None
    await counter.die()
    asking.cancel()
    counter.start_again()
    told = await counter.ask(status("S1", "A1"))
    body = told["SaleToPOIResponse"]["TransactionStatusResponse"]["RepeatedMessageResponse"]
    response = body["RepeatedResponseMessageBody"]["PaymentResponse"]["Response"]
    assert (response["Result"], response["ErrorCondition"]) == ("Failure", "Aborted")
    counter.reader.present(card)
    assert how(await counter.ask(payment("A1"))) == "Aborted"
    assert not approvals(counter)


async def test_a_pos_that_hangs_up_can_ask_what_became_of_it(counter: Counter, card: VirtualCard) -> None:
    asking = asyncio.create_task(counter.ask(payment("A1")))
    await counter.waiting_for_card()
    asking.cancel()
    assert how(await counter.ask(status("S1", "A1"))) == "InProgress"
    counter.reader.present(card)
    while how(told := await counter.ask(status("S2", "A1"))) == "InProgress":
        await asyncio.sleep(0.01)
    assert how(told) == "Success"
    assert len(approvals(counter)) == 1
    assert await counter.ask(status("S2")) == told  # without a reference: the last one
    assert how(await counter.ask(status("S3", "A9"))) == "NotFound"
    assert how(await counter.ask(status("S3", sale_id="Till 2"))) == "NotFound"


async def test_aborted_before_it_came_it_never_begins(counter: Counter, card: VirtualCard) -> None:
    assert await counter.ask(abort("X1", "A1")) == {}
    counter.reader.present(card)
    assert how(await counter.ask(payment("A1"))) == "Aborted"
    assert not approvals(counter)


async def test_aborted_while_a_card_is_awaited(counter: Counter) -> None:
    asking = asyncio.create_task(counter.ask(payment("A1")))
    await counter.waiting_for_card()
    assert await counter.ask(abort("X1", "A1")) == {}
    answer = await asking
    assert how(answer) == "Aborted"
    assert await counter.ask(payment("A1")) == answer
    told = await counter.ask(status("S1", "A1"))
    assert how(told) == "Success"  # an end was reached


async def test_aborted_after_the_tc_it_stays_approved(counter: Counter, card: VirtualCard) -> None:
    first = await paid(counter, card, "A1")
    assert await counter.ask(abort("X1", "A1")) == {}
    assert await counter.ask(payment("A1")) == first


async def test_aborted_in_the_middle_of_the_tc_the_journal_decides(
    counter: Counter, card: VirtualCard
) -> None:
    """The abort comes while the card computes: what it signs counts."""
    asked = asyncio.Event()
    go_on = asyncio.Event()
    loop = asyncio.get_running_loop()

    class SlowCard:
        def power_up(self) -> None:
            card.power_up()

        def process(self, command: bytes) -> bytes:
            answer = card.process(command)
            if command[1] == 0xAE:
                loop.call_soon_threadsafe(asked.set)
                asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
            return answer

    counter.reader.present(SlowCard())
    asking = asyncio.create_task(counter.ask(payment("A1")))
    await asked.wait()
    await counter.ask(abort("X1", "A1"))
    go_on.set()
    assert how(await asking) == "Success"
    assert len(approvals(counter)) == 1


async def test_an_abort_ends_nobody_elses_payment(counter: Counter, card: VirtualCard) -> None:
    await paid(counter, card, "A1")
    asking = asyncio.create_task(counter.ask(payment("A2")))
    await counter.waiting_for_card()
    await counter.ask(abort("X1", "A1"))
    counter.reader.present(card)
    assert how(await asking) == "Success"


async def test_two_pos_on_one_lane(counter: Counter, card: VirtualCard) -> None:
    asking = asyncio.create_task(counter.ask(payment("A1")))
    await counter.waiting_for_card()
    busy = await counter.ask(payment("A1", sale_id="Till 2"))
    assert how(busy) == "Busy"
    counter.reader.present(card)
    assert how(await asking) == "Success"
    assert await counter.ask(payment("A1", sale_id="Till 2")) == busy
    assert len(approvals(counter)) == 1


async def test_two_lanes_take_payments_side_by_side(counter: Counter, card: VirtualCard) -> None:
    asking = asyncio.create_task(counter.ask(payment("A1")))
    await counter.waiting_for_card()
    counter.readers[1].present(card)
    assert how(await counter.ask(payment("A2", poi_id=SECOND_POI))) == "Success"
    await counter.ask(abort("X1", "A1"))
    assert how(await asking) == "Aborted"


async def test_each_trouble_has_its_condition(counter: Counter, card: VirtualCard) -> None:
    assert how(await counter.ask(payment("B1", poi_id=UNPLUGGED_POI))) == "UnavailableDevice"
    counter.reader.present(card)
    assert how(await counter.ask(payment("B2", 250.01))) == "PaymentRestriction"
    counter.reader.present(SchemeCard())
    assert how(await counter.ask(payment("B3"))) == "InvalidCard"
    counter.reader.present(card)
    assert how(await counter.ask(payment("B4", 200))) == "Success"
    counter.reader.present(card)
    declined = await counter.ask(payment("B5", 200))
    assert how(declined) == "Refusal"
    told = parse_qs(said(declined)["AdditionalResponse"])
    assert told["message"] == ["Not enough credit can be confirmed for this amount."]
    assert (told["reason"], told["responseCode"]) == (["over_ceiling"], ["51"])
    assert len(declined["SaleToPOIResponse"]["PaymentResponse"]["PaymentReceipt"]) == 2
    assert await counter.ask(payment("B5", 200)) == declined


async def test_a_declined_payment_is_told_the_same_after_a_restart(counter: Counter) -> None:
    counter.reader.present(SchemeCard())
    declined = await counter.ask(payment("B1"))
    await counter.stop()
    counter.start_again()
    assert await counter.ask(payment("B1")) == declined


async def test_without_limits_the_service_is_not_there(
    counter: Counter, card: VirtualCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(counter.shop.till, "_limits", lambda: None)
        counter.reader.present(card)
        assert how(await counter.ask(payment("B1"))) == "UnavailableService"
    _, late = counter.shop.issue(limit_minor=30_000)
    counter.reader.present(VirtualCard(late))
    assert how(await counter.ask(payment("B2"))) == "Refusal"


async def test_a_blocked_token_is_refused(counter: Counter) -> None:
    token_id, personalisation = counter.shop.issue(limit_minor=30_000)
    counter.shop.ledger.set_token_status(token_id, TokenStatus.BLOCKED)
    counter.shop.publish()
    counter.reader.present(VirtualCard(personalisation))
    assert how(await counter.ask(payment("B1"))) == "Refusal"


async def test_nobody_came(counter: Counter, card: VirtualCard) -> None:
    await counter.stop()
    counter.present_s = 0.05
    counter.start_again()
    assert how(await counter.ask(payment("C1"))) == "Cancel"


async def test_a_reader_that_is_gone_while_a_card_is_awaited(counter: Counter) -> None:
    await counter.stop()
    counter.present_s = 0.05
    counter.start_again()
    counter.reader.field.put(ReaderUnavailable("unplugged"))
    assert how(await counter.ask(payment("C1"))) == "UnavailableDevice"


async def test_of_a_payment_that_the_ledger_refused_nothing_is_refunded(
    counter: Counter, card: VirtualCard
) -> None:
    original = transaction(await paid(counter, card, "A1"))
    (record,) = approvals(counter)
    refusal = {
        "about": str(record.id),
        "verdict": Verdict.INVALID.value,
        "reason": "not genuine",
        "at_unix_ms": now_unix_ms(),
    }
    counter.shop.journal.append(Kind.ACKNOWLEDGEMENT, uuid4(), refusal)
    answer = await counter.ask(reversal("R1", original, 5))
    assert how(answer) == "NotAllowed"
    assert "did%20not%20pay" in said(answer)["AdditionalResponse"]
    first = await counter.ask(payment("A1"))
    assert how(first) == "Success"  # what was told stays told


async def test_what_a_pos_tells_of_itself_is_taken_and_answered_with_nothing(counter: Counter) -> None:
    event = {
        "SaleToPOIRequest": {
            "MessageHeader": {
                "ProtocolVersion": "3.0",
                "MessageClass": "Event",
                "MessageCategory": "Event",
                "MessageType": "Notification",
                "SaleID": SALE_ID,
                "DeviceID": "77",
                "POIID": POI,
            },
            "EventNotification": {"EventToNotify": "SaleAdmin", "TimeStamp": "2026-11-24T10:00:00Z"},
        }
    }
    assert await counter.ask(event) == {}


async def test_on_a_full_disk_nothing_is_begun(counter: Counter, card: VirtualCard) -> None:
    counter.payments._headroom_bytes = 1 << 62
    answer = await counter.ask(payment("C1"))
    assert how(answer) == "UnavailableService"
    assert "nearly%20full" in said(answer)["AdditionalResponse"]


async def test_staff_who_speak_chinese_are_told_in_chinese(counter: Counter) -> None:
    await counter.ask(request("Login", "L1", OperatorLanguage="zh", OperatorID="Li", ShiftNumber="2"))
    counter.reader.present(SchemeCard())
    told = parse_qs(said(await counter.ask(payment("C1")))["AdditionalResponse"])
    assert told["message"] == ["本店不受理此卡。"]


# Taking back


async def test_a_reversal_voids_the_whole_payment_once(counter: Counter, card: VirtualCard) -> None:
    original = transaction(await paid(counter, card, "A1"))
    answer = await counter.ask(reversal("R1", original))
    assert how(answer) == "Success"
    body = answer["SaleToPOIResponse"]["ReversalResponse"]
    assert body["ReversedAmount"] == Decimal("19.30")
    assert body["POIData"]["POITransactionID"]["TransactionID"].startswith("R1.")
    assert len(body["PaymentReceipt"]) == 2
    assert await counter.ask(reversal("R1", original)) == answer
    assert how(await counter.ask(reversal("R2", original))) == "NotAllowed"
    assert [r.kind for r in counter.shop.journal.records()].count(Kind.REVERSAL) == 1
    told = await counter.ask(status("S1", "R1"))
    repeated = told["SaleToPOIResponse"]["TransactionStatusResponse"]["RepeatedMessageResponse"]
    assert repeated["RepeatedResponseMessageBody"] == {"ReversalResponse": body}


async def test_a_part_is_reversed_as_a_refund_never_beyond_the_payment(
    counter: Counter, card: VirtualCard
) -> None:
    original = transaction(await paid(counter, card, "A1"))
    assert how(await counter.ask(reversal("R1", original, 9.30))) == "Success"
    assert how(await counter.ask(payment("R2", 5, PaymentType="Refund", original=original))) == "Success"
    assert (
        how(await counter.ask(payment("R3", 5.01, PaymentType="Refund", original=original))) == "NotAllowed"
    )
    rest = await counter.ask(reversal("R4", original))
    assert rest["SaleToPOIResponse"]["ReversalResponse"]["ReversedAmount"] == Decimal("5.00")
    totals = await counter.ask(request("GetTotals", "T1"))
    assert _totals(totals["SaleToPOIResponse"]["GetTotalsResponse"]) == {
        "Debit": (1, Decimal("19.30")),
        "ReverseDebit": (2, Decimal("14.30")),
        "Credit": (1, Decimal("5.00")),
    }


async def test_what_was_never_paid_is_not_found(counter: Counter, card: VirtualCard) -> None:
    assert how(await counter.ask(reversal("R1", f"A1.{uuid4().hex}"))) == "NotFound"
    assert how(await counter.ask(reversal("R2", "8835.ABCDEF"))) == "NotFound"


async def test_a_refund_that_names_no_payment_is_not_allowed(counter: Counter, card: VirtualCard) -> None:
    answer = await counter.ask(payment("R1", PaymentType="Refund"))
    assert how(answer) == "NotAllowed"
    assert "OriginalPOITransaction" in said(answer)["AdditionalResponse"]


@pytest.mark.parametrize("journalled", [True, False])
async def test_a_reversal_cut_short_is_what_the_journal_says(
    counter: Counter, card: VirtualCard, journalled: bool
) -> None:
    original = transaction(await paid(counter, card, "A1"))
    await counter.pos.desk.close()
    if journalled:
        counter.pos.store.end = _fails  # type: ignore[method-assign, assignment]
    else:
        counter.payments.void = _fails  # type: ignore[method-assign, assignment]
    asking = asyncio.create_task(counter.ask(reversal("R1", original)))
    await asyncio.sleep(0.2)
    asking.cancel()
    await counter.die()
    counter.start_again()
    told = await counter.ask(reversal("R1", original))
    assert how(told) == ("Success" if journalled else "Aborted")
    assert [r.kind for r in counter.shop.journal.records()].count(Kind.REVERSAL) == journalled


def _fails(*_: object) -> Any:
    raise RuntimeError("the process is gone")


# Amounts, parts, several tenders


async def test_an_amount_that_does_not_fit_is_refused(counter: Counter) -> None:
    assert how(await counter.ask(payment("D1", 19.305))) == "MessageFormat"
    assert how(await counter.ask(payment("D1", "19.30"))) == "MessageFormat"


async def test_another_currency_tips_and_cashback_are_refused(counter: Counter) -> None:
    assert how(await counter.ask(payment("D1", Currency="EUR"))) == "NotAllowed"
    assert how(await counter.ask(payment("D2", TipAmount=1))) == "PaymentRestriction"
    assert how(await counter.ask(payment("D3", CashBackAmount=20))) == "PaymentRestriction"
    assert (
        how(await counter.ask(payment("D4", acquirer_data="tenderOption=AskGratuity")))
        == "PaymentRestriction"
    )


@pytest.mark.parametrize("kept", [True, False])
async def test_a_part_is_approved_where_the_pos_says_how_small_it_may_be(
    counter: Counter, card: VirtualCard, kept: bool
) -> None:
    if not kept:
        counter.pos.store.end = _does_nothing  # type: ignore[method-assign]
    await paid(counter, card, "A1", 200)
    counter.reader.present(card)
    counter.reader.present(card)
    answer = await counter.ask(payment("A2", 150, MinimumSplitAmount=80))
    assert said(answer)["Result"] == "Partial"
    body = answer["SaleToPOIResponse"]["PaymentResponse"]
    assert body["PaymentResult"]["AmountsResp"]["AuthorizedAmount"] == Decimal("80.00")
    assert UUID(transaction(answer).partition(".")[2]) == approvals(counter)[-1].id
    assert [r.facts()["amount_minor"] for r in approvals(counter)] == [20_000, 8_000]
    assert await counter.ask(payment("A2", 150, MinimumSplitAmount=80)) == answer
    await (counter.stop() if kept else counter.die())
    counter.start_again()
    assert await counter.ask(payment("A2", 150, MinimumSplitAmount=80)) == answer
    assert how(await counter.ask(reversal("R1", transaction(answer)))) == "Success"


async def test_a_part_that_is_too_much_as_well_is_declined(counter: Counter, card: VirtualCard) -> None:
    await paid(counter, card, "A1", 200)
    counter.reader.present(card)
    counter.reader.present(card)
    answer = await counter.ask(payment("A2", 150, MinimumSplitAmount=101))
    assert how(answer) == "Refusal"
    assert len(approvals(counter)) == 1
    await counter.stop()
    counter.start_again()
    assert await counter.ask(payment("A2", 150, MinimumSplitAmount=101)) == answer


async def test_a_part_can_be_aborted(counter: Counter, card: VirtualCard) -> None:
    await paid(counter, card, "A1", 200)
    counter.reader.present(card)
    asking = asyncio.create_task(counter.ask(payment("A2", 150, MinimumSplitAmount=80)))
    while (
        how(await counter.ask(status("S1", "A2"))) != "InProgress"
        or len([r for r in counter.shop.journal.records() if r.kind is Kind.DECLINE]) != 1
    ):
        await asyncio.sleep(0.005)
    await counter.ask(abort("X1", "A2"))
    assert how(await asking) == "Aborted"
    assert len(approvals(counter)) == 1


async def test_a_pos_that_takes_any_part_is_told_how_to_ask(counter: Counter, card: VirtualCard) -> None:
    await paid(counter, card, "A1", 200)
    counter.reader.present(card)
    wants = "tenderOption=AllowPartialAuthorisation"
    answer = await counter.ask(payment("A2", 150, acquirer_data=wants))
    assert how(answer) == "Refusal"
    assert "MinimumSplitAmount" in said(answer)["AdditionalResponse"]


async def test_one_sale_is_paid_with_several_payments(counter: Counter, card: VirtualCard) -> None:
    for service_id, amount, before in (("A1", 100, 0), ("A2", 50.5, 100)):
        counter.reader.present(card)
        order = payment(service_id, amount, transaction="order-7", PaidAmount=before, SplitPaymentFlag=True)
        assert how(await counter.ask(order)) == "Success"
    assert {r.facts()["pos"]["transaction_id"] for r in approvals(counter)} == {"order-7"}
    assert sum(r.facts()["amount_minor"] for r in approvals(counter)) == 15_050


async def test_a_payment_in_instalments(counter: Counter, card: VirtualCard) -> None:
    counter.reader.present(card)
    plan = {"PlanID": "flat", "TotalNbOfPayments": 12}
    answer = await counter.ask(payment("I1", 120, PaymentType="Instalment", Instalment=plan))
    assert how(answer) == "Success", said(answer)
    result = answer["SaleToPOIResponse"]["PaymentResponse"]["PaymentResult"]
    assert result["PaymentType"] == "Instalment"
    told = result["Instalment"]
    assert (told["PlanID"], told["TotalNbOfPayments"]) == ("flat", 12)
    assert (told["FirstAmount"], told["CumulativeAmount"]) == (Decimal("10.60"), Decimal("127.20"))
    (record,) = approvals(counter)
    quoted = quote(OFFERS[0], 12_000, 12)
    assert record.facts()["plan_digest"] == quoted.digest.hex()
    paper = answer["SaleToPOIResponse"]["PaymentResponse"]["PaymentReceipt"][0]
    lines = [parse_qs(line["Text"]) for line in paper["OutputContent"]["OutputText"]]
    assert {"key": ["plan"], "name": ["Instalments"], "value": ["12 x 10.60"]} in lines
    await counter.stop()
    counter.start_again()
    again = payment("I1", 120, PaymentType="Instalment", Instalment=plan)
    assert await counter.ask(again) == answer
    totals = await counter.ask(request("GetTotals", "T1"))
    assert _totals(totals["SaleToPOIResponse"]["GetTotalsResponse"]) == {
        "IssuerInstalment": (1, Decimal("120.00"))
    }


async def test_a_plan_may_be_named_by_its_periods_alone(counter: Counter, card: VirtualCard) -> None:
    counter.reader.present(card)
    answer = await counter.ask(
        payment("I1", 60, PaymentType="Instalment", Instalment={"TotalNbOfPayments": 6})
    )
    assert answer["SaleToPOIResponse"]["PaymentResponse"]["PaymentResult"]["Instalment"]["PlanID"] == "shop"


async def test_a_plan_nobody_offers_is_not_allowed(counter: Counter, card: VirtualCard) -> None:
    for service_id, plan in (("I1", {"PlanID": "flat", "TotalNbOfPayments": 5}), ("I2", {"PlanID": "free"})):
        answer = await counter.ask(payment(service_id, 60, PaymentType="Instalment", Instalment=plan))
        assert how(answer) == "NotAllowed"
        assert await counter.ask(payment(service_id, 60, PaymentType="Instalment", Instalment=plan)) == answer
    choose = said(await counter.ask(payment("I3", 60, PaymentType="Instalment", Instalment={})))
    assert parse_qs(choose["AdditionalResponse"])["message"][0].endswith(
        "one of: flat in 3, flat in 12, shop in 6, gold in 24"
    )
    counter.reader.present(card)
    gold = payment("I4", 60, PaymentType="Instalment", Instalment={"PlanID": "gold"})
    assert how(await counter.ask(gold)) == "PaymentRestriction"  # not for this card
    assert not approvals(counter)


# Totals and the rest


def _totals(body: dict[str, Any]) -> dict[str, tuple[int, Decimal]]:
    out = {}
    for group in body["TransactionTotals"]:
        for line in group["PaymentTotals"]:
            out[line["TransactionType"]] = (line["TransactionCount"], line["TransactionAmount"])
    return out


async def test_reconciliation_closes_a_period_once(counter: Counter, card: VirtualCard) -> None:
    await paid(counter, card, "A1")
    await paid(counter, card, "A2", 10)
    counter.reader.present(SchemeCard())
    await counter.ask(payment("A3", 7))
    closing = request("Reconciliation", "Z1", ReconciliationType="SaleReconciliation")
    closed = await counter.ask(closing)
    body = closed["SaleToPOIResponse"]["ReconciliationResponse"]
    assert body["POIReconciliationID"] == "1000"
    expected = {"Debit": (2, Decimal("29.30")), "Declined": (1, Decimal("7.00"))}
    assert _totals(body) == expected
    assert await counter.ask(closing) == closed
    now = (await counter.ask(request("GetTotals", "T1")))["SaleToPOIResponse"]["GetTotalsResponse"]
    assert (now["POIReconciliationID"], now["TransactionTotals"]) == ("1001", [])
    again = request(
        "Reconciliation", "Z2", ReconciliationType="PreviousReconciliation", POIReconciliationID="1000"
    )
    assert _totals((await counter.ask(again))["SaleToPOIResponse"]["ReconciliationResponse"]) == expected
    open_one = request(
        "Reconciliation", "Z3", ReconciliationType="PreviousReconciliation", POIReconciliationID="1001"
    )
    assert how(await counter.ask(open_one)) == "NotFound"


async def test_no_period_is_closed_over_a_payment_under_way(counter: Counter, card: VirtualCard) -> None:
    asking = asyncio.create_task(counter.ask(payment("A1")))
    await counter.waiting_for_card()
    closing = request("Reconciliation", "Z1", ReconciliationType="SaleReconciliation")
    assert how(await counter.ask(closing)) == "Busy"
    counter.reader.present(card)
    await asking
    assert how(
        await counter.ask(request("Reconciliation", "Z2", ReconciliationType="SaleReconciliation"))
    ) == ("Success")


async def test_totals_by_operator_and_shift(counter: Counter, card: VirtualCard) -> None:
    for number, operator in enumerate(("Li", "Mo", "Li"), 1):
        await counter.ask(
            request("Login", f"L{number}", OperatorLanguage="en", OperatorID=operator, ShiftNumber="2")
        )
        await paid(counter, card, f"A{number}", number)
    by = await counter.ask(request("GetTotals", "T1", TotalDetails=["OperatorID", "ShiftNumber"]))
    groups = by["SaleToPOIResponse"]["GetTotalsResponse"]["TransactionTotals"]
    assert [
        (g["OperatorID"], g["ShiftNumber"], g["PaymentTotals"][0]["TransactionAmount"]) for g in groups
    ] == [
        ("Li", "2", Decimal("4.00")),
        ("Mo", "2", Decimal("2.00")),
    ]
    only = await counter.ask(request("GetTotals", "T2", TotalFilter={"OperatorID": "Mo"}))
    assert _totals(only["SaleToPOIResponse"]["GetTotalsResponse"]) == {"Debit": (1, Decimal("2.00"))}


async def test_diagnosis_login_logout_balance(counter: Counter) -> None:
    login = await counter.ask(
        request(
            "Login",
            "L1",
            DateTime="2026-11-24T10:00:00+00:00",
            SaleSoftware={"ManufacturerID": "x", "ApplicationName": "y"},
            OperatorLanguage="en",
        )
    )
    assert how(login) == "Success"
    assert login["SaleToPOIResponse"]["LoginResponse"]["POISystemData"]["POISoftware"]["ApplicationName"]
    told = await counter.ask(request("Diagnosis", "D1", HostDiagnosisFlag=True))
    body = told["SaleToPOIResponse"]["DiagnosisResponse"]
    assert body["POIStatus"] == {
        "GlobalStatus": "OK",
        "SecurityOKFlag": True,
        "CardReaderOKFlag": True,
        "CommunicationOKFlag": True,
    }
    assert body["LoggedSaleID"] == [SALE_ID]
    assert body["HostStatus"][0]["IsReachableFlag"] is True
    assert how(await counter.ask(request("Logout", "L2"))) == "Success"
    missing = await counter.ask(request("Diagnosis", "D2", poi_id=UNPLUGGED_POI))
    assert missing["SaleToPOIResponse"]["DiagnosisResponse"]["POIStatus"]["GlobalStatus"] == "Unreachable"
    assert how(await counter.ask(request("BalanceInquiry", "Q1", PaymentAccountReq={}))) == "NotAllowed"


async def test_what_cannot_be_taken_is_rejected_with_an_event(counter: Counter) -> None:
    messages: tuple[dict[str, Any], ...] = (
        request("Display", "D1"),
        request("Payment", "D2", poi_id="V400m-999999999"),
        request("Payment", "too long to be one"),
        {"SaleToPOIRequest": {"PaymentRequest": {}}},
    )
    for message in messages:
        answer = (await counter.ask(message))["SaleToPOIRequest"]["EventNotification"]
        assert answer["EventToNotify"] == "Reject"
        assert parse_qs(answer["EventDetails"])["message"]
    empty = payment("D3")
    del empty["SaleToPOIRequest"]["PaymentRequest"]
    assert "EventNotification" in (await counter.ask(empty))["SaleToPOIRequest"]
