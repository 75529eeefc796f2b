"""BER-TLV as EMV uses it (EMV 4.3 Book 3, Annex B) and data object lists (Book 3 §5.4).

Strict and bounded: bytes that could be read in two ways are refused, so that what is checked here is
what everybody else reads too. Stricter than the book in two places: lengths must be in their shortest
form, and padding bytes 00 between data objects are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from pos_gateway.emv import tags
from pos_gateway.errors import InvalidCardData, InvalidInput

MAX_BYTES: Final = 4096
MAX_DEPTH: Final = 5
MAX_OBJECTS: Final = 128
MAX_DOL_VALUES_BYTES: Final = 252
"""What one short APDU can carry beside its own template header."""

_CONSTRUCTED: Final = 0x20
_LONG_TAG: Final = 0x1F


class Tlv(NamedTuple):
    """One data object. `children` are the parsed contents of a constructed one, else empty.

    Its repr shows no value: it may be card data.
    """

    tag: int
    value: bytes
    children: tuple[Tlv, ...] = ()

    def __repr__(self) -> str:
        return f"Tlv({self.tag:X}, {len(self.value)} bytes, {len(self.children)} children)"


def parse(data: bytes, *, where: str = "") -> tuple[Tlv, ...]:
    """All data objects in `data`, constructed ones parsed to the bottom.

    `where` says in errors what the bytes are, for instance `"record 2.1"`.

    Raises:
        InvalidCardData: names the byte offset at which the rules are broken.
    """
    if len(data) > MAX_BYTES:
        raise InvalidCardData(f"{len(data)} bytes, at most {MAX_BYTES} are read", where=where)
    objects, _ = _parse(data, 0, len(data), MAX_DEPTH, MAX_OBJECTS, where)
    return objects


def _parse(
    data: bytes, at: int, end: int, depth: int, budget: int, where: str
) -> tuple[tuple[Tlv, ...], int]:
    """The objects in data[at:end], and how many more may follow elsewhere."""
    objects = []
    while at < end:
        start = at
        if budget == 0:
            raise _invalid(f"more than {MAX_OBJECTS} data objects", start, where)
        budget -= 1
        first = tag = data[at]
        at += 1
        if first & _LONG_TAG == _LONG_TAG:
            if at < end and data[at] < 0x80:  # most tags of cards: two bytes
                tag, at = first << 8 | data[at], at + 1
            else:
                tag, at = _long_tag(data, start, end, where)
        elif first == 0:
            raise _invalid("00 is no tag", start, where)
        if at >= end:
            raise _invalid(f"tag {tag:X} has no length", at, where)
        length = data[at]
        at += 1
        if length > 0x7F:
            length, at = _long_length(data, at - 1, end, where)
        if length > end - at:
            raise _invalid(f"tag {tag:X} says {length} bytes, {end - at} are there", start, where)
        value = data[at : at + length]
        if first & _CONSTRUCTED:
            if depth == 1:
                raise _invalid(f"nested deeper than {MAX_DEPTH}", start, where)
            children, budget = _parse(data, at, at + length, depth - 1, budget, where)
            objects.append(Tlv(tag, value, children))
        else:
            objects.append(Tlv(tag, value))
        at += length
    return tuple(objects), budget


def _long_tag(data: bytes, start: int, end: int, where: str) -> tuple[int, int]:
    """A tag of two or three bytes, and the offset after it."""
    tag, at = data[start], start + 1
    while True:
        if at >= end:
            raise _invalid("tag is cut off", start, where)
        byte = data[at]
        if at == start + 1 and byte == 0x80:
            raise _invalid("tag number starts with zero bits", at, where)
        tag, at = tag << 8 | byte, at + 1
        if byte < 0x80:
            return tag, at
        if at == start + 3:
            raise _invalid("tag is longer than 3 bytes", start, where)


def _long_length(data: bytes, start: int, end: int, where: str) -> tuple[int, int]:
    """A length of two or three bytes (81, 82), and the offset after it."""
    count = data[start] & 0x7F
    if count == 0:
        raise _invalid("indefinite length", start, where)
    if count > 2:
        raise _invalid("length field is longer than 3 bytes", start, where)
    at = start + 1 + count
    if at > end:
        raise _invalid("length is cut off", start, where)
    length = int.from_bytes(data[start + 1 : at], "big")
    if length < (0x80 if count == 1 else 0x100):
        raise _invalid("length is not in its shortest form", start, where)
    return length, at


def _invalid(reason: str, offset: int, where: str) -> InvalidCardData:
    return InvalidCardData(reason, where=f"{where}, byte {offset}" if where else f"byte {offset}")


def encode(tag: int, value: bytes) -> bytes:
    """One data object as bytes, its length in the shortest form.

    Raises:
        InvalidInput: no well-formed tag, or a value longer than 65535 bytes.
    """
    name = tag.to_bytes((tag.bit_length() + 7) // 8 or 1, "big")
    try:
        parsed = name[0] if name[0] & _LONG_TAG != _LONG_TAG else _long_tag(name, 0, len(name), "")[0]
    except InvalidCardData:
        parsed = -1
    if parsed != tag or tag == 0:
        raise InvalidInput("not a well-formed tag", where=f"tag {tag:X}")
    return name + length_field(len(value)) + value


def length_field(length: int) -> bytes:
    """A BER length in its shortest form.

    Raises:
        InvalidInput: over 65535.
    """
    if length < 0x80:
        return bytes([length])
    if length < 0x100:
        return bytes([0x81, length])
    if length < 0x10000:
        return b"\x82" + length.to_bytes(2, "big")
    raise InvalidInput("value longer than 65535 bytes", where="length")


class DolEntry(NamedTuple):
    """One entry of a data object list: which value is wanted, at which length in bytes."""

    tag: int
    length: int


@lru_cache(maxsize=64)  # cards of one issuer all ask for the same
def parse_dol(data: bytes, *, where: str = "") -> tuple[DolEntry, ...]:
    """A data object list: tags and one-byte lengths (EMV 4.3 Book 3 §5.4).

    Raises:
        InvalidCardData: malformed, a tag asked for twice, or more bytes than one command can carry.
    """
    entries: dict[int, DolEntry] = {}
    at, end, total = 0, len(data), 0
    if end > MAX_DOL_VALUES_BYTES:
        raise InvalidCardData(f"{end} bytes, at most {MAX_DOL_VALUES_BYTES} are read", where=where)
    while at < end:
        start = at
        tag, at = data[at], at + 1
        if tag == 0:
            raise _invalid("00 is no tag", start, where)
        if tag & _LONG_TAG == _LONG_TAG:
            tag, at = _long_tag(data, start, end, where)
        if at >= end:
            raise _invalid(f"tag {tag:X} has no length", at, where)
        if tag in entries:
            raise _invalid(f"tag {tag:X} stands here twice", start, where)
        entries[tag] = DolEntry(tag, data[at])
        total, at = total + data[at], at + 1
    if total > MAX_DOL_VALUES_BYTES:
        raise InvalidCardData(f"asks for {total} bytes, at most {MAX_DOL_VALUES_BYTES} are sent", where=where)
    return tuple(entries.values())


def fill_dol(entries: Sequence[DolEntry], elements: Mapping[int, bytes]) -> bytes:
    """The values a list asks for, concatenated (EMV 4.3 Book 3 §5.4).

    What is not in `elements` is filled with zeros. A value of another length is cut or padded: numeric
    ones on the left, all others on the right, compressed numeric ones with FF.
    """
    return b"".join([_fitted(entry, elements.get(entry.tag)) for entry in entries])


def _fitted(entry: DolEntry, value: bytes | None) -> bytes:
    tag, length = entry
    if value is None:
        return bytes(length)
    if len(value) == length:
        return value
    coding = tags.format_of(tag)
    if coding is tags.Format.NUMERIC:
        return value[len(value) - length :] if len(value) > length else value.rjust(length, b"\0")
    return value[:length].ljust(length, b"\xff" if coding is tags.Format.COMPRESSED_NUMERIC else b"\0")


def split_dol(entries: Sequence[DolEntry], values: bytes, *, where: str = "") -> dict[int, bytes]:
    """The reverse of `fill_dol`: which value each entry was given.

    Raises:
        InvalidCardData: not as many bytes as the entries ask for.
    """
    if sum(entry.length for entry in entries) != len(values):
        raise InvalidCardData(f"{len(values)} bytes do not fit the data object list", where=where)
    elements, at = {}, 0
    for tag, length in entries:
        elements[tag] = values[at : at + length]
        at += length
    return elements
