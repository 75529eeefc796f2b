"""The gateway as it runs in a shop: its parts put together, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any, Final

import structlog
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from pos_gateway.emv.authentication import CaPublicKey
from pos_gateway.enrolment import CaKey, Enrolment
from pos_gateway.errors import InvalidConfiguration, ReaderUnavailable, Unavailable
from pos_gateway.gateway.access import Door, is_loopback
from pos_gateway.gateway.api import LOOPBACK_NAMES, Parts, build_app
from pos_gateway.gateway.carry import export_queue, read_letters, take_limits
from pos_gateway.gateway.certificate import CertificateKeeper, TlsFile, TlsIdentity
from pos_gateway.gateway.clock import confirm_clock
from pos_gateway.gateway.config import Home, Settings, load_applications, load_settings
from pos_gateway.gateway.daemon_thread import in_daemon_thread
from pos_gateway.gateway.deeds import Deeds
from pos_gateway.gateway.events import Event, Hub
from pos_gateway.gateway.feed import SnapshotFeed
from pos_gateway.gateway.fetcher import FolderRepository
from pos_gateway.gateway.history import History
from pos_gateway.gateway.identity import load_enrolment, load_identity
from pos_gateway.gateway.issuer_line import IssuerLine, LedgerLine
from pos_gateway.gateway.journal import Journal
from pos_gateway.gateway.journal_view import Refusals
from pos_gateway.gateway.lane import Lane, PaymentView, State
from pos_gateway.gateway.ledger_client import LedgerClient
from pos_gateway.gateway.line import connect_probe
from pos_gateway.gateway.metrics import GatewayMetrics
from pos_gateway.gateway.nexo.interface import PosInterface, open_pos_interface
from pos_gateway.gateway.page_tls import self_signed, server_context
from pos_gateway.gateway.payments import Payments
from pos_gateway.gateway.pruner import Pruner
from pos_gateway.gateway.readers.models import load_models
from pos_gateway.gateway.readers.source import Readers, ReaderSource
from pos_gateway.gateway.receipts.contents import Shop
from pos_gateway.gateway.receipts.desk import Desk, Issued
from pos_gateway.gateway.receipts.proofs import LimitProofs
from pos_gateway.gateway.sessions import Sessions
from pos_gateway.gateway.shifts import Shifts
from pos_gateway.gateway.staff import Staff, machine_token
from pos_gateway.gateway.status import refused, status
from pos_gateway.gateway.synchroniser import Line, Synchroniser, SynchroniserState
from pos_gateway.gateway.till import Clock, Outcome, Station, Till
from pos_gateway.money import currency

_log = structlog.get_logger(__name__)

_LOOK_FOR_READERS_S: Final = 1.0


def now_unix_ms() -> int:
    return time.time_ns() // 1_000_000


def local_now() -> datetime:
    """The shop's time with its zone: cards are dated by the calendar on the wall."""
    return datetime.now().astimezone()


def station(enrolment: Enrolment) -> Station:
    return Station(
        gateway_id=enrolment.gateway_id,
        terminal_id=enrolment.terminal_id,
        merchant_id=enrolment.merchant.id,
        merchant_category=enrolment.merchant.category,
        currency=currency(enrolment.currency),
        country_numeric=enrolment.country_numeric,
    )


def ca_public_key(key: CaKey) -> CaPublicKey:
    """
    Raises:
        InvalidConfiguration: the expiry is no date.
    """
    try:
        expires = date.fromisoformat(key.expires) if key.expires else None
    except ValueError:
        raise InvalidConfiguration("not a date", where="enrolment field ca_keys.expires") from None
    return CaPublicKey(key.rid, key.index, int.from_bytes(key.modulus, "big"), key.exponent, expires)


def make_till(
    enrolment: Enrolment,
    settings: Settings,
    journal: Journal,
    feed: SnapshotFeed,
    *,
    clock: Clock = local_now,
    random_bytes: Callable[[int], bytes] = os.urandom,
    issuer: IssuerLine | None = None,
) -> Till:
    """
    Raises:
        InvalidConfiguration: settings that do not fit the enrolment.
    """
    if settings.terminal.currency != enrolment.currency:
        raise InvalidConfiguration(
            f"is {settings.terminal.currency}, but this gateway was enrolled for {enrolment.currency}",
            where="terminal.currency",
        )
    applications = load_applications()
    return Till(
        station=station(enrolment),
        policy=settings.policy(),
        aids=applications.aids,
        journal=journal,
        limits=feed.current,
        ca_keys=[ca_public_key(key) for key in enrolment.ca_keys]
        + [key.public_key() for key in applications.ca_key],
        token_key_secret=enrolment.token_key_secret,
        sealing_key=X25519PublicKey.from_public_bytes(enrolment.sealing_key),
        clock=clock,
        random_bytes=random_bytes,
        issuer=issuer,
        grant_budget_s=settings.grants.budget_ms / 1000,
        write_notes=settings.grants.write_notes,
    )


async def serve(home: Home, *, on_ready: Callable[[str], None], readers: ReaderSource | None = None) -> None:
    """Run the gateway until SIGINT or SIGTERM.

    `on_ready` is given the address of the local API once it answers. `readers`: all of this machine if not
    said.

    Raises:
        NotFound: not enrolled.
        InvalidConfiguration: settings, identity or enrolment are wrong.
        Unavailable: the journal or the port is in use.
        AuthenticationFailed: the journal was changed.
    """
    settings = load_settings(home)
    enrolled = load_enrolment(home.enrolment)
    key = load_identity(home.identity_key)
    enrolment = enrolled.enrolment
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signal_number, stop.set)

    async with contextlib.AsyncExitStack() as stack:
        journal = stack.enter_context(
            Journal.open(home.journal, gateway_key=key, gateway_id=enrolment.gateway_id)
        )
        feed = SnapshotFeed(
            home.snapshots,
            journal,
            enrolment,
            clock=now_unix_ms,
            # New limits must never be what stops payments: twice what payments stop at stays free.
            keep_free_bytes=2 * settings.journal.headroom_bytes,
        )
        await asyncio.to_thread(feed.load)
        feed.start_merging()
        stack.callback(feed.close)
        shown: TlsIdentity = TlsFile(home.credentials)
        client = await stack.enter_async_context(
            LedgerClient(enrolled.ledger_url, enrolment.authority, shown)
        )
        hub = Hub(loop)
        news = asyncio.Event()

        def status_changed() -> None:
            loop.call_soon_threadsafe(news.set)

        metrics = GatewayMetrics()
        issuer = LedgerLine(
            client, key, loop, lambda: synchroniser.state.line is not Line.DOWN, observe=metrics.asked
        )
        till = make_till(enrolment, settings, journal, feed, issuer=issuer)
        refusals = Refusals(journal.view.refused)

        def synchronised(_: SynchroniserState) -> None:
            status_changed()
            for refusal in refusals.new(journal.view.refused):
                hub.publish(Event("refused", refused(refusal, till.station.currency)))

        synchroniser = Synchroniser(
            journal,
            client,
            feed,
            gateway_id=enrolment.gateway_id,
            signer=key,
            interval_s=settings.synchroniser.interval_s,
            clock=now_unix_ms,
            rng=random.SystemRandom(),
            open_payments=till.open_payments,
            clock_tolerance_s=settings.clock.tolerance_s,
            probe=connect_probe(enrolled.ledger_url),
            listener=synchronised,
            observe=metrics.presented,
        )
        certificates = CertificateKeeper(
            client,
            shown,
            gateway_id=enrolment.gateway_id,
            device_key=key,
            authority=enrolment.authority,
            clock=now_unix_ms,
            rng=random.SystemRandom(),
            renewed=synchroniser.synchronise_now,
        )
        pos: PosInterface | None = None

        def changed(view: PaymentView) -> None:
            if pos is not None:
                pos.desk.payment_changed(view)
            hub.publish(Event("payment", view.as_json()))
            if view.state.final:
                if view.state is State.APPROVED and view.facts is not None:
                    proofs.keep_soon(view.id, view.facts)
                status_changed()
                if synchroniser.state.line is not Line.DOWN:
                    synchroniser.synchronise_now()

        payments = Payments(till, journal, changed, headroom_bytes=settings.journal.headroom_bytes)
        proofs = stack.enter_context(contextlib.closing(LimitProofs(home.receipts, feed.current)))
        issued = stack.enter_context(contextlib.closing(Issued(home.receipts)))
        proofs.start()
        pos = await _open_pos(stack, home, settings, enrolment, payments, journal, synchroniser)

        def tell_status() -> dict[str, Any]:
            return status(
                enrolment,
                settings,
                journal,
                feed,
                synchroniser.state,
                payments,
                till.singles,
                now_unix_ms(),
                certificate=certificates.state(),
            )

        metrics.watch(tell_status)
        source = readers or Readers(load_models(home.readers), paths=settings.reader.frontends).source
        lanes = _LaneKeeper(payments, till, settings, source, status_changed, metrics.tapped)
        stack.callback(lanes.close)
        lanes.start()

        def fetch_limits(folder: Path) -> dict[str, Any]:
            changed = feed.refresh(FolderRepository(folder))
            limits = feed.current()
            return {"changed": changed, "version": limits.version if limits else None}

        def carry_out(folder: Path) -> dict[str, Any]:
            return export_queue(journal, enrolment.gateway_id, key, folder).as_json()

        async def carry_in(folder: Path) -> dict[str, Any]:
            limits = await in_daemon_thread(lambda: take_limits(feed, folder), "limits")
            letters, read = await asyncio.to_thread(
                read_letters,
                folder,
                authority=enrolment.authority,
                gateway_id=enrolment.gateway_id,
                now_unix_ms=now_unix_ms(),
            )
            taken = await synchroniser.take_letters(letters, read)
            status_changed()
            return taken.as_json() | {"limits": limits}

        def confirm(time_unix_ms: int) -> dict[str, Any]:
            limits = feed.current()
            record = confirm_clock(
                journal,
                time_unix_ms=time_unix_ms,
                now_unix_ms=now_unix_ms(),
                enrolled_unix_s=enrolment.enrolled_unix_s,
                limits=limits.newest if limits else None,
                tolerance_s=settings.clock.tolerance_s,
                ledger_unix_ms=synchroniser.ledger_time_unix_ms(),
            )
            return {"record": str(record.id), **record.facts()}

        door = _door(home, settings)
        history = History(home.journal)
        app = build_app(
            Parts(
                payments=payments,
                hub=hub,
                door=door,
                deeds=Deeds(journal, now_unix_ms),
                shifts=await asyncio.to_thread(Shifts, journal, history, now_unix_ms),
                history=history,
                desk=make_desk(enrolment, settings, till, journal, feed, proofs, issued, key),
                status=tell_status,
                synchronise=synchroniser.synchronise_now,
                fetch_limits=fetch_limits,
                confirm_clock=confirm,
                carry_out=carry_out,
                carry_in=carry_in,
                metrics=metrics.expose,
                line_is_down=lambda: synchroniser.state.line is Line.DOWN,
            )
        )
        address = await _listen(
            stack, app, settings.http.host, settings.http.port, "http", _page_context(home, settings)
        )
        if pos is not None:
            at = settings.nexo
            pos.files.address.write_text(
                await _listen(stack, pos.app, at.host, at.port, "nexo", pos.tls) + "\n"
            )
            stack.callback(pos.files.address.unlink, missing_ok=True)
            stack.push_async_callback(pos.desk.close)
        stack.callback(hub.close)
        home.address.write_text(address + "\n")
        stack.callback(home.address.unlink, missing_ok=True)

        telling = asyncio.create_task(_tell(news, hub, tell_status), name="status")
        stack.push_async_callback(_cancel, telling)
        keeping = asyncio.create_task(certificates.run(), name="certificate")
        stack.push_async_callback(_cancel, keeping)
        synchronising = asyncio.create_task(synchroniser.run(), name="synchroniser")
        stack.push_async_callback(_cancel, synchronising)
        pruner = Pruner(
            journal,
            feed,
            keep_days=settings.journal.keep_days,
            clock=now_unix_ms,
            ledger_time_unix_ms=synchroniser.ledger_time_unix_ms,
        )
        pruning = asyncio.create_task(pruner.run(), name="pruner")
        stack.push_async_callback(_cancel, pruning)
        on_ready(address)
        stopping = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait({synchronising, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if synchronising in done:
            stopping.cancel()
            synchronising.result()


def make_desk(
    enrolment: Enrolment,
    settings: Settings,
    till: Till,
    journal: Journal,
    feed: SnapshotFeed,
    proofs: LimitProofs,
    issued: Issued,
    key: Ed25519PrivateKey,
) -> Desk:
    """Where this gateway's receipts come from."""

    def deadline_s() -> int | None:
        limits = feed.current()
        return limits.newest.policy.presentment_deadline_s if limits else None

    return Desk(
        Shop(
            merchant_name=enrolment.merchant.name,
            merchant_id=enrolment.merchant.id,
            terminal_id=enrolment.terminal_id,
            issuer=enrolment.issuer,
            unit=currency(enrolment.currency),
        ),
        journal,
        proofs,
        issued,
        gateway_key=key.public_key().public_bytes_raw(),
        sign=key.sign,
        standing=till.corrections.standing,
        deadline_s=deadline_s,
        printer=settings.printer.address,
        columns=settings.printer.columns,
    )


def _door(home: Home, settings: Settings) -> Door:
    staff, http = Staff(home.staff, home.setup_code, now_unix_ms), settings.http
    staff.setup_code()  # so that there is one to be read
    return Door(
        staff=staff,
        sessions=Sessions(idle_s=settings.staff.idle_lock_s, longest_s=settings.staff.session_s),
        token=machine_token(home.api_token),
        host_names=tuple(name.lower() for name in (*LOOPBACK_NAMES, http.host, *http.names)),
        secure=_needs_tls(settings),
    )


def _needs_tls(settings: Settings) -> bool:
    return not is_loopback(settings.http.host) or bool(settings.http.certificate)


def page_certificate(home: Home, settings: Settings) -> Path | None:
    """Which certificate the page shows; None without TLS."""
    if not _needs_tls(settings):
        return None
    return Path(settings.http.certificate) if settings.http.certificate else home.http_certificate


def _page_context(home: Home, settings: Settings) -> ssl.SSLContext | None:
    certificate = page_certificate(home, settings)
    if certificate is None:
        return None
    if not settings.http.certificate:
        fingerprint = self_signed(
            certificate, ("127.0.0.1", "localhost", settings.http.host, *settings.http.names)
        )
        _log.info("the page's own certificate", sha256=fingerprint)
    return server_context(certificate)


async def _open_pos(
    stack: contextlib.AsyncExitStack,
    home: Home,
    settings: Settings,
    enrolment: Enrolment,
    payments: Payments,
    journal: Journal,
    synchroniser: Synchroniser,
) -> PosInterface | None:
    """The interface for POS software, with all that an earlier run left open settled; None if it is off."""
    if not settings.nexo.enabled:
        return None

    def line_up() -> bool | None:
        return {Line.UP: True, Line.DOWN: False}.get(synchroniser.state.line)

    pos = await asyncio.to_thread(
        open_pos_interface,
        home.nexo,
        settings.nexo,
        enrolment,
        payments,
        journal,
        line_up=line_up,
        now_unix_ms=now_unix_ms,
    )
    stack.callback(pos.store.close)
    return pos


async def _listen(
    stack: contextlib.AsyncExitStack,
    app: web.Application,
    host: str,
    port: int,
    section: str,
    tls: ssl.SSLContext | None = None,
) -> str:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, host, port, ssl_context=tls)
    try:
        await site.start()
    except OSError as error:
        raise Unavailable(
            f"cannot listen on {host} port {port}: {error.strerror}",
            advice=f"choose another [{section}] port in gateway.toml",
        ) from None
    reached = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not bound
    return f"{'https' if tls else 'http'}://{reached}:{runner.addresses[0][1]}"


async def _tell(news: asyncio.Event, hub: Hub, tell_status: Callable[[], dict[str, Any]]) -> None:
    """Publish the status after each change; changes that come together are told once."""
    while True:
        await news.wait()
        news.clear()
        hub.publish(Event("status", await asyncio.to_thread(tell_status)))


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


class _LaneKeeper:
    """Gives every reader that matches the settings a lane, also those plugged in later."""

    def __init__(
        self,
        payments: Payments,
        till: Till,
        settings: Settings,
        readers: ReaderSource,
        changed: Callable[[], None],
        observe: Callable[[Outcome, float], None],
    ) -> None:
        self._readers = readers
        self._payments = payments
        self._till = till
        self._settings = settings
        self._changed = changed
        self._observe = observe
        self._pattern = re.compile(settings.reader.name_pattern)
        self._stop = threading.Event()
        self._known: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="readers", daemon=True)

    def start(self) -> None:
        self._look()
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for lane in self._payments.lanes:
            lane.close()

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_FOR_READERS_S):
            self._look()

    def _look(self) -> None:
        names: Sequence[str] = ()
        # Nobody can say: `doctor` and the page say so; a payment that needs a reader does too.
        with contextlib.suppress(ReaderUnavailable):
            names = self._readers.names()
        for lane in self._payments.lanes:
            if lane.reader_present is not (lane.reader_name in names):
                lane.reader_present = lane.reader_name in names
                _log.info("reader came" if lane.reader_present else "reader left", reader=lane.reader_name)
                self._changed()
        for name in names:
            if name in self._known or not self._pattern.search(name):
                continue
            self._known.add(name)
            lane = Lane(
                f"lane-{len(self._known)}",
                self._readers.open(name, self._settings.card.exchange_timeout_s),
                self._till,
                card_timeout_s=self._settings.card.present_timeout_s,
                show=self._payments.changed,
                observe=self._observe,
            )
            self._payments.add_lane(lane)
            lane.start()
            _log.info("reader found", reader=name, lane=lane.name)
            self._changed()
