"""`bench pos`: what the POS interface adds to a tap, measured in the same run.

Every round takes the same payment three times with the same card at the same reader, over the real PC/SC
stack: begun in the process itself, from the order to the moment its approval is shown; by a POS over
HTTPS, plain, from its first byte out to its answer's last byte in; and encrypted. The gateway's own share
is that time less the time in card and reader. The POS is a process of its own.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from aiohttp import web

from pos_gateway.errors import PosGatewayError
from pos_gateway.gateway.config import Nexo
from pos_gateway.gateway.lane import Lane, PaymentView, State
from pos_gateway.gateway.nexo import wire
from pos_gateway.gateway.nexo.crypto import NexoKey
from pos_gateway.gateway.nexo.interface import PosInterface, open_pos_interface
from pos_gateway.gateway.nexo.setup import NexoFiles
from pos_gateway.gateway.payments import Payments
from pos_gateway.gateway.program import now_unix_ms
from pos_gateway.gateway.readers.pcsc import PcscReader
from pos_gateway.gateway.readers.port import CardChannel, Indication
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.virtual_reader import VirtualReader
from pos_gateway.ledger.config import Policy
from pos_gateway.records import uuid7

_AMOUNT_MINOR: Final = 100
_WARM_UP: Final = 20
_TAP_TIMEOUT_S: Final = 30.0
_POI: Final = "V400m-123456789"
_PASSPHRASE: Final = "a passphrase for measuring only"  # noqa: S105 - it protects nothing
_SETTINGS: Final = Nexo(
    enabled=True,
    host="127.0.0.1",
    port=0,
    plain=True,
    key_identifier="bench",
    key_version=1,
    pois={_POI: "lane-1"},
)


class StayingCard:
    """A reader in whose field the same card is taken away and held in again at once; it counts the time that
    card and reader take."""

    def __init__(self, reader: PcscReader) -> None:
        self._reader = reader
        self._channel: CardChannel | None = None
        self.elapsed_ns = 0

    @property
    def name(self) -> str:
        return self._reader.name

    def wait_for_card(self, timeout_s: float) -> CardChannel | None:
        begun = time.perf_counter_ns()
        try:
            self._channel = self._reader.wait_for_card(timeout_s)
        finally:
            self.elapsed_ns += time.perf_counter_ns() - begun
        return None if self._channel is None else self

    def transceive(self, command: bytes) -> bytes:
        if self._channel is None:
            raise PosGatewayError("no card")
        begun = time.perf_counter_ns()
        try:
            return self._channel.transceive(command)
        finally:
            self.elapsed_ns += time.perf_counter_ns() - begun

    def wait_for_removal(self, timeout_s: float) -> bool:
        return True

    def interrupt(self) -> None:
        self._reader.interrupt()

    def indicate(self, indication: Indication) -> None:
        """Nobody looks."""

    def close(self) -> None:
        """Of the card: let go of it."""
        begun = time.perf_counter_ns()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self.elapsed_ns += time.perf_counter_ns() - begun


def bench_pos(taps: int, folder: Path | None = None) -> dict[str, Any]:
    """Measure so many taps of each kind; times in µs.

    `folder`: on which disk the journal lies; the system's temporary folder if not said.

    Raises:
        ReaderUnavailable: pcscd or vpcd is not installed.
        PosGatewayError: a tap was not approved.
    """
    policy = Policy(card_tc_rate_limit=1_000_000, card_cumulative_cap_minor=10**12)
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix="pos-gateway-bench-") as scratch,
        Shop(Path(scratch), policy=policy) as shop,
        VirtualReader(slots=1) as virtual,
    ):
        os.environ.update(virtual.environment)
        _, personalisation = shop.issue(limit_minor=10 * _AMOUNT_MINOR * (taps + _WARM_UP))
        shop.publish()
        card_file = Path(scratch) / "card.json"
        card_file.write_text(personalisation.to_json())
        virtual.insert(card_file)
        reader = PcscReader(virtual.names[0])
        files = NexoFiles(Path(scratch) / "nexo")
        files.folder.mkdir()
        files.passphrase.write_text(_PASSPHRASE)
        files.passphrase.chmod(0o600)
        try:
            return asyncio.run(_run(shop, StayingCard(reader), files.folder, taps))
        finally:
            reader.close()


async def _run(shop: Shop, reader: StayingCard, folder: Path, taps: int) -> dict[str, Any]:
    shown: dict[UUID, threading.Event] = {}
    pos: PosInterface | None = None

    def changed(view: PaymentView) -> None:
        if pos is not None:
            pos.desk.payment_changed(view)
        if view.state.final and (waiting := shown.get(view.id)) is not None:
            waiting.set()

    payments = Payments(shop.till, shop.journal, changed)
    lane = Lane("lane-1", reader, shop.till, card_timeout_s=_TAP_TIMEOUT_S, show=payments.changed)
    payments.add_lane(lane)
    lane.start()
    pos = open_pos_interface(
        folder,
        _SETTINGS,
        shop.enrolment,
        payments,
        shop.journal,
        line_up=lambda: False,
        now_unix_ms=now_unix_ms,
    )
    runner = web.AppRunner(pos.app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, _SETTINGS.host, 0, ssl_context=pos.tls).start()
    try:
        port = runner.addresses[0][1]
        return await asyncio.to_thread(_measure, reader, payments, lane, shown, port, taps)
    finally:
        await runner.cleanup()
        await pos.desk.close()
        pos.store.close()
        await asyncio.to_thread(lane.close)


def _measure(
    reader: StayingCard,
    payments: Payments,
    lane: Lane,
    shown: dict[UUID, threading.Event],
    port: int,
    taps: int,
) -> dict[str, Any]:
    key = NexoKey.derive(_PASSPHRASE, _SETTINGS.key_identifier, _SETTINGS.key_version)
    own: dict[str, list[float]] = {"without": [], "plain": [], "encrypted": []}
    card_and_reader: list[float] = []
    with subprocess.Popen(
        [sys.executable, "-m", "pos_gateway.lab.pos_client", _SETTINGS.host, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as client:

        def without(number: int) -> int:
            payment_id = uuid7(time.time_ns() // 1_000_000, os.urandom(10))
            ended = shown[payment_id] = threading.Event()
            begun = time.perf_counter_ns()
            payments.start(payment_id, _AMOUNT_MINOR, "CNY", "lane-1")
            if not ended.wait(_TAP_TIMEOUT_S):
                raise PosGatewayError("a tap of the benchmark did not end")
            elapsed_ns = time.perf_counter_ns() - begun
            if payments.show(payment_id).state is not State.APPROVED:
                raise PosGatewayError(f"a tap of the benchmark was not approved: {payments.show(payment_id)}")
            del shown[payment_id]
            return elapsed_ns

        def plain(number: int) -> int:
            message = _payment(f"P{number}")
            elapsed_ns, answer = _ask(client, wire.dumps({"SaleToPOIRequest": message}))
            if b'"Result":"Success"' not in answer:
                raise PosGatewayError(f"a tap of the benchmark was not approved: {answer[:500]!r}")
            return elapsed_ns

        def encrypted(number: int) -> int:
            message = _payment(f"E{number}")
            body = key.seal("SaleToPOIRequest", message["MessageHeader"], wire.dumps(message))
            elapsed_ns, answer = _ask(client, wire.dumps(body))
            if not answer.startswith(b"HTTP/1.1 200") or b"NexoBlob" not in answer:
                raise PosGatewayError(f"a message of the benchmark was not taken: {answer[:500]!r}")
            return elapsed_ns

        ways: dict[str, Callable[[int], int]] = {"without": without, "plain": plain, "encrypted": encrypted}
        for number in range(_WARM_UP + taps):
            for name, way in ways.items():
                while lane.busy:
                    time.sleep(0.0005)
                reader.elapsed_ns = 0
                elapsed_ns = way(number)
                if number >= _WARM_UP:
                    own[name].append((elapsed_ns - reader.elapsed_ns) / 1000)
                    card_and_reader.append(reader.elapsed_ns / 1000)
        if client.stdin is not None:
            client.stdin.close()
    base = statistics.median(own["without"])
    return {
        "protocol": "nexo",
        "taps": taps,
        "card_and_reader_us": _percentiles(card_and_reader),
        "own_share_without_us": _percentiles(own["without"]),
        "own_share_us": _percentiles(own["plain"]),
        "own_share_encrypted_us": _percentiles(own["encrypted"]),
        "own_share_ratio": round(statistics.median(own["plain"]) / base, 2),
        "own_share_ratio_encrypted": round(statistics.median(own["encrypted"]) / base, 2),
        "target_ratio": 1.5,
    }


def _payment(service_id: str) -> dict[str, Any]:
    return {
        "MessageHeader": {
            "ProtocolVersion": "3.0",
            "MessageClass": "Service",
            "MessageCategory": "Payment",
            "MessageType": "Request",
            "SaleID": "Till 1",
            "ServiceID": service_id,
            "POIID": _POI,
        },
        "PaymentRequest": {
            "SaleData": {
                "SaleTransactionID": {"TransactionID": service_id, "TimeStamp": "2026-11-24T10:00:00+00:00"}
            },
            "PaymentTransaction": {"AmountsReq": {"Currency": "CNY", "RequestedAmount": 1}},
        },
    }


def _ask(client: subprocess.Popen[bytes], body: bytes) -> tuple[int, bytes]:
    if client.stdin is None or client.stdout is None:
        raise PosGatewayError("the POS has ended")
    head = f"POST /nexo HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    request = head + body
    client.stdin.write(len(request).to_bytes(4, "big") + request)
    client.stdin.flush()
    told = client.stdout.read(12)
    answer = client.stdout.read(int.from_bytes(told[8:], "big"))
    return int.from_bytes(told[:8], "big"), answer


def _percentiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        "p50": round(statistics.median(ordered), 1),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 1),
    }
