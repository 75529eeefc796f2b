"""What a gateway journals and presents, and what the ledger answers: the words both programs share.

A record is chained to the one before it:

    hash = SHA-256("pos-gateway journal record 1\\0" ‖ sequence (8) ‖ previous hash (32) ‖ id (16)
                   ‖ SHA-256(kind) ‖ SHA-256(body) ‖ SHA-256(proof))

and signed by its gateway, together with what was committed in the same moment: one Ed25519 signature
over the root of a tree of their hashes. Each record carries that signature and its own way up the tree
(docs/decisions/0004-journal-signatures.md), so that it stands by itself wherever it is brought:

    root      = the hash, where one record was committed alone; otherwise, level by level,
                SHA-256("pos-gateway commit node 1\\0" ‖ left ‖ right); the odd one out moves up as it is
    signature = Ed25519("pos-gateway record signature 1\\0" ‖ root) (64)
                ‖ for each step up: 0 if the neighbour is on the left, 1 on the right ‖ neighbour (32)

`body` is canonical JSON of verified facts, token numbers truncated. `proof` is the card's evidence,
sealed to the ledger (HPKE, RFC 9180), so that the full token number leaves the gateway's memory only
encrypted; it is empty for kinds that need none.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final
from uuid import UUID

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from pos_gateway.errors import AuthenticationFailed, InvalidMessage

GENESIS_HASH: Final = bytes(32)
"""The previous hash of a journal's first record."""

MAX_BATCH_RECORDS: Final = 1000
MAX_BODY_BYTES: Final = 8 * 1024
MAX_PROOF_BYTES: Final = 8 * 1024

_HASH_DOMAIN: Final = b"pos-gateway journal record 1\0"
_SIGNATURE_DOMAIN: Final = b"pos-gateway record signature 1\0"
_NODE_DOMAIN: Final = b"pos-gateway commit node 1\0"
_BATCH_DOMAIN: Final = b"pos-gateway batch signature 1\0"
_SIGNATURE_BYTES: Final = 64
_STEP_BYTES: Final = 33
_MAX_STEPS: Final = 24
_ON_THE_LEFT: Final = b"\0"
_ON_THE_RIGHT: Final = b"\1"
_SEAL_INFO: Final = b"pos-gateway proof 1"
_SEAL_KEY_BYTES: Final = 32
_SEAL_NONCE_BYTES: Final = 12
_CANONICAL: Final = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
)
_SUITE: Final = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)


class Kind(Enum):
    """What a journal record tells."""

    AUTHORIZATION = "authorization"
    DECLINE = "decline"
    REVERSAL = "reversal"
    """Voids a whole authorization."""
    REFUND = "refund"
    """Gives back an authorization's amount, or a part of it."""
    RENUNCIATION = "renunciation"
    """A TC was asked for, and will never be presented: its answer never came, or was not accepted."""
    ACKNOWLEDGEMENT = "acknowledgement"
    SNAPSHOT_ACTIVATION = "snapshot_activation"
    TRUST_ROTATION = "trust_rotation"
    """A new root was followed: other keys count from here on."""
    CLOCK_CONFIRMATION = "clock_confirmation"
    """A manager says that the clock is right, although it lies behind what was recorded before."""
    SYNCHRONISATION = "synchronisation"
    """The ledger was spoken to while nothing else happened: a clock behind it is not to be trusted."""
    EPOCH = "epoch"
    """The ledger has another epoch than before (it was restored from a backup), or how far presenting
    again what it may have forgotten has come."""
    STAFF_ACTION = "staff_action"
    """Somebody of the staff did, or approved, what a manager answers for."""
    SHIFT = "shift"
    """A shift was opened, its drawer moved or counted, a shift or the day closed."""
    CHECKPOINT = "checkpoint"
    """Older records were, or are being, pruned; what they added up to, and the chain's hash there."""

    @property
    def presented(self) -> bool:
        """Does the ledger need to know of it?"""
        return self in (Kind.AUTHORIZATION, Kind.REVERSAL, Kind.REFUND, Kind.RENUNCIATION)

    @property
    def corrects(self) -> bool:
        """Does it take an authorization's money back?"""
        return self in (Kind.REVERSAL, Kind.REFUND)


class Verdict(Enum):
    """What the ledger says of one presented record."""

    POSTED = "posted"
    DUPLICATE = "duplicate"
    """Posted before, with the same content: success."""
    CONFLICT = "conflict"
    """The id, or its points on the counter line, were presented before with other content: an alarm."""
    INVALID = "invalid"
    """Signature, certificate, cryptogram or facts do not hold."""
    LATE = "late"
    """Genuine, but outside what the issuer still guarantees: kept for review."""
    UNKNOWN = "unknown"
    """A token, or the payment that is to be corrected, that the ledger does not know (yet)."""

    @property
    def paid(self) -> bool:
        """Will the merchant be paid for it without anybody deciding more?"""
        return self in (Verdict.POSTED, Verdict.DUPLICATE)


@dataclass(frozen=True, slots=True)
class Record:
    """One journal record as it stands on disk and travels to the ledger."""

    sequence: int
    id: UUID
    kind: Kind
    body: str
    proof: bytes
    previous_hash: bytes
    hash: bytes
    signature: bytes

    def facts(self) -> dict[str, Any]:
        """The body, parsed.

        Raises:
            InvalidMessage: the body is no JSON object.
        """
        return parse_object(self.body, where=f"record {self.id}")

    def verify(self, gateway_key: Ed25519PublicKey, known: set[bytes] | None = None) -> None:
        """Check hash and signature.

        `known` remembers, for one gateway key, which signatures were verified over which roots, so that
        those committed together cost one Ed25519 verification among them.

        Raises:
            AuthenticationFailed: step `record hash` or `record signature`.
        """
        expected = record_hash(
            self.sequence, self.previous_hash, self.id, self.kind, self.body.encode(), self.proof
        )
        if expected != self.hash:
            raise AuthenticationFailed(f"record {self.sequence} was changed", step="record hash")
        if not _is_signature(self.signature):
            raise AuthenticationFailed(
                f"record {self.sequence} has no readable signature", step="record signature"
            )
        signature, root = self.signature[:_SIGNATURE_BYTES], self.hash
        for at in range(_SIGNATURE_BYTES, len(self.signature), _STEP_BYTES):
            side, neighbour = self.signature[at : at + 1], self.signature[at + 1 : at + _STEP_BYTES]
            root = _node(neighbour, root) if side == _ON_THE_LEFT else _node(root, neighbour)
        if known is not None and signature + root in known:
            return
        try:
            gateway_key.verify(signature, _SIGNATURE_DOMAIN + root)
        except InvalidSignature:
            raise AuthenticationFailed(
                f"record {self.sequence} was not signed by this gateway", step="record signature"
            ) from None
        if known is not None:
            known.add(signature + root)

    def to_wire(self) -> dict[str, Any]:
        return {
            "sequence": self.sequence,
            "id": str(self.id),
            "kind": self.kind.value,
            "body": self.body,
            "proof": base64.b64encode(self.proof).decode(),
            "previous_hash": self.previous_hash.hex(),
            "hash": self.hash.hex(),
            "signature": base64.b64encode(self.signature).decode(),
        }

    @classmethod
    def from_wire(cls, raw: object) -> Record:
        """
        Raises:
            InvalidMessage: not the shape of `to_wire`, or over a size bound.
        """
        if not isinstance(raw, dict):
            raise InvalidMessage("a record must be an object", where="records")
        try:
            record = cls(
                sequence=_integer(raw["sequence"]),
                id=UUID(raw["id"]),
                kind=Kind(raw["kind"]),
                body=_string(raw["body"]),
                proof=base64.b64decode(raw["proof"], validate=True),
                previous_hash=bytes.fromhex(raw["previous_hash"]),
                hash=bytes.fromhex(raw["hash"]),
                signature=base64.b64decode(raw["signature"], validate=True),
            )
        except KeyError as error:
            raise InvalidMessage(f"field {error.args[0]!r} is missing", where="record") from None
        except (ValueError, TypeError, AttributeError, binascii.Error):
            raise InvalidMessage("a field has the wrong form", where="record") from None
        if len(record.previous_hash) != 32 or len(record.hash) != 32 or not _is_signature(record.signature):
            raise InvalidMessage("a hash or signature has the wrong length", where="record")
        if len(record.body.encode()) > MAX_BODY_BYTES or len(record.proof) > MAX_PROOF_BYTES:
            raise InvalidMessage("a record is too large", where="record")
        if not 1 <= record.sequence < 1 << 63:
            raise InvalidMessage("the sequence is out of range", where="record")
        return record


def record_hash(
    sequence: int, previous_hash: bytes, record_id: UUID, kind: Kind, body: bytes, proof: bytes
) -> bytes:
    """The hash a record is chained and signed by; see the head of this module."""
    digest = hashlib.sha256(_HASH_DOMAIN)
    digest.update(sequence.to_bytes(8, "big"))
    digest.update(previous_hash)
    digest.update(record_id.bytes)
    for part in (kind.value.encode(), body, proof):
        digest.update(hashlib.sha256(part).digest())
    return digest.digest()


def make_record(
    *,
    sequence: int,
    record_id: UUID,
    kind: Kind,
    facts: Mapping[str, Any],
    proof: bytes,
    previous_hash: bytes,
    gateway_key: Ed25519PrivateKey,
) -> Record:
    """Chain and sign a record that is committed alone."""
    body = canonical_json(facts)
    digest = record_hash(sequence, previous_hash, record_id, kind, body.encode(), proof)
    (signature,) = sign_commit([digest], gateway_key)
    return Record(sequence, record_id, kind, body, proof, previous_hash, digest, signature)


def sign_commit(hashes: Sequence[bytes], gateway_key: Ed25519PrivateKey) -> list[bytes]:
    """Sign all that is committed in one moment; returns each record's signature, see the head of this
    module."""
    paths: list[list[bytes]] = [[] for _ in hashes]
    level = [(digest, [place]) for place, digest in enumerate(hashes)]
    while len(level) > 1:
        above = []
        for (left, on_left), (right, on_right) in zip(level[::2], level[1::2], strict=False):
            for place in on_left:
                paths[place].append(_ON_THE_RIGHT + right)
            for place in on_right:
                paths[place].append(_ON_THE_LEFT + left)
            above.append((_node(left, right), on_left + on_right))
        level = above + level[len(above) * 2 :]
    signature = gateway_key.sign(_SIGNATURE_DOMAIN + level[0][0])
    return [signature + b"".join(path) for path in paths]


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(_NODE_DOMAIN + left + right).digest()


def _is_signature(signature: bytes) -> bool:
    steps, rest = divmod(len(signature) - _SIGNATURE_BYTES, _STEP_BYTES)
    sides = signature[_SIGNATURE_BYTES::_STEP_BYTES]
    return 0 <= steps <= _MAX_STEPS and rest == 0 and not sides.strip(_ON_THE_LEFT + _ON_THE_RIGHT)


class Seal:
    """Encrypts card evidence so that only the ledger can read it.

    A fresh key is sealed to the ledger (HPKE) when the seal is made, which takes as long as many of a
    tap's checks together and therefore happens before the card is there. What it seals then is

        length of the sealed key (2) ‖ sealed key ‖ nonce (12) ‖ ChaCha20-Poly1305 of the proof
    """

    def __init__(self, ledger_key: X25519PublicKey, random_bytes: Callable[[int], bytes]) -> None:
        key = random_bytes(_SEAL_KEY_BYTES)
        sealed_key = _SUITE.encrypt(key, ledger_key, info=_SEAL_INFO)
        self._head = len(sealed_key).to_bytes(2, "big") + sealed_key
        self._cipher = ChaCha20Poly1305(key)
        self._random_bytes = random_bytes

    def seal(self, proof: bytes) -> bytes:
        nonce = self._random_bytes(_SEAL_NONCE_BYTES)
        return self._head + nonce + self._cipher.encrypt(nonce, proof, None)


def open_proof(sealed: bytes, ledger_key: X25519PrivateKey) -> bytes:
    """
    Raises:
        AuthenticationFailed: step `proof seal`: not sealed to this ledger, or changed since.
    """
    at = 2 + int.from_bytes(sealed[:2], "big")
    nonce, encrypted = sealed[at : at + _SEAL_NONCE_BYTES], sealed[at + _SEAL_NONCE_BYTES :]
    try:
        key = _SUITE.decrypt(sealed[2:at], ledger_key, info=_SEAL_INFO)
        return ChaCha20Poly1305(key).decrypt(nonce, encrypted, None)
    except (InvalidTag, ValueError):
        raise AuthenticationFailed("the proof cannot be opened", step="proof seal") from None


@dataclass(frozen=True, slots=True)
class Complete:
    """A gateway's claim beside a batch: every approval of its with a tap time up to `until_unix_ms` is in
    that batch, or was acknowledged by the ledger while that had the epoch `epoch`. It counts for that
    epoch alone: a ledger restored from a backup may have forgotten what it acknowledged."""

    until_unix_ms: int
    epoch: str


def presentment_body(gateway_id: str, records: Sequence[Record], complete: Complete | None = None) -> bytes:
    """The request body that presents a batch."""
    batch: dict[str, Any] = {"gateway_id": gateway_id, "records": [record.to_wire() for record in records]}
    if complete is not None:
        batch |= {"complete_until_unix_ms": complete.until_unix_ms, "epoch": complete.epoch}
    return json.dumps(batch, separators=(",", ":")).encode()


def sign_batch(body: bytes, gateway_key: Ed25519PrivateKey) -> bytes:
    """The gateway's signature over a whole request body."""
    return gateway_key.sign(_BATCH_DOMAIN + hashlib.sha256(body).digest())


def verify_batch(body: bytes, signature: bytes, gateway_key: Ed25519PublicKey) -> None:
    """
    Raises:
        AuthenticationFailed: step `batch signature`.
    """
    try:
        gateway_key.verify(signature, _BATCH_DOMAIN + hashlib.sha256(body).digest())
    except InvalidSignature:
        raise AuthenticationFailed(
            "the batch is not signed by this gateway", step="batch signature"
        ) from None


def uuid7(at_unix_ms: int, random: bytes) -> UUID:
    """A time-ordered id (RFC 9562 §5.7) from a time and 10 random bytes."""
    value = (at_unix_ms & ((1 << 48) - 1)) << 80 | int.from_bytes(random[:10], "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    return UUID(int=value & ~(0b11 << 62) | 0b10 << 62)


def canonical_json(value: Mapping[str, Any]) -> str:
    """One spelling for one content: sorted keys, no blanks, no floats, UTF-8."""
    return _CANONICAL.encode(value)


def canonical_scalar(value: str | int | bool | None) -> str:
    """A value as `canonical_json` spells it."""
    # The encoder is quick with strings alone.
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else _CANONICAL.encode(value)


def parse_object(text: str | bytes, *, where: str) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Raises:
        InvalidMessage: no JSON, too deep, or no object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidMessage("not JSON", where=where) from None
    if not isinstance(value, dict):
        raise InvalidMessage("not a JSON object", where=where)
    return value


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    return value


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
