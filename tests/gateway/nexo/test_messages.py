"""Requests, read strictly where money is concerned and leniently elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.errors import InvalidMessage
from pos_gateway.gateway.nexo import messages
from pos_gateway.gateway.nexo.lanes import PoiNames
from pos_gateway.gateway.nexo.messages import Header, Key, PaymentOrder, Refused, ReversalOrder, Session
from pos_gateway.gateway.nexo.transitions import Condition
from pos_gateway.money import currency
from tests.gateway.nexo.counter import UNHURRIED, payment, reversal

CNY = currency("CNY")
NOBODY = Session()
HEADER = Header(Key("Till 1", "V400m-1", "S1"), "Service", "Payment")

texts = st.text(max_size=12)
WORDS = """
    SaleData SaleTransactionID TransactionID TimeStamp PaymentTransaction AmountsReq Currency
    RequestedAmount PaymentData PaymentType Instalment PlanID TotalNbOfPayments OriginalPOITransaction
    POITransactionID SaleToAcquirerData MessageReference ServiceID SaleID POIID ReversalReason
    ReversedAmount MessageHeader ProtocolVersion MessageClass MessageType MessageCategory
    ReconciliationType POIReconciliationID TotalDetails TotalFilter DocumentQualifier OperatorID
    MinimumSplitAmount TipAmount
"""
names = st.sampled_from(WORDS.split())
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.decimals()
    | texts
    | st.sampled_from(["CNY", "Normal", "Refund", "Instalment", "3.0", "Service", "Request", "a=1&b=2"])
)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | texts, inner, max_size=5),
    max_leaves=24,
)
bodies = st.dictionaries(names | texts, anything, max_size=6)

PARSERS: list[Callable[[dict[str, Any]], Any]] = [
    messages.parse_header,
    lambda raw: messages.parse_payment(raw, CNY, NOBODY),
    lambda raw: messages.parse_reversal(raw, CNY, NOBODY),
    lambda raw: messages.parse_abort(raw, HEADER),
    lambda raw: messages.parse_status(raw, HEADER),
    messages.parse_reconciliation,
    messages.parse_totals,
    messages.parse_login,
]


@pytest.mark.parametrize("parser", PARSERS)
@UNHURRIED
@given(raw=bodies)
def test_no_body_does_more_than_be_refused(
    parser: Callable[[dict[str, Any]], Any], raw: dict[str, Any]
) -> None:
    with contextlib.suppress(InvalidMessage):
        parser(raw)


@UNHURRIED
@given(path=st.lists(st.integers(0, 6), max_size=5), value=anything)
def test_no_change_to_a_good_payment_does_more_than_be_refused(path: list[int], value: Any) -> None:
    body = payment("A1", PaymentType="Normal")["SaleToPOIRequest"]["PaymentRequest"]
    node = body
    for step in path:
        if not isinstance(node, dict) or not node:
            break
        key = sorted(node)[step % len(node)]
        if step == path[-1] or not isinstance(node[key], dict):
            node[key] = value
            break
        node = node[key]
    with contextlib.suppress(InvalidMessage):
        order = messages.parse_payment(body, CNY, NOBODY)
        if isinstance(order, PaymentOrder):
            assert PaymentOrder.from_json(order.to_json()) == order
            assert order.amount_minor > 0


def test_orders_are_kept_and_read_again() -> None:
    refund = payment("A1", PaymentType="Refund", original=f"A0.{uuid4().hex}")
    back = reversal("R1", f"A0.{uuid4().hex}", 5)
    for order in (
        messages.parse_payment(refund["SaleToPOIRequest"]["PaymentRequest"], CNY, NOBODY),
        messages.parse_payment(payment("A1")["SaleToPOIRequest"]["PaymentRequest"], CNY, NOBODY),
    ):
        assert isinstance(order, PaymentOrder)
        assert PaymentOrder.from_json(order.to_json()) == order
    reversed_ = messages.parse_reversal(back["SaleToPOIRequest"]["ReversalRequest"], CNY, NOBODY)
    assert isinstance(reversed_, ReversalOrder)
    assert ReversalOrder.from_json(reversed_.to_json()) == reversed_


def test_the_time_stamp_of_a_repetition_does_not_make_it_another_request() -> None:
    def digest(time_stamp: str) -> bytes:
        body = payment("A1")["SaleToPOIRequest"]["PaymentRequest"]
        body["SaleData"]["SaleTransactionID"]["TimeStamp"] = time_stamp
        order = messages.parse_payment(body, CNY, NOBODY)
        assert isinstance(order, PaymentOrder)
        return order.digest()

    assert digest("2026-11-24T10:00:00+00:00") == digest("2026-11-24T10:00:07.123Z")


@pytest.mark.parametrize(
    "change",
    [
        {"amount": 19.31},
        {"transaction": "another"},
        {"MinimumSplitAmount": 5},
        {"PaymentType": "Instalment"},
        {"PaymentType": "Instalment", "Instalment": {"PlanID": "flat", "TotalNbOfPayments": 3}},
    ],
)
def test_everything_that_matters_makes_it_another_request(change: dict[str, Any]) -> None:
    def digest(**changes: Any) -> bytes:
        amount = changes.pop("amount", 19.30)
        body = payment("A1", amount, **changes)["SaleToPOIRequest"]["PaymentRequest"]
        order = messages.parse_payment(body, CNY, NOBODY)
        assert isinstance(order, PaymentOrder)
        return order.digest()

    assert digest(**change) != digest()


def test_references_in_every_spelling() -> None:
    identifier = uuid4()
    for text in (f"A1.{identifier.hex}", str(identifier), identifier.hex.upper(), f"x.y.{identifier.hex}"):
        assert messages.payment_number(text) == identifier
    for text in ("", "A1.", "8835.DVNNC7Z4", identifier.hex[:-1], "{" + str(identifier) + "}"):
        assert messages.payment_number(text) is None


@pytest.mark.parametrize("service_id", ["1", "abcDEF1234", "123456789012"])
def test_service_ids_are_taken_a_little_longer_than_the_rule(service_id: str) -> None:
    header = payment(service_id)["SaleToPOIRequest"]
    assert messages.parse_header(header).key.service_id == service_id


@pytest.mark.parametrize("service_id", ["", "1234567890123", "a b", "é", "a-b", None, 7])
def test_other_service_ids_are_not(service_id: Any) -> None:
    message = payment("A1")["SaleToPOIRequest"]
    message["MessageHeader"]["ServiceID"] = service_id
    with pytest.raises(InvalidMessage, match="ServiceID"):
        messages.parse_header(message)


def test_a_plan_must_be_asked_for_as_one() -> None:
    body = payment("A1", PaymentType="Normal", Instalment={"TotalNbOfPayments": 3})
    with pytest.raises(InvalidMessage, match="PaymentType"):
        messages.parse_payment(body["SaleToPOIRequest"]["PaymentRequest"], CNY, NOBODY)


def test_other_payment_types_are_not_allowed() -> None:
    body = payment("A1", PaymentType="CashAdvance")["SaleToPOIRequest"]["PaymentRequest"]
    refused = messages.parse_payment(body, CNY, NOBODY)
    assert isinstance(refused, Refused)
    assert refused.condition is Condition.NOT_ALLOWED


def test_lanes_have_a_name_each() -> None:
    names = PoiNames("00000017", {})
    assert names.poi_id("lane-1") == "PosGateway-0000001701"
    assert names.lane("PosGateway-0000001712") == "lane-12"
    for other in ("PosGateway-00000017", "PosGateway-0000001700", "PosGateway-000000171", "V400m-1", ""):
        assert names.lane(other) is None
    for number in (1, 9, 10, 99, 100):
        assert names.lane(names.poi_id(f"lane-{number}") or "") == f"lane-{number}"
    chosen = PoiNames("00000017", {"V400m-1": "lane-2"})
    assert (chosen.lane("V400m-1"), chosen.poi_id("lane-2")) == ("lane-2", "V400m-1")
    assert (chosen.lane("PosGateway-0000001701"), chosen.poi_id("lane-1")) == (None, None)


def test_a_reference_that_cannot_be_ours_is_no_payment() -> None:
    body = reversal("R1", "8835.DVNNC7Z4")["SaleToPOIRequest"]["ReversalRequest"]
    order = messages.parse_reversal(body, CNY, NOBODY)
    assert isinstance(order, ReversalOrder)
    assert order.original == UUID(int=0)
