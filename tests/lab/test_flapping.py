"""The till works the same with the line to the ledger up, down, or flapping every second."""

from __future__ import annotations

import random
import time
from pathlib import Path

from pos_gateway.lab.faults.proxy import Fault, Proxy
from pos_gateway.lab.faults.site import Customer, Site, audit, copied

APPROVALS = 8
FLAPS = 4


def test_up_down_and_flapping_every_second(tmp_path: Path, ledger_home: Path) -> None:
    with Site(copied(ledger_home, tmp_path / "site")) as site:
        url = site.start_ledger()
        with Proxy(int(url.rpartition(":")[2]), random.Random(1)) as proxy:
            site.reach_ledger_at(f"https://127.0.0.1:{proxy.port}")
            site.start_gateway()
            with Customer(site) as customer:
                customer.wait_for(APPROVALS)
                proxy.turn(Fault.CUT)
                customer.wait_for(APPROVALS)
                assert site.ask("GET", "/v1/status")["queue"]["count"] > 0
                for _ in range(FLAPS):
                    for fault in (Fault.NONE, Fault.CUT):
                        proxy.turn(fault)
                        time.sleep(1)
                        customer.wait_for(1)
                proxy.turn(Fault.NONE)
                customer.wait_for(APPROVALS)
                customer.stop()
            site.drain()
            status = site.ask("GET", "/v1/status")
            site.stop()
    # Nothing but approvals: no payment was declined, refused, or told to wait because of the line.
    assert dict(customer.other) == {}
    assert dict(customer.refusals) == {}
    assert status["refused"] == []
    truth = audit(site.home, site.ledger_home, customer.approved)
    assert (truth.lost, truth.posted_twice, truth.out_of_balance_minor, truth.alarms) == (0, 0, 0, 0)


def test_a_gateway_stops_when_asked_to_though_the_ledger_is_silent(tmp_path: Path, ledger_home: Path) -> None:
    """Connections are accepted and nothing is answered, wherever the synchroniser stands just then."""
    with Site(copied(ledger_home, tmp_path / "site")) as site:
        url = site.start_ledger()
        with Proxy(int(url.rpartition(":")[2]), random.Random(1)) as proxy:
            site.reach_ledger_at(f"https://127.0.0.1:{proxy.port}")
            for _ in range(2):
                site.start_gateway()
                with Customer(site) as customer:
                    customer.wait_for(2)
                    proxy.turn(Fault.HALF_OPEN)
                    site.synchronise()
                    customer.wait_for(2)
                    customer.stop()
                assert site.gateway is not None
                site.gateway.stop()  # raises if it had to be killed
                proxy.turn(Fault.NONE)
