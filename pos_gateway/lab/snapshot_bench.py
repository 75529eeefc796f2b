"""`bench snapshot`: the limit snapshot at any size, beside the bare cost of the same machine in the same run.

It builds a base of N tokens, the next version with one per cent changed, and the delta between them, and
measures what a gateway does with them. Raw reads, LMDB and hashing the file are the yardsticks; batches of
what is compared take turns, so that a busy moment of the machine falls on both.

Records are made in slices of the key space, each from its own seed: N of them never lie in memory.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Final, TypeVar

import lmdb
import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pos_gateway.limits.builder import write_encoded
from pos_gateway.limits.header import RiskPolicy, SnapshotHeader, SnapshotTerms
from pos_gateway.limits.layers import Layers
from pos_gateway.limits.merge import Merge
from pos_gateway.limits.record import RECORD_BYTES, TOKEN_KEY_BYTES
from pos_gateway.limits.snapshot import Snapshot
from pos_gateway.snapshot_file import SnapshotFile

Say = Callable[[str], None]
T = TypeVar("T")

_SLICE: Final = 1 << 18
_SLICES_OF_A_BATCH: Final = 16
_CHANGED_SHARE: Final = 100
_PAGE: Final = 4096
_ROUNDS: Final = 10
_WARM_A_ROUND: Final = 5000
_COLD_A_ROUND: Final = 400
_OPENINGS: Final = 50
_SMALL_TOKENS: Final = 10_000
_CHUNK: Final = 1 << 20

_ROW: Final = np.dtype(
    [
        ("key_high", ">u8"),
        ("key_low", ">u8"),
        ("ceiling", ">u8"),
        ("per_tap_cap_minor", ">u4"),
        ("sequence", ">u4"),
        ("status", "u1"),
        ("assurance", "u1"),
        ("instalment_class", "u1"),
        ("reserved", "u1"),
    ]
)
"""`LimitRecord` as numpy sees it."""

_SIGNERS: Final = {"limits-1": Ed25519PrivateKey.generate(), "limits-2": Ed25519PrivateKey.generate()}
_THRESHOLD: Final = 2


def bench_snapshot(tokens: int, directory: Path | None, say: Say) -> dict[str, Any]:
    """Measure a snapshot of so many tokens.

    `directory` is where the files lie (about 230 bytes a token while it runs); the system's temporary
    folder if not said. `say` is told what is going on.

    Raises:
        OSError: no room, or a disk error.
    """
    keys = {key_id: key.public_key() for key_id, key in _SIGNERS.items()}
    with tempfile.TemporaryDirectory(dir=directory, prefix="pos-gateway-bench-") as scratch:
        return _Bench(tokens, Path(scratch), keys, say).run()


class _Bench:
    def __init__(self, tokens: int, folder: Path, keys: dict[str, Ed25519PublicKey], say: Say) -> None:
        self._tokens = tokens
        self._folder = folder
        self._keys = keys
        self._say = say
        self._population = Population(tokens, seed=secrets.randbits(32))
        self._random = Random(self._population.seed)

    def run(self) -> dict[str, Any]:
        data: dict[str, Any] = {"tokens": self._tokens, "seed": self._population.seed}
        base, data["build"] = self._build("base", _terms(1), self._population.chunks(changed=False))
        data["bytes_per_token"] = round(base.stat().st_size / self._tokens, 2)
        data["resident"] = self._resident(base)
        data["open"] = self._open(base)
        data["lookup"] = self._lookups(base)

        delta, data["delta"] = self._build(
            "delta", replace(_terms(2), base_version=1), self._population.changes(), self._population.changed
        )
        data["delta"]["activation"] = self._activate(base, delta)
        data["overlay"] = self._overlay(base, delta)
        data["merge"] = self._merge(base, delta)
        data["targets"] = _targets(data)
        data["met"] = all(target["met"] for target in data["targets"].values())
        return data

    def _build(
        self, name: str, terms: SnapshotTerms, chunks: Iterator[bytes], count: int | None = None
    ) -> tuple[Path, dict[str, Any]]:
        path = self._folder / f"{name}.snapshot"
        seconds, header = _timed(lambda: self._write(path, name, terms, chunks, count or self._tokens))
        return path, {
            "records": header.count,
            "bytes": path.stat().st_size,
            "bucket_bits": header.bucket_bits,
            "seconds": round(seconds, 2),
            "records_per_second": round(header.count / seconds),
        }

    def _write(
        self, path: Path, name: str, terms: SnapshotTerms, chunks: Iterator[bytes], count: int
    ) -> SnapshotHeader:
        with path.open("wb") as file:
            header = write_encoded(file, chunks, count, terms, _SIGNERS, progress=self._progress(name))
            file.flush()
            os.fsync(file.fileno())
        return header

    def _progress(self, what: str) -> Callable[[int, int], None]:
        told = 0.0

        def progress(done: int, of: int) -> None:
            nonlocal told
            if time.monotonic() - told >= 2:
                told = time.monotonic()
                self._say(f"{what}: {done} of {of} records")

        return progress

    def _opened(self, path: Path) -> tuple[SnapshotFile, Snapshot]:
        file = SnapshotFile(path)
        return file, Snapshot.open(file.read_at, file.size, self._keys, _THRESHOLD)

    def _open(self, base: Path) -> dict[str, Any]:
        self._say("opening, against hashing the whole file")
        _hash(base)  # warm
        hashing_s, _ = _timed(lambda: _hash(base))
        small_tokens = min(self._tokens, _SMALL_TOKENS)
        small, _ = self._build(
            "small", _terms(1), Population(small_tokens, seed=1).chunks(changed=False), small_tokens
        )
        open_us, small_us = self._time_opening(base), self._time_opening(small)
        file, snapshot = self._opened(base)
        with file:
            nodes_s, _ = _timed(snapshot.load_nodes)
        median_us = statistics.median(open_us)
        return {
            "open_us": _percentiles(open_us),
            "open_us_of_10_thousand_tokens": _percentiles(small_us),
            "hash_whole_file_ms": round(hashing_s * 1000, 2),
            "share_of_hashing": round(median_us / 1e6 / hashing_s, 6),
            "growth_from_10_thousand_tokens": round(median_us / statistics.median(small_us), 2),
            "load_all_nodes_ms": round(nodes_s * 1000, 2),
        }

    def _time_opening(self, path: Path) -> list[float]:
        times = []
        for _ in range(_OPENINGS):
            seconds, (file, _) = _timed(lambda: self._opened(path))
            file.close()
            times.append(seconds * 1e6)
        return times

    def _lookups(self, base: Path) -> dict[str, Any]:
        table = self._lmdb()
        file, snapshot = self._opened(base)
        with file:
            snapshot.load_nodes()
            data = self._compare(base, snapshot.lookup, table)
            data["cold_nodes_too_us"] = _percentiles(self._first_lookups(base))
        shutil.rmtree(table)
        return data

    def _compare(self, path: Path, lookup: Callable[[bytes], object], table: Path) -> dict[str, Any]:
        """Warm, then cold; lookup, raw read, LMDB in turns."""
        data: dict[str, Any] = {}
        size = path.stat().st_size
        rows = table / "data.mdb"
        descriptor = os.open(path, os.O_RDONLY)

        def raw(at: int) -> bytes:
            return os.pread(descriptor, _PAGE, at)

        try:
            for state in ("warm", "cold"):
                self._say(f"lookups, {state}")
                cold = state == "cold"
                # Not so many that a small file would be warm again halfway through.
                batch = min(_COLD_A_ROUND, max(1, size // _PAGE // 20)) if cold else _WARM_A_ROUND
                times: dict[str, list[float]] = {"verified": [], "raw_pread": [], "lmdb": []}
                if not cold:
                    _read_all(path)
                    _read_all(rows)
                with _Lmdb(table, reopen=cold) as store:
                    for _ in range(_ROUNDS):
                        keys = self._population.some_keys(batch, self._random)
                        offsets = [self._random.randrange(max(1, size // _PAGE)) * _PAGE for _ in keys]
                        for name, call, arguments in (
                            ("verified", lookup, keys),
                            ("raw_pread", raw, offsets),
                            ("lmdb", store.get, keys),
                        ):
                            if cold:
                                store.close()
                                _drop(path)
                                _drop(rows)
                                store.open()
                            times[name] += _each(call, arguments)
                data[state] = {name: _percentiles(values) for name, values in times.items()}
                for other in ("raw_pread", "lmdb"):
                    data[state][f"ratio_to_{other}"] = {
                        point: round(data[state]["verified"][point] / data[state][other][point], 2)
                        for point in ("p50", "p99")
                    }
        finally:
            os.close(descriptor)
        return data

    def _first_lookups(self, base: Path) -> list[float]:
        """Of a gateway that has just started: no node is in memory yet, nothing in the page cache."""
        times = []
        for key in self._population.some_keys(_OPENINGS, self._random):
            file, snapshot = self._opened(base)
            with file:
                _drop(base)
                times += _each(snapshot.lookup, [key])
        return times

    def _lmdb(self) -> Path:
        """The same records without any verification."""
        self._say("LMDB with the same records")
        folder = self._folder / "lmdb"
        size = 4 * RECORD_BYTES * self._tokens + (64 << 20)
        with lmdb.open(str(folder), map_size=size, sync=False, metasync=False) as environment:
            for chunk in self._population.chunks(changed=False):
                rows = [chunk[at : at + RECORD_BYTES] for at in range(0, len(chunk), RECORD_BYTES)]
                with environment.begin(write=True) as transaction, transaction.cursor() as cursor:
                    cursor.putmulti(
                        [(row[:TOKEN_KEY_BYTES], row[TOKEN_KEY_BYTES:]) for row in rows], append=True
                    )
            environment.sync(True)
        return folder

    def _activate(self, base: Path, delta: Path) -> dict[str, Any]:
        """From a delta that lies there, unsynced, to the first answer through it."""
        self._say("activating the delta")
        times = []
        file, snapshot = self._opened(base)
        with file:
            snapshot.load_nodes()
            (key,) = self._population.some_keys(1, self._random)
            for _ in range(5):
                arrived, place = self._folder / "arrived", self._folder / "active"
                shutil.copyfile(delta, arrived)
                begun = time.perf_counter()
                over_file, over = self._opened(arrived)
                with over_file:
                    layers = Layers(snapshot, over)
                    _sync(arrived)
                    arrived.rename(place)
                    _sync(self._folder)
                    layers.lookup(key)
                    answered = time.perf_counter() - begun
                    over.load_nodes()
                times.append((answered * 1000, (time.perf_counter() - begun) * 1000))
                place.unlink()
        return {
            "first_answer_ms": _percentiles([first for first, _ in times]),
            "all_nodes_loaded_ms": _percentiles([loaded for _, loaded in times]),
        }

    def _overlay(self, base: Path, delta: Path) -> dict[str, Any]:
        """Lookups through delta and base, of tokens that mostly stand in the base."""
        (base_file, below), (delta_file, over) = self._opened(base), self._opened(delta)
        data: dict[str, Any] = {}
        with base_file, delta_file:
            below.load_nodes()
            over.load_nodes()
            layers = Layers(below, over)
            for state in ("warm", "cold"):
                cold = state == "cold"
                size = delta.stat().st_size
                batch = min(_COLD_A_ROUND, max(1, size // _PAGE // 20)) if cold else _WARM_A_ROUND
                self._say(f"lookups through the delta, {state}")
                if not cold:
                    _read_all(base)
                    _read_all(delta)
                both: list[float] = []
                alone: list[float] = []
                for _ in range(_ROUNDS):
                    keys = self._population.some_keys(batch, self._random)
                    if cold:
                        _drop(base)
                        _drop(delta)
                    both += _each(layers.lookup, keys)
                    if cold:
                        _drop(base)
                    alone += _each(below.lookup, keys)
                data[state] = {"through_delta": _percentiles(both), "base_alone": _percentiles(alone)}
                data[state]["ratio"] = round(statistics.median(both) / statistics.median(alone), 2)
        return data

    def _merge(self, base: Path, delta: Path) -> dict[str, Any]:
        sink = _Head()
        header = write_encoded(
            sink,
            self._population.chunks(changed=True),
            self._tokens,
            _terms(2),
            _SIGNERS,
            progress=self._progress("what the issuer signs for the merged whole"),
        )
        (base_file, below), (delta_file, over) = self._opened(base), self._opened(delta)
        path = self._folder / "merged.snapshot"
        with base_file, delta_file, path.open("w+b") as file:
            merge = Merge(below, over, sink.head, self._keys, _THRESHOLD, file)

            def run() -> None:
                merge.run(self._progress("merge"))
                file.flush()
                os.fsync(file.fileno())

            seconds, _ = _timed(run)
        merged_file, merged = self._opened(path)
        with merged_file:
            reproduced = merged.header == header
        size = path.stat().st_size
        return {
            "seconds": round(seconds, 2),
            "records_per_second": round(self._tokens / seconds),
            "megabytes_per_second": round(size / seconds / 1e6, 1),
            "signed_root_reproduced": reproduced,
        }

    def _resident(self, base: Path) -> dict[str, Any]:
        """In a process of its own that has imported all of this and holds nothing else."""
        self._say("resident memory")
        keys = self._population.some_keys(2000, self._random)
        public = {key_id: key.public_bytes_raw() for key_id, key in self._keys.items()}
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            opened, used = pool.apply(_resident_growth, (base, public, keys))
        return {
            "growth_after_opening_mb": round(opened / 1e6, 2),
            "growth_with_all_nodes_and_2000_lookups_mb": round(used / 1e6, 2),
        }


class Population:
    """N tokens, and which of them change."""

    def __init__(self, tokens: int, *, seed: int) -> None:
        self.seed = seed
        self._tokens = tokens
        self._slices = -(-tokens // _SLICE)

    @property
    def changed(self) -> int:
        return sum(self._changed_in(number) for number in range(self._slices))

    def chunks(self, *, changed: bool) -> Iterator[bytes]:
        """All records in order, before or after the change."""
        for number in range(self._slices):
            rows, places = self._slice(number)
            if changed:
                _change(rows, places)
            yield rows.tobytes()

    def changes(self) -> Iterator[bytes]:
        """The changed records alone."""
        for number in range(self._slices):
            rows, places = self._slice(number)
            _change(rows, places)
            yield rows[places].tobytes()

    def some_keys(self, count: int, random: Random) -> list[bytes]:
        """Keys from places all over the file, in random order."""
        slices = random.sample(range(self._slices), min(count, self._slices, _SLICES_OF_A_BATCH))
        keys: list[bytes] = []
        for number in slices:
            rows, _ = self._slice(number)
            places = random.choices(range(len(rows)), k=-(-count // len(slices)))
            keys += [rows[place].tobytes()[:TOKEN_KEY_BYTES] for place in places]
        random.shuffle(keys)
        return keys[:count]

    def _bounds(self, number: int) -> tuple[int, int]:
        return number * self._tokens // self._slices, (number + 1) * self._tokens // self._slices

    def _changed_in(self, number: int) -> int:
        start, stop = self._bounds(number)
        return max(1, (stop - start) // _CHANGED_SHARE)

    def _slice(self, number: int) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64]]:
        """The records of one slice of the key space, and the places of those that change."""
        start, stop = self._bounds(number)
        size = stop - start
        random = np.random.default_rng([self.seed, number])
        width = (1 << 64) // self._slices
        rows = np.zeros(size, dtype=_ROW)
        rows["key_high"] = np.sort(random.integers(0, width, size, dtype=np.uint64)) + np.uint64(
            number * width
        )
        # Ordered below equal high halves, which happen about never, but would be refused.
        rows["key_low"] = np.sort(random.integers(0, 1 << 64, size, dtype=np.uint64, endpoint=False))
        rows["ceiling"] = random.integers(0, 1 << 40, size)
        rows["per_tap_cap_minor"] = 50_000
        rows["sequence"] = 1
        rows["status"] = 1
        rows["assurance"] = random.integers(0, 4, size)
        return rows, np.sort(random.choice(size, self._changed_in(number), replace=False))


def _change(rows: npt.NDArray[np.void], places: npt.NDArray[np.int64]) -> None:
    rows["ceiling"][places] += 10_000
    rows["sequence"][places] += 1


class _Lmdb:
    """Reads without any verification. Opened anew where it shall be cold, since pages that are mapped cannot
    be dropped from the cache; kept open where it shall be warm, since a new mapping faults on each page."""

    def __init__(self, folder: Path, *, reopen: bool) -> None:
        self._folder = folder
        self._reopen = reopen
        self.open()

    def get(self, key: bytes) -> object:
        return self._transaction.get(key)

    def open(self) -> None:
        self._environment = lmdb.open(str(self._folder), readonly=True, lock=False, readahead=False)
        self._transaction = self._environment.begin()
        if not self._reopen:
            with self._transaction.cursor() as cursor:
                for _ in cursor.iternext(keys=True, values=False):
                    pass

    def close(self) -> None:
        self._transaction.abort()
        self._environment.close()

    def __enter__(self) -> _Lmdb:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Head(io.BytesIO):
    """Keeps the head of a file, which is written last and at its beginning, and lets the body go."""

    def __init__(self) -> None:
        super().__init__()
        self.head = b""
        self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset
        return offset

    def write(self, data: Any) -> int:
        if self._at == 0:
            self.head = bytes(data)
        return len(data)


def _resident_growth(path: Path, public: dict[str, bytes], keys: list[bytes]) -> tuple[int, int]:
    signing = {key_id: Ed25519PublicKey.from_public_bytes(key) for key_id, key in public.items()}
    before = _resident_bytes()
    with SnapshotFile(path) as file:
        snapshot = Snapshot.open(file.read_at, file.size, signing, _THRESHOLD)
        opened = _resident_bytes()
        snapshot.load_nodes()
        for key in keys:
            snapshot.lookup(key)
        return opened - before, _resident_bytes() - before


def _resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def _each(call: Callable[[Any], object], arguments: list[Any]) -> list[float]:
    """Of each call, µs."""
    clock = time.perf_counter_ns
    times = []
    for argument in arguments:
        begun = clock()
        call(argument)
        times.append((clock() - begun) / 1000)
    return times


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    begun = time.perf_counter()
    result = call()
    return time.perf_counter() - begun, result


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": round(statistics.median(ordered), 2),
        "p99": round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)], 2),
    }


def _hash(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").digest()


def _read_all(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(_CHUNK):
            pass


def _drop(path: Path) -> None:
    """Out of the page cache; only what is on disk can be."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _terms(version: int) -> SnapshotTerms:
    now_unix_s = 1_790_000_000
    return SnapshotTerms(
        issuer="Laboratory Bank",
        currency="CNY",
        version=version,
        nonce=version.to_bytes(16, "big"),
        valid_from_unix_s=now_unix_s,
        refresh_after_unix_s=now_unix_s + 86_400,
        valid_until_unix_s=now_unix_s + 7 * 86_400,
        token_key_epoch=1,
        policy=RiskPolicy(
            stale_per_tap_cap_minor=20_000, presentment_deadline_s=14 * 86_400, clock_tolerance_s=300
        ),
    )


def _targets(data: dict[str, Any]) -> dict[str, Any]:
    """What issue 3 asks for, and what came out."""
    asked = {
        "open_share_of_hashing": (0.01, data["open"]["share_of_hashing"]),
        "open_growth_from_10_thousand_tokens": (1.5, data["open"]["growth_from_10_thousand_tokens"]),
        "cold_lookup_ratio": (1.25, data["lookup"]["cold"]["ratio_to_raw_pread"]["p50"]),
        "warm_lookup_ratio": (5.0, data["lookup"]["warm"]["ratio_to_raw_pread"]["p50"]),
        "bytes_per_token": (45.0, data["bytes_per_token"]),
        "resident_growth_mb": (64.0, data["resident"]["growth_with_all_nodes_and_2000_lookups_mb"]),
        "delta_active_ms": (1000.0, data["delta"]["activation"]["all_nodes_loaded_ms"]["p50"]),
    }
    return {
        name: {"at_most": most, "measured": found, "met": found <= most}
        for name, (most, found) in asked.items()
    }
