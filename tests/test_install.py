"""`tools/install` below a folder of its own: layout, upgrade to a program with another form of the journal,
and back; releases that do not run, or cannot take the journal over, change nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pos_gateway.errors import Conflict
from pos_gateway.gateway.journal import JournalReader
from pos_gateway.lab.faults.tomorrow import pay
from pos_gateway.lab.shop import Shop

CHECKOUT = Path(__file__).parents[1]
UNITS = CHECKOUT / "firmware_config" / "systemd"


def environment(folder: Path, module: str, first: str = "") -> Path:
    """What an installed release offers, made of this checkout's code."""
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin" / "pos-gateway"
    program.write_text(f'#!/bin/sh\n{first}\nexec {sys.executable} -m {module} "$@"\n')
    program.chmod(0o755)
    return folder


def install(root: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CHECKOUT / "tools" / "install", "--root", root, *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    done = install(root, "--venv", environment(tmp_path / "today", "pos_gateway.cli"))
    assert done.returncode == 0, done.stderr
    return root


def current(root: Path) -> str:
    return str((root / "opt/pos-gateway/current").readlink())


def test_everything_is_where_the_units_look_for_it(root: Path) -> None:
    assert current(root) == "releases/1"
    for path in (
        "etc/systemd/system/pos-gateway.service",
        "etc/systemd/system/pcscd.service.d/pos-gateway.conf",
        "etc/udev/rules.d/70-pos-gateway-readers.rules",
        "etc/modprobe.d/pos-gateway-nfc.conf",
        "opt/pos-gateway/current/bin/pos-gateway",
        "opt/pos-gateway/current/docs/operating.md",
    ):
        assert (root / path).is_file(), path
    assert (root / "var/lib/pos-gateway").stat().st_mode & 0o777 == 0o700
    assert str((root / "usr/local/bin/pos-gateway").readlink()) == "/opt/pos-gateway/current/bin/pos-gateway"


def test_an_upgrade_keeps_the_journal_and_so_does_going_back(
    root: Path, tmp_path: Path, ledger_home: Path
) -> None:
    place = root / "var/lib"
    shutil.copytree(ledger_home, place / "ledger")
    with Shop(place, gateway="pos-gateway") as shop:
        paid = pay(shop, 3)
        last = shop.journal.last_sequence
        journal = shop.home.journal
    tomorrow = environment(tmp_path / "tomorrow", "pos_gateway.lab.faults.tomorrow")
    done = install(root, "--venv", tomorrow)
    assert done.returncode == 0, done.stderr
    assert current(root) == "releases/2"
    assert len(list((place / "pos-gateway/upgrades").iterdir())) == 1
    with pytest.raises(Conflict, match="newer program"):
        Shop(place, gateway="pos-gateway")
    done = install(root, "--back")
    assert done.returncode == 0, done.stderr
    assert current(root) == "releases/1"
    with JournalReader.open(journal) as reader:
        assert reader.last_sequence == last
        assert [str(record.id) for record in reader.records() if str(record.id) in paid] == paid
    with Shop(place, gateway="pos-gateway") as shop:
        assert len(pay(shop, 1)) == 1


@pytest.mark.parametrize(
    ("first", "told"),
    [
        ("exit 1", "the new release does not run"),
        ('case "$*" in *upgrade*) exit 5;; esac', "the journal was not taken over"),
    ],
)
def test_a_release_that_fails_changes_nothing(
    root: Path, tmp_path: Path, ledger_home: Path, first: str, told: str
) -> None:
    place = root / "var/lib"
    shutil.copytree(ledger_home, place / "ledger")
    with Shop(place, gateway="pos-gateway") as shop:
        pay(shop, 1)
    broken = environment(tmp_path / "broken", "pos_gateway.lab.faults.tomorrow", first)
    done = install(root, "--venv", broken)
    assert done.returncode == 1
    assert told in done.stderr
    assert current(root) == "releases/1"
    with Shop(place, gateway="pos-gateway") as shop:
        assert len(pay(shop, 1)) == 1


def test_the_ledger_is_installed_beside_it(root: Path, tmp_path: Path) -> None:
    done = install(root, "--ledger", "--venv", tmp_path / "today")
    assert done.returncode == 0, done.stderr
    assert (root / "etc/systemd/system/pos-ledger.service").is_file()


@pytest.mark.parametrize("unit", ["pos-gateway", "pos-ledger"])
def test_the_units_are_hardened(unit: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    done = subprocess.run(
        [
            *("systemd-analyze", "security", "--offline=true", "--threshold=25"),
            str(UNITS / f"{unit}.service"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze cannot look at files")
    assert done.returncode == 0, done.stdout[-400:]
