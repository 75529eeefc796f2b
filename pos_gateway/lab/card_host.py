"""The inside of a virtual reader: a network namespace of its own with a private pcscd and virtual cards.

Started by `lab.virtual_reader.VirtualReader`, never by hand. vpcd listens on every address, so it must
listen where nobody else can come: in a namespace that only this process and its pcscd are in. pcscd's
clients reach it through a unix socket, which namespaces do not part.

Controlled over the unix socket `control` in its directory, one JSON object per line each way; ends when
its standard input does, that is, when its owner dies however it dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.errors import InvalidInput, PosGatewayError, ReaderUnavailable
from pos_gateway.lab.scripted_card import FuzzedCard
from pos_gateway.lab.virtual_card import BlankCard, SchemeCard, VirtualCard
from pos_gateway.lab.vpcd import Card, Fault, FaultKind, Field

CONTROL_SOCKET: Final = "control"
PCSCD_SOCKET: Final = "pcscd.comm"
MAX_SLOTS: Final = 16
"""pcscd's own bound."""

_FIRST_PORT: Final = 0x8C7B
_SLOTS_PER_DRIVER: Final = 2
_DRIVER_NAME: Final = "libifdvpcd.so"
_START_TIMEOUT_S: Final = 15.0

_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_PR_SET_PDEATHSIG: Final = 1
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1

_EXEC_PCSCD: Final = """
import ctypes, os, sys
listening, *command = sys.argv[1:]
ctypes.CDLL(None).prctl(1, 9)
os.dup2(int(listening), 3, inheritable=True)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = "1"
os.execv(command[0], command)
"""
"""pcscd takes its socket as systemd hands it over: file descriptor 3, addressed to its own process id.
It is killed when this process dies (PR_SET_PDEATHSIG, SIGKILL)."""


class CardHost:
    """pcscd and the cards in its virtual readers' fields."""

    def __init__(self, directory: Path, slots: int) -> None:
        self._directory = directory
        self._slots = slots + slots % _SLOTS_PER_DRIVER
        self._fields: dict[int, Field] = {}
        self._pcscd: subprocess.Popen[bytes] | None = None
        self._names: list[str] = []

    def start_pcscd(self) -> None:
        """
        Raises:
            ReaderUnavailable: pcscd or the vpcd driver is not installed, or does not come up.
        """
        program, driver = find_pcscd(), find_driver()
        # pcscd changes to the root folder: only its socket, bound here, may have a relative path.
        absolute = self._directory.absolute()
        configuration = absolute / "reader.conf.d"
        shutil.rmtree(configuration, ignore_errors=True)
        configuration.mkdir()
        for number in range(self._slots // _SLOTS_PER_DRIVER):
            # Entries that share one driver file overwrite each other's state: one copy each.
            copy = absolute / f"{number}-{_DRIVER_NAME}"
            shutil.copyfile(driver, copy)
            port = _FIRST_PORT + number * _SLOTS_PER_DRIVER
            (configuration / f"{number}").write_text(
                f'FRIENDLYNAME "POS Gateway lab reader {number}"\n'
                f"DEVICENAME /dev/null:0x{port:04X}\nLIBPATH {copy}\nCHANNELID 0x{port:04X}\n"
            )
        path = self._directory / PCSCD_SOCKET
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listening, (self._directory / "pcscd.log").open("ab") as log:
            listening.bind(str(path))
            listening.listen(16)
            self._pcscd = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", _EXEC_PCSCD, str(listening.fileno()), program,
                 "--foreground", "--config", str(configuration)],
                pass_fds=[listening.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )  # fmt: skip
        self._names = self._await_readers(path)

    def kill_pcscd(self) -> None:
        """As a crash would. Cards stay where they are, out of any field."""
        for slot in list(self._fields):
            self.remove(slot)
        if self._pcscd is not None:
            self._pcscd.kill()
            self._pcscd.wait()
            self._pcscd = None

    def insert(self, slot: int, card: Card, faults: list[Fault]) -> None:
        self.remove(slot)
        self._fields[slot] = Field(card, ("127.0.0.1", _FIRST_PORT + slot), faults=faults)

    def remove(self, slot: int) -> None:
        field = self._fields.pop(slot, None)
        if field is not None:
            field.remove()

    def close(self) -> None:
        self.kill_pcscd()

    def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do what one control message says; the answer to it.

        Raises:
            PosGatewayError, OSError: it could not be done.
        """
        match command.get("do"):
            case "status":
                return {"readers": self._names, "slots": [self._status(n) for n in range(self._slots)]}
            case "insert":
                faults = [
                    Fault(**{**fault, "kind": FaultKind(fault["kind"])})
                    for fault in command.get("faults", [])
                ]
                self.insert(self._slot(command), _make_card(command["card"]), faults)
            case "remove":
                self.remove(self._slot(command))
            case "kill_pcscd":
                self.kill_pcscd()
            case "freeze_pcscd":
                self._signal_pcscd(signal.SIGSTOP)
            case "thaw_pcscd":
                self._signal_pcscd(signal.SIGCONT)
            case "start_pcscd":
                self.kill_pcscd()
                self.start_pcscd()
            case other:
                raise InvalidInput("unknown control message", where=repr(other))
        return {}

    def _slot(self, command: dict[str, Any]) -> int:
        slot = command.get("slot")
        if not isinstance(slot, int) or not 0 <= slot < self._slots:
            raise InvalidInput(f"no such slot, there are {self._slots}", where="slot")
        return slot

    def _signal_pcscd(self, number: signal.Signals) -> None:
        if self._pcscd is None:
            raise ReaderUnavailable("pcscd is not running")
        self._pcscd.send_signal(number)

    def _status(self, slot: int) -> dict[str, Any] | None:
        field = self._fields.get(slot)
        if field is None:
            return None
        status: dict[str, Any] = {"present": field.present, "apdu_count": field.apdu_count}
        if isinstance(field.card, VirtualCard):
            status["state"] = json.loads(field.card.state.to_json())
        if isinstance(field.card, SchemeCard):
            status["read_attempts"] = field.card.read_attempts
        return status

    def _await_readers(self, path: Path) -> list[str]:
        # libpcsclite reads this at each context; it is this process's own pcscd and no other's.
        os.environ["PCSCLITE_CSOCK_NAME"] = str(path)
        from pos_gateway.gateway.readers.pcsc import list_readers

        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._pcscd is not None and self._pcscd.poll() is not None:
                break
            with contextlib.suppress(ReaderUnavailable):
                names = sorted(list_readers())
                if len(names) == self._slots:
                    return names
            time.sleep(0.02)
        raise ReaderUnavailable("pcscd did not come up with its virtual readers")


def _make_card(description: dict[str, Any]) -> Card:
    match description.get("kind"):
        case "personalised":
            personalisation = Personalisation.from_json(Path(description["personalisation"]).read_text())
            state = description.get("state")
            card = VirtualCard(personalisation, state_path=None if state is None else Path(state))
            fuzz = description.get("fuzz")
            if fuzz is None:
                return card
            return FuzzedCard(card, fuzz["seed"], leaves=fuzz["leaves"], stall_s=fuzz["stall_s"])
        case "scheme":
            return SchemeCard()
        case "blank":
            return BlankCard()
        case other:
            raise InvalidInput("unknown kind of card", where=repr(other))


def find_pcscd() -> str:
    """
    Raises:
        ReaderUnavailable: pcscd is not installed.
    """
    program = shutil.which("pcscd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if program is None:
        raise ReaderUnavailable("pcscd is not installed", advice="apt-get install pcscd")
    return program


def find_driver(roots: Sequence[Path] = (Path("/usr/lib"), Path("/usr/local/lib"))) -> Path:
    """
    Raises:
        ReaderUnavailable: vpcd is not installed.
    """
    for root in roots:
        for folder in ("pcsc/drivers/serial", "*/pcsc/drivers/serial"):
            for path in sorted(root.glob(f"{folder}/{_DRIVER_NAME}")):
                return path.resolve()
    raise ReaderUnavailable(
        "the virtual reader's driver is not installed", advice="apt-get install vsmartcard-vpcd"
    )


def _enter_own_network() -> None:
    """Unshare the network; without root, from inside a user namespace of our own.

    Raises:
        ReaderUnavailable: the kernel does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_CLONE_NEWNET) != 0:
        if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
            raise ReaderUnavailable(
                f"cannot make a network namespace ({os.strerror(ctypes.get_errno())})",
                advice="run as root, or allow unprivileged user namespaces",
            )
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH22x", b"lo", 0)
        flags = struct.unpack_from("H", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request), 16)[0]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))


def _serve(host: CardHost, listening: socket.socket) -> None:
    """Answer control messages, all in this thread: pcscd dies with the thread that started it."""
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ, None)
    selector.register(listening, selectors.EVENT_READ, None)
    while True:
        for key, _ in selector.select():
            if key.fileobj == sys.stdin.fileno():
                if not os.read(sys.stdin.fileno(), 4096):
                    return
            elif key.fileobj is listening:
                connection, _ = listening.accept()
                selector.register(connection, selectors.EVENT_READ, connection.makefile("rwb"))
            else:
                line = key.data.readline()
                if not line:
                    selector.unregister(key.fileobj)
                    key.data.close()
                    key.fileobj.close()  # type: ignore[union-attr]
                    continue
                with contextlib.suppress(BrokenPipeError):
                    key.data.write(_answer(host, line))
                    key.data.flush()


def _answer(host: CardHost, line: bytes) -> bytes:
    try:
        answer = {"ok": True, **host.obey(json.loads(line))}
    except PosGatewayError as error:
        invalid = isinstance(error, InvalidInput)
        answer = {"ok": False, "reason": error.reason, "advice": error.advice, "invalid": invalid}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        answer = {"ok": False, "reason": f"{type(error).__name__}: {error}", "advice": ""}
    return json.dumps(answer).encode() + b"\n"


def main() -> None:
    directory, slots = Path(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner, who then closes us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    host = CardHost(directory, slots)
    try:
        _enter_own_network()
        host.start_pcscd()
        with socket.socket(socket.AF_UNIX) as listening:
            path = directory / CONTROL_SOCKET
            path.unlink(missing_ok=True)
            listening.bind(str(path))
            listening.listen(4)
            print(json.dumps({"ok": True}), flush=True)
            _serve(host, listening)
    except PosGatewayError as error:
        print(json.dumps({"ok": False, "reason": error.reason, "advice": error.advice}), flush=True)
        sys.exit(1)
    finally:
        host.close()


if __name__ == "__main__":
    main()
