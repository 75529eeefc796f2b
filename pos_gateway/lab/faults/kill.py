"""`kill`: SIGKILL of the gateway or the ledger at random moments while a customer pays without pause."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Final

from pos_gateway.lab.faults.finding import Finding
from pos_gateway.lab.faults.site import Customer, Site, audit, copied

SHORT_KILLS: Final = 6
LONG_KILLS: Final = 100
_LONGEST_LIFE_S: Final = 0.4
_LONGEST_DEATH_S: Final = 0.1


def kill(folder: Path, seed: int, *, kills: int, ledger: Path | None = None) -> Finding:
    """Every approval that was shown must be posted once. `ledger`: a ledger's home to copy."""
    chance = random.Random(seed)
    killed = {"gateway": 0, "ledger": 0}
    with Site(copied(ledger, folder)) as site:
        site.reach_ledger_at(site.start_ledger())
        site.start_gateway()
        with Customer(site) as customer:
            for number in range(kills):
                if number % 2 == 0:
                    customer.wait_for(1)
                time.sleep(chance.uniform(0, _LONGEST_LIFE_S))
                victim = chance.choice(("gateway", "ledger"))
                server = site.gateway if victim == "gateway" else site.ledger
                if server is not None:
                    server.kill()
                killed[victim] += 1
                if chance.random() < 0.3:
                    time.sleep(chance.uniform(0, _LONGEST_DEATH_S))
                if victim == "gateway":
                    site.start_gateway()
                else:
                    site.start_ledger()
            customer.stop()
        waiting = site.ask("GET", "/v1/status")["queue"]["count"]
        site.drain()
        site.stop()
    truth = audit(site.home, site.ledger_home, customer.approved)
    return Finding(
        scenario="kill",
        seed=seed,
        tried=f"SIGKILL under load: {killed['gateway']} × gateway, {killed['ledger']} × ledger",
        times=kills,
        acknowledged=len(customer.approved),
        lost=truth.lost,
        posted_twice=truth.posted_twice,
        out_of_balance_minor=truth.out_of_balance_minor,
        wrong=truth.wrong + ((f"{truth.alarms} alarms",) if truth.alarms else ()),
        details={
            "posted": truth.posted,
            "waiting_after_the_last_kill": waiting,
            "other_outcomes": dict(customer.other),
        },
    )
