"""Contactless frontends, through nfcpy: readers without a PC/SC driver (RC-S380, SCL3711, PN532), and its
`udp` driver, behind which the laboratory's field stands.

nfcpy is asked for three things: find a card, exchange a frame with it, and what chip it is. The block
protocol above is `readers.isodep`. What of nfcpy is kept at arm's length here, and how:

- it blocks, up to a second for each look at an empty field, and as long as a USB transfer hangs: all its
  calls are made by one thread of the reader's own, and waited for with a bound. What does not come back is
  left behind with its thread, and the device opened anew;
- it raises whatever happens inside it: everything but its own communication errors counts as a reader
  that failed, and is opened anew;
- it writes every frame to its log at DEBUG, card data among them: its loggers are capped here.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import nfc
import nfc.clf

from pos_gateway.errors import CardLeft, CardNotSupported, InvalidCardData, PosGatewayError, ReaderUnavailable
from pos_gateway.gateway.readers.isodep import BlockProtocol, Exchange, activate_a, activate_b
from pos_gateway.gateway.readers.port import CardChannel, Indication

RESPONSE_TIMEOUT_S: Final = 5.0
_OPEN_TIMEOUT_S: Final = 10.0
_SENSE_TIMEOUT_S: Final = 6.0
_SLACK_S: Final = 2.0
_BETWEEN_LOOKS_S: Final = 0.03
_LOOKS_UNTIL_EMPTY: Final = 2
"""A card at the edge of the field, or a phone that answers late, is missed once and there again."""

_ISO_DEP: Final = 0x20  # SAK bit 6 (ISO/IEC 14443-3 §6.5.3.4)
_PLUG_IN: Final = "plug it in; `pos-gateway doctor` shows what stands in its way"

Result = TypeVar("Result")

for _name in ("nfc", "nfc.clf", "nfc.clf.transport"):
    logging.getLogger(_name).setLevel(logging.WARNING)


def open_frontend(path: str) -> Any:
    """nfcpy's device at one of its paths, like `usb:001:004`, `tty:USB0:pn532`, `udp:127.0.0.1:54321`.

    Raises:
        OSError: it cannot be opened.
    """
    frontend = nfc.ContactlessFrontend()
    if not frontend.open(path):
        raise OSError(f"nothing that nfcpy knows at {path}")
    return frontend


class FrontendReader:
    """One contactless frontend. See `readers.port.Reader`.

    `locate` tells nfcpy's path of the device now, None while it is unplugged: USB devices get another
    address whenever they come back. It is opened at the first wait, and again after it failed.
    """

    def __init__(
        self,
        name: str,
        locate: Callable[[], str | None],
        *,
        response_timeout_s: float = RESPONSE_TIMEOUT_S,
        open_device: Callable[[str], Any] = open_frontend,
    ) -> None:
        self._name = name
        self._locate = locate
        self._timeout_s = response_timeout_s
        self._open_device = open_device
        self._device: _Device | None = None
        self._interrupted = threading.Event()
        self._channel: FrontendChannel | None = None

    @property
    def name(self) -> str:
        return self._name

    def wait_for_card(self, timeout_s: float) -> CardChannel | None:
        """See `Reader.wait_for_card`. A card that leaves while it is activated counts as no card. What
        speaks no ISO/IEC 14443-4 comes back as a channel that says so.

        Raises:
            ReaderUnavailable: unplugged, not ours to open, or it failed.
        """
        deadline = time.monotonic() + timeout_s
        while not self._interrupted.is_set():
            target = self._sense()
            if target is not None:
                with contextlib.suppress(CardLeft):
                    return self._activated(target)
            if time.monotonic() >= deadline:
                return None
            self._interrupted.wait(_BETWEEN_LOOKS_S)
        self._interrupted.clear()
        return None

    def wait_for_removal(self, timeout_s: float) -> bool:
        """See `Reader.wait_for_removal`.

        Raises:
            ReaderUnavailable: as `wait_for_card`.
        """
        deadline, empty = time.monotonic() + timeout_s, 0
        while not self._interrupted.is_set():
            empty = 0 if self._sense() is not None else empty + 1
            if empty == _LOOKS_UNTIL_EMPTY:
                return True
            if empty == 0 and time.monotonic() >= deadline:
                return False
            self._interrupted.wait(_BETWEEN_LOOKS_S)
        self._interrupted.clear()
        return False

    def interrupt(self) -> None:
        self._interrupted.set()

    def indicate(self, indication: Indication) -> None:
        """Nothing: nfcpy reaches no light or buzzer of the frontends it drives for us."""

    def chip(self) -> str:
        """The chip and its version, as nfcpy reads them.

        Raises:
            ReaderUnavailable: as `wait_for_card`.
        """
        device = self._opened()
        return self._guarded(lambda: str(device.frontend.device.chipset_name), _SENSE_TIMEOUT_S)

    def close(self) -> None:
        device, self._device = self._device, None
        if device is not None:
            device.close()

    def _sense(self) -> Any:
        """A target in the field now, or None."""
        device = self._opened()
        return self._guarded(device.sense, _SENSE_TIMEOUT_S)

    def _activated(self, target: Any) -> CardChannel:
        device = self._opened()
        sent, received = self._guarded(
            lambda: (int(device.frontend.max_send_data_size), int(device.frontend.max_recv_data_size)),
            _SENSE_TIMEOUT_S,
        )
        if target.brty.endswith("A"):
            sak = target.sel_res[0] if target.sel_res else 0
            dialogue = activate_a(received) if sak & _ISO_DEP else None
        else:
            dialogue = activate_b(bytes(target.sensb_res), received)
        if dialogue is None:
            return _Unfit("it speaks no ISO/IEC 14443-4")
        try:
            ats = self._run(dialogue)
        except InvalidCardData as error:
            return _Unfit(error.reason)
        protocol = BlockProtocol(ats, answer_wait_s=self._timeout_s, most_frame_bytes=min(sent, 256))
        return FrontendChannel(self, protocol)

    def _run(self, dialogue: Exchange[Result]) -> Result:
        """Run one exchange of frames, all in the device's thread.

        Raises:
            CardLeft, InvalidCardData: as the exchange says.
            ReaderUnavailable: the device failed or hangs.
        """
        device = self._opened()
        return self._guarded(lambda: device.run(dialogue), self._timeout_s + _SLACK_S)

    def _guarded(self, work: Callable[[], Result], timeout_s: float) -> Result:
        device = self._opened()
        try:
            return device.call(work, timeout_s)
        except ReaderUnavailable:
            self.close()
            raise

    def _opened(self) -> _Device:
        if self._device is None:
            path = self._locate()
            if path is None:
                raise ReaderUnavailable(f"{self._name} is not plugged in", advice=_PLUG_IN)
            device = _Device(self._name)
            try:
                device.open(lambda: self._open_device(path))
            except ReaderUnavailable:
                device.close()
                raise
            self._device = device
        return self._device


class FrontendChannel:
    """One card on a contactless frontend. See `readers.port.CardChannel`."""

    def __init__(self, reader: FrontendReader, protocol: BlockProtocol) -> None:
        self._reader = reader
        self._device = reader._opened()
        self._protocol: BlockProtocol | None = protocol

    def transceive(self, command: bytes) -> bytes:
        """See `CardChannel.transceive`.

        Raises:
            CardLeft: the card is no longer there, or did not answer in time.
            InvalidCardData: it breaks the block protocol.
            ReaderUnavailable: the reader is gone, failed, or hangs.
        """
        if self._protocol is None or self._reader._device is not self._device:
            raise CardLeft("the card was let go of")
        try:
            return self._reader._run(self._protocol.exchange(command))
        except PosGatewayError:
            self._protocol = None  # what it would say next nobody could tell
            raise

    def close(self) -> None:
        protocol, self._protocol = self._protocol, None
        if protocol is not None and self._reader._device is self._device:
            with contextlib.suppress(PosGatewayError):
                self._reader._run(protocol.deselect())


class _Unfit:
    """A card that cannot be talked to."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def transceive(self, command: bytes) -> bytes:
        raise CardNotSupported(f"this card is not supported: {self._reason}")

    def close(self) -> None:
        """Nothing to let go of."""


@dataclass(slots=True)
class _Job:
    work: Callable[[], Any]
    done: threading.Event = field(default_factory=threading.Event)
    result: Any = None
    error: Exception | None = None


class _Device:
    """nfcpy's device and the one thread that touches it, from `open` to `close`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.frontend: Any = None
        self._technologies: tuple[str, ...] = ("106A", "106B")
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"nfcpy {name}", daemon=True)
        self._thread.start()

    def open(self, opening: Callable[[], Any]) -> None:
        """
        Raises:
            ReaderUnavailable: it cannot be opened.
        """

        def work() -> None:
            self.frontend = opening()
            if self.frontend.device.chipset_name == "UDP":
                self._technologies = ("106A",)  # it would wait a second for each

        self.call(work, _OPEN_TIMEOUT_S)

    def sense(self) -> Any:
        return self.frontend.sense(*(nfc.clf.RemoteTarget(t) for t in self._technologies))

    def run(self, dialogue: Exchange[Result]) -> Result:
        exchange = self.frontend.exchange
        try:
            frame, wait_s = next(dialogue)
            while True:
                try:
                    answer = exchange(bytearray(frame), wait_s)
                except nfc.clf.CommunicationError:  # time-outs, damaged frames, a field switched off
                    answer = None
                frame, wait_s = dialogue.send(None if answer is None else bytes(answer))
        except StopIteration as finished:
            result: Result = finished.value
            return result

    def call(self, work: Callable[[], Result], timeout_s: float) -> Result:
        """
        Raises:
            ReaderUnavailable: the device failed, or did not come back in time.
            PosGatewayError: whatever else `work` raises of ours.
        """
        job = _Job(work)
        with self._closing:
            if self._closed:
                raise ReaderUnavailable(f"{self._name} was let go of", advice=_PLUG_IN)
            self._jobs.put(job)
        if not job.done.wait(timeout_s):
            raise ReaderUnavailable(f"{self._name} hangs", advice="unplug it and plug it in again")
        match job.error:
            case None:
                result: Result = job.result
                return result
            case PosGatewayError() as error:
                raise error
            case OSError() as error:
                raise ReaderUnavailable(
                    f"{self._name} failed: {error.strerror or error}", advice=_PLUG_IN
                ) from error
            case error:
                raise ReaderUnavailable(
                    f"{self._name} failed ({type(error).__name__})", advice=_PLUG_IN
                ) from error

    def close(self) -> None:
        """Close the device when its thread is free to, without waiting for that."""
        with self._closing:
            self._closed = True
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.result = job.work()
            except Exception as error:  # noqa: BLE001 - handed to the caller, who judges it
                job.error = error
            job.done.set()
        if self.frontend is not None:
            with contextlib.suppress(Exception):
                self.frontend.close()
