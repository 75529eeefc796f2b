"""What this machine does with readers: USB devices, kernel modules, rights, and libccid's options.

Reads files only; `root` is where they are looked for, so that a staged system can be looked at too.
"""

from __future__ import annotations

import os
import plistlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final
from xml.parsers.expat import ExpatError

from pydantic import Field

from pos_gateway.errors import InvalidConfiguration
from pos_gateway.gateway.config import firmware_config
from pos_gateway.gateway.readers.models import Driver, ReaderModel, model_by_usb
from pos_gateway.gateway.toml_file import Section, load

ROOT: Final = Path("/")
UDEV_RULES: Final = Path("etc/udev/rules.d/70-pos-gateway-readers.rules")
MODPROBE: Final = Path("etc/modprobe.d/pos-gateway-nfc.conf")


class EscapeOption(Section):
    info_plist: str = Field(pattern="^/")
    key: str = Field(min_length=1)
    bit: int = Field(ge=1, le=0xFFFF)
    control_code: int = Field(ge=1, le=0xFFFFFFFF)
    feature_query_code: int = Field(ge=1, le=0xFFFFFFFF)
    feature_tag: Annotated[int, Field(ge=1, le=0xFF)]


class DriverOptions(Section):
    """`firmware_config/pcscd/driver.toml`."""

    escape: EscapeOption


@dataclass(frozen=True, slots=True)
class UsbDevice:
    """A USB device as the kernel lists it. `port` is where it is plugged in, like `1-1.2`."""

    port: str
    vendor: str
    product: str
    bus: int
    address: int

    @property
    def node(self) -> Path:
        return Path(f"dev/bus/usb/{self.bus:03}/{self.address:03}")

    @property
    def nfcpy_path(self) -> str:
        return f"usb:{self.bus:03}:{self.address:03}"


def load_driver_options(firmware: Path | None = None) -> DriverOptions:
    """
    Raises:
        InvalidConfiguration: names file, key and line.
    """
    return load(DriverOptions, [(firmware or firmware_config()) / "pcscd" / "driver.toml"])


def usb_devices(root: Path = ROOT) -> list[UsbDevice]:
    """All USB devices now, by port; empty where there is no USB."""
    found = []
    for folder in sorted((root / "sys/bus/usb/devices").glob("*")):
        try:
            vendor, product, bus, address = (
                (folder / name).read_text().strip() for name in ("idVendor", "idProduct", "busnum", "devnum")
            )
            found.append(UsbDevice(folder.name, vendor.lower(), product.lower(), int(bus), int(address)))
        except (OSError, ValueError):
            continue  # an interface, or a device that left as we looked
    return found


def frontends(models: Sequence[ReaderModel], root: Path = ROOT) -> list[tuple[UsbDevice, ReaderModel]]:
    """The USB devices that nfcpy drives, by our models."""
    named = [(device, model_by_usb(device.vendor, device.product, models)) for device in usb_devices(root)]
    return [(device, model) for device, model in named if model is not None and model.driver is Driver.NFCPY]


def kernel_modules_to_keep_away(firmware: Path | None = None) -> tuple[str, ...]:
    text = ((firmware or firmware_config()) / "modprobe" / "pos-gateway-nfc.conf").read_text()
    return tuple(re.findall(r"^blacklist (\S+)$", text, re.MULTILINE))


def kernel_modules_in_the_way(root: Path = ROOT) -> tuple[str, ...]:
    """Those that are loaded now."""
    try:
        loaded = {line.split()[0] for line in (root / "proc/modules").read_text().splitlines() if line}
    except OSError:
        return ()
    return tuple(module for module in kernel_modules_to_keep_away() if module in loaded)


def unreachable_frontends(models: Sequence[ReaderModel], root: Path = ROOT) -> list[tuple[UsbDevice, str]]:
    """Frontends whose device file this user may not open, with their model's name."""
    return [
        (device, model.name)
        for device, model in frontends(models, root)
        if not os.access(root / device.node, os.R_OK | os.W_OK)
    ]


def escape_commands_allowed(options: DriverOptions, root: Path = ROOT) -> bool | None:
    """What libccid's Info.plist says; None where there is none.

    Raises:
        InvalidConfiguration: it cannot be read.
    """
    path = root / options.escape.info_plist.lstrip("/")
    if not path.exists():
        return None
    return bool(_option_value(path, options)[1] & options.escape.bit)


@dataclass(frozen=True, slots=True)
class Change:
    """One file that `reader configure` wants otherwise: its new text."""

    path: Path
    text: str
    purpose: str


def changes_wanted(root: Path = ROOT) -> list[Change]:
    """What would have to be written below `root` so that every reader model works; empty when all is well.

    Raises:
        InvalidConfiguration: a file of the system cannot be read.
    """
    firmware, options = firmware_config(), load_driver_options()
    wanted = []
    copies = (
        (UDEV_RULES, firmware / "udev" / UDEV_RULES.name, "the gateway may open contactless frontends"),
        (MODPROBE, firmware / "modprobe" / MODPROBE.name, "the kernel leaves readers to pcscd and nfcpy"),
    )
    for place, source, purpose in copies:
        path, text = root / place, source.read_text()
        if not path.exists() or path.read_text() != text:
            wanted.append(Change(path, text, purpose))
    path = root / options.escape.info_plist.lstrip("/")
    if path.exists():
        text, value = _option_value(path, options)
        if not value & options.escape.bit:
            # Only these digits change: the file is the package's, with its order and comments.
            pattern = rf"(<key>{options.escape.key}</key>\s*<string>)[^<]*(</string>)"
            text = re.sub(pattern, rf"\g<1>0x{value | options.escape.bit:04X}\g<2>", text, count=1)
            wanted.append(Change(path, text, "light, buzzer and firmware version of PC/SC readers"))
    return wanted


def _option_value(path: Path, options: DriverOptions) -> tuple[str, int]:
    try:
        data = path.read_bytes()
        return data.decode(), int(plistlib.loads(data)[options.escape.key], 16)
    except (OSError, ValueError, KeyError, TypeError, ExpatError) as error:
        raise InvalidConfiguration(
            f"no readable {options.escape.key} ({type(error).__name__})", where=str(path)
        ) from None
