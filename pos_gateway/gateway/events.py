"""Live events for whoever watches: pages, command lines, POS software."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

_MAX_WAITING: Final = 256


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event (HTML Living Standard, §9.2)."""

    name: str
    data: dict[str, Any]

    def to_bytes(self) -> bytes:
        return f"event: {self.name}\ndata: {json.dumps(self.data, ensure_ascii=False)}\n\n".encode()


class Subscription:
    """Events waiting for one watcher. One who falls behind loses the oldest, never the newest."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[Event | None] = asyncio.Queue(_MAX_WAITING)

    def put(self, event: Event | None) -> None:
        if self._waiting.full():
            self._waiting.get_nowait()
        self._waiting.put_nowait(event)

    async def next(self, timeout_s: float) -> Event | None:
        """The next event, None when the hub closes.

        Raises:
            TimeoutError: nothing happened for that long.
        """
        return await asyncio.wait_for(self._waiting.get(), timeout_s)


class Hub:
    """Hands every event to every watcher. `publish` may be called from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._subscriptions: set[Subscription] = set()
        self._closed = False

    def publish(self, event: Event) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, event)

    def close(self) -> None:
        """End every watcher's stream, so that a server can stop."""
        self._closed = True
        self._deliver(None)

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        subscription = Subscription()
        self._subscriptions.add(subscription)
        if self._closed:
            subscription.put(None)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def _deliver(self, event: Event | None) -> None:
        for subscription in tuple(self._subscriptions):
            subscription.put(event)
