"""Publishing limits: decide every token's next ceiling, record it, and only then let files out.

    prepare   decide and record, stretch by stretch ─► signer's log ─► build the files in the staging folder
    sign      the headers by limit keys, the list of files by targets keys: here, or on other machines
    release   files into the repository ─► the list of them ─► timestamp.json

The terms (with the nonce) and the records are in the database, so after a crash the same bytes are made
again. Never is a ceiling in a shop that is not on record; one on record that never got out reserves its
credit until it lapses. A version whose deciding was interrupted stays incomplete and is passed over.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.metadata import Metadata, TargetFile, Targets

from pos_gateway.distribution import LimitFile, delta_file, head_file, parse_name, whole_file
from pos_gateway.errors import AuthenticationFailed, Conflict, InvalidInput, NotFound, Unavailable
from pos_gateway.instalments import Offer
from pos_gateway.ledger import accounts, store
from pos_gateway.ledger.accounts import TokenStatus
from pos_gateway.ledger.ceilings import CHANGE, STATUS, change, decide_stretch, last_record
from pos_gateway.ledger.config import Identity, MetadataLives, Policy
from pos_gateway.ledger.repository import Repository, lacking_signatures
from pos_gateway.ledger.signer_log import SignerLog
from pos_gateway.ledger.signing import (
    HeaderToSign,
    KeyChest,
    Role,
    SigningRequest,
    read_metadata,
    replace_file,
    sign_metadata,
)
from pos_gateway.ledger.store import INCOMPLETE, Store
from pos_gateway.limits.builder import write_encoded, write_snapshot
from pos_gateway.limits.header import OnlineTerms, RiskPolicy, SnapshotHeader, SnapshotTerms
from pos_gateway.limits.merge import overlaid
from pos_gateway.limits.record import NONCE_BYTES, LimitRecord
from pos_gateway.limits.snapshot import Snapshot, encode_head, read_head
from pos_gateway.snapshot_file import SnapshotFile

_ROWS_AT_ONCE: Final = 10_000
_WHOLE_FILES_KEPT: Final = 2
"""So that a shop on a slow line finishes the whole file it began, and takes the delta over it."""


@dataclass(frozen=True, slots=True)
class PublishedSnapshot:
    """One released version; `path`, `size` and `sha256` are those of its whole file."""

    version: int
    path: Path
    size: int
    sha256: bytes
    record_count: int
    valid_from_unix_s: int
    refresh_after_unix_s: int
    valid_until_unix_s: int


@dataclass(frozen=True, slots=True)
class PreparedSnapshot:
    """A version that waits for its signatures."""

    version: int
    record_count: int
    request: Path


class Publisher:
    """Publishes the limits of one ledger into one repository.

    The caller of `prepare` and `release` holds the repository exclusively. `log` hears of every
    publication before anything of it can be signed.
    """

    def __init__(self, database: Store, repository: Repository, staging: Path, log: SignerLog) -> None:
        self._database = database
        self._repository = repository
        self._staging = staging
        self._log = log

    def prepare(
        self,
        identity: Identity,
        policy: Policy,
        token_key_epoch: int,
        now_unix_s: Callable[[], int],
        *,
        automatic: bool,
        online_keys: Sequence[bytes] = (),
        done: Callable[[str], None] = lambda step: None,
    ) -> PreparedSnapshot:
        """Decide the next version, put it on record, and build its files. `done` is told of each step.

        Raises:
            InvariantBroken: a fault of ours; nothing of the accounts it was found in was recorded.
            Unavailable, OutcomeUnknown: see `Store.write`.
        """
        with self._database.publishing():
            with self._database.write() as connection:
                last = connection.execute(_NEWEST).first()
                version = 1 + (0 if last is None else int(last.version))
                terms = replace(
                    _terms(version, identity, policy, token_key_epoch, now_unix_s()),
                    online=policy.online.terms(online_keys),
                )
                _begin(connection, terms, automatic=automatic)
            self._decide(terms, policy)
            done("decide")
            return self._build(version, policy.delta_bases, done)

    def prepare_urgent(
        self, delta_bases: int, done: Callable[[str], None] = lambda step: None
    ) -> PreparedSnapshot | None:
        """A version that only takes back tokens that may not pay any more; None if there are none, or no
        limits they stand in.

        Raises:
            Conflict: the newest version was never completed; only a new one will do.
            Unavailable, OutcomeUnknown: see `Store.write`.
        """
        with self._database.publishing():
            with self._database.write() as connection:
                last = connection.execute(_NEWEST).first()
                if last is None or not to_take_back(connection):
                    return None
                if last.record_count < 0:
                    raise Conflict(f"limits {last.version} were never completed")
                # The same nonce and times: what is not taken back stays the publication it was.
                terms = replace(terms_from_json(last.terms), version=last.version + 1)
                _begin(connection, terms, automatic=True)
                _take_back(connection, terms.version)
                _complete(connection, terms.version)
            done("decide")
            return self._build(terms.version, delta_bases, done)

    def _decide(self, terms: SnapshotTerms, policy: Policy) -> None:
        """Stretch by stretch, each in a transaction of its own. If this ends halfway, the version stays
        incomplete and never leaves the house; what was recorded of it reserves its credit until it lapses."""
        after: str | None = ""
        while after is not None:
            after = self._database.transact(partial(_next_stretch, after, terms, policy))

    def pending(self) -> int | None:
        """The newest version, if it is on record, complete, and was never released."""
        with self._database.read() as connection:
            row = connection.execute(_NEWEST).first()
        waits = row is not None and row.sha256 is None and row.record_count >= 0
        return int(row.version) if row is not None and waits else None

    def is_automatic(self, version: int) -> bool:
        with self._database.read() as connection:
            return bool(connection.scalar(sa.select(_versions.automatic).filter_by(version=version)))

    def sign(self, version: int, chest: KeyChest, delta_bases: int) -> None:
        """Sign what the limit keys that are here can sign; the files are built again if a crash has
        left them unfinished."""
        path = self._request(version)
        if not path.is_file():
            self._build(version, delta_bases)
        request = SigningRequest.read(path)
        request.sign(chest.of(Role.LIMITS))
        replace_file(path, request.to_json().encode())

    def release(
        self, version: int, chest: KeyChest, now: datetime, lives: MetadataLives
    ) -> PublishedSnapshot:
        """Put a signed version into the repository. Safe to repeat after a crash anywhere.

        Raises:
            Conflict: it was released before, or a newer one was prepared since.
            Unavailable: signatures are missing; says which, and what to sign.
        """
        if self.pending() != version:
            raise Conflict(f"version {version} does not wait for its release")
        state = self._repository.state()
        if state is None or whole_file(version).name not in state.targets.signed.targets:
            targets = self._signed_targets(version, chest, now, lives)
            self._repository.release(targets, chest, now, lives)
            state = self._repository.state()
        if state is None:
            raise NotFound("the repository has no state after a release")
        whole = state.targets.signed.targets[whole_file(version).name]
        with self._database.write() as connection:
            connection.execute(
                store.snapshots.update()
                .filter_by(version=version)
                .values(size=whole.length, sha256=bytes.fromhex(whole.hashes["sha256"]))
            )
        self._repository.prune()
        for folder in self._staging.iterdir():
            if folder.name.isdigit() and int(folder.name) <= version:
                shutil.rmtree(folder)
        return self.find(version)

    def latest(self) -> PublishedSnapshot:
        """
        Raises:
            NotFound: nothing was published yet.
        """
        with self._database.read() as connection:
            row = connection.execute(_NEWEST.where(_versions.sha256.is_not(None))).first()
        if row is None:
            raise NotFound(
                "no snapshot has been published yet", advice="`pos-gateway ledger snapshot publish`"
            )
        return self._published(row)

    def find(self, version: int) -> PublishedSnapshot:
        """
        Raises:
            NotFound: no such version, or not released.
        """
        with self._database.read() as connection:
            row = connection.execute(sa.select(store.snapshots).filter_by(version=version)).first()
        if row is None or row.sha256 is None:
            raise NotFound(f"there is no snapshot {version}")
        return self._published(row)

    def _folder(self, version: int) -> Path:
        return self._staging / str(version)

    def _request(self, version: int) -> Path:
        return self._folder(version) / "limits.json"

    def _build(
        self, version: int, delta_bases: int, done: Callable[[str], None] = lambda step: None
    ) -> PreparedSnapshot:
        """Every file of the version with a signature that nobody trusts in its head, and the request for
        the true ones; the request last."""
        folder = self._folder(version)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        placeholder = {"placeholder": Ed25519PrivateKey.generate()}
        headers = []
        with self._database.read() as connection:
            self._log.record(connection, version)
            done("log")
            row = connection.execute(sa.select(store.snapshots).filter_by(version=version)).one()
            released = sa.select(_versions.version).where(
                _versions.version < version, _versions.sha256.is_not(None)
            )
            bases = connection.scalars(released.order_by(_versions.version.desc()).limit(delta_bases)).all()
            whole_terms = terms_from_json(row.terms)
            last = self._base_of_urgent(connection, whole_terms)
            for file in (whole_file(version), *(delta_file(base, version) for base in bases)):
                terms = replace(whole_terms, base_version=file.base)
                with (folder / file.name).open("wb") as out:
                    header = self._write(connection, out, terms, last, placeholder)
                headers.append(HeaderToSign(file.name, header.to_bytes(), {}))
        replace_file(self._request(version), SigningRequest(version, headers).to_json().encode())
        done("build")
        return PreparedSnapshot(version, int(row.record_count), self._request(version))

    def _base_of_urgent(self, connection: sa.Connection, terms: SnapshotTerms) -> int | None:
        """The released version that this one only takes tokens back from; None if it is another's."""
        query = _NEWEST.where(_versions.version < terms.version)
        row = connection.execute(query).first()
        if row is None or row.sha256 is None or terms_from_json(row.terms).nonce != terms.nonce:
            return None
        return int(row.version)

    def _write(
        self,
        connection: sa.Connection,
        out: BinaryIO,
        terms: SnapshotTerms,
        last: int | None,
        signers: Mapping[str, Ed25519PrivateKey],
    ) -> SnapshotHeader:
        """One file; of an urgent version made of the one that its predecessor has in its place."""
        since = terms.base_version or 0
        count = _count_records(connection, since)
        if last is not None and since < last:
            before = delta_file(since, last) if since else whole_file(last)
            with suppress(NotFound, InvalidInput, AuthenticationFailed), self._released(before) as file:
                # Not so many records as the books say: some tokens were forgotten in a restore.
                changes = b"".join(record.to_bytes() for record in _records(connection, last))
                return write_encoded(out, overlaid(file, changes), count, terms, signers)
            out.seek(0)
            out.truncate()
        return write_snapshot(out, _records(connection, since), count, terms, signers)

    @contextmanager
    def _released(self, file: LimitFile) -> Iterator[Snapshot]:
        """
        Raises:
            NotFound: no file of that name is in force.
        """
        state = self._repository.state()
        target = state.targets.signed.targets.get(file.name) if state else None
        if target is None:
            raise NotFound(f"{file.name} is not in force")
        keys = self._repository.limit_keys()
        with SnapshotFile(self._repository.target(target)) as opened:
            yield Snapshot.open(opened.read_at, opened.size, keys.keys, keys.threshold)

    def _signed_targets(
        self, version: int, chest: KeyChest, now: datetime, lives: MetadataLives
    ) -> Metadata[Targets]:
        """The list of files, its files in place."""
        root = self._repository.root().signed
        draft = self._folder(version) / "targets.json"
        state = self._repository.state()
        if draft.is_file():
            targets = read_metadata(draft)
            if state is None or targets.signed.version == state.targets.signed.version + 1:
                sign_metadata(targets, chest.of(Role.TARGETS))
                if lacking_signatures(root, targets) == 0:
                    return targets
        request = SigningRequest.read(self._request(version))
        if missing := request.missing(self._repository.limit_keys()):
            raise Unavailable(
                f"limits {version} lack the signatures of {missing} limit keys",
                advice=f"pos-gateway ledger keys sign {self._request(version)} --key …, then release again",
            )
        files = [self._add(version, header) for header in request.headers]
        whole = request.headers[0]
        head = encode_head(whole.header, whole.signatures)
        (self._folder(version) / "empty").touch()
        files.append(
            self._repository.add_file(head_file(version).name, self._folder(version) / "empty", head, 0)
        )
        if state is not None:
            files += _kept(state.targets.signed)
        targets = self._repository.next_targets(files, now, lives)
        sign_metadata(targets, chest.of(Role.TARGETS))
        if missing := lacking_signatures(root, targets):
            replace_file(draft, targets.to_bytes())
            raise Unavailable(
                f"the list of files lacks the signatures of {missing} targets keys",
                advice=f"pos-gateway ledger keys sign {draft} --key …, then release again",
            )
        return targets

    def _add(self, version: int, header: HeaderToSign) -> TargetFile:
        path = self._folder(version) / header.name
        with SnapshotFile(path) as file:
            body_at = len(read_head(file.read_at).data)
        return self._repository.add_file(
            header.name, path, encode_head(header.header, header.signatures), body_at
        )

    def _published(self, row: sa.Row[tuple[object, ...]]) -> PublishedSnapshot:
        values = row._asdict()
        del values["terms"], values["automatic"]
        file = TargetFile(
            values["size"], {"sha256": values["sha256"].hex()}, whole_file(values["version"]).name
        )
        return PublishedSnapshot(path=self._repository.target(file), **values)


_versions = store.snapshots.c
_NEWEST: Final = sa.select(store.snapshots).order_by(_versions.version.desc()).limit(1)


def _kept(targets: Targets) -> list[TargetFile]:
    """Of the files in force, the newest whole ones: a download of them may be under way."""
    named: list[tuple[LimitFile, TargetFile]] = []
    for name, file in targets.targets.items():
        parsed = parse_name(name)
        if parsed is not None and parsed.kind == "snapshot":
            named.append((parsed, file))
    named.sort(key=lambda pair: pair[0].version, reverse=True)
    return [file for _, file in named[: _WHOLE_FILES_KEPT - 1]]


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
        offers=policy.offers,
    )


def _terms_to_json(terms: SnapshotTerms) -> str:
    offers = [offer.to_json() for offer in terms.offers]
    document = asdict(terms) | {"nonce": terms.nonce.hex(), "offers": offers}
    document["online"]["keys"] = [key.hex() for key in terms.online.keys]
    for name in ("base_version", "revoked_certificates"):
        del document[name]
    return json.dumps(document)


def terms_from_json(text: str) -> SnapshotTerms:
    document = json.loads(text)
    document["nonce"] = bytes.fromhex(document["nonce"])
    document["offers"] = tuple(Offer.from_json(offer) for offer in document.get("offers", ()))
    online = document.get("online", {"keys": []})
    online["keys"] = tuple(bytes.fromhex(key) for key in online["keys"])
    document |= {"policy": RiskPolicy(**document["policy"]), "online": OnlineTerms(**online)}
    return SnapshotTerms(**document)


def online_terms(connection: sa.Connection) -> OnlineTerms:
    """What the newest limits that were released let online keys do; nothing before the first."""
    query = _NEWEST.with_only_columns(_versions.terms).where(_versions.sha256.is_not(None))
    terms = connection.scalars(query).first()
    return OnlineTerms() if terms is None else terms_from_json(terms).online


def to_take_back(connection: sa.Connection) -> bool:
    """Does the last snapshot let a token pay that may not any more?"""
    return connection.execute(_TO_TAKE_BACK.limit(1)).first() is not None


def _begin(connection: sa.Connection, terms: SnapshotTerms, *, automatic: bool) -> None:
    connection.execute(
        store.snapshots.insert().values(
            version=terms.version,
            terms=_terms_to_json(terms),
            automatic=automatic,
            record_count=INCOMPLETE,
            valid_from_unix_s=terms.valid_from_unix_s,
            refresh_after_unix_s=terms.refresh_after_unix_s,
            valid_until_unix_s=terms.valid_until_unix_s,
        )
    )


def _next_stretch(after: str, terms: SnapshotTerms, policy: Policy, connection: sa.Connection) -> str | None:
    if connection.scalar(sa.select(sa.func.max(_versions.version))) != terms.version:
        raise Conflict(f"another publication was begun while limits {terms.version} were decided")
    last = decide_stretch(connection, after, terms, policy)
    if last is None:
        _complete(connection, terms.version)
    return last


def _complete(connection: sa.Connection, version: int) -> None:
    """All its ceilings are on record."""
    count = _count_records(connection, 0)
    connection.execute(store.snapshots.update().filter_by(version=version).values(record_count=count))


def _take_back(connection: sa.Connection, version: int) -> None:
    """Set the records of those tokens."""
    changes = []
    for row in connection.execute(_TO_TAKE_BACK.with_for_update()):
        line = accounts.line_of(row)
        record = last_record(row)._replace(
            ceiling=0, status=line.status.on_record, sequence=row.last_sequence + 1
        )
        changes.append(change(line, record, version))
    connection.execute(CHANGE, changes)


_TO_TAKE_BACK: Final = sa.select(store.tokens).where(
    store.tokens.c.record_version > 0,
    store.tokens.c.record_status == TokenStatus.ACTIVE.value,
    store.tokens.c.status != TokenStatus.ACTIVE.value,
)


def _count_records(connection: sa.Connection, since: int) -> int:
    query = sa.select(sa.func.count()).where(store.tokens.c.record_version > since)
    return int(connection.scalar(query) or 0)


def _records(connection: sa.Connection, since: int) -> Iterator[LimitRecord]:
    """The records that changed after version `since`, all of them after 0, sorted by token key."""
    columns = store.tokens.c
    query = (
        sa.select(
            columns.token_key,
            columns.record_ceiling,
            columns.record_per_tap_cap_minor,
            columns.record_sequence,
            columns.record_status,
            columns.record_assurance,
            columns.record_instalment_class,
        )
        .where(columns.record_version > since)
        .order_by(columns.token_key)
        .execution_options(yield_per=_ROWS_AT_ONCE)
    )
    for key, ceiling, cap_minor, sequence, status, assurance, plans in connection.execute(query):
        yield LimitRecord(key, ceiling, cap_minor, sequence, STATUS[status], assurance, plans)
