"""The simulator's ledger in memory, held to the ledger on its database: one history, equal answers."""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import rsa

from pos_gateway.lab.simulator.books import Books, Tap
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger import Ledger, accounts, store
from pos_gateway.ledger.config import Policy
from pos_gateway.ledger.issue import issue
from pos_gateway.ledger.keys import ICC_KEY_BITS, generate_rsa_key
from pos_gateway.ledger.publisher import terms_from_json
from pos_gateway.ledger.reserve import PublicationKind
from pos_gateway.limits.record import LimitRecord, token_key
from pos_gateway.records import Record
from tests.ledger.shop import Clock, Shop

_DAY_S = 86_400
POLICY = Policy(valid_s=3 * _DAY_S, refresh_after_s=_DAY_S, presentment_deadline_s=4 * _DAY_S)
CARDS_EACH = 2
ACCOUNTS = 3


@dataclass
class Held:
    """One card, what its shops hold of its limits, and what is queued."""

    card: VirtualCard
    token_id: str
    account: int
    pan: str
    limits: dict[int, tuple[LimitRecord, bytes]] = field(default_factory=dict)


class Both:
    """One ledger and one `Books`; each step is done to both."""

    def __init__(self, home: Path, seed: int, icc_key: rsa.RSAPrivateKey) -> None:
        self.clock = Clock()
        self.chance = random.Random(seed)
        self.ledger = Ledger.create(home, issuer="Two Ledgers", policy=POLICY, clock=self.clock)
        self.books = Books(POLICY, lambda: secrets.token_bytes(16))
        self.shops = [Shop.enrol(self.ledger) for _ in range(3)]
        self.queues: list[list[tuple[Record, Tap]]] = [[] for _ in self.shops]
        self.cards: list[Held] = []
        self.account_ids = []
        self.sales = 0
        for _ in range(ACCOUNTS):
            account_id = self.ledger.open_account(holder="Somebody", limit_minor=60_000).id
            self.account_ids.append(account_id)
            account = self.books.open_account(60_000, 0)
            for _ in range(CARDS_EACH):
                issued = self.ledger.issue_token(account_id, icc_key=icc_key)
                card = VirtualCard(issued.personalisation)
                pan = issued.personalisation.pan
                key = token_key(self.ledger.keys.token_key.secret, pan, 1)
                self.cards.append(Held(card, issued.token.id, account, pan))
                self.books.issue_token(account, key, issued.token.highest_counter, returns=False, assurance=1)

    @property
    def now_s(self) -> int:
        return int(self.clock.now_s)

    def publish(self) -> None:
        """The database decides; the same ceilings go into the books."""
        nonce = self._nonce(self.ledger.publish().version)
        for account in range(ACCOUNTS):
            self.books.lapse(account, self.now_s)
        for held in self.cards:
            record, digest = self.shops[0].limit(held.pan, 1)
            token = self.books.token(record.token_key)
            issued = self.books.issue(
                token,
                PublicationKind.SNAPSHOT,
                record.ceiling,
                self.now_s,
                self.now_s + POLICY.valid_s,
                nonce=nonce,
                record=record,
            )
            assert issued.digest == digest
            token.sequence = max(token.sequence, record.sequence)
            # Some shops have a line and learn of it.
            for shop in range(len(self.shops)):
                if self.chance.random() < 0.5 or shop not in held.limits:
                    held.limits[shop] = record, digest

    def note(self, held: Held) -> None:
        """A note in both, as far as the database has free credit."""
        nonce = secrets.token_bytes(16)
        with self.ledger._database.write() as connection:
            account = accounts.lock_account(connection, self.account_ids[held.account], self.now_s)
            line = account.line(held.token_id)
            token = self.books.token(line.row.token_key)
            self.books.lapse(held.account, self.now_s)
            free_minor = self.books.accounts[held.account].free_minor(self.now_s)
            assert account.free_minor == free_minor
            ceiling = line.highest + max(min(free_minor, 2_000), 0)
            valid_until_unix_s = self.now_s + _DAY_S
            issued = issue(
                connection,
                account,
                line,
                kind=PublicationKind.NOTE,
                ceiling=ceiling,
                valid_until_unix_s=valid_until_unix_s,
                nonce=nonce,
                guarantee=POLICY.guarantee,
            )
        same = self.books.issue(
            token,
            PublicationKind.NOTE,
            ceiling,
            self.now_s,
            valid_until_unix_s,
            nonce=nonce,
            record=issued.record,
        )
        assert same.digest == issued.digest
        held.limits[self.chance.randrange(len(self.shops))] = issued.record, issued.digest

    def tap(self, held: Held, number: int, amount_minor: int) -> None:
        """If the limit that the shop holds, still valid or not, lets it."""
        record, digest = held.limits[number]
        token = self.books.token(record.token_key)
        issued = token.issued[digest]
        if self.now_s >= issued.valid_until_unix_s:
            return
        try:
            made = self.shops[number].tap(held.card, amount_minor, limit=(record, digest))
        except AssertionError:
            return  # An ARQC: over the ceiling.
        facts = made.facts()
        self.sales += 1
        tap = Tap(
            id=self.sales,
            token_key=record.token_key,
            amount_minor=amount_minor,
            counter_before=facts["counter_before"],
            counter_after=facts["counter_after"],
            limit_digest=digest,
            at_unix_ms=facts["at_unix_ms"],
            previous_digest=b"",
        )
        self.queues[number].append((made, tap))

    def present(self, number: int) -> None:
        queue, self.queues[number] = self.queues[number], []
        if not queue:
            return
        told = self.shops[number].present(*(record for record, _ in queue))
        terminal_id = self.shops[number].enrolment.terminal_id
        same = self.books.present(terminal_id, [tap for _, tap in queue], [], 0, self.now_s)
        assert [each.verdict for each in told] == [each.verdict for each in same]

    def compare(self) -> None:
        for account, account_id in enumerate(self.account_ids):
            told, book = self.ledger.account(account_id), self.books.accounts[account]
            assert told.outstanding_minor == book.outstanding_minor
            assert told.reserve_minor == book.reserve_minor(self.now_s)
            assert told.free_minor == book.free_minor(self.now_s)
            highest = {t.highest_counter for t in told.tokens}
            assert highest == {t.highest for t in book.tokens}

    def _nonce(self, version: int) -> bytes:
        with self.ledger._database.read() as connection:
            terms = sa.select(store.snapshots.c.terms).filter_by(version=version)
            return terms_from_json(connection.scalars(terms).one()).nonce


@pytest.fixture(scope="module")
def icc_key() -> rsa.RSAPrivateKey:
    return generate_rsa_key(ICC_KEY_BITS)


@pytest.fixture(params=[1, 2])
def both(request: pytest.FixtureRequest, tmp_path: Path, icc_key: rsa.RSAPrivateKey) -> Iterator[Both]:
    made = Both(tmp_path / "ledger", int(request.param), icc_key)
    with closing(made.ledger):
        yield made


def test_both_ledgers_judge_one_history_alike(both: Both) -> None:
    chance = both.chance
    for day in range(14):
        both.publish()
        both.compare()
        for _ in range(6):
            both.clock.now_s += chance.randrange(600, 3 * 3600)
            held = chance.choice(both.cards)
            if chance.random() < 0.3:
                both.note(held)
            both.tap(held, chance.randrange(3), chance.randrange(100, 4_000))
            if chance.random() < 0.4:
                both.present(chance.randrange(2))
            both.compare()
        # The third shop is cut off for days.
        if day % 3 == 2:
            both.present(2)
            both.compare()
        both.clock.now_s += 3 * 3600
    assert both.sales > 30
    # Publications have lapsed, and given their credit back.
    assert any(
        p.stands_until_unix_s < both.now_s for token in both.books.tokens() for p in token.issued.values()
    )
