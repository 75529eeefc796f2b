"""Logs hold no card data: what is not known to be harmless is not printed.

Field names that this program logs are listed; the value of any other field is replaced. In the values
that remain, anything that could be a token number is shortened to its last four digits.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from typing import Any, Final

REDACTED: Final = "[redacted]"

_KNOWN_FIELDS: Final = frozenset(
    {
        "address",
        "batch",
        "code",
        "conflict",
        "count",
        "duplicate",
        "error",
        "event",
        "exception",
        "gateway",
        "gateway_id",
        "host",
        "invalid",
        "kind",
        "lane",
        "late",
        "level",
        "merchant_id",
        "method",
        "path",
        "payment",
        "peer",
        "place",
        "port",
        "posted",
        "reader",
        "reason",
        "records",
        "seconds",
        "status",
        "step",
        "timestamp",
        "unknown",
        "verdicts",
        "version",
    }
)
_NUMBER: Final = re.compile(r"(?<![0-9A-Za-z])(?:\d[ -]?){8,15}(\d{4})(?![0-9A-Za-z])", re.ASCII)
_UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII | re.IGNORECASE)


def redact_text(text: str) -> str:
    """Shorten whatever could be a card number; ids keep their digits."""
    parts, at = [], 0
    for found in _UUID.finditer(text):
        parts += [_NUMBER.sub(r"••••\1", text[at : found.start()]), found[0]]
        at = found.end()
    return "".join([*parts, _NUMBER.sub(r"••••\1", text[at:])])


def redact_event(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor."""
    for name, value in event.items():
        if name not in _KNOWN_FIELDS or isinstance(value, bytes | bytearray | memoryview):
            event[name] = REDACTED
        elif not isinstance(value, bool | int | float | None):
            event[name] = redact_text(str(value))
    return event
