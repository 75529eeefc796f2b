"""Killed at any moment, and a disk that is full: the gateway starts again with valid limits."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pos_gateway.errors import Unavailable
from pos_gateway.gateway.feed import SnapshotFeed
from pos_gateway.gateway.fetcher import FolderRepository
from pos_gateway.gateway.journal import Journal
from tests.gateway.issuer import Issuer
from tests.gateway.journalling import open_journal
from tests.gateway.snapshots import ceiling, names, new_feed, record, snapshot

KILLS = 12
TOKENS = 3000
LIMITS = [record(1, number.to_bytes(16, "big")) for number in range(TOKENS)]

# A gateway's feed as it runs: load, fetch (slowly, so that there is a middle), merge; again and again.
GATEWAY = """
import sys, time
from pathlib import Path
from pos_gateway.gateway.fetcher import FolderRepository
from tests.gateway.journalling import open_journal
from tests.gateway.snapshots import new_feed

class Slow(FolderRepository):
    def stream(self, path, offset):
        for piece in super().stream(path, offset):
            for at in range(0, len(piece), 2048):
                yield piece[at : at + 2048]
                time.sleep(0.001)

home, repository = Path(sys.argv[1]), Path(sys.argv[2])
with open_journal(home / "journal.sqlite3") as journal:
    feed = new_feed(home / "snapshots", journal)
    feed.load()
    print("loaded", flush=True)
    feed.refresh(Slow(repository))
    feed.merge()
    print("done", flush=True)
"""


def publish(issuer: Issuer, version: int) -> None:
    """One token changes with every version; a delta leads there from the one before."""
    changed = LIMITS[version]._replace(ceiling=version)
    LIMITS[version] = changed
    delta = {version - 1: snapshot(version, [changed], base_version=version - 1)} if version > 1 else {}
    issuer.publish(version, snapshot(version, LIMITS), delta)


def test_killed_at_any_moment_it_starts_again_with_valid_limits(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    issuer = Issuer(tmp_path / "repository")
    (tmp_path / "snapshots").mkdir()
    version, in_use, killed_at_work = 1, 0, 0
    publish(issuer, version)
    for _ in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", GATEWAY, str(tmp_path), str(issuer.folder)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "loaded\n"
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        killed_at_work += process.communicate()[0] == ""
        with open_journal(tmp_path / "journal.sqlite3") as journal:
            feed = new_feed(tmp_path / "snapshots", journal)
            feed.load()
            current = feed.current()
            if in_use:
                assert current is not None
            if current is not None:
                assert in_use <= current.version <= version
                assert current.version >= journal.view.snapshot_version
                for changed in range(1, current.version + 1):
                    assert ceiling(current, LIMITS[changed].token_key) == changed
                in_use = current.version
            feed.close()
        if in_use == version:
            version += 1
            publish(issuer, version)
    assert killed_at_work, "else nothing was shown"
    with open_journal(tmp_path / "journal.sqlite3") as journal:
        feed = new_feed(tmp_path / "snapshots", journal)
        feed.load()
        feed.refresh(FolderRepository(issuer.folder))
        feed.merge()
        feed.close()
        assert names(tmp_path / "snapshots") == {f"limits-{version}.snapshot"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_keeps_the_old_limits_and_gives_its_room_back(
    tmp_path: Path, journal: Journal, issuer: Issuer, repository: FolderRepository
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "none", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        issuer.publish(3, snapshot(3))
        feed = new_feed(disk, journal)
        assert feed.refresh(repository)
        issuer.publish(4, snapshot(4, LIMITS))
        with pytest.raises(Unavailable, match=r"the disk has \d+ KiB left, new limits need \d+ KiB"):
            feed.refresh(repository)
        # It was free when the download began, and is not any more.
        feed._check_space = lambda wanted_bytes: None  # type: ignore[method-assign]
        with pytest.raises(Unavailable, match="No space left on device"):
            feed.refresh(repository)
        assert "No space left" in str(feed.last_error)
        assert names(disk) == {"limits-3.snapshot"}
        assert ceiling(feed.current()) == 3000
        assert shutil.disk_usage(disk).free > 60 * 1024, "the journal has its room"
        issuer.publish(5, snapshot(5))
        assert feed.refresh(repository)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fails_while_merging_leaves_base_and_delta_in_use(
    feed: SnapshotFeed,
    folder: Path,
    issuer: Issuer,
    repository: FolderRepository,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    feed.start_merging = lambda: None  # type: ignore[method-assign]
    limits = [record(1, number.to_bytes(16, "big")) for number in range(TOKENS)]
    issuer.publish(1, snapshot(1, limits))
    feed.refresh(repository)
    limits[7] = limits[7]._replace(ceiling=7)
    issuer.publish(2, snapshot(2, limits), {1: snapshot(2, [limits[7]], base_version=1)})
    feed.refresh(repository)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(Unavailable, match="No space left"):
            feed.merge()
    assert names(folder) == {"limits-1.snapshot", "limits-1-2.delta", "limits-2.head"}
    assert ceiling(feed.current(), limits[7].token_key) == 7
    assert feed.merge()
    assert names(folder) == {"limits-2.snapshot"}
