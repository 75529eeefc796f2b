from __future__ import annotations

from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.redaction import REDACTED, redact_event, redact_text


@given(
    st.from_regex(r"[1-9][0-9]{12,18}", fullmatch=True), st.sampled_from(["{}", "pan={} end", "({})", "'{}'"])
)
def test_anything_like_a_card_number_is_shortened(number: str, around: str) -> None:
    told = redact_text(around.format(number))
    assert number not in told
    assert told == around.format(f"••••{number[-4:]}")


@pytest.mark.parametrize("text", ["9156 0001 2345 6789", "9156-0001-2345-6789"])
def test_groups_do_not_hide_it(text: str) -> None:
    assert redact_text(text) == "••••6789"


@pytest.mark.parametrize(
    "text", ["version 12", "3.14159", "port 8155", "2026-11-24T08:00:00", "deadbeef12345678901234"]
)
def test_what_is_no_card_number_stays(text: str) -> None:
    assert redact_text(text) == text


def test_ids_stay_whole() -> None:
    for payment_id in [str(uuid4()) for _ in range(200)] + ["00000000-1111-4222-8333-444455556666"]:
        assert redact_text(f"payment {payment_id}") == f"payment {payment_id}"


def test_unknown_fields_and_bytes_are_not_printed() -> None:
    event = redact_event(
        None,
        "info",
        {"event": "card 9156000123456789", "pan": "9156000123456789", "reason": b"\x5a\x08", "port": 8155},
    )
    assert event == {"event": "card ••••6789", "pan": REDACTED, "reason": REDACTED, "port": 8155}
