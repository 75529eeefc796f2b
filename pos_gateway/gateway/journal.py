"""The journal: what the gateway has promised, durable before anybody is told; also its queue.

Append-only, gap-free, hash-chained, signed. One process writes it. Many threads may append: whoever
finds nobody committing leads and commits everything that waits in one transaction; the others sleep
until their record is on the disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, Self
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pos_gateway.authorization.decision import Interval
from pos_gateway.authorization.policy import Exposure
from pos_gateway.errors import (
    AuthenticationFailed,
    Conflict,
    InvalidMessage,
    NotFound,
    OutcomeUnknown,
    PosGatewayError,
    Unavailable,
)
from pos_gateway.gateway.disk_room import DiskRoom, disk_room
from pos_gateway.gateway.journal_file import JournalFile, Row, fsync_file, fsync_folder
from pos_gateway.gateway.journal_view import JournalView, RunningView, about, check_facts
from pos_gateway.gateway.retention import (
    Checkpoint,
    all_claims,
    claim_of,
    claims_digest,
    next_checkpoint,
)
from pos_gateway.records import (
    GENESIS_HASH,
    MAX_BATCH_RECORDS,
    MAX_BODY_BYTES,
    MAX_PROOF_BYTES,
    Kind,
    Record,
    Verdict,
    canonical_json,
    record_hash,
    sign_commit,
    uuid7,
)

_PAGE_RECORDS: Final = 1000
_PRUNED_AT_ONCE: Final = 100
"""Records deleted in one step: a tap that comes meanwhile waits for no more."""
_KINDS: Final = {kind.value: kind for kind in Kind}


@dataclass(frozen=True, slots=True)
class Draft:
    """A record before it has its place in the chain. Facts hold token numbers truncated only.

    Raises:
        InvalidMessage: a fact its kind needs is missing or wrong, or the record is too large.
    """

    kind: Kind
    id: UUID
    facts: Mapping[str, Any] = field(repr=False)
    proof: bytes = field(default=b"", repr=False)
    body: str = field(init=False, repr=False)
    about: UUID | None = field(init=False)

    def __post_init__(self) -> None:
        where = f"{self.kind.value} record"
        check_facts(self.kind, self.facts)
        try:
            body = canonical_json(self.facts)
        except (TypeError, ValueError):
            raise InvalidMessage("facts that JSON cannot hold", where=where) from None
        if len(body.encode()) > MAX_BODY_BYTES or len(self.proof) > MAX_PROOF_BYTES:
            raise InvalidMessage("too large for the journal", where=where)
        object.__setattr__(self, "body", body)
        object.__setattr__(self, "about", about(self.kind, self.facts))

    def is_content_of(self, record: Record) -> bool:
        return record.kind is self.kind and record.proof == self.proof and record.body == self.body

    def is_same_as(self, other: Draft) -> bool:
        return other.kind is self.kind and other.proof == self.proof and other.body == self.body


@dataclass(frozen=True, slots=True)
class Batch:
    """Records to present. `left_out_unix_ms`: the earliest tap time of an authorization that waits and is
    not among them. `certain`: nothing else waits that is not known of; else nothing can be claimed."""

    records: list[Record]
    left_out_unix_ms: int | None
    certain: bool


@dataclass(frozen=True, slots=True)
class Verified:
    """A journal that holds. `records` were checked one by one; up to `checkpoint.sequence` the older ones
    are pruned, and the checkpoint tells what they added up to."""

    records: int
    checkpoint: Checkpoint


class _Request:
    """One call of `append`, waiting for its commit; or of `work` that needs the file for itself."""

    __slots__ = ("_ready", "drafts", "error", "records", "work")

    def __init__(self, drafts: Sequence[Draft], work: Callable[[JournalFile], object] | None = None) -> None:
        self.drafts = drafts
        self.work = work
        self.records: list[Record] | None = None
        self.error: PosGatewayError | None = None
        self._ready = threading.Lock()
        self._ready.acquire()

    @property
    def settled(self) -> bool:
        return self.records is not None or self.error is not None

    def sleep(self) -> None:
        self._ready.acquire()

    def wake(self) -> None:
        self._ready.release()


class Journal:
    """The one writer of a journal. All methods may be called from any thread; they block on the disk."""

    def __init__(
        self, path: Path, lock_file: int, file: JournalFile, key: Ed25519PrivateKey, gateway_id: str
    ) -> None:
        self._path = path
        self._lock_file = lock_file
        self._key = key
        self._gateway_id = gateway_id
        self._mutex = threading.Lock()
        """Guards the waiting list, the running view and who leads; never held over disk work."""
        self._waiting: list[_Request] = []
        self._leading = False
        self._reading = threading.Lock()
        self._reader: JournalFile | None = None
        self._file: JournalFile | None = file
        self._head = 0, GENESIS_HASH
        self._running = RunningView()
        self._view: JournalView | None = None
        self._pruned_until = 0
        self._take_over(file)

    @classmethod
    def open(cls, path: Path, *, gateway_key: Ed25519PrivateKey, gateway_id: str) -> Journal:
        """Open or create the journal and add its records up.

        Raises:
            Unavailable: another gateway has it open, or the disk refuses.
            Conflict: it belongs to another gateway, or is of a newer program's form.
            AuthenticationFailed: a sequence is missing, or the newest record is not ours.
        """
        lock_file = lock_journal(path)
        file: JournalFile | None = None
        try:
            public_key = gateway_key.public_key().public_bytes_raw()
            file = JournalFile.open_for_writing(path, gateway_id=gateway_id, public_key=public_key)
            return cls(path, lock_file, file, gateway_key, gateway_id)
        except BaseException as error:
            if file is not None:
                file.close()
            os.close(lock_file)
            if isinstance(error, (sqlite3.Error, OSError)):
                raise _unavailable(error, "the journal cannot be opened") from None
            raise

    def append(self, kind: Kind, record_id: UUID, facts: Mapping[str, Any], proof: bytes = b"") -> Record:
        """Make one record durable. When this returns, the record has been synced to the disk.

        The same id with the same content again returns the record that is there.

        Raises:
            InvalidMessage: facts that this kind of record cannot do without are missing or wrong.
            Conflict: the id is there with other content.
            Unavailable: the disk refused (full, broken); the record is certainly not there.
            OutcomeUnknown: the disk failed and could not be read again: the record may be there.
        """
        return self.append_all([Draft(kind, record_id, facts, proof)])[0]

    def append_all(self, drafts: Sequence[Draft]) -> list[Record]:
        """Make several records durable in one transaction, all or none; see `append`."""
        return self._settled(_Request(drafts))

    def _settled(self, request: _Request) -> list[Record]:
        with self._mutex:
            self._waiting.append(request)
            leads, self._leading = not self._leading, True
        if not leads:
            request.sleep()
        if not request.settled:
            self._lead()
        if request.error is not None:
            raise request.error
        return request.records or []

    @property
    def view(self) -> JournalView:
        """What the journal adds up to now. Never waits for the disk."""
        with self._mutex:
            if self._view is None:
                self._view = self._running.value()
            return self._view

    @property
    def exposure(self) -> Exposure:
        return self.view.exposure

    @property
    def latest_at_unix_ms(self) -> int:
        """The latest time any record carries; a clock behind it is not to be trusted."""
        return self.view.latest_at_unix_ms

    @property
    def last_sequence(self) -> int:
        return self.view.last_sequence

    @property
    def pruned_until(self) -> int:
        """Records up to this sequence are pruned, but for a few; 0 if none."""
        return self._pruned_until

    def room(self, headroom_bytes: int) -> DiskRoom:
        """How the journal's disk stands against what must stay free on it.

        Raises:
            Unavailable: the disk cannot be asked.
        """
        return disk_room(self._path.parent, headroom_bytes=headroom_bytes, waiting=self.exposure.count)

    def overlapping(self, token_key: bytes, before: int, after: int) -> tuple[Interval, ...]:
        """Authorizations of the token that share a point with (before, after] of its counter line."""
        with self._mutex:
            return self._running.overlapping(token_key, before, after)

    def queue(self, limit: int = MAX_BATCH_RECORDS) -> list[Record]:
        """The oldest unsynchronised records, in the order of their sequence."""
        with self._mutex:
            sequences = list(islice(self._running.queued_sequences(), limit))
        with self._read() as file:
            return [file.at(sequence) for sequence in sequences]

    def batch(self, limit: int, passing_over: Collection[UUID] = ()) -> Batch:
        """The oldest unsynchronised records but those, and what corrects one of those, in order."""
        ids = {record_id.bytes for record_id in passing_over}
        with self._mutex:
            selection = self._running.select(limit, ids)
            # While the file is not open, an approval whose outcome is unknown may be in it unseen.
            certain = selection.counted and self._file is not None
        with self._read() as file:
            records = [file.at(sequence) for sequence in selection.sequences]
        return Batch(records, selection.left_out_unix_ms, certain)

    def waiting_since(self, unix_ms: int) -> tuple[int, int]:
        """How many records wait that were tapped up to that time, and the money in them, minor units."""
        with self._mutex:
            return self._running.waiting_since(unix_ms)

    def first_presented_since(self, unix_ms: int) -> int | None:
        """The lowest sequence of a presented record that was tapped, or acknowledged, at or after a time.
        Looks at the whole journal."""
        with self._own_reader() as reader:
            return reader.first_presented_since(unix_ms)

    def presented_before(self, first: int, last: int, limit: int) -> tuple[list[Record], int]:
        """Acknowledged records with a sequence from `first` up to `last`, at most `limit`, in order; and the
        sequence to go on from."""
        with self._read() as file:
            records = file.presented(first, last, limit)
        with self._mutex:
            acknowledged = [record for record in records if not self._running.waits(record.id.bytes)]
        return acknowledged, records[-1].sequence + 1 if len(records) == limit else last + 1

    def last_verdict(self, record_id: UUID) -> str | None:
        """The ledger's last word on a record; None if there is none."""
        with self._read() as file:
            body = file.last_acknowledgement(record_id.bytes)
        return str(json.loads(body)["verdict"]) if body is not None else None

    def was_pruned(self, record_id: UUID) -> bool:
        """Was an authorization of this id recorded here once, and pruned since?"""
        with self._read() as file:
            return file.has_claim(record_id)

    def prune(self, older_than_unix_ms: int, now_unix_ms: int) -> Checkpoint:
        """Write a checkpoint over what is acknowledged and older, as far as nothing younger or unsettled
        stands in between; `prune_some` then deletes. Returns the checkpoint in force.

        Raises:
            Unavailable, OutcomeUnknown: see `append`.
        """
        with self._mutex:
            view = self._running.value()
            oldest = next(self._running.queued_sequences(), view.last_sequence)
        again = view.again
        below = min(oldest, again.next_sequence) if again is not None else oldest
        with self._own_reader() as reader:
            before = reader.checkpoint
            after = reader.next_checkpoint(before, older_than_unix_ms, below)
        if after == before:
            return before
        with self._mutex:
            state = self._running.state()
        facts = after.as_json() | {"state": state, "at_unix_ms": now_unix_ms}
        self.append(Kind.CHECKPOINT, uuid7(now_unix_ms, os.urandom(10)), facts)
        self._pruned_until = after.sequence
        return after

    def prune_some(self) -> bool:
        """Delete a few records that the checkpoint covers; False when none is left. Taps wait for no more
        than these few.

        Raises:
            Unavailable, OutcomeUnknown: see `append`.
        """
        left = False

        def work(file: JournalFile) -> None:
            nonlocal left
            left = _prune_some(file)

        self._settled(_Request((), work))
        return left

    def records(self, after: int = 0, limit: int = _PAGE_RECORDS) -> list[Record]:
        """At most `limit` records with a sequence above `after`, in order."""
        with self._read() as file:
            return file.after(after, limit)

    def get(self, record_id: UUID) -> Record:
        """
        Raises:
            NotFound: no such record.
        """
        with self._read() as file:
            record = file.find(record_id)
        if record is None:
            raise NotFound(f"the journal has no record {record_id}")
        return record

    def about(self, record_id: UUID) -> list[Record]:
        """The record of this id, if any, and every record that speaks of it, oldest first."""
        with self._read() as file:
            return file.about(record_id)

    def verify(self) -> int:
        """Walk the whole chain; see `JournalReader.verify`."""
        with JournalReader.open(self._path) as reader:
            return reader.verify(self._key.public_key())

    def close(self) -> None:
        """Close the file and let another process have it. No append may be under way."""
        self._stop()
        os.close(self._lock_file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lead(self) -> None:
        """Commit everything that waits, then hand the lead to somebody who came meanwhile."""
        with self._mutex:
            batch, self._waiting = self._waiting, []
        try:
            self._commit(batch)
        except BaseException as error:
            # Not a disk error we know: trust nothing in memory, read the file anew for whoever comes next.
            self._stop()
            for request in batch:
                if not request.settled:
                    request.error = OutcomeUnknown(f"the journal failed: {type(error).__name__}")
            raise
        finally:
            with self._mutex:
                if self._waiting:
                    self._waiting[0].wake()
                else:
                    self._leading = False
            for request in batch[1:]:
                request.wake()

    def _commit(self, batch: Sequence[_Request]) -> None:
        try:
            file = self._file or self._reopen()
        except PosGatewayError as error:
            for request in batch:
                request.error = error
            return
        except (sqlite3.Error, OSError) as error:
            for request in batch:
                request.error = _unavailable(error, "the journal cannot be opened")
            return
        try:
            try:
                self._write(file, batch, look_up=False)
            except sqlite3.IntegrityError:
                self._write(file, batch, look_up=True)
        except sqlite3.Error as error:
            self._settle(batch, error)
            return
        for request in batch:
            if request.work is not None:
                self._work(file, request)

    def _work(self, file: JournalFile, request: _Request) -> None:
        try:
            if request.work is not None:
                request.work(file)
        except (sqlite3.Error, OSError) as error:
            request.records = None
            request.error = _unavailable(error, "the journal could not be pruned")
            if not _is_full(error):
                self._stop()  # what the disk holds now is read anew before anything else is written

    def _write(self, file: JournalFile, batch: Sequence[_Request], *, look_up: bool) -> None:
        """Chain, sign and commit. Ids are looked up only once the unique index has complained."""
        # By the number of an id: a UUID's own hash is several times slower.
        fresh: dict[int, Draft] = {}
        known: dict[int, Record] = {}
        for request in batch:
            request.error = None
            added: list[int] = []
            for draft in request.drafts:
                number = draft.id.int
                if (placed := fresh.get(number)) is not None:
                    same = draft.is_same_as(placed)
                elif look_up and (record := file.find(draft.id)) is not None:
                    known[number] = record
                    same = draft.is_content_of(record)
                else:
                    fresh[number] = draft
                    added.append(number)
                    continue
                if not same:
                    request.error = Conflict(f"record {draft.id} is in the journal with other content")
                    for undone in added:
                        del fresh[undone]
                    break
        if fresh:
            records = self._chain(fresh.values())
            subjects = [draft.about.bytes if draft.about is not None else None for draft in fresh.values()]
            file.write(records, subjects)
            self._head = records[-1].sequence, records[-1].hash
            with self._mutex:
                for record, subject, draft in zip(records, subjects, fresh.values(), strict=True):
                    self._running.add(record.sequence, record.id.bytes, record.kind, subject, draft.facts)
                self._view = None
            known.update(zip(fresh, records, strict=True))
        for request in batch:
            if request.error is None:
                request.records = [known[draft.id.int] for draft in request.drafts]

    def _chain(self, drafts: Iterable[Draft]) -> list[Record]:
        sequence, previous_hash = self._head
        chained: list[tuple[int, Draft, bytes, bytes]] = []
        for draft in drafts:
            sequence += 1
            digest = record_hash(
                sequence, previous_hash, draft.id, draft.kind, draft.body.encode(), draft.proof
            )
            chained.append((sequence, draft, previous_hash, digest))
            previous_hash = digest
        signatures = sign_commit([digest for _, _, _, digest in chained], self._key)
        return [
            Record(sequence, draft.id, draft.kind, draft.body, draft.proof, before, digest, signature)
            for (sequence, draft, before, digest), signature in zip(chained, signatures, strict=True)
        ]

    def _settle(self, batch: Sequence[_Request], error: sqlite3.Error) -> None:
        """The disk failed in mid-commit: close, reopen, re-read, and only then tell the truth.

        A full disk is no mystery: SQLite gave up before the commit's last frame was written, and has
        rolled back. There may be no room for reopening either, so there it goes on as it is.
        """
        try:
            file = self._file if self._file is not None and _is_full(error) else self._reopen()
            found = [[file.find(draft.id) for draft in request.drafts] for request in batch]
        except (sqlite3.Error, OSError, PosGatewayError) as second:
            for request in batch:
                request.error = OutcomeUnknown(
                    f"the journal failed ({error}) and cannot be read again ({second})",
                    advice="take no payments; check the disk, then restart the gateway",
                )
            return
        for request, records in zip(batch, found, strict=True):
            present = [record for record in records if record is not None]
            if len(present) == len(records):
                clash = next(
                    (d for d, r in zip(request.drafts, present, strict=True) if not d.is_content_of(r)), None
                )
                if clash is None:
                    request.records = present
                else:
                    request.error = Conflict(f"record {clash.id} is in the journal with other content")
            else:
                request.error = _unavailable(error, "the journal could not write; nothing was recorded")

    def _stop(self) -> None:
        # The writer goes last: then SQLite folds the write-ahead log into the file and removes it, so that
        # whoever copies a stopped gateway's journal has all of it in one file.
        with self._reading:
            self._close_reader()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _reopen(self) -> JournalFile:
        self._stop()
        public_key = self._key.public_key().public_bytes_raw()
        file = JournalFile.open_for_writing(self._path, gateway_id=self._gateway_id, public_key=public_key)
        try:
            file.make_durable()
            self._take_over(file)
        except BaseException:
            file.close()
            raise
        self._file = file
        return file

    def _take_over(self, file: JournalFile) -> None:
        """Add up what the file holds, and go on from its newest record."""
        running = RunningView()
        last, newest = file.last(), file.checkpoint()
        if newest is not None:
            newest.verify(self._key.public_key())
        checkpoint = Checkpoint.of(newest)
        self._pruned_until = checkpoint.sequence
        claimed_until, kept = 0, set(checkpoint.kept)
        for claim in file.claims():
            running.add_claim(claim.token_key.hex(), claim.before, claim.after, claim.id)
            claimed_until = claim.sequence
        expected = checkpoint.sequence
        resumed = newest is None
        for sequence, record_id, kind, subject, body in file.bodies():
            if sequence > checkpoint.sequence:
                expected += 1
                if not resumed and newest is not None:
                    running.resume(newest.facts()["state"])
                    resumed = True
                if sequence != expected:
                    raise AuthenticationFailed(f"record {expected} is missing", step="journal sequence")
            elif sequence not in kept:
                # Pruning was interrupted: of these nothing but the claims counts any more.
                if kind == Kind.AUTHORIZATION.value and sequence > claimed_until:
                    claim = claim_of(Row(sequence, record_id, kind, subject, body, b""))
                    running.add_claim(claim.token_key.hex(), claim.before, claim.after, claim.id)
                continue
            kept.discard(sequence)
            try:
                running.add(sequence, record_id, _KINDS[kind], subject, json.loads(body))
            except (ValueError, KeyError, TypeError):
                raise AuthenticationFailed(
                    f"record {sequence} was changed",
                    step="record hash",
                    advice="run `pos-gateway journal verify`",
                ) from None
        if kept:
            raise AuthenticationFailed(
                f"record {min(kept)} is missing, which was kept", step="journal sequence"
            )
        if last is not None:
            last.verify(self._key.public_key())
        self._head = (last.sequence, last.hash) if last else (0, GENESIS_HASH)
        with self._mutex:
            self._running = running
            self._view = None

    @contextmanager
    def _own_reader(self) -> Iterator[JournalReader]:
        """A connection for one long look, so that nobody else's short ones wait for it."""
        try:
            with JournalReader.open(self._path) as reader:
                yield reader
        except sqlite3.Error as error:
            raise _unavailable(error, "the journal cannot be read") from None

    @contextmanager
    def _read(self) -> Iterator[JournalFile]:
        """The second connection: it sees what is committed and nothing else."""
        with self._reading:
            try:
                if self._reader is None:
                    self._reader = JournalFile.open_for_reading(self._path)
                yield self._reader
            except sqlite3.Error as error:
                self._close_reader()
                raise _unavailable(error, "the journal cannot be read") from None

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class JournalReader:
    """A journal opened beside its gateway, running or not: to list and to verify."""

    def __init__(self, file: JournalFile) -> None:
        self._file = file

    @classmethod
    def open(cls, path: Path) -> JournalReader:
        """
        Raises:
            NotFound: there is no journal.
            Unavailable: it cannot be read.
        """
        return cls(JournalFile.open_for_reading(path))

    @property
    def gateway_id(self) -> str:
        return self._file.owner()[0]

    @property
    def last_sequence(self) -> int:
        """0 while it is empty."""
        last = self._file.last()
        return last.sequence if last is not None else 0

    @property
    def checkpoint(self) -> Checkpoint:
        """How far it was pruned."""
        return Checkpoint.of(self._file.checkpoint())

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the file, and how many of them are free for new records."""
        return self._file.sizes()

    def next_checkpoint(self, before: Checkpoint, older_than_unix_ms: int, below: int) -> Checkpoint:
        """How far it could be pruned now, below that sequence; see `retention.next_checkpoint`."""
        return next_checkpoint(self._file, before, older_than_unix_ms=older_than_unix_ms, below=below)

    def first_presented_since(self, unix_ms: int) -> int | None:
        """See `Journal.first_presented_since`."""
        return self._file.first_presented_since(unix_ms)

    @property
    def first_waiting(self) -> int:
        """The lowest sequence that waits for the ledger; the newest record's if none does."""
        return next(
            (record.sequence for records in self.waiting(1) for record in records), self.last_sequence
        )

    def waiting(self, limit: int) -> Iterator[list[Record]]:
        """All that waits for the ledger, in order, at most `limit` at a time."""
        after = 0
        while records := self._file.waiting(after, limit):
            yield records
            after = records[-1].sequence

    def open_records(self, limit: int) -> Iterator[list[Record]]:
        """All that has no word of the ledger, or was unknown to it, in order, at most `limit` at a time."""
        following, last = 1, self.last_sequence
        found: list[Record] = []
        while following <= last:
            records = self._file.presented(following, last, _PAGE_RECORDS)
            following = records[-1].sequence + 1 if len(records) == _PAGE_RECORDS else last + 1
            for record in records:
                verdict = self.last_verdict(record.id)
                if verdict is None or verdict == Verdict.UNKNOWN.value:
                    found.append(record)
                if len(found) == limit:
                    yield found
                    found = []
        if found:
            yield found

    def pruned_ids(self) -> set[UUID]:
        """Ids of the authorizations that were pruned."""
        return {UUID(bytes=claim.id) for claim in self._file.claims()}

    def last_verdict(self, record_id: UUID) -> str | None:
        """The ledger's last word on a record; None if there is none."""
        body = self._file.last_acknowledgement(record_id.bytes)
        return str(json.loads(body)["verdict"]) if body is not None else None

    def records(self, after: int = 0, limit: int = _PAGE_RECORDS) -> list[Record]:
        """At most `limit` records with a sequence above `after`, in order."""
        return self._file.after(after, limit)

    def get(self, record_id: UUID) -> Record:
        """
        Raises:
            NotFound: no such record.
        """
        record = self._file.find(record_id)
        if record is None:
            raise NotFound(f"the journal has no record {record_id}")
        return record

    def about(self, record_id: UUID) -> list[Record]:
        """The record of this id, if any, and every record that speaks of it, oldest first."""
        return self._file.about(record_id)

    def verify(self, gateway_key: Ed25519PublicKey) -> int:
        """Check every record; returns how many there are. See `verified`."""
        return self.verified(gateway_key).records

    def verified(self, gateway_key: Ed25519PublicKey) -> Verified:
        """Check sequence, chain, hash and signature of every record: from the checkpoint on as a chain,
        and those that are kept from before it one by one. Also that what the checkpoint says of the
        pruned ones adds up.

        Raises:
            AuthenticationFailed: step `journal sequence`, `journal chain`, `record hash`,
                `record signature` or `journal checkpoint`; the reason names the sequence.
        """
        checkpoint = self.checkpoint
        count, after, kept = 0, 0, set(checkpoint.kept)
        sequence, previous_hash = checkpoint.sequence, checkpoint.hash
        known: set[bytes] = set()
        while page := self._file.after(after, _PAGE_RECORDS):
            after = page[-1].sequence
            for record in page:
                kept.discard(record.sequence)
                if record.sequence > checkpoint.sequence:
                    sequence += 1
                    if record.sequence != sequence:
                        raise AuthenticationFailed(f"record {sequence} is missing", step="journal sequence")
                    if record.previous_hash != previous_hash:
                        raise AuthenticationFailed(
                            f"record {sequence} does not follow the one before it", step="journal chain"
                        )
                record.verify(gateway_key, known)
                previous_hash = record.hash if record.sequence > checkpoint.sequence else previous_hash
                count += 1
            known.clear()
        if kept:
            raise AuthenticationFailed(
                f"record {min(kept)} is missing, which was kept", step="journal sequence"
            )
        if sum(checkpoint.counts.values()) != checkpoint.sequence:
            raise AuthenticationFailed(
                f"the counts of the records up to {checkpoint.sequence} do not add up",
                step="journal checkpoint",
            )
        if claims_digest(all_claims(self._file, checkpoint)) != (checkpoint.claims, checkpoint.claims_digest):
            raise AuthenticationFailed(
                f"the claims of the records up to {checkpoint.sequence} were changed",
                step="journal checkpoint",
            )
        return Verified(count, checkpoint)

    def backup(self, target: Path, gateway_key: Ed25519PublicKey) -> int:
        """Copy the journal as it is at this moment, gateway running or not; returns its number of records.

        The copy appears under its name only once it is verified and on the disk.

        Raises:
            Conflict: there is a file of that name.
            Unavailable: the journal cannot be read or the copy not be written.
            AuthenticationFailed: the journal was changed; see `verify`.
        """
        if target.exists():
            raise Conflict(f"{target} is there already", advice="every backup needs a name of its own")
        partial = target.with_name(target.name + ".partial")
        try:
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
            self._file.copy_to(partial)
            with JournalReader.open(partial) as copy:
                count = copy.verify(gateway_key)
            fsync_file(partial)
            partial.rename(target)
            fsync_folder(target.parent)
        except (sqlite3.Error, OSError) as error:
            raise _unavailable(error, "the backup cannot be written") from None
        finally:
            partial.unlink(missing_ok=True)
        return count

    def export(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """What an auditor needs of every record with a sequence above `after`: all that hash and signature
        were made of, with the sealed proof's SHA-256 in place of the proof."""
        while page := self._file.after(after, _PAGE_RECORDS):
            after = page[-1].sequence
            for record in page:
                line = record.to_wire()
                del line["proof"]
                yield line | {"proof_sha256": hashlib.sha256(record.proof).hexdigest()}

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _prune_some(file: JournalFile) -> bool:
    """One step, in the order of sequences; returns whether any is left."""
    checkpoint = Checkpoint.of(file.checkpoint())
    kept = set(checkpoint.kept)
    rows = file.rows(0, _PRUNED_AT_ONCE + len(kept))
    doomed = [r.sequence for r in rows if r.sequence <= checkpoint.sequence and r.sequence not in kept]
    doomed = doomed[:_PRUNED_AT_ONCE]
    if not doomed:
        return False
    claimed_until = file.last_claim_sequence()
    claims = [
        claim_of(row)
        for row in rows
        if row.kind == Kind.AUTHORIZATION.value and claimed_until < row.sequence <= doomed[-1]
    ]
    file.set_aside(claims, doomed)
    return True


def lock_journal(journal: Path) -> int:
    """Keep a second gateway away for as long as the returned descriptor is open.

    Raises:
        Unavailable: another one has it.
    """
    path = journal.with_name(journal.name + ".lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Unavailable(
            f"another gateway is writing the journal beside {path.name}",
            advice="stop it first, or use another home directory",
        ) from None
    return descriptor


def _is_full(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code == sqlite3.SQLITE_FULL or getattr(error, "errno", None) == errno.ENOSPC


def _unavailable(error: Exception, what: str) -> Unavailable:
    if _is_full(error):
        return Unavailable(f"{what}: the disk is full", advice="make room; payments go on by themselves then")
    return Unavailable(f"{what}: {error}", advice="check the disk")
