"""The gateway's local HTTP API: start a payment, watch it, see how the gateway stands.

    POST   /v1/payments               {"id", "amount_minor", "currency", "lane"?} → the payment
    GET    /v1/payments/{id}          how it stands
    POST   /v1/payments/{id}/cancel   ask for its end
    POST   /v1/payments/{id}/reversal {"id", "reason"?}: void an approved payment, whole
    POST   /v1/payments/{id}/refunds  {"id", "amount_minor", "reason"?}: give back a part of it, or all
    GET    /v1/payments/{id}/events   server-sent events until it is final
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
    GET    /                          the page

Errors are `{"error": {"code", "reason", "advice"}}`. The API binds to loopback and has no sign-in yet;
what keeps other web pages out is that only JSON is accepted (a cross-origin page cannot send that
unasked) and that Host and Origin must name this server.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar
from uuid import UUID

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pos_gateway.errors import (
    AuthenticationFailed,
    Conflict,
    InvalidInput,
    InvalidMessage,
    NotFound,
    PosGatewayError,
    Unavailable,
)
from pos_gateway.gateway.dashboard.pages import add_pages
from pos_gateway.gateway.events import Event, Hub, Subscription
from pos_gateway.gateway.lane import PaymentView
from pos_gateway.gateway.metrics import CONTENT_TYPE, problems
from pos_gateway.gateway.payments import Payments, PlanChoice
from pos_gateway.money import Money
from pos_gateway.records import Record

_log = structlog.get_logger(__name__)

_MAX_BODY_BYTES: Final = 64 * 1024
_KEEP_ALIVE_S: Final = 15.0
LOOPBACK_NAMES: Final = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True, slots=True)
class Parts:
    """What the API needs of the running gateway."""

    payments: Payments
    hub: Hub
    status: Callable[[], dict[str, Any]]
    synchronise: Callable[[], None]
    fetch_limits: Callable[[Path], dict[str, Any]]
    confirm_clock: Callable[[int], dict[str, Any]]
    carry_out: Callable[[Path], dict[str, Any]]
    """These three block: they are called in a thread."""
    carry_in: Callable[[Path], Awaitable[dict[str, Any]]]
    metrics: Callable[[], bytes] = lambda: b""
    """Blocks, too."""
    host_names: tuple[str, ...] = LOOPBACK_NAMES


class ChosenPlan(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    offer: str = Field(max_length=64)
    periods: int


class StartPayment(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    id: str = Field(description="a UUID chosen by the caller; the same on every retry")
    amount_minor: int
    currency: str
    lane: str | None = None
    plan: ChosenPlan | None = None


class Folder(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    folder: str = Field(min_length=1, max_length=4096, description="absolute path on this machine")


class ClockIsRight(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    time_unix_ms: int = Field(ge=0, lt=1 << 48, description="what the manager reads elsewhere")


class VoidPayment(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    id: str = Field(description="a UUID chosen by the caller; the same on every retry")
    reason: str = ""


class RefundPayment(VoidPayment):
    amount_minor: int


_Shape = TypeVar("_Shape", bound=BaseModel)


def build_app(parts: Parts) -> web.Application:
    app = web.Application(middlewares=[_errors, _own_pages_only(parts)], client_max_size=_MAX_BODY_BYTES)

    # The journal is read in threads: a slow disk must not hold up everybody else's events.
    async def shown(payment_id: UUID) -> PaymentView:
        return await asyncio.to_thread(parts.payments.show, payment_id)

    async def start(request: web.Request) -> web.Response:
        order = await _body(request, StartPayment)
        view = await asyncio.to_thread(
            parts.payments.start,
            _payment_id(order.id, "id"),
            order.amount_minor,
            order.currency,
            order.lane,
            PlanChoice(order.plan.offer, order.plan.periods) if order.plan is not None else None,
        )
        return _json(view.as_json(), status=200 if view.state.final else 202)

    async def offers(request: web.Request) -> web.Response:
        asked = request.query.get("amount_minor", "")
        if not (asked.isascii() and asked.isdigit() and len(asked) <= 12):
            raise InvalidMessage("must be a number of minor units", where="amount_minor")
        found = await asyncio.to_thread(parts.payments.offers, int(asked))
        return _json({"offers": [plan.to_json() for plan in found]})

    async def show(request: web.Request) -> web.Response:
        return _json((await shown(_payment_id(request.match_info["id"], "path"))).as_json())

    async def cancel(request: web.Request) -> web.Response:
        payment_id = _payment_id(request.match_info["id"], "path")
        return _json((await asyncio.to_thread(parts.payments.cancel, payment_id)).as_json())

    async def void(request: web.Request) -> web.Response:
        order = await _body(request, VoidPayment)
        payment_id = _payment_id(request.match_info["id"], "path")
        correction_id = _payment_id(order.id, "id")
        return _correction(
            *await asyncio.to_thread(parts.payments.void, payment_id, correction_id, order.reason)
        )

    async def refund(request: web.Request) -> web.Response:
        order = await _body(request, RefundPayment)
        payment_id = _payment_id(request.match_info["id"], "path")
        correction_id = _payment_id(order.id, "id")
        return _correction(
            *await asyncio.to_thread(
                parts.payments.refund, payment_id, order.amount_minor, correction_id, order.reason
            )
        )

    async def watch_payment(request: web.Request) -> web.StreamResponse:
        payment_id = _payment_id(request.match_info["id"], "path")
        with parts.hub.subscribe() as subscription:
            now = Event("payment", (await shown(payment_id)).as_json())

            def is_last(event: Event) -> bool:
                return bool(event.data["final"])

            def concerns(event: Event) -> bool:
                return event.name == "payment" and event.data["id"] == str(payment_id)

            return await _stream(request, subscription, [now], concerns, is_last)

    async def watch_all(request: web.Request) -> web.StreamResponse:
        with parts.hub.subscribe() as subscription:
            now = Event("status", await asyncio.to_thread(parts.status))
            return await _stream(request, subscription, [now], lambda event: True, lambda event: False)

    async def status(request: web.Request) -> web.Response:
        return _json(await asyncio.to_thread(parts.status))

    async def synchronise(request: web.Request) -> web.Response:
        parts.synchronise()
        return _json({"started": True}, status=202)

    async def fetch_limits(request: web.Request) -> web.Response:
        wanted = await _body(request, Folder)
        return _json(await asyncio.to_thread(parts.fetch_limits, Path(wanted.folder)))

    async def carry_out(request: web.Request) -> web.Response:
        wanted = await _body(request, Folder)
        return _json(await asyncio.to_thread(parts.carry_out, Path(wanted.folder)))

    async def carry_in(request: web.Request) -> web.Response:
        wanted = await _body(request, Folder)
        return _json(await parts.carry_in(Path(wanted.folder)))

    async def confirm_clock(request: web.Request) -> web.Response:
        told = await _body(request, ClockIsRight)
        return _json(await asyncio.to_thread(parts.confirm_clock, told.time_unix_ms))

    async def health(_request: web.Request) -> web.Response:
        return _json(_health(await asyncio.to_thread(parts.status)))

    async def ready(_request: web.Request) -> web.Response:
        told = _health(await asyncio.to_thread(parts.status))
        return _json(told, status=200 if told["ready"] else 503)

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
        ]
    )
    add_pages(app)
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
    subscription: Subscription,
    first: list[Event],
    concerns: Callable[[Event], bool],
    is_last: Callable[[Event], bool],
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Cache-Control": "no-store"})
    response.content_type = "text/event-stream"
    await response.prepare(request)
    for event in first:
        await response.write(event.to_bytes())
        if is_last(event):
            return response
    while True:
        try:
            event_or_end = await subscription.next(_KEEP_ALIVE_S)
        except TimeoutError:
            await response.write(b": still here\n\n")
            continue
        if event_or_end is None:
            return response
        if concerns(event_or_end):
            await response.write(event_or_end.to_bytes())
            if is_last(event_or_end):
                return response


def _correction(record: Record, view: PaymentView) -> web.Response:
    return _json(
        {
            "id": str(record.id),
            "kind": record.kind.value,
            "amount_minor": record.facts()["amount_minor"],
            "amount": str(Money(record.facts()["amount_minor"], view.currency)),
            "sequence": record.sequence,
            "payment": view.as_json(),
        }
    )


async def _body(request: web.Request, shape: type[_Shape]) -> _Shape:
    try:
        return shape.model_validate_json(await request.read())
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "body"
        raise InvalidMessage(first["msg"], where=place) from None


def _payment_id(text: str, where: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise InvalidMessage("not a UUID", where=where) from None


def _json(data: Mapping[str, Any], *, status: int = 200) -> web.Response:
    return web.json_response(data, status=status, dumps=lambda d: json.dumps(d, ensure_ascii=False))


def _error(status: int, code: str, reason: str, advice: str = "") -> web.Response:
    return _json({"error": {"code": code, "reason": reason, "advice": advice}}, status=status)


def _own_pages_only(parts: Parts) -> Middleware:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if _host_name(request.host) not in parts.host_names:
            return _error(421, "wrong_host", "this server does not answer to that name")
        if request.method == "POST":
            origin = request.headers.get("Origin")
            if origin is not None and origin.partition("://")[2] != request.host:
                return _error(403, "wrong_origin", "another web page may not do this")
            if request.content_type != "application/json":
                return _error(415, "wrong_content_type", "send application/json")
        return await handler(request)

    return check


def _host_name(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _error(error.status, error.reason.lower().replace(" ", "_"), error.reason)
    except PosGatewayError as error:
        return _error(_status_of(error), type(error).__name__, error.reason, error.advice)
    except Exception:  # noqa: BLE001 - the cause goes to the log, never to the caller
        _log.exception("request failed", method=request.method, path=request.path)
        return _error(500, "internal", "something went wrong here", "see the gateway's log")


def _status_of(error: PosGatewayError) -> int:
    match error:
        case InvalidInput() | AuthenticationFailed():
            return 400
        case NotFound():
            return 404
        case Conflict():
            return 409
        case Unavailable():
            return 503
        case _:
            return 500
