"""A shop that was cut off for long: its journal full of genuine payments that wait for the ledger.

Cards, certificates, cryptograms and sealed proofs are real, and the gateway's own till makes every record
of them; only the reader is left out. Several processes tap, each with cards of its own; the journal
commits one record after the other, as a shop's does, so that each carries a signature of its own.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Final
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from pos_gateway.authorization.decision import Interval
from pos_gateway.authorization.policy import Exposure
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.errors import NotFound, PosGatewayError
from pos_gateway.gateway.config import load_applications
from pos_gateway.gateway.journal_view import NO_EXPOSURE
from pos_gateway.gateway.program import ca_public_key, local_now, station
from pos_gateway.gateway.till import Approved, Till
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger.config import Policy
from pos_gateway.records import GENESIS_HASH, Kind, Record, canonical_json, uuid7

AMOUNT_MINOR: Final = 100
POLICY: Final = Policy(card_tc_rate_limit=1_000_000, card_cumulative_cap_minor=10**12)
"""Cards that pay as often as they are asked to."""

_SENT_TOGETHER: Final = 50


def issue_cards(shop: Shop, cards: int, taps: int) -> list[Personalisation]:
    """So many accounts with a card each, whose published limits are good for so many taps in all and some
    more."""
    limit_minor = 2 * AMOUNT_MINOR * (taps // cards + 2)
    issued = [shop.issue(limit_minor=limit_minor)[1] for _ in range(cards)]
    shop.publish()
    return issued


def fill_journal(
    shop: Shop,
    cards: Sequence[Personalisation],
    taps: int,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Let the cards pay in turn until the shop's journal has so many payments more."""
    for done, (record_id, facts, proof) in enumerate(_taps(shop, cards, taps), start=1):
        shop.journal.append(Kind.AUTHORIZATION, record_id, facts, proof)
        if done % 1000 == 0:
            progress(done)


_Sale = tuple[UUID, dict[str, Any], bytes]


def _taps(shop: Shop, cards: Sequence[Personalisation], taps: int) -> Iterator[_Sale]:
    """The tills' work, shared among processes; forked, so that they have the shop's limits open."""
    context = multiprocessing.get_context("fork")
    tills = min(os.cpu_count() or 1, len(cards))
    pipes = []
    for number in range(tills):
        receive, send = context.Pipe(duplex=False)
        mine = cards[number::tills]
        share = taps // tills + (number < taps % tills)
        till = context.Process(target=_tap_all, args=(send, shop, mine, share, number), daemon=True)
        till.start()
        send.close()
        pipes.append((till, receive))
    try:
        left = [iter(_received(receive)) for _, receive in pipes]
        yield from (sale for together in itertools.zip_longest(*left) for sale in together if sale)
    finally:
        for till, receive in pipes:
            receive.close()
            till.kill()
            till.join()


def _received(pipe: Connection) -> Iterator[_Sale]:
    while sales := pipe.recv():
        if isinstance(sales, str):
            raise PosGatewayError(f"a tap was not approved: {sales}")
        yield from sales


def _tap_all(pipe: Connection, shop: Shop, issued: Sequence[Personalisation], taps: int, first: int) -> None:
    cards = itertools.cycle([VirtualCard(personalisation) for personalisation in issued])
    drawer = _Drawer()
    till = Till(
        station=station(shop.enrolment),
        policy=shop.settings.policy(),
        aids=load_applications().aids,
        journal=drawer,
        limits=shop.feed.current,
        ca_keys=[ca_public_key(key) for key in shop.enrolment.ca_keys],
        token_key_secret=shop.enrolment.token_key_secret,
        sealing_key=X25519PublicKey.from_public_bytes(shop.enrolment.sealing_key),
        clock=local_now,
        random_bytes=os.urandom,
    )
    for number in range(first, first + taps):
        payment_id = uuid7(time.time_ns() // 1_000_000, os.urandom(10))
        payment = till.new_payment(payment_id, AMOUNT_MINOR, number)
        outcome = till.tap(payment, DirectChannel(next(cards)))
        if not isinstance(outcome, Approved):
            pipe.send(str(outcome))
            return
        if len(drawer.sales) == _SENT_TOGETHER:
            pipe.send(drawer.sales)
            drawer.sales = []
    if drawer.sales:
        pipe.send(drawer.sales)
    pipe.send([])


class _Drawer:
    """Where a till puts its payments until they are brought to the shop's journal."""

    latest_at_unix_ms = 0
    exposure: Exposure = NO_EXPOSURE

    def __init__(self) -> None:
        self.sales: list[_Sale] = []

    def append(self, kind: Kind, record_id: UUID, facts: Mapping[str, Any], proof: bytes = b"") -> Record:
        self.sales.append((record_id, dict(facts), proof))
        body = canonical_json(facts)
        return Record(1, record_id, kind, body, proof, GENESIS_HASH, GENESIS_HASH, bytes(64))

    def get(self, record_id: UUID) -> Record:
        raise NotFound(f"no record {record_id}")

    def about(self, record_id: UUID) -> list[Record]:
        return []

    def overlapping(self, token_key: bytes, before: int, after: int) -> tuple[Interval, ...]:
        return ()
