"""What the ledger tells a monitoring system, in Prometheus' text format, on a listener of its own.

Labels come from closed sets: routes, verdicts, kinds. No gateway, account, token or card is among them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import sqlalchemy as sa
import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import pos_gateway
from pos_gateway.errors import PosGatewayError
from pos_gateway.ledger import store
from pos_gateway.ledger.ledger import Ledger
from pos_gateway.ledger.settlement import RecordVerdict

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_log = structlog.get_logger(__name__)


class LedgerMetrics:
    """One replica's. All methods may be called from any thread."""

    def __init__(self, ledger: Ledger) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._requests = Histogram(
            "pos_ledger_request_seconds",
            "Requests by route and status; /v1/grants and /v1/notes are the grants' latency.",
            ["route", "status"],
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._verdicts = Counter(
            "pos_ledger_verdicts", "Records judged by this replica.", ["verdict"], registry=self._registry
        )
        self._clones = Counter(
            "pos_ledger_proven_clones", "Clones proven by this replica.", registry=self._registry
        )
        self._registry.register(_Books(ledger))

    def judged(self, verdicts: Sequence[RecordVerdict]) -> None:
        for verdict in verdicts:
            self._verdicts.labels(verdict.verdict.value).inc()
            if verdict.proves_clone:
                self._clones.inc()

    def middleware(self) -> Middleware:
        """Times every request by its route's pattern, never by its path."""

        @web.middleware
        async def timed(request: web.Request, handler: Handler) -> web.StreamResponse:
            began_s, status = time.monotonic(), 500
            try:
                response = await handler(request)
                status = response.status
                return response
            finally:
                resource = request.match_info.route.resource
                route = resource.canonical if resource is not None else "unknown"
                self._requests.labels(route, str(status)).observe(time.monotonic() - began_s)

        return timed

    def expose(self) -> bytes:
        """The text to be scraped. Blocks on the database."""
        return generate_latest(self._registry)


def build_metrics_app(expose: Callable[[], bytes]) -> web.Application:
    """`GET /metrics`, for a listener that only the monitoring system reaches."""

    async def metrics(_request: web.Request) -> web.Response:
        body = await asyncio.to_thread(expose)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics)])
    return app


class _Books(Collector):
    """What the books say; without a database only that it is not to be had."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily(
            "pos_ledger_info", "Which program and currency.", labels=["version", "currency"]
        )
        info.add_metric([pos_gateway.__version__, self._ledger.currency.code], 1)
        yield info
        try:
            found = list(self._books())
        except PosGatewayError as error:
            _log.warning("metrics without books", reason=error.reason)
            found = []
        yield GaugeMetricFamily("pos_ledger_database_up", "Did it answer?", value=1 if found else 0)
        yield from found

    def _books(self) -> Iterator[Metric]:
        now_s = self._ledger.now_unix_ms() / 1000
        snapshots, gateways, alarms = store.snapshots.c, store.gateways.c, store.alarms.c
        with self._ledger.database.read() as connection:
            latest = connection.execute(
                sa.select(snapshots.version, snapshots.valid_from_unix_s, snapshots.valid_until_unix_s)
                .where(snapshots.sha256.is_not(None))
                .order_by(snapshots.version.desc())
                .limit(1)
            ).first()
            pending = connection.scalar(
                sa.select(sa.func.count())
                .select_from(store.snapshots)
                .where(snapshots.sha256.is_(None), snapshots.valid_until_unix_s > int(now_s))
            )
            statuses = connection.execute(
                sa.select(gateways.status, sa.func.count()).group_by(gateways.status)
            ).all()
            raised = connection.execute(sa.select(alarms.kind, sa.func.count()).group_by(alarms.kind)).all()
            epochs = connection.scalar(sa.select(sa.func.count()).select_from(store.epochs))
        if latest is not None:
            yield GaugeMetricFamily(
                "pos_ledger_published_version", "The newest limits.", value=latest.version
            )
            yield GaugeMetricFamily(
                "pos_ledger_published_age_seconds",
                "Since they became valid.",
                value=now_s - latest.valid_from_unix_s,
            )
            yield GaugeMetricFamily(
                "pos_ledger_published_valid_seconds",
                "Until they expire.",
                value=latest.valid_until_unix_s - now_s,
            )
        yield GaugeMetricFamily(
            "pos_ledger_unreleased_publications", "Prepared, and waiting for signatures.", value=pending or 0
        )
        by_status = GaugeMetricFamily("pos_ledger_gateways", "Gateways by status.", labels=["status"])
        for status, count in statuses:
            by_status.add_metric([status], count)
        yield by_status
        by_kind = GaugeMetricFamily("pos_ledger_alarms", "Alarms ever raised, by kind.", labels=["kind"])
        for kind, count in raised:
            by_kind.add_metric([kind], count)
        yield by_kind
        yield GaugeMetricFamily(
            "pos_ledger_epochs", "One more each time it was restored from a backup.", value=epochs or 0
        )
