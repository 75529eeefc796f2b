from __future__ import annotations

import pytest
from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import Cipher, modes
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.emv import cryptogram
from pos_gateway.errors import AuthenticationFailed

MASTER_KEY = bytes.fromhex("0123456789ABCDEFFEDCBA9876543210")


def des(key: bytes, block: bytes, *, decrypt: bool = False) -> bytes:
    cipher = Cipher(TripleDES(key * 3 if len(key) == 8 else key + key[:8]), modes.ECB())  # noqa: S305
    context = cipher.decryptor() if decrypt else cipher.encryptor()
    return context.update(block) + context.finalize()


def test_the_cryptogram_is_the_mac_of_the_book() -> None:
    """Written out by hand from EMV 4.3 Book 2, Annex A1.2.1 and A1.3.1. Key parity is not significant."""
    atc, data = 0x1234, bytes(range(45))
    spread = atc.to_bytes(2, "big") + b"%s" + bytes(5)
    key = des(MASTER_KEY, spread.replace(b"%s", b"\xf0")) + des(MASTER_KEY, spread.replace(b"%s", b"\x0f"))
    padded = data + b"\x80"
    padded += bytes(-len(padded) % 8)
    state = bytes(8)
    for at in range(0, len(padded), 8):
        state = des(key[:8], bytes(a ^ b for a, b in zip(state, padded[at : at + 8], strict=True)))
    expected = des(key[:8], des(key[8:], state, decrypt=True))
    assert cryptogram.application_cryptogram(MASTER_KEY, atc, data) == expected


def test_card_keys_are_derived_by_option_a() -> None:
    """EMV 4.3 Book 2, Annex A1.4.1: the 16 rightmost digits of PAN ‖ PSN, and their complement."""
    digits = bytes.fromhex("5600011234567201")
    expected = des(MASTER_KEY, digits) + des(MASTER_KEY, bytes(b ^ 0xFF for b in digits))
    derived = cryptogram.derive_card_key(MASTER_KEY, "9156000112345672", 1)
    assert [b & 0xFE for b in derived] == [b & 0xFE for b in expected]


@given(st.integers(0, 0xFFFF), st.integers(0, (1 << 48) - 1))
def test_the_counter_comes_back_with_its_key(atc: int, counter: int) -> None:
    hidden = cryptogram.encipher_counter(MASTER_KEY, atc, counter)
    assert counter.to_bytes(6, "big") not in hidden
    assert cryptogram.decipher_counter(MASTER_KEY, atc, hidden) == counter


def test_a_counter_under_another_key_or_atc_is_refused() -> None:
    hidden = cryptogram.encipher_counter(MASTER_KEY, 1, 1930)
    for key, atc in ((MASTER_KEY, 2), (MASTER_KEY[::-1], 1)):
        with pytest.raises(AuthenticationFailed) as caught:
            cryptogram.decipher_counter(key, atc, hidden)
        assert caught.value.step == "enciphered counter"
    with pytest.raises(AuthenticationFailed):
        cryptogram.decipher_counter(MASTER_KEY, 1, hidden[:7])
