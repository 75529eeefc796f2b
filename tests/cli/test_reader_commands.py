"""`reader …` and what `doctor` says about readers, in front of the real pcscd."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pos_gateway.cli import main as cli
from pos_gateway.emv.personalisation import Personalisation
from pos_gateway.gateway.config import firmware_config
from pos_gateway.lab.programs import Program
from pos_gateway.lab.shop import Shop
from pos_gateway.lab.udp_card import UdpField
from pos_gateway.lab.virtual_card import VirtualCard
from pos_gateway.lab.virtual_reader import VirtualReader

Told = tuple[Path, subprocess.CompletedProcess[str]]
Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr("sys.argv", ["pos-gateway", *map(str, arguments), "--json"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return int(exit.value.code or 0), json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def say(*arguments: str | Path) -> str:
        monkeypatch.setattr("sys.argv", ["pos-gateway", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit):
            cli.main()
        return "".join(capsys.readouterr())

    return say


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A gateway's home that takes the virtual reader for one with an ACR122U's commands."""
    (tmp_path / "home" / "readers").mkdir(parents=True)
    text = (firmware_config() / "readers" / "acs-acr122u.toml").read_text()
    (tmp_path / "home" / "readers" / "lab.toml").write_text(
        text.replace('name = "ACS ACR122U"', 'name = "Lab reader"').replace('"ACR122"', '"lab reader"')
    )
    return tmp_path / "home"


@pytest.fixture
def field() -> Iterator[UdpField]:
    field = UdpField()
    yield field
    field.close()


def test_readers_of_both_drivers_are_listed(
    run: Run, home: Path, virtual_reader: VirtualReader, field: UdpField
) -> None:
    (home / "gateway.toml").write_text(f'[reader]\nfrontends = ["{field.path}"]\n')
    code, answer = run("reader", "list", "--home", home)
    assert code == 0
    assert answer["readers"] == [
        {"name": name, "driver": "pcsc", "model": "Lab reader"} for name in virtual_reader.names
    ] + [{"name": field.path, "driver": "nfcpy", "model": None}]


def test_a_probe_says_what_it_could_not_learn(
    run: Run, say: Callable[..., str], home: Path, virtual_reader: VirtualReader, field: UdpField
) -> None:
    (home / "gateway.toml").write_text(f'[reader]\nfrontends = ["{field.path}"]\n')
    code, answer = run("reader", "probe", "--home", home)
    first, *_, udp = answer["readers"]
    assert code == 0
    assert (first["model"], first["firmware"], first["commands"]) == ("Lab reader", None, "refused")
    assert first["tried_on_hardware"] is False
    assert first["shows"]["approved"] == "green, one short beep"
    assert first["quirks"]
    assert (udp["driver"], udp["firmware"], udp["firmware_from"]) == ("nfcpy", "UDP", "nfcpy")
    assert all(not reader["problem"] for reader in answer["readers"])
    told = say("reader", "probe", "--home", home, "--reader", "udp")
    assert "firmware  UDP" in told
    assert "Lab reader" not in told


def test_a_light_that_cannot_be_reached_is_no_success(
    run: Run, home: Path, virtual_reader: VirtualReader
) -> None:
    code, answer = run("reader", "light", "approved", "--home", home)
    assert code == 1
    assert [row["shown"] for row in answer["lights"]] == [False, False]
    assert answer["lights"][0]["looks_like"] == "green, one short beep"


def test_no_such_reader(run: Run, home: Path, virtual_reader: VirtualReader) -> None:
    code, answer = run("reader", "probe", "--home", home, "--reader", "RC-S380")
    assert (code, answer["error"]["code"]) == (7, "NotFound")


def test_configure_says_then_writes_then_has_nothing_to_do(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "system"
    (root / "etc").mkdir(parents=True)
    (root / "etc/libccid_Info.plist").write_text(
        "<plist><dict><key>ifdDriverOptions</key><string>0x0000</string></dict></plist>"
    )
    code, answer = run("reader", "configure", "--root", root)
    assert (code, len(answer["wanted"]), answer["written"]) == (1, 3, [])
    assert "0x0000" in (root / "etc/libccid_Info.plist").read_text()
    code, answer = run("reader", "configure", "--root", root, "--apply")
    assert (code, len(answer["written"])) == (0, 3)
    assert "0x0001" in (root / "etc/libccid_Info.plist").read_text()
    code, answer = run("reader", "configure", "--root", root)
    assert (code, answer["wanted"]) == (0, [])


def test_the_doctor_explains_how_escape_commands_are_enabled(
    told: Told, run: Run, home: Path, virtual_reader: VirtualReader
) -> None:
    place = home.parent / "gateway"
    shutil.copytree(told[0] / "gateway", place)
    code, answer = run("doctor", "--home", place)
    findings = {finding["name"]: finding for finding in answer["findings"]}
    assert (findings["lights"]["health"], findings["kernel modules"]["health"]) == ("ok", "ok")
    assert findings["reader rights"]["health"] == "ok"
    shutil.copytree(home / "readers", place / "readers")
    code, answer = run("doctor", "--home", place)
    lights = next(f for f in answer["findings"] if f["name"] == "lights")
    assert (code, lights["health"]) == (0, "warn")
    assert "Lab reader" in lights["text"]
    for word in ("reader configure --apply", "/etc/libccid_Info.plist", "0x0001", "restart pcscd"):
        assert word in lights["advice"]


def test_a_card_is_read_on_a_frontend_too(told: Told, run: Run, field: UdpField, tmp_path: Path) -> None:
    place = tmp_path / "gateway"
    shutil.copytree(told[0] / "gateway", place)
    (place / "gateway.toml").write_text(f'[reader]\nfrontends = ["{field.path}"]\n')
    card = next(path for path in told[0].glob("acc*.card.json"))
    field.insert(VirtualCard(Personalisation.from_json(card.read_text())))
    code, read = run("card", "read", "--home", place, "--reader", field.path, "--wait", "20")
    assert (code, read["authentic"]) == (0, True)


def test_a_gateway_takes_a_tap_on_a_frontend(
    run: Run, field: UdpField, ledger_home: Path, tmp_path: Path
) -> None:
    shutil.copytree(ledger_home, tmp_path / "ledger")
    with Shop(tmp_path) as shop:
        _, own = shop.issue(limit_minor=1000)
        shop.publish()
        place = shop.home.path
    (place / "gateway.toml").write_text(
        f'[reader]\nname_pattern = "udp"\nfrontends = ["{field.path}"]\n[http]\nport = 0\n'
    )
    card = VirtualCard(own)
    gateway = Program("gateway", "serve", "--home", str(place), log=tmp_path / "log")
    try:
        code, status = run("gateway", "status", "--home", place)
        (lane,) = status["lanes"]
        assert (code, lane["reader"], lane["present"]) == (0, field.path, True)
        field.insert(card)
        code, paid = run("payment", "start", "0.01", "--home", place)
        assert (code, paid["state"]) == (0, "approved"), paid
        assert card.state.counter == own.counter + 1
    finally:
        gateway.stop()
