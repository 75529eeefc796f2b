"""`bench tap`: where a tap's time goes, beside what it could not do without, measured in the same run.

Every round does, one after the other: a whole tap with a virtual card, over the real PC/SC stack or over
nfcpy's udp driver; the same APDUs back to back; the tap's three RSA operations alone; one raw append with
`fdatasync` of as many bytes as a journal record has. The gateway's own share is the tap's time less the time
in card and reader. The journal holds some records already, as a shop's does: its write-ahead log is then
written in place rather than growing.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from pos_gateway.emv.apdu import (
    INS_GENERATE_AC,
    INS_GET_PROCESSING_OPTIONS,
    INS_READ_RECORD,
    INS_SELECT,
)
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.errors import PosGatewayError
from pos_gateway.gateway.readers.frontend import FrontendReader
from pos_gateway.gateway.readers.pcsc import PcscReader
from pos_gateway.gateway.readers.port import CardChannel, Reader
from pos_gateway.gateway.till import Approved
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.udp_card import UdpField
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.lab.virtual_reader import VirtualReader
from pos_gateway.ledger.config import Policy
from pos_gateway.records import Kind, uuid7

_AMOUNT_MINOR: Final = 100
_WARM_UP: Final = 20
_CARD_WAIT_S: Final = 10.0
_RECORDS_BEFORE: Final = 1200

DRIVERS: Final = ("virtual", "udp")
"""`virtual`: PC/SC through a real pcscd and vpcd; `udp`: nfcpy's udp driver, the card in this process."""

_WHY: Final = {
    INS_SELECT: "our application by its AID, before any directory; brings the PDOL",
    INS_GET_PROCESSING_OPTIONS: "starts the session; brings AIP, AFL and the note",
    INS_GENERATE_AC: "the card compares with the ceiling, moves its counter and signs",
}
_WHY_RECORDS: Final = (
    "issuer certificate: as long as the CA key, it fills one answer alone",
    "ICC certificate, its remainder, CA key index, exponents: they cannot stand in what they sign",
    "PAN, dates, CDOL1 and CDOL2: the signed record; all three do not fit into two answers",
)


class TimedChannel:
    """Passes APDUs on, adds up the time they take, and remembers them."""

    def __init__(self, channel: CardChannel) -> None:
        self._channel = channel
        self.elapsed_ns = 0
        self.cpu_ns = 0
        self.commands: list[bytes] = []

    def transceive(self, command: bytes) -> bytes:
        self.commands.append(command)
        begun, cpu_begun = time.perf_counter_ns(), time.thread_time_ns()
        try:
            return self._channel.transceive(command)
        finally:
            self.elapsed_ns += time.perf_counter_ns() - begun
            self.cpu_ns += time.thread_time_ns() - cpu_begun

    def close(self) -> None:
        self._channel.close()


def bench_tap(
    taps: int,
    folder: Path | None = None,
    driver: str = "virtual",
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Measure so many taps; times in µs.

    `driver`: one of `DRIVERS`. `folder`: on which disk the journal lies; the system's temporary folder if
    not said.

    Raises:
        ReaderUnavailable: pcscd or vpcd is not installed.
        PosGatewayError: a tap was not approved.
    """
    policy = Policy(card_tc_rate_limit=1_000_000, card_cumulative_cap_minor=10**12)
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix="pos-gateway-bench-") as scratch,
        Shop(Path(scratch), policy=policy) as shop,
    ):
        _, personalisation = shop.issue(limit_minor=10 * _AMOUNT_MINOR * (taps + _WARM_UP))
        shop.publish()
        _fill(shop)
        with _present_card(driver, personalisation, Path(scratch)) as reader:
            measured = _measure(shop, reader, personalisation, taps, Path(scratch), progress)
    return {"driver": driver, **measured}


@contextlib.contextmanager
def _present_card(driver: str, personalisation: Personalisation, folder: Path) -> Iterator[Reader]:
    """A reader with the card in its field."""
    reader: Reader
    if driver == "udp":
        field = UdpField()
        field.insert(VirtualCard(personalisation))
        reader = FrontendReader("udp", lambda: field.path)
        try:
            yield reader
        finally:
            reader.close()
            field.close()
        return
    with VirtualReader(slots=1) as virtual:
        os.environ.update(virtual.environment)
        card_file = folder / "card.json"
        card_file.write_text(personalisation.to_json())
        virtual.insert(card_file)
        reader = PcscReader(virtual.names[0])
        try:
            yield reader
        finally:
            reader.close()


def _measure(
    shop: Shop,
    reader: Reader,
    personalisation: Personalisation,
    taps: int,
    folder: Path,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    whole: list[float] = []
    card_and_reader: list[float] = []
    own: list[float] = []
    bare_apdus: list[float] = []
    rsa: list[float] = []
    append: list[float] = []
    own_cpu: list[float] = []
    commands: list[bytes] = []
    operations = _rsa_operations(shop, personalisation)
    descriptor = os.open(folder / "raw", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        for number in range(_WARM_UP + taps):
            channel = _present(reader)
            timed = TimedChannel(channel)
            payment = shop.till.new_payment(
                uuid7(time.time_ns() // 1_000_000, os.urandom(10)), _AMOUNT_MINOR, number
            )
            begun, cpu_begun = time.perf_counter_ns(), time.thread_time_ns()
            outcome = shop.till.tap(payment, timed)
            tap_ns, cpu_ns = time.perf_counter_ns() - begun, time.thread_time_ns() - cpu_begun
            channel.close()
            if not isinstance(outcome, Approved):
                raise PosGatewayError(f"a tap of the benchmark was not approved: {outcome}")

            record = outcome.record
            size = len(record.body) + len(record.proof) + 200
            commands = timed.commands
            channel = _present(reader)
            bare_ns = _replay(channel, timed.commands)
            channel.close()
            rsa_ns = _time(operations)
            append_ns = _time(lambda size=size: _append(descriptor, size))  # type: ignore[misc]
            if number < _WARM_UP:
                continue
            whole.append(tap_ns / 1000)
            card_and_reader.append(timed.elapsed_ns / 1000)
            own.append((tap_ns - timed.elapsed_ns) / 1000)
            own_cpu.append((cpu_ns - timed.cpu_ns) / 1000)
            bare_apdus.append(bare_ns / 1000)
            rsa.append(rsa_ns / 1000)
            append.append(append_ns / 1000)
            progress(number - _WARM_UP + 1)
    finally:
        os.close(descriptor)
    floor = statistics.median(rsa) + statistics.median(append)
    return {
        "taps": taps,
        "apdus_per_tap": len(commands),
        "apdus": _explained(commands),
        "tap_us": _percentiles(whole),
        "card_and_reader_us": _percentiles(card_and_reader),
        "own_share_us": _percentiles(own),
        "own_cpu_us": _percentiles(own_cpu),
        "bare_apdus_us": _percentiles(bare_apdus),
        "rsa_checks_us": _percentiles(rsa),
        "append_fdatasync_us": _percentiles(append),
        "own_share_ratio": round(statistics.median(own) / floor, 2),
        "target_ratio": 2.5,
    }


def _explained(commands: Sequence[bytes]) -> list[dict[str, str]]:
    """Each command of an approved tap, and why it is needed."""
    records = iter(_WHY_RECORDS)
    return [
        {
            "command": command[:4].hex(" ").upper(),
            "why": next(records, "a further record") if command[1] == INS_READ_RECORD else _WHY[command[1]],
        }
        for command in commands
    ]


def _fill(shop: Shop) -> None:
    for _ in range(_RECORDS_BEFORE):
        at_unix_ms = time.time_ns() // 1_000_000
        record_id = uuid7(at_unix_ms, os.urandom(10))
        facts = {"at_unix_ms": at_unix_ms, "sale_id": str(record_id), "detail": "x" * 500}
        shop.journal.append(Kind.DECLINE, record_id, facts, bytes(1400))


def _present(reader: Reader) -> CardChannel:
    channel = reader.wait_for_card(_CARD_WAIT_S)
    if channel is None:
        raise PosGatewayError("the virtual card was not seen")
    return channel


def _replay(channel: CardChannel, commands: list[bytes]) -> int:
    """The same APDUs without anything between them; only the unpredictable number differs, so that the
    card makes a new cryptogram rather than giving the last one again."""
    un = os.urandom(4)
    fresh = [_with_unpredictable_number(command, un) for command in commands]
    begun = time.perf_counter_ns()
    for command in fresh:
        channel.transceive(command)
    return time.perf_counter_ns() - begun


_CDOL1_UN_AT: Final = 5 + 6 + 6 + 2 + 2 + 3 + 3 + 1
"""Where 9F37 stands in a GENERATE AC command with our CDOL1."""


def _with_unpredictable_number(command: bytes, un: bytes) -> bytes:
    if command[1] != INS_GENERATE_AC:
        return command
    return command[:_CDOL1_UN_AT] + un + command[_CDOL1_UN_AT + 4 :]


def _rsa_operations(shop: Shop, card: Personalisation) -> Callable[[], None]:
    """The public-key operations of one tap and nothing else: two certificates and the SDAD."""
    ca_key, issuer_key, icc_modulus = (
        shop.ledger.ca_keys[0],
        shop.ledger.keys.issuer,
        card.icc_prime_p * card.icc_prime_q,
    )
    issuer_certificate = int.from_bytes(card.issuer_certificate, "big")
    icc_certificate = int.from_bytes(card.icc_certificate, "big")
    signature = icc_modulus - 2  # any number below the modulus costs the same

    def run() -> None:
        pow(issuer_certificate, ca_key.exponent, ca_key.modulus)
        pow(icc_certificate, issuer_key.exponent, issuer_key.modulus)
        pow(signature, card.icc_exponent, icc_modulus)

    return run


def _append(descriptor: int, size: int) -> None:
    os.write(descriptor, bytes(size))
    os.fdatasync(descriptor)


def _time(work: Callable[[], None]) -> int:
    begun = time.perf_counter_ns()
    work()
    return time.perf_counter_ns() - begun


def _percentiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        "p50": round(statistics.median(ordered), 1),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 1),
    }
