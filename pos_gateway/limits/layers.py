"""The limits in use: a whole snapshot, and at most one delta over it.

What the delta lists stands in the delta; all else stands in the base, and lives and dies with the base's
header: a delta never extends what it does not list.
"""

from __future__ import annotations

from pos_gateway.errors import InvalidSnapshot
from pos_gateway.limits.header import (
    Freshness,
    SnapshotHeader,
    explain_freshness,
    freshness,
)
from pos_gateway.limits.record import LimitRecord
from pos_gateway.limits.snapshot import Snapshot


class Layers:
    """Verified lookups through a delta into its base."""

    def __init__(self, base: Snapshot, delta: Snapshot | None = None) -> None:
        """
        Raises:
            InvalidSnapshot: the two do not belong together.
        """
        if base.header.base_version is not None:
            raise InvalidSnapshot("a delta cannot be the base", where="header field base_version")
        if delta is not None:
            check_lies_over(delta.header, base.header)
        self.base = base
        self.delta = delta

    @property
    def newest(self) -> SnapshotHeader:
        """The header of the latest publication. Revoked certificates and the version in use are its matter;
        validity is not: that is judged by the header a record stands in."""
        return self.base.header if self.delta is None else self.delta.header

    @property
    def version(self) -> int:
        return self.newest.version

    @property
    def headers(self) -> tuple[SnapshotHeader, ...]:
        """The newest first."""
        return (self.newest,) if self.delta is None else (self.newest, self.base.header)

    def lookup(self, token_key: bytes) -> tuple[LimitRecord | None, SnapshotHeader]:
        """The token's record and the header it stands in: its nonce, its validity. No record, when both
        layers prove that there is none; that too is as old as the base.

        Raises:
            AuthenticationFailed, InvalidSnapshot: as `Snapshot.lookup`. A delta that cannot be read is
                never passed over: below it could stand a limit that it takes back.
        """
        if self.delta is not None:
            record = self.delta.lookup(token_key)
            if record is not None:
                return record, self.delta.header
        return self.base.lookup(token_key), self.base.header

    def freshness(self, now_unix_s: int) -> Freshness:
        """Of most tokens: those that stand in the base."""
        return freshness(self.base.header, now_unix_s)

    def explain(self, now_unix_s: int) -> str:
        """For staff: one plain sentence, or two when a delta is in use."""
        return " ".join(explain_freshness(header, now_unix_s) for header in self.headers)


def check_lies_over(delta: SnapshotHeader, base: SnapshotHeader) -> None:
    """
    Raises:
        InvalidSnapshot: `delta` is not a delta over `base`; names the first field at odds.
    """
    if delta.base_version != base.version:
        over = "a whole snapshot" if delta.base_version is None else f"a delta over {delta.base_version}"
        raise InvalidSnapshot(f"is {over}, not over {base.version}", where="header field base_version")
    for name in ("issuer", "currency", "token_key_epoch"):
        found, expected = getattr(delta, name), getattr(base, name)
        if found != expected:
            raise InvalidSnapshot(f"is {found!r}, in the base {expected!r}", where=f"header field {name}")
