"""Answers and receipts. Pure: made from what the store and the journal keep, so that one made again after a
restart is the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any, Final, NamedTuple
from urllib.parse import quote
from uuid import UUID

from pos_gateway.authorization.reasons import Reason
from pos_gateway.gateway.lane import PaymentView
from pos_gateway.gateway.nexo import wire
from pos_gateway.gateway.nexo.messages import (
    Header,
    Key,
    PaymentKind,
    PaymentOrder,
    ReversalOrder,
    SaleData,
    TotalsOrder,
    transaction_number,
)
from pos_gateway.gateway.nexo.store import Row, Total
from pos_gateway.gateway.nexo.transitions import Condition, State, told
from pos_gateway.gateway.nexo.wire import number
from pos_gateway.instalments import Quote
from pos_gateway.money import Currency

CUSTOMER: Final = "CustomerReceipt"
CASHIER: Final = "CashierReceipt"
NOT_THIS: Final = "this ServiceID stands for another request of the last 48 hours"
CARD_TYPE: Final = "pos-gateway-credit"

_NOT_APPROVED: Final = "NOT APPROVED"


@dataclass(frozen=True, slots=True)
class Place:
    """Where the answers come from, as they are to say."""

    merchant_name: str
    merchant_id: str
    terminal_id: str
    issuer: str
    unit: Currency


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended. `condition` and `message` are told in place of what the state alone says;
    `view`: the payment, of which a card was read; `amount_minor`: what was approved, of a payment or a
    correction; `part`: it is less than what was asked for."""

    state: State
    condition: Condition | None = None
    message: str = ""
    view: PaymentView | None = None
    amount_minor: int = 0
    part: bool = False


def response(condition: Condition | None, message: str, **more: str) -> dict[str, Any]:
    """The `Response` that every answer has; `more` joins `AdditionalResponse`."""
    fields = {"message": message, **{name: value for name, value in more.items() if value}}
    out = {"Result": "Success" if condition is None else "Failure"}
    if condition is not None:
        out["ErrorCondition"] = condition.value
    out["AdditionalResponse"] = encoded(**fields)
    return out


class Reply(NamedTuple):
    """What goes back. `body`: the inside of the envelope, as JSON."""

    envelope: str
    body: bytes
    header: dict[str, Any]


def reply(header: Header, body: bytes) -> Reply:
    return Reply("SaleToPOIResponse", body, header.answer())


def tell(header: Header, message: dict[str, Any]) -> Reply:
    return reply(header, wire.dumps(message))


def refuse(header: Header, condition: Condition, message: str) -> Reply:
    return tell(header, failure(header, condition, message))


def failed(row: Row, condition: Condition, message: str) -> bytes:
    return wire.dumps(failure(row_header(row), condition, message))


def answer(header: Header, name: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"MessageHeader": header.answer(), name: body}


def failure(header: Header, condition: Condition, message: str) -> dict[str, Any]:
    """An answer to any category that says no more than why not."""
    body: dict[str, Any] = {"Response": response(condition, message)}
    if header.category == "Reconciliation":
        body["ReconciliationType"] = "SaleReconciliation"
    return answer(header, f"{header.category}Response", body)


def reject(message: str, at: datetime, header: dict[str, Any] | None = None) -> dict[str, Any]:
    """What is said to a message that cannot be taken: an event of ours."""
    out: dict[str, Any] = {
        "EventNotification": {
            "EventToNotify": "Reject",
            "TimeStamp": time_stamp(at),
            "EventDetails": encoded(message=message),
        }
    }
    if header is not None:
        out = {"MessageHeader": header, **out}
    return out


def row_header(row: Row) -> Header:
    return Header(row.key, "Service", row.category)


def payment_answer(place: Place, row: Row, order: PaymentOrder, outcome: Outcome) -> dict[str, Any]:
    """The whole PaymentResponse message."""
    at = _at(row.at_unix_ms)
    paid = outcome.state is State.APPROVED
    body: dict[str, Any] = {
        "Response": _response(order.sale, outcome),
        "SaleData": _sale_data(order.sale),
        "POIData": _poi_data(row, _paid_by(row, outcome), at),
    }
    if outcome.part:
        body["Response"]["Result"] = "Partial"
    if paid:
        result: dict[str, Any] = {
            "PaymentType": _payment_type(order),
            "OnlineFlag": outcome.view is not None and outcome.view.online,
            "AmountsResp": {
                "Currency": place.unit.code,
                "AuthorizedAmount": number(outcome.amount_minor, place.unit),
            },
            "PaymentAcquirerData": _acquirer_data(place, row, outcome, at),
        }
        if outcome.view is not None:
            result["PaymentInstrumentData"] = _instrument(outcome.view)
            if outcome.view.plan is not None:
                result["Instalment"] = _instalment(outcome.view.plan)
        body["PaymentResult"] = result
    title = "REFUND" if order.kind is PaymentKind.REFUND else "SALE"
    body["PaymentReceipt"] = _receipts(place, row, title, outcome, at) if paid or outcome.view else []
    return answer(row_header(row), "PaymentResponse", body)


def reversal_answer(place: Place, row: Row, order: ReversalOrder, outcome: Outcome) -> dict[str, Any]:
    """The whole ReversalResponse message."""
    at = _at(row.at_unix_ms)
    done = outcome.state is State.APPROVED
    body: dict[str, Any] = {
        "Response": _response(order.sale, outcome),
        "POIData": _poi_data(row, row.payment_id, at),
        "OriginalPOITransaction": {
            "POITransactionID": {"TransactionID": order.original.hex, "TimeStamp": time_stamp(at)}
        },
    }
    if done:
        body["ReversedAmount"] = number(outcome.amount_minor, place.unit)
    body["PaymentReceipt"] = _receipts(place, row, "REVERSAL", outcome, at) if done else []
    return answer(row_header(row), "ReversalResponse", body)


def status_answer(
    header: Header, reference: Key, repeated: dict[str, Any], documents: Sequence[str]
) -> dict[str, Any]:
    """A request that has ended, told again; only those receipts, if any are named."""
    name = next(key for key in repeated if key != "MessageHeader")
    body = repeated[name]
    if documents and "PaymentReceipt" in body:
        kept = [paper for paper in body["PaymentReceipt"] if paper["DocumentQualifier"] in documents]
        body = {**body, "PaymentReceipt": kept}
    return answer(
        header,
        "TransactionStatusResponse",
        {
            "Response": response(None, "Found"),
            "MessageReference": _reference(reference, repeated["MessageHeader"]["MessageCategory"]),
            "RepeatedMessageResponse": {
                "MessageHeader": repeated["MessageHeader"],
                "RepeatedResponseMessageBody": {name: body},
            },
        },
    )


def status_failure(
    header: Header, reference: Key | None, condition: Condition, message: str
) -> dict[str, Any]:
    body: dict[str, Any] = {"Response": response(condition, message)}
    if reference is not None:
        body["MessageReference"] = _reference(reference, "Payment")
    return answer(header, "TransactionStatusResponse", body)


def transaction_totals(
    place: Place, poi_id: str, order: TotalsOrder, totals: Iterable[Total]
) -> list[dict[str, Any]]:
    """Totals, told apart by what the order says, without what it leaves out."""
    groups: dict[tuple[str, ...], dict[str, tuple[int, int]]] = {}
    for total in totals:
        names = {
            "OperatorID": total.operator_id,
            "ShiftNumber": total.shift,
            "SaleID": total.sale_id,
            "POIID": poi_id,
        }
        if any(names[name] != wanted for name, wanted in order.only.items()):
            continue
        group = groups.setdefault(tuple(names[name] for name in order.by), {})
        count, amount_minor = group.get(total.kind, (0, 0))
        group[total.kind] = (count + total.count, amount_minor + total.amount_minor)
    out = []
    for values, kinds in sorted(groups.items()):
        entry: dict[str, Any] = {
            "PaymentInstrumentType": "Card",
            "POIID": poi_id,
            "PaymentCurrency": place.unit.code,
            "PaymentTotals": [
                {
                    "TransactionType": kind,
                    "TransactionCount": count,
                    "TransactionAmount": number(amount_minor, place.unit),
                }
                for kind, (count, amount_minor) in sorted(kinds.items())
            ],
        }
        entry |= {name: value for name, value in zip(order.by, values, strict=True) if value}
        out.append(entry)
    return out


def time_stamp(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def _response(sale: SaleData, outcome: Outcome) -> dict[str, Any]:
    default = told(outcome.state)
    message, condition = outcome.message or default.sentence.told(sale.language), outcome.condition
    more: dict[str, str] = {}
    view = outcome.view
    if view is not None:
        more = {"cardType": CARD_TYPE, "cardSummary": view.token_last4}
        if view.reason is not None:
            more |= {"reason": view.reason.value, "responseCode": view.reason.explanation.response_code}
    return response(condition or default.condition, message, **more)


def decline_condition(reason: Reason) -> Condition:
    return Condition(reason.explanation.error_condition)


def decline_message(reason: Reason, language: str) -> str:
    told_reason = reason.explanation
    return told_reason.chinese if language.lower().startswith("zh") else told_reason.english


def _paid_by(row: Row, outcome: Outcome) -> UUID:
    return row.second_id if outcome.part else row.payment_id


def _payment_type(order: PaymentOrder) -> str:
    if order.kind is PaymentKind.REFUND:
        return "Refund"
    return "Instalment" if order.instalments else "Normal"


def _sale_data(sale: SaleData) -> dict[str, Any]:
    return {"SaleTransactionID": {"TransactionID": sale.transaction_id, "TimeStamp": sale.time_stamp}}


def _poi_data(row: Row, transaction: UUID, at: datetime) -> dict[str, Any]:
    return {
        "POIReconciliationID": str(row.period),
        "POITransactionID": {
            "TransactionID": transaction_number(row.key.service_id, transaction),
            "TimeStamp": time_stamp(at),
        },
    }


def _acquirer_data(place: Place, row: Row, outcome: Outcome, at: datetime) -> dict[str, Any]:
    out: dict[str, Any] = {
        "AcquirerID": place.issuer,
        "MerchantID": place.merchant_id,
        "AcquirerPOIID": place.terminal_id,
        "AcquirerTransactionID": {
            "TransactionID": _paid_by(row, outcome).hex,
            "TimeStamp": time_stamp(at),
        },
    }
    if outcome.view is not None and outcome.view.sequence is not None:
        out["ApprovalCode"] = f"{outcome.view.sequence % 1_000_000:06d}"
    return out


def _instrument(view: PaymentView) -> dict[str, Any]:
    return {
        "PaymentInstrumentType": "Card",
        "CardData": {
            "PaymentBrand": CARD_TYPE,
            "MaskedPan": "*" * 12 + view.token_last4,
            "EntryMode": ["Contactless"],
        },
    }


def _instalment(plan: Quote) -> dict[str, Any]:
    unit = plan.offer.currency
    return {
        "InstalmentType": ["EqualInstalments"],
        "PlanID": plan.offer.id,
        "PeriodUnit": "Monthly",
        "TotalNbOfPayments": plan.periods,
        "FirstAmount": number(plan.instalments[0].total_minor, unit),
        "CumulativeAmount": number(plan.total_minor, unit),
        "Charges": number(plan.fee_minor, unit),
    }


def _plan_lines(plan: Quote) -> list[tuple[str, str, str]]:
    unit = plan.offer.currency
    percent = Decimal(plan.annual_percentage_rate_ppm).scaleb(-4).quantize(Decimal("0.01"))
    return [
        ("plan", "Instalments", f"{plan.periods} x {unit.format(plan.instalments[0].total_minor)}"),
        ("planTotal", "To be repaid", f"{unit.code} {unit.format(plan.total_minor)}"),
        ("planRate", "Annual rate", f"{percent}%"),
    ]


def _receipts(place: Place, row: Row, title: str, outcome: Outcome, at: datetime) -> list[dict[str, Any]]:
    """What may be printed for the customer and kept by the cashier; nobody signs."""
    done, view = outcome.state is State.APPROVED, outcome.view
    amount_minor = outcome.amount_minor if done else (view.amount_minor if view else 0)
    # The shop's wall shows local time; UTC is said so here, since this must read the same everywhere.
    lines = [
        ("merchantName", place.merchant_name, ""),
        ("txtype", "Type", title),
        ("txdate", "Date", at.strftime("%Y-%m-%d")),
        ("txtime", "Time (UTC)", at.strftime("%H:%M:%S")),
        ("tid", "Terminal", place.terminal_id),
        ("mid", "Merchant", place.merchant_id),
    ]
    if view is not None and view.token_last4:
        lines.append(("pan", "Card", "*" * 12 + view.token_last4))
    lines.append(("totalAmount", "TOTAL", f"{place.unit.code} {place.unit.format(amount_minor)}"))
    if view is not None and view.plan is not None and done:
        lines += _plan_lines(view.plan)
    lines.append(("txRef", "Reference", _paid_by(row, outcome).hex))
    if view is not None and view.sequence is not None and done:
        lines.append(("authCode", "Approval", f"{view.sequence % 1_000_000:06d}"))
    lines.append(("approved", "APPROVED" if done else _NOT_APPROVED, ""))
    text = [_line(*line) for line in lines]
    return [
        {
            "DocumentQualifier": document,
            "RequiredSignatureFlag": False,
            "OutputContent": {"OutputFormat": "Text", "OutputText": [*text, last]},
        }
        for document, last in _PAPERS
    ]


@lru_cache(maxsize=1024)
def _quoted(text: str) -> str:
    return quote(text, safe="", errors="replace")


def encoded(**fields: str) -> str:
    """`key=value&…`, URL-encoded (blanks as %20, which every decoder reads)."""
    return "&".join(f"{name}={_quoted(value)}" for name, value in fields.items())


def _line(key: str, name: str, value: str) -> dict[str, Any]:
    text = encoded(key=key, name=name, value=value) if value else encoded(key=key, name=name)
    return {"Text": text, "EndOfLineFlag": True}


_PAPERS: Final = (
    (CUSTOMER, _line("retain", "Please keep for your records", "")),
    (CASHIER, _line("copy", "CASHIER COPY", "")),
)


def _reference(reference: Key, category: str) -> dict[str, Any]:
    return {
        "MessageCategory": category,
        "SaleID": reference.sale_id,
        "POIID": reference.poi_id,
        "ServiceID": reference.service_id,
    }


def _at(unix_ms: int) -> datetime:
    return datetime.fromtimestamp(unix_ms / 1000, UTC)
