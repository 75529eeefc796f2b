"""What a gateway is given when it enrols: who it is, whose keys it trusts, and whom it pays.

The shape both programs share. It holds one secret (the token key of the epoch), so a gateway keeps it
in a file of mode 0600 and never logs it.
"""

from __future__ import annotations

import base64
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError

from pos_gateway.errors import InvalidMessage

ENROLMENT_SECRET_BYTES: Final = 10
_FINGERPRINT_BYTES: Final = 32


def compose_code(secret: bytes, fingerprint: bytes) -> str:
    """The one-time code a merchant types in: base32 of secret ‖ SHA-256 of the ledger's TLS
    certificate, in groups of four. It carries the pin, so the first contact needs no trust."""
    text = base64.b32encode(secret + fingerprint).decode().rstrip("=")
    return "-".join(text[i : i + 4] for i in range(0, len(text), 4))


def parse_code(text: str) -> tuple[bytes, bytes]:
    """Secret and certificate fingerprint of an enrolment code; case, blanks and dashes do not matter.

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


class EnrolmentRequest(_Shape):
    code: str = Field(max_length=128, repr=False)
    public_key: Base64 = Field(description="the gateway's Ed25519 public key, 32 bytes")


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
