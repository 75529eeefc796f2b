"""Published keys, certificates and signatures; where they come from: tests/vectors/SOURCES.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import pytest

from pos_gateway.emv import authentication, tlv
from pos_gateway.emv.transcript import StepStatus, Transcript, verify_transcript
from pos_gateway.errors import AuthenticationFailed

VECTORS = Path(__file__).parent.parent / "vectors"


def vector(name: str) -> Transcript:
    return Transcript.from_json((VECTORS / name).read_text())


def covered(transcript: Transcript, today: date | None = None) -> list[str]:
    steps = verify_transcript(transcript, today=today)
    assert [s for s in steps if s.status is StepStatus.FAILED] == []
    return [s.name for s in steps if s.status is StepStatus.OK]


@dataclass(frozen=True)
class Cda:
    """A published CDA without what names its card."""

    key: authentication.PublicKey
    unpredictable_number: bytes
    sent: bytes
    answer: dict[int, bytes]

    def verify(self) -> authentication.DynamicData:
        dynamic = authentication.recover_dynamic_data(
            self.key, self.answer[0x9F4B], self.unpredictable_number
        )
        authentication.check_cid(dynamic, self.answer)
        authentication.check_transaction_data(dynamic, self.sent, self.answer)
        return dynamic


@pytest.fixture
def cda() -> Cda:
    raw = json.loads((VECTORS / "emv-tools-sdad.json").read_text())
    modulus = int(raw["icc_modulus"], 16)
    (template,) = tlv.parse(bytes.fromhex(raw["answer"]))
    return Cda(
        key=authentication.PublicKey(modulus, raw["icc_exponent"], (modulus.bit_length() + 7) // 8),
        unpredictable_number=bytes.fromhex(raw["unpredictable_number"]),
        sent=bytes.fromhex(raw["pdol_values"] + raw["cdol1_values"]),
        answer={element.tag: element.value for element in template.children},
    )


def test_a_published_cda_is_authentic(cda: Cda) -> None:
    assert cda.verify().cid == 0x40


def test_the_issuer_of_the_published_cda_is_recovered() -> None:
    raw = json.loads((VECTORS / "emv-tools-sdad.json").read_text())
    transcript = Transcript.from_json(json.dumps(raw["certificates"]))
    assert transcript.ca_key is not None
    issuer = authentication.recover_issuer_certificate(transcript.ca_key, transcript.elements)
    assert issuer.identifier.hex() == raw["issuer_identifier"]
    assert issuer.expires.isoformat() == raw["issuer_expires"]


def test_a_change_to_any_byte_of_the_published_cda_is_noticed(cda: Cda) -> None:
    changed = [replace(cda, unpredictable_number=b) for b in _with_one_bit_flipped(cda.unpredictable_number)]
    changed += [replace(cda, sent=b) for b in _with_one_bit_flipped(cda.sent)]
    for tag, value in cda.answer.items():
        changed += [replace(cda, answer={**cda.answer, tag: b}) for b in _with_one_bit_flipped(value)]
    assert len(changed) > 150
    for other in changed:
        with pytest.raises(AuthenticationFailed):
            other.verify()


def _with_one_bit_flipped(data: bytes) -> Iterator[bytes]:
    for at in range(len(data)):
        yield data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def test_published_certificates_are_recovered() -> None:
    test_card = ["card data", "CA key", "issuer certificate", "ICC certificate", "expiry"]
    assert covered(vector("openemv-visa-test.json"), date(2021, 1, 1)) == test_card
    steps = covered(vector("openemv-mastercard-test.json"), date(2021, 1, 1))
    assert steps == [*test_card, "dynamic data"]


def test_a_published_sdad_says_what_was_published() -> None:
    """Recovered data as emv-utils states them: an ICC dynamic number, a CID, an AC and a hash."""
    transcript = vector("openemv-mastercard-test.json")
    assert transcript.ca_key is not None
    assert transcript.signed_dynamic_data is not None
    issuer = authentication.recover_issuer_certificate(transcript.ca_key, transcript.elements)
    assert (issuer.identifier.hex(), issuer.expires) == ("541333ff", date(2027, 12, 31))
    icc = authentication.recover_icc_certificate(issuer.key, transcript.elements)
    assert icc.hash.hex() == "91566e18006e2cba8d286484a9e6ba9e32b48d1e"
    dynamic = authentication.recover_dynamic_data(
        icc.key, transcript.signed_dynamic_data, bytes.fromhex("8B55633B")
    )
    assert dynamic.icc_dynamic_number.hex() == "537eb5e03cc433c8"
    assert dynamic.cid == 0x00
    assert dynamic.ac.hex() == "55b6408dbc985131"
    assert dynamic.transaction_data_hash.hex() == "a04620c52455ea8f2370647af36748a2ca4aa9f6"
