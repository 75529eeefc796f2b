"""The payments of this gateway, by id: the same id never pays twice, whatever was killed in between."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final
from uuid import UUID

from pos_gateway.authorization.reasons import Reason
from pos_gateway.errors import Conflict, InvalidMessage, NotFound, Unavailable
from pos_gateway.gateway.journal import Journal
from pos_gateway.gateway.lane import Lane, PaymentView, State, plan_of
from pos_gateway.gateway.meanings import meaning_of
from pos_gateway.gateway.till import Till
from pos_gateway.instalments import Quote, quote, quotes
from pos_gateway.money import MAX_AMOUNT_MINOR
from pos_gateway.records import Kind, Record, Verdict

_REMEMBERED: Final = 1000


@dataclass(frozen=True, slots=True)
class PlanChoice:
    """Which of the offers a customer took, and in how many periods."""

    offer: str
    periods: int

    @classmethod
    def of(cls, plan: Quote | None) -> PlanChoice | None:
        return None if plan is None else cls(plan.offer.id, plan.periods)


class Payments:
    """Starts payments on lanes and knows how each stands: from memory, else from the journal.

    `publish` is told every change, in order, from any thread. `headroom_bytes`: with less free on the
    journal's disk no payment is begun.
    """

    def __init__(
        self,
        till: Till,
        journal: Journal,
        publish: Callable[[PaymentView], None],
        *,
        headroom_bytes: int = 0,
    ) -> None:
        self._till = till
        self._journal = journal
        self._headroom_bytes = headroom_bytes
        self._publish = publish
        self._lanes: dict[str, Lane] = {}
        self._views: OrderedDict[UUID, PaymentView] = OrderedDict()
        self._lane_of: dict[UUID, Lane] = {}
        self._lock = threading.RLock()

    def add_lane(self, lane: Lane) -> None:
        self._lanes[lane.name] = lane

    @property
    def lanes(self) -> Sequence[Lane]:
        return tuple(self._lanes.values())

    def start(
        self,
        payment_id: UUID,
        amount_minor: int,
        currency: str,
        lane_name: str | None,
        plan: PlanChoice | None = None,
        reference: Mapping[str, str] | None = None,
        before_asking: Callable[[], None] = lambda: None,
    ) -> PaymentView:
        """Begin a payment, or say how it stands if it was begun before. `reference` is journalled with it;
        `before_asking` is called before a card is asked for a TC, see `till.Payment`.

        Raises:
            InvalidMessage: the amount or currency is not one this till takes.
            InvalidInput: the offer does not hold for this amount or number of periods.
            Conflict: the id was used for another amount or plan.
            NotFound: no such lane, or no such offer.
            Unavailable: no lane is free, or the disk is nearly full.
        """
        if currency != self._till.station.currency.code:
            raise InvalidMessage(f"this till takes {self._till.station.currency.code}", where="currency")
        _check_amount(amount_minor)
        with self._lock:
            known = self._find(payment_id)
            if known is not None:
                if known.amount_minor != amount_minor:
                    raise Conflict("this payment id was used for another amount", advice="use a new id")
                if PlanChoice.of(known.plan) != plan:
                    raise Conflict("this payment id was used for another plan", advice="use a new id")
                return known
            if self._journal.was_pruned(payment_id):
                raise Conflict(
                    "this payment was approved here long ago, and its record is pruned", advice="use a new id"
                )
            self._journal.room(self._headroom_bytes).check()
            lane = self._free_lane(lane_name)
            payment = self._till.new_payment(
                payment_id,
                amount_minor,
                self._journal.last_sequence + 1,
                self._quote(amount_minor, plan),
                reference,
                before_asking,
            )
            try:
                view = lane.take(payment)
            except Unavailable:
                self._till.end(payment)
                raise
            self._lane_of[payment_id] = lane
            self.changed(view)
            return view

    def offers(self, amount_minor: int) -> list[Quote]:
        """Every plan that this till may offer for an amount; whether a card may have it, its tap tells.

        Raises:
            InvalidMessage: not an amount this till takes.
        """
        _check_amount(amount_minor)
        return quotes(self._till.offers(), amount_minor)

    def show(self, payment_id: UUID) -> PaymentView:
        """
        Raises:
            NotFound: nothing is known of the id: nothing was charged under it.
        """
        with self._lock:
            view = self._find(payment_id)
        if view is None and self._journal.was_pruned(payment_id):
            raise NotFound(
                "this payment was approved here long ago, and its record is pruned",
                advice="ask the issuer how it stands",
            )
        if view is None:
            raise NotFound("no payment is known under this id", advice="nothing was charged under it")
        return view

    def on_its_way(self, payment_id: UUID) -> dict[str, Any]:
        """Of an approved payment: since when it is stored here, and whether the ledger has it.

        Raises:
            NotFound: it was not approved here, or its record is pruned.
        """
        record = self._journal.get(payment_id)
        verdict = self._journal.last_verdict(payment_id)
        return {
            "stored_at_unix_ms": record.facts()["at_unix_ms"],
            "pending": verdict is None,
            "verdict": verdict,
            **meaning_of(record.kind, Verdict(verdict) if verdict else None).as_json(),
        }

    def cancel(self, payment_id: UUID) -> PaymentView:
        """Ask for the payment's end; a card that has already answered may still approve it."""
        with self._lock:
            view = self.show(payment_id)
            lane = self._lane_of.get(payment_id)
        if lane is not None and not view.state.final:
            lane.cancel(payment_id)
        return view

    def void(self, payment_id: UUID, correction_id: UUID, reason: str) -> tuple[Record, PaymentView]:
        """Void a whole payment; see `Corrections.void`. Also how the payment stands after it."""
        record = self._till.corrections.void(payment_id, correction_id, reason)
        return record, self._corrected(payment_id)

    def refund(
        self, payment_id: UUID, amount_minor: int, correction_id: UUID, reason: str
    ) -> tuple[Record, PaymentView]:
        """Refund a payment or a part of it; see `Corrections.refund`."""
        record = self._till.corrections.refund(payment_id, amount_minor, correction_id, reason)
        return record, self._corrected(payment_id)

    def _corrected(self, payment_id: UUID) -> PaymentView:
        with self._lock:
            self._views.pop(payment_id, None)
            view = self.show(payment_id)
            self.changed(view)
            return view

    def changed(self, view: PaymentView) -> None:
        """Called by lanes."""
        with self._lock:
            if self._views.get(view.id) == view:
                return
            self._remember(view)
            if view.state.final:
                self._lane_of.pop(view.id, None)
            self._publish(view)

    def _find(self, payment_id: UUID) -> PaymentView | None:
        view = self._views.get(payment_id)
        if view is not None and view.state is not State.FAILED:
            return view
        currency = self._till.station.currency
        decline: Record | None = None
        for record in self._journal.about(payment_id):
            if record.kind is Kind.AUTHORIZATION:
                return self._with_corrections(PaymentView.of_authorization(record, currency))
            if record.kind is Kind.DECLINE:
                decline = record
        if decline is None:
            return view
        facts = decline.facts()
        return PaymentView(
            id=payment_id,
            amount_minor=facts["amount_minor"],
            currency=currency,
            state=State.DECLINED,
            reason=Reason(facts["reason"]),
            message=facts["detail"],
            token_last4=facts["token_last4"],
            plan=plan_of(facts),
        )

    def _with_corrections(self, view: PaymentView) -> PaymentView:
        standing = self._till.corrections.standing(view.id)
        if standing is None:
            return view
        return replace(view, refunded_minor=standing.refunded_minor, voided=standing.voided)

    def _quote(self, amount_minor: int, plan: PlanChoice | None) -> Quote | None:
        if plan is None:
            return None
        for offer in self._till.offers():
            if offer.id == plan.offer:
                return quote(offer, amount_minor, plan.periods)
        raise NotFound("no such instalment offer here", advice="ask for the offers for this amount")

    def _free_lane(self, name: str | None) -> Lane:
        if name is not None:
            try:
                return self._lanes[name]
            except KeyError:
                known = ", ".join(self._lanes) or "none"
                raise NotFound("no such lane", advice=f"lanes here: {known}") from None
        # A lane whose reader was unplugged comes last: its payment waits for the reader to come back.
        for lane in sorted(self._lanes.values(), key=lambda lane: not lane.reader_present):
            if not lane.busy:
                return lane
        if not self._lanes:
            raise Unavailable("no reader is connected", advice="run `pos-gateway doctor`")
        raise Unavailable("every lane is taking a payment", advice="finish or cancel one first")

    def _remember(self, view: PaymentView) -> None:
        self._views[view.id] = view
        self._views.move_to_end(view.id)
        while len(self._views) > _REMEMBERED:
            self._views.popitem(last=False)


def _check_amount(amount_minor: int) -> None:
    if not 0 < amount_minor <= MAX_AMOUNT_MINOR:
        raise InvalidMessage(f"must be between 1 and {MAX_AMOUNT_MINOR}", where="amount_minor")
