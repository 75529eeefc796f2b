"""`disk-full`: the gateway's disk, a small tmpfs of its own, runs full, nearly and wholly, under load.

Runs in a mount namespace of its own, which takes the tmpfs with it however it ends. Where none may be made
the kernel is told instead to let none of the gateway's files grow (RLIMIT_FSIZE): every write beyond what
they are fails then (EFBIG) until the limit is lifted. What stops payments ahead of that, the free space
that the disk tells, cannot be tried so.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pos_gateway.errors import PosGatewayError
from pos_gateway.lab.faults.finding import Finding
from pos_gateway.lab.faults.site import Audit, Customer, Site, audit, copied

SHORT_FILLINGS: Final = 3
LONG_FILLINGS: Final = 40
_DISK_MIB: Final = 96
_HEADROOM_BYTES: Final = 6 * 1024 * 1024
_NEARLY_BYTES: Final = 2 * 1024 * 1024
_PIECE_BYTES: Final = 32 * 1024
_NEWS_TIMEOUT_S: Final = 30.0
_WHOLE_TIMEOUT_S: Final = 900


def disk_full(
    folder: Path, seed: int, *, fillings: int, ledger: Path | None = None, mount: bool | None = None
) -> Finding:
    """`mount`: on a tmpfs of its own or not; if not said, where that can be."""
    copied(ledger, folder)
    (folder / "gateway").mkdir()
    namespace = ["unshare", "--mount"] + ([] if os.geteuid() == 0 else ["--user", "--map-root-user"])
    if not (_can_mount(namespace, folder / "gateway") if mount is None else mount):
        return _finding(_run_limited(folder, seed, fillings))
    mounting = f'mount -t tmpfs -o size={_DISK_MIB}m tmpfs "$1" && shift && exec "$@"'
    inside = [sys.executable, "-m", __spec__.name, str(folder), str(seed), str(fillings)]
    done = subprocess.run(
        [*namespace, "sh", "-c", mounting, "sh", str(folder / "gateway"), *inside],
        capture_output=True,
        text=True,
        check=False,
        timeout=_WHOLE_TIMEOUT_S,
    )
    if done.returncode:
        raise PosGatewayError(f"the full disk's run failed: {done.stderr.strip()[-1000:]}")
    return _finding(json.loads(done.stdout))


def _can_mount(namespace: list[str], folder: Path) -> bool:
    command = [*namespace, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def _finding(told: Mapping[str, Any]) -> Finding:
    return Finding(**{**told, "wrong": tuple(told["wrong"])})


def _run_limited(folder: Path, seed: int, fillings: int) -> dict[str, object]:
    chance = random.Random(seed)
    with Site(folder) as site:
        site.reach_ledger_at(site.start_ledger())
        site.start_gateway()
        with Customer(site) as customer:
            for _ in range(fillings):
                customer.wait_for(3)
                pid = site.gateway.pid if site.gateway is not None else 0
                log = site.home.journal.with_name(site.home.journal.name + "-wal")
                soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (log.stat().st_size, hard))
                time.sleep(chance.uniform(0.1, 0.5))
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
            customer.wait_for(3)
            customer.stop()
        site.drain()
        site.stop()
        truth = audit(site.home, site.ledger_home, customer.approved)
    tried = "no file of the gateway may grow (RLIMIT_FSIZE: no tmpfs here), under load, and may again"
    return _told(seed, tried, fillings, customer, truth, [])


def _run(folder: Path, seed: int, fillings: int) -> dict[str, object]:
    chance = random.Random(seed)
    wrong: list[str] = []
    ballast = folder / "gateway" / "ballast"
    with Site(folder, settings=f"[journal]\nheadroom_bytes = {_HEADROOM_BYTES}\n") as site:
        site.reach_ledger_at(site.start_ledger())
        site.start_gateway()
        with Customer(site) as customer:
            for number in range(fillings):
                customer.wait_for(3)
                if number % 2 == 0:
                    _nearly(site, customer, ballast, wrong)
                else:
                    _fill(ballast, leave_bytes=0)
                    time.sleep(chance.uniform(0.1, 0.5))
                    ballast.unlink()
            customer.wait_for(3)
            customer.stop()
        site.drain()
        site.stop()
        truth = audit(site.home, site.ledger_home, customer.approved)
    tried = (
        f"a disk of {_DISK_MIB} MiB nearly full (payments stop, the queue is still presented) and "
        "wholly full, under load, and room again"
    )
    return _told(seed, tried, fillings, customer, truth, wrong)


def _told(
    seed: int, tried: str, fillings: int, customer: Customer, truth: Audit, wrong: list[str]
) -> dict[str, object]:
    return {
        "scenario": "disk-full",
        "seed": seed,
        "tried": tried,
        "times": fillings,
        "acknowledged": len(customer.approved),
        "lost": truth.lost,
        "posted_twice": truth.posted_twice,
        "out_of_balance_minor": truth.out_of_balance_minor,
        "wrong": [*wrong, *truth.wrong],
        "details": {"refused": customer.refusals.total(), "other_outcomes": dict(customer.other)},
    }


def _nearly(site: Site, customer: Customer, ballast: Path, wrong: list[str]) -> None:
    """Payments wait for the ledger, the disk gets short: none is begun, but those are still presented."""
    if site.ledger is not None:
        site.ledger.kill()
    customer.wait_for(3)
    _fill(ballast, leave_bytes=_NEARLY_BYTES)
    before = sum(times for reason, times in customer.refusals.items() if "nearly full" in reason)
    deadline = time.monotonic() + _NEWS_TIMEOUT_S
    while sum(t for reason, t in customer.refusals.items() if "nearly full" in reason) <= before:
        if time.monotonic() > deadline:
            wrong.append("a payment was begun on a disk that is nearly full")
            break
        time.sleep(0.01)
    if not site.ask("GET", "/v1/status")["disk"]["payments_stopped"]:
        wrong.append("the status does not say that payments have stopped")
    site.start_ledger()
    site.drain()
    ballast.unlink()


def _fill(ballast: Path, *, leave_bytes: int) -> None:
    """Fill the disk up to what is left; to the last block with 0."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while _free_bytes(ballast.parent) > leave_bytes:
                file.write(bytes(_PIECE_BYTES))
        except OSError:
            return


def _free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


if __name__ == "__main__":
    print(json.dumps(_run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
