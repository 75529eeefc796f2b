"""Certificates and personalisation, read back by plain arithmetic and by the terminal's own code."""

from __future__ import annotations

import hashlib
import stat
from datetime import date
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from pos_gateway.emv import cryptogram
from pos_gateway.errors import InvalidConfiguration, InvalidInput, NotFound
from pos_gateway.lab import virtual_card
from pos_gateway.ledger import Ledger, issuing
from pos_gateway.ledger.certificates import certify_icc, certify_issuer
from pos_gateway.ledger.keys import FileRsaSigner, KeyRing, generate_rsa_key


def recovered(certificate: bytes, signer: FileRsaSigner) -> bytes:
    return pow(int.from_bytes(certificate, "big"), signer.exponent, signer.modulus).to_bytes(
        len(certificate), "big"
    )


@pytest.mark.parametrize("key_bits", [1024, 1408, 1984])
def test_an_issuer_certificate_holds_what_book_2_table_5_says(key_bits: int) -> None:
    ca = FileRsaSigner(generate_rsa_key(1984))
    key = generate_rsa_key(key_bits).public_key().public_numbers()
    signed = certify_issuer(
        ca,
        issuer_identifier="915600",
        expires=date(2031, 7, 31),
        serial=b"\x01\x02\x03",
        modulus=key.n,
        exponent=key.e,
    )
    modulus = key.n.to_bytes(key_bits // 8, "big")
    data = recovered(signed.certificate, ca)
    room = 248 - 36
    assert data[:2] == b"\x6a\x02"
    assert data[2:6].hex() == "915600ff"
    assert data[6:8].hex() == "0731"
    assert data[8:11] == b"\x01\x02\x03"
    assert data[11:15] == bytes([1, 1, key_bits // 8, 1])
    assert data[15 : 15 + room] == (modulus + b"\xbb" * room)[:room]
    assert signed.remainder == modulus[room:]
    assert data[-21:-1] == hashlib.sha1(data[1:-21] + signed.remainder + b"\x03").digest()  # noqa: S324
    assert data[-1:] == b"\xbc"


def test_an_icc_certificate_holds_what_book_2_table_14_says(icc_key: rsa.RSAPrivateKey) -> None:
    issuer = FileRsaSigner(generate_rsa_key(1408))
    key = icc_key.public_key().public_numbers()
    signed = certify_icc(
        issuer,
        pan="9156000112345678",
        expires=date(2029, 12, 31),
        serial=b"\x00\x00\x07",
        modulus=key.n,
        exponent=key.e,
        static_data=b"static",
    )
    modulus = key.n.to_bytes(144, "big")
    data = recovered(signed.certificate, issuer)
    assert data[:2] == b"\x6a\x04"
    assert data[2:12].hex() == "9156000112345678ffff"
    assert data[12:14].hex() == "1229"
    assert data[17:21] == bytes([1, 1, 144, 1])
    assert data[21:-21] == modulus[: 176 - 42]
    assert signed.remainder == modulus[176 - 42 :]
    digest = hashlib.sha1(data[1:-21] + signed.remainder + b"\x03" + b"static").digest()  # noqa: S324
    assert data[-21:-1] == digest


def test_a_key_larger_than_its_signer_cannot_be_certified() -> None:
    issuer, key = FileRsaSigner(generate_rsa_key(1024)), generate_rsa_key(1152).public_key().public_numbers()
    with pytest.raises(InvalidInput, match="more than the signing key's"):
        certify_issuer(
            issuer,
            issuer_identifier="9156",
            expires=date(2030, 1, 31),
            serial=bytes(3),
            modulus=key.n,
            exponent=3,
        )


def test_token_numbers_are_no_schemes_and_pass_luhn() -> None:
    for _ in range(50):
        pan = issuing.new_pan()
        assert len(pan) == 16
        assert pan.startswith("91560001")
        doubled = [int(d) * (1 + (i % 2 == 0)) for i, d in enumerate(pan)]
        assert sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def test_luhn_digit_of_a_published_example() -> None:
    assert issuing.luhn_digit("7992739871") == "3"  # 7992 7398 713, the usual textbook example


def test_a_card_is_personalised_with_its_own_keys_and_data(
    ledger: Ledger, icc_key: rsa.RSAPrivateKey
) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=10_000)
    issued = ledger.issue_token(account.id, per_tap_cap_minor=3000, icc_key=icc_key)
    card = issued.personalisation
    assert card.mk_ac == cryptogram.derive_card_key(ledger.keys.master.ac, card.pan, card.psn)
    assert card.mk_enc == cryptogram.derive_card_key(ledger.keys.master.enc, card.pan, card.psn)
    assert card.mk_ac != card.mk_enc
    assert 1 << 44 <= card.counter < 1 << 46
    assert issued.token.highest_counter == card.counter
    assert card.per_tap_cap_minor == issued.token.per_tap_cap_minor == 3000
    assert issued.token.last4 == card.pan[-4:]
    assert card.pan not in repr(issued)
    # The issuer signs exactly the record that the card will give out, byte for byte.
    profile = issuing.CardProfile(
        pan=card.pan,
        psn=card.psn,
        effective=card.effective,
        expires=card.expires,
        currency_numeric=card.currency_numeric,
        country_numeric=card.country_numeric,
        per_tap_cap_minor=card.per_tap_cap_minor,
        cumulative_cap_minor=card.cumulative_cap_minor,
        tc_rate_limit=card.tc_rate_limit,
        start_counter=card.counter,
    )
    assert issuing.static_data(profile, card.expires) == virtual_card.static_data(card)


def test_two_tokens_of_an_account_share_nothing(ledger: Ledger, icc_key: rsa.RSAPrivateKey) -> None:
    account = ledger.open_account(holder="Li Na", limit_minor=10_000)
    one, other = (ledger.issue_token(account.id, icc_key=icc_key).personalisation for _ in range(2))
    assert one.pan != other.pan
    assert one.counter != other.counter
    assert one.mk_ac != other.mk_ac
    assert len(ledger.account(account.id).tokens) == 2


def test_a_token_needs_an_account_and_a_life_within_the_issuers(
    ledger: Ledger, icc_key: rsa.RSAPrivateKey
) -> None:
    with pytest.raises(NotFound, match="no account"):
        ledger.issue_token("acc-nobody", icc_key=icc_key)
    account = ledger.open_account(holder="Li Na", limit_minor=10_000)
    for expires in (date(2020, 1, 1), date(2099, 1, 1)):
        with pytest.raises(InvalidInput, match="expires"):
            ledger.issue_token(account.id, expires=expires, icc_key=icc_key)
    with pytest.raises(InvalidInput, match="per-tap cap"):
        ledger.issue_token(account.id, per_tap_cap_minor=0, icc_key=icc_key)


def test_key_files_are_their_owners_alone(template: Path) -> None:
    files = [path for path in (template / "keys").rglob("*") if path.is_file()]
    assert {f.name for f in files} >= {"ca.pem", "issuer.pem", "master.json", "tls.pem"}
    roles = {f.name.partition("-")[0] for f in files if f.parent.name == "signing"}
    assert roles == {"root", "targets", "snapshot", "timestamp", "limits"}
    assert all(stat.S_IMODE(f.stat().st_mode) == 0o600 for f in files)
    for folder in ("keys", "keys/signing"):
        assert stat.S_IMODE((template / folder).stat().st_mode) == 0o700
    assert stat.S_IMODE(template.stat().st_mode) == 0o700


def test_a_key_file_that_others_can_read_is_refused(ledger: Ledger) -> None:
    (ledger.home / "keys" / "master.json").chmod(0o644)
    with pytest.raises(InvalidConfiguration, match=r"open to other users.*master\.json.*chmod 600"):
        Ledger.open(ledger.home)


@pytest.mark.parametrize("name", ["ca.pem", "master.json", "token.json", "sealing.pem"])
def test_a_damaged_or_missing_key_file_is_named_without_its_content(ledger: Ledger, name: str) -> None:
    path = ledger.home / "keys" / name
    path.write_text("secret-looking rubbish")
    with pytest.raises(InvalidConfiguration) as damaged:
        KeyRing.load(ledger.home / "keys")
    assert "rubbish" not in str(damaged.value)
    path.unlink()
    with pytest.raises(InvalidConfiguration, match="keys"):
        KeyRing.load(ledger.home / "keys")


def test_nothing_secret_stands_in_a_repr(ledger: Ledger) -> None:
    text = repr(ledger.keys) + repr(ledger.keys.master) + repr(ledger.keys.token_key)
    assert ledger.keys.master.ac.hex() not in text
    assert repr(ledger.keys.token_key.secret) not in text
    assert "secret=" not in text
