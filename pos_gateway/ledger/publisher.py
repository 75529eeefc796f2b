"""Publishing limits: decide every token's next ceiling, record it, and only then let the file out.

    build under a temporary name, fsync ─► commit the publications ─► signer's log ─► rename, fsync the folder

A crash before the commit leaves a file that nobody gets; one after it leaves publications that reserve
credit for a file that is released at the next start. Never is a ceiling in a shop that is not on record.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.errors import NotFound
from pos_gateway.ledger import accounts, store
from pos_gateway.ledger.accounts import TokenLine, TokenStatus
from pos_gateway.ledger.config import Identity, Policy
from pos_gateway.ledger.reserve import allot, measure
from pos_gateway.ledger.signer_log import SignerLog
from pos_gateway.ledger.store import Store
from pos_gateway.limits.builder import build_snapshot
from pos_gateway.limits.header import SnapshotTerms
from pos_gateway.limits.record import NONCE_BYTES, LimitRecord

_UNRELEASED: Final = re.compile(r"\.\d+\.unreleased")
_HASH_CHUNK_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class PublishedSnapshot:
    """One released snapshot file."""

    version: int
    path: Path
    size: int
    sha256: bytes
    record_count: int
    valid_from_unix_s: int
    refresh_after_unix_s: int
    valid_until_unix_s: int


class Publisher:
    """Publishes the snapshots of one ledger into one folder."""

    def __init__(self, database: Store, folder: Path, log: SignerLog) -> None:
        self._database = database
        self._folder = folder
        self._log = log

    def publish(
        self,
        identity: Identity,
        policy: Policy,
        signers: Mapping[str, Ed25519PrivateKey],
        token_key_epoch: int,
        now_unix_s: Callable[[], int],
    ) -> PublishedSnapshot:
        """Publish the next version.

        Raises:
            InvariantBroken: a fault of ours; nothing was published.
            Unavailable, OutcomeUnknown: see `Store.write`.
        """
        with self._database.write() as connection:
            store.lock_publishing(connection)
            last = connection.scalar(sa.select(sa.func.max(_versions.version)))
            version = 1 + (last or 0)
            terms = _terms(version, identity, policy, token_key_epoch, now_unix_s())
            self._write_snapshot(connection, terms, policy, signers)
        self._release(version)
        return self.find(version)

    def release_pending(self) -> None:
        """After a crash: release what was committed. What was not is overwritten by the next version."""
        for path in self._folder.iterdir():
            if _UNRELEASED.fullmatch(path.name):
                version = int(path.name.split(".")[1])
                if self._is_on_record(version):
                    self._release(version)

    def latest(self) -> PublishedSnapshot:
        """
        Raises:
            NotFound: nothing was published yet.
        """
        with self._database.read() as connection:
            rows = connection.execute(sa.select(store.snapshots).order_by(_versions.version.desc())).all()
        for row in rows:
            if self.path(row.version).is_file():
                return self._published(row)
        raise NotFound("no snapshot has been published yet", advice="`pos-gateway ledger snapshot publish`")

    def find(self, version: int) -> PublishedSnapshot:
        """
        Raises:
            NotFound: no such version, or not released.
        """
        with self._database.read() as connection:
            row = connection.execute(sa.select(store.snapshots).filter_by(version=version)).first()
        if row is None or not self.path(version).is_file():
            raise NotFound(f"there is no snapshot {version}")
        return self._published(row)

    def path(self, version: int) -> Path:
        return self._folder / f"{version:010d}.snapshot"

    def _temporary(self, version: int) -> Path:
        return self._folder / f".{version:010d}.unreleased"

    def _write_snapshot(
        self,
        connection: sa.Connection,
        terms: SnapshotTerms,
        policy: Policy,
        signers: Mapping[str, Ed25519PrivateKey],
    ) -> None:
        temporary = self._temporary(terms.version)
        records = list(_issue(connection, terms, policy))
        with temporary.open("wb") as file:
            build_snapshot(file.write, (record for record, _ in records), terms, signers)
            file.flush()
            os.fsync(file.fileno())
        connection.execute(
            store.snapshots.insert().values(
                version=terms.version,
                size=temporary.stat().st_size,
                sha256=_sha256(temporary),
                record_count=len(records),
                valid_from_unix_s=terms.valid_from_unix_s,
                refresh_after_unix_s=terms.refresh_after_unix_s,
                valid_until_unix_s=terms.valid_until_unix_s,
            )
        )
        rows = [row for _, row in records if row is not None]
        if rows:
            connection.execute(store.publications.insert(), rows)
        touched = {str(row["account_id"]) for row in rows}
        accounts.check_accounts(connection, touched, terms.valid_from_unix_s)

    def _release(self, version: int) -> None:
        with self._database.read() as connection:
            self._log.record(connection, version)
        try:
            os.rename(self._temporary(version), self.path(version))
        except FileNotFoundError:
            # Another process that opened this ledger has released it in the meantime.
            if not self.path(version).is_file():
                raise
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _is_on_record(self, version: int) -> bool:
        with self._database.read() as connection:
            query = sa.select(store.snapshots.c.version).filter_by(version=version)
            return connection.execute(query).first() is not None

    def _published(self, row: sa.Row[tuple[object, ...]]) -> PublishedSnapshot:
        values = row._asdict()
        return PublishedSnapshot(path=self.path(values["version"]), **values)


_versions = store.snapshots.c


def _terms(
    version: int, identity: Identity, policy: Policy, token_key_epoch: int, now_unix_s: int
) -> SnapshotTerms:
    return SnapshotTerms(
        issuer=identity.issuer,
        currency=identity.currency,
        version=version,
        nonce=secrets.token_bytes(NONCE_BYTES),
        valid_from_unix_s=now_unix_s,
        refresh_after_unix_s=now_unix_s + min(policy.refresh_after_s, policy.valid_s),
        valid_until_unix_s=now_unix_s + policy.valid_s,
        token_key_epoch=token_key_epoch,
        policy=policy.risk_policy(),
    )


def _issue(
    connection: sa.Connection, terms: SnapshotTerms, policy: Policy
) -> Iterator[tuple[LimitRecord, dict[str, object] | None]]:
    """Every token's next record, and its publication if it may pay at all."""
    now_unix_s = terms.valid_from_unix_s
    account_ids = connection.scalars(sa.select(store.accounts.c.id).order_by(store.accounts.c.id)).all()
    for start in range(0, len(account_ids), accounts.AT_ONCE):
        chunk = account_ids[start : start + accounts.AT_ONCE]
        rows = accounts.lock_accounts(connection, chunk)
        # Credit of what no longer stands is about to be given away again: from now on it never stands.
        connection.execute(
            store.publications.update()
            .where(
                store.publications.c.account_id.in_(chunk),
                ~store.publications.c.lapsed,
                store.publications.c.stands_until_unix_s < now_unix_s,
            )
            .values(lapsed=True)
        )
        connection.execute(
            store.tokens.update()
            .where(store.tokens.c.account_id.in_(chunk))
            .values(record_sequence=store.tokens.c.record_sequence + 1)
        )
        for account_id, lines in accounts.lines_by_account(accounts.token_lines(connection, chunk)).items():
            owable_minor = rows[account_id].limit_minor - rows[account_id].outstanding_minor
            yield from _issue_account(owable_minor, lines, terms, policy)


def _issue_account(
    owable_minor: int, lines: list[TokenLine], terms: SnapshotTerms, policy: Policy
) -> Iterator[tuple[LimitRecord, dict[str, object] | None]]:
    now_unix_s = terms.valid_from_unix_s
    active = [line for line in lines if line.status is TokenStatus.ACTIVE]
    reserved_minor = sum(measure(line.claimable(now_unix_s)) for line in lines)
    ceilings = allot(
        [(line.claimable(now_unix_s), line.highest) for line in active],
        free_minor=owable_minor - reserved_minor,
        share_minor=owable_minor * policy.token_share_percent // 100 // max(len(active), 1),
    )
    ceiling_of = {line.id: ceiling for line, ceiling in zip(active, ceilings, strict=True)}
    for line in lines:
        # A token that may not pay gets ceiling 0, which no card's counter is below.
        record = LimitRecord(
            token_key=line.row.token_key,
            ceiling=ceiling_of.get(line.id, 0),
            per_tap_cap_minor=line.row.per_tap_cap_minor,
            sequence=line.row.record_sequence,
            status=line.status.on_record,
            assurance=line.row.assurance,
        )
        if line.id not in ceiling_of:
            yield record, None
            continue
        yield (
            record,
            {
                "account_id": line.account_id,
                "token_id": line.id,
                "sequence": record.sequence,
                "snapshot_version": terms.version,
                "highest": line.highest,
                "ceiling": record.ceiling,
                "valid_until_unix_s": terms.valid_until_unix_s,
                "stands_until_unix_s": terms.valid_until_unix_s + policy.presentment_deadline_s,
                "lapsed": False,
                "digest": record.digest(terms.nonce),
            },
        )


def _sha256(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.digest()
