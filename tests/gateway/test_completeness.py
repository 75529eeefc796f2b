"""What is claimed complete is complete, however taps, batches, clocks, crashes and threads interleave."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st

from pos_gateway.gateway.completeness import OpenPayments, complete_until
from pos_gateway.gateway.journal_view import RunningView
from pos_gateway.records import Kind, uuid7

TOLERANCE_S = 30
ISSUER_TOLERANCE_S = 20
BEGIN_UNIX_MS = 1_764_000_000_000


class Shop:
    """A gateway in small: the real parts that claims hang on, threads as generators that anything may
    come between."""

    def __init__(self) -> None:
        self.view = RunningView()
        self.open = OpenPayments()
        self.ledger_unix_ms = BEGIN_UNIX_MS
        self.clock_unix_ms = BEGIN_UNIX_MS
        self.sequence = 0
        self.times: dict[UUID, int] = {}
        self.acknowledged: set[UUID] = set()
        self.claims: list[int] = []
        self.on_their_way: dict[int, frozenset[UUID]] = {}
        self.threads: list[Iterator[None]] = []
        self.approved = self.claimed = self.ids = 0

    def record(self, kind: Kind, record_id: UUID, about: UUID | None = None, **facts: object) -> None:
        self.sequence += 1
        self.view.add(self.sequence, record_id.bytes, kind, about.bytes if about else None, facts)

    def latest_unix_ms(self) -> int:
        return self.view.value().latest_at_unix_ms

    def trusted(self, at_unix_ms: int) -> bool:
        return at_unix_ms >= self.latest_unix_ms() - 1000 * TOLERANCE_S

    def payment(self) -> Iterator[None]:
        payment_id = self.new_id()
        at_unix_ms = self.clock_unix_ms
        yield
        self.open.begin(payment_id, at_unix_ms)
        yield
        trusted = self.trusted(at_unix_ms)
        yield
        if trusted and self.trusted(self.clock_unix_ms):
            assert all(at_unix_ms > claim for claim in self.claims), "approved within what was claimed"
            self.times[payment_id] = at_unix_ms
            self.record(
                Kind.AUTHORIZATION,
                payment_id,
                at_unix_ms=at_unix_ms,
                amount_minor=1,
                token_key="ab" * 16,
                counter_before=self.sequence,
                counter_after=self.sequence + 1,
            )
            self.approved += 1
            yield
        self.open.end(payment_id)

    def batch(self, size: int) -> Iterator[None]:
        if len(self.on_their_way) == 2:
            return
        latest_unix_ms = self.latest_unix_ms()
        confirmations = self.view.value().clock_confirmations
        yield
        open_unix_ms = self.open.earliest_unix_ms()
        yield
        passing_over = frozenset[UUID]().union(*self.on_their_way.values())
        selection = self.view.select(size, {record_id.bytes for record_id in passing_over})
        waiting = list(self.view.queued_sequences())
        chosen = frozenset(
            UUID(bytes=record_id)
            for record_id, place in zip(list(self.view._queue), waiting, strict=True)
            if place in selection.sequences
        )
        until = complete_until(
            latest_recorded_unix_ms=latest_unix_ms,
            ledger_unix_ms=self.ledger_unix_ms,
            earliest_open_unix_ms=open_unix_ms,
            earliest_left_out_unix_ms=selection.left_out_unix_ms,
            clock_tolerance_s=TOLERANCE_S,
            issuer_tolerance_s=ISSUER_TOLERANCE_S,
        )
        if self.view.value().clock_confirmations != confirmations:
            until = 0
        left_out = [at for i, at in self.times.items() if i not in self.acknowledged and i not in chosen]
        assert all(at > until for at in left_out), "claimed complete, and something waits"
        self.claims.append(until)
        self.claimed += 1
        key = self.sequence * 100 + len(self.claims)
        self.on_their_way[key] = chosen
        yield
        yield
        if self.on_their_way.pop(key, None) is None:
            return
        for record_id in chosen:
            self.acknowledged.add(record_id)
            self.record(
                Kind.ACKNOWLEDGEMENT,
                self.new_id(),
                record_id,
                verdict="posted",
                reason="",
                at_unix_ms=self.clock_unix_ms,
            )

    def step(self, number: int) -> None:
        """One of the threads goes on a little."""
        if self.threads:
            thread = self.threads[number % len(self.threads)]
            if next(thread, thread) is thread:
                self.threads.remove(thread)

    def move_clock(self, by_s: int) -> None:
        self.clock_unix_ms = max(0, self.clock_unix_ms + 1000 * by_s)

    def pass_time(self, s: int) -> None:
        self.move_clock(s)
        self.ledger_unix_ms += 1000 * s

    def lose_an_answer(self) -> None:
        if self.on_their_way:
            self.on_their_way.pop(next(iter(self.on_their_way)))

    def crash(self) -> None:
        """What is in memory is gone; the journal stays."""
        self.threads.clear()
        self.on_their_way.clear()
        self.open = OpenPayments()

    def confirm_clock(self, off_s: int) -> None:
        """A manager sets the clock right, as right as the issuer demands, and says so."""
        self.clock_unix_ms = self.ledger_unix_ms + 1000 * (
            off_s % (2 * ISSUER_TOLERANCE_S) - ISSUER_TOLERANCE_S
        )
        self.record(Kind.CLOCK_CONFIRMATION, self.new_id(), at_unix_ms=self.clock_unix_ms)

    def new_id(self) -> UUID:
        self.ids += 1
        return uuid7(self.clock_unix_ms % (1 << 48), self.ids.to_bytes(10, "big"))


def play(operations: list[tuple[str, int]]) -> Shop:
    shop = Shop()
    words: dict[str, Callable[[int], object]] = {
        "payment": lambda n: shop.threads.append(shop.payment()),
        "batch": lambda n: shop.threads.append(shop.batch(n % 5)),
        "step": shop.step,
        "clock": lambda n: shop.move_clock(n - 50),
        "wild clock": lambda n: shop.move_clock(86_400 * (n - 50)),
        "time": lambda n: shop.pass_time(n // 5),
        "lose": lambda n: shop.lose_an_answer(),
        "crash": lambda n: shop.crash(),
        "confirm": shop.confirm_clock,
    }
    for word, number in operations:
        words[word](number)
    return shop


_WORDS = (
    *("payment",) * 2,
    *("batch",) * 2,
    *("step",) * 8,
    *("time",) * 2,
    *(_RARE := ("clock", "wild clock", "confirm", "lose", "crash")),
)
_OPERATIONS = st.lists(st.tuples(st.sampled_from(_WORDS), st.integers(0, 100)), max_size=120)


@given(_OPERATIONS)
@settings(max_examples=60, deadline=None)
def test_no_approval_ever_falls_within_what_was_claimed_complete(operations: list[tuple[str, int]]) -> None:
    play(operations)


def test_nor_in_long_wild_runs() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(60):
        words = [*chance.sample(_RARE, chance.randint(0, len(_RARE))), *_WORDS[:14]]
        play([(chance.choice(words), chance.randint(0, 100)) for _ in range(600)])


def test_over_long_runs_payments_are_approved_and_claims_move_on() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    words = ["payment", "batch", *["step"] * 10, "time", "lose"]
    shop = play([(chance.choice(words), chance.randint(0, 100)) for _ in range(8000)])
    assert shop.approved > 50
    assert shop.claimed > 50
    assert max(shop.claims) > shop.ledger_unix_ms - 3_600_000


def test_what_corrects_a_payment_on_its_way_waits_for_it() -> None:
    view = RunningView()
    payments = [UUID(int=n) for n in (1, 2)]
    for place, payment_id in enumerate(payments):
        view.add(
            place + 1,
            payment_id.bytes,
            Kind.AUTHORIZATION,
            None,
            {"at_unix_ms": 5, "amount_minor": 1, "token_key": "ab" * 16, "counter_before": place,
             "counter_after": place + 1},
        )  # fmt: skip
    refund = UUID(int=3)
    view.add(3, refund.bytes, Kind.REFUND, payments[0].bytes, {"at_unix_ms": 6, "amount_minor": 1})
    assert view.select(10, set()).sequences == [1, 2, 3]
    assert view.select(10, {payments[0].bytes}).sequences == [2]
    assert view.select(10, {payments[1].bytes}) == ([1, 3], 5, True)
