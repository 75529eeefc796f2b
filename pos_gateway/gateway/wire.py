"""How the local API reads and answers JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar
from uuid import UUID

from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from pos_gateway.errors import (
    AuthenticationFailed,
    Conflict,
    InvalidInput,
    InvalidMessage,
    NotFound,
    NotPermitted,
    PosGatewayError,
    Unavailable,
)


class Shape(BaseModel):
    """A request body: every field known, of its exact type."""

    model_config = ConfigDict(extra="forbid", strict=True)


_Shape = TypeVar("_Shape", bound=Shape)


async def body_of(request: web.Request, shape: type[_Shape]) -> _Shape:
    """
    Raises:
        InvalidMessage: names the first field that is wrong.
    """
    try:
        return shape.model_validate_json(await request.read())
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "body"
        raise InvalidMessage(first["msg"], where=place) from None


def uuid_of(text: str, where: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise InvalidMessage("not a UUID", where=where) from None


def json_answer(data: Mapping[str, Any], *, status: int = 200) -> web.Response:
    return web.json_response(data, status=status, dumps=lambda d: json.dumps(d, ensure_ascii=False))


def error_answer(status: int, code: str, reason: str, advice: str = "") -> web.Response:
    return json_answer({"error": {"code": code, "reason": reason, "advice": advice}}, status=status)


def refusal(error: PosGatewayError) -> web.Response:
    answer = error_answer(status_of(error), type(error).__name__, error.reason, error.advice)
    if isinstance(error, NotPermitted) and error.retry_after_s:
        answer.headers["Retry-After"] = str(error.retry_after_s)
    return answer


def status_of(error: PosGatewayError) -> int:
    match error:
        case InvalidInput() | AuthenticationFailed():
            return 400
        case NotPermitted(retry_after_s=left_s) if left_s:
            return 429
        case NotPermitted(signed_in=True):
            return 403
        case NotPermitted():
            return 401
        case NotFound():
            return 404
        case Conflict():
            return 409
        case Unavailable():
            return 503
        case _:
            return 500
