"""A sale, a CA key and a whole dialogue with a card of the second issuer."""

from __future__ import annotations

from datetime import date, datetime

from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.application import AID, Sale
from pos_gateway.emv.authentication import CaPublicKey
from pos_gateway.emv.dialogue import CardRead, CryptogramAnswer, converse, read_card, request_cryptogram
from tests.emv.second_issuer import RID, SecondCard, SecondIssuer

TODAY = date(2026, 11, 24)
SALE = Sale(
    amount_minor=1930,
    currency_numeric=156,
    country_numeric=156,
    at=datetime(2026, 11, 24, 12, 30, 5),  # noqa: DTZ001 - a terminal's local time
    unpredictable_number=b"\x11\x22\x33\x44",
    sequence_counter=7,
    terminal_id="TERM0001",
    merchant_id="MERCHANT",
    merchant_category="5411",
    sale_id=bytes(range(16)),
    ceiling=10_000,
    limit_digest=bytes(range(16, 32)),
)


def ca_key(issuer: SecondIssuer) -> CaPublicKey:
    return CaPublicKey(RID, issuer.ca_index, issuer.ca.n, issuer.ca.e, date(2031, 12, 31))


def read(card: SecondCard) -> CardRead:
    return converse(read_card(SALE.elements(), [AID]), card.transceive)


def ask(card: SecondCard, known: CardRead, kind: CryptogramKind = CryptogramKind.TC) -> CryptogramAnswer:
    return converse(request_cryptogram(known, SALE.elements(), kind), card.transceive)
