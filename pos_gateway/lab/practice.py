"""Training: a till of its own, with an issuer, keys, cards and a journal of its own. Every decision is the
real one; no money moves, and every page and paper says so.

A card comes by itself a moment after the page asks for one. Three amounts make something happen, so that
it can be practised: those that end in .51 are declined, those in .19 are taken away too early at first, and
those in .91 meet a card of somebody else.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pos_gateway.gateway.lane import PaymentView, State
from pos_gateway.gateway.synchroniser import Line
from pos_gateway.lab.counter import Counter, open_counter
from pos_gateway.lab.virtual_card import SchemeCard, VirtualCard
from pos_gateway.lab.vpcd import Card

_CARD_COMES_AFTER_S: Final = 1.5
_LIMIT_MINOR: Final = 1_000_000
_CARD_TIMEOUT_S: Final = 60
_LEAVES_AFTER: Final = 4


async def practise(folder: Path, staff: Path, port: int, on_ready: Callable[[Counter], None]) -> None:
    """Until cancelled. `staff`: the shop's register, so that everybody's PIN is the same; a new one without.

    What was practised before is thrown away: it was never money.
    """
    await asyncio.to_thread(_empty, folder, staff)
    seen: set[object] = set()
    cards: dict[str, Card] = {}
    here: list[Counter] = []

    def come(view: PaymentView) -> None:
        reader = here[0].reader
        ending = view.amount_minor % 100
        if ending == 19 and view.state is State.PRESENT_CARD:
            reader.present(cards["good"], leaves_after=_LEAVES_AFTER)
        else:
            reader.present(cards[{51: "poor", 91: "strange"}.get(ending, "good")])

    def on_payment(view: PaymentView) -> None:
        waiting = (view.id, view.state)
        if view.state in (State.PRESENT_CARD, State.TAP_AGAIN) and waiting not in seen:
            seen.add(waiting)
            threading.Timer(_CARD_COMES_AFTER_S, come, (view,)).start()

    async with open_counter(
        folder, port=port, training=True, card_timeout_s=_CARD_TIMEOUT_S, on_payment=on_payment
    ) as counter:
        here.append(counter)
        cards |= await asyncio.to_thread(_cards, counter)
        counter.line = Line.UP
        on_ready(counter)
        await asyncio.Event().wait()


def _empty(folder: Path, staff: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "gateway").mkdir(parents=True, mode=0o700)
    if staff.exists():
        shutil.copy(staff, folder / "gateway" / "staff.json")


def _cards(counter: Counter) -> dict[str, Card]:
    _, good = counter.shop.issue(limit_minor=_LIMIT_MINOR)
    _, poor = counter.shop.issue(limit_minor=1)
    counter.shop.publish()
    return {"good": VirtualCard(good), "poor": VirtualCard(poor), "strange": SchemeCard()}
