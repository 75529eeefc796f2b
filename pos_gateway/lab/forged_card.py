"""Forged cards: the data of a genuine card with keys that are not its issuer's."""

from __future__ import annotations

from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric import rsa

from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.lab.virtual_card import IccKey, static_data
from pos_gateway.ledger.certificates import certify_icc, certify_issuer
from pos_gateway.ledger.issuing import PAN_PREFIX
from pos_gateway.ledger.keys import CA_KEY_BITS, RSA_EXPONENT, FileRsaSigner

_SERIAL = bytes.fromhex("F0F0F0")


def with_another_icc_key(genuine: Personalisation) -> Personalisation:
    """A copy made from what a reader can read: the certificates are genuine, the key is not theirs, so
    the signature of its cryptogram is wrong."""
    key = rsa.generate_private_key(genuine.icc_exponent, 8 * IccKey.of(genuine).size).private_numbers()
    return replace(genuine, icc_prime_p=key.p, icc_prime_q=key.q)


def with_another_chain(genuine: Personalisation) -> Personalisation:
    """A card consistent in itself: its chain ends in a CA that nobody trusts, under the genuine CA's
    index."""
    forged = with_another_icc_key(genuine)
    ca = FileRsaSigner(rsa.generate_private_key(RSA_EXPONENT, CA_KEY_BITS))
    issuer_bits = 8 * len(genuine.icc_certificate)
    issuer = FileRsaSigner(rsa.generate_private_key(genuine.issuer_exponent, issuer_bits))
    issuer_key = certify_issuer(
        ca,
        issuer_identifier=PAN_PREFIX,
        expires=genuine.expires,
        serial=_SERIAL,
        modulus=issuer.modulus,
        exponent=issuer.exponent,
    )
    key = IccKey.of(forged)
    icc_key = certify_icc(
        issuer,
        pan=genuine.pan,
        expires=genuine.expires,
        serial=_SERIAL,
        modulus=key.modulus,
        exponent=key.exponent,
        static_data=static_data(forged),
    )
    return replace(
        forged,
        issuer_certificate=issuer_key.certificate,
        issuer_remainder=issuer_key.remainder,
        icc_certificate=icc_key.certificate,
        icc_remainder=icc_key.remainder,
    )
