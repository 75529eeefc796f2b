"""The address POS software speaks to: HTTPS, one message in, one message out.

    POST /nexo, /nexo/, /nexo/<POIID>   a message, plain or encrypted; answered when it is done
    POST /sync                          the same
    POST /async                         "ok" at once; what became of it, TransactionStatus tells

200 for every message that could be read; 400 and 401 before anything is accepted; the 401 says nothing of
why. A request from a web page (it carries an Origin) is refused: a terminal is spoken to by programs.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from typing import Any, Final

import structlog
from aiohttp import web

from pos_gateway.errors import AuthenticationFailed, InvalidMessage, Unavailable
from pos_gateway.gateway.nexo import wire
from pos_gateway.gateway.nexo.answers import Reply
from pos_gateway.gateway.nexo.crypto import is_sealed
from pos_gateway.gateway.nexo.desk import Desk
from pos_gateway.gateway.nexo.setup import Secrets
from pos_gateway.gateway.nexo.store import Store

_log = structlog.get_logger(__name__)

_REQUEST: Final = "SaleToPOIRequest"
_EARLY_S: Final = 0.05
"""How long `/async` waits for a message that moves money to be rejected, before it says ok."""


class _Refused(Exception):
    """Not accepted; `status` is all that is told."""

    def __init__(self, status: int) -> None:
        self.status = status


class NexoServer:
    """Reads envelopes, hands their inside to the desk, and closes answers the same way."""

    def __init__(self, desk: Desk, store: Store, secrets: Secrets, *, plain: bool) -> None:
        self._desk = desk
        self._store = store
        self._secrets = secrets
        self._plain = plain
        self._later: set[asyncio.Task[Reply | None]] = set()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=wire.MAX_MESSAGE_BYTES)
        for path in ("/nexo", "/nexo/", "/nexo/{poi_id}", "/sync"):
            app.router.add_post(path, self._answer)
        app.router.add_post("/async", self._accept)
        return app

    async def _answer(self, request: web.Request) -> web.Response:
        try:
            message, sealed = await self._read(request)
        except _Refused as refused:
            return web.Response(status=refused.status)
        return self._write(await self._take(message, request.match_info.get("poi_id")), sealed)

    async def _accept(self, request: web.Request) -> web.Response:
        try:
            message, sealed = await self._read(request)
        except _Refused as refused:
            return web.Response(status=refused.status)
        header = message.get("MessageHeader")
        moves_money = isinstance(header, dict) and header.get("MessageCategory") in ("Payment", "Reversal")
        task = asyncio.ensure_future(self._take(message, None))
        self._later.add(task)
        task.add_done_callback(self._later.discard)
        if moves_money:
            await asyncio.wait({task}, timeout=_EARLY_S)
            reply = task.result() if task.done() else None
            if reply is not None and reply.envelope != _REQUEST:
                reply = None  # its POS asks for the status
        else:
            reply = await asyncio.shield(task)
        return web.Response(text="ok") if reply is None else self._write(reply, sealed)

    async def _take(self, message: Mapping[str, Any], poi_id: str | None) -> Reply | None:
        header = message.get("MessageHeader")
        if poi_id is not None and isinstance(header, dict) and header.get("POIID") != poi_id:
            return self._desk.reject("the address names another POIID")
        try:
            return await self._desk.take(message)
        except Exception:  # noqa: BLE001 - the cause goes to the log, never to the caller
            _log.exception("message failed")
            return self._desk.reject("something went wrong here; ask for the status")

    async def _read(self, request: web.Request) -> tuple[Mapping[str, Any], bool]:
        if "Origin" in request.headers:
            raise _Refused(403)
        try:
            outer = wire.parse(await request.read()).get(_REQUEST)
        except web.HTTPRequestEntityTooLarge:
            raise _Refused(413) from None
        except InvalidMessage:
            raise _Refused(400) from None
        if not isinstance(outer, dict):
            raise _Refused(400)
        if not is_sealed(outer):
            if not self._plain or not self._knows_api_key(request):
                raise _Refused(401)
            return outer, False
        key = self._secrets.key
        if key is None:
            raise _Refused(401)
        try:
            return await asyncio.to_thread(
                key.open, _REQUEST, outer, lambda nonce: self._store.is_new_nonce(nonce, key.name)
            ), True
        except AuthenticationFailed:
            _log.warning("a message was not authentic", remote=request.remote)
            raise _Refused(401) from None
        except Unavailable as error:
            _log.error("a message could not be accepted", reason=error.reason)
            raise _Refused(400) from None

    def _knows_api_key(self, request: web.Request) -> bool:
        expected = self._secrets.api_key
        if expected is None:
            return True
        return hmac.compare_digest(request.headers.get("X-API-Key", "").encode(), expected.encode())

    def _write(self, reply: Reply | None, sealed: bool) -> web.Response:
        if reply is None:
            return web.Response()
        if sealed and self._secrets.key is not None:
            body = wire.dumps(self._secrets.key.seal(reply.envelope, reply.header, reply.body))
        else:
            body = wire.enclose(reply.envelope, reply.body)
        return web.Response(body=body, content_type="application/json")
