"""Where private keys may lie: whatever can sign and tell its public half will do.

Everything here takes keys as the abstract classes of `cryptography`, which a key from a file is already.
A hardware token (PKCS #11, a secure element, a key service) has two things to offer, `Signer`; `p256_key`
and `ed25519_key` make such a key of them. Such a key never leaves the token: asked for its private half
it raises.
"""

from __future__ import annotations

from typing import Any, Generic, NoReturn, Protocol, Self, TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_Public = TypeVar("_Public", covariant=True)


class Signer(Protocol, Generic[_Public]):
    """A private key that stays where it is."""

    @property
    def public_key(self) -> _Public: ...

    def sign(self, data: bytes) -> bytes:
        """P-256: ECDSA over SHA-256 of the data, DER. Ed25519: over the data, 64 bytes."""
        ...


def p256_key(signer: Signer[ec.EllipticCurvePublicKey]) -> ec.EllipticCurvePrivateKey:
    """A P-256 key that signs what `x509` builds: certificates and requests for them."""
    return _P256Key(signer)


def ed25519_key(signer: Signer[Ed25519PublicKey]) -> Ed25519PrivateKey:
    """An Ed25519 key that signs journal records, batches and requests."""
    return _Ed25519Key(signer)


class _Kept:
    """What a key that stays in its token answers when asked for more than a signature."""

    def private_bytes(self, *_: Any, **__: Any) -> NoReturn:
        raise UnsupportedAlgorithm("the private key stays where it is")

    private_numbers = private_bytes_raw = exchange = private_bytes

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _memo: object) -> Self:
        return self


class _P256Key(_Kept, ec.EllipticCurvePrivateKey):
    curve = ec.SECP256R1()
    key_size = 256

    def __init__(self, signer: Signer[ec.EllipticCurvePublicKey]) -> None:
        self._signer = signer

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._signer.public_key

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        if not isinstance(signature_algorithm.algorithm, hashes.SHA256):
            raise UnsupportedAlgorithm("signs over SHA-256 only")
        return self._signer.sign(bytes(data))


class _Ed25519Key(_Kept, Ed25519PrivateKey):
    def __init__(self, signer: Signer[Ed25519PublicKey]) -> None:
        self._signer = signer

    def public_key(self) -> Ed25519PublicKey:
        return self._signer.public_key

    def sign(self, data: Any) -> bytes:
        return self._signer.sign(bytes(data))
