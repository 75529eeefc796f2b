"""How the line's return is noticed soon, without asking the ledger anything.

Two cheap signs: the kernel tells of links, addresses and routes that changed (netlink), and a bare TCP
connection to the ledger's port stands. It costs the ledger a handshake of its kernel, no TLS; it is
tried soon at first, then less and less often, spread so that shops do not come all at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import urlsplit

Probe = Callable[[], Awaitable[bool]]

_CONNECT_TIMEOUT_S: Final = 3.0
_STANDS_S: Final = 0.2
_SOON_S: Final = 0.25
_LATER_S: Final = 15.0
_SLOWER: Final = 1.5
_SETTLE_S: Final = 0.5
# linux/rtnetlink.h: RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE
_GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x100 | 0x400


def connect_probe(url: str) -> Probe:
    """Does a connection to the server of that address stand? One that is closed at once does not."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 443

    async def probe() -> bool:
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(host, port)
        except (OSError, TimeoutError):
            return False
        try:
            async with asyncio.timeout(_STANDS_S):
                await reader.read(1)
        except TimeoutError:
            return True  # a TLS server waits for us to begin
        except OSError:
            return False
        finally:
            writer.transport.abort()
        return False

    return probe


async def line_returns(probe: Probe, rng: random.Random) -> None:
    """Returns when the line seems to be back.

    A server that could be connected to all the while and failed all the same is none that has returned:
    trying it again is left to the backoff.
    """
    async with _network_changes() as changed:
        stood = await probe()
        pause_s = _SOON_S
        while True:
            changed.clear()
            try:
                async with asyncio.timeout(pause_s * rng.uniform(0.5, 1.0)):
                    await changed.wait()
            except TimeoutError:
                network_changed = False
            else:
                network_changed = True
                pause_s = _SOON_S
                await asyncio.sleep(_SETTLE_S)  # routes follow their link one by one
            stands = await probe()
            if stands and (network_changed or not stood):
                return
            stood = stands
            pause_s = min(_LATER_S, pause_s * _SLOWER)


@asynccontextmanager
async def _network_changes() -> AsyncIterator[asyncio.Event]:
    """Set whenever the kernel tells of a change; never where it tells nobody."""
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        try:
            news = stack.enter_context(
                socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
            )
            news.bind((0, _GROUPS))
        except (OSError, AttributeError):
            yield changed
            return

        def read() -> None:
            with contextlib.suppress(OSError):  # an overflow is a change too
                while news.recv(65_536):
                    changed.set()
            changed.set()

        loop.add_reader(news, read)
        try:
            yield changed
        finally:
            loop.remove_reader(news)
