"""Published keys, certificates and signatures; where they come from: tests/vectors/SOURCES.md."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from pos_gateway.emv import authentication
from pos_gateway.emv.transcript import StepStatus, Transcript, authentic, verify_transcript

VECTORS = Path(__file__).parent.parent / "vectors"


def vector(name: str) -> Transcript:
    return Transcript.from_json((VECTORS / name).read_text())


def covered(transcript: Transcript, today: date | None = None) -> list[str]:
    steps = verify_transcript(transcript, today=today)
    assert [s for s in steps if s.status is StepStatus.FAILED] == []
    return [s.name for s in steps if s.status is StepStatus.OK]


def test_a_published_cda_is_authentic() -> None:
    transcript = vector("emv-tools-cda.json")
    assert covered(transcript) == [
        "card data",
        "CA key",
        "issuer certificate",
        "ICC certificate",
        "static data",
        "expiry",
        "SDAD",
        "CID",
        "transaction data hash",
    ]
    assert authentic(verify_transcript(transcript))
    assert not authentic(verify_transcript(transcript, today=date(2026, 11, 24)))


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


def fields(raw: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    found = [(raw, n) for n, v in raw.items() if isinstance(v, str) and n != "format"]
    found += [(raw["ca_key"], "modulus")]
    found += [(raw["elements"], tag) for tag in raw["elements"]]
    return found + [(record, "data") for record in raw.get("records", [])]


@pytest.mark.parametrize("name", ["emv-tools-cda.json"])
def test_a_change_to_any_byte_is_noticed(name: str) -> None:
    raw = json.loads((VECTORS / name).read_text())
    for holder, field in fields(raw):
        original = holder[field]
        for at in range(0, len(original), 2):
            holder[field] = (
                original[:at] + f"{int(original[at : at + 2], 16) ^ 0x10:02X}" + original[at + 2 :]
            )
            steps = verify_transcript(Transcript.from_json(json.dumps(raw)))
            assert not authentic(steps), f"{field}, byte {at // 2}"
        holder[field] = original
