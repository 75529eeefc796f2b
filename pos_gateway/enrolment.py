"""What a gateway is given when it enrols: who it is, whose keys it trusts, and whom it pays; and how it
asks for the certificate by which it is let in.

The shapes both programs share. An enrolment holds one secret (the token key of the epoch), so a gateway
keeps it in a file of mode 0600 and never logs it.

A gateway has two keys. Its Ed25519 **device key**, for life, signs what it journals and asks for. Its
P-256 **TLS key** is new with every certificate, and the certificate names the gateway:

    request   = PKCS #10, signed by the TLS key (the subject in it does not matter)
    signature = Ed25519("pos-gateway certificate request 1\\0" ‖ SHA-256(who asks) ‖ request)

where who asks is the enrolment code, or later the gateway id.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Annotated, Final, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    field_validator,
)

from pos_gateway.errors import AuthenticationFailed, InvalidMessage

ENROLMENT_SECRET_BYTES: Final = 10
MAX_REQUEST_BYTES: Final = 1024
"""Of a certificate request (PKCS #10, DER); one with a P-256 key has about 200."""

_FINGERPRINT_BYTES: Final = 32
_MAX_REQUEST_CHARACTERS: Final = MAX_REQUEST_BYTES * 4 // 3 + 4
_REQUEST_DOMAIN: Final = b"pos-gateway certificate request 1\0"


def compose_code(secret: bytes, fingerprint: bytes) -> str:
    """The one-time code a merchant types in: base32 of secret ‖ SHA-256 of the ledger's
    authority certificate (DER), in groups of four. It carries the pin, so the first contact needs no
    trust."""
    text = base64.b32encode(secret + fingerprint).decode().rstrip("=")
    return "-".join(text[i : i + 4] for i in range(0, len(text), 4))


def parse_code(text: str) -> tuple[bytes, bytes]:
    """Secret and authority fingerprint of an enrolment code; case, blanks and dashes do not matter.

    Raises:
        InvalidMessage: not an enrolment code (the code itself is never quoted).
    """
    letters = "".join(text.split()).replace("-", "").upper()
    try:
        data = base64.b32decode(letters + "=" * (-len(letters) % 8))
    except ValueError:
        data = b""
    if len(data) != ENROLMENT_SECRET_BYTES + _FINGERPRINT_BYTES:
        raise InvalidMessage(
            "not an enrolment code", advice="copy it whole from `pos-gateway ledger gateway invite`"
        )
    return data[:ENROLMENT_SECRET_BYTES], data[ENROLMENT_SECRET_BYTES:]


def _to_bytes(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return base64.b64decode(value, validate=True)
    raise ValueError("expected base64 text")


Base64 = Annotated[
    bytes, PlainValidator(_to_bytes), PlainSerializer(lambda b: base64.b64encode(b).decode(), str, "json")
]
"""Bytes that stand in JSON as base64 text."""


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CaKey(_Shape):
    """A certification authority public key (CAPK; EMV 4.3 Book 2 §5.2)."""

    rid: Base64
    index: int = Field(ge=0, le=255)
    modulus: Base64
    exponent: int
    expires: str | None = None


class Merchant(_Shape):
    id: str = Field(max_length=15)
    name: str
    category: str = Field(pattern=r"^\d{4}$")


class _Request(_Shape):
    """Asks for a certificate. The two signatures say that both keys are in the asking hands."""

    request: Base64 = Field(description="PKCS #10, DER", repr=False)
    signature: Base64 = Field(description="by the device key", repr=False)

    @field_validator("request", "signature", mode="before")
    @classmethod
    def _bounded(cls, value: object) -> object:
        if isinstance(value, (str, bytes)) and len(value) > _MAX_REQUEST_CHARACTERS:
            raise ValueError(f"over {MAX_REQUEST_BYTES} bytes")
        return value


class EnrolmentRequest(_Request):
    code: str = Field(max_length=128, repr=False)
    public_key: Base64 = Field(description="the gateway's Ed25519 public key, 32 bytes")

    @classmethod
    def make(
        cls, code: str, device_key: Ed25519PrivateKey, tls_key: ec.EllipticCurvePrivateKey | None = None
    ) -> Self:
        """`tls_key`: what the certificate is for; without one nobody can use the certificate."""
        request = make_request(tls_key or ec.generate_private_key(ec.SECP256R1()))
        return cls(
            code=code,
            public_key=device_key.public_key().public_bytes_raw(),
            request=request,
            signature=device_key.sign(_signed(code, request)),
        )

    def verify(self) -> None:
        """
        Raises:
            InvalidMessage: the public key is not one.
            AuthenticationFailed: step `device signature`.
        """
        try:
            key = Ed25519PublicKey.from_public_bytes(self.public_key)
        except ValueError:
            raise InvalidMessage("not an Ed25519 public key of 32 bytes", where="public_key") from None
        _verify(key, self.signature, self.code, self.request)


class CertificateRequest(_Request):
    """Asks for the next certificate of an enrolled gateway."""

    gateway_id: str = Field(max_length=32)

    @classmethod
    def make(
        cls, gateway_id: str, device_key: Ed25519PrivateKey, tls_key: ec.EllipticCurvePrivateKey
    ) -> Self:
        request = make_request(tls_key)
        signature = device_key.sign(_signed(gateway_id, request))
        return cls(gateway_id=gateway_id, request=request, signature=signature)

    def verify(self, device_key: Ed25519PublicKey) -> None:
        """
        Raises:
            AuthenticationFailed: step `device signature`.
        """
        _verify(device_key, self.signature, self.gateway_id, self.request)


class CertificateAnswer(_Shape):
    certificate: Base64 = Field(description="X.509, DER")


def make_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A certificate request for this key, PKCS #10, DER."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def read_request(data: bytes) -> ec.EllipticCurvePublicKey:
    """The key that a certificate request asks for; whatever else it asks for is passed over.

    Raises:
        InvalidMessage: too large, not PKCS #10, another kind of key, or not signed by that key.
    """
    if len(data) > MAX_REQUEST_BYTES:
        raise InvalidMessage(f"over {MAX_REQUEST_BYTES} bytes", where="certificate request")
    try:
        request = x509.load_der_x509_csr(data)
        key = request.public_key()
        signed = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm):
        raise InvalidMessage("not PKCS #10", where="certificate request") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidMessage("its key is not on the curve P-256", where="certificate request")
    if not signed:
        raise InvalidMessage("not signed by its own key", where="certificate request")
    return key


def _signed(asking: str, request: bytes) -> bytes:
    return _REQUEST_DOMAIN + hashlib.sha256(asking.encode()).digest() + request


def _verify(key: Ed25519PublicKey, signature: bytes, asking: str, request: bytes) -> None:
    try:
        key.verify(signature, _signed(asking, request))
    except InvalidSignature:
        raise AuthenticationFailed("not by this gateway's key", step="device signature") from None


class Enrolment(_Shape):
    """The ledger's answer to an enrolment."""

    gateway_id: str
    terminal_id: str = Field(max_length=8)
    merchant: Merchant
    issuer: str
    currency: str
    country_numeric: int
    enrolled_unix_s: int = Field(ge=0, description="the ledger's time; no clock can be right before it")
    trusted_root: Base64 = Field(
        description="TUF root metadata: whose signatures count, on limits and on the repository"
    )
    token_key_epoch: int
    token_key_secret: Base64 = Field(repr=False)
    ca_keys: tuple[CaKey, ...]
    sealing_key: Base64 = Field(description="the ledger's X25519 public key for proofs")
    authority: Base64 = Field(
        description="X.509, DER: who certifies the ledger's server and its gateways; what the code pinned"
    )
    certificate: Base64 = Field(description="X.509, DER: this gateway's first; later ones lie elsewhere")

    @classmethod
    def parse(cls, text: str | bytes) -> Enrolment:
        """
        Raises:
            InvalidMessage: names the first field that is wrong, never its value.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InvalidMessage(first["msg"], where=f"enrolment field {place or 'root'}") from None
