"""A card at APDU level: real keys, real cryptograms, a counter that survives the power.

`VirtualCard` is our application (data sheet: `emv.application`) as a careful card implements it. The
others are cards that are not ours. A transport (`lab.vpcd`) holds any of them into a field.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Final

import gmpy2

from pos_gateway.emv import tlv
from pos_gateway.emv.apdu import (
    CDA_REQUESTED,
    INS_GENERATE_AC,
    INS_GET_DATA,
    INS_GET_PROCESSING_OPTIONS,
    INS_PUT_DATA,
    INS_READ_RECORD,
    INS_SELECT,
    SW_FILE_NOT_FOUND,
    SW_OK,
    TAG_COMMAND_TEMPLATE,
    Command,
    CryptogramKind,
    Response,
)
from pos_gateway.emv.application import (
    AID,
    CDOL1,
    CDOL2,
    MAX_COUNTER,
    PDOL,
    PPSE,
    TAG_CEILING,
    TAG_LOG,
    TAG_NOTE,
    Iad,
    clear_counter_field,
    cvr,
    previous_digest,
)
from pos_gateway.emv.cryptogram import application_cryptogram, encipher_counter
from pos_gateway.emv.note import encode_log, take_note_data
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.errors import AuthenticationFailed, InvalidInput
from pos_gateway.lab.card_state import CardState, StoredAnswer

VISA_AID: Final = bytes.fromhex("A0000000031010")
"""What a scheme card's directory lists; here to be refused."""

_SW_WRONG_LENGTH: Final = 0x6700
_SW_SECURITY_STATUS: Final = 0x6982
_SW_CONDITIONS: Final = 0x6985
_SW_INCORRECT_DATA: Final = 0x6A80
_SW_RECORD_NOT_FOUND: Final = 0x6A83
_SW_INCORRECT_P1_P2: Final = 0x6A86
_SW_NO_SUCH_DATA: Final = 0x6A88
_SW_INS_NOT_SUPPORTED: Final = 0x6D00
_SW_CLA_NOT_SUPPORTED: Final = 0x6E00

_LABEL: Final = b"POS GATEWAY"
_AIP_CDA: Final = 0x01
_AIP_ON_DEVICE_CVM: Final = 0x02
_AFL: Final = bytes.fromhex("08010200 10010101")
_CRYPTOGRAM_VERSION: Final = 1
_MAX_ATC: Final = 0xFFFF
_MAX_ICC_MODULUS_BYTES: Final = 205
"""So that the GENERATE AC answer with a 32-byte IAD fits 256 bytes."""

_CLASSES: Final = {
    INS_SELECT: 0x00,
    INS_READ_RECORD: 0x00,
    INS_GET_PROCESSING_OPTIONS: 0x80,
    INS_GENERATE_AC: 0x80,
    INS_GET_DATA: 0x80,
    INS_PUT_DATA: 0x84,
}


class _Refused(Exception):
    """A command answered with a status word and nothing else."""

    def __init__(self, sw: int) -> None:
        super().__init__(f"{sw:04X}")
        self.sw = sw


class _Stage(Enum):
    IDLE = 0
    SELECTED = 1
    INITIATED = 2
    ISSUER_ASKED = 3
    """An ARQC was given where a TC was asked: one more GENERATE AC may follow."""
    FINISHED = 4


class VirtualCard:
    """One personalised card.

    `state_path` is where the counter and all that goes with it lives; without one it lives in memory.
    `entropy` gives the ICC dynamic number of each signature.

    The card refuses (AAC) what it is asked to pay against its own rules: no amount, an amount for others,
    a foreign currency, more than its per-tap cap, more than its cumulative cap since it was issued, more
    TCs on one day than its rate limit (days are the terminals' 9A, and never go back), a counter that
    would run over. Only then it compares with the ceiling, and answers ARQC if that is too low. A second
    GENERATE AC in the same session may bring a higher ceiling for the same sale; if that is too low again,
    or one of its own rules is against it by now, it is AAC.

    A note is taken in a session that has given a cryptogram, the log is told in one that has given a TC.

    Raises:
        InvalidInput: a personalisation that no card could work with.
        InvalidMessage: a state file that is none.
    """

    def __init__(
        self,
        personalisation: Personalisation,
        *,
        state_path: Path | None = None,
        entropy: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._personalisation = personalisation
        self._key = IccKey.of(personalisation)
        self._aip = application_interchange_profile(personalisation)
        self._records = records(personalisation)
        self._path = state_path
        self._entropy = entropy
        self.state = CardState(counter=personalisation.counter)
        if state_path is not None and state_path.exists():
            self.state = CardState.from_json(state_path.read_text())
        self._stage = _Stage.IDLE
        self._pdol_values = b""
        self._asked: _Request | None = None
        self._gave_tc = False

    def power_up(self) -> None:
        self._begin(_Stage.IDLE)

    def _begin(self, stage: _Stage) -> None:
        self._stage, self._asked, self._gave_tc = stage, None, False

    def process(self, command: bytes) -> bytes:
        """The answer to one command APDU. The state is committed before this returns."""
        try:
            return Response(self._dispatch(_parsed(command)), SW_OK).to_bytes()
        except _Refused as refused:
            return Response(b"", refused.sw).to_bytes()

    def _dispatch(self, command: Command) -> bytes:
        _check_class(command)
        answer = {
            INS_SELECT: self._select,
            INS_GET_PROCESSING_OPTIONS: self._get_processing_options,
            INS_READ_RECORD: self._read_record,
            INS_GENERATE_AC: self._generate_ac,
            INS_GET_DATA: self._get_data,
            INS_PUT_DATA: self._put_data,
        }[command.ins]
        return answer(command)

    def _select(self, command: Command) -> bytes:
        self._begin(_Stage.IDLE)
        name = _selected_name(command)
        if name == PPSE:
            return directory(AID, _LABEL)
        if name != AID:
            raise _Refused(SW_FILE_NOT_FOUND)
        self._stage = _Stage.SELECTED
        proprietary = tlv.encode(0x50, _LABEL) + tlv.encode(0x9F38, PDOL)
        return tlv.encode(0x6F, tlv.encode(0x84, AID) + tlv.encode(0xA5, proprietary))

    def _get_processing_options(self, command: Command) -> bytes:
        self._require(_Stage.SELECTED)
        if command.p1 or command.p2:
            raise _Refused(_SW_INCORRECT_P1_P2)
        if len(command.data) != len(_GPO_HEAD) + _PDOL_BYTES:
            raise _Refused(_SW_WRONG_LENGTH)
        if not command.data.startswith(_GPO_HEAD):
            raise _Refused(_SW_INCORRECT_DATA)
        if self.state.atc >= _MAX_ATC:
            raise _Refused(_SW_CONDITIONS)  # a card that has used up its ATC is dead (Book 2 §8.1.2)
        self._pdol_values = command.data[len(_GPO_HEAD) :]
        self._stage = _Stage.INITIATED
        note = tlv.encode(TAG_NOTE, self.state.note) if self.state.note else b""
        return tlv.encode(0x77, tlv.encode(0x82, self._aip) + tlv.encode(0x94, _AFL) + note)

    def _read_record(self, command: Command) -> bytes:
        self._require(_Stage.INITIATED)
        if command.p2 & 0x07 != 0x04 or command.p1 == 0:
            raise _Refused(_SW_INCORRECT_P1_P2)
        if command.data:
            raise _Refused(_SW_WRONG_LENGTH)
        sfi = command.p2 >> 3
        if all(known != sfi for known, _ in self._records):
            raise _Refused(SW_FILE_NOT_FOUND)
        record = self._records.get((sfi, command.p1))
        if record is None:
            raise _Refused(_SW_RECORD_NOT_FOUND)
        return tlv.encode(0x70, record)

    def _generate_ac(self, command: Command) -> bytes:
        if self._asked is not None:
            return self._second_generate_ac(command, self._asked)
        self._require(_Stage.INITIATED)
        requested, cda = _requested_kind(command)
        if len(command.data) != _CDOL1_BYTES:
            raise _Refused(_SW_WRONG_LENGTH)
        request = _Request.parse(command.data)
        if requested is CryptogramKind.TC:
            stored = self.state.answer_to(request.terminal, request.unpredictable_number)
            if stored is not None:
                # A tear is repaired by tapping again: the same question gets the answer it had, also
                # when it was the second GENERATE AC that was answered.
                self._stage, self._gave_tc = _Stage.FINISHED, True
                return stored
        kind = self._decide(requested, request)
        if kind is not CryptogramKind.AAC and not cda:
            raise _Refused(_SW_INCORRECT_P1_P2)  # nothing that an issuer may act on goes out unsigned
        answer = self._give(kind, request, replace(self.state, atc=self.state.atc + 1))
        if kind is CryptogramKind.ARQC and requested is CryptogramKind.TC:
            self._stage, self._asked = _Stage.ISSUER_ASKED, request
        return answer

    def _second_generate_ac(self, command: Command, first: _Request) -> bytes:
        """The same sale with the ceiling of CDOL2, under the same ATC. Only now does the counter move."""
        requested, cda = _requested_kind(command)
        if len(command.data) != _CDOL2_BYTES:
            raise _Refused(_SW_WRONG_LENGTH)
        request = first.with_second(command.data)
        kind = self._decide(requested, request)
        if requested is CryptogramKind.ARQC or (kind is not CryptogramKind.AAC and not cda):
            raise _Refused(_SW_INCORRECT_P1_P2)
        return self._give(CryptogramKind.AAC if kind is CryptogramKind.ARQC else kind, request, self.state)

    def _give(self, kind: CryptogramKind, request: _Request, state: CardState) -> bytes:
        """Answer; the state is committed before the first byte of it leaves."""
        answer, after = self._answer(kind, request, state)
        self._commit(after)
        self._stage, self._asked = _Stage.FINISHED, None
        self._gave_tc = kind is CryptogramKind.TC
        return answer

    def _put_data(self, command: Command) -> bytes:
        """A new note, whole or not at all, whatever tears the card away."""
        _require_object(command, TAG_NOTE)
        self._require(_Stage.FINISHED)
        try:
            sequence, note = take_note_data(self._personalisation.mk_ac, command.data)
        except InvalidInput:
            raise _Refused(_SW_WRONG_LENGTH) from None
        except AuthenticationFailed:
            raise _Refused(_SW_SECURITY_STATUS) from None
        if sequence <= self.state.note_sequence:
            raise _Refused(_SW_CONDITIONS)
        self._commit(replace(self.state, note_sequence=sequence, note=note))
        return b""

    def _get_data(self, command: Command) -> bytes:
        _require_object(command, TAG_LOG)
        if command.data:
            raise _Refused(_SW_WRONG_LENGTH)
        if not self._gave_tc:
            raise _Refused(_SW_CONDITIONS)  # it tells the counter, which only a TC does
        return tlv.encode(TAG_LOG, encode_log(self.state.log))

    def _decide(self, requested: CryptogramKind, request: _Request) -> CryptogramKind:
        own, state = self._personalisation, self.state
        after = state.counter + request.amount_minor
        refused = (
            requested is CryptogramKind.AAC
            or request.amount_minor == 0
            or request.amount_other_minor != 0
            or request.currency_numeric != own.currency_numeric
            or request.amount_minor > own.per_tap_cap_minor
            or state.cumulative_minor + request.amount_minor > own.cumulative_cap_minor
            or state.tcs_on(request.day) >= own.tc_rate_limit
            or after > MAX_COUNTER
        )
        if refused:
            return CryptogramKind.AAC
        if requested is CryptogramKind.ARQC or after > request.ceiling:
            return CryptogramKind.ARQC
        return CryptogramKind.TC

    def _answer(self, kind: CryptogramKind, request: _Request, state: CardState) -> tuple[bytes, CardState]:
        """The GENERATE AC answer, and the state the card is in once it is given."""
        own = self._personalisation
        if kind is CryptogramKind.TC:
            state = state.moved(request.amount_minor, request.day, request.terminal)
            counter_field = clear_counter_field(state.counter)
        else:
            counter_field = encipher_counter(own.mk_enc, state.atc, state.counter)
        iad = Iad(
            key_index=own.key_index,
            cryptogram_version=_CRYPTOGRAM_VERSION,
            cvr=cvr(holder_verified_on_device=own.holder_verified_on_device),
            counter_field=counter_field,
            previous_digest=state.previous_digest,
        ).to_bytes()
        atc = state.atc.to_bytes(2, "big")
        cryptogram = application_cryptogram(own.mk_ac, state.atc, request.sent + self._aip + atc + iad)
        head = tlv.encode(0x9F27, bytes([kind.value])) + tlv.encode(0x9F36, atc)
        tail = tlv.encode(0x9F10, iad)
        if kind is CryptogramKind.AAC:
            return tlv.encode(0x77, head + tlv.encode(0x9F26, cryptogram) + tail), state
        digest = _sha1(self._pdol_values + request.sent + head + tail)
        signature = self._key.sign_dynamic_data(
            dynamic_number=self._entropy(_DYNAMIC_NUMBER_BYTES),
            cid=kind.value,
            cryptogram=cryptogram,
            transaction_data_hash=digest,
            unpredictable_number=request.unpredictable_number,
        )
        answer = tlv.encode(0x77, head + tlv.encode(0x9F4B, signature) + tail)
        if kind is CryptogramKind.TC:
            stored = StoredAnswer(request.terminal, request.unpredictable_number, answer)
            state = replace(state, previous_digest=previous_digest(request.values)).with_answer(stored)
        return answer, state

    def _commit(self, state: CardState) -> None:
        if self._path is not None:
            _write_durably(self._path, state.to_json())
        self.state = state

    def _require(self, stage: _Stage) -> None:
        if self._stage is not stage:
            raise _Refused(_SW_CONDITIONS)


class SchemeCard:
    """A card of a card scheme. `read_attempts` counts every command after the directory: none is ours to
    send."""

    def __init__(self, aid: bytes = VISA_AID) -> None:
        self._aid = aid
        self.read_attempts = 0

    def power_up(self) -> None:
        """Nothing to forget."""

    def process(self, command: bytes) -> bytes:
        try:
            parsed = _parsed(command)
            name = _selected_name(parsed) if parsed.ins == INS_SELECT else None
            if name == PPSE:
                return Response(directory(self._aid, b"SCHEME"), SW_OK).to_bytes()
            if name is None or name == self._aid:
                self.read_attempts += 1
            raise _Refused(SW_FILE_NOT_FOUND if name is not None else _SW_CONDITIONS)
        except _Refused as refused:
            return Response(b"", refused.sw).to_bytes()


class BlankCard:
    """A card without any application."""

    def power_up(self) -> None:
        """Nothing to forget."""

    def process(self, command: bytes) -> bytes:
        return Response(b"", SW_FILE_NOT_FOUND).to_bytes()


@dataclass(frozen=True, slots=True)
class IccKey:
    """An ICC private key in CRT form."""

    p: int = field(repr=False)
    q: int = field(repr=False)
    exponent: int

    @classmethod
    def of(cls, personalisation: Personalisation) -> IccKey:
        """
        Raises:
            InvalidInput: a modulus too long for one GENERATE AC answer.
        """
        key = cls(personalisation.icc_prime_p, personalisation.icc_prime_q, personalisation.icc_exponent)
        if key.size > _MAX_ICC_MODULUS_BYTES:
            raise InvalidInput(f"over {_MAX_ICC_MODULUS_BYTES} bytes", where="ICC modulus")
        return key

    @property
    def modulus(self) -> int:
        return self.p * self.q

    @property
    def size(self) -> int:
        """Length of the modulus in bytes."""
        return (self.modulus.bit_length() + 7) // 8

    def sign_dynamic_data(
        self,
        *,
        dynamic_number: bytes,
        cid: int,
        cryptogram: bytes,
        transaction_data_hash: bytes,
        unpredictable_number: bytes,
    ) -> bytes:
        """Signed dynamic application data, 9F4B (EMV 4.3 Book 2 §6.6.1, tables 17 and 18)."""
        dynamic = (
            bytes([len(dynamic_number)]) + dynamic_number + bytes([cid]) + cryptogram + transaction_data_hash
        )
        signed = bytes([_SIGNED_DATA_FORMAT, _SHA1_INDICATOR, len(dynamic)]) + dynamic
        signed = signed.ljust(self.size - _FIXED_BYTES, b"\xbb")
        block = b"\x6a" + signed + _sha1(signed + unpredictable_number) + b"\xbc"
        return self._apply(int.from_bytes(block, "big")).to_bytes(self.size, "big")

    def _apply(self, message: int) -> int:
        p, q = self.p, self.q
        mod_p = gmpy2.powmod(message, gmpy2.invert(self.exponent, p - 1), p)
        mod_q = gmpy2.powmod(message, gmpy2.invert(self.exponent, q - 1), q)
        return int(mod_q + (mod_p - mod_q) * gmpy2.invert(q, p) % p * q)


def application_interchange_profile(personalisation: Personalisation) -> bytes:
    """AIP, tag 82."""
    on_device = _AIP_ON_DEVICE_CVM if personalisation.holder_verified_on_device else 0
    return bytes([_AIP_CDA | on_device, 0])


def records(personalisation: Personalisation) -> dict[tuple[int, int], bytes]:
    """(SFI, record number) → record content without its template 70. 2.1 alone is authenticated."""
    own = personalisation
    key = IccKey.of(own)
    issuer = [
        (0x8F, bytes([own.ca_index])),
        (0x9F32, _unsigned(own.issuer_exponent)),
        (0x92, own.issuer_remainder),
        (0x9F46, own.icc_certificate),
        (0x9F47, _unsigned(key.exponent)),
        (0x9F48, own.icc_remainder),
    ]
    holder = [
        (0x5A, bytes.fromhex(own.pan)),
        (0x5F34, bytes.fromhex(f"{own.psn:02d}")),
        (0x5F24, bytes.fromhex(own.expires.strftime("%y%m%d"))),
        (0x5F25, bytes.fromhex(own.effective.strftime("%y%m%d"))),
        (0x9F07, own.application_usage),
        (0x9F42, bytes.fromhex(f"{own.currency_numeric:04d}")),
        (0x8C, CDOL1),
        (0x8D, CDOL2),
        (0x9F4A, b"\x82"),
    ]
    return {
        (1, 1): tlv.encode(0x90, own.issuer_certificate),
        (1, 2): b"".join(tlv.encode(tag, value) for tag, value in issuer if value),
        (2, 1): b"".join(tlv.encode(tag, value) for tag, value in holder),
    }


def static_data(personalisation: Personalisation) -> bytes:
    """The static data to be authenticated (EMV 4.3 Book 3 §10.3)."""
    return records(personalisation)[2, 1] + application_interchange_profile(personalisation)


def directory(aid: bytes, label: bytes) -> bytes:
    """The PPSE's FCI with one application in it (EMV Contactless Book B §3.3.1)."""
    entry = tlv.encode(0x61, tlv.encode(0x4F, aid) + tlv.encode(0x50, label) + tlv.encode(0x87, b"\x01"))
    return tlv.encode(0x6F, tlv.encode(0x84, PPSE) + tlv.encode(0xA5, tlv.encode(0xBF0C, entry)))


@dataclass(frozen=True, slots=True)
class _Request:
    """What a terminal asks in GENERATE AC: `values` in the first, `second` in the second one."""

    values: bytes
    amount_minor: int
    amount_other_minor: int
    currency_numeric: int
    day: str
    terminal: str
    unpredictable_number: bytes
    ceiling: int
    second: bytes = b""

    @property
    def sent(self) -> bytes:
        return self.values + self.second

    def with_second(self, values: bytes) -> _Request:
        elements = tlv.split_dol(_CDOL2, values)
        if elements[0x9F37] != self.unpredictable_number:
            raise _Refused(_SW_INCORRECT_DATA)
        return replace(self, ceiling=int.from_bytes(elements[TAG_CEILING], "big"), second=values)

    @classmethod
    def parse(cls, values: bytes) -> _Request:
        elements, at = {}, 0
        for entry in _CDOL1:
            elements[entry.tag] = values[at : at + entry.length]
            at += entry.length
        day = elements[0x9A].hex()
        if not day.isdecimal():
            raise _Refused(_SW_INCORRECT_DATA)
        return cls(
            values=values,
            amount_minor=_decimal(elements[0x9F02]),
            amount_other_minor=_decimal(elements[0x9F03]),
            currency_numeric=_decimal(elements[0x5F2A]),
            day=day,
            terminal=elements[0x9F1C].decode("latin-1"),
            unpredictable_number=elements[0x9F37],
            ceiling=int.from_bytes(elements[TAG_CEILING], "big"),
        )


_CDOL1: Final = tlv.parse_dol(CDOL1)
_CDOL1_BYTES: Final = sum(entry.length for entry in _CDOL1)
_CDOL2: Final = tlv.parse_dol(CDOL2)
_CDOL2_BYTES: Final = sum(entry.length for entry in _CDOL2)
_PDOL_BYTES: Final = sum(entry.length for entry in tlv.parse_dol(PDOL))
_GPO_HEAD: Final = bytes([TAG_COMMAND_TEMPLATE, _PDOL_BYTES])

_SIGNED_DATA_FORMAT: Final = 0x05
_SHA1_INDICATOR: Final = 0x01
_FIXED_BYTES: Final = 22  # header, hash and trailer around the signed data
_DYNAMIC_NUMBER_BYTES: Final = 8


def _parsed(command: bytes) -> Command:
    try:
        return Command.from_bytes(command)
    except InvalidInput:
        raise _Refused(_SW_WRONG_LENGTH) from None


def _check_class(command: Command) -> None:
    if command.cla not in _CLASSES.values():
        raise _Refused(_SW_CLA_NOT_SUPPORTED)
    expected = _CLASSES.get(command.ins)
    if expected is None:
        raise _Refused(_SW_INS_NOT_SUPPORTED)
    if command.cla != expected:
        raise _Refused(_SW_CLA_NOT_SUPPORTED)


def _selected_name(command: Command) -> bytes:
    if (command.p1, command.p2) != (0x04, 0x00):
        raise _Refused(_SW_INCORRECT_P1_P2)
    if not 1 <= len(command.data) <= 16:
        raise _Refused(_SW_WRONG_LENGTH)
    return command.data


def _requested_kind(command: Command) -> tuple[CryptogramKind, bool]:
    cda = bool(command.p1 & CDA_REQUESTED)
    try:
        kind = CryptogramKind(command.p1 & ~CDA_REQUESTED)
    except ValueError:
        raise _Refused(_SW_INCORRECT_P1_P2) from None
    if command.p2:
        raise _Refused(_SW_INCORRECT_P1_P2)
    return kind, cda


def _require_object(command: Command, tag: int) -> None:
    if (command.p1 << 8 | command.p2) != tag:
        raise _Refused(_SW_NO_SUCH_DATA)


def _decimal(value: bytes) -> int:
    digits = value.hex()
    if not digits.isdecimal():
        raise _Refused(_SW_INCORRECT_DATA)
    return int(digits)


def _unsigned(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def _sha1(data: bytes) -> bytes:
    return hashlib.sha1(data, usedforsecurity=False).digest()


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
