"""The ledger's HTTP API, over mutual TLS under the authority that enrolment codes pin.

Open to anybody:

    GET  /v1/health                  → {"status", "time_unix_ms", "epoch"}
    GET  /v1/authority               the authority's certificate, X.509, DER: what an enrolment code pins
    POST /v1/enrolments              EnrolmentRequest → Enrolment; by the one-time code
    POST /v1/certificates            CertificateRequest → CertificateAnswer; by the device key's signature, so
                                     that a gateway whose certificate has expired can come back
    GET  /v1/tuf/metadata/{name}     the TUF repository, static files that any web server may hold as well
    GET  /v1/tuf/targets/{name}      the same; Range is understood

Only with a client certificate of the very gateway that the request names, looked up at every request:

    GET  /v1/gateways/{id}           → {"gateway_id", "status", "certificate_until_unix_ms"}
    POST /v1/presentments            a signed batch → {"epoch", "verdicts": [{"id", "verdict", "reason"}, …]}
    POST /v1/grants                  a signed inquiry with an ARQC → {"grant", "note", "refused", …}
    POST /v1/notes                   a signed inquiry with a TC or ARQC → {"note", "refused", …}

A phone's wallet has no certificate; its card's cryptogram over a challenge speaks for it:

    POST /v1/wallet/challenges       → {"challenge"}: what the card must sign
    POST /v1/wallet/notes            its ARQC over one → {"note", "limit", "refused", …}
    POST /v1/wallet/returns          its TC over one → {"refused", …}

`epoch` changes when the ledger was restored from a backup: present again what was acknowledged since.

Every error is `{"error": {"code", "reason", "advice"}}`. No log line holds a body, a code or a key.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import gc
import os
import ssl
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeVar

import structlog
from aiohttp import web
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import BaseModel, ValidationError

from pos_gateway.enrolment import CertificateAnswer, CertificateRequest, EnrolmentRequest
from pos_gateway.errors import (
    AuthenticationFailed,
    CertificateLapsed,
    Conflict,
    InvalidInput,
    InvalidMessage,
    NotFound,
    OutcomeUnknown,
    PosGatewayError,
    Unavailable,
)
from pos_gateway.inquiry import MAX_INQUIRY_BYTES
from pos_gateway.ledger.gateways import Gateway
from pos_gateway.ledger.ledger import Ledger
from pos_gateway.records import MAX_BATCH_RECORDS, MAX_BODY_BYTES, MAX_PROOF_BYTES

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8440

MAX_BATCH_BYTES: Final = MAX_BATCH_RECORDS * (MAX_BODY_BYTES + MAX_PROOF_BYTES) * 4 // 3
_MAX_REQUEST_BYTES: Final = 4096
_MAX_BATCHES_AT_ONCE: Final = 4
_BODY_TIMEOUT_S: Final = 60.0
_SHUTDOWN_S: Final = 10.0
_RENEWAL_S: Final = 3600.0
_RELOAD_S: Final = 30.0
_NO_CHECK_TIME: Final = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which `ssl` does not name."""
_LINGERING_S: Final = 1.0  # for a client that goes on sending after it was refused

_COLLECTION_THRESHOLDS: Final = (50_000, 20, 20)

_FAILED_ENROLMENTS: Final = 10
_FAILED_ENROLMENTS_WINDOW_S: Final = 60.0
_REMOTES_REMEMBERED: Final = 1024

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_log = structlog.get_logger("pos_gateway.ledger.api")

_Shape = TypeVar("_Shape", bound=BaseModel)

_STATUS: Final[tuple[tuple[type[PosGatewayError], int, str], ...]] = (
    (CertificateLapsed, 401, "certificate_lapsed"),
    (AuthenticationFailed, 401, "not_authenticated"),
    (InvalidInput, 400, "invalid_message"),
    (Conflict, 409, "conflict"),
    (NotFound, 404, "not_found"),
    (Unavailable, 503, "unavailable"),
    (OutcomeUnknown, 500, "outcome_unknown"),
)


class FailedAttempts:
    """How often each remote address failed to enrol lately. Times in seconds of any steady clock."""

    def __init__(self) -> None:
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def too_many(self, remote: str, now_s: float) -> bool:
        times = self._times.get(remote)
        while times and times[0] <= now_s - _FAILED_ENROLMENTS_WINDOW_S:
            times.popleft()
        return times is not None and len(times) >= _FAILED_ENROLMENTS

    def add(self, remote: str, now_s: float) -> None:
        self._times.setdefault(remote, deque(maxlen=_FAILED_ENROLMENTS)).append(now_s)
        self._times.move_to_end(remote)
        if len(self._times) > _REMOTES_REMEMBERED:
            self._times.popitem(last=False)


_LEDGER: Final = web.AppKey("ledger", Ledger)
_ATTEMPTS: Final = web.AppKey("attempts", FailedAttempts)
_URGENT: Final = web.AppKey("urgent", asyncio.Event)
_BATCHES: Final = web.AppKey("batches", asyncio.Semaphore)


def build_app(ledger: Ledger) -> web.Application:
    """The API of one open ledger; the caller closes the ledger."""
    app = web.Application(client_max_size=MAX_BATCH_BYTES, middlewares=[_errors_as_json])
    app[_LEDGER] = ledger
    app[_ATTEMPTS] = FailedAttempts()
    app[_BATCHES] = asyncio.Semaphore(_MAX_BATCHES_AT_ONCE)
    app[_URGENT] = asyncio.Event()
    app.add_routes(
        [
            web.get("/v1/authority", _authority),
            web.post("/v1/enrolments", _enrol),
            web.post("/v1/certificates", _certify),
            web.get(
                r"/v1/tuf/{kind:metadata|targets}/{name:[0-9A-Za-z][0-9A-Za-z._-]{0,127}}", _repository_file
            ),
            web.get("/v1/gateways/{id}", _standing),
            web.post("/v1/presentments", _present),
            web.post("/v1/grants", _grant),
            web.post("/v1/notes", _note),
            web.post("/v1/wallet/challenges", _wallet_challenge),
            web.post("/v1/wallet/notes", _wallet_note),
            web.post("/v1/wallet/returns", _wallet_return),
            web.get("/v1/health", _health),
        ]
    )
    return app


async def serve(
    ledger: Ledger,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    *,
    on_ready: Callable[[int], object] = lambda _port: None,
) -> None:
    """Serve until cancelled, then finish what is under way. Port 0 takes any free one; `on_ready` is
    told which.

    Raises:
        Unavailable: the address is not to be had.
    """
    collect_seldom()
    await asyncio.to_thread(ledger.renew_tls)
    loaded, context = _stamp(ledger), _tls(ledger)
    app = build_app(ledger)
    keeping = [
        asyncio.create_task(_renew_metadata(ledger), name="metadata"),
        asyncio.create_task(_reload_tls(ledger, context, loaded), name="certificate"),
        asyncio.create_task(_take_back(ledger, app[_URGENT]), name="taking back"),
    ]
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN_S, lingering_time=_LINGERING_S)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, ssl_context=context)
        try:
            await site.start()
        except OSError as error:
            raise Unavailable(
                f"cannot listen on {host}:{port} ({error.strerror})", advice="choose another port"
            ) from None
        bound_port = int(runner.addresses[0][1])
        _log.info("serving", host=host, port=bound_port)
        on_ready(bound_port)
        await asyncio.Event().wait()
    finally:
        for task in keeping:
            task.cancel()
        await runner.cleanup()
        _log.info("stopped")


def collect_seldom() -> None:
    """A batch makes tens of thousands of objects that live until it is settled: looking for cycles among
    them every few hundred would take a tenth of the time that posting takes."""
    gc.freeze()
    gc.set_threshold(*_COLLECTION_THRESHOLDS)


async def _renew_metadata(ledger: Ledger) -> None:
    """Tell the shops every hour that the newest limits are still the newest: see `Repository.renew`."""
    while True:
        try:
            await asyncio.to_thread(ledger.ceremony.renew)
        except (PosGatewayError, OSError) as error:
            _log.error("metadata not renewed", reason=str(error))
        await asyncio.sleep(_RENEWAL_S)


async def _take_back(ledger: Ledger, urgent: asyncio.Event) -> None:
    """Tell the shops at once of tokens that must not pay any more: clones that were proven."""
    while True:
        try:
            published = await asyncio.to_thread(ledger.publish_urgent)
        except (PosGatewayError, OSError) as error:
            _log.error("blocked tokens not told to the shops yet", reason=str(error))
        else:
            if published is not None:
                _log.warning("blocked tokens told to the shops", version=published.version)
        await urgent.wait()
        urgent.clear()


def _tls(ledger: Ledger) -> ssl.SSLContext:
    """Clients may come without a certificate; one that they do show must be of our authority and good for
    clients. Whether it has expired is asked at every request, so that the answer can say what to do."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_OPTIONAL
    context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
    context.load_verify_locations(cadata=ledger.keys.authority.certificate.public_bytes(Encoding.DER))
    context.load_cert_chain(ledger.keys.tls)
    return context


def _stamp(ledger: Ledger) -> tuple[int, int]:
    status = os.stat(ledger.keys.tls)
    return status.st_ino, status.st_mtime_ns


async def _reload_tls(ledger: Ledger, context: ssl.SSLContext, loaded: tuple[int, int]) -> None:
    """Renew the server's certificate in time; take up what another replica or a person has renewed."""
    while True:
        await asyncio.sleep(_RELOAD_S)
        try:
            await asyncio.to_thread(ledger.renew_tls)
            if (found := _stamp(ledger)) != loaded:
                context.load_cert_chain(ledger.keys.tls)
                loaded = found
                _log.info("certificate taken up")
        except (PosGatewayError, OSError) as error:
            _log.error("certificate not renewed", reason=str(error))


async def _client(request: web.Request, gateway_id: str) -> Gateway:
    """The gateway whose certificate came with the connection, if it is the one that the request names.

    Raises:
        AuthenticationFailed, CertificateLapsed: no certificate, another gateway's, or one not let in.
    """
    tls = request.transport.get_extra_info("ssl_object") if request.transport else None
    certificate = tls.getpeercert(binary_form=True) if tls else None
    if not certificate:
        raise AuthenticationFailed(
            "none was shown", step="client certificate", advice="enrol; see docs/operating.md"
        )
    gateway = await asyncio.to_thread(request.app[_LEDGER].admit, certificate)
    if gateway.id != gateway_id:
        raise AuthenticationFailed("another gateway's", step="client certificate")
    return gateway


async def _authority(request: web.Request) -> web.Response:
    certificate = request.app[_LEDGER].keys.authority.certificate
    return web.Response(body=certificate.public_bytes(Encoding.DER), content_type="application/pkix-cert")


async def _enrol(request: web.Request) -> web.Response:
    async with _guarded(request):
        asked = await _shape(request, EnrolmentRequest)
        enrolment = await asyncio.to_thread(request.app[_LEDGER].enrol, asked)
    _log.info("enrolled", gateway_id=enrolment.gateway_id, merchant_id=enrolment.merchant.id)
    return web.Response(text=enrolment.model_dump_json(), content_type="application/json")


async def _certify(request: web.Request) -> web.Response:
    async with _guarded(request):
        asked = await _shape(request, CertificateRequest)
        certificate = await asyncio.to_thread(request.app[_LEDGER].certify, asked)
    _log.info("certified", gateway_id=asked.gateway_id)
    answer = CertificateAnswer(certificate=certificate)
    return web.Response(text=answer.model_dump_json(), content_type="application/json")


@contextlib.asynccontextmanager
async def _guarded(request: web.Request) -> AsyncIterator[None]:
    """What anybody may try, nobody may try for long."""
    attempts, remote = request.app[_ATTEMPTS], request.remote or ""
    now_s = asyncio.get_running_loop().time()
    if attempts.too_many(remote, now_s):
        raise _TooMany
    try:
        yield
    except (AuthenticationFailed, InvalidMessage, Conflict):
        attempts.add(remote, now_s)
        raise


class _TooMany(Exception):
    """Too many failed attempts from one address."""


async def _shape(request: web.Request, shape: type[_Shape]) -> _Shape:
    if request.content_length is None:
        raise web.HTTPLengthRequired
    if request.content_length > _MAX_REQUEST_BYTES:
        raise web.HTTPRequestEntityTooLarge(_MAX_REQUEST_BYTES, request.content_length)
    try:
        return shape.model_validate_json(await _body(request))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidMessage(first["msg"], where=f"request field {place or 'root'}") from None


async def _repository_file(request: web.Request) -> web.StreamResponse:
    folder = request.app[_LEDGER].repository.folder / request.match_info["kind"]
    path = folder / request.match_info["name"]
    if not await asyncio.to_thread(path.is_file):
        # Every gateway asks for the next root until there is one: that is no news for the log.
        return _error(404, "not_found", "there is no such file in the repository")
    return web.FileResponse(path, headers={"Content-Type": "application/octet-stream"})


async def _standing(request: web.Request) -> web.Response:
    gateway = await _client(request, request.match_info["id"])
    return web.json_response(
        {
            "gateway_id": gateway.id,
            "status": gateway.status.value,
            "certificate_until_unix_ms": gateway.certificate_until_unix_ms,
        }
    )


async def _present(request: web.Request) -> web.Response:
    gateway_id, signature = _signed_by(request)
    ledger = request.app[_LEDGER]
    await _client(request, gateway_id)
    # A batch may be large: only so many are held in memory at a time, and only an enrolled gateway's.
    async with request.app[_BATCHES]:
        body = await _body(request)
        # Not to be cut off half-way by a client that hangs up: what is under way is finished.
        verdicts = await asyncio.shield(asyncio.to_thread(ledger.present, gateway_id, body, signature))
    if any(verdict.proves_clone for verdict in verdicts):
        request.app[_URGENT].set()
    counts: dict[str, int] = {}
    for verdict in verdicts:
        counts[verdict.verdict.value] = counts.get(verdict.verdict.value, 0) + 1
    _log.info("presented", gateway_id=gateway_id, records=len(verdicts), **counts)
    epoch = str(await asyncio.to_thread(lambda: ledger.epoch))
    return web.json_response({"epoch": epoch, "verdicts": [verdict.to_wire() for verdict in verdicts]})


def _signed_by(request: web.Request) -> tuple[str, bytes]:
    """Which gateway says that it sent this, and its signature over the body, still to be verified."""
    gateway_id = request.headers.get("Pos-Gateway-Id", "")
    try:
        signature = base64.b64decode(request.headers.get("Pos-Gateway-Signature", ""), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidMessage("not base64", where="header Pos-Gateway-Signature") from None
    if not gateway_id or not signature:
        raise InvalidMessage("the body is not signed", where="headers Pos-Gateway-Id, Pos-Gateway-Signature")
    return gateway_id, signature


async def _grant(request: web.Request) -> web.Response:
    return await _answer_gateway(request, request.app[_LEDGER].grant)


async def _note(request: web.Request) -> web.Response:
    return await _answer_gateway(request, request.app[_LEDGER].note)


async def _answer_gateway(request: web.Request, answer: Callable[[str, bytes, bytes], str]) -> web.Response:
    gateway_id, signature = _signed_by(request)
    await _client(request, gateway_id)
    body = await _small_body(request)
    text = await asyncio.shield(asyncio.to_thread(answer, gateway_id, body, signature))
    _log.info("answered", path=request.path, gateway_id=gateway_id)
    return web.Response(text=text, content_type="application/json")


async def _wallet_challenge(request: web.Request) -> web.Response:
    return web.json_response({"challenge": request.app[_LEDGER].wallet_challenge()})


async def _wallet_note(request: web.Request) -> web.Response:
    return await _answer_wallet(request, request.app[_LEDGER].wallet_note)


async def _wallet_return(request: web.Request) -> web.Response:
    return await _answer_wallet(request, request.app[_LEDGER].wallet_return)


async def _answer_wallet(request: web.Request, answer: Callable[[bytes], str]) -> web.Response:
    body = await _small_body(request)
    text = await asyncio.shield(asyncio.to_thread(answer, body))
    _log.info("answered", path=request.path)
    return web.Response(text=text, content_type="application/json")


async def _small_body(request: web.Request) -> bytes:
    if request.content_length is None:
        raise web.HTTPLengthRequired
    if request.content_length > MAX_INQUIRY_BYTES:
        raise web.HTTPRequestEntityTooLarge(MAX_INQUIRY_BYTES, request.content_length)
    return await _body(request)


async def _body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout from None


async def _health(request: web.Request) -> web.Response:
    ledger = request.app[_LEDGER]
    epoch = str(await asyncio.to_thread(lambda: ledger.epoch))
    return web.json_response({"status": "ok", "time_unix_ms": ledger.now_unix_ms(), "epoch": epoch})


@web.middleware
async def _errors_as_json(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except PosGatewayError as error:
        status, code = next(
            ((status, code) for kind, status, code in _STATUS if isinstance(error, kind)), (500, "internal")
        )
        log = _log.error if status >= 500 else _log.warning
        log("refused", path=request.path, status=status, code=code, reason=error.reason)
        return _error(status, code, error.reason, error.advice)
    except _TooMany:
        return _error(429, "too_many_attempts", "too many failed attempts", "wait a minute and try again")
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _error(error.status, error.reason.lower().replace(" ", "_"), error.reason)
    except Exception as error:  # noqa: BLE001 - the last line: nothing of ours may reach the client
        # The text of an unforeseen error may quote anything: only its kind and place are logged.
        _log.error("failed", path=request.path, error=type(error).__name__, place=_place(error))
        return _error(500, "internal", "the ledger failed", "try again; the ledger's log says more")


def _place(error: BaseException) -> str:
    trace, place = error.__traceback__, ""
    while trace is not None:
        place = f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _error(status: int, code: str, reason: str, advice: str = "") -> web.Response:
    body: dict[str, Any] = {"error": {"code": code, "reason": reason, "advice": advice}}
    return web.json_response(body, status=status)
