"""The gateway's local HTTP API: start a payment, watch it, see how the gateway stands.

    POST   /v1/payments               {"id", "amount_minor", "currency", "lane"?, "wait_s"?} → the payment
    GET    /v1/payments/{id}          how it stands
    POST   /v1/payments/{id}/cancel   ask for its end
    POST   /v1/payments/{id}/reversal {"id", "reason"?}: void an approved payment, whole
    POST   /v1/payments/{id}/refunds  {"id", "amount_minor", "reason"?}: give back a part of it, or all
    GET    /v1/payments/{id}/events   server-sent events until it is final
    GET    /v1/payments/{id}/receipt  its decision receipt, a file that anybody can verify
    POST   /v1/payments/{id}/print    {"copy", "language"?} on the receipt printer
    GET    /v1/status                 lanes, line, queue, snapshot
    POST   /v1/synchronise            present the queue and fetch limits now
    POST   /v1/limits                 {"folder"} → take newer limits from a folder, like a stick
    POST   /v1/carry/export           {"folder"} → write the signed queue onto a stick
    POST   /v1/carry/import           {"folder"} → take limits and the ledger's letters from a stick
    POST   /v1/clock                  {"time_unix_ms"} → a manager says that the clock is right
    GET    /v1/health                 {"status", "ready", "problems"}; always 200 while it runs
    GET    /v1/ready                  200 while a payment could be begun and approved, else 503
    GET    /metrics                   for Prometheus
    GET    /v1/events                 server-sent events: `payment` and `status`
    GET    /v1/customer-events        the same for a second screen: amount, state, terms, no more

Signing in and staff: `staff_api`; shifts and reports: `closing_api`; pages: `dashboard`. Who may do what:
`access`. Errors are `{"error": {"code", "reason", "advice"}}`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from pos_gateway.errors import InvalidMessage, NotPermitted, PosGatewayError, Unavailable
from pos_gateway.gateway.access import SESSION_COOKIE, Door, caller_of, facts_of, guard, sign_in_path
from pos_gateway.gateway.closing_api import add_closing_routes
from pos_gateway.gateway.dashboard.pages import add_pages
from pos_gateway.gateway.deeds import Deeds
from pos_gateway.gateway.events import Event, Hub, Subscription
from pos_gateway.gateway.history import History
from pos_gateway.gateway.lane import PaymentView
from pos_gateway.gateway.language import language
from pos_gateway.gateway.metrics import CONTENT_TYPE, problems
from pos_gateway.gateway.payments import Payments, PlanChoice
from pos_gateway.gateway.receipts.contents import Copy
from pos_gateway.gateway.receipts.desk import Desk
from pos_gateway.gateway.shapes import (
    ClockIsRight,
    LimitsFrom,
    PrintReceipt,
    RefundPayment,
    StartPayment,
    VoidPayment,
)
from pos_gateway.gateway.shifts import Shifts
from pos_gateway.gateway.staff_api import add_staff_routes
from pos_gateway.gateway.wire import body_of, error_answer, json_answer, refusal, uuid_of
from pos_gateway.money import Money
from pos_gateway.records import Record

_log = structlog.get_logger(__name__)

_MAX_BODY_BYTES: Final = 64 * 1024
_KEEP_ALIVE_S: Final = 15.0
LOOPBACK_NAMES: Final = ("127.0.0.1", "localhost", "[::1]")
_SHOWN_TO_CUSTOMERS: Final = ("amount", "state", "final", "lane", "plan", "english", "chinese")


async def _nothing_carried(folder: Path) -> dict[str, Any]:
    raise Unavailable("this gateway carries nothing", advice="see `pos-gateway gateway carry`")


@dataclass(frozen=True, slots=True)
class Parts:
    """What the API needs of the running gateway."""

    payments: Payments
    hub: Hub
    door: Door
    deeds: Deeds
    shifts: Shifts
    history: History
    desk: Desk
    status: Callable[[], dict[str, Any]]
    synchronise: Callable[[], None]
    fetch_limits: Callable[[Path], dict[str, Any]]
    confirm_clock: Callable[[int], dict[str, Any]]
    carry_out: Callable[[Path], dict[str, Any]] = lambda folder: {}
    """These three block: they are called in a thread."""
    carry_in: Callable[[Path], Awaitable[dict[str, Any]]] = _nothing_carried
    metrics: Callable[[], bytes] = lambda: b""
    """Blocks, too."""
    line_is_down: Callable[[], bool] = lambda: False


def build_app(parts: Parts) -> web.Application:
    door = parts.door
    app = web.Application(
        middlewares=[_errors, guard(door, lambda request, error: _refuse(request, door, error))],
        client_max_size=_MAX_BODY_BYTES,
    )

    # The journal is read in threads: a slow disk must not hold up everybody else's events.
    async def shown(payment_id: UUID) -> PaymentView:
        return await asyncio.to_thread(parts.payments.show, payment_id)

    async def told_whole(payment_id: UUID) -> dict[str, Any]:
        """With where an approval stands on its way to the ledger."""
        view = (await shown(payment_id)).as_json()
        if view["state"] == "approved":
            view["offline"] = await asyncio.to_thread(parts.payments.on_its_way, payment_id)
        return view

    async def start(request: web.Request) -> web.Response:
        order = await body_of(request, StartPayment)
        cap_minor = order.offline_cap_minor
        if cap_minor is not None and order.amount_minor > cap_minor and parts.line_is_down():
            raise Unavailable(
                "off the network, and this amount is over the caller's cap for that",
                advice="begin it again when the line is up, or with a higher offline_cap_minor",
            )
        plan = PlanChoice(order.plan.offer, order.plan.periods) if order.plan is not None else None
        payment_id = uuid_of(order.id, "id")
        with parts.hub.subscribe() as subscription:
            view = await asyncio.to_thread(
                parts.payments.start, payment_id, order.amount_minor, order.currency, order.lane, plan
            )
            told = view.as_json()
            if order.wait_s and not view.state.final:
                told = await _final(subscription, told, order.wait_s)
        return json_answer(told, status=200 if told["final"] else 202)

    async def offers(request: web.Request) -> web.Response:
        asked = request.query.get("amount_minor", "")
        if not (asked.isascii() and asked.isdigit() and len(asked) <= 12):
            raise InvalidMessage("must be a number of minor units", where="amount_minor")
        found = await asyncio.to_thread(parts.payments.offers, int(asked))
        return json_answer({"offers": [plan.to_json() for plan in found]})

    async def show(request: web.Request) -> web.Response:
        return json_answer(await told_whole(uuid_of(request.match_info["id"], "path")))

    async def cancel(request: web.Request) -> web.Response:
        payment_id = uuid_of(request.match_info["id"], "path")
        return json_answer((await asyncio.to_thread(parts.payments.cancel, payment_id)).as_json())

    async def void(request: web.Request) -> web.Response:
        order = await body_of(request, VoidPayment)
        payment_id = uuid_of(request.match_info["id"], "path")
        correction_id = uuid_of(order.id, "id")
        caller = caller_of(request)

        def work() -> tuple[Record, PaymentView]:
            done = parts.payments.void(payment_id, correction_id, order.reason)
            parts.deeds.note("voided", facts_of(caller), about=payment_id, correction=str(correction_id))
            return done

        return _correction(*await asyncio.to_thread(work))

    async def refund(request: web.Request) -> web.Response:
        order = await body_of(request, RefundPayment)
        payment_id = uuid_of(request.match_info["id"], "path")
        correction_id = uuid_of(order.id, "id")
        caller = caller_of(request)

        def work() -> tuple[Record, PaymentView]:
            done = parts.payments.refund(payment_id, order.amount_minor, correction_id, order.reason)
            parts.deeds.note("refunded", facts_of(caller), about=payment_id, correction=str(correction_id))
            return done

        return _correction(*await asyncio.to_thread(work))

    async def watch_payment(request: web.Request) -> web.StreamResponse:
        payment_id = uuid_of(request.match_info["id"], "path")
        with parts.hub.subscribe() as subscription:
            now = Event("payment", (await shown(payment_id)).as_json())

            def is_last(event: Event) -> bool:
                return bool(event.data["final"])

            def concerns(event: Event) -> bool:
                return event.name == "payment" and event.data["id"] == str(payment_id)

            return await _stream(request, door, subscription, [now], concerns, is_last)

    async def watch_all(request: web.Request) -> web.StreamResponse:
        with parts.hub.subscribe() as subscription:
            now = Event("status", await asyncio.to_thread(parts.status))
            return await _stream(request, door, subscription, [now], lambda event: True, lambda event: False)

    async def watch_as_customer(request: web.Request) -> web.StreamResponse:
        lane = request.query.get("lane", "")
        with parts.hub.subscribe() as subscription:

            def concerns(event: Event) -> bool:
                return event.name == "payment" and lane in ("", event.data["lane"])

            return await _stream(
                request, door, subscription, [], concerns, lambda event: False, _for_customers
            )

    async def decision_receipt(request: web.Request) -> web.Response:
        payment_id = uuid_of(request.match_info["id"], "path")
        receipt = await asyncio.to_thread(parts.desk.decision_receipt, payment_id)
        answer = json_answer(receipt.to_json())
        answer.headers["Content-Disposition"] = f'attachment; filename="{payment_id}.receipt.json"'
        return answer

    async def print_receipt(request: web.Request) -> web.Response:
        wanted = await body_of(request, PrintReceipt)
        payment_id = uuid_of(request.match_info["id"], "path")
        try:
            copy = Copy(wanted.copy_for)
        except ValueError:
            raise InvalidMessage("customer or merchant", where="copy") from None
        await asyncio.to_thread(parts.desk.print, payment_id, copy, language(wanted.language))
        return json_answer({"printed": True})

    async def status(request: web.Request) -> web.Response:
        return json_answer(await asyncio.to_thread(parts.status))

    async def synchronise(request: web.Request) -> web.Response:
        parts.synchronise()
        return json_answer({"started": True}, status=202)

    async def fetch_limits(request: web.Request) -> web.Response:
        wanted = await body_of(request, LimitsFrom)
        return json_answer(await asyncio.to_thread(parts.fetch_limits, Path(wanted.folder)))

    async def carry_out(request: web.Request) -> web.Response:
        wanted = await body_of(request, LimitsFrom)
        return json_answer(await asyncio.to_thread(parts.carry_out, Path(wanted.folder)))

    async def carry_in(request: web.Request) -> web.Response:
        wanted = await body_of(request, LimitsFrom)
        return json_answer(await parts.carry_in(Path(wanted.folder)))

    async def confirm_clock(request: web.Request) -> web.Response:
        told = await body_of(request, ClockIsRight)
        return json_answer(await asyncio.to_thread(parts.confirm_clock, told.time_unix_ms))

    async def health(_request: web.Request) -> web.Response:
        return json_answer(_health(await asyncio.to_thread(parts.status)))

    async def ready(_request: web.Request) -> web.Response:
        told = _health(await asyncio.to_thread(parts.status))
        return json_answer(told, status=200 if told["ready"] else 503)

    async def metrics(_request: web.Request) -> web.Response:
        body = await asyncio.to_thread(parts.metrics)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    app.add_routes(
        [
            web.get("/metrics", metrics),
            web.get("/v1/health", health),
            web.get("/v1/ready", ready),
            web.post("/v1/payments", start),
            web.get("/v1/offers", offers),
            web.get("/v1/payments/{id}", show),
            web.post("/v1/payments/{id}/cancel", cancel),
            web.post("/v1/payments/{id}/reversal", void),
            web.post("/v1/payments/{id}/refunds", refund),
            web.get("/v1/payments/{id}/events", watch_payment),
            web.get("/v1/status", status),
            web.post("/v1/synchronise", synchronise),
            web.post("/v1/limits", fetch_limits),
            web.post("/v1/carry/export", carry_out),
            web.post("/v1/carry/import", carry_in),
            web.post("/v1/clock", confirm_clock),
            web.get("/v1/events", watch_all),
            web.get("/v1/customer-events", watch_as_customer),
            web.get("/v1/payments/{id}/receipt", decision_receipt),
            web.post("/v1/payments/{id}/print", print_receipt),
        ]
    )
    add_staff_routes(app, door, parts.deeds)
    add_closing_routes(app, parts.shifts, parts.history)
    add_pages(app, parts)
    return app


def _health(status: dict[str, Any]) -> dict[str, Any]:
    found = problems(status)
    return {
        "status": "impaired" if found else "ok",
        "ready": not found,
        "problems": found,
        "time_unix_ms": status["now_unix_ms"],
    }


async def _stream(
    request: web.Request,
    door: Door,
    subscription: Subscription,
    first: list[Event],
    concerns: Callable[[Event], bool],
    is_last: Callable[[Event], bool],
    told: Callable[[Event], Event] = lambda event: event,
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Cache-Control": "no-store"})
    response.content_type = "text/event-stream"
    await response.prepare(request)
    with contextlib.suppress(ConnectionResetError):  # who has gone away is told nothing
        await _tell(request, response, door, subscription, first, concerns, is_last, told)
    return response


async def _tell(
    request: web.Request,
    response: web.StreamResponse,
    door: Door,
    subscription: Subscription,
    first: list[Event],
    concerns: Callable[[Event], bool],
    is_last: Callable[[Event], bool],
    told: Callable[[Event], Event],
) -> None:
    for event in first:
        await response.write(told(event).to_bytes())
        if is_last(event):
            return
    while _still_in(request, door):
        try:
            event_or_end = await subscription.next(_KEEP_ALIVE_S)
        except TimeoutError:
            await response.write(b": still here\n\n")
            continue
        if event_or_end is None:
            return
        if concerns(event_or_end):
            await response.write(told(event_or_end).to_bytes())
            if is_last(event_or_end):
                return
    await response.write(Event("locked", {}).to_bytes())


async def _final(subscription: Subscription, payment: dict[str, Any], wait_s: float) -> dict[str, Any]:
    """How the payment stands once it is final, or after so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            while not payment["final"]:
                event = await subscription.next(wait_s)
                if event is None:
                    break
                if event.name == "payment" and event.data["id"] == payment["id"]:
                    payment = event.data
    return payment


def _still_in(request: web.Request, door: Door) -> bool:
    """A stream ends with the session it belongs to."""
    if caller_of(request).session is None:
        return True
    return door.sessions.find(request.cookies.get(SESSION_COOKIE, "")) is not None


def _for_customers(event: Event) -> Event:
    return Event(event.name, {name: event.data.get(name) for name in _SHOWN_TO_CUSTOMERS})


def _correction(record: Record, view: PaymentView) -> web.Response:
    return json_answer(
        {
            "id": str(record.id),
            "kind": record.kind.value,
            "amount_minor": record.facts()["amount_minor"],
            "amount": str(Money(record.facts()["amount_minor"], view.currency)),
            "sequence": record.sequence,
            "payment": view.as_json(),
        }
    )


def _refuse(request: web.Request, door: Door, error: NotPermitted) -> web.StreamResponse:
    """Pages send whoever is not signed in to sign in; programs are told so."""
    if request.method == "GET" and not error.signed_in and not request.path.startswith("/v1/"):
        return web.Response(status=303, headers={"Location": sign_in_path(request, door)})
    return refusal(error)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return error_answer(error.status, error.reason.lower().replace(" ", "_"), error.reason)
    except PosGatewayError as error:
        return refusal(error)
    except Exception:  # noqa: BLE001 - the cause goes to the log, never to the caller
        _log.exception("request failed", method=request.method, path=request.match_info.route.resource)
        return error_answer(500, "internal", "something went wrong here", "see the gateway's log")
