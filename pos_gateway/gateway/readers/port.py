"""The one port through which the gateway meets readers: PC/SC, contactless frontends, virtual ones.

Everything here blocks and runs in the reader's own thread, never on the event loop. `interrupt` alone
may be called from another thread.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol


class Indication(Enum):
    """What a reader's light and buzzer tell the customer."""

    IDLE = "idle"
    PRESENT_CARD = "present_card"
    PROCESSING = "processing"
    APPROVED = "approved"
    DECLINED = "declined"
    REMOVE_CARD = "remove_card"


class CardChannel(Protocol):
    """One card in the field, for as long as it stays there."""

    def transceive(self, command: bytes) -> bytes:
        """Send one command APDU, return data and status word of the answer.

        Raises:
            CardLeft: the card is no longer in the field.
            ReaderUnavailable: the reader or pcscd is gone.
        """

    def close(self) -> None:
        """Let go of the card. Never raises."""


class Reader(Protocol):
    @property
    def name(self) -> str: ...

    def wait_for_card(self, timeout_s: float) -> CardChannel | None:
        """The next card to enter the field, or one that is already there; None after the timeout
        or an `interrupt`.

        Raises:
            ReaderUnavailable: the reader or pcscd is gone.
        """

    def wait_for_removal(self, timeout_s: float) -> bool:
        """Wait until the field is empty. False after the timeout or an `interrupt`."""

    def interrupt(self) -> None:
        """End a wait from another thread."""

    def indicate(self, indication: Indication) -> None:
        """Show it if the reader can. Never raises and never delays an answer."""

    def close(self) -> None: ...
