"""What became of a request, by what the journal and the store keep; every call blocks on the disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final
from uuid import UUID

from pos_gateway.authorization.reasons import Reason
from pos_gateway.errors import NotFound
from pos_gateway.gateway.journal import Journal
from pos_gateway.gateway.lane import PaymentView
from pos_gateway.gateway.lane import State as LaneState
from pos_gateway.gateway.nexo import answers, wire
from pos_gateway.gateway.nexo.answers import Outcome, Place
from pos_gateway.gateway.nexo.messages import Key, PaymentKind, PaymentOrder, ReversalOrder, SaleData
from pos_gateway.gateway.nexo.store import KEEP_MS, Counted, Row, Store
from pos_gateway.gateway.nexo.transitions import Condition, Event, State, after, told
from pos_gateway.gateway.payments import Payments
from pos_gateway.records import Kind

ANY_DIGEST: Final = b""
"""Of a request known by its key alone: aborted before it came, or read back from the journal."""
SMALLER_MAY_DO: Final = (Reason.OVER_CEILING, Reason.OVER_TAP_CAP)

_JOURNAL_PAGE: Final = 1000
_WHOLE_ONLY: Final = (
    "A part cannot be offered: how much is left, only card and issuer know. Name the smallest part that you"
    " take (MinimumSplitAmount), or ask for less."
)


class Fates:
    """Makes answers, and finds out what to answer."""

    def __init__(
        self,
        place: Place,
        payments: Payments,
        journal: Journal,
        store: Store,
        now_unix_ms: Callable[[], int],
        new_id: Callable[[], UUID],
    ) -> None:
        self._place = place
        self._payments = payments
        self._journal = journal
        self._store = store
        self._now_unix_ms = now_unix_ms
        self._new_id = new_id
        self._doubtful: dict[Key, int] = {}
        """Requests whose fate the journal could not tell, with its last sequence then: it is believed again
        once it has written something since."""

    def recover(self) -> int:
        """Before anything is taken: settle what the last run left without an end; how many there were.

        Raises:
            Unavailable: store or journal cannot be read.
        """
        if self._store.is_empty() and self._journal.last_sequence:
            self._relearn()
        rows = self._store.unanswered()
        for row in rows:
            self.resolve(row)
        return len(rows)

    def doubt(self, key: Key) -> None:
        self._doubtful[key] = self._journal.last_sequence

    def resolve(self, row: Row) -> bytes | None:
        """End a request that nobody works on by what the journal says; None while it cannot be believed."""
        if self._journal.last_sequence <= self._doubtful.get(row.key, -1):
            return None
        if row.category == "Reconciliation":
            event, outcome = Event.NOT_IN_JOURNAL, None
        else:
            event, outcome = self.from_journal(row)
        if event is Event.OUTCOME_UNKNOWN:
            return None
        state = after(State.OPEN, event)
        if outcome is None or outcome.state is not state:
            outcome = Outcome(state)
        answer = self._store.end(row.key, state, self.build(row, outcome), self.counted(row, outcome))
        self._doubtful.pop(row.key, None)
        return answer

    def from_journal(self, row: Row) -> tuple[Event, Outcome | None]:
        order = order_of(row)
        if not (isinstance(order, PaymentOrder) and order.kind is PaymentKind.SALE):
            try:
                record = self._journal.get(row.payment_id)
            except NotFound:
                return Event.NOT_IN_JOURNAL, None
            return Event.APPROVED, Outcome(State.APPROVED, amount_minor=record.facts()["amount_minor"])
        declined: PaymentView | None = None
        for payment_id in (row.second_id, row.payment_id):
            try:
                view = self._payments.show(payment_id)
            except NotFound:
                continue
            if view.state is LaneState.APPROVED:
                part = payment_id == row.second_id
                return Event.APPROVED, Outcome(
                    State.APPROVED, view=view, amount_minor=view.amount_minor, part=part
                )
            if view.state is LaneState.DECLINED:
                declined = declined or view
            elif not view.state.final:
                return Event.OUTCOME_UNKNOWN, None
        if declined is not None and declined.reason is not None:
            return Event.DECLINED, declined_outcome(order, declined, declined.reason)
        return Event.NOT_IN_JOURNAL, None

    def _relearn(self) -> None:
        """The store is new and the journal is not: take the last two days' approvals from there."""
        oldest_unix_ms, before = self._now_unix_ms() - KEEP_MS, self._journal.last_sequence
        while before > 0:
            first = max(0, before - _JOURNAL_PAGE)
            records = self._journal.records(first, before - first)
            for record in records:
                if record.kind is not Kind.AUTHORIZATION or "pos" not in (facts := record.facts()):
                    continue
                told_by_pos = facts["pos"]
                order = PaymentOrder(
                    kind=PaymentKind.SALE,
                    amount_minor=facts["amount_minor"],
                    sale=SaleData(
                        transaction_id=told_by_pos["transaction_id"], time_stamp=told_by_pos["time_stamp"]
                    ),
                    instalments="plan" in facts,
                )
                self._store.begin(
                    Row(
                        key=Key(told_by_pos["sale_id"], told_by_pos["poi_id"], told_by_pos["service_id"]),
                        category="Payment",
                        digest=ANY_DIGEST,
                        payment_id=record.id,
                        second_id=self._new_id(),
                        at_unix_ms=facts["at_unix_ms"],
                        asked=order.to_json(),
                    )
                )
            if not records or records[0].facts()["at_unix_ms"] < oldest_unix_ms:
                return
            before = first

    def build(self, row: Row, outcome: Outcome) -> bytes:
        order = order_of(row)
        if isinstance(order, PaymentOrder):
            return wire.dumps(answers.payment_answer(self._place, row, order, outcome))
        if isinstance(order, ReversalOrder):
            return wire.dumps(answers.reversal_answer(self._place, row, order, outcome))
        default = told(outcome.state)
        condition = outcome.condition or default.condition or Condition.NOT_ALLOWED
        return answers.failed(row, condition, default.sentence.english)

    def counted(self, row: Row, outcome: Outcome) -> Counted | None:
        order = order_of(row)
        if order is None:
            return None
        sale, amount_minor = order.sale, outcome.amount_minor
        if isinstance(order, ReversalOrder):
            kind = "ReverseDebit"
        elif order.kind is PaymentKind.REFUND:
            kind = "Credit"
        else:
            kind = "IssuerInstalment" if order.instalments else "Debit"
        if outcome.state is State.DECLINED:
            kind, amount_minor = "Declined", order.amount_minor or 0
        elif outcome.state is not State.APPROVED:
            return None
        return Counted(kind, amount_minor, sale.operator_id, sale.shift)


def declined_outcome(order: PaymentOrder, view: PaymentView, reason: Reason) -> Outcome:
    message = answers.decline_message(reason, order.sale.language)
    if order.any_part and order.least_minor is None and reason in SMALLER_MAY_DO:
        message = f"{message} {_WHOLE_ONLY}"
    return Outcome(State.DECLINED, answers.decline_condition(reason), message, view)


def order_of(row: Row) -> PaymentOrder | ReversalOrder | None:
    if row.category == "Payment":
        return PaymentOrder.from_json(row.asked)
    if row.category == "Reversal":
        return ReversalOrder.from_json(row.asked)
    return None
