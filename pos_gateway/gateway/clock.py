"""When the clock lies behind what was recorded, nothing is approved until a manager says that it is right.

That happens on boards without a battery for their clock, and after a clock ran ahead. The confirmation
is journalled, and what later records are held to begins anew from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from pos_gateway.errors import Conflict, InvalidMessage
from pos_gateway.gateway.journal import Journal
from pos_gateway.limits.header import SnapshotHeader
from pos_gateway.records import Kind, Record, uuid7

_CLOSE_ENOUGH_MS: Final = 120_000


def confirm_clock(
    journal: Journal,
    *,
    time_unix_ms: int,
    now_unix_ms: int,
    enrolled_unix_s: int,
    limits: SnapshotHeader | None,
    tolerance_s: int,
    ledger_unix_ms: int | None = None,
    random_bytes: Callable[[int], bytes] = os.urandom,
) -> Record:
    """Journal that a manager holds the machine's clock, `now`, to be right, reading `time` elsewhere.

    Raises:
        Conflict: the two differ: the clock must be set first.
        InvalidMessage: no time before the enrolment, or before the limits in use were published, can be
            right; nor one that the ledger's clock, heard lately, has passed long ago.
        Unavailable, OutcomeUnknown: see `Journal.append`.
    """
    if abs(time_unix_ms - now_unix_ms) > _CLOSE_ENOUGH_MS:
        raise Conflict(
            f"this machine's clock says {_utc(now_unix_ms)}, not {_utc(time_unix_ms)}",
            advice="set it first (timedatectl set-time), then confirm it",
        )
    bounds = [(enrolled_unix_s, "this gateway was enrolled")]
    if limits is not None:
        bounds.append((limits.valid_from_unix_s, f"limits {limits.version} were published"))
    if ledger_unix_ms is not None:
        bounds.append((ledger_unix_ms // 1000, "the ledger was spoken to"))
    for bound_unix_s, what in bounds:
        if now_unix_ms // 1000 < bound_unix_s - tolerance_s:
            raise InvalidMessage(
                f"{_utc(now_unix_ms)} cannot be right: {what} at {_utc(bound_unix_s * 1000)}",
                where="time",
                advice="set the clock first (timedatectl set-time), then confirm it",
            )
    return journal.append(
        Kind.CLOCK_CONFIRMATION,
        uuid7(now_unix_ms, random_bytes(10)),
        {"at_unix_ms": now_unix_ms, "high_water_unix_ms": journal.latest_at_unix_ms},
    )


def _utc(time_unix_ms: int) -> str:
    return datetime.fromtimestamp(time_unix_ms // 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
