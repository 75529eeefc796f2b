"""Cards and phones on their counter lines, without their cryptography: what a card answers, and what its
copies answer.

An honest card moves its counter up by what it pays and never back, within the ceiling it is given
(TC); above it says no and stays where it is (ARQC); what it does not do at all it refuses (AAC).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.application import (
    MAX_COUNTER,
    Iad,
    clear_counter_field,
    counter_bytes,
    cvr,
    previous_digest,
)

_CVR = {is_phone: cvr(holder_verified_on_device=is_phone) for is_phone in (True, False)}


@dataclass(frozen=True, slots=True)
class Answer:
    """To GENERATE AC. `counter` is in clear to the issuer; to the shop only in a TC's `iad`."""

    kind: CryptogramKind
    counter_before: int
    counter: int
    atc: int
    cryptogram: bytes
    iad: Iad


@dataclass(slots=True)
class Card:
    """A card, or the application in a phone. `note` is what it carries for offline shops."""

    token_key: bytes
    account: int
    is_phone: bool
    counter: int
    per_tap_cap_minor: int
    atc: int = 0
    note: Any = None
    previous_digest: bytes = bytes(8)

    def generate_ac(self, amount_minor: int, ceiling: int, signed: bytes) -> Answer:
        """`signed`: the CDOL1 values; two cards never answer the same to different ones."""
        self.atc = (self.atc + 1) & 0xFFFF
        before = self.counter
        if not 0 < amount_minor <= self.per_tap_cap_minor or before + amount_minor > MAX_COUNTER:
            return self._answer(CryptogramKind.AAC, before, signed)
        if before + amount_minor > ceiling:
            return self._answer(CryptogramKind.ARQC, before, signed)
        self.counter = before + amount_minor
        answer = self._answer(CryptogramKind.TC, before, signed)
        self.previous_digest = previous_digest(signed)
        return answer

    def copied(self) -> Card:
        """A copy of all of it, as nobody should be able to make one."""
        return replace(self)

    def _answer(self, kind: CryptogramKind, before: int, signed: bytes) -> Answer:
        cryptogram = hashlib.sha256(
            b"AC%d/%d/" % (kind.value, self.atc) + self.token_key + signed + counter_bytes(self.counter)
        ).digest()[:8]
        iad = Iad(
            1,
            1,
            _CVR[self.is_phone],
            clear_counter_field(self.counter) if kind is CryptogramKind.TC else cryptogram,
            self.previous_digest,
        )
        return Answer(kind, before, self.counter, self.atc, cryptogram, iad)
