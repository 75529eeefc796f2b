"""What this machine has for readers, read from a staged system: no reader of the test machine is touched."""

from __future__ import annotations

import plistlib
from pathlib import Path

import pytest

from pos_gateway.errors import InvalidConfiguration, ReaderUnavailable
from pos_gateway.gateway.readers.frontend import FrontendReader
from pos_gateway.gateway.readers.models import load_models
from pos_gateway.gateway.readers.pcsc import PcscReader
from pos_gateway.gateway.readers.source import Readers
from pos_gateway.gateway.readers.system import (
    changes_wanted,
    escape_commands_allowed,
    frontends,
    kernel_modules_in_the_way,
    load_driver_options,
    unreachable_frontends,
    usb_devices,
)
from pos_gateway.lab.virtual_reader import VirtualReader

MODELS = load_models()
INFO_PLIST = """<?xml version="1.0" encoding="UTF-8"?>
<plist version="1.0">
<dict>
	<key>CFBundleName</key>
	<string>CCIDCLASSDRIVER</string>
	<!-- 0x01: DRIVER_OPTION_CCID_EXCHANGE_AUTHORIZED -->
	<key>ifdDriverOptions</key>
	<string>0x0000</string>
	<key>ifdVendorID</key>
	<array>
		<string>0x072F</string>
	</array>
</dict>
</plist>
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with a mouse, an RC-S380 and an ACR122U."""
    for port, vendor, product, address in (
        ("1-1", "046d", "c077", 2),
        ("1-2.4", "054c", "06c3", 7),
        ("1-3", "072f", "2200", 8),
    ):
        plug_in(tmp_path, port, vendor, product, address)
    (tmp_path / "sys/bus/usb/devices/1-2.4:1.0").mkdir()  # an interface: no ids of its own
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/libccid_Info.plist").write_text(INFO_PLIST)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/modules").write_text("usbhid 65536 0 - Live 0x0\n")
    return tmp_path


def plug_in(root: Path, port: str, vendor: str, product: str, address: int) -> None:
    folder = root / "sys/bus/usb/devices" / port
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("idVendor", vendor), ("idProduct", product), ("busnum", "1"), ("devnum", str(address))
    ):  # fmt: skip
        (folder / name).write_text(text + "\n")
    node = root / f"dev/bus/usb/001/{address:03}"
    node.parent.mkdir(parents=True, exist_ok=True)
    node.touch()


def unplug(root: Path, port: str) -> None:
    for file in (root / "sys/bus/usb/devices" / port).iterdir():
        file.unlink()


def test_frontends_are_found_by_their_usb_ids(root: Path) -> None:
    assert [device.port for device in usb_devices(root)] == ["1-1", "1-2.4", "1-3"]
    ((device, model),) = frontends(MODELS, root)
    assert (device.nfcpy_path, model.name) == ("usb:001:007", "Sony RC-S380")
    assert usb_devices(root / "nowhere") == []


def test_readers_of_both_drivers_stand_side_by_side(root: Path, virtual_reader: VirtualReader) -> None:
    readers = Readers(MODELS, paths=["tty:USB0:pn532"], root=root)
    assert readers.names() == [*virtual_reader.names, "Sony RC-S380 at USB 1-2.4", "tty:USB0:pn532"]
    assert [found.driver for found in readers.found()] == ["pcsc", "pcsc", "nfcpy", "nfcpy"]
    assert isinstance(readers.open("tty:USB0:pn532", 5.0), FrontendReader)
    assert isinstance(readers.open("Sony RC-S380 at USB 1-2.4", 5.0), FrontendReader)
    assert isinstance(readers.open(virtual_reader.names[0], 5.0), PcscReader)


def test_a_frontend_is_found_again_at_its_port(root: Path) -> None:
    readers = Readers(MODELS, root=root)
    reader = readers.open("Sony RC-S380 at USB 1-2.4", 5.0)
    assert isinstance(reader, FrontendReader)
    assert reader._locate() == "usb:001:007"
    unplug(root, "1-2.4")
    assert reader._locate() is None
    with pytest.raises(ReaderUnavailable, match="not plugged in"):
        reader.wait_for_card(0.0)
    plug_in(root, "1-2.4", "054c", "06c3", 9)
    assert reader._locate() == "usb:001:009"


def test_without_pcscd_frontends_still_count(root: Path, virtual_reader: VirtualReader) -> None:
    virtual_reader.kill_pcscd()
    try:
        assert Readers(MODELS, root=root).names() == ["Sony RC-S380 at USB 1-2.4"]
        with pytest.raises(ReaderUnavailable):
            Readers(MODELS, root=root / "nowhere").names()
    finally:
        virtual_reader.start_pcscd()


def test_what_stands_in_the_way_is_seen(root: Path) -> None:
    assert kernel_modules_in_the_way(root) == ()
    (root / "proc/modules").write_text("port100 1 0 - Live 0x0\nnfc 1 1 port100, Live 0x0\n")
    assert kernel_modules_in_the_way(root) == ("nfc", "port100")
    assert unreachable_frontends(MODELS, root) == []
    (root / "dev/bus/usb/001/007").unlink()
    ((device, name),) = unreachable_frontends(MODELS, root)
    assert (device.port, name) == ("1-2.4", "Sony RC-S380")
    assert kernel_modules_in_the_way(root / "nowhere") == ()


def test_the_changes_a_system_needs_and_then_no_more(root: Path) -> None:
    options = load_driver_options()
    assert escape_commands_allowed(options, root) is False
    wanted = changes_wanted(root)
    assert [str(change.path.relative_to(root)) for change in wanted] == [
        "etc/udev/rules.d/70-pos-gateway-readers.rules",
        "etc/modprobe.d/pos-gateway-nfc.conf",
        "etc/libccid_Info.plist",
    ]
    for change in wanted:
        change.path.parent.mkdir(parents=True, exist_ok=True)
        change.path.write_text(change.text)
    assert changes_wanted(root) == []
    assert escape_commands_allowed(options, root) is True
    text = (root / "etc/libccid_Info.plist").read_text()
    assert text == INFO_PLIST.replace("0x0000", "0x0001")
    assert plistlib.loads(text.encode())["ifdVendorID"] == ["0x072F"]


def test_other_options_of_libccid_stay(root: Path) -> None:
    path = root / "etc/libccid_Info.plist"
    path.write_text(INFO_PLIST.replace("0x0000", "0x0030"))
    assert "<string>0x0031</string>" in changes_wanted(root)[-1].text
    path.write_text("<plist>")
    with pytest.raises(InvalidConfiguration, match=r"Info\.plist"):
        changes_wanted(root)
    path.unlink()
    assert escape_commands_allowed(load_driver_options(), root) is None
    assert len(changes_wanted(root)) == 2
