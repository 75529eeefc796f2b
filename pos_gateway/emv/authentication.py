"""Offline data authentication by CDA: CAPK → issuer certificate → ICC certificate → static data → SDAD.

EMV 4.3 Book 2 §5 (certificates), §6 (dynamic signatures), Annex A2.1 (the recovery function). Everything
here is pure; what does not verify raises `AuthenticationFailed` with one of the step names below, which
are stable.
"""

from __future__ import annotations

import calendar
from collections.abc import Collection, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import date
from hashlib import sha1
from typing import Final, NamedTuple

from pos_gateway.emv import tlv
from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.application import Iad, bound_by_second
from pos_gateway.emv.dialogue import CardRead, CryptogramAnswer, pan_digits
from pos_gateway.errors import AuthenticationFailed

STEP_CA_KEY: Final = "CA key"
STEP_ISSUER: Final = "issuer certificate"
STEP_ICC: Final = "ICC certificate"
STEP_STATIC_DATA: Final = "static data"
STEP_EXPIRY: Final = "expiry"
STEP_SDAD: Final = "SDAD"
STEP_CID: Final = "CID"
STEP_TRANSACTION_DATA: Final = "transaction data hash"

MAX_KEY_BYTES: Final = 248
EXPONENTS: Final = (3, 65537)

_HEADER, _TRAILER = 0x6A, 0xBC
_ISSUER_CERTIFICATE, _ICC_CERTIFICATE, _SIGNED_DYNAMIC_DATA = 0x02, 0x04, 0x05
_SHA1_BYTES: Final = 20
_HASH_AT: Final = -_SHA1_BYTES - 1  # a hash and the trailer end every recovered block
_ISSUER_OVERHEAD: Final = 36
_ICC_OVERHEAD: Final = 42
_SDAD_OVERHEAD: Final = 25

RevokedCertificate = tuple[bytes, bytes]
"""Issuer identifier (4 bytes) and serial number (3), as they stand in an issuer certificate."""


@dataclass(frozen=True, slots=True)
class CaPublicKey:
    """A certification authority public key, CAPK (EMV 4.3 Book 2 §5.2)."""

    rid: bytes
    index: int
    modulus: int
    exponent: int
    expires: date | None = None

    @property
    def size(self) -> int:
        """The length of the modulus in bytes."""
        return (self.modulus.bit_length() + 7) // 8


class PublicKey(NamedTuple):
    """An RSA public key; `size` is the length of its modulus in bytes."""

    modulus: int
    exponent: int
    size: int


class IssuerCertificate(NamedTuple):
    """What a verified issuer certificate says. `identifier`: the PAN's 3 to 8 leading digits, padded
    with F to 4 bytes."""

    key: PublicKey
    identifier: bytes
    expires: date
    serial: bytes


KnownIssuers = MutableMapping[tuple[CaPublicKey, bytes, bytes, bytes], IssuerCertificate]
"""Verified issuer certificates by CA key, tags 90, 92 and 9F32."""


class IccCertificate(NamedTuple):
    """A recovered ICC certificate. Its hash also covers the static data: see `check_static_data`."""

    key: PublicKey
    expires: date
    hashed: bytes
    hash: bytes


class DynamicData(NamedTuple):
    """The ICC dynamic data of a CDA signature (EMV 4.3 Book 2 §6.6.1, Table 18)."""

    icc_dynamic_number: bytes
    cid: int
    ac: bytes
    transaction_data_hash: bytes


@dataclass(frozen=True, slots=True)
class AuthenticatedCard:
    """A card whose certificates and static data hold; its `card` is now known to be the issuer's."""

    card: CardRead = field(repr=False)
    icc_key: PublicKey = field(repr=False)
    issuer_identifier: bytes

    @property
    def pan(self) -> str:
        return self.card.pan

    @property
    def last4(self) -> str:
        return self.card.last4

    @property
    def psn(self) -> int:
        return self.card.psn

    @property
    def effective(self) -> date:
        return self.card.effective

    @property
    def expires(self) -> date:
        return self.card.expires

    @property
    def currency_numeric(self) -> int:
        return self.card.currency_numeric


@dataclass(frozen=True, slots=True)
class Cryptogram:
    """What the card answered. `authentic` is False for an AAC, which nobody signs: evidence of nothing.

    `bound`: the values by tag that an authentic cryptogram binds: those of CDOL1, and after a second
    GENERATE AC those of CDOL2 in their place.
    """

    kind: CryptogramKind
    authentic: bool
    atc: int
    ac: bytes
    iad: Iad = field(repr=False)
    bound: Mapping[int, bytes] = field(repr=False)


def authenticate_card(
    card: CardRead,
    ca_keys: Iterable[CaPublicKey],
    today: date,
    revoked: Collection[RevokedCertificate] = (),
    *,
    known_issuers: KnownIssuers | None = None,
) -> AuthenticatedCard:
    """Verify the certificates and the static data (EMV 4.3 Book 2 §6.3 to §6.4).

    `known_issuers`, if given, remembers verified issuer certificates from call to call: they are the
    same on all of an issuer's cards. Expiry and revocation are checked anew each time.

    Raises:
        AuthenticationFailed: steps `CA key`, `issuer certificate`, `ICC certificate`, `static data`,
            and `expiry` when everything else holds but the application or a certificate has expired.
    """
    elements = card.elements
    ca_key = find_ca_key(card.aid[:5], elements[0x8F], ca_keys)
    issuer = _issuer_certificate(ca_key, elements, known_issuers)
    check_issuer_identifier(issuer, card.pan)
    if (issuer.identifier, issuer.serial) in revoked:
        raise AuthenticationFailed("the certificate is revoked", step=STEP_ISSUER)
    icc = recover_icc_certificate(issuer.key, elements)
    check_static_data(icc, card.static_data)
    check_expiry(today, ca_key=ca_key, issuer=issuer, icc=icc, effective=card.effective, expires=card.expires)
    return AuthenticatedCard(card, icc.key, issuer.identifier)


def authenticate_cryptogram(card: AuthenticatedCard, answer: CryptogramAnswer) -> Cryptogram:
    """Verify the signature over a TC or ARQC and all it binds (EMV 4.3 Book 2 §6.6.2).

    Raises:
        AuthenticationFailed: steps `SDAD`, `CID`, `transaction data hash`.
        InvalidCardData: no readable IAD, or values that do not fit the card's CDOL1 or CDOL2.
    """
    elements = answer.elements
    bound = tlv.split_dol(card.card.cdol1, answer.cdol1_values, where="CDOL1 values")
    if answer.cdol2_values:
        second = tlv.split_dol(card.card.cdol2, answer.cdol2_values, where="CDOL2 values")
        bound = bound_by_second(bound, second)
    iad = Iad.from_bytes(elements.get(0x9F10, b""))
    atc = int.from_bytes(elements[0x9F36], "big")
    signature = elements.get(0x9F4B)
    if answer.kind is CryptogramKind.AAC:
        return Cryptogram(CryptogramKind.AAC, False, atc, elements.get(0x9F26, b""), iad, bound)
    if signature is None:
        raise AuthenticationFailed("the cryptogram is not signed", step=STEP_SDAD)
    dynamic = recover_dynamic_data(card.icc_key, signature, bound[0x9F37])
    check_cid(dynamic, elements)
    check_transaction_data(dynamic, card.card.pdol_values + answer.sent, elements)
    if elements.get(0x9F26, dynamic.ac) != dynamic.ac:
        raise AuthenticationFailed("the cryptogram beside it is another", step=STEP_SDAD)
    return Cryptogram(answer.kind, True, atc, dynamic.ac, iad, bound)


def find_ca_key(rid: bytes, index: bytes, ca_keys: Iterable[CaPublicKey]) -> CaPublicKey:
    """The CAPK a card names by its RID and tag 8F.

    Raises:
        AuthenticationFailed: step `CA key`: none of ours, or one that cannot be a CAPK.
    """
    for key in ca_keys:
        if key.rid == rid and bytes([key.index]) == index:
            check_ca_key(key)
            return key
    raise AuthenticationFailed(f"no CA key {rid.hex().upper()}/{index.hex().upper()}", step=STEP_CA_KEY)


def check_ca_key(key: CaPublicKey) -> None:
    if not _ISSUER_OVERHEAD < key.size <= MAX_KEY_BYTES or key.exponent not in EXPONENTS or len(key.rid) != 5:
        raise AuthenticationFailed("not a usable CA public key", step=STEP_CA_KEY)


def recover_issuer_certificate(ca_key: CaPublicKey, elements: Mapping[int, bytes]) -> IssuerCertificate:
    """Recover and verify tag 90 with 92 and 9F32 (EMV 4.3 Book 2 §6.3).

    Raises:
        AuthenticationFailed: step `issuer certificate`.
    """
    signer = PublicKey(ca_key.modulus, ca_key.exponent, ca_key.size)
    remainder, exponent = elements.get(0x92, b""), elements[0x9F32]
    recovered = _recover(signer, elements[0x90], _ISSUER_CERTIFICATE, STEP_ISSUER)
    if _sha1(recovered[1:_HASH_AT] + remainder + exponent) != recovered[_HASH_AT:-1]:
        raise AuthenticationFailed("its hash does not match", step=STEP_ISSUER)
    key = _certified_key(recovered, 11, remainder, exponent, STEP_ISSUER)
    if key.size <= _ICC_OVERHEAD:
        raise AuthenticationFailed("the issuer's key is too short", step=STEP_ISSUER)
    return IssuerCertificate(key, recovered[2:6], _month_end(recovered[6:8], STEP_ISSUER), recovered[8:11])


def check_issuer_identifier(issuer: IssuerCertificate, pan: str) -> None:
    """
    Raises:
        AuthenticationFailed: step `issuer certificate`: it is for other PANs.
    """
    digits = issuer.identifier.hex().rstrip("f")
    if len(digits) < 3 or not pan.startswith(digits):
        raise AuthenticationFailed("it is not for this card's PAN", step=STEP_ISSUER)


def recover_icc_certificate(issuer_key: PublicKey, elements: Mapping[int, bytes]) -> IccCertificate:
    """Recover tag 9F46 with 9F48 and 9F47 (EMV 4.3 Book 2 §6.4); its hash is still to be checked.

    Raises:
        AuthenticationFailed: step `ICC certificate`; also when it is for another PAN.
    """
    remainder, exponent = elements.get(0x9F48, b""), elements[0x9F47]
    recovered = _recover(issuer_key, elements[0x9F46], _ICC_CERTIFICATE, STEP_ICC)
    if recovered[2:12].hex().rstrip("f") != pan_digits(elements[0x5A]):
        raise AuthenticationFailed("it is for another PAN", step=STEP_ICC)
    key = _certified_key(recovered, 17, remainder, exponent, STEP_ICC)
    hashed = recovered[1:_HASH_AT] + remainder + exponent
    return IccCertificate(key, _month_end(recovered[12:14], STEP_ICC), hashed, recovered[_HASH_AT:-1])


def check_static_data(icc: IccCertificate, static_data: bytes) -> None:
    """
    Raises:
        AuthenticationFailed: step `static data`: the hash over ICC certificate and static data differs.
    """
    if _sha1(icc.hashed + static_data) != icc.hash:
        raise AuthenticationFailed(
            "the hash over the ICC certificate and the card's data does not match", step=STEP_STATIC_DATA
        )


def check_expiry(
    today: date,
    *,
    ca_key: CaPublicKey | None = None,
    issuer: IssuerCertificate | None = None,
    icc: IccCertificate | None = None,
    effective: date | None = None,
    expires: date | None = None,
) -> None:
    """
    Raises:
        AuthenticationFailed: step `expiry`, or `CA key` when that has expired.
    """
    if ca_key is not None and ca_key.expires is not None and ca_key.expires < today:
        raise AuthenticationFailed("the CA key has expired", step=STEP_CA_KEY)
    if issuer is not None and issuer.expires < today:
        raise AuthenticationFailed("the issuer certificate has expired", step=STEP_EXPIRY)
    if icc is not None and icc.expires < today:
        raise AuthenticationFailed("the ICC certificate has expired", step=STEP_EXPIRY)
    if expires is not None and expires < today:
        raise AuthenticationFailed("the card has expired", step=STEP_EXPIRY)
    if effective is not None and today < effective:
        raise AuthenticationFailed("the card is not valid yet", step=STEP_EXPIRY)


def recover_signed_dynamic_data(icc_key: PublicKey, signature: bytes, hashed_with: bytes) -> bytes:
    """The ICC dynamic data that tag 9F4B signs together with `hashed_with`: the unpredictable number in
    CDA (EMV 4.3 Book 2 §6.6.2), the DDOL values in DDA (§6.5.2).

    Raises:
        AuthenticationFailed: step `SDAD`.
    """
    recovered = _recover(icc_key, signature, _SIGNED_DYNAMIC_DATA, STEP_SDAD)
    if _sha1(recovered[1:_HASH_AT] + hashed_with) != recovered[_HASH_AT:-1]:
        raise AuthenticationFailed("its hash does not match", step=STEP_SDAD)
    hash_algorithm, length = recovered[2:4]
    if hash_algorithm != 0x01:
        raise AuthenticationFailed("unknown hash algorithm", step=STEP_SDAD)
    if length > icc_key.size - _SDAD_OVERHEAD:
        raise AuthenticationFailed("the ICC dynamic data do not fit", step=STEP_SDAD)
    return recovered[4 : 4 + length]


def recover_dynamic_data(icc_key: PublicKey, signature: bytes, unpredictable_number: bytes) -> DynamicData:
    """What a CDA signature says (EMV 4.3 Book 2 §6.6.2).

    Raises:
        AuthenticationFailed: step `SDAD`.
    """
    data = recover_signed_dynamic_data(icc_key, signature, unpredictable_number)
    number_length = data[0] if data else 0
    at = 1 + number_length
    if not 2 <= number_length <= 8 or len(data) < at + 1 + 8 + _SHA1_BYTES:
        raise AuthenticationFailed("the ICC dynamic data are no CDA data", step=STEP_SDAD)
    return DynamicData(data[1:at], data[at], data[at + 1 : at + 9], data[at + 9 : at + 9 + _SHA1_BYTES])


def check_cid(dynamic: DynamicData, elements: Mapping[int, bytes]) -> None:
    """
    Raises:
        AuthenticationFailed: step `CID`: the signed one is not the one in clear.
    """
    if bytes([dynamic.cid]) != elements[0x9F27]:
        raise AuthenticationFailed("the signed CID is not the one in clear", step=STEP_CID)


def check_transaction_data(dynamic: DynamicData, sent: bytes, elements: Mapping[int, bytes]) -> None:
    """Check the hash over `sent` (PDOL, CDOL1, and after a second GENERATE AC CDOL2 values) and the
    answer's data objects in their order, without the signature itself.

    Raises:
        AuthenticationFailed: step `transaction data hash`.
    """
    answered = [tlv.encode(tag, value) for tag, value in elements.items() if tag != 0x9F4B]
    if _sha1(sent + b"".join(answered)) != dynamic.transaction_data_hash:
        raise AuthenticationFailed(
            "what was sent and answered is not what was signed", step=STEP_TRANSACTION_DATA
        )


def _issuer_certificate(
    ca_key: CaPublicKey, elements: Mapping[int, bytes], known: KnownIssuers | None
) -> IssuerCertificate:
    if known is None:
        return recover_issuer_certificate(ca_key, elements)
    name = (ca_key, elements[0x90], elements.get(0x92, b""), elements[0x9F32])
    issuer = known.get(name)
    if issuer is None:
        issuer = known[name] = recover_issuer_certificate(ca_key, elements)
    return issuer


def _sha1(data: bytes) -> bytes:
    # Hash algorithm 01, the only one that EMV 4.3 Book 2 Annex B2.1 has.
    return sha1(data, usedforsecurity=False).digest()


def _recover(key: PublicKey, signature: bytes, data_format: int, step: str) -> bytes:
    """The recovery function (EMV 4.3 Book 2, Annex A2.1), with the checks that all three uses share."""
    if len(signature) != key.size:
        raise AuthenticationFailed(f"{len(signature)} bytes under a key of {key.size}", step=step)
    number = int.from_bytes(signature, "big")
    if number >= key.modulus:
        raise AuthenticationFailed("not below its key's modulus", step=step)
    recovered = pow(number, key.exponent, key.modulus).to_bytes(key.size, "big")
    if recovered[0] != _HEADER or recovered[-1] != _TRAILER or recovered[1] != data_format:
        raise AuthenticationFailed("not signed with the key that should have signed it", step=step)
    return recovered


def _certified_key(recovered: bytes, at: int, remainder: bytes, exponent: bytes, step: str) -> PublicKey:
    """The key in a certificate, its four lengths and algorithms at `at` (Book 2, Tables 13 and 14)."""
    hash_algorithm, key_algorithm, size, exponent_size = recovered[at : at + 4]
    if hash_algorithm != 0x01 or key_algorithm != 0x01:
        raise AuthenticationFailed("unknown algorithm", step=step)
    room = recovered[at + 4 : _HASH_AT]
    if len(remainder) != max(0, size - len(room)):
        raise AuthenticationFailed("the key's remainder has the wrong length", step=step)
    if exponent_size != len(exponent) or int.from_bytes(exponent, "big") not in EXPONENTS:
        raise AuthenticationFailed("the key's exponent is not 3 or 65537", step=step)
    modulus = int.from_bytes(room[:size] + remainder, "big")
    if size > MAX_KEY_BYTES or modulus.bit_length() <= 8 * (size - 1) or not modulus & 1:
        raise AuthenticationFailed("the key is not as long as it says", step=step)
    return PublicKey(modulus, int.from_bytes(exponent, "big"), size)


def _month_end(value: bytes, step: str) -> date:
    """MMYY: valid to the end of that month."""
    try:
        month, year = int(value[:1].hex()), int(value[1:].hex())
        year += 1900 if year >= 50 else 2000
        return date(year, month, calendar.monthrange(year, month)[1])
    except ValueError:
        raise AuthenticationFailed("no expiry date in it", step=step) from None
