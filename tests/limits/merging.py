"""Merges base and delta in a process of its own, as a gateway would, so that a test can kill it.

python -m tests.limits.merging FOLDER [PAUSE_S]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from pos_gateway.limits.merge import Merge
from pos_gateway.limits.snapshot import Snapshot
from pos_gateway.snapshot_file import SnapshotFile
from tests.limits.making import KEYS

UNFINISHED = "merged.unfinished"
MERGED = "merged.snapshot"


def merge(folder: Path, pause_s: float = 0.0) -> None:
    with (
        SnapshotFile(folder / "base.snapshot") as base,
        SnapshotFile(folder / "changes.delta") as delta,
        (folder / UNFINISHED).open("w+b") as file,
    ):
        running = Merge(
            Snapshot.open(base.read_at, base.size, KEYS, 2),
            Snapshot.open(delta.read_at, delta.size, KEYS, 2),
            (folder / "whole.head").read_bytes(),
            KEYS,
            2,
            file,
        )
        sys.stdout.write("merging\n")
        sys.stdout.flush()
        while not running.step():
            time.sleep(pause_s)
        file.flush()
        os.fsync(file.fileno())
    (folder / UNFINISHED).rename(folder / MERGED)


if __name__ == "__main__":
    merge(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
