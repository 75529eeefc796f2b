"""Which old records the journal can do without, and what stays of them: a signed checkpoint and the claims.

A checkpoint is a record in the chain like any other. It names the last pruned sequence, the chain's hash
there, counts and totals of all that was pruned, and `kept`: the few older records that stay because what
they tell is not settled. Claims, who tapped which points of a token's counter line, stay for good, in
44 bytes each: a copied card may come years later.

Everything up to the checkpoint's sequence that is not kept may then go, in small steps, in order. A crash
between two steps leaves records that the next step removes; nothing that counts is in them any more.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from uuid import UUID

from pos_gateway.gateway.journal_file import Claim, JournalFile, Row
from pos_gateway.records import GENESIS_HASH, Kind, Record, Verdict

MARGIN_S: Final = 7 * 86_400
"""Beyond the presentment deadline: records may have to be presented again until then."""

_MOST_KEPT: Final = 128
_PAGE_ROWS: Final = 500
_CLAIMS_DOMAIN: Final = b"pos-gateway pruned claims 1\0"
_NOTHING: Final = hashlib.sha256(_CLAIMS_DOMAIN).digest()
_KINDS: Final = {kind.value: kind for kind in Kind}
_PRESENTED: Final = frozenset(kind.value for kind in Kind if kind.presented)


def keep_s(keep_days: int, presentment_deadline_s: int | None) -> int | None:
    """How long acknowledged records are kept: as the shop wishes, never less than the issuer's deadline
    and a margin. None while the deadline is not known: everything is kept."""
    if presentment_deadline_s is None:
        return None
    return max(86_400 * keep_days, presentment_deadline_s + MARGIN_S)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All records up to `sequence` are pruned, but for `kept`. Counts by kind, totals in minor units by
    currency and kind, both of everything up to it."""

    sequence: int = 0
    hash: bytes = GENESIS_HASH
    kept: tuple[int, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    totals: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    claims: int = 0
    claims_digest: bytes = _NOTHING

    @classmethod
    def of(cls, record: Record | None) -> Checkpoint:
        """From its record, whose facts were checked when it was written; of none: nothing is pruned."""
        if record is None:
            return cls()
        facts = record.facts()
        return cls(
            sequence=facts["sequence"],
            hash=bytes.fromhex(facts["hash"]),
            kept=tuple(facts["kept"]),
            counts=facts["counts"],
            totals=facts["totals"],
            claims=facts["claims"],
            claims_digest=bytes.fromhex(facts["claims_digest"]),
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "sequence": self.sequence,
            "hash": self.hash.hex(),
            "kept": list(self.kept),
            "counts": dict(self.counts),
            "totals": {unit: dict(totals) for unit, totals in self.totals.items()},
            "claims": self.claims,
            "claims_digest": self.claims_digest.hex(),
        }


class _Answer(NamedTuple):
    at_unix_ms: int
    paid: bool


def next_checkpoint(
    file: JournalFile, before: Checkpoint, *, older_than_unix_ms: int, below: int
) -> Checkpoint:
    """How far pruning may go now: up to the first record that is younger, or whose acknowledgement is, or
    that has none, and below the sequence `below`. Nothing is changed."""
    plan = _Plan(file, before, older_than_unix_ms)
    plan.look_again_at_what_was_kept()
    after = before.sequence
    while rows := file.rows(after, min(_PAGE_ROWS, below - 1 - after)):
        for row in rows:
            if not plan.take(row):
                return plan.checkpoint()
        after = rows[-1].sequence
    return plan.checkpoint()


class _Plan:
    def __init__(self, file: JournalFile, before: Checkpoint, older_than_unix_ms: int) -> None:
        self._file = file
        self._before = before
        self._older_than_unix_ms = older_than_unix_ms
        self._sequence, self._hash = before.sequence, before.hash
        self._kept: list[int] = []
        self._kept_ids: set[bytes] = set()
        self._counts = Counter(before.counts)
        self._totals = {unit: Counter(totals) for unit, totals in before.totals.items()}
        self._claims, self._claims_digest = before.claims, before.claims_digest

    def look_again_at_what_was_kept(self) -> None:
        for sequence in self._before.kept:
            row = self._file.row(sequence)
            if row is not None and self._stays(row, self._answer(row)):
                self._keep(row)

    def take(self, row: Row) -> bool:
        facts = json.loads(row.body)
        if facts["at_unix_ms"] >= self._older_than_unix_ms:
            return False
        answer = self._answer(row)
        if row.kind in _PRESENTED and (answer is None or answer.at_unix_ms >= self._older_than_unix_ms):
            return False
        if self._stays(row, answer):
            if len(self._kept) >= _MOST_KEPT:
                return False
            self._keep(row)
        self._sequence, self._hash = row.sequence, row.hash
        self._counts[row.kind] += 1
        if row.kind in _PRESENTED and "amount_minor" in facts:
            totals = self._totals.setdefault(facts.get("currency", ""), Counter())
            totals[row.kind] += facts["amount_minor"]
        if row.kind == Kind.AUTHORIZATION.value:
            self._claims += 1
            self._claims_digest = _add_claim(self._claims_digest, claim_of(row))
        return True

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(
            self._sequence,
            self._hash,
            tuple(self._kept),
            dict(self._counts),
            {unit: dict(totals) for unit, totals in self._totals.items()},
            self._claims,
            self._claims_digest,
        )

    def _answer(self, row: Row) -> _Answer | None:
        """The ledger's last word on a presented record."""
        if row.kind not in _PRESENTED:
            return None
        body = self._file.last_acknowledgement(row.id)
        if body is None:
            return None
        facts = json.loads(body)
        return _Answer(facts["at_unix_ms"], Verdict(facts["verdict"]).paid)

    def _stays(self, row: Row, answer: _Answer | None) -> bool:
        """Was it refused, or does it speak of a record that was?"""
        return (answer is not None and not answer.paid) or row.about in self._kept_ids

    def _keep(self, row: Row) -> None:
        self._kept.append(row.sequence)
        if row.kind in _PRESENTED:
            self._kept_ids.add(row.id)


def claim_of(row: Row) -> Claim:
    """What an authorization claims of its token's counter line."""
    facts = json.loads(row.body)
    return Claim(
        row.sequence,
        row.id,
        bytes.fromhex(facts["token_key"]),
        facts["counter_before"],
        facts["counter_after"],
    )


def claims_digest(claims: Iterable[Claim]) -> tuple[int, bytes]:
    """How many, and the hash over all of them in order."""
    count, digest = 0, _NOTHING
    for claim in claims:
        count += 1
        digest = _add_claim(digest, claim)
    return count, digest


def all_claims(file: JournalFile, checkpoint: Checkpoint) -> Iterator[Claim]:
    """Those set aside, and those of records that pruning has not come to yet."""
    last = 0
    for claim in file.claims():
        last = claim.sequence
        yield claim
    for row in file.authorizations(last, checkpoint.sequence):
        yield claim_of(row)


def _add_claim(digest: bytes, claim: Claim) -> bytes:
    row = b"".join(
        (
            claim.sequence.to_bytes(8, "big"),
            UUID(bytes=claim.id).bytes,
            claim.token_key,
            claim.before.to_bytes(8, "big"),
            claim.after.to_bytes(8, "big"),
        )
    )
    return hashlib.sha256(digest + row).digest()
