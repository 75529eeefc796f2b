"""`partition`: the line between gateway and ledger breaks in every way while a customer pays; meanwhile
somebody presents parts of the journal again, out of order and beside the gateway."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from pathlib import Path
from typing import Final

from pos_gateway.errors import CertificateLapsed, LedgerUnreachable
from pos_gateway.gateway.certificate import connect
from pos_gateway.gateway.identity import load_enrolment, load_identity
from pos_gateway.gateway.journal import JournalReader
from pos_gateway.gateway.ledger_client import LedgerClient
from pos_gateway.lab.faults.finding import Finding
from pos_gateway.lab.faults.proxy import Fault, Proxy
from pos_gateway.lab.faults.site import Customer, Site, audit, copied
from pos_gateway.records import Kind, Record, Verdict

SHORT_ROUNDS: Final = 12
LONG_ROUNDS: Final = 300
_SPELL_S: Final = 0.6
_REPEATED: Final = 30
_FLAPS: Final = 6


def partition(folder: Path, seed: int, *, rounds: int, ledger: Path | None = None) -> Finding:
    """So many spells of bad line, one kind after the other in random order."""
    chance = random.Random(seed)
    repeated: Counter[Verdict] = Counter()
    faults: list[Fault] = []
    with Site(copied(ledger, folder)) as site:
        url = site.start_ledger()
        with Proxy(int(url.rpartition(":")[2]), chance) as proxy:
            site.reach_ledger_at(f"https://127.0.0.1:{proxy.port}")
            site.start_gateway()
            with Customer(site) as customer:
                for _ in range(rounds):
                    if not faults:
                        faults = list(Fault)
                        chance.shuffle(faults)
                    fault = faults.pop()
                    customer.wait_for(2)
                    _spell(site, proxy, fault, chance)
                    # The till works the same whatever the line does.
                    customer.wait_for(1)
                    if fault in (Fault.NONE, Fault.LOSE_ANSWER):
                        repeated += asyncio.run(_present_again(site, url, chance))
                proxy.turn(Fault.NONE)
                customer.stop()
            site.drain()
            site.stop()
    truth = audit(site.home, site.ledger_home, customer.approved)
    verdicts = _verdicts(site)
    wrong = list(truth.wrong)
    if truth.alarms:
        wrong.append(f"{truth.alarms} alarms")
    if not {*repeated, *verdicts} <= {Verdict.POSTED, Verdict.DUPLICATE}:
        wrong.append(f"verdicts {verdicts}, of what was repeated {repeated}")
    return Finding(
        scenario="partition",
        seed=seed,
        tried="line cut, delayed, truncated, half open, answers lost after the commit, flapping; batches "
        "presented twice, in any order",
        times=rounds,
        acknowledged=len(customer.approved),
        lost=truth.lost,
        posted_twice=truth.posted_twice,
        out_of_balance_minor=truth.out_of_balance_minor,
        wrong=tuple(wrong),
        details={
            "connections_broken": proxy.broken,
            "verdicts": {verdict.value: times for verdict, times in verdicts.items()},
            "presented_again": {verdict.value: times for verdict, times in repeated.items()},
            "other_outcomes": dict(customer.other),
        },
    )


def _spell(site: Site, proxy: Proxy, fault: Fault, chance: random.Random) -> None:
    if fault is Fault.CUT:
        for _ in range(_FLAPS):
            proxy.turn(chance.choice((Fault.CUT, Fault.NONE)))
            site.synchronise()
            time.sleep(_SPELL_S / _FLAPS)
        return
    proxy.turn(fault)
    until = time.monotonic() + _SPELL_S
    while time.monotonic() < until:
        site.synchronise()
        time.sleep(0.05)
    proxy.turn(Fault.NONE)
    site.synchronise()


async def _present_again(site: Site, url: str, chance: random.Random) -> Counter[Verdict]:
    """Present records of the journal, those that wait among them, again: shuffled and at the same time."""
    key = load_identity(site.home.identity_key)
    enrolled = load_enrolment(site.home.enrolment)
    with JournalReader.open(site.home.journal) as journal:
        after = max(0, journal.last_sequence - 4 * _REPEATED)
        records = [r for r in journal.records(after) if r.kind is Kind.AUTHORIZATION]
    batches = [chance.sample(records, min(len(records), chance.randint(1, _REPEATED))) for _ in range(3)]

    async def present(client: LedgerClient, batch: list[Record]) -> list[Verdict]:
        try:
            answers = await client.present(enrolled.enrolment.gateway_id, batch, key)
        except (LedgerUnreachable, CertificateLapsed):
            return []  # busy, or the gateway has a newer certificate: it is told so, and nothing is lost
        return [answer.verdict for answer in answers]

    async with connect(site.home, url) as client:
        verdicts = await asyncio.gather(*(present(client, batch) for batch in batches if batch))
    return Counter(verdict for batch in verdicts for verdict in batch)


def _verdicts(site: Site) -> Counter[Verdict]:
    """What the gateway was told, by its own journal."""
    found: Counter[Verdict] = Counter()
    with JournalReader.open(site.home.journal) as journal:
        after = 0
        while page := journal.records(after):
            after = page[-1].sequence
            found += Counter(
                Verdict(record.facts()["verdict"]) for record in page if record.kind is Kind.ACKNOWLEDGEMENT
            )
    return found
