"""What the journal's records add up to, kept in memory so that a tap never has to search the disk.

Built by one pass at opening and moved on by every append; the same code does both.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple
from uuid import UUID

from pos_gateway.authorization.decision import Interval
from pos_gateway.authorization.policy import Exposure
from pos_gateway.errors import InvalidMessage
from pos_gateway.records import Kind, Verdict


@dataclass(frozen=True, slots=True)
class Refusal:
    """A record that the ledger did not simply post: the staff must know what became of it."""

    record_id: UUID
    verdict: Verdict
    reason: str
    amount_minor: int
    at_unix_ms: int
    kind: Kind = Kind.AUTHORIZATION


class Refusals:
    """Tells which refusals are new, or changed, since the last look."""

    def __init__(self, known: tuple[Refusal, ...]) -> None:
        self._known = known

    def new(self, now: tuple[Refusal, ...]) -> list[Refusal]:
        if now is self._known:
            return []
        known, self._known = set(self._known), now
        return [refusal for refusal in now if refusal not in known]


NO_EXPOSURE: Final = Exposure(count=0, amount_minor=0, oldest_at_unix_ms=None)


@dataclass(frozen=True, slots=True)
class JournalView:
    """The journal at one moment, as the decision and the page want it.

    `exposure`: presented kinds without an acknowledgement, in amount less what was voided or refunded of
    them since. `latest_at_unix_ms`: the latest time any record carries since the clock was last
    confirmed; a clock behind it is not to be trusted. `snapshot_version`: the highest version ever
    activated, 0 before the first. `root_version`: the highest TUF root ever followed, 0 before the first
    that was not in the enrolment.
    """

    last_sequence: int = 0
    exposure: Exposure = NO_EXPOSURE
    latest_at_unix_ms: int = 0
    snapshot_version: int = 0
    root_version: int = 0
    last_acknowledged_at_unix_ms: int | None = None
    refused: tuple[Refusal, ...] = ()
    epoch: str = ""
    epoch_at_unix_ms: int = 0
    """When the epoch was learnt, by our clock; by the ledger's, if a letter told."""
    again: Again | None = None
    clock_confirmations: int = 0
    """How often the latest time may have been set back; to be compared, it means nothing by itself."""


@dataclass(frozen=True, slots=True)
class Again:
    """Presented records from `next_sequence` up to `until_sequence` are to be presented again: the ledger
    was restored from a backup and may have forgotten them."""

    next_sequence: int
    until_sequence: int


class Waiting(NamedTuple):
    """A record without an acknowledgement. `exposed_minor`: what the shop would lose without it."""

    sequence: int
    kind: Kind
    amount_minor: int
    at_unix_ms: int
    exposed_minor: int
    about: bytes | None = None
    online: bool = False
    """Did it rely on a grant or a note?"""


class Selection(NamedTuple):
    """What a batch is made of. `left_out_unix_ms`: the earliest tap time of an authorization that waits
    and is not in it; `counted` is False where too many wait for that to be looked at."""

    sequences: list[int]
    left_out_unix_ms: int | None
    counted: bool


class RunningView:
    """Adds records up. Not thread-safe: its journal guards it. Ids are raw bytes in here: half a million
    of them are taken in when a journal is opened."""

    def __init__(self) -> None:
        self._last_sequence = 0
        self._queue: OrderedDict[bytes, Waiting] = OrderedDict()
        self._amount_minor = 0
        self._online_amount_minor = 0
        self._latest_at_unix_ms = 0
        self._snapshot_version = 0
        self._root_version = 0
        self._last_acknowledged_at_unix_ms: int | None = None
        self._intervals: dict[str, list[tuple[int, int, bytes]]] = {}
        self._declined_claims: dict[str, list[tuple[int, int, bytes]]] = {}
        self._refused: dict[bytes, Refusal] = {}
        self._refused_value: tuple[Refusal, ...] = ()
        self._epoch = ""
        self._epoch_at_unix_ms = 0
        self._again: Again | None = None
        self._clock_confirmations = 0

    def add(
        self, sequence: int, record_id: bytes, kind: Kind, about: bytes | None, facts: Mapping[str, Any]
    ) -> None:
        """Take in the next record; its facts have passed `check_facts` when it was written."""
        self._last_sequence = sequence
        at_unix_ms: int = facts["at_unix_ms"]
        if at_unix_ms > self._latest_at_unix_ms or kind is Kind.CLOCK_CONFIRMATION:
            self._latest_at_unix_ms = at_unix_ms
        self._clock_confirmations += kind is Kind.CLOCK_CONFIRMATION
        if kind is Kind.AUTHORIZATION:
            amount_minor: int = facts["amount_minor"]
            online = facts.get("limit_source") in _ONLINE_SOURCES
            self._queue[record_id] = Waiting(
                sequence, kind, amount_minor, at_unix_ms, amount_minor, online=online
            )
            self._expose(amount_minor, online=online)
            self.add_claim(facts["token_key"], facts["counter_before"], facts["counter_after"], record_id)
        elif kind.corrects and about is not None:
            self._queue[record_id] = Waiting(sequence, kind, facts["amount_minor"], at_unix_ms, 0, about)
            self._take_back(about, facts["amount_minor"])
        elif kind.presented:
            self._queue[record_id] = Waiting(sequence, kind, 0, at_unix_ms, 0)
        elif kind is Kind.DECLINE and about is not None and "counter_after" in facts:
            # The card did claim these points, though nobody was paid.
            claim = (facts["counter_before"], facts["counter_after"], about)
            self._declined_claims.setdefault(facts["token_key"], []).append(claim)
        elif kind is Kind.ACKNOWLEDGEMENT and about is not None:
            self._last_acknowledged_at_unix_ms = at_unix_ms
            self._acknowledge(about, facts)
        elif kind is Kind.SNAPSHOT_ACTIVATION:
            self._snapshot_version = max(self._snapshot_version, facts["version"])
        elif kind is Kind.TRUST_ROTATION:
            self._root_version = max(self._root_version, facts["root_version"])
        elif kind is Kind.EPOCH:
            if facts["epoch"] != self._epoch:
                self._epoch_at_unix_ms = facts.get("ledger_unix_ms", at_unix_ms)
            self._epoch = facts["epoch"]
            self._again = _again(facts["next_sequence"], facts["until_sequence"])

    def add_claim(self, token_key: str, before: int, after: int, record_id: bytes) -> None:
        """Remember that points of a token's counter line were claimed here; once for each record."""
        claims = self._intervals.setdefault(token_key, [])
        claim = (before, after, record_id)
        place = bisect_left(claims, claim)
        if place == len(claims) or claims[place] != claim:
            claims.insert(place, claim)

    def state(self) -> dict[str, Any]:
        """What pruned records have told, for a checkpoint; see `resume`."""
        return {
            "latest_at_unix_ms": self._latest_at_unix_ms,
            "snapshot_version": self._snapshot_version,
            "root_version": self._root_version,
            "last_acknowledged_at_unix_ms": self._last_acknowledged_at_unix_ms,
            "epoch": self._epoch,
            "epoch_at_unix_ms": self._epoch_at_unix_ms,
            "next_sequence": self._again.next_sequence if self._again else 1,
            "until_sequence": self._again.until_sequence if self._again else 0,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; the records after its sequence are added next. It tells what held when
        it was written, later than them: adding them once more changes none of it."""
        self._latest_at_unix_ms = state["latest_at_unix_ms"]
        self._snapshot_version = state["snapshot_version"]
        self._root_version = state["root_version"]
        self._last_acknowledged_at_unix_ms = state["last_acknowledged_at_unix_ms"]
        self._epoch = state["epoch"]
        self._epoch_at_unix_ms = state.get("epoch_at_unix_ms", 0)
        self._again = _again(state["next_sequence"], state["until_sequence"])

    def value(self) -> JournalView:
        oldest = next(iter(self._queue.values()), None)
        return JournalView(
            last_sequence=self._last_sequence,
            exposure=Exposure(
                len(self._queue),
                self._amount_minor,
                oldest.at_unix_ms if oldest else None,
                self._online_amount_minor,
            ),
            latest_at_unix_ms=self._latest_at_unix_ms,
            snapshot_version=self._snapshot_version,
            root_version=self._root_version,
            last_acknowledged_at_unix_ms=self._last_acknowledged_at_unix_ms,
            refused=self._refused_value,
            epoch=self._epoch,
            epoch_at_unix_ms=self._epoch_at_unix_ms,
            again=self._again,
            clock_confirmations=self._clock_confirmations,
        )

    def select(self, limit: int, passing_over: Collection[bytes]) -> Selection:
        """The oldest that wait, without those on their way already and without what corrects one of them:
        it would arrive before its payment."""
        chosen: dict[bytes, int] = {}
        for record_id, waiting in self._queue.items():
            if len(chosen) == limit:
                break
            if record_id not in passing_over and waiting.about not in passing_over:
                chosen[record_id] = waiting.sequence
        sequences = list(chosen.values())
        if len(self._queue) - len(chosen) > _MOST_LEFT_OUT:
            return Selection(sequences, None, False)
        left_out = (
            waiting.at_unix_ms
            for record_id, waiting in self._queue.items()
            if record_id not in chosen and waiting.kind is Kind.AUTHORIZATION
        )
        return Selection(sequences, min(left_out, default=None), True)

    def waiting_since(self, unix_ms: int) -> tuple[int, int]:
        """How many wait that were tapped up to that time, and the money in them."""
        count = amount_minor = 0
        for waiting in self._queue.values():
            if waiting.at_unix_ms > unix_ms:
                break
            count += 1
            amount_minor += waiting.exposed_minor
        return count, amount_minor

    def waits(self, record_id: bytes) -> bool:
        return record_id in self._queue

    def queued_sequences(self) -> Iterator[int]:
        """Sequences of what is unsynchronised, oldest first."""
        return (waiting.sequence for waiting in self._queue.values())

    def overlapping(self, token_key: bytes, before: int, after: int) -> tuple[Interval, ...]:
        """Claims of the token that share a point with (before, after] of its counter line: authorizations,
        and what the card claimed in payments that were declined all the same.

        Authorizations of one token share none among themselves (the till declines one that would), so
        they are in order of their ends too, and few need to be looked at however many there are.
        """
        known = self._intervals.get(token_key.hex(), [])
        place = bisect_left(known, (after,))
        found = []
        while place and known[place - 1][1] > before:
            place -= 1
            found.append(Interval(known[place][0], known[place][1], UUID(bytes=known[place][2])))
        found.reverse()
        for start, end, sale_id in self._declined_claims.get(token_key.hex(), ()):
            if start < after and before < end:
                found.append(Interval(start, end, UUID(bytes=sale_id)))
        return tuple(found)

    def _expose(self, amount_minor: int, *, online: bool) -> None:
        self._amount_minor += amount_minor
        if online:
            self._online_amount_minor += amount_minor

    def _take_back(self, about: bytes, amount_minor: int) -> None:
        """Of a payment that the ledger has already, there is nothing left to lose."""
        payment = self._queue.get(about)
        if payment is not None:
            self._queue[about] = payment._replace(exposed_minor=payment.exposed_minor - amount_minor)
            self._expose(-amount_minor, online=payment.online)

    def _acknowledge(self, about: bytes, facts: Mapping[str, Any]) -> None:
        waiting = self._queue.pop(about, None)
        if waiting is not None:
            self._expose(-waiting.exposed_minor, online=waiting.online)
        verdict = _VERDICTS[facts["verdict"]]
        if verdict.paid:
            changed = bool(self._refused) and self._refused.pop(about, None) is not None
        elif waiting is not None:
            changed = True
            self._refused[about] = Refusal(
                UUID(bytes=about),
                verdict,
                facts["reason"],
                waiting.amount_minor,
                waiting.at_unix_ms,
                waiting.kind,
            )
        elif (known := self._refused.get(about)) is not None:
            changed = True
            self._refused[about] = replace(known, verdict=verdict, reason=facts["reason"])
        else:
            # Paid before, and after the ledger was restored no more: it tells itself what it was.
            changed = "of_kind" in facts
            if changed:
                self._refused[about] = Refusal(
                    UUID(bytes=about),
                    verdict,
                    facts["reason"],
                    facts["amount_minor"],
                    facts["tapped_at_unix_ms"],
                    Kind(facts["of_kind"]),
                )
        if changed:
            self._refused_value = tuple(self._refused.values())


def _again(next_sequence: int, until_sequence: int) -> Again | None:
    return Again(next_sequence, until_sequence) if next_sequence <= until_sequence else None


_MOST_LEFT_OUT: Final = 4000
"""More than that and the ledger is far behind anyway; counting them would hold up taps."""

_ONLINE_SOURCES: Final = ("grant", "note")

_VERDICTS: Final = {verdict.value: verdict for verdict in Verdict}

_FIELDS: Final[dict[Kind, dict[str, type]]] = {
    Kind.AUTHORIZATION: {
        "amount_minor": int,
        "token_key": str,
        "counter_before": int,
        "counter_after": int,
        "at_unix_ms": int,
    },
    Kind.DECLINE: {"sale_id": str, "at_unix_ms": int},
    Kind.REVERSAL: {"about": str, "amount_minor": int, "at_unix_ms": int},
    Kind.REFUND: {"about": str, "amount_minor": int, "at_unix_ms": int},
    Kind.RENUNCIATION: {
        "sale_id": str,
        "token_key": str,
        "previous_digest": str,
        "amount_minor": int,
        "at_unix_ms": int,
    },
    Kind.ACKNOWLEDGEMENT: {"about": str, "verdict": str, "reason": str, "at_unix_ms": int},
    Kind.SNAPSHOT_ACTIVATION: {"version": int, "at_unix_ms": int},
    Kind.TRUST_ROTATION: {"root_version": int, "at_unix_ms": int},
    Kind.CLOCK_CONFIRMATION: {"at_unix_ms": int, "high_water_unix_ms": int},
    Kind.SYNCHRONISATION: {"at_unix_ms": int, "ledger_unix_ms": int},
    Kind.EPOCH: {"epoch": str, "next_sequence": int, "until_sequence": int, "at_unix_ms": int},
    Kind.STAFF_ACTION: {"action": str, "by": str, "at_unix_ms": int},
    Kind.SHIFT: {"shift": str, "event": str, "by": str, "at_unix_ms": int},
    Kind.CHECKPOINT: {
        "sequence": int,
        "hash": str,
        "kept": list,
        "counts": dict,
        "totals": dict,
        "claims": int,
        "claims_digest": str,
        "state": dict,
        "at_unix_ms": int,
    },
}


def check_facts(kind: Kind, facts: Mapping[str, Any]) -> None:
    """Hold a record to what `RunningView` needs of its kind, before it is written for ever.

    Raises:
        InvalidMessage: names the missing or wrong field.
    """
    for name, expected in _FIELDS[kind].items():
        if type(facts.get(name)) is not expected:
            raise InvalidMessage(f"field {name!r} is missing or wrong", where=f"{kind.value} record")
    try:
        about(kind, facts)
        if kind is Kind.ACKNOWLEDGEMENT:
            Verdict(facts["verdict"])
        elif kind is Kind.AUTHORIZATION and bytes.fromhex(facts["token_key"]).hex() != facts["token_key"]:
            raise ValueError
    except ValueError:
        raise InvalidMessage("a field has the wrong form", where=f"{kind.value} record") from None


def about(kind: Kind, facts: Mapping[str, Any]) -> UUID | None:
    """Which other record or sale this record speaks of."""
    if kind is Kind.ACKNOWLEDGEMENT or kind.corrects:
        return UUID(facts["about"])
    if kind in (Kind.DECLINE, Kind.RENUNCIATION):
        return UUID(facts["sale_id"])
    if kind is Kind.SHIFT:
        return UUID(facts["shift"])
    if kind is Kind.STAFF_ACTION and "about" in facts:
        return UUID(facts["about"])
    return None
