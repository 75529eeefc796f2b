"""The proofs of the limits that approvals relied on, kept for their decision receipts.

Taken after the answer was shown, so that no tap is slower for it. Proofs from the same limits are the
same but for a few hundred bytes; what they share is kept once.
"""

from __future__ import annotations

import hashlib
import queue
import sqlite3
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import structlog

from pos_gateway.errors import PosGatewayError
from pos_gateway.limits.layers import Layers
from pos_gateway.limits.proof import proof_parts

_log = structlog.get_logger(__name__)

_MAX_WAITING: Final = 1000
_SCHEMA: Final = (
    "CREATE TABLE IF NOT EXISTS parts (hash BLOB PRIMARY KEY, data BLOB NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS proofs (sale_id BLOB PRIMARY KEY, parts BLOB NOT NULL, "
    "kept_unix_ms INTEGER NOT NULL) STRICT",
)
_HASH_BYTES: Final = 32


class LimitProofs:
    """Safe to call from any thread. `limits`: those in use."""

    def __init__(self, path: Path, limits: Callable[[], Layers | None]) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        path.touch(mode=0o600, exist_ok=True)
        self._db = sqlite3.connect(path, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        for statement in _SCHEMA:
            self._db.execute(statement)
        self._db.commit()
        self._waiting: queue.Queue[tuple[UUID, Mapping[str, Any]] | None] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="receipts", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._waiting.put(None)
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            self._db.close()

    def keep_soon(self, sale_id: UUID, facts: Mapping[str, Any]) -> None:
        """Have the proof taken by another thread. If too many wait, this one receipt goes without."""
        try:
            self._waiting.put_nowait((sale_id, facts))
        except queue.Full:
            _log.warning("limit proof not kept", payment=str(sale_id))

    def of(self, sale_id: UUID, facts: Mapping[str, Any]) -> bytes:
        """The approval's proof; taken now if it was not and the limits are still in use; else empty."""
        with self._lock:
            kept = self._find(sale_id)
            return kept if kept is not None else self._keep(sale_id, facts)

    def prune(self, older_than_unix_ms: int) -> None:
        with self._lock, self._db:
            self._db.execute("DELETE FROM proofs WHERE kept_unix_ms < ?", (older_than_unix_ms,))
            used: set[bytes] = set()
            for (joined,) in self._db.execute("SELECT parts FROM proofs"):
                used.update(_split(joined))
            unused = [(h,) for (h,) in self._db.execute("SELECT hash FROM parts") if h not in used]
            self._db.executemany("DELETE FROM parts WHERE hash = ?", unused)

    def _run(self) -> None:
        while (asked := self._waiting.get()) is not None:
            sale_id, facts = asked
            try:
                self.of(sale_id, facts)
            except (sqlite3.Error, PosGatewayError) as error:
                _log.warning("limit proof not kept", payment=str(sale_id), reason=str(error))

    def _keep(self, sale_id: UUID, facts: Mapping[str, Any]) -> bytes:
        parts = self._taken(facts)
        hashes = [hashlib.sha256(part).digest() for part in parts]
        with self._db:
            self._db.executemany(
                "INSERT OR IGNORE INTO parts VALUES (?, ?)", list(zip(hashes, parts, strict=True))
            )
            self._db.execute(
                "INSERT OR IGNORE INTO proofs VALUES (?, ?, ?)",
                (sale_id.bytes, b"".join(hashes), facts["at_unix_ms"]),
            )
        return b"".join(parts)

    def _taken(self, facts: Mapping[str, Any]) -> list[bytes]:
        limits, token_key = self._limits(), bytes.fromhex(facts["token_key"])
        if limits is None:
            return []
        for layer in (limits.delta, limits.base):
            if layer is None or layer.header.version != facts["snapshot_version"]:
                continue
            try:
                record = layer.lookup(token_key)
                if record is not None and record.digest(layer.header.nonce).hex() == facts["limit_digest"]:
                    return _grouped(proof_parts(layer, token_key))
            except PosGatewayError as error:
                _log.warning("limit proof not taken", reason=error.reason)
        return []

    def _find(self, sale_id: UUID) -> bytes | None:
        row = self._db.execute("SELECT parts FROM proofs WHERE sale_id = ?", (sale_id.bytes,)).fetchone()
        if row is None:
            return None
        found = [
            self._db.execute("SELECT data FROM parts WHERE hash = ?", (digest,)).fetchone()
            for digest in _split(row[0])
        ]
        return b"".join(data for (data,) in found)


def _grouped(parts: list[bytes]) -> list[bytes]:
    """What is long is shared with other proofs and stays by itself; what is short is this record's own."""
    out: list[bytes] = []
    for part in parts:
        if len(part) >= 256 or not out or len(out[-1]) >= 256:
            out.append(part)
        else:
            out[-1] += part
    return out


def _split(joined: bytes) -> list[bytes]:
    return [joined[at : at + _HASH_BYTES] for at in range(0, len(joined), _HASH_BYTES)]
