"""The decision receipt: one approval in a file that anybody can check with public keys alone. Pure.

It holds the journal record as the gateway signed it, and the proof that the limit record it relied on
stands in what the issuer signed. From these two follow: who approved what and when, that it was written
into the gateway's chain, and that the issuer had promised a ceiling that covers it.

What it does **not** show: the card's own signature. The card's certificates, records and SDAD hold the full
token number; they are sealed to the issuer inside the record, and only the issuer can open them. Who
holds a receipt knows by its hash that they are there and cannot be exchanged. Nor does it show that the
same points of the card's counter were not claimed elsewhere too: that is the issuer's books' matter.

    digest  = SHA-256("pos-gateway decision receipt 1\\0" ‖ SHA-256(record, canonical JSON) ‖ SHA-256(proof))
    on paper, as QR: "PGR1." ‖ base64url(sale id (16) ‖ amount (8) ‖ time, unix ms (8) ‖ record hash (32)
             ‖ digest (32) ‖ Ed25519("pos-gateway receipt digest 1\\0" ‖ all of it before) (64))
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final
from uuid import UUID

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pos_gateway.errors import AuthenticationFailed, InvalidInput, InvalidMessage, PosGatewayError
from pos_gateway.instalments import Offer, quote
from pos_gateway.limits.proof import verify_proof
from pos_gateway.records import Kind, Record, canonical_json, parse_object

FORMAT: Final = "pos-gateway decision receipt 1"
MAX_RECEIPT_BYTES: Final = 512 * 1024
MAX_QR_BYTES: Final = 700
_DIGEST_DOMAIN: Final = b"pos-gateway decision receipt 1\0"
_QR_DOMAIN: Final = b"pos-gateway receipt digest 1\0"
_QR_PREFIX: Final = "PGR1."
_QR_HEAD: Final = 16 + 8 + 8 + 32 + 32
_SIGNATURE_BYTES: Final = 64
_NO_PLAN: Final = bytes(16).hex()


@dataclass(frozen=True, slots=True)
class DecisionReceipt:
    """`limit_proof`: see `limits.proof`; empty if it was not kept. `gateway_key`: raw Ed25519, as the
    gateway says."""

    issuer: str
    merchant_name: str
    gateway_key: bytes
    record: Record
    limit_proof: bytes = b""

    @property
    def digest(self) -> bytes:
        record = hashlib.sha256(canonical_json(self.record.to_wire()).encode()).digest()
        return hashlib.sha256(_DIGEST_DOMAIN + record + hashlib.sha256(self.limit_proof).digest()).digest()

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "issuer": self.issuer,
            "merchant_name": self.merchant_name,
            "gateway_key": self.gateway_key.hex(),
            "record": self.record.to_wire(),
            "limit_proof": base64.b64encode(self.limit_proof).decode(),
            "digest": self.digest.hex(),
        }

    @classmethod
    def parse(cls, data: bytes) -> DecisionReceipt:
        """
        Raises:
            InvalidMessage: not a decision receipt, or changed since its digest was taken.
        """
        if len(data) > MAX_RECEIPT_BYTES:
            raise InvalidMessage(f"over {MAX_RECEIPT_BYTES} bytes", where="receipt")
        document = parse_object(data, where="receipt")
        if document.get("format") != FORMAT:
            raise InvalidMessage("not a decision receipt", where="receipt field format")
        try:
            receipt = cls(
                issuer=_text(document["issuer"]),
                merchant_name=_text(document["merchant_name"]),
                gateway_key=bytes.fromhex(document["gateway_key"]),
                record=Record.from_wire(document["record"]),
                limit_proof=base64.b64decode(document["limit_proof"], validate=True),
            )
        except KeyError as error:
            raise InvalidMessage(f"field {error.args[0]!r} is missing", where="receipt") from None
        except (TypeError, ValueError, binascii.Error):
            raise InvalidMessage("a field has the wrong form", where="receipt") from None
        if len(receipt.gateway_key) != 32 or document.get("digest") != receipt.digest.hex():
            raise InvalidMessage("content and digest do not go together", where="receipt")
        return receipt


class Finding(Enum):
    """How a step of the check came out."""

    OK = "ok"
    FAILED = "failed"
    NOT_COVERED = "not_covered"
    """This file alone cannot show it."""


@dataclass(frozen=True, slots=True)
class Checked:
    """One step: `name` is stable."""

    name: str
    finding: Finding
    detail: str

    def as_json(self) -> dict[str, str]:
        return {"step": self.name, "finding": self.finding.value, "detail": self.detail}


def verify_receipt(
    receipt: DecisionReceipt,
    issuer_keys: Mapping[str, Ed25519PublicKey],
    threshold: int,
    gateway_key: Ed25519PublicKey | None = None,
) -> list[Checked]:
    """Everything that can be checked, step by step. `gateway_key`: as the issuer told it; without it the one
    in the file is used, and a step says so."""
    steps: list[Checked] = []
    key = gateway_key or Ed25519PublicKey.from_public_bytes(receipt.gateway_key)
    same = key.public_bytes_raw() == receipt.gateway_key
    if gateway_key is None:
        steps.append(
            Checked("gateway key", Finding.NOT_COVERED, "taken from the file: ask the issuer whose it is")
        )
    else:
        steps.append(_step("gateway key", same, "the key that the issuer names", "another gateway's key"))
    record = receipt.record
    steps.append(_tried("record", lambda: record.verify(key), "hash and signature hold"))
    if record.kind is not Kind.AUTHORIZATION:
        return [*steps, Checked("approval", Finding.FAILED, f"the record is a {record.kind.value}")]
    try:
        facts = record.facts()
        steps.append(_arithmetic(facts))
        steps.append(_plan(facts))
        steps += _limits(receipt, facts, issuer_keys, threshold)
    except (KeyError, TypeError, ValueError, InvalidInput):
        steps.append(Checked("facts", Finding.FAILED, "a fact is missing or has the wrong form"))
    sealed = hashlib.sha256(record.proof).hexdigest()
    steps.append(
        Checked(
            "card evidence",
            Finding.NOT_COVERED,
            f"sealed to the issuer: {len(record.proof)} bytes, SHA-256 {sealed}",
        )
    )
    steps.append(
        Checked(
            "no double claim", Finding.NOT_COVERED, "whether the card's points were claimed elsewhere too"
        )
    )
    return steps


def genuine(steps: list[Checked]) -> bool:
    return all(step.finding is not Finding.FAILED for step in steps)


def qr_text(receipt: DecisionReceipt, sign: Callable[[bytes], bytes]) -> str:
    """What stands in the QR on paper. `sign`: by the gateway's Ed25519 key."""
    facts = receipt.record.facts()
    head = (
        receipt.record.id.bytes
        + int(facts["amount_minor"]).to_bytes(8, "big")
        + int(facts["at_unix_ms"]).to_bytes(8, "big")
        + receipt.record.hash
        + receipt.digest
    )
    return _QR_PREFIX + base64.urlsafe_b64encode(head + sign(_QR_DOMAIN + head)).decode().rstrip("=")


@dataclass(frozen=True, slots=True)
class PaperDigest:
    """What a QR says."""

    sale_id: UUID
    amount_minor: int
    at_unix_ms: int
    record_hash: bytes
    digest: bytes


def verify_qr(text: str, gateway_key: Ed25519PublicKey) -> PaperDigest:
    """
    Raises:
        InvalidMessage: not the QR of a receipt.
        AuthenticationFailed: step `receipt digest`.
    """
    body = text.strip().removeprefix(_QR_PREFIX)
    try:
        data = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    except (ValueError, binascii.Error):
        data = b""
    if not text.strip().startswith(_QR_PREFIX) or len(data) != _QR_HEAD + _SIGNATURE_BYTES:
        raise InvalidMessage("not the QR of a receipt", where="QR")
    head, signature = data[:_QR_HEAD], data[_QR_HEAD:]
    try:
        gateway_key.verify(signature, _QR_DOMAIN + head)
    except InvalidSignature:
        raise AuthenticationFailed(
            "the digest is not signed by this gateway", step="receipt digest"
        ) from None
    return PaperDigest(
        UUID(bytes=head[:16]),
        int.from_bytes(head[16:24], "big"),
        int.from_bytes(head[24:32], "big"),
        head[32:64],
        head[64:96],
    )


def _arithmetic(facts: Mapping[str, Any]) -> Checked:
    before, after, ceiling = facts["counter_before"], facts["counter_after"], facts["ceiling"]
    holds = 0 <= before < after <= ceiling and after - before == facts["amount_minor"]
    return _step(
        "counter",
        holds,
        f"points {before} to {after} are the amount, within the ceiling {ceiling}",
        "amount, counter and ceiling contradict each other",
    )


def _plan(facts: Mapping[str, Any]) -> Checked:
    plan = facts.get("plan")
    if plan is None:
        return _step("plan", facts["plan_digest"] == _NO_PLAN, "no instalments", "a plan is missing")
    digest = quote(Offer.from_json(plan["offer"]), facts["amount_minor"], plan["periods"]).digest.hex()
    return _step(
        "plan", facts["plan_digest"] == digest, f"{plan['periods']} instalments", "another plan was signed"
    )


def _limits(
    receipt: DecisionReceipt, facts: Mapping[str, Any], keys: Mapping[str, Ed25519PublicKey], threshold: int
) -> list[Checked]:
    if not receipt.limit_proof:
        source = facts.get("limit_source", "snapshot")
        return [Checked("limits", Finding.NOT_COVERED, f"no proof of the {source} it relied on was kept")]
    try:
        header, limit = verify_proof(receipt.limit_proof, keys, threshold)
    except PosGatewayError as error:
        return [Checked("limits", Finding.FAILED, error.reason)]
    at_s = facts["at_unix_ms"] // 1000
    relied = (
        limit.token_key.hex() == facts["token_key"]
        and limit.digest(header.nonce).hex() == facts["limit_digest"]
        and limit.ceiling == facts["ceiling"]
        and header.version == facts["snapshot_version"]
    )
    return [
        Checked("limits", Finding.OK, f"signed by the issuer, version {header.version}"),
        _step("relied on", relied, "the approval relied on this very record", "it relied on another record"),
        _step(
            "validity",
            header.valid_from_unix_s <= at_s <= header.valid_until_unix_s,
            "the limits were valid at the time of the tap, by the shop's clock",
            "the limits were not valid at that time",
        ),
        _step("token", limit.status.name == "ACTIVE", "active", limit.status.name.lower()),
        _step(
            "tap cap", facts["amount_minor"] <= limit.per_tap_cap_minor, "within", "more than one tap may be"
        ),
    ]


def _step(name: str, holds: bool, good: str, bad: str) -> Checked:
    return Checked(name, Finding.OK, good) if holds else Checked(name, Finding.FAILED, bad)


def _tried(name: str, check: Callable[[], None], good: str) -> Checked:
    try:
        check()
    except PosGatewayError as error:
        return Checked(name, Finding.FAILED, error.reason)
    return Checked(name, Finding.OK, good)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
