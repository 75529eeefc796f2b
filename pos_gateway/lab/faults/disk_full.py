"""`disk-full`: the gateway's disk, a small tmpfs of its own, runs full, nearly and wholly, under load.

Runs in a mount namespace of its own, which takes the tmpfs with it however it ends.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from pos_gateway.errors import PosGatewayError, Unavailable
from pos_gateway.lab.faults.finding import Finding
from pos_gateway.lab.faults.site import Customer, Site, audit, copied

SHORT_FILLINGS: Final = 3
LONG_FILLINGS: Final = 40
_DISK_MIB: Final = 96
_HEADROOM_BYTES: Final = 6 * 1024 * 1024
_NEARLY_BYTES: Final = 2 * 1024 * 1024
_PIECE_BYTES: Final = 32 * 1024
_NEWS_TIMEOUT_S: Final = 30.0
_WHOLE_TIMEOUT_S: Final = 900


def disk_full(folder: Path, seed: int, *, fillings: int, ledger: Path | None = None) -> Finding:
    """
    Raises:
        Unavailable: this system allows no mount namespace.
    """
    copied(ledger, folder)
    (folder / "gateway").mkdir()
    namespace = ["unshare", "--mount"] + ([] if os.geteuid() == 0 else ["--user", "--map-root-user"])
    try:
        if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
            raise Unavailable("no mount namespaces here", advice="run it as root")
    except FileNotFoundError:
        raise Unavailable("unshare is missing", advice="install util-linux") from None
    mount = f'mount -t tmpfs -o size={_DISK_MIB}m tmpfs "$1" && shift && exec "$@"'
    inside = [sys.executable, "-m", __spec__.name, str(folder), str(seed), str(fillings)]
    done = subprocess.run(
        [*namespace, "sh", "-c", mount, "sh", str(folder / "gateway"), *inside],
        capture_output=True,
        text=True,
        check=False,
        timeout=_WHOLE_TIMEOUT_S,
    )
    if done.returncode:
        raise PosGatewayError(f"the full disk's run failed: {done.stderr.strip()[-1000:]}")
    told = json.loads(done.stdout)
    return Finding(**{**told, "wrong": tuple(told["wrong"])})


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
    return {
        "scenario": "disk-full",
        "seed": seed,
        "tried": f"a disk of {_DISK_MIB} MiB nearly full (payments stop, the queue is still presented) and "
        "wholly full, under load, and room again",
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
