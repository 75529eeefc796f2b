"""`upgrade`: tomorrow's program takes a till over and today's comes back, again and again; each may be killed
at any moment of it, and payments are taken in between."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Final
from uuid import UUID

from pos_gateway.errors import Conflict, PosGatewayError
from pos_gateway.gateway.config import Home
from pos_gateway.lab.faults.finding import Finding
from pos_gateway.lab.faults.site import audit, copied
from pos_gateway.lab.faults.tomorrow import pay
from pos_gateway.lab.shop import Shop
from pos_gateway.ledger.config import Policy

SHORT_UPGRADES: Final = 4
LONG_UPGRADES: Final = 60
_TODAY: Final = "pos_gateway.cli"
_TOMORROW: Final = "pos_gateway.lab.faults.tomorrow"
_TIMEOUT_S: Final = 120.0
_POLICY: Final = Policy(card_tc_rate_limit=1_000_000)


def upgrade(folder: Path, seed: int, *, upgrades: int, ledger: Path | None = None) -> Finding:
    """So many upgrades, each reverted in the end."""
    chance = random.Random(seed)
    copied(ledger, folder)
    home = Home(folder / "gateway")
    wrong: list[str] = []
    approved: list[UUID] = []
    happened: Counter[str] = Counter()
    with Shop(folder, policy=_POLICY) as shop:
        approved += map(UUID, pay(shop, 2))
    took_s = 0.5
    for _ in range(upgrades):
        # The new program begins, and is killed somewhere in it, or twice.
        for _ in range(chance.randint(0, 2)):
            happened["upgrades killed"] += _killed(
                _TOMORROW, "upgrade", home, chance.uniform(0, 1.2 * took_s)
            )
        if chance.random() < 0.7:
            began_s = time.monotonic()
            _run(_TOMORROW, "upgrade", home)
            took_s = time.monotonic() - began_s
            happened["upgrades"] += 1
            wrong += _today_keeps_away(folder)
            if chance.random() < 0.8:
                approved += _pay_tomorrow(folder, chance.randint(1, 4))
                happened["payments taken by tomorrow's program"] += 1
        # Today's comes back: rolled back by hand, or by itself after a power cut.
        for _ in range(chance.randint(0, 2)):
            happened["reverts killed"] += _killed(
                _TODAY, "revert", home, chance.uniform(0, 1.2 * took_s), "--if-newer"
            )
        told = _run(_TODAY, "revert", home, "--if-newer")
        happened["reverts"] += told["backup"] is not None
        with Shop(folder, policy=_POLICY) as shop:
            approved += map(UUID, pay(shop, chance.randint(1, 3)))
            if chance.random() < 0.5:
                shop.present(shop.journal.queue())
    with Shop(folder, policy=_POLICY) as shop:
        shop.present(shop.journal.queue())
    truth = audit(home, folder / "ledger", approved)
    if truth.alarms:
        wrong.append(f"{truth.alarms} alarms")
    return Finding(
        scenario="upgrade",
        seed=seed,
        tried=f"a program with another form of the journal took over {upgrades} times and was reverted, both "
        "killed at random moments, payments taken in between",
        times=upgrades,
        acknowledged=len(approved),
        lost=truth.lost,
        posted_twice=truth.posted_twice,
        out_of_balance_minor=truth.out_of_balance_minor,
        wrong=tuple(wrong[:20]) + truth.wrong,
        details={"happened": dict(sorted(happened.items()))},
    )


def _command(module: str, verb: str, home: Home, *options: str) -> list[str]:
    return [sys.executable, "-m", module, "gateway", verb, "--home", str(home.path), "--json", *options]


def _run(module: str, verb: str, home: Home, *options: str) -> dict[str, object]:
    done = subprocess.run(
        _command(module, verb, home, *options),
        capture_output=True,
        text=True,
        check=False,
        timeout=_TIMEOUT_S,
    )
    if done.returncode:
        raise PosGatewayError(f"{verb} failed: {done.stdout.strip()[-300:]} {done.stderr.strip()[-300:]}")
    told: dict[str, object] = json.loads(done.stdout)
    return told


def _killed(module: str, verb: str, home: Home, after_s: float, *options: str) -> bool:
    """Was it still under way?"""
    with subprocess.Popen(
        _command(module, verb, home, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            process.wait(after_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return True
        return False


def _pay_tomorrow(folder: Path, count: int) -> list[UUID]:
    done = subprocess.run(
        [sys.executable, "-m", _TOMORROW, "--pay", str(folder), str(count)],
        capture_output=True,
        text=True,
        check=False,
        timeout=_TIMEOUT_S,
    )
    paid = [UUID(line) for line in done.stdout.split()]
    if done.returncode or len(paid) != count:
        raise PosGatewayError(f"tomorrow's till failed: {done.stderr.strip()[-300:]}")
    return paid


def _today_keeps_away(folder: Path) -> list[str]:
    """Today's program must not write into a journal whose form it does not know."""
    try:
        Shop(folder).close()
    except Conflict:
        return []
    return ["today's program opened tomorrow's journal"]
