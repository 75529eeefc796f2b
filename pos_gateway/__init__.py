"""POS Gateway: an offline point-of-sale payment gateway and the issuer's ledger behind it."""

__version__ = "0.1.0"
