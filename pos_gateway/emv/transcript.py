"""One dialogue with a card, saved so that it can be verified again without the card.

Two forms: JSON, in which captures from anywhere can be written down (docs/transcript-format.md), whole
or in part; and a compact binary one of a whole dialogue with a card of ours, which is the proof that a
gateway seals to the ledger.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from enum import Enum
from typing import Any, Final

from pos_gateway.emv import application, authentication, tlv
from pos_gateway.emv.authentication import CaPublicKey, IccCertificate, IssuerCertificate
from pos_gateway.emv.dialogue import (
    MAX_SFI,
    CardRead,
    CryptogramAnswer,
    RecordRead,
    card_date,
    card_from_records,
    cryptogram_answer,
    pan_digits,
    parse_afl,
    record_elements,
)
from pos_gateway.errors import AuthenticationFailed, InvalidCardData, InvalidInput, InvalidMessage

FORMAT: Final = "pos-gateway transcript 1"
STEP_CARD_DATA: Final = "card data"
STEP_DDA: Final = "dynamic data"
STEP_APPLICATION: Final = "application"

_MAGIC: Final = b"PGT1"
_MAGIC_SECOND: Final = b"PGT2"
"""Of a dialogue that ended with a second GENERATE AC."""
_MAX_FIELD_BYTES: Final = 4096
_MAX_RECORDS: Final = 64
_BYTE_FIELDS: Final = (
    "aid",
    "aip",
    "afl",
    "pdol_values",
    "static_data",
    "cdol1_values",
    "cdol2_values",
    "unpredictable_number",
    "answer",
    "ddol_values",
    "signed_dynamic_data",
)


class StepStatus(Enum):
    OK = "ok"
    FAILED = "failed"
    NOT_COVERED = "not_covered"


@dataclass(frozen=True, slots=True)
class VerificationStep:
    """What became of one check: `detail` says why it failed, or what was missing to make it."""

    name: str
    status: StepStatus
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """What was sent and answered. A part that was not captured is None or empty.

    `elements` are data elements whose records were not captured, `static_data` the static data to be
    authenticated where the records they come from were not, AIP included. `answer` is the template 77
    of GENERATE AC; `cdol2_values` are given when it answers the second one. `unpredictable_number` is
    needed only where CDOL1 is not known. `ddol_values` and `signed_dynamic_data` (9F4B) are those of
    INTERNAL AUTHENTICATE.
    """

    aid: bytes | None = None
    aip: bytes | None = None
    afl: bytes | None = None
    pdol_values: bytes | None = field(default=None, repr=False)
    records: tuple[RecordRead, ...] = ()
    elements: Mapping[int, bytes] = field(default_factory=dict, repr=False)
    static_data: bytes | None = field(default=None, repr=False)
    cdol1_values: bytes | None = field(default=None, repr=False)
    cdol2_values: bytes | None = field(default=None, repr=False)
    unpredictable_number: bytes | None = field(default=None, repr=False)
    answer: bytes | None = field(default=None, repr=False)
    ddol_values: bytes | None = field(default=None, repr=False)
    signed_dynamic_data: bytes | None = field(default=None, repr=False)
    ca_key: CaPublicKey | None = None

    @classmethod
    def of(
        cls, card: CardRead, answer: CryptogramAnswer | None = None, *, ca_key: CaPublicKey | None = None
    ) -> Transcript:
        """The transcript of a dialogue with a card of ours."""
        return cls(
            aid=card.aid,
            aip=card.aip,
            afl=card.afl,
            pdol_values=card.pdol_values,
            records=card.records,
            cdol1_values=answer.cdol1_values if answer else None,
            cdol2_values=answer.cdol2_values or None if answer else None,
            answer=answer.answer if answer else None,
            ca_key=ca_key,
        )

    def card(self) -> CardRead:
        """The card that a whole transcript tells of, held to our data sheet.

        Raises:
            InvalidCardData: not a card of ours, or not all of it was captured.
        """
        if self.aid is None or self.aip is None or self.afl is None or self.pdol_values is None:
            raise InvalidCardData("AID, AIP, AFL and PDOL values are needed", where="transcript")
        if not self.aid.startswith(application.AID):
            raise InvalidCardData("not an application of ours", where="transcript, AID")
        return card_from_records(self.aid, self.pdol_values, self.aip, self.afl, self.records)

    def cryptogram_answer(self) -> CryptogramAnswer:
        """
        Raises:
            InvalidCardData: CDOL1 values or answer were not captured, or the answer breaks the rules.
        """
        if self.cdol1_values is None or self.answer is None:
            raise InvalidCardData("CDOL1 values and answer are needed", where="transcript")
        return cryptogram_answer(self.cdol1_values, self.answer, self.cdol2_values or b"")

    def to_bytes(self) -> bytes:
        """`PGT1`, then AID, AIP, AFL, PDOL values, CDOL1 values, answer and the records in the order of
        the AFL, each as a two-byte length and its bytes. `PGT2`, when the answer is that to the second
        GENERATE AC: then the CDOL2 values stand before it.

        Raises:
            InvalidInput: the dialogue is not complete; only a whole one has this form.
        """
        second = self.cdol2_values
        parts = [self.aid, self.aip, self.afl, self.pdol_values, self.cdol1_values]
        parts += [self.answer] if second is None else [second, self.answer]
        fields = [part for part in parts if part is not None]
        if len(fields) != len(parts) or not self.records:
            raise InvalidInput("only a complete dialogue has a binary form", where="transcript")
        fields += [record.data for record in self.records]
        return (_MAGIC if second is None else _MAGIC_SECOND) + b"".join(
            [len(part).to_bytes(2, "big") + part for part in fields]
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Transcript:
        """
        Raises:
            InvalidMessage: not this form.
            InvalidCardData: the AFL in it is none.
        """
        if data[:4] not in (_MAGIC, _MAGIC_SECOND):
            raise InvalidMessage("not a transcript", where="byte 0")
        second = int(data[:4] == _MAGIC_SECOND)
        fields: list[bytes] = []
        at = 4
        while at < len(data):
            length = int.from_bytes(data[at : at + 2], "big")
            if at + 2 + length > len(data) or len(fields) == 6 + second + _MAX_RECORDS:
                raise InvalidMessage("cut off, or too many fields", where=f"byte {at}")
            fields.append(data[at + 2 : at + 2 + length])
            at += 2 + length
        if len(fields) < 7 + second:
            raise InvalidMessage(f"{len(fields)} fields, expected at least {7 + second}", where=f"byte {at}")
        cdol2_values = fields.pop(5) if second else None
        aid, aip, afl, pdol_values, cdol1_values, answer, *contents = fields
        places = parse_afl(afl)
        if len(places) != len(contents):
            raise InvalidMessage(f"{len(contents)} records, the AFL lists {len(places)}", where=f"byte {at}")
        return cls(
            aid=aid,
            aip=aip,
            afl=afl,
            pdol_values=pdol_values,
            cdol1_values=cdol1_values,
            cdol2_values=cdol2_values,
            answer=answer,
            records=tuple(
                RecordRead(sfi, number, content, signed)
                for (sfi, number, signed), content in zip(places, contents, strict=True)
            ),
        )

    def to_json(self) -> str:
        """The documented JSON form. It holds the full token number: handle it like the card itself."""
        out: dict[str, Any] = {"format": FORMAT}
        if self.ca_key is not None:
            key = self.ca_key
            out["ca_key"] = {
                "rid": key.rid.hex().upper(),
                "index": f"{key.index:02X}",
                "modulus": f"{key.modulus:X}".zfill(2 * key.size),
                "exponent": key.exponent,
            }
        for name in _BYTE_FIELDS:
            value = getattr(self, name)
            if value is not None:
                out[name] = value.hex().upper()
        if self.records:
            out["records"] = [
                {
                    "sfi": record.sfi,
                    "record": record.number,
                    "authenticated": record.authenticated,
                    "data": record.data.hex().upper(),
                }
                for record in self.records
            ]
        if self.elements:
            out["elements"] = {f"{tag:X}": value.hex().upper() for tag, value in self.elements.items()}
        return json.dumps(out, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Transcript:
        """
        Raises:
            InvalidMessage: names the field that is missing, unknown or of the wrong kind.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError):
            raise InvalidMessage("not JSON", where="transcript") from None
        if not isinstance(raw, dict):
            raise InvalidMessage("not a JSON object", where="transcript")
        if raw.pop("format", None) != FORMAT:
            raise InvalidMessage(f"must be {FORMAT!r}", where="transcript field format")
        parts: dict[str, Any] = {name: _hex(raw.pop(name), name) for name in _BYTE_FIELDS if name in raw}
        if "ca_key" in raw:
            parts["ca_key"] = _ca_key(raw.pop("ca_key"))
        records = raw.pop("records", [])
        if not isinstance(records, list) or len(records) > _MAX_RECORDS:
            raise InvalidMessage(
                f"must be a list of at most {_MAX_RECORDS}", where="transcript field records"
            )
        parts["records"] = tuple(_record(record, f"records[{i}]") for i, record in enumerate(records))
        parts["elements"] = {
            int.from_bytes(_hex(tag, "elements"), "big"): _hex(value, f"elements.{tag[:6]}")
            for tag, value in _object(raw.pop("elements", {}), "elements").items()
        }
        if raw:
            raise InvalidMessage("unknown field", where=f"transcript field {str(min(raw))[:32]}")
        return cls(**parts)


def verify_transcript(
    transcript: Transcript, ca_keys: Sequence[CaPublicKey] = (), *, today: date | None = None
) -> list[VerificationStep]:
    """Check a transcript as far as it goes, every step in order.

    The CAPK is looked for in `ca_keys` if any are given, and only there; else the transcript's own is
    taken. Expiry is judged for `today`, by default the transaction date (9A) that the card signed.
    """
    return _Verification(transcript, ca_keys, today).run()


class _Verification:
    """The steps of one verification, each using what the ones before it recovered."""

    def __init__(self, transcript: Transcript, ca_keys: Sequence[CaPublicKey], today: date | None) -> None:
        self.transcript = transcript
        self.ca_keys = ca_keys
        self.today = today
        self.elements: dict[int, bytes] = dict(transcript.elements)
        self.answer: CryptogramAnswer | None = None
        self.bound: dict[int, bytes] = {}
        self.ca_key: CaPublicKey | None = None
        self.issuer: IssuerCertificate | None = None
        self.icc: IccCertificate | None = None
        self.dynamic: authentication.DynamicData | None = None

    def run(self) -> list[VerificationStep]:
        steps: tuple[tuple[str, Callable[[], str]], ...] = (
            (STEP_CARD_DATA, self._card_data),
            (authentication.STEP_CA_KEY, self._ca_key),
            (authentication.STEP_ISSUER, self._issuer),
            (authentication.STEP_ICC, self._icc),
            (authentication.STEP_STATIC_DATA, self._static_data),
            (authentication.STEP_EXPIRY, self._expiry),
            (authentication.STEP_SDAD, self._sdad),
            (authentication.STEP_CID, self._cid),
            (authentication.STEP_TRANSACTION_DATA, self._transaction_data),
            (STEP_DDA, self._dda),
            (STEP_APPLICATION, self._application),
        )
        outcomes: list[VerificationStep] = []
        for name, check in steps:
            if outcomes and outcomes[0].status is StepStatus.FAILED:
                check = self._unreadable
            outcomes.append(_outcome(name, check))
        return outcomes

    def _unreadable(self) -> str:
        raise _NotCoveredError("readable card data")

    def _card_data(self) -> str:
        transcript = self.transcript
        if transcript.afl is not None and transcript.records:
            places = tuple([(r.sfi, r.number, r.authenticated) for r in transcript.records])
            if places != parse_afl(transcript.afl):
                raise InvalidCardData("the records are not those that the AFL lists", where="afl")
        for record in transcript.records:
            if record.sfi > MAX_SFI:
                continue
            for tag, value in record_elements(record).items():
                if self.elements.setdefault(tag, value) != value:
                    raise InvalidCardData(f"tag {tag:X} has two values", where=f"record {record.sfi}")
        if transcript.aip is not None and self.elements.setdefault(0x82, transcript.aip) != transcript.aip:
            raise InvalidCardData("tag 82 has two values", where="aip")
        if transcript.cdol1_values is not None and 0x8C in self.elements:
            cdol1 = tlv.parse_dol(self.elements[0x8C], where="tag 8C")
            self.bound = tlv.split_dol(cdol1, transcript.cdol1_values, where="cdol1_values")
        if transcript.answer is not None:
            self.answer = cryptogram_answer(
                transcript.cdol1_values or b"", transcript.answer, transcript.cdol2_values or b""
            )
        return ""

    def _ca_key(self) -> str:
        if self.ca_keys:
            if self.transcript.aid is None:
                raise _NotCoveredError("the AID, which says whose CA key is meant")
            key = authentication.find_ca_key(self.transcript.aid[:5], self._need(0x8F), self.ca_keys)
        elif self.transcript.ca_key is not None:
            key = self.transcript.ca_key
            rid = self.transcript.aid[:5] if self.transcript.aid is not None else key.rid
            index = self.elements.get(0x8F, bytes([key.index]))
            key = authentication.find_ca_key(rid, index, [key])
        else:
            raise _NotCoveredError("a CA key")
        self.ca_key = key
        return "" if self.ca_keys else "taken from the transcript itself"

    def _issuer(self) -> str:
        if self.ca_key is None:
            raise _NotCoveredError("a CA key")
        self._need(0x90), self._need(0x9F32)
        issuer = authentication.recover_issuer_certificate(self.ca_key, self.elements)
        if 0x5A in self.elements:
            authentication.check_issuer_identifier(issuer, pan_digits(self.elements[0x5A]))
        self.issuer = issuer
        return "" if 0x5A in self.elements else "the PAN was not captured to compare it with"

    def _icc(self) -> str:
        if self.issuer is None:
            raise _NotCoveredError("the issuer's key")
        self._need(0x9F46), self._need(0x9F47), self._need(0x5A)
        self.icc = authentication.recover_icc_certificate(self.issuer.key, self.elements)
        return ""

    def _static_data(self) -> str:
        if self.icc is None:
            raise _NotCoveredError("the ICC certificate")
        authentication.check_static_data(self.icc, self._signed_static_data())
        return ""

    def _signed_static_data(self) -> bytes:
        transcript = self.transcript
        if transcript.static_data is not None:
            return transcript.static_data
        signed = [record.signed_content for record in transcript.records if record.authenticated]
        if not signed:
            raise _NotCoveredError("the records that count for data authentication")
        tag_list = self.elements.get(0x9F4A)
        if tag_list is None:
            return b"".join(signed)
        if tag_list != b"\x82":
            raise InvalidCardData("must name the AIP and nothing else", where="tag 9F4A")
        return b"".join(signed) + self._need(0x82)

    def _expiry(self) -> str:
        if self.icc is None or self.issuer is None:
            raise _NotCoveredError("the certificates")
        today = self.today
        if today is None:
            today = card_date(self.bound[0x9A], 0x9A) if 0x9A in self.bound else None
        if today is None:
            raise _NotCoveredError("the day to judge for")
        dates = {
            tag: card_date(self.elements[tag], tag) if tag in self.elements else None
            for tag in (0x5F24, 0x5F25)
        }
        authentication.check_expiry(
            today,
            ca_key=self.ca_key,
            issuer=self.issuer,
            icc=self.icc,
            effective=dates[0x5F25],
            expires=dates[0x5F24],
        )
        return f"on {today.isoformat()}"

    def _sdad(self) -> str:
        if self.answer is None:
            raise _NotCoveredError("the answer to GENERATE AC")
        signature = self.answer.elements.get(0x9F4B)
        if signature is None:
            raise _NotCoveredError("a signature: this cryptogram has none")
        if self.icc is None:
            raise _NotCoveredError("the card's key")
        number = self.transcript.unpredictable_number
        number = self.bound.get(0x9F37) if number is None else number
        if number is None:
            raise _NotCoveredError("the unpredictable number")
        dynamic = authentication.recover_dynamic_data(self.icc.key, signature, number)
        if self.answer.elements.get(0x9F26, dynamic.ac) != dynamic.ac:
            raise AuthenticationFailed("the cryptogram beside it is another", step=authentication.STEP_SDAD)
        self.dynamic = dynamic
        return f"{self.answer.kind.name} signed"

    def _cid(self) -> str:
        if self.dynamic is None or self.answer is None:
            raise _NotCoveredError("the signed dynamic data")
        authentication.check_cid(self.dynamic, self.answer.elements)
        return ""

    def _transaction_data(self) -> str:
        transcript = self.transcript
        if self.dynamic is None or self.answer is None:
            raise _NotCoveredError("the signed dynamic data")
        if transcript.pdol_values is None or transcript.cdol1_values is None:
            raise _NotCoveredError("the values sent for PDOL and CDOL1")
        sent = transcript.pdol_values + transcript.cdol1_values + (transcript.cdol2_values or b"")
        authentication.check_transaction_data(self.dynamic, sent, self.answer.elements)
        return ""

    def _dda(self) -> str:
        transcript = self.transcript
        if transcript.signed_dynamic_data is None or transcript.ddol_values is None:
            raise _NotCoveredError("an answer to INTERNAL AUTHENTICATE and the values sent for DDOL")
        if self.icc is None:
            raise _NotCoveredError("the card's key")
        authentication.recover_signed_dynamic_data(
            self.icc.key, transcript.signed_dynamic_data, transcript.ddol_values
        )
        return ""

    def _application(self) -> str:
        aid = self.transcript.aid
        if aid is None or aid[:5] != application.RID:
            raise _NotCoveredError("an application of ours")
        self.transcript.card()
        if self.transcript.answer is not None:
            answer = self.transcript.cryptogram_answer()
            application.Iad.from_bytes(answer.elements.get(0x9F10, b""))
        return ""

    def _need(self, tag: int) -> bytes:
        try:
            return self.elements[tag]
        except KeyError:
            raise _NotCoveredError(f"tag {tag:X}") from None


class _NotCoveredError(Exception):
    """A step could not be made: what was missing."""


def _outcome(name: str, check: Callable[[], str]) -> VerificationStep:
    try:
        return VerificationStep(name, StepStatus.OK, check())
    except _NotCoveredError as missing:
        return VerificationStep(name, StepStatus.NOT_COVERED, f"not there: {missing}")
    except (AuthenticationFailed, InvalidInput) as error:
        return VerificationStep(name, StepStatus.FAILED, error.reason)


def authentic(steps: Iterable[VerificationStep]) -> bool:
    """Did nothing fail, and was a cryptogram or a dynamic signature verified down to its data?"""
    states = {step.name: step.status for step in steps}
    proven = (
        states.get(authentication.STEP_TRANSACTION_DATA) is StepStatus.OK
        or states.get(STEP_DDA) is StepStatus.OK
    )
    static = states.get(authentication.STEP_STATIC_DATA) is StepStatus.OK
    return proven and static and StepStatus.FAILED not in states.values()


def _ca_key(raw: object) -> CaPublicKey:
    fields = dict(_object(raw, "ca_key"))
    try:
        rid = _hex(fields.pop("rid"), "ca_key.rid")
        index = _hex(fields.pop("index"), "ca_key.index")
        modulus = _hex(fields.pop("modulus"), "ca_key.modulus")
        exponent = fields.pop("exponent")
    except KeyError as error:
        raise InvalidMessage("is missing", where=f"transcript field ca_key.{error.args[0]}") from None
    if len(rid) != 5 or len(index) != 1 or not modulus or modulus[0] == 0:
        raise InvalidMessage("RID 5 bytes, index 1, modulus without zeros", where="transcript field ca_key")
    if exponent not in authentication.EXPONENTS or fields:
        raise InvalidMessage("exponent 3 or 65537, nothing else", where="transcript field ca_key")
    return CaPublicKey(rid, index[0], int.from_bytes(modulus, "big"), int(exponent))


def _record(raw: object, where: str) -> RecordRead:
    fields = _object(raw, where)
    if set(fields) != {"sfi", "record", "authenticated", "data"}:
        raise InvalidMessage("must have sfi, record, authenticated, data", where=f"transcript field {where}")
    sfi, number, authenticated = fields["sfi"], fields["record"], fields["authenticated"]
    if type(sfi) is not int or type(number) is not int or type(authenticated) is not bool:
        raise InvalidMessage("wrong kind", where=f"transcript field {where}")
    if not 1 <= sfi <= 30 or not 1 <= number <= 255:
        raise InvalidMessage("SFI 1 to 30, record 1 to 255", where=f"transcript field {where}")
    return RecordRead(sfi, number, _hex(fields["data"], f"{where}.data"), authenticated)


def _object(raw: object, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise InvalidMessage("must be an object", where=f"transcript field {where}")
    return raw


def _hex(raw: object, where: str) -> bytes:
    try:
        if not isinstance(raw, str):
            raise ValueError
        value = bytes.fromhex(raw)
    except ValueError:
        raise InvalidMessage("must be hexadecimal text", where=f"transcript field {where}") from None
    if len(value) > _MAX_FIELD_BYTES:
        raise InvalidMessage(f"more than {_MAX_FIELD_BYTES} bytes", where=f"transcript field {where}")
    return value
