"""`bench sync --with-taps`: what a tap costs while a long backlog goes to the ledger.

The ledger's program has one core to itself, the gateway's the other; the card is in the gateway's process,
and whoever pays sits on the ledger's core. The same gateway takes payments first with the line down and
then, as soon as the line is up, until the backlog has gone. A tap's own share is the time from the card's
coming to the light that says "approved", less the time the card took for its answers.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.errors import PosGatewayError
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.program import serve as serve_gateway
from pos_gateway.gateway.readers.port import CardChannel, Indication
from pos_gateway.gateway.readers.source import ReaderSource
from pos_gateway.lab.backlog import AMOUNT_MINOR
from pos_gateway.lab.faults.servers import CardInField, Server, begin
from pos_gateway.lab.faults.site import asked
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.sync_bench import prepare, reach_ledger_at, serving
from pos_gateway.lab.tap_bench import TimedChannel
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.records import uuid7

_TARGET_RATIO: Final = 1.5
_WARM_UP: Final = 30
_TAPS_BEFORE: Final = 300
_POLL_S: Final = 0.004
_SETTINGS: Final = """
[http]
port = 0
[synchroniser]
interval_s = 1
[caps]
per_tap_cap_minor = 500000
unsynchronised_amount_cap_minor = 100000000000
unsynchronised_count_cap = 100000000
unsynchronised_age_cap_s = 604800
"""


def bench_taps_under_sync(
    backlog: int,
    cards: int,
    *,
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Times in µs.

    Raises:
        PosGatewayError: there is only one core, or a payment was not approved.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise PosGatewayError("ledger and gateway need a core each, and there is one")
    with tempfile.TemporaryDirectory(dir=folder, prefix="pos-gateway-bench-") as scratch:
        place, home = Path(scratch), Home(Path(scratch) / "gateway")
        prepare(place, None, backlog, cards, progress)
        home.overrides.write_text(_SETTINGS)
        port = _free_port()
        reach_ledger_at(home, f"https://127.0.0.1:{port}")
        timings = place / "timings"
        arguments = (str(home.path), str(place / "card.json"), str(timings), str(place / "log"), cores[1])
        os.sched_setaffinity(0, {cores[0]})
        try:
            with Server(_gateway, *arguments) as gateway:
                progress("payments with the line down")
                for _ in range(_WARM_UP + _TAPS_BEFORE):
                    _pay(home)
                before = _timings(timings)[_WARM_UP:]
                progress("payments while the backlog goes")
                with serving(place / "ledger", place / "ledger.log", port=port, core=cores[0]):
                    asked(home, "POST", "/v1/synchronise", {})
                    begun = time.perf_counter()
                    waiting, at = backlog, len(before) + _WARM_UP
                    during_to = at
                    while waiting > backlog // 100:
                        for _ in range(10):
                            _pay(home)
                        waiting = int(asked(home, "GET", "/v1/status")["queue"]["count"])
                        if waiting > backlog // 100:
                            during_to = len(_timings(timings))
                    elapsed_s = time.perf_counter() - begun
                    during = _timings(timings)[at:during_to]
                gateway.stop()
        finally:
            os.sched_setaffinity(0, set(cores))
    return {
        "backlog": backlog,
        "synchronised_per_s": round(backlog / elapsed_s),
        "before": _told(before),
        "during": _told(during),
        "ratio": round(_own_us(during) / _own_us(before), 2),
        "target_ratio": _TARGET_RATIO,
    }


_Timing = tuple[float, float]
"""A whole tap and the card's part in it, µs."""


def _told(taps: list[_Timing]) -> dict[str, Any]:
    own = [whole - card for whole, card in taps]
    return {
        "taps": len(taps),
        "own_share_us": {"p50": _percentile(own, 0.5), "p99": _percentile(own, 0.99)},
        "tap_us": {
            "p50": _percentile([whole for whole, _ in taps], 0.5),
            "p99": _percentile([whole for whole, _ in taps], 0.99),
        },
    }


def _own_us(taps: list[_Timing]) -> float:
    return statistics.median(whole - card for whole, card in taps)


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))], 1)


def _timings(path: Path) -> list[_Timing]:
    rows = (line.split() for line in path.read_text().splitlines())
    return [(float(whole), float(card)) for whole, card in rows]


def _pay(home: Home) -> None:
    payment_id = str(uuid7(time.time_ns() // 1_000_000, os.urandom(10)))
    order = {"id": payment_id, "amount_minor": AMOUNT_MINOR, "currency": "CNY"}
    view = asked(home, "POST", "/v1/payments", order)
    while not view.get("final"):
        if "error" in view:
            raise PosGatewayError(f"a payment of the benchmark was refused: {view['error']['reason']}")
        time.sleep(_POLL_S)
        view = asked(home, "GET", f"/v1/payments/{payment_id}")
    if view["state"] != "approved":
        raise PosGatewayError(f"a payment of the benchmark was not approved: {view}")


class _TimedReader(CardInField):
    """Writes down how long each tap took, once it is over."""

    def __init__(self, name: str, card: VirtualCard, timings: Path) -> None:
        super().__init__(name, card)
        self._card_in_field = card
        self._timings = timings.open("a")
        self._channel: TimedChannel | None = None
        self._begun_ns = 0

    def wait_for_card(self, timeout_s: float) -> CardChannel | None:
        self._channel = TimedChannel(DirectChannel(self._card_in_field))
        self._begun_ns = time.perf_counter_ns()
        return self._channel

    def indicate(self, indication: Indication) -> None:
        if indication is not Indication.APPROVED or self._channel is None:
            return
        whole_ns = time.perf_counter_ns() - self._begun_ns
        self._timings.write(f"{whole_ns / 1000} {self._channel.elapsed_ns / 1000}\n")
        self._timings.flush()


def _gateway(ready: Connection, home: str, card: str, timings: str, log: str, core: int) -> None:
    begin(log)
    os.sched_setaffinity(0, {core})
    virtual = VirtualCard(Personalisation.from_json(Path(card).read_text()))
    readers = ReaderSource(
        lambda: ["field"], lambda name, timeout_s: _TimedReader(name, virtual, Path(timings))
    )
    asyncio.run(serve_gateway(Home(Path(home)), on_ready=ready.send, readers=readers))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
