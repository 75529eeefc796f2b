"""`bench sync`: a long backlog brought to the ledger, and what each part of that costs.

The journal of a real gateway is filled with genuine payments (`lab.backlog`). Then, one after the other:

1. End to end: the gateway's and the ledger's own programs, each a process of its own, TLS in between; the
   clock runs until the ledger has acknowledged everything. The books are checked after it.
2. What verifying a record costs, part by part, on one core.
3. Posting alone, batch by batch in turn with a server-side INSERT … SELECT of the very same rows: the same
   tables, indexes, constraints and updates, the same durable commits, as many rows in each. Both books
   begin as the ledger's did before the backlog came. The ratio told is the median over the batches.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from pos_gateway.emv import cryptogram
from pos_gateway.emv.authentication import authenticate_card, authenticate_cryptogram
from pos_gateway.emv.transcript import Transcript
from pos_gateway.errors import PosGatewayError
from pos_gateway.gateway.config import Home
from pos_gateway.gateway.identity import load_enrolment, store_enrolment
from pos_gateway.gateway.journal import JournalReader
from pos_gateway.gateway.local_client import ask
from pos_gateway.lab.backlog import POLICY, fill_journal, issue_cards
from pos_gateway.lab.faults.servers import start_gateway
from pos_gateway.lab.postgresql import own_postgresql, run_alone
from pos_gateway.lab.shop import Shop
from pos_gateway.ledger import store
from pos_gateway.ledger.api import collect_seldom
from pos_gateway.ledger.config import Identity, policy_in_force
from pos_gateway.ledger.database import database_url
from pos_gateway.ledger.evidence import card_key, examine
from pos_gateway.ledger.gateways import Gateway
from pos_gateway.ledger.ledger import Ledger
from pos_gateway.ledger.settlement import RECEIVABLE, Examined, settle
from pos_gateway.records import MAX_BATCH_RECORDS, Kind, Record, Verdict, open_proof, presentment_body

_TARGET_RATIO: Final = 0.7
_SAMPLE_RECORDS: Final = 5000
_OWN_LIMIT_MINOR: Final = 1_000_000_000
_POLL_S: Final = 0.1
_STUCK_S: Final = 120.0
_END_S: Final = 30.0
_ROWS: Final = (store.presentments, store.claims, store.transfers, store.entries)

_Progress = Callable[[str], None]


def bench_sync(
    backlog: int,
    cards: int,
    *,
    postgresql: bool = False,
    folder: Path | None = None,
    progress: _Progress = lambda text: None,
) -> dict[str, Any]:
    """Measure a backlog of so many payments by so many cards.

    `folder`: on which disk journal and books lie; the system's temporary folder if not said.

    Raises:
        Unavailable: no PostgreSQL to be had.
        PosGatewayError: something was not posted, or the books do not balance.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="pos-gateway-bench-") as scratch:
        place = Path(scratch)
        with _books(postgresql, place) as url:
            journal = prepare(place, url, backlog, cards, progress)
            _copy_books(place / "ledger", place / "spare", url)
            progress("synchronising")
            end_to_end = _synchronise(place, backlog)
            progress("verifying")
            verification = _verification(place, journal[:_SAMPLE_RECORDS])
            progress("posting, in turn with INSERT … SELECT")
            posting = _posting(place, url, journal)
    return {
        "backlog": backlog,
        "cards": cards,
        "ledger": "postgres" if postgresql else "sqlite",
        "end_to_end": end_to_end,
        "verification_us": verification,
        "posting": posting,
    }


@contextmanager
def _books(postgresql: bool, place: Path) -> Iterator[str | None]:
    if not postgresql:
        yield None
        return
    with own_postgresql(place) as server:
        run_alone(server, "CREATE DATABASE ledger")
        yield server.set(database="ledger").render_as_string(hide_password=False)


def prepare(place: Path, url: str | None, backlog: int, cards: int, progress: _Progress) -> list[Record]:
    """A ledger and a gateway whose journal holds the backlog; returns it."""
    progress(f"issuing {cards} cards")
    Ledger.create(place / "ledger", issuer="Harbour Credit", database=url).close()
    with Shop(place, policy=POLICY) as shop:
        # One card besides, for whoever pays meanwhile.
        (place / "card.json").write_text(shop.issue(limit_minor=_OWN_LIMIT_MINOR)[1].to_json())
        issued = issue_cards(shop, cards, backlog)
        progress(f"{backlog} payments")
        fill_journal(shop, issued, backlog)
        shop.home.overrides.write_text("[http]\nport = 0\n[synchroniser]\ninterval_s = 1\n")
    records = []
    with JournalReader.open(Home(place / "gateway").journal) as journal:
        after = 0
        while page := journal.records(after):
            after = page[-1].sequence
            records += [record for record in page if record.kind is Kind.AUTHORIZATION]
    return records


def _copy_books(home: Path, spare: Path, url: str | None) -> None:
    """The ledger as it is now, to be posted to once more."""
    shutil.copytree(home, spare)
    if url is None:
        return
    database = database_url(url, home)
    run_alone(database.set(database="postgres"), "CREATE DATABASE spare TEMPLATE ledger")
    other = database.set(database="spare").render_as_string(hide_password=False)
    identity = Identity.load(spare / "ledger.json").model_copy(update={"database": other})
    (spare / "ledger.json").write_text(identity.model_dump_json())


@contextmanager
def serving(home: Path, log: Path, *, port: int = 0, core: int | None = None) -> Iterator[str]:
    """The ledger's own program in a process of its own, on one core if that is said; gives its address.

    Raises:
        PosGatewayError: it does not start, or does not end in order.
    """
    program = "from pos_gateway.cli.main import main; main()"
    command = [sys.executable, "-c", program, "ledger", "serve", "--port", str(port), "--json"]
    pinned = (lambda: os.sched_setaffinity(0, {core})) if core is not None else None
    with log.open("wb") as errors:
        ledger = subprocess.Popen(
            [*command, "--home", str(home)],
            stdout=subprocess.PIPE,
            stderr=errors,
            preexec_fn=pinned,
        )
    try:
        line = ledger.stdout.readline() if ledger.stdout is not None else b""
        if not line:
            raise PosGatewayError(f"the ledger did not start; see {log}")
        yield str(json.loads(line)["address"])
        ledger.send_signal(signal.SIGINT)
        if ledger.wait(_END_S) not in (0, 130):
            raise PosGatewayError(f"the ledger ended with {ledger.returncode}; see {log}")
    finally:
        ledger.kill()
        ledger.wait()


def _synchronise(place: Path, backlog: int) -> dict[str, Any]:
    """Both programs, until nothing waits any more."""
    home = Home(place / "gateway")
    with serving(place / "ledger", place / "ledger.log") as address:
        reach_ledger_at(home, address)
        with start_gateway(home, place / "card.json", place / "card.state", place / "gateway.log") as gateway:
            begun = moved = time.perf_counter()
            left = backlog
            while waiting := int(ask(home, "GET", "/v1/status")["queue"]["count"]):
                if waiting < left:
                    left, moved = waiting, time.perf_counter()
                elif time.perf_counter() - moved > _STUCK_S:
                    raise PosGatewayError(f"{waiting} payments still wait; see {place / 'ledger.log'}")
                time.sleep(_POLL_S)
            elapsed_s = time.perf_counter() - begun
            gateway.stop()
    with Ledger.open(place / "ledger") as books:
        books.check_books()
        posted, alarms = books.verdicts().get(Verdict.POSTED, 0), len(books.alarms())
    if posted != backlog:
        raise PosGatewayError(f"{posted} of {backlog} payments were posted")
    return {
        "seconds": round(elapsed_s, 2),
        "presentments_per_s": round(backlog / elapsed_s),
        "us_per_record": round(1e6 * elapsed_s / backlog, 1),
        "posted": posted,
        "alarms": alarms,
    }


def reach_ledger_at(home: Home, address: str) -> None:
    """What the gateway takes for the ledger's address when it starts."""
    enrolled = load_enrolment(home.enrolment)
    home.enrolment.unlink()
    store_enrolment(home.enrolment, enrolled.model_copy(update={"ledger_url": address}))


def _verification(place: Path, records: Sequence[Record]) -> dict[str, float]:
    """Each part for itself, over the same records, in µs per record on one core."""
    with Ledger.open(place / "spare") as ledger:
        issuer, (gateway,) = ledger.issuer, ledger.gateways()
        wire = [record.to_wire() for record in records]
        opened: list[Transcript] = []

        def cost(work: Callable[[int], object]) -> float:
            begun = time.process_time()
            for number in range(len(records)):
                work(number)
            return round(1e6 * (time.process_time() - begun) / len(records), 1)

        def unseal(number: int) -> None:
            opened.append(Transcript.from_bytes(open_proof(records[number].proof, issuer.sealing)))

        costs = {
            "read": cost(lambda n: Record.from_wire(wire[n])),
            "signature_and_hash": cost(lambda n: records[n].verify(gateway.key)),
            "unseal": cost(unseal),
        }
        cards = [proof.card() for proof in opened]
        answers = [proof.cryptogram_answer() for proof in opened]
        days = [card.effective for card in cards]

        def cda(number: int) -> None:
            card = authenticate_card(
                cards[number], issuer.ca_keys, days[number], known_issuers=issuer.known_issuers
            )
            authenticate_cryptogram(card, answers[number])

        def ac(number: int) -> None:
            card, answer = cards[number], answers[number]
            key = card_key(issuer.master.ac, card.pan, card.psn)
            atc, iad = answer.elements[0x9F36], answer.elements[0x9F10]
            cryptogram.application_cryptogram(
                key, int.from_bytes(atc, "big"), answer.cdol1_values + card.aip + atc + iad
            )

        costs["cda"] = cost(cda)
        costs["application_cryptogram"] = cost(ac)
        whole = cost(lambda n: examine(records[n], gateway, issuer))
        parts = costs["unseal"] + costs["cda"] + costs["application_cryptogram"]
        costs["card_data_and_facts"] = round(whole - parts, 1)
        costs["all"] = round(whole + costs["read"] + costs["signature_and_hash"], 1)
        return costs


def _posting(place: Path, url: str | None, records: Sequence[Record]) -> dict[str, Any]:
    """Settling examined batches into the spare books, in turn with moving rows into the emptied ones."""
    with Ledger.open(place / "ledger") as bare:
        _set_aside(bare)
    _tidy(place / "ledger", url)
    with Ledger.open(place / "ledger") as bare, Ledger.open(place / "spare", verifiers=_cores()) as ours:
        (gateway,) = ours.gateways()
        batches = range(0, len(records), MAX_BATCH_RECORDS)
        wall_s: tuple[list[float], list[float]] = [], []
        cpu_s: tuple[list[float], list[float]] = [], []
        steps = _Steps()
        collect_seldom()
        for number, at in enumerate(batches):
            batch = records[at : at + MAX_BATCH_RECORDS]
            examined = _examined(ours, batch)
            for turn in (0, 1) if number % 2 else (1, 0):
                begun, cpu_begun = time.perf_counter(), time.process_time()
                if turn:
                    _settle(ours, gateway, examined, steps)
                else:
                    with bare.database.write() as connection:
                        _insert_select(connection, number)
                wall_s[turn].append(time.perf_counter() - begun)
                cpu_s[turn].append(time.process_time() - cpu_begun)
        for books in (ours, bare):
            books.check_books()
    bare_s, posting_s = wall_s
    return {
        "batches": len(batches),
        "records_per_transaction": MAX_BATCH_RECORDS,
        "us_per_record": round(1e6 * sum(posting_s) / len(records), 1),
        "per_s": round(len(records) / sum(posting_s)),
        "insert_select_us_per_record": round(1e6 * sum(bare_s) / len(records), 1),
        "insert_select_per_s": round(len(records) / sum(bare_s)),
        "steps_us_per_record": steps.per_record_us(len(records)),
        "ratio": _ratio(wall_s),
        # Of this process alone: SQLite does its work in it, PostgreSQL elsewhere.
        "cpu_us_per_record": round(1e6 * sum(cpu_s[1]) / len(records), 1),
        "ratio_of_cpu": _ratio(cpu_s) if url is None else None,
        "target_ratio": _TARGET_RATIO,
    }


def _ratio(taken_s: tuple[list[float], list[float]]) -> float:
    """Of one batch, and of all of them the one in the middle."""
    return round(statistics.median(bare / ours for bare, ours in zip(*taken_s, strict=True)), 2)


class _Steps:
    """Adds up how long each step of settling took."""

    def __init__(self) -> None:
        self._wall_s: dict[str, float] = {}
        self._cpu_s: dict[str, float] = {}
        self._last_s = self._last_cpu_s = 0.0

    def begin(self) -> None:
        self._last_s, self._last_cpu_s = time.perf_counter(), time.process_time()

    def done(self, step: str) -> None:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        self._wall_s[step] = self._wall_s.get(step, 0.0) + wall_s - self._last_s
        self._cpu_s[step] = self._cpu_s.get(step, 0.0) + cpu_s - self._last_cpu_s
        self._last_s, self._last_cpu_s = wall_s, cpu_s

    def per_record_us(self, records: int) -> dict[str, dict[str, float]]:
        return {
            step: {
                "wall": round(1e6 * self._wall_s[step] / records, 1),
                "cpu": round(1e6 * self._cpu_s[step] / records, 1),
            }
            for step in self._wall_s
        }


def _settle(ledger: Ledger, gateway: Gateway, examined: list[Examined], steps: _Steps) -> None:
    steps.begin()
    with ledger.database.write() as connection:
        steps.done("begin")
        now_unix_ms = ledger.now_unix_ms()
        guarantee = policy_in_force(connection).guarantee
        verdicts = settle(
            connection, gateway, ledger.currency, now_unix_ms, examined, guarantee, done=steps.done
        )
    steps.done("commit")
    if any(verdict.verdict is not Verdict.POSTED for verdict in verdicts):
        raise PosGatewayError("not everything was posted")


def _examined(ledger: Ledger, batch: Sequence[Record]) -> list[Examined]:
    (gateway,) = ledger.gateways()
    return ledger.examine(gateway, presentment_body(gateway.id, batch))


def _set_aside(ledger: Ledger) -> None:
    """Move what was posted into plain tables numbered by batch, and leave the books as they were before."""
    names = [table.name for table in _ROWS]
    postgresql = ledger.identity.database is not None
    with ledger.database.write() as connection:
        run = connection.exec_driver_sql
        run(
            "CREATE TABLE aside AS SELECT record_id, "
            f"(row_number() OVER (ORDER BY sequence) - 1) / {MAX_BATCH_RECORDS} AS batch FROM presentments"
        )
        run("CREATE UNIQUE INDEX aside_ids ON aside (record_id)")
        for name in names[:3]:
            run(
                f"CREATE TABLE aside_{name} AS SELECT aside.batch, {name}.* FROM {name} "
                f"JOIN aside ON aside.record_id = {name}.record_id ORDER BY aside.batch"
            )
        run("CREATE UNIQUE INDEX aside_transfer_ids ON aside_transfers (id)")
        run(
            "CREATE TABLE aside_entries AS SELECT t.batch, entries.* FROM entries "
            "JOIN aside_transfers t ON t.id = entries.transfer_id ORDER BY t.batch"
        )
        for name in names:
            run(f"CREATE INDEX aside_{name}_batch ON aside_{name} (batch)")
        if postgresql:
            for name in ("transfers", "entries"):
                run(f"ALTER TABLE {name} DISABLE TRIGGER {name}_immutable")
            run(f"TRUNCATE {', '.join(names)}")
            for name in ("transfers", "entries"):
                run(f"ALTER TABLE {name} ENABLE TRIGGER {name}_immutable")
        else:
            triggers = connection.execute(
                sa.text(
                    "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND name LIKE '%no_delete'"
                )
            ).all()
            for name, _ in triggers:
                run(f"DROP TRIGGER {name}")
            for name in reversed(names):
                run(f"DELETE FROM {name}")
            for _, sql in triggers:
                run(sql)
        run("UPDATE accounts SET outstanding_minor = 0")
        run(
            "UPDATE tokens SET run_start = 0, run_end = 0, highest_counter = (SELECT min(highest) "
            "FROM publications WHERE publications.token_id = tokens.id) WHERE run_end > 0"
        )


def _tidy(home: Path, url: str | None) -> None:
    """As if the tables had never been filled before."""
    if url is not None:
        run_alone(database_url(url, home), "VACUUM FULL", "ANALYZE")
        return
    with contextlib.closing(sqlite3.connect(home / "ledger.db")) as connection:
        connection.execute("VACUUM")


def _cores() -> int:
    cores = len(os.sched_getaffinity(0))
    return cores if cores > 1 else 0


def _insert_select(connection: sa.Connection, batch: int) -> None:
    run = connection.exec_driver_sql
    for table in _ROWS:
        columns = ", ".join(column.name for column in table.columns)
        run(
            f"INSERT INTO {table.name} ({columns}) "
            f"SELECT {columns} FROM aside_{table.name} WHERE batch = {batch}"
        )
    run(
        "UPDATE accounts SET outstanding_minor = outstanding_minor + moved.total FROM "
        "(SELECT account_id, sum(amount_minor) AS total FROM aside_entries "
        f"WHERE batch = {batch} AND book = '{RECEIVABLE}' GROUP BY account_id) AS moved "
        "WHERE id = moved.account_id"
    )
    run(
        "UPDATE tokens SET highest_counter = moved.last, run_end = moved.last, run_start = moved.first FROM "
        "(SELECT token_id, max(counter_after) AS last, min(counter_before) AS first FROM aside_claims "
        f"WHERE batch = {batch} GROUP BY token_id) AS moved WHERE id = moved.token_id"
    )
