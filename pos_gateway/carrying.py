"""What a stick carries between a gateway without a line and its ledger, and how each side knows it.

    FOLDER/pos-gateway/to-ledger/GATEWAY/    signed batches, as they would have gone over the line
    FOLDER/pos-gateway/to-gateway/GATEWAY/   the ledger's letters: what became of each record, signed
    FOLDER/pos-gateway/limits/               the TUF repository of limits (`distribution`)

The carrier is trusted with nothing. A batch carries its gateway's signature. A letter is signed by the key
of the ledger's server, with the certificate that a gateway asks for on the line as well: whoever could forge
a letter could already answer on the line, and no further key is to be guarded or rotated.

    letter    = {"body": canonical JSON, "certificate": X.509 DER, "signature"}
    signature = ECDSA-P256-SHA256("pos-gateway letter of verdicts carried to a gateway 1\\0" ‖ body)

What the server's key signs for TLS 1.3 begins with 64 blanks, so neither can be taken for the other. The body
names the gateway, each record by id and hash, and the ledger's epochs: a letter from before the ledger was
restored from a backup says nothing any more.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Self
from uuid import UUID

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from pos_gateway.errors import AuthenticationFailed, InvalidMessage
from pos_gateway.records import (
    MAX_BATCH_RECORDS,
    MAX_BODY_BYTES,
    MAX_PROOF_BYTES,
    Record,
    Verdict,
    canonical_json,
    parse_object,
    presentment_body,
    sign_batch,
)

ROOT: Final = "pos-gateway"
TO_LEDGER: Final = "to-ledger"
TO_GATEWAY: Final = "to-gateway"
LIMITS: Final = "limits"

MAX_CARRIED_BYTES: Final = 2 * MAX_BATCH_RECORDS * (MAX_BODY_BYTES + MAX_PROOF_BYTES)
"""Of one file: the largest batch, its JSON quoted once more."""
MAX_LETTER_VERDICTS: Final = 5000

_GATEWAY_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,32}", re.ASCII)
_LETTER_DOMAIN: Final = b"pos-gateway letter of verdicts carried to a gateway 1\0"
_MAX_REASON: Final = 500
_MAX_EPOCHS: Final = 1000


def is_gateway_id(text: str) -> bool:
    """May it be the name of a folder on a stick?"""
    return _GATEWAY_ID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class SignedBatch:
    """One presentment on its way by hand. `gateway_id`: who presents and signs it; the body says whose
    records they are, which may be those of a dead gateway of the same shop."""

    gateway_id: str
    body: bytes
    signature: bytes

    @classmethod
    def make(
        cls, gateway_id: str, records: Sequence[Record], gateway_key: Ed25519PrivateKey, *, dead_id: str = ""
    ) -> Self:
        body = presentment_body(dead_id or gateway_id, records)
        return cls(gateway_id, body, sign_batch(body, gateway_key))

    def to_text(self) -> str:
        return canonical_json(
            {
                "gateway_id": self.gateway_id,
                "body": self.body.decode(),
                "signature": base64.b64encode(self.signature).decode(),
            }
        )

    @classmethod
    def parse(cls, text: str | bytes, *, where: str) -> Self:
        """Nothing is verified yet but the shape.

        Raises:
            InvalidMessage: not a signed batch.
        """
        batch = parse_object(text, where=where)
        try:
            gateway_id, body = batch["gateway_id"], batch["body"].encode()
            signature = base64.b64decode(batch["signature"], validate=True)
            if not is_gateway_id(gateway_id):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InvalidMessage("no signed batch", where=where) from None
        return cls(gateway_id, body, signature)


@dataclass(frozen=True, slots=True)
class CarriedVerdict:
    record_id: UUID
    record_hash: bytes
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Letter:
    """What the ledger says of a gateway's records. `epochs`: the ledger's, the one of now last. `at_unix_ms`:
    the ledger's time when it was written."""

    gateway_id: str
    epochs: tuple[str, ...]
    at_unix_ms: int
    verdicts: tuple[CarriedVerdict, ...]

    def sign(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> bytes:
        """The whole of it, ready for the stick."""
        body = canonical_json(
            {
                "gateway_id": self.gateway_id,
                "epochs": list(self.epochs),
                "at_unix_ms": self.at_unix_ms,
                "verdicts": [
                    [str(v.record_id), v.record_hash.hex(), v.verdict.value, v.reason] for v in self.verdicts
                ],
            }
        )
        signature = key.sign(_LETTER_DOMAIN + body.encode(), ec.ECDSA(hashes.SHA256()))
        letter = {
            "body": body,
            "certificate": base64.b64encode(certificate.public_bytes(Encoding.DER)).decode(),
            "signature": base64.b64encode(signature).decode(),
        }
        return canonical_json(letter).encode()

    @classmethod
    def open(cls, data: bytes, *, authority: bytes, gateway_id: str, now_unix_ms: int, where: str) -> Self:
        """Verify a letter to this gateway. `authority`: the certificate (DER) it enrolled with.

        Raises:
            InvalidMessage: not a letter.
            AuthenticationFailed: step `letter certificate`: not the server's of this ledger, or expired by
                our clock; `letter signature`: changed; `letter address`: written to another gateway.
        """
        raw = parse_object(data, where=where)
        try:
            body = raw["body"].encode()
            certificate = x509.load_der_x509_certificate(base64.b64decode(raw["certificate"], validate=True))
            signature = base64.b64decode(raw["signature"], validate=True)
        except (KeyError, TypeError, ValueError, AttributeError, binascii.Error):
            raise InvalidMessage("no letter of the ledger", where=where) from None
        key = _server_key(certificate, authority, now_unix_ms)
        try:
            key.verify(signature, _LETTER_DOMAIN + body, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            raise AuthenticationFailed("its signature does not verify", step="letter signature") from None
        letter = cls._read(body, where)
        if letter.gateway_id != gateway_id:
            raise AuthenticationFailed(
                f"it is written to {letter.gateway_id}, another gateway", step="letter address"
            )
        return letter

    @classmethod
    def _read(cls, body: bytes, where: str) -> Self:
        raw = parse_object(body, where=where)
        try:
            epochs = tuple(str(UUID(epoch)) for epoch in raw["epochs"])
            at_unix_ms = raw["at_unix_ms"]
            if not 0 < len(epochs) <= _MAX_EPOCHS or type(at_unix_ms) is not int:
                raise ValueError
            if len(raw["verdicts"]) > MAX_LETTER_VERDICTS:
                raise ValueError
            verdicts = tuple(
                CarriedVerdict(
                    UUID(record_id), bytes.fromhex(digest), Verdict(verdict), str(reason)[:_MAX_REASON]
                )
                for record_id, digest, verdict, reason in raw["verdicts"]
            )
            return cls(str(raw["gateway_id"]), epochs, at_unix_ms, verdicts)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InvalidMessage("a letter this program does not understand", where=where) from None


def _server_key(
    certificate: x509.Certificate, authority: bytes, now_unix_ms: int
) -> ec.EllipticCurvePublicKey:
    """The key of a certificate that this authority gave to its ledger's server, and that is in force."""
    try:
        certificate.verify_directly_issued_by(x509.load_der_x509_certificate(authority))
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        key = certificate.public_key()
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        raise AuthenticationFailed(
            "not of the ledger this gateway enrolled with", step="letter certificate"
        ) from None
    if ExtendedKeyUsageOID.SERVER_AUTH not in usage or not isinstance(key, ec.EllipticCurvePublicKey):
        raise AuthenticationFailed("not its server's", step="letter certificate")
    if now_unix_ms > 1000 * certificate.not_valid_after_utc.astimezone(UTC).timestamp():
        until: datetime = certificate.not_valid_after_utc
        raise AuthenticationFailed(
            f"by this clock it expired on {until:%Y-%m-%d}",
            step="letter certificate",
            advice="check the clock; else ask the issuer for a newer stick",
        )
    return key
