"""One look at a reader: what it is, which firmware it has, and whether its light can be reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pos_gateway.errors import PosGatewayError
from pos_gateway.gateway.readers.frontend import FrontendReader
from pos_gateway.gateway.readers.pcsc import PcscReader
from pos_gateway.gateway.readers.source import Found, Readers


@dataclass(frozen=True, slots=True)
class Probe:
    """`firmware` is None where the reader did not tell; `firmware_from` says how it was asked.
    `commands`: `open`, `refused` by the driver, or `none` that we know of."""

    name: str
    driver: str
    model: str | None
    tried_on_hardware: bool
    firmware: str | None
    firmware_from: str
    known_firmware: bool | None
    commands: str
    shows: dict[str, str]
    quirks: tuple[str, ...]
    problem: str

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "quirks": list(self.quirks)
        }


def probe(readers: Readers, found: Found, *, response_timeout_s: float) -> Probe:
    """Ask the reader; what goes wrong stands in `problem`."""
    reader = readers.open(found.name, response_timeout_s)
    firmware: str | None = None
    source, commands, problem = "", "none", ""
    try:
        if isinstance(reader, FrontendReader):
            firmware, source = reader.chip(), "nfcpy"
        else:
            firmware, source, commands = _ask_pcsc(reader, found)
    except PosGatewayError as error:
        problem = str(error)
    finally:
        reader.close()
    model = found.model
    known = model.firmware.known if model else ()
    shows: dict[str, str] = {}
    if model is not None and model.indications is not None:
        for name in type(model.indications).model_fields:
            sequence = getattr(model.indications, name)
            if name != "source" and sequence is not None:
                shows[name] = sequence.shows
    return Probe(
        name=found.name,
        driver=found.driver,
        model=model.name if model else None,
        tried_on_hardware=model.tried_on_hardware if model else False,
        firmware=firmware,
        firmware_from=source,
        known_firmware=firmware in known if firmware is not None and known else None,
        commands=commands,
        shows=shows,
        quirks=tuple(quirk.text for quirk in model.quirk) if model else (),
        problem=problem,
    )


def _ask_pcsc(reader: PcscReader, found: Found) -> tuple[str | None, str, str]:
    """Firmware version, how it was asked for, and whether commands go through."""
    model, commands = found.model, "none"
    # Some readers take commands only while a card is open: one that lies there is used.
    channel = reader.wait_for_card(0.0)
    try:
        if model is not None and model.ways:
            commands = "refused" if reader.commands.escape_allowed() is False else "open"
            if model.firmware.send is not None:
                answer = reader.commands.send(bytes.fromhex(model.firmware.send))
                commands = "refused" if reader.commands.refused else commands
                version = model.firmware.read(answer) if answer is not None else None
                if version is not None:
                    return version, "command", commands
        return reader.commands.driver_version(), "PC/SC attribute", commands
    finally:
        if channel is not None:
            channel.close()
