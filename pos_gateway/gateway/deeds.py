"""What staff did or approved, in the journal: for whoever asks later."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from uuid import UUID

import structlog

from pos_gateway.errors import PosGatewayError
from pos_gateway.records import Kind, Record, uuid7

_log = structlog.get_logger(__name__)


class JournalPort(Protocol):
    """What is needed of the journal."""

    def append(self, kind: Kind, record_id: UUID, facts: Mapping[str, Any], proof: bytes = b"") -> Record: ...


class Deeds:
    """Safe to call from any thread; blocks on the disk."""

    def __init__(self, journal: JournalPort, now_unix_ms: Callable[[], int]) -> None:
        self._journal = journal
        self._now_unix_ms = now_unix_ms

    def record(self, action: str, who: Mapping[str, Any], about: UUID | None = None, **detail: Any) -> Record:
        """Durable when this returns. `who`: as `access.facts_of`.

        Raises:
            Unavailable, OutcomeUnknown: see `Journal.append`.
        """
        now = self._now_unix_ms()
        facts: dict[str, Any] = {"action": action, **who, "at_unix_ms": now, **detail}
        if about is not None:
            facts["about"] = str(about)
        return self._journal.append(Kind.STAFF_ACTION, uuid7(now, os.urandom(10)), facts)

    def note(self, action: str, who: Mapping[str, Any], about: UUID | None = None, **detail: Any) -> None:
        """The same for what must not fail because the disk is full."""
        try:
            self.record(action, who, about, **detail)
        except PosGatewayError as error:
            _log.warning("not journalled", action=action, reason=error.reason)
