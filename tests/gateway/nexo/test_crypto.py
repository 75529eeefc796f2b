"""The protocol's encryption: whatever does not hold is refused alike."""

from __future__ import annotations

import base64
import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.errors import AuthenticationFailed, InvalidInput
from pos_gateway.gateway.nexo import wire
from pos_gateway.gateway.nexo.crypto import NONCE_BYTES, NexoKey
from tests.gateway.nexo.counter import UNHURRIED

PASSPHRASE = "correct horse battery staple"
KEY = NexoKey.derive(PASSPHRASE, "pos", 1)
HEADER = {"ProtocolVersion": "3.0", "SaleID": "Till 1", "ServiceID": "A1"}
BODY = wire.dumps({"MessageHeader": HEADER, "PaymentRequest": {"x": 1}})


def new(nonce: bytes) -> bool:
    return True


def sealed(key: NexoKey = KEY, header: dict[str, Any] = HEADER, body: bytes = BODY) -> dict[str, Any]:
    inside: dict[str, Any] = key.seal("SaleToPOIRequest", header, body)["SaleToPOIRequest"]
    return inside


def opened(message: dict[str, Any]) -> dict[str, Any]:
    return KEY.open("SaleToPOIRequest", message, new)


def test_key_material_is_what_the_public_clients_derive() -> None:
    """PBKDF2-HMAC-SHA1, 4000 rounds; computed with the public Node client (npm @adyen/api-library 32)."""
    key = NexoKey.derive("mysupersecretpassphrase", "k", 1)
    assert (key.hmac_key.hex(), key.cipher_key.hex(), key.iv.hex()) == VECTOR


VECTOR = (
    "633651f2a778f91ef37ca2eae92d2f8e58073b766d26899967dc1202c1444742",
    "89b3399a5c77fc0c38762ba1529488d19b4daf8360a2ef3f7a0b06d23c89b12a",
    "17be85c2e52ba327bdce1910f4c2c7de",
)


def test_what_is_sealed_is_opened() -> None:
    assert opened(sealed()) == {"MessageHeader": HEADER, "PaymentRequest": {"x": 1}}


def test_the_secret_is_not_shown() -> None:
    assert KEY.hmac_key.hex() not in repr(KEY)
    assert "hmac_key" not in repr(KEY)


@UNHURRIED
@given(st.binary(max_size=80))
def test_every_length_is_padded_and_found_again(data: bytes) -> None:
    body = wire.dumps({"MessageHeader": HEADER, "x": data.hex()})
    assert opened(sealed(body=body))["x"] == data.hex()


def _hostile() -> list[tuple[str, dict[str, Any]]]:
    def changed(**trailer: Any) -> dict[str, Any]:
        message = copy.deepcopy(sealed())
        message["SecurityTrailer"] |= trailer
        return message

    def flipped(place: int) -> dict[str, Any]:
        message = sealed()
        blob = bytearray(base64.b64decode(message["NexoBlob"]))
        blob[place] ^= 1
        return {**message, "NexoBlob": base64.b64encode(blob).decode()}

    good = sealed()
    return [
        ("wrong MAC", changed(Hmac=base64.b64encode(bytes(32)).decode())),
        ("short MAC", changed(Hmac="AAAA")),
        ("MAC of another type", changed(Hmac=7)),
        ("no MAC", changed(Hmac=None)),
        ("another nonce", changed(Nonce=base64.b64encode(bytes(NONCE_BYTES)).decode())),
        ("short nonce", changed(Nonce="AAAA")),
        ("another key's name", changed(KeyIdentifier="other")),
        ("another version", changed(KeyVersion=2)),
        ("another crypto", changed(AdyenCryptoVersion=0)),
        ("first byte", flipped(0)),
        ("padding", flipped(-1)),
        ("no blob", {**good, "NexoBlob": ""}),
        ("half a block", {**good, "NexoBlob": "AAAA"}),
        ("no base64", {**good, "NexoBlob": "%%%"}),
        ("blob of another type", {**good, "NexoBlob": [1]}),
        ("no trailer", {"MessageHeader": HEADER, "NexoBlob": good["NexoBlob"]}),
        ("trailer of another type", {**good, "SecurityTrailer": "x"}),
        ("outer header differs", {**good, "MessageHeader": {**HEADER, "ServiceID": "A2"}}),
        ("outer header missing", {k: v for k, v in good.items() if k != "MessageHeader"}),
        ("another passphrase", sealed(NexoKey.derive("another passphrase", "pos", 1))),
        ("inside is no JSON", sealed(body=b"}")),
        ("inside has no header", sealed(body=b"{}")),
        ("inside is no object", sealed(body=b"7")),
    ]


@pytest.mark.parametrize(("what", "message"), _hostile(), ids=[what for what, _ in _hostile()])
def test_whatever_does_not_hold_is_refused_alike(what: str, message: dict[str, Any]) -> None:
    with pytest.raises(AuthenticationFailed) as refused:
        opened(message)
    assert (str(refused.value), refused.value.step) == ("message: not authentic", "message")


def test_a_nonce_seen_before_is_refused_and_asked_for_only_if_authentic() -> None:
    seen: set[bytes] = set()

    def is_new(nonce: bytes) -> bool:
        known = nonce in seen
        seen.add(nonce)
        return not known

    forged = {**sealed(), "NexoBlob": base64.b64encode(bytes(64)).decode()}
    with pytest.raises(AuthenticationFailed):
        KEY.open("SaleToPOIRequest", forged, is_new)
    assert not seen
    message = sealed()
    KEY.open("SaleToPOIRequest", message, is_new)
    with pytest.raises(AuthenticationFailed, match=r"^message: not authentic$"):
        KEY.open("SaleToPOIRequest", message, is_new)


def test_an_answer_is_no_request() -> None:
    answer = KEY.seal("SaleToPOIResponse", HEADER, BODY)["SaleToPOIResponse"]
    with pytest.raises(AuthenticationFailed):
        opened(answer)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.binary(max_size=48).map(lambda b: base64.b64encode(b).decode()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@UNHURRIED
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "MessageHeader": json_values,
            "NexoBlob": json_values,
            "SecurityTrailer": json_values
            | st.fixed_dictionaries(
                {
                    "Nonce": json_values,
                    "Hmac": json_values,
                    "KeyIdentifier": json_values,
                    "KeyVersion": json_values,
                }
            ),
        },
    )
)
def test_random_envelopes_never_do_more_than_be_refused(message: dict[str, Any]) -> None:
    with pytest.raises(AuthenticationFailed):
        opened(message)


@pytest.mark.parametrize("passphrase", ["", "short", "密码密码密码密码密码"])
def test_a_passphrase_no_client_could_use_is_refused(passphrase: str) -> None:
    with pytest.raises(InvalidInput, match="passphrase"):
        NexoKey.derive(passphrase, "pos", 1)
