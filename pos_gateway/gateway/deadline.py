"""The presentment deadline: what was approved and is not with the ledger in time is no longer guaranteed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from pos_gateway.authorization.policy import Exposure
from pos_gateway.money import Currency, Money

_LEAST_WARNING_S: Final = 86_400


class Urgency(Enum):
    FINE = "fine"
    NEAR = "near"
    PASSED = "passed"


@dataclass(frozen=True, slots=True)
class Deadline:
    """How the oldest approval without an acknowledgement stands. `count` and `amount_minor`: of those that
    are near the deadline or past it. `due_unix_ms`: when the oldest must be with the ledger."""

    urgency: Urgency
    due_unix_ms: int | None = None
    count: int = 0
    amount_minor: int = 0

    def as_json(self, unit: Currency, now_unix_ms: int) -> dict[str, Any]:
        english, chinese = self._sentences(unit, now_unix_ms)
        return {
            "urgency": self.urgency.value,
            "due_unix_ms": self.due_unix_ms,
            "count": self.count,
            "amount_minor": self.amount_minor,
            "amount": str(Money(self.amount_minor, unit)),
            "english": english,
            "chinese": chinese,
        }

    def _sentences(self, unit: Currency, now_unix_ms: int) -> tuple[str, str]:
        amount = str(Money(self.amount_minor, unit))
        if self.urgency is Urgency.FINE or self.due_unix_ms is None:
            return "", ""
        if self.urgency is Urgency.PASSED:
            return (
                f"{amount} in {self.count} payments: the oldest is past the issuer's deadline and may not be "
                "paid. Connect this till now, or carry its queue to the issuer "
                "(pos-gateway journal carry FILE).",
                f"共 {self.count} 笔、{amount}：最早的一笔已超过发卡方的提交期限，可能得不到付款。"
                "请立即联网，或将待提交交易导出后送交发卡方（pos-gateway journal carry 文件）。",
            )
        hours = (self.due_unix_ms - now_unix_ms) // 3_600_000
        return (
            f"{amount} in {self.count} payments must reach the issuer soon, the oldest within {hours} h, or "
            "they may not be paid. Connect this till, or carry its queue to the issuer "
            "(pos-gateway journal carry FILE).",
            f"共 {self.count} 笔、{amount} 须尽快送达发卡方，最早的一笔须在 {hours} 小时内，"
            "否则可能得不到付款。请联网，或将待提交交易导出后送交发卡方（pos-gateway journal carry 文件）。",
        )


def deadline(
    exposure: Exposure,
    waiting_since: Callable[[int], tuple[int, int]],
    *,
    presentment_deadline_s: int | None,
    warn_share_percent: int,
    now_unix_ms: int,
) -> Deadline:
    """
    `waiting_since`: how many wait, and the money in them, that were tapped up to a time.
    `presentment_deadline_s`: None while the issuer's limits are not known. Warned is for the last
    `warn_share_percent` of it, at least for a day.
    """
    if exposure.oldest_at_unix_ms is None or presentment_deadline_s is None:
        return Deadline(Urgency.FINE)
    warning_s = max(presentment_deadline_s * warn_share_percent // 100, _LEAST_WARNING_S)
    due_unix_ms = exposure.oldest_at_unix_ms + 1000 * presentment_deadline_s
    if now_unix_ms < due_unix_ms - 1000 * warning_s:
        return Deadline(Urgency.FINE, due_unix_ms)
    near_unix_ms = now_unix_ms - 1000 * (presentment_deadline_s - warning_s)
    count, amount_minor = waiting_since(near_unix_ms)
    urgency = Urgency.PASSED if now_unix_ms > due_unix_ms else Urgency.NEAR
    return Deadline(urgency, due_unix_ms, count, amount_minor)
