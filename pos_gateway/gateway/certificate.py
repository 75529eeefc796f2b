"""This gateway's client certificate: by which the ledger lets it in, and which it replaces by itself.

The certificate lives for weeks. When a third of its life is left, or when the ledger says that it counts no
more, the gateway makes a new TLS key, asks for a certificate by its device key, and puts both in the old
ones' place in one step. Until the ledger has seen the new one the old one works: a crash at any moment, an
answer lost, a full disk leave one that does.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Protocol

import structlog
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pos_gateway.enrolment import CertificateRequest
from pos_gateway.errors import (
    AuthenticationFailed,
    InvalidConfiguration,
    InvalidMessage,
    OutcomeUnknown,
    PosGatewayError,
)
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.identity import load_enrolment, read_private, write_private
from pos_gateway.gateway.ledger_client import LedgerClient

_LOOK_S: Final = 3600.0
_LEAST_BETWEEN_S: Final = 12 * 3600.0
_FIRST_BACKOFF_S: Final = 5.0
_LONGEST_BACKOFF_S: Final = 900.0

_log = structlog.get_logger(__name__)


class TlsIdentity(Protocol):
    """The TLS key and its certificate, wherever they lie: a file here, a token elsewhere.

    A token makes its key inside (`signers.p256_key`), and has OpenSSL's provider for it load into contexts.
    """

    @property
    def certificate(self) -> x509.Certificate | None:
        """None if there is none yet.

        Raises:
            InvalidConfiguration: it is damaged, or others can read the key.
        """
        ...

    def new_key(self) -> ec.EllipticCurvePrivateKey:
        """A key for the next certificate; the one in use stays in use."""
        ...

    def keep(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        """Take a new key and its certificate into use: durably, both or neither."""
        ...

    def load_into(self, context: ssl.SSLContext) -> None:
        """Show this certificate on connections made from now on."""
        ...


class TlsFile:
    """Key and certificate in one PEM file of mode 0600."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def certificate(self) -> x509.Certificate | None:
        if not self._path.exists():
            return None
        data = read_private(self._path, missing="no certificate")
        try:
            return x509.load_pem_x509_certificate(data)
        except ValueError:
            raise self._damaged() from None

    def new_key(self) -> ec.EllipticCurvePrivateKey:
        return ec.generate_private_key(ec.SECP256R1())

    def keep(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        """
        Raises:
            OutcomeUnknown: the disk failed; the old ones or the new ones are there, and both work.
        """
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        try:
            write_private(self._path, pem + certificate.public_bytes(Encoding.PEM))
        except OSError as error:
            raise OutcomeUnknown(
                f"the new certificate could not be written: {error.strerror}", advice="check the disk"
            ) from None

    def load_into(self, context: ssl.SSLContext) -> None:
        if self.certificate is None:
            return
        try:
            context.load_cert_chain(self._path)
        except (ssl.SSLError, OSError):
            raise self._damaged() from None

    def _damaged(self) -> InvalidConfiguration:
        return InvalidConfiguration(
            "holds no certificate with its key",
            where=str(self._path),
            advice="remove the file: the running gateway asks for a new certificate by its device key",
        )


def check_certificate(
    der: bytes, *, key: ec.EllipticCurvePublicKey, gateway_id: str, authority: bytes
) -> x509.Certificate:
    """What the ledger answered is a certificate for this key and this gateway.

    Raises:
        InvalidMessage: no certificate, or for another key or gateway.
        AuthenticationFailed: step `client certificate`: not by the authority we enrolled with.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        names = [n.value for n in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
        ours = certificate.public_key() == key and names == [gateway_id]
    except ValueError:
        raise InvalidMessage("not a certificate", where="ledger's answer") from None
    if not ours:
        raise InvalidMessage("another's certificate", where="ledger's answer")
    try:
        certificate.verify_directly_issued_by(x509.load_der_x509_certificate(authority))
    except (ValueError, TypeError, InvalidSignature):
        raise AuthenticationFailed("another authority's", step="client certificate") from None
    return certificate


@dataclass(frozen=True, slots=True)
class CertificateState:
    """How the certificate stands, for people."""

    until: datetime | None
    due: datetime | None
    """From when on another is asked for."""
    sentence: str
    well: bool


def describe(certificate: x509.Certificate | None, now: datetime, problem: str = "") -> CertificateState:
    """`problem`: why the last attempt to replace it failed, if it did."""
    if certificate is None:
        sentence = "none yet; the gateway asks for one when it reaches the ledger"
        return CertificateState(None, None, _with(sentence, problem), well=False)
    until, due = certificate.not_valid_after_utc, due_at(certificate)
    if now > until:
        sentence = (
            f"expired on {until:%Y-%m-%d}; the gateway asks for another by itself when it reaches the ledger"
        )
    elif now > due:
        sentence = f"valid until {until:%Y-%m-%d}; another is asked for when the ledger is reached"
    else:
        sentence = f"valid until {until:%Y-%m-%d}; replaced by itself from {due:%Y-%m-%d} on"
    return CertificateState(until, due, _with(sentence, problem), well=now <= until and not problem)


def due_at(certificate: x509.Certificate) -> datetime:
    """From when on, by our own clock, another certificate is asked for: a third of its life is left."""
    until = certificate.not_valid_after_utc
    return until - (until - certificate.not_valid_before_utc) / 3


def connect(home: Home, url: str | None = None) -> LedgerClient:
    """A client of the ledger that the gateway in `home` is enrolled with, with its certificate. `url`:
    another way to it than the one it enrolled by.

    Raises:
        NotFound: not enrolled.
        InvalidConfiguration: a file of its is wrong.
    """
    enrolled = load_enrolment(home.enrolment)
    return LedgerClient(url or enrolled.ledger_url, enrolled.enrolment.authority, TlsFile(home.credentials))


class CertificateKeeper:
    """Keeps one client's certificate fresh (`run`, an asyncio task)."""

    def __init__(
        self,
        client: LedgerClient,
        identity: TlsIdentity,
        *,
        gateway_id: str,
        device_key: Ed25519PrivateKey,
        authority: bytes,
        clock: Callable[[], int],
        rng: random.Random,
        renewed: Callable[[], None] = lambda: None,
    ) -> None:
        """`clock` tells unix milliseconds. `renewed` is called when a new certificate is in use."""
        self._client = client
        self._identity = identity
        self._gateway_id = gateway_id
        self._device_key = device_key
        self._authority = authority
        self._clock = clock
        self._rng = rng
        self._renewed = renewed
        self._problem = ""

    def state(self) -> CertificateState:
        try:
            return describe(self._identity.certificate, self._now(), self._problem)
        except PosGatewayError as error:
            return CertificateState(None, None, f"{error.reason}; {error.advice}", well=False)

    async def run(self) -> None:
        """Until cancelled. Failures are told in `state` and tried again."""
        failures, last_s = 0, float("-inf")
        loop = asyncio.get_running_loop()
        while True:
            due_s, life_s = self._due()
            pause_s = min(_LOOK_S, max(due_s, life_s / 30))
            lapsed = self._client.lapsed.is_set()
            self._client.lapsed.clear()
            # A clock that runs far ahead finds every certificate over: it may not ask again and again.
            if lapsed or (due_s <= 0 and loop.time() - last_s > min(_LEAST_BETWEEN_S, life_s / 3)):
                try:
                    await self.renew()
                except PosGatewayError as error:
                    failures += 1
                    self._problem = error.reason
                    _log.warning("certificate not renewed", reason=error.reason)
                    pause_s = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 16))
                    pause_s *= self._rng.uniform(0.5, 1.0)
                else:
                    failures, last_s, self._problem = 0, loop.time(), ""
                    pause_s = 0.0
                    self._renewed()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._client.lapsed.wait()

    async def renew(self) -> None:
        """Get another certificate, take it into use, and show it to the ledger once: then the old one is
        over.

        Raises:
            PosGatewayError: why not; the certificate in use stays in use.
        """
        key = self._identity.new_key()
        request = CertificateRequest.make(self._gateway_id, self._device_key, key)
        answer = await self._client.certify(request)
        certificate = check_certificate(
            answer, key=key.public_key(), gateway_id=self._gateway_id, authority=self._authority
        )
        await asyncio.to_thread(self._identity.keep, key, certificate)
        self._client.reload()
        _log.info("certificate renewed", until=certificate.not_valid_after_utc.isoformat())
        await self._client.standing(self._gateway_id)

    def _due(self) -> tuple[float, float]:
        """By our own clock: in how many seconds the next certificate is to be asked for, and for how many a
        certificate lives."""
        try:
            certificate = self._identity.certificate
        except PosGatewayError:
            return _LOOK_S, _LOOK_S  # told in `state`: a person must look at the file
        if certificate is None:
            return 0.0, 0.0
        life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        return (due_at(certificate) - self._now()).total_seconds(), life.total_seconds()

    def _now(self) -> datetime:
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=self._clock())


def _with(sentence: str, problem: str) -> str:
    return f"{sentence} (last attempt: {problem})" if problem else sentence
