"""`bench pos --protocol rest`: what the REST interface adds to a tap, measured in the same run.

Every round takes the same payment twice with the same card, which lies in the field already: begun in the
process itself, from the order to the moment its approval is told; and by a POS over HTTPS, from its first
byte out to its answer's last byte in. The gateway's own share is that time less the time in the card. The
POS is a process of its own, with one connection that stays.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

from pos_gateway.errors import PosGatewayError
from pos_gateway.gateway.page_tls import client_context, self_signed, server_context
from pos_gateway.gateway.program import now_unix_ms
from pos_gateway.lab.counter import TOKEN, Counter, open_counter
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger.config import Policy
from pos_gateway.records import uuid7

_AMOUNT_MINOR: Final = 100
_WARM_UP: Final = 20
_TIMEOUT_S: Final = 30.0
_TARGET_RATIO: Final = 1.5


class TimedCard:
    """A virtual card that adds up how long it takes for its answers."""

    def __init__(self, card: VirtualCard) -> None:
        self._card = card
        self.elapsed_ns = 0

    def power_up(self) -> None:
        self._card.power_up()

    def process(self, command: bytes) -> bytes:
        begun = time.perf_counter_ns()
        try:
            return self._card.process(command)
        finally:
            self.elapsed_ns += time.perf_counter_ns() - begun


def bench_rest(taps: int, folder: Path | None = None) -> dict[str, Any]:
    """Measure so many taps of each kind; times in µs.

    `folder`: on which disk the journal lies; the system's temporary folder if not said.

    Raises:
        PosGatewayError: a tap was not approved.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="pos-gateway-bench-") as scratch:
        return asyncio.run(_run(Path(scratch), taps))


async def _run(scratch: Path, taps: int) -> dict[str, Any]:
    certificate = scratch / "tls.pem"
    self_signed(certificate, ("127.0.0.1",))
    policy = Policy(card_tc_rate_limit=1_000_000, card_cumulative_cap_minor=10**12)
    tls = server_context(certificate)
    async with open_counter(scratch, tls=tls, card_timeout_s=_TIMEOUT_S, policy=policy) as counter:
        _, personalisation = counter.shop.issue(limit_minor=10 * _AMOUNT_MINOR * (taps + _WARM_UP))
        counter.shop.publish()
        card = TimedCard(VirtualCard(personalisation))
        pos = await asyncio.to_thread(_start_pos, counter.address, certificate)
        try:
            return await asyncio.to_thread(_rounds, counter, card, pos, taps)
        finally:
            pos.terminate()
            await asyncio.to_thread(pos.wait)


def _rounds(counter: Counter, card: TimedCard, pos: subprocess.Popen[str], taps: int) -> dict[str, Any]:
    bare: list[float] = []
    rest: list[float] = []
    cards: list[float] = []
    for number in range(_WARM_UP + taps):
        for kind, times in (("bare", bare), ("rest", rest)):
            card.elapsed_ns = 0
            counter.reader.present(card)
            total_ns = _bare(counter) if kind == "bare" else _asked_for(pos)
            if number >= _WARM_UP:
                times.append((total_ns - card.elapsed_ns) / 1000)
                cards.append(card.elapsed_ns / 1000)
    ratio = statistics.median(rest) / statistics.median(bare)
    return {
        "protocol": "rest",
        "taps": taps,
        "card_and_reader_us": _told(cards),
        "own_share_without_us": _told(bare),
        "own_share_us": _told(rest),
        "own_share_ratio": round(ratio, 2),
        "target_ratio": _TARGET_RATIO,
    }


def _bare(counter: Counter) -> int:
    """The same tap without HTTP: until whoever watches is told."""
    payment_id = uuid7(now_unix_ms(), os.urandom(10))
    told = threading.Event()
    begun = time.perf_counter_ns()
    with counter.when_final(payment_id, told.set):
        counter.parts.payments.start(payment_id, _AMOUNT_MINOR, "CNY", None)
        if not told.wait(_TIMEOUT_S):
            raise PosGatewayError("a tap did not end")
    elapsed = time.perf_counter_ns() - begun
    if counter.parts.payments.show(payment_id).state.value != "approved":
        raise PosGatewayError("a tap was not approved")
    return elapsed


def _asked_for(pos: subprocess.Popen[str]) -> int:
    if pos.stdin is None or pos.stdout is None:
        raise PosGatewayError("the POS has no pipes")
    pos.stdin.write("pay\n")
    pos.stdin.flush()
    answer = pos.stdout.readline()
    if not answer.strip().isdigit():
        raise PosGatewayError(f"the POS was answered: {answer.strip()[:200]}")
    return int(answer)


def _start_pos(address: str, certificate: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pos_gateway.lab.rest_bench", address, str(certificate)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _told(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        "p50": round(statistics.median(ordered), 1),
        "p99": round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], 1),
    }


def _pos(address: str, certificate: Path) -> None:
    """The POS: one payment for each line on stdin; says how many ns it took."""
    host = address.partition("://")[2]
    connection = http.client.HTTPSConnection(host, context=client_context(certificate), timeout=_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    for _ in sys.stdin:
        payment_id = str(uuid7(now_unix_ms(), os.urandom(10)))
        order = {"id": payment_id, "amount_minor": _AMOUNT_MINOR, "currency": "CNY", "wait_s": _TIMEOUT_S}
        body = json.dumps(order)
        begun = time.perf_counter_ns()
        connection.request("POST", "/v1/payments", body, headers)
        answer = connection.getresponse().read()
        elapsed = time.perf_counter_ns() - begun
        state = json.loads(answer).get("state")
        print(elapsed if state == "approved" else answer.decode(), flush=True)


if __name__ == "__main__":
    _pos(sys.argv[1], Path(sys.argv[2]))
