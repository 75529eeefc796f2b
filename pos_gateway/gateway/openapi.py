"""The local API as an OpenAPI 3.1 document, made from the shapes and the table of roles that serve it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import pos_gateway
from pos_gateway.gateway import shapes as s
from pos_gateway.gateway.access import LEAST_ROLES
from pos_gateway.gateway.staff import Role
from pos_gateway.gateway.wire import Shape

_ERRORS: Final = {
    400: "the request cannot be read; says which field",
    401: "not signed in, or the token is not known",
    403: "signed in, and not allowed",
    404: "nothing is known under that id",
    409: "the id was used for something else, or it cannot be done now",
    413: "the body is too large",
    415: "not JSON",
    429: "too many wrong PINs",
    503: "a part is not there now: reader, line, disk, printer",
}


@dataclass(frozen=True, slots=True)
class _Operation:
    summary: str
    answers: Mapping[int, str]
    body: type[Shape] | None = None
    query: Mapping[str, str] | None = None
    media: str = "application/json"


_STREAM: Final = "text/event-stream"
_OPERATIONS: Final[Mapping[tuple[str, str], _Operation]] = {
    ("POST", "/v1/payments"): _Operation(
        "Begin a payment. The same id again is the same payment.",
        {200: "final already", 202: "begun; watch its events"},
        s.StartPayment,
    ),
    ("GET", "/v1/payments/{id}"): _Operation(
        "How it stands; of an approval, since when it is stored and whether the ledger has it.",
        {200: "the payment"},
    ),
    ("POST", "/v1/payments/{id}/cancel"): _Operation(
        "Ask for its end; a card that has answered may still approve it.", {200: "the payment"}, s.Nothing
    ),
    ("GET", "/v1/payments/{id}/events"): _Operation(
        "Server-sent events until it is final.", {200: "a stream of `payment` events"}, media=_STREAM
    ),
    ("POST", "/v1/payments/{id}/reversal"): _Operation(
        "Void an approved payment, whole.", {200: "the void"}, s.VoidPayment
    ),
    ("POST", "/v1/payments/{id}/refunds"): _Operation(
        "Give back a part of it, or all; never beyond.", {200: "the refund"}, s.RefundPayment
    ),
    ("GET", "/v1/payments/{id}/receipt"): _Operation(
        "The decision receipt: a file that anybody can verify.", {200: "the receipt"}
    ),
    ("POST", "/v1/payments/{id}/print"): _Operation(
        "Print a receipt.", {200: "the printer has it"}, s.PrintReceipt
    ),
    ("GET", "/v1/offers"): _Operation(
        "The instalments that may be offered for an amount.",
        {200: "the offers"},
        query={"amount_minor": "minor units"},
    ),
    ("GET", "/v1/status"): _Operation(
        "Line, queue with count and amount, limits, readers, latest payments.", {200: "the status"}
    ),
    ("GET", "/v1/events"): _Operation(
        "Server-sent events: `payment`, `status`, `refused`.", {200: "a stream"}, media=_STREAM
    ),
    ("POST", "/v1/synchronise"): _Operation(
        "Present the queue and fetch limits now.", {202: "it has begun"}, s.Nothing
    ),
    ("POST", "/v1/limits"): _Operation(
        "Take newer limits from a folder of this machine, like a stick.",
        {200: "what was found"},
        s.LimitsFrom,
    ),
    ("POST", "/v1/carry/export"): _Operation(
        "Write the signed queue into a folder of this machine, like a stick.",
        {200: "what was written"},
        s.LimitsFrom,
    ),
    ("POST", "/v1/carry/import"): _Operation(
        "Take limits and the ledger's letters of verdicts from a folder.",
        {200: "what was found"},
        s.LimitsFrom,
    ),
    ("GET", "/v1/health"): _Operation(
        "How this machine stands; always 200 while it runs.", {200: "the state"}
    ),
    ("GET", "/v1/ready"): _Operation(
        "Could a payment be begun and approved now?", {200: "yes", 503: "no, and why"}
    ),
    ("POST", "/v1/clock"): _Operation(
        "A manager says that the clock is right.", {200: "the journal record"}, s.ClockIsRight
    ),
    ("POST", "/v1/shifts"): _Operation("Open a shift.", {201: "the shift"}, s.OpenShift),
    ("POST", "/v1/shifts/current/cash"): _Operation(
        "Cash into the drawer, or out of it.", {201: "the record"}, s.MoveCash
    ),
    ("POST", "/v1/shifts/current/count"): _Operation(
        "Say what was counted; only then what was expected is told.", {200: "the difference"}, s.CountDrawer
    ),
    ("POST", "/v1/shifts/current/close"): _Operation("Close the shift.", {200: "the record"}, s.CloseShift),
    ("GET", "/v1/reports/x"): _Operation("The day so far.", {200: "the sums"}),
    ("POST", "/v1/reports/z"): _Operation("Close the day.", {201: "the report"}, s.CloseDay),
    ("GET", "/v1/reports/{id}"): _Operation("A closed shift or day.", {200: "the report"}),
}


@cache
def openapi() -> dict[str, Any]:
    """The document. Sign-in and staff are for this page's own scripts and not part of it."""
    paths: dict[str, dict[str, Any]] = {}
    schemas: dict[str, Any] = {"Error": _ERROR}
    for (method, path), operation in _OPERATIONS.items():
        least = LEAST_ROLES[method, path]
        paths.setdefault(path, {})[method.lower()] = _described(method, path, operation, least, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "POS Gateway, local API",
            "version": pos_gateway.__version__,
            "description": "Taking offline payments from other software in the shop. Amounts are integers "
            "in the currency's minor unit; ids are UUIDs that the caller chooses and keeps for every retry.",
        },
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def fields_of(document: Mapping[str, Any], operation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The fields of an operation's body, for people."""
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][reference.rpartition("/")[2]]
    for name, field in schema.get("properties", {}).items():
        kinds = [
            one.get("type", one.get("$ref", "").rpartition("/")[2]) for one in field.get("anyOf", [field])
        ]
        yield {
            "name": name,
            "type": " | ".join(kinds),
            "description": field.get("description", ""),
            "required": name in schema.get("required", ()),
        }


def _described(
    method: str, path: str, operation: _Operation, least: Role, schemas: dict[str, Any]
) -> dict[str, Any]:
    failure = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    answers: dict[str, Any] = {
        str(status): {"description": told, "content": {operation.media: {"schema": _schema_of(operation)}}}
        for status, told in operation.answers.items()
    }
    answers |= {str(status): {"description": told, **failure} for status, told in _ERRORS.items()}
    out: dict[str, Any] = {
        "operationId": _name(method, path),
        "summary": operation.summary,
        "x-least-role": least.word,
        "responses": answers,
    }
    parameters = []
    if "{id}" in path:
        parameters.append(
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "format": "uuid"}}
        )
    for name, told in (operation.query or {}).items():
        parameters.append(
            {
                "name": name,
                "in": "query",
                "required": True,
                "description": told,
                "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999_999},
            }
        )
    if parameters:
        out["parameters"] = parameters
    if operation.body is not None:
        schema = operation.body.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[operation.body.__name__] = schema
        out["requestBody"] = {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": f"#/components/schemas/{operation.body.__name__}"}}
            },
        }
    return out


def _schema_of(operation: _Operation) -> dict[str, Any]:
    return {"type": "string"} if operation.media == _STREAM else {"type": "object"}


def _name(method: str, path: str) -> str:
    words = [word.strip("{}") for word in path.split("/")[2:]]
    return "_".join([method.lower(), *words]).replace("-", "_")


_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "reason", "advice"],
            "properties": {
                "code": {"type": "string"},
                "reason": {"type": "string"},
                "advice": {"type": "string"},
            },
        }
    },
}
