"""What is counted of one system, and its course over the days."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pos_gateway.lab.simulator.debts import Debts


@dataclass(slots=True)
class Tally:
    """Purchases of one sort. A decline counts as the price of safety only where there was room: where an
    issuer who knows everything at once would have let it through."""

    tried: int = 0
    approved: int = 0
    without_room: int = 0
    torn: int = 0
    """Off because the card left: with any line or none."""
    declined: Counter[str] = field(default_factory=Counter)
    """With room, by cause."""

    def approves(self) -> None:
        self.tried += 1
        self.approved += 1

    def tears(self) -> None:
        self.tried += 1
        self.torn += 1

    def declines(self, cause: str, *, room: bool) -> None:
        self.tried += 1
        if room:
            self.declined[cause] += 1
        else:
            self.without_room += 1

    @property
    def price_percent(self) -> float:
        return percent(sum(self.declined.values()), self.tried)

    def causes_percent(self) -> dict[str, float]:
        return {
            cause: percent(count, self.tried)
            for cause, count in sorted(self.declined.items(), key=lambda pair: (-pair[1], pair[0]))
        }


@dataclass(slots=True)
class Day:
    """The state at the end of one day; `declined` and `tried` are of that day alone."""

    over_limit_minor: int
    reserve_minor: int
    queue: int
    tried: int
    declined: int


@dataclass(slots=True)
class Measures:
    """Amounts in minor units."""

    debts: Debts = field(default_factory=Debts)
    taps: Tally = field(default_factory=Tally)
    online_with_phone: Tally = field(default_factory=Tally)
    online_without_phone: Tally = field(default_factory=Tally)
    guaranteed: int = 0
    guaranteed_unpaid: int = 0
    unpaid_minor: int = 0
    """Goods handed over that nobody pays the merchant for, guaranteed or not."""
    clones_used: int = 0
    clones_proven: int = 0
    clone_loss_minor: int = 0
    largest_clone_loss_minor: int = 0
    clone_bound_minor: int | None = None
    clone_loss_over_bound: int = 0
    billed_for_clones_minor: int = 0
    days: list[Day] = field(default_factory=list)

    def online(self, has_phone: bool) -> Tally:
        return self.online_with_phone if has_phone else self.online_without_phone

    def end_day(self, *, reserve_minor: int, queue: int) -> None:
        tried = self.taps.tried - sum(day.tried for day in self.days)
        declined = sum(self.taps.declined.values()) - sum(day.declined for day in self.days)
        self.days.append(Day(self.debts.over_now_minor, reserve_minor, queue, tried, declined))

    def to_json(self) -> dict[str, object]:
        over_minor, over_accounts = self.debts.totals()
        online = Tally(
            self.online_with_phone.tried + self.online_without_phone.tried,
            declined=self.online_with_phone.declined + self.online_without_phone.declined,
        )
        return {
            "over_limit_minor": over_minor,
            "over_limit_accounts": over_accounts,
            "guaranteed": self.guaranteed,
            "guaranteed_unpaid": self.guaranteed_unpaid,
            "unpaid_minor": self.unpaid_minor,
            "taps": self.taps.tried,
            "taps_approved": self.taps.approved,
            "taps_without_room": self.taps.without_room,
            "taps_torn": self.taps.torn,
            "price_taps_percent": self.taps.price_percent,
            "price_taps_causes_percent": self.taps.causes_percent(),
            "price_online_percent": online.price_percent,
            "price_online_with_phone_percent": self.online_with_phone.price_percent,
            "price_online_without_phone_percent": self.online_without_phone.price_percent,
            "price_online_causes_percent": online.causes_percent(),
            "clones_used": self.clones_used,
            "clones_proven": self.clones_proven,
            "loss_per_clone_minor": self.clone_loss_minor // max(self.clones_used, 1),
            "largest_clone_loss_minor": self.largest_clone_loss_minor,
            "bound_per_clone_minor": self.clone_bound_minor,
            "clone_losses_over_bound": self.clone_loss_over_bound,
            "billed_for_clones_minor": self.billed_for_clones_minor,
        }


def percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 3) if whole else 0.0
