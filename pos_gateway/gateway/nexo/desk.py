"""Takes requests from POS software, has them done, and answers.

Everything here that has state runs on the event loop; the store, the journal and the lanes are met in
threads. A request goes on whether its POS still listens or not; what became of it is told whenever it is
asked for again: from memory while it goes on, from the store once it has ended, from the journal if the
gateway was stopped in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

import structlog

import pos_gateway
from pos_gateway.authorization.reasons import Reason
from pos_gateway.errors import (
    Conflict,
    InvalidInput,
    InvalidMessage,
    NotFound,
    OutcomeUnknown,
    PosGatewayError,
    Unavailable,
)
from pos_gateway.gateway.journal import Journal
from pos_gateway.gateway.lane import PaymentView
from pos_gateway.gateway.lane import State as LaneState
from pos_gateway.gateway.nexo import answers, messages, wire
from pos_gateway.gateway.nexo.answers import Outcome, Place
from pos_gateway.gateway.nexo.lanes import MODEL, PoiNames
from pos_gateway.gateway.nexo.messages import (
    Header,
    Key,
    PaymentKind,
    PaymentOrder,
    Refused,
    ReversalOrder,
    SaleData,
    Session,
    TotalsOrder,
)
from pos_gateway.gateway.nexo.store import KEEP_MS, Counted, Row, Store, Total
from pos_gateway.gateway.nexo.transitions import Condition, Event, State, after, told
from pos_gateway.gateway.payments import Payments, PlanChoice
from pos_gateway.records import Kind

_log = structlog.get_logger(__name__)

_MAX_SESSIONS: Final = 1000
_MAX_GOING_ON: Final = 256
_JOURNAL_PAGE: Final = 1000
_KEEP_LATER_S: Final = 0.02
_WRITING_TIMEOUT_S: Final = 30.0
_ANY_DIGEST: Final = b""
"""Of a request known by its key alone: aborted before it came, or read back from the journal."""
_SMALLER_MAY_DO: Final = (Reason.OVER_CEILING, Reason.OVER_TAP_CAP)
_NOT_THIS: Final = "this ServiceID stands for another request of the last 48 hours"
_WHOLE_ONLY: Final = (
    "A part cannot be offered: how much is left, only card and issuer know. Name the smallest part that you"
    " take (MinimumSplitAmount), or ask for less."
)


class Reply(NamedTuple):
    """What goes back. `body`: the inside of the envelope, as JSON."""

    envelope: str
    body: bytes
    header: dict[str, Any]


@dataclass(slots=True, eq=False)
class _Live:
    """A request that somebody works on."""

    key: Key
    digest: bytes
    order: PaymentOrder | ReversalOrder | None
    done: asyncio.Future[bytes]
    state: State = State.OPEN
    row: Row | None = None
    started: list[UUID] = field(default_factory=list)
    reader_gone: bool = False
    asks_for_part: bool = False
    """The whole amount was too much."""


class _WrittenDown:
    """Holds a card back until its payment is in the store."""

    def __init__(self) -> None:
        self._known = threading.Event()
        self._error: Unavailable | None = None

    def done(self) -> None:
        self._known.set()

    def never(self, error: Unavailable) -> None:
        self._error = error
        self._known.set()

    def wait(self) -> None:
        """
        Raises:
            Unavailable: it will not be.
        """
        if not self._known.wait(_WRITING_TIMEOUT_S):
            raise Unavailable("the POS interface's memory is too slow", advice="check the disk")
        if self._error is not None:
            raise self._error


class Desk:
    """One for all lanes. `line_up`: is the ledger reachable, None if nobody knows. `new_id` makes payment
    ids."""

    def __init__(
        self,
        *,
        place: Place,
        payments: Payments,
        journal: Journal,
        store: Store,
        names: PoiNames,
        line_up: Callable[[], bool | None],
        now_unix_ms: Callable[[], int],
        new_id: Callable[[], UUID],
    ) -> None:
        self._place = place
        self._payments = payments
        self._journal = journal
        self._store = store
        self.names = names
        self._line_up = line_up
        self._now_unix_ms = now_unix_ms
        self._new_id = new_id
        self._loop: asyncio.AbstractEventLoop | None = None
        self._live: dict[Key, _Live] = {}
        self._by_payment: dict[UUID, _Live] = {}
        self._doubtful: dict[Key, int] = {}
        """Requests whose fate the journal could not tell, with its last sequence then: it is believed again
        once it has written something since."""
        self._sessions: OrderedDict[tuple[str, str], Session] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._categories: dict[str, Callable[[Header, dict[str, Any]], Awaitable[Reply | None]]] = {
            "Payment": self._payment,
            "Reversal": self._reversal,
            "Abort": self._abort,
            "TransactionStatus": self._status,
            "Diagnosis": self._diagnosis,
            "GetTotals": self._get_totals,
            "Reconciliation": self._reconciliation,
            "BalanceInquiry": self._balance_inquiry,
            "Login": self._login,
            "Logout": self._logout,
        }

    def recover(self) -> int:
        """Before anything is taken: settle what the last run left without an end; how many there were.
        Blocks on the disk.

        Raises:
            Unavailable: store or journal cannot be read.
        """
        if self._store.is_empty() and self._journal.last_sequence:
            self._relearn()
        rows = self._store.unanswered()
        for row in rows:
            self._resolve(row)
        return len(rows)

    async def take(self, message: Mapping[str, Any]) -> Reply | None:
        """Answer one request, given as what stands inside its envelope. None: an empty answer."""
        try:
            header = messages.parse_header(message)
        except InvalidMessage as error:
            return self.reject(str(error))
        if header.message_class == "Event" and header.category == "Event":
            return None  # what a POS tells of itself moves nothing here
        if header.message_class != "Service" or header.category not in self._categories:
            return self.reject(f"{header.category} is not taken here", header)
        if self.names.lane(header.key.poi_id) is None:
            return self.reject("no lane here has this POIID", header)
        raw = message.get(f"{header.category}Request")
        if raw is None and header.category == "Logout":
            raw = {}
        if not isinstance(raw, dict):
            return self.reject(f"{header.category}Request is missing", header)
        try:
            return await self._categories[header.category](header, raw)
        except InvalidMessage as error:
            return self._failure(header, Condition.MESSAGE_FORMAT, str(error))
        except Unavailable as error:
            return self._failure(header, Condition.UNAVAILABLE_SERVICE, str(error))

    def reject(self, message: str, header: Header | None = None) -> Reply:
        """Say that a message cannot be taken at all."""
        told_header = {
            **(header.answer() if header is not None else {"ProtocolVersion": messages.PROTOCOL_VERSION}),
            "MessageClass": "Event",
            "MessageCategory": "Event",
            "MessageType": "Notification",
        }
        event = answers.reject(message, self._now(), told_header)
        return Reply("SaleToPOIRequest", wire.dumps(event), told_header)

    def payment_changed(self, view: PaymentView) -> None:
        """Called with every view of every payment of this gateway, from any thread."""
        live = self._by_payment.get(view.id)
        if live is None:
            return
        if not view.state.final:
            live.reader_gone = view.state is LaneState.READER_MISSING
        elif self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ended, live, view)

    async def close(self) -> None:
        """Wait until what has ended is written down."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    # Payments

    async def _payment(self, header: Header, raw: dict[str, Any]) -> Reply:
        order = messages.parse_payment(raw, self._place.unit, self._session(header))
        if isinstance(order, Refused):
            return self._failure(header, order.condition, order.message)
        if order.kind is PaymentKind.REFUND:
            return await self._correct(header, order, order.original)

        async def pay(live: _Live, row: Row) -> None:
            await self._pay(live, row, order)

        return await self._once(header, order, pay)

    async def _reversal(self, header: Header, raw: dict[str, Any]) -> Reply:
        order = messages.parse_reversal(raw, self._place.unit, self._session(header))
        if isinstance(order, Refused):
            return self._failure(header, order.condition, order.message)
        return await self._correct(header, order, order.original)

    async def _once(
        self,
        header: Header,
        order: PaymentOrder | ReversalOrder,
        work: Callable[[_Live, Row], Coroutine[Any, Any, None]],
    ) -> Reply:
        """Do it if it is new; whoever asks for the same again waits for the same."""
        digest = order.digest()
        live = self._live.get(header.key)
        if live is None:
            if len(self._live) >= _MAX_GOING_ON:
                return self._failure(header, Condition.BUSY, "too much is going on")
            self._loop = asyncio.get_running_loop()
            live = _Live(header.key, digest, order, self._loop.create_future())
            self._live[header.key] = live
            row = Row(
                key=header.key,
                category=header.category,
                digest=digest,
                payment_id=self._new_id(),
                second_id=self._new_id(),
                at_unix_ms=self._now_unix_ms(),
                asked=order.to_json(),
            )
            self._spawn(self._work(live, row, work))
        elif live.digest != digest:
            return self._failure(header, Condition.NOT_ALLOWED, _NOT_THIS)
        return self._reply(header, await asyncio.shield(live.done))

    async def _work(
        self, live: _Live, row: Row, work: Callable[[_Live, Row], Coroutine[Any, Any, None]]
    ) -> None:
        try:
            await work(live, row)
        except PosGatewayError as error:
            _log.error("request failed", category=row.category, reason=error.reason)
            self._leave(live, self._failed(row, Condition.UNAVAILABLE_SERVICE, str(error)))
        except Exception:  # noqa: BLE001 - one request's bug must not leave its POS without an answer
            _log.exception("request failed", category=row.category)
            self._leave(live, self._failed(row, Condition.IN_PROGRESS, "ask for its status"))

    async def _pay(self, live: _Live, row: Row, order: PaymentOrder) -> None:
        self._expect(live, row.payment_id)
        known, event, outcome = await asyncio.to_thread(self._begin_payment, row, order)
        live.row = known
        if known.payment_id != row.payment_id:
            await self._again(live, known)
        elif event is not None:
            self._step(live, event, outcome)
        elif live.state is State.ABORTING:  # asked for while the lane was being taken
            await asyncio.to_thread(self._cancel, row.payment_id)

    def _begin_payment(self, row: Row, order: PaymentOrder) -> tuple[Row, Event | None, Outcome | None]:
        """Take the lane and write the request down meanwhile; no card is asked before that is durable."""
        known = self._store.find(row.key, row.at_unix_ms)
        if known is not None:
            return known, None, None
        written = _WrittenDown()
        event, outcome = self._take_lane(row, order, row.payment_id, order.amount_minor, written.wait)
        try:
            row, is_new = self._store.begin(row)
        except Unavailable as error:
            written.never(error)
            self._cancel(row.payment_id)
            raise
        if is_new:
            written.done()
        else:  # aborted this very moment
            written.never(Unavailable("aborted before it began"))
            self._cancel(row.payment_id)
        return row, event, outcome

    def _take_lane(
        self,
        row: Row,
        order: PaymentOrder,
        payment_id: UUID,
        amount_minor: int,
        before_asking: Callable[[], None] = lambda: None,
    ) -> tuple[Event | None, Outcome | None]:
        """An event if the lane cannot be taken."""
        lane = self.names.lane(row.key.poi_id) or ""
        reference = {
            "sale_id": row.key.sale_id,
            "poi_id": row.key.poi_id,
            "service_id": row.key.service_id,
            "transaction_id": order.sale.transaction_id,
            "time_stamp": order.sale.time_stamp,
        }
        unit = self._place.unit
        try:
            plan = self._plan(order)
        except (NotFound, InvalidInput) as error:
            return Event.REFUSED, Outcome(State.REFUSED, message=str(error))
        try:
            self._payments.start(payment_id, amount_minor, unit.code, lane, plan, reference, before_asking)
        except NotFound as error:
            if plan is not None and any(known.name == lane for known in self._payments.lanes):
                return Event.REFUSED, Outcome(State.REFUSED, message=str(error))
            return Event.READER_GONE, None
        except InvalidInput as error:
            return Event.REFUSED, Outcome(State.REFUSED, message=str(error))
        except Unavailable as error:
            if any(known.name == lane and known.busy for known in self._payments.lanes):
                return Event.LANE_TAKEN, None
            return Event.REFUSED, Outcome(State.REFUSED, Condition.UNAVAILABLE_SERVICE, str(error))
        return None, None

    def _plan(self, order: PaymentOrder) -> PlanChoice | None:
        """
        Raises:
            NotFound: no such offer, or several: the message names them.
        """
        if not order.instalments:
            return None
        fitting = [
            quote
            for quote in self._payments.offers(order.amount_minor)
            if order.plan_id in (None, quote.offer.id) and order.periods in (None, quote.periods)
        ]
        if len(fitting) == 1:
            return PlanChoice.of(fitting[0])
        if not fitting:
            raise NotFound("no such instalment plan is offered for this amount")
        listed = ", ".join(f"{quote.offer.id} in {quote.periods}" for quote in fitting[:16])
        raise NotFound(f"name PlanID and TotalNbOfPayments, one of: {listed}")

    def _ended(self, live: _Live, view: PaymentView) -> None:
        """A lane has ended a payment."""
        order = live.order
        if self._live.get(live.key) is not live or not isinstance(order, PaymentOrder):
            return
        if live.row is None:
            # The lane was quicker than the thread that took it.
            asyncio.get_running_loop().call_soon(self._ended, live, view)
            return
        if view.state is LaneState.APPROVED:
            part = view.id == live.row.second_id
            self._step(
                live,
                Event.APPROVED,
                Outcome(State.APPROVED, view=view, amount_minor=view.amount_minor, part=part),
            )
        elif view.state is LaneState.DECLINED and view.reason is not None:
            if self._may_ask_for_part(live, order, view.reason):
                live.asks_for_part = True
                self._spawn(self._pay_part(live, live.row, order, order.least_minor or 0, view))
            else:
                self._step(live, Event.DECLINED, _declined(order, view, view.reason))
        elif view.state is LaneState.CANCELLED:
            event = Event.READER_GONE if live.reader_gone else Event.CANCELLED
            self._step(live, event, None)
        elif view.doubtful:
            self._step(live, Event.OUTCOME_UNKNOWN, None)
        else:
            self._spawn(self._ask_journal(live, live.row))

    @staticmethod
    def _may_ask_for_part(live: _Live, order: PaymentOrder, reason: Reason) -> bool:
        return (
            order.least_minor is not None
            and not live.asks_for_part
            and live.state is State.OPEN
            and not order.instalments
            and reason in _SMALLER_MAY_DO
        )

    async def _pay_part(
        self, live: _Live, row: Row, order: PaymentOrder, amount_minor: int, whole: PaymentView
    ) -> None:
        """The whole was declined for good; the card taps once more, for the part the POS said it takes."""
        self._expect(live, row.second_id)
        event, _ = await asyncio.to_thread(self._take_lane, row, order, row.second_id, amount_minor)
        if event is not None and whole.reason is not None:
            self._step(live, Event.DECLINED, _declined(order, whole, whole.reason))
        elif live.state is State.ABORTING:
            await asyncio.to_thread(self._cancel, row.second_id)

    async def _ask_journal(self, live: _Live, row: Row) -> None:
        """The lane failed at something; the journal says whether before or after the approval."""
        try:
            event, outcome = await asyncio.to_thread(self._from_journal, row)
        except PosGatewayError:
            event, outcome = Event.OUTCOME_UNKNOWN, None
        if event is Event.NOT_IN_JOURNAL:
            event = Event.FAILED
        self._step(live, event, outcome)

    # Corrections

    async def _correct(
        self, header: Header, order: PaymentOrder | ReversalOrder, original: UUID | None
    ) -> Reply:
        async def correct(live: _Live, row: Row) -> None:
            known, event, outcome = await asyncio.to_thread(
                self._make_correction, row, order, original or UUID(int=0)
            )
            live.row = known
            if known.payment_id != row.payment_id:
                await self._again(live, known)
            elif event is not None:
                self._step(live, event, outcome)

        return await self._once(header, order, correct)

    def _make_correction(
        self, row: Row, order: PaymentOrder | ReversalOrder, original: UUID
    ) -> tuple[Row, Event | None, Outcome | None]:
        row, is_new = self._store.begin(row)
        if not is_new:
            return row, None, None
        amount_minor = order.amount_minor
        reason = order.reason if isinstance(order, ReversalOrder) else "Refund"
        try:
            standing = self._payments.show(original)
            whole = isinstance(order, ReversalOrder) and not standing.refunded_minor
            if whole and amount_minor in (None, standing.amount_minor):
                record, _ = self._payments.void(original, row.payment_id, reason)
            else:
                if amount_minor is None:
                    amount_minor = standing.amount_minor - standing.refunded_minor
                record, _ = self._payments.refund(original, amount_minor, row.payment_id, reason)
        except NotFound:
            message = "no payment was approved here under this reference"
            return row, Event.REFUSED, Outcome(State.REFUSED, Condition.NOT_FOUND, message)
        except (Conflict, InvalidMessage) as error:
            return row, Event.REFUSED, Outcome(State.REFUSED, Condition.NOT_ALLOWED, str(error))
        except Unavailable as error:
            return row, Event.FAILED, Outcome(State.FAILED, message=str(error))
        except OutcomeUnknown:
            return row, Event.OUTCOME_UNKNOWN, None
        done_minor = record.facts()["amount_minor"]
        return row, Event.APPROVED, Outcome(State.APPROVED, amount_minor=done_minor)

    # How things end

    def _step(self, live: _Live, event: Event, outcome: Outcome | None) -> None:
        """Move along the table; an end is answered and kept."""
        before, live.state = live.state, after(live.state, event)
        row = live.row
        if row is None or (live.state is before and not live.state.ended):
            return
        if live.state is State.DOUBTFUL:
            self._doubtful[live.key] = self._journal.last_sequence
            self._leave(
                live, self._failed(row, Condition.IN_PROGRESS, "its outcome is not known yet: ask again")
            )
        elif live.state.ended and not before.ended:
            if outcome is None or outcome.state is not live.state:
                outcome = Outcome(live.state)
            answer = self._build(row, outcome)
            counted = self._counted(row, outcome)
            if outcome.state is State.APPROVED:
                # It can be made again from the journal: nobody waits for it to be kept here too.
                live.done.set_result(answer)
            self._spawn(self._keep(live, row, outcome.state, answer, counted))

    async def _keep(
        self, live: _Live, row: Row, state: State, answer: bytes, counted: Counted | None
    ) -> None:
        if live.done.done():
            await asyncio.sleep(_KEEP_LATER_S)  # first the answer goes out
        try:
            answer = await asyncio.to_thread(self._store.end, row.key, state, answer, counted)
        except Unavailable as error:
            # It stays in memory: whoever asks before the gateway stops is told the same.
            _log.error("an answer could not be kept", reason=error.reason)
        else:
            self._forget(live)
        if not live.done.done():
            live.done.set_result(answer)

    async def _again(self, live: _Live, row: Row) -> None:
        """The key is known to the store: the answer it holds, or what the journal says."""
        if row.digest not in (live.digest, _ANY_DIGEST):
            self._leave(live, self._failed(row, Condition.NOT_ALLOWED, _NOT_THIS))
            return
        answer = row.answer or await asyncio.to_thread(self._resolve, row)
        self._leave(
            live, answer or self._failed(row, Condition.IN_PROGRESS, told(State.OPEN).sentence.english)
        )

    def _resolve(self, row: Row) -> bytes | None:
        """End a request that nobody works on by what the journal says; None while it cannot be believed."""
        if self._journal.last_sequence <= self._doubtful.get(row.key, -1):
            return None
        if row.category == "Reconciliation":
            event, outcome = Event.NOT_IN_JOURNAL, None
        else:
            event, outcome = self._from_journal(row)
        if event is Event.OUTCOME_UNKNOWN:
            return None
        state = after(State.OPEN, event)
        if outcome is None or outcome.state is not state:
            outcome = Outcome(state)
        answer = self._store.end(row.key, state, self._build(row, outcome), self._counted(row, outcome))
        self._doubtful.pop(row.key, None)
        return answer

    def _from_journal(self, row: Row) -> tuple[Event, Outcome | None]:
        order = _order(row)
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
            elif not view.state.final or view.doubtful:
                return Event.OUTCOME_UNKNOWN, None
        if declined is not None and declined.reason is not None:
            return Event.DECLINED, _declined(order, declined, declined.reason)
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
                        digest=_ANY_DIGEST,
                        payment_id=record.id,
                        second_id=self._new_id(),
                        at_unix_ms=facts["at_unix_ms"],
                        asked=order.to_json(),
                    )
                )
            if not records or records[0].facts()["at_unix_ms"] < oldest_unix_ms:
                return
            before = first

    def _build(self, row: Row, outcome: Outcome) -> bytes:
        order = _order(row)
        if isinstance(order, PaymentOrder):
            return wire.dumps(answers.payment_answer(self._place, row, order, outcome))
        if isinstance(order, ReversalOrder):
            return wire.dumps(answers.reversal_answer(self._place, row, order, outcome))
        default = told(outcome.state)
        return self._failed(
            row, outcome.condition or default.condition or Condition.NOT_ALLOWED, default.sentence.english
        )

    def _counted(self, row: Row, outcome: Outcome) -> Counted | None:
        order = _order(row)
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

    # Abort, status, and what only tells

    async def _abort(self, header: Header, raw: dict[str, Any]) -> None:
        key = messages.parse_abort(raw, header)
        live = self._live.get(key)
        if live is None and self.names.lane(key.poi_id) is not None:
            # It may have been quicker than what it is to end: remember it, so that nothing starts later.
            row = Row(
                key=key,
                category="Payment",
                digest=_ANY_DIGEST,
                payment_id=self._new_id(),
                second_id=self._new_id(),
                at_unix_ms=self._now_unix_ms(),
                asked=_unknown_order().to_json(),
                state=after(State.NEW, Event.ABORT_ASKED),
            )
            row = replace(row, answer=self._build(row, Outcome(row.state)))
            await asyncio.to_thread(self._store.begin, row)
            live = self._live.get(key)  # it came meanwhile, and the store let it be the first
        if live is not None and isinstance(live.order, PaymentOrder):
            live.state = after(live.state, Event.ABORT_ASKED)
            for payment_id in tuple(live.started):
                await asyncio.to_thread(self._cancel, payment_id)

    def _cancel(self, payment_id: UUID) -> None:
        with contextlib.suppress(NotFound):  # its lane was never taken
            self._payments.cancel(payment_id)

    async def _status(self, header: Header, raw: dict[str, Any]) -> Reply:
        order = messages.parse_status(raw, header)
        key = order.reference
        if key is None:
            last = await asyncio.to_thread(
                self._store.last, header.key.sale_id, header.key.poi_id, self._now_unix_ms()
            )
            if last is None:
                return self._status_failure(header, None, Condition.NOT_FOUND, "there is none")
            key = last.key
        live = self._live.get(key)
        answer: bytes | None = None
        if live is not None:
            answer = live.done.result() if live.done.done() else None
        else:
            row = await asyncio.to_thread(self._store.find, key, self._now_unix_ms())
            if row is None:
                return self._status_failure(header, key, Condition.NOT_FOUND, "nothing is known of it here")
            if row.answer is None and key not in self._live:
                answer = await asyncio.to_thread(self._resolve, row)
            else:
                answer = row.answer
        if answer is None:
            default = told(State.OPEN)
            return self._status_failure(
                header, key, Condition.IN_PROGRESS, default.sentence.told(self._session(header).language)
            )
        return self._tell(header, answers.status_answer(header, key, wire.parse(answer), order.documents))

    async def _diagnosis(self, header: Header, raw: dict[str, Any]) -> Reply:
        status = self._poi_status(header.key.poi_id)
        body: dict[str, Any] = {
            "Response": answers.response(None, "Here I am"),
            "LoggedSaleID": sorted(
                sale_id for sale_id, poi_id in self._sessions if poi_id == header.key.poi_id
            ),
            "POIStatus": status,
        }
        if raw.get("HostDiagnosisFlag") is True:
            body["HostStatus"] = [
                {"AcquirerID": self._place.issuer, "IsReachableFlag": status["CommunicationOKFlag"]}
            ]
        return self._tell(header, answers.answer(header, "DiagnosisResponse", body))

    def _poi_status(self, poi_id: str) -> dict[str, Any]:
        name = self.names.lane(poi_id)
        lane = next((lane for lane in self._payments.lanes if lane.name == name), None)
        free = "OK" if lane is not None and not lane.busy else "Busy"
        return {
            "GlobalStatus": "Unreachable" if lane is None else free,
            "SecurityOKFlag": True,
            "CardReaderOKFlag": lane is not None,
            "CommunicationOKFlag": self._line_up() is True,
        }

    async def _get_totals(self, header: Header, raw: dict[str, Any]) -> Reply:
        order = messages.parse_totals(raw)
        if isinstance(order, Refused):
            return self._failure(header, order.condition, order.message)
        await self._settled(header.key.poi_id)

        def read() -> tuple[int, list[Total]]:
            number = self._store.period(header.key.poi_id)
            return number, self._store.totals(header.key.poi_id, number) or []

        number, totals = await asyncio.to_thread(read)
        body = {
            "Response": answers.response(None, "Totals"),
            "POIReconciliationID": str(number),
            "TransactionTotals": answers.transaction_totals(self._place, header.key.poi_id, order, totals),
        }
        return self._tell(header, answers.answer(header, "GetTotalsResponse", body))

    async def _reconciliation(self, header: Header, raw: dict[str, Any]) -> Reply:
        order = messages.parse_reconciliation(raw)
        if isinstance(order, Refused):
            return self._failure(header, order.condition, order.message)
        poi_id = header.key.poi_id
        if order.number is not None:
            number = order.number

            def read() -> list[Total] | None:
                is_closed = number < self._store.period(poi_id)
                return self._store.totals(poi_id, number) if is_closed else None

            totals = await asyncio.to_thread(read)
            if totals is None:
                return self._failure(header, Condition.NOT_FOUND, "there was no such reconciliation")
            return self._reply(header, self._reconciled(header, "PreviousReconciliation", number, totals))
        await self._settled(poi_id)
        row = Row(
            key=header.key,
            category=header.category,
            digest=order.digest(),
            payment_id=self._new_id(),
            second_id=self._new_id(),
            at_unix_ms=self._now_unix_ms(),
            asked={},
        )
        return self._reply(header, await asyncio.to_thread(self._reconcile, header, row))

    def _reconcile(self, header: Header, row: Row) -> bytes:
        known, is_new = self._store.begin(row)
        if known.digest != row.digest:
            return self._failed(row, Condition.NOT_ALLOWED, _NOT_THIS)
        if known.answer is not None:
            return known.answer
        if not is_new:
            return self._failed(row, Condition.IN_PROGRESS, told(State.OPEN).sentence.english)
        answer = self._store.close_period(
            row, lambda number, totals: self._reconciled(header, "SaleReconciliation", number, totals)
        )
        if answer is not None:
            return answer
        busy = self._failed(row, Condition.BUSY, "a payment is going on at this reader")
        return self._store.end(row.key, State.BUSY, busy)

    def _reconciled(self, header: Header, kind: str, number: int, totals: list[Total]) -> bytes:
        everything = TotalsOrder(by=(), only={})
        body = {
            "Response": answers.response(None, "Reconciled"),
            "ReconciliationType": kind,
            "POIReconciliationID": str(number),
            "TransactionTotals": answers.transaction_totals(
                self._place, header.key.poi_id, everything, totals
            ),
        }
        return wire.dumps(answers.answer(header, "ReconciliationResponse", body))

    async def _settled(self, poi_id: str) -> None:
        """Wait for answers of this lane that are told already and not yet kept."""
        while any(live.done.done() and live.key.poi_id == poi_id for live in self._live.values()):
            if not self._tasks:
                return  # the disk refused to keep one
            await asyncio.wait(tuple(self._tasks), return_when=asyncio.FIRST_COMPLETED)

    async def _balance_inquiry(self, header: Header, raw: dict[str, Any]) -> Reply:
        return self._failure(
            header, Condition.NOT_ALLOWED, "how much credit a customer has is told to nobody but the customer"
        )

    async def _login(self, header: Header, raw: dict[str, Any]) -> Reply:
        session = messages.parse_login(raw)
        place = (header.key.sale_id, header.key.poi_id)
        self._sessions[place] = session
        self._sessions.move_to_end(place)
        while len(self._sessions) > _MAX_SESSIONS:
            self._sessions.popitem(last=False)
        body = {
            "Response": answers.response(None, "Welcome"),
            "POISystemData": {
                "DateTime": answers.time_stamp(self._now()),
                "POISoftware": {
                    "ManufacturerID": "POS Gateway",
                    "ApplicationName": "pos-gateway",
                    "SoftwareVersion": pos_gateway.__version__,
                    "CertificationCode": "none",
                },
                "POITerminalData": {
                    "TerminalEnvironment": "Attended",
                    "POICapabilities": ["EMVContactless", "CashierDisplay"],
                    "POISerialNumber": header.key.poi_id.removeprefix(f"{MODEL}-"),
                },
                "POIStatus": self._poi_status(header.key.poi_id),
            },
        }
        return self._tell(header, answers.answer(header, "LoginResponse", body))

    async def _logout(self, header: Header, raw: dict[str, Any]) -> Reply:
        self._sessions.pop((header.key.sale_id, header.key.poi_id), None)
        body = {"Response": answers.response(None, "Good bye")}
        return self._tell(header, answers.answer(header, "LogoutResponse", body))

    # Small things

    def _session(self, header: Header) -> Session:
        return self._sessions.get((header.key.sale_id, header.key.poi_id)) or Session()

    def _expect(self, live: _Live, payment_id: UUID) -> None:
        """Before the lane is taken: it may be quicker than we are."""
        live.started.append(payment_id)
        self._by_payment[payment_id] = live

    def _leave(self, live: _Live, answer: bytes) -> None:
        self._forget(live)
        if not live.done.done():
            live.done.set_result(answer)

    def _forget(self, live: _Live) -> None:
        self._live.pop(live.key, None)
        for payment_id in live.started:
            self._by_payment.pop(payment_id, None)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _failed(self, row: Row, condition: Condition, message: str) -> bytes:
        return wire.dumps(answers.failure(answers.row_header(row), condition, message))

    def _failure(self, header: Header, condition: Condition, message: str) -> Reply:
        return self._tell(header, answers.failure(header, condition, message))

    def _status_failure(
        self, header: Header, reference: Key | None, condition: Condition, message: str
    ) -> Reply:
        return self._tell(header, answers.status_failure(header, reference, condition, message))

    def _tell(self, header: Header, message: dict[str, Any]) -> Reply:
        return self._reply(header, wire.dumps(message))

    def _reply(self, header: Header, body: bytes) -> Reply:
        return Reply("SaleToPOIResponse", body, header.answer())

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._now_unix_ms() / 1000, UTC)


def _declined(order: PaymentOrder, view: PaymentView, reason: Reason) -> Outcome:
    message = answers.decline_message(reason, order.sale.language)
    if order.any_part and order.least_minor is None and reason in _SMALLER_MAY_DO:
        message = f"{message} {_WHOLE_ONLY}"
    return Outcome(State.DECLINED, answers.decline_condition(reason), message, view)


def _order(row: Row) -> PaymentOrder | ReversalOrder | None:
    if row.category == "Payment":
        return PaymentOrder.from_json(row.asked)
    if row.category == "Reversal":
        return ReversalOrder.from_json(row.asked)
    return None


def _unknown_order() -> PaymentOrder:
    return PaymentOrder(
        kind=PaymentKind.SALE, amount_minor=0, sale=SaleData(transaction_id="", time_stamp="")
    )
