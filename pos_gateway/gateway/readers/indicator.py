"""A reader's light and buzzer, driven from a thread of their own: whatever a reader takes for a beep, no
answer waits for it.
"""

from __future__ import annotations

import threading
from typing import Final, Protocol

from pos_gateway.errors import PosGatewayError
from pos_gateway.gateway.readers.models import LightSequence, ReaderModel, Start
from pos_gateway.gateway.readers.port import Indication

_OUTCOMES: Final = (Indication.APPROVED, Indication.DECLINED)
_OUTCOME_SHOWN_S: Final = 3.0
"""How long an outcome stays lit when nothing follows it."""


class CommandLine(Protocol):
    """How commands reach a reader itself. Called from the indicator's thread."""

    def send(self, command: bytes) -> bytes | None:
        """The reader's answer; None if it takes no commands now, or none at all.

        Raises:
            PosGatewayError: the reader is gone, or failed.
        """


class Indicator:
    """Shows the latest indication asked for.

    A new one replaces one that waits and cuts the waits of one under way, except an outcome: that is
    played to its end, at most `MAX_SEQUENCE_MS`. After a failure, or `restart`, the start-up commands are
    sent again before the next one.
    """

    def __init__(self, model: ReaderModel | None, line: CommandLine) -> None:
        self._model = model
        self._line = line
        self._wanted: Indication | None = None
        self._shown: Indication | None = None
        self._started = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def show(self, indication: Indication) -> None:
        """Returns at once. Asking again for what is shown or about to be changes nothing."""
        if self._model is None or not (self._model.indications or self._model.start):
            return
        with self._changed:
            if self._closed or indication is (self._wanted or self._shown):
                return
            self._wanted = indication
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="indicator", daemon=True)
                self._thread.start()

    def restart(self) -> None:
        """The reader is another one, or was away: it knows nothing any more."""
        with self._changed:
            self._started, self._shown = False, None

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while (indication := self._next()) is not None:
            try:
                done = self._start() and self._play(indication)
            except PosGatewayError:
                done = False  # the lane says what is wrong with the reader; a light is no reason to
            with self._changed:
                if not done and self._shown is indication:
                    self._shown = None
                self._started = self._started and done

    def _next(self) -> Indication | None:
        """The next indication to show; None when closed."""
        with self._changed:
            lit = self._shown in _OUTCOMES
            self._changed.wait_for(
                lambda: self._closed or self._wanted is not None, _OUTCOME_SHOWN_S if lit else None
            )
            if self._closed:
                return None
            self._shown, self._wanted = self._wanted or Indication.IDLE, None
            return self._shown

    def _start(self) -> bool:
        if self._started or self._model is None:
            return True
        for command in self._model.start:
            if not run_start_command(self._line, command):
                return False
        self._started = True
        return True

    def _play(self, indication: Indication) -> bool:
        sequence = self._sequence(indication)
        if sequence is None:
            return True
        for step in sequence.step:
            if self._line.send(bytes.fromhex(step.send)) is None:
                return False
            with self._changed:
                self._changed.wait_for(lambda: self._cut_short(indication), step.wait_ms / 1000)
                if self._cut_short(indication):
                    return False
        return True

    def _cut_short(self, indication: Indication) -> bool:
        return self._closed or (self._wanted is not None and indication not in _OUTCOMES)

    def _sequence(self, indication: Indication) -> LightSequence | None:
        if self._model is None or self._model.indications is None:
            return None
        return self._model.indications.of(indication)


def run_start_command(line: CommandLine, command: Start) -> bool:
    """Send it if it is needed. False if the reader takes no commands.

    Raises:
        PosGatewayError: the reader is gone.
    """
    if command.read is not None and command.unless is not None:
        answer = line.send(bytes.fromhex(command.read))
        if answer is None:
            return False
        if answer == bytes.fromhex(command.unless):
            return True
    return line.send(bytes.fromhex(command.send)) is not None
