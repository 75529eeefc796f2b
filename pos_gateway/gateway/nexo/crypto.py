"""The protocol's own encryption, in the dialect existing POS software speaks.

    key material = PBKDF2-HMAC-SHA1(passphrase, "AdyenNexoV1Salt", 4000)
                 = HMAC key (32) ‖ cipher key (32) ‖ IV (16)
    blob         = AES-256-CBC(whole inner message, IV xor nonce), PKCS #7
    Hmac         = HMAC-SHA256(whole inner message)

The MAC covers the plaintext, and the outer header is authenticated by nothing: it must equal the inner
one. Whatever does not hold (padding, MAC, key name, a nonce seen before, another header) is told alike.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from pos_gateway.errors import AuthenticationFailed, InvalidInput, InvalidMessage
from pos_gateway.gateway.nexo import wire

CRYPTO_VERSION: Final = 1
NONCE_BYTES: Final = 16

_SALT: Final = b"AdyenNexoV1Salt"
_ITERATIONS: Final = 4000
_BLOCK_BYTES: Final = 16
_MIN_PASSPHRASE_CHARACTERS: Final = 8


@dataclass(frozen=True, slots=True)
class NexoKey:
    """The secret that POS and gateway share. `identifier` and `version` name it in every message."""

    identifier: str
    version: int
    hmac_key: bytes = field(repr=False)
    cipher_key: bytes = field(repr=False)
    iv: bytes = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.identifier}/{self.version}"

    @classmethod
    def derive(cls, passphrase: str, identifier: str, version: int) -> NexoKey:
        """
        Raises:
            InvalidInput: the passphrase is too short, or not Latin-1, which is how clients encode it.
        """
        if len(passphrase) < _MIN_PASSPHRASE_CHARACTERS:
            raise InvalidInput(
                f"at least {_MIN_PASSPHRASE_CHARACTERS} characters", where="passphrase", advice="make it long"
            )
        try:
            secret = passphrase.encode("latin-1")
        except UnicodeEncodeError:
            raise InvalidInput("only Latin-1 characters", where="passphrase") from None
        material = hashlib.pbkdf2_hmac("sha1", secret, _SALT, _ITERATIONS, 80)
        return cls(identifier, version, material[:32], material[32:64], material[64:])

    def seal(
        self,
        envelope: str,
        header: Mapping[str, Any],
        body: bytes,
        *,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> dict[str, Any]:
        """Encrypt `{envelope: body}` as a whole; `header` stands in `body` too, and is told outside."""
        plain = wire.enclose(envelope, body)
        nonce = random_bytes(NONCE_BYTES)
        encryptor = self._cipher(nonce).encryptor()
        blob = encryptor.update(_pad(plain)) + encryptor.finalize()
        return {
            envelope: {
                "MessageHeader": dict(header),
                "NexoBlob": base64.b64encode(blob).decode(),
                "SecurityTrailer": {
                    "AdyenCryptoVersion": CRYPTO_VERSION,
                    "Hmac": base64.b64encode(self._mac(plain)).decode(),
                    "KeyIdentifier": self.identifier,
                    "KeyVersion": self.version,
                    "Nonce": base64.b64encode(nonce).decode(),
                },
            }
        }

    def open(
        self, envelope: str, sealed: Mapping[str, Any], is_new_nonce: Callable[[bytes], bool]
    ) -> dict[str, Any]:
        """What stands inside `{envelope: …}`, authenticated. `is_new_nonce` is asked once the MAC is right.

        Raises:
            AuthenticationFailed: step `message`; the one answer to all that does not hold.
        """
        trailer = sealed.get("SecurityTrailer")
        if not isinstance(trailer, dict):
            raise _refused()
        blob, told, nonce = (
            _bytes(sealed.get("NexoBlob")),
            _bytes(trailer.get("Hmac")),
            _bytes(trailer.get("Nonce")),
        )
        named = (trailer.get("KeyIdentifier"), trailer.get("KeyVersion"), trailer.get("AdyenCryptoVersion"))
        if len(nonce) != NONCE_BYTES or not blob or len(blob) % _BLOCK_BYTES:
            raise _refused()
        decryptor = self._cipher(nonce).decryptor()
        padded = decryptor.update(blob) + decryptor.finalize()
        # Bad padding is not left early: the MAC is computed over something in every case.
        plain, well_padded = _unpad(padded)
        authentic = hmac.compare_digest(self._mac(plain), told)
        if not (authentic and well_padded and named == (self.identifier, self.version, CRYPTO_VERSION)):
            raise _refused()
        if not is_new_nonce(nonce):
            raise _refused()
        try:
            inner = wire.parse(plain).get(envelope)
        except InvalidMessage:
            raise _refused() from None
        if not isinstance(inner, dict) or inner.get("MessageHeader") != sealed.get("MessageHeader"):
            raise _refused()
        return inner

    def _cipher(self, nonce: bytes) -> Cipher[modes.CBC]:
        iv = bytes(a ^ b for a, b in zip(self.iv, nonce, strict=True))
        return Cipher(algorithms.AES256(self.cipher_key), modes.CBC(iv))

    def _mac(self, plain: bytes) -> bytes:
        return hmac.digest(self.hmac_key, plain, "sha256")


def is_sealed(message: Mapping[str, Any]) -> bool:
    return "NexoBlob" in message or "SecurityTrailer" in message


def _refused() -> AuthenticationFailed:
    return AuthenticationFailed("not authentic", step="message")


def _bytes(text: object) -> bytes:
    if not isinstance(text, str):
        return b""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _pad(plain: bytes) -> bytes:
    length = _BLOCK_BYTES - len(plain) % _BLOCK_BYTES
    return plain + bytes([length]) * length


def _unpad(padded: bytes) -> tuple[bytes, bool]:
    length = padded[-1]
    if 1 <= length <= _BLOCK_BYTES and padded[-length:] == bytes([length]) * length:
        return padded[:-length], True
    return padded, False
