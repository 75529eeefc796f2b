"""Publishing limits: decide every token's next ceiling, record it, and only then let files out.

    prepare   decide and record in one transaction ─► signer's log ─► build the files in the staging folder
    sign      the headers by limit keys, the list of files by targets keys: here, or on other machines
    release   files into the repository ─► the list of them ─► timestamp.json

The terms (with the nonce) and the records are in the database, so after a crash the same bytes are made
again. Never is a ceiling in a shop that is not on record; one on record that never got out reserves its
credit until it lapses.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.metadata import Metadata, TargetFile, Targets

from pos_gateway.distribution import LimitFile, delta_file, head_file, parse_name, whole_file
from pos_gateway.errors import Conflict, NotFound, Unavailable
from pos_gateway.instalments import Offer
from pos_gateway.ledger import accounts, habits, store
from pos_gateway.ledger.accounts import TokenLine, TokenStatus
from pos_gateway.ledger.allowance import Candidate, allot, shares_minor
from pos_gateway.ledger.bulk import among
from pos_gateway.ledger.config import Identity, MetadataLives, Policy
from pos_gateway.ledger.issue import publication_row
from pos_gateway.ledger.movements import complete, is_pending
from pos_gateway.ledger.repository import Repository, lacking_signatures
from pos_gateway.ledger.reserve import PublicationKind, measure
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
from pos_gateway.ledger.store import Store
from pos_gateway.ledger.use import UsePolicy, ceiling_for
from pos_gateway.limits.builder import write_snapshot
from pos_gateway.limits.header import OnlineTerms, RiskPolicy, SnapshotTerms
from pos_gateway.limits.record import NONCE_BYTES, LimitRecord
from pos_gateway.limits.snapshot import encode_head, read_head
from pos_gateway.snapshot_file import SnapshotFile

_DAY_S: Final = 24 * 3600
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
        urgent: bool = False,
    ) -> PreparedSnapshot | None:
        """Decide the next version, put it on record, and build its files. An urgent one only takes back
        tokens that may not pay any more; None if there are none, or no limits they stand in.

        Raises:
            InvariantBroken: a fault of ours; nothing was recorded.
            Unavailable, OutcomeUnknown: see `Store.write`.
        """
        with self._database.write() as connection:
            store.lock_publishing(connection)
            last = connection.execute(_NEWEST).first()
            version = 1 + (0 if last is None else int(last.version))
            if urgent:
                if last is None or not to_take_back(connection):
                    return None
                # The same nonce and times: what is not taken back stays the publication it was.
                terms = replace(terms_from_json(last.terms), version=version)
            else:
                terms = replace(
                    _terms(version, identity, policy, token_key_epoch, now_unix_s()),
                    online=policy.online.terms(online_keys),
                )
            connection.execute(
                store.snapshots.insert().values(
                    version=version,
                    terms=_terms_to_json(terms),
                    automatic=automatic,
                    record_count=0,
                    valid_from_unix_s=terms.valid_from_unix_s,
                    refresh_after_unix_s=terms.refresh_after_unix_s,
                    valid_until_unix_s=terms.valid_until_unix_s,
                )
            )
            count = _take_back(connection, version) if urgent else _decide(connection, terms, policy)
            connection.execute(store.snapshots.update().filter_by(version=version).values(record_count=count))
        return self._build(version, policy.delta_bases)

    def pending(self) -> int | None:
        """The newest version, if it was recorded and never released."""
        with self._database.read() as connection:
            row = connection.execute(_NEWEST).first()
        return int(row.version) if row is not None and row.sha256 is None else None

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

    def _build(self, version: int, delta_bases: int) -> PreparedSnapshot:
        """Every file of the version with a signature that nobody trusts in its head, and the request for
        the true ones; the request last."""
        folder = self._folder(version)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        placeholder = {"placeholder": Ed25519PrivateKey.generate()}
        headers = []
        with self._database.read() as connection:
            self._log.record(connection, version)
            row = connection.execute(sa.select(store.snapshots).filter_by(version=version)).one()
            released = sa.select(_versions.version).where(
                _versions.version < version, _versions.sha256.is_not(None)
            )
            bases = connection.scalars(released.order_by(_versions.version.desc()).limit(delta_bases)).all()
            whole_terms = terms_from_json(row.terms)
            for file in (whole_file(version), *(delta_file(base, version) for base in bases)):
                since = file.base or 0
                terms = replace(whole_terms, base_version=file.base)
                with (folder / file.name).open("wb") as out:
                    records = _records(connection, since)
                    header = write_snapshot(
                        out, records, _count_records(connection, since), terms, placeholder
                    )
                headers.append(HeaderToSign(file.name, header.to_bytes(), {}))
        replace_file(self._request(version), SigningRequest(version, headers).to_json().encode())
        return PreparedSnapshot(version, int(row.record_count), self._request(version))

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


def _take_back(connection: sa.Connection, version: int) -> int:
    """Set the records of those tokens; returns how many records there are in all."""
    changes = []
    for row in connection.execute(_TO_TAKE_BACK.with_for_update()):
        line = TokenLine(row.highest_counter, row=row, id=row.id, account_id=row.account_id)
        record = _record(row)._replace(
            ceiling=0, status=line.status.on_record, sequence=row.last_sequence + 1
        )
        changes.append(_change(line, record, version))
    connection.execute(_CHANGE, changes)
    return _count_records(connection, 0)


def _decide(connection: sa.Connection, terms: SnapshotTerms, policy: Policy) -> int:
    """Record every token's next limit record, and its publication if it may pay at all; returns how many
    tokens there are. Memory does not grow with the accounts."""
    now_unix_s, count, last = terms.valid_from_unix_s, 0, ""
    columns = store.accounts.c
    while True:
        query = sa.select(columns.id).where(columns.id > last).order_by(columns.id).limit(accounts.AT_ONCE)
        chunk = connection.scalars(query).all()
        if not chunk:
            return count
        last = chunk[-1]
        rows = accounts.lock_accounts(connection, chunk)
        accounts.lapse(connection, chunk, now_unix_s)
        for account_id, row in rows.items():
            if is_pending(accounts.balance_of(row)):
                account = accounts.lock_account(connection, account_id, now_unix_s)
                complete(connection, account, now_unix_s * 1000)
        rows = accounts.lock_accounts(connection, chunk)
        changes: list[dict[str, object]] = []
        published: list[dict[str, object]] = []
        before_minor: dict[str, int] = {}
        by_account = accounts.lines_by_account(accounts.token_lines(connection, chunk))
        recent_taps = _recent_taps(connection, by_account, policy, now_unix_s)
        spent = habits.spent_lately(connection, chunk, policy.use, now_unix_s) if policy.use else {}
        for account_id, lines in by_account.items():
            balance = accounts.balance_of(rows[account_id])
            reserve_minor = sum(measure(line.claimable(now_unix_s)) for line in lines)
            before_minor[account_id] = balance.committed_minor(reserve_minor)
            owable_minor = balance.free_minor(reserve_minor) + reserve_minor
            ceilings = (
                _by_use(
                    policy.use,
                    lines,
                    spent,
                    owable_minor,
                    rows[account_id].limit_minor,
                    reserve_minor,
                    now_unix_s,
                )
                if policy.use is not None
                else _by_share(owable_minor, lines, recent_taps, now_unix_s, policy)
            )
            for line, record, publication in _decide_account(lines, ceilings, terms, policy):
                count += 1
                if record.sequence != line.row.record_sequence:
                    changes.append(_change(line, record, terms.version))
                if publication is not None:
                    published.append(publication)
        if changes:
            connection.execute(_CHANGE, changes)
        if published:
            connection.execute(store.publications.insert(), published)
        accounts.check_accounts(connection, chunk, now_unix_s, before_minor)


def _recent_taps(
    connection: sa.Connection, by_account: Mapping[str, list[TokenLine]], policy: Policy, now_unix_s: int
) -> dict[str, int]:
    """How often tokens paid lately, where more than one shares an account."""
    sharing = [account_id for account_id, lines in by_account.items() if len(lines) > 1]
    if policy.allowance.recent_days == 0 or not sharing:
        return {}
    columns = store.transfers.c
    query = (
        sa.select(columns.token_id, sa.func.count())
        .where(
            among(connection, columns.account_id, sharing),
            columns.kind == "payment",
            columns.posted_unix_ms >= (now_unix_s - policy.allowance.recent_days * _DAY_S) * 1000,
        )
        .group_by(columns.token_id)
    )
    return {token_id: int(count) for token_id, count in connection.execute(query)}


def _by_share(
    owable_minor: int,
    lines: list[TokenLine],
    recent_taps: Mapping[str, int],
    now_unix_s: int,
    policy: Policy,
) -> dict[str, int]:
    """The next ceiling of each token that may pay: by assurance and by how often it was used."""
    active = [line for line in lines if line.status is TokenStatus.ACTIVE]
    reserved_minor = sum(measure(line.claimable(now_unix_s)) for line in lines)
    candidates = [
        Candidate(line.claimable(now_unix_s), line.highest, line.row.assurance, recent_taps.get(line.id, 0))
        for line in active
    ]
    shares = shares_minor(
        candidates,
        owable_minor=owable_minor,
        share_percent=policy.token_share_percent,
        policy=policy.allowance,
    )
    ceilings = allot(candidates, shares, free_minor=owable_minor - reserved_minor)
    return {line.id: ceiling for line, ceiling in zip(active, ceilings, strict=True)}


def _by_use(
    policy: UsePolicy,
    lines: list[TokenLine],
    spent: Mapping[str, tuple[int, int, int]],
    owable_minor: int,
    limit_minor: int,
    reserved_minor: int,
    now_unix_s: int,
) -> dict[str, int]:
    """The next ceiling of each token that may pay: by what it has spent."""
    planned = habits.plan(
        policy, lines, spent, owable_minor=owable_minor, limit_minor=limit_minor, now_unix_s=now_unix_s
    )
    free_minor, ceilings = owable_minor - reserved_minor, {}
    for line in lines:
        if line.id not in planned:
            continue
        ceilings[line.id] = ceiling_for(
            line.claimable(now_unix_s),
            line.highest,
            ahead_minor=planned[line.id].snapshot_minor,
            free_minor=free_minor,
        )
        free_minor -= line.cost_minor(ceilings[line.id], now_unix_s)
    return ceilings


def _decide_account(
    lines: list[TokenLine], ceiling_of: Mapping[str, int], terms: SnapshotTerms, policy: Policy
) -> Iterator[tuple[TokenLine, LimitRecord, dict[str, object] | None]]:
    now_unix_s = terms.valid_from_unix_s
    for line in lines:
        # A token that may not pay gets ceiling 0, which no card's counter is below.
        record = LimitRecord(
            token_key=line.row.token_key,
            ceiling=ceiling_of.get(line.id, 0),
            per_tap_cap_minor=policy.allowance.per_tap_cap_minor(
                line.row.assurance, line.row.per_tap_cap_minor
            ),
            sequence=line.row.record_sequence,
            status=line.status.on_record,
            assurance=line.row.assurance,
            instalment_class=line.row.instalment_class,
        )
        if line.row.record_version == 0 or record != _record(line.row):
            record = record._replace(sequence=line.row.last_sequence + 1)
        if line.id not in ceiling_of:
            yield line, record, None
            continue
        yield (
            line,
            record,
            publication_row(
                line,
                record,
                kind=PublicationKind.SNAPSHOT,
                digest=record.digest(terms.nonce),
                issued_unix_s=now_unix_s,
                valid_until_unix_s=terms.valid_until_unix_s,
                guarantee=policy.guarantee,
                snapshot_version=terms.version,
            ),
        )


_TO_TAKE_BACK: Final = sa.select(store.tokens).where(
    store.tokens.c.record_version > 0,
    store.tokens.c.record_status == TokenStatus.ACTIVE.value,
    store.tokens.c.status != TokenStatus.ACTIVE.value,
)

_CHANGE: Final = (
    store.tokens.update()
    .where(store.tokens.c.id == sa.bindparam("token_id"))
    .values(
        {
            name: sa.bindparam(name)
            for name in (
                "record_version",
                "record_sequence",
                "record_ceiling",
                "record_per_tap_cap_minor",
                "record_status",
                "record_assurance",
                "record_instalment_class",
                "last_sequence",
            )
        }
    )
)


def _change(line: TokenLine, record: LimitRecord, version: int) -> dict[str, object]:
    return {
        "token_id": line.id,
        "record_version": version,
        "record_sequence": record.sequence,
        "last_sequence": record.sequence,
        "record_ceiling": record.ceiling,
        "record_per_tap_cap_minor": record.per_tap_cap_minor,
        "record_status": line.status.value,
        "record_assurance": record.assurance,
        "record_instalment_class": record.instalment_class,
    }


def _record(row: Any) -> LimitRecord:
    """The last record issued for a token."""
    return LimitRecord(
        token_key=row.token_key,
        ceiling=row.record_ceiling,
        per_tap_cap_minor=row.record_per_tap_cap_minor,
        sequence=row.record_sequence,
        status=TokenStatus(row.record_status).on_record,
        assurance=row.record_assurance,
        instalment_class=row.record_instalment_class,
    )


def _count_records(connection: sa.Connection, since: int) -> int:
    query = sa.select(sa.func.count()).where(store.tokens.c.record_version > since)
    return int(connection.scalar(query) or 0)


def _records(connection: sa.Connection, since: int) -> Iterator[LimitRecord]:
    """The records that changed after version `since`, all of them after 0, sorted by token key."""
    query = (
        sa.select(store.tokens)
        .where(store.tokens.c.record_version > since)
        .order_by(store.tokens.c.token_key)
        .execution_options(yield_per=_ROWS_AT_ONCE)
    )
    return (_record(row) for row in connection.execute(query))
