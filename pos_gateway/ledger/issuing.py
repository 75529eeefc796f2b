"""Issuing: the issuer's own certificate, a new token's number, and everything that one card is given."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from typing import Final

from cryptography.hazmat.primitives.asymmetric import rsa

from pos_gateway.emv import tlv
from pos_gateway.emv.application import CDOL1, CDOL2, RID
from pos_gateway.emv.authentication import CaPublicKey
from pos_gateway.emv.cryptogram import derive_card_key
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.ledger.certificates import (
    SignedKey,
    certify_icc,
    certify_issuer,
    end_of_month,
)
from pos_gateway.ledger.keys import KeyRing

PAN_PREFIX: Final = "91560001"
"""MII 9 with country 156 (ISO/IEC 7812-1: national assignment), then our issuer number. No scheme's."""

CA_KEY_INDEX: Final = 1

_PAN_ACCOUNT_DIGITS: Final = 7
_AIP_CDA: Final = 0x01
_AIP_ON_DEVICE_CVM: Final = 0x02
_SDA_TAG_LIST: Final = b"\x82"
_START_COUNTER_BITS: Final = 44
_SERIAL_BYTES: Final = 3


@dataclass(frozen=True, slots=True)
class CardProfile:
    """What an issuer decides for one card. Amounts in minor units."""

    pan: str = field(repr=False)
    psn: int
    effective: date
    expires: date
    currency_numeric: int
    country_numeric: int
    per_tap_cap_minor: int
    cumulative_cap_minor: int
    tc_rate_limit: int
    start_counter: int = field(repr=False)
    holder_verified_on_device: bool = False
    application_usage: bytes = bytes.fromhex("FF00")


def new_pan(random_below: Callable[[int], int] = secrets.randbelow) -> str:
    """A token number of 16 digits under our prefix, with its Luhn digit."""
    body = PAN_PREFIX + str(random_below(10**_PAN_ACCOUNT_DIGITS)).zfill(_PAN_ACCOUNT_DIGITS)
    return body + luhn_digit(body)


def new_start_counter(random_below: Callable[[int], int] = secrets.randbelow) -> int:
    """Where a card's counter starts: random, so that it tells no lifetime spend, and far from both ends."""
    return (1 << _START_COUNTER_BITS) + random_below(1 << _START_COUNTER_BITS)


def new_serial() -> bytes:
    """A certificate serial number, 3 bytes."""
    return secrets.token_bytes(_SERIAL_BYTES)


def luhn_digit(body: str) -> str:
    """The check digit that follows `body` (ISO/IEC 7812-1, Annex B)."""
    total = 0
    for place, digit in enumerate(reversed(body)):
        doubled = int(digit) * (2 if place % 2 == 0 else 1)
        total += doubled - 9 if doubled > 9 else doubled
    return str(-total % 10)


def ca_public_key(keys: KeyRing, expires: date) -> CaPublicKey:
    """The CAPK that gateways are given at enrolment."""
    return CaPublicKey(
        rid=RID,
        index=CA_KEY_INDEX,
        modulus=keys.ca.modulus,
        exponent=keys.ca.exponent,
        expires=expires,
    )


def certify_own_key(keys: KeyRing, *, expires: date, serial: bytes) -> SignedKey:
    """The issuer's key under our own CA."""
    return certify_issuer(
        keys.ca,
        issuer_identifier=PAN_PREFIX,
        expires=expires,
        serial=serial,
        modulus=keys.issuer.modulus,
        exponent=keys.issuer.exponent,
    )


def personalise(
    profile: CardProfile,
    *,
    icc_key: rsa.RSAPrivateKey,
    serial: bytes,
    issuer_certificate: SignedKey,
    keys: KeyRing,
) -> Personalisation:
    """Everything that is written into one card, its certificate and its own keys among it."""
    numbers = icc_key.private_numbers()
    modulus, exponent = numbers.public_numbers.n, numbers.public_numbers.e
    expires = end_of_month(profile.expires)
    certified = certify_icc(
        keys.issuer,
        pan=profile.pan,
        expires=expires,
        serial=serial,
        modulus=modulus,
        exponent=exponent,
        static_data=static_data(profile, expires),
    )
    return Personalisation(
        pan=profile.pan,
        psn=profile.psn,
        effective=profile.effective,
        expires=expires,
        currency_numeric=profile.currency_numeric,
        country_numeric=profile.country_numeric,
        ca_index=CA_KEY_INDEX,
        issuer_certificate=issuer_certificate.certificate,
        issuer_remainder=issuer_certificate.remainder,
        issuer_exponent=keys.issuer.exponent,
        icc_certificate=certified.certificate,
        icc_remainder=certified.remainder,
        icc_exponent=exponent,
        icc_prime_p=numbers.p,
        icc_prime_q=numbers.q,
        key_index=keys.master.index,
        mk_ac=derive_card_key(keys.master.ac, profile.pan, profile.psn),
        mk_enc=derive_card_key(keys.master.enc, profile.pan, profile.psn),
        counter=profile.start_counter,
        per_tap_cap_minor=profile.per_tap_cap_minor,
        cumulative_cap_minor=profile.cumulative_cap_minor,
        tc_rate_limit=profile.tc_rate_limit,
        application_usage=profile.application_usage,
        holder_verified_on_device=profile.holder_verified_on_device,
    )


def static_data(profile: CardProfile, expires: date) -> bytes:
    """The static data to be authenticated (EMV 4.3 Book 3 §10.3): the content of the one record that
    counts, in the card's order, then the AIP that 9F4A names."""
    record = (
        (0x5A, bytes.fromhex(profile.pan)),
        (0x5F34, bytes.fromhex(f"{profile.psn:02d}")),
        (0x5F24, bytes.fromhex(expires.strftime("%y%m%d"))),
        (0x5F25, bytes.fromhex(profile.effective.strftime("%y%m%d"))),
        (0x9F07, profile.application_usage),
        (0x9F42, bytes.fromhex(f"{profile.currency_numeric:04d}")),
        (0x8C, CDOL1),
        (0x8D, CDOL2),
        (0x9F4A, _SDA_TAG_LIST),
    )
    aip = _AIP_CDA | (_AIP_ON_DEVICE_CVM if profile.holder_verified_on_device else 0)
    return b"".join(tlv.encode(tag, value) for tag, value in record) + bytes([aip, 0])
