"""The gateway's side of the ledger's HTTP API, pinned to the one certificate it enrolled with."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Self
from uuid import UUID

import aiohttp
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pos_gateway.enrolment import Enrolment, EnrolmentRequest, parse_code
from pos_gateway.errors import (
    AuthenticationFailed,
    Conflict,
    InvalidConfiguration,
    InvalidMessage,
    LedgerUnreachable,
    NotFound,
    PosGatewayError,
)
from pos_gateway.gateway.fetcher import HttpsRepository
from pos_gateway.inquiry import Inquiry, OnlineAnswer
from pos_gateway.records import Complete, Record, Verdict, parse_object, presentment_body, sign_batch

_MAX_ANSWER_BYTES: Final = 1024 * 1024
_MAX_REASON_CHARACTERS: Final = 300
_TIMEOUT: Final = aiohttp.ClientTimeout(total=60, sock_connect=5, sock_read=30)


@dataclass(frozen=True, slots=True)
class Answer:
    """The ledger's verdict on one presented record."""

    record_id: UUID
    verdict: Verdict
    reason: str


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
    """

    def __init__(self, url: str, certificate_fingerprint: bytes) -> None:
        """
        Raises:
            InvalidConfiguration: not an https address, or no SHA-256 fingerprint.
        """
        if not url.startswith("https://"):
            raise InvalidConfiguration("must begin with https://", where="ledger address")
        try:
            self._pin = aiohttp.Fingerprint(certificate_fingerprint)
        except ValueError:
            raise InvalidConfiguration("not a SHA-256 fingerprint", where="ledger certificate") from None
        self._fingerprint = certificate_fingerprint
        self._url = url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None

    async def enrol(self, code: str, public_key: Ed25519PublicKey) -> Enrolment:
        """Trade a one-time code for an enrolment.

        Raises:
            AuthenticationFailed: the ledger does not know the code (any more).
        """
        request = EnrolmentRequest(code=code, public_key=public_key.public_bytes_raw())
        body = request.model_dump_json().encode()
        return Enrolment.parse(await self._exchange("POST", "/v1/enrolments", body))

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
        return HttpsRepository(self._url, self._fingerprint)

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
                ssl=self._pin,
                timeout=_TIMEOUT,
                allow_redirects=False,
            ) as answer:
                if not 200 <= answer.status < 300:
                    raise _refusal(answer.status, await _read(answer))
                yield answer
        except aiohttp.ServerFingerprintMismatch:
            raise LedgerUnreachable(
                f"what answers at {self._url} is not the ledger this gateway enrolled with",
                advice="check the address; if the ledger has a new certificate, enrol again",
            ) from None
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


def fingerprint_of_code(code: str) -> bytes:
    """The certificate fingerprint an enrolment code pins: what to make the first client with.

    Raises:
        InvalidMessage: not an enrolment code.
    """
    return parse_code(code)[1]


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    async for piece in answer.content.iter_any():
        data += piece
        if len(data) > _MAX_ANSWER_BYTES:
            raise InvalidMessage(f"over {_MAX_ANSWER_BYTES} bytes", where="ledger's answer")
    return bytes(data)


def _refusal(status: int, data: bytes) -> PosGatewayError:
    """The exception for an answer that is no success, with what the ledger says about it."""
    reason, advice = f"the ledger answered {status}", ""
    try:
        error = parse_object(data, where="ledger's answer").get("error")
    except InvalidMessage:
        error = None
    if isinstance(error, dict):
        reason = _text(error.get("reason")) or reason
        advice = _text(error.get("advice"))
    match status:
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
