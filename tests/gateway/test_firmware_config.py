"""The hardware described as data: valid, complete, consistent with itself, and shipped."""

from __future__ import annotations

import configparser
import hashlib
import os
import plistlib
import re
import shutil
import subprocess
import sys
import zipfile
from datetime import date
from pathlib import Path

import pytest

from pos_gateway.emv.authentication import CaPublicKey
from pos_gateway.errors import InvalidConfiguration
from pos_gateway.gateway.config import firmware_config, load_applications
from pos_gateway.gateway.readers.models import (
    Driver,
    ReaderModel,
    Way,
    load_models,
    model_by_usb,
    model_of,
)
from pos_gateway.gateway.readers.port import Indication
from pos_gateway.gateway.readers.system import load_driver_options

CHECKOUT = Path(__file__).parents[2]
MODELS = load_models()


def test_ten_models_are_described() -> None:
    assert len(MODELS) == 10
    assert len({model.name for model in MODELS}) == 10


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_nothing_claims_to_have_been_tried(model: ReaderModel) -> None:
    assert not model.tried_on_hardware


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_approved_never_looks_like_declined(model: ReaderModel) -> None:
    if model.indications is None:
        return
    shown = {i: model.indications.of(i) for i in Indication}
    assert all(shown.values()), "a model with lights shows every moment"
    approved, declined = shown[Indication.APPROVED], shown[Indication.DECLINED]
    assert approved is not None
    assert declined is not None
    assert approved.step != declined.step
    assert approved.shows != declined.shows


def test_names_and_usb_ids_lead_to_one_model() -> None:
    names = {
        "ACS ACR122U PICC Interface 00 00": "ACS ACR122U",
        "ACS ACR1252 Dual Reader [ACR1252 Dual Reader PICC] 00 00": "ACS ACR1252U",
        "ACS ACR1255U-J1 [ACR1255U-J1] 00 00": "ACS ACR1255U-J1",
        "HID Global OMNIKEY 5022 Smart Card Reader [OMNIKEY 5022] 00 00": "HID Omnikey 5022",
        "Identiv uTrust 3700 F CL Reader [uTrust 3700 F CL Reader] 00 00": "Identiv uTrust 3700 F",
        "SONY FeliCa RC-S300/S [FeliCa Port/PaSoRi 4.0] 00 00": "Sony RC-S300",
        "tty:USB0:pn532": "PN532 on a serial port",
    }
    for name, expected in names.items():
        found = [model.name for model in MODELS if re.search(model.name_pattern, name)]
        assert found == [expected], name
    found_model = model_of("ACS ACR122U PICC Interface 00 00", MODELS)
    assert found_model is not None
    assert found_model.ways == (Way.CONTROL, Way.PSEUDO_APDU)
    assert model_of("POS Gateway lab reader 0 00 00", MODELS) is None
    sony = model_by_usb("054c", "06c3", MODELS)
    assert sony is not None
    assert (sony.name, sony.driver) == ("Sony RC-S380", Driver.NFCPY)
    ids = [str(usb) for model in MODELS for usb in model.usb]
    assert len(ids) == len(set(ids))


def test_udev_gives_the_gateway_exactly_its_own_frontends() -> None:
    rules = (firmware_config() / "udev" / "70-pos-gateway-readers.rules").read_text()
    given = set(re.findall(r'ATTR\{idVendor\}=="(\w{4})", ATTR\{idProduct\}=="(\w{4})"', rules))
    ours = {
        (usb.vendor.lower(), usb.product.lower())
        for model in MODELS
        if model.driver is Driver.NFCPY
        for usb in model.usb
    }
    assert given == ours


def test_firmware_versions_are_read_from_answers() -> None:
    by_name = {model.name: model.firmware for model in MODELS}
    assert by_name["ACS ACR122U"].read(b"ACR122U207") == "ACR122U207"
    header = bytes.fromhex("E10000000D")
    assert by_name["ACS ACR1252U"].read(header + b"ACR1252U_V207") == "ACR1252U_V207"
    # Captured from an Omnikey 3x21 (public), which answers in the same form.
    assert by_name["HID Omnikey 5022"].read(bytes.fromhex("BD0585030103019000")) == "1.3.1"
    assert by_name["Identiv uTrust 3700 F"].read(bytes.fromhex("0102000300")) == "1.2"
    assert by_name["Identiv uTrust 3700 F"].read(b"\x01") is None
    assert by_name["ACS ACR122U"].read(b"\xff\x00") is None


GOOD = (firmware_config() / "readers" / "acs-acr122u.toml").read_text()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("tried_on_hardware", "tried_on_hardwear", r"unknown key 'tried_on_hardwear'.*'tried_on_hardware'"),
        ("[indications.approved]", "[indications.aproved]", r"unknown key 'indications.aproved'.*'approved'"),
        ('product = "2200"', 'product = "22"', r"'usb.0.product': a USB id is four"),
        ('send = "FF 00 48 00 00"', 'send = "FF 0"', r"'firmware.send': bytes in hexadecimal"),
        ('driver = "pcsc"', 'driver = "usb"', r"'driver': one of pcsc, nfcpy"),
        ('name_pattern = "ACR122"', 'name_pattern = "("', r"'name_pattern': not a regular expression"),
        ("blocks_ms = 500", "blocks_ms = 2001", "'indications.declined.step.0.blocks_ms'"),
        ("blocks_ms = 500", "blocks_ms = 1500, wait_ms = 600", "takes longer than 2000 ms"),
        ('ways = ["control", "pseudo_apdu"]', "ways = []", "no way to send them"),
        ('purpose = "no', 'read = "FF"\npurpose = "no', "'read' and 'unless' go together"),
        ('{ send = "FF 00 40 0C 04 00 00 00 00" }', '{ send = "FF", blocks_ms = 1 }', "must neither"),
    ],
)
def test_a_mistake_in_a_model_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    (tmp_path / "readers").mkdir()
    path = tmp_path / "readers" / "model.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(InvalidConfiguration, match=says) as caught:
        load_models(firmware=tmp_path)
    assert "model.toml" in str(caught.value)


def test_the_line_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "readers").mkdir()
    text = GOOD.replace('shows = "orange"', 'show = "orange"')
    (tmp_path / "readers" / "model.toml").write_text(text)
    line = text.splitlines().index('show = "orange"') + 1
    with pytest.raises(InvalidConfiguration, match=rf"line {line} .*did you mean 'shows'"):
        load_models(firmware=tmp_path)


def test_a_shop_can_describe_a_reader_itself(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(GOOD.replace("ACS ACR122U", "ACS ACR122U of this shop"))
    found = model_of("ACS ACR122U PICC Interface 00 00", load_models(extra=tmp_path))
    assert found is not None
    assert found.name == "ACS ACR122U of this shop"
    assert len(load_models(extra=tmp_path / "missing")) == 10


def capk_toml(key: CaPublicKey, **changes: str) -> str:
    modulus = key.modulus.to_bytes(key.size, "big").hex().upper()
    index = f"{key.index:02X}"
    checked = key.rid + bytes([key.index]) + bytes.fromhex(modulus) + b"\x03"
    fields = {
        "rid": f'"{key.rid.hex().upper()}"',
        "index": f'"{index}"',
        "modulus": f'"{modulus}"',
        "exponent": "3",
        "expires": "2036-12-31",
        "checksum": f'"{hashlib.sha1(checked, usedforsecurity=False).hexdigest()}"',
    } | changes
    return "[[ca_key]]\n" + "".join(f"{name} = {value}\n" for name, value in fields.items())


def test_a_capk_is_taken_with_its_checksum_and_no_other(tmp_path: Path, capk: CaPublicKey) -> None:
    text = (firmware_config() / "applications.toml").read_text()
    path = tmp_path / "applications.toml"
    path.write_text(text + capk_toml(capk))
    (entry,) = load_applications(tmp_path).ca_key
    assert entry.public_key() == CaPublicKey(
        capk.rid, capk.index, capk.modulus, capk.exponent, date(2036, 12, 31)
    )
    for changes, says in (
        ({"index": '"95"'}, "the checksum does not fit"),
        ({"exponent": "65537"}, "the checksum does not fit"),
        ({"exponent": "5"}, "ca_key.0.exponent"),
        ({"rid": '"A0000000"'}, "a RID is 5 bytes"),
        ({"expires": '"soon"'}, "ca_key.0.expires"),
        ({"checksums": '"00"'}, r"unknown key 'ca_key.0.checksums'.*did you mean 'checksum'"),
    ):
        path.write_text(text + capk_toml(capk, **changes))
        with pytest.raises(InvalidConfiguration, match=says):
            load_applications(tmp_path)


def test_the_escape_option_is_libccids(tmp_path: Path) -> None:
    options = load_driver_options()
    # SCARD_CTL_CODE(n) of pcsc-lite's reader.h.
    assert options.escape.control_code == 0x42000000 + 1
    assert options.escape.feature_query_code == 0x42000000 + 3400
    installed = Path(options.escape.info_plist)
    if installed.exists():
        assert options.escape.key in plistlib.loads(installed.read_bytes())


def test_the_systemd_units_are_units(tmp_path: Path) -> None:
    folder = firmware_config() / "systemd"
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(folder / "pos-gateway.service")
    assert unit["Service"]["ExecStart"].split()[1:3] == ["gateway", "serve"]
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: the unit was only parsed")
    # It also checks that the program is there: stand one in.
    text = (folder / "pos-gateway.service").read_text().replace("/usr/local/bin/pos-gateway", "/bin/true")
    (tmp_path / "pos-gateway.service").write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "pos-gateway.service")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    complaints = [line for line in done.stderr.splitlines() if "pos-gateway" in line]
    assert not complaints, done.stderr


def test_the_wheel_carries_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("pos_gateway", "firmware_config"):
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source / name)
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    files = {p.relative_to(firmware_config()) for p in firmware_config().rglob("*") if p.is_file()}
    carried = tmp_path / "installed" / "pos_gateway" / "firmware_config"
    assert {p.relative_to(carried) for p in carried.rglob("*") if p.is_file()} == files
    # What is installed finds its own.
    probe = (
        "from pos_gateway.gateway.config import firmware_config, load_applications\n"
        "from pos_gateway.gateway.readers.models import load_models\n"
        "load_applications()\nprint(firmware_config(), len(load_models()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == [str(carried), "10"]
