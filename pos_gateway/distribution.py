"""What stands in the issuer's TUF repository: the words that ledger and gateway share about it.

The repository is static files, on the ledger's server or on a stick:

    metadata/   N.root.json, N.targets.json, N.snapshot.json, timestamp.json
    targets/    SHA-256.NAME, NAME being one of
                limits-V.snapshot    version V whole
                limits-B-V.delta     what changed since version B, to be laid over it
                limits-V.head        V's signed header alone

Who may sign limits stands in the root metadata, in a field of our own that any TUF client skips. So only
a threshold of root keys can change it, and whoever holds TUF keys alone cannot make a limit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from tuf.api.metadata import Root

from pos_gateway.errors import InvalidMessage

METADATA: Final = "metadata"
TARGETS: Final = "targets"
TIMESTAMP: Final = f"{METADATA}/timestamp.json"

LIMIT_KEYS_FIELD: Final = "x-pos-gateway-limit-keys"
MAX_LIMIT_KEYS: Final = 64

_NAME: Final = re.compile(
    r"limits-(?:(?P<base>[1-9]\d{0,15})-)?(?P<version>[1-9]\d{0,15})\.(?P<kind>snapshot|delta|head)", re.ASCII
)


@dataclass(frozen=True, slots=True)
class LimitFile:
    """A target's name, taken apart. `base` is None for all but a delta."""

    kind: str
    version: int
    base: int | None = None

    @property
    def name(self) -> str:
        span = f"{self.base}-{self.version}" if self.base is not None else str(self.version)
        return f"limits-{span}.{self.kind}"


def whole_file(version: int) -> LimitFile:
    return LimitFile("snapshot", version)


def delta_file(base: int, version: int) -> LimitFile:
    return LimitFile("delta", version, base)


def head_file(version: int) -> LimitFile:
    return LimitFile("head", version)


def parse_name(name: str) -> LimitFile | None:
    """None for a name that is none of ours."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    base = int(match["base"]) if match["base"] else None
    version = int(match["version"])
    if (base is not None) != (match["kind"] == "delta") or (base is not None and base >= version):
        return None
    return LimitFile(match["kind"], version, base)


def metadata_path(role: str, version: int) -> str:
    return f"{METADATA}/{version}.{role}.json"


def target_path(name: str, sha256: str) -> str:
    return f"{TARGETS}/{sha256}.{name}"


def key_id(key: Ed25519PublicKey) -> str:
    """The one id of a signing key wherever it stands: in metadata, in heads, in file names."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class LimitKeys:
    """Who may sign limits, and how many of them must."""

    keys: Mapping[str, Ed25519PublicKey]
    threshold: int

    def to_field(self) -> dict[str, Any]:
        return {
            "keys": {name: key.public_bytes_raw().hex() for name, key in sorted(self.keys.items())},
            "threshold": self.threshold,
        }

    @classmethod
    def of(cls, root: Root) -> LimitKeys:
        """Those named by a verified root.

        Raises:
            InvalidMessage: the field is missing, or not of this shape.
        """
        field: Any = root.unrecognized_fields.get(LIMIT_KEYS_FIELD)
        where = f"root metadata, field {LIMIT_KEYS_FIELD}"
        try:
            threshold, named = field["threshold"], field["keys"]
            keys = {
                str(name): Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
                for name, text in named.items()
            }
        except (TypeError, KeyError, ValueError, AttributeError):
            raise InvalidMessage("does not say who may sign limits", where=where) from None
        if type(threshold) is not int or not 1 <= threshold <= len(keys) <= MAX_LIMIT_KEYS:
            raise InvalidMessage("a threshold that its keys cannot reach", where=where)
        if any(key_id(key) != name for name, key in keys.items()):
            raise InvalidMessage("a key under a name that is not its own", where=where)
        return cls(keys, threshold)
