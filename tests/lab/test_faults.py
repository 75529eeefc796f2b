"""A short version of each scenario of `tools/faults`; and that the harness notices what it is there for."""

from __future__ import annotations

import errno
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pos_gateway.lab.faults import shim
from pos_gateway.lab.faults.carry import carry
from pos_gateway.lab.faults.clock import clock
from pos_gateway.lab.faults.disk import Disk, apply_all, write_files
from pos_gateway.lab.faults.disk_errors import fsync_error
from pos_gateway.lab.faults.disk_full import disk_full
from pos_gateway.lab.faults.finding import Finding
from pos_gateway.lab.faults.journal_writer import JOURNAL, TOLD, draft, open_journal, read_told, what_is_wrong
from pos_gateway.lab.faults.kill import kill
from pos_gateway.lab.faults.partition import partition
from pos_gateway.lab.faults.power import power, record_run
from pos_gateway.lab.faults.replace import replace
from pos_gateway.lab.faults.replay import replay
from pos_gateway.lab.faults.restore import restore
from pos_gateway.lab.faults.shim import Call, Operation
from pos_gateway.lab.faults.upgrade import upgrade


@pytest.fixture
def seed() -> int:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return seed


def check(finding: Finding) -> None:
    assert finding.well, finding.as_json()
    assert finding.acknowledged > 0
    told = finding.as_json()
    assert (told["lost"], told["posted_twice"], told["out_of_balance_minor"]) == (0, 0, 0)


def test_kill(tmp_path: Path, seed: int, ledger_home: Path) -> None:
    check(kill(tmp_path / "site", seed, kills=5, ledger=ledger_home))


def test_power(tmp_path: Path, seed: int) -> None:
    check(power(tmp_path, seed, points=25))


def test_fsync_error(tmp_path: Path, seed: int) -> None:
    check(fsync_error(tmp_path, seed, errors=4))


@pytest.mark.parametrize("mount", [None, False])
def test_disk_full(tmp_path: Path, seed: int, ledger_home: Path, mount: bool | None) -> None:
    check(disk_full(tmp_path / "site", seed, fillings=2, ledger=ledger_home, mount=mount))


def test_restore(tmp_path: Path, seed: int, ledger_home: Path) -> None:
    found = restore(tmp_path / "site", seed, restores=2, ledger=ledger_home)
    check(found)
    assert found.details["forgotten_by_backups"] > 0


def test_partition(tmp_path: Path, seed: int, ledger_home: Path) -> None:
    check(partition(tmp_path / "site", seed, rounds=6, ledger=ledger_home))


def test_clock(tmp_path: Path, seed: int, ledger_home: Path) -> None:
    check(clock(tmp_path, seed, jumps=12, ledger=ledger_home))


def test_carry(tmp_path: Path, seed: int, ledger_home: Path) -> None:
    check(carry(tmp_path / "site", seed, journeys=25, ledger=ledger_home))


def test_replace(tmp_path: Path, seed: int, ledger_home: Path) -> None:
    check(replace(tmp_path / "site", seed, deaths=5, ledger=ledger_home))


def test_upgrade(tmp_path: Path, seed: int, ledger_home: Path) -> None:
    check(upgrade(tmp_path / "site", seed, upgrades=2, ledger=ledger_home))


def test_replay(tmp_path: Path, seed: int, ledger_home: Path) -> None:
    check(replay(tmp_path, seed, attacks=20, ledger=ledger_home))


def test_the_command_line_runs_any_of_them_and_prints_one_json_line_each() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pos_gateway.lab.faults",
            "replay",
            "power",
            "--times",
            "3",
            "--seed",
            "7",
            "--json",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "seed 7\n"
    replayed, cut = map(json.loads, done.stdout.splitlines())
    assert (replayed["scenario"], replayed["seed"], replayed["times"]) == ("replay", 7, 3)
    assert (cut["scenario"], cut["well"], cut["lost"]) == ("power", True, 0)


def write(name: str, at: int, data: bytes) -> Operation:
    return Operation(Call.WRITE, name, at, data, 0, "")


def sync(name: str, error: int = 0) -> Operation:
    return Operation(Call.SYNC, name, 0, b"", error, "")


def test_a_power_cut_takes_what_was_not_synced_and_no_more() -> None:
    disk = apply_all(
        [write("a", 0, b"x" * 1024), sync("a"), sync(""), write("a", 512, b"y" * 1024), write("b", 0, b"z")]
    )
    assert disk.after_power_cut(None, kept=0.0) == {"a": b"x" * 1024}
    assert disk.after_power_cut(None, kept=1.0) == {"a": b"x" * 512 + b"y" * 1024, "b": b"z"}
    torn = {disk.after_power_cut(random.Random(n), kept=0.5)["a"] for n in range(40)}
    assert torn == {
        b"x" * 1024,
        b"x" * 512 + b"y" * 512,
        b"x" * 1024 + b"y" * 512,
        b"x" * 512 + b"y" * 1024,
    }


def test_names_are_durable_with_their_folder_and_data_with_their_file() -> None:
    disk = apply_all([write("a", 0, b"1"), sync("a")])
    assert disk.after_power_cut(None, kept=0.0) == {}
    disk.apply(sync(""))
    disk.apply(Operation(Call.RENAME, "a", 0, b"", 0, "b"))
    assert disk.after_power_cut(None, kept=0.0) == {"a": b"1"}
    assert disk.after_power_cut(None, kept=1.0) == {"b": b"1"}
    disk.apply(Operation(Call.UNLINK, "b", 0, b"", 0, ""))
    disk.apply(sync(""))
    assert disk.after_power_cut(None, kept=0.0) == {}


def test_after_a_failed_sync_only_what_is_written_again_becomes_durable() -> None:
    disk = Disk()
    for operation in [write("a", 0, b"x"), sync(""), sync("a", errno.EIO), sync("a")]:
        disk.apply(operation)
    assert disk.after_power_cut(None, kept=1.0) == {"a": b""}
    for operation in [write("a", 0, b"x"), sync("a")]:
        disk.apply(operation)
    assert disk.after_power_cut(None, kept=0.0) == {"a": b"x"}


_WATCHED = """
import os, sys
folder = sys.argv[1]
file = os.open(folder + "/a", os.O_RDWR | os.O_CREAT)
os.write(file, b"one")
os.pwrite(file, b"two", 10)
os.writev(file, [b"", b"three"])
os.ftruncate(file, 4)
os.fsync(file)
for call in (lambda: os.fdatasync(file), lambda: os.fdatasync(file)):
    try:
        call()
    except OSError as error:
        print(error.errno)
os.rename(folder + "/a", folder + "/b")
os.unlink(folder + "/b")
os.fsync(os.open(folder, os.O_RDONLY))
open(folder + "/../elsewhere", "w").write("unseen")
"""


def test_the_shim_records_what_a_process_does_and_fails_what_it_is_told_to(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    fault = shim.Fault("sync", 2, errno.EIO, 1, "a")
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED, str(folder)],
        env=shim.environment(shim.build(tmp_path), folder, log=tmp_path / "log", fault=fault),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(errno.EIO)]
    assert list(shim.read_recording(tmp_path / "log")) == [
        write("a", 0, b"one"),
        write("a", 10, b"two"),
        write("a", 3, b"three"),
        Operation(Call.TRUNCATE, "a", 4, b"", 0, ""),
        sync("a"),
        sync("a", errno.EIO),
        sync("a"),
        Operation(Call.RENAME, "a", 0, b"", 0, "b"),
        Operation(Call.UNLINK, "b", 0, b"", 0, ""),
        sync(""),
    ]


def test_a_wrong_clock_is_seen_by_the_process_it_is_for(tmp_path: Path) -> None:
    clock = shim.WrongClock(shim.build(tmp_path), tmp_path / "clock")
    clock.set(86_400 * 365.0)
    script = (
        "import time, datetime; print(time.time(), datetime.datetime.now().timestamp(), time.monotonic())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=clock.environment(), capture_output=True, text=True, check=True
    )
    wall, also, steady = map(float, done.stdout.split())
    assert wall - time.time() > 86_400 * 364
    assert also - time.time() > 86_400 * 364
    assert abs(steady - time.monotonic()) < 86_400


def test_a_write_ahead_log_that_was_refused_promises_nothing(tmp_path: Path) -> None:
    """SQLite then stays in rollback mode without a word, where a power cut may undo a commit."""
    library = shim.build(tmp_path)
    operations = record_run(library, tmp_path, 3, shim.Fault("sync", 1, errno.EIO, 1, JOURNAL))
    told = read_told(b"".join(o.data for o in operations if o.name == TOLD))
    assert list(told.values()) == ["no", "yes", "yes"]
    found = tmp_path / "found"
    found.mkdir()
    write_files(apply_all(operations).after_power_cut(None, kept=0.0), found)
    assert what_is_wrong(found, told) == (0, [])


def test_a_lost_record_and_a_denied_one_are_noticed(tmp_path: Path) -> None:
    with open_journal(tmp_path) as journal:
        journal.append_all([draft(0), draft(1)])
    assert what_is_wrong(tmp_path, {draft(0).id: "yes", draft(1).id: "unknown"}) == (0, [])
    assert what_is_wrong(tmp_path, {d.id: "yes" for d in map(draft, range(3))}) == (1, [])
    lost, wrong = what_is_wrong(tmp_path, {draft(0).id: "no", draft(1).id: "try"})
    assert lost == 0
    assert "denied" in wrong[0]
    assert "nobody made" in what_is_wrong(tmp_path, {draft(0).id: "yes"})[1][0]
    (tmp_path / "journal.sqlite3").write_bytes(b"torn" * 5000)
    assert what_is_wrong(tmp_path, {draft(0).id: "yes"})[0] == 1
