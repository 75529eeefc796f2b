"""The issuer's side: keys and cards, accounts and limits, presentments in double entry, the HTTP API."""

from pos_gateway.ledger.ledger import Ledger

__all__ = ["Ledger"]
