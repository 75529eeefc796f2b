"""A line that breaks in every way a line breaks: a TCP proxy between gateway and ledger."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from enum import Enum
from typing import Final, Self

_CHUNK_BYTES: Final = 16 * 1024
_START_TIMEOUT_S: Final = 10.0
_LONGEST_DELAY_S: Final = 0.05
_MOST_BYTES: Final = 12_000
_REQUEST_BYTES: Final = 3_000
"""Once so many bytes went to the ledger on a connection, a presentment is among them."""


class Fault(Enum):
    """What the line does to connections. `NONE` passes everything."""

    NONE = "none"
    CUT = "cut"
    """Connections are closed as soon as they come."""
    DELAY = "delay"
    TRUNCATE = "truncate"
    """A connection dies after some bytes, in whichever direction."""
    HALF_OPEN = "half_open"
    """Connections are accepted, and nothing is ever answered."""
    LOSE_ANSWER = "lose_answer"
    """The ledger gets the whole request and acts on it; its answer does not come back."""


class Proxy:
    """Listens on a port of its own, in a thread of its own. `fault` may be set at any time."""

    def __init__(self, port: int, chance: random.Random) -> None:
        self._upstream = port
        self._chance = chance
        self._fault = Fault.NONE
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.broken = 0

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(_START_TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(_START_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def turn(self, fault: Fault) -> None:
        """From now on the line is like that. What hangs on it breaks first."""

        async def turn() -> None:
            self._fault = fault
            for connection in list(self._connections):
                connection.cancel()

        asyncio.run_coroutine_threadsafe(turn(), self._loop).result(_START_TIMEOUT_S)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await self._serve(reader, writer)
        self._break(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fault = self._fault
        if fault is Fault.CUT:
            self.broken += 1
            return
        if fault is Fault.HALF_OPEN:
            self.broken += 1
            while await reader.read(_CHUNK_BYTES):
                pass
            return
        to_ledger, from_ledger = 0, 0
        ledger_reader, ledger_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        most = self._chance.randrange(_MOST_BYTES) if fault is Fault.TRUNCATE else None

        async def there() -> None:
            nonlocal to_ledger
            while data := await reader.read(_CHUNK_BYTES):
                data = await self._passing(fault, data, to_ledger, most)
                to_ledger += len(data)
                ledger_writer.write(data)
                await ledger_writer.drain()
                if most is not None and to_ledger >= most:
                    return

        async def back() -> None:
            nonlocal from_ledger
            while data := await ledger_reader.read(_CHUNK_BYTES):
                if fault is Fault.LOSE_ANSWER and to_ledger > _REQUEST_BYTES:
                    return
                data = await self._passing(fault, data, from_ledger, most)
                from_ledger += len(data)
                writer.write(data)
                await writer.drain()
                if most is not None and from_ledger >= most:
                    return

        pumps = [asyncio.create_task(there()), asyncio.create_task(back())]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.broken += fault is not Fault.NONE
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._break(ledger_writer)

    async def _passing(self, fault: Fault, data: bytes, passed: int, most: int | None) -> bytes:
        if fault is Fault.DELAY:
            await asyncio.sleep(self._chance.uniform(0, _LONGEST_DELAY_S))
        return data if most is None else data[: max(0, most - passed)]

    @staticmethod
    def _break(writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()
