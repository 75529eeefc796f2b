"""A counter with POS software before it: a real till, real cards, the desk; only the reader is a queue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from pos_gateway.gateway.config import Nexo
from pos_gateway.gateway.lane import Lane, PaymentView
from pos_gateway.gateway.nexo import wire
from pos_gateway.gateway.nexo.interface import PosInterface, open_pos_interface
from pos_gateway.gateway.payments import Payments
from pos_gateway.gateway.program import now_unix_ms
from pos_gateway.lab.counter import FieldReader
from pos_gateway.lab.shop import Shop

SETTINGS = Nexo(
    enabled=True,
    host="127.0.0.1",
    port=0,
    plain=True,
    key_identifier="pos",
    key_version=1,
    pois={"V400m-123456789": "lane-1", "V400m-000000002": "lane-2", "V400m-000000003": "lane-3"},
)
POI, SECOND_POI, UNPLUGGED_POI = SETTINGS.pois
SALE_ID = "Till 1 (ID: 7)"
UNHURRIED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""How fast a machine is decides nothing."""


class Counter:
    """Two lanes. `stop` and `start_again` are a restart of the gateway in the same home."""

    def __init__(self, folder: Path, shop: Shop, *, settings: Nexo = SETTINGS, present_s: float = 5) -> None:
        self.shop = shop
        self.folder = folder
        self.settings = settings
        self.present_s = present_s
        self.now_unix_ms = now_unix_ms
        self._lanes: list[Lane] = []
        self.start_again()

    def start_again(self) -> None:
        self.readers = (FieldReader(), FieldReader())
        self.payments = Payments(self.shop.till, self.shop.journal, self._changed)
        self._pos: PosInterface | None = None
        for number, reader in enumerate(self.readers, 1):
            lane = Lane(
                f"lane-{number}",
                reader,
                self.shop.till,
                card_timeout_s=self.present_s,
                show=self.payments.changed,
            )
            self.payments.add_lane(lane)
            self._lanes.append(lane)
            lane.start()
        self._pos = open_pos_interface(
            self.folder,
            self.settings,
            self.shop.enrolment,
            self.payments,
            self.shop.journal,
            line_up=lambda: True,
            now_unix_ms=lambda: self.now_unix_ms(),
        )

    @property
    def pos(self) -> PosInterface:
        assert self._pos is not None
        return self._pos

    @property
    def reader(self) -> FieldReader:
        return self.readers[0]

    async def stop(self) -> None:
        await self.pos.desk.close()
        await self.die()

    async def die(self) -> None:
        """As a kill does it: nothing more is written down."""
        for lane in self._lanes:
            await asyncio.to_thread(lane.close)
        self._lanes.clear()
        self.pos.store.close()

    def _changed(self, view: PaymentView) -> None:
        if self._pos is not None:
            self._pos.desk.payment_changed(view)

    async def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The answer with its envelope; empty if it is empty."""
        reply = await self.pos.desk.take(message["SaleToPOIRequest"])
        if reply is None:
            return {}
        return wire.parse(wire.enclose(reply.envelope, reply.body))

    async def waiting_for_card(self, lane: int = 1) -> None:
        """Until the lane shows that a card is awaited."""
        while not self._lanes[lane - 1].busy:
            await asyncio.sleep(0.002)


def request(
    category: str, service_id: str, *, sale_id: str = SALE_ID, poi_id: str = POI, **body: Any
) -> dict[str, Any]:
    return {
        "SaleToPOIRequest": {
            "MessageHeader": {
                "ProtocolVersion": "3.0",
                "MessageClass": "Service",
                "MessageCategory": category,
                "MessageType": "Request",
                "SaleID": sale_id,
                "ServiceID": service_id,
                "POIID": poi_id,
            },
            f"{category}Request": body,
        }
    }


def payment(
    service_id: str, amount: Any = 19.30, *, sale_id: str = SALE_ID, poi_id: str = POI, **changes: Any
) -> dict[str, Any]:
    """`changes`: PaymentType, Instalment, and whatever joins AmountsReq or names the original payment."""
    amounts = {"Currency": changes.pop("Currency", "CNY"), "RequestedAmount": amount}
    for name in ("PaidAmount", "MinimumSplitAmount", "MinimumAmountToDeliver", "TipAmount", "CashBackAmount"):
        if name in changes:
            amounts[name] = changes.pop(name)
    transaction: dict[str, Any] = {"AmountsReq": amounts}
    if "original" in changes:
        identification = {"TransactionID": changes.pop("original"), "TimeStamp": "2026-11-24T10:00:00.000Z"}
        transaction["OriginalPOITransaction"] = {"POITransactionID": identification}
    sale: dict[str, Any] = {
        "SaleTransactionID": {
            "TransactionID": changes.pop("transaction", f"order-{service_id}"),
            "TimeStamp": "2026-11-24T10:00:00+00:00",
        },
        "SaleToAcquirerData": changes.pop("acquirer_data", "authorisationType=PreAuth"),
    }
    body: dict[str, Any] = {"SaleData": sale, "PaymentTransaction": transaction}
    if changes:
        body["PaymentData"] = changes
    return _exact(request("Payment", service_id, sale_id=sale_id, poi_id=poi_id, **body))


def reversal(service_id: str, original: str, amount: Any = None, **header: str) -> dict[str, Any]:
    body: dict[str, Any] = {
        "ReversalReason": "MerchantCancel",
        "OriginalPOITransaction": {
            "POITransactionID": {"TransactionID": original, "TimeStamp": "2026-11-24T10:00:00.000Z"}
        },
    }
    if amount is not None:
        body["ReversedAmount"] = amount
    return _exact(request("Reversal", service_id, **header, **body))


def abort(service_id: str, reference: str, **header: str) -> dict[str, Any]:
    return request(
        "Abort",
        service_id,
        **header,
        AbortReason="MerchantAbort",
        MessageReference={"MessageCategory": "Payment", "SaleID": SALE_ID, "ServiceID": reference},
    )


def status(service_id: str, reference: str | None = None, **header: str) -> dict[str, Any]:
    body: dict[str, Any] = {
        "ReceiptReprintFlag": True,
        "DocumentQualifier": ["CashierReceipt", "CustomerReceipt"],
    }
    if reference is not None:
        body["MessageReference"] = {"MessageCategory": "Payment", "SaleID": SALE_ID, "ServiceID": reference}
    return request("TransactionStatus", service_id, **header, **body)


def _exact(message: dict[str, Any]) -> dict[str, Any]:
    """With numbers as they come out of the parser."""
    return wire.parse(json.dumps(message).encode())


def said(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The Response in an answer."""
    message = answer["SaleToPOIResponse"]
    name = next(key for key in message if key != "MessageHeader")
    response: dict[str, Any] = message[name]["Response"]
    return response


def how(answer: Mapping[str, Any]) -> str:
    """`Success`, or the ErrorCondition."""
    response = said(answer)
    return str(response["Result"] if response["Result"] != "Failure" else response["ErrorCondition"])


def transaction(answer: Mapping[str, Any]) -> str:
    """POITransactionID of a payment's answer."""
    return str(answer["SaleToPOIResponse"]["PaymentResponse"]["POIData"]["POITransactionID"]["TransactionID"])
