"""`restore`: the ledger comes back from an older backup and the signer's log, the gateway from its backup
disk on another machine, while a customer pays; again and again."""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Final

from pos_gateway.errors import PosGatewayError
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.identity import load_identity
from pos_gateway.gateway.journal import JournalReader
from pos_gateway.lab.faults.finding import Finding
from pos_gateway.lab.faults.site import Customer, Site, audit, copied
from pos_gateway.ledger.ledger import Ledger

SHORT_RESTORES: Final = 3
LONG_RESTORES: Final = 40
_NEWS_TIMEOUT_S: Final = 60.0
_NEEDED_ELSEWHERE: Final = ("identity.key", "enrolment.json", "gateway.toml")
"""What a gateway's backup holds beside its journal; limits are fetched anew."""


def restore(folder: Path, seed: int, *, restores: int, ledger: Path | None = None) -> Finding:
    """So many times the ledger forgets all since a backup: payments, and limits that were published."""
    chance = random.Random(seed)
    wrong: list[str] = []
    moved = forgotten = 0
    with Site(copied(ledger, folder)) as site:
        site.reach_ledger_at(site.start_ledger())
        site.start_gateway()
        backup = folder / "backup.db"
        with contextlib.ExitStack() as stack:
            customers = [stack.enter_context(Customer(site))]
            for number in range(restores):
                customer = customers[-1]
                customer.wait_for(chance.randint(1, 10))
                _back_up(site, backup)
                known = _posted(site)
                # What the backup knows nothing of: limits, and payments made under them and acknowledged.
                with Ledger.open(site.ledger_home) as books:
                    books.publish()
                site.synchronise()
                customer.wait_for(chance.randint(2, 10))
                site.drain(to=chance.choice((0, 3)), under_load=True)
                another_machine = number % 2 == 1
                if another_machine:
                    customer.stop()
                    _move_to_another_machine(site, folder / f"machine-{number}")
                    moved += 1
                forgotten += _posted(site) - known
                epoch = _lose_and_restore(site, backup, chance)
                if another_machine:
                    site.start_gateway()
                    customers.append(stack.enter_context(Customer(site)))
                _wait_for_epoch(site, epoch)
            customers[-1].wait_for(3)
            customers[-1].stop()
        site.drain()
        site.stop()
    shown = [payment_id for customer in customers for payment_id in customer.approved]
    truth = audit(site.home, site.ledger_home, shown)
    if truth.alarms:
        wrong.append(f"{truth.alarms} alarms")
    if not forgotten:
        wrong.append("no backup was older than what it replaced")
    return Finding(
        scenario="restore",
        seed=seed,
        tried=f"the ledger from an older backup and the signer's log {restores} ×, the gateway from its "
        f"backup on another machine {moved} ×, under load",
        times=restores,
        acknowledged=len(shown),
        lost=truth.lost,
        posted_twice=truth.posted_twice,
        out_of_balance_minor=truth.out_of_balance_minor,
        wrong=tuple(wrong) + truth.wrong,
        details={"posted": truth.posted, "forgotten_by_backups": forgotten},
    )


def _back_up(site: Site, to: Path) -> None:
    to.unlink(missing_ok=True)
    with (
        contextlib.closing(sqlite3.connect(site.ledger_home / "ledger.db")) as books,
        contextlib.closing(sqlite3.connect(to)) as copy,
    ):
        books.backup(copy)


def _posted(site: Site) -> int:
    with contextlib.closing(sqlite3.connect(site.ledger_home / "ledger.db")) as books:
        (count,) = books.execute("SELECT count(*) FROM transfers").fetchone()
        return int(count)


def _move_to_another_machine(site: Site, machine: Path) -> None:
    """The backup disk has all up to this moment, when the machine burns."""
    machine.mkdir()
    with JournalReader.open(site.home.journal) as journal:
        key = load_identity(site.home.identity_key).public_key()
        journal.backup(machine / site.home.journal.name, key)
    for name in _NEEDED_ELSEWHERE:
        shutil.copy2(site.home.path / name, machine / name)
    if site.gateway is not None:
        site.gateway.kill()
    shutil.rmtree(site.home.path)
    site.home = Home(machine)
    site.home.create()


def _lose_and_restore(site: Site, backup: Path, chance: random.Random) -> str:
    """The ledger's machine dies too; its database is the backup's from then on."""
    if site.ledger is not None:
        site.ledger.kill()
    time.sleep(chance.uniform(0, 0.2))
    for path in site.ledger_home.glob("ledger.db*"):
        path.unlink()
    shutil.copy(backup, site.ledger_home / "ledger.db")
    Ledger.restored(site.ledger_home)
    with Ledger.open(site.ledger_home) as books:
        epoch = str(books.epoch)
    site.start_ledger()
    return epoch


def _wait_for_epoch(site: Site, epoch: str) -> None:
    deadline = time.monotonic() + _NEWS_TIMEOUT_S
    while site.ask("GET", "/v1/status")["synchronisation"]["epoch"] != epoch:
        if time.monotonic() > deadline:
            raise PosGatewayError("the gateway does not notice that the ledger was restored")
        site.synchronise()
        time.sleep(0.05)
