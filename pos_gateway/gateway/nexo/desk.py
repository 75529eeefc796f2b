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
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import structlog

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
from pos_gateway.gateway.nexo.answers import Outcome, Place, Reply
from pos_gateway.gateway.nexo.enquiries import Enquiries
from pos_gateway.gateway.nexo.fates import ANY_DIGEST, SMALLER_MAY_DO, Fates, declined_outcome
from pos_gateway.gateway.nexo.lanes import PoiNames
from pos_gateway.gateway.nexo.messages import (
    Header,
    Key,
    PaymentKind,
    PaymentOrder,
    Refused,
    ReversalOrder,
    SaleData,
)
from pos_gateway.gateway.nexo.store import Counted, Row, Store
from pos_gateway.gateway.nexo.transitions import Condition, Event, State, after, told
from pos_gateway.gateway.payments import Payments, PlanChoice

_log = structlog.get_logger(__name__)

_MAX_GOING_ON: Final = 256
_KEEP_LATER_S: Final = 0.02
_WRITING_TIMEOUT_S: Final = 30.0


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
        self.fates = Fates(place, payments, journal, store, now_unix_ms, new_id)
        self._place = place
        self._payments = payments
        self._store = store
        self._names = names
        self._now_unix_ms = now_unix_ms
        self._new_id = new_id
        self._enquiries = Enquiries(
            place,
            payments,
            store,
            names,
            line_up=line_up,
            now_unix_ms=now_unix_ms,
            new_id=new_id,
            settled=self._settled,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._live: dict[Key, _Live] = {}
        self._by_payment: dict[UUID, _Live] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._categories: dict[str, Callable[[Header, dict[str, Any]], Awaitable[Reply | None]]] = {
            "Payment": self._payment,
            "Reversal": self._reversal,
            "Abort": self._abort,
            "TransactionStatus": self._status,
            "Diagnosis": self._enquiries.diagnosis,
            "GetTotals": self._enquiries.get_totals,
            "Reconciliation": self._enquiries.reconciliation,
            "BalanceInquiry": self._enquiries.balance_inquiry,
            "Login": self._enquiries.login,
            "Logout": self._enquiries.logout,
        }

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
        if self._names.lane(header.key.poi_id) is None:
            return self.reject("no lane here has this POIID", header)
        raw = message.get(f"{header.category}Request")
        if raw is None and header.category == "Logout":
            raw = {}
        if not isinstance(raw, dict):
            return self.reject(f"{header.category}Request is missing", header)
        try:
            return await self._categories[header.category](header, raw)
        except InvalidMessage as error:
            if header.category == "Abort":
                return self.reject(str(error), header)
            return answers.refuse(header, Condition.MESSAGE_FORMAT, str(error))
        except Unavailable as error:
            if header.category == "Abort":
                return self.reject(str(error), header)
            return answers.refuse(header, Condition.UNAVAILABLE_SERVICE, str(error))

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
        order = messages.parse_payment(raw, self._place.unit, self._enquiries.session(header))
        if isinstance(order, Refused):
            return answers.refuse(header, order.condition, order.message)
        if order.kind is PaymentKind.REFUND:
            return await self._correct(header, order, order.original)

        async def pay(live: _Live, row: Row) -> None:
            await self._pay(live, row, order)

        return await self._once(header, order, pay)

    async def _reversal(self, header: Header, raw: dict[str, Any]) -> Reply:
        order = messages.parse_reversal(raw, self._place.unit, self._enquiries.session(header))
        if isinstance(order, Refused):
            return answers.refuse(header, order.condition, order.message)
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
                return answers.refuse(header, Condition.BUSY, "too much is going on")
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
            return answers.refuse(header, Condition.NOT_ALLOWED, answers.NOT_THIS)
        return answers.reply(header, await asyncio.shield(live.done))

    async def _work(
        self, live: _Live, row: Row, work: Callable[[_Live, Row], Coroutine[Any, Any, None]]
    ) -> None:
        try:
            await work(live, row)
        except PosGatewayError as error:
            _log.error("request failed", category=row.category, reason=error.reason)
            self._leave(live, answers.failed(row, Condition.UNAVAILABLE_SERVICE, str(error)))
        except Exception:  # noqa: BLE001 - one request's bug must not leave its POS without an answer
            _log.exception("request failed", category=row.category)
            self._leave(live, answers.failed(row, Condition.IN_PROGRESS, "ask for its status"))

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
        lane = self._names.lane(row.key.poi_id) or ""
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
                self._step(live, Event.DECLINED, declined_outcome(order, view, view.reason))
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
            and reason in SMALLER_MAY_DO
        )

    async def _pay_part(
        self, live: _Live, row: Row, order: PaymentOrder, amount_minor: int, whole: PaymentView
    ) -> None:
        """The whole was declined for good; the card taps once more, for the part the POS said it takes."""
        self._expect(live, row.second_id)
        event, _ = await asyncio.to_thread(self._take_lane, row, order, row.second_id, amount_minor)
        if event is not None and whole.reason is not None:
            self._step(live, Event.DECLINED, declined_outcome(order, whole, whole.reason))
        elif live.state is State.ABORTING:
            await asyncio.to_thread(self._cancel, row.second_id)

    async def _ask_journal(self, live: _Live, row: Row) -> None:
        """The lane failed at something; the journal says whether before or after the approval."""
        try:
            event, outcome = await asyncio.to_thread(self.fates.from_journal, row)
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
            self.fates.doubt(live.key)
            self._leave(
                live, answers.failed(row, Condition.IN_PROGRESS, "its outcome is not known yet: ask again")
            )
        elif live.state.ended and not before.ended:
            if outcome is None or outcome.state is not live.state:
                outcome = Outcome(live.state)
            answer = self.fates.build(row, outcome)
            counted = self.fates.counted(row, outcome)
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
        if row.digest not in (live.digest, ANY_DIGEST):
            self._leave(live, answers.failed(row, Condition.NOT_ALLOWED, answers.NOT_THIS))
            return
        answer = row.answer or await asyncio.to_thread(self.fates.resolve, row)
        self._leave(
            live, answer or answers.failed(row, Condition.IN_PROGRESS, told(State.OPEN).sentence.english)
        )

    # Abort, status, and what only tells

    async def _abort(self, header: Header, raw: dict[str, Any]) -> None:
        key = messages.parse_abort(raw, header)
        live = self._live.get(key)
        if live is None and self._names.lane(key.poi_id) is not None:
            # It may have been quicker than what it is to end: remember it, so that nothing starts later.
            row = Row(
                key=key,
                category="Payment",
                digest=ANY_DIGEST,
                payment_id=self._new_id(),
                second_id=self._new_id(),
                at_unix_ms=self._now_unix_ms(),
                asked=_unknown_order().to_json(),
                state=after(State.NEW, Event.ABORT_ASKED),
            )
            row = replace(row, answer=self.fates.build(row, Outcome(row.state)))
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
            if row.answer is None and key not in self._live and row.category in ("Payment", "Reversal"):
                answer = await asyncio.to_thread(self.fates.resolve, row)
            else:
                answer = row.answer
        if answer is None:
            default = told(State.OPEN)
            return self._status_failure(
                header,
                key,
                Condition.IN_PROGRESS,
                default.sentence.told(self._enquiries.session(header).language),
            )
        return answers.tell(header, answers.status_answer(header, key, wire.parse(answer), order.documents))

    async def _settled(self, poi_id: str) -> None:
        """Wait for answers of this lane that are told already and not yet kept."""
        while any(live.done.done() and live.key.poi_id == poi_id for live in self._live.values()):
            if not self._tasks:
                return  # the disk refused to keep one
            await asyncio.wait(tuple(self._tasks), return_when=asyncio.FIRST_COMPLETED)

    # Small things

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

    def _status_failure(
        self, header: Header, reference: Key | None, condition: Condition, message: str
    ) -> Reply:
        return answers.tell(header, answers.status_failure(header, reference, condition, message))

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._now_unix_ms() / 1000, UTC)


def _unknown_order() -> PaymentOrder:
    return PaymentOrder(
        kind=PaymentKind.SALE, amount_minor=0, sale=SaleData(transaction_id="", time_stamp="")
    )
