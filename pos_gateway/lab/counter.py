"""A whole till in one process, without PC/SC: its API and pages over real HTTP, cards in a field of their
own, and the ledger beside it that it presents to when the line is said to be up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from aiohttp import web

from pos_gateway.errors import InvalidMessage, ReaderUnavailable
from pos_gateway.gateway.access import Door
from pos_gateway.gateway.api import LOOPBACK_NAMES, Parts, build_app
from pos_gateway.gateway.deeds import Deeds
from pos_gateway.gateway.events import Event, Hub
from pos_gateway.gateway.fetcher import FolderRepository
from pos_gateway.gateway.history import History
from pos_gateway.gateway.lane import Lane, PaymentView, State
from pos_gateway.gateway.payments import Payments
from pos_gateway.gateway.program import make_desk, now_unix_ms
from pos_gateway.gateway.readers.port import Indication
from pos_gateway.gateway.receipts.desk import Issued
from pos_gateway.gateway.receipts.proofs import LimitProofs
from pos_gateway.gateway.sessions import Sessions
from pos_gateway.gateway.shifts import Shifts
from pos_gateway.gateway.staff import Staff
from pos_gateway.gateway.status import status
from pos_gateway.gateway.synchroniser import Line, SynchroniserState
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.vpcd import Card
from pos_gateway.ledger.config import Policy
from pos_gateway.records import Kind, uuid7

TOKEN: Final = "laboratory-token"  # noqa: S105 - of a till that lives as long as its test


class FieldReader:
    """A reader whose field is a queue: what is put in is presented, once."""

    def __init__(self, name: str = "field") -> None:
        self.name = name
        self.field: queue.Queue[Callable[[], DirectChannel] | Exception | None] = queue.Queue()
        self.indications: list[Indication] = []

    def present(self, card: Card, *, leaves_after: int | None = None) -> None:
        self.field.put(lambda: DirectChannel(card, leaves_after=leaves_after))

    def wait_for_card(self, timeout_s: float) -> DirectChannel | None:
        try:
            found = self.field.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(found, Exception):
            raise found
        return found() if found else None

    def wait_for_removal(self, timeout_s: float) -> bool:
        return True

    def interrupt(self) -> None:
        self.field.put(None)

    def indicate(self, indication: Indication) -> None:
        self.indications.append(indication)

    def close(self) -> None:
        self.interrupt()

    def unplug(self) -> None:
        self.field.put(ReaderUnavailable("the reader is gone"))


class Counter:
    """One till with its parts. `line`: what the page is told of the line; `present` stands in for the
    synchroniser: the real ledger's verdicts, journalled."""

    def __init__(self, shop: Shop, parts: Parts, readers: list[FieldReader], app: web.Application) -> None:
        self.shop = shop
        self.parts = parts
        self.readers = readers
        self.app = app
        self.line = Line.DOWN
        self.address = ""
        self.watchers: dict[UUID, Callable[[], None]] = {}

    @property
    def reader(self) -> FieldReader:
        return self.readers[0]

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {TOKEN}"}

    def present(self) -> int:
        """Present all that waits; returns how many verdicts came."""
        records = self.shop.journal.queue()
        for verdict in self.shop.present(records) if records else ():
            self.acknowledge(verdict.record_id, {"verdict": verdict.verdict.value, "reason": verdict.reason})
        self.tell()
        return len(records)

    def acknowledge(self, record_id: str, told: Mapping[str, Any]) -> None:
        facts = {"about": record_id, "at_unix_ms": now_unix_ms(), **told}
        self.shop.journal.append(Kind.ACKNOWLEDGEMENT, uuid7(now_unix_ms(), os.urandom(10)), facts)

    @contextlib.contextmanager
    def when_final(self, payment_id: UUID, told: Callable[[], None]) -> Iterator[None]:
        """Call `told` in the lane's thread once the payment is final."""
        self.watchers[payment_id] = told
        try:
            yield
        finally:
            del self.watchers[payment_id]

    def tell(self) -> None:
        """Publish the status, as the gateway does when something changed."""
        self.parts.hub.publish(Event("status", self.parts.status()))


@asynccontextmanager
async def open_counter(
    folder: Path,
    *,
    lanes: int = 1,
    idle_s: float = 300,
    card_timeout_s: float = 5,
    tls: ssl.SSLContext | None = None,
    serve: bool = True,
    policy: Policy | None = None,
    port: int = 0,
    training: bool = False,
    on_payment: Callable[[PaymentView], None] = lambda view: None,
) -> AsyncIterator[Counter]:
    """A ledger that lies in the folder is used; making one takes a second. `training`: pages and papers say
    that no money moves. `on_payment`: told every change of a payment, from any thread."""
    async with contextlib.AsyncExitStack() as stack:
        shop = stack.enter_context(Shop(folder, policy=policy))
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        hub = Hub(loop)
        proofs = stack.enter_context(contextlib.closing(LimitProofs(shop.home.receipts, shop.feed.current)))
        issued = stack.enter_context(contextlib.closing(Issued(shop.home.receipts)))
        proofs.start()
        counter: Counter | None = None

        def tell() -> dict[str, Any]:
            line = counter.line if counter is not None else Line.UNKNOWN
            state = SynchroniserState(line=line)
            return status(
                shop.enrolment,
                shop.settings,
                shop.journal,
                shop.feed,
                state,
                payments,
                shop.till.singles,
                now_unix_ms(),
            )

        def changed(view: PaymentView) -> None:
            hub.publish(Event("payment", view.as_json()))
            on_payment(view)
            if view.state.final:
                if counter is not None and (told := counter.watchers.get(view.id)) is not None:
                    told()
                if view.state is State.APPROVED and view.facts is not None:
                    proofs.keep_soon(view.id, view.facts)
                loop.call_soon_threadsafe(news.set)

        async def keep_telling() -> None:
            while True:
                await news.wait()
                news.clear()
                hub.publish(Event("status", await asyncio.to_thread(tell)))

        def fetch(place: Path) -> dict[str, Any]:
            return {"changed": shop.feed.refresh(FolderRepository(place))}

        def confirm(time_unix_ms: int) -> dict[str, Any]:
            raise InvalidMessage("before the enrolment", where="time_unix_ms")

        payments = Payments(shop.till, shop.journal, changed)
        readers = [FieldReader("field" if n == 0 else f"field {n + 1}") for n in range(lanes)]
        for number, reader in enumerate(readers, start=1):
            lane = Lane(
                f"lane-{number}", reader, shop.till, card_timeout_s=card_timeout_s, show=payments.changed
            )
            payments.add_lane(lane)
            lane.start()
            stack.push_async_callback(asyncio.to_thread, lane.close)
        history = History(shop.home.journal)
        parts = Parts(
            payments=payments,
            hub=hub,
            door=Door(
                staff=Staff(shop.home.staff, shop.home.setup_code, now_unix_ms),
                sessions=Sessions(idle_s=idle_s, longest_s=43_200),
                token=TOKEN,
                host_names=LOOPBACK_NAMES,
                secure=tls is not None,
            ),
            deeds=Deeds(shop.journal, now_unix_ms),
            shifts=Shifts(shop.journal, history, now_unix_ms),
            history=history,
            desk=make_desk(
                shop.enrolment, shop.settings, shop.till, shop.journal, shop.feed, proofs, issued, shop.key
            ),
            status=tell,
            synchronise=lambda: None,
            fetch_limits=fetch,
            confirm_clock=confirm,
            line_is_down=lambda: counter is not None and counter.line is Line.DOWN,
        )
        parts.desk.shop = replace(parts.desk.shop, training=training)
        counter = Counter(shop, parts, readers, build_app(parts))
        if serve:
            runner = web.AppRunner(counter.app, access_log=None, shutdown_timeout=0.5)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls).start()
            counter.address = f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
        telling = asyncio.create_task(keep_telling(), name="status")
        stack.callback(telling.cancel)
        stack.callback(hub.close)
        yield counter
