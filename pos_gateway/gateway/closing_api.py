"""Shifts and reports over HTTP.

POST /v1/shifts                {"id", "float_minor"}: open
POST /v1/shifts/current/cash   {"id", "amount_minor", "reason"}: into the drawer, or out of it
POST /v1/shifts/current/count  {"counted_minor"} → only then what was expected
POST /v1/shifts/current/close  {"reason", "note"?}
GET  /v1/reports/x             the day so far
POST /v1/reports/z             {"id"}: close the day
GET  /v1/reports/{id}          a closed shift or day, as the ledger sees it now
"""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

from aiohttp import web

from pos_gateway.errors import NotFound
from pos_gateway.gateway.access import caller_of, facts_of
from pos_gateway.gateway.history import History
from pos_gateway.gateway.shapes import CloseDay, CloseShift, CountDrawer, MoveCash, OpenShift
from pos_gateway.gateway.shifts import Shifts
from pos_gateway.gateway.wire import body_of, json_answer, uuid_of
from pos_gateway.records import Record


def closed(shifts: Shifts, history: History, report_id: UUID) -> dict[str, Any]:
    """A closed shift or day: what was journalled, and what its records add up to by the ledger's latest word.

    Raises:
        NotFound: there is no such report.
    """
    for record in shifts.records_of(report_id):
        facts = record.facts()
        if facts["event"] in ("day", "closed"):
            totals = facts["totals"]
            now = history.totals(totals["first_sequence"] - 1, totals["last_sequence"]).as_json()
            # What was pruned meanwhile was agreed to; the sums as journalled stand.
            whole = now["sales"] == totals["sales"] and now["refunds"] == totals["refunds"]
            return {**facts, "id": str(report_id), "totals": now if whole else {**totals, "state": "settled"}}
    raise NotFound("there is no such report")


def add_closing_routes(app: web.Application, shifts: Shifts, history: History) -> None:
    async def open_shift(request: web.Request) -> web.Response:
        told = await body_of(request, OpenShift)
        who = facts_of(caller_of(request))
        shift = await asyncio.to_thread(shifts.open, uuid_of(told.id, "id"), who, told.float_minor)
        return json_answer(shift.as_json(), status=201)

    async def cash(request: web.Request) -> web.Response:
        told = await body_of(request, MoveCash)
        who = facts_of(caller_of(request))
        record = await asyncio.to_thread(
            shifts.cash, uuid_of(told.id, "id"), who, told.amount_minor, told.reason
        )
        return json_answer(_told(record), status=201)

    async def count(request: web.Request) -> web.Response:
        told = await body_of(request, CountDrawer)
        who = facts_of(caller_of(request))
        return json_answer(await asyncio.to_thread(shifts.count, who, told.counted_minor))

    async def close(request: web.Request) -> web.Response:
        told = await body_of(request, CloseShift)
        who = facts_of(caller_of(request))
        return json_answer(_told(await asyncio.to_thread(shifts.close, who, told.reason, told.note)))

    async def x_report(request: web.Request) -> web.Response:
        totals = await asyncio.to_thread(shifts.day_so_far)
        shift = shifts.current
        return json_answer({"shift": shift.as_json() if shift else None, "totals": totals.as_json()})

    async def z_report(request: web.Request) -> web.Response:
        told = await body_of(request, CloseDay)
        who = facts_of(caller_of(request))
        record = await asyncio.to_thread(shifts.close_day, uuid_of(told.id, "id"), who)
        return json_answer(_told(record), status=201)

    async def report(request: web.Request) -> web.Response:
        report_id = uuid_of(request.match_info["id"], "path")
        return json_answer(await asyncio.to_thread(closed, shifts, history, report_id))

    app.add_routes(
        [
            web.post("/v1/shifts", open_shift),
            web.post("/v1/shifts/current/cash", cash),
            web.post("/v1/shifts/current/count", count),
            web.post("/v1/shifts/current/close", close),
            web.get("/v1/reports/x", x_report),
            web.post("/v1/reports/z", z_report),
            web.get("/v1/reports/{id}", report),
        ]
    )


def _told(record: Record) -> dict[str, Any]:
    return {**record.facts(), "record": str(record.id), "sequence": record.sequence}
