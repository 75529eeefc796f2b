"""The virtual reader as a laboratory instrument: private, quiet, and gone when its owner is."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pos_gateway.errors import InvalidInput, ReaderUnavailable
from pos_gateway.lab import card_host
from pos_gateway.lab.card_host import CONTROL_SOCKET, PCSCD_SOCKET
from pos_gateway.lab.virtual_reader import ForeignCard, VirtualReader
from pos_gateway.lab.vpcd import contactless_atr

LIST_READERS = """
from pos_gateway.gateway.readers.pcsc import list_readers
print(*sorted(list_readers()), sep="\\n")
"""
OWNER = """
import sys
from pos_gateway.lab.virtual_reader import VirtualReader
reader = VirtualReader()
print(reader.environment["PCSCLITE_CSOCK_NAME"], flush=True)
sys.stdin.read()
"""


def listed_elsewhere(reader: VirtualReader) -> tuple[str, ...]:
    """What another process sees through this reader's environment."""
    done = subprocess.run(
        [sys.executable, "-c", LIST_READERS],
        env={**os.environ, **reader.environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return tuple(done.stdout.split("\n")[:-1])


def eventually(condition: Callable[[], bool]) -> bool:
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.05)
    return False


def processes_with(text: str) -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            pass
    return found


def test_the_atr_is_that_of_a_contactless_card() -> None:
    # PC/SC part 3, §3.1.3.2.3.1: 3B 8n 80 01, historical bytes, XOR of all but the first.
    assert contactless_atr(b"") == bytes.fromhex("3B80800101")
    assert contactless_atr(b"\x80") == bytes.fromhex("3B8180018080")  # a MIFARE DESFire's


def test_two_readers_side_by_side_keep_apart() -> None:
    with VirtualReader(slots=1) as one, VirtualReader(slots=3) as three:
        assert (len(one.names), len(three.names)) == (2, 4)  # vpcd's readers have two slots each
        assert listed_elsewhere(one) == one.names
        assert listed_elsewhere(three) == three.names
        one.insert(ForeignCard.BLANK)
        assert one.status() is not None
        assert three.status() is None


def test_nothing_listens_on_the_network_of_this_machine(virtual_reader: VirtualReader) -> None:
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", 0x8C7B))


def test_pcscd_and_cards_die_with_their_owner() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdin is not None
    directory = Path(owner.stdout.readline().strip()).parent
    try:
        assert len(processes_with(str(directory))) == 2  # the host and its pcscd
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert eventually(lambda: not processes_with(str(directory)))
    finally:
        owner.stdin.close()
        owner.stdout.close()
        shutil.rmtree(directory, ignore_errors=True)


def test_pcscd_dies_with_its_host() -> None:
    with VirtualReader(slots=1) as reader:
        directory = Path(reader.environment["PCSCLITE_CSOCK_NAME"]).parent
        host = next(pid for pid in processes_with(str(directory)) if is_host(pid))
        os.kill(host, signal.SIGKILL)
        assert eventually(lambda: not processes_with(str(directory)) - {host})
        with pytest.raises(ReaderUnavailable, match="gone"):
            reader.remove()


def is_host(pid: int) -> bool:
    return b"card_host" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_closing_leaves_nothing_behind() -> None:
    reader = VirtualReader(slots=1)
    directory = Path(reader.environment["PCSCLITE_CSOCK_NAME"]).parent
    reader.close()
    assert not directory.exists()
    assert not processes_with(str(directory))
    with pytest.raises(ReaderUnavailable, match="gone"):
        reader.status()
    reader.close()


def test_leftovers_are_no_hindrance(tmp_path: Path) -> None:
    directory = Path(os.path.relpath(tmp_path))  # a short path even where the temporary folder's is not
    for name in (CONTROL_SOCKET, PCSCD_SOCKET):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(directory / name))
    (tmp_path / "reader.conf.d").mkdir()
    (tmp_path / "reader.conf.d" / "old").write_text("FRIENDLYNAME nonsense\n")
    with VirtualReader(slots=2, directory=directory) as reader:
        assert len(reader.names) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="without root, every test here shows it")
def test_it_works_without_administrator_rights() -> None:
    # Root without CAP_SYS_ADMIN may no more make a network namespace than any user, but can still read
    # this checkout. Dropped from the bounding set (PR_CAPBSET_DROP), it is gone after the exec.
    drop = "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 21); os.execv(sys.argv[1], sys.argv[1:])"
    unshare = shutil.which("unshare") or "/usr/bin/unshare"
    probe = [sys.executable, "-c", drop, unshare, "-rn", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("this system gives nobody a user namespace, as inside a chroot")
    use = "from pos_gateway.lab.virtual_reader import VirtualReader as V\nwith V() as r: print(len(r.names))"
    done = subprocess.run(
        [sys.executable, "-c", drop, sys.executable, "-c", use], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


@pytest.mark.parametrize("slots", [0, 17])
def test_the_number_of_slots_is_bounded(slots: int) -> None:
    with pytest.raises(InvalidInput, match="slots"):
        VirtualReader(slots=slots)


def test_no_such_slot(virtual_reader: VirtualReader) -> None:
    with pytest.raises(InvalidInput, match="slot"):
        virtual_reader.insert(ForeignCard.BLANK, slot=2)


def test_a_file_that_makes_no_card(virtual_reader: VirtualReader, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text('{"pan": "not a card"}')
    with pytest.raises(InvalidInput, match="personalisation"):
        virtual_reader.insert(path)
    with pytest.raises(ReaderUnavailable, match="missing"):
        virtual_reader.insert(tmp_path / "missing.json")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(ReaderUnavailable, match="apt-get install pcscd"):
        card_host.find_pcscd()
    with pytest.raises(ReaderUnavailable, match="apt-get install vsmartcard-vpcd"):
        card_host.find_driver(roots=[tmp_path])
