from __future__ import annotations

from pos_gateway.emv import application, tags, tlv

MUST_BE_SENSITIVE = (0x5A, 0x57, 0x56, 0x5F20, 0x5F24, 0x9F1F, 0x9F20, 0x9F6B, 0x9F46, 0x9F4B, 0x9F10, 0x9F02)


def test_what_tells_of_the_holder_is_redacted() -> None:
    for tag in MUST_BE_SENSITIVE:
        value = bytes.fromhex("9156000112345672")
        shown = tags.redact(tag, value)
        assert "91560001" not in shown
        assert len(shown) < 12


def test_of_a_pan_the_last_four_digits_remain() -> None:
    assert tags.redact(0x5A, bytes.fromhex("9156000112345672")) == "…5672"
    assert tags.redact(0x5A, bytes.fromhex("915600011234567F")) == "…4567"


def test_unknown_tags_are_redacted() -> None:
    assert tags.redact(0xDF7E, b"secret") == "(6 bytes)"
    assert tags.label(0xDF7E) == "DF7E"


def test_known_harmless_tags_are_shown() -> None:
    assert tags.redact(0x82, b"\x01\x00") == "0100"
    assert tags.label(0x82) == "82 Application Interchange Profile (AIP)"


def test_the_table_knows_every_tag_of_our_application() -> None:
    asked = [
        entry.tag
        for dol in (application.PDOL, application.CDOL1, application.CDOL2)
        for entry in tlv.parse_dol(dol)
    ]
    assert [f"{tag:X}" for tag in asked if tag not in tags.TABLE] == []


def test_every_row_is_a_well_formed_tag_with_a_source() -> None:
    for tag, row in tags.TABLE.items():
        assert row.tag == tag
        assert row.name
        assert row.source
        assert tlv.parse(tlv.encode(tag, b""))[0].tag == tag
