"""What the card and its issuer compute with their shared keys: the application cryptogram and the
enciphered counter. Terminals have none of these keys.

Keys: master keys by option A (EMV 4.3 Book 2, Annex A1.4.1), session keys by the common method
(Annex A1.3.1), the cryptogram a MAC by ISO/IEC 9797-1 algorithm 3 with padding method 2 (Annex A1.2.1).
"""

from __future__ import annotations

import warnings
from typing import Final

from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import Cipher, modes
from pyemv import ac, kd

from pos_gateway.emv.application import counter_bytes
from pos_gateway.errors import AuthenticationFailed

# pyemv takes TripleDES, at every call, from where cryptography is about to drop it, and with short keys,
# which cryptography is about to refuse. These warnings and no others; see docs/decisions.
warnings.filterwarnings(
    "ignore", message=r"TripleDES has been moved|(Single|Two)-key TripleDES", module=r"pyemv\."
)

KEY_BYTES: Final = 16
CRYPTOGRAM_BYTES: Final = 8


def derive_card_key(issuer_mk: bytes, pan: str, psn: int) -> bytes:
    """A card's own 16-byte master key, from the issuer's (EMV 4.3 Book 2, Annex A1.4.1)."""
    return bytes(kd.derive_icc_mk_a(issuer_mk, pan=pan, psn=f"{psn:02d}"))


def application_cryptogram(mk_ac: bytes, atc: int, data: bytes) -> bytes:
    """The 8-byte TC, ARQC or AAC over `data` = CDOL1 values ‖ AIP ‖ ATC ‖ IAD."""
    return bytes(ac.generate_ac(_session_key(mk_ac, atc), data, ac.PaddingType.EMV))


def encipher_counter(mk_enc: bytes, atc: int, counter: int) -> bytes:
    """The counter as an ARQC carries it: 8 bytes that only the issuer can read."""
    encryptor = _cipher(mk_enc, atc).encryptor()
    return encryptor.update(counter_bytes(counter) + b"\0\0") + encryptor.finalize()


def decipher_counter(mk_enc: bytes, atc: int, counter_field: bytes) -> int:
    """
    Raises:
        AuthenticationFailed: step `enciphered counter`: not made with this key for this ATC.
    """
    if len(counter_field) != 8:
        raise AuthenticationFailed(f"{len(counter_field)} bytes, expected 8", step="enciphered counter")
    decryptor = _cipher(mk_enc, atc).decryptor()
    clear = decryptor.update(counter_field) + decryptor.finalize()
    if clear[6:] != b"\0\0":
        raise AuthenticationFailed("not made with this card's key", step="enciphered counter")
    return int.from_bytes(clear[:6], "big")


def _session_key(master_key: bytes, atc: int) -> bytes:
    return bytes(kd.derive_common_sk(master_key, atc.to_bytes(2, "big") + bytes(6)))


def _cipher(mk_enc: bytes, atc: int) -> Cipher[modes.ECB]:
    # One block that never repeats under one session key: ECB is what the data sheet says.
    key = _session_key(mk_enc, atc)
    return Cipher(TripleDES(key + key[:8]), modes.ECB())  # noqa: S305
