"""The gateway's settings and where its files lie.

`firmware_config/terminal.toml` holds the defaults, `gateway.toml` in the gateway's home directory
overrides single values. Every error names file, key and line.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

import pos_gateway
from pos_gateway.authorization.policy import Policy
from pos_gateway.errors import InvalidConfiguration, InvalidInput
from pos_gateway.money import MAX_AMOUNT_MINOR, currency

_MAX_FILE_BYTES: Final = 256 * 1024

Model = TypeVar("Model", bound=BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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


def _aid(text: str) -> str:
    if re.fullmatch(r"(?:[0-9A-F]{2}){5,16}", text, re.ASCII | re.IGNORECASE) is None:
        raise ValueError("an AID is 5 to 16 bytes in hexadecimal (ISO/IEC 7816-4)")
    return text.upper()


def _printer(text: str) -> str:
    if text and re.fullmatch(r"tcp:[A-Za-z0-9.:\[\]-]+:\d{1,5}|file:/.+", text, re.ASCII) is None:
        raise ValueError("write tcp:HOST:PORT or file:/dev/usb/lp0, or leave it empty")
    return text


_Amount = Annotated[int, Field(ge=0, le=MAX_AMOUNT_MINOR)]
_Seconds = Annotated[int, Field(ge=1, le=366 * 86_400)]


class Terminal(_Section):
    country_numeric: int = Field(ge=1, le=999)
    currency: Annotated[str, AfterValidator(_currency_code)]
    cvm_limit_minor: _Amount


class Caps(_Section):
    per_tap_cap_minor: _Amount
    unsynchronised_amount_cap_minor: _Amount
    unsynchronised_count_cap: int = Field(ge=0)
    unsynchronised_age_cap_s: _Seconds


class Clock(_Section):
    tolerance_s: int = Field(ge=0, le=86_400)


class Card(_Section):
    present_timeout_s: _Seconds
    exchange_timeout_s: _Seconds
    removal_timeout_s: _Seconds


class ReaderChoice(_Section):
    name_pattern: Annotated[str, AfterValidator(_pattern)]


class Http(_Section):
    host: str = Field(min_length=1)
    port: int = Field(ge=0, le=65_535)
    names: tuple[str, ...] = Field(max_length=32, strict=False)
    certificate: str = Field(max_length=4096)


class StaffSettings(_Section):
    idle_lock_s: _Seconds
    session_s: _Seconds


class PrinterSettings(_Section):
    address: Annotated[str, AfterValidator(_printer)]
    columns: int = Field(ge=24, le=64)


class SynchroniserSettings(_Section):
    interval_s: _Seconds
    warn_share_percent: int = Field(ge=0, le=100)


class JournalSettings(_Section):
    headroom_bytes: int = Field(ge=0)
    keep_days: int = Field(ge=1, le=36_600)


class Settings(_Section):
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
    journal: JournalSettings

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


class Application(_Section):
    aid: Annotated[str, AfterValidator(_aid)]
    name: str = Field(min_length=1, max_length=64)

    @property
    def aid_bytes(self) -> bytes:
        return bytes.fromhex(self.aid)


class Applications(_Section):
    """`applications.toml`: what a till selects, in order of preference."""

    application: tuple[Application, ...] = Field(min_length=1, max_length=16, strict=False)

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
    files = [_read((firmware or firmware_config()) / "terminal.toml")]
    if home.overrides.exists():
        files.append(_read(home.overrides))
    return _validate(Settings, files)


def load_applications(firmware: Path | None = None) -> Applications:
    """
    Raises:
        InvalidConfiguration: names file, key and line.
    """
    return _validate(Applications, [_read((firmware or firmware_config()) / "applications.toml")])


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    text: str
    content: dict[str, Any]

    def holds(self, keys: Sequence[str | int]) -> bool:
        node: Any = self.content
        for key in keys:
            try:
                node = node[key]
            except (KeyError, IndexError, TypeError):
                return False
        return True

    def where(self, keys: Sequence[str | int]) -> str:
        """Where the key stands, or the nearest thing above it that stands anywhere."""
        for length in range(len(keys), 0, -1):
            line = _line_of(self.text, keys[:length])
            if line is not None:
                return f"{self.path} line {line}"
        return str(self.path)


def _read(path: Path) -> _File:
    try:
        data = path.read_bytes()
        if len(data) > _MAX_FILE_BYTES:
            raise InvalidConfiguration(f"over {_MAX_FILE_BYTES} bytes", where=str(path))
        text = data.decode()
        return _File(path, text, tomllib.loads(text))
    except OSError as error:
        raise InvalidConfiguration(f"cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InvalidConfiguration("not UTF-8", where=f"{path} line {line}") from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidConfiguration(f"not TOML: {error}", where=str(path)) from None


def _validate(model: type[Model], files: Sequence[_File]) -> Model:
    merged: dict[str, Any] = {}
    for file in files:
        merged = _overlay(merged, file.content)
    try:
        return model.model_validate(merged)
    except ValidationError as caught:
        errors = caught.errors(include_url=False, include_context=False)
    # A misspelt key is both unknown and missing; the first is the better news.
    error = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    keys = error["loc"]
    name = ".".join(str(key) for key in keys)
    file = next((f for f in reversed(files) if f.holds(keys)), files[0])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(keys[-1]), _known_keys(model, keys[:-1]), n=1, cutoff=0.6)
        advice = f"did you mean {near[0]!r}?" if near else "remove it"
        raise InvalidConfiguration(f"unknown key {name!r}", where=file.where(keys), advice=advice)
    if error["type"] == "missing":
        raise InvalidConfiguration(f"key {name!r} is missing", where=file.where(keys[:-1]))
    reason = error["msg"].removeprefix("Value error, ")
    raise InvalidConfiguration(f"key {name!r}: {reason}", where=file.where(keys))


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        known = merged.get(key)
        merged[key] = _overlay(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def _known_keys(model: type[BaseModel], keys: Sequence[str | int]) -> list[str]:
    for key in keys:
        if isinstance(key, str):
            inner = next(_models_in(model.model_fields[key].annotation), None)
            if inner is None:
                return []
            model = inner
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (tuple, Annotated, Union, UnionType):
        for argument in get_args(annotation):
            yield from _models_in(argument)


_HEADER: Final = re.compile(r"\s*\[(\[?)\s*([^\[\]#]+?)\s*\]")
_KEY: Final = re.compile(r"""\s*["']?([A-Za-z0-9_-]+)["']?\s*=""")


def _line_of(text: str, keys: Sequence[str | int]) -> int | None:
    """The line on which a key or table begins; plain layouts only, which is what people write."""
    wanted = tuple(keys)
    table: tuple[str | int, ...] = ()
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            name = header[2]
            table = tuple(name.split("."))
            if header[1]:
                table += (counts.setdefault(name, 0),)
                counts[name] += 1
            if table == wanted or table[:-1] == wanted:
                return number
        elif (key := _KEY.match(line)) and (*table, key[1]) == wanted:
            return number
    return None
