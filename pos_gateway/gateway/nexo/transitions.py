"""What may become of a request that moves money: one table, pure.

Every request is in one `State`; `Event`s move it; an end is never left. `approved` is reached through
the journal's word alone, and an abort never undoes it: whoever asked before, during or after the TC is
told what the journal says.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Condition(Enum):
    """ErrorCondition (nexo Retailer 3.0)."""

    ABORTED = "Aborted"
    BUSY = "Busy"
    CANCEL = "Cancel"
    IN_PROGRESS = "InProgress"
    INVALID_CARD = "InvalidCard"
    MESSAGE_FORMAT = "MessageFormat"
    NOT_ALLOWED = "NotAllowed"
    NOT_FOUND = "NotFound"
    PAYMENT_RESTRICTION = "PaymentRestriction"
    REFUSAL = "Refusal"
    UNAVAILABLE_DEVICE = "UnavailableDevice"
    UNAVAILABLE_SERVICE = "UnavailableService"


class State(Enum):
    """Where a request stands. `value` is what the store keeps."""

    NEW = "new"
    OPEN = "open"
    ABORTING = "aborting"
    """The POS has asked for its end; a card that has answered decides otherwise."""
    DOUBTFUL = "doubtful"
    """The journal could not say what it holds: told as in progress until it can."""
    APPROVED = "approved"
    DECLINED = "declined"
    REFUSED = "refused"
    """Nothing was begun: not allowed, no such payment, no room on the disk."""
    ABORTED = "aborted"
    CANCELLED = "cancelled"
    """No card came in time, or the staff ended it here."""
    BUSY = "busy"
    NO_READER = "no_reader"
    FAILED = "failed"
    LOST = "lost"
    """The gateway stopped in mid-payment, and the journal holds no approval of it."""

    @property
    def ended(self) -> bool:
        return self not in _GOING_ON


class Event(Enum):
    REQUESTED = "requested"
    ABORT_ASKED = "abort asked"
    LANE_TAKEN = "lane taken"
    REFUSED = "refused"
    APPROVED = "approved"
    DECLINED = "declined"
    CANCELLED = "cancelled"
    READER_GONE = "reader gone"
    FAILED = "failed"
    OUTCOME_UNKNOWN = "outcome unknown"
    NOT_IN_JOURNAL = "not in journal"
    """Nobody works on it any more, and the journal, which can be read, says nothing of it."""


_GOING_ON: Final = (State.NEW, State.OPEN, State.ABORTING, State.DOUBTFUL)

TABLE: Final = {
    (State.NEW, Event.REQUESTED): State.OPEN,
    (State.NEW, Event.ABORT_ASKED): State.ABORTED,
    (State.OPEN, Event.ABORT_ASKED): State.ABORTING,
    (State.OPEN, Event.LANE_TAKEN): State.BUSY,
    (State.OPEN, Event.REFUSED): State.REFUSED,
    (State.OPEN, Event.APPROVED): State.APPROVED,
    (State.OPEN, Event.DECLINED): State.DECLINED,
    (State.OPEN, Event.CANCELLED): State.CANCELLED,
    (State.OPEN, Event.READER_GONE): State.NO_READER,
    (State.OPEN, Event.FAILED): State.FAILED,
    (State.OPEN, Event.OUTCOME_UNKNOWN): State.DOUBTFUL,
    (State.OPEN, Event.NOT_IN_JOURNAL): State.LOST,
    (State.ABORTING, Event.LANE_TAKEN): State.BUSY,
    (State.ABORTING, Event.REFUSED): State.REFUSED,
    (State.ABORTING, Event.APPROVED): State.APPROVED,
    (State.ABORTING, Event.DECLINED): State.DECLINED,
    (State.ABORTING, Event.CANCELLED): State.ABORTED,
    (State.ABORTING, Event.READER_GONE): State.ABORTED,
    (State.ABORTING, Event.FAILED): State.FAILED,
    (State.ABORTING, Event.OUTCOME_UNKNOWN): State.DOUBTFUL,
    (State.ABORTING, Event.NOT_IN_JOURNAL): State.ABORTED,
    (State.DOUBTFUL, Event.APPROVED): State.APPROVED,
    (State.DOUBTFUL, Event.DECLINED): State.DECLINED,
    (State.DOUBTFUL, Event.NOT_IN_JOURNAL): State.LOST,
}


def after(state: State, event: Event) -> State:
    """The state that follows; what the table does not list changes nothing."""
    return TABLE.get((state, event), state)


@dataclass(frozen=True, slots=True)
class Sentence:
    """What a POS can show."""

    english: str
    chinese: str

    def told(self, language: str) -> str:
        return self.chinese if language.lower().startswith("zh") else self.english


@dataclass(frozen=True, slots=True)
class Told:
    """How an end is told when nothing more is known of it; None: success."""

    condition: Condition | None
    sentence: Sentence


TOLD: Final = {
    State.OPEN: Told(Condition.IN_PROGRESS, Sentence("Still in progress.", "交易进行中。")),
    State.APPROVED: Told(None, Sentence("Approved", "交易成功")),
    State.DECLINED: Told(Condition.REFUSAL, Sentence("Declined.", "交易被拒绝。")),
    State.REFUSED: Told(Condition.NOT_ALLOWED, Sentence("Not allowed.", "不允许此操作。")),
    State.ABORTED: Told(
        Condition.ABORTED, Sentence("Cancelled by the POS. Nothing was charged.", "收银端已取消，未扣款。")
    ),
    State.CANCELLED: Told(
        Condition.CANCEL, Sentence("No card was presented. Nothing was charged.", "未出示卡片，未扣款。")
    ),
    State.BUSY: Told(
        Condition.BUSY, Sentence("This reader is taking another payment.", "读卡器正在处理其他交易。")
    ),
    State.NO_READER: Told(
        Condition.UNAVAILABLE_DEVICE,
        Sentence("The reader is missing. Nothing was charged.", "未找到读卡器，未扣款。"),
    ),
    State.FAILED: Told(
        Condition.UNAVAILABLE_SERVICE,
        Sentence("The gateway could not finish. Nothing was charged.", "网关未能完成交易，未扣款。"),
    ),
    State.LOST: Told(
        Condition.ABORTED,
        Sentence("The gateway was restarted. Nothing was charged.", "网关已重启，未扣款。"),
    ),
}


def told(state: State) -> Told:
    """What going on looks like is one thing, whatever is behind it."""
    return TOLD[state if state.ended else State.OPEN]
