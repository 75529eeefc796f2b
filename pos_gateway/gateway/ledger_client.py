"""The gateway's side of the ledger's HTTP API, over mutual TLS under the authority it enrolled with."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self
from uuid import UUID

import aiohttp
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from pos_gateway.enrolment import CertificateAnswer, CertificateRequest, Enrolment, EnrolmentRequest
from pos_gateway.errors import (
    AuthenticationFailed,
    CertificateLapsed,
    Conflict,
    InvalidConfiguration,
    InvalidMessage,
    LedgerUnreachable,
    NotFound,
    PosGatewayError,
)
from pos_gateway.gateway.fetcher import HttpsRepository, authority_context
from pos_gateway.inquiry import Inquiry, OnlineAnswer
from pos_gateway.records import Complete, Record, Verdict, parse_object, presentment_body, sign_batch

_MAX_ANSWER_BYTES: Final = 1024 * 1024
_MAX_REASON_CHARACTERS: Final = 300
_CERTIFICATE_HAS_EXPIRED: Final = 10  # X509_V_ERR_CERT_HAS_EXPIRED
_TIMEOUT: Final = aiohttp.ClientTimeout(total=60, sock_connect=5, sock_read=30)


@dataclass(frozen=True, slots=True)
class Answer:
    """The ledger's verdict on one presented record."""

    record_id: UUID
    verdict: Verdict
    reason: str


class _Shown(Protocol):
    """What a client shows of itself: see `certificate.TlsIdentity`."""

    def load_into(self, context: ssl.SSLContext) -> None: ...


class Answers(list[Answer]):
    """One answer per presented record, in order. `epoch` is that of the ledger's database, empty if it did
    not say."""

    epoch: str = ""


@dataclass(frozen=True, slots=True)
class Greeting:
    """A ledger that is there: its clock, and the epoch of its database, empty if it did not say."""

    time_unix_ms: int
    epoch: str


class LedgerClient:
    """Speaks to one ledger. Use inside one event loop, as an async context manager or with `close`.

    Every call raises, beside what it names itself:
        LedgerUnreachable: the line is down, too slow, or what answers is not the enrolled ledger.
        InvalidMessage: the ledger's answer, or its opinion of our request, is that it cannot be read.
        CertificateLapsed: our certificate has expired or was replaced; `lapsed` is set then.
    """

    def __init__(self, url: str, authority: bytes, identity: _Shown | None = None) -> None:
        """`authority`: the certificate (DER) under which the ledger answers. Without `identity` only what
        is open to anybody can be asked.

        Raises:
            InvalidConfiguration: not an https address, no certificate, or one that cannot be used.
        """
        if not url.startswith("https://"):
            raise InvalidConfiguration("must begin with https://", where="ledger address")
        self._authority = authority
        self._identity = identity
        self._url = url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None
        self._context = self._new_context()
        self.lapsed = asyncio.Event()
        """Set whenever the ledger says that our certificate counts no more."""

    def reload(self) -> None:
        """Show the certificate that is there now, on connections from now on.

        Raises:
            InvalidConfiguration: it cannot be used.
        """
        self._context = self._new_context()

    def _new_context(self) -> ssl.SSLContext:
        context = authority_context(self._authority)
        if self._identity is not None:
            self._identity.load_into(context)
        return context

    async def enrol(self, request: EnrolmentRequest) -> Enrolment:
        """Trade a one-time code for an enrolment.

        Raises:
            AuthenticationFailed: the ledger does not know the code (any more).
        """
        body = request.model_dump_json().encode()
        return Enrolment.parse(await self._exchange("POST", "/v1/enrolments", body))

    async def certify(self, request: CertificateRequest) -> bytes:
        """Ask for the next certificate, X.509, DER. It is not verified here.

        Raises:
            AuthenticationFailed: this gateway gets none: unknown, revoked, or away for too long.
        """
        answer = await self._exchange("POST", "/v1/certificates", request.model_dump_json().encode())
        try:
            return CertificateAnswer.model_validate_json(answer).certificate
        except ValidationError:
            raise InvalidMessage("no certificate", where="ledger's answer") from None

    async def standing(self, gateway_id: str) -> str:
        """How the ledger sees this gateway: `active` or `suspended`. Shows it our certificate.

        Raises:
            AuthenticationFailed: it does not let us in: revoked, or not our certificate.
        """
        return _text(_object(await self._exchange("GET", f"/v1/gateways/{gateway_id}")).get("status"))

    async def ledger_time_unix_ms(self) -> int:
        """Is it there, and what time does it have?"""
        return (await self.greet()).time_unix_ms

    async def greet(self) -> Greeting:
        """Is it there, what time does it have, and which epoch?"""
        answer = _object(await self._exchange("GET", "/v1/health"))
        return Greeting(_integer(answer, "time_unix_ms"), _text(answer.get("epoch")))

    @property
    def repository(self) -> HttpsRepository:
        """The issuer's repository on the same server. It blocks: use it in a thread."""
        return HttpsRepository(self._url, self._authority)

    async def present(
        self,
        gateway_id: str,
        records: Sequence[Record],
        signer: Ed25519PrivateKey,
        complete: Complete | None = None,
    ) -> Answers:
        """Present a batch; one answer per record, in its order. Presenting it again is harmless.

        Raises:
            AuthenticationFailed: the ledger does not accept this gateway's signature.
            InvalidMessage: the verdicts are not exactly those of the batch.
        """
        body = presentment_body(gateway_id, records, complete)
        answer = _object(await self._signed("/v1/presentments", gateway_id, body, signer))
        verdicts = answer.get("verdicts")
        if not isinstance(verdicts, list):
            raise InvalidMessage("no list", where="ledger's answer, field verdicts")
        answers = Answers(_answer(raw) for raw in verdicts)
        answers.epoch = _text(answer.get("epoch"))
        if [answer.record_id for answer in answers] != [record.id for record in records]:
            raise InvalidMessage("verdicts of other records than were presented", where="ledger's answer")
        return answers

    async def ask_grant(self, inquiry: Inquiry, signer: Ed25519PrivateKey) -> OnlineAnswer:
        """Ask the issuer of a card that gave an ARQC. The same inquiry again gets the same answer.

        Raises:
            AuthenticationFailed: the ledger does not accept this gateway, or the card's proof.
            Conflict: it knows this sale with other content.
        """
        data = await self._signed("/v1/grants", inquiry.gateway_id, inquiry.to_body(), signer)
        return OnlineAnswer.from_json(data)

    async def ask_note(self, inquiry: Inquiry, signer: Ed25519PrivateKey) -> OnlineAnswer:
        """A note for a card that gave a TC or ARQC here; raises as `ask_grant`."""
        data = await self._signed("/v1/notes", inquiry.gateway_id, inquiry.to_body(), signer)
        return OnlineAnswer.from_json(data)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _signed(self, path: str, gateway_id: str, body: bytes, signer: Ed25519PrivateKey) -> bytes:
        headers = {
            "Pos-Gateway-Id": gateway_id,
            "Pos-Gateway-Signature": base64.b64encode(sign_batch(body, signer)).decode(),
        }
        return await self._exchange("POST", path, body, headers)

    async def _exchange(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        context = self._context
        try:
            return await self._once(method, path, body, headers)
        except CertificateLapsed:
            if self._context is context:
                self.lapsed.set()
                raise
        # It was replaced while this request was under way.
        return await self._once(method, path, body, headers)

    async def _once(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str] | None
    ) -> bytes:
        async with self._answer(method, path, body, headers) as answer:
            return await _read(answer)

    @asynccontextmanager
    async def _answer(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer of one request, its status seen to; every failure of the line in one exception."""
        if self._session is None:
            self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        try:
            async with self._session.request(
                method,
                self._url + path,
                data=body,
                headers={"Content-Type": "application/json", **(headers or {})},
                ssl=self._context,
                timeout=_TIMEOUT,
                allow_redirects=False,
            ) as answer:
                if not 200 <= answer.status < 300:
                    raise _refusal(answer.status, await _read(answer))
                yield answer
        except aiohttp.ClientConnectorCertificateError as error:
            raise _not_the_ledger(self._url, error.certificate_error) from None
        except aiohttp.InvalidURL:
            raise InvalidConfiguration("not an address", where="ledger address") from None
        except TimeoutError:
            raise LedgerUnreachable(
                "the ledger did not answer in time", advice="payments go on; it is tried again"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise LedgerUnreachable(
                f"no line to the ledger at {self._url} ({type(error).__name__})",
                advice="payments go on; it is tried again",
            ) from None


async def fetch_authority(url: str, fingerprint: bytes) -> bytes:
    """The certificate (DER) of the authority that an enrolment code pins. Whoever answers is asked for it,
    trusted or not: what counts is that its SHA-256 is the one in the code.

    Raises:
        LedgerUnreachable: no line, or what answers is not the ledger of this code.
        InvalidConfiguration: not an https address.
    """
    if not url.startswith("https://"):
        raise InvalidConfiguration("must begin with https://", where="ledger address")
    try:
        async with (
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), timeout=_TIMEOUT) as session,
            session.get(f"{url.rstrip('/')}/v1/authority", ssl=False, allow_redirects=False) as answer,
        ):
            authority = await _read(answer)
    except aiohttp.InvalidURL:
        raise InvalidConfiguration("not an address", where="ledger address") from None
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise LedgerUnreachable(
            f"no line to the ledger at {url} ({type(error).__name__})", advice="check address and network"
        ) from None
    if not hmac.compare_digest(hashlib.sha256(authority).digest(), fingerprint):
        raise LedgerUnreachable(
            f"what answers at {url} is not the ledger that gave out this code",
            advice="check the address, and copy the code whole",
        )
    return authority


def _not_the_ledger(url: str, error: Exception) -> LedgerUnreachable:
    code = getattr(error, "verify_code", 0)
    if code == _CERTIFICATE_HAS_EXPIRED:
        return LedgerUnreachable(
            f"by this clock the certificate of the ledger at {url} has expired",
            advice="check this machine's clock; if it is right, tell the issuer",
        )
    return LedgerUnreachable(
        f"what answers at {url} is not the ledger this gateway enrolled with",
        advice="check the address; if the ledger was made anew, enrol again",
    )


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    async for piece in answer.content.iter_any():
        data += piece
        if len(data) > _MAX_ANSWER_BYTES:
            raise InvalidMessage(f"over {_MAX_ANSWER_BYTES} bytes", where="ledger's answer")
    return bytes(data)


def _refusal(status: int, data: bytes) -> PosGatewayError:
    """The exception for an answer that is no success, with what the ledger says about it."""
    reason, advice, code = f"the ledger answered {status}", "", ""
    try:
        error = parse_object(data, where="ledger's answer").get("error")
    except InvalidMessage:
        error = None
    if isinstance(error, dict):
        reason = _text(error.get("reason")) or reason
        advice = _text(error.get("advice"))
        code = _text(error.get("code"))
    match status:
        case 401 if code == "certificate_lapsed":
            return CertificateLapsed(reason, step="ledger", advice=advice)
        case 401 | 403:
            return AuthenticationFailed(reason, step="ledger", advice=advice)
        case 404:
            return NotFound(reason, advice=advice)
        case 409:
            return Conflict(reason, advice=advice)
        case 400 | 410 | 413 | 415 | 422:
            return InvalidMessage(f"the ledger refused: {reason}", advice=advice)
        case _:
            return LedgerUnreachable(reason, advice=advice or "payments go on; it is tried again")


def _object(data: bytes) -> dict[str, Any]:
    return parse_object(data, where="ledger's answer")


def _integer(answer: Mapping[str, Any], name: str) -> int:
    value = answer.get(name)
    if type(value) is not int or value < 0:
        raise InvalidMessage("not a whole number", where=f"ledger's answer, field {name}")
    return value


def _answer(raw: object) -> Answer:
    try:
        if not isinstance(raw, dict):
            raise TypeError
        return Answer(UUID(raw["id"]), Verdict(raw["verdict"]), _text(raw.get("reason")))
    except (KeyError, ValueError, TypeError, AttributeError):
        raise InvalidMessage("a verdict cannot be read", where="ledger's answer") from None


def _text(value: object) -> str:
    if not isinstance(value, str):
        return ""
    return "".join(character for character in value if character.isprintable())[:_MAX_REASON_CHARACTERS]
