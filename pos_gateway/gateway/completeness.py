"""Up to which tap time the ledger may take this gateway's approvals as complete. Never too high.

The claim T beside a batch says: whatever this gateway approved, or will ever approve, with a tap time up
to T is acknowledged or in this batch. What could break it, and what is held against it:

- an approval that waits, or is in the other batch on its way: T stays below its tap time;
- a payment begun whose card has not answered yet: T stays below the time it will carry (`OpenPayments`);
- a payment begun later by a clock that jumped back: it is declined unless its time is at most the
  tolerance behind the latest recorded one, so T stays further behind that. The latest recorded time is
  on the disk before T is told, so a restart changes nothing;
- a manager who confirms an earlier time, or a journal from a backup: T also stays behind what the
  ledger's own clock said, by the issuer's tolerance too.

The order matters: latest recorded time first, then the open payments, then the queue. A payment is open
before it looks at the latest recorded time, and in the queue before it is closed. Nothing is claimed if a
manager confirmed the clock in between.
"""

from __future__ import annotations

import threading
from uuid import UUID


class OpenPayments:
    """The times that payments under way will carry. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at_unix_ms: dict[UUID, int] = {}

    def begin(self, payment_id: UUID, at_unix_ms: int) -> None:
        with self._lock:
            self._at_unix_ms[payment_id] = at_unix_ms

    def end(self, payment_id: UUID) -> None:
        """It is journalled, or can never be approved any more."""
        with self._lock:
            self._at_unix_ms.pop(payment_id, None)

    def earliest_unix_ms(self) -> int | None:
        with self._lock:
            return min(self._at_unix_ms.values(), default=None)


def complete_until(
    *,
    latest_recorded_unix_ms: int,
    ledger_unix_ms: int,
    earliest_open_unix_ms: int | None,
    earliest_left_out_unix_ms: int | None,
    clock_tolerance_s: int,
    issuer_tolerance_s: int,
) -> int:
    """The claim for one batch; 0 or less: nothing can be claimed.

    `ledger_unix_ms`: a time that the ledger's clock has surely reached. `earliest_left_out_unix_ms`: of
    the approvals that are neither acknowledged nor in the batch.
    """
    bounds = [
        latest_recorded_unix_ms - 1000 * clock_tolerance_s,
        ledger_unix_ms - 1000 * (clock_tolerance_s + issuer_tolerance_s),
    ]
    bounds += [bound for bound in (earliest_open_unix_ms, earliest_left_out_unix_ms) if bound is not None]
    return min(bounds) - 1
