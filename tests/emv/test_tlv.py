from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pos_gateway.emv import tlv
from pos_gateway.errors import InvalidCardData, InvalidInput


def tags(constructed: bool) -> st.SearchStrategy[int]:
    bit = 0x20 if constructed else 0
    short = st.integers(1, 0xDF).filter(lambda t: t & 0x1F != 0x1F and bool(t & 0x20) is constructed)
    two = st.builds(lambda a, b: (a << 6 | bit | 0x1F) << 8 | b, st.integers(0, 3), st.integers(0x01, 0x7F))
    three = st.builds(
        lambda a, b, c: (a << 6 | bit | 0x1F) << 16 | b << 8 | c,
        st.integers(0, 3),
        st.integers(0x81, 0xFF),
        st.integers(0, 0x7F),
    )
    return st.one_of(short, two, three)


PRIMITIVE = st.builds(
    lambda tag, value: tlv.Tlv(tag, value), tags(False), st.binary(max_size=20) | st.just(bytes(200))
)


def constructed(children: st.SearchStrategy[tlv.Tlv]) -> st.SearchStrategy[tlv.Tlv]:
    return st.builds(
        lambda tag, inner: tlv.Tlv(tag, encoded(inner), tuple(inner)),
        tags(True),
        st.lists(children, max_size=3),
    )


TREES = st.lists(constructed(st.one_of(PRIMITIVE, constructed(PRIMITIVE))) | PRIMITIVE, max_size=4)


def encoded(objects: list[tlv.Tlv]) -> bytes:
    return b"".join(tlv.encode(o.tag, o.value) for o in objects)


@given(TREES)
def test_what_was_encoded_is_parsed_again(objects: list[tlv.Tlv]) -> None:
    assert list(tlv.parse(encoded(objects))) == objects


@given(st.binary(max_size=200))
def test_random_bytes_parse_to_exactly_themselves_or_are_refused(data: bytes) -> None:
    try:
        objects = tlv.parse(data)
    except InvalidCardData:
        return
    assert encoded(list(objects)) == data


@given(TREES.filter(bool), st.data())
def test_every_truncation_is_refused_or_is_a_shorter_sequence(
    objects: list[tlv.Tlv], draw: st.DataObject
) -> None:
    data = encoded(objects)
    cut = data[: draw.draw(st.integers(0, len(data) - 1))]
    borders = [len(encoded(objects[:i])) for i in range(len(objects))]
    if len(cut) in borders:
        assert encoded(list(tlv.parse(cut))) == cut
    else:
        with pytest.raises(InvalidCardData):
            tlv.parse(cut)


@pytest.mark.parametrize(
    ("data", "offset", "reason"),
    [
        ("5A", 1, "has no length"),
        ("9F", 0, "tag is cut off"),
        ("9F02", 2, "has no length"),
        ("5A02FF", 0, "says 2 bytes, 1 are there"),
        ("5A80", 1, "indefinite length"),
        ("7080 5A01 00 0000", 1, "indefinite length"),
        ("5A8105 0102030405", 1, "shortest form"),
        ("5A820010" + 16 * "00", 1, "shortest form"),
        ("5A81", 1, "length is cut off"),
        ("5A83000001 00", 1, "longer than 3 bytes"),
        ("5AFF", 1, "longer than 3 bytes"),
        ("9F8100 00", None, None),
        ("9F818100 00", 0, "longer than 3 bytes"),
        ("9F8001 00", 1, "zero bits"),
        ("0000", 0, "00 is no tag"),
        ("5A0101 00", 3, "00 is no tag"),
        ("5A0101 5A", 4, "has no length"),
        ("7003 5A02 01 5A00", 2, "says 2 bytes, 1 are there"),
        ("70" + "0A" + "710872067304740275 00", 8, "nested deeper"),
    ],
)
def test_broken_rules_name_the_byte(data: str, offset: int | None, reason: str | None) -> None:
    if reason is None:
        tlv.parse(bytes.fromhex(data))
        return
    with pytest.raises(InvalidCardData, match=reason) as caught:
        tlv.parse(bytes.fromhex(data), where="record 1.1")
    assert caught.value.where == f"record 1.1, byte {offset}"


def test_size_and_count_are_bounded() -> None:
    tlv.parse(b"\x5a\x00" * tlv.MAX_OBJECTS)
    with pytest.raises(InvalidCardData, match="more than 128 data objects"):
        tlv.parse(b"\x5a\x00" * (tlv.MAX_OBJECTS + 1))
    with pytest.raises(InvalidCardData, match="more than 128 data objects"):
        tlv.parse(tlv.encode(0x70, b"\x5a\x00" * tlv.MAX_OBJECTS))
    with pytest.raises(InvalidCardData, match="at most 4096"):
        tlv.parse(bytes(tlv.MAX_BYTES + 1))


@pytest.mark.parametrize("tag", [0, -1, 0x5A5A, 0x9F, 0x9F80, 0x9F818101, 0x1F])
def test_malformed_tags_are_not_encoded(tag: int) -> None:
    with pytest.raises((InvalidInput, OverflowError)):
        tlv.encode(tag, b"")


def test_a_repr_shows_no_value() -> None:
    assert "9156" not in repr(tlv.parse(bytes.fromhex("70 0A 5A08 9156000112345672")))


ENTRIES = st.lists(
    st.builds(tlv.DolEntry, tags(False), st.integers(0, 40)), max_size=6, unique_by=lambda e: e.tag
)


@given(ENTRIES)
def test_a_dol_is_parsed_filled_and_split(entries: list[tlv.DolEntry]) -> None:
    data = b"".join(tlv.encode(e.tag, bytes(e.length))[: -e.length or None] for e in entries)
    assert tlv.parse_dol(data) == tuple(entries)
    elements = {e.tag: bytes([i + 1]) * e.length for i, e in enumerate(entries)}
    values = tlv.fill_dol(entries, elements)
    assert len(values) == sum(e.length for e in entries)
    assert tlv.split_dol(entries, values) == elements


@given(st.binary(max_size=60))
def test_random_dols_are_bounded_or_refused(data: bytes) -> None:
    try:
        entries = tlv.parse_dol(data)
    except InvalidCardData:
        return
    assert len(tlv.fill_dol(entries, {})) <= tlv.MAX_DOL_VALUES_BYTES


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("9F02", "has no length"),
        ("9F", "cut off"),
        ("9F0206 9F0206", "twice"),
        ("00 01", "no tag"),
        ("5AFF", "asks for 255 bytes"),
        ("5A80 578080", "asks for|no length"),
    ],
)
def test_malformed_dols_are_refused(data: str, reason: str) -> None:
    with pytest.raises(InvalidCardData, match=reason):
        tlv.parse_dol(bytes.fromhex(data))


@pytest.mark.parametrize(
    ("tag", "value", "length", "expected"),
    [
        (0x9F02, "000000001930", 4, "00001930"),  # n: cut on the left
        (0x9F02, "1930", 4, "00001930"),  # n: zeros on the left
        (0x5A, "9156000112345672", 10, "9156000112345672FFFF"),  # cn: F on the right
        (0x5A, "9156000112345672", 3, "915600"),
        (0x9F1C, "5445524D", 6, "5445524D0000"),  # ans: zeros on the right
        (0x9F37, "11223344", 2, "1122"),  # b: cut on the right
        (0x9F37, "11223344", 8, "1122334400000000"),
        (0xDF7F, "0102", 3, "010200"),  # unknown counts as b
    ],
)
def test_values_are_fitted_by_their_format(tag: int, value: str, length: int, expected: str) -> None:
    filled = tlv.fill_dol([tlv.DolEntry(tag, length)], {tag: bytes.fromhex(value)})
    assert filled == bytes.fromhex(expected)


def test_what_is_not_known_is_zero() -> None:
    assert tlv.fill_dol([tlv.DolEntry(0x9F37, 4), tlv.DolEntry(0x9C, 1)], {0x9C: b"\x01"}) == b"\0\0\0\0\x01"


def test_values_of_another_length_are_not_split() -> None:
    with pytest.raises(InvalidCardData):
        tlv.split_dol([tlv.DolEntry(0x9F37, 4)], b"123")
