"""Shops, cards and an issuer in one process, small enough to try thousands of histories.

The issuer thinks with the ledger's own pure functions (`reserve`, `balance`, `allowance`); what the database
does is a copy here, and a backup another. Shops decide as gateways do, by their own clock and the highest
valid ceiling they hold. `broken` switches one rule off, to show that somebody notices.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field, replace
from typing import Final

from pos_gateway.ledger.allowance import AllowancePolicy, Candidate, allot, shares_minor
from pos_gateway.ledger.balance import Balance
from pos_gateway.ledger.reserve import (
    CounterLine,
    Guarantee,
    Interval,
    Publication,
    contains,
    interval_set,
    measure,
)

SCALAR: Final = "a scalar reserve instead of intervals"
SHOP_CLOCK: Final = "a shop's clock as evidence"
DELTA_EXTENDS: Final = "a delta extending unlisted tokens"
FORGETFUL: Final = "a restore that forgets publications"
BOUNCE_IGNORED: Final = "a bounced repayment ignored"
BROKEN_RULES: Final = (SCALAR, SHOP_CLOCK, DELTA_EXTENDS, FORGETFUL, BOUNCE_IGNORED)

GUARANTEE: Final = Guarantee(clock_tolerance_s=1, presentment_deadline_s=6)
START: Final = 1_000
LIMIT: Final = 60


class Broken(AssertionError):
    """A promise of the reserve principle was not kept."""


@dataclass(slots=True)
class Card:
    """The chip: its counter, and how it names its last TC."""

    token: int
    counter: int
    last: int = 0
    honest: bool = True


@dataclass(frozen=True, slots=True)
class Limit:
    """A record as a shop holds it."""

    digest: bytes
    ceiling: int
    valid_until: int


@dataclass(frozen=True, slots=True)
class Tap:
    """A TC. `at` is the true time, `stamp` the shop's; `previous`, `name` chain the card's TCs."""

    token: int
    before: int
    after: int
    at: int
    stamp: int
    digest: bytes
    name: int
    previous: int
    guaranteed: bool
    present_by: int

    @property
    def interval(self) -> Interval:
        return self.before, self.after

    @property
    def amount(self) -> int:
        return self.after - self.before


@dataclass(slots=True)
class Shop:
    """One gateway. `skew`: how far its clock is off."""

    terminal: str
    skew: int
    base: tuple[int, dict[int, Limit], int] = (0, {}, 0)
    delta: tuple[int, dict[int, Limit], int] = (0, {}, 0)
    singles: dict[int, list[Limit]] = field(default_factory=dict)
    queue: list[Tap] = field(default_factory=list)
    told: list[Tap] = field(default_factory=list)
    torn: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def honest(self) -> bool:
        return abs(self.skew) <= GUARANTEE.clock_tolerance_s


@dataclass(slots=True)
class Books:
    """What the issuer's database holds: of this a backup is a copy."""

    balance: Balance
    lines: list[CounterLine]
    blocked: set[int] = field(default_factory=set)
    published: dict[bytes, tuple[int, Publication]] = field(default_factory=dict)
    posted: dict[int, int] = field(default_factory=dict)
    claims: list[list[tuple[Interval, bool]]] = field(default_factory=list)
    renounced: dict[int, int] = field(default_factory=dict)
    pointing: dict[int, tuple[int, int]] = field(default_factory=dict)
    complete: dict[str, int] = field(default_factory=dict)
    open_money: list[int] = field(default_factory=list)


class World:
    def __init__(self, tokens: int, skews: tuple[int, ...], broken: str | None = None) -> None:
        self.broken = broken
        self.now = 100
        self.books = Books(
            Balance(limit_minor=LIMIT, target_line_minor=LIMIT),
            [CounterLine(START * (i + 1)) for i in range(tokens)],
            claims=[[] for _ in range(tokens)],
        )
        self.cards = [Card(i, START * (i + 1)) for i in range(tokens)]
        self.shops = [Shop(f"T{i}", skew) for i, skew in enumerate(skews)]
        self.cloned: set[int] = set()
        self.versions: list[tuple[int, int, dict[int, Limit], int]] = []  # version, base, records, valid
        self.log: list[tuple[int, Publication]] = []
        self.backup: tuple[Books, int] | None = None
        self.money_since: list[tuple[str, int]] = []
        self.allowed_over = 0
        self.truly_paid: dict[int, int] = {}  # names of TCs → what the customer owes for them
        self.truly_received = 0
        self._names = itertools.count(1)

    # The issuer.

    def reserve(self, line: CounterLine) -> int:
        if self.broken == SCALAR:
            ends = [p.end for p in line.publications if p.stands(self.now)]
            return max([*ends, line.highest]) - line.highest
        return measure(line.claimable(self.now))

    def reserves(self) -> int:
        return sum(map(self.reserve, self.books.lines))

    def free(self) -> int:
        return self.books.balance.free_minor(self.reserves())

    def lapse(self) -> None:
        for line in self.books.lines:
            line.lapse(self.now)

    def _give(self, token: int, ceiling: int, life: int, terminal: str | None = None) -> Limit:
        line = self.books.lines[token]
        digest = next(self._names).to_bytes(16, "big")
        until = self.now + life
        publication = Publication(
            highest=line.highest,
            ceiling=ceiling,
            stands_until_unix_s=GUARANTEE.stands_until_unix_s(until),
            valid_until_unix_s=until,
            issued_unix_s=self.now,
            terminal_id=terminal,
            digest=digest,
        )
        line.publications.append(publication)
        self.books.published[digest] = (token, publication)
        self.log.append((token, publication))
        return Limit(digest, ceiling, until)

    def _ceilings(self, tokens: list[int], percent: int) -> list[int]:
        candidates = []
        for line in (self.books.lines[t] for t in tokens):
            claim = line.claimable(self.now)
            if self.broken == SCALAR:
                claim = interval_set([(line.highest, line.highest + self.reserve(line))])
            candidates.append(Candidate(claim, line.highest))
        free = self.free()
        shares = shares_minor(
            candidates,
            owable_minor=free + self.reserves(),
            share_percent=percent,
            policy=AllowancePolicy(),
        )
        return list(allot(candidates, shares, free_minor=free))

    def publish(self, life: int, percent: int = 100, listed: int | None = None) -> None:
        """A whole snapshot, or a delta over the newest whole one that lists some tokens only."""
        self.lapse()
        self.complete()
        version = len(self.versions) + 1
        base = 0
        if listed is not None:
            whole = [v for v, b, _, _ in self.versions if b == 0]
            if not whole:
                return
            base = whole[-1]
        tokens = [t for t in range(len(self.books.lines)) if listed is None or listed >> t & 1]
        active = [t for t in tokens if t not in self.books.blocked]
        records = dict.fromkeys(tokens, Limit(b"", 0, 0))
        for token, ceiling in zip(active, self._ceilings(active, percent), strict=True):
            records[token] = self._give(token, ceiling, life)
        self.versions.append((version, base, records, self.now + life))

    def grant(self, shop: Shop, card: Card, amount: int, life: int) -> None:
        """An ARQC with the line up: evidence first, then a ceiling for that terminal, if there is credit."""
        if not card.honest or card.token in self.books.blocked:
            return
        self.lapse()
        line = self.books.lines[card.token]
        held = self.limit(shop, card.token)
        relied_on = self.books.published.get(held.digest) if held else None
        line.observe(
            counter_before=card.counter,
            counter_after=card.counter,
            relied_on_issued_unix_s=relied_on[1].issued_unix_s if relied_on else 0,
            guarantee=GUARANTEE,
        )
        ceiling = card.counter + amount
        if line.highest <= ceiling and line.cost_minor(ceiling, self.now) <= max(self.free(), 0):
            single = self._give(card.token, ceiling, life, shop.terminal)
            shop.singles.setdefault(card.token, []).append(single)

    def returned(self, card: Card, amount: int) -> None:
        """A phone gives unused allowance back: points claimed, no money owed."""
        line = self.books.lines[card.token]
        interval = (card.counter, card.counter + amount)
        if card.honest and card.token not in self.cloned and contains(line.claimable(self.now), interval):
            card.counter += amount
            card.last = next(self._names)
            line.highest = max(line.highest, card.counter)
            line.posted.append(interval)
            self.books.claims[card.token].append((interval, True))

    def complete(self) -> None:
        self.books.balance, _ = self.books.balance.complete(reserve_minor=self.reserves())

    def judge(self, shop: Shop, tap: Tap) -> None:
        """One presentment, as the ledger settles it."""
        books = self.books
        if tap.name in books.posted:
            return
        line, interval = books.lines[tap.token], tap.interval
        relied_on = books.published.get(tap.digest)
        claimable = line.claimable(self.now)
        if relied_on is not None:
            issued = tap.stamp if self.broken == SHOP_CLOCK else relied_on[1].issued_unix_s
            line.observe(
                counter_before=tap.before,
                counter_after=tap.after,
                relied_on_issued_unix_s=issued,
                guarantee=GUARANTEE,
            )
        books.pointing[tap.previous] = (tap.token, tap.before)
        self._write_off(tap.previous)
        overlaps = any(p and i[0] < tap.after and tap.before < i[1] for i, p in books.claims[tap.token])
        in_u = contains(claimable, interval)
        if self.broken == SCALAR:
            tops = [p.end for p in line.publications if p.stands(self.now)]
            in_u = tap.after <= max([*tops, 0])
        believed = relied_on is not None and tap.stamp > books.complete.get(shop.terminal, 0)
        charge = in_u or (tap.amount <= self.free() and tap.token not in books.blocked)
        if believed and not overlaps and charge:
            if not in_u:
                self.lapse()
            books.balance = books.balance.owe(tap.amount)
            line.posted.append(interval)
            books.claims[tap.token].append((interval, True))
            books.posted[tap.name] = tap.amount
            self.truly_paid[tap.name] = tap.amount
            return
        books.claims[tap.token].append((interval, False))
        self.truly_paid.pop(tap.name, None)
        if overlaps:
            books.blocked.add(tap.token)

    def _write_off(self, name: int) -> None:
        if name in self.books.renounced and name in self.books.pointing:
            token, before = self.books.pointing[name]
            self.books.lines[token].posted.append((before - self.books.renounced[name], before))

    # Money.

    def repay(self, amount: int) -> None:
        self.books.balance = self.books.balance.repaid(amount)
        self.books.open_money.append(amount)
        self.money_since.append(("repay", amount))

    def settle_money(self, place: int, *, final: bool) -> None:
        if not self.books.open_money:
            return
        amount = self.books.open_money.pop(place % len(self.books.open_money))
        self.money_since.append(("final" if final else "bounce", amount))
        if final:
            self.truly_received += amount
        if final or self.broken == BOUNCE_IGNORED:
            self.books.balance = self.books.balance.cleared(amount)
        else:
            self.books.balance = self.books.balance.bounced(amount)

    # Shops and cards.

    def fetch(self, shop: Shop, back: int) -> None:
        """A whole snapshot, the newest or an older one that is not older than what the shop has."""
        wholes = [v for v in self.versions if v[1] == 0 and v[0] > max(shop.base[0], shop.delta[0])]
        if wholes:
            version, _, records, until = wholes[max(len(wholes) - 1 - back, 0)]
            shop.base, shop.delta = (version, records, until), (0, {}, 0)

    def fetch_delta(self, shop: Shop) -> None:
        deltas = [v for v in self.versions if v[1] and v[1] == shop.base[0] and v[0] > shop.delta[0]]
        if deltas:
            version, base, records, until = deltas[-1]
            # Cumulative since its base.
            listed = {
                t: r for v, b, rs, _ in self.versions if b == base and v <= version for t, r in rs.items()
            }
            shop.delta = (version, listed | records, until)

    def limit(self, shop: Shop, token: int) -> Limit | None:
        """The highest ceiling that is valid by the shop's clock."""
        clock = self.now + shop.skew
        found = [single for single in shop.singles.get(token, []) if clock < single.valid_until]
        record = shop.delta[1].get(token)
        if record is None:
            record = shop.base[1].get(token)
            if record is not None and self.broken == DELTA_EXTENDS and shop.delta[0]:
                record = replace(record, valid_until=max(record.valid_until, shop.delta[2]))
        if record is not None and clock < record.valid_until:
            found.append(record)
        return max(found, key=lambda limit: limit.ceiling, default=None)

    def tap(self, shop: Shop, card: Card, amount: int, *, torn: bool) -> None:
        limit = self.limit(shop, card.token)
        if limit is None or card.counter + amount > limit.ceiling:
            return
        before, name = card.counter, next(self._names)
        card.counter, previous, card.last = before + amount, card.last, name
        if torn:
            shop.torn.append((card.token, name, amount))
            return
        shop.queue.append(
            Tap(
                token=card.token,
                before=before,
                after=card.counter,
                at=self.now,
                stamp=self.now + shop.skew,
                digest=limit.digest,
                name=name,
                previous=previous,
                guaranteed=shop.honest and card.token not in self.cloned,
                present_by=self.now + GUARANTEE.presentment_deadline_s,
            )
        )

    def clone(self, card: Card, back: int) -> None:
        """A copy of the card, as it was a while ago. From here on nobody is promised anything for it."""
        self.cloned.add(card.token)
        self.cards.append(Card(card.token, max(card.counter - back, START), honest=False))
        for shop in self.shops:
            shop.queue = [replace(t, guaranteed=t.guaranteed and t.token != card.token) for t in shop.queue]
            shop.told = [replace(t, guaranteed=t.guaranteed and t.token != card.token) for t in shop.told]

    def present(self, shop: Shop, place: int) -> None:
        if not shop.queue:
            return
        tap = shop.queue.pop(place % len(shop.queue))
        self.judge(shop, tap)
        shop.told.append(tap)
        if tap.guaranteed and self.now <= tap.present_by and tap.name not in self.books.posted:
            raise Broken(f"a guaranteed payment was not posted: {tap}")

    def synchronise(self, shop: Shop) -> None:
        """All that waits, and that with it everything up to now was told."""
        while shop.queue:
            self.present(shop, 0)
        for _, name, amount in shop.torn:
            self.books.renounced[name] = amount
            self._write_off(name)
        shop.torn.clear()
        until = min(self.now + shop.skew - 1, self.now)
        if until > self.books.complete.get(shop.terminal, 0):
            self.books.complete[shop.terminal] = until
            for line in self.books.lines:
                line.free(shop.terminal, until, GUARANTEE)

    # The disaster.

    def back_up(self) -> None:
        self.backup = (copy.deepcopy(self.books), len(self.log))
        self.money_since = []

    def restore(self) -> None:
        """The database as it was, then everything that others remember: the signer's log, the bank, and,
        as they come, the shops."""
        if self.backup is None:
            return
        books, logged = self.backup
        self.books = copy.deepcopy(books)
        if self.broken != FORGETFUL:
            for token, publication in self.log[logged:]:
                self.books.lines[token].publications.append(publication)
                self.books.published[publication.digest] = (token, publication)
        grace = self.now + GUARANTEE.presentment_deadline_s
        for line in self.books.lines:
            line.publications = [
                replace(p, stands_until_unix_s=max(p.stands_until_unix_s, grace)) for p in line.publications
            ]
        for what, amount in self.money_since:
            if what == "repay":
                self.books.balance = self.books.balance.repaid(amount)
                self.books.open_money.append(amount)
            else:
                self.books.open_money.remove(amount)
                balance = self.books.balance
                told = balance.cleared if what == "final" else balance.bounced
                if self.broken == BOUNCE_IGNORED:
                    told = balance.cleared
                self.books.balance = told(amount)
        for shop in self.shops:
            again = [t for t in shop.told if t.name in self.truly_paid and t.name not in self.books.posted]
            shop.told = [t for t in shop.told if t not in again]
            shop.queue += [replace(t, present_by=grace) for t in again]
        for name in list(self.truly_paid):
            if name not in self.books.posted and all(
                t.name != name for shop in self.shops for t in shop.queue
            ):
                del self.truly_paid[name]
        self.allowed_over = self.books.balance.committed_minor(self.reserves())
        self.backup = (copy.deepcopy(self.books), len(self.log))
        self.money_since = []

    # What is promised.

    def check(self) -> None:
        balance, reserves = self.books.balance, self.reserves()
        committed = balance.committed_minor(reserves)
        if committed > max(balance.limit_minor, self.allowed_over):
            raise Broken(f"committed {committed} of {balance.limit_minor}")
        self.allowed_over = min(self.allowed_over, committed) if self.allowed_over else 0
        owed = sum(self.truly_paid.values()) - self.truly_received
        waiting = 0
        for shop in self.shops:
            for tap in shop.queue:
                if not tap.guaranteed or self.now > tap.present_by:
                    continue
                if tap.name not in self.truly_paid:
                    waiting += tap.amount
                if self.broken == SCALAR:
                    continue
                if not contains(self.books.lines[tap.token].claimable(self.now), tap.interval):
                    raise Broken(f"a guaranteed payment is not reserved: {tap}")
        if owed + waiting > LIMIT:
            raise Broken(f"the customer owes {owed} and {waiting} more were approved, of {LIMIT}")
