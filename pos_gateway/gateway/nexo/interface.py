"""The POS interface put together: files, store, desk and server of one gateway."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import structlog
from aiohttp import web

from pos_gateway.enrolment import Enrolment
from pos_gateway.gateway.config import Nexo
from pos_gateway.gateway.journal import Journal
from pos_gateway.gateway.nexo.answers import Place
from pos_gateway.gateway.nexo.desk import Desk
from pos_gateway.gateway.nexo.lanes import PoiNames
from pos_gateway.gateway.nexo.server import NexoServer
from pos_gateway.gateway.nexo.setup import NexoFiles, prepare
from pos_gateway.gateway.nexo.store import Store
from pos_gateway.gateway.payments import Payments
from pos_gateway.money import currency
from pos_gateway.records import uuid7

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PosInterface:
    files: NexoFiles
    store: Store
    desk: Desk
    app: web.Application
    tls: ssl.SSLContext


def open_pos_interface(
    folder: Path,
    settings: Nexo,
    enrolment: Enrolment,
    payments: Payments,
    journal: Journal,
    *,
    line_up: Callable[[], bool | None],
    now_unix_ms: Callable[[], int],
) -> PosInterface:
    """Open it and settle what an earlier run left without an end. Blocks on the disk.

    Raises:
        InvalidConfiguration: see `setup.prepare`.
        Unavailable: its store or the journal cannot be read.
    """
    files = NexoFiles(folder)
    secrets, tls = prepare(files, settings)
    store = Store.open(files.requests)
    try:
        if secrets.key is not None:
            store.forget_nonces_but_of(secrets.key.name)

        def new_id() -> UUID:
            return uuid7(now_unix_ms(), os.urandom(10))

        desk = Desk(
            place=Place(
                merchant_name=enrolment.merchant.name,
                merchant_id=enrolment.merchant.id,
                terminal_id=enrolment.terminal_id,
                issuer=enrolment.issuer,
                unit=currency(enrolment.currency),
            ),
            payments=payments,
            journal=journal,
            store=store,
            names=PoiNames(enrolment.terminal_id, settings.pois),
            line_up=line_up,
            now_unix_ms=now_unix_ms,
            new_id=new_id,
        )
        settled = desk.fates.recover()
    except BaseException:
        store.close()
        raise
    if settled:
        _log.info("requests of an earlier run settled", count=settled)
    server = NexoServer(desk, store, secrets, plain=settings.plain)
    return PosInterface(files, store, desk, server.app(), tls)
