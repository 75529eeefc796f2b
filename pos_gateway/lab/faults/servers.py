"""The real gateway and ledger programs as processes that can be killed and are up again in a moment.

They are forked from a process that has loaded the code already: a thousand kills then take minutes.
Only the reader is not a real one: the customer's card lies in its field for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import multiprocessing
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, Self

import structlog

from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.errors import PosGatewayError
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.program import serve as serve_gateway
from pos_gateway.gateway.readers.port import CardChannel, Indication
from pos_gateway.gateway.readers.source import ReaderSource
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.ledger.api import serve as serve_ledger
from pos_gateway.ledger.ledger import Ledger

_START_TIMEOUT_S: Final = 30.0
_STOP_TIMEOUT_S: Final = 15.0
_HOST: Final = "127.0.0.1"
_PR_SET_PDEATHSIG: Final = 1

_CONTEXT: Final = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])


class Server:
    """A program in a process of its own. `address` is what it said when it was ready."""

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        """
        Raises:
            PosGatewayError: it did not start.
        """
        receive, send = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(target=target, args=(send, *arguments), daemon=True)
        self._process.start()
        send.close()
        try:
            if not receive.poll(_START_TIMEOUT_S):
                raise EOFError
            self.address = str(receive.recv())
        except EOFError:
            self.kill()
            raise PosGatewayError(f"{target.__name__} did not start; see its log") from None
        finally:
            receive.close()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def kill(self) -> None:
        """SIGKILL: it gets no chance to tidy up."""
        self._process.kill()
        self._process.join()

    def stop(self) -> None:
        """Ask it to end, and wait until it has.

        Raises:
            PosGatewayError: it had to be killed, or ended badly.
        """
        self._process.terminate()
        self._process.join(_STOP_TIMEOUT_S)
        if self._process.exitcode is None:
            self.kill()
            raise PosGatewayError("a program did not end when asked to")
        if self._process.exitcode not in (0, -signal.SIGTERM):
            raise PosGatewayError(f"a program ended with {self._process.exitcode}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.is_alive():
            self.kill()


def start_gateway(home: Home, card: Path, state: Path, log: Path) -> Server:
    return Server(_gateway, str(home.path), str(card), str(state), str(log))


def start_ledger(home: Path, port: int, log: Path) -> Server:
    """On the given port, or on any with 0."""
    return Server(_ledger, str(home), port, str(log))


class GatewayOfItsOwn:
    """The gateway in a process that is not forked but started, in an environment of its own, like one with
    a wrong clock. Otherwise like `Server`."""

    def __init__(
        self, home: Home, card: Path, state: Path, log: Path, environment: Mapping[str, str]
    ) -> None:
        """
        Raises:
            PosGatewayError: it did not start.
        """
        arguments = [str(home.path), str(card), str(state), str(log)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *arguments],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            preexec_fn=_die_with_starter,
            start_new_session=True,
        )
        output = self._process.stdout
        told = b""
        if output is not None and select.select([output], [], [], _START_TIMEOUT_S)[0]:
            told = output.readline()
        self.address = told.decode().strip()
        if not self.address:
            self.kill()
            raise PosGatewayError("the gateway did not start; see its log")

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL: it gets no chance to tidy up."""
        self._process.kill()
        self._reap()

    def stop(self) -> None:
        """Ask it to end, and wait until it has.

        Raises:
            PosGatewayError: it had to be killed, or ended badly.
        """
        self._process.terminate()
        try:
            code = self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise PosGatewayError("a program did not end when asked to") from None
        self._reap()
        if code not in (0, -signal.SIGTERM):
            raise PosGatewayError(f"a program ended with {code}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.kill()

    def _reap(self) -> None:
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class CardInField:
    """A reader whose field always holds the same card."""

    def __init__(self, name: str, card: VirtualCard) -> None:
        self.name = name
        self._card = card

    def wait_for_card(self, timeout_s: float) -> CardChannel | None:
        return DirectChannel(self._card)

    def wait_for_removal(self, timeout_s: float) -> bool:
        return True

    def interrupt(self) -> None:
        """Nothing ever waits."""

    def indicate(self, indication: Indication) -> None:
        """There is no light."""

    def close(self) -> None:
        """There is nothing to let go of."""


def _gateway(ready: Connection, home: str, card: str, state: str, log: str) -> None:
    begin(log)
    _run_gateway(ready.send, home, card, state)


def _run_gateway(ready: Callable[[str], None], home: str, card: str, state: str) -> None:
    virtual = VirtualCard(Personalisation.from_json(Path(card).read_text()), state_path=Path(state))
    readers = ReaderSource(lambda: ["field"], lambda name, timeout_s: CardInField(name, virtual))
    asyncio.run(serve_gateway(Home(Path(home)), on_ready=ready, readers=readers))


def _ledger(ready: Connection, home: str, port: int, log: str) -> None:
    begin(log)

    async def run() -> None:
        with Ledger.open(Path(home)) as ledger:
            serving = asyncio.create_task(
                serve_ledger(ledger, _HOST, port, on_ready=lambda p: ready.send(f"https://{_HOST}:{p}"))
            )
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
            with contextlib.suppress(asyncio.CancelledError):
                await serving

    asyncio.run(run())


def begin(log: str) -> None:
    """First of all in a program of its own: it ends with whoever started it, and writes into a log."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))


def _die_with_starter() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _main() -> None:
    home, card, state, log = sys.argv[1:]
    told = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    begin(log)

    def ready(address: str) -> None:
        told.write(address + "\n")
        told.flush()

    _run_gateway(ready, home, card, state)


if __name__ == "__main__":
    _main()
