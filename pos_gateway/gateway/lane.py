"""A lane: one reader and the payment it is taking, in a thread of their own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final
from uuid import UUID

import structlog

from pos_gateway.authorization.decision import Decline
from pos_gateway.authorization.reasons import Reason
from pos_gateway.errors import OutcomeUnknown, PosGatewayError, ReaderUnavailable, Unavailable
from pos_gateway.gateway.readers.port import CardChannel, Indication, Reader
from pos_gateway.gateway.till import Approved, Declined, Outcome, Payment, Step, Till
from pos_gateway.instalments import Offer, Quote, quote
from pos_gateway.money import Currency, Money
from pos_gateway.records import Record

_log = structlog.get_logger(__name__)

_READER_RETRY_S: Final = 0.5
_WAIT_SLICE_S: Final = 1.0


class State(Enum):
    """Where a payment stands. The last four are final."""

    REMOVE_CARD = "remove_card"
    PRESENT_CARD = "present_card"
    PROCESSING = "processing"
    TAP_AGAIN = "tap_again"
    READER_MISSING = "reader_missing"
    APPROVED = "approved"
    DECLINED = "declined"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def final(self) -> bool:
        return self in (State.APPROVED, State.DECLINED, State.CANCELLED, State.FAILED)


@dataclass(frozen=True, slots=True)
class PaymentView:
    """What anybody may see of a payment."""

    id: UUID
    amount_minor: int
    currency: Currency
    state: State
    step: str = ""
    reason: Reason | None = None
    message: str = ""
    token_last4: str = ""
    sequence: int | None = None
    """The journal sequence of the approval."""
    refunded_minor: int = 0
    voided: bool = False
    plan: Quote | None = None
    lane: str = ""
    """Where it is, or was, being taken; unknown after a restart."""
    facts: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    """Of an approval that was just journalled."""
    online: bool = False
    """The ledger raised the ceiling for this tap."""
    doubtful: bool = False
    """It failed in a way that leaves open whether the journal holds it."""

    def as_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "id": str(self.id),
            "amount_minor": self.amount_minor,
            "currency": self.currency.code,
            "amount": str(Money(self.amount_minor, self.currency)),
            "state": self.state.value,
            "final": self.state.final,
            "step": self.step,
            "message": self.message,
            "token_last4": self.token_last4,
            "lane": self.lane,
            "sequence": self.sequence,
            "refunded_minor": self.refunded_minor,
            "voided": self.voided,
            "plan": self.plan.to_json() if self.plan is not None else None,
            "reason": None,
        }
        if self.reason is not None:
            told = self.reason.explanation
            out |= {
                "reason": self.reason.value,
                "response_code": told.response_code,
                "english": told.english,
                "chinese": told.chinese,
            }
        return out

    @classmethod
    def of_authorization(cls, record: Record, currency: Currency) -> PaymentView:
        """What the journal alone knows: it was approved."""
        facts = record.facts()
        return cls(
            id=record.id,
            amount_minor=facts["amount_minor"],
            currency=currency,
            state=State.APPROVED,
            token_last4=facts["token_last4"],
            sequence=record.sequence,
            plan=plan_of(facts),
            online=facts.get("limit_source") == "grant",
        )


class Lane:
    """Takes one payment at a time.

    `show` is called from the lane's thread with each new view of the payment, `observe` with each tap's
    outcome and how many seconds it took.
    """

    def __init__(
        self,
        name: str,
        reader: Reader,
        till: Till,
        *,
        card_timeout_s: float,
        show: Callable[[PaymentView], None],
        observe: Callable[[Outcome, float], None] = lambda outcome, took_s: None,
    ) -> None:
        self.name = name
        self.reader_present = True
        """Is its reader plugged in? Kept by whoever looks for readers."""
        self._reader = reader
        self._till = till
        self._card_timeout_s = card_timeout_s
        self._show = show
        self._observe = observe
        self._inbox: queue.SimpleQueue[Payment | None] = queue.SimpleQueue()
        self._busy = threading.Lock()
        self._cancelled = threading.Event()
        self._taken = threading.Lock()
        """Guards which payment a cancellation is meant for."""
        self._current: UUID | None = None
        self._card_may_remain = False
        self._paid: tuple[Approved, CardChannel] | None = None
        self._thread = threading.Thread(target=self._run, name=f"lane {name}", daemon=True)

    @property
    def reader_name(self) -> str:
        return self._reader.name

    @property
    def busy(self) -> bool:
        return self._busy.locked()

    def start(self) -> None:
        self._thread.start()

    def take(self, payment: Payment) -> PaymentView:
        """Begin a payment; its progress is told through `show`.

        Raises:
            Unavailable: the lane is taking another payment.
        """
        if not self._busy.acquire(blocking=False):
            raise Unavailable(
                f"lane {self.name} is taking another payment", advice="finish or cancel that payment first"
            )
        with self._taken:
            self._current = payment.id
            self._cancelled.clear()
        view = self._view(payment, State.PRESENT_CARD)
        self._inbox.put(payment)
        return view

    def cancel(self, payment_id: UUID) -> None:
        """Cancel the payment, if it is the one being taken and no card is being asked; a TC that was given
        decides otherwise."""
        with self._taken:
            if payment_id != self._current:
                return
            self._cancelled.set()
        self._reader.interrupt()

    def close(self) -> None:
        self._inbox.put(None)
        self._cancelled.set()
        self._reader.interrupt()
        self._thread.join(timeout=5)
        self._reader.close()

    def _run(self) -> None:
        while (payment := self._inbox.get()) is not None:
            try:
                final = self._pay(payment)
            except PosGatewayError as error:
                _log.error("payment failed", payment=str(payment.id), reason=error.reason)
                final = self._view(payment, State.FAILED, message=str(error))
                final = replace(final, doubtful=isinstance(error, OutcomeUnknown))
            except Exception as error:  # noqa: BLE001 - one payment's bug must not end the lane
                _log.exception("payment failed", payment=str(payment.id))
                final = self._view(payment, State.FAILED, message=f"internal error {type(error).__name__}")
            self._till.end(payment)
            self._reader.indicate(
                Indication.APPROVED if final.state is State.APPROVED else Indication.DECLINED
            )
            self._busy.release()
            self._show(final)
            self._finish()

    def _finish(self) -> None:
        """What an approval leaves to do with the card, if it is still there; the next payment waits for it
        in the inbox."""
        approved, self._paid = self._paid, None
        if approved is not None:
            outcome, channel = approved
            try:
                self._till.finish(outcome, channel)
            except Exception:  # noqa: BLE001 - the payment is over: nothing here may end the lane
                _log.exception("not finished with the card", payment=str(outcome.record.id))
            finally:
                channel.close()

    def _pay(self, payment: Payment) -> PaymentView:
        deadline = time.monotonic() + self._card_timeout_s
        torn: Decline | None = None
        while not self._cancelled.is_set() and (left_s := deadline - time.monotonic()) > 0:
            try:
                outcome = self._one_tap(payment, min(left_s, _WAIT_SLICE_S), torn)
            except ReaderUnavailable as error:
                self._show(self._view(payment, State.READER_MISSING, message=str(error)))
                self._cancelled.wait(_READER_RETRY_S)
                continue
            if isinstance(outcome, Approved):
                view = PaymentView.of_authorization(outcome.record, self._till.station.currency)
                return replace(view, lane=self.name, facts=outcome.record.facts())
            if isinstance(outcome, Declined):
                return self._declined(payment, outcome)
            if outcome is not None:
                torn = outcome.decline
        if torn is not None:
            return self._declined(payment, self._till.give_up(payment, torn))
        why = "cancelled" if self._cancelled.is_set() else "no card was presented in time"
        return self._view(payment, State.CANCELLED, message=why)

    def _one_tap(self, payment: Payment, timeout_s: float, torn: Decline | None) -> Outcome | None:
        """One card's visit to the field; None if none came in time."""
        if self._card_may_remain:
            self._reader.indicate(Indication.REMOVE_CARD)
            if not self._reader.wait_for_removal(timeout_s):
                self._show(self._view(payment, State.REMOVE_CARD))
                return None
            self._card_may_remain = False
        self._reader.indicate(Indication.PRESENT_CARD)
        state = State.TAP_AGAIN if torn else State.PRESENT_CARD
        self._show(self._view(payment, state, reason=torn.reason if torn else None))
        channel = self._reader.wait_for_card(timeout_s)
        if channel is None:
            return None
        self._card_may_remain = True
        self._reader.indicate(Indication.PROCESSING)
        outcome: Outcome | None = None
        try:
            began_s = time.monotonic()
            outcome = self._till.tap(payment, channel, lambda step: self._progress(payment, step))
            self._observe(outcome, time.monotonic() - began_s)
            return outcome
        finally:
            if isinstance(outcome, Approved):
                self._paid = outcome, channel  # told first, see `_finish`
            else:
                channel.close()

    def _progress(self, payment: Payment, step: Step) -> None:
        self._show(self._view(payment, State.PROCESSING, step=step.value))

    def _declined(self, payment: Payment, outcome: Declined) -> PaymentView:
        view = self._view(payment, State.DECLINED, reason=outcome.decline.reason)
        return replace(view, message=outcome.decline.detail, token_last4=outcome.token_last4 or "")

    def _view(
        self,
        payment: Payment,
        state: State,
        *,
        step: str = "",
        reason: Reason | None = None,
        message: str = "",
    ) -> PaymentView:
        return PaymentView(
            id=payment.id,
            amount_minor=payment.amount_minor,
            currency=self._till.station.currency,
            state=state,
            step=step,
            reason=reason,
            message=message,
            plan=payment.plan,
            lane=self.name,
        )


def plan_of(facts: Mapping[str, Any]) -> Quote | None:
    """The instalments that a journalled payment was made in; None if in none."""
    if (plan := facts.get("plan")) is None:
        return None
    return quote(Offer.from_json(plan["offer"]), facts["amount_minor"], plan["periods"])
