"""The way of other programs on this machine to the running gateway: its local HTTP API."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp

from pos_gateway.errors import (
    Conflict,
    InvalidMessage,
    NotFound,
    NotPermitted,
    PosGatewayError,
    Unavailable,
)
from pos_gateway.gateway.config import Home, load_settings
from pos_gateway.gateway.page_tls import client_context
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
    tls = _tls(home) if url.startswith("https://") else True
    try:
        async with (
            aiohttp.ClientSession(timeout=_TIMEOUT, headers=authorization(home)) as session,
            session.request(method, url, json=body if method == "POST" else None, ssl=tls) as response,
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


def authorization(home: Home) -> dict[str, str]:
    """The header that lets this machine's own programs in.

    Raises:
        Unavailable: the token's file cannot be read: it is for the gateway's own user.
    """
    try:
        return {"Authorization": f"Bearer {home.api_token.read_text().strip()}"}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise Unavailable(
            f"the gateway's token cannot be read: {error.strerror}",
            advice="run this as the user that the gateway runs as",
        ) from None


def _tls(home: Home) -> ssl.SSLContext:
    own = load_settings(home).http.certificate
    return client_context(Path(own) if own else home.http_certificate)


def _error(status: int, data: bytes) -> PosGatewayError:
    try:
        told = json.loads(data)["error"]
        reason, advice = str(told["reason"]), str(told["advice"])
    except (ValueError, KeyError, TypeError):
        reason, advice = f"the gateway answered {status}", ""
    match status:
        case 400 | 413 | 415:
            return InvalidMessage(reason, advice=advice)
        case 401 | 403 | 429:
            return NotPermitted(reason, signed_in=status == 403, advice=advice)
        case 404:
            return NotFound(reason, advice=advice)
        case 409:
            return Conflict(reason, advice=advice)
        case _:
            return Unavailable(reason, advice=advice)
