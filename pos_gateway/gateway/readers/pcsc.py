"""PC/SC readers, through pyscard's low-level calls. One context per reader; calls are made by the thread
that uses the reader.

What bounds a wait. `SCardTransmit`, `SCardConnect` and the like cannot be cancelled: they return when the
reader's driver gives up, and it may never do so (vpcd waits for a mute card for ever, a CCID driver for
seconds, extended as often as the card asks for more time). So a watchdog stands beside each context: a
call that takes longer than `response_timeout_s` has its connection to pcscd cut, and comes back as
`ReaderUnavailable`. pcscd itself frees the reader when the card is taken away; until then opening the
reader fails at once. Cutting needs /proc to find the connection; elsewhere than on Linux the driver's own
time-out is the only bound.

Cards are opened exclusively: a payment's dialogue must not be mixed with another program's.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from smartcard import scard

from pos_gateway.errors import CardLeft, ReaderUnavailable, Unavailable
from pos_gateway.gateway.readers.indicator import Indicator
from pos_gateway.gateway.readers.models import ReaderModel, Way
from pos_gateway.gateway.readers.port import Indication
from pos_gateway.gateway.readers.system import EscapeOption, load_driver_options

RESPONSE_TIMEOUT_S: Final = 5.0
"""How long one call to a card or reader may take before the reader counts as unavailable."""

_WATCHDOG_TICK_S: Final = 0.25
_DESCRIPTORS: Final = "/proc/self/fd"
_PCSCD_SOCKET: Final = "/run/pcscd/pcscd.comm"  # unless libpcsclite is told another one

_WAIT_SLICE_S: Final = 0.5
"""An interrupt that falls between two looks at the reader is seen after this time at the latest."""

_START_PCSCD: Final = "is pcscd running? `systemctl start pcscd.socket`, then `pos-gateway doctor`"
_TAP_AGAIN: Final = "present it again"
_STUCK: Final = "take the card off the reader; if that does not help, restart pcscd"

_UNAWARE: Final[int] = scard.SCARD_STATE_UNAWARE
_CHANGED: Final[int] = scard.SCARD_STATE_CHANGED

_CARD_LEFT: Final = {
    scard.SCARD_W_REMOVED_CARD,
    scard.SCARD_W_RESET_CARD,
    scard.SCARD_W_UNPOWERED_CARD,
    scard.SCARD_W_UNRESPONSIVE_CARD,
    scard.SCARD_E_NO_SMARTCARD,
    scard.SCARD_E_NOT_TRANSACTED,
    scard.SCARD_E_COMM_DATA_LOST,
}
_SERVICE_GONE: Final = {
    scard.SCARD_E_NO_SERVICE,
    scard.SCARD_E_SERVICE_STOPPED,
    scard.SCARD_E_INVALID_HANDLE,
    scard.SCARD_F_COMM_ERROR,
}
_READER_GONE: Final = {
    scard.SCARD_E_UNKNOWN_READER,
    scard.SCARD_E_READER_UNAVAILABLE,
    scard.SCARD_E_NO_READERS_AVAILABLE,
}
_COMMANDS_REFUSED: Final = {
    scard.SCARD_E_UNSUPPORTED_FEATURE,  # what libccid answers while escape commands are not allowed
    scard.SCARD_E_NOT_TRANSACTED,
    0x8010001F,  # pcsc-lite's number for it, and what vpcd answers to everything
}
_NOTHING_HAPPENED: Final = {scard.SCARD_E_TIMEOUT, scard.SCARD_E_CANCELLED}


def list_readers() -> list[str]:
    """Names of the readers pcscd knows now; empty when there are none.

    Raises:
        ReaderUnavailable: pcscd does not answer.
    """
    session = _Session(RESPONSE_TIMEOUT_S)
    try:
        code, names = session.call(scard.SCardListReaders, session.context, [])
        if code == scard.SCARD_E_NO_READERS_AVAILABLE:
            return []
        _check(code, "listing readers")
        return [str(name) for name in names]
    finally:
        session.close()


class PcscReader:
    """One reader under pcscd, known by its PC/SC name. See `readers.port.Reader`.

    Connects to pcscd at the first wait, and again at the next one after pcscd was gone.
    """

    def __init__(
        self,
        name: str,
        *,
        response_timeout_s: float = RESPONSE_TIMEOUT_S,
        model: ReaderModel | None = None,
    ) -> None:
        self._name = name
        self._timeout_s = response_timeout_s
        self._session: _Session | None = None
        self._interrupted = threading.Event()
        self._channel: PcscChannel | None = None
        self._using = threading.RLock()
        """Held for every call that uses the card or the reader's own commands: they come from two threads."""
        self.commands = PcscCommands(self, model.ways if model is not None else ())
        self._indicator = Indicator(model, self.commands)

    @property
    def name(self) -> str:
        return self._name

    def wait_for_card(self, timeout_s: float) -> PcscChannel | None:
        """See `Reader.wait_for_card`. A mute card counts as no card. An `interrupt` that comes while
        nothing waits ends the next wait.

        Raises:
            ReaderUnavailable: no such reader, no pcscd, or another program holds the card; so does a call
                that was cut off, until its mute card is taken away. Repeating at once is no use.
        """
        deadline = time.monotonic() + timeout_s
        known = _UNAWARE
        while (state := self._next_state(known, deadline)) is not None:
            if state & scard.SCARD_STATE_PRESENT and not state & scard.SCARD_STATE_MUTE:
                with contextlib.suppress(CardLeft):  # it left again, or did not answer: wait for the next
                    return self._connect()
            known = state
        return None

    def wait_for_removal(self, timeout_s: float) -> bool:
        """See `Reader.wait_for_removal`.

        Raises:
            ReaderUnavailable: the reader or pcscd is gone.
        """
        deadline = time.monotonic() + timeout_s
        known = _UNAWARE
        while (state := self._next_state(known, deadline)) is not None:
            if not state & scard.SCARD_STATE_PRESENT:
                return True
            known = state
        return False

    def interrupt(self) -> None:
        self._interrupted.set()
        session = self._session
        if session is not None:
            session.cancel()

    def indicate(self, indication: Indication) -> None:
        """See `Reader.indicate`; nothing for models without a light that we know how to reach."""
        self._indicator.show(indication)

    def close(self) -> None:
        self._indicator.close()
        self._drop()

    def _next_state(self, known: int, deadline: float) -> int | None:
        """The reader's state as soon as it differs from `known`; None at the deadline or an interrupt."""
        while not self._interrupted.is_set():
            left_s = max(0.0, deadline - time.monotonic())
            slice_s = min(left_s, _WAIT_SLICE_S)
            code, states = self._call(
                scard.SCardGetStatusChange,
                self._open().context,
                int(1000 * slice_s),
                [(self._name, known)],
                wait_s=slice_s,
            )
            if code not in _NOTHING_HAPPENED:
                self._checked(code, f"watching {self._name!r}")
                state = int(states[0][1])
                if state & (scard.SCARD_STATE_UNKNOWN | scard.SCARD_STATE_UNAVAILABLE):
                    self._checked(scard.SCARD_E_UNKNOWN_READER, f"watching {self._name!r}")
                return state & ~_CHANGED
            if left_s <= 0:
                return None
        self._interrupted.clear()
        return None

    def _connect(self) -> PcscChannel:
        with self._using:
            code, handle, protocol = self._call(
                scard.SCardConnect,
                self._open().context,
                self._name,
                scard.SCARD_SHARE_EXCLUSIVE,
                scard.SCARD_PROTOCOL_T0 | scard.SCARD_PROTOCOL_T1,
            )
            self._checked(code, f"opening the card on {self._name!r}")
            self._channel = PcscChannel(self, handle, protocol)
            return self._channel

    def _open(self) -> _Session:
        if self._session is None:
            self._session = _Session(self._timeout_s)
        return self._session

    def _call(self, function: Callable[..., Any], *arguments: Any, wait_s: float = 0.0) -> Any:
        """A call bounded in time, its return code not yet checked."""
        try:
            return self._open().call(function, *arguments, wait_s=wait_s)
        except ReaderUnavailable:
            self._drop()
            raise

    def _checked(self, code: int, doing: str) -> None:
        try:
            _check(code, doing)
        except ReaderUnavailable:
            self._drop()
            raise

    def _drop(self) -> None:
        """Let go of a context that failed: the next call makes a new one."""
        with self._using:
            self._channel = None
            if self._session is not None:
                self._session.close()
                self._session = None
            self.commands.forget()
        self._indicator.restart()


class PcscChannel:
    """One card on a PC/SC reader. See `readers.port.CardChannel`."""

    def __init__(self, reader: PcscReader, handle: int, protocol: int) -> None:
        self._reader = reader
        self._handle = handle
        self._is_t0 = protocol == scard.SCARD_PROTOCOL_T0
        self._pci = scard.SCARD_PCI_T0 if self._is_t0 else scard.SCARD_PCI_T1
        self._closed = False

    def transceive(self, command: bytes) -> bytes:
        """See `CardChannel.transceive`.

        Raises:
            CardLeft: the card is no longer there.
            ReaderUnavailable: the reader or pcscd is gone, or the card did not answer in time.
        """
        if self._closed:
            raise CardLeft("the card was let go of")
        if self._is_t0 and len(command) > 5 and len(command) == 6 + command[4]:
            command = command[:-1]  # T=0 has no command with both data and Le (ISO/IEC 7816-3 §12.1)
        with self._reader._using:
            code, answer = self._reader._call(scard.SCardTransmit, self._handle, self._pci, list(command))
            self._reader._checked(code, "talking to the card")
        if not answer:  # what vpcd answers when the card leaves with the command
            raise CardLeft("the card left before it had answered", advice=_TAP_AGAIN)
        return bytes(answer)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(ReaderUnavailable), self._reader._using:
            if self._reader._channel is self:
                self._reader._channel = None
            # Neither reset nor power down: if the card leaves at this moment, as customers do, pcscd 1.9
            # calls the field empty without looking, and may then not see the next card at all.
            self._reader._call(scard.SCardDisconnect, self._handle, scard.SCARD_LEAVE_CARD)


class PcscCommands:
    """Commands to a PC/SC reader itself: its light, its buzzer, its firmware's version. See
    `indicator.CommandLine`.

    They go by `SCardControl`, on the open card's connection or one of their own; where the driver refuses
    that, as pseudo-APDUs while a card is open, if the model takes them so.
    """

    def __init__(self, reader: PcscReader, ways: Sequence[Way]) -> None:
        self._reader = reader
        self._ways = ways
        self._escape: EscapeOption | None = None
        self._session: _Session | None = None
        self.refused = False
        """The driver said that it passes no escape commands on."""

    def send(self, command: bytes) -> bytes | None:
        """
        Raises:
            ReaderUnavailable: the reader or pcscd is gone, or a card is held by another program.
        """
        if Way.CONTROL in self._ways and not self.refused:
            answer = self._control(self._option.control_code, command)
            if answer is not None:
                return answer
            self.refused = True
        if Way.PSEUDO_APDU in self._ways:
            return self._transmit(command)
        return None

    def escape_allowed(self) -> bool | None:
        """Does the driver list escape commands among this reader's features? None if it lists nothing.

        Raises:
            ReaderUnavailable: as `send`.
        """
        features = self._control(self._option.feature_query_code, b"")
        if features is None:
            return None
        # Tag, length 4, control code, for each (PC/SC part 10, §2.2).
        return self._option.feature_tag in features[0 : len(features) - 5 : 6]

    def driver_version(self) -> str | None:
        """PC/SC's attribute VENDOR_IFD_VERSION, which libccid takes from the reader's USB descriptor.

        Raises:
            ReaderUnavailable: as `send`.
        """

        def read(session: _Session, handle: int) -> bytes | None:
            code, value = session.call(scard.SCardGetAttrib, handle, scard.SCARD_ATTR_VENDOR_IFD_VERSION)
            return bytes(value) if code == scard.SCARD_S_SUCCESS else None

        value = self._with_handle(read)
        if value is None or len(value) != 4:
            return None
        number = int.from_bytes(value, "little")  # 0xMMmmbbbb (PC/SC part 3, §3.1.3)
        return f"{number >> 24}.{number >> 16 & 0xFF}"

    def forget(self) -> None:
        """The reader was away: it may be another one, under other rules."""
        self.refused = False
        self._let_go()

    def _let_go(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    @property
    def _option(self) -> EscapeOption:
        if self._escape is None:
            self._escape = load_driver_options().escape
        return self._escape

    def _control(self, code: int, command: bytes) -> bytes | None:
        def control(session: _Session, handle: int) -> bytes | None:
            result, answer = session.call(scard.SCardControl, handle, code, list(command))
            if result in _COMMANDS_REFUSED:
                return None
            _check(result, "sending a command to the reader")
            return bytes(answer)

        return self._with_handle(control)

    def _transmit(self, command: bytes) -> bytes | None:
        with self._reader._using:
            channel = self._reader._channel
            return None if channel is None else channel.transceive(command)

    def _with_handle(self, use: Callable[[_Session, int], bytes | None]) -> bytes | None:
        reader = self._reader
        with reader._using:
            channel = reader._channel
            if channel is not None and reader._session is not None:
                return use(reader._session, channel._handle)
            if self._session is None:
                self._session = _Session(reader._timeout_s)
            session = self._session
            try:
                code, handle, _ = session.call(
                    scard.SCardConnect, session.context, reader.name, scard.SCARD_SHARE_DIRECT, 0
                )
                _check(code, f"opening {reader.name!r} for a command")
                try:
                    return use(session, handle)
                finally:
                    session.call(scard.SCardDisconnect, handle, scard.SCARD_LEAVE_CARD)
            except ReaderUnavailable:
                self._let_go()
                raise


class _Session:
    """One PC/SC context with its watchdog.

    Raises:
        ReaderUnavailable: pcscd does not answer.
    """

    _establishing = threading.Lock()

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._deadline = math.inf
        self._was_cut = False
        self._closed = threading.Event()
        self.context: int | None = None
        with _Session._establishing:
            self._others = {name for name, _ in _connections()}
            self._own: set[str] | None = None
            threading.Thread(target=self._watch, name="pcsc-watchdog", daemon=True).start()
            try:
                code, context = self.call(scard.SCardEstablishContext, scard.SCARD_SCOPE_SYSTEM)
                _check(code, "connecting to pcscd")
            except BaseException:
                self._closed.set()
                raise
            self.context = context
            self._own = {name for name, _ in _connections()} - self._others

    def call(self, function: Callable[..., Any], *arguments: Any, wait_s: float = 0.0) -> Any:
        """What `function` returns within the time-out; `wait_s` is what it may wait on top of it.

        Raises:
            ReaderUnavailable: it was cut off, or pyscard failed (a dead pcscd can make it raise a bare
                SystemError).
        """
        self._deadline = time.monotonic() + self._timeout_s + wait_s
        try:
            result = function(*arguments)
        except Exception as error:
            raise ReaderUnavailable(f"PC/SC failed ({type(error).__name__})", advice=_START_PCSCD) from error
        finally:
            self._deadline = math.inf
        if self._was_cut:
            raise ReaderUnavailable(f"no answer within {self._timeout_s:g} s", advice=_STUCK)
        return result

    def cancel(self) -> None:
        """End an `SCardGetStatusChange` that another thread waits in. Never blocks: a pcscd that hangs
        would not answer this either."""
        if self.context is not None:
            threading.Thread(target=scard.SCardCancel, args=(self.context,), daemon=True).start()

    def close(self) -> None:
        if self._closed.is_set():
            return
        with contextlib.suppress(ReaderUnavailable):
            self.call(scard.SCardReleaseContext, self.context)
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(_WATCHDOG_TICK_S):
            if time.monotonic() > self._deadline:
                self._was_cut = True
                for name, connection in _connections():
                    if name in self._own if self._own is not None else name not in self._others:
                        with contextlib.suppress(OSError):
                            connection.shutdown(socket.SHUT_RDWR)


def _connections() -> Iterator[tuple[str, socket.socket]]:
    """This process's connections to pcscd: a name that stays unique, and a duplicate to act on."""
    address = os.environ.get("PCSCLITE_CSOCK_NAME", _PCSCD_SOCKET)
    with contextlib.suppress(FileNotFoundError):
        for descriptor in os.listdir(_DESCRIPTORS):
            with contextlib.suppress(OSError), _duplicate(int(descriptor)) as connection:
                if connection.family == socket.AF_UNIX and connection.getpeername() == address:
                    yield os.readlink(f"{_DESCRIPTORS}/{connection.fileno()}"), connection


@contextlib.contextmanager
def _duplicate(descriptor: int) -> Iterator[socket.socket]:
    copy = os.dup(descriptor)
    try:
        connection = socket.socket(fileno=copy)
    except OSError:  # not a socket
        os.close(copy)
        raise
    with connection:
        yield connection


def _check(code: int, doing: str) -> None:
    if code != scard.SCARD_S_SUCCESS:
        raise _failure(code, doing)


def _failure(code: int, doing: str) -> Unavailable:
    if code in _CARD_LEFT:
        return CardLeft("the card left before it had answered", advice=_TAP_AGAIN)
    if code in _SERVICE_GONE:
        return ReaderUnavailable(f"no pcscd while {doing} (0x{code:08X})", advice=_START_PCSCD)
    if code in _READER_GONE:
        return ReaderUnavailable(
            f"no such reader while {doing} (0x{code:08X})",
            advice="plug it in; `pos-gateway reader list` shows what is there",
        )
    if code == scard.SCARD_E_SHARING_VIOLATION:
        return ReaderUnavailable(
            f"the card is held by another program, or was mute, while {doing}",
            advice="take the card off the reader and close other smart card programs",
        )
    return ReaderUnavailable(f"PC/SC error 0x{code:08X} while {doing}", advice=_START_PCSCD)
