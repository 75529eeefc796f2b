"""A line to the issuer without a network that does what it is told: be down, lose answers, be late."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from enum import Enum

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.errors import LedgerUnreachable, PosGatewayError
from pos_gateway.inquiry import Inquiry, OnlineAnswer
from pos_gateway.ledger.ledger import Ledger
from pos_gateway.records import sign_batch


class Mishap(Enum):
    LOST_QUESTION = "lost_question"
    """The ledger never hears of it."""
    LOST_ANSWER = "lost_answer"
    """It answers, and nobody hears that."""
    LATE = "late"
    """The answer waits for `bring`."""
    TWICE = "twice"
    """The question arrives two times."""


class DirectLine:
    """`mishaps` happen to the next questions in turn; `asked` is every question that was sent."""

    def __init__(self, ledger: Ledger, signer: Ed25519PrivateKey) -> None:
        self._ledger = ledger
        self._signer = signer
        self._late: list[Callable[[], None]] = []
        self.up = False
        self.mishaps: deque[Mishap] = deque()
        self.asked: list[Inquiry] = []
        self.alter: Callable[[OnlineAnswer], OnlineAnswer] = lambda answer: answer

    @property
    def reachable(self) -> bool:
        return self.up

    def ask_grant(self, inquiry: Inquiry) -> Future[OnlineAnswer]:
        return self._ask(inquiry, self._ledger.grant)

    def ask_note(self, inquiry: Inquiry) -> Future[OnlineAnswer]:
        return self._ask(inquiry, self._ledger.note)

    def bring(self) -> None:
        """Late answers arrive now."""
        late, self._late = self._late, []
        for deliver in late:
            deliver()

    def _ask(self, inquiry: Inquiry, ask: Callable[[str, bytes, bytes], str]) -> Future[OnlineAnswer]:
        self.asked.append(inquiry)
        future: Future[OnlineAnswer] = Future()
        mishap = self.mishaps.popleft() if self.mishaps else None
        if mishap is Mishap.LOST_QUESTION or not self.up:
            future.set_exception(LedgerUnreachable("the line broke"))
            return future
        body = inquiry.to_body()
        try:
            answer = ask(inquiry.gateway_id, body, sign_batch(body, self._signer))
            if mishap is Mishap.TWICE:
                answer = ask(inquiry.gateway_id, body, sign_batch(body, self._signer))
            found = self.alter(OnlineAnswer.from_json(answer))
        except PosGatewayError as error:
            future.set_exception(error)
            return future
        if mishap is Mishap.LOST_ANSWER:
            future.set_exception(LedgerUnreachable("the line broke"))
        elif mishap is Mishap.LATE:
            self._late.append(lambda: future.set_result(found))
        else:
            future.set_result(found)
        return future
