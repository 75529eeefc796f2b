"""What a POS can ask without moving money: sign on, how a lane stands, totals and their periods."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import pos_gateway
from pos_gateway.gateway.nexo import answers, messages, wire
from pos_gateway.gateway.nexo.answers import Place, Reply
from pos_gateway.gateway.nexo.lanes import MODEL, PoiNames
from pos_gateway.gateway.nexo.messages import Header, Refused, Session, TotalsOrder
from pos_gateway.gateway.nexo.store import Row, Store, Total
from pos_gateway.gateway.nexo.transitions import Condition, State, told
from pos_gateway.gateway.payments import Payments

_MAX_SESSIONS: Final = 1000


class Enquiries:
    """`line_up`: is the ledger reachable, None if nobody knows. `settled` waits until every answer that a
    lane's POS was told is counted."""

    def __init__(
        self,
        place: Place,
        payments: Payments,
        store: Store,
        names: PoiNames,
        *,
        line_up: Callable[[], bool | None],
        now_unix_ms: Callable[[], int],
        new_id: Callable[[], UUID],
        settled: Callable[[str], Awaitable[None]],
    ) -> None:
        self._place = place
        self._payments = payments
        self._store = store
        self._names = names
        self._line_up = line_up
        self._now_unix_ms = now_unix_ms
        self._new_id = new_id
        self._settled = settled
        self._sessions: OrderedDict[tuple[str, str], Session] = OrderedDict()

    def session(self, header: Header) -> Session:
        """What this POS said of itself on this lane, if it did."""
        return self._sessions.get((header.key.sale_id, header.key.poi_id)) or Session()

    async def login(self, header: Header, raw: dict[str, Any]) -> Reply:
        session = messages.parse_login(raw)
        place = (header.key.sale_id, header.key.poi_id)
        self._sessions[place] = session
        self._sessions.move_to_end(place)
        while len(self._sessions) > _MAX_SESSIONS:
            self._sessions.popitem(last=False)
        body = {
            "Response": answers.response(None, "Welcome"),
            "POISystemData": {
                "DateTime": answers.time_stamp(datetime.fromtimestamp(self._now_unix_ms() / 1000, UTC)),
                "POISoftware": {
                    "ManufacturerID": "POS Gateway",
                    "ApplicationName": "pos-gateway",
                    "SoftwareVersion": pos_gateway.__version__,
                    "CertificationCode": "none",
                },
                "POITerminalData": {
                    "TerminalEnvironment": "Attended",
                    "POICapabilities": ["EMVContactless", "CashierDisplay"],
                    "POISerialNumber": header.key.poi_id.removeprefix(f"{MODEL}-"),
                },
                "POIStatus": self._poi_status(header.key.poi_id),
            },
        }
        return answers.tell(header, answers.answer(header, "LoginResponse", body))

    async def logout(self, header: Header, raw: dict[str, Any]) -> Reply:
        self._sessions.pop((header.key.sale_id, header.key.poi_id), None)
        body = {"Response": answers.response(None, "Good bye")}
        return answers.tell(header, answers.answer(header, "LogoutResponse", body))

    async def diagnosis(self, header: Header, raw: dict[str, Any]) -> Reply:
        status = self._poi_status(header.key.poi_id)
        body: dict[str, Any] = {
            "Response": answers.response(None, "Here I am"),
            "LoggedSaleID": sorted(
                sale_id for sale_id, poi_id in self._sessions if poi_id == header.key.poi_id
            ),
            "POIStatus": status,
        }
        if raw.get("HostDiagnosisFlag") is True:
            body["HostStatus"] = [
                {"AcquirerID": self._place.issuer, "IsReachableFlag": status["CommunicationOKFlag"]}
            ]
        return answers.tell(header, answers.answer(header, "DiagnosisResponse", body))

    def _poi_status(self, poi_id: str) -> dict[str, Any]:
        name = self._names.lane(poi_id)
        lane = next((lane for lane in self._payments.lanes if lane.name == name), None)
        free = "OK" if lane is not None and not lane.busy else "Busy"
        return {
            "GlobalStatus": "Unreachable" if lane is None else free,
            "SecurityOKFlag": True,
            "CardReaderOKFlag": lane is not None,
            "CommunicationOKFlag": self._line_up() is True,
        }

    async def get_totals(self, header: Header, raw: dict[str, Any]) -> Reply:
        order = messages.parse_totals(raw)
        if isinstance(order, Refused):
            return answers.refuse(header, order.condition, order.message)
        await self._settled(header.key.poi_id)

        def read() -> tuple[int, list[Total]]:
            number = self._store.period(header.key.poi_id)
            return number, self._store.totals(header.key.poi_id, number) or []

        number, totals = await asyncio.to_thread(read)
        body = {
            "Response": answers.response(None, "Totals"),
            "POIReconciliationID": str(number),
            "TransactionTotals": answers.transaction_totals(self._place, header.key.poi_id, order, totals),
        }
        return answers.tell(header, answers.answer(header, "GetTotalsResponse", body))

    async def reconciliation(self, header: Header, raw: dict[str, Any]) -> Reply:
        order = messages.parse_reconciliation(raw)
        if isinstance(order, Refused):
            return answers.refuse(header, order.condition, order.message)
        poi_id = header.key.poi_id
        if order.number is not None:
            number = order.number

            def read() -> list[Total] | None:
                is_closed = number < self._store.period(poi_id)
                return self._store.totals(poi_id, number) if is_closed else None

            totals = await asyncio.to_thread(read)
            if totals is None:
                return answers.refuse(header, Condition.NOT_FOUND, "there was no such reconciliation")
            return answers.reply(header, self._reconciled(header, "PreviousReconciliation", number, totals))
        await self._settled(poi_id)
        row = Row(
            key=header.key,
            category=header.category,
            digest=order.digest(),
            payment_id=self._new_id(),
            second_id=self._new_id(),
            at_unix_ms=self._now_unix_ms(),
            asked={},
        )
        return answers.reply(header, await asyncio.to_thread(self._reconcile, header, row))

    def _reconcile(self, header: Header, row: Row) -> bytes:
        known, is_new = self._store.begin(row)
        if known.digest != row.digest:
            return answers.failed(row, Condition.NOT_ALLOWED, answers.NOT_THIS)
        if known.answer is not None:
            return known.answer
        if not is_new:
            return answers.failed(row, Condition.IN_PROGRESS, told(State.OPEN).sentence.english)
        answer = self._store.close_period(
            row, lambda number, totals: self._reconciled(header, "SaleReconciliation", number, totals)
        )
        if answer is not None:
            return answer
        busy = answers.failed(row, Condition.BUSY, "a payment is going on at this reader")
        return self._store.end(row.key, State.BUSY, busy)

    def _reconciled(self, header: Header, kind: str, number: int, totals: list[Total]) -> bytes:
        everything = TotalsOrder(by=(), only={})
        body = {
            "Response": answers.response(None, "Reconciled"),
            "ReconciliationType": kind,
            "POIReconciliationID": str(number),
            "TransactionTotals": answers.transaction_totals(
                self._place, header.key.poi_id, everything, totals
            ),
        }
        return wire.dumps(answers.answer(header, "ReconciliationResponse", body))

    async def balance_inquiry(self, header: Header, raw: dict[str, Any]) -> Reply:
        return answers.refuse(
            header, Condition.NOT_ALLOWED, "how much credit a customer has is told to nobody but the customer"
        )
