"""`bench journal`: durable commits per second, beside what the bare disk does, taken in turn in one run.

Every round does, one after the other: raw appends with `fdatasync` of as many bytes as a record has; the
same over a file that was written before; commits of one and of 64 ready-made rows to a journal file of
their own, which is SQLite's part alone; then journal appends with 1, 8 and 64 payments waiting at once,
each in a thread of its own as lanes have. Ratios are those of one round, and their median is told. On a
machine that others use too, means are full of waiting for the processor, which hits whoever needs more of
it: the medians of single calls (`p50_us`) are told beside them.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.gateway.journal import Draft, Journal
from pos_gateway.gateway.journal_file import JournalFile
from pos_gateway.records import GENESIS_HASH, Kind, Record, record_hash, sign_commit, uuid7

WAITING: Final = (1, 8, 64)
_TARGETS: Final = {1: 0.7, 64: 9.0}
_SQLITE_TOGETHER: Final = (1, 64)
_ROUNDS: Final = 7
_ROUND_S: Final = 0.5
_FILL_TOGETHER: Final = 1000
_TOKENS: Final = 20_000
_PROOF_BYTES: Final = 1400
_ROW_BYTES: Final = 200
"""What a record has beside body and proof: id, hashes, signature."""
_PREALLOCATED_BYTES: Final = 32 * 1024 * 1024
_BLOCK_BYTES: Final = 4096
_COST_TIMES: Final = 2000


@dataclass(slots=True)
class _Sales:
    """Makes one sale after the other, as tills do."""

    _numbers: count[int] = field(default_factory=count)

    def next(self) -> tuple[Kind, UUID, dict[str, Any], bytes]:
        number = next(self._numbers)
        at_unix_ms = time.time_ns() // 1_000_000
        record_id = uuid7(at_unix_ms, os.urandom(10))
        before = number // _TOKENS * 100
        facts = {
            "sale_id": str(record_id),
            "amount_minor": 100,
            "currency": "CNY",
            "at_unix_ms": at_unix_ms,
            "gateway_id": "gateway-of-the-bench",
            "terminal_id": "TILL0001",
            "merchant_id": "FERRY-PIER-9",
            "merchant_category": "4111",
            "token_key": f"{number % _TOKENS:032x}",
            "token_last4": "0000",
            "atc": 1 + number // _TOKENS,
            "ac": "00" * 8,
            "counter_before": before,
            "counter_after": before + 100,
            "ceiling": 1_000_000,
            "limit_digest": "00" * 16,
            "snapshot_version": 1,
            "plan_digest": "00" * 16,
            "sequence_counter": number,
            "unpredictable_number": "00" * 4,
        }
        return Kind.AUTHORIZATION, record_id, facts, bytes(_PROOF_BYTES)


@dataclass(frozen=True, slots=True)
class _Slice:
    """What was done in one slice of a round."""

    per_s: float
    cpu_us: float


def bench_journal(
    records: int, folder: Path | None = None, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure on a journal that holds so many records already.

    `folder`: on which disk; the system's temporary folder if not said.
    """
    key = Ed25519PrivateKey.generate()
    sales = _Sales()
    with tempfile.TemporaryDirectory(dir=folder, prefix="pos-gateway-bench-") as scratch:
        path = Path(scratch) / "journal.sqlite3"

        def opened() -> Journal:
            return Journal.open(path, gateway_key=key, gateway_id="gateway-of-the-bench")

        with opened() as journal:
            progress(f"filling the journal with {records} records")
            for at in range(0, records, _FILL_TOGETHER):
                together = min(_FILL_TOGETHER, records - at)
                journal.append_all([Draft(*sales.next()) for _ in range(together)])
        begun = time.perf_counter()
        with opened() as journal:
            open_s = time.perf_counter() - begun
            return {
                "records": records,
                "open_s": round(open_s, 2),
                "open_us_per_record": round(1e6 * open_s / records, 1) if records else None,
                **_rounds(journal, sales, Path(scratch), progress),
                "costs_us": _costs(key, sales),
            }


def _rounds(journal: Journal, sales: _Sales, folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    _, _, facts, proof = sales.next()
    body = Draft(Kind.AUTHORIZATION, UUID(facts["sale_id"]), facts, proof).body
    size = len(body) + len(proof) + _ROW_BYTES
    append = os.open(folder / "append", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    overwrite = os.open(folder / "overwrite", os.O_RDWR | os.O_CREAT, 0o600)
    taken: dict[str, list[_Slice]] = {}
    latencies_us: dict[str, list[float]] = {}
    places = count()

    def raw_append() -> None:
        os.write(append, bytes(size))
        os.fdatasync(append)

    bare = JournalFile.open_for_writing(folder / "bare.sqlite3", gateway_id="bench", public_key=bytes(32))
    rows = _rows(body, proof)

    def sqlite_alone(together: int) -> None:
        bare.write([next(rows) for _ in range(together)], [None] * together)

    def raw_overwrite() -> None:
        os.pwrite(overwrite, bytes(size), next(places) * _BLOCK_BYTES % _PREALLOCATED_BYTES)
        os.fdatasync(overwrite)

    try:
        os.pwrite(overwrite, bytes(_PREALLOCATED_BYTES + size), 0)
        os.fsync(overwrite)
        for number in range(_ROUNDS):
            progress(f"round {number + 1} of {_ROUNDS}")
            for name, work in (("append", raw_append), ("overwrite", raw_overwrite)):
                taken.setdefault(name, []).append(_repeat([work], latencies_us.setdefault(name, [])))
            for together in _SQLITE_TOGETHER:
                name = f"sqlite_{together}"
                commits = _repeat(
                    [lambda together=together: sqlite_alone(together)],  # type: ignore[misc]
                    latencies_us.setdefault(name, []),
                )
                each = _Slice(commits.per_s * together, commits.cpu_us / together)
                taken.setdefault(name, []).append(each)
            for waiting in WAITING:
                name = f"journal_{waiting}"
                lanes = [lambda: journal.append(*sales.next())] * waiting
                taken.setdefault(name, []).append(_repeat(lanes, latencies_us.setdefault(name, [])))
    finally:
        os.close(append)
        os.close(overwrite)
        bare.close()

    def ratio(ours: str, to: str) -> float:
        pairs = zip(taken[ours], taken[to], strict=True)
        return round(statistics.median(one.per_s / other.per_s for one, other in pairs), 2)

    return {
        "record_bytes": size,
        "raw_append_per_s": _median(taken["append"]),
        "raw_overwrite_per_s": _median(taken["overwrite"]),
        "raw_append_p50_us": _percentile(latencies_us["append"], 0.5),
        "raw_overwrite_p50_us": _percentile(latencies_us["overwrite"], 0.5),
        "sqlite_alone": {
            str(together): {
                "records_per_s": _median(taken[f"sqlite_{together}"]),
                "ratio_to_append": ratio(f"sqlite_{together}", "append"),
                "cpu_us_each": round(statistics.median(s.cpu_us for s in taken[f"sqlite_{together}"]), 1),
            }
            for together in _SQLITE_TOGETHER
        },
        "waiting": {
            str(waiting): {
                "commits_per_s": _median(taken[f"journal_{waiting}"]),
                "ratio_to_append": ratio(f"journal_{waiting}", "append"),
                "ratio_to_overwrite": ratio(f"journal_{waiting}", "overwrite"),
                "ratio_of_p50": _ratio_of_p50(waiting, latencies_us),
                "target_ratio": _TARGETS.get(waiting),
                "cpu_us_each": round(statistics.median(s.cpu_us for s in taken[f"journal_{waiting}"]), 1),
                "p50_us": _percentile(latencies_us[f"journal_{waiting}"], 0.5),
                "p99_us": _percentile(latencies_us[f"journal_{waiting}"], 0.99),
            }
            for waiting in WAITING
        },
    }


def _rows(body: str, proof: bytes) -> Iterator[Record]:
    """Rows like a journal's own, at next to no cost."""
    for sequence in count(1):
        record_id = uuid7(time.time_ns() // 1_000_000, os.urandom(10))
        yield Record(
            sequence, record_id, Kind.AUTHORIZATION, body, proof, GENESIS_HASH, GENESIS_HASH, bytes(64)
        )


def _ratio_of_p50(waiting: int, latencies_us: dict[str, list[float]]) -> float:
    """Commits while one median append is waited for, against one raw append."""
    bare, ours = (_percentile(latencies_us[name], 0.5) for name in ("append", f"journal_{waiting}"))
    return round(waiting * bare / ours, 2)


def _repeat(lanes: Sequence[Callable[[], object]], latencies_us: list[float]) -> _Slice:
    """Every lane works without pause until the slice is over."""
    ready = threading.Barrier(len(lanes) + 1)
    over = threading.Event()
    done = [0] * len(lanes)

    def run(place: int, work: Callable[[], object]) -> None:
        own: list[float] = []
        ready.wait()
        while not over.is_set():
            begun = time.perf_counter()
            work()
            own.append(1e6 * (time.perf_counter() - begun))
        done[place] = len(own)
        latencies_us.extend(own)

    threads = [threading.Thread(target=run, args=(place, work)) for place, work in enumerate(lanes)]
    for thread in threads:
        thread.start()
    ready.wait()
    begun, cpu_begun = time.perf_counter(), time.process_time()
    over.wait(_ROUND_S)
    over.set()
    for thread in threads:
        thread.join()
    elapsed_s, cpu_s = time.perf_counter() - begun, time.process_time() - cpu_begun
    return _Slice(sum(done) / elapsed_s, 1e6 * cpu_s / max(1, sum(done)))


def _costs(key: Ed25519PrivateKey, sales: _Sales) -> dict[str, float]:
    """What the parts of a record cost alone, without the disk."""
    facts = [sales.next() for _ in range(_COST_TIMES)]
    draft = Draft(*facts[0])
    body, digest = draft.body.encode(), bytes(32)

    def cost(work: Callable[[int], object]) -> float:
        begun = time.perf_counter()
        for number in range(_COST_TIMES):
            work(number)
        return round(1e6 * (time.perf_counter() - begun) / _COST_TIMES, 1)

    return {
        "facts_checked_and_spelled": cost(lambda n: Draft(*facts[n])),
        "hash": cost(lambda n: record_hash(1, GENESIS_HASH, draft.id, draft.kind, body, draft.proof)),
        "signature_alone": cost(lambda n: sign_commit([digest], key)),
        "signature_among_64": round(cost(lambda n: sign_commit([digest] * 64, key)) / 64, 1),
    }


def _median(slices: Sequence[_Slice]) -> int:
    return round(statistics.median(part.per_s for part in slices))


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))], 1)
