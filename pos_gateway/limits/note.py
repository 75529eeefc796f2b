"""A note as it lies on a card: a single limit that only gateways of the issuer can read.

    nonce (12) ‖ ChaCha20-Poly1305 of the 150 bytes of the single limit, for associated data the token key

under a key that follows from the epoch's token key secret (HKDF-SHA-256). It hides the ceiling from anybody
else's reader and ties the note to its card. It proves nothing: every gateway has this key. What counts is the
online key's signature within.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pos_gateway.errors import AuthenticationFailed, InvalidInput
from pos_gateway.limits.single import SINGLE_BYTES

NONCE_BYTES: Final = 12
NOTE_BYTES: Final = NONCE_BYTES + SINGLE_BYTES + 16

_INFO: Final = b"pos-gateway note encryption 1"


def seal_note(single: bytes, *, token_key_secret: bytes, token_key: bytes, nonce: bytes) -> bytes:
    """
    Raises:
        InvalidInput: not 150 bytes, or no nonce of 12.
    """
    if len(single) != SINGLE_BYTES or len(nonce) != NONCE_BYTES:
        raise InvalidInput("a single limit and a nonce of 12 bytes are needed", where="note")
    return nonce + _cipher(token_key_secret).encrypt(nonce, single, token_key)


def open_note(note: bytes, *, token_key_secret: bytes, token_key: bytes) -> bytes:
    """The 150 bytes of the single limit, still to be verified (`single.read_single`).

    Raises:
        AuthenticationFailed: step `note encryption`: not made for this token by this issuer.
    """
    try:
        if len(note) != NOTE_BYTES:
            raise InvalidTag
        return _cipher(token_key_secret).decrypt(note[:NONCE_BYTES], note[NONCE_BYTES:], token_key)
    except InvalidTag:
        raise AuthenticationFailed("not made for this token by this issuer", step="note encryption") from None


@lru_cache(maxsize=4)
def _cipher(token_key_secret: bytes) -> ChaCha20Poly1305:
    key = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=_INFO).derive(token_key_secret)
    return ChaCha20Poly1305(key)
