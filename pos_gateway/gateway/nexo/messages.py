"""Requests as this gateway understands them. Pure: parsed JSON in, orders or refusals out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final
from urllib.parse import parse_qs
from uuid import UUID

from pos_gateway.errors import InvalidInput, InvalidMessage
from pos_gateway.gateway.nexo import wire
from pos_gateway.gateway.nexo.transitions import Condition
from pos_gateway.money import Currency, currency

PROTOCOL_VERSION: Final = "3.0"

_VERSION: Final = re.compile(r"3\.\d{1,2}", re.ASCII)
_SERVICE_ID: Final = re.compile(r"[A-Za-z0-9]{1,12}", re.ASCII)
_UUID: Final = re.compile(r"[0-9a-fA-F]{32}|[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)
_MAX_ID_CHARACTERS: Final = 64
_MAX_TRANSACTION_ID_CHARACTERS: Final = 128
_MAX_ACQUIRER_DATA_CHARACTERS: Final = 8192
_MAX_PLAN_ID_CHARACTERS: Final = 64


@dataclass(frozen=True, slots=True)
class Key:
    """What a request is known by; for 48 hours it stands for this one request."""

    sale_id: str
    poi_id: str
    service_id: str


@dataclass(frozen=True, slots=True)
class Header:
    key: Key
    message_class: str
    category: str

    def answer(self) -> dict[str, Any]:
        """The header of the response to it."""
        return {
            "ProtocolVersion": PROTOCOL_VERSION,
            "MessageClass": self.message_class,
            "MessageCategory": self.category,
            "MessageType": "Response",
            "SaleID": self.key.sale_id,
            "ServiceID": self.key.service_id,
            "POIID": self.key.poi_id,
        }


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that cannot be taken, whoever asks however often."""

    condition: Condition
    message: str


class PaymentKind(Enum):
    SALE = "sale"
    REFUND = "refund"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaleData:
    """What the POS wants to read in the answer again, and who asked."""

    transaction_id: str
    time_stamp: str
    operator_id: str = ""
    shift: str = ""
    language: str = "en"


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentOrder:
    """`least_minor`: the smallest part that the POS takes if the whole is too much; None: all or nothing.
    `plan_id` and `periods`: the instalments asked for, either may be open. `original`: of a refund."""

    kind: PaymentKind
    amount_minor: int
    sale: SaleData
    least_minor: int | None = None
    any_part: bool = False
    instalments: bool = False
    plan_id: str | None = None
    periods: int | None = None
    original: UUID | None = None

    def digest(self) -> bytes:
        """Of all that makes it this request; a repetition may carry another time stamp."""
        return _digest(
            "Payment",
            self.kind.value,
            self.amount_minor,
            self.sale.transaction_id,
            self.least_minor,
            self.instalments,
            self.plan_id,
            self.periods,
            self.original,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            **_fields(self),
            "kind": self.kind.value,
            "sale": _fields(self.sale),
            "original": None if self.original is None else str(self.original),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> PaymentOrder:
        original = raw["original"]
        return cls(
            **{
                **raw,
                "kind": PaymentKind(raw["kind"]),
                "sale": SaleData(**raw["sale"]),
                "original": None if original is None else UUID(original),
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReversalOrder:
    """`amount_minor`: None voids all of it."""

    original: UUID
    amount_minor: int | None
    reason: str
    sale: SaleData

    def digest(self) -> bytes:
        return _digest("Reversal", self.original, self.amount_minor, self.reason)

    def to_json(self) -> dict[str, Any]:
        return {**_fields(self), "sale": _fields(self.sale), "original": str(self.original)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ReversalOrder:
        return cls(**{**raw, "original": UUID(raw["original"]), "sale": SaleData(**raw["sale"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconciliationOrder:
    """`number`: of a period that is closed; None closes the one that is open."""

    number: int | None

    def digest(self) -> bytes:
        return _digest("Reconciliation", self.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class TotalsOrder:
    """By which of these to tell apart, and which to leave out. Names as in the protocol."""

    by: tuple[str, ...]
    only: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusOrder:
    """`reference`: None asks for the last one of this POS on this lane."""

    reference: Key | None
    documents: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What a POS has said of itself with Login."""

    operator_id: str = ""
    shift: str = ""
    language: str = "en"


def parse_header(message: Mapping[str, Any]) -> Header:
    """
    Raises:
        InvalidMessage: a field is missing or wrong; says which.
    """
    raw = _object(message, "MessageHeader")
    version = raw.get("ProtocolVersion")
    if not isinstance(version, str) or _VERSION.fullmatch(version) is None:
        raise InvalidMessage("only version 3.0 is spoken here", where="ProtocolVersion")
    message_class = _text(raw, "MessageClass")
    if message_class not in ("Service", "Device", "Event"):
        raise InvalidMessage("unknown", where="MessageClass")
    if _text(raw, "MessageType") not in ("Request", "Notification"):
        raise InvalidMessage("must be Request", where="MessageType")
    service_id = raw.get("ServiceID", raw.get("DeviceID") if message_class != "Service" else None)
    if not isinstance(service_id, str) or _SERVICE_ID.fullmatch(service_id) is None:
        raise InvalidMessage("must be 1 to 10 letters and digits", where="ServiceID")
    return Header(
        key=Key(_text(raw, "SaleID"), _text(raw, "POIID"), service_id),
        message_class=message_class,
        category=_text(raw, "MessageCategory"),
    )


def parse_payment(raw: Mapping[str, Any], unit: Currency, session: Session) -> PaymentOrder | Refused:
    """
    Raises:
        InvalidMessage: the request breaks the protocol's rules, or an amount does not fit the currency.
    """
    transaction = _object(raw, "PaymentTransaction")
    amounts = _object(transaction, "AmountsReq")
    sale_data = _object(raw, "SaleData")
    data = _optional_object(raw, "PaymentData")
    wrong_currency = _check_currency(amounts.get("Currency"), unit)
    if wrong_currency is not None:
        return wrong_currency
    asked_minor = wire.amount_minor(amounts.get("RequestedAmount"), unit, "RequestedAmount")
    acquirer_data = _acquirer_data(sale_data)
    for name in ("TipAmount", "CashBackAmount", "MaximumCashBackAmount"):
        if _is_some(amounts.get(name)):
            return Refused(Condition.PAYMENT_RESTRICTION, f"{name}: tips and cashback are not taken here")
    if "AskGratuity" in acquirer_data.get("tenderOption", ""):
        return Refused(Condition.PAYMENT_RESTRICTION, "tips are not taken here")
    least_minor: int | None = None
    for name in ("MinimumAmountToDeliver", "MinimumSplitAmount"):
        if amounts.get(name) is not None:
            least_minor = wire.amount_minor(amounts[name], unit, name)
            if least_minor > asked_minor:
                raise InvalidMessage("more than RequestedAmount", where=name)
    if _is_some(amounts.get("PaidAmount")):  # what other tenders of this sale have paid: for the POS's books
        wire.amount_minor(amounts["PaidAmount"], unit, "PaidAmount")
    sale = _sale(sale_data, session)
    payment_type = _optional_text(data, "PaymentType") or "Normal"
    original = _original(transaction)
    if payment_type == "Refund":
        if original is None:
            return Refused(
                Condition.NOT_ALLOWED,
                "a refund must name its payment (OriginalPOITransaction), or be asked for as a Reversal",
            )
        return PaymentOrder(kind=PaymentKind.REFUND, amount_minor=asked_minor, sale=sale, original=original)
    if payment_type not in ("Normal", "Instalment"):
        return Refused(Condition.NOT_ALLOWED, f"PaymentType {payment_type[:24]} is not taken here")
    plan_id, periods = _instalment(data)
    if payment_type == "Normal" and (plan_id is not None or periods is not None):
        raise InvalidMessage("must be Instalment with a plan", where="PaymentType")
    return PaymentOrder(
        kind=PaymentKind.SALE,
        amount_minor=asked_minor,
        sale=sale,
        least_minor=None if least_minor == asked_minor else least_minor,
        any_part="AllowPartialAuthorisation" in acquirer_data.get("tenderOption", ""),
        instalments=payment_type == "Instalment",
        plan_id=plan_id,
        periods=periods,
    )


def parse_reversal(raw: Mapping[str, Any], unit: Currency, session: Session) -> ReversalOrder | Refused:
    """
    Raises:
        InvalidMessage: see `parse_payment`.
    """
    sale_data = _optional_object(raw, "SaleData")
    told_currency = _acquirer_data(sale_data).get("currency")
    if told_currency is not None and (wrong := _check_currency(told_currency, unit)) is not None:
        return wrong
    original = _original(raw)
    if original is None:
        raise InvalidMessage("is missing", where="OriginalPOITransaction")
    amount = raw.get("ReversedAmount")
    return ReversalOrder(
        original=original,
        amount_minor=None if amount is None else wire.amount_minor(amount, unit, "ReversedAmount"),
        reason=_optional_text(raw, "ReversalReason") or "MerchantCancel",
        sale=_sale(sale_data, session, required=False),
    )


def parse_abort(raw: Mapping[str, Any], header: Header) -> Key:
    """Which request is to end.

    Raises:
        InvalidMessage: it says none.
    """
    reference = _reference(_object(raw, "MessageReference"), header)
    if reference is None:
        raise InvalidMessage("is missing", where="MessageReference.ServiceID")
    return reference


def parse_status(raw: Mapping[str, Any], header: Header) -> StatusOrder:
    """
    Raises:
        InvalidMessage: the reference is wrong.
    """
    documents = raw.get("DocumentQualifier") or ()
    if isinstance(documents, str):
        documents = (documents,)
    if not isinstance(documents, list | tuple) or not all(isinstance(name, str) for name in documents):
        raise InvalidMessage("must be a list of names", where="DocumentQualifier")
    return StatusOrder(
        reference=_reference(_optional_object(raw, "MessageReference"), header), documents=tuple(documents)
    )


def parse_reconciliation(raw: Mapping[str, Any]) -> ReconciliationOrder | Refused:
    """
    Raises:
        InvalidMessage: no such period can be.
    """
    kind = _text(raw, "ReconciliationType")
    if kind == "SaleReconciliation":
        return ReconciliationOrder(number=None)
    if kind != "PreviousReconciliation":
        return Refused(Condition.NOT_ALLOWED, f"{kind[:32]}: the ledger does this by itself")
    number = _optional_text(raw, "POIReconciliationID")
    if number is None or not (number.isascii() and number.isdigit() and len(number) <= 12):
        raise InvalidMessage("must be the number of a reconciliation", where="POIReconciliationID")
    return ReconciliationOrder(number=int(number))


def parse_totals(raw: Mapping[str, Any]) -> TotalsOrder | Refused:
    """
    Raises:
        InvalidMessage: a detail or filter is wrong.
    """
    details = raw.get("TotalDetails") or ()
    if not isinstance(details, list | tuple) or not all(isinstance(name, str) for name in details):
        raise InvalidMessage("must be a list of names", where="TotalDetails")
    by = tuple(name for name in ("OperatorID", "ShiftNumber", "SaleID") if name in details)
    only: dict[str, str] = {}
    for name, value in _optional_object(raw, "TotalFilter").items():
        if name not in ("OperatorID", "ShiftNumber", "SaleID", "POIID"):
            return Refused(Condition.NOT_ALLOWED, f"totals cannot be filtered by {name[:32]}")
        if not isinstance(value, str):
            raise InvalidMessage("must be text", where=f"TotalFilter.{name}")
        only[name] = value
    return TotalsOrder(by=by, only=only)


def parse_login(raw: Mapping[str, Any]) -> Session:
    """
    Raises:
        InvalidMessage: a field is wrong.
    """
    return Session(
        operator_id=_optional_text(raw, "OperatorID") or "",
        shift=_optional_text(raw, "ShiftNumber") or "",
        language=_optional_text(raw, "OperatorLanguage") or "en",
    )


def transaction_number(service_id: str, payment_id: UUID) -> str:
    """POITransactionID of a payment: `tender.reference`."""
    return f"{service_id}.{payment_id.hex}"


def payment_number(text: str) -> UUID | None:
    """The payment a POITransactionID stands for; None if it cannot be one of ours."""
    reference = text.rpartition(".")[2]
    return UUID(reference) if _UUID.fullmatch(reference) else None


def _original(raw: Mapping[str, Any]) -> UUID | None:
    original = _optional_object(raw, "OriginalPOITransaction")
    if not original:
        return None
    identifier = _text(_object(original, "POITransactionID"), "TransactionID", _MAX_TRANSACTION_ID_CHARACTERS)
    # One that cannot be ours is as unknown as one that is not.
    return payment_number(identifier) or UUID(int=0)


def _reference(raw: Mapping[str, Any], header: Header) -> Key | None:
    service_id = _optional_text(raw, "ServiceID")
    if service_id is None:
        return None
    return Key(
        _optional_text(raw, "SaleID") or header.key.sale_id,
        _optional_text(raw, "POIID") or header.key.poi_id,
        service_id,
    )


def _instalment(data: Mapping[str, Any]) -> tuple[str | None, int | None]:
    raw = _optional_object(data, "Instalment")
    periods = raw.get("TotalNbOfPayments")
    if periods is not None and (isinstance(periods, bool) or not isinstance(periods, int)):
        raise InvalidMessage("must be a whole number", where="TotalNbOfPayments")
    return _optional_text(raw, "PlanID", _MAX_PLAN_ID_CHARACTERS), periods


def _sale(raw: Mapping[str, Any], session: Session, *, required: bool = True) -> SaleData:
    identification = (
        _object(raw, "SaleTransactionID") if required else _optional_object(raw, "SaleTransactionID")
    )
    read: Callable[..., str | None] = _text if required else _optional_text
    time_stamp = _optional_text(identification, "TimeStamp") or ""
    return SaleData(
        transaction_id=read(identification, "TransactionID", _MAX_TRANSACTION_ID_CHARACTERS) or "",
        time_stamp=time_stamp,
        operator_id=_optional_text(raw, "OperatorID") or session.operator_id,
        shift=_optional_text(raw, "ShiftNumber") or session.shift,
        language=_optional_text(raw, "OperatorLanguage") or session.language,
    )


def _acquirer_data(sale_data: Mapping[str, Any]) -> dict[str, str]:
    """SaleToAcquirerData: `key=value&…`. Unknown keys, other acquirers' words, are looked away from."""
    text = sale_data.get("SaleToAcquirerData")
    if text is None:
        return {}
    if not isinstance(text, str) or len(text) > _MAX_ACQUIRER_DATA_CHARACTERS:
        raise InvalidMessage("must be text", where="SaleToAcquirerData")
    try:
        return {name: values[-1] for name, values in parse_qs(text, max_num_fields=64).items()}
    except ValueError:
        raise InvalidMessage("too many fields", where="SaleToAcquirerData") from None


def _check_currency(code: object, unit: Currency) -> Refused | None:
    if not isinstance(code, str):
        raise InvalidMessage("must be text", where="Currency")
    try:
        known = currency(code).code
    except InvalidInput:
        known = ""
    if known == unit.code:
        return None
    return Refused(Condition.NOT_ALLOWED, f"this till takes {unit.code}")


def _is_some(value: object) -> bool:
    return value is not None and value != 0


def _object(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    if not isinstance(value, dict):
        raise InvalidMessage("is missing" if value is None else "must be an object", where=name)
    return value


def _optional_object(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {} if raw.get(name) is None else _object(raw, name)


def _text(raw: Mapping[str, Any], name: str, longest: int = _MAX_ID_CHARACTERS) -> str:
    value = raw.get(name)
    if not isinstance(value, str) or not 1 <= len(value) <= longest or not value.isprintable():
        raise InvalidMessage(f"must be 1 to {longest} printable characters", where=name)
    return value


def _optional_text(raw: Mapping[str, Any], name: str, longest: int = _MAX_ID_CHARACTERS) -> str | None:
    return None if raw.get(name) in (None, "") else _text(raw, name, longest)


def _fields(value: PaymentOrder | ReversalOrder | SaleData) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(wire.dumps([None if part is None else str(part) for part in parts])).digest()
