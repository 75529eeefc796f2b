"""What others do, on the same history.

Store-and-forward: a shop without a line lets every tap through up to a floor cap and asks for its money
later, when the issuer may refuse. Available credit: the issuer publishes what each account has left, and a
shop without a line lets through what is within it, less what it has let through itself since.

Both are made better than most: their books count money that may still come back, hear of every payment
the moment a shop has a line, and refuse blocked cards from lists as fresh as ours. Neither has a counter
on the card, so a copy is noticed only by the customer who is billed for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from pos_gateway.lab.simulator import history as h
from pos_gateway.lab.simulator.load import Load
from pos_gateway.lab.simulator.measures import Measures
from pos_gateway.lab.simulator.town import Customer, Town


@dataclass(slots=True)
class _Account:
    """As the issuer's books have it; `debts` of the measures know better."""

    limit_minor: int
    owed_minor: int
    uncleared_minor: int = 0

    @property
    def available_minor(self) -> int:
        return self.limit_minor - self.owed_minor - self.uncleared_minor


@dataclass(frozen=True, slots=True)
class _Stored:
    """A payment that a shop has let through by itself."""

    account: int
    amount_minor: int
    key: int
    clone: int | None


@dataclass(slots=True)
class _Shop:
    line: bool = True
    clock_is_right: bool = True
    stolen: bool = False
    reported: bool = False
    version: int = -1
    queue: list[_Stored] = field(default_factory=list)
    since_minor: dict[int, int] = field(default_factory=dict)
    """Let through since the list it has was made, per account."""


@dataclass(slots=True)
class _Published:
    """A list as shops fetch it: which tokens may not pay, and what each account has left."""

    at_unix_ms: int
    blocked: frozenset[tuple[int, bool]]
    available_minor: tuple[int, ...]


class Peer:
    """One of the two; `floor_cap_minor` makes it store-and-forward, None available credit."""

    def __init__(self, town: Town, load: Load, valid_s: int, floor_cap_minor: int | None) -> None:
        self.measures = Measures()
        self._customers: tuple[Customer, ...] = town.customers
        self._load = load
        self._valid_ms = 1000 * valid_s
        self._floor_cap_minor = floor_cap_minor
        self._accounts = [_Account(c.limit_minor, c.first_owed_minor) for c in town.customers]
        self._base_minor = [c.limit_minor for c in town.customers]
        self._vault_minor = [0] * len(town.customers)
        self._shops = [_Shop() for _ in range(town.shops)]
        self._blocked: dict[tuple[int, bool], None] = {}
        self._lists: dict[int, _Published] = {}
        self._version = -1
        self._keys = 0
        self._clones: dict[int, h.CloneMade] = {}
        self._cloned_minor: dict[int, int] = {}
        self._billed_minor: dict[int, int] = {}
        self._dead_clones: dict[int, None] = {}
        for customer in town.customers:
            self.measures.debts.open(customer.index, customer.limit_minor, customer.first_owed_minor)

    def handle(self, at_unix_ms: int, event: h.Happening) -> None:
        match event:
            case h.Purchase():
                self._purchase(at_unix_ms, event)
            case h.OnlinePurchase(customer, amount_minor):
                self._buys_online(customer, amount_minor)
            case h.Refresh() | h.Backup() | h.Restore():
                pass
            case h.Repay():
                self._repay(event)
            case h.RepaymentFinal(customer, reference, bounces):
                amount_minor = self.measures.debts.repayment_final(customer, reference, bounces=bounces)
                self._accounts[customer].uncleared_minor -= amount_minor
                self._accounts[customer].owed_minor += amount_minor if bounces else 0
            case h.SetLimit(customer, limit_minor):
                self._base_minor[customer] = limit_minor
                self._limit(customer)
            case h.Vault(customer, amount_minor):
                self._vault_minor[customer] += amount_minor
                self._limit(customer)
            case h.Block(customer, phone):
                self._blocked[customer, phone] = None
            case h.Replace(customer, phone):
                self._blocked.pop((customer, phone), None)
            case h.LineDown(shop):
                self._learn(self._shops[shop])
                self._shops[shop].line = False
            case h.LineUp(shop):
                self._shops[shop].line = not self._shops[shop].stolen
                self._learn(self._shops[shop])
            case h.Synchronise(shop, _):
                if not self._shops[shop].stolen:
                    self._forward(self._shops[shop])
                    self._learn(self._shops[shop])
            case h.Clock(shop, skew_s):
                self._shops[shop].clock_is_right = abs(skew_s) <= 300
            case h.Publish():
                self._publish(at_unix_ms)
            case h.Stolen(shop):
                self._shops[shop].stolen, self._shops[shop].line = True, False
            case h.StolenReported() | h.StolenTap() | h.StolenPresents():
                # Nothing of a stolen shop's is counted for anybody: the comparison is of honest shops.
                pass
            case h.CloneMade(clone):
                self._clones[clone] = event
            case h.CloneTap():
                self._clone_taps(at_unix_ms, event)
            case h.Dispute(customer):
                self._dispute(customer)
            case h.EndOfDay():
                queue = sum(len(shop.queue) for shop in self._shops)
                self.measures.end_day(reserve_minor=0, queue=queue)

    def finish(self) -> None:
        losses = self._cloned_minor.values()
        self.measures.clones_used = len(self._cloned_minor)
        self.measures.clone_loss_minor = sum(losses)
        self.measures.largest_clone_loss_minor = max(losses, default=0)

    def _purchase(self, at_unix_ms: int, event: h.Purchase) -> None:
        if (event.customer, event.by_phone) in self._blocked or self._shops[event.shop].stolen:
            return
        room = event.amount_minor <= self.measures.debts.room_minor(event.customer)
        if event.torn and not event.tapped_again:
            self.measures.taps.tears()
            return
        cause = self._judge(at_unix_ms, event.shop, event.customer, event.by_phone, event.amount_minor)
        if cause is not None:
            self.measures.taps.declines(cause, room=room)
            return
        self.measures.taps.approves()
        self._take(event.shop, event.customer, event.amount_minor, None)

    def _judge(
        self, at_unix_ms: int, shop_number: int, customer: int, by_phone: bool, amount_minor: int
    ) -> str | None:
        """Why not, or None."""
        shop = self._shops[shop_number]
        if shop.line:
            return None if amount_minor <= self._accounts[customer].available_minor else "over_available"
        published = self._lists.get(shop.version)
        if published is None or at_unix_ms > published.at_unix_ms + self._valid_ms:
            return "no_valid_limits"
        if (customer, by_phone) in published.blocked:
            return "blocked"
        if self._floor_cap_minor is not None:
            return None if amount_minor <= self._floor_cap_minor else "over_tap_cap"
        left_minor = published.available_minor[customer] - shop.since_minor.get(customer, 0)
        return None if amount_minor <= left_minor else "over_available"

    def _take(self, shop_number: int, customer: int, amount_minor: int, clone: int | None) -> None:
        """Goods are handed over."""
        shop = self._shops[shop_number]
        self._keys += 1
        if clone is None and shop.clock_is_right:
            self.measures.debts.buys(customer, amount_minor, self._keys)
        if clone is not None:
            self._cloned_minor[clone] = self._cloned_minor.get(clone, 0) + amount_minor
        if shop.line:
            self._bill(customer, amount_minor, clone)
        else:
            shop.queue.append(_Stored(customer, amount_minor, self._keys, clone))
            shop.since_minor[customer] = shop.since_minor.get(customer, 0) + amount_minor

    def _forward(self, shop: _Shop) -> None:
        for stored in shop.queue:
            account = self._accounts[stored.account]
            refused = self._floor_cap_minor is not None and stored.amount_minor > account.available_minor
            if not refused:
                self._bill(stored.account, stored.amount_minor, stored.clone)
            elif stored.clone is None:
                self.measures.guaranteed_unpaid += stored.amount_minor
                self.measures.unpaid_minor += stored.amount_minor
                if self.measures.debts.knows(stored.key):
                    self.measures.debts.released(stored.key)
        self.measures.guaranteed += len(shop.queue)
        shop.queue.clear()

    def _bill(self, customer: int, amount_minor: int, clone: int | None) -> None:
        self._accounts[customer].owed_minor += amount_minor
        if clone is not None:
            self._billed_minor[clone] = self._billed_minor.get(clone, 0) + amount_minor

    def _learn(self, shop: _Shop) -> None:
        if shop.version != self._version and not shop.stolen:
            shop.version = self._version
            shop.since_minor = {}

    def _publish(self, at_unix_ms: int) -> None:
        self._version += 1
        self._lists[self._version] = _Published(
            at_unix_ms, frozenset(self._blocked), tuple(a.available_minor for a in self._accounts)
        )
        for shop in self._shops:
            if shop.line or self._version == 0:
                self._learn(shop)
        wanted = {shop.version for shop in self._shops}
        for version in sorted(self._lists.keys() - wanted - {self._version}):
            del self._lists[version]

    def _buys_online(self, customer: int, amount_minor: int) -> None:
        tally = self.measures.online(self._customers[customer].has_phone)
        if amount_minor <= self._accounts[customer].available_minor:
            self._accounts[customer].owed_minor += amount_minor
            self.measures.debts.buys(customer, amount_minor)
            tally.approves()
        else:
            room = amount_minor <= self.measures.debts.room_minor(customer)
            tally.declines("over_available", room=room)

    def _repay(self, event: h.Repay) -> None:
        account = self._accounts[event.customer]
        amount_minor = int(account.owed_minor * event.part)
        if account.owed_minor <= account.limit_minor * event.above or amount_minor <= 0:
            return
        final = event.final_after_s == 0
        account.owed_minor -= amount_minor
        account.uncleared_minor += 0 if final else amount_minor
        self.measures.debts.repays(event.customer, event.reference, amount_minor, final=final)

    def _limit(self, customer: int) -> None:
        limit_minor = self._base_minor[customer] + self._vault_minor[customer]
        self._accounts[customer].limit_minor = limit_minor
        self.measures.debts.limit_is(customer, limit_minor)

    def _clone_taps(self, at_unix_ms: int, event: h.CloneTap) -> None:
        made = self._clones[event.clone]
        if event.clone in self._dead_clones or self._shops[event.shop].stolen:
            return
        phone = self._customers[made.customer].has_phone
        if self._judge(at_unix_ms, event.shop, made.customer, phone, event.amount_minor) is None:
            self._take(event.shop, made.customer, event.amount_minor, event.clone)

    def _dispute(self, customer: int) -> None:
        """The customer sees payments of a copy on the bill: it is made good, and the token replaced."""
        for clone, made in self._clones.items():
            if made.customer == customer and not made.rolled_back and clone in self._cloned_minor:
                self._dead_clones[clone] = None
                self._accounts[customer].owed_minor -= self._billed_minor.pop(clone, 0)


STORE_AND_FORWARD: Final = "store_and_forward"
AVAILABLE_CREDIT: Final = "available_credit"
