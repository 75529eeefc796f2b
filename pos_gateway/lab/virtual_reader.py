"""Virtual readers under a real pcscd of their own: whatever speaks PC/SC can be pointed at them.

    with VirtualReader() as reader:
        gateway = subprocess.Popen([...], env={**os.environ, **reader.environment})
        reader.insert(Path("card.json"), state=Path("card.state.json"))

Needs the Debian packages pcscd and vsmartcard-vpcd; no root where unprivileged user namespaces are
allowed. Several may run side by side, with or without a system pcscd.
"""

from __future__ import annotations

import json
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from pos_gateway.errors import InvalidInput, ReaderUnavailable
from pos_gateway.lab.card_host import CONTROL_SOCKET, MAX_SLOTS, PCSCD_SOCKET
from pos_gateway.lab.vpcd import Fault

_START_TIMEOUT_S: Final = 30.0
_CONTROL_TIMEOUT_S: Final = 30.0
_STOP_TIMEOUT_S: Final = 5.0
_BROKEN: Final = "close it and start another"


class ForeignCard(Enum):
    """A card that is not ours."""

    SCHEME = "scheme"
    """One of a card scheme: its directory lists the scheme's AID."""
    BLANK = "blank"
    """One without any application."""


@dataclass(frozen=True, slots=True)
class Fuzz:
    """How a card misbehaves: see `lab.scripted_card.FuzzedCard`."""

    seed: int
    leaves: bool = True
    stall_s: float = 0.0


class VirtualReader:
    """A private pcscd with `slots` virtual readers (an even number: one more if need be), from
    construction to `close`. May be used from several threads. If its owner dies, pcscd and cards die too.

    `directory`: an existing folder for its sockets, in place of a temporary one; left as it is on `close`,
    and whatever was left in it by another is no hindrance. Its path must be short: a unix socket's may have
    108 bytes.

    Raises:
        ReaderUnavailable: a package is missing, or the kernel allows no namespace; the advice says which.
    """

    def __init__(self, *, slots: int = 2, directory: Path | None = None) -> None:
        if not 1 <= slots <= MAX_SLOTS:
            raise InvalidInput(f"1 to {MAX_SLOTS}", where="slots")
        self._lock = threading.Lock()
        self._is_temporary = directory is None
        self._directory = Path(tempfile.mkdtemp(prefix="pos-gateway-")) if directory is None else directory
        self._control = socket.socket(socket.AF_UNIX)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pos_gateway.lab.card_host", str(self._directory), str(slots)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            self._await_start()
            self._control.settimeout(_CONTROL_TIMEOUT_S)
            self._control.connect(str(self._directory / CONTROL_SOCKET))
            self._stream = self._control.makefile("rwb")
            self._names = tuple(self._order("status")["readers"])
        except BaseException:
            self.close()
            raise

    @property
    def environment(self) -> dict[str, str]:
        """What a process must have in its environment before its first PC/SC call to see these readers
        and no others."""
        return {"PCSCLITE_CSOCK_NAME": str(self._directory / PCSCD_SOCKET)}

    @property
    def names(self) -> tuple[str, ...]:
        """The readers' PC/SC names, by slot."""
        return self._names

    def insert(
        self,
        card: Path | ForeignCard,
        *,
        state: Path | None = None,
        slot: int = 0,
        faults: Sequence[Fault] = (),
        fuzz: Fuzz | None = None,
    ) -> None:
        """Hold a card into a field, in place of any that is there. pcscd looks every 400 ms, so readers
        see it a little later.

        A card of ours, genuine or forged, is the personalisation file its maker wrote; its counter lives
        in the file `state`, else in memory and is gone with the removal. `fuzz`: it misbehaves so.

        Raises:
            ReaderUnavailable: pcscd is not running.
            InvalidInput: no such slot, or files that make no card.
        """
        if isinstance(card, ForeignCard):
            description: dict[str, Any] = {"kind": card.value}
        else:
            description = {"kind": "personalised", "personalisation": str(card.absolute())}
            if state is not None:
                description["state"] = str(state.absolute())
            if fuzz is not None:
                description["fuzz"] = asdict(fuzz)
        wire_faults = [{**asdict(fault), "kind": fault.kind.value} for fault in faults]
        self._order("insert", slot=slot, card=description, faults=wire_faults)

    def remove(self, *, slot: int = 0) -> None:
        """Take the card out, if there is one."""
        self._order("remove", slot=slot)

    def status(self, *, slot: int = 0) -> dict[str, Any] | None:
        """The card in a field, None if there is none: `present` (False once a fault took it out),
        `apdu_count`, and as it applies `state` (see `lab.card_state.CardState`) or `read_attempts`."""
        slots: list[dict[str, Any] | None] = self._order("status")["slots"]
        return slots[slot]

    def kill_pcscd(self) -> None:
        """End pcscd with SIGKILL, and take all cards out."""
        self._order("kill_pcscd")

    def start_pcscd(self) -> None:
        """Start pcscd anew, at the same socket and with the same reader names."""
        self._order("start_pcscd")

    def freeze_pcscd(self) -> None:
        """Stop pcscd with SIGSTOP: it is there and answers nobody."""
        self._order("freeze_pcscd")

    def thaw_pcscd(self) -> None:
        self._order("thaw_pcscd")

    def close(self) -> None:
        self._control.close()
        if self._process.stdin is not None:
            self._process.stdin.close()  # the host's sign to end
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # pcscd dies with it
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        if self._is_temporary:
            shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> VirtualReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _await_start(self) -> None:
        output = self._process.stdout
        line = b""
        if output is not None and select.select([output], [], [], _START_TIMEOUT_S)[0]:
            line = output.readline()
        if not line:
            raise ReaderUnavailable("the virtual reader did not start", advice=_BROKEN)
        answer = json.loads(line)
        if not answer["ok"]:
            raise ReaderUnavailable(answer["reason"], advice=answer["advice"])

    def _order(self, do: str, **details: Any) -> dict[str, Any]:
        with self._lock:
            try:
                self._stream.write(json.dumps({"do": do, **details}).encode() + b"\n")
                self._stream.flush()
                line = self._stream.readline()
            except (OSError, ValueError) as error:
                raise ReaderUnavailable("the virtual reader is gone", advice=_BROKEN) from error
        if not line:
            raise ReaderUnavailable("the virtual reader is gone", advice=_BROKEN)
        answer: dict[str, Any] = json.loads(line)
        if answer["ok"]:
            return answer
        failure = InvalidInput if answer.get("invalid") else ReaderUnavailable
        raise failure(answer["reason"], advice=answer["advice"])
