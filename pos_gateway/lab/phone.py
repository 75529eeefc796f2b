"""A phone: its card is a virtual one, and its wallet speaks to the issuer by itself.

The wallet keeps the note fresh, gives unused allowance back, and pays in an app, where the merchant's gateway
reaches the card over the network instead of a reader. The ledger knows it by its card's cryptogram alone.
"""

from __future__ import annotations

import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from http import HTTPStatus
from typing import Final, Protocol
from uuid import UUID, uuid4

from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.application import (
    AID,
    DIGEST_BYTES,
    ISSUER_CATEGORY,
    ISSUER_MERCHANT,
    ISSUER_TERMINAL,
    TRANSACTION_TYPE_INQUIRY,
    TRANSACTION_TYPE_RETURN,
    Sale,
)
from pos_gateway.emv.dialogue import converse, read_card, request_cryptogram, write_note
from pos_gateway.emv.transcript import Transcript
from pos_gateway.errors import (
    AuthenticationFailed,
    Conflict,
    InvalidInput,
    InvalidMessage,
    LedgerUnreachable,
)
from pos_gateway.gateway.fetcher import authority_context
from pos_gateway.gateway.till import Approved, Outcome, Till
from pos_gateway.inquiry import OnlineAnswer, OwnLimit, wallet_body
from pos_gateway.lab.field import DirectChannel
from pos_gateway.lab.virtual_card import VirtualCard

_TIMEOUT_S: Final = 10.0
_INQUIRY_MINOR: Final = 1
"""A card refuses to speak of no money at all; an ARQC moves none."""


class WalletLine(Protocol):
    """The issuer's wallet routes: a ledger in this process, or one across the network."""

    def wallet_challenge(self) -> str: ...

    def wallet_note(self, body: bytes) -> str: ...

    def wallet_return(self, body: bytes) -> str: ...


class WalletClient:
    """The wallet routes of a ledger across the network. `authority`: its certificate, DER, as enrolment
    codes pin it; an app would ship with it.

    Raises, at every call:
        LedgerUnreachable: no line, or not that ledger.
        AuthenticationFailed: the ledger does not believe the card.
        InvalidMessage: it cannot read what was sent.
    """

    def __init__(self, url: str, authority: bytes) -> None:
        self._url = url.rstrip("/")
        self._context = authority_context(authority)

    def wallet_challenge(self) -> str:
        return str(json.loads(self._post("challenges", b"{}"))["challenge"])

    def wallet_note(self, body: bytes) -> str:
        return self._post("notes", body)

    def wallet_return(self, body: bytes) -> str:
        return self._post("returns", body)

    def _post(self, what: str, body: bytes) -> str:
        request = urllib.request.Request(  # noqa: S310 - always https
            f"{self._url}/v1/wallet/{what}", data=body, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=self._context) as answer:  # noqa: S310
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                told = json.loads(error.read())["error"]["reason"]
            if error.code == HTTPStatus.UNAUTHORIZED:
                raise AuthenticationFailed(told, step="ledger") from None
            raise InvalidMessage(f"the ledger refused: {told}") from None
        except OSError as error:
            raise LedgerUnreachable(f"no line to the ledger ({type(error).__name__})") from None


@dataclass(slots=True)
class Phone:
    """`limit` is what its last note lets it do."""

    card: VirtualCard
    line: WalletLine
    currency_numeric: int
    country_numeric: int
    clock: Callable[[], datetime]
    limit: OwnLimit | None = None

    def refresh(self) -> OnlineAnswer:
        """Ask for a note, and hand it to the card."""
        sale = self._addressed(TRANSACTION_TYPE_INQUIRY, _INQUIRY_MINOR)
        answer = OnlineAnswer.from_json(self.line.wallet_note(self._ask(sale, CryptogramKind.ARQC)))
        if answer.note is not None:
            # In the session that has asked: the card takes a note only from one.
            converse(write_note(answer.note.data), self.card.process)
            self.limit = answer.limit
        return answer

    @property
    def allowance_minor(self) -> int:
        """How much its note still lets it pay."""
        return max(0, self.limit.ceiling - self.card.state.counter) if self.limit else 0

    def give_back(self, amount_minor: int) -> OnlineAnswer:
        """Return unused allowance: the card claims it, with the issuer for its merchant.

        Raises:
            InvalidInput: it has no note that covers so much.
            Conflict: the card does not give a TC for it.
        """
        if self.limit is None or not 0 < amount_minor <= self.allowance_minor:
            raise InvalidInput(f"{self.allowance_minor} minor units are left", where="amount")
        sale = replace(
            self._addressed(TRANSACTION_TYPE_RETURN, amount_minor),
            ceiling=self.limit.ceiling,
            limit_digest=self.limit.digest,
        )
        return OnlineAnswer.from_json(self.line.wallet_return(self._ask(sale, CryptogramKind.TC)))

    def pay_in_app(self, till: Till, amount_minor: int, payment_id: UUID | None = None) -> Outcome:
        """Pay a merchant whose gateway reaches the card over the network: the same tap, the same line."""
        payment = till.new_payment(payment_id or uuid4(), amount_minor, secrets.randbelow(100_000_000))
        channel = DirectChannel(self.card)
        outcome = till.tap(payment, channel)
        till.end(payment)
        if isinstance(outcome, Approved):
            till.finish(outcome, channel)
        return outcome

    def _addressed(self, transaction_type: int, amount_minor: int) -> Sale:
        """To the issuer, over a fresh challenge of its."""
        return Sale(
            amount_minor=amount_minor,
            currency_numeric=self.currency_numeric,
            country_numeric=self.country_numeric,
            at=self.clock(),
            unpredictable_number=secrets.token_bytes(4),
            sequence_counter=0,
            terminal_id=ISSUER_TERMINAL,
            merchant_id=ISSUER_MERCHANT,
            merchant_category=ISSUER_CATEGORY,
            sale_id=bytes.fromhex(self.line.wallet_challenge()),
            ceiling=0,
            limit_digest=self.limit.digest if self.limit else bytes(DIGEST_BYTES),
            transaction_type=transaction_type,
        )

    def _ask(self, sale: Sale, kind: CryptogramKind) -> bytes:
        self.card.power_up()
        read = converse(read_card(sale.elements(), [AID]), self.card.process)
        answer = converse(request_cryptogram(read, sale.elements(), kind), self.card.process)
        if answer.kind is not kind:
            raise Conflict(f"the card gave no {kind.name} but {answer.kind.name}")
        return wallet_body(Transcript.of(read, answer).to_bytes())
