"""`power`: the power goes at every point of a recorded run; the real code opens what a disk may hold then."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pos_gateway.errors import PosGatewayError
from pos_gateway.lab.faults import shim
from pos_gateway.lab.faults.disk import Disk, write_files
from pos_gateway.lab.faults.finding import Finding
from pos_gateway.lab.faults.journal_writer import TOLD, read_told, what_is_wrong
from pos_gateway.lab.faults.shim import Call, Operation

COMMITS: Final = 150
SHORT_POINTS: Final = 100
_WRITER_TIMEOUT_S: Final = 300
_KEPT: Final = (0.0, 0.5, 1.0)
"""Of what was not synced: nothing, some sectors, everything that was written so far."""


def record_run(library: Path, folder: Path, commits: int, fault: shim.Fault | None = None) -> list[Operation]:
    """Run the journal's script in a process that is watched.

    Raises:
        PosGatewayError: it ended badly.
    """
    home = folder / "watched"
    home.mkdir()
    log = folder / "recording"
    done = subprocess.run(
        [sys.executable, "-m", "pos_gateway.lab.faults.journal_writer", str(home), str(commits)],
        env=shim.environment(library, home, log=log, fault=fault),
        capture_output=True,
        text=True,
        check=False,
        timeout=_WRITER_TIMEOUT_S,
    )
    if done.returncode:
        raise PosGatewayError(f"the journal's script failed: {done.stderr.strip()[-500:]}")
    # The index of the write-ahead log is made anew by whoever opens the journal first.
    return [operation for operation in shim.read_recording(log) if not operation.name.endswith("-shm")]


def power(folder: Path, seed: int, *, points: int | None = None, commits: int = COMMITS) -> Finding:
    """Crash after so many of the recorded calls, chosen at random; after every one of them without."""
    chance = random.Random(seed)
    operations = record_run(shim.build(folder), folder, commits)
    changing = [place for place, o in enumerate(operations) if o.name != TOLD]
    chosen = set(changing if points is None else chance.sample(changing, min(points, len(changing))))
    disk, told = Disk(), b""
    tried = lost = 0
    wrong: list[str] = []
    for place, operation in enumerate(operations):
        if operation.name == TOLD:
            told += operation.data
            continue
        disk.apply(operation)
        if place not in chosen:
            continue
        outcomes = read_told(told)
        for kept in _KEPT:
            with ramdisk() as found:
                write_files(disk.after_power_cut(chance if 0 < kept < 1 else None, kept=kept), found)
                missing, others = what_is_wrong(found, outcomes)
            tried += 1
            lost += missing
            wrong += [f"cut after call {place}, {kept:.0%} kept: {text}" for text in others]
    final = read_told(told)
    syncs = sum(operation.call is Call.SYNC for operation in operations)
    return Finding(
        scenario="power",
        seed=seed,
        tried=f"power cut at {len(chosen)} of {len(changing)} recorded calls ({syncs} syncs), unsynced "
        "sectors dropped, torn and kept",
        times=tried,
        acknowledged=sum(outcome == "yes" for outcome in final.values()),
        lost=lost,
        wrong=tuple(wrong[:20]),
    )


@contextmanager
def ramdisk() -> Iterator[Path]:
    """A folder for one crash's disk; in memory where the system has such a place."""
    memory = Path("/dev/shm")  # noqa: S108 - only a faster place for a temporary folder
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)
