"""The two dialogues of a tap, free of I/O: read the card, then ask it for a cryptogram.

Each is a generator that yields command APDUs and is sent the card's responses; the till decides between
them. SELECT → GET PROCESSING OPTIONS → READ RECORDs (EMV 4.3 Book 3 §10.1, §10.2), then GENERATE AC.
Everything a card says is bounded, and whatever it says, only `InvalidCardData` or `CardNotSupported`
comes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from typing import Final, TypeVar

from pos_gateway.emv import apdu, application, tlv
from pos_gateway.emv.apdu import CryptogramKind
from pos_gateway.emv.note import LogEntry, parse_log
from pos_gateway.emv.schemes import scheme_of
from pos_gateway.errors import CardNotSupported, InvalidCardData

MAX_RECORDS: Final = 32
MAX_AFL_ENTRIES: Final = 8
MAX_SFI: Final = 10
MAX_NOTE_BYTES: Final = 256

AIP_CDA: Final = 0x01
AIP_ON_DEVICE_CVM: Final = 0x02

_SELECTED_BUT_BLOCKED: Final = (0x6283, 0x6285)
_SIGNED_TAGS: Final = (0x5A, 0x5F34, 0x5F24, 0x5F25, 0x9F07, 0x9F42, 0x8C, 0x8D, 0x9F4A)
"""What our cards keep in the records that count for offline data authentication."""
_CERTIFICATE_TAGS: Final = (0x8F, 0x90, 0x9F32, 0x9F46, 0x9F47)
_OUR_CDOL1: Final = frozenset(tlv.parse_dol(application.CDOL1))
_OUR_CDOL2: Final = frozenset(tlv.parse_dol(application.CDOL2))

Result = TypeVar("Result")
Dialogue = Generator[bytes, bytes, Result]


@dataclass(frozen=True, slots=True)
class RecordRead:
    """One record: the whole answer to READ RECORD, and whether it counts for data authentication."""

    sfi: int
    number: int
    data: bytes = field(repr=False)
    authenticated: bool

    @property
    def signed_content(self) -> bytes:
        """The part that counts: for SFI 1 to 10 without the template's tag and length
        (EMV 4.3 Book 3 §10.3)."""
        if self.sfi > MAX_SFI:
            return self.data
        return self.data[2 if self.data[1] < 0x80 else 1 + 1 + (self.data[1] & 0x7F) :]


@dataclass(frozen=True, slots=True)
class CardRead:
    """What a card of ours told about itself; nothing of it is authenticated yet.

    `elements`: tag → value of all records. `cdol1`, `cdol2`: parsed. The repr shows no card data.
    """

    aid: bytes
    pdol_values: bytes = field(repr=False)
    aip: bytes
    afl: bytes
    note: bytes | None = field(repr=False)
    records: tuple[RecordRead, ...] = field(repr=False)
    elements: Mapping[int, bytes] = field(repr=False)
    cdol1: tuple[tlv.DolEntry, ...] = field(repr=False)
    cdol2: tuple[tlv.DolEntry, ...] = field(repr=False)

    @property
    def pan(self) -> str:
        """All digits. Never to be shown or logged: see `last4`."""
        return pan_digits(self.elements[0x5A])

    @property
    def last4(self) -> str:
        return self.pan[-4:]

    @property
    def psn(self) -> int:
        return int(self.elements[0x5F34].hex())

    @property
    def effective(self) -> date:
        return card_date(self.elements[0x5F25], 0x5F25)

    @property
    def expires(self) -> date:
        """The last day on which the card is valid."""
        return card_date(self.elements[0x5F24], 0x5F24)

    @property
    def currency_numeric(self) -> int:
        return int(self.elements[0x9F42].hex())

    @property
    def device_can_verify_holder(self) -> bool:
        """Is there on-device cardholder verification?"""
        return bool(self.aip[0] & AIP_ON_DEVICE_CVM)

    @property
    def static_data(self) -> bytes:
        """The static data to be authenticated (EMV 4.3 Book 3 §10.3), AIP last."""
        return b"".join([r.signed_content for r in self.records if r.authenticated]) + self.aip


@dataclass(frozen=True, slots=True)
class CryptogramAnswer:
    """The answer to GENERATE AC: `answer` is the whole template 77, `elements` its contents in order.

    `cdol2_values`: what the second GENERATE AC sent, when this answers that one; else empty.
    """

    cdol1_values: bytes = field(repr=False)
    answer: bytes = field(repr=False)
    elements: Mapping[int, bytes] = field(repr=False)
    cdol2_values: bytes = field(default=b"", repr=False)

    @property
    def sent(self) -> bytes:
        """All that this cryptogram covers of what GENERATE AC sent: CDOL1 values, then CDOL2 values."""
        return self.cdol1_values + self.cdol2_values

    @property
    def kind(self) -> CryptogramKind:
        """What the card says it gave; true only once authenticated."""
        return CryptogramKind(self.elements[0x9F27][0] & 0xC0)


def converse(dialogue: Dialogue[Result], transceive: Callable[[bytes], bytes]) -> Result:
    """Run a dialogue over a card channel; whatever `transceive` raises passes through."""
    try:
        command = next(dialogue)
        while True:
            command = dialogue.send(transceive(command))
    except StopIteration as finished:
        result: Result = finished.value
        return result
    finally:
        dialogue.close()


def read_card(terminal_elements: Mapping[int, bytes], aids: Sequence[bytes]) -> Dialogue[CardRead]:
    """Select our application, start it and read its records. Our AIDs are tried before the PPSE.

    `terminal_elements`: what the terminal can tell for the PDOL, tag → value.

    Raises:
        CardNotSupported: the card carries none of `aids`; nothing was read.
        InvalidCardData: an answer breaks the rules, or a status word refuses; names which command.
    """
    aid, pdol = yield from _select_application(aids)
    pdol_values = tlv.fill_dol(pdol, terminal_elements)

    data = yield from _ask(apdu.get_processing_options(pdol_values), "GET PROCESSING OPTIONS")
    options = _unique(_template(data, 0x77, "GET PROCESSING OPTIONS"), "GET PROCESSING OPTIONS")
    aip = _sized(options, 0x82, 2, "GET PROCESSING OPTIONS")
    afl = _required(options, 0x94, "GET PROCESSING OPTIONS")
    note = options.get(application.TAG_NOTE)
    if note is not None and len(note) > MAX_NOTE_BYTES:
        raise InvalidCardData(f"{len(note)} bytes, at most {MAX_NOTE_BYTES} are read", where="tag DF01")
    _check_aip(aip)

    records = []
    for sfi, number, authenticated in parse_afl(afl):
        data = yield from _ask(apdu.read_record(sfi, number), f"record {sfi}.{number}")
        records.append(RecordRead(sfi, number, data, authenticated))
    return card_from_records(aid, pdol_values, aip, afl, tuple(records), note=note)


def request_cryptogram(
    card: CardRead, elements: Mapping[int, bytes], kind: CryptogramKind
) -> Dialogue[CryptogramAnswer]:
    """Ask for a cryptogram over `elements`, as the card's CDOL1 wants them; TC and ARQC with CDA.

    Raises:
        InvalidCardData: the answer breaks the rules, gives more than was asked for, or a status word
            refuses.
    """
    values = tlv.fill_dol(card.cdol1, elements)
    cda = kind is not CryptogramKind.AAC
    data = yield from _ask(apdu.generate_ac(kind, values, cda=cda), "GENERATE AC")
    answer = cryptogram_answer(values, data)
    # A card may give less than it is asked for, never more (EMV 4.3 Book 3 §9.3).
    rank = (CryptogramKind.AAC, CryptogramKind.ARQC, CryptogramKind.TC)
    if rank.index(answer.kind) > rank.index(kind):
        raise InvalidCardData(f"{answer.kind.name} given where {kind.name} was asked", where="GENERATE AC")
    return answer


def request_second_cryptogram(
    card: CardRead, first: CryptogramAnswer, elements: Mapping[int, bytes]
) -> Dialogue[CryptogramAnswer]:
    """After an ARQC, the second GENERATE AC: ask for a TC over `elements`, as the card's CDOL2 wants them
    (EMV 4.3 Book 3 §10.11). A card decides once more: it may give an AAC.

    Raises:
        InvalidCardData: the answer breaks the rules, is neither TC nor AAC, or a status word refuses.
    """
    values = tlv.fill_dol(card.cdol2, elements)
    data = yield from _ask(apdu.generate_ac(CryptogramKind.TC, values, cda=True), "second GENERATE AC")
    answer = cryptogram_answer(first.cdol1_values, data, values)
    if answer.kind is CryptogramKind.ARQC:
        raise InvalidCardData("ARQC given a second time", where="second GENERATE AC")
    return answer


def write_note(data: bytes) -> Dialogue[None]:
    """Hand the card a note with its issuer's MAC (`note.command_data`).

    Raises:
        InvalidCardData: the card refuses it.
    """
    yield from _ask(apdu.put_note(data), "PUT DATA")


def read_log() -> Dialogue[tuple[LogEntry, ...]]:
    """The card's short log, oldest first. Nothing signs it: it is a hint where gaps come from, never
    evidence. A card gives it only in a session in which it has given a TC, its counter in clear.

    Raises:
        InvalidCardData: no log, or one that breaks the rules.
    """
    data = yield from _ask(apdu.get_log(), "GET DATA")
    objects = tlv.parse(data, where="GET DATA")
    if len(objects) != 1 or objects[0].tag != application.TAG_LOG:
        raise InvalidCardData("must be one log", where="GET DATA")
    return parse_log(objects[0].value)


def card_from_records(
    aid: bytes,
    pdol_values: bytes,
    aip: bytes,
    afl: bytes,
    records: tuple[RecordRead, ...],
    *,
    note: bytes | None = None,
) -> CardRead:
    """Bring a card's answers together and hold them to our data sheet.

    Raises:
        InvalidCardData: names the record or tag.
    """
    _check_aip(aip)
    if tuple([(r.sfi, r.number, r.authenticated) for r in records]) != parse_afl(afl):
        raise InvalidCardData("the records are not those that the AFL lists", where="tag 94")
    elements: dict[int, bytes] = {}
    signed: set[int] = set()
    for record in records:
        found = record_elements(record)
        if not elements.keys().isdisjoint(found):
            tag = min(elements.keys() & found.keys())
            raise InvalidCardData(f"tag {tag:X} stands in two records", where=_place(record))
        elements.update(found)
        if record.authenticated:
            signed.update(found)
    for tag in _CERTIFICATE_TAGS:
        _required(elements, tag, "records")
    for tag in _SIGNED_TAGS:
        _required(elements, tag, "records")
        if tag not in signed:
            raise InvalidCardData("stands outside the authenticated records", where=f"tag {tag:X}")
    if elements[0x9F4A] != b"\x82":
        raise InvalidCardData("must name the AIP and nothing else", where="tag 9F4A")
    if len(pan_digits(elements[0x5A])) != 16:
        raise InvalidCardData("a PAN of ours has 16 digits", where="tag 5A")
    card_date(elements[0x5F24], 0x5F24)
    card_date(elements[0x5F25], 0x5F25)
    for tag, length in ((0x5F34, 1), (0x9F42, 2)):
        if len(elements[tag]) != length or not elements[tag].hex().isdecimal():
            raise InvalidCardData(f"must be {2 * length} digits", where=f"tag {tag:X}")
    cdol1, cdol2 = _cdol1(elements[0x8C]), _cdol2(elements[0x8D])
    return CardRead(aid, pdol_values, aip, afl, note, records, elements, cdol1, cdol2)


def cryptogram_answer(cdol1_values: bytes, answer: bytes, cdol2_values: bytes = b"") -> CryptogramAnswer:
    """Read the answer to GENERATE AC (EMV 4.3 Book 3 §6.5.5.4, format 2).

    Raises:
        InvalidCardData: names the tag that is missing or wrong.
    """
    where = "GENERATE AC"
    elements = _unique(_template(answer, 0x77, where), where)
    cid = _sized(elements, 0x9F27, 1, where)[0]
    _sized(elements, 0x9F36, 2, where)
    if cid & 0xC0 == 0xC0:
        raise InvalidCardData("reserved cryptogram type", where="tag 9F27")
    if cid & 0xC0 == CryptogramKind.AAC.value and 0x9F4B not in elements:
        _sized(elements, 0x9F26, 8, where)
    else:
        _required(elements, 0x9F4B, where)
    return CryptogramAnswer(cdol1_values, answer, elements, cdol2_values)


@lru_cache(maxsize=64)  # cards of one issuer all have the same
def parse_afl(afl: bytes) -> tuple[tuple[int, int, bool], ...]:
    """SFI, record number and "counts for data authentication", in the order of reading
    (EMV 4.3 Book 3 §10.2).

    Raises:
        InvalidCardData: names the entry.
    """
    if len(afl) % 4 or not afl or len(afl) > 4 * MAX_AFL_ENTRIES:
        raise InvalidCardData(
            f"{len(afl)} bytes are no AFL of 1 to {MAX_AFL_ENTRIES} entries", where="tag 94"
        )
    wanted: list[tuple[int, int, bool]] = []
    for at in range(0, len(afl), 4):
        first_byte, first, last, signed = afl[at : at + 4]
        sfi, where = first_byte >> 3, f"tag 94, byte {at}"
        if first_byte & 7 or not 1 <= sfi <= MAX_SFI:
            raise InvalidCardData(f"SFI must be 1 to {MAX_SFI}", where=where)
        if not 1 <= first <= last or signed > last - first + 1:
            raise InvalidCardData("record numbers contradict each other", where=where)
        if len(wanted) + last - first + 1 > MAX_RECORDS:
            raise InvalidCardData(f"more than {MAX_RECORDS} records", where=where)
        wanted += [(sfi, number, number < first + signed) for number in range(first, last + 1)]
    if len({(sfi, number) for sfi, number, _ in wanted}) != len(wanted):
        raise InvalidCardData("a record is listed twice", where="tag 94")
    return tuple(wanted)


def record_elements(record: RecordRead) -> dict[int, bytes]:
    """Tag → value of one record, which must be a template 70 (EMV 4.3 Book 3 §6.5.11.4).

    Raises:
        InvalidCardData: names the record.
    """
    where = _place(record)
    return _unique(_template(record.data, 0x70, where), where)


def pan_digits(value: bytes) -> str:
    """The digits of tag 5A: compressed numeric, padded with F.

    Raises:
        InvalidCardData: not 12 to 19 digits.
    """
    digits = value.hex().rstrip("f")
    if not digits.isdecimal() or not 12 <= len(digits) <= 19 or 2 * len(value) - len(digits) > 1:
        raise InvalidCardData("not 12 to 19 digits", where="tag 5A")
    return digits


def card_date(value: bytes, tag: int) -> date:
    """YYMMDD as a date; years from 50 on belong to the 1900s (EMV 4.3 Book 4 §6.7.3).

    Raises:
        InvalidCardData: no date.
    """
    try:
        digits = value.hex()
        if len(digits) != 6 or not digits.isdecimal():
            raise ValueError
        year = int(digits[:2])
        return date(year + (1900 if year >= 50 else 2000), int(digits[2:4]), int(digits[4:]))
    except ValueError:
        raise InvalidCardData("not a date YYMMDD", where=f"tag {tag:X}") from None


@lru_cache(maxsize=64)
def _cdol1(value: bytes) -> tuple[tlv.DolEntry, ...]:
    """A CDOL1 that asks for all of ours: with a poorer one, a TC would bind less."""
    cdol1 = tlv.parse_dol(value, where="tag 8C")
    if not _OUR_CDOL1.issubset(cdol1):
        tag = min(_OUR_CDOL1.difference(cdol1)).tag
        raise InvalidCardData(f"does not ask for tag {tag:X} in full", where="tag 8C")
    return cdol1


@lru_cache(maxsize=64)
def _cdol2(value: bytes) -> tuple[tlv.DolEntry, ...]:
    """A CDOL2 that asks for all of ours: a grant must be bound, too."""
    cdol2 = tlv.parse_dol(value, where="tag 8D")
    if not _OUR_CDOL2.issubset(cdol2):
        tag = min(_OUR_CDOL2.difference(cdol2)).tag
        raise InvalidCardData(f"does not ask for tag {tag:X} in full", where="tag 8D")
    return cdol2


def _select_application(aids: Sequence[bytes]) -> Dialogue[tuple[bytes, tuple[tlv.DolEntry, ...]]]:
    """The DF name of the application selected, and its PDOL."""
    for aid in aids:
        response = yield from _exchange(apdu.select(aid), "SELECT")
        if response.sw == apdu.SW_OK:
            return _selected(response.data, aid)
        if response.sw in _SELECTED_BUT_BLOCKED:
            raise CardNotSupported("the application on this card is blocked")

    response = yield from _exchange(apdu.select(application.PPSE), "SELECT PPSE")
    if response.sw != apdu.SW_OK:
        raise CardNotSupported("this card carries no application of ours")
    listed = _directory(response.data)
    for candidate in listed:
        aid = next((aid for aid in aids if candidate.startswith(aid)), b"")
        # Tried already when it is one of ours to the letter.
        if aid and candidate not in aids:
            response = yield from _exchange(apdu.select(candidate), "SELECT")
            if response.sw == apdu.SW_OK:
                return _selected(response.data, candidate)
    scheme = scheme_of(listed)
    whose = f"it is a {scheme} card" if scheme else "it carries no application of ours"
    raise CardNotSupported(f"this card is not supported: {whose}", scheme=scheme)


@lru_cache(maxsize=64)  # all cards of an application answer the same
def _selected(data: bytes, aid: bytes) -> tuple[bytes, tuple[tlv.DolEntry, ...]]:
    fci = _template(data, 0x6F, "SELECT")
    name = _child(fci, 0x84, "FCI").value
    if not name.startswith(aid):
        raise InvalidCardData("another application answered than was selected", where="tag 84")
    if len(name) > 16:
        raise InvalidCardData(f"{len(name)} bytes are no AID", where="tag 84")
    proprietary = _unique(_child(fci, 0xA5, "FCI").children, "FCI, tag A5")
    return name, tlv.parse_dol(proprietary.get(0x9F38, b""), where="tag 9F38")


def _directory(data: bytes) -> list[bytes]:
    """The AIDs that a PPSE lists, by priority (EMV Contactless Book B §3.3)."""
    proprietary = _child(_template(data, 0x6F, "PPSE"), 0xA5, "PPSE")
    listed = []
    for entry in _child(proprietary.children, 0xBF0C, "PPSE").children:
        if entry.tag != 0x61:
            continue
        elements = _unique(entry.children, "PPSE, tag 61")
        aid = _required(elements, 0x4F, "PPSE, tag 61")
        if not 5 <= len(aid) <= 16:
            raise InvalidCardData(f"{len(aid)} bytes are no AID", where="PPSE, tag 4F")
        priority = elements.get(0x87, b"")[:1] or b"\0"
        listed.append((priority[0] & 0x0F or 16, aid))
    return [aid for _, aid in sorted(listed, key=lambda item: item[0])]


def _ask(command: apdu.Command, where: str) -> Dialogue[bytes]:
    """The data of an answer that must be 9000."""
    response = yield from _exchange(command, where)
    if response.sw != apdu.SW_OK:
        raise InvalidCardData(f"the card answers {apdu.status_name(response.sw)}", where=where)
    return response.data


def _exchange(command: apdu.Command, where: str) -> Dialogue[apdu.Response]:
    """Send a command; 6Cxx and 61xx (EMV 4.3 Book 1 §9.2.2.3.1) are followed once each, no further."""
    response = apdu.Response.from_bytes((yield command.to_bytes()), where=where)
    if response.sw >> 8 == 0x6C:
        again = apdu.Command(
            command.cla, command.ins, command.p1, command.p2, command.data, response.sw & 0xFF or 256
        )
        response = apdu.Response.from_bytes((yield again.to_bytes()), where=where)
    if response.sw >> 8 == 0x61:
        rest = apdu.get_response(response.sw & 0xFF)
        more = apdu.Response.from_bytes((yield rest.to_bytes()), where=where)
        response = apdu.Response(response.data + more.data, more.sw)
    return response


def _template(data: bytes, tag: int, where: str) -> tuple[tlv.Tlv, ...]:
    """The contents of the one template that `data` must be."""
    objects = tlv.parse(data, where=where)
    if len(objects) != 1 or objects[0].tag != tag:
        raise InvalidCardData(f"must be one template {tag:X}", where=where)
    return objects[0].children


def _unique(objects: Sequence[tlv.Tlv], where: str) -> dict[int, bytes]:
    elements = {child.tag: child.value for child in objects}
    if len(elements) != len(objects):
        raise InvalidCardData("a tag stands here twice", where=where)
    return elements


def _child(objects: Sequence[tlv.Tlv], tag: int, where: str) -> tlv.Tlv:
    found = [child for child in objects if child.tag == tag]
    if len(found) != 1:
        raise InvalidCardData(f"tag {tag:X} stands here {len(found)} times, must be once", where=where)
    return found[0]


def _required(elements: Mapping[int, bytes], tag: int, where: str) -> bytes:
    value = elements.get(tag)
    if value is None:
        raise InvalidCardData(f"tag {tag:X} is missing", where=where)
    return value


def _sized(elements: Mapping[int, bytes], tag: int, length: int, where: str) -> bytes:
    value = _required(elements, tag, where)
    if len(value) != length:
        raise InvalidCardData(f"{len(value)} bytes, expected {length}", where=f"{where}, tag {tag:X}")
    return value


def _check_aip(aip: bytes) -> None:
    if len(aip) != 2:
        raise InvalidCardData(f"{len(aip)} bytes, expected 2", where="tag 82")
    if not aip[0] & AIP_CDA:
        raise InvalidCardData("the card does not support CDA", where="tag 82")


def _place(record: RecordRead) -> str:
    return f"record {record.sfi}.{record.number}"
