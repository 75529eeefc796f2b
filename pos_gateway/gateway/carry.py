"""A gateway's part of what a stick carries: its queue out; the ledger's letters in.

Out goes all that the line would bring: what waits, what the ledger did not know, and what a restored ledger
may have forgotten. A letter's verdicts are journalled as the line's are. None counts twice: a stick may come
late, again, or after the line has brought the same or a later word.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pos_gateway.carrying import LIMITS, ROOT, TO_GATEWAY, TO_LEDGER, CarriedVerdict, Letter, SignedBatch
from pos_gateway.errors import AuthenticationFailed, InvalidInput, InvalidMessage, NotFound, Unavailable
from pos_gateway.gateway.feed import SnapshotFeed
from pos_gateway.gateway.fetcher import FolderRepository
from pos_gateway.gateway.journal import Draft, Journal
from pos_gateway.records import MAX_BATCH_RECORDS, Kind, Record, Verdict, uuid7
from pos_gateway.stick import read_set, trouble, write_set

_MARGIN_MS: Final = 86_400_000
_RANK: Final = {
    Verdict.UNKNOWN: 0,
    Verdict.LATE: 1,
    Verdict.INVALID: 2,
    Verdict.CONFLICT: 2,
    Verdict.DUPLICATE: 3,
    Verdict.POSTED: 3,
}
"""Within one epoch the ledger's word only rises; a carried one that is lower comes late."""


@dataclass(frozen=True, slots=True)
class Exported:
    records: int
    batches: int
    size: int

    def as_json(self) -> dict[str, Any]:
        return {"records": self.records, "batches": self.batches, "bytes": self.size}


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of a stick's letters. `journalled`: verdicts that were news. `passed_over`: known already,
    older than what is known, or of records that are not here. `damaged` and `refused`: files, and why."""

    letters: int = 0
    journalled: int = 0
    passed_over: int = 0
    damaged: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "letters": self.letters,
            "journalled": self.journalled,
            "passed_over": self.passed_over,
            "damaged": list(self.damaged),
            "refused": list(self.refused),
        }


def export_queue(journal: Journal, gateway_id: str, key: Ed25519PrivateKey, folder: Path) -> Exported:
    """Write the signed queue onto a stick, in the place of the one that is there.

    Raises:
        Unavailable: see `stick.write_set`; the queue that is on the stick stays.
    """
    count = batches = 0

    def contents() -> Iterator[bytes]:
        nonlocal count, batches
        for records in _to_present(journal):
            count, batches = count + len(records), batches + 1
            yield SignedBatch.make(gateway_id, records, key).to_text().encode()

    size = write_set(folder / ROOT / TO_LEDGER / gateway_id, contents())
    return Exported(count, batches, size)


def read_letters(
    folder: Path, *, authority: bytes, gateway_id: str, now_unix_ms: int
) -> tuple[list[Letter], Imported]:
    """The letters to this gateway that verify, oldest first, and what is to be told of the others.

    Raises:
        NotFound: the stick holds nothing for this gateway; it says whose it is.
        InvalidMessage, Unavailable: see `stick.read_set`.
    """
    place = folder / ROOT / TO_GATEWAY
    letters: list[Letter] = []
    damaged: list[str] = []
    refused: list[str] = []
    if not (place / gateway_id).is_dir():
        raise NotFound(
            f"{folder} brings no letter to {gateway_id}{_whose(place)}", advice="is it this shop's stick?"
        )
    for name, data in read_set(place / gateway_id):
        if data is None:
            damaged.append(name)
            continue
        try:
            letters.append(
                Letter.open(
                    data, authority=authority, gateway_id=gateway_id, now_unix_ms=now_unix_ms, where=name
                )
            )
        except (AuthenticationFailed, InvalidMessage) as error:
            refused.append(f"{name}: {error.reason}")
    letters.sort(key=lambda letter: (letter.at_unix_ms, len(letter.epochs)))
    return letters, Imported(damaged=tuple(damaged), refused=tuple(refused))


def take_letter(
    journal: Journal,
    letter: Letter,
    *,
    now_unix_ms: int,
    deadline_s: int | None,
    passing_over: Collection[UUID] = (),
    random_bytes: Callable[[int], bytes] = os.urandom,
) -> tuple[int, int]:
    """Journal what is news in a verified letter; returns how much was, and how much was not.

    `passing_over`: records that are on their way over the line; its answer will do. `deadline_s`: the
    issuer's presentment deadline, if known.

    Raises:
        AuthenticationFailed: step `letter epoch`: from before the ledger was restored from a backup.
        Unavailable, OutcomeUnknown: see `Journal.append`; taking it again is harmless.
    """

    def new_id() -> UUID:
        return uuid7(now_unix_ms, random_bytes(10))

    epoch_news = _epoch(journal, letter, now_unix_ms, deadline_s)
    if epoch_news is not None:
        journal.append_all([Draft(Kind.EPOCH, new_id(), epoch_news)])
    drafts: list[Draft] = []
    over = 0
    for told in letter.verdicts:
        facts = None if told.record_id in passing_over else _news(journal, told, now_unix_ms)
        if facts is None:
            over += 1
        else:
            drafts.append(Draft(Kind.ACKNOWLEDGEMENT, new_id(), facts))
    again = _again_until(journal, letter, now_unix_ms)
    if again is not None:
        drafts.append(Draft(Kind.EPOCH, new_id(), again))
    for at in range(0, len(drafts), MAX_BATCH_RECORDS):
        journal.append_all(drafts[at : at + MAX_BATCH_RECORDS])
    return len(drafts) - (again is not None), over


def take_letters(
    letters: Sequence[Letter], before: Imported, take: Callable[[Letter], tuple[int, int]]
) -> Imported:
    """All of them, as far as each counts."""
    journalled = over = taken = 0
    refused = list(before.refused)
    for letter in letters:
        try:
            news, old = take(letter)
        except AuthenticationFailed as error:
            refused.append(error.reason)
            continue
        taken, journalled, over = taken + 1, journalled + news, over + old
    return Imported(taken, journalled, over, before.damaged, tuple(refused))


def _to_present(journal: Journal) -> Iterator[list[Record]]:
    """Batches in the order of sequences, a payment before what corrects it; then what may be forgotten."""
    view = journal.view
    waiting = journal.queue(view.exposure.count)
    unknown = [journal.get(each.record_id) for each in view.refused if each.verdict is Verdict.UNKNOWN]
    rest = sorted(waiting + unknown, key=lambda record: record.sequence)
    for at in range(0, len(rest), MAX_BATCH_RECORDS):
        yield rest[at : at + MAX_BATCH_RECORDS]
    if view.again is None:
        return
    following = view.again.next_sequence
    while following <= view.again.until_sequence:
        records, following = journal.presented_before(following, view.again.until_sequence, MAX_BATCH_RECORDS)
        if records:
            yield records


def _epoch(
    journal: Journal, letter: Letter, now_unix_ms: int, deadline_s: int | None
) -> dict[str, object] | None:
    """What to journal about the ledger's epoch before a letter is taken; None if it is the known one."""
    view = journal.view
    newest = letter.epochs[-1]
    if newest == view.epoch:
        return None
    if view.epoch and view.epoch not in letter.epochs and letter.at_unix_ms <= view.epoch_at_unix_ms:
        raise AuthenticationFailed(
            "it is from before the ledger was restored from a backup",
            step="letter epoch",
            advice="nothing is lost: export once more, and ask the issuer for a newer stick",
        )
    last = view.last_sequence
    first: int | None = last + 1
    if view.epoch and deadline_s is None:
        first = 1
    elif view.epoch and deadline_s is not None:
        since = min(now_unix_ms, letter.at_unix_ms) - 1000 * deadline_s - _MARGIN_MS
        first = journal.first_presented_since(since)
    return {
        "epoch": newest,
        "next_sequence": last + 1 if first is None else first,
        "until_sequence": last,
        "at_unix_ms": now_unix_ms,
        "ledger_unix_ms": letter.at_unix_ms,
    }


def _news(journal: Journal, told: CarriedVerdict, now_unix_ms: int) -> dict[str, object] | None:
    try:
        record = journal.get(told.record_id)
    except NotFound:
        return None  # pruned since, or never ours
    if record.hash != told.record_hash or not record.kind.presented:
        return None
    facts: dict[str, object] = {
        "about": str(record.id),
        "verdict": told.verdict.value,
        "reason": told.reason,
        "at_unix_ms": now_unix_ms,
    }
    known = journal.last_verdict(record.id)
    if known is None:
        return facts
    before = Verdict(known)
    again = journal.view.again
    forgotten = again is not None and again.next_sequence <= record.sequence <= again.until_sequence
    if before is told.verdict or (before.paid and told.verdict.paid):
        return None
    if not forgotten and _RANK[told.verdict] <= _RANK[before]:
        return None
    written = record.facts()
    return facts | {
        "of_kind": record.kind.value,
        "amount_minor": written.get("amount_minor", 0),
        "tapped_at_unix_ms": written["at_unix_ms"],
    }


def _again_until(journal: Journal, letter: Letter, now_unix_ms: int) -> dict[str, object] | None:
    """How far presenting again to a restored ledger has come with this letter; None if no further."""
    view = journal.view
    if view.again is None:
        return None
    answered = {told.record_id for told in letter.verdicts}
    following, last = view.again.next_sequence, view.again.until_sequence
    while following <= last:
        records, beyond = journal.presented_before(following, last, MAX_BATCH_RECORDS)
        open_ = next((record for record in records if record.id not in answered), None)
        following = beyond if open_ is None else open_.sequence
        if open_ is not None:
            break
    if following == view.again.next_sequence:
        return None
    return {
        "epoch": view.epoch,
        "next_sequence": following,
        "until_sequence": last,
        "at_unix_ms": now_unix_ms,
    }


def _whose(place: Path) -> str:
    try:
        others = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
    except OSError as error:
        raise trouble(place, error) from None
    return f"; it is {', '.join(others[:3])}'s" if others else ""


def take_limits(feed: SnapshotFeed, folder: Path) -> dict[str, Any]:
    """Take newer limits from a stick; `problem` says why none, if so. Letters count without them."""
    place = folder / ROOT / LIMITS
    changed, problem = False, ""
    if place.is_dir():
        try:
            changed = feed.refresh(FolderRepository(place))
        except (AuthenticationFailed, InvalidInput, NotFound, Unavailable) as error:
            problem = error.reason
    limits = feed.current()
    return {
        "brought": place.is_dir(),
        "changed": changed,
        "version": limits.version if limits else None,
        "problem": problem,
    }
