"""A snapshot's header: everything that must be trusted at the till, signed by a threshold of keys.

The header is canonical JSON. Signatures stand beside it, over a domain and exactly its bytes; the
whole of the limits hangs on `root`, the hash of the bucket tree's topmost node.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pos_gateway.errors import AuthenticationFailed, InvalidInput, InvalidSnapshot
from pos_gateway.instalments import Offer
from pos_gateway.limits.record import MAX_U32, NONCE_BYTES

FORMAT: Final = 3
MAX_HEADER_BYTES: Final = 64 * 1024
MAX_SIGNATURES: Final = 16
MAX_OFFERS: Final = 64
MAX_KEY_ID_CHARACTERS: Final = 64
SIGNATURE_BYTES: Final = 64
MAX_BUCKET_BITS: Final = 25
MAX_ONLINE_KEYS: Final = 8
ONLINE_KEY_BYTES: Final = 32
HASH_BYTES: Final = 32

_SIGNATURE_DOMAIN: Final = b"pos-gateway snapshot header 1\0"
_MAX_INTEGER: Final = (1 << 53) - 1  # what every JSON reader keeps exactly
_MAX_TIME_UNIX_S: Final = 253_402_300_799  # the end of the year 9999
_KEY_ID: Final = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_KEY_ID_CHARACTERS}}}", re.ASCII)
_CURRENCY: Final = re.compile(r"[A-Z]{3}", re.ASCII)
_HEX: Final = re.compile(r"(?:[0-9a-f]{2})+", re.ASCII)
_ISSUER_IDENTIFIER_BYTES: Final = 4
_CERTIFICATE_SERIAL_BYTES: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskPolicy:
    """What the issuer demands of every gateway.

    `stale_per_tap_cap_minor`: no tap above it once the snapshot is stale. `presentment_deadline_s`:
    how long after a tap it may be presented and is still guaranteed. `clock_tolerance_s`: how far a
    shop's clock may be off.
    """

    stale_per_tap_cap_minor: int
    presentment_deadline_s: int
    clock_tolerance_s: int

    def __post_init__(self) -> None:
        for each in fields(self):
            _integer(getattr(self, each.name), f"policy.{each.name}", 0, MAX_U32)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineTerms:
    """What keys that are online may hand out by themselves, as single signed limits (`single`).

    `keys`: Ed25519 public keys of 32 bytes, none if the issuer hands out nothing that way.
    `per_tap_cap_minor`: no tap above it relies on them. `grant_life_s`, `note_life_s`: how long one of each
    kind may be valid at most. `unsynchronised_amount_cap_minor`: how much one gateway may approve relying on
    them before it synchronises. So whoever steals such a key can do no more than a threshold of limit keys
    has put its name to.
    """

    keys: tuple[bytes, ...] = ()
    per_tap_cap_minor: int = 0
    grant_life_s: int = 0
    note_life_s: int = 0
    unsynchronised_amount_cap_minor: int = 0

    def __post_init__(self) -> None:
        if len(self.keys) > MAX_ONLINE_KEYS:
            raise InvalidSnapshot(f"at most {MAX_ONLINE_KEYS} keys", where="header field online.keys")
        for key in self.keys:
            _bytes(key, "online.keys", ONLINE_KEY_BYTES)
        if len(set(self.keys)) != len(self.keys):
            raise InvalidSnapshot("the same key twice", where="header field online.keys")
        for name in ("per_tap_cap_minor", "grant_life_s", "note_life_s"):
            _integer(getattr(self, name), f"online.{name}", 0, MAX_U32)
        _integer(
            self.unsynchronised_amount_cap_minor, "online.unsynchronised_amount_cap_minor", 0, _MAX_INTEGER
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotTerms:
    """What an issuer decides about one snapshot. Times are unix seconds.

    `nonce` is 16 random bytes, new for every publication. `base_version` is None for a whole
    snapshot, else the version that this delta lies over. `revoked_certificates` are pairs of issuer
    identifier (4 bytes) and certificate serial number (3), as they stand in an issuer certificate
    (EMV 4.3 Book 2, Table 6); in JSON each is lower-case hex.
    `offers`: the instalment plans that a till may offer, each with an id of its own, all in this currency.

    Raises:
        InvalidSnapshot: a field of the wrong type, out of range, or at odds with another.
    """

    issuer: str
    currency: str
    version: int
    nonce: bytes
    valid_from_unix_s: int
    refresh_after_unix_s: int
    valid_until_unix_s: int
    token_key_epoch: int
    policy: RiskPolicy
    base_version: int | None = None
    offers: tuple[Offer, ...] = ()
    online: OnlineTerms = field(default_factory=OnlineTerms)
    revoked_certificates: tuple[tuple[bytes, bytes], ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.issuer, str) and 1 <= len(self.issuer) <= 64 and self.issuer.isprintable()):
            raise InvalidSnapshot("must be 1 to 64 printable characters", where="header field issuer")
        if not isinstance(self.currency, str) or _CURRENCY.fullmatch(self.currency) is None:
            raise InvalidSnapshot("must be three capital letters", where="header field currency")
        _integer(self.version, "version", 1, _MAX_INTEGER)
        _bytes(self.nonce, "nonce", NONCE_BYTES)
        for name in ("valid_from_unix_s", "refresh_after_unix_s", "valid_until_unix_s"):
            _integer(getattr(self, name), name, 0, _MAX_TIME_UNIX_S)
        if not self.valid_from_unix_s <= self.refresh_after_unix_s <= self.valid_until_unix_s:
            raise InvalidSnapshot(
                "valid_from, refresh_after, valid_until must follow each other", where="header times"
            )
        _integer(self.token_key_epoch, "token_key_epoch", 0, MAX_U32)
        if not isinstance(self.policy, RiskPolicy):
            raise InvalidSnapshot("must be a policy", where="header field policy")
        if self.base_version is not None:
            _integer(self.base_version, "base_version", 1, self.version - 1)
        if len(self.offers) > MAX_OFFERS or len({offer.id for offer in self.offers}) < len(self.offers):
            raise InvalidSnapshot(f"at most {MAX_OFFERS}, each id once", where="header field offers")
        if any(offer.currency.code != self.currency for offer in self.offers):
            raise InvalidSnapshot("must be in the limits' currency", where="header field offers")
        if not isinstance(self.online, OnlineTerms):
            raise InvalidSnapshot("must be the terms of online keys", where="header field online")
        for identifier, serial in self.revoked_certificates:
            _bytes(identifier, "revoked_certificates", _ISSUER_IDENTIFIER_BYTES)
            _bytes(serial, "revoked_certificates", _CERTIFICATE_SERIAL_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotHeader(SnapshotTerms):
    """The terms with the records they cover: `count` of them in 2^`bucket_bits` buckets under `root`."""

    count: int
    bucket_bits: int
    root: bytes

    def __post_init__(self) -> None:
        SnapshotTerms.__post_init__(self)
        _integer(self.count, "count", 0, MAX_U32)
        _integer(self.bucket_bits, "bucket_bits", 0, MAX_BUCKET_BITS)
        _bytes(self.root, "root", HASH_BYTES)

    def to_bytes(self) -> bytes:
        """Canonical JSON: keys sorted, no blanks, UTF-8, byte strings as lower-case hex.

        Raises:
            InvalidSnapshot: longer than a header may be.
        """
        document: dict[str, Any] = {"format": FORMAT}
        for each in fields(self):
            value = getattr(self, each.name)
            document[each.name] = value.hex() if isinstance(value, bytes) else value
        document["revoked_certificates"] = [
            [identifier.hex(), serial.hex()] for identifier, serial in self.revoked_certificates
        ]
        document["offers"] = [offer.to_json() for offer in self.offers]
        document["policy"] = {each.name: getattr(self.policy, each.name) for each in fields(RiskPolicy)}
        online = {each.name: getattr(self.online, each.name) for each in fields(OnlineTerms)}
        document["online"] = online | {"keys": [key.hex() for key in self.online.keys]}
        data = _canonical(document)
        if len(data) > MAX_HEADER_BYTES:
            raise InvalidSnapshot(f"{len(data)} bytes, at most {MAX_HEADER_BYTES}", where="header")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> SnapshotHeader:
        """
        Raises:
            InvalidSnapshot: not canonical JSON of exactly the fields of this format; names the field.
        """
        document = _object(data)
        _integer(document.pop("format", None), "format", FORMAT, FORMAT)
        _same_names(document, {each.name for each in fields(cls)}, "header")
        policy = _inner(document.pop("policy"), "policy", RiskPolicy)
        online = _inner(document.pop("online"), "online", OnlineTerms)
        online["keys"] = tuple(_unhex(key, "online.keys") for key in _list(online["keys"], "online.keys"))
        for name in ("nonce", "root"):
            document[name] = _unhex(document[name], name)
        document["offers"] = tuple(_offer(item) for item in _list(document["offers"], "offers"))
        document["revoked_certificates"] = tuple(
            _revoked_certificate(pair)
            for pair in _list(document["revoked_certificates"], "revoked_certificates")
        )
        return cls(policy=RiskPolicy(**policy), online=OnlineTerms(**online), **document)


class Freshness(Enum):
    """How a snapshot's validity stands to the time."""

    NOT_YET_VALID = "not_yet_valid"
    FRESH = "fresh"
    STALE = "stale"
    """Past its refresh time: approvals only within the policy's smaller cap."""
    EXPIRED = "expired"

    @property
    def may_approve(self) -> bool:
        return self in (Freshness.FRESH, Freshness.STALE)


def freshness(header: SnapshotTerms, now_unix_s: int) -> Freshness:
    """Where `now` falls in the header's validity; each bound belongs to what follows it.

    The start is taken earlier by the clock tolerance: a shop whose clock is behind by no more than
    that has received a snapshot which is valid already. The end is never moved.
    """
    if now_unix_s < header.valid_from_unix_s - header.policy.clock_tolerance_s:
        return Freshness.NOT_YET_VALID
    if now_unix_s >= header.valid_until_unix_s:
        return Freshness.EXPIRED
    if now_unix_s >= header.refresh_after_unix_s:
        return Freshness.STALE
    return Freshness.FRESH


def explain_freshness(header: SnapshotTerms, now_unix_s: int) -> str:
    """One plain sentence for staff, times in UTC."""
    limits, until = f"Limits {header.version}", _utc(header.valid_until_unix_s)
    match freshness(header, now_unix_s):
        case Freshness.NOT_YET_VALID:
            return f"{limits} are valid only from {_utc(header.valid_from_unix_s)}; check the clock."
        case Freshness.FRESH:
            return f"{limits} are fresh and valid until {until}."
        case Freshness.STALE:
            since = _utc(header.refresh_after_unix_s)
            return f"{limits} should have been refreshed by {since}; smaller caps until {until}."
        case Freshness.EXPIRED:
            return f"{limits} expired at {until}; nothing can be approved until new ones arrive."


def check_supersedes(header: SnapshotTerms, high_water_version: int) -> None:
    """Refuse a snapshot older than one seen before.

    Raises:
        AuthenticationFailed: step `snapshot version`.
    """
    if header.version < high_water_version:
        raise AuthenticationFailed(
            f"version {header.version} is older than {high_water_version}, which was seen before",
            step="snapshot version",
            advice="fetch the latest snapshot from the ledger",
        )


def check_meant_for(header: SnapshotTerms, *, issuer: str, currency: str, token_key_epoch: int) -> None:
    """Refuse a genuine snapshot that is not for this gateway: its keys and amounts would mean
    something else here.

    Raises:
        InvalidSnapshot: names the first field that differs from the enrolment.
    """
    for name, expected in (
        ("issuer", issuer),
        ("currency", currency),
        ("token_key_epoch", token_key_epoch),
    ):
        found = getattr(header, name)
        if found != expected:
            raise InvalidSnapshot(f"is {found!r}, enrolled for {expected!r}", where=f"header field {name}")


def check_key_id(key_id: str) -> str:
    """
    Raises:
        InvalidInput: not 1 to 64 of `A–Z a–z 0–9 . _ -`.
    """
    if _KEY_ID.fullmatch(key_id) is None:
        raise InvalidInput(
            f"must be 1 to {MAX_KEY_ID_CHARACTERS} of A-Z a-z 0-9 . _ -", where="snapshot key id"
        )
    return key_id


def sign_header(header_bytes: bytes, key: Ed25519PrivateKey) -> bytes:
    """One key's signature, 64 bytes; it needs the header alone, never the records."""
    return key.sign(_SIGNATURE_DOMAIN + header_bytes)


def verify_header(
    header_bytes: bytes,
    signatures: Mapping[str, bytes],
    keys: Mapping[str, Ed25519PublicKey],
    threshold: int,
) -> None:
    """Check that `threshold` different keys signed. Signatures of unknown keys count for nothing, so
    that a file can be signed by old and new keys at a rotation; a wrong signature of a known key is
    an error.

    Raises:
        AuthenticationFailed: step `snapshot signature`.
        InvalidInput: a threshold below 1.
    """
    if threshold < 1:
        raise InvalidInput("must be at least 1", where="snapshot threshold")
    # One key under two ids is one key: distinctness is of the public keys, never of their names.
    signed_by: set[bytes] = set()
    for key_id, signature in signatures.items():
        key = keys.get(key_id)
        if key is None:
            continue
        try:
            key.verify(signature, _SIGNATURE_DOMAIN + header_bytes)
        except InvalidSignature:
            raise AuthenticationFailed(
                f"the signature of key {key_id} does not verify", step="snapshot signature"
            ) from None
        signed_by.add(key.public_bytes_raw())
    if len(signed_by) < threshold:
        raise AuthenticationFailed(
            f"signed by {len(signed_by)} trusted keys, {threshold} needed", step="snapshot signature"
        )


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _object(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data.decode())
        canonical = _canonical(document) == data
    except (ValueError, RecursionError):
        raise InvalidSnapshot("not JSON", where="header") from None
    if not isinstance(document, dict):
        raise InvalidSnapshot("not a JSON object", where="header")
    if not canonical:
        raise InvalidSnapshot("not in canonical form", where="header")
    return document


def _same_names(document: Mapping[str, object], expected: set[str], where: str) -> None:
    for name in sorted(expected - document.keys()):
        raise InvalidSnapshot(f"field {name!r} is missing", where=where)
    for name in sorted(document.keys() - expected):
        raise InvalidSnapshot(f"unknown field {name[:40]!r}", where=where)


def _inner(value: object, name: str, shape: type[RiskPolicy | OnlineTerms]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidSnapshot("must be an object", where=f"header field {name}")
    _same_names(value, {each.name for each in fields(shape)}, f"header field {name}")
    return value


def _integer(value: object, name: str, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidSnapshot("must be an integer", where=f"header field {name}")
    if not low <= value <= high:
        raise InvalidSnapshot(f"must be {low} to {high}", where=f"header field {name}")


def _bytes(value: object, name: str, length: int) -> None:
    if not isinstance(value, bytes) or len(value) != length:
        raise InvalidSnapshot(f"must be {length} bytes", where=f"header field {name}")


def _unhex(value: object, name: str) -> bytes:
    if not isinstance(value, str) or _HEX.fullmatch(value) is None:
        raise InvalidSnapshot("must be lower-case hex", where=f"header field {name}")
    return bytes.fromhex(value)


def _list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidSnapshot("must be a list", where=f"header field {name}")
    return value


def _offer(value: object) -> Offer:
    if not isinstance(value, dict):
        raise InvalidSnapshot("must be objects", where="header field offers")
    try:
        return Offer.from_json(value)
    except InvalidInput as error:
        raise InvalidSnapshot(error.reason, where="header field offers") from None


def _revoked_certificate(value: object) -> tuple[bytes, bytes]:
    pair = _list(value, "revoked_certificates")
    if len(pair) != 2:
        raise InvalidSnapshot(
            "must be pairs of issuer identifier and serial", where="header field revoked_certificates"
        )
    return _unhex(pair[0], "revoked_certificates"), _unhex(pair[1], "revoked_certificates")


def _utc(time_unix_s: int) -> str:
    return datetime.fromtimestamp(time_unix_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
