"""The signer's own log: every publication, on disk beside the keys before anybody can fetch it.

It outlives the database: a ledger restored from an older backup would have forgotten ceilings that shops
still rely on. One file per snapshot version, written whole, synced, and only then given its name:

    {"snapshot": {…}}  then one line per publication: {"publication": {…}}

Grants and notes go one line each into a file per day (UTC), which is synced before they are released; a
line that a crash cut short was never released.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from pos_gateway.ledger import accounts, store
from pos_gateway.records import canonical_json

_SUFFIX = ".publications"
_SINGLES = "singles-"


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a database had forgotten. `unknown_tokens`: publications for tokens issued since its backup."""

    snapshots: int
    publications: int
    unknown_tokens: int


class SignerLog:
    """The log in one folder; it is made with the first entry."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def versions(self) -> list[int]:
        """Every logged snapshot version, ascending."""
        if not self._folder.is_dir():
            return []
        return sorted(int(path.stem) for path in self._folder.glob(f"[0-9]*{_SUFFIX}"))

    def record(self, connection: sa.Connection, version: int) -> None:
        """Log a snapshot that is committed, with all its publications; on disk when this returns."""
        if version in self.versions():
            return
        self._folder.mkdir(mode=0o700, exist_ok=True)
        snapshot = connection.execute(sa.select(store.snapshots).filter_by(version=version)).one()
        rows = connection.execute(sa.select(store.publications).filter_by(snapshot_version=version))
        temporary = self._folder / f".{version:010d}.{os.getpid()}"
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(_line("snapshot", snapshot))
            file.writelines(_line("publication", row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, self._folder / f"{version:010d}{_SUFFIX}")
        for folder in (self._folder, self._folder.parent):
            _sync(folder)

    def record_single(self, row: Mapping[str, Any], issued_unix_s: int) -> None:
        """Log a grant or note that is committed; on disk when this returns. `row` as in its table."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        day = datetime.fromtimestamp(issued_unix_s, UTC).strftime("%Y%m%d")
        path = self._folder / f"{_SINGLES}{day}{_SUFFIX}"
        new = not path.exists()
        # Begun with a line break of its own: whatever a crash left unfinished before it stays a line apart.
        line = "\n" + canonical_json({"publication": dict(_plain(row))}) + "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if new:
            for folder in (self._folder, self._folder.parent):
                _sync(folder)

    def has_forgotten(self, connection: sa.Connection) -> bool:
        """Does the database not know the grant or note that was logged last?"""
        for path in reversed(self._singles()):
            rows = list(_readable(path))
            if rows:
                return not _is_known(connection, rows[-1])
        return False

    def _singles(self) -> list[Path]:
        """Oldest day first."""
        return sorted(self._folder.glob(f"{_SINGLES}[0-9]*{_SUFFIX}")) if self._folder.is_dir() else []

    def replay(self, connection: sa.Connection) -> Replayed:
        """Tell a database all it has forgotten. What it knows stays as it is."""
        known = set(connection.scalars(sa.select(store.snapshots.c.version)))
        snapshots = publications = unknown_tokens = 0
        for version in self.versions():
            if version in known:
                continue
            snapshot, rows = self._read(version)
            connection.execute(store.snapshots.insert().values(snapshot))
            snapshots += 1
            for row in rows:
                if _publish_again(connection, row):
                    publications += 1
                else:
                    unknown_tokens += 1
        for path in self._singles():
            for row in _readable(path):
                if _is_known(connection, row):
                    continue
                if _publish_again(connection, row):
                    publications += 1
                else:
                    unknown_tokens += 1
        return Replayed(snapshots, publications, unknown_tokens)

    def _read(self, version: int) -> tuple[dict[str, Any], Iterable[dict[str, Any]]]:
        lines = (self._folder / f"{version:010d}{_SUFFIX}").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        return _values(entries[0]["snapshot"]), (_values(entry["publication"]) for entry in entries[1:])


def _publish_again(connection: sa.Connection, row: Mapping[str, Any]) -> bool:
    accounts.lock_accounts(connection, [row["account_id"]])
    token = connection.execute(sa.select(store.tokens).filter_by(id=row["token_id"])).first()
    if token is None:
        return False
    connection.execute(store.publications.insert().values(row))
    in_snapshot = row["snapshot_version"] is not None
    connection.execute(
        store.tokens.update()
        .filter_by(id=token.id)
        .values(
            record_sequence=max(token.record_sequence, row["sequence"] if in_snapshot else 0),
            record_version=max(token.record_version, row["snapshot_version"] or 0),
            last_sequence=max(token.last_sequence, row["sequence"]),
            highest_counter=max(token.highest_counter, row["highest"]),
        )
    )
    return True


def _is_known(connection: sa.Connection, row: Mapping[str, Any]) -> bool:
    query = sa.select(store.publications.c.token_id).filter_by(token_id=row["token_id"], digest=row["digest"])
    return connection.execute(query).first() is not None


def _readable(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            yield _values(json.loads(line)["publication"])
        except ValueError:
            continue  # cut short by a crash, or blank


def _line(name: str, row: sa.Row[Any]) -> str:
    return canonical_json({name: dict(_plain(row._asdict()))}) + "\n"


def _plain(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        yield name, {"hex": value.hex()} if isinstance(value, bytes) else value


def _values(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {n: bytes.fromhex(v["hex"]) if isinstance(v, dict) else v for n, v in plain.items()}


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
