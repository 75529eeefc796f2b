"""The way of other programs on this machine to the running gateway: its local HTTP API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp

from pos_gateway.errors import Conflict, InvalidMessage, NotFound, PosGatewayError, Unavailable
from pos_gateway.gateway.config import Home
from pos_gateway.records import parse_object

_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, connect=5, sock_read=60)


def ask(home: Home, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One request to the running gateway.

    Raises:
        Unavailable: it does not run, or cannot do that now.
        InvalidMessage, NotFound, Conflict: as it says.
    """

    async def run() -> dict[str, Any]:
        async with _request(home, method, path, body) as response:
            return parse_object(await response.read(), where="the gateway's answer")

    return asyncio.run(run())


def watch(home: Home, path: str, on_event: Callable[[dict[str, Any]], bool]) -> None:
    """Hand each server-sent event's data to `on_event` until it returns False or the stream ends."""

    async def run() -> None:
        async with _request(home, "GET", path, None) as response:
            async for line in response.content:
                if line.startswith(b"data: ") and not on_event(json.loads(line[6:])):
                    return

    asyncio.run(run())


@asynccontextmanager
async def _request(
    home: Home, method: str, path: str, body: Mapping[str, Any] | None
) -> AsyncIterator[aiohttp.ClientResponse]:
    url = address(home) + path
    try:
        async with (
            aiohttp.ClientSession(timeout=_TIMEOUT) as session,
            session.request(method, url, json=body if method == "POST" else None) as response,
        ):
            if response.status >= 400:
                raise _error(response.status, await response.read())
            yield response
    except (aiohttp.ClientError, TimeoutError):
        raise Unavailable(
            f"no gateway answers at {url.partition('/v1')[0]}", advice="start it: pos-gateway gateway serve"
        ) from None


def address(home: Home) -> str:
    """Where the gateway of this home says that it listens.

    Raises:
        Unavailable: it is not running.
    """
    try:
        return home.address.read_text().strip()
    except OSError:
        raise Unavailable(
            "the gateway of this home is not running", advice="start it: pos-gateway gateway serve"
        ) from None


def _error(status: int, data: bytes) -> PosGatewayError:
    try:
        told = json.loads(data)["error"]
        reason, advice = str(told["reason"]), str(told["advice"])
    except (ValueError, KeyError, TypeError):
        reason, advice = f"the gateway answered {status}", ""
    match status:
        case 400 | 413 | 415:
            return InvalidMessage(reason, advice=advice)
        case 404:
            return NotFound(reason, advice=advice)
        case 409:
            return Conflict(reason, advice=advice)
        case _:
            return Unavailable(reason, advice=advice)
