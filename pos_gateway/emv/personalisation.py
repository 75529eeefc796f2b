"""What an issuer writes into one card. Secret from the first byte to the last: files are mode 0600."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from datetime import date
from typing import Any

from pos_gateway.errors import InvalidMessage


@dataclass(frozen=True, slots=True)
class Personalisation:
    """One card's data and keys. Byte strings are hex in JSON, dates ISO 8601.

    `icc_prime_p`/`icc_prime_q`: the ICC private key, with `icc_exponent` as its public exponent.
    `mk_ac`/`mk_enc`: the card's own master keys (EMV 4.3 Book 2, Annex A1.4), for its application
    cryptograms and for enciphering its counter in an ARQC. `counter` is where the counter starts.
    Caps are the card's own refusals, in minor units of `currency_numeric`.
    """

    pan: str = field(repr=False)
    psn: int
    effective: date
    expires: date
    currency_numeric: int
    country_numeric: int
    ca_index: int
    issuer_certificate: bytes
    issuer_remainder: bytes
    issuer_exponent: int
    icc_certificate: bytes
    icc_remainder: bytes
    icc_exponent: int
    icc_prime_p: int = field(repr=False)
    icc_prime_q: int = field(repr=False)
    key_index: int
    mk_ac: bytes = field(repr=False)
    mk_enc: bytes = field(repr=False)
    counter: int = field(repr=False)
    per_tap_cap_minor: int
    cumulative_cap_minor: int
    tc_rate_limit: int
    """Most TCs the card gives between two power-ups' sessions of one day."""
    application_usage: bytes = bytes.fromhex("FF00")
    holder_verified_on_device: bool = False

    def to_json(self) -> str:
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bytes):
                value = value.hex().upper()
            elif isinstance(value, date):
                value = value.isoformat()
            elif f.name.startswith("icc_prime"):
                value = f"{value:X}"
            out[f.name] = value
        return json.dumps(out, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Personalisation:
        """
        Raises:
            InvalidMessage: not JSON, or a field missing, unknown or of the wrong kind.
        """
        try:
            raw = json.loads(text)
            values: dict[str, Any] = {}
            for f in fields(cls):
                if f.name not in raw:
                    continue
                value = raw.pop(f.name)
                if f.type == "bytes":
                    value = bytes.fromhex(value)
                elif f.type == "date":
                    value = date.fromisoformat(value)
                elif f.name.startswith("icc_prime"):
                    value = int(value, 16)
                values[f.name] = value
            if raw:
                raise ValueError(f"unknown field {sorted(raw)[0]!r}")
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            # The text of the underlying error may quote a key: only its kind is passed on.
            raise InvalidMessage(
                f"not a card personalisation ({type(error).__name__})", where="personalisation file"
            ) from None
