"""A virtual card in a field without a reader: the card itself, in this process, no PC/SC in between."""

from __future__ import annotations

from collections.abc import Callable

from pos_gateway.errors import CardLeft
from pos_gateway.lab.vpcd import Card


class DirectChannel:
    """A card channel straight to a virtual card.

    `leaves_after`: the card processes so many APDUs, and the answer to the last one is lost.
    `alter`: what a forger between card and reader makes of each answer, given the command.
    """

    def __init__(
        self,
        card: Card,
        *,
        leaves_after: int | None = None,
        alter: Callable[[bytes, bytes], bytes] = lambda command, answer: answer,
    ) -> None:
        self._card = card
        self._left = leaves_after
        self._alter = alter
        self.commands: list[bytes] = []
        card.power_up()

    def transceive(self, command: bytes) -> bytes:
        if self._left == 0:
            raise CardLeft("the card left before it had answered")
        self.commands.append(command)
        answer = self._card.process(command)
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                raise CardLeft("the card left before it had answered")
        return self._alter(command, answer)

    def close(self) -> None:
        """Nothing to let go of."""
