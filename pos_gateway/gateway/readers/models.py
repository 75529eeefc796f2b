"""What is known of each reader model: `firmware_config/readers/*.toml`, one file a model.

Facts carry their source; what nobody has tried on hardware says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pos_gateway.gateway.config import firmware_config
from pos_gateway.gateway.readers.port import Indication
from pos_gateway.gateway.toml_file import Section, load

MAX_COMMAND_BYTES: Final = 261
MAX_SEQUENCE_MS: Final = 2000
"""So that a light never keeps the next customer waiting longer than this."""


class Driver(Enum):
    PCSC = "pcsc"
    NFCPY = "nfcpy"


class Way(Enum):
    """How a command reaches the reader itself rather than the card on it."""

    CONTROL = "control"
    """`SCardControl` with the CCID escape code. Works without a card, once libccid allows it."""
    PSEUDO_APDU = "pseudo_apdu"
    """`SCardTransmit`: the reader keeps commands of class FF for itself. Needs a card in the field."""


class AnswerForm(Enum):
    """How a reader writes its firmware version."""

    TEXT = "text"
    """ASCII."""
    DOTTED = "dotted"
    """One number a byte."""
    BCD = "bcd"
    """One byte of two digits for each part."""


def _bytes(text: str) -> str:
    if not isinstance(text, str) or not re.fullmatch(r"[0-9A-Fa-f]{2}(?: ?[0-9A-Fa-f]{2})*", text):
        raise ValueError("bytes in hexadecimal, blanks between them")
    if len(bytes.fromhex(text)) > MAX_COMMAND_BYTES:
        raise ValueError(f"at most {MAX_COMMAND_BYTES} bytes")
    return text.upper()


def _usb_id(text: str) -> str:
    if not re.fullmatch(r"[0-9A-Fa-f]{4}", text):
        raise ValueError("a USB id is four hexadecimal digits")
    return text.upper()


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return text


def _named(kind: type[Enum]) -> BeforeValidator:
    def of(value: object) -> object:
        if value in [member.value for member in kind]:
            return kind(value)
        raise ValueError(f"one of {', '.join(member.value for member in kind)}")

    return BeforeValidator(of)


_Hex = Annotated[str, AfterValidator(_bytes)]
_Source = Annotated[str, Field(min_length=8)]


class UsbId(Section):
    vendor: Annotated[str, AfterValidator(_usb_id)]
    product: Annotated[str, AfterValidator(_usb_id)]

    def __str__(self) -> str:
        return f"{self.vendor}:{self.product}".lower()


class Firmware(Section):
    """How the reader tells its firmware version. Without `send`, PC/SC's version attribute or nfcpy's chip
    name is all there is."""

    send: _Hex | None = None
    form: Annotated[AnswerForm, _named(AnswerForm)] = AnswerForm.TEXT
    skip_bytes: int = Field(default=0, ge=0, le=32)
    length_bytes: int | None = Field(default=None, ge=1, le=64)
    known: tuple[str, ...] = Field(default=(), strict=False)
    source: _Source

    def read(self, answer: bytes) -> str | None:
        """The version in an answer to `send`; None if it is not what was expected."""
        end = None if self.length_bytes is None else self.skip_bytes + self.length_bytes
        part = answer[self.skip_bytes : end]
        if end is not None and len(answer) < end:
            return None
        match self.form:
            case AnswerForm.TEXT:
                text = part.removesuffix(b"\x90\x00").rstrip(b"\0").decode("ascii", "replace")
                return text if text.isprintable() and text and "\ufffd" not in text else None
            case AnswerForm.DOTTED:
                return ".".join(str(byte) for byte in part) or None
            case AnswerForm.BCD:
                return ".".join(f"{byte:x}" for byte in part) or None


class Start(Section):
    """A command sent when the reader is found. With `read`, only if its answer is not `unless`: for what
    is kept in non-volatile memory, which wears out."""

    send: _Hex
    purpose: str = Field(min_length=4)
    read: _Hex | None = None
    unless: _Hex | None = None
    source: _Source

    @model_validator(mode="after")
    def _both(self) -> Start:
        if (self.read is None) != (self.unless is None):
            raise ValueError("'read' and 'unless' go together")
        return self


class Step(Section):
    """One command of a sequence, and how long to wait after it. `blocks_ms`: how long the reader takes to
    answer it, because it blinks or beeps first."""

    send: _Hex
    wait_ms: int = Field(default=0, ge=0, le=MAX_SEQUENCE_MS)
    blocks_ms: int = Field(default=0, ge=0, le=MAX_SEQUENCE_MS)


class LightSequence(Section):
    step: tuple[Step, ...] = Field(min_length=1, max_length=16, strict=False)
    shows: str = Field(min_length=3)
    """What a customer sees and hears."""

    @model_validator(mode="after")
    def _bounded(self) -> LightSequence:
        if sum(step.wait_ms + step.blocks_ms for step in self.step) > MAX_SEQUENCE_MS:
            raise ValueError(f"takes longer than {MAX_SEQUENCE_MS} ms")
        return self


class Indications(Section):
    """The light and sound of each moment of a payment; a model without a moment shows nothing then."""

    idle: LightSequence | None = None
    present_card: LightSequence | None = None
    processing: LightSequence | None = None
    approved: LightSequence | None = None
    declined: LightSequence | None = None
    remove_card: LightSequence | None = None
    source: _Source

    @model_validator(mode="after")
    def _quick(self) -> Indications:
        if self.processing is not None and any(s.blocks_ms or s.wait_ms for s in self.processing.step):
            raise ValueError("'processing' is shown while the card is asked: it must neither block nor wait")
        return self

    def of(self, indication: Indication) -> LightSequence | None:
        found: LightSequence | None = getattr(self, indication.value)
        return found


class Quirk(Section):
    text: str = Field(min_length=8)
    source: _Source


class ReaderModel(Section):
    name: str = Field(min_length=3, max_length=64)
    driver: Annotated[Driver, _named(Driver)]
    name_pattern: Annotated[str, AfterValidator(_pattern)]
    """Regular expression that the reader's PC/SC name, or the name we give a frontend, holds."""
    usb: tuple[UsbId, ...] = Field(default=(), max_length=16, strict=False)
    usb_source: _Source
    serial: bool = False
    """Reached through a serial port, which has to be named in gateway.toml."""
    ways: tuple[Annotated[Way, _named(Way)], ...] = Field(default=(), strict=False)
    tried_on_hardware: bool
    firmware: Firmware
    start: tuple[Start, ...] = Field(default=(), max_length=16, strict=False)
    indications: Indications | None = None
    quirk: tuple[Quirk, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _reachable(self) -> ReaderModel:
        commands = bool(self.start or self.indications or self.firmware.send)
        if commands and not self.ways:
            raise ValueError("there are commands, but 'ways' says no way to send them")
        if self.driver is Driver.NFCPY and self.ways:
            raise ValueError("nfcpy has no way to send commands to the reader itself")
        if self.driver is Driver.NFCPY and not self.usb and not self.serial:
            raise ValueError("neither a USB id nor a serial port leads to it")
        return self


def load_models(extra: Path | None = None, firmware: Path | None = None) -> tuple[ReaderModel, ...]:
    """All models: those that come with the program, and those of the folder `extra`, which win.

    Raises:
        InvalidConfiguration: names file, key and line, and the nearest known key.
    """
    folders = [firmware or firmware_config()]
    paths = sorted((folders[0] / "readers").glob("*.toml"))
    own = sorted(extra.glob("*.toml")) if extra is not None and extra.is_dir() else []
    return tuple(load(ReaderModel, [path]) for path in [*own, *paths])


def model_of(name: str, models: Sequence[ReaderModel]) -> ReaderModel | None:
    """The model of a reader by the name it goes by."""
    return next((model for model in models if re.search(model.name_pattern, name)), None)


def model_by_usb(vendor: str, product: str, models: Sequence[ReaderModel]) -> ReaderModel | None:
    """The model with this USB id, four hexadecimal digits each."""
    wanted = f"{vendor}:{product}".lower()
    return next((model for model in models if wanted in map(str, model.usb)), None)
