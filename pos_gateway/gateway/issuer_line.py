"""The line to the ledger as a lane uses it: it asks, waits no longer than its budget, and never for another
lane. What comes late is kept, as it came: see `singles`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Final, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.errors import LedgerUnreachable
from pos_gateway.gateway.ledger_client import LedgerClient
from pos_gateway.inquiry import Inquiry, OnlineAnswer

_DOWN_S: Final = 10.0


class IssuerLine(Protocol):
    """What a till needs of the line. A failed future raises what `LedgerClient.ask_grant` names."""

    @property
    def reachable(self) -> bool:
        """False only while the line is known to be down."""

    def ask_grant(self, inquiry: Inquiry) -> Future[OnlineAnswer]: ...

    def ask_note(self, inquiry: Inquiry) -> Future[OnlineAnswer]: ...


class LedgerLine:
    """Asks over the client of the gateway's event loop; used from any thread."""

    def __init__(
        self,
        client: LedgerClient,
        signer: Ed25519PrivateKey,
        loop: asyncio.AbstractEventLoop,
        reachable: Callable[[], bool],
    ) -> None:
        self._client = client
        self._signer = signer
        self._loop = loop
        self._reachable = reachable
        self._down_until_s = 0.0

    @property
    def reachable(self) -> bool:
        """A line that has just failed is not tried again by the next cards: they would all wait for it."""
        return self._reachable() and self._loop.time() >= self._down_until_s

    def ask_grant(self, inquiry: Inquiry) -> Future[OnlineAnswer]:
        return self._ask(lambda: self._client.ask_grant(inquiry, self._signer))

    def ask_note(self, inquiry: Inquiry) -> Future[OnlineAnswer]:
        return self._ask(lambda: self._client.ask_note(inquiry, self._signer))

    def _ask(self, ask: Callable[[], Awaitable[OnlineAnswer]]) -> Future[OnlineAnswer]:
        async def twice() -> OnlineAnswer:
            # An answer that was lost on the way costs one more round: the same question, the same answer.
            try:
                return await ask()
            except LedgerUnreachable:
                pass
            try:
                return await ask()
            except LedgerUnreachable:
                self._down_until_s = self._loop.time() + _DOWN_S
                raise

        return asyncio.run_coroutine_threadsafe(twice(), self._loop)
