"""The gateway's settings and where its files lie.

`firmware_config/terminal.toml` holds the defaults, `gateway.toml` in the gateway's home directory
overrides single values. Every error names file, key and line.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

import pos_gateway
from pos_gateway.authorization.policy import Policy
from pos_gateway.emv.authentication import MAX_KEY_BYTES, CaPublicKey
from pos_gateway.errors import InvalidConfiguration, InvalidInput
from pos_gateway.gateway.toml_file import Section, load
from pos_gateway.money import MAX_AMOUNT_MINOR, currency


def _currency_code(code: str) -> str:
    try:
        return currency(code).code
    except InvalidInput as error:
        raise ValueError(str(error)) from None


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return text


def _frontend(text: str) -> str:
    if re.fullmatch(r"tty:[A-Za-z0-9]+:(pn532|arygon)|udp:[a-z0-9.]+:[0-9]{1,5}", text) is None:
        raise ValueError('"tty:PORT:pn532", "tty:PORT:arygon" or "udp:HOST:PORT"')
    return text


def _aid(text: str) -> str:
    if re.fullmatch(r"(?:[0-9A-F]{2}){5,16}", text, re.ASCII | re.IGNORECASE) is None:
        raise ValueError("an AID is 5 to 16 bytes in hexadecimal (ISO/IEC 7816-4)")
    return text.upper()


def _printer(text: str) -> str:
    if text and re.fullmatch(r"tcp:[A-Za-z0-9.:\[\]-]+:\d{1,5}|file:/.+", text, re.ASCII) is None:
        raise ValueError("write tcp:HOST:PORT or file:/dev/usb/lp0, or leave it empty")
    return text


def _hexadecimal(text: str, what: str, least: int, most: int) -> str:
    digits = "".join(text.split()).upper()
    if re.fullmatch(rf"(?:[0-9A-F]{{2}}){{{least},{most}}}", digits, re.ASCII) is None:
        length = f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(f"{what} is {length} bytes in hexadecimal")
    return digits


def _rid(text: str) -> str:
    return _hexadecimal(text, "a RID", 5, 5)


def _one_byte(text: str) -> str:
    return _hexadecimal(text, "an index", 1, 1)


def _modulus(text: str) -> str:
    return _hexadecimal(text, "a CAPK's modulus", 64, MAX_KEY_BYTES)


def _sha1(text: str) -> str:
    return _hexadecimal(text, "a checksum", 20, 20)


_Amount = Annotated[int, Field(ge=0, le=MAX_AMOUNT_MINOR)]
_Seconds = Annotated[int, Field(ge=1, le=366 * 86_400)]


class Terminal(Section):
    country_numeric: int = Field(ge=1, le=999)
    currency: Annotated[str, AfterValidator(_currency_code)]
    cvm_limit_minor: _Amount


class Caps(Section):
    per_tap_cap_minor: _Amount
    unsynchronised_amount_cap_minor: _Amount
    unsynchronised_count_cap: int = Field(ge=0)
    unsynchronised_age_cap_s: _Seconds


class Clock(Section):
    tolerance_s: int = Field(ge=0, le=86_400)


class Card(Section):
    present_timeout_s: _Seconds
    exchange_timeout_s: _Seconds
    removal_timeout_s: _Seconds


class ReaderChoice(Section):
    name_pattern: Annotated[str, AfterValidator(_pattern)]
    frontends: tuple[Annotated[str, AfterValidator(_frontend)], ...] = Field(max_length=16, strict=False)


class Http(Section):
    host: str = Field(min_length=1)
    port: int = Field(ge=0, le=65_535)
    names: tuple[str, ...] = Field(max_length=32, strict=False)
    certificate: str = Field(max_length=4096)


class StaffSettings(Section):
    idle_lock_s: _Seconds
    session_s: _Seconds


class PrinterSettings(Section):
    address: Annotated[str, AfterValidator(_printer)]
    columns: int = Field(ge=24, le=64)


class SynchroniserSettings(Section):
    interval_s: _Seconds
    warn_share_percent: int = Field(ge=0, le=100)


class GrantSettings(Section):
    budget_ms: int = Field(ge=0, le=60_000)
    write_notes: bool


class JournalSettings(Section):
    headroom_bytes: int = Field(ge=0)
    keep_days: int = Field(ge=1, le=36_600)


class Nexo(Section):
    """The interface for POS software. `pois`: POIID → lane; empty gives every lane a POIID of its own."""

    enabled: bool
    host: str = Field(min_length=1)
    port: int = Field(ge=0, le=65_535)
    plain: bool
    key_identifier: str = Field(min_length=1, max_length=64)
    key_version: int = Field(ge=0, le=1 << 31)
    pois: dict[Annotated[str, Field(min_length=1, max_length=64)], str]


class Settings(Section):
    """`terminal.toml` with the overrides of `gateway.toml`."""

    terminal: Terminal
    caps: Caps
    clock: Clock
    card: Card
    reader: ReaderChoice
    http: Http
    staff: StaffSettings
    printer: PrinterSettings
    synchroniser: SynchroniserSettings
    grants: GrantSettings
    journal: JournalSettings
    nexo: Nexo

    def policy(self) -> Policy:
        """The shop's own bounds, as the decision takes them."""
        return Policy(
            per_tap_cap_minor=self.caps.per_tap_cap_minor,
            holder_verification_limit_minor=self.terminal.cvm_limit_minor,
            unsynchronised_amount_cap_minor=self.caps.unsynchronised_amount_cap_minor,
            unsynchronised_count_cap=self.caps.unsynchronised_count_cap,
            unsynchronised_age_cap_s=self.caps.unsynchronised_age_cap_s,
            clock_tolerance_s=self.clock.tolerance_s,
        )


class Application(Section):
    aid: Annotated[str, AfterValidator(_aid)]
    name: str = Field(min_length=1, max_length=64)

    @property
    def aid_bytes(self) -> bytes:
        return bytes.fromhex(self.aid)


class CaKeyEntry(Section):
    """A CAPK (EMV 4.3 Book 2 §5.2, §11.2.1)."""

    rid: Annotated[str, AfterValidator(_rid)]
    index: Annotated[str, AfterValidator(_one_byte)]
    modulus: Annotated[str, AfterValidator(_modulus)]
    exponent: Literal[3, 65537]
    expires: date
    checksum: Annotated[str, AfterValidator(_sha1)]
    """SHA-1 of RID, index, modulus and exponent, as schemes and issuers print it beside the key."""

    @model_validator(mode="after")
    def _holds(self) -> CaKeyEntry:
        exponent = self.exponent.to_bytes((self.exponent.bit_length() + 7) // 8, "big")
        data = bytes.fromhex(self.rid + self.index + self.modulus) + exponent
        if hashlib.sha1(data, usedforsecurity=False).hexdigest() != self.checksum.lower():
            raise ValueError("the checksum does not fit the key: a digit was mistyped")
        return self

    def public_key(self) -> CaPublicKey:
        rid, index = bytes.fromhex(self.rid), int(self.index, 16)
        return CaPublicKey(rid, index, int(self.modulus, 16), self.exponent, self.expires)


class Applications(Section):
    """`applications.toml`: what a till selects, in order of preference, and the CAPKs it trusts beside
    those its issuer gave it at enrolment."""

    application: tuple[Application, ...] = Field(min_length=1, max_length=16, strict=False)
    ca_key: tuple[CaKeyEntry, ...] = Field(default=(), max_length=64, strict=False)

    @property
    def aids(self) -> tuple[bytes, ...]:
        return tuple(application.aid_bytes for application in self.application)


@dataclass(frozen=True, slots=True)
class Home:
    """The directory of one gateway: all it keeps."""

    path: Path

    def create(self) -> None:
        """Make it if it is missing; readable by its owner alone."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.snapshots.mkdir(mode=0o700, exist_ok=True)

    @property
    def overrides(self) -> Path:
        return self.path / "gateway.toml"

    @property
    def identity_key(self) -> Path:
        return self.path / "identity.key"

    @property
    def enrolment(self) -> Path:
        return self.path / "enrolment.json"

    @property
    def credentials(self) -> Path:
        """The TLS key with its certificate."""
        return self.path / "tls.pem"

    @property
    def journal(self) -> Path:
        return self.path / "journal.sqlite3"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"

    @property
    def staff(self) -> Path:
        """Who works here: names, roles, PINs as argon2 hashes; tokens of programs as hashes."""
        return self.path / "staff.json"

    @property
    def api_token(self) -> Path:
        """What lets this machine's own programs in; readable by the gateway's user alone."""
        return self.path / "api-token"

    @property
    def setup_code(self) -> Path:
        """What the first owner types in; gone once there is one."""
        return self.path / "setup-code"

    @property
    def http_certificate(self) -> Path:
        """The page's own certificate with its key, where the shop brings none."""
        return self.path / "page-tls.pem"

    @property
    def receipts(self) -> Path:
        """Proofs of the limits that approvals relied on, for their receipts."""
        return self.path / "receipts.sqlite3"

    @property
    def readers(self) -> Path:
        """Reader models that this shop describes itself, beside those that come with the program."""
        return self.path / "readers"

    @property
    def nexo(self) -> Path:
        """The folder of the POS interface: see `gateway.nexo.setup`."""
        return self.path / "nexo"

    @property
    def address(self) -> Path:
        """Where the running gateway tells how its local API is reached."""
        return self.path / "address"


def firmware_config() -> Path:
    """The folder of `terminal.toml`: inside the installed package, or beside it in a checkout.

    Raises:
        InvalidConfiguration: in neither place.
    """
    package = Path(pos_gateway.__file__).parent
    for folder in (package / "firmware_config", package.parent / "firmware_config"):
        if folder.is_dir():
            return folder
    raise InvalidConfiguration("firmware_config is missing", where=str(package), advice="install again")


def load_settings(home: Home, firmware: Path | None = None) -> Settings:
    """
    Raises:
        InvalidConfiguration: names file, key and line, and the nearest known key.
    """
    paths = [(firmware or firmware_config()) / "terminal.toml"]
    if home.overrides.exists():
        paths.append(home.overrides)
    return load(Settings, paths)


def load_applications(firmware: Path | None = None) -> Applications:
    """
    Raises:
        InvalidConfiguration: names file, key and line.
    """
    return load(Applications, [(firmware or firmware_config()) / "applications.toml"])
